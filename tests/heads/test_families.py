"""Every kind of heads on every family of hosts: forward, backward, save, load, decode past the sliding window."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import nextn
from conftest import COMMON, CONFIGS, KINDS, VOCAB, greedy_reference, make_host
from nextn.trunk import HostError, Trunk, causal


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_our_masks_give_the_hosts_own_logits(family, attention):
    host = make_host(family)
    host.set_attn_implementation(attention)
    ids = torch.randint(3, VOCAB, (2, 30))
    positions = torch.arange(30).expand(2, -1)
    hidden, _ = Trunk(host).run(ids, positions, causal(positions, positions))
    torch.testing.assert_close(Trunk(host).logits(hidden), host(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_heads_on_every_family(family, kind, tmp_path):
    host = make_host(family)
    config = nextn.MultiTokenConfig(n=3, output={"kind": "trimmed", "size": 40}, **KINDS[kind])
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
    with pytest.raises(HostError, match=r"cannot be rolled back|has no"):
        nextn.attach(tf.AutoModelForCausalLM.from_config(recurrent), nextn.MultiTokenConfig())
    t5 = tf.T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2)
    with pytest.raises(HostError, match="encoder-decoder"):
        nextn.attach(tf.T5ForConditionalGeneration(t5), nextn.MultiTokenConfig())
    gemma2 = tf.Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=0.5)
    with pytest.raises(HostError, match="soft cap"):
        nextn.attach(tf.AutoModelForCausalLM.from_config(gemma2), nextn.MultiTokenConfig())
