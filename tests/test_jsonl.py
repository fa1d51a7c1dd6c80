"""Files of lines as people have them: what is read all the same, and what is named instead."""

import bz2
import gzip
import json
import lzma

import pytest

from iwopd_megatron.config.data import Source
from iwopd_megatron.data.benchmarks import load_benchmark, with_path
from iwopd_megatron.data.sources import read_source
from iwopd_megatron.errors import RecipeError

ROWS = [
    {"question": f"{i}+1?", "answer": i + 1, "difficulty": 1, "source": "toy"} for i in range(3)
]
LINES = [json.dumps(row) for row in ROWS]
BOM = "\ufeff"


def questions(path, content: str | bytes) -> list[str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [problem.question for problem in read_source(Source(path=path))[0]]


def refusal(path, content: str | bytes) -> str:
    with pytest.raises(RecipeError) as error:
        questions(path, content)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(LINES),
        BOM + "\n".join(LINES) + "\n",
        "\n".join(LINES) + "\n\n",
        "\n".join(LINES) + "\n  \t\n\n",
        "\n\n" + "\n\n".join(LINES),
        BOM + "\n" + "\n".join(LINES),
        "\r\n".join(LINES) + "\r\n\r\n",
        BOM + LINES[0] + "\n" + BOM + "\n".join(LINES[1:]),
    ],
    ids=[
        "plain",
        "mark",
        "blank last line",
        "blanks",
        "blank between",
        "mark alone",
        "crlf",
        "joined",
    ],
)
def test_marks_and_blank_lines_are_passed_over(tmp_path, content):
    path = tmp_path / "data.jsonl"
    assert questions(path, content) == [row["question"] for row in ROWS]


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    content = f"{BOM}{LINES[0]}\n\n\n{{}}\n"
    assert "data.jsonl line 4 lacks 'question'" in refusal(tmp_path / "data.jsonl", content)


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("before", ["", BOM, "\n"])
def test_an_array_is_named(tmp_path, name, indent, before):
    message = refusal(tmp_path / name, before + json.dumps(ROWS, indent=indent))
    assert "is a JSON array" in message and "one object a line" in message


def test_objects_over_several_lines_are_named(tmp_path):
    content = "\n".join(json.dumps(row, indent=2) for row in ROWS)
    assert "over several lines" in refusal(tmp_path / "data.json", content)


TEXT = "\n".join(LINES)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(TEXT.encode(), mtime=0), "compressed with gzip"),
        (bz2.compress(TEXT.encode()), "compressed with bzip2"),
        (lzma.compress(TEXT.encode()), "compressed with xz"),
        (b"PAR1\x15\x04", "Parquet; let its name end with .parquet"),
        (b"PK\x03\x04...", "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS"),
        (TEXT.encode("utf-16"), "UTF-16"),
        (TEXT.encode("utf-16-le"), "UTF-16"),
        (TEXT.encode("utf-16-be"), "UTF-16"),
        (TEXT.encode("utf-32"), "UTF-32"),
        (b"", "is empty"),
        ("\n \n", "is empty"),
        (BOM, "is empty"),
    ],
)
def test_other_formats_are_named(tmp_path, content, words):
    assert words in refusal(tmp_path / "data.jsonl", content)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            LINES[0][:-1] + ",}",
            "line 2 is not JSON (",
        ),
        (LINES[0] + ",", "line 2 is not JSON (Extra data at column"),
        (LINES[0] + LINES[1], "line 2 is not JSON (Extra data"),
        ("{'question': 1}", "line 2 is not JSON (Expecting property name"),
        ("<html>", "line 2 is not JSON"),
        ("[1]", "line 2 holds an array"),
        ("3", "line 2 holds a number"),
        ('"a"', "line 2 holds a text"),
        ("true", "line 2 holds true or false"),
        ("null", "line 2 holds null"),
        ("[" * 100000, "line 2 cannot be read as JSON"),
        ('{"a": ' + "9" * 5000 + "}", "line 2 cannot be read as JSON"),
        (LINES[0].replace("?", "é").encode("latin-1"), "line 2 is not UTF-8: byte"),
        (json.dumps(ROWS[0] | {"difficulty": float("nan")}), "line 2: difficulty nan"),
        (json.dumps(ROWS[0] | {"difficulty": float("inf")}), "line 2: difficulty inf"),
        (json.dumps(ROWS[0] | {"answer": float("nan")}), "line 2: answer is nan"),
        (json.dumps(ROWS[0] | {"answer": " "}), "line 2: answer is empty"),
        (json.dumps(ROWS[0] | {"question": " \n"}), "line 2: question is empty"),
        (json.dumps(ROWS[0] | {"question": "a\ud83d"}), "line 2: question has half a character"),
        (json.dumps(ROWS[0] | {"answer": "\ud83d"}), "line 2: answer has half a character"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, words):
    line = line if isinstance(line, bytes) else line.encode()
    assert words in refusal(tmp_path / "data.jsonl", LINES[0].encode() + b"\n" + line + b"\n")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_none_is_no_matter_in_columns_nobody_reads(tmp_path, value):
    line = LINES[0][:-1] + f', "score": {value}}}'
    assert questions(tmp_path / "data.jsonl", line) == ["0+1?"]


def test_what_is_no_file_and_what_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="/dev/null is neither a file nor a folder"):
        read_source(Source(path="/dev/null"))
    with pytest.raises(RecipeError, match="/proc/self/mem cannot be read: "):
        read_source(Source(path="/proc/self/mem"))


@pytest.mark.parametrize("name", ["own", "aime24", "humaneval+", "mbpp+"])
def test_benchmarks_are_read_by_the_same_rule(tmp_path, name):
    """Their files come with a mark and blank lines too, and as arrays."""
    path = tmp_path / "bench.jsonl"
    row = ROWS[0] | {
        "problem": "1+1?",
        "prompt": "# 1+1?",
        "task_id": "HumanEval/900",
        "entry_point": "f",
        "canonical_solution": "\ndef f(x): return x",
        "base_input": [[1]],
        "plus_input": [[2]],
        "atol": 0,
    }
    path.write_text(f"{BOM}{json.dumps(row)}\n\n", encoding="utf-8")
    own = {name: with_path(name, path, {})}
    assert len(load_benchmark(name, own).problems) == 1
    path.write_text(json.dumps([row]))
    with pytest.raises(RecipeError, match="bench.jsonl is a JSON array"):
        load_benchmark(name, own)
