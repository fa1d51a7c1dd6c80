"""The objective linter: what a recipe's loss is, and which of its settings do not do what they say.

Recipes that cannot run as written are refused in preflight.py; these can. No torch.
"""

from __future__ import annotations

from iwopd_megatron.config.loss import WeightingRule
from iwopd_megatron.config.recipe import Recipe

LONG_PROMPT_SHARE = 0.2

# Settings of loss.weighting that a rule reads.
READS = {
    "uniform": (),
    "iw": ("gamma", "denominator"),
    "surrogate": ("denominator",),
    "iw_signed": ("gamma",),
    "log_ratio": (),
    "ratio": ("alpha",),
    "ratio_blend": ("gamma", "alpha"),
    "linear": ("gamma",),
    "prefix_boost": ("gamma", "share"),
    "prefix": ("share",),
    "suffix": ("share",),
    "schedule": ("start", "end", "anneal"),
}
AGGREGATIONS = {
    "seq_mean_token_mean": "every response counts the same, as in the paper's recipes",
    "token_mean": "every token counts the same, long responses more than in the paper",
    "seq_mean_token_sum": "every response's sum counts, long responses most",
}


def objective_line(recipe: Recipe) -> str:
    """Return in one line what a run minimises."""
    loss, weighting = recipe.loss, recipe.loss.weighting
    if not recipe.is_distilling:
        what = "negative log-likelihood of given responses"
    elif loss.objective == "topk_kl":
        what = f"KL(student || teacher) on the teacher's top {loss.topk.k}, {loss.topk.support}"
    else:
        what = "OPD" if loss.extrapolation == 1 else f"ExOPD lambda {loss.extrapolation:g}"
    parts = [what]
    if recipe.is_distilling:
        read = {name: getattr(weighting, name) for name in READS[weighting.rule]}
        parts.append(
            " ".join(["weights", weighting.rule, *(f"{name}={v}" for name, v in read.items())])
        )
        if loss.objective == "policy":
            cap = loss.tis_cap
            parts.append(f"importance weight capped at {cap:g}" if cap else "no importance weight")
    parts.append(f"{loss.aggregation} ({AGGREGATIONS[loss.aggregation]})")
    steps = recipe.steps_per_round
    parts.append(f"{steps} optimiser step{'s' if steps > 1 else ''} a round")
    return "; ".join(parts)


def findings(recipe: Recipe) -> list[str]:
    """Return a sentence for each setting that does nothing, or not what its name says.

    Settings that the recipe leaves at their defaults are passed over.
    """
    if not recipe.is_distilling:
        return []
    found = _weighting(recipe.loss.weighting) + _base(recipe)
    if recipe.loss.objective == "topk_kl":
        return found + _dense(recipe)
    return found + _policy(recipe)


def long_prompts(dropped: int, total: int, limit: int) -> list[str]:
    """Return a sentence if the length filter leaves out more than LONG_PROMPT_SHARE, in a list."""
    if dropped <= LONG_PROMPT_SHARE * total:
        return []
    return [
        f"{dropped} of {total} prompts ({dropped / total:.0%}) are longer than "
        f"rollout.max_prompt_tokens={limit} and left out; raise it, or expect another data set."
    ]


def _policy(recipe: Recipe) -> list[str]:
    loss, found, defaults = recipe.loss, [], type(recipe.loss)()
    clips = [n for n in ("clip", "dual_clip") if getattr(loss, n) != getattr(defaults, n)]
    if recipe.steps_per_round == 1 and clips:
        names = " and ".join(f"loss.{name}" for name in clips)
        found.append(
            f"{names} cannot bind: with one optimiser step a round the policy ratio is 1; "
            "raise train.minibatches or train.epochs if you want the clip."
        )
    if loss.tis_cap is None:
        found.append(
            f"truncated importance sampling is off (loss.tis_cap: null) although "
            f"rollout.engine={recipe.rollout.engine} computes its log-probs separately from the "
            "trainer; write loss.tis_cap=5.0 unless you rule their difference out."
        )
    if loss.topk != type(loss.topk)():
        found.append("loss.topk is read by loss.objective=topk_kl only; it does nothing here.")
    if recipe.rollout.top_p < 1:
        found.append(
            f"rollout.top_p={recipe.rollout.top_p:g} draws from a truncated distribution, but the "
            "policy loss takes the samples for the student's own; write rollout.top_p=1, or use "
            "loss.objective=topk_kl, which does not depend on the sampled token."
        )
    return found


def _dense(recipe: Recipe) -> list[str]:
    loss, found = recipe.loss, []
    if loss.topk.support == "truncated":
        found.append(
            "loss.topk.support=truncated has neither renormalisation nor a tail bucket: the sum is "
            "not a divergence and can be lowered by moving probability off the support; write "
            "renormalised or tail."
        )
    defaults = type(loss)()
    for name in ("clip", "dual_clip", "tis_cap"):
        if getattr(loss, name) != getattr(defaults, name):
            found.append(
                f"loss.{name} is read by loss.objective=policy only; it does nothing here."
            )
    return found


def _weighting(weighting: WeightingRule) -> list[str]:
    rule, defaults = weighting.rule, WeightingRule()
    found = []
    for name in type(weighting).model_fields:
        changed = getattr(weighting, name) != getattr(defaults, name)
        if name != "rule" and changed and name not in READS[rule]:
            users = ", ".join(other for other, read in READS.items() if name in read)
            found.append(
                f"loss.weighting.{name}={getattr(weighting, name)} does nothing under rule "
                f"'{rule}'; {users} would read it."
            )
    if "gamma" in READS[rule] and weighting.gamma == 0:
        found.append(f"loss.weighting.gamma=0 makes rule '{rule}' the same as uniform.")
    if "share" in READS[rule] and weighting.share == 1:
        found.append(f"loss.weighting.share=1 makes rule '{rule}' weigh all tokens the same.")
    return found


def _base(recipe: Recipe) -> list[str]:
    if recipe.base is None or recipe.base_model is not None:
        return []
    return ["base does nothing with loss.extrapolation=1, which is plain OPD; it is not loaded."]
