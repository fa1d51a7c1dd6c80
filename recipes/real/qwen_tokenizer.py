"""Qwen3's tokenizer as a Hugging Face folder, for tests and trials with real text; no weights.

    .venv/bin/python recipes/real/qwen_tokenizer.py [FOLDER]        (default: build/qwen_tokenizer)

It comes from PyPI: the wheel `dashscope` carries the byte-pair ranks that Qwen2, Qwen2.5 and Qwen3
share, which are taken out; the wheel is neither installed nor imported. Ids are those of the
published tokenizer, special tokens too. The chat template says the same as the published one, in
words of its own, of messages whose content is text; it knows no tools. config.json is of a tiny
model with Qwen3's vocabulary, 267 more than the tokenizer has. What is there already is not made
again; it appears whole or not at all. Wheel and ranks are Apache-2.0.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from pathlib import Path

from wheels import Wheel, download, take_out

WHEEL = Wheel(  # 2.4 MB
    "dashscope==2.0.2",
    "dashscope-2.0.2-py3-none-any.whl",
    "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
)
RANKS = "dashscope/resources/qwen.tiktoken"
LICENSE = "dashscope-2.0.2.dist-info/licenses/LICENSE"
NAME = "Qwen3-tokenizer"  # of the folder
SOURCE = """Byte-pair ranks of Qwen by Alibaba Cloud, Apache-2.0: qwen.tiktoken of the PyPI package
dashscope 2.0.2. Special tokens and configs as in Qwen3's published tokenizer; the chat template is
written anew. Random weights would fit config.json; there are none.
"""
# In the order of their ids, which follow the ranks'.
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
# Also whole tokens, but text of an answer, which is kept where special tokens are left out.
ORDINARY = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>"
).split()
END, PAD = "<|im_end|>", "<|endoftext|>"
# An earlier answer's thoughts are left out; results of tools in a row are one message of the user.
TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- else %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and '</think>' in content and not loop.last %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""
CONFIG = {  # of Qwen3-0.6B, in other sizes
    "vocab_size": 151936,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "max_window_layers": 2,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
}


def main(folder: Path) -> None:
    """Make FOLDER/Qwen3-tokenizer, if it is not there."""
    out = folder / NAME
    if out.is_dir():
        print(f"{out} is there.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        wheel = download(WHEEL, folder)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            work = Path(place)
            take_out(wheel, RANKS, work / "ranks")
            write_folder(read_ranks(work / "ranks"), work / NAME)
            take_out(wheel, LICENSE, work / NAME / "LICENSE")
            (work / NAME / "SOURCE.txt").write_text(SOURCE)
            (work / NAME).rename(out)
        print(f"wrote {out}.")
    print(SOURCE, end="")


def read_ranks(file: Path) -> dict[bytes, int]:
    """Return a token's bytes -> its rank, of lines of base64 and a number."""
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two tokens that a token of several bytes is merged of: those left before it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        i = merged.index(min(merged))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def write_folder(ranks: dict[bytes, int], out: Path) -> None:
    """Write the tokenizer, with one merge a token as the published one, and its configs."""
    from tokenizers import AddedToken
    from transformers import GenerationConfig, Qwen2Tokenizer, Qwen3Config
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letter = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    merged = [token for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    merges = [tuple(text(half) for half in halves(token, ranks)) for token in merged]
    tokenizer = Qwen2Tokenizer(
        vocab={text(token): rank for token, rank in ranks.items()}, merges=merges
    )
    names = (*SPECIAL, *ORDINARY)
    tokenizer.add_tokens(
        [AddedToken(name, special=name in SPECIAL, normalized=False) for name in names]
    )
    tokenizer.save_pretrained(out)
    config = json.loads((out / "tokenizer_config.json").read_text())
    config |= {"eos_token": END, "pad_token": PAD, "unk_token": None, "model_max_length": 131072}
    config["additional_special_tokens"] = SPECIAL[1:]
    config["errors"] = "replace"
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(TEMPLATE)
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    model = Qwen3Config(**CONFIG, bos_token_id=pad, eos_token_id=end)
    model.architectures = ["Qwen3ForCausalLM"]
    model.save_pretrained(out)
    GenerationConfig(bos_token_id=pad, pad_token_id=pad, eos_token_id=[end, pad]).save_pretrained(
        out
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/qwen_tokenizer"))
