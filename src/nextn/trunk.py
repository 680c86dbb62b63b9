"""Everything that nextn asks of a host model, in one place.

A *host* is a Hugging Face causal language model; its *trunk* is that model seen from nextn: embedding,
decoder layers, final norm, unembedding. All that depends on internals of transformers (masks, cache layers, the
call of one decoder layer) is in this module and nowhere else. Tested with transformers 5.23 and 5.24.

Shapes: B batch, T time, S keys, H heads, D model width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nextn.adapters import adapter_layers, merge_adapters
from nextn.attention import chain_attention
from nextn.config import Tap
from nextn.logits import LogitTransform
from nextn.quantized import (
    has_quantized_weights,
    inner_tensors,
    keep_layout,
    quantization_method,
    trainable_copy,
    why_unfit,
)

# Attention patterns that a buffer of full length can serve, and so can be rolled back.
_ATTENTION_TYPES = {"full_attention", "sliding_attention"}

VisibleFn = Callable[[int | None], Tensor]


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch found no memory; its allocator for CPUs raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class HostError(ValueError):
    """A host model that nextn cannot work with; the message says why."""


class Trunk:
    """A host causal LM, seen as embedding, decoder layers, final norm and unembedding.

    It is no module, so that heads that use it do not register the host twice. Parts are looked up in the host at each
    use: embeddings may be resized, layers replaced and adapters merged after the trunk was made.

    Args:
        model: a causal language model of transformers with `layers`, `norm` and `rotary_emb` in its decoder
            (Llama, Qwen2, Qwen3, Mistral, Gemma 3, Phi-3, DeepSeek-V3 and their kin).

    Raises:
        HostError: where the host's generation cannot be rolled back or its parts cannot be found.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        _refuse_unfit(model)
        keep_layout(model)
        self.model = model
        self.decoder: Any = model.get_decoder()
        self.config = self.decoder.config
        self.layer_types: list[str] = _layer_types(self.config)
        self._decoder_cache, self._layer_cache = cache_argument(self.decoder), cache_argument(self.layers[0])
        self.is_checked = False  # whether our forward was compared with the host's, see `nextn.support`
        # Layers of Gemma 4 leave their keys for later layers; a head has none.
        self._shares_keys = "shared_kv_states" in inspect.signature(self.layers[0].forward).parameters
        self._rotary_by_type = "layer_type" in inspect.signature(self.rotary.forward).parameters

    # --- what it is -------------------------------------------------------------------------------------------

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return self.decoder.norm

    @property
    def rotary(self) -> nn.Module:
        return self.decoder.rotary_emb

    @property
    def embedding(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def unembedding(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    @property
    def transform(self) -> LogitTransform:
        """What the host does to the logits of its unembedding."""
        return LogitTransform.of(self.model, self.config)

    @property
    def cache_layers(self) -> int:
        """How many layers of a cache one forward writes; LongCat-Flash has two attentions in each decoder layer."""
        return int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.unembedding.weight.shape[0])

    @property
    def max_length(self) -> int:
        """The context, see `context_length`."""
        return context_length(self.config)

    @property
    def hard_limit(self) -> int | None:
        """How long a text can become, see `hard_limit`; None where it may go on past the context."""
        return hard_limit(self.config)

    @property
    def dtype(self) -> torch.dtype:
        return self.unembedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.unembedding.weight.device

    @property
    def last_layer_type(self) -> str:
        return self.layer_types[-1]

    @property
    def is_eager(self) -> bool:
        """Whether the host's attention is the eager one, past our interface."""
        return self.config._attn_implementation == "eager"

    def window(self, layer_type: str) -> int | None:
        """How many keys a query of this layer type sees, itself included; None where it sees all."""
        return int(self.config.sliding_window) if layer_type == "sliding_attention" else None

    def settings(self) -> str:
        """The host's config, and which attention and experts it runs, but not where it came from."""
        settings = self.config.to_dict()
        for name in ("_name_or_path", "transformers_version"):
            settings.pop(name, None)
        implementations = (self.config._attn_implementation, getattr(self.config, "_experts_implementation", None))
        return f"{json.dumps(settings, sort_keys=True, default=str)} {implementations}"

    def adapters(self) -> str:
        """Which adapters it computes with, and how strong they are."""
        return repr(_adapters(self.model))

    def fingerprint(self) -> str:
        """A digest of the weights, the config and the active adapters; what is kept of a trunk's work is tied to it."""
        return f"{fingerprint(self.model)} {self.settings()}"

    # --- parts for heads --------------------------------------------------------------------------------------

    def new_layer(self, dense: bool = False) -> nn.Module:
        """A decoder layer like the host's last one, weights included: the start of a head.

        Active adapters of the host are merged into the copy, which has none itself, and quantized weights become
        floating-point ones of the trunk's dtype.

        Args:
            dense: with the MLP of the host's last layer without experts.

        Raises:
            HostError: where all layers of the host have experts, where its layers have several attentions, or where
                weights are quantized so that they cannot be trained.
        """
        name = type(self.model).__name__
        parts = [part for part in self.layers[-1].modules() if part is not self.layers[-1]]
        if len({getattr(part, "layer_idx", None) for part in parts} - {None}) > 1:
            raise HostError(
                f"{name} has several attentions in each decoder layer, while heads made of it have one cache: "
                "choose eagle3 heads or parallel heads with head='linear' or 'residual_mlp', or decode without heads."
            )
        shared = {id(self.config): self.config}  # the config is not copied: it says which attention runs
        layer: Any = trainable_copy(self.layers[-1], shared, self.dtype)
        if dense:
            plain: list[Any] = [each.mlp for each in self.layers if not hasattr(each.mlp, "experts")]
            if not plain:
                raise HostError(f"{name} has experts in every layer; leave dense out.")
            layer.mlp = trainable_copy(plain[-1], shared, self.dtype)
        merge_adapters(layer)
        if has_quantized_weights(layer):
            raise HostError(
                f"{name} has decoder layers quantized by {quantization_method(self.model)} in a way that heads cannot "
                "be copied from: choose eagle3 or shared_kv heads, or parallel heads with head='linear' or "
                "'residual_mlp', or load the base without quantization."
            )
        return layer.requires_grad_(True)

    def new_norm(self, like_final: bool = False) -> nn.Module:
        """A norm of the host's class: neutral, or with the weights of the host's final norm."""
        norm = trainable_copy(self.norm, {}, self.dtype).requires_grad_(True)
        if not like_final:
            fresh = type(self.norm)(self.width)  # each class knows whether its neutral weight is 0 or 1
            norm.load_state_dict(fresh.to(device=self.device, dtype=self.dtype).state_dict())
        return norm

    # --- running it -------------------------------------------------------------------------------------------

    def run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        visible: VisibleFn,
        cache: Cache | None = None,
        tap: Tap = "post_norm",
    ) -> tuple[Tensor, Tensor]:
        """The decoder over input_ids [B, T] at positions [B, T].

        Args:
            visible: from a window (or None) to the keys each query sees, bool [B, 1, T, S].
            tap: which state the heads read; a list of m layers for the states that go into them.

        Returns:
            the state after the final norm [B, T, D] and the tapped state [B, T, D], or [B, T, m·D].
        """
        with self._tapping(tap) as caught, _attending(self.config):
            hidden = self.decoder(
                input_ids=input_ids,
                attention_mask=self._masks(visible),
                position_ids=positions.clamp(min=0),
                use_cache=cache is not None,
                **{self._decoder_cache: cache},
            ).last_hidden_state
        if len(caught) > 1:
            return hidden, torch.cat(caught, dim=-1)
        return hidden, caught[0] if caught else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden after the final norm [..., D] -> the host's own logits [..., V]."""
        unembedding = self.unembedding
        return self.transform.unembed(unembedding, hidden.to(unembedding.weight.dtype))

    def run_layer(
        self, layer: nn.Module, states: Tensor, positions: Tensor, visible: VisibleFn, cache: Cache | None = None
    ) -> Tensor:
        """One decoder layer of the host's last kind over states [B, T, D] at positions [B, T]."""
        positions = positions.clamp(min=0)
        with _attending(self.config):
            output = layer(
                states,
                attention_mask=self._mask(visible(self.window(self.last_layer_type))),
                position_ids=positions,
                position_embeddings=self._angles(states, positions, self.last_layer_type),
                **{self._layer_cache: cache},
                **({"shared_kv_states": {}} if self._shares_keys else {}),
            )
        return output[0] if isinstance(output, tuple) else output

    def _angles(self, states: Tensor, positions: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the host's rotation at positions [B, T], in the dtype of states: [B, T, R] each."""
        kind = (layer_type,) if self._rotary_by_type else ()
        return self.rotary(states, positions, *kind)

    def attending(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs with our attention; for what is computed again after a forward ended."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with _attending(self.config):
                return function(*args, **kwargs)

        return run

    @contextmanager
    def _tapping(self, tap: Tap) -> Iterator[list[Tensor]]:
        """Catch the inputs of the final norm or of some layers during one forward; nothing for `post_norm`.

        The hooks see the forwards of other threads too, and ignore them.
        """
        modules = [self.layers[place] for place in tap] if isinstance(tap, list) else _TAPPED[tap](self)
        caught: list[Tensor] = [torch.empty(0)] * len(modules)
        handles, thread = [], this_thread()
        for place, module in enumerate(modules):
            # Another thread may call a hook before PyTorch has noted that it takes kwargs, hence their default.
            def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: Any = None, place: int = place) -> None:
                if this_thread() == thread:
                    caught[place] = args[0] if args else kwargs["hidden_states"]

            handles.append(module.register_forward_pre_hook(catch, with_kwargs=True))
        try:
            yield caught
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def capturing(self, layers: Sequence[int]) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Catch the keys [B, H, S, Dk] and values [B, H, S, Dv], rotated, that some layers attend to in one forward.

        From the attention interface: a cache holds them too, but training has none.

        Raises:
            HostError: for a host with eager attention, which does not go through the interface.
        """
        if self.is_eager:
            raise HostError("Heads that read the trunk's keys need attn_implementation='sdpa'.")
        caught: list[Any] = [None] * len(layers)
        places = {id(self.attention(layer)): place for place, layer in enumerate(layers)}

        def catch(attention: nn.Module, key: Tensor, value: Tensor) -> None:
            if (place := places.get(id(attention))) is not None:
                caught[place] = key, value

        before, _capturing.catch = getattr(_capturing, "catch", None), catch
        try:
            yield caught
        finally:
            _capturing.catch = before

    @property
    def rope_theta(self) -> float:
        """The base of the rotary embedding of layers that see all."""
        ropes = self.config.rope_parameters
        return float(ropes.get("full_attention", ropes).get("rope_theta", 10_000.0))

    def attention_shape(self, layer: int = -1) -> tuple[int, int, int]:
        """How many query heads and key heads a layer's attention has, and how wide they are (in Gemma 4 it varies)."""
        attention, heads = self.attention(layer), int(self.config.num_attention_heads)
        groups = getattr(attention, "num_key_value_groups", 1)  # compressed keys (MLA) have neither
        return heads, heads // groups, getattr(attention, "head_dim", self.width // heads)

    @property
    def experts_per_token(self) -> int | None:
        """How many experts a token chooses, by whatever name the config has for it; None where it has none."""
        names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
        return next((int(value) for name in names if (value := getattr(self.config, name, None))), None)

    def attention(self, layer: int) -> Any:
        """The attention module of a layer."""
        return self.layers[layer].self_attn

    def rotate(self, states: Tensor, positions: Tensor, layer_type: str) -> Tensor:
        """Queries [B, H, T, Dk] at positions [B, T], rotated as the host rotates those of a layer type.

        Where the host rotates a part only, that is the first one.
        """
        cos, sin = self._angles(states, positions.clamp(min=0), layer_type)  # [B, T, R]
        part, rest = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
        first, second = part.chunk(2, dim=-1)
        turned = part * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
        return torch.cat([turned, rest], dim=-1)

    @torch.no_grad()
    def check_rotation(self) -> None:
        """Refuse a host that rotates otherwise than `rotate` does.

        Raises:
            HostError: for a host that rotates neighbouring channels together (GLM-4, Cohere).
        """
        if self.device.type == "meta":
            return
        heads, _, width = self.attention_shape()
        kind = self.last_layer_type
        states = torch.linspace(-1, 1, heads * 3 * width, device=self.device).view(1, heads, 3, width)
        positions = torch.arange(3, device=self.device)[None]
        cos, sin = self._angles(states, positions, kind)
        theirs = getattr(sys.modules[type(self.attention(-1)).__module__], "apply_rotary_pos_emb", None)
        if theirs is None or not torch.allclose(
            theirs(states, states, cos, sin)[0], self.rotate(states, positions, kind), atol=1e-3
        ):
            raise HostError(f"{type(self.model).__name__} rotates its keys in a way that shared-KV heads do not know.")

    def last_layer_of(self, layer_type: str) -> int | None:
        """The place of the last layer of a type; None where there is none."""
        return max((place for place, kind in enumerate(self.layer_types) if kind == layer_type), default=None)

    def _masks(self, visible: VisibleFn) -> Tensor | dict[str, Tensor]:
        # A plain 4D mask given to a host with several layer types would silently remove the sliding window.
        masks = {kind: self._mask(visible(self.window(kind))) for kind in sorted(set(self.layer_types))}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, visible: Tensor) -> Tensor:
        if not self.is_eager:
            return visible
        hidden_value = torch.finfo(self.dtype).min  # eager attention adds its mask
        return torch.zeros_like(visible, dtype=self.dtype).masked_fill(~visible, hidden_value)


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """A digest that changes with the weights of a module, and with its adapters: which are active, merged, how strong.

    Of each tensor it takes the address, PyTorch's version counter and a few values, evenly spaced: an edit through
    `.data` leaves the counter as it is. An edit of single values that way may go unnoticed.
    """
    held = (tensor for part in module.modules() for tensor in (*part._parameters.values(), *part._buffers.values()))
    tensors = [part for tensor in held if tensor is not None for part in inner_tensors(tensor)]
    stamps = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.shape) for tensor in tensors]
    samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() and tensor.device.type != "meta":
            samples.setdefault((tensor.device, tensor.dtype), []).append(evenly_spaced(tensor))
    values = [torch.cat(found).double().tolist() for found in samples.values()]
    return hashlib.sha256(repr((stamps, values, _adapters(module))).encode()).hexdigest()


def evenly_spaced(tensor: Tensor, count: int = 4) -> Tensor:
    """A few values of a tensor, the first and the last among them."""
    if tensor.numel() < count or not tensor.is_contiguous():
        return tensor.flatten()[: count + 1]
    return tensor.as_strided((count,), ((tensor.numel() - 1) // (count - 1),))


def _adapters(module: nn.Module) -> list[tuple[Any, ...]]:
    """What each adapted layer computes with: active and merged adapters, whether they are off, their scales."""
    return [
        (layer.active_adapters, layer.merged_adapters, layer.disable_adapters, getattr(layer, "scaling", None))
        for layer in adapter_layers(module).values()
    ]


def _grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention in which a group of query heads shares keys, without a copy of them for each head.

    With a mask, transformers copies: on a CPU 28.7 ms a layer against 1.8 (64 rows, 768 keys, 9 query heads on 3). A
    few queries are folded into the rows of their group's head, [B, H, T, D] -> [B, H', groups·T, D], so that keys are
    read once a group: 23 us against 40 (4 queries, 256 keys; bfloat16, 2 cores).
    """
    if (catch := getattr(_capturing, "catch", None)) is not None:
        catch(module, key, value)
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, **kwargs)
    (rows, heads, length, _), shared = query.shape, key.shape[1]
    groups = heads // shared
    if attention_mask.shape[-1] < key.shape[2]:  # a chain in training: keys past the mask are each query's own
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        chained = None if dropout else chain_attention(query, key, value, attention_mask, scale)
        if chained is not None:
            return chained.transpose(1, 2).contiguous(), None
        attention_mask = with_own_keys(attention_mask, key.shape[2] // length - 1)
    fold = groups > 1 and groups * length <= 64
    if fold:
        query = query.reshape(rows, shared, groups * length, query.shape[3])
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    elif groups > 1 and query.device.type == "cuda":  # whose fast kernels take no mask with shared keys
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        scale=scaling,
        enable_gqa=groups > 1 and query.shape[1] > key.shape[1],
    )
    return output.reshape(rows, heads, length, value.shape[3]).transpose(1, 2).contiguous(), None


def with_own_keys(visible: Tensor, blocks: int) -> Tensor:
    """A mask [B, 1, T, T] over the keys in common, and over blocks of T keys of which each query sees its own."""
    own = torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device).expand_as(visible)
    return torch.cat([visible] + [own] * blocks, dim=-1)


def attend(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Attention of queries [B, H, T, Dk] to keys [B, H', S, Dk], H' a divisor of H, -> [B, T, H, Dv]."""
    return _grouped_sdpa(nn.Identity(), queries, keys, values, visible)[0]


_TAPPED: dict[str, Callable[[Trunk], list[nn.Module]]] = {
    "post_norm": lambda trunk: [],
    "pre_norm": lambda trunk: [trunk.norm],
    "before_last_layer": lambda trunk: [trunk.layers[-1]],
}
ATTENTION = "nextn_sdpa"  # the name of our attention, for configs of layers that are no host's
AttentionInterface.register(ATTENTION, _grouped_sdpa)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


_capturing = threading.local()  # `catch`: gets the keys and values of each attention of this thread's forward
_attending_lock = threading.Lock()
_attending_now: dict[int, int] = {}  # how many forwards are running with our attention, by the id of the host's config


@contextmanager
def _attending(config: Any) -> Iterator[None]:
    """Let a host that uses sdpa use ours during one forward; the host's own forwards stay as they are.

    The config is shared by threads: the last of several forwards puts sdpa back. Should the host's own forward run
    meanwhile in another thread, it gets either attention, and both give it the right result.
    """
    if config._attn_implementation not in ("sdpa", ATTENTION):
        yield
        return
    _count_attending(config, 1)
    try:
        yield
    finally:
        _count_attending(config, -1)


def _count_attending(config: Any, change: int) -> None:
    """Note a forward that begins (1) or ends (-1), and set the attention accordingly."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace a lock
        config._attn_implementation = ATTENTION if change > 0 else "sdpa"
        return
    with _attending_lock:
        running = _attending_now.get(id(config), 0) + change
        _attending_now[id(config)] = running
        if not running:
            del _attending_now[id(config)]
        config._attn_implementation = ATTENTION if running else "sdpa"


@torch.compiler.disable  # Dynamo cannot trace it
def this_thread() -> int:
    """The identifier of the running thread."""
    return threading.get_ident()


def cache_argument(module: nn.Module | type[nn.Module]) -> str:
    """What the forward of a decoder or layer calls its cache: `cache`, before transformers 5.24 `past_key_values`."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def causal(
    queries: Tensor, keys: Tensor, query_documents: Tensor | None = None, key_documents: Tensor | None = None
) -> VisibleFn:
    """Who sees whom: query positions [B, T], key positions [B or 1, S], documents of the same shapes.

    A key is visible at its own position and later, within the window, within its document. A negative query
    position stands for a place that is not in use: it sees position 0 only, so that nothing turns into NaN.
    """

    def visible(window: int | None) -> Tensor:
        at, stored = queries.clamp(min=0)[:, :, None], keys[:, None, :]
        seen = stored <= at  # [B, T, S]
        if window is not None:
            seen &= stored > at - window
        if query_documents is not None and key_documents is not None:
            seen &= query_documents[:, :, None] == key_documents[:, None, :]
        return seen[:, None]

    return visible


# --- caches -----------------------------------------------------------------------------------------------------


@dataclass
class Branches:
    """Tokens behind a row's text that do not all follow each other: the nodes of a tree of drafts, R in all.

    first: the slot of the first of them [B]; the others follow it. Slots before it hold the text.
    positions: where each stands in the text [B, R].
    sees: which of them each query sees, itself included, bool [B, T, R].
    newest: how many of them are queries, the last ones; None: all. They are written.
    """

    first: Tensor
    positions: Tensor
    sees: Tensor
    newest: int | None = None

    def slots(self) -> Tensor:
        """Where the queries are written [B, T]."""
        count = self.positions.shape[1]
        start = 0 if self.newest is None else count - self.newest
        return self.first[:, None] + torch.arange(start, count, device=self.first.device)

    def visible(self, queries: Tensor, stored: Tensor) -> VisibleFn:
        """Who sees whom: query positions [B, T], slots [S]. A place not in use sees slot 0, see `causal`."""
        node = stored - self.first[:, None]  # [B, S]
        inside = (node >= 0) & (node < self.positions.shape[1])
        node = node.clamp(0, self.positions.shape[1] - 1)
        at = torch.where(inside, self.positions.gather(1, node), stored)[:, None]  # [B, 1, S]
        followed = self.sees.gather(2, node[:, None].expand(-1, queries.shape[1], -1))  # [B, T, S]
        seen = torch.where(inside[:, None], followed, (stored < self.first[:, None])[:, None])
        unused = (queries < 0)[:, :, None] & (stored == 0)

        def visible(window: int | None) -> Tensor:
            near = seen if window is None else seen & (at > queries[:, :, None] - window)
            return (near | unused)[:, None]

        return visible


class _Buffer(CacheLayerMixin):
    """Keys [B, H, S, Dk] and values [B, H, S, Dv] of one layer in buffers of fixed size."""

    def __init__(self, rows: int, slots: int) -> None:
        super().__init__()
        self.rows, self.slots = rows, slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def empty(states: Tensor) -> Tensor:  # MLA: keys and values differ in their last dimension
            return states.new_zeros(self.rows, states.shape[1], self.slots, states.shape[3])

        self.hold(empty(key_states), empty(value_states))

    def hold(self, keys: Tensor | None, values: Tensor | None) -> None:
        self.keys, self.values = keys, values
        self.is_initialized = keys is not None  # cross attention writes nothing without a picture

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a buffer is written through its RaggedCache")

    def get_seq_length(self) -> int:
        return 0  # each row has its own length; who runs the host passes positions and masks

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots, 0

    def get_max_length(self) -> int:
        return self.slots

    def get_max_cache_shape(self) -> int:  # the name of get_max_length before transformers 5.2x
        return self.slots


BLOCK = 64  # slots; kernels of a GPU want a mask of so many keys, or a multiple


def _whole_blocks(slots: int) -> int:
    return -(-slots // BLOCK) * BLOCK


class _Written(Exception):  # noqa: N818 (nothing went wrong)
    """Keys and values are where they should be, and nothing more is wanted of a layer."""


class RaggedCache(Cache):
    """Key and value buffers in which each row stands at its own position.

    A token at position p of its row is written to slot p, whatever stood there; a query at position q sees the
    slots up to q. So what a rejected draft wrote is never seen before it is overwritten, and rolling a row back is
    nothing but feeding it a smaller position next time. Negative positions go to one spare slot that nobody reads.
    Buffers have full length on sliding layers too: a rolling buffer cannot roll back.

    Args:
        layers: how many layers write into it. With 1, any layer may (a head's layer keeps the host's layer index).
        rows: B, how many sequences.
        capacity: how many positions a row may have at least; there are whole blocks of `BLOCK`.
    """

    def __init__(self, layers: int, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, _whole_blocks(capacity)
        super().__init__(layers=[_Buffer(rows, self.capacity + 1) for _ in range(layers)])
        self.seen: Tensor | None = None  # the positions that attention reads, 0 … S-1; None: those in use
        self._rows: Tensor | None = None
        self._at = torch.empty(0)
        self._slots = torch.empty(0)
        self._width = 0
        self._only_writes = False

    @property
    def is_filled(self) -> bool:
        """Whether every layer was written to, so that there are buffers."""
        layers: list[Any] = self.layers
        return all(layer.is_initialized for layer in layers)

    @property
    def buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values by layer; they exist once something was written."""
        layers: list[Any] = self.layers
        return [(layer.keys, layer.values) for layer in layers]

    @classmethod
    def over(cls, buffers: list[tuple[Tensor, Tensor]], seen: Tensor) -> RaggedCache:
        """A cache over existing buffers [B, H, capacity + 1, Dk], whose attention reads the positions `seen` [S]."""
        keys = buffers[0][0]
        cache = cls(len(buffers), keys.shape[0], keys.shape[2] - 1)
        cache.seen = seen
        layers: list[Any] = cache.layers
        for layer, pair in zip(layers, buffers, strict=True):
            layer.hold(*pair)
        return cache

    def place(self, positions: Tensor, rows: Tensor | None = None, branches: Branches | None = None) -> VisibleFn:
        """Say where the next forward writes: positions [B, T], rows [B] (None: all). Returns who sees what.

        Args:
            branches: where it writes to other slots than its positions.
        """
        self._rows = rows
        self._at = (torch.arange(self.rows, device=positions.device) if rows is None else rows)[:, None]
        slots = positions if branches is None else branches.slots()
        self._slots = torch.where(positions < 0, self.capacity, slots)
        seen = torch.arange(self.reach(int(slots.max())), device=slots.device) if self.seen is None else self.seen
        self._width = seen.shape[0]
        return causal(positions, seen[None]) if branches is None else branches.visible(positions, seen)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy what lies in some slots of each row to others [B, m]."""
        rows = torch.arange(self.rows, device=sources.device)[:, None]
        for pair in self.buffers:
            for buffer in pair:
                buffer[rows, :, targets] = buffer[rows, :, sources]

    def clear(self, row: int, start: int = 0) -> None:
        """Zero a row from a slot on: what is not a number would spoil even what does not see it."""
        layers: list[Any] = self.layers
        for layer in layers:
            if layer.is_initialized:
                layer.keys[row, :, start:] = 0
                layer.values[row, :, start:] = 0

    def grow(self, capacity: int) -> None:
        """Make room for more positions a row; what it holds stays."""
        layers: list[Any] = self.layers
        capacity = _whole_blocks(capacity)
        more = (0, 0, 0, capacity - self.capacity)
        filled = [layer for layer in layers if layer.is_initialized]
        # All are made before one is put in place: without memory for them the cache stays as it is.
        for layer, pair in zip(filled, [(F.pad(x.keys, more), F.pad(x.values, more)) for x in filled], strict=True):
            layer.hold(*pair)
        for layer in layers:
            layer.slots = capacity + 1
        self.capacity = capacity

    def read(self) -> tuple[Tensor, Tensor]:
        """The keys and values that attention sees where `place` was said, of its rows and of one layer."""
        ((keys, values),) = self.buffers
        used = keys[:, :, : self._width], values[:, :, : self._width]
        return used if self._rows is None else (used[0][self._rows], used[1][self._rows])

    def reach(self, position: int) -> int:
        """How many slots attention reads when the newest token stands at `position`: whole blocks, so shapes repeat."""
        return min(self.capacity, _whole_blocks(max(position, 0) + 1))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx % len(self.layers)]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        seen = self._write(layer.keys, key_states), self._write(layer.values, value_states)
        if self._only_writes:
            raise _Written
        return seen

    @contextmanager
    def writing_only(self) -> Iterator[None]:
        """A layer that runs in here ends where its keys and values are written; what follows would be for nothing."""
        self._only_writes = True
        try:
            yield
        except _Written:
            pass
        finally:
            self._only_writes = False

    def _write(self, buffer: Tensor, states: Tensor) -> Tensor:
        buffer[self._at, :, self._slots] = states.transpose(1, 2)  # [B, H, T, Dk] -> [B, T, H, Dk]
        used = buffer[:, :, : self._width]
        return used if self._rows is None else used[self._rows]


class ChainCache(Cache):
    """Keys and values of one layer [B, H, S, Dk] that grow by each forward; with gradients, for training.

    Args:
        past: the pair so far; None for none.
    """

    def __init__(self, past: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(layers=[])
        self.pair = past

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        past = self.pair
        new = key_states, value_states
        self.pair = new if past is None else (torch.cat([past[0], new[0]], dim=2), torch.cat([past[1], new[1]], dim=2))
        return self.pair


# --- what a host must have ----------------------------------------------------------------------------------------


def _layer_types(config: Any) -> list[str]:
    """The attention pattern of each layer, for hosts that name it by layer and for those that do not."""
    named = getattr(config, "layer_types", None)
    if named is not None:
        return list(named)[: config.num_hidden_layers]
    sliding = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers


def context_length(config: Any) -> int:
    """How many positions a host was made for; a text may go on past them, but for a `hard_limit`."""
    return int(min(config.max_position_embeddings, hard_limit(config) or config.max_position_embeddings))


def hard_limit(config: Any) -> int | None:
    """How many positions a text of a host can have; None where positions are unbounded.

    With `longrope` (Phi-3), where its short factors end: past that it rotates all positions otherwise, and what the
    cache holds would no longer be the plain model's.
    """
    ends = [int(rope["original_max_position_embeddings"]) for rope in _ropes(config, "longrope")]
    return min(ends, default=None)


def _ropes(config: Any, rope_type: str) -> list[dict[str, Any]]:
    """The rotary embeddings of a type that a config names, for all layers or by layer type."""
    named = getattr(config, "rope_parameters", None) or {}
    every = [named] if "rope_type" in named else [rope for rope in named.values() if isinstance(rope, dict)]
    return [rope for rope in every if rope.get("rope_type") == rope_type]


def _refuse_unfit(model: PreTrainedModel) -> None:
    """Refuse, in one sentence, what nextn cannot decode with or train heads on."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise HostError(f"{name} is not a transformers model: load it with AutoModelForCausalLM.from_pretrained first.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise HostError(f"{name} is an encoder-decoder model; nextn works on decoder-only causal language models.")
    if model.get_output_embeddings() is None:
        raise HostError(f"{name} has no language model head; load it with AutoModelForCausalLM.")
    if (why := why_unfit(model)) is not None:
        raise HostError(f"{name} {why}.")
    decoder = model.get_decoder()
    if not hasattr(decoder, "config"):
        raise HostError(f"{name} does not say which of its parts is the decoder; not supported yet.")
    strange = sorted(set(_layer_types_or_none(decoder)) - _ATTENTION_TYPES)
    if strange or getattr(model, "_is_stateful", False):
        what = f"layers of type {', '.join(strange)}" if strange else "a recurrent state"
        raise HostError(f"{name} has {what}, which cannot be rolled back after a rejected draft; not supported yet.")
    if _ropes(decoder.config, "dynamic"):
        raise HostError(
            f"{name} rotates positions by the longest row of a batch (dynamic RoPE), so its text depends on its batch; "
            "not supported."
        )
    missing = [part for part in ("layers", "norm", "rotary_emb", "embed_tokens") if not hasattr(decoder, part)]
    if missing:
        raise HostError(
            f"{name} has no `{missing[0]}` in its decoder; nextn supports hosts built like Llama "
            "(decoder layers, one final norm, rotary positions)."
        )
    attention = decoder.config._attn_implementation
    if attention not in ("sdpa", "eager", ATTENTION):
        raise HostError(
            f"{name} uses attn_implementation='{attention}'; load it with attn_implementation='sdpa', or "
            "call its set_attn_implementation('sdpa') first."
        )


def _layer_types_or_none(decoder: nn.Module) -> list[str]:
    config = getattr(decoder, "config", None)
    return _layer_types(config) if hasattr(config, "num_hidden_layers") else []
