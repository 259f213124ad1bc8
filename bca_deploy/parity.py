"""Is the exported model the same function? Measured against float64, beside PyTorch eager at the same precision.

The rule has no tolerance to tune. With u the unit roundoff of the precision:

- pooled: over each family of cases the RMS error is at most 1.5 times what PyTorch eager makes;
- per case: the largest error is at most ``2 * eager's largest + (4u(1 + L) + u32 * sqrt(K / 6)) * max|truth|``, where L is the
  largest live |logit| that carries weight (rounding a logit of size L moves the attention by about ``u * L``), u32 float32's
  unit roundoff and K the layer's widest dot product (see truth.py).

NaN and Inf never pass. Live and dead rows are judged apart. Truth is the reference layer in float64 on the same rounded
weights; what rounding the weights does is reported beside it.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bca_deploy.cases import Scope, Sharpness, make_inputs, matrix, round_to
from bca_deploy.checkpoint import Checkpoint
from bca_deploy.errors import InputError, first_line
from bca_deploy.isolation import one_thread
from bca_deploy.lowering import DTYPES
from bca_deploy.runners import Runner, at_edges, ort_runner, sharpened_copy, strict_runner_of
from bca_deploy.spec import Dims, Interface, Precision
from bca_deploy.truth import (
    allowed_error,
    live_rows,
    masks_of,
    mean_square,
    rounded_checkpoint,
    roundoff_slack,
    run_module,
    sharpen,
    sharpening,
    true_outputs,
)
from bca_deploy.verdict import OWN_INPUTS, REGIONS, CaseResult, Region, RegionError, Verdict, pool, problems

Array = NDArray[Any]

#: The strict evaluator is plain numpy: cases with more attention weights than this are left to onnxruntime.
STRICT_WEIGHTS = 100_000
_STRICT = "strict evaluator"

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
    subject: Subject, scope: Scope, on_case: Callable[[int, int], None] | None = None, runtimes: Runtimes | None = None
) -> Verdict:
    """Run the parity matrix over a model.

    Args:
        subject: the model and what it must equal.
        scope: ``quick`` (at least 40 cases) or ``full`` (at least 200).
        on_case: called after each case with the number done and the total.
        runtimes: what to run the model on instead of the CPU.

    Returns:
        The verdict.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """
    # What only the strict evaluator can run must be small enough for it.
    limit = STRICT_WEIGHTS if subject.precision == "bf16" and runtimes is None else None
    cases = matrix(subject.checkpoint.spec, subject.interface, subject.dims, scope, limit)
    results: list[CaseResult] = []
    with contextlib.closing(_Benches(subject, runtimes)) as benches:
        for done, case in enumerate(cases, 1):
            inputs = make_inputs(case, subject.checkpoint.spec, subject.interface, subject.precision)
            results += benches.run(case.name, case.family, case.sharpness, inputs)
            if on_case:
                on_case(done, len(cases))
    verdict = _verdict(subject, scope, results, benches.weight_rounding())
    return verdict if runtimes is None else replace(verdict, notes=())  # the notes are about the CPU's runtimes


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
    with contextlib.closing(_Benches(subject)) as benches:
        for name, sample in samples.items():
            refuse_undefined_rows(sample, subject.precision)
            results += benches.run(name, OWN_INPUTS, "plain", _rounded(sample, subject.precision))
    return _verdict(subject, "inputs", results, benches.weight_rounding())


def refuse_undefined_rows(inputs: Mapping[str, Array], precision: Precision = "fp32") -> None:
    """Refuse a bias of -inf, or of the precision's lowest number, on every live key of a live row.

    There PyTorch attends to the masked keys too (their fill is no lower than the bias), which no caller can mean; the fused
    graph gives NaN, or attends to the live keys alone.

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


@dataclass(frozen=True)
class _Bench:
    """Everything that runs a case at one sharpness."""

    truth: nn.Module
    eager: nn.Module
    runners: dict[str, Runner]


class _Benches:
    """The benches of one subject, one per sharpness, made on first use; close it.

    PyTorch runs on one thread meanwhile: most cases are too small to share, and the report is then the same whatever the
    number of cores.
    """

    def __init__(self, subject: Subject, runtimes: Runtimes | None = None) -> None:
        self.subject = subject
        self.runtimes = runtimes or _on_cpu(subject.precision)
        self.alone = contextlib.ExitStack()
        self.alone.enter_context(one_thread())
        self.made: dict[Sharpness, _Bench] = {}
        self.copies = tempfile.TemporaryDirectory(prefix="bca-parity-")
        self.changes: list[float] = []

    def close(self) -> None:
        self.copies.cleanup()
        self.alone.close()

    def run(self, name: str, family: str, sharpness: Sharpness, inputs: dict[str, Array]) -> list[CaseResult]:
        if sharpness not in self.made:
            self.made[sharpness] = self._make(sharpness)
        bench, subject = self.made[sharpness], self.subject
        truth, largest_logit = true_outputs(bench.truth, inputs, subject.interface)
        eager = run_module(bench.eager, inputs, subject.interface, DTYPES[subject.precision])
        if sharpness == "plain" and len(self.changes) < 4:
            self.changes.append(self._weight_change(inputs, truth))
        slack = roundoff_slack(subject.checkpoint.spec, subject.precision, largest_logit)
        trial = _Trial(truth, eager, live_rows(inputs, truth), slack)
        small = _weights(inputs, subject.checkpoint.spec.heads) <= STRICT_WEIGHTS
        edges = at_edges(inputs, subject.precision, subject.keep_io_types)
        return [
            trial.judge(name, family, sharpness, runtime, _outcome(runner, edges))
            for runtime, runner in bench.runners.items()
            if small or runtime != _STRICT or subject.precision == "bf16"
        ]

    def _make(self, sharpness: Sharpness) -> _Bench:
        subject = self.subject
        dtype = DTYPES[subject.precision]
        rounded = rounded_checkpoint(subject.checkpoint, dtype)
        factor = sharpening(rounded, sharpness, subject.precision)
        sharp = Checkpoint(rounded.spec, sharpen(rounded.state, factor))
        path = subject.path if factor == 1.0 else sharpened_copy(subject.path, factor, Path(self.copies.name))
        return _Bench(sharp.module(torch.float64), sharp.module(dtype), self.runtimes(path))

    def _weight_change(self, inputs: dict[str, Array], truth: dict[str, Array]) -> float:
        exact = run_module(self.subject.checkpoint.module(torch.float64), inputs, self.subject.interface, torch.float64)
        return float(np.sqrt(np.mean([np.mean((truth[k] - exact[k]) ** 2) / mean_square(exact[k]) for k in truth])))

    def weight_rounding(self) -> float:
        return float(np.mean(self.changes)) if self.changes else 0.0


def _on_cpu(precision: Precision) -> Runtimes:
    def runtimes(path: Path) -> dict[str, Runner]:
        runners: dict[str, Runner] = {}
        if precision != "bf16":
            runners["onnxruntime"] = ort_runner(path)
        if precision != "fp32":
            runners[_STRICT] = strict_runner_of(path)
        return runners

    return runtimes


def _outcome(runner: Runner, inputs: Mapping[str, Array]) -> dict[str, Array] | str:
    """Return the outputs, or why there are none: a runtime that fails on a case is a finding like any other."""
    try:
        return runner(inputs)
    except Exception as error:  # the runtimes' exceptions share no base
        return f"failed to run: {first_line(error)[:200]}"


def _weights(inputs: Mapping[str, Array], heads: int) -> int:
    return int(heads * inputs["x"].shape[0] * inputs["x"].shape[1] * inputs["context"].shape[1])


@dataclass(frozen=True)
class _Trial:
    """One case's truth and eager results, ready to judge any runtime's outputs."""

    truth: dict[str, Array]
    eager: dict[str, Array]
    live: dict[str, Array]
    slack: float

    def judge(
        self, name: str, family: str, sharpness: Sharpness, runtime: str, outputs: Mapping[str, Array] | str
    ) -> CaseResult:
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
        relative, eager_relative, broken, tightest = [], [], [], (0.0, np.inf)
        for key, truth in self.truth.items():
            rows = self.live[key] == (region == "live")
            if not rows.any():
                continue
            error, eager = np.abs(outputs[key] - truth)[rows], np.abs(self.eager[key] - truth)[rows]
            bound = allowed_error(eager, truth, self.slack)
            worst = float(error.max())
            if not worst <= bound:
                broken.append(f"{key}, {region} rows: largest error {worst:.3g}, allowed {bound:.3g}")
            tightest = max(tightest, (worst, bound), key=lambda pair: pair[0] / max(pair[1], 1e-300))
            scale = np.sqrt(mean_square(truth))
            relative.append(error / scale)
            eager_relative.append(eager / scale)
        if not relative:
            return None, []
        return _region_error(np.concatenate(relative), np.concatenate(eager_relative), tightest), broken


def _region_error(relative: Array, eager: Array, tightest: tuple[float, float]) -> RegionError:
    return RegionError(
        count=relative.size,
        squares=float((relative**2).sum()),
        eager_squares=float((eager**2).sum()) if np.isfinite(eager).all() else float("nan"),
        mean=float(relative.mean()),
        p99=float(np.quantile(relative, 0.99)),
        max=tightest[0],
        bound=tightest[1],
    )


def _cosine(a: Array, b: Array) -> float:
    norms = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norms if norms else 1.0


def _verdict(subject: Subject, scope: str, results: list[CaseResult], weight_rounding: float) -> Verdict:
    found = tuple(results)
    groups = pool(found)
    return Verdict(
        subject.path.stem,
        subject.precision,
        scope,
        found,
        groups,
        problems(found, groups),
        weight_rounding,
        tuple(_notes(subject)),
    )


def _notes(subject: Subject) -> Iterable[str]:
    if subject.precision == "bf16":
        yield "bf16 is judged by the strict evaluator only: onnxruntime has no bf16 MatMul on CPU"
    if subject.precision != "fp32":
        yield f"the strict evaluator runs the cases of at most {STRICT_WEIGHTS} attention weights"
