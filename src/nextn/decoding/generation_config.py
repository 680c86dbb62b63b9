"""What nextn does with each field of transformers' `GenerationConfig`: the one place where that is decided.

A field is *honoured* as transformers' `generate` honours it, *refused* in one sentence where it would change the text
or the output in a way that nextn does not offer, or has *no effect* on the text. The table in docs/guide/generate.md is
made from this one, and a test fails when transformers adds a field that is missing here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import GenerationConfig


class GenerateError(ValueError):
    """A call of generate that cannot be answered; the message says why."""


@dataclass(frozen=True)
class Decision:
    """What is done with one field.

    Attributes:
        treatment: the second column of the table.
        note: the third column; for a refused field what the error says after the field's name.
        applies: whether a value of a refused field asks for anything, as transformers would read it.
    """

    treatment: Literal["honoured", "refused", "no effect"]
    note: str = ""
    applies: Callable[[Any, GenerationConfig], bool] = lambda value, config: bool(value)


def _honoured(note: str = "") -> Decision:
    return Decision("honoured", note)


def _refused(note: str, applies: Callable[[Any, GenerationConfig], bool] | None = None) -> Decision:
    return Decision("refused", note) if applies is None else Decision("refused", note, applies)


def _no_effect(note: str) -> Decision:
    return Decision("no effect", note)


def _more_than_one(value: Any, _config: GenerationConfig) -> bool:
    return value is not None and value > 1


def _is_given(value: Any, _config: GenerationConfig) -> bool:
    return value is not None


def _is_contrastive(value: Any, config: GenerationConfig) -> bool:
    return bool(value) and not config.do_sample and (config.top_k or 0) > 1


def _is_kept_elsewhere(value: Any, _config: GenerationConfig) -> bool:
    return value not in (None, "dynamic", "dynamic_full", "static", "hybrid", "sliding_window")


_BEAMS = "for beam search, which is refused"
DRAFTS = "nextn's heads make the drafts"
_ASSISTED = "for assisted generation, which is refused"

FIELDS: dict[str, Decision] = {
    # Length
    "max_length": _honoured(),
    "max_new_tokens": _honoured(),
    "min_length": _honoured("padding counts, as in transformers"),
    "min_new_tokens": _honoured(),
    "early_stopping": _no_effect(_BEAMS),
    "max_time": _honoured("each row ends at its next token"),
    "stop_strings": _honoured("with `tokenizer=` in `model.generate`; as a `StopStringCriteria` for `custom_generate`"),
    # Strategy
    "do_sample": _honoured("by nextn's own noise, see `seed`"),
    "num_beams": _refused("nextn decodes one text a row, not beams", _more_than_one),
    "use_mtp": _refused(DRAFTS),
    # Cache
    "use_cache": _honoured("False: no cache is returned; nextn's own one is used all the same"),
    "cache_implementation": _refused(
        "nextn keeps keys and values in a cache of its own on the model's device, in its dtype", _is_kept_elsewhere
    ),
    "cache_config": _no_effect("of caches that nextn does not use"),
    "max_cache_len": _no_effect("of caches that nextn does not use"),
    # Logits
    "temperature": _honoured(),
    "top_k": _honoured(),
    "top_p": _honoured(),
    "min_p": _honoured(),
    "top_h": _honoured(),
    "typical_p": _honoured(),
    "epsilon_cutoff": _honoured(),
    "eta_cutoff": _honoured(),
    "repetition_penalty": _honoured(),
    "encoder_repetition_penalty": _honoured("one prompt at a time"),
    "length_penalty": _no_effect(_BEAMS),
    "no_repeat_ngram_size": _honoured(),
    "bad_words_ids": _honoured(),
    "renormalize_logits": _honoured(),
    "forced_bos_token_id": _honoured(),
    "forced_eos_token_id": _honoured(),
    "remove_invalid_values": _honoured(),
    "exponential_decay_length_penalty": _honoured(),
    "suppress_tokens": _honoured(),
    "begin_suppress_tokens": _honoured(),
    "sequence_bias": _honoured(),
    "token_healing": _refused("nextn continues the prompt's own tokens"),
    "guidance_scale": _honoured("in plain steps; negative prompts one at a time"),
    "watermarking_config": _honoured("in plain steps"),
    # Output
    "num_return_sequences": _honoured(),
    "output_attentions": _refused("nextn does not collect attentions"),
    "output_hidden_states": _refused("nextn does not collect hidden states"),
    "output_scores": _honoured(),
    "output_logits": _honoured(),
    "return_dict_in_generate": _honoured(),
    # Special tokens
    "pad_token_id": _honoured(),
    "bos_token_id": _honoured(),
    "eos_token_id": _honoured(),
    # Encoder-decoder models
    "encoder_no_repeat_ngram_size": _honoured("one prompt at a time"),
    "decoder_start_token_id": _no_effect("for encoder-decoder models"),
    # Assisted generation
    "is_assistant": _refused("nextn is no assistant of another model"),
    "num_assistant_tokens": _no_effect(_ASSISTED),
    "num_assistant_tokens_schedule": _no_effect(_ASSISTED),
    "assistant_confidence_threshold": _no_effect(_ASSISTED),
    "prompt_lookup_num_tokens": _refused(DRAFTS, _is_given),
    "max_matching_ngram_size": _no_effect("for prompt lookup, which is refused"),
    "assistant_early_exit": _refused(DRAFTS, _is_given),
    "assistant_lookbehind": _no_effect(_ASSISTED),
    "target_lookbehind": _no_effect(_ASSISTED),
    "assistant_ensemble_weight": _refused("nextn accepts only what the model itself would choose", _is_given),
    "speculation_type": _refused(DRAFTS),
    # Performance
    "compile_config": _no_effect("see `compile`"),
    "disable_compile": _no_effect("see `compile`"),
    "continuous_batching_config": _no_effect("for `generate_batch`"),
    "prefill_chunk_size": _no_effect("nextn reads prompts in parts of its own, see `chunk`"),
    # Search methods that transformers has moved elsewhere
    "low_memory": _no_effect("for contrastive search, which is refused"),
    "penalty_alpha": _refused("nextn does not search contrastively", _is_contrastive),
    "dola_layers": _refused("nextn does not contrast layers"),
    "diversity_penalty": _no_effect(_BEAMS),
    "num_beam_groups": _no_effect(_BEAMS),
    "constraints": _refused("nextn decodes one text a row, not constrained beams"),
    "force_words_ids": _refused("nextn decodes one text a row, not constrained beams"),
    "transformers_version": _no_effect("says who wrote the file"),
}  # fmt: skip


def refuse(config: GenerationConfig) -> None:
    """Refuse what a config asks for and nextn does not offer.

    Raises:
        GenerateError: names the field and says what to do.
    """
    for name, decision in FIELDS.items():
        value = getattr(config, name, None)
        if decision.treatment == "refused" and decision.applies(value, config):
            raise GenerateError(f"{name} is {value!r}, but {decision.note}: leave {name} out.")


def setting(
    name: str, arguments: Mapping[str, Any], config: GenerationConfig | None, defaults: GenerationConfig | None
) -> Any:
    """The value of a field, in transformers' order: an argument of the call, the call's config, the model's own one."""
    if name in arguments:
        return arguments[name]
    values = (getattr(each, name, None) for each in (config, defaults))
    return next((value for value in values if value is not None), None)


def table() -> str:
    """The decisions as the Markdown table of docs/guide/generate.md."""
    rows = [f"| `{name}` | {decision.treatment} | {decision.note} |" for name, decision in FIELDS.items()]
    return "\n".join(["| field | treatment | note |", "|---|---|---|", *rows])
