"""Engines end to end without a GPU, by `bca build` and by `bca-export --engine`: what is in the bundle then, and that a
build that fails, is killed or comes second leaves the bundle as it was."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.bundles import contents, plain_verdict, untouched
from support.layers import make_checkpoint
from support.servers import until
from typer.testing import CliRunner, Result

import bca_deploy
from bca_deploy.bundle.manifest import EngineEntry, signature_of_engine
from bca_deploy.bundle.read import Bundle, sha256
from bca_deploy.bundle.write import staged
from bca_deploy.cli import app, export_app
from bca_deploy.engines import build as engines
from bca_deploy.engines import usable
from bca_deploy.engines.compile import Built
from bca_deploy.errors import BundleError, EngineError, InputError
from bca_deploy.exporter import build as building
from bca_deploy.exporter import models, plan
from bca_deploy.exporter import verify as verification
from bca_deploy.exporter.build import build
from bca_deploy.exporter.recipe import read_recipe
from bca_deploy.signature import DimRange, Dims
from bca_deploy.spec import LAYER_DIMS

BIN = Path(sys.executable).parent
ALL = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
#: NVIDIA's compiler fuses attentions whose heads have at least 16 features; the layer of `exported` has 8.
FUSABLE = {"dim_head": 16, "prenorm": True}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def copy(exported: Bundle, tmp_path: Path) -> Path:
    """The small bundle, to change: an fp32 and an fp16 model, no engine."""
    return Path(shutil.copytree(exported.directory, tmp_path / "model"))


@pytest.fixture(scope="module")
def _fusable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fusable") / "model"
    bca_deploy.export(make_checkpoint(**FUSABLE).module(torch.float32), path, precision="fp16").close()
    return path


@pytest.fixture
def fusable(_fusable: Path, tmp_path: Path) -> Path:
    """A bundle with an fp16 model whose attentions can be fused."""
    return Path(shutil.copytree(_fusable, tmp_path / "fusable"))


@pytest.fixture
def no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before anything is built or traced."""

    def work(*arguments: object) -> Built:
        raise AssertionError("the work began")

    monkeypatch.setattr(engines, "compile_engine", work)
    monkeypatch.setattr(models, "make_model", work)


def bca(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def bca_export(*arguments: object) -> Result:
    return CliRunner().invoke(export_app, [str(argument) for argument in arguments])


def ok(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(result: Result, message: str, code: int = 2) -> None:
    """Hold that the command ended with one readable message on standard error and nothing on standard output."""
    assert isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert (result.exit_code, result.stdout) == (code, "")
    last = result.stderr[result.stderr.index("error: ") :]
    assert re.search(message, last), last


def engine_of(path: Path, index: int = -1) -> EngineEntry:
    with Bundle.open(path) as bundle:
        return bundle.manifest.engines[index]


def ranges(batch: int, x_len: int, context_len: int) -> dict[str, dict[str, int]]:
    sizes = {"batch": batch, "x_len": x_len, "context_len": context_len}
    return {name: {"min": size, "opt": size, "max": size} for name, size in sizes.items()}


# ---- what is built


def test_one_file_holds_every_target(fusable: Path) -> None:
    assert build(fusable).targets == ALL
    with Bundle.open(fusable) as bundle:
        (entry,) = bundle.manifest.engines
        model, engine = bundle.path(entry.model), bundle.path(entry.file)
        assert [path.name for path in engine.parent.iterdir()] == ["rtx-fp16.engine"]
        # The kernels of six GPU generations, and the weights once: never six times.
        fp16_weights = 2 * sum(tensor.numel() for tensor in plan.source_of(bundle).checkpoint.state.values())
        assert engine.stat().st_size <= 1.05 * fp16_weights + 2_600_000
        assert sha256(model) == entry.model_sha256


def test_a_list_of_targets_is_taken_in_the_library_s_order_and_once(copy: Path) -> None:
    result = json.loads(
        ok(bca("build", copy, "--engine", "rtx", "--target", "sm120", "--target", "sm86", "--target", "sm120", "--json"))
    )
    assert result["targets"] == ["sm86", "sm120"]
    assert engine_of(copy).model_dump(mode="json") == result


def test_the_entry_says_what_the_engine_is(fusable: Path) -> None:
    entry = build(fusable, "rtx", targets=["sm89"])
    with Bundle.open(fusable) as bundle:
        assert bundle.manifest.engines == (entry,)
        size = bundle.path(entry.file).stat().st_size
        assert bundle.manifest.files[entry.file].bytes == size
        assert bundle.manifest.files[entry.file].sha256 == sha256(bundle.path(entry.file))
    assert (entry.file, entry.library, entry.version) == ("engines/rtx-fp16.engine", "rtx", usable.installed("rtx"))
    assert (entry.model, entry.precision, entry.gpu, entry.static) == ("models/fp16.onnx", "fp16", None, False)
    assert entry.profiles == (LAYER_DIMS,)
    assert entry.matmuls == {"float16": 10}
    assert entry.scratch_bytes is not None
    assert entry.scratch_bytes > 0
    assert entry.weight_bytes is not None
    assert 0 < entry.weight_bytes < size
    # One map at the largest shapes; were it written, it would be in the scratch memory.
    assert entry.scratch_bytes < 8 * 3 * 2048 * 2048 * 2
    assert (entry.attentions_fused, entry.fusion_evidence) == (True, "log")


def test_without_layer_names_the_scratch_memory_says_whether_attentions_are_fused(fusable: Path) -> None:
    entry = build(fusable, targets=["sm89"], layer_names="none")
    assert (entry.attentions_fused, entry.fusion_evidence) == (True, "scratch")


def test_attentions_that_are_not_fused_are_not_said_to_be(copy: Path) -> None:
    """Heads of 8 features are too narrow for NVIDIA's kernel: the log says so, and the scratch memory says nothing."""
    entry = build(copy, targets=["sm89"])
    assert (entry.attentions_fused, entry.fusion_evidence) == (False, "log")
    entry = build(copy, targets=["sm89"], layer_names="none")
    assert (entry.attentions_fused, entry.fusion_evidence) == (None, "unknown")
    assert "NOT fused" in ok(bca("build", copy, "--engine", "rtx", "--target", "sm89"))


def test_every_profile_has_to_fuse_every_attention(fusable: Path) -> None:
    one = ranges(1, 1, 1)
    assert build(fusable, targets=["sm89"], profiles=[one]).attentions_fused is False
    assert build(fusable, targets=["sm89"], profiles=[one, {}]).attentions_fused is False


def test_seconds_and_warnings_are_in_build_json_and_not_in_the_manifest(copy: Path) -> None:
    build(copy, targets=["sm89"])
    told = json.loads((copy / "build.json").read_text())
    assert told["engines"]["engines/rtx-fp16.engine"].keys() == {"seconds", "warnings"}
    assert told["engines"]["engines/rtx-fp16.engine"]["seconds"] > 0
    assert {"engine rtx fp16", "trace fp16"} <= told["seconds"].keys()  # what the export took is still there
    assert "seconds" not in (copy / "manifest.json").read_text()


def test_two_builds_of_the_same_differ_in_the_engine_alone(exported: Bundle, tmp_path: Path) -> None:
    """TensorRT-RTX 1.7.1 orders a few bytes by chance: the engine's hash is not a function of its inputs."""
    found = []
    for name in ("one", "other"):
        path = Path(shutil.copytree(exported.directory, tmp_path / name))
        build(path, targets=["sm89"])
        own = contents(path)
        manifest = json.loads(own.pop("manifest.json"))
        del own["build.json"], own["engines/rtx-fp16.engine"], manifest["files"]["engines/rtx-fp16.engine"]["sha256"]
        found.append((own, manifest))
    assert found[0] == found[1]


def test_everything_but_the_engine_stays_as_it_was(copy: Path) -> None:
    before = contents(copy)
    build(copy, targets=["sm89"])
    changed = {name for name, content in contents(copy).items() if before.get(name) != content}
    assert changed == {"engines", "engines/rtx-fp16.engine", "manifest.json", "build.json"}


def test_a_user_s_own_file_in_the_bundle_stays(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    build(copy, targets=["sm89"])
    assert (copy / "notes.txt").read_text() == "mine"


def test_several_profiles_go_into_one_engine(copy: Path) -> None:
    flags = ["--profile", "batch=1,x_len=1:128:512", "--profile", "batch=8,context_len=1:64:64"]
    ok(bca("build", copy, "--engine", "rtx", "--target", "sm89", *flags))
    entry, one, eight = engine_of(copy), DimRange(1, 1, 1), DimRange(8, 8, 8)
    assert entry.profiles == (
        Dims(LAYER_DIMS, batch=one, x_len=DimRange(1, 128, 512)),
        Dims(LAYER_DIMS, batch=eight, context_len=DimRange(1, 64, 64)),
    )
    assert not entry.static
    with Bundle.open(copy) as bundle:
        assert [path.name for path in bundle.path(entry.file).parent.iterdir()] == ["rtx-fp16.engine"]


def test_one_profile_of_fixed_sizes_makes_a_static_engine(copy: Path) -> None:
    entry = build(copy, targets=["sm89"], profiles=[ranges(2, 20, 30)])
    assert entry.static
    moving = build(copy, targets=["sm89"], profiles=[ranges(2, 20, 30) | {"batch": {"min": 1, "opt": 2, "max": 2}}])
    assert not moving.static
    build(copy, targets=["sm89"], profiles=[ranges(2, 20, 30)])
    assert re.search(r"rtx-fp16\.engine .* static ", ok(bca("inspect", copy)))


def test_fp32_is_built_on_request(copy: Path) -> None:
    entry = build(copy, targets=["sm89"], precision="fp32")
    assert (entry.file, entry.model, set(entry.matmuls)) == ("engines/rtx-fp32.engine", "models/fp32.onnx", {"float32"})


def test_fp32_is_for_every_target_that_has_it(copy: Path) -> None:
    assert build(copy, precision="fp32").targets == ALL[1:]


@pytest.mark.usefixtures("no_builder")
def test_fp32_for_sm75_is_refused_before_any_builder_runs(copy: Path) -> None:
    with pytest.raises(InputError, match="precision fp32 with target sm75"):
        build(copy, precision="fp32", targets=["sm75"])


def test_the_workspace_is_a_bound_on_the_scratch_memory(fusable: Path) -> None:
    assert (build(fusable, targets=["sm89"], workspace_mib=64).scratch_bytes or 0) <= 64 << 20


# ---- the model of the precision


@pytest.fixture(scope="module")
def _single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model"
    bca_deploy.export(make_checkpoint(**FUSABLE).module(torch.float32), path, precision="fp32").close()
    return path


@pytest.fixture
def single(_single: Path, tmp_path: Path) -> Path:
    """A bundle with an fp32 model only."""
    return Path(shutil.copytree(_single, tmp_path / "single"))


def test_a_model_that_is_not_there_is_made_from_the_bundle_s_weights_and_judged(single: Path) -> None:
    with Bundle.open(single) as bundle:
        before = bundle.manifest
    ok(bca("build", single, "--engine", "rtx", "--target", "sm89"))
    with Bundle.open(single) as bundle:
        first, for_cpu, made = bundle.manifest.models
        (entry,) = bundle.manifest.engines
        reports = json.loads(bundle.path("parity.json").read_text())["models"]
    assert (first, for_cpu) == before.models
    assert (made.precision, made.file, made.parity.passed) == ("fp16", "models/fp16.onnx", True)
    assert made.parity.cases >= 40
    assert [report["model"] for report in reports] == ["fp32", "fp32.onnxruntime-cpu", "fp16"]
    assert (entry.model, entry.matmuls) == (made.file, {"float16": 10})  # float16 products, and no other
    assert made.keep_io_types == first.keep_io_types
    assert all(verification.verify(single, scope="quick"))  # the self-test has the new model's bounds too


def test_bf16_is_for_every_target_that_has_it(single: Path) -> None:
    entry = build(single, precision="bf16")
    assert entry.targets == ALL[1:]
    assert entry.matmuls == {"bfloat16": 10}


def test_a_model_that_fails_parity_gets_no_engine_and_leaves_the_bundle_as_it_was(
    single: Path, no_builder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bundle.open(single) as bundle:
        entry = bundle.manifest.models[0]
    monkeypatch.setattr(models, "make_model", lambda *arguments: (entry, plain_verdict(failures=("wrong by 7",))))
    with untouched(single):
        refused(bca("build", single, "--engine", "rtx"), "wrong by 7", code=1)


@pytest.mark.parametrize(("flag", "edge"), [("--half-io", "float16"), ("--keep-io-types", "float32")])
def test_the_engine_s_edges_are_the_model_s(tmp_path: Path, flag: str, edge: str) -> None:
    save_file(make_checkpoint(prenorm=True).state, tmp_path / "layer.safetensors")
    options = ["--checkpoint", tmp_path / "layer.safetensors", "--heads", "3", "--precision", "fp16", flag]
    ok(bca_export(*options, "--engine", "rtx", "--target", "sm89", "--out", tmp_path / "m"))
    with Bundle.open(tmp_path / "m") as bundle:
        (entry,) = bundle.manifest.engines
        signature = signature_of_engine(bundle.manifest, entry)
    assert {tensor.dtype for tensor in signature.inputs} == {edge, "bool"}  # and the build would fail if they were others
    assert {tensor.dtype for tensor in signature.outputs} == {edge}
    assert set(entry.matmuls) == {"float16"}


# ---- export and engine in one


def test_an_export_with_an_engine_makes_the_half_model_too(tmp_path: Path) -> None:
    save_file(make_checkpoint(**FUSABLE).state, tmp_path / "layer.safetensors")
    out = tmp_path / "m"
    options = ["--checkpoint", tmp_path / "layer.safetensors", "--heads", "3", "--engine", "rtx", "--target", "sm89"]
    shown = ok(bca_export(*options, "--profile", "batch=1,x_len=64,context_len=64", "--out", out))
    assert "engines/rtx-fp16.engine" in shown
    with Bundle.open(out) as bundle:
        portable = [model.precision for model in bundle.manifest.models if model.runtime == "portable"]
        assert portable == ["fp32", "fp16"]
        (entry,) = bundle.manifest.engines
    assert (entry.targets, entry.static, entry.precision) == (("sm89",), True, "fp16")


def test_an_export_whose_engine_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Built:
        raise EngineError("the builder crashed")

    save_file(make_checkpoint().state, tmp_path / "layer.safetensors")
    monkeypatch.setattr(engines, "compile_engine", fail)
    options = ["--checkpoint", tmp_path / "layer.safetensors", "--heads", "3", "--precision", "fp16", "--engine", "rtx"]
    refused(bca_export(*options, "--out", tmp_path / "m"), "the builder crashed")
    assert [path.name for path in tmp_path.iterdir()] == ["layer.safetensors"]


def test_a_dry_run_shows_the_engine_and_builds_none(tmp_path: Path, no_builder: None) -> None:
    out = tmp_path / "m"
    shown = json.loads(ok(bca_export("--engine", "rtx", "--target", "sm89", "--out", out, "--dry-run", "--json")))
    assert shown["engine"] == "rtx fp16 for sm89"
    assert shown["precision"] == ["fp32", "fp16"]
    assert not out.exists()


def test_a_recipe_may_say_it_all(copy: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "engine.toml"
    recipe.write_text(
        '[engine]\nlibrary = "rtx"\ntargets = ["sm86"]\nprecision = "fp32"\nlayer_names = "names"\n'
        "[[profile]]\nbatch = {min = 1, opt = 1, max = 1}\n"
    )
    ok(bca("build", copy, "--recipe", recipe))
    entry = engine_of(copy)
    assert (entry.targets, entry.precision, entry.options.layer_names) == (("sm86",), "fp32", "names")
    assert entry.profiles[0]["batch"].max == 1
    ok(bca("build", copy, "--recipe", recipe, "--target", "sm89"))  # a flag overrides it
    assert engine_of(copy).targets == ("sm89",)


@pytest.mark.usefixtures("no_builder")
def test_a_recipe_s_library_counts_in_python_too(copy: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "engine.toml"
    recipe.write_text('[engine]\nlibrary = "tensorrt"\n')
    with pytest.raises(EngineError, match="--engine tensorrt builds on the GPU"):
        build(copy, recipe=recipe)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"layer": {"talking_heads": True}}, id="talking heads"),
        pytest.param({"maps": True}, id="attention maps"),
    ],
)
def test_the_reference_lowering_compiles_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    module = make_checkpoint(**FUSABLE, **changes.get("layer", {})).module(torch.float32)
    maps = {"attention_maps": changes.get("maps", False)}
    with bca_deploy.export(module, tmp_path / "m", precision="fp16", outputs=maps, engine={"library": "rtx"}) as bundle:
        (entry,) = bundle.manifest.engines
        assert bundle.manifest.models[0].lowering == "reference"
        outputs = bundle.manifest.signature.outputs
    assert entry.targets == ALL
    assert set(entry.matmuls) == {"float16"}
    assert entry.attentions_fused is False  # the literal graph has no attention that a compiler would know
    assert [tensor.name for tensor in outputs][2:] == (["attn", "context_attn"] if changes.get("maps") else [])


# ---- refused


@pytest.mark.usefixtures("no_builder")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "sm98"], r"target 'sm98' is not known \(did you mean 'sm89'\?\); allowed: sm75, sm80, .*sm121"),
        (["--target", "sm90"], r"target sm90 \(H100 and H200\): .*use --engine tensorrt on that GPU; allowed: sm75"),
        (["--precision", "bf16", "--target", "sm75"], r"bf16 with target sm75: .*no bf16 products .*use fp16 there"),
        (["--profile", "batch=1:1:9"], r"profile 1: batch 1 to 9 is outside the bundle's 1 to 8; narrow .*--batch 1:1:9"),
        (["--profile", "batch=1", "--profile", "batch=1"], r"two optimization profiles are the same; leave one of them out"),
        (
            ["--set", "engine.refittable=true"],
            r"engine\.refittable with --engine rtx: .*--engine tensorrt on the GPU, or rebuild",
        ),
        (["--set", "engine.strip_weights=true"], r"engine\.strip_weights with --engine rtx: "),
        (["--set", "engine.timing_cache=cache"], r"engine\.timing_cache with --engine rtx: .*leave the timing cache out"),
        (["--set", "engine.version_compatible=true"], r"engine\.version_compatible with --engine rtx: "),
        (
            ["--set", "engine.hardware_compatibility=ampere_plus"],
            r"engine\.hardware_compatibility with --engine rtx: .*target",
        ),
        (["--set", "engine.optimization_level=9"], r"engine\.optimization_level: .*less than or equal to 5 \(got 9\)"),
        (["--set", "engine.time_limit_s=0"], r"engine\.time_limit_s: .*greater than 0 \(got 0\)"),
        (["--set", "engine.tf23=true"], r"unknown key engine\.tf23 \(did you mean 'tf32'\?\)"),
        (["--set", "tf32=true"], r"--set 'tf32=true': give engine\.KEY=VALUE, such as engine\.tf32=true"),
        (["--precision", "fp16", "--set", "engine.precision=fp32"], r"engine\.precision is 'fp16' by a flag or another --set"),
        (["--set", "engine.tf32=true", "--set", "engine.tf32=false"], r"engine\.tf32 is True by a flag or another --set; give"),
        (["--set", "engine.tf32"], r"--set 'engine\.tf32': give engine\.KEY=VALUE"),
        (["--profile", "bach=1"], r"'bach' is no dimension \(did you mean 'batch'\?\)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_any_builder_runs(copy: Path, options: list[str], message: str) -> None:
    with untouched(copy.parent):
        refused(bca("build", copy, "--engine", "rtx", *options), message)


@pytest.mark.usefixtures("no_builder")
def test_tensorrt_without_a_gpu_is_refused_with_the_way_out(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bca_deploy.engines.gpus import Gpus

    monkeypatch.setattr(engines, "query", lambda: Gpus(why_none="no NVIDIA driver answers"))
    for command in (bca("build", copy, "--engine", "tensorrt"), bca_export("--engine", "tensorrt", "--out", copy.parent / "m")):
        refused(command, "here is none: no NVIDIA driver answers; build on the GPU machine, or ahead of time with --engine rtx")
    assert [path.name for path in copy.parent.iterdir()] == ["model"]


@pytest.mark.usefixtures("no_builder")
@pytest.mark.parametrize("options", [[], ["--engine", "rtx", "--target", "sm90"], ["--engine", "rtx", "--profile", "batch=9"]])
def test_an_export_refuses_an_engine_that_cannot_be_before_any_work(tmp_path: Path, options: list[str]) -> None:
    refused(
        bca_export(*options, *([] if options else ["--profile", "batch=1"]), "--out", tmp_path / "m"), "engine|target|batch"
    )
    assert not list(tmp_path.iterdir())


def test_without_an_engine_to_build_the_way_out_is_named(copy: Path) -> None:
    refused(bca("build", copy), "no engine was asked for; give --engine rtx or --engine tensorrt, or a recipe with")
    with pytest.raises(InputError, match="no engine was asked for"):
        building.build_recipe(copy, read_recipe(None), bca_deploy.progress.Silent())


def test_a_place_without_a_bundle_is_refused(tmp_path: Path) -> None:
    refused(bca("build", tmp_path / "absent", "--engine", "rtx"), "absent is not a bundle")
    assert not list(tmp_path.iterdir())


def test_a_damaged_bundle_gets_no_engine(copy: Path) -> None:
    model = copy / "models/fp16.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    with untouched(copy):
        refused(bca("build", copy, "--engine", "rtx"), r"models/fp16\.onnx has changed since the export")


# ---- whole or not at all


def test_an_archive_is_rebuilt_in_place(exported: Bundle, tmp_path: Path) -> None:
    archive = tmp_path / "model.bca"
    with staged(archive) as directory:
        shutil.copytree(exported.directory, directory, dirs_exist_ok=True)
    ok(bca("build", archive, "--engine", "rtx", "--target", "sm89"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.bca"]
    with Bundle.open(archive) as bundle:
        assert bundle.path("engines/rtx-fp16.engine").stat().st_size > 0
        assert bundle.manifest.models == exported.manifest.models


def test_a_second_writer_is_refused_while_the_first_builds(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engines.compile_engine
    seen: list[str] = []

    def second(*arguments: Any) -> Built:
        with pytest.raises(BundleError) as caught:
            build(copy, targets=["sm86"])
        seen.append(str(caught.value))
        return real(*arguments)

    monkeypatch.setattr(engines, "compile_engine", second)
    build(copy, targets=["sm89"])
    assert seen == [f"another process is writing {copy}; wait for it, or choose another --out"]
    assert engine_of(copy).targets == ("sm89",)


def test_no_other_writer_gets_in_between_reading_the_manifest_and_writing_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = engines.plan

    def slow(*arguments: Any) -> Any:
        monkeypatch.setattr(engines, "plan", real)
        with pytest.raises(BundleError, match="another process is writing"):
            build(copy, precision="fp32", targets=["sm89"])
        return real(*arguments)

    monkeypatch.setattr(engines, "plan", slow)
    build(copy, targets=["sm89"])
    with Bundle.open(copy) as bundle:
        assert [engine.precision for engine in bundle.manifest.engines] == ["fp16"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_build_that_is_interrupted_or_has_no_room_leaves_the_bundle_as_it_was(
    copy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(engines, "record", fail)  # the engine lies in the staging directory by then
    code = 130 if isinstance(error, KeyboardInterrupt) else 2
    with untouched(copy.parent):
        refused(bca("build", copy, "--engine", "rtx", "--target", "sm89"), "interrupted|No space left on device", code)


def test_a_build_over_its_time_limit_leaves_the_bundle_as_it_was(copy: Path) -> None:
    with untouched(copy.parent):
        refused(
            bca("build", copy, "--engine", "rtx", "--set", "engine.time_limit_s=0.05"),
            r"longer than 0\.05 s, at .*; raise engine\.time_limit_s",
        )


def command(path: Path, *, mark: str, kilobytes: str = "unlimited") -> subprocess.Popen[bytes]:
    """`bca build` as a user runs it, in a process of its own; the mark is handed down to its builder."""
    return subprocess.Popen(
        ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "-", BIN / "bca", "build", path, "--engine", "rtx"],
        env=os.environ | {"BCA_TEST_MARK": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def marked(mark: str) -> list[str]:
    """Return the processes that carry a mark."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"BCA_TEST_MARK={mark}".encode() in (place / "environ").read_bytes().split(b"\0"):
                found.append(place.name)
        except OSError:  # it has ended, or is another user's
            continue
    return found


def test_a_full_disk_leaves_the_bundle_as_it_was(copy: Path) -> None:
    """Room for every file of the bundle, and not for the engine."""
    with untouched(copy.parent), command(copy, mark="full", kilobytes="1000") as process:
        _, said = process.communicate()
    assert process.returncode == 2
    assert b"error: the engine was not built: File too large: " in said


@pytest.mark.slow
def test_a_killed_build_leaves_a_whole_bundle_at_whatever_moment(copy: Path, exported: Bundle) -> None:
    delay, killed, mark = 0.1, True, f"kill-{os.getpid()}"
    while killed:  # later and later, until one is faster than its killer
        with command(copy, mark=mark) as process:
            time.sleep(delay)
            killed = process.poll() is None
            process.send_signal(signal.SIGKILL)
        with Bundle.open(copy) as bundle:  # every hash is right
            assert bundle.manifest.models == exported.manifest.models
            assert len(bundle.manifest.engines) in (0, 1)
        delay += 0.1
    assert engine_of(copy).targets == ALL
    until(lambda: not marked(mark))  # a builder without a parent ends by itself
    build(copy, targets=["sm89"])  # and the next build takes away what was left beside it
    assert [path.name for path in copy.parent.iterdir()] == ["model"]


# ---- what is shown


def test_inspect_shows_the_engine(fusable: Path) -> None:
    entry = build(fusable, targets=["sm86", "sm89"])
    line = next(line for line in ok(bca("inspect", fusable)).splitlines() if "rtx-fp16.engine   rtx" in line)
    for shown in (entry.version, "sm86, sm89", "fused", f"{(entry.scratch_bytes or 0) / 1e6:.1f}"):
        assert shown in line
    assert "NOT" not in line
    listed = json.loads(ok(bca("inspect", fusable, "--json")))["engines"]
    assert listed == [entry.model_dump(mode="json")]


def test_progress_is_told_in_hundredths(copy: Path) -> None:
    stages: list[str] = []
    done: list[int] = []

    class Told:
        def stage(self, name: str) -> None:
            stages.append(name)

        def steps(self, finished: int, total: int) -> None:
            assert total == 100
            done.append(finished)

    build(copy, targets=["sm89"], progress=Told())
    assert stages == ["engine rtx fp16"]
    assert done == sorted(done)
    assert 0 < done[0] < done[-1] <= 100
