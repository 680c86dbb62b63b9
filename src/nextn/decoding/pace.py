"""How far to draft: step by step what gives most tokens a second, by what steps take here and drafts bring now.

A step that reads d drafts a row gives E(d) = 1 + a_1 + a_1·a_2 + … tokens, a_i being the conditional acceptance of
draft i, and takes as long as such steps took of late, or when they were measured at first: the verification of
B·(1 + d) tokens and the drafting. d = 0 is a plain step. (Goodput, as in SmartSpec, Liu et al. 2024, arXiv:2406.14066,
with times that are measured.)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PRIOR, PRIOR_WEIGHT = 0.7, 2.0  # what is thought of a draft's acceptance before any was seen, and in how many tries
TEXT_WEIGHT = 6.0  # in how many tries a new text trusts what other texts had
MEMORY, LONG_MEMORY = 60, 2000  # steps after which an observation weighs 1/e, for a text and for all
RATE = 0.25  # weight of the newest step in the running mean of what steps take
MARGIN = 1.08  # how much faster drafting must be for a plain step to be left
FIRST_LOOK, LONGEST_WAIT = 256, 4096  # plain steps until drafts are tried again; after each time twice as many
STEADY = 16  # steps with drafts after which they are no mere try any more


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
class Tally:
    """How often each draft of a text was tried, all earlier ones standing, and how often it stood."""

    tries: list[float]
    hits: list[float]

    @property
    def acceptance(self) -> list[float]:
        """Conditional, by draft."""
        return [hits / tries for hits, tries in zip(self.hits, self.tries, strict=True)]

    def tokens(self, drafts: int) -> float:
        """E(d)."""
        shares = self.acceptance
        return 1 + sum(math.prod(shares[: place + 1]) for place in range(drafts))

    def note(self, drafted: int, accepted: int, keep: float) -> None:
        """A step with so many drafts; what was before weighs `keep`."""
        for draft in range(drafted):
            self.tries[draft] = keep * self.tries[draft] + (accepted >= draft)
            self.hits[draft] = keep * self.hits[draft] + (accepted > draft)


@dataclass
class Pace:
    """Chooses, and remembers what drafts bring and how long steps take.

    A text begins with what drafts brought to other texts, and then counts its own.

    drafts: n - 1.
    profile: None drafts all there are at every step (or the tree, where there is one).
    tree: tokens a step that the tree is expected to give; None without one.
    """

    drafts: int
    profile: Profile | None = None
    tree: float | None = None

    def __post_init__(self) -> None:
        self._plain_steps, self._patience, self._streak = 0, FIRST_LOOK, 0
        self._seconds: dict[tuple[str, int], float] = {}  # running mean of real steps, by kind and choice
        self._start_anew()

    def _start_anew(self) -> None:
        """Forget what drafts brought."""
        self.overall = Tally([PRIOR_WEIGHT] * self.drafts, [PRIOR * PRIOR_WEIGHT] * self.drafts)
        self._tree_weight, self._tree_tokens = PRIOR_WEIGHT, PRIOR_WEIGHT * (self.tree or 0)

    def begin_text(self) -> Tally:
        """The tally of a new text."""
        weight = [min(tries, TEXT_WEIGHT) for tries in self.overall.tries]
        return Tally(weight, [share * each for share, each in zip(self.overall.acceptance, weight, strict=True)])

    def choose(self, texts: Sequence[Tally], kind: str = "greedy") -> int:
        """How many drafts the next step reads; 0 for a plain step, TREE for the tree.

        Args:
            texts: the tallies of the rows at work.
            kind: of step, where some take longer than others; of each kind the first step is plain, to know them.
        """
        if self.profile is not None and kind != "greedy" and (kind, 0) not in self._seconds:
            return 0
        if choice := self._fastest(texts, kind):
            self._plain_steps, self._streak = 0, self._streak + 1
            if self._streak == STEADY:
                self._patience = FIRST_LOOK
            return choice
        self._plain_steps, self._streak = self._plain_steps + 1, 0
        if self._plain_steps < self._patience:
            return 0
        # What drafts brought was long ago: start from what is thought of any drafts, and see.
        self._plain_steps, self._patience = 0, min(2 * self._patience, LONGEST_WAIT)
        self._start_anew()
        for text in texts:
            fresh = self.begin_text()
            text.tries, text.hits = fresh.tries, fresh.hits
        for known in [known for known in self._seconds if known[1]]:
            del self._seconds[known]
        return self._fastest(texts, kind)

    def note(
        self,
        choice: int,
        accepted: Sequence[tuple[Tally, int]],
        seconds: float | None = None,
        kind: str = "greedy",
    ) -> None:
        """What came of a step.

        Args:
            accepted: how many drafts of each text stood.
            seconds: what it took, drafting included; None where it did what steps do not do.
        """
        if seconds is not None and self.profile is not None:
            usual = self._seconds.get((kind, choice), self._expected(kind, choice))
            self._seconds[kind, choice] = usual + RATE * (seconds - usual)
        if choice == TREE and accepted:
            keep = math.exp(-1 / MEMORY)
            self._tree_weight = keep * self._tree_weight + len(accepted)
            self._tree_tokens = keep * self._tree_tokens + len(accepted) + sum(count for _, count in accepted)
            return
        for text, count in accepted:
            text.note(choice, count, math.exp(-1 / MEMORY))
            self.overall.note(choice, count, math.exp(-1 / LONG_MEMORY))

    def _expected(self, kind: str, choice: int) -> float:
        """Seconds of a step by the profile, and by what a plain one of its kind takes beside the profile's."""
        assert self.profile is not None
        if choice == TREE:
            measured = self.profile.tree or math.inf
        else:
            measured = self.profile.verify[choice] + (self.profile.draft if choice else 0)
        plain = self.profile.verify[0]
        return measured * max(self._seconds.get((kind, 0), plain) / plain, 0.1)

    def _fastest(self, texts: Sequence[Tally], kind: str) -> int:
        if self.profile is None:
            return self.drafts if self.tree is None else TREE

        def rate(choice: int) -> float:
            if choice == TREE:
                tokens = self._tree_tokens / self._tree_weight
            else:
                tokens = sum(text.tokens(choice) for text in texts) / max(1, len(texts))
            return tokens / self._seconds.get((kind, choice), self._expected(kind, choice))

        choices = [*self.profile.verify, *([TREE] if self.profile.tree is not None and self.tree is not None else [])]
        rates = {choice: rate(choice) for choice in choices}
        best = max(rates, key=lambda choice: rates[choice])
        return best if rates[best] > MARGIN * rates.get(0, 0) else 0
