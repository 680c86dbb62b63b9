"""Hosts whose weights are quantized or offloaded: copies of their layers that can be trained, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.quantizers import HfQuantizer

from nextn.adapters import adapter_layers
from nextn.config import ConfigError

_UNITS = 1024  # unit vectors that go through a layer at a time
_HOOK = ("_hf_hook", "_old_forward", "forward")  # what accelerate sets on a module that it moves or offloads


def quantization_method(model: nn.Module) -> str | None:
    """The name of the method that a model was quantized with; None where its weights are plain."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one of floating-point numbers, which an optimizer can change."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.itemsize > 1


def inner_tensors(tensor: Any) -> Iterator[Tensor]:
    """The ordinary tensors that one of a class of its own consists of; an ordinary tensor alone."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from inner_tensors(getattr(tensor, name))


def has_quantized_weights(module: nn.Module) -> bool:
    """Whether some weights of a module are not plain: of another dtype, packed, or of a class of their own."""
    if any(not is_plain(parameter) for parameter in module.parameters()):
        return True
    linear = (part for part in module.modules() if _is_linear(part))
    return any(not is_plain(buffer) for part in linear for buffer in part.buffers())


def trainable_copy(module: nn.Module, kept: dict[int, Any], dtype: torch.dtype) -> nn.Module:
    """A deep copy of a module with plain weights: without quantization, offloading and the hooks of accelerate.

    Args:
        module: a decoder layer or a part of one.
        kept: what is not copied but shared, by its `id`.
        dtype: of weights that are not plain.
    """
    memo = dict(kept)
    for part in module.modules():
        if hasattr(part, "_hf_hook"):
            memo[id(part._hf_hook)] = part._hf_hook  # it holds all offloaded weights of the model
    with evaluating(module), torch.no_grad():
        inside: set[int] = set()
        for part in module.modules():
            if id(part) not in inside and _is_linear(part) and has_quantized_weights(part):
                memo[id(part)] = _plain_linear(part, dtype)
                inside |= {id(each) for each in part.modules()}
    with ExitStack() as stack:
        for part in module.modules():
            if id(part) not in memo and hasattr(part, "_hf_hook") and has_offloaded_params(part):
                stack.enter_context(align_module_device(part))
        copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        for name in _HOOK:
            part.__dict__.pop(name, None)
    return copied


def _is_linear(module: nn.Module) -> bool:
    return isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")


def _plain_linear(module: Any, dtype: torch.dtype) -> nn.Linear:
    """A linear layer that computes what another one does, whatever its class.

    Its weights are what the other one makes of unit vectors; every method of quantization can do that, while few can
    dequantize. Adapters around a quantized layer are merged thereby.
    """
    bias, weights = getattr(module, "bias", None), []
    device = next(tensor.device for tensor in chain(module.parameters(), module.buffers()))
    if has_offloaded_params(module):
        device = torch.device(module._hf_hook.execution_device)
    for start in range(0, module.in_features, _UNITS):
        places = torch.arange(start, min(start + _UNITS, module.in_features), device=device)
        output = module(F.one_hot(places, module.in_features).to(dtype))
        weights.append((output if bias is None else output - bias.to(output)).to(dtype))
    plain = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(torch.cat(weights).T.contiguous())
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype).clone())
    return plain


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for every part of a module, so that nothing is dropped out; afterwards each has its mode back."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def keep_layout(model: nn.Module) -> None:
    """Have 4-bit weights of bitsandbytes stay in the layout that can be trained through and saved.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 repacks weights in their first forward in evaluation mode, for a kernel
    without a backward pass: training would silently miss the gradients that go through these layers. Nor does it put
    them back as they were when they are saved. And transformers does not save what it opened in the form of
    bitsandbytes, since it would convert it back; its layers give their weights in that form already.
    """
    part: Any
    conversions = getattr(model, "_weight_conversions", None)
    if conversions and quantization_method(model) == "bitsandbytes":
        model._weight_conversions = [each for each in conversions if _has_reverse(each)]  # type: ignore[assignment]
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
            _unpack(part)


def _has_reverse(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def _unpack(layer: Any) -> None:
    state: Any = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()  # for which bitsandbytes unpacks them, but for the scales
        if state.absmax.ndim == 2:
            state.absmax = state.absmax.T.reshape(-1).float()


def why_unfit(model: Any) -> str | None:
    """Why a quantized or offloaded host cannot have heads: the end of a sentence that begins with its name.

    Layers may be quantized or offloaded. Embedding, final norm and unembedding are what heads share with the host.
    """
    places = set((getattr(model, "hf_device_map", None) or {}).values()) - {"cpu", "disk"}
    if len(places) > 1:
        names = " and ".join(sorted(str(place) for place in places))
        return f"is spread over devices {names}, while heads need one: load it with device_map={{'': 0}} or 'cpu'"
    shared = {"embedding": model.get_input_embeddings(), "unembedding": model.get_output_embeddings()}
    if hasattr(model.get_decoder(), "norm"):
        shared["final norm"] = model.get_decoder().norm
    for name, module in shared.items():
        if any(has_offloaded_params(part) for part in module.modules()):
            return (
                f"has its {name} offloaded, which heads share: keep it on the device that computes (device_map), and "
                "offload layers only"
            )
        if has_quantized_weights(module):
            return (
                f"has its {name} quantized by {quantization_method(model)}, while heads share it: leave it out of the "
                "quantization"
            )
    return None


@contextmanager
def saving_tensors(model: Any, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Have `save_pretrained` of a quantized model write the tensors that it is given, rather than all it has.

    Raises:
        ConfigError: for a method of quantization that stores tensors in another form.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        yield
        return
    if type(quantizer).get_state_dict_and_metadata is not HfQuantizer.get_state_dict_and_metadata:
        raise ConfigError(
            f"A base with adapters that is quantized by {quantization_method(model)} cannot be saved: save with "
            "heads_only=True, which brings the adapters."
        )
    quantizer.get_state_dict_and_metadata = lambda _model: (tensors, {})
    try:
        yield
    finally:
        del quantizer.get_state_dict_and_metadata


def why_untrainable(model: nn.Module) -> str | None:
    """Why the weights of a host cannot be trained; None where they, or its adapters, can."""
    name = type(model).__name__
    if is_offloaded(model):
        return (
            f"{name} has offloaded layers, which cannot be trained: set freeze_trunk to train heads alone, or load it "
            "without offloading."
        )
    if has_quantized_weights(model) and not adapter_layers(model):
        return (
            f"{name} is quantized by {quantization_method(model)}, so its weights cannot be trained: give it LoRA "
            "adapters (lora in a recipe, peft_config of SFTTrainer, or get_peft_model before attach), or set "
            "freeze_trunk to train heads alone."
        )
    return None


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are in memory only while their layer runs."""
    return any(has_offloaded_params(part) for part in model.modules())


def why_eager(model: nn.Module) -> str | None:
    """Why a model cannot be compiled ahead of time; None where it can, as far as its weights are concerned."""
    if is_offloaded(model):
        return "layers of the base are offloaded"
    return f"the base is quantized by {quantization_method(model)}" if has_quantized_weights(model) else None
