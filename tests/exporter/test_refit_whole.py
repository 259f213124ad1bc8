"""`bca refit` of a whole model without its code: the export of the new weights, or the bundle as it was."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bidirectional_cross_attention import BidirectionalCrossAttention
from support.bundles import untouched
from support.models import KINDS
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.cli import app
from bca_deploy.errors import BcaError, BundleError, CheckpointError, InputError
from bca_deploy.whole.samples import named_outputs


class Packed(nn.Module):
    """A scale that its checkpoints hold as the inverse: no initializer is a function of it that a trace could show."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(dim) + 0.5)
        self.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update({f"{prefix}inverse": 1 / state.pop(f"{prefix}scale")})
        )
        self.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_: state.update({f"{prefix}scale": 1 / state.pop(f"{prefix}inverse")})
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Knotted(nn.Module):
    """Tied weights, a layer called twice, weights that are folded, split, exponentiated, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 16)
        self.steps = nn.Sequential(nn.Conv1d(5, 12, 3, padding=1), nn.BatchNorm1d(12))
        self.attend = BidirectionalCrossAttention(dim=12, context_dim=16, heads=2, dim_head=8)
        self.own = nn.MultiheadAttention(16, 2, batch_first=True)
        self.packed, self.gate = Packed(12), nn.Parameter(torch.zeros(1))
        self.tau, self.unused = nn.Parameter(torch.tensor(0.3)), nn.Linear(3, 3)
        self.norm, self.other_norm = nn.LayerNorm(12), nn.LayerNorm(12)  # equal at first, and two weights
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.words.weight

    def forward(self, signal: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        x, context = self.steps(signal.transpose(1, 2)).transpose(1, 2), self.words(words)
        context = context + self.own(context, context, context, need_weights=False)[0]
        for _ in range(2):
            delta, other = self.attend(x, context)
            x, context = x + delta, context + other
        x = x * (1 + self.attend.to_v.weight.mean())  # which is of what the layer's lowered form takes the place of
        x = self.packed(self.norm(x)) + self.other_norm(x) + self.gate * x.mean(dim=0, keepdim=True)
        return x, self.head(functional.normalize(context, dim=-1)) * self.tau.exp()


def knotted(seed: int) -> Knotted:
    torch.manual_seed(seed)
    model = Knotted().eval()
    if seed:
        for name, tensor in model.named_parameters():
            if name not in ("packed.scale", "gate"):
                tensor.data.normal_(std=0.3)
        model.steps[1].running_mean.normal_()
        model.steps[1].running_var.uniform_(0.5, 1.5)
        model.steps[1].num_batches_tracked += 7
    torch.manual_seed(5)
    model.packed.scale.data.uniform_(0.5, 1.5)
    return model


def samples() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    sizes = ((2, 9, 5), (3, 14, 8))
    return [
        {"signal": torch.randn(b, n, 5, generator=draw), "words": torch.randint(0, 30, (b, m), generator=draw)}
        for b, n, m in sizes
    ]


OPTIONS: dict[str, Any] = {"dims": {"signal_len": (1, 8, 20)}, "ranges": {"words": (0, 29)}}


def exported(model: nn.Module, out: Path, **options: Any) -> Path:
    bca_deploy.export(model, out, inputs=samples(), **OPTIONS, **options).close()
    return out


@pytest.fixture(scope="module")
def _bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(knotted(0), tmp_path_factory.mktemp("knotted") / "model", precision=["fp32", "fp16"])


@pytest.fixture
def bundle(_bundle: Path, tmp_path: Path) -> Path:
    """The model's bundle, to change."""
    return Path(shutil.copytree(_bundle, tmp_path / "model"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the new weights."""
    return exported(knotted(1), tmp_path_factory.mktemp("fresh") / "model", precision=["fp32", "fp16"])


def weights(state: Mapping[str, Tensor], path: Path) -> Path:
    torch.save(dict(state), path)
    return path


def models(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((bundle / "models").iterdir())}


def test_without_the_code_every_graph_is_that_of_a_fresh_export(bundle: Path, fresh: Path, tmp_path: Path) -> None:
    verdicts = bca_deploy.refit(bundle, weights(knotted(1).state_dict(), tmp_path / "new.pt"))
    assert all(verdicts)
    assert {verdict.model for verdict in verdicts} == {"fp32", "fp16", "fp32.onnxruntime-cpu"}
    assert models(bundle) == models(fresh)
    with bca_deploy.open(bundle) as session, torch.no_grad():
        session.selftest()
        for sample in samples():
            wanted = named_outputs(knotted(1)(**sample)).values()
            for got, true in zip(session(**{name: t.numpy() for name, t in sample.items()}), wanted, strict=True):
                np.testing.assert_allclose(got, true.numpy(), atol=2e-5)
    assert all(bca_deploy.verify(bundle))


def test_a_refit_can_follow_a_refit_and_lead_back(bundle: Path, tmp_path: Path) -> None:
    before = models(bundle)
    bca_deploy.refit(bundle, weights(knotted(1).state_dict(), tmp_path / "new.pt"))
    bca_deploy.refit(bundle, weights(knotted(0).state_dict(), tmp_path / "old.pt"))
    assert models(bundle) == before


def test_the_truth_after_a_refit_is_the_models_own(bundle: Path, fresh: Path, tmp_path: Path) -> None:
    bca_deploy.refit(bundle, weights(knotted(1).state_dict(), tmp_path / "new.pt"))
    with np.load(bundle / "selftest.npz") as ours, np.load(fresh / "selftest.npz") as theirs:
        assert set(ours) == set(theirs)
        outputs = [name for name in theirs if "/output/" in name and name.startswith("fp32/")]
        assert outputs
        for name in outputs:  # the trace's constants are float32
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6 * np.abs(theirs[name]).max())


def changed(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    state = dict(knotted(1).state_dict())
    return {**state, name: change(state[name])}


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in knotted(1).state_dict().items() if key != name}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (
            lambda: changed("packed.inverse", lambda t: t * 2),
            CheckpointError,
            r"packed\.inverse has another value.*folded into constants",
        ),
        (lambda: changed("head.weight", lambda t: t + 1), CheckpointError, r"words\.weight and head\.weight are one weight"),
        (lambda: changed("gate", lambda t: t + 1), InputError, "entries of batch know of each other, which servers rely on"),
        (
            lambda: changed("attend.to_v.weight", lambda t: t[:-1]),
            CheckpointError,
            r"attend\.to_v\.weight has shape \[15, 12\], needs \[16, 12\]",
        ),
        (lambda: without("tau"), CheckpointError, "not of this Knotted: missing key tau"),
        (lambda: knotted(1).state_dict() | {"more": torch.ones(2)}, CheckpointError, "unknown key more"),
        (lambda: changed("own.in_proj_bias", lambda t: t * torch.nan), CheckpointError, r"own\.in_proj_bias holds NaN"),
    ],
)
def test_what_cannot_be_taken_is_named_and_the_bundle_stays(
    state: Callable[[], dict[str, Tensor]], error: type[BcaError], message: str, bundle: Path, tmp_path: Path
) -> None:
    checkpoint = weights(state(), tmp_path / "new.pt")
    with untouched(bundle), pytest.raises(error, match=message):
        bca_deploy.refit(bundle, checkpoint)


def test_a_bundle_without_traces_asks_for_the_code(bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["weights_map.json"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="neither its code nor its traces; give the code as well"):
        bca_deploy.refit(bundle, weights(knotted(1).state_dict(), tmp_path / "new.pt"))


def test_traces_hold_no_weights_and_nothing_of_the_machine(bundle: Path) -> None:
    for path in (bundle / "traces").iterdir():
        content = path.read_bytes()
        assert str(Path(__file__).parent).encode() not in content
        assert b"stack_trace" not in content
        assert b"self.attend(" not in content
        assert all(np.prod(t.dims) < 100 for t in onnx.load(path).graph.initializer)


def test_the_command_needs_no_code(bundle: Path, tmp_path: Path) -> None:
    state = {f"net.{name}": t for name, t in knotted(1).state_dict().items()}
    checkpoint = weights(state, tmp_path / "inside.pt")
    done = CliRunner().invoke(app, ["refit", str(bundle), "--checkpoint", str(checkpoint), "--prefix", "net", "--json"])
    assert done.exit_code == 0, done.output
    asked = CliRunner().invoke(app, ["refit", str(bundle), "--checkpoint", str(checkpoint), "--prefix", "net", "--drop-expect"])
    assert asked.exit_code == 2
    assert re.search("bundles of a bare layer", asked.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stack", "clip", "encoders", "contrastive", "maps", "policy", "twice", "bert"])
def test_every_kind_of_model_is_refitted_as_if_exported_again(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    options = {"dims": dict(kind.dims), "axes": dict(kind.axes), "masks": dict(kind.masks), "precision": ["fp32", "fp16"]}
    other = kind.make(seed=1)
    for model, out in ((kind.make(), "old"), (other, "new")):
        bca_deploy.export(model, tmp_path / out, inputs=kind.pair(), **options).close()
    assert all(bca_deploy.refit(tmp_path / "old", weights(other.state_dict(), tmp_path / "new.pt")))
    assert models(tmp_path / "old") == models(tmp_path / "new")
    with Bundle.open(tmp_path / "old") as bundle:
        assert all(bca_deploy.verify(bundle))
