"""How fast, beside what else a user could pick: contenders interleaved, medians over repeats, 95% intervals."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextn.decoding.engine import Generation
from nextn.evaluation import contenders
from nextn.evaluation.acceptance import Acceptance
from nextn.evaluation.lossless import Check, agreement, gaps
from nextn.evaluation.report import acceptance_json
from nextn.evaluation.roofline import bound
from nextn.trunk import Trunk

PARTS = ("verify", "draft", "prefill", "loop")


class BenchError(ValueError):
    """A measurement that cannot be made; the message says why."""


class Contender:
    """A contender in its process.

    Args:
        name: what tables call it.
        specification: `kind` and the arguments of that kind, see `nextn.evaluation.contenders`.
        python: the interpreter; another one where an engine lives in an environment of its own.
    """

    def __init__(self, name: str, specification: dict[str, Any], python: str = sys.executable) -> None:
        self.name, self.specification, self.python = name, specification, python

    def start(self) -> None:
        """Load it; returns when it is ready to answer.

        Raises:
            BenchError: where it cannot be loaded.
        """
        self._launch()
        if self.about.get("fresh"):  # compiling takes memory that decoding does not: start again
            self.stop()
            self._launch()

    def _launch(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            [self.python, contenders.__file__, json.dumps(self.specification)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.about = self._read()

    def answer(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """Its answer to token ids: `seconds`, `count`, `peak_mib` and what `nextn.evaluation.contenders` says."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines() or ["it said nothing"]
        raise BenchError(f"{self.name} ended (exit status {self._process.returncode}): {said[-1]}")


@dataclass
class Prompt:
    """A prompt to be measured on."""

    category: str
    text: str
    ids: list[int]


@dataclass
class Timing:
    """One contender on one prompt, over all repeats."""

    count: int = 0
    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)  # of the last repeat


Timings = dict[str, list[Timing]]  # by contender, in the order of the prompts


def race(
    running: Sequence[Contender],
    prompts: Sequence[Prompt],
    new_tokens: int,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> Timings:
    """Let started contenders answer every prompt `repeats` times, one at a time, in an order that rotates.

    Raises:
        BenchError: where one ends.
    """
    timings: Timings = {one.name: [Timing() for _ in prompts] for one in running}
    for one in running:
        one.answer(prompts[0].ids, 16)  # whatever a first call pays for
    for repeat in range(repeats):
        for place, prompt in enumerate(prompts):
            first = (place + repeat) % len(running)
            for one in (*running[first:], *running[:first]):
                answer = one.answer(prompt.ids, new_tokens)
                timing = timings[one.name][place]
                timing.count = answer["count"]
                timing.seconds.append(answer["seconds"])
                timing.parts.append(answer.get("parts", {}))
                timing.answer = answer
                advance()
    return timings


# --- from timings to figures --------------------------------------------------------------------------------------


def with_interval(figure: Callable[[np.ndarray], np.ndarray], count: int) -> dict[str, float]:
    """A figure over prompts and its 95% interval: a bootstrap over the prompts (2,000 draws).

    Args:
        figure: from indices of prompts [..., count] to the figure of each draw [...].
    """
    draws = figure(np.random.default_rng(0).integers(0, count, (2000, count)))
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(figure(np.arange(count))), "low": float(low), "high": float(high)}


def speeds(timings: Timings, places: Sequence[int], ours: str = "nextn") -> dict[str, Any]:
    """`tokens_per_second` by contender and `speedup` of ours over each: tokens over median seconds, both summed."""
    counts = {name: np.array([timing[place].count for place in places]) for name, timing in timings.items()}
    seconds = {
        name: np.array([statistics.median(timing[place].seconds) for place in places])
        for name, timing in timings.items()
    }

    def speed(name: str) -> Callable[[np.ndarray], np.ndarray]:
        return lambda chosen: counts[name][chosen].sum(-1) / seconds[name][chosen].sum(-1)

    def over(name: str) -> Callable[[np.ndarray], np.ndarray]:
        return lambda chosen: speed(ours)(chosen) / speed(name)(chosen)

    return {
        "tokens_per_second": {name: with_interval(speed(name), len(places)) for name in timings},
        "speedup": {name: with_interval(over(name), len(places)) for name in timings if name != ours},
    }


def time_split(timings: Sequence[Timing]) -> dict[str, dict[str, float]]:
    """Where the time of our engine went: `share` of the whole and `ms_per_step`, by part; `loop` is the rest."""
    totals = dict.fromkeys(PARTS, 0.0)
    for timing in timings:
        for seconds, parts in zip(timing.seconds, timing.parts, strict=True):
            for part, spent in parts.items():
                totals[part] += spent
            totals["loop"] += seconds - sum(parts.values())
    steps = sum(_steps(timing) * len(timing.seconds) for timing in timings)
    whole = sum(totals.values())
    return {
        "share": {part: spent / whole for part, spent in totals.items()},
        "ms_per_step": {part: 1e3 * spent / max(steps, 1) for part, spent in totals.items()},
    }


def _steps(timing: Timing) -> int:
    """Trunk forwards after the prefill, a truncated last one included."""
    accepted = timing.answer["accepted"]
    return len(accepted) + (1 + sum(accepted) + len(accepted) < timing.count)


def roofline(timings: Sequence[Timing], prompts: Sequence[Prompt], cost: dict[str, int], machine: dict) -> dict:
    """One step against the least that its bytes and operations take on this machine, see `bound`."""
    length = statistics.mean(
        len(prompt.ids) + timing.count / 2 for prompt, timing in zip(prompts, timings, strict=True)
    )
    least = bound(cost, machine, length)
    split = time_split(timings)["ms_per_step"]
    step = split["verify"] + split["draft"] + split["loop"]
    limit = 1e3 * max(least["by_bytes"], least["by_operations"])
    return {
        "bytes": least["bytes"],
        "operations": cost["operations"],
        "ms_by_bytes": 1e3 * least["by_bytes"],
        "ms_by_operations": 1e3 * least["by_operations"],
        "step_ms": step,
        "step_over_limit": step / limit,
    }


def generations(timings: Sequence[Timing], prompts: Sequence[Prompt]) -> list[Generation]:
    """What our engine answered, as the engine gives it."""
    return [
        Generation(prompt.ids, timing.answer["tokens"], timing.answer["origins"], timing.answer["accepted"])
        for prompt, timing in zip(prompts, timings, strict=True)
    ]


def figures(
    timings: Timings,
    prompts: Sequence[Prompt],
    places: Sequence[int],
    n: int,
    costs: dict[str, dict[str, int]],
    machine: dict[str, float],
    texts: Sequence[str] | None,
    checks: Sequence[Check] | None,
) -> dict[str, Any]:
    """The figures over some of the prompts (`places`), as `nextn bench --json` writes them.

    Args:
        costs: `step_cost` of our contenders, by name.
        texts: how each text with heads compares with the plain one (`agreement`); None where acceptance was replayed.
        checks: of each text with heads; None likewise.
    """
    chosen = [prompts[place] for place in places]
    of = {name: [timings[name][place] for place in places] for name in costs}
    answers = generations(of["nextn"], chosen)
    report = {
        "prompts": len(places),
        **acceptance_json(Acceptance.of(answers, n)),
        **speeds(timings, places),
        "time_split": {name: time_split(timing) for name, timing in of.items()},
        "roofline": {name: roofline(timing, chosen, costs[name], machine) for name, timing in of.items()},
    }
    plain, step = (report["time_split"][name]["ms_per_step"] for name in ("plain", "nextn"))
    report["step_over_plain_step"] = sum(step[part] for part in ("verify", "draft", "loop")) / sum(
        plain[part] for part in ("verify", "loop")
    )
    if texts is not None and checks is not None:
        report |= {
            "identical": sum(texts[place] == "identical" for place in places),
            "near_ties": sum(checks[place].near_ties for place in places),
            "unexplained": sum(checks[place].unexplained for place in places),
        }
    else:
        report |= {"identical": None, "near_ties": None, "unexplained": None}
    return report


def compare_texts(
    reference: Trunk, timings: Timings, prompts: Sequence[Prompt], near_tie: float
) -> tuple[list[str], list[Check]]:
    """How each text with heads compares with the plain one, and the check of each against a float32 trunk."""
    ours, plain = (generations(timings[name], prompts) for name in ("nextn", "plain"))
    checks = [Check.of([found], near_tie) for found in gaps(reference, ours)]
    return agreement(reference, ours, [other.tokens for other in plain], near_tie), checks


# --- replayed acceptance ------------------------------------------------------------------------------------------


def read_trace(trace: str, drafts: int) -> list[int]:
    """How many drafts stood, step by step: from what `nextn bench --json` wrote, or made up for a τ given as a number.

    Raises:
        BenchError: for a τ that the drafts cannot give, or a file that holds no trace.
    """
    try:
        tau = float(trace)
    except ValueError:
        return _recorded(Path(trace), drafts)
    if not 1 <= tau <= 1 + drafts:
        raise BenchError(
            f"τ {trace} cannot be replayed: with {drafts} drafts a step it lies between 1 and {1 + drafts}."
        )
    steps = np.floor(np.arange(1, 101) * (tau - 1) + 1e-9).astype(int)
    return np.diff(steps, prepend=0).tolist()


def _recorded(path: Path, drafts: int) -> list[int]:
    try:
        found = json.loads(path.read_text())["trace"]
        accepted = [int(count) for counts in found for count in counts]
    except (OSError, ValueError, KeyError, TypeError):
        raise BenchError(
            f"{path} holds no recorded acceptances; give a file of `nextn bench --json`, or a τ."
        ) from None
    if not accepted or max(accepted) > drafts or min(accepted) < 0:
        raise BenchError(f"{path} was recorded with another number of drafts; these heads make {drafts}.")
    return accepted


def replaying(verify: Callable[..., Any], trace: Iterator[int]) -> Callable[..., Any]:
    """The step, with as many drafts standing as the trace says instead of as many as the trunk agrees with.

    It costs what a real step costs; the text is not the trunk's.
    """

    def step(pending: Tensor, drafts: Tensor, lengths: Tensor, ends: Tensor, *cache: Any) -> tuple[Tensor, ...]:
        targets, _, _, _, tapped, _ = verify(pending, drafts, lengths, ends, *cache)
        accepted = torch.tensor([next(trace) for _ in pending], device=pending.device)
        places = torch.arange(targets.shape[1], device=pending.device)
        positions = lengths[:, None] + places
        standing = torch.where((places <= accepted[:, None]) & (positions < ends[:, None]), positions, -1)
        newest = targets.gather(1, accepted[:, None])[:, 0]
        return targets, accepted, newest, lengths + accepted + 1, tapped, standing

    return step
