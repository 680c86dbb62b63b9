"""Input that cannot be trained on is refused in one sentence before the base is loaded; what is unusual is said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

import nextn
from conftest import make_host, make_tokenizer
from nextn.config import ConfigError, MultiTokenConfig
from nextn.data import DataError, read_jsonl
from nextn.formats import FormatError, native
from nextn.recipe import Recipe, train

LINE = "the cat sat on the mat. the dog sat on the log. "
TOGETHER = {"heads": {"n": 4, "freeze_trunk": False, "weights": {"preset": "gloeckle"}}}


@pytest.fixture
def stated(tiny_base, tmp_path) -> dict:
    """A recipe that works, in fields."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": LINE[shift:] + LINE[:shift]}) for shift in range(len(LINE))))
    training = {"max_steps": 1, "bf16": False, "disable_tqdm": True}
    return {
        "base": str(tiny_base),
        "heads": {"n": 4, "recurrent": True},
        "data": [str(data)],
        "length": 64,
        "training": training,
    }


@pytest.fixture
def written(tmp_path):
    def write(*records: dict, name: str = "other.jsonl") -> str:
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
        return str(tmp_path / name)

    return write


def refused(fields: dict, tmp_path, message: str, monkeypatch, kind=ValueError) -> list[str]:
    """Run a recipe that is refused with one sentence before its base is loaded; returns what was said."""
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(native, "load_base", lambda *_, **__: pytest.fail("the base was loaded"))
        with pytest.raises(kind, match=message) as caught:
            train(Recipe(**fields), tmp_path / "out", say=said.append)
    assert "\n" not in str(caught.value)
    return said


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["alone", "among others", "validation"])
@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "has no usable text"),
        ([{"text": "  "}, {"other": "a"}], "has no usable text"),
        ([{"prompt": "abc", "answer": ""}], "has no usable text"),
        ([{"text": "a"}] * 9, "has nothing to predict within 64 tokens"),
        ([{"prompt": "abcde" * 20, "answer": "abc"}], "has nothing to predict within 64 tokens"),
    ],
)
def test_a_source_without_any_target_is_named(records, message, place, stream, stated, written, tmp_path, monkeypatch):
    bad = written(*records)
    change = {
        "alone": {"data": [bad]},
        "among others": {"data": [*stated["data"], bad]},
        "validation": {"validation": bad},
    }[place]
    refused(stated | change | {"stream": stream}, tmp_path, f"{bad} {message}", monkeypatch, DataError)


@pytest.mark.parametrize("length", [2, 3, 4])
@pytest.mark.parametrize("stream", [False, True])
def test_blocks_in_which_the_last_depth_has_no_target_are_refused(length, stream, stated, tmp_path, monkeypatch):
    fields = stated | {"length": length, "stream": stream}
    refused(fields, tmp_path, rf"length is {length}, but n is 4: .* at least 5", monkeypatch)
    train(Recipe(**stated | {"length": 5}), tmp_path / "five", say=lambda _: None)


def test_documents_that_are_all_shorter_than_n_are_refused(stated, written, tmp_path, monkeypatch):
    fields = stated | {"data": [written(*[{"text": "abcd"}] * 40)]}
    refused(fields, tmp_path, r"no target t\+4: .* more than 3 tokens .* an n of at most 3", monkeypatch, DataError)
    train(Recipe(**fields | {"heads": {"n": 3, "recurrent": True}}), tmp_path / "three", say=lambda _: None)


def test_some_short_and_some_cut_records_are_said_in_a_line_each(stated, written, tmp_path):
    records = [{"text": "ab"}] * 3 + [{"prompt": "abcde" * 20, "answer": "abc"}] * 2
    said: list = []
    train(Recipe(**stated | {"data": [*stated["data"], written(*records)], "validation": 0}), tmp_path, say=said.append)
    assert "2 records have no target in their first 64 tokens and are left out" in said
    assert "3 of 51 documents are too short to have a target t+4" in said


def test_sizes_above_the_bases_context_are_refused_before_data_is_read(stated, tmp_path, monkeypatch):
    monkeypatch.setattr("nextn.recipe.PackedBlocks", lambda *_: pytest.fail("data was read"))
    refused(stated | {"length": 129}, tmp_path, "length is 129, but the base reads 128 tokens", monkeypatch)
    many = {"heads": {"n": 128, "recurrent": True}, "length": 129}
    refused(stated | many, tmp_path, "n is 128, but the base reads 128 tokens", monkeypatch)


def test_validation_that_is_trained_on_is_refused_by_its_text(stated, tmp_path, written, monkeypatch):
    records = read_jsonl(stated["data"][0])
    for validation in (records[::-1], records[5:7], [*records, *records]):
        fields = stated | {"validation": written(*validation)}
        refused(fields, tmp_path, "All of the validation data is trained on", monkeypatch, DataError)
    said: list = []
    some = stated | {"validation": written(records[0], {"text": "the log sat on the cat and the dog"})}
    train(Recipe(**some), tmp_path / "some", say=said.append)
    assert "1 of 2 documents of the validation data are trained on too" in said


def test_a_share_of_repeated_text_is_said_to_be_trained_on(stated, written, tmp_path):
    said: list = []
    fields = {"data": [written(*[{"text": LINE}] * 40)], "validation": 0.1}
    train(Recipe(**stated | fields), tmp_path / "out", say=said.append)
    assert any("documents of the validation data are trained on too" in str(each) for each in said)


def test_validation_without_targets_of_deep_heads_is_said(stated, written, tmp_path):
    said: list = []
    train(Recipe(**stated | {"validation": written({"text": "abc"})}), tmp_path / "out", say=said.append)
    assert "the validation data has no target t+3 or further: it says nothing of these depths" in said


def test_tokens_of_the_validation_data_are_checked_before_calibration(stated, tiny_base, written, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(tmp_path / "base")
    fields = stated | {"base": str(tmp_path / "base"), "validation": written({"text": "ab<call>cd"})}
    said: list = []
    with pytest.raises(DataError, match="gives token 64, but the model's vocabulary has 64"):
        train(Recipe(**fields), tmp_path / "out", say=said.append)
    assert not any("calibrated" in str(each) for each in said)


def test_a_base_that_is_not_there_is_called_so(stated, tmp_path, monkeypatch):
    fields = stated | {"base": str(tmp_path / "nowhere")}
    refused(fields, tmp_path, f"There is no directory {tmp_path / 'nowhere'}", monkeypatch, FormatError)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "no module q_prj; name some of its linear layers: down_proj, .*v_proj"),
        (["q_proj", "v_prj"], "no module v_prj"),
        (["mlp.q_proj"], "no module mlp.q_proj"),
        (".*nothing", r"no module \.\*nothing"),
        ("(", "no regular expression"),
        ([], r"target_modules is \[\]"),
        (3, "target_modules is 3"),
        (["mlp"], "LlamaMLP cannot be adapted"),
        (["input_layernorm"], "LlamaRMSNorm cannot be adapted"),
    ],
)
def test_lora_targets_that_the_base_lacks_are_named(targets, message, stated, tmp_path):
    pytest.importorskip("peft")
    said: list = []
    fields = stated | TOGETHER | {"lora": {"r": 2, "target_modules": targets}}
    with pytest.raises(ConfigError, match=message) as caught:
        train(Recipe(**fields), tmp_path / "out", say=said.append)
    assert "\n" not in str(caught.value) and not any("calibrated" in str(each) for each in said)


@pytest.mark.parametrize("targets", [["q_proj", "mlp.up_proj"], "all-linear", r".*\.(q|v)_proj", None])
def test_lora_targets_that_the_base_has_are_taken(targets, stated, tmp_path):
    pytest.importorskip("peft")
    lora = {"r": 2} | ({} if targets is None else {"target_modules": targets})
    train(Recipe(**stated | TOGETHER | {"lora": lora}), tmp_path / "out", say=lambda _: None)


# --- from Python --------------------------------------------------------------------------------------------------


@pytest.fixture(
    params=[{"n": 3, "recurrent": True}, {"n": 3, "freeze_trunk": False, "weights": {"preset": "gloeckle"}}]
)
def model(request) -> nextn.MultiTokenModel:
    return nextn.attach(make_host("llama"), MultiTokenConfig(**request.param)).train()


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_a_batch_of_masked_labels_has_the_loss_0_and_no_gradient(model, items):
    ids = torch.arange(3, 13)[None]
    loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=items).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_tokens_of_another_model_are_refused(model):
    ids = torch.arange(3, 13)[None]
    with pytest.raises(ConfigError, match="input_ids has the token 64, but the vocabulary of the base has 64"):
        model(ids + 52)
    for wrong in (torch.full_like(ids, 64), torch.full_like(ids, -5)):
        with pytest.raises(ConfigError, match="labels has the token"):
            model(ids, labels=wrong)
    for labels in (ids[:, :5], ids[0]):
        with pytest.raises(ConfigError, match=r"give token ids \[B, T\], labels alike"):
            model(ids, labels=labels)


def test_more_depths_than_positions_are_refused():
    with pytest.raises(ConfigError, match="n is 128, but the base reads 128 tokens"):
        nextn.attach(make_host("llama"), MultiTokenConfig(n=128, recurrent=True))


@pytest.mark.parametrize("masked", ["train_dataset", "eval_dataset"])
def test_datasets_whose_labels_are_all_masked_are_refused(masked, model, tmp_path):
    ids = list(range(3, 13))
    data = dict.fromkeys(("train_dataset", "eval_dataset"), [{"input_ids": ids, "labels": ids}] * 4)
    data[masked] = [{"input_ids": ids, "labels": [3] + [-100] * 9}] * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nextn.MultiTokenModel, "calibrate", lambda *_: pytest.fail("it was calibrated"))
        trainer = nextn.Trainer(model, _arguments(tmp_path), **data)
        with pytest.raises(ConfigError, match=f"{masked} has no target: all labels are -100"):
            trainer.train()
    data[masked] = [*data[masked], {"input_ids": ids, "labels": ids}]
    nextn.Trainer(model, _arguments(tmp_path), **data).train()


def _arguments(directory) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(str(directory), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
