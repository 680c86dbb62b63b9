"""Whatever goes wrong with one text, the others are the plain ones, and the engine goes on."""

from __future__ import annotations

import copy
import itertools
import logging
from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import nextn
from conftest import KINDS, VOCAB, Restless, fit, greedy_reference, made_up_text
from nextn.decoding.building import example
from nextn.decoding.drafting import Drafts, HeadDrafter
from nextn.decoding.engine import Engine, PromptError
from nextn.decoding.pace import Profile
from nextn.decoding.rows import DecodingError
from nextn.decoding.sampling import Sampling
from nextn.decoding.tree import Tree
from nextn.trunk import BLOCK, RaggedCache, Trunk, _Buffer

PROMPTS = [made_up_text(1, length, seed=300 + length)[0].tolist() for length in (1, 3, 8, 14, 21, 30)]
NEW = 14


@pytest.fixture(scope="module")
def model(trained_host):
    config = nextn.MultiTokenConfig(n=4, output={"kind": "trimmed", "size": 52}, **KINDS["recurrent"])
    model = nextn.attach(copy.deepcopy(trained_host), config, calibration={"input_ids": made_up_text(8, 48, seed=999)})
    fit(model.train(), 60)
    return model.eval()


@pytest.fixture(scope="module")
def plain(model) -> list[list[int]]:
    return [greedy_reference(model.base, prompt, NEW) for prompt in PROMPTS]


def check(found: dict, plain: list[list[int]], but: set[int] = frozenset()) -> None:
    for index, text in enumerate(plain):
        if index in but:
            assert found[index].tokens == text[: len(found[index].tokens)]
        else:
            assert found[index].tokens == text and found[index].finish == "length"


def works_still(engine: Engine, plain: list[list[int]]) -> None:
    check(dict(engine.generate(PROMPTS, NEW)), plain)


@pytest.mark.parametrize("tree", [None, Tree(nodes=6)])
def test_an_exception_in_a_users_function_ends_one_text(model, plain, tree):
    engine = model.engine(rows=3, stop_tokens=[], tree=tree)

    def fails_at(index: int, tokens: list[int], _origins: list[int]) -> None:
        if index == 2 and len(seen := streamed.setdefault(index, [])) + len(tokens) > 5:
            raise OSError(f"the pipe is closed after {len(seen)} tokens")
        streamed.setdefault(index, []).extend(tokens)

    streamed: dict[int, list[int]] = {}
    found = dict(engine.generate(PROMPTS, NEW, fails_at))
    check(found, plain, but={2})
    assert found[2].finish == "error" and "pipe is closed" in str(found[2].error)
    works_still(engine, plain)

    def fails_to_stop(index: int, text: list[int]) -> bool:
        if index == 4 and len(text) > len(PROMPTS[4]) + 4:
            raise ZeroDivisionError("a criterion")
        return False

    found = dict(engine.generate(PROMPTS, NEW, stop=fails_to_stop))
    check(found, plain, but={4})
    assert isinstance(found[4].error, ZeroDivisionError) and len(found[4].tokens) <= 5
    works_still(engine, plain)


def test_an_exception_in_a_processor_ends_one_text(model, plain):
    class Rule(tf.LogitsProcessor):
        stateless = True

        def __call__(self, input_ids, scores):
            if input_ids[0, : len(PROMPTS[3])].tolist() == PROMPTS[3] and input_ids.shape[1] > len(PROMPTS[3]) + 6:
                raise KeyError("no such rule")
            return scores.index_fill(1, torch.tensor([5, 7]), -torch.inf)

    alone = model.engine(heads=1, stop_tokens=[])
    ruled = [
        dict(alone.generate([prompt], 7 if place == 3 else NEW, sampling=Sampling(processors=(Rule(),))))[0].tokens
        for place, prompt in enumerate(PROMPTS)
    ]
    for tree in (None, Tree(nodes=6)):
        engine = model.engine(rows=4, stop_tokens=[], tree=tree)
        streamed: dict[int, list[int]] = defaultdict(list)

        def on_tokens(index: int, tokens: list[int], _origins: list[int], streamed=streamed) -> None:
            streamed[index] += tokens

        found = dict(engine.generate(PROMPTS, NEW, on_tokens, sampling=Sampling(processors=(Rule(),))))
        assert [found[index].tokens for index in range(6)] == ruled  # with the rule, up to where it failed
        assert isinstance(found[3].error, KeyError) and streamed[3] == found[3].tokens
        works_still(engine, plain)


def test_a_processor_that_fails_at_a_rejected_draft_ends_nothing(model, plain):
    class Picky(tf.LogitsProcessor):
        """Knows only prefixes of the plain texts."""

        stateless = True

        def __call__(self, input_ids, scores):
            text = input_ids[0].tolist()
            if not any((prompt + answer)[: len(text)] == text for prompt, answer in zip(PROMPTS, plain, strict=True)):
                raise KeyError("no such prefix")
            return scores

    for tree in (None, Tree(nodes=6)):
        engine = model.engine(rows=3, stop_tokens=[], tree=tree)
        check(dict(engine.generate(PROMPTS, NEW, sampling=Sampling(processors=(Picky(),)))), plain)


def test_processors_that_cannot_be_hashed_do_no_harm(model, plain):
    @dataclass
    class Rule(tf.LogitsProcessor):
        stateless = True

        def __call__(self, input_ids, scores):
            return scores

    check(
        dict(model.engine(rows=3, stop_tokens=[]).generate(PROMPTS, NEW, sampling=Sampling(processors=(Rule(),)))),
        plain,
    )


def test_cancelled_texts_end_and_make_room(model, plain):
    engine = model.engine(rows=2, stop_tokens=[])

    def cancel(index: int, _tokens: list[int], _origins: list[int]) -> None:
        if index == 0:
            engine.cancel(1)  # at work
            engine.cancel(5)  # waiting

    found = dict(engine.generate(PROMPTS, NEW, cancel))
    check(found, plain, but={1, 5})
    assert found[1].finish == found[5].finish == "cancelled" and not found[5].tokens
    works_still(engine, plain)


def test_a_generation_that_is_left_behind_says_so(model, plain):
    engine = model.engine(rows=2, stop_tokens=[])
    first = engine.generate(PROMPTS, NEW)
    next(first)
    works_still(engine, plain)
    with pytest.raises(DecodingError, match="began something else"):
        list(first)
    third = engine.generate(PROMPTS, NEW)
    next(third)
    example(engine, 3)  # as compiling does
    with pytest.raises(DecodingError, match="began something else"):
        list(third)
    for index, result in engine.generate(PROMPTS[:1], NEW):  # nothing is left of it: nothing is lost
        works_still(engine, plain)
        assert (index, result.tokens) == (0, plain[0])
    second = engine.generate(PROMPTS, NEW)
    next(second)
    second.close()
    works_still(engine, plain)


def test_what_an_engine_calls_cannot_begin_another_generate_of_it(model, plain):
    engine = model.engine(rows=2, stop_tokens=[])

    def begins_another(index: int, _tokens: list[int], _origins: list[int]) -> None:
        if index == 3:
            list(engine.generate(PROMPTS, NEW))

    found = dict(engine.generate(PROMPTS, NEW, begins_another))
    check(found, plain, but={3})
    assert found[3].finish == "error" and "take another engine" in str(found[3].error)
    works_still(engine, plain)


def test_out_of_memory_at_a_prompt_ends_that_text_only(model, plain, monkeypatch):
    limit, run = 64, Trunk.run

    def with_little_memory(self, input_ids, *args, **kwargs):
        if input_ids.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Trunk, "run", with_little_memory)
    engine = model.engine(rows=6, stop_tokens=[])
    check(dict(engine.generate(PROMPTS, NEW)), plain)  # read one by one
    limit = 24
    engine = model.engine(rows=1, stop_tokens=[])
    check(dict(engine.generate(PROMPTS, NEW)), plain)  # the long one in parts
    limit = 4
    found = dict(engine.generate([PROMPTS[1], [5] * 60], NEW))
    assert found[0].tokens == plain[1]
    assert found[1].finish == "error" and "not enough memory for a prompt of 60 tokens" in str(found[1].error)


def test_texts_without_room_for_their_caches_end_alone(model, plain, monkeypatch):
    make, long = _Buffer.lazy_initialization, made_up_text(1, 100, seed=5)[0].tolist()

    def with_little_memory(self, keys, values):
        if self.slots > 3 * BLOCK // 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        make(self, keys, values)

    monkeypatch.setattr(_Buffer, "lazy_initialization", with_little_memory)
    for rows in (2, 7):  # the long one waits, or takes a slot at once
        engine = model.engine(rows=rows, stop_tokens=[])
        found = dict(engine.generate([*PROMPTS, long], NEW))
        check(found, plain)
        assert found[6].finish == "error" and f"{rows} rows of 114 tokens" in str(found[6].error)
        works_still(engine, plain)
        assert [found.finish for _, found in engine.generate([long, long], NEW)] == ["error", "error"]
        works_still(engine, plain)


@pytest.mark.parametrize("failing", ["trunk", "drafter"])
def test_without_memory_for_longer_texts_they_end(failing, model, plain, monkeypatch, caplog):
    grow, context = RaggedCache.grow, model.trunk.max_length

    def with_little_memory(self, capacity):
        is_trunks = len(self.layers) == model.trunk.cache_layers
        if capacity > 2 * context and is_trunks == (failing == "trunk"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        grow(self, capacity)

    monkeypatch.setattr(RaggedCache, "grow", with_little_memory)
    engine = model.engine(rows=2, stop_tokens=[])
    with caplog.at_level(logging.WARNING):
        results = dict(engine.generate(PROMPTS[:3], [10**6, NEW, 10**6]))
    assert "no memory for texts of more than" in caplog.text
    for index, prompt in enumerate(PROMPTS[:3]):
        assert results[index].finish == "length"
        assert (
            len(results[index].tokens) == NEW or context < len(prompt) + len(results[index].tokens) <= 2 * context + 64
        )
    assert len(results[1].tokens) == NEW
    works_still(engine, plain)


def test_caches_grow_with_texts_that_go_on_past_the_context(model):
    context, new = model.trunk.max_length, 2 * model.trunk.max_length + 9
    engine = model.engine(rows=2, stop_tokens=[])
    results = dict(engine.generate(PROMPTS[:2], new))
    ours = model.engine(heads=1, rows=1, stop_tokens=[])
    for index in range(2):
        ((_, alone),) = ours.generate([PROMPTS[index]], new)
        assert len(results[index].tokens) == new and results[index].tokens == alone.tokens
    assert context < engine.cache.capacity < 4 * context


def test_a_long_limit_takes_no_memory(model):
    engine = model.engine(rows=1, stop_tokens=[])
    stops = {"stop": lambda _index, text: len(text) > 20}
    ((_, result),) = engine.generate([PROMPTS[0]], 10**9, **stops)
    assert result.finish == "stop" and engine.cache.capacity <= model.trunk.max_length + 64


@pytest.mark.parametrize("whose", [0, 1])
def test_kept_texts_are_given_up_where_they_cannot_grow(model, plain, monkeypatch, whose):
    grow, calls, long = RaggedCache.grow, [], made_up_text(1, 100, seed=5)[0].tolist()

    def without_memory(self, capacity):
        calls.append(self)
        if len(calls) == 1 + whose:  # the trunk's, or that of the heads after it
            raise torch.OutOfMemoryError("CUDA out of memory")
        grow(self, capacity)

    engine = model.engine(rows=3, stop_tokens=[], keep=True)
    works_still(engine, plain)
    monkeypatch.setattr(RaggedCache, "grow", without_memory)
    found = dict(engine.generate([*PROMPTS, long], NEW))
    check(found, plain)
    assert found[6].tokens == greedy_reference(model.base, long, NEW) and len(calls) == 1 + whose
    works_still(engine, plain)


def test_no_new_tokens_are_no_tokens(model, plain):
    found = dict(model.engine(rows=2, stop_tokens=[]).generate(PROMPTS, [NEW, 0, NEW, NEW, 0, NEW]))
    assert found[1].tokens == found[4].tokens == [] and found[1].finish == "length"
    assert [found[index].tokens for index in (0, 2, 3, 5)] == [plain[index] for index in (0, 2, 3, 5)]


def test_out_of_memory_in_the_heads_costs_drafts_only(model, plain, monkeypatch):
    propose, calls = HeadDrafter.propose, []

    def fails_at_first(self, hidden, *rest):
        calls.append(hidden.shape)
        if len(calls) < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return propose(self, hidden, *rest)

    monkeypatch.setattr(HeadDrafter, "propose", fails_at_first)
    monkeypatch.setattr(nextn.decoding.engine, "FIRST_LOOK", 2)
    engine = model.engine(rows=3, stop_tokens=[])
    check(dict(engine.generate(PROMPTS, NEW)), plain)
    assert len(calls) > 6 and engine.steps[0] == 3  # the failed one and two more
    monkeypatch.setattr(nextn.decoding.engine, "FIRST_LOOK", 1000)
    calls.clear()
    works_still(engine, plain)
    assert len(calls) == 2 and not engine.steps[3]  # in smaller parts, too, and then no more
    monkeypatch.setattr(HeadDrafter, "propose", propose)
    logits, failed = Trunk.logits, []

    def fails_once(self, hidden):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(self, hidden)

    monkeypatch.setattr(Trunk, "logits", fails_once)
    check(dict(model.engine(rows=3, stop_tokens=[]).generate(PROMPTS, NEW)), plain)


@pytest.mark.parametrize(
    ("tree", "sampling"),
    [(None, Sampling()), (None, Sampling(1.0, method="rejection")), (Tree(nodes=5), Sampling())],
)
def test_out_of_memory_in_verifying_drafts_costs_drafts_only(model, plain, monkeypatch, tree, sampling):
    run = Trunk.run

    def without_memory_for_drafts(self, input_ids, *args, **kwargs):
        if input_ids.shape[1] in (4, 5):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, input_ids, *args, **kwargs)

    prompts = [prompt if len(prompt) > 5 else prompt * 6 for prompt in PROMPTS]
    expected = dict(model.engine(heads=1, stop_tokens=[]).generate(prompts, NEW))
    engine = model.engine(rows=6, stop_tokens=[], tree=tree)
    monkeypatch.setattr(Trunk, "run", without_memory_for_drafts)
    found = dict(engine.generate(prompts, NEW, sampling=sampling))
    assert engine.steps.keys() == {0} and all(each.finish == "length" for each in found.values())
    if not sampling.rejects:
        assert all(found[index].tokens == expected[index].tokens for index in found)
    monkeypatch.undo()
    works_still(engine, plain)


def test_a_draft_that_breaks_the_trunk_is_taken_back(trained_host, plain):
    host = copy.deepcopy(trained_host)
    poison = next(token for token in range(3, 60) if not any(token in text for text in [*PROMPTS, *plain]))
    with torch.no_grad():
        host.get_input_embeddings().weight[poison] = torch.nan

    class Poisoner:
        drafts, tap = 3, "post_norm"

        def begin(self, cache, keep=False) -> None: ...

        def forget(self, row, start=0) -> None: ...

        def propose(self, hidden, positions, following, last, rows, asked) -> Drafts:
            return Drafts(torch.full((len(rows), 3), poison))

    found = dict(Engine(Trunk(host), Poisoner(), rows=3).generate(PROMPTS, NEW))
    check(found, plain)


def break_heads(model) -> None:
    with torch.no_grad():
        next(p for name, p in model.heads.named_parameters() if name.endswith("o_proj.weight")).fill_(torch.nan)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3), Sampling(1.0, method="rejection", seed=3)])
def test_broken_heads_do_not_touch_the_text(trained_host, kind, sampling):
    config = nextn.MultiTokenConfig(n=4, **KINDS[kind])
    model = nextn.attach(copy.deepcopy(trained_host), config)
    break_heads(model)
    for tree in (None, Tree(nodes=5)) if not sampling.rejects else (None,):
        found = dict(model.engine(rows=3, stop_tokens=[], tree=tree).generate(PROMPTS, NEW, sampling=sampling))
        assert all(result.finish == "length" and len(result.tokens) == NEW for result in found.values())
        if not sampling.rejects:
            alone = dict(model.engine(heads=1, stop_tokens=[]).generate(PROMPTS, NEW, sampling=sampling))
            assert [found[i].tokens for i in range(6)] == [alone[i].tokens for i in range(6)]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, method="rejection")])
def test_a_broken_trunk_is_an_error_of_that_text(trained_host, plain, sampling):
    model = nextn.attach(copy.deepcopy(trained_host), nextn.MultiTokenConfig(n=4, **KINDS["recurrent"]))
    poison = next(token for token in range(3, 60) if not any(token in prompt for prompt in PROMPTS))
    seeds = [replace(sampling, seed=place) for place in range(7)]
    alone = dict(model.engine(heads=1, stop_tokens=[]).generate(PROMPTS, NEW, sampling=seeds[:6]))
    whole = [alone[place].tokens for place in range(6)]
    with torch.no_grad():
        model.base.get_input_embeddings().weight[poison] = torch.nan
    broken = [*PROMPTS[:2], [5, poison, 6], *PROMPTS[2:]]
    engine = model.engine(rows=2, stop_tokens=[])
    seeds.insert(2, sampling)
    found = dict(engine.generate(broken, NEW, sampling=seeds[:7]))
    assert found[2].finish == "error" and "not numbers" in str(found[2].error) and not found[2].tokens
    others = [found[index] for index in range(7) if index != 2]
    assert sum(result.error is None for result in others) >= 3
    for place, result in enumerate(others):  # some of them came into the slot of the broken one
        if sampling.rejects:
            assert result.error is None or result.tokens[-1] == poison
        else:
            expected = whole[place]
            end = expected.index(poison) + 1 if poison in expected[:-1] else NEW
            assert result.tokens == expected[:end] and (result.error is None) == (end == NEW)


@pytest.mark.parametrize("rows", [1, 3])
def test_texts_may_end_at_once(model, plain, rows):
    ends = {text[0] for text in plain[:3]}
    engine = model.engine(rows=rows, stop_tokens=ends)
    found = dict(engine.generate(PROMPTS, NEW))
    for index in range(3):
        assert found[index].tokens == plain[index][:1] and found[index].finish == "stop"
    assert dict(engine.generate(PROMPTS, 1))[5].tokens == plain[5][:1]
    assert list(engine.generate([], NEW)) == []
    for wrong, match in (((PROMPTS, -1), "at least 0"), (([[5], []], NEW), "empty"), (([[5, 99]], NEW), "vocabulary"),
                         ((torch.tensor([5, 6]), NEW), "list of prompts"), (("ab", NEW), "list of prompts"),
                         ((PROMPTS, [3]), "one max_new_tokens")):  # fmt: skip
        with pytest.raises(PromptError, match=match):
            engine.generate(*wrong)
    found = dict(engine.generate(PROMPTS, NEW))
    assert found[0].tokens == plain[0][:1]


def test_the_longest_text_may_end_within_a_draft(model, monkeypatch):
    most = model.trunk.max_length
    monkeypatch.setattr(type(model.trunk), "hard_limit", most)
    for left in (1, 2, 3, 5):
        prompts = [made_up_text(1, most - left, seed=1)[0].tolist(), PROMPTS[2]]
        for tree in (None, Tree(nodes=7)):
            found = dict(model.engine(rows=2, stop_tokens=[], tree=tree).generate(prompts, 9))
            assert found[0].tokens == greedy_reference(model.base, prompts[0], left) and found[0].finish == "length"
            assert found[1].tokens == greedy_reference(model.base, prompts[1], 9)


EVENTS = ("cancel", "drop", "raise", "stop", "process", "poison")
DRAWN = Sampling(temperature=1.1, top_k=30, repetition_penalty=1.2)
WAYS = {"greedy": Sampling(), "drawn": DRAWN, "rejection": replace(DRAWN, method="rejection")}


class Fails(tf.LogitsProcessor):
    """Lets nothing pass that is longer."""

    stateless = True

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            raise KeyError("too long")
        return scores


def forgetful(function, every: int):
    """There is no memory every so many calls."""
    calls = itertools.count(1)

    def with_little_memory(*args, **kwargs):
        if next(calls) % every == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return function(*args, **kwargs)

    return with_little_memory


def broken(propose, after: int):
    """The drafter reads states that are not numbers, once; they stay in its caches."""
    calls = itertools.count(1)
    return lambda hidden, *rest: propose(hidden * (torch.nan if next(calls) == after else 1), *rest)


@dataclass
class World:
    """A model, prompts, what the trunk alone makes of them in two ways, and a token that breaks the trunk."""

    model: nextn.MultiTokenModel
    prompts: list[list[int]]
    texts: dict[str, list[list[int]]]
    poison: int


@pytest.fixture(scope="module", params=["recurrent", "distinct"])
def world(request, trained_host) -> World:
    config = nextn.MultiTokenConfig(n=4, output={"kind": "trimmed", "size": 52}, **KINDS[request.param])
    calibration = {"input_ids": made_up_text(8, 48, seed=999)}
    model = nextn.attach(copy.deepcopy(trained_host), config, calibration=calibration)
    fit(model.train(), 60)
    prompts = [*PROMPTS, made_up_text(1, model.eval().trunk.max_length - 5, seed=306)[0].tolist()]
    texts = {}
    for way in ("greedy", "drawn"):
        seeds = [replace(WAYS[way], seed=each) for each in range(len(prompts))]
        found = dict(model.engine(heads=1, stop_tokens=[]).generate(prompts, NEW, sampling=seeds))
        texts[way] = [found[each].tokens for each in range(len(prompts))]
    assert texts["greedy"][3] == greedy_reference(model.base, prompts[3], NEW)
    known = {token for text in [*prompts, *texts["greedy"], *texts["drawn"]] for token in text}
    poison = next(token for token in range(3, VOCAB) if token not in known)
    with torch.no_grad():
        model.base.get_input_embeddings().weight[poison] = torch.nan
    return World(model, prompts, texts, poison)


@settings(max_examples=60)
@given(data=st.data())
def test_any_schedule_leaves_the_plain_texts(world, data):
    run_schedule(world, data)


@pytest.mark.slow
@settings(max_examples=1500)
@given(data=st.data())
def test_thousands_of_schedules_leave_the_plain_texts(world, data):
    run_schedule(world, data)


def run_schedule(world: World, data) -> None:
    """Rows, drafts, trees, chunks, plain steps in between, kept texts, and mishaps at random."""
    order = data.draw(st.lists(st.integers(0, len(world.prompts) - 1), min_size=1, max_size=7), label="prompts")
    limits = [data.draw(st.integers(0, NEW)) for _ in order]
    mishaps = {
        place: (data.draw(st.sampled_from(EVENTS)), data.draw(st.integers(1, NEW)))
        for place in data.draw(st.sets(st.integers(0, len(order) - 1), max_size=2))
    }
    way = data.draw(st.sampled_from(list(WAYS)), label="way")
    trees = [None, None, Tree(nodes=5, beam=2), Tree(((0,), (1,), (0, 0)))] if way != "rejection" else [None]
    tree = data.draw(st.sampled_from(trees), label="tree")
    ends = data.draw(st.sampled_from([[], [world.texts["greedy"][2][3]]]), label="stop tokens")
    engine = world.model.engine(
        rows=data.draw(st.integers(1, 4), label="rows"),
        stop_tokens=ends,
        depth=data.draw(st.sampled_from([None, "auto"] if tree else [None, "auto", 1, 2]), label="depth"),
        tree=tree,
        keep=data.draw(st.booleans(), label="keep"),
        chunk=data.draw(st.sampled_from([1024, 7]), label="chunk"),
    )
    engine.overlaps = data.draw(st.booleans(), label="drafts begun ahead")
    restless(engine, data)
    with_faults(engine, data)
    emitted: dict[int, int] = {}

    def on_tokens(index: int, tokens: list[int], _origins: list[int]) -> None:
        emitted[index] = emitted.get(index, 0) + len(tokens)
        what, after = mishaps.get(index, ("", 0))
        if emitted[index] >= after:
            if what == "raise":
                raise RuntimeError("mishap")
            if what == "cancel":
                engine.cancel(index)

    def stop(index: int, text: list[int]) -> bool:
        what, after = mishaps.get(index, ("", 0))
        return what == "stop" and len(text) - len(prompts[index]) >= after

    prompts = [world.prompts[each] for each in order]
    sampling = [replace(WAYS[way], seed=each) for each in order]
    for place, (what, after) in mishaps.items():
        if what == "process":
            fails = Fails(len(prompts[place]) + after)
            sampling[place] = replace(sampling[place], processors=(fails,))
        if what == "poison":
            prompts[place] = [*prompts[place][:after], world.poison, *prompts[place][after:-1]]
    for _ in range(2):  # the second time on what the first one left behind
        emitted.clear()
        found = {}
        for index, result in engine.generate(prompts, limits, on_tokens, stop=stop, sampling=sampling):
            found[index] = result
            for other, (what, _) in mishaps.items():
                if what == "drop":
                    engine.cancel(other)
        assert len(found) == len(order)
        for index, each in enumerate(order):
            if way == "rejection":  # these texts are draws, see test_sampling.py
                check_shape(found[index], limits[index])
            else:
                expected = until(world.texts[way][each][: limits[index]], ends)
                check_mishap(found[index], expected, *mishaps.get(index, ("", 0)))


def restless(engine: Engine, data) -> None:
    """Steps by a plan that is drawn, where the engine may choose."""
    on_tree = 1.0 if engine.tree else None
    pace = Restless(3, Profile(dict.fromkeys(range(4), 1.0), on_tree), on_tree)
    pace.plan = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6), label="pace")
    engine.paces = dict.fromkeys(range(1, 5), pace)


def with_faults(engine: Engine, data) -> None:
    """Too little memory at prompts or for the heads, or heads that break."""
    if every := data.draw(st.sampled_from([0, 0, 2, 5]), label="without memory for the heads"):
        engine.drafter.propose = forgetful(engine.drafter.propose, every)
    if after := data.draw(st.sampled_from([0, 0, 1, 3]), label="heads that break"):
        engine.drafter.propose = broken(engine.drafter.propose, after)
    if every := data.draw(st.sampled_from([0, 0, 0, 2, 3]), label="without memory for prompts"):
        engine.trunk = copy.copy(engine.trunk)
        engine.trunk.run = forgetful(engine.trunk.run, every)


def until(text: list[int], ends: list[int]) -> list[int]:
    """Up to and with the first of some tokens."""
    return next((text[: place + 1] for place, token in enumerate(text) if token in ends), text)


def check_mishap(result, expected: list[int], what: str, after: int) -> None:
    """A text is the plain one, up to where something happened to it."""
    check_shape(result, len(expected))
    if isinstance(result.error, DecodingError):
        assert not result.tokens
        assert "not enough memory for a prompt" in str(result.error) or what == "poison"
    elif what in ("raise", "cancel", "drop"):
        assert result.tokens == expected[: len(result.tokens)]
        assert what == "drop" or len(result.tokens) >= min(after, len(expected))
        assert what != "drop" or result.finish in ("cancelled", "length", "stop")
    elif what == "poison":
        assert not expected
    else:
        assert result.tokens == (expected[:after] if what else expected)
    if what == "process" and not isinstance(result.error, DecodingError):
        assert isinstance(result.error, KeyError) == (after < len(expected))


def check_shape(result, limit: int) -> None:
    assert result.finish and len(result.tokens) <= limit
    assert (result.finish == "error") == (result.error is not None)
    assert len(result.origins) == len(result.tokens)
    assert all(a <= d for a, d in zip(result.accepted, result.drafted, strict=True))
