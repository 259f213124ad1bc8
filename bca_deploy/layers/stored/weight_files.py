"""From a file to names and tensors, as they stand: containers become prefixes. No code is ever run from a checkpoint."""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bca_deploy.errors import CheckpointError, first_line
from bca_deploy.layers.isolation import no_library_warnings

State = dict[str, Tensor]

_INDEX = ".index.json"
# A dict may be inside itself, as pickles go.
_DEEPEST = 32
# What a file begins with, what it is then, and what to do.
_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer and not the weights; run git lfs pull"),
    (b"<", "a web page or XML and not the weights; download the file itself"),
    (b"\x89HDF", "an HDF5 file, as Keras writes; a PyTorch state dict is needed"),
    (b"\x1f\x8b", "a gzip file; unpack it"),
    (b"GGUF", "a GGUF file, whose weights are quantised; take the original weights"),
    (b"\x80", "a pickle that torch.save has not written whole; save it again: torch.save(module.state_dict(), path)"),
)
_SAFETENSORS = "a safetensors file; give it the suffix .safetensors"
_TORCHSCRIPT = 'TorchScript; take its weights out: torch.save(torch.jit.load(path).state_dict(), "weights.pt")'
_PROGRAM = 'an exported program; take its weights out: torch.save(torch.export.load(path).state_dict, "weights.pt")'


def read(path: Path) -> State:
    """Read every tensor of a checkpoint; one in ``{"generator": {"ema": ...}}`` is called ``generator.ema.<name>``.

    Args:
        path: ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` as torch.save writes them, tensors only; ``.safetensors``; the
            ``.index.json`` of a checkpoint in several files, or a directory that holds one of these. Suffixes in any case.

    Raises:
        CheckpointError: missing, truncated, holding pickled code, or not a checkpoint; the message says what it is.
    """
    found = _in_directory(path) if _is_directory(path) else path
    if found.name.lower().endswith(_INDEX):
        return _read_shards(found)
    reader = _READERS.get(found.suffix.lower())
    if reader is None:
        raise CheckpointError(f"checkpoint {path}: suffix {path.suffix!r} is not known; allowed are {_ALLOWED}")
    return reader(found)


def _is_directory(path: Path) -> bool:
    try:
        if path.is_dir():
            return True
        there = path.is_file()
    except OSError as error:  # a directory on the way, or the name itself
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}; check the path") from error
    if not there:
        raise CheckpointError(f"checkpoint {path} does not exist; give the path of a checkpoint: {_ALLOWED}")
    return False


def _in_directory(path: Path) -> Path:
    """Return the index of a checkpoint in several files, or else the one file of weights."""
    try:
        names = sorted(place.name for place in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}; check the path") from error
    found = [name for name in names if name.lower().endswith(_INDEX)]
    found = found or [name for name in names if Path(name).suffix.lower() in _READERS]
    if len(found) != 1:
        here = f"{len(found)}: {', '.join(found[:8])}" if found else "none"
        raise CheckpointError(f"checkpoint {path} is a directory with {here} to choose from; give one file of weights")
    return path / found[0]


def _read_shards(index: Path) -> State:
    files = _weight_map(index)
    state: State = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name or name.lower().endswith(_INDEX):
            raise CheckpointError(f"checkpoint {index} names the file {name!r}; its files must stand beside it")
        state |= read(index.parent / name)
    absent = sorted(set(files) - set(state))
    if absent:
        raise CheckpointError(f"checkpoint {index}: {absent[0]} is not in {files[absent[0]]}; copy all of its files again")
    return state


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {index} is not a readable index: {first_line(error)}; copy it again") from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(f"checkpoint {index} is no index of weights: it has no weight_map of names and files")
    return files


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            aliases = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        told = _told(path) or f"not a readable safetensors file: {first_line(error)}; save it again"
        raise CheckpointError(f"checkpoint {path} is {told}") from error
    # save_model writes a weight with two names once, and the other name into the header.
    return state | {name: state[kept] for name, kept in aliases.items() if kept in state and name not in state}


def _read_torch(path: Path) -> State:
    try:
        with no_library_warnings():  # about the pickle protocol of what is no pickle
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere in the unpickler: IndexError, struct.error, AssertionError
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise CheckpointError(
                f"checkpoint {path} holds pickled code ({refused[1]}), and code is never run from a checkpoint; save tensors "
                "only: torch.save(module.state_dict(), path). If you trust the file, do it where that class can be imported: "
                "torch.load(path, weights_only=False) gives the module, or a dict that holds its state dict"
            ) from error
        told = _told(path)
        if told:
            raise CheckpointError(f"checkpoint {path} is {told}") from error
        reason = "it is no file of torch.save" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({reason}); it may be truncated: copy or save it again"
        ) from error
    return _flat(content, path)


def _told(path: Path) -> str | None:
    """Return what a file is that the reader of its suffix cannot read, and what to do; None where nothing shows it."""
    if zipfile.is_zipfile(path):
        return _told_zip(path)
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return None
    if not start:
        return "empty; copy or save it again"
    if start[8:9] == b"{" and path.suffix.lower() != ".safetensors":
        return _SAFETENSORS
    return next((told for beginning, told in _BEGINNINGS if start.lstrip().startswith(beginning)), None)


def _told_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError):
        return None
    if "archive_format" in names:
        return _PROGRAM
    if "constants.pkl" in names:
        return _TORCHSCRIPT
    if "data.pkl" in names:
        return "a file of torch.save; give it the suffix .pt" if path.suffix.lower() == ".safetensors" else None
    arrays = any(name.endswith(".npy") for name in names)
    return f"{'numpy arrays' if arrays else 'a zip archive'} and no file of torch.save; give the weights as a state dict"


_READERS: dict[str, Callable[[Path], State]] = {
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin"), _read_torch),
    ".safetensors": _read_safetensors,
}
_ALLOWED = f"{', '.join(_READERS)}, the {_INDEX} of several, or a directory with one of these"


def _flat(content: Any, path: Path) -> State:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, not a state dict of named tensors")
    leaves = list(_leaves(content, "", path))
    state: State = {}
    for name, value in leaves:
        if isinstance(value, Tensor):
            if name in state:
                raise CheckpointError(f"checkpoint {path} has two tensors called {name}; save the state dict alone")
            state[name] = value
    if not state:
        raise CheckpointError(f"checkpoint {path} holds no tensors; its keys are {sorted(name for name, _ in leaves)[:8]}")
    return state


def _leaves(content: Any, name: str, path: Path, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > _DEEPEST:
        raise CheckpointError(f"checkpoint {path}: {name[:80]} is nested too deep; save the state dict alone")
    if isinstance(content, Mapping):
        items = list(content.items())
    elif isinstance(content, list | tuple):
        items = list(enumerate(content))
    else:
        yield name, content
        return
    for key, value in items:
        yield from _leaves(value, f"{name}.{key}" if name else str(key), path, depth + 1)
