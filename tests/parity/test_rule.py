"""The verdict: right models pass, planted defects do not, and NaN never does."""

import copy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from defects import DEFECTS, Defect, ten_thousand, unturned_bias, zero_mean
from layers import graphs, structure
from support.layers import make_checkpoint

from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import InputError
from bca_deploy.layers import lowered_attention
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.lowered_model import lower
from bca_deploy.layers.stored.weight_files import read
from bca_deploy.parity.cases import Case, Sharpness, make_inputs
from bca_deploy.parity.rule import Subject, judge, judge_inputs, refuse_undefined_rows
from bca_deploy.parity.runners import Runner, ort_runner, sharpened_copy
from bca_deploy.parity.trial import Trial
from bca_deploy.parity.truth import ORDERS, evaluations, run_module, sharpen, sharpening, true_outputs
from bca_deploy.parity.verdict import Verdict
from bca_deploy.parity.yardstick import Inputs, Yardstick
from bca_deploy.signature import DimRange, Dims
from bca_deploy.spec import LAYER_DIMS, Interface, Lowering, Precision, layer_signature
from bca_deploy.tracing.graph import trace, write

BIASED = Interface(rel_pos_bias="shared")


def subject_of(
    tmp_path: Path, form: Lowering = "fused", interface: Interface = BIASED, precision: Precision = "fp32", **layer: object
) -> Subject:
    checkpoint = make_checkpoint(**layer)
    model = trace(lower(checkpoint, form, precision), layer_signature(checkpoint.spec, interface), 17)
    write(model, tmp_path / "model.onnx")
    return Subject(tmp_path / "model.onnx", checkpoint, interface, LAYER_DIMS, precision, keep_io_types=True)


def wrong_values(verdict: Verdict) -> list[str]:
    return [failure for failure in verdict.failures if "largest error" in failure or "RMS error" in failure]


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
    monkeypatch.setattr(lowered_attention, "_mean", zero_mean(None))
    verdict = judge(subject_of(tmp_path, interface=Interface(), precision=precision), "quick")
    assert [f for f in wrong_values(verdict) if "dead rows" in f]
    assert not [f for f in wrong_values(verdict) if "live rows" in f]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # in float16 no logit reaches it: see benchmarks/defects.py
def test_a_fill_of_minus_ten_thousand_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
    monkeypatch.setattr(lowered_attention.FusedAttention, "_key_mask", ten_thousand(None))
    verdict = judge(subject_of(tmp_path, interface=Interface(), precision=precision), "quick")
    assert wrong_values(verdict)
    assert all("opposed" in failure for failure in verdict.failures), "only the family made for it can tell"


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
    monkeypatch.setattr(lowered_attention.FusedAttention, "attend", unturned_bias(None))
    failures = wrong_values(judge(subject_of(tmp_path), "quick"))
    assert [f for f in failures if "context_out" in f]
    assert not [f for f in failures if " out, live" in f]


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_defect_planted_in_a_random_layer_fails(tmp_path: Path, defect: Defect) -> None:
    """benchmarks/verdict.py plants each of them in many layers and in every precision."""
    made = structure(7, defect.applies)
    with defect.planted():
        graph = graphs(made, "fp32")[defect.form]
    checkpoint = made.weights(0)
    write(graph.model, tmp_path / "model.onnx")
    assert wrong_values(judge(Subject(tmp_path / "model.onnx", checkpoint, made.interface, made.dims, "fp32", True), "quick"))


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject_of(tmp_path_factory.mktemp("right"))


def test_nan_never_passes(right: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def nan_somewhere(path: Path):  # type: ignore[no-untyped-def]
        return lambda inputs: {
            "out": np.full((*inputs["x"].shape[:2], 24), np.nan, np.float32),
            "context_out": np.zeros((*inputs["context"].shape[:2], 16), np.float32),
        }

    monkeypatch.setattr("bca_deploy.parity.rule.ort_runner", nan_somewhere)
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

    monkeypatch.setattr("bca_deploy.parity.rule.ort_runner", broken)
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


@pytest.mark.parametrize(("sharpness", "target"), [("sharp", 30), ("steep", 2e5)])
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


def test_rounding_the_weights_is_reported_apart(exported: Bundle) -> None:
    state = read(exported.path("weights.safetensors"))
    checkpoint = Checkpoint(exported.manifest.layer, state)
    results = {}
    for precision in ("fp32", "fp16"):
        path = exported.path(f"models/{precision}.onnx")
        subject = Subject(
            path, checkpoint, exported.manifest.interface, exported.manifest.signature.dims, precision, keep_io_types=True
        )  # type: ignore[arg-type]
        results[precision] = judge(subject, "quick")
    assert results["fp32"].weight_rounding < 1e-12  # two runs in float64, of the same weights
    assert 1e-5 < results["fp16"].weight_rounding < 1e-2


@pytest.mark.parametrize("masks", [(True, True), (True, False), (False, True), (False, False)])
def test_the_graph_for_the_cpu_is_the_layer_whichever_masks_it_has(tmp_path: Path, masks: tuple[bool, bool]) -> None:
    checkpoint, interface = make_checkpoint(prenorm=True), Interface(mask=masks[0], context_mask=masks[1])
    lowered = lower(checkpoint, "fused", runtime="onnxruntime-cpu", masked=interface.masked)
    write(trace(lowered, layer_signature(checkpoint.spec, interface), 17, runtime="onnxruntime-cpu"), tmp_path / "cpu.onnx")
    verdict = judge(Subject(tmp_path / "cpu.onnx", checkpoint, interface, LAYER_DIMS, "fp32", True), "quick")
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


ONE = DimRange(1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_right_model_of_one_token_a_side_passes(tmp_path: Path, seed: int) -> None:
    checkpoint = make_checkpoint(seed, dim=32, heads=4, dim_head=16, prenorm=True)
    write(trace(lower(checkpoint, "fused"), layer_signature(checkpoint.spec, Interface()), 17), tmp_path / "model.onnx")
    verdict = judge(
        Subject(tmp_path / "model.onnx", checkpoint, Interface(), Dims(batch=ONE, x_len=ONE, context_len=ONE), "fp32", True),
        "quick",
    )
    assert verdict, verdict.failures


def nearly_exact(module: torch.nn.Module, inputs: object, interface: Interface, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """PyTorch eager as if it summed in float64: as far from sums in order as a legitimate evaluation can be."""
    exact = run_module(copy.deepcopy(module).double(), inputs, interface, torch.float64)  # type: ignore[arg-type]
    if dtype == torch.float64:
        return exact
    return {name: array.astype(np.float32).astype(np.float64) for name, array in exact.items()}


def test_a_model_that_sums_in_order_passes_beside_an_eager_that_does_not(
    right: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bca_deploy.parity.truth.run_module", nearly_exact)
    verdict = judge(right, "quick")
    assert verdict, verdict.failures
    settled = [group for group in verdict.groups if group.orders]
    assert settled
    assert len([note for note in verdict.notes if "beside PyTorch eager alone" in note]) == len(settled)
    monkeypatch.setattr("bca_deploy.parity.rule.in_doubt", lambda results: set())
    assert not judge(right, "quick"), "beside that eager alone it would have failed"


def test_one_near_tie_that_one_order_of_sums_hits_by_chance_passes_beside_more_orders(
    right: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside evaluations that are all but exact every pool is in doubt, until one of the eight is as far off as the model."""
    made: list[int] = []

    def nearly_all_exact(module: torch.nn.Module, inputs: Inputs, interface: Interface, dtype: torch.dtype, orders: int):  # type: ignore[no-untyped-def]
        made.append(orders)
        found = [nearly_exact(module, inputs, interface, dtype)] * (1 + orders)
        return found[:-1] + evaluations(module, inputs, interface, dtype, 1)[1:] if orders == ORDERS else found

    monkeypatch.setattr("bca_deploy.parity.yardstick.evaluations", nearly_all_exact)
    verdict = judge(right, "quick")
    assert verdict, verdict.failures
    assert set(made) == {0, 1, ORDERS}
    assert any("worst of eager and of 8 orders of sums" in note for note in verdict.notes)


def test_sums_in_order_settle_the_users_own_inputs_too(right: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    trial = Yardstick.trial

    def seen(self: Yardstick, inputs: Inputs, sharpness: Sharpness = "plain", orders: int = 0) -> Trial:
        asked.append(orders)
        return trial(self, inputs, sharpness, orders)

    monkeypatch.setattr(Yardstick, "trial", seen)
    sample = make_inputs(Case("padded", "plain", 2, 7, 5, 0), right.checkpoint.spec, right.interface, "fp32")
    assert judge_inputs(right, {"mine": sample})
    monkeypatch.setattr("bca_deploy.parity.truth.IN_ORDER_WORK", 0)  # too large to be summed in order: eager alone judges
    verdict = judge_inputs(right, {"mine": sample})
    assert asked == [ORDERS, 0]
    assert verdict.results[0].regions["live"].in_order == ()
    assert any("too large to be summed in order" in note for note in verdict.notes)


def test_a_yardstick_serves_every_model_of_its_precision(right: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    yardstick = Yardstick(right.checkpoint, right.interface, right.precision)
    first = judge(right, "quick", yardstick=yardstick)
    monkeypatch.setattr("bca_deploy.parity.yardstick.true_outputs", None)  # the truth of each case is known by now
    assert judge(right, "quick", yardstick=yardstick) == first
