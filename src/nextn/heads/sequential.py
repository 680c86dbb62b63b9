"""Sequential heads: each depth also reads the token before the one it predicts.

Distinct modules are DeepSeek-V3's (arXiv:2412.19437, eqs 21-23); one module for all depths is FastMTP's
(arXiv:2509.18362). The input is [norm(embedding) ; norm(previous state)], embedding first, as in the released weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nextn.config import MultiTokenConfig
from nextn.heads.base import Growth, Heads, Level, Text, Window
from nextn.heads.least_squares import FIRST_CHECK, RidgeRegression
from nextn.trunk import ChainCache, HostError, RaggedCache, Trunk, VisibleFn, with_own_keys


class SequentialModule(nn.Module):
    """One module: eh_proj([enorm(embedding) ; hnorm(state)]), one decoder layer of the host, its own norm."""

    def __init__(self, trunk: Trunk, dense: bool = False) -> None:
        super().__init__()
        width = trunk.width
        self.enorm = trunk.new_norm()
        self.hnorm = trunk.new_norm()
        self.eh_proj = nn.Linear(2 * width, width, bias=False, device=trunk.device, dtype=trunk.dtype)
        self.layer = trunk.new_layer(dense)
        self.norm = trunk.new_norm(like_final=True)
        with torch.no_grad():
            self.eh_proj.weight.copy_(self._pass_on())

    def _pass_on(self) -> Tensor:
        """The eh_proj of a new module [D, 2D]: the state goes on as it is, and the token is ignored."""
        width = len(self.eh_proj.weight)
        return torch.eye(width, 2 * width).roll(width, dims=1)

    @property
    def is_new(self) -> bool:
        return torch.equal(self.eh_proj.weight.cpu().float(), self._pass_on())

    def fuse(self, embedding: Tensor, state: Tensor) -> Tensor:
        """[B, T, D] and [B, T, D] -> what eh_proj reads [B, T, 2D]."""
        return torch.cat([self.enorm(embedding), self.hnorm(state)], dim=-1)

    def forward(
        self,
        trunk: Trunk,
        ids: Tensor,
        state: Tensor,
        positions: Tensor,
        visible: VisibleFn,
        cache: RaggedCache | ChainCache | None = None,
    ) -> Tensor:
        """ids [B, T] and the previous state [B, T, D] -> the next state [B, T, D], after the module's norm."""
        fused = self.fuse(trunk.embedding(ids).to(state.dtype), state)
        return self.norm(trunk.run_layer(self.layer, self.eh_proj(fused), positions, visible, cache))

    @torch.no_grad()
    def calibrate(self, trunk: Trunk, texts: Iterable[Text], heads: Heads) -> int:
        """Fit eh_proj, in closed form, to the state that the host's last layer reads one position later.

        The module's layer starts as a copy of that last layer, so with a good eh_proj the module starts as the
        trunk's own guess one token further. Texts are read until more of them no longer help, see `RidgeRegression`;
        every eighth token of a document is held out to choose the ridge.

        Returns:
            how many positions were fitted.
        """
        fit = RidgeRegression()
        for text in texts:
            inputs, targets, held_out = self._pairs(trunk, text, heads)
            if not (inputs.isfinite().all() and targets.isfinite().all()):
                raise HostError(
                    "The states of the base are not finite numbers on this text: check its weights and dtype."
                )
            parts = (part.split(FIRST_CHECK) for part in (inputs, targets, held_out))
            if not all(fit.add(*part) for part in zip(*parts, strict=True)):
                break
        if fit.count:
            self.eh_proj.weight.copy_(fit.solution().T)
        return fit.count

    def _pairs(self, trunk: Trunk, text: Text, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        """What eh_proj reads [N, 2D], what the host's last layer reads one position later [N, D], and which of these
        pairs are held out [N]."""
        hidden, into_last = trunk.run(text.ids, text.positions, text.visible, tap="before_last_layer")
        if heads.tap == "before_last_layer":
            hidden = into_last
        elif heads.tap != "post_norm":
            hidden = heads.read(trunk.run(text.ids, text.positions, text.visible, tap=heads.tap)[1])
        next_in_document = (text.documents[:, 1:] == text.documents[:, :-1]) & (text.documents[:, 1:] >= 0)
        fused = self.fuse(trunk.embedding(text.ids).to(hidden.dtype)[:, 1:], hidden[:, :-1])
        held_out = text.positions[:, 1:] % 8 == 7
        return fused[next_in_document], into_last[:, 1:][next_in_document], held_out[next_in_document]


def ahead(ids: Tensor, by: int) -> Tensor:
    """ids [B, T] moved so that place t holds the id of t + by; the last `by` places mean nothing."""
    return ids.roll(-by, dims=1)


class DistinctHeads(Heads):
    """One module a depth, each with its own K/V (DeepSeek-V3)."""

    can_calibrate = True

    def __init__(self, config: MultiTokenConfig, trunk: Trunk) -> None:
        super().__init__(config, trunk)
        self.steps = nn.ModuleList(SequentialModule(trunk, config.dense) for _ in range(self.n - 1))
        self.cache_count = self.n - 1
        # The module of depth k made its newest k-2 entries from drafts; see them again.
        self.lookback = self.n - 2

    @property
    def is_calibrated(self) -> bool:
        return not all(module.is_new for module in self.steps)

    def calibrate(self, trunk: Trunk, texts: Iterable[Text]) -> int:
        first, *others = self.steps
        assert isinstance(first, SequentialModule)
        count = first.calibrate(trunk, texts, self)
        for module in others:  # they are alike so far
            module.load_state_dict(first.state_dict())
        return count

    def forward(self, trunk: Trunk, hidden: Tensor, text: Text) -> list[Tensor]:
        visible = text.visible
        states, state = [], self.read(hidden)
        for k, module in enumerate(self.steps, start=2):
            state = self._run(module, trunk, ahead(text.ids, k - 1), state, text.positions, visible)
            states.append(state)
        return states

    def _grow(
        self, trunk: Trunk, window: Window, caches: list[RaggedCache], rows: Tensor | None, growth: Growth
    ) -> None:
        batch = torch.arange(len(window.last), device=window.last.device)[:, None]
        width, newest = window.positions.shape[1], window.newest(window.positions)
        # ids[:, j] is the token after state j; drafts are put behind the pending token as they come.
        ids = torch.nn.functional.pad(window.following, (0, self.n - 1))
        before, level = [self.read(window.hidden)], None  # the states of each branch [B, W, D]
        for k, (module, cache) in enumerate(zip(self.steps, caches, strict=True), start=2):
            visible, states = cache.place(window.positions, rows), []
            for branch in range(1 if level is None else level.tokens.shape[1]):
                state = before[0]
                if level is not None:  # its entries in the cache make way for those of the next branch
                    ids[batch, window.last[:, None] + torch.arange(1, k - 1, device=ids.device)] = level.paths[
                        :, branch
                    ]
                    state = _of_parent(before, level, branch)
                states.append(module(trunk, ids[:, k - 2 : k - 2 + width], state, window.positions, visible, cache))
            newest_states = torch.stack([window.newest(state) for state in states], dim=1)
            level, before = growth.level(trunk, self.output.at(k), newest_states, k, newest), states


def _of_parent(states: list[Tensor], level: Level, branch: int) -> Tensor:
    """Of the states of all branches of a depth [B, W, D], those that one branch of the next depth follows."""
    if level.parents is None:
        return states[0]
    return torch.stack(states)[level.parents[:, branch], torch.arange(len(level.parents), device=states[0].device)]


class RecurrentHeads(Heads):
    """One module for all depths, with one K/V whose past comes from trunk states (FastMTP).

    In decoding the entries of the current chain, made from the module's own states, are overwritten next round.
    Training uses exactly that mask: step k sees the step-1 entries up to its position, then its own chain.
    """

    cache_count = 1
    recurrent = True
    can_calibrate = True

    def __init__(self, config: MultiTokenConfig, trunk: Trunk) -> None:
        super().__init__(config, trunk)
        self.step: Any = self._new_step(config, trunk)
        self.state_noise = config.state_noise

    def _new_step(self, config: MultiTokenConfig, trunk: Trunk) -> nn.Module:
        return SequentialModule(trunk, config.dense)

    @property
    def is_calibrated(self) -> bool:
        return self.can_calibrate and not self.step.is_new

    def calibrate(self, trunk: Trunk, texts: Iterable[Text]) -> int:
        return self.step.calibrate(trunk, texts, self) if self.can_calibrate else 0

    def forward(self, trunk: Trunk, hidden: Tensor, text: Text) -> list[Tensor]:
        states, past = [self.read(hidden)], None  # the keys and values grow by one block of T entries a step
        for k in range(2, self.n + 1):
            chain = k - 2  # how many steps of its own chain this step can look back on
            visible = self._chain_visible(trunk, text, chain)
            inputs = ahead(text.ids, k - 1), self._fed(states), text.positions + chain, visible
            state, past = self._run(self._train_step, trunk, *inputs, past)
            states.append(state)
        return [self._end(state) for state in states[1:]]

    def _end(self, state: Tensor) -> Tensor:
        """A recycled state -> what the output reads."""
        return state

    def _train_step(
        self,
        trunk: Trunk,
        ids: Tensor,
        state: Tensor,
        positions: Tensor,
        visible: VisibleFn,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        cache = ChainCache(past)
        state = self.step(trunk, ids, state, positions, visible, cache)
        return state, cache.pair

    def _fed(self, states: list[Tensor]) -> Tensor:
        """The states [B, T, D] that the next step reads, given the trunk's and those of the steps so far.

        With `state_noise`, some of them come from a shorter chain for the same place: the state that j steps made of
        the trunk's at t stands at t + j, like the one that j - 1 steps made of the trunk's at t + 1, and so on.
        """
        newest, steps = states[-1], len(states) - 1
        if not (self.training and self.state_noise and steps):
            return newest
        same_place = torch.stack([state.roll(j - steps, dims=1) for j, state in enumerate(states[:-1])])
        chosen = torch.randint(steps, newest.shape[:2], device=newest.device)
        other = same_place.gather(0, chosen[None, :, :, None].expand(1, *newest.shape))[0]
        noisy = torch.rand(newest.shape[:2], device=newest.device) < self.state_noise
        return torch.where(noisy[..., None], other, newest)

    @staticmethod
    def _chain_visible(trunk: Trunk, text: Text, chain: int) -> VisibleFn:
        """Which keys a step sees: the step-1 entries up to the anchor [B, 1, T, T]; the anchor's own chain goes unsaid.

        Eager attention, which knows nothing of chains, is told of it: [B, 1, T, (chain + 1) · T].
        """

        def visible(window: int | None) -> Tensor:
            past = text.visible(None if window is None else window - chain)
            return with_own_keys(past, chain) if trunk.is_eager else past

        return visible

    def remember(self, trunk: Trunk, window: Window, caches: list[RaggedCache], rows: Tensor | None) -> None:
        (cache,) = caches
        with cache.writing_only():
            self._first(trunk, window, cache, rows)

    def _first(self, trunk: Trunk, window: Window, cache: RaggedCache, rows: Tensor | None) -> Tensor:
        """The first step over all states of the window [B, W, D]; its entries stay, those of later steps do not."""
        visible = cache.place(window.positions, rows)
        return self.step(trunk, window.following, self.read(window.hidden), window.positions, visible, cache)

    def _grow(
        self, trunk: Trunk, window: Window, caches: list[RaggedCache], rows: Tensor | None, growth: Growth
    ) -> None:
        (cache,) = caches
        states = self._first(trunk, window, cache, rows)
        states, newest = window.newest(states)[:, None], window.newest(window.positions)
        level = growth.level(trunk, self.output.at(2), self._end(states), 2, newest)
        for k in range(3, self._last(growth) + 1):
            position = torch.where(newest < 0, newest, newest + k - 2)[:, None].expand(level.tokens.shape)
            visible = cache.place(position, rows, level.branches)
            states = self.step(trunk, level.tokens, level.following(states), position, visible, cache)
            level = growth.level(trunk, self.output.at(k), self._end(states), k, newest)
