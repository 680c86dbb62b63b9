"""Quantized and offloaded hosts: heads are trained on them and decode, or one sentence says why not.

Stand-ins have the parts that each method of quantization leaves in a layer; `real/test_bitsandbytes.py` has a real one.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

import nextn
from conftest import MORE_KINDS, fit, make_host
from nextn.config import ConfigError
from nextn.quantized import quantization_method
from nextn.trunk import HostError, Trunk

IDS = torch.tensor([[5, 9, 11, 7]])
KINDS = {name: MORE_KINDS[name] for name in ("parallel", "distinct", "recurrent", "eagle3", "shared_kv")}


class PackedLinear(nn.Module):
    """As GPTQ and AWQ leave a layer: packed integers and scales in buffers, and no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(dim=1) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales[:, None]).round().to(torch.int32))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.linspace(-0.1, 0.1, self.out_features))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, (self.qweight * self.scales[:, None]).to(states.dtype), self.bias.to(states.dtype))


class Float8Linear(nn.Linear):
    """As the FP8 methods leave a layer: a weight of one byte, and a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax() / 448
        self.weight = nn.Parameter((linear.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.weight.to(states.dtype) * self.weight_scale_inv.to(states.dtype))


class OpaqueMlp(nn.Module):
    """As MXFP4 leaves experts: parameters of bytes in a module that is not linear."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
        self.inner = [mlp]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner[0](states)


METHODS = {"gptq": PackedLinear, "fp8": Float8Linear}


def quantized(method: str, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    host = make_host("llama").to(dtype)
    for name, part in list(host.model.layers.named_modules()):
        if isinstance(part, nn.Linear):
            host.model.layers.set_submodule(name, METHODS[method](part))
    host.config.quantization_config = {"quant_method": method}
    return host


def offloaded(tmp_path, **places) -> tf.PreTrainedModel:
    """The layers on disk, the rest in memory."""
    make_host("llama").save_pretrained(tmp_path / "base")
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{place}": "disk" for place in range(3)}
    return tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=parts | places, offload_folder=tmp_path / "offloaded"
    )


def assert_trains_and_decodes(model: nextn.MultiTokenModel) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert before.keys() == {f"heads.{name}" for name, _ in model.heads.named_parameters()}, "all of the heads"
    assert all(parameter.dtype == torch.float32 for parameter in before.values())
    fit(model.train(), 2)
    assert not [
        name for name, parameter in model.named_parameters() if name in before and parameter.equal(before[name])
    ]
    text = model.eval().generate(IDS, max_new_tokens=9)
    assert torch.equal(text, model.base.generate(IDS, max_new_tokens=9))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_heads_train_and_decode_on_a_quantized_host(method, kind):
    assert_trains_and_decodes(nextn.attach(quantized(method), nextn.MultiTokenConfig(n=3, **KINDS[kind])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_heads_start_from_the_weights_that_a_quantized_layer_computes_with(method, dtype):
    host = quantized(method, dtype)
    layer, theirs = Trunk(host).new_layer(), host.model.layers[-1]
    for name, part in layer.named_modules():
        if isinstance(part, nn.Linear):
            states = torch.randn(5, part.in_features, dtype=dtype)
            assert type(part) is nn.Linear and part.weight.requires_grad and part.weight.dtype == dtype
            torch.testing.assert_close(part(states), theirs.get_submodule(name)(states), rtol=2e-2, atol=2e-2)
    assert type(theirs.mlp.up_proj) is METHODS[method], "the host is left as it is"


def test_the_adapters_of_a_quantized_layer_are_merged_into_heads():
    peft = pytest.importorskip("peft")
    host = make_host("llama")
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False, lora_dropout=0.5)
    peft.inject_adapter_in_model(config, host.train())
    adapted = host.model.layers[-1].mlp.up_proj
    adapted.base_layer = Float8Linear(adapted.base_layer)
    copied = Trunk(host).new_layer().mlp.up_proj
    states = torch.randn(5, adapted.in_features)
    torch.testing.assert_close(copied(states), adapted.eval()(states), rtol=1e-4, atol=1e-4)


def test_layers_that_cannot_be_copied_are_refused_and_other_kinds_work():
    host = quantized("fp8")
    host.config.quantization_config = {"quant_method": "mxfp4"}
    host.model.layers[-1].mlp = OpaqueMlp(host.model.layers[-1].mlp)
    for kind in ("parallel", "recurrent"):
        with pytest.raises(HostError, match="decoder layers quantized by mxfp4 in a way that heads cannot be copied"):
            nextn.attach(host, nextn.MultiTokenConfig(n=3, **KINDS[kind]))
    for kind in ("eagle3", "shared_kv"):
        assert_trains_and_decodes(nextn.attach(host, nextn.MultiTokenConfig(n=3, **KINDS[kind])))


def test_a_quantized_unembedding_is_refused():
    host = quantized("gptq")
    host.lm_head = PackedLinear(host.lm_head)
    with pytest.raises(HostError, match="unembedding quantized by gptq, while heads share it"):
        nextn.attach(host, nextn.MultiTokenConfig(n=3))


def test_quantized_weights_are_not_trained_without_adapters(tmp_path, caplog):
    config = nextn.MultiTokenConfig(n=3, freeze_trunk=False, weights={"preset": "deepseek"})
    model = nextn.attach(quantized("gptq"), config)
    assert "quantized by gptq, so its weights cannot be trained" in caplog.text
    arguments = tf.TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}]
    for start in (
        model.train,
        lambda: nextn.Trainer(model=model, args=arguments, train_dataset=rows),
        lambda: tf.Trainer(model=model, args=arguments, train_dataset=rows),
    ):
        with pytest.raises(ConfigError, match=r"quantized by gptq.*LoRA"):
            start()


def test_the_step_of_a_quantized_host_runs_eagerly_and_says_so():
    model = nextn.attach(quantized("fp8"), nextn.MultiTokenConfig(n=3))
    assert model.engine().compile().why_eager == "the base is quantized by fp8"


@pytest.mark.parametrize("config", [None, {"quant_method": "awq"}, tf.BitsAndBytesConfig(load_in_4bit=True)])
def test_the_method_of_quantization_is_named(config):
    host = copy.deepcopy(make_host("llama"))
    host.config.quantization_config = config
    assert quantization_method(host) == (config and getattr(config, "quant_method", "awq"))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_train_and_decode_on_offloaded_layers_as_on_others(kind, tmp_path):
    def attached(host):
        torch.manual_seed(1)
        return nextn.attach(host, nextn.MultiTokenConfig(n=3, **KINDS[kind]))

    host = offloaded(tmp_path)
    assert host.model.layers[-1].mlp.up_proj.weight.is_meta
    model, plain = attached(host), attached(make_host("llama"))
    for name, tensor in plain.heads.state_dict().items():
        assert torch.equal(model.heads.state_dict()[name], tensor), name
    assert not [part for part in model.heads.modules() if hasattr(part, "_hf_hook")]
    assert_trains_and_decodes(model)
    model.save_pretrained(tmp_path / "saved")
    again = nextn.load(tmp_path / "saved")
    assert torch.equal(again.generate(IDS, max_new_tokens=9), model.generate(IDS, max_new_tokens=9))


@pytest.mark.parametrize("trainer_class", [nextn.Trainer, tf.Trainer])
def test_trainers_leave_offloaded_layers_where_they_are(trainer_class, tmp_path):
    model = nextn.attach(offloaded(tmp_path), nextn.MultiTokenConfig(n=3))
    arguments = tf.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    trainer_class(model=model, args=arguments, train_dataset=rows).train()
    assert model.base.model.layers[-1].mlp.up_proj.weight.is_meta


def test_what_heads_share_with_the_host_must_not_be_offloaded(tmp_path):
    with pytest.raises(HostError, match=r"unembedding offloaded, which heads share: keep it on the device"):
        nextn.attach(offloaded(tmp_path, lm_head="disk"), nextn.MultiTokenConfig(n=3))


def test_offloaded_layers_are_not_trained_or_compiled(tmp_path):
    host = offloaded(tmp_path)
    with pytest.raises(ConfigError, match="offloaded layers, which cannot be trained"):
        nextn.attach(host, nextn.MultiTokenConfig(n=3, freeze_trunk=False, weights={"preset": "deepseek"}))
    model = nextn.attach(host, nextn.MultiTokenConfig(n=3))
    assert model.engine().compile().why_eager == "layers of the base are offloaded"


def test_a_host_on_several_devices_is_refused():
    host = make_host("llama")
    host.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}
    with pytest.raises(HostError, match="is spread over devices 0 and 1, while heads need one"):
        nextn.attach(host, nextn.MultiTokenConfig(n=3))


def test_an_attention_without_masks_is_refused():
    host = make_host("llama")
    host.config._attn_implementation = "flash_attention_2"
    with pytest.raises(HostError, match=r"uses attn_implementation='flash_attention_2'.*set_attn_implementation"):
        nextn.attach(host, nextn.MultiTokenConfig(n=3))
    host.set_attn_implementation("sdpa")
    nextn.attach(host, nextn.MultiTokenConfig(n=3))
