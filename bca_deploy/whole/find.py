"""Every bidirectional cross-attention inside a model: found by its parameters, accepted by what it does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from bca_deploy.errors import CheckpointError, InputError, ParityError, first_line, nearest
from bca_deploy.families import FAMILIES
from bca_deploy.layers.checkpoint import Checkpoint, from_module
from bca_deploy.layers.relatives import family_of
from bca_deploy.programs.pieces import Piece
from bca_deploy.whole.calls import Call, call_of, takes
from bca_deploy.whole.proof import Proof, check

# What a transformer has in its first block.
_IN_FIRST_BLOCK = {f"layers.0.0.{name}.weight" for name in FAMILIES["seed"].projections}
_LOOKED_FOR = "; ".join(f"{row.title} ({', '.join(row.projections)})" for row in FAMILIES.values())


@dataclass(frozen=True)
class Found:
    """A layer of a model.

    Attributes:
        path: its name in the model; empty where the model is the layer.
        checkpoint: its specification and weights.
        call: how its forward is called.
        proof: that it is the function that its weights say.
    """

    path: str
    checkpoint: Checkpoint
    call: Call
    proof: Proof


def find(model: nn.Module, keep_literal: Sequence[str] = (), allow_none: bool = False) -> tuple[Found, ...]:
    """Return the layers of a model, each proven; the model is not changed.

    Args:
        model: any module.
        keep_literal: paths of candidates to leave as they are.
        allow_none: accept a model without any.

    Raises:
        CheckpointError: there is none; or what looks like one is another, is parametrised or quantised.
        ParityError: what looks like one does something else; with the first case.
        InputError: a path of ``keep_literal`` leads to no candidate.
    """
    paths = list(_candidates(model))
    for path in keep_literal:
        if path not in paths:
            raise InputError(
                f"--keep-literal {path}: no layer is there{nearest(path, paths)}; found: {', '.join(paths) or 'none'}"
            )
    found = tuple(_proven(model, path) for path in paths if path not in keep_literal)
    if not paths and not allow_none:
        raise CheckpointError(
            f"no bidirectional cross-attention in this {type(model).__name__}: looked for a module with the linear "
            f"layers of {_LOOKED_FOR}, or a transformer of the first; --allow-none exports the model as it is"
        )
    return found


def _candidates(model: nn.Module) -> Iterator[str]:
    """Yield the paths of the outermost modules that have the parameters of a layer or of a transformer, each object once."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(outer == "" or path.startswith(f"{outer}.") for outer in inside) or not _looks_right(module):
            continue
        inside.append(path)
        yield path


def _looks_right(module: nn.Module) -> bool:
    return family_of(module) is not None or _tensors(module) >= _IN_FIRST_BLOCK


def _tensors(module: nn.Module) -> set[str]:
    """Return every name of every parameter and buffer: both sides of a layer may share one."""
    both = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return {name for tensors in both for name, _ in tensors}


def _check_plain(path: str, module: nn.Module) -> None:
    if isinstance(module, Piece) and module.obstacle:
        way_out = f"; or keep it as it is: --keep-literal {path}" if path else ""
        raise CheckpointError(f"{_shown(path)} {module.obstacle}{way_out}")
    has = _tensors(module)
    for name in (family_of(module) or FAMILIES["seed"]).projections:
        if hasattr(module, name) and f"{name}.weight" not in has:  # a transformer has them further inside
            kind = type(module.get_submodule(name)).__name__
            raise CheckpointError(
                f"{_shown(path)}.{name} is a {kind} without a plain weight, parametrised, quantised or adapted; merge it first "
                "(torch.nn.utils.parametrize.remove_parametrizations, or merge_and_unload of an adapter), or keep the layer as "
                f"it is: --keep-literal {path}"
            )


def _proven(model: nn.Module, path: str) -> Found:
    module = model.get_submodule(path)
    _check_plain(path, module)
    way_out = f"; --keep-literal {path} exports it as it is" if path else ""
    try:
        checkpoint = from_module(module)
        call = call_of(module, checkpoint.spec.kin)
        interface = takes(call, checkpoint.spec)
        proof = check(module, checkpoint, interface)
    except ParityError as error:
        raise ParityError(f"{_shown(path)}: {error}{way_out}") from None
    except (CheckpointError, InputError) as error:
        raise CheckpointError(f"{_shown(path)} looks like the layer and is not: {first_line(error)}{way_out}") from error
    return Found(path, checkpoint, call, proof)


def _shown(path: str) -> str:
    return path or "the model"
