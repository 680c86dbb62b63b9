"""The self-speculative loop.

One trunk forward a step reads the pending token and the drafts of every row. The drafts that the trunk would have
chosen itself stand, its choice after them comes for free (the bonus token), and what was read too much is forgotten by
moving the row's length back. The text is the trunk's own, whatever the drafter says.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from numbers import Integral
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from torch import Tensor

from nextn.decoding.batch import Batch, Step
from nextn.decoding.building import Code, build, measure
from nextn.decoding.compiled import CompileError, Progress, on_stderr
from nextn.decoding.drafting import Asked, Drafter, HeadDrafter
from nextn.decoding.pace import FIRST_LOOK, TREE, Pace, Profile, Tally
from nextn.decoding.rows import DecodingError, Generation, OnTokens, Row, Run, Stop
from nextn.decoding.sampling import GREEDY, Sampling, prompt_seeds
from nextn.decoding.tree import Tree
from nextn.support import check_host
from nextn.trunk import Trunk, fingerprint, is_out_of_memory

logger = logging.getLogger(__name__)

CHUNK = 1024  # how many tokens of a prompt one forward reads
LONGEST = 2**40  # no text is as long as that


class PromptError(ValueError):
    """A prompt that cannot be decoded; the message says why."""


class Engine(Batch):
    """Decoding of any number of prompts through a fixed number of rows.

    Args:
        trunk: the model whose text is wanted.
        drafter: who proposes; None decodes plainly, one token a step.
        rows: how many prompts are decoded side by side.
        stop_tokens: ids that end a text; they are emitted.
        depth: how many drafts a step reads: a number, None for all that there are, or `auto`: step by step what gives
            the texts to their ends soonest, by times that are measured once a machine and by what drafts bring; plain
            steps where drafting does not pay.
        tree: read a tree of drafts, not a chain; with `auto` where that is faster.
        keep: keep what was read of a text after it ended, so that a prompt that begins like it is read from there on.
        chunk: how many tokens of a prompt one forward reads.

    Attributes:
        code: the step as machine code; None where it runs eagerly.
        why_eager: why it could not be compiled.
        pace: decides how far to draft, and knows what drafts bring; `paces` are those by number of rows at work.
        overlaps: whether the next drafts are begun before it is known what a step brought, which a GPU gains by.
        steps: how many steps read so many drafts since the last call of `generate` began, TREE for a tree; `seconds`
            are counted from there too, and what they leave of the time went into the loop.

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
        for name, value in (("rows", rows), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        check_host(trunk)
        super().__init__(trunk, None if depth == 0 else drafter, rows, tree, keep, chunk)
        self.depth = _checked(depth, tree, self.n)
        self.stop_tokens = frozenset(stop_tokens)
        self.code: Code | None = None
        self.why_eager: str | None = None
        self.overlaps = trunk.device.type == "cuda"
        self.paces: dict[int, Pace] = {}
        self.pace = self._new_pace()
        self.steps: Counter[int] = Counter()
        self._eager = self.verify, self.score
        self._code_made_by = self._kept_made_by = ""  # fingerprints of the weights that made the code and kept texts
        self._cancelled: set[int] = set()
        self._in_step = False
        self._plain_ahead = 0  # so many steps from here on read no drafts
        # Of when the pace was last asked: whether prompts waited, and the text in each slot.
        self._asked_for: tuple[bool | Row | None, ...] = ()

    # --- machine code -----------------------------------------------------------------------------------------

    def compile(self, progress: Progress = on_stderr, sampling: bool = False) -> Engine:
        """Have the step run as machine code from now on, always for `rows` rows.

        Where weights or active adapters change afterwards, decoding goes on eagerly, with a warning. A plain step of
        few rows is the faster one of a bare and a padded one.

        Args:
            progress: shown while something is compiled, which takes minutes once a machine; a function from a message
                to a context, like `rich.console.Console.status`.
            sampling: also what sampling and processors need. Trees, and drafts that rejection must know the
                probabilities of, run eagerly; with `auto` there is code for none, one and all drafts.

        Returns:
            this engine. Where nothing can be compiled it says why in a warning (and in `why_eager`), and goes on
            eagerly.
        """
        try:
            with torch.inference_mode(False), torch.no_grad():  # what is exported may not be made in inference mode
                self.use(build(self, progress, sampling))
        except CompileError as error:
            self.padding, self.why_eager = 0, str(error)
            logger.warning("The engine runs eagerly: %s", error)
        return self

    def use(self, code: Code, made_by: str | None = None) -> Engine:
        """Run the step as machine code that an engine like this one was compiled to.

        Args:
            made_by: the fingerprint of the weights that it was compiled from; default: today's.
        """
        self._code_made_by = self.fingerprint() if made_by is None else made_by
        self.code, self.padding, self.draw = code, code.padding, code.draw
        self.paces = {}  # what steps took so far is of no use
        self.verify, self.score = _by_width(code.verify, self._eager[0]), _by_width(code.score, self._eager[1])
        if isinstance(self.drafter, HeadDrafter):
            self.drafter.compiled, self.drafter.compiled_noisy = code.drafts, code.noisy_drafts
        return self

    def fingerprint(self) -> str:
        """Of the weights that decode; see `nextn.trunk.fingerprint`."""
        heads = self.drafter.heads if isinstance(self.drafter, HeadDrafter) else None
        return self.trunk.fingerprint() + ("" if heads is None else fingerprint(heads))

    def _discard_stale_state(self) -> bool:
        """Discard code that was compiled from other weights; whether kept texts may be used."""
        if not (self.code or self.keep):
            return False
        made_by = self.fingerprint()
        if self.code and self._code_made_by != made_by:
            logger.warning("The weights changed since the step was compiled; falling back to eager: compile it again.")
            self.code, self.padding, self.draw, self.paces = None, 0, None, {}
            self.verify, self.score = self._eager
            if isinstance(self.drafter, HeadDrafter):
                self.drafter.compiled, self.drafter.compiled_noisy = {}, {}
        before, self._kept_made_by = self._kept_made_by, made_by
        if self.keep and before and before != made_by:
            logger.warning("The weights changed since the kept texts were read; reading them again.")
        return self.keep and before == made_by

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

        A text that cannot go on (an exception in a processor, in `stop` or in `on_tokens`, logits that are not numbers,
        no memory for its prompt) finishes as `error` and says why; the others go on. Beginning anew ends what went on.

        Args:
            max_new_tokens: the longest continuation, or one for each prompt; a text also ends where the trunk can go no
                further (longrope).
            on_tokens: called with (index, tokens, origins) whenever a row emits; `running[index]` is what the row gave
                so far, with counts and log-probabilities.
            sampling: how tokens are chosen: one for all prompts, whose seeds are then derived from its seed, or one for
                each prompt, with the seeds that they have.
            stop: called with (index, the text so far) after every token; true ends the text with that token.
            keep_scores: keep what each token was chosen by.
            progress: where to show a bar of the prompts done.

        Raises:
            PromptError: for an empty prompt or one that is longer than texts can become, or a length that is no length.
            SamplingError: for sampling that cannot be.
        """
        steps = self.stepwise(prompts, max_new_tokens, on_tokens, sampling, stop, keep_scores)
        results = (result for finished in steps for result in finished)
        return results if progress is None else _shown(results, len(prompts), progress)

    def stepwise(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        on_tokens: OnTokens | None = None,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: Stop | None = None,
        keep_scores: bool = False,
    ) -> Iterator[list[tuple[int, Generation]]]:
        """As `generate`, for who has other things to do between steps: yields after each what finished, often nothing.

        Reading prompts is a step, too. `seconds` then leave out what the caller did meanwhile.
        """
        rows = self._rows(prompts, max_new_tokens, sampling)
        self._cancelled = set()
        for row in rows:
            row.on_tokens, row.stop = on_tokens, stop
        return self._run(rows, keep_scores)

    @property
    def running(self) -> dict[int, Generation]:
        """The generations in the slots as they are so far, by the index of their prompt; for `on_tokens` to look at."""
        return {row.index: row.result for row in self.slots if row is not None}

    def cancel(self, index: int) -> None:
        """End the text of a prompt of the running `generate`, before its next step; it finishes as `cancelled`."""
        self._cancelled.add(index)

    def _rows(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sampling: Sampling | Sequence[Sampling],
    ) -> list[Row]:
        prompts, count = [_token_ids(prompt) for prompt in prompts], len(prompts)
        limits = [int(max_new_tokens)] * count if isinstance(max_new_tokens, int | Integral) else list(max_new_tokens)
        several = [sampling] * count if isinstance(sampling, Sampling) else list(sampling)
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
        seeds = _seeds(sampling, count)
        return [
            Row(
                index=index,
                result=Generation(list(prompt), num_spec_tokens=self.n - 1),
                limit=self._room_for(prompt, limit),
                sampling=each.for_one_text() if count > 1 else each,
                seed=seed,
                stop_tokens=self.stop_tokens,
                tally=Tally.empty(self.n - 1),
            )
            for index, (prompt, limit, each, seed) in enumerate(zip(prompts, limits, several, seeds, strict=True))
        ]

    def _room_for(self, prompt: Sequence[int], limit: int) -> int:
        """How many tokens may follow a prompt, where so many are asked for."""
        most = self.trunk.hard_limit
        if most is None or len(prompt) + limit <= most:
            return limit
        warn_once(f"Texts of this model end at {most} tokens (longrope), whatever length is asked for.")
        return most - len(prompt)

    def _warn_past(self, context: int) -> None:
        if any(row is not None and row.length > context for row in self.slots):
            warn_once(
                f"A text has become longer than the model's context of {context} tokens: it goes on, as in "
                "transformers, but may get worse."
            )

    def _warn_of(self, several: Iterable[Sampling]) -> None:
        stateful = sorted({name for each in several for name in each.stateful})
        if stateful and self.drafter:
            logger.warning(
                "%s may remember what it saw, and so must see each token once: there is no drafting. If it remembers "
                "nothing, say so with an attribute `stateless = True`.",
                ", ".join(stateful),
            )

    @torch.inference_mode()
    def _run(self, rows: list[Row], keep_scores: bool) -> Iterator[list[tuple[int, Generation]]]:
        if self._in_step:
            raise DecodingError(
                "A function that this engine called began another generate; take another engine for it."
            )
        may_go_on = self._discard_stale_state()
        # What is compiled has a fixed number of rows; otherwise a free row would cost for nothing.
        count = self.rows if self.code or self.keep else max(1, min(self.rows, len(rows)))
        self.pace = self.paces.setdefault(count, self._new_pace())
        if self.depth == "auto" and self.drafter and self.pace.profile is None and rows:
            self._measure(count)
        waiting = deque(row for row in rows if row.limit)
        self.begin(rows, count, goes_on=may_go_on)
        turn = self.turn
        self.steps, self._plain_ahead, self._asked_for = Counter(), 0, ()
        self.keep_scores = keep_scores
        finished = [row for row in rows if not row.limit]
        for row in finished:
            row.result.finish = "length"
        if finished:
            yield [(row.index, row.result) for row in finished]
        left, context = len(rows) - len(finished), self.trunk.max_length
        while left:
            if self.turn is not turn:
                raise DecodingError("This engine began something else; what was left of this generate is lost.")
            if not self._cancelled:  # by whoever was told of these
                self._admit_or_step(waiting)
                self._warn_past(context)
            finished = [*self._drop_cancelled(waiting), *self._leaving()]
            left -= len(finished)
            yield [(row.index, row.result) for row in finished]

    def _admit_or_step(self, waiting: deque[Row]) -> None:
        self._in_step = True
        try:
            if waiting and not all(self.slots):
                with self.clock("prefill"):
                    self.admit(waiting)
            elif any(self.slots) and self.make_room():
                self._step(bool(waiting))
        finally:
            self._in_step = False

    def _new_pace(self) -> Pace:
        return Pace(self.n - 1, tree=None if self.tree is None else 1.0 + (self.tree.depth or self.n - 1) / 2)

    def _measure(self, rows: int) -> None:
        """What steps take with so many rows; where they cannot be tried there are plain ones alone, this time."""
        try:
            self.pace.profile = measure(self, rows)
        except Exception as error:
            if not is_out_of_memory(error) and not isinstance(error, DecodingError):
                raise
            logger.warning("Steps with drafts cannot be tried on %s rows (%s): no drafts.", rows, error)
            self.pace = self._new_pace()
            self.pace.profile = Profile({0: 1.0})

    def _leaving(self) -> list[Row]:
        """The rows that are done leave."""
        done = [(slot, row) for slot, row in enumerate(self.slots) if row is not None and row.result.finish]
        for slot, row in done:
            self.leave(slot, row)
        return [row for _, row in done]

    def _drop_cancelled(self, waiting: deque[Row]) -> list[Row]:
        """Mark what was cancelled; those that still wait, or for which there was no memory, leave at once."""
        asked, self._cancelled = self._cancelled, set()
        for row in self.slots:
            if row is not None and row.index in asked and not row.result.finish:
                row.result.finish = "cancelled"
        left = [row for row in waiting if row.index in asked or row.result.finish]
        for row in left:
            row.result.finish = row.result.finish or "cancelled"
            waiting.remove(row)
        return left

    # --- a step -----------------------------------------------------------------------------------------------

    def _step(self, waiting: bool) -> None:
        """Drafts, one trunk forward over the pending token and the drafts of every row, and what stands of them."""
        kind = "greedy" if self.is_greedy() else "scores"
        choice, behind = self._drafts_to_read(kind, waiting)
        begun = time.perf_counter()
        before = self.pending, self.lengths
        wanted = None
        if choice:  # to take back what drafts broke; machine code may write there again
            before = self.pending.clone(), self.lengths.clone()
            wanted = Asked(tree=self.tree) if choice == TREE else Asked(levels=choice)
        self.fresh = step = self.step(wanted, kind == "greedy")
        brought = _copied(step)
        if self.overlaps and wanted is not None and 0 < choice < step.run.shape[1] and kind == "greedy":
            with self.clock("draft"):
                self.propose_ahead(wanted)
        with self.clock("verify"):
            runs, counts = brought()
        seconds: float | None = time.perf_counter() - begun
        self._plain_ahead = max(0, self._plain_ahead - 1)
        if choice and step.run.shape[1] == 1:  # there was no memory for drafts
            choice, seconds, self._plain_ahead = 0, None, FIRST_LOOK
        self.steps[choice] += 1
        stood = [(row.tally, count) for count, row in zip(counts, self.slots, strict=True) if row is not None]
        self.pace.note(choice, stood, seconds, behind, kind)
        drafted = (self.tree.depth or self.n - 1) if choice == TREE and self.tree else choice
        for slot, (run, count) in enumerate(zip(runs, counts, strict=True)):
            row = self.slots[slot]
            if row is None:
                continue
            if choice and (run[0] < 0 or row.result.finish):
                row.result.finish, row.result.error = "", None
                self._take_back(slot, before)
            elif not row.result.finish:
                tokens = run[: count + 1]
                kept = self.kept(row, slot, tokens, step.scores, step.logits)
                row.emit(Run(tokens, [*range(1, count + 1), 0], count, drafted, **kept))

    def _take_back(self, slot: int, before: tuple[Tensor, Tensor]) -> None:
        """Undo a step of a row whose logits are no numbers, or whose processors raised: it may be a draft's doing.

        The next step is plain.
        """
        assert self.fresh is not None
        self.pending[slot], self.lengths[slot] = before[0][slot], before[1][slot]
        self.fresh.positions[slot], self.fresh.rows[slot] = -1, None
        start = int(before[1][slot])
        self.cache.clear(slot, start)
        if self.ahead is not None and self.drafter:  # these drafts saw that step, too
            self.drafter.forget(slot, start)
        self._plain_ahead = max(1, self._plain_ahead)

    def _drafts_to_read(self, kind: str, waiting: bool) -> tuple[int, bool]:
        """How many, 0 or TREE; and whether the drafter must catch up before, where that makes a difference."""
        if self.drafter is None or self._plain_ahead:
            return 0, False
        asked_for = waiting, *self.slots
        if self._asked_for == asked_for and self.pace.stays_plain():
            return 0, False
        if any(row is not None and row.sampling.stateful for row in self.slots):
            return 0, False
        if self.depth == "auto":
            behind, self._asked_for = self.is_behind, asked_for
            texts = [(row.tally, row.limit - len(row.result.tokens)) for row in self.slots if row is not None]
            return self.pace.choose(texts, waiting, behind, kind), behind
        return (TREE if self.tree is not None else int(self.depth)), self.is_behind

    def _check(self, prompt: Sequence[int], limit: int) -> None:
        if not 0 <= limit < LONGEST:
            raise PromptError(f"max_new_tokens is {limit}; it must be at least 0 and below {LONGEST:,}.")
        if not prompt:
            raise PromptError("The prompt is empty: give at least one token.")
        if (most := self.trunk.hard_limit) is not None and len(prompt) >= most:
            raise PromptError(
                f"The prompt has {len(prompt)} tokens; the model's texts have {most} at most, which leaves no room for "
                "an answer. Shorten the prompt."
            )
        if not 0 <= min(prompt) <= max(prompt) < self.trunk.vocab_size:
            raise PromptError(f"The prompt has token ids outside of the model's vocabulary of {self.trunk.vocab_size}.")


@cache
def warn_once(message: str) -> None:
    """Say something the first time that it is said in this process."""
    logger.warning(message)


def _seeds(sampling: Sampling | Sequence[Sampling], count: int) -> list[int]:
    """The seed of each prompt; greedy decoding draws none, so that it leaves PyTorch's generator alone."""
    if isinstance(sampling, Sampling):
        return prompt_seeds(sampling.seed if sampling.by_chance else 0, count)
    return [prompt_seeds(each.seed if each.by_chance else 0, 1)[0] for each in sampling]


def _token_ids(prompt: Any) -> list[int]:
    try:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
    except (TypeError, ValueError):  # a number, or a list of lists
        pass
    raise PromptError("Give a list of prompts, each of them a list of token ids.")


def _checked(depth: int | str | None, tree: Tree | None, n: int) -> int | str:
    if tree is not None and n == 1:
        raise ValueError("A tree of drafts needs a drafter.")
    if tree is not None and tree.depth is not None and tree.depth > n - 1:
        raise ValueError(f"The tree has drafts up to {tree.depth} tokens ahead; these heads make {n - 1}.")
    if tree is not None and depth not in (None, "auto"):
        raise ValueError(f"depth is {depth!r}, but a tree says itself how far it goes: leave depth out, or 'auto'.")
    if depth is None:
        return n - 1
    if depth == "auto":
        return "auto" if n > 1 else 0
    if not isinstance(depth, int) or not 0 <= depth <= n - 1:
        raise ValueError(f"depth is {depth!r}; give a number of drafts from 0 to {n - 1}, None for all, or 'auto'.")
    return depth


def _copied(step: Step) -> Callable[[], tuple[list[list[int]], list[int]]]:
    """Begin to copy what a step brought from where it is computed; what is returned waits for it, and lists it."""
    both = torch.cat([step.run, step.accepted[:, None]], dim=1)
    copy, done = both.to("cpu", non_blocking=both.is_cuda), torch.cuda.Event() if both.is_cuda else None
    if done is not None:
        done.record()

    def listed() -> tuple[list[list[int]], list[int]]:
        if done is not None:
            done.synchronize()
        rows = copy.tolist()
        return [row[:-1] for row in rows], [row[-1] for row in rows]

    return listed


def _by_width(codes: dict[int, Callable[..., Any]], eager: Callable[..., Any]) -> Callable[..., Any]:
    """The code for drafts of this width; what was not compiled runs eagerly."""
    return lambda pending, drafts, *rest: codes.get(drafts.shape[1], eager)(pending, drafts, *rest)


def progress_bar(console: Console) -> Bar:
    """A spinner, what is done, how many of how many, and the time that has passed."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    return Bar(*columns, console=console, transient=True)


def _shown(results: Iterator[tuple[int, Generation]], count: int, console: Console) -> Iterator[tuple[int, Generation]]:
    """The same results, with a bar."""
    tokens, begun = 0, time.perf_counter()
    with progress_bar(console) as bar:
        task = bar.add_task("generating", total=count)
        for index, result in results:
            tokens += len(result.tokens)
            rate = tokens / (time.perf_counter() - begun)
            bar.update(task, advance=1, description=f"{tokens:,} tokens, {rate:,.0f} a second")
            yield index, result
