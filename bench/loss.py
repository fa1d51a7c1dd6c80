"""LM head and loss: naive log-softmax, ours, and the bare matrix products of the same shape.

fp32, one CPU thread. The floor of a head that recomputes logits in the backward pass is four matrix
products (logits twice, two gradients), of one that forms the gradient in the forward pass three.
Peak memory is what a step allocates above its inputs, each variant in a process of its own.
"""

import json
import os
import statistics
import time
from multiprocessing import get_context

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from iwopd_megatron.loss.linear_loss import linear_loss
from iwopd_megatron.loss.logprobs import linear_logprobs

N, D, V, K = 2048, 256, 32768, 64
REPEATS = 5


def inputs(n=N):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, D, generator=generator).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) / D**0.5).requires_grad_()
    targets = torch.randint(0, V, (n,), generator=generator)
    return hidden, weight, targets


def naive(hidden, weight, targets):
    return -(hidden @ weight.t()).log_softmax(-1).gather(-1, targets[:, None]).mean()


def ours(hidden, weight, targets):
    return -linear_logprobs(hidden, weight, targets, with_entropy=False).logp.mean()


def ours_with_entropy(hidden, weight, targets):
    return -linear_logprobs(hidden, weight, targets).logp.mean()


def one_pass(hidden, weight, targets):
    """Its forward pass forms the gradients, also where nobody asks for them."""
    count = len(targets)
    return linear_loss(hidden, weight, targets, lambda part, _: -part.logp.sum() / count)[0]


def further_ids(hidden, weight, targets):
    ids = (targets[:, None] + torch.arange(K)) % V
    return -linear_logprobs(hidden, weight, targets, topk_ids=ids).topk_logp.mean()


def find_topk(hidden, weight, targets):
    return -linear_logprobs(hidden, weight, targets, with_entropy=False, topk=K).logp.mean()


def forward(loss, hidden, weight, targets):
    with torch.no_grad():
        loss(hidden, weight, targets)


def forward_backward(loss, hidden, weight, targets):
    hidden.grad = weight.grad = None
    loss(hidden, weight, targets).backward()


def bare_products(count, hidden, weight):
    """`count` matrix products of the head's shape: logits, dhidden, dweight, logits again."""
    with torch.no_grad():
        logits = hidden @ weight.t()
        if count > 1:
            logits @ weight
        if count > 2:
            logits.t() @ hidden
        if count > 3:
            torch.mm(hidden, weight.t(), out=logits)


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def peak_mb(variant, n, queue):
    """Largest resident size while one forward and backward runs, above the inputs."""
    torch.set_num_threads(1)
    hidden, weight, targets = inputs(n)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    forward_backward(variant, hidden, weight, targets)
    queue.put((_status("VmHWM") - before) / 1024)


def _status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def measure_peak(variant, n=N):
    context = get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=peak_mb, args=(variant, n, queue))
    process.start()
    process.join()
    return queue.get()


def main():
    torch.set_num_threads(1)
    variants = {
        "naive log-softmax": naive,
        "ours": ours,
        "ours, entropy as a metric": ours_with_entropy,
        "ours, gradient in the forward": one_pass,
        f"ours, {K} further ids a token": further_ids,
        f"ours, finding the top {K}": find_topk,
    }
    peaks = {name: measure_peak(variant) for name, variant in variants.items()}
    twice = measure_peak(ours, 2 * N)
    hidden, weight, targets = inputs()
    times = {}
    for _ in range(REPEATS):  # in turn, so that a slow moment of the machine hits all
        for count in (1, 3, 4):
            value = seconds(bare_products, count, hidden, weight)
            times.setdefault(f"{count} bare products", []).append(value)
        for name, variant in variants.items():
            value = seconds(forward, variant, hidden, weight, targets)
            times.setdefault(f"{name}, forward", []).append(value)
            value = seconds(forward_backward, variant, hidden, weight, targets)
            times.setdefault(name, []).append(value)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"N={N} tokens, D={D}, V={V}, fp32, one CPU thread, medians of {REPEATS}")
    print("| variant | forward s | forward + backward s | over 4 products | peak MB |")
    print("| --- | --- | --- | --- | --- |")
    floor = median["4 bare products"]
    for count in (1, 3, 4):
        value = median[f"{count} bare products"]
        print(f"| {count} bare products | | {value:.2f} | {value / floor:.2f} | |")
    for name in variants:
        print(
            f"| {name} | {median[name + ', forward']:.2f} | {median[name]:.2f} "
            f"| {median[name] / floor:.2f} | {peaks[name]:.0f} |"
        )
    print(
        json.dumps(
            {
                "cpu_fwd_bwd_over_floor": round(median["ours"] / floor, 3),
                "one_pass_over_3_products": round(
                    median["ours, gradient in the forward"] / median["3 bare products"], 3
                ),
                "peak_mb": round(peaks["ours"]),
                "peak_mb_at_twice_the_tokens": round(twice),
            }
        )
    )


if __name__ == "__main__":
    main()
