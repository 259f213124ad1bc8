"""Is a live module the layer that its weights look like? Run beside the reference in float64, wherever the two could differ."""

import contextlib
import copy
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bca_deploy.errors import CheckpointError, ParityError, first_line
from bca_deploy.layers.checkpoint import Checkpoint, is_query_weight
from bca_deploy.layers.isolation import one_thread
from bca_deploy.spec import INPUT_NAMES, NORM_EPS, OUTPUT_NAMES, Interface

# What forward's arguments are called in code that is about; the first two are the sequences whatever their names.
_ALIASES = {
    "mask": ("mask", "x_mask"),
    "context_mask": ("context_mask", "ctx_mask", "mask_context", "y_mask"),
    "rel_pos_bias": ("rel_pos_bias", "attn_bias", "bias"),
    "return_attn": ("return_attn", "return_attention", "need_weights"),
}
# The largest |logit| of a case is about this. Nearly uniform attention hides much, and only steep logits tell a fill of -10000
# from the lowest number; they do where all live logits are one number and all dead ones its opposite.
_LEVELS = ((1.0, False), (30.0, False), (2e4, False), (1e5, True))
_LENGTHS = (7, 5)
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
        return module(**{self.arguments[name]: value for name, value in given.items() if value is not None})


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
    theirs = _pinned(copy.deepcopy(module).cpu().double().eval())
    wide = checkpoint.spec.inner_dim * max(checkpoint.spec.dim, checkpoint.spec.context_dim) > _WIDE
    with contextlib.nullcontext() if wide else one_thread(), torch.no_grad():  # threads of small products wait for each other
        return _proof(call, theirs, checkpoint, interface)


def _proof(call: Call, theirs: nn.Module, checkpoint: Checkpoint, interface: Interface) -> Proof:
    ours, largest = checkpoint.module(torch.float64), _largest_logit(checkpoint)
    queries = [(p, p.clone()) for m in (ours, theirs) for name, p in m.named_parameters() if is_query_weight(name)]
    cases, worst, differences = 0, 0.0, list[str]()
    for level, opposed in _LEVELS:
        for parameter, original in queries:
            parameter.copy_(original * (1.0 if level == 1.0 or largest == 0 else level / largest))
        for given in _combinations(checkpoint, interface, torch.Generator().manual_seed(0), opposed):
            cases += 1
            name = f"{' '.join(k for k in given if k not in INPUT_NAMES[:2]) or 'no mask'}, |logit| {level:g}"
            found, failures = _difference(call, theirs, ours, given)
            worst = max(worst, found)
            differences += [f"{name}{', opposed tokens' if opposed else ''}: {failure}" for failure in failures]
    return Proof(cases, worst, tuple(differences))


def check(module: nn.Module, checkpoint: Checkpoint, interface: Interface) -> None:
    """Refuse a module that is another function than the layer with its weights.

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


def _check_takes(call: Call, interface: Interface) -> None:
    wanted = {"mask": interface.mask, "context_mask": interface.context_mask, "rel_pos_bias": interface.rel_pos_bias != "none"}
    wanted["return_attn"] = interface.attention_maps
    absent = [name for name, asked in wanted.items() if asked and name not in call.arguments]
    if absent:
        raise CheckpointError(
            f"the module's forward takes no {absent[0]}, and the export is to have it; export without, or give forward one"
        )


def _pinned(module: nn.Module) -> nn.Module:
    """Give norms without an epsilon float32's, as the reference does: it would be float64's here."""
    for norm in module.modules():
        if isinstance(norm, nn.RMSNorm) and norm.eps is None:
            norm.eps = NORM_EPS["rms"]
    return module


def _largest_logit(checkpoint: Checkpoint) -> float:
    """Return the largest |logit| of the first attention on random tokens."""
    ours: Any = checkpoint.module(torch.float64)
    attention = ours if checkpoint.spec.depth is None else ours.layers[0][0]
    x, context = _tokens(checkpoint, torch.Generator().manual_seed(1), _BATCH)
    return float(attention.similarity(attention.norm(x), attention.context_norm(context)).abs().max())


def _tokens(checkpoint: Checkpoint, random: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    widths = checkpoint.spec.dim, checkpoint.spec.context_dim
    first, second = (
        torch.randn(batch, length, width, generator=random, dtype=torch.float64)
        for length, width in zip(_LENGTHS, widths, strict=True)
    )
    return first, second


def _combinations(
    checkpoint: Checkpoint, interface: Interface, random: torch.Generator, opposed: bool
) -> Iterator[dict[str, Any]]:
    """Yield the inputs of each combination of what is optional, by the layer's names."""
    bare = checkpoint.spec.depth is None  # the transformer has neither maps nor, as published, a bias
    options = (
        interface.mask,
        interface.context_mask,
        bare and interface.rel_pos_bias != "none",
        bare and interface.attention_maps,
    )
    for masked, context_masked, biased, maps in itertools.product(
        *([False, True] if option else [False] for option in options)
    ):
        batch = max(_BATCH, math.ceil(_OPPOSED_LOGITS / checkpoint.spec.heads)) if opposed else _BATCH
        given: dict[str, Any] = dict(zip(INPUT_NAMES, _tokens(checkpoint, random, batch), strict=False))
        for wanted, name, other, length, dead in (
            (masked, "mask", "x", _LENGTHS[0], 0),
            (context_masked, "context_mask", "context", _LENGTHS[1], 1),
        ):
            mask = _mask(len(given[other]), length, dead, random) if wanted else None
            if opposed:
                first = given[other][:, :1]
                given[other] = first.expand_as(given[other]) if mask is None else torch.where(mask[..., None], first, -first)
            given |= {} if mask is None else {name: mask}
        if biased:
            given["rel_pos_bias"] = torch.randn(checkpoint.spec.heads, *_LENGTHS, generator=random, dtype=torch.float64)
        yield given | ({"return_attn": True} if maps else {})


def _mask(batch: int, length: int, dead: int, random: torch.Generator) -> Tensor:
    """Every row but two keeps its first position."""
    mask = torch.rand(batch, length, generator=random) < 0.6
    mask[:, 0] = True
    mask[[dead, 2]] = False
    return mask


def _difference(call: Call, theirs: nn.Module, ours: nn.Module, given: dict[str, Any]) -> tuple[float, list[str]]:
    """Return the largest difference of the outputs, as a share of the largest value, and what is wrong."""
    wanted = ours(**given)
    try:
        got = call(theirs, **given)
    except Exception as error:  # a user's module raises what it likes
        return float("inf"), [f"{type(error).__name__}: {first_line(error)}"]
    if not isinstance(got, (tuple, list)) or len(got) != len(wanted):
        return float("inf"), [f"it returns {type(got).__name__}, where the layer returns {len(wanted)} tensors"]
    worst, failures = 0.0, []
    for name, one, true in zip(OUTPUT_NAMES, got, wanted, strict=False):
        if not isinstance(one, Tensor) or one.shape != true.shape:
            failures.append(f"{name} is no tensor of {list(true.shape)}")
            continue
        share = (one.double() - true).abs().flatten(1).amax(1) / true.abs().max()
        off = torch.nan_to_num(share, nan=float("inf"))
        worst = max(worst, float(off.max()))
        if worst > _ALLOWED:
            where = "rows that have no live key" if bool((off[3:] <= _ALLOWED).all()) else "live rows"
            failures.append(f"{name} differs by {worst:.2g} of its largest value, in {where}")
    return worst, failures
