"""The model as transformers' users hold it: generate, save, load, forward."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import nextn
from conftest import MORE_KINDS, greedy_reference, made_up_text, make_host
from nextn.config import ConfigError


class Recorder:
    def __init__(self) -> None:
        self.tokens, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_give_each_rows_own_text(trained_model, prompts, side):
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        where = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = torch.tensor(prompt), 1
    texts = [greedy_reference(trained_model.base, prompt, 15, stops=(7, 2)) for prompt in prompts]
    given = trained_model.generate(ids, attention_mask=mask, max_new_tokens=15, eos_token_id=[7, 2], pad_token_id=0)
    assert torch.equal(given[:, :width], ids)
    longest = max(map(len, texts))
    assert given[:, width:].tolist() == [text + [0] * (longest - len(text)) for text in texts]


def test_generate_equals_transformers_with_and_without_heads(trained_model, prompts):
    ids = torch.tensor([prompts[3]])
    theirs = trained_model.base.generate(ids, max_new_tokens=20, do_sample=False)
    for heads in (None, 1):
        streamer = Recorder()
        ours = trained_model.generate(ids, max_new_tokens=20, heads=heads, streamer=streamer)
        assert torch.equal(ours, theirs)
        assert streamer.tokens == ours[0].tolist() and streamer.ended


def test_what_generate_cannot_do_is_said(trained_model):
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="one prompt only"):
        trained_model.generate(ids.expand(2, -1), streamer=Recorder())
    with pytest.raises(ValueError, match="heads is 2"):
        trained_model.generate(ids, heads=2)
    with pytest.raises(ValueError, match=r"at least 1|greater than 0"):
        trained_model.generate(ids, max_new_tokens=0)


def test_a_saved_model_is_a_plain_model_plus_a_small_extra(trained_model, tmp_path):
    trained_model.save_pretrained(tmp_path)
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(3, 60, (2, 12))
    assert torch.equal(plain(ids).logits, trained_model.base(ids).logits)
    loaded = nextn.load(tmp_path)
    assert torch.equal(loaded(ids).logits, trained_model(ids).logits)
    assert torch.equal(loaded.generate(ids[:1], max_new_tokens=9), trained_model.generate(ids[:1], max_new_tokens=9))
    assert sorted(path.name for path in (tmp_path / "nextn").iterdir()) == ["config.json", "heads.safetensors"]


def test_kept_trunk_states_give_the_same_loss():
    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3, recurrent=True)).train()
    ids = torch.randint(3, 60, (2, 16))
    kept = model.trunk_outputs(ids)
    torch.testing.assert_close(model(ids, labels=ids, **kept).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("tap", ["post_norm", "pre_norm"])
def test_kept_top_tokens_give_nearly_the_same_loss(tap):
    config = nextn.MultiTokenConfig(n=3, recurrent=True, tap=tap, objective={"follows": "kl", "temperature": 1.5})
    model = nextn.attach(make_host("llama"), config).train()
    ids = torch.randint(3, 60, (2, 16))
    exact, vocabulary = model(ids, labels=ids).loss, model.trunk.vocab_size
    everything = model(ids, labels=ids, **model.trunk_outputs(ids, top_k=vocabulary)).loss
    torch.testing.assert_close(
        everything, exact, rtol=2e-3, atol=2e-3
    )  # log-probabilities are stored in half precision
    few = model.trunk_outputs(ids, top_k=5)
    assert few["top_tokens"].shape == (2, 16, 5)
    assert (model(ids, labels=ids, **few).loss - exact).abs() > 1e-2, "what is left out must show"
    with pytest.raises(ValueError, match="go together"):
        model(ids, labels=ids, trunk_states=few["trunk_states"], top_tokens=few["top_tokens"])
    if tap != "post_norm":
        with pytest.raises(ValueError, match="top_tokens"):
            model(ids, labels=ids, **model.trunk_outputs(ids))


def test_training_goes_on_after_decoding():
    config = nextn.MultiTokenConfig(n=3, recurrent=True, output={"kind": "trimmed", "size": 20})
    model = nextn.attach(make_host("llama"), config)
    ids = torch.randint(3, 60, (2, 16))
    model.generate(ids, max_new_tokens=4)
    model.train()(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_heads_are_trained_in_float32_on_a_bfloat16_base(kind):
    for frozen in (True, False):
        weights = {} if frozen else {"preset": "deepseek"}
        config = nextn.MultiTokenConfig(n=3, freeze_trunk=frozen, weights=weights, **MORE_KINDS[kind])
        ids = made_up_text(2, 16, seed=3)
        model = nextn.attach(make_host("gemma3").bfloat16(), config, calibration={"input_ids": ids})
        model.train()(ids, labels=ids).loss.backward()
        for name, parameter in model.heads.named_parameters():
            assert parameter.dtype == torch.float32 and parameter.grad is not None, name
        assert model.trunk.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_float32_heads_on_a_bfloat16_base_decode_and_are_loaded_in_its_dtype(kind, tmp_path):
    model = nextn.attach(make_host("llama").bfloat16(), nextn.MultiTokenConfig(n=3, **MORE_KINDS[kind]))
    ids = made_up_text(1, 16, seed=3)
    plain = model.generate(ids, max_new_tokens=6, heads=1)
    assert torch.equal(model.generate(ids, max_new_tokens=6), plain)
    model.save_pretrained(tmp_path)
    loaded = nextn.load(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.generate(ids, max_new_tokens=6), plain)
    assert {parameter.dtype for parameter in loaded.train().heads.parameters()} == {torch.float32}


def checkpoint_activations(model, **kwargs) -> None:
    """By the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(kwargs or None)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", MORE_KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind, frozen):
    """Switched on for the model, or for the base before or after heads are attached."""
    weights = {} if frozen else {"preset": "deepseek"}
    config = nextn.MultiTokenConfig(n=4, freeze_trunk=frozen, weights=weights, **MORE_KINDS[kind])
    ids = made_up_text(2, 16, seed=3)

    def gradients(where):
        base = make_host("llama")
        if where == "base before":
            checkpoint_activations(base)
        torch.manual_seed(1)
        model = nextn.attach(base, config)
        if where == "base after":
            checkpoint_activations(base)
        if where == "model":
            checkpoint_activations(model)
        runs = []
        module = next(each for each in model.heads.modules() if isinstance(each, torch.nn.Linear))
        module.register_forward_pre_hook(lambda *_: runs.append(1))
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return loss, found, len(runs)

    loss, expected, runs = gradients(None)
    for where in ("model", "base before", "base after"):
        checkpointed_loss, checkpointed, checkpointed_runs = gradients(where)
        torch.testing.assert_close(checkpointed_loss, loss, rtol=0, atol=0)
        assert checkpointed.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(checkpointed[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
        if kind not in ("eagle3", "mixed_layers"):  # their first linear layer fuses states, outside of a step
            assert checkpointed_runs == 2 * runs, "the heads must be computed again"


def test_reentrant_checkpointing_is_refused():
    config = nextn.MultiTokenConfig(n=3, freeze_trunk=False, weights={"preset": "deepseek"}, recurrent=True)
    model = nextn.attach(make_host("llama"), config)
    for of_the_base in (False, True):  # a base that was set before is refused when training begins
        with pytest.raises(ConfigError, match="use_reentrant=True loses gradients"):
            checkpoint_activations(model.base if of_the_base else model, use_reentrant=True)
            model.train()
    checkpoint_activations(model, use_reentrant=False)
    model.train()


def test_a_frozen_trunk_keeps_no_graph():
    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3, weights={"preset": "deepseek"})).train()
    ids = torch.randint(3, 60, (2, 16))
    seen = []
    model.base.model.layers[0].register_forward_hook(lambda _module, _args, output: seen.append(output))
    model(ids, labels=ids).loss.backward()
    assert seen and not any(getattr(output, "requires_grad", False) for output in seen)
    assert all(parameter.grad is None for parameter in model.base.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        {"recurrent": True},
        {},
        {"heads": "parallel"},
        {"heads": "parallel", "head": "linear"},
        {"heads": "shared_kv"},
        {"heads": "eagle3", "tap": [0, 1, 2]},
        {"recurrent": True, "tap": [1, 2]},
    ],
)
def test_compiled_layers_give_the_same_loss_and_gradients(kind):
    batches = [torch.randint(3, 60, shape) for shape in ((2, 16), (3, 11))]
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        config = nextn.MultiTokenConfig(n=4, freeze_trunk=False, weights={"preset": "deepseek"}, **kind)
        model = nextn.attach(make_host("llama"), config).train()
        if compiled:
            model.compile_layers()
        loss = sum(model(ids, labels=ids).loss for ids in batches)
        loss.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (plain, plain_grads), (loss, grads) = found
    torch.testing.assert_close(loss, plain)
    assert grads.keys() == plain_grads.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], plain_grads[name], rtol=1e-3, atol=1e-5, msg=name)
