"""What is kept of a host's work is given up when the host changes: embeddings, weights, adapters; threads apart."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

import nextn
from conftest import MORE_KINDS, VOCAB, greedy_reference, make_host
from nextn.config import ConfigError
from nextn.decoding.engine import Engine
from nextn.trunk import Trunk, fingerprint

X = torch.tensor([[5, 9, 11, 7]])
PROMPT = X[0].tolist()
RECURRENT = {"heads": "sequential", "recurrent": True}


def attached(host=None, **output) -> nextn.MultiTokenModel:
    config = nextn.MultiTokenConfig(n=3, **RECURRENT, **({"output": output} if output else {}))
    return nextn.attach(make_host("llama") if host is None else host, config)


def with_adapter(host):
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), host)
    return host


def switch(host, enabled: bool) -> None:
    for part in host.modules():
        if hasattr(part, "enable_adapters") and hasattr(part, "merged_adapters"):
            part.enable_adapters(enabled)


def decoded(engine: Engine, prompt: list[int], new: int = 12) -> list[int]:
    ((_, result),) = engine.generate([prompt], new)
    assert result.error is None
    return result.tokens


# --- resized embeddings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [{}, {"kind": "trimmed", "size": 40}])
def test_heads_follow_a_host_whose_embeddings_were_resized(output, tmp_path):
    model = attached(**output)
    model.base.resize_token_embeddings(72)
    assert decoded(model.engine(stop_tokens=[]), [5, 70, 11]) == greedy_reference(model.base, [5, 70, 11], 12)
    ids = torch.randint(64, 72, (2, 10))
    model.train()
    assert model(ids, labels=ids).loss.isfinite()
    model.eval().save_pretrained(tmp_path)
    loaded = nextn.load(tmp_path)
    assert decoded(loaded.engine(stop_tokens=[]), [5, 70, 11]) == greedy_reference(model.base, [5, 70, 11], 12)


@pytest.mark.parametrize(
    "output", [{"kind": "separate"}, {"kind": "low_rank", "rank": 4}, {"kind": "clustered", "clusters": 8}]
)
def test_an_output_with_a_table_of_its_own_refuses_resized_embeddings(output, tmp_path):
    model = attached(**output)
    model.base.resize_token_embeddings(72)
    with pytest.raises(ConfigError, match="resized to 72 tokens"):
        decoded(model.engine(), PROMPT)
    with pytest.raises(ConfigError, match="resized to 72 tokens"):
        model(X, labels=X)
    with pytest.raises(ConfigError, match="resized to 72 tokens"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_trimmed_output_refuses_a_vocabulary_that_lost_its_tokens():
    model = attached(kind="trimmed", size=40)
    model.base.resize_token_embeddings(30)
    with pytest.raises(ConfigError, match="names token 39"):
        decoded(model.engine(), PROMPT)


def test_the_generation_config_is_the_bases_own():
    model = attached()
    model.base.generation_config = copy.deepcopy(model.base.generation_config)
    model.base.generation_config.max_new_tokens = 5
    assert model.generate(X, do_sample=False, eos_token_id=None).shape[1] == 9
    model.generation_config.max_new_tokens = 3
    assert model.generate(X, do_sample=False, eos_token_id=None).shape[1] == 7


# --- kept keys and values -----------------------------------------------------------------------------------------


def scale_in_place(host) -> None:
    host.model.layers[0].self_attn.v_proj.weight.data.mul_(-1.5)


def load_others(host) -> None:
    host.load_state_dict(make_host("llama", seed=1).state_dict())


CHANGES = {"edit through .data": scale_in_place, "load_state_dict": load_others}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("heads", [None, 1])
def test_kept_texts_are_read_again_when_weights_change(change, heads, caplog):
    model = attached()
    engine = model.engine(heads=heads, keep=True, stop_tokens=[])
    text = PROMPT + decoded(engine, PROMPT)
    CHANGES[change](model.base)
    assert decoded(engine, text) == greedy_reference(model.base, text, 12)
    assert caplog.text.count("weights changed") == 1
    decoded(engine, text)
    assert caplog.text.count("weights changed") == 1  # said once


def test_kept_texts_are_read_again_when_an_adapter_is_switched_or_merged():
    host = with_adapter(make_host("llama"))
    engine = Engine(Trunk(host), None, keep=True)
    text = PROMPT + decoded(engine, PROMPT)
    for enabled in (False, True):
        switch(host, enabled)
        assert decoded(engine, text) == greedy_reference(host, text, 12)
    host.model.layers[0].self_attn.v_proj.merge()
    host.model.layers[0].self_attn.v_proj.lora_B["default"].weight.data.zero_()
    assert decoded(engine, text) == greedy_reference(host, text, 12)


@pytest.mark.parametrize("change", ["adapter", *CHANGES])
def test_a_cache_of_an_earlier_turn_is_not_used_when_weights_changed(change):
    model = attached(with_adapter(make_host("llama")) if change == "adapter" else None)
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(X, **asked)
    kept = first.past_key_values
    if change == "adapter":
        switch(model.base, False)
    else:
        CHANGES[change](model.base)
    again = model.generate(first.sequences, past_key_values=kept, **asked).sequences[0]
    text = first.sequences[0].tolist()
    assert again[len(text) :].tolist() == greedy_reference(model.base, text, 8)


def test_drafts_follow_an_unembedding_that_was_edited_through_data():
    model = attached(kind="trimmed", size=40)
    engine = model.engine(depth=2, stop_tokens=[])
    decoded(engine, PROMPT)
    model.base.lm_head.weight.data.copy_(model.base.lm_head.weight.flip(0))
    decoded(engine, PROMPT)
    states = torch.randn(3, 32)
    logits, ids = model.heads.output.scores(model.trunk, states)
    torch.testing.assert_close(logits, model.trunk.logits(states)[:, ids])


def test_what_steps_take_is_measured_anew_for_other_adapters():
    model = attached(with_adapter(make_host("llama")))
    engine = model.engine(stop_tokens=[], depth="auto")
    decoded(engine, PROMPT)
    assert model.engine(depth="auto").paces is engine.paces
    switch(model.base, False)
    assert model.engine(depth="auto").paces is not engine.paces


def test_a_fingerprint_tells_weights_apart_and_stays_the_same_otherwise():
    host = with_adapter(make_host("llama"))
    layer = host.model.layers[1].self_attn.q_proj
    before = fingerprint(host)
    host(X)
    assert fingerprint(host) == before
    layer.set_scale("default", 3.0)
    scaled = fingerprint(host)
    layer.base_layer.weight.data.add_(0.25)
    assert len({before, scaled, fingerprint(host)}) == 3


def test_compiled_steps_are_given_up_when_weights_change(caplog):
    from nextn.decoding.building import Code

    model = attached()
    engine = model.engine(depth=2, stop_tokens=[])
    poisoned = {2: lambda *_: pytest.fail("code of other weights ran")}
    engine.use(Code((2,), verify=poisoned))
    scale_in_place(model.base)
    assert decoded(engine, PROMPT) == greedy_reference(model.base, PROMPT, 12)
    assert "falling back to eager" in caplog.text


# --- threads ------------------------------------------------------------------------------------------------------


def together(*works) -> list[Exception]:
    errors: list[Exception] = []

    def guarded(work) -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("kind", ["parallel", "linear_chain", "shared_kv", "eagle3", "recurrent"])
def test_threads_on_one_model_do_not_see_each_others_forwards(kind):
    host = make_host("llama")
    model = nextn.attach(host, nextn.MultiTokenConfig(n=3, **MORE_KINDS[kind]))
    expected = greedy_reference(host, PROMPT, 24)

    def ours() -> None:
        assert decoded(model.engine(stop_tokens=[]), PROMPT, 24) == expected

    def stock() -> None:
        out = host.generate(X, max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert out[0, 4:].tolist() == expected

    for _ in range(5):
        assert together(ours, stock, ours) == []
    assert host.config._attn_implementation == "sdpa"


def test_hooks_ignore_other_threads_before_torch_knows_that_they_take_kwargs():
    trunk = Trunk(make_host("llama"))
    with trunk._tapping("pre_norm") as caught:
        (hook,) = trunk.norm._forward_pre_hooks.values()
        assert together(lambda: hook(trunk.norm, (torch.ones(1),))) == []
        assert caught[0].numel() == 0
        trunk.norm(torch.ones(1, 32))
    assert caught[0].equal(torch.ones(1, 32))


def test_a_loss_in_one_thread_does_not_reach_the_unembedding_of_another():
    host = make_host("llama")
    model = nextn.attach(host, nextn.MultiTokenConfig(n=3, **RECURRENT, weights={"preset": "gloeckle"})).train()
    ids = torch.randint(3, VOCAB, (4, 30))
    loss, logits = model(ids, labels=ids).loss.detach(), host(ids).logits

    def trains() -> None:
        for _ in range(10):
            torch.testing.assert_close(model(ids, labels=ids).loss.detach(), loss)

    def runs() -> None:
        for _ in range(20):
            torch.testing.assert_close(host(ids).logits, logits)

    for _ in range(3):
        assert together(trains, runs, trains) == []
