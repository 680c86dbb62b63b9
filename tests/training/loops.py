"""One training, written with each of the loops that people use; `test_loops` compares their losses.

Run by torchrun, the loops train in several processes, with data parallelism or FSDP2:
    torchrun --nproc_per_node 2 tests/training/loops.py losses.json [--fsdp]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))  # of tests, for a process of torchrun

import nextn
from conftest import made_up_text, make_host
from fsdp_on_cpu import allow_fsdp

STEPS, BATCH, LENGTH = 20, 8, 24  # sequences in a step, whatever the number of micro-batches and processes
RATE = 1e-3
LAYERS = ["LlamaDecoderLayer"]
Batch = dict[str, Tensor]


def make_model(**config: Any) -> nextn.MultiTokenModel:
    """Trunk and heads, both trained, so that every parameter takes part in the comparison."""
    torch.manual_seed(3)
    together = {"freeze_trunk": False, "weights": {"preset": "deepseek"}}
    return nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3, recurrent=True, **together | config))


def make_rows() -> list[Batch]:
    """Two packed documents a row, with prompts that are not trained on; each row has another count of targets."""
    rows = []
    for place, ids in enumerate(made_up_text(STEPS * BATCH, LENGTH, seed=7)):
        second = 6 + place % 11
        labels = ids.clone()
        labels[: 1 + place % 5] = labels[second : second + 1 + place % 3] = -100
        positions = torch.cat([torch.arange(second), torch.arange(LENGTH - second)])
        rows.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    return rows


def processes() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def make_loader(accumulate: int) -> DataLoader[Batch]:
    rows: Any = make_rows()
    return DataLoader(rows, batch_size=BATCH // accumulate // processes()[1])


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE, weight_decay=0.0)


def count_targets(batches: list[Batch]) -> int:
    """The t+1 targets of some batches; those of all that a step reads are its `num_items_in_batch`."""
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def trainer_loop(
    trainer_class: type[transformers.Trainer], model: Any, accumulate: int = 1, fsdp: bool = False, **settings: Any
) -> list[float]:
    """The loss of each step under a Trainer."""
    _, world = processes()
    if fsdp:
        settings |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": LAYERS}}
    with tempfile.TemporaryDirectory() as directory:
        arguments = transformers.TrainingArguments(
            directory,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH // accumulate // world,
            gradient_accumulation_steps=accumulate,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        trainer: Any = trainer_class(model=model, args=arguments, train_dataset=make_rows())
        parts: list[Tensor] = []  # the log rounds
        step = trainer.training_step
        trainer.training_step = lambda *args: parts.append(step(*args)) or parts[-1]
        trainer.train()
    losses = torch.stack(parts).view(STEPS, accumulate).sum(1) / world  # Trainer scales them by the processes
    return summed(losses).tolist()


def accelerate_loop(model: Any, accumulate: int = 1, fsdp: bool = False) -> list[float]:
    """A plain loop with accelerate."""
    accelerator = accelerate.Accelerator(
        cpu=True,
        # Batches are read ahead: accelerate would take each micro-batch of the last step for the end of the data.
        gradient_accumulation_plugin=GradientAccumulationPlugin(accumulate, sync_with_dataloader=False),
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=LAYERS
        )
        if fsdp
        else None,
    )
    model.train()
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model), make_loader(accumulate))
    batches, losses = iter(loader), []
    for _ in range(STEPS):
        step = [next(batches) for _ in range(accumulate)]
        items = accelerator.gather(torch.tensor(count_targets(step))).sum()
        total = torch.zeros(())
        for batch in step:
            with accelerator.accumulate(model):
                loss = model(**batch, num_items_in_batch=items).loss
                # accelerate and data parallelism take means; the loss is a sum over all targets of the step
                accelerator.backward(loss * accumulate * accelerator.num_processes)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        losses.append(accelerator.reduce(total, "sum").item())
    return losses


def hand_loop(model: Any, accumulate: int = 1, fsdp: bool = False) -> list[float]:
    """A loop with nothing but PyTorch."""
    rank, world = processes()
    model.train()
    if fsdp:
        for part in (*model.base.model.layers, model.heads, model):
            fully_shard(part)
    elif world > 1:
        model = DistributedDataParallel(model)
    optimizer, losses, batches = make_optimizer(model), [], list(make_loader(accumulate))
    size = accumulate * world
    for start in range(0, len(batches), size):
        step, total = batches[start : start + size], torch.zeros(())
        items = count_targets(step)
        for batch in step[rank::world]:
            loss = model(**batch, num_items_in_batch=items).loss
            (loss * world).backward()  # data parallelism takes the mean over processes
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(summed(total).item())
    return losses


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


LOOPS: dict[str, Callable[..., list[float]]] = {
    "nextn": partial(trainer_loop, partial(nextn.Trainer, calibrate=False)),  # the others do not calibrate
    "stock": partial(trainer_loop, transformers.Trainer),
    "accelerate": accelerate_loop,
    "hand": hand_loop,
}


def main() -> None:
    """One of several processes: all loops, with two micro-batches a step; the first one writes their losses."""
    fsdp, losses = "--fsdp" in sys.argv, {}
    if fsdp:
        allow_fsdp()
    dist.init_process_group("gloo")
    for name, loop in LOOPS.items():
        model = make_model()
        losses[name] = loop(model, 2, fsdp)
        kinds = {isinstance(parameter.data, DTensor) for parameter in model.parameters()}
        assert kinds == {fsdp}, f"{name}: under FSDP2 parameters are distributed tensors, else they are not"
        AcceleratorState._reset_state(reset_partial_state=True)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
