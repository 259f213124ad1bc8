"""A copy of the model in which every proven layer has given its place to its lowered form, called just as it was."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bca_deploy.errors import ExportError, InputError, first_line
from bca_deploy.layers.lowered_model import DTYPES, LoweredModel, lower
from bca_deploy.spec import INPUT_NAMES, OUTPUT_NAMES, Precision, Runtime
from bca_deploy.whole.calls import unwrapped
from bca_deploy.whole.find import Found
from bca_deploy.whole.proof import pinned
from bca_deploy.whole.uses import Use


@dataclass
class Taps:
    """What the stand-ins gave, in the order of their calls, while a model ran.

    Attributes:
        tensors: by name: path, number of the call, output.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, path: str, outputs: Sequence[Tensor]) -> None:
        """Keep the outputs of one call."""
        number = sum(name.startswith(f"{path}/") for name in self.tensors) // 2
        self.tensors |= {tap_name(path, number, name): t for name, t in zip(OUTPUT_NAMES, outputs[:2], strict=False)}


def tap_name(path: str, number: int, output: str) -> str:
    """Return the name of an output of a layer's call."""
    return f"{path}/{number}/{output}"


class StandIn(nn.Module):
    """What takes a layer's place: the same call, in its own argument names, and the same results."""

    def __init__(self, found: Found, original: nn.Module, lowered: LoweredModel, taps: Taps) -> None:
        super().__init__()
        self.lowered = lowered
        self._signature = inspect.signature(original.forward)
        self._path, self._spec, self._call, self._taps = found.path, found.checkpoint.spec, found.call, taps
        # In a list: it is no submodule, so that its weights are not in the file. What reads them from outside finds them.
        self.__dict__["_original"] = [original]

    def __getattr__(self, name: str) -> Any:
        """Give what the original has, where this has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run as the original does."""
        call, given = self._call, self._call.given(self._signature, args, kwargs)
        tensors = {name: _like(name, given[name], self.lowered.edge) for name in INPUT_NAMES if given.get(name) is not None}
        out, context_out, *maps = self.lowered(**tensors)
        self._taps.add(self._path, (out, context_out))
        asked = bool(given.get("return_attn")) and self._spec.depth is None  # the transformer ignores it
        shown = tuple(maps) if asked and maps else call.no_maps(tensors["x"], tensors["context"], self._spec.heads, asked)
        return call.returned((out, context_out, *shown))


def _like(name: str, value: Tensor, edge: torch.dtype) -> Tensor:
    """Return masks as they are, and the rest in the layer's dtype; autocast may have made it another."""
    return value if value.dtype == torch.bool else value.to(edge)


@dataclass(frozen=True)
class Swapped:
    """A model ready to be traced.

    Attributes:
        model: the copy, in eval mode.
        taps: what its stand-ins gave in the latest run.
        paths: of its layers.
    """

    model: nn.Module
    taps: Taps
    paths: tuple[str, ...]

    def check_called(self) -> None:
        """Refuse a layer that the model did not call when it ran.

        Raises:
            ExportError: naming it: what runs in its place is not what was proven.
        """
        called = {name.rsplit("/", 2)[0] for name in self.taps.tensors}
        silent = [path for path in self.paths if path not in called]
        if silent:
            raise ExportError(
                f"{silent[0] or 'the model'} was found and proven, and forward never called it with these samples; give "
                f"samples that use it, take it out, or leave it as it is: --keep-literal {silent[0]}"
            )


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU, in eval mode and float32, without the wrappers that go on calling what they wrapped.

    Raises:
        InputError: it holds something that cannot be copied.
    """
    copied = unwrapped(_copied(unwrapped(model)))
    for parent in list(copied.modules()):
        for name, child in list(parent._modules.items()):  # an object may have two names
            if child is not None and (inner := unwrapped(child)) is not child:
                setattr(parent, name, inner)
    return pinned(copied.cpu().float().eval())


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a lock, a file, a tensor with a history
        raise InputError(
            f"the model cannot be copied: {first_line(error)}; keep what is no module or tensor outside of it, and merge "
            "weights that are computed (parametrisations)"
        ) from error


def swap(model: nn.Module, founds: Sequence[Found], uses: Mapping[str, Use], precision: Precision, runtime: Runtime) -> Swapped:
    """Return a copy of the model with its layers lowered.

    Args:
        model: from :func:`plain_copy`.
        founds: its layers.
        uses: of each, by path, from :func:`bca_deploy.whole.uses.uses_of`.
        precision: of weights and activations, the rest of the model's too.
        runtime: as for :func:`bca_deploy.layers.lowered_model.lower`.
    """
    copied, taps = copy.deepcopy(model).to(DTYPES[precision]), Taps()
    for found in founds:
        original = copied.get_submodule(found.path)
        stand_in = StandIn(found, original, lowered_form(found, uses[found.path], precision, runtime), taps).eval()
        copied = stand_in if not found.path else _replaced(copied, original, stand_in)
    return Swapped(copied, taps, tuple(found.path for found in founds))


def lowered_form(found: Found, use: Use, precision: Precision, runtime: Runtime) -> LoweredModel:
    """Return what takes a layer's place in a model of this precision for a runtime, used as ``use`` says."""
    form = runtime if use.has_cpu_form(found) else "portable"
    lowering = use.lowering(found, form)
    return lower(found.checkpoint, lowering, precision, False, use.maps, form, use.masked)


def _replaced(model: nn.Module, original: nn.Module, stand_in: nn.Module) -> nn.Module:
    """Put the stand-in wherever the original is: one object may have two names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is original:
                setattr(parent, name, stand_in)
    return model
