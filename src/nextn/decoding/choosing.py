"""What each row chooses in its own way: scores after its processors, its noise, its rejection of drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nextn.decoding.drafting import Asked, Drafts
from nextn.decoding.rows import Row
from nextn.decoding.sampling import DRAFT, RESIDUAL, STANDS, Sampling, gumbel, keys, uniform
from nextn.decoding.tree import Chances
from nextn.decoding.verify import Draw, accept_by_rejection, accept_greedy, chosen

FEW = 0.3  # of all tokens; a CPU picks so few out faster than it gives noise to all
ROUND = 256  # more than any number of drafts: (position, draft) as one number

Between = Sequence[Sequence[Sequence[int]]]
DrawOne = Callable[[Tensor, Tensor, Tensor], Tensor]  # see `Draw`


def decide(
    rows: Sequence[Row | None], drafts: Drafts, logits: Tensor, lengths: Tensor, draw: DrawOne | None, keep_scores: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What each row chooses in its own way after its pending token and after each draft of a chain.

    Args:
        logits: the trunk's [B, W, V].
        lengths: where in their texts the pending tokens stand [B].
        draw: what `Draw` was compiled to; None where it was not.
        keep_scores: whether the scores are wanted.

    Returns:
        the run [B, W], of which accepted + 1 tokens are emitted; accepted [B]; the scores [B, W, V], None where nobody
        needed them.
    """
    tokens, width = drafts.tokens, logits.shape[1]
    at = lengths[:, None] + 1 + torch.arange(width, device=logits.device)
    if draw is not None and not keep_scores and all(row is None or row.sampling.scale is not None for row in rows):
        run = choose_in_turn(rows, logits, at, tokens, draw)
        return run, accept_greedy(tokens, run), None
    branches: list[list[list[int]]] = []
    if any(row is not None and row.sampling.reads_text for row in rows):
        branches = [[row[:place] for place in range(width)] for row in tokens.clamp(min=0).tolist()]
    run, scores = choose(rows, logits, at, branches, draw)
    accepted = accept_greedy(tokens, run)
    if width > 1:
        reject(rows, drafts, scores, run, accepted)
    return run, accepted, scores


def choose(
    rows: Sequence[Row | None],
    logits: Tensor,
    at: Tensor,
    branches: Between,
    draw: DrawOne | None = None,
) -> tuple[Tensor, Tensor]:
    """The trunk's choices [B, W] from logits [B, W, V], and the scores that they were made by.

    Args:
        at: the places in the text of the tokens that are chosen [B, W].
        branches: see `scores_of`.
        draw: what `Draw` was compiled to.
    """
    scores = scores_of(rows, logits, branches)
    # What rejection decides over the drafts of needs no noise here.
    drawing = [
        row is not None and row.sampling.by_chance and not (row.sampling.rejects and at.shape[1] > 1) for row in rows
    ]
    if not any(drawing):
        return chosen(scores), scores
    return _drawn(scores, keys(_seeds(rows, at.device), at), drawing, draw), scores


def choose_in_turn(
    rows: Sequence[Row | None],
    logits: Tensor,
    at: Tensor,
    drafts: Tensor,
    draw: DrawOne,
) -> Tensor:
    """As `choose`, where temperatures are all that is asked; a token behind a draft that fails is not drawn, but 0.

    Args:
        drafts: [B, W-1], see `accept_greedy`.
    """
    key, tokens = keys(_seeds(rows, at.device), at), torch.zeros_like(at)
    for slot, row in enumerate(rows):
        if row is None or not row.sampling.scale:
            tokens[slot] = chosen(logits[slot])
            continue
        temperature = torch.tensor(row.sampling.scale, dtype=torch.float32)
        for place, draft in enumerate([*drafts[slot].tolist(), -1]):
            tokens[slot, place] = token = draw(logits[slot, place], temperature, key[slot, place])
            if int(token) != draft:
                break
    return tokens


def _drawn(scores: Tensor, key: Tensor, drawing: Sequence[bool], draw: DrawOne | None) -> Tensor:
    """Tokens [B, W] by scores [B, W, V] and the noise of keys [B, W]; the best ones where a row does not draw."""
    # Noise lies between -2.9 and 22.2: nothing that is further behind the best token can win.
    likely = scores > scores.amax(dim=-1, keepdim=True) - 25.2
    likely &= torch.tensor(drawing, device=key.device)[:, None, None]
    if scores.is_cuda or int(likely.count_nonzero()) < FEW * likely.numel():
        row, place, token = likely.nonzero(as_tuple=True)
        noise = gumbel(key[row, place], token[:, None])[:, 0]
        return chosen(scores.index_put((row, place, token), noise, accumulate=True))
    # One vocabulary after the other stays in a CPU's cache, and needs no fresh memory for each operation.
    tokens = torch.empty_like(key) if all(drawing) else chosen(scores)
    draw_one, as_they_are = draw or Draw(), torch.ones((), dtype=torch.float32)
    for slot in (slot for slot, draws in enumerate(drawing) if draws):
        for at in range(key.shape[1]):
            tokens[slot, at] = draw_one(scores[slot, at], as_they_are, key[slot, at])
    return tokens


def scores_of(rows: Sequence[Row | None], logits: Tensor, branches: Between) -> Tensor:
    """Logits of all rows [B, W, V] -> scores after each row's processors, float32.

    A row whose processors raise ends with that error; its scores mean nothing.

    Args:
        branches: for each row and place, the tokens between the row's text and the token that is chosen there.
    """
    groups: dict[tuple, list[int]] = {}
    for slot, row in enumerate(rows):
        if row is not None and row.sampling.all_processors:
            groups.setdefault(row.sampling.settings, []).append(slot)
    scores = logits.to(torch.float32, copy=bool(groups))
    for slots in groups.values():
        try:
            scores[slots] = _processed(rows, logits, branches, slots)
        except Exception as error:  # a stranger's function may raise anything
            if len(slots) == 1:
                rows[slots[0]].fail(error)  # type: ignore[union-attr]
                continue
            for slot in slots:  # find out whose: one that is called again remembers nothing
                try:
                    scores[slot] = _processed(rows, logits, branches, [slot])[0]
                except Exception as own:
                    rows[slot].fail(own)  # type: ignore[union-attr]
    return scores


def _processed(rows: Sequence[Row | None], logits: Tensor, branches: Between, slots: list[int]) -> Tensor:
    members = [row for slot in slots if (row := rows[slot]) is not None]
    sampling = members[0].sampling
    texts: list[list[Tensor]] = []
    if sampling.reads_text:
        for slot, row in zip(slots, members, strict=True):
            text = row.text
            texts.append([torch.tensor(text + list(branch), device=logits.device) for branch in branches[slot]])
    return sampling.scores(logits[slots], texts)


def reject(rows: Sequence[Row | None], drafts: Drafts, scores: Tensor, run: Tensor, accepted: Tensor) -> None:
    """Decide over the drafts of those rows that do so by rejection; `run` [B, W] and `accepted` [B] are written."""
    slots = [slot for slot, row in enumerate(rows) if row is not None and row.sampling.rejects]
    if not slots:
        return
    members = [row for slot in slots if (row := rows[slot]) is not None]
    tokens, p = drafts.tokens[slots], scores[slots].softmax(dim=-1)
    if drafts.drawn_from is None:
        q = torch.zeros_like(p[:, :-1]).scatter(2, tokens.clamp(min=0)[..., None], 1.0)
    else:
        q = drafts.drawn_from[slots]
        usable = q.isfinite().all(dim=-1).long().cumprod(dim=1).bool()  # broken heads: no drafts
        tokens = torch.where(usable, tokens, -1)
        q = torch.where(usable[..., None], q, 0)
    rounds, seeds = _rounds(members, tokens.shape[1], tokens.device), _seeds(members, tokens.device)
    numbers = uniform(keys(seeds, rounds, STANDS))
    for block in (False, True):
        so = [place for place, row in enumerate(members) if row.sampling.block is block]
        if not so:
            continue
        count, rest = accept_by_rejection(p[so], q[so], tokens[so], numbers[so], block)
        vocabulary = torch.arange(rest.shape[-1], device=rest.device)
        noise = gumbel(keys(seeds[so], rounds[so][:, :1], RESIDUAL)[:, 0], vocabulary)
        those = [slots[place] for place in so]
        run[those, :-1] = tokens[so]
        run[those, count] = chosen(rest.log() + noise)
        accepted[those] = count


def asked(rows: Sequence[Row | None], drafts: int, wanted: Asked, device: torch.device) -> Asked:
    """The kind of drafts that the samplings of some rows call for.

    Args:
        drafts: n - 1.
        wanted: says what shape they have.
    """
    noisy = [row is not None and _draws_drafts(row.sampling) for row in rows]
    if not any(noisy):
        return wanted
    temperatures = [
        row.sampling.draft_temperature if row and draws else 0.0 for row, draws in zip(rows, noisy, strict=True)
    ]
    seeds = _seeds(rows, device)
    at = torch.tensor([[row.length] if row else [0] for row in rows], device=device)
    noise = keys(seeds, at + torch.arange(drafts, device=device))
    rejects = [bool(row and row.sampling.rejects) for row in rows]
    if any(rejects):
        apart = keys(seeds, _rounds(rows, drafts, device), DRAFT)
        noise = torch.where(torch.tensor(rejects, device=device)[:, None], apart, noise)
    return replace(wanted, chances=Chances(torch.tensor(temperatures, device=device), noise), drawn=any(rejects))


def _draws_drafts(sampling: Sampling) -> bool:
    return sampling.by_chance and (not sampling.rejects or sampling.sampled_drafts)


def _seeds(rows: Sequence[Row | None], device: torch.device) -> Tensor:
    return torch.tensor([row.seed if row else 0 for row in rows], device=device)


def _rounds(rows: Sequence[Row | None], drafts: int, device: torch.device) -> Tensor:
    """A number for each draft of this step of some rows [B, drafts], which no other step has."""
    at = torch.tensor([[row.length if row else 0] for row in rows], device=device)
    return at * ROUND + torch.arange(drafts, device=device)
