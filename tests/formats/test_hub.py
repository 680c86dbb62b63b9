"""Pushing to the hub and loading from it, against a stand-in of its HTTP API."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import nextn
from conftest import make_host, make_tokenizer
from nextn.cli import app
from nextn.config import ConfigError
from nextn.formats import FormatError, native
from stand_in_hub import Hub

IDS = torch.tensor([[5, 9, 11, 7]])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub, constants = Hub(), huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(tf.utils.hub, "_hf_api", None)
    yield hub
    hub.close()


@pytest.fixture
def base_on_hub(hub, tmp_path):
    make_host("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\nA base.\n")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"not needed")
    hub.put("them/base", tmp_path / "base")
    return hub


def attached(base=None):
    return nextn.attach(base or make_host("llama"), nextn.MultiTokenConfig(n=3, recurrent=True))


def from_hub():
    return attached(native.load_base("them/base"))


def assert_same(loaded, model):
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=9), model.generate(IDS, max_new_tokens=9))


def card_of(files):
    return huggingface_hub.ModelCard(files["README.md"].decode())


def test_a_pushed_model_is_opened_by_nextn_and_by_transformers(hub, tmp_path):
    model = attached()
    model.add_model_tags("sft")
    info = model.push_to_hub(
        "me/whole", tokenizer=make_tokenizer(), private=True, commit_message="First", tags=["tiny"]
    )
    assert info.oid and hub.private == {"me/whole"} and hub.messages == ["First"]
    files = hub.repositories["me/whole"]["main"]
    assert {
        "config.json",
        "model.safetensors",
        "nextn/config.json",
        "nextn/heads.safetensors",
        "README.md",
    } < files.keys()
    assert json.loads(files["nextn/config.json"])["base"]["name"] == "me/whole", "no path of this machine"
    assert str(tmp_path).encode() not in b"".join(files.values())
    for loaded in (nextn.load("me/whole"), nextn.MultiTokenModel.from_pretrained("me/whole")):
        assert_same(loaded, model)
    assert torch.equal(tf.AutoModelForCausalLM.from_pretrained("me/whole")(IDS).logits, model.base(IDS).logits)
    card = card_of(files)
    assert card.data.tags == ["nextn", "multi-token-prediction", "tiny", "sft"] and card.data.library_name == "nextn"
    assert 'nextn.load("me/whole")' in card.text and "3: the next token and 2 drafts" in card.text


def test_heads_in_a_repository_of_their_own_find_their_base(base_on_hub, caplog):
    model = from_hub()
    model.held_out_tau = 2.345
    model.push_to_hub("me/heads", heads_only=True)
    files = base_on_hub.repositories["me/heads"]["main"]
    assert files.keys() == {"nextn/config.json", "nextn/heads.safetensors", "README.md"}
    card = card_of(files)
    assert (card.data.base_model, card.data.license) == ("them/base", "mit")
    assert "them/base (LlamaForCausalLM)" in card.text and "2.35 tokens per step" in card.text
    base_on_hub.fetched.clear()
    loaded = nextn.load("me/heads")
    assert_same(loaded, model)
    assert loaded.held_out_tau == 2.345 and loaded.base.config._name_or_path == "them/base"
    assert "hash differs" not in caplog.text
    assert not [file for file in base_on_hub.fetched if file.endswith((".bin", ".md"))], "only what is needed"


def test_heads_bring_their_adapter_from_the_hub(base_on_hub):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = attached(peft.get_peft_model(native.load_base("them/base"), config))
    model.push_to_hub("me/tuned", heads_only=True)
    files = base_on_hub.repositories["me/tuned"]["main"]
    assert json.loads(files["nextn/adapters/default/adapter_config.json"])["base_model_name_or_path"] == "them/base"
    assert_same(nextn.load("me/tuned"), model)


def test_heads_compressed_from_the_hub_name_its_repositories(base_on_hub, tmp_path):
    from nextn.compress import _save

    from_hub().push_to_hub("me/heads", heads_only=True)
    from_hub().push_to_hub("me/whole")
    for source, base in (("me/heads", "them/base"), ("me/whole", "me/whole")):
        model = nextn.load(source)
        _save(model, source, tmp_path / source, make_tokenizer())
        assert native.describe(tmp_path / source)["base"]["name"] == base
        assert native.base_of(tmp_path / source) == base and native.base_of(source) == base


def test_a_revision_is_that_of_the_named_repository(base_on_hub):
    model, other = from_hub(), from_hub()
    other.heads.step.eh_proj.weight.data += 1
    model.push_to_hub("me/heads", heads_only=True)
    other.push_to_hub("me/heads", heads_only=True, revision="second")
    for revision, expected in ((None, model), ("second", other)):
        loaded = nextn.load("me/heads", **{"revision": revision} if revision else {})
        assert torch.equal(loaded.heads.step.eh_proj.weight, expected.heads.step.eh_proj.weight)
    other.base.lm_head.weight.data += 1
    model.push_to_hub("me/whole")
    other.push_to_hub("me/whole", revision="second")
    assert torch.equal(nextn.load("me/whole", revision="second").base.lm_head.weight, other.base.lm_head.weight)
    with pytest.raises(FormatError, match="the hub does not give"):
        nextn.load("me/heads", revision="third")


def test_a_cached_model_opens_offline(base_on_hub, monkeypatch):
    model = from_hub()
    model.push_to_hub("me/heads", heads_only=True)
    nextn.load("me/heads")
    base_on_hub.close()
    assert_same(nextn.load("me/heads", local_files_only=True), model)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same(nextn.load("me/heads"), model)


def test_a_card_that_the_repository_has_is_kept_and_tagged(hub, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("---\ntags:\n- mine\n---\nMy words.\n")
    hub.put("me/whole", tmp_path / "own")
    attached().push_to_hub("me/whole")
    card = card_of(hub.repositories["me/whole"]["main"])
    assert card.text.strip() == "My words." and card.data.tags == ["mine", "nextn", "multi-token-prediction"]


def test_saving_uploads_what_it_wrote_and_nothing_else(hub, tmp_path):
    directory = tmp_path / "run"
    (directory / "checkpoint-4").mkdir(parents=True)
    (directory / "checkpoint-4" / "optimizer.pt").write_bytes(b"large")
    (directory / "README.md").write_text("My words.\n")
    attached().save_pretrained(directory, push_to_hub=True, max_shard_size="20KB")
    files = hub.repositories["me/run"]["main"]
    assert not [name for name in files if "checkpoint" in name]
    assert len([name for name in files if name.startswith("model-")]) > 1 and b"My words." in files["README.md"]
    assert "nextn" in card_of(files).data.tags
    assert (directory / "README.md").read_text() == "My words.\n"


def test_heads_of_a_base_without_a_name_are_not_pushed_alone(hub, tmp_path):
    make_host("llama").save_pretrained(tmp_path / "here")
    model = attached(native.load_base(str(tmp_path / "here")))
    with pytest.raises(FormatError, match="give base_name"):
        model.push_to_hub("me/heads", heads_only=True)
    model.push_to_hub("me/heads", heads_only=True, base_name="them/base")
    description = json.loads(hub.repositories["me/heads"]["main"]["nextn/config.json"])
    assert description["base"]["name"] == "them/base"


def test_a_repository_that_is_not_there_is_named(hub):
    with pytest.raises(FormatError, match="There is no directory nobody/nothing here, and the hub does not give"):
        nextn.load("nobody/nothing")
    hub.repositories["them/empty"] = {"main": {"README.md": b""}}
    with pytest.raises(FormatError, match="them/empty holds no heads"):
        nextn.load("them/empty")


def test_the_command_line_takes_heads_on_the_hub(base_on_hub):
    from_hub().push_to_hub("me/heads", heads_only=True, tokenizer=make_tokenizer())
    for options in ([], ["--heads", "1"]):
        result = CliRunner().invoke(app, ["generate", "me/heads", "hello", "--max-new-tokens", "5", *options])
        assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["info", "me/heads"])
    assert result.exit_code == 0 and "them/base" in result.output


def test_arguments_of_save_pretrained_are_honoured_or_refused(tmp_path):
    model = attached()
    for arguments, why in {
        ("variant", "fp16"): "one set of files",
        ("distributed_checkpoint", True): "is gathered",
        ("save_peft_format", False): "as peft writes them",
        ("safe_serialization", False): "only safetensors",
        ("save_function", torch.save): "no argument save_function",
        ("repo_id", "me/whole"): "goes with push_to_hub=True",
        ("token", "hf_x"): "goes with push_to_hub=True",
    }.items():
        with pytest.raises(ConfigError, match=why):
            model.save_pretrained(tmp_path / "refused", **dict([arguments]))
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ConfigError, match="give one of them"):
        model.save_pretrained(tmp_path / "refused", heads_only=True, merge_adapters=True)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not [path for path in (tmp_path / "other").rglob("*") if path.is_file()]
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert_same(nextn.load(tmp_path / "sharded"), model)


def test_no_new_argument_of_transformers_is_ignored():
    import inspect

    theirs = inspect.signature(tf.PreTrainedModel.save_pretrained).parameters
    decided = {
        "self", "save_directory", "is_main_process", "state_dict", "push_to_hub", "max_shard_size", "variant", "token",
        "save_peft_format", "save_original_format", "distributed_checkpoint", "kwargs",
    }  # fmt: skip
    assert theirs.keys() <= decided


@pytest.mark.parametrize("heads_only", [False, True])
def test_a_gathered_state_dict_is_what_is_saved(tmp_path, heads_only):
    model, gathered = attached(), {name: tensor + 1 for name, tensor in attached().state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(gathered), heads_only=heads_only)
    loaded = nextn.load(tmp_path, base=make_host("llama") if heads_only else None)
    for name, tensor in loaded.heads.state_dict().items():
        assert torch.equal(tensor, gathered[f"heads.{name}"])
    if not heads_only:
        assert torch.equal(loaded.base.lm_head.weight, gathered["base.lm_head.weight"])


def test_a_card_says_what_is_known_and_no_path(tmp_path):
    make_host("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    attached(native.load_base(str(tmp_path / "base"))).save_pretrained(tmp_path / "whole")
    text = (tmp_path / "whole" / "README.md").read_text()
    card = huggingface_hub.ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.base_model is None and str(tmp_path) not in text
    assert "| heads | recurrent |" in text and "held-out" not in text


def test_the_card_of_a_base_made_in_memory_names_no_licence(tmp_path, monkeypatch, caplog):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.chdir(tmp_path)
    attached().save_pretrained("out")
    assert huggingface_hub.ModelCard((tmp_path / "out" / "README.md").read_text()).data.license is None
    (tmp_path / "base").mkdir()
    make_host("llama").save_pretrained("base")
    (tmp_path / "base" / "README.md").write_text("---\n: [not yaml\n---\n")
    attached(native.load_base("base")).save_pretrained("other")
    assert (tmp_path / "other" / "README.md").is_file() and not caplog.text


def test_the_config_of_a_saved_model_is_opened_by_its_class(tmp_path):
    model = attached()
    model.save_pretrained(tmp_path)
    assert isinstance(model.config, model.config_class)
    assert model.config_class.from_pretrained(tmp_path).vocab_size == 64


@pytest.fixture
def other_cache(base_on_hub, tmp_path):
    """A cache that is not the default one, with `them/base` in it."""
    huggingface_hub.snapshot_download("them/base", cache_dir=tmp_path / "other")
    return tmp_path / "other"


def test_a_base_in_another_cache_is_hashed_as_it_is_stored(other_cache, tmp_path, caplog):
    base = native.load_base("them/base", torch.bfloat16, cache_dir=other_cache)
    assert native.hash_of(base) == native.hash_of(make_host("llama"))
    native.save_heads(attached(base), tmp_path / "heads")
    nextn.load(tmp_path / "heads", dtype=torch.bfloat16, cache_dir=other_cache)
    given = tf.AutoModelForCausalLM.from_pretrained("them/base", cache_dir=other_cache, dtype=torch.bfloat16)
    nextn.load(tmp_path / "heads", base=given, cache_dir=other_cache)
    assert "hash differs" not in caplog.text


@pytest.mark.parametrize("function", [native.load_base, native.load_config, native.load_tokenizer])
def test_files_in_another_cache_are_checked(other_cache, function):
    function("them/base", cache_dir=other_cache)
    (config,) = other_cache.rglob("snapshots/*/config.json")
    (config.parent / "merges.txt").symlink_to("/dev/zero")
    with pytest.raises(FormatError, match="is a link that leaves"):
        function("them/base", cache_dir=other_cache)


def test_a_damaged_generation_config_in_another_cache_is_refused(other_cache):
    (path,) = other_cache.rglob("snapshots/*/generation_config.json")
    path.unlink()
    path.write_text('{"eos_token_id": "2"}')
    with pytest.raises(FormatError, match="has eos_token_id '2'"):
        native.load_base("them/base", cache_dir=other_cache)


def test_a_trunk_of_integers_in_another_cache_is_refused(base_on_hub, tmp_path):
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    base_on_hub.put("them/integers", tmp_path / "base")
    with pytest.raises(FormatError, match="are integers"):
        native.load_base("them/integers", cache_dir=tmp_path / "other")


def test_a_base_in_a_subfolder_is_hashed_as_it_is_stored(tmp_path):
    make_host("llama").save_pretrained(tmp_path / "folder")
    base = native.load_base(str(tmp_path), torch.bfloat16, subfolder="folder")
    assert native.hash_of(base) == native.hash_of(make_host("llama"))
