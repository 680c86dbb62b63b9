"""The command line with FSDP2 on CPUs, over gloo. PyTorch can do that; accelerate turns it on for accelerators only."""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from nextn import training
from nextn.cli import main

begin, save_model = PartialState.__init__, training.Trainer.save_model


def as_on_accelerators(self: PartialState, *args: Any, **kwargs: Any) -> None:
    begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def telling(self: training.Trainer, *args: Any, **kwargs: Any) -> None:
    """Say what parameters are: under FSDP2, distributed tensors."""
    print("parameters are", type(next(self.model.heads.parameters()).data).__name__, flush=True)
    save_model(self, *args, **kwargs)


def allow_fsdp() -> None:
    """Let accelerate turn FSDP on in this process."""
    PartialState.__init__ = as_on_accelerators


if __name__ == "__main__":
    if "--set=training.fsdp=true" in sys.argv:
        allow_fsdp()
    training.Trainer.save_model = telling
    main()
