"""Texts side by side: reading their prompts, drafting for all of them, and one trunk forward for what stands.

Each row accepts its own number of drafts. Nothing here knows of how far to draft; see `engine`.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nextn.config import Tap
from nextn.decoding.choosing import DrawOne, asked, choose, decide
from nextn.decoding.drafting import Asked, Drafter, Drafts, HeadDrafter, fewest_of
from nextn.decoding.rows import DecodingError, Held, Row, Run
from nextn.decoding.tree import Tree
from nextn.decoding.verify import (
    Score,
    ScoreTree,
    Verify,
    follow,
    only_standing,
    standing,
)
from nextn.trunk import RaggedCache, Trunk, is_out_of_memory

logger = logging.getLogger(__name__)


@dataclass
class Step:
    """What a step brought to all rows.

    rows: the texts that it was a step of.
    run: the tokens after each state [B, W]; row b emits the first accepted + 1 of them, and the others mean nothing.
    tapped, positions: the states [B, W, D], and where they stand [B, W], -1 where they are not of the text.
    scores, logits: of the tokens of `run` [B, W, V]; None where nobody asked for them.
    """

    rows: list[Row | None]
    run: Tensor
    accepted: Tensor
    tapped: Tensor
    positions: Tensor
    scores: Tensor | None = None
    logits: Tensor | None = None


class Batch:
    """Rows of texts, each in its slot.

    Attributes:
        slots: the text in each slot; None where it is free.
        pending: the newest token of each row [B], not yet read by the trunk.
        lengths: how many tokens of each row the cache holds [B].
        fresh: the last step, where the drafter has not seen its states yet.
        ahead: drafts that were made before it was known what that step brought, with the step and what was wanted.
        verify, score: the step, `Verify` and `Score` or what they were compiled to.
        draw: what `Draw` was compiled to; None where it was not.
        padding: places of a plain step that hold no token; some machines are faster so.
        turn: another object whenever a batch began.
        seconds: time spent in `prefill`, `verify` (the trunk's forward and what stands of the drafts) and `draft`.
    """

    def __init__(
        self, trunk: Trunk, drafter: Drafter | None, rows: int, tree: Tree | None, keep: bool, chunk: int
    ) -> None:
        self.trunk, self.drafter, self.rows = trunk, drafter, rows
        self.tree, self.keep, self.chunk = tree, keep, chunk
        self.n = 1 + (drafter.drafts if drafter else 0)
        self.tap: Tap = drafter.tap if drafter else "post_norm"
        self.padding = 0
        self.verify: Callable[..., Any] = Verify(trunk, self.tap)
        self.score: Callable[..., Any] = Score(trunk, self.tap)
        self.score_tree = ScoreTree(trunk, self.tap)
        self.draw: DrawOne | None = None
        self.seconds: dict[str, float] = defaultdict(float)
        self.slots: list[Row | None] = []
        self.cache, self._held = RaggedCache(layers=0, rows=0, capacity=0), list[Held]()
        self._made_for: tuple[int, torch.dtype, torch.device, bool] | None = None
        self.keep_scores = False

    def begin(self, rows: Sequence[Row], count: int, goes_on: bool = False) -> None:
        """Make room for so many slots, and for the longest of the texts that are to come.

        Where there is room enough from before it is used again, whatever it holds; a CUDA graph knows its address.

        Args:
            goes_on: keep what the slots hold, if there are as many.
        """
        device = self.trunk.device
        room = self._room(rows)
        self.turn = object()
        self.seconds = defaultdict(float)
        self.fresh: Step | None = None
        self.ahead: tuple[Step, Asked, Drafts] | None = None
        self._aside: list[tuple[list[Row | None], Tensor, Tensor]] = []  # rows, states and accepted drafts of steps
        self.all_rows = torch.arange(count, device=device)
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.pending = torch.zeros(count, dtype=torch.long, device=device)
        made_for = count, self.trunk.dtype, device, torch.is_inference_mode_enabled()
        alike, self._made_for = self._made_for == made_for and len(self.slots) == count, made_for
        interrupted, self.slots = self.slots, [None] * count
        if goes_on and alike:
            goes_on = alike = _fits(partial(self._grow, room)) is not None
        if not (goes_on and alike):
            if not alike or room > self.cache.capacity or not self.cache.is_filled:
                self.cache = RaggedCache(len(self.trunk.layers), count, room)
            self._held = [Held() for _ in range(count)]  # by slot
            if self.drafter:
                self.drafter.begin(self.cache)
        for slot in (slot for slot, row in enumerate(interrupted) if alike and row is not None):
            self._held[slot] = Held()  # what broke off may have left what is not a number
            self.cache.clear(slot)
            if self.drafter:
                self.drafter.forget(slot)

    def _grow(self, room: int) -> bool:
        """Make room for longer texts beside what the slots hold."""
        if room > self.cache.capacity:
            self.cache.grow(room)
        if self.drafter:
            self.drafter.begin(self.cache, keep=True)
        return True

    def leave(self, slot: int, row: Row) -> None:
        """A row is done; its slot is free, and remembers what the cache holds of the text."""
        if self.keep and self.drafter:
            self.set_aside()
        self.hand_out()
        self.slots[slot] = None
        self._held[slot] = Held(row.text[:-1], row.read, row.unread)
        if row.result.finish == "error":  # what is not a number must not reach whoever comes next
            self._held[slot] = Held()
            self.cache.clear(slot)
            if self.drafter:
                self.drafter.forget(slot)

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    # --- prefill ----------------------------------------------------------------------------------------------

    def admit(self, waiting: deque[Row]) -> None:
        """Read prompts into the free slots, and emit each row's first token."""
        slots = []
        free = [slot for slot, row in enumerate(self.slots) if row is None]
        while free and waiting:
            row = waiting.popleft()
            slot = max(free, key=lambda slot: self._held[slot].alike(row.result.prompt))
            free.remove(slot)
            slots.append(slot)
            self.slots[slot] = row
            self._go_on(slot, row)
        long = [slot for slot in slots if self._todo(slot) > self.chunk]
        short = [slot for slot in slots if slot not in long]
        for group in [*([slot] for slot in long), *([short] if short else [])]:
            self._prefill(group, self.chunk, waiting)

    def _prefill(self, slots: list[int], chunk: int, waiting: Iterable[Row]) -> None:
        """Read the prompts of some slots; where memory does not suffice, one by one and then in smaller parts."""
        slots = [slot for slot in slots if (row := self.slots[slot]) is not None and not row.result.finish]
        if not slots or _fits(partial(self._read, slots, chunk)):
            return
        if not self.cache.is_filled and self._end_what_has_no_room(waiting):
            self._prefill(slots, chunk, waiting)
        elif len(slots) > 1:
            for slot in slots:
                self._prefill([slot], chunk, waiting)
        elif chunk > 8:
            self._prefill(slots, chunk // 2, waiting)
        elif (row := self.slots[slots[0]]) is not None:
            row.fail(DecodingError(f"There is not enough memory for a prompt of {len(row.result.prompt)} tokens."))

    def _end_what_has_no_room(self, waiting: Iterable[Row]) -> bool:
        """Whether there is no memory for the cache; then the longest texts end, until there is for the others."""
        ended = False
        while not _fits(self._fill):
            texts = [row for row in (*waiting, *self.slots) if row is not None and not row.result.finish]
            if not texts:
                return True
            longest = self._room(texts)
            why = f"There is not enough memory for {len(self.slots)} rows of {longest} tokens: take fewer or shorter."
            for row in texts:
                if self._room([row]) == longest:
                    row.fail(DecodingError(why))
            rest = [row for row in texts if not row.result.finish]
            self.cache, ended = RaggedCache(len(self.trunk.layers), len(self.slots), self._room(rest)), True
            if self.drafter:
                self.drafter.begin(self.cache)
        return ended

    def _fill(self) -> bool:
        """Have the cache make its buffers, by a token that is written where nobody reads."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.lengths.device)
        visible = self.cache.place(token - 1, rows=token[0])
        self.trunk.run(token, token - 1, visible, self.cache, self.tap)
        return True

    def _room(self, rows: Sequence[Row]) -> int:
        """How many positions the longest of some texts needs."""
        room = max((len(row.result.prompt) + row.limit for row in rows), default=0)
        # A tree lies behind the text, whatever its nodes' places in it.
        return room if self.tree is None else room + max(self.tree.nodes, self.tree.beam * self.n)

    def _read(self, slots: list[int], chunk: int) -> bool:
        """The trunk over what is new of some prompts, several ones in one part; emits the tokens after them."""
        rows = torch.tensor(slots, device=self.lengths.device)
        members = [row for slot in slots if (row := self.slots[slot]) is not None]
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
        self._first_tokens(slots, hidden[torch.arange(len(slots)), counts - 1])
        for row, states in zip(members, unread, strict=True):
            row.unread = states if self.drafter else []
        return True

    def _first_tokens(self, slots: list[int], hidden: Tensor) -> None:
        """Choose the token after each prompt, from the state of its last one [b, D]."""
        members = [row for slot in slots if (row := self.slots[slot]) is not None]
        logits = self.trunk.logits(hidden)[:, None]
        at = torch.tensor([[row.length] for row in members], device=hidden.device)
        targets, scores = choose(members, logits, at, [[[]]] * len(slots), self.draw)
        self.pending[slots], self.lengths[slots] = targets[:, 0], at[:, 0]
        for place, (row, token) in enumerate(zip(members, targets[:, 0].tolist(), strict=True)):
            if not row.result.finish:
                row.emit(Run([token], [0], **self.kept(place, 1, scores, logits)))

    def _todo(self, slot: int) -> int:
        row = self.slots[slot]
        return 0 if row is None else len(row.result.prompt) - row.held

    def _go_on(self, slot: int, row: Row) -> None:
        """A row takes over what its slot holds of its prompt."""
        held, self._held[slot] = self._held[slot], Held()
        if self.drafter is None:
            held.read = len(held.text)
        # Heads read the token after a state, distinct modules some more: what saw another text is made anew.
        lookback = self.drafter.heads.lookback if isinstance(self.drafter, HeadDrafter) else 0
        held.hand_over(row, back=1 + lookback if self.drafter else 0)
        if self.drafter:
            self.drafter.forget(slot, start=row.read)

    # --- what stands ------------------------------------------------------------------------------------------

    def is_greedy(self) -> bool:
        return not self.keep_scores and all(row is None or row.sampling.is_greedy for row in self.slots)

    def step(self, wanted: Asked | None, greedy: bool) -> Step:
        """Drafts, if any are wanted, and one trunk forward over the pending token and the drafts of every row."""
        drafts = self._no_drafts()
        if wanted is not None:
            with self.clock("draft"):
                drafts = self.propose(wanted)
        elif self.drafter:
            self.set_aside()
        with self.clock("verify"):
            if drafts.tokens.shape[1]:
                chain = drafts.shape is None
                verify = partial(self.verify_chain, drafts, greedy) if chain else partial(self.verify_tree, drafts)
                if (step := _fits(verify)) is not None:
                    return step
                logger.warning("There is not enough memory to verify drafts: no drafts for now.")
            return self.verify_chain(self._no_drafts(), greedy)

    def _no_drafts(self) -> Drafts:
        return Drafts(self.pending.new_empty(len(self.slots), 0))

    def verify_chain(self, drafts: Drafts, greedy: bool) -> Step:
        tokens, width = drafts.tokens, drafts.tokens.shape[1] + 1
        padding = self.padding if width == 1 else 0
        padded = torch.nn.functional.pad(tokens, (0, padding), value=-1)
        inputs = self.inputs(padded)
        if greedy:
            run, accepted, self.pending, self.lengths, tapped, positions = self.verify(*inputs)
            return Step(list(self.slots), run[:, :width], accepted, tapped[:, :width], positions[:, :width])
        logits, tapped, positions = self.score(*inputs)
        logits = logits[:, :width]
        run, accepted, scores = decide(self.slots, drafts, logits, self.lengths, self.draw, self.keep_scores)
        positions, tapped = only_standing(positions[:, :width], accepted), tapped[:, :width]
        self.pending, self.lengths = standing(run, accepted, self.lengths)
        return Step(list(self.slots), run, accepted, tapped, positions, scores, logits)

    def verify_tree(self, drafts: Drafts) -> Step:
        assert drafts.shape is not None
        parents, depths, sees = drafts.shape
        tokens = torch.cat([self.pending[:, None], drafts.tokens], dim=1)
        inputs = self.inputs(drafts.tokens)
        logits, tapped, positions = self.score_tree(tokens, depths, sees, *inputs[2:])
        paths = self._paths(tokens, sees) if any(row and row.sampling.reads_text for row in self.slots) else []
        targets, scores = choose(self.slots, logits, self.lengths[:, None] + 1 + depths, paths, self.draw)
        accepted, path = follow(tokens, parents, depths, targets, self.n - 1)
        steps = torch.arange(self.n, device=path.device)
        path = torch.where(steps <= accepted[:, None], path, 0)
        strays = ((path != steps) & (steps <= accepted[:, None]) & (inputs[3] > 0)[:, None])[:, 1:]
        if bool(strays.any()):
            aside, slots = self.cache.capacity, self.lengths[:, None]  # where nothing is moved: the spare slot
            self.cache.move(
                torch.where(strays, slots + path[:, 1:], aside), torch.where(strays, slots + steps[1:], aside)
            )
        run = targets.gather(1, path)
        rows = torch.arange(len(path), device=path.device)[:, None]
        positions = only_standing(positions[rows, path], accepted)
        self.pending, self.lengths = standing(run, accepted, self.lengths)
        kept = (scores[rows, path], logits[rows, path]) if self.keep_scores else (None, None)
        return Step(list(self.slots), run, accepted, tapped[rows, path], positions, *kept)

    @staticmethod
    def _paths(tokens: Tensor, sees: Tensor) -> list[list[list[int]]]:
        """For each row and node of a tree the drafts up to it."""
        listed, follows = tokens.clamp(min=0).tolist(), sees.tolist()
        return [
            [[token for token, on_path in zip(row[1:], path[1:], strict=True) if on_path] for path in paths]
            for row, paths in zip(listed, follows, strict=True)
        ]

    def inputs(self, drafts: Tensor) -> tuple:
        """What `Verify` takes."""
        ends = self._ends()
        newest = max(row.length for row in self.slots if row is not None) + drafts.shape[1] - 1
        seen = torch.arange(self.cache.reach(newest), device=ends.device)
        return self.pending, drafts, self.lengths, ends, seen, self.cache.buffers

    def _ends(self) -> Tensor:
        """The first position of each row that is not needed any more [B]; 0 for a free row."""
        ends = [0 if row is None else len(row.result.prompt) + row.limit for row in self.slots]
        return torch.tensor(ends, device=self.lengths.device)

    def kept(self, place: int, count: int, scores: Tensor | None, logits: Tensor | None) -> dict[str, Any]:
        if not self.keep_scores or scores is None or logits is None:
            return {}
        # Machine code may write there again.
        return {"scores": list(scores[place, :count].clone()), "logits": list(logits[place, :count].float().clone())}

    @property
    def is_fresh(self) -> bool:
        """Whether the drafter has yet to see the last step alone."""
        self.hand_out()
        return self.fresh is not None and not any(row.unread for row in self.slots if row is not None)

    @property
    def is_behind(self) -> bool:
        """Whether the drafter has yet to see so much of a text that it takes time: more than two rounds of drafts."""
        self.hand_out()
        return any(
            len(row.unread) > 2 * self.n or sum(map(len, row.unread)) > 2 * self.n
            for row in self.slots
            if row is not None
        )

    # --- drafts -----------------------------------------------------------------------------------------------

    def propose(self, wanted: Asked) -> Drafts:
        """Drafts for all rows, from the states that the drafter has not seen yet: one step's, or those of many.

        Without memory for that, in smaller parts, and at last without drafts: what the drafter did not see costs
        acceptance only.

        Args:
            wanted: a chain or a tree; the chances are added here, by the samplings of the rows.
        """
        assert self.drafter is not None
        active = [slot for slot, row in enumerate(self.slots) if row is not None]
        drafts: Drafts | None
        if self.fresh is not None and self.is_fresh:
            known, self.ahead = self.ahead, None
            if known is not None and known[0] is self.fresh and known[1] == wanted:
                drafts = known[2]
            else:
                drafts = self._after(self.fresh, wanted, read=0)
        else:
            self.set_aside()
            self.hand_out()
            chunks = (self.chunk, max(8, self.chunk // 16))
            found = (_fits(partial(self._draft_after, active, chunk, wanted)) for chunk in chunks)
            first = next((each for each in found if each is not None), None)
            drafts = None if first is None else self._spread(first, active)
        self.fresh = None
        for slot in active:
            row = self.slots[slot]
            assert row is not None
            row.unread, row.read = [], row.length - 1
        if drafts is None:
            logger.warning("There is not enough memory for the heads to read the texts: no drafts for now.")
            return self._no_drafts()
        if drafts.shape is not None:
            return drafts
        drawn_from = None if drafts.drawn_from is None else drafts.drawn_from[:, : wanted.levels]
        return Drafts(drafts.tokens[:, : wanted.levels], drawn_from)

    def propose_ahead(self, wanted: Asked) -> None:
        """Drafts after a step that is still being computed, so that a GPU need not wait for Python between the two.

        Of best tokens alone: noise depends on where a text stands. Nor by heads that look back, for which a state must
        not come twice, as it does where a new text takes a slot.
        """
        drafter = self.drafter
        if isinstance(drafter, HeadDrafter) and not drafter.heads.lookback and self.fresh is not None and self.is_fresh:
            drafts = self._after(self.fresh, wanted, read=self.fresh.run.shape[1])
            self.ahead = None if drafts is None else (self.fresh, wanted, drafts)

    def _after(self, step: Step, wanted: Asked, read: int) -> Drafts | None:
        """Drafts from the states of one step of all rows; None for want of memory.

        Args:
            read: how many of the tokens that it read the rows do not have yet.
        """
        assert self.drafter is not None
        # A text that broke off with logits that are no numbers leaves no token behind.
        states = step.tapped, step.positions, step.run.clamp(min=0), step.accepted
        newest = max(row.length for row in self.slots if row is not None) - 2 + read
        what = replace(asked(self.slots, self.n - 1, wanted, self.lengths.device), newest=newest)
        return _fits(partial(self.drafter.propose, *states, self.all_rows, what))

    def _draft_after(self, active: list[int], chunk: int, wanted: Asked) -> Drafts:
        """Drafts of some rows, from all that the drafter has not seen of them."""
        assert self.drafter is not None
        members = [(slot, row) for slot in active if (row := self.slots[slot]) is not None]
        for _, row in members:
            row.unread = [torch.cat(row.unread)]
        lengths = [len(row.unread[0]) for _, row in members]
        part = chunk if 2 * sum(lengths) > max(lengths) * len(lengths) else min(chunk, 2 * min(lengths) + 16)
        for slot, row in members:  # what is long goes ahead, row by row, so that others need not be padded
            while (length := len(row.unread[0])) > part:
                self._show([(slot, row)], leave=max(part, length - chunk))
        if isinstance(self.drafter, HeadDrafter) and self.drafter.compiled:  # which takes the states of one step
            step = 1 + (fewest_of(self.drafter.compiled, wanted.levels or self.n - 1) or max(self.drafter.compiled))
            self._show([(slot, row) for slot, row in members if len(row.unread[0]) > step], leave=step)
        return self.drafter.propose(
            *self._window(active, [row.unread[0] for _, row in members]),
            asked([row for _, row in members], self.n - 1, wanted, self.lengths.device),
        )

    def _show(self, members: list[tuple[int, Row]], leave: int) -> None:
        """Let the drafter see what some rows have set aside, but for the newest `leave` states of each."""
        assert self.drafter is not None
        if not members:
            return
        states = [row.unread[0][:-leave] for _, row in members]
        self.drafter.propose(*self._window([slot for slot, _ in members], states), Asked(levels=0))
        for (_, row), seen in zip(members, states, strict=True):
            row.unread, row.read = [row.unread[0][len(seen) :]], row.read + len(seen)

    def _spread(self, found: Drafts, active: list[int]) -> Drafts:
        """Drafts of some rows as drafts of all slots."""
        if len(active) == len(self.slots):
            return found
        rows = torch.tensor(active, device=self.all_rows.device)

        def spread(part: Tensor, idle: int) -> Tensor:
            return part.new_full((len(self.slots), *part.shape[1:]), idle).index_copy(0, rows, part)

        drawn, shape = found.drawn_from, found.shape
        return Drafts(
            spread(found.tokens, -1),
            None if drawn is None else spread(drawn, 0),
            None if shape is None else (spread(shape[0], 0), spread(shape[1], 0), spread(shape[2], 0)),
        )

    def _window(self, slots: list[int], states: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """States [t, D] of some rows as `Drafter.propose` takes them: padded to the longest."""
        device = self.all_rows.device
        counts = torch.tensor([len(each) for each in states], device=device)
        members = [row for slot in slots if (row := self.slots[slot]) is not None]
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

    def set_aside(self) -> None:
        """The states of the last step are kept for later; what comes at every plain step does as little as it can."""
        if self.fresh is not None:
            kept = self.fresh.tapped, self.fresh.accepted
            # A graph writes there again; a padded step's states are a part of more.
            if self.fresh.tapped.is_cuda or self.padding:
                kept = kept[0].clone(), kept[1].clone()
            self._aside.append((self.fresh.rows, *kept))
            self.fresh = None

    def hand_out(self) -> None:
        """What was set aside goes to its rows."""
        for rows, tapped, accepted in self._aside:
            for slot, (row, count) in enumerate(zip(rows, accepted.tolist(), strict=True)):
                if row is not None and row is self.slots[slot]:  # another one has states of its own already
                    row.unread.append(tapped[slot, : count + 1])
        self._aside = []


def _fits(work: Callable[[], Any]) -> Any:
    """What it gives, None for want of memory. What failed is let go of on return, so there is room to try again."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
