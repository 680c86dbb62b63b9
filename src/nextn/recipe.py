"""A training as a file: what is trained, on what, and how; and running it.

Three ways lie behind one command (`nextn train RECIPE.yaml`): from scratch (`scratch` names the shape of a plain
model), heads attached to a frozen model (`base`, `heads.freeze_trunk: true`), and both together
(`heads.freeze_trunk: false`, all weights or, with `lora`, adapters).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import transformers
import yaml
from accelerate.utils import broadcast_object_list
from pydantic import Field, model_validator
from rich.table import Table
from torch.utils.data import Dataset, default_collate
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy

from nextn.adapters import adapter_layers, add_adapters, merge_adapters
from nextn.config import ConfigError, MultiTokenConfig, ScheduleConfig, Strict, field_value
from nextn.data import DataError, PackedBlocks, StreamedBlocks, byte_tokenizer, check_ids, examples_of, reach
from nextn.decoding.compiled import CompileError, require_compiler
from nextn.evaluation.speedup import measure_speedup
from nextn.files import replacing, sha256
from nextn.formats import FormatError, native
from nextn.kept import KeptOutputs
from nextn.lock import FileLock
from nextn.model import MultiTokenModel, attach, check_n
from nextn.output import TrimmedOutput
from nextn.recipe_files import recipe_path
from nextn.scratch import from_scratch
from nextn.training import (
    Trainer,
    bar_with_time_left,
    is_finished,
    last_checkpoint,
    write_finished,
)
from nextn.trunk import context_length
from nextn.vocabulary import coverage, most_frequent

BYTES = "bytes"
AUTO = "auto"
WARMUP = 0.05  # of the steps
MANY_STEPS = 2000
DECODED_PROMPTS = 8  # held-out ones, at the end
EVALUATIONS = 10  # in a training, besides the one before the first step
VALIDATION_SHARE, MOST_VALIDATION_BLOCKS, LEAST_BLOCKS = 0.05, 32, 4  # where a recipe leaves it open
OF_TRAINING = {"weights", "objective", "state_noise", "freeze_trunk"}  # fields of the heads that leave them as they are

Say = Callable[[Any], Any]


class Recipe(Strict):
    """All that decides a training.

    base: the model to start from: a directory, a hub name or the bundled model. Heads that it has are trained on;
        `heads` may then change how they are trained (`OF_TRAINING`), and may be left out.
    scratch: or the config of a plain model in transformers' terms (`model_type`, `hidden_size`, …), to start from
        random weights. Its layers are those of the model that predicts one token; each parallel transformer head takes
        the place of one of them (Gloeckle et al.), so that both are equal in size.
    tokenizer: with `scratch`, a directory or hub name, or `bytes`.
    heads: what is predicted, by which heads; see `MultiTokenConfig`.
    vocabulary: short for a trimmed output of so many tokens. A trimmed output keeps the most frequent tokens of the
        data.
    data: files (.jsonl, .parquet, .csv, plain text) or datasets of the hub; see `nextn.data`.
    split: of datasets on the hub.
    stream: pack the text as it comes, for more than memory holds; needs `training.max_steps`.
    validation: what is held out: a share of the blocks, a file or dataset as in `data`, 0 for nothing, or `auto`: a
        twentieth, 32 blocks at most, and nothing of a stream or of very little text. Loss, accuracy and an estimate of
        τ on it are logged ten times; the guard reads them.
    guard: end with the state of the lowest held-out loss, and go back to it at half the learning rate where the loss
        rises; see `HeldOutGuard`.
    length: tokens in a packed block.
    schedule: see `ScheduleConfig`.
    lora: train adapters of the trunk rather than its weights: the arguments of `peft.LoraConfig`.
    max_states_gb: keep the states of a frozen trunk on disk while training, where more than one pass needs them and
        they take no more than this.
    teacher_top_k: where they are kept and heads follow the trunk's distribution: keep its k most probable tokens of
        each position with them, in place of making all logits anew for each depth in each epoch. The rest is left out.
    compile: let torch.compile make machine code of each layer, or with `heads` of those of the heads alone; half a
        minute at the start, and faster after that.
    seed: of the order of the data, and of random weights.
    training: arguments of `transformers.TrainingArguments`, over the defaults of `Recipe.arguments`. Without a
        `learning_rate` it is that of `default_learning_rate`.
    """

    what: ClassVar[str] = "recipe"
    base: str | None = None
    scratch: dict[str, Any] | None = None
    tokenizer: str | None = None
    heads: MultiTokenConfig | None = None
    vocabulary: int | None = Field(default=None, ge=1)
    data: list[str] = Field(min_length=1)
    split: str = "train"
    stream: bool = False
    validation: float | str | None = AUTO
    guard: bool = True
    length: int = Field(default=512, ge=2)
    schedule: ScheduleConfig = ScheduleConfig()
    lora: dict[str, Any] | None = None
    max_states_gb: float = Field(default=4.0, ge=0)
    teacher_top_k: int = Field(default=0, ge=0)
    compile: bool | Literal["heads"] = False
    seed: int = 0
    training: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fitting(self) -> Recipe:
        if (self.base is None) == (self.scratch is None):
            raise ValueError("give either base or scratch")
        if self.scratch is not None:
            if self.tokenizer is None or self.heads is None:
                raise ValueError("scratch needs a tokenizer and heads")
            if "model_type" not in self.scratch or "num_hidden_layers" not in self.scratch:
                raise ValueError("scratch needs model_type and num_hidden_layers")
            if self.heads.freeze_trunk:
                raise ValueError("scratch needs heads.freeze_trunk: false")
        elif self.tokenizer is not None:
            raise ValueError("tokenizer goes with scratch; a base brings its own")
        if self.lora is not None and (self.heads is None or self.heads.freeze_trunk or self.scratch is not None):
            raise ValueError("lora needs a base, and heads.freeze_trunk: false")
        if isinstance(self.validation, float) and not 0 <= self.validation < 1:
            raise ValueError("validation is a share from 0 to below 1, or a file")
        if self.stream and "max_steps" not in self.training:
            raise ValueError("stream needs training.max_steps")
        if self.stream and self.validation and not isinstance(self.validation, str):
            raise ValueError(
                "validation is a file where the data is streamed, or nothing: no share of it can be held out"
            )
        if self.heads is not None:
            for phase in self.schedule.phases:
                phase.weights.check_length(self.heads.n)
            if self.heads.freeze_trunk and self.schedule.start:
                raise ValueError("schedule.start goes with a trunk that is trained; else nothing is, before it")
        if self.teacher_top_k and (self.stream or not self.max_states_gb):
            raise ValueError("teacher_top_k is of what is kept on disk: it needs max_states_gb, and no stream")
        if self.teacher_top_k and self.heads is not None:
            if self.heads.objective.follows == "text":
                raise ValueError("teacher_top_k goes with heads.objective.follows kl, tv or lk")
            if not self.heads.freeze_trunk:
                raise ValueError("teacher_top_k goes with a frozen trunk")
        if self.vocabulary is not None and (self.heads is None or self.heads.output.kind != "shared"):
            raise ValueError("vocabulary goes with heads whose output is not stated otherwise")
        return self

    @property
    def validates_on_file(self) -> bool:
        return isinstance(self.validation, str) and self.validation != AUTO

    @classmethod
    def read(cls, path: str | Path, given: dict[str, Any] | None = None, changes: Sequence[str] = ()) -> Recipe:
        """A recipe from a YAML file, or one of those that ship, by its name.

        Args:
            given: fields that take the place of the file's.
            changes: `field=value` or `field.inner=value`, with YAML for the value.

        Raises:
            ConfigError: where the file is missing, is not YAML, or is not a recipe.
        """
        path = recipe_path(path)
        try:
            stated = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
        except yaml.YAMLError as error:
            where = getattr(error, "problem_mark", None)
            raise ConfigError(f"{path} is not YAML{f' (line {where.line + 1})' if where else ''}.") from None
        if not isinstance(stated, dict):
            raise ConfigError(f"{path} is not a recipe: expected fields such as base, heads and data.")
        stated |= given or {}
        for change in changes:
            _set(stated, change)
        return cls(**stated)

    def config(self) -> MultiTokenConfig:
        """The heads, with the output that `vocabulary` asks for."""
        assert self.heads is not None
        if self.vocabulary is None or self.heads.n == 1:
            return self.heads
        output = {"kind": "trimmed", "size": self.vocabulary, "own": self.heads.kind == "eagle3"}
        return MultiTokenConfig(**self.heads.model_dump() | {"output": output})

    def arguments(self, out: Path) -> transformers.TrainingArguments:
        """The arguments of transformers' trainer.

        Raises:
            ConfigError: for an argument that it does not know.
        """
        usual: dict[str, Any] = {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": WARMUP,
            "max_grad_norm": 1.0,
            "weight_decay": 0.01,
            "adam_beta2": 0.95,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "bf16": True,
            "use_cpu": not torch.accelerator.is_available(),
            "logging_steps": 10,
            "save_steps": 250,
            "save_total_limit": 2,
            "report_to": [],
        }
        if self.validation:
            usual |= {"eval_strategy": "steps", "eval_steps": 1 / EVALUATIONS}
        if self.training.get("load_best_model_at_end"):  # transformers wants both alike
            usual["eval_steps"] = self.training.get("save_steps", usual["save_steps"])
        fixed = {"output_dir": str(out), "seed": self.seed, "remove_unused_columns": False}
        stated = usual | {name: _number(value) for name, value in self.training.items()} | fixed
        if "lr_scheduler_type" in self.training:
            stated["lr_scheduler_kwargs"] = self.training.get("lr_scheduler_kwargs")
        try:
            return transformers.TrainingArguments(**stated)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"training: {str(error).removeprefix('TrainingArguments.__init__() ')}.") from None


def default_learning_rate(model: MultiTokenModel, recipe: Recipe) -> float:
    """The peak learning rate of a recipe that states none.

    For heads on a frozen trunk of width D it is 0.4 / D, at most 7e-4, and for kinds without calibration 1.4 / D, at
    most 2.5e-3: Adam's rate falls with the width as in muP (arXiv:2203.03466), and the factors come from
    `benchmarks/learning_rate.py`. A trunk that is trained too has the 2e-5 that is usual for fine-tuning (TRL),
    adapters of it 2e-4 (QLoRA, arXiv:2305.14314), and a model from random weights 1e-3 · 512 / D.
    """
    width = model.trunk.width
    if recipe.scratch is not None:
        return 1e-3 * 512 / width
    if not model.multi_token.freeze_trunk:
        return 2e-4 if adapter_layers(model.base) else 2e-5
    return min(7e-4, 0.4 / width) if model.heads.can_calibrate else min(2.5e-3, 1.4 / width)


def default_batch_size(blocks: PackedBlocks, arguments: transformers.TrainingArguments) -> int:
    """Blocks in a batch for a recipe that states none: 2, and more beyond `MANY_STEPS` steps, up to 32.

    The batch size that is efficient grows with the amount of data and hardly with the size of the model
    (arXiv:2410.21676).
    """
    if arguments.max_steps > 0:
        return 2
    in_a_step = arguments.world_size * arguments.gradient_accumulation_steps
    return min(32, max(2, round(arguments.num_train_epochs * len(blocks) / in_a_step / MANY_STEPS)))


def _number(value: Any) -> Any:
    """YAML takes 1e-4, without a point, for a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _set(stated: dict[str, Any], change: str) -> None:
    field, read = field_value(change)
    *outer, name = field.split(".")
    for part in outer:
        stated = stated.setdefault(part, {})
        if not isinstance(stated, dict):
            raise ConfigError(f"--set {change}: {part} has no fields.")
    stated[name] = read


def train(recipe: Recipe, out: str | Path, say: Say = print, trust_remote_code: bool = False) -> MultiTokenModel:
    """Run a recipe. Resumes from the last whole checkpoint in `out`; a finished training is not changed.

    A frozen trunk runs in bfloat16; all that is trained is float32 and computes in bfloat16. Heads of a frozen trunk
    are stored by themselves, in bfloat16 (under FSDP in float32); else the whole model is, in float32.

    Args:
        trust_remote_code: run the code that the base's repository brings. It is no field of the recipe, so that a
            recipe from elsewhere cannot ask for it.

    Returns:
        the trained model, in eval mode.

    Raises:
        LockedError: where another process writes to `out`.
    """
    out = native.writable(out)
    arguments = recipe.arguments(out)
    with nullcontext() if arguments.process_index else FileLock(out):  # one lock for all processes of a training
        return _train(recipe, out, arguments, say, trust_remote_code)


def _train(
    recipe: Recipe, out: Path, arguments: transformers.TrainingArguments, say: Say, trust_remote_code: bool
) -> MultiTokenModel:
    stated = _claimable(recipe, out)
    if arguments.process_index:  # one process speaks for all
        say = _nothing
    if is_finished(out):
        say(f"{out} holds this training, finished: nothing is changed")
        dtype = torch.bfloat16 if native.config_of(out).freeze_trunk else torch.float32
        return native.load(out, dtype=dtype, trust_remote_code=trust_remote_code)
    trained_on = None if recipe.scratch is not None else _trained_on(recipe)
    n = (trained_on or recipe.config()).n
    _check_sizes(recipe, n, trust_remote_code)
    tokenizer = _tokenizer(recipe, trained_on, trust_remote_code)
    blocks = _blocks(recipe, tokenizer)
    training, validation = _split(blocks, recipe, tokenizer, say)
    packed = training if isinstance(training, PackedBlocks) else None
    _check_targets(packed, validation, n, recipe.validates_on_file, say)
    if packed:
        say(f"{packed.trained_tokens:,} trained tokens in {len(packed):,} blocks of {recipe.length}")
    transformers.set_seed(recipe.seed)
    was_begun = any(out.glob("checkpoint-*"))
    (checkpoint,) = broadcast_object_list([None if arguments.process_index else last_checkpoint(out, say)])
    model = _model(recipe, trained_on, tokenizer, blocks, arguments.device, trust_remote_code)
    if validation is not None:
        _check_reads(model.base, validation)
    if model.multi_token.output.kind == "trimmed" and not trained_on:
        choose_vocabulary(model, packed, tokenizer, say)
    if recipe.compile:
        _compile(model, arguments, heads_only=recipe.compile == "heads")
    if checkpoint:
        say(f"going on from {checkpoint}")
    elif was_begun:
        say(f"no checkpoint in {out} is whole: training starts from the beginning")
    if not arguments.process_index:
        with replacing(out / "recipe.json") as part:
            part.write_text(stated)
    if packed and "per_device_train_batch_size" not in recipe.training:
        arguments.per_device_train_batch_size = default_batch_size(packed, arguments)
    if "learning_rate" not in recipe.training:
        arguments.learning_rate = default_learning_rate(model, recipe)
        say(f"learning rate {arguments.learning_rate:.2g} at its peak, for a model of width {model.trunk.width:,}")
    if validation is None:
        arguments.eval_strategy = IntervalStrategy.NO
    training, held_out = _with_outputs(training, validation, model, recipe, arguments, out, say)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=training,
        eval_dataset=held_out,
        guard=recipe.guard and validation is not None,
        calibrate=False,  # but below, and said
        data_collator=default_collate,  # blocks are of one length; the tokenizer's collator would take them apart
        processing_class=tokenizer,
        schedule=recipe.schedule,
    )
    if arguments.fsdp and not trainer.is_fsdp_enabled:  # accelerate goes on without a word, all weights in each process
        raise ConfigError("training.fsdp shards over several accelerators; here there are none: leave it out.")
    if not checkpoint and recipe.scratch is None and (positions := trainer.calibrate_heads()):
        say(f"heads calibrated on {positions:,} tokens")
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.guard and trainer.guard.best_step != trainer.state.global_step:
        say(f"the state of step {trainer.guard.best_step} is saved: its held-out loss is the lowest")
    if validation is not None:
        trainer.evaluate()
    base_name = native.base_name(recipe.base) if trained_on and recipe.base else recipe.base
    if recipe.lora is not None:
        merge_adapters(model.base)
    trainer.save_result(out, base_name=base_name)
    KeptOutputs.forget(out)
    if arguments.should_save:
        write_finished(out)
    say(summary(trainer.state.log_history, model.multi_token.n, "saved" if trainer.guard else "end"))
    say(f"{'heads' if model.multi_token.freeze_trunk else 'model'} saved in {out}")
    model.eval()
    if recipe.compile is True:
        say(f"nextn bench {out} measures what the heads are worth on this machine")
    elif validation is not None and model.multi_token.freeze_trunk and arguments.world_size == 1:
        report_speedup(native.load(out, model.base, model.trunk.dtype), validation, out, say)
    return model


def report_speedup(model: MultiTokenModel, held_out: PackedBlocks, out: Path, say: Say) -> None:
    """Decode a few held-out prompts, and say what the heads are worth on this machine and what to type next."""
    prompts = held_out.prompts(DECODED_PROMPTS)
    if not prompts:
        return
    with bar_with_time_left() as bar:
        task = bar.add_task("decoding held-out prompts", total=len(prompts))
        speedup = measure_speedup(model, prompts, advance=partial(bar.advance, task))
    if speedup is None:
        return
    say(speedup.table())
    dtype = str(model.trunk.dtype).removeprefix("torch.")
    say(
        f"A plain step took {1e3 * speedup.plain_seconds:.1f} ms, a step with all drafts "
        f"{speedup.step_time_ratio.cell()} times that ({torch.get_num_threads()} threads, {dtype}, not compiled)."
    )
    if speedup.is_worth_it:
        say(
            f"Worth it on this machine. Next: nextn generate {out} 'Your prompt', or nextn bench {out} for more figures"
        )
    else:
        say(
            "Not worth it on this machine yet: train on more text (nextn distill makes it from prompts), or longer "
            f"(--epochs). nextn bench {out} gives exact figures."
        )


def summary(history: list[dict[str, Any]], n: int, last: str = "end") -> Table:
    """Loss and accuracy by depth at the start and the end of a training, of held-out text where there is some.

    Args:
        last: what the last column is called.
    """
    held_out = [entry for entry in history if "eval_loss" in entry]
    if held_out:
        prefix, shown = "eval_", [held_out[0], held_out[-1]]
        names = [f"step {held_out[0]['step']}" if held_out[0]["step"] else "start", last]
        title = f"{held_out[-1].get('eval_tokens', 0):,.0f} tokens of held-out text"
        if "eval_tau" in held_out[-1]:
            title += f", τ estimated on them: {held_out[-1]['eval_tau']:.2f}"
    else:
        logged = [entry for entry in history if "loss" in entry]
        prefix, shown, title = "", logged[:1] + logged[1:][-1:], "loss and accuracy in training"
        names = [f"step {entry['step']}" for entry in shown]
    table = Table(title=title, title_justify="left")
    table.add_column("token")
    for name in names:
        table.add_column(name, justify="right")
        table.add_column("", justify="right")
    for depth in range(1, n + 1):
        cells = [
            (f"{entry[f'{prefix}loss_{depth}']:.3f}", f"{entry[f'{prefix}accuracy_{depth}']:.0%}")
            if f"{prefix}loss_{depth}" in entry
            else ("–", "–")
            for entry in shown
        ]
        table.add_row(f"t+{depth}", *(cell for pair in cells for cell in pair))
    table.add_row("all", *(cell for entry in shown for cell in (f"{entry[f'{prefix}loss']:.3f}", "")))
    return table


def _nothing(_message: Any) -> None:
    pass


def _claimable(recipe: Recipe, out: Path) -> str:
    """The recipe as JSON, the data by name and sha256; a directory in which another one was trained is refused.

    Raises:
        FormatError: where going on from what is there would mix two trainings, or overwrite what is of no training.
    """
    path = native.writable(out) / "recipe.json"
    hashes = {"data": _hashes(recipe.data)}
    if recipe.validates_on_file:
        hashes["validation"] = _hashes([str(recipe.validation)])
        same = ({digest or name for name, digest in part.items()} for part in hashes.values())
        if set.intersection(*same):
            raise ConfigError(f"validation is {recipe.validation}, which is trained on: give other text, or a share.")
    stated = json.dumps(recipe.model_dump() | hashes, indent=2) + "\n"
    if path.exists() and path.read_text() != stated:
        raise FormatError(
            f"{out} holds a training with other options or other data ({path}); choose another directory."
        )
    if not path.exists():
        _refuse_others(out, recipe.heads is None or not recipe.heads.freeze_trunk)
    return stated


def _hashes(sources: Sequence[str]) -> dict[str, str | None]:
    """The sha256 of each source that is a file."""
    return {source: sha256(Path(source)) if Path(source).is_file() else None for source in sources}


def _refuse_others(out: Path, whole_model: bool) -> None:
    """Refuse a directory of another program, or of another save, whose files a training would overwrite or remove.

    Args:
        whole_model: whether the training writes a model, and not its heads alone.

    Raises:
        FormatError: with the name of one of the files.
    """
    names = [native.EXTRA, *(["config.json", "*.safetensors"] if whole_model else [])]
    others = [file.name for name in names for file in out.glob(name)]
    others += [file.name for file in out.glob("checkpoint-*") if not native.has_heads(file)]
    if others:
        raise FormatError(
            f"{out} holds {min(others)}, which is of no training with this recipe and would be overwritten or removed; "
            "choose another directory."
        )


def _trained_on(recipe: Recipe) -> MultiTokenConfig | None:
    """The config of heads that the base has, changed as the recipe says; None where heads are to be attached.

    Raises:
        ConfigError: where there are none and the recipe states none, or states others.
    """
    assert recipe.base is not None
    directory = native.heads_directory(recipe.base) if recipe.heads is None else recipe.base
    stored = native.config_of(directory) if native.has_heads(directory) else None
    if stored is None or stored.n == 1:
        if recipe.heads is None:
            raise ConfigError(f"{recipe.base} has no heads; say under heads what is to be attached.")
        return None
    given = recipe.heads.model_fields_set if recipe.heads else set()
    others = [name for name in sorted(given - OF_TRAINING) if getattr(recipe.heads, name) != getattr(stored, name)]
    if recipe.vocabulary not in (None, stored.output.size):
        others.append("vocabulary")
    if others:
        raise ConfigError(
            f"{recipe.base} has heads with another {others[0]} than the recipe; leave it out to train on these, or "
            f"start from their base, {native.base_of(directory)}, to attach new ones."
        )
    changes = recipe.heads.model_dump(include=given & OF_TRAINING) if recipe.heads else {}
    return MultiTokenConfig(**stored.model_dump() | changes)


def _tokenizer(recipe: Recipe, trained_on: MultiTokenConfig | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if recipe.tokenizer == BYTES:
        return byte_tokenizer()
    name = recipe.base or recipe.tokenizer
    assert name is not None
    return (native.tokenizer_of if trained_on else native.load_tokenizer)(name, trust_remote_code)


def _check_sizes(recipe: Recipe, n: int, trust_remote_code: bool) -> None:
    """Refuse blocks in which depth n never has a target, or longer ones than the base reads, before data is read.

    Raises:
        ConfigError: with the sizes.
    """
    if recipe.length <= n:
        raise ConfigError(
            f"length is {recipe.length}, but n is {n}: a block of {recipe.length} tokens has no target t+{n}. Give a "
            f"length of at least {n + 1}, or a smaller n."
        )
    if recipe.base is not None:
        base = native.base_of(recipe.base) if native.has_heads(recipe.base) else recipe.base
        config = native.load_config(base, trust_remote_code).get_text_config(decoder=True)
        if getattr(config, "max_position_embeddings", None):
            check_n(n, config)
            _check_length(recipe.length, context_length(config))


def _check_targets(
    training: PackedBlocks | None, validation: PackedBlocks | None, n: int, on_file: bool, say: Say
) -> None:
    """Refuse text in which depth n has no target, and a validation file that is trained on; say what is unusual.

    Args:
        training: None where it is streamed.
        on_file: whether the validation data is a file of its own, rather than a share of the blocks.

    Raises:
        DataError: for such text.
    """
    if training is not None:
        depths = [reach(document, training.length) for document in training.documents]
        if max(depths) < n:
            raise DataError(
                f"The data has no target t+{n}: no text or answer ends more than {max(depths)} tokens after its "
                f"beginning. Give longer text, or an n of at most {max(depths)}."
            )
        if training.left_out:
            say(
                f"{training.left_out:,} records have no target in their first {training.length} tokens and are left out"
            )
        if short := sum(depth < n for depth in depths):
            say(f"{short:,} of {len(depths):,} documents are too short to have a target t+{n}")
    if validation is None:
        return
    deepest = max(reach(document, validation.length) for document in validation.documents)
    if deepest < n:
        say(f"the validation data has no target t+{deepest + 1} or further: it says nothing of these depths")
    if training is not None:
        known = {hash(tuple(ids)) for ids, _ in training.documents}
        seen = [hash(tuple(ids)) in known for ids, _ in validation.documents]
        if all(seen) and on_file:
            raise DataError("All of the validation data is trained on too: give other text, or validation: null.")
        if any(seen):
            say(f"{sum(seen):,} of {len(seen):,} documents of the validation data are trained on too")


def _blocks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PackedBlocks | StreamedBlocks:
    def examples() -> Any:
        return examples_of(recipe.data, tokenizer, recipe.length, recipe.split)

    if recipe.stream:  # a source without text would end the training when its turn comes
        for source in recipe.data:
            any(reach(made, recipe.length) for made in examples_of([source], tokenizer, recipe.length, recipe.split))
    pad = 0  # nothing reads padding, and a tokenizer's own padding token may be one that the model does not have
    return (
        StreamedBlocks(examples, recipe.length, pad) if recipe.stream else PackedBlocks(examples(), recipe.length, pad)
    )


def _model(
    recipe: Recipe,
    trained_on: MultiTokenConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    blocks: PackedBlocks | StreamedBlocks,
    device: torch.device,
    trust_remote_code: bool,
) -> MultiTokenModel:
    """The model to train, on the device, where calibrating it is fast.

    Args:
        trained_on: the config of heads that the base has.
        blocks: the text, whose tokens and length the base must have.
    """
    if recipe.scratch is not None:
        model = from_scratch(recipe.scratch, recipe.config(), tokenizer)
        _check_reads(model.base, blocks)
    else:
        config = trained_on or recipe.config()
        dtype = torch.bfloat16 if config.freeze_trunk else torch.float32
        assert recipe.base is not None
        if trained_on:
            model = native.load(recipe.base, None, dtype, config=trained_on, trust_remote_code=trust_remote_code)
            _check_reads(model.base, blocks)
        else:
            base: Any = native.load_base(recipe.base, dtype, trust_remote_code)
            _check_reads(base, blocks)
            model = attach(base.to(device), config)
    if not model.multi_token.freeze_trunk:  # saved with the ids of these tokens, the model could not be opened again
        special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        check_ids([token for token in special if token is not None], model.trunk.vocab_size)
    if recipe.lora is not None:
        add_adapters(model.base, recipe.lora)
    model.check_trainable()
    return model.train() if trained_on else model


def _check_reads(base: PreTrainedModel, blocks: PackedBlocks | StreamedBlocks) -> None:
    """Refuse blocks that are longer than a model's context, or have tokens that it does not have."""
    _check_length(blocks.length, context_length(base.get_decoder().config))
    embedding: Any = base.get_input_embeddings()
    blocks.check_tokens(len(embedding.weight))


def _check_length(length: int, context: int) -> None:
    if length > context:
        raise ConfigError(f"length is {length}, but the base reads {context} tokens: give a smaller length.")


def _compile(model: MultiTokenModel, arguments: transformers.TrainingArguments, heads_only: bool) -> None:
    """Compile the layers.

    Raises:
        ConfigError: where that cannot work, or was never seen to.
    """
    if arguments.fsdp or adapter_layers(model.base):
        raise ConfigError("compile does not go with fsdp or lora yet; leave one of them out.")
    if arguments.device.type == "cpu":
        try:
            require_compiler()
        except CompileError as error:
            raise ConfigError(f"compile: {error}.") from None
    model.compile_layers(heads_only)


def choose_vocabulary(
    model: MultiTokenModel, blocks: PackedBlocks | None, tokenizer: PreTrainedTokenizerBase, say: Say
) -> None:
    """Let a trimmed output keep the most frequent tokens of the blocks, and the tokenizer's special ones."""
    if blocks is None:
        raise ConfigError(
            "A trimmed output keeps the most frequent tokens of the data, which stream does not hold; leave one "
            "of them out."
        )
    counts = torch.bincount(blocks.labels, minlength=model.trunk.vocab_size)
    special = [token for token in tokenizer.all_special_ids if token < model.trunk.vocab_size]
    kept = most_frequent(counts, model.heads.output.size(model.trunk), always=special)
    for output in model.heads.output.parts():
        assert isinstance(output, TrimmedOutput)
        output.keep(kept, model.heads.start_table(model.trunk))
    say(f"drafts can name {len(kept):,} tokens, {coverage(counts, kept):.1%} of the text")


def _split(
    blocks: PackedBlocks | StreamedBlocks, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, say: Say
) -> tuple[Any, PackedBlocks | None]:
    """The blocks to train on, and those held out: of a source of their own, or evenly from all over."""
    if recipe.validates_on_file:
        examples = examples_of([str(recipe.validation)], tokenizer, recipe.length, recipe.split)
        return blocks, PackedBlocks(examples, recipe.length, blocks.pad_id)
    if not recipe.validation or not isinstance(blocks, PackedBlocks):
        return blocks, None
    if recipe.validation == AUTO:
        count = min(max(1, round(VALIDATION_SHARE * len(blocks))), MOST_VALIDATION_BLOCKS)
        if len(blocks) < LEAST_BLOCKS:
            say(f"{len(blocks)} blocks are too few to hold one out: what is saved is not checked on held-out text")
            return blocks, None
    elif not (count := min(round(float(recipe.validation) * len(blocks)), len(blocks) - 1)):
        raise ConfigError(
            f"validation is {recipe.validation}, but the data makes {len(blocks)} blocks: no block can be held out."
        )
    return hold_out(blocks, count)


def hold_out(blocks: PackedBlocks, count: int) -> tuple[PackedBlocks, PackedBlocks]:
    """The blocks to train on, and `count` blocks from all over the text to measure on."""
    held_out = {(2 * index + 1) * len(blocks) // (2 * count) for index in range(count)}
    kept = [index for index in range(len(blocks)) if index not in held_out]
    return blocks.part(kept), blocks.part(sorted(held_out))


def _with_outputs(
    training: Any,
    validation: PackedBlocks | None,
    model: MultiTokenModel,
    recipe: Recipe,
    arguments: transformers.TrainingArguments,
    out: Path,
    say: Say,
) -> tuple[Dataset, Dataset | None]:
    """The blocks of training and validation; with a frozen trunk's outputs on disk, where they are read more than once
    and can be kept."""
    if not model.multi_token.freeze_trunk:
        return training, validation
    unused = "; teacher_top_k is not used, heads follow the whole distribution" if recipe.teacher_top_k else ""
    reread = isinstance(training, PackedBlocks) and _passes(training, arguments) > 1
    parts = [*([training] if reread else []), *([validation] if validation else [])]
    if unused and isinstance(training, PackedBlocks) and not reread:
        say(f"the text is read once{unused}")
    if not parts:
        return training, validation
    follows = model.multi_token.objective.follows
    top_k = 0 if follows == "text" else recipe.teacher_top_k
    size = sum(KeptOutputs.bytes_needed(part, model, top_k) for part in parts)
    why_not = {
        "head 1 has a weight": bool(model.weights[0]),
        "the heads read its keys": bool(model.heads.reads),
        f"{follows} needs its last state, and the heads read another; teacher_top_k can be kept": follows != "text"
        and model.heads.tap != "post_norm"
        and not top_k,
        "they would be split over processes": bool(arguments.fsdp) or arguments.world_size > 1,
        "dataloader_num_workers is set": arguments.dataloader_num_workers > 0,
        f"its outputs take {size / 1e9:.1f} GB, over max_states_gb": size > recipe.max_states_gb * 1e9,
        f"its outputs take {size / 1e9:.1f} GB, more than the disk has free": size - KeptOutputs.bytes_there(out)
        > shutil.disk_usage(out).free,
    }
    if reasons := [reason for reason, holds in why_not.items() if holds]:
        if reread:
            say(f"the trunk runs in every epoch: {reasons[0]}{unused}")
        return training, validation
    say(f"the trunk's outputs are kept in {out} while training, {size / 1e9:.1f} GB")
    kept = [KeptOutputs(part, model, top_k, out) for part in parts]
    with bar_with_time_left() as bar:
        for part in kept:
            part.fill(bar)
    return kept[0] if reread else training, kept[-1] if validation else None


def _passes(blocks: PackedBlocks, arguments: transformers.TrainingArguments) -> float:
    """How often a training reads its blocks."""
    rows = arguments.max_steps * arguments.train_batch_size * arguments.gradient_accumulation_steps
    return rows / len(blocks) if arguments.max_steps > 0 else arguments.num_train_epochs
