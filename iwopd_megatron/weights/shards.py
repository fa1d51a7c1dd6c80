"""Which tensors go to which safetensors file of a folder: as transformers' save_pretrained cuts."""

from __future__ import annotations

from collections.abc import Mapping

from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


def plan_shards(nbytes: Mapping[str, int]) -> StateDictSplit:
    """Split tensors, name -> bytes, in their order into files of at most SHARD_BYTES.

    A larger tensor gets a file of its own. One file is named model.safetensors, several
    model-00001-of-0000N.safetensors; `filename_to_tensors` is in the order of the files.
    """
    return split_state_dict_into_shards_factory(
        dict(nbytes),
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )


def index_content(split: StateDictSplit) -> dict[str, dict]:
    """Return what the index of several files says: total bytes, and the file of every tensor."""
    return {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
