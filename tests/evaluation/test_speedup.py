"""The speed-up that `nextn attach` ends with: acceptance is that of decoding, the expectation that of its formula."""

from __future__ import annotations

import pytest

import nextn
from nextn.evaluation.acceptance import Acceptance
from nextn.evaluation.report import Interval
from nextn.evaluation.speedup import Speedup, measure_speedup


def make_speedup(cumulative: list[float], ratio: float) -> Speedup:
    tau = 1 + sum(cumulative)
    return Speedup(Acceptance(100, tau, cumulative, cumulative), 0.01, 0.01 * ratio, Interval(ratio), 100)


def test_as_many_drafts_as_pay_are_expected():
    """With steps of 1, 1.1, 1.2 and 1.3 times a plain one, drafts pay while they add more than they cost."""
    speedup = make_speedup([0.8, 0.4, 0.02], ratio=1.3)
    assert [speedup.expected(drafts) for drafts in range(4)] == pytest.approx([1, 1.8 / 1.1, 2.2 / 1.2, 2.22 / 1.3])
    assert speedup.best_drafts == 2 and speedup.is_worth_it


@pytest.mark.parametrize(("cumulative", "ratio"), [([0.1, 0.0, 0.0], 2.0), ([0.0, 0.0, 0.0], 1.0)])
def test_drafts_that_cost_more_than_they_bring_are_not_worth_it(cumulative, ratio):
    speedup = make_speedup(cumulative, ratio)
    assert speedup.best_drafts == 0 and speedup.expected(0) == 1.0 and not speedup.is_worth_it


def test_acceptance_is_that_of_decoding(trained_model, prompts):
    n, done = trained_model.multi_token.n, []
    speedup = measure_speedup(trained_model.eval(), prompts, 24, advance=lambda: done.append(1))
    generations = [next(iter(trained_model.engine(depth=None).generate([ids], 24)))[1] for ids in prompts]
    assert speedup.acceptance == Acceptance.of(generations, n)
    assert speedup.new_tokens == sum(len(each.tokens) for each in generations) and len(done) == len(prompts)
    assert speedup.plain_seconds > 0 and speedup.drafted_seconds > 0
    rows = list(speedup.table().columns[3].cells)
    assert rows[-1] == f"{1 + sum(speedup.acceptance.cumulative):.2f}" and len(rows) == n - 1


def test_texts_that_end_at_once_are_no_measurement(trained_host, prompts):
    model = nextn.attach(trained_host, nextn.MultiTokenConfig(n=3, recurrent=True)).eval()
    assert measure_speedup(model, prompts, 1) is None
