"""A whole run of `recipes/demo_vllm.yaml`: the trainer's processes and a vLLM server it starts."""

from forked import started
from rig import RECIPE

from iwopd_megatron.records.runlog import read_metrics
from iwopd_megatron.runtime.services import outer_environment


def test_a_run_trains_on_what_vllm_writes(tmp_path):
    """Every update is proven, and the engine's log-probs are the trainer's."""
    out, log = tmp_path / "run", tmp_path / "log"
    words = [f"out={out}", "train.rounds=3", "train.warmup_rounds=1", "data.eval=null"]
    run = started("train", RECIPE, *words, env=outer_environment(), output=log)
    assert run.wait(900) == 0, log.read_text()[-3000:]
    rounds = [line for line in read_metrics(out) if line["kind"] == "round"]
    assert [line["round"] for line in rounds] == [1, 2, 3]
    assert max(line["drift"] for line in rounds) < 1e-5
