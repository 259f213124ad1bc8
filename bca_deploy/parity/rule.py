"""Is the exported model the same function? Measured against float64, beside PyTorch at the same precision.

The measure is the worst of several legitimate evaluations of the reference layer: PyTorch eager, and the same with every
product summed in order (layers/in_order.py), as the terms stand or shuffled. The rule has no tolerance to tune; docs/parity.md
derives it. With u the unit roundoff:

- pooled: over each family of cases the RMS error is at most 1.5 times the measure's, more where the pool is small;
- per case: the largest error is at most ``2 * the measure's largest + (4u(1 + L) + u32 * sqrt(K / 6)) * max|truth|``: L is the
  largest live |logit| that carries weight (rounding one of size L moves the attention by about ``u * L``), u32 is the unit
  roundoff of float32, and K the layer's widest dot product (parity/trial.py).

Only what does not pass beside eager alone is summed in order, and only what does not pass then in eight orders. NaN and Inf
never pass. Live and dead rows are judged apart. Truth is the reference layer in float64 on the same rounded weights; what
rounding the weights does is reported beside it.
"""

import contextlib
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from bca_deploy.errors import InputError, first_line
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.isolation import one_thread
from bca_deploy.layers.lowered_model import DTYPES
from bca_deploy.parity.cases import Case, Scope, Sharpness, matrix, round_to
from bca_deploy.parity.runners import Runner, at_edges, ort_runner, sharpened_copy, strict_runner_of
from bca_deploy.parity.trial import Trial
from bca_deploy.parity.truth import ORDERS, affordable_orders, masks_of
from bca_deploy.parity.verdict import OWN_INPUTS, CaseResult, Group, Verdict, in_doubt, pool, problems
from bca_deploy.parity.yardstick import Yardstick
from bca_deploy.signature import Dims
from bca_deploy.spec import Interface, Precision

Array = NDArray[Any]
Arrays = dict[str, Array]

#: The strict evaluator is plain numpy: cases with more attention weights than this are left to onnxruntime.
STRICT_WEIGHTS = 100_000
_STRICT = "strict evaluator"

#: A case of some matrix.
AnyCase = TypeVar("AnyCase", bound=Hashable)

#: From a model file, the subject's or a sharpened copy of it, to what runs it, by name.
Runtimes = Callable[[Path], dict[str, Runner]]


@dataclass(frozen=True)
class Subject:
    """A model file on trial.

    Attributes:
        path: the ``.onnx`` file.
        checkpoint: the layer it must equal, with the original weights.
        interface: its optional inputs and outputs.
        dims: the ranges of its dynamic dimensions.
        precision: what it computes in.
        keep_io_types: whether its edges are float32 whatever the precision.
    """

    path: Path
    checkpoint: Checkpoint
    interface: Interface
    dims: Dims
    precision: Precision
    keep_io_types: bool


def judge(
    subject: Subject,
    scope: Scope,
    on_case: Callable[[int, int], None] | None = None,
    runtimes: Runtimes | None = None,
    yardstick: Yardstick | None = None,
) -> Verdict:
    """Run the parity matrix over a model.

    Args:
        subject: the model and what it must equal.
        scope: ``quick`` (at least 40 cases) or ``full`` (at least 200).
        on_case: called after each case with the number done and the total, which grows where cases are in doubt.
        runtimes: what to run the model on instead of the CPU.
        yardstick: of the same layer and precision, where other models were held against it before.

    Returns:
        The verdict.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """
    # What only the strict evaluator can run must be small enough for it.
    limit = STRICT_WEIGHTS if subject.precision == "bf16" and runtimes is None else None
    cases = matrix(subject.checkpoint.spec, subject.interface, subject.dims, scope, limit)
    with contextlib.closing(_Bench(subject, yardstick, runtimes)) as bench:
        results = run_all(bench.run, cases, on_case or (lambda done, total: None))
    verdict = _verdict(subject, scope, results, bench.yardstick.weight_rounding())
    return verdict if runtimes is None else replace(verdict, notes=())  # the notes are about the CPU's runtimes


def run_all(
    run: Callable[[AnyCase, int], list[CaseResult]], cases: list[AnyCase], on_case: Callable[[int, int], None]
) -> list[CaseResult]:
    """Run the cases beside eager, and those in doubt once more beside more evaluations.

    Args:
        run: judges a case, beside eager and so many orders of sums.
        cases: to be run.
        on_case: as for :func:`judge`.
    """
    found: dict[AnyCase, list[CaseResult]] = {}
    done, again = 0, cases
    for orders in (0, 1, ORDERS):
        for at, case in enumerate(again, done + 1):
            found[case] = run(case, orders)
            on_case(at, done + len(again))
        done += len(again)
        results = [result for results in found.values() for result in results]
        doubtful = in_doubt(results)
        again = [case for case in cases if any((r.family, r.sharpness) in doubtful for r in found[case])]
    return results


def judge_inputs(subject: Subject, samples: Mapping[str, Mapping[str, Array]]) -> Verdict:
    """Hold a model to the per-case rule on the user's own inputs, unsharpened.

    Args:
        subject: the model and what it must equal.
        samples: inputs by name, by sample name; floats are rounded to the model's precision first.

    Returns:
        The verdict.

    Raises:
        InputError: a live row whose live keys all have the lowest bias: softmax is undefined there.
    """
    results: list[CaseResult] = []
    notes = []
    with contextlib.closing(_Bench(subject)) as bench:
        for name, sample in samples.items():
            refuse_undefined_rows(sample, subject.precision)
            inputs = _rounded(sample, subject.precision)
            orders = affordable_orders(inputs, subject.checkpoint.spec)
            if not orders:
                notes.append(f"{name}: too large to be summed in order, judged beside PyTorch eager alone")
            results += bench.judge(name, OWN_INPUTS, "plain", inputs, bench.yardstick.trial(inputs, orders=orders))
    verdict = _verdict(subject, "inputs", results, bench.yardstick.weight_rounding())
    return replace(verdict, notes=(*verdict.notes, *notes))


def refuse_undefined_rows(inputs: Mapping[str, Array], precision: Precision = "fp32") -> None:
    """Refuse a bias of -inf, or of the precision's lowest number, on every live key of a live row.

    There PyTorch attends to the masked keys too (their fill is no lower than the bias), which no caller can mean.

    Raises:
        InputError: naming the first such row.
    """
    if "rel_pos_bias" not in inputs:
        return
    bias = round_to(inputs["rel_pos_bias"], precision)
    batch = inputs["x"].shape[0]
    mask, context_mask = masks_of(inputs)
    lowest = float(torch.finfo(DTYPES[precision]).min)
    shut = np.broadcast_to(bias, (batch, *np.broadcast_shapes(bias.shape, (1, 1, 1))[-3:])) <= lowest
    for axis, own, other, what in ((-1, mask, context_mask, "x"), (-2, context_mask, mask, "context")):
        others = other[:, None, None, :] if axis == -1 else other[:, None, :, None]
        starved: Array = np.all(shut | ~others, axis=axis)
        rows: Array = starved & own[:, None] & np.any(other, axis=-1, keepdims=True)[:, None]
        if rows.any():
            where = tuple(int(i) for i in np.argwhere(rows)[0])
            raise InputError(
                f"rel_pos_bias is -inf or {lowest:.3g} on every live key of live {what} row (batch {where[0]}, "
                f"head {where[1]}, position {where[2]}): softmax is undefined there; use a number such as -1e4, or mask the row"
            )


def _rounded(sample: Mapping[str, Array], precision: Precision) -> dict[str, Array]:
    return {name: a if a.dtype == bool else round_to(a, precision) for name, a in sample.items()}


class _Bench:
    """Runs a subject's model on every runtime, a copy for each sharpness, and holds it against the yardstick; close it.

    PyTorch runs on one thread meanwhile: most cases are too small to share, and the report is then the same whatever the
    number of cores.
    """

    def __init__(self, subject: Subject, yardstick: Yardstick | None = None, runtimes: Runtimes | None = None) -> None:
        self.subject = subject
        self.yardstick = yardstick or Yardstick(subject.checkpoint, subject.interface, subject.precision)
        self.runtimes = runtimes or on_cpu(subject.precision)
        self.alone = contextlib.ExitStack()
        self.alone.enter_context(one_thread())
        self.made: dict[Sharpness, dict[str, Runner]] = {}
        self.copies = tempfile.TemporaryDirectory(prefix="bca-parity-")

    def close(self) -> None:
        self.copies.cleanup()
        self.alone.close()

    def run(self, case: Case, orders: int = 0) -> list[CaseResult]:
        inputs, trial = self.yardstick.case(case, orders)
        return self.judge(case.name, case.family, case.sharpness, inputs, trial)

    def judge(self, name: str, family: str, sharpness: Sharpness, inputs: Arrays, trial: Trial) -> list[CaseResult]:
        subject = self.subject
        small = _weights(inputs, subject.checkpoint.spec.heads) <= STRICT_WEIGHTS
        edges = at_edges(inputs, subject.precision, subject.keep_io_types)
        return [
            trial.judge(name, family, sharpness, runtime, outcome(runner, edges))
            for runtime, runner in self._runners(sharpness).items()
            if small or runtime != _STRICT or subject.precision == "bf16"
        ]

    def _runners(self, sharpness: Sharpness) -> dict[str, Runner]:
        if sharpness not in self.made:
            path, factor = self.subject.path, self.yardstick.factor(sharpness)
            self.made[sharpness] = self.runtimes(
                path if factor == 1.0 else sharpened_copy(path, factor, Path(self.copies.name))
            )
        return self.made[sharpness]


def on_cpu(precision: Precision) -> Runtimes:
    """Return what runs a model of this precision on the CPU."""

    def runtimes(path: Path) -> dict[str, Runner]:
        runners: dict[str, Runner] = {}
        if precision != "bf16":
            runners["onnxruntime"] = ort_runner(path)
        if precision != "fp32":
            runners[_STRICT] = strict_runner_of(path)
        return runners

    return runtimes


def outcome(runner: Runner, inputs: Mapping[str, Array]) -> dict[str, Array] | str:
    """Return the outputs, or why there are none: a runtime that fails on a case is a finding like any other."""
    try:
        return runner(inputs)
    except Exception as error:  # the runtimes' exceptions share no base
        return f"failed to run: {first_line(error)[:200]}"


def _weights(inputs: Mapping[str, Array], heads: int) -> int:
    return int(heads * inputs["x"].shape[0] * inputs["x"].shape[1] * inputs["context"].shape[1])


def _verdict(subject: Subject, scope: str, results: list[CaseResult], weight_rounding: float) -> Verdict:
    return verdict_of(subject.path.stem, subject.precision, scope, results, weight_rounding)


def verdict_of(model: str, precision: Precision, scope: str, results: list[CaseResult], weight_rounding: float) -> Verdict:
    """Return the verdict on a model by its results; arguments as :class:`Verdict` has them."""
    found = tuple(results)
    groups = pool(found)
    notes = (*_notes(precision), *_settled(groups))
    return Verdict(model, precision, scope, found, groups, problems(found, groups), weight_rounding, notes)


def _settled(groups: tuple[Group, ...]) -> Iterable[str]:
    for group in groups:
        if group.orders and group.family != OWN_INPUTS:
            yield (
                f"{group.family} {group.sharpness} under {group.runtime}: in doubt beside PyTorch eager alone, so held "
                f"against the {_measure(group.orders)}"
            )


def _measure(orders: int) -> str:
    return "worse of eager and of products summed in order" if orders == 1 else f"worst of eager and of {orders} orders of sums"


def _notes(precision: Precision) -> Iterable[str]:
    if precision == "bf16":
        yield "bf16 is judged by the strict evaluator only: onnxruntime has no bf16 MatMul on CPU"
    if precision != "fp32":
        yield f"the strict evaluator runs the cases of at most {STRICT_WEIGHTS} attention weights"
