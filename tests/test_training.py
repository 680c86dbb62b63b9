"""Training through transformers' Trainer: it learns, it goes on where it stood, settings that are equal are equal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils.data import default_collate

import nextn
from conftest import KINDS, MORE_KINDS, Lines, fit, made_up_text, make_host, make_tokenizer
from nextn.config import ConfigError
from nextn.data import byte_tokenizer
from nextn.training import last_checkpoint, simulated


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


@pytest.mark.parametrize("trainer_class", [nextn.Trainer, transformers.Trainer])
@pytest.mark.parametrize("kind", [*KINDS, "eagle3", "shared_kv"])
def test_norms_of_heads_move_on_a_bfloat16_base(kind, trainer_class, tmp_path):
    torch.manual_seed(3)
    model = nextn.attach(make_host("llama").bfloat16(), nextn.MultiTokenConfig(n=3, **MORE_KINDS[kind]))
    before = state(model)
    settings = arguments(tmp_path, learning_rate=1e-4, max_steps=8, save_strategy="no")
    trainer = trainer_class(model=model, args=settings, train_dataset=Lines())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    norms = [name for name, tensor in model.heads.state_dict().items() if "norm" in name and tensor.ndim == 1]
    assert norms
    for name in norms:
        assert not torch.equal(model.heads.state_dict()[name], before[f"heads.{name}"]), name


def test_resuming_on_a_bfloat16_base_loses_no_bits_of_the_heads(tmp_path):
    def trained(resume=None, heads=None):
        torch.manual_seed(3)
        base = make_host("llama").bfloat16()
        config = nextn.MultiTokenConfig(n=3, recurrent=True)
        model = nextn.attach(base, config) if heads is None else nextn.load(heads, base=base)
        trainer = nextn.Trainer(model=model, args=arguments(tmp_path, learning_rate=1e-4), train_dataset=Lines())
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = trained()
    resumed = trained(str(tmp_path / "checkpoint-3"), heads=tmp_path / "checkpoint-3")  # opened in bfloat16
    assert_equal(state(resumed), state(whole), rtol=0, atol=0)


@pytest.mark.parametrize("trainer_class", [nextn.Trainer, transformers.Trainer])
def test_reentrant_checkpointing_is_refused_by_trainers(trainer_class, tmp_path):
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = trainer_class(model=model_of(), args=arguments(tmp_path, **kwargs), train_dataset=Lines())
    with pytest.raises(ConfigError, match="use_reentrant=True loses gradients"):
        trainer.train()


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


def files_of(directory) -> dict[str, tuple[bytes, int]]:
    """Content and time of writing of all files."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 4, "save_steps": 4},
        {"max_steps": -1, "num_train_epochs": 1.5},
        {"max_steps": 4, "save_strategy": "epoch", "logging_strategy": "epoch"},
        {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"max_steps": 6},
        {
            "max_steps": 4,
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
            "learning_rate": 0.5,
        },
    ],
    ids=["inside an epoch", "epochs", "epoch strategy", "accumulated", "end of an epoch", "best"],
)
def test_resuming_at_the_last_step_trains_no_further(settings, tmp_path):
    def trained(resume=None):
        model = model_of()
        data = {"train_dataset": Lines(), "eval_dataset": Lines(8)}
        trainer = nextn.Trainer(model=model, args=arguments(tmp_path, **settings), **data)
        trainer.train(resume_from_checkpoint=resume)
        return state(model), trainer.state.global_step

    whole, steps = trained()
    before = files_of(tmp_path)
    again, steps_again = trained(resume=True)
    assert steps_again == steps
    assert_equal(again, whole, rtol=0, atol=0)
    assert files_of(tmp_path) == before, "checkpoints must not be written anew"


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {"flipped": flip, "empty": lambda path: path.write_bytes(b""), "missing": lambda path: path.unlink()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A training with checkpoints after steps 3 and 6."""
    directory = tmp_path_factory.mktemp("checkpoints")
    nextn.Trainer(model=model_of(), args=arguments(directory), train_dataset=Lines()).train()
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "nextn/heads.safetensors"]
)
def test_a_damaged_checkpoint_is_passed_over(name, damage, checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    said = []
    assert last_checkpoint(tmp_path, said.append).endswith("checkpoint-6") and not said
    DAMAGES[damage](tmp_path / "checkpoint-6" / name)
    assert last_checkpoint(tmp_path, said.append).endswith("checkpoint-3")
    (sentence,) = said
    assert "checkpoint-6 is passed over" in sentence and name in sentence
    trainer = nextn.Trainer(model=model_of(), args=arguments(tmp_path), train_dataset=Lines())
    with pytest.raises(ConfigError, match=r"checkpoint-6 cannot be used, its .* is missing or damaged"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_resuming_past_a_damaged_checkpoint_comes_to_the_same_end(checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    flip(tmp_path / "checkpoint-6" / "optimizer.pt")
    model = model_of()
    trainer = nextn.Trainer(model=model, args=arguments(tmp_path), train_dataset=Lines())
    trainer.train(resume_from_checkpoint=True)
    whole = nextn.load(checkpoints / "checkpoint-6", base=model.base)
    assert_equal(state(model), state(whole), rtol=0, atol=1e-6)
    assert last_checkpoint(tmp_path).endswith("checkpoint-6"), "written again, it is whole"
    flip(tmp_path / "checkpoint-6" / "optimizer.pt")
    flip(tmp_path / "checkpoint-3" / "optimizer.pt")
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_checksums_is_taken_where_it_has_all_files(checkpoints, tmp_path):
    """An earlier nextn wrote none."""
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-6" / "checksums.json").unlink()
    assert last_checkpoint(tmp_path).endswith("checkpoint-6")
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path).endswith("checkpoint-3")


def test_a_damaged_best_checkpoint_is_not_loaded(tmp_path):
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    trainer = nextn.Trainer(model=model_of(), args=args, train_dataset=Lines(), eval_dataset=Lines(8))
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    flip(best / "nextn" / "heads.safetensors")
    with pytest.raises(ConfigError, match=r"heads\.safetensors is missing or damaged"):
        trainer._load_best_model()


def test_recomputing_layers_by_themselves_is_refused(tmp_path, monkeypatch):
    plugin = SimpleNamespace(activation_checkpointing=True)
    monkeypatch.setattr("accelerate.state.AcceleratorState.fsdp_plugin", plugin, raising=False)
    with pytest.raises(ConfigError, match="use gradient_checkpointing instead"):
        nextn.Trainer(model=model_of(), args=arguments(tmp_path), train_dataset=Lines())


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


def test_trainers_calibrate_new_heads_unless_told_not_to(tmp_path, trained_host):
    def held_out_loss(name: str, trainer_class=nextn.Trainer, **kwargs) -> float:
        """After one step with a learning rate of 0."""
        settings = arguments(tmp_path / name, learning_rate=0.0, max_steps=1, save_strategy="no")
        model = nextn.attach(trained_host, nextn.MultiTokenConfig(n=3, recurrent=True))
        data = {"train_dataset": Lines(), "eval_dataset": Lines(16)}
        trainer = trainer_class(model=model, args=settings, **data, **kwargs)
        trainer.train()
        return trainer.evaluate()["eval_loss"]

    without = held_out_loss("without", calibrate=False)
    ours = held_out_loss("ours")
    stock = held_out_loss("stock", transformers.Trainer, callbacks=[nextn.Calibration()])
    assert ours < without - 0.1 and stock < without - 0.1
    assert held_out_loss("plain", transformers.Trainer) == pytest.approx(without)


def test_calibration_depends_on_no_setting_of_the_training(tmp_path):
    losses = []
    for name, settings in (("a", {}), ("b", {"per_device_train_batch_size": 3}), ("c", {"seed": 5})):
        trainer = nextn.Trainer(model=model_of(), args=arguments(tmp_path / name, **settings), train_dataset=Lines())
        trainer.args.learning_rate = 0.0
        trainer.train()
        losses.append(state(trainer.model)["heads.step.eh_proj.weight"])
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


def test_heads_that_were_trained_are_not_calibrated_again(tmp_path):
    model = model_of()
    nextn.Trainer(model=model, args=arguments(tmp_path / "first"), train_dataset=Lines()).train()
    before = state(model)
    settings = arguments(tmp_path / "second", learning_rate=0.0, max_steps=1, save_strategy="no")
    nextn.Trainer(model=model, args=settings, train_dataset=Lines()).train()
    assert_equal(state(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["parallel", "eagle3", "shared_kv"])
def test_kinds_without_a_closed_form_say_so(kind, tmp_path, caplog):
    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3, **MORE_KINDS[kind]))
    before = state(model)
    with caplog.at_level("WARNING", logger="nextn"):
        assert model.calibrate([{"input_ids": made_up_text(4, 24, seed=7)}]) == 0
    assert "no closed form to calibrate" in caplog.text
    assert_equal(state(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("calibrate", "freeze", "cause"),
    [(False, True, "The heads are not calibrated"), (True, False, "The base cannot predict this text")],
)
def test_a_first_loss_above_a_uniform_guess_is_reported(calibrate, freeze, cause, tmp_path, caplog):
    torch.manual_seed(3)
    host = make_host("llama")
    with torch.no_grad():
        host.lm_head.weight.mul_(100)  # sure of itself, and wrong
    weights = {"preset": "fastmtp" if freeze else "gloeckle"}
    config = nextn.MultiTokenConfig(n=3, recurrent=True, freeze_trunk=freeze, weights=weights)
    trainer = nextn.Trainer(
        model=nextn.attach(host, config), args=arguments(tmp_path), train_dataset=Lines(), calibrate=calibrate
    )
    with caplog.at_level("WARNING", logger="nextn"):
        trainer.train()
    (message,) = (record.message for record in caplog.records if "uniform guess" in record.message)
    assert cause in message and f"{torch.tensor(64.0).log():.1f}" in message


def test_a_usual_first_loss_is_not_reported(tmp_path, caplog, trained_host):
    model = nextn.attach(trained_host, nextn.MultiTokenConfig(n=3, recurrent=True))
    with caplog.at_level("WARNING", logger="nextn"):
        nextn.Trainer(model=model, args=arguments(tmp_path), train_dataset=Lines()).train()
    assert "uniform guess" not in caplog.text


class Uneven(Lines):
    """Rows with another count of targets each, the last ones of some depths masked."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.ids[index].clone()
        labels[: 1 + index % 5] = labels[24 - index % 7 :] = -100
        return {"input_ids": self.ids[index], "labels": labels}


def test_held_out_figures_by_depth_do_not_depend_on_the_batch_size(tmp_path):
    figures = []
    for size in (1, 3, 16):
        settings = arguments(tmp_path, per_device_eval_batch_size=size)
        model = model_of(freeze_trunk=False, weights={"preset": "gloeckle"})
        metrics = nextn.Trainer(model=model, args=settings, eval_dataset=Uneven(16)).evaluate()
        names = [f"eval_{name}_{depth}" for name in ("loss", "accuracy") for depth in (1, 2, 3)]
        figures.append({name: metrics[name] for name in ("eval_loss", *names, "eval_tokens", "eval_tau")})
    assert figures[0] == pytest.approx(figures[1], abs=1e-5) and figures[0] == pytest.approx(figures[2], abs=1e-5)
    batch = torch.utils.data.default_collate([Uneven(16)[index] for index in range(16)])
    assert figures[0]["eval_tokens"] == (batch["labels"][:, 1:] != -100).sum()
    with torch.no_grad():
        logits = model.base(input_ids=batch["input_ids"]).logits[:, :-1]
        whole = model(**batch).loss.item()
    assert figures[0]["eval_loss"] == pytest.approx(whole, abs=1e-5)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert figures[0]["eval_loss_1"] == pytest.approx(plain.item(), abs=1e-5)


def test_bits_per_byte_are_of_byte_tokenizers_alone(tmp_path):
    settings, model = arguments(tmp_path), model_of(freeze_trunk=False, weights={"preset": "gloeckle"})
    metrics = {
        name: nextn.Trainer(model=model, args=settings, eval_dataset=Lines(8), processing_class=tokenizer).evaluate()
        for name, tokenizer in (("bytes", byte_tokenizer()), ("words", make_tokenizer()))
    }
    assert "eval_bits_per_byte" not in metrics["words"]
    expected = metrics["bytes"]["eval_loss_1"] / torch.tensor(2.0).log().item()
    assert metrics["bytes"]["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_the_log_file_has_what_was_logged_and_goes_on_after_a_kill(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 9}

    def trained(directory, resume=None):
        data = {"train_dataset": Lines(), "eval_dataset": Lines(8)}
        trainer = nextn.Trainer(model=model_of(), args=arguments(directory, **settings), **data)
        trainer.train(resume_from_checkpoint=resume)
        return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()], trainer

    whole, trainer = trained(tmp_path / "whole")
    assert whole == trainer.state.log_history
    assert {"loss", "grad_norm", "tokens_per_second", "loss_2", "accuracy_3"} <= whole[0].keys()
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", cut / "checkpoint-3")
    (cut / "log.jsonl").write_text((tmp_path / "whole" / "log.jsonl").read_text())  # past the checkpoint, as a kill
    resumed, _ = trained(cut, resume=True)
    assert [entry["step"] for entry in resumed] == [entry["step"] for entry in whole]
    held_out = [[entry["eval_loss_2"] for entry in log if "eval_loss_2" in entry] for log in (resumed, whole)]
    assert len(held_out[0]) == 3 and held_out[0] == pytest.approx(held_out[1], abs=1e-5)


def test_tokens_per_second_leave_calibration_evaluation_and_saving_out(tmp_path, monkeypatch):
    """On a clock that these move by a thousand seconds, and a step by one."""
    clock = [0.0]
    monkeypatch.setattr("nextn.training.time.monotonic", lambda: clock[0])

    class Slow(transformers.TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            clock[0] += 1000.0

        def on_step_end(self, *args, **kwargs):
            clock[0] += 1.0

    def calibrate(self, batches):
        clock[0] += 1000.0
        return 0

    monkeypatch.setattr(nextn.MultiTokenModel, "calibrate", calibrate)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2, "save_steps": 1}
    data = {"train_dataset": Lines(), "eval_dataset": Lines(8)}
    trainer = nextn.Trainer(model=model_of(), args=arguments(tmp_path, **settings), callbacks=[Slow()], **data)
    trainer.train()
    rates = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    assert len(rates) == 3 and all(rate == pytest.approx(8 * 24, rel=0.01) for rate in rates)


def test_the_time_left_is_right_after_a_tenth_of_the_run(tmp_path, monkeypatch):
    """On a clock that steps and evaluation move; the evaluation before the first step is not counted in."""
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    elapsed: dict[int, float] = {}

    class Clock(transformers.TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            clock[0] += 2.0

        def on_step_end(self, *args, **kwargs):
            clock[0] += 1.0

        def on_evaluate(self, args, state, *rest, **kwargs):
            bar = next(cb.training_bar for cb in trainer.callback_handler.callbacks if hasattr(cb, "training_bar"))
            elapsed[state.global_step] = bar.format_dict["elapsed"] if bar else 0.0

    settings = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 20, "disable_tqdm": False}
    data = {"train_dataset": Lines(), "eval_dataset": Lines(32)}
    trainer = nextn.Trainer(
        model=model_of(), args=arguments(tmp_path, **settings), callbacks=[Clock()], guard=True, **data
    )
    trainer.train()
    estimate = 20 / 2 * elapsed[2]
    assert elapsed[0] == 0
    assert estimate == pytest.approx(elapsed[20], rel=0.2)


def test_calibration_leaves_out_columns_that_the_model_does_not_take(tmp_path):
    class Named(Lines):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"text": "a name"}

    weights = []
    for dataset in (Lines(), Named()):
        settings = arguments(tmp_path, learning_rate=0.0, max_steps=1, save_strategy="no", remove_unused_columns=True)
        trainer = nextn.Trainer(model=model_of(), args=settings, train_dataset=dataset)
        trainer.train()
        weights.append(state(trainer.model)["heads.step.eh_proj.weight"])
    assert torch.equal(*weights)


def test_the_callback_leaves_trained_heads_as_they_are(tmp_path):
    model = model_of()
    nextn.Trainer(model=model, args=arguments(tmp_path / "first"), train_dataset=Lines()).train()
    before = state(model)
    settings = arguments(tmp_path / "second", learning_rate=0.0, max_steps=1, save_strategy="no")
    callbacks = [nextn.Calibration()]
    transformers.Trainer(model=model, args=settings, train_dataset=Lines(), callbacks=callbacks).train()
    assert_equal(state(model), before, rtol=0, atol=0)
