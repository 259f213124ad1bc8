"""How a live layer is called and what it returns, in the words of its own code, turned into the seed's and back."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bca_deploy.errors import CheckpointError, InputError
from bca_deploy.families import FAMILIES, Family
from bca_deploy.spec import INPUT_NAMES, MASK_NAMES, Bias, Interface, LayerSpec

# What forward's arguments are called in code that is about; the first two are the sequences whatever their names.
_ALIASES = {
    "mask": ("mask", "x_mask"),
    "context_mask": ("context_mask", "ctx_mask", "mask_context", "y_mask"),
    "rel_pos_bias": ("rel_pos_bias", "attn_bias", "bias"),
    "return_attn": ("return_attn", "return_attention", "need_weights"),
}
# As the layer's own forward takes them.
_ORDER = ("x", "context", "mask", "context_mask", "return_attn", "rel_pos_bias")


@dataclass(frozen=True)
class Call:
    """How a module is called.

    Attributes:
        arguments: what its forward calls the layer's inputs that it takes, and ``return_attn``.
        row: whose layer it is.
    """

    arguments: Mapping[str, str]
    row: Family = FAMILIES["seed"]

    def __call__(self, module: nn.Module, **given: Any) -> tuple[Tensor, ...]:
        """Call the module with what is given by the layer's names, and return its outputs; maps only where asked for."""
        theirs = _as_theirs(self.row, given)
        found = self.outputs(module(**{self.arguments[name]: value for name, value in theirs.items()}))
        return found[:2] if self.row.paired_outputs else found

    def given(self, forward: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return by the layer's names what a call of ``forward`` was given."""
        bound = forward.bind(*args, **kwargs).arguments
        everything = dict(bound)
        for index, parameter in enumerate(forward.parameters.values()):
            if parameter.kind is parameter.VAR_KEYWORD:
                everything |= bound.get(parameter.name, {})
            elif parameter.kind is parameter.VAR_POSITIONAL:  # handed on to the layer's own forward, in its order
                everything |= dict(zip(_ORDER[index:], bound.get(parameter.name, ()), strict=False))
        roles = {argument: name for name, argument in self.arguments.items()}
        return _as_ours(self.row, {roles[name]: value for name, value in everything.items() if name in roles})

    def outputs(self, returned: Any) -> tuple[Tensor, ...]:
        """Return ``out``, ``context_out`` and the maps, where there are any, of what forward returned."""
        if not self.row.paired_outputs:
            return tuple(returned)
        (out, attn), (context_out, context_attn) = returned
        return out, context_out, attn, context_attn

    def returned(self, outputs: tuple[Tensor, ...]) -> Any:
        """Return as forward does what :meth:`outputs` gave."""
        if not self.row.paired_outputs:
            return outputs
        out, context_out, attn, context_attn = outputs
        return (out, attn), (context_out, context_attn)

    def no_maps(self, x: Tensor, context: Tensor, heads: int, asked: bool) -> tuple[Tensor, ...]:
        """Return maps of the right shape for a caller who drops them; none where the module would return none."""
        if self.row.paired_outputs:
            flat = x.shape[0] * heads
            return x.new_zeros(flat, x.shape[1], context.shape[1]), x.new_zeros(flat, context.shape[1], x.shape[1])
        if not asked:
            return ()
        maps = x.new_zeros(x.shape[0], heads, x.shape[1], context.shape[1])
        return maps, maps


def _as_theirs(row: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return masks as the family's code takes them."""
    masks = {name: given[name] for name in MASK_NAMES if given.get(name) is not None}
    rest = {name: value for name, value in given.items() if name not in MASK_NAMES}
    if row.masks == "padding":
        return rest | {name: ~mask for name, mask in masks.items()}
    if row.masks == "pairs" and masks:
        own, keys = (masks.get(name, _all(given[of])) for name, of in zip(MASK_NAMES, INPUT_NAMES, strict=False))
        return rest | {"mask": (own[:, :, None] & keys[:, None, :])[:, None]}
    return rest | masks


def _as_ours(row: Family, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return masks as the seed's layer takes them."""
    masks = {name: theirs[name] for name in MASK_NAMES if isinstance(theirs.get(name), Tensor)}
    ours = {name: value for name, value in theirs.items() if name not in masks}
    if row.masks == "padding":
        return ours | {name: ~mask for name, mask in masks.items()}
    if row.masks == "pairs" and masks:
        return ours | _sides(masks["mask"], theirs["x"], theirs["context"])
    return ours | masks


def _sides(pairs: Tensor, x: Tensor, context: Tensor) -> dict[str, Tensor]:
    """Return the masks of both sides that one mask of pairs ``[B or 1, 1, N, M]`` was made of.

    Where it is no such product, the model's own outputs tell.
    """
    while pairs.ndim < 4:
        pairs = pairs[None]
    if pairs.shape[1] != 1:
        raise InputError(
            f"a mask {list(pairs.shape)} differs from head to head, which has no lowered form; keep the layer literal"
        )
    plane = pairs[:, 0].expand(x.shape[0], x.shape[1], context.shape[1])
    return {"mask": plane.any(-1), "context_mask": plane.any(-2)}


def _all(sequence: Tensor) -> Tensor:
    return torch.ones(sequence.shape[:2], dtype=torch.bool, device=sequence.device)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what torch.compile, DataParallel or AveragedModel has wrapped, which has the forward that was written."""
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        elif isinstance(module, (nn.DataParallel, torch.optim.swa_utils.AveragedModel)):
            module = module.module
        else:
            return module


def call_of(module: nn.Module, row: Family = FAMILIES["seed"]) -> Call:
    """Return how a module's forward is called.

    Raises:
        CheckpointError: it needs an argument that the layer has not.
    """
    everything = list(inspect.signature(module.forward).parameters.values())
    parameters = [p for p in everything if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = _names(row)
    found = dict(zip(INPUT_NAMES, (parameter.name for parameter in parameters[:2]), strict=False))
    for parameter in parameters[2:]:
        if parameter.name in names:
            found.setdefault(names[parameter.name], parameter.name)
        elif parameter.default is parameter.empty:
            raise CheckpointError(
                f"the module's forward needs {parameter.name!r}, which this layer has not; give it a default, or export the "
                "layer inside it"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in everything):  # handed on to the layer's own forward
        found = {name: name for name in (*INPUT_NAMES[:2], *names.values())} | found
    return Call(found, row)


def _names(row: Family) -> dict[str, str]:
    """Return for each name of an optional argument what it is."""
    if row.arguments is not None:
        return {theirs: ours for ours, theirs in row.arguments.items() if ours not in INPUT_NAMES[:2]}
    return {alias: name for name, aliases in _ALIASES.items() for alias in aliases}


def takes(call: Call, spec: LayerSpec) -> Interface:
    """Return everything optional that a module takes and gives."""
    bare = spec.depth is None  # the transformer, as published, has neither a bias nor maps
    bias: Bias = "shared" if bare and "rel_pos_bias" in call.arguments else "none"
    mask = "mask" in call.arguments
    context_mask = mask if call.row.masks == "pairs" else "context_mask" in call.arguments
    return Interface(mask, context_mask, bias, attention_maps=bare and "return_attn" in call.arguments)
