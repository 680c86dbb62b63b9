"""Adapters of a trunk (peft's LoRA and its kin): added, checked, trained, and told apart from the plain weights.

peft is imported only where a model can have adapters: without it there are none.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel

from nextn.config import ConfigError

HEADS = "heads"  # the heads' name in a MultiTokenModel

# Ways to initialise LoRA that take the adapter's share out of the base weights, so that the base is no longer itself.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def unwrapped(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, with its adapters in place; any other model unchanged.

    Raises:
        ConfigError: for prompt tuning and other methods that do not adapt the weights of layers.
    """
    if sys.modules.get("peft") is None:
        return model
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(model, PeftMixedModel):
        raise ConfigError("A PeftMixedModel cannot be saved by peft: merge its adapters (merge_and_unload) first.")
    if not isinstance(model, PeftModel):
        return model
    if not isinstance(model.base_model, BaseTuner):
        _refuse_kind(model.active_peft_config)
    return model.get_base_model()


def adapter_layers(module: nn.Module) -> dict[str, Any]:
    """The layers of a module that adapters wrap, by name; where one wraps another, the outer one first."""
    if sys.modules.get("peft") is None:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: part for name, part in module.named_modules() if isinstance(part, BaseTunerLayer)}


def whole_copies(module: nn.Module) -> dict[str, Any]:
    """The parts of a module of which adapters have whole copies (peft's `modules_to_save`), by name."""
    if sys.modules.get("peft") is None:
        return {}
    from peft.utils.other import ModulesToSaveWrapper

    return {name: part for name, part in module.named_modules() if isinstance(part, ModulesToSaveWrapper)}


def _active_copy(part: Any) -> str | None:
    """The name of the adapter whose copy of a part is computed with; None where it is the original."""
    active = [] if part.disable_adapters else [name for name in part.active_adapters if name in part.modules_to_save]
    return active[0] if active else None


def check_adapters(base: PreTrainedModel) -> None:
    """Refuse adapters that heads or a saved model would not reproduce.

    Raises:
        ConfigError: for adapters outside the decoder layers other than whole copies of the embedding or unembedding,
            for methods that do not adapt the weights of layers, and for adapters that change weights of the base.
    """
    _check_adapted_modules(base)
    for name, config in base.peft_config.items() if adapter_layers(base) else ():
        if not _is_stored_as_it_is(base, name, config):
            _refuse_kind(config)
        if (bias := getattr(config, "bias", "none")) != "none":
            raise ConfigError(f"The adapter has bias={bias!r}, which changes the base: use bias='none'.")
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
            raise ConfigError(
                f"The adapter has init_lora_weights={start!r}, which changes the base: convert it to a plain LoRA, or "
                "merge it (merge_and_unload), first."
            )


def _check_adapted_modules(base: PreTrainedModel) -> None:
    layers, copies = adapter_layers(base), whole_copies(base)
    inside = tuple(f"{name}." for name in (*layers, *copies))
    shared = base.get_input_embeddings(), base.get_output_embeddings()
    in_decoder = {id(part) for part in base.get_decoder().layers.modules()}
    for name, part in base.named_modules():
        if name in layers and id(part) not in in_decoder:
            raise ConfigError(
                f"{name} has an adapter, but heads share the embedding, final norm and unembedding: leave them out of "
                "target_modules, or merge the adapters (merge_and_unload) first."
            )
        if name in copies and any(part is module for module in shared):
            continue
        if type(part).__module__.startswith("peft.") and name not in layers and not name.startswith(inside):
            raise ConfigError(
                f"{name} is a {type(part).__name__} of peft (by modules_to_save?), which is not supported: adapt "
                "decoder layers, name embedding or unembedding alone in modules_to_save, or merge the adapters "
                "(merge_and_unload) first."
            )
    embedding, unembedding = (getattr(module, "original_module", module) for module in shared)
    if copies and embedding.weight is unembedding.weight:
        raise ConfigError(
            f"{next(iter(copies))} is in modules_to_save, but the base ties its embedding and unembedding, and a copy "
            "of one would leave the other behind: leave it out of modules_to_save."
        )


def _is_stored_as_it_is(base: PreTrainedModel, name: str, config: Any) -> bool:
    """Whether the file of an adapter holds tensors of the model, unchanged and all of them."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if getattr(PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], "uses_shared_state", False):
        return False
    tensors = base.state_dict(keep_vars=True)
    own = {id(tensor) for tensor in tensors.values()}
    return all(id(tensor) in own for tensor in adapter_tensors(base, name, tensors).values())


def _refuse_kind(config: Any) -> NoReturn:
    raise ConfigError(
        f"Adapters of the kind {config.peft_type.value} are not supported: nextn supports adapters of the weights of "
        "decoder layers, such as LoRA."
    )


def add_adapters(base: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Put LoRA adapters into the decoder layers of a model; only they are trained.

    Args:
        settings: the arguments of `peft.LoraConfig`.

    Raises:
        ConfigError: without peft, for settings that it does not take, or for adapters that are not supported.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("lora needs peft: pip install 'nextn[lora]'.") from None
    if adapter_layers(base):  # one of the same name would be lost
        raise ConfigError("lora: the base has adapters already; leave lora out to train these, or merge them first.")
    _check_targets(base, settings.get("target_modules"))
    try:
        inject_adapter_in_model(LoraConfig(**settings), base)
        _check_adapted_modules(base)
    except (TypeError, ValueError) as error:
        if unfit := re.match(r"Target module (\w+)\(.*is not supported", str(error), re.DOTALL):
            raise ConfigError(f"lora: {unfit[1]} cannot be adapted; {_linear_layers(base)}.") from None
        raise ConfigError(f"lora: {str(error).splitlines()[0]}") from None


def _check_targets(base: PreTrainedModel, targets: Any) -> None:
    """Refuse names of modules that the base does not have; peft passes over them as long as one of them is there.

    Args:
        targets: `target_modules` of `peft.LoraConfig`: names, a regular expression, `all-linear`, or None.

    Raises:
        ConfigError: with the names that there are.
    """
    if targets is None or targets == "all-linear":
        return
    modules = [name for name, _ in base.named_modules()]
    if isinstance(targets, str):
        try:
            missing = [] if any(re.fullmatch(targets, name) for name in modules) else [targets]
        except re.error as error:
            raise ConfigError(f"lora: target_modules is no regular expression: {error}.") from None
    elif isinstance(targets, (list, tuple, set)) and targets and all(isinstance(target, str) for target in targets):
        missing = sorted(target for target in targets if not any(f".{name}".endswith(f".{target}") for name in modules))
    else:
        raise ConfigError(f"lora: target_modules is {targets!r}; {_linear_layers(base)}.")
    if missing:
        raise ConfigError(f"lora: the base has no module {', '.join(missing)}; {_linear_layers(base)}.")


def _linear_layers(base: PreTrainedModel) -> str:
    """Advice for `target_modules`: the names of the linear layers of the decoder."""
    layers: Any = base.get_decoder().layers
    names = {name.split(".")[-1] for name, part in layers.named_modules() if hasattr(part, "in_features")}
    return f"name some of its linear layers: {', '.join(sorted(names))}"


def adopt_adapters(model: Any, configs: dict[str, Any]) -> None:
    """Take adapters that peft has put into a whole MultiTokenModel: into the trunk, with the heads trained beside them.

    peft matches names in the heads too, and freezes what has no adapter. Heads get plain layers again and become one of
    the adapter's `modules_to_save`, which peft trains whole and saves and loads with the adapter.

    Args:
        configs: peft's, by the names of the adapters.

    Raises:
        ConfigError: for a trunk that is not to be trained or has adapters already, and for unsupported adapters.
    """
    from peft import inject_adapter_in_model
    from peft.utils.other import set_additional_trainable_modules

    if model.multi_token.freeze_trunk:
        raise ConfigError(
            "Adapters train the trunk, which freeze_trunk=True rules out: attach with freeze_trunk=False."
        )
    if configs is getattr(model.base, "peft_config", None):
        raise ConfigError("The base has adapters already: train these without peft_config, or merge them first.")
    model.base.peft_config = configs
    check_adapters(model.base)
    if not (layers := adapter_layers(model.base)):
        raise ConfigError("The adapters are in the heads alone, which are trained whole: name layers of the trunk.")
    if inner := [name for name in whole_copies(model.heads) if name]:
        raise ConfigError(
            f"modules_to_save names a part of the heads ({inner[0].split('.')[-1]}), which are trained and saved whole "
            "with the adapter: leave it out."
        )
    for name, config in configs.items():
        if getattr(model.base, "is_quantized", False):  # peft took the layers for plain ones: it asks the whole model
            _remove_adapters(model.base)
            exact = copy.deepcopy(config)
            exact.target_modules, exact.layers_to_transform, exact.modules_to_save = set(layers), None, None
            inject_adapter_in_model(exact, model.base, name)
            model.base.peft_config = configs
        if HEADS not in (config.modules_to_save or []):
            _remove_adapters(model.heads)
            config.modules_to_save = [*(config.modules_to_save or []), HEADS]
            set_additional_trainable_modules(model, config, {}, name)


def _remove_adapters(module: nn.Module) -> None:
    """Put the layers that adapters wrap back in their place, as they were before."""
    for name, layer in reversed(adapter_layers(module).items()):  # inner ones first
        module.set_submodule(name, layer.base_layer)


def refuse_adapted_heads(model: Any) -> None:
    """Refuse adapters that peft has added to a whole MultiTokenModel after its first one, and put into the heads.

    Raises:
        ConfigError: where heads have adapters, or have no copy for the active one.
    """
    heads = model.heads
    without = heads in whole_copies(heads).values() and not heads.disable_adapters and _active_copy(heads) is None
    if without or adapter_layers(heads):
        raise ConfigError(
            "An adapter was added that has no heads of its own: attach anew, and give its config "
            "modules_to_save=['heads'] before add_adapter."
        )


def active_adapters(base: PreTrainedModel) -> list[str]:
    """The names of the adapters that a trunk computes with; none where they are switched off."""
    layer = next(iter(adapter_layers(base).values()), None)
    return [] if layer is None or layer.disable_adapters else list(layer.active_adapters)


def set_trained(base: PreTrainedModel, trained: bool) -> None:
    """Let training change all weights of a trunk or, where it has adapters, the active ones alone; or nothing."""
    layers = adapter_layers(base)
    base.requires_grad_(trained and not layers)
    for layer in layers.values():
        if trained and not layer.disable_adapters:
            layer.set_adapter(layer.active_adapters)
    for part in whole_copies(base).values():
        if trained and (active := _active_copy(part)) is not None:
            part.modules_to_save[active].requires_grad_(True)


def merge_adapters(module: nn.Module) -> None:
    """Put plain layers in the place of adapted and copied ones, with the weights that these compute with.

    These are the sums with the active adapters; adapters that are switched off are left out.
    """
    for name, layer in reversed(adapter_layers(module).items()):  # inner ones first
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        elif not layer.disable_adapters and not layer.merged:
            layer.merge()
        module.set_submodule(name, layer.base_layer)
    for name, part in whole_copies(module).items():
        active = _active_copy(part)
        module.set_submodule(name, part.original_module if active is None else part.modules_to_save[active])
    if isinstance(module, PreTrainedModel) and hasattr(module, "peft_config"):
        del module.peft_config
        module._hf_peft_config_loaded = False


def plain_tensors(base: PreTrainedModel, tensors: Mapping[str, Tensor], merged: bool = False) -> dict[str, Tensor]:
    """The tensors of a model by the names that they have without adapters, and without those of the adapters.

    Args:
        tensors: of its state dict.
        merged: with the adapters added to the weights, as `merge_adapters` does it; the model is left as it is.

    Raises:
        ConfigError: where adapters are merged into the base weights in place, so that these are not at hand.
    """
    layers, plain = adapter_layers(base), under_plain_names(base, tensors)
    if not merged:
        refuse_merged(base)
    for name, layer in layers.items() if merged else ():
        if not any(name.startswith(f"{outer}.") for outer in layers):
            holder = nn.ModuleDict({"layer": copy.deepcopy(layer)})
            merge_adapters(holder)
            plain |= {f"{name}.{key}": tensor for key, tensor in holder["layer"].state_dict().items()}
    for name, part in whole_copies(base).items() if merged else ():
        if (active := _active_copy(part)) is not None:
            prefix = f"{name}.modules_to_save.{active}."
            plain |= {f"{name}.{key.removeprefix(prefix)}": tensors[key] for key in tensors if key.startswith(prefix)}
    return plain


def under_plain_names(base: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model without those of its adapters, by the names that they have without adapters.

    Args:
        tensors: by their names in the model.
    """
    layers, copies, plain = adapter_layers(base), whole_copies(base), {}
    for name, tensor in tensors.items():
        if copied := next((part for part in copies if name.startswith(f"{part}.")), None):
            if name.startswith(f"{copied}.original_module."):
                plain[copied + name.removeprefix(f"{copied}.original_module")] = tensor
            continue
        wraps = [layer for layer in layers if name.startswith(f"{layer}.")]
        if all(name.startswith(f"{layer}.base_layer.") for layer in wraps):
            plain[_plain_name(name, wraps)] = tensor
    return plain


def is_merged(base: PreTrainedModel) -> bool:
    """Whether adapters are merged into the weights of a model in place."""
    return any(layer.merged for layer in adapter_layers(base).values())


def refuse_merged(base: PreTrainedModel) -> None:
    """Refuse a model whose adapters are merged in place, so that its own weights are not available.

    Raises:
        ConfigError: for such a model.
    """
    if is_merged(base):
        raise ConfigError(
            "The adapters are merged into the base weights: call unmerge_adapter() first, or save with "
            "merge_adapters=True."
        )


def _plain_name(name: str, wraps: list[str]) -> str:
    for layer in reversed(wraps):  # inner ones first: their names hold those of the outer ones
        name = layer + name.removeprefix(f"{layer}.base_layer")
    return name


def adapter_tensors(base: PreTrainedModel, name: str, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter by their names in peft's files.

    Args:
        tensors: of the model's state dict, where they had to be gathered; default: the model's.
    """
    from peft import get_peft_model_state_dict

    tensors_by_key = get_peft_model_state_dict(  # "auto" would ask the hub
        base, state_dict=tensors, adapter_name=name, save_embedding_layers=False
    )
    return {f"base_model.model.{key}": tensor for key, tensor in tensors_by_key.items()}


def insert_adapter(base: PreTrainedModel, name: str, config: Any) -> None:
    """Put an adapter of a `PeftConfig` into a model, without values yet."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, base, name)
    base._hf_peft_config_loaded = True  # transformers' own switches (set_adapter, disable_adapters) ask for it


def set_adapter_tensors(base: PreTrainedModel, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter its tensors, in their dtype; whole copies of embeddings keep the dtype of the base.

    Args:
        tensors: by their names in peft's files.

    Raises:
        ValueError: where they are not those of the adapter.
    """
    own = adapter_tensors(base, name, base.state_dict(keep_vars=True))
    wrong = sorted(own.keys() ^ tensors.keys()) or sorted(key for key in own if own[key].shape != tensors[key].shape)
    if wrong:
        raise ValueError(f"first difference: {wrong[0]}")
    copies = tuple(f"base_model.model.{part}." for part in whole_copies(base))
    for key, parameter in own.items():
        dtype = parameter.dtype if key.startswith(copies) else tensors[key].dtype
        parameter.data = tensors[key].to(parameter.device, dtype)


def activate_adapters(base: PreTrainedModel, names: list[str]) -> None:
    """Let a trunk compute with some of its adapters and no other ones; nothing is trained."""
    for layer in adapter_layers(base).values():
        if names:
            layer.set_adapter(names, inference_mode=True)
        else:
            layer.enable_adapters(False)
    for part in whole_copies(base).values():
        if names:
            part.set_adapter([name for name in names if name in part.modules_to_save], inference_mode=True)
        else:
            part.enable_adapters(False)
