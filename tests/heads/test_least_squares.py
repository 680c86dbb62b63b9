"""Ridge regression in parts: the solution of all examples at once, whatever the parts, and when it has enough."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextn.heads.least_squares import FIRST_CHECK, HELD_OUT, RIDGES, RidgeRegression


def examples(count: int, noise: float, seed: int = 0, k: int = 12, m: int = 5):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, k, generator=generator)
    weights = torch.randn(k, m, generator=generator)
    targets = inputs @ weights + noise * torch.randn(count, m, generator=generator)
    return inputs, targets, torch.arange(count) % 8 == 7


def fitted(parts) -> RidgeRegression:
    fit = RidgeRegression()
    for part in parts:
        fit.add(*part)
    return fit


def reference(inputs, targets, held_out):
    """Each ridge solved by an augmented least-squares problem; the one with the smallest held-out error."""
    x, y = inputs[~held_out].double(), targets[~held_out].double()

    def solve(ridge: float):
        diagonal = (ridge * x.square().sum(dim=0).mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
        augmented = torch.cat([y, y.new_zeros(x.shape[1], y.shape[1])])
        return torch.linalg.lstsq(torch.cat([x, diagonal]), augmented).solution

    def error(weights):
        return (inputs[held_out].double() @ weights - targets[held_out].double()).square().mean().item()

    return min((solve(ridge) for ridge in RIDGES), key=error)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(16, 300),
    cuts=st.lists(st.integers(1, 299), max_size=4),
    noise=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_the_solution_is_that_of_all_examples_whatever_the_parts(count, cuts, noise, seed):
    whole = examples(count, noise, seed)
    edges = [0, *sorted({cut for cut in cuts if cut < count}), count]
    parts = [tuple(tensor[a:b] for tensor in whole) for a, b in pairwise(edges)]
    solution = fitted(parts).solution()
    torch.testing.assert_close(solution, fitted([whole]).solution(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solution, reference(*whole), rtol=1e-6, atol=1e-6)


def test_it_stops_when_twice_the_examples_bring_little():
    """Of a linear function with little noise a few examples say all."""
    fit, read = RidgeRegression(), 0
    for seed in range(100):
        read += 1
        inputs, targets, held_out = examples(512, noise=0.0)
        targets = targets + 0.1 * torch.randn(targets.shape, generator=torch.Generator().manual_seed(seed))
        if not fit.add(inputs + 0 * seed, targets, held_out):
            break
    assert FIRST_CHECK <= fit.count <= 3 * FIRST_CHECK and read < 20


def test_many_inputs_need_many_examples():
    """With hardly more examples than inputs, twice as many do bring something: it goes on."""
    fit = RidgeRegression()
    more = [fit.add(*examples(1024, noise=3.0, seed=seed, k=1500)) for seed in range(4)]
    assert all(more) and fit.count > FIRST_CHECK


def test_no_more_than_a_limit_is_held_out():
    fit = fitted(examples(4096, noise=1.0, seed=seed) for seed in range(8))
    assert HELD_OUT <= fit.held_out_count < HELD_OUT + 4096 // 8
    assert fit.count + fit.held_out_count == 8 * 4096


def test_with_nothing_held_out_the_largest_ridge_is_taken():
    inputs, targets, _ = examples(5, noise=0.1)
    fit = fitted([(inputs, targets, torch.zeros(5, dtype=torch.bool))])
    gram = inputs.double().T @ inputs.double()
    gram += RIDGES[-1] * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.solve(gram, inputs.double().T @ targets.double())
    torch.testing.assert_close(fit.solution(), expected)


def test_with_nothing_held_out_it_reads_on():
    fit = RidgeRegression()
    for seed in range(3):
        inputs, targets, _ = examples(2 * FIRST_CHECK, noise=0.1, seed=seed)
        assert fit.add(inputs, targets, torch.zeros(len(inputs), dtype=torch.bool))
    assert fit.solution().isfinite().all()
