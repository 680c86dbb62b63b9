"""Parallel heads: each is one transformer layer on the trunk's state (Gloeckle et al. 2024, arXiv:2404.19737)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextn.config import MultiTokenConfig
from nextn.heads.base import Heads, Text, Window
from nextn.trunk import RaggedCache, Trunk


class ParallelHeads(Heads):
    """n-1 heads that see only the trunk's state at t; each ends in the trunk's own final norm.

    With `tap="before_last_layer"` the trunk's last layer is head 1 and these are its siblings.
    """

    def __init__(self, config: MultiTokenConfig, trunk: Trunk) -> None:
        super().__init__(config, trunk)
        self.layers = nn.ModuleList(trunk.new_layer() for _ in range(self.n - 1))
        self.cache_count = self.n - 1

    def forward(self, trunk: Trunk, hidden: Tensor, text: Text) -> list[Tensor]:
        visible = text.visible()
        return [trunk.norm(trunk.run_layer(layer, hidden, text.positions, visible)) for layer in self.layers]

    def draft(self, trunk: Trunk, window: Window, caches: list[RaggedCache], rows: Tensor | None) -> Tensor:
        drafts = []
        for layer, cache in zip(self.layers, caches, strict=True):
            visible = cache.place(window.positions, rows)
            state = trunk.run_layer(layer, window.hidden, window.positions, visible, cache)
            drafts.append(self._pick(trunk, trunk.norm(window.newest(state))))
        return torch.stack(drafts, dim=1)
