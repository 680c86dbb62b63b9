"""What does a training step with n heads cost beside one without, at equal size, and beside transformers' own?

    python benchmarks/train_step.py                                # two vocabularies, a few minutes on two cores
    python benchmarks/train_step.py --layers 4 --steps 3           # a quick look

A Llama of L layers from random weights: with n = 4, three of the layers are parallel heads (Gloeckle et al.), so both
have the same parameters. A step is forward and backward in bfloat16 under autocast, without the optimizer, which costs
the same; contenders take turns, and the figures are medians of their ratios with 95% intervals (bootstrap over turns).
The ratio of operations counts the products of layers and unembeddings; attention is equal.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import nextn
from nextn.evaluation.report import Interval, interval, machine
from nextn.model import MultiTokenModel


def shape(vocabulary: int, width: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def build(n: int, vocabulary: int, width: int, layers: int) -> MultiTokenModel:
    """A model of `layers` layers in all; for n = 1 its heads have no weight, and are not run."""
    torch.manual_seed(0)
    trunk = layers if n == 1 else layers - (n - 1)
    weights = {"preset": "list", "values": [1.0, 0.0]} if n == 1 else {"preset": "gloeckle"}
    config = nextn.MultiTokenConfig(n=max(n, 2), heads="parallel", freeze_trunk=False, weights=weights)
    return nextn.attach(LlamaForCausalLM(shape(vocabulary, width, trunk)), config).train()


def operations(n: int, vocabulary: int, width: int, layers: int) -> float:
    """Multiplications a token in the products of layers and unembeddings, forward."""
    inner = width * 11 // 4
    return layers * (4 * width * width + 3 * width * inner) + n * width * vocabulary


def main(
    n: Annotated[int, typer.Option(help="Predicted tokens.")] = 4,
    layers: Annotated[int, typer.Option(help="L, heads included.")] = 12,
    width: Annotated[int, typer.Option(help="D.")] = 512,
    batch: Annotated[int, typer.Option(help="B.")] = 4,
    length: Annotated[int, typer.Option(help="T.")] = 512,
    steps: Annotated[int, typer.Option(help="Turns.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Write the figures there.")] = Path("benchmarks/results/train_step.json"),
) -> None:
    rows = []
    for vocabulary in (258, 49_152):
        models: dict[str, Any] = {
            "transformers": LlamaForCausalLM(shape(vocabulary, width, layers)).train(),
            "n = 1": build(1, vocabulary, width, layers),
            f"n = {n}": build(n, vocabulary, width, layers),
        }
        ids = torch.randint(0, vocabulary, (batch, length), device=device)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in track(range(steps + 2), f"{vocabulary:,} tokens"):
            for name, model in models.items():
                spent = step(model.to(device), ids)
                if turn >= 2:  # kernels and memory are warm
                    seconds[name].append(spent)
        ratio = operations(n, vocabulary, width, layers) / operations(1, vocabulary, width, layers)
        for over, under in ((f"n = {n}", "n = 1"), ("n = 1", "transformers")):
            ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
            median, low, high = interval(ratios)
            rows.append(
                {
                    "vocabulary": vocabulary,
                    "over": over,
                    "under": under,
                    "ratio": median,
                    "low": low,
                    "high": high,
                    "operations": ratio if under == "n = 1" else 1.0,
                    "seconds": [float(torch.tensor(seconds[name]).median()) for name in (over, under)],
                }
            )
    table = Table(title=f"a step, L = {layers}, D = {width}, {batch} × {length} tokens, {device}", title_justify="left")
    for column in ("vocabulary", "step", "seconds", "ratio, 95%", "operations", "ratio / operations"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['vocabulary']:,}",
            f"{row['over']} / {row['under']}",
            " / ".join(f"{each:.3f}" for each in row["seconds"]),
            Interval(row["ratio"], row["low"], row["high"]).cell(3),
            f"{row['operations']:.3f}",
            f"{row['ratio'] / row['operations']:.3f}",
        )
    Console().print(table)
    found = {"layers": layers, "width": width, "batch": batch, "length": length, "steps": steps, "device": device}
    out.write_text(json.dumps(found | {"rows": rows, "machine": machine()}, indent=2) + "\n")


def step(model: Any, ids: torch.Tensor) -> float:
    """Seconds of one forward and backward."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
