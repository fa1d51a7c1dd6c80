"""What a Megatron checkpoint holds, by its `.metadata`."""

import pickle
from pathlib import Path


def contents(checkpoint: Path) -> dict:
    """Name -> (shape, dtype), or None for an object.

    Without the common state, which Megatron 0.19 keeps here and those before it in common.pt.
    """
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    return {
        key: (tuple(item.size), item.properties.dtype) if hasattr(item, "size") else None
        for key, item in metadata.state_dict_metadata.items()
        if key != "common_state/shard_0_1"
    }
