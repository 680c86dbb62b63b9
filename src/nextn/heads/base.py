"""The one interface of heads: states per depth for training, drafts for decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nextn.config import MultiTokenConfig
from nextn.output import Output, best, build_output
from nextn.trunk import RaggedCache, Trunk, VisibleFn, causal


@dataclass
class Window:
    """Trunk states from which drafts are made, oldest first.

    hidden [B, W, D], positions [B, W] (consecutive in a row, negative: not in use), following [B, W] (the token
    after each state), last [B] (index of the newest state in use; its following token is the pending one).
    """

    hidden: Tensor
    positions: Tensor
    following: Tensor
    last: Tensor

    def newest(self, states: Tensor) -> Tensor:
        """The row's newest of states [B, W, ...] -> [B, ...]."""
        return states[torch.arange(len(states), device=states.device), self.last]


@dataclass
class Text:
    """A training batch as heads see it: ids [B, T], positions [B, T], documents [B, T] (-1: padding)."""

    ids: Tensor
    positions: Tensor
    documents: Tensor

    def visible(self) -> VisibleFn:
        """Causal within documents."""
        return causal(self.positions, self.positions, self.documents, self.documents)

    def rows(self, chosen: Tensor) -> Text:
        """Some rows of the batch [R]."""
        return Text(self.ids[chosen], self.positions[chosen], self.documents[chosen])

    def split(self, rows: int) -> Iterator[Text]:
        """The batch in parts of at most so many rows."""
        parts = zip(self.ids.split(rows), self.positions.split(rows), self.documents.split(rows), strict=True)
        return (Text(*part) for part in parts)


class Heads(nn.Module, ABC):
    """Heads of depth 2 … n over one trunk. Head 1 is the trunk's own LM head and is not among them."""

    cache_count: int  # how many K/V caches drafting needs
    recurrent: bool = False  # whether one module serves all depths
    lookback: int = 0  # how many earlier states drafting must see again, to replace entries made from drafts

    def __init__(self, config: MultiTokenConfig, trunk: Trunk) -> None:
        super().__init__()
        self.n = config.n
        self.tap: str = config.tap or "post_norm"
        self.output: Output = build_output(config.output, trunk, modules=1 if self.recurrent else config.n - 1)
        # As transformers' decoder layers have them; `model.gradient_checkpointing_enable()` finds and sets them.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] = partial(checkpoint, use_reentrant=False)

    @abstractmethod
    def forward(self, trunk: Trunk, hidden: Tensor, text: Text) -> list[Tensor]:
        """Teacher-forced states, one [B, T, D] a depth 2 … n, ready for `self.output`.

        The state of depth k at position t predicts the token t+k. Positions without such a token hold values that
        mean nothing; the loss leaves them out.

        Args:
            hidden: the tapped trunk state [B, T, D].
        """

    @abstractmethod
    def draft(self, trunk: Trunk, window: Window, caches: list[RaggedCache], rows: Tensor | None) -> Tensor:
        """Drafts 1 … n-1, greedy: token ids [B, n-1]. Writes its K/V into `caches` at `rows` (None: all rows)."""

    def calibrate(self, trunk: Trunk, text: Text) -> None:
        """Set the start of the weights from what the trunk does on a text, where a kind of heads can."""

    def _run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """function(*inputs); with gradient checkpointing, what happens inside is computed again in the backward."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, *inputs)
        return function(*inputs)

    def _pick(self, trunk: Trunk, state: Tensor, depth: int) -> Tensor:
        """The best token [B] for states [B, D] of a depth."""
        output = self.output.at(depth)
        return output.token_ids(best(output(trunk, state)))
