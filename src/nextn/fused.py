"""Liger's fused cross-entropy kernel, where it is installed (`pip install nextn[gpu]`) and the device has it."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
    """Σ -log softmax(logits)[target], a scalar, and the largest logit's place [C]; the gradient replaces the logits.

    One kernel reads and writes the logits once where PyTorch's operations do so some five times.

    Args:
        logits: float32 [C, V'], overwritten with softmax - one-hot.
        targets: [C], all of them valid.

    Returns:
        None, and nothing done, where there is no such kernel for the device.
    """
    if not logits.is_cuda or logits.dtype != torch.float32 or not logits.is_contiguous() or not installed():
        return None
    with torch.cuda.device(logits.device):  # triton launches on the current device, whatever its inputs are on
        return _by_liger(logits, targets)


@cache
def installed() -> bool:
    """Whether the kernel can be had."""
    return importlib.util.find_spec("liger_kernel") is not None and importlib.util.find_spec("triton") is not None


def _by_liger(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    loss, _, _, largest, gradient = cross_entropy_forward(
        logits.detach().requires_grad_(),  # the kernel makes a gradient only for what wants one
        targets,
        weight=None,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="sum",
        softcap=None,
        return_z_loss=False,
        return_predicted_tokens=True,
    )
    if gradient.data_ptr() != logits.data_ptr():
        raise RuntimeError("Liger's kernel no longer writes in place; nextn knows liger-kernel 0.8.")
    return loss.detach(), largest
