"""Which learning rate do heads on a frozen model need, by width and by kind?

    python benchmarks/learning_rate.py MODEL --data answers.jsonl --out results.json
    python benchmarks/learning_rate.py MODEL --data answers.jsonl --heads '{kind: eagle3}' --rates 2e-4,5e-4,1e-3

Each rate trains the same calibrated heads for one epoch over the same blocks, in the same order and with the settings
of `nextn attach`, but without its guard. Held-out loss is measured before, halfway and at the end, on blocks from all
over the text. A rate that is there already in the results is not run again.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
import yaml
from rich.console import Console
from rich.table import Table
from torch.utils.data import default_collate

import nextn
from nextn.data import PackedBlocks, examples_of
from nextn.evaluation.report import machine
from nextn.files import replacing
from nextn.formats import native
from nextn.kept import KeptOutputs
from nextn.model import MultiTokenModel, attach
from nextn.recipe import Recipe, choose_vocabulary, hold_out

HELD_OUT = 4096  # tokens


def make_model(base: str, config: nextn.MultiTokenConfig, blocks: PackedBlocks, tokenizer: Any) -> MultiTokenModel:
    """New heads, calibrated and with their vocabulary chosen as `nextn attach` does."""
    torch.manual_seed(0)
    model = attach(native.load_base(base, torch.bfloat16), config)
    model.calibrate(blocks.batch(range(start, min(start + 4, len(blocks)))) for start in range(0, len(blocks), 4))
    if config.output.kind == "trimmed":
        choose_vocabulary(model, blocks, tokenizer, print)
    return model.train()


def train(model: MultiTokenModel, rate: float, data: Any, held_out: Any, recipe: Recipe) -> list[dict[str, Any]]:
    """The log of one training."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = recipe.arguments(Path(directory))
        arguments.learning_rate = rate
        trainer = nextn.Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            eval_dataset=held_out,
            calibrate=False,
            data_collator=default_collate,
        )
        before = trainer.evaluate()  # the log starts anew with train
        trainer.train()
        return [before, *trainer.state.log_history]


def main(
    base: Annotated[str, typer.Argument(help="A causal language model.")],
    data: Annotated[str, typer.Option(help="Text of the model's own, as `nextn attach` takes it.")],
    out: Annotated[Path, typer.Option(help="Where figures are written, added to those that are there.")],
    heads: Annotated[str, typer.Option(help="Fields of the heads' config, as YAML.")] = "{recurrent: true}",
    rates: Annotated[str, typer.Option(help="Peak learning rates, with commas between.")] = "2.5e-4,8e-4,2.5e-3",
    vocabulary: Annotated[int, typer.Option(help="Tokens that drafts can name; 0: all.")] = 8192,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 50_000,
    length: Annotated[int, typer.Option(help="Tokens in a block.")] = 512,
    batch: Annotated[int, typer.Option(help="Blocks in a batch.")] = 2,
) -> None:
    stated = {"n": 4} | yaml.safe_load(heads)
    recipe = Recipe(
        base=base,
        heads=stated,
        vocabulary=vocabulary or None,
        data=[data],
        length=length,
        training={
            "num_train_epochs": 1,
            "per_device_train_batch_size": batch,
            "save_strategy": "no",
            "eval_steps": 0.5,
        },
    )
    tokenizer = native.load_tokenizer(base)
    blocks = PackedBlocks(examples_of([data], tokenizer, length), length, pad_id=0)
    blocks = blocks.part(range(min(len(blocks), (tokens + HELD_OUT) // length)))
    training, held_out = hold_out(blocks, HELD_OUT // length)
    model = make_model(base, recipe.config(), training, tokenizer)
    start = {name: tensor.clone() for name, tensor in model.heads.state_dict().items()}
    results = json.loads(out.read_text()) if out.exists() else []
    with tempfile.TemporaryDirectory(dir=out.parent) as directory:
        kept: list[Any] = [training, held_out]
        if not model.heads.reads:
            kept = [KeptOutputs(part, model, 0, Path(directory)) for part in kept]
        for rate in map(float, rates.split(",")):
            row = {"base": Path(base).name, "width": model.trunk.width, "heads": stated, "rate": rate}
            if any(row.items() <= done.items() for done in results):
                continue
            model.heads.load_state_dict(start)
            transformers.set_seed(0)
            history = train(model, rate, *kept, recipe)
            losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
            norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
            tau = [entry["eval_tau"] for entry in history if "eval_tau" in entry]
            results.append(
                row
                | {"trained_tokens": training.trained_tokens, "blocks": len(training), "length": length, "batch": batch}
                | {"held_out_losses": losses, "taus": tau, "gradient_norms": norms, "machine": machine()}
            )
            with replacing(out) as part:
                part.write_text(json.dumps(results, indent=2) + "\n")
    Console().print(table(results))


def table(results: list[dict[str, Any]]) -> Table:
    rows = Table("base", "heads", "rate", "start", "half", "end", "τ: start", "end", title="Held-out loss, and τ")
    for row in results:
        kind = " ".join(f"{name}={value}" for name, value in row["heads"].items() if name != "n")
        losses = [f"{loss:.3f}" for loss in row["held_out_losses"]]
        taus = row["taus"][0], row["taus"][-1]
        rows.add_row(row["base"], kind, f"{row['rate']:.2g}", *losses, *(f"{tau:.2f}" for tau in taus))
    return rows


if __name__ == "__main__":
    typer.run(main)
