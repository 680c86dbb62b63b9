"""EAGLE-3's head (Li et al. 2025, arXiv:2503.01840): recurrent, on the fused states of three layers of the trunk.

One Llama layer whose attention reads [norm(embedding) ; norm(state)], whatever the host is made of: this is the shape
that serving engines read, so tensors have the names of its checkpoints. It is trained on its own outputs as recurrent
heads are ("training-time test"). Recycled is the state before the norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from nextn.config import MultiTokenConfig
from nextn.heads.sequential import RecurrentHeads
from nextn.trunk import ATTENTION, ChainCache, HostError, RaggedCache, Trunk, VisibleFn, cache_argument

CACHE = cache_argument(LlamaAttention)


class MidLayer(nn.Module):
    """The Llama layer, its attention twice as wide at its input: [norm(embedding) ; norm(state)]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.input_layernorm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer_idx=0)
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            setattr(self.self_attn, name, nn.Linear(2 * width, narrow.out_features, bias=False))
        self.mlp = LlamaMLP(config)

    def forward(
        self, embedding: Tensor, state: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: Any
    ) -> Tensor:
        fused = torch.cat([self.input_layernorm(embedding), self.hidden_norm(state)], dim=-1)
        attended, _ = self.self_attn(
            hidden_states=fused,
            position_embeddings=rotary,
            attention_mask=mask,
            **{CACHE: cache},
        )
        state = state + attended
        return state + self.mlp(self.post_attention_layernorm(state))


class Rotary(LlamaRotaryEmbedding):
    """Llama's, whose frequencies stay float32 when the heads become bfloat16: engines have them so."""

    def _apply(self, *args: Any, **kwargs: Any) -> Rotary:
        super()._apply(*args, **kwargs)
        exact: Any = LlamaRotaryEmbedding(self.config).inv_freq
        self.inv_freq = exact.to(self.inv_freq.device)
        return self


class Eagle3Step(nn.Module):
    """One step: the layer, and the norm before the output."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        config = llama_config(trunk)
        self.midlayer = MidLayer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=config.initializer_range)
        self._copy_where_it_fits(trunk)
        self.to(device=trunk.device, dtype=trunk.dtype)

    @torch.no_grad()
    def _copy_where_it_fits(self, trunk: Trunk) -> None:
        """Start from the last layer and final norm of a host with exactly Llama's parts; the token has no say yet."""
        try:
            theirs = dict(trunk.new_layer().named_parameters())
        except HostError:  # it has parts that cannot be copied at all
            return
        ours = {name: each for name, each in self.midlayer.named_parameters() if name != "hidden_norm.weight"}
        if theirs.keys() != ours.keys():
            return
        for name, parameter in ours.items():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                parameter.zero_()[:, trunk.width :] = theirs[name]
            elif name == "input_layernorm.weight":  # what the host's reads, ours has in hidden_norm
                self.midlayer.hidden_norm.weight.copy_(theirs[name])
            else:
                parameter.copy_(theirs[name])
        self.norm.load_state_dict(trunk.norm.state_dict())

    def forward(
        self,
        trunk: Trunk,
        ids: Tensor,
        state: Tensor,
        positions: Tensor,
        visible: VisibleFn,
        cache: RaggedCache | ChainCache | None = None,
    ) -> Tensor:
        """ids [B, T] and the previous state [B, T, D] -> the next state [B, T, D], before the norm."""
        embedding = trunk.embedding(ids).to(state.dtype)
        rotary = self.rotary(state, positions.clamp(min=0))
        return self.midlayer(embedding, state, rotary, visible(None), cache)


class Eagle3Heads(RecurrentHeads):
    """See the module. `fc` fuses the three states, at first to the last of them."""

    mixes = False
    can_calibrate = False

    def __init__(self, config: MultiTokenConfig, trunk: Trunk) -> None:
        if config.tap is None:
            config = config.model_copy(update={"tap": usual_layers(trunk)})
        super().__init__(config, trunk)
        self.fc = nn.Linear(3 * trunk.width, trunk.width, bias=False, device=trunk.device, dtype=trunk.dtype)
        with torch.no_grad():
            self.fc.weight.zero_()[:, 2 * trunk.width :] = torch.eye(trunk.width)

    @property
    def fusing(self) -> nn.Module:
        return self.fc

    def read(self, hidden: Tensor) -> Tensor:
        return self.fc(hidden)

    def _new_step(self, config: MultiTokenConfig, trunk: Trunk) -> nn.Module:
        return Eagle3Step(trunk)

    def _end(self, state: Tensor) -> Tensor:
        norm: Any = self.step.norm
        return norm(state)


def usual_layers(trunk: Trunk) -> list[int]:
    """The layers whose inputs engines fuse unless told otherwise: 2, the middle, the third to last.

    Raises:
        HostError: for a host with too few layers to have three of them.
    """
    count = len(trunk.layers)
    layers = sorted({min(2, count - 1), count // 2, max(0, count - 3)})
    if len(layers) < 3:
        raise HostError(f"EAGLE-3 fuses the states of three layers, but the base has {count}; name three with tap.")
    return layers


def llama_config(trunk: Trunk) -> LlamaConfig:
    """A Llama layer as wide as the host's, with as many heads."""
    host = trunk.config
    heads, key_heads, head_width = trunk.attention_shape()
    config = LlamaConfig(
        hidden_size=trunk.width,
        intermediate_size=host.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_width,
        rms_norm_eps=getattr(host, "rms_norm_eps", 1e-6),
        max_position_embeddings=host.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": trunk.rope_theta},
        vocab_size=trunk.vocab_size,
    )
    config._attn_implementation = ATTENTION
    return config
