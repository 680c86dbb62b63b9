"""Every kind of heads on every family of hosts: forward, backward, save, load, decode past the sliding window."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers as tf

import nextn
from conftest import COMMON, CONFIGS, MORE_KINDS, VOCAB, greedy_reference, make_host, make_longrope_host
from nextn.config import ConfigError
from nextn.heads import Window
from nextn.heads.base import BestTokens
from nextn.model import as_text
from nextn.trunk import HostError, RaggedCache, Trunk, causal


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_our_masks_give_the_hosts_own_logits(family, attention):
    host = make_host(family)
    host.set_attn_implementation(attention)
    ids = torch.randint(3, VOCAB, (2, 30))
    positions = torch.arange(30).expand(2, -1)
    hidden, _ = Trunk(host).run(ids, positions, causal(positions, positions))
    torch.testing.assert_close(Trunk(host).logits(hidden), host(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "kind"),
    [pair for pair in itertools.product(CONFIGS, MORE_KINDS) if pair != ("deepseek_v3", "shared_kv")],
)
def test_heads_on_every_family(family, kind, tmp_path):
    host = make_host(family)
    config = nextn.MultiTokenConfig(n=3, output={"kind": "trimmed", "size": 40}, **MORE_KINDS[kind])
    model = nextn.attach(host, config, calibration={"input_ids": torch.randint(3, VOCAB, (2, 20))})
    ids = torch.randint(3, VOCAB, (2, 24))
    model.train()
    model(ids, labels=ids).loss.backward()
    unused = [name for name, parameter in model.heads.named_parameters() if parameter.grad is None]
    assert all("expert" in name or "gate" in name for name in unused), unused
    assert all(parameter.grad is None for parameter in host.parameters())

    model.eval().save_pretrained(tmp_path)
    opened = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(opened(ids).logits, host(ids).logits)
    loaded = nextn.load(tmp_path)
    for name, tensor in model.heads.state_dict().items():
        assert torch.equal(loaded.heads.state_dict()[name], tensor), name

    prompts = [ids[0].tolist(), ids[1, :5].tolist()]
    results = dict(loaded.engine(rows=2, stop_tokens=[]).generate(prompts, 12))
    assert [results[row].tokens for row in range(2)] == [greedy_reference(host, prompt, 12) for prompt in prompts]


def test_hosts_that_cannot_work_are_refused():
    recurrent = tf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(HostError, match="cannot be rolled back"):
        nextn.attach(tf.AutoModelForCausalLM.from_config(recurrent), nextn.MultiTokenConfig())
    with pytest.raises(HostError, match="compressed keys"):
        nextn.attach(make_host("deepseek_v3"), nextn.MultiTokenConfig(heads="shared_kv"))
    with pytest.raises(HostError, match="attn_implementation='sdpa'"):
        host = make_host("llama")
        host.set_attn_implementation("eager")
        ids = torch.randint(3, VOCAB, (1, 9))
        nextn.attach(host, nextn.MultiTokenConfig(heads="shared_kv"))(ids, labels=ids)
    with pytest.raises(ConfigError, match="tap names layer 7, but the base has 3"):
        nextn.attach(make_host("llama"), nextn.MultiTokenConfig(tap=[1, 7]))
    t5 = tf.T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2)
    with pytest.raises(HostError, match="encoder-decoder"):
        nextn.attach(tf.T5ForConditionalGeneration(t5), nextn.MultiTokenConfig())
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(HostError, match="dynamic RoPE"):
        nextn.attach(
            tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**COMMON, rope_parameters=dynamic)),
            nextn.MultiTokenConfig(),
        )


def test_the_context_of_longrope_ends_with_its_short_factors():
    host = make_longrope_host()
    assert Trunk(host).max_length == Trunk(host).hard_limit == 64


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pair
        for pair in itertools.product(["llama", "gemma3", "deepseek_v3"], MORE_KINDS)
        if pair != ("deepseek_v3", "shared_kv")
    ],
)
def test_drafts_are_what_training_says_at_that_position(family, kind):
    """Teacher-forced on its own drafts, each depth's best token at the newest state is the draft that was made.

    This ties decoding (caches, chains, positions) to training (shifts, masks), on prompts beyond the window; nothing
    that lies ahead of what a step may read can have a part in it, for the text ends with the drafts.
    """
    torch.manual_seed(4)
    n = 4
    model = nextn.attach(make_host(family), nextn.MultiTokenConfig(n=n, **MORE_KINDS[kind])).eval()
    with torch.no_grad():  # a module that ignores its token, or passes its state on, would pass too much
        for name, parameter in model.heads.named_parameters():
            if (
                "eh_proj" in name
                or "pre_projection" in name
                or (model.multi_token.head != "transformer" and parameter.ndim == 2)
            ):
                parameter.normal_(std=0.3)
    trunk, heads = model.trunk, model.heads
    for length in (3, 21):
        prefix = torch.randint(3, VOCAB, (1, length))  # its last token is the pending one
        positions = torch.arange(length - 1)[None]
        with torch.no_grad():
            cache = RaggedCache(len(trunk.layers), 1, 64)
            _, tapped = trunk.run(prefix[:, :-1], positions, cache.place(positions), cache, tap=heads.tap)
            window = Window(tapped, positions, prefix[:, 1:], torch.tensor([length - 2]))
            caches = [RaggedCache(1, 1, 64) for _ in range(heads.cache_count)]
            caches += [RaggedCache.over([cache.buffers[layer]], torch.arange(64)) for layer in heads.reads]
            first = heads.draft(trunk, window, caches, None, BestTokens(levels=1))
            own, theirs = caches[: heads.cache_count], caches[heads.cache_count :]
            seen = [RaggedCache(1, 1, 64) for _ in own]
            heads.remember(trunk, window, seen + theirs, None)
            torch.testing.assert_close([each.buffers for each in seen], [each.buffers for each in own], rtol=0, atol=0)
            drafts = heads.draft(trunk, window, caches, None)
            assert torch.equal(first, drafts[:, : first.shape[1]])  # modules that must see all positions make all
            assert first.shape[1] == (n - 1 if model.multi_token.kind == "distinct" else 1)
            # A document before it and one after it in the same row: packing must change nothing.
            before, after = torch.randint(3, VOCAB, (1, 5)), torch.randint(3, VOCAB, (1, 6))
            ids = torch.cat([before, prefix, drafts, after], dim=1)
            places = torch.cat([torch.arange(part.shape[1]) for part in (before, ids[:, 5:-6], after)])[None]
            text = as_text(ids, None, places)
            _, tapped = model.run_trunk(text)
            states = heads(trunk, tapped, text)
        forced = [int(heads.output(trunk, state[0, 5 + length - 2]).argmax()) for state in states]
        assert forced == drafts[0].tolist()


@pytest.mark.parametrize("kind", ["parallel", "distinct", "recurrent"])
def test_heads_of_a_host_with_experts_may_be_dense(kind):
    host = make_host("deepseek_v3")
    dense = nextn.attach(host, nextn.MultiTokenConfig(n=3, dense=True, **MORE_KINDS[kind]))
    sparse = nextn.attach(host, nextn.MultiTokenConfig(n=3, **MORE_KINDS[kind]))
    for model, expected in ((dense, False), (sparse, True)):
        assert any("expert" in name for name, _ in model.heads.named_parameters()) == expected
    ids = torch.randint(3, VOCAB, (1, 12))
    dense.train()(ids, labels=ids).loss.backward()
    config = tf.DeepseekV3Config(**CONFIGS["deepseek_v3"]().to_diff_dict() | {"first_k_dense_replace": 0})
    with pytest.raises(HostError, match="experts in every layer"):
        nextn.attach(tf.AutoModelForCausalLM.from_config(config), nextn.MultiTokenConfig(dense=True))
