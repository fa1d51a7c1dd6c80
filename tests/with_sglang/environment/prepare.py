"""Make PyPI's CUDA builds importable on a CPU-only torch; run with the environment's own Python.

Two places: torchvision's operators live in a library that needs CUDA, so two of them are declared
here; and SGLang pins host memory for CUDA when it returns routed experts, which is left out.
And a server's processes are forked, not spawned: 6,000 modules are imported once, not three times.
"""

import importlib.util
import pathlib

MARK = "# declared for a torch without CUDA"
PACKAGES = pathlib.Path(importlib.util.find_spec("torch").origin).parents[1]


def declare_torchvision_operators() -> None:
    file = PACKAGES / "torchvision/extension.py"
    text = file.read_text()
    if MARK not in text:
        schemas = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",)
        schemas += (schemas[0].replace("nms", "qnms", 1),)
        lines = [f"if not _has_ops():  {MARK}"]
        lines += ['    _library = torch.library.Library("torchvision", "DEF")']
        lines += [f'    _library.define("{schema}")' for schema in schemas]
        file.write_text(text + "\n\n" + "\n".join(lines) + "\n")


def replace_line(name: str, line: str, new: str) -> None:
    file = PACKAGES / "sglang/srt" / name
    text = file.read_text()
    if MARK not in text:
        if text.count(line) != 1:
            raise SystemExit(f"{file} is not the version this was written for (sglang 0.5.23)")
        file.write_text(text.replace(line, new))


def leave_out_pinned_memory() -> None:
    line = "    # Avoid oversized cudaHostRegister calls on large host pools.\n"
    guard = f"    if not torch.cuda.is_available():  {MARK}\n        return\n"
    replace_line("mem_cache/pool_host/common.py", line, line + guard)


def fork_processes() -> None:
    line = '    mp.set_start_method("spawn", force=True)\n'
    fork = line.replace("spawn", "fork").replace("\n", f"  {MARK}\n")
    replace_line("entrypoints/engine.py", line, fork)


declare_torchvision_operators()
leave_out_pinned_memory()
fork_processes()
