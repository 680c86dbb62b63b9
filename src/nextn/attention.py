"""Attention of a recurrent chain in training: all positions at once, each with a few keys of its own.

Step k of a chain sees the step-1 entries up to its position and then its own chain: for T positions, T keys in common
and k - 2 that each position has for itself. Written as one mask over (k - 1) · T keys, most of the work is for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def chain_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor | None:
    """Attention in which each query also sees keys of its own.

    Args:
        query: [B, G·H, T, D]; groups of G query heads have their keys in common.
        key, value: [B, H, (1 + c) · T, D]: those in common, then c blocks of which query t sees the t-th one.
        visible: which of those in common each query sees, bool [B, 1, T, T].

    Returns:
        [B, G·H, T, D]; None where the kernel that this is made of cannot be used.
    """
    if query.device.type != "cpu" or query.shape[-1] != value.shape[-1]:
        return None
    mask = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, float("-inf"))
    return _Chain.apply(query, key, value, mask, scale)


class _Chain(torch.autograd.Function):
    """The fused kernel over the keys in common, joined with the others by its log-sum-exp.

    Its backward, given the joint output and log-sum-exp, gives exactly the part of the gradient that goes to the keys
    in common, since a probability is exp(score - log-sum-exp) whatever else was summed (as in ring attention).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        length, heads = query.shape[2], key.shape[1]
        keys, values = key[:, :, :length], value[:, :, :length]
        common, normaliser = _flash(query, keys, values, 0.0, False, attn_mask=mask, scale=scale)
        own_keys, own_values = _own(key, length), _own(value, length)
        common, normaliser = _grouped(common, heads), _grouped(normaliser, heads)  # [B, H, G, T, D], [B, H, G, T]
        scores = torch.einsum("bhgtd,bhctd->bhgct", _grouped(query, heads), own_keys).to(normaliser.dtype) * scale
        joint = torch.logsumexp(torch.cat([normaliser[:, :, :, None], scores], dim=3), dim=3)  # [B, H, G, T]
        shares = (scores - joint[:, :, :, None]).exp()  # [B, H, G, c, T]
        output = common * (normaliser - joint).exp()[..., None].to(common.dtype)
        output += torch.einsum("bhgct,bhctd->bhgtd", shares.to(value.dtype), own_values)
        output, joint = output.flatten(1, 2), joint.flatten(1, 2)
        ctx.save_for_backward(query, key, value, mask, output, joint, shares)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, mask, output, joint, shares = ctx.saved_tensors
        length, heads = query.shape[2], key.shape[1]
        keys, values = key[:, :, :length], value[:, :, :length]
        query_grad, keys_grad, values_grad = _flash_backward(
            upstream, query, keys, values, output, joint, 0.0, False, attn_mask=mask, scale=ctx.scale
        )
        own_keys, own_values = _own(key, length), _own(value, length)
        queries, slope = _grouped(query, heads), _grouped(upstream, heads)  # [B, H, G, T, D]
        along = _grouped((upstream * output).sum(dim=-1), heads)[:, :, :, None]  # [B, H, G, 1, T]
        towards = torch.einsum("bhgtd,bhctd->bhgct", slope, own_values) - along
        slopes = (shares * towards.to(shares.dtype) * ctx.scale).to(query.dtype)  # [B, H, G, c, T]
        query_grad = query_grad + torch.einsum("bhgct,bhctd->bhgtd", slopes, own_keys).flatten(1, 2)
        own_keys_grad = torch.einsum("bhgct,bhgtd->bhctd", slopes, queries)
        own_values_grad = torch.einsum("bhgct,bhgtd->bhctd", shares.to(value.dtype), slope)
        return (
            query_grad,
            torch.cat([keys_grad, own_keys_grad.flatten(2, 3)], dim=2),
            torch.cat([values_grad, own_values_grad.flatten(2, 3)], dim=2),
            None,
            None,
        )


def _own(states: Tensor, length: int) -> Tensor:
    """What each position has for itself [B, H, c, T, D]."""
    return states[:, :, length:].unflatten(2, (-1, length))


def _grouped(states: Tensor, heads: int) -> Tensor:
    """[B, G·H, ...] -> [B, H, G, ...]."""
    return states.unflatten(1, (heads, -1))
