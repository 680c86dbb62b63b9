"""Parallel heads: each reads the trunk's state and none of the tokens between (Gloeckle et al. 2024, arXiv:2404.19737).

A head is one transformer layer, one linear map, or Medusa's residual block (Cai et al. 2024, arXiv:2401.10774).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextn.config import MultiTokenConfig
from nextn.heads.base import Growth, Heads, Text, Window
from nextn.trunk import RaggedCache, Trunk


class ParallelHeads(Heads):
    """n-1 heads that end in the trunk's own final norm, unless what they read went through it already.

    With `tap="before_last_layer"` the trunk's last layer is head 1 and transformer heads are its siblings.
    """

    def __init__(self, config: MultiTokenConfig, trunk: Trunk) -> None:
        super().__init__(config, trunk)
        self.layered, self.chaining = config.head == "transformer", config.chaining
        make: Callable[[], nn.Module] = {
            "transformer": lambda: trunk.new_layer(config.dense),
            "linear": lambda: linear_head(trunk),
            "residual_mlp": lambda: ResidualBlock(trunk),
        }[config.head]
        self.layers = nn.ModuleList(make() for _ in range(self.n - 1))
        self.cache_count = self.n - 1 if self.layered else 0

    def forward(self, trunk: Trunk, hidden: Tensor, text: Text) -> list[Tensor]:
        visible, hidden = text.visible, self.read(hidden)

        def run(place: int, state: Tensor) -> Tensor:
            layer = self.layers[place]
            if self.layered:
                return self._run(trunk.run_layer, layer, state, text.positions, visible)
            return self._run(layer, state)

        return [self._end(trunk, state) for state in self._chained(hidden, run)]

    def _grow(
        self, trunk: Trunk, window: Window, caches: list[RaggedCache], rows: Tensor | None, growth: Growth
    ) -> None:
        visible = [cache.place(window.positions, rows) for cache in caches]

        def run(place: int, state: Tensor) -> Tensor:
            layer = self.layers[place]
            if self.layered:
                return trunk.run_layer(layer, state, window.positions, visible[place], caches[place])
            return layer(state)

        # Only a layer with keys and values has to see the whole window.
        start = self.read(window.hidden if self.layered else window.newest(window.hidden)[:, None])
        states = [window.newest(state) if self.layered else state[:, 0] for state in self._chained(start, run)]
        newest = window.newest(window.positions)
        for k, state in enumerate(states[: self._last(growth) - 1], start=2):
            # Whatever was drafted before, the state is the same.
            growth.level(trunk, self.output.at(k), self._end(trunk, state)[:, None], k, newest)

    def _chained(self, hidden: Tensor, run: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """run(place, what it reads) for every head, in order of depth."""
        places = range(self.n - 1)
        if self.chaining == "none":
            return [run(place, hidden) for place in places]
        states, state = {}, hidden
        for place in places if self.chaining == "causal" else reversed(places):
            states[place] = state = run(place, state)
        return [states[place] for place in places]

    def _end(self, trunk: Trunk, state: Tensor) -> Tensor:
        return state if self.tap == "post_norm" and not self.layered else trunk.norm(state)


def linear_head(trunk: Trunk) -> nn.Linear:
    """One map [D, D] without a nonlinearity, at first the identity: the trunk's own next token."""
    head = nn.Linear(trunk.width, trunk.width, bias=False, device=trunk.device, dtype=trunk.dtype)
    with torch.no_grad():
        head.weight.copy_(torch.eye(trunk.width))
    return head


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b), at first x."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.linear = nn.Linear(trunk.width, trunk.width, device=trunk.device, dtype=trunk.dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, state: Tensor) -> Tensor:
        return state + F.silu(self.linear(state))
