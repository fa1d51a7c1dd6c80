"""What is refused of a recipe before any process starts: folders, layouts, sizes. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iwopd_megatron.config.stages import stage_layers
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.hf.folder import check_model

if TYPE_CHECKING:
    from iwopd_megatron.config.models import Frozen, Layout, Service
    from iwopd_megatron.config.recipe import Recipe, Train


def check(recipe: Recipe) -> None:
    """Refuse what cannot run: missing files, impossible layouts, a wrong world size; RecipeError.

    `preflight_scorers` does it for teachers and base student, `preflight_rollout` for servers.
    """
    student, layout = recipe.student, recipe.student.parallel
    hf = check_model(student.hf, weights=student.random_init is None)
    check_layout(layout, hf, "student")
    check_world(layout, recipe.world, "processes")
    _check_loss(recipe, hf)
    if recipe.evaluate.reverse_kl and not (recipe.is_distilling and recipe.data.eval):
        raise RecipeError(
            "evaluate.reverse_kl is of answers to data.eval under a teacher; add data.eval and "
            "teacher, or leave it out."
        )
    named = [("train", source.path) for source in recipe.data.train] + [("eval", recipe.data.eval)]
    for name, file in named:
        if file is not None and not file.exists():
            raise RecipeError(f"data.{name}: file {file} does not exist.")
    _check_sizes(recipe, hf)


def _check_loss(recipe: Recipe, hf: HfConfig) -> None:
    """Refuse objectives that cannot be what the recipe calls them."""
    loss = recipe.loss
    if loss.advantage == "topk_kl":
        raise RecipeError(
            "loss.advantage=topk_kl is the same number whichever token was sampled, and the "
            "expected gradient of such an advantage is zero (E[grad log pi] = 0); "
            "write loss.objective=topk_kl, which differentiates it as a loss."
        )
    if loss.objective == "topk_kl":
        if loss.extrapolation != 1.0:
            raise RecipeError(
                f"loss.extrapolation={loss.extrapolation:g} scales an advantage, which "
                "loss.objective=topk_kl does not have; write extrapolation=1 or objective=policy."
            )
        if recipe.gates.on_bad_sample == "drop":
            raise RecipeError(
                "gates.on_bad_sample=drop needs loss.objective=policy: the teacher's top K is "
                "already laid out with every answer; write on_bad_sample=stop."
            )
        if loss.topk.k > hf.vocab_size:
            raise RecipeError(
                f"loss.topk.k={loss.topk.k} exceeds the vocabulary of {hf.vocab_size}; lower it."
            )
    if loss.extrapolation != 1.0:
        if not recipe.is_distilling:
            raise RecipeError(f"loss.extrapolation={loss.extrapolation:g} needs a teacher; add it.")
        if recipe.base is None and recipe.student.random_init is not None:
            raise RecipeError(
                f"loss.extrapolation={loss.extrapolation:g} needs a base student, and random_init "
                "has no folder to take it from; write base.hf=FOLDER."
            )


def _check_sizes(recipe: Recipe, hf: HfConfig) -> None:
    train, rollout = recipe.train, recipe.rollout
    if train.prompts_per_round % train.minibatches:
        raise RecipeError(
            f"train.minibatches={train.minibatches} does not divide "
            f"train.prompts_per_round={train.prompts_per_round}; every optimiser step of a round "
            "trains on as many responses."
        )
    if train.warmup_rounds >= train.rounds:
        raise RecipeError(
            f"train.warmup_rounds={train.warmup_rounds} must be smaller than "
            f"train.rounds={train.rounds}."
        )
    if train.min_lr > train.lr:
        raise RecipeError(f"train.min_lr={train.min_lr} must not exceed train.lr={train.lr}.")
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    for name, section in _packing_sections(recipe).items():
        budget = section.microbatch_tokens
        if budget is not None and longest > budget:
            raise RecipeError(
                f"{name}.microbatch_tokens={budget} cannot hold the longest sample, "
                f"rollout.max_prompt_tokens + max_response_tokens = {longest}; raise it to that."
            )
    check_context(recipe, hf, "student")


def check_context(recipe: Recipe, hf: HfConfig, role: str) -> None:
    """Refuse samples longer than a model's context; RecipeError names its `role`."""
    longest = recipe.rollout.max_prompt_tokens + recipe.rollout.max_response_tokens
    if longest > hf.context_length:
        raise RecipeError(
            f"rollout.max_prompt_tokens + max_response_tokens = {longest} exceeds the {role}'s "
            f"context of {hf.context_length} tokens (max_position_embeddings, times YaRN's factor "
            "where config.json has one); lower one of the two."
        )


def _packing_sections(recipe: Recipe) -> dict[str, Train | Frozen | Service]:
    """Return the sections with a `microbatch_tokens`, by name."""
    sections: dict[str, Train | Frozen | Service] = {"train": recipe.train}
    sections |= recipe.named_teachers
    for role, teacher in recipe.named_teachers.items():
        if teacher.service is not None:
            sections[f"{role}.service"] = teacher.service
    if recipe.base is not None:
        sections["base"] = recipe.base
    return sections


def check_world(layout: Layout, world: int, key: str) -> None:
    """Refuse a number of processes that the layout does not divide; RecipeError names the `key`."""
    if world % layout.unit:
        raise RecipeError(
            f"{key}={world} is not a multiple of {layout.unit}, what the layout "
            f"{describe(layout)} needs; write {key}={layout.unit} or leave it out."
        )


def describe(layout: Layout) -> str:
    """Return the axes larger than one in words, e.g. `tp2 ep2`."""
    sizes = [f"{name}{size}" for name, size in layout.axes.items() if size > 1]
    return " ".join(sizes) or "of one process"


def check_layout(layout: Layout, hf: HfConfig, role: str) -> None:
    """Refuse degrees that do not divide the model, and stages Megatron cannot have; RecipeError.

    It names the model's `role`.
    """
    experts = hf.num_experts
    rules = [
        ("tp", layout.tp, "num_attention_heads", hf.num_attention_heads),
        ("tp", layout.tp, "num_key_value_heads", hf.num_key_value_heads),
        ("tp", layout.tp, "vocab_size", hf.vocab_size),
    ]
    if experts:
        rules += [
            ("ep", layout.ep, "the number of experts", experts),
            ("etp", layout.etp, "moe_intermediate_size", hf.moe_intermediate_size),
            ("tp", layout.tp, "the shared expert's size", hf.shared_expert_intermediate_size),
        ]
    else:
        rules.append(("tp", layout.tp, "intermediate_size", hf.intermediate_size))
    for axis, degree, name, size in rules:
        if size % degree:
            fits = ", ".join(str(d) for d in range(1, size + 1) if size % d == 0 and d <= 64)
            raise RecipeError(
                f"{role}: {axis}={degree} does not divide {name} ({size}); use one of {fits}."
            )
    if role not in ("teacher", "base") and not experts and layout.ep * layout.etp > 1:
        raise RecipeError(
            f"{role} is a dense model: ep={layout.ep} etp={layout.etp} need experts; "
            "write ep=1 etp=1."
        )
    try:
        stage_layers(layout, hf.num_hidden_layers)
    except RecipeError as error:
        raise RecipeError(f"{role}: {error}") from None


def check_service_sizes(recipe: Recipe) -> None:
    """Refuse teacher services whose GPUs do not suit their layout; RecipeError."""
    sizes = recipe.service_processes
    for key, size in sizes.items():
        layout = recipe.services[key].parallel
        if size % layout.unit:
            name = "cluster.teacher" if len(sizes) == 1 else f"{key}.service.processes"
            raise RecipeError(
                f"{name}={size} is not a multiple of {layout.unit}, what the layout "
                f"{describe(layout)} needs; write {-(-size // layout.unit) * layout.unit}."
            )
