"""From a .pt2 file to a bundle and back: export, verify and refit as with the code, which is nowhere in reach."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import KINDS, Kind, dims, normal, padding, seeded
from support.programs import saved_kind
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.cli import app, export_app
from bca_deploy.layers.reference import BidirectionalCrossAttention
from bca_deploy.whole.samples import named_outputs


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fusion = BidirectionalCrossAttention(dim=8, context_dim=6, heads=2, dim_head=8, prenorm=True)
        self.head = nn.Linear(8, 3)

    def forward(self, video: Tensor, audio: Tensor, mask: Tensor) -> dict[str, Tensor]:
        out, _ = self.fusion(video, audio, mask=mask)
        return {"scores": self.head((video + out).mean(dim=1))}


SCORED = Kind(
    "scored",
    Scored,
    {"video": normal("batch", "frames", 8), "audio": normal("batch", "audio_len", 6), "mask": padding("batch", "frames")},
    dims(frames=(1, 7, 9), audio_len=(1, 7, 9)),
    layers=("fusion",),
)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], list[str]]:
    """What the command line is told of a kind's file."""
    folder = tmp_path_factory.mktemp("programs")

    def options(kind: Kind) -> list[str]:
        path = folder / f"{kind.name}.pt2"
        if not path.exists():
            saved_kind(kind, path)
            for number, sample in enumerate(kind.pair()):
                np.savez(folder / f"{kind.name}{number}.npz", **{name: t.numpy() for name, t in sample.items()})
        found = ["--model", str(path)]
        found += [part for number in (0, 1) for part in ("--inputs", str(folder / f"{kind.name}{number}.npz"))]
        found += [f"--axes={name}={','.join(str(axis or 0) for axis in axes)}" for name, axes in kind.axes.items()]
        return found + [f"--dim={name}={low}:{opt}:{high}" for name, (low, opt, high) in kind.dims.items()]

    return options


def run(*arguments: object, of: object = export_app) -> Result:
    return CliRunner().invoke(of, [str(argument) for argument in arguments])  # type: ignore[arg-type]


def exported(told: Callable[[Kind], list[str]], kind: Kind, out: Path, *more: str) -> Path:
    done = run("--opset", 17, *told(kind), "--out", out, *more)
    assert done.exit_code == 0, done.output
    return out


def held(bundle: Path, kind: Kind, model: nn.Module) -> None:
    """Every kind of size, against the live model that the file was saved from."""
    with bca_deploy.open(bundle) as session:
        session.selftest()
        for sizes in kind.sizes().values():
            given = kind.sample(5, sizes)
            with torch.no_grad():
                wanted = named_outputs(model(**given))
            got = session.run({name: t.numpy() for name, t in given.items()})
            assert len(got) == len(wanted)
            for array, true in zip(got.values(), wanted.values(), strict=True):
                np.testing.assert_allclose(array, true.numpy(), atol=1e-5 * max(1.0, float(true.abs().max())), rtol=0)


@pytest.fixture(scope="module")
def scored(told: Callable[[Kind], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(told, SCORED, tmp_path_factory.mktemp("bundles") / "scored")


def test_a_program_becomes_a_bundle_that_is_the_live_model(scored: Path) -> None:
    held(scored, SCORED, SCORED.make())
    with Bundle.open(scored) as bundle:
        (layer,) = bundle.manifest.layers
        assert (bundle.manifest.source, layer.path, layer.spec.heads, layer.lowering) == ("Scored", "fusion", 2, "fused")
        assert all(model.opset == 17 for model in bundle.manifest.models)


def test_verify_draws_the_matrix_from_a_program(scored: Path, told: Callable[[Kind], list[str]], tmp_path: Path) -> None:
    _, file, *_ = told(SCORED)
    assert run("verify", scored, "--model", file, "--parity", "quick", of=app).exit_code == 0
    torch.save(SCORED.make(seed=9).state_dict(), tmp_path / "new.pt")
    other = run("verify", scored, "--model", file, "--checkpoint", tmp_path / "new.pt", "--parity", "quick", of=app)
    assert other.exit_code == 1


def test_refit_takes_new_weights_into_a_program(told: Callable[[Kind], list[str]], tmp_path: Path, scored: Path) -> None:
    bundle = exported(told, SCORED, tmp_path / "bundle")
    torch.save(SCORED.make(seed=9).state_dict(), tmp_path / "new.pt")
    for how in (["--model", told(SCORED)[1]], []):
        done = run("refit", bundle, "--checkpoint", tmp_path / "new.pt", *how, of=app)
        assert done.exit_code == 0, done.output
        held(bundle, SCORED, SCORED.make(seed=9))


def test_a_checkpoint_is_loaded_strictly_into_a_program(told: Callable[[Kind], list[str]], tmp_path: Path) -> None:
    state = SCORED.make(seed=9).state_dict()
    torch.save(state, tmp_path / "new.pt")
    held(exported(told, SCORED, tmp_path / "bundle", "--checkpoint", str(tmp_path / "new.pt")), SCORED, SCORED.make(seed=9))
    torch.save({"head.weight": state["head.weight"]}, tmp_path / "few.pt")
    done = run(*told(SCORED), "--checkpoint", tmp_path / "few.pt", "--out", tmp_path / "none")
    assert done.exit_code == 2
    assert "few.pt is not of this Scored: missing key" in " ".join(done.output.split())
    assert not (tmp_path / "none").exists()


def test_a_declared_size_that_the_program_was_not_made_for_is_refused(
    told: Callable[[Kind], list[str]], tmp_path: Path
) -> None:
    program = torch.export.export(
        seeded(Scored), (), SCORED.pair()[0], dynamic_shapes=None, preserve_module_call_signature=("fusion",)
    )
    torch.export.save(program, tmp_path / "fixed.pt2")
    _, _, *rest = told(SCORED)
    done = run("--model", tmp_path / "fixed.pt2", *rest, "--out", tmp_path / "none")
    assert done.exit_code == 2
    said = " ".join(done.output.split())
    assert "axis 0 of video is batch here, and the file fixes it at 3; give samples of that size alone, or export" in said
    assert not (tmp_path / "none").exists()


def test_a_layer_that_is_kept_literal_is_exported_as_the_program_has_it(
    told: Callable[[Kind], list[str]], tmp_path: Path
) -> None:
    held(exported(told, SCORED, tmp_path / "bundle", "--keep-literal", "fusion"), SCORED, SCORED.make())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stack", "maps", "twice", "encoders", "policy"])
def test_programs_of_every_kind_are_the_live_models(name: str, told: Callable[[Kind], list[str]], tmp_path: Path) -> None:
    kind = KINDS[name]
    bundle = exported(told, kind, tmp_path / name, "--precision", "fp32", "--precision", "fp16")
    with Bundle.open(bundle) as opened:
        assert tuple(layer.path for layer in opened.manifest.layers) == kind.layers
        assert tuple(layer.path for layer in opened.manifest.layers if layer.lowering == "reference") == kind.literal
    held(bundle, kind, kind.make())
