"""The self-speculative loop.

One trunk forward a step reads the pending token and all drafts. The drafts that equal the trunk's own choice stand,
the trunk's choice after them comes for free (the bonus token), and what was read too much is forgotten by moving
the row's length back. The text is the trunk's own, whatever the drafter says.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nextn.config import Tap
from nextn.decoding.compiled import CompileError, Progress, compiled, key, on_stderr, recall, remember
from nextn.decoding.drafting import Draft, Drafter, HeadDrafter
from nextn.decoding.verify import Verify
from nextn.output import best
from nextn.trunk import RaggedCache, Trunk

logger = logging.getLogger(__name__)

PADDING = 3  # 4 tokens a step: what small matrix kernels take at once on some CPUs


class PromptError(ValueError):
    """A prompt that cannot be decoded; the message says why."""


@dataclass
class Generation:
    """What one prompt gave.

    tokens: the emitted token ids, a stop token included.
    origins: for each of them, the number of the draft that proposed it (1 … n-1), or 0 for the trunk's own.
    accepted: for each trunk forward after the prefill, how many drafts stood; a last step that was cut short by a
        stop token or by the length is left out.
    finish: `stop` (a stop token) or `length`.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    finish: str = ""


@dataclass(frozen=True)
class Code:
    """What the steps of an engine were compiled to.

    verify, draft: what `Verify` and `Draft` compute; draft is None without heads.
    padding: see `Engine`.
    """

    verify: Callable[..., Any]
    padding: int
    draft: Callable[..., Any] | None = None


@dataclass
class _Row:
    """One sequence in a slot: what it is to give, and how far its text reaches into the cache."""

    index: int
    result: Generation
    limit: int  # how many tokens it may emit

    @property
    def length(self) -> int:
        """Tokens of its text so far; the cache holds all but the newest."""
        return len(self.result.prompt) + len(self.result.tokens)


OnTokens = Callable[[int, list[int], list[int]], None]


class Engine:
    """Greedy decoding of any number of prompts through a fixed number of rows.

    Args:
        trunk: the model whose text is wanted.
        drafter: who proposes; None decodes plainly, one token a step.
        rows: how many prompts are decoded side by side.
        stop_tokens: ids that end a text; they are emitted.

    Attributes:
        verify: the step, `Verify` or what it was compiled to.
        padding: places of a plain step that hold no token; some machines are faster so.
        code: the step as machine code; None where it runs eagerly.
        why_eager: why it could not be compiled.
        seconds: time spent in `prefill`, `verify` (the trunk's forward and what stands of the drafts) and `draft` since
            the last call of `generate` began; the rest of its time went into the loop.
    """

    def __init__(self, trunk: Trunk, drafter: Drafter | None, rows: int = 1, stop_tokens: Iterable[int] = ()) -> None:
        self.trunk, self.drafter, self.rows = trunk, drafter, rows
        self.stop_tokens = frozenset(stop_tokens)
        self.n = 1 + (drafter.drafts if drafter else 0)
        self.tap: Tap = drafter.tap if drafter else "post_norm"
        self.padding = 0
        self.verify: Callable[..., Any] = Verify(trunk, self.tap)
        self.code: Code | None = None
        self.why_eager: str | None = None
        self.seconds: dict[str, float] = defaultdict(float)

    def compile(self, progress: Progress = on_stderr) -> Engine:
        """Have the step run as machine code from now on, always for `rows` rows.

        The weights must not change afterwards. Without drafts the faster one of a bare and of a padded step is taken.

        Args:
            progress: shown while something is compiled, which takes minutes once a machine; a function from a message
                to a context, like `rich.console.Console.status`.

        Returns:
            this engine. Where nothing can be compiled it says why in a warning (and in `why_eager`), and goes on
            eagerly.
        """
        try:
            with torch.inference_mode(False), torch.no_grad():  # what is exported may not be made in inference mode
                self.use(self._compile(progress))
        except CompileError as error:
            self.padding, self.why_eager = 0, str(error)
            logger.warning("The engine runs eagerly: %s", error)
        return self

    def use(self, code: Code) -> Engine:
        """Run the step as machine code that an engine like this one was compiled to."""
        self.code, self.verify, self.padding = code, code.verify, code.padding
        if isinstance(self.drafter, HeadDrafter):
            self.drafter.compiled = code.draft
        return self

    def _compile(self, progress: Progress) -> Code:
        if not isinstance(self.drafter, HeadDrafter):
            return self._compile_plain(progress) if self.drafter is None else self._compile_verify(0, progress)
        inputs = self._example(0)
        code = Code(compiled(Verify(self.trunk, self.tap), inputs, progress), padding=0)
        targets, accepted, _, _, tapped, positions = code.verify(*inputs)
        inputs = self.drafter.step_inputs(tapped, positions, targets, accepted)
        return replace(code, draft=compiled(Draft(self.trunk, self.drafter.heads), inputs, progress))

    def _compile_plain(self, progress: Progress) -> Code:
        """The bare or the padded step, whichever is faster; measured once a machine."""
        note = f"padding-{key(Verify(self.trunk, self.tap), self._example(0))}"
        if (known := recall(note)) is not None:
            return self._compile_verify(known, progress)
        codes = [self._compile_verify(padding, progress) for padding in (0, PADDING)]
        examples = [self._example(code.padding) for code in codes]
        times: list[list[float]] = [[], []]
        for _ in range(40):
            for code, inputs, spent in zip(codes, examples, times, strict=True):
                start = time.perf_counter()
                code.verify(*inputs)[1].tolist()  # reading a result waits for it
                spent.append(time.perf_counter() - start)
        bare, padded = (statistics.median(spent) for spent in times)
        chosen = codes[int(padded < bare)]
        remember(note, chosen.padding)
        return chosen

    def _compile_verify(self, padding: int, progress: Progress) -> Code:
        return Code(compiled(Verify(self.trunk, self.tap), self._example(padding), progress), padding)

    def _example(self, padding: int) -> tuple[Any, ...]:
        """Inputs of a step of all rows, as they stand after a prompt of middle length."""
        prompts = [[0] * max(1, min(128, self.trunk.max_length // 2))] * self.rows
        self.padding = padding
        self._begin(prompts, PADDING + self.n)
        self._admit(list(enumerate(prompts)), PADDING + self.n, None)
        return self._inputs()

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, on_tokens: OnTokens | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """Decode prompts (token ids); yields (index of the prompt, its generation) as they finish.

        Args:
            max_new_tokens: the longest continuation; a text also ends where the trunk's context does.
            on_tokens: called with (index, tokens, origins) whenever a row emits.

        Raises:
            PromptError: for an empty prompt or one that fills the context.
        """
        if max_new_tokens < 1:
            raise PromptError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        for prompt in prompts:
            self._check(prompt)
        waiting = list(enumerate(prompts))[::-1]
        self._begin(prompts, max_new_tokens)
        while waiting or any(self._active):
            if waiting and not all(self._active):
                with self._clock("prefill"):
                    self._admit(waiting, max_new_tokens, on_tokens)
            else:
                self._step(on_tokens)
            for slot, row in enumerate(self._active):
                if row is not None and row.result.finish:
                    self._active[slot] = None
                    yield row.index, row.result

    # --- the algorithm ----------------------------------------------------------------------------------------

    _pending: Tensor  # [B] the newest token of each row, not yet read by the trunk
    _drafts: Tensor  # [B, n-1], or with padding [B, n-1 + padding], -1 for no draft
    _lengths: Tensor  # [B] how many tokens of each row the cache holds

    def _admit(self, waiting: list[tuple[int, Sequence[int]]], max_new_tokens: int, on_tokens: OnTokens | None) -> None:
        """Prefill: read prompts into the free rows, emit each row's first token, make its first drafts."""
        free = [slot for slot, row in enumerate(self._active) if row is None][: len(waiting)]
        for slot in free:
            index, prompt = waiting.pop()
            limit = min(max_new_tokens, self.trunk.max_length - len(prompt))
            self._active[slot] = _Row(index, Generation(list(prompt)), limit)
        rows = torch.tensor(free, device=self._lengths.device)
        texts = [self._active[slot].result.prompt for slot in free]  # type: ignore[union-attr]
        lengths = torch.tensor([len(text) for text in texts], device=rows.device)
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(text, device=rows.device) for text in texts], batch_first=True
        )
        positions = torch.arange(ids.shape[1], device=rows.device).expand(len(free), -1)
        positions = torch.where(positions < lengths[:, None], positions, -1)
        # [b, T, D]; logits are needed after each prompt's last token only
        hidden, tapped = self._forward(ids, positions, rows)
        last = lengths - 1
        pending = best(self.trunk.logits(hidden[torch.arange(len(free)), last]))
        following = ids.roll(-1, dims=1)
        following[torch.arange(len(free)), last] = pending
        self._pending[rows], self._lengths[rows] = pending, lengths
        for slot, token in zip(free, pending.tolist(), strict=True):
            self._emit(slot, [token], [0], on_tokens)
        if self.drafter:
            self._drafts[rows] = self.drafter.propose(tapped, positions, following, last, rows)

    def _step(self, on_tokens: OnTokens | None) -> None:
        """One trunk forward over the pending token and the drafts of every row, then new drafts."""
        inputs = self._inputs()
        with self._clock("verify"):
            targets, accepted, self._pending, self._lengths, tapped, positions = self.verify(*inputs)
            runs, counts = targets.tolist(), accepted.tolist()
        for slot, (run, count) in enumerate(zip(runs, counts, strict=True)):
            if self._active[slot] is not None:
                # Accepted drafts equal the targets, so the run can be read off the targets.
                self._emit(slot, run[: count + 1], [*range(1, count + 1), 0], on_tokens, accepted=count)
        if self.drafter:
            with self._clock("draft"):
                self._drafts = self.drafter.propose(tapped, positions, targets, accepted, self._all_rows)

    def _inputs(self) -> tuple:
        """What `Verify` takes."""
        ends = self._ends()
        newest = max(row.length for row in self._active if row is not None) + self._drafts.shape[1] - 1
        seen = torch.arange(self.cache.reach(newest), device=ends.device)
        return self._pending, self._drafts, self._lengths, ends, seen, self.cache.buffers

    def _emit(
        self, slot: int, tokens: list[int], origins: list[int], on_tokens: OnTokens | None, accepted: int | None = None
    ) -> None:
        """Append a run to a row's text, cut exactly at a stop token or at the length."""
        row = self._active[slot]
        assert row is not None
        result, room = row.result, row.limit - len(row.result.tokens)
        stops = (place + 1 for place, token in enumerate(tokens) if token in self.stop_tokens)
        end = min(next(stops, len(tokens)), room)
        result.tokens += tokens[:end]
        result.origins += origins[:end]
        if accepted is not None and end == len(tokens):
            result.accepted.append(accepted)
        if result.tokens[-1] in self.stop_tokens:
            result.finish = "stop"
        elif end == room:
            result.finish = "length"
        if on_tokens:
            on_tokens(row.index, tokens[:end], origins[:end])

    # --- its state --------------------------------------------------------------------------------------------

    def _begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        device = self.trunk.device
        # What is compiled has a fixed number of rows; otherwise a free row would cost for nothing.
        rows = self.rows if self.code else max(1, min(self.rows, len(prompts)))
        capacity = min(max((len(prompt) for prompt in prompts), default=0) + max_new_tokens, self.trunk.max_length)
        self.seconds = defaultdict(float)
        self._active: list[_Row | None] = [None] * rows
        self.cache = RaggedCache(len(self.trunk.layers), rows, capacity)
        self._all_rows = torch.arange(rows, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._pending = torch.zeros(rows, dtype=torch.long, device=device)
        self._drafts = torch.full((rows, self.n - 1 + self.padding), -1, device=device)
        if self.drafter:
            self.drafter.begin(self.cache)

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def _ends(self) -> Tensor:
        """The first position of each row that is not needed any more [B]; 0 for a free row."""
        ends = [0 if row is None else len(row.result.prompt) + row.limit for row in self._active]
        return torch.tensor(ends, device=self._lengths.device)

    def _forward(self, ids: Tensor, positions: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        visible = self.cache.place(positions, rows)
        return self.trunk.run(ids, positions, visible, self.cache, self.tap)

    def _check(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise PromptError("The prompt is empty: give at least one token.")
        if len(prompt) >= self.trunk.max_length:
            raise PromptError(
                f"The prompt has {len(prompt)} tokens; the model's context is {self.trunk.max_length}, which leaves no "
                "room for an answer. Shorten the prompt."
            )
