"""A ``.pt2`` file of torch.export.save, read as a module. Runs no code of the model's: the file has none."""

import inspect
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, TensorArgument
from torch.utils import _pytree as pytree

from bca_deploy.errors import InputError, first_line
from bca_deploy.programs.kept import Call, Kept, named, parameters_of
from bca_deploy.programs.pieces import Piece, called, is_training
from bca_deploy.programs.sizes import Sizes, shape_of, sizes_of
from bca_deploy.spec import INPUT_NAMES

_POSITION = "_positional_arg_"


class ExportedModel(Piece):
    """The whole model that a file holds.

    Attributes:
        sizes: what its inputs must be.
    """

    obstacle = (
        "is all of the exported program, and a bare layer needs none: save its state dict, and give it by --checkpoint without "
        "--model"
    )
    sizes: Sizes

    def __init__(
        self, source: nn.Module, own: torch.dtype, inputs: Sequence[tuple[str, Any]], exported: ExportedProgram
    ) -> None:
        super().__init__(source.graph, source, own)  # type: ignore[arg-type]
        values = {node.name: node.meta.get("val") for node in exported.graph.find_nodes(op="placeholder")}
        self._inputs = tuple(inputs)
        self._returned = exported.call_spec.out_spec
        self.sizes = sizes_of(exported, {name: shape_of(values[node]) for name, node in _tensors(exported, inputs)})

    def call(self, **given: Any) -> Any:
        """Run the model with its inputs by name, and return what it returned."""
        self.sizes.hold(given)
        found = self.run([given.get(name, constant) for name, constant in self._inputs])
        return pytree.tree_unflatten(found, self._returned)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights by the model's names; a module that is called twice shares them with itself."""
        if strict and (odd := set(state_dict) ^ set(self.state_dict())):
            raise RuntimeError(f"keys do not fit: {', '.join(sorted(odd))}")
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def read(path: Path) -> ExportedModel:
    """Return the model of a ``.pt2`` file, to be used as a live one.

    Its layers are the modules whose calls it has kept (``preserve_module_call_signature``); others have an ``obstacle``. Its
    weights have the model's names, and its inputs those of the model's forward. torch reads the file by pickle.

    Raises:
        InputError: it is no such file, was exported in training mode, or takes what is no tensor.
    """
    with warnings.catch_warnings(action="ignore"):  # torch warns of what it does itself
        return _read(path, _loaded(path))


def _read(path: Path, exported: ExportedProgram) -> ExportedModel:
    _set_apart(exported)
    inputs = _inputs_of(path, exported)
    if is_training(exported.graph):
        raise InputError(f"--model {path}: it was exported in training mode; export it after model.eval()")
    own, whole = _own(exported), torch.export.unflatten(exported)
    _Builder(path, exported, own).build(whole)
    kind = called(ExportedModel, whole.type_name(), {name: inspect.Parameter.empty for name, _ in _tensors(exported, inputs)})
    return kind(whole, own, inputs, exported).eval()  # type: ignore[return-value, arg-type, call-arg]


def _loaded(path: Path) -> ExportedProgram:
    if not path.is_file():
        raise InputError(f"--model: {path} does not exist or is not a file; check the path")
    advice = "a file of torch.export.save is needed, by this version of torch or an older one"
    if not zipfile.is_zipfile(path):
        raise InputError(f"--model {path}: it is no .pt2 file; {advice}")
    try:
        return torch.export.load(path)
    except Exception as error:  # torch raises what it likes
        said = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"--model {path}: torch.export.load cannot read it ({said}); {advice}") from error


def _set_apart(exported: ExportedProgram) -> None:
    """Give the model's inputs names that no argument inside has: torch's unflatten takes one for the other."""
    user_inputs = set(exported.graph_signature.user_inputs)
    placeholders = [node for node in exported.graph.find_nodes(op="placeholder") if node.name in user_inputs]
    new: dict[str, str] = {}
    for node in placeholders:
        old = node.name
        node._rename(f"input_of_model_{old}")
        node.target = new[old] = node.name
    specs = (*exported.graph_signature.input_specs, *exported.graph_signature.output_specs)
    calls = [entry.signature for entry in exported.module_call_graph if entry.signature]
    for argument in (*(spec.arg for spec in specs), *(arg for call in calls for arg in (*call.inputs, *call.outputs))):
        argument.name = new.get(argument.name, argument.name)


def _own(exported: ExportedProgram) -> torch.dtype:
    """Return the precision of the weights; float32 where they have several, or none."""
    found = {tensor.dtype for tensor in exported.state_dict.values() if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 else torch.float32


def _inputs_of(path: Path, exported: ExportedProgram) -> list[tuple[str, Any]]:
    """Return the arguments of forward in the program's order, each with what it has in place of a tensor."""
    signature = exported.module_call_graph[0].signature
    assert signature is not None  # noqa: S101  (the model's own always is there)
    names = _flat_names(signature.in_spec, signature.forward_arg_names)
    if names is None:
        raise InputError(f"--model {path}: its forward takes lists or dicts of tensors; export a wrapper that takes tensors")
    found = []
    for name, spec in zip(names, _user_inputs(exported), strict=True):
        if not isinstance(spec, TensorArgument | ConstantArgument):
            raise InputError(f"--model {path}: its forward takes a number, {name}; export a wrapper that takes tensors alone")
        found.append((name, spec.value if isinstance(spec, ConstantArgument) else None))
    return found


def _user_inputs(exported: ExportedProgram) -> list[Any]:
    return [spec.arg for spec in exported.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]


def _tensors(exported: ExportedProgram, inputs: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Return the tensors among the arguments, each with its node's name."""
    pairs = zip(inputs, _user_inputs(exported), strict=True)
    return [(name, spec.name) for (name, _), spec in pairs if isinstance(spec, TensorArgument)]


def _flat_names(spec: pytree.TreeSpec, names: Sequence[str] | None) -> list[str] | None:
    """Return the names of a call's arguments; None where they are not plain values."""
    args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    if not all(isinstance(value, int) for value in (*args, *kwargs.values())):
        return None
    return named(len(args), list(kwargs), names)


class _Builder:
    """Makes pieces of the modules of an unflattened program, in their places.

    Args:
        path: of the file.
        exported: the program.
        own: its precision.
    """

    def __init__(self, path: Path, exported: ExportedProgram, own: torch.dtype) -> None:
        self._path, self._own = path, own
        self._signatures = {entry.fqn: entry.signature for entry in exported.module_call_graph if entry.fqn and entry.signature}
        self._values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
        self._made: dict[int, nn.Module] = {}

    def build(self, module: nn.Module, path: str = "") -> None:
        """Put pieces in the place of everything below a module, the innermost first."""
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = self._piece(child, module, f"{path}.{name}".lstrip("."))

    def _piece(self, module: nn.Module, parent: nn.Module, path: str) -> nn.Module:
        if id(module) not in self._made:
            if path in self._signatures:
                self._made[id(module)] = self._kept(module, parent, path)
            else:
                self.build(module, path)
                self._made[id(module)] = self._plain(module, path)
        return self._made[id(module)]

    def _plain(self, module: nn.Module, path: str) -> nn.Module:
        if not isinstance(graph := getattr(module, "graph", None), fx.Graph) or isinstance(module, fx.GraphModule):
            return module
        piece = Piece(graph, module, self._own)
        piece.obstacle = (
            "is not called as it was written: .pt2 files must be saved with preserve_module_call_signature for the layers, "
            f'torch.export.export(..., preserve_module_call_signature=("{path}",)); or give the code that made it, --model '
            "pkg.module:factory"
        )
        return piece

    def _kept(self, module: nn.Module, parent: nn.Module, path: str) -> nn.Module:
        modules = getattr(module, "_call_modules", [module])
        numbers = [path, *(f"{path}@{number}" for number in range(1, len(modules)))]
        nodes = [node for node in parent.graph.nodes if node.op == "call_module" and node.target == path.rpartition(".")[2]]  # type: ignore[union-attr]
        if len(nodes) != len(modules) or any(_flat_names(s.in_spec, None) is None for s in map(self._signature, numbers)):
            raise InputError(
                f"--model {self._path}: {path} is called from several places, or with lists or dicts; save the file with "
                "preserve_module_call_signature for the layers alone"
            )
        for each in modules:
            self.build(each, path)
        calls = [self._call(each, self._signature(number)) for each, number in zip(modules, numbers, strict=True)]
        for number, (node, call) in enumerate(zip(nodes, calls, strict=True)):
            _call_by_name(node, number, call)
        kind = called(Kept, module.type_name(), parameters_of(calls))  # type: ignore[operator]
        return kind(calls, modules[0], self._own)  # type: ignore[arg-type]

    def _signature(self, number: str) -> Any:
        return self._signatures[number]

    def _call(self, module: nn.Module, signature: Any) -> Call:
        names = _flat_names(signature.in_spec, signature.forward_arg_names) or []
        args, _ = pytree.tree_unflatten(list(range(len(names))), signature.in_spec)
        known = {f"{_POSITION}{at}" if at < len(args) else name: name for at, name in enumerate(names)}
        placeholders = module.graph.find_nodes(op="placeholder")  # type: ignore[union-attr, operator]
        outside = [node.meta.get("val") for node in placeholders if node.target not in known]
        given = dict(zip(names, signature.inputs, strict=True))
        tensors = {name: shape_of(self._values[a.name]) for name, a in given.items() if isinstance(a, TensorArgument)}
        return Call(
            piece=Piece(module.graph, module, self._own),  # type: ignore[arg-type]
            order=tuple(known.get(str(node.target), "") for node in placeholders),
            shapes={name: tensors[name] for name in sorted(tensors, key=_sequences_first)},
            constants={name: a.value for name, a in given.items() if isinstance(a, ConstantArgument)},
            outside=tuple(shape_of(value) if isinstance(value, torch.Tensor) else None for value in outside),
        )


def _sequences_first(name: str) -> int:
    return INPUT_NAMES.index(name) if name in INPUT_NAMES[:2] else len(INPUT_NAMES)


def _call_by_name(node: fx.Node, number: int, call: Call) -> None:
    """Have a program call a kept module by the names of its arguments."""
    values = dict(_placed(node, call.order))
    given = {name: values[name] for name in call.shapes}
    maps = {"return_attn": True} if call.constants.get("return_attn") is True else {}
    outside = [value for name, value in _placed(node, call.order) if not name]
    node.args, node.kwargs = (), {**given, **maps, "outside": (number, outside)}


def _placed(node: fx.Node, order: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for at, name in enumerate(order):
        yield name, node.args[at] if at < len(node.args) else node.kwargs[name]
