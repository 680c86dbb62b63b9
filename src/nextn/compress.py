"""Heads with another output, or fewer depths, derived from trained ones; and what acceptance that cost.

What a draft proposes is verified whatever made it, so that decoding stays lossless with any output; only how often
drafts stand changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nextn.config import ConfigError, OutputConfig
from nextn.data import prompt_ids, read_prompts
from nextn.derive import derive
from nextn.distill import interleaved
from nextn.evaluation.acceptance import DEFINITIONS, Acceptance, covered, decoded
from nextn.evaluation.costs import (
    Machine,
    Option,
    best_n,
    cheapest,
    costs_of,
    stored_bytes,
    stored_parameters,
    tau_of,
    usual_outputs,
)
from nextn.evaluation.demo import PROMPTS
from nextn.evaluation.report import acceptance_json, machine, narrow_table
from nextn.evaluation.roofline import measure_machine
from nextn.files import sha256, write_json
from nextn.formats import FormatError, native
from nextn.formats.bundled import best_dtype
from nextn.lock import FileLock
from nextn.model import MultiTokenModel
from nextn.recipe import Recipe, train
from nextn.vocabulary import counted, foreign_to, listed, most_frequent

AUTO = "auto"
CLAIM = "compress.json"  # what a directory of compressed heads was made from
START = "start"  # where derived heads lie while they recover
KEEP, LEARNING_RATE = 0.95, 5e-4

Prompts = Sequence[tuple[str, list[int]]]  # category and token ids


@dataclass(frozen=True)
class Compression:
    """What is wanted of `compress`.

    output: the short form of an output (`OutputConfig.parse`), or `auto`: the cheapest of several that keeps a share of
        the acceptance.
    depths: how many tokens to predict, no more than the heads do; `auto` for as many as pay on this machine at batch 1.
    data: text, counted for a trimmed output and trained on while recovering.
    category, scripts: count only records of this category; keep only tokens of these scripts.
    tokens: a file with the ids that a trimmed output keeps, in place of counting.
    keep: for `auto`, the share of the acceptance; default: 0.95.
    steps: of recovery training, the trunk frozen; 0 for none.
    learning_rate: of recovery training; default: 5e-4.
    prompts, count, new_tokens, rows: what acceptance is measured on; default: the prompts of the demo.
    trust_remote_code: run the code that the base's repository brings.
    """

    heads: str
    output: str
    depths: int | str | None = None
    data: Sequence[Path] = ()
    category: str | None = None
    scripts: Sequence[str] = ()
    tokens: Path | None = None
    keep: float | None = None
    steps: int = 0
    learning_rate: float | None = None
    prompts: Path | None = None
    count: int | None = None
    new_tokens: int = 96
    rows: int = 8
    trust_remote_code: bool = False


@dataclass
class Measured:
    """Heads and what they gave on some prompts.

    notes: `kept`, the share of τ - 1, and `recovered`, the steps of training since they were derived.
    """

    name: str
    model: MultiTokenModel
    by_category: dict[str, Acceptance]
    overall: Acceptance
    coverage: float
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def operations(self) -> int:
        """Multiplications of a draft's output."""
        return self.model.heads.output.operations(self.model.trunk)

    def figures(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        heads, output = stored_parameters(self.model.heads)
        config = self.model.multi_token
        return {
            "heads": config.kind,
            "n": config.n,
            "output": str(config.output),
            "parameters": {"heads": heads, "output": output},
            "bytes": stored_bytes(self.model.heads),
            "output_operations": self.operations,
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
        LockedError: where another process writes to `out`.
    """
    directory = native.heads_directory(wanted.heads)
    _check(wanted, native.config_of(directory).n)
    with FileLock(native.writable(out)):
        return _compress(wanted, directory, out, console)


def _compress(wanted: Compression, directory: Path, out: Path, console: Console) -> dict[str, Any]:
    claim = _claim(wanted, directory, out)
    model = native.load(wanted.heads, dtype=best_dtype(), trust_remote_code=wanted.trust_remote_code)
    tokenizer = native.tokenizer_of(wanted.heads, wanted.trust_remote_code)
    prompts = _prompts(wanted, tokenizer, model, console)
    derived, left_out = _derived(wanted, model, tokenizer)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("measuring acceptance", total=(1 + len(derived)) * len(prompts))

        def measured(name: str, model: MultiTokenModel) -> Measured:
            return measure(name, model, prompts, wanted, lambda: bar.advance(task))

        before = measured(str(model.multi_token.output), model)
        if not before.overall.tau > 1:
            raise ConfigError(
                "No draft of these heads stood on the prompts, so there is no acceptance to keep: measure on more "
                "--prompts or --new-tokens."
            )
        tried = [_beside(before, measured(name, each)) for name, each in derived.items()]
    chosen, reasons = _choose(wanted, before, tried)
    reasons += left_out
    if wanted.depths is not None:
        n, why = (claim["n"], []) if "n" in claim else _depths(wanted, chosen)
        reasons += why
        write_json(out / CLAIM, claim | {"n": n})  # what was timed once holds when the command goes on
        if n < chosen.model.multi_token.n:
            shorter = derive(chosen.model, chosen.model.multi_token.output, n)
            chosen = _beside(before, measure(f"{chosen.name}, n = {n}", shorter, prompts, wanted))
    if wanted.steps:
        chosen = _beside(before, _recover(wanted, chosen, prompts, tokenizer, out, console))
    else:
        _save(chosen.model, wanted.heads, out, tokenizer)
    shown = [before, *tried, *([chosen] if chosen is not before and chosen not in tried else [])]
    console.print(table(shown))
    for reason in reasons:
        console.print(f"{reason.rstrip('.')}.", highlight=False)
    console.print(
        f"[dim]{len(prompts)} prompts, {wanted.new_tokens} new tokens, greedy, {model.trunk.dtype}. {DEFINITIONS} "
        "Draft: multiplications of its output. Coverage: the share of the text's tokens that could be named. Kept: the "
        "share of (τ - 1).[/dim]"
    )
    console.print(f"heads saved in {out}", highlight=False)
    return {
        **claim,
        "prompts": len(prompts),
        "before": before.figures(),
        "tried": [each.figures() for each in tried],
        "after": chosen.figures(),
        "reasons": reasons,
        "machine": machine(),
    }


# --- what is asked for, and where it goes -------------------------------------------------------------------------


def _check(wanted: Compression, n: int) -> None:
    """Refuse what cannot work, and options that would do nothing."""
    auto = wanted.output == AUTO
    trimmed = auto or OutputConfig.parse(wanted.output).kind == "trimmed"
    refused = {
        "Recovery trains on text: give --data, or leave --steps out": wanted.steps and not wanted.data,
        "--output auto compares outputs as they are derived; recover the one that it chooses": wanted.steps and auto,
        "--keep goes with --output auto": wanted.keep is not None and not auto,
        "--learning-rate goes with --steps": wanted.learning_rate is not None and not wanted.steps,
        "--tokens goes with a trimmed output of its size": wanted.tokens is not None and (auto or not trimmed),
        "--tokens names all that is kept; leave out --category and --script": wanted.tokens is not None
        and (wanted.category or wanted.scripts),
        "--category and --script choose tokens by --data, for a trimmed output": (wanted.category or wanted.scripts)
        and not (trimmed and wanted.data),
        f"--depths is {wanted.depths}; give a number or auto": isinstance(wanted.depths, str) and wanted.depths != AUTO,
        f"The heads predict {n} tokens; --depths can be 2 to {n}, not {wanted.depths}": isinstance(wanted.depths, int)
        and not 2 <= wanted.depths <= n,
    }
    if problems := [problem for problem, holds in refused.items() if holds]:
        raise ConfigError(f"{problems[0]}.")


def _claim(wanted: Compression, directory: Path, out: Path) -> dict[str, Any]:
    """What is asked for as JSON, heads and files by their sha256, written to `out`/compress.json.

    Returns:
        it, and the `n` that an earlier start chose.

    Raises:
        FormatError: where `out` holds something else, which would be mixed with this or lost.
    """
    request = {name: value for name, value in asdict(wanted).items() if name not in ("rows", "trust_remote_code")}
    files = [native.heads_file(directory), *wanted.data, *(file for file in (wanted.tokens, wanted.prompts) if file)]
    digests = {str(file): sha256(file) for file in files if Path(file).is_file()}
    claim = json.loads(json.dumps({"asked": request, "sha256": digests}, default=str))
    path = native.writable(out) / CLAIM
    if path.is_file():
        earlier = _json_object(path)
        if {name: earlier.get(name) for name in claim} == claim:
            return earlier
        raise FormatError(f"{out} holds another compression ({path}); choose another directory.")
    if native.has_heads(out):
        raise FormatError(f"{out} holds heads already; choose another directory.")
    write_json(path, claim)
    return claim


def _json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one for any other file."""
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    except ValueError:
        return {}


def _prompts(
    wanted: Compression, tokenizer: PreTrainedTokenizerBase, model: MultiTokenModel, console: Console
) -> list[tuple[str, list[int]]]:
    """What is decoded, from each category in turn."""
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
    if left_out := len(prompts) - len(fitting):
        console.print(f"{left_out} prompts are too long for {wanted.new_tokens} new tokens, and left out")
    return fitting


# --- deriving -----------------------------------------------------------------------------------------------------


def _derived(
    wanted: Compression, model: MultiTokenModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, MultiTokenModel], list[str]]:
    """The heads to measure, by output; and which of those that `auto` compares cannot be had, and why."""
    vocabulary, left_out = model.trunk.vocab_size, list[str]()
    counts = counted(wanted.data, tokenizer, vocabulary, wanted.category) if wanted.data else None
    foreign = foreign_to(wanted.scripts, tokenizer, vocabulary) if wanted.scripts else []
    derived: dict[str, MultiTokenModel] = {}
    for config in _candidates(wanted, model):
        try:
            kept = _kept(wanted, config, counts, foreign, tokenizer, model)
            derived[str(config)] = derive(model, config, kept=kept)
        except ConfigError as error:
            if wanted.output != AUTO:
                raise
            left_out.append(f"{config} is left out: {error}")
    return derived, left_out


def _candidates(wanted: Compression, model: MultiTokenModel) -> list[OutputConfig]:
    """The output that is asked for, or those that `auto` compares."""
    if wanted.output != AUTO:
        return [OutputConfig.parse(wanted.output)]
    width = model.heads.output_width(model.multi_token, model.trunk)
    each = len(list(model.heads.output.parts())) > 1
    usual = usual_outputs(model.trunk.vocab_size, width, trimmed=bool(wanted.data), each=each)
    own = model.multi_token.output.has_own_table
    more = [
        config.model_copy(update={"own": True, "each": each})
        for config in usual
        if own and config.kind in ("trimmed", "clustered")
    ]
    return [config for config in [*usual, *more] if config != model.multi_token.output]


def _kept(
    wanted: Compression,
    config: OutputConfig,
    counts: Tensor | None,
    foreign: list[int],
    tokenizer: PreTrainedTokenizerBase,
    model: MultiTokenModel,
) -> Tensor | None:
    """The tokens that a trimmed output keeps; None: those that it keeps already."""
    vocabulary = model.trunk.vocab_size
    if config.kind != "trimmed":
        return None
    assert config.size is not None
    if wanted.tokens is not None:
        ids = listed(wanted.tokens, vocabulary)
        if len(ids) != config.size:
            raise ConfigError(f"{wanted.tokens} lists {len(ids)} tokens, but the output's size is {config.size}.")
        return ids
    if counts is None:
        if config == model.multi_token.output:
            return None
        raise ConfigError("A trimmed output keeps the most frequent tokens of a text: give --data, or --tokens.")
    if config.size > vocabulary - len(foreign):
        raise ConfigError(
            f"The size is {config.size}, but only {vocabulary - len(foreign)} tokens are of script "
            f"{', '.join(wanted.scripts)}; take fewer."
        )
    special = [token for token in tokenizer.all_special_ids if token < vocabulary]
    return most_frequent(counts, config.size, always=special, never=foreign)


def _save(model: MultiTokenModel, source: str, out: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    name = native.base_name(source)
    native.save_heads(model, out, base_name=name, dtype=torch.bfloat16, tokenizer=tokenizer)


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(
    name: str,
    model: MultiTokenModel,
    prompts: Prompts,
    wanted: Compression,
    advance: Callable[[], None] = lambda: None,
) -> Measured:
    """Decode prompts with some heads: acceptance by category, and coverage."""
    found = decoded(model.engine(min(wanted.rows, len(prompts))), prompts, wanted.new_tokens, advance)
    every = [result for results in found.values() for result in results]
    n = model.multi_token.n
    by_category = {category: Acceptance.of(results, n) for category, results in found.items()}
    return Measured(name, model, by_category, Acceptance.of(every, n), covered(model, every))


def _beside(before: Measured, after: Measured) -> Measured:
    """With the share of the acceptance that it keeps."""
    after.notes["kept"] = (after.overall.tau - 1) / (before.overall.tau - 1)
    return after


def table(rows: Sequence[Measured]) -> Table:
    """Before and after, and what was tried: sizes, coverage, acceptance."""
    categories = list(rows[0].by_category)
    columns = ("output", "n", "MB", "draft", "coverage", "τ", "kept", *categories)
    shown = narrow_table("what outputs cost, and what acceptance", columns)
    for place, row in enumerate(rows):
        figures = row.figures()
        shown.add_row(
            row.name if place else f"{row.name} (before)",
            str(figures["n"]),
            f"{figures['bytes'] / 1e6:.1f}",
            f"{row.operations / 1e6:.2f}M",
            f"{row.coverage:.1%}",
            f"{row.overall.tau:.2f}",
            f"{row.notes['kept']:.0%}" if place else "",
            *(f"{row.by_category[name].tau:.2f}" for name in categories),
        )
    return shown


# --- choosing -----------------------------------------------------------------------------------------------------


def _choose(wanted: Compression, before: Measured, tried: list[Measured]) -> tuple[Measured, list[str]]:
    """What was asked for, or of all, those that are there included, the cheapest that keeps enough."""
    if wanted.output != AUTO:
        return tried[0], []
    before.notes["kept"] = 1.0
    every = [before, *tried]
    options = [Option(each.name, each.operations, each.notes["kept"]) for each in every]
    option, why = cheapest(options, KEEP if wanted.keep is None else wanted.keep)
    return every[options.index(option)], [why]


def _depths(wanted: Compression, chosen: Measured) -> tuple[int, list[str]]:
    """How many tokens to predict: as many as asked for, or as pay at batch 1 on this machine; and why."""
    if isinstance(wanted.depths, int):
        return wanted.depths, []
    reached = [share for share in chosen.overall.conditional if share == share]  # NaN: a draft that was never reached
    n, why = best_n(speedups(chosen.model, reached))
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
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    console: Console,
) -> Measured:
    """Train derived heads for a few steps; killed, the same command goes on from the last checkpoint."""
    start = out / START
    if not native.has_heads(start):
        _save(chosen.model, wanted.heads, start, tokenizer)
    frozen: Any = {"freeze_trunk": True}  # also for heads that were trained together with their trunk
    recipe = Recipe(
        base=str(start),
        heads=frozen,
        data=[str(path) for path in wanted.data],
        length=min(512, chosen.model.trunk.max_length),
        training={
            "max_steps": wanted.steps,
            "learning_rate": LEARNING_RATE if wanted.learning_rate is None else wanted.learning_rate,
            "save_steps": 100,
        },
    )
    train(recipe, out, say=console.print, trust_remote_code=wanted.trust_remote_code)
    recovered = native.load(out, base=chosen.model.base)
    after = measure(f"{chosen.name}, recovered", recovered, prompts, wanted)
    after.notes["recovered"] = wanted.steps
    return after
