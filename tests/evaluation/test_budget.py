"""The accounting gives what is published of known models, from their shapes alone."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from nextn.cli import app
from nextn.config import ConfigError, MultiTokenConfig
from nextn.evaluation.budget import fields_of, shares_of, short
from nextn.evaluation.costs import costs_of
from nextn.model import MultiTokenModel

GEMMA = {
    "model_type": "gemma4_text",
    "head_dim": 256,
    "global_head_dim": 512,
    "vocab_size": 262144,
}
SHAPES = {
    "llama-3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "deepseek-v3": {"model_type": "deepseek_v3"},  # the defaults of transformers' config are its
    "gemma-4-e2b": GEMMA
    | {
        "hidden_size": 1536,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "intermediate_size": 6144,
        "num_kv_shared_layers": 20,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    },
    "gemma-4-31b": GEMMA
    | {
        "hidden_size": 5376,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "intermediate_size": 21504,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
}
MACHINE = ["--bandwidth", "3350", "--rate", "800"]


@pytest.fixture
def asked(tmp_path):
    def run(shape: str | dict, *options: str) -> dict:
        (tmp_path / "shape.json").write_text(json.dumps(SHAPES[shape] if isinstance(shape, str) else shape))
        command = ["budget", str(tmp_path / "shape.json"), "--json", str(tmp_path / "found.json"), *MACHINE, *options]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / "found.json").read_text()) | {"printed": " ".join(done.output.split())}

    return run


def test_llama_3_70b(asked):
    found = asked("llama-3-70b")
    assert found["trunk"]["parameters"] == pytest.approx(70.6e9, rel=1e-3)
    entries = {(each["heads"], each["output"], each["n"]): each for each in found["entries"]}
    assert {n for _, _, n in entries} == set(range(2, 9))
    # One extra separate output: 128,256 rows of 8,192.
    assert entries["recurrent", "separate", 4]["parameters"]["output"] == 128_256 * 8192 == 1_050_673_152
    assert entries["distinct", "separate", 4]["parameters"]["output"] == 3 * 1_050_673_152
    assert "One separate output weighs 1.05G parameters (2.1GB in bfloat16), 3 of them" in found["printed"]
    assert entries["recurrent", "shared", 4]["parameters"]["output"] == 0
    low = next(each for each in found["entries"] if each["output"].startswith("low_rank"))
    assert low["parameters"]["output"] == 1024 * (128_256 + 8192)
    first, last = entries["distinct", "shared", 2], entries["distinct", "shared", 8]
    assert last["parameters"]["heads"] == 7 * first["parameters"]["heads"]
    assert first["verification_reads_over_trunk"] == 1.0, "a dense trunk is read once, whatever the width"


def test_deepseek_v3(asked):
    """README_WEIGHTS of the release: 671B in all, a module of 11.5B beside 0.9B each for embedding and head, shared."""
    found = asked("deepseek-v3", "--heads", "distinct", "--heads", "shared_kv", "--n", "2", "--output", "shared")
    assert found["trunk"]["parameters"] == pytest.approx(671e9, rel=1e-3)
    (module,) = found["entries"]
    layer = module["parameters"]["heads"] - 2 * 7168**2  # without eh_proj, and its norms
    assert layer == pytest.approx(11.507e9, rel=1e-3)
    assert module["parameters"]["heads"] == pytest.approx(11.5e9, rel=0.01)
    assert module["output_operations"] == pytest.approx(0.9e9, rel=0.03) and module["parameters"]["output"] == 0
    # 37B parameters activated, the embedding of 0.9B looked up
    assert found["trunk"]["weights_met"] == pytest.approx(37e9 - 0.9e9, rel=0.02)
    assert 1.3 < module["verification_reads_over_trunk"] < 1.9, "two tokens wake more experts than one"
    assert "compressed keys" in found["left_out"]["shared_kv, shared"]["2"]


@pytest.mark.parametrize(
    ("shape", "fields", "output", "published"),
    [
        ("gemma-4-e2b", ["drafter_width=256", "drafter_heads=4"], "clustered:2048:32,own", 78e6),
        ("gemma-4-31b", ["drafter_width=1024"], "separate", 470e6),
    ],
)
def test_gemma_4_drafters(asked, shape, fields, output, published):
    options = [option for each in fields for option in ("--set", each)]
    found = asked(shape, "--heads", "shared_kv", "--n", "4", "--output", output, *options)
    (drafter,) = found["entries"]
    assert sum(drafter["parameters"].values()) == pytest.approx(published, rel=0.005)
    if output.startswith("clustered"):  # 43-fold less than scoring all of the drafter's own rows
        assert 262144 * 256 / drafter["output_operations"] == pytest.approx(42.67, abs=0.01)


TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 1024,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def test_measured_acceptance_decides(asked, tmp_path):
    def row(output: str, kept: float, *shares: float) -> dict:
        return {"heads": "recurrent", "output": output, "kept": kept, "acceptance": {"conditional": shares}}

    tried = [row("shared", 1.0, 0.9, 0.9), row("trimmed:256", 0.97, 0.88, 0.2), row("trimmed:64", 0.5, 0.5, 0.5)]
    (tmp_path / "measured.json").write_text(json.dumps({"tried": tried, "after": tried[1]}))
    options = "--measured", str(tmp_path / "measured.json"), "--heads", "recurrent", "--output", "auto"
    found = asked(TINY, *options, "--depths", "auto")
    assert {each["output"] for each in found["entries"]} == {"trimmed:256"}
    assert "trimmed:256 takes 16,384 multiplications a draft and keeps 97.0%" in found["printed"]
    by_n = {each["n"]: each for each in found["entries"]}
    assert by_n[3]["tau"] == pytest.approx(1 + 0.88 + 0.88 * 0.2)
    fastest = max(by_n, key=lambda n: by_n[n]["speedup"])
    assert f"n = {fastest} is the fastest" in found["printed"]
    assert {each["acceptance"] for each in found["entries"]} == {"measured"}
    other = asked(TINY, *options[:2], "--heads", "parallel", "--output", "trimmed:256", "--n", "3")
    assert other["entries"][0]["acceptance"] == "assumed" and other["entries"][0]["tau"] == pytest.approx(2.19)
    given = asked(TINY, "--acceptance", "0.5", "--n", "3", "--heads", "recurrent", "--output", "shared")
    assert given["entries"][0]["tau"] == 1.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "medusa"], "There are no medusa heads"),
        (["--n", "1"], "n must be at least 2"),
        (["--output", "trimmed:4096"], "vocabulary has 1024 tokens"),
        (["--output", "auto"], "give --measured"),
        (["--output", "big"], "kind: Input should be"),
        (["--acceptance", "2"], "give shares between 0 and 1"),
        (["--set", "tap=[0"], "the value is not YAML"),
        (["--set", "n=3"], "use these"),
        (["--set", "colour=3"], "heads have no such field"),
        (["--depths", "3"], "give auto, or numbers with --n"),
        (["--measured", "none.json"], "is not what `nextn compress --json` writes"),
    ],
)
def test_what_cannot_be_budgeted_is_said_in_one_sentence(options, message, tmp_path):
    (tmp_path / "shape.json").write_text(json.dumps(TINY))
    done = CliRunner().invoke(app, ["budget", str(tmp_path / "shape.json"), *MACHINE, *options])
    assert done.exit_code == 1 and message in " ".join(done.output.split()), done.output


def test_what_some_n_cannot_have_is_left_out(asked):
    weights = "weights={preset: list, values: [0, 1, 1]}"
    found = asked(TINY, "--heads", "recurrent", "--set", weights, "--output", "shared")
    assert [each["n"] for each in found["entries"]] == [3]
    assert "is left out at n = 2, 4" in found["printed"]


def test_gemma_4_keeps_the_keys_of_some_layers_alone():
    """E2B: 15 of 35 layers have keys of their own; all but every fifth see 512 positions."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES["gemma-4-e2b"]))
        costs = costs_of(MultiTokenModel(base, MultiTokenConfig(n=2, recurrent=True)))
    assert costs.trunk_caches == ([(2 * 256 * 2, 512)] * 4 + [(2 * 512 * 2, None)]) * 3


def test_configs_that_are_none(tmp_path):
    for name, text in (("a.json", "{"), ("b.json", '{"model_type": "nonesuch"}'), ("c.json", "[]")):
        (tmp_path / name).write_text(text)
    for name in ("a.json", "b.json", "c.json", "none.json", "none"):
        done = CliRunner().invoke(app, ["budget", str(tmp_path / name), *MACHINE])
        said = " ".join(done.output.split())
        assert done.exit_code == 1 and any(
            sentence in said for sentence in ("cannot be", "is not JSON", "There is no directory")
        ), done.output


def test_short_numbers_and_fields():
    assert [short(number) for number in (0, 999, 1234, 1_050_673_152)] == ["0", "999", "1.23k", "1.05G"]
    assert fields_of(["drafter_width=256", "tap=[0, 1]"]) == {"drafter_width": 256, "tap": [0, 1]}
    assert shares_of("0.8,0.5") == [0.8, 0.5] and shares_of(None) == []
    with pytest.raises(ConfigError):
        shares_of("x")
