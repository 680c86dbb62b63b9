"""Recipes: three ways to train through one command, and settings that are equal give one result."""

from __future__ import annotations

import functools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import nextn
from conftest import CONFIGS, KINDS, SHAPE
from nextn.cli import app
from nextn.config import ConfigError
from nextn.data import DataError, byte_tokenizer
from nextn.formats import FormatError, native
from nextn.lock import FileLock, LockedError
from nextn.recipe import Recipe, train
from nextn.scratch import from_scratch


@pytest.fixture
def attached(tiny_base, text) -> dict:
    """Heads on a frozen base."""
    return {
        "base": str(tiny_base),
        "heads": {"n": 4, "recurrent": True},
        "vocabulary": 32,
        "data": [text],
        "length": 64,
        "training": {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 4, "disable_tqdm": True},
    }


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def files_of(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of writing of all files."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def table_of(said: list):
    """The table among what a training said: a row a depth and one for all, two columns a step."""
    return next(each for each in said if hasattr(each, "columns"))


def assert_equal(ours, theirs, **bounds) -> None:
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=name, **bounds)


def test_kept_trunk_states_change_nothing(attached, tmp_path):
    said = []
    kept = train(Recipe(**attached), tmp_path / "kept", say=said.append)
    assert any("outputs are kept" in str(each) for each in said)
    assert not list(tmp_path.glob("kept/trunk_outputs*")), "they are removed at the end"
    fresh = train(Recipe(**attached, max_states_gb=0.0), tmp_path / "fresh")
    assert_equal(state(kept.heads), state(fresh.heads), rtol=0, atol=0)


def test_top_tokens_stand_for_the_distribution_that_heads_follow(attached, tmp_path):
    heads = attached["heads"] | {"objective": {"follows": "kl"}, "tap": "pre_norm"}
    models = {}
    for top_k in (0, 64):  # the whole vocabulary of the tiny base
        said = []
        recipe = Recipe(**attached | {"heads": heads, "teacher_top_k": top_k})
        models[top_k] = train(recipe, tmp_path / str(top_k), say=said.append)
        assert any(("outputs are kept" if top_k else "kl needs its last state") in str(each) for each in said)
    assert_equal(state(models[64].heads), state(models[0].heads), rtol=0, atol=0.02)  # stored in half precision
    said = []
    once = attached["training"] | {"num_train_epochs": 1}
    train(Recipe(**attached | {"heads": heads, "teacher_top_k": 64, "training": once}), tmp_path / "once", said.append)
    assert any("teacher_top_k is not used" in str(each) for each in said)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_train_the_same_heads(attached, tmp_path, checkpointing):
    stated = attached | {"training": attached["training"] | {"gradient_checkpointing": checkpointing, "bf16": False}}
    plain = train(Recipe(**stated), tmp_path / "plain")
    for which in (True, "heads"):
        compiled = train(Recipe(**stated, compile=which), tmp_path / f"compiled {which}")
        assert_equal(state(compiled.heads), state(plain.heads), rtol=0, atol=0.02)


def test_another_recipe_or_other_data_in_the_same_directory_is_refused(attached, text, tmp_path):
    train(Recipe(**attached), tmp_path / "out")
    with pytest.raises(FormatError, match="other options"):
        train(Recipe(**attached, seed=1), tmp_path / "out")
    with open(text, "a") as file:
        file.write('\n{"text": "one more line"}\n')
    with pytest.raises(FormatError, match="other data"):
        train(Recipe(**attached), tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_from_scratch_is_an_ordinary_model_as_large_as_the_one_without_heads(kind, text, tmp_path):
    recipe = Recipe(
        scratch=SHAPE,
        tokenizer="bytes",
        heads={"n": 3, "freeze_trunk": False, "weights": {"preset": "gloeckle"}, **KINDS[kind]},
        data=[text],
        length=64,
        training={"max_steps": 30, "learning_rate": 5e-3, "disable_tqdm": True, "bf16": False},
    )
    said = []
    model = train(recipe, tmp_path, say=said.append)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_equal(state(plain), state(model.base), rtol=0, atol=0)
    ids = torch.tensor([tokenizer("the cat sat")["input_ids"]])
    loaded = nextn.load(tmp_path)
    assert torch.equal(loaded.generate(ids, max_new_tokens=12), plain.generate(ids, max_new_tokens=12, do_sample=False))
    first, last = (list(column.cells)[-1] for column in table_of(said).columns[1::2])
    assert float(last) < float(first)
    if kind == "parallel":
        alone = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**SHAPE, vocab_size=len(tokenizer))
        )
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in alone.parameters())


def test_heads_from_scratch_do_not_start_as_copies():
    config = nextn.MultiTokenConfig(n=3, heads="parallel", freeze_trunk=False, weights={"preset": "gloeckle"})
    model = from_scratch(SHAPE, config, byte_tokenizer())
    first, second = model.heads.layers
    assert not torch.equal(first.mlp.up_proj.weight, second.mlp.up_proj.weight)
    assert not torch.equal(first.mlp.up_proj.weight, model.trunk.layers[-1].mlp.up_proj.weight)
    assert torch.equal(first.input_layernorm.weight, torch.ones(32))


def together(tiny_base, text, **more) -> Recipe:
    return Recipe(
        base=str(tiny_base),
        heads={"n": 3, "freeze_trunk": False, "weights": {"preset": "deepseek"}},
        data=[text],
        length=64,
        **{
            "training": {
                "per_device_train_batch_size": 4,
                "max_steps": 8,
                "save_steps": 4,
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                "bf16": False,
                "disable_tqdm": True,
            }
        }
        | more,
    )


ADAPTED = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
TUNED = [None, ADAPTED, ADAPTED | {"modules_to_save": ["lm_head"]}]


@pytest.mark.parametrize("lora", [*TUNED, ADAPTED | {"modules_to_save": ["lm_head", "embed_tokens"]}])
def test_trunk_and_heads_are_tuned_together(tiny_base, text, tmp_path, lora):
    if lora:
        pytest.importorskip("peft")
    before = state(transformers.AutoModelForCausalLM.from_pretrained(tiny_base))
    model = train(together(tiny_base, text, lora=lora), tmp_path)
    plain = state(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    changed = {name for name, tensor in plain.items() if not torch.equal(tensor, before[name])}
    assert plain.keys() == before.keys()
    if lora:
        named = *lora["target_modules"], *lora.get("modules_to_save", ())
        assert changed == {name for name in before if any(part in name for part in named)}
    else:
        assert len(changed) > 20
    assert_equal(state(nextn.load(tmp_path)), state(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lora", TUNED)
def test_a_training_that_was_cut_goes_on_to_the_same_end(tiny_base, text, tmp_path, lora):
    if lora:
        pytest.importorskip("peft")
    whole = state(train(together(tiny_base, text, lora=lora), tmp_path / "whole"))
    cut = tmp_path / "cut"
    train(together(tiny_base, text, lora=lora), cut)
    for leftover in ("checkpoint-8", "model.safetensors", "nextn"):  # as if killed after the first checkpoint
        path = cut / leftover
        for file in [*path.glob("*/*"), *path.glob("*")] if path.is_dir() else [path]:
            if file.is_file():
                file.unlink()
    assert_equal(state(train(together(tiny_base, text, lora=lora), cut)), whole, rtol=0, atol=1e-6)


@pytest.fixture
def adapted(tiny_base, tmp_path) -> dict:
    """A base with heads and an adapter, saved, as fields of a recipe."""
    peft = pytest.importorskip("peft")
    base = native.load_base(str(tiny_base))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = nextn.attach(peft.get_peft_model(base, config), nextn.MultiTokenConfig(n=3))
    model.save_pretrained(tmp_path / "adapted", tokenizer=native.load_tokenizer(str(tiny_base)))
    return {"base": str(tmp_path / "adapted"), "heads": None}


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state(model.base).items() if "lora_" in name}


def test_heads_trained_on_an_adapted_base_bring_its_adapter(adapted, attached, tmp_path):
    train(Recipe(**attached | adapted | {"vocabulary": None}), tmp_path / "out")
    before, after = nextn.load(tmp_path / "adapted"), nextn.load(tmp_path / "out", dtype=torch.float32)
    assert native.base_name(tmp_path / "out") == adapted["base"]
    assert_equal(state(after.base), state(before.base), rtol=0, atol=0)
    assert adapter_of(after) and not torch.equal(
        after.heads.steps[0].eh_proj.weight, before.heads.steps[0].eh_proj.weight
    )


def test_the_adapter_of_a_base_is_trained_and_stays_apart(adapted, tiny_base, text, tmp_path):
    together_with = {"freeze_trunk": False, "weights": {"preset": "deepseek"}}
    recipe = together(tiny_base, text).model_dump() | adapted | {"heads": together_with}
    trained = train(Recipe(**recipe), tmp_path / "out")
    plain, base = (
        state(transformers.AutoModelForCausalLM.from_pretrained(path)) for path in (tmp_path / "out", tiny_base)
    )
    assert_equal(plain, base, rtol=0, atol=0)
    loaded, before = nextn.load(tmp_path / "out"), adapter_of(nextn.load(adapted["base"]))
    assert_equal(adapter_of(loaded), adapter_of(trained), rtol=0, atol=0)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in adapter_of(loaded).items())
    with pytest.raises(ConfigError, match="has adapters already"):
        train(Recipe(**recipe | {"lora": {"r": 2, "target_modules": ["q_proj"]}}), tmp_path / "second")


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def recipes(attached: dict, tiny_base, text) -> dict[str, Recipe]:
    """Trainings that end inside an epoch."""
    fractional = attached["training"] | {"num_train_epochs": 1.5}
    odd = {"per_device_train_batch_size": 4, "max_steps": 5, "save_steps": 2, "bf16": False, "disable_tqdm": True}
    return {
        "attached": Recipe(**attached | {"training": fractional}),
        "together": together(tiny_base, text, training=odd),
        "lora": together(tiny_base, text, training=odd, lora=LORA),
        "streamed": together(tiny_base, text, training=odd, stream=True),
    }


@pytest.mark.parametrize("way", ["attached", "together", "lora", "streamed"])
def test_a_finished_training_is_left_as_it_is(way, attached, tiny_base, text, tmp_path):
    if way == "lora":
        pytest.importorskip("peft")
    recipe, out = recipes(attached, tiny_base, text)[way], tmp_path / "out"
    trained = state(train(recipe, out))
    before, said = files_of(out), []
    again = train(recipe, out, say=said.append)
    assert said == [f"{out} holds this training, finished: nothing is changed"]
    assert files_of(out) == before
    bounds = {"rtol": 2**-7, "atol": 1e-3} if way == "attached" else {"rtol": 0, "atol": 1e-6}  # stored in bfloat16
    ours = {name: tensor.to(trained[name].dtype) for name, tensor in state(again).items()}
    assert_equal(ours, trained, **bounds)

    for leftover in ("finished.json", "nextn/config.json"):  # as if killed after the last checkpoint
        (out / leftover).unlink()
    said.clear()
    train(recipe, out, say=said.append)
    assert any("going on from" in str(each) for each in said)
    contents = {name: content for name, (content, _) in files_of(out).items() if "log" not in name}
    assert contents == {name: content for name, (content, _) in before.items() if "log" not in name}


def test_without_a_whole_checkpoint_training_starts_anew_and_says_so(attached, tmp_path):
    out = tmp_path / "out"
    trained = state(train(Recipe(**attached), out).heads)
    (out / "finished.json").unlink()
    for file in out.glob("checkpoint-*/optimizer.pt"):
        file.write_bytes(b"")
    said = []
    again = train(Recipe(**attached), out, say=said.append)
    assert sum("is passed over: its optimizer.pt is missing or damaged" in str(each) for each in said) == 2
    assert any("training starts from the beginning" in str(each) for each in said)
    assert_equal(state(again.heads), trained, rtol=0, atol=0)


@pytest.fixture
def extended_base(tiny_base, tmp_path) -> Path:
    """A base whose tokenizer has a token more than the model."""
    shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_that_only_the_tokenizer_has_are_refused_before_training(stream, extended_base, text, tmp_path):
    limits = {"max_steps": 2, "save_steps": 1, "disable_tqdm": True, "bf16": False}
    train(together(extended_base, text, stream=stream, training=limits), tmp_path / "unused")  # not in the data
    plain, strange = Path(text).read_text(), json.dumps({"text": "a <call> b"})
    refused = "gives token 64, but the model's vocabulary has 64"
    Path(text).write_text(f"{strange}\n{plain}")
    with pytest.raises(DataError, match=refused):
        train(together(extended_base, text, stream=stream, training=limits), tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    if stream:  # further on in the text, when it is read
        Path(text).write_text(f"{plain}\n{strange}")
        with pytest.raises(DataError, match=refused):
            train(together(extended_base, text, stream=True, training=limits | {"max_steps": 99}), tmp_path / "later")


def test_a_padding_token_that_the_model_lacks_is_refused_where_it_is_saved(attached, extended_base, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(extended_base)
    tokenizer.pad_token = "<call>"
    tokenizer.save_pretrained(extended_base)
    (data,) = attached["data"]
    train(Recipe(**attached | {"base": str(extended_base)}), tmp_path / "heads")
    with pytest.raises(DataError, match="gives token 64"):
        train(together(extended_base, data), tmp_path / "model")


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_from_scratch(text, tmp_path):
    heads = {"n": 3, "freeze_trunk": False, "weights": {"preset": "gloeckle"}}
    recipe = Recipe(
        scratch=SHAPE | {"vocab_size": 100, "eos_token_id": 1, "pad_token_id": 0},
        tokenizer="bytes",
        heads=heads,
        data=[text],
        length=64,
        training={"max_steps": 2},
    )
    with pytest.raises(ConfigError, match=r"scratch\.vocab_size is 100, but the tokenizer has 258 tokens"):
        train(recipe, tmp_path / "out")


@pytest.mark.parametrize("own", [False, True])
def test_a_trimmed_output_keeps_the_most_frequent_tokens_of_the_data(own, attached, tmp_path):
    output = {"kind": "trimmed", "size": 32, "own": own}
    stated = attached | {"vocabulary": None, "heads": attached["heads"] | {"output": output}}
    short = attached | {"training": attached["training"] | {"num_train_epochs": 1}}
    by_output = train(Recipe(**stated | {"training": short["training"]}), tmp_path / "output")
    by_vocabulary = train(Recipe(**short), tmp_path / "vocabulary")
    assert torch.equal(by_output.heads.output.kept, by_vocabulary.heads.output.kept)
    assert by_output.heads.output.kept.tolist() != list(range(32))
    streamed = {"stream": True, "training": {"max_steps": 2}}
    for place, recipe in enumerate((stated, attached)):
        with pytest.raises(ConfigError, match="which stream does not hold"):
            train(Recipe(**recipe | streamed), tmp_path / str(place))


def test_heads_that_the_checkpoint_has_are_trained_on(attached, text, tmp_path):
    first = train(Recipe(**attached), tmp_path / "first")
    again = {name: value for name, value in attached.items() if name not in ("heads", "vocabulary")}
    second = train(Recipe(**again | {"base": str(tmp_path / "first")}), tmp_path / "second")
    assert second.multi_token == first.multi_token
    assert torch.equal(second.heads.output.kept, first.heads.output.kept)
    assert not torch.equal(second.heads.step.eh_proj.weight, first.heads.step.eh_proj.weight)
    assert nextn.load(tmp_path / "second").multi_token == first.multi_token, "it names the base, not the first heads"
    others = {"base": str(tmp_path / "first"), "heads": {"n": 3}, "vocabulary": None}
    with pytest.raises(ConfigError, match="has heads with another n than the recipe"):
        train(Recipe(**attached | others), tmp_path / "third")
    weights = {"preset": "deepseek"}
    changes = {"base": str(tmp_path / "first"), "heads": {"freeze_trunk": False, "weights": weights}}
    tuned = train(Recipe(**again | changes, lora={"r": 2, "target_modules": ["q_proj"]}), tmp_path / "tuned")
    assert torch.equal(tuned.heads.output.kept, first.heads.output.kept) and not tuned.multi_token.freeze_trunk
    assert nextn.load(tmp_path / "tuned").multi_token.weights.preset == "deepseek"


def test_overlap_and_validation_are_logged(attached, tmp_path):
    heads = attached["heads"] | {"objective": {"follows": "lk"}}
    training = attached["training"] | {"learning_rate": 1e-3, "logging_steps": 2}
    train(Recipe(**attached | {"heads": heads, "training": training, "validation": 0.2}), tmp_path)
    history = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(0 < entry["overlap_2"] <= 1 for entry in history if "loss_2" in entry)
    assert any("loss_2" in entry for entry in history)
    tau = [entry["eval_tau"] for entry in history if "eval_tau" in entry][-1]
    assert nextn.load(tmp_path).held_out_tau == pytest.approx(tau, abs=1e-3)
    assert f"| τ on held-out text | {tau:.2f} tokens per step |" in (tmp_path / "README.md").read_text()


def test_validation_is_a_file_a_share_or_nothing(attached, tmp_path):
    """Of a file, all of it is held out and none of it trained on, streamed data or not."""
    held_out = tmp_path / "held_out.csv"
    held_out.write_text("text\nthe cat sat on the log and the dog on the mat\n")
    few = attached | {"vocabulary": None, "training": attached["training"] | {"max_steps": 2, "eval_steps": 1}}
    file = {"validation": str(held_out)}
    for place, change in enumerate((file, file | {"stream": True}, {"validation": None})):
        seen: list[tuple[str, list[list[int]]]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nextn.MultiTokenModel, "forward", _spied(nextn.MultiTokenModel.forward, seen))
            train(Recipe(**few | change), tmp_path / f"out{place}", say=lambda _: None)
        ids = ids_of(attached["base"], "the cat sat on the log and the dog on the mat")
        evaluated = [row[: len(ids)] for mode, rows in seen if mode == "eval" for row in rows]
        assert bool(evaluated) == bool(change["validation"]) and all(row == ids for row in evaluated)
        assert all(row[: len(ids)] != ids for mode, rows in seen if mode == "train" for row in rows)
    held_out.write_text("text\nanother text\n")
    with pytest.raises(FormatError, match="other options or other data"):
        train(Recipe(**few | {"validation": str(held_out)}), tmp_path / "out0")
    shutil.copy(attached["data"][0], tmp_path / "copy.jsonl")
    for validation, message in (
        (attached["data"][0], "which is trained on: give other text, or a share"),
        (str(tmp_path / "copy.jsonl"), "which is trained on"),
        (str(tmp_path / "none.csv"), "There is no data file"),
    ):
        with pytest.raises(ValueError, match=message):
            train(Recipe(**few | {"validation": validation}), tmp_path / "other")


def ids_of(base: str, text: str) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(base)(text)["input_ids"]


def _spied(forward, seen):
    @functools.wraps(forward)  # Trainer reads the names of its arguments
    def spy(self, input_ids=None, *args, **kwargs):
        seen.append(("train" if self.training else "eval", input_ids.tolist()))
        return forward(self, input_ids, *args, **kwargs)

    return spy


@pytest.mark.parametrize("curriculum", ["forward", "reverse"])
def test_a_curriculum_always_trains_something(attached, tmp_path, curriculum):
    said = []
    train(Recipe(**attached, schedule={"curriculum": curriculum}, validation=None), tmp_path, say=said.append)
    first, last = (list(column.cells)[3] for column in table_of(said).columns[1::2])  # t+4
    assert (first == "–") == (curriculum == "forward") and (last == "–") == (curriculum == "reverse")


def test_a_streamed_training_that_was_cut_goes_on_to_the_same_end(tiny_base, text, tmp_path):
    whole = state(train(together(tiny_base, text, stream=True), tmp_path / "whole"))
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", cut / "checkpoint-4")
    resumed = train(together(tiny_base, text, stream=True), cut)
    assert_equal(state(resumed), whole, rtol=0, atol=1e-6)


def test_settings_that_are_equal_give_one_model(tiny_base, tmp_path):
    """All documents in each step: as one batch or accumulated, packed or each in a row of its own."""
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz ."
    lines = [json.dumps({"text": "".join(generator.choices(letters, k=30))}) for _ in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))

    def trained(name: str, length: int, rows: int, accumulated: int = 1) -> dict[str, torch.Tensor]:
        training = {
            "max_steps": 4,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": accumulated,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "bf16": False,
            "disable_tqdm": True,
        }
        command = ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / name), f"--set=length={length}"]
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump(
                {
                    "base": str(tiny_base),
                    "heads": {"n": 3, "recurrent": True, "freeze_trunk": False, "weights": {"preset": "deepseek"}},
                    "data": [str(tmp_path / "data.jsonl")],
                    "validation": None,
                    "training": training,
                }
            )
        )
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        heads = load_file(tmp_path / name / "nextn" / "heads.safetensors")
        return heads | load_file(tmp_path / name / "model.safetensors")

    whole = trained("whole", length=30, rows=8)
    # The order of sums differs, and Adam divides by small roots: equal to 1e-4 after four steps at 1e-3. The fit of the
    # start sees the same positions; blocks of other lengths bring them in another order.
    assert_equal(trained("accumulated", length=30, rows=4, accumulated=2), whole, rtol=0, atol=1e-4)
    assert_equal(trained("packed", length=60, rows=4), whole, rtol=0, atol=1e-4)
    assert_equal(trained("padded", length=40, rows=8), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None}, "give either base or scratch"),
        ({"scratch": SHAPE}, "give either base or scratch"),
        ({"tokenizer": "bytes"}, "tokenizer goes with scratch"),
        ({"lora": {"r": 2}}, "lora needs a base, and heads.freeze_trunk: false"),
        ({"heads": {"freeze_trunk": False}}, "weights leave the next token out"),
        ({"schedule": {"start": 0.5}}, "schedule.start goes with a trunk that is trained"),
        ({"schedule": {"phases": [{"weights": {"preset": "list", "values": [1.0]}}]}}, "1 entries, but n is 4"),
        ({"stream": True}, "stream needs training.max_steps"),
        ({"stream": True, "validation": 0.1, "training": {"max_steps": 1}}, "validation is a file where the data is"),
        ({"validation": 1}, "validation is a share from 0 to below 1, or a file"),
        ({"teacher_top_k": 8}, "teacher_top_k goes with heads.objective.follows"),
        ({"teacher_top_k": 8, "max_states_gb": 0}, "teacher_top_k is of what is kept on disk"),
        ({"data": []}, "data: List should have at least 1 item"),
        ({"heads": {"n": 1}}, "nothing would be trained"),
        ({"heads": {"n": 0}}, "n: must be at least 1"),
        ({"colour": "blue"}, "colour: Extra inputs are not permitted"),
        ({"schedule": {"phases": [{"until": 0.5, "weights": {}}, {"until": 0.4, "weights": {}}]}}, "until: rising"),
    ],
)
def test_recipes_that_cannot_work_are_refused_in_one_sentence(attached, change, message):
    with pytest.raises(ConfigError, match="The recipe is not usable: .*" + message):
        Recipe(**attached | change)


def test_errors_that_show_only_when_it_runs(attached, tmp_path):
    tuned = {"heads": {"freeze_trunk": False, "weights": {"preset": "gloeckle"}}, "vocabulary": None}
    (tmp_path / "x.csv").write_text("a,b")
    for place, (change, kind, message) in enumerate(
        (
            ({"training": {"max_stepz": 3}}, ConfigError, "training: .*max_stepz"),
            (
                {"lora": {"r": 2, "target_modules": ["lm_head"]}, **tuned},
                ConfigError,
                "lm_head has an adapter, but heads share",
            ),
            (
                {"lora": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}, **tuned},
                ConfigError,
                "modules_to_save",
            ),
            ({"lora": {"rank": 2}, **tuned}, ConfigError, "lora: .*rank"),
            ({"lora": {"r": 2, "target_modules": ["q_proj"]}, "compile": True, **tuned}, ConfigError, "compile does"),
            ({"data": [str(tmp_path / "x.csv")]}, DataError, "x.csv has the columns a, b; expected text"),
            ({"data": ["answers/none.jsonl"]}, DataError, "There is no data file answers/none.jsonl"),
            ({"length": 4096}, ConfigError, "the base reads 128 tokens"),
            ({"data": ["nowhere.jsonl"]}, DataError, "There is no data file nowhere.jsonl"),
            ({"validation": 0.001}, ConfigError, "no block can be held out"),
            ({"heads": None, "vocabulary": None}, (ConfigError, FormatError), "no heads"),
        )
    ):
        with pytest.raises(kind, match=message):
            train(Recipe(**attached | change), tmp_path / str(place))


def test_the_command_line(attached, tmp_path):
    recipe = {name: value for name, value in attached.items() if name not in ("base", "data")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"validation": 0.2}))
    command = ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"), "--base", attached["base"]]
    command += ["--data", attached["data"][0], "--set", "training.eval_steps=4", "--set", "training.learning_rate=1e-3"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "heads saved in" in done.output and "of held-out text, τ estimated on them" in " ".join(done.output.split())
    for change, message in (
        ("length=[", "the value is not YAML"),
        ("length", "no field=value"),
        ("vocabulary.x=1", "has no fields"),
    ):
        refused = CliRunner().invoke(app, [*command[:4], f"--set={change}"])
        assert refused.exit_code == 1 and message in " ".join(refused.output.split())
    (tmp_path / "broken.yaml").write_text("a: [")
    for path, message in (("broken.yaml", "is not YAML (line 1)"), ("none.yaml", "There is no recipe")):
        refused = CliRunner().invoke(app, ["train", str(tmp_path / path), "--out", str(tmp_path / "x")])
        assert refused.exit_code == 1 and message in " ".join(refused.output.split())


TINY_SHAPES = {"llama": SHAPE, "deepseek_v3": {**CONFIGS["deepseek_v3"]().to_diff_dict(), "num_hidden_layers": 3}}


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_runs_at_a_small_size(path, tiny_base, text, tmp_path):
    """All that a recipe says holds, but for sizes and paces."""
    stated = yaml.safe_load(path.read_text())
    small = {"length": 64, "data": [text]}
    training = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "warmup_steps": 0}
    small["training"] = stated["training"] | training | {"bf16": False, "disable_tqdm": True}
    if "scratch" in stated:
        tiny = TINY_SHAPES[stated["scratch"]["model_type"]]
        small["scratch"] = tiny | {"num_hidden_layers": tiny["num_hidden_layers"] + stated["heads"]["n"]}
        small["tokenizer"] = stated.get("tokenizer") or str(tiny_base)
    else:
        small["base"] = str(tiny_base)
    if "vocabulary" in stated:
        small["vocabulary"] = 32
    if "validation" in stated:
        small["validation"] = 0.2
    model = train(Recipe.read(path, small), tmp_path / "out")
    assert model.multi_token.n == stated["heads"]["n"]
    prompt = [5, 9, 12, 7]
    ((_, drafted),), ((_, alone),) = (model.engine(heads=heads).generate([prompt], 16) for heads in (None, 1))
    assert drafted.tokens == alone.tokens
    loaded = nextn.load(tmp_path / "out", base=model.base if model.multi_token.freeze_trunk else None)
    model.heads.to(loaded.trunk.dtype)  # heads of a frozen base are stored as it is, in bfloat16
    assert_equal(state(loaded.heads), state(model.heads), rtol=0, atol=0)


@pytest.mark.parametrize("trains", ["heads", "whole model"])
@pytest.mark.parametrize("name", ["nextn/config.json", "checkpoint-500/model.safetensors", "model.safetensors"])
def test_what_another_program_wrote_is_neither_overwritten_nor_removed(attached, tmp_path, name, trains):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("{}")
    together = {"freeze_trunk": False, "weights": {"preset": "deepseek"}}
    heads = attached["heads"] | (together if trains == "whole model" else {})
    recipe = Recipe(**attached | {"heads": heads})
    if (name, trains) == ("model.safetensors", "heads"):
        train(recipe, out, say=lambda _: None)  # heads may lie beside their base
        assert (out / "nextn" / "heads.safetensors").is_file()
    else:
        with pytest.raises(FormatError, match=f"holds {name.partition('/')[0]}, which is of no training"):
            train(recipe, out, say=lambda _: None)
        assert [str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()] == [name]
    assert (out / name).read_text() == "{}"


def test_one_training_at_a_time_writes_to_a_directory(attached, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out") as lock:
        content = json.loads(lock.path.read_text()) | {"host": "elsewhere"}
    lock.path.write_text(json.dumps(content))
    with pytest.raises(LockedError, match=r"in use by process \d+ on elsewhere"):
        train(Recipe(**attached), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["nextn.lock"]
    lock.path.unlink()
    train(Recipe(**attached), tmp_path / "out", say=lambda _: None)
    assert not lock.path.exists()
