"""Trees of drafts: several tokens for a place, verified in one forward (Medusa, arXiv:2401.10774; EAGLE-2, 2406.16858).

Node 0 is the pending token. A tree is static (each node is the r-th best token after its parent) or grown by
confidence (the most probable paths). With chance, "best" is meant after the noise by which the trunk draws too, which
depends on the position alone; the path goes on where the trunk's own choice is a child. So any tree gives the text of
plain decoding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nextn.decoding.sampling import gumbel
from nextn.heads.base import Level
from nextn.output import Output
from nextn.trunk import Branches, Trunk


class TreeError(ValueError):
    """A tree that cannot be; the message says why."""


@dataclass(frozen=True)
class Tree:
    """The shape of a tree of drafts.

    paths: for each node but the pending token its ranks from there, best = 0: (0,), (1,), (0, 0), …; None lets the
        heads choose by confidence.
    nodes: T, the pending token included.
    beam: of a tree that grows by confidence, how many nodes of each depth have children at all.

    Raises:
        TreeError: for a node without its parent.
    """

    paths: tuple[tuple[int, ...], ...] | None = None
    nodes: int = 0
    beam: int = 4

    def __post_init__(self) -> None:
        if self.paths is None:
            if self.nodes < 2 or self.beam < 1:
                raise TreeError(
                    f"A tree of {self.nodes} nodes, {self.beam} wide, has no drafts: give at least 2 and 1."
                )
            return
        ordered = tuple(sorted({tuple(path) for path in self.paths}, key=lambda path: (len(path), path)))
        for path in ordered:
            if not path or min(path) < 0 or (len(path) > 1 and path[:-1] not in ordered):
                raise TreeError(f"The node {list(path)} of a tree has no parent; list it too, ranks from 0.")
        if not ordered:
            raise TreeError("A tree needs at least one node beside the pending token.")
        object.__setattr__(self, "paths", ordered)
        object.__setattr__(self, "nodes", len(ordered) + 1)

    @property
    def depth(self) -> int | None:
        """How many drafts its longest path has; None where heads choose."""
        return None if self.paths is None else len(self.paths[-1])

    def expected(self, shares: Sequence[Sequence[float]]) -> float:
        """Tokens a step, the trunk's own included, by the `shares` that `tuned` takes."""
        return 1 + sum(_worth(path, shares) for path in self.paths or ())

    @classmethod
    def chain(cls, drafts: int) -> Tree:
        """One draft a depth."""
        return cls(tuple((0,) * length for length in range(1, drafts + 1)))

    @classmethod
    def tuned(cls, shares: Sequence[Sequence[float]], nodes: int) -> Tree:
        """The static tree of T nodes that accepts most, by measured acceptance.

        Args:
            shares: for each draft 1 … n-1 and rank 0, 1, …, how often that rank was the trunk's choice, given that the
                path so far was right.
        """
        found: list[tuple[int, ...]] = []
        border: set[tuple[int, ...]] = {(rank,) for rank in range(len(shares[0]))} if shares else set()
        while len(found) < nodes - 1 and border:
            best = max(border, key=lambda path: (_worth(path, shares), [-rank for rank in path]))
            border.remove(best)
            found.append(best)
            if len(best) < len(shares):
                border |= {(*best, rank) for rank in range(len(shares[len(best)]))}
        return cls(tuple(found))

    @classmethod
    def read(cls, path: Path) -> Tree:
        """From a JSON file that holds `paths`, or `nodes` and `beam`."""
        try:
            content = json.loads(path.read_text())
            if "paths" in content:
                return cls(tuple(tuple(map(int, each)) for each in content["paths"]))
            return cls(nodes=int(content["nodes"]), beam=int(content.get("beam", 4)))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise TreeError(f"{path} holds no tree ({error}); give JSON with paths, or nodes and beam.") from None


def _worth(path: Sequence[int], shares: Sequence[Sequence[float]]) -> float:
    """How probable it is that the trunk takes this path."""
    worth = 1.0
    for draft, rank in enumerate(path):
        worth *= shares[draft][rank] if draft < len(shares) and rank < len(shares[draft]) else 0.0
    return worth


_SHAPES: dict[tuple[Tree, torch.device], tuple[Tensor, ...]] = {}  # of static trees, which never change


@dataclass
class Chances:
    """The noise of a round of drafts: temperatures [B], 0 without noise, and keys by draft [B, n-1]."""

    temperatures: Tensor
    keys: Tensor

    def scores(self, trunk: Trunk, output: Output, states: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """For states [B, M, D]: logits with the noise of their place, without it, and whose they are, all [B, M, K]."""
        logits, ids = output.scores(trunk, states)
        ids = torch.arange(logits.shape[-1], device=logits.device) if ids is None else ids
        noise = gumbel(self.keys[:, depth - 2, None].expand(states.shape[:2]), ids)
        logits = logits.float()
        return logits + self.temperatures[:, None, None] * noise, logits, ids.expand(logits.shape)


class TreeGrowth:
    """Grows a tree, see `Growth`. Afterwards `drafts`, `parents`, `depths` and `sees` describe it."""

    def __init__(self, tree: Tree, drafts: int, chances: Chances) -> None:
        self.tree, self.chances = tree, chances
        self.levels: int | None = tree.depth or drafts
        self.tokens: list[Tensor] = []  # [B, M] by level
        self.above: list[Tensor] = []  # [B, M]; index of the parent in the level above
        self.confidence: list[Tensor] = []  # [B, M]; log-probability of the path
        self.before: list[Tensor] = []  # [B, M, d]; the tokens of the path
        self.beyond = torch.empty(0)  # [B, M, d]; the paths, for depths that are not asked for
        self.followed: Tensor | None = None  # [B, nodes, nodes], which drafts each draft so far follows

    def level(self, trunk: Trunk, output: Output, states: Tensor, depth: int, newest: Tensor) -> Level:
        if (
            self.levels is not None and depth > self.levels + 1
        ):  # for modules that must see every position, though no draft of theirs is wanted
            self.beyond = torch.cat([self.beyond, self.beyond[..., -1:]], dim=2)
            return Level(self.beyond[:, :1])
        scores, _, ids = self.chances.scores(trunk, output, states, depth)
        tokens, above, confidence = (
            self._confident(scores, ids) if self.tree.paths is None else self._ranked(scores, ids, depth - 1)
        )
        path = tokens[..., None]
        if self.before:
            earlier = self.before[-1].gather(1, above[..., None].expand(-1, -1, depth - 2))
            path = torch.cat([earlier, path], dim=2)
        self.tokens.append(tokens)
        self.above.append(above)
        self.confidence.append(confidence)
        self.before.append(path)
        self.beyond = path
        return Level(path.clamp(min=0), above, self._branches(newest, depth - 1))  # whatever follows no draft is none

    def drafts(self) -> Tensor:
        """All nodes but the pending token [B, T-1]."""
        tokens, _ = self._nodes()
        return tokens

    def shape(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all nodes, the pending token first: parents [B, T], depths [B, T], and who follows whom [B, T, T]."""
        if (
            self.tree.paths is not None
            and (known := _SHAPES.get(key := (self.tree, self.tokens[0].device))) is not None
        ):
            rows = len(self.tokens[0])
            parents, depths, sees = (part.expand(rows, *part.shape[1:]) for part in known)
            return parents, depths, sees
        found = self._shape()
        if self.tree.paths is not None:
            _SHAPES[key] = tuple(part[:1].clone() for part in found)
        return found

    def _shape(self) -> tuple[Tensor, Tensor, Tensor]:
        _, parents = self._nodes()
        rows, count = parents.shape
        sees = torch.zeros(rows, count + 1, count + 1, dtype=torch.bool, device=parents.device)
        depths = torch.zeros(rows, count + 1, dtype=torch.long, device=parents.device)
        every = torch.arange(rows, device=parents.device)
        sees[:, 0, 0] = True
        for node in range(1, count + 1):  # a node comes after its parent
            parent = parents[:, node - 1]
            sees[:, node] = sees[every, parent]
            sees[:, node, node] = True
            depths[:, node] = depths[every, parent] + 1
        return torch.cat([torch.zeros_like(parents[:, :1]), parents], dim=1), depths, sees

    def _ranked(self, scores: Tensor, ids: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """The nodes of one depth of a static tree, from scores [B, M or 1, K] after the nodes of the depth above."""
        assert self.tree.paths is not None
        level = [path for path in self.tree.paths if len(path) == length]
        upper = [path for path in self.tree.paths if len(path) == length - 1] or [()]
        ranks = torch.tensor([path[-1] for path in level], device=scores.device)
        above = torch.tensor([upper.index(path[:-1]) for path in level], device=scores.device)
        order = scores.topk(min(int(ranks.max()) + 1, scores.shape[-1]), dim=-1).indices  # [B, M, R]
        named = ids.gather(2, order).expand(-1, len(upper), -1)[:, above, ranks.clamp(max=order.shape[-1] - 1)]
        # Fewer tokens than ranks: no draft.
        tokens = torch.where(ranks < order.shape[-1], named, -1)
        above = above.expand_as(tokens)
        return tokens, above, torch.zeros_like(tokens, dtype=torch.float32)

    def _confident(self, scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The `beam` most probable nodes of one depth, among the `beam` best children of each above."""
        width = min(self.tree.beam, scores.shape[-1])
        spread = torch.where(self.chances.temperatures > 0, self.chances.temperatures, 1)[:, None, None]
        probable, order = (scores / spread).log_softmax(dim=-1).topk(width, dim=-1)  # [B, M, width]
        so_far = self.confidence[-1][..., None] if self.confidence else 0
        of_paths = probable + so_far
        confidence, chosen = of_paths.flatten(1).topk(width, dim=1)
        tokens = ids.gather(2, order).expand_as(of_paths).flatten(1).gather(1, chosen)
        return tokens, chosen // width, confidence

    def _branches(self, newest: Tensor, length: int) -> Branches:
        """What the nodes of the newest depth see of all drafts so far, in caches of the heads."""
        rows, count = self.tokens[-1].shape
        own = torch.eye(count, dtype=torch.bool, device=newest.device).expand(rows, -1, -1)
        if self.followed is None:
            self.followed = own
            sees = own
        else:
            above = self.followed[:, -self.tokens[-2].shape[1] :]  # what the depth above sees [B, M', nodes]
            inherited = above.gather(1, self.above[-1][..., None].expand(-1, -1, above.shape[2]))
            sees = torch.cat([inherited, own], dim=2)
            self.followed = torch.cat([torch.nn.functional.pad(self.followed, (0, count)), sees], dim=1)
        depths = [place for place, tokens in enumerate(self.tokens, start=1) for _ in range(tokens.shape[1])]
        positions = newest[:, None] + torch.tensor(depths, device=newest.device)
        return Branches(newest + 1, positions, sees, newest=count)

    def _nodes(self) -> tuple[Tensor, Tensor]:
        """Tokens and parents [B, T-1] of the drafts that are verified; parents by node, the pending token being 0."""
        starts = [0]
        for tokens in self.tokens:
            starts.append(starts[-1] + tokens.shape[1])
        tokens = torch.cat(self.tokens, dim=1)
        parents = torch.cat(
            [above + 1 + start if level else torch.zeros_like(above)
             for level, (above, start) in enumerate(zip(self.above, [0, *starts], strict=False))],
            dim=1,
        )  # fmt: skip
        if self.tree.paths is not None:
            return tokens, parents
        # The T-1 most probable of all: a parent is never less probable than its child, and comes first among equals.
        confidence = torch.cat(self.confidence, dim=1)
        kept = confidence.sort(dim=1, descending=True, stable=True).indices[:, : self.tree.nodes - 1].sort(dim=1).values
        place_of = torch.zeros(len(kept), tokens.shape[1] + 1, dtype=torch.long, device=kept.device)
        place_of.scatter_(1, kept + 1, torch.arange(1, kept.shape[1] + 1, device=kept.device).expand_as(kept))
        return tokens.gather(1, kept), place_of.gather(1, parents.gather(1, kept))


def rank_shares(hits: Iterable[Sequence[int | None]], drafts: int, ranks: int) -> list[list[float]]:
    """The `shares` of `Tree.tuned` from what was seen: for each state the ranks of the trunk's choices, draft by draft.

    Args:
        hits: rank of the trunk's choice among the drafts of number 1, 2, …, up to the first that is not the best one;
            None where it is beyond the ranks looked at.
    """
    counts = [[0] * ranks for _ in range(drafts)]
    tries = [0] * drafts
    for path in hits:
        for draft, rank in enumerate(path[:drafts]):
            tries[draft] += 1
            if rank is not None and rank < ranks:
                counts[draft][rank] += 1
    return [[count / max(1, tried) for count in row] for row, tried in zip(counts, tries, strict=True)]
