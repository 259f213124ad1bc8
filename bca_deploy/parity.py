"""Is the exported model the same function? Measured against float64, beside PyTorch eager at the same precision.

The rule has no tolerance to tune. With u the unit roundoff of the precision:

- pooled: over each family of cases the RMS error is at most 1.5 times what PyTorch eager makes;
- per case: the largest error is at most ``2 * eager's largest + 4 * u * (1 + L) * max|truth|``, where L is the largest live
  |logit| that carries weight: rounding a logit of size L moves the attention by about ``u * L``.

NaN and Inf never pass. Live and dead rows are judged apart. Truth is the reference layer in float64 on the same rounded
weights; what rounding the weights does is reported beside it.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bca_deploy.attention import BidirectionalCrossAttention
from bca_deploy.cases import LOGIT_TARGETS, NUMPY_DTYPES, Case, Scope, Sharpness, make_inputs, matrix
from bca_deploy.checkpoint import Checkpoint, State
from bca_deploy.errors import InputError
from bca_deploy.lowering import DTYPES
from bca_deploy.runners import Runner, is_query_weight, ort_runner, sharpened_copy, strict_runner_of
from bca_deploy.spec import UNIT_ROUNDOFF, Dims, Interface, Precision

Array = NDArray[Any]
Region = Literal["live", "dead"]
REGIONS: tuple[Region, ...] = get_args(Region)

POOLED_RATIO = 1.5
EAGER_FACTOR = 2.0
ROUNDOFF_FACTOR = 4.0

#: The strict evaluator is plain numpy: cases with more attention weights than this are left to onnxruntime.
STRICT_WEIGHTS = 100_000
# Logits this far below their row's and their column's maximum weigh exp(-50), nothing at any precision here.
_WEIGHTLESS = 50.0


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


@dataclass(frozen=True)
class RegionError:
    """Errors over the live or the dead rows of one case, relative to the RMS of each output's truth except where said.

    Attributes:
        count: values compared.
        squares: sum of the squared relative errors.
        eager_squares: the same for PyTorch eager; NaN where eager is not finite.
        mean: mean relative error.
        p99: 99th percentile.
        max: largest absolute error.
        bound: what the rule allows for ``max``, at the output where it is tightest.
    """

    count: int
    squares: float
    eager_squares: float
    mean: float
    p99: float
    max: float
    bound: float


@dataclass(frozen=True)
class CaseResult:
    """What one runtime made of one case."""

    case: str
    family: str
    sharpness: Sharpness
    runtime: str
    regions: dict[Region, RegionError]
    cosine: float
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """All cases of one family and sharpness under one runtime; ratios are RMS error over eager's, None where empty."""

    family: str
    sharpness: Sharpness
    runtime: str
    cases: int
    live_ratio: float | None
    dead_ratio: float | None
    rms: float
    mean: float
    p99: float
    max: float
    cosine: float


@dataclass(frozen=True)
class Verdict:
    """The outcome for one model; true where it passed.

    Attributes:
        precision: of the model.
        scope: ``quick`` or ``full``, or ``inputs`` for the user's own.
        results: every case under every runtime.
        groups: the same pooled.
        failures: one sentence each; empty where it passed.
        weight_rounding: RMS change of the outputs, relative, from rounding the weights to the precision; no part of the rule.
        notes: what was left out, and why.
    """

    precision: Precision
    scope: str
    results: tuple[CaseResult, ...]
    groups: tuple[Group, ...]
    failures: tuple[str, ...]
    weight_rounding: float
    notes: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        return not self.failures

    def joined(self, other: "Verdict") -> "Verdict":
        """Return this verdict with the other's cases, groups and failures added."""
        return replace(
            self,
            results=self.results + other.results,
            groups=self.groups + other.groups,
            failures=self.failures + other.failures,
        )

    @property
    def worst_ratio(self) -> float:
        """The largest pooled ratio of any group and region."""
        ratios = [ratio for group in self.groups for ratio in (group.live_ratio, group.dead_ratio) if ratio is not None]
        return max(ratios, default=0.0)

    @property
    def cases(self) -> int:
        """Distinct cases, however many runtimes ran each."""
        return len({result.case for result in self.results})


def judge(subject: Subject, scope: Scope, on_case: Callable[[int, int], None] | None = None) -> Verdict:
    """Run the parity matrix over a model.

    Args:
        subject: the model and what it must equal.
        scope: ``quick`` (at least 40 cases) or ``full`` (at least 200).
        on_case: called after each case with the number done and the total.

    Returns:
        The verdict.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """
    cases = matrix(subject.checkpoint.spec, subject.interface, subject.dims, scope)
    results: list[CaseResult] = []
    with contextlib.closing(_Benches(subject)) as benches:
        for done, case in enumerate(cases, 1):
            inputs = make_inputs(case, subject.checkpoint.spec, subject.interface, subject.precision)
            results += benches.run(case.name, case.family, case.sharpness, inputs)
            if on_case:
                on_case(done, len(cases))
    return _verdict(subject, scope, results, benches.weight_rounding())


def judge_inputs(subject: Subject, samples: Mapping[str, Mapping[str, Array]]) -> Verdict:
    """Hold a model to the rule on the user's own inputs, unsharpened.

    Args:
        subject: the model and what it must equal.
        samples: inputs by name, by sample name; floats are rounded to the model's precision first.

    Returns:
        The verdict.

    Raises:
        InputError: a live row whose live keys all have a bias of -inf: softmax is undefined there.
    """
    results: list[CaseResult] = []
    with contextlib.closing(_Benches(subject)) as benches:
        for name, sample in samples.items():
            refuse_undefined_rows(sample)
            results += benches.run(name, "own inputs", "plain", _rounded(sample, subject.precision))
    return _verdict(subject, "inputs", results, benches.weight_rounding())


def refuse_undefined_rows(inputs: Mapping[str, Array]) -> None:
    """Refuse a bias of -inf on every live key of a live row.

    There PyTorch attends to the masked keys (their fill is finite, the bias is not), which no caller can mean; the fused
    graph gives NaN.

    Raises:
        InputError: naming the first such row.
    """
    bias = inputs.get("rel_pos_bias")
    if bias is None or np.isfinite(bias).all():
        return
    batch = inputs["x"].shape[0]
    mask, context_mask = _masks(inputs)
    shut = np.isneginf(np.broadcast_to(bias, (batch, *np.broadcast_shapes(bias.shape, (1, 1, 1))[-3:])))
    for axis, own, other, what in ((-1, mask, context_mask, "x"), (-2, context_mask, mask, "context")):
        others = other[:, None, None, :] if axis == -1 else other[:, None, :, None]
        starved: Array = np.all(shut | ~others, axis=axis)
        rows: Array = starved & own[:, None] & np.any(other, axis=-1, keepdims=True)[:, None]
        if rows.any():
            where = tuple(int(i) for i in np.argwhere(rows)[0])
            raise InputError(
                f"rel_pos_bias is -inf on every live key of live {what} row (batch {where[0]}, head {where[1]}, position "
                f"{where[2]}): softmax is undefined there; use a large negative number such as -1e4, or mask the row"
            )


def _rounded(sample: Mapping[str, Array], precision: Precision) -> dict[str, Array]:
    dtype = NUMPY_DTYPES[precision]
    return {name: a if a.dtype == bool else a.astype(dtype).astype(np.float32) for name, a in sample.items()}


def _masks(inputs: Mapping[str, Array]) -> tuple[Array, Array]:
    x, context = inputs["x"], inputs["context"]
    mask = inputs.get("mask", np.ones(x.shape[:2], dtype=bool))
    return mask, inputs.get("context_mask", np.ones(context.shape[:2], dtype=bool))


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

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.made: dict[Sharpness, _Bench] = {}
        self.copies = tempfile.TemporaryDirectory(prefix="bca-parity-")
        self.changes: list[float] = []

    def close(self) -> None:
        self.copies.cleanup()
        torch.set_num_threads(self.threads)

    def run(self, name: str, family: str, sharpness: Sharpness, inputs: dict[str, Array]) -> list[CaseResult]:
        if sharpness not in self.made:
            self.made[sharpness] = self._make(sharpness)
        bench, subject = self.made[sharpness], self.subject
        truth, largest_logit = true_outputs(bench.truth, inputs, subject.interface)
        eager = run_module(bench.eager, inputs, subject.interface, DTYPES[subject.precision])
        if sharpness == "plain" and len(self.changes) < 4:
            self.changes.append(self._weight_change(inputs, truth))
        trial = _Trial(truth, eager, _regions(inputs, truth), UNIT_ROUNDOFF[subject.precision] * (1 + largest_logit))
        small = next(iter(truth.values())).shape[0] * subject.checkpoint.spec.heads * _pairs(inputs) <= STRICT_WEIGHTS
        edges = _at_edges(inputs, subject)
        return [
            trial.judge(name, family, sharpness, runtime, runner(edges))
            for runtime, runner in bench.runners.items()
            if runtime == "onnxruntime" or small
        ]

    def _make(self, sharpness: Sharpness) -> _Bench:
        subject = self.subject
        dtype = DTYPES[subject.precision]
        rounded = _rounded_checkpoint(subject.checkpoint, dtype)
        factor = sharpening(rounded, sharpness, subject.precision)
        sharp = Checkpoint(rounded.spec, sharpen(rounded.state, factor))
        path = subject.path if factor == 1.0 else sharpened_copy(subject.path, factor, Path(self.copies.name))
        runners: dict[str, Runner] = {}
        if subject.precision != "bf16":
            runners["onnxruntime"] = ort_runner(path)
        if subject.precision != "fp32":
            runners["strict evaluator"] = strict_runner_of(path)
        return _Bench(sharp.module(torch.float64), sharp.module(dtype), runners)

    def _weight_change(self, inputs: dict[str, Array], truth: dict[str, Array]) -> float:
        exact = run_module(self.subject.checkpoint.module(torch.float64), inputs, self.subject.interface, torch.float64)
        return float(np.sqrt(np.mean([np.mean((truth[k] - exact[k]) ** 2) / _mean_square(exact[k]) for k in truth])))

    def weight_rounding(self) -> float:
        return float(np.mean(self.changes)) if self.changes else 0.0


def _at_edges(inputs: Mapping[str, Array], subject: Subject) -> dict[str, Array]:
    dtype = np.float32 if subject.keep_io_types else NUMPY_DTYPES[subject.precision]
    return {name: a if a.dtype == bool else a.astype(dtype) for name, a in inputs.items()}


def sharpen(state: State, factor: float) -> State:
    """Return the state with every ``to_qk`` scaled; ``factor`` is a power of two, so no weight is rounded."""
    return {name: tensor * factor if is_query_weight(name) else tensor for name, tensor in state.items()}


def sharpening(checkpoint: Checkpoint, sharpness: Sharpness, precision: Precision) -> float:
    """Return the power of two that brings the largest |logit| of a probe near the sharpness's target, 1 for ``plain``."""
    if sharpness == "plain":
        return 1.0
    target = LOGIT_TARGETS[sharpness][precision]
    spec = checkpoint.spec
    probe = make_inputs(Case("no mask", "plain", 2, 16, 16, 0), spec, Interface(False, False), "fp32")
    _, largest = true_outputs(checkpoint.module(torch.float64), probe, Interface(False, False), weightless=np.inf)
    return float(2.0 ** np.floor(np.log2(target / largest))) if largest else 1.0


def run_module(module: nn.Module, inputs: Mapping[str, Array], interface: Interface, dtype: torch.dtype) -> dict[str, Array]:
    """Run a reference module in ``dtype`` and return its outputs by name as float64."""
    names = ("out", "context_out", "attn", "context_attn")
    tensors = {name: torch.from_numpy(a) if a.dtype == bool else torch.from_numpy(a).to(dtype) for name, a in inputs.items()}
    extra = {"return_attn": True} if interface.attention_maps else {}
    with torch.no_grad():
        return {name: tensor.double().numpy() for name, tensor in zip(names, module(**tensors, **extra), strict=False)}


def true_outputs(
    module: nn.Module, inputs: Mapping[str, Array], interface: Interface, weightless: float = _WEIGHTLESS
) -> tuple[dict[str, Array], float]:
    """Return the float64 outputs and the largest live |logit| of any layer that carries weight."""
    largest = [0.0]
    mask, context_mask = _masks(inputs)
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


def truth_and_bounds(
    checkpoint: Checkpoint, inputs: dict[str, Array], interface: Interface, precision: Precision
) -> tuple[dict[str, Array], dict[str, float]]:
    """Return the float64 outputs on the rounded weights, and the largest error that the per-case rule allows for each.

    Args:
        checkpoint: the layer with its original weights.
        inputs: float32 arrays that ``precision`` represents exactly, and bool masks.
        interface: decides whether attention maps are outputs.
        precision: of the weights and of PyTorch eager.
    """
    rounded = _rounded_checkpoint(checkpoint, DTYPES[precision])
    truth, largest = true_outputs(rounded.module(torch.float64), inputs, interface)
    eager = run_module(rounded.module(DTYPES[precision]), inputs, interface, DTYPES[precision])
    roundoff = UNIT_ROUNDOFF[precision] * (1 + largest)
    return truth, {name: _bound(eager[name] - true, true, roundoff) for name, true in truth.items()}


def _bound(eager_error: Array, truth: Array, roundoff: float) -> float:
    eager_max = float(np.abs(eager_error).max()) if np.isfinite(eager_error).all() else 0.0
    return EAGER_FACTOR * eager_max + ROUNDOFF_FACTOR * roundoff * float(np.abs(truth).max())


def _rounded_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
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


def _pairs(inputs: Mapping[str, Array]) -> int:
    return int(inputs["x"].shape[1] * inputs["context"].shape[1])


def _regions(inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return for each output a bool array that broadcasts against it: true where the row is live."""
    mask, context_mask = _masks(inputs)
    rows = mask & context_mask.any(-1, keepdims=True)
    columns = context_mask & mask.any(-1, keepdims=True)
    shapes = {"out": rows[..., None], "context_out": columns[..., None]}
    shapes |= {"attn": rows[:, None, :, None], "context_attn": columns[:, None, None, :]}
    return {name: np.broadcast_to(shapes[name], outputs[name].shape) for name in outputs}


def _mean_square(values: Array) -> float:
    return max(float(np.mean(values**2)), np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class _Trial:
    """One case's truth and eager results, ready to judge any runtime's outputs."""

    truth: dict[str, Array]
    eager: dict[str, Array]
    live: dict[str, Array]
    roundoff: float

    def judge(self, name: str, family: str, sharpness: Sharpness, runtime: str, outputs: Mapping[str, Array]) -> CaseResult:
        wide = {key: np.asarray(outputs[key]).astype(np.float64) for key in self.truth}
        bad = [f"{key} has {int((~np.isfinite(a)).sum())} NaN or Inf" for key, a in wide.items() if not np.isfinite(a).all()]
        wrong = [f"{key} has shape {a.shape}" for key, a in wide.items() if a.shape != self.truth[key].shape]
        if bad or wrong:
            return CaseResult(name, family, sharpness, runtime, {}, 0.0, tuple(bad + wrong))
        regions: dict[Region, RegionError] = {}
        failures: list[str] = []
        for region in REGIONS:
            found, problems = self._region(wide, region)
            failures += problems
            if found is not None:
                regions[region] = found
        cosine = min(_cosine(wide[key], self.truth[key]) for key in wide)
        return CaseResult(name, family, sharpness, runtime, regions, cosine, tuple(failures))

    def _region(self, outputs: dict[str, Array], region: Region) -> tuple[RegionError | None, list[str]]:
        relative, eager_relative, problems, tightest = [], [], [], (0.0, np.inf)
        for key, truth in self.truth.items():
            rows = self.live[key] == (region == "live")
            if not rows.any():
                continue
            error, eager = np.abs(outputs[key] - truth)[rows], np.abs(self.eager[key] - truth)[rows]
            bound = _bound(eager, truth, self.roundoff)
            worst = float(error.max())
            if not worst <= bound:
                problems.append(f"{key}, {region} rows: largest error {worst:.3g}, allowed {bound:.3g}")
            tightest = max(tightest, (worst, bound), key=lambda pair: pair[0] / max(pair[1], 1e-300))
            scale = np.sqrt(_mean_square(truth))
            relative.append(error / scale)
            eager_relative.append(eager / scale)
        if not relative:
            return None, []
        return _region_error(np.concatenate(relative), np.concatenate(eager_relative), tightest), problems


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
    keys = dict.fromkeys((r.runtime, r.family, r.sharpness) for r in results)
    groups = [_group([r for r in results if (r.runtime, r.family, r.sharpness) == key]) for key in keys]
    failures = [f"{r.case} under {r.runtime}: {problem}" for r in results for problem in r.failures]
    failures += [problem for group in groups for problem in _pooled_problems(group)]
    return Verdict(
        subject.precision, scope, tuple(results), tuple(groups), tuple(failures), weight_rounding, tuple(_notes(subject))
    )


def _group(results: list[CaseResult]) -> Group:
    first = results[0]
    errors = [error for r in results for error in r.regions.values()]
    count = max(sum(e.count for e in errors), 1)
    return Group(
        first.family,
        first.sharpness,
        first.runtime,
        len(results),
        live_ratio=_pooled_ratio(r.regions.get("live") for r in results),
        dead_ratio=_pooled_ratio(r.regions.get("dead") for r in results),
        rms=float(np.sqrt(sum(e.squares for e in errors) / count)),
        mean=sum(e.mean * e.count for e in errors) / count,
        p99=max((e.p99 for e in errors), default=0.0),
        max=max((e.max for e in errors), default=0.0),
        cosine=min(r.cosine for r in results),
    )


def _pooled_ratio(errors: Iterable[RegionError | None]) -> float | None:
    """Return RMS error over eager's; every case weighs the same, whatever its size."""
    found = [e for e in errors if e is not None and np.isfinite(e.eager_squares)]
    if not found:
        return None
    ours = sum(e.squares / e.count for e in found)
    eager = sum(e.eager_squares / e.count for e in found)
    return float(np.sqrt(ours / eager)) if eager else (0.0 if ours == 0 else float("inf"))


def _pooled_problems(group: Group) -> Iterable[str]:
    for region, ratio in (("live", group.live_ratio), ("dead", group.dead_ratio)):
        if ratio is not None and ratio > POOLED_RATIO:
            yield (
                f"{group.family} {group.sharpness} under {group.runtime}, {region} rows: RMS error {ratio:.3g} times "
                f"PyTorch eager's, allowed {POOLED_RATIO}"
            )


def _notes(subject: Subject) -> Iterable[str]:
    if subject.precision == "bf16":
        yield "bf16 is judged by the strict evaluator only: onnxruntime has no bf16 MatMul on CPU"
    if subject.precision != "fp32":
        yield f"the strict evaluator runs the cases of at most {STRICT_WEIGHTS} attention weights"
