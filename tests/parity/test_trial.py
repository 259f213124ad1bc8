"""The per-case rule: what one case may be off by."""

import numpy as np
import pytest
import torch
from support.layers import make_checkpoint, make_spec

from bca_deploy.parity import trial, truth
from bca_deploy.parity.cases import Case, make_inputs
from bca_deploy.parity.trial import Trial, allowed_error, roundoff_slack, truth_and_bounds
from bca_deploy.spec import Interface

TRUTH = {"out": np.ones((1, 2, 4)), "context_out": np.ones((1, 3, 4))}
LIVE = {
    "out": np.ones((1, 2, 4), bool),
    "context_out": np.broadcast_to(np.array([True, False, True])[None, :, None], (1, 3, 4)),
}


def off_by(amount: float, *rows: int) -> dict[str, np.ndarray]:
    """The truth, and wrong by so much in these rows of context_out."""
    found = {name: array.copy() for name, array in TRUTH.items()}
    found["context_out"][:, list(rows)] += amount
    return found


def test_the_allowed_error_follows_the_rule() -> None:
    error, truth = np.array([-0.5, 0.25]), np.array([3.0, -4.0])
    assert allowed_error([error], truth, 0.01) == pytest.approx(2 * 0.5 + 0.01 * 4)
    assert allowed_error([error, error * 3], truth, 0.01) == pytest.approx(2 * 1.5 + 0.01 * 4), "the worse of two counts"


def test_the_slack_grows_with_the_logits_and_with_the_widest_product() -> None:
    spec, u = make_spec(dim=96, context_dim=16), 2.0**-24
    assert roundoff_slack(spec, "fp32", 9.0) == pytest.approx(4 * u * 10 + u * 4)
    assert roundoff_slack(spec, "fp16", 0.0) == pytest.approx(4 * 2.0**-11 + u * 4)


def test_an_evaluation_that_is_not_finite_widens_nothing() -> None:
    assert allowed_error([np.array([np.nan, 9.0])], np.array([1.0]), 0.01) == pytest.approx(0.01)
    assert allowed_error([np.array([np.inf]), np.array([0.1])], np.array([1.0]), 0.0) == pytest.approx(0.2)


def test_live_and_dead_rows_are_judged_apart() -> None:
    judge = Trial(TRUTH, [off_by(0.01, 0), off_by(0.02, 0, 2)], LIVE, slack=0.0).judge
    assert judge("c", "f", "plain", "r", off_by(0.04, 2)).failures == ()
    assert judge("c", "f", "plain", "r", off_by(0.05, 2)).failures == (
        "context_out, live rows: largest error 0.05, allowed 0.04",
    )
    assert judge("c", "f", "plain", "r", off_by(0.01, 1)).failures == ("context_out, dead rows: largest error 0.01, allowed 0",)


def test_the_rows_that_carry_an_error_are_counted() -> None:
    one, both = (Trial(TRUTH, [off_by(0.01, *rows)], LIVE, 1.0) for rows in ((0,), (0, 2)))
    for judged, rows in ((one, 1), (both, 2)):
        assert judged.judge("c", "f", "plain", "r", TRUTH).regions["live"].eager.rows == pytest.approx(rows)


def test_the_self_tests_bounds_allow_for_every_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch eager is made nearly exact: what is allowed then comes from the sums in order."""
    checkpoint, interface = make_checkpoint(), Interface()
    inputs = make_inputs(Case("padded", "plain", 2, 7, 5, 0), checkpoint.spec, interface, "fp32")
    exact = checkpoint.module(torch.float64)
    run = truth.run_module
    monkeypatch.setattr(truth, "run_module", lambda _, inputs, interface, __: run(exact, inputs, interface, torch.float64))
    true, bounds = truth_and_bounds(checkpoint, inputs, interface, "fp32")
    least = {name: roundoff_slack(checkpoint.spec, "fp32", 0.0) * float(np.abs(values).max()) for name, values in true.items()}
    monkeypatch.setattr(trial, "ORDERS", 0)
    _, without = truth_and_bounds(checkpoint, inputs, interface, "fp32")
    assert all(bounds[name] > without[name] + 0.1 * least[name] for name in bounds)
