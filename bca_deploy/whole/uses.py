"""How a model uses each of its layers: how often, with which masks, at which lengths, and whether its maps show."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bca_deploy.errors import ExportError
from bca_deploy.layers.absorbed import FLAT_UP_TO, absorbed_form
from bca_deploy.spec import INPUT_NAMES, MASK_NAMES, Lowering, Runtime
from bca_deploy.whole.find import Found
from bca_deploy.whole.samples import Sample, named_outputs

# Put in the place of attention maps: what shows wherever numbers count, and what a comparison sees, which takes NaN for small.
_FILLS = (torch.nan, 0.0, 1.0)


@dataclass(frozen=True)
class Use:
    """How a model uses one of its layers.

    Attributes:
        calls: how often one run calls it.
        masked: whether any call gives it a mask.
        biased: whether any call gives it a bias.
        maps: whether its attention maps show in the model's outputs; only the literal form has them.
        lengths: of ``x`` and of ``context`` in the longest of the calls; of absorbed projections at the largest declared sizes.
        on_cpu: the form in the graph for onnxruntime on the CPU, where somebody chose it.
        on_engine: that of absorbed projections in the graph for engines, where the builder's memory chose it.
        why: what it was chosen by.
    """

    calls: int
    masked: bool
    biased: bool
    maps: bool
    lengths: tuple[int, int] = field(default=(1, 1), compare=False)
    on_cpu: Lowering | None = None
    on_engine: Lowering | None = None
    why: str | None = None

    def lowering(self, found: Found, runtime: Runtime = "portable") -> Lowering:
        """Return the form that the layer takes in a graph for a runtime."""
        if found.checkpoint.spec.kin.absorbed:
            by_rule = absorbed_form(runtime, self.lengths[1])
            return (self.on_engine or by_rule) if runtime == "portable" else by_rule
        if self.maps or found.checkpoint.spec.talking_heads:
            return "reference"
        return self.on_cpu or "fused" if runtime == "onnxruntime-cpu" else "fused"

    def reason(self, found: Found) -> str | None:
        """Return what the form was chosen by; None where there is one alone."""
        if not found.checkpoint.spec.kin.absorbed:
            return None
        return self.why or f"rule: flat up to {FLAT_UP_TO} rows of context and on the CPU, else loopq; here {self.lengths[1]}"

    def has_choice(self, found: Found) -> bool:
        """Whether the literal form could take the fused one's place."""
        return self.lowering(found) == "fused" and found.checkpoint.spec.kin.name == "seed"

    def has_cpu_form(self, found: Found) -> bool:
        """Whether there is a second form for onnxruntime on CPU: fused, without a bias, or of absorbed projections."""
        forms = self.lowering(found), self.lowering(found, "onnxruntime-cpu")
        return (forms[0] == "fused" and not self.biased) or forms[0] != forms[1]


def with_lengths(
    model: nn.Module, founds: Sequence[Found], uses: Mapping[str, Use], largest: Callable[[], Sample]
) -> dict[str, Use]:
    """Return the uses with the lengths that layers of absorbed projections see in a run with the largest inputs."""
    absorbed = [found for found in founds if found.checkpoint.spec.kin.absorbed]
    seen: dict[str, list[_Seen]] = {found.path: [] for found in absorbed}
    if absorbed:
        with torch.no_grad(), contextlib.ExitStack() as hooks:
            for found in absorbed:
                hooks.enter_context(_watched(model, found, seen[found.path]))
            with contextlib.suppress(Exception):  # what the model refuses is told by the trace, with the sizes that it takes
                model(**largest())
    return {**uses, **{path: replace(uses[path], lengths=_lengths(calls)) for path, calls in seen.items()}}


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
    return Use(len(seen), masked, biased, shown, _lengths(seen))


@dataclass(frozen=True)
class _Seen:
    """A call of a layer: what it was given, by the layer's names, and whether it returned maps."""

    given: Mapping[str, Any]
    maps: bool


def _lengths(seen: Sequence[_Seen]) -> tuple[int, int]:
    x_len, context_len = (max((call.given[name].shape[1] for call in seen), default=1) for name in INPUT_NAMES[:2])
    return x_len, context_len


def _with_maps_of(fill: float, model: nn.Module, found: Found, sample: Sample, seen: list[_Seen]) -> dict[str, Tensor]:
    """Return the model's outputs where this number stands everywhere in the layer's maps; note its calls."""
    with _watched(model, found, seen, fill):
        return named_outputs(model(**_cloned(sample)))


@contextlib.contextmanager
def _watched(model: nn.Module, found: Found, seen: list[_Seen], fill: float | None = None) -> Iterator[None]:
    """Note what calls of a layer are given; ``fill`` stands everywhere in its maps."""
    layer = model.get_submodule(found.path)
    forward = inspect.signature(layer.forward)

    def watch(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
        out, context_out, *maps = found.call.outputs(outputs)
        seen.append(_Seen(found.call.given(forward, args, kwargs), bool(maps)))
        if not maps or fill is None:
            return outputs
        return found.call.returned((out, context_out, *(torch.full_like(t, fill) for t in maps)))

    handle = layer.register_forward_hook(watch, with_kwargs=True)
    try:
        yield
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
