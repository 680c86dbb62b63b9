"""One self-contained page with plots of what `nextn bench` found."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from nextn.data import TextStream
from nextn.evaluation.bench import conditions, tables
from nextn.evaluation.report import PAGE_TITLE

OURS, PLAIN, OTHERS = "#2563eb", "#93b4f5", "#b8bec9"
PART_COLOURS = {"verify": "#2563eb", "draft": "#16a34a", "loop": "#dc2626"}
# Tokens that the trunk chose itself stay bare; draft 1, 2, 3 … have tints.
TINTS = ("#bbf7d0", "#a5f3fc", "#f5d0fe", "#fef08a", "#bfdbfe", "#fecaca")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; } h3 { font-size: .95rem; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; }
td, th { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e5e7eb; font-weight: normal; }
th { color: #6b7280; } td:first-child, th:first-child { text-align: left; }
.note { color: #6b7280; font-size: .85rem; white-space: pre-line; }
.text { background: #f9fafb; padding: 1rem; border-radius: .5rem; white-space: pre-wrap; }
.text span, .legend span { border-radius: .2rem; } .legend span { padding: .1rem .5rem; margin-right: .5rem; }
"""


def page(found: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The page, as HTML.

    Args:
        found: what `nextn bench --json` writes.
        tokenizer: of the model, to show the sample.
    """
    sections = [
        ("Speed by contender", _svg(speed_plot(found))),
        ("Speed-up by category", _svg(speedup_plot(found))),
        ("Acceptance by draft", _svg(acceptance_plot(found))),
        ("Where a step's time goes", _svg(split_plot(found))),
        ("A sample, coloured by who proposed each token", sample(found, tokenizer)),
        ("The figures", "".join(_table(table) for table in tables(found))),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    title = html.escape(f"{PAGE_TITLE}{found['model']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f'<body><h1>{title}</h1><p class="note">{html.escape(conditions(found))}</p>{body}</body></html>\n'
    )


def speed_plot(found: dict[str, Any]) -> Figure:
    """Tokens per second by contender, with intervals."""
    speeds = found["overall"]["tokens_per_second"]
    names = sorted(speeds, key=lambda name: speeds[name]["value"])
    figure = Figure(figsize=(8, 0.45 * len(names) + 0.8))
    axes = figure.subplots()
    colours = [OURS if name == "nextn" else PLAIN if name == "plain" else OTHERS for name in names]
    values = [speeds[name]["value"] for name in names]
    axes.barh(names, values, color=colours, xerr=_reach([speeds[name] for name in names]), ecolor="#4b5563")
    for place, name in enumerate(names):
        high = speeds[name]["high"]  # None where there is no interval
        end = (values[place] if high is None else high, place)
        axes.annotate(f"{values[place]:.0f}", end, (6, 0), textcoords="offset points", va="center")
    axes.set_xlabel("tokens per second (95% interval over prompts)")
    return _plain(figure)


def speedup_plot(found: dict[str, Any]) -> Figure:
    """How many times faster nextn is than each other, by category."""
    rows = {**found["by_category"], "all": found["overall"]}
    others = [name for name in found["overall"]["speedup"] if name in ("plain", "transformers", "transformers lookup")]
    figure = Figure(figsize=(8, 3.4))
    axes = figure.subplots()
    width = 0.8 / len(others)
    for order, (name, colour) in enumerate(zip(others, (PLAIN, OTHERS, "#6b7280"), strict=False)):
        ratios = [row["speedup"][name] for row in rows.values()]
        places = np.arange(len(rows)) + (order - (len(others) - 1) / 2) * width
        values = [ratio["value"] for ratio in ratios]
        axes.bar(
            places, values, width * 0.92, label=f"over {name}", color=colour, yerr=_reach(ratios), ecolor="#4b5563"
        )
    axes.axhline(1, color="#dc2626", linewidth=1, linestyle=":")
    axes.set_xticks(range(len(rows)), rows)
    axes.set_ylabel("nextn is so many times as fast")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _plain(figure)


def acceptance_plot(found: dict[str, Any]) -> Figure:
    """Both kinds of acceptance by draft number, a line a category."""
    figure = Figure(figsize=(8, 3))
    both = figure.subplots(1, 2, sharey=True)
    drafts = range(1, found["n"])
    for axes, kind in zip(both, ("conditional", "cumulative"), strict=True):
        for name, row in {**found["by_category"], "all": found["overall"]}.items():
            shares = [np.nan if share is None else 100 * share for share in row["acceptance"][kind]]
            axes.plot(drafts, shares, marker="o", label=name, color="#111827" if name == "all" else None)
        axes.set_title(kind, fontsize=10)
        axes.set_xticks(drafts)
        axes.set_xlabel("draft")
        axes.set_ylim(0, 100)
    both[0].set_ylabel("% that stand")
    both[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _plain(figure)


def split_plot(found: dict[str, Any]) -> Figure:
    """A step's parts beside the least time that its bytes take."""
    splits, lines = found["overall"]["time_split"], found["overall"]["roofline"]
    figure = Figure(figsize=(8, 1.8))
    axes = figure.subplots()
    for place, name in enumerate(reversed(splits)):
        left = 0.0
        for part in ("verify", "draft", "loop"):
            width = splits[name]["ms_per_step"][part]
            axes.barh(place, width, left=left, color=PART_COLOURS[part], label=part if place == 0 else None)
            left += width
        limit = lines[name]["ms_by_bytes"]
        axes.plot([limit, limit], [place - 0.4, place + 0.4], color="#111827", linewidth=2,
                  label="bytes / bandwidth" if place == 0 else None)  # fmt: skip
    axes.set_yticks(range(len(splits)), list(reversed(splits)))
    axes.set_xlabel("ms a step")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _plain(figure)


def sample(found: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The sample answer, each token in the tint of the draft that proposed it."""
    shown, stream = found["sample"], TextStream(tokenizer)
    texts = [stream.push(token) for token in shown["tokens"]]
    texts[-1:] = [text + stream.flush() for text in texts[-1:]]
    pieces = []
    for text, origin in zip(map(html.escape, texts), shown["origins"], strict=True):
        pieces.append(text if origin == 0 else f'<span style="background:{_tint(origin)}">{text}</span>')
    legend = "".join(f'<span style="background:{_tint(draft)}">draft {draft}</span>' for draft in range(1, found["n"]))
    return (
        f'<p class="legend">the trunk itself &nbsp; {legend}</p><p><b>{html.escape(shown["prompt"])}</b></p>'
        f'<div class="text">{"".join(pieces)}</div>'
    )


def _tint(origin: int) -> str:
    return TINTS[(origin - 1) % len(TINTS)]


def _reach(figures: list[dict[str, Any]]) -> np.ndarray:
    """How far intervals reach below and above their values [2, number]; 0 where there is none."""
    known = [
        one if one["low"] is not None else dict.fromkeys(("value", "low", "high"), one["value"]) for one in figures
    ]
    return np.array([[one["value"] - one["low"] for one in known], [one["high"] - one["value"] for one in known]])


def _plain(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _svg(figure: Figure) -> str:
    stored = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nextn", "font.family": "sans-serif"}):
        figure.savefig(stored, format="svg", bbox_inches="tight", metadata={"Date": None})
    drawn = stored.getvalue()
    return drawn[drawn.index("<svg") :]


def _table(table: Any) -> str:
    def line(cells: Iterable[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    head = line((column.header for column in table.columns), "th")
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return f"<h3>{html.escape(str(table.title))}</h3><table>{head}{''.join(line(row, 'td') for row in rows)}</table>"
