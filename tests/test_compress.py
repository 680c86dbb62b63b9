"""Heads derived from trained ones: lossless with any output, and equal where nothing is left out."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from typer.testing import CliRunner

import nextn
from conftest import KINDS, MORE_KINDS, fit, greedy_reference, made_up_text, make_tokenizer
from nextn import training
from nextn.cli import app
from nextn.config import ConfigError, OutputConfig
from nextn.derive import derive
from nextn.evaluation.acceptance import covered
from nextn.formats import native

OUTPUTS = ["shared", "separate", "low_rank:16", "trimmed:30", "trimmed:30,own", "clustered:8:3", "clustered:16:4,own"]


@pytest.fixture(scope="module")
def whole(trained_host):
    """Trained heads that can name all tokens, by kind."""
    made = {}

    def heads(kind: str):
        if kind not in made:
            torch.manual_seed(0)
            config = nextn.MultiTokenConfig(n=4, **MORE_KINDS[kind])
            text = {"input_ids": made_up_text(8, 48, seed=999)}
            model = nextn.attach(copy.deepcopy(trained_host), config, calibration=text)
            fit(model.train(), 100)
            made[kind] = model.eval()
        return made[kind]

    return heads


def accepted(results) -> int:
    return sum(count for result in results for count in result.accepted)


def decoded(model, prompts, new=24):
    return [result for _, result in sorted(model.engine(rows=2).generate(prompts, new), key=lambda item: item[0])]


@pytest.mark.parametrize("stated", OUTPUTS)
@pytest.mark.parametrize("kind", ["recurrent", "distinct", "parallel", "eagle3", "shared_kv"])
def test_any_output_gives_the_trunks_own_text(kind, stated, whole, prompts, trained_host):
    config = OutputConfig.parse(stated + ",each" if kind in ("distinct", "parallel") and "own" in stated else stated)
    derived = derive(whole(kind), config)
    results = decoded(derived, prompts)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.tokens == greedy_reference(trained_host, prompt, 24, stops=(2,))
    # Verification mends any draft; so an output that is wrong shows only in how many stand.
    stand, before = (accepted(each) for each in (results, decoded(whole(kind), prompts)))
    assert stand >= (0.9 if stated in ("shared", "separate") else 0.3) * before > 0


@pytest.mark.parametrize("stated", ["separate", "low_rank:32", "clustered:8:8", "clustered:8:8,own", "trimmed:64"])
@pytest.mark.parametrize("kind", ["recurrent", "distinct", "parallel"])
def test_outputs_that_leave_nothing_out_change_no_draft(kind, stated, whole, prompts):
    model = whole(kind)
    derived = derive(model, OutputConfig.parse(stated))
    assert [result.accepted for result in decoded(derived, prompts)] == [
        result.accepted for result in decoded(model, prompts)
    ]


def test_a_thin_drafters_own_table_starts_where_it_was(whole, prompts):
    model = whole("shared_kv")
    derived = derive(model, OutputConfig(kind="separate"))
    assert derived.heads.output.at(2).table.weight.shape == (64, 24)
    assert [result.accepted for result in decoded(derived, prompts)] == [
        result.accepted for result in decoded(model, prompts)
    ]


@pytest.mark.parametrize("first", ["separate", "low_rank:32", "clustered:8:8,own", "trimmed:64,own"])
def test_tables_of_its_own_are_derived_from(first, whole, prompts):
    model = derive(whole("recurrent"), OutputConfig.parse(first))
    with torch.no_grad():
        for part in model.heads.output.parts():
            table = part.up if first.startswith("low") else part.table
            table.weight.mul_(-1)  # nothing like the trunk's
    wanted = OutputConfig.parse("clustered:16:16,own" if first != "separate" else "low_rank:32,each")
    assert [result.accepted for result in decoded(derive(model, wanted), prompts)] == [
        result.accepted for result in decoded(model, prompts)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_depths_make_the_same_first_drafts(kind, whole):
    model = whole(kind)
    shorter = derive(model, model.multi_token.output, n=3)
    text = made_up_text(1, 20, seed=7)
    states, fewer = (
        each.heads(
            each.trunk, each.run_trunk(nextn.model.as_text(text, None, None))[1], nextn.model.as_text(text, None, None)
        )
        for each in (model, shorter)
    )
    assert len(fewer) == 2
    for before, after in zip(states, fewer, strict=False):
        torch.testing.assert_close(after, before)


def test_tokens_to_keep_are_kept_also_by_an_output_of_the_same_size(whole):
    trimmed = derive(whole("recurrent"), OutputConfig.parse("trimmed:8"))
    again = derive(trimmed, OutputConfig.parse("trimmed:8"), kept=torch.arange(20, 28))
    assert again.heads.output.kept.tolist() == list(range(20, 28))
    same = derive(again, OutputConfig.parse("trimmed:8"))
    assert same.heads.output.kept.tolist() == list(range(20, 28))


def test_coverage_is_the_share_of_tokens_that_states_can_name(whole, prompts):
    model = whole("recurrent")
    results = decoded(model, prompts)
    assert covered(model, results) == 1.0
    half = derive(model, OutputConfig(kind="trimmed", size=32))
    named = total = 0
    for result in results:
        text = result.prompt + result.tokens
        for depth in (2, 3, 4):
            targets = text[max(len(result.prompt), depth) :]
            named, total = named + sum(token < 32 for token in targets), total + len(targets)
    assert covered(half, results) == pytest.approx(named / total)
    assert covered(derive(model, OutputConfig.parse("clustered:8:8")), results) == 1.0
    assert covered(derive(model, OutputConfig.parse("clustered:8:1")), results) < 1.0


def test_what_cannot_be_derived_is_refused(whole):
    model = whole("recurrent")
    for n in (1, 5):
        with pytest.raises(ConfigError, match="depths can be 2 to 4"):
            derive(model, model.multi_token.output, n=n)
    with pytest.raises(ConfigError, match="Each anticausal head"):
        derive(whole("anticausal"), OutputConfig(), n=3)
    each = derive(whole("distinct"), OutputConfig(kind="separate"))
    with pytest.raises(ConfigError, match="3 tables, one each"):
        derive(each, OutputConfig.parse("low_rank:8"))
    assert len(list(derive(each, OutputConfig.parse("low_rank:8,each"), n=3).heads.output.parts())) == 2
    assert len(list(derive(each, OutputConfig.parse("low_rank:8,each")).heads.output.parts())) == 3


# --- the verb -----------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(whole, tiny_base, tmp_path):
    """Heads on disk, prompts and text for them."""
    native.save_heads(whole("recurrent"), tmp_path / "heads", base_name=str(tiny_base), tokenizer=make_tokenizer())
    letters = make_tokenizer().convert_ids_to_tokens(made_up_text(12, 40, seed=3).flatten().tolist())
    texts = ["".join(letters[start : start + 40]) for start in range(0, 480, 40)]
    records = [
        {"prompt": text[:8], "answer": text[8:], "category": "ab"[place % 2]} for place, text in enumerate(texts)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def run(stored, *options: str, out: str = "out"):
    command = ["compress", str(stored / "heads"), "--out", str(stored / out), "--new-tokens", "16"]
    command += ["--prompts", str(stored / "data.jsonl"), "--json", str(stored / "found.json")]
    return CliRunner().invoke(app, [*command, *options])


def test_compressing_says_what_it_cost(stored):
    done = run(stored, "--output", "trimmed", "--size", "24", "--data", str(stored / "data.jsonl"))
    assert done.exit_code == 0, done.output
    found = json.loads((stored / "found.json").read_text())
    before, after = found["before"], found["after"]
    assert after["output"] == "trimmed:24" and before["output"] == "shared"
    assert before["coverage"] == 1.0 > after["coverage"] > 0.3
    assert after["kept"] == pytest.approx((after["tau"] - 1) / (before["tau"] - 1))
    assert after["output_operations"] == 24 * 32 < before["output_operations"] == 64 * 32
    assert set(after["by_category"]) == {"a", "b"}
    assert "coverage" in done.output and "trimmed:24" in done.output
    loaded = nextn.load(stored / "out")
    assert str(loaded.multi_token.output) == "trimmed:24"
    counted = set(loaded.heads.output.kept.tolist())
    assert {0, 1, 2} <= counted, "special tokens are always kept"


def test_auto_takes_the_cheapest_that_keeps_enough(stored):
    done = run(stored, "--output", "auto", "--keep", "0.8", "--data", str(stored / "data.jsonl"), "--depths", "auto")
    assert done.exit_code == 0, done.output
    found = json.loads((stored / "found.json").read_text())
    chosen = found["after"]["output"].split(",")[0]
    every = [*found["tried"], found["before"]]
    row = next(each for each in every if each["output"] == chosen)
    assert row["kept"] >= 0.8 and found["before"]["kept"] == 1.0
    assert all(each["kept"] < 0.8 for each in every if each["output_operations"] < row["output_operations"])
    first, second = found["reasons"]
    assert first.startswith(chosen) and "is the fastest of n = 2" in second


def test_recovery_trains_and_goes_on_where_it_was_stopped(stored, monkeypatch):
    options = "--output", "low_rank:4", "--data", str(stored / "data.jsonl"), "--steps", "120"

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training.Trainer, "save_result", killed)
        assert run(stored, *options).exit_code != 0
    assert any((stored / "out").glob("checkpoint-*"))
    other = run(stored, "--output", "low_rank:8", *options[2:])
    assert other.exit_code == 1 and "holds another compression" in " ".join(other.output.split())
    done = run(stored, *options)
    assert done.exit_code == 0, done.output
    assert "going on from" in done.output
    found = json.loads((stored / "found.json").read_text())
    (derived,) = found["tried"]
    assert found["after"]["output"] == "low_rank:4" and found["after"]["recovered"] == 120
    assert found["after"]["tau"] != derived["tau"] and not math.isnan(found["after"]["tau"])
    recovered = nextn.load(stored / "out")
    assert str(recovered.multi_token.output) == "low_rank:4"
    before = {path: path.read_bytes() for path in (stored / "out").rglob("*") if path.is_file()}
    again = run(stored, *options)
    assert again.exit_code == 0 and "finished: nothing is changed" in " ".join(again.output.split())
    assert {path: path.read_bytes() for path in (stored / "out").rglob("*") if path.is_file()} == before
    assert native.base_name(stored / "out") == native.base_name(stored / "heads")


def test_a_base_that_was_trained_with_its_heads_stays_as_it_is(whole, stored, tmp_path):
    model = copy.deepcopy(whole("recurrent"))
    weights = {"preset": "deepseek"}
    model.multi_token = nextn.MultiTokenConfig(n=4, freeze_trunk=False, weights=weights, **MORE_KINDS["recurrent"])
    native.save(model, tmp_path / "whole", make_tokenizer())
    data = str(stored / "data.jsonl")
    command = [
        "compress",
        str(tmp_path / "whole"),
        "--out",
        str(stored / "out"),
        "--output",
        "low_rank:8",
        "--steps",
        "2",
    ]
    done = CliRunner().invoke(app, [*command, "--data", data, "--prompts", data])
    assert done.exit_code == 0, done.output
    compressed = nextn.load(stored / "out")
    assert not (stored / "out" / "config.json").exists(), "heads alone"
    for ours, theirs in zip(compressed.base.parameters(), model.base.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_heads_that_are_there_are_not_overwritten(stored):
    refused = run(stored, "--output", "low_rank:4", out="heads")
    assert refused.exit_code == 1 and "holds heads already" in " ".join(refused.output.split())


def test_another_compression_and_another_process_are_refused(stored):
    out = stored / "taken"
    out.mkdir()
    for file, content in {"compress.json": "no JSON", "nextn.lock": '{"host": "elsewhere", "pid": 1}'}.items():
        (out / file).write_text(content)
        refused = " ".join(run(stored, "--output", "low_rank:4", out="taken").output.split())
        assert ("holds another compression" if file == "compress.json" else "is in use by another process") in refused
        assert (out / file).read_text() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "trimmed:8"], "give --data, or --tokens"),
        (["--output", "trimmed"], "give output.size"),
        (["--output", "huge"], "kind: Input should be"),
        (["--output", "clustered:7"], "must divide the base's vocabulary"),
        (["--output", "shared", "--depths", "5"], "--depths can be 2 to 4"),
        (["--output", "shared", "--depths", "many"], "give a number or auto"),
        (["--output", "shared", "--steps", "5"], "Recovery trains on text"),
        (["--output", "auto", "--steps", "5", "--data", "{data}"], "recover the one that it chooses"),
        (["--output", "trimmed:8", "--data", "none.jsonl"], "no data file none.jsonl"),
        (["--output", "trimmed:8", "--tokens", "none.json"], "cannot be read"),
        (["--output", "shared", "--keep", "0.5"], "--keep goes with --output auto"),
        (["--output", "shared", "--learning-rate", "0.1"], "--learning-rate goes with --steps"),
        (["--output", "shared", "--tokens", "none.json"], "--tokens goes with a trimmed output"),
        (["--output", "shared", "--script", "latin"], "--category and --script choose tokens by --data"),
        (["--output", "trimmed:8", "--data", "{data}", "--script", "hangul"], "No token has letters of the script"),
        (["--output", "auto", "--rank", "4"], "leave --rank out"),
        (["--output", "trimmed:8", "--size", "9"], "its size is given twice"),
        (["--output", "shared", "--prompts", "none.jsonl"], "no data file none.jsonl"),
        (["--output", "auto", "--keep", "1", "--data", "{data}", "--category", "c"], "no text of category c"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(options, message, stored):
    options = [str(stored / "data.jsonl") if option == "{data}" else option for option in options]
    done = run(stored, *options)
    assert done.exit_code == 1 and message in " ".join(done.output.split()), done.output


def test_a_list_of_tokens_is_kept(stored):
    (stored / "ids.json").write_text(json.dumps([5, 9, 4]))
    done = run(stored, "--output", "trimmed:3", "--tokens", str(stored / "ids.json"))
    assert done.exit_code == 0, done.output
    assert nextn.load(stored / "out").heads.output.kept.tolist() == [4, 5, 9]
