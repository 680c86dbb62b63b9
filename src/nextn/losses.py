"""The loss of multi-token prediction: Σ w_k · L_k with one denominator for all depths.

L_k sums the negative log-likelihood of the tokens t+k that exist, carry a label and lie in the document of t. The
denominator is the count of valid t+1 targets, for every depth, so that accumulation, packing and data parallelism
change nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def targets_at(labels: Tensor, documents: Tensor, depth: int) -> Tensor:
    """The label of t+depth for each position t [B, T]; -100 where it is no target.

    Args:
        labels: token ids aligned with the input [B, T], -100 where not trained on.
        documents: document of each position [B, T], -1 for padding.
        depth: k ≥ 1.
    """
    targets = torch.full_like(labels, IGNORE)
    if depth < labels.shape[1]:
        same = (documents[:, depth:] == documents[:, :-depth]) & (documents[:, depth:] >= 0)
        targets[:, :-depth] = torch.where(same, labels[:, depth:], IGNORE)
    return targets


def head_loss(project: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood, and how many targets were the best token.

    Only positions with a target are projected. (The chunked, memory-flat form takes this function's place.)

    Args:
        project: from states [N, D] to logits [N, V'].
        states: [B, T, D].
        targets: indices into V' [B, T], -100 for none.
    """
    chosen = targets != IGNORE
    logits = project(states[chosen])
    logits = logits.float() if logits.itemsize < 4 else logits
    loss = F.cross_entropy(logits, targets[chosen], reduction="sum")
    return loss, (logits.argmax(dim=-1) == targets[chosen]).sum()
