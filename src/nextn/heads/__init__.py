"""Heads of both schools behind one interface; `build_heads` picks the class that a config names."""

from __future__ import annotations

from nextn.config import MultiTokenConfig
from nextn.heads.base import Heads, Window
from nextn.heads.parallel import ParallelHeads
from nextn.heads.sequential import DistinctHeads, RecurrentHeads
from nextn.trunk import Trunk

__all__ = ["DistinctHeads", "Heads", "ParallelHeads", "RecurrentHeads", "Window", "build_heads"]


def build_heads(config: MultiTokenConfig, trunk: Trunk) -> Heads:
    """The heads that `config` describes, in the shape of `trunk`, initialised from it."""
    if config.heads == "parallel":
        return ParallelHeads(config, trunk)
    return RecurrentHeads(config, trunk) if config.recurrent else DistinctHeads(config, trunk)
