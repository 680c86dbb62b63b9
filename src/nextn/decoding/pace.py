"""How far to draft: step by step what gives most tokens a second, by what steps take here and drafts bring now.

A step that reads d drafts a row gives E(d) = 1 + a_1 + a_1·a_2 + … tokens, a_i being the conditional acceptance of
draft i, and takes as long as it took when it was measured: the verification of B·(1 + d) tokens and the drafting. d = 0
is a plain step. (Goodput, as in SmartSpec, Liu et al. 2024, arXiv:2406.14066, with times that are measured.)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PRIOR, PRIOR_WEIGHT = 0.7, 4.0  # what is thought of a draft's acceptance before any was seen, and in how many tries
MEMORY = 60  # steps after which an observation weighs 1/e
MARGIN = 1.02  # how much faster drafting must be for a plain step to be left
FIRST_LOOK = 64  # plain steps after which drafts are tried again; each time in vain, twice as many


@dataclass
class Profile:
    """What steps take on this machine, in seconds.

    verify: a step by how many drafts a row it reads; those that were measured.
    draft: one round of drafts.
    tree: a step that reads a tree, and its round of drafts; None without one.
    """

    verify: dict[int, float]
    draft: float
    tree: float | None = None

    @classmethod
    def read(cls, path: Path) -> Profile | None:
        """A profile that was kept, None where there is none."""
        try:
            kept = json.loads(path.read_text())
            return cls({int(d): float(s) for d, s in kept["verify"].items()}, float(kept["draft"]), kept["tree"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, path: Path) -> None:
        """Keep it for the next process, where the directory can be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            partial.write_text(json.dumps(vars(self)))
            partial.replace(path)
        except OSError:
            return


TREE = -1  # in place of a number of drafts


@dataclass
class Pace:
    """Chooses, and remembers what drafts bring.

    drafts: n - 1.
    profile: None drafts all there are at every step (or the tree, where there is one).
    tree: tokens a step that the tree is expected to give; None without one.
    """

    drafts: int
    profile: Profile | None = None
    tree: float | None = None

    def __post_init__(self) -> None:
        self._tries = [PRIOR_WEIGHT] * self.drafts
        self._hits = [PRIOR * PRIOR_WEIGHT] * self.drafts
        self._tree_weight, self._tree_tokens = PRIOR_WEIGHT, PRIOR_WEIGHT * (self.tree or 0)
        self._plain_steps, self._patience, self._streak = 0, FIRST_LOOK, 0

    def choose(self) -> int:
        """How many drafts the next step reads; 0 for a plain step, TREE for the tree."""
        if choice := self._fastest():
            self._plain_steps, self._streak = 0, self._streak + 1
            if self._streak == 8:
                self._patience = FIRST_LOOK
            return choice
        self._plain_steps, self._streak = self._plain_steps + 1, 0
        if self._plain_steps >= self._patience and (hopeful := self._fastest(hoped=True)):
            self._plain_steps, self._patience = 0, 2 * self._patience
            return hopeful
        return 0

    def note(self, choice: int, accepted: Sequence[int]) -> None:
        """What came of a step: how many drafts of each row stood."""
        if choice == 0 or not accepted:
            return
        keep = math.exp(-1 / MEMORY)
        if choice == TREE:
            self._tree_weight = keep * self._tree_weight + len(accepted)
            self._tree_tokens = keep * self._tree_tokens + len(accepted) + sum(accepted)
            return
        for draft in range(choice):
            tried = sum(count >= draft for count in accepted)
            self._tries[draft] = keep * self._tries[draft] + tried
            self._hits[draft] = keep * self._hits[draft] + sum(count > draft for count in accepted)

    @property
    def acceptance(self) -> list[float]:
        """The running conditional acceptance by draft."""
        return [hits / tries for hits, tries in zip(self._hits, self._tries, strict=True)]

    def tokens(self, drafts: int, hoped: bool = False) -> float:
        """E(d).

        Args:
            hoped: as drafts were thought to be before any was seen, where that is more.
        """
        shares = [max(share, PRIOR) if hoped else share for share in self.acceptance]
        return 1 + sum(math.prod(shares[: place + 1]) for place in range(drafts))

    def _fastest(self, hoped: bool = False) -> int:
        if self.profile is None:
            return self.drafts if self.tree is None else TREE
        rates = {
            drafts: self.tokens(drafts, hoped) / (seconds + (self.profile.draft if drafts else 0))
            for drafts, seconds in self.profile.verify.items()
        }
        if self.profile.tree is not None and self.tree is not None:
            expected = self._tree_tokens / self._tree_weight
            rates[TREE] = (max(expected, self.tree) if hoped else expected) / self.profile.tree
        best = max(rates, key=lambda drafts: rates[drafts])
        return best if rates[best] > MARGIN * rates.get(0, 0) else 0
