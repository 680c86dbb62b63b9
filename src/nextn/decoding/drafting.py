"""Who proposes the next tokens: the interface that the engine knows, and heads behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextn.config import Tap
from nextn.decoding.tree import Chances, Tree, TreeGrowth
from nextn.heads.base import BestTokens, Chain, Growth, Heads, Window
from nextn.output import Output, best
from nextn.trunk import RaggedCache, Trunk


@dataclass
class Drafts:
    """What is proposed to the trunk.

    tokens: [B, d] up to d = n - 1, or all nodes of a tree but the pending token [B, T-1]; -1 for no draft.
    drawn_from: the probabilities [B, d, V] that a chain was drawn from; None where its tokens were not drawn.
    shape: of a tree, see `TreeGrowth.shape`; None for a chain.
    """

    tokens: Tensor
    drawn_from: Tensor | None = None
    shape: tuple[Tensor, Tensor, Tensor] | None = None


class Drafter(Protocol):
    """Proposes up to `drafts` tokens a row after each trunk forward."""

    drafts: int  # n - 1
    tap: Tap  # the trunk state that it reads

    def begin(self, cache: RaggedCache, keep: bool = False) -> None:
        """Make room for as many sequences and positions as the trunk's cache has, which may be read.

        Args:
            keep: whether what it holds of the rows stays.
        """

    def forget(self, row: int, start: int = 0) -> None:
        """What it holds of a row from position `start` on is not of the text that goes on there."""

    def propose(
        self, hidden: Tensor, positions: Tensor, following: Tensor, last: Tensor, rows: Tensor, asked: Asked
    ) -> Drafts:
        """Drafts after what trunk forwards brought.

        Args:
            hidden: tapped trunk states [B, T, D].
            positions: their positions [B, T], consecutive in a row; -1 where a state is not of the text.
            following: the token after each of them [B, T], accepted drafts and the new pending token included.
            last: index [B] into T of the newest valid state; its following token is the pending one.
            rows: which of the sequences these are [B].
            asked: what kind of drafts.
        """


@dataclass
class Asked:
    """What kind of drafts are wanted.

    chances: the noise; None for the best tokens.
    drawn: whether the probabilities are wanted from which the noise drew.
    tree: None for a chain.
    levels: how many drafts of a chain are used; None for all. A drafter may make more. 0: it only sees the states.
    newest: no state stands further on; None where that is not known, and has to be read from where the states are.
    """

    chances: Chances | None = None
    drawn: bool = False
    tree: Tree | None = None
    levels: int | None = None
    newest: int | None = None


BEST = Asked()


class NoisyTokens(Chain):
    """At each depth the best token after the noise of its position: a draw from what the head says."""

    def __init__(self, chances: Chances, drawn: bool, levels: int | None = None) -> None:
        super().__init__(levels)
        self.chances = chances
        self.drawn_from: list[Tensor] | None = [] if drawn else None  # [B, V] by draft

    def choose(self, trunk: Trunk, output: Output, state: Tensor, depth: int) -> Tensor:
        scores, logits, ids = self.chances.scores(trunk, output, state[:, None], depth)
        token = ids.gather(2, best(scores)[..., None])[:, 0, 0]
        if self.drawn_from is not None:
            temperatures = self.chances.temperatures[:, None]
            q = (logits[:, 0] / torch.where(temperatures > 0, temperatures, 1)).softmax(dim=-1)
            whole = q.new_zeros(len(q), trunk.vocab_size).scatter(1, ids[:, 0], q)
            best_alone = torch.zeros_like(whole).scatter(1, token[:, None], 1.0)
            self.drawn_from.append(torch.where(temperatures > 0, whole, best_alone))
        return token


Codes = dict[int, Callable[..., tuple[Tensor, Tensor, Tensor]]]


def fewest_of(codes: Codes, least: int) -> int | None:
    """How many drafts the code makes that makes the fewest, but at least so many; None where there is none."""
    return min((levels for levels in codes if levels >= least), default=None)


class HeadDrafter:
    """Heads as the drafter: keeps their caches and, for distinct modules, the states to go back to.

    A module of depth k reads the token k-1 places ahead, so its newest entries were computed from drafts. Those of
    rejected drafts are computed again next time, from the true tokens: `heads.lookback` states are kept for that.
    """

    def __init__(self, trunk: Trunk, heads: Heads) -> None:
        self.trunk, self.heads = trunk, heads
        self.drafts, self.tap = heads.n - 1, heads.tap
        self.dtype = next(heads.parameters()).dtype  # while training: float32 heads on a bfloat16 trunk
        # What `Draft` and `NoisyDraft` compute for one step of all rows, as machine code, by how many drafts they make.
        self.compiled: Codes = {}
        self.compiled_noisy: Codes = {}
        self.caches: list[RaggedCache] = []
        self.trunk_cache = RaggedCache(layers=0, rows=0, capacity=0)

    def begin(self, cache: RaggedCache, keep: bool = False) -> None:
        self.heads.follow_vocabulary(self.trunk)
        self.heads.output.refresh(self.trunk)
        # Entries of drafts stand past the text, those of a tree one behind the other.
        rows, room = cache.rows, cache.capacity + self.heads.n
        same_place, self.trunk_cache = self.trunk_cache is cache, cache
        if keep:
            for own in self.caches:
                own.grow(max(room, own.capacity))
            return
        if not same_place:
            self.caches = [RaggedCache(1, rows, room) for _ in range(self.heads.cache_count)]
        back, width = self.heads.lookback, self.heads.hidden_width
        self.past_hidden = torch.zeros(rows, back, width, dtype=self.dtype, device=self.trunk.device)
        self.past_following = torch.zeros(rows, back, dtype=torch.long, device=self.trunk.device)
        self.has_past = torch.zeros(rows, dtype=torch.bool, device=self.trunk.device)

    def forget(self, row: int, start: int = 0) -> None:
        self.has_past[row] = False
        for cache in self.caches:
            cache.clear(row, start)

    def propose(
        self, hidden: Tensor, positions: Tensor, following: Tensor, last: Tensor, rows: Tensor, asked: Asked = BEST
    ) -> Drafts:
        if (tokens := self._by_machine_code(hidden, positions, following, last, asked)) is not None:
            return Drafts(tokens)
        some = rows if len(rows) < len(self.past_hidden) else None
        past = self.past_hidden[rows], self.past_following[rows]
        window = with_past(*past, hidden.to(self.dtype), positions, following, last, self.has_past[rows])
        read = [RaggedCache.over([pair], self._seen(positions, asked.newest)) for pair in self._read()]
        if asked.levels == 0:
            self.heads.remember(self.trunk, window, self.caches + read, some)
            growth, tokens = None, following[:, :0]
        else:
            growth = self._growth(asked, len(rows))
            tokens = self.heads.draft(self.trunk, window, self.caches + read, some, growth)
        self.past_hidden[rows], self.past_following[rows] = newest_past(window, self.heads.lookback)
        self.has_past[rows] = True
        if isinstance(growth, TreeGrowth):
            return Drafts(tokens, shape=growth.shape())
        drawn = growth.drawn_from if isinstance(growth, NoisyTokens) else None
        return Drafts(tokens, drawn_from=None if drawn is None else torch.stack(drawn, dim=1))

    def _growth(self, asked: Asked, rows: int) -> Growth:
        if asked.tree is not None:
            none = Chances(
                torch.zeros(rows, device=self.trunk.device),
                torch.zeros(rows, self.drafts, dtype=torch.long, device=self.trunk.device),
            )
            return TreeGrowth(asked.tree, self.drafts, asked.chances or none)
        if asked.chances is None:
            return BestTokens(asked.levels)
        return NoisyTokens(asked.chances, asked.drawn, asked.levels)

    def _by_machine_code(
        self, hidden: Tensor, positions: Tensor, following: Tensor, last: Tensor, asked: Asked
    ) -> Tensor | None:
        """Drafts of one step of all rows; None where that is not what is asked, or not compiled."""
        if asked.levels == 0:
            return None
        codes = self.compiled if asked.chances is None else self.compiled_noisy
        levels = fewest_of(codes, max(asked.levels or self.drafts, hidden.shape[1] - 1))
        is_step = len(hidden) == len(self.past_hidden)
        if levels is None or not is_step or asked.tree or asked.drawn or not self._is_warm(positions):
            return None
        tokens, self.past_hidden, self.past_following = codes[levels](
            *self.step_inputs(levels, hidden, positions, following, last, asked.chances, asked.newest)
        )
        return tokens

    def _is_warm(self, positions: Tensor) -> bool:
        """Whether there are caches, and a past for every row in use."""
        if not all(cache.is_filled for cache in self.caches):
            return False
        return not self.heads.lookback or bool((self.has_past | (positions[:, 0] < 0)).all())

    def step_inputs(
        self,
        levels: int,
        hidden: Tensor,
        positions: Tensor,
        following: Tensor,
        last: Tensor,
        chances: Chances | None = None,
        newest: int | None = None,
    ) -> tuple:
        """What `Draft`, or with noise `NoisyDraft`, takes to make so many drafts after a step of all rows [B, W].

        W is at most levels + 1; a step with fewer drafts is one whose last drafts were rejected.
        """
        missing = levels + 1 - hidden.shape[1]
        hidden, following = F.pad(hidden, (0, 0, 0, missing)), F.pad(following, (0, missing))
        positions = F.pad(positions, (0, missing), value=-1)
        buffers = [pair for cache in self.caches for pair in cache.buffers] + self._read()
        noise = () if chances is None else (chances.temperatures, chances.keys)
        past = self.past_hidden, self.past_following
        return hidden, positions, following, last, *past, *noise, self._seen(positions, newest), buffers

    def _seen(self, positions: Tensor, newest: int | None) -> Tensor:
        """The positions that attention reads in this round [S]."""
        newest = int(positions.max()) if newest is None else newest
        cache, newest = (self.caches[0], newest + self.heads.n - 2) if self.caches else (self.trunk_cache, newest)
        return torch.arange(cache.reach(newest), device=positions.device)

    def _read(self) -> list[tuple[Tensor, Tensor]]:
        """The trunk's keys and values that the heads read, by layer."""
        return [self.trunk_cache.buffers[layer] for layer in self.heads.reads]


class Draft(nn.Module):
    """One round of drafts for all rows.

    A function of tensors alone, so that it can be compiled: the caches are handed in, and written in place.

    Args:
        levels: how many drafts a row are wanted.
    """

    def __init__(self, trunk: Trunk, heads: Heads, levels: int) -> None:
        super().__init__()
        self.heads, self.levels = heads, levels
        # Whoever exports this module must find in it all weights that heads ask the trunk for.
        self.asked = nn.ModuleList([trunk.embedding, trunk.unembedding, trunk.norm, trunk.rotary])
        self.trunk, self.dtype = trunk, next(heads.parameters()).dtype

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        following: Tensor,
        last: Tensor,
        past_hidden: Tensor,
        past_following: Tensor,
        seen: Tensor,
        buffers: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Drafter.propose`, with what the drafter keeps handed in.

        Args:
            past_hidden: states to look back on [B, back, D].
            past_following: the tokens after them [B, back].
            seen: the positions that attention reads, 0 … S-1 [S].
            buffers: keys and values, by cache of the heads and then by layer of the trunk that they read.

        Returns:
            drafts [B, n-1] or fewer, the new past_hidden and the new past_following.
        """
        states = past_hidden, past_following, hidden.to(self.dtype), positions, following, last
        return self._drafts(states, seen, buffers, BestTokens(self.levels))

    def _drafts(
        self, states: tuple[Tensor, ...], seen: Tensor, buffers: list[tuple[Tensor, Tensor]], growth: Growth
    ) -> tuple[Tensor, Tensor, Tensor]:
        window = with_past(*states)
        caches = [RaggedCache.over([pair], seen) for pair in buffers]
        drafts = self.heads.draft(self.trunk, window, caches, None, growth)
        return drafts, *newest_past(window, self.heads.lookback)


class NoisyDraft(Draft):
    """`Draft` with noise: temperatures [B], keys [B, n-1] come before `seen`."""

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        positions: Tensor,
        following: Tensor,
        last: Tensor,
        past_hidden: Tensor,
        past_following: Tensor,
        temperatures: Tensor,
        keys: Tensor,
        seen: Tensor,
        buffers: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        growth = NoisyTokens(Chances(temperatures, keys), drawn=False, levels=self.levels)
        states = past_hidden, past_following, hidden.to(self.dtype), positions, following, last
        return self._drafts(states, seen, buffers, growth)


def with_past(
    past_hidden: Tensor,
    past_following: Tensor,
    hidden: Tensor,
    positions: Tensor,
    following: Tensor,
    last: Tensor,
    has_past: Tensor | None = None,
) -> Window:
    """The window of heads that look back: kept states before the new ones.

    Args:
        has_past: rows [B] whose past means something; None: all.
    """
    back = past_hidden.shape[1]
    steps_back = torch.arange(-back, 0, device=positions.device)
    # An idle row has no past either.
    has_past = positions[:, 0] >= 0 if has_past is None else has_past & (positions[:, 0] >= 0)
    past_positions = torch.where(has_past[:, None], (positions[:, :1] + steps_back).clamp(min=-1), -1)
    return Window(
        hidden=torch.cat([past_hidden, hidden], dim=1),
        positions=torch.cat([past_positions, positions], dim=1),
        following=torch.cat([past_following, following], dim=1),
        last=last + back,
    )


def newest_past(window: Window, back: int) -> tuple[Tensor, Tensor]:
    """The newest `back` states and the tokens after them, to look back on next time: [B, back, D] and [B, back]."""
    kept = window.last[:, None] + torch.arange(1 - back, 1, device=window.last.device)  # [B, back]
    batch = torch.arange(len(kept), device=kept.device)[:, None]
    return window.hidden[batch, kept], window.following[batch, kept]
