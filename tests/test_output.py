"""Trimmed outputs are rows of the full one, and never name another token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import VOCAB, make_host
from nextn.config import OutputConfig
from nextn.output import best, build_output, most_frequent
from nextn.trunk import Trunk

TRUNK = Trunk(make_host("llama"))


@given(st.sets(st.integers(0, VOCAB - 1), min_size=1))
def test_trimmed_logits_are_rows_of_the_full_ones(kept):
    output = build_output(OutputConfig(kind="trimmed", size=len(kept)), TRUNK)
    output.keep(torch.tensor(sorted(kept, reverse=True)), TRUNK)
    states = torch.randn(3, TRUNK.width)
    full = TRUNK.logits(states)
    torch.testing.assert_close(output(TRUNK, states), full[:, sorted(kept)])
    everything = torch.arange(VOCAB)
    index = output.targets(everything)
    assert set(everything[index >= 0].tolist()) == kept
    assert torch.equal(output.token_ids(index[index >= 0]), everything[index >= 0])
    assert output.targets(torch.tensor([-100])).tolist() == [-100]


def test_kept_rows_follow_a_trunk_that_changes():
    trunk = Trunk(make_host("llama").requires_grad_(False))
    output = build_output(OutputConfig(kind="trimmed", size=5), TRUNK)
    states = torch.randn(2, trunk.width)
    output(trunk, states)
    with torch.no_grad():
        trunk.unembedding.weight.mul_(2)
    torch.testing.assert_close(output(trunk, states), trunk.logits(states)[:, :5])


def test_a_subset_must_be_distinct_and_fit():
    output = build_output(OutputConfig(kind="trimmed", size=2), TRUNK)
    with pytest.raises(ValueError, match="distinct"):
        output.keep(torch.tensor([3, 3]), TRUNK)
    with pytest.raises(ValueError, match="vocabulary has 64"):
        build_output(OutputConfig(kind="trimmed", size=VOCAB + 1), TRUNK)


def test_the_most_frequent_tokens_are_kept_and_those_that_must():
    ids = torch.tensor([5, 5, 5, 9, 9, 7, 1])
    assert most_frequent(ids, 3, VOCAB, always=[2]).tolist() == [2, 5, 9]


def test_best_is_argmax_also_where_several_are_equal():
    for size in (1, 7, 64, 52, 96):
        logits = torch.randint(0, 4, (5, 3, size)).float()
        assert torch.equal(best(logits), logits.argmax(dim=-1))
