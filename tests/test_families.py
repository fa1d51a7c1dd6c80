"""Every family of models through what every family must do."""

import os
import shutil
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from variants import VARIANTS
from worlds import run_world

from iwopd_megatron.batch.objective import DistillationObjective
from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.config.models import Layout
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.hf.families import FAMILIES
from iwopd_megatron.models.actor import Schedule
from iwopd_megatron.models.gpt import build_model, wrap_precision
from iwopd_megatron.models.optimizer import build_optimizer, wrap_data_parallel
from iwopd_megatron.parity import hf_reference, parity
from iwopd_megatron.runtime.local_world import local_context
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.weights import convert
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards
from iwopd_megatron.weights.table import mapped_parameters

UNEQUAL = [24, 16, 32, 20, 28, 12, 24, 32]
# Of dense and of MoE families: name: (processes, axes larger than one, dtype, recompute)
LAYOUTS = {
    "one process": (1, {}, "fp32", "none"),
    "dp2": (2, {}, "fp32", "none"),
    "tp2": (2, {"tp": 2}, "fp32", "none"),
    "pp2": (2, {"pp": 2}, "fp32", "none"),
    "uneven pp2": (2, {"pp": 2, "num_layers_in_first_pipeline_stage": 1}, "fp32", "none"),
    "cp2": (2, {"cp": 2}, "fp32", "selective"),
    "bf16 tp2": (2, {"tp": 2}, "bf16", "none"),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}, "fp32", "full"),
    "tp2 cp2": (4, {"tp": 2, "cp": 2}, "fp32", "none"),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}, "fp32", "full"),
}
OF_EXPERTS = {
    "cp2 ep2": (2, {"cp": 2, "ep": 2}, "fp32", "none"),
    "tp2 ep2": (2, {"tp": 2, "ep": 2}, "fp32", "none"),
    "tp2 etp2 ep2": (4, {"tp": 2, "etp": 2, "ep": 2}, "fp32", "full"),
    "cp2 ep4": (4, {"cp": 2, "ep": 4}, "fp32", "none"),
    "pp2 ep2": (4, {"pp": 2, "ep": 2}, "fp32", "selective"),
}
OF_DENSE = ["dp2", "tp2", "pp2", "cp2"]  # with experts others have these axes, and more
OF_VARIANTS = ["one process", "bf16 tp2", "pp2", "pp2 vpp2", "cp2 ep2", "tp2 ep2", "pp2 ep2"]
WALKED = [name for name in FAMILIES if name not in ("qwen3", "qwen3_moe")]  # test_parity's


def layouts(name):
    """Those of a family, or of a variant of one."""
    if name in VARIANTS:
        return {key: (LAYOUTS | OF_EXPERTS)[key] for key in OF_VARIANTS}
    if not FAMILIES[name].has_experts:
        return LAYOUTS
    return {key: row for key, row in LAYOUTS.items() if key not in OF_DENSE} | OF_EXPERTS


CASES = [(name, layout) for name in (*WALKED, *VARIANTS) for layout in layouts(name)]


def check_on_this_rank(cases, folders, references, queue):
    for case, (_, axes, dtype, recompute) in cases.items():
        reference = references[case[0], dtype]
        folder = folders[case[0]]
        result = parity.compare(folder, reference, Layout(**axes), 96, dtype, recompute)
        if os.environ["RANK"] == "0":
            queue.put((case, result, parity.failures(result, reference, dtype)))
    shutdown()


@pytest.fixture(scope="module")
def outcomes(family_folders):
    """Results of all cases, one world for each number of processes and each model."""
    references, found = {}, {}
    cases = {(name, layout): layouts(name)[layout] for name, layout in CASES}
    for (name, _), (_, _, dtype, _) in cases.items():
        if (name, dtype) not in references:
            sample = FAMILIES[name.split()[0]].sample
            samples = hf_reference.make_samples(512, UNEQUAL, sample["pad_token_id"])
            references[name, dtype] = hf_reference.compute_reference(
                family_folders[name], samples, dtype == "bf16"
            )
    for world, family in product((1, 2, 4), [*WALKED, *VARIANTS]):
        own = {x: row for x, row in cases.items() if (row[0], x[0]) == (world, family)}
        queue = local_context().SimpleQueue()
        run_world(world, check_on_this_rank, own, family_folders, references, queue)
        for _ in own:
            case, result, problems = queue.get()
            found[case] = result, problems
    return found


@pytest.mark.parametrize("name,layout", CASES)
def test_layout_agrees_with_hugging_face(name, layout, outcomes):
    result, problems = outcomes[name, layout]
    assert result["ranks"] == layouts(name)[layout][0]
    assert not problems, problems


def check_biases(folder):
    """Two steps of training; what is no parameter must have the bits of the folder."""
    parallel, hf, train = initialise(Layout(tp=2, ep=2)), read_hf_config(folder), hf_reference.TRAIN
    samples, stored = hf_reference.make_samples(512, UNEQUAL), HfTensors(folder)
    for dtype in ("fp32", "bf16"):
        chunks = build_model(hf, parallel, dtype)
        load_shards(chunks, stored, hf, parallel)
        wrapped = wrap_data_parallel(wrap_precision(chunks), train)
        optimizer, schedule = build_optimizer(wrapped, train), Schedule(wrapped, parallel)
        batches, length = Packer(parallel, 96)(samples, hf_reference.LOSS.aggregation)
        for _ in range(2):
            objective = DistillationObjective(hf_reference.LOSS, parallel.cp.group)
            schedule.accumulate(optimizer, batches, length, objective)
            optimizer.step()
        kept = [x for chunk in chunks for x in mapped_parameters(chunk, hf) if not x.is_trained]
        assert len(kept) == 3  # of the layers with experts
        for one in kept:
            assert one.parameter.dtype == torch.float32
            assert torch.equal(one.parameter, stored[one.hf_names[0]][:]), one.name
    shutdown()


def test_biases_that_choose_experts_are_not_trained(family_folders):
    """Megatron moves them after every step unless it is told not to."""
    run_world(2, check_biases, family_folders["glm4_moe"])


def with_layer_after_last(folder, out):
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.4.eh_proj.weight"] = torch.ones(64, 128)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_a_layer_that_predicts_ahead_is_read_past(family_folders, tmp_path):
    """It is in no checkpoint, and in no folder that is written of one."""
    source = with_layer_after_last(family_folders["glm4_moe"], tmp_path / "with")
    convert.hf_to_megatron(source, tmp_path / "megatron")
    convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back", source)
    assert set(HfTensors(tmp_path / "back")) == set(HfTensors(family_folders["glm4_moe"]))
    other = with_layer_after_last(family_folders["qwen3_moe"], tmp_path / "other")
    with pytest.raises(RecipeError, match="eh_proj.weight', which its config.json does not imply"):
        convert.hf_to_megatron(other, tmp_path / "none")
