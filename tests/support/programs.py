"""Models as torch.export.save writes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from support.models import Kind
from torch import Tensor, nn

AUTO = torch.export.Dim.AUTO


def saved(
    model: nn.Module, inputs: Mapping[str, Tensor], dynamic: Mapping[str, Any] | None, path: Path, layers: Sequence[str]
) -> Path:
    """Save a model, the calls of these layers kept."""
    exported = torch.export.export(
        model, (), dict(inputs), dynamic_shapes=dynamic, preserve_module_call_signature=tuple(layers)
    )
    torch.export.save(exported, path)
    return path


def saved_kind(kind: Kind, path: Path) -> Path:
    """Save a kind of model with its layers kept and every named axis dynamic."""
    dynamic = {name: {at: AUTO for at, axis in enumerate(axes) if axis} for name, axes in kind.axes.items()}
    return saved(kind.make(), kind.pair()[0], dynamic, path, kind.layers)
