"""A copy of the model in which every proven layer has given its place to its lowered form, called just as it was."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bca_deploy.errors import ExportError, InputError, first_line
from bca_deploy.layers.absorbed import absorbed_form
from bca_deploy.layers.lowered_model import DTYPES, LoweredModel, lower
from bca_deploy.spec import INPUT_NAMES, MASK_NAMES, OUTPUT_NAMES, Lowering, Precision, Runtime
from bca_deploy.whole.calls import unwrapped
from bca_deploy.whole.find import Found
from bca_deploy.whole.proof import pinned
from bca_deploy.whole.samples import Sample, named_outputs

# Put in the place of attention maps: what shows wherever numbers count, and what a comparison sees, which takes NaN for small.
_FILLS = (torch.nan, 0.0, 1.0)


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


@dataclass(frozen=True)
class Use:
    """How a model uses one of its layers.

    Attributes:
        calls: how often one run calls it.
        masked: whether any call gives it a mask.
        biased: whether any call gives it a bias.
        maps: whether its attention maps show in the model's outputs; only the literal form has them.
        lengths: of ``x`` and of ``context``, in the longest of the calls.
        on_cpu: the form in the graph for onnxruntime on the CPU, where somebody chose it.
    """

    calls: int
    masked: bool
    biased: bool
    maps: bool
    lengths: tuple[int, int] = field(default=(1, 1), compare=False)
    on_cpu: Lowering | None = None

    def lowering(self, found: Found, runtime: Runtime = "portable") -> Lowering:
        """Return the form that the layer takes in a graph for a runtime."""
        if found.checkpoint.spec.kin.absorbed:
            return absorbed_form(runtime, *self.lengths)
        if self.maps or found.checkpoint.spec.talking_heads:
            return "reference"
        return self.on_cpu or "fused" if runtime == "onnxruntime-cpu" else "fused"

    def has_choice(self, found: Found) -> bool:
        """Whether the literal form could take the fused one's place."""
        return self.lowering(found) == "fused" and found.checkpoint.spec.kin.name == "seed"

    def has_cpu_form(self, found: Found) -> bool:
        """Whether there is a second form for onnxruntime on CPU: fused, without a bias, or of absorbed projections."""
        forms = self.lowering(found), self.lowering(found, "onnxruntime-cpu")
        return (forms[0] == "fused" and not self.biased) or forms[0] != forms[1]


def swap(model: nn.Module, founds: Sequence[Found], uses: Mapping[str, Use], precision: Precision, runtime: Runtime) -> Swapped:
    """Return a copy of the model with its layers lowered.

    Args:
        model: from :func:`plain_copy`.
        founds: its layers.
        uses: of each, by path, from :func:`uses_of`.
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


def uses_of(model: nn.Module, founds: Sequence[Found], sample: Sample) -> dict[str, Use]:
    """Return how the model uses each of its layers in one run; the model is as it was afterwards.

    Whether attention maps show in the outputs is tried: NaN is put in their place, and numbers that a comparison sees.
    """
    with torch.no_grad():
        before = named_outputs(model(**_cloned(sample)))
        return {found.path: _use(model, found, sample, before) for found in founds}


def _use(model: nn.Module, found: Found, sample: Sample, before: Mapping[str, Tensor]) -> Use:
    seen, shown = list[_Seen](), False
    for fill in _FILLS:
        seen.clear()
        after = _with_maps_of(fill, model, found, sample, seen)
        shown = shown or not all(same(before[name], t) for name, t in after.items())
        if not any(call.maps for call in seen):
            break
    row = found.checkpoint.spec.kin
    if shown and row.name != "seed":
        raise ExportError(
            f"{found.path}: its attention maps show in the model's outputs, and the lowered form of {row.title} forms none; "
            f"leave it as it is: --keep-literal {found.path}"
        )
    masked = any(call.given.get(name) is not None for call in seen for name in MASK_NAMES)
    biased = any(call.given.get("rel_pos_bias") is not None for call in seen)
    x_len, context_len = (max((call.given[name].shape[1] for call in seen), default=1) for name in INPUT_NAMES[:2])
    return Use(len(seen), masked, biased, shown, (x_len, context_len))


@dataclass(frozen=True)
class _Seen:
    """A call of a layer: what it was given, by the layer's names, and whether it returned maps."""

    given: Mapping[str, Any]
    maps: bool


def _with_maps_of(fill: float, model: nn.Module, found: Found, sample: Sample, seen: list[_Seen]) -> dict[str, Tensor]:
    """Return the model's outputs where this number stands everywhere in the layer's maps; note what its calls were given."""
    layer = model.get_submodule(found.path)
    forward = inspect.signature(layer.forward)

    def watch(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
        out, context_out, *maps = found.call.outputs(outputs)
        seen.append(_Seen(found.call.given(forward, args, kwargs), bool(maps)))
        return found.call.returned((out, context_out, *(torch.full_like(t, fill) for t in maps))) if maps else outputs

    handle = layer.register_forward_hook(watch, with_kwargs=True)
    try:
        return named_outputs(model(**_cloned(sample)))
    finally:
        handle.remove()


def _cloned(sample: Sample) -> Sample:
    """A model may work in place."""
    return {name: tensor.clone() for name, tensor in sample.items()}


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, NaN where the other has it."""
    return (
        one.shape == other.shape
        and torch.equal(one.isnan(), other.isnan())
        and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    )
