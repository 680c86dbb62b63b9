"""How far to draft: step by step what brings the texts to their ends soonest, by what steps take here and drafts bring.

A step that reads d drafts a row gives a text E(d) = 1 + a_1 + a_1·a_2 + … tokens, a_i being the conditional acceptance
of draft i, and takes as long as such steps took of late, or when they were measured at first: the verification of
B·(1 + d) tokens and the drafting. d = 0 is a plain step. A text with r tokens to go needs r / E(d) such steps, and
where the heads have not seen all of it yet, what that takes. While prompts wait for its slot, what counts is the sum
over the texts; when none does, the largest: the others' slots are of no use then. How many steps a text needs is known
to some extent only, and the largest of many such numbers is larger than any of their means. (Goodput, as in SmartSpec,
Liu et al. 2024, arXiv:2406.14066, with times that are measured.)
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from nextn.lock import LockedError
from nextn.store import Store

PRIOR, PRIOR_WEIGHT = 0.7, 4.0  # what is thought of a draft's acceptance before any was seen, and in how many tries
# How many tries of its own a text needs to count as much as what the others saw. Shares of the first draft differ by
# some 0.15 between texts, as if each had tried ten times; one miss after catching up must not end the drafting.
SHARED_WEIGHT = 8.0
# What is not known of a text's share, in tries: between texts of one kind the shares of the first draft differ by 0.05
# (in benchmarks/results/drafts.json), as if each had tried 80 times, between kinds by 0.15, as if ten.
ALIKE = 32.0
MEMORY, SHARED_MEMORY = 60, 150  # tries after which one weighs 1/e, for a text and for all: texts come in kinds
LEFT = 0.25  # how much of what others saw counts once a text was left to plain steps
OLD = 0.5  # how much counts of what was seen before so many plain steps that drafts should be tried again
RECENT = 8  # steps, whose median says how long steps take now: machines are now faster, now slower
# What a draft takes over plain steps is told by steps one after the other: a plain one after drafts, or so many with
# drafts after plain ones. The median of the last of these, and of what was measured at first, counts.
AFTER_PLAIN, COMPARISONS = 4, 5
# How much faster drafting must be for plain steps to be left, and how fast it must stay: one changes for something.
MARGIN, STAY = 1.05, 0.98
RECHECK = 32  # steps with drafts, one after the other, until a plain one is timed again
# Plain steps until drafts are tried again, after each time twice as many; multiples of CHOOSE_EVERY.
FIRST_LOOK, LONGEST_WAIT = 128, 4096
COMMITTED = 8  # tries, over all texts, once the heads have caught up: that is paid for, and a few misses say little
CHOOSE_EVERY = 16  # plain steps of the same texts: what they were chosen for stays true, and choosing takes time
STEADY = 48  # steps with drafts after which they are no mere try any more


@dataclass
class Profile:
    """What steps take on this machine, in seconds.

    step: one by how many drafts a row it makes and reads; those that were measured.
    tree: one with a tree; None without one.
    drawn: a plain one whose tokens are drawn; None where that is not known.
    """

    step: dict[int, float]
    tree: float | None = None
    drawn: float | None = None

    @classmethod
    def read(cls, store: Store, key: str) -> Profile | None:
        """The profile that is stored for a key; None where there is none."""
        try:
            kept = json.loads(store.read(key) or b"")
            step = {int(drafts): float(seconds) for drafts, seconds in kept["step"].items()}
            found = cls(step, kept["tree"], kept["drawn"])
            times = [*step.values(), *(seconds for seconds in (found.tree, found.drawn) if seconds is not None)]
            return found if all(0 < seconds < math.inf for seconds in times) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, store: Store, key: str) -> None:
        """Store it for the next process, where the directory can be written."""
        with suppress(OSError, LockedError):
            store.put(key, json.dumps(vars(self)).encode())


TREE = -1  # in place of a number of drafts


def _share(hits: float, tries: float, otherwise: float, weight: float) -> float:
    """Of the tries those that hit, and what is thought otherwise as if seen in so many more."""
    return (hits + weight * otherwise) / (tries + weight)


def largest(numbers: Iterable[tuple[float, float]]) -> float:
    """The largest of independent normal variables, on the average.

    Two at a time, the larger of which is taken as normal again (Clark 1961, doi:10.1287/opre.9.2.145).

    Args:
        numbers: the mean and the variance of each.
    """
    mean, variance = -math.inf, 0.0
    for other, its_variance in numbers:
        apart = math.sqrt(variance + its_variance)
        if mean == -math.inf or apart == 0:
            mean, variance = max((mean, variance), (other, its_variance))
            continue
        by = (mean - other) / apart
        above, density = 0.5 * (1 + math.erf(by / math.sqrt(2))), math.exp(-by * by / 2) / math.sqrt(2 * math.pi)
        square = (mean**2 + variance) * above + (other**2 + its_variance) * (1 - above)
        square += (mean + other) * apart * density
        mean = mean * above + other * (1 - above) + apart * density
        variance = max(0.0, square - mean**2)
    return mean


@dataclass(eq=False)
class Tally:
    """How often each draft of a text was tried, all earlier ones standing, and how often it stood."""

    tries: list[float]
    hits: list[float]

    @classmethod
    def empty(cls, drafts: int) -> Tally:
        return cls([0.0] * drafts, [0.0] * drafts)

    def acceptance(self, otherwise: Sequence[float], weight: float) -> list[float]:
        """Conditional, by draft: what it saw, and what is thought `otherwise` as if seen in so many tries."""
        return [
            _share(hits, tries, share, weight)
            for tries, hits, share in zip(self.tries, self.hits, otherwise, strict=True)
        ]

    def forget(self, after: int = 0, keep: float = 0.0) -> None:
        """What the drafts after some were good for may change while they are not tried."""
        self.tries[after:] = [keep * tries for tries in self.tries[after:]]
        self.hits[after:] = [keep * hits for hits in self.hits[after:]]

    def add(self, other: Tally, weight: float) -> None:
        """What another one saw, too."""
        self.tries = [own + weight * tries for own, tries in zip(self.tries, other.tries, strict=True)]
        self.hits = [own + weight * hits for own, hits in zip(self.hits, other.hits, strict=True)]

    def note(self, drafted: int, accepted: int, memory: float) -> None:
        """A step with so many drafts; after `memory` more tries one weighs 1/e."""
        for draft in range(min(drafted, accepted + 1)):
            keep = math.exp(-1 / memory)
            self.tries[draft] = keep * self.tries[draft] + 1
            self.hits[draft] = keep * self.hits[draft] + (accepted > draft)


@dataclass
class Pace:
    """Chooses, and remembers what drafts bring and how long steps take.

    drafts: n - 1.
    profile: None drafts all there are at every step (or the tree, where there is one).
    tree: tokens a step that the tree is expected to give; None without one.
    """

    drafts: int
    profile: Profile | None = None
    tree: float | None = None

    def __post_init__(self) -> None:
        self._plain_steps, self._patience, self._streak, self._committed = 0, FIRST_LOOK, 0, 0
        self._kind = self._noted = "greedy"  # of the step that is chosen, and of the last one that was made
        # What all texts saw, by kind of step: drafts stand less often where tokens are drawn.
        self._seen: dict[str, Tally] = defaultdict(lambda: Tally.empty(self.drafts))
        self._tree_tokens, self._tree_steps = 0.0, 0.0
        self._left_plain = False  # whether the last choice was to leave texts to plain steps
        # By kind of step: the last ones with their seconds, and by drafts what they took over plain ones.
        self._recent: dict[str, deque[tuple[int, float]]] = {}
        self._over_plain: dict[tuple[str, int], deque[float]] = {}
        # Seconds that the heads needed of late to see a text; their median counts, and until three are known, nothing.
        self._catching_up = deque([0.0] * 5, maxlen=5)

    @property
    def _shared(self) -> Tally:
        return self._seen[self._kind]

    @property
    def acceptance(self) -> list[float]:
        """Of late, over all texts with steps of the last one's kind; conditional, by draft."""
        found, share = [], PRIOR
        for tries, hits in zip(self._shared.tries, self._shared.hits, strict=True):
            # What was not tried is thought to be no better than the draft before it: in benchmarks/results/drafts.json
            # the two differ by 0.11 at most. Nor better than what is thought of the first.
            share = _share(hits, tries, min(PRIOR, share), PRIOR_WEIGHT)
            found.append(share)
        return found

    @property
    def least_acceptance(self) -> list[float]:
        """What the acceptance is at least, but for one standard error."""
        known = [tries + PRIOR_WEIGHT for tries in self._shared.tries]
        return [share - math.sqrt(share * (1 - share) / n) for share, n in zip(self.acceptance, known, strict=True)]

    def tokens(self, tally: Tally, drafts: int, others: Sequence[float] | None = None) -> float:
        """E(d) of a text: its own acceptance as far as it is known, that of all before and beside it otherwise."""
        return 1 + sum(self._standing(tally, drafts, others))

    def _standing(self, tally: Tally, drafts: int, others: Sequence[float] | None = None) -> list[float]:
        """How likely drafts 1 … i of a text all stand, by i."""
        return list(accumulate(tally.acceptance(others or self.acceptance, SHARED_WEIGHT)[:drafts], mul))

    def steps(self, tally: Tally, left: int, choice: int, others: Sequence[float]) -> tuple[float, float]:
        """How many steps a text needs for so many tokens, and the variance of that number.

        It varies with what happens to stand, and with what is not known of how often drafts of this very text stand.
        """
        if choice == TREE:
            first, more = self.acceptance[0], self._of_tree - 1
            varies = more  # as if its tokens came one by one (Poisson)
        else:
            standing = self._standing(tally, choice, others)
            first, more = standing[0] if standing else 0.0, sum(standing)
            varies = sum((2 * draft + 1) * share for draft, share in enumerate(standing)) - more**2
        if first <= 0 or more <= 0:
            return left, 0.0
        # The first draft's share is a Beta variable of so many tries; what the later ones bring goes with it.
        doubt = more**2 * (1 - first) / first / (tally.tries[0] + ALIKE)
        return left / (1 + more), left * varies / (1 + more) ** 3 + (left / (1 + more) ** 2) ** 2 * doubt

    @property
    def _of_tree(self) -> float:
        """Tokens of a step with the tree."""
        return ((self.tree or 0) * PRIOR_WEIGHT + self._tree_tokens) / (PRIOR_WEIGHT + self._tree_steps)

    def stays_plain(self) -> bool:
        """Whether the next step of the same texts is a plain one as the last was; to be asked before `choose`."""
        if not self._left_plain or not (self._plain_steps + 1) % CHOOSE_EVERY:
            return False
        self._plain_steps += 1
        return True

    def choose(
        self, texts: Sequence[tuple[Tally, int]], waiting: bool = False, behind: bool = False, kind: str = "greedy"
    ) -> int:
        """How many drafts the next step reads; 0 for a plain step, TREE for the tree.

        Args:
            texts: the tally of each row at work, and how many tokens it may still emit.
            waiting: whether prompts wait for a slot.
            behind: whether the heads have yet to see so much that it takes time.
            kind: of step, where some take longer than others; of each kind but `greedy`, which is what the profile is
                of, the first steps are plain.
        """
        self._left_plain = False
        self._kind = kind
        if self.profile is not None and kind != "greedy" and len(self._recent.get(kind, ())) < RECENT:
            self._plain_steps, self._streak, self._committed = 0, 0, 0
            return 0
        # To catch up for too little is dear: others must surely have had good drafts for a plain text to be drafted.
        others = self.least_acceptance if behind and self._plain_steps else self.acceptance
        choice = self._soonest(texts, waiting, behind, kind, others)
        if not choice:
            if self._streak and not behind:
                self._leave(texts)
            self._plain_steps, self._streak, self._committed = self._plain_steps + 1, 0, 0
            if not self._looks_again(texts, waiting, behind, kind):
                self._left_plain = behind
                return 0
            choice = self._fewest
        self._committed = math.ceil(COMMITTED / len(texts)) if behind else max(0, self._committed - 1)
        self._plain_steps, self._streak = 0, self._streak + 1
        if self._streak == STEADY:
            self._patience = FIRST_LOOK
        return 0 if self.profile and self._streak % RECHECK == 0 else choice

    def _leave(self, texts: Sequence[tuple[Tally, int]]) -> None:
        """Texts that are left to plain steps show that there are other texts now: they count more than those before."""
        self._shared.forget(keep=LEFT)
        for tally, _ in texts:
            self._shared.add(tally, 1 - LEFT)

    def _looks_again(self, texts: Sequence[tuple[Tally, int]], waiting: bool, behind: bool, kind: str) -> bool:
        """Whether drafts are tried once more, where good ones would still pay for these texts."""
        if self._plain_steps % self._patience == 0:
            self._forget(texts)
        if self._plain_steps < self._patience:
            return False
        hoped = [(Tally.empty(self.drafts), left) for _, left in texts]
        pays = self._soonest(hoped, waiting, behind, kind, [PRIOR] * self.drafts)
        if not pays and self._plain_steps < LONGEST_WAIT:  # what was measured at first may be wrong
            return False
        self._patience = min(2 * self._patience, LONGEST_WAIT)
        return True

    def _forget(self, texts: Sequence[tuple[Tally, int]]) -> None:
        """What drafts brought and took was long ago, and may be otherwise now."""
        self._shared.forget(keep=OLD)
        for tally, _ in texts:
            tally.forget(keep=OLD)
        self._tree_tokens, self._tree_steps = OLD * self._tree_tokens, OLD * self._tree_steps
        self._catching_up.extend([OLD * seconds for seconds in self._catching_up])
        for (kind, choice), compared in self._over_plain.items():
            if kind == self._kind:
                compared.append(self._at_first(kind, choice))

    @property
    def _fewest(self) -> int:
        """Drafts that cost least to find out what they bring."""
        assert self.profile is not None
        return min([drafts for drafts in self.profile.step if drafts], default=TREE)

    def note(
        self,
        choice: int,
        accepted: Sequence[tuple[Tally, int]],
        seconds: float | None = None,
        behind: bool = False,
        kind: str = "greedy",
    ) -> None:
        """What came of a step.

        Args:
            accepted: how many drafts of each text stood.
            seconds: what it took, drafting included.
            behind: whether the heads had to catch up.
        """
        if seconds is not None and self.profile is not None:
            self._note_seconds(choice, seconds, behind, kind, follows=kind == self._noted)
        self._kind = self._noted = kind
        if not choice:
            return
        if choice == TREE:
            keep = math.exp(-1 / MEMORY)
            self._tree_steps = keep * self._tree_steps + len(accepted)
            self._tree_tokens = keep * self._tree_tokens + len(accepted) + sum(count for _, count in accepted)
            return
        for tally, count in accepted:
            tally.note(choice, count, MEMORY)
            self._shared.note(choice, count, SHARED_MEMORY)
            self._shared.forget(choice, math.exp(-1 / SHARED_MEMORY))

    def _note_seconds(self, choice: int, seconds: float, behind: bool, kind: str, follows: bool) -> None:
        if choice and behind:
            self._catching_up.append(max(0.0, seconds - self._plain_seconds(kind) * self.over_plain(kind, choice)))
            return
        recent = self._recent.setdefault(kind, deque(maxlen=RECENT))
        before = recent[-1][0] if recent and follows else 0
        recent.append((choice, seconds))
        if choice and [each for each, _ in recent][-1 - AFTER_PLAIN :] == [0] + AFTER_PLAIN * [choice]:
            self._compare(kind, choice)
        elif before and not choice:
            self._compare(kind, before)

    def _compare(self, kind: str, choice: int) -> None:
        drafted, plain = (
            statistics.median(seconds for each, seconds in self._recent[kind] if each == wanted)
            for wanted in (choice, 0)
        )
        self._comparisons(kind, choice).append(drafted / plain)

    def _comparisons(self, kind: str, choice: int) -> deque[float]:
        return self._over_plain.setdefault((kind, choice), deque([self._at_first(kind, choice)], maxlen=COMPARISONS))

    def _at_first(self, kind: str, choice: int) -> float:
        """What a choice was measured to take over a plain step; to draw what is emitted takes time as well."""
        assert self.profile is not None
        plain = self._measured(0)
        drawing = 0.0 if kind == "greedy" else max(0.0, (self.profile.drawn or 0.0) - plain)
        emitted = self.tokens(Tally.empty(self.drafts), max(0, choice))
        return (self._measured(choice) + emitted * drawing) / (plain + drawing)

    def _measured(self, choice: int) -> float:
        assert self.profile is not None
        return (self.profile.tree or math.inf) if choice == TREE else self.profile.step[choice]

    def _plain_seconds(self, kind: str) -> float:
        """What a plain step would take now, by steps of whatever choice."""
        if not (recent := self._recent.get(kind)):
            return self._measured(0)
        return statistics.median(seconds / self.over_plain(kind, choice) for choice, seconds in recent)

    def over_plain(self, kind: str, choice: int) -> float:
        """How many plain steps a step takes now: as measured at first, and as followed since."""
        return statistics.median(self._comparisons(kind, choice)) if choice else 1.0

    def _soonest(
        self, texts: Sequence[tuple[Tally, int]], waiting: bool, behind: bool, kind: str, others: Sequence[float]
    ) -> int:
        if self.profile is None:
            return self.drafts if self.tree is None else TREE
        catching_up = statistics.median(self._catching_up)

        def until_the_end(choice: int) -> float:
            """Seconds, summed over the slots that are of use."""
            steps = [self.steps(tally, left, choice, others) for tally, left in texts]
            first = catching_up if choice and behind else 0.0
            if waiting:
                return sum(first + step[choice] * each for each, _ in steps)
            return first + step[choice] * largest(steps)

        choices = [*self.profile.step, *([TREE] if self.profile.tree is not None and self.tree is not None else [])]
        plain_step = self._plain_seconds(kind)
        step = {choice: plain_step * self.over_plain(kind, choice) for choice in choices}
        seconds = {choice: until_the_end(choice) for choice in choices}
        drafting = [choice for choice in choices if choice]
        best = min(drafting, key=lambda choice: seconds[choice], default=0)
        margin = MARGIN if behind or not self._streak else STAY
        if margin * seconds[best] < seconds[0]:
            return best
        return self._fewest if self._committed and not behind else 0  # what is tried in vain is tried at the least cost
