"""What a recipe needs and costs, from the recipe and config.json alone: `plan(recipe)`.

Roles, their memory against their GPUs, a round by phase, the run's GPU-hours, what another node
buys, and what breaks first. Imports no torch.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property

from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.plan.default_gpus import planned_cluster
from iwopd_megatron.plan.generation import Generation
from iwopd_megatron.plan.phases import DISK, Phase, generation, phases, round_seconds
from iwopd_megatron.plan.roles import PlannedRole, concurrency, roles
from iwopd_megatron.plan.setup import Assumptions, Setup


@dataclass(frozen=True)
class Plan:
    """A setup with what follows from it, computed when first asked for."""

    setup: Setup

    @cached_property
    def roles(self) -> list[PlannedRole]:
        """The trainer, teacher services and rollout servers."""
        return roles(self.setup)

    @cached_property
    def generation(self) -> Generation:
        """When the responses of one server end."""
        return generation(self.setup)

    @property
    def concurrency(self) -> float:
        """Requests that a server has room for at once."""
        return concurrency(self.setup)

    @cached_property
    def phases(self) -> list[Phase]:
        """The phases of a round, in order."""
        return phases(self.setup, self.generation)

    @cached_property
    def seconds(self) -> float:
        """Seconds of a round."""
        return round_seconds(self.setup, self.phases)

    @property
    def fits(self) -> bool:
        """Whether every role fits on its GPUs."""
        return all(role.fits for role in self.roles)

    @property
    def gpus(self) -> int:
        """GPUs of all roles."""
        return self.setup.cluster.gpus

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens, prompts included, a second and GPU of the whole cluster."""
        return self.setup.prompts * self.setup.sequence / self.seconds / self.gpus

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the recipe's rounds with evaluations and checkpoints.

        = gpus x (rounds x seconds + evaluations x generation x answers / prompts + checkpoints x
        14 bytes x parameters / (DISK x the trainer's nodes)) / 3600. Evaluations: before the first
        round, after the last and every `evaluate.every`; 14 bytes: bf16 weights, fp32 main weights
        and moments.
        """
        recipe, rounds = self.setup.recipe, self.setup.recipe.train.rounds
        total = rounds * self.seconds
        if recipe.data.eval is not None:
            answers = recipe.evaluate.problems * recipe.evaluate.samples
            share = answers / self.setup.prompts
            times = 2 + (rounds - 1) // recipe.evaluate.every
            total += times * share * self.generation.seconds
        if recipe.checkpoint.every:
            written = 14 * self.setup.student.parameters
            nodes = self.setup.cluster.nodes_of("trainer")
            total += rounds // recipe.checkpoint.every * written / (DISK * nodes)
        return total * self.gpus / 3600

    def another_node(self) -> dict[str, float]:
        """Return role -> seconds of a round if it had one more node, or one instead of a part.

        Roles whose layout that does not suit are absent.
        """
        setup, seconds = self.setup, {}
        size = setup.cluster.gpus_per_node
        for role, gpus in setup.gpus.items():
            more = setup.on(setup.gpus | {role: gpus - gpus % size + size})
            with contextlib.suppress(RecipeError):
                more.check()
                seconds[role] = Plan(more).seconds
        return seconds

    def limits(self) -> list[str]:
        """Return sentences on what breaks first as GPUs are added, the worst first."""
        setup = self.setup
        found: list[tuple[float, str]] = []  # how bad, in what words
        batches = (
            setup.prompts * setup.sequence / setup.filled(setup.recipe.train.microbatch_tokens)
        )
        per_copy = batches / setup.data_parallel
        needed = setup.layout.pp * 4 if setup.layout.pp > 1 else 1
        if per_copy < needed:
            sentence = (
                f"{setup.data_parallel} data-parallel copies share {batches:.0f} micro-batches, "
                f"{per_copy:.1f} each where {needed} keep them busy: raise train.prompts_per_round "
                f"to {setup.prompts * needed / per_copy:.0f}, or train on fewer GPUs"
            )
            found.append((needed / per_copy, sentence))
        requests = setup.prompts / setup.servers
        if setup.cluster.rollout and requests < 8:
            sentence = (
                f"{setup.servers} servers share {setup.prompts} prompts, {requests:.1f} each: "
                "decoding is bound by weights, and more servers only wait for the longest response"
            )
            found.append((8 / requests, sentence))
        by_name = {"generation": 0.0} | {phase.name: phase.seconds for phase in self.phases}
        parts = [
            (
                by_name["generation"] * self.generation.tail,
                "a quarter of the responses is still being written (the long tail): "
                "rollout.max_staleness=1 trains meanwhile, a lower max_response_tokens ends it",
            ),
            (by_name["weight sync"], "goes to the weight sync: rollout.sync=distributed"),
            (
                by_name["optimiser"],
                "goes to the optimiser step's communication: more prompts a round",
            ),
        ]
        for seconds, sentence in parts:
            share = seconds / self.seconds
            if share > 0.2:
                found.append((1 + share, f"{share:.0%} of a round {sentence}"))
        waiting = requests / self.concurrency
        if waiting > 1 and setup.recipe.is_distilling:
            sentence = (
                f"{requests:.0f} requests a server where its KV cache holds "
                f"{self.concurrency:.0f}: more rollout GPUs"
            )
            found.append((waiting, sentence))
        return [sentence for _, sentence in sorted(found, key=lambda pair: -pair[0])]


def plan(recipe: Recipe, assumed: Assumptions | None = None) -> Plan:
    """Return a checked plan of a recipe on its `cluster`, and what `planned_cluster` adds to it.

    Raises RecipeError where layouts or GPUs do not suit the models or one another.
    """
    cluster, said = planned_cluster(recipe)
    setup = Setup.of(recipe, cluster, assumed or Assumptions(), tuple(said))
    setup.check()
    return Plan(setup)
