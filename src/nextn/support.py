"""Whether a host works with nextn: our own forward and decoding compared with the host's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import logging

from nextn.config import ConfigError
from nextn.quantized import evaluating
from nextn.trunk import HostError, RaggedCache, Trunk, is_out_of_memory, this_thread

logger = logging.get_logger("nextn")
Result = TypeVar("Result")
LENGTHS, NEW = (11, 6), 3  # prompts of a padded batch, and tokens generated: prefill and two decoding steps
NOISE = 8  # how many times the host's own rounding noise a difference may be
# How large a difference may be, in standard deviations of the logits, where the host's own noise is smaller than that.
FLOOR = 1e-4
ROUNDED_FLOOR = 0.25  # bfloat16 and integers round attention and experts differently from pass to pass
# How much a state may change with later tokens, in standard deviations of the logits: experts are computed in groups
# whose size depends on the other tokens, which rounds differently.
AHEAD, ROUNDED_AHEAD = 1e-3, 0.1
# A router that is undecided between two experts may decide differently in each pass, with other tokens not again.
ATTEMPTS = 3


def check_host(trunk: Trunk) -> None:
    """Refuse a host that nextn's own forward does not reproduce.

    A padded batch of two prompts is read and continued by two decoding steps, with our masks and cache and by the
    host's own `generate`, and the logits are compared. What the host does to its logits after the unembedding is
    compared on probe values, since freshly initialised weights give logits that a soft cap hardly changes, and its
    logits must not change with later tokens. Costs nine forwards of 26 tokens or fewer, once for each host.

    Raises:
        HostError: where the host cannot be run so, or its logits differ. For experts in half precision a difference is
            a warning.
    """
    if trunk.is_checked or trunk.device.type == "meta":
        return
    name = type(trunk.model).__name__
    steps = logging.tqdm(total=3, desc="comparing with the host's own generate", delay=2, leave=False)
    with evaluating(trunk.model), torch.no_grad(), steps as bar:
        if not _transform_agrees(trunk):
            raise HostError(
                f"{name} changes its logits after the unembedding in a way that nextn does not know (it knows a scale "
                "and a soft cap); not supported yet."
            )
        bar.update()
        attempts = ATTEMPTS if _is_rounded(trunk.model) else 1
        if all(_sees_ahead(trunk, attempt) for attempt in range(attempts)):
            raise HostError(
                f"{name} lets tokens see later tokens of the prompt (bidirectional attention), so that what is cached "
                "of a prompt depends on what follows; not supported yet."
            )
        bar.update()
        if not any(_is_reproduced(trunk, name, attempt) for attempt in range(attempts)):
            differs = f"nextn's forward of {name} does not give the logits of its own generate"
            if not (attempts > 1 and trunk.experts_per_token):
                raise HostError(f"{differs} (a special case in its masks, positions or caches); not supported yet.")
            logger.warning(
                f"{differs} in {trunk.dtype}. Rounding may route tokens to other experts in each pass; if the texts "
                "with and without heads differ often, compare them in float32."
            )
    trunk.is_checked = True


def _is_reproduced(trunk: Trunk, name: str, attempt: int) -> bool:
    """Whether our forward gives the logits of the host's own `generate`; each attempt has other prompts."""
    prompts = [_probe_ids(trunk, length, 2 * attempt + row) for row, length in enumerate(LENGTHS)]
    tokens, theirs = _one_sentence(f"{name} cannot generate by itself", lambda: _generated(trunk, prompts))
    again = _one_sentence(f"{name} cannot run", lambda: _reread(trunk, prompts, tokens))
    ours = _one_sentence(f"{name} cannot run with nextn's cache and masks", lambda: _ours(trunk, prompts, tokens))
    return _agree(ours, theirs, again, _is_rounded(trunk.model))


def check_heads(name: str, kind: str, run: Callable[[], Result]) -> Result:
    """Refuse heads that cannot be built for a host, or cannot run on it.

    Args:
        run: makes the heads, or a short training forward and a round of drafts.

    Returns:
        what `run` returns.

    Raises:
        HostError: with the reason, where `run` fails.
    """
    advice = "choose another kind of heads, or decode without heads"
    with torch.no_grad():
        return _one_sentence(f"{kind} heads cannot run on {name}", run, advice)


def _one_sentence(what: str, run: Callable[[], Result], advice: str = "not supported yet") -> Result:
    """run(); whatever a host's own code raises becomes a HostError, but for missing memory."""
    try:
        return run()
    except (HostError, ConfigError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".:")
        raise HostError(f"{what} ({type(error).__name__}: {reason}); {advice}.") from error


def _is_rounded(model: nn.Module) -> bool:
    """Whether some weights are less exact than float32: in half precision, or quantized."""
    return any(parameter.dtype not in (torch.float32, torch.float64) for parameter in model.parameters())


def _probe_ids(trunk: Trunk, length: int, start: int) -> Tensor:
    """Ids of the second quarter of the vocabulary [length]: special, image and audio tokens are first or last."""
    quarter = max(1, trunk.vocab_size // 4)
    return (torch.arange(length, device=trunk.device) * 7 + 3 + start) % quarter + trunk.vocab_size // 4


def _generated(trunk: Trunk, prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The host's own greedy continuation of left-padded prompts: tokens [2, NEW] and logits [2, NEW, V].

    By a shallow copy without a generation config of its own: `generate` would take over what that says of stop strings,
    guidance, static caches and assistants, and would warn of the rest.
    """
    longest = max(map(len, prompts))
    ids = torch.stack([nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([nn.functional.pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    model: Any = copy.copy(trunk.model)
    model.generation_config = GenerationConfig()
    found = model.generate(ids, attention_mask=mask, generation_config=config)
    return found.sequences[:, longest:], torch.stack(found.logits, dim=1).float()


def _reread(trunk: Trunk, prompts: list[Tensor], tokens: Tensor) -> Tensor:
    """The same logits by the host's own forward over each whole text, without a cache; the difference is noise."""
    texts = [torch.cat([prompt, new[:-1]]) for prompt, new in zip(prompts, tokens, strict=True)]
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # later tokens change nothing, see `_sees_ahead`
    logits = trunk.model(input_ids=ids, use_cache=False).logits.float()
    return torch.stack([logits[row, len(text) - NEW : len(text)] for row, text in enumerate(texts)])


def _ours(trunk: Trunk, prompts: list[Tensor], tokens: Tensor) -> Tensor:
    """The same logits by nextn: a ragged prefill, then one token a step."""
    cache = RaggedCache(trunk.cache_layers, len(prompts), max(LENGTHS) + NEW)
    counts = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
    ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    places = torch.arange(ids.shape[1], device=tokens.device)
    positions = torch.where(places < counts[:, None], places, -1)
    rows = torch.arange(len(prompts), device=tokens.device)
    hidden, _ = trunk.run(ids, positions, cache.place(positions), cache)
    logits = [trunk.logits(hidden[rows, counts - 1])]
    for step in range(NEW - 1):
        positions = (counts + step)[:, None]
        hidden, _ = trunk.run(tokens[:, step : step + 1], positions, cache.place(positions), cache)
        logits.append(trunk.logits(hidden[:, 0]))
    return torch.stack(logits, dim=1).float()


def _agree(ours: Tensor, theirs: Tensor, again: Tensor, is_rounded: bool) -> bool:
    """Whether logits [2, NEW, V] are the host's, up to the noise between two of its own passes."""
    finite = theirs.isfinite()  # some hosts forbid tokens
    if not finite.equal(ours.isfinite()):
        return False
    spread = theirs[finite].std()
    floor = (ROUNDED_FLOOR if is_rounded else FLOOR) * spread
    noise = (again - theirs)[finite & again.isfinite()].abs().max()
    return bool((ours - theirs)[finite].abs().max() <= torch.maximum(NOISE * noise, floor))


def _sees_ahead(trunk: Trunk, attempt: int) -> bool:
    """Whether a token's logits depend on later tokens (PaliGemma): two rows that differ in their second half."""
    length = max(LENGTHS)
    ids = torch.stack([_probe_ids(trunk, length, 2 * attempt + row) for row in range(2)])
    ids[1, : length // 2] = ids[0, : length // 2]
    name = type(trunk.model).__name__
    logits = _one_sentence(f"{name} cannot run", lambda: trunk.model(input_ids=ids, use_cache=False).logits.float())
    logits = logits[:, : length // 2]
    finite = logits.isfinite().all(dim=0)
    allowed = (ROUNDED_AHEAD if _is_rounded(trunk.model) else AHEAD) * logits[:, finite].std()
    return bool((logits[0] - logits[1])[finite].abs().max() > allowed)


def _transform_agrees(trunk: Trunk) -> bool:
    """Whether our logit transform is the host's, on probe values put in place of what its unembedding gives."""
    unembedding, thread = trunk.unembedding, this_thread()
    seen: list[Tensor] = []

    def probe(_module: nn.Module, _args: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or this_thread() != thread:
            return None
        values = torch.linspace(-100, 100, output.numel(), device=output.device, dtype=torch.float32)
        seen.append(values.view(output.shape).to(output.dtype))
        return seen[-1]

    ids = _probe_ids(trunk, 3, 0)[None]
    handle = unembedding.register_forward_hook(probe)
    try:
        name = type(trunk.model).__name__
        theirs = _one_sentence(f"{name} cannot run", lambda: trunk.model(input_ids=ids, use_cache=False).logits)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise HostError(f"{type(trunk.model).__name__} does not call its unembedding once in a forward; not supported.")
    ours = trunk.transform.after_unembedding(seen[0])
    return ours.shape == theirs.shape and torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-3)
