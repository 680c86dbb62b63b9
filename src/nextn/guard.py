"""A guard on training: held-out loss decides what is saved, and a loss that rises ends in a smaller learning rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers.utils import logging

from nextn.config import ConfigError

if TYPE_CHECKING:
    from nextn.training import Trainer

MAX_LOSS_RATIO = 1.1  # over the first held-out loss; above it, training goes back
MAX_ROLLBACKS = 2
logger = logging.get_logger("nextn")


class HeldOutGuard(transformers.TrainerCallback):
    """Keeps the state with the lowest held-out loss, and goes back to it where the loss rises or is not finite.

    The held-out loss is measured before the first step, whenever the trainer evaluates, and after the last step. Each
    new lowest loss is saved as a checkpoint; `save_total_limit` bounds how many are kept, and never removes the best.
    Where the loss is above `MAX_LOSS_RATIO` times the first one, or not a finite number, the weights of the best
    checkpoint are loaded, the optimizer's moments are cleared, and the learning rate is halved for the rest of the run;
    after `MAX_ROLLBACKS` of these the run stops. All decisions follow from the trainer's log history, which its
    checkpoints hold, so that a resumed run decides as an uninterrupted one.

    Args:
        trainer: with an evaluation dataset.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.is_training = False

    # --- what the log says ------------------------------------------------------------------------------------

    @property
    def losses(self) -> dict[int, float]:
        """The finite held-out losses of this run, by step."""
        history = self.trainer.state.log_history
        losses = {int(entry["step"]): entry["eval_loss"] for entry in history if "eval_loss" in entry}
        return {step: loss for step, loss in losses.items() if math.isfinite(loss)}

    @property
    def best_step(self) -> int:
        """The first step with the lowest held-out loss."""
        losses = self.losses
        return min(losses, key=lambda step: (losses[step], step))

    @property
    def best_checkpoint(self) -> Path:
        return Path(str(self.trainer.args.output_dir)) / f"checkpoint-{self.best_step}"

    @property
    def rollbacks(self) -> int:
        return sum("rolled_back_to" in entry for entry in self.trainer.state.log_history)

    # --- events -----------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_training = True
        if self.losses and self.best_checkpoint.is_dir():
            return  # resumed
        self.trainer.evaluate()
        if not self.losses:
            raise ConfigError(
                "The held-out loss is not a finite number before the first step; check the base, its dtype and the "
                "validation data."
            )
        self.trainer.save_checkpoint()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps or control.should_training_stop:
            control.should_evaluate = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.losses:  # evaluated at the end of the step already
            control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_training and "non_finite_losses" in kwargs["logs"]:
            self._go_back("the training loss is not a finite number", control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (self.is_training and self.losses and state.global_step and "eval_loss" in kwargs["metrics"]):
            return
        loss, first = kwargs["metrics"]["eval_loss"], next(iter(self.losses.values()))
        if not math.isfinite(loss):
            self._go_back("the held-out loss is not a finite number", control, **kwargs)
        elif loss > MAX_LOSS_RATIO * first:
            self._go_back(f"the held-out loss rose from {first:.3f} to {loss:.3f}", control, **kwargs)
        elif self.best_step == state.global_step:
            control.should_save = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_training = False

    # --- going back -------------------------------------------------------------------------------------------

    def _go_back(self, why: str, control: Any, optimizer: Any, lr_scheduler: Any, **kwargs: Any) -> None:
        if self.rollbacks >= MAX_ROLLBACKS:
            control.should_training_stop, control.should_save = True, False
            self._warn(
                f"{why} after the learning rate was halved {MAX_ROLLBACKS} times; training stops with the state of "
                f"step {self.best_step}. Start again with a lower learning rate."
            )
            return
        self.trainer.load_checkpoint_weights(self.best_checkpoint)
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] /= 2
        if hasattr(lr_scheduler, "base_lrs"):
            lr_scheduler.base_lrs = [rate / 2 for rate in lr_scheduler.base_lrs]
        self._warn(f"{why}; going back to the state of step {self.best_step} at half the learning rate.")
        self.trainer.log({"rolled_back_to": self.best_step})

    def _warn(self, message: str) -> None:
        if self.trainer.is_world_process_zero():
            logger.warning(f"Step {self.trainer.state.global_step}: {message}")
