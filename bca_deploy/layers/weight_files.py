"""From a file to names and tensors, whatever wraps them. No code is ever run from a checkpoint."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bca_deploy.errors import CheckpointError, first_line
from bca_deploy.layers.isolation import no_library_warnings

State = dict[str, Tensor]

_WRAPPERS = ("state_dict", "model_state_dict", "model")


def read(path: Path) -> State:
    """Read every tensor of a checkpoint file as it stands, wrappers included.

    Raises:
        CheckpointError: missing, truncated, holding pickled code, or not a checkpoint.
    """
    try:
        there = path.is_file()
    except OSError as error:  # a directory on the way, or the name itself
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}; check the path") from error
    if not there:
        raise CheckpointError(f"checkpoint {path} does not exist; give the path of a .pt, .pth or .safetensors file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pt", ".pth"):
        return _flatten(_read_torch(path), path)
    raise CheckpointError(f"checkpoint {path}: suffix {path.suffix!r} is not known; allowed are .pt, .pth and .safetensors")


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} is not a readable safetensors file: {error}; save it again") from error


def _read_torch(path: Path) -> Any:
    try:
        with no_library_warnings():  # about the pickle protocol of what is no pickle
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} holds pickled code or is no checkpoint, and code is never run from a checkpoint; "
            "save tensors only: torch.save(module.state_dict(), path)"
        ) from error
    except Exception as error:  # a damaged file fails anywhere in the unpickler: IndexError, struct.error, AssertionError
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({first_line(error)}); it may be truncated: copy or save it again"
        ) from error


def _flatten(content: Any, path: Path) -> State:
    """Unwrap ``{"state_dict": ...}`` and the like down to names and tensors."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, not a state dict of named tensors")
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return _flatten(content[wrapper], path)
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"checkpoint {path} holds no tensors; its keys are {sorted(map(str, content))[:8]}")
    return tensors
