"""The bench over batches and temperatures: paired ratios, and the whole verb on a tiny model."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from nextn.cli import app
from nextn.decoding.rows import Generation
from nextn.decoding.sampling import Sampling
from nextn.evaluation import batches
from nextn.evaluation.batches import batches_of, least_seconds, numbers, race
from nextn.evaluation.bench import Settings
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
    work = batches_of(prompts, 2, 14)
    assert [category for category, _ in work] == ["a"] * 7 + ["b"] * 7 and all(len(batch) == 2 for _, batch in work)
    assert work[0] == ("a", [[1], [2]]) and work[7:] == [("b", [[4], [4]])] * 7
    each = [ids for category, batch in work if category == "a" for (ids,) in batch]
    assert all(sorted(each[place : place + 3]) == [1, 2, 3] for place in (0, 3, 6, 9))  # all, before one comes again
    assert len(batches_of(prompts, 4, 2)) == 12


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


class Paced:
    """An engine that takes so long a step, by a clock that all share, and emits so many tokens in it."""

    def __init__(self, clock: list[float], seconds: float, tokens: int) -> None:
        self.clock, self.seconds, self.tokens, self.started = clock, seconds, tokens, []
        self.rows, self.steps = 1, {tokens - 1: 1}

    def generate(self, prompts, new, sampling=None):
        return self.stepwise(prompts, new, lambda *told: None, sampling)

    def stepwise(self, prompts, new, on_tokens, sampling):
        self.started.append(self.clock[0])
        result = Generation(prompts[0])
        while len(result.tokens) < new:
            self.clock[0] += self.seconds
            emitted = [7] * min(self.tokens, new - len(result.tokens))
            result.tokens += emitted
            on_tokens(0, emitted, [])
            self.order.append(self.tokens)
            yield [(0, result)] if len(result.tokens) == new else []


def test_engines_take_turns_by_their_tokens_and_each_has_its_own_time(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(batches.time, "perf_counter", lambda: clock[0])
    engines = Paced(clock, 3.0, tokens=2), Paced(clock, 1.0, tokens=1)
    for engine in engines:
        engine.order = order
    settings = Settings(model="", new_tokens=40, repeats=8)
    pairs = race(engines, [("a", [[1]])], Sampling(), settings, Console(quiet=True))
    assert [pair.seconds for pair in pairs] == [(60.0, 40.0)] * 8 and {pair.ratio for pair in pairs} == {2 / 3}
    first = [ours < plain for ours, plain in zip(engines[0].started[1:], engines[1].started[1:], strict=True)]
    assert set(first) == {True, False}
    of_a_pair = order[-60:]
    assert all(2 * of_a_pair[:place].count(2) - of_a_pair[:place].count(1) in (-1, 0, 1, 2) for place in range(60))


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
        assert row["texts"] == (32 if row["batch"] == 1 else 72) and sum(row["steps_by_drafts"].values()) > 0
        if method == "coupled" or row["temperature"] == 0:
            assert row["texts_as_plain"] == row["texts"]
    assert "over plain" in done.output and "Ratios are medians of pairs" in " ".join(done.output.split())


def test_other_engines_are_not_measured_over_batches(tiny_heads):
    done = CliRunner().invoke(app, ["bench", str(tiny_heads), "--batch", "2", "--replay", "2.0"])
    assert done.exit_code == 1 and "our own engines only" in " ".join(done.output.split())
