"""What the trunk says to the drafts, and which of them stand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextn.config import Tap
from nextn.output import best
from nextn.trunk import RaggedCache, Trunk


def accept_greedy(drafts: Tensor, targets: Tensor) -> Tensor:
    """How many drafts of each row stand: the longest prefix that equals the trunk's own greedy tokens.

    Blockwise parallel decoding (Stern et al. 2018, arXiv:1811.03115).

    Args:
        drafts: token ids [B, n-1].
        targets: the trunk's argmax after the pending token and after each draft [B, n].

    Returns:
        accepted counts [B], each 0 … n-1. Row b then emits drafts[b, :a] and targets[b, a] (the bonus token).
    """
    return (drafts == targets[:, : drafts.shape[1]]).long().cumprod(dim=1).sum(dim=1)


class Verify(nn.Module):
    """One trunk forward over the pending token and the drafts of every row.

    A function of tensors alone, so that it can be compiled: the cache is handed in, and written in place.

    Args:
        tap: the trunk state that the drafter reads.
    """

    def __init__(self, trunk: Trunk, tap: Tap) -> None:
        super().__init__()
        self.model = trunk.model  # whoever exports this module must find the weights in it
        self.trunk, self.tap = trunk, tap

    def forward(
        self,
        pending: Tensor,
        drafts: Tensor,
        lengths: Tensor,
        ends: Tensor,
        seen: Tensor,
        buffers: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Read [pending ; drafts] and keep what the trunk agrees with.

        Args:
            pending: the newest token of each row, not yet read [B].
            drafts: [B, W-1]; -1 stands for no draft, and never for a token.
            lengths: how many tokens of each row the cache holds [B].
            ends: the first position of each row that is not needed any more [B].
            seen: the positions that attention reads, 0 … S-1 [S].
            buffers: keys and values by layer, as `RaggedCache.buffers` gives them.

        Returns:
            the trunk's choices [B, W], how many drafts stand [B], the new pending token [B], the new lengths [B], the
            tapped states [B, W, D], and their positions [B, W], -1 where a state is not of the text.
        """
        tokens = torch.cat([pending[:, None], drafts], dim=1)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        positions = lengths[:, None] + places
        positions = torch.where((positions < ends[:, None]) & (tokens >= 0), positions, -1)
        cache = RaggedCache.over(buffers, seen)
        visible = cache.place(positions)
        hidden, tapped = self.trunk.run(tokens.clamp(min=0), positions, visible, cache, self.tap)
        targets = best(self.trunk.logits(hidden))
        accepted = accept_greedy(drafts, targets)
        standing = torch.where(places <= accepted[:, None], positions, -1)
        # Rejected drafts lie beyond the new length, and are overwritten.
        newest = targets.gather(1, accepted[:, None])[:, 0]
        return targets, accepted, newest, lengths + accepted + 1, tapped, standing
