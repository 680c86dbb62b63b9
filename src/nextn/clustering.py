"""Balanced k-means: groups of one size."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_clusters(points: Tensor, clusters: int, rounds: int = 10, seed: int = 0) -> Tensor:
    """Lloyd's iterations in which each cluster takes the same number of points.

    Args:
        points: [N, D].
        clusters: C, which divides N.
        rounds: iterations.
        seed: of the points that the centres start from.

    Returns:
        the points' places, cluster after cluster [C, N/C], each cluster's nearest points first.
    """
    if len(points) % clusters:
        raise ValueError(f"{clusters} clusters of one size cannot hold {len(points)} points.")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(len(points), generator=generator)[:clusters].to(points.device)
    centres = points[start]
    for _ in range(rounds):
        members = _assigned(_distances(points, centres))
        centres = points[members].mean(dim=1)
    return members


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [N, C], each point's own square left out: it changes nothing for the point."""
    return centres.square().sum(dim=1) - 2 * points @ centres.T


def _assigned(distances: Tensor) -> Tensor:
    """Which points each cluster takes [C, N/C], none more than N/C.

    In rounds: each point that is free asks the nearest cluster with room; a cluster takes those who would lose most by
    going elsewhere, as far as it has room.
    """
    count, clusters = distances.shape
    room = torch.full((clusters,), count // clusters, device=distances.device)
    owner = torch.full((count,), -1, device=distances.device)
    free = torch.arange(count, device=distances.device)
    while len(free):
        open_only = distances[free].masked_fill(room == 0, torch.inf)
        nearest = open_only.topk(min(2, clusters), dim=1, largest=False)
        asked, loss = nearest.indices[:, 0], nearest.values[:, -1] - nearest.values[:, 0]
        # By cluster, the greatest loss first; a point's rank within its cluster decides.
        order = loss.argsort(descending=True)
        order = order[asked[order].argsort(stable=True)]
        counts = torch.bincount(asked, minlength=clusters)
        rank = torch.arange(len(free), device=free.device) - (counts.cumsum(0) - counts)[asked[order]]
        taken = order[rank < room[asked[order]]]
        owner[free[taken]] = asked[taken]
        room -= torch.bincount(asked[taken], minlength=clusters)
        free = free[owner[free] < 0]
    nearness = distances.gather(1, owner[:, None])[:, 0].argsort()
    return nearness[owner[nearness].argsort(stable=True)].view(clusters, -1)
