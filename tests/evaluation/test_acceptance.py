from __future__ import annotations

import math

import pytest

from nextn.decoding.engine import Engine, Generation
from nextn.evaluation.acceptance import Acceptance
from nextn.trunk import Trunk


def test_figures_of_known_steps():
    generations = [Generation([1], accepted=[3, 0, 1], drafted=[3, 3, 3]), Generation([1], accepted=[2], drafted=[3])]
    figures = Acceptance.of(generations, n=4)
    assert figures.steps == 4
    assert figures.tau == pytest.approx(1 + 6 / 4)
    assert figures.cumulative == pytest.approx([3 / 4, 2 / 4, 1 / 4])
    assert figures.conditional == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    assert figures.tau == pytest.approx(1 + sum(figures.cumulative))


def test_plain_decoding_has_tau_one_and_no_steps_have_none(trained_host, prompts):
    results = [result for _, result in Engine(Trunk(trained_host), None).generate(prompts, 6)]
    assert Acceptance.of(results, n=1).tau == 1.0
    assert math.isnan(Acceptance.of([], n=4).tau)
    assert all(math.isnan(share) for share in Acceptance.of([], n=4).conditional)
