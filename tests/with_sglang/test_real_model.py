"""A real model's answers to real prompts by SGLang: log-probs, new weights, and where they end."""

from real_model import END, LIMITS, STUDENT, TOKENS, Trained, check_answers, real_prompts
from support import Rig

from iwopd_megatron.rollout.engine import Sampling


def test_a_real_model_is_served(tmp_path):
    prompts = real_prompts(8)
    with Rig(STUDENT, tmp_path / "server", 1, *LIMITS) as rig:
        engine = rig.engine("tensor", max_running=8)
        trained = Trained(rig.recipe)
        engine.canary = trained.canary(prompts[0].ids)
        for version in range(2):
            engine.update(trained.model.stream, version)
            assert rig.controller.proven == version
            samples = engine.generate(prompts, Sampling(TOKENS))
            check_answers(samples, version)
            drift = trained.differences(samples)
            print(f"drift of {len(drift)} tokens: mean {drift.mean():.1e}, max {drift.max():.1e}")
            assert drift.mean() < 3e-5 and drift.max() < 2e-4
            if version == 0:
                trained.move()
                assert trained.differences(samples).mean() > 0.05  # they were the old weights'
        assert any(sample.response_ids[-1] == END for sample in samples)
