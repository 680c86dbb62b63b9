"""transformers' generate with the engine's step: the same answers to the same calls."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as tf
from transformers.cache_utils import DynamicCache

import nextn
from conftest import CONFIGS, greedy_reference, made_up_text, make_host, make_tokenizer
from nextn.decoding.generate import GenerateError

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


def test_streamers_see_every_token(trained_model):
    tokenizer = make_tokenizer()
    for asked in ({"streamer": None}, {"token_streamer": None}):
        name = next(iter(asked))
        streamer = tf.TextIteratorStreamer(tokenizer, skip_prompt=True)
        if name == "streamer":
            given = trained_model.generate(IDS, max_new_tokens=12, streamer=streamer)
        else:
            given = trained_model.base.generate(
                IDS, max_new_tokens=12, heads=trained_model, token_streamer=streamer, **OURS
            )
        assert "".join(streamer) == tokenizer.decode(given[0, IDS.shape[1] :])


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
    assert len(set(map(tuple, with_heads.tolist()))) > 1
    assert torch.equal(with_heads[1:2], trained_model.generate(IDS, seed=6, **asked))
    torch.manual_seed(3)
    first = trained_model.generate(IDS, **asked)
    torch.manual_seed(3)
    assert torch.equal(trained_model.generate(IDS, **asked), first)
    several = trained_model.generate(IDS, num_return_sequences=3, seed=5, **asked)
    assert torch.equal(several, with_heads)
    asked |= {"seed": 5, "sampling_method": "rejection", "depth": None}
    assert torch.equal(trained_model.generate(IDS, **asked), trained_model.generate(IDS, **asked))


@pytest.mark.parametrize("heads", [None, 1])
def test_a_turn_on_the_cache_of_the_last_gives_the_text_from_scratch(trained_model, prompts, heads, monkeypatch):
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
            **given, max_new_tokens=9, pad_token_id=0, heads=heads, return_dict_in_generate=True, past_key_values=kept
        )
        kept = out.past_key_values
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
    theirs = trained_model.base(IDS[:, :6], past_key_values=cache, use_cache=True)
    assert theirs.past_key_values.get_seq_length() == 6
    with caplog.at_level(logging.WARNING):
        given = trained_model.generate(IDS, max_new_tokens=8, past_key_values=cache)
    assert given[0, 12:].tolist() == greedy_reference(trained_model.base, IDS[0].tolist(), 8)
    assert "read anew" in caplog.text
    out = trained_model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(GenerateError, match="nextn's"):
        trained_model.base(IDS, past_key_values=out.past_key_values, use_cache=True)


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
