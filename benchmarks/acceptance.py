"""How many drafts stand, by category of prompts? τ and acceptance by draft, greedy, over a file of prompts.

    python benchmarks/acceptance.py --prompts prompts_bench.jsonl

Acceptance does not depend on the batch, so prompts are decoded side by side. Needs no accelerator: 240 prompts of 128
new tokens take a few minutes on two cores with the bundled model and its heads.
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
from nextn.evaluation.acceptance import DEFINITIONS, Acceptance, covered, decoded
from nextn.evaluation.report import acceptance_json, machine, percent
from nextn.formats import native
from nextn.formats.bundled import NAME


def main(
    prompts: Annotated[Path, typer.Option(help="JSON lines with `prompt` and `category`.")],
    heads: Annotated[str, typer.Option(help="A directory that nextn wrote, or the name of the bundled model.")] = NAME,
    new_tokens: Annotated[int, typer.Option(help="Tokens a prompt.")] = 128,
    rows: Annotated[int, typer.Option(help="Prompts side by side.")] = 24,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    records = read_prompts(prompts)
    model = native.load(heads, dtype=native.named_dtype(dtype))
    engine, tokenizer = model.engine(rows), native.load_tokenizer(native.base_of(heads))
    texts = [(record.get("category", "all prompts"), prompt_ids(tokenizer, record["prompt"])) for record in records]
    with Progress() as bar:
        task = bar.add_task("decoding", total=len(texts))
        found = decoded(engine, texts, new_tokens, lambda: bar.advance(task))

    figures = {name: Acceptance.of(results, engine.n) for name, results in found.items()}
    coverage = covered(model, [result for results in found.values() for result in results])
    overall = Acceptance.of([result for results in found.values() for result in results], engine.n)
    table = Table(
        title=f"{heads}: {len(texts)} prompts, {new_tokens} new tokens, greedy, {dtype}", title_justify="left"
    )
    for column in ("category", "prompts", "τ", "conditional", "cumulative"):
        table.add_column(column, justify="left" if column == "category" else "right")
    for name, row in [*figures.items(), ("all", overall)]:
        count = len(found[name]) if name in found else len(texts)
        table.add_row(name, str(count), f"{row.tau:.3f}", percent(row.conditional), percent(row.cumulative))
    console = Console()
    console.print(table)
    console.print(f"{coverage:.1%} of the text's tokens could be named by {model.multi_token.output}.", highlight=False)
    console.print(f"[dim]By draft 1 … {engine.n - 1}. {DEFINITIONS}[/dim]")
    if out is not None:
        report = {
            "prompts": len(texts),
            "new_tokens": new_tokens,
            "dtype": dtype,
            "n": engine.n,
            "output": str(model.multi_token.output),
            "coverage": coverage,
            **acceptance_json(overall),
            "by_category": {name: acceptance_json(row) for name, row in figures.items()},
            "machine": machine(),
        }
        out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
