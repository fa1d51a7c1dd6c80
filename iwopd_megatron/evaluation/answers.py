"""A benchmark's answers on disk: one JSON line each as it ends, so that a killed run goes on.

answers.jsonl grows while the engine writes; samples.jsonl, with grades and in order, appears when
all are there.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iwopd_megatron.batch.trajectory import Trajectory
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.run_files import append_record, read_records, write_whole

ANSWER = {"problem": int, "sample": int, "response": str, "tokens": int, "truncated": bool}
GRADED: Mapping[str, type | tuple[type, ...]] = {
    "problem": int,
    "sample": int,
    "correct": (int, float),
}
Place = tuple[int, int]  # problem and sample, counted from 0


class Answers:
    """The folder of one benchmark; `found` has the answers that are there, by their place."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        """Open or make it. settings: what answers depend on; RecipeError if it holds others."""
        self.folder = folder
        self.file, self.final = folder / "answers.jsonl", folder / "samples.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._check(settings)
        self.found: dict[Place, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._load()

    def _check(self, settings: dict[str, Any]) -> None:
        file = self.folder / "settings.json"
        if file.is_file():
            before = json.loads(file.read_text())
            for key in settings:
                if before.get(key) != settings[key]:
                    raise RecipeError(
                        f"{self.folder} holds answers with {key}={before.get(key)}, now it is "
                        f"{settings[key]}; choose another --out, or delete that folder."
                    )
        else:
            write_whole(file, json.dumps(settings, indent=2) + "\n")

    def _load(self) -> None:
        """Read the answers that are there; a line torn by a kill is left out."""
        if not self.file.is_file():
            return
        for answer in read_records(self.file, ANSWER):
            self.found[answer["problem"], answer["sample"]] = answer

    def add(self, place: Place, sample: Trajectory, text: str) -> None:
        """Write an answer down, unless its place has one. Usable from any thread."""
        answer = {
            "problem": place[0],
            "sample": place[1],
            "response": text,
            "tokens": len(sample.response_ids),
            "truncated": sample.truncated,
        }
        with self._lock:
            if place in self.found:
                return
            append_record(self.file, answer)
            self.found[place] = answer

    def finish(self, lines: list[dict[str, Any]]) -> None:
        """Write samples.jsonl, whole or not at all."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(self.final, text)

    def finished(self) -> list[dict[str, Any]] | None:
        """Return the lines of samples.jsonl, None before there is one."""
        if not self.final.is_file():
            return None
        return read_records(self.final, GRADED)
