"""Bytes that a run's processes need of this machine's memory, where they compute on its CPUs.

By phase, all processes of the machine together. Weights, gradients and optimiser states are
memory.py's; activations are activations.py's, with 4 bytes an element in fp32; the rest is below.
host_check.py compares the most with what there is. In the formulas

    P = parameters of a rank      w = bytes of an element     V, h = vocabulary, hidden size
    B = prompts decoded at once   tp = the layout's degree    dp = data-parallel ranks

tests/test_plan_host.py holds it against what processes had at most; bench/real_shape.py prints both
for Qwen3-0.6B's shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from iwopd_megatron.config.models import Frozen, Layout
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.config.stages import distinct_stages
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.plan.activations import activation_bytes, mlp_bytes
from iwopd_megatron.plan.attention_bytes import attention_bytes
from iwopd_megatron.plan.hardware import GIB
from iwopd_megatron.plan.memory import Precision, data_parallel, kv_bytes, states
from iwopd_megatron.plan.model_size import ModelSize

FIRST = 0.6 * GIB  # torch, Megatron, transformers: of the first process, whose forks share most
FORKED = 0.25 * GIB  # of a process, its own: buffers, threads, Python's objects
HEAD_ROWS = 512  # linear_loss.CPU_CHUNK, whose module imports torch
PACKED_ROWS, PACKED_BYTES = 128, 64 * 2**20  # rollout/packed.py's MOST_ROWS, LEAST_BYTES
FILE_BYTES = 5e9  # of an exported file, held until it is full: weights/shards.py


@dataclass(frozen=True)
class Needs:
    """A recipe's processes on one machine: `processes` of its world."""

    recipe: Recipe
    processes: int

    @cached_property
    def student(self) -> ModelSize:
        """Sizes of the student."""
        return ModelSize.of(read_hf_config(self.recipe.student.hf))

    @property
    def layout(self) -> Layout:
        """The student's layout."""
        return self.recipe.student.parallel

    @property
    def precision(self) -> Precision:
        """Bytes of the student's states."""
        return Precision.of(self.recipe.student.dtype)

    @cached_property
    def states(self) -> float:
        """Weights, gradients and optimiser states of the fullest stage, of one process."""
        split = self.recipe.train.distributed_optimizer
        given = self.student, self.layout, self.recipe.world, self.precision
        unlike = distinct_stages(self.layout, self.student.layers)
        found = (states(*given, stage, split) for stage in unlike)
        return max(memory.weights + memory.gradients + memory.optimizer for memory in found)

    @cached_property
    def scorers(self) -> dict[str, tuple[ModelSize, Frozen]]:
        """Embedded models that score, by their key; offload moves nothing on a CPU."""
        models = self.recipe.embedded_scorers.items()
        return {key: (ModelSize.of(read_hf_config(model.hf)), model) for key, model in models}

    @cached_property
    def scorer_weights(self) -> float:
        """Their weights, of one process."""
        return sum(
            size.share(self._layout_of(size), 0).total * Precision.of(model.dtype).weight
            for size, model in self.scorers.values()
        )

    def _layout_of(self, size: ModelSize) -> Layout:
        return self.layout if size.experts else self.layout.without_experts

    @property
    def _is_whole(self) -> bool:
        axes = self.layout
        return axes.tp == axes.pp == axes.ep == axes.etp == 1

    @property
    def engine_weights(self) -> float:
        """The embedded engine's: none where the student is whole in each process, else all."""
        if self.recipe.rollout.engine != "hf" or self._is_whole or not self.recipe.is_distilling:
            return 0.0
        return self.student.parameters * self.precision.weight

    @property
    def rows(self) -> int:
        """Prompts that a process decodes at once, of a round or of an evaluation."""
        recipe = self.recipe
        most = recipe.train.prompts_per_round if recipe.is_distilling else 0
        if recipe.data.eval is not None:
            most = max(most, recipe.evaluate.problems * recipe.evaluate.samples)
        return min(recipe.rollout.batch_size, -(-most // recipe.world))

    @property
    def decoding(self) -> float:
        """While the embedded engine writes = packed + cache + drawing.

        packed = w x weights of fp32 products, where B <= 128 and they are large; cache = kv_bytes x
        B x (longest prompt + response); drawing = 40 B V: logits, log-probs and their sums.
        """
        recipe, size, rows = self.recipe, self.student, self.rows
        if recipe.rollout.engine != "hf" or not rows:
            return 0.0
        width = self.precision.weight
        longest = recipe.rollout.max_prompt_tokens + recipe.rollout.max_response_tokens
        mlp = size.shared_mlp if size.experts else size.mlp
        products = (size.layers * (size.attention + mlp) + size.vocabulary) * width
        is_packed = width == 4 and rows <= PACKED_ROWS and products >= PACKED_BYTES
        cache = kv_bytes(size, 1, width) * rows * longest
        return is_packed * products + cache + 40 * rows * size.vocab

    @property
    def micro_batch(self) -> float:
        """Tokens of the largest micro-batch: its budget, or all that a copy has in a step."""
        recipe, train = self.recipe, self.recipe.train
        copies = max(1, recipe.world // (self.layout.tp * self.layout.pp * self.layout.cp))
        longest = recipe.rollout.max_prompt_tokens + recipe.rollout.max_response_tokens
        own = -(-train.prompts_per_round // (train.minibatches * copies))
        return min(train.microbatch_tokens, own * longest)

    @property
    def learning(self) -> dict[str, float]:
        """While it trains: activations of the fullest stage, the LM head's logits and gradients.

        head = 4 V / tp x (rows + 2 h), rows = 512 at most: exponentials of one pass over the head
        (loss/linear_loss.py), its fp32 gradient, and that times the loss's own, or the embedding's
        where they are tied.
        """
        size, width, tokens = self.student, self.precision.weight, self.micro_batch
        given = size, self.layout, int(tokens), self.recipe.student.recompute
        unlike = distinct_stages(self.layout, size.layers)
        rows = min(HEAD_ROWS, tokens / self.layout.cp)
        return {
            "activations": max(max(activation_bytes(*given, stage, width)) for stage in unlike),
            "head": 4 * size.vocab / self.layout.tp * (rows + 2 * size.hidden),
        }

    @property
    def scoring(self) -> float:
        """While embedded models score = w x one layer's activations x tokens, of the largest."""
        layers = [
            _layer(size, self._layout_of(size), Precision.of(model.dtype).weight)
            for size, model in self.scorers.values()
        ]
        return max(layers, default=0.0) * self.micro_batch / self.layout.cp

    @property
    def saving(self) -> float:
        """While a checkpoint is planned = P (20 + 12 / dp), 0 where dp = 1.

        Megatron collects the distributed optimizer's fp32 weights and moments on every rank; a rank
        that has all of them leaves them where they are. Written by a fork, which shares them.
        """
        dp, _ = data_parallel(self.layout, self.recipe.world)
        if not self.recipe.checkpoint.every or not self.recipe.train.distributed_optimizer:
            return 0.0
        share = self.student.share(self.layout, 0).total
        return 0.0 if dp == 1 else share * (20 + 12 / dp)

    @property
    def phases(self) -> dict[str, float]:
        """Bytes of all processes here, by phase of the run.

        What lasts = states + embedded scorers + the engine's own weights; loading = what lasts +
        twice the embedding, which Megatron initialises first; exporting = what lasts + a file.
        """
        size, width = self.student, self.precision.weight
        table = size.vocabulary / self.layout.tp * 4
        found = {"loading": 2 * table}
        if self.decoding:
            found["generation"] = self.decoding
        if self.scorers:
            found["scoring"] = self.scoring
        found |= {"training": sum(self.learning.values()), "saving": self.saving}
        found["export"] = min(FILE_BYTES, size.parameters * width)
        lasting = self.states + self.scorer_weights + self.engine_weights
        services = self._services()
        return {
            name: FIRST + self.processes * (FORKED + lasting + extra) + services
            for name, extra in found.items()
        }

    def _services(self) -> float:
        """Return bytes of the teacher services that a run on this machine starts."""
        total = 0.0
        for key, count in self.recipe.service_processes.items():
            model, service = self.recipe.named_teachers[key], self.recipe.services[key]
            size, width = ModelSize.of(read_hf_config(model.hf)), Precision.of(model.dtype).weight
            own = size.share(service.parallel, 0).total * width
            own += _layer(size, service.parallel, width) * service.microbatch_tokens
            total += FIRST + count * (FORKED + own)
        return total

    @property
    def most(self) -> float:
        """Bytes of the phase that needs most."""
        return max(self.phases.values())


def _layer(size: ModelSize, layout: Layout, width: int) -> float:
    return attention_bytes(size, layout, width) + mlp_bytes(size, layout, width)
