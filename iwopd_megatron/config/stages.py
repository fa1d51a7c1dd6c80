"""Which layers of a model are on which pipeline stage, as Megatron-Core deals them out. No torch.

A stage holds `vpp` chunks of layers. The network passes the first chunk of every stage, then the
second of every stage, and so on; the embedding is in the very first, the LM head in the very last,
and only those two may be without layers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, groupby

from iwopd_megatron.config.models import Layout
from iwopd_megatron.errors import RecipeError

FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
EMBEDDING = "account_for_embedding_in_pipeline_split"
LOSS, STRING = "account_for_loss_in_pipeline_split", "pipeline_model_parallel_layout"
# What Megatron's layout string repeats: (tt|)*3, then t*3.
REPEATED = (r"\(([^)]+)\)\*(\d{1,3})", r"(.)\*(\d{1,3})")

Stage = tuple[range, ...]  # the layers of every chunk


@lru_cache(maxsize=4096)  # a search asks the same of many splits
def stage_layers(layout: Layout, layers: int) -> tuple[Stage, ...]:
    """Return a model's layers, counted from 0, by stage and chunk.

    Megatron's get_num_layers_to_build and get_transformer_layer_offset say the same
    (tests/test_stages.py). RecipeError, without the role, for what Megatron refuses or miscounts.
    """
    try:
        counts = _counts(layout, layers)
    except _Undivided as error:
        raise RecipeError(f"{error}; {_remedy(layout, layers)}.") from None
    ends = list(accumulate(counts))
    chunks = [range(end - count, end) for count, end in zip(counts, ends, strict=True)]
    return tuple(tuple(chunks[stage :: layout.pp]) for stage in range(layout.pp))


class _Undivided(Exception):
    """Layers that no stages of equal size make."""


def _counts(layout: Layout, layers: int) -> list[int]:
    """Return every chunk's number of layers, in the order of the network."""
    given = layout.placement
    if STRING in given and len(given) > 1:
        others = ", ".join(sorted(given.keys() - {STRING}))
        raise RecipeError(f"{STRING} places every layer; leave {others} out.")
    if given.keys() & {FIRST, LAST} and given.keys() & {EMBEDDING, LOSS}:
        raise RecipeError(
            f"{FIRST} and {LAST} count layers alone; leave {EMBEDDING} and {LOSS} out, or them."
        )
    if layout.vpp > 1 and layout.pp == 1:
        raise RecipeError(f"vpp={layout.vpp} needs pp >= 2; write vpp=1 or pp=2.")
    if layout.pipeline_model_parallel_layout is not None:
        return _placed(layout.pipeline_model_parallel_layout, layout, layers)
    return (_ends_given if given.keys() & {FIRST, LAST} else _dealt)(layout, layers)


def layers_of_stages(layout: Layout, layers: int) -> list[int]:
    """Return how many layers each stage has; RecipeError as `stage_layers`."""
    return [sum(map(len, chunks)) for chunks in stage_layers(layout, layers)]


def distinct_stages(layout: Layout, layers: int) -> list[int]:
    """Return the first and the last stage, and the first of those that are alike between them."""
    found: dict[tuple[int, ...], int] = {}
    stages = stage_layers(layout, layers)
    for number, chunks in enumerate(stages[1:-1], 1):
        found.setdefault(tuple(map(len, chunks)), number)
    return sorted({0, *found.values(), layout.pp - 1})


def with_stages(layout: Layout, layers: int) -> Layout | None:
    """Return the layout where its axes divide the layers, else with settings that do.

    Those whose fullest stage has fewest layers, and the first of: embedding and LM head count as
    layers, or one of them; ends of their own sizes; a layout string. None where there are fewer
    layers than chunks. What the layout has of such settings is left out.
    """
    found: list[tuple[int, Layout]] = []
    for placement in _placements(layout, layers):
        candidate = Layout(**layout.axes, **placement)
        with contextlib.suppress(RecipeError, _Undivided):
            counts = _counts(candidate, layers)
            if not placement:
                return candidate
            found.append((max(sum(counts[i :: layout.pp]) for i in range(layout.pp)), candidate))
    return min(found, key=lambda pair: pair[0], default=(0, None))[1]


def _placements(layout: Layout, layers: int) -> Iterator[dict[str, bool | int | str]]:
    yield {}
    yield {EMBEDDING: True, LOSS: True}
    yield {LOSS: True}
    yield {EMBEDDING: True}
    pp, chunks = layout.pp, layout.pp * layout.vpp
    each = -(-layers // chunks) * layout.vpp  # of a stage between the ends
    ends = (layers - (pp - 2) * each) // layout.vpp
    if pp == 2 and ends:
        yield {FIRST: -(-ends // 2) * layout.vpp}
    elif pp > 2 and ends >= 2:
        yield {FIRST: -(-ends // 2) * layout.vpp, LAST: ends // 2 * layout.vpp}
    least, more = divmod(layers, chunks)
    if chunks > 1 and least:
        counts = [least] * chunks
        for place in [*range(1, chunks - 1), 0][:more]:  # never the head's, which has work enough
            counts[place] += 1
        yield {STRING: layout_string(counts)}


def layout_string(counts: list[int]) -> str:
    """Return Megatron's layout string of every chunk's number of layers, in the network's order."""
    first, *middle, last = ({0: "", 1: "t"}.get(n, f"t*{n}") for n in counts)
    runs = [(text, len(list(run))) for text, run in groupby(middle)]
    inner = [f"({text}|)*{n}" if n > 1 else f"{text}|" for text, n in runs]
    return f"E{first}|{''.join(inner)}{last}L"


def _dealt(layout: Layout, layers: int) -> list[int]:
    """Return every chunk's layers where all have as many, embedding and head counted or not."""
    chunks = layout.pp * layout.vpp
    embedding = layout.account_for_embedding_in_pipeline_split
    loss = layout.account_for_loss_in_pipeline_split
    total = layers + embedding + loss
    if total % chunks:
        counted = [name for name, is_there in ((EMBEDDING, embedding), (LOSS, loss)) if is_there]
        said = f" with {' and '.join(counted)} ({total})" * bool(counted)
        raise _Undivided(f"pp x vpp={chunks} does not divide num_hidden_layers ({layers}){said}")
    counts = [total // chunks] * chunks
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


def _remedy(layout: Layout, layers: int) -> str:
    """Return what to write where the axes do not divide the layers."""
    fits = [str(d) for d in range(1, layers + 1) if layers % d == 0 and d <= 64]
    others = f"pp x vpp of {', '.join(fits)}"
    found = with_stages(layout, layers)
    if found is None:
        return f"use {others}"
    settings = [f"{name}={_yaml(value)}" for name, value in found.placement.items()]
    return f"write {' and '.join(settings)}, or use {others}" if settings else "leave it out"


def _yaml(value: bool | int | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _ends_given(layout: Layout, layers: int) -> list[int]:
    """Return every chunk's layers where the first or the last stage has a number of its own."""
    pp, vpp = layout.pp, layout.vpp
    first, last = (
        layout.num_layers_in_first_pipeline_stage,
        layout.num_layers_in_last_pipeline_stage,
    )
    if pp == 1:
        raise RecipeError(f"{FIRST} and {LAST} need pp >= 2; leave them out.")
    if pp == 2 and first and last and vpp > 1:  # Megatron divides by the stages between: none
        raise RecipeError(f"{FIRST} and {LAST} leave no stage of pp=2; write one of them.")
    rest, between = layers - (first or 0) - (last or 0), pp - bool(first) - bool(last)
    each = rest // between if between else 0
    is_whole = not any(n % vpp for n in (first or 0, last or 0, each))
    if rest < between or rest != each * between or not is_whole:
        said = " and ".join(f"{name}={n}" for name, n in ((FIRST, first), (LAST, last)) if n)
        raise _Undivided(
            f"{said} leave {rest} of {layers} layers to {between} stages, which must have equally "
            f"many, and every stage a multiple of vpp={vpp}"
        )
    sizes = [first or each, *[each] * (pp - 2), last or each]
    return [n // vpp for n in sizes] * vpp


def _placed(text: str, layout: Layout, layers: int) -> list[int]:
    """Return every chunk's layers by Megatron's layout string."""
    text = text.replace(",", "")
    for pattern in REPEATED:
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    chunks, wanted = text.split("|"), layout.pp * layout.vpp
    example = layout_string([1] * max(2, wanted))
    if strange := set(text) - set("EtL|"):
        raise RecipeError(
            f"{STRING} has '{min(strange)}', which is no E (embedding), t (layer) or L (LM head); "
            f"write those, stages cut by |, e.g. {example}."
        )
    if len(chunks) != wanted:
        raise RecipeError(
            f"{STRING} has {len(chunks)} stages, pp x vpp={wanted}; write as many, cut by |."
        )
    if text.count("t") != layers:
        raise RecipeError(
            f"{STRING} places {text.count('t')} layers (t), num_hidden_layers is {layers}; write "
            "as many."
        )
    if not re.fullmatch(r"E[t|]*L", text):
        raise RecipeError(
            f"{STRING} must begin its first stage with the one E and end its last with the one L, "
            f"where Megatron has embedding and LM head; write e.g. {example}."
        )
    if not all(chunks):
        raise RecipeError(
            f"{STRING} has a stage with nothing in it; give every one a layer, or only E or L."
        )
    return [chunk.count("t") for chunk in chunks]
