"""Tokens a second of the embedded engine against transformers' `generate`, same weights and cores.

A model of SmolLM2-135M's sizes, random weights, one thread a process; all processes of a kind
answer at once, the kinds take turns. transformers is there as a user has it, and with the huge
pages that the engine's processes ask for, in fp32 and in bf16. In brackets a kind's speed over
transformers' as a user has it. With `--ends 50` one token in so many ends an answer, as a trained
model's do; tokens after it do not count.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from iwopd_megatron.config.models import Layout
from iwopd_megatron.rollout.embedded import HfEngine
from iwopd_megatron.rollout.engine import Prompt, Sampling
from iwopd_megatron.runtime import device
from iwopd_megatron.runtime.parallel import initialise
from iwopd_megatron.runtime.quiet import quiet
from iwopd_megatron.runtime.services import free_port

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
ENGINE, ENGINE_BF16 = "embedded engine", "embedded engine, bf16 products"
THEIRS, THEIRS_BF16 = "transformers, huge pages", "transformers in bf16, huge pages"
HUGE_PAGES = {"transformers": "0", THEIRS: "1", THEIRS_BF16: "1", ENGINE: "1", ENGINE_BF16: "1"}


@torch.no_grad()
def fill(weights):
    generator = torch.Generator().manual_seed(1)
    for weight in weights.values():
        weight.normal_(0, 0.02, generator=generator) if weight.dim() > 1 else weight.fill_(1)


def engine_of(folder, ends, bf16_products):
    """A function of (prompts [rows, W], tokens): lengths of the engine's answers."""
    initialise(Layout())
    engine = HfEngine(folder, torch.float32, ends, 10**6, bf16_products=bf16_products)
    fill(engine.model.weights)

    def answer(ids, tokens):
        mine = engine.generate([Prompt(i, row) for i, row in enumerate(ids)], Sampling(tokens))
        return [len(one.response_ids) for one in mine]

    return answer


def transformers_of(rank, world, ends, dtype):
    """The same of transformers; a rank answers its own prompts."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()
    fill(dict(model.named_parameters()))
    model.to(dtype)
    more = {"eos_token_id": sorted(ends)} if min(ends) < SHAPE["vocab_size"] else {}
    is_end = torch.isin(torch.arange(SHAPE["vocab_size"]), torch.tensor(sorted(ends)))

    @torch.inference_mode()
    def answer(ids, tokens):
        mine = torch.tensor(ids[rank::world])
        whole = model.generate(
            mine, attention_mask=torch.ones_like(mine), max_new_tokens=tokens,
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, **more,
        )  # fmt: skip
        ended = is_end[whole[:, mine.shape[1] :]].int()
        return (ended.cumsum(1) - ended == 0).sum(1).tolist()

    return answer


def serve(kind, folder, rank, world, ends, pipe: Connection):
    """Answer what comes through the pipe."""
    torch.set_num_threads(1)
    if kind in (ENGINE, ENGINE_BF16):
        answer = engine_of(folder, ends, kind == ENGINE_BF16)
    else:
        dtype = torch.bfloat16 if kind == THEIRS_BF16 else torch.float32
        answer = transformers_of(rank, world, ends, dtype)
    with device.plain_torch():  # transformers has no part in the stand-ins for a GPU
        while True:
            pipe.send(answer(*pipe.recv()))


def start(kind, folder, args, ends):
    """Processes of a kind, and a pipe to each."""
    os.environ |= {"THP_MEM_ALLOC_ENABLE": HUGE_PAGES[kind], "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(args.processes)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(args.processes)}
    context, pipes = multiprocessing.get_context("spawn"), []
    for rank in range(args.processes):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        here, there = context.Pipe()
        values = kind, folder, rank, args.processes, ends, there
        context.Process(target=serve, args=values, daemon=True).start()
        pipes.append(here)
    return pipes


def asked(kind, pipes, ids, tokens):
    """Tokens of all answers, and seconds until the last process has its own."""
    begin = time.perf_counter()
    for pipe in pipes:
        pipe.send((ids, tokens))
    found = [pipe.recv() for pipe in pipes]
    seconds = time.perf_counter() - begin
    return sum(found[0] if kind in (ENGINE, ENGINE_BF16) else map(sum, found)), seconds


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ends", type=int, default=0)
    args = parser.parse_args()
    vocab = SHAPE["vocab_size"]
    ends = set(range(0, vocab, args.ends)) if args.ends else {vocab}
    generator, rates = torch.Generator().manual_seed(2), {}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(SHAPE))
        pipes = {kind: start(kind, Path(name), args, ends) for kind in HUGE_PAGES}
        for rows in args.rows:
            shape = rows * args.processes, args.prompt
            ids = torch.randint(0, vocab, shape, generator=generator).tolist()
            for repeat in range(args.repeats + 1):
                for kind, ends_of in pipes.items():
                    tokens, seconds = asked(kind, ends_of, ids, args.new if repeat else 8)
                    if repeat:
                        rates.setdefault((rows, kind), []).append(tokens / seconds)
                        print(f"{rows} {kind}: {tokens} tokens, {seconds:.1f} s", flush=True)
    print("| rows a process | " + " | ".join(HUGE_PAGES) + " |")
    print("| --- |" + " --- |" * len(HUGE_PAGES))
    for rows in args.rows:
        speeds = {kind: statistics.median(rates[rows, kind]) for kind in HUGE_PAGES}
        first = speeds["transformers"]
        cells = (f"{speed:.1f} ({speed / first:.2f})" for speed in speeds.values())
        print(f"| {rows} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    quiet()
    main()
