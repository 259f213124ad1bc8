"""The written ONNX file: what was asked for, by name, at every size, and nothing of the machine it was made on."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from support.layers import make_checkpoint, make_spec

from bca_deploy.errors import ExportError, InputError
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.lowered_model import graph_state, lower
from bca_deploy.signature import DimRange
from bca_deploy.spec import UNIT_ROUNDOFF, Interface, LayerSpec, Precision, layer_signature
from bca_deploy.tracing import graph
from bca_deploy.tracing.graph import OPSETS, trace, write


def traced(
    checkpoint: Checkpoint, interface: Interface, opset: int = 17, precision: Precision = "fp32", keep: bool = True
) -> ir.Model:
    lowering = "reference" if interface.attention_maps or checkpoint.spec.talking_heads else "fused"
    model = lower(checkpoint, lowering, precision, keep, interface.attention_maps)
    return trace(model, layer_signature(checkpoint.spec, interface), opset, {"note": "made by a test"})


def session_of(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def feeds(spec: LayerSpec, interface: Interface, batch: int, x_len: int, context_len: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([batch, x_len, context_len])
    signature = layer_signature(spec, interface)
    shapes = {tensor: tensor.shape(signature.dims.named((batch, x_len, context_len))) for tensor in signature.inputs}
    return {
        tensor.name: rng.standard_normal(shape).astype(np.float32) if tensor.is_float else rng.random(shape) < 0.7
        for tensor, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    checkpoint = make_checkpoint(prenorm=True)
    path = tmp_path_factory.mktemp("graph") / "masked.onnx"
    write(traced(checkpoint, Interface()), path)
    return checkpoint, path


def test_names_and_dynamic_dimensions_are_those_of_the_interface(masked: tuple[Checkpoint, Path]) -> None:
    graph = onnx.load(masked[1]).graph
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
    assert axes == {
        "x": ["batch", "x_len", 24],
        "context": ["batch", "context_len", 16],
        "mask": ["batch", "x_len"],
        "context_mask": ["batch", "context_len"],
        "out": ["batch", "x_len", 24],
        "context_out": ["batch", "context_len", 16],
    }


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 9), (5, 3, 1), (2, 40, 33), (7, 2, 2)])
def test_sizes_that_were_never_traced_run_and_agree_with_pytorch(
    masked: tuple[Checkpoint, Path], sizes: tuple[int, int, int]
) -> None:
    checkpoint, path = masked
    inputs = feeds(checkpoint.spec, Interface(), *sizes)
    got = session_of(path).run(["out", "context_out"], inputs)
    with torch.no_grad():
        wanted = checkpoint.module(torch.float32)(**{name: torch.from_numpy(a) for name, a in inputs.items()})
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)


def test_weights_stand_in_the_file_under_the_seed_names(masked: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = masked
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for name, tensor in graph_state(checkpoint, "fused", "fp32").items():
        np.testing.assert_array_equal(held[name], tensor.numpy())


def test_equal_weights_keep_their_own_names(tmp_path: Path) -> None:
    """Fresh norms are equal; the exporter would merge them, and a refit of one would then change both."""
    checkpoint = make_checkpoint(dim=16, context_dim=16, prenorm=True)
    same = {name: torch.ones_like(t) if name.endswith("norm.weight") else t for name, t in checkpoint.state.items()}
    model = traced(Checkpoint(checkpoint.spec, same), Interface())
    assert {"norm.weight", "context_norm.weight"} <= set(model.graph.initializers)


def test_no_node_and_no_initializer_is_dead(masked: tuple[Checkpoint, Path]) -> None:
    graph = onnx.load(masked[1]).graph
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert all(used.intersection(node.output) for node in graph.node)
    assert {t.name for t in graph.initializer} <= used


def test_no_node_computes_a_constant(masked: tuple[Checkpoint, Path]) -> None:
    graph = onnx.load(masked[1]).graph
    constants = {t.name for t in graph.initializer}
    assert not [node.name for node in graph.node if node.input and constants.issuperset(node.input)]
    assert not [node.name for node in graph.node if node.op_type == "Constant"]


def test_the_file_says_what_it_is_and_nothing_of_the_machine(masked: tuple[Checkpoint, Path]) -> None:
    model = onnx.load(masked[1])
    assert {p.key: p.value for p in model.metadata_props} == {"note": "made by a test"}
    assert not [node for node in model.graph.node if node.doc_string or node.metadata_props]
    assert str(Path(__file__).parents[2]).encode() not in masked[1].read_bytes()
    assert b"site-packages" not in masked[1].read_bytes()


@pytest.mark.parametrize("opset", [16, 28, 99, 0])
def test_an_opset_outside_the_range_is_refused_before_the_trace(opset: int) -> None:
    with pytest.raises(InputError, match=rf"opset {opset} cannot be exported; allowed: 17 to 27"):
        traced(make_checkpoint(), Interface(), opset)


def test_an_exporter_that_gives_another_opset_is_an_error(
    monkeypatch: pytest.MonkeyPatch, masked: tuple[Checkpoint, Path]
) -> None:
    checkpoint, _ = masked
    monkeypatch.setattr(graph, "lower_to_17", lambda model: None)
    with pytest.raises(ExportError, match="asked for opset 17, but the exporter gave opset 18"):
        traced(checkpoint, Interface())


def test_weights_over_the_threshold_leave_the_file(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(dim=512, context_dim=384, heads=8, dim_head=64)
    model = traced(checkpoint, Interface(False, False))
    write(model, tmp_path / "inside.onnx")
    write(model, tmp_path / "outside.onnx", external_data_bytes=1_000_000)
    assert not (tmp_path / "inside.onnx.data").exists()
    assert (tmp_path / "outside.onnx").stat().st_size < 100_000 < (tmp_path / "outside.onnx.data").stat().st_size
    inputs = feeds(checkpoint.spec, Interface(False, False), 2, 6, 7)
    inside, outside = (session_of(tmp_path / f"{name}.onnx").run(None, inputs) for name in ("inside", "outside"))
    for one, other in zip(inside, outside, strict=True):  # the same but for rounding, over products of 512 terms
        np.testing.assert_allclose(one, other, rtol=0, atol=40 * UNIT_ROUNDOFF["fp32"] * np.abs(other).max())


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_on_offer_is_written_as_asked_and_runs(tmp_path: Path, opset: int) -> None:
    """RMSNorm and masks: what the conversion down to 17 fails on without a word when written with mean() and any()."""
    checkpoint = make_checkpoint(prenorm=True, norm="rms")
    write(traced(checkpoint, Interface(rel_pos_bias="shared"), opset), tmp_path / "m.onnx")
    assert [(entry.domain, entry.version) for entry in onnx.load(tmp_path / "m.onnx").opset_import] == [("", opset)]
    inputs = feeds(checkpoint.spec, Interface(rel_pos_bias="shared"), 2, 9, 4)
    got = session_of(tmp_path / "m.onnx").run(["out"], inputs)[0]
    with torch.no_grad():
        wanted = checkpoint.module(torch.float32)(**{name: torch.from_numpy(a) for name, a in inputs.items()})[0]
    np.testing.assert_allclose(got, wanted.numpy(), atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "precision", "limit"),
    [("layer", "fp32", 70), ("rms", "fp32", 84), ("layer", "fp16", 80), ("rms", "fp16", 94), ("layer", "bf16", 80)],
)
def test_the_masked_layer_stays_within_its_node_budget(norm: str, precision: Precision, limit: int) -> None:
    checkpoint = make_checkpoint(prenorm=True, norm=norm)
    assert len(traced(checkpoint, Interface(), precision=precision).graph) <= limit


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_edges_are_typed_as_asked(precision: Precision) -> None:
    checkpoint = make_checkpoint()
    half = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    for keep, wanted in ((True, ir.DataType.FLOAT), (False, half)):
        graph = traced(checkpoint, Interface(False, False), precision=precision, keep=keep).graph
        assert {value.dtype for value in (*graph.inputs, *graph.outputs)} == {wanted}
        assert graph.initializers["to_qk.weight"].dtype == half


@pytest.mark.slow
def test_attention_maps_are_outputs_of_the_literal_graph(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(talking_heads=True)
    interface = Interface(rel_pos_bias="batch", attention_maps=True)
    write(traced(checkpoint, interface), tmp_path / "maps.onnx")
    inputs = feeds(checkpoint.spec, interface, 2, 5, 8)
    got = session_of(tmp_path / "maps.onnx").run(["out", "context_out", "attn", "context_attn"], inputs)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(a) for name, a in inputs.items()}
        wanted = checkpoint.module(torch.float32)(**tensors, return_attn=True)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)


@pytest.mark.slow
def test_two_traces_of_the_same_weights_are_byte_identical(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(prenorm=True)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(traced(checkpoint, Interface()), tmp_path / name / "model.onnx")
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_the_manifest_metadata_is_in_the_exported_file(exported: object) -> None:
    props = {p.key: p.value for p in onnx.load(exported.path("models/fp32.onnx")).metadata_props}  # type: ignore[attr-defined]
    assert props["precision"] == "fp32"
    assert props["lowering"] == "fused"
    assert json.loads(props["layer"])["heads"] == make_spec().heads


def test_an_operator_that_takes_no_bfloat16_yet_is_told_with_the_way_out(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 17]>
    g (bfloat16[1, 2, 4, 4] x, bfloat16[3, 2, 1, 1] w) => (bfloat16[1, 3, 4, 4] y) {y = Conv(x, w)}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    with pytest.raises(ExportError, match=r"export with a higher --opset, or in another precision$"):
        write(model, tmp_path / "model.onnx")


class Repeating(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        doubled = 2 * x
        return doubled, doubled, x, doubled


def test_what_is_two_outputs_or_an_input_too_has_each_of_its_names(tmp_path: Path) -> None:
    dims = {"n": DimRange(1, 3, 9)}
    traceable = graph.Traceable(Repeating(), {"x": torch.ones(3)}, {"x": ("n",)}, dims, ("a", "b", "same", "c"))
    model, _ = graph.convert(traceable, 17)
    write(model, tmp_path / "model.onnx")
    session, x = session_of(tmp_path / "model.onnx"), np.arange(5, dtype=np.float32)
    assert [value.name for value in session.get_inputs()] == ["x"]
    assert [value.name for value in session.get_outputs()] == ["a", "b", "same", "c"]
    for got, wanted in zip(session.run(None, {"x": x}), (2 * x, 2 * x, x, 2 * x), strict=True):
        np.testing.assert_array_equal(got, wanted)
