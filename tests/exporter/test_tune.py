"""`bca-export --tune`: the faster form goes into the graph for the CPU, is recorded, and stays through verify and refit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.layers import make_checkpoint
from torch import nn
from typer.testing import CliRunner

import bca_deploy
from bca_deploy.bundle.manifest import Manifest
from bca_deploy.bundle.read import Bundle
from bca_deploy.cli import export_app
from bca_deploy.exporter import models
from bca_deploy.exporter.refit import refit
from bca_deploy.exporter.verify import verify
from bca_deploy.layers.reference import BidirectionalCrossAttention

DIMS = {"batch": (1, 2, 4), "x_len": (1, 4, 8), "context_len": (1, 4, 8)}


@pytest.fixture
def literal_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "side_by_side", lambda *_: [[1.2, 1.2, 1.3], [1.0, 1.0, 1.0]])


@pytest.fixture
def fused_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "side_by_side", lambda *_: [[1.02, 1.02, 0.9], [1.0, 1.0, 1.0]])


def layer(seed: int = 0) -> nn.Module:
    return make_checkpoint(prenorm=True, seed=seed).module(torch.float32)


def forms(manifest: Manifest) -> dict[str, str]:
    return {model.runtime: model.lowering for model in manifest.models}


def tuned_of(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle.directory / "build.json").read_text(encoding="utf-8"))["tuned"]
    return found


@pytest.mark.usefixtures("literal_wins")
def test_the_literal_form_takes_the_graph_for_the_cpu_where_it_is_faster(tmp_path: Path) -> None:
    with bca_deploy.export(layer(), tmp_path / "model", tune=True, dims=DIMS) as bundle:
        assert forms(bundle.manifest) == {"portable": "fused", "onnxruntime-cpu": "reference"}
        assert bundle.manifest.layers[0].lowering == "fused"
        assert all(model.parity.passed for model in bundle.manifest.models)
        assert tuned_of(bundle) | {"threads": 0} == {
            "lowering": "reference",
            "sizes": {"batch": 2, "x_len": 4, "context_len": 4},
            "threads": 0,
            "fused_ms": 1.2,
            "reference_ms": 1.0,
            "ratio": 1.2,
            "quartiles": [1.2, 1.25],
        }
    with bca_deploy.open(tmp_path / "model") as session:
        assert "onnxruntime-cpu.onnx" in session.explain().chosen
        session.selftest()
    assert all(verify(tmp_path / "model", scope="quick"))


@pytest.mark.usefixtures("literal_wins")
def test_a_refit_keeps_the_form(tmp_path: Path) -> None:
    bca_deploy.export(layer(), tmp_path / "model", tune=True, dims=DIMS).close()
    save_file(make_checkpoint(prenorm=True, seed=1).state, tmp_path / "new.safetensors")
    assert all(refit(tmp_path / "model", tmp_path / "new.safetensors", drop_sample=True))
    with Bundle.open(tmp_path / "model") as bundle:
        assert forms(bundle.manifest) == {"portable": "fused", "onnxruntime-cpu": "reference"}


@pytest.mark.usefixtures("fused_wins")
def test_what_is_no_more_than_noise_changes_no_file(tmp_path: Path) -> None:
    bundles = [bca_deploy.export(layer(), tmp_path / str(tune), tune=tune, dims=DIMS) for tune in (True, False)]
    manifests = [(bundle.directory / "manifest.json").read_bytes() for bundle in bundles]
    assert manifests[0] == manifests[1]
    assert tuned_of(bundles[0])["lowering"] == "fused"


def test_both_forms_are_really_measured(tmp_path: Path) -> None:
    with bca_deploy.export(layer(), tmp_path / "model", tune=True, dims=DIMS) as bundle:
        found = tuned_of(bundle)
        assert found["fused_ms"] > 0
        assert found["reference_ms"] > 0
        assert found["quartiles"][0] <= found["ratio"] <= found["quartiles"][1]
        assert forms(bundle.manifest)["onnxruntime-cpu"] == found["lowering"]


@pytest.mark.usefixtures("literal_wins")
def test_with_a_bias_a_graph_for_the_cpu_comes_in_addition(tmp_path: Path) -> None:
    inputs = {"rel_pos_bias": "plane"}
    with bca_deploy.export(layer(), tmp_path / "model", tune=True, inputs=inputs, dims=DIMS) as bundle:
        assert forms(bundle.manifest) == {"portable": "fused", "onnxruntime-cpu": "reference"}


def test_where_there_is_one_form_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "side_by_side", lambda *_: pytest.fail("measured"))
    with bca_deploy.export(layer(), tmp_path / "maps", tune=True, outputs={"attention_maps": True}, dims=DIMS) as bundle:
        assert forms(bundle.manifest) == {"portable": "reference"}
    with bca_deploy.export(layer(), tmp_path / "half", tune=True, precision=["fp16"], dims=DIMS) as bundle:
        assert forms(bundle.manifest) == {"portable": "fused"}


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fusion = BidirectionalCrossAttention(dim=8, context_dim=6, heads=2, dim_head=4, prenorm=True)

    def forward(self, frames: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        out, _ = self.fusion(frames, words)
        return frames + out


@pytest.mark.usefixtures("literal_wins")
def test_whole_models_are_tuned_too_and_refitted_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = Tagger().eval(), Tagger().eval()
    samples = [(torch.randn(b, n, 8), torch.randn(b, m, 6)) for b, n, m in ((2, 5, 4), (3, 7, 6))]
    with bca_deploy.export(model, tmp_path / "model", inputs=samples, tune=True) as bundle:
        assert forms(bundle.manifest) == {"portable": "fused", "onnxruntime-cpu": "reference"}
        assert tuned_of(bundle)["sizes"] == {"batch": 3, "frames_len": 7, "words_len": 6}
    torch.save(other.state_dict(), tmp_path / "other.pt")
    assert all(refit(tmp_path / "model", tmp_path / "other.pt", model=model))
    with Bundle.open(tmp_path / "model") as bundle, bca_deploy.open(tmp_path / "model") as session:
        assert forms(bundle.manifest) == {"portable": "fused", "onnxruntime-cpu": "reference"}
        (found,) = session(*(t.numpy() for t in samples[0]))
        with torch.no_grad():
            np.testing.assert_allclose(found, other(*samples[0]).numpy(), atol=1e-5)


@pytest.mark.usefixtures("literal_wins")
def test_the_command_says_what_it_measured(tmp_path: Path) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text("[layer]\ndim = 8\ncontext_dim = 8\nheads = 2\ndim_head = 4\n", encoding="utf-8")
    command = [
        "--recipe",
        str(recipe),
        "--x-len",
        "1:4:8",
        "--context-len",
        "1:4:8",
        "--out",
        str(tmp_path / "model"),
        "--tune",
    ]
    result = CliRunner().invoke(export_app, command)
    assert result.exit_code == 0, result.output
    assert "at batch 4, context_len 4, x_len 4: fused 1.2 ms, literal 1 ms, ratio 1.20" in result.stdout
    assert "the graph for the CPU is reference" in result.stdout
