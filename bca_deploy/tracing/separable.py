"""A mask of pairs that was made of one mask for each side gives the sides back without its ever being formed.

Some models hand their layers ``mask0[:, :, None] & mask1[:, None, :]``, as large as an attention map. What a lowered layer asks
of it is ``any`` along an axis, and along an axis where one factor has size 1 that is the factor and ``any`` of the other.
"""

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_ATEN = torch.ops.aten
_ANDS = {_ATEN.__and__.Tensor, _ATEN.bitwise_and.Tensor, _ATEN.logical_and.default, operator.and_}


def separate(exported: "ExportedProgram") -> None:
    """Rewrite every ``any`` along one axis of such a mask in a program; the result is the same."""
    graph = exported.graph
    for node in [node for node in graph.nodes if node.target == _ATEN.any.dim]:
        mask, axis, *kept = node.args
        if kept and kept[0]:
            continue
        with graph.inserting_before(node):
            found = _any(graph, mask, axis % _rank(mask))
        if found is not None:
            node.replace_all_uses_with(found)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


def _any(graph: fx.Graph, mask: fx.Node, axis: int) -> fx.Node | None:
    """Return ``any`` of a mask along an axis from its factors; None where it is no product of such."""
    if mask.target in _ANDS:
        one, other = (arg for arg in mask.args if isinstance(arg, fx.Node))
        if _rank(one) != _rank(other):
            return None
        for constant, varied in ((one, other), (other, one)):
            if _size(constant, axis) == 1:
                rest = _any(graph, varied, axis) or _made(graph, _ATEN.any.dim, varied, axis)
                return _made(graph, _ATEN.bitwise_and.Tensor, _made(graph, _ATEN.squeeze.dim, constant, axis), rest)
        return None
    return _behind(graph, mask, axis)


def _behind(graph: fx.Graph, mask: fx.Node, axis: int) -> fx.Node | None:
    """Look behind what only moves a mask's axes: a new one of size 1, the only entry of one, or the same shape once more."""
    source = mask.args[0] if mask.args else None
    if not isinstance(source, fx.Node):
        return None
    if mask.target == _ATEN.unsqueeze.default:
        at = int(mask.args[1]) % _rank(mask)  # type: ignore[arg-type]
        found = None if at == axis else _any(graph, source, axis - (at < axis))
        return found and _made(graph, _ATEN.unsqueeze.default, found, at - (axis < at))
    if mask.target == _ATEN.select.int and _size(source, int(mask.args[1])) == 1:  # type: ignore[arg-type]
        at = int(mask.args[1])  # type: ignore[arg-type]
        found = _any(graph, source, axis + (at <= axis))
        return found and _made(graph, _ATEN.squeeze.dim, found, at - (axis + (at <= axis) < at))
    if mask.target in (_ATEN.expand.default, _ATEN.slice.Tensor, _ATEN.alias.default) and _said(source) == _said(mask):
        return _any(graph, source, axis)
    return None


def _made(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    node.meta["val"] = target(*values)
    return node


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _said(node: fx.Node) -> list[str]:
    """Return the shape in words: to compare sizes themselves is to ask for them."""
    return [str(size) for size in _shape(node)]


def _rank(node: fx.Node) -> int:
    return len(_shape(node))


def _size(node: fx.Node, axis: int) -> Any:
    size = _shape(node)[axis]
    return size if isinstance(size, int) else None
