"""A model folder after a round trip through a Megatron checkpoint, for engines to serve."""

from pathlib import Path

from iwopd_megatron.convert import hf_to_megatron, megatron_to_hf


def round_trip(source: Path, work: Path) -> Path:
    """Convert `source` and export it again; the exported folder, below `work`."""
    checkpoint, folder = work / "checkpoint", work / "exported"
    hf_to_megatron(source, checkpoint)
    megatron_to_hf(checkpoint, folder, source)
    return folder
