"""Tiny random hosts of every causal-LM family of transformers: `build(name)` makes one of `NAMES`.

A name is a model type of the causal-LM mapping of transformers ("llama"), a multimodal class ("llava"), or a variant of
a family whose defaults leave a feature out ("falcon:alibi"). Four layers of width 64, a vocabulary of 256 and windows
of 8 tokens, so that short texts already leave the window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

Fields = dict[str, Any]  # of a config; `...` as a value leaves a field at the default of its class

VOCAB, WINDOW, CONTEXT = 256, 8, 256
SLIDING, FULL = "sliding_attention", "full_attention"
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def rope(theta: float = 1e4, kind: str = "default", **fields: Any) -> Fields:
    return {"rope_type": kind, "rope_theta": theta, **fields}


def same(value: Any, names: str) -> Fields:
    """One value for several fields."""
    return dict.fromkeys(names.split(), value)


# --- sizes of the fields that many configs have ---------------------------------------------------------------------

SIZES: Fields = {
    **SPECIAL,
    "vocab_size": VOCAB,
    **same(64, "hidden_size n_embd d_model emb_dim embedding_size embedding_dim lru_width"),
    **same(96, "intermediate_size ffn_dim dff d_inner n_inner dim_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size"),
    **same(96, "intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size"),
    **same(32, "expert_ffn_hidden_size shared_intermediate_size moe_intermediate_size shared_expert_intermediate_size"),
    **same(32, "shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
    **same(4, "num_hidden_layers n_layer n_layers num_layers"),
    **same(3, "decoder_layers encoder_layers"),
    **same(4, "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads attention_heads"),
    **same(2, "num_key_value_heads"),
    **same(16, "head_dim dim_head kv_channels d_head"),
    **same(CONTEXT, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions"),
    **same(CONTEXT, "original_max_position_embeddings model_max_length"),
    **same(WINDOW, "sliding_window attention_window_size sliding_window_size window_size"),
    # experts
    **same(4, "n_routed_experts num_experts num_local_experts moe_num_experts"),
    **same(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"),
    **same(1, "n_shared_experts num_shared_experts n_group topk_group num_expert_group"),
    **same(1, "num_dense_layers first_k_dense_replace"),
    # compressed, selected, linear and chunked attention
    **same(16, "kv_lora_rank q_lora_rank v_head_dim o_lora_rank index_head_dim attention_chunk_size"),
    **same(8, "qk_nope_head_dim qk_rope_head_dim index_topk rotary_dim"),
    **same(2, "index_n_heads o_groups"),
    **same(16, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    **same(2, "linear_num_key_heads"),
    **same(4, "linear_num_value_heads linear_num_heads"),
    # state spaces
    **same(16, "mamba_d_state mamba_d_head mamba_head_dim ssm_state_size mamba_chunk_size chunk_size state_size"),
    **same(8, "mamba_n_heads mamba_num_heads mamba_dt_rank time_step_rank"),
    **same(1, "mamba_n_groups n_groups"),
    # no randomness
    **same(0.0, "hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout attention_dropout activation_dropout"),
    **same(0.0, "hidden_dropout_prob attention_probs_dropout_prob residual_dropout embed_dropout embedding_dropout"),
    **same(0.0, "mlp_dropout layerdrop decoder_layerdrop router_jitter_noise input_jitter_noise dropout_p"),
}
# Where the default is None the feature is off, and it stays off.
SWITCHES = same(
    None,
    "sliding_window window_size q_lora_rank n_routed_experts num_experts num_experts_per_tok n_shared_experts"
    " ffn_hidden_size n_group topk_group top_k_experts moe_intermediate_size",
)
LAYER_LISTS = "layer_types", "mlp_layer_types", "block_types", "layers_block_type", "indexer_types"
VISION_SIZES: Fields = {
    **same(32, "hidden_size embed_dim intermediate_size vision_output_dim projector_input_dim mlp_dim"),
    **same(64, "out_hidden_size output_dim projection_dim projector_output_dim"),
    **same(1, "num_hidden_layers depth num_global_layers embed_num_layers num_blocks max_num_tiles"),
    **same(2, "num_attention_heads num_heads num_key_value_heads attention_heads"),
    **same(16, "num_position_embeddings output_channels"),
    **same([0], "fullatt_block_indexes deepstack_visual_indexes global_attn_indexes intermediate_layers_indices"),
    "num_channels": 3,
    "image_size": 28,
    "patch_size": 14,
    "supported_aspect_ratios": [[1, 1]],
}


def _shortened(kinds: list[str], layers: int = 4) -> list[str]:
    """A pattern of so few layers that has each kind of the long one, and ends as that does."""
    distinct = list(dict.fromkeys(kinds))
    return [distinct[layer % len(distinct)] for layer in range(layers - 1)] + [kinds[-1]]


def shrink(config_class: type[PreTrainedConfig], fields: Fields) -> PreTrainedConfig:
    """A tiny config: `SIZES` for the fields that the class has, then `fields`."""
    default = config_class().to_dict()
    tiny = {
        name: size
        for name, size in SIZES.items()
        if name in default and not (default[name] is None and name in SWITCHES)
    }
    if "kv_lora_rank" in default:  # compressed attention: no groups, and a width that follows from its parts
        tiny.pop("head_dim", None)
        if default.get("num_key_value_heads") in (default.get("num_attention_heads"), None):
            tiny.pop("num_key_value_heads", None)
        if default.get("num_key_value_heads") is not None and "num_key_value_heads" not in tiny:
            tiny["num_key_value_heads"] = 4
    if default.get("sliding_window") == 0:
        tiny.pop("sliding_window", None)
    tiny |= {name: _shortened(default[name]) for name in LAYER_LISTS if isinstance(default.get(name), list)}
    return config_class(**{name: value for name, value in (tiny | fields).items() if value is not ...})


# --- families whose config needs more than sizes --------------------------------------------------------------------

ROPES = {FULL: rope(1e6), SLIDING: rope()}
DECODER = {"is_decoder": True}
BERT_LIKE = (
    "bert bert-generation camembert data2vec-text electra ernie megatron-bert roberta roberta-prelayernorm roformer"
    " xlm-roberta xlm-roberta-xl bart mbart mvp pegasus plbart blenderbot blenderbot-small trocr whisper"
)
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625}
GRANITE_MOE = GRANITE | {"logits_scaling": 6.0}
LLAMA4 = {
    "interleave_moe_layer_step": 2,
    "moe_layers": ...,
    "layer_types": ...,
    "no_rope_layers": ...,
    "num_experts_per_tok": 1,
}
GEMMA3N = {
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0],
    "altup_num_inputs": 2,
}
GEMMA4_PLAIN = {
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "per_layer_config": ...,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 0,
}
GEMMA4_MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
YARN = rope(kind="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=32, beta_slow=1)
MINISTRAL_YARN = {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
LONGROPE = rope(kind="longrope", factor=4.0, short_factor=[1.0] * 8, long_factor=[2.0] * 8)
QWEN4_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}

FAMILIES: dict[str, Fields] = {
    **same(DECODER, BERT_LIKE),
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": DECODER | {"attention_type": "original_full"},
    "bigbird_pegasus": DECODER | {"attention_type": "original_full"},
    "cohere2_moe": {"rms_norm_eps": 1e-5},
    "cohere_compass_text": {
        "rope_parameters": ROPES,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "logit_scale": 0.25,
    },
    "cpmant": {
        "prompt_length": 4,
        "position_bias_num_buckets": 32,
        "position_bias_max_distance": 64,
        "prompt_types": 4,
        "segment_types": 4,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        "num_key_value_heads": ...,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_routed_experts": 4},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
        "layer_types": [FULL, FULL, SLIDING, SLIDING],
    },
    "falcon": {"num_kv_heads": 1, "rope_parameters": ...},
    "falcon_h1": {"mamba_d_ssm": 128},
    "falcon_mamba": {"intermediate_size": ...},
    "gemma2": {"query_pre_attn_scalar": 16, "rope_parameters": ...},
    "gemma3_text": {"query_pre_attn_scalar": 16, "rope_parameters": ROPES},
    "gemma3n_text": GEMMA3N,
    "gemma4_text": GEMMA4_PLAIN | {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"layer_types": [SLIDING, FULL, SLIDING, FULL], "per_layer_config": ...},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_heads": 4},
    "gpt_neox": {"rope_parameters": rope(partial_rotary_factor=0.25)},
    "granite": GRANITE | {"logits_scaling": 8.0},
    "granite_swa": GRANITE | {"logits_scaling": 8.0, "layer_rope_theta": [1e4] * 4},
    "granitemoe": GRANITE_MOE,
    "granitemoe_swa": GRANITE_MOE | {"layer_rope_theta": [1e4] * 4},
    "granitemoehybrid": GRANITE_MOE | {"layer_types": ["linear_attention", "linear_attention", FULL, FULL]},
    "granitemoeshared": GRANITE_MOE,
    "hrm_text": {"num_hidden_layers": 12, "num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 2},
    "hyperclovax": GRANITE | {"logits_scaling": 8.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "jetmoe": {"num_attention_heads": ...},
    "kimi_linear": {"layer_types": ["linear_attention"] * 3 + [FULL]},
    "laguna": {"num_attention_heads_per_layer": [4] * 4, "layer_types": [FULL, SLIDING, SLIDING, FULL]},
    "lfm2": {"layer_types": ["conv", FULL, "conv", FULL], "full_attn_idxs": ..., "block_multiple_of": 16},
    "lfm2_moe": {"layer_types": ["conv", FULL, "conv", FULL]},
    "lfm3": {"layer_types": ["conv", SLIDING, "conv", FULL]},
    "llama4_text": LLAMA4 | {"floor_scale": 16},
    "longcat_flash": {"zero_expert_num": 2, "num_layers": 2, "head_dim": 8, "num_key_value_heads": 4},
    "mamba": {"intermediate_size": ...},
    "mamba2": {"num_heads": 8, "expand": 2},
    "marian": DECODER | {"decoder_vocab_size": VOCAB},
    "mellum": {"layer_types": [SLIDING, SLIDING, SLIDING, FULL]},
    "mimo_v2_flash": {"layer_types": [FULL, SLIDING, SLIDING, FULL]},
    "minicpm3": {"dim_model_base": 32},
    "minimax": {"block_size": 16},
    "ministral3": {
        "rope_parameters": YARN
        | {"rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16}
        | MINISTRAL_YARN
    },
    "mixtral": {"sliding_window": WINDOW},
    "modernbert-decoder": {"local_attention": 16, "layer_types": [FULL, SLIDING, SLIDING, FULL]},
    "mpt": {"expansion_ratio": 2},
    "nemotron": {"head_dim": 16},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", FULL, "mlp"]},
    "opt": {"word_embed_proj_dim": 64},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": {"sliding_window": WINDOW},
    "prophetnet": DECODER
    | {
        "num_encoder_layers": 3,
        "num_decoder_layers": 3,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "add_cross_attention": False,
    },
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        "layer_types": [FULL, SLIDING, SLIDING, SLIDING],
    },
    "qwen3": {"tie_word_embeddings": True},
    "qwen4_exp_text": QWEN4_INDEXER | {"layer_types": ["linear_attention", FULL] * 2},
    "recurrent_gemma": {
        "block_types": ["recurrent", "recurrent", "attention"],
        "head_dim": ...,
        "num_key_value_heads": 4,
    },
    "reformer": DECODER
    | {
        "attn_layers": ["local", "local", "local"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": 16,
        "attention_head_size": 16,
        "feed_forward_size": 96,
        "num_hidden_layers": 3,
    },
    "rembert": DECODER | {"input_embedding_size": 32, "output_embedding_size": 48},
    "roc_bert": DECODER
    | {
        "pronunciation_vocab_size": 32,
        "shape_vocab_size": 32,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "rwkv": {"attention_hidden_size": 64},
    "smollm3": {"no_rope_layers": ..., "layer_types": ...},
    "starcoder2": {"sliding_window": WINDOW},
    "vaultgemma": {"query_pre_attn_scalar": 16},
    "xlm": {"causal": True, "is_encoder": False},
    "xlstm": {
        "qk_dim_factor": 1.0,
        "num_heads": 4,
        "num_blocks": 2,
        "num_hidden_layers": 2,
        "chunk_size": 64,
        "max_inference_chunksize": ...,
    },
    "xmod": DECODER | {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "head_dim": ...,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "n_mamba_heads": 8,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention"],
        **same(
            ..., "attention_hidden_size attention_head_dim mamba_headdim kv_channels num_query_groups hybrid_layer_ids"
        ),
    },
    "zaya": {"router_hidden_size": 32, "num_experts_per_tok": 1},
}

# Features that the defaults of a family leave out: name -> model type, fields.
VARIANTS: dict[str, tuple[str, Fields]] = {
    "cohere2:scale1": ("cohere2", {"logit_scale": 1.0}),
    "deepseek_v2:yarn": (
        "deepseek_v2",
        FAMILIES["deepseek_v2"] | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "falcon:alibi": ("falcon", {"alibi": True, "num_kv_heads": 4, "multi_query": False}),
    "falcon:new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma2:attncap": (
        "gemma2",
        FAMILIES["gemma2"] | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": None},
    ),
    "gemma2:finalcap": ("gemma2", FAMILIES["gemma2"] | {"final_logit_softcapping": 5.0}),
    "gemma2:uncapped": (
        "gemma2",
        FAMILIES["gemma2"] | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3_text:softcap": ("gemma3_text", FAMILIES["gemma3_text"] | {"final_logit_softcapping": 3.0}),
    "gemma4_text:dense": ("gemma4_text", GEMMA4_PLAIN | {"final_logit_softcapping": 30.0}),
    "gemma4_text:keqv": ("gemma4_text", GEMMA4_PLAIN | {"attention_k_eq_v": True}),
    "gemma4_text:moe": ("gemma4_text", GEMMA4_PLAIN | GEMMA4_MOE | {"final_logit_softcapping": 30.0}),
    "gemma4_text:ple": ("gemma4_text", GEMMA4_PLAIN | {"hidden_size_per_layer_input": 16}),
    "gemma4_text:shared": ("gemma4_text", GEMMA4_PLAIN | {"num_kv_shared_layers": 2}),
    "gpt_bigcode:mha": ("gpt_bigcode", {"multi_query": False, "num_key_value_heads": ...}),
    "granite:unscaled": ("granite", GRANITE | {"logits_scaling": 1.0}),
    "llama:dynamic": ("llama", {"rope_parameters": rope(kind="dynamic", factor=2.0)}),
    "llama:short": ("llama", {"max_position_embeddings": 128}),
    "llama4_text:notune": ("llama4_text", LLAMA4 | {"attn_temperature_tuning": False}),
    "minicpm3:base": ("minicpm3", {"dim_model_base": 64}),
    "mixtral:full": ("mixtral", {"sliding_window": None}),
    "opt:350m": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "phi3:longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 128,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 1.0},
        },
    ),
    "phimoe:longrope": (
        "phimoe",
        {
            "original_max_position_embeddings": ...,
            "rope_parameters": LONGROPE
            | {"short_mscale": 1.2, "long_mscale": 1.3, "original_max_position_embeddings": 128},
        },
    ),
    "qwen2:full": ("qwen2", {"layer_types": [FULL] * 4, "tie_word_embeddings": True}),
    "qwen3_next:full": ("qwen3_next", {"layer_types": [FULL] * 4}),
    "stablelm:parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
}


# --- configs made of several ----------------------------------------------------------------------------------------

PLAIN = SPECIAL | {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURE = VISION | {"image_size": 28, "patch_size": 14}
SIGLIP = PICTURE | {"model_type": "siglip_vision_model"}
# Ids past the vocabulary: no text of ours contains them.
IMAGE, VIDEO, AUDIO, START, END, MORE = 1250, 1251, 1247, 1252, 1253, 1254
QWEN_IMAGES = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
GEMMA_MEDIA = {
    "boi_token_id": START,
    "eoi_token_id": END,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "boa_token_id": 1249,
    "eoa_token_index": 1248,
    "audio_token_id": AUDIO,
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    return shrink(CONFIG_MAPPING[model_type], FAMILIES.get(model_type, {}))


def nested(model_type: str, text: str | Fields, vision: Fields | None = None, **fields: Any) -> PreTrainedConfig:
    """The config of a multimodal class around a text model.

    Args:
        text: a model type of `FAMILIES`, or the fields of the class's own text config.
        vision: changes to the tiny vision config; None leaves the default of the class.
    """
    config_class: Any = CONFIG_MAPPING[model_type]
    parts = {"text_config": tiny_config(text).to_dict() if isinstance(text, str) else text}
    if vision is not None:
        part = config_class.sub_configs["vision_config"]
        default = {} if part.__name__ == "AutoConfig" else part().to_dict()
        parts["vision_config"] = {name: size for name, size in VISION_SIZES.items() if name in default} | vision
    return config_class(**parts, **fields)


def _qwen_vl(model_type: str, sections: list[int], **text: Any) -> PreTrainedConfig:
    fields = PLAIN | {"rope_parameters": rope(mrope_section=sections)} | text
    return nested(model_type, fields, {}, **QWEN_IMAGES)


def _assistant(model_type: str, text: str) -> PreTrainedConfig:
    """Gemma 4's drafter: each of its layers reads keys of the model that it drafts for."""
    fields = FAMILIES[text]
    if text == "gemma4_text":
        fields = fields | {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 4,
        }
    config: Any = CONFIG_MAPPING[model_type]
    return config(text_config=shrink(CONFIG_MAPPING[text], fields), backbone_hidden_size=64)


def _blt() -> PreTrainedConfig:
    common = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    small = common | {"vocab_size": VOCAB + 4, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    inner = small | {"hidden_size_global": 64, "cross_attn_k": 2}
    config: Any = CONFIG_MAPPING["blt"]
    return config(
        vocab_size=VOCAB + 4,
        max_position_embeddings=CONTEXT,
        patch_in_forward=True,
        patcher_config=small,
        encoder_config=inner,
        decoder_config=inner | {"num_hidden_layers": 2},
        global_config=common | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96},
        encoder_hash_byte_group_vocab=64,
        encoder_hash_byte_group_size=[3, 4],
    )


def _music(model_type: str) -> PreTrainedConfig:
    part: Any = CONFIG_MAPPING[model_type].sub_configs["decoder"]
    return part(**PLAIN | {"num_hidden_layers": 2, "ffn_dim": 96, "num_codebooks": 1})


def _phi4_multimodal() -> PreTrainedConfig:
    vision = PICTURE | {"crop_size": 28, "image_token_id": IMAGE, "feature_layer": -1}
    audio = {
        **same(
            32, "hidden_size intermediate_size ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels"
        ),
        "num_blocks": 1,
        "num_attention_heads": 2,
        "audio_token_id": VIDEO,
        "input_size": 16,
    }
    return shrink(CONFIG_MAPPING["phi4_multimodal"], {"vision_config": vision, "audio_config": audio})


def _moshi() -> PreTrainedConfig:
    config: Any = CONFIG_MAPPING["moshi"]
    return config(
        **PLAIN | {"num_hidden_layers": 3, "num_key_value_heads": 4, "head_dim": 16, "ffn_dim": 96},
        sliding_window=WINDOW,
        audio_vocab_size=16,
        depth_decoder_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32},
        audio_encoder_config={"model_type": "mimi"},
    )


def _dots3_note() -> PreTrainedConfig:
    adapter = VISION | {"adapter_in_dim": 32, "adapter_out_dim": 64, "per_layer_config": {}}
    audio = VISION | {"adapter_input_size": 32, "adapter_out_dim": 64, "downsample_hidden_size": 16}
    return nested("dots3_note", "dots3_note_text", vision_config=adapter, audio_config=audio)


def _emu3() -> PreTrainedConfig:
    pictures = {"codebook_size": 16, "embed_dim": 4, "base_channels": 32, "channel_multiplier": [1], "hidden_size": 32}
    return nested(
        "emu3",
        PLAIN | {"num_hidden_layers": 3},
        vq_config=pictures | {"num_res_blocks": 1, "attn_resolutions": []},
        vocabulary_map={"<image>": IMAGE},
        image_token_id=IMAGE,
    )


def _glm4v() -> PreTrainedConfig:
    text = PLAIN | {"rope_parameters": rope(mrope_section=[2, 1, 1], partial_rotary_factor=0.5)}
    vision = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
    names = ["image", "video", "image_start", "image_end", "video_start", "video_end"]
    ids = [IMAGE, VIDEO, START, END, MORE, 1249]
    return nested("glm4v", text, vision, **{f"{name}_token_id": id for name, id in zip(names, ids, strict=True)})


def _git() -> PreTrainedConfig:
    config: Any = CONFIG_MAPPING["git"]
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return config(vision_config=PICTURE, **PLAIN | dropout | {"num_hidden_layers": 3})


def _moss() -> PreTrainedConfig:
    audio = {"num_mel_bins": 8, "max_source_positions": 32}
    return nested("moss_transcribe_diarize", "qwen3", audio_config=VISION | audio, audio_token_id=IMAGE)


COMPOSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "blt": _blt,
    "dots3_note": _dots3_note,
    "emu3": _emu3,
    "fuyu": lambda: nested("fuyu", "persimmon", image_token_id=IMAGE),
    "gemma3": lambda: nested(
        "gemma3",
        "gemma3_text",
        SIGLIP | {"image_size": 56},
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    ),
    "gemma3n": lambda: nested("gemma3n", "gemma3n_text"),
    "gemma4": lambda: nested("gemma4", "gemma4_text", **GEMMA_MEDIA),
    "gemma4_assistant": lambda: _assistant("gemma4_assistant", "gemma4_text"),
    "gemma4_unified": lambda: nested("gemma4_unified", "gemma4_unified_text", **GEMMA_MEDIA),
    "gemma4_unified_assistant": lambda: _assistant("gemma4_unified_assistant", "gemma4_unified_text"),
    "git": _git,
    "glm4v": _glm4v,
    "got_ocr2": lambda: nested("got_ocr2", "qwen2", {}, image_token_index=IMAGE),
    "idefics3": lambda: nested("idefics3", "llama", PICTURE, image_token_id=IMAGE),
    "internvl": lambda: nested(
        "internvl",
        "qwen2",
        VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=IMAGE,
    ),
    "llama4": lambda: nested(
        "llama4", "llama4_text", {}, boi_token_index=START, eoi_token_index=END, image_token_index=IMAGE
    ),
    "llava": lambda: nested(
        "llava",
        "llama",
        PICTURE | {"model_type": "clip_vision_model"},
        vision_feature_layer=-1,
        image_token_index=IMAGE,
    ),
    "mistral3": lambda: nested("mistral3", "mistral", PICTURE | {"model_type": "pixtral"}, image_token_index=IMAGE),
    "mllama": lambda: nested("mllama", PLAIN | {"cross_attention_layers": [3]}, {}, image_token_index=IMAGE),
    "moshi": _moshi,
    "moss_transcribe_diarize": _moss,
    "musicgen": lambda: _music("musicgen"),
    "musicgen_melody": lambda: _music("musicgen_melody"),
    "paligemma": lambda: nested("paligemma", "gemma", SIGLIP, projection_dim=64, image_token_index=IMAGE),
    "phi4_multimodal": _phi4_multimodal,
    "qwen2_5_vl": lambda: _qwen_vl("qwen2_5_vl", [2, 3, 3]),
    "qwen2_vl": lambda: _qwen_vl("qwen2_vl", [2, 3, 3]),
    "qwen3_5": lambda: nested("qwen3_5", "qwen3_5_text", {}, **QWEN_IMAGES),
    "qwen3_5_moe": lambda: nested("qwen3_5_moe", "qwen3_5_moe_text", {}, **QWEN_IMAGES),
    "qwen3_vl": lambda: _qwen_vl("qwen3_vl", [4, 2, 2], head_dim=16),
    "qwen3_vl_moe": lambda: _qwen_vl(
        "qwen3_vl_moe", [4, 2, 2], head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "qwen4_exp": lambda: nested("qwen4_exp", "qwen4_exp_text", {}, **QWEN_IMAGES),
    "smolvlm": lambda: nested("smolvlm", "llama", PICTURE, image_token_id=IMAGE),
}
# The whole multimodal class of a family of which the causal mapping opens the text model.
WHOLE = {f"{name}:whole": name for name in ("llama4", "mllama", "qwen3_5")}
MULTIMODAL = [
    "glm4v",
    "idefics3",
    "internvl",
    "llava",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
]
OWN_CLASS = {"musicgen": "MusicgenForCausalLM", "musicgen_melody": "MusicgenMelodyForCausalLM"}
MAPPED = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
NAMES: list[str] = [
    *MAPPED,
    *(name for name in MULTIMODAL if name in CONFIG_MAPPING),
    *WHOLE,
    *(name for name, (model_type, _) in VARIANTS.items() if model_type in CONFIG_MAPPING),
]


def config_of(name: str) -> PreTrainedConfig:
    """A new tiny config of a host of `NAMES`."""
    name = WHOLE.get(name, name)
    if name in VARIANTS:
        model_type, fields = VARIANTS[name]
        return shrink(CONFIG_MAPPING[model_type], fields)
    return COMPOSED[name]() if name in COMPOSED else tiny_config(name)


def build(name: str, seed: int = 0, gain: float = 5.0) -> transformers.PreTrainedModel:
    """A new random host of `NAMES`, in float32 and in evaluation mode; the same seed gives the same weights.

    Args:
        gain: times what weights are as they are initialised; at 1 a tiny host says nearly the same whatever it reads.
    """
    config: Any = config_of(name)
    torch.manual_seed(seed)
    if name in OWN_CLASS:
        model = getattr(transformers, OWN_CLASS[name])(config)
    elif name in WHOLE or name in MULTIMODAL:
        model = AutoModelForImageTextToText.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(gain)
    return model.eval()
