"""`nextn bench --batch … --temperature …`: our engine with heads over our own plain one, side by side, paired."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from nextn.decoding.engine import Engine, Generation, progress_bar
from nextn.decoding.pace import TREE
from nextn.decoding.rows import OnTokens
from nextn.decoding.sampling import Sampling
from nextn.decoding.tree import Tree
from nextn.evaluation.acceptance import DEFINITIONS, Acceptance
from nextn.evaluation.bench import Settings, read
from nextn.evaluation.report import Interval, acceptance_json, interval, machine, narrow_table
from nextn.evaluation.roofline import bound, measure_machine, step_cost
from nextn.evaluation.speed import Prompt
from nextn.formats.native import base_of, load, named_dtype

WARM_UP = 16  # tokens a text of the run that is not counted


@dataclass
class Sweep:
    """What is varied.

    batches: rows; temperatures: 0 is greedy.
    method: how drafts are verified where tokens are drawn, see `Sampling`.
    groups: so many batches of each category at batch 1; fewer at larger ones, but six: the smallest and the largest of
        six hold the median between them in 97 of 100 cases, of four in 88.
    tree: read a tree of drafts where that is faster.
    """

    batches: list[int]
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    method: Sampling = field(default_factory=Sampling)
    groups: int = 8
    tree: Tree | None = None


@dataclass
class Pair:
    """One batch of prompts, answered by both: tokens and seconds of each, and what the drafts did."""

    group: int
    category: str
    tokens: tuple[int, int]
    seconds: tuple[float, float]
    results: list[Generation]
    alike: int
    steps: dict[int, int]

    @property
    def ratio(self) -> float:
        (ours, plain), (fast, slow) = self.tokens, self.seconds
        return (ours / fast) / (plain / slow)


def sweep(
    settings: Settings, varied: Sweep, console: Console, keep: Callable[[dict[str, Any]], None] = lambda found: None
) -> dict[str, Any]:
    """Measure, and return what `nextn bench --batch … --json` writes.

    Args:
        keep: called with all that is there after each batch size and temperature.

    Raises:
        BenchError: where no prompt fits.
    """
    model = load(settings.model, dtype=named_dtype(settings.dtype), trust_remote_code=settings.trust_remote_code).eval()
    by_category = prompts_by_category(settings, console)
    found: dict[str, Any] = {
        "model": settings.model,
        "n": model.multi_token.n,
        "dtype": settings.dtype,
        "new_tokens": settings.new_tokens,
        "repeats": settings.repeats,
        "method": varied.method.method,
        "block": varied.method.block,
        "tree": None if varied.tree is None else {"paths": varied.tree.paths, "nodes": varied.tree.nodes},
        "rows": [],
        "machine": machine(),
    }
    for batch in varied.batches:
        engines = (
            model.engine(batch, stop_tokens=[], depth="auto", tree=varied.tree),
            model.engine(batch, heads=1, stop_tokens=[]),
        )
        if not settings.eager:
            for engine in engines:
                engine.compile(sampling=any(varied.temperatures))
        work = batches_of(by_category, batch, varied.groups)
        for temperature in varied.temperatures:
            pairs = race(engines, work, replace(varied.method, temperature=temperature, seed=0), settings, console)
            if "bandwidth" not in found["machine"]:
                weights = step_cost(engines[0])["weight_bytes"]
                found["machine"] |= measure_machine(named_dtype(settings.dtype), weights)
            row = figures(engines, pairs, batch, temperature)
            row["pays"] = pays(engines[0], found["machine"], "scores" if temperature else "greedy")
            found["rows"].append(row)
            keep(found)
            console.print(table([row]))
    return found


def prompts_by_category(settings: Settings, console: Console) -> dict[str, list[Prompt]]:
    """The prompts that the settings name, in their order.

    Raises:
        BenchError: where no prompt fits.
    """
    found: dict[str, list[Prompt]] = {}
    for prompt in read(settings, base_of(settings.model), console):
        found.setdefault(prompt.category, []).append(prompt)
    return found


def batches_a_category(batch: int, groups: int) -> int:
    """Of how many batches a median is taken, see `Sweep`."""
    return max(6, groups // batch)


def batches_of(by_category: dict[str, list[Prompt]], batch: int, groups: int) -> list[tuple[str, list[list[int]]]]:
    """Batches of prompts of one category each; where there are too few they come again, mixed otherwise."""
    work = []
    for category, prompts in by_category.items():
        count, mixed, shuffled = batches_a_category(batch, groups), list(prompts), random.Random(0)
        while len(mixed) < count * batch:
            mixed += shuffled.sample(prompts, len(prompts))
        ids = [prompt.ids for prompt in mixed]
        work += [(category, ids[group * batch :][:batch]) for group in range(count)]
    return work


def race(
    engines: tuple[Engine, Engine],
    work: Sequence[tuple[str, list[list[int]]]],
    sampling: Sampling,
    settings: Settings,
    console: Console,
) -> list[Pair]:
    """Both engines on every batch of prompts, in turns, step by step; who begins is drawn."""
    for engine in engines:
        list(engine.generate(work[0][1], WARM_UP, sampling=sampling))
    shuffled, pairs = random.Random(0), []
    with progress_bar(console) as bar:
        task = bar.add_task(
            f"batch {engines[0].rows}, temperature {sampling.temperature:g}", total=settings.repeats * len(work)
        )
        for _ in range(settings.repeats):
            for group, (category, prompts) in enumerate(work):
                seconds, found = _both(engines, prompts, sampling, settings.new_tokens, shuffled)
                pairs.append(_pair(group, category, seconds, found, dict(engines[0].steps)))
                bar.advance(task)
    return pairs


def _both(
    engines: tuple[Engine, Engine], prompts: list[list[int]], sampling: Sampling, new: int, shuffled: random.Random
) -> tuple[list[float], list[list[Generation]]]:
    """Seconds and generations of both; whoever has fewer tokens makes the next step.

    So both meet the same machine, which is faster in one second and slower in another.
    """
    seconds, tokens = [0.0, 0.0], [0, 0]
    found: list[dict[int, Generation]] = [{}, {}]

    def counts(place: int) -> OnTokens:
        def on_tokens(_index: int, emitted: list[int], _origins: list[int]) -> None:
            tokens[place] += len(emitted)

        return on_tokens

    runs = [engine.stepwise(prompts, new, counts(place), sampling) for place, engine in enumerate(engines)]
    at_work = shuffled.sample((0, 1), 2)
    while at_work:
        place = min(at_work, key=lambda place: tokens[place])
        start = time.perf_counter()
        finished = next(runs[place], None)
        seconds[place] += time.perf_counter() - start
        if finished is None:
            at_work.remove(place)
        else:
            found[place].update(finished)
    return seconds, [[results[index] for index in range(len(prompts))] for results in found]


def _pair(
    group: int, category: str, seconds: list[float], found: list[list[Generation]], steps: dict[int, int]
) -> Pair:
    ours, plain = found
    return Pair(
        group=group,
        category=category,
        tokens=(sum(len(each.tokens) for each in ours), sum(len(each.tokens) for each in plain)),
        seconds=(seconds[0], seconds[1]),
        results=ours,
        alike=sum(a.tokens == b.tokens for a, b in zip(ours, plain, strict=True)),
        steps=steps,
    )


def figures(engines: tuple[Engine, Engine], pairs: Sequence[Pair], batch: int, temperature: float) -> dict[str, Any]:
    """The figures of one batch size and temperature: overall, and the ratio by category."""
    ours, plain = engines
    categories = sorted({pair.category for pair in pairs})
    steps: dict[int, int] = {}
    for pair in pairs:
        for drafts, count in pair.steps.items():
            steps[drafts] = steps.get(drafts, 0) + count
    acceptance = Acceptance.of([result for pair in pairs for result in pair.results], ours.n)
    return {
        "batch": batch,
        "temperature": temperature,
        "compiled": ours.code is not None and plain.code is not None,
        "ratio": _ratio(pairs),
        "ratio_by_category": {name: _ratio([pair for pair in pairs if pair.category == name]) for name in categories},
        "tokens_per_second": {
            name: sum(pair.tokens[place] for pair in pairs) / sum(pair.seconds[place] for pair in pairs)
            for place, name in enumerate(("nextn", "plain"))
        },
        "steps_by_drafts": {
            "tree" if drafts == TREE else str(drafts): count for drafts, count in sorted(steps.items())
        },
        **acceptance_json(acceptance),
        "texts": sum(len(pair.results) for pair in pairs),
        "texts_as_plain": sum(pair.alike for pair in pairs),
    }


def _ratio(pairs: Sequence[Pair]) -> dict[str, float | None]:
    """Of the pairs, with an interval over batches of prompts and repeats."""
    return interval([pair.ratio for pair in pairs], [pair.group for pair in pairs])._asdict()


def pays(engine: Engine, limits: dict[str, float], kind: str) -> dict[str, dict[str, float | None]]:
    """By drafts a row: the ms of a step of all rows, and from how many tokens a step on it beats plain steps (τ).

    The ms are of greedy steps as measured at first, None where they were not; τ is of steps of this kind, as followed
    until now; and what both are at the machine's limits, after 128 tokens.
    """
    measured = engine.pace.profile.step if engine.pace.profile else {}
    limit = {drafts: 1e3 * least_seconds(step_cost(engine, drafts), limits, engine.rows) for drafts in {0, *measured}}
    return {
        str(drafts): {
            "ms": 1e3 * measured[drafts] if drafts in measured else None,
            "tau": engine.pace.over_plain(kind, drafts) if drafts in measured else None,
            "roofline_ms": ms,
            "roofline_tau": ms / limit[0],
        }
        for drafts, ms in sorted(limit.items())
    }


def least_seconds(cost: dict[str, int], limits: dict[str, float], batch: int) -> float:
    """Of a step of so many rows: weights are read once, the rest is for each row."""
    whole = cost | {name: cost[name] * batch for name in ("operations", "cache_bytes_per_position")}
    found = bound(whole, limits, 128)
    return max(found["by_bytes"], found["by_operations"])


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """What `nextn bench --batch …` prints."""
    columns = ("batch", "T", "plain", "nextn", "over plain", "worst category", "τ", "as plain", "drafts a step")
    shown = narrow_table("tokens a second, and nextn over our own plain (95%)", columns)
    for row in rows:
        worst = min(row["ratio_by_category"].items(), key=lambda item: item[1]["value"])
        count = sum(row["steps_by_drafts"].values())
        shares = [f"{drafts}: {steps / count:.0%}" for drafts, steps in row["steps_by_drafts"].items()]
        shown.add_row(
            str(row["batch"]),
            f"{row['temperature']:g}",
            *(f"{row['tokens_per_second'][name]:.0f}" for name in ("plain", "nextn")),
            Interval(**row["ratio"]).cell(),
            f"{worst[0]} {worst[1]['value']:.2f}",  # with an interval the table would not fit 80 columns
            "–" if row["tau"] is None else f"{row['tau']:.2f}",
            f"{row['texts_as_plain']}/{row['texts']}",
            " ".join(shares),
        )
    return shown


def conditions(found: dict[str, Any]) -> str:
    """Where and how the figures came about."""
    here = found["machine"]
    ways = sorted({"compiled" if row["compiled"] else "eager" for row in found["rows"]})
    return (
        f"{here['processor']}, {here['threads']} threads, {found['dtype']}, {found['new_tokens']} new tokens a text, "
        f"{found['repeats']} repeats, step by step in turns; {' and '.join(ways)}. Ratios are medians of pairs. As "
        f"plain: texts that are plain decoding's, token for token; with {found['method']} sampling. {DEFINITIONS}"
    )


def numbers(text: str, what: str, kind: type = int) -> list[Any]:
    """`1,2,4` as a list.

    Raises:
        ValueError: for what is no list of numbers.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{what} is {text!r}; give numbers with commas, like 1,2,4.") from None
    if min(found) < (1 if kind is int else 0):
        raise ValueError(f"{what} is {text!r}; batches are at least 1, temperatures at least 0.")
    return found
