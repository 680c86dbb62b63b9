"""What does one step cost on a GPU? Random weights of real shapes, replayed acceptance, several batches.

    python benchmarks/gpu/step.py --out results.json
    python benchmarks/gpu/step.py --shape tiny --batch 1 --batch 2 --device cpu --out /tmp/step.json    # a dry run

Speed does not depend on the values of weights, and acceptance is replayed, so random weights show what real ones would.
For each shape and batch: our plain engine, our engine with heads at several τ, and transformers.generate, against the
time that reading the weights once takes. Results are written as they come. Not run on a GPU yet; a text begins with
new caches, so each run captures its CUDA graphs anew, and that is in its time.
"""

from __future__ import annotations

import json
import time
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import nextn
from nextn.decoding.engine import Engine
from nextn.evaluation.replay import read_trace, replaying
from nextn.evaluation.report import machine
from nextn.evaluation.roofline import bound, measure_machine, step_cost

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": True},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
PROMPT = 64


def timed(engine: Engine, prompts: list[list[int]], new: int) -> dict[str, float]:
    """Tokens a second and ms a step, prefill left out of the latter; the better of two runs after one to warm up."""
    best: dict[str, float] = {"tokens_per_second": 0.0}
    step, steps = engine.verify, 0

    def counted(*inputs: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*inputs)

    engine.verify = counted
    for _ in range(3):
        steps = 0
        start = time.perf_counter()
        results = [result for _, result in engine.generate(prompts, new)]
        seconds = time.perf_counter() - start
        speed = sum(len(result.tokens) for result in results) / seconds
        if speed > best["tokens_per_second"]:
            best = {"tokens_per_second": speed, "step_ms": 1e3 * (seconds - engine.seconds["prefill"]) / steps}
    engine.verify = step
    return best


def transformers_speed(host: Any, prompts: list[list[int]], new: int) -> float:
    """Tokens a second of `generate`, the better of two runs after one to warm up."""
    ids = torch.tensor(prompts, device=host.device)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        host.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        best = max(best, new * len(prompts) / (time.perf_counter() - start))
    return best


def measure(shape: str, batch: int, taus: list[float], new: int, device: str, eager: bool) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    with torch.device(device):
        host = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=2048)).to(torch.bfloat16).eval()
    size = min(8192, host.config.vocab_size // 2)
    output = {"kind": "trimmed", "size": size}
    model = nextn.attach(host, nextn.MultiTokenConfig(n=4, heads="sequential", recurrent=True, output=output)).eval()
    prompts = torch.randint(3, host.config.vocab_size, (batch, PROMPT)).tolist()
    engines = [model.engine(rows=batch, heads=heads, stop_tokens=[]) for heads in (1, None)]
    if not eager:
        engines = [engine.compile() for engine in engines]
    plain, drafting = engines
    row: dict[str, Any] = {
        "shape": shape,
        "batch": batch,
        "compiled": drafting.code is not None,
        "plain": timed(plain, prompts, new),
    }
    verify = drafting.verify
    for tau in taus:
        drafting.verify = replaying(verify, cycle(read_trace(str(tau), 3)[0]))
        row[f"tau {tau}"] = timed(drafting, prompts, new)
    row["transformers"] = {"tokens_per_second": transformers_speed(host, prompts, new)}
    costs = {"plain": step_cost(plain), "drafting": step_cost(drafting)}
    limits = measure_machine(torch.bfloat16, min(costs["drafting"]["weight_bytes"], 2**33), device)
    row["weights_once_ms"] = 1e3 * bound(costs["plain"], limits, 0)["by_bytes"]
    row["step_over_weights_once"] = row[f"tau {taus[0]}"]["step_ms"] / row["weights_once_ms"]
    return row | {"limits": limits}


def main(
    out: Annotated[Path, typer.Option(help="Where the figures are written as JSON, as they come.")],
    shape: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SHAPES)}; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Rows; repeatable.")] = None,
    tau: Annotated[list[float] | None, typer.Option(help="Replayed τ; repeatable.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens a prompt.")] = 128,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile.")] = False,
) -> None:
    taus = tau or [2.0, 2.8, 3.5]
    rows: list[dict[str, Any]] = []
    table = Table(title="tokens per second; step over the time to read the weights once", title_justify="left")
    for column in ("shape", "batch", "plain", *(f"τ {tau}" for tau in taus), "transformers", "step / weights"):
        table.add_column(column, justify="right")
    for name in shape or ["smollm2", "1b", "7b"]:
        for many in batch or [1, 8, 32, 128]:
            row = measure(name, many, taus, new_tokens, device, eager)
            rows.append(row)
            out.write_text(json.dumps({"rows": rows, "machine": machine()}, indent=2) + "\n")
            ways = ("plain", *(f"tau {tau}" for tau in taus), "transformers")
            speeds = (f"{row[way]['tokens_per_second']:,.0f}" for way in ways)
            table.add_row(name, str(many), *speeds, f"{row['step_over_weights_once']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
