"""Slots for texts: room in the cache for as many at a time, and the reading of their prompts.

Who comes to a slot goes on from what it holds of the same text.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nextn.config import Tap
from nextn.decoding.choosing import DrawOne, choose
from nextn.decoding.drafting import Drafter, HeadDrafter
from nextn.decoding.rows import DecodingError, Held, Row, Run
from nextn.decoding.stats import logprobs_of
from nextn.decoding.tree import Tree
from nextn.trunk import RaggedCache, Trunk, is_out_of_memory

logger = logging.getLogger(__name__)


class Slots:
    """Rows of texts, each in its slot.

    Attributes:
        slots: the text in each slot; None where it is free.
        pending: the newest token of each row [B], not yet read by the trunk.
        lengths: how many tokens of each row the cache holds [B].
        draw: what `Draw` was compiled to; None where it was not.
        turn: another object whenever a batch began.
        room: how many positions a row has in the caches of trunk and drafter alike.
        seconds: time spent in `prefill`, `verify` (the trunk's forward and what stands of the drafts) and `draft`.
    """

    def __init__(
        self, trunk: Trunk, drafter: Drafter | None, rows: int, tree: Tree | None, keep: bool, chunk: int
    ) -> None:
        self.trunk, self.drafter, self.rows = trunk, drafter, rows
        self.tree, self.keep, self.chunk = tree, keep, chunk
        self.n = 1 + (drafter.drafts if drafter else 0)
        self.tap: Tap = drafter.tap if drafter else "post_norm"
        self.draw: DrawOne | None = None
        self.seconds: dict[str, float] = defaultdict(float)
        self.slots: list[Row | None] = []
        self.cache, self._held, self.room = RaggedCache(layers=0, rows=0, capacity=0), list[Held](), 0
        self._made_for: tuple[int, torch.dtype, torch.device, bool] | None = None
        self.keep_scores = False

    def begin(self, rows: Sequence[Row], count: int, goes_on: bool = False) -> None:
        """Make room for so many slots, and for the longest of the texts that are to come.

        Where there is room enough from before it is used again, whatever it holds; a CUDA graph knows its address.

        Args:
            goes_on: keep what the slots hold, if there are as many, made alike, and there is memory to let them grow.
        """
        device = self.trunk.device
        room = self._room(rows)
        self.turn = object()
        self.seconds = defaultdict(float)
        self.all_rows = torch.arange(count, device=device)
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.pending = torch.zeros(count, dtype=torch.long, device=device)
        made_for = count, self.trunk.dtype, device, torch.is_inference_mode_enabled()
        alike, self._made_for = self._made_for == made_for and len(self.slots) == count, made_for
        interrupted, self.slots = self.slots, [None] * count
        if goes_on and alike:
            goes_on = alike = fits(partial(self._grow, room)) is not None
        if not (goes_on and alike):
            if not alike or room > self.cache.capacity or not self.cache.is_filled:
                self.cache = RaggedCache(self.trunk.cache_layers, count, room)
            self._held = [Held() for _ in range(count)]  # by slot
            if self.drafter:
                self.drafter.begin(self.cache)
            self.room = self.cache.capacity
        for slot in (slot for slot, row in enumerate(interrupted) if alike and row is not None):
            self._clear(slot)

    def _clear(self, slot: int) -> None:
        """A text that broke off may have left what is not a number, which must not reach whoever comes next."""
        self._held[slot] = Held()
        self.cache.clear(slot)
        if self.drafter:
            self.drafter.forget(slot)

    def _grow(self, room: int) -> bool:
        """Make room for longer texts beside what the slots hold."""
        if room > self.cache.capacity:
            self.cache.grow(room)
        if self.drafter:
            self.drafter.begin(self.cache, keep=True)
        self.room = self.cache.capacity
        return True

    def leave(self, slot: int, row: Row) -> None:
        """A row is done; its slot is free, and remembers what the cache holds of the text."""
        self.slots[slot] = None
        self._held[slot] = Held(row.text[:-1], row.read, row.unread)
        if row.result.finish == "error":
            self._clear(slot)

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

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
        if not slots or fits(partial(self._read, slots, chunk)):
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
        while not fits(self._fill):
            texts = [row for row in (*waiting, *self.slots) if row is not None and not row.result.finish]
            if not texts:
                return True
            self._fail_the_longest(texts)
            rest = [row for row in texts if not row.result.finish]
            self.cache, ended = RaggedCache(self.trunk.cache_layers, len(self.slots), self._room(rest)), True
            if self.drafter:
                self.drafter.begin(self.cache)
            self.room = self.cache.capacity
        return ended

    def make_room(self) -> bool:
        """Grow the caches where the next step would not fit; False where texts end instead, for want of memory.

        Caches are made for the model's context, since a text may end far from its length limit; one that goes on past
        the context doubles them.
        """
        active = [row for row in self.slots if row is not None]
        needed = max(map(self._needed_now, active))
        if needed <= self.room:
            return True
        whole = max(map(self._whole_room, active))
        rooms = [room for room in (min(2 * self.room, whole), needed) if room >= needed]
        if any(fits(partial(self._grow, room)) for room in rooms):
            return True
        logger.warning("There is no memory for texts of more than %s tokens: they end.", self.room)
        for row in active:
            if self._needed_now(row) > self.room:
                row.result.finish = "length"
        return False

    def _fail_the_longest(self, texts: Sequence[Row]) -> None:
        longest = self._room(texts)
        why = f"There is not enough memory for {len(self.slots)} rows of {longest} tokens: take fewer or shorter."
        for row in texts:
            if self._room([row]) == longest:
                row.fail(DecodingError(why))

    def _fill(self) -> bool:
        """Have the cache make its buffers, by a token that is written where nobody reads."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.lengths.device)
        visible = self.cache.place(token - 1, rows=token[0])
        self.trunk.run(token, token - 1, visible, self.cache, self.tap)
        return True

    @property
    def _ahead(self) -> int:
        """How many positions a step needs behind the newest token; those of a tree lie one behind the other."""
        return self.n if self.tree is None else max(self.tree.nodes, self.tree.beam * self.n)

    def _needed_now(self, row: Row) -> int:
        """How many positions the next step of a text needs."""
        return min(row.length + self._ahead, self._whole_room(row))

    def _whole_room(self, row: Row) -> int:
        """How many positions a text needs that becomes as long as it may."""
        return len(row.result.prompt) + row.limit + (0 if self.tree is None else self._ahead)

    def _room(self, rows: Sequence[Row]) -> int:
        """How many positions caches are made with for some texts, see `make_room`."""
        context = self.trunk.max_length
        first = (max(context, len(row.result.prompt)) + self._ahead for row in rows)
        return max((min(self._whole_room(row), room) for row, room in zip(rows, first, strict=True)), default=0)

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
                row.emit(Run([token], [0], **self.kept(row, place, [token], scores, logits)))

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

    def kept(
        self, row: Row, place: int, tokens: list[int], scores: Tensor | None, logits: Tensor | None
    ) -> dict[str, Any]:
        """What a row keeps beside its next tokens, by the names that `Run` has for it.

        Args:
            place: of the row in scores and logits [B, W, V].
        """
        kept: dict[str, Any] = {}
        if logits is None:
            return kept
        count, top = len(tokens), row.sampling.logprobs
        if top is not None:
            kept["logprobs"] = logprobs_of(logits[place, :count], tokens, top)
        if self.keep_scores and scores is not None:  # machine code may write there again
            kept |= {
                "scores": list(scores[place, :count].clone()),
                "logits": list(logits[place, :count].float().clone()),
            }
        return kept


def fits(work: Callable[[], Any]) -> Any:
    """What it gives, None for want of memory. What failed is let go of on return, so there is room to try again."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
