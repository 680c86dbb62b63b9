"""Every field of transformers' GenerationConfig is honoured as transformers does, refused, or has no effect."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as tf

import nextn
from conftest import fit, made_up_text, make_tokenizer
from nextn.decoding.generation_config import FIELDS, GenerateError, table

DOCS = Path(__file__).parents[2] / "docs" / "guide" / "generate.md"
IDS = torch.cat([made_up_text(1, 12, seed=21), made_up_text(1, 12, seed=22)])
IDS[1, :5] = 0
MASK = (torch.arange(12) >= torch.tensor([[0], [5]])).long()
ONE = {"input_ids": made_up_text(1, 40, seed=21)}
SINGLE = {"input_ids": torch.tensor([[0, 0, 7], [5, 6, 7]]), "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]])}
SAMPLE = {"do_sample": True, "top_k": 0}
OUTPUT = {"return_dict_in_generate": True}
COMMON_ENDS = [20, 33, 40, 50, 7, 9, 11]

# What each honoured field is tried with, beside `max_new_tokens` and greedy decoding of a padded batch of two.
HONOURED = {
    "max_length": {"max_length": 17, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_length": {"min_length": 20, "eos_token_id": COMMON_ENDS},
    "min_new_tokens": {"min_new_tokens": 8, "eos_token_id": COMMON_ENDS},
    "max_time": {"max_time": 0.0},
    "stop_strings": {"stop_strings": ["e", "t", "8"], "tokenizer": make_tokenizer()},
    "do_sample": {"do_sample": False},
    "use_cache": {"use_cache": False} | OUTPUT,
    "temperature": {"temperature": 0.3} | SAMPLE,
    "top_k": {"do_sample": True, "top_k": 1},
    "top_p": {"top_p": 0.6} | SAMPLE,
    "min_p": {"min_p": 0.3} | SAMPLE,
    "top_h": {"top_h": 0.4} | SAMPLE,
    "typical_p": {"typical_p": 0.5} | SAMPLE,
    "epsilon_cutoff": {"epsilon_cutoff": 0.05} | SAMPLE,
    "eta_cutoff": {"eta_cutoff": 0.05} | SAMPLE,
    "repetition_penalty": {"repetition_penalty": 20.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 0.02} | ONE,
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[7], [9, 10], [20]]},
    "renormalize_logits": {"renormalize_logits": True},
    "forced_bos_token_id": {"forced_bos_token_id": 30} | SINGLE,
    "forced_eos_token_id": {"forced_eos_token_id": 30},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 40},
    "suppress_tokens": {"suppress_tokens": [20, 21, 33, 40]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 40))},
    "sequence_bias": {"sequence_bias": [[[12], 20.0], [[9, 10], -5.0]]},
    "guidance_scale": {"guidance_scale": 8.0},
    "watermarking_config": {"watermarking_config": {"bias": 20.0, "seeding_scheme": "lefthash"}},
    "num_return_sequences": {"num_return_sequences": 3, "do_sample": True, "top_k": 1},
    "output_scores": {"output_scores": True} | OUTPUT,
    "output_logits": {"output_logits": True} | OUTPUT,
    "return_dict_in_generate": OUTPUT,
    "pad_token_id": {"pad_token_id": 60, "eos_token_id": COMMON_ENDS},
    "bos_token_id": {"bos_token_id": 7, "input_ids": None, "attention_mask": None},
    "eos_token_id": {"eos_token_id": COMMON_ENDS},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1} | ONE,
}  # fmt: skip
REFUSED = {
    "num_beams": {"num_beams": 2},
    "use_mtp": {"use_mtp": True},
    "cache_implementation": {"cache_implementation": "paged"},
    "token_healing": {"token_healing": True},
    "output_attentions": {"output_attentions": True} | OUTPUT,
    "output_hidden_states": {"output_hidden_states": True} | OUTPUT,
    "is_assistant": {"is_assistant": True},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5},
    "speculation_type": {"speculation_type": "dflash"},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "constraints": {"constraints": [object()]},
    "force_words_ids": {"force_words_ids": [[5]]},
}
NO_EFFECT = {
    "early_stopping": True,
    "max_cache_len": 99,
    "length_penalty": 2.0,
    "decoder_start_token_id": 5,
    "num_assistant_tokens": 9,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.1,
    "max_matching_ngram_size": 3,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "disable_compile": True,
    "prefill_chunk_size": 4,
    "low_memory": True,
    "cache_config": None,
    "compile_config": tf.CompileConfig(),
    "continuous_batching_config": None,
    "diversity_penalty": None,
    "num_beam_groups": None,
    "transformers_version": "5.0",
}


@pytest.fixture(scope="module")
def model(trained_host) -> nextn.MultiTokenModel:
    config = nextn.MultiTokenConfig(n=4, heads="sequential", recurrent=True)
    whole = nextn.attach(copy.deepcopy(trained_host), config, calibration={"input_ids": made_up_text(8, 48, seed=999)})
    fit(whole.train(), 40)
    return whole.eval()


def call(asked: dict) -> dict:
    """The arguments of a call; None leaves one out."""
    given = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    given |= asked
    if given["input_ids"] is ONE["input_ids"]:
        del given["attention_mask"]
    return {name: value for name, value in given.items() if value is not None}


def transformers_answer(model, **asked):
    return model.base.generate(**call(asked))


def test_every_field_of_this_transformers_is_decided_on():
    fields = {name for name in vars(tf.GenerationConfig()) if not name.startswith("_")}
    assert fields == set(FIELDS)
    assert [set(each) for each in (HONOURED, REFUSED, NO_EFFECT)] == [
        {name for name, decision in FIELDS.items() if decision.treatment == treatment}
        for treatment in ("honoured", "refused", "no effect")
    ]


def test_the_docs_have_the_table_of_the_code():
    """python -c 'from nextn.decoding.generation_config import table; print(table())'"""
    assert table() in DOCS.read_text()


@pytest.mark.parametrize("name", HONOURED)
def test_an_honoured_field_gives_what_transformers_gives(model, name):
    asked = HONOURED[name]
    if asked.get("do_sample") and asked["top_k"] != 1:  # the noise is another one, so compare what it is added to
        asked = asked | OUTPUT | {"output_scores": True, "max_new_tokens": 1}
        theirs, ours = transformers_answer(model, **asked), model.generate(**call(asked))
        torch.testing.assert_close(ours.scores[0], theirs.scores[0], rtol=1e-3, atol=1e-3)
        return
    theirs, ours = transformers_answer(model, **asked), model.generate(**call(asked))
    if not asked.get("return_dict_in_generate"):
        assert torch.equal(ours, theirs)
        return
    assert torch.equal(ours.sequences, theirs.sequences) and set(ours) == {*theirs, "spec_decoding_stats"}
    for output in ("scores", "logits"):
        if output in theirs:
            torch.testing.assert_close(ours[output], theirs[output], rtol=1e-3, atol=1e-3)


WITHOUT_TRACE = {
    "do_sample",
    "forced_bos_token_id",
    "renormalize_logits",
    "remove_invalid_values",
    "bos_token_id",
    "return_dict_in_generate",
}


@pytest.mark.parametrize("name", sorted(HONOURED.keys() - WITHOUT_TRACE))
def test_what_an_honoured_field_is_tried_with_makes_a_difference_in_transformers(model, name):
    """So that the test above can fail."""
    asked = HONOURED[name]
    if asked.get("do_sample") or asked.get("return_dict_in_generate"):
        return
    others = {key: value for key, value in asked.items() if key not in (name, "tokenizer")}
    assert not torch.equal(transformers_answer(model, **asked), transformers_answer(model, **others))


def test_a_forced_first_token_follows_a_prompt_of_one_token(model):
    asked = {"input_ids": torch.tensor([[7], [9]]), "attention_mask": None, "forced_bos_token_id": 30}
    ours = model.generate(**call(asked))
    assert torch.equal(ours, transformers_answer(model, **asked)) and ours[:, 1].tolist() == [30, 30]


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_field_is_named_in_the_error(model, name, in_config):
    asked = REFUSED[name]
    if in_config:
        asked = {"generation_config": tf.GenerationConfig(**asked, max_new_tokens=4)}
    with pytest.raises(GenerateError, match=f"^{name} is .*leave {name} out"):
        model.generate(IDS[:1], **asked)


@pytest.mark.parametrize("name", NO_EFFECT)
def test_a_field_without_effect_has_none(model, name):
    plain = model.base.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=8, do_sample=False, **{name: NO_EFFECT[name]}), plain)


def test_values_that_ask_for_nothing_are_accepted(model):
    asked = {"num_beams": 1, "use_mtp": False, "cache_implementation": "static", "token_healing": False}
    asked |= {"penalty_alpha": 0.6, "top_k": 1, "output_attentions": False, "is_assistant": False}
    plain = model.base.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=8, do_sample=False, **asked), plain)


@pytest.mark.parametrize("where", ["argument", "config", "model", "model, beside a config"])
def test_stop_strings_count_wherever_they_are_given(model, where):
    tokenizer = make_tokenizer()
    text = tokenizer.decode(model.base.generate(IDS[:1], max_new_tokens=30, do_sample=False)[0, 12:])
    asked, strings = {"tokenizer": tokenizer}, {"stop_strings": [text[9:11]]}
    length = {"max_new_tokens": 30, "do_sample": False}
    if where == "config":
        asked["generation_config"] = tf.GenerationConfig(**strings, **length)
    elif where == "model, beside a config":
        asked["generation_config"] = tf.GenerationConfig(**length)
    else:
        asked |= length | (strings if where == "argument" else {})
    own = copy.deepcopy(model.base.generation_config)
    try:
        if where.startswith("model"):
            model.base.generation_config.stop_strings = strings["stop_strings"]
        theirs = model.base.generate(IDS[:1], **asked)
        assert theirs.shape[1] < 12 + 30 and torch.equal(model.generate(IDS[:1], **asked), theirs)
    finally:
        model.base.generation_config = own


def test_stop_strings_need_a_tokenizer(model):
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(IDS[:1], stop_strings="a")
