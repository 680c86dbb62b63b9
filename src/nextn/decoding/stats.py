"""Counts of speculative decoding and log-probabilities of tokens, by the names that vLLM has for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor


@dataclass(frozen=True)
class Logprob:
    """The log-probability of a token.

    rank: its place among all tokens: 1 is the most probable one.
    """

    logprob: float
    rank: int


@dataclass(frozen=True)
class SpecDecodingStats:
    """How many tokens were drafted and accepted, of one text; `+` adds up several.

    A last step that was cut short by a stop token or by the length is left out.

    num_spec_tokens: how many drafts a step has at most, n - 1.
    num_steps: trunk forwards after the prefill, plain ones included.
    num_drafts: how many of them had drafts.
    num_draft_tokens: drafted tokens; of a tree those of its longest path.
    num_accepted_tokens: accepted ones among them.
    num_draft_tokens_per_pos, num_accepted_tokens_per_pos: the same by the number of the draft, 1 … n-1.
    """

    num_spec_tokens: int = 0
    num_steps: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_draft_tokens_per_pos: tuple[int, ...] = ()
    num_accepted_tokens_per_pos: tuple[int, ...] = ()

    @classmethod
    def of(cls, drafted: Sequence[int], accepted: Sequence[int], num_spec_tokens: int) -> SpecDecodingStats:
        """The counts of steps that had so many drafts each, and accepted so many of them."""
        return cls(
            num_spec_tokens,
            len(drafted),
            sum(map(bool, drafted)),
            sum(drafted),
            sum(accepted),
            *(
                tuple(sum(count >= draft for count in counts) for draft in range(1, num_spec_tokens + 1))
                for counts in (drafted, accepted)
            ),
        )

    def __add__(self, other: SpecDecodingStats) -> SpecDecodingStats:
        return SpecDecodingStats(
            max(self.num_spec_tokens, other.num_spec_tokens),
            self.num_steps + other.num_steps,
            self.num_drafts + other.num_drafts,
            self.num_draft_tokens + other.num_draft_tokens,
            self.num_accepted_tokens + other.num_accepted_tokens,
            _added(self.num_draft_tokens_per_pos, other.num_draft_tokens_per_pos),
            _added(self.num_accepted_tokens_per_pos, other.num_accepted_tokens_per_pos),
        )

    @property
    def mean_acceptance_length(self) -> float:
        """τ: tokens per trunk forward after the prefill, the bonus token included; NaN without one.

        Plain steps count, so that plain decoding is 1.0. vLLM leaves them out: it divides by `num_drafts`.
        """
        return 1 + self.num_accepted_tokens / self.num_steps if self.num_steps else float("nan")


def _added(ours: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(sum, zip_longest(ours, theirs, fillvalue=0)))


def logprobs_of(logits: Tensor, tokens: Sequence[int], top: int) -> list[dict[int, Logprob]]:
    """The log-probabilities of chosen tokens and, behind each, of the most probable ones.

    Args:
        logits: that the tokens were chosen by, before any processors [T, V].
        tokens: the chosen ones [T]; for -1, which stands for logits that are not numbers, the answer means nothing.
        top: how many of the most probable tokens; a chosen one may be among them.
    """
    logits = logits.float()
    chosen = torch.tensor(tokens, device=logits.device).clamp(min=0)[:, None]
    best = logits.topk(min(top, logits.shape[-1]), dim=-1)
    values = torch.cat([logits.gather(1, chosen), best.values], dim=1)
    ranks = 1 + (logits > values[:, :1]).sum(dim=-1)
    rows = zip(
        torch.cat([chosen, best.indices], dim=1).tolist(),
        (values - logits.logsumexp(dim=-1, keepdim=True)).tolist(),
        ranks.tolist(),
        strict=True,
    )
    answers = []
    for (own, *ids), (value, *others), rank in rows:
        answer = {own: Logprob(value, rank)}
        most_probable = {
            token: Logprob(each, place) for place, (token, each) in enumerate(zip(ids, others, strict=True), 1)
        }
        answers.append(answer | most_probable | answer)  # its own one comes first
    return answers
