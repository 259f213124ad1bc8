"""The float64 truth of a case, and the evaluations in PyTorch that stand beside it."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bca_deploy.layers.checkpoint import Checkpoint, is_query_weight
from bca_deploy.layers.in_order import InOrder
from bca_deploy.layers.reference import BidirectionalCrossAttention
from bca_deploy.layers.stored.weight_files import State
from bca_deploy.parity.cases import Case, Sharpness, logit_target, make_inputs, work
from bca_deploy.spec import OUTPUT_NAMES, Interface, LayerSpec, Precision

Array = NDArray[Any]

#: In how many orders products are summed where one is not enough: as the terms stand, and shuffled.
ORDERS = 8

#: Multiply-adds above which a case is not summed in order: about ten seconds on one core.
IN_ORDER_WORK = 2e10

#: Logits this far below their row's and their column's maximum weigh exp(-50), nothing at any precision here.
WEIGHTLESS = 50.0
_UNMASKED = Interface(mask=False, context_mask=False)
_RANDOM = Case("no mask", "plain", 2, 16, 16, 0)


def run_module(
    module: Callable[..., tuple[torch.Tensor, ...]], inputs: Mapping[str, Array], interface: Interface, dtype: torch.dtype
) -> dict[str, Array]:
    """Run a module that is called as the reference is in ``dtype`` and return its outputs by name as float64."""
    tensors = {name: torch.from_numpy(a) if a.dtype == bool else torch.from_numpy(a).to(dtype) for name, a in inputs.items()}
    extra = {"return_attn": True} if interface.attention_maps else {}
    with torch.no_grad():
        return {name: tensor.double().numpy() for name, tensor in zip(OUTPUT_NAMES, module(**tensors, **extra), strict=False)}


def evaluations(
    module: nn.Module, inputs: Mapping[str, Array], interface: Interface, dtype: torch.dtype, orders: int
) -> list[dict[str, Array]]:
    """Return what :func:`run_module` gives in PyTorch eager, and with every product summed in so many orders."""
    found = [run_module(module, inputs, interface, dtype)]
    for order in range(orders):
        with InOrder(order):
            found.append(run_module(module, inputs, interface, dtype))
    return found


def true_outputs(
    module: nn.Module, inputs: Mapping[str, Array], interface: Interface, weightless: float = WEIGHTLESS
) -> tuple[dict[str, Array], float]:
    """Return the float64 outputs and the largest live |logit| of any layer that carries weight."""
    largest = [0.0]
    mask, context_mask = masks_of(inputs)
    live = torch.from_numpy(mask[:, None, :, None] & context_mask[:, None, None, :])

    def look(layer: BidirectionalCrossAttention, args: Any, kwargs: Any) -> None:
        x, context = layer.norm(args[0]), layer.context_norm(args[1])
        largest.append(_weighty(layer.similarity(x, context, kwargs.get("rel_pos_bias")), live, weightless))

    layers = [m for m in module.modules() if isinstance(m, BidirectionalCrossAttention)]
    hooks = [layer.register_forward_pre_hook(_positional(look), with_kwargs=True) for layer in layers]
    outputs = run_module(module, inputs, interface, torch.float64)
    for hook in hooks:
        hook.remove()
    return outputs, max(largest)


def affordable_orders(inputs: Mapping[str, Array], spec: LayerSpec) -> int:
    """Return in how many orders these inputs may be summed: all, or none where they are too large."""
    batch, x_len, _ = inputs["x"].shape
    return ORDERS if work(spec, batch, x_len, inputs["context"].shape[1]) <= IN_ORDER_WORK else 0


def rounded_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """Return the checkpoint with its weights rounded to ``dtype``."""
    return Checkpoint(checkpoint.spec, {name: tensor.to(dtype) for name, tensor in checkpoint.state.items()})


def _positional(look: Callable[..., None]) -> Callable[..., None]:
    """Give ``look`` x and context as positional arguments however the layer was called."""

    def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        look(layer, args or (kwargs["x"], kwargs["context"]), kwargs)

    return hook


def _weighty(sim: torch.Tensor, live: torch.Tensor, weightless: float) -> float:
    """Return the largest |logit| among live pairs near the maximum of their row or of their column."""
    sim = sim.masked_fill(~live, -torch.inf)
    near = (sim > sim.amax(-1, keepdim=True) - weightless) | (sim > sim.amax(-2, keepdim=True) - weightless)
    chosen = sim[near & torch.isfinite(sim)]
    return float(chosen.abs().max()) if chosen.numel() else 0.0


def sharpen(state: State, factor: float) -> State:
    """Return the state with every ``to_qk`` scaled in float32 and rounded to its own dtype again."""
    return {name: (t.float() * factor).to(t.dtype) if is_query_weight(name) else t for name, t in state.items()}


def sharpening(checkpoint: Checkpoint, sharpness: Sharpness, precision: Precision) -> float:
    """Return what ``to_qk`` is multiplied by to bring the largest |logit| near its target; 1 for ``plain``.

    Eight significant bits: float32 and NumPy and PyTorch hold and apply it alike.
    """
    if sharpness == "plain":
        return 1.0
    module = checkpoint.module(torch.float64)
    largest = max(true_outputs(module, probe, _UNMASKED, np.inf)[1] for probe in _probes(checkpoint, sharpness))
    mantissa, exponent = np.frexp(logit_target(sharpness, precision, checkpoint.spec.scale) / largest) if largest else (0.5, 1)
    return float(np.ldexp(np.round(mantissa * 256) / 256, exponent))


def _probes(checkpoint: Checkpoint, sharpness: Sharpness) -> list[dict[str, Array]]:
    """Return inputs like those that the sharpness is for: the ``opposed`` family has one logit per batch row and head."""
    cases = [Case("opposed", "plain", 8, 1, 1, seed) for seed in range(4)] if sharpness == "steep" else [_RANDOM]
    return [make_inputs(case, checkpoint.spec, _UNMASKED, "fp32") for case in cases]


def masks_of(inputs: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return both masks, all true where absent."""
    x, context = inputs["x"], inputs["context"]
    mask = inputs.get("mask", np.ones(x.shape[:2], dtype=bool))
    return mask, inputs.get("context_mask", np.ones(context.shape[:2], dtype=bool))


def live_rows(inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return for each output a bool array that broadcasts against it: true where the row is live."""
    mask, context_mask = masks_of(inputs)
    rows = mask & context_mask.any(-1, keepdims=True)
    columns = context_mask & mask.any(-1, keepdims=True)
    shapes = {"out": rows[..., None], "context_out": columns[..., None]}
    shapes |= {"attn": rows[:, None, :, None], "context_attn": columns[:, None, None, :]}
    return {name: np.broadcast_to(shapes[name], outputs[name].shape) for name in outputs}


def mean_square(values: Array) -> float:
    """Return the mean of the squares, never quite 0."""
    return max(float(np.mean(values**2)), np.finfo(np.float64).tiny)
