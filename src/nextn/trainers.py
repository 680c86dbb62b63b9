"""Heads under trainers that compute the loss themselves, as those of TRL do.

TRL replaces a model's forward by one that calls the backbone (`model.base_model`) and returns the log-probability of
each next token, of which the trainer makes its loss. `Backbone` is what it calls; `join_loss`, a forward hook of the
model, adds the loss of the heads; `TrainerLink` tells the model which trainer it is in, and logs figures by depth.
Tested with TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, trainer
from transformers.modeling_outputs import BaseModelOutput
from transformers.training_args import ParallelMode
from transformers.utils import logging

from nextn.config import ConfigError
from nextn.heads.base import Text

logger = logging.get_logger("nextn")


@dataclass
class _Run:
    """What the heads need of a run of the backbone: its text, last and tapped state [B, T, D], and its autocast."""

    text: Text
    hidden: Tensor
    tapped: Tensor
    autocast: torch.autocast


class Backbone:
    """The trunk of a MultiTokenModel, called as a backbone of transformers; keeps its last run for the heads."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.loss_type: str | None = None  # of TRL's SFTTrainer; None in other trainers
        self.figures: dict[bool, list[Tensor]] = {True: [], False: []}  # [3, n] a batch, of training and evaluation
        self._run: _Run | None = None

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        if input_ids is None:
            raise ConfigError("Heads read tokens, not inputs_embeds: use LoRA in place of prompt or prefix tuning.")
        if kwargs.get("output_router_logits"):
            raise ConfigError(
                "nextn does not compute the load-balancing loss of experts; set router_aux_loss_coef=0.0."
            )
        device = input_ids.device.type
        autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device), cache_enabled=False
        )
        text, hidden, tapped = self.model.run_backbone(input_ids, attention_mask, position_ids)
        self._run = _Run(text, hidden, tapped, autocast)
        return BaseModelOutput(last_hidden_state=hidden)

    def take_run(self) -> _Run:
        """The last run, which is kept no longer."""
        run, self._run = self._run, None
        assert run is not None
        return run


def join_loss(model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Add the heads' loss to what TRL's forward returned; a forward hook of MultiTokenModel.

    SFTTrainer sums -log_probs (`nll`) or -log_probs · exp(log_probs) (`dft`, the factor without gradient) and divides
    by its denominator. One more column of log_probs therefore brings in the heads with the same denominator and the
    same scaling: with nll it is -Σ w_k L_k; with dft it is 0, so that its factor is 1, and has that gradient.
    """
    if not kwargs.get("fused_lm_head"):
        return None
    run = model.backbone.take_run()
    if model.backbone.loss_type is None:
        return None
    if model.training and not torch.is_grad_enabled():
        raise ConfigError(
            "SFTTrainer makes its loss of logits for label_smoothing_factor and compute_loss_func, which leaves the "
            "heads out: leave these arguments out."
        )
    if kwargs.get("labels") is None:
        raise ConfigError("Heads cannot be trained with context or sequence parallelism, which passes shift_labels.")
    model.heads.follow_vocabulary(model.trunk)
    with run.autocast:
        found = model.loss_of_heads(run.text, run.hidden, run.tapped, kwargs["labels"])
    model.backbone.figures[model.training].append(_figures(found, output))
    loss = found.loss.detach() - found.loss if model.backbone.loss_type == "dft" else -found.loss
    rows = len(output.log_probs)
    column = (loss / rows).to(output.log_probs.dtype).expand(rows, 1)
    output.log_probs = torch.cat([output.log_probs, column], dim=1)
    return output


def _figures(found: Any, output: Any) -> Tensor:
    """Loss, accuracy and overlap by depth [3, n]; those of head 1 are TRL's."""
    figures = torch.stack([found.depth_losses, found.depth_accuracies, found.depth_overlaps])
    count = output.label_mask.sum().clamp(min=1)
    figures[0, 0] = -output.log_probs.detach().sum() / count
    figures[1, 0] = output.is_top1.sum() / count
    return figures


def by_depth(figures: Sequence[Tensor], prefix: str = "") -> dict[str, float]:
    """Log entries `loss_1` … `overlap_n`, means over batches; depths that were not computed are left out.

    Args:
        figures: loss, accuracy and overlap by depth of each batch [3, n], NaN where not computed.
    """
    entries: dict[str, float] = {}
    means = torch.stack(list(figures)).nanmean(dim=0).tolist()
    for name, values in zip(("loss", "accuracy", "overlap"), means, strict=True):
        entries |= {f"{prefix}{name}_{k}": round(v, 4) for k, v in enumerate(values, start=1) if v == v}
    return entries


class TrainerLink(TrainerCallback):
    """Tells a MultiTokenModel which of TRL's trainers it is in, and logs its figures by depth there.

    Every Trainer has one, see the end of this module; it does nothing for other models and other trainers.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if (inner := _multi_token(model)) is None:
            return
        inner.check_trainable()
        config = _trl_config(args)
        inner.backbone.loss_type = args.loss_type if config == "SFTConfig" else None
        inner.backbone.figures = {True: [], False: []}
        if config is None:
            return
        if args.load_best_model_at_end and model is inner:
            raise ConfigError("Trainers of TRL do not read heads from a checkpoint: set load_best_model_at_end=False.")
        if config == "SFTConfig":
            return
        name = config.replace("Config", "Trainer")
        if inner.multi_token.freeze_trunk:
            raise ConfigError(
                f"{name} trains the trunk, which freeze_trunk=True leaves as it is: attach with freeze_trunk=False."
            )
        for setting in ("use_vllm", "use_transformers_continuous_batching", "cast_lm_head_to_fp32"):
            if getattr(args, setting, False):
                raise ConfigError(f"{setting} looks for parts that a model with heads has elsewhere: set it to False.")
        if args.parallel_mode == ParallelMode.DISTRIBUTED and not (args.fsdp or args.ddp_find_unused_parameters):
            raise ConfigError(f"{name} gives heads no gradient: set ddp_find_unused_parameters=True.")
        logger.warning(
            f"{name} trains the trunk alone; the heads stay as they are, and draft worse the more the trunk changes. "
            "Train them afterwards, with SFTTrainer or nextn.Trainer."
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # Of a PeftModel, adapters and heads are read.
        if state.global_step and _multi_token(model) is model is not None and _trl_config(args):
            raise ConfigError(
                "Trainers of TRL do not read heads from a checkpoint: leave resume_from_checkpoint out, and open the "
                "checkpoint with nextn.load to train on."
            )

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        if (inner := _multi_token(model)) is None or not logs:
            return
        timed = (key.removesuffix("runtime") for key in logs if key.endswith("_runtime") and key != "train_runtime")
        prefix = next(timed, "")  # of an evaluation
        figures = inner.backbone.figures[not prefix]
        if f"{prefix}loss" in logs and figures:
            logs |= (entries := by_depth(figures, prefix))
            state.log_history[-1] |= entries
            figures.clear()


def _multi_token(model: Any) -> Any:
    """The MultiTokenModel that is trained, in a PeftModel or by itself; None where it is another model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner if isinstance(getattr(inner, "backbone", None), Backbone) else None


def _trl_config(args: Any) -> str | None:
    """The name of TRL's class of training arguments; None where they are not TRL's."""
    names = [each.__name__ for each in type(args).__mro__ if each.__module__.startswith("trl.")]
    return next((name for name in names if not name.startswith("_")), None)


_callbacks: list[type[TrainerCallback]] = trainer.DEFAULT_CALLBACKS  # type: ignore[assignment]
_callbacks.append(TrainerLink)  # before those that report to TensorBoard and others
