"""transformers' `generate`, with the step done by the engine: its config, processors, criteria and outputs.

`model.generate(..., custom_generate=nextn.custom_generate, heads=with_heads)` on a stock model; what transformers
prepares for its own loops (logits processors, stopping criteria, the generation config) is taken as it is.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput

from nextn.decoding.engine import Engine, Generation, PromptError
from nextn.decoding.sampling import Method, Sampling
from nextn.decoding.tree import Tree

logger = logging.getLogger(__name__)

# What transformers counts from the beginning of a padded row, by the attribute that holds the count.
_COUNTED = {
    "MinNewTokensLengthLogitsProcessor": "prompt_length_to_skip",
    "ForcedEOSTokenLogitsProcessor": "max_length",
    "ExponentialDecayLengthPenalty": "regulation_start",
    "SuppressTokensAtBeginLogitsProcessor": "begin_index",
    "RepetitionPenaltyLogitsProcessor": "prompt_ignore_length",
}


class GenerateError(ValueError):
    """A call of generate that cannot be answered; the message says why."""


class WithHeads(Protocol):
    """What `custom_generate` needs of a `MultiTokenModel`."""

    base: PreTrainedModel

    def engine(
        self, rows: int, heads: int | None = None, stop_tokens: Sequence[int] | None = None, **settings: Any
    ) -> Engine:
        """See `MultiTokenModel.engine`."""

    def fingerprint(self) -> Any:
        """Changes with the weights."""

    def compiled(self, engine: Engine, heads: int | None, sampling: bool) -> Engine:
        """See `MultiTokenModel.compiled`."""


class KeptTexts(Cache):
    """What an engine has read, for the next turn: hand it on as `past_key_values`, with the whole text as input_ids.

    What the next texts have in common with these is not read again; nothing is taken for granted.
    """

    def __init__(self, engine: Engine, made_by: Any) -> None:
        super().__init__(layers=[])
        self.engine, self.made_by = engine, made_by

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # for transformers, which would count on what it holds

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise GenerateError("This cache is nextn's; give it to a generate with nextn's heads.")


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    generation_config: GenerationConfig,
    heads: WithHeads | None = None,
    plain: bool = False,
    seed: int | None = None,
    sampling_method: Method = "coupled",
    token_streamer: Any = None,
    depth: int | str | None = "auto",
    tree: Tree | None = None,
    compile: bool = False,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """What `model.generate(custom_generate=nextn.custom_generate, heads=...)` calls.

    Args:
        input_ids: prompts [B, T], padded on either side where the attention mask is 0.
        heads: a `MultiTokenModel` whose base this model is.
        plain: without drafts.
        seed: of the first prompt, where tokens are sampled; the next prompts' are one more each. Default: drawn from
            PyTorch's own generator.
        sampling_method: see `Sampling`.
        token_streamer: a transformers streamer (batch 1). transformers keeps one that is called `streamer` from us.
        depth, tree: see `Engine`.
        compile: see `MultiTokenModel.generate`.

    Returns:
        sequences [B, T + new], shorter ones filled with the padding token; or with `return_dict_in_generate` a
        `GenerateDecoderOnlyOutput`, whose `past_key_values` are for the next turn. Scores after a row's end are 0.

    Raises:
        GenerateError: for what this way of decoding cannot give: beams, attentions, hidden states.
        PromptError, SamplingError, TreeError: see `Engine.generate`.
    """
    if heads is None or getattr(heads, "base", None) is not model:
        raise GenerateError(
            "custom_generate needs heads that are attached to this very model: pass heads=nextn.attach(model, ...), or "
            "nextn.load of a directory and generate with its base."
        )
    ends = [each.max_length for each in stopping_criteria if type(each).__name__ == "MaxLengthCriteria"]
    begun, mask = input_ids.shape[1], model_kwargs.get("attention_mask")
    new = min([generation_config.max_length, *ends]) - begun
    _refuse(generation_config, input_ids, mask, token_streamer, new)
    mask = torch.ones_like(input_ids) if mask is None else mask
    prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
    padding = [begun - len(prompt) for prompt in prompts]
    stop_tokens, criteria = _stops(stopping_criteria, input_ids.device)
    keep_scores = bool(
        generation_config.return_dict_in_generate
        and (generation_config.output_scores or generation_config.output_logits)
    )
    keep = bool(generation_config.return_dict_in_generate and generation_config.use_cache)
    texts = _texts(model_kwargs.get("past_key_values"), heads, len(prompts), keep, plain, depth, tree)
    engine = texts.engine
    if compile:
        chance = bool(logits_processor) or keep_scores or _samples(generation_config)
        heads.compiled(engine, 1 if plain else None, chance)
    engine.stop_tokens = frozenset(stop_tokens)
    if token_streamer is not None:
        token_streamer.put(input_ids.cpu())
    results = dict(
        engine.generate(
            prompts,
            max_new_tokens=new,
            on_tokens=_streaming(token_streamer),
            sampling=_samplings(generation_config, logits_processor, seed, sampling_method, padding),
            stop=criteria,
            keep_scores=keep_scores,
        )
    )
    found = [results[index] for index in range(len(prompts))]
    if (error := next((each.error for each in found if each.error is not None), None)) is not None:
        raise error
    if token_streamer is not None:
        token_streamer.end()
    return _output(found, input_ids, generation_config, min(stop_tokens, default=0), texts)


def _output(
    found: Sequence[Generation], input_ids: Tensor, config: GenerationConfig, otherwise: int, texts: KeptTexts
) -> Tensor | GenerateDecoderOnlyOutput:
    """What transformers' users expect; `otherwise` fills up short rows where there is no padding token."""
    pad = getattr(config, "_pad_token_tensor", None)
    tokens = [torch.tensor(each.tokens, device=input_ids.device) for each in found]
    filled = pad_sequence(tokens, batch_first=True, padding_value=otherwise if pad is None else int(pad))
    sequences = torch.cat([input_ids, filled], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=_by_step(found, "scores") if config.output_scores else None,  # type: ignore[arg-type]
        logits=_by_step(found, "logits") if config.output_logits else None,  # type: ignore[arg-type]
        past_key_values=texts if config.use_cache else None,
    )


def _refuse(config: GenerationConfig, input_ids: Tensor, mask: Tensor | None, streamer: Any, new: int) -> None:
    whole = input_ids.shape[1] if mask is None else mask.shape[1]
    for wrong, why in (
        ((config.num_beams or 1) > 1, "nextn decodes one text a row, not beams: leave num_beams out."),
        (getattr(config, "dola_layers", None), "nextn does not contrast layers: leave dola_layers out."),
        (new < 1, f"There is room for {new} new tokens; max_new_tokens must be at least 1, or max_length larger."),
        (config.output_attentions, "nextn does not collect attentions: leave output_attentions out."),
        (config.output_hidden_states, "nextn does not collect hidden states: leave output_hidden_states out."),
        (input_ids.shape[1] == 0, "nextn needs token ids: give input_ids, not inputs_embeds."),
        (
            max(whole, getattr(config, "_mask_length", None) or 0) != input_ids.shape[1],
            "With a cache of an earlier turn, give the whole text as input_ids; what was read is not read again.",
        ),
        (streamer is not None and len(input_ids) > 1, "A streamer follows one prompt only; generate them one by one."),
    ):
        if wrong:
            raise GenerateError(why)


def _texts(
    past: Any, heads: WithHeads, rows: int, keep: bool, plain: bool, depth: int | str | None, tree: Tree | None
) -> KeptTexts:
    """A new engine, or that of an earlier turn with what it has read, if it would be made the same way today."""
    made_by = (id(heads), plain, depth, tree, heads.fingerprint())
    if isinstance(past, KeptTexts):
        if past.engine.rows == rows and past.made_by == made_by:
            return past
        logger.warning("The cache is of other weights, settings or rows: the texts are read anew.")
    elif past is not None and past.get_seq_length() > 0:
        logger.warning(
            "The cache is not nextn's, so the texts are read anew; pass on what generate returns as past_key_values."
        )
    drafting: dict[str, Any] = {} if plain else {"depth": depth, "tree": tree}
    return KeptTexts(heads.engine(rows, 1 if plain else None, keep=keep, **drafting), made_by)


def _samples(config: GenerationConfig) -> bool:
    return bool(config.do_sample)


def _samplings(
    config: GenerationConfig, processors: Sequence[Any], seed: int | None, method: Method, padding: Sequence[int]
) -> list[Sampling]:
    """How each prompt's tokens are chosen; `processors` hold the temperature and its kin."""
    if seed is None:
        seed = int(torch.randint(2**60, (1,))) if _samples(config) else 0
    common = Sampling(float(_samples(config)), processors=tuple(processors), method=method)
    by_padding = {
        pads: replace(common, processors=tuple(_moved(each, pads, config) for each in processors))
        for pads in set(padding)
    }
    return [replace(by_padding[pads], seed=seed + place) for place, pads in enumerate(padding)]


def _moved(processor: Any, pads: int, config: GenerationConfig) -> Any:
    """A processor that counts from the beginning of a padded row, for the row without its padding."""
    kind = type(processor).__name__
    name = _COUNTED.get(kind)
    if kind == "MinLengthLogitsProcessor" and config.min_new_tokens is not None:
        name = "min_length"
    counted = None if name is None else getattr(processor, name, None)
    if name is None or counted is None or (not pads and not isinstance(counted, Tensor)):
        return processor
    own = copy.copy(processor)
    # A tensor holds the padding of each row, which is not there any more.
    setattr(own, name, None if isinstance(counted, Tensor) else max(0, counted - pads))
    return own


def _stops(criteria: Sequence[Any], device: torch.device) -> tuple[set[int], Callable[[int, list[int]], bool] | None]:
    """The end tokens among stopping criteria, and a function that asks the others but for the length."""
    ends: set[int] = set()
    others: list[Any] = []
    for each in criteria:
        if type(each).__name__ == "EosTokenCriteria":
            ends |= set(each.eos_token_id.flatten().tolist())
        elif type(each).__name__ != "MaxLengthCriteria":
            others.append(each)

    def stop(_index: int, text: list[int]) -> bool:
        ids = torch.tensor([text], device=device)
        return any(bool(torch.as_tensor(each(ids, None)).any()) for each in others)

    return ends, stop if others else None


def _streaming(streamer: Any) -> Callable[[int, list[int], list[int]], None] | None:
    if streamer is None:
        return None

    def stream(_index: int, tokens: list[int], _origins: list[int]) -> None:
        for token in tokens:
            streamer.put(torch.tensor([token]))

    return stream


def _by_step(found: Sequence[Generation], name: str) -> tuple[Tensor, ...]:
    """What is kept of all rows, token by token [B, V]; 0 for a row that has ended."""
    longest = max(len(each.tokens) for each in found)
    none = torch.zeros_like(getattr(found[0], name)[0])
    rows = [getattr(each, name) + [none] * (longest - len(each.tokens)) for each in found]
    return tuple(torch.stack(step) for step in zip(*rows, strict=True))


__all__ = ["GenerateError", "KeptTexts", "PromptError", "custom_generate"]
