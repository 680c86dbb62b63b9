"""transformers' `generate`, with the step done by the engine: its config, processors, criteria and outputs.

`model.generate(..., custom_generate=nextn.custom_generate, heads=with_heads)` on a stock model; what transformers
prepares for its own loops (logits processors, stopping criteria, the generation config) is taken as it is.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin

from nextn.decoding.engine import Engine, Generation, PromptError
from nextn.decoding.generation_config import DRAFTS, GenerateError, refuse
from nextn.decoding.sampling import Method, Sampling, prompt_seeds
from nextn.decoding.stats import Logprob, SpecDecodingStats
from nextn.decoding.tree import Tree

logger = logging.getLogger(__name__)

# What `generate` of this version of transformers calls the cache that it takes and returns: `cache` from 5.24 on.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(GenerateDecoderOnlyOutput)})

# What transformers counts from the beginning of a padded row, by the attribute that holds the count.
_COUNTED = {
    "MinLengthLogitsProcessor": "min_length",
    "MinNewTokensLengthLogitsProcessor": "prompt_length_to_skip",
    "ForcedEOSTokenLogitsProcessor": "max_length",
    "ExponentialDecayLengthPenalty": "regulation_start",
    "SuppressTokensAtBeginLogitsProcessor": "begin_index",
    "RepetitionPenaltyLogitsProcessor": "prompt_ignore_length",
}

# Stopping criteria of transformers that look at each row by itself.
_OF_EACH_ROW = {"StopStringCriteria", "MaxTimeCriteria"}
# What transformers' `generate` prepares for its own loops, and what is the engine's own business here.
_MODEL_ARGUMENTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHE_NAMES}


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


@dataclass
class MultiTokenGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate`, beside what transformers has in it.

    spec_decoding_stats: by row, how many tokens were drafted and accepted.
    logprobs: by row and new token, its log-probability and those of the most probable tokens, by token id; None where
        `logprobs` was not given.
    """

    spec_decoding_stats: list[SpecDecodingStats] | None = None
    logprobs: list[list[dict[int, Logprob]]] | None = None


class KeptTexts(Cache):
    """What an engine has read, for the next turn: pass it to `generate` as `cache`, with the whole text as input_ids.

    Before transformers 5.24 that argument is called `past_key_values`, which newer versions still accept. What the next
    texts have in common with these is not read again; nothing is taken for granted.
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
    logprobs: int | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """What `model.generate(custom_generate=nextn.custom_generate, heads=...)` calls.

    Args:
        input_ids: prompts [B, T], padded on either side where the attention mask is 0.
        generation_config: see `generation_config.FIELDS` for what is honoured and what is refused.
        heads: a `MultiTokenModel` whose base this model is.
        plain: without drafts.
        seed: of the first prompt, where tokens are sampled; those of the others are derived from it, see
            `prompt_seeds`. Default: drawn from PyTorch's own generator.
        sampling_method: see `Sampling`.
        token_streamer: a transformers streamer (batch 1), another name for `streamer`.
        depth, tree: see `Engine`.
        compile: see `MultiTokenModel.generate`.
        logprobs: with `return_dict_in_generate`, log-probabilities of the tokens, see `Sampling`.

    Returns:
        sequences [B, T + new], shorter ones filled with the padding token; or with `return_dict_in_generate` a
        `MultiTokenGenerateOutput`, whose `cache` (before transformers 5.24: `past_key_values`) is for the next turn.
        Scores after a row's end are 0.

    Raises:
        GenerateError: for what this way of decoding cannot give: beams, attentions, hidden states.
        PromptError, SamplingError, TreeError: see `Engine.generate`.
    """
    if heads is None or getattr(heads, "base", None) is not model:
        raise GenerateError(
            "custom_generate needs heads that are attached to this very model: pass heads=nextn.attach(model, ...), or "
            "nextn.load of a directory and generate with its base."
        )
    called_with = _arguments_of_generate()
    streamer = called_with.get("streamer") if token_streamer is None else token_streamer
    ends = [each.max_length for each in stopping_criteria if type(each).__name__ == "MaxLengthCriteria"]
    new = math.ceil(min([generation_config.max_length, *ends])) - input_ids.shape[1]
    refuse(generation_config)
    _refuse_arguments(called_with)
    _refuse(generation_config, input_ids, model_kwargs, streamer, new)
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
    padding = [input_ids.shape[1] - len(prompt) for prompt in prompts]
    stop_tokens, stop, batch_criteria = _stops(stopping_criteria, input_ids, padding)
    if logprobs is not None and not generation_config.return_dict_in_generate:
        raise GenerateError("logprobs are part of the output of return_dict_in_generate=True: give that, too.")
    keep_scores = bool(
        generation_config.return_dict_in_generate
        and (generation_config.output_scores or generation_config.output_logits)
    )
    keep = bool(generation_config.return_dict_in_generate and generation_config.use_cache)
    past = next((model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None), None)
    texts = _texts(past, heads, len(prompts), keep, plain, depth, tree)
    engine = texts.engine
    if compile:
        chance = bool(logits_processor) or keep_scores or _samples(generation_config) or logprobs is not None
        heads.compiled(engine, 1 if plain else None, chance)
    engine.stop_tokens = frozenset(stop_tokens)
    pad = _padding_token(generation_config, stop_tokens)
    judge = BatchCriteria(batch_criteria, input_ids, pad) if batch_criteria else None
    if token_streamer is not None:  # transformers has shown the prompt to a `streamer` of its own
        token_streamer.put(input_ids.cpu())
    steps = engine.stepwise(
        prompts,
        max_new_tokens=new,
        on_tokens=_streaming(streamer) if judge is None else judge.add,
        sampling=_samplings(generation_config, logits_processor, seed, sampling_method, padding, logprobs),
        stop=stop,
        keep_scores=keep_scores,
    )
    results = _results(steps, engine, judge)
    found = [results[index] for index in range(len(prompts))]
    if (error := next((each.error for each in found if each.error is not None), None)) is not None:
        raise error
    if streamer is not None:
        streamer.end()
    return _output(found, input_ids, generation_config, pad, texts, logprobs is not None)


def check_inputs(input_ids: Any, attention_mask: Any = None) -> None:
    """Refuse what is not token ids [B, T] or their mask, on which transformers would fail deep inside.

    Args:
        attention_mask: of the same shape; None where there is none.

    Raises:
        GenerateError: says what to give instead.
    """
    texts = [input_ids] if isinstance(input_ids, str) else input_ids
    if isinstance(texts, list | tuple) and any(isinstance(each, str) for each in texts):
        raise GenerateError(
            "generate takes token ids, not text: encode it first, inputs = tokenizer(text, return_tensors='pt'), and "
            "call generate(**inputs)."
        )
    if isinstance(input_ids, Mapping):
        raise GenerateError("The inputs are given as one mapping: pass its parts by name, generate(**inputs).")
    if not isinstance(input_ids, Tensor):
        raise GenerateError(f"input_ids is a {type(input_ids).__name__}; give a tensor of token ids [B, T].")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool or input_ids.ndim != 2:
        name = str(input_ids.dtype).removeprefix("torch.")
        raise GenerateError(
            f"input_ids has the shape {list(input_ids.shape)} and the dtype {name}; give token ids [B, T] as integers."
        )
    if attention_mask is None:
        return
    shape: Sequence[int] = getattr(attention_mask, "shape", ())  # too wide: see `_refuse`
    if len(shape) != 2 or shape[0] != input_ids.shape[0] or shape[1] < input_ids.shape[1]:
        raise GenerateError("attention_mask is no tensor of the shape of input_ids [B, T]: pass the tokenizer's own.")


def _arguments_of_generate() -> dict[str, Any]:
    """The arguments of the `generate` that called us: transformers keeps some of them from custom functions.

    A `streamer` would stay silent and an `assistant_model` unused, so they are read where `generate` has them.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return {} if frame is None else dict(frame.f_locals)


def _results(
    steps: Iterator[list[tuple[int, Generation]]], engine: Engine, judge: BatchCriteria | None
) -> dict[int, Generation]:
    """All texts, cut where criteria that look at the whole batch end them."""
    results: dict[int, Generation] = {}
    with closing(steps):  # type: ignore[type-var]
        for finished in steps:
            results.update(finished)
            if judge is not None:
                for row in judge.ended(results):
                    engine.cancel(row)
    if judge is not None:
        for row, result in results.items():
            judge.cut(row, result)
    return results


class BatchCriteria:
    """Stopping criteria that look at all rows of a batch, asked as transformers asks them: once for each column.

    Rows with drafts are at different lengths, so a column is judged when every row that still runs has a token for it.
    A row that was ahead is cut where a criterion ended it.

    Args:
        criteria: stopping criteria of transformers, those of end tokens and length left out.
        input_ids: the prompts with their padding [B, T].
        pad: follows the end of a row.
    """

    def __init__(self, criteria: Sequence[Any], input_ids: Tensor, pad: int) -> None:
        self._criteria, self._ids, self._pad = StoppingCriteriaList(criteria), input_ids, pad
        self._tokens: list[list[int]] = [[] for _ in input_ids]
        self._ends: dict[int, int] = {}  # how many tokens a row has that has ended
        self._judged = 0  # columns

    def add(self, row: int, tokens: list[int], _origins: list[int]) -> None:
        """Take note of the next tokens of a row."""
        self._tokens[row] += tokens

    def ended(self, finished: dict[int, Generation]) -> list[int]:
        """Judge the columns that are whole; the rows that criteria have ended.

        Args:
            finished: the rows that have ended by themselves.
        """
        ended: list[int] = []
        for row, result in finished.items():
            self._ends.setdefault(row, len(result.tokens))
        while running := [row for row in range(len(self._tokens)) if self._ends.get(row, sys.maxsize) > self._judged]:
            if any(len(self._tokens[row]) == self._judged for row in running):
                break
            column = [self._tokens[row][self._judged] if row in running else self._pad for row in range(len(self._ids))]
            self._ids = torch.cat([self._ids, torch.tensor(column, device=self._ids.device)[:, None]], dim=1)
            self._judged += 1
            stops = self._criteria(self._ids, None)
            ended += (now := [row for row in running if stops[row]])
            self._ends |= dict.fromkeys(now, self._judged)
        return ended

    def cut(self, row: int, result: Generation) -> None:
        """Take back the tokens after a row's end."""
        result.cut(self._ends[row])


def _output(
    found: Sequence[Generation],
    input_ids: Tensor,
    config: GenerationConfig,
    pad: int,
    texts: KeptTexts,
    keeps_logprobs: bool,
) -> Tensor | GenerateDecoderOnlyOutput:
    """What transformers' users expect."""
    tokens = [torch.tensor(each.tokens, device=input_ids.device) for each in found]
    filled = pad_sequence(tokens, batch_first=True, padding_value=pad)
    sequences = torch.cat([input_ids, filled], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    return MultiTokenGenerateOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=_by_step(found, "scores") if config.output_scores else None,  # type: ignore[arg-type]
        logits=_by_step(found, "logits") if config.output_logits else None,  # type: ignore[arg-type]
        spec_decoding_stats=[each.spec_decoding_stats for each in found],
        logprobs=[each.logprobs for each in found] if keeps_logprobs else None,
        **{CACHE_NAME: texts if config.use_cache else None},  # type: ignore[arg-type]
    )


def _padding_token(config: GenerationConfig, stop_tokens: set[int]) -> int:
    """What follows the end of a row; an end token where there is no padding token."""
    pad = getattr(config, "_pad_token_tensor", None)
    return min(stop_tokens, default=0) if pad is None else int(pad)


def _refuse_arguments(called_with: dict[str, Any]) -> None:
    """Refuse arguments of `generate` that transformers drops in front of a custom function."""
    for name, why in (
        ("assistant_model", DRAFTS),
        ("synced_gpus", "each process decodes by itself"),
    ):
        if called_with.get(name):
            raise GenerateError(f"{name} is given, but {why}: leave {name} out.")
    negative = called_with.get("negative_prompt_ids")
    if negative is not None and len(negative) > 1:
        raise GenerateError("negative_prompt_ids are given for several prompts: generate prompts one by one.")


def _refuse(config: GenerationConfig, input_ids: Tensor, given: dict[str, Any], streamer: Any, new: int) -> None:
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    whole = input_ids.shape[1] if mask is None else mask.shape[1]
    unused = sorted(name for name, value in given.items() if name not in _MODEL_ARGUMENTS and not _is_empty(value))
    for wrong, why in (
        (new < 1, f"There is room for {new} new tokens; max_new_tokens must be at least 1, or max_length larger."),
        (input_ids.shape[1] == 0, "nextn needs token ids: give input_ids, not inputs_embeds."),
        (
            max(whole, getattr(config, "_mask_length", None) or 0) != input_ids.shape[1],
            "With a cache of an earlier turn, give the whole text as input_ids; what was read is not read again.",
        ),
        (streamer is not None and len(input_ids) > 1, "A streamer follows one prompt only; generate them one by one."),
        (unused, f"nextn decodes from token ids alone: leave {', '.join(unused)} out."),
    ):
        if wrong:
            raise GenerateError(why)
    if positions is not None and not _are_usual(positions, mask, input_ids):
        raise GenerateError("nextn counts the positions of each row from its first token: leave position_ids out.")


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and not value)  # as of a multimodal model without images


def _are_usual(positions: Tensor, mask: Tensor | None, input_ids: Tensor) -> bool:
    """Whether positions [B, T] are those that the engine gives the tokens: 0, 1, … from a row's first token on."""
    used = torch.ones_like(input_ids) if mask is None else mask
    usual = used.cumsum(dim=-1) - 1
    return positions.shape[-1] == input_ids.shape[1] and bool(((positions == usual) | (used == 0)).all())


def _texts(
    past: Any, heads: WithHeads, rows: int, keep: bool, plain: bool, depth: int | str | None, tree: Tree | None
) -> KeptTexts:
    """A new engine, or that of an earlier turn with what it has read, if it would be made the same way today."""
    weights = heads.fingerprint() if keep or isinstance(past, KeptTexts) else ""
    made_by = (id(heads), plain, depth, tree, weights)
    if isinstance(past, KeptTexts):
        if past.engine.rows == rows and past.made_by == made_by:
            return past
        logger.warning("The cache was made with other weights, settings or rows; reading the texts again.")
    elif past is not None and past.get_seq_length() > 0:
        logger.warning("The cache is not nextn's; reading the texts again. Pass the cache that generate returns.")
    drafting: dict[str, Any] = {} if plain else {"depth": depth, "tree": tree}
    return KeptTexts(heads.engine(rows, 1 if plain else None, keep=keep, **drafting), made_by)


def _samples(config: GenerationConfig) -> bool:
    return bool(config.do_sample)


def _samplings(
    config: GenerationConfig,
    processors: Sequence[Any],
    seed: int | None,
    method: Method,
    padding: Sequence[int],
    logprobs: int | None,
) -> list[Sampling]:
    """How each prompt's tokens are chosen; `processors` hold the temperature and its kin."""
    temperature = float(_samples(config))
    common = Sampling(temperature, seed=seed, processors=tuple(processors), method=method, logprobs=logprobs)
    seeds = prompt_seeds(common.seed if common.by_chance else 0, len(padding))
    by_padding = {pads: replace(common, processors=_without_padding(processors, pads)) for pads in set(padding)}
    return [replace(by_padding[pads], seed=own) for own, pads in zip(seeds, padding, strict=True)]


def _without_padding(processors: Sequence[Any], pads: int) -> tuple[Any, ...]:
    """Processors that do with a row without its padding what transformers' do with the padded row."""
    # One that forces the second token of a text acts on prompts of one token, and a padded row has more.
    acting = [each for each in processors if not pads or type(each).__name__ != "ForcedBOSTokenLogitsProcessor"]
    return tuple(_moved(each, pads) for each in acting)


def _moved(processor: Any, pads: int) -> Any:
    """A processor that counts from the beginning of a padded row, for the row without its padding."""
    name = _COUNTED.get(type(processor).__name__)
    counted = None if name is None else getattr(processor, name, None)
    if name is None or counted is None or (not pads and not isinstance(counted, Tensor)):
        return processor
    own = copy.copy(processor)
    # A tensor holds the padding of each row, which is not there any more.
    setattr(own, name, None if isinstance(counted, Tensor) else max(0, counted - pads))
    return own


def _stops(
    criteria: Sequence[Any], input_ids: Tensor, padding: Sequence[int]
) -> tuple[set[int], Callable[[int, list[int]], bool] | None, list[Any]]:
    """The end tokens among stopping criteria, a function that asks those that judge one row at a time, and the others.

    The length is left out. With one prompt all criteria judge one row; they are given it with its padding [1, T + new].
    """
    ends: set[int] = set()
    by_row: list[Any] = []
    by_batch: list[Any] = []
    for each in criteria:
        name = type(each).__name__
        if name == "EosTokenCriteria":
            ends |= set(each.eos_token_id.flatten().tolist())
        elif name != "MaxLengthCriteria":
            (by_row if len(input_ids) == 1 or name in _OF_EACH_ROW else by_batch).append(each)

    def stop(index: int, text: list[int]) -> bool:
        new = text[input_ids.shape[1] - padding[index] :]
        ids = torch.cat([input_ids[index], torch.tensor(new, device=input_ids.device)])[None]
        return any(bool(torch.as_tensor(each(ids, None)).any()) for each in by_row)

    return ends, stop if by_row else None, by_batch


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
