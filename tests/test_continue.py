"""A conversion killed at any moment goes on, and its output is that of one nobody disturbed."""

import json
import os
import shutil
import signal

import pytest

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files import lock
from iwopd_megatron.files.rawfile import UNFINISHED, OutputFile
from iwopd_megatron.weights.convert import hf_to_megatron, megatron_to_hf


def files(folder):
    return {str(x.relative_to(folder)): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


@pytest.fixture(scope="module")
def checkpoint(moe_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "m"
    hf_to_megatron(moe_folder, out)
    return out


@pytest.fixture(scope="module")
def exported(moe_folder, checkpoint):
    out = checkpoint.with_name("b")
    megatron_to_hf(checkpoint, out, moe_folder)
    return out


def convert(direction, moe_folder, checkpoint, out, **options):
    said = []
    options["say"] = said.append
    if direction == "import":
        result = hf_to_megatron(moe_folder, out, **options)
    else:
        result = megatron_to_hf(checkpoint, out, moe_folder, **options)
    return result, said


def killed_after(writes, direction, *folders, **options):
    """A conversion in a process of its own, gone by SIGKILL in the middle of one of its writes."""
    child = os.fork()
    if child == 0:
        real, count = OutputFile.write, 0

        def dying(self, data, position):
            nonlocal count
            count += 1
            if count == writes:
                real(self, memoryview(data)[: len(data) // 2], position)
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, data, position)

        OutputFile.write = dying
        convert(direction, *folders, **options)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


# write that is cut short, tensors kept at least; 255 of an import are envelopes, first
MOMENTS = [("import", 10, 0), ("import", 262, 1), ("import", 340, 60), ("export", 1, 0),
           ("export", 30, 20), ("export", 130, 100)]  # fmt: skip


@pytest.mark.parametrize(("direction", "writes", "kept"), MOMENTS)
@pytest.mark.parametrize(("workers", "force"), [(1, False), (3, True)])
def test_killed_and_continued(
    direction, writes, kept, workers, force, moe_folder, checkpoint, exported, tmp_path
):
    expected = files(checkpoint if direction == "import" else exported)
    folders, options = (moe_folder, checkpoint, tmp_path / "out"), {"workers": workers}
    if force:
        shutil.copytree(checkpoint, tmp_path / "out")
        options["force"] = True
    killed_after(writes, direction, *folders, **options)
    assert (tmp_path / "out").exists() == force
    assert (tmp_path / "out.partial" / UNFINISHED).is_file()
    result, said = convert(direction, *folders, **options)
    assert kept <= result["kept"] < 135 and said == []
    assert files(tmp_path / "out") == expected
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("direction", ["import", "export"])
def test_what_was_damaged_meanwhile_is_written_again(
    direction, moe_folder, checkpoint, exported, tmp_path
):
    """As after a power failure, where a recorded block may not have reached the disk."""
    folders = moe_folder, checkpoint, tmp_path / "out"
    killed_after(330 if direction == "import" else 130, direction, *folders)
    record = tmp_path / "out.partial" / UNFINISHED
    before = sum(len(json.loads(line)) for line in record.read_text().splitlines()[1:])
    with record.open("a") as file:
        file.write('{"model.norm.we')  # torn
    largest = max((tmp_path / "out.partial").iterdir(), key=lambda x: x.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[8_192:70_000] = bytes(70_000 - 8_192)
    largest.write_bytes(content)
    result, _ = convert(direction, *folders)
    assert 0 < result["kept"] < before
    assert files(tmp_path / "out") == files(checkpoint if direction == "import" else exported)


@pytest.mark.parametrize("change", ["source", "settings"])
def test_what_another_conversion_left_is_removed(change, moe_folder, tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(moe_folder, source)
    killed_after(340, "import", source, None, tmp_path / "out")
    if change == "source":
        os.utime(source / "model.safetensors", (1, 1))
    said = []
    result = hf_to_megatron(
        source, tmp_path / "out", names="te" if change == "settings" else "native", say=said.append
    )
    assert result["kept"] == 0
    assert said == [
        f"{tmp_path}/out.partial is of another source or other settings; it is removed."
    ]


def test_two_at_once_are_refused(moe_folder, tmp_path):
    out = tmp_path / "out"
    child, (read, write) = None, os.pipe()
    child = os.fork()
    if child == 0:
        with lock.locked(tmp_path / "out.partial"):
            os.write(write, b"!")
            signal.pause()
    try:
        os.read(read, 1)
        with pytest.raises(RecipeError, match=f"in use by process {child} on "):
            hf_to_megatron(moe_folder, out)
        assert (tmp_path / "out.partial" / lock.NAME).is_file()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert hf_to_megatron(moe_folder, out)["tensors"] == 135  # a dead one's lock is taken over
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
