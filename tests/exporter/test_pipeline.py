"""bca_deploy.export: a live module goes in, a bundle that computes the same comes out."""

from pathlib import Path
from typing import Any

import bidirectional_cross_attention as published
import numpy as np
import onnxruntime as ort
import pytest
import torch
from support.layers import make_checkpoint

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import BundleError, CheckpointError, InputError, LoweringError, ParityError
from bca_deploy.exporter import pipeline
from bca_deploy.exporter.plan import Plan, layer_source, load_checkpoint, make_plan
from bca_deploy.exporter.recipe import Recipe, read_recipe
from bca_deploy.layers import lowered_attention
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.progress import Silent


def planned(recipe: Recipe, checkpoint: Checkpoint, out: Path) -> Plan:
    return make_plan(recipe, lambda: layer_source(recipe, checkpoint), out)


def run_model(bundle: Bundle, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    model = bundle.manifest.models[0]
    session = ort.InferenceSession(str(bundle.path(model.file)), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(
        [t.name for t in bundle.manifest.signature.outputs], {name: t.numpy() for name, t in inputs.items()}
    )
    return found


@pytest.mark.slow
def test_the_published_package_s_layer_is_exported_live(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = published.BidirectionalCrossAttention(dim=20, context_dim=12, heads=2, dim_head=8, prenorm=True).eval()
    with bca_deploy.export(module, tmp_path / "m", inputs={"context_mask": False}) as bundle:
        inputs = {"x": torch.randn(3, 7, 20), "context": torch.randn(3, 4, 12), "mask": torch.rand(3, 7) < 0.6}
        with torch.no_grad():
            wanted = module(**inputs)
        for ours, theirs in zip(run_model(bundle, inputs), wanted, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)
        assert bundle.manifest.layer.norm == "rms"
        assert "expect.npz" in bundle.manifest.files


@pytest.mark.slow
def test_the_published_package_s_transformer_is_exported_live_and_left_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = published.BidirectionalCrossAttentionTransformer(dim=16, depth=2, heads=2, dim_head=8, final_norms=True)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with bca_deploy.export(module, tmp_path / "m.bca") as bundle:
        assert bundle.manifest.layer.depth == 2
    assert module.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(before[name], tensor)


def test_a_module_that_is_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no to_qk\.weight anywhere"):
        bca_deploy.export(torch.nn.Linear(3, 4), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_model_that_holds_the_layer_is_refused_with_the_way_to_it(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"fusion": make_checkpoint().module(torch.float32), "head": torch.nn.Linear(24, 2)})
    with pytest.raises(CheckpointError, match=r"layers are at: 'fusion\.'; .*inputs=\[a, b\]"):
        bca_deploy.export(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_lookalike_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    """Same parameters, another function: only running it can tell."""

    class Doubled(published.BidirectionalCrossAttention):
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            return tuple(2 * t for t in super().forward(*args, **kwargs))

    with pytest.raises(
        ParityError,
        match=r"computes something else \(\d+ differences in 16 cases, the first: no mask, \|logit\| 1: out differs",
    ):
        bca_deploy.export(Doubled(dim=16, heads=2, dim_head=8), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_wrong_heads_are_caught_by_the_user_s_sample(tmp_path: Path) -> None:
    right = make_checkpoint()
    inputs = {"x": np.ones((1, 3, 24), np.float32), "context": np.ones((1, 2, 16), np.float32)}
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(a.shape).astype(np.float32) for name, a in inputs.items()}
    with torch.no_grad():
        out, context_out = right.module(torch.float32)(**{name: torch.from_numpy(a) for name, a in inputs.items()})
    sample = inputs | {"out": out.numpy(), "context_out": context_out.numpy()}
    recipe = read_recipe(None, {"inputs": {"mask": False, "context_mask": False}})
    assert layer_source(recipe, right, sample).expected
    from bca_deploy.layers.checkpoint import from_state

    with pytest.raises(ParityError, match="check --heads"):
        layer_source(recipe, from_state(right.state, heads=6), sample)


def test_a_sample_with_an_input_that_the_export_lacks_is_refused(tmp_path: Path) -> None:
    sample = {
        name: np.zeros((1, 2, n), np.float32) for name, n in (("x", 24), ("context", 16), ("out", 24), ("context_out", 16))
    }
    recipe = read_recipe(None, {"inputs": {"mask": False}})
    with pytest.raises(InputError, match="the sample has mask, but the export has no such input"):
        layer_source(recipe, make_checkpoint(), sample | {"mask": np.ones((1, 2), bool)})


def test_fused_with_attention_maps_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="'fused' is impossible with attention maps"):
        bca_deploy.export(
            make_checkpoint().module(torch.float32), tmp_path / "m", lowering="fused", outputs={"attention_maps": True}
        )


def test_the_default_export_is_documented_and_seeded() -> None:
    spec = Recipe().layer.spec()
    assert (spec.dim, spec.context_dim, spec.heads, spec.dim_head, spec.prenorm, spec.norm) == (512, 386, 8, 64, True, "layer")
    one, other = (load_checkpoint(Recipe(), None, None) for _ in range(2))
    assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)


def test_a_recipe_s_layer_must_agree_with_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    torch.save(checkpoint.state, tmp_path / "w.pt")
    recipe = read_recipe(None, {"layer": {"dim": 25}})
    with pytest.raises(InputError, match=r"layer\.dim is 25 in the recipe and 24 in the checkpoint"):
        load_checkpoint(recipe, tmp_path / "w.pt", heads=3)


def test_a_recipe_s_layer_says_only_what_it_gives(tmp_path: Path) -> None:
    sizes = {"ff_hidden": 48, "context_ff_hidden": 32}
    checkpoint = make_checkpoint(prenorm=True, norm="rms", depth=1, **sizes)
    torch.save(checkpoint.state, tmp_path / "w.pt")
    assert (
        load_checkpoint(read_recipe(None, {"layer": {"depth": 1, "ff_expansion": 2.0}}), tmp_path / "w.pt", 3).spec.depth == 1
    )
    with pytest.raises(InputError, match=r"layer\.ff_expansion is 4\.0 in the recipe and 2\.0 in the checkpoint"):
        load_checkpoint(read_recipe(None, {"layer": {"ff_expansion": 4.0}}), tmp_path / "w.pt", 3)


def test_heads_given_by_flag_override_the_recipe(tmp_path: Path) -> None:
    seeded = load_checkpoint(Recipe(), None, heads=4).spec
    assert (seeded.heads, seeded.dim_head) == (4, 64)
    checkpoint = make_checkpoint()
    torch.save(checkpoint.state, tmp_path / "w.pt")
    assert load_checkpoint(read_recipe(None, {"layer": {"heads": 2}}), tmp_path / "w.pt", heads=6).spec.heads == 6


@pytest.mark.slow
def test_failed_parity_leaves_no_bundle_unless_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowered_attention, "_mean", lambda v: v[:1] * 0)
    plan = planned(Recipe(), make_checkpoint(), tmp_path / "m")
    with pytest.raises(ParityError, match="the exported model is not the PyTorch model"):
        pipeline.run(plan, Silent())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ParityError):
        pipeline.run(plan, Silent(), keep_failed=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.failed"]
    assert not Bundle.open(tmp_path / "m.failed").manifest.models[0].parity.passed


def test_the_public_surface_is_what_the_readme_says() -> None:
    assert bca_deploy.__all__ == [
        "BcaError",
        "Bundle",
        "RemoteSession",
        "Session",
        "__version__",
        "build",
        "export",
        "open",
        "prometheus_collector",
        "refit",
        "verify",
    ]
    assert all(getattr(bca_deploy, name) for name in bca_deploy.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'open_bundle'"):
        bca_deploy.open_bundle  # noqa: B018


def test_verify_runs_the_self_test_and_the_matrix_again(exported: Bundle) -> None:
    verdicts = bca_deploy.verify(exported, scope="quick")
    assert [v.model for v in verdicts] == ["fp32", "fp16", "fp32.onnxruntime-cpu"]
    assert all(verdicts)
    assert all(v.cases >= 40 for v in verdicts)


def test_a_committed_bundle_of_format_1_opens_and_verifies(repository: Path) -> None:
    with Bundle.open(repository / "tests" / "fixtures" / "format1") as bundle:
        assert bundle.manifest.format == 1
        assert all(bca_deploy.verify(bundle, scope="quick"))


def test_an_open_bundle_is_refused_a_file_it_does_not_list(exported: Bundle) -> None:
    with pytest.raises(BundleError, match=r"the bundle has no model\.onnx; it has expect\.npz"):
        exported.path("model.onnx")


@pytest.mark.parametrize("given", [{}, "layer.pt", torch.nn.Linear])
def test_an_export_of_what_is_no_module_is_refused(tmp_path: Path, given: Any) -> None:
    with pytest.raises(InputError, match=r"a torch\.nn\.Module is needed"):
        bca_deploy.export(given, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_talking_heads_are_refused_before_the_work_at_an_opset_without_them(tmp_path: Path) -> None:
    mixed = make_checkpoint(talking_heads=True)
    for opset, precision in ((17, "bf16"), (21, "bf16")):
        recipe = read_recipe(None, {"opset": opset, "precision": [precision]})
        with pytest.raises(InputError, match=rf"^precision bf16 with talking heads at opset {opset}: .*--opset 22 or higher"):
            planned(recipe, mixed, tmp_path / "m")
    assert planned(read_recipe(None, {"opset": 22, "precision": ["bf16"]}), mixed, tmp_path / "m")
    assert planned(read_recipe(None, {"opset": 17, "precision": ["bf16"]}), make_checkpoint(), tmp_path / "m")


@pytest.mark.slow
def test_bfloat16_talking_heads_are_exported_at_the_opset_that_has_them(tmp_path: Path) -> None:
    module = make_checkpoint(talking_heads=True).module(torch.float32)
    with bca_deploy.export(module, tmp_path / "m", opset=22, precision=["bf16"]) as bundle:
        assert bundle.manifest.models[0].parity.passed
