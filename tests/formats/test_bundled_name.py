"""nextn's own name for the bundled model stands wherever nextn opens a model; a tiny one takes its place here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import nextn
from conftest import KINDS, made_up_text
from nextn.cli import app
from nextn.formats import native
from nextn.formats.bundled import NAME

SMALL = ("--length", 64, "--batch", 4, "--vocabulary", 32, "--epochs", 0.2)
RECIPE = "heads: {n: 3, recurrent: true}\nlength: 64\ntraining: {max_steps: 2, report_to: none}\n"


@pytest.fixture
def bundled(tiny_base, tmp_path, monkeypatch) -> Path:
    """Where the bundled model is, with heads that ship for it."""
    monkeypatch.setenv("NEXTN_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "cache" / NAME
    shutil.copytree(tiny_base, directory)
    (directory / "sha256.json").write_text("{}")
    config, text = nextn.MultiTokenConfig(n=4, **KINDS["recurrent"]), {"input_ids": made_up_text(8, 48, seed=999)}
    model = nextn.attach(nextn.load_base(NAME), config, calibration=text)
    native.save_heads(model, tmp_path / "shipped", tokenizer=nextn.load_tokenizer(NAME))
    monkeypatch.setattr(native, "shipped_heads", lambda: tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    return directory


@pytest.fixture
def files(bundled, tmp_path) -> dict[str, str]:
    texts = {
        "DATA": json.dumps({"text": "the cat sat on the mat. " * 12}) + "\n",
        "PROMPTS": json.dumps({"prompt": "the cat", "category": "chat"}) + "\n",
        "RECIPE": RECIPE,
        "RECIPE_WITH_BASE": f"base: {NAME}\n{RECIPE}",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text * (8 if name == "DATA" else 1))
    return {name: str(tmp_path / name) for name in texts}


def test_python_opens_it_by_its_name(bundled, tiny_base, tmp_path):
    ids = torch.randint(3, 60, (1, 8))
    expected = nextn.load_base(str(tiny_base)).generate(ids, max_new_tokens=6)
    for model in (nextn.load(NAME), nextn.MultiTokenModel.from_pretrained(NAME), nextn.load_base(NAME)):
        assert torch.equal(model.generate(ids, max_new_tokens=6), expected)
    assert native.load_config(NAME).vocab_size == 64 and native.base_of(NAME) == str(bundled)  # as `nextn bench` asks
    assert nextn.load_tokenizer(NAME).get_vocab() == native.tokenizer_of(NAME).get_vocab()


def test_heads_name_it_and_not_where_it_lies_on_this_machine(bundled, tmp_path):
    model = nextn.attach(nextn.load_base(NAME), nextn.MultiTokenConfig(n=3, **KINDS["recurrent"]))
    model.save_pretrained(tmp_path / "apart", heads_only=True)
    model.save_pretrained(tmp_path / "whole")
    for saved in ("apart", "whole"):
        assert native.describe(tmp_path / saved)["base"]["name"] == NAME
    assert native.public_name(model, None, None) == NAME
    assert type(nextn.load(tmp_path / "apart").base) is type(model.base)
    assert "license: apache-2.0" in (tmp_path / "apart" / "README.md").read_text()


VERBS = {
    "generate": ("generate", NAME, "the cat", "--max-new-tokens", 4),
    "generate, plain": ("generate", NAME, "the cat", "--max-new-tokens", 4, "--heads", 1),
    "info": ("info", NAME),
    "budget": ("budget", NAME, "--heads", "recurrent", "--n", 2, "--bandwidth", 10, "--rate", 1),
    "distill": ("distill", NAME, "--prompts", "PROMPTS", "--out", "answers.jsonl", "--max-new-tokens", 4),
    "attach": ("attach", NAME, "--data", "DATA", "--out", "out", *SMALL),
    "train": ("train", "RECIPE_WITH_BASE", "--data", "DATA", "--out", "out"),
    "train --base": ("train", "RECIPE", "--base", NAME, "--data", "DATA", "--out", "out"),
    "compress": ("compress", NAME, "--out", "out", "--output", "trimmed:16", "--data", "DATA", "--prompts", "PROMPTS",
                 "--new-tokens", 40),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_its_name(verb, files, tmp_path):
    words = [files.get(str(word), str(word)) for word in VERBS[verb]]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    if words[0] in ("attach", "train", "compress"):
        assert native.describe(tmp_path / "out")["base"]["name"] == NAME


def test_no_page_gives_it_to_transformers():
    root = Path(__file__).parents[2]
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("src/**/*.md")]
    lines = [
        line for page in pages for line in page.read_text().splitlines() if "AutoModel" in line or "AutoTok" in line
    ]
    assert not [line for line in lines if NAME in line or '"BASE"' in line]
