"""YAML that a person wrote, as a tree: what cannot be read is one sentence with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from iwopd_megatron.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses a key written twice and keys that are not texts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"the key {key_node.value!r} is no word; quote it"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            if key in seen:
                problem = f"'{key}' is there twice; keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text; ValueError says what is wrong with it, and in which line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_problem(error)) from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"it has the character {error.character!r}, which no text has") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # e.g. the date 2026-13-45
        raise ValueError(" ".join(str(error).split())) from None


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "it cannot be read"
    if "\\t" in problem:
        problem = "there is a tab; write spaces instead"
    mark = error.problem_mark or error.context_mark
    return problem if mark is None else f"line {mark.line + 1}: {problem}"


def read_yaml(path: Path, what: str, remedy: str = "") -> dict[str, Any]:
    """Return the tree of a YAML file, {} if it is empty; RecipeError if it cannot be read.

    what: how sentences name it, e.g. recipe. remedy: what to write where there is no such file.
    """
    try:
        if not path.exists():
            raise RecipeError(f"{what} {path} does not exist{remedy and '; ' + remedy}.")
        if path.is_dir():
            raise RecipeError(f"{what} {path} is a folder; name a YAML file.")
        if not path.is_file():
            raise RecipeError(f"{what} {path} is no file; name a YAML file.")
        tree = parse_yaml(path.read_text("utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"{what} {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{what} {path} is not valid YAML: it is no UTF-8 text.") from None
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{what} {path} is not valid YAML: {error}.") from None
    if tree is not None and not isinstance(tree, dict):
        kind = "list" if isinstance(tree, list) else "single value"
        raise RecipeError(f"{what} {path} must hold 'key: value' lines, not a {kind}.")
    return tree or {}
