"""The command line: what it prints, what it refuses, and that a kill loses little."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from conftest import COMMON, greedy_reference, make_tokenizer
from nextn import cli
from nextn.cli import app
from nextn.data import byte_tokenizer
from nextn.lock import FileLock


def nextn(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400", "NO_COLOR": "1"})


def succeed(*words: object) -> str:
    result = nextn(*words)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    text = "the cat sat on the mat. the dog sat on the log. "
    path.write_text("".join(json.dumps({"text": text[shift:] + text[:shift]}) + "\n" for shift in range(len(text))))
    return path


OPTIONS = ("--length", 64, "--batch", 4, "--vocabulary", 32)


@pytest.fixture(scope="module")
def heads(tiny_base, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("heads")
    succeed("attach", tiny_base, "--data", data, "--out", out, "--epochs", 2, *OPTIONS)
    return out


def test_help_names_every_verb():
    text = succeed("--help")
    assert all(verb in text for verb in ("attach", "generate", "distill", "info", "demo"))


def test_generate_gives_the_plain_text_with_and_without_heads(heads, tiny_base, trained_host):
    tokenizer = make_tokenizer()
    expected = tokenizer.decode(greedy_reference(trained_host, tokenizer("the cat")["input_ids"], 12, (2,)))
    for words in ((heads,), (heads, "--heads", 1), (tiny_base, "--heads", 1)):
        result = nextn("generate", words[0], "the cat", *words[1:], "--max-new-tokens", 12, "--dtype", "float32")
        assert result.stdout == expected.removesuffix("<eos>") + "\n"
        assert "τ" in result.stderr


def test_a_seed_gives_one_text_with_and_without_heads(heads, tmp_path):
    tree = tmp_path / "tree.json"
    tree.write_text('{"paths": [[0], [1], [0, 0]]}')
    asked = ("--max-new-tokens", 12, "--dtype", "float32", "--temperature", 1.2, "--top-k", 20, "--seed", 5)
    ways = ((), ("--heads", 1), ("--depth", "all"), ("--depth", 1), ("--tree", tree))
    texts = {nextn("generate", heads, "the cat", *way, *asked).stdout for way in ways}
    assert len(texts) == 1 and len(texts.pop()) > 4


def test_without_a_seed_generate_draws_one_and_names_it(tiny_base):
    asked = ("generate", tiny_base, "the cat", "--heads", 1, "--max-new-tokens", 12, "--temperature", 3)
    first, second = nextn(*asked), nextn(*asked)
    assert first.stdout != second.stdout
    seed = first.stderr.split("seed ")[1].split()[0]
    assert nextn(*asked, "--seed", seed).stdout == first.stdout


def test_generate_prints_a_character_that_the_length_cuts(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**COMMON | {"vocab_size": 258, "eos_token_id": 256, "pad_token_id": 257})
    host, tokenizer = transformers.LlamaForCausalLM(config), byte_tokenizer()
    with torch.no_grad():  # says "😀" again and again
        for parameter in host.parameters():
            parameter.zero_()
        host.model.norm.weight.fill_(1)
        for place, byte in enumerate(emoji := list("😀".encode())):
            host.model.embed_tokens.weight[emoji[place - 1], place] = 1
            host.lm_head.weight[byte, place] = 1
        host.model.embed_tokens.weight[ord("b")] = host.model.embed_tokens.weight[emoji[-1]]
    host.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for length in (1, 3, 4, 6):
        asked = ("generate", tmp_path, "b", "--heads", 1, "--max-new-tokens", length, "--dtype", "float32")
        assert nextn(*asked).stdout == tokenizer.decode((emoji * 2)[:length]) + "\n"


def test_info_counts_what_the_file_holds(heads, tiny_base):
    found = json.loads(succeed("info", heads, "--json"))
    tensors = load_file(heads / "nextn" / "heads.safetensors")
    assert found["parts"]["all heads"] == {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    }
    assert found["heads"] == "recurrent" and found["n"] == 4
    table = succeed("info", heads)
    assert str(tiny_base) in table and "sha256:" in table and "step.layer" in table


def test_distill_skips_what_is_answered(tiny_base, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("cat", "dog", "mat" * 60)))
    words = ("distill", tiny_base, "--prompts", prompts, "--out", out, "--rows", 2, "--max-new-tokens", 5)
    text = succeed(*words)
    assert "1 prompt is too long" in text
    assert {json.loads(line)["prompt"] for line in out.read_text().splitlines()} == {"cat", "dog"}
    before = out.read_text()
    succeed(*words)
    assert out.read_text() == before


def killed_after(file: Path, command: list[str]) -> None:
    """Run a command and kill it with SIGKILL once a file is there."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "it should still be at work"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


SHAPE = ["model_type: llama", "num_hidden_layers: 4", "hidden_size: 32", "num_attention_heads: 4"]
WAYS = {
    "attach": ["attach", "--epochs", 20, "--save-steps", 10, *OPTIONS],
    "together": ["train", "--set", "heads={n: 3, recurrent: true, freeze_trunk: false, weights: {preset: deepseek}}"],
    "scratch": [
        *["train", "--set", "heads={n: 3, heads: parallel, freeze_trunk: false, weights: {preset: gloeckle}}"],
        *["--set", "scratch={" + ", ".join([*SHAPE, "intermediate_size: 64"]) + "}", "--set", "tokenizer=bytes"],
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_killed_training_goes_on_to_the_same_end(way, tiny_base, data, tmp_path):
    verb, *options = WAYS[way]
    training = {"max_steps": 60, "save_steps": 10, "bf16": False}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"length": 32, "training": training}))

    def words(out: Path) -> list[object]:
        base = {"attach": [tiny_base], "together": ["--base", tiny_base], "scratch": []}[way]
        recipe = [] if verb == "attach" else [tmp_path / "recipe.yaml"]
        return [verb, *recipe, *base, "--data", data, "--out", out, *options]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    succeed(*words(whole))
    command = [sys.executable, "-m", "nextn.cli", *map(str, words(killed))]
    killed_after(killed / "checkpoint-20" / "trainer_state.json", command)
    assert not (killed / "nextn").exists()
    assert "going on from" in succeed(*words(killed))
    for file in ("nextn/heads.safetensors",) if way == "attach" else ("nextn/heads.safetensors", "model.safetensors"):
        ours, theirs = load_file(killed / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        # What one process computes twice is the same to the last bit or nearly; attached heads are stored in bfloat16.
        bounds = {"rtol": 0.01, "atol": 1e-3} if way == "attach" else {"rtol": 0, "atol": 1e-6}
        for name in theirs:
            torch.testing.assert_close(ours[name].float(), theirs[name].float(), msg=name, **bounds)


def bad_inputs(tiny_base: Path, heads: Path, data: Path, tmp: Path) -> dict[str, tuple[list[object], str]]:
    truncated = tmp / "truncated"
    truncated.mkdir()
    for file in tiny_base.iterdir():
        (truncated / file.name).write_bytes(file.read_bytes())
    (truncated / "model.safetensors").write_bytes((tiny_base / "model.safetensors").read_bytes()[:2000])
    whole = tmp / "whole"
    shutil.copytree(truncated, whole)
    shutil.copytree(heads / "nextn", whole / "nextn")
    (tmp / "words.jsonl").write_text("hello\n")
    (tmp / "nothing.jsonl").write_text('{"text": "  "}\n')
    (tmp / "prompts.jsonl").write_text('{"prompt": "cat"}\n')
    (tmp / "file").write_text("")
    attach = ["attach", tiny_base, "--data", data, "--out", tmp / "out", *OPTIONS]
    return {
        "no such model": (["generate", tmp / "nowhere", "hi", "--heads", 1], "nowhere"),
        "truncated model": (["generate", truncated, "hi", "--heads", 1], "is truncated or damaged"),
        "no heads": (["generate", tiny_base, "hi"], "holds no heads"),
        "three heads": (["generate", heads, "hi", "--heads", 3], "--heads is 3"),
        "cold": (["generate", heads, "hi", "--temperature", -1], "temperature must be 0"),
        "no depth": (["generate", heads, "hi", "--depth", "deep"], "give a number, all or auto"),
        "too deep": (["generate", heads, "hi", "--depth", 9], "from 0 to"),
        "tree for none": (["generate", heads, "hi", "--heads", 1, "--tree", tmp / "x.json"], "reads no tree"),
        "no tree": (["generate", heads, "hi", "--tree", tmp / "x.json"], "holds no tree"),
        "tree without batch": (["bench", heads, "--tree", tmp / "x.json"], "go with --batch"),
        "rejected tree": (["bench", heads, "--batch", 1, "--tree", tmp / "x.json", "--method", "block"], "coupled"),
        "empty prompt": (["generate", heads, " "], "empty"),
        "not JSON": (
            ["attach", tiny_base, "--data", tmp / "words.jsonl", "--out", tmp / "out", *OPTIONS],
            "line 1, is not JSON",
        ),
        "no text": (
            ["attach", tiny_base, "--data", tmp / "nothing.jsonl", "--out", tmp / "out", *OPTIONS],
            "no usable text",
        ),
        "no file": (
            ["attach", tiny_base, "--data", tmp / "none.jsonl", "--out", tmp / "out", *OPTIONS],
            "no data file",
        ),
        "n = 1": ([*attach, "--n", 1], "at least 2"),
        "vocabulary": ([*attach, "--vocabulary", 65], "vocabulary has 64"),
        "length": ([*attach, "--length", 129], "reads 128 tokens"),
        "out": (["attach", tiny_base, "--data", data, "--out", tmp / "file" / "out", *OPTIONS], "cannot be written"),
        "distill out": (
            ["distill", tiny_base, "--prompts", tmp / "prompts.jsonl", "--out", tmp / "file" / "out" / "a.jsonl"],
            "cannot be written",
        ),
        "distill to a device": (
            ["distill", tiny_base, "--prompts", tmp / "prompts.jsonl", "--out", "/dev/full"],
            "no ordinary file",
        ),
        "distill to its prompts": (
            ["distill", tiny_base, "--prompts", tmp / "prompts.jsonl", "--out", tmp / "prompts.jsonl"],
            "line 1, is no answer",
        ),
        "figures over a model": (
            ["budget", tiny_base, "--bandwidth", 1, "--rate", 1, "--json", tiny_base / "config.json"],
            "is no report that nextn wrote",
        ),
        "distill without prompts": (
            ["distill", tiny_base, "--prompts", data, "--out", tmp / "a.jsonl"],
            "no record with a `prompt`",
        ),
        "info of a truncated model": (["info", whole], "truncated"),
        "info of nothing": (["info", tmp], "holds no heads"),
    }


def test_bad_input_gets_one_sentence(tiny_base, heads, data, tmp_path):
    for name, (words, says) in bad_inputs(tiny_base, heads, data, tmp_path).items():
        result = nextn(*words)
        assert result.exit_code == 1, (name, result.output)
        assert says in result.output and "Traceback" not in result.output, (name, result.output)
        said = [line for line in result.output.splitlines() if line.startswith("nextn:")]
        assert len(said) == 1 and said[0].endswith("."), (name, result.output)
    assert not (tmp_path / "out" / "recipe.json").exists(), "a run that could not start leaves the directory free"


def test_options_out_of_range_are_usage_errors(tiny_base, data, tmp_path):
    for option in (("--batch", 0), ("--epochs", 0), ("--learning-rate", 0), ("--length", 1), ("--save-steps", 0)):
        result = nextn("attach", tiny_base, "--data", data, "--out", tmp_path, *option)
        assert result.exit_code == 2 and option[0] in result.output


def test_a_terminated_command_releases_its_lock(tmp_path, monkeypatch):
    def verb() -> None:
        with FileLock(tmp_path / "answers.jsonl") as lock:
            assert lock.path.exists()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    monkeypatch.setattr(cli, "app", verb)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="143"):
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())
