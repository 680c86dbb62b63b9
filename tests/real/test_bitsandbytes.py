"""Heads on hosts that bitsandbytes quantized, on the CPU: pip install -c constraints.txt -e '.[bitsandbytes]'"""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import nextn
from conftest import CONFIGS, MORE_KINDS, fit
from nextn.adapters import adapter_layers
from nextn.formats import native

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
