"""`nextn bench`: our engine with heads and without, beside transformers, llama.cpp and vLLM where they are there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nextn.data import prompt_ids, read_prompts
from nextn.decoding.engine import progress_bar
from nextn.distill import interleaved
from nextn.evaluation.acceptance import DEFINITIONS
from nextn.evaluation.demo import PROMPTS
from nextn.evaluation.lossless import float32_twin, near_tie_bound
from nextn.evaluation.replay import read_trace
from nextn.evaluation.report import acceptance_cells, machine
from nextn.evaluation.roofline import measure_machine
from nextn.evaluation.speed import (
    BenchError,
    Comparison,
    Contender,
    Prompt,
    Timing,
    Timings,
    compare_texts,
    figures,
    generations,
    race,
)
from nextn.formats.native import (
    base_of,
    describe,
    heads_directory,
    load_base,
    load_config,
    named_dtype,
    tokenizer_of,
)
from nextn.trunk import Trunk, context_length


@dataclass
class Settings:
    """What is measured.

    model: a directory that nextn wrote, or the name of the bundled model.
    prompts: JSON lines with `prompt` and `category`; None: the three of the demonstration.
    count: how many of them, taken from the categories in turn; None: all.
    repeats: how often each contender answers each prompt.
    dtype: of our engine and of transformers and vLLM.
    gguf: files for llama.cpp.
    vllm_python: an interpreter whose environment has vLLM.
    replay: a file of an earlier run, or a τ; see `read_trace`.
    eager: without compiling.
    trust_remote_code: run the code that the base's repository brings.
    """

    model: str
    prompts: Path | None = None
    count: int | None = None
    new_tokens: int = 128
    repeats: int = 3
    dtype: str = "bfloat16"
    gguf: list[Path] = field(default_factory=list)
    vllm_python: str | None = None
    replay: str | None = None
    eager: bool = False
    trust_remote_code: bool = False


def bench(settings: Settings, console: Console) -> dict[str, Any]:
    """Measure, and return what `nextn bench --json` writes.

    Raises:
        BenchError: where a contender cannot run; the message says which and why.
    """
    base = base_of(settings.model)
    description = describe(heads_directory(settings.model))
    if "adapters" in description:
        raise BenchError(
            f"{settings.model} has adapters, and other engines would open its base without them: save it with "
            "merge_adapters=True first."
        )
    n = int(description["multi_token"]["n"])
    prompts = read(settings, base, console)
    trace = None if settings.replay is None else read_trace(settings.replay, n - 1)
    running = field_of(settings, base, prompts, console)
    with ExitStack() as cleanup:
        with progress_bar(console) as bar:
            for one in list(running):
                cleanup.callback(one.stop)
                try:
                    _start(one, bar)
                except BenchError as error:
                    if not one.optional:
                        raise
                    console.print(f"left out: {error}", markup=False)
                    running.remove(one)
        compiled = compiled_alike(running, console)
        costs = {one.name: one.about["cost"] for one in running if "cost" in one.about}
        limits = measure_machine(named_dtype(settings.dtype), costs["nextn"]["weight_bytes"])
        with progress_bar(console) as bar:
            task = bar.add_task("measuring", total=len(prompts) * len(running) * settings.repeats)
            advance = partial(bar.advance, task)
            timings = race(running, prompts, settings.new_tokens, settings.repeats, trace, advance)
    compared = near_tie = None
    if settings.replay is None:
        with console.status("checking every token against a float32 pass, one token a step"):
            near_tie, compared = check_texts(settings, base, timings, prompts, n)
    found = report(settings, running, prompts, timings, n, costs, limits, near_tie, compared)
    return found | {"compiled": compiled}


def _start(one: Contender, bar: Progress) -> None:
    task = bar.add_task(f"starting {one.name}", total=None)
    one.start(lambda doing: bar.update(task, description=f"{one.name}: {doing}"))
    bar.remove_task(task)


def compiled_alike(running: Sequence[Contender], console: Console) -> bool:
    """Whether our engine runs as machine code; with heads and without alike, or the comparison would not be fair."""
    ours = [one for one in running if "compiled" in one.about]
    for one in ours:
        if why := one.about["why_eager"]:
            console.print(f"{one.name} runs eagerly: {why}", markup=False)
    states = {one.about["compiled"] for one in ours}
    if len(states) > 1:
        raise BenchError("Of our engine only one of plain and with heads could be compiled; measure with --eager.")
    return states == {True}


def check_texts(
    settings: Settings, base: str, timings: Timings, prompts: Sequence[Prompt], n: int
) -> tuple[float, Comparison]:
    """The near-tie bound on this machine, and how the texts compare."""
    host = load_base(base, named_dtype(settings.dtype), settings.trust_remote_code).eval()
    some = generations(timings["nextn"][:4], prompts[:4])
    near_tie = near_tie_bound(Trunk(host), [one.prompt + one.tokens for one in some], n)
    return near_tie, compare_texts(float32_twin(host), timings, prompts, near_tie)


def report(
    settings: Settings,
    running: Sequence[Contender],
    prompts: Sequence[Prompt],
    timings: Timings,
    n: int,
    costs: dict[str, dict[str, int]],
    limits: dict[str, float],
    near_tie: float | None,
    compared: Comparison | None,
) -> dict[str, Any]:
    """From timings to the report: figures overall and by category."""
    by_category = {}
    for category in sorted({prompt.category for prompt in prompts}):
        places = [place for place, prompt in enumerate(prompts) if prompt.category == category]
        by_category[category] = figures(timings, prompts, places, n, costs, limits, compared)
    return {
        "model": settings.model,
        "n": n,
        "dtype": settings.dtype,
        "batch": 1,
        "new_tokens": settings.new_tokens,
        "repeats": settings.repeats,
        "replay": settings.replay,
        "near_tie_bound": near_tie,
        "overall": figures(timings, prompts, range(len(prompts)), n, costs, limits, compared),
        "by_category": by_category,
        "contenders": {one.name: contender_json(one, timings) for one in running},
        "machine": machine() | limits,
        "trace": [timing.answer["accepted"] for timing in timings["nextn"]],
        "sample": sample(timings, prompts),
    }


def read(settings: Settings, base: str, console: Console) -> list[Prompt]:
    """The prompts, from each category in turn; those that leave no room for an answer are left out, and counted.

    Raises:
        BenchError: where none is left.
    """
    records = [{"category": name, "prompt": text} for name, text in PROMPTS.items()]
    if settings.prompts is not None:
        records = interleaved(read_prompts(settings.prompts))
    for record in records:
        if not isinstance(category := record.get("category", "all prompts"), str) or category == "all":
            raise BenchError(f"The category {category!r} of a prompt is no text, or the name of the whole ('all').")
    context = context_length(load_config(base, settings.trust_remote_code).get_text_config())
    tokenizer, room = tokenizer_of(settings.model, settings.trust_remote_code), context - settings.new_tokens
    prompts = [
        Prompt(record.get("category", "all prompts"), record["prompt"], prompt_ids(tokenizer, record["prompt"]))
        for record in records[: settings.count]
    ]
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= room]
    if not fitting:
        raise BenchError(f"No prompt leaves room for {settings.new_tokens} new tokens in the model's context.")
    if left_out := len(prompts) - len(fitting):
        console.print(f"{left_out} prompts are too long for {settings.new_tokens} new tokens, and left out")
    return fitting


def field_of(settings: Settings, base: str, prompts: Sequence[Prompt], console: Console) -> list[Contender]:
    """Who is measured, ours first.

    Raises:
        BenchError: for files without an engine to run them, or two of one name.
    """
    common = {"threads": torch.get_num_threads(), "endless": settings.replay is not None}
    opened = common | {"dtype": settings.dtype, "trust_remote_code": settings.trust_remote_code}
    ours = opened | {"kind": "nextn", "model": settings.model, "eager": settings.eager}
    theirs = opened | {"kind": "transformers", "model": base}
    context = {"context": max(len(prompt.ids) for prompt in prompts) + settings.new_tokens}
    found = [
        Contender("nextn", ours | {"heads": None}),
        Contender("plain", ours | {"heads": 1}),
        Contender("transformers", theirs | {"settings": {}}),
        Contender("transformers lookup", theirs | {"settings": {"prompt_lookup_num_tokens": 4}}),
    ]
    if getattr(load_config(base, settings.trust_remote_code), "num_mtp_layers", 0):
        # The config may name MTP layers that the checkpoint does not have.
        found.append(Contender("transformers mtp", theirs | {"settings": {"use_mtp": True}}, optional=True))
    if settings.gguf and not _installed("xllamacpp"):
        raise BenchError("GGUF files are given, but there is no llama.cpp here: pip install xllamacpp.")
    if not settings.gguf and _installed("xllamacpp"):
        console.print("llama.cpp is installed, but not measured: name the model's GGUF files with --gguf")
    for path in settings.gguf:
        kind = path.stem.rsplit("-", 1)[-1]
        found.append(Contender(f"llama.cpp {kind}", common | context | {"kind": "llama.cpp", "gguf": str(path)}))
    if settings.vllm_python or _installed("vllm"):
        there = opened | context | {"kind": "vllm", "model": base}
        found.append(Contender("vLLM", there, settings.vllm_python or sys.executable))
    names = [one.name for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BenchError(f"Two files are called {twice}; the part of a name after its last hyphen tells files apart.")
    return found


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def contender_json(one: Contender, timings: Timings) -> dict[str, Any]:
    """A contender's settings, version and peak memory."""
    about = {key: value for key, value in one.about.items() if key not in ("cost", "compiled_here", "why_eager")}
    settings = {key: value for key, value in one.specification.items() if key not in ("model", "gguf")}
    return (
        settings
        | about
        | {
            "peak_mib": max(timing.answer["peak_mib"] for timing in timings[one.name]),
            "same_text_every_repeat": _steady(timings[one.name]),
        }
    )


def _steady(timing: Sequence[Timing]) -> bool | None:
    """Whether every repeat gave the same text; None where the engine does not give its tokens."""
    return None if "tokens" not in timing[0].answer else all(one.steady for one in timing)


def sample(timings: Timings, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The answer with the median share of drafted tokens, to look at: prompt, tokens and who proposed each."""

    def drafted(place: int) -> float:
        origins = timings["nextn"][place].answer["origins"]
        return sum(map(bool, origins)) / len(origins)

    place = sorted(range(len(prompts)), key=drafted)[len(prompts) // 2]
    answer = timings["nextn"][place].answer
    return {"prompt": prompts[place].text, "tokens": answer["tokens"], "origins": answer["origins"]}


# --- tables -------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    """What `nextn bench` prints."""
    rows = [*found["by_category"].items(), ("all", found["overall"])]
    speed = Table(title="tokens per second, and nextn over it with 95% interval", title_justify="left", box=SIMPLE_HEAD)
    speed.add_column("contender")
    for name, _ in rows:
        speed.add_column(name, justify="right")
    speed.add_column("nextn over it", justify="right")
    speed.add_column("peak memory", justify="right")
    for contender, about in found["contenders"].items():
        over = found["overall"]["speedup"].get(contender)
        ratio = "" if over is None else f"{over['value']:.2f}"
        if over is not None and over["low"] is not None:
            ratio += f" ({over['low']:.2f} – {over['high']:.2f})"
        each = [f"{row['tokens_per_second'][contender]['value']:.1f}" for _, row in rows]
        speed.add_row(contender, *each, ratio, f"{about['peak_mib']:,.0f} MiB")

    drafts = Table(title="drafts and text", title_justify="left", box=SIMPLE_HEAD)
    for column in ("category", "prompts", "τ", "conditional", "cumulative", "text", "ties", "unexplained", "worst"):
        drafts.add_column(column, justify="left" if column == "category" else "right")
    for name, row in rows:
        text = ["–"] * 4
        if row["identical"] is not None:
            same = f"{row['identical']} / {row['part_at_a_near_tie']} / {row['differ']}"
            text = [same, str(row["near_ties"]), str(row["unexplained"]), f"{row['worst']:.2g}"]
        drafts.add_row(name, str(row["prompts"]), *acceptance_cells(row), *text)

    step = Table(title="one step, in ms (share of all time)", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "verify", "draft", "loop", "step", "limit by bytes", "by operations", "prefill"):
        step.add_column(column, justify="right" if column else "left")
    for name, split in found["overall"]["time_split"].items():
        line = found["overall"]["roofline"][name]
        parts = {part: f"{split['ms_per_step'][part]:.2f} ({share:.1%})" for part, share in split["share"].items()}
        limits = (f"{line[key]:.2f}" for key in ("step_ms", "ms_by_bytes", "ms_by_operations"))
        prefill = f"({split['share']['prefill']:.1%})"
        step.add_row(name, *(parts[part] for part in ("verify", "draft", "loop")), *limits, prefill)
    return [speed, drafts, step]


def conditions(found: dict[str, Any]) -> str:
    """Where and how the figures came about."""
    here, overall = found["machine"], found["overall"]
    way = "compiled" if found["compiled"] else "eager"
    lines = [
        f"{here['processor']}, {here['threads']} threads, {found['dtype']}, batch 1, greedy, "
        f"{overall['prompts']} prompts, {found['new_tokens']} new tokens, median of {found['repeats']} repeats, {way}. "
        f"Measured: {here['bandwidth'] / 1e9:.1f} GB/s, {here['rate'] / 1e9:,.0f} GFLOP/s. A step with drafts takes "
        f"{overall['step_over_plain_step']:.2f} times a plain one.",
        DEFINITIONS,
    ]
    if found["replay"] is None:
        ties = (
            "Text: identical to the plain one / parting at a near tie / differing. Near ties are within "
            f"{found['near_tie_bound']:.3g} logits of a float32 pass's best token; worst: the largest gap. "
            f"Unexplained tokens of the plain text: {overall['plain_unexplained']}."
        )
    else:
        ties = f"Acceptance was replayed ({found['replay']}): the text is not the trunk's and was not checked."
    lines.insert(1, ties)
    for name in ("nextn", "plain"):
        if not found["contenders"][name]["same_text_every_repeat"]:
            lines.append(f"Repeats of {name} gave different texts; the last ones were checked.")
    return "\n".join(lines)
