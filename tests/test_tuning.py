"""The table of environment variables."""

import pytest

from iwopd_megatron.config.models import Layout
from iwopd_megatron.launch import tuning


@pytest.mark.parametrize("gpu", tuning.GENERATION)
@pytest.mark.parametrize("layout", [None, Layout(), Layout(tp=2), Layout(pp=2), Layout(cp=2, ep=4)])
def test_tuning_rows_do_not_contradict(gpu, layout):
    names = [row.name for row in tuning.rows(gpu, layout)]
    assert len(names) == len(set(names))
    assert ("CUDA_DEVICE_MAX_CONNECTIONS" in names) == (layout is not None and gpu != "cpu")


@pytest.mark.parametrize(
    ("gpu", "layout", "connections"),
    [
        ("h100-80", Layout(tp=2), "1"), ("a100", Layout(cp=2), "1"), ("h100-80", Layout(ep=8), "8"),
        ("b200", Layout(tp=2), "32"),
    ],
)  # fmt: skip
def test_hardware_queues_follow_generation_and_layout(gpu, layout, connections):
    assert tuning.variables(gpu, layout)["CUDA_DEVICE_MAX_CONNECTIONS"] == connections
