"""A model run in PyTorch at any precision, its layers' calls watched: the float64 truth, and what stands beside it."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bca_deploy.errors import InputError, first_line
from bca_deploy.layers.in_order import InOrder
from bca_deploy.parity.truth import WEIGHTLESS, live_rows, true_outputs
from bca_deploy.spec import INPUT_NAMES, OUTPUT_NAMES, Bias, Interface
from bca_deploy.whole.find import Found
from bca_deploy.whole.samples import named_outputs
from bca_deploy.whole.swap import tap_name

Arrays = dict[str, NDArray[Any]]

_SMALL = {torch.float32, torch.float16, torch.bfloat16}
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


class AllDouble(TorchFunctionMode):
    """While this is on, a model that casts by itself stays in float64: casts go there, and new tensors begin there."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Turn what asks for a smaller float into float64; everything else runs as it is."""
        if func in _CASTS:
            return args[0].double()
        result = func(*map(_wide, args), **{name: _wide(value) for name, value in (kwargs or {}).items()})
        # Made of no tensor, as torch.zeros(3) is: nothing in the call says that it is to be wide.
        made = isinstance(result, Tensor) and result.dtype in _SMALL and not any(isinstance(arg, Tensor) for arg in args)
        return result.double() if made else result


class BiasApart(TorchFunctionMode):
    """While this is on, linear layers add their bias to a product that is rounded, as a graph's MatMul and Add do.

    PyTorch on CPU rounds once; its other kernels, and engines, do either.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the one function."""
        kwargs = kwargs or {}
        return _linear(*args, **kwargs) if func is functional.linear else func(*args, **kwargs)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = functional.linear(x, weight)
    return product if bias is None else product + bias


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _SMALL else value


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Attributes:
        path: of the layer.
        number: of the call, of this layer and from 0.
        given: tensors by the layer's names.
        outputs: both, by name.
    """

    path: str
    number: int
    given: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def results(self) -> Arrays:
        """Return the outputs, floats as float64."""
        return {name: _array(t) for name, t in self.outputs.items()}

    def tapped(self, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        """Return what is given for its outputs under their names as taps."""
        return {tap_name(self.path, self.number, name): array for name, array in arrays.items()}

    def arrays(self) -> Arrays:
        """Return the inputs as the parity of the bare layer takes them: masks over all positions."""
        x, context = self.given["x"], self.given["context"]
        full = {"mask": x.shape[:2], "context_mask": context.shape[:2]}
        return {name: (t.expand(full[name]) if name in full else t).numpy() for name, t in self.given.items()}

    def largest_logit(self, layer: nn.Module, weightless: float = np.inf) -> float:
        """Return the largest live |logit|; with ``weightless`` of those alone that come so near to their row's maximum.

        Args:
            layer: the float64 reference.
            weightless: logits so far below weigh nothing.
        """
        bias: Bias = "batch" if "rel_pos_bias" in self.given else "none"
        interface = Interface("mask" in self.given, "context_mask" in self.given, bias)
        return true_outputs(layer, self.arrays(), interface, weightless)[1]


@dataclass(frozen=True)
class Evaluation:
    """What a model made of some inputs.

    Attributes:
        outputs: its own, by name; floats as float64.
        calls: of its layers, in order.
    """

    outputs: Arrays
    calls: tuple[LayerCall, ...]

    def with_taps(self) -> Arrays:
        """Return the outputs, and those of each call of a layer by their names as taps."""
        found = dict(self.outputs)
        for call in self.calls:
            found |= call.tapped(call.results())
        return found


class Evaluator:
    """A copy of a model at one precision.

    Args:
        model: from :func:`bca_deploy.whole.swap.plain_copy`, its weights rounded.
        founds: its layers.
        dtype: what it runs in.
    """

    def __init__(self, model: nn.Module, founds: Sequence[Found], dtype: torch.dtype) -> None:
        self._model, self._dtype = copy.deepcopy(model).to(dtype), dtype
        self._calls: list[LayerCall] = []
        for found in founds:
            layer = self._model.get_submodule(found.path)
            layer.register_forward_hook(self._watch(found, layer), with_kwargs=True)
        # PyTorch's fast path of an encoder gives NaN where an item is all padding; only its slow one can have gradients.
        slow = any(isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention) for module in self._model.modules())
        self._gradients = torch.enable_grad if slow else torch.no_grad

    def run_as_usual(self, inputs: Mapping[str, NDArray[Any]]) -> Evaluation:
        """Run the model without gradients, as users do: an encoder then takes PyTorch's fast path."""
        return self._run(inputs, None, torch.no_grad) if self._gradients is torch.enable_grad else self.run(inputs)

    def run_with_bias_apart(self, inputs: Mapping[str, NDArray[Any]]) -> Evaluation:
        """Run the model as :class:`BiasApart` says."""
        with BiasApart():
            return self.run(inputs)

    def run(self, inputs: Mapping[str, NDArray[Any]], order: int | None = None) -> Evaluation:
        """Run the model.

        Args:
            inputs: by forward's argument names.
            order: None for PyTorch eager, else that of :class:`bca_deploy.layers.in_order.InOrder`.

        Raises:
            InputError: PyTorch itself refuses these inputs.
        """
        return self._run(inputs, order, self._gradients)

    def _run(self, inputs: Mapping[str, NDArray[Any]], order: int | None, gradients: Callable[[], Any]) -> Evaluation:
        self._calls.clear()
        tensors = {name: self._tensor(array) for name, array in inputs.items()}
        try:
            with gradients(), self._mode(order):
                outputs = named_outputs(self._model(**tensors), inputs)
        except Exception as error:  # a user's model raises what it likes
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
            raise InputError(
                f"the model itself refuses {shapes} in {str(self._dtype).removeprefix('torch.')}: {type(error).__name__}: "
                f"{first_line(error)}; declare dims that it takes, or mend it"
            ) from error
        return Evaluation({name: _array(t) for name, t in outputs.items()}, tuple(self._calls))

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.array(array))  # a copy: models may work in place
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    @contextlib.contextmanager
    def _mode(self, order: int | None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._dtype == torch.float64:
                stack.enter_context(AllDouble())
            if order is not None:
                stack.enter_context(InOrder(order))
            yield

    def _watch(self, found: Found, layer: nn.Module) -> Callable[..., None]:
        forward = inspect.signature(layer.forward)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
            given = found.call.given(forward, args, kwargs)
            tensors = {name: given[name].detach().clone() for name in INPUT_NAMES if isinstance(given.get(name), Tensor)}
            both = zip(OUTPUT_NAMES, found.call.outputs(outputs)[:2], strict=False)
            results = {name: t.detach().clone() for name, t in both}
            number = sum(call.path == found.path for call in self._calls)
            self._calls.append(LayerCall(found.path, number, tensors, results))

        return hook


def _array(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def live_of(evaluation: Evaluation) -> Arrays:
    """Return for every output and every tap where its rows are live: the model's own everywhere."""
    found: Arrays = {name: np.ones(a.shape, dtype=bool) for name, a in evaluation.outputs.items()}
    for call in evaluation.calls:
        found |= call.tapped(live_rows(call.arrays(), call.results()))
    return found


def largest_logit(evaluation: Evaluation, layers: Mapping[str, nn.Module]) -> float:
    """Return the largest live |logit| that carries weight in any call; ``layers`` are float64 references by path."""
    return max((call.largest_logit(layers[call.path], WEIGHTLESS) for call in evaluation.calls), default=0.0)
