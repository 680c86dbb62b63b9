"""Projections from states to the vocabulary, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextn.config import OutputConfig
from nextn.trunk import Trunk


class Output(nn.Module, ABC):
    """From states [..., D] to logits over the tokens that this output can name.

    The loss does not call `forward`, which would make logits of all positions, but goes through the same steps in
    chunks: `prepare`, then the rows `kept` of `projection`.
    """

    kept: Tensor | None  # the ids [V'] that it can name, a buffer; None: all

    @property
    def rows(self) -> Tensor | None:
        """Which rows of the table it uses [V']; None: all."""
        return None

    @abstractmethod
    def forward(self, trunk: Trunk, states: Tensor) -> Tensor:
        """states [..., D] -> logits [..., V'], V' the number of tokens that can be named."""

    def prepare(self, trunk: Trunk, states: Tensor) -> Tensor:
        """states [..., D] -> what `projection` reads."""
        return states

    def projection(self, trunk: Trunk) -> nn.Module:
        """The module that owns the table; called, it gives logits of all tokens."""
        return trunk.unembedding

    def at(self, depth: int) -> Output:
        """The output of one depth; the same for all, unless depths have tables of their own."""
        return self

    @abstractmethod
    def size(self, trunk: Trunk) -> int:
        """V', the number of tokens that can be named."""

    @abstractmethod
    def token_ids(self, index: Tensor) -> Tensor:
        """From indices into V' to token ids of the trunk, any shape."""

    @abstractmethod
    def targets(self, token_ids: Tensor) -> Tensor:
        """From token ids to indices into V', any shape; -100 where the token cannot be named."""


class SharedOutput(Output):
    """The trunk's own unembedding."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", None)

    def forward(self, trunk: Trunk, states: Tensor) -> Tensor:
        return trunk.logits(states)

    def size(self, trunk: Trunk) -> int:
        return trunk.vocab_size

    def token_ids(self, index: Tensor) -> Tensor:
        return index

    def targets(self, token_ids: Tensor) -> Tensor:
        return token_ids


class OwnOutput(SharedOutput):
    """A table of its own, at first a copy of the trunk's unembedding."""

    def __init__(self, trunk: Trunk, width: int) -> None:
        super().__init__()
        self.table = _own_table(trunk, width, None)

    def forward(self, trunk: Trunk, states: Tensor) -> Tensor:
        return self.table(states.to(self.table.weight.dtype))

    def projection(self, trunk: Trunk) -> nn.Module:
        return self.table


class SeparateOutput(SharedOutput):
    """A table of its own for each module of the heads (Gloeckle's replicated unembeddings): call it through `at`."""

    def __init__(self, modules: int, trunk: Trunk, width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(OwnOutput(trunk, width) for _ in range(modules))

    def forward(self, trunk: Trunk, states: Tensor) -> Tensor:
        raise NotImplementedError("each module has its own table: call output.at(depth)")

    def at(self, depth: int) -> Output:
        table = self.tables[min(depth - 2, len(self.tables) - 1)]  # a recurrent module has one for all depths
        assert isinstance(table, OwnOutput)
        return table


class TrimmedOutput(Output):
    """A subset of the vocabulary (FR-Spec, arXiv:2502.14856), its rows tied to the trunk's unembedding or its own.

    The kept ids are stored, int32 [V']. Tokens outside the subset are never drafted.
    """

    kept: Tensor

    def __init__(self, size: int, trunk: Trunk, width: int, own: bool) -> None:
        super().__init__()
        # Before a text is seen: the lowest ids, which in byte-pair vocabularies are the most frequent.
        self.register_buffer("kept", torch.arange(size, dtype=torch.int32, device=trunk.device))
        self.table = _own_table(trunk, width, self.kept) if own else None
        self.vocab_size = trunk.vocab_size
        self._rows: tuple[tuple[int, int, int], Tensor] | None = None

    @property
    def rows(self) -> Tensor | None:
        return self.kept if self.table is None else None

    def keep(self, token_ids: Tensor, trunk: Trunk) -> None:
        """Choose the subset: token ids [V'], distinct. Rows of its own start anew."""
        if token_ids.shape != self.kept.shape or len(token_ids.unique()) != len(token_ids):
            raise ValueError(f"a trimmed output of size {len(self.kept)} needs that many distinct token ids.")
        self.kept.copy_(token_ids.sort().values)
        self._rows = None
        if self.table is not None:
            self.table = _own_table(trunk, self.table.in_features, self.kept).to(self.table.weight.dtype)

    def projection(self, trunk: Trunk) -> nn.Module:
        return trunk.unembedding if self.table is None else self.table

    def forward(self, trunk: Trunk, states: Tensor) -> Tensor:
        if self.table is not None:
            return self.table(states.to(self.table.weight.dtype))
        rows, bias = self._kept_rows(trunk.unembedding.weight), trunk.unembedding.bias
        return F.linear(states.to(rows.dtype), rows, None if bias is None else bias[self.kept.long()])

    def _kept_rows(self, weight: Tensor) -> Tensor:
        if weight.requires_grad or torch.compiler.is_exporting():
            return weight[self.kept.long()]
        version = (weight.data_ptr(), weight._version, self.kept._version)  # a frozen table is gathered once
        if self._rows is None or self._rows[0] != version:
            with torch.inference_mode(False), torch.no_grad():  # gathered while decoding, it must still serve training
                self._rows = version, weight[self.kept.long()]
        return self._rows[1]

    def size(self, trunk: Trunk) -> int:
        return len(self.kept)

    def token_ids(self, index: Tensor) -> Tensor:
        return self.kept[index].long()

    def targets(self, token_ids: Tensor) -> Tensor:
        index_of = torch.full((self.vocab_size,), -100, device=self.kept.device)
        index_of[self.kept.long()] = torch.arange(len(self.kept), device=self.kept.device)
        return torch.where(token_ids < 0, -100, index_of[token_ids.clamp(min=0)])


def best(logits: Tensor) -> Tensor:
    """The index of the largest of logits [..., V], the first one where several are equal.

    In two stages, blocks and then the best block: on a CPU, ten times as fast as `argmax` over a whole vocabulary.
    """
    block = next(size for size in (64, 32, 16, 8, 4, 2, 1) if logits.shape[-1] % size == 0)
    blocks = logits.unflatten(-1, (-1, block))
    chosen = blocks.amax(dim=-1).argmax(dim=-1, keepdim=True)  # [..., 1]
    within = blocks.gather(-2, chosen[..., None].expand(*chosen.shape, block))[..., 0, :].argmax(dim=-1)
    return chosen[..., 0] * block + within


def _own_table(trunk: Trunk, width: int, kept: Tensor | None) -> nn.Linear:
    """A table [V', width]: at first the trunk's rows, or random ones where the width is another."""
    vocabulary = trunk.vocab_size if kept is None else len(kept)
    table = nn.Linear(width, vocabulary, bias=False, device=trunk.device, dtype=trunk.dtype)
    with torch.no_grad():
        if width == trunk.width:
            rows = trunk.unembedding.weight
            table.weight.copy_(rows if kept is None else rows[kept.long()])
        else:
            table.weight.normal_(std=width**-0.5)
    return table


def build_output(config: OutputConfig, trunk: Trunk, modules: int = 1, width: int | None = None) -> Output:
    """The output that `config` describes, over the vocabulary of `trunk`.

    Args:
        modules: how many modules the heads have, for tables of their own.
        width: the width of states that a table of its own reads; default: the trunk's.
    """
    width = width or trunk.width
    if config.kind == "shared":
        return SharedOutput()
    if config.kind == "separate":
        return SeparateOutput(modules, trunk, width)
    assert config.size is not None
    if config.size > trunk.vocab_size:
        raise ValueError(f"output.size is {config.size}, but the base's vocabulary has {trunk.vocab_size} tokens.")
    return TrimmedOutput(config.size, trunk, width, config.own)


def most_frequent(token_ids: Tensor, size: int, vocab_size: int, always: list[int]) -> Tensor:
    """The `size` most frequent of token_ids (any shape), with the ids of `always` among them; sorted [size]."""
    counts = torch.bincount(token_ids.flatten(), minlength=vocab_size)
    counts[torch.tensor(always, dtype=torch.long)] = counts.max() + 1
    # A stable sort: ties, unseen tokens among them, go to the lower id.
    return counts.argsort(descending=True, stable=True)[:size].sort().values
