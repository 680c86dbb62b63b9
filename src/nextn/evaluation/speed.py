"""How fast, beside what else a user could pick: contenders interleaved, medians over repeats, 95% intervals."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

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
        optional: whether the rest may be measured without it.
    """

    def __init__(
        self, name: str, specification: dict[str, Any], python: str = sys.executable, optional: bool = False
    ) -> None:
        self.name, self.specification, self.python, self.optional = name, specification, python, optional
        self.about: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None

    def start(self, say: Callable[[str], None] = lambda message: None) -> None:
        """Load it; returns when it is ready to answer.

        Args:
            say: told what it does meanwhile.

        Raises:
            BenchError: where it cannot be loaded.
        """
        self._launch(say)
        if self.about.get("compiled_here"):  # compiling takes memory that decoding does not: start again
            self.stop()
            self._launch(say)
        self.answer([0, 0], 8)  # whatever a first call pays for, and fails at

    def _launch(self, say: Callable[[str], None]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        try:
            self._process = subprocess.Popen(
                [self.python, contenders.__file__, json.dumps(self.specification)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=os.environ | {"PYTHONSAFEPATH": "1"},  # or the files beside the script would hide modules
            )
        except OSError as error:
            raise BenchError(f"{self.name} cannot be started with {self.python}: {error.strerror}.") from None
        while "doing" in (message := self._read()):
            say(message["doing"])
        self.about = message

    def answer(self, prompt: Sequence[int], new_tokens: int, replay: Sequence[int] | None = None) -> dict[str, Any]:
        """Its answer to token ids: `seconds`, `count`, `peak_mib` and what `nextn.evaluation.contenders` says."""
        assert self._process is not None and self._process.stdin is not None
        asked = {"prompt": list(prompt), "new_tokens": new_tokens, "replay": replay and list(replay)}
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except OSError:
            self._raise_ended()
        return self._read()

    def stop(self) -> None:
        """End the process."""
        if self._process is None:
            return
        try:
            self._process.communicate(timeout=20)  # closes its standard input
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process = None

    def _read(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._raise_ended()
        return json.loads(line)

    def _raise_ended(self) -> NoReturn:
        assert self._process is not None
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines() or ["it said nothing"]
        raise BenchError(f"{self.name} ended (exit status {status}): {said[-1]}")


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
    steady: bool = True  # whether all repeats gave the same tokens


Timings = dict[str, list[Timing]]  # by contender, in the order of the prompts


def race(
    running: Sequence[Contender],
    prompts: Sequence[Prompt],
    new_tokens: int,
    repeats: int,
    trace: Sequence[Sequence[int]] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Timings:
    """Let started contenders answer every prompt `repeats` times, one at a time, each time in another order.

    Args:
        trace: for each prompt how many drafts of ours are to stand, step by step, or one list for all.

    Raises:
        BenchError: where one ends.
    """
    timings: Timings = {one.name: [Timing() for _ in prompts] for one in running}
    shuffled = random.Random(0)
    for _ in range(repeats):
        for place, prompt in enumerate(prompts):
            for one in shuffled.sample(running, len(running)):
                replay = trace[place % len(trace)] if trace and one.name == "nextn" else None
                _note(timings[one.name][place], one.answer(prompt.ids, new_tokens, replay))
                advance()
    return timings


def _note(timing: Timing, answer: dict[str, Any]) -> None:
    if timing.answer and timing.answer.get("tokens") != answer.get("tokens"):
        timing.steady = False
    timing.count = answer["count"]
    timing.seconds.append(answer["seconds"])
    timing.parts.append(answer.get("parts", {}))
    timing.answer = answer


# --- from timings to figures --------------------------------------------------------------------------------------


def speeds(timings: Timings, places: Sequence[int], ours: str = "nextn", draws: int = 2000) -> dict[str, Any]:
    """`tokens_per_second` by contender and `speedup` of ours over each: tokens over median seconds, both summed.

    The 95% intervals are a bootstrap: prompts are drawn anew, and within each prompt its repeats. With one prompt and
    one repeat there is none (`low` and `high` are None).
    """
    generator = np.random.default_rng(0)
    count, repeats = len(places), len(timings[ours][places[0]].seconds)
    drawn = generator.integers(0, count, (draws, count))
    again = generator.integers(0, repeats, (draws, count, repeats))
    values: dict[str, float] = {}
    samples: dict[str, np.ndarray] = {}
    for name, timing in timings.items():
        tokens = np.array([timing[place].count for place in places])
        seconds = np.array([timing[place].seconds for place in places])  # [prompts, repeats]
        values[name] = float(tokens.sum() / np.median(seconds, axis=1).sum())
        spent = np.median(np.take_along_axis(seconds[drawn], again, axis=2), axis=2)
        samples[name] = tokens[drawn].sum(axis=1) / spent.sum(axis=1)

    def figure(value: float, sample: np.ndarray) -> dict[str, float | None]:
        if count * repeats == 1:
            return {"value": value, "low": None, "high": None}
        low, high = np.percentile(sample, [2.5, 97.5])
        return {"value": value, "low": float(low), "high": float(high)}

    return {
        "tokens_per_second": {name: figure(values[name], samples[name]) for name in timings},
        "speedup": {
            name: figure(values[ours] / values[name], samples[ours] / samples[name]) for name in timings if name != ours
        },
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


def roofline(
    ms: dict[str, float],
    timings: Sequence[Timing],
    prompts: Sequence[Prompt],
    cost: dict[str, int],
    machine: dict[str, float],
) -> dict[str, float]:
    """One step, its parts in `ms` (see `time_split`), against the least that its bytes and operations take here."""
    length = statistics.mean(
        len(prompt.ids) + timing.count / 2 for prompt, timing in zip(prompts, timings, strict=True)
    )
    least = bound(cost, machine, length)
    step = ms["verify"] + ms["draft"] + ms["loop"]
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
        Generation(prompt.ids, *(timing.answer[name] for name in ("tokens", "origins", "accepted", "drafted")))
        for prompt, timing in zip(prompts, timings, strict=True)
    ]


@dataclass
class Comparison:
    """What the texts amount to, prompt by prompt.

    verdicts: how the text with heads compares with the plain one, see `agreement`.
    checks, plain_checks: of both texts against a float32 trunk.
    """

    verdicts: list[str]
    checks: list[Check]
    plain_checks: list[Check]


def compare_texts(reference: Trunk, timings: Timings, prompts: Sequence[Prompt], near_tie: float) -> Comparison:
    """Check the text with heads and the plain one, every token, against a float32 trunk."""
    ours, plain = (generations(timings[name], prompts) for name in ("nextn", "plain"))
    checks, plain_checks = ([Check.of([one], near_tie) for one in gaps(reference, texts)] for texts in (ours, plain))
    return Comparison(agreement(reference, ours, [other.tokens for other in plain], near_tie), checks, plain_checks)


def text_figures(compared: Comparison | None, places: Sequence[int]) -> dict[str, Any]:
    """Counts over some of the prompts, None where acceptance was replayed and so nothing was checked.

    `identical` texts, those that `part_at_a_near_tie`, those that `differ`; `near_ties` and `unexplained` tokens with
    heads, their `worst` gap, and `plain_unexplained` tokens.
    """
    names = ("identical", "part_at_a_near_tie", "differ", "near_ties", "unexplained", "worst", "plain_unexplained")
    if compared is None:
        return dict.fromkeys(names)
    verdicts = [compared.verdicts[place] for place in places]
    checks = [compared.checks[place] for place in places]
    counts = (
        *(verdicts.count(verdict) for verdict in ("identical", "near tie", "differs")),
        sum(one.near_ties for one in checks),
        sum(one.unexplained for one in checks),
        max(one.worst for one in checks),
        sum(compared.plain_checks[place].unexplained for place in places),
    )
    return dict(zip(names, counts, strict=True))


def figures(
    timings: Timings,
    prompts: Sequence[Prompt],
    places: Sequence[int],
    n: int,
    costs: dict[str, dict[str, int]],
    machine: dict[str, float],
    compared: Comparison | None,
) -> dict[str, Any]:
    """The figures over some of the prompts (`places`), as `nextn bench --json` writes them.

    Args:
        costs: `step_cost` of our contenders, by name.
        machine: what `measure_machine` gave.
        compared: None where acceptance was replayed.
    """
    chosen = [prompts[place] for place in places]
    of = {name: [timings[name][place] for place in places] for name in costs}
    splits = {name: time_split(timing) for name, timing in of.items()}
    lines = {
        name: roofline(splits[name]["ms_per_step"], timing, chosen, costs[name], machine) for name, timing in of.items()
    }
    return {
        "prompts": len(places),
        **acceptance_json(Acceptance.of(generations(of["nextn"], chosen), n)),
        **speeds(timings, places),
        **text_figures(compared, places),
        "time_split": splits,
        "roofline": lines,
        "step_over_plain_step": lines["nextn"]["step_ms"] / lines["plain"]["step_ms"],
    }
