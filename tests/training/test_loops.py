"""Every loop that people train with gives the losses of `nextn.Trainer`, step by step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loops import LOOPS, STEPS, hand_loop, make_model

SCRIPT = Path(__file__).with_name("loops.py")


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return LOOPS["nextn"](make_model())


def assert_equal(losses: list[float], expected: list[float]) -> None:
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=0, abs=1e-5)
    assert expected[-1] < expected[0] - 0.5, "it must have learned something"


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("loop", LOOPS)
def test_loops_give_the_losses_of_the_trainer(loop, accumulate, expected):
    assert_equal(LOOPS[loop](make_model(), accumulate), expected)


def test_without_the_count_of_a_step_micro_batches_give_other_losses(expected, monkeypatch):
    """Which shows that the rows are uneven enough for the tests above to fail."""
    monkeypatch.setattr("loops.count_targets", lambda batches: len(batches) * 130)
    assert hand_loop(make_model(), 2) != pytest.approx(expected, rel=0, abs=1e-3)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loop", ["hand", *(pytest.param(loop, marks=pytest.mark.slow) for loop in list(LOOPS)[:3])])
def test_compiled_loops_give_the_same(loop, backend, expected):
    torch._dynamo.reset()
    try:
        if loop in ("nextn", "stock"):
            losses = LOOPS[loop](make_model(), torch_compile=True, torch_compile_backend=backend)
        else:
            losses = LOOPS[loop](torch.compile(make_model(), backend=backend))
    finally:
        torch._dynamo.reset()
    assert_equal(losses, expected)


@pytest.mark.slow
def test_compiled_layers_give_the_same(expected):
    model = make_model()
    model.compile_layers()
    assert_equal(hand_loop(model), expected)


@pytest.mark.parametrize("fsdp", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["DDP", "FSDP2"])
def test_two_processes_give_the_same_in_every_loop(fsdp, expected, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(SCRIPT)]
    command += [str(tmp_path / "losses.json"), *(["--fsdp"] if fsdp else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses.keys() == LOOPS.keys()
    for found in losses.values():
        assert_equal(found, expected)
