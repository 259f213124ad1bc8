"""A graph of opset 18, as torch writes it, rewritten as a true opset 17: the same numbers, or a refusal by name and line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bca_deploy.errors import ExportError
from bca_deploy.layers.isolation import exporter_alone
from bca_deploy.tracing.opset import lower_to_17, raise_to, source_line

Op = Callable[[Tensor], Tensor]
Feeds = dict[str, np.ndarray]


class Ops(nn.Module):
    """One output for each operation, so that many share an export."""

    def __init__(self, ops: dict[str, Op]) -> None:
        super().__init__()
        self.ops = list(ops.values())
        self.modules_of_ops = nn.ModuleList(op for op in self.ops if isinstance(op, nn.Module))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(op(x) for op in self.ops)


class AlongTokens(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.transpose(1, 2))


TOKENS: dict[str, Op] = {
    "mean": lambda x: x.mean(1),
    "mean_of_all": lambda x: x.mean(),
    "any": lambda x: (x > 1).any(1),
    "all": lambda x: (x > -1).all(-1),
    "max_dim": lambda x: x.max(1)[0],
    "amin": lambda x: x.amin((1, 2), keepdim=True),
    "norm": lambda x: x.norm(dim=-1),
    "norm_1": lambda x: x.norm(p=1, dim=-1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=(1, 2)),
    "var": lambda x: x.var(1),
    "std": lambda x: x.std(-1),
    "prod": lambda x: x.prod(-1),
    "logsumexp": lambda x: x.logsumexp(1),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.flip(1), dim=-1),
    "chunk_even": lambda x: torch.stack(x.chunk(2, -1)),
    "chunk_uneven": lambda x: x.chunk(3, -1)[2],
    "split": lambda x: x.split([3, 5], -1)[1],
    "rfft_abs": lambda x: torch.fft.rfft(x, dim=-1).abs(),
    "pad": lambda x: F.pad(x, (0, 0, 1, 2), value=0.5),
    "scatter_add": lambda x: x.scatter_add(2, torch.zeros_like(x, dtype=torch.long), x),
    "rms_norm": nn.RMSNorm(8),
    "mish": nn.Mish(),
    "glu": nn.GLU(),
    "weight_norm": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "conv_same_even": AlongTokens(nn.Conv1d(8, 4, 4, padding="same")),
    "adaptive_avg_pool": AlongTokens(nn.AdaptiveAvgPool1d(1)),
}
IMAGES: dict[str, Op] = {
    "pad_reflect": lambda x: F.pad(x, (1, 1, 2, 1), mode="reflect"),
    "unfold": lambda x: F.unfold(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "bilinear": lambda x: F.interpolate(x, size=(3, 5), mode="bilinear"),
    "group_norm": nn.GroupNorm(2, 4),
    "adaptive_avg_pool_2d": nn.AdaptiveAvgPool2d(1),
}


class Refused(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        index = torch.zeros_like(x, dtype=torch.long)
        first = x.scatter_reduce(1, index, x, "amax")  # refused: ScatterElements
        bits = index & 3  # refused: BitwiseAnd
        for _ in range(2):
            bits = bits | 4  # refused: BitwiseOr
        folded = F.fold(x.mT, (4, 4), 2)  # refused: Col2Im
        return first, bits, folded, F.interpolate(x[:, None], (3, 4), mode="bilinear", antialias=True)  # refused: Resize


class Circular(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 1), mode="circular")  # refused: Pad


def export(module: nn.Module, example: Tensor, dynamic: dict[int, str], names: list[str] | None = None) -> ir.Model:
    with exporter_alone():
        program = torch.onnx.export(
            module.eval(),
            kwargs={"x": example},
            dynamo=True,
            opset_version=18,
            dynamic_shapes={"x": dynamic},
            output_names=names,
            verbose=False,
        )
    assert program is not None
    return program.model


def parse(body: str, functions: str = "") -> ir.Model:
    header = '<ir_version: 10, opset_import: ["" : 18, "local" : 1]>'
    return ir.from_proto(onnx.parser.parse_model(f"{header} g {body} {functions}"))


def run(model: ir.Model, feeds: Feeds) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


def lowered(model: ir.Model) -> ir.Model:
    lower_to_17(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def assert_same_in_17(body: str, feeds: Feeds, functions: str = "") -> ir.Model:
    wanted = run(parse(body, functions), feeds)
    model = lowered(parse(body, functions))
    for name, got in run(model, feeds).items():
        np.testing.assert_allclose(got, wanted[name], rtol=1e-6, atol=1e-6)
    return model


def line_of(operator: str) -> str:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return f"test_opset.py:{next(i for i, line in enumerate(lines, 1) if line.endswith(f'# refused: {operator}'))}"


def is_of_17(node: ir.Node) -> bool:
    schema = onnx.defs.get_schema(node.op_type, 17, "")  # raises where 17 has no such operator
    return (
        set(node.attributes) <= set(schema.attributes)
        and len(node.inputs) <= schema.max_input
        and node.version is None
        and node.attributes.get_string("reduction", "none") not in {"max", "min"}
    )


Results = list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]


def both(ops: dict[str, Op], dynamic: dict[int, str], sizes: list[tuple[int, ...]]) -> tuple[ir.Model, Results]:
    """The lowered model of one export, and what torch and it give at each size."""
    torch.manual_seed(0)
    module = Ops(ops).eval()
    model = lowered(export(module, torch.randn(3, *sizes[0][1:]), dynamic, list(ops)))
    samples = [torch.randn(size) for size in sizes]
    with torch.no_grad():
        wanted = [{name: out.numpy() for name, out in zip(ops, module(x), strict=True)} for x in samples]
    return model, list(zip(wanted, [run(model, {"x": x.numpy()}) for x in samples], strict=True))


@pytest.fixture(scope="module")
def of_tokens() -> tuple[ir.Model, Results]:
    return both(TOKENS, {0: "batch", 1: "n"}, [(2, 5, 8), (4, 9, 8)])


@pytest.fixture(scope="module")
def of_images() -> tuple[ir.Model, Results]:
    return both(IMAGES, {0: "batch", 2: "h", 3: "w"}, [(2, 4, 5, 6), (5, 4, 8, 7)])


@pytest.mark.parametrize("name", TOKENS)
def test_a_lowered_operation_on_tokens_is_torchs(of_tokens: tuple[ir.Model, Results], name: str) -> None:
    for wanted, got in of_tokens[1]:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-5, strict=True)


@pytest.mark.parametrize("name", IMAGES)
def test_a_lowered_operation_on_images_is_torchs(of_images: tuple[ir.Model, Results], name: str) -> None:
    for wanted, got in of_images[1]:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-5, strict=True)


def test_no_node_of_a_lowered_model_is_of_opset_18(
    of_tokens: tuple[ir.Model, Results], of_images: tuple[ir.Model, Results]
) -> None:
    for model, _ in (of_tokens, of_images):
        assert model.opset_imports == {"": 17}
        assert [str(node) for node in model.graph.all_nodes() if not is_of_17(node)] == []


def test_every_node_without_a_form_is_named_with_its_line_and_the_opset_that_has_it() -> None:
    model = export(Refused(), torch.randn(3, 9, 4), {0: "batch"})
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(ExportError) as caught:
        lower_to_17(model)
    lowest = "opset 18 is the lowest that has it"
    assert str(caught.value).splitlines() == [
        "opset 17 has no form for 6 of the graph's nodes:",
        f"  ScatterElements at {line_of('ScatterElements')}: reduction max; {lowest}",
        f"  BitwiseAnd at {line_of('BitwiseAnd')}: bit operations on integers; {lowest}",
        f"  BitwiseOr at {line_of('BitwiseOr')}: bit operations on integers; {lowest} (2 nodes)",
        f"  Col2Im at {line_of('Col2Im')}: the operator is new; {lowest}",
        f"  Resize at {line_of('Resize')}: attribute antialias=1; {lowest}",
        "export with --opset 18 or higher, or write these lines in another way",
    ]
    assert ir.to_proto(model).SerializeToString() == before


def test_a_circular_pad_needs_the_opset_that_brought_it() -> None:
    model = export(Circular(), torch.randn(3, 4, 8), {0: "batch"})
    with pytest.raises(ExportError, match=rf"Pad at {line_of('Pad')}: mode wrap; opset 19 is .*\n.*--opset 19 or higher"):
        lower_to_17(model)


# ---- what torch does not write today, but opset 18 allows

VECTORS: Feeds = {"x": np.linspace(-2, 3, 14, dtype=np.float32).reshape(2, 7)}
IMAGE: Feeds = {"x": np.linspace(-2, 3, 16, dtype=np.float32).reshape(1, 1, 4, 4)}
AXES = "axes = Constant<value = int64[1] {1}>()"


def test_an_uneven_split_of_a_known_size_gets_its_sizes() -> None:
    outputs = "(float[n,3] a, float[n,3] b, float[n,1] c)"
    model = assert_same_in_17(f"(float[n,7] x) => {outputs} {{ a, b, c = Split<axis=-1, num_outputs=3>(x) }}", VECTORS)
    assert [node.op_type for node in model.graph] == ["Constant", "Split"]


@pytest.mark.parametrize("axes", ["{1}", "{-1}"])
def test_pads_along_some_axes_become_pads_along_all(axes: str) -> None:
    constants = f"p = Constant<value = int64[2] {{2, 1}}>() axes = Constant<value = int64[1] {axes}>()"
    assert_same_in_17(f"(float[n,7] x) => (float[n,10] y) {{ {constants} y = Pad(x, p, , axes) }}", VECTORS)


@pytest.mark.parametrize(
    "call", ['Resize<antialias=0, keep_aspect_ratio_policy="stretch">(x, , s)', "LpPool<kernel_shape=[2, 2], ceil_mode=0>(x)"]
)
def test_a_new_attribute_that_changes_nothing_is_dropped(call: str) -> None:
    scales = "s = Constant<value = float[4] {1.0, 1.0, 2.0, 0.5}>()"
    assert_same_in_17(f"(float[1,1,4,4] x) => (float[1,1,h,w] y) {{ {scales} y = {call} }}", IMAGE)


def test_the_axes_may_be_an_initializer_and_none_means_all() -> None:
    nodes = "{ m = ReduceMean(x, axes) y = ReduceMax(m) z = ReduceMax<keepdims=0>(m, axes) }"
    assert_same_in_17(f"(float[n,7] x) => (float[1,1] y, float[n] z) <int64[1] axes = {{-1}}> {nodes}", VECTORS)


def test_nodes_in_branches_and_functions_are_lowered_too() -> None:
    then = f"then_branch = t () => (float[n,1] u) {{ {AXES} u = ReduceMean(x, axes) }}"
    otherwise = f"else_branch = e () => (float[n,1] v) {{ {AXES} v = ReduceMin(x, axes) }}"
    function = f'<domain: "local", opset_import: ["" : 18]> peak (x) => (y) {{ {AXES} y = ReduceMax(x, axes) }}'
    nodes = f"{{ y = If<{then}, {otherwise}>(b) z = local.peak(x) }}"
    feeds = VECTORS | {"b": np.array(True)}
    model = assert_same_in_17(f"(float[n,7] x, bool b) => (float[n,1] y, float[n,1] z) {nodes}", feeds, function)
    (lowered_function,) = model.functions.values()
    assert lowered_function.opset_imports == {"": 17}
    nodes_of_all = [*model.graph.all_nodes(), *lowered_function.all_nodes()]
    assert [str(node) for node in nodes_of_all if node.domain == "" and not is_of_17(node)] == []


@pytest.mark.parametrize("name", ["And", "Or", "Xor"])
def test_bit_operations_on_booleans_become_logical(name: str) -> None:
    model = lowered(parse(f"(bool[n] x, bool[n] z) => (bool[n] y) {{ a = BitwiseNot(z) y = Bitwise{name}(x, a) }}"))
    x, z = np.array([False, False, True, True]), np.array([False, True, False, True])
    wanted = getattr(np, f"logical_{name.lower()}")(x, ~z)
    np.testing.assert_array_equal(run(model, {"x": x, "z": z})["y"], wanted)


@pytest.mark.parametrize(
    ("inputs", "node", "reason"),
    [
        ("int64[1] axes", "ReduceMean(x, axes)", "ReduceMean: its axes are computed at run time; opset 18 is"),
        ("", "ReduceMean<noop_with_empty_axes=1>(x)", "ReduceMean: noop_with_empty_axes, with no axes; opset 18 is"),
        ("", "Split<num_outputs=1>(x)", "Split: 1 parts of a dimension whose size is known only at run time; opset 18 is"),
        ("int64[2] p, int64[1] axes", "Pad(x, p, , axes)", "Pad: its axes are computed at run time; opset 18 is"),
        ("int64[2] p", "Pad(x, p, , one)", "Pad: its pads along some axes are computed at run time; opset 18 is"),
        ("", "LpPool<kernel_shape=[2], ceil_mode=1>(x)", "LpPool: attribute ceil_mode=1; opset 18 is"),
        ("float[2] s", "GroupNormalization<num_groups=2>(x, s, s)", "GroupNormalization: the operator is new; opset 21 is"),
        ("int64[2] s", "CenterCropPad(x, s)", "CenterCropPad: the operator is new; opset 18 is"),
        ("", "OptionalHasElement(x)", "OptionalHasElement: opset 18 changed it; opset 18 is"),
        ("", "Gelu(x)", "Gelu: the operator is new; opset 20 is"),
    ],
)
def test_a_node_without_a_form_is_refused(inputs: str, node: str, reason: str) -> None:
    signature = ", ".join(filter(None, ["float[n,4,4] x", inputs]))
    model = parse(f"({signature}) => (float[a,b,c] y) <int64[1] one = {{1}}> {{ y = {node} }}")
    opset = reason.split()[-2]
    with pytest.raises(ExportError, match=rf"{reason} the lowest that has it\nexport with --opset {opset} or higher"):
        lower_to_17(model)


def test_the_advice_is_the_opset_that_has_them_all() -> None:
    model = parse("(float[n,7] x, int64[2] s) => (float[a,b] y) { g = Gelu(x) y = CenterCropPad(g, s) }")
    nodes = r"for 2 of the graph's nodes:\n  Gelu.*\n  CenterCropPad.*"
    with pytest.raises(ExportError, match=rf"{nodes}\nexport with --opset 20 or higher"):
        lower_to_17(model)


def test_an_operator_that_no_opset_has_is_refused() -> None:
    with pytest.raises(ExportError, match=r"Nonsense is no operator of ai\.onnx"):
        lower_to_17(parse("(float[n,7] x) => (float[n,7] y) { y = Nonsense(x) }"))


def test_axes_that_a_caller_may_replace_are_not_constant() -> None:
    model = parse("(float[n,7] x, int64[1] axes) => (float[n,1] y) { y = ReduceMean(x, axes) }")
    axes = model.graph.inputs[1]
    axes.const_value = ir.tensor([1], dtype=ir.DataType.INT64, name="axes")
    model.graph.register_initializer(axes)
    with pytest.raises(ExportError, match="its axes are computed at run time"):
        lower_to_17(model)


def test_a_function_whose_caller_sets_an_attribute_is_refused() -> None:
    function = '<domain: "local", opset_import: ["" : 18]> peak <keep> (x) => (y) { y = ReduceMax<keepdims: int = @keep>(x) }'
    with pytest.raises(ExportError, match="ReduceMax: an attribute is left to the caller of its function"):
        lower_to_17(parse("(float[n,7] x) => (float[1,1] y) { y = local.peak<keep=1>(x) }", function))


def test_only_opset_18_is_lowered() -> None:
    model = parse("(float[n,7] x) => (float[n,7] y) { y = Relu(x) }")
    model.opset_imports[""] = 17
    with pytest.raises(ExportError, match="g is of opset 17; only opset 18 is lowered to 17"):
        lower_to_17(model)


# ---- where a node comes from

TORCH = (
    '  File "/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1787, in _call_impl\n    return forward()\n'
)


@pytest.mark.parametrize(
    ("trace", "line"),
    [
        ('File "/home/me/net/model.py", line 41, in forward\n    y = x\n' + TORCH, "model.py:41"),
        ('File "/me/model.py", line 41, in forward\n' + TORCH + 'File "/me/blocks.py", line 7, in forward', "blocks.py:7"),
        ('File "C:\\net\\model.py", line 4, in forward', "model.py:4"),
        ('File "/v/site-packages/timm/layers/norm.py", line 9, in forward\n' + TORCH, "norm.py:9"),
        ('File "/home/me/torch/model.py", line 3, in forward\nFile "<eval_with_key>.4", line 8, in forward', "model.py:3"),
        (TORCH, None),
        ("", None),
    ],
)
def test_the_source_line_is_the_innermost_of_the_users_code(trace: str, line: str | None) -> None:
    assert source_line(ir.node("Relu", [], metadata_props={"pkg.torch.onnx.stack_trace": trace})) == line


def test_a_node_that_says_nothing_has_no_source_line() -> None:
    assert source_line(ir.node("Relu", [])) is None


def test_a_newer_opset_without_changes_to_the_operators_is_a_name() -> None:
    text = '<ir_version: 10, opset_import: ["": 25]> g (float[n] x) => (float[n] y) {y = Relu(x)}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    raise_to(model, 27)
    assert model.opset_imports == {"": 27}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_an_operator_that_changed_is_refused_and_the_model_stays() -> None:
    text = '<ir_version: 10, opset_import: ["": 18]> g (float[n] x) => (float[n] y) {y = Cast<to: int = 1>(x)}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    with pytest.raises(ExportError, match="Cast changed between opset 18 and 27; export with --opset 18"):
        raise_to(model, 27)
    assert model.opset_imports == {"": 18}
