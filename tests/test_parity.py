"""Every layout against Hugging Face on every rank: logits, loss, gradients, optimiser step.

Many layouts run inside one forked world: starting processes costs more than the checks.
"""

import os

import pytest
from worlds import run_world

from iwopd_megatron.config.models import Layout
from iwopd_megatron.parity import hf_reference, parity
from iwopd_megatron.runtime.local_world import local_context
from iwopd_megatron.runtime.parallel import shutdown

# Pipelines of stages with unequally many of the models' 4 layers, some with none.
COUNTED = {
    "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True,
}  # fmt: skip
FIRST, LAST = (f"num_layers_in_{which}_pipeline_stage" for which in ("first", "last"))
STRING = "pipeline_model_parallel_layout"
UNEQUAL, EQUAL = [24, 16, 32, 20, 28, 12, 24, 32], [32] * 8
# name: (processes, model, lengths, micro-batch tokens, axes larger than one, dtype, recompute)
CASES = {
    "one process": (1, "moe", UNEQUAL, 96, {}, "fp32", "none"),
    "unpacked": (1, "moe", EQUAL, 32, {}, "fp32", "none"),
    "probabilities not renormalised": (1, "moe_no_norm", UNEQUAL, 96, {}, "fp32", "none"),
    "dense untied": (1, "dense", UNEQUAL, 96, {}, "fp32", "none"),
    "dense tied": (1, "tied", UNEQUAL, 96, {}, "fp32", "none"),
    "dp2": (2, "moe", UNEQUAL, 96, {}, "fp32", "none"),
    "tp2": (2, "moe", UNEQUAL, 96, {"tp": 2}, "fp32", "none"),
    "tp2 etp2": (2, "moe", UNEQUAL, 96, {"tp": 2, "etp": 2}, "fp32", "none"),
    "pp2": (2, "moe", UNEQUAL, 96, {"pp": 2}, "fp32", "none"),
    "pp2 vpp2": (2, "moe", UNEQUAL, 40, {"pp": 2, "vpp": 2}, "fp32", "none"),
    "ep2": (2, "moe", UNEQUAL, 96, {"ep": 2}, "fp32", "none"),
    "ep2 unpacked, not renormalised": (2, "moe_no_norm", EQUAL, 32, {"ep": 2}, "fp32", "none"),
    "tp2 ep2": (2, "moe", UNEQUAL, 96, {"tp": 2, "ep": 2}, "fp32", "none"),
    "tp2 ep2 full recompute": (2, "moe", UNEQUAL, 96, {"tp": 2, "ep": 2}, "fp32", "full"),
    "ep2 selective recompute": (2, "moe", UNEQUAL, 96, {"ep": 2}, "fp32", "selective"),
    "cp2 packed unequal": (2, "moe", UNEQUAL, 96, {"cp": 2}, "fp32", "none"),
    "cp2 packed equal": (2, "moe", EQUAL, 64, {"cp": 2}, "fp32", "none"),
    "cp2 unpacked": (2, "moe", EQUAL, 32, {"cp": 2}, "fp32", "none"),
    "dense tp2": (2, "dense", UNEQUAL, 96, {"tp": 2}, "fp32", "none"),
    "dense cp2 selective recompute": (2, "dense", UNEQUAL, 96, {"cp": 2}, "fp32", "selective"),
    "tied tp2": (2, "tied", UNEQUAL, 96, {"tp": 2}, "fp32", "none"),
    "tied pp2": (2, "tied", UNEQUAL, 96, {"pp": 2}, "fp32", "none"),
    "linear rotary scaling": (1, "linear", UNEQUAL, 96, {}, "fp32", "none"),
    "llama3 rotary scaling tp2": (2, "llama3", UNEQUAL, 96, {"tp": 2}, "fp32", "none"),
    "yarn tp2": (2, "yarn", UNEQUAL, 96, {"tp": 2}, "fp32", "none"),
    "yarn cp2 packed unequal": (2, "yarn", UNEQUAL, 96, {"cp": 2}, "fp32", "none"),
    "bf16 tp2 ep2": (2, "moe", UNEQUAL, 96, {"tp": 2, "ep": 2}, "bf16", "none"),
    "bf16 pp2": (2, "moe", UNEQUAL, 96, {"pp": 2}, "bf16", "none"),
    "dp2 tp2": (4, "moe", UNEQUAL, 96, {"tp": 2}, "fp32", "none"),
    "dp2 tp2 ep2": (4, "moe", UNEQUAL, 96, {"tp": 2, "ep": 2}, "fp32", "none"),
    "tp2 pp2 ep2": (4, "moe", UNEQUAL, 96, {"tp": 2, "pp": 2, "ep": 2}, "fp32", "none"),
    "tp2 pp2 vpp2 ep2": (4, "moe", UNEQUAL, 40, {"tp": 2, "pp": 2, "vpp": 2, "ep": 2}, "fp32",
                         "none"),
    "tp2 cp2 ep4": (4, "moe", UNEQUAL, 96, {"tp": 2, "cp": 2, "ep": 4}, "fp32", "none"),
    "pp2 cp2 ep2": (4, "moe", UNEQUAL, 96, {"pp": 2, "cp": 2, "ep": 2}, "fp32", "none"),
    "etp2 ep2": (4, "moe", UNEQUAL, 96, {"etp": 2, "ep": 2}, "fp32", "none"),
    "tp2 etp2 ep2": (4, "moe", UNEQUAL, 96, {"tp": 2, "etp": 2, "ep": 2}, "fp32", "none"),
    "cp4": (4, "moe", UNEQUAL, 96, {"cp": 4}, "fp32", "none"),
    "tied tp2 pp2": (4, "tied", UNEQUAL, 96, {"tp": 2, "pp": 2}, "fp32", "none"),
    "pp2: 1, 3": (2, "moe", UNEQUAL, 96, {"pp": 2, FIRST: 1}, "fp32", "none"),
    "pp2: 3, 1, full recompute": (2, "moe", UNEQUAL, 96, {"pp": 2, LAST: 1}, "fp32", "full"),
    "dense pp2: E, 4": (2, "dense", UNEQUAL, 96, {"pp": 2, STRING: "E|t*4L"}, "fp32", "none"),
    "pp2: 4, L": (2, "moe", UNEQUAL, 96, {"pp": 2, STRING: "Et*4|L"}, "fp32", "none"),
    "pp2 vpp2: E 3, 1 L": (2, "moe", UNEQUAL, 40, {"pp": 2, "vpp": 2, STRING: "E|t|t*3|L"}, "fp32",
                           "none"),
    "pp2 vpp3, counted": (2, "moe", UNEQUAL, 40, {"pp": 2, "vpp": 3, **COUNTED}, "fp32", "full"),
    "tied pp2 vpp3, counted": (2, "tied", UNEQUAL, 40, {"pp": 2, "vpp": 3, **COUNTED}, "fp32",
                               "none"),
    "bf16 pp2: E, 4": (2, "moe", UNEQUAL, 96, {"pp": 2, STRING: "E|t*4L"}, "bf16", "none"),
    "pp3, counted": (3, "moe", UNEQUAL, 96, {"pp": 3, **COUNTED}, "fp32", "selective"),
    "pp2 ep2: 1, 3": (4, "moe", UNEQUAL, 96, {"pp": 2, "ep": 2, FIRST: 1}, "fp32", "none"),
    "tp2 pp2 vpp2 ep2: 2 1, 1 L": (4, "moe", UNEQUAL, 40, {"tp": 2, "pp": 2, "vpp": 2, "ep": 2,
                                   STRING: "Ett|t|t|L"}, "fp32", "none"),
    "tied tp2 pp2: 4, L": (4, "tied", UNEQUAL, 96, {"tp": 2, "pp": 2, STRING: "Et*4|L"}, "fp32",
                           "none"),
}  # fmt: skip


def check_on_this_rank(cases, folders, references, queue):
    for name, (_, model, lengths, budget, axes, dtype, recompute) in cases.items():
        reference = references[model, tuple(lengths), dtype]
        result = parity.compare(folders[model], reference, Layout(**axes), budget, dtype, recompute)
        if os.environ["RANK"] == "0":
            queue.put((name, result, parity.failures(result, reference, dtype)))
    shutdown()


@pytest.fixture(scope="module")
def folders(moe_folder, moe_no_norm_folder, dense_folder, tied_folder, rotary_folders):
    return rotary_folders | dict(
        moe=moe_folder, moe_no_norm=moe_no_norm_folder, dense=dense_folder, tied=tied_folder
    )


@pytest.fixture(scope="module")
def outcomes(folders):
    """Results of all cases, one world for each number of processes."""
    references = {}
    for _, model, lengths, _, _, dtype, _ in CASES.values():
        key = model, tuple(lengths), dtype
        if key not in references:
            samples = hf_reference.make_samples(512, lengths, pad_id=300)
            references[key] = hf_reference.compute_reference(
                folders[model], samples, dtype == "bf16"
            )
    found = {}
    for world in sorted({case[0] for case in CASES.values()}):
        cases = {name: case for name, case in CASES.items() if case[0] == world}
        queue = local_context().SimpleQueue()
        run_world(world, check_on_this_rank, cases, folders, references, queue)
        for _ in cases:
            name, result, problems = queue.get()
            found[name] = result, problems
    return found


@pytest.mark.parametrize("name", CASES)
def test_layout_agrees_with_hugging_face(name, outcomes):
    result, problems = outcomes[name]
    assert result["ranks"] == CASES[name][0]
    assert not problems, problems
