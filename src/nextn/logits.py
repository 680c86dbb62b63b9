"""What a host does to its logits after the unembedding: a scale (Cohere, Granite) or a soft cap (Gemma, nanochat)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Hosts with `logits_scaling` divide their logits by it (Granite), but for these.
_MULTIPLIES_BY_SCALING, _DIVIDES_HIDDEN = {"hyperclovax"}, {"minicpm3"}


@dataclass(frozen=True)
class LogitTransform:
    """logits -> cap · tanh(logits · multiplier / divisor / cap), in the order and dtype of the host's own forward.

    Multiplier and divisor are separate since dividing by 3 and multiplying by 1/3 round differently.

    Attributes:
        cap: soft cap; None leaves the logits unbounded.
        divides_hidden: whether the host divides the hidden state rather than the logits; the same up to rounding.
    """

    multiplier: float = 1.0
    divisor: float = 1.0
    cap: float | None = None
    divides_hidden: bool = False

    @classmethod
    def of(cls, model: Any, config: Any) -> LogitTransform:
        """Read the transform from a host and its text config."""
        multiplier, divisor = getattr(model, "logit_scale", None), 1.0  # Cohere keeps it on the model
        if not isinstance(multiplier, int | float):
            multiplier = 1.0
        scaling = getattr(config, "logits_scaling", None)
        if scaling is not None and config.model_type in _MULTIPLIES_BY_SCALING:
            multiplier = scaling
        elif scaling is not None:
            divisor = scaling
        cap = getattr(config, "final_logit_softcapping", None)
        divides_hidden = config.model_type in _DIVIDES_HIDDEN
        return cls(float(multiplier), float(divisor), None if cap is None else float(cap), divides_hidden)

    @property
    def is_identity(self) -> bool:
        return (self.multiplier, self.divisor, self.cap) == (1.0, 1.0, None)

    @property
    def after_unembedding(self) -> LogitTransform:
        """What of it the host applies to logits."""
        return replace(self, divisor=1.0) if self.divides_hidden else self

    def unembed(self, unembedding: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """hidden [..., D] -> the host's logits [..., V], rounded as the host rounds them."""
        return self.after_unembedding(unembedding(hidden / self.divisor if self.divides_hidden else hidden))

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits of the unembedding, any shape -> the host's logits."""
        if self.multiplier != 1:
            logits = logits * self.multiplier
        if self.divisor != 1:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def derivative(self, logits: Tensor) -> Tensor | float:
        """d transform / d logits at logits of the unembedding, in their shape; a number where it is constant."""
        scale = self.multiplier / self.divisor
        if self.cap is None:
            return scale
        return (1 - torch.tanh(logits * (scale / self.cap)) ** 2) * scale


IDENTITY = LogitTransform()
