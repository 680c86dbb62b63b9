"""What the trunk says to the drafts, and which of them stand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextn.config import Tap
from nextn.decoding.sampling import gumbel
from nextn.output import best
from nextn.trunk import Branches, RaggedCache, Trunk


def accept_greedy(drafts: Tensor, targets: Tensor) -> Tensor:
    """How many drafts of each row stand: the longest prefix that equals the trunk's own choices.

    Blockwise parallel decoding (Stern et al. 2018, arXiv:1811.03115). The trunk's choices may be drawn by chance, as
    long as the noise depends on the position alone ("coupled" sampling).

    Args:
        drafts: token ids [B, n-1]; -1 for no draft.
        targets: the trunk's choice after the pending token and after each draft [B, n].

    Returns:
        accepted counts [B], each 0 … n-1. Row b then emits drafts[b, :a] and targets[b, a] (the bonus token).
    """
    stand = (drafts == targets[:, : drafts.shape[1]]) & (drafts >= 0)
    return stand.long().cumprod(dim=1).sum(dim=1)


def accept_by_rejection(
    p: Tensor, q: Tensor, drafts: Tensor, uniform: Tensor, block: bool = False
) -> tuple[Tensor, Tensor]:
    """How many drafts stand, so that what is emitted is distributed as p; and the law of the token after them.

    Speculative sampling (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1), or block verification (Sun et al. 2024,
    arXiv:2403.10444, algorithm 2), which decides over all drafts together and never accepts fewer on average.

    Args:
        p: the trunk's probabilities after the pending token and after each draft [B, n, V].
        q: what the drafts were drawn from [B, n-1, V]; one token's share is 1 where it was not drawn but chosen.
        drafts: token ids [B, n-1]; -1 for no draft, and none after it.
        uniform: random numbers in (0, 1) [B, n-1].
        block: block verification.

    Returns:
        accepted counts [B], and probabilities [B, V], not normalised, of the token that follows.
    """
    there = drafts >= 0
    q = torch.cat([q * there[..., None], torch.zeros_like(p[:, :1])], dim=1)  # what follows the last draft is p's own
    named = drafts.clamp(min=0)[..., None]
    ratio = torch.where(there, (p[:, :-1].gather(2, named) / q[:, :-1].gather(2, named))[..., 0], 0)
    ratio = ratio.nan_to_num(nan=0.0)  # where the trunk's scores are not numbers nothing stands
    carried = torch.ones_like(p[:, :, 0])  # [B, n]; how much of p the drafts so far stand for
    if block:
        for place in range(drafts.shape[1]):
            carried[:, place + 1] = (carried[:, place] * ratio[:, place]).clamp(max=1)
        missing = (carried[..., None] * p - q).clamp(min=0)
        mass = missing.sum(dim=-1)
        share = torch.where(carried < 1, mass / (mass + 1 - carried), 1)[:, 1:]
        numbers = torch.arange(1, drafts.shape[1] + 1, device=drafts.device)
        accepted = torch.where((uniform <= share) & there, numbers, 0).amax(dim=1)
    else:
        accepted = ((uniform < ratio) & there).long().cumprod(dim=1).sum(dim=1)
        missing = (p - q).clamp(min=0)
    rows = torch.arange(len(p), device=p.device)
    rest = missing[rows, accepted]
    # Where p equals q nothing is missing, and nothing is rejected either but by rounding.
    return accepted, torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p[rows, accepted])


def follow(tokens: Tensor, parents: Tensor, depths: Tensor, targets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The path through a tree of drafts that the trunk's own choices take.

    Args:
        tokens: of all nodes [B, T]; node 0 is the pending token, -1 stands for no draft.
        parents, depths: of all nodes [B, T]; a node comes after its parent.
        targets: the trunk's choice after each node [B, T].
        longest: the largest depth that there can be.

    Returns:
        how many drafts stand [B], and the nodes of the path by depth [B, longest + 1], node 0 where there is none.
    """
    fits = (tokens == targets.gather(1, parents)) & (tokens >= 0) & (depths > 0)
    stands = depths == 0
    for _ in range(longest):
        stands = stands | (fits & stands.gather(1, parents))
    on_path = stands[:, None] & (depths[:, None] == torch.arange(longest + 1, device=depths.device)[:, None])
    path = on_path.long().argmax(dim=-1)  # [B, longest + 1]
    return on_path.any(dim=-1).sum(dim=1) - 1, path


def chosen(scores: Tensor) -> Tensor:
    """The best tokens of scores [..., V], the first one where several are equal; -1 where a score is not a number."""
    token = best(scores)
    top = scores.gather(-1, token[..., None])[..., 0]
    return torch.where(top.isnan() | (top == -torch.inf), -1, token)


class Draw(nn.Module):
    """The token [] that the noise of a key [] draws from scores [V] at a temperature [].

    Some fifty operations on a vocabulary: worth compiling into one loop.
    """

    def forward(self, scores: Tensor, temperature: Tensor, key: Tensor) -> Tensor:
        noise = gumbel(key, torch.arange(scores.shape[-1], device=scores.device))
        return chosen(scores.float() / temperature + noise)


class Score(nn.Module):
    """One trunk forward over the pending token and the drafts of every row.

    A function of tensors alone, so that it can be compiled: the cache is handed in, and written in place.

    Args:
        tap: the trunk state that the drafter reads.
    """

    def __init__(self, trunk: Trunk, tap: Tap) -> None:
        super().__init__()
        self.model = trunk.model  # whoever exports this module must find the weights in it
        self.trunk, self.tap = trunk, tap

    def forward(
        self,
        pending: Tensor,
        drafts: Tensor,
        lengths: Tensor,
        ends: Tensor,
        seen: Tensor,
        buffers: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        """Read [pending ; drafts].

        Args:
            pending: the newest token of each row, not yet read [B].
            drafts: [B, W-1]; -1 stands for no draft, and never for a token.
            lengths: how many tokens of each row the cache holds [B].
            ends: the first position of each row that is not needed any more [B].
            seen: the positions that attention reads, 0 … S-1 [S].
            buffers: keys and values by layer, as `RaggedCache.buffers` gives them.

        Returns:
            the trunk's logits [B, W, V], the tapped states [B, W, D], and their positions [B, W], -1 where there is no
            token.
        """
        tokens = torch.cat([pending[:, None], drafts], dim=1)
        positions = lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        positions = torch.where((positions < ends[:, None]) & (tokens >= 0), positions, -1)
        cache = RaggedCache.over(buffers, seen)
        visible = cache.place(positions)
        hidden, tapped = self.trunk.run(tokens.clamp(min=0), positions, visible, cache, self.tap)
        return self.trunk.logits(hidden), tapped, positions


class Verify(Score):
    """`Score`, and which drafts the trunk would have chosen itself, greedily."""

    def forward(
        self,
        pending: Tensor,
        drafts: Tensor,
        lengths: Tensor,
        ends: Tensor,
        seen: Tensor,
        buffers: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        """Read [pending ; drafts] and keep what the trunk agrees with.

        Returns:
            the trunk's choices [B, W] (-1 where its logits are not numbers), how many drafts stand [B], the new pending
            token [B], the new lengths [B], the tapped states [B, W, D], and their positions [B, W], -1 where a state is
            not of the text.
        """
        return judged(drafts, lengths, *super().forward(pending, drafts, lengths, ends, seen, buffers))


def judged(drafts: Tensor, lengths: Tensor, logits: Tensor, tapped: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """What `Verify` makes of what `Score` gives."""
    targets = chosen(logits)
    accepted = accept_greedy(drafts, targets)
    return targets, accepted, *standing(targets, accepted, lengths), tapped, only_standing(positions, accepted)


class ScoreTree(Score):
    """One trunk forward over the pending token and a tree of drafts behind it, of every row."""

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        depths: Tensor,
        sees: Tensor,
        lengths: Tensor,
        ends: Tensor,
        seen: Tensor,
        buffers: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        """Read a tree: node i of a row is written to slot length + i, wherever it stands in the text.

        Args:
            tokens: the nodes [B, T], the pending token first; -1 for no draft.
            depths: how many tokens after the pending one each of them stands [B, T].
            sees: which nodes each of them follows, itself included, bool [B, T, T].

        Returns:
            as `Score`, by node.
        """
        positions = lengths[:, None] + depths
        positions = torch.where((positions < ends[:, None]) & (tokens >= 0), positions, -1)
        cache = RaggedCache.over(buffers, seen)
        visible = cache.place(positions, branches=Branches(lengths, positions, sees))
        hidden, tapped = self.trunk.run(tokens.clamp(min=0), positions, visible, cache, self.tap)
        return self.trunk.logits(hidden), tapped, positions


def standing(run: Tensor, accepted: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The new pending tokens [B] and lengths [B] after runs [B, W] of which accepted + 1 tokens each are emitted.

    Rejected drafts lie beyond the new length, and are overwritten.
    """
    return run.gather(1, accepted[:, None])[:, 0], lengths + accepted + 1


def only_standing(positions: Tensor, accepted: Tensor) -> Tensor:
    """Positions [B, W], -1 where a state is not of the text: after the accepted drafts."""
    places = torch.arange(positions.shape[1], device=positions.device)
    return torch.where(places <= accepted[:, None], positions, -1)
