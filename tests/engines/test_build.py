"""What is built is decided and refused before the work; what came out is proven; what is stale is refused with its cure."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.bundles import contents, untouched
from typer.testing import CliRunner

from bca_deploy.bundle.engine_options import BuildOptions, EngineTable
from bca_deploy.bundle.manifest import EngineEntry, GpuEntry, Manifest, signature_of_engine
from bca_deploy.bundle.read import Bundle
from bca_deploy.cli import app
from bca_deploy.engines import build as engines
from bca_deploy.engines import libraries, usable
from bca_deploy.engines.build_log import BuildLog
from bca_deploy.engines.builder_process import Facts
from bca_deploy.engines.compile import Built
from bca_deploy.engines.gpus import Gpus
from bca_deploy.engines.usable import engine_for, installed, rebuild_command, why_stale
from bca_deploy.errors import BcaError, EngineError, InputError
from bca_deploy.exporter.build import build
from bca_deploy.signature import DimRange, Dims
from bca_deploy.spec import LAYER_DIMS, Precision

ALL = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
HOPPER = GpuEntry(name="NVIDIA H200", compute_capability="sm90", driver="580.1")


@pytest.fixture(scope="module")
def _built(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(exported.directory, tmp_path_factory.mktemp("engines") / "a model"))
    build(path, targets=["sm89"])
    return path


@pytest.fixture
def built(_built: Path, tmp_path: Path) -> Path:
    """The small bundle with an engine for sm89, to change."""
    return Path(shutil.copytree(_built, tmp_path / "model"))


@pytest.fixture
def manifest(_built: Path) -> Manifest:
    return Bundle.open(_built).manifest


@pytest.fixture
def entry(manifest: Manifest) -> EngineEntry:
    return manifest.engines[0]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "query", lambda: Gpus(why_none="no NVIDIA driver answers"))


def plan(
    *profiles: dict[str, DimRange], precisions: tuple[Precision, ...] = ("fp32", "fp16"), **options: Any
) -> engines.EnginePlan:
    return engines.plan(EngineTable(**{"library": "rtx", **options}), profiles, LAYER_DIMS, precisions)


def local(entry: EngineEntry, **options: object) -> EngineEntry:
    """The entry as TensorRT would have made it on the GPU at hand."""
    table = EngineTable(**{"library": "tensorrt", **options})  # type: ignore[arg-type]
    return entry.model_copy(update={"library": "tensorrt", "targets": (), "gpu": HOPPER, "options": table})


# ---- the plan


def test_by_default_the_engine_is_for_every_target_and_over_all_dims() -> None:
    wanted = plan()
    assert (wanted.targets, wanted.profiles, wanted.gpu) == (ALL, (LAYER_DIMS,), None)


@pytest.mark.parametrize(
    ("precisions", "precision"),
    [(("fp32",), "fp16"), (("fp32", "fp16"), "fp16"), (("fp32", "bf16"), "bf16"), (("bf16", "fp16"), "bf16")],
)
def test_the_default_precision_is_a_half_that_is_there_or_else_fp16(
    precisions: tuple[Precision, ...], precision: Precision
) -> None:
    assert plan(precisions=precisions).precision == precision


def test_fp32_is_compiled_only_on_request() -> None:
    assert plan(precision="fp32").precision == "fp32"
    assert plan(precisions=("fp32",)).precision != "fp32"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("refittable", True, "strips and refits weights only where a GPU is; use --engine tensorrt on the GPU, or rebuild"),
        ("strip_weights", True, "strips and refits weights only where a GPU is; use --engine tensorrt on the GPU, or rebuild"),
        ("timing_cache", Path("cache"), "times nothing while it builds; leave the timing cache out"),
        ("version_compatible", True, "ships no lean runtime to put into the engine; use --engine tensorrt on the GPU"),
        ("hardware_compatibility", "ampere_plus", "compiles for --target instead; name every GPU generation there"),
    ],
)
def test_what_rtx_cannot_do_is_refused_with_the_reason_and_the_way_out(name: str, value: object, reason: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(f'engine.{name} with --engine rtx: TensorRT-RTX {reason}')}"):
        plan(**{name: value})


@pytest.mark.usefixtures("no_gpu")
def test_tensorrt_without_a_gpu_is_refused_with_both_ways_out() -> None:
    with pytest.raises(EngineError) as caught:
        plan(library="tensorrt")
    assert str(caught.value) == (
        "--engine tensorrt builds on the GPU that the engine is for, and here is none: no NVIDIA driver answers; "
        "build on the GPU machine, or ahead of time with --engine rtx"
    )


def test_tensorrt_is_planned_for_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "query", lambda: Gpus((HOPPER,)))
    monkeypatch.setattr(libraries, "load", lambda name: None)
    wanted = plan(library="tensorrt", refittable=True)
    assert (wanted.gpu, wanted.targets) == (HOPPER, ())
    with pytest.raises(InputError, match="a stripped engine is refitted anyway; give one of them"):
        plan(library="tensorrt", refittable=True, strip_weights=True)


# ---- what came out is proven


def made(entry: EngineEntry, manifest: Manifest, **counts: Any) -> Built:
    """What the builder would say of the entry's engine."""
    names, signature = {dtype: name for name, dtype in engines.DTYPES.items()}, signature_of_engine(manifest, entry)
    facts = Facts(
        version=entry.version,
        bytes=1,
        inputs={tensor.name: names[tensor.dtype] for tensor in signature.inputs},
        outputs={tensor.name: names[tensor.dtype] for tensor in signature.outputs},
        matmuls={"HALF": 10},
    )
    return Built(replace(facts, **counts), BuildLog("", (), ()), 0.1)


@pytest.mark.parametrize(
    "counts",
    [
        {"matmuls": {"FLOAT": 10}},
        {"matmuls": {"HALF": 9, "FLOAT": 1}},
        {"matmuls": {}},
        {"inputs": {"x": "HALF", "context": "HALF", "mask": "BOOL", "context_mask": "BOOL"}},
        pytest.param(
            {"outputs": {"out": "HALF", "context_out": "HALF"}},
        ),
        {"outputs": {"out": "FLOAT"}},
        {"inputs": {"x": "FLOAT"}},
    ],
    ids=str,
)
def test_an_engine_of_another_precision_or_other_edges_never_gets_into_a_bundle(
    built: Path, entry: EngineEntry, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, counts: dict[str, Any]
) -> None:
    """The library never said so, but might one day: nobody is to get fp32 silently."""
    monkeypatch.setattr(engines, "compile_engine", lambda *arguments: made(entry, manifest, **counts))
    with untouched(built), pytest.raises(EngineError, match="report this"):
        build(built)


def test_the_engine_that_fits_gets_in(
    built: Path, entry: EngineEntry, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counterpart: what is refused above is refused for what differs."""
    monkeypatch.setattr(engines, "compile_engine", lambda *arguments: made(entry, manifest))
    assert build(built, targets=["sm89"]).matmuls == {"float16": 10}


# ---- stale


def test_a_fresh_engine_is_usable(built: Path, entry: EngineEntry) -> None:
    with Bundle.open(built) as bundle:
        assert engine_for(bundle, "rtx", entry.version, "sm89") == (entry, built / entry.file)
        assert why_stale(entry, bundle.manifest, None) is None  # nothing is known of the machine


def test_a_model_that_changed_makes_its_engine_stale(entry: EngineEntry, manifest: Manifest) -> None:
    other = entry.model_copy(update={"model_sha256": "0" * 64})
    assert why_stale(other, manifest, entry.version, "sm89") == "models/fp16.onnx has changed since it was built"
    files = {name: file for name, file in manifest.files.items() if name != entry.model}
    assert why_stale(entry, manifest.model_copy(update={"files": files}), None) is not None


@pytest.mark.parametrize("loaded", ["1.7.1.115", "1.7.1.117", "1.8", "1.7.1", "2.0.0.0"])
def test_an_engine_loads_only_in_the_version_that_built_it(entry: EngineEntry, manifest: Manifest, loaded: str) -> None:
    other = entry.model_copy(update={"version": "1.7.1.116"})
    assert why_stale(other, manifest, "1.7.1.116") is None
    assert why_stale(other, manifest, loaded) == f"it was built by rtx 1.7.1.116, and {loaded} is installed"


@given(st.tuples(*[st.integers(0, 30)] * 4), st.tuples(*[st.integers(0, 30)] * 4))
def test_versions_are_compared_as_numbers(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    entry = EngineEntry.model_construct(version=".".join(map(str, one)), options=BuildOptions())
    compatible = entry.model_copy(update={"options": BuildOptions(version_compatible=True)})
    loaded = ".".join(map(str, other))
    assert usable._loads(entry, loaded) == (one == other)
    assert usable._loads(compatible, loaded) == (other >= one)


def test_a_version_compatible_engine_loads_in_later_versions_only(entry: EngineEntry, manifest: Manifest) -> None:
    engine = local(entry, version_compatible=True).model_copy(update={"version": "10.9.0.1"})
    assert why_stale(engine, manifest, "10.16.1.11") is None
    assert why_stale(engine, manifest, "10.8.0.43") == "it was built by tensorrt 10.9.0.1, and 10.8.0.43 is installed"


def test_an_engine_runs_only_on_its_targets(entry: EngineEntry, manifest: Manifest) -> None:
    assert why_stale(entry, manifest, entry.version, "sm86") == "it was built for sm89, and the GPU is sm86"
    both = entry.model_copy(update={"targets": ("sm86", "sm89")})
    assert why_stale(both, manifest, entry.version, "sm86") is None
    assert why_stale(both, manifest, entry.version, "sm90") == "it was built for sm86, sm89, and the GPU is sm90"


@pytest.mark.parametrize(
    ("compatibility", "runs", "refused"),
    [
        ("none", ["sm90"], ["sm75", "sm80", "sm89", "sm100", "sm120"]),
        ("same_compute_capability", ["sm90"], ["sm75", "sm80", "sm89", "sm100", "sm120"]),
        ("ampere_plus", ["sm80", "sm89", "sm90", "sm100", "sm120"], ["sm75"]),
    ],
)
def test_an_engine_built_on_a_gpu_runs_there_and_where_it_was_made_to(
    entry: EngineEntry, manifest: Manifest, compatibility: str, runs: list[str], refused: list[str]
) -> None:
    engine = local(entry, hardware_compatibility=compatibility)
    assert [why_stale(engine, manifest, None, capability) for capability in runs] == [None] * len(runs)
    for capability in refused:
        assert why_stale(engine, manifest, None, capability) == f"it was built for sm90, and the GPU is {capability}"


def test_a_bundle_without_an_engine_for_the_library_names_the_command(built: Path, exported: Bundle) -> None:
    with pytest.raises(EngineError, match=f"has no rtx engine; build one: bca build {exported.directory} --engine rtx"):
        engine_for(exported, "rtx", "1", "sm89")
    with Bundle.open(built) as bundle, pytest.raises(EngineError, match="has no tensorrt engine"):
        engine_for(bundle, "tensorrt", "1", "sm89")


def age(path: Path, **changes: object) -> None:
    """Make the bundle's engines older than they are; the manifest is the one file without a hash."""
    with Bundle.open(path) as bundle:
        stale = tuple(entry.model_copy(update=changes) for entry in bundle.manifest.engines)
        text = bundle.manifest.model_copy(update={"engines": stale}).model_dump_json()
    (path / "manifest.json").write_text(text)


def as_built(entry: EngineEntry) -> dict[str, object]:
    """Everything but the options, which say what was asked for: a default or, in a command, its value."""
    return entry.model_dump(exclude={"options"})


def cure(message: str) -> None:
    """Run the command that a message ends with."""
    command = shlex.split(message.partition("rebuild it: ")[2])
    assert command[:2] == ["bca", "build"]
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("change", [{"model_sha256": "0" * 64}, {"version": "1.6.0.1"}])
def test_a_stale_engine_is_refused_with_the_command_that_cures_it(built: Path, entry: EngineEntry, change: Any) -> None:
    age(built, **change)
    with Bundle.open(built) as bundle, pytest.raises(EngineError, match=r"engines/rtx-fp16\.engine is stale: ") as caught:
        engine_for(bundle, "rtx", entry.version, "sm89")
    cure(str(caught.value))
    with Bundle.open(built) as bundle:
        fresh, _ = engine_for(bundle, "rtx", entry.version, "sm89")
    assert as_built(fresh) == as_built(entry)


def test_the_command_that_rebuilds_gives_the_same_targets_precision_and_profiles(built: Path) -> None:
    profiles = [{"batch": {"min": 1, "opt": 1, "max": 1}}, {"x_len": {"min": 1, "opt": 9, "max": 30}}]
    before = build(built, targets=["sm86", "sm120"], precision="fp32", profiles=profiles)
    cure("rebuild it: " + rebuild_command(before, built))
    with Bundle.open(built) as bundle:
        after = bundle.manifest.engines[-1]
    assert as_built(after) == as_built(before)


def test_the_command_that_rebuilds_gives_the_same_options(built: Path) -> None:
    options: dict[str, Any] = {"layer_names": "none", "aux_streams": 1, "workspace_mib": 900, "time_limit_s": 77.0}
    before = build(built, targets=["sm89"], **options)
    cure("rebuild it: " + rebuild_command(before, built))
    with Bundle.open(built) as bundle:
        after = bundle.manifest.engines[-1].options
    assert {name: getattr(after, name) for name in options} == options


def test_the_command_that_rebuilds_survives_a_space_in_the_path(entry: EngineEntry) -> None:
    assert shlex.split(rebuild_command(entry, "/data/my model"))[2] == "/data/my model"


def test_the_command_for_an_archive_names_the_archive(built: Path, tmp_path: Path) -> None:
    from bca_deploy.bundle.write import staged

    archive = tmp_path / "model.bca"
    with staged(archive) as directory:
        shutil.copytree(built, directory, dirs_exist_ok=True)
    with Bundle.open(archive) as bundle, pytest.raises(EngineError, match=rf"bca build {archive} "):
        engine_for(bundle, "rtx", "1.0", "sm89")


def test_every_stale_engine_gets_its_own_reason(built: Path, entry: EngineEntry) -> None:
    build(built, targets=["sm86"], precision="fp32")
    with Bundle.open(built) as bundle, pytest.raises(EngineError) as caught:
        engine_for(bundle, "rtx", entry.version, "sm90")
    for file, target in (("rtx-fp16", "sm89"), ("rtx-fp32", "sm86")):
        assert f"engines/{file}.engine is stale: it was built for {target}, and the GPU is sm90" in str(caught.value)
    with Bundle.open(built) as bundle:  # one that fits is enough
        assert engine_for(bundle, "rtx", entry.version, "sm86")[0].precision == "fp32"


def test_inspect_notes_a_stale_engine_and_how_to_rebuild_it(built: Path) -> None:
    def shown() -> str:
        result = CliRunner().invoke(app, ["inspect", str(built)])
        assert result.exit_code == 0
        return result.stdout

    assert "stale: " not in shown()
    age(built, version="1.6.0.1")
    (note,) = (line for line in shown().splitlines() if line.startswith("stale: "))
    assert note.startswith(f"stale: engines/rtx-fp16.engine: it was built by rtx 1.6.0.1, and {installed('rtx')} is installed")
    cure(note)
    assert "stale: " not in shown()


# ---- the file


def test_an_engine_of_the_same_kind_replaces_the_old_one(built: Path, manifest: Manifest) -> None:
    fresh = build(built, targets=["sm120"])
    with Bundle.open(built) as bundle:
        assert bundle.manifest.engines == (fresh,)
        assert set(bundle.manifest.files) == set(manifest.files)
    assert fresh.targets == ("sm120",)


def test_engines_of_two_precisions_stand_side_by_side(built: Path, entry: EngineEntry) -> None:
    other = build(built, precision="fp32", targets=["sm89"])
    with Bundle.open(built) as bundle:
        assert bundle.manifest.engines == (entry, other)
        assert {entry.file, other.file} <= set(bundle.manifest.files)


def test_the_installed_version_is_the_one_that_builds(entry: EngineEntry) -> None:
    assert installed("rtx") == entry.version
    assert installed("tensorrt") is None


def test_a_profile_outside_the_dims_is_refused_before_any_builder_runs(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*arguments: object) -> Built:
        raise AssertionError("the builder ran")

    monkeypatch.setattr(engines, "compile_engine", work)
    before = contents(built)
    for profiles in ([{"batch": {"min": 1, "opt": 4, "max": 9}}], [{}, {}]):
        with pytest.raises(BcaError, match=r"outside the bundle's 1 to 8|two optimization profiles are the same"):
            build(built, profiles=profiles)
    assert contents(built) == before


def test_a_dimension_range_is_written_as_the_flag_that_reads_it() -> None:
    dims = Dims(batch=DimRange(1, 1, 4), x_len=DimRange(1, 128, 512), context_len=DimRange(2, 2, 2))
    assert usable._as_flag(dims) == "batch=1:1:4,x_len=1:128:512,context_len=2:2:2"
