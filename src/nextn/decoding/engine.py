"""The self-speculative loop.

One trunk forward a step reads the pending token and the drafts of every row. The drafts that the trunk would have chosen
itself stand, its choice after them comes for free (the bonus token), and what was read too much is forgotten by moving
the row's length back. The text is the trunk's own, whatever the drafter says.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nextn.config import Tap, cache_directory
from nextn.decoding.compiled import (
    CompileError, Progress, compiled, key, machine_name, on_stderr, recall, remember,
)  # fmt: skip
from nextn.decoding.drafting import Asked, Draft, Drafter, Drafts, HeadDrafter, NoisyDraft
from nextn.decoding.pace import TREE, Pace, Profile
from nextn.decoding.rows import DecodingError, Generation, Held, OnTokens, Row, Run, Stop, scores_of
from nextn.decoding.sampling import DRAFT, GREEDY, RESIDUAL, STANDS, Sampling, gumbel, keys, uniform
from nextn.decoding.tree import Chances, Tree
from nextn.decoding.verify import (
    Score, ScoreTree, Verify, accept_by_rejection, accept_greedy, chosen, follow, only_standing, standing,
)  # fmt: skip
from nextn.trunk import RaggedCache, Trunk, is_out_of_memory

logger = logging.getLogger(__name__)

PADDING = 3  # 4 tokens a step: what small matrix kernels take at once on some CPUs
CHUNK = 1024  # how many tokens of a prompt one forward reads
ROUND = 256  # more than any number of drafts: (position, draft) as one number


class PromptError(ValueError):
    """A prompt that cannot be decoded; the message says why."""


@dataclass(frozen=True)
class Code:
    """What the steps of an engine were compiled to.

    depths: for how many drafts a row there is code.
    verify, score: what `Verify` and `Score` compute, by the width of `drafts`, padding included.
    padding: see `Engine`.
    draft, noisy_draft: what `Draft` and `NoisyDraft` compute; None without heads, or where chance was not asked for.
    """

    depths: tuple[int, ...]
    verify: dict[int, Callable[..., Any]]
    padding: int = 0
    score: dict[int, Callable[..., Any]] = field(default_factory=dict)
    draft: Callable[..., Any] | None = None
    noisy_draft: Callable[..., Any] | None = None


@dataclass
class _Step:
    """What a step brought to all rows.

    run: the tokens after each state [B, W]; row b emits the first accepted + 1 of them.
    tapped, positions: the states [B, W, D], and where they stand [B, W], -1 where they are not of the text.
    scores, logits: of the tokens of `run` [B, W, V], where they are kept.
    """

    run: Tensor
    accepted: Tensor
    tapped: Tensor
    positions: Tensor
    scores: Tensor | None = None
    logits: Tensor | None = None


class Engine:
    """Decoding of any number of prompts through a fixed number of rows.

    Args:
        trunk: the model whose text is wanted.
        drafter: who proposes; None decodes plainly, one token a step.
        rows: how many prompts are decoded side by side.
        stop_tokens: ids that end a text; they are emitted.
        depth: how many drafts a step reads: a number, None for all that there are, or `auto`: step by step what gives most
            tokens a second, by times that are measured once a machine and by what drafts bring; plain steps where
            drafting does not pay.
        tree: read a tree of drafts, not a chain; with `auto` where that is faster.
        keep: keep what was read of a text after it ended, so that a prompt that begins like it is read from there on.
        chunk: how many tokens of a prompt one forward reads.

    Attributes:
        verify, score: the step, `Verify` and `Score` or what they were compiled to.
        padding: places of a plain step that hold no token; some machines are faster so.
        code: the step as machine code; None where it runs eagerly.
        why_eager: why it could not be compiled.
        pace: decides how far to draft, and knows what drafts bring.
        seconds: time spent in `prefill`, `verify` (the trunk's forward and what stands of the drafts) and `draft` since
            the last call of `generate` began; the rest of its time went into the loop.
        steps: how many steps read so many drafts since then, TREE for a tree.

    Raises:
        ValueError: for a depth that there is not, or a tree without a drafter.
    """

    def __init__(
        self,
        trunk: Trunk,
        drafter: Drafter | None,
        rows: int = 1,
        stop_tokens: Iterable[int] = (),
        depth: int | str | None = None,
        tree: Tree | None = None,
        keep: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        self.n = 1 + (drafter.drafts if drafter else 0)
        self.depth, self.tree = _checked(depth, tree, self.n), tree
        self.trunk, self.drafter, self.rows, self.keep, self.chunk = trunk, drafter, rows, keep, chunk
        self.stop_tokens = frozenset(stop_tokens)
        self.tap: Tap = drafter.tap if drafter else "post_norm"
        self.padding = 0
        self.verify: Callable[..., Any] = Verify(trunk, self.tap)
        self.score: Callable[..., Any] = Score(trunk, self.tap)
        self.score_tree = ScoreTree(trunk, self.tap)
        self.code: Code | None = None
        self.why_eager: str | None = None
        self.pace = Pace(self.n - 1, tree=None if tree is None else 1.0 + (tree.depth or self.n - 1) / 2)
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps: dict[int, int] = defaultdict(int)
        self._slots: list[Row | None] = []
        self._cancelled: set[int] = set()
        self._turn: object = None

    # --- machine code -----------------------------------------------------------------------------------------

    def compile(self, progress: Progress = on_stderr, sampling: bool = False) -> Engine:
        """Have the step run as machine code from now on, always for `rows` rows.

        The weights must not change afterwards. A plain step is the faster one of a bare and of a padded one.

        Args:
            progress: shown while something is compiled, which takes minutes once a machine; a function from a message
                to a context, like `rich.console.Console.status`.
            sampling: also what sampling and processors need.

        Returns:
            this engine. Where nothing can be compiled it says why in a warning (and in `why_eager`), and goes on
            eagerly.
        """
        try:
            with torch.inference_mode(False), torch.no_grad():  # what is exported may not be made in inference mode
                self.use(self._compile(progress, sampling))
        except CompileError as error:
            self.padding, self.why_eager = 0, str(error)
            logger.warning("The engine runs eagerly: %s", error)
        return self

    def use(self, code: Code) -> Engine:
        """Run the step as machine code that an engine like this one was compiled to."""
        self.code, self.padding = code, code.padding
        self.verify, self.score = _by_width(code.verify, self.verify), _by_width(code.score, self.score)
        if isinstance(self.drafter, HeadDrafter):
            self.drafter.compiled, self.drafter.compiled_noisy = code.draft, code.noisy_draft
        return self

    def _compile(self, progress: Progress, sampling: bool) -> Code:
        full = self.n - 1 if self.depth == "auto" else int(self.depth)
        verify = {full: self._compile_step(Verify, full, 0, progress)} if full else {}
        padding, depths = 0, (full,)
        if self.depth == "auto" or not full:
            plain, padding = self._compile_plain(progress)
            verify, depths = {padding: plain} | verify, (0, full) if full else (0,)
        code = Code(depths, verify, padding)
        if sampling:
            code = replace(code, score={width: self._compile_step(Score, 0, width, progress) for width in verify})
        if not full or not isinstance(self.drafter, HeadDrafter):
            return code
        inputs = self._example(full)
        targets, accepted, _, _, tapped, positions = verify[full](*inputs)
        chances = Chances(
            torch.ones(self.rows, device=targets.device),
            torch.zeros_like(targets[:, :1]).expand(-1, self.n - 1).clone(),
        )

        def draft(module: type[Draft], noise: Chances | None) -> Callable[..., Any]:
            assert isinstance(self.drafter, HeadDrafter)
            return compiled(
                module(self.trunk, self.drafter.heads), self.drafter.step_inputs(tapped, positions, targets, accepted, noise),
                progress,
            )  # fmt: skip

        code = replace(code, draft=draft(Draft, None))
        return replace(code, noisy_draft=draft(NoisyDraft, chances)) if sampling else code

    def _compile_plain(self, progress: Progress) -> tuple[Callable[..., Any], int]:
        """The bare or the padded step and its padding, whichever is faster; measured once a machine."""
        note = f"padding-{key(Verify(self.trunk, self.tap), self._example(0))}"
        if (known := recall(note)) is not None:
            return self._compile_step(Verify, 0, known, progress), known
        paddings = (0, PADDING)
        codes = [self._compile_step(Verify, 0, padding, progress) for padding in paddings]
        examples = [self._example(0, padding) for padding in paddings]
        times: list[list[float]] = [[], []]
        for _ in range(40):
            for code, inputs, spent in zip(codes, examples, times, strict=True):
                start = time.perf_counter()
                code(*inputs)[1].tolist()  # reading a result waits for it
                spent.append(time.perf_counter() - start)
        bare, padded = (statistics.median(spent) for spent in times)
        choice = int(padded < bare)
        remember(note, paddings[choice])
        return codes[choice], paddings[choice]

    def _compile_step(self, module: type[Score], drafts: int, padding: int, progress: Progress) -> Callable[..., Any]:
        return compiled(module(self.trunk, self.tap), self._example(drafts, padding), progress)

    def _example(self, drafts: int, padding: int = 0) -> tuple[Any, ...]:
        """Inputs of a step of all rows, as they stand after a prompt of middle length."""
        length = max(1, min(128, self.trunk.max_length // 2))
        rows = [Row(index, Generation([0] * length), PADDING + self.n) for index in range(self.rows)]
        self._begin(rows, every_row=True, keep=False)
        self._admit(deque(rows))
        tokens = torch.full((self.rows, drafts + padding), -1, device=self.trunk.device)
        return self._inputs(tokens)

    # --- how far to draft -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def measure(self) -> Profile:
        """What steps take here, by how many drafts they read; measured once a machine, for `depth="auto"`."""
        widths = self.code.depths if self.code else range(self.n)
        path = cache_directory() / "profiles" / f"{self._profile_name()}.json"
        if (known := Profile.read(path)) is not None and set(known.verify) == set(widths):
            return known
        self._example(0)  # rows to work with

        def timed(step: Callable[[], Any]) -> float:
            step()
            spent: list[float] = []
            while len(spent) < 2 or (len(spent) < 7 and sum(spent) < 0.5):
                start = time.perf_counter()
                step()
                spent.append(time.perf_counter() - start)
            return statistics.median(spent)

        def verify(drafts: int) -> _Step:
            lengths, pending = self._lengths, self._pending
            tokens = torch.zeros(len(self._slots), drafts, dtype=torch.long, device=lengths.device)
            step = self._verify_chain(Drafts(tokens), greedy=True)
            step.run.tolist()
            self._lengths, self._pending = lengths, pending
            return step

        profile = Profile({drafts: timed(lambda drafts=drafts: verify(drafts)) for drafts in widths}, 0.0)
        self._fresh = verify(max(widths))
        for row in self._slots:
            if row is not None:
                row.unread = []
        fresh = self._fresh

        def draft(tree: Tree | None) -> Drafts:
            self._fresh = fresh
            drafts = self._propose(tree)
            drafts.tokens.tolist()
            return drafts

        profile.draft = timed(lambda: draft(None))
        if self.tree is not None:

            def tree_step() -> None:
                lengths, pending = self._lengths, self._pending
                self._verify_tree(draft(self.tree)).run.tolist()
                self._lengths, self._pending = lengths, pending

            profile.tree = timed(tree_step)
        profile.write(path)
        return profile

    def _profile_name(self) -> str:
        heads = self.drafter.heads if isinstance(self.drafter, HeadDrafter) else None
        of_heads = heads and (type(heads).__name__, heads.n, sum(part.numel() for part in heads.parameters()))
        parts = (
            self.trunk.settings(), self.trunk.dtype, self.rows, of_heads, self.tree, bool(self.code), torch.__version__,
            machine_name(self.trunk.device),
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]

    # --- generating -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        on_tokens: OnTokens | None = None,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: Stop | None = None,
        keep_scores: bool = False,
        progress: Console | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """Decode prompts (token ids); yields (index of the prompt, its generation) as they finish.

        A text that cannot go on (an exception in a processor, in `stop` or in `on_tokens`, logits that are not numbers, no
        memory for its prompt) finishes as `error` and says why; the others go on. Beginning anew ends what went on.

        Args:
            max_new_tokens: the longest continuation, or one for each prompt; a text also ends where the trunk's context
                does.
            on_tokens: called with (index, tokens, origins) whenever a row emits.
            sampling: how tokens are chosen, for all prompts (prompt i then has seed + i) or one for each.
            stop: called with (index, the text so far) after every token; true ends the text with that token.
            keep_scores: keep what each token was chosen by.
            progress: where to show a bar of the prompts done.

        Raises:
            PromptError: for an empty prompt or one that fills the context, or a length that is no length.
            SamplingError: for sampling that cannot be.
        """
        rows = self._rows(prompts, max_new_tokens, sampling)
        for row in rows:
            row.on_tokens, row.stop = on_tokens, stop
        results = self._results(rows, keep_scores)
        return results if progress is None else _shown(results, len(rows), progress)

    def cancel(self, index: int) -> None:
        """End the text of a prompt of the running `generate`, before its next step; it finishes as `cancelled`."""
        self._cancelled.add(index)

    def _rows(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sampling: Sampling | Sequence[Sampling],
    ) -> list[Row]:
        count = len(prompts)
        limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
        several = [sampling] * count if isinstance(sampling, Sampling) else list(sampling)
        seeds = [each.seed + place * isinstance(sampling, Sampling) for place, each in enumerate(several)]
        if len(limits) != count or len(several) != count:
            raise PromptError(
                f"There are {count} prompts: give one max_new_tokens and one sampling, or {count} of each."
            )
        for prompt, limit in zip(prompts, limits, strict=True):
            self._check(prompt, limit)
        self._warn_of(several)
        if count > 1 and (names := sorted({name for each in several for name in each.of_rows})):
            raise PromptError(
                f"{', '.join(names)} knows the rows of a batch by their number: generate prompts one by one."
            )
        if self.tree is not None and any(each.rejects for each in several):
            raise PromptError("A tree of drafts is verified by coupled sampling: leave the tree or rejection out.")
        return [
            Row(
                index=index,
                result=Generation(list(prompt)),
                limit=min(limit, self.trunk.max_length - len(prompt)),
                sampling=each.for_one_text() if count > 1 else each,
                seed=seed % 2**62,
                stop_tokens=self.stop_tokens,
            )
            for index, (prompt, limit, each, seed) in enumerate(zip(prompts, limits, several, seeds, strict=True))
        ]

    def _warn_of(self, several: Iterable[Sampling]) -> None:
        stateful = sorted({name for each in several for name in each.stateful})
        if stateful and self.drafter:
            logger.warning(
                "%s may remember what it saw, and so must see each token once: there is no drafting. If it remembers "
                "nothing, say so with an attribute `stateless = True`.",
                ", ".join(stateful),
            )

    @torch.inference_mode()
    def _results(self, rows: list[Row], keep_scores: bool) -> Iterator[tuple[int, Generation]]:
        if self.depth == "auto" and self.drafter and self.pace.profile is None and rows:
            self.pace.profile = self.measure()
        turn = self._turn = object()
        waiting = deque(rows)
        self._begin(rows, keep=self.keep)
        self._keep_scores = keep_scores
        while waiting or any(self._slots):
            for row in self._drop_cancelled(waiting):
                yield row.index, row.result
            if waiting and not all(self._slots):
                with self._clock("prefill"):
                    self._admit(waiting)
            elif any(self._slots):
                self._step()
            for slot, finished in enumerate(self._slots):
                if finished is not None and finished.result.finish:
                    self._leave(slot, finished)
                    yield finished.index, finished.result
                    if self._turn is not turn:
                        raise DecodingError("This engine began another generate; what was left of this one is lost.")

    def _drop_cancelled(self, waiting: deque[Row]) -> list[Row]:
        """Mark what was cancelled; those that still wait leave at once."""
        asked, self._cancelled = self._cancelled, set()
        for row in self._slots:
            if row is not None and row.index in asked:
                row.result.finish = "cancelled"
        left = [row for row in waiting if row.index in asked]
        for row in left:
            row.result.finish = "cancelled"
            waiting.remove(row)
        return left

    def _leave(self, slot: int, row: Row) -> None:
        """A row is done; its slot is free, and remembers what the cache holds of the text."""
        if self.keep and self.drafter:
            self._set_aside()
        self._slots[slot] = None
        self._held[slot] = Held(row.text[:-1], row.read, row.unread)
        if row.result.finish == "error":  # what is not a number must not reach whoever comes next
            self._held[slot] = Held()
            self.cache.clear(slot)
            if self.drafter:
                self.drafter.forget(slot)

    # --- prefill ----------------------------------------------------------------------------------------------

    def _admit(self, waiting: deque[Row]) -> None:
        """Read prompts into the free slots, and emit each row's first token."""
        slots = []
        free = [slot for slot, row in enumerate(self._slots) if row is None]
        while free and waiting:
            row = waiting.popleft()
            slot = max(free, key=lambda slot: self._held[slot].alike(row.result.prompt))
            free.remove(slot)
            slots.append(slot)
            self._slots[slot] = row
            self._go_on(slot, row)
        long = [slot for slot in slots if self._todo(slot) > self.chunk]
        short = [slot for slot in slots if slot not in long]
        for group in [*([slot] for slot in long), *([short] if short else [])]:
            self._prefill(group, self.chunk)

    def _prefill(self, slots: list[int], chunk: int) -> None:
        """Read the prompts of some slots; where memory does not suffice, one by one and then in smaller parts."""
        try:
            self._first_tokens(slots, self._read(slots, chunk))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(slots) > 1:
                for slot in slots:
                    self._prefill([slot], chunk)
            elif chunk > 8:
                self._prefill(slots, chunk // 2)
            else:
                row = self._slots[slots[0]]
                assert row is not None
                row.fail(DecodingError(f"There is not enough memory for a prompt of {len(row.result.prompt)} tokens."))

    def _read(self, slots: list[int], chunk: int) -> Tensor:
        """The trunk over what is new of some prompts: the state after each one's last token [b, D].

        Several prompts are read in one part; the states that the drafter reads are left in the rows.
        """
        rows = torch.tensor(slots, device=self._lengths.device)
        members = [row for slot in slots if (row := self._slots[slot]) is not None]
        unread = [list(row.unread) for row in members]
        longest = max(self._todo(slot) for slot in slots)
        chunk = longest if len(slots) > 1 else chunk
        for begin in range(0, longest, chunk):
            parts = [torch.tensor(row.result.prompt[row.held + begin :][:chunk], device=rows.device) for row in members]
            counts = torch.tensor([len(part) for part in parts], device=rows.device)
            ids = pad_sequence(parts, batch_first=True)
            starts = torch.tensor([row.held + begin for row in members], device=rows.device)
            places = torch.arange(ids.shape[1], device=rows.device)
            positions = torch.where(places < counts[:, None], starts[:, None] + places, -1)
            visible = self.cache.place(positions, rows)
            hidden, tapped = self.trunk.run(ids, positions, visible, self.cache, self.tap)  # [b, T, D]
            for so_far, states, part in zip(unread, tapped, parts, strict=True):
                so_far.append(states[: len(part)])
        for row, states in zip(members, unread, strict=True):
            row.unread = states if self.drafter else []
        return hidden[torch.arange(len(slots)), counts - 1]

    def _first_tokens(self, slots: list[int], hidden: Tensor) -> None:
        """Choose the token after each prompt, from the state of its last one [b, D]."""
        members = [row for slot in slots if (row := self._slots[slot]) is not None]
        logits = self.trunk.logits(hidden)[:, None]
        at = torch.tensor([[row.length] for row in members], device=hidden.device)
        targets, scores = self._choose(members, logits, at, [[[]]] * len(slots))
        self._pending[slots], self._lengths[slots] = targets[:, 0], at[:, 0]
        for place, (row, token) in enumerate(zip(members, targets[:, 0].tolist(), strict=True)):
            if not row.result.finish:
                row.emit(Run([token], [0], **self._kept(place, 1, scores, logits)))

    def _todo(self, slot: int) -> int:
        row = self._slots[slot]
        return 0 if row is None else len(row.result.prompt) - row.held

    def _go_on(self, slot: int, row: Row) -> None:
        """A row takes over what its slot holds of its prompt."""
        held, self._held[slot] = self._held[slot], Held()
        if self.drafter is None:
            held.read = len(held.text)
        # Heads read the token after a state, and distinct modules some more: entries that saw another text are made anew.
        lookback = self.drafter.heads.lookback if isinstance(self.drafter, HeadDrafter) else 0
        held.hand_over(row, back=1 + lookback if self.drafter else 0)
        if self.drafter:
            self.drafter.forget(slot, all_of_it=row.read == 0)

    # --- a step -----------------------------------------------------------------------------------------------

    _pending: Tensor  # [B] the newest token of each row, not yet read by the trunk
    _lengths: Tensor  # [B] how many tokens of each row the cache holds

    def _step(self) -> None:
        """Drafts, one trunk forward over the pending token and the drafts of every row, and what stands of them."""
        choice = self._drafts_to_read()
        if not choice and self.drafter:
            self._set_aside()
        if choice:
            with self._clock("draft"):
                drafts = self._propose(self.tree if choice == TREE else None)
        else:
            drafts = Drafts(self._pending.new_empty(len(self._slots), 0))
        with self._clock("verify"):
            if drafts.shape is not None:
                step = self._verify_tree(drafts)
            else:
                step = self._verify_chain(Drafts(drafts.tokens[:, :choice], drafts.drawn_from), self._is_greedy())
            runs, counts = step.run.tolist(), step.accepted.tolist()
        self._fresh = step
        self.steps[choice] += 1
        self.pace.note(choice, [count for count, row in zip(counts, self._slots, strict=True) if row is not None])
        drafted = self.n - 1 if choice == TREE else choice
        for slot, (run, count) in enumerate(zip(runs, counts, strict=True)):
            row = self._slots[slot]
            if row is not None and not row.result.finish:
                kept = self._kept(slot, count + 1, step.scores, step.logits)
                row.emit(Run(run[: count + 1], [*range(1, count + 1), 0], count, drafted, **kept))

    def _drafts_to_read(self) -> int:
        if self.drafter is None or any(row is not None and row.sampling.stateful for row in self._slots):
            return 0
        if self.depth == "auto":
            return self.pace.choose()
        return TREE if self.tree is not None and self.depth else int(self.depth)

    def _is_greedy(self) -> bool:
        return not self._keep_scores and all(row is None or row.sampling.is_greedy for row in self._slots)

    def _verify_chain(self, drafts: Drafts, greedy: bool) -> _Step:
        tokens = drafts.tokens
        padding = self.padding if not tokens.shape[1] else 0
        padded = torch.nn.functional.pad(tokens, (0, padding), value=-1)
        inputs = self._inputs(padded)
        if greedy:
            run, accepted, self._pending, self._lengths, tapped, positions = self.verify(*inputs)
            return _Step(run, accepted, tapped, positions)
        logits, tapped, positions = self.score(*inputs)
        logits, width = logits[:, : tokens.shape[1] + 1], tokens.shape[1] + 1
        at = self._lengths[:, None] + 1 + torch.arange(width, device=tokens.device)
        listed = tokens.tolist()
        branches = [[row[:place] for place in range(width)] for row in listed]
        run, scores = self._choose(self._slots, logits, at, branches)
        accepted = accept_greedy(tokens, run)
        by_rejection = [slot for slot, row in enumerate(self._slots) if row is not None and row.sampling.rejects]
        if by_rejection and width > 1:
            self._reject(by_rejection, drafts, scores, run, accepted)
        positions, tapped = only_standing(positions[:, :width], accepted), tapped[:, :width]
        self._pending, self._lengths = standing(run, accepted, self._lengths)
        return _Step(run, accepted, tapped, positions, scores, logits)

    def _reject(self, slots: list[int], drafts: Drafts, scores: Tensor, run: Tensor, accepted: Tensor) -> None:
        """Decide over the drafts of some rows by rejection; `run` [B, W] and `accepted` [B] are written."""
        tokens, p = drafts.tokens[slots], scores[slots].softmax(dim=-1)
        if drafts.drawn_from is None:
            q = torch.zeros_like(p[:, :-1]).scatter(2, tokens.clamp(min=0)[..., None], 1.0)
        else:
            q = drafts.drawn_from[slots][:, : tokens.shape[1]]
            usable = q.isfinite().all(dim=-1).long().cumprod(dim=1).bool()  # broken heads: no drafts
            tokens = torch.where(usable, tokens, -1)
            q = torch.where(usable[..., None], q, 0)
        rounds = self._rounds(tokens.shape[1])[slots]
        seeds = self._seeds()[slots]
        for block in (False, True):
            chosen_so = [i for i, slot in enumerate(slots) if self._slots[slot].sampling.block is block]  # type: ignore[union-attr]
            if not chosen_so:
                continue
            numbers = uniform(keys(seeds, rounds, STANDS))
            count, rest = accept_by_rejection(p[chosen_so], q[chosen_so], tokens[chosen_so], numbers[chosen_so], block)
            vocabulary = torch.arange(rest.shape[-1], device=rest.device)
            noise = gumbel(keys(seeds[chosen_so], rounds[chosen_so][:, :1], RESIDUAL)[:, 0], vocabulary)
            bonus = chosen(rest.log() + noise)
            those = [slots[i] for i in chosen_so]
            run[those, :-1] = tokens[chosen_so]
            run[those, count] = bonus
            accepted[those] = count

    def _verify_tree(self, drafts: Drafts) -> _Step:
        assert drafts.shape is not None
        parents, depths, sees = drafts.shape
        tokens = torch.cat([self._pending[:, None], drafts.tokens], dim=1)
        inputs = self._inputs(drafts.tokens)
        logits, tapped, positions = self.score_tree(tokens, depths, sees, *inputs[2:])
        paths = self._paths(tokens, sees) if any(row and row.sampling.reads_text for row in self._slots) else []
        targets, scores = self._choose(self._slots, logits, self._lengths[:, None] + 1 + depths, paths)
        accepted, path = follow(tokens, parents, depths, targets, self.n - 1)
        steps = torch.arange(self.n, device=path.device)
        path = torch.where(steps <= accepted[:, None], path, 0)
        strays = ((path != steps) & (steps <= accepted[:, None]) & (inputs[3] > 0)[:, None])[:, 1:]
        if bool(strays.any()):
            aside, slots = self.cache.capacity, self._lengths[:, None]  # where nothing is moved: the spare slot
            self.cache.move(
                torch.where(strays, slots + path[:, 1:], aside), torch.where(strays, slots + steps[1:], aside)
            )
        run = targets.gather(1, path)
        rows = torch.arange(len(path), device=path.device)[:, None]
        positions = only_standing(positions[rows, path], accepted)
        self._pending, self._lengths = standing(run, accepted, self._lengths)
        kept = (scores[rows, path], logits[rows, path]) if self._keep_scores else (None, None)
        return _Step(run, accepted, tapped[rows, path], positions, *kept)

    @staticmethod
    def _paths(tokens: Tensor, sees: Tensor) -> list[list[list[int]]]:
        """For each row and node of a tree the drafts up to it."""
        listed, follows = tokens.tolist(), sees.tolist()
        return [
            [[token for token, on_path in zip(row[1:], path[1:], strict=True) if on_path] for path in paths]
            for row, paths in zip(listed, follows, strict=True)
        ]

    def _choose(
        self, rows: Sequence[Row | None], logits: Tensor, at: Tensor, branches: Sequence[Sequence[Sequence[int]]]
    ) -> tuple[Tensor, Tensor]:
        """The trunk's choices [B, W] from logits [B, W, V], and the scores that they were made by.

        Args:
            at: the places in the text of the tokens that are chosen [B, W].
            branches: see `scores_of`.
        """
        scores = scores_of(rows, logits, branches)
        drawing = [slot for slot, row in enumerate(rows) if row is not None and row.sampling.by_chance]
        if not drawing:
            return chosen(scores), scores
        seeds = torch.tensor([row.seed if row else 0 for row in rows], device=at.device)
        noisy = scores.clone() if self._keep_scores or len(drawing) < len(rows) else scores
        noise = gumbel(keys(seeds[drawing], at[drawing]), torch.arange(scores.shape[-1], device=at.device))
        noisy = noisy.index_add(0, torch.tensor(drawing, device=at.device), noise)
        return chosen(noisy), scores

    def _inputs(self, drafts: Tensor) -> tuple:
        """What `Verify` takes."""
        ends = self._ends()
        newest = max(row.length for row in self._slots if row is not None) + drafts.shape[1] - 1
        seen = torch.arange(self.cache.reach(newest), device=ends.device)
        return self._pending, drafts, self._lengths, ends, seen, self.cache.buffers

    def _ends(self) -> Tensor:
        """The first position of each row that is not needed any more [B]; 0 for a free row."""
        ends = [0 if row is None else len(row.result.prompt) + row.limit for row in self._slots]
        return torch.tensor(ends, device=self._lengths.device)

    def _kept(self, place: int, count: int, scores: Tensor | None, logits: Tensor | None) -> dict[str, Any]:
        if not self._keep_scores or scores is None or logits is None:
            return {}
        return {"scores": list(scores[place, :count]), "logits": list(logits[place, :count].float())}

    # --- drafts -----------------------------------------------------------------------------------------------

    def _propose(self, tree: Tree | None) -> Drafts:
        """Drafts for all rows, from the states that the drafter has not seen yet: one step's, or those of many."""
        assert self.drafter is not None
        active = [slot for slot, row in enumerate(self._slots) if row is not None]
        fresh = self._fresh
        if fresh is not None and not any(row.unread for row in self._slots if row is not None):
            # A text that broke off with logits that are no numbers leaves no token behind.
            states = fresh.tapped, fresh.positions, fresh.run.clamp(min=0), fresh.accepted
            drafts = self.drafter.propose(*states, self._all_rows, self._asked(tree, None))
        else:
            drafts = self._catch_up(active, tree)
        self._fresh = None
        for slot in active:
            row = self._slots[slot]
            assert row is not None
            row.unread, row.read = [], row.length - 1
        return drafts

    def _catch_up(self, active: list[int], tree: Tree | None) -> Drafts:
        """Drafts after plain steps or a prefill: each row brings as many states as it has."""
        assert self.drafter is not None
        self._set_aside()
        for slot in active:  # what is very long goes ahead in parts
            row = self._slots[slot]
            assert row is not None
            states = torch.cat(row.unread)
            while len(states) > self.chunk:
                self.drafter.propose(*self._window([slot], [states[: self.chunk]]), self._asked(tree, [slot]))
                states, row.read = states[self.chunk :], row.read + self.chunk
            row.unread = [states]
        found = self.drafter.propose(
            *self._window(active, [self._slots[slot].unread[0] for slot in active]),  # type: ignore[union-attr]
            self._asked(tree, active),
        )
        if len(active) == len(self._slots):
            return found
        rows = torch.tensor(active, device=self._all_rows.device)

        def spread(part: Tensor, idle: int) -> Tensor:
            return part.new_full((len(self._slots), *part.shape[1:]), idle).index_copy(0, rows, part)

        drawn, shape = found.drawn_from, found.shape
        return Drafts(
            spread(found.tokens, -1),
            None if drawn is None else spread(drawn, 0),
            None if shape is None else (spread(shape[0], 0), spread(shape[1], 0), spread(shape[2], 0)),
        )

    def _window(self, slots: list[int], states: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """States [t, D] of some rows as `Drafter.propose` takes them: padded to the longest."""
        device = self._all_rows.device
        counts = torch.tensor([len(each) for each in states], device=device)
        members = [row for slot in slots if (row := self._slots[slot]) is not None]
        starts = torch.tensor([row.read for row in members], device=device)
        places = torch.arange(int(counts.max()), device=device)
        following = pad_sequence(
            [
                torch.tensor(row.text[row.read + 1 : row.read + 1 + len(each)], device=device)
                for row, each in zip(members, states, strict=True)
            ],
            batch_first=True,
        )
        positions = torch.where(places < counts[:, None], starts[:, None] + places, -1)
        rows = torch.tensor(slots, device=device)
        return pad_sequence(states, batch_first=True), positions, following, counts - 1, rows

    def _set_aside(self) -> None:
        """The states of the last step go to their rows, for later."""
        if self._fresh is None:
            return
        for slot, (row, count) in enumerate(zip(self._slots, self._fresh.accepted.tolist(), strict=True)):
            # A row that came after that step has states of its own already.
            if row is not None and row.read + sum(map(len, row.unread)) < row.length - 1:
                row.unread.append(self._fresh.tapped[slot, : count + 1].clone())  # machine code may write there again
        self._fresh = None

    def _asked(self, tree: Tree | None, slots: list[int] | None) -> Asked:
        """The kind of drafts that the samplings of some rows call for (None: of all slots)."""
        rows = self._slots if slots is None else [self._slots[slot] for slot in slots]
        drawing = [row is not None and row.sampling.by_chance for row in rows]
        noisy = [row for row in rows if row is not None and _draws_drafts(row.sampling)]
        if not any(drawing) or not noisy:
            return Asked(tree=tree)
        device = self._all_rows.device
        temperatures = [row.sampling.draft_temperature if row and _draws_drafts(row.sampling) else 0.0 for row in rows]
        seeds = self._seeds(rows)
        at = torch.tensor([[row.length] if row else [0] for row in rows], device=device)
        numbers = torch.arange(self.n - 1, device=device)
        coupled = keys(seeds, at + numbers)
        apart = keys(seeds, at * ROUND + numbers, DRAFT)
        rejects = torch.tensor([bool(row and row.sampling.rejects) for row in rows], device=device)
        chances = Chances(torch.tensor(temperatures, device=device), torch.where(rejects[:, None], apart, coupled))
        return Asked(chances, drawn=bool(rejects.any()), tree=tree)

    def _seeds(self, rows: Sequence[Row | None] | None = None) -> Tensor:
        return torch.tensor([row.seed if row else 0 for row in rows or self._slots], device=self._all_rows.device)

    def _rounds(self, drafts: int) -> Tensor:
        """A number for each draft of this step of each row [B, drafts], which no other step has."""
        at = torch.tensor([[row.length if row else 0] for row in self._slots], device=self._all_rows.device)
        return at * ROUND + torch.arange(drafts, device=at.device)

    # --- its state --------------------------------------------------------------------------------------------

    def _begin(self, rows: Sequence[Row], every_row: bool = False, keep: bool = False) -> None:
        device = self.trunk.device
        # What is compiled has a fixed number of rows; otherwise a free row would cost for nothing.
        count = self.rows if self.code or every_row or keep else max(1, min(self.rows, len(rows)))
        room = max((len(row.result.prompt) + row.limit for row in rows), default=0)
        # A tree lies behind the text, whatever its nodes' places in it.
        room += 0 if self.tree is None else max(self.tree.nodes, self.tree.beam * self.n)
        self.seconds, self.steps = defaultdict(float), defaultdict(int)
        self._cancelled, self._keep_scores = set(), False
        self._fresh: _Step | None = None
        self._all_rows = torch.arange(count, device=device)
        self._lengths = torch.zeros(count, dtype=torch.long, device=device)
        self._pending = torch.zeros(count, dtype=torch.long, device=device)
        goes_on = keep and len(self._slots) == count and hasattr(self, "cache")
        interrupted = self._slots
        self._slots: list[Row | None] = [None] * count
        if not goes_on:
            self.cache = RaggedCache(len(self.trunk.layers), count, room)
            self._held = [Held() for _ in range(count)]  # by slot
        else:
            for slot, row in enumerate(interrupted):
                if row is not None:
                    self._held[slot] = Held()
            if room > self.cache.capacity:
                self.cache.grow(room)
        if self.drafter:
            self.drafter.begin(self.cache, keep=goes_on)

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def _check(self, prompt: Sequence[int], limit: int) -> None:
        if limit < 1:
            raise PromptError(f"max_new_tokens is {limit}; it must be at least 1.")
        if not prompt:
            raise PromptError("The prompt is empty: give at least one token.")
        if len(prompt) >= self.trunk.max_length:
            raise PromptError(
                f"The prompt has {len(prompt)} tokens; the model's context is {self.trunk.max_length}, which leaves no "
                "room for an answer. Shorten the prompt."
            )
        if not 0 <= min(prompt) <= max(prompt) < self.trunk.vocab_size:
            raise PromptError(f"The prompt has token ids outside of the model's vocabulary of {self.trunk.vocab_size}.")


def _checked(depth: int | str | None, tree: Tree | None, n: int) -> int | str:
    if tree is not None and n == 1:
        raise ValueError("A tree of drafts needs a drafter.")
    if tree is not None and tree.depth is not None and tree.depth > n - 1:
        raise ValueError(f"The tree has drafts up to {tree.depth} tokens ahead; these heads make {n - 1}.")
    if depth is None:
        return n - 1
    if depth == "auto":
        return "auto" if n > 1 else 0
    if not isinstance(depth, int) or not 0 <= depth <= n - 1:
        raise ValueError(f"depth is {depth!r}; give a number of drafts from 0 to {n - 1}, None for all, or 'auto'.")
    return depth


def _draws_drafts(sampling: Sampling) -> bool:
    return sampling.by_chance and (not sampling.rejects or sampling.sampled_drafts)


def _by_width(codes: dict[int, Callable[..., Any]], eager: Callable[..., Any]) -> Callable[..., Any]:
    """The code for drafts of this width; what was not compiled runs eagerly."""
    return lambda pending, drafts, *rest: codes.get(drafts.shape[1], eager)(pending, drafts, *rest)


def _shown(results: Iterator[tuple[int, Generation]], count: int, console: Console) -> Iterator[tuple[int, Generation]]:
    """The same results, with a bar."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    tokens, begun = 0, time.perf_counter()
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("generating", total=count)
        for index, result in results:
            tokens += len(result.tokens)
            rate = tokens / (time.perf_counter() - begun)
            bar.update(task, advance=1, description=f"{tokens:,} tokens, {rate:,.0f} a second")
            yield index, result
