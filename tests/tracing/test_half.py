"""Half-precision graphs in float32 where they must be: right where they were not, and as they were everywhere else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support.layers import make_checkpoint
from torch import Tensor, nn
from torch.nn import functional

from bca_deploy.layers.isolation import exporter_alone
from bca_deploy.layers.lowered_model import lower
from bca_deploy.parity.runners import Runner, ort_runner, strict_runner_of
from bca_deploy.spec import UNIT_ROUNDOFF, Interface, layer_signature
from bca_deploy.tracing.graph import trace
from bca_deploy.tracing.half import keep_logarithms, round_outputs, widen

Array = np.ndarray
Body = Callable[[Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Values ``x`` [B, N, 16], a mask ``m`` [B, N], and a function of them."""

    def __init__(self, body: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.body, self.parts = body, nn.ModuleList(parts)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        return self.body(x, m, *self.parts)


def values(spread: float, mean: float = 0.0, length: int = 2048) -> Tensor:
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(0)) * spread + mean


def inputs_of(x: Tensor) -> dict[str, Tensor]:
    return {"x": x, "m": torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.9}


def exported(model: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str] = ("out",)) -> ir.Model:
    with exporter_alone():
        program = torch.onnx.export(
            model.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=18,
            input_names=list(inputs),
            output_names=list(outputs),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model


def array(tensor: Tensor) -> Array:
    return tensor.float().numpy().astype(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def ran(model: ir.Model, inputs: dict[str, Tensor], runner: Callable[[Path], Runner] = strict_runner_of) -> dict[str, Array]:
    names = {value.name for value in model.graph.inputs}
    with TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        ir.save(model, path)
        found = runner(path)({name: array(tensor) for name, tensor in inputs.items() if name in names})
    return {name: np.asarray(a).astype(np.float64) for name, a in found.items()}


def widened(model: ir.Model) -> ir.Model:
    copied = model.clone()
    widen(copied)
    onnx.checker.check_model(ir.to_proto(copied), full_check=True)
    return copied


def rms(error: Array) -> float:
    return float(np.sqrt(np.square(error).mean()))


def is_right(got: Array, truth: Array, unit: float) -> bool:
    """Two roundings off at most, where one rounding is unavoidable."""
    return bool(np.isfinite(got).all()) and rms(got - truth) <= 2 * unit * rms(truth)


def written_rms_norm(x: Tensor, m: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def written_layer_norm(x: Tensor, m: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6)


def masked_mean(x: Tensor, m: Tensor) -> Tensor:
    return (x * m[..., None]).sum(1) / m.sum(1, keepdim=True)


def mean_of_nothing(x: Tensor, m: Tensor) -> Tensor:
    live = m.to(x.dtype) * 0
    return (x * live[..., None]).sum(1) / live.sum(1, keepdim=True).clamp(min=1e-9) + 1


TRAPS: dict[str, tuple[Body, Tensor]] = {
    "mean": (lambda x, m: x.mean(1), values(10, 100)),
    "mean over everything": (lambda x, m: x.mean(), values(10, 100)),
    "masked mean": (masked_mean, values(10, 100)),
    "masked mean of nothing": (mean_of_nothing, values(10)),
    "average pool": (lambda x, m: functional.adaptive_avg_pool1d(x.mT, 1), values(10, 100)),
    "RMSNorm written out": (written_rms_norm, values(1000)),
    "LayerNorm written out": (written_layer_norm, values(1000)),
    "InstanceNorm": (lambda x, m: functional.instance_norm(x.mT), values(1000)),
    "GroupNorm": (lambda x, m: functional.group_norm(x.mT, 4), values(1000)),
    "normalize": (lambda x, m: functional.normalize(x, dim=-1), values(1000)),
    "normalize tiny values": (lambda x, m: functional.normalize(x, dim=-1), values(1e-4)),
    "normalize rows of zeros": (lambda x, m: functional.normalize(x * m[..., None], dim=-1), values(1)),
    "cosine similarity": (lambda x, m: functional.cosine_similarity(x[:, :1024], x[:, 1024:], dim=-1), values(1000)),
    "vector norm": (lambda x, m: torch.linalg.vector_norm(x, dim=1), values(100)),
    "cubic norm": (lambda x, m: x.norm(p=3, dim=-1), values(100)),
    "mean square": (lambda x, m: ((x - x.roll(1, 1)) ** 2).mean((1, 2)), values(100)),
    "logsumexp": (lambda x, m: x.logsumexp(1), values(1)),
    "log of a sum of exponentials": (lambda x, m: x.exp().sum(1).log(), values(2, 4)),
    "log_softmax": (lambda x, m: x.log_softmax(1), values(30)),
    "logsigmoid": (lambda x, m: functional.logsigmoid(x), values(20)),
    "expm1": (lambda x, m: torch.expm1(x), values(0.1)),
}


class All(nn.Module):
    """Every trap, each with values of its own: one trace costs little more than that of one of them."""

    def forward(self, m: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(body(x, m) for (body, _), x in zip(TRAPS.values(), xs, strict=True))


@dataclass(frozen=True)
class Outcome:
    """What the traps give, by name: in float64, in PyTorch's half precision, and on the graph before and after."""

    truth: Mapping[str, Array]
    eager: Mapping[str, Array]
    half: Mapping[str, Array]
    strict: Mapping[str, Array]
    ort: Mapping[str, Array] | None


@cache
def outcome(dtype: torch.dtype) -> Outcome:
    m, xs = inputs_of(values(1))["m"], [x.to(dtype) for _, x in TRAPS.values()]
    with torch.no_grad():
        truth, eager = (All()(m, *xs) for xs in ([x.double() for x in xs], xs))
    feeds = {"m": m} | {f"x{i}": x for i, x in enumerate(xs)}
    graph = exported(All(), feeds, list(TRAPS))
    wide = widened(graph)
    ort = ran(wide, feeds, ort_runner) if dtype == torch.float16 else None  # onnxruntime on CPU lacks much in bfloat16
    return Outcome(named(truth), named(eager), ran(graph, feeds), ran(wide, feeds), ort)


def named(tensors: tuple[Tensor, ...]) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in zip(TRAPS, tensors, strict=True)}


@pytest.mark.parametrize("name", TRAPS)
def test_what_goes_wrong_in_half_precision_is_right_when_widened(name: str) -> None:
    found, unit = outcome(torch.float16), UNIT_ROUNDOFF["fp16"]
    truth, eager = found.truth[name], found.eager[name]
    assert not is_right(found.half[name], truth, unit)
    assert found.ort is not None
    for got in (found.strict[name], found.ort[name]):
        assert is_right(got, truth, unit)
        assert not np.isfinite(eager).all() or rms(got - truth) <= 1.5 * rms(eager - truth)


@pytest.mark.parametrize("name", TRAPS)
def test_bfloat16_is_right_when_widened(name: str) -> None:
    found = outcome(torch.bfloat16)
    assert is_right(found.strict[name], found.truth[name], UNIT_ROUNDOFF["bf16"])


def test_bfloat16_drifts_where_it_does_not_overflow() -> None:
    found = outcome(torch.bfloat16)
    drifting = {name for name in TRAPS if not is_right(found.half[name], found.truth[name], UNIT_ROUNDOFF["bf16"])}
    assert drifting >= {"mean", "average pool", "mean square", "logsumexp", "vector norm", "expm1"}


NORMS = {
    "LayerNorm": (nn.LayerNorm(16), values(1000)),
    "RMSNorm": (nn.RMSNorm(16, eps=1e-6), values(1000)),
    "BatchNorm": (nn.BatchNorm1d(2048), values(100)),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_with_weights_is_no_worse_than_pytorchs(name: str) -> None:
    norm, x = NORMS[name]
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.linspace(-0.2, 0.3, parameter.numel()))
    model, inputs = Model(lambda x, m, norm: norm(x), norm).eval().half(), inputs_of(x.half())
    with torch.no_grad():
        eager = model(**inputs).double().numpy()
    got = ran(widened(exported(model, inputs)), inputs)["out"]
    with torch.no_grad():
        truth = model.double()(**inputs | {"x": inputs["x"].double()}).numpy()
    assert rms(got - truth) <= 1.5 * rms(eager - truth)


class Attention(nn.Module):
    """Normalised queries and keys, a scale that is learnt, a mask, and the mean of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.scale = nn.Linear(16, 16), nn.Linear(16, 16), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        q, k = (functional.normalize(project(x), dim=-1) for project in (self.to_q, self.to_k))
        logits = q @ k.mT * self.scale.exp() / x.norm(dim=-1, keepdim=True)
        return (logits.masked_fill(~m[:, None], torch.finfo(x.dtype).min).softmax(-1) @ x).mean(1)


def attend(x: Tensor, m: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=m[:, None, None]).mean(2)


@pytest.mark.parametrize("model", [Attention(), Model(attend)], ids=["normalised", "plain"])
def test_attention_has_no_cast_between_its_products_and_its_softmax(model: nn.Module) -> None:
    graph = widened(exported(model.eval().half(), inputs_of(values(30, length=64).half()))).graph
    assert "Cast" in kinds(graph)
    softmax = next(node for node in graph if node.op_type == "Softmax")
    assert "Cast" not in {node.op_type for node in up_to_products(softmax, makers_of)}
    assert "Cast" not in {node.op_type for node in up_to_products(softmax, users_of)}
    assert softmax.outputs[0].dtype == ir.DataType.FLOAT16


def makers_of(node: ir.Node) -> list[ir.Node]:
    halves = [value for value in node.inputs if value is not None and value.dtype == ir.DataType.FLOAT16]
    # What is not of the product (a mask, a norm) may come out of a Cast.
    return [maker for value in halves if (maker := value.producer()) is not None and maker.op_type not in {"Cast", "Exp"}]


def users_of(node: ir.Node) -> list[ir.Node]:
    return [user for value in node.outputs for user, _ in value.uses()]


def up_to_products(start: ir.Node, step: Callable[[ir.Node], list[ir.Node]]) -> list[ir.Node]:
    found, ends = list[ir.Node](), [start]
    while ends:
        node = ends.pop()
        found.append(node)
        ends += [] if node.op_type == "MatMul" else step(node)
    return found


def test_the_layers_own_graph_is_left_as_it_is() -> None:
    checkpoint = make_checkpoint(prenorm=True, norm="rms")
    model = trace(lower(checkpoint, "fused", "fp16", False, False), layer_signature(checkpoint.spec, Interface()), 17)
    before = ir.to_proto(model).SerializeToString()
    widen(model)
    assert ir.to_proto(model).SerializeToString() == before


# ---- graphs that are written out


def graph_of(text: str, opset: int = 18) -> ir.Model:
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "some.domain" : 1]>\n'
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(head + text), strict_mode=True))


def kinds(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph]


def casts(graph: ir.Graph) -> list[tuple[str | None, str | None]]:
    return [(node.inputs[0].name, node.outputs[0].name) for node in graph if node.op_type == "Cast" and node.inputs[0]]


def test_nodes_that_read_the_same_share_a_cast_and_neighbours_have_none() -> None:
    model = graph_of("""g (float16[4, n] x) => (float16[4, 1] out) <int64[1] last = {-1}> {
        total = ReduceSum(x, last)
        square = Mul(x, x)
        squares = ReduceSum(square, last)
        root = Sqrt(squares)
        out = Div(total, root)
    }""")
    graph = widened(model).graph
    assert casts(graph) == [("x", "x_float32"), ("out_float32", "out")]
    assert {value.dtype for node in list(graph)[1:-1] for value in node.outputs} == {ir.DataType.FLOAT}


def test_casts_that_torch_put_around_a_sum_are_not_doubled() -> None:
    model = graph_of("""g (float16[b, n] x, bool[b, n] m) => (float16[b] out) <int64[1] last = {-1}> {
        live = Cast <to = 10> (m)
        kept = Mul(x, live)
        wide = Cast <to = 1> (kept)
        sum_wide = ReduceSum <keepdims = 0> (wide, last)
        sum = Cast <to = 10> (sum_wide)
        live_wide = Cast <to = 1> (live)
        count_wide = ReduceSum <keepdims = 0> (live_wide, last)
        count = Cast <to = 10> (count_wide)
        out = Div(sum, count)
    }""")
    graph = widened(model).graph
    assert casts(graph) == [("x", "x_float32"), ("m", "live_float32"), ("out_float32", "out")]


def test_outputs_inputs_and_weights_keep_names_types_and_shapes() -> None:
    model = graph_of("""g (float16[b, n, 4] x) => (float16[b, n, 4] normal, float16[b, 4] out, float16[b, n, 4] x_out)
        <float16[4] weight = {1, 2, 3, 4}, int64[1] first = {1}> {
        normal = LayerNormalization(x, weight)
        out = ReduceMean <keepdims = 0> (normal, first)
        x_out = Identity(x)
    }""")
    wanted = [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
    graph = widened(model).graph
    assert [(v.name, v.dtype, str(v.shape)) for v in (*graph.inputs, *graph.outputs)] == wanted
    assert graph.initializers["weight"].dtype == ir.DataType.FLOAT16
    made = [value for node in graph for value in node.outputs]
    assert all(value.name and value.dtype is not None and value.shape is not None for value in made)
    assert len({value.name for value in made}) == len(made)


def test_a_residual_stream_stays_half() -> None:
    model = graph_of("""g (float16[b, n, 4] x) => (float16[b, n, 4] out)
        <float16[4] w = {1, 1, 1, 1}, float16[4, 1] p = {1, 1, 1, 1}, float16[4] bias = {1, 1, 1, 1}> {
        normal = LayerNormalization(x, w)
        product = MatMul(normal, p)
        moved = Add(product, bias)
        stream = Add(x, moved)
        again = LayerNormalization(stream, w)
        late = MatMul(again, p)
        out = Add(stream, late)
    }""")
    graph = widened(model).graph
    assert {node.outputs[0].dtype for node in graph if node.op_type in {"MatMul", "Add"}} == {ir.DataType.FLOAT16}
    assert kinds(graph).count("Cast") == 5  # in and out of each norm, and their one weight


def test_what_something_else_reads_too_stays_half() -> None:
    model = graph_of("""g (float16[4, n] x) => (float16[4, n] soft, float16[4, 1] out) <int64[1] last = {-1}, float16 s = {2}> {
        scaled = Mul(x, s)
        soft = Softmax(scaled)
        out = ReduceLogSumExp(scaled, last)
    }""")
    graph = widened(model).graph
    assert casts(graph) == [("scaled", "scaled_float32"), ("out_float32", "out")]


def test_branches_are_widened_and_read_the_cast_outside() -> None:
    model = graph_of("""g (bool yes, float16[2, 2048, 16] x) => (float16[2, 16] out) <int64[1] first = {1}> {
        out = If (yes) <
            then_branch = t () => (float16[2, 16] a) { a = ReduceMean <keepdims = 0> (x, first) },
            else_branch = e () => (float16[2, 16] b) { b = ReduceL2 <keepdims = 0> (x, first) }
        >
    }""")
    inputs = {"yes": torch.tensor(True), "x": values(10, 100).half()}
    truth = inputs["x"].double().mean(1).numpy()
    wide = widened(model)
    assert casts(wide.graph) == [("x", "x_float32")]
    assert not is_right(ran(model, inputs)["out"], truth, UNIT_ROUNDOFF["fp16"])
    assert is_right(ran(wide, inputs)["out"], truth, UNIT_ROUNDOFF["fp16"])


@pytest.mark.parametrize("opset", [17, 21])
def test_log_softmax_far_below_the_largest_is_finite_at_every_opset(opset: int) -> None:
    model = graph_of("g (float16[2, 2048, 16] x) => (float16[2, 2048, 16] out) { out = LogSoftmax <axis = 1> (x) }", opset)
    inputs = {"x": values(60).half()}
    got = ran(widened(model), inputs)["out"]
    assert is_right(got, inputs["x"].double().log_softmax(1).numpy(), UNIT_ROUNDOFF["fp16"])


def test_a_lower_bound_of_zero_is_an_epsilon_only_under_a_division() -> None:
    model = graph_of("""g (float16[4, n] x) => (float16[4, 1] out, float16[4, n] ratio)
        <int64[1] last = {-1}, float16 zero = {0}> {
        mean = ReduceMean(x, last)
        out = Clip(mean, zero)
        norm = ReduceL2(x, last)
        safe = Clip(norm, zero)
        ratio = Div(x, safe)
    }""")
    graph = widened(model).graph
    bounds = {node.outputs[0].name: node.inputs[1] for node in graph if node.op_type == "Clip"}
    assert bounds["out_float32"].name == "zero_float32"
    assert bounds["safe"].const_value is not None
    assert bounds["safe"].const_value.numpy() == np.float32(1e-12)


def test_nodes_of_other_domains_are_left_alone() -> None:
    model = graph_of("""g (float16[4, n] x) => (float16[4, n] out) {
        out = some.domain.ReduceMean(x)
    }""")
    before = ir.to_proto(model).SerializeToString()
    widen(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_float32_logarithm_of_a_sigmoid_is_right_where_it_is_small() -> None:
    """onnxruntime's sigmoid is right to 6e-8 of 1."""
    x = torch.linspace(-110, 20, 2 * 8 * 16).reshape(2, 8, 16)
    model = exported(Model(lambda x, m: torch.sigmoid(x).log() + functional.logsigmoid(x)), inputs_of(x))
    keep_logarithms(model)
    found = ran(model, inputs_of(x), ort_runner)["out"]
    np.testing.assert_allclose(found, 2 * functional.logsigmoid(x.double()).numpy(), rtol=1e-6, atol=1e-6)
    assert not {"Log", "Sigmoid"} & {node.op_type for node in model.graph}


def test_a_float32_graph_is_left_untouched() -> None:
    model = graph_of("""g (float[b, n] x) => (float[b, n] out, float[b, n] soft) <int64[1] last = {-1}, float zero = {0}> {
        same = Cast <to = 1> (x)
        square = Mul(same, same)
        total = ReduceSum(square, last)
        safe = Clip(total, zero)
        out = Div(x, safe)
        soft = LogSoftmax(x)
    }""")
    before = ir.to_proto(model).SerializeToString()
    widen(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_widened_graph_is_widened_already() -> None:
    once = widened(exported(Model(written_layer_norm).eval(), inputs_of(values(1, length=8).half())))
    before = ir.to_proto(once).SerializeToString()
    widen(once)
    assert ir.to_proto(once).SerializeToString() == before


def test_outputs_that_the_exporter_left_wide_are_rounded_under_their_names() -> None:
    x = ir.val("x", ir.DataType.FLOAT16, [2, 3])
    up = ir.node("Cast", [x], {"to": ir.DataType.FLOAT.value})
    up.outputs[0].type, up.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), x.shape
    total = ir.node("ReduceSum", [up.outputs[0]], {"keepdims": 1})
    total.outputs[0].name, total.outputs[0].type = "total", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [total.outputs[0]], nodes=[up, total], opset_imports={"": 18}, name="sum")
    model = ir.Model(graph, ir_version=10)
    round_outputs(model, ir.DataType.FLOAT16)
    (output,) = model.graph.outputs
    assert (output.name, output.dtype) == ("total", ir.DataType.FLOAT16)
    assert [node.op_type for node in model.graph] == ["Cast", "ReduceSum", "Cast"]
