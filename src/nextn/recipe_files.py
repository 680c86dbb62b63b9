"""The recipes that ship with nextn, found by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nextn.config import ConfigError


@dataclass(frozen=True)
class RecipeFile:
    """A recipe that ships.

    what, source: what it sets, and where that was published, as the comments at its top say.
    """

    path: Path
    what: str
    source: str

    @property
    def name(self) -> str:
        return self.path.stem


def shipped_recipes() -> list[RecipeFile]:
    """All recipes that ship, by name."""
    return [
        RecipeFile(path, *(_stated(field, path.read_text(encoding="utf-8")) for field in ("What", "Source")))
        for path in sorted(_directory().glob("*.yaml"))
    ]


def recipe_path(name: str | Path) -> Path:
    """The recipe that a file or the name of a shipped recipe stands for; a file goes first.

    Raises:
        ConfigError: where there is neither.
    """
    path, shipped = Path(name), {recipe.name: recipe.path for recipe in shipped_recipes()}
    if path.is_file():
        return path
    if str(name) in shipped:
        return shipped[str(name)]
    if path.stem in shipped and path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"There is no file {name}; the recipe that ships is named {path.stem}.")
    raise ConfigError(f"There is no recipe {name}: give a YAML file, or one of {', '.join(shipped)}.")


def _directory() -> Path:
    """`nextn/recipes` where nextn is installed; `recipes/` in a checkout."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"


def _stated(field: str, text: str) -> str:
    found = re.search(rf"^# {field}: (.+)$", text, re.MULTILINE)
    return found[1] if found else ""
