"""What stands of the drafts: the emitted tokens have the trunk's own law, whatever the drafts were drawn from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nextn.decoding.verify import accept_by_rejection, accept_greedy, chosen, follow

V, N = 3, 3


@given(st.lists(st.integers(0, 2), min_size=3, max_size=3), st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_accepted_is_the_longest_agreeing_prefix(drafts, targets):
    expected = next((i for i in range(3) if drafts[i] != targets[i]), 3)
    assert accept_greedy(torch.tensor([drafts]), torch.tensor([targets])).tolist() == [expected]


def test_no_draft_never_stands_even_where_the_trunk_is_broken():
    assert accept_greedy(torch.tensor([[-1, -1]]), torch.tensor([[-1, -1, -1]])).tolist() == [0]
    scores = torch.tensor([[0.0, float("nan"), 1.0], [-torch.inf] * 3, [0.0, 2.0, 1.0]])
    assert chosen(scores).tolist() == [-1, -1, 1]


def laws(seed: int, sharpness: float = 1.0) -> list[torch.Tensor]:
    """The law of the token after each prefix of 0, 1 and 2 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [(sharpness * torch.randn(*[V] * length, V, generator=generator)).softmax(-1) for length in range(N)]


def after(tables: list[torch.Tensor], drafts: torch.Tensor) -> torch.Tensor:
    """The laws after each prefix of drafts [B, m]: [B, m + 1, V]."""
    places = [
        tables[length][tuple(drafts[:, :length].T)] if length else tables[0].expand(len(drafts), -1)
        for length in range(drafts.shape[1] + 1)
    ]
    return torch.stack(places, dim=1)


def draw(law: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(law, 1, generator=generator)[:, 0]


def emitted(p, q, block: bool, drafted: str, count: int = 200_000, said: str = "as drawn") -> torch.Tensor:
    """Three tokens a row: what a round of two drafts emits, and then the trunk's own draws."""
    generator = torch.Generator().manual_seed(1)
    drafts = torch.zeros(count, 0, dtype=torch.long)
    for place in range(N - 1):
        law = after(q, drafts)[:, place]
        token = draw(law, generator) if drafted == "sampled" else law.argmax(-1)
        drafts = torch.cat([drafts, token[:, None]], dim=1)
    of_drafts = after(q, drafts)[:, :-1]
    if drafted != "sampled" and said == "as drawn":
        of_drafts = torch.nn.functional.one_hot(drafts, V).float()
    if drafted == "some":  # rows with fewer drafts than others
        drafts[::3, 1:] = -1
        drafts[1::3] = -1
    uniform = torch.rand(count, N - 1, generator=generator)
    accepted, rest = accept_by_rejection(after(p, drafts.clamp(min=0)), of_drafts, drafts, uniform, block)
    tokens = torch.cat([drafts, drafts[:, :1]], dim=1)
    tokens[torch.arange(count), accepted] = draw(rest, generator)
    for place in range(1, N):
        again = draw(after(p, tokens[:, :place].clamp(min=0))[:, place], generator)
        tokens[:, place] = torch.where(accepted < place, again, tokens[:, place])
    return tokens


def p_value(tokens: torch.Tensor, p: list[torch.Tensor]) -> float:
    joint = (p[0][:, None, None] * p[1][:, :, None] * p[2]).flatten()
    cells = (tokens * torch.tensor([V * V, V, 1])).sum(dim=1)
    counts = torch.bincount(cells, minlength=V**N)
    return stats.chisquare(counts.double(), joint.double() / joint.double().sum() * len(tokens)).pvalue


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("drafted", ["sampled", "greedy", "some"])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_emitted_has_the_trunks_law(seed, drafted, block):
    p, q = laws(seed), laws(seed + 10, sharpness=2.0)
    assert p_value(emitted(p, q, block, drafted), p) > 1e-3


@pytest.mark.parametrize("block", [False, True])
def test_a_drafter_equal_to_the_trunk_is_never_rejected(block):
    p = laws(3)
    tokens = emitted(p, p, block, "sampled")  # elsewhere: a residual of zeros, and NaN
    assert p_value(tokens, p) > 1e-3
    drafts = tokens[:1000, :2]
    laws_of_drafts = after(p, drafts)
    accepted, rest = accept_by_rejection(
        laws_of_drafts, laws_of_drafts[:, :-1], drafts, torch.full((1000, 2), 1 - 1e-6), block
    )
    assert accepted.eq(2).all() and torch.equal(rest, laws_of_drafts[:, -1])


def test_the_check_sees_the_error_of_greedy_drafts_that_pass_for_sampled_ones():
    p, q = laws(0), laws(10, sharpness=2.0)  # transformers with Gemma 4's assistants: q is said to be the softmax
    assert p_value(emitted(p, q, False, "greedy", said="softmax"), p) < 1e-12


def test_tokens_that_cannot_be_drawn_never_come():
    p = torch.tensor([[[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]])
    q = torch.tensor([[[0.9, 0.1, 0.0]]])
    for block in (False, True):
        accepted, rest = accept_by_rejection(p, q, torch.tensor([[0]]), torch.tensor([[1e-6]]), block)
        assert accepted.item() == 0 and rest[0, 0] == 0


def test_block_verification_accepts_more():
    total = {}
    for block in (False, True):
        generator = torch.Generator().manual_seed(0)
        p, q = laws(0), laws(10)
        drafts = torch.zeros(100_000, 0, dtype=torch.long)
        for place in range(N - 1):
            drafts = torch.cat([drafts, draw(after(q, drafts)[:, place], generator)[:, None]], dim=1)
        uniform = torch.rand(100_000, N - 1, generator=generator)
        accepted, _ = accept_by_rejection(after(p, drafts), after(q, drafts)[:, :-1], drafts, uniform, block)
        total[block] = accepted.double().mean()
    assert total[True] > total[False] + 0.005


@settings(max_examples=60)
@given(st.data())
def test_the_path_through_a_tree_is_the_one_of_a_walk(data):
    count = data.draw(st.integers(2, 9))
    parents, depths = [0], [0]
    tokens: list[int] = [99]
    for node in range(1, count):
        parent = data.draw(st.integers(0, node - 1))
        taken = [tokens[other] for other in range(1, node) if parents[other] == parent]
        tokens.append(data.draw(st.sampled_from([each for each in range(12) if each not in taken])))
        parents.append(parent)
        depths.append(depths[parent] + 1)
    targets = [data.draw(st.integers(0, 3)) for _ in range(count)]
    walk = [0]
    while step := next((c for c in range(1, count) if parents[c] == walk[-1] and tokens[c] == targets[walk[-1]]), None):
        walk.append(step)
    accepted, path = follow(*(torch.tensor([each]) for each in (tokens, parents, depths, targets)), longest=9)
    assert accepted.item() == len(walk) - 1
    assert path[0, : len(walk)].tolist() == walk and not path[0, len(walk) :].any()
