"""The real Megatron-Bridge and ms-swift load what is written here, and what they save is read."""

import json

import pytest
from bridges import MODELS, PROGRAMS, run, write_hf
from record import TABLES, table
from safetensors.torch import load_file

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.rawfile import raw
from iwopd_megatron.weights.convert import hf_to_megatron, megatron_to_hf

# What Bridge's import decides for itself, and nothing is computed with.
FREE = {"hf_model_id", "make_vocab_size_divisible_by"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Every model: as HF folder, by us for them, by each of them, and our checkpoint exported."""
    place = tmp_path_factory.mktemp("bridges")
    jobs = {program: [] for program in PROGRAMS}
    for name in MODELS:
        hf = write_hf(place / f"{name}-hf", name)
        hf_to_megatron(hf, place / f"{name}-ours", "bridge")
        for program, todo in jobs.items():
            todo.append(["import", hf, place / f"{name}-{program}"])
            todo.append(["export", hf, place / f"{name}-ours", place / f"{name}-{program}-hf"])
        iteration = place / f"{name}-ours/iter_0000000"
        fields = ["fields", hf, iteration, place / f"{name}.json"]
        jobs["megatron-bridge"].append(fields)
    for program, todo in jobs.items():
        run(program, todo)
    return place


def assert_same(a, b):
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and raw(tensor) == raw(b[name]), name


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", MODELS)
def test_they_export_what_we_wrote(place, program, name):
    assert_same(place / f"{name}-{program}-hf", place / f"{name}-hf")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", MODELS)
def test_we_export_what_they_saved(place, program, name, tmp_path):
    root = place / f"{name}-{program}"
    with pytest.raises(RecipeError, match="carries no config.json .* add --hf FOLDER"):
        megatron_to_hf(root, tmp_path / "refused")
    (iteration,) = root.glob("iter_*")
    for source in (root, iteration):
        out = tmp_path / source.name
        megatron_to_hf(source, out, place / f"{name}-hf")
        assert_same(out, place / f"{name}-hf")


@pytest.mark.parametrize("name", MODELS)
def test_bridge_builds_its_own_model_of_our_run_config(place, name):
    found = json.loads((place / f"{name}.json").read_text())
    assert {key: value for key, value in found.items() if key not in FREE} == {}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", MODELS)
def test_the_recorded_tables_are_theirs(place, program, name):
    (iteration,) = (place / f"{name}-{program}").glob("iter_*")
    assert table(iteration) == json.loads(TABLES.read_text())[program][name]
