"""How the next token is chosen from logits: greedily or by chance, after any logits processors of transformers.

Chance comes from a counter, not from a generator with a state: the noise of a token is a hash of the request's seed, of
the position and of the token. So it does not depend on the batch, on the order of work or on how many tokens a step
reads, and the same seed gives the same text with drafts and without (Gumbel-max; arXiv:2408.07978 couples drafter and
target so).
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# Processors of transformers that look at the scores alone, so that all rows and places go through them at once ...
_OF_SCORES = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TopHLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "InfNanRemoveLogitsProcessor",
    "LogitNormalization", "SuppressTokensLogitsProcessor",
}  # fmt: skip
# ... and those that look at the text before as well, but remember nothing.
_OF_TEXT = {
    "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
}  # fmt: skip
# Those that know the rows of a batch by their number, and so serve one text only.
_OF_ROWS = {
    "PrefixConstrainedLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
}  # fmt: skip

TOKEN, DRAFT, STANDS, RESIDUAL = range(4)  # what a random number is for
Method = Literal["coupled", "rejection"]


class SamplingError(ValueError):
    """A way to choose tokens that cannot be; the message says why."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a text are chosen: as in transformers, processors first, then temperature, top-k, top-p, min-p.

    temperature: 0 takes the best token.
    top_k, top_p, min_p, repetition_penalty: as in transformers; 0, 1, 0 and 1 leave them out.
    seed: an integer, or None (default) for one that each call draws from PyTorch's generator. With several prompts and
        one `Sampling`, the first prompt has this seed and the others have seeds derived from it, see `prompt_seeds`.
    processors: logits processors of transformers, in order. Each is called with the exact text before a token, for
        every token of a draft. One that remembers what it saw must see each token once: there is no drafting then. An
        own class that remembers nothing says so with an attribute `stateless = True`.
    method: `coupled`: the same seed gives the same text with drafts and without. `rejection`: drafts stand with
        probability min(1, p/q) (Leviathan et al. 2023, arXiv:2211.17192); the same distribution, another text.
    sampled_drafts: with rejection, whether drafts are drawn from the heads' distribution, or are their best tokens.
    block: with rejection, decide over all drafts of a step together (Sun et al. 2024, arXiv:2403.10444).
    logprobs: keep the log-probability of each token, and of so many of the most probable ones: `Generation.logprobs`.
        They are those of the model, before processors and temperature. None (default) keeps none.

    Raises:
        SamplingError: for values that have no meaning.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    processors: tuple[Any, ...] = ()
    method: Method = "coupled"
    sampled_drafts: bool = True
    block: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "processors", tuple(self.processors))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not math.isfinite(value):
                raise SamplingError(f"{name} is {value!r}; it must be a finite number.")
        object.__setattr__(self, "top_k", _integer("top_k", self.top_k))
        if self.seed is not None:
            object.__setattr__(self, "seed", _integer("seed", self.seed, otherwise=", or None to draw one"))
        if self.logprobs is not None:
            object.__setattr__(self, "logprobs", _integer("logprobs", self.logprobs, otherwise=", or None for none"))
        checks = {
            "temperature must be 0 (greedy) or more": self.temperature >= 0,
            "top_k must be 0 (off) or more": self.top_k >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "min_p must be between 0 and 1": 0 <= self.min_p <= 1,
            "repetition_penalty must be above 0": self.repetition_penalty > 0,
            "method must be coupled or rejection": self.method in ("coupled", "rejection"),
            "block goes with method='rejection'": not self.block or self.method == "rejection",
            "logprobs must be 0 (of the chosen tokens alone) or more": self.logprobs is None or self.logprobs >= 0,
        }
        for message, holds in checks.items():
            if not holds:
                name = message.split()[0]
                raise SamplingError(f"{name} is {getattr(self, name)}; {message}.")

    @property
    def by_chance(self) -> bool:
        return self.temperature > 0

    @property
    def rejects(self) -> bool:
        """Whether drafts stand by rejection; without chance there is nothing to reject by."""
        return self.by_chance and self.method == "rejection"

    @property
    def is_greedy(self) -> bool:
        """Whether the trunk's best token is all that counts."""
        return not self.by_chance and not self.all_processors and self.logprobs is None

    @cached_property
    def all_processors(self) -> LogitsProcessorList:
        """Every processor, in the order of transformers."""
        found = list(self.processors)
        if self.repetition_penalty != 1:
            found.insert(0, RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.by_chance:
            found += [TemperatureLogitsWarper(float(self.temperature))] if self.temperature != 1 else []
            found += [TopKLogitsWarper(self.top_k)] if self.top_k else []
            found += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
            found += [MinPLogitsWarper(self.min_p)] if self.min_p else []
        return LogitsProcessorList(found)

    @property
    def scale(self) -> float | None:
        """The temperature that is all there is between logits and a token, 0 for the best one; None where more is."""
        if not self.all_processors:
            return None if self.rejects else float(self.by_chance)
        only = self.all_processors[0]
        alone = len(self.all_processors) == 1 and type(only) is TemperatureLogitsWarper
        return float(only.temperature) if alone and self.by_chance and not self.rejects else None

    @cached_property
    def settings(self) -> tuple:
        """What scores are made by: rows with equal settings are processed together."""
        numbers = self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        return (*numbers, *map(id, self.processors))

    @cached_property
    def stateful(self) -> list[str]:
        """The names of processors that remember what they saw."""
        return [type(each).__name__ for each in self.all_processors if not _is_stateless(each)]

    @cached_property
    def draft_temperature(self) -> float:
        """The temperature that drafts are made with: the product of all that the processors have."""
        found = 1.0 if self.by_chance else 0.0
        for each in self.all_processors:
            if isinstance(each, TemperatureLogitsWarper):
                found *= float(each.temperature)
        return found

    @cached_property
    def of_rows(self) -> list[str]:
        """The names of processors that know rows by their number."""
        return [type(each).__name__ for each in self.all_processors if _is_among(each, _OF_ROWS)]

    @cached_property
    def reads_text(self) -> bool:
        """Whether a processor looks at more than the scores."""
        return any(not _is_among(each, _OF_SCORES) for each in self.all_processors)

    def for_one_text(self) -> Sampling:
        """The same with processors of its own where they remember what they saw."""
        return replace(self, processors=tuple(map(_own_copy, self.processors))) if self.stateful else self

    def scores(self, logits: Tensor, texts: Sequence[Sequence[Tensor]]) -> Tensor:
        """Logits of some rows that share this sampling [B, W, V] -> scores after all processors, float32.

        Args:
            texts: for each row and place the token ids before it [L].
        """
        scores = logits.float()
        for each in self.all_processors:
            if _is_among(each, _OF_SCORES):
                scores = each(None, scores.flatten(0, 1)).view(scores.shape)
            else:
                rows = [
                    torch.cat([each(ids[None], score[None]) for ids, score in zip(row, places, strict=True)])
                    for row, places in zip(texts, scores, strict=True)
                ]
                scores = torch.stack(rows)
        return scores


def _integer(name: str, value: Any, otherwise: str = "") -> int:
    """Any kind of integer, NumPy's and PyTorch's too, as an int."""
    try:
        return operator.index(value)
    except TypeError:
        raise SamplingError(f"{name} is {value!r}; it must be an integer{otherwise}.") from None


GREEDY = Sampling()


def _is_among(processor: Any, names: set[str]) -> bool:
    return type(processor).__module__ == "transformers.generation.logits_process" and type(processor).__name__ in names


def _is_stateless(processor: Any) -> bool:
    return _is_among(processor, _OF_SCORES | _OF_TEXT) or bool(getattr(processor, "stateless", False))


def _own_copy(processor: Any) -> Any:
    """A copy of a processor that remembers, for one text; the modules in it are not copied."""
    if _is_stateless(processor):
        return processor
    shared = {id(value): value for value in vars(processor).values() if isinstance(value, nn.Module)}
    try:
        return copy.deepcopy(processor, shared)
    except Exception as error:  # whatever a stranger's class raises means the same
        raise SamplingError(
            f"{type(processor).__name__} remembers what it saw and cannot be copied for each prompt ({error}); give "
            "each prompt a Sampling with a processor of its own."
        ) from error


# --- random numbers -----------------------------------------------------------------------------------------------


def prompt_seeds(seed: int | None, count: int) -> list[int]:
    """The seeds of the prompts of one call, in [0, 2^62).

    The first prompt has the seed itself, so that it gets the same text alone and in a batch. The others have hashes of
    the seed and of their place, so that calls with neighbouring seeds have no text in common.

    Args:
        seed: of the call; None draws one from PyTorch's generator.
    """
    first = int(torch.randint(_SEEDS, (1,))) if seed is None else seed % _SEEDS
    derived = _mix64(_mix64(torch.tensor(first)) + _GOLDEN * torch.arange(count)) % _SEEDS
    return [first, *derived[1:].tolist()][:count]


def keys(seeds: Tensor, positions: Tensor, purpose: int = TOKEN) -> Tensor:
    """A 64-bit key for each seed [B] and position [B, W] -> [B, W], int64; another one for each purpose."""
    return _mix64(_mix64(seeds[:, None]) + _GOLDEN * (4 * positions + purpose + 1))


def uniform(key: Tensor) -> Tensor:
    """A number in (0, 1) for each key, float32."""
    return (((key >> 40) & 0xFFFFFF).float() + 0.5) * 2.0**-24


def gumbel(key: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise for keys [...] and token ids [M] or [..., M] -> [..., M], float32.

    `argmax(scores + gumbel)` is a draw from softmax(scores).
    """
    low, high = key.to(torch.int32)[..., None], (key >> 32).to(torch.int32)[..., None]
    # A zero that is known at run time only: Inductor folds a constant times an arange into an index expression, and in
    # 32 bits that overflows.
    token_ids = token_ids.to(torch.int32) ^ (low & 0)
    bits = _mix32(_mix32(token_ids * -1640531535 ^ low) ^ high)
    share = ((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31  # near 0 where the noise is large: there it is exact
    return -torch.log(-torch.log1p(-share.clamp(max=1 - 2.0**-24)))


_SEEDS = 2**62  # seeds are below this
_GOLDEN = -7046029254386353131  # 2^64 over the golden ratio, as a signed number


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele et al. 2014)."""
    x = (x ^ _shifted(x, 30, 64)) * -4658895280553007687
    x = (x ^ _shifted(x, 27, 64)) * -7723592293110705685
    return x ^ _shifted(x, 31, 64)


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer."""
    x = (x ^ _shifted(x, 16, 32)) * -2048144789
    x = (x ^ _shifted(x, 13, 32)) * -1028477387
    return x ^ _shifted(x, 16, 32)


def _shifted(x: Tensor, by: int, bits: int) -> Tensor:
    """Bits moved right, zeros coming in."""
    return (x >> by) & ((1 << (bits - by)) - 1)
