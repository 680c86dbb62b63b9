"""Attention with keys of one's own equals one mask over all keys, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nextn.attention import chain_attention
from nextn.trunk import with_own_keys


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("queries_per_key", [1, 3])
def test_chain_attention_equals_one_mask_over_all_keys(dtype, bound, blocks, queries_per_key):
    generator = torch.Generator().manual_seed(blocks)
    length = 19
    shapes = [(2, 6, length, 8), *[(2, 6 // queries_per_key, (1 + blocks) * length, 8)] * 2]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    visible = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    visible[1, :, 7:, :5] = False  # another document

    def gradients(attend, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        output = attend(*leaves)
        return [output, *torch.autograd.grad(output, leaves, upstream.to(dtype))]

    mask = with_own_keys(visible, blocks)
    whole = gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True), torch.float64
    )
    ours = gradients(lambda q, k, v: chain_attention(q, k, v, visible, 0.3), dtype)
    for found, expected in zip(ours, whole, strict=True):
        assert (found.double() - expected).norm() / expected.norm() < bound


def test_other_widths_are_left_to_the_mask():
    query, key, value = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 6)
    assert chain_attention(query, key, value, torch.ones(1, 1, 4, 4, dtype=torch.bool), 1.0) is None
