"""Data files: errors name file and line. Prompt order: a function of the seed and one cursor."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwopd_megatron.data import Problem, PromptOrder, encode_prompt, read_problems
from iwopd_megatron.errors import RecipeError

ROW = {"question": "1+1?", "answer": 2, "difficulty": 3, "source": "toy"}


def write(tmp_path, *lines: str):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def refusal(path, **kwargs) -> str:
    with pytest.raises(RecipeError) as error:
        read_problems(path, **kwargs)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


def test_read(tmp_path):
    path = write(tmp_path, json.dumps(ROW), json.dumps(ROW | {"response": "2", "extra": 1}))
    first, second = read_problems(path)
    assert first == Problem("1+1?", "2", 3.0, "toy") and second.response == "2"


@pytest.mark.parametrize("key", list(ROW))
def test_missing_key(tmp_path, key):
    row = {k: v for k, v in ROW.items() if k != key}
    message = refusal(write(tmp_path, json.dumps(ROW), json.dumps(row)))
    assert f"line 2 lacks '{key}'" in message


def test_response_only_where_needed(tmp_path):
    path = write(tmp_path, json.dumps(ROW))
    assert read_problems(path)[0].response is None
    assert "line 1 lacks 'response'" in refusal(path, need_response=True)


@pytest.mark.parametrize("line", ["{", "", "[1, 2]", "3"])
def test_not_an_object(tmp_path, line):
    assert "line 3 " in refusal(write(tmp_path, json.dumps(ROW), json.dumps(ROW), line))


@pytest.mark.parametrize("difficulty", ["hard", None])
def test_difficulty_is_a_number(tmp_path, difficulty):
    path = write(tmp_path, json.dumps(ROW), json.dumps(ROW | {"difficulty": difficulty}))
    assert "line 2" in refusal(path)


def test_empty_file_and_wrong_encoding(tmp_path):
    assert "is empty" in refusal(write(tmp_path))
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n\xe9\n")
    assert "is not UTF-8" in refusal(path)


@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\u00e9", "\U0001d54f"])
def test_any_character_inside_a_string(tmp_path, character):
    """JSON allows U+2028 and U+0085 unescaped; only a newline ends a line of JSONL."""
    row = ROW | {"question": f"a{character}b"}
    path = write(tmp_path, json.dumps(row, ensure_ascii=False), json.dumps(ROW))
    assert [p.question for p in read_problems(path)] == [f"a{character}b", "1+1?"]


class Plain:
    chat_template = None

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text] + [0] * add_special_tokens


class Chat:
    chat_template = "{{ messages }}"

    def apply_chat_template(self, messages, **kwargs):
        assert messages == [{"role": "user", "content": "hi"}]
        expected = dict(add_generation_prompt=True, enable_thinking=False, return_dict=False)
        assert kwargs == expected
        return [1, 2, 3]


def test_encode_prompt():
    assert encode_prompt(Plain(), "hi") == [104, 105]
    assert encode_prompt(Chat(), "hi") == [1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 30), st.integers(0, 1000), st.lists(st.integers(0, 40), min_size=1, max_size=8)
)
def test_order_is_one_sequence_however_it_is_taken(count, seed, sizes):
    order = PromptOrder(count, seed)
    taken = [i for size in sizes for i in order.take(size)]
    assert order.cursor == len(taken) == sum(sizes)
    assert taken == PromptOrder(count, seed).take(len(taken))
    for start in range(0, len(taken) - count + 1, count):
        assert sorted(taken[start : start + count]) == list(range(count))
    resumed = PromptOrder(count, seed)
    resumed.cursor = sizes[0]
    assert resumed.take(len(taken) - sizes[0]) == taken[sizes[0] :]


def test_the_files_own_order():
    order = PromptOrder(3, 1, shuffle=False)
    assert order.take(4) + order.take(3) == [0, 1, 2, 0, 1, 2, 0]


def test_epochs_and_seeds_differ():
    first, second = (lambda x: (x[:50], x[50:]))(PromptOrder(50, 1).take(100))
    assert first != second and first != list(range(50))
    assert PromptOrder(50, 2).take(50) != first
