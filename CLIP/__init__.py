"""The frozen backbone and what is attached to it: `create_model`, the tokenizer and the adapters."""

from .adapter_shared import ADAPTERS, DualBranchAdapters
from .clip import FIDELITIES, PRETRAINS, create_model, weights_path
from .model import CLIP, ModelConfig, WeightsInfo, list_models
from .tokenizer import tokenize

__all__ = [
    "ADAPTERS",
    "CLIP",
    "FIDELITIES",
    "PRETRAINS",
    "DualBranchAdapters",
    "ModelConfig",
    "WeightsInfo",
    "create_model",
    "list_models",
    "tokenize",
    "weights_path",
]
