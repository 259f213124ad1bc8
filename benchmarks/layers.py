"""Random layers for benchmarks/verdict.py: every width, head count, sharpness and length that users have, from a seed."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
import torch

from bca_deploy.layers.checkpoint import Checkpoint, from_module
from bca_deploy.layers.lowered_model import choose, graph_state, has_cpu_form, lower
from bca_deploy.layers.reference import build
from bca_deploy.signature import DimRange, Dims
from bca_deploy.spec import LAYER_DIMS, Interface, LayerSpec, Lowering, Precision, Runtime, layer_signature
from bca_deploy.tracing.graph import trace

_ONE = DimRange(1, 1, 1)
#: What the layers are exported for: the default, a few tokens a side, one token on one side or on both, one batch row.
RANGES = (
    LAYER_DIMS,
    Dims(batch=DimRange(1, 2, 4), x_len=DimRange(2, 4, 8), context_len=DimRange(2, 4, 8)),
    Dims(batch=_ONE, x_len=DimRange(1, 2, 3), context_len=DimRange(1, 2, 3)),
    Dims(batch=DimRange(1, 2, 4), x_len=_ONE, context_len=DimRange(1, 16, 64)),
    Dims(batch=DimRange(1, 2, 4), x_len=DimRange(1, 16, 64), context_len=_ONE),
    Dims(batch=_ONE, x_len=DimRange(1, 8, 32), context_len=DimRange(1, 8, 32)),
    Dims(batch=_ONE, x_len=_ONE, context_len=_ONE),
)
_WIDTHS = (8, 12, 16, 24, 48, 64, 96, 128, 130, 256, 512)


@dataclass(frozen=True)
class Structure:
    """A layer without its weights, and what it is exported for."""

    seed: int
    spec: LayerSpec
    interface: Interface
    dims: Dims
    lowering: Lowering

    def weights(self, draw: int) -> Checkpoint:
        """Return one of its trained or untrained states: sharp or flat logits, fresh or learnt norms and biases."""
        rng = random.Random(f"{self.seed}.{draw}")
        torch.manual_seed(rng.getrandbits(32))
        module = build(self.spec)
        sharper, learnt = rng.choice((1, 1, 3, 6)), rng.random() < 0.5
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith("to_qk.weight"):
                    parameter.mul_(sharper)
                if learnt and parameter.ndim == 1:
                    torch.nn.init.normal_(parameter, 0.5, 0.3)
        return from_module(module)


def structure(seed: int, wanted: Callable[[Structure], bool] = lambda _: True) -> Structure:
    """Return the first structure of a seed's sequence that is wanted."""
    rng = random.Random(seed)
    while True:
        spec = LayerSpec(
            dim=rng.choice(_WIDTHS),
            context_dim=rng.choice(_WIDTHS),
            heads=rng.choice((1, 2, 3, 4, 8, 16)),
            dim_head=rng.choice((8, 16, 20, 24, 32, 64)),
            prenorm=rng.random() < 0.6,
            norm=rng.choice(("layer", "rms")),
            talking_heads=rng.random() < 0.4,
        )
        masks = rng.random() < 0.85, rng.random() < 0.85
        interface = Interface(*masks, rel_pos_bias=rng.choice(("none", "none", "none", "shared")))
        dims = rng.choices(RANGES, weights=(4, 1, 1, 1, 1, 1, 1))[0]
        found = Structure(seed, spec, interface, dims, choose("auto", spec, interface))
        if wanted(found):
            return found


@dataclass(frozen=True)
class Graph:
    """A traced structure; weights are put into it draw by draw."""

    structure: Structure
    precision: Precision
    runtime: Runtime
    model: ir.Model

    def state(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Return the weights of a draw as this graph holds them."""
        masked = self.structure.interface.masked
        return dict(graph_state(checkpoint, self.structure.lowering, self.precision, self.runtime, masked))


def graphs(structure: Structure, precision: Precision) -> list[Graph]:
    """Trace the portable form, and the form for onnxruntime on the CPU where there is one."""
    runtimes: list[Runtime] = ["portable"]
    if has_cpu_form(structure.lowering, precision, structure.interface):
        runtimes.append("onnxruntime-cpu")
    return [Graph(structure, precision, runtime, _trace(structure, precision, runtime)) for runtime in runtimes]


def _trace(structure: Structure, precision: Precision, runtime: Runtime) -> ir.Model:
    masked = structure.interface.masked
    lowered = lower(structure.weights(0), structure.lowering, precision, True, runtime=runtime, masked=masked)
    opset = 22 if precision == "bf16" else 17  # the first with a Conv in bfloat16
    return trace(lowered, layer_signature(structure.spec, structure.interface), opset, runtime=runtime)
