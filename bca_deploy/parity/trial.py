"""One case judged: what a runtime made of it, beside the truth and what PyTorch makes of it: the per-case rule of rule.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.lowered_model import DTYPES
from bca_deploy.parity.cases import Sharpness
from bca_deploy.parity.truth import ORDERS, evaluations, mean_square, rounded_checkpoint, true_outputs
from bca_deploy.parity.verdict import REGIONS, CaseResult, PeerError, Region, RegionError
from bca_deploy.spec import UNIT_ROUNDOFF, Interface, LayerSpec, Precision

Array = NDArray[Any]

PEER_FACTOR = 2.0
ROUNDOFF_FACTOR = 4.0


@dataclass(frozen=True)
class Trial:
    """One case's truth and what PyTorch makes of it, ready to judge any runtime's outputs.

    Attributes:
        truth: float64 outputs by name.
        peers: the same from each evaluation in PyTorch, eager first.
        live: for each output, where its rows are live.
        slack: from :func:`roundoff_slack`.
    """

    truth: dict[str, Array]
    peers: list[dict[str, Array]]
    live: dict[str, Array]
    slack: float

    def judge(
        self, name: str, family: str, sharpness: Sharpness, runtime: str, outputs: Mapping[str, Array] | str
    ) -> CaseResult:
        """Judge one runtime's outputs, or the sentence that says why there are none."""
        if isinstance(outputs, str):
            return CaseResult(name, family, sharpness, runtime, {}, 0.0, (outputs,))
        wide = {key: np.asarray(outputs[key]).astype(np.float64) for key in self.truth}
        bad = [f"{key} has {int((~np.isfinite(a)).sum())} NaN or Inf" for key, a in wide.items() if not np.isfinite(a).all()]
        wrong = [f"{key} has shape {a.shape}" for key, a in wide.items() if a.shape != self.truth[key].shape]
        if bad or wrong:
            return CaseResult(name, family, sharpness, runtime, {}, 0.0, tuple(bad + wrong))
        regions: dict[Region, RegionError] = {}
        failures: list[str] = []
        for region in REGIONS:
            found, broken = self._region(wide, region)
            failures += broken
            if found is not None:
                regions[region] = found
        cosine = min(_cosine(wide[key], self.truth[key]) for key in wide)
        return CaseResult(name, family, sharpness, runtime, regions, cosine, tuple(failures))

    def _region(self, outputs: dict[str, Array], region: Region) -> tuple[RegionError | None, list[str]]:
        inside = {key: self.live[key] == (region == "live") for key in self.truth}
        keys = [key for key in self.truth if inside[key].any()]
        if not keys:
            return None, []
        bounds = [self._bound(outputs, key, inside[key]) for key in keys]
        broken = [
            f"{key}, {region} rows: largest error {worst:.3g}, allowed {bound:.3g}"
            for key, (worst, bound) in zip(keys, bounds, strict=True)
            if not worst <= bound
        ]
        relative = np.concatenate([self._relative(outputs, key)[inside[key]] for key in keys])
        eager, *in_order = (_peer([np.where(inside[key], self._relative(p, key), 0) for key in keys]) for p in self.peers)
        nearest, bound = max(bounds, key=lambda pair: pair[0] / max(pair[1], 1e-300))
        found = RegionError(
            count=relative.size,
            squares=float((relative**2).sum()),
            eager=eager,
            in_order=tuple(in_order),
            mean=float(relative.mean()),
            p99=float(np.quantile(relative, 0.99)),
            max=nearest,
            bound=bound,
        )
        return found, broken

    def _relative(self, outputs: Mapping[str, Array], key: str) -> Array:
        error: Array = np.abs(outputs[key] - self.truth[key]) / np.sqrt(mean_square(self.truth[key]))
        return error

    def _bound(self, outputs: Mapping[str, Array], key: str, inside: Array) -> tuple[float, float]:
        """Return the largest error, and the largest allowed."""
        truth = self.truth[key]
        peers = [(peer[key] - truth)[inside] for peer in self.peers]
        return float(np.abs(outputs[key] - truth)[inside].max()), allowed_error(peers, truth, self.slack)


def _peer(errors: list[Array]) -> PeerError:
    """Sum up an evaluation in PyTorch; the errors are 0 outside the region."""
    rows = np.concatenate([(error**2).sum(-1).ravel() for error in errors])
    squares = float(rows.sum()) if np.isfinite(rows).all() else float("nan")
    return PeerError(squares, rows=squares**2 / float((rows**2).sum()) if squares > 0 else 0.0)


def _cosine(a: Array, b: Array) -> float:
    norms = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norms if norms else 1.0


def truth_and_bounds(
    checkpoint: Checkpoint, inputs: dict[str, Array], interface: Interface, precision: Precision
) -> tuple[dict[str, Array], dict[str, float]]:
    """Return the float64 outputs on the rounded weights, and the largest error that the per-case rule allows for each.

    Args:
        checkpoint: the layer with its original weights.
        inputs: float32 arrays that ``precision`` represents exactly, and bool masks.
        interface: decides whether attention maps are outputs.
        precision: of the weights and of the evaluations in PyTorch.
    """
    dtype = DTYPES[precision]
    rounded = rounded_checkpoint(checkpoint, dtype)
    truth, largest = true_outputs(rounded.module(torch.float64), inputs, interface)
    peers = evaluations(rounded.module(dtype), inputs, interface, dtype, ORDERS)
    slack = roundoff_slack(checkpoint.spec, precision, largest)
    return truth, {name: allowed_error([peer[name] - true for peer in peers], true, slack) for name, true in truth.items()}


def roundoff_slack(spec: LayerSpec, precision: Precision, largest_logit: float) -> float:
    """Return what rounding alone may do to an output, relative to its largest value: ``4u(1 + L) + u32 * sqrt(K / 6)``.

    The first term is the logits'. The second is what a product of length K, the layer's widest, is off by on average when it is
    summed in order in float32: step k rounds a partial sum of variance k, so that the error's variance is the sum of
    ``k * u² / 3``, which is ``(u * K)² / 6``, against K for the sum itself. A case of a few values shows by chance that PyTorch
    was off by less.
    """
    widest = max(spec.dim, spec.context_dim, spec.inner_dim, spec.ff_hidden or 0, spec.context_ff_hidden or 0)
    logits = ROUNDOFF_FACTOR * UNIT_ROUNDOFF[precision] * (1 + largest_logit)
    return logits + UNIT_ROUNDOFF["fp32"] * float(np.sqrt(widest / 6))


def allowed_error(peer_errors: Sequence[Array], truth: Array, slack: float) -> float:
    """Return the largest error that the rule in parity/rule.py allows.

    Args:
        peer_errors: what each evaluation in PyTorch is off by; one that is not finite widens nothing.
        truth: the float64 output.
        slack: from :func:`roundoff_slack`.
    """
    largest = max((float(np.abs(error).max()) for error in peer_errors if np.isfinite(error).all()), default=0.0)
    return PEER_FACTOR * largest + slack * float(np.abs(truth).max())
