"""What a model is given and what comes out, by name: samples bound to forward's arguments, results as named tensors."""

import dataclasses
import inspect
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bca_deploy.errors import InputError, nearest
from bca_deploy.tracing.attention import ZerosWithoutKeys

#: Tensors by the names of forward's arguments, on the CPU.
Sample = dict[str, Tensor]

_DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.bool: torch.bool,
    torch.int64: torch.int64,
    torch.int32: torch.int32,
}
_ALLOWED = f"allowed: dense tensors of {', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}"


def named_sample(model: nn.Module, given: Mapping[str, Any] | Sequence[Any]) -> Sample:
    """Return a sample's tensors by the names of forward's arguments; floats are float32.

    Args:
        model: whose forward takes them.
        given: a mapping by forward's argument names, or the arguments in order; what is None is left out.

    Raises:
        InputError: forward has no such argument, needs one that is not there, or a value is no dense tensor.
    """
    taken = _parameters(model)
    if isinstance(given, Mapping):
        named = dict(given)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        named = dict(zip(taken, given, strict=False))
        if len(given) > len(taken):
            raise InputError(f"a sample has {len(given)} inputs, and forward takes {len(taken)}: {', '.join(taken)}")
    else:
        raise InputError(f"a sample is a {type(given).__name__}; give a dict by forward's argument names, or a tuple in order")
    _check_names(model, named, taken)
    return {name: _tensor(name, named[name]) for name in _ordered(named, taken) if named[name] is not None}


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    everything = inspect.signature(model.forward).parameters
    return {n: p for n, p in everything.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _check_names(model: nn.Module, named: Mapping[str, Any], taken: Mapping[str, inspect.Parameter]) -> None:
    everything = inspect.signature(model.forward).parameters.values()
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in everything)
    for name in named:
        if name not in taken and not open_ended:
            raise InputError(
                f"a sample has {name!r}, which forward does not take{nearest(name, taken)}; it takes "
                f"{', '.join(taken) or 'nothing'}"
            )
    for name, parameter in taken.items():
        if parameter.default is parameter.empty and named.get(name) is None:
            raise InputError(f"a sample lacks {name}, which forward needs; it has {', '.join(named) or 'nothing'}")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise InputError(f"forward takes {name} by position alone; let it have a name (no '/' in its signature)")


def _ordered(named: Mapping[str, Any], taken: Mapping[str, Any]) -> list[str]:
    """In forward's order, then what it takes by ``**kwargs``."""
    return [*(name for name in taken if name in named), *(name for name in named if name not in taken)]


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray | np.generic):
        value = _of_array(name, value)
    if not isinstance(value, Tensor):
        raise InputError(
            f"the sample's {name} is a {type(value).__name__}; inputs are tensors: fix other arguments with a wrapper "
            "module, or by a default in forward"
        )
    if value.is_complex():
        raise InputError(f"the sample's {name} is complex; give its real and imaginary parts, as torch.view_as_real does")
    if value.dtype not in _DTYPES or value.layout != torch.strided:
        raise InputError(f"the sample's {name} is {value.dtype}, {value.layout}; {_ALLOWED}")
    found = value.detach().cpu().to(_DTYPES[value.dtype]).clone()
    if found.is_floating_point() and not found.isfinite().all():  # what is drawn like it would be NaN, and nothing judged
        raise InputError(f"the sample's {name} holds NaN or infinity in float32; give one of finite numbers")
    return found


def _of_array(name: str, value: NDArray[Any] | np.generic) -> Tensor:
    array = np.array(value)
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:  # objects, strings, the other order of bytes
        raise InputError(f"the sample's {name} is an array of {array.dtype}; {_ALLOWED}") from error


def named_outputs(result: Any, inputs: Container[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of a result by name: keys and fields, ``output_0`` and on for what stands in order.

    What is no tensor (None, numbers, strings) is left out; ``output`` is the name of a single tensor.

    Args:
        result: what a model returns.
        inputs: names that its inputs have; an output that shares one gets ``_out`` behind it.

    Raises:
        InputError: two have one name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in _leaves(result, ""):
        if name in found:
            raise InputError(f"two outputs are called {name}; give their keys names that differ in letters and numbers")
        found[name] = tensor
    return {_free(name, inputs, found): tensor for name, tensor in found.items()}


def _free(name: str, inputs: Container[str], outputs: Container[str]) -> str:
    """Return an output's name, or one like it that neither an input nor another output has."""
    found = name
    while found in inputs or (found != name and found in outputs):
        found += "_out"
    return found


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path or "output", tree
        return
    for key, value in _children(tree):
        name = f"{path}_{key}" if path else key if key.isidentifier() else f"output_{key}"
        yield from _leaves(value, name)


def _children(tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):  # transformers' outputs are too
        return ((re.sub(r"\W", "_", str(key)), value) for key, value in tree.items())
    if hasattr(tree, "_fields"):
        return iter(zip(tree._fields, tree, strict=True))
    if isinstance(tree, list | tuple):
        return ((str(index), value) for index, value in enumerate(tree))
    if dataclasses.is_dataclass(tree):
        return ((f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree))
    return iter(())


class _Root(nn.Module):
    """A model whose forward is to be given: torch.export names inputs by its signature."""

    def __init__(self, model: nn.Module, taps: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.taps = taps  # copied together with what fills it: torch.export works on a copy


def rooted(
    model: nn.Module, names: Sequence[str], taps: dict[str, Tensor], inside: torch.dtype, edge: torch.dtype
) -> nn.Module:
    """Return the model under a forward of exactly these named inputs, which returns its tensors as a flat tuple.

    Args:
        model: to be called by these names.
        names: of the inputs.
        taps: filled while the model runs; what is in it then comes out after the model's own.
        inside: the dtype that the model takes floats in.
        edge: the dtype of floats at the edges.
    """

    def forward(self: _Root, **inputs: Tensor) -> tuple[Tensor, ...]:
        self.taps.clear()
        with ZerosWithoutKeys():
            own = named_outputs(self.model(**{name: cast(t, inside) for name, t in inputs.items()}))
        # A copy, as the exporter gives an input that comes out the output's name.
        made = (t.clone() if any(t is given for given in inputs.values()) else t for t in (*own.values(), *self.taps.values()))
        return tuple(cast(t, edge) for t in made)

    kinds = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    kinds += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    forward.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
    root: nn.Module = type("Root", (_Root,), {"forward": forward})(model, taps)
    return root.eval()


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a floating-point tensor in this dtype, and any other as it is."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
