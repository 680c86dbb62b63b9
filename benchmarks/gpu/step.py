"""What does drafting bring on a GPU? Models of real shapes with replayed acceptance, or real heads on real prompts.

    python benchmarks/gpu/step.py --out results.json
    python benchmarks/gpu/step.py --model smollm2-135m-instruct --prompts prompts.jsonl --out results.json
    python benchmarks/gpu/step.py --model tiny --batch 1 --batch 2 --device cpu --out /tmp/step.json    # a dry run

Speed does not depend on the values of weights, so where acceptance is replayed random weights show what real ones
would. For each model and batch: our plain engine, our engine with heads at several τ (and, with real heads, at their
own), in turns, and transformers.generate; and what a step takes against the time that reading the weights once takes.
Each model and batch has a process of its own, so that all compile side by side; when the last one has, they measure one
after the other. Results are written as they come.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from threading import BrokenBarrierError
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

import nextn
from nextn.decoding.engine import Engine
from nextn.evaluation.acceptance import Acceptance
from nextn.evaluation.bench import Settings, read
from nextn.evaluation.replay import read_trace, replaying
from nextn.evaluation.report import interval, machine
from nextn.evaluation.roofline import bound, measure_machine, step_cost
from nextn.formats.native import base_of
from nextn.model import MultiTokenModel

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip
PROMPT = 64  # tokens, of models with random weights
REPEATS = 3


def model_of(name: str, device: str) -> MultiTokenModel:
    """A shape with random weights, or a saved model; bfloat16."""
    if name not in SHAPES:
        return nextn.load(name, dtype=torch.bfloat16).to(device).eval()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=2048)
    with torch.device(device):
        host = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    output = {"kind": "trimmed", "size": min(8192, config.vocab_size // 2)}
    return nextn.attach(host, nextn.MultiTokenConfig(n=4, heads="sequential", recurrent=True, output=output)).eval()


def engines_of(model: MultiTokenModel, batch: int, eager: bool) -> tuple[Engine, Engine]:
    """The plain one, and the one with heads."""
    engines = [model.engine(rows=batch, heads=heads, stop_tokens=[]) for heads in (1, None)]
    if not eager:
        engines = [engine.compile(progress=lambda message: nullcontext()) for engine in engines]
    return engines[0], engines[1]


def timed(engine: Engine, prompts: list[list[int]], new: int) -> dict[str, float]:
    """Of one run: tokens a second, with prompts and without them, ms a step, and τ."""
    start = time.perf_counter()
    results = [result for _, result in engine.generate(prompts, new)]
    seconds = time.perf_counter() - start
    tokens, steps = sum(len(result.tokens) for result in results), sum(engine.steps.values())
    decoding = seconds - engine.seconds["prefill"]
    return {
        "tokens_per_second": tokens / seconds,
        "decoding_tokens_per_second": tokens / decoding,
        "step_ms": 1e3 * decoding / steps,
        "draft_ms": 1e3 * engine.seconds["draft"] / steps,
        "tau": Acceptance.of(results, engine.n).tau if engine.n > 1 else 1.0,
    }


def in_turns(runs: dict[str, Callable[[], dict[str, float]]]) -> dict[str, Any]:
    """Each of them once to warm up, and then in turns; ratios are to `plain` of the same turn."""
    for run in runs.values():
        run()
    turns = [{way: run() for way, run in runs.items()} for _ in range(REPEATS)]
    found: dict[str, Any] = {}
    for way in runs:
        found[way] = {name: interval([turn[way][name] for turn in turns]).value for name in turns[0][way]}
        for name in ("tokens_per_second", "decoding_tokens_per_second"):
            found[way][f"{name}_over_plain"] = interval(
                [turn[way][name] / turn["plain"][name] for turn in turns]
            )._asdict()
    return found


def transformers_speed(host: Any, prompts: list[list[int]], new: int) -> float:
    """Tokens a second of `generate`, after one run to warm up."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones(len(prompt)) for prompt in prompts], batch_first=True, padding_side="left").long()
    given = {"attention_mask": mask.to(host.device), "do_sample": False, "pad_token_id": 0}
    start = 0.0
    for count in (8, new):
        start = time.perf_counter()
        host.generate(ids.to(host.device), max_new_tokens=count, min_new_tokens=count, **given)
    return new * len(prompts) / (time.perf_counter() - start)


@dataclass
class Job:
    """A model with so many rows, and what is measured of it."""

    name: str
    batch: int
    taus: list[float]
    prompts: Path | None
    new: int
    device: str
    eager: bool

    def texts(self, model: MultiTokenModel) -> list[list[int]]:
        """A prompt for each row."""
        if self.name in SHAPES:
            return torch.randint(3, model.trunk.vocab_size, (self.batch, PROMPT)).tolist()
        known = read(Settings(model=self.name, prompts=self.prompts), base_of(self.name), Console(stderr=True))
        return [prompt.ids for prompt in islice(cycle(known), self.batch)]


def work(job: Job, all_compiled: Any, turn: Any, found: Any) -> None:
    """Compile, wait until all have, and measure in turn."""
    start = time.perf_counter()
    model = model_of(job.name, job.device)
    engines = engines_of(model, job.batch, job.eager)
    seconds = time.perf_counter() - start
    with suppress(BrokenBarrierError):  # another one failed: its row will be missing
        all_compiled.wait()
    with turn:
        row = {"model": job.name, "batch": job.batch, "seconds_to_compile": seconds}
        found.put(row | measure(model, engines, job))


def measure(model: MultiTokenModel, engines: tuple[Engine, Engine], job: Job) -> dict[str, Any]:
    """One row of the table."""
    (plain, drafting), prompts, new = engines, job.texts(model), job.new
    verify = drafting.verify

    def at(tau: float) -> dict[str, float]:
        drafting.verify = replaying(verify, cycle(read_trace(str(tau), drafting.n - 1)[0]))
        return timed(drafting, prompts, new)

    def at_its_own() -> dict[str, float]:
        drafting.verify = verify
        return timed(drafting, prompts, new)

    runs: dict[str, Callable[[], dict[str, float]]] = {"plain": lambda: timed(plain, prompts, new)}
    runs |= {f"tau {tau}": lambda tau=tau: at(tau) for tau in job.taus}
    if job.name not in SHAPES:
        runs["heads"] = at_its_own
    row: dict[str, Any] = {"compiled": drafting.code is not None and plain.code is not None} | in_turns(runs)
    row["transformers"] = {"tokens_per_second": transformers_speed(model.base, prompts, min(new, 64))}
    costs = {"plain": step_cost(plain), "drafting": step_cost(drafting)}
    limits = measure_machine(torch.bfloat16, min(costs["drafting"]["weight_bytes"], 2**31), job.device)
    row["weights_once_ms"] = 1e3 * bound(costs["plain"], limits, 0)["by_bytes"]
    row["plain_step_over_weights_once"] = row["plain"]["step_ms"] / row["weights_once_ms"]
    return row | {"limits": limits}


def shown(rows: list[dict[str, Any]], taus: list[float]) -> Table:
    table = Table(title="tokens per second, prompts included; (over plain)", title_justify="left")
    ways = ["plain", *(f"tau {tau}" for tau in taus), "heads"]
    for column in ("model", "batch", *ways, "transformers", "plain step / weights once"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [
            f"{row[way]['tokens_per_second']:,.0f} ({row[way]['tokens_per_second_over_plain']['value']:.2f})"
            if way in row
            else "–"
            for way in ways
        ]
        table.add_row(
            row["model"],
            str(row["batch"]),
            *cells,
            f"{row['transformers']['tokens_per_second']:,.0f}",
            f"{row['plain_step_over_weights_once']:.2f}",
        )
    return table


def main(
    out: Annotated[Path, typer.Option(help="Where the figures are written as JSON, as they come.")],
    model: Annotated[list[str] | None, typer.Option(help="A shape, or a saved model; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Rows; repeatable.")] = None,
    tau: Annotated[list[float] | None, typer.Option(help="Replayed τ; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines with `prompt`, for a saved model.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens a prompt.")] = 128,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile.")] = False,
) -> None:
    taus, batches, names = tau or [2.0, 2.8, 3.5], batch or [1, 8, 32, 128], model or ["1b", "7b"]
    console, rows = Console(), list[dict[str, Any]]()
    for name in set(names) - set(SHAPES):
        model_of(name, "cpu")  # what has to be fetched is fetched once
    context = get_context("spawn")
    jobs = [Job(name, many, taus, prompts, new_tokens, device, eager) for name in names for many in batches]
    all_compiled, turn, found = context.Barrier(len(jobs)), context.Lock(), context.Queue()
    at_work = [context.Process(target=work, args=(job, all_compiled, turn, found)) for job in jobs]
    for process in at_work:
        process.start()
    while any(process.is_alive() for process in at_work) or not found.empty():
        if any(process.exitcode for process in at_work):
            all_compiled.abort()
        with suppress(Empty):
            rows.append(found.get(timeout=1))
            kept = {"rows": rows, "new_tokens": new_tokens, "machine": machine()}
            out.write_text(json.dumps(kept, indent=2) + "\n")
            console.print(shown(rows[-1:], taus))
    console.print(shown(sorted(rows, key=lambda row: (row["model"], row["batch"])), taus))
    if len(rows) < len(jobs):
        raise SystemExit("Some failed; see above.")


if __name__ == "__main__":
    typer.run(main)
