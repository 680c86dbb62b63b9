"""Costs are counts of real modules, and a roofline of them has the limits that it must have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nextn
from conftest import MORE_KINDS, make_host
from nextn.decoding import building
from nextn.evaluation.costs import (
    BATCHES,
    Machine,
    Option,
    Weights,
    best_n,
    cache_bytes,
    cheapest,
    costs_of,
    tau_of,
    usual_outputs,
)
from nextn.evaluation.roofline import step_cost
from nextn.model import MultiTokenModel
from nextn.output import build_output
from nextn.trunk import Trunk


def build(family="llama", **config) -> MultiTokenModel:
    return MultiTokenModel(make_host(family), nextn.MultiTokenConfig(**{"n": 4} | config))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_token_meets_all_weights_but_the_embedding(family):
    model = build(family)  # qwen3 is tied: its table is met as the unembedding
    every = sum(parameter.numel() for parameter in model.base.parameters())
    embedding = 0 if family == "qwen3" else model.trunk.embedding.weight.numel()
    assert costs_of(model).trunk == Weights(every - embedding)


def test_experts_are_met_by_those_that_choose_them():
    trunk = costs_of(build("deepseek_v3")).trunk
    assert (trunk.chosen, trunk.of) == (2, 4)
    assert trunk.experts == 2 * 4 * 3 * 16 * 32  # two layers with experts, four of them, three matrices each
    assert trunk.met() == trunk.dense + trunk.experts / 2
    assert trunk.read(1) == trunk.met() < trunk.read(3) < trunk.read(1000) <= trunk.dense + trunk.experts


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 10**6))
def test_experts_that_are_read_are_those_that_some_token_chose(chosen, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = Weights(0, 8000, chosen, 8)
    picks = torch.rand(400, tokens, 8, generator=generator).argsort(dim=-1)[..., :chosen]
    touched = torch.zeros(400, 8).scatter_(1, picks.flatten(1), 1.0).sum(dim=1)
    assert abs(weights.read(tokens) - 1000 * touched.mean().item()) < 1000 * (0.01 + 5 * touched.std().item() / 20)


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_drafts_are_passes_of_real_modules(kind):
    model = build(**MORE_KINDS[kind])
    costs = costs_of(model)
    own = sum(parameter.numel() for parameter in model.heads.parameters())
    assert len(costs.passes) == 3
    assert costs.output == Weights(model.trunk.vocab_size * model.trunk.width)
    if model.heads.recurrent:
        fused = sum(parameter.numel() for parameter in model.heads.fusing.parameters()) if model.heads.fusing else 0
        assert [weights.met() for weights, _ in costs.passes] == [own, own - fused, own - fused]
        assert [tokens for _, tokens in costs.passes] == [4 if model.heads.cache_count else 1, 1, 1]
    else:
        assert sum(weights.met() for weights, _ in costs.passes) == own
    trimmed = costs_of(build(output={"kind": "trimmed", "size": 16}, **MORE_KINDS[kind]))
    assert trimmed.output == Weights(16 * 32) and trimmed.passes == costs.passes


@pytest.mark.parametrize("kind", ["recurrent", "parallel"])
def test_operations_are_those_that_the_bench_counts(kind):
    """Two ways to the same count: the accounting's, and `step_cost` of an engine."""
    model = build(output={"kind": "trimmed", "size": 16}, **MORE_KINDS[kind]).eval()
    engine, costs = model.engine(), costs_of(model)
    building.example(engine, 0)
    counted = step_cost(engine)
    drafts = sum(weights.met() * tokens for weights, tokens in costs.passes) + 3 * costs.output.met()
    assert counted["draft_operations"] == 2 * drafts
    assert counted["operations"] == 2 * (drafts + 4 * costs.trunk.met())


def test_clusters_are_read_as_experts_are():
    model = build(output={"kind": "clustered", "clusters": 8, "top_clusters": 2}, recurrent=True)
    output = costs_of(model).output
    assert output.met() == model.heads.output.operations(model.trunk) == (8 + 2 * 8) * 32
    assert output.read(1000) == pytest.approx((8 + 64) * 32), "many rows choose all clusters between them"


def test_caches_are_as_long_as_their_window():
    costs = costs_of(build("gemma3"))  # sliding, full, sliding; windows of 8
    a_position = 2 * 2 * 8 * 2
    assert costs.trunk_caches == [(a_position, 8), (a_position, None), (a_position, 8)]
    assert cache_bytes(costs.trunk_caches, 100) == (8 + 100 + 8) * a_position
    assert cache_bytes(costs.trunk_caches, 3) == 9 * a_position
    latent = costs_of(build("deepseek_v3"))
    assert latent.trunk_caches[0] == ((16 + 4) * 2, None), "compressed, as engines keep it"


def test_the_limits_of_the_roofline():
    costs = costs_of(build(recurrent=True))
    reading, multiplying = Machine(1e9, math.inf), Machine(math.inf, 1e9)
    trunk, drafts = costs.trunk.met(), sum(weights.met() for weights, _ in costs.passes) + 3 * costs.output.met()
    assert costs.speedup(reading, 1, 0, 2.4) == pytest.approx(2.4 * trunk / (trunk + drafts))
    multiplied = 4 * trunk + sum(weights.met() * tokens for weights, tokens in costs.passes) + 3 * costs.output.met()
    assert costs.speedup(multiplying, 5, 0, 2.4) == pytest.approx(2.4 * trunk / multiplied)
    # three layers of keys and values, two heads of 8, in two bytes
    assert costs.trunk_caches == 3 * [(2 * 2 * 8 * 2, None)] and costs.pass_caches == [(2 * 2 * 8 * 2, None)]
    assert costs.speedup(reading, 1, 10**9, 2.4) == pytest.approx(2.4 * 3 / (3 + 3), rel=1e-3), (
        "each draft reads a cache"
    )


@given(st.floats(1.01, 3.9), st.floats(1e8, 1e12), st.sampled_from([0, 100, 10_000]))
def test_drafting_stops_paying_at_a_border(tau, rate, context):
    costs, machine = costs_of(DENSE), Machine(1e9, rate)
    stops = costs.stops_paying(machine, context, tau)
    if stops is None:
        assert costs.speedup(machine, BATCHES[-1], context, tau) >= 1
        return
    assert costs.speedup(machine, stops, context, tau) < 1
    assert stops == 1 or costs.speedup(machine, stops - 1, context, tau) >= 1
    slow = costs.slow_batches(machine, context, tau)
    assert slow == BATCHES[: len(slow)], "where drafting pays is one stretch of batches"
    assert not slow or context, "without experts and caches drafting pays less the more rows there are"


def test_long_texts_can_make_drafting_pay_at_two_rows_and_not_at_one():
    costs, machine = costs_of(DENSE), Machine(1e9, 4_675_177_305.0)
    assert costs.slow_batches(machine, 100, 2.26) == [1] and costs.stops_paying(machine, 100, 2.26) == 3
    assert costs.speedup(machine, 1, 100, 2.26) < 1 < costs.speedup(machine, 2, 100, 2.26)


DENSE = build(recurrent=True)


def test_experts_can_make_drafting_pay_at_large_batches_alone():
    costs, machine = costs_of(build("deepseek_v3", recurrent=True, n=3)), Machine(1e9, 1e14)
    even = {batch: 1 / costs.speedup(machine, batch, 0, 1.0) for batch in (1, 64)}  # the τ that drafting needs
    assert even[1] > even[64]
    tau = (even[1] + even[64]) / 2
    assert 1 in costs.slow_batches(machine, 0, tau), "a draft wakes experts that would sleep"
    stops = costs.stops_paying(machine, 0, tau)
    assert stops is None or stops > max(costs.slow_batches(machine, 0, tau))


def test_tau_of_conditional_acceptance():
    assert tau_of([0.5], 4) == 1 + 0.5 + 0.25 + 0.125
    assert tau_of([0.8, 0.5], 3) == pytest.approx(1 + 0.8 + 0.4)
    assert tau_of([0.8, 0.5, 0.1], 2) == pytest.approx(1.8)


def test_choices_say_why():
    options = [Option("small", 10, 0.90), Option("middle", 20, 0.96), Option("large", 40, 1.0)]
    chosen, why = cheapest(options, 0.95)
    assert chosen.name == "middle" and "small keeps the most, 90.0%, under 95.0%" in why
    assert cheapest(options, 0.5)[1].endswith("none is cheaper")
    with pytest.raises(ValueError, match="No output keeps 101"):
        cheapest(options, 1.01)
    assert best_n({2: 1.2, 3: 1.5, 4: 1.4})[0] == 3
    assert "slower than plain decoding" in best_n({2: 0.9, 3: 0.8})[1]


@pytest.mark.parametrize(("vocabulary", "width"), [(49152, 576), (151936, 3584), (128256, 8192), (64, 32), (61, 8)])
def test_usual_outputs_fit_any_vocabulary(vocabulary, width):
    trunk = Trunk(make_host("llama"))
    for config in usual_outputs(vocabulary, width):
        if (vocabulary, width) == (trunk.vocab_size, trunk.width):
            build_output(config, trunk)
        assert config.clusters is None or vocabulary % config.clusters == 0
        assert (config.size or 1) <= vocabulary and (config.rank or 1) <= width
