"""Ridge regression over examples that come in parts, which reads as many as it needs."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # times the mean square of an input
HELD_OUT = 2048  # examples; no part is held out once there are so many
JUDGED = 128  # columns of the targets that held-out errors are taken of: solving for all would cost ten times as much
FIRST_CHECK = 2048  # fitted examples before which more are always read
LEAST_GAIN = 0.03  # of the held-out error, from twice the examples: with less, no more are read


class RidgeRegression:
    """targets [N, M] as a linear function of inputs [N, K], in float64.

    The ridge is the one of `RIDGES` with the smallest error on held-out examples. The sums take 8 · K · (K + M) bytes,
    solving 8 · K · (2K + M) more, and held-out examples 8 · `HELD_OUT` · K.
    """

    def __init__(self) -> None:
        self.count = 0  # fitted examples
        self.gram: Tensor | None = None  # [K, K]
        self.moments: Tensor | None = None  # [K, M]
        self.held_out: list[tuple[Tensor, Tensor]] = []
        self._best: tuple[float, float] = float("inf"), RIDGES[-1]  # error and ridge as they were last chosen
        self._next_check = FIRST_CHECK

    def add(self, inputs: Tensor, targets: Tensor, held_out: Tensor) -> bool:
        """Add examples; False once twice as many made the held-out error hardly smaller.

        Args:
            held_out: [N], which of them choose the ridge rather than being fitted, until `HELD_OUT` do.
        """
        inputs, targets = inputs.double(), targets.double()
        if self.held_out_count < HELD_OUT:
            self.held_out.append((inputs[held_out], _judged(targets[held_out])))
            inputs, targets = inputs[~held_out], targets[~held_out]
        if self.gram is None or self.moments is None:
            self.gram = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
            self.moments = inputs.new_zeros(inputs.shape[1], targets.shape[1])
        self.gram.addmm_(inputs.T, inputs)
        self.moments.addmm_(inputs.T, targets)
        self.count += len(inputs)
        if self.count < self._next_check or not self.held_out_count:
            return True
        before, self._next_check = self._best[0], 2 * self.count
        self._choose_ridge()
        return self._best[0] < (1 - LEAST_GAIN) * before

    @property
    def held_out_count(self) -> int:
        return sum(len(inputs) for inputs, _ in self.held_out)

    def solution(self) -> Tensor:
        """The weights [K, M], with the ridge chosen anew; the largest one where nothing is held out."""
        if self.held_out_count:
            self._choose_ridge()
        assert self.moments is not None
        return self._solve(self._best[1], self.moments)

    def _choose_ridge(self) -> None:
        assert self.moments is not None
        inputs, targets = (torch.cat(parts) for parts in zip(*self.held_out, strict=True))
        moments = _judged(self.moments)
        self._best = min(
            ((inputs @ self._solve(ridge, moments) - targets).square().mean().item(), ridge) for ridge in RIDGES
        )

    def _solve(self, ridge: float, moments: Tensor) -> Tensor:
        assert self.gram is not None
        gram = self.gram.clone()
        gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-12))
        return torch.cholesky_solve(moments, torch.linalg.cholesky(gram))


def _judged(targets: Tensor) -> Tensor:
    """At most `JUDGED` columns, from all over [N, M]."""
    return targets[:, :: -(-targets.shape[1] // JUDGED)]
