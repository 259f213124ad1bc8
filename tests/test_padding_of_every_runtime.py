"""Whatever padding holds, live rows are PyTorch's, on every lowering and backend; the table of it is in docs/padding.md."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from support import native
from support.layers import make_checkpoint
from support.requests import by_grpc, by_rest
from support.servers import bca_serve, cpp_serve

import bca_deploy
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.lowered_model import DTYPES, lower
from bca_deploy.parity.runners import Runner, ort_runner, strict_runner_of
from bca_deploy.spec import Bias, Interface, Lowering, Precision, Runtime, layer_signature
from bca_deploy.tracing.graph import trace, write

Array = NDArray[Any]
Arrays = dict[str, Array]
LIVE = {"out": "mask", "context_out": "context_mask"}
LAYERS: dict[str, dict[str, Any]] = {
    "without norms": {},
    "RMSNorm first": {"prenorm": True, "norm": "rms"},
    "LayerNorm first": {"prenorm": True},
}
GARBAGE = {"NaN": np.nan, "Inf": np.inf, "1e30": 1e30, "1e4": 1e4}
#: How far a live row may be from float64 on clean padding: rounding, and nothing like a key that should not be there (0.1).
WITHIN: dict[Precision, float] = {"fp32": 1e-5, "fp16": 1e-2}
#: Lowering, backend, precision, runtime, and what runs the file.
FORMS: tuple[tuple[Lowering, str, Precision, Runtime, Callable[[Path], Runner]], ...] = (
    ("reference", "onnxruntime", "fp32", "portable", ort_runner),
    ("reference", "strict evaluator", "fp32", "portable", strict_runner_of),
    ("fused", "onnxruntime", "fp32", "portable", ort_runner),
    ("fused", "strict evaluator", "fp32", "portable", strict_runner_of),
    ("fused", "onnxruntime, its own graph", "fp32", "onnxruntime-cpu", ort_runner),
    ("reference", "onnxruntime", "fp16", "portable", ort_runner),
    ("reference", "strict evaluator", "fp16", "portable", strict_runner_of),
    ("fused", "onnxruntime", "fp16", "portable", ort_runner),
    ("fused", "strict evaluator", "fp16", "portable", strict_runner_of),
)


@pytest.fixture(autouse=True, scope="module")
def plain_inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def sharp(layer: str) -> Checkpoint:
    """Logits of a few units: a key too many is then seen, and half precision overflows as it does in a trained layer."""
    checkpoint = make_checkpoint(**LAYERS[layer])
    state = {name: tensor * 4 if "to_qk" in name else tensor for name, tensor in checkpoint.state.items()}
    return Checkpoint(checkpoint.spec, state)


def clean(bias: Bias = "none") -> Arrays:
    """Padding at the end, at the beginning and in the middle, of either side."""
    random = np.random.default_rng(0)
    shapes = {"x": (3, 7, 24), "context": (3, 5, 16)}
    inputs: Arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    inputs["mask"] = np.array([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], bool)
    inputs["context_mask"] = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 1]], bool)
    if bias == "batch":
        inputs["rel_pos_bias"] = random.normal(size=(3, 3, 7, 5)).astype(np.float32)
    return inputs


def dirty(inputs: Arrays, value: float, sides: tuple[str, ...] = ("x", "context")) -> Arrays:
    """The same with ``value`` at padding, its sign changing from feature to feature."""
    masks = {"x": inputs["mask"], "context": inputs["context_mask"]}
    masks["rel_pos_bias"] = np.broadcast_to(masks["x"][:, None, :, None] & masks["context"][:, None, None], (3, 3, 7, 5))
    found = {name: array.copy() for name, array in inputs.items()}
    for name in sides:
        shape = found[name][~masks[name]].shape
        found[name][~masks[name]] = value * np.where(np.arange(np.prod(shape)) % 3, 1, -1).reshape(shape)
    return found


def in_torch(checkpoint: Checkpoint, inputs: Arrays, dtype: torch.dtype) -> Arrays:
    module = checkpoint.module(torch.float32).to(dtype)
    given = {name: torch.from_numpy(a) if a.dtype == bool else torch.from_numpy(a).to(dtype) for name, a in inputs.items()}
    return {name: t.double().numpy() for name, t in zip(LIVE, module(**given), strict=True)}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trace a model, each but once: the backends share it."""
    made: dict[object, Path] = {}

    def of(layer: str, index: int, bias: Bias = "none") -> Path:
        lowering, _, precision, runtime, _ = FORMS[index]
        key = layer, lowering, precision, runtime, bias
        if key not in made:
            made[key] = tmp_path_factory.mktemp("padding") / "model.onnx"
            checkpoint = sharp(layer)
            lowered = lower(checkpoint, lowering, precision, runtime=runtime)
            write(
                trace(lowered, layer_signature(checkpoint.spec, Interface(rel_pos_bias=bias)), 17, runtime=runtime), made[key]
            )
        return made[key]

    return of


@pytest.fixture(scope="module")
def runner_of(model_file: Callable[..., Path]) -> Callable[..., Runner]:
    return lambda layer, index, bias="none": FORMS[index][-1](model_file(layer, index, bias))


def verdict(got: Arrays, wanted: Arrays, inputs: Arrays, within: float, names: tuple[str, ...] = tuple(LIVE)) -> str:
    """``right``, ``NaN`` or by how much a live row is wrong."""
    errors = [np.abs(got[name].astype(np.float64) - wanted[name])[inputs[LIVE[name]]].max() for name in names]
    worst = float(np.max(errors))
    return "NaN" if np.isnan(worst) else "right" if worst < within else f"wrong by {worst:.2g}"


def row(layer: str, index: int, runner_of: Callable[..., Runner]) -> list[str]:
    _, _, precision, _, _ = FORMS[index]
    checkpoint, inputs, cells = sharp(layer), clean(), []
    wanted = in_torch(checkpoint, inputs, torch.float64)
    for value in GARBAGE.values():
        given = dirty(inputs, value)
        eager = verdict(in_torch(checkpoint, given, DTYPES[precision]), wanted, inputs, WITHIN[precision])
        ours = verdict(runner_of(layer, index)(given), wanted, inputs, WITHIN[precision])
        told = {("NaN", "NaN"): "NaN as in PyTorch", ("right", "right"): "right", ("NaN", "right"): "right, PyTorch NaN"}
        cells.append(told.get((eager, ours), f"{ours}, PyTorch {eager}"))
    return cells


def table(layer: str, runner_of: Callable[..., Runner]) -> str:
    lines = [["lowering", "runs on", "precision", *GARBAGE], ["---"] * (3 + len(GARBAGE))]
    lines += [[*FORMS[index][:3], *row(layer, index, runner_of)] for index in range(len(FORMS))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@pytest.mark.parametrize("layer", ["without norms", pytest.param("RMSNorm first", marks=pytest.mark.slow)])
def test_the_table_of_what_padding_may_hold_is_what_is_measured(
    layer: str, runner_of: Callable[..., Runner], repository: Path
) -> None:
    measured = table(layer, runner_of)
    assert "wrong" not in measured, measured
    text = (repository / "docs" / "padding.md").read_text(encoding="utf-8")
    assert text.partition(f"## A layer {layer}\n\n")[2].partition("\n\n")[0] == measured, measured


@pytest.mark.parametrize("index", range(len(FORMS)), ids=lambda i: " ".join(FORMS[i][:3]))
@pytest.mark.parametrize(("dirt", "sound"), [("x", "out"), ("context", "context_out")])
def test_nan_in_one_sides_padding_stays_out_of_that_sides_live_rows(
    index: int, dirt: str, sound: str, runner_of: Callable[..., Runner]
) -> None:
    """In PyTorch, too: it reaches the other side alone, as zero times NaN among the values."""
    checkpoint, inputs, precision = sharp("without norms"), clean(), FORMS[index][2]
    wanted = in_torch(checkpoint, inputs, torch.float64)
    for value in GARBAGE.values():
        given = dirty(inputs, value, (dirt,))
        assert verdict(runner_of("without norms", index)(given), wanted, inputs, WITHIN[precision], (sound,)) == "right"


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4])
def test_garbage_that_pytorch_survives_is_survived_up_to_the_largest_number(
    index: int, runner_of: Callable[..., Runner]
) -> None:
    """Projections of 1e38 and their products overflow; so do logits, and sums of both signs."""
    checkpoint, inputs = sharp("without norms"), clean()
    wanted = in_torch(checkpoint, inputs, torch.float64)
    survived = 0
    for value in (1e20, 2e30, 1e32, 1e35, 1e37, 4e37, 1e38):
        given = dirty(inputs, value)
        if verdict(in_torch(checkpoint, given, torch.float32), wanted, inputs, 1e-5) == "right":
            survived += 1
            assert verdict(runner_of("without norms", index)(given), wanted, inputs, 1e-5) == "right", value
    assert survived >= 4


@pytest.mark.parametrize("index", [2, 3, 7, 8, *(pytest.param(i, marks=pytest.mark.slow) for i in (0, 1, 5, 6))])
def test_the_bias_of_padded_pairs_may_hold_anything(index: int, runner_of: Callable[..., Runner]) -> None:
    """Of a prenorm layer, whose queries and keys nobody quiets."""
    checkpoint, inputs, precision = sharp("RMSNorm first"), clean("batch"), FORMS[index][2]
    wanted = in_torch(checkpoint, inputs, torch.float64)
    for value in (np.nan, np.inf, -np.inf, 3e38):
        given = dirty(inputs, value, ("rel_pos_bias",))
        assert verdict(runner_of("RMSNorm first", index, "batch")(given), wanted, inputs, WITHIN[precision]) == "right", value


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a layer without norms."""
    module = sharp("without norms").module(torch.float32)
    with bca_deploy.export(module, tmp_path_factory.mktemp("bare") / "model", precision=("fp32", "fp16")) as bundle:
        return bundle.directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs_on", "precision"),
    [
        ("python", "fp32"),
        ("python", "fp16"),
        ("c++", "fp32"),
        ("c++", "fp16"),
        ("rest", "fp32"),
        ("grpc", "fp32"),
        ("c++ grpc", "fp32"),
    ],
)
def test_large_padding_shows_in_no_live_row_whatever_runs_the_bundle(
    runs_on: str, precision: Precision, bare: Path, tmp_path: Path
) -> None:
    inputs, value = clean(), 1e30 if precision == "fp32" else 1e4
    wanted, given = in_torch(sharp("without norms"), inputs, torch.float64), dirty(inputs, value)
    assert verdict(RUN[runs_on](bare, precision, given, tmp_path), wanted, inputs, WITHIN[precision]) == "right"


def by_session(bundle: Path, precision: Precision, given: Arrays, _: Path) -> Arrays:
    with bca_deploy.open(bundle, precision=precision) as session:
        return session.run(given)


def by_bca_run(bundle: Path, precision: Precision, given: Arrays, directory: Path) -> Arrays:
    if lacking := native.missing("library"):
        pytest.skip(f"runtime/ is not built without {', '.join(lacking)}")
    np.savez(directory / "in.npz", **given)
    outputs = [word for name in LIVE for word in ("--output", f"{name}={directory / name}.npy")]
    program = native.build("release") / "bca-run"
    native.passed([program, bundle, "--precision", precision, "--input", directory / "in.npz", *outputs])
    return {name: np.load(directory / f"{name}.npy") for name in LIVE}


def by_server(ask: Any) -> Any:
    def run(bundle: Path, precision: Precision, given: Arrays, directory: Path) -> Arrays:
        with bca_serve(bundle, directory / "log", "--precision", precision) as server:
            return dict(zip(LIVE, ask(server, given), strict=True))

    return run


def by_cpp_server(bundle: Path, _: Precision, given: Arrays, directory: Path) -> Arrays:
    with cpp_serve(bundle, directory / "log") as server:
        return dict(zip(LIVE, by_grpc(server, given), strict=True))


RUN: dict[str, Callable[[Path, Precision, Arrays, Path], Arrays]] = {
    "python": by_session,
    "c++": by_bca_run,
    "rest": by_server(by_rest),
    "grpc": by_server(by_grpc),
    "c++ grpc": by_cpp_server,
}


@pytest.mark.parametrize("index", [2, 4, 7], ids=lambda i: " ".join(FORMS[i][:3]))
def test_dead_rows_hold_the_mean_of_what_padding_holds_too(index: int, runner_of: Callable[..., Runner]) -> None:
    checkpoint, inputs = sharp("without norms"), dirty(clean(), 1e4)
    eager, got = in_torch(checkpoint, inputs, torch.float32), runner_of("without norms", index)(inputs)
    for name, of in LIVE.items():
        dead, largest = ~inputs[of], np.abs(eager[name]).max()
        assert np.abs(got[name] - eager[name])[dead].max() < largest * (1e-5 if FORMS[index][2] == "fp32" else 1e-2)


@pytest.mark.parametrize(("layer", "count"), [("without norms", 22), ("LayerNorm first", 18)])
def test_the_graph_for_the_cpu_pays_for_quiet_padding_without_a_norm_alone(
    layer: str, count: int, model_file: Callable[..., Path]
) -> None:
    kinds = [node.op_type for node in onnx.load(model_file(layer, 4)).graph.node]
    assert len(kinds) == count
    assert kinds.count("Mul") == (2 if layer == "without norms" else 0)
    # Where is three passes on one thread there; a product is one on all of them.
    assert "Where" not in kinds
