"""How many drafts stand: τ, and acceptance by draft number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from nextn.decoding.engine import Engine, Generation
from nextn.decoding.stats import SpecDecodingStats
from nextn.distill import like_lengths_together
from nextn.model import MultiTokenModel, as_text

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
        """The figures of generations decoded with at most n - 1 drafts a step; draft i counts where there was one."""
        steps = [pair for each in generations for pair in zip(each.accepted, each.drafted, strict=True)]

        def count(accepted: int, drafted: int) -> int:
            return sum(a >= accepted and d >= drafted for a, d in steps)

        stats = SpecDecodingStats.of([d for _, d in steps], [a for a, _ in steps], n - 1)
        by_draft = zip(stats.num_accepted_tokens_per_pos, stats.num_draft_tokens_per_pos, strict=True)
        return cls(
            steps=stats.num_steps,
            tau=stats.mean_acceptance_length,
            conditional=[_share(count(draft, draft), count(draft - 1, draft)) for draft in range(1, n)],
            cumulative=[_share(accepted, drafted) for accepted, drafted in by_draft],
        )


def decoded(
    engine: Engine,
    prompts: Sequence[tuple[str, list[int]]],
    new_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[Generation]]:
    """What prompts (category, token ids) give, by category; acceptance does not depend on the batch.

    Args:
        advance: called when a prompt is done.
    """
    order = like_lengths_together([len(ids) for _, ids in prompts], len(prompts))
    found: dict[str, list[Generation]] = defaultdict(list)
    for place, result in engine.generate([prompts[index][1] for index in order], new_tokens):
        found[prompts[order[place]][0]].append(result)
        advance()
    return dict(sorted(found.items()))


@torch.inference_mode()
def covered(model: MultiTokenModel, generations: Sequence[Generation]) -> float:
    """The share of the emitted tokens that a state of the heads for their place could name, over all depths."""
    named = total = 0
    for result in generations:
        ids = torch.tensor([result.prompt + result.tokens], device=model.trunk.device)
        text = as_text(ids, None, None)
        _, tapped = model.run_trunk(text)
        states = model.heads(model.trunk, tapped.to(next(model.heads.parameters()).dtype), text)
        for depth, state in enumerate(states, start=2):
            first = max(0, len(result.prompt) - depth)
            targets, reads = ids[:, first + depth :], state[:, first : ids.shape[1] - depth]
            named += int(model.heads.output.at(depth).can_name(model.trunk, reads, targets).sum())
            total += targets.numel()
    return named / max(1, total)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
