"""A benchmark's answers as they are written: one JSON line each, so that a killed run goes on.

answers.jsonl grows while the engine writes; samples.jsonl, with grades and in order, appears when
all are there.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import RecipeError
from iwopd_megatron.trajectory import Trajectory

Place = tuple[int, int]  # problem, sample


class Answers:
    """The folder of one benchmark; `settings` says what its answers depend on."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
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
        """Read what is there; a line torn by a kill is cut off."""
        if not self.file.is_file():
            return
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.file, len(whole))
        for line in whole.decode().split("\n")[:-1]:
            answer = json.loads(line)
            self.found[answer["problem"], answer["sample"]] = answer

    def add(self, place: Place, sample: Trajectory, text: str) -> None:
        """Keep an answer, unless it is known already. Any thread."""
        answer = {
            "problem": place[0], "sample": place[1], "response": text,
            "tokens": len(sample.response_ids), "truncated": sample.truncated,
        }  # fmt: skip
        with self._lock:
            if place in self.found:
                return
            self.found[place] = answer
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")

    def finish(self, lines: list[dict[str, Any]]) -> None:
        """Write samples.jsonl."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(self.final, text)

    def finished(self) -> list[dict[str, Any]] | None:
        """What `finish` was given, if it was reached."""
        if not self.final.is_file():
            return None
        return [json.loads(line) for line in self.final.read_text("utf-8").split("\n")[:-1]]


def write_whole(path: Path, text: str) -> None:
    """Write a file that is complete or not there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
