"""Models whose trunk has peft adapters: attached to, trained, saved and opened again."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
import transformers as tf

import nextn
from conftest import make_host, make_tokenizer
from nextn.adapters import adapter_layers
from nextn.config import ConfigError
from nextn.derive import derive
from nextn.formats import FormatError, native
from nextn.trunk import Trunk

peft = pytest.importorskip("peft")

IDS = torch.tensor([[5, 9, 11, 7]])
TOGETHER = {"freeze_trunk": False, "weights": {"preset": "deepseek"}}


def lora(**changes) -> peft.LoraConfig:
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return peft.LoraConfig(**settings | changes)


def with_integration(base, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # 5.24 wants a newer one
    base.add_adapter(lora())
    return base


def two_adapters(base, _patch):
    model = peft.get_peft_model(base, lora())
    model.add_adapter("second", lora(r=2, target_modules=["o_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def switched_off(base, _patch):
    model = peft.get_peft_model(base, lora())
    model.base_model.disable_adapter_layers()
    return model


WAYS = {
    "peft_model": lambda base, _: peft.get_peft_model(base, lora()),
    "base_of_peft_model": lambda base, _: peft.get_peft_model(base, lora()).get_base_model(),
    "injected": lambda base, _: peft.inject_adapter_in_model(lora(), base),
    "transformers": with_integration,
    "dora": lambda base, _: peft.get_peft_model(base, lora(use_dora=True)),
    "ia3": lambda base, _: peft.get_peft_model(
        base,
        peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
    ),
    "two": two_adapters,
    "off": switched_off,
}


def attached(way="peft_model", patch=None, family="llama", **config):
    return nextn.attach(WAYS[way](make_host(family), patch), nextn.MultiTokenConfig(n=3, **config))


def assert_same(loaded, model):
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=9), model.generate(IDS, max_new_tokens=9))


@pytest.mark.parametrize("way", WAYS)
def test_base_adapters_and_heads_are_saved_and_found_again(way, monkeypatch, tmp_path):
    model = attached(way, monkeypatch)
    adapted = model(IDS).logits
    assert torch.equal(adapted, make_host("llama")(IDS).logits) == (way == "off")
    model.save_pretrained(tmp_path)
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(IDS).logits, make_host("llama")(IDS).logits), "the directory is the untouched base"
    assert {"plain model", "adapter default", "all heads"} < native.contents(tmp_path)["parts"].keys()
    assert_same(nextn.load(tmp_path), model)
    again = tmp_path / "again"
    nextn.load(tmp_path).save_pretrained(again)
    assert_same(nextn.load(again), model)


def test_peft_opens_a_saved_adapter(tmp_path):
    model = attached()
    model.save_pretrained(tmp_path)
    opened = peft.PeftModel.from_pretrained(
        tf.AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "nextn" / "adapters" / "default"
    )
    assert torch.equal(opened(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("way", ["peft_model", "two", "off"])
def test_merged_adapters_give_a_plain_model_that_says_the_same(way, tmp_path):
    model = attached(way)
    before = model(IDS).logits
    model.save_pretrained(tmp_path, merge_adapters=True)
    assert not (tmp_path / "nextn" / "adapters").exists()
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(IDS).logits, before, rtol=1e-4, atol=1e-4)
    loaded = nextn.load(tmp_path)
    assert not adapter_layers(loaded)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=9), model.generate(IDS, max_new_tokens=9))
    assert torch.equal(model(IDS).logits, before), "the model in memory stays as it was"


@pytest.mark.parametrize("config", [{}, {"recurrent": True}, {"heads": "parallel"}, {"heads": "shared_kv"}])
def test_heads_hold_no_adapter_and_start_from_merged_weights(config):
    base = peft.get_peft_model(make_host("llama"), lora())
    names = nextn.attach(base, nextn.MultiTokenConfig(n=3, **config)).heads.state_dict()
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    layer = Trunk(base.get_base_model()).new_layer()
    merged = base.merge_and_unload().model.layers[-1]
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], tensor)


def test_heads_of_adapted_experts_are_plain(tmp_path):
    experts = lora(target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    base = peft.get_peft_model(make_host("deepseek_v3"), experts)
    model = nextn.attach(base, nextn.MultiTokenConfig(n=3))
    model.save_pretrained(tmp_path)
    assert_same(nextn.load(tmp_path), model)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("way", ["peft_model", "base_of_peft_model", "injected"])
def test_only_active_adapters_and_heads_are_trained(way, tmp_path):
    model = attached(way, **TOGETHER)
    assert {name.split(".")[0] for name in trained(model)} == {"base", "heads"}
    assert all("lora_" in name for name in trained(model.base))
    assert not trained(attached(way).base)
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.base.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained(model.base)
    model.eval().save_pretrained(tmp_path)
    loaded = nextn.load(tmp_path)
    assert_same(loaded, model)
    assert trained(loaded) == trained(model)


# --- modules_to_save ----------------------------------------------------------------------------------------------


COPIED = [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]]


def step(model) -> None:
    """Train all that is to be trained by one step, so large that it shows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()


def losses(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS).depth_losses


def assert_losses(model, expected: torch.Tensor, what: str | None = None) -> None:
    torch.testing.assert_close(losses(model), expected, rtol=1e-5, atol=1e-5, equal_nan=True, msg=what)


@pytest.mark.parametrize(
    "config", [{}, {"recurrent": True}, {"heads": "parallel"}, {"output": {"kind": "trimmed", "size": 30}}]
)
@pytest.mark.parametrize("names", COPIED)
def test_copies_of_the_embeddings_are_trained_and_heads_follow_them(names, config, tmp_path):
    base = peft.get_peft_model(make_host("llama"), lora(modules_to_save=names))
    model = nextn.attach(base, nextn.MultiTokenConfig(n=3, **config, **TOGETHER))
    copies = {name for name in trained(model.base) if "lora_" not in name}
    assert sorted(name.split(".modules_to_save")[0].split(".")[-1] for name in copies) == sorted(names)
    step(model)
    untrained = make_host("llama")
    for name in names:
        get = "get_output_embeddings" if name == "lm_head" else "get_input_embeddings"
        assert not torch.equal(getattr(base, get)().weight, getattr(untrained, get)().weight)
    expected = losses(model)

    model.save_pretrained(tmp_path / "apart")
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "apart")
    assert torch.equal(plain(IDS).logits, untrained(IDS).logits), "the directory is the untouched base"
    loaded = nextn.load(tmp_path / "apart")
    assert_losses(loaded, expected)
    assert trained(loaded) == trained(model)
    assert_same(loaded, model)
    opened = peft.PeftModel.from_pretrained(plain, tmp_path / "apart" / "nextn" / "adapters" / "default")
    assert torch.equal(opened(IDS).logits, model(IDS).logits)
    half = nextn.load(tmp_path / "apart", dtype=torch.bfloat16)
    assert {each.dtype for name, each in half.base.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    half.generate(IDS, max_new_tokens=4)

    model.save_pretrained(tmp_path / "merged", merge_adapters=True)
    assert_losses(model, expected, "the model in memory stays as it was")
    merged = nextn.load(tmp_path / "merged")
    assert_losses(merged, expected)
    assert not adapter_layers(merged) and "modules_to_save" not in str(merged.state_dict().keys())
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits)

    native.save_heads(model, tmp_path / "heads")
    assert_losses(nextn.load(tmp_path / "heads", base=make_host("llama")), expected)


def test_copies_that_are_switched_off_are_left_out(tmp_path):
    base = peft.get_peft_model(make_host("llama"), lora(modules_to_save=["lm_head"]))
    model = nextn.attach(base, nextn.MultiTokenConfig(n=3, **TOGETHER))
    step(model)
    base.base_model.disable_adapter_layers()
    assert torch.equal(model(IDS).logits, make_host("llama")(IDS).logits)
    expected = losses(model)
    model.save_pretrained(tmp_path / "apart")
    assert_losses(nextn.load(tmp_path / "apart"), expected)
    model.save_pretrained(tmp_path / "merged", merge_adapters=True)
    assert_losses(nextn.load(tmp_path / "merged"), expected)


def test_heads_alone_are_trained_on_a_copy_of_the_unembedding(tmp_path):
    base = peft.get_peft_model(make_host("llama"), lora(modules_to_save=["lm_head"]))
    base.get_output_embeddings().weight.data.mul_(0.5)
    model = nextn.attach(base, nextn.MultiTokenConfig(n=3))
    assert not trained(model.base)
    step(model)
    model.save_pretrained(tmp_path)
    assert_losses(nextn.load(tmp_path), losses(model))


def test_checkpoints_hold_copies_of_the_unembedding(tmp_path):
    def run(resume=None):
        torch.manual_seed(0)
        base = peft.get_peft_model(make_host("llama"), lora(modules_to_save=["lm_head"]))
        model = nextn.attach(base, nextn.MultiTokenConfig(n=3, **TOGETHER))
        data = [{"input_ids": IDS[0].repeat(4), "labels": IDS[0].repeat(4)}] * 8
        arguments = tf.TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
            report_to=[], disable_tqdm=True,
        )  # fmt: skip
        nextn.Trainer(model=model, args=arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return model.eval()

    model = run()
    assert_losses(nextn.load(tmp_path / "checkpoint-4", base=make_host("llama")), losses(model))
    assert_losses(run(f"{tmp_path}/checkpoint-2"), losses(model))


@pytest.mark.parametrize("names", COPIED)
def test_a_copy_of_one_of_two_tied_embeddings_is_refused(names):
    with pytest.raises(ConfigError, match="the base ties its embedding and unembedding"):
        nextn.attach(peft.get_peft_model(make_host("qwen3"), lora(modules_to_save=names)), nextn.MultiTokenConfig(n=3))


def test_embeddings_with_copies_are_not_resized():
    base = peft.get_peft_model(make_host("llama"), lora(modules_to_save=["lm_head"]))
    model = nextn.attach(base, nextn.MultiTokenConfig(n=3))
    with pytest.raises(ConfigError, match="cannot be resized"):
        model.resize_token_embeddings(80)


# --- peft around a whole model ------------------------------------------------------------------------------------


def whole(config=None, family="llama", **settings):
    torch.manual_seed(3)
    model = nextn.attach(make_host(family), nextn.MultiTokenConfig(n=3, **TOGETHER | settings))
    return model if config is None else peft.get_peft_model(model, config)


@pytest.mark.parametrize("kind", [{}, {"recurrent": True}, {"heads": "parallel"}, {"heads": "eagle3"}])
@pytest.mark.parametrize("names", [None, ["heads"], ["lm_head"], ["heads", "lm_head", "embed_tokens"]])
def test_heads_are_trained_whole_beside_adapters_and_copies(names, kind, tmp_path):
    model = whole(lora(modules_to_save=names), **kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step(model)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == trained(model)
    assert sum("modules_to_save" in name and ".base." in name for name in changed) == len(set(names or ()) - {"heads"})
    expected = losses(model)
    model.save_pretrained(tmp_path / "tuned")
    again = peft.PeftModel.from_pretrained(whole(**kind), tmp_path / "tuned").eval()
    assert_losses(again, expected)
    with model.disable_adapter():
        assert_losses(model, losses(whole(**kind)))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = nextn.load(tmp_path / "merged")
    assert_losses(loaded, expected)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=9), loaded.generate(IDS, max_new_tokens=9, heads=1))


def test_several_adapters_have_heads_of_their_own(tmp_path):
    expected = []
    for seed, name in enumerate(["first", "second"]):
        model = whole(lora(modules_to_save=["lm_head"] if seed else None), recurrent=True)
        for _ in range(seed + 1):
            step(model)
        model.save_pretrained(tmp_path / name)
        expected.append(losses(model))
    assert not torch.allclose(*expected)
    model = peft.PeftModel.from_pretrained(whole(recurrent=True), tmp_path / "first", adapter_name="first")
    model.load_adapter(str(tmp_path / "second"), "second")
    for name, those in zip(["first", "second", "first"], [*expected, expected[0]], strict=True):
        model.set_adapter(name)
        assert_losses(model.eval(), those, name)
    model.set_adapter("second")
    model.get_base_model().set_attn_implementation("eager")  # which heads follow, though peft has copied them
    torch.testing.assert_close(losses(model), expected[1], rtol=1e-4, atol=1e-4)


def test_an_adapter_without_heads_beside_another_one_is_refused():
    model = whole(lora())
    model.add_adapter("second", lora())
    with pytest.raises(ConfigError, match=r"modules_to_save=\['heads'\]"):
        model.train()
    model.set_adapter("second")
    for call in (lambda: losses(model), lambda: model.generate(input_ids=IDS, max_new_tokens=2)):
        with pytest.raises(ConfigError, match=r"modules_to_save=\['heads'\]"):
            call()


@pytest.mark.parametrize(
    "config, why",
    [
        (lora(modules_to_save=["eh_proj"]), r"names a part of the heads \(eh_proj\).*leave it out"),
        (lora(modules_to_save=["heads", "enorm"]), r"names a part of the heads \(enorm\).*leave it out"),
        (lora(target_modules=["eh_proj"]), "in the heads alone.*name layers of the trunk"),
        (lora(modules_to_save=["norm"]), "name embedding or unembedding alone in modules_to_save"),
        (lora(target_modules=["q_proj", "lm_head"]), "lm_head has an adapter"),
    ],
)
def test_adapters_around_a_whole_model_that_are_not_supported_are_refused(config, why):
    with pytest.raises(ConfigError, match=why):
        whole(config)


def test_an_adapter_loaded_for_inference_is_trained_together_with_heads(tmp_path):
    peft.get_peft_model(make_host("llama"), lora()).save_pretrained(tmp_path)
    base = peft.PeftModel.from_pretrained(make_host("llama"), tmp_path)
    assert trained(nextn.attach(base, nextn.MultiTokenConfig(n=3, **TOGETHER)).base)


def test_heads_alone_bring_the_adapter(tmp_path):
    make_host("llama").save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = nextn.attach(peft.get_peft_model(base, lora()), nextn.MultiTokenConfig(n=3))
    native.save_heads(model, tmp_path / "heads")
    assert not (tmp_path / "heads" / "config.json").exists()
    assert_same(nextn.load(tmp_path / "heads"), model)
    assert_same(nextn.load(tmp_path / "heads", base=make_host("llama")), model)


def test_the_plain_engine_of_a_saved_model_has_its_adapter(tmp_path):
    model = attached()
    model.save_pretrained(tmp_path, tokenizer=make_tokenizer())
    engine, _ = native.open_for_decoding(str(tmp_path), heads=1)
    ((_, result),) = engine.generate([IDS[0].tolist()], 9)
    assert result.tokens == model.generate(IDS, max_new_tokens=9)[0, 4:].tolist()


def test_checkpoints_hold_the_adapter(tmp_path):
    model = attached(**TOGETHER)
    data = [{"input_ids": IDS[0].repeat(4), "labels": IDS[0].repeat(4)}] * 8
    arguments = tf.TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    nextn.Trainer(model=model, args=arguments, train_dataset=data).train()
    loaded = nextn.load(tmp_path / "checkpoint-4", base=make_host("llama"))
    assert_same(loaded, model.eval())
    cut = attached(**TOGETHER)
    nextn.Trainer(model=cut, args=arguments, train_dataset=data).train(
        resume_from_checkpoint=f"{tmp_path}/checkpoint-2"
    )
    assert_same(cut.eval(), model)


def test_derived_heads_keep_the_adapter(tmp_path):
    model = attached()
    derived = derive(model, nextn.OutputConfig(kind="trimmed", size=30))
    derived.save_pretrained(tmp_path)
    assert torch.equal(nextn.load(tmp_path)(IDS).logits, model(IDS).logits)
    native.save_heads(derived, tmp_path / "heads")
    assert nextn.load(tmp_path / "heads", base=model.base).base is model.base, "it has the stored adapter already"


def test_another_adapter_than_the_stored_one_is_refused(tmp_path):
    attached().save_pretrained(tmp_path)
    other = peft.get_peft_model(make_host("llama"), lora())
    other.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data += 1
    with pytest.raises(FormatError, match="give the base without adapters"):
        nextn.load(tmp_path, base=other)


def test_saving_without_adapters_removes_those_saved_before(tmp_path):
    attached().save_pretrained(tmp_path)
    plain = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3))
    plain.save_pretrained(tmp_path)
    assert not list((tmp_path / "nextn").glob("adapters/*"))
    assert_same(nextn.load(tmp_path), plain)


def test_damaged_adapters_are_named(tmp_path):
    attached().save_pretrained(tmp_path)
    path = tmp_path / "nextn" / "adapters" / "default"
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(FormatError, match="does not hold the adapter"):
        nextn.load(tmp_path)
    (path / "adapter_model.safetensors").write_bytes(b"1234")
    with pytest.raises(FormatError, match="truncated or damaged"):
        nextn.load(tmp_path)
    (path / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"no .*adapter_config.json"):
        nextn.load(tmp_path)


def test_without_peft_a_saved_adapter_is_refused_and_a_plain_model_opens(tmp_path, monkeypatch):
    attached().save_pretrained(tmp_path / "adapted")
    nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3)).save_pretrained(tmp_path / "plain")
    monkeypatch.setitem(sys.modules, "peft", None)
    nextn.load(tmp_path / "plain")
    with pytest.raises(FormatError, match="needs peft"):
        nextn.load(tmp_path / "adapted")


def test_adapters_merged_in_place_are_not_saved_twice(tmp_path):
    base = peft.get_peft_model(make_host("llama"), lora())
    model = nextn.attach(base, nextn.MultiTokenConfig(n=3))
    base.merge_adapter()
    with pytest.raises(ConfigError, match=r"unmerge_adapter\(\) first"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, merge_adapters=True)
    assert_same(nextn.load(tmp_path), model)


@pytest.mark.parametrize(
    "config, why",
    [
        (lora(target_modules=["lm_head"]), "lm_head has an adapter"),
        (lora(target_modules=["embed_tokens"]), "embed_tokens has an adapter"),
        (lora(modules_to_save=["norm"]), "modules_to_save"),
        (lora(trainable_token_indices=[1, 2]), "TrainableTokensWrapper"),
        (lora(bias="all"), "bias='all'"),
        (lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING are not supported"),
        (peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PREFIX_TUNING are not supported"),
        (peft.VeraConfig(target_modules=["q_proj"]), "VERA are not supported"),
    ],
)
def test_adapters_that_are_not_supported_are_refused_in_a_sentence(config, why):
    with pytest.raises(ConfigError, match=why):
        nextn.attach(peft.get_peft_model(make_host("llama"), config), nextn.MultiTokenConfig(n=3))


def test_an_adaption_prompt_under_its_wrapper_is_refused():
    config = peft.AdaptionPromptConfig(adapter_layers=1, adapter_len=2, task_type="CAUSAL_LM")
    base = peft.get_peft_model(make_host("llama"), config).get_base_model()
    with pytest.raises(ConfigError, match="AdaptedAttention of peft"):
        nextn.attach(base, nextn.MultiTokenConfig(n=3))


@pytest.fixture
def base_directory(tmp_path):
    make_host("llama").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def heads_on(base, directory):
    native.save_heads(nextn.attach(base, nextn.MultiTokenConfig(n=3)), directory)
    return directory


def test_adapters_merged_into_the_given_base_are_a_warning(base_directory, tmp_path, caplog):
    heads = heads_on(native.load_base(base_directory), tmp_path / "heads")
    base = peft.get_peft_model(native.load_base(base_directory), lora())
    base.merge_adapter()
    nextn.load(heads, base=base)
    assert "hash differs" in caplog.text


@pytest.mark.parametrize("way", ["peft_model", "two", "off"])
def test_an_adapted_base_has_the_hash_of_its_files(base_directory, tmp_path, way):
    plain = native.load_base(base_directory)
    expected = native.hash_of(plain)
    assert native.hash_of(native.unwrapped(WAYS[way](plain, None))) == expected
    plain.model.layers[0].self_attn.q_proj.base_layer.weight.data += 1
    assert native.hash_of(plain) != expected


def test_active_adapters_that_the_heads_do_not_name_are_a_warning(base_directory, tmp_path, caplog):
    heads = heads_on(native.load_base(base_directory), tmp_path / "heads")
    nextn.load(heads, base=peft.get_peft_model(native.load_base(base_directory), lora()))
    assert "computes with the adapters default, but the heads were trained with none" in caplog.text
    assert "hash differs" not in caplog.text


def test_named_adapters_that_are_switched_off_are_a_warning(base_directory, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    base = peft.get_peft_model(native.load_base(base_directory), lora())
    heads = heads_on(base, tmp_path / "heads")
    nextn.load(heads, base=base)
    assert not caplog.text
    base.base_model.disable_adapter_layers()
    nextn.load(heads, base=base)
    assert "computes with the adapters none, but the heads were trained with default" in caplog.text


def test_heads_saved_with_merged_adapters_know_their_base(base_directory, tmp_path, caplog):
    base = peft.get_peft_model(native.load_base(base_directory), lora())
    model = nextn.attach(base, nextn.MultiTokenConfig(n=3))
    model.save_pretrained(tmp_path / "merged", merge_adapters=True)
    nextn.load(tmp_path / "merged")
    base.merge_adapter()
    nextn.load(tmp_path / "merged", base=base)
    assert not caplog.text


def test_heads_alone_are_not_saved_while_adapters_are_merged_in_place(base_directory, tmp_path):
    base = peft.get_peft_model(native.load_base(base_directory), lora())
    model = nextn.attach(base, nextn.MultiTokenConfig(n=3))
    base.merge_adapter()
    with pytest.raises(ConfigError, match=r"unmerge_adapter\(\) first"):
        native.save_heads(model, tmp_path / "heads")
