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

from nextn.decoding.engine import Generation
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


@torch.inference_mode()
def check(reference: Trunk, generations: Sequence[Generation], bound: float) -> Check:
    """Compare generations with a float32 trunk, one token a step.

    Args:
        reference: the trunk in float32 (`float32_twin`).
        bound: the near-tie bound in logits.
    """
    gaps = torch.cat([_gaps(reference, generation) for generation in generations if generation.tokens])
    return Check(
        tokens=len(gaps),
        near_ties=int(((gaps > 0) & (gaps <= bound)).sum()),
        unexplained=int((gaps > bound).sum()),
        bound=bound,
        worst=float(gaps.max()),
    )


def float32_twin(base: PreTrainedModel) -> Trunk:
    """The trunk with the same weights in float32, for reference."""
    return Trunk(base if base.dtype == torch.float32 else copy.deepcopy(base).float())


def near_tie_bound(trunk: Trunk, texts: Sequence[Sequence[int]], width: int) -> float:
    """How far the gap between two candidates for the next token moves with the width of a pass.

    The largest change, over the texts, of the gap between a position's best token and its next four candidates, when
    the same text is read one token a step and `width` tokens a step. In float32 the bound is a constant.
    """
    if trunk.dtype == torch.float32:
        return FLOAT32_BOUND
    changes = []
    for text in texts:
        narrow, wide = (_stepwise_logits(trunk, text, step) for step in (1, width))
        candidates = narrow.topk(5, dim=-1).indices  # [T, 5]
        first, second = (logits.gather(1, candidates) for logits in (narrow, wide))
        changes.append(((first[:, :1] - first) - (second[:, :1] - second)).abs().max())
    return float(torch.stack(changes).max())


def agreement(reference: Trunk, prompt: Sequence[int], ours: list[int], theirs: list[int], bound: float) -> str:
    """How two greedy continuations of one prompt compare.

    Returns:
        `identical`; `near tie`, where the first difference is between two tokens within `bound` of the reference's
        best one (from there on they are different texts); or `differs`.
    """
    if ours == theirs:
        return "identical"
    first = next((place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if first is None:
        return "differs"  # one ends where the other goes on
    gaps = [_gaps(reference, Generation(list(prompt), tokens[: first + 1]))[-1] for tokens in (ours, theirs)]
    return "near tie" if max(gaps) <= bound else "differs"


def measure(
    model: MultiTokenModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Decode prompts with heads, plainly and (in float32) with transformers, and check every token, batch 1.

    Args:
        prompts: token ids.
        advance: called once a prompt is done.

    Returns:
        `tau`; `tokens`, `near_ties`, `unexplained`, `bound` and `worst` of the text with heads (see `Check`); `plain`
        and `transformers`: how many texts were `identical`, parted at a `near tie`, or `differs`, against the plain
        engine and against transformers.generate (None in bfloat16, where transformers rounds in other places).
    """
    trunk, reference = model.trunk, float32_twin(model.base)
    with_heads = [_decode(model, prompt, new_tokens, None) for prompt in prompts]
    texts = [generation.prompt + generation.tokens for generation in with_heads[:4]]
    bound = near_tie_bound(trunk, texts, model.multi_token.n)
    checks, plain = [], Counter[str]()
    theirs = Counter[str]() if trunk.dtype == torch.float32 else None
    for generation in with_heads:
        prompt, ours = generation.prompt, generation.tokens
        checks.append(check(reference, [generation], bound))
        plain[agreement(reference, prompt, ours, _decode(model, prompt, new_tokens, 1).tokens, bound)] += 1
        if theirs is not None:
            host: Any = model.base
            text = host.generate(
                torch.tensor([prompt], device=trunk.device), max_new_tokens=new_tokens, do_sample=False
            )[0].tolist()
            theirs[agreement(reference, prompt, ours, text[len(prompt) :], bound)] += 1
        advance()
    return {
        "tau": Acceptance.of(with_heads, model.multi_token.n).tau,
        "tokens": sum(one.tokens for one in checks),
        "near_ties": sum(one.near_ties for one in checks),
        "unexplained": sum(one.unexplained for one in checks),
        "bound": bound,
        "worst": max(one.worst for one in checks),
        "plain": dict(plain),
        "transformers": None if theirs is None else dict(theirs),
    }


def _decode(model: MultiTokenModel, prompt: Sequence[int], new_tokens: int, heads: int | None) -> Generation:
    ((_, generation),) = model.engine(heads=heads).generate([prompt], new_tokens)
    return generation


@torch.inference_mode()
def _gaps(reference: Trunk, generation: Generation) -> Tensor:
    """By how much each emitted token falls short of the reference's best one [tokens]."""
    text = generation.prompt + generation.tokens
    logits = _stepwise_logits(reference, text[:-1], 1, prefill=len(generation.prompt))
    logits = logits[len(generation.prompt) - 1 :]
    emitted = torch.tensor(generation.tokens, device=logits.device)
    return logits.max(dim=-1).values - logits.gather(1, emitted[:, None])[:, 0]


@torch.inference_mode()
def _stepwise_logits(trunk: Trunk, text: Sequence[int], width: int, prefill: int = 1) -> Tensor:
    """Logits after every token of a text [T, V] in float32, reading `width` tokens a step after the first `prefill`."""
    ids = torch.tensor([list(text)], device=trunk.device)
    cache = RaggedCache(len(trunk.layers), 1, ids.shape[1])
    starts = [0, *range(prefill, ids.shape[1], width)]
    logits = []
    for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        positions = torch.arange(start, end, device=ids.device)[None]
        hidden, _ = trunk.run(ids[:, start:end], positions, cache.place(positions), cache)
        logits.append(trunk.logits(hidden)[0].float())
    return torch.cat(logits)
