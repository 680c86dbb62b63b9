"""The guard on training: rollbacks, what is kept at the end, and the same decisions after a resume."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import transformers

import nextn
from conftest import Lines, make_host
from nextn.config import ConfigError
from nextn.guard import MAX_LOSS_RATIO, MAX_ROLLBACKS
from nextn.training import last_checkpoint, write_checksums
from nextn.trunk import HostError


def make_trainer(directory, callbacks=(), **settings) -> nextn.Trainer:
    torch.manual_seed(3)
    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3, recurrent=True))
    usual = {
        "per_device_train_batch_size": 8, "max_steps": 12, "learning_rate": 3e-3, "eval_strategy": "steps",
        "eval_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(directory), **usual | settings)
    data = {"train_dataset": Lines(48, seed=7), "eval_dataset": Lines(8, seed=8)}
    return nextn.Trainer(model=model, args=arguments, guard=True, callbacks=list(callbacks), **data)


class Breaking(transformers.TrainerCallback):
    """Makes a weight of the heads NaN after some steps."""

    def __init__(self, steps) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step in self.steps:
            with torch.no_grad():
                next(kwargs["model"].heads.parameters()).view(-1)[0] = math.nan


def held_out_losses(trainer) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def rollbacks(trainer) -> list[int]:
    return [entry["rolled_back_to"] for entry in trainer.state.log_history if "rolled_back_to" in entry]


def test_a_training_that_goes_well_is_left_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    losses = held_out_losses(trainer)
    assert len(losses) == 7 and not rollbacks(trainer), "before the first step, and every other step"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    assert min(losses) < losses[0]


def test_a_rate_that_is_too_high_is_halved_and_the_best_state_kept(tmp_path, caplog):
    trainer = make_trainer(tmp_path, learning_rate=10.0, lr_scheduler_type="constant")
    trainer.train()
    losses = held_out_losses(trainer)
    assert max(losses) > MAX_LOSS_RATIO * losses[0] and 1 <= len(rollbacks(trainer)) <= MAX_ROLLBACKS
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] == 10.0 and rates[-1] == 10.0 / 2 ** len(rollbacks(trainer))


@pytest.mark.parametrize("steps", [{4}, {4, 7}])
def test_weights_that_became_nan_are_recovered(steps, tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[Breaking(steps)])
    trainer.train()
    assert len(rollbacks(trainer)) == len(steps) and trainer.state.global_step == 12
    assert all(tensor.isfinite().all() for tensor in trainer.model.heads.parameters())
    assert trainer.evaluate()["eval_loss"] < held_out_losses(trainer)[0]


def test_a_training_that_cannot_be_saved_stops_with_the_best_state(tmp_path, caplog):
    trainer = make_trainer(tmp_path, callbacks=[Breaking(range(3, 13))])
    with caplog.at_level("WARNING", logger="nextn"):
        trainer.train()
    assert len(rollbacks(trainer)) == MAX_ROLLBACKS and trainer.state.global_step < 12
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(x for x in held_out_losses(trainer) if x == x))
    *_, last = (record.message for record in caplog.records if "Start again" in record.message)
    assert "training stops with the state of step" in last


def test_a_resumed_training_decides_as_one_that_was_not_cut(tmp_path):
    settings = {"learning_rate": 10.0, "save_strategy": "steps", "save_steps": 6, "max_steps": 12}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert rollbacks(whole), "the test needs one"
    cut = tmp_path / "cut"
    cut.mkdir()
    for checkpoint in (tmp_path / "whole").glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) <= 6:
            shutil.copytree(checkpoint, cut / checkpoint.name)
    resumed = make_trainer(cut, **settings)
    resumed.train(resume_from_checkpoint=last_checkpoint(cut))
    assert rollbacks(resumed) == rollbacks(whole)
    for name, tensor in whole.model.heads.state_dict().items():
        torch.testing.assert_close(resumed.model.heads.state_dict()[name], tensor, rtol=0, atol=1e-6)
    logs = [[json.loads(line) for line in (path / "log.jsonl").open()] for path in (tmp_path / "whole", cut)]
    assert [entry.get("eval_loss_2") for entry in logs[0]] == pytest.approx(
        [entry.get("eval_loss_2") for entry in logs[1]], abs=1e-5
    )


def test_without_held_out_text_there_is_no_guard(tmp_path):
    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3, recurrent=True))
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ConfigError, match="give one eval_dataset"):
        nextn.Trainer(model=model, args=arguments, train_dataset=Lines(8, seed=7), guard=True)


def test_a_base_that_is_not_finite_is_refused_before_training(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.base.model.norm.weight[0] = math.nan
    with pytest.raises(HostError, match="states of the base are not finite numbers"):
        trainer.train()
    trainer.calibrate = False
    with pytest.raises(ConfigError, match="not a finite number before the first step"):
        trainer.train()


@pytest.mark.parametrize(
    "settings",
    [{"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}, {"save_strategy": "best"}],
)
def test_what_the_guard_does_itself_is_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="guard saves the state of the lowest held-out loss"):
        make_trainer(tmp_path, metric_for_best_model="eval_loss", **settings)


@pytest.mark.parametrize("rate", [1e-3, 10.0])
def test_another_metric_of_transformers_removes_no_checkpoint_of_the_guard(rate, tmp_path):
    settings = {"metric_for_best_model": "eval_accuracy_3", "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, learning_rate=rate, save_total_limit=1, **settings)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(held_out_losses(trainer)), abs=1e-6)
    assert len(list(tmp_path.glob("checkpoint-*"))) <= 2


def test_several_held_out_sets_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    data = {"train_dataset": Lines(8, seed=7), "eval_dataset": {"a": Lines(8, seed=8), "b": Lines(8, seed=9)}}
    with pytest.raises(ConfigError, match="give one eval_dataset"):
        nextn.Trainer(model=trainer.model, args=trainer.args, guard=True, **data)


def test_a_run_without_a_guard_goes_on_with_one(tmp_path):
    torch.manual_seed(3)
    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3, recurrent=True))
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4}
    guarded = make_trainer(tmp_path, **settings)
    nextn.Trainer(
        model=model, args=guarded.args, train_dataset=Lines(48, seed=7), eval_dataset=Lines(8, seed=8)
    ).train()
    shutil.rmtree(tmp_path / "checkpoint-12")
    for checkpoint in tmp_path.glob("checkpoint-*"):  # as if nothing had been evaluated
        path = checkpoint / "trainer_state.json"
        stored = json.loads(path.read_text())
        stored["log_history"] = [entry for entry in stored["log_history"] if "eval_loss" not in entry]
        path.write_text(json.dumps(stored))
        write_checksums(checkpoint)
    guarded.train(resume_from_checkpoint=True)
    steps = [entry["step"] for entry in guarded.state.log_history if "eval_loss" in entry]
    assert steps[0] == 8 and steps[-1] == 12


def test_a_training_that_a_callback_stops_is_measured_there(tmp_path):
    class Stopping(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = state.global_step == 5

    trainer = make_trainer(tmp_path, callbacks=[Stopping()], eval_steps=4)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0, 4, 5]


def test_the_last_step_of_an_epoch_is_measured_once(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="epoch", max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0, 6, 12]


def test_other_evaluations_are_left_alone(tmp_path):
    class Testing(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                trainer.evaluate(Lines(8, seed=9), metric_key_prefix="test")

    trainer = make_trainer(tmp_path, callbacks=[Testing()])
    trainer.train()
    assert any("test_loss" in entry for entry in trainer.state.log_history)


def test_the_log_file_is_json_where_a_loss_is_not_finite(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    trainer = make_trainer(tmp_path, callbacks=[Breaking({4})])
    trainer.train()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line, parse_constant=refuse) for line in lines]
    assert any(entry.get("eval_loss", 0) is None for entry in entries)
