"""The demonstration: a few prompts, decoded plainly and with heads, side by side and checked."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from nextn.data import TextStream, prompt_ids
from nextn.decoding.engine import Engine, Generation
from nextn.evaluation.acceptance import DEFINITIONS, Acceptance
from nextn.evaluation.lossless import Check, agreement, check, float32_twin, near_tie_bound
from nextn.evaluation.report import acceptance_cells, acceptance_json, machine
from nextn.model import MultiTokenModel

PROMPTS = {
    "code": "Write a Python function that checks whether a string is a palindrome.",
    "arithmetic": "A farmer has 12 hens. Each lays 3 eggs a day. How many eggs are there after 5 days?",
    "chat": "What should I see on a weekend trip to Rome?",
}
# The trunk's own tokens are plain; those that draft 1, 2, 3 … proposed have colours.
COLOURS = ("white", "green", "cyan", "magenta", "yellow", "blue", "red")


@dataclass
class Run:
    """One prompt decoded in the three ways."""

    name: str
    plain: Generation
    heads: Generation
    seconds: dict[str, float]


Engines = dict[str, Engine]  # `plain` and `nextn`


def engines(model: MultiTokenModel, compile: bool) -> Engines:
    """Our engine without heads and with them."""
    made = {"plain": model.engine(heads=1), "nextn": model.engine()}
    return {way: engine.compile() if compile else engine for way, engine in made.items()}


def warm_up(model: MultiTokenModel, ours: Engines, prompt: list[int]) -> None:
    """Run each of the three ways once, so that none of them pays for the first call."""
    host: Any = model.base
    for engine in ours.values():
        list(engine.generate([prompt], 8))
    host.generate(torch.tensor([prompt], device=host.device), max_new_tokens=8, do_sample=False)


def run_prompt(
    model: MultiTokenModel, ours: Engines, tokenizer: PreTrainedTokenizerBase, name: str, new: int, console: Console
) -> Run:
    """Decode one prompt plainly, with heads, and with transformers; the first two stream."""
    ids = prompt_ids(tokenizer, PROMPTS[name])
    console.rule(f"[bold]{name}[/bold]  {PROMPTS[name]}", align="left")
    host: Any = model.base
    seconds: dict[str, float] = {}
    results: dict[str, Generation] = {}
    for way, engine in ours.items():
        console.print(f"[dim]{way}:[/dim]")
        start = time.perf_counter()
        stream = ColourStream(tokenizer, console)
        ((_, results[way]),) = engine.generate([ids], new, stream)
        stream.end()
        seconds[way] = time.perf_counter() - start
    start = time.perf_counter()
    # All three are stopped by the same end tokens and the same length.
    theirs = host.generate(torch.tensor([ids], device=host.device), max_new_tokens=new, do_sample=False)
    seconds["transformers"] = (
        (time.perf_counter() - start) * len(results["plain"].tokens) / (theirs.shape[1] - len(ids))
    )
    return Run(name, results["plain"], results["nextn"], seconds)


def colour(origin: int) -> str:
    """The colour of what draft `origin` proposed; 0 is the trunk itself."""
    return COLOURS[0] if origin == 0 else COLOURS[1 + (origin - 1) % (len(COLOURS) - 1)]


class ColourStream:
    """Prints tokens as they come, each in the colour of the draft that proposed it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        self._text, self._console = TextStream(tokenizer), console
        self._column, self._origin = 0, 0

    def __call__(self, _index: int, tokens: list[int], origins: list[int]) -> None:
        for token, self._origin in zip(tokens, origins, strict=True):
            self._print(self._text.push(token))

    def end(self) -> None:
        """Print what is left of the text, and end the line."""
        self._print(self._text.flush())
        self._console.print()

    def _print(self, piece: str) -> None:
        if self._column + cell_len(piece) > self._console.width:  # break between tokens, not within
            self._console.print()
            piece, self._column = piece.lstrip(" ").removeprefix("\n"), 0
        self._console.print(Text(piece, style=colour(self._origin)), end="", soft_wrap=True)
        self._column = self._column + cell_len(piece) if "\n" not in piece else len(piece) - piece.rindex("\n") - 1


def demo(
    model: MultiTokenModel,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    max_new_tokens: int = 128,
    compile: bool = False,
) -> dict[str, Any]:
    """Run the demonstration; prints it, and returns the figures that `nextn demo --json` writes.

    Args:
        compile: run our engine as machine code.
    """
    n = model.multi_token.n
    legend = Text("tokens by who proposed them: trunk")
    for draft in range(1, n):
        legend.append(f"  draft {draft}", style=colour(draft))
    console.print(legend)
    ours = engines(model, compile)
    warm_up(model, ours, prompt_ids(tokenizer, "Hi"))
    runs = [run_prompt(model, ours, tokenizer, name, max_new_tokens, console) for name in PROMPTS]
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("checking every token against a float32 pass, one token a step", total=len(runs) + 1)
        bound = near_tie_bound(model.trunk, [run.plain.prompt + run.plain.tokens for run in runs[:1]], n)
        bar.advance(task)
        reference = float32_twin(model.base)
        checks = []
        for run in runs:
            checks.append(check(reference, [run.heads], bound))
            bar.advance(task)
    texts = agreement(reference, [run.heads for run in runs], [run.plain.tokens for run in runs], bound)
    report = figures(runs, checks, texts, n)
    console.print(acceptance_table(report))
    console.print(speed_table(report))
    dtype = str(model.trunk.dtype).removeprefix("torch.")
    report["compiled"] = ours["nextn"].code is not None
    report |= {"new_tokens": max_new_tokens, "dtype": dtype, "near_tie_bound": bound, "machine": machine()}
    console.print(f"[dim]{DEFINITIONS}\n{conditions(report)}[/dim]", highlight=False)
    return report


def figures(runs: list[Run], checks: list[Check], texts: list[str], n: int) -> dict[str, Any]:
    """The report, overall and by prompt; `texts` says how each text with heads compares with the plain one."""
    report = _figures(runs, checks, texts, n)
    report["by_prompt"] = {
        run.name: _figures([run], [one], [text], n) for run, one, text in zip(runs, checks, texts, strict=True)
    }
    return report


def _figures(runs: list[Run], checks: list[Check], texts: list[str], n: int) -> dict[str, Any]:
    acceptance = Acceptance.of([run.heads for run in runs], n)
    tokens = sum(len(run.plain.tokens) for run in runs)
    new_tokens = sum(len(run.heads.tokens) for run in runs)
    seconds = {way: sum(run.seconds[way] for run in runs) for way in ("nextn", "plain", "transformers")}
    return {
        "identical": all(text == "identical" for text in texts),
        "text": max(texts, key=("identical", "near tie", "differs").index),
        "near_ties": sum(one.near_ties for one in checks),
        "unexplained": sum(one.unexplained for one in checks),
        **acceptance_json(acceptance),
        "tokens_per_second": {
            way: (new_tokens if way == "nextn" else tokens) / second for way, second in seconds.items()
        },
    }


def acceptance_table(report: dict[str, Any]) -> Table:
    """τ and acceptance by draft, a row a prompt and one for all."""
    made = Table(title="acceptance by draft (1 … n - 1)", title_justify="left", box=SIMPLE_HEAD)
    for column in ("prompt", "τ", "conditional", "cumulative"):
        made.add_column(column, justify="left" if column == "prompt" else "right")
    for name, row in [*report["by_prompt"].items(), ("all", report)]:
        made.add_row(name, *acceptance_cells(row))
    return made


def speed_table(report: dict[str, Any]) -> Table:
    """Tokens per second of the three ways, and whether the text holds."""
    title = "tokens per second, and the text with heads beside the plain one"
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("prompt", "nextn", "plain", "transformers", "text", "ties", "unexplained"):
        made.add_column(column, justify="left" if column in ("prompt", "text") else "right")
    for name, row in [*report["by_prompt"].items(), ("all", report)]:
        speeds = (f"{row['tokens_per_second'][way]:.1f}" for way in ("nextn", "plain", "transformers"))
        made.add_row(name, *speeds, row["text"], str(row["near_ties"]), str(row["unexplained"]))
    return made


def conditions(report: dict[str, Any]) -> str:
    """Where and how the figures came about, in one line."""
    here = report["machine"]
    return (
        f"{here['processor']}, {here['threads']} threads, {report['dtype']}, batch 1, one run, "
        f"our engine {'compiled' if report['compiled'] else 'eager'}. "
        f"Near ties are tokens within {report['near_tie_bound']:.3g} logits of the best one of a float32 pass, one "
        "token a step: there the width of a pass decides, and the texts may part. In float32 they are rare "
        "(--dtype float32)."
    )
