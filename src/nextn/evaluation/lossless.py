"""Is the text the trunk's own? Checked token by token, never claimed.

Each emitted token is compared, teacher-forced on the emitted prefix, with the argmax of a float32 pass of the trunk
that reads one token a step. A token is *explained* if it is that argmax or within the near-tie bound of it. The bound
is 1e-3 in float32; in bfloat16 it is measured on the machine, between passes of different widths over the same text.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nextn.decoding.engine import Engine, Generation
from nextn.evaluation.acceptance import Acceptance
from nextn.model import MultiTokenModel
from nextn.trunk import RaggedCache, Trunk

FLOAT32_BOUND = 1e-3


@dataclass(frozen=True)
class Check:
    """What a check found.

    tokens: how many were compared.
    near_ties: those that are not the reference's argmax but within the bound of it.
    unexplained: those beyond the bound; lossless decoding has none.
    bound: in logits.
    worst: the largest gap to the reference's argmax that any token had.
    """

    tokens: int
    near_ties: int
    unexplained: int
    bound: float
    worst: float

    @property
    def holds(self) -> bool:
        return self.unexplained == 0

    @classmethod
    def of(cls, gaps: Sequence[Tensor], bound: float) -> Check:
        """What the gaps of generations (see `gaps`) amount to."""
        found = torch.cat(list(gaps))
        return cls(
            tokens=len(found),
            near_ties=int(((found > 0) & (found <= bound)).sum()),
            unexplained=int((found > bound).sum()),
            bound=bound,
            worst=float(found.max()),
        )


def check(reference: Trunk, generations: Sequence[Generation], bound: float) -> Check:
    """Compare generations with a float32 trunk, one token a step.

    Args:
        reference: the trunk in float32 (`float32_twin`).
        bound: the near-tie bound in logits.
    """
    return Check.of(gaps(reference, generations), bound)


def float32_twin(base: PreTrainedModel) -> Trunk:
    """The trunk with the same weights in float32, for reference."""
    return Trunk(base if base.dtype == torch.float32 else copy.deepcopy(base).float())


def near_tie_bound(trunk: Trunk, texts: Sequence[Sequence[int]], width: int) -> float:
    """How far the gap between two candidates for the next token moves with the width of a pass.

    The largest change, over the texts, of the gap between a position's best token and its next four candidates, when
    the same text is read one token a step, `width` tokens a step, and all at once as a prompt is read. In float32 the
    bound is a constant.
    """
    if trunk.dtype == torch.float32:
        return FLOAT32_BOUND
    changes = []
    for text in texts:
        narrow = _stepwise_logits(trunk, text, 1)
        candidates = narrow.topk(5, dim=-1).indices  # [T, 5]
        narrow_gaps = _behind_best(narrow, candidates)
        for wider in (width, len(text)):
            changes.append((narrow_gaps - _behind_best(_stepwise_logits(trunk, text, wider), candidates)).abs().max())
    return float(torch.stack(changes).max())


def _behind_best(logits: Tensor, candidates: Tensor) -> Tensor:
    """By how much candidates [T, 5] fall short of the first of them in logits [T, V]."""
    found = logits.gather(1, candidates)
    return found[:, :1] - found


def agreement(reference: Trunk, ours: Sequence[Generation], theirs: Sequence[list[int]], bound: float) -> list[str]:
    """How greedy continuations of the same prompts compare, ours and theirs.

    Returns:
        for each `identical`; `near tie`, where the first difference is between two tokens within `bound` of the
        reference's best one (from there on they are different texts); or `differs`.
    """
    parted: dict[int, int] = {}  # where two texts part, by their place
    verdicts = []
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        verdicts.append("identical" if one.tokens == other else "differs")  # also where one goes on after the other
        pairs = enumerate(zip(one.tokens, other, strict=False))
        if (first := next((at for at, pair in pairs if pair[0] != pair[1]), None)) is not None:
            parted[place] = first
    halves = [
        Generation(ours[place].prompt, tokens[: first + 1])
        for place, first in parted.items()
        for tokens in (ours[place].tokens, theirs[place])
    ]
    last = [float(found[-1]) for found in gaps(reference, halves)]
    for place, pair in zip(parted, zip(last[::2], last[1::2], strict=True), strict=True):
        if max(pair) <= bound:
            verdicts[place] = "near tie"
    return verdicts


def measure(
    model: MultiTokenModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    advance: Callable[[], None] = lambda: None,
    compile: bool = False,
) -> dict[str, Any]:
    """Decode prompts with heads, plainly and (in float32) with transformers, and check every token, batch 1.

    Args:
        prompts: token ids.
        compile: whether our engine runs as machine code.
        advance: called once a prompt is done.

    Returns:
        `tau`; `tokens`, `near_ties`, `unexplained`, `bound` and `worst` of the text with heads (see `Check`); `plain`
        and `transformers`: how many texts were `identical`, parted at a `near tie`, or `differs`, against the plain
        engine and against transformers.generate (None in bfloat16, where transformers rounds in other places).
    """
    trunk, reference = model.trunk, float32_twin(model.base)
    engines = [model.engine(heads=heads) for heads in (None, 1)]
    if compile:
        engines = [engine.compile() for engine in engines]
    with_heads, without = ([_decode(engine, prompt, new_tokens) for prompt in prompts] for engine in engines)
    texts = [generation.prompt + generation.tokens for generation in with_heads[:4]]
    bound = near_tie_bound(trunk, texts, model.multi_token.n)
    checks, plain = [], Counter[str]()
    theirs = Counter[str]() if trunk.dtype == torch.float32 else None
    for generation, other in zip(with_heads, without, strict=True):
        prompt = generation.prompt
        checks.append(check(reference, [generation], bound))
        plain.update(agreement(reference, [generation], [other.tokens], bound))
        if theirs is not None:
            host: Any = model.base
            text = host.generate(
                torch.tensor([prompt], device=trunk.device), max_new_tokens=new_tokens, do_sample=False
            )[0].tolist()
            theirs.update(agreement(reference, [generation], [text[len(prompt) :]], bound))
        advance()
    return {
        "tau": Acceptance.of(with_heads, model.multi_token.n).tau,
        "tokens": sum(one.tokens for one in checks),
        "near_ties": sum(one.near_ties for one in checks),
        "unexplained": sum(one.unexplained for one in checks),
        "bound": bound,
        "worst": max(one.worst for one in checks),
        "compiled": engines[0].code is not None,
        "plain": dict(plain),
        "transformers": None if theirs is None else dict(theirs),
    }


def _decode(engine: Engine, prompt: Sequence[int], new_tokens: int) -> Generation:
    ((_, generation),) = engine.generate([prompt], new_tokens)
    return generation


def gaps(reference: Trunk, generations: Sequence[Generation], rows: int = 16) -> list[Tensor]:
    """By how much each emitted token falls short of the reference's best one, [tokens] for each generation.

    Args:
        rows: how many generations are read side by side, one token a step each.
    """
    found: list[Tensor] = []
    for start in range(0, len(generations), rows):
        found += _gaps(reference, generations[start : start + rows])
    return found


@torch.inference_mode()
def _gaps(reference: Trunk, generations: Sequence[Generation]) -> list[Tensor]:
    device = reference.device
    prompts = torch.tensor([len(generation.prompt) for generation in generations], device=device)
    ids, emitted = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(text, device=device) for text in texts], batch_first=True)
        for texts in (
            [generation.prompt for generation in generations],
            [generation.tokens for generation in generations],
        )
    )
    counts = torch.tensor([len(generation.tokens) for generation in generations], device=device)
    cache = RaggedCache(len(reference.layers), len(generations), int((prompts + counts).max()))
    places = torch.arange(ids.shape[1], device=device).expand_as(ids)
    positions = torch.where(places < prompts[:, None], places, -1)
    columns = []
    for step in range(emitted.shape[1]):
        hidden, _ = reference.run(ids, positions, cache.place(positions), cache)
        newest = hidden[torch.arange(len(hidden)), prompts - 1] if step == 0 else hidden[:, 0]
        logits = reference.logits(newest).float()  # [B, V]
        columns.append(logits.max(dim=-1).values - logits.gather(1, emitted[:, step : step + 1])[:, 0])
        ids = emitted[:, step : step + 1]
        positions = torch.where(step + 1 < counts, prompts + step, -1)[:, None]
    by_row = torch.stack(columns, dim=1) if columns else torch.empty(len(generations), 0)
    return [row[:count] for row, count in zip(by_row, counts.tolist(), strict=True)]


@torch.inference_mode()
def _stepwise_logits(trunk: Trunk, text: Sequence[int], width: int) -> Tensor:
    """Logits after every token of a text [T, V] in float32, reading `width` tokens a step."""
    ids = torch.tensor([list(text)], device=trunk.device)
    cache = RaggedCache(trunk.cache_layers, 1, ids.shape[1])
    starts = range(0, ids.shape[1], width)
    logits = []
    for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        positions = torch.arange(start, end, device=ids.device)[None]
        hidden, _ = trunk.run(ids[:, start:end], positions, cache.place(positions), cache)
        logits.append(trunk.logits(hidden)[0].float())
    return torch.cat(logits)
