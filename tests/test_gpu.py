"""Engines on a GPU: what is built computes the layer, judged as the models are. Skipped, with the reason, where none is."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.layers import make_checkpoint

import bca_deploy
from bca_deploy.bundle import selftest
from bca_deploy.bundle.manifest import SELFTEST_FILE, WEIGHTS_FILE, EngineEntry, signature_of_engine
from bca_deploy.bundle.read import Bundle
from bca_deploy.engines import build as engines
from bca_deploy.engines import libraries
from bca_deploy.engines.compile import compile_engine
from bca_deploy.engines.gpus import query
from bca_deploy.engines.libraries import LIBRARIES
from bca_deploy.engines.usable import engine_for
from bca_deploy.errors import EngineError, InputError, MissingDependencyError
from bca_deploy.exporter import refit as refitting
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.stored.weight_files import read
from bca_deploy.parity.rule import Runtimes, Subject, judge
from bca_deploy.parity.runners import Runner, at_edges
from bca_deploy.parity.verdict import Verdict
from bca_deploy.session.backends.engine_runner import engine_runner
from bca_deploy.spec import EngineLibrary, Precision

GPUS = query()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS.found, reason=GPUS.why_none),
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch {torch.__version__} sees no GPU"),
]
LAYER: dict[str, Any] = {"dim": 64, "context_dim": 48, "heads": 4, "dim_head": 16, "prenorm": True}
DIMS = {
    "batch": {"min": 1, "opt": 4, "max": 8},
    "x_len": {"min": 1, "opt": 64, "max": 256},
    "context_len": {"min": 1, "opt": 64, "max": 256},
}
#: The self-test's sizes, and with them everything else fixed.
FIXED = {name: {"min": size, "opt": size, "max": size} for name, size in (("batch", 4), ("x_len", 7), ("context_len", 5))}
SHORT = {name: {"min": 1, "opt": 8, "max": 16} for name in ("x_len", "context_len")}


def need(library: EngineLibrary, precision: Precision = "fp16") -> dict[str, Any]:
    """Return what ``build`` needs to compile for this GPU, or skip."""
    capability = GPUS.found[0].compute_capability
    try:
        libraries.load(library)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    if precision == "bf16" and capability == "sm75":
        pytest.skip(f"{capability} has no bf16 hardware")
    if library == "rtx" and capability not in LIBRARIES["rtx"].targets:
        pytest.skip(f"TensorRT-RTX does not compile for {capability}; it does for {', '.join(LIBRARIES['rtx'].targets)}")
    return {"library": library, "precision": precision} | ({"targets": [capability]} if library == "rtx" else {})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a model of each precision, edges in that precision, and no engine."""
    out = tmp_path_factory.mktemp("models") / "bundle"
    module = make_checkpoint(**LAYER).module(torch.float32)
    bca_deploy.export(module, out, precision=get_args(Precision), keep_io_types=False, dims=DIMS)
    return out


@pytest.fixture
def path(models: Path, tmp_path: Path) -> Path:
    """A copy of it to build into."""
    return Path(shutil.copytree(models, tmp_path / "bundle"))


def edges_of(bundle: Bundle, entry: EngineEntry, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    model = engines.model_of(bundle.manifest, entry.precision)
    return at_edges(arrays, entry.precision, model.keep_io_types)


def run(bundle: Bundle, entry: EngineEntry, **options: bool) -> Runner:
    return engine_runner(bundle.path(entry.file), entry.library, **options)


def failures(path: Path, entry: EngineEntry, **options: bool) -> list[str]:
    """Run the bundle's self-test on an engine."""
    with Bundle.open(path) as bundle, np.load(bundle.path(SELFTEST_FILE), allow_pickle=False) as arrays:
        runner = run(bundle, entry, **options)
        return selftest.failures(arrays, entry.precision, lambda inputs: runner(edges_of(bundle, entry, inputs)))


def on_gpu(bundle: Bundle, entry: EngineEntry, scratch: Path) -> Runtimes:
    """Return what runs the bundle's model by its engine, and a sharpened copy of the model by one built in the same way."""
    wanted = refitting._engine_plan(entry, bundle.manifest)
    model = engines.model_of(bundle.manifest, entry.precision)
    own = bundle.path(model.file)

    def runtimes(onnx: Path) -> dict[str, Runner]:
        engine = bundle.path(entry.file)
        if onnx != own:
            engine = scratch / f"{onnx.stem}.engine"
            request = engines._request(bundle.directory, bundle.manifest, model, wanted, entry.file)
            compile_engine(replace(request, onnx=str(onnx), out=str(engine)), 1800.0, lambda share: None)
        return {entry.library: engine_runner(engine, entry.library)}

    return runtimes


def parity(path: Path, entry: EngineEntry, scratch: Path) -> Verdict:
    """Judge an engine by the quick matrix, as its model was."""
    with Bundle.open(path) as bundle:
        manifest, model = bundle.manifest, engines.model_of(bundle.manifest, entry.precision)
        checkpoint = Checkpoint(manifest.layer, read(bundle.path(WEIGHTS_FILE)))
        subject = Subject(
            bundle.path(model.file),
            checkpoint,
            manifest.interface,
            manifest.signature.dims,
            entry.precision,
            model.keep_io_types,
        )
        return judge(subject, "quick", runtimes=on_gpu(bundle, entry, scratch))


@pytest.mark.slow
@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("library", get_args(EngineLibrary))
def test_an_engine_passes_parity(path: Path, tmp_path: Path, library: EngineLibrary, precision: Precision) -> None:
    # fp32 is with TF32 off, the default: 10 bits of mantissa would not pass beside eager's 23.
    entry = bca_deploy.build(path, **need(library, precision))
    assert failures(path, entry) == []
    verdict = parity(path, entry, tmp_path)
    assert verdict, verdict.failures
    assert verdict.cases >= 40
    assert {result.runtime for result in verdict.results} == {library}
    assert "dead rows" in {result.family for result in verdict.results if "dead" in result.regions}
    print(f"{library} {entry.version} {precision}: worst RMS ratio to PyTorch eager {verdict.worst_ratio:.3f}")  # noqa: T201


@pytest.mark.parametrize("library", get_args(EngineLibrary))
def test_an_engine_with_float32_edges_is_right(tmp_path: Path, library: EngineLibrary) -> None:
    wanted = need(library)
    module = make_checkpoint(**LAYER).module(torch.float32)
    bca_deploy.export(module, tmp_path / "bundle", precision="fp16", keep_io_types=True, dims=DIMS).close()
    entry = bca_deploy.build(tmp_path / "bundle", **wanted)
    with Bundle.open(tmp_path / "bundle") as made:
        assert {tensor.dtype for tensor in signature_of_engine(made.manifest, entry).outputs} == {"float32"}
    assert failures(tmp_path / "bundle", entry) == []


@pytest.mark.parametrize("library", get_args(EngineLibrary))
def test_a_dead_row_is_the_mean_whatever_is_in_it(path: Path, library: EngineLibrary) -> None:
    entry = bca_deploy.build(path, **need(library, "fp32"))
    rng = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {
        "x": rng.standard_normal((2, 33, 64), dtype=np.float32),
        "context": rng.standard_normal((2, 20, 48), dtype=np.float32),
        "mask": np.arange(33) < np.array([[0], [30]]),
        "context_mask": np.arange(20) < np.array([[20], [11]]),
    }
    with Bundle.open(path) as bundle:
        out = run(bundle, entry)(inputs)["out"]
    dead, live = np.concatenate([out[0], out[1, :1], out[1, 30:]]), out[1, :30]
    assert np.isfinite(out).all()
    assert np.abs(out[0] - out[0, :1]).max() <= 1e-5 * np.abs(out[0]).max()  # every row of it the same
    assert np.abs(out[1, 30:] - out[1, 30:31]).max() <= 1e-5 * np.abs(dead).max()
    assert np.abs(live - live[:1]).max() > 1e-3  # and live ones are not
    assert np.abs(out[0]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("library", get_args(EngineLibrary))
def test_of_two_profiles_the_fitting_one_runs(path: Path, tmp_path: Path, library: EngineLibrary) -> None:
    entry = bca_deploy.build(path, **need(library), profiles=[SHORT, DIMS])
    assert len(entry.profiles) == 2
    verdict = parity(path, entry, tmp_path)
    assert verdict, verdict.failures
    with bca_deploy.open(path, backend=library) as session:
        for length, profile in ((8, 0), (64, 1), (16, 0), (256, 1)):
            session.run(whole(length), cast=True)
            assert session._backend._pool._idle.queue[-1]._context.active_optimization_profile == profile  # type: ignore[attr-defined]


def whole(length: int) -> dict[str, np.ndarray]:
    """Inputs without padding."""
    masks = {name: np.ones((2, length), bool) for name in ("mask", "context_mask")}
    rng = np.random.default_rng(length)
    return {
        name: rng.standard_normal((2, length, LAYER[dim])) for name, dim in (("x", "dim"), ("context", "context_dim"))
    } | masks


@pytest.mark.parametrize("library", get_args(EngineLibrary))
def test_a_static_engine_is_right_and_takes_no_other_shape(path: Path, library: EngineLibrary) -> None:
    entry = bca_deploy.build(path, **need(library), profiles=[FIXED])
    assert entry.static
    assert failures(path, entry) == []
    with Bundle.open(path) as bundle, pytest.raises(InputError, match=r"^no profile of the engine holds x "):
        run(bundle, entry)(edges_of(bundle, entry, whole(8)))


@pytest.mark.parametrize("library", get_args(EngineLibrary))
def test_a_call_that_fails_leaves_the_next_one_right(path: Path, library: EngineLibrary) -> None:
    entry = bca_deploy.build(path, **need(library))
    with Bundle.open(path) as bundle:
        runner = run(bundle, entry)
        first = runner(edges_of(bundle, entry, whole(8)))
        with pytest.raises(InputError, match=r"^no profile of the engine holds x "):
            runner(edges_of(bundle, entry, whole(257)))
        again = runner(edges_of(bundle, entry, whole(8)))
    assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_refittable_engine_takes_new_weights(path: Path, tmp_path: Path, precision: Precision) -> None:
    entry = bca_deploy.build(path, **need("tensorrt", precision), refittable=True)
    assert failures(path, entry) == []
    old = shutil.copy(path / entry.file, tmp_path / "old.engine")
    for seed in (1, 2):  # again: a refitted engine has to stay refittable
        save_file(make_checkpoint(seed=seed, **LAYER).state, tmp_path / "new.safetensors")
        assert all(bca_deploy.refit(path, tmp_path / "new.safetensors", drop_sample=True))
        with Bundle.open(path) as bundle:
            (entry,) = bundle.manifest.engines
        assert failures(path, entry) == []
    shutil.copy(old, path / entry.file)
    with Bundle.open(path, "off") as bundle, np.load(bundle.path(SELFTEST_FILE)) as arrays:
        runner = run(bundle, entry)
        assert selftest.failures(arrays, precision, lambda inputs: runner(edges_of(bundle, entry, inputs)))


def test_an_engine_without_its_weights_is_built(path: Path) -> None:
    entry = bca_deploy.build(path, **need("tensorrt"), strip_weights=True)
    assert entry.options.strip_weights
    assert (path / entry.file).stat().st_size > 0


def test_a_timing_cache_is_written_and_used_again(path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timings"
    bca_deploy.build(path, **need("tensorrt"), timing_cache=str(cache))
    size = cache.stat().st_size
    assert size > 0
    entry = bca_deploy.build(path, **need("tensorrt"), timing_cache=str(cache))
    assert cache.stat().st_size == size  # nothing was timed that was not in it
    assert failures(path, entry) == []


def test_a_timing_cache_that_is_none_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "timings").write_bytes(b"no timing cache" * 10)
    with pytest.raises(EngineError, match=r"timing cache .*timings is another TensorRT's or another GPU's; remove it"):
        bca_deploy.build(path, **need("tensorrt"), timing_cache=str(tmp_path / "timings"))
    with Bundle.open(path) as bundle:
        assert bundle.manifest.engines == ()


@pytest.mark.slow
def test_a_version_compatible_engine_opens_where_its_code_may_run(path: Path) -> None:
    entry = bca_deploy.build(path, **need("tensorrt"), version_compatible=True)
    assert failures(path, entry, host_code=True) == []
    with Bundle.open(path) as bundle, pytest.raises(EngineError, match="does not open here: "):
        run(bundle, entry, host_code=False)


@pytest.mark.parametrize("library", get_args(EngineLibrary))
def test_the_entry_says_what_it_was_built_for(path: Path, library: EngineLibrary) -> None:
    entry = bca_deploy.build(path, **need(library))
    gpu = GPUS.found[0]
    assert (entry.gpu, entry.targets) == ((None, (gpu.compute_capability,)) if library == "rtx" else (gpu, ()))
    with Bundle.open(path) as bundle:
        found, file = engine_for(bundle, library, entry.version, gpu.compute_capability)
    assert (found, file.suffix) == (entry, ".engine")


# ---- the session


@pytest.mark.parametrize("graphs", [0, 4])
@pytest.mark.parametrize("library", get_args(EngineLibrary))
def test_a_session_on_an_engine_holds_the_self_test_and_never_mixes_threads(
    path: Path, library: EngineLibrary, graphs: int
) -> None:
    bca_deploy.build(path, **need(library))
    with bca_deploy.open(path, backend=library, contexts=2, cuda_graphs=graphs) as session:
        session.selftest()
        cases = [whole(3 + index) for index in range(8)]
        wanted = [session.run(case, cast=True) for case in cases]

        def work(index: int) -> None:
            for _ in range(20):
                found = session.run(cases[index], cast=True)
                assert all(np.array_equal(found[name], wanted[index][name]) for name in found)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))


@pytest.mark.parametrize("graphs", [0, 4])
@pytest.mark.parametrize("library", get_args(EngineLibrary))
def test_tensors_on_the_gpu_stay_there(path: Path, library: EngineLibrary, graphs: int) -> None:
    bca_deploy.build(path, **need(library, "fp32"))
    with bca_deploy.open(path, backend=library, cuda_graphs=graphs) as session:
        for length in (8, 8, 33):
            given = {n: a if a.dtype == bool else a.astype(np.float32) for n, a in whole(length).items()}
            wanted = session.run(given)
            found = session.run({name: torch.from_numpy(array).cuda() for name, array in given.items()})
            for name, tensor in found.items():
                assert tensor.device.type == "cuda"
                assert np.array_equal(tensor.cpu().numpy(), wanted[name])
        # Written on a stream that is still at work when the session is called: it has to wait.
        slow, x = torch.cuda.Stream(), torch.zeros(2, 8, LAYER["dim"], device="cuda")
        with torch.cuda.stream(slow):
            torch.cuda._sleep(50_000_000)
            x += torch.from_numpy(whole(8)["x"]).float().cuda()
            late = session(x, torch.from_numpy(whole(8)["context"]).float().cuda())[0]
        early = session(torch.from_numpy(whole(8)["x"]).float(), torch.from_numpy(whole(8)["context"]).float())[0]
        assert torch.equal(late.cpu(), early)


@pytest.mark.parametrize("library", get_args(EngineLibrary))
def test_many_pairs_are_padded_and_right(path: Path, library: EngineLibrary) -> None:
    bca_deploy.build(path, **need(library))
    with bca_deploy.open(path, backend=library) as session:
        pairs = [tuple(whole(3 + index % 5).values()) for index in range(20)]
        before = session.metrics().calls
        together = session.run_many(pairs, cast=True)
        assert session.metrics().calls - before < 10
        for pair, found in zip(pairs, together, strict=True):
            for ours, theirs in zip(found, session(*pair, cast=True), strict=True):
                assert np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max() < 2e-2


def test_a_runtime_cache_is_written_and_read(path: Path, tmp_path: Path) -> None:
    bca_deploy.build(path, **need("rtx"))
    for _ in range(2):
        with bca_deploy.open(path, backend="rtx", cache=tmp_path) as session:
            session.selftest()
    assert (tmp_path / "rtx-fp16.runtime-cache").stat().st_size > 0


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_onnxruntimes_gpu_providers_hold_the_self_test(models: Path, backend: str) -> None:
    try:
        session = bca_deploy.open(models, backend=backend, precision="fp32")
    except EngineError as error:
        pytest.skip(str(error))
    with session:
        session.selftest()
        given = {name: torch.from_numpy(a if a.dtype == bool else a.astype(np.float32)).cuda() for name, a in whole(8).items()}
        assert all(tensor.device.type == "cuda" for tensor in session.run(given).values())
