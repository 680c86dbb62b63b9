"""Which way of sampling accepts more drafts: coupled noise or rejection?

    python benchmarks/sampling.py --prompts DATA/prompts_bench.jsonl --json benchmarks/results/sampling.json

The bundled model with the shipped heads, or `--model DIR`; τ by temperature and way, over the same prompts and seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nextn.data import prompt_ids, read_prompts
from nextn.decoding.sampling import Sampling
from nextn.distill import interleaved
from nextn.evaluation.acceptance import Acceptance
from nextn.evaluation.report import acceptance_cells, acceptance_json, machine, narrow_table
from nextn.formats.bundled import best_dtype, bundled_model, shipped_heads
from nextn.formats.native import load, load_base, load_tokenizer

WAYS: dict[str, dict[str, Any]] = {
    "coupled": {},
    "rejection": {"method": "rejection"},
    "block": {"method": "rejection", "block": True},
    "greedy drafts": {"method": "rejection", "sampled_drafts": False},
}


def main(
    prompts: Annotated[Path, typer.Option(help="JSON lines with `prompt` and `category`.")],
    model: Annotated[Path | None, typer.Option(help="Other heads for the bundled model than the shipped ones.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Repeatable.")] = None,
    count: Annotated[int, typer.Option(help="So many prompts.")] = 48,
    new_tokens: Annotated[int, typer.Option(help="Tokens a prompt.")] = 64,
    rows: Annotated[int, typer.Option(help="Prompts side by side.")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    console = Console()
    base = str(bundled_model(say=console.print))
    whole = load(model or shipped_heads(), base=load_base(base, best_dtype())).eval()
    tokenizer = load_tokenizer(base)
    texts = [prompt_ids(tokenizer, record["prompt"]) for record in interleaved(read_prompts(prompts))[:count]]
    temperatures = temperature or [0.3, 0.7, 1.0, 1.3]
    table = narrow_table(f"τ over {len(texts)} prompts, {new_tokens} tokens each", ("way", *map(str, temperatures)))
    about, found = {"prompts": len(texts), "new_tokens": new_tokens, "machine": machine()}, dict[str, Any]()
    for way, settings in WAYS.items():
        found[way] = {}
        for degree in temperatures:
            engine = whole.engine(rows, stop_tokens=[])
            sampling = Sampling(temperature=degree, seed=0, **settings)
            results = [result for _, result in engine.generate(texts, new_tokens, sampling=sampling, progress=console)]
            found[way][str(degree)] = acceptance_json(Acceptance.of(results, engine.n))
            if json_file is not None:  # what is measured is kept
                json_file.write_text(json.dumps(about | {"ways": found}, indent=2) + "\n")
        table.add_row(way, *(acceptance_cells(found[way][str(degree)])[0] for degree in temperatures))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
