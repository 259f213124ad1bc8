"""The proof that a live module, as its user has it, is the layer that its weights look like."""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bca_deploy.errors import CheckpointError, ParityError, first_line
from bca_deploy.families import Family
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.isolation import one_thread
from bca_deploy.parity import user_sample
from bca_deploy.parity.cases import Case, make_inputs
from bca_deploy.parity.truth import live_rows, run_module, true_outputs
from bca_deploy.programs.kept import Kept
from bca_deploy.signature import Dims
from bca_deploy.spec import INPUT_NAMES, MASK_NAMES, NORM_EPS, Interface, LayerSpec
from bca_deploy.whole.calls import Call, call_of, takes

Arrays = dict[str, NDArray[Any]]

# The largest |logit| of a case is about this. Nearly uniform attention hides much, and only steep logits tell a fill of -10000
# from the lowest number; they do where all live logits are one number and all dead ones its opposite.
_LEVELS = ((1.0, False), (30.0, False), (2e4, False), (1e5, True))
# Four rows for the ways to be dead. Opposed rows have one logit for each head, and only negative ones tell: so many logits.
_BATCH, _OPPOSED_LOGITS = 4, 32
_LENGTHS = (7, 5)
# Products of larger matrices take all threads.
_WIDE = 2**20
# Of the largest value. Both sides are float64: what is left is rounding, at most about 1e5 logits of it.
_ALLOWED = 1e-9


@dataclass(frozen=True)
class Proof:
    """What a proof found.

    Attributes:
        cases: combinations of inputs, masks and logits that were run.
        worst: the largest difference, as a share of the largest value.
        differences: where the two are not the same function; none where they are.
    """

    cases: int
    worst: float
    differences: tuple[str, ...]


def prove(module: nn.Module, checkpoint: Checkpoint, interface: Interface) -> Proof:
    """Run a module and the reference with its weights over every combination of the optional inputs that the export has.

    Args:
        module: as it is; a copy is run.
        checkpoint: what its weights look like.
        interface: which inputs and outputs count.

    Raises:
        CheckpointError: the module does not take what the export is to have.
    """
    call = call_of(module, checkpoint.spec.kin)
    _check_takes(call, checkpoint.spec, interface)
    theirs = pinned(copy.deepcopy(module).cpu().double().eval())
    wide = checkpoint.spec.inner_dim * max(checkpoint.spec.dim, checkpoint.spec.context_dim) > _WIDE
    with contextlib.nullcontext() if wide else one_thread(), torch.no_grad():  # threads of small products wait for each other
        return _proof(call, theirs, checkpoint, interface)


def _proof(call: Call, theirs: nn.Module, checkpoint: Checkpoint, interface: Interface) -> Proof:
    ours, largest = checkpoint.module(torch.float64), _largest_logit(checkpoint)
    _untie(theirs)
    queries, power = _queries(ours, theirs, call.row)
    cases, worst, differences = 0, 0.0, list[str]()
    lengths = theirs.lengths if isinstance(theirs, Kept) else _LENGTHS
    for level, opposed in _LEVELS:
        if level > call.row.largest_logit:
            continue
        for parameter, original in queries:
            parameter.copy_(original * (1.0 if level == 1.0 or largest == 0 else (level / largest) ** power))
        for given in _combinations(checkpoint, interface):
            cases += 1
            inputs = make_inputs(_case(checkpoint, opposed, lengths), checkpoint.spec, given, "fp32")
            found, failures = _difference(partial(call, theirs), ours, inputs, given)
            worst = max(worst, found)
            name = f"{' '.join(_named(given, inputs)) or 'no mask'}, |logit| {level:g}"
            differences += [f"{name}{', opposed tokens' if opposed else ''}: {failure}" for failure in failures]
    return Proof(cases, worst, tuple(differences))


def _queries(ours: nn.Module, theirs: nn.Module, row: Family) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Return the parameters of both that scale the logits, with copies, and to which power of the logits' factor."""
    owner, names = next((owner, names) for owner, names in row.projections.items() if "to_qk" in names)
    pairs = [(ours, names), (theirs, (owner,))]
    found: list[tuple[Tensor, Tensor]] = [
        (p, p.clone()) for module, own in pairs for name, p in module.named_parameters() if name.split(".")[-2] in own
    ]
    return found, 1 / len(names)


def _untie(module: nn.Module) -> None:
    """Give the queries' weights to one side alone, where both share them: scaling them is to scale the logits once."""
    for parent in module.modules():
        sides = [getattr(parent._modules.get(name), "weight", None) for name in ("to_qk", "context_to_qk")]
        if sides[0] is not None and sides[0] is sides[1]:
            parent.to_qk = copy.deepcopy(parent.to_qk)


def check(module: nn.Module, checkpoint: Checkpoint, interface: Interface) -> Proof:
    """Refuse a module that is another function than the layer with its weights.

    Returns:
        The proof that it is not.

    Raises:
        ParityError: with the first case in which it differs.
        CheckpointError: as for :func:`prove`.
    """
    proof = prove(module, checkpoint, interface)
    if proof.differences:
        found = f"{len(proof.differences)} differences in {proof.cases} cases, the first: {proof.differences[0]}"
        raise ParityError(
            f"the module has the weights of this layer and computes something else ({found}); look at what its forward does "
            "with masks, fills and scale, at hooks, and at heads"
        )
    return proof


def _check_takes(call: Call, spec: LayerSpec, interface: Interface) -> None:
    has = takes(call, spec)
    asked = {name: getattr(interface, name) and not getattr(has, name) for name in MASK_NAMES}
    asked["rel_pos_bias"] = interface.rel_pos_bias != "none" and has.rel_pos_bias == "none"
    asked["return_attn"] = interface.attention_maps and not has.attention_maps
    absent = [name for name, lacks in asked.items() if lacks]
    if absent:
        raise CheckpointError(
            f"the module's forward takes no {absent[0]}, and the export is to have it; export without, or give forward one"
        )


def pinned(module: nn.Module) -> nn.Module:
    """Give norms without an epsilon float32's, as the reference does: it would be float64's here."""
    for norm in module.modules():
        if isinstance(norm, nn.RMSNorm) and norm.eps is None:
            norm.eps = NORM_EPS["rms"]
    return module


def _case(checkpoint: Checkpoint, opposed: bool, lengths: tuple[int, int] = _LENGTHS) -> Case:
    if not opposed:
        return Case("dead rows", "plain", _BATCH, *lengths, seed=0)
    return Case("opposed", "plain", max(_BATCH, math.ceil(_OPPOSED_LOGITS / checkpoint.spec.heads)), *lengths, seed=0)


def _largest_logit(checkpoint: Checkpoint) -> float:
    unmasked = Interface(mask=False, context_mask=False)
    inputs = make_inputs(_case(checkpoint, opposed=False), checkpoint.spec, unmasked, "fp32")
    return true_outputs(checkpoint.module(torch.float64), inputs, unmasked, np.inf)[1]


def _combinations(checkpoint: Checkpoint, interface: Interface) -> Iterator[Interface]:
    """Yield the interface with every combination of what it has."""
    bare = checkpoint.spec.depth is None  # the transformer has neither maps nor, as published, a bias
    options = (
        interface.mask,
        interface.context_mask,
        bare and interface.rel_pos_bias != "none",
        bare and interface.attention_maps,
    )
    for mask, context_mask, bias, maps in itertools.product(*([False, True] if option else [False] for option in options)):
        yield Interface(mask, context_mask, interface.rel_pos_bias if bias else "none", maps)


def _named(given: Interface, inputs: Arrays) -> list[str]:
    return [*(name for name in inputs if name not in INPUT_NAMES[:2]), *(["return_attn"] if given.attention_maps else [])]


def _difference(theirs: Callable[..., Any], ours: nn.Module, inputs: Arrays, interface: Interface) -> tuple[float, list[str]]:
    """Return the largest difference of the outputs, as a share of the largest value, and what is wrong."""
    wanted = run_module(ours, inputs, interface, torch.float64)
    try:
        got = run_module(theirs, inputs, interface, torch.float64)
    except Exception as error:  # a user's module raises what it likes
        return math.inf, [f"{type(error).__name__}: {first_line(error)}"]
    shapes, true_shapes = ({name: array.shape for name, array in outputs.items()} for outputs in (got, wanted))
    if shapes != true_shapes:
        return math.inf, [f"it returns {shapes}, where the layer returns {true_shapes}"]
    live, worst, failures = live_rows(inputs, wanted), 0.0, []
    for name, true in wanted.items():
        off = np.nan_to_num(np.abs(got[name] - true) / np.nanmax(np.abs(true)), nan=np.inf)
        off[np.isnan(true) & np.isnan(got[name])] = 0  # undefined in both
        worst = max(worst, float(off.max()))
        if off.max() > _ALLOWED:
            where = "live rows" if (off > _ALLOWED)[live[name]].any() else "rows that have no live key"
            failures.append(f"{name} differs by {off.max():.2g} of its largest value, in {where}")
    return worst, failures


def sample_of(module: nn.Module, checkpoint: Checkpoint, interface: Interface, dims: Dims) -> Arrays:
    """Return a sample that a float32 copy of the module makes on the CPU; the module itself is left alone."""
    copied = copy.deepcopy(module).cpu().float().eval()
    return user_sample.from_module(partial(call_of(module), copied), checkpoint.spec, interface, dims)
