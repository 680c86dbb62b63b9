"""Heads on hosts that bitsandbytes quantized, on the CPU: pip install -c constraints.txt -e '.[bitsandbytes]'"""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import nextn
from conftest import CONFIGS, MORE_KINDS, fit, made_up_text, make_tokenizer
from nextn.adapters import adapter_layers
from nextn.config import ConfigError
from nextn.formats import native
from nextn.recipe import Recipe, train

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 9, 11, 7]])
TOGETHER = {"freeze_trunk": False, "weights": {"preset": "deepseek"}}
METHODS = {
    "nf4": tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": tf.BitsAndBytesConfig(load_in_4bit=True),
    "int8": tf.BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A host as wide as the blocks that bitsandbytes quantizes together."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        pytest.fail("bitsandbytes is not installed: pip install -c constraints.txt -e '.[bitsandbytes]'")
    torch.manual_seed(0)
    config = CONFIGS["llama"]()
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    host = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    directory = tmp_path_factory.mktemp("base")
    host.save_pretrained(directory)
    return str(directory)


def opened(base: str, method: str, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_pretrained(base, quantization_config=METHODS[method], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["parallel", "distinct", "recurrent", "eagle3", "shared_kv"])
@pytest.mark.parametrize("method", METHODS)
def test_heads_train_decode_and_are_saved(method, kind, dtype, base, tmp_path):
    host = opened(base, method, dtype)
    model = nextn.attach(host, nextn.MultiTokenConfig(n=3, **MORE_KINDS[kind]))
    before = {name: tensor.clone() for name, tensor in model.heads.state_dict().items()}
    fit(model.train(), 2)
    assert not [name for name, tensor in model.heads.named_parameters() if torch.equal(tensor, before[name])]
    text = model.eval().generate(IDS, max_new_tokens=9)
    assert torch.equal(text, host.generate(IDS, max_new_tokens=9))
    model.save_pretrained(tmp_path / "whole")
    native.save_heads(model, tmp_path / "heads")
    for loaded in (nextn.load(tmp_path / "whole"), nextn.load(tmp_path / "heads", base=opened(base, method, dtype))):
        assert type(loaded.base.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes.")
        assert torch.equal(loaded.generate(IDS, max_new_tokens=9), text)
    nextn.load(tmp_path / "whole").save_pretrained(tmp_path / "again")
    assert torch.equal(nextn.load(tmp_path / "again").generate(IDS, max_new_tokens=9), text)


@pytest.mark.parametrize("method", METHODS)
def test_qlora_trains_adapters_and_heads_with_the_gradients_of_a_dequantized_host(method, base, tmp_path):
    def attached(host):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = nextn.attach(peft.get_peft_model(host, config), nextn.MultiTokenConfig(n=3, recurrent=True, **TOGETHER))
        ids = IDS.repeat(2, 4)
        model(ids, labels=ids)  # a forward in evaluation mode, in which bitsandbytes repacks weights
        model.train()(ids, labels=ids).loss.backward()
        return model

    host = opened(base, method)
    plain = opened(base, method).dequantize(torch.float32)
    model, expected = attached(host), attached(plain)
    trained = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"base", "heads"}
    theirs = dict(expected.named_parameters())
    for name, gradient in trained.items():
        bound = 0.1 if method == "int8" else 1e-3  # int8 rounds the inputs of layers too
        assert (gradient - theirs[name].grad).norm() <= bound * theirs[name].grad.norm(), name
    model.eval().save_pretrained(tmp_path / "apart")
    loaded = nextn.load(tmp_path / "apart")
    assert type(loaded.base.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes.")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=9), model.generate(IDS, max_new_tokens=9))
    model.save_pretrained(tmp_path / "merged", merge_adapters=True)  # which quantizes the sums
    merged = nextn.load(tmp_path / "merged")
    assert not adapter_layers(merged)
    assert (merged(IDS).logits - model(IDS).logits).norm() < 0.5 * model(IDS).logits.norm()


def test_a_host_that_was_repacked_before_is_put_right(base):
    host = opened(base, "fp4").eval()
    with torch.no_grad():
        host(IDS)
    model, fresh = (nextn.attach(each, nextn.MultiTokenConfig(n=3)) for each in (host, opened(base, "fp4")))
    torch.testing.assert_close(model(IDS).logits, fresh(IDS).logits, rtol=0, atol=0.1)


# --- trainers -----------------------------------------------------------------------------------------------------

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def with_heads(host) -> nextn.MultiTokenModel:
    torch.manual_seed(3)
    return nextn.attach(host, nextn.MultiTokenConfig(n=3, recurrent=True, **TOGETHER))


def sft(model, directory, config=None):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments = trl.SFTConfig(
        str(directory), per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2, save_strategy="no",
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": made_up_text(16, 24, seed=7).tolist()}),
        processing_class=make_tokenizer(),
        peft_config=config,
    )


@pytest.mark.parametrize("copied", [None, ["lm_head"]])
@pytest.mark.parametrize("order", ["peft_config", "get_peft_model"])
@pytest.mark.parametrize("method", METHODS)
def test_trl_trains_adapters_and_heads(method, order, copied, base, tmp_path):
    config = peft.LoraConfig(**LORA, modules_to_save=copied)
    if order == "peft_config":
        trainer = sft(with_heads(opened(base, method)), tmp_path / "run", config)
    else:
        trainer = sft(with_heads(peft.get_peft_model(opened(base, method), config)), tmp_path / "run")
    model = trainer.model
    inner = model.get_base_model() if order == "peft_config" else model
    adapted = adapter_layers(inner)
    assert {type(layer).__module__ for layer in adapted.values()} == {"peft.tuners.lora.bnb"}
    assert len(adapted) == 2 * len(inner.base.model.layers)
    trained = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    assert {each.dtype for each in trained.values()} == {torch.float32}
    assert sum("lm_head" in name for name in trained) == len(copied or ())
    trainer.train()
    now = dict(model.named_parameters())
    assert not [name for name, before in trained.items() if torch.equal(now[name], before)]
    assert "loss_3" in trainer.state.log_history[0]

    expected = model.eval()(input_ids=IDS, labels=IDS).depth_losses.detach()
    trainer.save_model(str(tmp_path / "saved"))
    if order == "get_peft_model":
        again = nextn.load(tmp_path / "saved")
    else:
        again = peft.PeftModel.from_pretrained(with_heads(opened(base, method)), tmp_path / "saved").eval()
    torch.testing.assert_close(again(input_ids=IDS, labels=IDS).depth_losses, expected)
    if order == "peft_config":
        merged = model.merge_and_unload()  # which quantizes the sums
        merged.save_pretrained(tmp_path / "merged")
        loaded = nextn.load(tmp_path / "merged")
        torch.testing.assert_close(loaded(IDS, labels=IDS).depth_losses, expected, rtol=0, atol=0.2)
        assert torch.equal(loaded.generate(IDS, max_new_tokens=9), loaded.generate(IDS, max_new_tokens=9, heads=1))


def test_trl_without_adapters_is_refused_before_it_begins(base, tmp_path):
    with pytest.raises(ConfigError, match=r"quantized by bitsandbytes.*peft_config of SFTTrainer"):
        sft(with_heads(opened(base, "nf4")), tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_trains_adapters_and_heads(method, base, tmp_path):
    opened(base, method).save_pretrained(tmp_path / "quantized")
    make_tokenizer().save_pretrained(tmp_path / "quantized")
    (tmp_path / "text.txt").write_text("a line of words. " * 200)
    settings = {
        "base": str(tmp_path / "quantized"),
        "heads": {"n": 3, "recurrent": True, **TOGETHER},
        "data": [str(tmp_path / "text.txt")],
        "length": 64,
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "bf16": False, "disable_tqdm": True},
    }
    with pytest.raises(ConfigError, match=r"quantized by bitsandbytes.*lora in a recipe"):
        train(Recipe(**settings), tmp_path / "refused")
    model = train(Recipe(**settings, lora={"r": 4, "target_modules": ["q_proj"]}), tmp_path / "out")
    loaded = nextn.load(tmp_path / "out")
    assert type(loaded.base.model.layers[0].self_attn.q_proj).__module__.startswith("bitsandbytes.")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
