"""Projections from states to the vocabulary, behind one interface.

Shapes: V the trunk's tokens, V' those that an output can name at all, M those whose logits it makes for one state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextn.clustering import balanced_clusters
from nextn.config import ConfigError, OutputConfig
from nextn.logits import IDENTITY, LogitTransform
from nextn.trunk import Trunk, evenly_spaced


class Output(nn.Module, ABC):
    """From states [..., D] to logits.

    The loss does not call `forward`, which would make logits of all positions, but goes through the same steps in
    chunks: `prepare`, then the rows `kept` of `projection`.
    """

    kept: Tensor | None  # the ids [V'] that it can name, a buffer; None: all
    ranking: Output | None = None  # what chooses groups of tokens, where a state decides what can be named; trained too

    @property
    def rows(self) -> Tensor | None:
        """Which rows of the table it uses [V']; None: all."""
        return None

    def transform(self, trunk: Trunk) -> LogitTransform:
        """From what the table gives to logits: the trunk's own scale or soft cap."""
        return trunk.transform

    def resize(self, vocab_size: int) -> None:
        """Follow a trunk whose embeddings were resized.

        Raises:
            ConfigError: where the output has a table for the vocabulary that the trunk had before.
        """
        raise ConfigError(
            f"The base's vocabulary was resized to {vocab_size} tokens after heads with an output of their own were "
            "attached; attach heads after resizing, or give them a shared or trimmed output."
        )

    def refresh(self, trunk: Trunk) -> None:
        """Drop what is kept of the trunk's table, where that was edited without a new version."""

    @abstractmethod
    def scores(self, trunk: Trunk, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """states [..., D] -> logits [..., M], and of which tokens: ids [M] or [..., M]; None: of all, in order."""

    def forward(self, trunk: Trunk, states: Tensor) -> Tensor:
        """states [..., D] -> logits of all tokens [..., V], minus infinity where one cannot be named."""
        logits, ids = self.scores(trunk, states)
        if ids is None:
            return logits
        whole = logits.new_full((*logits.shape[:-1], trunk.vocab_size), -torch.inf)
        return whole.scatter(-1, ids.expand_as(logits), logits)

    def best_token(self, trunk: Trunk, states: Tensor) -> Tensor:
        """states [..., D] -> the ids of the largest logits [...]."""
        logits, ids = self.scores(trunk, states)
        place = best(logits)
        if ids is None:
            return place
        return ids[place] if ids.ndim == 1 else ids.gather(-1, place[..., None])[..., 0]

    def can_name(self, trunk: Trunk, states: Tensor, token_ids: Tensor) -> Tensor:
        """Whether the states [..., D] can name these tokens [...]."""
        return self.targets(token_ids) >= 0

    def prepare(self, trunk: Trunk, states: Tensor) -> Tensor:
        """states [..., D] -> what `projection` reads."""
        return states

    def projection(self, trunk: Trunk) -> nn.Module:
        """The module that owns the table; called, it gives logits of all tokens."""
        return trunk.unembedding

    def at(self, depth: int) -> Output:
        """The output of one depth; the same for all, unless depths have one each."""
        return self

    def parts(self) -> Iterator[Output]:
        """The outputs that it consists of."""
        yield self

    @torch.no_grad()
    def fit(self, table: Tensor) -> None:
        """Start from a table [V, D], as near to it as this kind can be. Without, tables of its own are random."""

    def size(self, trunk: Trunk) -> int:
        """V', the number of tokens that can be named."""
        return trunk.vocab_size

    @abstractmethod
    def operations(self, trunk: Trunk) -> int:
        """Multiplications for one state, which are also the weights that one state needs read."""

    def targets(self, token_ids: Tensor) -> Tensor:
        """From token ids to indices into V', any shape; -100 where the token cannot be named."""
        return token_ids


class WholeOutput(Output):
    """An output that can name all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", None)


class SharedOutput(WholeOutput):
    """The trunk's own unembedding."""

    def scores(self, trunk: Trunk, states: Tensor) -> tuple[Tensor, Tensor | None]:
        return trunk.logits(states), None

    def resize(self, vocab_size: int) -> None:
        """Nothing to do: the trunk's unembedding is looked up at each use."""

    def operations(self, trunk: Trunk) -> int:
        return trunk.unembedding.weight.numel()


class OwnOutput(WholeOutput):
    """A table of its own, at first a copy of the trunk's unembedding."""

    def __init__(self, trunk: Trunk, width: int) -> None:
        super().__init__()
        self.table = _table(trunk, width, trunk.vocab_size)

    def scores(self, trunk: Trunk, states: Tensor) -> tuple[Tensor, Tensor | None]:
        return trunk.transform(self.table(states.to(self.table.weight.dtype))), None

    def projection(self, trunk: Trunk) -> nn.Module:
        return self.table

    @torch.no_grad()
    def fit(self, table: Tensor) -> None:
        self.table.weight.copy_(table)

    def operations(self, trunk: Trunk) -> int:
        return self.table.weight.numel()


class EachOutput(WholeOutput):
    """An output for each module of the heads (Gloeckle's replicated unembeddings): call it through `at`."""

    def __init__(self, outputs: Iterator[Output]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(outputs)

    def scores(self, trunk: Trunk, states: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError("each module has its own output: call output.at(depth)")

    def at(self, depth: int) -> Output:
        output = self.tables[min(depth - 2, len(self.tables) - 1)]  # a recurrent module has one for all depths
        assert isinstance(output, Output)
        return output

    def parts(self) -> Iterator[Output]:
        return (self.at(place + 2) for place in range(len(self.tables)))

    @torch.no_grad()
    def fit(self, table: Tensor) -> None:
        for part in self.parts():
            part.fit(table)

    def resize(self, vocab_size: int) -> None:
        for part in self.parts():
            part.resize(vocab_size)

    def refresh(self, trunk: Trunk) -> None:
        for part in self.parts():
            part.refresh(trunk)

    def size(self, trunk: Trunk) -> int:
        return self.at(2).size(trunk)

    def operations(self, trunk: Trunk) -> int:
        return self.at(2).operations(trunk)


class LowRankOutput(WholeOutput):
    """A table of rank r, [V, r] · [r, D]; at first the nearest one to the trunk's unembedding."""

    def __init__(self, rank: int, trunk: Trunk, width: int) -> None:
        super().__init__()
        self.down = _table(trunk, width, rank)
        self.up = _table(trunk, rank, trunk.vocab_size)

    def scores(self, trunk: Trunk, states: Tensor) -> tuple[Tensor, Tensor | None]:
        return trunk.transform(self.up(self.prepare(trunk, states))), None

    def prepare(self, trunk: Trunk, states: Tensor) -> Tensor:
        return self.down(states.to(self.down.weight.dtype))

    def projection(self, trunk: Trunk) -> nn.Module:
        return self.up

    @torch.no_grad()
    def fit(self, table: Tensor) -> None:
        """The truncated singular value decomposition: the table on its r strongest directions (Eckart and Young)."""
        exact = table.double()
        directions = torch.linalg.eigh(exact.T @ exact).eigenvectors[:, -len(self.down.weight) :]  # [D, r]
        self.down.weight.copy_(directions.T)
        self.up.weight.copy_(exact @ directions)

    def operations(self, trunk: Trunk) -> int:
        return self.down.weight.numel() + self.up.weight.numel()


@dataclass(frozen=True)
class _Gathered:
    """The rows of a table that a trimmed output names, gathered once for a version of the table."""

    version: tuple[int, int, int] = (0, 0, 0)
    rows: Tensor | None = None
    samples: Tensor | None = None  # of the table: an edit through `.data` leaves its version as it is


class TrimmedOutput(Output):
    """A subset of the vocabulary (FR-Spec, arXiv:2502.14856), its rows tied to the trunk's unembedding or its own.

    The kept ids are stored, int32 [V']. Tokens outside the subset are never drafted.
    """

    kept: Tensor

    def __init__(self, size: int, trunk: Trunk, width: int, own: bool) -> None:
        super().__init__()
        # Before a text is seen: the lowest ids, which in byte-pair vocabularies are the most frequent.
        self.register_buffer("kept", torch.arange(size, dtype=torch.int32, device=trunk.device))
        self.table = _table(trunk, width, size) if own else None
        self.vocab_size = trunk.vocab_size
        self._gathered = _Gathered()

    @property
    def rows(self) -> Tensor | None:
        return self.kept if self.table is None else None

    def keep(self, token_ids: Tensor, table: Tensor) -> None:
        """Choose the subset: token ids [V'], distinct. Rows of its own start anew, from a table [V, D]."""
        if token_ids.shape != self.kept.shape or len(token_ids.unique()) != len(token_ids):
            raise ValueError(f"a trimmed output of size {len(self.kept)} needs that many distinct token ids.")
        self.kept.copy_(token_ids.sort().values)
        self._gathered = _Gathered()
        self.fit(table)

    @torch.no_grad()
    def fit(self, table: Tensor) -> None:
        if self.table is not None:
            self.table.weight.copy_(table[self.kept.long()])

    def projection(self, trunk: Trunk) -> nn.Module:
        return trunk.unembedding if self.table is None else self.table

    def scores(self, trunk: Trunk, states: Tensor) -> tuple[Tensor, Tensor | None]:
        ids = self.kept.long()
        if self.table is not None:
            return trunk.transform(self.table(states.to(self.table.weight.dtype))), ids
        rows, bias = self._kept_rows(trunk.unembedding.weight), trunk.unembedding.bias
        return trunk.transform(F.linear(states.to(rows.dtype), rows, None if bias is None else bias[ids])), ids

    def _kept_rows(self, weight: Tensor) -> Tensor:
        if weight.requires_grad or torch.compiler.is_exporting():
            return weight[self.kept.long()]
        version = (weight.data_ptr(), weight._version, self.kept._version)  # a frozen table is gathered once
        gathered = self._gathered
        if gathered.rows is None or gathered.version != version:
            with torch.inference_mode(False), torch.no_grad():  # gathered while decoding, it must still serve training
                self._gathered = gathered = _Gathered(
                    version, weight[self.kept.long()], evenly_spaced(weight, 64).clone()
                )
        assert gathered.rows is not None
        return gathered.rows

    def refresh(self, trunk: Trunk) -> None:
        weight, samples = trunk.unembedding.weight, self._gathered.samples
        if samples is not None and not samples.equal(evenly_spaced(weight.detach(), 64)):
            self._gathered = _Gathered()

    def resize(self, vocab_size: int) -> None:
        if int(self.kept.max()) >= vocab_size:
            raise ConfigError(
                f"The base's vocabulary was resized to {vocab_size} tokens, but the trimmed output of the heads names "
                f"token {int(self.kept.max())}; attach heads after resizing."
            )
        self.vocab_size = vocab_size

    def size(self, trunk: Trunk) -> int:
        return len(self.kept)

    def operations(self, trunk: Trunk) -> int:
        return len(self.kept) * (trunk.width if self.table is None else self.table.in_features)

    def targets(self, token_ids: Tensor) -> Tensor:
        return _places(token_ids, self.kept.long(), self.vocab_size)


class ClusteredOutput(WholeOutput):
    """Tokens in clusters of one size: only those of the clusters whose centroids fit a state best are scored.

    The efficient embedder of Gemma 4's small drafters (E2B, E4B; May 2026), with its tensors: `centroids` [C, D] and
    `token_ordering` [V], the tokens cluster after cluster. How those were trained is not public. Here clusters come
    from balanced k-means on the table, and in training the centroids learn which cluster the target is in, while the
    table learns over all tokens; a hit in the log is the best token of the whole table, in a cluster that is scored.
    """

    token_ordering: Tensor

    def __init__(self, clusters: int, top: int, trunk: Trunk, width: int, own: bool) -> None:
        super().__init__()
        self.centroids = _table(trunk, width, clusters)
        self.register_buffer("token_ordering", torch.arange(trunk.vocab_size, dtype=torch.int32, device=trunk.device))
        self.table = _table(trunk, width, trunk.vocab_size) if own else None
        self.top = top

    def members(self) -> Tensor:
        """The tokens of each cluster [C, V / C]."""
        return self.token_ordering.long().view(len(self.centroids.weight), -1)

    def scores(self, trunk: Trunk, states: Tensor) -> tuple[Tensor, Tensor | None]:
        table = self.projection(trunk)
        states = states.to(table.weight.dtype)
        chosen = self._chosen(states)
        ids = self.members()[chosen].flatten(-2)  # [..., top · V / C]
        if (
            torch.compiler.is_exporting()
        ):  # rows in order of clusters, folded into a constant: each cluster is one block
            blocks = table.weight[self.members()][chosen]  # [..., top, V / C, D]
            logits = (blocks.float() * states.float()[..., None, None, :]).sum(dim=-1).flatten(-2).to(states.dtype)
        else:
            logits = (F.embedding(ids, table.weight) @ states[..., None])[..., 0]
        return trunk.transform(logits if table.bias is None else logits + table.bias[ids]), ids

    def _chosen(self, states: Tensor) -> Tensor:
        """The clusters that a state scores [..., top]."""
        return self.centroids(states.to(self.centroids.weight.dtype)).topk(self.top, dim=-1).indices

    def can_name(self, trunk: Trunk, states: Tensor, token_ids: Tensor) -> Tensor:
        return (self._chosen(states) == self._cluster_of()[token_ids][..., None]).any(dim=-1)

    def _cluster_of(self) -> Tensor:
        ordering = self.token_ordering.long()
        clusters = torch.arange(len(ordering), device=ordering.device) // self.members().shape[1]
        return torch.empty_like(ordering).scatter(0, ordering, clusters)

    def projection(self, trunk: Trunk) -> nn.Linear:
        return trunk.unembedding if self.table is None else self.table

    @property
    def ranking(self) -> Output:  # type: ignore[override]
        return _ClusterRanking(self.centroids, self._cluster_of())

    @torch.no_grad()
    def fit(self, table: Tensor) -> None:
        if self.table is not None:
            self.table.weight.copy_(table)
        members = balanced_clusters(table.float(), len(self.centroids.weight))
        self.token_ordering.copy_(members.flatten())
        self.centroids.weight.copy_(table[members].mean(dim=1))

    def operations(self, trunk: Trunk) -> int:
        scored = len(self.centroids.weight) + self.top * self.members().shape[1]
        return scored * self.centroids.in_features


class _ClusterRanking(WholeOutput):
    """Clusters in the place of tokens: what the centroids learn. Their loss does not reach the states."""

    cluster_of: Tensor

    def __init__(self, centroids: nn.Linear, cluster_of: Tensor) -> None:
        super().__init__()
        self.centroids = centroids
        self.register_buffer("cluster_of", cluster_of)

    def scores(self, trunk: Trunk, states: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.centroids(self.prepare(trunk, states)), None

    def transform(self, trunk: Trunk) -> LogitTransform:
        return IDENTITY

    def prepare(self, trunk: Trunk, states: Tensor) -> Tensor:
        return states.detach()

    def projection(self, trunk: Trunk) -> nn.Module:
        return self.centroids

    def size(self, trunk: Trunk) -> int:
        return len(self.centroids.weight)

    def operations(self, trunk: Trunk) -> int:
        return self.centroids.weight.numel()

    def targets(self, token_ids: Tensor) -> Tensor:
        return torch.where(token_ids < 0, -100, self.cluster_of[token_ids.clamp(min=0)])


def best(logits: Tensor) -> Tensor:
    """The index of the largest of logits [..., V], the first one where several are equal.

    In two stages, blocks and then the best block: on a CPU, ten times as fast as `argmax` over a whole vocabulary.
    """
    block = next(size for size in (64, 32, 16, 8, 4, 2, 1) if logits.shape[-1] % size == 0)
    blocks = logits.unflatten(-1, (-1, block))
    chosen = blocks.amax(dim=-1).argmax(dim=-1, keepdim=True)  # [..., 1]
    within = blocks.gather(-2, chosen[..., None].expand(*chosen.shape, block))[..., 0, :].argmax(dim=-1)
    return chosen[..., 0] * block + within


def _table(trunk: Trunk, width: int, rows: int) -> nn.Linear:
    """A table [rows, width] of random weights."""
    table = nn.Linear(width, rows, bias=False, device=trunk.device, dtype=trunk.dtype)
    nn.init.normal_(table.weight, std=width**-0.5)
    return table


def _places(token_ids: Tensor, listed: Tensor, vocab_size: int) -> Tensor:
    """Where token ids, any shape, stand in a list of distinct ones; -100 for those that do not."""
    index_of = torch.full((vocab_size,), -100, device=listed.device)
    index_of[listed] = torch.arange(len(listed), device=listed.device)
    return torch.where(token_ids < 0, -100, index_of[token_ids.clamp(min=0)])


def build_output(config: OutputConfig, trunk: Trunk, modules: int = 1, width: int | None = None) -> Output:
    """The output that `config` describes, over the vocabulary of `trunk`. `fit` gives it its start.

    Args:
        modules: how many modules the heads have, for an output each.
        width: the width of states that a table of its own reads; default: the trunk's.

    Raises:
        ConfigError: where the sizes do not fit the trunk.
    """
    width = (width or trunk.width) if config.has_own_table else trunk.width
    if config.has_own_table and trunk.unembedding.bias is not None:
        raise ConfigError("The base's unembedding has a bias, which own rows would lose: take the trunk's rows.")
    _check_sizes(config, trunk, width)
    make: dict[str, Callable[[], Output]] = {
        "shared": SharedOutput,
        "separate": lambda: OwnOutput(trunk, width),
        "low_rank": lambda: LowRankOutput(config.rank or 0, trunk, width),
        "trimmed": lambda: TrimmedOutput(config.size or 0, trunk, width, config.own),
        "clustered": lambda: ClusteredOutput(config.clusters or 0, config.top_clusters or 0, trunk, width, config.own),
    }
    each = config.kind == "separate" or config.each
    return EachOutput(make[config.kind]() for _ in range(modules)) if each else make[config.kind]()


def _check_sizes(config: OutputConfig, trunk: Trunk, width: int) -> None:
    vocabulary = trunk.vocab_size
    if config.size and config.size > vocabulary:
        raise ConfigError(f"output.size is {config.size}, but the base's vocabulary has {vocabulary} tokens.")
    if config.rank and config.rank > min(width, vocabulary):
        raise ConfigError(f"output.rank is {config.rank}, but the table has no more than {min(width, vocabulary)}.")
    if config.clusters and vocabulary % config.clusters:
        fitting = [count for count in range(2, vocabulary // 2 + 1) if vocabulary % count == 0]
        near = sorted(fitting, key=lambda count: abs(count - (config.clusters or 0)))[:2]
        raise ConfigError(
            f"output.clusters is {config.clusters}, but clusters of one size must divide the base's vocabulary of "
            f"{vocabulary} tokens: choose for example {' or '.join(map(str, near))}."
            if near
            else f"output.clusters: a vocabulary of {vocabulary} tokens cannot be divided; choose another output."
        )
