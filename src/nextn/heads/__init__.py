"""Heads of both schools behind one interface; `build_heads` picks the class that a config names."""

from __future__ import annotations

from nextn.config import MultiTokenConfig
from nextn.heads.base import Heads, Window
from nextn.heads.eagle3 import Eagle3Heads
from nextn.heads.none import NoHeads
from nextn.heads.parallel import ParallelHeads
from nextn.heads.sequential import DistinctHeads, RecurrentHeads
from nextn.heads.shared_kv import SharedKVHeads
from nextn.trunk import Trunk

__all__ = [
    "DistinctHeads",
    "Eagle3Heads",
    "Heads",
    "NoHeads",
    "ParallelHeads",
    "RecurrentHeads",
    "SharedKVHeads",
    "Window",
    "build_heads",
]


def build_heads(config: MultiTokenConfig, trunk: Trunk) -> Heads:
    """The heads that `config` describes, in the shape of `trunk`, initialised from it."""
    kinds: dict[str, type[Heads]] = {
        "none": NoHeads,
        "parallel": ParallelHeads,
        "distinct": DistinctHeads,
        "recurrent": RecurrentHeads,
        "eagle3": Eagle3Heads,
        "shared_kv": SharedKVHeads,
    }
    return kinds[config.kind](config, trunk)
