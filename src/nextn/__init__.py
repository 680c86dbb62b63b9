"""nextn: multi-token prediction for any Hugging Face causal language model."""

from nextn.config import MultiTokenConfig, OutputConfig, WeightsConfig
from nextn.formats.native import load
from nextn.model import MultiTokenModel, attach
from nextn.training import Trainer

__all__ = ["MultiTokenConfig", "MultiTokenModel", "OutputConfig", "Trainer", "WeightsConfig", "attach", "load"]
