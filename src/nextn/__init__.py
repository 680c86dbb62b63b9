"""nextn: multi-token prediction for any Hugging Face causal language model."""

from nextn.config import MultiTokenConfig, OutputConfig, WeightsConfig
from nextn.decoding.generate import custom_generate
from nextn.decoding.sampling import Sampling
from nextn.decoding.tree import Tree
from nextn.formats.native import load
from nextn.model import MultiTokenModel, attach
from nextn.training import Calibration, Trainer

__all__ = [
    "Calibration",
    "MultiTokenConfig",
    "MultiTokenModel",
    "OutputConfig",
    "Sampling",
    "Trainer",
    "Tree",
    "WeightsConfig",
    "attach",
    "custom_generate",
    "load",
]
