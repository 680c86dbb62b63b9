"""Models of random weights, trunk and heads: where a training from scratch starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from nextn.config import ConfigError, MultiTokenConfig
from nextn.model import MultiTokenModel, attach


def from_scratch(
    shape: dict[str, Any], config: MultiTokenConfig, tokenizer: PreTrainedTokenizerBase
) -> MultiTokenModel:
    """A plain model of random weights and its heads, equal in size to the plain model that `shape` describes.

    Args:
        shape: a config in transformers' terms; the size of the vocabulary and special tokens come from the tokenizer.

    Raises:
        ConfigError: for a shape that transformers cannot build, or too few layers for the heads.
    """
    layered = config.heads == "parallel" and config.head == "transformer"
    layers = shape["num_hidden_layers"] - (config.n - 1 if layered else 0)
    if layers < 1:
        raise ConfigError(
            f"scratch has {shape['num_hidden_layers']} layers, of which {config.n - 1} heads take one each: none is "
            "left for the trunk."
        )
    known = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    settings = known | {"pad_token_id": tokenizer.pad_token_id} | shape | {"num_hidden_layers": layers}
    if settings["vocab_size"] < len(tokenizer):
        raise ConfigError(
            f"scratch.vocab_size is {settings['vocab_size']}, but the tokenizer has {len(tokenizer)} tokens: leave it "
            "out, or make it as large."
        )
    try:
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), trust_remote_code=False)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"scratch cannot be built: {str(error).splitlines()[0]}") from None
    model = attach(base, config)
    randomise(model)
    return model.train()


@torch.no_grad()
def randomise(model: MultiTokenModel) -> None:
    """Random weights for heads, which start as copies of the trunk's last layer, by the host's own rule."""

    def anew(module: nn.Module) -> None:
        parameter: Any
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False  # transformers skips what it has initialised
        model.base._init_weights(module)

    for part in model.heads.children():
        if part is not model.heads.output:
            part.apply(anew)
