"""One process and two (FSDP2 or data parallelism, over gloo) train the same model, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import make_host, make_tokenizer
from nextn.recipe import Recipe, train

LINE = "the cat sat on the mat. the dog sat on the log. "
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


@pytest.mark.parametrize(
    ("heads", "schedule", "fsdp"),
    [
        ({"freeze_trunk": False, "weights": {"preset": "deepseek"}}, {"start": 0.5}, False),
        pytest.param({}, {"curriculum": "forward"}, False, marks=pytest.mark.slow),
        pytest.param(
            {"freeze_trunk": False, "weights": {"preset": "list", "values": [1.0, 0.5, 0.0]}},
            {"curriculum": "reverse"},
            False,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"freeze_trunk": False, "weights": {"preset": "deepseek"}}, {"start": 0.5}, True, marks=pytest.mark.slow
        ),
    ],
    ids=["start", "curriculum", "weight of 0", "FSDP2"],
)
def test_depths_without_a_weight_train_with_checkpointing_in_two_processes(heads, schedule, fsdp, tmp_path):
    base = tmp_path / "base"
    make_host("llama").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    (tmp_path / "data.txt").write_text(LINE * 60)
    stated = {
        "base": str(base),
        "heads": {"n": 3, **heads},
        "data": [str(tmp_path / "data.txt")],
        "length": 64,
        "validation": None,
        "schedule": schedule,
        "training": {
            "max_steps": 4,
            "save_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": True,
            "weight_decay": 0.1,  # a gradient of zeros would decay what has no gradient
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    one = train(Recipe(**stated), tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(stated))
    script = str(Path(__file__).with_name("fsdp_on_cpu.py"))
    command = [*TORCHRUN, script, "train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "two")]
    command.append("--set=training.per_device_train_batch_size=2")
    if fsdp:
        shards = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        command += ["--set=training.fsdp=true", f"--set=training.fsdp_config={json.dumps(shards)}"]

    def launch() -> str:
        wide = os.environ | {"COLUMNS": "400"}  # so that no message is broken into lines
        done = subprocess.run(command, env=wide, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return " ".join(done.stdout.split())

    def result() -> dict[str, torch.Tensor]:
        return load_file(tmp_path / "two" / "nextn" / "heads.safetensors")

    launch()
    two = result()
    for name, tensor in one.heads.state_dict().items():
        bounds = {"rtol": 2**-7, "atol": 1e-3} if one.multi_token.freeze_trunk else {"rtol": 0, "atol": 1e-4}
        torch.testing.assert_close(two[name].to(tensor.dtype), tensor, msg=name, **bounds)

    last = tmp_path / "two" / "checkpoint-4"
    sums = json.loads((last / "checksums.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= sums.keys(), "files of both processes"
    (last / "rng_state_1.pth").write_bytes(b"")
    (tmp_path / "two" / "finished.json").unlink()
    said = launch()
    assert "checkpoint-4 is passed over: its rng_state_1.pth is missing or damaged" in said
    assert "checkpoint-2" in said.partition("going on from")[2]
    for name, tensor in result().items():
        assert torch.equal(tensor, two[name]), name


# An unembedding of its own, and one tied to the embedding; trunk and heads together, and heads alone.
@pytest.mark.parametrize(
    ("family", "frozen", "stored"),
    [
        ("llama", False, "FULL_STATE_DICT"),
        ("qwen3", False, "SHARDED_STATE_DICT"),
        ("llama", True, "SHARDED_STATE_DICT"),
        ("llama", False, None),
    ],
)
def test_two_processes_train_what_one_does(family, frozen, stored, tmp_path):
    base = tmp_path / "base"
    make_host(family).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    line = "the cat sat on the mat. the dog sat on the log. "
    lines = [json.dumps({"text": line[shift:] + line[:shift]}) for shift in range(len(line))]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    recipe = {
        "base": str(base),
        "heads": {"n": 3, "recurrent": True, "freeze_trunk": frozen, "weights": {"preset": "deepseek"}},
        "data": [str(tmp_path / "data.jsonl")],
        "length": 64,
        "training": {
            "max_steps": 4,
            "save_total_limit": 9,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "save_steps": 2,
            "bf16": False,
            "use_cpu": True,
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sharded = {"version": 2, "transformer_layer_cls_to_wrap": [type(make_host(family).model.layers[0]).__name__]}
    launches = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
    }
    options = {
        "one": [],
        "two": [
            "--set=training.per_device_train_batch_size=2",
        ],
    }
    if stored:
        options["two"] += [
            "--set=training.fsdp=true",
            f"--set=training.fsdp_config={json.dumps(sharded | {'state_dict_type': stored})}",
        ]

    def launch(name: str, out: str) -> subprocess.CompletedProcess[str]:
        command = [
            *launches[name],
            str(Path(__file__).with_name("fsdp_on_cpu.py")),
            "train",
            str(tmp_path / "recipe.yaml"),
            "--out",
            str(tmp_path / out),
        ]
        return subprocess.run([*command, *options[name]], capture_output=True, text=True, timeout=600, check=False)

    def run(name: str, out: str) -> str:
        done = launch(name, out)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"parameters are {'DTensor' if name == 'two' and stored else 'Tensor'}" in done.stdout
        return done.stdout

    run("one", "one")
    run("two", "two")
    files = ["nextn/heads.safetensors"] if frozen else ["model.safetensors", "nextn/heads.safetensors"]
    for file in files:
        one, two = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        assert one.keys() == two.keys()
        for tensor in one:  # sums come in another order, and Adam divides by small roots: 1e-4 at a rate of 1e-3
            # heads of a frozen base are stored in bfloat16, under FSDP in float32
            bounds = {"rtol": 2**-7, "atol": 1e-3} if frozen else {"rtol": 0, "atol": 1e-4}
            torch.testing.assert_close(one[tensor].to(two[tensor].dtype), two[tensor], msg=tensor, **bounds)
    resumed = tmp_path / "resumed"  # killed after step 2
    shutil.copytree(tmp_path / "two" / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(tmp_path / "two" / "recipe.json", resumed)
    assert "going on from" in run("two", "resumed")
    for file in files:
        whole, again = load_file(tmp_path / "two" / file), load_file(resumed / file)
        assert whole.keys() == again.keys()
        for name, tensor in again.items():
            assert torch.equal(tensor, whole[name]), name
    if frozen:
        alone = tmp_path / "alone"  # without FSDP its checkpoint would be another training
        shutil.copytree(tmp_path / "two" / "checkpoint-2", alone / "checkpoint-2")
        done = launch("one", "alone")
        assert done.returncode == 1 and "was written with FSDP" in " ".join(done.stderr.split())
        return
    moved = load_file(tmp_path / "two" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert any(not torch.equal(moved[name], before[name]) for name in before)
