"""What a bundle rests on is found out by the export, kept in the manifest, and said first and last."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.layers import make_checkpoint
from torch import Tensor, nn
from typer.testing import CliRunner

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.bundle.trust import said
from bca_deploy.cli.commands import app

LAYER = make_checkpoint(prenorm=True)
SMALL = ("--batch", "1:1:2", "--x-len", "1:3:5", "--context-len", "1:3:5")
DIMS = {"batch": (1, 1, 2), "x_len": (1, 3, 5), "context_len": (1, 3, 5)}


def bca(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trust")
    torch.save(LAYER.state, place / "layer.pt")
    x, context = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(0)), torch.ones(1, 2, 16)
    with torch.no_grad():
        out, context_out = LAYER.module(torch.float32)(x, context)
    np.savez(place / "sample.npz", x=x, context=context, out=out, context_out=context_out)
    return place


@pytest.mark.parametrize(("flags", "trust"), [((), "on-trust"), (("--expect", "sample.npz"), "sample")])
def test_a_file_of_weights_is_taken_on_trust_unless_a_sample_proves_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], trust: str
) -> None:
    monkeypatch.chdir(place)
    export = ("export", "--checkpoint", "layer.pt", "--heads", 3, *SMALL, *flags, "--out", trust, "--force")
    assert bca(*export, "--dry-run", "--json").count(f'"trust": "{trust}"') == 1
    assert bca(*export).splitlines()[-1] == said(trust)  # type: ignore[arg-type]
    shown = json.loads(bca(*export, "--json"))
    assert (shown["trust"], shown["trust_said"]) == (trust, said(trust))  # type: ignore[arg-type]
    assert bca("inspect", trust).splitlines()[0] == said(trust)  # type: ignore[arg-type]
    assert json.loads(bca("inspect", trust, "--json"))["trust"] == trust


def test_what_is_taken_on_trust_is_told_how_to_be_proven() -> None:
    assert "--expect sample.npz" in said("on-trust")
    assert "bca_deploy.export" in said("on-trust")


def test_new_weights_are_trusted_anew(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "live"
    with bca_deploy.export(LAYER.module(torch.float32), out, dims=DIMS) as bundle:
        assert bundle.manifest.trust == "live-module"
    assert bca("refit", out, "--checkpoint", place / "layer.pt", "--drop-expect").splitlines()[-1] == said("on-trust")
    assert bca("refit", out, "--checkpoint", place / "layer.pt", "--expect", place / "sample.npz").endswith(
        f"{said('sample')}\n"
    )
    with Bundle.open(out) as bundle:
        assert bundle.manifest.trust == "sample"


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross = LAYER.module(torch.float32)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        found: Tensor = self.cross(x, context)[0].sum(1)
        return found


def test_a_whole_model_is_proven_on_its_own_code(tmp_path: Path) -> None:
    samples = [(torch.randn(1, 3, 24), torch.randn(1, 4, 16)), (torch.randn(2, 5, 24), torch.randn(2, 6, 16))]
    with bca_deploy.export(Pooled(), tmp_path / "m", inputs=samples) as bundle:
        assert bundle.manifest.trust == "live-module"
    assert bca("inspect", tmp_path / "m").startswith(said("live-module"))


def test_a_bundle_that_does_not_say_is_taken_on_trust(repository: Path) -> None:
    fixture = repository / "tests" / "fixtures" / "format1"
    assert '"trust"' not in (fixture / "manifest.json").read_text(encoding="utf-8")
    with Bundle.open(fixture) as bundle:
        assert bundle.manifest.trust == "on-trust"
