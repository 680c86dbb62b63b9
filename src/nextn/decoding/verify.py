"""Which drafts the trunk agrees with."""

from __future__ import annotations

from torch import Tensor


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
