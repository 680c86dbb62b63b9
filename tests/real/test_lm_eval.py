"""lm-eval on a model with heads answers as on the model alone, at any batch size; skipped where it is missing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import nextn
from conftest import fit, made_up_text, make_tokenizer

lm_eval = pytest.importorskip("lm_eval")
PROMPTS = 19  # with a batch size of 8 the last batch is not whole


@pytest.fixture(scope="module")
def model(trained_host) -> nextn.MultiTokenModel:
    config = nextn.MultiTokenConfig(n=4, heads="sequential", recurrent=True)
    calibration = {"input_ids": made_up_text(8, 48, seed=999)}
    whole = nextn.attach(copy.deepcopy(trained_host), config, calibration=calibration)
    fit(whole.train(), 40)
    return whole.eval()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[dict[str, Any]]:
    """A task that generates until some text, and one that compares likelihoods, on local data."""
    directory: Path = tmp_path_factory.mktemp("task")
    tokenizer = make_tokenizer()
    records = [
        {
            "prompt": tokenizer.decode(made_up_text(1, 5 + place, seed=place)[0]),
            "choices": ["a", "bc", "xyz"],
            "gold": 1,
        }
        for place in range(PROMPTS)
    ]
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(directory)},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
    }
    return [
        common
        | {
            "task": "until",
            "output_type": "generate_until",
            "doc_to_target": "{{gold}}",
            "generation_kwargs": {"until": ["ha", "5", "\n"], "max_gen_toks": 30, "do_sample": False},
            "metric_list": [{"metric": "bypass"}],
        },
        common
        | {
            "task": "choice",
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}],
        },
    ]


def answers(model, tasks, batch_size: int) -> tuple[list[str], list[float]]:
    """The generated texts, and the log-likelihoods of the choices."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=batch_size),
        tasks=copy.deepcopy(tasks),
        task_manager=TaskManager(include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )["samples"]
    texts = [sample["resps"][0][0] for sample in found["until"]]
    likelihoods = [float(choice[0][0]) for sample in found["choice"] for choice in sample["resps"]]
    assert len(texts) == PROMPTS and len(likelihoods) == 3 * PROMPTS
    return texts, likelihoods


@pytest.mark.parametrize("batch_size", [1, 8])
def test_lm_eval_finds_what_it_finds_without_heads(model, tasks, batch_size):
    expected, plain = answers(model.base, tasks, batch_size)
    texts, likelihoods = answers(model, tasks, batch_size)
    assert texts == expected and any(len(text) < 29 for text in texts) and len(set(texts)) > 5
    assert likelihoods == pytest.approx(plain, rel=1e-4)
