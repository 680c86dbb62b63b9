"""Liger's kernel gives what our own operations give. Without a GPU, triton's interpreter runs it on the CPU:

TRITON_INTERPRET=1 pytest tests/real/test_liger.py
"""

from __future__ import annotations

import os

import pytest
import torch

from nextn import fused, losses

pytestmark = pytest.mark.skipif(
    not fused.installed() or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs liger-kernel, and a GPU or TRITON_INTERPRET=1",
)


@pytest.mark.parametrize("vocabulary", [60, 1000, 4097])
def test_the_fused_kernel_equals_our_own_operations(vocabulary):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(9, vocabulary, device=device) * 4
    targets = torch.randint(0, vocabulary, (9,), device=device)
    ours, theirs, largest = logits.clone(), logits.clone(), logits.argmax(dim=-1)
    expected = losses._text(ours, targets, largest)
    loss, predicted = fused._by_liger(theirs, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)
    assert torch.equal(predicted, largest)
