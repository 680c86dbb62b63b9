"""Tiny hosts of every family, and heads that are really trained on them."""

from __future__ import annotations

import copy
import json
import string
from pathlib import Path

import hypothesis
import pytest
import tokenizers
import torch
import transformers as tf

import nextn
from nextn.decoding.pace import Pace

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")

VOCAB = 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPE = {  # of a model from scratch
    name: COMMON[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
} | {"model_type": "llama", "num_hidden_layers": 4, "max_position_embeddings": 128}
WINDOW = 8
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**COMMON),
    "qwen2": lambda: tf.Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, layer_types=SLIDING
    ),
    "qwen3": lambda: tf.Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True),
    "mistral": lambda: tf.MistralConfig(**COMMON, sliding_window=WINDOW),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **COMMON, head_dim=8, sliding_window=WINDOW, layer_types=SLIDING, rope_parameters=ROPES
    ),
    "phi3": lambda: tf.Phi3Config(**COMMON, sliding_window=WINDOW),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **COMMON | {"num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
}

KINDS = {
    "parallel": {"heads": "parallel"},
    "distinct": {"heads": "sequential"},
    "recurrent": {"heads": "sequential", "recurrent": True},
}
MORE_KINDS = KINDS | {
    "causal": {"heads": "parallel", "chaining": "causal"},
    "anticausal": {"heads": "parallel", "chaining": "anticausal"},
    "linear": {"heads": "parallel", "head": "linear"},
    "residual_mlp": {"heads": "parallel", "head": "residual_mlp"},
    "eagle3": {"heads": "eagle3"},
    "shared_kv": {"heads": "shared_kv", "drafter_width": 24, "drafter_layers": 2},
    "mixed_layers": {"heads": "sequential", "recurrent": True, "tap": [1, 2]},
    "linear_chain": {"heads": "parallel", "head": "linear", "chaining": "causal", "tap": "pre_norm"},
}


def make_host(family: str, seed: int = 0) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[family]())
    with torch.no_grad():  # the default init is so small that a tiny host says the same whatever it reads
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.eval()


def make_longrope_host() -> tf.PreTrainedModel:
    """A Phi-3 whose short factors end at 64 positions."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "factor": 2.0,
    }
    config = tf.Phi3Config(**COMMON, rope_parameters=rope, original_max_position_embeddings=64)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def make_tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token a character: three special ones, then letters, digits and a few marks; as many as a tiny host knows."""
    characters = string.ascii_lowercase + string.digits + string.ascii_uppercase[:19] + " .,?!:\n{}"[:6]
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<bos>", "<eos>", *characters])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=128
    )


@pytest.fixture(scope="session", autouse=True)
def profiles_apart(tmp_path_factory):
    """What steps of tiny models take beside other work is not kept for anybody."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("profiles")
        patch.setattr("nextn.decoding.building.cache_directory", lambda: directory)
        yield


@pytest.fixture(scope="session")
def tiny_base(trained_host, tmp_path_factory) -> Path:
    """A trained tiny host and its tokenizer, saved as a base model that the command line can name."""
    directory = tmp_path_factory.mktemp("base")
    trained_host.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_heads(tiny_base, tmp_path_factory) -> Path:
    """Untrained heads on `tiny_base`, saved."""
    from nextn.formats.native import load_base, load_tokenizer, save

    directory = tmp_path_factory.mktemp("heads")
    model = nextn.attach(load_base(str(tiny_base)), nextn.MultiTokenConfig(n=4, heads="sequential", recurrent=True))
    save(model, directory, load_tokenizer(str(tiny_base)))
    return directory


def with_lora(host: tf.PreTrainedModel, scale: float = 1.0, enabled: bool = True) -> tf.PreTrainedModel:
    """A host with adapters that change what it says, unless they are not enabled."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=2 * scale, target_modules=["up_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, host)
    for module in host.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.enable_adapters(enabled)
    return host.eval()


def made_up_text(rows: int, length: int, seed: int) -> torch.Tensor:
    """Sequences in which a token follows from the two before it, but for some noise: predictable in part."""
    follower = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(rows, length, generator=generator) < 0.05
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    for t in range(2, length):
        ruled = (follower[ids[:, t - 1]] + ids[:, t - 2] % 3) % (VOCAB - 3) + 3
        ids[:, t] = torch.where(noise[:, t], ids[:, t], ruled)
    return ids


@pytest.fixture
def text(tmp_path) -> str:
    """A file of lines to train on."""
    line = "the cat sat on the mat. the dog sat on the log. "
    lines = [json.dumps({"text": line[shift:] + line[:shift]}) for shift in range(len(line))]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "data.jsonl")


class Lines(torch.utils.data.Dataset):
    """Sequences to train on, as a dataset."""

    def __init__(self, rows: int = 48, length: int = 24, seed: int = 7) -> None:
        self.ids = made_up_text(rows, length, seed)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def fit(model: torch.nn.Module, steps: int, lr: float = 3e-3, loss_of=lambda model, ids: model(ids, labels=ids).loss):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    for step in range(steps):
        ids = made_up_text(8, 48, seed=step)
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


@pytest.fixture(scope="session")
def trained_host() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    fit(model, 250)
    return model.eval()


@pytest.fixture(scope="session", params=list(KINDS))
def trained_model(request, trained_host) -> nextn.MultiTokenModel:
    """Heads of each kind, really trained; some tokens they cannot name, so they are right often, not always."""
    config = nextn.MultiTokenConfig(n=4, output={"kind": "trimmed", "size": 52}, **KINDS[request.param])
    model = nextn.attach(copy.deepcopy(trained_host), config, calibration={"input_ids": made_up_text(8, 48, seed=999)})
    fit(model.train(), 100)
    return model.eval()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    lengths = [1, 2, 5, 17, 30, 9]
    return [made_up_text(1, length, seed=500 + length)[0].tolist() for length in lengths]


@torch.no_grad()
def greedy_reference(model: tf.PreTrainedModel, prompt: list[int], new: int, stops: tuple[int, ...] = ()) -> list[int]:
    """The slow, plain way: the whole prefix anew for every token, no cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + new and not (len(ids) > len(prompt) and ids[-1] in stops):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


class Restless(Pace):
    """Drafts now more, now fewer tokens, by a plan."""

    plan = (3,)

    def choose(self, texts, waiting=False, behind=False, kind="greedy") -> int:
        self.plan = [*self.plan[1:], self.plan[0]]
        return -1 if self.tree is not None and self.plan[0] == 3 else self.plan[0]
