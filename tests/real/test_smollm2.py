"""The bundled model with its shipped heads: quick checks for every run, the whole comparison marked slow."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import nextn
from nextn.cli import app
from nextn.data import prompt_ids
from nextn.evaluation.lossless import measure
from nextn.formats.bundled import NAME, shipped_heads
from nextn.formats.native import contents

QUESTIONS = ("What is the capital of France?", "Write a Python function that adds two numbers.")


def test_the_shipped_heads_fit_their_description():
    found = contents(shipped_heads())
    assert found["heads"] == "recurrent" and found["n"] == 4 and found["output"].startswith("trimmed")
    assert found["base"].startswith(NAME)
    assert found["parts"]["all heads"]["bytes"] < 10e6


def test_the_text_is_the_models_own(shipped, tokenizer):
    found = measure(shipped, [prompt_ids(tokenizer, question) for question in QUESTIONS], 24)
    assert found["unexplained"] == 0 and found["tokens"] > 24
    assert "differs" not in found["plain"]
    assert found["tau"] > 1.3, "the shipped heads are trained"
    if shipped.trunk.dtype == torch.float32:
        assert "differs" not in found["transformers"]


def test_the_demo_writes_what_it_says(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--json", str(tmp_path / "demo.json"), "--max-new-tokens", "24"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "demo.json").read_text())
    assert set(report["by_prompt"]) == {"code", "arithmetic", "chat"}
    for figures in (report, *report["by_prompt"].values()):
        assert isinstance(figures["identical"], bool)
        assert figures["unexplained"] == 0
        assert len(figures["acceptance"]["conditional"]) == len(figures["acceptance"]["cumulative"]) == 3
        assert figures["tau"] >= 1.0
        assert all(figures["tokens_per_second"][way] > 0 for way in ("nextn", "plain", "transformers"))
    assert "unexplained" in result.output and "Cumulative" in result.output


@pytest.mark.slow
def test_twenty_real_prompts_sequential(shipped, real_prompts):
    found = measure(shipped, real_prompts[:20], 24)
    print(found)
    assert found["unexplained"] == 0 and "differs" not in found["plain"]
    assert found["transformers"] is None or "differs" not in found["transformers"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_real_prompts_parallel(parallel_heads, real_prompts, dtype):
    found = measure(nextn.load(parallel_heads, dtype=dtype), real_prompts[:20], 24)
    print(found)
    assert found["tau"] > 1.05, "the heads are trained"
    assert found["unexplained"] == 0 and "differs" not in found["plain"]
    assert found["transformers"] is None or "differs" not in found["transformers"]
