"""Check that the weights of a checkpoint are those of the model that its config describes.

transformers fills missing weights with random ones and drops those that it does not know, with a warning at most.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from nextn.formats import FormatError

_INTEGERS = {"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL"}  # as safetensors names them
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A layer after the last one that has these is a module of multi-token prediction (DeepSeek, GLM).
_MTP_LAYER = re.compile(r"(.*\.layers\.\d+)\.(enorm|hnorm|eh_proj|shared_head)\.")

# What layers of published checkpoints carry beside their weights: scales of a quantized KV cache, causal masks and
# rotary frequencies that earlier versions stored as buffers. A forward in the model's own dtype needs none of them.
_NEEDLESS = re.compile(r".*\.((q|k|v|kv|prob)_scale|(attn|self_attn|attention)\.(bias|masked_bias)|inv_freq)")


def check_loaded(base: PreTrainedModel, info: dict[str, Any], name: str) -> None:
    """Compare what was loaded with what the model has.

    Not an error are weights that the model class lists as optional, those outside the trunk (MTP modules, the
    vision part of a model with images, value heads), and what layers do not need (scales of a KV cache, masks, rotary
    frequencies).

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` returns beside the model.

    Raises:
        FormatError: for missing, unexpected or mis-shaped weights, with the first names of each.
    """
    shapes = {key: f"{key} {list(stored)} for {list(expected)}" for key, stored, expected in info["mismatched_keys"]}
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": _trunk_keys(base, sorted(info["unexpected_keys"])),
        "of another shape": [shapes[key] for key in sorted(shapes)],
    }
    if any(wrong.values()):
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for what, keys in wrong.items()
            if keys
        ]
        raise FormatError(
            f"The weights of {name} are not those that its config describes: {'; '.join(parts)}; "
            "download or save the model again."
        )


def _trunk_keys(base: PreTrainedModel, unexpected: list[str]) -> list[str]:
    """The unexpected weights that belong to a module of the trunk or to a layer of it."""
    modules = dict(base.named_modules())
    names = {module: name for name, module in modules.items()}
    decoder, output = names.get(base.get_decoder(), ""), names.get(base.get_output_embeddings(), "")
    mtp_layers = {match[1] + "." for key in unexpected if (match := _MTP_LAYER.match(key))}

    def owner(key: str) -> str:  # the innermost module that the model has
        parts = key.split(".")
        paths = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        return next((path for path in paths if path in modules), "")

    def is_trunk(key: str) -> bool:
        if key.startswith(tuple(mtp_layers)) or _NEEDLESS.fullmatch(key):
            return False
        owners = owner(key), owner(f"{decoder}.{key}")  # a checkpoint of the decoder alone has no prefix
        return any(name == output or name.startswith(f"{decoder}." if decoder else "") for name in owners if name)

    return [key for key in unexpected if is_trunk(key)]


def check_stored_types(base: PreTrainedModel, files: Iterable[Path], name: str) -> None:
    """Refuse weights that are stored as integers without a quantization config: they would be read as numbers.

    Raises:
        FormatError: for such weights, with the first name.
    """
    if getattr(base.config, "quantization_config", None) is not None:
        return
    floating = {key for key, tensor in base.state_dict().items() if tensor.is_floating_point()}
    for file in files:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                dtype = opened.get_slice(key).get_dtype()
                if key in floating and dtype in _INTEGERS:
                    raise FormatError(
                        f"The weights of {name} are integers ({key} is {dtype}), but its config names no "
                        "quantization; take the model in a floating-point or a quantized format of transformers."
                    )


def differs(stored: Tensor, loaded: Tensor) -> bool:
    """Whether a loaded weight is another one than the stored one, in the dtype that it was loaded in.

    Where that cannot be decided (a weight on the meta device, a shard, a quantized one): False.
    """
    if type(loaded.data) is not Tensor or loaded.is_meta or stored.shape != loaded.shape:
        return False
    if not (stored.is_floating_point() and loaded.is_floating_point()):
        return False
    expected = stored.to(loaded.device).to(loaded.dtype)
    same_width = _BITS[loaded.element_size()]  # as integers: NaN equals NaN, and float8 can be compared
    return not torch.equal(expected.contiguous().view(same_width), loaded.detach().contiguous().view(same_width))
