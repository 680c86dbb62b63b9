"""What nextn adds to transformers.Trainer: our layout in checkpoints, and figures by depth in the log."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from nextn.config import ConfigError, MultiTokenConfig, OutputConfig
from nextn.data import PackedBlocks, load_examples
from nextn.formats import FormatError, native
from nextn.formats.bundled import sha256
from nextn.model import MultiTokenModel, MultiTokenOutput, attach
from nextn.output import TrimmedOutput, most_frequent
from nextn.trunk import Trunk


class Trainer(transformers.Trainer):
    """transformers.Trainer whose checkpoints hold the heads and whose resuming restores them.

    With a frozen trunk a checkpoint holds `nextn/` only, else the whole model in our layout. (The stock Trainer trains
    a MultiTokenModel as well, but resuming with it would silently leave the heads as they are.)
    """

    model: MultiTokenModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._depths: list[tuple[Tensor, Tensor]] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if isinstance(outputs, MultiTokenOutput) and model.training:
            assert outputs.depth_losses is not None and outputs.depth_accuracies is not None
            self._depths.append((outputs.depth_losses, outputs.depth_accuracies))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._depths and "loss" in logs:
            losses, accuracies = (
                torch.stack(figures).mean(dim=0).tolist() for figures in zip(*self._depths, strict=True)
            )
            self._depths.clear()
            for depth, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), start=1):
                if loss == loss:  # depths that were not computed are NaN
                    logs |= {f"loss_{depth}": round(loss, 4), f"accuracy_{depth}": round(accuracy, 4)}
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = output_dir or str(self.args.output_dir)
        if self.model.multi_token.freeze_trunk:
            native.save_heads(self.model, directory, base_hash=self._base_hash, tokenizer=self.processing_class)
        else:
            native.save(self.model, directory, self.processing_class)

    @cached_property
    def _base_hash(self) -> str:  # of a frozen base, for every checkpoint
        return native.hash_of(self.model.base)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = model or self.model
        if not model.multi_token.freeze_trunk:
            stored = native.load_base(resume_from_checkpoint, dtype=model.trunk.dtype)
            model.base.load_state_dict(stored.state_dict())
        native.load_heads(model, resume_from_checkpoint)


def last_checkpoint(directory: str | Path) -> str | None:
    """The newest whole checkpoint of a training directory; one that a kill cut short is passed over."""
    found = sorted(Path(directory).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    return next((str(path) for path in found if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:  # the Trainer writes its state after the model and the optimizer
        json.loads((checkpoint / "trainer_state.json").read_text())
        native.describe(checkpoint)
    except (OSError, ValueError):
        return False
    return (checkpoint / "nextn" / "heads.safetensors").is_file() and (checkpoint / "scheduler.pt").is_file()


class WithTrunkStates(Dataset):
    """Blocks together with the states of a frozen trunk, which are computed once and kept in a file.

    Args:
        blocks: the text.
        model: whose trunk is frozen; head 1 must have no weight, for its states are not kept.
        path: where the states go, [blocks, T, D] in the trunk's dtype; they are kept there for a resumed training.
    """

    def __init__(self, blocks: PackedBlocks, model: MultiTokenModel, path: Path) -> None:
        self.blocks, self.model = blocks, model
        shape = (len(blocks), blocks.length, model.trunk.width)
        self.states = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=model.trunk.dtype).view(
            shape
        )
        done = path.with_suffix(".done")  # one byte a block, set once its states are written
        self.done = torch.from_file(str(done), shared=True, size=len(blocks), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index]
        if not self.done[index]:
            parts = ("input_ids", "attention_mask", "position_ids")
            batch = {name: block[name][None].to(self.model.trunk.device) for name in parts}
            self.states[index] = self.model.trunk_states(**batch)[0]
            self.done[index] = 1
        return block | {"trunk_states": self.states[index]}

    @staticmethod
    def bytes_needed(blocks: PackedBlocks, model: MultiTokenModel) -> int:
        """The size of the file."""
        return len(blocks) * blocks.length * model.trunk.width * model.trunk.dtype.itemsize


@dataclass(frozen=True)
class AttachRecipe:
    """All that decides how heads are attached to a frozen model; the fields are the options of `nextn attach`."""

    base: str
    data: list[Path]
    out: Path
    n: int = 4
    heads: str = "recurrent"
    vocabulary: int = 8192
    epochs: float = 3.0
    learning_rate: float = 2.5e-3
    length: int = 512
    batch: int = 2
    save_steps: int = 250
    seed: int = 0
    max_states_gb: float = 4.0

    def config(self) -> MultiTokenConfig:
        """The heads that the recipe asks for."""
        output = OutputConfig(kind="trimmed", size=self.vocabulary) if self.vocabulary else OutputConfig()
        if self.heads == "parallel":
            return MultiTokenConfig(n=self.n, heads="parallel", output=output)
        return MultiTokenConfig(n=self.n, heads="sequential", recurrent=self.heads == "recurrent", output=output)


def attach_and_train(recipe: AttachRecipe, say: Callable[[str], None] = print) -> MultiTokenModel:
    """Attach heads to a frozen base and train them on a text; goes on from the last checkpoint in `recipe.out`.

    The trunk runs in bfloat16, the heads are float32 and compute in bfloat16; they are stored in bfloat16.
    """
    config = recipe.config()
    stated = _claimable(recipe)
    tokenizer = native.load_tokenizer(recipe.base)
    base = native.load_base(recipe.base, dtype=torch.bfloat16)
    if recipe.length > (context := Trunk(base).max_length):
        raise ConfigError(f"--length is {recipe.length}, but the base reads {context} tokens.")
    blocks = PackedBlocks(load_examples(recipe.data, tokenizer), recipe.length, tokenizer.pad_token_id or 0)
    say(f"{blocks.trained_tokens:,} trained tokens in {len(blocks):,} blocks of {recipe.length}")

    transformers.set_seed(recipe.seed)
    checkpoint = last_checkpoint(recipe.out)
    model = attach(base, config, calibration=None if checkpoint else blocks.batch(range(min(128, len(blocks)))))
    if isinstance(model.heads.output, TrimmedOutput):
        labels = torch.tensor(
            [label for block in blocks.blocks for _, labels in block for label in labels if label >= 0]
        )
        special = [token for token in tokenizer.all_special_ids if token < model.trunk.vocab_size]
        kept = most_frequent(labels, recipe.vocabulary, model.trunk.vocab_size, special)
        model.heads.output.keep(kept)
        covered = (model.heads.output.targets(labels) >= 0).float().mean().item()
        say(f"drafts can name {len(kept):,} tokens, {covered:.1%} of the text")
    if checkpoint:
        say(f"going on from {checkpoint}")
    (recipe.out / "recipe.json").write_text(stated)
    model.heads.float()
    dataset = _with_states(blocks, model, recipe, say)

    arguments = transformers.TrainingArguments(
        output_dir=str(recipe.out),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=20,
        max_grad_norm=1.0,
        weight_decay=0.01,
        adam_beta2=0.95,
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=10,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        seed=recipe.seed,
        report_to=[],
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=default_collate,  # blocks are of one length; the tokenizer's collator would take them apart
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    native.save_heads(model, recipe.out, base_name=recipe.base, dtype=torch.bfloat16, tokenizer=tokenizer)
    for leftover in recipe.out.glob("trunk_states.*"):
        leftover.unlink()
    say(f"heads saved in {recipe.out}")
    return model.eval()


def _claimable(recipe: AttachRecipe) -> str:
    """The recipe as JSON, the data by name and sha256; a directory in which another one was trained is refused.

    Raises:
        FormatError: where going on from what is there would mix two trainings.
    """
    path = native.writable(recipe.out) / "recipe.json"
    data = {str(file): sha256(file) for file in recipe.data if file.is_file()}
    stated = json.dumps({**asdict(recipe), "data": data, "out": "."}, indent=2) + "\n"
    if path.exists() and path.read_text() != stated:
        raise FormatError(
            f"{recipe.out} holds a training with other options or other data ({path}); choose another --out."
        )
    return stated


def _with_states(
    blocks: PackedBlocks, model: MultiTokenModel, recipe: AttachRecipe, say: Callable[[str], None]
) -> Dataset:
    """The blocks, with the trunk's states kept on disk where more than one pass would need them and they fit."""
    size = WithTrunkStates.bytes_needed(blocks, model) / 1e9
    if recipe.epochs <= 1 or size > recipe.max_states_gb:
        return blocks
    say(f"the trunk's states are kept in {recipe.out} while training, {size:.1f} GB")
    return WithTrunkStates(blocks, model, recipe.out / "trunk_states.bin")
