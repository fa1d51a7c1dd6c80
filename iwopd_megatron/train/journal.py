"""A round's finished answers on disk, so that a run stopped halfway through a round keeps them.

Rollout servers cannot repeat their random draws; the embedded engine can and needs no journal.
"""

from __future__ import annotations

import base64
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.files.run_files import append_record, read_records
from iwopd_megatron.rollout.engine import Prompt

KEYS = {"index": int, "prompt_ids": list, "response_ids": list}


class Journal:
    """Files RUN/collected/round-N.jsonl, one answer a line. Written from any thread of rank 0."""

    def __init__(self, run: Path):
        self.folder = run / "collected"
        self._lock = threading.Lock()

    def _file(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:06d}.jsonl"

    def add(self, round_number: int, sample: Trajectory) -> None:
        """Append one finished answer to the round's file."""
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            append_record(self._file(round_number), _encoded(asdict(sample)))

    def read(self, round_number: int, prompts: list[Prompt]) -> dict[int, Trajectory]:
        """Return the round's answers by index, without those to other prompts than these."""
        file = self._file(round_number)
        if not file.is_file():
            return {}
        asked = {prompt.index: prompt.ids for prompt in prompts}
        kept = [Trajectory(**_decoded(line)) for line in read_records(file, KEYS)]
        return {s.index: s for s in kept if asked.get(s.index) == s.prompt_ids}

    def forget(self, round_number: int) -> None:
        """Remove this round's answers and those of rounds before it."""
        with self._lock:
            for file in self.folder.glob("round-*.jsonl"):
                if file.name <= self._file(round_number).name:
                    file.unlink(missing_ok=True)


def _encoded(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a trajectory's fields as JSON takes them, `experts` in base64."""
    if (experts := sample["experts"]) is None:
        return sample
    values = base64.b64encode(experts.tobytes()).decode()
    return sample | {
        "experts": {"dtype": str(experts.dtype), "shape": experts.shape, "values": values}
    }


def _decoded(line: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that `_encoded` was given."""
    if (experts := line.get("experts")) is None:
        return line
    flat = numpy.frombuffer(base64.b64decode(experts["values"]), experts["dtype"])
    return line | {"experts": flat.reshape(experts["shape"])}
