"""The bench: statistics over made-up timings, replayed acceptance, and the whole verb on a tiny model."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from nextn.cli import app
from nextn.decoding.engine import Engine
from nextn.evaluation.replay import TraceError, read_trace, replaying
from nextn.evaluation.roofline import bound, step_cost
from nextn.evaluation.speed import BenchError, Contender, Timing, speeds, time_split
from nextn.trunk import Trunk


def timing(count: int, *seconds: float) -> Timing:
    return Timing(count=count, seconds=list(seconds))


def test_speeds_are_tokens_over_median_seconds():
    timings = {
        "nextn": [timing(100, 1.0, 9.0, 1.0), timing(50, 0.5, 0.5, 0.5)],
        "plain": [timing(100, 2.0, 2.0, 2.0), timing(50, 1.0, 1.0, 30.0)],
    }
    found = speeds(timings, [0, 1])
    assert found["tokens_per_second"]["nextn"]["value"] == pytest.approx(100)
    over = found["speedup"]["plain"]
    assert over["value"] == pytest.approx(2.0) and over["low"] <= 2.0 <= over["high"]
    assert list(found["speedup"]) == ["plain"]


def test_the_interval_covers_what_it_should():
    """Of many sets of 30 prompts with a known mean time, some 95% have the true speed in their interval."""
    generator, covered = np.random.default_rng(1), 0
    for _ in range(200):
        timings = {"nextn": [timing(1, seconds) for seconds in generator.exponential(2.0, 30)]}
        interval = speeds(timings, range(30), draws=400)["tokens_per_second"]["nextn"]
        covered += interval["low"] <= 1 / 2.0 <= interval["high"]
    assert 0.86 <= covered / 200 <= 0.99


def test_repeats_of_one_prompt_have_an_interval_and_one_timing_has_none():
    several = speeds({"nextn": [timing(10, 1.0, 2.0, 4.0)]}, [0])["tokens_per_second"]["nextn"]
    assert several["low"] < several["value"] == 5.0 < several["high"]
    once = speeds({"nextn": [timing(10, 1.0)]}, [0])["tokens_per_second"]["nextn"]
    assert once == {"value": 10.0, "low": None, "high": None}


def test_the_parts_add_up_to_the_whole():
    one = timing(9, 1.0)
    one.parts, one.answer = [{"verify": 0.5, "draft": 0.2, "prefill": 0.1}], {"accepted": [3, 3]}
    split = time_split([one])
    assert sum(split["share"].values()) == pytest.approx(1)
    assert split["share"]["loop"] == pytest.approx(0.2)
    assert split["ms_per_step"]["verify"] == pytest.approx(500 / 2)  # 1 + 4 + 4 tokens: no truncated step


@given(st.floats(1, 4), st.just(3))
def test_a_made_up_trace_has_its_tau(tau, drafts):
    (trace,) = read_trace(str(tau), drafts)
    assert min(trace) >= 0 and max(trace) <= drafts
    assert 1 + sum(trace) / len(trace) == pytest.approx(tau, abs=0.011)


def test_traces_that_do_not_fit_are_refused(tmp_path):
    recorded = tmp_path / "run.json"
    recorded.write_text(json.dumps({"trace": [[0, 3], [1]]}))
    assert read_trace(str(recorded), 3) == [[0, 3], [1]]
    for trace, drafts in (("5", 3), ("0.5", 3), (str(tmp_path / "none.json"), 3), (str(recorded), 2)):
        with pytest.raises(TraceError):
            read_trace(trace, drafts)


def test_replayed_steps_accept_what_the_trace_says(trained_model):
    engine = trained_model.engine()
    engine.verify = replaying(engine.verify, iter([2, 0, 3, 1, 1]))
    engine.stop_tokens = frozenset()
    ((_, result),) = engine.generate([[5, 6, 7]], 13)
    assert result.accepted == [2, 0, 3, 1, 1] and len(result.tokens) == 13


def test_the_cost_of_a_step_counts_each_weight_once(trained_host):
    engine = Engine(Trunk(trained_host), None)
    list(engine.generate([[1, 2]], 3))
    cost = step_cost(engine)
    read = sum(p.numel() for name, p in trained_host.named_parameters() if "embed" not in name)
    config = trained_host.config
    assert cost["weight_bytes"] == 4 * read and cost["operations"] == 2 * read
    head = config.hidden_size // config.num_attention_heads
    assert cost["cache_bytes_per_position"] == config.num_hidden_layers * 2 * config.num_key_value_heads * head * 4
    least = bound(cost, {"bandwidth": 1e9, "rate": 1e9}, length=10)
    assert least["by_bytes"] == (4 * read + 10 * cost["cache_bytes_per_position"]) / 1e9


def test_a_contender_that_dies_is_named():
    dead = Contender("llama.cpp F16", {"kind": "no such kind"})
    with pytest.raises(BenchError, match=r"llama\.cpp F16 ended"):
        dead.start()
    missing = Contender("vLLM", {"kind": "transformers", "model": "nowhere", "dtype": "float32"}, sys.executable)
    with pytest.raises(BenchError, match="vLLM ended"):
        missing.start()
    with pytest.raises(BenchError, match="cannot be started with no-such-python"):
        Contender("vLLM", {}, "no-such-python").start()
    never_started = Contender("vLLM", {})
    never_started.stop()


@pytest.mark.parametrize("replay", [None, "2.4"])
def test_the_verb(tiny_heads, tmp_path, replay):
    prompts = tmp_path / "prompts.jsonl"
    records = [{"category": name, "prompt": text} for name in ("one", "two") for text in ("abc def", "hello")]
    prompts.write_text("\n".join(json.dumps(record) for record in records))
    arguments = ["bench", str(tiny_heads), "--prompts", str(prompts), "--count", "4", "--new-tokens", "12"]
    arguments += ["--repeats", "2", "--eager", "--dtype", "float32", "--json", str(tmp_path / "run.json")]
    arguments += ["--html", str(tmp_path / "run.html")] + (["--replay", replay] if replay else [])
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "run.json").read_text())
    assert set(found["contenders"]) == {"nextn", "plain", "transformers", "transformers lookup"}
    assert set(found["by_category"]) == {"one", "two"}
    for row in (found["overall"], *found["by_category"].values()):
        assert set(row["tokens_per_second"]) == set(found["contenders"])
        assert set(row["speedup"]) == set(found["contenders"]) - {"nextn"}
        assert row["roofline"]["nextn"]["step_ms"] > 0
        assert row["identical"] == (None if replay else row["prompts"])
        assert row["unexplained"] == row["plain_unexplained"] == (None if replay else 0)
        if replay:
            assert row["tau"] == pytest.approx(2.4, abs=0.35)
    assert all(about["same_text_every_repeat"] for about in found["contenders"].values())
    page = (tmp_path / "run.html").read_text()
    assert page.count("<svg") == 4 and 'src="' not in page and "@import" not in page


def test_the_page_of_a_single_timing(tmp_path):
    """No interval, and still a plot."""
    from nextn.evaluation.page import speed_plot

    speeds = {"nextn": {"value": 10.0, "low": None, "high": None}, "plain": {"value": 5.0, "low": None, "high": None}}
    speed_plot({"overall": {"tokens_per_second": speeds}}).savefig(tmp_path / "plot.svg")


def test_files_for_an_engine_that_is_not_there(tiny_heads, monkeypatch):
    monkeypatch.setattr("nextn.evaluation.bench._installed", lambda package: False)
    done = CliRunner().invoke(app, ["bench", str(tiny_heads), "--gguf", "some.gguf", "--new-tokens", "8"])
    assert done.exit_code == 1 and "pip install xllamacpp" in " ".join(done.output.split())


def test_prompts_that_leave_no_room_are_refused(tiny_heads):
    done = CliRunner().invoke(app, ["bench", str(tiny_heads), "--new-tokens", "127", "--dtype", "float32"])
    assert done.exit_code == 1 and "No prompt leaves room" in " ".join(done.output.split())
