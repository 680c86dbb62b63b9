"""transformers' generate with the engine's step: the same answers to the same calls."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as tf
from transformers.cache_utils import DynamicCache

import nextn
from conftest import CONFIGS, greedy_reference, made_up_text, make_host, make_tokenizer
from nextn.decoding.generate import CACHE_NAME, GenerateError

IDS = made_up_text(1, 12, seed=21)
OURS = {"custom_generate": nextn.custom_generate}


def padded(prompts: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        where = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


GREEDY = {
    "plain": {},
    "config": {"generation_config": tf.GenerationConfig(max_new_tokens=14, repetition_penalty=1.4, eos_token_id=2)},
    "bad words": {"bad_words_ids": [[7], [9, 10]], "no_repeat_ngram_size": 3},
    "least": {"min_new_tokens": 9, "eos_token_id": [33, 40, 50]},
    "begin": {"begin_suppress_tokens": [5, 6, 7], "suppress_tokens": [20, 21]},
    "forced end": {"forced_eos_token_id": 2},
    "decay": {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 40},
    "own": {"logits_processor": tf.LogitsProcessorList([tf.SequenceBiasLogitsProcessor([[[12], 5.0]])])},
}  # fmt: skip


@pytest.mark.parametrize("name", GREEDY)
def test_a_stock_model_gives_the_stock_text(trained_model, name):
    asked = {"max_new_tokens": 14, "do_sample": False} | GREEDY[name]
    theirs = trained_model.base.generate(IDS, **asked)
    assert torch.equal(trained_model.base.generate(IDS, heads=trained_model, **OURS, **asked), theirs)
    assert torch.equal(trained_model.generate(IDS, **asked), theirs)


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_as_one_by_one(trained_model, prompts, side, name):
    prompts = [prompt for prompt in prompts if len(prompt) > 1]
    asked = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0} | GREEDY[name]
    together = trained_model.generate(**padded(prompts, side), **asked)
    width = max(map(len, prompts))
    for row, prompt in enumerate(prompts):
        alone = trained_model.base.generate(torch.tensor([prompt]), **asked)[0, len(prompt) :].tolist()
        assert together[row, width:].tolist()[: len(alone)] == alone
        assert not any(together[row, width + len(alone) :].tolist())


def test_the_output_has_what_transformers_output_has(trained_model):
    asked = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_scores": True,
             "output_logits": True, "repetition_penalty": 1.3}  # fmt: skip
    theirs, ours = trained_model.base.generate(IDS, **asked), trained_model.generate(IDS, **asked)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        assert len(ours[name]) == 10
        for mine, their in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(mine, their, rtol=1e-3, atol=1e-3)
    ours = trained_model.base.compute_transition_scores(ours.sequences, ours.scores, normalize_logits=True)
    theirs = trained_model.base.compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


DETAILS = {"return_dict_in_generate": True, "output_scores": True}


class EndsAfter(tf.StoppingCriteria):
    """Ends a text with the first token of a kind."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.texts.append(input_ids[0].tolist())
        return torch.tensor([int(input_ids[0, -1]) % 7 == 0])


def test_stopping_criteria_end_a_text_at_the_very_token(trained_model):
    theirs, ours = EndsAfter(), EndsAfter()
    expected = trained_model.base.generate(IDS, max_new_tokens=40, do_sample=False, stopping_criteria=[theirs])
    given = trained_model.generate(IDS, max_new_tokens=40, do_sample=False, stopping_criteria=[ours])
    assert torch.equal(given, expected) and given.shape[1] < IDS.shape[1] + 40
    assert ours.texts == theirs.texts  # once a token, in order

    tokenizer = make_tokenizer()
    text = tokenizer.decode(trained_model.base.generate(IDS, max_new_tokens=30, do_sample=False)[0, IDS.shape[1] :])
    asked = {"max_new_tokens": 30, "do_sample": False, "stop_strings": [text[9:11]], "tokenizer": tokenizer}
    expected = trained_model.base.generate(IDS, **asked)
    assert torch.equal(trained_model.generate(IDS, **asked), expected)
    asked = {"max_new_tokens": 30, "do_sample": False, "stopping_criteria": [tf.MaxLengthCriteria(17)]}
    assert torch.equal(trained_model.generate(IDS, **asked), trained_model.base.generate(IDS, **asked))


class StopsTheBatch(tf.StoppingCriteria):
    """Keeps a flag for each row and counts from the padded prompt, as lm-eval's do; ends all rows together."""

    def __init__(self, rows: int, prompt: int) -> None:
        self.done, self.prompt, self.seen = [False] * rows, prompt, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.tolist())
        new = input_ids[:, self.prompt :].tolist()
        for row, done in enumerate(self.done):
            self.done[row] = done or any(token % 7 == 0 for token in new[row])
        return all(self.done)


class StopsRows(StopsTheBatch):
    """Ends each row by its own flag, and remembers how often it was asked."""

    def __call__(self, input_ids, scores, **kwargs):
        super().__call__(input_ids, scores)
        return torch.tensor(self.done)


@pytest.mark.parametrize("criterion", [StopsTheBatch, StopsRows])
@pytest.mark.parametrize("ends", [[2], [11, 12, 13, 40, 41]])
def test_criteria_see_the_whole_batch_column_by_column(trained_model, prompts, criterion, ends):
    given = padded(prompts, "left")
    asked = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, "eos_token_id": ends}
    theirs, ours = (criterion(len(prompts), 30) for _ in range(2))
    expected = trained_model.base.generate(**given, **asked, stopping_criteria=[theirs])
    for _ in range(2):
        out = trained_model.generate(**given, **asked, stopping_criteria=[ours], **DETAILS)
        assert torch.equal(out.sequences, expected)
        assert len(out.scores) == expected.shape[1] - 30
        assert ours.seen == theirs.seen
        ours = criterion(len(prompts), 30)
    assert not torch.equal(expected, trained_model.base.generate(**given, **asked))


def test_a_batch_that_criteria_cut_goes_on_from_its_cache(trained_model, prompts):
    turns = [prompts[3], prompts[4]]
    asked = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, **DETAILS}
    first = trained_model.generate(**padded(turns, "left"), **asked, stopping_criteria=[StopsRows(2, 30)])
    again = {"input_ids": first.sequences, "attention_mask": (first.sequences != 0).long()}
    second = trained_model.generate(**again, **asked, cache=first[CACHE_NAME])
    assert torch.equal(second.sequences, trained_model.generate(**again, **asked).sequences)


def test_an_error_in_a_criterion_of_the_batch_leaves_the_engine_usable(trained_model, prompts):
    def fails(input_ids, scores, **kwargs):
        raise BrokenPipeError("nobody listens")

    given, asked = padded(prompts[3:5], "left"), {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    first = trained_model.generate(**given, **asked, **DETAILS)
    with pytest.raises(BrokenPipeError, match="nobody"):
        trained_model.generate(**given, **asked, stopping_criteria=[fails], cache=first[CACHE_NAME], **DETAILS)
    again = trained_model.generate(**given, **asked, cache=first[CACHE_NAME], **DETAILS)
    assert torch.equal(again.sequences, first.sequences)


def test_criteria_of_one_padded_prompt_see_its_padding(trained_model):
    theirs, ours = StopsTheBatch(1, 17), StopsTheBatch(1, 17)
    given = {"input_ids": torch.nn.functional.pad(IDS, (5, 0)), "attention_mask": torch.ones(1, 17, dtype=torch.long)}
    given["attention_mask"][:, :5] = 0
    expected = trained_model.base.generate(**given, max_new_tokens=25, do_sample=False, stopping_criteria=[theirs])
    assert torch.equal(
        trained_model.generate(**given, max_new_tokens=25, do_sample=False, stopping_criteria=[ours]), expected
    )
    assert ours.seen == theirs.seen and expected.shape[1] < 17 + 25


class Brackets(tf.LogitsProcessor):
    """A grammar of nested brackets that follows each row by the newest token at each call, as JSON schemas do.

    Even tokens open, odd ones close, up to three deep. Each token must be shown to it once, and no other.
    """

    def __init__(self) -> None:
        self.depths: list[int] | None = None

    def __call__(self, input_ids, scores):
        if self.depths is None:
            self.depths = [0] * len(input_ids)
        else:
            self.depths = [d + (-1 if row[-1] % 2 else 1) for d, row in zip(self.depths, input_ids, strict=True)]
        even = torch.arange(scores.shape[1]) % 2 == 0
        closed, deepest = (torch.tensor([depth in some for depth in self.depths]) for some in ({0}, {3}))
        return scores.masked_fill((closed[:, None] & ~even) | (deepest[:, None] & even), -torch.inf)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_grammar_does_not_advance_on_rejected_drafts(trained_model, prompts, rows):
    given = padded(prompts[3 : 3 + rows], "left")
    asked = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    theirs = trained_model.base.generate(**given, **asked, logits_processor=[Brackets()])
    ours = trained_model.generate(**given, **asked, logits_processor=[Brackets()], depth=None)
    assert torch.equal(ours, theirs) and not torch.equal(ours, trained_model.generate(**given, **asked))


def test_streamers_see_every_token(trained_model):
    tokenizer = make_tokenizer()
    stock = {"heads": trained_model} | OURS
    for generate, name, ours in (
        (trained_model.generate, "streamer", {}),
        (trained_model.base.generate, "streamer", stock),
        (trained_model.base.generate, "token_streamer", stock),
    ):
        for skip_prompt in (True, False):
            streamer = tf.TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, timeout=60)
            given = generate(IDS, max_new_tokens=12, **{name: streamer}, **ours)
            assert "".join(streamer) == tokenizer.decode(given[0, IDS.shape[1] * skip_prompt :])


def test_a_stock_call_through_a_subclass_streams_too(trained_model):
    """Classes of transformers override `generate`, so the frame that has the streamer is not always the nearest."""

    class Wrapped(type(trained_model.base)):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    streamer = tf.TextIteratorStreamer(make_tokenizer(), skip_prompt=True, timeout=60)
    base, trained_model.base.__class__ = trained_model.base.__class__, Wrapped
    try:
        trained_model.base.generate(IDS, max_new_tokens=12, heads=trained_model, streamer=streamer, **OURS)
    finally:
        trained_model.base.__class__ = base
    assert len("".join(streamer)) == 12


class Failing(tf.generation.streamers.BaseStreamer):
    def put(self, value) -> None:
        if value.numel() == 1:
            raise BrokenPipeError("nobody listens")

    def end(self) -> None:
        pass


def test_what_goes_wrong_in_a_streamer_is_raised(trained_model):
    with pytest.raises(BrokenPipeError, match="nobody"):
        trained_model.generate(IDS, max_new_tokens=12, streamer=Failing())


def test_seeds_give_the_same_text_with_heads_and_without(trained_model):
    asked = {"max_new_tokens": 30, "do_sample": True, "temperature": 1.1, "top_k": 12, "top_p": 0.95}
    ids = IDS.expand(3, -1)
    with_heads = trained_model.generate(ids, seed=5, **asked)
    assert torch.equal(with_heads, trained_model.generate(ids, seed=5, heads=1, **asked))
    assert torch.equal(with_heads[:1], trained_model.generate(IDS, seed=5, **asked))
    warm = [trained_model.generate(ids, seed=seed, do_sample=True, temperature=3.0) for seed in (5, 6, 7)]
    assert len({tuple(text) for texts in warm for text in texts.tolist()}) == 9
    torch.manual_seed(3)
    first = trained_model.generate(IDS, **asked)
    torch.manual_seed(3)
    assert torch.equal(trained_model.generate(IDS, **asked), first)
    several = trained_model.generate(IDS, num_return_sequences=3, seed=5, **asked)
    assert torch.equal(several, with_heads)
    asked |= {"seed": 5, "sampling_method": "rejection", "depth": None}
    assert torch.equal(trained_model.generate(IDS, **asked), trained_model.generate(IDS, **asked))


@pytest.mark.parametrize("heads, name", [(None, "cache"), (1, "past_key_values"), (None, "past_key_values")])
def test_a_turn_on_the_cache_of_the_last_gives_the_text_from_scratch(trained_model, prompts, heads, name, monkeypatch):
    turns = [prompts[2] + prompts[3], prompts[4]]
    given = padded(turns, "left")
    kept = None
    read: list[int] = []
    run = type(trained_model.trunk).run

    def counting(self, input_ids, *args, **kwargs):
        read.append(input_ids.shape[1])
        return run(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(trained_model.trunk), "run", counting)
    for turn in range(3):
        out = trained_model.generate(
            **given, max_new_tokens=9, pad_token_id=0, heads=heads, return_dict_in_generate=True,
            **{name: kept},
        )  # fmt: skip
        kept = out[CACHE_NAME]
        for row, text in enumerate(turns):
            assert out.sequences[row, -9:].tolist() == greedy_reference(trained_model.base, text, 9)
        if turn:  # of a turn only what is new is read, and what heads must see again
            assert read[0] <= 9 + 4 + 6
        read.clear()
        turns = [
            text + out.sequences[row, -9:].tolist() + [11, 12, 13, 14][: 2 + turn] for row, text in enumerate(turns)
        ]
        if turn == 1:  # one user takes back what was said, the other tells something else
            turns = [[*turns[0][:20], 30, 31], [*turns[1][:3], 40, 41, 42]]
        given = padded(turns, "left")


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("sampling", [nextn.Sampling(), nextn.Sampling(temperature=1.0, seed=3)])
def test_turns_go_on_from_what_was_kept_on_every_family(family, sampling):
    model = nextn.attach(make_host(family), nextn.MultiTokenConfig(n=3, heads="sequential"))
    kept, again = (model.engine(rows=2, stop_tokens=[], keep=keep) for keep in (True, False))
    turns = made_up_text(2, 20, seed=8).tolist()
    for _ in range(3):
        found, afresh = (dict(engine.generate(turns, 7, sampling=sampling)) for engine in (kept, again))
        assert [found[row].tokens for row in range(2)] == [afresh[row].tokens for row in range(2)]
        turns = [[*text, *found[row].tokens, 11, 12] for row, text in enumerate(turns)]
    turns = [[*turns[0][:12], 5, 6], turns[1][:25]]  # what was said is taken back
    found, afresh = (dict(engine.generate(turns, 7, sampling=sampling)) for engine in (kept, again))
    assert [found[row].tokens for row in range(2)] == [afresh[row].tokens for row in range(2)]


def test_foreign_caches_are_not_trusted(trained_model, caplog):
    cache = DynamicCache()
    theirs = trained_model.base(IDS[:, :6], **{CACHE_NAME: cache}, use_cache=True)
    assert theirs[CACHE_NAME].get_seq_length() == 6
    with caplog.at_level(logging.WARNING):
        given = trained_model.generate(IDS, max_new_tokens=8, cache=cache)
    assert given[0, 12:].tolist() == greedy_reference(trained_model.base, IDS[0].tolist(), 8)
    assert "reading the texts again" in caplog.text
    out = trained_model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(GenerateError, match="nextn's"):
        trained_model.base(IDS, **{CACHE_NAME: out[CACHE_NAME]}, use_cache=True)


@pytest.mark.parametrize("family", CONFIGS)
def test_long_prompts_are_read_in_parts_on_every_family(family):
    model = nextn.attach(make_host(family), nextn.MultiTokenConfig(n=3, heads="sequential"))
    prompts = made_up_text(3, 40, seed=2).tolist()
    prompts[1] = prompts[1][:5]
    found = dict(model.engine(rows=2, stop_tokens=[], chunk=9).generate(prompts, 8))
    for index, prompt in enumerate(prompts):
        assert found[index].tokens == greedy_reference(model.base, prompt, 8)


WRONG = {
    "beams": ({"num_beams": 2}, "beams"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
    "states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
    "less than the whole": ({"attention_mask": torch.ones(1, 20, dtype=torch.long)}, "whole text"),
    "assistant": ({"assistant_model": object()}, "assistant_model is given"),
    "unused": ({"labels": IDS}, "leave labels out"),
    "positions": ({"position_ids": torch.arange(5, 17)[None]}, "position_ids out"),
    "rows": ({"prefix_allowed_tokens_fn": lambda row, ids: [5]}, "one by one"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_said_in_a_sentence(trained_model, name):
    asked, match = WRONG[name]
    ids = IDS.expand(2, -1) if name == "rows" else IDS
    with pytest.raises(ValueError, match=match):
        trained_model.generate(ids, max_new_tokens=4, do_sample=False, **asked)
    with pytest.raises(GenerateError, match="attached to this very model"):
        trained_model.base.generate(IDS, **OURS)


def test_results_come_as_they_finish_under_a_bar(trained_model, prompts):
    import io

    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, force_terminal=True)
    engine = trained_model.engine(rows=2, stop_tokens=[])
    order = [index for index, _ in engine.generate(prompts, [20, 2, 2, 2, 2, 2], progress=console)]
    assert sorted(order) == list(range(6)) and order[-1] == 0
    assert "6/6" in out.getvalue() and "tokens" in out.getvalue()
