"""Is the text the model's own? Every token checked, for several sets of heads, in float32 and in bfloat16.

    python benchmarks/lossless.py --prompts prompts_bench.jsonl --heads smollm2-135m-instruct --heads parallel_heads

Each emitted token is compared with a float32 pass of the trunk that reads one token a step; in float32 the text is
also compared with that of transformers.generate. Exits with status 1 if a token is unexplained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nextn.data import prompt_ids, read_prompts
from nextn.distill import interleaved
from nextn.evaluation.lossless import measure
from nextn.evaluation.report import machine
from nextn.formats.bundled import NAME
from nextn.formats.native import load, load_tokenizer, named_dtype


def main(
    prompts: Annotated[Path, typer.Option(help="JSON lines with `prompt` and `category`; taken from each in turn.")],
    heads: Annotated[list[str] | None, typer.Option(help="Directories with heads; repeatable.")] = None,
    count: Annotated[int, typer.Option(help="How many prompts.")] = 24,
    new_tokens: Annotated[int, typer.Option(help="Tokens a prompt.")] = 48,
    compile: Annotated[bool, typer.Option("--compile", help="Run our engine as machine code.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    records = interleaved(read_prompts(prompts))[:count]
    results = []
    table = Table(title=f"{len(records)} prompts, {new_tokens} new tokens, greedy, batch 1", title_justify="left")
    for column in ("heads", "dtype", "τ", "tokens", "near ties", "unexplained", "bound", "worst", "same text as plain",
                   "as transformers"):  # fmt: skip
        table.add_column(column, justify="right")
    for name in heads or [NAME]:
        for dtype in ("float32", "bfloat16"):
            model = load(name, dtype=named_dtype(dtype))
            tokenizer = load_tokenizer(model.base.config._name_or_path)
            texts = [prompt_ids(tokenizer, record["prompt"]) for record in records]
            with Progress() as bar:
                task = bar.add_task(f"{model.multi_token.kind}, {dtype}", total=len(texts))
                found = measure(model, texts, new_tokens, lambda task=task, bar=bar: bar.advance(task), compile)
            results.append({"heads": model.multi_token.kind, "dtype": dtype, **found})
            table.add_row(
                model.multi_token.kind,
                dtype,
                f"{found['tau']:.2f}",
                *(str(found[key]) for key in ("tokens", "near_ties", "unexplained")),
                *(f"{found[key]:.2g}" for key in ("bound", "worst")),
                *(_counts(found[key]) for key in ("plain", "transformers")),
            )
    Console().print(table)
    print("our engine ran", ", ".join("compiled" if run["compiled"] else "eagerly" for run in results))
    if out is not None:
        report = {"prompts": len(records), "new_tokens": new_tokens, "runs": results, "machine": machine()}
        out.write_text(json.dumps(report, indent=2) + "\n")
    if any(run["unexplained"] for run in results):
        raise typer.Exit(1)


def _counts(found: dict[str, int] | None) -> str:
    return "–" if found is None else ", ".join(f"{count} {how}" for how, count in sorted(found.items()))


if __name__ == "__main__":
    typer.run(main)
