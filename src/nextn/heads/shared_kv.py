"""The shared-KV drafter (Gemma 4, May 2026): thin layers whose queries attend to the trunk's own keys and values.

It has no cache and needs no prefill. A step reads [embedding ; state] projected down to the drafter's width; its last
state, projected up, is recycled. All steps of a round stand at the position of the newest state: what they see is the
text up to there. The pending token has no keys in the trunk yet; it is known by its embedding alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextn.config import ConfigError, MultiTokenConfig
from nextn.heads.base import Growth, Heads, Text, Window
from nextn.heads.sequential import ahead
from nextn.trunk import HostError, RaggedCache, Trunk, VisibleFn, attend

KV = tuple[Tensor, Tensor]


class QueryLayer(nn.Module):
    """Attention by queries alone, then an MLP; a norm before and after each, as in Gemma.

    Args:
        kind: the layer type of the trunk whose keys it reads.
        heads: how many queries; default: as many as the trunk has.
    """

    def __init__(self, trunk: Trunk, width: int, kind: str, heads: int | None) -> None:
        super().__init__()
        self.kind = kind
        layer = trunk.last_layer_of(kind)
        assert layer is not None
        theirs, key_heads, self.head_width = trunk.attention_shape(layer)
        self.heads = heads or theirs
        if self.heads % key_heads:
            raise ConfigError(f"drafter_heads is {self.heads}: take a multiple of the base's {key_heads} key heads.")
        inner = 8 * width  # as in all released Gemma 4 drafters
        self.q_proj = nn.Linear(width, self.heads * self.head_width, bias=False)
        self.q_norm = nn.RMSNorm(self.head_width, eps=1e-6)
        self.o_proj = nn.Linear(self.heads * self.head_width, width, bias=False)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.input_layernorm = nn.RMSNorm(width, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=1e-6)
        self.pre_feedforward_layernorm = nn.RMSNorm(width, eps=1e-6)
        self.post_feedforward_layernorm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, trunk: Trunk, states: Tensor, positions: Tensor, visible: VisibleFn, kv: KV) -> Tensor:
        """states [B, T, d] at positions [B, T], keys and values of the trunk -> [B, T, d]."""
        queries = self.q_norm(self.q_proj(self.input_layernorm(states)).unflatten(-1, (self.heads, self.head_width)))
        queries = trunk.rotate(queries.transpose(1, 2), positions, self.kind)
        keys, values = (part.to(queries.dtype) for part in kv)
        attended = attend(queries, keys, values, visible(trunk.window(self.kind)))
        states = states + self.post_attention_layernorm(self.o_proj(attended.flatten(2)))
        read = self.pre_feedforward_layernorm(states)
        passed = F.gelu(self.gate_proj(read), approximate="tanh") * self.up_proj(read)
        return states + self.post_feedforward_layernorm(self.down_proj(passed))


class SharedKVHeads(Heads):
    """See the module. All but the last layer read a sliding layer of the trunk, where there is one."""

    cache_count = 0
    recurrent = True

    def __init__(self, config: MultiTokenConfig, trunk: Trunk) -> None:
        if hasattr(trunk.config, "kv_lora_rank"):
            raise HostError(
                f"{type(trunk.model).__name__} caches compressed keys (MLA), which shared-KV heads cannot read; choose "
                "another kind of heads."
            )
        trunk.check_rotation()
        super().__init__(config, trunk)
        width = self.output_width(config, trunk)
        kinds = [kind for kind in ("sliding_attention", "full_attention") if trunk.last_layer_of(kind) is not None]
        self.kinds = [kinds[0]] * (config.drafter_layers - 1) + [kinds[-1]]
        self.places = [sorted(set(self.kinds)).index(kind) for kind in self.kinds]  # of each layer, in `reads`
        last = (trunk.last_layer_of(kind) for kind in sorted(set(self.kinds)))
        self.reads = tuple(place for place in last if place is not None)
        self.pre_projection = nn.Linear(2 * trunk.width, width, bias=False)
        self.layers = nn.ModuleList(QueryLayer(trunk, width, kind, config.drafter_heads) for kind in self.kinds)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.post_projection = nn.Linear(width, trunk.width, bias=False)
        self.own_table = config.output.has_own_table
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and not name.startswith("output."):
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        self.to(device=trunk.device, dtype=trunk.dtype)

    @staticmethod
    def output_width(config: MultiTokenConfig, trunk: Trunk) -> int:
        return config.drafter_width or trunk.width // 2

    def start_table(self, trunk: Trunk) -> Tensor:
        table = trunk.unembedding.weight  # an own table reads the thin state, the trunk's reads it projected up
        return table @ self.post_projection.weight if self.own_table else table

    def forward(self, trunk: Trunk, hidden: Tensor, text: Text) -> list[Tensor]:
        states, state, visible = [], self.read(hidden), text.visible
        for k in range(2, self.n + 1):
            seen = [visible] * len(self.reads)
            inputs = ahead(text.ids, k - 1), state, text.positions, seen, text.trunk_kv
            thin, state = self._run(self._step, trunk, *inputs)
            states.append(thin if self.own_table else state)
        return states

    def _step(
        self, trunk: Trunk, ids: Tensor, state: Tensor, positions: Tensor, visible: list[VisibleFn], kv: list[KV]
    ) -> tuple[Tensor, Tensor]:
        """ids [B, T] and the previous state [B, T, D] -> the drafter's own [B, T, d] and the recycled one [B, T, D]."""
        thin = self.pre_projection(torch.cat([trunk.embedding(ids).to(state.dtype), state], dim=-1))
        for layer, place in zip(self.layers, self.places, strict=True):
            thin = layer(trunk, thin, positions, visible[place], kv[place])
        thin = self.norm(thin)
        return thin, self.post_projection(thin)

    def _grow(
        self, trunk: Trunk, window: Window, caches: list[RaggedCache], rows: Tensor | None, growth: Growth
    ) -> None:
        newest = window.newest(window.positions)
        state, tokens = self.read(window.newest(window.hidden)[:, None]), window.newest(window.following)[:, None]
        for k in range(2, self._last(growth) + 1):
            positions = newest[:, None].expand(tokens.shape)  # all drafts of a round stand at the newest state
            visible = [cache.place(positions, rows) for cache in caches]
            thin, state = self._step(trunk, tokens, state, positions, visible, [cache.read() for cache in caches])
            level = growth.level(trunk, self.output.at(k), thin if self.own_table else state, k, newest)
            tokens, state = level.tokens, level.following(state)
