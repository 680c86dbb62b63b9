"""What a frozen trunk gave for each block of a text, kept on disk, so that further epochs cost the heads alone."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from nextn.data import PackedBlocks
from nextn.digest import structure_of, weights_of
from nextn.formats import native
from nextn.model import MultiTokenModel

SHARD = 2**30  # bytes, and a file no larger


class KeptOutputs(Dataset):
    """Blocks together with what the trunk gave for them, which is computed once and kept in files.

    A directory holds a file a shard for each of the model's `trunk_outputs`, and `done`, with one byte a block that is
    set once its outputs are written: a resumed training goes on with what is there.

    Args:
        blocks: the text.
        model: whose trunk is frozen; head 1 must have no weight, for what it reads is not kept.
        top_k: keep the trunk's most probable tokens too, so many a position.
        under: where the directory goes.
    """

    def __init__(self, blocks: PackedBlocks, model: MultiTokenModel, top_k: int, under: Path) -> None:
        self.blocks, self.model, self.top_k = blocks, model, top_k
        directory = native.writable(under / _name(blocks, model, top_k))
        fields = _fields(model, top_k)
        self.per_shard = max(
            1, SHARD // (blocks.length * max(width * dtype.itemsize for width, dtype in fields.values()))
        )
        starts = range(0, len(blocks), self.per_shard)
        self.shards = [
            {
                name: _mapped(
                    directory / f"{name}-{shard:05}.bin",
                    (min(self.per_shard, len(blocks) - start), blocks.length, width),
                    dtype,
                )
                for name, (width, dtype) in fields.items()
            }
            for shard, start in enumerate(starts)
        ]
        self.done = _mapped(directory / "done", (len(blocks),), torch.uint8)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index]
        shard, place = divmod(index, self.per_shard)
        kept = {name: tensor[place] for name, tensor in self.shards[shard].items()}
        if not self.done[index]:
            parts = ("input_ids", "attention_mask", "position_ids")
            batch: Any = {name: block[name][None].to(self.model.trunk.device) for name in parts}
            for name, output in self.model.trunk_outputs(**batch, top_k=self.top_k).items():
                kept[name].copy_(output[0])
            self.done[index] = 1
        return block | kept

    def fill(self, bar: Progress) -> None:
        """Compute what is not there yet, so that the time left of the training is that of the heads alone."""
        missing = (self.done == 0).nonzero().flatten().tolist()
        for index in bar.track(missing, description="running the trunk"):
            self[index]

    @staticmethod
    def bytes_needed(blocks: PackedBlocks, model: MultiTokenModel, top_k: int) -> int:
        """The size of all files."""
        a_token = sum(width * dtype.itemsize for width, dtype in _fields(model, top_k).values())
        return len(blocks) * blocks.length * a_token

    @staticmethod
    def bytes_there(under: Path) -> int:
        """What a training that was cut short has on the disk already; files are sparse until they are filled."""
        return sum(file.stat().st_blocks * 512 for file in under.glob("trunk_outputs-*/*"))

    @staticmethod
    def forget(under: Path) -> None:
        """Remove the files of a training."""
        for directory in under.glob("trunk_outputs-*"):
            shutil.rmtree(directory, ignore_errors=True)  # several processes may do so at once


def _fields(model: MultiTokenModel, top_k: int) -> dict[str, tuple[int, torch.dtype]]:
    """What is kept for a token, by its name in `trunk_outputs`: how many numbers, and of which type."""
    states = {"trunk_states": (model.heads.hidden_width, model.trunk.dtype)}
    k = min(top_k, model.trunk.vocab_size)
    return states | ({"top_tokens": (k, torch.int32), "top_log_probs": (k, torch.float16)} if k else {})


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that lives in a file, which is made where it is missing."""
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def _name(blocks: PackedBlocks, model: MultiTokenModel, top_k: int) -> str:
    """A name for the directory that another text, base, tap or objective does not share.

    The base counts as it is in memory: its weights may have been changed since it was loaded, or adapters be active.
    """
    what = (
        structure_of(model.base), weights_of(model.base), model.trunk.settings(), torch.__version__,
        transformers.__version__, model.heads.tap, blocks.length, top_k, model.multi_token.objective.temperature,
    )  # fmt: skip
    digest = hashlib.sha256(repr(what).encode())
    for place in range(len(blocks)):
        for part in ("input_ids", "position_ids"):  # positions tell documents apart
            digest.update(blocks[place][part].numpy().data)
    return f"trunk_outputs-{digest.hexdigest()[:16]}"
