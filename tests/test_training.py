"""Training through transformers' Trainer: it learns, it goes on where it stood, settings that are equal are equal."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.utils.data import Dataset, default_collate

import nextn
from conftest import KINDS, fit, made_up_text, make_host
from nextn.training import last_checkpoint, simulated


class Lines(Dataset):
    def __init__(self, rows: int = 48, length: int = 24) -> None:
        self.ids = made_up_text(rows, length, seed=7)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def arguments(directory, **kwargs) -> transformers.TrainingArguments:
    settings = {
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return transformers.TrainingArguments(output_dir=str(directory), **settings | kwargs)


def model_of(kind: str = "recurrent", **kwargs) -> nextn.MultiTokenModel:
    torch.manual_seed(3)
    return nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3, **KINDS[kind], **kwargs))


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(ours, theirs, **bounds) -> None:
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=name, **bounds)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_trainer_and_a_loop_train_heads(kind, tmp_path):
    model = model_of(kind)
    before = state(model)
    trainer = transformers.Trainer(model=model, args=arguments(tmp_path, max_steps=12), train_dataset=Lines())
    losses = [entry["loss"] for entry in (trainer.train(), trainer.state.log_history)[1] if "loss" in entry]
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("heads.") for name in changed), "the trunk is frozen"

    looped = model_of(kind)
    ids = made_up_text(8, 24, seed=1)
    first = looped(ids, labels=ids).loss.item()
    fit(looped.train(), 10)
    assert looped(ids, labels=ids).loss.item() < first


@pytest.mark.parametrize("frozen", [True, False])
def test_resumed_training_equals_training_in_one_go(frozen, tmp_path):
    def train(directory, resume=None, **kwargs):
        weights = {"preset": "deepseek"} if not frozen else {}
        model = model_of(freeze_trunk=frozen, weights=weights)
        trainer = nextn.Trainer(model=model, args=arguments(directory, **kwargs), train_dataset=Lines())
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer

    whole, _ = train(tmp_path / "whole")
    resumed, trainer = train(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert_equal(state(resumed), state(whole), rtol=0, atol=1e-6)
    assert any("loss_2" in entry and "accuracy_3" in entry for entry in trainer.state.log_history)
    assert all(entry["tokens_per_second"] > 0 for entry in trainer.state.log_history if "loss_2" in entry)
    assert not any("overlap_2" in entry for entry in trainer.state.log_history)
    stored = nextn.load(tmp_path / "whole" / "checkpoint-6", base=None if not frozen else whole.base)
    assert_equal(state(stored), state(whole), rtol=0, atol=0)


def test_one_batch_of_eight_equals_two_of_four_accumulated(tmp_path):
    def train(name, size, accumulate):
        model = model_of()
        args = arguments(
            tmp_path / name, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, save_steps=99
        )
        nextn.Trainer(model=model, args=args, train_dataset=Lines()).train()
        return state(model)

    # The order of sums differs, and Adam divides by small roots: equal to 1e-4 after six steps at 3e-3.
    assert_equal(train("one", 8, 1), train("two", 4, 2), rtol=0, atol=1e-4)


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path):
    nextn.Trainer(model=model_of(), args=arguments(tmp_path), train_dataset=Lines()).train()
    assert last_checkpoint(tmp_path).endswith("checkpoint-6")
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"half')
    assert last_checkpoint(tmp_path).endswith("checkpoint-3")
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, learning_rate=0.5, max_steps=6
    )
    model = model_of()
    trainer = nextn.Trainer(model=model, args=args, train_dataset=Lines(), eval_dataset=Lines(8))
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert_equal(state(nextn.load(best, base=model.base).heads), state(model.heads), rtol=0, atol=0)


def test_the_trainer_counts_the_targets_that_the_loss_counts():
    trainer = nextn.Trainer(model=model_of(), args=transformers.TrainingArguments(use_cpu=True, report_to=[]))
    batch = default_collate([Lines()[place] for place in range(4)])
    _, counted = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert int(counted) == 4 * 23


def test_the_estimate_of_tau_is_what_decoding_of_the_same_text_gives(trained_model, prompts):
    """On the model's own greedy text, the steps that the loss's hits make are the engine's, one by one."""
    for prompt in prompts:
        ((_, result),) = trained_model.engine(stop_tokens=[]).generate([prompt], 40)
        ids = torch.tensor([prompt + result.tokens])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            accepted = trained_model(ids, labels=labels).accepted
        assert simulated(accepted) == result.accepted


def test_steps_that_the_end_of_a_text_cuts_short_are_left_out():
    # two texts in a row, apart by a position that nothing goes on from
    assert simulated(torch.tensor([[-1, 2, 0, 0, 1, 0, -1, 0, 3, -1, -1]])) == [2, 0]
    assert simulated(torch.tensor([[-1, -1]])) == []
