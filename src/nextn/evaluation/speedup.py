"""How much faster heads make decoding here, measured on a few prompts: what `nextn attach` ends with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from nextn.decoding.engine import Engine, Generation
from nextn.evaluation.acceptance import Acceptance
from nextn.evaluation.report import Interval, interval, narrow_table
from nextn.model import MultiTokenModel

LEAST_GAIN = 1.05  # a speed-up below this is not worth the memory of the heads


@dataclass(frozen=True)
class Speedup:
    """Acceptance, and decoding steps with all drafts beside plain ones, measured in turns.

    acceptance: of steps with all drafts.
    plain_seconds, drafted_seconds: medians over the prompts of the mean time of a step, prefill left out.
    step_time_ratio: of the times of a drafted and a plain step, by prompt.
    new_tokens: tokens decoded with drafts.
    """

    acceptance: Acceptance
    plain_seconds: float
    drafted_seconds: float
    step_time_ratio: Interval
    new_tokens: int

    def expected(self, drafts: int) -> float:
        """The expected speed-up with so many drafts a step.

        The time of a step is interpolated between a plain one and one with all drafts.
        """
        share = drafts / len(self.acceptance.cumulative)
        return (1 + sum(self.acceptance.cumulative[:drafts])) / (1 + share * (self.step_time_ratio.value - 1))

    @property
    def best_drafts(self) -> int:
        """How many drafts a step decode fastest; 0 where plain decoding does."""
        return max(range(len(self.acceptance.cumulative) + 1), key=self.expected)

    @property
    def is_worth_it(self) -> bool:
        return self.expected(self.best_drafts) >= LEAST_GAIN

    def table(self) -> Table:
        """Acceptance and expected speed-up by the number of drafts."""
        title = f"{self.new_tokens:,} tokens decoded after held-out prompts: τ {self.acceptance.tau:.2f}"
        rows = narrow_table(title, ["drafts", "last accepted", "all accepted", "tokens a step", "expected speed-up"])
        shares = zip(self.acceptance.conditional, self.acceptance.cumulative, strict=True)
        for draft, (conditional, cumulative) in enumerate(shares, start=1):
            tokens = 1 + sum(self.acceptance.cumulative[:draft])
            speedup = f"{self.expected(draft):.2f}"
            rows.add_row(str(draft), f"{conditional:.0%}", f"{cumulative:.0%}", f"{tokens:.2f}", speedup)
        return rows


def measure_speedup(
    model: MultiTokenModel,
    prompts: Sequence[list[int]],
    new_tokens: int = 64,
    advance: Callable[[], None] = lambda: None,
) -> Speedup | None:
    """Decode prompts greedily, each plainly and with all drafts a step, without compiling.

    Args:
        model: in eval mode, with heads in the dtype of its trunk.
        prompts: token ids of each.
        advance: called when a prompt is done.

    Returns:
        None where no text became longer than one step, so that there is nothing to measure.
    """
    plain, drafted = model.engine(heads=1), model.engine(depth=None)
    times: list[tuple[float, float]] = []
    generations: list[Generation] = []
    _timed(drafted, prompts[0], 8)  # the first call is slower
    for prompt in prompts:
        (_, plain_step), (generation, step) = (_timed(engine, prompt, new_tokens) for engine in (plain, drafted))
        if plain_step and step:
            times.append((plain_step, step))
            generations.append(generation)
        advance()
    if not times:
        return None
    plain_times, drafted_times = zip(*times, strict=True)
    return Speedup(
        acceptance=Acceptance.of(generations, model.multi_token.n),
        plain_seconds=interval(plain_times).value,
        drafted_seconds=interval(drafted_times).value,
        step_time_ratio=interval([step / plain_step for plain_step, step in times]),
        new_tokens=sum(len(generation.tokens) for generation in generations),
    )


def _timed(engine: Engine, prompt: list[int], new_tokens: int) -> tuple[Generation, float]:
    """What a prompt gives, and the mean seconds of a step after the prefill."""
    ((_, generation),) = engine.generate([prompt], new_tokens)
    seconds = sum(spent for part, spent in engine.seconds.items() if part != "prefill")
    return generation, seconds / max(1, len(generation.accepted))
