"""The checker finds what is wrong, and only that."""

from __future__ import annotations

import pytest
import torch

from conftest import VOCAB, greedy_reference, make_host
from nextn.decoding.engine import Generation
from nextn.evaluation import lossless
from nextn.evaluation.lossless import FLOAT32_BOUND, agreement, check, float32_twin, gaps, near_tie_bound
from nextn.trunk import Trunk

PROMPT = [5, 6, 7, 9]


@pytest.fixture(scope="module")
def text(trained_host) -> list[int]:
    return greedy_reference(trained_host, PROMPT, 12)


def test_the_models_own_text_passes(trained_host, text):
    found = check(Trunk(trained_host), [Generation(PROMPT, text), Generation(PROMPT[:1], [])], FLOAT32_BOUND)
    assert found.holds and (found.tokens, found.near_ties, found.unexplained, found.worst) == (12, 0, 0, 0.0)


@pytest.mark.parametrize("place", [0, 5, 11])
def test_one_wrong_token_is_found(trained_host, text, place):
    wrong = [*text]
    wrong[place] = (wrong[place] + 1) % VOCAB
    # What follows a wrong token is judged by the prefix that holds it, so follow it up properly.
    wrong = wrong[: place + 1] + greedy_reference(trained_host, PROMPT + wrong[: place + 1], 11 - place)
    found = check(Trunk(trained_host), [Generation(PROMPT, wrong)], FLOAT32_BOUND)
    assert not found.holds and found.unexplained == 1
    assert found.worst > FLOAT32_BOUND


def test_a_token_within_the_bound_is_a_near_tie(trained_host, text):
    with torch.no_grad():
        logits = trained_host(torch.tensor([PROMPT])).logits[0, -1].double()
    second = int(logits.topk(2).indices[1])
    gap = float(logits.max() - logits[second])
    for bound, near_ties in ((gap * 1.01, 1), (gap * 0.99, 0)):
        found = check(Trunk(trained_host), [Generation(PROMPT, [second])], bound)
        assert (found.near_ties, found.unexplained) == (near_ties, 1 - near_ties)


def test_the_bound_is_the_largest_move_between_widths(monkeypatch):
    narrow = torch.tensor([[5.0, 4.0, 0, 0, 0, -1.0], [1.0, 3.0, 2.5, 0, 0, 0]])
    wide = torch.tensor([[5.0, 4.25, 0, 0, 0, 9.0], [1.0, 3.5, 2.0, 0, 0, 0]])  # 9.0 is no candidate of the narrow pass
    monkeypatch.setattr(lossless, "_stepwise_logits", lambda _trunk, _text, step: narrow if step == 1 else wide)
    half = Trunk(make_host("llama").bfloat16())
    assert near_tie_bound(half, [[1, 2]], width=4) == 1.0  # 3.0 - 2.5 became 3.5 - 2.0


def test_the_bound_is_a_constant_in_float32_and_the_twin_a_copy(trained_host, text):
    assert near_tie_bound(Trunk(trained_host), [PROMPT + text], width=4) == FLOAT32_BOUND
    half = Trunk(make_host("llama").bfloat16())
    twin = float32_twin(half.model)
    assert twin.dtype == torch.float32 and half.dtype == torch.bfloat16


def test_two_texts_agree_up_to_the_first_near_tie(trained_host, text):
    trunk = Trunk(trained_host)
    ours = [Generation(PROMPT, text)] * 3
    other = [*text[:4], (text[4] + 1) % VOCAB, *text[5:]]
    theirs = [text, other, text[:6]]
    assert agreement(trunk, ours, theirs, FLOAT32_BOUND) == ["identical", "differs", "differs"]
    assert agreement(trunk, ours, theirs, bound=1e6) == ["identical", "near tie", "differs"]


def test_gaps_do_not_depend_on_what_is_read_beside(trained_host, prompts):
    """A slow reference: the whole prefix anew for every token."""
    trunk = Trunk(trained_host)
    emitted = [[5, 9, 3], [7], [4, 4, 4, 4, 8], [60], [11, 12], [13, 14, 15]]
    found = gaps(trunk, [Generation(*pair) for pair in zip(prompts, emitted, strict=True)], rows=4)
    for prompt, tokens, row in zip(prompts, emitted, found, strict=True):
        for place, token in enumerate(tokens):
            with torch.no_grad():
                logits = trained_host(torch.tensor([prompt + tokens[:place]]), use_cache=False).logits[0, -1]
            assert row[place] == pytest.approx(float(logits.max() - logits[token]), abs=1e-4)
        assert len(row) == len(tokens)
