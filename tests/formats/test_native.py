from __future__ import annotations

import json

import pytest
import torch

import nextn
from conftest import make_host, make_tokenizer
from nextn.formats import native


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
