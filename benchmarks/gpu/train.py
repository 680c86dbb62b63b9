"""What does training with heads cost on a GPU, beside the trunk alone? Tokens a second, and memory above the weights.

    python benchmarks/gpu/train.py --out results.json                            # under 10 minutes on one H200
    python benchmarks/gpu/train.py --shape tiny --device cpu --length 64 --out /tmp/train.json    # a dry run

Random weights in bfloat16 of two real shapes, packed blocks of 2,048 tokens, forward and backward without an optimizer,
contenders in turns. Heads alone: recurrent ones on a frozen trunk, over the trunk's forward. Together: parallel
heads trained with their trunk, over the same layers with n = 1 (Gloeckle et al.: a model of equal size). The ratio of
operations counts the products of layers and unembeddings, as in `benchmarks/frozen_trunk.py` and
`benchmarks/train_step.py`. Results are written as they come.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import nextn
from nextn.evaluation.report import interval, machine
from nextn.files import replacing
from nextn.model import MultiTokenModel

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": True},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}  # fmt: skip
DEPTHS = (1, 2, 4)


def make_trunk(shape: dict[str, Any], layers: int, device: str) -> LlamaForCausalLM:
    config = LlamaConfig(**shape | {"num_hidden_layers": layers}, max_position_embeddings=4096)
    with torch.device(device):
        return LlamaForCausalLM(config).bfloat16()


def packed_blocks(batch: int, length: int, vocabulary: int, device: str) -> dict[str, torch.Tensor]:
    """Blocks of four documents each, with positions that start again."""
    ids = torch.randint(0, vocabulary, (batch, length), device=device)
    positions = torch.arange(length, device=device).remainder(-(-length // 4)).expand(batch, length)
    return {"input_ids": ids, "position_ids": positions.contiguous(), "labels": ids}


def measure(functions: dict[str, Callable[[], object]], device: str, steps: int) -> dict[str, dict[str, Any]]:
    """Seconds of each turn by contender, and bytes at the peak above those before; two turns are not counted."""
    results: dict[str, dict[str, Any]] = {name: {"seconds": [], "peak_bytes": None} for name in functions}
    for turn in track(range(steps + 2), "measuring"):
        for name, function in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
                results[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            if turn >= 2:
                results[name]["seconds"].append(time.perf_counter() - start)
    return results


def train_step(model: MultiTokenModel, batch: dict[str, torch.Tensor]) -> None:
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad(set_to_none=True)  # before memory is measured again


def heads_alone(shape: dict[str, Any], batch: int, length: int, device: str, steps: int) -> list[dict[str, Any]]:
    """Recurrent heads of n tokens on one frozen trunk, over its forward."""
    trunk = make_trunk(shape, shape["num_hidden_layers"], device)
    blocks = packed_blocks(batch, length, shape["vocab_size"], device)
    models = {n: nextn.attach(trunk, nextn.MultiTokenConfig(n=n, recurrent=True)).train() for n in DEPTHS[1:]}
    inputs = {name: blocks[name] for name in ("input_ids", "position_ids")}
    functions: dict[str, Callable[[], object]] = {"trunk, forward": lambda: models[2].trunk_outputs(**inputs)}
    functions |= {f"n = {n}": lambda model=model: train_step(model, blocks) for n, model in models.items()}
    measured, rows = measure(functions, device, steps), []
    layers = sum(parameter.numel() for parameter in models[2].trunk.layers.parameters())
    rows.append(row("trunk, forward", 1, measured["trunk, forward"], measured["trunk, forward"], 1.0, batch * length))
    for n, model in models.items():
        module = sum(parameter.numel() for parameter in model.heads.parameters() if parameter.ndim > 1)
        table = model.heads.output.operations(model.trunk)
        operations = (layers + (n - 1) * (3 * module + 2 * table)) / layers
        rows.append(row("heads alone", n, measured[f"n = {n}"], measured["trunk, forward"], operations, batch * length))
    return rows


def together(shape: dict[str, Any], batch: int, length: int, device: str, steps: int) -> list[dict[str, Any]]:
    """Parallel heads of n tokens trained with a trunk of n - 1 layers less, over n = 1."""
    blocks, layers = packed_blocks(batch, length, shape["vocab_size"], device), shape["num_hidden_layers"]
    a_layer = sum(p.numel() for p in make_trunk(shape, 1, "meta").model.layers.parameters() if p.ndim > 1)
    models = {}
    for n in DEPTHS:  # n = 1: heads without a weight, which are not run
        weights = {"preset": "gloeckle"} if n > 1 else {"preset": "list", "values": [1.0, 0.0]}
        config = nextn.MultiTokenConfig(n=max(n, 2), heads="parallel", freeze_trunk=False, weights=weights)
        models[n] = nextn.attach(make_trunk(shape, layers - (n - 1), device), config).train()
    functions = {f"n = {n}": (lambda model=model: train_step(model, blocks)) for n, model in models.items()}
    measured = measure(functions, device, steps)
    unembedding = shape["hidden_size"] * shape["vocab_size"]
    return [
        row(
            "together", n, measured[f"n = {n}"], measured["n = 1"],
            (layers * a_layer + n * unembedding) / (layers * a_layer + unembedding), batch * length,
        )
        for n in DEPTHS
    ]  # fmt: skip


def row(
    what: str, n: int, measured: dict[str, Any], under: dict[str, Any], operations: float, tokens: int
) -> dict[str, Any]:
    ratio = interval([a / b for a, b in zip(measured["seconds"], under["seconds"], strict=True)])
    return {
        "what": what,
        "n": n,
        "tokens_per_second": tokens / interval(measured["seconds"]).value,
        "peak_gib": None if measured["peak_bytes"] is None else measured["peak_bytes"] / 2**30,
        "ratio": list(ratio),
        "operations": operations,
        "over_operations": ratio.value / operations,
    }


def main(
    out: Annotated[Path, typer.Option(help="Write the figures there.")],
    shape: Annotated[list[str], typer.Option(help=f"{', '.join(SHAPES)}; repeatable.")] = ["135m", "1.5b"],  # noqa: B006
    batch: Annotated[int, typer.Option(help="Blocks.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens in a block.")] = 2048,
    steps: Annotated[int, typer.Option(help="Turns.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
) -> None:
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in shape:
        for measured in (heads_alone, together):
            rows += [{"shape": name} | each for each in measured(SHAPES[name], batch, length, device, steps)]
            with replacing(out) as part:
                settings = {"batch": batch, "length": length, "steps": steps, "device": device}
                part.write_text(json.dumps(settings | {"rows": rows, "machine": machine()}, indent=2) + "\n")
    table = Table("shape", "", "n", "tokens/s", "GiB above", "ratio", "operations", "ratio / operations")
    for each in rows:
        peak = "–" if each["peak_gib"] is None else f"{each['peak_gib']:.1f}"
        figures = [f"{each['tokens_per_second']:,.0f}", peak, f"{each['ratio'][0]:.3f}"]
        figures += [f"{each['operations']:.3f}", f"{each['over_operations']:.3f}"]
        table.add_row(each["shape"], each["what"], str(each["n"]), *figures)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
