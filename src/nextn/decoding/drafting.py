"""Who proposes the next tokens: the interface that the engine knows, and heads behind it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nextn.heads.base import Heads, Window
from nextn.trunk import RaggedCache, Trunk


class Drafter(Protocol):
    """Proposes `drafts` tokens a row after each trunk forward."""

    drafts: int  # n - 1
    tap: str  # the trunk state that it reads

    def begin(self, rows: int, capacity: int) -> None:
        """Make room for `rows` sequences of up to `capacity` positions."""

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

    def begin(self, rows: int, capacity: int) -> None:
        # Entries of drafts stand up to n - 2 positions past the text.
        room = capacity + self.heads.n
        self.caches = [RaggedCache(1, rows, room) for _ in range(self.heads.cache_count)]
        back, width = self.heads.lookback, self.trunk.width
        self.past_hidden = torch.zeros(rows, back, width, dtype=self.dtype, device=self.trunk.device)
        self.past_following = torch.zeros(rows, back, dtype=torch.long, device=self.trunk.device)

    def propose(self, hidden: Tensor, positions: Tensor, following: Tensor, last: Tensor, rows: Tensor) -> Tensor:
        window = self._with_past(hidden, positions, following, last, rows)
        drafts = self.heads.draft(self.trunk, window, self.caches, rows if len(rows) < len(self.past_hidden) else None)
        self._keep_past(window, rows)
        return drafts

    def _with_past(self, hidden: Tensor, positions: Tensor, following: Tensor, last: Tensor, rows: Tensor) -> Window:
        back = self.heads.lookback
        steps_back = torch.arange(-back, 0, device=positions.device)
        past_positions = (positions[:, :1] + steps_back).clamp(min=-1)
        past_positions[positions[:, 0] < 0] = -1  # an idle row has no past either
        return Window(
            hidden=torch.cat([self.past_hidden[rows], hidden.to(self.dtype)], dim=1),
            positions=torch.cat([past_positions, positions], dim=1),
            following=torch.cat([self.past_following[rows], following], dim=1),
            last=last + back,
        )

    def _keep_past(self, window: Window, rows: Tensor) -> None:
        back = self.heads.lookback
        kept = window.last[:, None] + torch.arange(1 - back, 1, device=rows.device)  # the newest, [B, back]
        batch = torch.arange(len(rows), device=rows.device)[:, None]
        self.past_hidden[rows] = window.hidden[batch, kept]
        self.past_following[rows] = window.following[batch, kept]
