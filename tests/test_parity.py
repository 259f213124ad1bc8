"""The verdict: right models pass, five planted defects do not, and NaN never does."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import make_checkpoint, make_spec

from bca_deploy import lowered_attention, lowering
from bca_deploy.bundle import Bundle
from bca_deploy.cases import Sharpness
from bca_deploy.checkpoint import Checkpoint, read
from bca_deploy.errors import InputError
from bca_deploy.lowering import lower
from bca_deploy.onnx_graph import trace, write
from bca_deploy.parity import Subject, judge, judge_inputs, refuse_undefined_rows
from bca_deploy.runners import Runner, ort_runner, sharpened_copy
from bca_deploy.spec import Dims, Interface, Lowering, Precision
from bca_deploy.truth import allowed_error, roundoff_slack, sharpen, sharpening, true_outputs
from bca_deploy.verdict import Verdict

BIASED = Interface(rel_pos_bias="shared")


def subject_of(
    tmp_path: Path, form: Lowering = "fused", interface: Interface = BIASED, precision: Precision = "fp32", **layer: object
) -> Subject:
    checkpoint = make_checkpoint(**layer)
    model = trace(lower(checkpoint, form, precision), checkpoint.spec, interface, 17)
    write(model, tmp_path / "model.onnx")
    return Subject(tmp_path / "model.onnx", checkpoint, interface, Dims(), precision, keep_io_types=True)


def wrong_values(verdict: Verdict) -> list[str]:
    return [failure for failure in verdict.failures if "largest error" in failure or "RMS error" in failure]


def zero_mean(v: torch.Tensor) -> torch.Tensor:
    return v[:1] * 0


def fill_of_ten_thousand(self: lowered_attention.FusedAttention, live: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros((), dtype=self.dtype)
    return torch.where(live, zero, torch.full((), -10000.0, dtype=self.dtype))[:, None, None, :]


def literal_fill_of_ten_thousand(self, qk, context_qk, v, context_v, extras):  # type: ignore[no-untyped-def]
    sim = qk @ context_qk.transpose(-1, -2)
    sim = sim if extras.bias is None else sim + extras.bias.to(self.dtype)
    live = lowered_attention._pairs(extras.mask, extras.context_mask)
    sim = torch.where(live, sim, torch.full((), -10000.0, dtype=self.dtype))
    attn, context_attn = sim.softmax(-1), sim.softmax(-2)
    values, context_values = self.split(v), self.split(context_v)
    return attn @ context_values, context_attn.transpose(-1, -2) @ values, attn, context_attn


def bias_reshaped_not_turned(self, qk, context_qk, v, context_v, extras):  # type: ignore[no-untyped-def]
    mask, context_mask, bias = extras
    unturned = bias.reshape(*bias.shape[:-2], bias.shape[-1], bias.shape[-2])
    out = self._one_way(qk, context_qk, context_v, mask, context_mask, bias)
    return out, self._one_way(context_qk, qk, v, context_mask, mask, unturned)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fused", "reference"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layer", [{}, {"prenorm": True, "norm": "rms"}], ids=["bare", "rms"])
def test_a_right_model_passes_in_every_form_and_precision(
    tmp_path: Path, form: Lowering, precision: Precision, layer: dict[str, object]
) -> None:
    verdict = judge(subject_of(tmp_path, form, precision=precision, **layer), "quick")
    assert verdict, verdict.failures
    assert verdict.cases >= 40
    assert 0 < verdict.worst_ratio <= 1.5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_zeroed_dead_rows_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
    monkeypatch.setattr(lowered_attention, "_mean", zero_mean)
    verdict = judge(subject_of(tmp_path, interface=Interface(), precision=precision), "quick")
    assert [f for f in wrong_values(verdict) if "dead rows" in f]
    assert not [f for f in wrong_values(verdict) if "live rows" in f]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_fill_of_minus_ten_thousand_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
    monkeypatch.setattr(lowered_attention.FusedAttention, "_key_mask", fill_of_ten_thousand)
    verdict = judge(subject_of(tmp_path, interface=Interface(), precision=precision), "quick")
    assert wrong_values(verdict)
    assert all("opposed" in failure for failure in verdict.failures), "only the family made for it can tell"


@pytest.mark.slow
def test_a_literal_fill_of_minus_ten_thousand_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowered_attention.ReferenceAttention, "attend", literal_fill_of_ten_thousand)
    assert wrong_values(judge(subject_of(tmp_path, "reference", Interface()), "quick"))


@pytest.mark.slow
def test_swapped_masks_fail_where_the_lengths_hide_it(tmp_path: Path) -> None:
    subject = subject_of(tmp_path, interface=Interface())
    model = ir.load(subject.path)
    mask, context_mask = (next(v for v in model.graph.inputs if v.name == name) for name in ("mask", "context_mask"))
    mask.name, context_mask.name = "swapping", "mask"
    mask.name = "context_mask"
    ir.save(model, subject.path)
    assert [f for f in wrong_values(judge(subject, "quick")) if "16x16" in f]


@pytest.mark.slow
def test_a_bias_that_is_not_transposed_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowered_attention.FusedAttention, "attend", bias_reshaped_not_turned)
    failures = wrong_values(judge(subject_of(tmp_path), "quick"))
    assert [f for f in failures if "context_out" in f]
    assert not [f for f in failures if " out, live" in f]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_scale_applied_twice_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
    class ScaledTwice(lowered_attention.FusedAttention):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            self.scale **= 2

    monkeypatch.setattr(lowering, "FusedAttention", ScaledTwice)
    assert wrong_values(judge(subject_of(tmp_path, precision=precision), "quick"))


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject_of(tmp_path_factory.mktemp("right"))


def test_nan_never_passes(right: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def nan_somewhere(path: Path):  # type: ignore[no-untyped-def]
        return lambda inputs: {
            "out": np.full((*inputs["x"].shape[:2], 24), np.nan, np.float32),
            "context_out": np.zeros((*inputs["context"].shape[:2], 16), np.float32),
        }

    monkeypatch.setattr("bca_deploy.parity.ort_runner", nan_somewhere)
    verdict = judge(right, "quick")
    assert not verdict
    assert "out has" in verdict.failures[0]
    assert "NaN or Inf" in verdict.failures[0]


def test_live_and_dead_rows_are_judged_apart(right: Subject) -> None:
    verdict = judge(right, "quick")
    dead = next(group for group in verdict.groups if group.family == "dead rows")
    none = next(group for group in verdict.groups if group.family == "no mask")
    assert dead.live_ratio is not None
    assert dead.dead_ratio is not None
    assert none.dead_ratio is None


def test_a_failing_runtime_is_a_finding(right: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path):  # type: ignore[no-untyped-def]
        def run(inputs: object) -> dict[str, np.ndarray]:
            raise RuntimeError("no such kernel")

        return run

    monkeypatch.setattr("bca_deploy.parity.ort_runner", broken)
    verdict = judge(right, "quick")
    assert "failed to run: no such kernel" in verdict.failures[0]


def outline(verdict: Verdict) -> list[tuple[object, ...]]:
    """What a verdict says, but for the figures: PyTorch and onnxruntime may give other bits at every call."""
    return [(r.case, r.family, r.sharpness, r.runtime, list(r.regions), r.failures) for r in verdict.results]


def test_the_report_has_the_same_cases_and_the_same_outcome_every_time(right: Subject) -> None:
    one, other = judge(right, "quick"), judge(right, "quick")
    assert outline(one) == outline(other)
    assert (bool(one), one.notes, one.failures) == (bool(other), other.notes, other.failures)


def test_own_inputs_are_judged_too(right: Subject) -> None:
    rng = np.random.default_rng(5)
    sample = {
        "x": rng.standard_normal((2, 6, 24)),
        "context": rng.standard_normal((2, 4, 16)),
        "mask": np.ones((2, 6), bool),
        "context_mask": np.ones((2, 4), bool),
        "rel_pos_bias": rng.standard_normal((3, 6, 4)),
    }
    verdict = judge_inputs(right, {"mine": sample})
    assert verdict
    assert verdict.cases == 1


def test_a_live_row_whose_live_keys_are_all_minus_infinity_is_refused() -> None:
    bias = np.zeros((3, 4, 5))
    inputs = {"x": np.zeros((2, 4, 24)), "context": np.zeros((2, 5, 16)), "rel_pos_bias": bias}
    refuse_undefined_rows(inputs)
    for value, precision in ((-np.inf, "fp32"), (np.finfo(np.float32).min, "fp32"), (-1e9, "fp16")):
        bias[1, 2, :] = value
        with pytest.raises(InputError, match=r"every live key of live x row \(batch 0, head 1, position 2\)"):
            refuse_undefined_rows(inputs, precision)  # type: ignore[arg-type]
    refuse_undefined_rows(inputs | {"rel_pos_bias": np.where(bias < 0, -1e9, bias)})


def test_an_infinite_bias_on_masked_keys_alone_is_fine() -> None:
    bias = np.zeros((2, 3, 4, 5))
    bias[:, :, :, 3:] = -np.inf
    inputs = {"x": np.zeros((2, 4, 24)), "context": np.zeros((2, 5, 16)), "rel_pos_bias": bias}
    inputs["context_mask"] = np.array([[True, True, True, False, False]] * 2)
    refuse_undefined_rows(inputs)
    inputs["context_mask"] = np.array([[False, False, False, True, True]] * 2)
    with pytest.raises(InputError, match="live x row"):
        refuse_undefined_rows(inputs)


@pytest.mark.parametrize(("sharpness", "target"), [("sharp", 30), ("steep", 2e4)])
def test_sharpening_reaches_its_target(sharpness: Sharpness, target: float) -> None:
    checkpoint = make_checkpoint()
    sharp = Checkpoint(checkpoint.spec, sharpen(checkpoint.state, sharpening(checkpoint, sharpness, "fp32")))
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((4, 32, 24)), "context": rng.standard_normal((4, 32, 16))}
    _, largest = true_outputs(sharp.module(torch.float64), inputs, Interface(False, False), np.inf)
    assert 0.7 * target < largest < 3 * target


def test_sharpened_weights_are_the_same_bits_in_the_file_and_in_pytorch(exported: Bundle, tmp_path: Path) -> None:
    state = read(exported.path("weights.safetensors"))
    for precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        copy = sharpened_copy(exported.path(f"models/{precision}.onnx"), 13.75, tmp_path)
        held = ir.load(copy).graph.initializers["to_qk.weight"].const_value
        wanted = sharpen({"to_qk.weight": state["to_qk.weight"].to(dtype)}, 13.75)["to_qk.weight"]
        assert held is not None
        np.testing.assert_array_equal(held.numpy(), wanted.t().numpy())


def test_the_allowed_error_follows_the_rule() -> None:
    assert allowed_error(np.array([-0.5, 0.25]), np.array([3.0, -4.0]), 0.01) == pytest.approx(2 * 0.5 + 0.01 * 4)


def test_the_slack_grows_with_the_logits_and_with_the_widest_product() -> None:
    spec = make_spec(dim=96, context_dim=16)
    u = 2.0**-24
    assert roundoff_slack(spec, "fp32", 9.0) == pytest.approx(4 * u * 10 + u * 4)
    assert roundoff_slack(spec, "fp16", 0.0) == pytest.approx(4 * 2.0**-11 + u * 4)


def test_an_eager_result_that_is_not_finite_widens_nothing() -> None:
    assert allowed_error(np.array([np.nan, 9.0]), np.array([1.0]), 0.01) == pytest.approx(0.01)


def test_rounding_the_weights_is_reported_apart(exported: Bundle) -> None:
    state = read(exported.path("weights.safetensors"))
    checkpoint = Checkpoint(exported.manifest.layer, state)
    results = {}
    for precision in ("fp32", "fp16"):
        path = exported.path(f"models/{precision}.onnx")
        subject = Subject(path, checkpoint, exported.manifest.interface, exported.manifest.dims, precision, keep_io_types=True)  # type: ignore[arg-type]
        results[precision] = judge(subject, "quick")
    assert results["fp32"].weight_rounding < 1e-12  # two runs in float64, of the same weights
    assert 1e-5 < results["fp16"].weight_rounding < 1e-2


@pytest.mark.slow
def test_defects_planted_in_the_graph_for_the_cpu_fail_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead query that keeps its values, and a fill that is not far enough below."""
    checkpoint = make_checkpoint(prenorm=True)

    def subject(name: str) -> Subject:
        lowered = lower(checkpoint, "fused", runtime="onnxruntime-cpu")
        model = trace(lowered, checkpoint.spec, Interface(), 17, runtime="onnxruntime-cpu")
        write(model, tmp_path / name)
        return Subject(tmp_path / name, checkpoint, Interface(), Dims(), "fp32", True)

    assert judge(subject("right.onnx"), "quick")
    with monkeypatch.context() as patch:
        patch.setattr(lowered_attention, "_FAR", -10000.0)
        assert wrong_values(judge(subject("fill.onnx"), "quick"))
    marks = lowered_attention.MaskedCpuAttention._marks
    monkeypatch.setattr(
        lowered_attention.MaskedCpuAttention,
        "_marks",
        lambda self, mask, live, dead: marks(self, mask, live, (dead[0], live[1])),
    )
    assert wrong_values(judge(subject("dead.onnx"), "quick"))


@pytest.mark.parametrize("masks", [(True, True), (True, False), (False, True), (False, False)])
def test_the_graph_for_the_cpu_is_the_layer_whichever_masks_it_has(tmp_path: Path, masks: tuple[bool, bool]) -> None:
    checkpoint, interface = make_checkpoint(prenorm=True), Interface(mask=masks[0], context_mask=masks[1])
    lowered = lower(checkpoint, "fused", runtime="onnxruntime-cpu", masked=interface.masked)
    write(trace(lowered, checkpoint.spec, interface, 17, runtime="onnxruntime-cpu"), tmp_path / "cpu.onnx")
    verdict = judge(Subject(tmp_path / "cpu.onnx", checkpoint, interface, Dims(), "fp32", True), "quick")
    assert verdict, verdict.failures


def test_parity_judges_what_it_is_given_to_run_on(tmp_path: Path) -> None:
    subject = subject_of(tmp_path, interface=Interface(), precision="fp16")
    asked: list[Path] = []

    def runtimes(path: Path) -> dict[str, Runner]:
        asked.append(path)
        return {"mine": ort_runner(path)}

    verdict, usual = judge(subject, "quick", runtimes=runtimes), judge(subject, "quick")
    assert verdict, verdict.failures
    # The model, and a copy of it with weights for each further sharpness.
    assert asked[0] == subject.path
    assert [path.name.partition("-")[0] for path in asked[1:]] == ["sharpened"] * 2
    assert outline(verdict) == [(*r[:3], "mine", *r[4:]) for r in outline(usual) if r[3] == "onnxruntime"]
    assert usual.notes
    assert verdict.notes == ()  # they are about the runtimes of the CPU
