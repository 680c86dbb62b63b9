"""How many drafts stand: τ, and acceptance by draft number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nextn.decoding.engine import Generation

DEFINITIONS = (
    "τ: tokens per trunk forward after the prefill, the bonus token included, a last truncated step left out (plain "
    "decoding: 1.0). Conditional: draft i stands, given that all earlier ones did. Cumulative: drafts 1 … i all stand."
)


@dataclass(frozen=True)
class Acceptance:
    """Figures over a set of generations.

    steps: trunk forwards after the prefill.
    tau: tokens per such forward.
    conditional, cumulative: by draft 1 … n-1; conditional is NaN where draft i was never reached.
    """

    steps: int
    tau: float
    conditional: list[float]
    cumulative: list[float]

    @classmethod
    def of(cls, generations: Iterable[Generation], n: int) -> Acceptance:
        """The figures of generations decoded with n - 1 drafts a step."""
        accepted = [count for generation in generations for count in generation.accepted]
        reached = [sum(count >= draft for count in accepted) for draft in range(n)]  # reached[0]: all steps
        steps = len(accepted)
        return cls(
            steps=steps,
            tau=1 + sum(accepted) / steps if steps else float("nan"),
            conditional=[_share(reached[draft], reached[draft - 1]) for draft in range(1, n)],
            cumulative=[_share(reached[draft], steps) for draft in range(1, n)],
        )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
