"""Replayed acceptance: what a step costs, apart from how good the heads are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class TraceError(ValueError):
    """A trace that cannot be replayed; the message says why."""


def read_trace(trace: str, drafts: int) -> list[list[int]]:
    """How many drafts stood, step by step.

    Args:
        trace: a file that `nextn bench --json` wrote, which holds a list for each of its prompts; or a τ, for which one
            list is made up.
        drafts: n - 1.

    Raises:
        TraceError: for a τ that the drafts cannot give, or a file that holds no trace.
    """
    try:
        tau = float(trace)
    except ValueError:
        return _recorded(Path(trace), drafts)
    if not 1 <= tau <= 1 + drafts:
        raise TraceError(f"τ {trace} cannot be replayed: {drafts} drafts a step give 1 to {1 + drafts}.")
    reached = [int(step * (tau - 1) + 1e-9) for step in range(101)]
    return [[after - before for before, after in pairwise(reached)]]


def _recorded(path: Path, drafts: int) -> list[list[int]]:
    try:
        found = [[int(count) for count in counts] for counts in json.loads(path.read_text())["trace"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise TraceError(f"{path} holds no trace; give a file of `nextn bench --json`, or a τ.") from None
    everything = [count for counts in found for count in counts]
    if not everything:
        raise TraceError(f"{path} holds no step; record it with more new tokens.")
    if not all(0 <= count <= drafts for counts in found for count in counts):
        raise TraceError(f"{path} was recorded with another number of drafts; these heads make {drafts}.")
    return [counts or everything for counts in found]  # a text may have ended before its first whole step


def replaying(verify: Callable[..., Any], trace: Iterator[int]) -> Callable[..., Any]:
    """The step, with as many drafts standing as the trace says instead of as many as the trunk agrees with.

    It costs what a real step costs; the text is not the trunk's.
    """

    def step(pending: Tensor, drafts: Tensor, lengths: Tensor, ends: Tensor, *cache: Any) -> tuple[Tensor, ...]:
        targets, _, _, _, tapped, _ = verify(pending, drafts, lengths, ends, *cache)
        accepted = torch.full_like(pending, next(trace))  # the same for all rows
        places = torch.arange(targets.shape[1], device=pending.device)
        positions = lengths[:, None] + places
        standing = torch.where((places <= accepted[:, None]) & (positions < ends[:, None]), positions, -1)
        newest = targets.gather(1, accepted[:, None])[:, 0]
        return targets, accepted, newest, lengths + accepted + 1, tapped, standing

    return step
