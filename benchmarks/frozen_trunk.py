"""What does attached training cost a token, beside the frozen trunk's forward alone?

    python benchmarks/frozen_trunk.py                              # the bundled model, a few minutes on two cores

The trunk's forward and a whole step of attached training (trunk without a graph, heads forward and backward, loss; no
optimizer) take turns on the same blocks. The ratio of operations counts the products of weights: the trunk's layers
once; the heads' modules three times (forward, gradient of input, gradient of weight), their output twice, its table
being frozen. A step whose trunk states are there already is shown beside, and both with the heads compiled. With all
compiled, as `compile: true` in a recipe has it, the measure is a compiled trunk's forward.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import nextn
from nextn.evaluation.report import interval, machine
from nextn.formats.bundled import NAME
from nextn.formats.native import load_base


def main(
    base: Annotated[str, typer.Option(help="The model that heads are attached to.")] = NAME,
    n: Annotated[int, typer.Option(help="Predicted tokens.")] = 4,
    vocabulary: Annotated[int, typer.Option(help="Tokens that drafts can name; 0: all.")] = 8192,
    batch: Annotated[int, typer.Option(help="B.")] = 4,
    length: Annotated[int, typer.Option(help="T.")] = 512,
    steps: Annotated[int, typer.Option(help="Turns.")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Write the figures there.")] = Path("benchmarks/results/frozen_trunk.json"),
) -> None:
    output = {"kind": "trimmed", "size": vocabulary} if vocabulary else {}
    config = nextn.MultiTokenConfig(n=n, recurrent=True, output=output)

    def attach() -> nextn.MultiTokenModel:
        model = nextn.attach(load_base(base, dtype=torch.bfloat16).to(device), config).train()
        model.heads.float()
        return model

    model, heads_compiled, compiled = attach(), attach(), attach()
    for region in heads_compiled.heads.regions():
        region.compile(dynamic=False)
    compiled.compile_layers()
    torch.manual_seed(0)
    ids = torch.randint(0, vocabulary or model.trunk.vocab_size, (batch, length), device=device)
    kept = model.trunk_outputs(ids)

    def attached(model: nextn.MultiTokenModel, **given: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = model(ids, labels=ids, **given).loss
        loss.backward()

    functions: dict[str, Callable[[], object]] = {
        "trunk, forward": lambda: model.trunk_outputs(ids),
        "attached": lambda: attached(model),
        "attached, states kept": lambda: attached(model, **kept),
        "attached, heads compiled": lambda: attached(heads_compiled),
        "states kept, heads compiled": lambda: attached(heads_compiled, **kept),
        "compiled trunk, forward": lambda: compiled.trunk_outputs(ids),
        "attached, all compiled": lambda: attached(compiled),
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in track(range(steps + 2), "measuring"):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)

    layers = sum(parameter.numel() for parameter in model.trunk.layers.parameters())
    module = sum(p.numel() for p in model.heads.parameters() if p.ndim > 1)
    table = model.heads.output.operations(model.trunk)
    operations = (layers + (n - 1) * (3 * module + 2 * table)) / layers
    under = {"attached, all compiled": "compiled trunk, forward"}
    ratios = {
        name: interval([a / b for a, b in zip(spent, seconds[under.get(name, "trunk, forward")], strict=True)])
        for name, spent in seconds.items()
        if "forward" not in name
    }
    rows = Table(title=f"{base}, n = {n}, {batch} × {length} tokens, bfloat16, {device}", title_justify="left")
    for column in ("", "µs a token", "of the forward (95%)", "of operations"):
        rows.add_column(column, justify="left" if not column else "right")
    for name, spent in seconds.items():
        each = float(torch.tensor(spent).median()) / (batch * length) * 1e6
        over = ratios.get(name)
        of_operations = f"{over.value / operations:.3f}" if over and "kept" not in name else ""
        rows.add_row(name, f"{each:.0f}", over.cell(3) if over else "", of_operations)
    console = Console()
    console.print(rows)
    console.print(
        f"The operations of attached training are {operations:.3f} times the trunk's forward. What is all compiled is "
        "compared with the compiled trunk's forward, the rest with the plain one's."
    )
    found = {
        "base": base,
        "n": n,
        "vocabulary": vocabulary,
        "batch": batch,
        "length": length,
        "steps": steps,
        "device": device,
        "seconds": seconds,
        "operations": operations,
        "ratios": {
            name: {"ratio": over.value, "low": over.low, "high": over.high}
            | ({} if "kept" in name else {"over_operations": over.value / operations})
            for name, over in ratios.items()
        },
        "machine": machine(),
    }
    out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
