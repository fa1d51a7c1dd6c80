"""What mkdocs.yml calls while it builds: pages made from the code, formulas, and the last check.

A page is made from the recipe's models, from typer's commands, from docstrings, or from a Markdown
file elsewhere in the repository, so that nothing is written twice.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import commands  # noqa: E402
import offline  # noqa: E402
import recipe_keys  # noqa: E402

PACKAGE = ROOT / "iwopd_megatron"
# Pages that are Markdown files elsewhere, and where their relative links lead.
INCLUDED = {
    "results.md": ROOT / "bench" / "RESULTS.md",
    "architecture.md": PACKAGE / "README.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "changes.md": ROOT / "CHANGELOG.md",
}
WITH_FORMULAS = ("method.md", "howto/weighting.md")  # between dollars, in a line
NOT_FORMULAS = ("__init__", "picture", "text")  # of the planner's files


def on_config(config: Any) -> Any:
    """Register ```math fences; MathML is what browsers draw without a script."""
    fence = {"name": "math", "class": "math", "format": _formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and the pictures that included pages show."""
    made = {name: _included(file) for name, file in INCLUDED.items()}
    made |= {
        "reference/recipe.md": _recipe_page(),
        "reference/profile.md": _profile_page(),
        "reference/commands.md": _text("reference_commands") + commands.page(),
        "reference/python.md": _python_page(),
        "reference/planner.md": _planner_page(),
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    for picture in sorted((ROOT / "bench" / "figures").glob("*.png")):
        place = f"figures/{picture.name}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn $...$ of the pages that have formulas into MathML."""
    if page.file.src_uri not in WITH_FORMULAS:
        return markdown
    return re.sub(r"\$([^$`\n]+)\$", lambda match: convert(match[1]), markdown)


def on_post_build(config: Any) -> None:
    """Refuse a site that would fetch anything from elsewhere."""
    found = offline.fetched(Path(config.site_dir))
    if found:
        raise PluginError("the site would fetch from elsewhere: " + "; ".join(found[:10]))


def _formula(source: str, *_: Any, **__: Any) -> str:
    """Return a block of MathML, a line of LaTeX each."""
    lines = [line for line in source.splitlines() if line.strip()]
    return "\n".join(f'<p class="formula">{convert(line, display="block")}</p>' for line in lines)


def _included(file: Path) -> str:
    """Return a Markdown file with links that hold in the site, or lead to a name without a link."""
    text = file.read_text(encoding="utf-8")
    places = {str(other.relative_to(ROOT)): name for name, other in INCLUDED.items()}

    def replaced(match: re.Match[str]) -> str:
        bang, words, target = match.groups()
        if target.startswith(("http", "#")):
            return match[0]
        path, hash_, anchor = target.partition("#")
        full = (file.parent / path).resolve()
        inside = str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else path
        if inside in places:
            return f"{bang}[{words}]({places[inside]}{hash_}{anchor})"
        if inside.startswith("docs/"):
            return f"{bang}[{words}]({inside.removeprefix('docs/')}{hash_}{anchor})"
        if full.suffix == ".png":
            return f"{bang}[{words}](figures/{full.name})"
        return f"{words} (`{inside}`)" if words.strip("`") != inside else f"`{inside}`"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replaced, text)


def _text(name: str) -> str:
    """Return the hand-written beginning of a made page."""
    return (Path(__file__).parent / f"{name}.md").read_text(encoding="utf-8")


def _recipe_page() -> str:
    from iwopd_megatron.config.recipe import Recipe

    return _text("reference_recipe") + recipe_keys.page(Recipe)


def _profile_page() -> str:
    from iwopd_megatron.launch.profile import Profile

    return _text("reference_profile") + recipe_keys.page(Profile)


def _python_page() -> str:
    """Return the functions of the loss room, then what the doors of loss and weights hold."""
    parts = [_text("reference_python"), "\n## iwopd_megatron.loss\n"]
    doors = _exported("loss")
    files = {file.stem for file in (PACKAGE / "loss").glob("*.py")}
    parts += [_entry(f"iwopd_megatron.loss.{name}") for name in doors if name not in files]
    modules = [f"iwopd_megatron.loss.{name}" for name in doors if name in files]
    modules += [f"iwopd_megatron.weights.{name}" for name in _exported("weights")]
    parts += [f"\n## {module}\n\n{_entry(module, heading=False)}" for module in modules]
    return "\n".join(parts)


def _planner_page() -> str:
    """Return the planner's files with their functions, the formulas in their docstrings."""
    parts = [_text("reference_planner")]
    for file in sorted((PACKAGE / "plan").glob("*.py")):
        if file.stem not in NOT_FORMULAS:
            module = f"iwopd_megatron.plan.{file.stem}"
            entry = _entry(module, heading=False, source=True)
            parts.append(f"\n## {module}\n\n{entry}")
    return "\n".join(parts)


def _entry(name: str, heading: bool = True, source: bool = False) -> str:
    """Return what mkdocstrings replaces by docstrings, with their code where `source`."""
    options = {"show_root_heading": heading, "show_source": source}
    lines = [f"      {key}: {str(value).lower()}" for key, value in options.items()]
    return "\n".join(["", f"::: {name}", "    options:", *lines, ""])


def _exported(room: str) -> list[str]:
    """Read a room's `__all__` without importing it."""
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise PluginError(f"room {room} has no __all__")
