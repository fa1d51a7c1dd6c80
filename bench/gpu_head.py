"""LM head and token weights on one GPU, in bf16, against what the card does at best.

The head's floor is its bare matrix products (three where the forward pass forms the gradients, four
where the backward pass recomputes the logits). Token weights read a gap and write a weight a token;
their yardstick is the head, which every micro-batch pays. Medians of REPEATS after WARM_UP;
peak memory is what a forward and backward allocates above its inputs.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from iwopd_megatron.loss.linear_loss import linear_loss
from iwopd_megatron.loss.logprobs import linear_logprobs
from iwopd_megatron.loss.weighting import token_weights_packed
from iwopd_megatron.runtime import device

N, D, V, K = 8192, 2048, 151936, 64  # Qwen3-30B-A3B's head
CHUNKS = (1024, 2048, 4096, 8192)
REPEATS, WARM_UP = 7, 2
RESPONSES = 8


def milliseconds(function: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS + WARM_UP):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARM_UP:])


def peak_mib(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def print_errors() -> None:
    """Gradients in bf16 against those of fp64 logits, relative to their size, on fewer tokens."""
    hidden, weight, targets = inputs(N // 16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    naive(*exact, targets).backward()
    print("\n| relative error in bf16 | dhidden | dweight |\n| --- | --- | --- |")
    for name, loss in (
        ("naive log-softmax in fp32", naive),
        ("ours", two_pass),
        ("ours, gradient in the forward", one_pass),
    ):
        hidden.grad = weight.grad = None
        loss(hidden, weight, targets).backward()
        errors = [
            ((x.grad.double() - y.grad).norm() / y.grad.norm()).item()
            for x, y in zip((hidden, weight), exact, strict=True)
        ]
        print(f"| {name} | {errors[0]:.2e} | {errors[1]:.2e} |")


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    place = device.current_device()
    options = dict(generator=torch.Generator(place).manual_seed(0), device=place)
    hidden = torch.randn(tokens, D, **options).bfloat16().requires_grad_()
    weight = (torch.randn(V, D, **options) / D**0.5).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(0, V, (tokens,), **options)


def naive(hidden, weight, targets) -> torch.Tensor:
    logits = hidden @ weight.t()
    logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return -logp.gather(-1, targets[:, None]).mean()


def two_pass(hidden, weight, targets) -> torch.Tensor:
    return -linear_logprobs(hidden, weight, targets, with_entropy=False).logp.mean()


def one_pass(hidden, weight, targets, **how) -> torch.Tensor:
    count = len(targets)
    return linear_loss(hidden, weight, targets, lambda p, _: -p.logp.sum() / count, **how)[0]


def main() -> None:
    place = device.current_device()
    hidden, weight, targets = inputs(N)
    further = (targets[:, None] + torch.arange(K, device=place)) % V

    def products(count: int) -> None:
        """Logits, dhidden, dweight, logits again, in slices as the head makes them."""
        with torch.no_grad():
            for part in hidden.split(CHUNKS[-2]):
                logits = part @ weight.t()
                logits @ weight
                logits.t() @ part
                if count > 3:
                    torch.mm(part, weight.t(), out=logits)

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            loss().backward()

        return run

    floor = {count: milliseconds(lambda c=count: products(c)) for count in (3, 4)}
    flops = 2 * N * D * V
    print(f"\n{N} tokens, D={D}, V={V}, bf16, {torch.cuda.get_device_name()}")
    print("\n| LM head | forward ms | forward + backward ms | over its products | peak MiB |")
    print("| --- | --- | --- | --- | --- |")
    for count, ms in floor.items():
        print(
            f"| {count} bare products | | {ms:.1f} ({count * flops / ms / 1e9:.0f} TFLOP/s) | 1 | |"
        )
    variants: list[tuple[str, Callable[[], torch.Tensor], int]] = [
        ("naive log-softmax in fp32", lambda: naive(hidden, weight, targets), 3),
        ("ours", lambda: two_pass(hidden, weight, targets), 4),
        ("ours, gradient in the forward", lambda: one_pass(hidden, weight, targets), 3),
        (f"ours, {K} further ids a token", lambda: -linear_logprobs(
            hidden, weight, targets, topk_ids=further).topk_logp.mean(), 4),
        *((f"ours, gradient in the forward, {c} tokens a slice",
           lambda c=c: one_pass(hidden, weight, targets, chunk_tokens=c), 3) for c in CHUNKS),
    ]  # fmt: skip
    best = None
    for name, loss, count in variants:
        with torch.no_grad():
            forward = milliseconds(loss)
        ms, mib = milliseconds(step(loss)), peak_mib(step(loss))
        best = ms if name == "ours, gradient in the forward" else best
        ratio = f"{ms / floor[count]:.2f}"
        print(f"| {name} | {forward:.1f} | {ms:.1f} | {ratio} | {mib:,.0f} |", flush=True)
    hidden.grad = weight.grad = None
    print_errors()

    print("\n| token weights, 8 packed responses | tokens | ms | share of the head's time |")
    print("| --- | --- | --- | --- |")
    for tokens in (N, 16 * N):
        gap = torch.randn(tokens, device=place)
        segments = torch.arange(RESPONSES, device=place).repeat_interleave(tokens // RESPONSES)
        mask = torch.ones(tokens, dtype=torch.bool, device=place)
        for rule in ("iw", "iw_signed"):
            ms = milliseconds(
                lambda r=rule, g=gap, s=segments, m=mask: token_weights_packed(
                    g, s, m, rule=r, num_segments=RESPONSES
                )
            )
            print(f"| {rule} | {tokens} | {ms:.2f} | {ms / (best * tokens / N):.1%} |")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("error: this table is of a CUDA GPU; bench/loss.py needs none.")
    main()
