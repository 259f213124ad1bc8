"""`bca refit`: the bundle of the new weights, or the bundle as it was; never something of both."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.bundles import assert_same_bundle, plain_verdict, untouched
from support.layers import make_checkpoint
from typer.testing import CliRunner, Result

import bca_deploy
from bca_deploy.bundle.engine_options import BuildOptions
from bca_deploy.bundle.manifest import GpuEntry, ModelEntry
from bca_deploy.bundle.read import Bundle
from bca_deploy.bundle.write import staged
from bca_deploy.cli import app
from bca_deploy.engines import build as engines
from bca_deploy.engines import libraries
from bca_deploy.engines.build_log import BuildLog
from bca_deploy.engines.builder_process import Facts, Request
from bca_deploy.engines.compile import Built
from bca_deploy.engines.gpus import Gpus
from bca_deploy.engines.usable import engine_for, why_stale
from bca_deploy.errors import BcaError, BundleError, EngineError, InputError
from bca_deploy.exporter import layer_source, models
from bca_deploy.exporter import refit as refitting
from bca_deploy.exporter import verify as verification
from bca_deploy.exporter.build import build
from bca_deploy.exporter.layer_source import LayerSource
from bca_deploy.exporter.refit import refit
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.parity import user_sample
from bca_deploy.spec import LAYER_DIMS, Interface

HOPPER = GpuEntry(name="NVIDIA H200", compute_capability="sm90", driver="580.1")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def _engined(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(exported.directory, tmp_path_factory.mktemp("engined") / "model"))
    build(path, targets=["sm89"])
    return path


@pytest.fixture
def engined(_engined: Path, tmp_path: Path) -> Path:
    """The small bundle, which keeps a sample, with an fp16 engine; to change."""
    return Path(shutil.copytree(_engined, tmp_path / "model"))


@pytest.fixture
def copy(exported: Bundle, tmp_path: Path) -> Path:
    """The small bundle without an engine; to change."""
    return Path(shutil.copytree(exported.directory, tmp_path / "copy"))


@pytest.fixture(scope="module")
def new() -> Checkpoint:
    """The layer of the small bundle after more training."""
    return make_checkpoint(1, prenorm=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, new: Checkpoint) -> Path:
    """Weights and samples, right and wrong."""
    place = tmp_path_factory.mktemp("files")
    save_file(new.state, place / "new.safetensors")
    save_file(make_checkpoint(prenorm=True).state, place / "old.safetensors")
    save_file({f"encoder.{name}": tensor for name, tensor in new.state.items()}, place / "inside.safetensors")
    save_file(make_checkpoint(talking_heads=True, prenorm=True).state, place / "talking.safetensors")
    save_file(make_checkpoint(dim=25, prenorm=True).state, place / "wider.safetensors")
    save_file(make_checkpoint().state, place / "no-norm.safetensors")
    save_file({"conv.weight": torch.ones(3)}, place / "other.safetensors")
    save_file({**new.state, "to_v.weight": new.state["to_v.weight"] * torch.nan}, place / "nan.safetensors")
    (place / "text.safetensors").write_text("not weights")
    for name, checkpoint in (("new", new), ("old", make_checkpoint(prenorm=True))):
        module = checkpoint.module(torch.float32)
        np.savez(place / f"{name}.npz", **user_sample.from_module(module, checkpoint.spec, Interface(), LAYER_DIMS))  # type: ignore[arg-type]
    return place


def bca(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, message: str, code: int = 2) -> None:
    assert isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert (result.exit_code, result.stdout) == (code, "")
    last = result.stderr[result.stderr.index("error: ") :]
    assert re.search(message, last), last


def outputs(path: Path, model: ModelEntry) -> list[Any]:
    """What a model of the small layer computes on fixed inputs."""
    session = ort.InferenceSession(str(path / model.file), providers=["CPUExecutionProvider"])
    return list(session.run(["out", "context_out"], {name: tensor.numpy() for name, tensor in some_inputs().items()}))


def some_inputs() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    x, context = torch.randn(2, 7, 24, generator=draw), torch.randn(2, 5, 16, generator=draw)
    return {"x": x, "context": context, "mask": torch.ones(2, 7).bool(), "context_mask": torch.ones(2, 5).bool()}


# ---- the bundle of the new weights


def test_every_part_of_the_bundle_becomes_the_new_weights(engined: Path, files: Path, new: Checkpoint) -> None:
    with Bundle.open(engined) as bundle:
        before = bundle.manifest
    verdicts = refit(engined, files / "new.safetensors", drop_sample=True)
    names = ("fp32", "fp16", "fp32.onnxruntime-cpu")
    assert [(verdict.model, bool(verdict)) for verdict in verdicts] == [(name, True) for name in names]
    with Bundle.open(engined) as bundle:
        after = bundle.manifest
    with torch.no_grad():
        wanted = new.module(torch.float32)(**some_inputs())
    for model, tolerance in zip(after.models, (2e-6, 5e-3, 2e-6), strict=True):
        for ours, theirs in zip(outputs(engined, model), wanted, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=tolerance)
    stored = load_file(engined / "weights.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in new.state.items())
    models = [f"models/{name}.onnx" for name in names]
    for name in (*models, "parity.json", "selftest.npz", "engines/rtx-fp16.engine"):
        assert after.files[name].sha256 != before.files[name].sha256, name
    assert "expect.npz" not in after.files
    assert not (engined / "expect.npz").exists()
    assert (after.layer, after.interface, after.signature) == (before.layer, before.interface, before.signature)
    assert all(verification.verify(engined, scope="quick"))


def test_the_engine_is_built_again_as_it_was_and_is_fresh(engined: Path, files: Path) -> None:
    profiles = [{"batch": {"min": 1, "opt": 1, "max": 1}}, {"x_len": {"min": 3, "opt": 5, "max": 9}}]
    old = build(engined, targets=["sm86", "sm120"], profiles=profiles, layer_names="none", time_limit_s=300)
    refit(engined, files / "new.safetensors", drop_sample=True)
    with Bundle.open(engined) as bundle:
        (entry,) = bundle.manifest.engines
        assert entry.model_sha256 == bundle.manifest.files[entry.model].sha256 != old.model_sha256
        assert engine_for(bundle, "rtx", entry.version, "sm86")[0] == entry
    as_asked = {"targets", "precision"}  # these were defaults, and are written out
    assert entry.model_copy(update={"model_sha256": old.model_sha256}).model_dump(exclude={"options"}) == old.model_dump(
        exclude={"options"}
    )
    assert entry.options.model_dump(exclude=as_asked) == old.options.model_dump(exclude=as_asked)


def test_engines_of_every_precision_are_renewed(engined: Path, files: Path) -> None:
    build(engined, targets=["sm86"], precision="fp32")
    refit(engined, files / "new.safetensors", drop_sample=True)
    with Bundle.open(engined) as bundle:
        assert [(entry.precision, entry.targets) for entry in bundle.manifest.engines] == [
            ("fp16", ("sm89",)),
            ("fp32", ("sm86",)),
        ]
        for entry in bundle.manifest.engines:
            assert why_stale(entry, bundle.manifest, entry.version, entry.targets[0]) is None
        times = json.loads((engined / "build.json").read_text())["engines"]
    assert set(times) == {"engines/rtx-fp16.engine", "engines/rtx-fp32.engine"}


def test_a_refitted_bundle_is_the_export_of_the_new_weights(copy: Path, files: Path, new: Checkpoint, tmp_path: Path) -> None:
    """To the byte, though nothing was traced."""
    refit(copy, files / "new.safetensors", sample=files / "new.npz")
    fresh = tmp_path / "fresh"
    bca_deploy.export(new.module(torch.float32), fresh, precision=("fp32", "fp16")).close()
    assert_same_bundle(fresh, copy, proven_alike=False)  # by a live module, and by a sample


def test_the_same_weights_again_change_no_model(engined: Path, files: Path, tmp_path: Path) -> None:
    before = Path(shutil.copytree(engined, tmp_path / "before"))
    refit(engined, files / "old.safetensors", sample=files / "old.npz")
    assert_same_bundle(before, engined, proven_alike=False)


def test_nothing_is_traced(engined: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*arguments: object) -> None:
        raise AssertionError("a trace began")

    monkeypatch.setattr(layer_source, "trace", work)
    assert all(refit(engined, files / "new.safetensors", drop_sample=True))


def test_weights_inside_a_bigger_checkpoint_are_taken(engined: Path, files: Path) -> None:
    result = bca(
        "refit", engined, "--checkpoint", files / "inside.safetensors", "--prefix", "encoder.", "--drop-expect", "--json"
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["bundle"], told["passed"], len(told["models"])) == (str(engined), True, 3)


def test_weights_outside_the_model_and_another_eps_are_kept_that_way(files: Path, tmp_path: Path) -> None:
    old = make_checkpoint(prenorm=True, norm_eps=1e-3).module(torch.float32)
    bca_deploy.export(old, tmp_path / "m", precision="fp16", external_data_bytes=0).close()
    build(tmp_path / "m", targets=["sm89"])
    refit(tmp_path / "m", files / "new.safetensors", drop_sample=True)
    with Bundle.open(tmp_path / "m") as bundle:
        (model,) = bundle.manifest.models
        assert model.external_data == "models/fp16.onnx.data"
        assert bundle.manifest.layer.norm_eps == 1e-3  # a file of weights does not say it
        assert bundle.path(model.external_data).stat().st_size > bundle.path(model.file).stat().st_size / 4
    assert all(verification.verify(tmp_path / "m", scope="quick"))


def test_an_archive_is_refitted_in_place(engined: Path, files: Path, tmp_path: Path) -> None:
    archive = tmp_path / "model.bca"
    with staged(archive) as directory:
        shutil.copytree(engined, directory, dirs_exist_ok=True)
    shutil.rmtree(engined)
    refit(archive, files / "new.safetensors", drop_sample=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.bca"]
    assert all(verification.verify(archive, scope="quick"))


# ---- the sample


def test_a_bundle_with_a_sample_of_the_old_weights_wants_a_decision(engined: Path, files: Path) -> None:
    with untouched(engined.parent):
        refused(
            bca("refit", engined, "--checkpoint", files / "new.safetensors"),
            r"keeps a sample of the old weights \(expect\.npz\); give --expect with one of the new, or --drop-expect",
        )


def test_a_sample_of_the_new_weights_takes_the_old_one_s_place(engined: Path, files: Path) -> None:
    refit(engined, files / "new.safetensors", sample=files / "new.npz")
    with Bundle.open(engined) as bundle, np.load(bundle.path("expect.npz")) as stored, np.load(files / "new.npz") as given:
        assert set(stored) == set(given)
        for name in given:
            np.testing.assert_array_equal(stored[name], given[name])


def test_a_sample_that_the_new_weights_do_not_compute_is_refused(engined: Path, files: Path) -> None:
    with untouched(engined.parent):
        refused(
            bca("refit", engined, "--checkpoint", files / "new.safetensors", "--expect", files / "old.npz"),
            "expect|sample",
            code=1,
        )


# ---- refused, failed, stopped: the bundle is as it was


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("talking", "the checkpoint holds another layer .*talking_heads=True.*; export it as a new bundle"),
        ("wider", r"the checkpoint holds another layer .*dim=25.* than the bundle .*dim=24.*; export it as a new bundle"),
        ("no-norm", "the checkpoint holds another layer .*prenorm=False"),
        ("other", r"to_qk\.weight"),
        ("nan", "to_v.weight"),
        ("text", "text.safetensors"),
        ("absent", r"absent\.safetensors does not exist"),
        ("inside", "prefix"),
    ],
)
def test_a_file_that_does_not_hold_this_layer_is_refused(
    engined: Path, files: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    def work(*arguments: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(LayerSource, "refit", work)
    with untouched(engined.parent):
        refused(bca("refit", engined, "--checkpoint", files / f"{name}.safetensors", "--drop-expect"), message)


@pytest.mark.parametrize("place", [(LayerSource, "refit"), (models, "finish"), (models, "refuse_failures")])
@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineError])
def test_a_refit_that_stops_halfway_leaves_the_bundle_as_it_was(
    engined: Path, files: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str], error: type[BaseException]
) -> None:
    def fail(*arguments: object) -> None:
        raise error("half way")

    monkeypatch.setattr(*place, fail)
    with untouched(engined.parent), pytest.raises(error, match="half way"):
        refit(engined, files / "new.safetensors", drop_sample=True)


def test_weights_that_fail_parity_do_not_get_in(engined: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_source, "judge", lambda *arguments, **options: plain_verdict(failures=("wrong by 7",)))
    with untouched(engined.parent):
        refused(bca("refit", engined, "--checkpoint", files / "new.safetensors", "--drop-expect"), "wrong by 7", code=1)


def test_an_engine_that_cannot_be_built_keeps_the_old_weights_too(
    engined: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New models beside an engine of the old weights would be two functions in one bundle."""

    def fail(*arguments: object) -> Built:
        raise EngineError("the builder crashed")

    monkeypatch.setattr(engines, "compile_engine", fail)
    with untouched(engined.parent):
        refused(bca("refit", engined, "--checkpoint", files / "new.safetensors", "--drop-expect"), "the builder crashed")


def test_a_second_writer_is_refused(engined: Path, files: Path) -> None:
    with staged(engined, force=True) as directory:
        with pytest.raises(BundleError, match="another process is writing"):
            refit(engined, files / "new.safetensors", drop_sample=True)
        shutil.copytree(engined, directory, dirs_exist_ok=True)


# ---- engines of the GPU at hand, without one


@pytest.fixture
def on_hopper(engined: Path, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The bundle's engine as TensorRT would have built it, refittable; what is asked of the builder is recorded."""
    with Bundle.open(engined) as bundle:
        options = BuildOptions(refittable=True)
        changes = {"library": "tensorrt", "targets": (), "gpu": HOPPER, "options": options}
        entry = bundle.manifest.engines[0].model_copy(update=changes)
        text = bundle.manifest.model_copy(update={"engines": (entry,)}).model_dump_json()
    (engined / "manifest.json").write_text(text)
    asked: list[Request] = []

    def answer(request: Request, *arguments: object) -> Built:
        asked.append(request)
        Path(request.out).write_bytes(b"refitted")
        return Built(Facts(version=entry.version, bytes=8), BuildLog("", (), ()), 0.1)

    monkeypatch.setattr(refitting, "compile_engine", answer)
    monkeypatch.setattr(libraries, "load", lambda name: None)
    monkeypatch.setattr(engines, "query", lambda: Gpus((HOPPER,)))
    return asked


def test_a_refittable_engine_takes_the_new_weights_without_a_build(
    engined: Path, files: Path, on_hopper: list[Request]
) -> None:
    refit(engined, files / "new.safetensors", drop_sample=True)
    (request,) = on_hopper
    assert request.refit == request.out
    assert request.onnx.endswith("models/fp16.onnx")
    with Bundle.open(engined) as bundle:
        (entry,) = bundle.manifest.engines
        assert entry.model_sha256 == bundle.manifest.files[entry.model].sha256
        assert bundle.path(entry.file).read_bytes() == b"refitted"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Gpus(why_none="no driver"), "--engine tensorrt builds on the GPU that the engine is for, and here is none: no driver"),
        (
            Gpus((HOPPER.model_copy(update={"name": "NVIDIA L4"}),)),
            "is for NVIDIA H200, and here is NVIDIA L4; refit the bundle there",
        ),
    ],
)
def test_an_engine_of_a_gpu_that_is_not_here_is_refused_before_any_work(
    engined: Path, files: Path, on_hopper: list[Request], monkeypatch: pytest.MonkeyPatch, found: Gpus, message: str
) -> None:
    def work(*arguments: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(LayerSource, "refit", work)
    monkeypatch.setattr(engines, "query", lambda: found)
    with untouched(engined.parent), pytest.raises(BcaError, match=re.escape(message)):
        refit(engined, files / "new.safetensors", drop_sample=True)
    assert not on_hopper


def test_the_bundle_s_own_layer_is_what_the_weights_are_held_against(engined: Path, files: Path) -> None:
    with untouched(engined), pytest.raises(InputError, match="export it as a new bundle"):
        refit(engined, files / "talking.safetensors")
