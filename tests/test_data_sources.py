"""Files and datasets of the real schemas; a wrong row is one sentence with its place."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from iwopd_megatron.config.data import Source
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.data.sources import read_source, resolve
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.grading.math import grader as math_grader

ROW = {"question": "1+1?", "answer": 2, "difficulty": 3, "source": "toy"}
DEEPMATH = {
    "question": "Find $\\lim_{x\\to 0} x$.",
    "final_answer": "0",
    "difficulty": 6.5,
    "topic": "Calculus",
    "r1_solution_1": "a",
    "r1_solution_2": "b",
    "r1_solution_3": "c",
}
EURUS = {
    "data_source": "taco",
    "prompt": [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "Double the number."},
    ],
    "ability": "code",
    "reward_model": {
        "ground_truth": json.dumps({"inputs": ["2\n"], "outputs": ["4\n"]}), "style": "rule",
    },
    "extra_info": {"index": 0, "split": "dummy"},
}  # fmt: skip


def write(tmp_path, *lines: str):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(path, need_response=False, **settings):
    return read_source(resolve(Source(path=path, **settings)), need_response)[0]


def refusal(path, *args, **settings) -> str:
    with pytest.raises(RecipeError) as error:
        read(path, *args, **settings)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


def test_own_schema(tmp_path):
    path = write(tmp_path, json.dumps(ROW), json.dumps(ROW | {"response": "2", "extra": 1}))
    first, second = read(path)
    assert first == Problem("1+1?", "2", 3.0, "toy") and second.response == "2"


@pytest.mark.parametrize("key", list(ROW))
def test_missing_key(tmp_path, key):
    row = {k: v for k, v in ROW.items() if k != key}
    message = refusal(write(tmp_path, json.dumps(ROW), json.dumps(row)))
    assert f"line 2 lacks '{key}'" in message


def test_response_only_where_needed(tmp_path):
    path = write(tmp_path, json.dumps(ROW))
    assert read(path)[0].response is None
    assert "line 1 lacks 'response'" in refusal(path, True)


@pytest.mark.parametrize("line", ["{", "[1, 2]", "3", "null"])
def test_not_an_object(tmp_path, line):
    assert "line 3 " in refusal(write(tmp_path, json.dumps(ROW), json.dumps(ROW), line))


@pytest.mark.parametrize(
    "change", [{"difficulty": "hard"}, {"difficulty": None}, {"question": 3}, {"question": ""},
               {"source": None}, {"answer": None}, {"response": 4}],
)  # fmt: skip
def test_wrong_types(tmp_path, change):
    path = write(tmp_path, json.dumps(ROW), json.dumps(ROW | change))
    assert "line 2: " in refusal(path) and next(iter(change)) in refusal(path)


def test_empty_and_wrong_encoding(tmp_path):
    assert "is empty" in refusal(write(tmp_path))
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n\xe9\n")
    assert "line 2 is not UTF-8" in refusal(path)


@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\u00e9", "\U0001d54f"])
def test_any_character_inside_a_string(tmp_path, character):
    """JSON allows U+2028 and U+0085 unescaped; only a newline ends a line of JSONL."""
    row = ROW | {"question": f"a{character}b"}
    path = write(tmp_path, json.dumps(row, ensure_ascii=False), json.dumps(ROW))
    assert [p.question for p in read(path)] == [f"a{character}b", "1+1?"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_deepmath(tmp_path, kind):
    rows = [DEEPMATH, DEEPMATH | {"difficulty": 5.5}, DEEPMATH | {"difficulty": 6.0}]
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = tmp_path / "folder"
        (path / "data").mkdir(parents=True)
        for i, part in enumerate((rows[:1], rows[1:])):
            parquet.write_table(
                pyarrow.Table.from_pylist(part), path / "data" / f"train-0000{i}.parquet"
            )
    source = resolve(Source(name="deepmath", path=path))
    problems, read_rows, easy = read_source(source)
    assert (read_rows, easy, [p.difficulty for p in problems]) == (3, 1, [6.5, 6.0])
    assert problems[0].answer == "0" and problems[0].source == problems[0].grader == "math"
    assert problems[0].prompt == DEEPMATH["question"] + math_grader.SUFFIX
    assert len(read(path, name="deepmath", min_difficulty=0)) == 3


def test_eurus_code(tmp_path):
    other = EURUS | {"ability": "math", "reward_model": {"ground_truth": "4", "style": "rule"}}
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([other, EURUS]), path)
    (problem,) = read(path, name="eurus_code")
    assert problem.messages == EURUS["prompt"] and problem.source == "code"
    assert json.loads(problem.answer) == {"inputs": ["2\n"], "outputs": ["4\n"]}
    assert "no row where ability is 'poetry'" in refusal(
        path, name="eurus_code", where={"ability": "poetry"}
    )


def test_column_mapping(tmp_path):
    path = write(tmp_path, json.dumps({"q": {"text": "1+1?"}, "a": 2, "level": "7"}))
    columns = {"question": "q.text", "answer": "a", "difficulty": "level"}
    (problem,) = read(path, columns=columns, source="sums", grader="math", min_difficulty=7)
    assert problem == Problem("1+1?", "2", 7.0, "sums", None, "math")
    assert "difficulty is at least 8" in refusal(
        path, columns=columns, source="sums", min_difficulty=8
    )
    assert "line 1 lacks 'b'" in refusal(path, columns=columns | {"answer": "b"}, source="sums")


def test_damaged_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([DEEPMATH]), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read as Parquet after row 0" in refusal(path, name="deepmath")
    parquet.write_table(pyarrow.Table.from_pylist([DEEPMATH, DEEPMATH | {"question": None}]), path)
    assert "row 2: question None" in refusal(path, name="deepmath")


def test_folders_and_missing_files(tmp_path):
    assert "neither .jsonl nor .parquet" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "none.jsonl")


def test_hub_out_of_reach(monkeypatch):
    import datasets

    def load_dataset(name, split):
        raise ConnectionError(f"Couldn't reach {name}\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(RecipeError, match="zwhe99/DeepMath-103K cannot be loaded .*path"):
        read_source(resolve(Source(name="deepmath")))


def test_hub(monkeypatch):
    """A dataset of the library in the hub's place: columns are chosen, rows counted from one."""
    import datasets

    rows = datasets.Dataset.from_list([DEEPMATH, DEEPMATH | {"question": None}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    with pytest.raises(RecipeError, match="zwhe99/DeepMath-103K row 2: question None"):
        read_source(resolve(Source(name="deepmath")))
