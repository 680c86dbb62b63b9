"""The one interface of heads: states per depth for training, drafts for decoding."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from nextn.config import ConfigError, MultiTokenConfig, Tap
from nextn.output import Output, build_output
from nextn.trunk import Branches, RaggedCache, Trunk, causal


@dataclass
class Window:
    """Trunk states from which drafts are made, oldest first.

    hidden [B, W, D] (m·D where the tap names m layers), positions [B, W] (consecutive in a row, negative: not in use),
    following [B, W] (the token after each state), last [B] (index of the newest state in use; its following token is
    the pending one).
    """

    hidden: Tensor
    positions: Tensor
    following: Tensor
    last: Tensor

    def newest(self, states: Tensor) -> Tensor:
        """The row's newest of states [B, W, ...] -> [B, ...]."""
        return states[torch.arange(len(states), device=states.device), self.last]


@dataclass
class Level:
    """The tokens of one depth that heads go on from.

    paths: what is drafted up to each of them, itself last [B, M, d] for drafts of number d.
    parents: which of the states of the depth before each of them follows [B, M]; None where there is one of each.
    branches: among all drafts so far, where they lie in a cache of the heads and what they see; None for a chain.
    """

    paths: Tensor
    parents: Tensor | None = None
    branches: Branches | None = None

    @property
    def tokens(self) -> Tensor:
        """[B, M]"""
        return self.paths[..., -1]

    def following(self, states: Tensor) -> Tensor:
        """The states of the depth before [B, M', D], for each token the one that it follows [B, M, D]."""
        if self.parents is None:
            return states
        return states.gather(1, self.parents[..., None].expand(-1, -1, states.shape[2]))


class Growth(Protocol):
    """Which tokens are drafted: a chain, or a tree."""

    levels: int | None  # depths after which heads may end that need not see every position; None: all

    def level(self, trunk: Trunk, output: Output, states: Tensor, depth: int, newest: Tensor) -> Level:
        """Choose the tokens of one depth.

        Args:
            output: makes logits of this depth.
            states: of the tokens before [B, M, D]; one [B, 1, D] where all have the same.
            depth: k = 2 … n.
            newest: the position of the newest state of the text [B].
        """

    def drafts(self) -> Tensor:
        """What was drafted [B, n-1] or fewer, or all nodes of a tree but the pending token [B, T-1]."""


class Chain(ABC):
    """One token a depth.

    Args:
        levels: how many depths are asked for, see `Growth`.
    """

    def __init__(self, levels: int | None = None) -> None:
        self.levels = levels
        self.tokens: list[Tensor] = []

    @abstractmethod
    def choose(self, trunk: Trunk, output: Output, state: Tensor, depth: int) -> Tensor:
        """A token [B] for states [B, D]."""

    def level(self, trunk: Trunk, output: Output, states: Tensor, depth: int, newest: Tensor) -> Level:
        self.tokens.append(self.choose(trunk, output, states[:, 0], depth))
        return Level(self.drafts()[:, None])

    def drafts(self) -> Tensor:
        return torch.stack(self.tokens, dim=1)


class BestTokens(Chain):
    """At each depth the best token."""

    def choose(self, trunk: Trunk, output: Output, state: Tensor, depth: int) -> Tensor:
        return output.best_token(trunk, state)


@dataclass
class Text:
    """A training batch as heads see it: ids [B, T], positions [B, T], documents [B, T] (-1: padding).

    trunk_kv: the trunk's keys [B, H, T, Dk] and values [B, H, T, Dv] of the layers that heads read (`Heads.reads`).
    """

    ids: Tensor
    positions: Tensor
    documents: Tensor
    trunk_kv: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _visible: dict[int | None, Tensor] = field(default_factory=dict)  # by window: the trunk and all heads ask for it

    def visible(self, window: int | None) -> Tensor:
        """Which tokens each token sees [B, 1, T, T]: causal within documents, within a window."""
        if window not in self._visible:
            self._visible[window] = causal(self.positions, self.positions, self.documents, self.documents)(window)
        return self._visible[window]

    def rows(self, chosen: Tensor) -> Text:
        """Some rows of the batch [R]."""
        kv = [(keys[chosen], values[chosen]) for keys, values in self.trunk_kv]
        return Text(self.ids[chosen], self.positions[chosen], self.documents[chosen], kv)

    def split(self, rows: int) -> Iterator[Text]:
        """The batch in parts of at most so many rows."""
        parts = zip(self.ids.split(rows), self.positions.split(rows), self.documents.split(rows), strict=True)
        return (Text(*part) for part in parts)


class LayerMix(nn.Module):
    """A learned mix of several layers' states, at first nearly the last one's (arXiv:2502.09419 mixes layers so)."""

    def __init__(self, layers: int, trunk: Trunk) -> None:
        super().__init__()
        start = torch.zeros(layers, device=trunk.device, dtype=trunk.dtype)
        start[-1] = 4.0
        self.weights = nn.Parameter(start)

    def forward(self, states: Tensor) -> Tensor:
        """[B, T, m·D] -> [B, T, D]."""
        weights = self.weights.softmax(dim=0)
        return torch.einsum("btmd,m->btd", states.unflatten(-1, (len(weights), -1)), weights)


def _check_tap(tap: Tap, trunk: Trunk) -> None:
    if isinstance(tap, list) and max(tap) >= len(trunk.layers):
        raise ConfigError(f"tap names layer {max(tap)}, but the base has {len(trunk.layers)}, counted from 0.")


class Heads(nn.Module, ABC):
    """Heads of depth 2 … n over one trunk. Head 1 is the trunk's own LM head and is not among them."""

    cache_count: int  # how many K/V caches drafting needs
    reads: tuple[int, ...] = ()  # layers of the trunk whose keys and values heads read
    recurrent: bool = False  # whether one module serves all depths
    can_calibrate: bool = False  # whether `calibrate` has a closed form
    mixes: bool = True  # whether states of several layers are mixed into one
    lookback: int = 0  # how many earlier states drafting must see again, to replace entries made from drafts

    def __init__(self, config: MultiTokenConfig, trunk: Trunk) -> None:
        super().__init__()
        self.n = config.n
        self.vocab_size = trunk.vocab_size
        self.tap: Tap = "post_norm" if config.tap is None else config.tap
        _check_tap(self.tap, trunk)
        layers = len(self.tap) if isinstance(self.tap, list) else 1
        self.hidden_width = layers * trunk.width  # of what is tapped
        self.mix = LayerMix(layers, trunk) if layers > 1 and self.mixes else None
        modules = 1 if self.recurrent else config.n - 1
        self.output: Output = build_output(config.output, trunk, modules, self.output_width(config, trunk))
        # As transformers' decoder layers have them; `model.gradient_checkpointing_enable()` finds and sets them.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] = partial(checkpoint, use_reentrant=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Heads:
        """A copy that shares the config of the trunk, which says which attention runs, unless it is copied with it."""
        for module in self.modules():
            if isinstance(config := module.__dict__.get("config"), PreTrainedConfig):
                memo.setdefault(id(config), config)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def follow_vocabulary(self, trunk: Trunk) -> None:
        """Notice that the trunk's embeddings were resized since the heads were made or last used.

        Raises:
            ConfigError: where the output has a table for the vocabulary that the trunk had before.
        """
        if trunk.vocab_size != self.vocab_size:
            self.output.resize(trunk.vocab_size)
            self.vocab_size = trunk.vocab_size

    @abstractmethod
    def forward(self, trunk: Trunk, hidden: Tensor, text: Text) -> list[Tensor]:
        """Teacher-forced states, one [B, T, D] a depth 2 … n, ready for `self.output`.

        The state of depth k at position t predicts the token t+k. Positions without such a token hold values that
        mean nothing; the loss leaves them out.

        Args:
            hidden: the tapped trunk state [B, T, m·D].
        """

    def draft(
        self,
        trunk: Trunk,
        window: Window,
        caches: list[RaggedCache],
        rows: Tensor | None,
        growth: Growth | None = None,
    ) -> Tensor:
        """Drafts, all n - 1 or as many as are asked for: ids [B, n-1], [B, T-1] of a tree. Writes K/V into `caches`.

        Args:
            caches: the heads' own; or, for heads that read the trunk's keys and values, one for each of `reads`.
            rows: which rows of the caches these are [B]; None: all.
            growth: which tokens are drafted; default: at each depth the best one.
        """
        chosen: Growth = growth or BestTokens()
        self._grow(trunk, window, caches, rows, chosen)
        return chosen.drafts()

    def remember(self, trunk: Trunk, window: Window, caches: list[RaggedCache], rows: Tensor | None) -> None:
        """See states without drafting: write into `caches` what `draft` would."""
        self._grow(trunk, window, caches, rows, BestTokens(levels=1))

    def _last(self, growth: Growth) -> int:
        """The last depth k that is asked for."""
        return self.n if growth.levels is None else growth.levels + 1

    @abstractmethod
    def _grow(
        self, trunk: Trunk, window: Window, caches: list[RaggedCache], rows: Tensor | None, growth: Growth
    ) -> None:
        """Give `growth` the states of each depth, and go on from the tokens that it chose."""

    @property
    def is_calibrated(self) -> bool:
        """Whether heads with a closed form were calibrated or trained."""
        return False

    def calibrate(self, trunk: Trunk, texts: Iterable[Text]) -> int:
        """Set where the weights start from what the trunk does on texts.

        Returns:
            how many positions were used; 0 for kinds without a closed form.
        """
        return 0

    @staticmethod
    def output_width(config: MultiTokenConfig, trunk: Trunk) -> int:
        """The width of the states that a table of their own reads."""
        return trunk.width

    def start_table(self, trunk: Trunk) -> Tensor:
        """The table [V, D] that gives the trunk's logits, by the states that the output reads: where it starts."""
        return trunk.unembedding.weight

    def regions(self) -> Iterator[nn.Module]:
        """The modules that do most of the work, each called as a whole: what torch.compile is given, one by one."""
        for child in self.children():
            if child is not self.output:
                yield from child if isinstance(child, nn.ModuleList) else (child,)

    @property
    def fusing(self) -> nn.Module | None:
        """The module that only `read` calls, once for each state."""
        return self.mix

    def read(self, hidden: Tensor) -> Tensor:
        """What was tapped [B, T, m·D] -> the state that heads start from [B, T, D]."""
        return hidden if self.mix is None else self.mix(hidden)

    def _run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """function(*inputs); with gradient checkpointing, what happens inside is computed again in the backward."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, *inputs)
        return function(*inputs)
