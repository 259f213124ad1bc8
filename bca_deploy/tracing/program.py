"""torch.export of a module, and everything that it narrowed told in plain words before anything is written.

Ensures of every program: it is the model at all of the declared sizes, but for what :class:`Program` says is to be tried; the
sizes of its outputs follow from the declared dimensions alone. The one call of torch.export is here.
"""

import contextlib
import copy
import inspect
import re
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from bca_deploy.errors import ExportError, first_line
from bca_deploy.signature import Axis, Dims
from bca_deploy.tracing.narrowing import Condition, Narrowing, axis, narrowings, symbol

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# The axes of each input; for torch's symbols of sizes, those of the dimensions.
_Axes = Mapping[str, tuple[Axis, ...]]
_Names = Mapping[sympy.Symbol, sympy.Symbol]

_TOLD = 8

# Code that is not the model's: what stands below it is asked on its behalf.
_LIBRARIES = {"torch", "sympy", "einops", "bca_deploy"}
_STANDARD = sysconfig.get_path("stdlib")
# Where torch turns a size into a number or a truth, for whoever asks.
_SIZES = re.compile(r"(torch|torch\.fx\.experimental\..*|torch\._logging.*|torch\.utils\._stats)\Z")

_RNNS_WARN = re.compile("The tensor attributes? self")

_WAYS_OUT = (
    (
        "data-dependent|unbacked|DataDependent",
        "a graph cannot depend on the values in a tensor: keep them tensors, with torch.where in place of if, "
        "and without .item(), .tolist(), int() or bool()",
    ),
    ("must match", "give two dimensions that must be equal one name"),
    ("numpy", "use torch's operations in place of NumPy's"),
    ("[Cc]omplex", "hold the real and the imaginary part as two tensors"),
    ("", "run with -v to see its log"),
)


@dataclass(frozen=True)
class Program:
    """A module as torch.export traced it, and the sizes that it holds for.

    Attributes:
        exported: what torch.export made; its inputs are the example's, by name.
        outputs: of each tensor that the module returns, in order, the axes: a number, a declared dimension, or an
            expression of those in Python's arithmetic, such as ``x_len // 2``.
        symbols: for torch's own names of sizes, such as ``s77``, the declared dimension.
        unsettled: the dimensions whose declared sizes include 1. It must be tried of each and of all at once, against PyTorch:
            torch traces as if no size were 1, and ``squeeze`` and broadcasting leave no sign that they would differ.
        doubts: what else must be tried, at the sizes in each one's ``tries``: where it fails, the ``text`` says why.
    """

    exported: "ExportedProgram"
    outputs: tuple[tuple[Axis, ...], ...]
    symbols: Mapping[str, str]
    unsettled: tuple[str, ...]
    doubts: tuple[Narrowing, ...]


def export_program(module: nn.Module, inputs: Mapping[str, Tensor], axes: _Axes, dims: Dims) -> Program:
    """Trace the module, and refuse what holds for only a part of the declared sizes.

    The caller holds :func:`bca_deploy.layers.isolation.exporter_alone`, whose lock cannot be taken twice. The module and the
    random numbers stay as they are; the program shares the module's weights.

    Args:
        module: in the mode that it is to be traced in.
        inputs: an example by the names of forward's arguments. Give each dimension another size, none of them 1.
        axes: for each input a number where the size is fixed, or the name of a declared dimension; one name is one size.
        dims: the declared dimensions and their ranges.

    Raises:
        ExportError: torch.export failed, an output's size depends on the data, or the trace holds for only some declared
            sizes; each reason with the dimension by its name, the line of the model's code, and what to do.
    """
    if known := [name for name, tensor in inputs.items() if tensor.is_complex()]:
        raise ExportError(f"input {known[0]} is complex, and no engine takes that; {_way_out('complex')}")
    exported = _traced(_copied(module), inputs, axes)
    env = _shape_env(exported)
    names = _names(env, axes)
    found = narrowings(_conditions(exported, env, names, axes), dims)
    outputs, problems = _outputs(exported, env, names, dims)
    problems = [*(each.text for each in found if not each.doubtful), *problems]
    if problems:
        raise ExportError(_listed(problems, dims))
    symbols = {str(old): str(new) for old, new in names.items()}
    unsettled = tuple(name for name, size in dims.items() if size.min == 1)
    return Program(exported, outputs, symbols, unsettled, tuple(found))


def _copied(module: nn.Module) -> nn.Module:
    """Copy everything but the weights: a trace may set attributes, and torch's own RNNs keep what they were traced with."""
    try:
        return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    except Exception as error:
        raise ExportError(f"the model cannot be copied for the trace: {first_line(error)}") from error


def _listed(problems: list[str], dims: Dims) -> str:
    more = [f"and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else []
    lines = "".join(f"\n- {each}" for each in [*problems[:_TOLD], *more])
    return f"the trace is not the model at every declared size ({dims}):{lines}"


# ---- the trace


def _traced(module: nn.Module, inputs: Mapping[str, Tensor], axes: _Axes) -> "ExportedProgram":
    import torch._dynamo.config as settings  # here: importing it changes the process
    import torch.fx.experimental._config as sizes

    # AUTO and not DYNAMIC, which is the same but gives up at the first size that becomes a constant.
    dynamic = {
        name: {at: torch.export.Dim.AUTO for at, each in enumerate(axes[name]) if isinstance(each, str)} for name in inputs
    }
    with (
        _watched() as seen,
        any_length(),
        _silent(),
        sizes.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
        settings.patch(fake_tensor_cache_enabled=False),
    ):
        try:
            return torch.export.export(module, (), dict(inputs), dynamic_shapes=dynamic, strict=False)
        except Exception as error:  # it raises what it likes, and what the model raises
            names = _names(seen[0], axes) if seen else {}
            raise ExportError(_failure(error, inputs, axes, names)) from error


@contextlib.contextmanager
def any_length() -> Iterator[None]:
    """Let torch know an LSTM's or a GRU's sizes from its inputs alone: it runs them step by step, and so fixes the length.

    Held by :func:`export_program`, and by whoever gives the program to torch.onnx.export, which computes all sizes again.
    """
    from torch._decomp import decomposition_table

    keys, aten = torch._C.DispatchKey, torch.ops.aten
    before = {op: (dict(op.py_kernels), decomposition_table[op]) for op in (aten.lstm.input, aten.gru.input)}
    try:
        for op, (_, steps) in before.items():
            decomposition_table[op] = sized = _here(_sized, steps)
            _set_kernels(op, {keys.CompositeImplicitAutograd: sized, keys.Autograd: sized})
        yield
    finally:
        for op, (kernels, steps) in before.items():
            decomposition_table[op] = steps
            _set_kernels(op, kernels)


def _here(made: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is ``made`` on this thread alone: another may be compiling a model of its own."""
    thread = threading.get_ident()

    def chosen(*args: Any) -> Any:
        return (made if threading.get_ident() == thread else elsewhere)(*args)

    return chosen


def _set_kernels(op: Any, kernels: Mapping[Any, Any]) -> None:
    op.py_kernels.clear()
    op.py_kernels.update(kernels)
    op._dispatch_cache.clear()  # it holds what was there before


def _sized(x: Tensor, state: Tensor | list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    """Return an output [.., .., directions * features] and the last states, of the right sizes; args as aten's, from params."""
    states = [state] if isinstance(state, Tensor) else state
    directions = 2 if args[5] else 1
    return x.new_empty([*x.shape[:-1], directions * states[0].shape[-1]]), *(torch.empty_like(each) for each in states)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep torch.export from warning in the model's name of what torch's own RNNs do, and from printing half a graph.

    The one ``print`` of its module, for when it fails, is shadowed.
    """
    from torch.export import _trace

    entry = ("ignore", _RNNS_WARN, Warning, None, 0)
    names, filters = vars(_trace), cast("list[object]", warnings.filters)
    names["print"] = lambda *_, **__: None
    filters.insert(0, entry)
    try:
        yield
    finally:
        del names["print"]
        with contextlib.suppress(ValueError):  # another thread's catch_warnings has put back its own list
            filters.remove(entry)


def _failure(error: Exception, inputs: Mapping[str, Tensor], axes: _Axes, names: _Names) -> str:
    """Say what failed where, and the way out."""
    frames = list(traceback.walk_tb(error.__traceback__))
    where = next((_line(frame, line) for frame, line in reversed(frames) if _is_models(frame)), "")
    known = {str(old): str(new) for old, new in names.items()}
    said = re.sub(r"\bs\d+\b", lambda match: known.get(match[0], match[0]), first_line(error))
    said = re.sub(r"\s*\((unhinted|Size-like)[^)]*\)+\.?|\.\Z", "", said)
    if frames and _is_models(frames[-1][0]):
        sizes = {each: size for name in inputs for each, size in zip(axes[name], inputs[name].shape, strict=True)}
        example = ", ".join(f"{name} {size}" for name, size in sizes.items() if isinstance(name, str))
        return f"{where} raised {type(error).__name__} at {example}: {said}; declare only sizes that the model takes"
    return f"torch.export failed{f' in {where}' if where else ''}: {said}; {_way_out(f'{type(error).__name__} {error}')}"


def _way_out(said: str) -> str:
    return next(way for pattern, way in _WAYS_OUT if re.search(pattern, said))


# ---- the line of the model's code


@contextlib.contextmanager
def _watched() -> Iterator[list[Any]]:
    """Have torch note the model's own line with every condition and every size: by itself it mostly notes one of its own.

    Yields:
        The shape environment that was last at work, if any was.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    plain = getattr(ShapeEnv, "_get_sloc", None)
    seen: list[Any] = []

    def noting(env: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(env, *args, **kwargs)  # type: ignore[misc]
        line, asked = _models_line(inspect.currentframe())
        if not line:  # of another thread's compiler, or of none of the model's
            return found
        seen[:] = [env]
        return replace(found, framework_loc=line if asked else "torch", maybe_user_loc=line)

    if plain is not None:
        ShapeEnv._get_sloc = noting  # type: ignore[method-assign, assignment]
    try:
        yield seen
    finally:
        if plain is not None:
            ShapeEnv._get_sloc = plain  # type: ignore[method-assign]


def _models_line(frame: FrameType | None) -> tuple[str, bool]:
    """Return the innermost line of the model's code, and whether it asks for the size itself; empty outside of our trace."""
    line, asked = "", True
    while frame is not None and frame.f_code is not _traced.__code__:
        if not line and _is_models(frame):
            line = _line(frame, frame.f_lineno)
        elif not line:
            asked = asked and _turns_sizes(frame)
        frame = frame.f_back
    return (line, asked) if frame is not None else ("", False)


def _is_models(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__")  # generated code has none
    return isinstance(name, str) and name.partition(".")[0] not in _LIBRARIES and not _is_standard(frame)


def _is_standard(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith("<frozen") or (file.startswith(_STANDARD) and "site-packages" not in file)


def _turns_sizes(frame: FrameType) -> bool:
    return frame.f_globals is globals() or bool(_SIZES.match(frame.f_globals.get("__name__", ""))) or _is_standard(frame)


def _line(frame: FrameType, line: int | None) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{line}"


# ---- what torch noted


def _shape_env(exported: "ExportedProgram") -> Any:
    """Return what holds torch's conditions on sizes; it outlives the trace in the example tensors of the graph."""
    values = (node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder")
    return next(mode.shape_env for value in values if (mode := getattr(value, "fake_mode", None)) is not None)


def _names(env: Any, axes: _Axes) -> dict[sympy.Symbol, sympy.Symbol]:
    """Return for each of torch's symbols that of the dimension it was made for."""
    places = {f"L[{name!r}].size()[{at}]": each for name, all_ in axes.items() for at, each in enumerate(all_)}
    return {old: symbol(str(places[place])) for place, old in env.source_to_var.items() if isinstance(places.get(place), str)}


def _conditions(exported: "ExportedProgram", env: Any, names: _Names, axes: _Axes) -> Iterator[Condition]:
    """Yield what torch took for granted; that with a line comes first."""
    for guard in env.guards:
        where = guard.sloc.maybe_user_loc or ""
        yield Condition(guard.expr.xreplace(names), where, bool(where) and guard.sloc.framework_loc == where)
    for old, size in exported.range_constraints.items():
        yield Condition(sympy.Ge(old, size.lower).xreplace(names))
        if isinstance(size.upper, sympy.Integer):  # torch's infinity is none
            yield Condition(sympy.Le(old, size.upper).xreplace(names))
    for name, shape in _traced_shapes(exported).items():
        for each, size in zip(axes[name], shape, strict=True):
            if isinstance(each, str):
                yield Condition(sympy.Eq(symbol(each), _size(size).xreplace(names)))


def _traced_shapes(exported: "ExportedProgram") -> dict[str, torch.Size]:
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    _, named = exported.example_inputs
    return {name: nodes[node].meta["val"].shape for name, node in zip(named, exported.graph_signature.user_inputs, strict=True)}


def _size(size: int | torch.SymInt) -> sympy.Basic:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _outputs(
    exported: "ExportedProgram", env: Any, names: _Names, dims: Dims
) -> tuple[tuple[tuple[Axis, ...], ...], list[str]]:
    """Return the axes of the tensors that come out, and why some cannot be written."""
    last = next(node for node in reversed(exported.graph.nodes) if node.op == "output")
    returned = zip(last.args[0], exported.graph_signature.output_specs, strict=True)
    values = [getattr(node, "meta", {}).get("val") for node, spec in returned if spec.kind.name == "USER_OUTPUT"]
    outputs, problems = [], []
    for at, value in enumerate(value for value in values if isinstance(value, Tensor)):
        sizes = [_size(size).xreplace(names) for size in value.shape]
        written = [None if _of_data(size, dims) else axis(size, dims) for size in sizes]
        outputs.append(tuple(each for each in written if each is not None))
        if value.is_complex():
            problems.append(f"output {at} is complex, and no engine gives that; {_way_out('complex')}")
        problems += [_unwritten(at, size, env, dims) for size, each in zip(sizes, written, strict=True) if each is None]
    return tuple(outputs), problems


def _of_data(size: sympy.Basic, dims: Dims) -> list[sympy.Basic]:
    return [each for each in size.free_symbols if str(each) not in dims]


def _unwritten(at: int, size: sympy.Basic, env: Any, dims: Dims) -> str:
    if not (of_data := _of_data(size, dims)):
        return f"output {at} has the size {size}, which whole numbers do not give; round it with // in the model"
    noted = env.var_to_range_sloc.get(of_data[0])
    where = noted and noted.lower.maybe_user_loc
    return (
        f"output {at} has a size that depends on the data{f', in {where}' if where else ''}, and no engine's can; "
        "return a mask or scores of the inputs' sizes, in place of nonzero, unique or an index by a mask"
    )
