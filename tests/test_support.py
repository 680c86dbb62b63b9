"""Hosts: their logits are reproduced or they are refused, in one sentence, before anything is decoded or trained."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf

import nextn
from host_checks import NEW, Hinted, Host
from hosts import build
from nextn.config import OutputConfig
from nextn.decoding.engine import Engine
from nextn.losses import targets_at
from nextn.support import check_host
from nextn.trunk import HostError, Trunk

RECURRENT = nextn.MultiTokenConfig(n=3, heads="sequential", recurrent=True, weights={"preset": "gloeckle"})
TRANSFORMED = [
    *("cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "granite", "granite_swa", "granitemoe"),
    *("granitemoe_swa", "granitemoeshared", "hyperclovax", "minicpm3", "nanochat", "gemma2", "vaultgemma"),
]


class UnknownCap(tf.LlamaForCausalLM):
    """Caps its logits in a way that no field of its config says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 3 * torch.tanh(output.logits / 3)
        return output


def with_unknown_cap() -> UnknownCap:
    host = build("llama", gain=1)
    host.__class__ = UnknownCap
    return host


# --- the check --------------------------------------------------------------------------------------------------


def test_a_soft_cap_that_no_config_names_is_refused_on_fresh_weights():
    host = with_unknown_cap()
    plain = build("llama", gain=1)
    ids = torch.tensor([[5, 9, 11, 7]])
    torch.testing.assert_close(host(ids).logits, plain(ids).logits, rtol=1e-2, atol=1e-2)  # which hardly shows it
    with pytest.raises(HostError, match="changes its logits after the unembedding"):
        check_host(Trunk(host))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gain", [1, 5])
def test_a_prompt_whose_tokens_see_later_ones_is_refused(gain, dtype):
    with pytest.raises(HostError, match="lets tokens see later tokens"):
        check_host(Trunk(build("paligemma", gain=gain).to(dtype)))


def test_a_window_that_our_masks_miss_is_refused(monkeypatch):
    monkeypatch.setattr(Trunk, "window", lambda trunk, kind: None)
    with pytest.raises(HostError, match="does not give the logits of its own generate"):
        check_host(Trunk(build("mistral")))


def test_attaching_checks_the_host():
    with pytest.raises(HostError, match="changes its logits"):
        nextn.attach(with_unknown_cap(), RECURRENT)


def test_loading_checks_the_host(tmp_path):
    host = build("llama", gain=1)
    nextn.attach(host, RECURRENT).save_pretrained(tmp_path)
    with pytest.raises(HostError, match="changes its logits"):
        nextn.load(tmp_path, base=with_unknown_cap())


def test_the_plain_engine_checks_the_host():
    with pytest.raises(HostError, match="changes its logits"):
        Engine(Trunk(with_unknown_cap()), None)


def test_hosts_are_checked_apart_from_their_own_generation_config(caplog):
    """Stop strings need a tokenizer, guidance and lookup other forwards, and sampling parameters are warned of."""
    host = build("llama")
    host.generation_config = tf.GenerationConfig(
        stop_strings=["end"], guidance_scale=2.0, prompt_lookup_num_tokens=3, temperature=0.6, do_sample=True
    )
    before = host.generation_config.to_dict()
    tf.logging.enable_propagation()
    try:
        with warnings.catch_warnings(action="error"):
            check_host(Trunk(host))
    finally:
        tf.logging.disable_propagation()
    assert not caplog.records
    assert host.generation_config.to_dict() == before


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2", "gpt_oss"])
def test_hosts_in_bfloat16_and_in_training_mode_are_not_refused(family):
    host = build(family).to(torch.bfloat16).train()
    check_host(Trunk(host))
    assert host.training


def test_a_float32_unembedding_on_a_bfloat16_host_is_not_refused():
    host = build("qwen3_moe")
    host.model.to(torch.bfloat16)
    host.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    check_host(Trunk(host))


# --- scales and soft caps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TRANSFORMED)
def test_a_scaled_or_capped_host_decodes_samples_and_trains_as_by_itself(family):
    host = Host(build(family))
    model = nextn.attach(host.model, RECURRENT)
    assert not model.trunk.transform.is_identity
    host.compare_loss(model)
    host.compare_sampling(model.trunk)
    texts = [prompt + text for prompt, text in zip(host.prompts, host.texts, strict=True)]
    engine = Engine(model.trunk, Hinted(model.trunk, model.heads, texts), rows=3)
    host.compare(engine, NEW, "decoding with heads")


@pytest.mark.parametrize("stated", ["shared", "separate", "low_rank:6", "trimmed:200", "clustered:8:2,own"])
@pytest.mark.parametrize("family", ["granite", "minicpm3", "gemma2:finalcap"])
def test_gradients_through_a_scale_or_a_cap_equal_autograds(family, stated):
    torch.manual_seed(0)
    config = nextn.MultiTokenConfig(
        n=3, recurrent=True, output=OutputConfig.parse(stated), freeze_trunk=False, weights={"preset": "gloeckle"}
    )
    model = nextn.attach(build(family), config).double()
    ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(ids, labels=ids).loss
    grads = torch.autograd.grad(loss, trained, allow_unused=True)

    text = nextn.model.as_text(ids, None, None)
    hidden, tapped = model.run_trunk(text)
    expected = 0.0
    for k, state in enumerate([hidden, *model.heads(model.trunk, tapped, text)], 1):
        output = model.heads.output.at(k) if k > 1 else None
        targets = targets_at(ids, text.documents, k)[:, : 9 - k]
        state = state[:, : 9 - k]
        if output is None:
            logits = model.base(ids).logits[:, :-1]
        elif stated.startswith("clustered"):
            logits = model.trunk.transform(output.table(state))
            of_cluster = (output.members()[None] == targets.flatten()[:, None, None]).any(dim=-1).long().argmax(dim=-1)
            ranking = output.centroids(state.detach()).flatten(0, 1).log_softmax(-1)
            expected = expected - ranking.gather(-1, of_cluster[:, None]).sum()
        else:
            logits = output(model.trunk, state)
        scores = logits.log_softmax(-1).gather(-1, targets[..., None])
        expected = expected - scores[scores > -torch.inf].sum()
    expected = expected / 16
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, trained, allow_unused=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)  # hosts norm in float32


# --- refusals -----------------------------------------------------------------------------------------------------

REFUSED_HOSTS = ["doge", "modernbert-decoder", "mllama"]
COPIED = ["recurrent", "distinct", "parallel"]
KINDS = {
    "recurrent": {"heads": "sequential", "recurrent": True},
    "distinct": {"heads": "sequential"},
    "parallel": {"heads": "parallel"},
    "eagle3": {"heads": "eagle3", "tap": [1, 2, 3]},
    "shared_kv": {"heads": "shared_kv"},
}
REFUSED_HEADS = [
    *((family, kind) for family in ("beam", "gemma3n_text", "gemma4", "gemma4_text:ple") for kind in COPIED),
    *((family, "eagle3") for family in ("jetmoe", "kolibri1", "solar_open", "beam", "gemma3n_text")),
    *((family, "shared_kv") for family in ("stablelm", "jetmoe", "gemma4", "gemma4_text", "gemma4_unified")),
    *((family, "shared_kv") for family in ("gemma4_unified_text", "flint", "gemma2", "mimo_v2_flash", "vaultgemma")),
    *(("longcat_flash", kind) for kind in COPIED),
]


@pytest.mark.parametrize("family", REFUSED_HOSTS)
def test_hosts_that_cannot_work_are_refused_in_one_sentence(family):
    with pytest.raises(HostError) as refusal:
        nextn.attach(build(family), RECURRENT)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


@pytest.mark.parametrize(("family", "kind"), REFUSED_HEADS)
def test_heads_that_cannot_run_are_refused_in_one_sentence_when_attached(family, kind):
    with pytest.raises(HostError) as refusal:
        nextn.attach(build(family), nextn.MultiTokenConfig(n=3, **KINDS[kind]))
    message = str(refusal.value)
    assert message.endswith(".") and "\n" not in message
    assert "choose" in message or "attn_implementation" in message  # what to do


def test_heads_refused_by_their_base_are_refused_when_loaded(tmp_path):
    """A base with eager attention, for heads that were made on another."""
    host = build("llama")
    nextn.attach(host, nextn.MultiTokenConfig(n=3, heads="shared_kv")).save_pretrained(tmp_path)
    host.set_attn_implementation("eager")
    with pytest.raises(HostError, match="attn_implementation='sdpa'"):
        nextn.load(tmp_path, base=host)


def test_two_attentions_in_a_layer_decode_plainly():
    """LongCat-Flash, whose cache has twice as many layers as its decoder."""
    host = Host(build("longcat_flash"))
    trunk = Trunk(host.model)
    assert trunk.cache_layers == 2 * len(trunk.layers)
    check_host(trunk)
    host.compare(Engine(trunk, None, rows=3), NEW, "plain decoding")


@pytest.mark.parametrize("family", ["gemma4_unified", "hunyuan_v1_dense"])
def test_layers_that_hand_keys_on_or_have_parts_without_a_cache_make_heads(family):
    host = Host(build(family))
    model = nextn.attach(host.model, RECURRENT)
    host.compare_loss(model)
    texts = [prompt + text for prompt, text in zip(host.prompts, host.texts, strict=True)]
    host.compare(Engine(model.trunk, Hinted(model.trunk, model.heads, texts), rows=3), NEW, "decoding with heads")


@pytest.mark.slow
def test_no_host_is_silently_wrong_or_ends_in_a_traceback():
    script = Path(__file__).parents[1] / "benchmarks" / "hosts.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)
