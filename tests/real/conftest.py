"""The bundled real model (fetched once, then cached) and real prompts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers

import nextn
from nextn.data import prompt_ids, read_prompts
from nextn.distill import interleaved
from nextn.formats.bundled import NAME, bundled_model, shipped_heads
from nextn.formats.native import load_base, load_tokenizer

# Real prompts and answers lie beside the repository, or where NEXTN_DATA says; tests that need them skip without.
DATA = Path(os.environ.get("NEXTN_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(scope="session")
def directory() -> str:
    return str(bundled_model())


@pytest.fixture(scope="session")
def tokenizer(directory) -> transformers.PreTrainedTokenizerBase:
    return load_tokenizer(directory)


@pytest.fixture(scope="session", params=["float32", "bfloat16"])
def shipped(request, directory) -> nextn.MultiTokenModel:
    """The bundled model with the heads that ship for it."""
    return nextn.load(shipped_heads(), base=load_base(directory, getattr(torch, request.param)))


@pytest.fixture(scope="session")
def real_prompts(tokenizer) -> list[list[int]]:
    """Prompts of the benchmark, from each category in turn."""
    path = DATA / "prompts_bench.jsonl"
    if not path.is_file():
        pytest.skip(f"there are no benchmark prompts at {path}")
    return [prompt_ids(tokenizer, record["prompt"]) for record in interleaved(read_prompts(path))]


@pytest.fixture(scope="session")
def parallel_heads(tmp_path_factory) -> Path:
    """Parallel heads for the bundled model, trained briefly on its own answers."""
    from nextn.training import AttachRecipe, attach_and_train

    answers = DATA / "answers_smollm2.jsonl"
    if not answers.is_file():
        pytest.skip(f"there are no answers to train on at {answers}")
    few = tmp_path_factory.mktemp("answers") / "few.jsonl"
    few.write_text("".join(answers.read_text().splitlines(keepends=True)[::8]))
    out = tmp_path_factory.mktemp("parallel")
    attach_and_train(AttachRecipe(base=NAME, data=[few], out=out, heads="parallel", epochs=1, learning_rate=5e-4))
    return out
