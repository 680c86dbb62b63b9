"""One text in the making: what it is to become, what it gave so far, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from nextn.decoding.pace import Tally
from nextn.decoding.sampling import GREEDY, Sampling
from nextn.decoding.stats import Logprob, SpecDecodingStats

OnTokens = Callable[[int, list[int], list[int]], None]
Stop = Callable[[int, list[int]], bool]


class DecodingError(RuntimeError):
    """A text that could not be continued; the message says why."""


@dataclass
class Generation:
    """What one prompt gave.

    tokens: the emitted token ids, a stop token included.
    origins: for each of them, the number of the draft that proposed it (1 … n-1), or 0 for the trunk's own.
    accepted: for each trunk forward after the prefill, how many drafts stood; a last step that was cut short by a
        stop token or by the length is left out.
    drafted: for each of those, how many drafts after one another there were; 0 is a plain step.
    finish: `stop` (a stop token or a stopping criterion), `length`, `cancelled` or `error`.
    error: what went wrong; the tokens before it are right.
    scores, logits: for each token what it was chosen by [V], after the processors and before; where asked for.
    logprobs: for each token its log-probability and those of the most probable ones, see `Sampling`; where asked for.
    num_spec_tokens: how many drafts a step has at most, n - 1.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    finish: str = ""
    error: Exception | None = None
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    num_spec_tokens: int = 0

    @property
    def spec_decoding_stats(self) -> SpecDecodingStats:
        """What was drafted and accepted so far."""
        return SpecDecodingStats.of(self.drafted, self.accepted, self.num_spec_tokens)

    def cut(self, length: int) -> None:
        """Take back the tokens after so many, and the steps that they came from."""
        for values in (self.tokens, self.origins, self.scores, self.logits, self.logprobs):
            del values[length:]
        ends = accumulate((count + 1 for count in self.accepted), initial=1)
        whole = sum(end <= length for end in ends) - 1
        del self.accepted[max(0, whole) :], self.drafted[max(0, whole) :]


@dataclass
class Run:
    """What one step brings to a row.

    tokens, origins: as in `Generation`; a token -1 stands for logits that are not numbers.
    accepted, drafted: None for the token that follows a prefill.
    scores, logits, logprobs: of each token, where they are kept.
    """

    tokens: list[int]
    origins: list[int]
    accepted: int | None = None
    drafted: int = 0
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)


@dataclass(eq=False)
class Row:
    """One text in a slot.

    limit: how many tokens it may emit.
    tally: what drafts bring to it, see `Pace`.
    held: how many positions of its prompt the cache held already.
    read: how many positions the drafter has seen.
    unread: tapped trunk states [t, D] from there on, which the drafter has not seen yet, oldest first.
    """

    index: int
    result: Generation
    limit: int
    sampling: Sampling = GREEDY
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()
    stop: Stop | None = None
    on_tokens: OnTokens | None = None
    tally: Tally = field(default_factory=lambda: Tally([], []))
    held: int = 0
    read: int = 0
    unread: list[Tensor] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        return self.result.prompt + self.result.tokens

    @property
    def length(self) -> int:
        """Tokens of its text so far; the cache holds all but the newest."""
        return len(self.result.prompt) + len(self.result.tokens)

    def emit(self, run: Run) -> None:
        """Append a run, cut exactly where the text ends. What a caller's function raises ends this text alone."""
        result = self.result
        end = self._end(run.tokens)
        result.tokens += run.tokens[:end]
        result.origins += run.origins[:end]
        result.scores += run.scores[:end]
        result.logits += run.logits[:end]
        result.logprobs += run.logprobs[:end]
        if run.accepted is not None and end == len(run.tokens):
            result.accepted.append(run.accepted)
            result.drafted.append(run.drafted)
        if self.on_tokens and end:
            try:
                self.on_tokens(self.index, run.tokens[:end], run.origins[:end])
            except Exception as error:  # a stranger's function may raise anything
                self.fail(error)

    def _end(self, tokens: list[int]) -> int:
        """How many of some tokens belong to the text; says so in `finish` where it ends with them."""
        for place, token in enumerate(tokens, start=1):
            if token < 0:
                self.fail(DecodingError("The model's logits are not numbers, or no token is allowed: the text ends."))
                return place - 1
            if token in self.stop_tokens or self._stops(tokens[:place]):
                self.result.finish = self.result.finish or "stop"
                return place
            if len(self.result.tokens) + place == self.limit:
                self.result.finish = self.result.finish or "length"
                return place
        return len(tokens)

    def _stops(self, more: list[int]) -> bool:
        if self.stop is None:
            return False
        try:
            return self.stop(self.index, self.text + more)
        except Exception as error:
            self.fail(error)
            return True

    def fail(self, error: Exception) -> None:
        self.result.finish, self.result.error = "error", error


@dataclass
class Held:
    """What a slot remembers of the text that was in it: the tokens in the cache, what the drafter has seen of them."""

    text: list[int] = field(default_factory=list)
    read: int = 0
    unread: list[Tensor] = field(default_factory=list)

    def alike(self, prompt: Sequence[int]) -> int:
        """How many tokens a prompt has in common with the text at its beginning."""
        pairs = zip(self.text, prompt, strict=False)
        differ = (place for place, (ours, theirs) in enumerate(pairs) if ours != theirs)
        return next(differ, min(len(self.text), len(prompt)))

    def hand_over(self, row: Row, back: int) -> None:
        """Let a row go on from what its prompt has in common with the text.

        Args:
            back: how many positions before a token that changed the drafter must see again.
        """
        known = self.read + sum(map(len, self.unread))
        row.held = row.read = same = min(self.alike(row.result.prompt), len(row.result.prompt) - 1, known)
        if same > self.read:  # the drafter has yet to see the last of them
            row.read = self.read
            row.unread = [torch.cat(self.unread)[: same - self.read]]
        else:
            row.held = row.read = max(0, same - back)
