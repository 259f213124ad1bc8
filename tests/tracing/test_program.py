"""A traced program holds at every declared size, or the error says for which it does not, in which line, and what to do."""

import copy
import itertools
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from bca_deploy.arithmetic import value_of
from bca_deploy.errors import ExportError
from bca_deploy.layers.isolation import exporter_alone
from bca_deploy.signature import Axis, DimRange, Dims
from bca_deploy.tracing.program import Program, any_length, export_program

DIMS = Dims(batch=DimRange(1, 2, 8), x_len=DimRange(1, 16, 128), context_len=DimRange(1, 12, 96))
AXES: dict[str, tuple[Axis, ...]] = {"x": ("batch", "x_len", 8), "context": ("batch", "context_len", 8)}
SIZES = [(1, 1, 1), (1, 7, 4), (2, 1, 9), (3, 2, 1), (3, 4, 4), (2, 5, 3), (4, 16, 12), (8, 128, 96)]

Outputs = tuple[Tensor, ...]
Made = Callable[..., object]


class Model(nn.Module):
    """Whatever a function makes of two inputs, with submodules and parameters of its own."""

    def __init__(self, made: Made, **own: object) -> None:
        super().__init__()
        self.made = made
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, context: Tensor) -> object:
        return self.made(self, x, context)


def inputs(batch: int = 3, x_len: int = 6, context_len: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch + x_len + context_len)
    lengths = {"x": x_len, "context": context_len}
    return {name: torch.randn(batch, length, 8, generator=generator) for name, length in lengths.items()}


def traced(module: nn.Module, example: Mapping[str, Tensor] | None = None, dims: Dims = DIMS) -> Program:
    with exporter_alone():
        return export_program(module.eval(), example or inputs(), AXES, dims)


def line(marker: str) -> str:
    """Return the line of this file that ends in ``# <marker>``, as a message has it."""
    texts = Path(__file__).read_text(encoding="utf-8").splitlines()
    return f"test_program.py:{next(number for number, text in enumerate(texts, 1) if text.endswith(f'# {marker}'))}"


def told(module: nn.Module, **kwargs: object) -> list[str]:
    """Return what the error says, a reason a line, without the head."""
    with pytest.raises(ExportError) as raised:
        traced(module, **kwargs)  # type: ignore[arg-type]
    head, *reasons = str(raised.value).split("\n- ")
    assert head == f"the trace is not the model at every declared size ({kwargs.get('dims', DIMS)}):"
    return reasons


def refused(module: nn.Module, **kwargs: object) -> str:
    with pytest.raises(ExportError) as raised:
        traced(module, **kwargs)  # type: ignore[arg-type]
    return str(raised.value)


def flat(result: object) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def check_sizes(module: nn.Module, program: Program, sizes: list[tuple[int, int, int]] = SIZES) -> None:
    """Hold values and declared sizes against PyTorch's."""
    runs = program.exported.module(check_guards=False)  # what torch refuses at 1 is what is to be tried
    for size in sizes:
        given = inputs(*size)
        wanted, got = flat(module(**given)), flat(runs(**given))
        assert [each.shape for each in got] == [each.shape for each in wanted], size
        assert [shape_at(axes, DIMS.named(size)) for axes in program.outputs] == [tuple(each.shape) for each in wanted], size
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def shape_at(axes: tuple[Axis, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(axis if isinstance(axis, int) else value_of(axis, sizes) for axis in axes)


# ---- what holds everywhere


def attend(_: Model, x: Tensor, context: Tensor) -> Outputs:
    weights = (x @ context.mT).softmax(-1)
    return weights @ context, weights


CLEAN: dict[str, tuple[Made, Callable[[], dict[str, object]], tuple[tuple[Axis, ...], ...]]] = {
    "attention": (attend, dict, (("batch", "x_len", 8), ("batch", "x_len", "context_len"))),
    "concat": (lambda _, x, context: torch.cat([x, context], 1), dict, (("batch", "context_len + x_len", 8),)),
    "pairs of the batch": (lambda _, x, __: x.mean(1) @ x.mean(1).T, dict, (("batch", "batch"),)),
    "pairs of positions": (lambda _, x, __: (x[:, :, None] * x[:, None]).flatten(1, 2), dict, (("batch", "x_len*x_len", 8),)),
    "flat": (lambda _, x, __: x.flatten(), dict, (("8*batch*x_len",),)),
    "conv of stride 2": (
        lambda self, x, _: self.conv(x.mT),
        lambda: {"conv": nn.Conv1d(8, 4, 3, 2, 1)},
        (("batch", 4, "((x_len - 1) // 2) + 1"),),
    ),
    "two convs of stride 2": (
        lambda self, x, context: self.conv(self.conv(x.mT)).mT @ context.mT,
        lambda: {"conv": nn.Conv1d(8, 8, 3, 2, 1)},
        (("batch", "((x_len - 1) // 4) + 1", "context_len"),),
    ),
    "every second": (lambda _, x, __: x[:, ::2], dict, (("batch", "(x_len + 1) // 2", 8),)),
    "the shorter": (
        lambda _, x, context: x[:, : min(x.shape[1], context.shape[1])],
        dict,
        (("batch", "min(context_len, x_len)", 8),),
    ),
    "without the first four": (lambda _, x, __: x[:, 4:], dict, (("batch", "max(0, x_len - min(4, x_len))", 8),)),
    "padded to fours": (lambda _, x, __: F.pad(x, (0, 0, 0, -x.shape[1] % 4)), dict, (("batch", "x_len + ((-x_len) % 4)", 8),)),
    "resized by 3/2": (lambda _, x, __: F.interpolate(x.mT, scale_factor=1.5), dict, (("batch", 8, "(3*x_len) // 2"),)),
    "of nothing": (lambda _, __, context: torch.arange(3.0), dict, ((3,),)),
    "pooled": (lambda _, x, __: F.adaptive_avg_pool1d(x.mT, 4), dict, (("batch", 8, 4),)),
    "no tensors": (lambda _, x, context: {"b": x * 2, "a": (None, 3, x.shape[1], context)}, dict, (AXES["x"], AXES["context"])),
    "in place": (lambda _, x, __: (x * 1).add_(1), dict, (AXES["x"],)),
}


@pytest.mark.parametrize("kind", CLEAN)
def test_what_holds_everywhere_has_pytorchs_values_and_sizes_at_every_size(kind: str) -> None:
    made, own, axes = CLEAN[kind]
    module = Model(made, **own())
    program = traced(module)
    assert program.outputs == axes
    check_sizes(module, program)
    assert set(program.symbols.values()) == set(DIMS)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    "rnn",
    [
        lambda: nn.LSTM(8, 5, 2, batch_first=True, bidirectional=True),
        lambda: nn.LSTM(8, 5, batch_first=True, proj_size=3),
        lambda: nn.GRU(8, 5, batch_first=True),
    ],
    ids=["LSTM, two layers, both ways", "LSTM with a projection", "GRU"],
)
def test_a_recurrent_layer_takes_any_length(rnn: Callable[[], nn.RNNBase]) -> None:
    module = Model(lambda self, x, _: self.rnn(x), rnn=rnn())
    weights = module.rnn._flat_weights
    for _ in range(2):
        program = traced(module)
        check_sizes(module, program)
    assert all(one is other for one, other in zip(module.rnn._flat_weights, weights, strict=True))


def test_a_recurrent_layer_that_torch_unrolls_is_told() -> None:
    def unrolled(self: Model, x: Tensor, _: Tensor) -> Tensor:
        return self.rnn(x)[0]  # unrolled

    reasons = told(Model(unrolled, rnn=nn.RNN(8, 5, batch_first=True)))
    assert reasons == [f"x_len other than 6: x_len became the constant 6 in {line('unrolled')} {BY}"]


def test_a_feature_map_becomes_height_times_width_tokens() -> None:
    module = Model(lambda _, x, context: (x.flatten(2).mT, context))
    dims = Dims(batch=DimRange(1, 2, 4), height=DimRange(1, 8, 32), width=DimRange(2, 9, 32))
    axes: dict[str, tuple[Axis, ...]] = {"x": ("batch", 8, "height", "width"), "context": ("batch", 4, 8)}
    with exporter_alone():
        program = export_program(module, {"x": torch.randn(3, 8, 6, 5), "context": torch.randn(3, 4, 8)}, axes, dims)
    assert program.outputs == (("batch", "height*width", 8), ("batch", 4, 8))
    assert program.unsettled == ("batch", "height")
    for height, width in itertools.product((1, 2, 7), (2, 3, 32)):
        out, _ = program.exported.module()(x=torch.randn(2, 8, height, width), context=torch.randn(2, 4, 8))
        assert tuple(out.shape) == (2, height * width, 8)


def test_inputs_may_have_any_names_and_come_in_any_order() -> None:
    class Named(nn.Module):
        def forward(self, input: Tensor, self_: Tensor) -> Tensor:  # noqa: A002
            return torch.cat([input, self_], 1)

    given = {"self_": torch.randn(3, 5, 8), "input": torch.randn(3, 6, 8)}
    with exporter_alone():
        program = export_program(Named(), given, {"self_": AXES["context"], "input": AXES["x"]}, DIMS)
    assert program.outputs == (("batch", "context_len + x_len", 8),)


def test_two_inputs_of_one_declared_size_need_not_be_proven_equal_by_the_model() -> None:
    program = traced(Model(lambda _, x, context: (x * 2, context * 2)))
    assert program.outputs == (AXES["x"], AXES["context"])
    assert sorted(program.symbols.values()) == ["batch", "batch", "context_len", "x_len"]


# ---- what is to be tried


def test_squeeze_leaves_no_sign_so_every_declared_size_of_1_is_to_be_tried() -> None:
    module = Model(lambda _, x, __: x.squeeze(1))
    program = traced(module)
    assert (program.unsettled, program.doubts) == (("batch", "x_len", "context_len"), ())
    assert (program.outputs, module(**inputs(2, 1, 3)).ndim) == ((("batch", "x_len", 8),), 2)
    assert traced(module, dims=Dims({**DIMS, "x_len": DimRange(2, 16, 128)})).unsettled == ("batch", "context_len")


def test_a_branch_on_size_1_is_a_doubt_with_its_line() -> None:
    def one_apart(_: Model, x: Tensor, __: Tensor) -> Tensor:
        return x * 2 if x.shape[1] == 1 else x  # one apart

    (doubt,) = traced(Model(one_apart)).doubts
    assert doubt.text == (
        f"x_len 1: the model branches on x_len != 1 in {line('one apart')}; "
        "declare `--dim x_len=2:16:128`, or rewrite it for every size"
    )
    assert doubt.tries == ({"x_len": 1},)


def test_what_torch_tells_apart_for_a_computed_size_of_1_is_a_doubt_with_the_sizes_that_give_it() -> None:
    made, own, _ = CLEAN["two convs of stride 2"]
    tries = {size for doubt in traced(Model(made, **own())).doubts for size in map(str, doubt.tries)}
    assert {"{'x_len': 1}", "{'x_len': 2}", "{'context_len': 1}"} <= tries


def test_no_doubt_is_left_where_the_declared_sizes_exclude_it() -> None:
    dims = Dims(batch=DimRange(2, 2, 8), x_len=DimRange(5, 16, 128), context_len=DimRange(2, 12, 96))
    made, own, _ = CLEAN["two convs of stride 2"]
    program = traced(Model(made, **own()), dims=dims)
    assert (program.unsettled, program.doubts) == ((), ())


# ---- what does not hold


def longer(_: Model, x: Tensor, __: Tensor) -> Tensor:
    return x * 2 if x.shape[1] > 4 else x  # longer


def shorter(_: Model, x: Tensor, __: Tensor) -> Tensor:
    return x * 2 if x.shape[1] < 40 else x  # shorter


def even(_: Model, x: Tensor, __: Tensor) -> Tensor:
    if x.shape[1] % 2:  # even
        x = F.pad(x, (0, 0, 0, 1))
    return x


def thirds(_: Model, x: Tensor, __: Tensor) -> Tensor:
    assert x.shape[1] % 3 == 0  # thirds
    return x


def twos(_: Model, x: Tensor, __: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1] // 2, 16)  # twos


def apart(_: Model, x: Tensor, context: Tensor) -> Tensor:
    return x * 2 if x.shape[1] == context.shape[1] else x  # apart


def threes(_: Model, x: Tensor, __: Tensor) -> Tensor:
    return x.view(3, -1, 8)  # threes


def table(self: Model, x: Tensor, __: Tensor) -> Tensor:
    return x + self.table[: x.shape[1]]  # table


def window(self: Model, x: Tensor, __: Tensor) -> Tensor:
    return self.conv(x.mT)  # window


def halves(_: Model, x: Tensor, __: Tensor) -> Tensor:
    return x[:, : int(x.shape[1] / 2)]  # halves


def loop(_: Model, x: Tensor, __: Tensor) -> Tensor:
    return torch.stack([each.mean(0) for each in x[0]])  # loop


def count(_: Model, x: Tensor, context: Tensor) -> Tensor:
    return x / len(context[0])  # count


def whole(self: Model, x: Tensor, __: Tensor) -> Tensor:
    return x + self.whole  # whole


BY = (
    "(by int(), len() or range() of it, a loop over it, or a weight of that size); use the size as it is, or give the input "
    "that fixed size"
)
NARROW: dict[Made, str] = {
    longer: "x_len 1 to 4: the model branches on x_len > 4 in {}; declare `--dim x_len=5:16:128`, or rewrite it for every size",
    shorter: "x_len 40 to 128: the model branches on x_len < 40 in {}; "
    "declare `--dim x_len=1:16:39`, or rewrite it for every size",
    even: "x_len that is no multiple of 2: the model branches on x_len % 2 == 0 in {}; "
    "pad it to one before the model, or rewrite it for every size",
    thirds: "x_len that is no multiple of 3: the model branches on x_len % 3 == 0 in {}; "
    "pad it to one before the model, or rewrite it for every size",
    twos: "x_len that is no multiple of 2: {} works only where 8*batch*x_len == 16*batch*(x_len // 2); "
    "pad it to one before the model, or rewrite it for every size",
    apart: "context_len equal to x_len: the model branches on x_len != context_len in {}; rewrite it for equal sizes, too",
    threes: "sizes such as batch 1, x_len 1: {} works only where (8*batch*x_len) % 24 == 0; rewrite it for every size",
    table: "x_len 65 to 128: {} works only where x_len == min(64, x_len); "
    "declare `--dim x_len=1:16:64`, or rewrite it for every size",
    window: "x_len 1 to 4: {} works only where x_len >= 5; declare `--dim x_len=5:16:128`, or rewrite it for every size",
    halves: f"x_len 1 to 5 and 8 to 128: x_len // 2 became the constant 3 in {{}} {BY}",
    loop: f"x_len other than 6: x_len became the constant 6 in {{}} {BY}",
    count: f"context_len other than 5: context_len became the constant 5 in {{}} {BY}",
    whole: f"x_len other than 6: x_len became the constant 6 in {{}} {BY}",
}


def narrow(made: Made) -> Model:
    return Model(made, table=nn.Parameter(torch.randn(64, 8)), whole=nn.Parameter(torch.randn(6, 8)), conv=nn.Conv1d(8, 8, 5))


@pytest.mark.parametrize("made", NARROW, ids=lambda made: made.__name__)
def test_what_holds_for_a_part_of_the_sizes_is_told_with_the_line_and_the_way_out(made: Made) -> None:
    assert told(narrow(made)) == [NARROW[made].format(line(made.__name__))]


@pytest.mark.parametrize(
    ("made", "x_len"),
    [
        (longer, DimRange(5, 16, 128)),
        (shorter, DimRange(1, 16, 39)),
        (table, DimRange(1, 16, 64)),
        (window, DimRange(5, 16, 128)),
        (even, DimRange(8, 8, 8)),
        (loop, DimRange(6, 6, 6)),
        (whole, DimRange(6, 6, 6)),
        (halves, DimRange(6, 7, 7)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_condition_that_the_declared_sizes_meet_is_not_told(made: Made, x_len: DimRange) -> None:
    module = narrow(made)
    program = traced(module, dims=Dims({**DIMS, "x_len": x_len}))
    check_sizes(module, program, [(2, x_len.opt, 3), (3, x_len.max, 9)])


def test_of_two_names_that_must_be_one_both_are_told_with_the_line() -> None:
    def added(_: Model, x: Tensor, context: Tensor) -> Tensor:
        return x + context  # added

    assert told(Model(added), example=inputs(3, 6, 6)) == [
        f"context_len and x_len must be equal: {line('added')} works only where x_len == context_len; "
        "give both one name, or rewrite it for different sizes"
    ]
    assert refused(Model(added)) == (
        f"torch.export failed in {line('added')}: The size of tensor a (x_len) must match the size of tensor b (context_len) "
        "at non-singleton dimension 1); give two dimensions that must be equal one name"
    )


def test_the_line_is_the_models_own_where_a_library_below_it_asks() -> None:
    class Inner(nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return nn.Sequential(nn.Identity(), nn.AvgPool1d(4))(x.mT)  # inner

    (reason,) = told(Model(lambda self, x, _: self.inner(x), inner=Inner()))
    assert reason.startswith(f"x_len 1 to 3: {line('inner')} works only where x_len // 4 >= 1; ")


def test_an_example_of_size_1_that_became_a_constant_is_told() -> None:
    def row(_: Model, x: Tensor, context: Tensor) -> Tensor:
        return x @ context.mT  # row

    reasons = told(Model(row), example=inputs(3, 6, 1))
    assert f"context_len other than 1: context_len became the constant 1 in {line('row')} {BY}" in reasons


def test_all_reasons_are_told_eight_in_full() -> None:
    def thresholds(_: Model, x: Tensor, __: Tensor) -> Tensor:
        for size in range(7, 17):
            x = x if x.shape[1] * 3 > size else x * size
            x = x * (2 if x.shape[1] < 100 - size else 1)
        return x

    reasons = told(Model(thresholds))
    assert len(reasons) == 9
    assert re.fullmatch(r"and \d+ more", reasons[-1])


# ---- what no graph can be


def asks_the_data(_: Model, x: Tensor, __: Tensor) -> Tensor:
    return x * 2 if x.isnan().any() else x  # asks the data


def takes_an_item(_: Model, x: Tensor, __: Tensor) -> Tensor:
    return x * float(x.abs().max().item())  # takes an item


@pytest.mark.parametrize("made", [asks_the_data, takes_an_item])
def test_a_branch_on_data_has_its_line_and_the_way_out(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    message = refused(Model(made))
    where = line(made.__name__.replace("_", " "))
    assert message.startswith(f"torch.export failed in {where}: Could not guard on data-dependent expression ")
    assert message.endswith(
        "; a graph cannot depend on the values in a tensor: keep them tensors, with torch.where in place of if, "
        "and without .item(), .tolist(), int() or bool()"
    )
    assert capfd.readouterr() == ("", "")


def picks(_: Model, x: Tensor, __: Tensor) -> Tensor:
    return x[x[..., 0] > 0]  # picks


def finds(_: Model, x: Tensor, __: Tensor) -> Tensor:
    return (x > 0).nonzero()  # finds


@pytest.mark.parametrize("made", [picks, finds])
def test_an_output_whose_size_the_data_decide_is_refused_with_the_line(made: Made) -> None:
    assert told(Model(made)) == [
        f"output 0 has a size that depends on the data, in {line(made.__name__)}, and no engine's can; "
        "return a mask or scores of the inputs' sizes, in place of nonzero, unique or an index by a mask"
    ]


def test_a_size_inside_that_the_data_decide_is_no_business_of_the_outputs() -> None:
    module = Model(lambda _, x, __: x - x[x > 0].mean())
    check_sizes(module, traced(module), SIZES[1:])


def test_complex_numbers_are_refused_in_and_out() -> None:
    way = "hold the real and the imaginary part as two tensors"
    assert told(Model(lambda _, x, __: torch.fft.rfft(x))) == [f"output 0 is complex, and no engine gives that; {way}"]
    example = {**inputs(), "x": torch.randn(3, 6, 8, dtype=torch.complex64)}
    assert refused(Model(attend), example=example) == f"input x is complex, and no engine takes that; {way}"


def test_a_size_that_only_real_numbers_give_is_refused() -> None:
    (reason,) = told(Model(lambda _, x, __: F.interpolate(x.mT, scale_factor=0.29)))
    assert "which whole numbers do not give; round it with // in the model" in reason


def test_what_the_model_raises_is_told_with_its_line_and_the_examples_sizes() -> None:
    def raising(_: Model, x: Tensor, __: Tensor) -> Tensor:
        if x.shape[1] % 4:
            raise ValueError("the length must be a multiple of 4")  # raising
        return x

    assert refused(Model(raising)) == (
        f"{line('raising')} raised ValueError at batch 3, x_len 6, context_len 5: the length must be a multiple of 4; "
        "declare only sizes that the model takes"
    )


def test_another_error_of_torchs_has_its_line_and_names_in_place_of_symbols() -> None:
    def numpys(_: Model, x: Tensor, __: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy())  # numpys

    message = refused(Model(numpys))
    assert message.startswith(f"torch.export failed in {line('numpys')}: .numpy() is not supported")
    assert message.endswith("; use torch's operations in place of NumPy's")


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    assert refused(Model(attend, lock=threading.Lock())).startswith("the model cannot be copied for the trace: ")


# ---- what stays as it was


def test_the_model_and_the_random_numbers_stay_as_they_were() -> None:
    def counted(self: Model, x: Tensor, __: Tensor) -> Tensor:
        self.calls += 1
        return F.dropout(x, 0.5) + torch.rand_like(x) + self.norm(x.mT).mT

    module = Model(counted, calls=0, norm=nn.BatchNorm1d(8)).train()
    before, kept = torch.get_rng_state(), copy.deepcopy(module.state_dict())
    with exporter_alone():
        program = export_program(module, inputs(), AXES, DIMS)
    assert torch.equal(torch.get_rng_state(), before)
    assert (module.calls, module.training) == (0, True)
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
    assert program.exported.state_dict["norm.weight"].data_ptr() == module.norm.weight.data_ptr()


def test_torch_is_left_as_it_was_after_success_and_failure() -> None:
    from torch.export import _trace

    def state() -> list[object]:
        lstm = torch.ops.aten.lstm.input
        table = torch._decomp.decomposition_table
        return [ShapeEnv._get_sloc, "print" in vars(_trace), dict(lstm.py_kernels), table[lstm], list(warnings.filters)]

    before = state()
    traced(Model(attend))
    refused(Model(asks_the_data))
    assert state() == before


# ---- what is private to torch and read all the same


def test_torch_still_has_what_is_read_of_its_shape_environment() -> None:
    exported = traced(Model(apart), dims=Dims({**DIMS, "context_len": DimRange(200, 200, 200)})).exported
    value = next(node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder")
    env = value.fake_mode.shape_env
    assert isinstance(env, ShapeEnv)
    assert {"L['x'].size()[1]", "L['context'].size()[0]"} <= set(env.source_to_var)
    assert [str(guard.sloc.maybe_user_loc) for guard in env.guards] == [line("apart")]
    assert env.guards[0].expr.rel_op == "!="
    assert set(env.source_to_var.values()) <= set(env.var_to_range_sloc)


# ---- into an ONNX file


def test_the_onnx_exporter_names_the_dimensions_as_declared_and_keeps_any_length(tmp_path: Path) -> None:
    def both(self: Model, x: Tensor, context: Tensor) -> Tensor:
        encoded, _ = self.rnn(self.conv(x.mT).mT)
        return encoded.reshape(x.shape[0], -1, 2, 4).transpose(1, 2) @ context.unflatten(-1, (2, 4)).permute(0, 2, 3, 1)

    module = Model(both, conv=nn.Conv1d(8, 8, 3, 2, 1), rnn=nn.GRU(8, 4, batch_first=True, bidirectional=True)).eval()
    path = tmp_path / "model.onnx"
    shapes = {name: {at: axis for at, axis in enumerate(axes) if isinstance(axis, str)} for name, axes in AXES.items()}
    with exporter_alone(), any_length():
        program = export_program(module, inputs(), AXES, DIMS)
        written = torch.onnx.export(
            program.exported, dynamo=True, opset_version=18, verbose=False, input_names=[*AXES], dynamic_shapes=shapes
        )
        assert written is not None
        written.save(path)
    named = {value.name: tuple(map(str, value.shape or ())) for value in written.model.graph.inputs}
    assert named == {name: tuple(map(str, axes)) for name, axes in AXES.items()}
    (out,) = written.model.graph.outputs
    assert program.outputs == (("batch", 2, "((x_len - 1) // 2) + 1", "context_len"),)
    assert [str(size) for size in out.shape or ()] == ["batch", "2", "(((x_len - 1)//2)) + 1", "context_len"]
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in SIZES:
        (got,) = session.run(None, {name: value.numpy() for name, value in inputs(*size).items()})
        torch.testing.assert_close(torch.from_numpy(got), module(**inputs(*size)), atol=1e-5, rtol=1e-4)
