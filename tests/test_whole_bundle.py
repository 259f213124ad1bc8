"""Everything behind the export runs a whole model as it runs the layer: sessions, C++, servers, packages, engines."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from bidirectional_cross_attention import BidirectionalCrossAttention
from support import native
from support.models import KINDS
from support.servers import Server, bca_serve, cpp_serve, put_stand_in, tritonserver
from torch import Tensor, nn
from torch.nn import functional

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.cli.console import describe

pytestmark = pytest.mark.slow

Arrays = dict[str, np.ndarray]
RTX = {"library": "rtx", "targets": ["sm89"]}


class Exported(NamedTuple):
    model: nn.Module
    bundle: Bundle
    requests: list[Arrays]

    def wanted(self, given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        from bca_deploy.whole.samples import named_outputs

        with torch.no_grad():
            return [t.numpy() for t in named_outputs(self.model(**{n: torch.from_numpy(a) for n, a in given.items()})).values()]

    def check(self, given: Mapping[str, np.ndarray], outputs: Any) -> None:
        for got, wanted in zip(outputs, self.wanted(given), strict=True):
            assert got.shape == wanted.shape
            np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    kind = KINDS["encoders"]
    model, out = kind.make(), tmp_path_factory.mktemp("whole") / "model"
    options = {"dims": dict(kind.dims), "axes": dict(kind.axes), "precision": ["fp32", "fp16"], "engine": RTX}
    bundle = bca_deploy.export(model, out, inputs=kind.pair(), **options)
    requests = [kind.sample(seed, sizes) for seed, sizes in enumerate(kind.sizes().values())]
    return Exported(model, bundle, [{name: t.numpy() for name, t in sample.items()} for sample in requests])


class Halved(nn.Module):
    """Its output has half of the steps, and as many tokens as both inputs together."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = BidirectionalCrossAttention(dim=12, context_dim=8, heads=2, dim_head=8)

    def forward(self, x: Tensor, context: Tensor) -> dict[str, Tensor]:
        out, context_out = self.attend(x, context)
        return {
            "halved": functional.avg_pool1d(out.mT, 2, ceil_mode=True).mT,
            "joined": torch.cat([out.mean(-1), context_out.mean(-1)], dim=1),
        }


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    model, out = Halved().eval(), tmp_path_factory.mktemp("halved") / "model"
    given = [{"x": torch.randn(b, n, 12), "context": torch.randn(b, m, 8)} for b, n, m in ((2, 6, 5), (3, 9, 4), (1, 4, 7))]
    bundle = bca_deploy.export(model, out, inputs=given[:2])
    return Exported(model, bundle, [{name: t.numpy() for name, t in sample.items()} for sample in given])


def test_sizes_that_follow_from_others_are_expressions(halved: Exported) -> None:
    outputs = {t.name: t for t in halved.bundle.manifest.signature.outputs}
    for request in halved.requests:
        sizes = halved.bundle.manifest.signature.sizes(request)
        shapes = [outputs[name].shape(sizes) for name in ("halved", "joined")]
        assert shapes == [wanted.shape for wanted in halved.wanted(request)]


@pytest.mark.parametrize("which", ["encoders", "halved"])
def test_the_session_runs_it_alone_into_given_arrays_and_together(which: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(which)
    with bca_deploy.open(exported.bundle.directory) as session:
        session.selftest()
        for given in exported.requests:
            exported.check(given, session(**given))
            shapes = {t.name: t.shape(exported.bundle.manifest.signature.sizes(given)) for t in session.outputs}
            outputs = {t.name: np.empty(shapes[t.name], t.dtype) for t in session.outputs}
            session.run_into(given, outputs)
            exported.check(given, outputs.values())
        together = session.run_many([tuple(given.values()) for given in exported.requests])
        for given, outputs in zip(exported.requests, together, strict=True):
            exported.check(given, outputs)


@pytest.mark.parametrize("which", ["encoders", "halved"])
def test_the_cpp_runtime_runs_it(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if lacking := native.missing("library"):
        pytest.skip(f"runtime/ is not built without {', '.join(lacking)}; make setup as root installs it, or says the command")
    exported: Exported = request.getfixturevalue(which)
    bca_run = native.build("release") / "bca-run"
    native.passed([bca_run, exported.bundle.directory, "--selftest"])
    names = [tensor.name for tensor in exported.bundle.manifest.signature.outputs]
    for given in exported.requests:
        np.savez(tmp_path / "in.npz", **given)  # type: ignore[arg-type]
        flags = [part for name in names for part in ("--output", f"{name}={tmp_path / name}.npy")]
        native.passed([bca_run, exported.bundle.directory, "--input", tmp_path / "in.npz", *flags])
        exported.check(given, [np.load(tmp_path / f"{name}.npy") for name in names])


def remote_answers(exported: Exported, server: Server) -> None:
    with bca_deploy.RemoteSession(f"grpc://{server.grpc}") as remote:
        together = remote.run_many([tuple(given.values()) for given in exported.requests])
        for given, outputs in zip(exported.requests, together, strict=True):
            exported.check(given, outputs)


def test_bca_serve_serves_it(encoders: Exported, tmp_path: Path) -> None:
    with bca_serve(encoders.bundle.directory, tmp_path / "log") as server:
        remote_answers(encoders, server)


def test_the_cpp_server_serves_it(halved: Exported, tmp_path: Path) -> None:
    with cpp_serve(halved.bundle.directory, tmp_path / "log") as server:
        remote_answers(halved, server)


def test_tritons_front_serves_it(encoders: Exported, tmp_path: Path) -> None:
    from bca_deploy.packaging import triton_repository as packaging

    _, engine = packaging.write(encoders.bundle, tmp_path / "models", packaging.Options())
    put_stand_in(engine)
    with tritonserver(tmp_path / "models", tmp_path / "log") as server:
        remote_answers(encoders, server)


def test_an_engine_is_built_by_the_dims_names(encoders: Exported) -> None:
    (engine,) = encoders.bundle.manifest.engines
    assert engine.profiles == (encoders.bundle.manifest.signature.dims,)
    assert set(engine.matmuls) == {"float16"}
    entry = bca_deploy.build(encoders.bundle.directory, "rtx", targets=["sm86"], profiles=[{"word_len": (1, 2, 4)}])
    assert (entry.targets, entry.profiles[0]["word_len"].max) == (("sm86",), 4)


def test_the_manifest_tells_each_layer_and_its_proof(encoders: Exported) -> None:
    manifest = encoders.bundle.manifest
    (layer,) = manifest.layers
    assert (manifest.source, manifest.interface, manifest.layer) == (type(encoders.model).__name__, None, None)
    assert (layer.path, layer.lowering, layer.calls) == ("attend", "fused", 1)
    assert layer.proof is not None
    assert layer.proof.cases >= 16
    assert layer.proof.worst < 1e-9
    assert "4 heads" in describe(layer.spec)


def weights(model: nn.Module, path: Path) -> Path:
    torch.save({"state_dict": {f"module.{name}": t for name, t in model.state_dict().items()}}, path)
    return path


def test_verify_needs_no_code_and_with_it_draws_the_matrix_anew(encoders: Exported) -> None:
    kept = bca_deploy.verify(encoders.bundle.directory)
    assert all(kept)
    assert all("kept from the export" in verdict.notes[0] and verdict.cases >= 4 for verdict in kept)
    drawn = bca_deploy.verify(encoders.bundle.directory, model=encoders.model, scope="quick")
    assert all(verdict.cases > 20 for verdict in drawn)
    other = KINDS["encoders"].make(seed=1)
    assert not any(bca_deploy.verify(encoders.bundle.directory, model=other, scope="quick"))


def test_a_refit_takes_new_weights_with_the_code_and_is_judged(encoders: Exported, tmp_path: Path) -> None:
    bundle = tmp_path / "model"
    shutil.copytree(encoders.bundle.directory, bundle)
    other = KINDS["encoders"].make(seed=1)
    checkpoint = weights(other, tmp_path / "new.pt")
    before = encoders.model.state_dict()["head.0.weight"].clone()
    assert all(bca_deploy.refit(bundle, checkpoint, model=encoders.model))
    assert torch.equal(encoders.model.state_dict()["head.0.weight"], before)
    refitted = Exported(other, Bundle.open(bundle), encoders.requests)
    with bca_deploy.open(bundle) as session:
        session.selftest()
        for given in refitted.requests:
            refitted.check(given, session(**given))
    assert refitted.bundle.manifest.engines[0].model_sha256 != encoders.bundle.manifest.engines[0].model_sha256
