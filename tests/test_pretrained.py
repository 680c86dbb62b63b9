"""A MultiTokenModel is the PreTrainedModel that it claims to be: each public name does what the table says."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import pickle
import threading
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from transformers.utils.quantization_config import QuantizationMethod

import nextn
from conftest import KINDS, made_up_text, make_host, make_tokenizer
from nextn.config import ConfigError
from nextn.decoding.generation_config import GenerateError
from nextn.pretrained import NAMES, public_names, table

DOCS = Path(__file__).parents[1] / "docs" / "guide" / "generate.md"
IDS = made_up_text(1, 12, seed=21)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
HERE = public_names()


def attached(host=None, n: int = 4, **settings) -> nextn.MultiTokenModel:
    config = nextn.MultiTokenConfig(n=n, **(settings or KINDS["recurrent"]))
    return nextn.attach(make_host("llama") if host is None else host, config).eval()


@pytest.fixture
def model() -> nextn.MultiTokenModel:
    return attached()


def names(treatment: str) -> list[str]:
    return sorted(name for name, decision in NAMES.items() if decision.treatment == treatment and name in HERE)


# --- every name is decided on -------------------------------------------------------------------------------------


def test_every_public_name_of_this_transformers_is_decided_on():
    """A new version may add a method that would silently act on the wrapper: decide on it in nextn.pretrained."""
    assert NAMES.keys() == HERE


def test_a_new_method_would_be_noticed(monkeypatch):
    monkeypatch.setattr(tf.PreTrainedModel, "prune_vocabulary", lambda self: None, raising=False)
    assert public_names() - NAMES.keys() == {"prune_vocabulary"}


def test_the_docs_have_the_table_of_the_code():
    """python -c 'from nextn.pretrained import table; print(table())'"""
    assert table() in DOCS.read_text()


@pytest.mark.parametrize("name", names("own") + names("inherited"))
def test_a_name_is_nextns_own_where_the_table_says_so(name):
    owner = next(each for each in nextn.MultiTokenModel.__mro__ if name in vars(each))
    assert owner.__module__.startswith("nextn.") == (NAMES[name].treatment == "own") or name in (
        "config_class",
        "supports_gradient_checkpointing",
    )


@pytest.mark.parametrize("name", names("base"))
def test_the_answer_is_the_bases(model, name):
    if not inspect.isroutine(inspect.getattr_static(model, name)):
        assert repr(getattr(model, name)) == repr(getattr(model.base, name))
        return
    setattr(model.base, name, lambda *args, **kwargs: (args, kwargs))
    assert getattr(model, name)(1, word=2) == ((1,), {"word": 2})


@pytest.mark.parametrize("name", names("refused"))
def test_a_refused_method_says_so_and_what_to_do(model, name):
    for owner in (model, nextn.MultiTokenModel):
        with pytest.raises(NotImplementedError, match=f"does not support {name}: .+"):
            getattr(owner, name)()


# --- trunk and heads together -------------------------------------------------------------------------------------


def test_counts_and_tensors_are_of_trunk_and_heads(model):
    heads = sum(parameter.numel() for parameter in model.heads.parameters())
    assert model.num_parameters() == model.base.num_parameters() + heads
    assert model.num_parameters(only_trainable=True) == heads
    assert model.get_memory_footprint() == model.base.get_memory_footprint() + 4 * heads
    parts = {name.split(".")[0] for name in model.state_dict()}
    assert parts == {"base", "heads"}
    copied = copy.deepcopy(model)
    assert not copied.load_state_dict(model.state_dict()).missing_keys
    assert model.get_parameter_or_buffer("base.model.norm.weight") is model.base.model.norm.weight
    assert model.device == model.base.device and model.dtype == model.base.dtype
    assert model.can_generate() and nextn.MultiTokenModel.can_generate()


def test_tied_weights_are_named_as_in_the_state_dict():
    model = attached(make_host("qwen3"))
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    assert tied == {"base.lm_head.weight": "base.model.embed_tokens.weight"}
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda model: model.half(), torch.float16),
        (lambda model: model.to(torch.bfloat16), torch.bfloat16),
        (lambda model: model.to(dtype=torch.float64), torch.float64),
        (lambda model: model.double(), torch.float64),
        (lambda model: model.bfloat16().float(), torch.float32),
        (lambda model: model.to("cpu"), torch.float32),
        (lambda model: model.to(torch.zeros(1, dtype=torch.bfloat16)), torch.bfloat16),
    ],
)
def test_a_converted_model_generates_as_its_converted_base(model, convert, dtype):
    base = convert(copy.deepcopy(model.base))
    assert convert(model) is model
    assert model.dtype == dtype and {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.generate(IDS, **GREEDY), base.generate(IDS, **GREEDY))


def test_a_quantized_base_is_not_cast(model):
    model.base.quantization_method = QuantizationMethod.BITS_AND_BYTES
    with pytest.raises(ValueError, match="cannot cast a bitsandbytes model"):
        model.to(torch.float16)
    model.base.is_quantized = True
    for method in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            method()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_checkpointing_is_switched_on_and_off_for_trunk_and_heads():
    model = attached(freeze_trunk=False, weights={"preset": "deepseek"}, **KINDS["recurrent"])
    on = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    off = getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)
    on()
    assert model.is_gradient_checkpointing and model.base.is_gradient_checkpointing
    assert model.heads.gradient_checkpointing
    off()
    model.train()
    assert not model.is_gradient_checkpointing and not model.heads.gradient_checkpointing
    model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_decodes_alike_and_shares_nothing(kind, how):
    model = attached(**KINDS[kind])
    expected = model.generate(IDS, **GREEDY)  # leaves measured times behind
    model._code["compiled"] = threading.Lock()  # which nothing can copy
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other.trunk.model is other.base and not other._code and model._code
    ours, theirs = ({tensor.data_ptr() for tensor in each.parameters()} for each in (model, other))
    assert not ours & theirs
    with torch.no_grad():
        model.base.lm_head.weight.zero_()
    assert torch.equal(other.generate(IDS, **GREEDY), expected)
    assert other(IDS, labels=IDS).loss.isfinite()


# --- the base's parts ---------------------------------------------------------------------------------------------


def test_embeddings_that_are_set_are_those_of_the_text(model):
    torch.manual_seed(3)
    model.set_input_embeddings(torch.nn.Embedding(64, 32))
    model.set_output_embeddings(torch.nn.Linear(32, 64, bias=False))
    assert model.base.model.embed_tokens is model.get_input_embeddings() is model.trunk.embedding
    assert torch.equal(model.generate(IDS, **GREEDY), model.base.generate(IDS, **GREEDY))


@pytest.mark.parametrize(
    ("arguments", "size"), [((72,), 72), ((60,), 60), ((None,), 64), ((65, 16), 80), ((None, 48), 96)]
)
def test_heads_follow_resized_embeddings(model, arguments, size):
    embeddings = model.resize_token_embeddings(*arguments)
    assert embeddings is model.get_input_embeddings() and embeddings.weight.shape == (size, 32)
    assert model.config.vocab_size == model.trunk.vocab_size == model.heads.vocab_size == size
    ids = IDS % size
    assert torch.equal(model.generate(ids, **GREEDY), model.base.generate(ids, **GREEDY))
    assert model.train()(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("output", [{"kind": "separate"}, {"kind": "trimmed", "size": 64}])
def test_a_resize_that_heads_cannot_follow_changes_nothing(output):
    model = attached(output=output, **KINDS["recurrent"])
    with pytest.raises(ConfigError, match="resized to 60 tokens"):
        model.resize_token_embeddings(60)
    assert model.config.vocab_size == model.trunk.vocab_size == 64
    assert torch.equal(model.generate(IDS, **GREEDY), model.base.generate(IDS, **GREEDY))


def test_another_attention_is_that_of_trunk_and_heads(model):
    model.set_attn_implementation("eager")
    assert model.trunk.is_eager and model.config._attn_implementation == "eager"
    assert torch.equal(model.generate(IDS, **GREEDY), model.base.generate(IDS, **GREEDY))


def test_tags_reach_the_base(model):
    model.add_model_tags(["sft"])
    assert model.base.model_tags == model.model_tags == ["sft"]


@pytest.fixture
def any_peft(monkeypatch):
    """transformers asks for a version of peft; what it calls is in older ones as well."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)


def test_adapters_are_the_bases(any_peft):
    model = attached(freeze_trunk=False, weights={"preset": "deepseek"}, **KINDS["recurrent"])
    plain = model.generate(IDS, **GREEDY)
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=64, target_modules=["up_proj"], init_lora_weights=False))
    assert model.active_adapters() == model.base.active_adapters() == ["default"]
    assert not any("lora" in name for name, _ in model.heads.named_parameters())
    trained = {name for name, parameter in model.base.named_parameters() if parameter.requires_grad}
    assert trained and all("lora" in name for name in trained)
    adapted = model.generate(IDS, **GREEDY)
    assert torch.equal(adapted, model.base.generate(IDS, **GREEDY)) and not torch.equal(adapted, plain)
    model.disable_adapters()
    assert torch.equal(model.generate(IDS, **GREEDY), plain)
    model.enable_adapters()
    assert torch.equal(model.generate(IDS, **GREEDY), adapted)
    model.delete_adapter("default")
    assert torch.equal(model.generate(IDS, **GREEDY), plain)


def test_a_frozen_trunk_trains_no_added_adapter(any_peft, model):
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["up_proj"]))
    assert not any(parameter.requires_grad for parameter in model.base.parameters())
    assert all(parameter.requires_grad for parameter in model.heads.parameters())


def test_an_added_adapter_that_is_not_supported_is_refused(any_peft, model):
    with pytest.raises(ConfigError, match="lm_head has an adapter"):
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head"]))


def test_transformers_is_told_of_the_bases_adapters(model):
    assert not model._hf_peft_config_loaded
    model.base._hf_peft_config_loaded = True
    assert model._hf_peft_config_loaded


# --- generation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", ["hello there", ["hello there", "ab"]])
def test_a_pipeline_gives_what_the_bases_gives(model, prompts, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = make_tokenizer()
    ours = tf.pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)(prompts, **GREEDY)
    assert "not supported" not in caplog.text
    theirs = tf.pipeline("text-generation", model=model.base, tokenizer=tokenizer, batch_size=2)(prompts, **GREEDY)
    assert ours == theirs


def test_a_pipeline_takes_nextns_arguments_and_a_conversation(model):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    generate = tf.pipeline("text-generation", model=model, tokenizer=tokenizer)
    conversation = [{"role": "user", "content": "hello"}]
    ours = [generate(conversation, max_new_tokens=8, do_sample=True, seed=4, heads=heads) for heads in (None, 1)]
    assert ours[0] == ours[1] and ours[0][0]["generated_text"][-1]["role"] == "assistant"
    with pytest.raises(GenerateError, match="assistant_model is given"):
        tf.pipeline("text-generation", model=model, tokenizer=tokenizer, assistant_model=model.base)("a")


def test_transition_scores_are_the_bases(model):
    given = GREEDY | {"return_dict_in_generate": True, "output_scores": True}
    found = []
    for each in (model, model.base):
        output = each.generate(IDS, **given)
        found.append(each.compute_transition_scores(output.sequences, output.scores, normalize_logits=True))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_saved_directory_is_the_plain_model_and_the_whole(model, tmp_path):
    model.save_pretrained(tmp_path, tokenizer=make_tokenizer())
    plain = tf.pipeline("text-generation", model=str(tmp_path))
    whole = tf.pipeline("text-generation", model=nextn.load(tmp_path), tokenizer=str(tmp_path))
    assert type(plain.model) is type(model.base) and type(whole.model) is nextn.MultiTokenModel
    assert plain("hello", **GREEDY) == whole("hello", **GREEDY)


TEXT = "token ids, not text"
WRONG = {
    "a string": ({"input_ids": "hello"}, TEXT),
    "strings": ({"input_ids": ["hello", "you"]}, TEXT),
    "inputs=": ({"inputs": "hello"}, TEXT),
    "a list": ({"input_ids": [[5, 6]]}, "input_ids is a list; give a tensor"),
    "an array": ({"input_ids": IDS.numpy()}, "input_ids is a ndarray; give a tensor"),
    "a tokenizer's output": ({"input_ids": {"input_ids": IDS}}, r"generate\(\*\*inputs\)"),
    "one row": ({"input_ids": IDS[0]}, r"shape \[12\]"),
    "too many axes": ({"input_ids": IDS[None]}, r"shape \[1, 1, 12\]"),
    "numbers": ({"input_ids": IDS.float()}, "dtype float32"),
    "a mask": ({"input_ids": IDS > 5}, "dtype bool"),
    "a list as mask": ({"input_ids": IDS, "attention_mask": [[1] * 12]}, "attention_mask is no tensor"),
    "a short mask": ({"input_ids": IDS, "attention_mask": torch.ones(1, 5)}, "attention_mask is no tensor"),
    "a mask of other rows": ({"input_ids": IDS, "attention_mask": torch.ones(2, 12)}, "attention_mask is no tensor"),
    "a dict as config": ({"input_ids": IDS, "generation_config": {"max_new_tokens": 3}}, "give a GenerationConfig"),
    "custom_generate": ({"input_ids": IDS, "custom_generate": "owner/name"}, "custom_generate is given"),
    "an assistant": ({"input_ids": IDS, "assistant_model": "owner/name"}, "nextn's heads make the drafts"),
    "prompt lookup": ({"input_ids": IDS, "prompt_lookup_num_tokens": 3}, "nextn's heads make the drafts"),
    "its own MTP": ({"input_ids": IDS, "use_mtp": True}, "nextn's heads make the drafts"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_generate_says_in_one_sentence_what_it_cannot_take(model, name):
    given, message = WRONG[name]
    with pytest.raises(GenerateError, match=message) as error:
        model.generate(**given)
    assert "\n" not in str(error.value)


def test_integers_of_other_widths_are_token_ids(model):
    expected = model.base.generate(IDS, **GREEDY)
    assert torch.equal(model.generate(IDS.int(), **GREEDY), expected)
    assert torch.equal(model.generate(IDS, **GREEDY | {"max_new_tokens": 8.0}), expected)


def test_a_model_with_heads_is_no_assistant_of_another(model):
    with pytest.raises(GenerateError, match="nextn is no assistant of another model"):
        make_host("llama", seed=1).generate(IDS, assistant_model=model, **GREEDY)
