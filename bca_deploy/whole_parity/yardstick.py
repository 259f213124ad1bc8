"""What every graph of one precision is held against: the model in float64, and what PyTorch makes of it beside that."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bca_deploy.errors import InputError
from bca_deploy.layers.lowered_model import DTYPES
from bca_deploy.parity.trial import ROUNDOFF_FACTOR, Trial, allowed_error
from bca_deploy.parity.truth import mean_square
from bca_deploy.spec import UNIT_ROUNDOFF, Precision
from bca_deploy.whole.find import Found
from bca_deploy.whole_parity.evaluate import Evaluation, Evaluator, largest_logit, live_of

Arrays = dict[str, NDArray[Any]]

# Sums in order beside eager, for the bounds that a bundle keeps: each is a hundred times slower than eager.
_KEPT_ORDERS = 1
_FLOAT16_MAX = float(np.finfo(np.float16).max)
# How many cases tell what rounding the weights does.
_CHANGES = 4


@dataclass(frozen=True)
class Hearing:
    """What one output is held against.

    Attributes:
        trial: its truth and what PyTorch makes of it, 0 where PyTorch gives no finite number.
        defined: where it gives a number, or infinity at both precisions.
        infinite: that infinity, 0 elsewhere.
    """

    trial: Trial
    defined: NDArray[Any]
    infinite: NDArray[Any]

    def shown(self, output: NDArray[Any]) -> NDArray[Any] | str:
        """Return an output as the trial takes it: where PyTorch gives no number, it need not either.

        Returns:
            A sentence where it is not infinite as PyTorch's is: what masks logits by it would let them pass.
        """
        flat, endless = _flat(output), self.infinite != 0
        if flat.shape != self.defined.shape:
            return flat
        if count := int((flat != self.infinite)[endless].sum()):
            return f"{count} of {int(endless.sum())} values are not the infinity that PyTorch's are"
        return np.where(self.defined & ~endless, flat, 0)


def _hearing(name: str, true: NDArray[Any], peers: Sequence[Arrays], live: NDArray[Any], slack: float) -> Hearing:
    *judged, usual = peers
    wide, alike = (_flat(array).astype(np.float64) for array in (true, usual[name]))
    infinite = np.where(np.isinf(wide) & (wide == alike), wide, 0.0)
    defined = np.isfinite(wide) & ~np.isnan(alike)
    shown = [{name: np.where(defined, _flat(a).astype(np.float64), 0.0)} for a in (true, *(peer[name] for peer in judged))]
    return Hearing(Trial(shown[0], shown[1:], {name: _flat(live)}, slack), defined | (infinite != 0), infinite)


def _off(true: NDArray[Any], got: NDArray[Any]) -> float:
    """Return the sum of the squared errors; what is not finite is off by nothing, and widens nothing."""
    finite = np.isfinite(true.astype(np.float64))
    found = float(np.square(got[finite].astype(np.float64) - true[finite].astype(np.float64)).sum())
    return found if np.isfinite(found) else -1.0


def _finite(array: NDArray[Any]) -> NDArray[Any]:
    return np.nan_to_num(array.astype(np.float64), posinf=0.0, neginf=0.0)


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    return np.atleast_1d(array)


class Runs(Protocol):
    """A model at one precision, as :class:`bca_deploy.whole_parity.evaluate.Evaluator` has it in PyTorch."""

    def run(self, inputs: Mapping[str, NDArray[Any]], order: int | None = None) -> Evaluation:
        """Run it; sums in an order, or as they come."""

    def run_as_usual(self, inputs: Mapping[str, NDArray[Any]]) -> Evaluation:
        """Run it as users do."""

    def run_with_bias_apart(self, inputs: Mapping[str, NDArray[Any]]) -> Evaluation:
        """Run it with biases added to rounded products."""


class Yardstick:
    """What every graph of one precision is held against.

    Args:
        model: from :func:`bca_deploy.whole.swap.plain_copy`.
        founds: its layers.
        precision: of the graphs.
    """

    _exact: Runs
    _rounded: Runs
    _unrounded: Runs | None

    def __init__(self, model: nn.Module, founds: Sequence[Found], precision: Precision) -> None:
        dtype = DTYPES[precision]
        rounded = copy.deepcopy(model).to(dtype)
        self.precision = precision
        # In float32 the weights are what they were.
        self._unrounded = Evaluator(model, (), torch.float64) if precision != "fp32" else None
        self._changes: list[float] = []
        self._exact = Evaluator(rounded, founds, torch.float64)
        self._rounded = Evaluator(rounded, founds, dtype)
        self._layers = {found.path: found.checkpoint.module(torch.float64) for found in founds}
        self._widest = widest_product(model.state_dict())

    def hearings(self, inputs: Arrays, orders: int) -> dict[str, Hearing]:
        """Return for every output and every tap what it is held against."""
        return self._hearings(inputs, self._exact.run(inputs), orders)

    def _hearings(self, inputs: Arrays, truth: Evaluation, orders: int) -> dict[str, Hearing]:
        eager, usual = self._rounded.run(inputs), self._rounded.run_as_usual(inputs)
        in_order = [self._rounded.run(inputs, order).with_taps() for order in range(orders)]
        if len(self._changes) < _CHANGES:
            self._changes.append(self._change(inputs, truth))
        live, slack = self._live(truth), self.slack(truth)
        trues, peers = truth.with_taps(), [eager.with_taps()]
        if self.precision != "fp32":  # there a second rounding is as large as the first
            peers.append(self._rounded.run_with_bias_apart(inputs).with_taps())
        worst = {name: max((peer[name] for peer in peers), key=partial(_off, true)) for name, true in trues.items()}
        evaluations = [worst, *in_order, usual.with_taps()]
        return {name: _hearing(name, true, evaluations, live[name], slack) for name, true in trues.items()}

    def truth_and_bounds(self, inputs: Arrays) -> tuple[Arrays, dict[str, float]]:
        """Return the float64 outputs, and the largest error that the per-case rule allows for each.

        Returns:
            None of either where PyTorch itself gives no number somewhere.
        """
        truth = self._exact.run(inputs)
        hearings = self._hearings(inputs, truth, _KEPT_ORDERS)
        if not all(hearings[name].defined.all() for name in truth.outputs):
            return {}, {}
        return truth.outputs, {name: _bound(name, hearings[name].trial) for name in truth.outputs}

    def check_range(self, inputs: Arrays, name: str) -> None:
        """Refuse inputs at which a layer's logits leave float16: every form of it gives NaN there, PyTorch's too.

        Raises:
            InputError: naming the layer, what its logits reach, and ``name``.
        """
        for call in self._exact.run(inputs).calls:
            reached = call.largest_logit(self._layers[call.path])
            if reached > _FLOAT16_MAX:
                raise InputError(
                    f"precision fp16: the logits of {call.path or 'the layer'} reach {reached:.3g} in {name}, and float16 ends "
                    f"at {_FLOAT16_MAX:g}; take bf16 or fp32"
                )

    def weight_rounding(self) -> float:
        """Return the RMS change of the outputs, relative, that rounding the weights makes in the first cases."""
        return float(np.mean(self._changes)) if self._changes else 0.0

    def _change(self, inputs: Arrays, truth: Evaluation) -> float:
        if self._unrounded is None:
            return 0.0
        exact = self._unrounded.run(inputs).outputs
        pairs = [(_finite(truth.outputs[name]), _finite(a)) for name, a in exact.items()]
        return float(np.sqrt(np.mean([np.mean((rounded - a) ** 2) / mean_square(a) for rounded, a in pairs])))

    def truth(self, inputs: Arrays) -> Evaluation:
        """Return the model in float64."""
        return self._exact.run(inputs)

    def _live(self, truth: Evaluation) -> Arrays:
        return live_of(truth)

    def _logit(self, truth: Evaluation) -> float:
        return largest_logit(truth, self._layers)

    def slack(self, truth: Evaluation) -> float:
        """As :func:`bca_deploy.parity.trial.roundoff_slack`, with the model's widest product."""
        logits = ROUNDOFF_FACTOR * UNIT_ROUNDOFF[self.precision] * (1 + self._logit(truth))
        return logits + UNIT_ROUNDOFF["fp32"] * float(np.sqrt(self._widest / 6))


def widest_product(weights: Mapping[str, Tensor]) -> int:
    """Return how many terms a model's longest product sums."""
    return max((tensor[0].numel() for tensor in weights.values() if tensor.ndim > 1 and len(tensor)), default=1)


def _bound(name: str, trial: Trial) -> float:
    return allowed_error([peer[name] - trial.truth[name] for peer in trial.peers], trial.truth[name], trial.slack)


def refuse_random(evaluator: Evaluator, inputs: Arrays) -> None:
    """Refuse a model that gives something else the second time.

    Raises:
        InputError: naming the output.
    """
    once, again = evaluator.run(inputs).outputs, evaluator.run(inputs).outputs
    for name, array in once.items():
        if not np.array_equal(array, again[name], equal_nan=array.dtype.kind == "f"):
            raise InputError(
                f"output {name} is not the same when the model runs twice on one input: it draws random numbers, or keeps "
                "state from call to call; in eval mode a model to be exported does neither"
            )
