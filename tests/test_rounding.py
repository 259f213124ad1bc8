"""The allowance between two right results is wide enough for rounding, and far too narrow for anything else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.layers import make_checkpoint
from support.requests import make, truth
from support.rounding import LARGEST_LOGIT, WIDEST, allowance, is_same

from bca_deploy.bundle.manifest import WEIGHTS_FILE
from bca_deploy.bundle.read import Bundle
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.stored.weight_files import read
from bca_deploy.parity.truth import true_outputs
from bca_deploy.spec import UNIT_ROUNDOFF, Interface


def fixture_layer(repository: Path) -> Checkpoint:
    with Bundle.open(repository / "tests" / "fixtures" / "format1") as bundle:
        return Checkpoint(bundle.manifest.layer, read(bundle.path(WEIGHTS_FILE)))


@pytest.mark.parametrize("which", ["exported", "format1"])
def test_the_small_layers_have_the_logits_and_the_widths_that_the_allowance_is_made_for(repository: Path, which: str) -> None:
    checkpoint = make_checkpoint(prenorm=True) if which == "exported" else fixture_layer(repository)
    spec = checkpoint.spec
    assert max(spec.dim, spec.context_dim, spec.inner_dim) <= WIDEST
    random = np.random.default_rng(0)
    for batch, x_len, context_len in ((1, 1, 1), (4, 16, 16), (8, 64, 64)):
        inputs = {"x": random.standard_normal((batch, x_len, spec.dim))}
        inputs["context"] = random.standard_normal((batch, context_len, spec.context_dim))
        _, largest = true_outputs(checkpoint.module(torch.float64), inputs, Interface(False, False), np.inf)
        assert largest <= LARGEST_LOGIT


def test_results_of_other_inputs_are_not_the_same_in_any_precision() -> None:
    layer = make_checkpoint(prenorm=True).module(torch.float64)
    one, other = (truth(layer, make(2, 5, 3, seed)) for seed in (0, 1))
    masked = truth(layer, make(2, 5, 3) | {"mask": np.ones((2, 5), bool)})
    for precision in ("fp32", "fp16"):
        for a, b, c in zip(one, other, masked, strict=True):
            assert is_same(a, a * (1 + allowance(precision) / 2), precision)
            assert not is_same(a, b, precision)
            assert not is_same(a, c, precision)


def test_shape_and_dtype_are_part_of_the_result_and_nan_is_none() -> None:
    ones = np.ones((2, 3), np.float32)
    assert is_same(torch.ones(2, 3), ones)
    assert is_same(ones + np.float32(4 * UNIT_ROUNDOFF["fp32"]), ones)
    assert not is_same(ones[:1], ones)
    assert not is_same(ones.astype(np.float64), ones)
    assert not is_same(ones * np.nan, ones)
    assert not is_same(ones, ones * np.nan)
