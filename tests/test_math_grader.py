"""Known-hard math answers; the pool survives what hangs and crashes."""

import json
import os
import selectors
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.grading import pool as grading_pool
from iwopd_megatron.grading import worker as grading_worker
from iwopd_megatron.grading.graders import GRADERS, check_answer, grade
from iwopd_megatron.grading.math.grader import is_right, last_boxed
from iwopd_megatron.grading.pool import Grade, GradingPool, Submission, count_trouble, describe

RIGHT = [  # (content of the box, reference answer)
    (r"\frac{1}{2}", "0.5"), (r"\dfrac12", r"\frac{1}{2}"), ("1/2", r"\frac{1}{2}"),
    (r"1\frac{1}{2}", r"\frac{3}{2}"), (r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt[3]{27}", "3"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"), (r"50\%", "0.5"), (r"50\%", "50"),
    ("1,000", "1000"), (r"\$18.90", "18.9"), (r"10\text{ cm}", "10"), (r"5\,\mathrm{km}", "5"),
    (r"90^\circ", "90"), (r"\{3, 2, 1\}", r"\{1,2,3\}"), ("2, 1", r"\{1,2\}"),
    (r"\left[0, 1\right)", "[0,1)"), (r"(3,\infty)\cup(-\infty,2)", r"(-\infty,2) \cup (3,\infty)"),
    (r"(3,\infty)", "x > 3"), ("x = 5", "5"), ("(x+1)^2", "x^2+2x+1"), (r"\binom{5}{2}", "10"),
    (r"\frac{\pi}{2}", r"\pi/2"), ("2^{10}", "1024"), (r"\text{Yes}", "Yes"), ("(B)", "B"),
    (r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\frac{\frac{1}{2}}{\sqrt{\frac{1}{4}}}", "1"), ("$7$", "7"), ("7", r"so \boxed{7}"),
]  # fmt: skip
WRONG = [
    ("3", "4"), (r"\frac{1}{3}", "0.33"), ("(0,1)", "[0,1)"), ("(2,1)", "(1,2)"), ("No", "Yes"),
    (r"\{1,2\}", r"\{1,2,3\}"), ("x < 3", r"(3,\infty)"), ("", "0"), (r"\sqrt{2}", "1.4"),
    ("A", "B"), (r"\frac{1}{", "1"), (r"\text{none}", "0"),
]  # fmt: skip


@pytest.mark.parametrize(("box", "answer"), RIGHT)
def test_right(box, answer):
    assert is_right(f"Hence \\boxed{{{box}}}.", answer)


@pytest.mark.parametrize(("box", "answer"), WRONG)
def test_wrong(box, answer):
    assert not is_right(f"Hence \\boxed{{{box}}}.", answer)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{a^{b}}{c}}", r"\frac{a^{b}}{c}"),
        (r"\boxed{\{1, \{2\}\}} end", r"\{1, \{2\}\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{4} and \boxed{5", "4"),
        (r"the answer is 4", None),
        (r"\boxed{", None),
        (r"\boxed{\}", None),
    ],
)
def test_last_box(text, content):
    assert last_boxed(text) == content


def test_no_box_is_wrong():
    assert not is_right("The answer is 4.", "4")
    assert is_right(r"First \boxed{3}, no: \boxed{4}", "4")
    assert not is_right(r"First \boxed{4}, no: \boxed{3}", "4")


TOWER = Submission("math", r"\boxed{9^{9^{9^{9^{9}}}}}", "1")  # as long as it takes to write it out
FOUR = Submission("math", r"\boxed{2+2}", "4")


@pytest.mark.parametrize("limit", ["processor", "wall"])
def test_pool_survives_a_hang(monkeypatch, limit):
    """Either limit alone ends it: each test gives the other one hours."""
    monkeypatch.setattr(grading_pool, "WALL", {"processor": 10_000, "wall": 4e-4}[limit])
    monkeypatch.setattr(grading_pool, "LEAST_WALL", 0)
    pool = GradingPool(workers=1, seconds={"processor": 2, "wall": 10_000}[limit])
    try:
        assert pool.grade([FOUR]) == [Grade(1.0)]
        monkeypatch.setattr(grading_pool, "STARTUP", 20.0)
        found = pool.grade([TOWER, FOUR, Submission("math", r"\boxed{5}", "4"), FOUR])
        assert [grade.right for grade in found] == [0, 1, 0, 1]
        kind = {"processor": "cut at 2 s", "wall": "cut after 4 s of waiting"}[limit]
        assert [grade.trouble for grade in found] == [kind, "", "", ""]
    finally:
        pool.close()


def test_pool_survives_a_crash():
    pool = GradingPool(workers=1, seconds=60)
    try:
        assert pool.grade([FOUR]) == [Grade(1.0)]
        pool.workers[0].process.kill()
        pool.workers[0].process.wait()
        # the one in hand is lost, the next is not
        assert pool.grade([FOUR, FOUR]) == [Grade(0.0, "crashed"), Grade(1.0)]
    finally:
        pool.close()


def test_what_a_grader_raises_is_trouble(monkeypatch):
    def broken(response, answer):
        raise ZeroDivisionError(response)

    monkeypatch.setitem(GRADERS, "math", broken)
    result = grading_worker._grade("math", "1", "2")
    assert result == {"right": False, "trouble": "raised ZeroDivisionError"}
    reader, writer = map(os.fdopen, os.pipe(), ("rb", "wb"))
    with reader, writer, selectors.DefaultSelector() as busy:
        writer.write(json.dumps(result).encode() + b"\n")
        writer.flush()
        worker = SimpleNamespace(grades=reader, received=b"", place=0, become_idle=lambda: None)
        busy.register(reader, selectors.EVENT_READ, worker)
        grades = [Grade(1.0)]
        GradingPool(1, 2)._read(worker, busy, grades)
    assert grades == [Grade(0.0, "raised ZeroDivisionError")]


def test_what_cannot_be_read_is_wrong_and_no_trouble():
    assert grade([Submission("math", r"\boxed{\frac{)_^}", r"\frac{(}{")]) == [Grade(0.0)]
    assert grade([Submission("math", r"\boxed{)_^(}", r"\frac{(}{")]) == [Grade(0.0)]


def test_trouble_in_words():
    grades = [Grade(0.0, "crashed"), Grade(1.0), *[Grade(0.0, "cut at 2 s")] * 3]
    trouble = count_trouble(grades)
    assert trouble == {"cut at 2 s": 3, "crashed": 1}
    assert describe(trouble) == "grading trouble: 3 cut at 2 s, 1 crashed"
    assert describe(count_trouble([Grade(0.0)])) == ""


def test_grades_are_in_order_whatever_kinds():
    toy = Submission("selection_sort", "abbb", "ab")
    answers = [FOUR, toy, Submission("math", r"\boxed{5}", "4"), FOUR]
    assert [found.right for found in grade(answers)] == [1, 0, 0, 1]


def test_unknown_grader():
    with pytest.raises(RecipeError, match="no grader 'poetry'; known graders: math, code"):
        grade([Submission("poetry", "", "")])


def test_workers_die_with_their_parent(tmp_path):
    """Killed, a parent cannot close anything: the kernel ends its workers, a busy one too."""
    import signal
    import subprocess
    import sys

    script = (
        "from iwopd_megatron.grading.pool import GradingPool, Submission\n"
        "pool = GradingPool(1, 600)\n"
        f"pool.grade([Submission(*{tuple(FOUR)!r})])\n"
        "print(pool.workers[0].process.pid, flush=True)\n"
        f"pool.grade([Submission(*{tuple(TOWER)!r})])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    assert os.path.exists(f"/proc/{worker}")
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    for _ in range(200):
        if not os.path.exists(f"/proc/{worker}"):
            return
        time.sleep(0.05)
    raise AssertionError(f"worker {worker} still runs")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (r"\boxed{}", "says nothing"), (r"\frac{1}{2", "brace"), ("1}{2", "brace"), ("$ $", "says"),
    ],
)  # fmt: skip
def test_references_that_no_answer_equals_are_refused(answer, words):
    with pytest.raises(RecipeError, match=words):
        check_answer("math", answer, "x.jsonl line 1")


def test_references_are_refused_only_where_nothing_equals_them():
    for name in ("development", "first", "second", "third", "fourth", "fifth", "sixth"):
        file = Path(__file__).parent / "math_pairs" / f"{name}.tsv"
        for line in file.read_text(encoding="utf-8").splitlines()[1:]:
            check_answer("math", line.split("\t")[3], file.name)
