"""A causal language model together with its heads: training loss, lossless generation, attaching."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from nextn.config import MultiTokenConfig, ObjectiveConfig, ScheduleConfig
from nextn.decoding.drafting import HeadDrafter
from nextn.decoding.engine import Code, Engine
from nextn.decoding.generate import custom_generate
from nextn.decoding.pace import Pace
from nextn.decoding.sampling import Method
from nextn.decoding.tree import Tree
from nextn.heads import build_heads
from nextn.heads.base import Text
from nextn.losses import IGNORE, Depth, depth_losses, targets_at
from nextn.output import Output, SharedOutput
from nextn.teachers import Teacher, TopTokens, TrunkStates
from nextn.trunk import Trunk, check_logits


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
    accepted: how many drafts from each position are the text's tokens, all earlier ones included [B, T]; -1 where
        there is no t+1 target. None while heads see only a share of the batch.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    depth_losses: Tensor | None = None
    depth_accuracies: Tensor | None = None
    depth_overlaps: Tensor | None = None
    accepted: Tensor | None = None


class MultiTokenModel(PreTrainedModel):
    """Trunk and heads. Made by `nextn.attach` and `nextn.load`.

    `model(input_ids, labels=...)` gives the loss of the design under any trainer; `model.generate(...)` decodes with
    the heads as drafter and gives the text that the base model alone would give.
    """

    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, base: PreTrainedModel, config: MultiTokenConfig) -> None:
        super().__init__(base.config)
        trunk = Trunk(base)
        self.base = base
        self.loss_type = "ForCausalLM"  # tells Trainer that labels are shifted, so that it counts t+1 targets
        self.trunk = trunk
        self.multi_token = config
        self.heads = build_heads(config, trunk)
        self.weights = config.weights.by_depth(config.n)  # a schedule may change them while training
        self.schedule = ScheduleConfig()  # a trainer sets it
        self.generation_config = base.generation_config
        self.base.requires_grad_(not config.freeze_trunk)
        self.train(base.training)
        self._code: dict[Any, tuple[Any, Code | None]] = {}  # by what was asked for, see `compiled`
        self._paces: dict[Any, dict[int, Pace]] = {}  # what steps take and what drafts bring, see `engine`

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the base has chosen already; transformers asks each class anew

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def train(self, mode: bool = True) -> MultiTokenModel:
        super().train(mode)
        if self.multi_token.freeze_trunk:
            self.base.eval()
        return self

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        def forget(function: Callable[..., Any], *args: Any, **given: Any) -> Any:
            return gradient_checkpointing_func(self.trunk.attending(function), *args, **given)

        super()._set_gradient_checkpointing(enable, forget, **kwargs)
        module: Any
        for module in self.heads.modules():  # heads forget whole steps; a layer by itself would drop its chain's keys
            if module is not self.heads and hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False

    def compile_layers(self) -> None:
        """Let torch.compile make machine code of each layer of trunk and heads when it is first called.

        Norms, rotations and products become one loop each, which PyTorch otherwise runs one by one. Raises
        `torch._dynamo.config.recompile_limit` for the process: past it, layers would silently run uncompiled.
        """
        # A recurrent step has another number of keys at each depth, and training, evaluation and a short batch differ.
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 16 + 4 * self.multi_token.n)
        for layer in (*self.trunk.layers, *self.heads.regions()):
            layer.compile(dynamic=False)

    # --- training ---------------------------------------------------------------------------------------------

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
        text = as_text(input_ids, attention_mask, position_ids)
        if trunk_states is not None and self.heads.reads:
            raise ValueError("These heads read the trunk's keys and values: leave trunk_states out.")
        if trunk_states is not None and labels is not None:
            teacher = self._teacher(None, trunk_states, top_tokens, top_log_probs)
            return self._loss(text, None, trunk_states, teacher, labels, num_items_in_batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.multi_token.freeze_trunk):
            hidden, tapped = self.run_trunk(text)
        if labels is None:
            return MultiTokenOutput(logits=self.trunk.logits(hidden))
        return self._loss(text, hidden, tapped, self._teacher(hidden), labels, num_items_in_batch)

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
        accuracies, overlaps, total, hits = losses.clone(), losses.clone(), losses.new_zeros(()), dict[int, Tensor]()
        for output, objective, members in self._passes(sorted(depths)):
            found = depth_losses(self.trunk, output, [depths[k] for k in members], objective)
            total = total + found.total
            if output.ranking is not None:
                total = total + depth_losses(self.trunk, output.ranking, [depths[k] for k in members]).total
                for place, k in enumerate(members):  # a token whose cluster is not scored is no draft
                    targets_k = depths[k].targets.clamp(min=0)
                    found.hits[place] &= output.can_name(self.trunk, depths[k].states.detach(), targets_k)
            for place, k in enumerate(members):
                count = (depths[k].targets != IGNORE).sum().clamp(min=1)
                losses[k - 1], overlaps[k - 1] = found.sums[place] / count, found.overlaps[place] / count
                accuracies[k - 1] = found.hits[place].sum() / count
                hits[k] = found.hits[place]
        return MultiTokenOutput(
            loss=total / (items if denominator is None else denominator),
            depth_losses=losses,
            depth_accuracies=accuracies,
            depth_overlaps=overlaps,
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
        drafter = None if heads == 1 else HeadDrafter(self.trunk, self.heads)
        stops = end_tokens(self.base) if stop_tokens is None else stop_tokens
        engine = Engine(self.trunk, drafter, rows, stops, **settings)
        if engine.depth == "auto":
            engine.paces = self._paces.setdefault((engine.tree, None), engine.paces)
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
                minutes, and loaded in seconds after that. When weights have changed it is compiled anew; a change
                through `parameter.data`, or of anything but tensors (an adapter switched off), goes unnoticed.

        Returns:
            input_ids and the new tokens [B, T + new], shorter rows filled with the padding token; or what
            `return_dict_in_generate` asks for. Its `past_key_values`, given to the next turn together with the whole
            text, spare reading again what was read.

        Raises:
            GenerateError, PromptError, SamplingError: for what cannot be; the message says why.
        """
        if heads not in (None, 1):
            raise ValueError(f"heads is {heads}; give 1 for the plain model, or None for all heads.")
        if "inputs" in kwargs:
            input_ids = kwargs.pop("inputs")
        if kwargs.get("stop_strings") and kwargs.get("tokenizer"):  # transformers keeps the tokenizer to itself
            strings = StopStringCriteria(kwargs.pop("tokenizer"), kwargs.pop("stop_strings"))
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or []), strings]
        ours = {
            "heads": self, "plain": heads == 1, "seed": seed, "sampling_method": sampling_method, "depth": depth,
            "tree": tree, "compile": compile, "token_streamer": streamer,
        }  # fmt: skip
        # transformers passes on what the function names, and keeps a `streamer` for itself.
        generate: Any = self.base.generate
        return generate(input_ids, generation_config, custom_generate=custom_generate, **ours, **kwargs)

    def compiled(self, engine: Engine, heads: int | None, sampling: bool) -> Engine:
        """The engine with the machine code that these weights were compiled to, compiled now if need be."""
        weights = self.fingerprint()
        asked = engine.rows, heads, engine.depth, sampling
        found = self._code.get(asked)
        if found is None or found[0] != weights:
            found = self._code[asked] = weights, engine.compile(sampling=sampling).code
        if found[1] is None:
            return engine
        engine.use(found[1])
        if engine.depth == "auto":
            engine.paces = self._paces.setdefault((engine.tree, found[1].depths), engine.paces)
        return engine

    def fingerprint(self) -> list[tuple[int, int]]:
        """Changes with the weights, but for changes through `parameter.data`."""
        tensors = (*self.parameters(), *self.buffers())
        return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]

    # --- saving -----------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, *, tokenizer: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the plain model, which any tool opens, and `nextn/` with the heads beside it."""
        from nextn.formats.native import save

        save(self, save_directory, tokenizer)


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

    Args:
        base: any supported transformers model; it is used as it is, not copied.
        calibration: text like that to be decoded, as `forward` takes it: input_ids [B, T] and, where rows are padded
            or packed, attention_mask and position_ids. Sequential heads fit their input projection to it in closed
            form, which makes the first loss a sane one; 50,000 tokens are enough.

    Raises:
        HostError, ConfigError: where the host or the config cannot work; the message says why.
    """
    model = MultiTokenModel(base, config)
    check_logits(model.trunk)
    if model.trunk.device.type != "meta":
        model.heads.output.fit(model.heads.start_table(model.trunk))
    if calibration is not None:
        batch = {name: tensor.to(model.trunk.device) for name, tensor in calibration.items()}
        text = as_text(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"))
        model.heads.calibrate(model.trunk, text)
    return model
