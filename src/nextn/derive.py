"""Heads derived from trained ones: another output, fewer depths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextn.config import ConfigError, MultiTokenConfig, OutputConfig
from nextn.model import MultiTokenModel
from nextn.output import ClusteredOutput, LowRankOutput, Output, OwnOutput, TrimmedOutput


@torch.no_grad()
def derive(
    model: MultiTokenModel, output: OutputConfig, n: int | None = None, kept: Tensor | None = None
) -> MultiTokenModel:
    """Heads on the same base with another output, or for fewer tokens; what stays is copied.

    Args:
        n: tokens predicted; default: as many as before.
        kept: the ids that a trimmed output keeps, as many as its size; default: the lowest.

    Raises:
        ConfigError: where the output cannot be derived from the one that is there, or depths cannot be left out.
    """
    config = _shortened(model.multi_token, n or model.multi_token.n).model_copy(update={"output": output})
    derived = MultiTokenModel(model.base, config).eval()
    wanted = derived.heads.state_dict()
    before = model.heads.state_dict()
    same = output == model.multi_token.output and kept is None  # as long as it stays, it is copied like the rest
    derived.heads.load_state_dict(
        {name: before[name] if same or not name.startswith("output.") else wanted[name] for name in wanted}
    )
    if same:
        return derived
    parts = list(derived.heads.output.parts())
    for part, table in zip(parts, _tables(model, derived, len(parts)), strict=True):
        if isinstance(part, TrimmedOutput) and kept is not None:
            part.keep(kept.to(part.kept.device), table)
        else:
            part.fit(table)
    return derived


def _shortened(config: MultiTokenConfig, n: int) -> MultiTokenConfig:
    if not 2 <= n <= config.n:
        raise ConfigError(f"The heads predict {config.n} tokens; depths can be 2 to {config.n}, not {n}.")
    if n < config.n and config.chaining == "anticausal":
        raise ConfigError("Each anticausal head reads the one after it; depths cannot be left out.")
    changes: dict[str, Any] = {"n": n}
    if config.weights.values is not None:
        changes["weights"] = config.weights.model_copy(update={"values": config.weights.values[:n]})
    return config.model_copy(update=changes)


def _tables(model: MultiTokenModel, derived: MultiTokenModel, parts: int) -> list[Tensor]:
    """The table [V, D] that each part of a new output is to be near to."""
    start = derived.heads.start_table(model.trunk)
    if not derived.multi_token.output.has_own_table:
        return [start] * parts
    tables = [_whole_table(part, start) for part in model.heads.output.parts()]
    if len(tables) > 1 and parts == 1:
        raise ConfigError(
            f"The heads have {len(tables)} tables, one each; an output of its own for all of them cannot be derived. "
            "Give ,each or an output with the trunk's rows."
        )
    return tables * parts if len(tables) == 1 else tables[:parts]


def _whole_table(part: Output, start: Tensor) -> Tensor:
    """What an output multiplies states with, whole; `start` stands for the trunk's rows."""
    match part:
        case OwnOutput():
            return part.table.weight
        case LowRankOutput():
            return part.up.weight @ part.down.weight
        case ClusteredOutput() if part.table is not None:
            return part.table.weight
        case TrimmedOutput() if part.table is not None:
            whole = start.clone()
            whole[part.kept.long()] = part.table.weight
            return whole
        case _:
            return start
