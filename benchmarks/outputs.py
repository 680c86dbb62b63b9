"""What does each output cost a draft, and what acceptance is left? One run, compiled, interleaved, on real prompts.

    python benchmarks/outputs.py --data answers.jsonl --prompts prompts_bench.jsonl --work /tmp/outputs

Each output is derived from the heads that ship for SmolLM2-135M-Instruct and recovers for the same number of steps (its
`derived` τ is from before that, on 12 prompts); the shipped heads are measured as they are. Heads and compiled steps
are kept in `--work`, so that the same command goes on where it was stopped. An hour on two cores.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nextn.compress import Compression, compress
from nextn.data import prompt_ids, read_prompts
from nextn.decoding.engine import Engine, Generation
from nextn.distill import interleaved
from nextn.evaluation.acceptance import DEFINITIONS, Acceptance, covered
from nextn.evaluation.costs import stored_bytes
from nextn.evaluation.lossless import agreement, float32_twin, near_tie_bound
from nextn.evaluation.report import Interval, acceptance_json, interval, machine
from nextn.formats import native
from nextn.formats.bundled import NAME, best_dtype, shipped_heads
from nextn.model import MultiTokenModel

OUTPUTS = [
    "shared",
    "separate",
    *(f"trimmed:{size}" for size in (2048, 4096, 8192, 16384, 32768)),
    *(f"low_rank:{rank}" for rank in (128, 256)),
    *(f"clustered:512:{top}" for top in (8, 16, 32)),
]
SHIPPED = "shipped"
PLAIN = "plain"


@dataclass
class Run:
    """What one output did with each prompt, by repeat."""

    engine: Engine
    about: dict[str, Any]
    results: list[Generation]
    seconds: list[list[float]]  # by prompt
    draft: list[float]  # seconds of a step's drafts, one figure a prompt and repeat


def main(
    data: Annotated[Path, typer.Option(help="The model's own answers, to count tokens and to recover on.")],
    prompts: Annotated[Path, typer.Option(help="JSON lines with `prompt` and `category`.")],
    work: Annotated[Path, typer.Option(help="Where derived heads are kept.")],
    output: Annotated[list[str] | None, typer.Option(help="Outputs in short form; repeatable. Default: all.")] = None,
    steps: Annotated[int, typer.Option(help="Of recovery.")] = 100,
    count: Annotated[int, typer.Option(help="Prompts, from each category in turn.")] = 30,
    new_tokens: Annotated[int, typer.Option(help="Tokens a prompt.")] = 96,
    repeats: Annotated[int, typer.Option(help="How often each output answers each prompt.")] = 2,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile.")] = False,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/results/outputs.json"),
    plot: Annotated[Path, typer.Option()] = Path("docs/outputs.svg"),
) -> None:
    console = Console()
    reports = {name: _derived(name, data, prompts, work, steps, count, console) for name in output or OUTPUTS}
    base = native.load_base(native.base_of(shipped_heads()), best_dtype()).eval()
    tokenizer = native.load_tokenizer(native.base_of(shipped_heads()))
    records = interleaved(read_prompts(prompts))[:count]
    asked = [prompt_ids(tokenizer, record["prompt"]) for record in records]
    runs: dict[str, Run] = {}
    models: dict[str, MultiTokenModel] = {}
    for name in (PLAIN, SHIPPED, *reports):
        directory = work / _file(name) if name in reports else shipped_heads()
        model = native.load(directory, base=base)
        engine = model.engine(heads=1 if name == PLAIN else None)
        engine = engine if eager else engine.compile(lambda message, name=name: console.status(f"{name}: {message}"))
        models[name] = model
        runs[name] = Run(engine, {} if name == PLAIN else _about(model, reports.get(name)), [], [[] for _ in asked], [])
    with Progress(console=console) as bar:
        task = bar.add_task("measuring", total=(repeats * len(asked) + 1) * len(runs))
        for repeat in range(repeats + 1):  # the first one warms up
            for place, ids in enumerate(asked if repeat else asked[:1]):
                for run in runs.values():
                    _answer(run, ids, new_tokens, place, warm=repeat > 0, first=repeat == 1)
                    bar.advance(task)
    for name, run in runs.items():
        if name != PLAIN:
            run.about["coverage"] = covered(models[name], run.results)
    reference, texts = float32_twin(base), [result.tokens for result in runs[PLAIN].results]
    whole = [[*result.prompt, *result.tokens] for result in runs[PLAIN].results]
    bound = 1e-3 if base.dtype == torch.float32 else near_tie_bound(models[SHIPPED].trunk, whole[:6], 4)
    verdicts = {name: agreement(reference, run.results, texts, bound) for name, run in runs.items()}
    found = {
        "outputs": {name: _row(run, runs[PLAIN], records) for name, run in runs.items()},
        "prompts": len(asked),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "recovery_steps": steps,
        "compiled": all(run.engine.code is not None for run in runs.values()),
        "beside_plain": {name: {each: found.count(each) for each in set(found)} for name, found in verdicts.items()},
        "machine": machine(),
    }
    out.write_text(json.dumps(found, indent=2) + "\n")
    console.print(_table(found))
    console.print(
        f"[dim]{DEFINITIONS} Derived: τ before recovery, on 12 prompts. Draft: all drafts of a step. Tokens a second: "
        "end to end, prefill included, medians over repeats.[/dim]"
    )
    _plot(found, plot)


def _file(name: str) -> str:
    return name.replace(":", "-").replace(",", "-")


def _derived(
    name: str, data: Path, prompts: Path, work: Path, steps: int, count: int, console: Console
) -> dict[str, Any]:
    """Derive an output, unless that is done; what compress says of it."""
    directory = work / _file(name)
    wanted = Compression(
        heads=NAME, output=name, data=[data], steps=steps, prompts=prompts, count=min(12, count), new_tokens=64
    )
    report = directory / "report.json"
    if report.is_file() and (found := json.loads(report.read_text()))["settings"] == _settings(wanted):
        return found
    console.rule(name)
    found = compress(wanted, directory, console) | {"settings": _settings(wanted)}  # refuses what was made otherwise
    report.write_text(json.dumps(found))
    return found


def _settings(wanted: Compression) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(wanted), default=str))


def _about(model: MultiTokenModel, report: dict[str, Any] | None) -> dict[str, Any]:
    heads = model.heads
    return {
        "output": str(model.multi_token.output),
        "bytes": stored_bytes(heads),
        "output_operations": heads.output.operations(model.trunk),
        "derived_tau": report["tried"][0]["tau"] if report else None,
    }


def _answer(run: Run, ids: list[int], new_tokens: int, place: int, warm: bool, first: bool) -> None:
    start = time.perf_counter()
    ((_, result),) = run.engine.generate([ids], new_tokens)
    seconds = time.perf_counter() - start
    if warm:
        run.seconds[place].append(seconds)
        if result.accepted:
            run.draft.append(run.engine.seconds["draft"] / len(result.accepted))
    if first:
        run.results.append(result)


def _row(run: Run, plain: Run, records: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = [len(result.tokens) for result in run.results]
    usual, others = ([statistics.median(times) for times in each.seconds] for each in (run, plain))
    ratio = interval([theirs / ours for ours, theirs in zip(usual, others, strict=True)])
    categories = sorted({record["category"] for record in records})

    def acceptance(category: str | None) -> dict[str, Any]:
        chosen = [
            result
            for result, record in zip(run.results, records, strict=True)
            if category in (None, record["category"])
        ]
        return acceptance_json(Acceptance.of(chosen, run.engine.n))

    row = run.about | acceptance(None)
    row["tokens_per_second"] = sum(tokens) / sum(usual)
    row["over_plain"] = dict(zip(("ratio", "low", "high"), ratio, strict=True))
    row["draft_ms"] = 1e3 * statistics.median(run.draft) if run.about else 0.0
    row["by_category"] = {category: acceptance(category) for category in categories}
    row["seconds"] = run.seconds
    return row


def _table(found: dict[str, Any]) -> Table:
    shown = Table(title="outputs of SmolLM2-135M-Instruct's heads", title_justify="left", box=SIMPLE_HEAD)
    categories = list(found["outputs"][PLAIN]["by_category"])
    columns = ("output", "MB", "coverage", "draft, ms", "derived", *categories, "τ", "tokens/s", "over plain")
    for column in columns:
        shown.add_column(column, justify="left" if column == "output" else "right", no_wrap=column != "output")
    for name, row in found["outputs"].items():
        over, about = row["over_plain"], "output" in row
        coverage, derived = row.get("coverage"), row.get("derived_tau")
        shown.add_row(
            name if name != SHIPPED else f"{row['output']} (ships)",
            f"{row['bytes'] / 1e6:.1f}" if about else "",
            f"{coverage:.1%}" if coverage else "",
            f"{row['draft_ms']:.2f}" if about else "",
            f"{derived:.2f}" if derived else "",
            *(f"{row['by_category'][category]['tau']:.2f}" for category in categories),
            f"{row['tau']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            Interval(over["ratio"], over["low"], over["high"]).cell() if about else "",
        )
    return shown


def _plot(found: dict[str, Any], path: Path) -> None:
    """τ against the time of a step's drafts, one line a kind of output; the label is the output's size."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "nextn"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.6))
    kinds: dict[str, list[tuple[float, float, str]]] = {}
    for row in found["outputs"].values():
        if "output" in row and row["derived_tau"] is not None:
            kind, _, size = row["output"].partition(":")
            kinds.setdefault(kind, []).append((row["draft_ms"], row["tau"], size.split(":")[-1]))
    for kind, points in kinds.items():
        points.sort()
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", label=kind)
        for x, y, size in points:
            above = (-4, 7) if kind == "clustered" else (3, -12)  # two lines run close to each other
            axes.annotate(size, (x, y), textcoords="offset points", xytext=above, fontsize=8)
    ships = found["outputs"][SHIPPED]
    axes.plot([ships["draft_ms"]], [ships["tau"]], "k*", markersize=13, label=f"{ships['output']}, as shipped")
    axes.set_xlabel("time of the drafts of a step, ms")
    axes.set_ylabel("τ, tokens a trunk forward")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
