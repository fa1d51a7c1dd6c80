"""Make PyPI's CUDA builds importable on a CPU-only torch; run with the environment's own Python.

Two places: torchvision's operators live in a library that needs CUDA, so two of them are declared
here; and SGLang pins host memory for CUDA when it returns routed experts, which is left out.
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


def leave_out_pinned_memory() -> None:
    file = PACKAGES / "sglang/srt/mem_cache/pool_host/common.py"
    text = file.read_text()
    line = "    # Avoid oversized cudaHostRegister calls on large host pools.\n"
    if MARK not in text:
        if text.count(line) != 1:
            raise SystemExit(f"{file} is not the version this was written for (sglang 0.5.23)")
        guard = f"    if not torch.cuda.is_available():  {MARK}\n        return\n"
        file.write_text(text.replace(line, line + guard))


declare_torchvision_operators()
leave_out_pinned_memory()
