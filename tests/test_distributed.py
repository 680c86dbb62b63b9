"""One process and two (FSDP2 or data parallelism, over gloo) train the same model, through the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import make_host, make_tokenizer


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
