"""Does predicting eight bytes make a small model from scratch better or worse, and how far does it draft?

    python benchmarks/from_scratch_bytes.py --data enwik8 --minutes 60        # some 10M parameters, on two cores
    python benchmarks/from_scratch_bytes.py --data enwik8 --steps 4 --eval-bytes 8192   # does it run?

Two models of the same size, one that predicts the next byte and one that predicts n (Gloeckle et al.: parallel heads
that come off the trunk, and an unembedding each, which adds some parameters), see the same batches in turns of ten
steps, so that whatever else the machine does hits both. Both get the same number of steps (equal tokens); at equal
time, the n-byte model is read where it stood when it had used as much time as the other one in all. The last tenth of
the file is for evaluation: bits per byte of head 1, accuracy by depth, and τ of greedy decoding.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from nextn.config import MultiTokenConfig
from nextn.data import byte_tokenizer
from nextn.evaluation.acceptance import Acceptance
from nextn.evaluation.report import machine, percent
from nextn.model import MultiTokenModel
from nextn.scratch import from_scratch

TURN = 10  # steps that one model takes before the other one does
PLAIN = {"heads": "parallel", "head": "linear", "n": 2, "weights": {"preset": "list", "values": [1.0, 0.0]}}


@dataclass
class Contender:
    """A model in training, the time of its steps, and what it was worth on the way (steps, bits per byte)."""

    model: MultiTokenModel
    optimizer: torch.optim.Optimizer
    times: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def timed(self) -> list[tuple[float, int, float]]:
        """The curve with seconds, all by the one median of a step."""
        return [(statistics.median(self.times) * steps, steps, bits) for steps, bits in self.curve]

    @property
    def seconds(self) -> float:
        """The median of a step, as often as there were steps: what else the machine did now and then does not count."""
        return statistics.median(self.times) * len(self.times)


def contender(heads: dict[str, Any], layers: int, width: int, rate: float) -> Contender:
    torch.manual_seed(0)
    shape = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    model = from_scratch(shape, MultiTokenConfig(**heads, freeze_trunk=False), byte_tokenizer())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Contender(model, torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.1))


def step(each: Contender, ids: Tensor, rate: float) -> None:
    start = time.perf_counter()
    for group in each.optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = each.model(ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(each.model.parameters(), 1.0)
    each.optimizer.step()
    each.optimizer.zero_grad(set_to_none=True)
    each.times.append(time.perf_counter() - start)


def crops(text: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(text) - length, (rows,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts]).long()


@torch.no_grad()
def evaluated(model: MultiTokenModel, text: Tensor, length: int) -> tuple[float, list[float]]:
    """Bits per byte of head 1, and accuracy by depth, over blocks of a text."""
    model.eval()
    blocks = text[: len(text) // length * length].view(-1, length).long().split(16)
    losses, accuracies = [], []
    for ids in blocks:
        with torch.autocast(ids.device.type, torch.bfloat16):
            output = model(ids, labels=ids)
        losses.append(output.depth_losses[0].item() * len(ids))
        accuracies.append(output.depth_accuracies * len(ids))
    model.train()
    rows = sum(len(ids) for ids in blocks)
    return sum(losses) / rows / math.log(2), (torch.stack(accuracies).sum(dim=0) / rows).tolist()


def main(
    data: Annotated[Path, typer.Option(help="A text file, such as enwik8.")],
    n: Annotated[int, typer.Option(help="Bytes predicted.")] = 8,
    minutes: Annotated[float, typer.Option(help="For both together; sets the steps from the first turns.")] = 60.0,
    steps: Annotated[int | None, typer.Option(help="So many steps each, whatever time they take.")] = None,
    layers: Annotated[int, typer.Option(help="L, heads included.")] = 12,
    width: Annotated[int, typer.Option(help="D.")] = 256,
    rows: Annotated[int, typer.Option(help="Crops in a batch.")] = 8,
    length: Annotated[int, typer.Option(help="Bytes in a crop.")] = 256,
    rate: Annotated[float, typer.Option(help="Peak learning rate, cosine to 3 percent.")] = 1e-3,
    eval_bytes: Annotated[int, typer.Option(help="Bytes to evaluate on.")] = 131_072,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option()] = Path("benchmarks/results/from_scratch_bytes.json"),
) -> None:
    raw = torch.frombuffer(bytearray(data.read_bytes()), dtype=torch.uint8)
    text, held_out = raw[: len(raw) * 9 // 10], raw[len(raw) * 9 // 10 :][:eval_bytes].to(device)
    heads = {"heads": "parallel", "n": n, "weights": {"preset": "gloeckle"}, "output": {"kind": "separate"}}
    contenders = {"n = 1": contender(PLAIN, layers, width, rate), f"n = {n}": contender(heads, layers, width, rate)}
    for each in contenders.values():
        each.model.to(device)
    generator, done, begun = torch.Generator().manual_seed(0), 0, time.perf_counter()
    total = steps or 10**9
    with Progress() as bar:
        task = bar.add_task("training", total=steps)
        while done < total:
            turn = [crops(text, rows, length, generator).to(device) for _ in range(min(TURN, total - done))]
            for each in contenders.values():
                for place, ids in enumerate(turn):
                    now = done + place
                    progress = min(1.0, now / total)
                    step(
                        each,
                        ids,
                        rate * min(1, (now + 1) / 100) * (0.03 + 0.97 * (1 + math.cos(math.pi * progress)) / 2),
                    )
            done += len(turn)
            if steps is None and done == 3 * TURN:  # kernels are warm: how many steps fit
                spent = time.perf_counter() - begun
                total = max(done, round((minutes * 60 - spent) / (spent / done) * 0.95) + done)
                bar.update(task, total=total)
            bar.update(task, completed=done)
            if done % (20 * TURN) == 0 or done >= total:
                for each in contenders.values():
                    each.curve.append((done, evaluated(each.model, held_out, length)[0]))
                _write(out, contenders, None)
    found = {name: _result(each, held_out, length) for name, each in contenders.items()}
    plain, ours = contenders.values()
    found["equal_time"] = {"seconds": plain.seconds, "bits_per_byte": _at(ours.timed, plain.seconds)}
    _show(found, done * rows * length)
    settings = {"layers": layers, "width": width, "rows": rows, "length": length, "rate": rate, "steps": done}
    _write(out, contenders, found | {"settings": settings | {"device": device, "data": data.name}})


def _result(each: Contender, held_out: Tensor, length: int) -> dict[str, Any]:
    bits, accuracies = evaluated(each.model, held_out, length)
    model = each.model.eval()
    plain = model.weights[1] == 0
    prompts = [block.tolist() for block in held_out[: 32 * 256].view(32, 256)]
    engine = model.engine(rows=32, heads=1 if plain else None, stop_tokens=[])
    acceptance = Acceptance.of([result for _, result in engine.generate(prompts, 128)], engine.n)
    used = model.base.parameters() if plain else model.parameters()
    return {
        "parameters": sum(parameter.numel() for parameter in used),
        "seconds": each.seconds,
        "bits_per_byte": bits,
        "accuracy_by_depth": [None if math.isnan(share) else share for share in accuracies],
        "tau": acceptance.tau,
        "cumulative_acceptance": acceptance.cumulative,
    }


def _at(curve: list[tuple[float, int, float]], seconds: float) -> float | None:
    """Bits per byte at a time, between the two nearest points; None before the first one."""
    for (t0, _, b0), (t1, _, b1) in itertools.pairwise(curve):
        if t0 <= seconds <= t1:
            return b0 + (b1 - b0) * (seconds - t0) / (t1 - t0)
    return curve[-1][2] if curve and seconds >= curve[-1][0] else None


def _show(found: dict[str, Any], tokens: int) -> None:
    table = Table(title=f"{tokens:,} bytes of training each", title_justify="left")
    for column in ("", "parameters", "seconds", "bits per byte", "accuracy by depth", "τ", "drafts that stand"):
        table.add_column(column, justify="right")
    for name, row in found.items():
        if name != "equal_time":
            table.add_row(
                name,
                f"{row['parameters']:,}",
                f"{row['seconds']:.0f}",
                f"{row['bits_per_byte']:.3f}",
                percent([share for share in row["accuracy_by_depth"] if share is not None]),
                f"{row['tau']:.2f}",
                percent(row["cumulative_acceptance"]),
            )
    console = Console()
    console.print(table)
    at = found["equal_time"]
    if at["bits_per_byte"] is not None:
        console.print(f"at equal time ({at['seconds']:.0f} s): {at['bits_per_byte']:.3f} bits per byte with heads")


def _write(out: Path, contenders: dict[str, Contender], found: dict[str, Any] | None) -> None:
    curves = {name: each.timed for name, each in contenders.items()}
    out.write_text(json.dumps((found or {}) | {"curves": curves, "machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
