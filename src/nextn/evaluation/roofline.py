"""How near one step comes to what the machine can do: bytes over measured bandwidth, operations over measured rate."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from nextn.decoding.drafting import HeadDrafter
from nextn.decoding.engine import Engine
from nextn.output import SharedOutput


def step_cost(engine: Engine, drafts: int | None = None) -> dict[str, int]:
    """What one step of one row must read and do.

    Each weight is counted once (those of a recurrent module may stay in the processor's cache between drafts), an
    embedding table that is not the unembedding not at all, and every expert of a mixture.

    Args:
        drafts: how many are made and read; default: all. A plain step costs nothing of the heads.

    Returns:
        `weight_bytes`, `cache_bytes_per_position`, `operations` (two per weight and token), of trunk and heads
        together; `draft_weight_bytes` and `draft_operations`, the part of the heads.
    """
    trunk, drafts = engine.trunk, engine.n - 1 if drafts is None else drafts
    sizes = {id(parameter): parameter.numel() for parameter in trunk.model.parameters()}
    if trunk.embedding.weight is not trunk.unembedding.weight:
        del sizes[id(trunk.embedding.weight)]
    weights = sum(sizes.values())
    draft_weights = draft_operations = 0
    if isinstance(engine.drafter, HeadDrafter) and drafts:
        heads = engine.drafter.heads
        every = sum(parameter.numel() for parameter in heads.parameters())
        own, table = every - sum(part.numel() for part in heads.output.parameters()), heads.output.operations(trunk)
        # A shared output is the trunk's table again; the rows of any other one are read besides.
        draft_weights = own + (0 if isinstance(heads.output, SharedOutput) else table)
        # All states of a step go through the heads once; a recurrent module sees its own states after that.
        draft_operations = 2 * (own * (1 + drafts + (drafts - 1) * heads.recurrent) + table * drafts)
    size = trunk.unembedding.weight.element_size()
    pairs = engine.cache.buffers
    for cache in engine.drafter.caches if isinstance(engine.drafter, HeadDrafter) else []:
        # Where there were plain steps only, there is none yet; it will be like the trunk's last.
        pairs = pairs + (cache.buffers if cache.is_filled else engine.cache.buffers[-1:])
    layer_bytes = [sum(part.shape[1] * part.shape[3] * part.element_size() for part in pair) for pair in pairs]
    return {
        "weight_bytes": (weights + draft_weights) * size,
        "draft_weight_bytes": draft_weights * size,
        "cache_bytes_per_position": sum(layer_bytes),
        "operations": 2 * weights * (1 + drafts) + draft_operations,
        "draft_operations": draft_operations,
    }


def measure_machine(dtype: torch.dtype, read_bytes: int, device: str = "cpu") -> dict[str, float]:
    """Bandwidth in bytes a second of reading as much as a step reads, and the rate of a large matrix product.

    Args:
        read_bytes: the size of what is read; what fits a cache is read faster than what does not.
    """
    memory = torch.ones(max(read_bytes, 2**20) // 4, device=device)
    side = 4096 if device == "cuda" else 1024
    square = torch.randn(side, side, device=device).to(dtype)
    return {
        "bandwidth": memory.numel() * 4 / _shortest(memory.sum),
        "rate": 2 * side**3 / _shortest(lambda: square @ square),
    }


def bound(cost: dict[str, int], machine: dict[str, float], length: float) -> dict[str, float]:
    """The least seconds of one step with `length` positions in the cache, by bytes and by operations."""
    read = cost["weight_bytes"] + cost["cache_bytes_per_position"] * length
    return {
        "bytes": read,
        "by_bytes": read / machine["bandwidth"],
        "by_operations": cost["operations"] / machine["rate"],
    }


def _shortest(function: Callable[[], Tensor], repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function().flatten()[0].item()  # reading a result waits for it
        times.append(time.perf_counter() - start)
    return min(times)
