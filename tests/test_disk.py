"""What a disk does is told from other trouble, in one sentence that names what is still good."""

import errno
import os
import resource

import pytest
import torch
from safetensors import SafetensorError

from iwopd_megatron.cli.worker import _explain
from iwopd_megatron.errors import DiskError, GateError, RecipeError
from iwopd_megatron.records.disk import disk_reason, disk_told
from iwopd_megatron.train.sharded_save import RankFiles
from iwopd_megatron.weights.torch_dist.writer import CheckpointPlan

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/metrics.jsonl")


def caused(outer, inner):
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FULL, "No space left on device"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded"),
        (OSError(errno.EIO, "x"), "Input/output error"),
        (OSError(errno.EROFS, "x"), "Read-only file system"),
        (OSError(errno.EFBIG, "x"), "File too large"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on"),
        (caused(RuntimeError("PytorchStreamWriter failed writing file data/0"), FULL),
         "No space left on device"),
        (OSError(errno.ECONNREFUSED, "x"), None),
        (ValueError("x"), None),
    ],
    ids=str,
)  # fmt: skip
def test_reasons(error, reason):
    found = disk_reason(error)
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_run_names_its_last_good_checkpoint(has_checkpoint, tmp_path):
    good = tmp_path / "checkpoints/round_000004"
    if has_checkpoint:
        good.mkdir(parents=True)
        (tmp_path / "checkpoints/round_000006.partial").mkdir()
    with pytest.raises(DiskError) as told, disk_told(tmp_path):
        raise FULL
    text, last = str(told.value), f"the last good checkpoint is {good}"
    assert told.value.exit_code == 75 and "/x/metrics.jsonl could not be written (No space" in text
    assert (last if has_checkpoint else "there is no checkpoint yet") in text
    assert text.endswith(": make room and go on with --resume.")


def test_other_errors_pass(tmp_path):
    for error in (GateError("x"), RecipeError("No space left on device"), ValueError("y")):
        with pytest.raises(type(error)), disk_told(tmp_path):
            raise error


def test_a_writer_that_finds_a_full_disk_fails_with_its_reason(tmp_path):
    """A limit on a file's size stands for the disk: the error has a number either way."""
    plan = CheckpointPlan()
    slot = plan.add("x", (100_000,), torch.float32, (0,), (100_000,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError) as failed:
            RankFiles(tmp_path, plan, [(slot, torch.zeros(100_000))]).write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert disk_reason(failed.value) == os.strerror(errno.EFBIG)


def test_the_rank_that_has_a_reason_is_the_one_that_is_heard(capsys):
    lost = "Traceback\nRuntimeError: Connection closed by peer"
    full = "Traceback\niwopd_megatron.errors.DiskError: x could not be written."
    assert _explain(lost, [lost, full]) == 75
    assert capsys.readouterr().err == "error: x could not be written.\n"
    assert _explain(lost, [lost]) == 1
