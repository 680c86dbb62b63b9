"""What every report says: the machine that the figures come from, and figures in a form that JSON has; its file."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.table import Table

from nextn.evaluation.acceptance import Acceptance
from nextn.files import replacing
from nextn.formats import FormatError
from nextn.formats.bundled import best_dtype
from nextn.formats.native import writable

PAGE_TITLE = "nextn bench: "  # and the model: the title of a page, which tells it from other pages


def check_report(path: Path | None) -> None:
    """Refuse a path that a report must not be written to; to be called before the work begins.

    A report that nextn wrote may be written anew; a device or a pipe (`/dev/stdout`) takes what it is given.

    Raises:
        FormatError: for a directory, a directory that cannot be written, or a file that is no report.
    """
    if path is None:
        return
    if path.is_dir():
        raise FormatError(f"{path} is a directory; name a file.")
    if path.is_file() or not path.exists():
        writable(_target(path).parent)
    if path.is_file() and path.stat().st_size and not _is_report(path):
        raise FormatError(f"{path} is no report that nextn wrote, and is not overwritten; name another file.")


def write_report(path: Path | None, report: dict[str, Any] | str) -> None:
    """Write a report, figures or a page, in place of an earlier one; the earlier one stays if the disk is full."""
    check_report(path)  # once more: it may have come meanwhile
    if path is None:
        return
    text = report if isinstance(report, str) else json.dumps(report, indent=2) + "\n"
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    with replacing(_target(path)) as part:
        part.write_text(text)


def _target(path: Path) -> Path:
    """The file that is replaced where a report is written: that which a link points to, not the link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(200)
    if start.startswith(b"<!doctype html>"):
        return f"<title>{PAGE_TITLE}".encode() in start
    try:
        return start.startswith(b"{") and isinstance(json.loads(path.read_bytes())["machine"], dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def machine() -> dict[str, Any]:
    """The processor, its threads and the versions that decide a figure."""
    return {
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "bfloat16": "native" if best_dtype() == torch.bfloat16 else "emulated",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def acceptance_json(acceptance: Acceptance) -> dict[str, Any]:
    """`steps`, `tau` and `acceptance` (`conditional`, `cumulative`: by draft), None where a share has no cases."""
    return {
        "steps": acceptance.steps,
        "tau": _number(acceptance.tau),
        "acceptance": {
            "conditional": [_number(share) for share in acceptance.conditional],
            "cumulative": [_number(share) for share in acceptance.cumulative],
        },
    }


def acceptance_cells(row: dict[str, Any]) -> tuple[str, str, str]:
    """τ, conditional and cumulative acceptance of what `acceptance_json` gave, as a table shows them."""
    tau = "–" if row["tau"] is None else f"{row['tau']:.2f}"
    return tau, percent(row["acceptance"]["conditional"]), percent(row["acceptance"]["cumulative"])


def narrow_table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    """A table that fits 80 columns: no borders, a space between columns, the first `left` ones set to the left."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for place, column in enumerate(columns):
        wraps = place == len(columns) - 1  # where there is not room enough for all
        table.add_column(column, justify="left" if place < left else "right", no_wrap=not wraps)
    table.min_width = min(80, len(title))
    return table


def percent(shares: Sequence[float | None]) -> str:
    """`61% 34% 17%`, a dash where there is no figure."""
    return " ".join("–" if share is None or math.isnan(share) else f"{share:.0%}" for share in shares)


class Interval(NamedTuple):
    """A median and the 95% interval around it; None where one value says nothing about others."""

    value: float
    low: float | None = None
    high: float | None = None

    def cell(self, digits: int = 2) -> str:
        """`1.31 (1.20–1.42)`"""
        around = f" ({self.low:.{digits}f}–{self.high:.{digits}f})" if self.low is not None else ""
        return f"{self.value:.{digits}f}{around}"


def interval(values: Sequence[float], groups: Sequence[int] = (), draws: int = 2000) -> Interval:
    """The median of some values and its 95% interval, a bootstrap: groups are drawn anew, then what is in each.

    Args:
        groups: which group each value is of; default: each is one of its own.
    """
    median = float(np.median(values))
    if len(values) == 1:
        return Interval(median)
    generator, known = np.random.default_rng(0), np.array(values)
    by_group = [known[[place for place, g in enumerate(groups) if g == each]] for each in sorted(set(groups))]

    def median_of_groups() -> float:
        drawn = [by_group[place] for place in generator.integers(0, len(by_group), len(by_group))]
        return float(np.median(np.concatenate([generator.choice(each, len(each)) for each in drawn])))

    if groups:
        medians = np.array([median_of_groups() for _ in range(draws)])
    else:
        medians = np.median(generator.choice(known, (draws, len(known))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Interval(median, float(low), float(high))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {name.strip(): value.strip() for name, value in fields.items()}
    return (
        f"{known.get('model name', platform.machine())} (family {known.get('cpu family')}, model {known.get('model')})"
    )
