"""A whole model from the command line: made by the user's own code, its weights from a checkpoint. Runs that code.

A ``.pt2`` file has none: what it holds is read.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bca_deploy.errors import CheckpointError, InputError, first_line, nearest
from bca_deploy.layers.stored.places import candidates, dotted, plain, say_choice
from bca_deploy.layers.stored.weight_files import read
from bca_deploy.programs import read as program

_SHOWN = 6


def make(place: str, checkpoint: Path | None = None, prefix: str = "") -> nn.Module:
    """Return the module that a factory makes, or that stands there.

    Args:
        place: ``pkg.module:factory`` or ``path/to/file.py:factory``; a factory is called without arguments. Or a ``.pt2`` file.
        checkpoint: loaded into it, as :func:`load_into` does.
        prefix: where the model is inside a bigger checkpoint.

    Raises:
        InputError: it is written otherwise, cannot be imported, raises, or makes no module.
        CheckpointError: as for :func:`load_into`.
    """
    found = program.read(Path(place)) if place.endswith(".pt2") else _made(place)
    if checkpoint is not None:
        load_into(found, checkpoint, prefix)
    return found


def _made(place: str) -> nn.Module:
    where, colon, name = place.rpartition(":")
    if not (colon and where and name):
        raise InputError(f"--model {place!r}: give pkg.module:factory, or path/to/file.py:factory, or a .pt2 file")
    code = _imported(where)
    if not hasattr(code, name):
        raise InputError(f"--model {place}: {where} has no {name}{nearest(name, vars(code))}")
    found = getattr(code, name)
    if not isinstance(found, nn.Module):
        found = _called(place, found)
    if not isinstance(found, nn.Module):
        raise InputError(f"--model {place}: it gives a {type(found).__name__}; a torch.nn.Module is needed")
    return found


def _imported(where: str) -> ModuleType:
    try:
        return _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except InputError:
        raise
    except SystemExit as error:  # a script that reads its own arguments does
        raise InputError(
            f"--model: {where} ends the process when it is imported (exit code {error.code}); let what it runs stand under "
            'if __name__ == "__main__"'
        ) from error
    except Exception as error:  # the user's code raises what it likes
        raise InputError(f"--model: {where} cannot be imported: {type(error).__name__}: {first_line(error)}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"--model: {path} does not exist or is not a file; check the path")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # noqa: S101  (a .py file always has one)
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    # What stands beside the file is its own to import, as when Python runs it.
    if str(path.parent.resolve()) not in sys.path:
        sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    return module


def _called(place: str, factory: Any) -> Any:
    if not callable(factory):
        raise InputError(f"--model {place}: it is a {type(factory).__name__}; give a function without arguments, or a module")
    try:
        return factory()
    except Exception as error:
        raise InputError(
            f"--model {place}: calling it without arguments raised {type(error).__name__}: {first_line(error)}; a factory "
            "takes none"
        ) from error


def load_into(model: nn.Module, path: Path, prefix: str = "") -> None:
    """Load a checkpoint into a model, every key of it.

    Args:
        model: takes the weights.
        path: as :func:`bca_deploy.layers.stored.weight_files.read` takes it.
        prefix: where the model is inside a bigger state dict; ``model`` and ``state_dict`` in front may be left out.

    Raises:
        CheckpointError: it cannot be read, lacks a key, has one too many, or another shape.
    """
    model.load_state_dict(fitting(model.state_dict(), path, prefix, type(model).__name__))


def fitting(wanted: Mapping[str, torch.Tensor], path: Path, prefix: str, model: str) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors where they are those of a state dict: the same keys, each of the same shape.

    Args:
        wanted: the state dict.
        path: as for :func:`load_into`, with its errors.
        prefix: as for :func:`load_into`.
        model: the name of its class.
    """
    state = {plain(name): tensor for name, tensor in read(path).items()}
    fits = {place: _inside(state, place) for place in candidates(state, dotted(prefix))}
    nearest_one = max(fits, key=lambda place: len(wanted.keys() & fits[place].keys()))
    place = next((place for place, inside in fits.items() if not _problems(wanted, inside)), nearest_one)
    if problems := _problems(wanted, fits[place]):
        raise CheckpointError(f"{path} is not of this {model}: {'; '.join(problems)}; check --model and --prefix")
    if place != dotted(prefix):
        say_choice(place, _others(wanted, state, place, dotted(prefix)))
    return fits[place]


def _inside(state: Mapping[str, torch.Tensor], place: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(place): tensor for name, tensor in state.items() if name.startswith(place)}


def _others(wanted: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], place: str, prefix: str) -> list[str]:
    """Return where else the model's weights stand."""
    first = next(iter(wanted), "")
    found = [name.removesuffix(first) for name in state if name.endswith(f"{prefix}{first}")]
    return [other for other in found if other != place and not _problems(wanted, _inside(state, other))]


def _problems(wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    absent, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    other = [name for name, tensor in wanted.items() if name in given and given[name].shape != tensor.shape]
    found = [f"missing key {name}{nearest(name, unknown)}" for name in absent[:_SHOWN]]
    found += [f"unknown key {name}" for name in unknown[:_SHOWN]]
    found += [f"{n} has shape {list(given[n].shape)}, needs {list(wanted[n].shape)}" for n in other[:_SHOWN]]
    more = len(absent) + len(unknown) + len(other) - len(found)
    return [*found, f"and {more} more"] if more > 0 else found
