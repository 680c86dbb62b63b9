"""n = 1: the same command trains plain next-token prediction, with transformers' own loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import nextn
from conftest import COMMON, SHAPE, made_up_text, make_host
from nextn.config import ConfigError, MultiTokenConfig
from nextn.data import PackedBlocks, byte_tokenizer, examples_of
from nextn.recipe import Recipe, train
from nextn.scratch import from_scratch

TRAINING = {"max_steps": 3, "bf16": False, "disable_tqdm": True, "learning_rate": 1e-3, "warmup_steps": 0}
WAYS = {
    "scratch": {"scratch": SHAPE, "tokenizer": "bytes", "heads": {"n": 1, "heads": "parallel", "freeze_trunk": False}},
    "whole": {"heads": {"n": 1, "freeze_trunk": False, "recurrent": True}, "vocabulary": 32},
    "lora": {"heads": {"n": 1, "freeze_trunk": False}, "lora": {"r": 2, "target_modules": ["q_proj"]}},
}


def recipe(way: str, base: Path, text: str, **more) -> Recipe:
    start = {} if way == "scratch" else {"base": str(base)}
    return Recipe(**start | WAYS[way] | {"data": [text], "length": 64, "training": TRAINING} | more)


@pytest.mark.parametrize("way", list(WAYS))
def test_the_result_is_a_plain_model_that_decodes_plainly(way, tiny_base, text, tmp_path):
    if way == "lora":
        pytest.importorskip("peft")
    out = tmp_path / "out"
    model = train(recipe(way, tiny_base, text), out, say=lambda _: None)
    assert not list(model.heads.parameters())
    plain = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert plain.config.num_hidden_layers == (4 if way == "scratch" else COMMON["num_hidden_layers"])
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.base.state_dict()[name]), name
    before = None if way == "scratch" else transformers.AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    assert before is None or any(not torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    loaded, ids = nextn.load(out), torch.tensor([[5, 9, 12, 7]])
    expected = plain.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=12), expected)
    assert "without heads" in (out / "README.md").read_text()


@pytest.mark.parametrize("preset", ["gloeckle", "deepseek", "fastmtp"])
def test_each_step_has_the_loss_of_transformers(preset, tiny_base, text, tmp_path):
    """The same blocks, order and optimizer give the stock Trainer's losses, whatever weights the recipe states."""
    transformers.set_seed(0)
    heads = {"n": 1, "freeze_trunk": False, "weights": {"preset": preset}}
    stated = recipe("whole", tiny_base, text, heads=heads, validation=None, training=TRAINING | {"logging_steps": 1})
    train(stated, tmp_path / "ours", say=lambda _: None)
    ours = [json.loads(line) for line in (tmp_path / "ours" / "log.jsonl").read_text().splitlines()]

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    blocks = PackedBlocks(examples_of([text], tokenizer, 64), 64, 0)
    transformers.set_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)

    class Plain(transformers.Trainer):
        """Documents apart, as packed blocks have them: the host reads positions and a mask of its own making."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            documents = (inputs["position_ids"] == 0).cumsum(dim=1)
            mask = (documents[:, :, None] == documents[:, None]) & torch.ones(64, 64, dtype=torch.bool).tril()
            logits = model(inputs["input_ids"], mask[:, None], position_ids=inputs["position_ids"]).logits
            loss = model.loss_function(logits, inputs["labels"], 64, num_items_in_batch=num_items_in_batch)
            return (loss, {"logits": logits}) if return_outputs else loss

    arguments = stated.arguments(tmp_path / "theirs")
    arguments.save_strategy = transformers.trainer_utils.SaveStrategy.NO
    trainer = Plain(base, arguments, train_dataset=blocks, data_collator=torch.utils.data.default_collate)
    trainer.train()
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (ours, trainer.state.log_history)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_loss_of_a_batch_is_that_of_the_base():
    base = make_host("llama")
    model = nextn.attach(base, MultiTokenConfig(n=1, freeze_trunk=False))
    ids = made_up_text(3, 24, seed=1)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3, -100)
    for items in (None, 7):
        ours = model(ids, labels=labels, num_items_in_batch=items)
        theirs = base(ids, labels=labels, num_items_in_batch=items)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=1e-5)
    assert ours.depth_losses.shape == (1,)


def test_heads_are_attached_to_a_baseline_as_to_any_base(tiny_base, text, tmp_path):
    train(recipe("whole", tiny_base, text), tmp_path / "baseline", say=lambda _: None)
    fields = {"data": [text], "length": 64, "training": TRAINING}
    base = str(tmp_path / "baseline")
    heads = train(Recipe(base=base, heads={"n": 3}, **fields), tmp_path / "heads", say=lambda _: None)
    assert heads.multi_token.n == 3
    with pytest.raises(ConfigError, match="has no heads"):
        train(Recipe(base=base, **fields), tmp_path / "none")


def test_from_scratch_no_layer_is_taken_from_the_plain_model():
    config = MultiTokenConfig(n=1, heads="parallel", freeze_trunk=False)
    assert len(from_scratch(SHAPE, config, byte_tokenizer()).trunk.layers) == SHAPE["num_hidden_layers"]


def test_a_baseline_has_nothing_to_draft():
    model = nextn.attach(make_host("llama"), MultiTokenConfig(n=1, freeze_trunk=False)).eval()
    ids = made_up_text(1, 8, seed=2)
    with pytest.raises(ValueError, match="give a number of drafts from 0 to 0"):
        model.generate(ids, max_new_tokens=4, depth=2)
    with pytest.raises(ValueError, match="A tree of drafts needs a drafter"):
        model.generate(ids, max_new_tokens=4, tree=nextn.Tree(nodes=4))
