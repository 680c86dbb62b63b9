"""Do trees pay? A tree tuned to measured acceptance, a tree grown by confidence, and the chain.

    python benchmarks/trees.py --prompts DATA/prompts_bench.jsonl --json benchmarks/results/trees.json

The bundled model with the shipped heads. How often each rank of each draft is right is counted on one half of the
prompts, and the trees are tried on the other half: τ, ms a step of batch 1 (eager, interleaved), and what both make of
the speed over the chain. `--tree FILE` keeps the tuned tree for `nextn generate --tree`.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from nextn.data import prompt_ids, read_prompts
from nextn.decoding.engine import Generation
from nextn.decoding.tree import Tree, rank_shares
from nextn.distill import interleaved
from nextn.evaluation.acceptance import Acceptance
from nextn.evaluation.report import interval, machine, narrow_table
from nextn.formats.bundled import best_dtype, bundled_model, shipped_heads
from nextn.formats.native import load, load_base, load_tokenizer
from nextn.model import MultiTokenModel, as_text

RANKS = 8


@torch.inference_mode()
def ranks_of(model: MultiTokenModel, generations: list[Generation]) -> list[list[int | None]]:
    """For each place of the emitted texts, at which rank each draft has the token that came, the path so far right."""
    found = []
    for result in generations:
        ids = torch.tensor([result.prompt + result.tokens], device=model.trunk.device)
        text = as_text(ids, None, None)
        _, tapped = model.run_trunk(text)
        states = model.heads(model.trunk, tapped.to(next(model.heads.parameters()).dtype), text)
        by_depth = []
        for depth, state in enumerate(states, start=2):
            logits = model.heads.output.at(depth)(model.trunk, state[0, : ids.shape[1] - depth]).float()
            right = logits.gather(1, ids[0, depth:, None])
            rank = (logits > right).sum(dim=1).masked_fill(right[:, 0] == -torch.inf, RANKS)
            by_depth.append(rank.tolist())
        for place in range(len(result.prompt) - 1, len(by_depth[-1])):
            found.append([rank if (rank := ranks[place]) < RANKS else None for ranks in by_depth])
    return found


def main(
    prompts: Annotated[Path, typer.Option(help="JSON lines with `prompt` and `category`.")],
    nodes: Annotated[list[int] | None, typer.Option(help="Sizes of trees, the pending token included.")] = None,
    count: Annotated[int, typer.Option(help="So many prompts; half of them to tune.")] = 48,
    new_tokens: Annotated[int, typer.Option(help="Tokens a prompt.")] = 64,
    timed: Annotated[int, typer.Option(help="So many of the other half are timed, at batch 1.")] = 6,
    tree: Annotated[Path | None, typer.Option(help="Write the tuned tree of the first size there.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    console = Console()
    base = str(bundled_model(say=console.print))
    model = load(shipped_heads(), base=load_base(base, best_dtype())).eval()
    tokenizer = load_tokenizer(base)
    texts = [prompt_ids(tokenizer, record["prompt"]) for record in interleaved(read_prompts(prompts))[:count]]
    tuning, trying = texts[: count // 2], texts[count // 2 :]
    plain = [result for _, result in model.engine(16, heads=1).generate(tuning, new_tokens, progress=console)]
    shares = rank_shares(ranks_of(model, plain), model.multi_token.n - 1, RANKS)
    trees: dict[str, Tree | None] = {"chain": None}
    for size in nodes or [8, 16]:
        trees[f"tuned, {size} nodes"] = Tree.tuned(shares, size)
        trees[f"grown, {size} nodes"] = Tree(nodes=size, beam=4)
    rows: dict[str, Any] = {}
    for name, each in trees.items():
        results = [
            r for _, r in model.engine(8, stop_tokens=[], tree=each).generate(trying, new_tokens, progress=console)
        ]
        rows[name] = {"tau": Acceptance.of(results, model.multi_token.n).tau, "seconds": [], "ms_a_step": [],
                      "paths": None if each is None else each.paths}  # fmt: skip
        rows[name]["expected"] = each.expected(shares) if each is not None and each.paths else None
    engines = {name: model.engine(1, stop_tokens=[], tree=each) for name, each in trees.items()}
    for prompt in [trying[0], *trying[:timed]]:  # the first one warms up
        for name, engine in engines.items():
            start = time.perf_counter()
            list(engine.generate([prompt], new_tokens))
            rows[name]["seconds"].append(time.perf_counter() - start)
            spent = 1e3 * sum(engine.seconds[part] for part in ("verify", "draft"))
            rows[name]["ms_a_step"].append(spent / sum(engine.steps.values()))
    table = narrow_table(
        "trees, batch 1, eager", ("drafts", "τ", "expected τ", "ms a step", "speed over the chain (95%)")
    )
    for name, row in rows.items():
        row["seconds"], row["ms_a_step"] = row["seconds"][1:], statistics.median(row["ms_a_step"][1:])
        ratios = [chain / own for chain, own in zip(rows["chain"]["seconds"], row["seconds"], strict=True)]
        over = interval(ratios)
        row["over_chain"] = over._asdict()
        expected = "" if row["expected"] is None else f"{row['expected']:.2f}"
        table.add_row(name, f"{row['tau']:.2f}", expected, f"{row['ms_a_step']:.1f}", over.cell())
    console.print(table)
    if tree is not None:
        chosen = next(each for each in trees.values() if each is not None)
        tree.write_text(json.dumps({"paths": chosen.paths}) + "\n")
    if json_file is not None:
        about = {"shares": shares, "trees": rows, "machine": machine(), "new_tokens": new_tokens}
        json_file.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
