"""A real model's answers to real prompts by vLLM: log-probs, new weights, and where they end."""

from real_model import LIMITS, STUDENT, check_pushes
from rig import Rig


def test_a_real_model_is_served(tmp_path):
    rig = Rig(STUDENT, tmp_path / "server", *LIMITS)

    def every_tensor_is_counted(trained):
        (found,) = rig.run(rig.server.checksums())
        assert found.keys() == {name for name, _ in trained.model.stream}

    try:
        rig.run(rig.server.wait_ready())
        check_pushes(rig, rig.engine("tensor"), every_tensor_is_counted)
    finally:
        rig.stop()
