"""The bundled model (fetched once, then cached) with its shipped heads: quick checks for every run, the whole
comparison on real prompts marked slow."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import nextn
from nextn.cli import app
from nextn.data import prompt_ids, read_prompts
from nextn.decoding.sampling import gumbel, keys
from nextn.distill import interleaved
from nextn.evaluation.lossless import measure
from nextn.formats.bundled import NAME, bundled_model, shipped_heads
from nextn.formats.native import contents, load_base, load_tokenizer
from nextn.recipe import Recipe, train

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
    answers = DATA / "answers_smollm2.jsonl"
    if not answers.is_file():
        pytest.skip(f"there are no answers to train on at {answers}")
    few = tmp_path_factory.mktemp("answers") / "few.jsonl"
    few.write_text("".join(answers.read_text().splitlines(keepends=True)[::8]))
    out = tmp_path_factory.mktemp("parallel")
    training = {"num_train_epochs": 1, "learning_rate": 5e-4}
    train(Recipe(base=NAME, heads={"heads": "parallel"}, vocabulary=8192, data=[str(few)], training=training), out)
    return out


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


def test_a_seed_gives_one_text_whatever_drafts_and_mates(directory, tokenizer):
    model = nextn.load(shipped_heads(), base=load_base(directory, torch.float32))
    prompts = [prompt_ids(tokenizer, question) for question in QUESTIONS]
    sampling = nextn.Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=4)
    plain = dict(model.engine(rows=2, heads=1).generate(prompts, 24, sampling=sampling))
    for tree in (None, nextn.Tree(nodes=6, beam=3)):
        found = dict(model.engine(rows=1, tree=tree).generate(prompts, 24, sampling=sampling))
        assert [found[row].tokens for row in range(2)] == [plain[row].tokens for row in range(2)]
        assert any(count for result in found.values() for count in result.accepted)


@pytest.mark.slow
def test_thousands_of_drawn_tokens_are_plain_decodings(directory, real_prompts):
    model = nextn.load(shipped_heads(), base=load_base(directory, torch.float32))
    sampling, prompts = nextn.Sampling(temperature=1.0, top_p=0.95, seed=1), real_prompts[:48]
    plain = dict(model.engine(rows=16, heads=1, stop_tokens=[]).generate(prompts, 64, sampling=sampling))
    drafted = dict(model.engine(rows=7, stop_tokens=[]).generate(prompts, 64, sampling=sampling))
    pairs = [(drafted[row].tokens, plain[row].tokens) for row in range(48)]
    print(f"{sum(ours == theirs for ours, theirs in pairs)} of 48 texts of 64 tokens alike")
    for row, (ours, theirs) in enumerate(pairs):
        if ours != theirs:
            place = next(place for place in range(64) if ours[place] != theirs[place])
            text, others = prompts[row] + ours[:place], [ours[place], theirs[place]]
            a, b = noisy_scores(model, sampling, sampling.seed + row, text)[others].tolist()
            assert abs(a - b) < 1e-3, "texts part at near ties alone"
    assert sum(len(ours) for ours, _ in pairs) == 48 * 64


@torch.inference_mode()
def noisy_scores(model, sampling: nextn.Sampling, seed: int, text: list[int]) -> torch.Tensor:
    """Of all tokens after a text [V]: what a coupled draw takes the largest of."""
    logits = model.base(torch.tensor([text])).logits[:, -1:]
    key = keys(torch.tensor([seed]), torch.tensor([[len(text)]]))
    return (sampling.scores(logits, []) + gumbel(key, torch.arange(logits.shape[-1])))[0, 0]


def test_what_is_drawn_is_the_largest_of_scores_and_noise(directory, tokenizer):
    model = nextn.load(shipped_heads(), base=load_base(directory, torch.float32))
    sampling, prompt = nextn.Sampling(temperature=1.0, top_p=0.95, seed=9), prompt_ids(tokenizer, QUESTIONS[0])
    (_, found), *_ = model.engine(stop_tokens=[]).generate([prompt], 6, sampling=sampling)
    for place, token in enumerate(found.tokens):
        assert int(noisy_scores(model, sampling, 9, prompt + found.tokens[:place]).argmax()) == token


@pytest.mark.slow
def test_a_prompt_of_thousands_of_tokens(shipped, real_prompts):
    long = [token for prompt in real_prompts for token in prompt][:4000]
    found = measure(shipped, [long, *real_prompts[:2]], 24)
    print(found)
    assert found["unexplained"] == 0 and "differs" not in found["plain"]
    assert found["transformers"] is None or "differs" not in found["transformers"]


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
