"""metrics.jsonl: torn lines, the cut on resume, and numbers JSON has no word for."""

import json
import math

import pytest

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.records.runlog import MetricsLog, read_metrics


def line(number: int, **values) -> dict:
    return {"kind": "round", "round": number, **values}


def write(tmp_path, *lines: dict, **kwargs):
    log = MetricsLog(tmp_path, **kwargs)
    for one in lines:
        log.write(one)
    log.close()
    return read_metrics(tmp_path)


def test_lines_come_back(tmp_path):
    lines = [line(1, loss=0.25), line(2, loss=-1e-9, deciles=[1.0, None], note="a\nb\u2028")]
    assert write(tmp_path / "new" / "run", *lines) == lines


def test_each_line_is_on_disk_once_written(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(line(1))
    assert read_metrics(tmp_path) == [line(1)]
    log.close()


def test_numbers_that_are_not_finite_become_null(tmp_path):
    values = {"loss": math.nan, "deep": {"list": [1.0, math.inf, {"x": -math.inf}]}}
    (got,) = write(tmp_path, line(1, **values, fine=2.5))
    assert got == line(1, loss=None, deep={"list": [1.0, None, {"x": None}]}, fine=2.5)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text


@pytest.mark.parametrize("torn", ['{"kind": "rou', '{"kind": "round", "round": 3', "\udce9"])
def test_torn_last_line_is_ignored(tmp_path, torn):
    lines = [line(1), line(2)]
    write(tmp_path, *lines)
    with (tmp_path / "metrics.jsonl").open("a", errors="surrogateescape") as file:
        file.write(torn)
    assert read_metrics(tmp_path) == lines
    assert write(tmp_path, line(3), resumed_round=2) == [*lines, line(3)]


def test_resume_cuts_later_rounds(tmp_path):
    write(tmp_path, line(1), line(2), line(3, loss=9.0), line(4))
    got = write(tmp_path, line(3, loss=1.0), resumed_round=2)
    assert got == [line(1), line(2), line(3, loss=1.0)]
    assert [f.name for f in tmp_path.iterdir() if "partial" in f.name] == []


def test_a_new_run_starts_empty(tmp_path):
    write(tmp_path, line(1), line(2))
    assert write(tmp_path, line(1, loss=3.0)) == [line(1, loss=3.0)]


def test_resume_without_a_log(tmp_path):
    assert write(tmp_path, line(6), resumed_round=5) == [line(6)]


def test_a_broken_line_in_the_middle_is_not_hidden(tmp_path):
    whole = [json.dumps(line(number)) for number in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([whole[0], '{"rou', whole[1], ""]))
    with pytest.raises(RecipeError, match="metrics.jsonl: line 2 is damaged: it is not JSON"):
        read_metrics(tmp_path)


def test_tensorboard_gets_scalars(tmp_path):
    write(tmp_path, line(1, loss=0.5, note="text", deciles=[1.0]))
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    assert b"round/loss" in content
    assert b"round/note" not in content and b"round/deciles" not in content
