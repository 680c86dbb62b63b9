"""TRL's own trainers train a MultiTokenModel: the same losses as nextn.Trainer, and every head."""

from __future__ import annotations

import copy

import datasets
import peft
import pytest
import torch
import transformers
import trl

import nextn
from conftest import KINDS, made_up_text, make_host, make_tokenizer
from nextn.config import ConfigError

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<eos>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '?' }}{% endif %}{% endfor %}"
)
LORA = {"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
TOGETHER = {"freeze_trunk": False, "weights": {"preset": "deepseek"}}


def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def texts(count: int = 16) -> list[str]:
    """Lines of 9 to 19 characters."""
    rows = made_up_text(count, 24, seed=7).tolist()
    return [tokenizer().decode(row[: 9 + place % 11]) for place, row in enumerate(rows)]


def lines() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts()})


def answers() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": [text[:4] for text in texts()], "completion": texts()[::-1]})


def chats() -> datasets.Dataset:
    roles = "user", "assistant", "user", "assistant"
    turns = [texts()[place:] + texts()[:place] for place in range(4)]
    chats = [
        [{"role": role, "content": text} for role, text in zip(roles, chat, strict=True)]
        for chat in zip(*turns, strict=True)
    ]
    return datasets.Dataset.from_dict({"messages": chats})


DATA = {
    "padded": (lines, {}),
    "packed": (lines, {"packing": True, "max_length": 32}),
    "split": (lines, {"packing": True, "max_length": 16, "packing_strategy": "bfd_split"}),
    "wrapped": (lines, {"packing": True, "max_length": 16, "packing_strategy": "wrapped"}),
    "padding_free": (lines, {"padding_free": True, "max_length": None}),
    "completions": (answers, {}),
    "completions_packed": (answers, {"packing": True, "max_length": 48}),
    "prompts_too": (answers, {"completion_only_loss": False}),
    "assistant": (chats, {"assistant_only_loss": True}),
    "assistant_packed": (chats, {"assistant_only_loss": True, "packing": True, "max_length": 96}),
    "accumulated": (lines, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "without_checkpointing": (lines, {"gradient_checkpointing": False}),
}


def arguments(directory, config=trl.SFTConfig, **kwargs):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return config(str(directory), **settings | kwargs)


def model_of(kind: str = "recurrent", host=None, **kwargs) -> nextn.MultiTokenModel:
    torch.manual_seed(3)
    return nextn.attach(
        make_host("llama") if host is None else host, nextn.MultiTokenConfig(n=3, **KINDS[kind], **kwargs)
    )


def sft(model, directory, data: str = "padded", peft_config=None, two: bool = False, **kwargs) -> trl.SFTTrainer:
    make, settings = DATA[data]
    return trl.SFTTrainer(
        model=model,
        args=arguments(directory, **settings | kwargs),
        train_dataset=make(),
        eval_dataset={"first": make(), "second": make()} if two else make(),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def as_nextn_trains(trainer: trl.SFTTrainer, model) -> nextn.Trainer:
    """nextn.Trainer with the settings and batches of another one."""
    return nextn.Trainer(
        calibrate=False,  # SFTTrainer does not
        model=model,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
    )


def logged(trainer) -> list[dict[str, float]]:
    """What each step logged."""
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")


@pytest.fixture
def unrounded(monkeypatch):
    """Figures by depth are logged with all their digits."""
    monkeypatch.setattr("nextn.trainers.round", lambda value, digits: value, raising=False)


def assert_steps_equal(ours, theirs, names, bound: float = 1e-5) -> None:
    assert len(ours) == len(theirs)
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for name in names:
            assert one[name] == pytest.approx(other[name], abs=bound), (step, name)


BY_DEPTH = [f"{name}_{k}" for name in ("loss", "accuracy") for k in (1, 2, 3)]


@pytest.mark.parametrize("data", DATA)
def test_losses_are_those_of_nextns_trainer_on_the_same_batches(data, tmp_path, unrounded):
    trainer = sft(model_of(**TOGETHER), tmp_path, data)
    before = copy.deepcopy(trainer.model.state_dict())
    steps = logged(trainer)
    after = trainer.model.state_dict()
    assert not [name for name in before if torch.equal(before[name], after[name])], "everything is trained"
    own = as_nextn_trains(trainer, model_of(**TOGETHER))
    assert_steps_equal(steps, logged(own), ["loss", *BY_DEPTH])
    for name, tensor in own.model.state_dict().items():
        torch.testing.assert_close(after[name], tensor, msg=name, atol=1e-5, rtol=1e-4)


def test_heads_run_in_the_autocast_of_the_trainer(tmp_path, unrounded):
    trainer = sft(model_of(**TOGETHER), tmp_path, bf16=True)
    first, own = logged(trainer)[0], logged(as_nextn_trains(trainer, model_of(**TOGETHER)))[0]
    wide = logged(sft(model_of(**TOGETHER), tmp_path))[0]
    for name in ("loss_2", "loss_3"):
        assert first[name] == pytest.approx(own[name], abs=1e-5) != pytest.approx(wide[name], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_heads_of_a_frozen_trunk_are_trained(kind, loss_type, tmp_path, unrounded):
    trainer = sft(model_of(kind), tmp_path, loss_type=loss_type)
    before = copy.deepcopy(trainer.model.state_dict())
    steps = logged(trainer)
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("heads.")}

    own = logged(as_nextn_trains(trainer, model_of(kind)))
    assert_steps_equal(steps, own, [name for name in BY_DEPTH if not name.endswith("_1")])


def test_the_loss_is_trls_own_and_that_of_the_heads(tmp_path, unrounded):
    plain = logged(sft(make_host("llama"), tmp_path))[0]
    first = logged(sft(model_of(**TOGETHER), tmp_path))[0]
    assert first["loss_1"] == pytest.approx(plain["loss"], abs=1e-5)
    assert first["accuracy_1"] == pytest.approx(plain["mean_token_accuracy"], abs=1e-6)
    assert first["mean_token_accuracy"] == plain["mean_token_accuracy"] and first["entropy"] == plain["entropy"]
    assert first["loss"] > plain["loss"] + 0.5


def test_dft_weights_the_trunks_loss_and_trains_heads_as_nll_does(tmp_path):
    plain = logged(sft(make_host("llama"), tmp_path, loss_type="dft"))[0]
    trainer = sft(model_of(**TOGETHER), tmp_path, loss_type="dft", max_grad_norm=0.0)
    assert logged(trainer)[0]["loss"] == pytest.approx(plain["loss"], abs=1e-5)

    def first_step(loss_type):
        trainer = sft(model_of(**TOGETHER), tmp_path, loss_type=loss_type, optim="sgd", max_steps=1, max_grad_norm=0.0)
        trainer.train()
        return trainer.model

    nll, dft = first_step("nll"), first_step("dft")
    for name, tensor in nll.heads.state_dict().items():
        torch.testing.assert_close(dft.heads.state_dict()[name], tensor, msg=name)
    trunks = zip(nll.base.parameters(), dft.base.parameters(), strict=True)
    assert not all(torch.allclose(one, other, atol=1e-6) for one, other in trunks)


def test_reports_and_evaluations_have_figures_by_depth(tmp_path):
    reported = []

    class Report(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    trainer = sft(model_of(), tmp_path, eval_strategy="steps", eval_steps=3)
    trainer.add_callback(Report())
    trainer.train()
    evaluated = trainer.evaluate()
    for name in BY_DEPTH:
        assert all(name in entry for entry in reported if "loss" in entry), name
        assert f"eval_{name}" in next(entry for entry in reported if "eval_loss" in entry)
        assert f"eval_{name}" in evaluated
    held_out, alone = sft(model_of(), tmp_path, two=True).evaluate(), sft(model_of(), tmp_path).evaluate()
    assert held_out["eval_first_loss_2"] == held_out["eval_second_loss_2"] == alone["eval_loss_2"]


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [None, ["lm_head"], ["heads", "embed_tokens", "lm_head"]])
@pytest.mark.parametrize("target_modules", [LORA["target_modules"], "all-linear"])
def test_peft_config_trains_adapters_of_the_trunk_and_the_heads(target_modules, copied, tmp_path, unrounded):
    config = peft.LoraConfig(**LORA | {"target_modules": target_modules, "modules_to_save": copied})
    trainer = sft(model_of(**TOGETHER), tmp_path / "run", peft_config=config)
    before = copy.deepcopy(trainer.model.state_dict())
    steps = logged(trainer)
    after = trainer.model.state_dict()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    of_trunk = {name for name in trained if ".base." in name}
    assert len([name for name in of_trunk if "lora_" not in name]) == len({*(copied or ())} - {"heads"})
    assert all(".heads." in name and "lora_" not in name for name in trained - of_trunk)
    heads = trainer.model.get_base_model().heads
    assert len([name for name in trained if ".heads." in name]) == len(
        list(heads.modules_to_save["default"].parameters())
    )
    first = logged(sft(model_of(**TOGETHER), tmp_path))[0]
    assert_steps_equal(steps[:1], [first], ["loss", *BY_DEPTH])

    ids = made_up_text(2, 12, seed=1)
    losses = trainer.model.eval()(input_ids=ids, labels=ids).depth_losses
    trainer.save_model()
    again = peft.PeftModel.from_pretrained(model_of(**TOGETHER), tmp_path / "run").eval()
    torch.testing.assert_close(again(input_ids=ids, labels=ids).depth_losses, losses)
    with pytest.raises(ConfigError, match="call merge_and_unload"):
        trainer.model.get_base_model().save_pretrained(tmp_path / "wrapped")
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = nextn.load(tmp_path / "merged")
    torch.testing.assert_close(loaded(ids, labels=ids).depth_losses, losses)
    assert torch.equal(loaded.generate(ids, max_new_tokens=6), loaded.generate(ids, max_new_tokens=6, heads=1))


def test_training_of_adapters_and_heads_resumes(tmp_path):
    def trained(directory, resume=None):
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        trainer = sft(model_of(**TOGETHER), directory, peft_config=peft.LoraConfig(**LORA), **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole, resumed = trained(tmp_path / "whole"), trained(tmp_path / "more", str(tmp_path / "whole" / "checkpoint-2"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, msg=name)


def test_a_base_that_has_adapters_is_trained_without_peft_config(tmp_path):
    host = peft.get_peft_model(make_host("llama"), peft.LoraConfig(**LORA))
    trainer = sft(model_of(host=host, **TOGETHER), tmp_path)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("heads.") or "lora_" in name}
    with pytest.raises(ConfigError, match="has adapters already"):
        sft(trainer.model, tmp_path, peft_config=peft.LoraConfig(**LORA))


def test_adapters_of_a_frozen_trunk_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="attach with freeze_trunk=False"):
        sft(model_of(), tmp_path, peft_config=peft.LoraConfig(**LORA))


# --- other trainers of TRL ----------------------------------------------------------------------------------------


def preferences() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": texts(), "chosen": [*texts()[1:], "a"], "rejected": texts()[::-1]})


def dpo(model, directory, **kwargs) -> trl.DPOTrainer:
    return trl.DPOTrainer(
        model=model,
        ref_model=None if "peft_config" in kwargs else make_host("llama"),
        args=arguments(directory, trl.DPOConfig),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        **kwargs,
    )


def grpo(model, directory, settings=None, **kwargs) -> trl.GRPOTrainer:
    settings = {"num_generations": 4, "max_completion_length": 8} | (settings or {})
    return trl.GRPOTrainer(
        model=model,
        args=arguments(directory, trl.GRPOConfig, **settings),
        train_dataset=preferences().select_columns("prompt"),
        reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
        processing_class=tokenizer(),
        **kwargs,
    )


@pytest.mark.parametrize("make", [dpo, grpo])
@pytest.mark.parametrize("with_lora", [False, True])
def test_trainers_of_preferences_and_rewards_train_the_trunk_alone(make, with_lora, tmp_path, caplog):
    kwargs = {"peft_config": peft.LoraConfig(**LORA)} if with_lora else {}
    trainer = make(model_of(**TOGETHER), tmp_path, **kwargs)
    assert "trains the trunk alone; the heads stay as they are" in caplog.text
    before = copy.deepcopy(trainer.model.state_dict())
    steps = logged(trainer)
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not [name for name in changed if "heads." in name]
    if make is dpo and not with_lora:
        assert_steps_equal(steps, logged(dpo(make_host("llama"), tmp_path)), ["loss", "rewards/margins", "entropy"])


@pytest.mark.parametrize("make", [dpo, grpo])
def test_trainers_that_would_train_nothing_are_refused(make, tmp_path):
    with pytest.raises(ConfigError, match=r"Trainer trains the trunk, which .* attach with freeze_trunk=False"):
        make(model_of(), tmp_path)


@pytest.mark.parametrize("setting", ["use_transformers_continuous_batching", "cast_lm_head_to_fp32"])
def test_settings_that_bypass_the_model_are_refused(setting, tmp_path):
    with pytest.raises(ConfigError, match=f"{setting} looks for parts"):
        grpo(model_of(**TOGETHER), tmp_path, {setting: True})


# --- what cannot be -----------------------------------------------------------------------------------------------


def test_a_loss_of_logits_is_refused(tmp_path):
    trainer = sft(model_of(), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match="leave these arguments out"):
        trainer.train()


def test_resuming_is_refused(tmp_path):
    sft(model_of(), tmp_path, save_strategy="steps", save_steps=2).train()
    ids = made_up_text(2, 12, seed=1)
    assert nextn.load(tmp_path / "checkpoint-2")(ids, labels=ids).loss.isfinite()
    with pytest.raises(ConfigError, match=r"open the checkpoint with nextn\.load"):
        sft(model_of(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ConfigError, match="load_best_model_at_end=False"):
        sft(model_of(), tmp_path, eval_strategy="no", load_best_model_at_end=True, save_strategy="best")


def test_a_backbone_refuses_what_heads_cannot_read():
    model = model_of()
    with pytest.raises(ConfigError, match="use LoRA"):
        model.base_model(inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef=0\.0"):
        model.base_model(input_ids=made_up_text(1, 4, seed=0), output_router_logits=True)
