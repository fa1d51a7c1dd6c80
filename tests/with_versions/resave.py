"""Load a checkpoint into a layout and save it again: resave.py MODEL SAVED|- OUT JSON_LAYOUT.

"-" instead of a checkpoint: Hugging Face weights after one optimiser step, so that moments differ.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parents[1]))

from worlds import run_world

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.recipe import Train
from iwopd_megatron.hf.config import read_hf_config
from iwopd_megatron.models.gpt import build_model
from iwopd_megatron.models.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from iwopd_megatron.runtime.parallel import initialise
from iwopd_megatron.train import checkpoint
from iwopd_megatron.train.saver import Saver
from iwopd_megatron.weights.hf_reader import HfTensors, load_shards


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor, whole: weights, the optimiser's fp32 weights and both moments."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in metadata.items()
        if hasattr(item, "size")
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def resave(model: Path, saved: Path | None, out: Path, layout: Layout) -> None:
    parallel, hf, train = initialise(layout), read_hf_config(model), Train(lr=1e-3, rounds=4)
    chunks = build_model(hf, parallel)
    if saved is None:
        load_shards(chunks, HfTensors(model), hf, parallel)
    wrapped = wrap_data_parallel(chunks, train)
    optimizer = build_optimizer(wrapped, train)
    scheduler = build_scheduler(optimizer, train)
    extra = {"round": 1, "world": parallel.world, "kept": ["as", ("it", 2.5)]}
    if saved is not None:
        extra = checkpoint.load(saved, wrapped, optimizer, scheduler, parallel)
    else:
        generator = torch.Generator().manual_seed(1)
        for chunk in wrapped:
            for parameter in chunk.parameters():
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()
    saver = Saver(out, 1, True, parallel)
    checkpoint.save(saver, wrapped, optimizer, scheduler, extra, parallel)
    saver.finish()


if __name__ == "__main__":
    model, saved, out, layout = sys.argv[1:]
    axes = Layout(**json.loads(layout))
    source = None if saved == "-" else Path(saved)
    run_world(axes.unit, resave, Path(model), source, Path(out), axes)
