"""Whatever is changed in a good model folder: it runs and agrees with transformers, or it is
refused in one sentence (exit code 2) before anything starts.

FUZZ_CASES sets the number of cases for every kind of change; each is drawn anew every run.
"""

import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from mutations import CHANGES
from scaled_folders import FP8_CONFIG, write_scaled
from worlds import run_world

from iwopd_megatron.batch.packing import Packer
from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.config.load import load_recipe
from iwopd_megatron.config.models import Frozen, Layout
from iwopd_megatron.data.before_start import check_before_start
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.parity.hf_reference import hf_model
from iwopd_megatron.parity.rehearse import write_model
from iwopd_megatron.rollout.decoder import Decoder
from iwopd_megatron.runtime.local_world import local_context
from iwopd_megatron.runtime.parallel import initialise, shutdown
from iwopd_megatron.teacher.embedded import EmbeddedScorer
from iwopd_megatron.weights.hf_reader import whole_tensors

ROOT = Path(__file__).parents[2]
CASES = int(os.environ.get("FUZZ_CASES", "40"))
SHAPE = dict(
    vocab_size=16,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    pad_token_id=0,
    eos_token_id=1,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
MODELS = {
    "moe": EXPERTS, "dense": {"tie_word_embeddings": False}, "tied": {"tie_word_embeddings": True},
}  # fmt: skip
SAMPLE = Trajectory(0, [3, 4, 5, 6], [7, 8, 0, 9, 10, 2, 1])
LIMIT = 5e-3  # nats; what half-precision weights and other kernels differ by is far below


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Good folders by name."""
    place = tmp_path_factory.mktemp("bases")
    for name, change in MODELS.items():
        write_model(place / name, SHAPE | change)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(ROOT / "recipes/demo/student" / file, place / name)
    scaling = FP8_CONFIG | {"weight_block_size": [8, 8]}
    write_scaled(place / "moe", place / "fp8", place / "twin", (8, 8), scaling)
    return {name: place / name for name in (*MODELS, "fp8")}


def accepted(folder):
    """Whether a run of this model would start; what is refused is refused as it must be."""
    overrides = [
        f"student.hf={folder}",
        f"teacher.hf={folder}",
        "rollout.max_response_tokens=16",
        "student.parallel={}",
        "processes=1",
        f"out={folder}/run",
    ]
    try:
        check_before_start([load_recipe(ROOT / "recipes/demo_tiny_moe.yaml", overrides)])
    except RecipeError as error:
        text = str(error)
        assert "\n" not in text and text.endswith(".") and len(text) < 900, text
        assert str(folder) in text or "the toy" in text or "teacher" in text, text
        return False
    return True


def reference(folder):
    """transformers' log-probs of the sample's response, and its logits after the last token."""
    model = hf_model(folder, torch.float32)
    ids = torch.tensor([SAMPLE.prompt_ids + SAMPLE.response_ids])
    with torch.no_grad():
        logits = model(ids).logits[0]
    logp = logits[len(SAMPLE.prompt_ids) - 1 : -1].log_softmax(-1)
    return logp.gather(-1, ids[0, len(SAMPLE.prompt_ids) :, None])[:, 0], logits[-1]


def check_agrees(folder, parallel):
    expected, last = reference(folder)
    (scores,), _ = EmbeddedScorer(Frozen(hf=folder), Packer(parallel, 64), 1.0).score_samples(
        [SAMPLE]
    )
    assert (torch.tensor(scores) - expected).abs().max() < LIMIT
    decoder = Decoder(read_hf_config(folder), torch.float32, torch.device("cpu"))
    for name, tensor in whole_tensors(folder):
        decoder.weights[name].copy_(tensor)
    ids = torch.tensor([SAMPLE.prompt_ids + SAMPLE.response_ids])
    cache = decoder.new_cache(1, ids.shape[1])
    logits = decoder(ids, torch.arange(ids.shape[1])[None], cache, 0, None)[0]
    assert (logits.log_softmax(-1) - last.log_softmax(-1)).abs().max() < LIMIT


def fuzz(bases, kind, counts):
    parallel = initialise(Layout())
    warnings.simplefilter("ignore")
    os.chdir(ROOT)

    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(base=st.sampled_from(sorted(bases)), change=CHANGES[kind])
    def one(base, change):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            shutil.copytree(bases[base], folder)
            change(folder)
            note(f"{base}, changed: {kind}")
            runs = accepted(folder)
            assert not (folder / "run").exists()
            with torch.no_grad():
                if runs:
                    check_agrees(folder, parallel)
            counts.put((kind, runs))

    one()
    shutdown()


@pytest.mark.parametrize("kind", CHANGES)
def test_one_change(bases, kind):
    counts = local_context().Queue()
    run_world(1, fuzz, bases, kind, counts, limit=1200)
    found = [counts.get(timeout=5) for _ in range(counts.qsize())]
    print(f"{kind}: {len(found)} cases, {sum(runs for _, runs in found)} ran and agreed")
