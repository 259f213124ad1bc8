"""What a checkpoint for a model must have, and what becomes of it in the traces that a bundle keeps."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import Tensor, nn

from bca_deploy.errors import CheckpointError
from bca_deploy.layers.checkpoint import Checkpoint, from_module
from bca_deploy.layers.lowered_model import DTYPES
from bca_deploy.layers.stored.weight_files import State
from bca_deploy.spec import LayerSpec, Lowering, Precision, Runtime
from bca_deploy.tracing.hollow import bytes_of, keys_of
from bca_deploy.whole.find import Found
from bca_deploy.whole.samples import Sample, named_outputs
from bca_deploy.whole.samples import cast as cast_float
from bca_deploy.whole.swap import lowered_form
from bca_deploy.whole.uses import Use, same

# What stands in a layer's place, in the names of its weights.
_STAND_IN = "lowered."


@dataclass(frozen=True)
class LayerWeights:
    """A lowered layer's weights.

    Attributes:
        path: of the layer.
        spec: of the layer.
        use: how the model uses it, which decides the form that its weights take.
        names: of the layer's own names of its weights, the model's.
    """

    path: str
    spec: LayerSpec
    use: Use
    names: Mapping[str, str]

    @property
    def start(self) -> str:
        """In front of the names of its weights in the model to be traced."""
        return f"{self.path}.{_STAND_IN}" if self.path else _STAND_IN

    def lowering(self, runtime: Runtime) -> Lowering:
        """Return the form that it takes in a graph for a runtime."""
        return self.use.lowering(self._found({}), runtime)

    def _found(self, weights: State) -> Found:
        """Return it as a layer of the model, which is neither called nor proven again."""
        return Found(self.path, Checkpoint(self.spec, weights), cast(Any, None), cast(Any, None))

    def graph_state(self, state: State, precision: Precision, runtime: Runtime) -> State:
        """Return the weights as a graph holds them, under the names that they have in the model to be traced."""
        weights = {name: state[key] for name, key in self.names.items()}
        inside = lowered_form(self._found(weights), self.use, precision, runtime).state_dict()
        return {f"{self.start}{name}": tensor for name, tensor in inside.items()}


@dataclass(frozen=True)
class WeightMap:
    """What a checkpoint for a model must have, and what becomes of it.

    Attributes:
        entries: an empty tensor of each entry's shape and type, on the meta device.
        tied: names that are one weight.
        layers: the lowered layers.
        folded: for each entry that the model reads and no trace does, a hash of the value that is in the graphs.
    """

    entries: Mapping[str, Tensor]
    tied: tuple[tuple[str, ...], ...]
    layers: tuple[LayerWeights, ...]
    folded: Mapping[str, str] = field(default_factory=dict)

    def weights(self, state: State, precision: Precision, runtime: Runtime) -> State:
        """Return what a trace may hold, by name: the model's own entries, and those of the lowered layers."""
        found = {name: cast_float(tensor, DTYPES[precision]) for name, tensor in state.items()}
        for layer in self.layers:
            found |= layer.graph_state(state, precision, runtime)
        return found

    def taken(self, given: State, source: Path) -> State:
        """Return a checkpoint's entries in the model's types.

        Raises:
            CheckpointError: an entry holds NaN, tied entries differ, or one that is folded away is another.
        """
        state = {name: given[name].to(like.dtype) for name, like in self.entries.items()}
        if bad := [name for name, tensor in state.items() if tensor.isnan().any()]:  # masks may hold infinities
            raise CheckpointError(f"{source}: {bad[0]} holds NaN; take a checkpoint from before the divergence")
        for names in self.tied:
            if other := [name for name in names[1:] if not torch.equal(state[names[0]], state[name])]:
                raise CheckpointError(
                    f"{source}: {names[0]} and {other[0]} are one weight in the model, and differ here; export the model again "
                    "if they were separated"
                )
        for name, digest in self.folded.items():
            if _digest(state[name]) != digest:
                raise CheckpointError(
                    f"{source}: {name} has another value than in the bundle, where it is folded into constants; give the code "
                    "as well, --model pkg.module:factory, or export the model again"
                )
        return state

    def as_json(self) -> dict[str, Any]:
        """Return it as a file holds it."""
        return {
            "entries": {name: {"shape": list(t.shape), "dtype": _dtype_name(t)} for name, t in self.entries.items()},
            "tied": [list(names) for names in self.tied],
            "layers": [{"path": each.path, "use": asdict(each.use), "names": dict(each.names)} for each in self.layers],
            "folded": dict(self.folded),
        }


def of_json(content: Mapping[str, Any], specs: Mapping[str, LayerSpec]) -> WeightMap:
    """Return what :meth:`WeightMap.as_json` gave; ``specs`` are the layers', by path."""

    def layer(path: str, use: Mapping[str, Any], names: Mapping[str, str]) -> LayerWeights:
        plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in use.items()}
        return LayerWeights(path, specs[path], Use(**plain), names)

    entries = {
        name: torch.empty(each["shape"], dtype=getattr(torch, each["dtype"]), device="meta")
        for name, each in content["entries"].items()
    }
    layers = tuple(layer(**each) for each in content["layers"])
    return WeightMap(entries, tuple(tuple(names) for names in content["tied"]), layers, content["folded"])


def map_of(model: nn.Module, founds: Sequence[Found], uses: Mapping[str, Use]) -> WeightMap:
    """Return the map of a model, in which nothing is known to be folded.

    Args:
        model: from :func:`bca_deploy.whole.swap.plain_copy`.
        founds: its layers.
        uses: of each, by path.
    """
    state = tensors_of(model)
    places: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        places.setdefault((tensor.data_ptr() if tensor.numel() else name, tensor.shape, tensor.stride()), []).append(name)
    entries = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    layers = tuple(LayerWeights(f.path, f.checkpoint.spec, uses[f.path], _names(model, f)) for f in founds)
    return WeightMap(entries, tuple(tuple(names) for names in places.values() if len(names) > 1), layers)


def tensors_of(model: nn.Module) -> State:
    """Return a model's state dict without what is no tensor."""
    return {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _names(model: nn.Module, found: Found) -> dict[str, str]:
    """Return the model's names of a layer's weights, told apart by putting numbers into a copy that no two entries share."""
    layer = copy.deepcopy(model.get_submodule(found.path))
    generator, start = torch.Generator().manual_seed(0), f"{found.path}." if found.path else ""
    own = tensors_of(layer)
    for tensor in own.values():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
    read = from_module(layer, found.checkpoint.spec.heads).state
    alike = {name: [key for key, one in own.items() if _begins_like(one, tensor)] for name, tensor in read.items()}
    return {name: f"{start}{name if name in keys else keys[0]}" for name, keys in alike.items()}


def _begins_like(one: Tensor, other: Tensor) -> bool:
    """Whether two random tensors are the same: their first numbers tell."""
    return one.shape == other.shape and torch.equal(one.reshape(-1)[:4], other.reshape(-1)[:4])


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor).numpy().tobytes()).hexdigest()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def unnamed(weights: WeightMap) -> list[str]:
    """Return the entries that a trace holds under no name of theirs: a layer's own, which the model may read beside it."""
    return [key for layer in weights.layers for key in layer.names.values()]


def folded_away(model: nn.Module, weights: WeightMap, reached: set[str], unclear: set[str], sample: Sample) -> dict[str, str]:
    """Return a hash of each entry that the model's outputs depend on, and of which it is not known where it is in a trace.

    Args:
        model: as for :func:`map_of`.
        weights: its map.
        reached: the entries that a trace reads.
        unclear: those that it may hold in constants.
        sample: to try the model on, with other values in the others.
    """
    state = tensors_of(model)
    tied = [name for names in weights.tied if reached.intersection(names) for name in names]
    others = [name for name in state if name not in reached and name not in tied]
    if not others or not _shows(model, others, sample):
        others = []
    found = [*unclear, *(name for name in others if _shows(model, [name], sample))]
    return {name: _digest(state[name]) for name in sorted(set(found))}


def _shows(model: nn.Module, names: Sequence[str], sample: Sample) -> bool:
    """Whether the model gives something else with other values in some entries of its state dict."""
    moved = copy.deepcopy(model)
    state = moved.state_dict()
    moved.load_state_dict({name: _moved(value) if name in names else value for name, value in state.items()})
    try:
        with torch.no_grad():
            before, after = (named_outputs(m(**{n: t.clone() for n, t in sample.items()})) for m in (model, moved))
    except Exception:  # (with these values the user's model raises what it likes: they are read)
        return True
    return set(before) != set(after) or not all(same(before[name], after[name]) for name in before)


def _moved(value: Tensor) -> Tensor:
    if value.dtype == torch.bool:
        return ~value
    return value * 2 + 1


def reached_by(trace: onnx.ModelProto, weights: WeightMap) -> set[str]:
    """Return the entries of the state dict that the weights of a trace come from."""
    keys = set(keys_of(trace).values())
    found = keys.intersection(weights.entries)
    for layer in weights.layers:
        if any(key.startswith(layer.start) for key in keys):
            found |= set(layer.names.values())
    return found
