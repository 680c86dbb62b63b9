"""What heads and outputs weigh, what a step costs with them, and when drafting pays: arithmetic over real modules.

Nothing is measured here and nothing need be allocated: modules may stand on the meta device. A pass over t tokens takes
as long as reading its weights once or as multiplying them with t tokens, whichever is longer (a roofline).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from nextn.config import OutputConfig
from nextn.heads.base import Heads
from nextn.model import MultiTokenModel
from nextn.output import ClusteredOutput, Output
from nextn.trunk import HostError, Trunk

BATCHES = [2**power for power in range(13)]


@dataclass(frozen=True)
class Weights:
    """The weights that a token meets.

    dense: those that every token meets.
    experts: those of the experts, of which a token meets `chosen` of `of`.
    """

    dense: int = 0
    experts: int = 0
    chosen: int = 1
    of: int = 1

    def met(self) -> float:
        """Multiplications for one token."""
        return self.dense + self.experts * self.chosen / self.of

    def read(self, tokens: float) -> float:
        """Weights that are read once for so many tokens, if these choose their experts evenly and by themselves."""
        untouched = (1 - self.chosen / self.of) ** tokens
        return self.dense + self.experts * (1 - untouched)


def weights_of(modules: Iterable[nn.Module], trunk: Trunk) -> Weights:
    """What a token meets in some modules; embeddings are looked up, not met, unless they are the unembedding too."""
    dense = experts = 0
    of, seen = 1, set[int]()
    table = trunk.unembedding.weight
    for module in modules:
        for path, child in module.named_modules():
            for parameter in child.parameters(recurse=False):
                if id(parameter) in seen or (isinstance(child, nn.Embedding) and parameter is not table):
                    continue
                seen.add(id(parameter))
                if "experts" in path.split(".") and parameter.ndim == 3:
                    experts, of = experts + parameter.numel(), parameter.shape[0]
                else:
                    dense += parameter.numel()
    if not experts:
        return Weights(dense)
    if (chosen := trunk.experts_per_token) is None:
        raise HostError(
            f"{type(trunk.model).__name__} has experts, but its config does not say how many a token chooses."
        )
    return Weights(dense, experts, min(chosen, of), of)


def weights_of_output(output: Output, trunk: Trunk) -> Weights:
    """What a state meets in an output; clusters are chosen by states as experts are."""
    output = output.at(2)
    if isinstance(output, ClusteredOutput):
        clusters, width = output.centroids.weight.shape
        return Weights(clusters * width, trunk.vocab_size * width, output.top, clusters)
    return Weights(output.operations(trunk))


@dataclass(frozen=True)
class Machine:
    """What the roofline is made of.

    bandwidth: bytes a second.
    rate: operations a second, two a multiplication.
    width: bytes a weight.
    """

    bandwidth: float
    rate: float
    width: int = 2

    def seconds(self, weights: Weights, tokens: float, cache_bytes: float = 0) -> float:
        """One pass over so many tokens, which also reads so much of a cache."""
        read = weights.read(tokens) * self.width + cache_bytes
        return max(read / self.bandwidth, 2 * weights.met() * tokens / self.rate)


@dataclass
class Costs:
    """A trunk and its heads as passes.

    passes: what the drafts of one step run one after the other, outputs left out: weights, and tokens a row.
    output: what each draft meets in its output, with one token a row.
    trunk_caches, pass_caches: of each layer of the trunk, and of a pass: the bytes of a position, and the window beyond
        which it sees none (None: it sees all).
    """

    trunk: Weights
    passes: list[tuple[Weights, int]]
    output: Weights
    trunk_caches: list[tuple[int, int | None]]
    pass_caches: list[tuple[int, int | None]]

    @property
    def draft_weights(self) -> float:
        """The weights that a draft meets, on average."""
        return sum(weights.met() for weights, _ in self.passes) / len(self.passes) + self.output.met()

    def plain(self, machine: Machine, batch: int, context: int) -> float:
        """Seconds of a plain step."""
        return machine.seconds(self.trunk, batch, batch * cache_bytes(self.trunk_caches, context))

    def verify(self, machine: Machine, batch: int, context: int) -> float:
        """Seconds of the trunk over the pending token and all drafts."""
        tokens = batch * (len(self.passes) + 1)
        return machine.seconds(self.trunk, tokens, batch * cache_bytes(self.trunk_caches, context))

    def draft(self, machine: Machine, batch: int, context: int) -> float:
        """Seconds of all drafts of a step."""
        cache = batch * cache_bytes(self.pass_caches, context)
        outputs = len(self.passes) * machine.seconds(self.output, batch)
        return outputs + sum(machine.seconds(weights, batch * tokens, cache) for weights, tokens in self.passes)

    def speedup(self, machine: Machine, batch: int, context: int, tau: float) -> float:
        """Tokens a second over plain decoding's, where a step gives τ tokens."""
        step = self.verify(machine, batch, context) + self.draft(machine, batch, context)
        return tau * self.plain(machine, batch, context) / step

    def stops_paying(self, machine: Machine, context: int, tau: float) -> int | None:
        """The batch from which on drafting is slower than plain decoding; None: it still pays at 4,096 rows.

        It may not pay at some smaller batches either, see `slow_batches`.
        """

        def pays(batch: int) -> bool:
            return self.speedup(machine, batch, context, tau) >= 1

        low = max((batch for batch in BATCHES if pays(batch)), default=0)
        if low == BATCHES[-1]:
            return None
        slow = 2 * low or 1
        while slow - low > 1:
            middle = (low + slow) // 2
            low, slow = (middle, slow) if pays(middle) else (low, middle)
        return slow

    def slow_batches(self, machine: Machine, context: int, tau: float) -> list[int]:
        """Powers of two below `stops_paying` at which drafting is slower.

        There drafts wake experts that sleep without; or texts are long: plain steps read a cache for each row more, and
        the weights of the heads are read once for all rows.
        """
        stops = self.stops_paying(machine, context, tau) or math.inf
        return [batch for batch in BATCHES if batch < stops and self.speedup(machine, batch, context, tau) < 1]


def costs_of(model: MultiTokenModel, width: int = 2) -> Costs:
    """The passes of a model's steps.

    Args:
        width: bytes a number of the caches.
    """
    trunk, heads = model.trunk, model.heads
    # All states of a step go through the heads once, for their keys; heads without any need the newest alone.
    first = heads.n + heads.lookback if heads.cache_count else 1
    modules = [part for part in heads.regions() if part is not heads.fusing]
    if heads.recurrent:
        again = weights_of(modules, trunk)
        passes = [(weights_of(heads.regions(), trunk), first), *[(again, 1)] * (heads.n - 2)]
    else:
        passes = [(weights_of([part], trunk), first) for part in modules]
    layers = range(len(trunk.layers))
    keeping = [layer for layer in layers if not getattr(trunk.attention(layer), "is_kv_shared_layer", False)]
    own = [_like_last(model, width)] if heads.cache_count else []
    return Costs(
        trunk=weights_of([trunk.model], trunk),
        passes=passes,
        output=weights_of_output(heads.output, trunk),
        trunk_caches=[_cache(trunk, layer, width) for layer in keeping],
        pass_caches=[_cache(trunk, layer, width) for layer in heads.reads] or own,
    )


def cache_bytes(caches: Iterable[tuple[int, int | None]], context: int) -> int:
    """What a row with so many positions reads of some caches."""
    return sum(size * (context if window is None else min(context, window)) for size, window in caches)


def _cache(trunk: Trunk, layer: int, width: int) -> tuple[int, int | None]:
    """Bytes of a position in a layer's cache, compressed where attention is (MLA), as engines keep them; its window."""
    window = trunk.window(trunk.layer_types[layer])
    if hasattr(trunk.config, "kv_lora_rank"):
        return (int(trunk.config.kv_lora_rank) + int(trunk.config.qk_rope_head_dim)) * width, window
    _, key_heads, head_width = trunk.attention_shape(layer)
    return 2 * key_heads * head_width * width, window


def _like_last(model: MultiTokenModel, width: int) -> tuple[int, int | None]:
    """The cache of heads that have their own: as the trunk's last layer; EAGLE-3's is a plain one on any host."""
    if model.multi_token.kind != "eagle3":
        return _cache(model.trunk, len(model.trunk.layers) - 1, width)
    _, key_heads, head_width = model.trunk.attention_shape()
    return 2 * key_heads * head_width * width, None


def tau_of(conditional: Sequence[float], n: int) -> float:
    """τ of n - 1 drafts by their conditional acceptance; where fewer are given, the last one holds for the rest."""
    shares = [conditional[min(draft, len(conditional) - 1)] for draft in range(n - 1)]
    return 1 + sum(math.prod(shares[: draft + 1]) for draft in range(n - 1))


@dataclass
class Option:
    """An output that could be chosen.

    operations: multiplications a draft, which at batch 1 are weights read.
    kept: the share of the acceptance, (τ - 1) over that of the heads it is compared with.
    """

    name: str
    operations: int
    kept: float


def cheapest(options: Sequence[Option], share: float) -> tuple[Option, str]:
    """The option of the fewest operations that keeps a share of the acceptance, and why, in a sentence.

    Raises:
        ValueError: where none does.
    """
    enough = sorted((option for option in options if option.kept >= share), key=lambda option: option.operations)
    if not enough:
        most = max(options, key=lambda option: option.kept)
        raise ValueError(f"No output keeps {share:.1%} of the acceptance: {most.name} keeps the most, {most.kept:.1%}.")
    chosen = enough[0]
    what = f"{chosen.name} takes {chosen.operations:,} multiplications a draft"
    why = f"{what} and keeps {chosen.kept:.1%} of the acceptance"
    cheaper = [option for option in options if option.operations < chosen.operations]
    if cheaper:
        nearest = max(cheaper, key=lambda option: option.kept)
        return (
            chosen,
            f"{why}; of the cheaper ones, {nearest.name} keeps the most, {nearest.kept:.1%}, under {share:.1%}",
        )
    return chosen, f"{why}; none is cheaper"


def best_n(speedups: dict[int, float]) -> tuple[int, str]:
    """The n of the greatest speed-up, and why, in a sentence."""
    chosen = max(speedups, key=lambda n: speedups[n])
    beside = ", ".join(f"n = {n}: {value:.2f}" for n, value in sorted(speedups.items()))
    verdict = f"n = {chosen} is the fastest of {beside}"
    if speedups[chosen] < 1:
        verdict += "; even so it is slower than plain decoding"
    return chosen, verdict


def usual_outputs(vocabulary: int, width: int, trimmed: bool = True, each: bool = False) -> list[OutputConfig]:
    """Outputs worth a comparison for a vocabulary and the width of what own tables read.

    Args:
        trimmed: whether there is a text to choose tokens by.
        each: whether own tables are one for each module.
    """
    stated = ["shared"]
    if trimmed:
        stated += [f"trimmed:{vocabulary // share // 64 * 64}" for share in (2, 4, 8, 16) if vocabulary // share >= 64]
    stated += [f"low_rank:{width // share}{',each' if each else ''}" for share in (2, 4, 8) if width // share]
    divisors = [count for count in range(2, vocabulary // 2 + 1) if vocabulary % count == 0]
    if divisors:
        clusters = min(divisors, key=lambda count: abs(count - vocabulary / 96))
        tops = sorted({max(1, clusters // share) for share in (64, 32, 16)})
        stated += [f"clustered:{clusters}:{top}" for top in tops]
    return [OutputConfig.parse(each) for each in stated]


def stored_bytes(heads: Heads) -> int:
    """What heads take in a file, in bfloat16: parameters, and the buffers of their output."""
    return sum(
        tensor.numel() * (2 if tensor.is_floating_point() else tensor.element_size())
        for tensor in heads.state_dict().values()
    )


def stored_parameters(heads: Heads) -> tuple[int, int]:
    """What heads store: parameters without their output's, and those of the output (the trunk's own left out)."""
    output = sum(parameter.numel() for parameter in heads.output.parameters())
    return sum(parameter.numel() for parameter in heads.parameters()) - output, output
