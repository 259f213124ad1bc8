"""From a file or a live module to a layer specification and its weights. Heads are never guessed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bca_deploy.errors import CheckpointError, InputError, first_line, nearest
from bca_deploy.layers.reference import build
from bca_deploy.layers.relatives import Relative, family_of, read_relative
from bca_deploy.layers.stored.places import (
    CONTAINERS,
    FILE,
    MODULE,
    PARALLEL,
    Words,
    dotted,
    listing,
    locate,
    plain,
    refuse_unmerged,
)
from bca_deploy.layers.stored.weight_files import State, read
from bca_deploy.spec import NORM_EPS, LayerSpec, Norm

# Not float8: what it stands for depends on a scale that is kept elsewhere.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Either side's will do: the missing one is then named.
_NORMS = {"norm.weight", "norm.bias", "context_norm.weight", "context_norm.bias"}
_TALKING = {"talking_heads.weight", "context_talking_heads.weight"}


@dataclass(frozen=True)
class Checkpoint:
    """A layer's specification with its weights in their original dtype, keyed by the seed's parameter names."""

    spec: LayerSpec
    state: State

    def module(self, dtype: torch.dtype) -> nn.Module:
        """Return the reference module in eval mode with these weights rounded to ``dtype``."""
        with torch.device("meta"):  # else its random first weights would move the caller's random numbers on
            module = build(self.spec) if self.spec.family == "seed" else Relative(self.spec)
        module.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in self.state.items()}, assign=True)
        return module.eval()


def load(path: Path, heads: int | None = None, prefix: str = "") -> Checkpoint:
    """Read a trained layer or transformer from a checkpoint file.

    Args:
        path: a file or directory as :func:`bca_deploy.layers.stored.weight_files.read` takes them.
        heads: required unless the layer has talking heads.
        prefix: where the layer sits inside a bigger state dict, such as ``encoder.fusion.``; containers such as ``model`` and
            ``ema`` are prefixes, too, and ``model`` and ``state_dict`` may be left out.

    Returns:
        The specification and the layer's own weights.

    Raises:
        CheckpointError: the file cannot be read, or does not hold exactly this layer.
        InputError: heads missing, or not a divisor of the inner width.
    """
    return from_state(read(path), heads, prefix)


def from_state(state: Mapping[str, Tensor], heads: int | None = None, prefix: str = "") -> Checkpoint:
    """Make a checkpoint of a state dict; arguments and errors as for :func:`load`."""
    return _from_state(state, heads, prefix, CONTAINERS, FILE)


def _from_state(
    state: Mapping[str, Tensor], heads: int | None, prefix: str, containers: Sequence[str], words: Words
) -> Checkpoint:
    layer = _inside({plain(name): tensor for name, tensor in state.items()}, dotted(prefix), containers, words)
    _check_values(layer)
    spec = infer(layer, heads)
    _check_keys(layer, spec, words)
    return Checkpoint(spec, {name: _copy(tensor) for name, tensor in sorted(layer.items())})


def _inside(state: State, prefix: str, containers: Sequence[str], words: Words) -> State:
    place = locate(state, prefix, containers, words)
    found = {name.removeprefix(place): tensor for name, tensor in state.items() if name.startswith(place)}
    refuse_unmerged(found)
    return found


def _copy(tensor: Tensor) -> Tensor:
    """Return the values in memory of their own: training goes on, and safetensors refuses tied weights."""
    # A bit may say that they are to be negated (torch._neg_view, the imaginary part of a conjugate): safetensors ignores it.
    return tensor.detach().resolve_neg().cpu().clone(memory_format=torch.contiguous_format)


def from_module(module: nn.Module, heads: int | None = None) -> Checkpoint:
    """Read a live module: the seed's layer, the published package's layer or its transformer, or a relative.

    Args:
        module: the trained module; its ``heads`` and norm epsilon are read from it.
        heads: overrides what the module says.

    Returns:
        The specification and a copy of the weights.

    Raises:
        CheckpointError: the module is not this layer.
        InputError: it is no module.
    """
    _check_module(module)
    if (row := family_of(module)) is not None and row.name != "seed":
        spec, state = read_relative(module, row)
        _check_values(state)
        return Checkpoint(spec, {name: _copy(tensor) for name, tensor in sorted(state.items())})
    own: list[Any] = [m.heads for m in module.modules() if isinstance(getattr(m, "heads", None), int)]
    found = _from_state(module.state_dict(), heads if heads is not None or not own else own[0], "", PARALLEL, MODULE)
    return Checkpoint(_with_eps(found.spec, module), found.state)


def _check_module(module: object) -> None:
    """Refuse what people give in place of a module, with the way out for each."""
    if isinstance(module, nn.Module):
        return
    advice = "give the trained module itself"
    if isinstance(module, type):
        advice = f"give a trained module, not the class {module.__name__}"
    elif isinstance(module, str | Path):
        advice = f"for a checkpoint run bca-export --checkpoint {module}, or load it into the module"
    elif isinstance(module, Mapping):
        advice = "load the state dict into the module, or save it and run bca-export --checkpoint"
    raise InputError(f"a torch.nn.Module is needed and this is a {type(module).__name__}; {advice}")


def _with_eps(spec: LayerSpec, module: nn.Module) -> LayerSpec:
    given: list[Any] = [m.eps for m in module.modules() if hasattr(m, "eps")]
    eps = {NORM_EPS["rms"] if value is None else float(value) for value in given}
    if min(eps, default=1.0) <= 0:
        raise CheckpointError(f"the module's norms have eps {min(eps)}; it must be above 0")
    if len(eps) > 1:
        raise CheckpointError(f"the module's norms have different eps {sorted(eps)}; this layer has one for all")
    return replace(spec, norm_eps=eps.pop()) if eps else spec


def _check_values(state: State) -> None:
    for name, tensor in state.items():
        if obstacle := _why_no_weight(tensor):
            raise CheckpointError(f"{name} {obstacle}")
        try:
            bad = int((~torch.isfinite(tensor)).sum())
        except Exception as error:  # a subclass of Tensor may refuse anything
            kind = type(tensor).__name__
            raise CheckpointError(f"{name}, a {kind}, gives no values ({first_line(error)}); give plain tensors") from error
        if bad:
            raise CheckpointError(
                f"{name} holds {bad} NaN or Inf of {tensor.numel()} values; take a checkpoint from before the divergence"
            )


def _why_no_weight(value: object) -> str | None:
    """Return why this cannot be the values of a weight, and the way out; None where it can."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}; weights must be tensors"
    if is_lazy(value):
        return "has no shape yet; run the module once, so that its lazy layers make their weights"
    if value.is_meta:
        return "is on the meta device, which holds no values; load the weights into the module first"
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        return f"is not dense ({kind}); give a plain tensor, as to_dense() makes one"
    if value.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        return f"has dtype {value.dtype}; weights must be floating point ({allowed}): dequantize, or save the original weights"
    return None


def infer(state: State, heads: int | None = None) -> LayerSpec:
    """Infer the specification from names and shapes; ``heads`` as for :func:`load`."""
    depth = _depth(state)
    place = "layers.0.0." if depth else ""
    attention = {name.removeprefix(place): tensor for name, tensor in state.items() if name.startswith(place)}
    inner, dim = _matrix(attention, "to_qk.weight", place)
    prenorm = depth is not None or not _NORMS.isdisjoint(attention)
    norm: Norm = "rms" if prenorm and {"norm.bias", "context_norm.bias"}.isdisjoint(attention) else "layer"
    found = _heads(attention, heads, inner)
    return LayerSpec(
        dim=dim,
        context_dim=_matrix(attention, "context_to_qk.weight", place)[1],
        heads=found,
        dim_head=inner // found,
        prenorm=prenorm,
        norm=norm,
        talking_heads=not _TALKING.isdisjoint(attention),
        depth=depth,
        ff_hidden=_matrix(state, "layers.0.1.1.weight")[0] if depth else None,
        context_ff_hidden=_matrix(state, "layers.0.2.1.weight")[0] if depth else None,
        final_norms=depth is not None and not {"norm.weight", "context_norm.weight"}.isdisjoint(state),
    )


def _depth(state: State) -> int | None:
    blocks = {int(match[1]) for name in state if (match := re.match(r"layers\.(\d+)\.", name))}
    if not blocks:
        return None
    if blocks != set(range(len(blocks))):
        raise CheckpointError(
            f"transformer blocks {sorted(blocks)} are not numbered from 0 without a gap; is the checkpoint complete?"
        )
    return len(blocks)


def _matrix(state: State, name: str, place: str = "") -> tuple[int, int]:
    if name not in state:
        raise CheckpointError(f"key {place}{name} is missing{nearest(name, state)}; the keys there are {listing(state)}")
    if state[name].ndim != 2:
        raise CheckpointError(f"{name} has shape {list(state[name].shape)}; a matrix is expected")
    return int(state[name].shape[0]), int(state[name].shape[1])


def _heads(attention: State, heads: int | None, inner: int) -> int:
    divisors = [n for n in range(1, inner + 1) if inner % n == 0]
    mixers = [(name, attention[name]) for name in sorted(_TALKING & set(attention))]
    for name, mixer in mixers:
        if mixer.ndim != 4:
            raise CheckpointError(f"{name} has shape {list(mixer.shape)}; [heads, heads, 1, 1] is expected")
    if mixers:
        found = int(mixers[0][1].shape[0])
        if heads not in (None, found):
            raise InputError(f"heads {heads}, but the talking-heads weights are for {found}; leave --heads out or give {found}")
        return found
    if heads is None:
        raise InputError(
            f"heads cannot be read from this checkpoint (wrong heads give a valid but different function); "
            f"give --heads, one of the divisors of the inner width {inner}: {', '.join(map(str, divisors))}"
        )
    if heads not in divisors:
        raise InputError(f"heads {heads} does not divide the inner width {inner}; allowed: {', '.join(map(str, divisors))}")
    return heads


def _check_keys(state: State, spec: LayerSpec, words: Words) -> None:
    """Hold names and shapes against those of the module that ``spec`` builds."""
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in build(spec).state_dict().items()}
    unknown = sorted(set(state) - set(wanted))
    absent = sorted(set(wanted) - set(state))
    if unknown or absent:
        raise CheckpointError("; ".join(_key_problems(unknown, absent, wanted, words)))
    wrong = [
        f"{name} {list(state[name].shape)}, needs {list(shape)}" for name, shape in wanted.items() if state[name].shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"shapes do not fit one layer of dim {spec.dim}, context_dim {spec.context_dim}: {'; '.join(wrong[:6])}"
        )


def _key_problems(unknown: list[str], absent: list[str], wanted: Mapping[str, object], words: Words) -> list[str]:
    problems = [f"unknown key {name}{nearest(name, absent or wanted)}" for name in unknown[:8]]
    problems += [f"missing key {name}" for name in absent[:8]]
    hidden = len(unknown) + len(absent) - len(problems)
    tail = [f"and {hidden} more"] if hidden > 0 else []
    if _is_different(unknown, absent, wanted):
        return [
            *problems,
            *tail,
            "so it is a different layer, whose forward is not told by its weights, and not exactly one layer as published; "
            f"export the model around it, with this layer as it is: {words.literal}",
        ]
    return [*problems, *tail, f"the {words.root} must hold exactly one layer or transformer; {words.point} to point at it"]


def _is_different(unknown: list[str], absent: list[str], wanted: Mapping[str, object]) -> bool:
    """Whether it has all of the layer and more, or a part of the layer in another make: no prefix leads to anything else."""
    parts = tuple({f"{name.rpartition('.')[0]}." for name in wanted})
    return bool(unknown) and (not absent or any(name.startswith(parts) for name in unknown))


def is_query_weight(name: str) -> bool:
    """Whether scaling this parameter scales the logits."""
    return name.split(".")[-2:] == ["to_qk", "weight"]
