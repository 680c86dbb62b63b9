from __future__ import annotations

import hashlib
import json
import struct
from types import SimpleNamespace

import pytest
import torch

import nextn
from conftest import make_host, make_tokenizer
from nextn.formats import native
from nextn.trunk import HostError


@pytest.fixture
def saved(tmp_path):
    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3, recurrent=True))
    model.save_pretrained(tmp_path, tokenizer=make_tokenizer())
    return tmp_path


def test_the_hash_does_not_change_with_the_dtype_it_is_loaded_in(saved, caplog):
    nextn.load(saved, dtype=torch.bfloat16)
    assert "hash differs" not in caplog.text
    stated = native.describe(saved)["base"]["hash"]
    assert native.hash_of(native.load_base(str(saved), dtype=torch.bfloat16)) == stated
    assert native.hash_of(make_host("llama", seed=1)) != stated


def test_another_base_is_a_warning_and_another_tokenizer_an_error(saved, caplog):
    nextn.load(saved, base=make_host("llama", seed=1))
    assert "hash differs" in caplog.text
    native.check_tokenizer(saved, make_tokenizer())
    other = make_tokenizer()
    other.add_tokens("<more>")
    with pytest.raises(native.FormatError, match="another tokenizer"):
        native.check_tokenizer(saved, other)


def test_a_base_made_in_memory_is_hashed_in_memory(saved, monkeypatch):
    monkeypatch.chdir(saved)  # which holds safetensors of its own
    assert native.hash_of(make_host("llama", seed=1)) != native.describe(saved)["base"]["hash"]
    assert native.hash_of(make_host("llama")) == native.describe(saved)["base"]["hash"]


def test_a_truncated_heads_file_is_named(saved):
    path = saved / "nextn" / "heads.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(native.FormatError, match="truncated"):
        nextn.load(saved)


def test_missing_and_foreign_directories_are_named(saved, tmp_path):
    with pytest.raises(native.FormatError, match="holds no heads"):
        nextn.load(tmp_path / "nowhere")
    (saved / "nextn" / "config.json").write_text("{}")
    with pytest.raises(native.FormatError, match="not a description"):
        nextn.load(saved)


def test_heads_of_another_vocabulary_are_refused(saved):
    path = saved / "nextn" / "config.json"
    description = json.loads(path.read_text())
    description["base"]["vocab_size"] = 65
    path.write_text(json.dumps(description))
    with pytest.raises(native.FormatError, match="vocab_size 65"):
        nextn.load(saved)


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(native.FormatError, match="cannot be written"):
        native.writable(tmp_path / "file" / "below")


def test_weights_that_were_changed_in_memory_are_a_warning(saved, caplog):
    base = native.load_base(str(saved))
    nextn.load(saved, base=base)
    assert "hash differs" not in caplog.text
    base.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
    nextn.load(saved, base=base)
    assert "hash differs" in caplog.text


def test_weights_loaded_into_a_base_are_a_warning_and_heads_trained_on_them_know_them(saved, tmp_path, caplog):
    base = native.load_base(str(saved))
    base.load_state_dict(make_host("llama", seed=1).state_dict())
    native.save_heads(nextn.attach(base, nextn.MultiTokenConfig()), tmp_path / "heads")
    nextn.load(tmp_path / "heads", base=base)
    assert "hash differs" not in caplog.text
    nextn.load(tmp_path / "heads", base=native.load_base(str(saved)))
    assert "hash differs" in caplog.text


def test_a_base_from_another_directory_is_a_warning(saved, tmp_path, caplog):
    make_host("llama", seed=1).save_pretrained(tmp_path / "other")
    nextn.load(saved, base=native.load_base(str(tmp_path / "other")))
    assert "hash differs" in caplog.text


def test_a_base_in_bfloat16_is_the_one_that_its_files_hold(saved, caplog):
    nextn.load(saved, base=native.load_base(str(saved), torch.bfloat16))
    assert "hash differs" not in caplog.text


TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def with_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3, recurrent=True))
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    return tmp_path


def test_a_missing_chat_template_is_refused_and_another_one_a_warning(with_template, caplog):
    native.open_for_decoding(str(with_template))
    assert "chat template" not in caplog.text
    (with_template / "chat_template.jinja").write_text(TEMPLATE + "\n")
    native.open_for_decoding(str(with_template))
    assert "is not the one that the heads were trained with" in caplog.text
    (with_template / "chat_template.jinja").unlink()
    with pytest.raises(native.FormatError, match=r"trained with a chat template, but the tokenizer of .* has none"):
        native.open_for_decoding(str(with_template))


def test_heads_of_earlier_versions_and_without_a_template_need_none(saved):
    native.open_for_decoding(str(saved))
    path = saved / "nextn" / "config.json"
    description = json.loads(path.read_text())
    del description["base"]["chat_template"]
    path.write_text(json.dumps(description))
    native.open_for_decoding(str(saved))


@pytest.mark.parametrize(
    "text", ["", '{"eos_token_id": 2', "[]", '{"eos_token_id": "2"}', '{"eos_token_id": [2, null]}']
)
def test_a_damaged_generation_config_is_refused(saved, text):
    (saved / "generation_config.json").write_text(text)
    with pytest.raises(native.FormatError, match=r"generation_config.json"):
        nextn.load(saved)


def test_a_base_without_a_generation_config_keeps_the_end_tokens_of_its_config(saved):
    (saved / "generation_config.json").unlink()
    assert nextn.load(saved).base.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    ("base", "says"),
    [
        (lambda: make_host("llama").model, "LlamaModel has no language model head"),
        (lambda: "a string", "str is not a transformers model"),
        (lambda: torch.nn.Linear(2, 2), "Linear is not a transformers model"),
    ],
    ids=["decoder", "string", "module"],
)
def test_what_is_no_causal_model_is_refused_as_a_base_in_one_sentence(saved, base, says):
    with pytest.raises(HostError, match=says):
        nextn.load(saved, base=base())


def test_the_hash_of_a_base_stays_as_earlier_versions_stored_it():
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3).T)  # not contiguous
    model.register_buffer("scale", torch.ones((), dtype=torch.bfloat16))
    expected = hashlib.sha256()
    for name, shape, dtype, data in (
        ("scale", (), torch.bfloat16, b"\x80\x3f"),
        ("weight", (3, 2), torch.float32, struct.pack("<6f", 0, 3, 1, 4, 2, 5)),
    ):
        expected.update(f"{name} {shape} {dtype}\n".encode() + data)
    model.config = SimpleNamespace(_name_or_path="")
    assert native.hash_of(model) == "sha256:" + expected.hexdigest()


def test_the_hash_of_a_gathered_state_dict_is_that_of_its_files(tmp_path, caplog):
    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3))
    model.save_pretrained(tmp_path, state_dict={name: tensor + 1 for name, tensor in model.state_dict().items()})
    nextn.load(tmp_path)
    assert "hash differs" not in caplog.text
