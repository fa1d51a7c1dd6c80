"""Rows of messages and how they are put to a model: all of them, through the chat template."""

import json
import shutil
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from iwopd_megatron.config.data import Source
from iwopd_megatron.data.contamination import contaminated, duplicates
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.data.prompts import Prompts, load_tokenizer
from iwopd_megatron.data.sources import read_source
from iwopd_megatron.errors import RecipeError

ROOT = Path(__file__).parents[1]
SYSTEM = {"role": "system", "content": "ab"}
ASKED = {"role": "user", "content": "cd"}
SAID = {"role": "assistant", "content": "ef"}
AGAIN = {"role": "user", "content": "gh"}
RESULT = {"role": "tool", "content": "kl"}
# Writes a role as one letter, and closes the thinking part itself when thinking is off.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}a{% elif m.role == 'user' %}b"
    "{% elif m.role == 'assistant' %}c{% else %}d{% endif %}={{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}c={% endif %}"
    "{% if add_generation_prompt and not enable_thinking %}<pad><unused>{% endif %}"
)


@pytest.fixture
def tokenizer():
    found = AutoTokenizer.from_pretrained(ROOT / "recipes/demo/student")
    found.chat_template = TEMPLATE
    return found


def read(tmp_path, question, need_response=False, **settings):
    fields = settings.pop("fields", {})
    row = {"question": question, "answer": "1", "difficulty": 1, "source": "math"} | fields
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return read_source(Source(path=path, **settings), need_response)[0][0]


def refusal(tmp_path, question, *args, **settings) -> str:
    with pytest.raises(RecipeError) as error:
        read(tmp_path, question, *args, **settings)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/data.jsonl line 1") and "\n" not in message
    return message


def written(tokenizer, problem, **settings) -> str:
    return tokenizer.decode(Prompts(tokenizer, **settings).encode(problem))


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([ASKED], "b=cd<eos>"),
        ([SYSTEM, ASKED], "a=ab<eos>b=cd<eos>"),
        ([SYSTEM, ASKED, SAID, AGAIN], "a=ab<eos>b=cd<eos>c=ef<eos>b=gh<eos>"),
        ([ASKED, SAID, RESULT], "b=cd<eos>c=ef<eos>d=kl<eos>"),
        ([ASKED, AGAIN], "b=cd<eos>b=gh<eos>"),
    ],
)
def test_the_whole_list_goes_to_the_template(tmp_path, tokenizer, messages, prompt):
    problem = read(tmp_path, messages)
    assert problem.messages == messages
    assert written(tokenizer, problem) == prompt + "c=<pad><unused>"


def test_ids_are_those_of_the_library(tmp_path, tokenizer):
    messages = [SYSTEM, ASKED, SAID, AGAIN]
    for thinking in (False, True):
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
        )
        assert Prompts(tokenizer, thinking, "x").encode(read(tmp_path, messages)) == ids


def test_sharegpt_and_parts(tmp_path):
    roles = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    messages = [SYSTEM, ASKED, SAID, RESULT, AGAIN]
    shared = [{"from": roles[m["role"]], "value": m["content"]} for m in messages]
    assert read(tmp_path, shared).messages == messages
    parts = [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]
    assert read(tmp_path, [SYSTEM, {"role": "user", "content": parts}]).messages == [SYSTEM, ASKED]


@pytest.mark.parametrize("column", ["messages", "prompt", "conversations"])
def test_other_columns_and_parquet(tmp_path, column):
    """Parquet gives every message of a column the same keys, null where it has none."""
    row = {column: [SYSTEM | {"tool_calls": None}, ASKED], "answer": "1"}
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    source = Source(path=path, columns={"question": column}, source="math")
    (problem,), *_ = read_source(source)
    assert problem.messages == [SYSTEM, ASKED]


def test_a_column_of_another_name_is_named_with_those_there_are(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"conversations": [ASKED], "answer": "1"}) + "\n")
    with pytest.raises(RecipeError, match="lacks 'question'.*has conversations, answer.*columns"):
        read_source(Source(path=path))


def test_what_else_a_message_has_reaches_the_template(tmp_path, tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "kl"}]}
    problem = read(tmp_path, [ASKED, call, RESULT])
    tokenizer.chat_template = "{% for m in messages %}{{ m.tool_calls }}{{ m.content }}{% endfor %}"
    assert "kl" in Prompts(tokenizer)._rendered(problem.messages, "")
    assert problem.messages[1]["content"] == ""


def test_prefix_and_suffix_go_around_the_users_last_message(tmp_path):
    around = {"prefix": "<", "suffix": ">"}
    texts = [m["content"] for m in read(tmp_path, [SYSTEM, ASKED, SAID, AGAIN], **around).messages]
    assert texts == ["ab", "cd", "ef", "<gh>"]
    texts = [m["content"] for m in read(tmp_path, [ASKED, SAID, RESULT], **around).messages]
    assert texts == ["<cd>", "ef", "kl"]
    assert read(tmp_path, "cd", **around).messages == [{"role": "user", "content": "<cd>"}]


def test_an_answer_at_the_end_is_the_response(tmp_path):
    """It is never part of the prompt; fine-tuning trains on it."""
    problem = read(tmp_path, [SYSTEM, ASKED, SAID])
    assert problem.messages == [SYSTEM, ASKED] and problem.is_answered
    assert read(tmp_path, [ASKED, SAID], True).response == "ef"
    assert read(tmp_path, [ASKED, SAID], True, fields={"response": "ef"}).response == "ef"
    assert not read(tmp_path, [ASKED], True, fields={"response": "ef"}).is_answered
    message = refusal(tmp_path, [ASKED, SAID], fields={"response": "gh"})
    assert "has a response and ends with another" in message


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ([], "list of messages before the answer is empty"),
        ([SAID], "is empty"),
        ([SYSTEM], "ends with one of role system"),
        ([ASKED, SYSTEM], "ends with one of role system"),
        ([ASKED, SAID, SAID], "ends with one of role assistant"),
        ([SYSTEM, RESULT], "none of the messages is the user's"),
        ([SYSTEM, "cd"], "message 2 is 'cd', not an object"),
        ([{"role": "developer", "content": "a"}, ASKED], "message 1 is of role 'developer'; known"),
        ([{"from": "bot", "value": "a"}, ASKED], "message 1 is of role 'bot'"),
        ([{"role": ["user"], "content": "a"}], "message 1 is of role ['user']"),
        ([{"content": "a"}], "message 1 is of role None"),
        ([{"role": "user"}], "message 1: content None is not a text"),
        ([{"role": "user", "content": 3}], "message 1: content 3 is not a text"),
        ([{"role": "assistant"}, ASKED], "message 1: content None is not a text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 has a part 'text'"),
        ([{"role": "user", "content": ["text"]}], "message 1 has a part 'text'"),
        ([ASKED | {"images": ["x.png"]}], "message 1 has 'images'"),
        ([ASKED | {"content": ""}], "question is empty"),
        ([SYSTEM | {"content": "\ud83d"}, ASKED], "a message's text has half a character"),
        ('[{"role": "user", "content": "cd"}]', "is a text that holds a list of messages"),
        ("[{'from': 'human', 'value': 'cd'}]", "is a text that holds a list of messages"),
        ({"role": "user", "content": "cd"}, "is not a text"),
    ],
)
def test_what_no_model_can_be_asked(tmp_path, question, words):
    assert words in refusal(tmp_path, question)


@pytest.mark.parametrize("response", [None, "", " "])
def test_nothing_to_fine_tune_on(tmp_path, response):
    assert "response" in refusal(tmp_path, "cd", True, fields={"response": response})
    said = [ASKED, SAID | {"content": response or ""}]
    assert "response is empty" in refusal(tmp_path, said, True)


def test_without_a_template(tmp_path, tokenizer):
    tokenizer.chat_template = None
    for question in ("cd", [ASKED]):
        assert written(tokenizer, read(tmp_path, question)) == "cd"
    with pytest.raises(RecipeError, match="line 1 has 2 messages, but .* no chat template"):
        Prompts(tokenizer).encode(read(tmp_path, [SYSTEM, ASKED]))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role.') }}"
            "{% endif %}",
            r"line 1: the chat template of .*student refuses these messages \(no system role\)\.",
        ),
        ("{{ messages[0].content + 1 }}", "line 1: the chat template .* refuses these messages"),
        ("{{ messages[-1].content }}", "line 1: .* leaves out message 1, of role system"),
        ("{{ messages[0].content }}", "line 1: .* leaves out message 2, of role user"),
    ],
)
def test_a_template_that_refuses_or_drops_a_message(tmp_path, tokenizer, template, words):
    tokenizer.chat_template = template
    with pytest.raises(RecipeError, match=words) as error:
        Prompts(tokenizer).encode(read(tmp_path, [SYSTEM, ASKED]))
    assert "\n" not in str(error.value)


def test_a_dropped_message_is_noticed_whatever_it_says(tmp_path, tokenizer):
    """Its text may stand in another message."""
    tokenizer.chat_template = "{{ messages[-1].content }}"
    problem = read(tmp_path, [SYSTEM | {"content": "c"}, ASKED])
    with pytest.raises(RecipeError, match="leaves out message 1"):
        Prompts(tokenizer).encode(problem)


def test_templates_may_trim_and_drop_earlier_thoughts(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim }}{% endfor %}"
    )
    thought = {"role": "assistant", "content": "<think>gh</think> ef "}
    assert written(tokenizer, read(tmp_path, [ASKED, thought, AGAIN])) == "cdefgh"


def test_thinking(tmp_path, tokenizer):
    problem = read(tmp_path, "cd")
    assert written(tokenizer, problem) == "b=cd<eos>c=<pad><unused>"
    assert written(tokenizer, problem, enable_thinking=True, setting="x") == "b=cd<eos>c="


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_thinking_that_a_template_does_not_know(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(RecipeError, match="^data.enable_thinking=true does nothing: .* leave it"):
        Prompts(tokenizer, True, "data.enable_thinking")


def test_a_damaged_tokenizer_is_one_sentence(tmp_path):
    folder = shutil.copytree(ROOT / "recipes/demo/student", tmp_path / "student")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(RecipeError, match="the tokenizer of .*student cannot be loaded") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_duplicates_and_contamination_of_conversations():
    def problem(*texts, question="go on"):
        before = tuple({"role": role, "content": text} for role, text in texts)
        return Problem(question, "1", 1.0, "math", before=before)

    words = " ".join("abcdefghijklmn")
    rows = [
        problem(),
        problem(("user", "one")),
        problem(("user", "two")),
        problem(("user", " one")),
        problem(("assistant", "one")),
    ]
    assert duplicates(rows) == [False, False, False, True, False]
    held_out = [problem(("user", words), question="and then what")]
    rows = [problem(("user", words)), problem(("system", words)), problem(("assistant", words))]
    assert contaminated(rows, held_out) == [True, False, False]
