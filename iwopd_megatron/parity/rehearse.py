"""A recipe's layouts at toy size: what cannot run is found on a laptop.

Student's and teacher's layouts, the same degrees where `limit` processes allow it and halved where
not, on a tiny random model of the same kind, against Hugging Face on every rank (see parity.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.preflight import check_layout
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.config.stages import EMBEDDING, LOSS, STRING, layout_string, stage_layers
from iwopd_megatron.hf.families import FAMILIES
from iwopd_megatron.hf.known_models import planning_config

if TYPE_CHECKING:
    from iwopd_megatron.batch.trajectory import Trajectory

LENGTHS, BUDGET = [24, 16, 32, 20, 28, 12, 24, 32], 96  # packed, unequal
# Which axis gives way first among equally large ones.
GIVES_WAY = ("etp", "cp", "tp", "pp", "ep")


@dataclass(frozen=True)
class Rehearsal:
    """One model's layout, scaled down; equal ones need to run only once."""

    model_type: str
    is_tied: bool
    layout: Layout
    recompute: str
    processes: int
    layers: int

    @property
    def config(self) -> dict[str, Any]:
        """Return config.json of the smallest model that this layout divides."""
        axes, config = self.layout, dict(FAMILIES[self.model_type].sample)
        config |= {
            "model_type": self.model_type,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 2 * max(2, axes.tp),
            "num_key_value_heads": max(2, axes.tp),
            "head_dim": 16,
            "tie_word_embeddings": self.is_tied,
            "pad_token_id": 0,
        }
        if "kv_lora_rank" in config:  # every head has keys and values of its own
            config["num_key_value_heads"] = config["num_attention_heads"]
            config["head_dim"] = config["qk_rope_head_dim"]  # as transformers has it
        if FAMILIES[self.model_type].has_experts:
            count = "num_experts" if "num_experts" in config else "n_routed_experts"
            config[count] = max(8, axes.ep)
            config["moe_intermediate_size"] = 32 * axes.etp
        return config

    def samples(self) -> list[Trajectory]:
        """Return what its layouts are compared on; the pad token is among the ids."""
        from iwopd_megatron.parity.hf_reference import make_samples

        return make_samples(self.config["vocab_size"], LENGTHS, self.config["pad_token_id"])


def rehearsals(recipe: Recipe, limit: int) -> dict[str, Rehearsal]:
    """Return the recipe's layouts by role, each scaled down to `limit` processes.

    RecipeError if a layout does not fit its model.
    """
    student = recipe.student
    models = {"student": (student.hf, student.parallel, student.recompute)}
    for role, teacher in recipe.named_teachers.items():
        if teacher.service is not None:
            models[role] = teacher.hf, teacher.service.parallel, "none"
        elif not teacher.is_remote:
            models[role] = teacher.hf, student.parallel, "none"
    found = {}
    for role, (folder, layout, recompute) in models.items():
        hf = planning_config(folder)
        check_layout(layout, hf, role)
        if not hf.num_experts:
            layout = layout.without_experts
        layout, layers = scaled_stages(layout, hf.num_hidden_layers, scaled(layout, limit))
        copies = 2 if 2 * layout.unit <= limit else 1  # data parallelism, where there is room
        kind = hf.model_type, hf.tie_word_embeddings
        found[role] = Rehearsal(*kind, layout, recompute, copies * layout.unit, layers)
    return found


def scaled(layout: Layout, limit: int) -> Layout:
    """Return a layout of at most `limit` processes: the largest axis is halved; vpp at most 2.

    Its stages are even.
    """
    axes = layout.axes | {"vpp": min(2, layout.vpp)}
    while (found := Layout(**axes)).unit > limit:
        axis = max(GIVES_WAY, key=lambda name: axes[name])
        axes[axis] = axes[axis] // 2 if axes[axis] % 2 == 0 else 1
        if axes["pp"] == 1:
            axes["vpp"] = 1
    return found


def scaled_stages(layout: Layout, layers: int, axes: Layout) -> tuple[Layout, int]:
    """Return `axes` with stages as unlike as those of a layout of so many layers, and toy layers.

    Embedding and LM head that count as layers still do; other settings become a layout string.
    """
    given, chunks = layout.placement, axes.pp * axes.vpp
    if not given or axes.pp == 1:
        return axes, max(2, chunks)
    if given.keys() & {EMBEDDING, LOSS}:
        if chunks == 2:  # where both count, both stages have as many layers
            given = dict(list(given.items())[-1:])
        return Layout(**axes.axes, **given), 2 * chunks - len(given)
    stages = stage_layers(layout, layers)
    real = [len(stage[chunk]) for chunk in range(layout.vpp) for stage in stages]
    least = min(filter(None, real))
    chosen = [real[round(i * (len(real) - 1) / (chunks - 1))] for i in range(chunks)]
    counts = [0 if n == 0 else 1 if n == least else 2 for n in chosen]
    if len(set(counts)) == 1:
        counts[-1] += 1
    return Layout(**axes.axes, **{STRING: layout_string(counts)}), sum(counts)


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Write a random Hugging Face model in which every kind of weight matters.

    config: settings of config.json; without a model_type it is Qwen3's, with experts or dense.
    """
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    model_type = config.get("model_type", "qwen3_moe" if "num_experts" in config else "qwen3")
    kind = FAMILIES[model_type].transformers
    settings = getattr(transformers, f"{kind}Config")(**config)
    model = getattr(transformers, f"{kind}ForCausalLM")(settings).float()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_((0.5 if "mlp.gate.weight" in name else 0.08) * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(".e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
        if settings.pad_token_id is not None:
            model.model.embed_tokens.weight[settings.pad_token_id] = 0  # as transformers starts it
    model.save_pretrained(folder)
