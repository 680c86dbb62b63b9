"""What nextn adds to transformers.Trainer: our layout in checkpoints, and figures by depth in the log."""

from __future__ import annotations

import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from nextn.adapters import adapter_names, merge_adapters
from nextn.config import ConfigError, ScheduleConfig
from nextn.formats import native
from nextn.model import MultiTokenModel, MultiTokenOutput

ADAPTERS = "adapters.safetensors"


class Trainer(transformers.Trainer):
    """transformers.Trainer whose checkpoints hold the heads and whose resuming restores them.

    A checkpoint holds `nextn/` with the heads and, where the trunk is trained, the whole model in our layout, or the
    trunk's adapters. (The stock Trainer trains a MultiTokenModel as well, but resuming with it would silently leave the
    heads as they are.) The log has loss and accuracy by depth, tokens a second and, where heads follow the trunk's
    distribution, their overlap with it; an evaluation also has `tau`, the tokens per step that the heads would bring if
    the held-out text were the model's own.

    Args:
        schedule: how weights change, and on what heads are trained; default: always the config's, on all.
    """

    model: MultiTokenModel

    def __init__(self, *args: Any, schedule: ScheduleConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.schedule = schedule or ScheduleConfig()
        self._depths: list[Tensor] = []  # loss, accuracy and overlap by depth of each batch since the last log [3, n]
        self._tokens, self._since = 0, time.monotonic()
        self._accepted: list[int] = []
        self.add_callback(_Scheduled(self.model))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if isinstance(outputs, MultiTokenOutput) and outputs.depth_losses is not None:
            if model.training:
                figures = outputs.depth_losses, outputs.depth_accuracies, outputs.depth_overlaps
                self._depths.append(torch.stack(figures))  # type: ignore[arg-type]
                self._tokens += inputs["input_ids"].numel()
            elif outputs.accepted is not None:
                self._accepted += simulated(outputs.accepted)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._accepted.clear()
        scheduled = self.model.weights  # a phase of the schedule; figures of all phases are to be comparable
        self.model.weights = self.model.multi_token.weights.by_depth(self.model.multi_token.n)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.model.weights = scheduled
        assert output.metrics is not None
        counts = torch.tensor([len(self._accepted), sum(self._accepted)], device=self.args.device)
        steps, drafts = self.accelerator.reduce(counts, "sum").tolist()
        if steps:
            output.metrics[f"{metric_key_prefix}_tau"] = 1 + drafts / steps
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._depths and "loss" in logs:
            figures = torch.stack(self._depths).nanmean(dim=0).tolist()  # depths that were not computed are NaN
            for name, by_depth in zip(("loss", "accuracy", "overlap"), figures, strict=True):
                for depth, value in enumerate(by_depth, start=1):
                    if value == value:
                        logs[f"{name}_{depth}"] = round(value, 4)
            tokens, now = self._tokens * self.args.world_size, time.monotonic()
            logs["tokens_per_second"] = round(tokens / max(now - self._since, 1e-9), 1)
            self._depths, self._tokens, self._since = [], 0, now
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """All but vectors: norms, whatever they are called, and biases."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    # --- checkpoints ------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write our layout, whatever shape FSDP's own files have."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, self.accelerator.get_state_dict(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        model, directory = self.model, output_dir or str(self.args.output_dir)
        whole = model.state_dict() if state_dict is None else state_dict  # of FSDP: gathered from all processes
        parts = {
            part: {
                name.removeprefix(f"{part}."): tensor for name, tensor in whole.items() if name.startswith(f"{part}.")
            }
            for part in ("heads", "base")
        }
        base_hash = None
        if model.multi_token.freeze_trunk:
            base_hash = self._base_hash
        elif adapters := adapter_names(model.base):
            path = native.writable(directory) / ADAPTERS
            save_file({name: parts["base"][name].contiguous() for name in adapters}, path)
            base_hash = self._base_hash
        else:
            tied = getattr(model.base, "all_tied_weights_keys", {})  # gathered, they no longer share memory
            whole = {name: tensor for name, tensor in parts["base"].items() if name not in tied}
            model.base.save_pretrained(native.writable(directory), state_dict=whole)
            base_hash = native.hash_of(model.base, directory)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(directory)
        native.save_heads(
            model, directory, base_hash=base_hash, tokenizer=self.processing_class, tensors=parts["heads"]
        )

    def save_result(self, directory: Path, base_name: str | None) -> None:
        """Write what the training was for: heads in bfloat16 for a frozen base, else a plain model and its heads."""
        if self.model.multi_token.freeze_trunk and not self.is_fsdp_enabled:
            if self.args.should_save:
                native.save_heads(
                    self.model, directory, base_name=base_name, dtype=torch.bfloat16, tokenizer=self.processing_class
                )
            return
        merge_adapters(self.model.base)
        self.save_model(str(directory))

    @cached_property
    def _base_hash(self) -> str:  # of a frozen base, for every checkpoint
        return native.hash_of(self.model.base)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with_fsdp = any(Path(resume_from_checkpoint).glob("pytorch_model_fsdp*"))
        if with_fsdp != self.is_fsdp_enabled:
            raise ConfigError(
                f"{resume_from_checkpoint} was written with{'' if with_fsdp else 'out'} FSDP and can only be resumed "
                "so; go on with the setting that it had, or choose another directory."
            )
        if self.is_fsdp_enabled:  # accelerate wrote all parameters, heads included, and hands out the shards
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model, base = self.model, self.model.base
        if model.multi_token.freeze_trunk:
            pass
        elif names := adapter_names(base):
            stored = native.read_tensors(Path(resume_from_checkpoint) / ADAPTERS)
            base.load_state_dict({name: stored[name] for name in names}, strict=False)
        else:
            base.load_state_dict(native.load_base(resume_from_checkpoint, dtype=model.trunk.dtype).state_dict())
        native.load_heads(model, resume_from_checkpoint)


class _Scheduled(transformers.TrainerCallback):
    """Sets the weights of the depths before each step."""

    def __init__(self, model: MultiTokenModel) -> None:
        self.model = model

    def on_step_begin(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        config = self.model.multi_token
        progress = state.global_step / max(1, state.max_steps)
        least = 2 if config.freeze_trunk else 1  # something must be trained
        self.model.weights = self.model.schedule.weights_at(progress, config.weights, config.n, least)


def simulated(accepted: Tensor) -> list[int]:
    """The accepted drafts of each step of a decoding whose text is the batch's.

    Args:
        accepted: how many drafts from each position are the text's tokens [B, T]; -1 where no text goes on.

    A step at position t accepts accepted[t] drafts and the bonus token, so the next one is at t + accepted[t] + 1; one
    that the end of the text cuts short is left out, as in decoding.
    """
    steps = []
    for row in accepted.tolist():
        place = 0
        while place < len(row):
            if row[place] < 0:
                place += 1
                continue
            end = next((t for t in range(place, len(row)) if row[t] < 0), len(row))
            while place + row[place] + 1 < end:
                steps.append(row[place])
                place += row[place] + 1
            place = end
    return steps


def last_checkpoint(directory: str | Path) -> str | None:
    """The newest whole checkpoint of a training directory; one that a kill cut short is passed over."""
    found = sorted(Path(directory).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    return next((str(path) for path in found if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:  # the Trainer writes its state after the model and the optimizer
        json.loads((checkpoint / "trainer_state.json").read_text())
        native.describe(checkpoint)
    except (OSError, ValueError):
        return False
    return (checkpoint / "nextn" / "heads.safetensors").is_file() and (checkpoint / "scheduler.pt").is_file()
