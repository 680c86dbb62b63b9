"""Recipes ship in the package and are found by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nextn.cli import app
from nextn.config import ConfigError
from nextn.recipe import Recipe
from nextn.recipe_files import recipe_path, shipped_recipes

ROOT = Path(__file__).parents[1]
NAMES = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


def test_train_lists_every_recipe_with_what_and_source():
    done = CliRunner().invoke(app, ["train", "--list"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert {recipe.name for recipe in shipped_recipes()} == NAMES and len(NAMES) > 5
    for recipe in shipped_recipes():
        assert recipe.what and recipe.source, f"{recipe.name} begins with '# What: …' and '# Source: …'"
        (line,) = (line for line in done.output.splitlines() if f" {recipe.name} " in line)
        assert recipe.what in line and recipe.source in line


def test_a_name_is_a_shipped_recipe_unless_a_file_has_it(tmp_path, monkeypatch):
    given = {"data": ["text.txt"]}
    by_name, by_path = Recipe.read("gloeckle-bytes", given), Recipe.read(ROOT / "recipes/gloeckle-bytes.yaml", given)
    assert by_name == by_path
    monkeypatch.chdir(tmp_path)
    Path("medusa-1").mkdir()  # such as the output of a training by that recipe
    assert recipe_path("medusa-1").parent.name == "recipes"
    Path("eagle3").write_text("length: 7\n")
    assert recipe_path("eagle3").read_text() == "length: 7\n"
    with pytest.raises(ConfigError, match=r"There is no recipe eagle4: give a YAML file, or one of .*eagle3"):
        recipe_path("eagle4")
    with pytest.raises(ConfigError, match="the recipe that ships is named fastmtp"):
        recipe_path("recipes/fastmtp.yaml")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What a build reads, apart from the checkout, into which setuptools would write."""
    pytest.importorskip("setuptools", "77")
    directory = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return directory


def build(source: Path, kind: str, out: Path) -> Path:
    """Build by the hook that pip calls; returns the archive."""
    command = f"import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", command], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


def test_the_wheel_holds_all_modules_heads_and_recipes(source, tmp_path):
    names = set(zipfile.ZipFile(build(source, "wheel", tmp_path)).namelist())
    package = source / "src"
    files = [*package.rglob("*.py"), *(file for file in package.glob("nextn/shipped/**/*") if file.is_file())]
    assert {file.relative_to(package).as_posix() for file in files} <= names
    assert {f"nextn/recipes/{name}.yaml" for name in NAMES} <= names


def test_an_installed_and_an_editable_nextn_find_recipes(source, tmp_path):
    code = (  # without nextn/__init__.py, which imports torch
        "import importlib.util; spec = importlib.util.find_spec('nextn');"
        "sys.modules['nextn'] = package = type(sys)('nextn'); package.__path__ = spec.submodule_search_locations;"
        "from nextn.recipe_files import shipped_recipes as s; print(s()[0].path.parent, *(r.name for r in s()))"
    )
    others = [path for path in sys.path[1:] if not Path(path, "nextn").is_dir()]
    for kind, where in (("wheel", tmp_path / "wheel/nextn/recipes"), ("editable", source / "recipes")):
        zipfile.ZipFile(build(source, kind, tmp_path)).extractall(tmp_path / kind)
        # -S, and no .pth of this environment, which may have another nextn
        paths = f"import site, sys; site.addsitedir({str(tmp_path / kind)!r}); sys.path += {others}"
        done = subprocess.run([sys.executable, "-S", "-c", f"{paths}; {code}"], env={}, capture_output=True, text=True)
        assert done.stdout.split() == [str(where), *sorted(NAMES)], done.stderr
