"""How much memory does the loss of n depths take, beside the naive one and TRL's chunked one?

    python benchmarks/loss_memory.py                      # all points, some minutes on two cores
    python benchmarks/loss_memory.py --n 1 --n 4 --positions 1024 --vocabulary 8192:256

Forward and backward of the loss alone, each point in a fresh process: the peak over what was there before (states,
table), in MiB. All depths read one leaf tensor [N, D], so that nothing but the loss is measured; with *own states* each
depth has a leaf of its own, whose gradient [N, D] counts as well. The naive loss keeps the logits of all depths until
the backward; a point that needs more memory than there is free is not run, and says so. TRL's is measured where it is
installed, its function called once a depth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from nextn.evaluation.report import machine
from nextn.losses import CHUNK, Depth, depth_losses
from nextn.output import SharedOutput

MIB = 1 << 20
ALIKE = ("kind", "vocabulary", "width")  # rows of which the first is n = 1
KINDS = {"ours": "nextn", "ours, own states": "nextn, own states", "trl": "TRL", "naive": "naive"}


def ours(states: list[Tensor], table: nn.Linear, targets: list[Tensor]) -> Tensor:
    trunk: Any = SimpleNamespace(unembedding=table, dtype=table.weight.dtype, vocab_size=table.out_features)
    batched = {state: state[None] for state in states}  # one leaf stays one tensor
    depths = [Depth(batched[state], target[None], 1.0) for state, target in zip(states, targets, strict=True)]
    return depth_losses(trunk, SharedOutput(), depths).total


def naive(states: list[Tensor], table: nn.Linear, targets: list[Tensor]) -> Tensor:
    pairs = zip(states, targets, strict=True)
    return sum(F.cross_entropy(table(state).float(), target, reduction="sum") for state, target in pairs)


def trl(states: list[Tensor], table: nn.Linear, targets: list[Tensor]) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    pairs = zip(states, targets, strict=True)
    chunked = (
        ChunkedLogProbFunction.apply(state, table.weight, None, target, 1.0, 16_384, None, 1.0, ())[0]
        for state, target in pairs
    )
    return -sum(logprobs.sum() for logprobs in chunked)


def measure(kind: str, n: int, positions: int, vocabulary: int, width: int, device: str) -> dict[str, float]:
    """Peak MiB over what was there before, and seconds, of one forward and backward in this process."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    table = nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype)
    leaves = n if "own states" in kind else 1
    states = [torch.randn(positions, width, device=device, dtype=dtype).requires_grad_() for _ in range(leaves)]
    targets = [torch.randint(0, vocabulary, (positions,), device=device) for _ in range(n)]
    if leaves == 1:
        states = states * n
    function = {"ours": ours, "naive": naive, "trl": trl}[kind.split(",")[0]]
    function([state[:64] for state in states[:1]], table, [targets[0][:64]]).backward()  # load kernels
    table.weight.grad = None
    for state in states:
        state.grad = None
    before = _reset_peak(device)
    start = time.perf_counter()
    function(states, table, targets).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"mib": (_peak(device) - before) / MIB, "seconds": time.perf_counter() - start}


def _reset_peak(device: str) -> int:
    """Forget the peak so far; the bytes that are in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _free(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def _naive_bytes(n: int, positions: int, vocabulary: int) -> int:
    return n * positions * vocabulary * (2 + 4 + 4)  # logits, as float32, log-softmax; the backward needs more yet


def main(
    n: Annotated[list[int] | None, typer.Option(help="Depths; repeatable. Default: 1 2 4 8.")] = None,
    vocabulary: Annotated[
        list[str] | None, typer.Option(help="tokens:width; repeatable. Default: 49152:576 and 151936:896.")
    ] = None,
    peer_n: Annotated[list[int] | None, typer.Option(help="Depths of the peers. Default: as --n.")] = None,
    positions: Annotated[int, typer.Option(help="B·T.")] = 8192,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Write the figures there.")] = Path("benchmarks/results/loss_memory.json"),
    point: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    if point is not None:
        kind, depths, tokens, width = json.loads(point)
        print(json.dumps(measure(kind, depths, positions, tokens, width, device)))
        return
    sizes = [tuple(int(part) for part in size.split(":")) for size in vocabulary or ["49152:576", "151936:896"]]
    kinds = [kind for kind in KINDS if kind != "trl" or find_spec("trl")]
    ours_n = n or [1, 2, 4, 8]
    points = [
        (kind, depths, *size)
        for size in sizes
        for kind in kinds
        for depths in (ours_n if kind.startswith("ours") else peer_n or ours_n)
    ]
    rows = []
    for kind, depths, tokens, width in track(points, "measuring"):
        row: dict[str, Any] = {"kind": KINDS[kind], "n": depths, "vocabulary": tokens, "width": width}
        if kind == "naive" and (needed := _naive_bytes(depths, positions, tokens)) > _free(device):
            rows.append(row | {"mib": None, "seconds": None, "needs_at_least_mib": needed / MIB})
            continue
        given = json.dumps([kind, depths, tokens, width])
        command = [sys.executable, __file__, "--point", given, "--positions", str(positions), "--device", device]
        # Without it, glibc keeps some 64 MiB that were freed.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{kind}, n = {depths}, {tokens} tokens: {done.stderr.strip().splitlines()[-1]}")
        rows.append(row | json.loads(done.stdout))
    table = Table(title=f"peak of the loss alone, {positions:,} positions, bfloat16, {device}", title_justify="left")
    for column in ("vocabulary × width", "loss", "n", "MiB", "of n = 1", "seconds"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for row in rows:
        same = [each["mib"] for each in rows if [each[key] for key in ALIKE] == [row[key] for key in ALIKE]]
        row["of_n_1"] = row["mib"] / same[0] if row["mib"] and same[0] else None
        figures = (
            (f"{row['mib']:,.0f}", f"{row['of_n_1']:.2f}" if row["of_n_1"] else "–", f"{row['seconds']:.1f}")
            if row["mib"]
            else (f"over {row['needs_at_least_mib']:,.0f}", "not run", "–")
        )
        table.add_row(f"{row['vocabulary']:,} × {row['width']}", row["kind"], str(row["n"]), *figures)
    Console().print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {"positions": positions, "logits_at_a_time": CHUNK, "dtype": "bfloat16", "device": device, "rows": rows}
    out.write_text(json.dumps(found | {"machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
