"""Outputs are parts or approximations of the full one, and never name a token that they cannot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import VOCAB, make_host
from nextn.clustering import balanced_clusters
from nextn.config import ConfigError, OutputConfig
from nextn.output import ClusteredOutput, EachOutput, LowRankOutput, OwnOutput, best, build_output
from nextn.trunk import Trunk

TRUNK = Trunk(make_host("llama"))


@given(st.sets(st.integers(0, VOCAB - 1), min_size=1))
def test_trimmed_logits_are_rows_of_the_full_ones(kept):
    output = build_output(OutputConfig(kind="trimmed", size=len(kept)), TRUNK)
    output.keep(torch.tensor(sorted(kept, reverse=True)), TRUNK.unembedding.weight)
    states = torch.randn(3, TRUNK.width)
    full = TRUNK.logits(states)
    logits, ids = output.scores(TRUNK, states)
    assert ids.tolist() == sorted(kept)
    torch.testing.assert_close(logits, full[:, ids])
    everything = torch.arange(VOCAB)
    index = output.targets(everything)
    assert set(everything[index >= 0].tolist()) == kept
    assert torch.equal(ids[index[index >= 0]], everything[index >= 0])
    assert output.targets(torch.tensor([-100])).tolist() == [-100]


def test_kept_rows_follow_a_trunk_that_changes():
    trunk = Trunk(make_host("llama").requires_grad_(False))
    output = build_output(OutputConfig(kind="trimmed", size=5), TRUNK)
    states = torch.randn(2, trunk.width)
    output.scores(trunk, states)
    with torch.no_grad():
        trunk.unembedding.weight.mul_(2)
    torch.testing.assert_close(output.scores(trunk, states)[0], trunk.logits(states)[:, :5])


def test_a_subset_must_be_distinct_and_fit():
    output = build_output(OutputConfig(kind="trimmed", size=2), TRUNK)
    with pytest.raises(ValueError, match="distinct"):
        output.keep(torch.tensor([3, 3]), TRUNK.unembedding.weight)
    for stated, message in (
        (f"trimmed:{VOCAB + 1}", "vocabulary has 64"),
        ("low_rank:33", "no more than 32"),
        ("clustered:12:2", "choose for example (8|16) or (8|16)"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_output(OutputConfig.parse(stated), TRUNK)


def test_own_rows_are_refused_where_they_would_lose_a_bias():
    trunk = Trunk(make_host("llama"))
    trunk.unembedding.bias = torch.nn.Parameter(torch.randn(VOCAB))
    for stated in ("separate", "low_rank:4", "trimmed:8,own"):
        with pytest.raises(ConfigError, match="has a bias"):
            build_output(OutputConfig.parse(stated), trunk)
    states = torch.randn(3, trunk.width)
    for stated in ("trimmed:8", "clustered:8:2"):
        output = build_output(OutputConfig.parse(stated), trunk)
        logits, ids = output.scores(trunk, states)
        torch.testing.assert_close(logits, trunk.logits(states).gather(1, ids.expand_as(logits)))


def test_best_is_argmax_also_where_several_are_equal():
    for size in (1, 7, 64, 52, 96):
        logits = torch.randint(0, 4, (5, 3, size)).float()
        assert torch.equal(best(logits), logits.argmax(dim=-1))


def fitted(stated: str, modules: int = 1, trunk: Trunk = TRUNK):
    torch.manual_seed(0)
    output = build_output(OutputConfig.parse(stated), trunk, modules)
    output.fit(trunk.unembedding.weight)
    return output


KINDS = ["shared", "low_rank:8", "trimmed:20", "trimmed:20,own", "clustered:8:3", "clustered:16:5,own"]


@pytest.mark.parametrize("stated", KINDS)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_proposals_are_zero_outside_of_what_can_be_named_exactly(stated, seed, scale):
    output = fitted(stated)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 3, TRUNK.width, generator=generator) * scale
    whole = output(TRUNK, states)
    q = whole.softmax(dim=-1)
    everything = torch.arange(VOCAB).expand(2, 3, -1)
    named = output.can_name(TRUNK, states[..., None, :].expand(2, 3, VOCAB, -1), everything)
    assert (q[~named] == 0).all() and (whole[named] > -torch.inf).all()
    torch.testing.assert_close(q.sum(dim=-1), torch.ones(2, 3))
    chosen = output.best_token(TRUNK, states)
    assert torch.equal(whole.gather(-1, chosen[..., None])[..., 0], whole.amax(dim=-1))
    assert named.gather(-1, chosen[..., None]).all()
    logits, ids = output.scores(TRUNK, states)
    assert output.size(TRUNK) >= logits.shape[-1] == named.sum(dim=-1).unique().item()
    if ids is not None:
        assert len(ids.reshape(-1, logits.shape[-1])[0].unique()) == logits.shape[-1], "no token twice"


@pytest.mark.parametrize(
    "stated", ["clustered:8:8", "clustered:8:8,own", f"trimmed:{VOCAB}", "low_rank:32", "separate"]
)
def test_outputs_that_leave_nothing_out_are_the_full_one(stated):
    states = torch.randn(5, TRUNK.width)
    torch.testing.assert_close(fitted(stated).at(2)(TRUNK, states), TRUNK.logits(states), rtol=1e-4, atol=1e-4)


def test_a_low_rank_table_is_the_nearest_of_its_rank():
    output, table = fitted("low_rank:8"), TRUNK.unembedding.weight.detach()
    assert isinstance(output, LowRankOutput)
    missed = (output.up.weight @ output.down.weight - table).square().sum()
    torch.testing.assert_close(missed, torch.linalg.svdvals(table)[8:].square().sum(), rtol=1e-4, atol=1e-4)


def test_each_module_can_have_its_own():
    output = fitted("low_rank:8,each", modules=2)
    assert isinstance(output, EachOutput) and output.at(2) is not output.at(3) and output.at(9) is output.at(3)
    assert all(isinstance(part.at(2), OwnOutput) for part in fitted("separate", modules=2).parts())


@given(clusters=st.sampled_from([1, 2, 5, 8, 40]), distinct=st.integers(1, 40), seed=st.integers(0, 1000))
def test_clusters_have_one_size_and_hold_each_point_once(clusters, distinct, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(distinct, 3, generator=generator)[torch.randint(distinct, (40,), generator=generator)]
    members = balanced_clusters(points, clusters, rounds=3)
    assert members.shape == (clusters, 40 // clusters)
    assert members.flatten().sort().values.tolist() == list(range(40))


def test_clusters_that_are_plain_to_see_are_found():
    centres = torch.randn(4, 16) * 10
    truth = torch.arange(4).repeat(25)[torch.randperm(100)]
    members = balanced_clusters(centres[truth] + 0.1 * torch.randn(100, 16), 4, seed=3)
    spread = [(centres[truth[group]] - centres[truth[group]].mean(dim=0)).norm() for group in members]
    assert sum(float(each) < 1e-3 for each in spread) >= 2, "Lloyd's iterations find a local optimum, not any partition"
    with pytest.raises(ValueError, match="cannot hold"):
        balanced_clusters(torch.randn(10, 2), 3)


def test_clusters_score_the_tokens_of_the_best_centroids_alone():
    output = fitted("clustered:8:3")
    assert isinstance(output, ClusteredOutput)
    state = torch.randn(TRUNK.width)
    fits = (output.centroids.weight @ state).argsort(descending=True)[:3]
    named = {token for cluster in fits for token in output.token_ordering.view(8, 8)[cluster].tolist()}
    whole = output(TRUNK, state)
    full = TRUNK.logits(state)
    for token in range(VOCAB):
        assert whole[token] == -torch.inf if token not in named else (whole[token] - full[token]).abs() < 1e-4


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("trimmed", "give output.size"),
        ("trimmed:x", "invalid literal"),
        ("shared:3", "takes no numbers"),
        ("huge", "kind: Input should be"),
        ("clustered:4:8", "there are 4 clusters"),
        ("low_rank:8,own", "own rows"),
        ("trimmed:8,each", "output.each goes with"),
        ("shared,blue", "there is no blue"),
        ("trimmed,size", "there is no size"),
    ],
)
def test_short_forms_that_mean_nothing_are_refused(stated, message):
    with pytest.raises(ConfigError, match=message):
        OutputConfig.parse(stated)


@pytest.mark.parametrize("stated", [*KINDS, "separate", "low_rank:4,each", "trimmed:9,own,each"])
def test_short_forms_are_read_as_they_are_written(stated):
    assert str(OutputConfig.parse(stated)) == stated
