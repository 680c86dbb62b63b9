"""What the pace's choices bring, replayed: half a minute where `nextn bench --batch` takes an hour.

    python benchmarks/pace.py --record --prompts DATA/prompts_bench.jsonl  # how many drafts stand, once
    python benchmarks/pace.py --set MARGIN=1.08                            # what another constant of pace.py would do

The replay draws, for every text, the steps of a recorded one: how many of all drafts stood. Steps take what
`nextn bench --batch` measured (results/batches.json), with noise and a drift; prompts, what the heads catch up with and
tokens that are drawn take what they took there. As in the bench one pace goes through the categories and the
temperatures in turn; `fixed` is what always one draft would bring. The figures are of this model of a machine: they
choose constants, and the bench says what came of it.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nextn.decoding import pace as paces
from nextn.decoding.pace import Pace, Profile, Tally
from nextn.decoding.sampling import Sampling
from nextn.evaluation.batches import Sweep, batches_a_category, prompts_by_category
from nextn.evaluation.bench import Settings
from nextn.evaluation.report import narrow_table
from nextn.formats.native import load, named_dtype

RESULTS = Path(__file__).parent / "results"
TEXTS, TEMPERATURES = 12, (0.0, 0.7, 1.0)  # recorded texts a category, at each of them
NEW_TOKENS = 64
PROMPT = 100  # tokens, as long as those of the bench on the average
READING, CATCHING_UP = 2.5e-3, (2e-3, 0.03e-3)  # seconds a token of a prompt; of the heads: fixed, and a token
NOISE, DRIFT, MEMORY = 0.05, 0.02, 50  # of each step's time; of the machine's, a step, and for how many steps it lasts
DRAWING = 1.3e-3  # seconds a token that is drawn takes more
MEASURED = 0.04  # how wrong the profile's times are

Recorded = dict[str, dict[str, list[list[int]]]]  # by temperature and category: of each text, drafts that stood by step


@dataclass
class Replay:
    """A machine with these times of a step of all rows, by drafts, and the pace that runs on it."""

    rows: int
    step: dict[int, float]
    choose: Callable[..., int]
    stays_plain: Callable[[], bool]
    note: Callable[..., None]
    random: random.Random
    drift: float = 0.0

    def text(self, recorded: list[list[int]], sampled: bool) -> float:
        """One batch of texts: the speed over plain steps."""
        kind, drawing = ("scores", DRAWING) if sampled else ("greedy", 0.0)
        left, tallies = [NEW_TOKENS - 1] * self.rows, [Tally.empty(max(self.step)) for _ in recorded]
        prefill = self.rows * PROMPT * READING
        seconds, unseen = prefill, self.rows * PROMPT
        chosen_for: list[int] = []
        while active := [row for row in range(self.rows) if left[row] > 0]:
            behind = unseen > 2 * (1 + max(self.step)) * len(active)  # as `Batch.is_behind`
            choice = 0
            if active != chosen_for or not self.stays_plain():
                choice = self.choose([(tallies[row], left[row]) for row in active], behind=behind, kind=kind)
            chosen_for = active
            stood = [min(choice, self.random.choice(recorded[row])) for row in active]
            emitted = len(active) + sum(stood)
            took = self._seconds(self.step[choice] + drawing * emitted, unseen if choice and behind else 0)
            self.note(
                choice, [(tallies[row], count) for row, count in zip(active, stood, strict=True)], took, behind, kind
            )
            for row, count in zip(active, stood, strict=True):
                left[row] -= 1 + count
            seconds += took / math.exp(self.drift)
            unseen = sum(1 + count for count in stood) if choice else unseen + len(active)
        return (prefill + (NEW_TOKENS - 1) * (self.step[0] + drawing * self.rows)) / seconds

    def _seconds(self, step: float, unseen: int) -> float:
        self.drift = self.drift * (1 - 1 / MEMORY) + self.random.gauss(0, DRIFT)
        fixed, each = CATCHING_UP
        catching_up = fixed + each * unseen if unseen else 0.0
        noise = self.random.gauss(0, NOISE) - NOISE**2 / 2
        return math.exp(self.drift) * (step * math.exp(noise) + catching_up)


def cells(
    recorded: Recorded, rows: int, step: dict[int, float], seed: int, fixed: int | None, repeats: int
) -> Iterator[tuple]:
    """(temperature, category, median ratio) of one run through all of them."""
    drawn = random.Random(seed)
    if fixed is None:
        wrong = {drafts: seconds * math.exp(drawn.gauss(0, MEASURED)) for drafts, seconds in step.items()}
        drawing = DRAWING * rows * math.exp(drawn.gauss(0, MEASURED))
        pace = Pace(max(step), Profile(wrong, drawn=wrong[0] + drawing))
        replay = Replay(rows, step, pace.choose, pace.stays_plain, pace.note, drawn)
    else:
        replay = Replay(rows, step, lambda *_, **__: fixed, lambda: False, lambda *_: None, drawn)
    for temperature, by_category in recorded.items():
        ratios: dict[str, list[float]] = {category: [] for category in by_category}
        for _ in range(repeats):
            for category, texts in by_category.items():
                batches = [drawn.choices(texts, k=rows) for _ in range(batches_a_category(rows, Sweep.groups))]
                ratios[category] += [replay.text(batch, temperature != "0") for batch in batches]
        for category, each in ratios.items():
            yield temperature, category, statistics.median(each)


def record(prompts: Path, console: Console) -> Recorded:
    """How many of all drafts stood, with the bundled model and the shipped heads."""
    settings = Settings(model="smollm2-135m-instruct", prompts=prompts, dtype="float32", count=8 * TEXTS)
    model = load(settings.model, dtype=named_dtype(settings.dtype)).eval()
    by_category = prompts_by_category(settings, console)
    engine, found = model.engine(TEXTS, stop_tokens=[]), {}
    for temperature in TEMPERATURES:
        found[f"{temperature:g}"] = {
            category: [
                [int(count) for count in result.accepted]
                for _, result in engine.generate(
                    [prompt.ids for prompt in texts[:TEXTS]],
                    NEW_TOKENS,
                    sampling=Sampling(temperature=temperature, seed=0),
                    progress=console,
                )
            ]
            for category, texts in by_category.items()
        }
    return found


def main(
    recording: Annotated[bool, typer.Option("--record", help="Record the drafts that stand, and stop.")] = False,
    prompts: Annotated[Path | None, typer.Option(help="To record: JSON lines with `prompt` and `category`.")] = None,
    drafts: Annotated[Path, typer.Option(help="What was recorded.")] = RESULTS / "drafts.json",
    times: Annotated[Path, typer.Option(help="What `nextn bench --batch` wrote.")] = RESULTS / "batches.json",
    runs: Annotated[int, typer.Option(help="Through all categories and temperatures.")] = 24,
    repeats: Annotated[int, typer.Option(help="Through all categories at each temperature, as the bench's.")] = 1,
    constants: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE, of pace.py.")] = None,
) -> None:
    console = Console()
    if recording:
        if prompts is None:
            raise typer.BadParameter("To record, give --prompts.")
        drafts.write_text(json.dumps(record(prompts, console)) + "\n")
        return
    for setting in constants or []:
        name, _, value = setting.partition("=")
        if not isinstance(before := getattr(paces, name, None), int | float) or not value:
            raise typer.BadParameter(f"{setting!r} is no constant of pace.py and a value, like MARGIN=1.08.")
        setattr(paces, name, type(before)(float(value)))
    recorded: Recorded = json.loads(drafts.read_text())
    categories = list(next(iter(recorded.values())))
    table = narrow_table(
        f"over plain, by the replay: mean of {runs} medians (the 10th part from below)", ("rows", "T", *categories)
    )
    measured = {row["batch"]: row["pays"] for row in json.loads(times.read_text())["rows"]}
    for rows, pays in measured.items():
        step = {int(count): each["ms"] / 1e3 for count, each in pays.items() if each["ms"] is not None}
        for fixed in (None, 1) if 1 in step else (None,):
            found: dict[tuple[str, str], list[float]] = {}
            for seed in range(runs):
                for temperature, category, ratio in cells(recorded, rows, step, seed, fixed, repeats):
                    found.setdefault((temperature, category), []).append(ratio)
            for temperature in recorded:
                ratios = [sorted(found[temperature, category]) for category in categories]
                shown = [f"{statistics.mean(each):.2f} ({each[len(each) // 10]:.2f})" for each in ratios]
                table.add_row(f"{rows}" if fixed is None else f"{rows} fixed", temperature, *shown)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
