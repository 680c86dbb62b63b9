"""Whose distribution heads follow where they do not follow the text: the trunk's own.

Shapes: C positions of a chunk, V' tokens that an output can name, V the trunk's tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nextn.output import Output
from nextn.trunk import Trunk

Distribution = Callable[[Tensor], Tensor]  # positions [C], counted through the whole batch -> probabilities [C, V']


class Teacher(ABC):
    """What the trunk says the next token is, at every position of a batch."""

    @abstractmethod
    def rows(self, chosen: Tensor) -> Teacher:
        """Some rows of the batch [R]."""

    @abstractmethod
    def ahead(self, by: int) -> Teacher:
        """Moved so that place t holds what is said at t + by; the last `by` places mean nothing."""

    @abstractmethod
    def distribution(
        self, trunk: Trunk, output: Output, unembed: Callable[[Tensor], Tensor], temperature: float
    ) -> Distribution:
        """The trunk's softmax(logits / temperature) at the tokens that an output can name; it sums to about 1 or less.

        Args:
            unembed: the trunk's unembedding, from states [C, D] to [C, V], callable where the loss is made.
        """


@dataclass
class TrunkStates(Teacher):
    """The trunk's states after its final norm [B, T, D]; logits are made of them where they are needed."""

    states: Tensor

    def rows(self, chosen: Tensor) -> TrunkStates:
        return TrunkStates(self.states[chosen])

    def ahead(self, by: int) -> TrunkStates:
        return TrunkStates(self.states.roll(-by, dims=1))

    def distribution(
        self, trunk: Trunk, output: Output, unembed: Callable[[Tensor], Tensor], temperature: float
    ) -> Distribution:
        states = self.states.flatten(0, 1)

        def probabilities(positions: Tensor) -> Tensor:
            whole = at_least_float32(trunk.transform(unembed(states[positions].to(trunk.dtype))))
            if temperature != 1.0:
                whole = whole / temperature
            named = whole if output.kept is None else whole[:, output.kept.long()]
            return (named - torch.logsumexp(whole, dim=-1, keepdim=True)).exp_()

        return probabilities


@dataclass
class TopTokens(Teacher):
    """The k most probable tokens of each position [B, T, k] and their log-probabilities [B, T, k].

    The log-probabilities are those of the whole softmax at the objective's temperature; what the other tokens have is
    left out, as is what a trimmed output cannot name.
    """

    tokens: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, trunk: Trunk, hidden: Tensor, k: int, temperature: float) -> TopTokens:
        """From the trunk's states after its final norm [B, T, D]; stored as int32 and float16."""

        def top(states: Tensor) -> tuple[Tensor, Tensor]:
            logits = at_least_float32(trunk.logits(states)) / temperature
            largest, tokens = logits.topk(min(k, trunk.vocab_size), dim=-1)
            return tokens.int(), (largest - torch.logsumexp(logits, dim=-1, keepdim=True)).half()

        positions = hidden.flatten(0, 1).split(256)  # logits of a few positions at a time
        tokens, log_probs = zip(*map(top, positions), strict=True)
        batch = hidden.shape[:2]
        return cls(torch.cat(tokens).unflatten(0, batch), torch.cat(log_probs).unflatten(0, batch))

    def rows(self, chosen: Tensor) -> TopTokens:
        return TopTokens(self.tokens[chosen], self.log_probs[chosen])

    def ahead(self, by: int) -> TopTokens:
        return TopTokens(self.tokens.roll(-by, dims=1), self.log_probs.roll(-by, dims=1))

    def distribution(
        self, trunk: Trunk, output: Output, unembed: Callable[[Tensor], Tensor], temperature: float
    ) -> Distribution:
        places = output.targets(self.tokens.flatten(0, 1).long())
        log_probs, size = self.log_probs.flatten(0, 1), output.size(trunk)

        def probabilities(positions: Tensor) -> Tensor:
            at, said = places[positions], at_least_float32(log_probs[positions]).exp()
            whole = said.new_zeros(len(positions), size)
            return whole.scatter_add_(1, at.clamp(min=0), said.masked_fill(at < 0, 0.0))

        return probabilities


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in float32, or as they are where they are wider."""
    return logits.float() if logits.itemsize < 4 else logits
