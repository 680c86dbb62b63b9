"""The loss of multi-token prediction: Σ w_k · L_k with one denominator for all depths.

L_k sums a loss over the positions whose token t+k exists, carries a label and lies in the document of t. The
denominator is the count of valid t+1 targets, for every depth, so that accumulation, packing and data parallelism
change nothing.

Logits [N, V] are the largest thing in training, so they are never whole: projection and loss are one autograd
function, which goes through the positions in chunks and computes the gradients of states and table in its forward. All
depths that share a table are one call, so that it has one gradient however many they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nextn import fused
from nextn.config import ObjectiveConfig
from nextn.logits import LogitTransform
from nextn.output import Output, best
from nextn.teachers import Distribution, Teacher, at_least_float32
from nextn.trunk import Trunk, this_thread

IGNORE = -100
CHUNK = 100_000_000  # logits that are there at one time: 0.4 GB in float32, whatever the vocabulary

Project = Callable[[Tensor], Tensor]  # states [C, D] to logits


def targets_at(labels: Tensor, documents: Tensor, depth: int) -> Tensor:
    """The label of t+depth for each position t [B, T]; -100 where it is no target.

    Args:
        labels: token ids aligned with the input [B, T], -100 where not trained on.
        documents: document of each position [B, T], -1 for padding.
        depth: k ≥ 1.
    """
    targets = torch.full_like(labels, IGNORE)
    if depth < labels.shape[1]:
        same = (documents[:, depth:] == documents[:, :-depth]) & (documents[:, depth:] >= 0)
        targets[:, :-depth] = torch.where(same, labels[:, depth:], IGNORE)
    return targets


@dataclass
class Depth:
    """What one depth brings to the loss.

    states: [B, T, D], ready for the output.
    targets: token ids [B, T], -100 for none.
    weight: w_k.
    teacher: what the trunk says the target is, its word of t+k-1 at place t; for objectives that follow it.
    """

    states: Tensor
    targets: Tensor
    weight: float
    teacher: Teacher | None = None


@dataclass
class Losses:
    """What `depth_losses` gives.

    total: Σ w_k · L_k, not divided yet; a scalar with gradients.
    sums: L_k by depth [K].
    hits: whether the target was the best token that the output can name [K, B, T].
    overlaps: Σ_t Σ_v min(p, q) by depth [K], how far the trunk's distribution and the head's overlap; NaN for the text.
    """

    total: Tensor
    sums: Tensor
    hits: Tensor
    overlaps: Tensor


@torch.compiler.disable  # chunks depend on the data: a graph break, and nothing to gain
def depth_losses(
    trunk: Trunk,
    output: Output,
    depths: list[Depth],
    objective: ObjectiveConfig | None = None,
    chunk: int | None = None,
) -> Losses:
    """The loss of all depths that go through one output, in memory that does not grow with the vocabulary's logits.

    A token that the output cannot name is no target: it is left out of the text's loss, and counts as missed.

    Args:
        objective: what the heads are to follow; default: the text.
        chunk: positions whose logits are there at one time; default: as many as make `CHUNK` logits.
    """
    objective = objective or ObjectiveConfig()
    aimed = [_aimed(output, depth, objective) for depth in depths]
    distinct = {id(depth.states): depth.states for depth in depths}  # depths that read one tensor share its gradient
    states = [output.prepare(trunk, each).flatten(0, 1) for each in distinct.values()]
    reads = [list(distinct).index(id(depth.states)) for depth in depths]
    module = output.projection(trunk)
    weights = [depth.weight for depth in depths]
    with _locks.setdefault(module, threading.RLock()):  # another thread's loss would find this forward in the module
        plain, project = _is_plain_linear(module), module.forward
        # Inside its own forward the module cannot be called once more.
        unembed = project if module is trunk.unembedding else trunk.unembedding
        teachers = [
            None if each.teacher is None else each.teacher.distribution(trunk, output, unembed, objective.temperature)
            for each in depths
        ]
        whole = objective.follows != "text" or not plain  # logits of all tokens are made
        chunk = chunk or max(1, CHUNK // (trunk.vocab_size if whole else output.size(trunk)))
        plan = _Plan(weights, reads, aimed, teachers, objective, output.transform(trunk), chunk)
        through = _through_table if plain else _through_module
        with _forward_is(module, lambda *given: through(module, project, output.rows, plan, *given)):
            total, sums, overlaps, hits = module(*states)
    return Losses(total, sums, hits.view(len(depths), *depths[0].targets.shape), overlaps)


def _aimed(output: Output, depth: Depth, objective: ObjectiveConfig) -> Tensor:
    """Targets as places among what the output can name [B·T].

    Following the trunk, a target outside of these still has a distribution: it gets the place V', which no logit has.
    """
    targets = output.targets(depth.targets)
    if objective.follows != "text":
        targets = torch.where((targets == IGNORE) & (depth.targets != IGNORE), torch.iinfo(torch.int32).max, targets)
    return targets.flatten()


_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # by projection


@contextmanager
def _forward_is(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let calling a module run `forward`, so that its hooks run around that.

    FSDP2 gathers a sharded weight in such a hook; reading the weight outside gives a shard. Other threads that call the
    module meanwhile run its own forward.
    """
    own, thread = module.__dict__.get("forward"), this_thread()
    usual = module.forward

    def by_thread(*given: Any) -> Any:
        return (forward if this_thread() == thread else usual)(*given)

    module.forward = by_thread  # the instance's own hides the class's
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _is_plain_linear(module: nn.Module) -> bool:
    """A Linear that nobody put something around: FSDP2's subclass is one, an adapter or an offloaded one is not."""
    return type(module).forward is nn.Linear.forward and "forward" not in module.__dict__


@dataclass
class _Plan:
    """What goes through one table: weight, state, targets [N] and teacher of each depth; and how.

    transform: from what the table gives to logits.
    """

    weights: list[float]
    reads: list[int]
    targets: list[Tensor]
    teachers: list[Distribution | None]
    objective: ObjectiveConfig
    transform: LogitTransform
    chunk: int

    def parts(self, place: int) -> Iterator[Tensor]:
        """The positions of a depth that have a target, in chunks of [C] indices."""
        rows = (self.targets[place] != IGNORE).nonzero()[:, 0]
        return iter(rows.split(self.chunk)) if len(rows) else iter(())

    def longest(self) -> int:
        """The most positions that a chunk can have."""
        return max(1, min(self.chunk, *(len(targets) for targets in self.targets)))

    def judge(self, place: int, rows: Tensor, logits: Tensor) -> _Judged:
        """Loss, hits and gradient of some rows; logits [C, V'] are overwritten with the gradient."""
        targets, nothing = self.targets[place][rows], logits.new_tensor(torch.nan)
        if self.objective.follows == "text" and (found := fused.cross_entropy(logits, targets)):
            return _Judged(found[0], found[1] == targets, nothing, logits)
        chosen = best(logits)
        hits = chosen == targets
        if self.objective.follows == "text":
            return _Judged(_text(logits, targets, chosen), hits, nothing, logits)
        teacher = self.teachers[place]
        assert teacher is not None
        with torch.no_grad():
            p = teacher(rows)
        loss, overlap = _follow(logits, p, self.objective)
        return _Judged(loss, hits, overlap, logits)


@dataclass
class _Judged:
    loss: Tensor  # a scalar, summed over the rows
    hits: Tensor  # [C]
    overlap: Tensor  # a scalar, summed
    gradient: Tensor  # of the loss for the logits [C, V']


# --- objectives: each returns its loss and leaves the gradient in place of the logits ------------------------------


def _text(logits: Tensor, targets: Tensor, largest: Tensor) -> Tensor:
    """Σ -log softmax(logits)[target]; gradient softmax - one-hot. `largest` is where the largest logits are [C]."""
    picked, top = (logits.gather(1, place[:, None]) for place in (targets, largest))
    torch.softmax(logits, dim=-1, out=logits)  # row by row: on a CPU, a third of the time of its steps one by one
    # log Σ exp = top - log softmax(logits)[largest], which is at least 1 / V': nothing underflows
    loss = (top - logits.gather(1, largest[:, None]).log() - picked).sum()
    logits.scatter_add_(1, targets[:, None], logits.new_full((len(targets), 1), -1.0))
    return loss


def _follow(logits: Tensor, p: Tensor, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """The loss against the trunk's distribution p [C, V'] and the overlap α = Σ min(p, q), both summed over rows.

    Forward KL, times temperature² as is the custom, so that its gradient keeps its size; total variation 1 - α; or
    their hybrid λ·KL + (1 - λ)·TV with λ = exp(-3 α), α without gradient (arXiv:2602.23881).
    """
    temperature = objective.temperature
    scaled = logits.div_(temperature)
    normaliser = torch.logsumexp(scaled, dim=-1, keepdim=True)
    mass = p.sum(dim=-1, keepdim=True)
    # Σ p log p - Σ p z + mass · log Σ exp z, [C]; without a temporary of [C, V'] for Σ p z
    cross = mass[:, 0] * normaliser[:, 0] - torch.einsum("cv,cv->c", p, scaled)
    divergence = (torch.special.entr(p).sum(dim=-1).neg() + cross) * temperature**2
    q = scaled.sub_(normaliser).exp_()
    below = q < p
    overlap = torch.minimum(p, q).sum(dim=-1)
    share = {
        "kl": torch.ones_like(overlap),
        "tv": torch.zeros_like(overlap),
        "lk": torch.exp(-3 * overlap),
    }[objective.follows]
    loss = (share * divergence + (1 - share) * (1 - overlap)).sum()
    # d KL / dz = T (mass · q - p); d TV / dz = q (Σ_v q_v [q_v < p_v] - [q < p]) / T
    inside = (q * below).sum(dim=-1, keepdim=True)
    share = share[:, None]
    slope = (1 - share) / temperature
    gradient = q * (share * temperature * mass + slope * (inside - below.to(q.dtype))) - share * temperature * p
    logits.copy_(gradient)
    return loss, overlap.sum()


# --- projections ---------------------------------------------------------------------------------------------------


def _through_table(
    module: Any, _project: Project, chosen_rows: Tensor | None, plan: _Plan, *states: Tensor
) -> tuple[Tensor, ...]:
    """By a plain Linear: its gradient is made in the forward, chunk by chunk."""
    table, bias = module.weight, module.bias
    if chosen_rows is not None:
        table, bias = table[chosen_rows.long()], None if bias is None else bias[chosen_rows.long()]
    if not torch.is_grad_enabled():  # or else the function would be asked for gradients of parameters all the same
        table, bias = table.detach(), None if bias is None else bias.detach()
    return _InForward.apply(plan, table, bias, *states)


class _InForward(torch.autograd.Function):
    """Σ_k w_k Σ_t loss(state_k[t] @ table.T + bias), with its gradients made in the forward."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, table: Tensor, bias: Tensor | None, *states: Tensor) -> tuple[Tensor, ...]:
        device = table.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else table.dtype
        with torch.autocast(device, enabled=False):
            return _InForward._forward(ctx, plan, dtype, table, bias, *states)

    @staticmethod
    def _forward(
        ctx: Any, plan: _Plan, dtype: torch.dtype, table: Tensor, bias: Tensor | None, *states: Tensor
    ) -> tuple[Tensor, ...]:
        _, wants_table, wants_bias, *wants_states = ctx.needs_input_grad
        wide = torch.float32 if dtype.itemsize < 4 else dtype
        weight = table.to(dtype)
        table_grad = torch.zeros_like(table, dtype=wide) if wants_table else None
        bias_grad = torch.zeros_like(bias, dtype=wide) if wants_bias and bias is not None else None
        sums, overlaps, hits = _tallies(plan, table.device, wide)
        grads = [torch.zeros_like(s) if wanted else None for s, wanted in zip(states, wants_states, strict=True)]
        # Fresh memory for each chunk would cost as much as what is written to it.
        narrow = torch.empty(plan.longest(), len(weight), dtype=dtype, device=weight.device)  # logits, then slopes
        broad = narrow if dtype == wide else torch.empty_like(narrow, dtype=wide)

        def part(k: int, rows: Tensor) -> None:
            grad = grads[plan.reads[k]]
            chosen = states[plan.reads[k]][rows].to(dtype)  # [C, D]
            logits = torch.mm(chosen, weight.T, out=narrow[: len(rows)])
            if bias is not None:
                logits += bias.to(dtype)
            judged = plan.judge(k, rows, plan.transform(broad[: len(rows)].copy_(logits)))
            sums[k] += judged.loss
            overlaps[k] += judged.overlap
            hits[k, rows] = judged.hits
            if grad is None and table_grad is None and bias_grad is None:
                return
            if not plan.transform.is_identity:
                judged.gradient.mul_(plan.transform.derivative(at_least_float32(logits)))
            slope, scale = logits.copy_(judged.gradient), plan.weights[k]  # [C, V'] is too large to be scaled
            if bias_grad is not None:
                bias_grad.add_(slope.sum(dim=0, dtype=wide), alpha=scale)
            if grad is not None:
                grad.index_add_(0, rows, (slope @ weight).to(grad.dtype), alpha=scale)
            if table_grad is not None:
                _add_product(table_grad, slope.T, chosen * scale)

        for k in range(len(plan.weights)):
            for rows in plan.parts(k):
                part(k, rows)
        ctx.grads = [table_grad, bias_grad, *grads]
        ctx.mark_non_differentiable(sums, overlaps, hits)
        return _weighted(plan, sums), sums, overlaps, hits

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError(
                "The loss was already propagated once and freed its gradients; call the model again for a second "
                "backward."
            )
        grads, ctx.grads = ctx.grads, None
        return None, *(None if grad is None else grad.mul_(upstream) for grad in grads)


def _through_module(
    module: nn.Module, project: Project, chosen_rows: Tensor | None, plan: _Plan, *states: Tensor
) -> tuple[Tensor, ...]:
    """By anything else that projects (a Linear with an adapter): chunk by chunk, each once more in the backward."""
    sums, overlaps, hits = _tallies(plan, states[0].device, torch.float64 if states[0].itemsize == 8 else torch.float32)
    total = torch.zeros_like(sums[0])
    for k in range(len(plan.weights)):
        state = states[plan.reads[k]]
        for rows in plan.parts(k):

            def part(chosen: Tensor, k: int = k, rows: Tensor = rows) -> tuple[Tensor, ...]:
                logits = project(chosen) if chosen_rows is None else project(chosen)[:, chosen_rows.long()]
                return _Judge.apply(plan, k, rows, plan.transform(logits))

            loss, overlap, hit = checkpoint(part, state[rows], use_reentrant=False)
            total = total + plan.weights[k] * loss
            sums[k] += loss.detach()
            overlaps[k] += overlap
            hits[k, rows] = hit
    return total, sums, overlaps, hits


class _Judge(torch.autograd.Function):
    """The loss of logits [C, V'], its gradient made in the forward."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, place: int, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        judged = plan.judge(place, rows, at_least_float32(logits.clone() if logits.itemsize >= 4 else logits))
        ctx.save_for_backward(judged.gradient.to(logits.dtype))
        ctx.mark_non_differentiable(judged.overlap, judged.hits)
        return judged.loss, judged.overlap, judged.hits

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return None, None, None, gradient * upstream


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; in half precision the products of each chunk are rounded, their sum is not."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _tallies(plan: _Plan, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [K], overlaps [K] and hits [K, N], all nothing so far."""
    depths = len(plan.weights)
    sums = torch.zeros(depths, dtype=dtype, device=device)
    hits = torch.zeros(depths, len(plan.targets[0]), dtype=torch.bool, device=device)
    return sums, torch.zeros_like(sums), hits


def _weighted(plan: _Plan, sums: Tensor) -> Tensor:
    return (sums * sums.new_tensor(plan.weights)).sum()
