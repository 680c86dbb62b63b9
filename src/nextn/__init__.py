"""nextn: multi-token prediction for any Hugging Face causal language model."""

from nextn.config import MultiTokenConfig, OutputConfig, WeightsConfig
from nextn.formats.native import load
from nextn.model import MultiTokenModel, attach

__all__ = ["MultiTokenConfig", "MultiTokenModel", "OutputConfig", "WeightsConfig", "attach", "load"]
