"""Every truth gate: one case that passes, and each way to trip it."""

import math

import pytest
import torch

from iwopd_megatron.batch.gates import (
    GateError,
    canary,
    drift,
    first_weights,
    rollouts,
    teacher_scores,
    truncation,
    without_bad_scores,
)
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.hf.agreement import (
    same_chat_template,
    same_vocabulary,
    served_student,
    served_teacher,
    server_fits,
)


class Tokenizer:
    def __init__(self, vocab: dict[str, int], eos: int = 0):
        self.vocab, self.eos_token_id = vocab, eos

    def get_vocab(self) -> dict[str, int]:
        return self.vocab


def sample(**changes) -> Trajectory:
    fields = dict(
        index=3,
        prompt_ids=[1],
        response_ids=[2, 5],
        rollout_logp=[-1.0, -2.0],
        teacher_logp=[-0.5, -3.0],
        weight_version=4,
    )
    return Trajectory(**fields | changes)


def trips(gate, *args) -> str:
    with pytest.raises(GateError) as error:
        gate(*args)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_same_vocabulary():
    ours = Tokenizer({"a": 0, "b": 1})
    same_vocabulary("S", "T", ours, Tokenizer({"b": 1, "a": 0}))
    message = trips(same_vocabulary, "S", "T", ours, Tokenizer({"a": 0, "b": 2}))
    assert "tokenizers of S and T differ: 'b' is 1 against 2" in message
    message = trips(same_vocabulary, "S", "T", ours, Tokenizer({"a": 0, "b": 1, "c": 2}))
    assert "'c' is None against 2" in message
    message = trips(same_vocabulary, "S", "T", ours, Tokenizer({"a": 0, "b": 1}, eos=1))
    assert "EOS is 0 for S but 1 for T" in message


def test_rollouts_pass():
    rollouts([sample(), sample(response_ids=[0, 511])], 4, 512)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_version": 3}, "sample 3 was written by weight version 3, not 4"),
        ({"weight_version": 5}, "weight version 5, not 4"),
        ({"rollout_logp": [-1.0]}, "sample 3 has 2 tokens but 1 engine log-probs"),
        ({"rollout_logp": [-1.0] * 3}, "2 tokens but 3 engine log-probs"),
        ({"response_ids": [], "rollout_logp": []}, "sample 3 has 0 tokens"),
        ({"response_ids": [2, 512]}, "outside the vocabulary of 512"),
        ({"response_ids": [-1, 2]}, "outside the vocabulary of 512"),
    ],
)
def test_rollouts_trip(changes, words):
    assert words in trips(rollouts, [sample(index=1), sample(**changes)], 4, 512)


def test_teacher_scores_pass():
    teacher_scores([sample(), sample(teacher_logp=[0.0, -1e-3])], 512)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.5])
def test_teacher_scores_trip_on_impossible_numbers(bad):
    message = trips(teacher_scores, [sample(index=1), sample(teacher_logp=[-1.0, bad])], 512)
    assert "sample 3: teacher log-prob" in message and str(bad) in message


def test_teacher_scores_trip_on_a_constant():
    constant = [sample(teacher_logp=[-2.0, -2.0])] * 2
    message = trips(teacher_scores, constant, 512)
    assert "all 4 teacher log-probs are -2.0000" in message and "-log V" not in message
    uniform = [sample(teacher_logp=[-math.log(512)] * 2)] * 2
    assert "-log V: its head or weights were not loaded" in trips(teacher_scores, uniform, 512)


@pytest.mark.parametrize("scores", [[], [-1.0]])
def test_teacher_scores_trip_on_missing_ones(scores):
    """Packing would read a missing list as zeros, and stretch a single score over all tokens."""
    trips(teacher_scores, [sample(index=1), sample(teacher_logp=scores)], 512)


def test_first_weights():
    sources = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    first_weights(sources.items(), sources)
    first_weights([(k, v.bfloat16()) for k, v in sources.items()], sources)
    transposed = [("a", sources["a"]), ("b", sources["b"].flip(0))]
    assert "published tensor b is not the student's" in trips(first_weights, transposed, sources)
    wrong_shape = [("a", sources["a"].t())]
    assert "published tensor a" in trips(first_weights, wrong_shape, sources)
    one_bit = [("b", torch.nextafter(sources["b"], torch.tensor(9.0)))]
    assert "published tensor b" in trips(first_weights, one_bit, sources)


def test_drift():
    drift(0.5, 0.5)
    assert "differ by 0.51 nats on average, limit gates.max_drift=0.5" in trips(drift, 0.51, 0.5)
    assert "differ by nan" in trips(drift, math.nan, 0.5)


def identity(**changes) -> dict:
    tokens = {"vocabulary": "a", "special_tokens": "b", "chat_template": "c"}
    fields = {"vocab_size": 16, "eos_token_ids": [1], "config_fingerprint": "d"}
    return fields | {"tokenizer": tokens | changes.pop("tokenizer", {})} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 32}, "U has a vocabulary of 32, the student of 16"),
        ({"eos_token_ids": [1, 2]}, "U ends answers with [1, 2], the student only with [1]"),
        ({"tokenizer": {"vocabulary": "x"}}, "not the student's: vocabulary differs"),
        ({"tokenizer": {"special_tokens": "x"}}, "not the student's: special_tokens differs"),
        ({"tokenizer": {"chat_template": "x"}}, "or write gates.same_chat_template=false"),
        ({"config_fingerprint": "x"}, "is not that of the recipe's teacher"),
    ],
)
def test_served_teacher(changes, words):
    student, teacher = identity(config_fingerprint="other"), identity()
    served_teacher("U", identity(), student, teacher)
    served_teacher("U", {"model_path": "somewhere else"}, student, teacher)
    assert words in trips(served_teacher, "U", identity(**changes), student, teacher)


def test_another_chat_template_can_be_meant():
    other = identity(tokenizer={"chat_template": "x"})
    served_teacher("U", other, identity(), identity(), same_template=False)
    ours, theirs = Tokenizer({}), Tokenizer({})
    ours.chat_template, theirs.chat_template = "x", "x"
    same_chat_template("S", "T", ours, theirs)
    theirs.chat_template = None
    assert "chat templates of S and T differ" in trips(same_chat_template, "S", "T", ours, theirs)


def test_server_fits():
    server_fits("U", {}, 100, 1.0)  # SGLang
    server_fits("U", {"has_logprob_temperature": True, "max_sequence_tokens": 100}, 100, 0.7)
    assert "scores at temperature 1 only" in trips(server_fits, "U", {}, 100, 0.7)
    message = trips(server_fits, "U", {"max_sequence_tokens": 99}, 100, 1.0)
    assert "at most 99 tokens, and rollout.max_prompt_tokens + max_response_tokens = 100" in message


def test_bad_samples_may_be_dropped():
    good, bad = sample(), sample(index=4, teacher_logp=[-1.0, math.nan])
    kept, dropped = without_bad_scores([good, bad])
    assert kept is good and dropped.loss_tokens == 0
    teacher_scores([kept, dropped], 512)


def test_answers_of_the_version_before_pass_only_where_they_may():
    stale = [sample(weight_version=3)]
    rollouts(stale, 4, 512, max_staleness=1)
    assert "version 3, not 5" in trips(rollouts, stale, 5, 512, 1)


def test_canary():
    ours = [-1.0, -2.0]
    assert canary(ours, {"http://a": [-1.0, -2.1]}, 0.1) == pytest.approx(0.05)
    message = trips(canary, ours, {"http://a": ours, "http://b": [-1.5, -2.0]}, 0.1)
    assert "http://b scores a canary prompt 0.25 nats from the trainer" in message
    assert "does not hold the weights" in trips(canary, ours, {"u": [math.nan, -2.0]}, 0.1)


def test_a_jump_of_the_truncated_share():
    cut, whole = sample(truncated=True), sample()
    truncation([], [cut, cut], 0.5)  # nothing to compare with yet
    truncation([0.5, 0.6], [cut, cut], 0.5)
    truncation([1.0] * 5 + [0.1] * 10, [cut, whole], 0.5)
    message = trips(truncation, [1.0] * 5 + [0.1] * 10, [cut, cut], 0.5)
    assert "100% of the answers are cut" in message and "10% in the rounds before" in message


def test_served_student():
    ours = {
        "vocab_size": 16,
        "eos_token_ids": [1],
        "tokenizer_fingerprint": "t",
        "config_fingerprint": "c",
    }
    served_student("http://a", {"model_path": "M"}, ours)  # tells nothing more
    served_student("http://a", ours, ours)
    for key, words in (("vocab_size", "vocabulary size"), ("config_fingerprint", "config.json")):
        message = trips(served_student, "http://a", {**ours, key: 0, "model_path": "M"}, ours)
        assert f"http://a serves M, whose {words} is not the student's" in message
