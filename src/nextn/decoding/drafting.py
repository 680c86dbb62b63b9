"""Who proposes the next tokens: the interface that the engine knows, and heads behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from nextn.config import Tap
from nextn.heads.base import Heads, Window
from nextn.trunk import RaggedCache, Trunk


class Drafter(Protocol):
    """Proposes `drafts` tokens a row after each trunk forward."""

    drafts: int  # n - 1
    tap: Tap  # the trunk state that it reads

    def begin(self, cache: RaggedCache) -> None:
        """Make room for as many sequences and positions as the trunk's cache has, which may be read."""

    def propose(self, hidden: Tensor, positions: Tensor, following: Tensor, last: Tensor, rows: Tensor) -> Tensor:
        """Drafts [B, n-1] after what one trunk forward brought.

        Args:
            hidden: tapped trunk states [B, T, D].
            positions: their positions [B, T], consecutive in a row; -1 where a state is not of the text.
            following: the token after each of them [B, T], accepted drafts and the new pending token included.
            last: index [B] into T of the newest valid state; its following token is the pending one.
            rows: which of the sequences these are [B].
        """


class HeadDrafter:
    """Heads as the drafter: keeps their caches and, for distinct modules, the states to go back to.

    A module of depth k reads the token k-1 places ahead, so its newest entries were computed from drafts. Those of
    rejected drafts are computed again next time, from the true tokens: `heads.lookback` states are kept for that.
    """

    def __init__(self, trunk: Trunk, heads: Heads) -> None:
        self.trunk, self.heads = trunk, heads
        self.drafts, self.tap = heads.n - 1, heads.tap
        self.dtype = next(heads.parameters()).dtype  # while training: float32 heads on a bfloat16 trunk
        self.compiled: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = (
            None  # what `Draft` computes, for one step of all rows
        )

    def begin(self, cache: RaggedCache) -> None:
        # Entries of drafts stand up to n - 2 positions past the text.
        rows, room = cache.rows, cache.capacity + self.heads.n
        self.trunk_cache = cache
        self.caches = [RaggedCache(1, rows, room) for _ in range(self.heads.cache_count)]
        back, width = self.heads.lookback, self.heads.hidden_width
        self.past_hidden = torch.zeros(rows, back, width, dtype=self.dtype, device=self.trunk.device)
        self.past_following = torch.zeros(rows, back, dtype=torch.long, device=self.trunk.device)

    def propose(self, hidden: Tensor, positions: Tensor, following: Tensor, last: Tensor, rows: Tensor) -> Tensor:
        is_step = hidden.shape[:2] == (len(self.past_hidden), self.heads.n)
        if self.compiled and is_step and all(cache.is_filled for cache in self.caches):
            drafts, self.past_hidden, self.past_following = self.compiled(
                *self.step_inputs(hidden, positions, following, last)
            )
            return drafts
        some = rows if len(rows) < len(self.past_hidden) else None
        past = self.past_hidden[rows], self.past_following[rows]
        window = with_past(*past, hidden.to(self.dtype), positions, following, last)
        read = [RaggedCache.over([pair], self._seen(positions)) for pair in self._read()]
        drafts = self.heads.draft(self.trunk, window, self.caches + read, some)
        self.past_hidden[rows], self.past_following[rows] = newest_past(window, self.heads.lookback)
        return drafts

    def step_inputs(self, hidden: Tensor, positions: Tensor, following: Tensor, last: Tensor) -> tuple:
        """What `Draft` takes for a step of all rows."""
        buffers = [pair for cache in self.caches for pair in cache.buffers] + self._read()
        seen = self._seen(positions)
        return hidden, positions, following, last, self.past_hidden, self.past_following, seen, buffers

    def _seen(self, positions: Tensor) -> Tensor:
        """The positions that attention reads in this round [S]."""
        newest = int(positions.max())
        cache, newest = (self.caches[0], newest + self.heads.n - 2) if self.caches else (self.trunk_cache, newest)
        return torch.arange(cache.reach(newest), device=positions.device)

    def _read(self) -> list[tuple[Tensor, Tensor]]:
        """The trunk's keys and values that the heads read, by layer."""
        return [self.trunk_cache.buffers[layer] for layer in self.heads.reads]


class Draft(nn.Module):
    """One round of drafts for all rows.

    A function of tensors alone, so that it can be compiled: the caches are handed in, and written in place.
    """

    def __init__(self, trunk: Trunk, heads: Heads) -> None:
        super().__init__()
        self.heads = heads
        # Whoever exports this module must find in it all weights that heads ask the trunk for.
        self.asked = nn.ModuleList([trunk.embedding, trunk.unembedding, trunk.norm, trunk.rotary])
        self.trunk, self.dtype = trunk, next(heads.parameters()).dtype

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        following: Tensor,
        last: Tensor,
        past_hidden: Tensor,
        past_following: Tensor,
        seen: Tensor,
        buffers: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Drafter.propose`, with what the drafter keeps handed in.

        Args:
            past_hidden: states to look back on [B, back, D].
            past_following: the tokens after them [B, back].
            seen: the positions that attention reads, 0 … S-1 [S].
            buffers: keys and values, by cache of the heads and then by layer of the trunk that they read.

        Returns:
            drafts [B, n-1], the new past_hidden and the new past_following.
        """
        window = with_past(past_hidden, past_following, hidden.to(self.dtype), positions, following, last)
        caches = [RaggedCache.over([pair], seen) for pair in buffers]
        return self.heads.draft(self.trunk, window, caches, None), *newest_past(window, self.heads.lookback)


def with_past(
    past_hidden: Tensor, past_following: Tensor, hidden: Tensor, positions: Tensor, following: Tensor, last: Tensor
) -> Window:
    """The window of heads that look back: kept states before the new ones."""
    back = past_hidden.shape[1]
    steps_back = torch.arange(-back, 0, device=positions.device)
    # An idle row has no past either.
    past_positions = torch.where(positions[:, :1] < 0, -1, (positions[:, :1] + steps_back).clamp(min=-1))
    return Window(
        hidden=torch.cat([past_hidden, hidden], dim=1),
        positions=torch.cat([past_positions, positions], dim=1),
        following=torch.cat([past_following, following], dim=1),
        last=last + back,
    )


def newest_past(window: Window, back: int) -> tuple[Tensor, Tensor]:
    """The newest `back` states and the tokens after them, to look back on next time: [B, back, D] and [B, back]."""
    kept = window.last[:, None] + torch.arange(1 - back, 1, device=window.last.device)  # [B, back]
    batch = torch.arange(len(kept), device=kept.device)[:, None]
    return window.hidden[batch, kept], window.following[batch, kept]
