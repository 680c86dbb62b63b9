"""Which hosts does nextn work on? Every causal-LM family of transformers, as a tiny random model.

    python benchmarks/hosts.py                       # all of them, some minutes on one core; writes docs/hosts.md
    python benchmarks/hosts.py --only llama --only gemma2 --check

On each host the plain engine and every kind of heads decode prompts of several lengths in one batch, past the windows
of sliding layers, with a share of the drafts replaced by the right tokens, so that drafts are accepted and rejected.
Their text is compared with the host's own `generate` and with its forward over the whole text, the sampling scores and
the training loss with the host's own, and the model is saved and loaded. A host `works` where all of this is right, is
`refused` where nextn says in one sentence why it cannot, and is `silent` or a `traceback` otherwise.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import nextn
from nextn.decoding.engine import Engine
from nextn.decoding.pace import Pace, Profile
from nextn.support import check_host
from nextn.trunk import Trunk

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from host_checks import LENGTHS, NEW, Hinted, Host, Wrong
from hosts import MAPPED, NAMES, build

ROOT = Path(__file__).parents[1]
KINDS: dict[str, dict[str, Any]] = {
    "recurrent": {"heads": "sequential", "recurrent": True},
    "distinct": {"heads": "sequential"},
    "parallel": {"heads": "parallel"},
    "eagle3": {"heads": "eagle3", "tap": [1, 2, 3]},
    "shared_kv": {"heads": "shared_kv", "drafter_width": 32, "drafter_layers": 2},
}
N = 3
NEW_OTHERS = 16  # new tokens with other heads than recurrent ones
STEP_COSTS = Profile({0: 1.0, 1: 1.2, 2: 1.5})  # by number of drafts, for depth="auto"
STATUSES = WORKS, REFUSED, SILENT, TRACEBACK, NOT_BUILT = "works", "refused", "silent", "traceback", "not built"


@dataclass
class Verdict:
    """How a host, or a kind of heads on it, did; `why` is a sentence where it does not work."""

    status: str
    why: str = ""


@dataclass
class Result:
    """name: of the host; host: the plain engine and recurrent heads together; kinds: by kind of heads."""

    name: str
    host: Verdict
    kinds: dict[str, Verdict] = field(default_factory=dict)

    @property
    def verdicts(self) -> list[Verdict]:
        return [self.host, *self.kinds.values()]


def judge(run: Callable[[], None]) -> Verdict:
    """What comes of a run: a ValueError of nextn is a refusal, anything else that is raised a traceback."""
    try:
        run()
    except Wrong as wrong:
        return Verdict(SILENT, str(wrong))
    except Exception as error:
        where = [frame for frame in traceback.extract_tb(error.__traceback__) if "/nextn/" in frame.filename]
        if isinstance(error, ValueError) and type(error).__module__.startswith("nextn."):
            return Verdict(REFUSED, str(error))
        first = (str(error).strip().splitlines() or [""])[0]
        place = f"{Path(where[-1].filename).name}:{where[-1].lineno}" if where else "host"
        return Verdict(TRACEBACK, f"{type(error).__name__}: {first} ({place})")
    return Verdict(WORKS)


def judge_kind(host: Host, kind: str) -> Verdict:
    """Heads of one kind: attach, a forward, training, decoding."""
    wholly = kind == "recurrent"

    def run() -> None:
        config = nextn.MultiTokenConfig(n=N, weights={"preset": "gloeckle"}, **KINDS[kind])
        model = nextn.attach(host.model, config)
        host.compare_loss(model)
        texts = [prompt + text for prompt, text in zip(host.prompts, host.texts, strict=True)]
        drafter = Hinted(model.trunk, model.heads, texts)
        for depth in (None, "auto") if wholly else (None,):
            engine = Engine(model.trunk, drafter, len(LENGTHS), depth=depth)
            engine.paces = {len(LENGTHS): Pace(N - 1, STEP_COSTS)}  # measuring would take longer than all the rest
            host.compare(engine, NEW if wholly else NEW_OTHERS, f"decoding with {kind} heads, depth={depth},")
        if wholly:
            host.compare_loaded(model)

    return judge(run)


def judge_plain(host: Host) -> Verdict:
    """The plain engine: greedy text and sampling."""

    def run() -> None:
        trunk = Trunk(host.model)
        check_host(trunk)
        host.compare(Engine(trunk, None, len(LENGTHS)), NEW, "plain decoding")
        host.compare_sampling(trunk)

    return judge(run)


def judge_host(name: str) -> Result:
    """Build a host and try everything on it, but nothing more once it is refused."""
    try:
        model = build(name)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Result(name, Verdict(NOT_BUILT, f"transformers: {type(error).__name__}: {first}"))
    fits = judge(lambda: check_host(Trunk(model)))
    if fits.status != WORKS:
        return Result(name, fits)
    host = Host(model)
    plain = judge_plain(host)
    if plain.status != WORKS:
        return Result(name, plain)
    kinds = {kind: judge_kind(host, kind) for kind in KINDS}
    return Result(name, kinds["recurrent"] if kinds["recurrent"].status != WORKS else plain, kinds)


def report(results: list[Result]) -> str:
    """The page of the docs."""
    counts = Counter(result.host.status for result in results)
    entries = sum(result.host.status == WORKS and result.name in MAPPED for result in results)
    lines = [
        "# Hosts",
        "",
        "Made by `python benchmarks/hosts.py` with "
        + ", ".join(f"{name} {version}" for name, version in versions().items())
        + ": each family of the causal-LM mapping of transformers, some multimodal classes and some variants, as a "
        "tiny random model in float32 on a CPU. A host *works* where plain decoding, decoding with recurrent heads, "
        "sampling, training, saving and loading give what the host gives by itself; it is *refused* where nextn says "
        "in one sentence, when it is loaded, why it cannot work.",
        "",
        "**" + " · ".join(f"{counts[status]} {status}" for status in STATUSES) + "**; of the "
        f"{len(MAPPED)} entries of the mapping, {entries} work.",
        "",
        "## Hosts that work",
        "",
        "Columns: kinds of heads. ✓: works; a number: refused, see the sentence below.",
        "",
        "| host | " + " | ".join(KINDS) + " |",
        "|---" * (1 + len(KINDS)) + "|",
    ]
    notes: dict[str, int] = {}
    for result in (each for each in results if each.host.status == WORKS):
        cells = [_cell(result, kind, notes) for kind in KINDS]
        lines.append(f"| {result.name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {_escaped(why)}" for why, number in notes.items())]
    lines += ["", "## Hosts that do not", "", "| host | | why |", "|---|---|---|"]
    for each in (each for each in results if each.host.status != WORKS):
        lines.append(f"| {each.name} | {each.host.status} | {_escaped(each.host.why)} |")
    return "\n".join(lines) + "\n"


def _cell(result: Result, kind: str, notes: dict[str, int]) -> str:
    verdict = result.kinds[kind]
    if verdict.status == WORKS:
        return "✓"
    number = notes.setdefault(verdict.why, len(notes) + 1)
    return str(number) if verdict.status == REFUSED else f"**{verdict.status}** {number}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def versions() -> dict[str, str]:
    """Of what the results were made with."""
    torch_version = str(torch.__version__).partition("+")[0]
    return {"transformers": transformers.__version__, "torch": torch_version}


def write(path: Path, results: list[Result]) -> None:
    found = {"versions": versions(), "hosts": [asdict(result) for result in results]}
    path.write_text(json.dumps(found, indent=1) + "\n")


def kept(path: Path) -> dict[str, Result]:
    """The results in a file by name; none where it was made with other versions."""
    found = json.loads(path.read_text()) if path.is_file() else {"versions": None}
    if found["versions"] != versions():
        return {}
    results = {}
    for each in found["hosts"]:
        kinds = {kind: Verdict(**verdict) for kind, verdict in each["kinds"].items()}
        results[each["name"]] = Result(each["name"], Verdict(**each["host"]), kinds)
    return results


def main(
    only: Annotated[list[str] | None, typer.Option(help="Try this host alone; repeatable. The results of the others "
                                                   "stay what they are in --out.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with status 1 where a result is silent or "
                                        "a traceback, or where fewer than 80 entries of the mapping work.")] = False,
    docs: Annotated[Path, typer.Option(help="Where to write the page.")] = ROOT / "docs" / "hosts.md",
    out: Annotated[Path, typer.Option(help="Where to write the results.")] = ROOT / "benchmarks/results/hosts.json",
) -> None:  # fmt: skip
    unknown = sorted(set(only or []) - set(NAMES))
    if unknown:
        raise typer.BadParameter(f"There is no host {unknown[0]}; the names are in tests/hosts.py.")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results, console = kept(out) if only else {}, Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        for name in bar.track(only or NAMES, description="hosts"):
            results[name] = judge_host(name)
            for what, verdict in (("", results[name].host), *results[name].kinds.items()):
                if only or verdict.status not in (WORKS, REFUSED):
                    bar.console.print(f"{name} {what}: {verdict.status} {verdict.why}", markup=False, soft_wrap=True)
            if not check:
                write(out, [results[each] for each in NAMES if each in results])
    tried = [results[name] for name in only or NAMES]
    counts = Counter(result.host.status for result in tried)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    if check:
        bad = any(verdict.status in (SILENT, TRACEBACK) for result in tried for verdict in result.verdicts)
        entries = sum(result.host.status == WORKS and result.name in MAPPED for result in tried)
        raise typer.Exit(int(bad or (not only and entries < 80)))
    docs.write_text(report([results[name] for name in NAMES if name in results]))


if __name__ == "__main__":
    typer.run(main)
