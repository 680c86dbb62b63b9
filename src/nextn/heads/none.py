"""No heads (n = 1): the trunk alone, trained and decoded as plain next-token prediction."""

from __future__ import annotations

from torch import Tensor

from nextn.heads.base import Growth, Heads, Text, Window
from nextn.trunk import RaggedCache, Trunk


class NoHeads(Heads):
    """What stands for heads where only the next token is predicted: no parameters, no states, no drafts."""

    cache_count = 0

    def forward(self, trunk: Trunk, hidden: Tensor, text: Text) -> list[Tensor]:
        return []

    def _grow(
        self, trunk: Trunk, window: Window, caches: list[RaggedCache], rows: Tensor | None, growth: Growth
    ) -> None:
        raise NotImplementedError("Without heads nothing is drafted; decode without a drafter.")
