"""A module of an exported program, which runs its part of the graph in any precision."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from bca_deploy.spec import NORM_EPS

# They name the dtype of the file's own precision.
_CHECKS_OF_DTYPE = {torch.ops.aten._assert_tensor_metadata.default}
# The functions that whoever runs a model looks for.
_AS_WRITTEN: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.linear.default: functional.linear,
    torch.ops.aten.scaled_dot_product_attention.default: functional.scaled_dot_product_attention,
}
# What a later call of a module is called in a program, behind the module's name.
_CALL = "@"


class Piece(nn.Module):
    """One module, whatever its class was; paths, weights and names of weights are the model's.

    A program says float32 where the model may have said "as my weights". So the file's own precision, and its lowest and
    largest number, are those that the module has now.

    Args:
        graph: its part.
        source: has its weights, constants and modules.
        own: the precision that the program was exported in.
    """

    #: Why it can be no layer, in words that follow its name; empty where it can.
    obstacle = ""

    def __init__(self, graph: fx.Graph, source: nn.Module, own: torch.dtype) -> None:
        super().__init__()
        self.graph, self._own, self._now = graph, own, own
        for name, tensor in source._parameters.items():
            self.register_parameter(name, tensor)
        for name, buffer in source._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)
        for name, child in source._modules.items():
            self.add_module(name, child)
        for node in graph.find_nodes(op="get_attr"):
            self._take(str(node.target), source)
        _rewrite(graph)
        if (eps := _eps(graph)) is not None:
            self.eps = eps

    def _take(self, name: str, source: nn.Module) -> None:
        """Take a constant from the module that has it."""
        if "." in name or hasattr(self, name):
            return
        value = getattr(source, name)
        if isinstance(value, Tensor):
            self.register_buffer(name, value, persistent=False)
        else:
            setattr(self, name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Piece":
        """Move to another precision."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._now = fn(torch.empty(0, dtype=self._now)).dtype
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's weights; a module that it calls twice has them once."""
        found = super().state_dict(*args, **kwargs)
        for name in [name for name in found if _CALL in name]:
            del found[name]
        return found

    def run(self, inputs: Sequence[Any]) -> Any:
        """Run the graph with what its placeholders stand for, in order."""
        return _Runner(self, self._own, self._now).run(*inputs, enable_io_processing=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run as the program calls it: by place, then by the names of placeholders."""
        names = [str(node.target) for node in self.graph.find_nodes(op="placeholder")]
        return self.run([*args, *(kwargs[name] for name in names[len(args) :])])


class _Runner(fx.Interpreter):
    """Runs a graph that was exported in one precision in another."""

    def __init__(self, piece: Piece, own: torch.dtype, now: torch.dtype) -> None:
        super().__init__(piece, graph=piece.graph)
        self.extra_traceback = False  # it would quote the user's source
        was, new = torch.finfo(own), torch.finfo(now)
        self._same = own == now
        self._meant = {own: now, was.min: new.min, was.max: new.max}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._same:
            args, kwargs = pytree.tree_map(self._as_meant, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def _as_meant(self, value: Any) -> Any:
        return self._meant.get(value, value) if isinstance(value, torch.dtype | float) else value


def _rewrite(graph: fx.Graph) -> None:
    """Leave of the graph what computes, without its record of the user's files."""
    for node in list(graph.nodes):
        if node.target in _CHECKS_OF_DTYPE and not node.users:
            graph.erase_node(node)
            continue
        node.target = _AS_WRITTEN.get(node.target, node.target) if node.op == "call_function" else node.target
        node.meta = {}
        if _argument(node, "eps", ()) is None:  # of an RMSNorm: it would follow the precision
            _set_argument(node, "eps", NORM_EPS["rms"])


def _eps(graph: fx.Graph) -> float | None:
    found = (_argument(node, "eps", None) for node in graph.nodes)
    return next((float(eps) for eps in found if eps is not None), None)


def is_training(graph: fx.Graph) -> bool:
    """Whether a part of a program does what it does only while a model is trained."""
    return any(_argument(node, name, False) is True for node in graph.nodes for name in ("train", "training"))


def _argument(node: fx.Node, name: str, absent: Any) -> Any:
    """Return what an operator of a graph is given by this name of its schema."""
    arguments = _schema(node)
    if name not in arguments:
        return absent
    at = arguments.index(name)
    return node.args[at] if at < len(node.args) else node.kwargs.get(name, absent if name != "eps" else None)


def _set_argument(node: fx.Node, name: str, value: Any) -> None:
    at = _schema(node).index(name)
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)


def _schema(node: fx.Node) -> list[str]:
    return [argument.name for argument in node.target._schema.arguments] if hasattr(node.target, "_schema") else []


def called(kind: type[Piece], name: str | None, parameters: Mapping[str, Any]) -> type[Piece]:
    """Return a kind of piece that is called by these names, as the model's class is called.

    Args:
        kind: has the forward, which takes keywords alone.
        name: of the model's class, with its module's.
        parameters: with their defaults; ``inspect.Parameter.empty`` where there is none.
    """
    plain = (name or "").rpartition(".")[2]

    def forward(self: Any, **given: Any) -> Any:
        return self.call(**given)

    kinds = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    kinds += [inspect.Parameter(p, inspect.Parameter.KEYWORD_ONLY, default=default) for p, default in parameters.items()]
    forward.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
    return type(plain if plain.isidentifier() else "Program", (kind,), {"forward": forward})
