"""Texts side by side: drafting for all of them, and one trunk forward for what stands.

Each row accepts its own number of drafts. Nothing here knows of how far to draft; see `engine`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nextn.decoding.choosing import asked, choose, decide
from nextn.decoding.drafting import Asked, Drafter, Drafts, HeadDrafter, fewest_of
from nextn.decoding.rows import Row
from nextn.decoding.slots import Slots, fits
from nextn.decoding.tree import Tree
from nextn.decoding.verify import Score, ScoreTree, Verify, follow, only_standing, standing
from nextn.trunk import Trunk

logger = logging.getLogger(__name__)


@dataclass
class Step:
    """What a step brought to all rows.

    rows: the texts that it was a step of.
    run: the tokens after each state [B, W]; row b emits the first accepted + 1 of them, and the others mean nothing.
    tapped, positions: the states [B, W, D], and where they stand [B, W], -1 where they are not of the text.
    scores, logits: of the tokens of `run` [B, W, V]; None where nothing was chosen by them, or nobody keeps a tree's.
    """

    rows: list[Row | None]
    run: Tensor
    accepted: Tensor
    tapped: Tensor
    positions: Tensor
    scores: Tensor | None = None
    logits: Tensor | None = None


class Batch(Slots):
    """Steps of all rows.

    Attributes:
        fresh: the last step, where the drafter has not seen its states yet.
        ahead: drafts that were made before it was known what that step brought, with the step and what was wanted.
        verify, score: the step, `Verify` and `Score` or what they were compiled to.
        padding: places of a plain step that hold no token; some machines are faster so.
    """

    def __init__(
        self, trunk: Trunk, drafter: Drafter | None, rows: int, tree: Tree | None, keep: bool, chunk: int
    ) -> None:
        super().__init__(trunk, drafter, rows, tree, keep, chunk)
        self.padding = 0
        self.verify: Callable[..., Any] = Verify(trunk, self.tap)
        self.score: Callable[..., Any] = Score(trunk, self.tap)
        self.score_tree = ScoreTree(trunk, self.tap)

    def begin(self, rows: Sequence[Row], count: int, goes_on: bool = False) -> None:
        super().begin(rows, count, goes_on)
        self.fresh: Step | None = None
        self.ahead: tuple[Step, Asked, Drafts] | None = None
        self._aside: list[tuple[list[Row | None], Tensor, Tensor]] = []  # rows, states and accepted drafts of steps

    def leave(self, slot: int, row: Row) -> None:
        if self.keep and self.drafter:
            self.set_aside()
        self.hand_out()
        super().leave(slot, row)

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
                if (step := fits(verify)) is not None:
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
        keeps_logits = self.keep_scores or any(row and row.sampling.logprobs is not None for row in self.slots)
        kept = (scores[rows, path], logits[rows, path]) if keeps_logits else (None, None)
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
            found = (fits(partial(self._draft_after, active, chunk, wanted)) for chunk in chunks)
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
        return fits(partial(self.drafter.propose, *states, self.all_rows, what))

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
