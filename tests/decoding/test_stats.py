"""Counts of drafts and log-probabilities of tokens: in the engine, while streaming, and out of `generate`."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers as tf

import nextn
from conftest import KINDS, Restless, fit, greedy_reference, made_up_text
from nextn.decoding.generation_config import GenerateError
from nextn.decoding.rows import Generation
from nextn.decoding.sampling import Sampling, SamplingError
from nextn.decoding.stats import Logprob, SpecDecodingStats, logprobs_of
from nextn.decoding.tree import Tree

NEW = 24
IDS = torch.cat([made_up_text(1, 12, seed=21), made_up_text(1, 12, seed=22)])
OUTPUT = {"return_dict_in_generate": True, "pad_token_id": 0, "max_new_tokens": NEW}


@pytest.fixture(scope="module")
def model(trained_host) -> nextn.MultiTokenModel:
    config = nextn.MultiTokenConfig(n=4, **KINDS["recurrent"])
    whole = nextn.attach(copy.deepcopy(trained_host), config, calibration={"input_ids": made_up_text(8, 48, seed=999)})
    fit(whole.train(), 60)
    return whole.eval()


@torch.no_grad()
def reference(model, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The log-probabilities of the plain model before each of the tokens [T, V]."""
    logits = model.base(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(dim=-1)


def check_logprobs(model, result: Generation, top: int) -> None:
    """Those of the plain model: of the chosen token and of the most probable ones, with their ranks."""
    expected = reference(model, result.prompt, result.tokens)
    assert len(result.logprobs) == len(result.tokens) > 0
    for token, found, row in zip(result.tokens, result.logprobs, expected, strict=True):
        assert next(iter(found)) == token
        best = row.topk(top + 1).indices.tolist()
        assert set(found) in ({token, *best[:top]}, {token, *best[: top - 1], best[top]} if top else {token})  # a tie
        for other, logprob in found.items():
            assert isinstance(logprob, Logprob)
            assert logprob.logprob == pytest.approx(row[other].item(), abs=1e-3)
            above = [int((row > row[other] + shift).sum()) for shift in (1e-3, -1e-3)]
            assert above[0] + 1 <= logprob.rank <= above[1] + 1


# --- counts -------------------------------------------------------------------------------------------------------


def test_the_counts_of_known_steps():
    result = Generation([1], drafted=[3, 0, 3, 1, 2], accepted=[3, 0, 1, 1, 0], num_spec_tokens=3)
    assert result.spec_decoding_stats == SpecDecodingStats(
        num_spec_tokens=3,
        num_steps=5,
        num_drafts=4,
        num_draft_tokens=9,
        num_accepted_tokens=5,
        num_draft_tokens_per_pos=(4, 3, 2),
        num_accepted_tokens_per_pos=(3, 1, 1),
    )
    assert result.spec_decoding_stats.mean_acceptance_length == 2.0
    assert math.isnan(SpecDecodingStats().mean_acceptance_length)


def test_counts_of_several_texts_add_up():
    first, second = SpecDecodingStats.of([3, 0], [2, 0], 3), SpecDecodingStats.of([1, 3], [1, 3], 3)
    assert first + second == SpecDecodingStats.of([3, 0, 1, 3], [2, 0, 1, 3], 3)
    assert sum([first, second], SpecDecodingStats()) == first + second


def test_plain_decoding_has_a_mean_acceptance_length_of_one(model):
    ((_, result),) = model.engine(heads=1, stop_tokens=[]).generate([IDS[0].tolist()], NEW)
    assert result.spec_decoding_stats == SpecDecodingStats(num_steps=NEW - 1)
    assert result.spec_decoding_stats.mean_acceptance_length == 1.0


@pytest.mark.parametrize("tree", [None, Tree(paths=[(0,), (1,), (0, 0), (0, 0, 0)])])
def test_counts_account_for_every_token(model, tree):
    engine = model.engine(rows=2, stop_tokens=[], depth=None, tree=tree)
    results = dict(engine.generate(IDS.tolist(), NEW))
    assert any(result.spec_decoding_stats.num_accepted_tokens for result in results.values())
    for result in results.values():
        stats = result.spec_decoding_stats
        whole = 1 + stats.num_steps + stats.num_accepted_tokens  # the token after the prefill, and one of each step
        assert NEW - 3 <= whole <= NEW
        assert stats.num_drafts == stats.num_steps and stats.num_draft_tokens == 3 * stats.num_steps
        assert sum(stats.num_accepted_tokens_per_pos) == stats.num_accepted_tokens
        kept = [origin for origin in result.origins[:whole] if origin]
        assert stats.num_accepted_tokens_per_pos == tuple(kept.count(draft) for draft in (1, 2, 3))


def test_generate_returns_the_counts_of_each_row(model):
    output = model.generate(IDS, depth=3, **OUTPUT)
    assert [stats.num_spec_tokens for stats in output.spec_decoding_stats] == [3, 3]
    results = dict(model.engine(rows=2, depth=3).generate(IDS.tolist(), NEW))
    assert output.spec_decoding_stats == [results[row].spec_decoding_stats for row in range(2)]
    assert output.logprobs is None and "logprobs" not in output
    plain = model.generate(IDS, heads=1, **OUTPUT)
    assert {stats.mean_acceptance_length for stats in plain.spec_decoding_stats} == {1.0}


def test_a_stock_model_returns_them_too(model):
    given = OUTPUT | {"custom_generate": nextn.custom_generate, "heads": model, "depth": 3, "logprobs": 1}
    output = model.base.generate(IDS, **given)
    ours = model.generate(IDS, depth=3, logprobs=1, **OUTPUT)
    assert output.spec_decoding_stats == ours.spec_decoding_stats and output.logprobs == ours.logprobs


class AtColumn(tf.StoppingCriteria):
    """Ends all rows at a length; nextn does not know whether it looks at one row or at all."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("new", range(1, 9))
def test_rows_that_criteria_cut_lose_the_steps_of_what_was_cut(model, new):
    criteria = tf.StoppingCriteriaList([AtColumn(12 + new)])
    output = model.generate(IDS, depth=3, logprobs=0, stopping_criteria=criteria, **OUTPUT)
    assert output.sequences.shape[1] == 12 + new
    for stats, logprobs in zip(output.spec_decoding_stats, output.logprobs, strict=True):
        assert len(logprobs) == new
        assert 1 + stats.num_steps + stats.num_accepted_tokens <= new


# --- log-probabilities --------------------------------------------------------------------------------------------


def test_logprobs_of_known_logits():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [0.0, -torch.inf, 3.0, 0.0]])
    expected = logits.log_softmax(dim=-1)
    (first, second), (only, other) = logprobs_of(logits, [2, 2], 2), logprobs_of(logits, [2, 0], 0)
    assert list(first) == [2, 1, 3] and [first[token].rank for token in first] == [3, 1, 2]
    assert list(second) == [2, 0] or list(second) == [2, 3]
    assert second[2] == Logprob(pytest.approx(expected[1, 2].item(), abs=1e-5), 1)
    assert only == {2: first[2]} and other == {0: Logprob(pytest.approx(expected[1, 0].item(), abs=1e-5), 2)}
    assert len(logprobs_of(logits, [0, 0], 99)[0]) == 4
    assert logprobs_of(logits.bfloat16(), [2, 2], 2)[0].keys() == first.keys()


@pytest.mark.parametrize("depth", [None, 0, "auto"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_are_those_of_the_plain_model(model, depth, sampled, top):
    choice = {"temperature": 0.7, "top_p": 0.9, "seed": 5} if sampled else {}
    prompts = IDS.tolist()
    plain = dict(model.engine(rows=2, depth=depth, stop_tokens=[]).generate(prompts, NEW, sampling=Sampling(**choice)))
    sampling = Sampling(logprobs=top, repetition_penalty=1.0, **choice)
    found = dict(model.engine(rows=2, depth=depth, stop_tokens=[]).generate(prompts, NEW, sampling=sampling))
    for index in range(2):
        assert found[index].tokens == plain[index].tokens and not plain[index].logprobs
        assert not found[index].scores and not found[index].logits
        check_logprobs(model, found[index], top)


def test_logprobs_of_a_tree_and_of_rejection(model):
    prompt = [IDS[0].tolist()]
    engine = model.engine(depth=None, tree=Tree(paths=[(0,), (1,), (0, 0), (0, 0, 0)]), stop_tokens=[])
    ((_, result),) = engine.generate(prompt, NEW, sampling=Sampling(logprobs=2))
    assert result.tokens == greedy_reference(model.base, prompt[0], NEW)
    check_logprobs(model, result, 2)
    sampling = Sampling(temperature=1.0, seed=3, method="rejection", logprobs=2)
    ((_, result),) = model.engine(depth=None, stop_tokens=[]).generate(prompt, NEW, sampling=sampling)
    check_logprobs(model, result, 2)


def test_each_row_has_the_logprobs_that_it_asked_for(model):
    several = [Sampling(), Sampling(logprobs=1)]
    found = dict(model.engine(rows=2, stop_tokens=[]).generate(IDS.tolist(), NEW, sampling=several))
    assert not found[0].logprobs
    check_logprobs(model, found[1], 1)


def test_logprobs_are_before_temperature_and_processors(model):
    plain = model.generate(IDS[:1], logprobs=2, **OUTPUT | {"max_new_tokens": 1})
    warm = model.generate(
        IDS[:1], logprobs=2, do_sample=True, temperature=0.2, top_k=1, **OUTPUT | {"max_new_tokens": 1}
    )
    assert plain.logprobs == warm.logprobs


def test_logprobs_belong_to_the_tokens_of_a_row_that_ended_early(model):
    ends = [20, 33, 40, 50, 7, 9, 11]
    output = model.generate(IDS, logprobs=1, eos_token_id=ends, **OUTPUT)
    for row, logprobs in zip(output.sequences[:, 12:].tolist(), output.logprobs, strict=True):
        assert [next(iter(each)) for each in logprobs] == row[: len(logprobs)]
        assert set(row[len(logprobs) :]) <= {0}


def test_logits_that_are_no_numbers_leave_no_logprobs(model):
    broken = copy.deepcopy(model)
    ((_, result),) = broken.engine(stop_tokens=[]).generate([IDS[0].tolist()], 4, sampling=Sampling(logprobs=1))
    assert len(result.logprobs) == 4
    with torch.no_grad():
        broken.base.lm_head.weight.fill_(torch.nan)
    ((_, result),) = broken.engine(stop_tokens=[]).generate([IDS[0].tolist()], 4, sampling=Sampling(logprobs=1))
    assert result.finish == "error" and result.tokens == result.logprobs == []


@pytest.mark.parametrize(("value", "message"), [(-1, "logprobs must be 0"), (1.5, "must be an integer, or None")])
def test_a_number_of_logprobs_that_means_nothing_is_refused(model, value, message):
    with pytest.raises(SamplingError, match=message):
        Sampling(logprobs=value)
    with pytest.raises(SamplingError, match=message):
        model.generate(IDS, logprobs=value, **OUTPUT)


def test_logprobs_need_an_output_to_be_in(model):
    with pytest.raises(GenerateError, match="return_dict_in_generate=True"):
        model.generate(IDS, logprobs=1, max_new_tokens=2)


# --- streaming ----------------------------------------------------------------------------------------------------


def test_a_stream_can_look_at_what_was_given_so_far(model, monkeypatch):
    engine = model.engine(rows=2, stop_tokens=[], depth="auto")
    monkeypatch.setattr("nextn.decoding.engine.Pace", Restless)
    engine.paces = {}
    seen: dict[int, list[tuple[int, int, int]]] = {0: [], 1: [], 2: []}

    def look(index: int, tokens: list[int], _origins: list[int]) -> None:
        so_far = engine.running[index]
        assert so_far.tokens[-len(tokens) :] == tokens
        assert [next(iter(each)) for each in so_far.logprobs[-len(tokens) :]] == tokens
        stats = so_far.spec_decoding_stats
        seen[index].append((len(so_far.tokens), stats.num_steps, stats.num_accepted_tokens))

    prompts = [*IDS.tolist(), IDS[0, :5].tolist()]
    results = dict(engine.generate(prompts, NEW, look, Sampling(logprobs=1)))
    assert engine.running == {}
    for index, looks in seen.items():
        assert looks[0] == (1, 0, 0)
        for length, steps, accepted in looks[:-1]:
            assert length == 1 + steps + accepted
        assert looks[-1][0] == len(results[index].tokens) == NEW


def test_vllms_names():
    """vLLM's classes of these names have these fields."""
    names = "num_spec_tokens num_drafts num_draft_tokens num_accepted_tokens num_accepted_tokens_per_pos"
    assert {*names.split()} <= set(SpecDecodingStats.__dataclass_fields__)
    assert {"logprob", "rank"} <= set(Logprob.__dataclass_fields__)
