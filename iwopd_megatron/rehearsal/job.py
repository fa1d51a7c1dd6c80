"""What is rehearsed: the Megatron worlds of a recipe, the trainer and every teacher's service."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from iwopd_megatron.config.models import Frozen, Layout, Student
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.config.stages import layers_of_stages
from iwopd_megatron.hf.config import HfConfig
from iwopd_megatron.hf.known_models import planning_config
from iwopd_megatron.plan.plan import Plan
from iwopd_megatron.plan.plan import plan as make_plan

LONGEST, SEQUENCES = 512, 4  # of a micro-batch; tokens of a sequence at least


@dataclass(frozen=True)
class Job:
    """One role's world: its model, layout and ranks, and what it does."""

    role: str
    recipe: Recipe
    hf: HfConfig
    model: Student | Frozen
    layout: Layout
    world: int
    tokens: int  # of a micro-batch

    @property
    def trains(self) -> bool:
        """Whether it is the trainer."""
        return self.role == "trainer"

    @property
    def gpus(self) -> int:
        """GPUs of the whole run; of a recipe that names none this world's ranks."""
        cluster = self.recipe.cluster
        return self.world if cluster is None else cluster.gpus

    @property
    def microbatches(self) -> int:
        """Micro-batches that fill the pipeline once, and a second one where there is none."""
        pp, vpp = self.layout.pp, self.layout.vpp
        return pp * 2 if vpp > 1 else pp + 1

    def with_layers(self, each: int, dense: int | None = None) -> Job:
        """Return the same with so many layers in every chunk of every stage.

        dense: how many at the beginning have no experts in a model with experts; None: as it is.
        """
        layers = each * self.layout.pp * self.layout.vpp
        first = self.hf.first_k_dense_replace if dense is None else dense
        hf = replace(self.hf, num_hidden_layers=layers, first_k_dense_replace=first)
        return replace(self, layout=Layout(**self.layout.axes), hf=hf)

    @cached_property
    def layers_a_chunk(self) -> list[float]:
        """Layers of a chunk, by stage: their mean over its chunks."""
        stages = layers_of_stages(self.layout, self.hf.num_hidden_layers)
        return [layers / self.layout.vpp for layers in stages]

    @cached_property
    def embedded(self) -> dict[str, tuple[HfConfig, Frozen]]:
        """Models that score in the trainer's processes, by name."""
        if not self.trains:
            return {}
        models = self.recipe.embedded_scorers.items()
        return {key: (planning_config(model.hf), model) for key, model in models}


def jobs(recipe: Recipe) -> tuple[Plan, list[Job]]:
    """Return a recipe's plan, and its Megatron worlds at their real sizes; RecipeError."""
    plan = make_plan(recipe)
    setup = plan.setup
    recipe = setup.recipe
    hf = planning_config(recipe.student.hf)
    student, tokens = recipe.student, recipe.train.microbatch_tokens
    found = [Job("trainer", recipe, hf, student, student.parallel, setup.cluster.trainer, tokens)]
    for one in setup.teachers:
        if one.key in setup.services:
            teacher_hf = planning_config(one.model.hf)
            found.append(
                Job(one.key, recipe, teacher_hf, one.model, one.layout, one.gpus, one.tokens)
            )
    return plan, found
