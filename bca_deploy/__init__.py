"""Export bidirectional cross-attention from PyTorch to a validated ONNX bundle, and open it without PyTorch."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported on first use: opening a bundle must not import torch or onnx, and `bca --help` must not import numpy.
_PUBLIC = {
    "BcaError": "bca_deploy.errors",
    "Bundle": "bca_deploy.bundle",
    "build": "bca_deploy.building",
    "export": "bca_deploy.pipeline",
    "refit": "bca_deploy.refitting",
    "verify": "bca_deploy.verification",
}

__all__ = ["BcaError", "Bundle", "__version__", "build", "export", "refit", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bca_deploy' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)
