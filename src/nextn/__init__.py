"""nextn: multi-token prediction for any Hugging Face causal language model."""

from nextn.config import MultiTokenConfig, OutputConfig, WeightsConfig
from nextn.decoding.generate import custom_generate
from nextn.decoding.sampling import Sampling
from nextn.decoding.stats import Logprob, SpecDecodingStats
from nextn.decoding.tree import Tree
from nextn.formats.native import load, load_base, load_tokenizer
from nextn.model import MultiTokenModel, attach
from nextn.training import Calibration, Trainer

__all__ = [
    "Calibration",
    "Logprob",
    "MultiTokenConfig",
    "MultiTokenModel",
    "OutputConfig",
    "Sampling",
    "SpecDecodingStats",
    "Trainer",
    "Tree",
    "WeightsConfig",
    "attach",
    "custom_generate",
    "load",
    "load_base",
    "load_tokenizer",
]
