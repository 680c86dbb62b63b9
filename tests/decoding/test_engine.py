"""The loop gives the plain text whatever the drafter says, and the drafts do not depend on what was rejected."""

from __future__ import annotations

import logging
from itertools import zip_longest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import VOCAB, Restless, greedy_reference, make_longrope_host
from nextn.decoding.drafting import BEST, Drafts, HeadDrafter
from nextn.decoding.engine import Engine, PromptError, warn_once
from nextn.decoding.pace import Profile
from nextn.heads.base import Window
from nextn.trunk import RaggedCache, Trunk


class ScriptedDrafter:
    """Knows the plain text and drafts its continuation, wrong from the draft on that `wrong_from` names."""

    tap = "post_norm"

    def __init__(self, texts: list[list[int]], drafts: int, wrong_from) -> None:
        self.texts, self.drafts, self.wrong_from = texts, drafts, wrong_from
        self.calls = 0

    def begin(self, cache, keep=False) -> None:
        self.text_of: dict[int, list[int]] = {}

    def forget(self, row, start=0) -> None:
        pass

    def propose(self, hidden, positions, following, last, rows, asked=None):
        proposals = torch.zeros(len(rows), self.drafts, dtype=torch.long)
        for place, (row, newest) in enumerate(zip(rows.tolist(), last.tolist(), strict=True)):
            pending_at = int(positions[place, newest]) + 1
            if pending_at <= 0:
                continue  # a free row
            if int(positions[place, 0]) == 0:  # a prefill: find out whose row this is
                length = newest + 1
                prefix = following[place, : length - 1].tolist()
                self.text_of[row] = next(text for text in self.texts if text[1:length] == prefix)
            text = self.text_of[row] + [3] * self.drafts
            draft = torch.tensor(text[pending_at + 1 : pending_at + 1 + self.drafts])
            wrong = self.wrong_from(self.calls)
            draft[wrong:] = (draft[wrong:] + 1) % VOCAB
            proposals[place, : len(draft)] = draft
        self.calls += 1
        return Drafts(proposals)


def texts_of(results) -> list[list[int]]:
    return [generation.tokens for _, generation in sorted(results, key=lambda item: item[0])]


SCRIPTS = {
    "oracle": lambda call: 3,
    "always wrong": lambda call: 0,
    "right until the last": lambda call: 2,
    "changing": lambda call: (call * 7) % 4,
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("script", SCRIPTS)
def test_any_drafter_gives_the_plain_text(trained_host, prompts, script, rows):
    expected = [greedy_reference(trained_host, prompt, 20) for prompt in prompts]
    texts = [prompt + text for prompt, text in zip(prompts, expected, strict=True)]
    engine = Engine(Trunk(trained_host), ScriptedDrafter(texts, 3, SCRIPTS[script]), rows)
    results = list(engine.generate(prompts, 20))
    assert texts_of(results) == expected
    accepted = [count for _, result in results for count in result.accepted]
    if script == "oracle":
        assert accepted and set(accepted) == {3}
    if script == "always wrong":
        assert set(accepted) == {0}


def test_stepwise_comes_back_after_each_step(trained_model, prompts):
    one, other = (trained_model.engine(rows=2, heads=heads, stop_tokens=[]) for heads in (None, 1))
    expected = texts_of(other.generate(prompts, 12))
    emitted: list[int] = []
    runs = (
        one.stepwise(prompts, 12, lambda _index, tokens, _origins: emitted.append(len(tokens))),
        other.stepwise(prompts, 12),
    )
    found: tuple[list, list] = ([], [])
    for finished in zip_longest(*runs, fillvalue=()):  # two engines in turns
        assert len(emitted) <= 2  # one step of two rows
        emitted.clear()
        for all_of_it, results in zip(found, finished, strict=True):
            all_of_it.extend(results)
    assert texts_of(found[0]) == texts_of(found[1]) == expected


def test_between_steps_a_text_can_be_cancelled(trained_model, prompts):
    engine = trained_model.engine(rows=1, heads=1, stop_tokens=[])
    run, found = engine.stepwise(prompts[:2], 12), {}
    for steps, finished in enumerate(run):
        found.update(finished)
        if steps == 3:  # the first token, and three steps
            engine.cancel(0)
            engine.cancel(1)
    assert [len(found[index].tokens) for index in (0, 1)] == [4, 0]
    assert {each.finish for each in found.values()} == {"cancelled"}


@pytest.mark.parametrize(("rows", "depth"), [(1, None), (2, None), (4, None), (2, 1)])
def test_heads_give_the_plain_text_whatever_the_rows(trained_model, prompts, rows, depth):
    expected = [greedy_reference(trained_model.base, prompt, 24) for prompt in prompts]
    drafter = Watcher(trained_model.trunk, trained_model.heads)
    results = list(Engine(trained_model.trunk, drafter, rows, depth=depth).generate(prompts, 24))
    assert texts_of(results) == expected
    texts = [prompt + text for prompt, text in zip(prompts, expected, strict=True)]
    # Drafts of a row do not depend on its neighbours, nor on who had its slot before.
    assert drafted_as_from_scratch(trained_model, texts, drafter.seen) > 10
    accepted = [count for _, result in results for count in result.accepted]
    assert len(set(accepted)) > 1, "the heads should be right at times, not always"


@pytest.mark.parametrize(("rows", "keep"), [(1, False), (3, False), (3, True)])
def test_heads_that_catch_up_draft_as_if_they_had_always_been_there(trained_model, prompts, rows, keep):
    drafter = Watcher(trained_model.trunk, trained_model.heads)
    engine = Engine(trained_model.trunk, drafter, rows, depth="auto", keep=keep)
    for _ in range(1 + keep):
        for count in range(1, rows + 1):
            engine.paces[count] = Restless(3, Profile(dict.fromkeys(range(4), 1.0)))
            engine.paces[count].plan = (3, 0, 0, 0, 1, 0)
        expected = [greedy_reference(trained_model.base, prompt, 24) for prompt in prompts]
        assert texts_of(engine.generate(prompts, 24)) == expected
        assert engine.steps[0] > engine.steps[3] > 0 < engine.steps[1]
        texts = [prompt + text for prompt, text in zip(prompts, expected, strict=True)]
        assert drafted_as_from_scratch(trained_model, texts, drafter.seen) > 10
        drafter.seen.clear()
        prompts = [[*text[:-5], 7] for text in texts]  # goes on from a plain step, or from drafts


@pytest.mark.parametrize(("rows", "depth"), [(1, None), (3, None), (3, 1)])
def test_drafts_that_begin_ahead_are_the_same(trained_model, prompts, rows, depth, monkeypatch):
    """As on a GPU, where the next drafts begin before it is known what a step brought."""

    def run(overlaps: bool) -> tuple[list, dict[int, int], int]:
        drafter = HeadDrafter(trained_model.trunk, trained_model.heads)
        propose, rounds = drafter.propose, []
        monkeypatch.setattr(drafter, "propose", lambda *given: rounds.append(1) or propose(*given))
        engine = Engine(trained_model.trunk, drafter, rows, depth=depth)
        engine.overlaps = overlaps
        results = sorted(engine.generate(prompts, 24), key=lambda item: item[0])
        return [(each.tokens, each.accepted) for _, each in results], dict(engine.steps), len(rounds)

    (ahead, steps, rounds), (waited, same_steps, fewest) = run(True), run(False)
    assert (ahead, steps) == (waited, same_steps)
    # What a text's last step was followed by is for nothing, and so is what stood when another text took a slot.
    assert rounds <= fewest + 2 * len(prompts)
    assert (rounds > fewest) == (not trained_model.heads.lookback)


@torch.inference_mode()
def drafted_as_from_scratch(model, texts: list[list[int]], seen: list[tuple[list[int], list[int]]]) -> int:
    """Asserts that a `Watcher` saw what heads propose that meet a text for the first time; how often it looked."""
    compared = 0
    for prefix, drafts in seen[:: max(1, len(seen) // 25)]:
        text = next(text for text in texts if text[1 : len(prefix)] == prefix[1 : len(text)])
        if len(prefix) <= len(text):  # else the row has ended within this step
            assert drafts == drafts_from_scratch(model, text[: len(prefix)])[: len(drafts)]
            compared += 1
    return compared


def drafts_from_scratch(model, prefix: list[int]) -> list[int]:
    """What the heads propose when they see a prefix whose last token is the pending one for the first time."""
    trunk, heads = model.trunk, model.heads
    ids = torch.tensor([prefix[:-1]])
    positions = torch.arange(ids.shape[1])[None]
    cache = RaggedCache(len(trunk.layers), 1, 256)
    _, tapped = trunk.run(ids, positions, cache.place(positions), cache, heads.tap)
    window = Window(tapped, positions, torch.tensor([prefix[1:]]), torch.tensor([len(prefix) - 2]))
    caches = [RaggedCache(1, 1, 256) for _ in range(heads.cache_count)]
    return heads.draft(trunk, window, caches, None)[0].tolist()


class Watcher(HeadDrafter):
    """Drafts as heads do and notes, for every row, the text so far (pending token included) and its drafts."""

    def begin(self, cache, keep=False) -> None:
        super().begin(cache, keep)
        if keep:
            return
        self.texts: list[list[int]] = [[] for _ in range(cache.rows)]
        self.seen: list[tuple[list[int], list[int]]] = []

    def propose(self, hidden, positions, following, last, rows, asked=BEST):
        drafts = super().propose(hidden, positions, following, last, rows, asked)
        for place, row in enumerate(rows.tolist()):
            newest, first = int(last[place]), int(positions[place, 0])
            if int(positions[place, newest]) < 0:
                continue  # a free row
            if first == 0:
                self.texts[row] = [-1]  # the first token is in no `following`
            self.texts[row] = self.texts[row][: first + 1] + following[place, : newest + 1].tolist()
            self.seen.append((list(self.texts[row]), drafts.tokens[place].tolist()))
        return drafts


class Recorder(HeadDrafter):
    """Drafts as heads do, but hands out its proposals spoilt, so that every pattern of acceptance comes up."""

    def __init__(self, trunk, heads, text: list[int], spoil) -> None:
        super().__init__(trunk, heads)
        self.text, self.spoil, self.seen = text, spoil, []

    def propose(self, hidden, positions, following, last, rows, asked=BEST):
        drafts = super().propose(hidden, positions, following, last, rows, asked).tokens
        pending_at = int(positions[0, last[0]]) + 1
        self.seen.append((pending_at, drafts[0].tolist()))
        continuation = (self.text + [3] * 8)[pending_at + 1 : pending_at + 4]
        keep = next(self.spoil)
        handed = torch.tensor([continuation])
        handed[0, keep:] = (handed[0, keep:] + 1) % VOCAB
        return Drafts(handed)


@settings(max_examples=15)
@given(pattern=st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_drafts_after_any_acceptance_equal_those_from_scratch(trained_model, pattern):
    prompt = [5, 6, 7, 9, 10, 11, 12]
    text = prompt + greedy_reference(trained_model.base, prompt, 24)
    spoil = iter(pattern + [0] * 40)
    with torch.inference_mode():
        drafter = Recorder(trained_model.trunk, trained_model.heads, text, spoil)
        ((_, result),) = Engine(trained_model.trunk, drafter).generate([prompt], 24)
        assert prompt + result.tokens == text
        for pending_at, drafts in drafter.seen:
            if pending_at < len(text):
                assert drafts == drafts_from_scratch(trained_model, text[: pending_at + 1])


def test_stop_tokens_end_a_text_inside_an_accepted_run(trained_host, prompts):
    prompt = prompts[3]
    text = greedy_reference(trained_host, prompt, 20)
    fresh = [place for place in range(2, 12) if text[place] not in text[:place]]
    assert len(fresh) > 2
    for place in fresh:
        stops = {text[place], 1}
        drafter = ScriptedDrafter([prompt + text], 3, SCRIPTS["oracle"])
        streamed: list[int] = []
        engine = Engine(Trunk(trained_host), drafter, stop_tokens=stops)
        ((_, result),) = engine.generate(
            [prompt], 20, lambda _row, tokens, _origins, into=streamed: into.extend(tokens)
        )
        assert result.tokens == streamed == text[: place + 1]
        assert result.finish == "stop"


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 9])
def test_length_limits_are_exact(trained_model, prompts, new):
    results = trained_model.engine(rows=3, stop_tokens=[]).generate(prompts, new)
    for index, result in results:
        assert result.tokens == greedy_reference(trained_model.base, prompts[index], new)
        assert len(result.origins) == new and result.finish == "length"


def test_a_text_goes_on_past_the_context_with_one_warning(trained_model, caplog):
    warn_once.cache_clear()
    context = trained_model.trunk.max_length
    prompts = [[3 + place % 50 for place in range(context - left)] for left in (6, 40)]
    engine = trained_model.engine(rows=2, stop_tokens=[], depth=None)
    with caplog.at_level(logging.WARNING):
        found = dict(engine.generate(prompts, 6))
        assert "context" not in caplog.text  # the context is full
        for _ in range(2):
            found = dict(engine.generate([*prompts, [3] * (context + 9)], 50))
    for index, prompt in enumerate([*prompts, [3] * (context + 9)]):
        theirs = trained_model.base.generate(
            torch.tensor([prompt]), max_new_tokens=50, do_sample=False, eos_token_id=None
        )
        assert found[index].tokens == theirs[0, len(prompt) :].tolist()
    assert caplog.text.count(f"context of {context} tokens") == 1


def test_texts_end_where_longrope_would_change_what_was_read(caplog):
    warn_once.cache_clear()
    host = make_longrope_host()
    engine = Engine(Trunk(host), None, rows=2)
    with caplog.at_level(logging.WARNING):
        found = dict(engine.generate([[5] * 60, [6] * 9], 20))
    assert [len(found[index].tokens) for index in range(2)] == [4, 20] and found[0].finish == "length"
    assert caplog.text.count("end at 64 tokens") == 1
    with pytest.raises(PromptError, match="64 at most, which leaves no room"):
        list(engine.generate([[5] * 64], 1))


def test_an_empty_prompt_is_refused(trained_model):
    with pytest.raises(PromptError, match="empty"):
        list(trained_model.engine().generate([[]], 5))
