"""What nextn does with each public name of transformers' model classes: the one place where that is decided.

A `MultiTokenModel` is a `PreTrainedModel` with a `GenerationMixin`. Each of their public methods and attributes is
nextn's own, the base's (the call goes to the base model), inherited (transformers' own code, which counts trunk and
heads), or refused in one sentence. `BaseInterface` is made from that table, the one in docs/guide/generate.md lists it,
and a test fails when transformers adds a public name that is missing here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

from nextn.adapters import check_adapters, set_trained, whole_copies
from nextn.config import ConfigError, MultiTokenConfig
from nextn.heads.base import Heads
from nextn.trunk import Trunk

Treatment = Literal["own", "base", "inherited", "refused"]


@dataclass(frozen=True)
class Decision:
    """What is done with one public name.

    Attributes:
        treatment: see the module.
        note: for a refused method what to do instead.
    """

    treatment: Treatment
    note: str = ""


def _all(treatment: Treatment, names: str, note: str = "") -> dict[str, Decision]:
    return dict.fromkeys(names.split(), Decision(treatment, note))


NAMES: dict[str, Decision] = {
    # Loading, saving, moving, training
    **_all("own", "from_pretrained save_pretrained push_to_hub train generate to cuda half float"),
    # The vocabulary and its embeddings
    **_all("base", "get_input_embeddings set_input_embeddings get_output_embeddings set_output_embeddings"),
    **_all("own", "resize_token_embeddings"),
    **_all("base", "tie_weights get_position_embeddings resize_position_embeddings"),
    # Parts
    **_all("own", "base_model"),
    **_all("base", "get_decoder get_encoder"),
    **_all("refused", "set_decoder set_encoder", "attach heads to a base that has it"),
    # Generation
    **_all("base", "prepare_inputs_for_generation compute_transition_scores heal_tokens adjust_generation_fn"),
    **_all("base", "load_custom_generate destroy_cached_continuous_batching_manager"),
    **_all("base", "warn_if_padding_and_no_attention_mask"),
    **_all(
        "refused",
        "generate_batch init_continuous_batching continuous_batching_context_manager",
        "it decodes without heads; take model.engine(rows=...), or call it on model.base",
    ),
    # Adapters
    **_all("own", "add_adapter load_adapter"),
    **_all("base", "set_adapter enable_adapters disable_adapters delete_adapter active_adapters"),
    **_all("base", "get_adapter_state_dict enable_peft_hotswap"),
    # Attention, experts, kernels, quantization
    **_all("base", "set_attn_implementation get_experts_implementation set_experts_implementation"),
    **_all("base", "set_use_kernels use_kernels dequantize"),
    **_all("inherited", "get_correct_attn_implementation get_correct_experts_implementation"),
    # Training
    **_all("base", "enable_input_require_grads disable_input_require_grads init_weights initialize_weights"),
    **_all("inherited", "activation_checkpointing_enable activation_checkpointing_disable is_activation_checkpointing"),
    **_all("inherited", "gradient_checkpointing_enable gradient_checkpointing_disable is_gradient_checkpointing"),
    **_all("inherited", "supports_gradient_checkpointing loss_function eval post_init"),
    # What it is
    **_all("base", "dummy_inputs can_record_outputs"),
    **_all("base", "add_model_tags model_tags"),
    **_all("inherited", "can_generate main_input_name input_modalities output_modalities"),
    **_all("inherited", "device dtype num_parameters get_memory_footprint get_parameter_or_buffer"),
    **_all("inherited", "named_non_persistent_buffers retrieve_modules_from_names get_expanded_tied_weights_keys"),
    **_all("inherited", "config_class generation_config_class base_model_prefix is_backend_compatible"),
    **_all("inherited", "is_custom_code is_remote_code get_compiled_call get_init_context"),
    **_all("refused", "register_for_auto_class", "a saved model opens with AutoModelForCausalLM as it is"),
    # Distribution by transformers' own plans, which name no heads
    **_all("own", "supports_tp_plan supports_pp_plan supports_context_parallel"),
    **_all("inherited", "tp_plan pp_plan ep_plan fsdp_plan tp_size fsdp_size init_parallel_plans"),
    **_all("inherited", "maybe_distribute_model prepare_distribute_model is_distributed_loading_by_transformers"),
    **_all("inherited", "gather_sharded_state_dict_for_save barrier_after_gathered_checkpoint_save"),
    **_all("inherited", "should_save_on_this_rank mark_tied_weights_as_initialized"),
    **_all("refused", "save_distributed_checkpoint", "save_pretrained gathers what is sharded and writes it"),
}


class BaseInterface(PreTrainedModel, GenerationMixin):
    """The methods of transformers' models over a base model and its heads, by the decisions in `NAMES`."""

    base: PreTrainedModel
    heads: Heads
    trunk: Trunk
    multi_token: MultiTokenConfig
    supports_tp_plan = supports_pp_plan = supports_context_parallel = False

    @property
    def _hf_peft_config_loaded(self) -> bool:  # type: ignore[override]
        """Whether the base has adapters; transformers' methods ask for it."""
        return self.base._hf_peft_config_loaded

    def to(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Move or cast trunk and heads. A quantized base refuses what it cannot do."""
        return self._convert("to", *args, **kwargs)

    def cuda(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Move trunk and heads to a GPU."""
        return self._convert("cuda", *args, **kwargs)

    def half(self, *args: Any) -> Any:
        """Cast trunk and heads to float16."""
        return self._convert("half", *args)

    def float(self, *args: Any) -> Any:
        """Cast trunk and heads to float32."""
        return self._convert("float", *args)

    def _convert(self, name: str, *args: Any, **kwargs: Any) -> Any:
        getattr(self.base, name)(*args, **kwargs)  # which knows whether it is quantized
        return getattr(super(), name)(*args, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the embeddings of the base; see transformers. The heads follow.

        Raises:
            ConfigError: where the output of the heads has a table for the present vocabulary, or an adapter has a copy
                of an embedding; nothing is changed then.
        """
        if whole_copies(self.base):
            raise ConfigError(
                "modules_to_save holds a copy of an embedding, which cannot be resized: merge the adapters first "
                "(save_pretrained with merge_adapters=True), or resize before they are added."
            )
        size = self.trunk.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size != self.trunk.vocab_size:
            self.heads.output.resize(size)
        embeddings = self.base.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.heads.follow_vocabulary(self.trunk)
        return embeddings

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the base; it is trained where the trunk is.

        Raises:
            ConfigError: for an adapter that is not supported.
        """
        self.base.add_adapter(*args, **kwargs)
        self._check_adapters()

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter into the base.

        Raises:
            ConfigError: for an adapter that is not supported.
        """
        report = self.base.load_adapter(*args, **kwargs)
        self._check_adapters()
        return report

    def _check_adapters(self) -> None:
        check_adapters(self.base)
        set_trained(self.base, not self.multi_token.freeze_trunk)


def _of_the_base(name: str) -> Any:
    """A method or attribute that is the base's."""
    original = inspect.getattr_static(BaseInterface, name)
    if callable(original):

        @wraps(original)
        def method(self: BaseInterface, *args: Any, **kwargs: Any) -> Any:
            return getattr(self.base, name)(*args, **kwargs)

        return method
    is_fixed = isinstance(original, property) and original.fset is None
    assign = None if is_fixed else lambda self, value: setattr(self.base, name, value)
    return property(lambda self: getattr(self.base, name), assign)


def _refused(name: str, instead: str) -> Callable[..., None]:
    """A method that says what to do instead."""

    def method(*_args: Any, **_kwargs: Any) -> None:
        raise NotImplementedError(f"A MultiTokenModel does not support {name}: {instead}.")

    return method


def public_names() -> set[str]:
    """The public methods and attributes of transformers' model classes, PyTorch's own left out."""
    classes = {*PreTrainedModel.__mro__, *GenerationMixin.__mro__} - {*nn.Module.__mro__}
    return {name for each in classes for name in vars(each) if not name.startswith("_")}


def table() -> str:
    """The decisions as the Markdown table of docs/guide/generate.md."""
    described: dict[tuple[Treatment, str], str] = {
        ("own", ""): "nextn's own",
        ("base", ""): "the base's answer",
        ("inherited", ""): "transformers' own code, over trunk and heads",
    }
    rows: dict[str, list[str]] = {}
    for name, decision in NAMES.items():
        what = described.get((decision.treatment, decision.note), f"refused: {decision.note}")
        rows.setdefault(what, []).append(f"`{name}`")
    lines = [f"| {what} | {', '.join(names)} |" for what, names in rows.items()]
    return "\n".join(["| treatment | methods and attributes |", "|---|---|", *lines])


for _name, _decision in NAMES.items():
    if _name in public_names() and _decision.treatment in ("base", "refused"):
        _made = _of_the_base(_name) if _decision.treatment == "base" else _refused(_name, _decision.note)
        setattr(BaseInterface, _name, _made)

# What transformers.pipeline takes without calling it unsupported; `pipeline` knows classes by their names alone.
SUPPORTED_PEFT_TASKS["text-generation"].append("MultiTokenModel")
