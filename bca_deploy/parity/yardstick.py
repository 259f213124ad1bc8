"""What every model of one precision is held against: of each case the truth, and what PyTorch makes of it. Made once."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.lowered_model import DTYPES
from bca_deploy.parity.cases import Case, Sharpness, make_inputs
from bca_deploy.parity.trial import Trial, roundoff_slack
from bca_deploy.parity.truth import (
    evaluations,
    live_rows,
    mean_square,
    rounded_checkpoint,
    run_module,
    sharpen,
    sharpening,
    true_outputs,
)
from bca_deploy.spec import Interface, Precision

Inputs = dict[str, NDArray[Any]]

# How many cases tell what rounding the weights does.
_CHANGES = 4


class Yardstick:
    """The reference layer at one precision, with its weights rounded to it.

    Args:
        checkpoint: the layer with its original weights.
        interface: its optional inputs and outputs.
        precision: of the models to be judged.
    """

    def __init__(self, checkpoint: Checkpoint, interface: Interface, precision: Precision) -> None:
        self.interface, self.precision, self.spec = interface, precision, checkpoint.spec
        self._exact = checkpoint
        self._rounded = rounded_checkpoint(checkpoint, DTYPES[precision])
        self._factors: dict[Sharpness, float] = {}
        self._modules: dict[Sharpness, tuple[nn.Module, nn.Module]] = {}
        self._cases: dict[tuple[Case, int], tuple[Inputs, Trial]] = {}
        self._changes: list[float] = []

    def factor(self, sharpness: Sharpness) -> float:
        """Return what ``to_qk`` is multiplied by for this sharpness."""
        if sharpness not in self._factors:
            self._factors[sharpness] = sharpening(self._rounded, sharpness, self.precision)
        return self._factors[sharpness]

    def case(self, case: Case, orders: int = 0) -> tuple[Inputs, Trial]:
        """Return a case's inputs and what its outputs are held against; arguments as for :meth:`trial`."""
        key = case, orders
        if key in self._cases:
            return self._cases[key]
        inputs = make_inputs(case, self.spec, self.interface, self.precision)
        made = inputs, self.trial(inputs, case.sharpness, orders)
        if not self.interface.attention_maps:  # those are too large to keep, and no second model has them
            self._cases[key] = made
        return made

    def trial(self, inputs: Inputs, sharpness: Sharpness = "plain", orders: int = 0) -> Trial:
        """Run the reference.

        Args:
            inputs: by name; floats are float32 and exact in the precision.
            sharpness: of the logits.
            orders: in how many orders to sum products, beside PyTorch eager.
        """
        exact, rounded = self._at(sharpness)
        truth, largest_logit = true_outputs(exact, inputs, self.interface)
        if sharpness == "plain" and len(self._changes) < _CHANGES:
            self._changes.append(self._change(inputs, truth))
        peers = evaluations(rounded, inputs, self.interface, DTYPES[self.precision], orders)
        return Trial(truth, peers, live_rows(inputs, truth), roundoff_slack(self.spec, self.precision, largest_logit))

    def weight_rounding(self) -> float:
        """Return the RMS change of the outputs, relative, that rounding the weights makes in the first cases."""
        return float(np.mean(self._changes)) if self._changes else 0.0

    def _at(self, sharpness: Sharpness) -> tuple[nn.Module, nn.Module]:
        """Return the reference in float64 and at the precision."""
        if sharpness not in self._modules:
            sharp = Checkpoint(self.spec, sharpen(self._rounded.state, self.factor(sharpness)))
            self._modules[sharpness] = sharp.module(torch.float64), sharp.module(DTYPES[self.precision])
        return self._modules[sharpness]

    def _change(self, inputs: Mapping[str, NDArray[Any]], truth: dict[str, NDArray[Any]]) -> float:
        exact = run_module(self._exact.module(torch.float64), inputs, self.interface, torch.float64)
        return float(np.sqrt(np.mean([np.mean((truth[k] - exact[k]) ** 2) / mean_square(exact[k]) for k in truth])))
