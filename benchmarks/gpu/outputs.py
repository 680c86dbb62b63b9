"""What does each output cost a draft on a GPU? A 7B shape with a vocabulary of 151,936 tokens, random weights.

    python benchmarks/gpu/outputs.py --out outputs.json
    python benchmarks/gpu/outputs.py --shape tiny --device cpu --out /tmp/outputs.json    # a dry run

The time of a draft does not depend on the values of weights. For each output and batch: all drafts of one step by
recurrent heads (n = 4), outputs in turn; captured as a CUDA graph where that can be, and `captured` says so for each.
Results are written as they come. Not run on a GPU yet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from nextn.config import MultiTokenConfig, OutputConfig
from nextn.decoding.building import example
from nextn.evaluation.costs import stored_bytes
from nextn.evaluation.report import interval, machine
from nextn.model import MultiTokenModel

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 151936},
}  # fmt: skip
OUTPUTS = {
    "tiny": ["shared", "trimmed:256", "low_rank:8", "clustered:32:4"],
    "7b": ["shared", "separate", "trimmed:8192", "trimmed:32768", "low_rank:256", "low_rank:512", "clustered:1187:16",
           "clustered:1187:64"],
}  # fmt: skip
TURNS = 50


def step_of(model: MultiTokenModel, batch: int) -> tuple[Callable[[], Any], bool]:
    """One call makes all drafts of a step; and whether it is a CUDA graph."""
    engine = model.engine(batch, stop_tokens=[])
    targets, accepted, _, _, tapped, positions = engine.verify(*example(engine, engine.n - 1))
    rows = torch.arange(batch, device=model.trunk.device)
    return _graphed(lambda: engine.drafter.propose(tapped, positions, targets, accepted, rows))


def _graphed(function: Callable[[], Any]) -> tuple[Callable[[], Any], bool]:
    if not torch.cuda.is_available():
        return function, False
    try:
        function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:  # some step reads a number back: it is timed as it is
        return function, False
    return graph.replay, True


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def main(
    out: Annotated[Path, typer.Option(help="Where the figures go.")],
    shape: Annotated[str, typer.Option(help="7b or tiny.")] = "7b",
    batch: Annotated[list[int], typer.Option(help="Rows; repeatable.")] = (1, 32),  # type: ignore[assignment]
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
) -> None:
    with torch.device(device):
        base = Qwen2ForCausalLM._from_config(Qwen2Config(**SHAPES[shape]), dtype=torch.bfloat16).eval()
        models = {
            stated: MultiTokenModel(
                base, MultiTokenConfig(n=4, recurrent=True, output=OutputConfig.parse(stated))
            ).eval()
            for stated in OUTPUTS[shape]
        }
    found: dict[str, Any] = {"shape": shape, "machine": machine(), "batches": {}}
    for rows in batch:
        steps = {stated: step_of(model, rows) for stated, model in models.items()}
        spent: dict[str, list[float]] = {stated: [] for stated in steps}
        for turn in range(TURNS + 3):
            for stated, (step, _) in steps.items():
                took = timed(step)
                if turn >= 3:
                    spent[stated].append(took)
        shared = spent["shared"]
        found["batches"][rows] = {
            stated: {
                "draft_ms": interval(times),
                "over_shared": interval([mine / theirs for mine, theirs in zip(times, shared, strict=True)]),
                "bytes": stored_bytes(models[stated].heads),
                "captured": steps[stated][1],
            }
            for stated, times in spent.items()
        }
        out.write_text(json.dumps(found, indent=2) + "\n")
        table = Table(
            title=f"{shape}, batch {rows}: the drafts of a step, n = 4", title_justify="left", box=SIMPLE_HEAD
        )
        for column in ("output", "ms", "over shared", "captured"):
            table.add_column(column)
        for stated, row in found["batches"][rows].items():
            table.add_row(
                stated,
                f"{row['draft_ms'][0]:.3f}",
                row["over_shared"].cell(3),
                str(row["captured"]),
            )
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
