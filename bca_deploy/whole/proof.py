"""A live module, as its user has it: how it is called, and the proof that it is the layer that its weights look like."""

import contextlib
import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bca_deploy.errors import CheckpointError, ParityError, first_line
from bca_deploy.layers.checkpoint import Checkpoint, is_query_weight
from bca_deploy.layers.isolation import one_thread
from bca_deploy.parity import user_sample
from bca_deploy.parity.cases import Case, make_inputs
from bca_deploy.parity.truth import live_rows, run_module, true_outputs
from bca_deploy.signature import Dims
from bca_deploy.spec import INPUT_NAMES, NORM_EPS, Bias, Interface, LayerSpec

Arrays = dict[str, NDArray[Any]]

# What forward's arguments are called in code that is about; the first two are the sequences whatever their names.
_ALIASES = {
    "mask": ("mask", "x_mask"),
    "context_mask": ("context_mask", "ctx_mask", "mask_context", "y_mask"),
    "rel_pos_bias": ("rel_pos_bias", "attn_bias", "bias"),
    "return_attn": ("return_attn", "return_attention", "need_weights"),
}
# As the layer's own forward takes them.
_ORDER = ("x", "context", "mask", "context_mask", "return_attn", "rel_pos_bias")
# The largest |logit| of a case is about this. Nearly uniform attention hides much, and only steep logits tell a fill of -10000
# from the lowest number; they do where all live logits are one number and all dead ones its opposite.
_LEVELS = ((1.0, False), (30.0, False), (2e4, False), (1e5, True))
# Four rows for the ways to be dead. Opposed rows have one logit for each head, and only negative ones tell: so many logits.
_BATCH, _OPPOSED_LOGITS = 4, 32
# Products of larger matrices take all threads.
_WIDE = 2**20
# Of the largest value. Both sides are float64: what is left is rounding, at most about 1e5 logits of it.
_ALLOWED = 1e-9


@dataclass(frozen=True)
class Call:
    """How a module is called.

    Attributes:
        arguments: what its forward calls the layer's inputs that it takes, and ``return_attn``.
    """

    arguments: Mapping[str, str]

    def __call__(self, module: nn.Module, **given: Any) -> Any:
        """Call the module with what is given by the layer's names."""
        return module(**{self.arguments[name]: value for name, value in given.items()})

    def given(self, forward: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return by the layer's names what a call of ``forward`` was given."""
        bound = forward.bind(*args, **kwargs).arguments
        everything = dict(bound)
        for index, parameter in enumerate(forward.parameters.values()):
            if parameter.kind is parameter.VAR_KEYWORD:
                everything |= bound.get(parameter.name, {})
            elif parameter.kind is parameter.VAR_POSITIONAL:  # handed on to the layer's own forward, in its order
                everything |= dict(zip(_ORDER[index:], bound.get(parameter.name, ()), strict=False))
        roles = {argument: name for name, argument in self.arguments.items()}
        return {roles[name]: value for name, value in everything.items() if name in roles}


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


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what torch.compile, DataParallel or AveragedModel has wrapped, which has the forward that was written."""
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        elif isinstance(module, (nn.DataParallel, torch.optim.swa_utils.AveragedModel)):
            module = module.module
        else:
            return module


def call_of(module: nn.Module) -> Call:
    """Return how a module's forward is called.

    Raises:
        CheckpointError: it needs an argument that the layer has not.
    """
    everything = list(inspect.signature(module.forward).parameters.values())
    parameters = [p for p in everything if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
    found = dict(zip(INPUT_NAMES, (parameter.name for parameter in parameters[:2]), strict=False))
    for parameter in parameters[2:]:
        if parameter.name in names:
            found.setdefault(names[parameter.name], parameter.name)
        elif parameter.default is parameter.empty:
            raise CheckpointError(
                f"the module's forward needs {parameter.name!r}, which this layer has not; give it a default, or export the "
                "layer inside it"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in everything):  # handed on to the layer's own forward
        found = {name: name for name in (*INPUT_NAMES[:2], *_ALIASES)} | found
    return Call(found)


def prove(module: nn.Module, checkpoint: Checkpoint, interface: Interface) -> Proof:
    """Run a module and the reference with its weights over every combination of the optional inputs that the export has.

    Args:
        module: as it is; a copy is run.
        checkpoint: what its weights look like.
        interface: which inputs and outputs count.

    Raises:
        CheckpointError: the module does not take what the export is to have.
    """
    call = call_of(module)
    _check_takes(call, interface)
    theirs = pinned(copy.deepcopy(module).cpu().double().eval())
    wide = checkpoint.spec.inner_dim * max(checkpoint.spec.dim, checkpoint.spec.context_dim) > _WIDE
    with contextlib.nullcontext() if wide else one_thread(), torch.no_grad():  # threads of small products wait for each other
        return _proof(call, theirs, checkpoint, interface)


def _proof(call: Call, theirs: nn.Module, checkpoint: Checkpoint, interface: Interface) -> Proof:
    ours, largest = checkpoint.module(torch.float64), _largest_logit(checkpoint)
    _untie(theirs)
    queries = [(p, p.clone()) for m in (ours, theirs) for name, p in m.named_parameters() if is_query_weight(name)]
    cases, worst, differences = 0, 0.0, list[str]()
    for level, opposed in _LEVELS:
        for parameter, original in queries:
            parameter.copy_(original * (1.0 if level == 1.0 or largest == 0 else level / largest))
        for given in _combinations(checkpoint, interface):
            cases += 1
            inputs = make_inputs(_case(checkpoint, opposed), checkpoint.spec, given, "fp32")
            found, failures = _difference(partial(call, theirs), ours, inputs, given)
            worst = max(worst, found)
            name = f"{' '.join(_named(given, inputs)) or 'no mask'}, |logit| {level:g}"
            differences += [f"{name}{', opposed tokens' if opposed else ''}: {failure}" for failure in failures]
    return Proof(cases, worst, tuple(differences))


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


def takes(call: Call, spec: LayerSpec) -> Interface:
    """Return everything optional that a module takes and gives."""
    bare = spec.depth is None  # the transformer, as published, has neither a bias nor maps
    bias: Bias = "shared" if bare and "rel_pos_bias" in call.arguments else "none"
    masks = ("mask" in call.arguments, "context_mask" in call.arguments)
    return Interface(*masks, bias, attention_maps=bare and "return_attn" in call.arguments)


def _check_takes(call: Call, interface: Interface) -> None:
    wanted = {"mask": interface.mask, "context_mask": interface.context_mask, "rel_pos_bias": interface.rel_pos_bias != "none"}
    wanted["return_attn"] = interface.attention_maps
    absent = [name for name, asked in wanted.items() if asked and name not in call.arguments]
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


def _case(checkpoint: Checkpoint, opposed: bool) -> Case:
    if not opposed:
        return Case("dead rows", "plain", _BATCH, 7, 5, seed=0)
    return Case("opposed", "plain", max(_BATCH, math.ceil(_OPPOSED_LOGITS / checkpoint.spec.heads)), 7, 5, seed=0)


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
        off = np.nan_to_num(np.abs(got[name] - true) / np.abs(true).max(), nan=np.inf)
        worst = max(worst, float(off.max()))
        if off.max() > _ALLOWED:
            where = "live rows" if (off > _ALLOWED)[live[name]].any() else "rows that have no live key"
            failures.append(f"{name} differs by {off.max():.2g} of its largest value, in {where}")
    return worst, failures


def sample_of(module: nn.Module, checkpoint: Checkpoint, interface: Interface, dims: Dims) -> Arrays:
    """Return a sample that a float32 copy of the module makes on the CPU; the module itself is left alone."""
    copied = copy.deepcopy(module).cpu().float().eval()
    return user_sample.from_module(partial(call_of(module), copied), checkpoint.spec, interface, dims)
