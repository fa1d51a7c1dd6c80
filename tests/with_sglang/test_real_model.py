"""A real model's answers to real prompts by SGLang: log-probs, new weights, and where they end."""

from real_model import LIMITS, STUDENT, check_pushes
from support import Rig


def test_a_real_model_is_served(tmp_path):
    with Rig(STUDENT, tmp_path / "server", 1, *LIMITS) as rig:
        check_pushes(rig, rig.engine("tensor", max_running=8), lambda trained: None)
