"""Ridge regression over examples that come in parts, which reads as many as it needs."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # times the mean square of an input
LEAST_GAIN = 0.03  # of the held-out error, from twice the examples: with less, no more are read


class RidgeRegression:
    """targets [N, M] as a linear function of inputs [N, K], in float64.

    The ridge is the one of `RIDGES` with the smallest error on held-out examples. It takes 8 · K · (K + M) bytes, and
    as much again while it is solved.

    Args:
        held_out: inputs [H, K] and targets [H, M] that are not fitted.
    """

    def __init__(self, held_out: tuple[Tensor, Tensor]) -> None:
        self.held_out = held_out[0].double(), held_out[1].double()
        (_, k), (_, m) = held_out[0].shape, held_out[1].shape
        device = held_out[0].device
        self.gram = torch.zeros(k, k, dtype=torch.float64, device=device)
        self.moments = torch.zeros(k, m, dtype=torch.float64, device=device)
        self.count = 0
        self._best: tuple[float, float] = float("inf"), RIDGES[-1]  # error and ridge as they were last chosen
        self._next_choice = k // 2  # in examples

    def add(self, inputs: Tensor, targets: Tensor) -> bool:
        """Add examples; False once twice as many made the held-out error hardly smaller."""
        inputs = inputs.double()
        self.gram += inputs.T @ inputs
        self.moments += inputs.T @ targets.double()
        self.count += len(inputs)
        if self.count < self._next_choice:
            return True
        before, self._next_choice = self._best[0], 2 * self.count
        self._choose_ridge()
        return self._best[0] < (1 - LEAST_GAIN) * before

    def solution(self) -> Tensor:
        """The weights [K, M], with the ridge chosen anew."""
        self._choose_ridge()
        return self._solve(self._best[1])

    def _choose_ridge(self) -> None:
        inputs, targets = self.held_out
        self._best = min(((inputs @ self._solve(ridge) - targets).square().mean().item(), ridge) for ridge in RIDGES)

    def _solve(self, ridge: float) -> Tensor:
        gram = self.gram.clone()
        gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-12))
        return torch.cholesky_solve(self.moments, torch.linalg.cholesky(gram))
