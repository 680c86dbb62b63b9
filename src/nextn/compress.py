"""Heads with another output, or fewer depths, derived from trained ones; and what acceptance that cost.

What a draft proposes is verified whatever made it, so that decoding stays lossless with any output; only how often
drafts stand changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nextn.config import ConfigError, OutputConfig
from nextn.data import prompt_ids, read_prompts
from nextn.decoding.engine import Generation
from nextn.derive import derive, stored_bytes, stored_parameters
from nextn.distill import interleaved
from nextn.evaluation.acceptance import DEFINITIONS, Acceptance, decoded
from nextn.evaluation.costs import Machine, Option, best_n, cheapest, costs_of, tau_of, usual_outputs
from nextn.evaluation.demo import PROMPTS
from nextn.evaluation.report import acceptance_json, machine
from nextn.evaluation.roofline import measure_machine
from nextn.formats import native
from nextn.formats.bundled import best_dtype
from nextn.model import MultiTokenModel, as_text
from nextn.recipe import Recipe, train
from nextn.vocabulary import counted, foreign_to, listed, most_frequent

AUTO = "auto"
START = "start"  # where derived heads lie while they recover


@dataclass(frozen=True)
class Compression:
    """What is wanted of `compress`.

    output: the short form of an output (`OutputConfig.parse`), or `auto`: the cheapest of several that keeps the share
        `keep` of the acceptance.
    depths: how many tokens to predict, no more than the heads do; `auto` for as many as pay on this machine at batch 1.
    data: text, counted for a trimmed output and trained on while recovering.
    category, scripts: count only records of this category; keep only tokens of these scripts.
    tokens: a file with the ids that a trimmed output keeps, in place of counting.
    steps: of recovery training, the trunk frozen; 0 for none.
    prompts, count, new_tokens, rows: what acceptance is measured on; default: the prompts of the demo.
    """

    heads: str
    output: str
    depths: int | str | None = None
    data: Sequence[Path] = ()
    category: str | None = None
    scripts: Sequence[str] = ()
    tokens: Path | None = None
    keep: float = 0.95
    steps: int = 0
    learning_rate: float = 5e-4
    prompts: Path | None = None
    count: int | None = None
    new_tokens: int = 96
    rows: int = 8


@dataclass
class Measured:
    """Heads and what they gave on some prompts."""

    name: str
    model: MultiTokenModel
    by_category: dict[str, Acceptance]
    overall: Acceptance
    coverage: float
    notes: dict[str, Any] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """All of it as JSON has it: also sizes, and multiplications a draft."""
        heads, output = stored_parameters(self.model.heads)
        return {
            "output": self.name,
            "n": self.model.multi_token.n,
            "parameters": {"heads": heads, "output": output},
            "bytes": stored_bytes(self.model.heads),
            "output_operations": self.model.heads.output.operations(self.model.trunk),
            "coverage": self.coverage,
            **acceptance_json(self.overall),
            "by_category": {name: acceptance_json(row) for name, row in self.by_category.items()},
            **self.notes,
        }


def compress(wanted: Compression, out: Path, console: Console) -> dict[str, Any]:
    """Derive, measure, recover where that is asked for, and write heads to `out`.

    Returns:
        the figures before and after, and of all outputs that were tried.

    Raises:
        ConfigError, DataError, FormatError: where that cannot work; the message says why.
    """
    directory = native.heads_directory(wanted.heads)
    model = native.load(directory, dtype=best_dtype())
    tokenizer = native.load_tokenizer(native.base_of(directory))
    _check(wanted, model.multi_token.n)
    configs = _candidates(wanted, model)
    counts = counted(wanted.data, tokenizer, model.trunk.vocab_size, wanted.category) if wanted.data else None
    native.writable(out)
    prompts = _prompts(wanted, tokenizer, model)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("measuring acceptance", total=(1 + len(configs)) * len(prompts))

        def measured(name: str, derived: MultiTokenModel) -> Measured:
            return measure(name, derived, prompts, wanted, lambda: bar.advance(task))

        before = measured(str(model.multi_token.output), model)
        tried = [
            measured(str(config), derive(model, config, kept=_kept(wanted, config, counts, tokenizer, model)))
            for config in configs
        ]
    for each in tried:
        each.notes["kept"] = _share_kept(each, before)
    chosen, reasons = _choose(wanted, tried)
    if wanted.depths is not None:
        n, why = _depths(wanted, chosen)
        reasons += why
        if n < chosen.model.multi_token.n:
            shorter = derive(chosen.model, chosen.model.multi_token.output, n)
            chosen = measure(f"{chosen.name}, n = {n}", shorter, prompts, wanted)
            chosen.notes["kept"] = _share_kept(chosen, before)
    if wanted.steps:
        chosen = _recover(wanted, chosen, before, prompts, tokenizer, out, console)
    else:
        native.save_heads(chosen.model, out, dtype=torch.bfloat16, tokenizer=tokenizer)
    shown = [before, *tried, *([chosen] if chosen not in tried else [])]
    console.print(table(shown))
    for reason in reasons:
        console.print(f"{reason}.", highlight=False)
    console.print(
        f"[dim]{len(prompts)} prompts, {wanted.new_tokens} new tokens, greedy, {model.trunk.dtype}. {DEFINITIONS} "
        "Draft: multiplications of its output. Coverage: the share of the text's tokens that could be named. Kept: the "
        "share of (τ - 1).[/dim]"
    )
    console.print(f"heads saved in {out}", highlight=False)
    return {
        "heads": wanted.heads,
        "prompts": len(prompts),
        "new_tokens": wanted.new_tokens,
        "before": before.figures(),
        "tried": [each.figures() for each in tried],
        "after": chosen.figures(),
        "reasons": reasons,
        "machine": machine(),
    }


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(
    name: str,
    model: MultiTokenModel,
    prompts: Sequence[tuple[str, list[int]]],
    wanted: Compression,
    advance: Any = lambda: None,
) -> Measured:
    """Decode prompts with some heads: acceptance by category, and coverage."""
    found = decoded(model.engine(min(wanted.rows, len(prompts))), prompts, wanted.new_tokens, advance)
    every = [result for results in found.values() for result in results]
    n = model.multi_token.n
    by_category = {category: Acceptance.of(results, n) for category, results in found.items()}
    return Measured(name, model, by_category, Acceptance.of(every, n), covered(model, every))


@torch.inference_mode()
def covered(model: MultiTokenModel, generations: Sequence[Generation]) -> float:
    """The share of the emitted tokens that a state of the heads for their place could name, over all depths."""
    named = total = 0
    for result in generations:
        ids = torch.tensor([result.prompt + result.tokens], device=model.trunk.device)
        text = as_text(ids, None, None)
        _, tapped = model._run_trunk(text)
        states = model.heads(model.trunk, tapped.to(next(model.heads.parameters()).dtype), text)
        for depth, state in enumerate(states, start=2):
            first = max(0, len(result.prompt) - depth)
            targets, reads = ids[:, first + depth :], state[:, first : ids.shape[1] - depth]
            named += int(model.heads.output.at(depth).can_name(model.trunk, reads, targets).sum())
            total += targets.numel()
    return named / max(1, total)


def table(rows: Sequence[Measured]) -> Table:
    """Before and after, and what was tried: sizes, coverage, acceptance."""
    shown = Table(title="what outputs cost, and what acceptance", title_justify="left", box=SIMPLE_HEAD)
    categories = list(rows[0].by_category)
    for column in ("output", "n", "stored", "draft", "coverage", *categories, "τ", "kept"):
        shown.add_column(column, justify="left" if column == "output" else "right", no_wrap=column != "output")
    for place, row in enumerate(rows):
        figures = row.figures()
        shown.add_row(
            row.name if place else f"{row.name} (before)",
            str(figures["n"]),
            f"{figures['bytes'] / 1e6:.1f} MB",
            f"{figures['output_operations'] / 1e6:.2f}M",
            f"{row.coverage:.1%}",
            *(f"{row.by_category[name].tau:.2f}" for name in categories),
            f"{row.overall.tau:.2f}",
            f"{figures['kept']:.0%}" if "kept" in figures else "",
        )
    return shown


def _share_kept(after: Measured, before: Measured) -> float:
    return (after.overall.tau - 1) / max(before.overall.tau - 1, 1e-9)


# --- choosing -----------------------------------------------------------------------------------------------------


def _check(wanted: Compression, n: int) -> None:
    if wanted.steps and not wanted.data:
        raise ConfigError("Recovery trains on text: give --data, or --steps 0.")
    if wanted.steps and wanted.output == AUTO:
        raise ConfigError("--output auto compares outputs as they are derived; recover the one that it chooses.")
    if isinstance(wanted.depths, str) and wanted.depths != AUTO:
        raise ConfigError(f"--depths is {wanted.depths}; give a number or auto.")
    if isinstance(wanted.depths, int) and not 2 <= wanted.depths <= n:
        raise ConfigError(f"The heads predict {n} tokens; --depths can be 2 to {n}, not {wanted.depths}.")
    if wanted.tokens is not None and ((wanted.data and not wanted.steps) or wanted.scripts or wanted.category):
        raise ConfigError("--tokens names all that is kept; leave out what else would choose.")


def _candidates(wanted: Compression, model: MultiTokenModel) -> list[OutputConfig]:
    """The output that is asked for, or those that `auto` compares."""
    if wanted.output == AUTO:
        return usual_outputs(model.trunk.vocab_size, model.trunk.width, trimmed=bool(wanted.data))
    config = OutputConfig.parse(wanted.output)
    if wanted.tokens is not None:
        if config.kind != "trimmed":
            raise ConfigError("--tokens goes with a trimmed output.")
        size = len(listed(wanted.tokens, model.trunk.vocab_size))
        if config.size != size:
            raise ConfigError(f"{wanted.tokens} lists {size} tokens, but the output's size is {config.size}.")
    elif config.kind == "trimmed" and not wanted.data and config != model.multi_token.output:
        raise ConfigError("A trimmed output keeps the most frequent tokens of a text: give --data, or --tokens.")
    return [config]


def _kept(
    wanted: Compression,
    config: OutputConfig,
    counts: Tensor | None,
    tokenizer: PreTrainedTokenizerBase,
    model: MultiTokenModel,
) -> Tensor | None:
    """The tokens that a trimmed output keeps."""
    if config.kind != "trimmed":
        return None
    if wanted.tokens is not None:
        return listed(wanted.tokens, model.trunk.vocab_size)
    if counts is None:
        return None
    assert config.size is not None
    special = [token for token in tokenizer.all_special_ids if token < model.trunk.vocab_size]
    foreign = foreign_to(wanted.scripts, tokenizer, model.trunk.vocab_size) if wanted.scripts else []
    return most_frequent(counts, config.size, always=special, never=foreign)


def _choose(wanted: Compression, tried: list[Measured]) -> tuple[Measured, list[str]]:
    if wanted.output != AUTO:
        return tried[0], []
    options = [
        Option(each.name, each.model.heads.output.operations(each.model.trunk), each.notes["kept"]) for each in tried
    ]
    option, why = cheapest(options, wanted.keep)
    return tried[options.index(option)], [why]


def _depths(wanted: Compression, chosen: Measured) -> tuple[int, list[str]]:
    """How many tokens to predict: as many as asked for, or as pay at batch 1 on this machine; and why."""
    if isinstance(wanted.depths, int):
        return wanted.depths, []
    n, why = best_n(speedups(chosen.model, chosen.overall.conditional))
    return n, [f"{why} (expected at batch 1 on this machine, by bytes and operations)"]


def speedups(model: MultiTokenModel, conditional: Sequence[float], context: int = 512) -> dict[int, float]:
    """The speed-up that each n is expected to have on this machine at batch 1, by a roofline."""
    read = sum(parameter.numel() * parameter.element_size() for parameter in model.base.parameters())
    measured = measure_machine(model.trunk.dtype, read, model.trunk.device.type)
    here = Machine(measured["bandwidth"], measured["rate"], model.trunk.dtype.itemsize)
    found = {}
    for n in range(2, model.multi_token.n + 1):
        costs = costs_of(derive(model, model.multi_token.output, n), here.width)
        found[n] = costs.speedup(here, 1, context, tau_of(conditional, n))
    return found


# --- recovering ---------------------------------------------------------------------------------------------------


def _recover(
    wanted: Compression,
    chosen: Measured,
    before: Measured,
    prompts: Sequence[tuple[str, list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    console: Console,
) -> Measured:
    """Train derived heads for a few steps; killed, the same command goes on from the last checkpoint."""
    start = out / START
    native.save_heads(chosen.model, start, dtype=torch.bfloat16, tokenizer=tokenizer)
    recipe = Recipe(
        base=str(start),
        data=[str(path) for path in wanted.data],
        length=min(512, chosen.model.trunk.max_length),
        training={"max_steps": wanted.steps, "learning_rate": wanted.learning_rate, "save_steps": 100},
    )
    train(recipe, out, say=console.print)
    shutil.rmtree(start)
    recovered = native.load(out, base=chosen.model.base)
    after = measure(f"{chosen.name}, recovered", recovered, prompts, wanted)
    after.notes["kept"] = _share_kept(after, before)
    return after


def _prompts(
    wanted: Compression, tokenizer: PreTrainedTokenizerBase, model: MultiTokenModel
) -> list[tuple[str, list[int]]]:
    """What is decoded: category and token ids, from each category in turn."""
    records: list[dict[str, Any]] = [{"category": name, "prompt": text} for name, text in PROMPTS.items()]
    if wanted.prompts is not None:
        records = interleaved(read_prompts(wanted.prompts))
    prompts = [
        (record.get("category", "all prompts"), prompt_ids(tokenizer, record["prompt"]))
        for record in records[: wanted.count]
    ]
    fitting = [(name, ids) for name, ids in prompts if len(ids) + wanted.new_tokens <= model.trunk.max_length]
    if not fitting:
        raise ConfigError(f"No prompt leaves room for {wanted.new_tokens} new tokens in the base's context.")
    return fitting
