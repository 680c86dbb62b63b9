"""What the steps of an engine are compiled to, and how long they take: found out once a machine."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from nextn.config import cache_directory
from nextn.decoding.batch import Step
from nextn.decoding.choosing import DrawOne
from nextn.decoding.compiled import CompileError, Progress, compiled, key, machine_name, recall, remember
from nextn.decoding.drafting import Asked, Codes, Draft, Drafts, HeadDrafter, NoisyDraft
from nextn.decoding.pace import TREE, Profile
from nextn.decoding.rows import DecodingError, Generation, Row
from nextn.decoding.sampling import GREEDY, Sampling
from nextn.decoding.tree import Chances
from nextn.decoding.verify import Draw, Score, Verify, judged
from nextn.digest import shapes_of, structure_of
from nextn.quantized import why_eager
from nextn.store import Store

if TYPE_CHECKING:
    from nextn.decoding.engine import Engine

PADDING = 3  # 4 tokens a step: what small matrix kernels take at once on some CPUs
# How often each kind of step is timed at most, and until how many seconds have passed: with a quarter of them what a
# draft takes over a plain step came out as 1.16 to 1.43, by turns.
TURNS, LONGEST = 32, 4.0
METHOD = 3  # another number where steps changed so much, or how they are timed, that profiles which were kept are off
DRAWN = -2  # beside TREE: a plain step whose tokens are drawn


@dataclass(frozen=True)
class Code:
    """What the steps of an engine were compiled to.

    depths: for how many drafts a row there is code.
    verify, score: what `Verify` and `Score` compute, by the width of `drafts`, padding included.
    padding: see `Batch`.
    draw: what `Draw` computes; for chance, on a CPU alone.
    drafts, noisy_drafts: what `Draft` and `NoisyDraft` compute, by how many drafts they make; noisy ones for chance.
    """

    depths: tuple[int, ...]
    verify: dict[int, Callable[..., Any]]
    padding: int = 0
    score: dict[int, Callable[..., Any]] = field(default_factory=dict)
    draw: DrawOne | None = None
    drafts: Codes = field(default_factory=dict)
    noisy_drafts: Codes = field(default_factory=dict)


def build(engine: Engine, progress: Progress, sampling: bool) -> Code:
    """Compile what an engine runs, see `Engine.compile`."""
    if (why := why_eager(engine.trunk.model)) is not None:
        raise CompileError(why)
    full = engine.n - 1 if engine.depth == "auto" else int(engine.depth)
    depths = sorted({0, 1, full}) if engine.depth == "auto" else [full]
    module = Score if sampling else Verify
    steps = {depth: _step(engine, module, depth, 0, progress) for depth in depths if depth}
    padding: int = 0
    if 0 in depths:
        plain, padding = _plain_step(engine, module, progress)
        steps = {padding: plain} | steps
    # What scores can also judge, in a call or two more: less to compile than another trunk with the judging in it.
    code = Code(tuple(depths), {width: _judging(step) for width, step in steps.items()} if sampling else steps, padding)
    if sampling:
        code = replace(code, score=steps, draw=_draw(engine, progress))
    if not full or not isinstance(engine.drafter, HeadDrafter):
        return code
    targets, accepted, _, _, tapped, positions = Verify(engine.trunk, engine.tap)(*example(engine, full))
    engine.drafter.propose(tapped, positions, targets, accepted, engine.all_rows)  # which makes the heads' caches
    chances = Chances(
        torch.ones(engine.rows, device=targets.device),
        torch.zeros_like(targets[:, :1]).expand(-1, engine.n - 1).clone(),
    )

    def by_levels(module: type[Draft], noise: Chances | None) -> Codes:
        drafter = engine.drafter
        assert isinstance(drafter, HeadDrafter)

        def draft(levels: int) -> Callable[..., Any]:
            width = levels + 1
            step = tapped[:, :width], positions[:, :width], targets[:, :width], accepted
            inputs = drafter.step_inputs(levels, *step, noise)
            return compiled(module(engine.trunk, drafter.heads, levels), inputs, progress)

        # Modules that look back make all drafts, however few are wanted.
        wanted = [full] if drafter.heads.lookback else code.depths
        return {levels: draft(levels) for levels in wanted if levels}

    code = replace(code, drafts=by_levels(Draft, None))
    return replace(code, noisy_drafts=by_levels(NoisyDraft, chances)) if sampling else code


def _plain_step(engine: Engine, module: type[Score], progress: Progress) -> tuple[Callable[..., Any], int]:
    """The bare or the padded step and its padding, whichever is faster; measured once a machine."""
    if engine.rows > PADDING or engine.trunk.device.type != "cpu":  # enough tokens as it is, or kernels for one
        return _step(engine, module, 0, 0, progress), 0
    note = f"padding-{key(module(engine.trunk, engine.tap), example(engine, 0))}"
    if (known := recall(note)) is not None:
        return _step(engine, module, 0, known, progress), known
    paddings = (0, PADDING)
    codes = [_step(engine, module, 0, padding, progress) for padding in paddings]
    examples = [example(engine, 0, padding) for padding in paddings]
    times: list[list[float]] = [[], []]
    for _ in range(40):
        for code, inputs, spent in zip(codes, examples, times, strict=True):
            start = time.perf_counter()
            float(code(*inputs)[1].flatten()[0])  # reading a result waits for it
            spent.append(time.perf_counter() - start)
    bare, padded = (statistics.median(spent) for spent in times)
    choice = int(padded < bare)
    remember(note, paddings[choice])
    return codes[choice], paddings[choice]


def _draw(engine: Engine, progress: Progress) -> DrawOne | None:
    if engine.trunk.device.type != "cpu":  # where all vocabularies at once take one launch an operation
        return None
    temperature, key, codes = torch.ones((), dtype=torch.float32), torch.zeros((), dtype=torch.long), {}
    for dtype in (engine.trunk.dtype, torch.float32):  # of logits, and of what processors made of them
        scores = torch.zeros(engine.trunk.vocab_size, dtype=dtype)
        codes[dtype] = compiled(Draw(), (scores, temperature, key), progress)

    def draw(scores: Tensor, *rest: Tensor) -> Tensor:
        code = codes.get(scores.dtype)
        return code(scores, *rest)[0] if code else Draw()(scores, *rest)

    return draw


def _judging(score: Callable[..., Any]) -> Callable[..., Any]:
    """`Verify` by what computes `Score`."""
    return lambda pending, drafts, lengths, *rest: judged(drafts, lengths, *score(pending, drafts, lengths, *rest))


def _step(engine: Engine, module: type[Score], drafts: int, padding: int, progress: Progress) -> Callable[..., Any]:
    return compiled(module(engine.trunk, engine.tap), example(engine, drafts, padding), progress)


def example(engine: Engine, drafts: int, padding: int = 0, rows: int | None = None) -> tuple[Any, ...]:
    """Inputs of a step of all rows, as they stand after a prompt of middle length."""
    count = rows or engine.rows
    length = max(1, min(128, engine.trunk.max_length // 2))
    texts = [Row(index, Generation([0] * length), PADDING + engine.n) for index in range(count)]
    engine.begin(texts, count)
    engine.admit(deque(texts))
    if (error := next((row.result.error for row in texts if row.result.error), None)) is not None:
        raise error
    tokens = torch.full((count, drafts + padding), -1, device=engine.trunk.device)
    return engine.inputs(tokens)


@torch.inference_mode()
def measure(engine: Engine, rows: int) -> Profile:
    """What steps take here, by how many drafts they read; measured once a machine, for `depth="auto"`.

    Args:
        rows: how many there are.
    """
    widths = engine.code.depths if engine.code else range(engine.n)
    profiles, name = Store(cache_directory() / "profiles", ".json"), _profile_name(engine, rows)
    if (known := Profile.read(profiles, name)) is not None and set(known.step) == set(widths):
        return known
    engine.keep_scores = False  # whatever was asked before: to keep them takes longer
    example(engine, 0, rows=rows)

    lengths, pending = engine.lengths, engine.pending

    def step_with(drafts: int) -> Step:
        engine.lengths, engine.pending = lengths, pending
        return engine.verify_chain(Drafts(pending.new_zeros(rows, drafts)), greedy=True)

    before = {drafts: step_with(drafts) for drafts in widths}

    def seconds(choice: int, wanted: Asked | None) -> float:
        engine.lengths, engine.pending = lengths, pending
        engine.fresh = before[max(widths) if choice == TREE else max(0, choice)]
        engine.hand_out()  # and then no row has anything to catch up with
        for row in engine.slots:
            if row is not None:
                row.unread = []
                row.sampling = Sampling(temperature=1.0) if choice == DRAWN else GREEDY
        start = time.perf_counter()
        width = len(engine.step(wanted, greedy=choice != DRAWN).run.tolist()[0])
        if wanted is not None and width == 1:
            raise DecodingError("there is not enough memory for drafts")
        return time.perf_counter() - start

    choices = {drafts: Asked(levels=drafts) if drafts else None for drafts in widths}
    if engine.tree is not None:
        choices[TREE] = Asked(tree=engine.tree)
    if engine.code is None or engine.code.score:  # otherwise tokens are drawn by another, slower kind of step
        choices[DRAWN] = None

    def turn() -> dict[int, float]:
        return {choice: seconds(choice, wanted) for choice, wanted in choices.items()}

    # In turns, since machines are now faster, now slower; the first one warms up.
    turn()
    turns, begun = [turn(), turn()], time.perf_counter()
    while len(turns) < TURNS and time.perf_counter() - begun < LONGEST:
        turns.append(turn())
    plain = statistics.median(each[0] for each in turns)
    step = {choice: plain * statistics.median(each[choice] / each[0] for each in turns) for choice in choices}
    profile = Profile(step, step.pop(TREE, None), step.pop(DRAWN, None))
    profile.write(profiles, name)
    return profile


def _profile_name(engine: Engine, rows: int) -> str:
    """A digest of all that decides how long a step takes; of the weights that is their shapes alone."""
    modules = [engine.trunk.model, *([engine.drafter.heads] if isinstance(engine.drafter, HeadDrafter) else [])]
    code = engine.code and (engine.code.depths, engine.code.padding, bool(engine.code.score))
    parts = (
        METHOD, engine.trunk.settings(), [(structure_of(module), shapes_of(module)) for module in modules], rows,
        engine.tree, code, torch.__version__, transformers.__version__, machine_name(engine.trunk.device),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
