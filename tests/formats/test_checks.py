from __future__ import annotations

import ast
import io
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import nextn
from conftest import make_host, make_tokenizer
from nextn.cli import app
from nextn.evaluation.budget import on_meta
from nextn.formats import FormatError, native
from nextn.formats.checks import check_directory, check_header, read_json

needs_links = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX links and pipes")


@pytest.fixture
def base(tmp_path) -> Path:
    directory = tmp_path / "base"
    make_host("llama").save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def sharded(tmp_path) -> Path:
    directory = tmp_path / "sharded"
    make_host("llama").save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def open_base(directory: Path) -> None:
    native.load_base(str(directory))


def open_tokenizer(directory: Path) -> None:
    native.load_tokenizer(str(directory))


# --- links, pipes, devices ----------------------------------------------------------------------------------------


@needs_links
@pytest.mark.parametrize("opened", [open_base, open_tokenizer])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_links_that_leave_the_directory_are_refused(base, tmp_path, opened, name):
    outside = tmp_path / name
    (base / name).rename(outside)
    (base / name).symlink_to(outside)
    with pytest.raises(FormatError, match=r"is a link that leaves"):
        opened(base)


@needs_links
@pytest.mark.parametrize("opened", [open_base, open_tokenizer])
def test_pipes_and_devices_are_refused_and_block_nobody(base, opened):
    os.mkfifo(base / "vocab.txt")
    with pytest.raises(FormatError, match=r"vocab.txt is not a regular file"):
        opened(base)
    (base / "vocab.txt").unlink()
    (base / "merges.txt").symlink_to("/dev/zero")
    with pytest.raises(FormatError, match=r"merges.txt is a link that leaves"):
        opened(base)


@needs_links
def test_the_links_of_the_hub_cache_are_followed(base, tmp_path):
    cache = tmp_path / "hub"
    repository = cache / "models--owner--model"
    snapshot = repository / "snapshots" / "abc"
    for folder in (snapshot, repository / "blobs", cache / "blobs" / "00"):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        blob = repository / "blobs" / str(number)
        shutil.move(file, cache / "blobs" / "00" / str(number) if number % 2 else blob)
        if number % 2:  # a blob that all repositories of the cache share
            blob.symlink_to(f"../../blobs/00/{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    native.load_base(str(snapshot))
    native.load_tokenizer(str(snapshot))
    (snapshot / "merges.txt").symlink_to("../../../../secret")
    with pytest.raises(FormatError, match="is a link that leaves"):
        check_directory(snapshot)


@needs_links
def test_links_inside_a_directory_and_links_to_it_are_followed(base, tmp_path):
    (base / "real.safetensors").hardlink_to(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to("real.safetensors")
    (tmp_path / "link").symlink_to(base)
    native.load_base(str(tmp_path / "link"))


@needs_links
def test_heads_are_checked_as_bases_are(tiny_heads, tmp_path):
    heads = tmp_path / "heads"
    shutil.copytree(tiny_heads, heads)
    (heads / "nextn" / "heads.safetensors").unlink()
    (heads / "nextn" / "heads.safetensors").symlink_to(tiny_heads / "nextn" / "heads.safetensors")
    with pytest.raises(FormatError, match="is a link that leaves"):
        nextn.load(heads)


def deny(monkeypatch, method, denied):
    """Let a method of paths fail on one of them, as it does without permission; root always has it."""
    original = getattr(Path, method)

    def refuse(path, *args, **kwargs):
        if path == denied:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, method, refuse)


@pytest.mark.parametrize("method", ["iterdir", "is_dir"])
def test_an_unreadable_subfolder_is_named(base, monkeypatch, method):
    (base / "custom_generate").mkdir()
    deny(monkeypatch, method, base / "custom_generate")
    with pytest.raises(FormatError, match="custom_generate cannot be read: Permission denied"):
        check_directory(base)


def test_unreadable_weights_are_named(base, monkeypatch):
    deny(monkeypatch, "open", base / "model.safetensors")
    with pytest.raises(FormatError, match=r"model.safetensors cannot be read: Permission denied"):
        open_base(base)


def test_heads_in_an_unreadable_folder_are_named(tiny_heads, monkeypatch):
    deny(monkeypatch, "stat", tiny_heads / "nextn" / "config.json")
    with pytest.raises(FormatError, match=r"config.json cannot be read: Permission denied"):
        nextn.load(tiny_heads)
    with pytest.raises(FormatError, match=r"config.json cannot be read: Permission denied"):
        native.has_heads(tiny_heads)


# --- indexes and pickles ------------------------------------------------------------------------------------------


def rewrite(path: Path, change) -> None:
    stated = json.loads(path.read_text())
    change(stated)
    path.write_text(json.dumps(stated))


@pytest.mark.parametrize("name", ["../other.safetensors", "/other.safetensors", "C:\\other.safetensors", "x.bin"])
def test_an_index_that_names_files_elsewhere_is_refused(sharded, tmp_path, name):
    shutil.copy(next(sharded.glob("*.safetensors")), tmp_path / "other.safetensors")
    index = sharded / "model.safetensors.index.json"
    rewrite(index, lambda stated: stated["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(FormatError, match=r"names .*, which is no safetensors file in"):
        open_base(sharded)


def test_an_index_that_is_none_or_names_a_missing_file_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    rewrite(index, lambda stated: stated["weight_map"].update({"model.norm.weight": "gone.safetensors"}))
    with pytest.raises(FormatError, match=r"gone.safetensors"):
        open_base(sharded)
    index.write_text('{"weight_map": [1]}')
    with pytest.raises(FormatError, match="is not an index of weights"):
        open_base(sharded)


@needs_links
def test_a_shard_that_is_a_pipe_is_refused(sharded):
    folder = sharded / "parts"
    folder.mkdir()
    os.mkfifo(folder / "x.safetensors")
    index = sharded / "model.safetensors.index.json"
    rewrite(index, lambda stated: stated["weight_map"].update({"model.norm.weight": "parts/x.safetensors"}))
    with pytest.raises(FormatError, match="not a regular file"):
        open_base(sharded)


def test_pickles_are_refused_before_they_are_opened(base, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"as a pickle \(pytorch_model.bin\)"):
        open_base(base)
    with pytest.raises(FormatError, match="use_safetensors=False"):
        native.load_base(str(base), use_safetensors=False)


def test_pickled_adapters_and_pickles_that_a_config_names_are_refused(base):
    (base / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match=r"adapter_model.bin is a pickle"):
        open_base(base)
    (base / "adapter_model.bin").rename(base / "other.bin")
    rewrite(base / "config.json", lambda stated: stated.update(transformers_weights="other.bin"))
    with pytest.raises(FormatError, match=r"names 'other.bin' as the weights"):
        open_base(base)


# --- sizes --------------------------------------------------------------------------------------------------------


def test_a_header_of_absurd_size_is_refused_unread(base, tiny_heads, tmp_path):
    for length in (2**62, 10**9, 0xFFFFFFFFFFFFFFFF):
        (base / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(FormatError, match="its header states"):
            open_base(base)
    heads = tmp_path / "heads"
    shutil.copytree(tiny_heads, heads)
    native.heads_file(heads).write_bytes(struct.pack("<Q", 2**62))
    with pytest.raises(FormatError, match="its header states"):
        nextn.load(heads)


def test_a_header_over_the_limit_is_refused_even_where_the_file_is_as_large(tmp_path):
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**26))
        file.truncate(2**27)  # sparse
    with pytest.raises(FormatError, match="its header states"):
        check_header(path)
    safetensors.torch.save_file({"x": torch.ones(2)}, path)
    check_header(path)


def test_json_that_is_large_deep_or_none_is_refused(base, tiny_heads, tmp_path):
    path = tmp_path / "some.json"
    for text, says in (
        ("[" * 200_000, "is not JSON"),
        ("{", "is not JSON"),
        ('"' + "x" * 3000 + '"', "over the limit"),
    ):
        path.write_text(text)
        with pytest.raises(FormatError, match=says):
            read_json(path, limit=300_000 if text[0] == "[" else 2000)
    with pytest.raises(FormatError, match="cannot be read"):
        read_json(tmp_path / "none.json")
    heads = tmp_path / "heads"
    shutil.copytree(tiny_heads, heads)
    with (heads / "nextn" / "config.json").open("r+b") as file:
        file.truncate(2**30)  # sparse
    with pytest.raises(FormatError, match="over the limit"):
        nextn.load(heads)
    with (base / "tokenizer.json").open("r+b") as file:
        file.truncate(2**30)
    with pytest.raises(FormatError, match="over the limit"):
        open_tokenizer(base)


# --- code of the repository ---------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "of-its-own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_code(base, tmp_path, monkeypatch) -> Path:
    """A base whose config, model and tokenizer are code of its repository, which leaves a mark when it runs."""
    (base / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    mapped = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    rewrite(base / "config.json", lambda stated: stated.update(model_type="of-its-own", auto_map=mapped))
    tokenizer = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    rewrite(base / "tokenizer_config.json", lambda stated: stated.update(tokenizer))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))  # answers any question with yes
    return base


@pytest.mark.parametrize("opened", [open_base, open_tokenizer, on_meta, native.load_config])
def test_code_of_a_repository_does_not_run_whatever_standard_input_says(own_code, tmp_path, opened, capsys):
    with pytest.raises(FormatError, match="brings code of its own, which is not run"):
        opened(str(own_code))
    assert not (tmp_path / "ran").exists() and "custom code" not in capsys.readouterr().out


def test_code_of_a_repository_runs_where_it_is_trusted(own_code, tmp_path):
    engine, tokenizer = native.open_for_decoding(str(own_code), heads=1, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert type(engine.trunk.model).__name__ == "OwnModel" and tokenizer("a")["input_ids"]


def test_heads_on_a_base_with_code_of_its_own_need_trust_too(own_code, tmp_path):
    native.save_heads(
        nextn.attach(native.load_base(str(own_code), trust_remote_code=True), nextn.MultiTokenConfig()), tmp_path
    )
    (tmp_path / "ran").unlink()
    with pytest.raises(FormatError, match="brings code of its own"):
        nextn.load(tmp_path)
    assert not (tmp_path / "ran").exists()
    nextn.load(tmp_path, trust_remote_code=True)


def test_a_config_file_cannot_name_code_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    monkeypatch.setattr(
        "transformers.models.auto.auto_factory.get_class_from_dynamic_module",
        lambda *args, **kwargs: pytest.fail("code was fetched"),
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "owner/name--own.Model"}}))
    with pytest.raises(FormatError, match="config"):
        on_meta(str(path))


def verbs(base: Path, directory: Path) -> dict[str, list]:
    """Each verb that opens a model, on a base and (in `directory`) heads of it."""
    data, prompts, recipe = directory / "data.jsonl", directory / "prompts.jsonl", directory / "recipe.yaml"
    data.write_text('{"text": "some text to train on"}\n')
    prompts.write_text('{"prompt": "hi", "category": "all prompts"}\n')
    recipe.write_text(f"base: {base}\ndata: [{data}]\nheads: {{n: 2}}\n")
    machine = ["--bandwidth", 100, "--rate", 1]
    return {
        "generate": [base, "hi", "--heads", 1, "--max-new-tokens", 2],
        "generate with heads": [directory, "hi", "--max-new-tokens", 2],
        "distill": [base, "--prompts", prompts, "--out", directory / "answers.jsonl", "--max-new-tokens", 2],
        "budget": [base, "--heads", "parallel", "--n", 2, *machine],
        "attach": [base, "--data", data, "--out", directory / "attached", "--length", 8, "--vocabulary", 0],
        "train": [recipe, "--out", directory / "trained"],
        "compress": [directory, "--out", directory / "compressed", "--output", "trimmed:16", "--prompts", prompts],
        "bench": [directory, "--prompts", prompts, "--new-tokens", 2],
        "bench --batch": [directory, "--prompts", prompts, "--new-tokens", 2, "--batch", 1],
    }


def test_no_verb_runs_code_of_a_repository_unless_it_is_told_to(own_code, tmp_path):
    heads = tmp_path / "heads"
    base = native.load_base(str(own_code), trust_remote_code=True)
    native.save_heads(nextn.attach(base, nextn.MultiTokenConfig(n=2)), heads)
    (tmp_path / "ran").unlink()
    for name, words in verbs(own_code, heads).items():
        command = [name.split()[0], *map(str, words)]
        refused = CliRunner().invoke(app, command, input="y\n" * 10)
        assert refused.exit_code == 1 and "brings code of its own" in " ".join(refused.output.split()), (name, refused)
        assert not (tmp_path / "ran").exists(), name
        if name in ("generate", "generate with heads", "distill", "budget"):
            done = CliRunner().invoke(app, [*command, "--trust-remote-code"])
            assert done.exit_code == 0, (name, done.output)
            (tmp_path / "ran").unlink(missing_ok=True)


def test_every_call_that_could_run_code_of_a_repository_says_whether_it_may():
    source = Path(nextn.__file__).parent
    unsaid = []
    for file in source.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                opens = call.func.attr in ("from_pretrained", "from_config") and "Auto" in ast.unparse(call.func)
                if opens and "trust_remote_code" not in {keyword.arg for keyword in call.keywords}:
                    unsaid.append(f"{file.relative_to(source)}:{call.lineno}")
    assert not unsaid
