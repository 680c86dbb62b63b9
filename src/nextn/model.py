"""A causal language model together with its heads: training loss, lossless generation, attaching."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput, logging

from nextn.adapters import adopt_adapters, check_adapters, refuse_adapted_heads, set_trained, unwrapped
from nextn.config import ConfigError, MultiTokenConfig, ObjectiveConfig, ScheduleConfig
from nextn.decoding.drafting import HeadDrafter
from nextn.decoding.engine import Code, Engine
from nextn.decoding.generate import CACHE_NAME, CACHE_NAMES, check_inputs, custom_generate
from nextn.decoding.generation_config import GenerateError, refuse, setting
from nextn.decoding.pace import Pace
from nextn.decoding.sampling import Method
from nextn.decoding.tree import Tree
from nextn.heads import build_heads
from nextn.heads.base import Heads, Text
from nextn.losses import IGNORE, Depth, depth_losses, targets_at
from nextn.output import Output, SharedOutput
from nextn.pretrained import BaseInterface
from nextn.quantized import is_offloaded, why_untrainable
from nextn.support import check_heads, check_host
from nextn.teachers import Teacher, TopTokens, TrunkStates
from nextn.trainers import Backbone, join_loss
from nextn.trunk import RaggedCache, Trunk, context_length, fingerprint

logger = logging.get_logger("nextn")


@dataclass
class MultiTokenOutput(ModelOutput):
    """What `MultiTokenModel.forward` returns.

    loss: Σ w_k · L_k, a scalar; None without labels. With a clustered output also w_k times the centroids' loss, which
        follows the text whatever the objective.
    logits: the trunk's next-token logits [B, T, V]; None with labels, where nobody needs them whole.
    depth_losses: mean loss by depth 1 … n [n]: negative log-likelihood, or what the objective says; NaN where a depth
        was not computed. With a trimmed output, over the targets that it can name.
    depth_accuracies: share of targets that were the best token, by depth [n]; a target that a trimmed output cannot
        name counts as missed.
    depth_overlaps: mean Σ min(p, q) by depth [n], which share of sampled drafts would stand; NaN where heads do not
        follow the trunk's distribution.
    depth_counts: how many targets these means are over, by depth [n]; 0 where a depth was not computed.
    accepted: how many drafts from each position are the text's tokens, all earlier ones included [B, T]; -1 where
        there is no t+1 target. None while heads see only a share of the batch.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    depth_losses: Tensor | None = None
    depth_accuracies: Tensor | None = None
    depth_overlaps: Tensor | None = None
    depth_counts: Tensor | None = None
    accepted: Tensor | None = None


class MultiTokenModel(BaseInterface):
    """Trunk and heads. Made by `nextn.attach` and `nextn.load`.

    `model(input_ids, labels=...)` gives the loss of the design under any trainer; `model.generate(...)` decodes with
    the heads as drafter and gives the text that the base model alone would give.
    """

    config_class = PreTrainedConfig  # a model has the config of its base, of whatever class that is
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, base: PreTrainedModel, config: MultiTokenConfig) -> None:
        base = unwrapped(base)
        trunk = Trunk(base)
        check_adapters(base)
        super().__init__(base.config)
        self.base = base
        self.loss_type = "ForCausalLM"  # tells Trainer that labels are shifted, so that it counts t+1 targets
        self.trunk = trunk
        check_host(trunk)
        self.multi_token = config
        self.heads = check_heads(type(base).__name__, config.kind, lambda: build_heads(config, trunk))
        self.weights = config.weights.by_depth(config.n)  # a schedule may change them while training
        self.schedule = ScheduleConfig()  # a trainer sets it
        self.held_out_tau: float | None = None  # as it was last estimated in training
        self.backbone = Backbone(self)
        self.register_forward_hook(join_loss, with_kwargs=True)
        self._why_untrainable = None if config.freeze_trunk else why_untrainable(base)
        set_trained(base, not config.freeze_trunk and self._why_untrainable is None)
        if getattr(base, "hf_device_map", None):
            self.hf_device_map = base.hf_device_map  # which tells Trainer not to move it
        self.train(base.training)
        self._code: dict[Any, tuple[Any, Code | None]] = {}  # by what was asked for, see `compiled`
        self._paces: dict[Any, dict[int, Pace]] = {}  # what steps take and what drafts bring, see `engine`

    @property
    def generation_config(self) -> GenerationConfig:
        """The base's."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        if "base" in self._modules:  # the constructor of PreTrainedModel sets one before there is a base
            self.base.generation_config = config

    @property
    def base_model(self) -> Backbone:  # type: ignore[override]
        """What trainers that compute the loss themselves call, see `nextn.trainers`."""
        return self.backbone

    @property
    def peft_config(self) -> dict[str, Any]:
        """The base's, by the names of its adapters."""
        return self.base.peft_config

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:  # by peft, when it has put adapters into this model
        adopt_adapters(self, configs)

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.base.peft_config

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the base has chosen already; transformers asks each class anew

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which compile and measure anew: compiled code and measured times stay behind."""
        return self.__dict__ | {"_code": {}, "_paces": {}}

    def train(self, mode: bool = True) -> MultiTokenModel:
        """Set training or evaluation mode. A frozen trunk stays in evaluation mode.

        Heads become float32 when training begins, whatever the trunk's dtype is, and stay so: in half precision their
        small updates would be rounded away.
        """
        if mode:
            self.check_trainable()
        super().train(mode)
        if self.multi_token.freeze_trunk:
            self.base.eval()
        if mode:
            self._heads_to_float32()
            self._share_checkpointing()
            if any(parameter.requires_grad and parameter.itemsize < 4 for parameter in self.base.parameters()):
                logger.warning_once(
                    f"The trunk is trained in {self.trunk.dtype}, which rounds small updates away; load the base in "
                    "float32 and train it with bf16=True."
                )
        return self

    def check_trainable(self) -> None:
        """Refuse training what cannot be trained.

        Raises:
            ConfigError: for a quantized trunk that is to be trained and has no adapters, for an offloaded one, and for
                adapters in the heads.
        """
        if self._why_untrainable is not None:  # adapters may have been added since
            self._why_untrainable = why_untrainable(self.base)
        if self._why_untrainable is not None:
            raise ConfigError(self._why_untrainable)
        self._check_heads()

    def _check_heads(self) -> None:
        if not isinstance(self.heads, Heads):  # but a wrapper of peft
            refuse_adapted_heads(self)

    def _heads_to_float32(self) -> None:
        if any(parameter.is_floating_point() and parameter.itemsize < 4 for parameter in self.heads.parameters()):
            self.heads.float()

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        _refuse_reentrant(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        self._share_checkpointing()

    def _share_checkpointing(self) -> None:
        """Checkpoint the heads where the base is checkpointed, however that was switched on, and adapt how.

        What is recomputed in the backward pass must run with the attention of the forward pass. Heads recompute whole
        steps: a layer by itself, such as a copy of a checkpointed layer of the base, would drop the keys of its chain.

        Raises:
            ConfigError: for checkpointing with use_reentrant=True.
        """
        module: Any
        for module in self.heads.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        for module in self.base.modules():
            if not getattr(module, "gradient_checkpointing", False):
                continue
            if not isinstance(module._gradient_checkpointing_func, _Checkpoint):
                _refuse_reentrant(module._gradient_checkpointing_func)
                module._gradient_checkpointing_func = _Checkpoint(module._gradient_checkpointing_func, self.trunk)
            for heads in (part for part in self.heads.modules() if isinstance(part, Heads)):  # peft may wrap them
                heads.gradient_checkpointing = True
                heads._gradient_checkpointing_func = module._gradient_checkpointing_func

    def compile_layers(self, heads_only: bool = False) -> None:
        """Let torch.compile make machine code of each layer of trunk and heads when it is first called.

        Norms, rotations and products become one loop each, which PyTorch otherwise runs one by one. Raises
        `torch._dynamo.config.recompile_limit` for the process: past it, layers would silently run uncompiled.
        """
        # A recurrent step has another number of keys at each depth, and training, evaluation and a short batch differ.
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 16 + 4 * self.multi_token.n)
        for layer in (*(() if heads_only else self.trunk.layers), *self.heads.regions()):
            layer.compile(dynamic=False)

    # --- training ---------------------------------------------------------------------------------------------

    def calibrate(self, batches: Iterable[Mapping[str, Tensor]]) -> int:
        """Fit the start of sequential heads to text, in closed form; without it their first loss is far too high.

        Batches are read until more of them no longer help (see `RidgeRegression`). The fit is in float64 and takes some
        130 · D² + 130,000 · D bytes, 0.5 GB for a model of width D = 1,536 and 2.7 GB for one of 4,096.

        Args:
            batches: text like that to be decoded, as `forward` takes it: input_ids [B, T] and, where rows are padded or
                packed, attention_mask and position_ids. Other entries are ignored.

        Returns:
            how many positions were fitted; 0 for heads without a closed form (parallel, EAGLE-3, shared-KV).
        """
        if not self.heads.can_calibrate:
            logger.warning(f"{self.multi_token.kind} heads have no closed form to calibrate; they start as they are.")
            return 0
        return self.heads.calibrate(self.trunk, (self._as_text(batch) for batch in batches))

    def _as_text(self, batch: Mapping[str, Tensor]) -> Text:
        parts = (batch.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        ids, mask, positions = (None if part is None else part.to(self.trunk.device) for part in parts)
        assert ids is not None
        return as_text(ids, mask, positions)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        trunk_states: Tensor | None = None,
        top_tokens: Tensor | None = None,
        top_log_probs: Tensor | None = None,
        **kwargs: Any,
    ) -> MultiTokenOutput:
        """The loss, or without labels the trunk's logits.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 0 for padding on either side.
            position_ids: [B, T], starting again at 0 where a packed document begins.
            labels: [B, T] aligned with input_ids (not shifted), -100 where not trained on.
            num_items_in_batch: the denominator; without it the count of valid t+1 targets.
            trunk_states, top_tokens, top_log_probs: what `trunk_outputs` gave for this very batch [B, T, D] and
                [B, T, k], so that a frozen trunk need not run again; head 1 then has no loss. The tokens' probabilities
                are taken to be those at the objective's temperature.

        Raises:
            ValueError: for parts of `trunk_outputs` without the others, or of a trunk whose keys heads read.
        """
        if (top_tokens is None) != (top_log_probs is None) or (trunk_states is None and top_tokens is not None):
            raise ValueError("top_tokens, top_log_probs and trunk_states go together: give what trunk_outputs gave.")
        self.heads.follow_vocabulary(self.trunk)
        _check_ids(input_ids, labels, self.trunk.vocab_size)
        if trunk_states is not None and self.heads.reads:
            raise ValueError("These heads read the trunk's keys and values: leave trunk_states out.")
        if trunk_states is not None and labels is not None:
            text = as_text(input_ids, attention_mask, position_ids)
            teacher = self._teacher(None, trunk_states, top_tokens, top_log_probs)
            return self._loss(text, None, trunk_states, teacher, labels, num_items_in_batch)
        text, hidden, tapped = self.run_backbone(input_ids, attention_mask, position_ids)
        if labels is None:
            return MultiTokenOutput(logits=self.trunk.logits(hidden))
        return self._loss(text, hidden, tapped, self._teacher(hidden), labels, num_items_in_batch)

    def run_backbone(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Text, Tensor, Tensor]:
        """The text, the trunk's last state and the tapped one [B, T, D]; with gradients where the trunk is trained."""
        self._check_heads()
        text = as_text(input_ids, attention_mask, position_ids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.multi_token.freeze_trunk):
            return text, *self.run_trunk(text)

    def loss_of_heads(self, text: Text, hidden: Tensor, tapped: Tensor, labels: Tensor) -> MultiTokenOutput:
        """The loss of depths 2 … n, not divided: the sum over targets, for a trainer that has the rest of it."""
        return self._loss(text, None, tapped, self._teacher(hidden), labels, 1)

    def run_trunk(self, text: Text) -> tuple[Tensor, Tensor]:
        """The trunk's last state [B, T, D] and the tapped one; keys that heads read are put into the text."""
        if not self.heads.reads:
            return self.trunk.run(text.ids, text.positions, text.visible, tap=self.heads.tap)
        with self.trunk.capturing(self.heads.reads) as text.trunk_kv:
            return self.trunk.run(text.ids, text.positions, text.visible, tap=self.heads.tap)

    @torch.no_grad()
    def trunk_outputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        top_k: int = 0,
    ) -> dict[str, Tensor]:
        """What a frozen trunk gives for a batch, for `forward` to take in place of running it again.

        Args:
            top_k: also its most probable tokens, so many a position, for heads that follow its distribution.

        Returns:
            trunk_states, which the heads read [B, T, D]; with top_k, top_tokens and top_log_probs [B, T, k].
        """
        text = as_text(input_ids, attention_mask, position_ids)
        hidden, tapped = self.trunk.run(text.ids, text.positions, text.visible, tap=self.heads.tap)
        if not top_k:
            return {"trunk_states": tapped}
        top = TopTokens.of(self.trunk, hidden, top_k, self.multi_token.objective.temperature)
        return {"trunk_states": tapped, "top_tokens": top.tokens, "top_log_probs": top.log_probs}

    def _loss(
        self,
        text: Text,
        hidden: Tensor | None,
        tapped: Tensor,
        teacher: Teacher | None,
        labels: Tensor,
        denominator: Tensor | int | None,
    ) -> MultiTokenOutput:
        n, targets = self.multi_token.n, targets_at(labels, text.documents, 1)
        items = (targets != IGNORE).sum().clamp(min=1)
        depths = self._head_depths(text, tapped, teacher, labels) if any(self.weights[1:]) else {}
        if hidden is not None and self.weights[0]:
            depths[1] = Depth(hidden, targets, self.weights[0])
        losses = labels.new_full((n,), torch.nan, dtype=torch.float32)
        accuracies, overlaps, counts = losses.clone(), losses.clone(), torch.zeros_like(losses)
        total, hits = losses.new_zeros(()), dict[int, Tensor]()
        for output, objective, members in self._passes(sorted(depths)):
            found = depth_losses(self.trunk, output, [depths[k] for k in members], objective)
            total = total + found.total
            if output.ranking is not None:
                total = total + depth_losses(self.trunk, output.ranking, [depths[k] for k in members]).total
                for place, k in enumerate(members):  # a token whose cluster is not scored is no draft
                    targets_k = depths[k].targets.clamp(min=0)
                    found.hits[place] &= output.can_name(self.trunk, depths[k].states.detach(), targets_k)
            for place, k in enumerate(members):
                counts[k - 1] = (depths[k].targets != IGNORE).sum()
                count = counts[k - 1].clamp(min=1)
                losses[k - 1], overlaps[k - 1] = found.sums[place] / count, found.overlaps[place] / count
                accuracies[k - 1] = found.hits[place].sum() / count
                hits[k] = found.hits[place]
        return MultiTokenOutput(
            loss=total / (items if denominator is None else _at_least_one(denominator)),
            depth_losses=losses,
            depth_accuracies=accuracies,
            depth_overlaps=overlaps,
            depth_counts=counts,
            accepted=None if self.training and self.schedule.share < 1 else _leading(hits, targets, n),
        )

    def _head_depths(self, text: Text, tapped: Tensor, teacher: Teacher | None, labels: Tensor) -> dict[int, Depth]:
        """What the heads bring to the loss, by depth; on a share of the batch where the schedule says so."""
        schedule = self.schedule if self.training else ScheduleConfig()
        scale = 1.0
        if schedule.share < 1 and schedule.share_of == "sequences":
            whole = len(labels)
            rows = torch.randperm(whole, device=labels.device)[: max(1, round(schedule.share * whole))]
            text, tapped, labels = text.rows(rows), tapped[rows], labels[rows]
            teacher, scale = teacher and teacher.rows(rows), whole / len(rows)
        states = self.heads(self.trunk, tapped.to(next(self.heads.parameters()).dtype), text)
        depths = {}
        for k, state in enumerate(states, start=2):
            targets = targets_at(labels, text.documents, k)
            if schedule.share < 1 and schedule.share_of == "positions":
                left_out = torch.rand(targets.shape, device=targets.device) >= schedule.share
                targets, scale = targets.masked_fill(left_out, IGNORE), 1 / schedule.share
            if self.weights[k - 1]:
                depths[k] = Depth(state, targets, self.weights[k - 1] * scale, teacher and teacher.ahead(k - 1))
        return depths

    def _passes(self, depths: list[int]) -> list[tuple[Output, ObjectiveConfig, list[int]]]:
        """Output, objective and the depths that have them in common: one pass through a table each."""
        text, passes = ObjectiveConfig(), dict[tuple[int, bool], tuple[Output, ObjectiveConfig, list[int]]]()
        own = self.heads.output if isinstance(self.heads.output, SharedOutput) else SharedOutput()
        for k in depths:  # head 1 names all tokens, and follows the text
            output, objective = (own, text) if k == 1 else (self.heads.output.at(k), self.multi_token.objective)
            passes.setdefault((id(output), objective == text), (output, objective, []))[2].append(k)
        return list(passes.values())

    def _teacher(
        self,
        hidden: Tensor | None,
        tapped: Tensor | None = None,
        top_tokens: Tensor | None = None,
        top_log_probs: Tensor | None = None,
    ) -> Teacher | None:
        """What the trunk says the next tokens are, from its last state [B, T, D] or from what is kept of it."""
        if self.multi_token.objective.follows == "text":
            return None
        if top_tokens is not None and top_log_probs is not None:
            return TopTokens(top_tokens, top_log_probs.float())  # autocast on a CPU does not move float16
        if hidden is None and self.heads.tap == "post_norm":
            hidden = tapped
        if hidden is None:
            raise ValueError(
                "Heads that follow the trunk's distribution need its run or its top_tokens: leave trunk_states out."
            )
        return TrunkStates(hidden.detach())

    # --- decoding ---------------------------------------------------------------------------------------------

    def engine(
        self, rows: int = 1, heads: int | None = None, stop_tokens: Iterable[int] | None = None, **settings: Any
    ) -> Engine:
        """A decoding engine of this model.

        Args:
            rows: how many prompts are decoded side by side.
            heads: None for all heads, 1 for the plain model.
            stop_tokens: ids that end a text; default: the model's own end tokens.
            settings: `depth`, `tree`, `keep` and `chunk` of `Engine`.

        Raises:
            ValueError: for another number of heads.
        """
        if heads not in (None, 1):
            raise ValueError(f"heads is {heads}; give 1 for the plain model, or None for all heads.")
        self._check_heads()
        drafter = None if heads == 1 or self.multi_token.n == 1 else HeadDrafter(self.trunk, self.heads)
        stops = end_tokens(self.base) if stop_tokens is None else stop_tokens
        engine = Engine(self.trunk, drafter, rows, stops, **settings)
        if engine.depth == "auto":
            engine.paces = self._paces.setdefault((engine.tree, None, self.trunk.adapters()), engine.paces)
        return engine

    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        heads: int | None = None,
        streamer: Any = None,
        depth: int | str | None = "auto",
        tree: Tree | None = None,
        seed: int | None = None,
        sampling_method: Method = "coupled",
        compile: bool = False,
        logprobs: int | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """The text of the base model, drafted by the heads: transformers' `generate`, only faster.

        What is not named here goes to `generate` of the base and means what it means there: `attention_mask`,
        `max_new_tokens`, `do_sample`, `temperature`, `logits_processor`, `stopping_criteria`,
        `return_dict_in_generate`, … Rows may be padded on either side.

        Args:
            input_ids: prompts [B, T].
            heads: None for all heads, 1 for the plain model alone.
            streamer: a transformers streamer (batch 1).
            depth: how many drafts a step reads; `auto`: what is fastest, see `Engine`.
            tree: read a tree of drafts, see `Engine`.
            seed: for sampling; default: drawn from PyTorch's own generator. The same seed gives the same text with
                heads and without, whatever the batch, up to near ties.
            sampling_method: `coupled` or `rejection`, see `Sampling`.
            compile: run the step as machine code. It is compiled once a machine for each batch size, which takes
                minutes, and loaded in seconds after that. When weights or active adapters have changed it is compiled
                anew.
            logprobs: with `return_dict_in_generate`, log-probabilities of the tokens, and of so many of the most
                probable ones, see `Sampling`.

        Returns:
            input_ids and the new tokens [B, T + new], shorter rows filled with the padding token; or what
            `return_dict_in_generate` asks for, with `spec_decoding_stats` and `logprobs` (`MultiTokenGenerateOutput`).
            Its `cache` (`past_key_values` before transformers 5.24), given to the next turn together with the whole
            text, spares reading again what was read; either name is accepted.

        Raises:
            GenerateError, PromptError, SamplingError: for what cannot be; the message says why.
        """
        if heads not in (None, 1):
            raise ValueError(f"heads is {heads}; give 1 for the plain model, or None for all heads.")
        if "inputs" in kwargs and input_ids is None:
            input_ids = kwargs.pop("inputs")
        if input_ids is not None:
            check_inputs(input_ids, kwargs.get("attention_mask"))
        if "custom_generate" in kwargs:
            raise GenerateError("custom_generate is given, but nextn decodes itself: call generate of model.base.")
        if not isinstance(generation_config, GenerationConfig | None):
            raise GenerateError(f"generation_config is {generation_config!r}; give a GenerationConfig.")
        for name in CACHE_NAMES:
            if name in kwargs:
                kwargs[CACHE_NAME] = kwargs.pop(name)
        early = {
            name: setting(name, kwargs, generation_config, self.base.generation_config)
            for name in ("stop_strings", "token_healing", "cache_implementation")
        }
        refuse(GenerationConfig(**early))  # transformers acts on these before it calls a custom function
        tokenizer, strings = kwargs.pop("tokenizer", None), early["stop_strings"]
        if strings and tokenizer is not None:  # which transformers would keep from a custom function
            criterion = StopStringCriteria(tokenizer, strings)
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or []), criterion]
            kwargs["stop_strings"] = None
        ours = {
            "heads": self, "plain": heads == 1, "seed": seed, "sampling_method": sampling_method, "depth": depth,
            "tree": tree, "compile": compile, "token_streamer": streamer, "logprobs": logprobs,
        }  # fmt: skip
        # transformers passes on what the function names, and keeps a `streamer` for itself.
        generate: Any = self.base.generate
        return generate(input_ids, generation_config, custom_generate=custom_generate, **ours, **kwargs)

    def compiled(self, engine: Engine, heads: int | None, sampling: bool) -> Engine:
        """The engine with the machine code that these weights were compiled to, compiled now if need be."""
        weights = engine.fingerprint()
        # CUDA graphs write their outputs to fixed addresses: each thread has its own.
        thread = threading.get_ident() if self.trunk.device.type == "cuda" else 0
        asked = engine.rows, heads, engine.depth, sampling, thread
        found = self._code.get(asked)
        if found is None or found[0] != weights:
            found = self._code[asked] = weights, engine.compile(sampling=sampling).code
        if found[1] is None:
            return engine
        engine.use(found[1], weights)
        if engine.depth == "auto":
            adapters = self.trunk.adapters()
            engine.paces = self._paces.setdefault((engine.tree, found[1].depths, adapters), engine.paces)
        return engine

    def fingerprint(self) -> str:
        """A digest of the weights of trunk and heads and of the active adapters, see `nextn.trunk.fingerprint`."""
        return f"{self.trunk.fingerprint()} {fingerprint(self.heads)}"

    # --- saving -----------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        *,
        tokenizer: Any = None,
        heads_only: bool = False,
        merge_adapters: bool = False,
        base_name: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write the plain model, which any tool opens, and `nextn/` with the heads and adapters beside it.

        A model card is written where there is none.

        Args:
            is_main_process: whether this process writes.
            state_dict: the tensors of trunk and heads by name, where they had to be gathered; default: its own.
            push_to_hub: also upload what was written.
            max_shard_size: of the files of the plain model; the heads are one file.
            tokenizer: saved with the plain model; heads that know it refuse another one.
            heads_only: write `nextn/` alone, which names its base.
            merge_adapters: add the adapters of the trunk to the weights of the plain model, rather than write them by
                themselves.
            base_name: how the base is to be found again (hub name or path); default: where it was loaded from.
            kwargs: `save_original_format` of transformers, and what `push_to_hub` takes: `repo_id` (default: the name
                of the directory), `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`
                and `tags`.

        Returns:
            with push_to_hub, the CommitInfo of huggingface_hub.

        Raises:
            ConfigError: for arguments that are not supported or do not go together.
        """
        from nextn.formats import native, publish

        if not isinstance(self.heads, Heads):
            raise ConfigError(
                "peft holds the heads: call merge_and_unload() of the PeftModel, and save what it returns."
            )
        settings, pushing = _split_arguments(kwargs, push_to_hub, publish.PUSHING)
        directory = Path(save_directory)
        if heads_only and merge_adapters:
            raise ConfigError("merge_adapters changes the plain model, which heads_only leaves out: give one of them.")
        if push_to_hub and is_main_process:
            where = {name: pushing[name] for name in ("private", "token", "revision") if name in pushing}
            pushing["repo_id"] = publish.make_repository(pushing.get("repo_id", directory.resolve().name), **where)
            pushing.pop("private", None)
            pushing["tags"] = [*(pushing.get("tags") or ()), *(self.model_tags or ())]
            base_name = native.public_name(self, base_name, None if heads_only else pushing["repo_id"])
        before = native.written(directory)
        if not heads_only:
            settings |= {"max_shard_size": max_shard_size, "merge_adapters": merge_adapters}
            settings |= {"is_main_process": is_main_process, "base_name": base_name, "tensors": state_dict}
            native.save(self, directory, tokenizer, **settings)
        elif is_main_process:
            heads, base = (native.part_of(state_dict, part) for part in ("heads", "base"))
            native.save_heads(self, directory, base_name, tokenizer=tokenizer, tensors=heads, base_tensors=base)
        if not (push_to_hub and is_main_process):
            return None
        files = [name for name, time in native.written(directory).items() if before.get(name) != time]
        return publish.push(directory, files, native.describe(directory), **pushing)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Upload the model to a repository of the hub, which is made where there is none.

        Args:
            repo_id: owner/name.
            kwargs: arguments of `save_pretrained`.

        Returns:
            the CommitInfo of huggingface_hub.
        """
        with tempfile.TemporaryDirectory() as directory:
            return self.save_pretrained(directory, push_to_hub=True, repo_id=repo_id, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> MultiTokenModel:
        """Open a saved model, or heads on their base: a directory, or a repository of the hub; `nextn.load`.

        Args:
            kwargs: of `nextn.load`; the rest goes to AutoModelForCausalLM.from_pretrained.
        """
        from nextn.formats.native import load

        if "torch_dtype" in kwargs:  # its name in transformers 4
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        if kwargs.pop("output_loading_info", False) or kwargs.get("subfolder"):
            raise ConfigError("from_pretrained does not support output_loading_info and subfolder: leave them out.")
        if isinstance(kwargs.get("config"), PreTrainedConfig):
            raise ConfigError("from_pretrained: config is the MultiTokenConfig of the heads here; leave it out.")
        return load(os.fspath(pretrained_model_name_or_path), **kwargs)


_UNSUPPORTED = {  # arguments of transformers' save_pretrained: the one value that is accepted, and why
    "variant": (None, "there is one set of files"),
    "distributed_checkpoint": (False, "what is sharded is gathered"),
    "save_peft_format": (True, "adapters are written as peft writes them"),
    "safe_serialization": (True, "only safetensors are written"),
}


def _split_arguments(
    given: dict[str, Any], push_to_hub: bool, of_pushing: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What saving the base takes, and what pushing takes.

    Raises:
        ConfigError: for what nothing takes.
    """
    for name in given:
        accepted, why = _UNSUPPORTED.get(name, (given[name], ""))
        if given[name] != accepted:
            raise ConfigError(f"save_pretrained does not support {name}={given[name]!r}: {why}; leave it out.")
        if name not in (*_UNSUPPORTED, *of_pushing, "save_original_format"):
            raise ConfigError(f"save_pretrained has no argument {name}: leave it out.")
        if name in of_pushing and not push_to_hub:
            raise ConfigError(f"save_pretrained: {name} goes with push_to_hub=True; leave it out, or give that.")
    pushing = {name: value for name, value in given.items() if name in of_pushing}
    return {name: value for name, value in given.items() if name == "save_original_format"}, pushing


class _Checkpoint:
    """A checkpointing function whose recomputation runs with the attention of the forward pass."""

    def __init__(self, function: Callable[..., Any], trunk: Trunk) -> None:
        self.function, self.trunk = function, trunk

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.function(self.trunk.attending(forward), *args, **kwargs)


def _refuse_reentrant(checkpointing: Callable[..., Any]) -> None:
    """Raise for a checkpointing function that loses gradients.

    Reentrant checkpointing sees tensors only where they are direct arguments: not the keys of a chain of drafts, and
    not the weights of heads whose inputs come from a frozen trunk.
    """
    if getattr(checkpointing, "keywords", {}).get("use_reentrant"):
        raise ConfigError(
            "Gradient checkpointing with use_reentrant=True loses gradients of the heads; set use_reentrant to False, "
            "or leave it out of gradient_checkpointing_kwargs."
        )


def _at_least_one(count: Tensor | int) -> Tensor | int:
    """A batch whose labels are all masked has the loss 0, which 0 targets would make NaN."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _check_ids(input_ids: Tensor, labels: Tensor | None, vocab_size: int) -> None:
    """Refuse tokens that the trunk does not have, and labels that are no tokens; on a CPU, where it costs no wait.

    Raises:
        ConfigError: for such a token.
    """
    for name, ids in (("input_ids", input_ids), ("labels", labels)):
        if ids is None or ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
            continue
        if ids.is_floating_point() or ids.ndim != 2 or (labels is not None and labels.shape != input_ids.shape):
            raise ConfigError(f"{name} is {list(ids.shape)} of {ids.dtype}; give token ids [B, T], labels alike.")
        bad = (ids >= vocab_size) | (ids < 0) & (ids != IGNORE if name == "labels" else True)
        if bad.any():
            raise ConfigError(
                f"{name} has the token {int(ids[bad][0])}, but the vocabulary of the base has {vocab_size}, counted "
                "from 0: tokenize with the tokenizer of the base."
            )


def _leading(hits: dict[int, Tensor], targets: Tensor, n: int) -> Tensor:
    """How many depths 2, 3 … hit one after the other [B, T]; -1 where the t+1 `targets` have none."""
    standing = torch.ones_like(targets)
    count = torch.zeros_like(targets)
    for k in range(2, n + 1):
        if k not in hits:
            break
        standing = standing * hits[k]
        count += standing
    return torch.where(targets == IGNORE, -1, count)


def end_tokens(base: PreTrainedModel) -> list[int]:
    """The end tokens that a model's generation config names."""
    end = base.generation_config.eos_token_id if base.generation_config else None
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def as_text(ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Text:
    """The positions and documents of a batch; packed documents are told by positions that start again at 0."""
    used = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
    if position_ids is None:
        positions = (used.cumsum(dim=1) - 1).clamp(min=0)
        documents = torch.zeros_like(ids)
    else:
        positions = position_ids.expand_as(ids)
        documents = (positions == 0).long().cumsum(dim=1)
    return Text(ids, positions, torch.where(used > 0, documents, -1))


def attach(
    base: PreTrainedModel, config: MultiTokenConfig, calibration: Mapping[str, Tensor] | None = None
) -> MultiTokenModel:
    """Give a causal language model heads, initialised from its own last layer and norms.

    Heads are float32 whatever the dtype of the base, since that is how they are trained; `nextn.load` opens them in the
    dtype of the base, for decoding.

    Args:
        base: any supported transformers model; it is used as it is, not copied. It may have adapters (LoRA and its kin;
            a `PeftModel` too): heads start from the merged weights, and with `freeze_trunk: false` the active adapters
            are trained, not the base. A quantized base may get its adapters afterwards, before training.
        calibration: text like that to be decoded, as `forward` takes it, see `MultiTokenModel.calibrate`. Without it
            `nextn.Trainer` calibrates on its first batches.

    Raises:
        HostError, ConfigError: where the host or the config cannot work; the message says why.
    """
    check_n(config.n, unwrapped(base).config)
    model = MultiTokenModel(base, config)
    if (why := model._why_untrainable) is not None:
        if is_offloaded(model.base):
            raise ConfigError(why)
        logger.warning(why)  # a trainer may add adapters yet
    try_heads(model)
    if model.trunk.device.type != "meta":
        model.heads.output.fit(model.heads.start_table(model.trunk))
    if calibration is not None:
        rows = range(0, len(calibration["input_ids"]), 8)
        model.calibrate({name: tensor[row : row + 8] for name, tensor in calibration.items()} for row in rows)
    model._heads_to_float32()
    return model


def check_n(n: int, base: PreTrainedConfig) -> None:
    """Refuse more tokens than a base has positions for: the furthest would never have a target.

    Raises:
        ConfigError: for such an n.
    """
    text: Any = base.get_text_config(decoder=True)
    if getattr(text, "max_position_embeddings", None) and n >= (context := context_length(text)):
        raise ConfigError(f"n is {n}, but the base reads {context} tokens: give a smaller n.")


def try_heads(model: MultiTokenModel) -> None:
    """Refuse, before anything else is done, heads that cannot run on their trunk.

    Raises:
        HostError: with the reason.
    """
    if model.trunk.device.type != "meta" and model.multi_token.n > 1:
        check_heads(type(model.base).__name__, model.multi_token.kind, lambda: _run_heads(model))


def _run_heads(model: MultiTokenModel) -> None:
    """A short training forward of the heads, and a round of drafts."""
    trunk, heads = model.trunk, model.heads
    ids = torch.arange(8, device=trunk.device)[None] % trunk.vocab_size
    text = as_text(ids, None, None)
    _, tapped = model.run_trunk(text)
    heads(trunk, tapped, text)
    drafter, cache = HeadDrafter(trunk, heads), RaggedCache(trunk.cache_layers, 1, ids.shape[1])
    _, tapped = trunk.run(ids, text.positions, cache.place(text.positions), cache, heads.tap)
    drafter.begin(cache)
    first = torch.zeros(1, dtype=torch.long, device=trunk.device)
    drafter.propose(tapped, text.positions, ids.roll(-1, dims=1), first + ids.shape[1] - 1, first)
