"""LoRA adapters of a trunk (peft): put in, named, and merged into plain weights at the end."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from nextn.config import ConfigError


def add_adapters(base: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Put LoRA adapters into the decoder layers of a model; only they are trained.

    Args:
        settings: the arguments of `peft.LoraConfig`.

    Raises:
        ConfigError: without peft, for settings that it does not take, or for adapters of the embedding or unembedding,
            which heads share with the trunk.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("lora needs peft: pip install 'nextn[lora]'.") from None
    if settings.get("modules_to_save"):
        raise ConfigError("lora: modules_to_save is not supported; train all weights, or adapters alone.")
    tables = base.get_input_embeddings(), base.get_output_embeddings()
    try:
        inject_adapter_in_model(LoraConfig(**settings), base)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: {str(error).splitlines()[0]}") from None
    if (base.get_input_embeddings(), base.get_output_embeddings()) != tables:
        raise ConfigError("lora: target_modules has the embedding or the unembedding, which heads share; leave it out.")


def adapter_names(base: PreTrainedModel) -> list[str]:
    """The adapters of a trunk by name; none where there are no adapters."""
    if not any("lora_" in name for name, _ in base.named_parameters()):
        return []
    return [name for name, parameter in base.named_parameters() if parameter.requires_grad]


def merge_adapters(base: PreTrainedModel) -> None:
    """Add the adapters of a trunk to its weights, and put the plain layers back."""
    for name, module in list(base.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
            base.set_submodule(name, module.base_layer)
