from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_host
from nextn.formats import FormatError, native


def stored(directory: Path, change=None, config=None, family: str = "llama") -> str:
    """A base whose stored tensors and config are changed by two functions."""
    make_host(family).save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if change is not None:
        tensors = change(tensors) or tensors
    save_file(tensors, path, metadata={"format": "pt"})
    settings = json.loads((directory / "config.json").read_text()) | (config or {})
    (directory / "config.json").write_text(json.dumps(settings))
    return str(directory)


def without(name):
    def change(tensors):
        del tensors[name]

    return change


def having(**added):
    return lambda tensors: tensors.update({name.replace("__", "."): tensor for name, tensor in added.items()})


def test_missing_weights_are_named_and_not_made_up(tmp_path):
    base = stored(tmp_path, without("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(FormatError, match=r"1 missing \(model.layers.1.mlp.up_proj.weight\)"):
        native.load_base(base)


def test_renamed_weights_are_missing_and_unexpected(tmp_path):
    base = stored(tmp_path, lambda tensors: {name.replace("up_proj", "up"): tensor for name, tensor in tensors.items()})
    with pytest.raises(FormatError, match=r"3 missing \(model.layers.0.mlp.up_proj.+3 unexpected \(model.layers.0.mlp"):
        native.load_base(base)


def test_weights_of_another_shape_are_named_with_both(tmp_path):
    base = stored(tmp_path, having(lm_head__weight=torch.ones(70, 32)))
    with pytest.raises(FormatError, match=r"1 of another shape \(lm_head.weight \[70, 32\] for \[64, 32\]\)"):
        native.load_base(base)


@pytest.mark.parametrize(
    ("change", "config", "says"),
    [
        (None, {"num_hidden_layers": 2}, r"9 unexpected \(model.layers.2.input_layernorm.weight, .*, …\)"),
        (having(model__layers__0__self_attn__q_proj__bias=torch.ones(32)), None, "self_attn.q_proj.bias"),
        (having(model__layers__0__self_attn__q_norm__weight=torch.ones(8)), None, "self_attn.q_norm"),
        (having(lm_head__bias=torch.ones(64)), None, "lm_head.bias"),
        (having(model__layers__0__mlp__up_proj__weight_scale=torch.ones(1)), None, "up_proj.weight_scale"),
    ],
    ids=["layers that the config leaves out", "a bias", "a norm", "a bias of the head", "a scale of a weight"],
)
def test_weights_of_the_trunk_that_would_be_dropped_are_an_error(tmp_path, change, config, says):
    with pytest.raises(FormatError, match=says):
        native.load_base(stored(tmp_path, change, config))


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.3.enorm.weight", "model.layers.3.eh_proj.weight", "model.layers.3.self_attn.q_proj.weight"],
        ["mtp.layers.0.self_attn.q_proj.weight", "model.mtp_layers.0.input_proj.weight"],
        ["model.layers.0.self_attn.rotary_emb.inv_freq"],
        ["model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale", "model.layers.1.self_attn.q_scale"],
        ["model.layers.0.self_attn.k_proj.k_scale", "model.layers.0.self_attn.kv_scale"],
        ["model.layers.0.attn.bias", "model.layers.0.attn.masked_bias", "model.layers.0.self_attn.masked_bias"],
        ["model.layers.0.self_attn.inv_freq", "model.layers.0.self_attn.rotary.inv_freq"],
        ["v_head.summary.weight", "visual.patch_embed.proj.weight"],
    ],
    ids=[
        "MTP layers",
        "MTP modules",
        "rotary buffers",
        "scales of a quantized KV cache",
        "scales of earlier quantizers",
        "masks as buffers",
        "frequencies as buffers",
        "other parts",
    ],
)
def test_weights_outside_the_trunk_are_no_error(tmp_path, names, caplog):
    caplog.set_level(logging.WARNING)
    base = native.load_base(stored(tmp_path, having(**{name: torch.ones(4) for name in names})))
    assert base.get_decoder().norm is not None and "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "deepseek_v3"])
def test_whole_checkpoints_open(tmp_path, family):
    native.load_base(stored(tmp_path, family=family))


def test_a_missing_table_is_no_error_where_it_is_tied(tmp_path):
    native.load_base(stored(tmp_path, without("lm_head.weight"), {"tie_word_embeddings": True}))


def test_a_missing_table_is_an_error_where_it_is_not(tmp_path):
    with pytest.raises(FormatError, match=r"1 missing \(lm_head.weight\)"):
        native.load_base(stored(tmp_path, without("lm_head.weight")))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
def test_a_trunk_of_integers_is_refused(tmp_path, dtype):
    def change(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].mul(100).to(dtype)

    with pytest.raises(FormatError, match=r"are integers \(model.layers.1.mlp.up_proj.weight is [IU]"):
        native.load_base(stored(tmp_path, change))
