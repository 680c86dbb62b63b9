"""What nextn adds to transformers.Trainer: our layout in checkpoints, and figures by depth in the log."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import IterableDataset
from transformers.utils import logging

from nextn.adapters import adapter_layers
from nextn.config import ConfigError, ScheduleConfig
from nextn.data import is_byte_tokenizer
from nextn.files import sha256, write_json
from nextn.formats import native
from nextn.guard import HeldOutGuard
from nextn.losses import IGNORE
from nextn.model import MultiTokenModel, MultiTokenOutput
from nextn.trainers import TrainerLink, by_depth

CHECKSUMS = "checksums.json"  # of the files of a checkpoint
CALIBRATION_ROWS = 4  # sequences in a batch for calibration, whatever the batch size of the training
CALIBRATION_BATCHES = 256  # at most; see `RidgeRegression` for how many are read
FINISHED = "finished.json"  # written when the result of a training is complete
RESUMED = ("trainer_state.json", "nextn/heads.safetensors", "optimizer*", "scheduler.pt")  # what resuming reads
RESULT = ("*.safetensors", "nextn/**/*")  # the files of a result
logger = logging.get_logger("nextn")


class Trainer(transformers.Trainer):
    """transformers.Trainer whose checkpoints hold the heads and whose resuming restores them.

    A checkpoint holds `nextn/` with the heads and the trunk's adapters, if it has any, and, where all of the trunk is
    trained, the whole model in our layout. (The stock Trainer trains a MultiTokenModel as well, but resuming with it
    would silently leave the heads as they are.) The log has loss and accuracy by depth, tokens a second and, where
    heads follow the trunk's distribution, their overlap with it; an evaluation also has `tau`, the tokens per step that
    the heads would bring if the held-out text were the model's own.

    Args:
        schedule: how weights change, and on what heads are trained; default: always the config's, on all.
        guard: end with the state of the lowest held-out loss, and go back to it where the loss rises, see
            `HeldOutGuard`; needs `eval_dataset`.
        calibrate: fit new sequential heads to the first batches, see `MultiTokenModel.calibrate`, before training.
            (Other trainers take `nextn.Calibration()` among their callbacks.)
    """

    model: MultiTokenModel

    def __init__(
        self,
        *args: Any,
        schedule: ScheduleConfig | None = None,
        guard: bool = False,
        calibrate: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(TrainerLink)  # for trainers that know nothing of heads
        self.calibrate = calibrate
        if guard:
            self._check_guarded()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.activation_checkpointing:
            raise ConfigError(
                "fsdp_config.activation_checkpointing recomputes layers of the heads by themselves, without the keys "
                "of their chain; use gradient_checkpointing instead."
            )
        self.model.train()  # heads become float32, before a checkpoint is read into them
        self.model.schedule = schedule or ScheduleConfig()
        self.model.held_out_tau = None  # of what it was before
        self._depths: list[Tensor] = []  # loss, accuracy and overlap by depth of each batch since the last log [3, n]
        self._tokens, self._since, self._paused_seconds = 0, time.monotonic(), 0.0
        # Of each held-out batch: t+1 targets, the sum of the loss; targets, sums of losses and hits by depth [2 + 3n].
        self._held_out: list[Tensor] = []
        self._accepted: list[int] = []
        self._non_finite = torch.zeros((), dtype=torch.long, device=self.args.device)  # losses since the last log
        self.guard = HeldOutGuard(self) if guard else None
        callbacks = _LogFile(), _Scheduled(self.model), *([self.guard] if self.guard else []), _AtTheEnd()
        progress = self.pop_callback(transformers.ProgressCallback)  # last: its time starts after the first evaluation
        for callback in (*callbacks, *([progress] if progress else [])):
            self.add_callback(callback)

    def _check_guarded(self) -> None:
        """Refuse what a guard needs and does not have, or does itself."""
        if self.eval_dataset is None or isinstance(self.eval_dataset, dict):
            raise ConfigError("guard compares losses on held-out text: give one eval_dataset, or leave guard out.")
        if self.args.load_best_model_at_end or self.args.save_strategy == "best":
            raise ConfigError(
                "guard saves the state of the lowest held-out loss and ends with it: leave load_best_model_at_end and "
                "save_strategy='best' out, or leave guard out."
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Let DistributedDataParallel expect parameters without a gradient.

        A depth of weight 0 (a curriculum, `schedule.start`, a list of weights) gives its parameters none. With gradient
        checkpointing transformers would not look for them; non-reentrant checkpointing allows that.
        """
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = True
        super().create_accelerator_and_postprocess()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint where one is given; one of the last step is loaded, and no step is trained.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the newest whole one of the output directory.

        Raises:
            ConfigError: for a damaged checkpoint, or True where there is none that is whole.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ConfigError(
                    f"{self.args.output_dir} holds no whole checkpoint; leave resume_from_checkpoint out."
                )
        elif resume_from_checkpoint:
            _refuse_damaged(resume_from_checkpoint)
        self._check_targets()
        if not resume_from_checkpoint and self.calibrate:
            self.calibrate_heads()
        self._since, self._paused_seconds = time.monotonic(), 0.0
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.guard and self.guard.best_step != self.state.global_step:
            self.load_checkpoint_weights(self.guard.best_checkpoint)
        return output

    def _check_targets(self) -> None:
        """Refuse data in which every label is masked; the first batch with a target ends the search.

        Raises:
            ConfigError: for such data, to train on or held out.
        """
        named: dict[str, Any] = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        for name, data in named.items():
            if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, dict):
                continue  # a stream may give its text once
            items: Any = (data[index] for index in range(len(data)))
            if len(data) and all(_is_masked(item) for item in items):
                raise ConfigError(
                    f"{name} has no target: all labels are {IGNORE}, but for first ones, which nothing predicts."
                )

    def calibrate_heads(self) -> int:
        """Fit the start of new heads to sequences from all over the training data; `train` does so by itself.

        Of an `IterableDataset` they are the first ones, and it is read once more for training.

        Returns:
            how many positions were fitted; 0 for heads without a closed form, or that were calibrated or trained.
        """
        data: Any = self.train_dataset
        if data is None or self.model.multi_token.n == 1 or self.model.heads.is_calibrated:
            return 0
        count = CALIBRATION_BATCHES * CALIBRATION_ROWS
        if isinstance(data, IterableDataset):
            items = iter(data)
        else:
            count = min(count, len(data))
            items = (data[index * len(data) // count] for index in range(count))
        collate = self._get_collator_with_removed_columns(self.data_collator)
        batches = map(collate, iter(lambda: list(islice(items, CALIBRATION_ROWS)), []))
        return calibrate(self.model, batches, -(-count // CALIBRATION_ROWS), self.is_world_process_zero())

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        if self.control.should_training_stop:  # the checkpoint is of the last step, see `_AtTheEnd`
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if isinstance(outputs, MultiTokenOutput) and outputs.depth_losses is not None:
            if model.training:
                if not (self.state.global_step or self._depths) and self.is_world_process_zero():
                    self._report_first_loss(outputs.depth_losses)
                figures = outputs.depth_losses, outputs.depth_accuracies, outputs.depth_overlaps
                self._depths.append(torch.stack(figures))  # type: ignore[arg-type]
                self._tokens += inputs["input_ids"].numel()
            elif outputs.accepted is not None:
                self._accepted += simulated(outputs.accepted)
                counts: Any = outputs.depth_counts
                means: Any = torch.stack([outputs.depth_losses, outputs.depth_accuracies])  # type: ignore[list-item]
                targets = (outputs.accepted >= 0).sum()
                whole = torch.stack([targets, loss.detach() * targets])
                sums = torch.where(counts > 0, means * counts, 0)
                self._held_out.append(torch.cat([whole, counts, *sums]))
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._non_finite = self._non_finite + (~loss.detach().isfinite()).long()
        return loss

    def _report_first_loss(self, depth_losses: Tensor) -> None:
        """Warn where a guess among all tokens would do better before the first step, with the likely cause."""
        uniform = math.log(self.model.trunk.vocab_size)
        for depth, loss in enumerate(depth_losses.tolist(), start=1):
            if loss > uniform:
                logger.warning(
                    f"The first loss of t+{depth} is {loss:.1f}; a uniform guess among {self.model.trunk.vocab_size:,} "
                    f"tokens has {uniform:.1f}. {self._likely_cause(depth)}"
                )
                return

    def _likely_cause(self, depth: int) -> str:
        if depth == 1:
            return "The base cannot predict this text: its weights are random, or the text was tokenized for another."
        if self.model.heads.can_calibrate and not self.model.heads.is_calibrated:
            return "The heads are not calibrated: leave calibrate on, or call model.calibrate(batches) before."
        if not self.model.heads.can_calibrate:
            return "New heads of this kind cannot be calibrated, so this is expected of them."
        return "The heads do not fit the base or this text."

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._accepted, self._held_out = [], []
        scheduled = self.model.weights  # a phase of the schedule; figures of all phases are to be comparable
        self.model.weights = self.model.multi_token.weights.by_depth(self.model.multi_token.n)
        try:
            with self._not_training():
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        finally:
            self.model.weights = scheduled
        assert output.metrics is not None
        for module in self.model_wrapped.modules():  # a forward pass alone leaves the weights of FSDP2 gathered
            if isinstance(module, FSDPModule):
                module.reshard()
        figures = self._held_out_figures()
        output.metrics.update({f"{metric_key_prefix}_{name}": figure for name, figure in figures.items()})
        self.model.held_out_tau = output.metrics.get(f"{metric_key_prefix}_tau", self.model.held_out_tau)
        return output

    def _held_out_figures(self) -> dict[str, float]:
        """Of the evaluation that just ended, over all processes: loss, also by depth, accuracy, tokens, and tau.

        Means are over all targets, whatever the batches.
        """
        n, device = self.model.multi_token.n, self.args.device
        sums = torch.stack(self._held_out).sum(dim=0) if self._held_out else torch.zeros(2 + 3 * n, device=device)
        steps = torch.tensor([len(self._accepted), sum(self._accepted)], device=device)
        tokens, loss, *depths = self.accelerator.reduce(sums, "sum").tolist()
        if not tokens:
            return {}
        counts, losses, hits = (depths[part * n : (part + 1) * n] for part in range(3))
        figures = {"loss": loss / tokens, "tokens": int(tokens)}
        for depth, (count, loss, hit) in enumerate(zip(counts, losses, hits, strict=True), start=1):
            if count:
                figures |= {f"loss_{depth}": loss / count, f"accuracy_{depth}": hit / count}
        if "loss_1" in figures and is_byte_tokenizer(self.processing_class):
            figures["bits_per_byte"] = figures["loss_1"] / math.log(2)
        steps, drafts = self.accelerator.reduce(steps, "sum").tolist()
        if steps:
            figures["tau"] = 1 + drafts / steps
        return figures

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Leave the time that passes out of `tokens_per_second`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused_seconds += time.monotonic() - start

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._depths and "loss" in logs:
            logs |= by_depth(self._depths)
            tokens, now = self._tokens * self.args.world_size, time.monotonic()
            logs["tokens_per_second"] = round(tokens / max(now - self._since - self._paused_seconds, 1e-9), 1)
            self._depths, self._tokens, self._since, self._paused_seconds = [], 0, now, 0.0
            if non_finite := int(self.accelerator.reduce(self._non_finite, "sum")):
                logs["non_finite_losses"] = non_finite
            self._non_finite = torch.zeros_like(self._non_finite)
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

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the current step."""
        self._save_checkpoint(self.model_wrapped, trial=None)

    def load_checkpoint_weights(self, checkpoint: str | Path) -> None:
        """Load what is trained from a checkpoint, and leave the optimizer and the step as they are.

        Raises:
            ConfigError: for a damaged checkpoint.
        """
        _refuse_damaged(checkpoint, needed=())
        self._load_from_checkpoint(str(checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.guard:  # transformers removes it last; it may have another metric, and does not count step 0
            self.state.best_global_step = self.guard.best_step
            self.state.best_model_checkpoint = str(self.guard.best_checkpoint)
        with self._not_training():
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process writes files of its own
            if self.args.should_save:
                write_checksums(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer: Any = self.optimizer
        if self.is_fsdp_enabled:
            _fill_states(optimizer)
        is_new = not optimizer.state
        super()._save_optimizer_and_scheduler(output_dir)
        if is_new:  # to save it, torch takes a step with a learning rate of 0 under FSDP, which Adam would count
            optimizer.state.clear()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and Path(checkpoint).name == "checkpoint-0":
            optimizer: Any = self.optimizer
            optimizer.state.clear()

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
        if model.multi_token.freeze_trunk or adapter_layers(model.base):
            base_hash = self._base_hash
        else:
            tied = getattr(model.base, "all_tied_weights_keys", {})  # gathered, they no longer share memory
            whole = {name: tensor for name, tensor in parts["base"].items() if name not in tied}
            model.base.save_pretrained(native.writable(directory), state_dict=whole)
            base_hash = native.hash_of(model.base, directory)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(directory)
        native.save_heads(
            model,
            directory,
            base_hash=base_hash,
            tokenizer=self.processing_class,
            tensors=parts["heads"],
            base_tensors=parts["base"],
        )

    def save_result(self, directory: Path, base_name: str | None) -> None:
        """Write what the training was for: heads in bfloat16 for a frozen base, else a plain model and its heads.

        Adapters that the trunk has are written beside the heads.
        """
        if self.model.multi_token.freeze_trunk and not self.is_fsdp_enabled:
            if self.args.should_save:
                native.save_heads(
                    self.model,
                    directory,
                    base_name=base_name,
                    base_hash=self._base_hash,
                    dtype=torch.bfloat16,
                    tokenizer=self.processing_class,
                )
        elif adapter_layers(self.model.base):
            tensors = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
            if self.args.should_save:
                native.save(self.model, directory, self.processing_class, tensors=tensors)
        else:
            self.save_model(str(directory))

    @cached_property
    def _base_hash(self) -> str:  # of a frozen base, for every checkpoint
        return native.hash_of(self.model.base)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.load_checkpoint_weights(self.state.best_model_checkpoint)

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
        elif adapter_layers(base):
            native.read_adapters(base, resume_from_checkpoint)
        else:
            # a base of the user's own code was trusted when it was first opened
            again = native.load_base(resume_from_checkpoint, model.trunk.dtype, base.is_custom_code())
            base.load_state_dict(again.state_dict())
        native.load_heads(model, resume_from_checkpoint)


def _is_masked(item: Any) -> bool:
    """Whether an item of a dataset has labels, none of which is a target."""
    labels = item.get("labels") if isinstance(item, Mapping) else None
    return labels is not None and bool((torch.as_tensor(labels).flatten()[1:] == IGNORE).all())


class _Scheduled(transformers.TrainerCallback):
    """Sets the weights of the depths before each step."""

    def __init__(self, model: MultiTokenModel) -> None:
        self.model = model

    def on_step_begin(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        config = self.model.multi_token
        progress = state.global_step / max(1, state.max_steps)
        least = 2 if config.freeze_trunk else 1  # something must be trained
        self.model.weights = self.model.schedule.weights_at(progress, config.weights, config.n, least)


class Calibration(transformers.TrainerCallback):
    """Calibrates new heads on the first batches of any trainer of transformers; `nextn.Trainer` does so by itself.

    Raises:
        ConfigError: in several processes, which see different batches; call `model.calibrate` before training there.
    """

    def on_train_begin(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if state.global_step or model.heads.is_calibrated:
            return
        if args.world_size > 1:
            raise ConfigError(
                "Calibration runs in one process: call model.calibrate(batches) before the trainer is made."
            )
        calibrate(model, kwargs["train_dataloader"], CALIBRATION_BATCHES)


def calibrate(model: MultiTokenModel, batches: Iterable[Any], max_batches: int, shown: bool = True) -> int:
    """`MultiTokenModel.calibrate` with a progress bar.

    Args:
        max_batches: how many are read at most.
        shown: whether there is a bar; of several processes, one has it.
    """
    with bar_with_time_left(shown) as bar:
        tracked = bar.track(islice(batches, max_batches), total=max_batches, description="calibrating, at most")
        return model.calibrate(tracked)


def bar_with_time_left(shown: bool = True) -> Progress:
    """A progress bar on standard error that leaves nothing behind."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)


def _fill_states(optimizer: Any) -> None:
    """Give parameters without an optimizer state one of zeros, where a step begins.

    Those of a depth that had no weight so far have none, without which FSDP2 would not load a checkpoint.
    """
    states = optimizer.state
    like = next(((parameter, state) for parameter, state in states.items() if state), None)
    for parameter in chain.from_iterable(group["params"] for group in optimizer.param_groups):
        if like is None or states.get(parameter):
            continue
        known, state = like
        states[parameter] = {
            name: torch.zeros_like(parameter if value.shape == known.shape else value, dtype=value.dtype)
            for name, value in state.items()
            if isinstance(value, Tensor)
        }


class _AtTheEnd(transformers.TrainerCallback):
    """Trains no further step where the checkpoint that is resumed is of the last one.

    transformers stops only after a step. Nothing is saved or evaluated anew either.
    """

    def on_train_begin(
        self, args: Any, state: transformers.TrainerState, control: transformers.TrainerControl, **kwargs: Any
    ) -> None:
        self.is_done = control.should_training_stop = state.global_step >= state.max_steps

    def on_epoch_end(self, args: Any, state: Any, control: transformers.TrainerControl, **kwargs: Any) -> None:
        if self.is_done:
            control.should_save = control.should_evaluate = control.should_log = False


class _LogFile(transformers.TrainerCallback):
    """Writes what is logged to log.jsonl in the output directory, a line each.

    A resumed run first cuts the file back to what its checkpoint knows; one with no step left leaves it as it is.
    """

    def __init__(self) -> None:
        self.resumed_at = 0  # step
        self.mode = "a"

    def on_train_begin(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        self.resumed_at, self.mode = state.global_step, "w"

    def on_log(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or state.global_step == self.resumed_at > 0:
            return
        entries = state.log_history if self.mode == "w" else state.log_history[-1:]
        with open(native.writable(args.output_dir) / "log.jsonl", self.mode) as file:
            file.writelines(
                json.dumps({name: _finite(value) for name, value in entry.items()}) + "\n" for entry in entries
            )
        self.mode = "a"


def _finite(value: Any) -> Any:
    """None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def last_checkpoint(directory: str | Path, say: Callable[[str], Any] = logger.warning) -> str | None:
    """The newest whole checkpoint of a training directory; None where there is none.

    Damaged ones that are newer are renamed to `damaged-checkpoint-N`: transformers keeps the checkpoints of the highest
    numbers, and would remove what is written next in favour of them.

    Args:
        say: called with a message for every damaged one.
    """
    checkpoints = sorted(
        Path(directory).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True
    )
    for checkpoint in checkpoints:
        if (damaged := damaged_file(checkpoint)) is None:
            return str(checkpoint)
        say(f"{checkpoint} is passed over: its {damaged} is missing or damaged")
        with suppress(OSError):  # another process of the training has renamed it
            os.replace(checkpoint, checkpoint.with_name(f"damaged-{checkpoint.name}"))
    return None


def write_checksums(checkpoint: Path) -> None:
    """Write the sha256 of all files of a checkpoint beside them, once they are complete."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and not path.name.startswith(CHECKSUMS))
    sums = {path.relative_to(checkpoint).as_posix(): sha256(path) for path in files}
    write_json(checkpoint / CHECKSUMS, sums)


def damaged_file(checkpoint: Path, needed: Sequence[str] = RESUMED) -> str | None:
    """The first file of a checkpoint that is missing or damaged; None where all are whole.

    Args:
        needed: files that must be there; a checkpoint of an earlier nextn has no checksums that say so.
    """
    name = CHECKSUMS
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_text()) if (checkpoint / CHECKSUMS).exists() else {}
        for name, stated in sums.items():
            if sha256(checkpoint / name) != stated:
                return name
        for pattern in needed:
            if not any(checkpoint.glob(pattern)):
                return pattern.rstrip("*")
        name = "trainer_state.json"
        json.loads((checkpoint / name).read_text())
        name = "nextn/config.json"
        native.describe(checkpoint)
    except (OSError, ValueError, AttributeError):
        return name
    return None


def _refuse_damaged(checkpoint: str | Path, needed: Sequence[str] = RESUMED) -> None:
    if damaged := damaged_file(Path(checkpoint), needed):
        raise ConfigError(f"{checkpoint} cannot be used, its {damaged} is missing or damaged; use another checkpoint.")


def write_finished(directory: Path) -> None:
    """Note that a training is finished and which files its result has; written last."""
    files = [path for pattern in RESULT for path in directory.glob(pattern) if path.is_file()]
    write_json(directory / FINISHED, {"files": sorted(path.relative_to(directory).as_posix() for path in files)})


def is_finished(directory: Path) -> bool:
    """Whether a training in a directory is finished and its result is still there."""
    try:
        files = json.loads((directory / FINISHED).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all((directory / name).is_file() for name in files)
