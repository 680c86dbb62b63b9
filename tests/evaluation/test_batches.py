"""The bench over batches and temperatures: paired ratios, and the whole verb on a tiny model."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from nextn.cli import app
from nextn.evaluation.batches import batches_of, least_seconds, numbers
from nextn.evaluation.report import interval
from nextn.evaluation.roofline import step_cost
from nextn.evaluation.speed import Prompt


def test_the_interval_of_paired_ratios_is_that_of_their_median():
    assert interval([1.2] * 9) == (1.2, 1.2, 1.2)
    found = interval([0.9, 1.0, 1.1, 1.2, 5.0])
    assert found.value == 1.1 and 0.9 <= found.low < 1.1 < found.high <= 5.0
    alike = interval([1.0, 1.0, 2.0, 2.0], [0, 0, 1, 1])
    assert (alike.low, alike.high) == (1.0, 2.0)  # repeats of a batch say nothing about other batches
    assert alike.cell() == "1.50 (1.00–2.00)"
    assert interval([1.0]) == (1.0, None, None) and interval([1.0]).cell(3) == "1.000"


def test_batches_are_of_one_category_and_full():
    prompts = {"a": [Prompt("a", "", [1]), Prompt("a", "", [2]), Prompt("a", "", [3])], "b": [Prompt("b", "", [4])]}
    assert batches_of(prompts, 2, 4) == [("a", [[1], [2]]), ("a", [[3], [1]]), ("b", [[4], [4]]), ("b", [[4], [4]])]
    assert batches_of(prompts, 4, 2)[:2] == [("a", [[1], [2], [3], [1]]), ("a", [[2], [3], [1], [2]])]


def test_the_roofline_of_a_batch_counts_weights_once_and_operations_for_every_row():
    cost = {"weight_bytes": 1000, "cache_bytes_per_position": 1, "operations": 500}
    limits = {"bandwidth": 1e3, "rate": 1e3}
    assert least_seconds(cost, limits, batch=1) == pytest.approx(1.128)
    assert least_seconds(cost | {"operations": 2000}, limits, batch=1) == pytest.approx(2.0)
    assert least_seconds(cost, limits, batch=8) == pytest.approx(4.0)


def test_what_a_step_costs_grows_with_its_drafts(trained_model):
    engine = trained_model.engine(stop_tokens=[])
    list(engine.generate([[5, 6, 7]], 4))
    costs = [step_cost(engine, drafts) for drafts in range(4)]
    assert costs[3] == step_cost(engine) and costs[0]["draft_operations"] == costs[0]["draft_weight_bytes"] == 0
    trunk = costs[0]["operations"]
    assert [cost["operations"] - cost["draft_operations"] for cost in costs] == [trunk, 2 * trunk, 3 * trunk, 4 * trunk]
    assert 0 < costs[1]["draft_operations"] < costs[2]["draft_operations"] < costs[3]["draft_operations"]


def test_lists_of_numbers():
    assert numbers("1,2,8", "--batch") == [1, 2, 8] and numbers("0,0.7", "--temperature", float) == [0.0, 0.7]
    for wrong in ("0", "1;2", ""):
        with pytest.raises(ValueError, match="--batch"):
            numbers(wrong, "--batch")


@pytest.mark.parametrize("method", ["coupled", "block"])
def test_the_verb_measures_every_batch_and_temperature(tiny_heads, tmp_path, method):
    lines = [
        {"prompt": f"tell me {word}", "category": f"c{place % 2}"} for place, word in enumerate(["a", "b", "c", "d"])
    ]
    prompts, out, tree = tmp_path / "prompts.jsonl", tmp_path / "out.json", tmp_path / "tree.json"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree.write_text('{"nodes": 5}')
    arguments = ["bench", str(tiny_heads), "--prompts", str(prompts), "--new-tokens", "12", "--repeats", "2", "--eager"]
    arguments += [
        "--batch",
        "1,3",
        "--temperature",
        "0,1",
        "--method",
        method,
        "--dtype",
        "float32",
        "--json",
        str(out),
    ]
    done = CliRunner().invoke(app, arguments + (["--tree", str(tree)] if method == "coupled" else []))
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert [(row["batch"], row["temperature"]) for row in found["rows"]] == [(1, 0.0), (1, 1.0), (3, 0.0), (3, 1.0)]
    for row in found["rows"]:
        assert set(row["ratio_by_category"]) == {"c0", "c1"} and row["ratio"]["low"] <= row["ratio"]["value"]
        assert row["texts"] == (16 if row["batch"] == 1 else 24) and sum(row["steps_by_drafts"].values()) > 0
        if method == "coupled" or row["temperature"] == 0:
            assert row["texts_as_plain"] == row["texts"]
    assert "over plain" in done.output and "Ratios are medians of pairs" in done.output.replace("\n", " ")


def test_other_engines_are_not_measured_over_batches(tiny_heads):
    done = CliRunner().invoke(app, ["bench", str(tiny_heads), "--batch", "2", "--replay", "2.0"])
    assert done.exit_code == 1 and "our own engines only" in " ".join(done.output.split())
