"""Predicted against published: memory, training, decoding and whole rounds, with the errors.

Lines marked * set a rate of plan.hardware.Rates; medians are over all others.
"""

import json
import statistics
from dataclasses import replace

from plan_anchors import DECODINGS, ROUNDS, TRAININGS, Decoding, Round, Training

from iwopd_megatron.config.models import Layout
from iwopd_megatron.plan.generation import Lengths, generate
from iwopd_megatron.plan.hardware import GPUS, RATES
from iwopd_megatron.plan.memory import moments
from iwopd_megatron.plan.time import (
    Workload,
    decode_step,
    forward,
    forward_backward,
    optimizer_step,
    pipeline,
)

GIB = 2**30


def memory(anchor: Training) -> tuple[float, float]:
    """Predicted and published bytes. The runs' loss keeps bf16 and fp32 logits of all tokens."""
    tokens = anchor.length * anchor.micro
    logits = tokens / anchor.layout.cp * anchor.size.vocab / anchor.layout.tp * 6
    found = moments(
        anchor.size, anchor.layout, anchor.gpus, tokens, anchor.recompute, anchor.precision
    )
    found = [replace(one, head=logits) if one.head else one for one in found]
    fullest = max(found, key=lambda one: one.total)
    if anchor.allocated:
        return fullest.allocated, anchor.allocated
    return fullest.total, anchor.reserved


def training_speed(anchor: Training) -> float:
    """Tokens a second and GPU of a training step."""
    layout = anchor.layout
    load = Workload(
        anchor.size,
        layout,
        GPUS[anchor.gpu],
        anchor.length * anchor.micro,
        anchor.length,
        software=anchor.software,
    )
    copies = anchor.gpus // (layout.tp * layout.pp * layout.cp)
    count = anchor.sequences / copies / anchor.micro
    seconds = pipeline(forward_backward(load, anchor.recompute), layout, count)
    seconds += optimizer_step(load, anchor.gpus)
    return anchor.sequences * anchor.length / anchor.gpus / seconds


def decoding(anchor: Decoding) -> float:
    load = Workload(anchor.size, Layout(), GPUS[anchor.gpu], 1, 1)
    return decode_step(load, 1, anchor.context, 1)


def round_seconds(anchor: Round) -> float:
    """Generation, old log-probs, forward and backward, optimiser; packed to the longest sample."""
    gpu, layout, prompt = GPUS["h100-80"], anchor.layout, 150
    lengths = Lengths.lognormal(anchor.length - prompt, anchor.limit - prompt, 0.4, anchor.samples)
    engine = Workload(anchor.size, Layout(), gpu, 1, 1)
    servers = (anchor.generating or anchor.gpus) / anchor.tp
    written = generate(
        lambda batch, context: decode_step(engine, batch, context, anchor.tp),
        lengths,
        prompt,
        anchor.samples / servers,
        256,
    )
    copies = anchor.gpus / (layout.tp * layout.pp * layout.cp)
    load = Workload(anchor.size, layout, gpu, anchor.limit, anchor.length)
    count = anchor.samples * anchor.length / anchor.limit / copies / 0.9
    trained = pipeline(forward_backward(load, anchor.recompute), layout, count)
    trained += optimizer_step(load, anchor.gpus)
    trained += pipeline(forward(load), layout, count)
    alone = max(written.seconds, trained) if anchor.generating else written.seconds + trained
    return alone * RATES.system


def main():
    errors: dict[str, list[float]] = {"memory": [], "throughput": []}

    def line(kind, what, source, predicted, published, unit, calibrated=False):
        error = predicted / published - 1
        if not calibrated:
            errors[kind].append(abs(error))
        values = f"{predicted:.4g} | {published:.4g} {unit} | {error:+.0%}"
        print(f"| {what}{' *' if calibrated else ''} | {source} | {values} |")

    print("| what | source | predicted | published | error |\n| --- | --- | --- | --- | --- |")
    for a in TRAININGS:
        if a.allocated or a.reserved:
            predicted, published = memory(a)
            kind = "allocated" if a.allocated else "reserved"
            line("memory", a.what, a.source, predicted / GIB, published / GIB, f"GiB {kind}")
    for a in TRAININGS:
        unit = "tokens/s/GPU"
        line(
            "throughput",
            a.what,
            a.source,
            training_speed(a),
            a.tokens_per_second,
            unit,
            a.calibrated,
        )
    for a in DECODINGS:
        line(
            "throughput",
            a.what,
            a.source,
            decoding(a) * 1e3,
            a.seconds * 1e3,
            "ms/token",
            a.calibrated,
        )
    for a in ROUNDS:
        line(
            "throughput",
            a.what,
            "NeMo-RL performance summary",
            round_seconds(a),
            a.seconds,
            "s/round",
            a.calibrated,
        )
    print()
    print(
        json.dumps(
            {
                "median_abs_error_throughput": round(statistics.median(errors["throughput"]), 4),
                "median_abs_error_memory": round(statistics.median(errors["memory"]), 4),
                "held_out_anchors": sum(map(len, errors.values())),
            }
        )
    )


if __name__ == "__main__":
    main()
