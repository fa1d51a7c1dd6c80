"""What ends an answer by config, tokenizer and chat template; ids that the model has no row for."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from iwopd_megatron.cli.main import app
from iwopd_megatron.data.prompts import load_tokenizer
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.answer_end import all_end_ids, check_answer_end, end_id, response_ids

PAD, EOS, UNUSED = 0, 1, 15
pytestmark = pytest.mark.usefixtures("in_the_repository")


def template(end):
    return "{% for m in messages %}{{ m['content'] }}" + end + "{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    """The demo's student with other ends: (configs' ids, tokenizer's token, chat template)."""

    def write(ids, token, chat_template=None):
        place = tmp_path / "model"
        shutil.copytree("recipes/demo/student", place)
        edit(place / "generation_config.json", eos_token_id=ids)
        edit(place / "tokenizer_config.json", eos_token=token, chat_template=chat_template)
        return place

    return write


def edit(file, **settings):
    content = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("ids", "token", "chat_template", "end", "notes"),
    [
        (EOS, "<eos>", None, EOS, []),
        (EOS, "<eos>", template("<eos>"), EOS, []),
        (EOS, None, None, EOS, []),  # a tokenizer without EOS
        ([EOS, UNUSED], "<eos>", template("<unused>"), UNUSED, []),
        ([EOS, UNUSED], "<unused>", None, UNUSED, []),
        (EOS, "<eos>", template(""), EOS, []),  # a template that ends no turn
        (EOS, "<eos>", "{{ raise_exception('no') }}", EOS, []),
        # as the published Qwen3 base models
        (EOS, "<eos>", template("<unused>"), EOS, ["the chat template's end of a turn is"]),
        (EOS, "<pad>", template("<eos>"), EOS, ["the tokenizer's eos_token is '<pad>' (0)"]),
    ],
)
def test_what_agrees(folder, ids, token, chat_template, end, notes):
    place = folder(ids, token, chat_template)
    tokenizer = load_tokenizer(place)
    assert end_id(place, tokenizer) == end
    found = check_answer_end(place, tokenizer)
    assert len(found) == len(notes) and all(n in f for n, f in zip(notes, found, strict=True))


def test_nothing_agrees(folder):
    place = folder(EOS, "<pad>", template("<unused>"))
    tokenizer = load_tokenizer(place)
    with pytest.raises(RecipeError) as error:
        check_answer_end(place, tokenizer)
    assert "write eos_token_id: [0, 1, 15] in its generation_config.json." in str(error.value)
    (note,) = check_answer_end(place, tokenizer, is_taught=True)
    assert note.endswith("answers are ended with 1")
    assert end_id(place, tokenizer) == EOS and all_end_ids(place, tokenizer) == {PAD, EOS, UNUSED}


def test_a_response_is_ended_once(folder):
    tokenizer = load_tokenizer(folder(EOS, "<eos>"))
    assert response_ids("ab", EOS, tokenizer)[-1] == EOS
    assert response_ids("ab<eos>", EOS, tokenizer) == response_ids("ab", EOS, tokenizer)


COMMANDS = {
    "train": ["train", "{recipe}", "student.hf={folder}", "teacher.hf={folder}", "out={out}"],
    "data": ["data", "{recipe}", "student.hf={folder}", "teacher.hf={folder}"],
    "doctor": ["doctor", "{recipe}", "student.hf={folder}", "teacher.hf={folder}"],
    "eval": ["eval", "{folder}", "--bench-file", "own=recipes/demo/eval.jsonl", "--bench", "own"],
    "compare": [
        "compare", "{recipe}", "student.hf={folder}", "teacher.hf={folder}", "--out", "{out}"],
}  # fmt: skip


def refused(command, folder, out):
    words = {"recipe": "recipes/demo_tiny_moe.yaml", "folder": folder, "out": out}
    result = CliRunner().invoke(app, [word.format(**words) for word in COMMANDS[command]])
    assert isinstance(result.exception, RecipeError), result.output
    assert not out.exists()
    return str(result.exception)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_compares_at_the_start(folder, tmp_path, command):
    message = refused(command, folder(EOS, "<pad>"), tmp_path / "out")
    assert "engines end answers at [1]" in message and "eos_token_id: [0, 1]" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_ids_beyond_the_vocabulary(folder, tmp_path, command):
    """A tokenizer of 16 ids for a model of 8."""
    place = folder(EOS, "<eos>")
    edit(place / "config.json", vocab_size=8)
    tensors = load_file(place / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:8].clone()
    save_file(tensors, place / "model.safetensors")
    message = refused(command, place, tmp_path / "out")
    assert "the model's vocab_size is 8" in message and ".jsonl line 1" in message
