"""What each token of a response adds to its text: characters over several tokens, unknown ids."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from iwopd_megatron.records.token_texts import token_texts

MERGES = [("a", "b"), (" ", "a")]  # and every byte is a token


@pytest.fixture(scope="module")
def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(half.replace(" ", "\u0120") for half in pair) for pair in MERGES]
    vocab = {token: i for i, token in enumerate([*letters, *map("".join, merges)])}
    model = Tokenizer(models.BPE(vocab, merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab a", ["ab", " a"]),
        ("\u00e9", ["\ufffd", "\u00e9"]),
        ("x\u4f60\u597d", ["x", "\ufffd", "\ufffd", "\u4f60", "\ufffd", "\ufffd", "\u597d"]),
        ("\U0001f642!", ["\ufffd", "\ufffd", "\ufffd", "\U0001f642", "!"]),
    ],
)
def test_a_character_stands_at_the_last_of_its_tokens(tokenizer, text, expected):
    ids = tokenizer.encode(text)
    assert token_texts(tokenizer, ids) == expected
    assert "".join(expected).replace("\ufffd", "") == tokenizer.decode(ids)


def test_broken_characters_and_ids_without_text(tokenizer):
    first, second = tokenizer.encode("\u00e9")
    (letter,), unknown = tokenizer.encode("x"), len(tokenizer) + 5
    ids = [second, letter, first, unknown, letter, first, first, second, unknown, first]
    name = f"<id {unknown}>"
    expected = ["\ufffd", "x", "\ufffd", name, "x", "\ufffd", "\ufffd", "\u00e9", name, "\ufffd"]
    assert token_texts(tokenizer, ids) == expected
    assert token_texts(tokenizer, []) == []
