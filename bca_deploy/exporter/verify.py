"""Hold a finished bundle against PyTorch again, any time later: files, self-test, and the full parity matrix."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx.external_data_helper import uses_external_data
from torch import nn

from bca_deploy.bundle import selftest
from bca_deploy.bundle.manifest import EXPECT_FILE, SELFTEST_FILE, ModelEntry
from bca_deploy.bundle.read import Bundle, reading, safe_path
from bca_deploy.errors import BundleError, InputError, ParityError, check_one_of
from bca_deploy.exporter.model_source import read_again
from bca_deploy.exporter.plan import checkpoint_of
from bca_deploy.files import read_arrays
from bca_deploy.layers.isolation import plain_torch
from bca_deploy.parity import user_sample
from bca_deploy.parity.cases import Scope
from bca_deploy.parity.rule import Subject, judge, judge_inputs
from bca_deploy.parity.runners import Runner, at_edges, ort_runner, strict_runner_of
from bca_deploy.parity.verdict import CaseResult, Verdict
from bca_deploy.progress import Progress, Silent

Arrays = dict[str, NDArray[Any]]


@plain_torch()
def verify(
    bundle: Bundle | str | Path,
    *,
    inputs: Iterable[str | Path] = (),
    model: nn.Module | None = None,
    scope: Scope = "full",
    progress: Progress | None = None,
) -> tuple[Verdict, ...]:
    """Hold every model of a bundle against the PyTorch layer rebuilt from the bundle's weights.

    Args:
        bundle: an open bundle, or its path.
        inputs: ``.npz`` files with the user's own inputs, named as the model's; outputs that are there are checked too.
        model: a whole model with the bundle's weights, to draw the parity matrix anew; without it the cases that the bundle
            keeps are run.
        scope: which parity matrix.
        progress: told about stages and cases.

    Returns:
        A verdict for each model, in the manifest's order; each is true where the model passed.

    Raises:
        BundleError: the bundle is damaged, or its external data leaves it.
        InputError: an unknown scope, or an input file that does not fit, or leaves a live row without a key.
        ParityError: a self-test or the stored sample fails.
    """
    check_one_of("scope", scope, get_args(Scope))
    if not isinstance(bundle, Bundle):
        with Bundle.open(bundle) as opened:
            return verify(opened, inputs=inputs, model=model, scope=scope, progress=progress)
    progress = progress or Silent()
    if model is not None and list(inputs):
        raise InputError("--inputs with --model: a whole model is tried on the samples in its bundle, and on drawn inputs")
    if model is not None:
        return _verify_with(bundle, model, scope, progress)
    if bundle.manifest.interface is None:
        return _verify_whole(bundle, list(inputs), progress)
    spec, interface = bundle.manifest.layers[0].spec, bundle.manifest.interface
    checkpoint = checkpoint_of(bundle)
    samples = {str(path): user_sample.read(Path(path), ("x", "context")) for path in inputs}
    if EXPECT_FILE in bundle.manifest.files:
        samples[EXPECT_FILE] = user_sample.read(bundle.path(EXPECT_FILE))
    for sample in samples.values():
        user_sample.fit(sample, spec, interface)
        if "out" in sample and "context_out" in sample:
            user_sample.check(sample, checkpoint)
    ready = {name: user_sample.inputs_of(sample, spec, interface) for name, sample in samples.items()}

    def subject(model: ModelEntry) -> Subject:
        path, dims = bundle.path(model.file), bundle.manifest.signature.dims
        return Subject(path, checkpoint, interface, dims, model.precision, model.keep_io_types)

    return tuple(_verify_model(bundle, model, subject(model), ready, scope, progress) for model in bundle.manifest.models)


def _verify_model(
    bundle: Bundle, model: ModelEntry, subject: Subject, samples: Mapping[str, Arrays], scope: Scope, progress: Progress
) -> Verdict:
    _check_model(bundle, model, f"parity {subject.path.stem}", progress)
    own = judge_inputs(subject, samples) if samples else None
    verdict = judge(subject, scope, progress.steps)
    return verdict if own is None else verdict.joined(own)  # a failed verdict is false


def _verify_with(bundle: Bundle, model: nn.Module, scope: Scope, progress: Progress) -> tuple[Verdict, ...]:
    """Hold the models of a whole model against its code."""
    _, source = read_again(bundle, model, progress)

    def verdict(entry: ModelEntry) -> Verdict:
        path = bundle.path(entry.file)
        _check_model(bundle, entry, f"parity {path.stem}", progress)
        return source.judge_file(path, entry, scope, progress.steps)

    return tuple(map(verdict, bundle.manifest.models))


def _verify_whole(bundle: Bundle, inputs: list[str | Path], progress: Progress) -> tuple[Verdict, ...]:
    """Hold the models of a whole model against the cases that the bundle keeps: its code is not here."""
    if inputs:
        raise InputError(
            f"--inputs: the bundle holds the whole model {bundle.manifest.source} and not its code, so nothing says what these "
            "should give; export again with them as samples"
        )
    note = "the cases kept from the export, with their float64 truth, hold; --model draws the matrix anew"

    def verdict(entry: ModelEntry) -> Verdict:
        name = bundle.path(entry.file).stem
        arrays = _check_model(bundle, entry, f"kept cases {name}", progress)
        places = sorted({key.rsplit("/", 2)[0] for key in arrays if key.startswith(f"{entry.precision}/")})
        results = tuple(CaseResult(place.partition("/")[2], "kept", "plain", "self-test", {}, 1.0) for place in places)
        return Verdict(name, entry.precision, "kept", results, (), (), 0.0, (note,))

    return tuple(map(verdict, bundle.manifest.models))


def _check_model(bundle: Bundle, model: ModelEntry, stage: str, progress: Progress) -> Arrays:
    """Refuse a file with foreign weights, or one that fails its self-test; return the self-test."""
    path = bundle.path(model.file)
    _check_external_data(bundle, path)
    progress.stage(stage)
    arrays = read_arrays(bundle.path(SELFTEST_FILE))
    _run_selftest(arrays, model, path)
    return arrays


def _check_external_data(bundle: Bundle, path: Path) -> None:
    """Refuse weights stored outside the bundle, or in a file that the manifest does not list."""
    try:
        with reading(path):
            model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise BundleError(f"{path.name} is not an ONNX model: {error}; export the bundle again") from error
    for tensor in _tensors(model.graph):
        if uses_external_data(tensor):
            location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            if not location:
                raise BundleError(f"{path.name} keeps weight {tensor.name} in a file but does not say in which; do not use it")
            name = safe_path(path.parent, location).relative_to(bundle.directory).as_posix()
            if name not in bundle.manifest.files:
                raise BundleError(f"{path.name} keeps weight {tensor.name} in {location}, which the manifest does not list")


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that may keep its data in a file: initializers and the nodes' attributes, subgraphs included."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from ([attribute.t] if attribute.HasField("t") else attribute.tensors)
        for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            yield from _tensors(inner)


def _run_selftest(arrays: Arrays, model: ModelEntry, path: Path) -> None:
    runner: Runner = strict_runner_of(path) if model.precision == "bf16" else ort_runner(path)
    failures = selftest.failures(
        arrays,
        model.precision,
        lambda inputs: runner(at_edges(inputs, model.precision, model.keep_io_types)),
    )
    if failures:
        raise ParityError("; ".join(failures))
