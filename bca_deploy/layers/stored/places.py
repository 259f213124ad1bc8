"""Where in a state dict the layer stands, what stands there in its stead, and which of several was taken."""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bca_deploy.errors import CheckpointError, nearest

_log = logging.getLogger("bca_deploy.layers.stored.places")

ANCHOR = "to_qk.weight"  # every layer has it, and nothing else of the layer ends so at the root
_TRANSFORMER_ANCHOR = "layers.0.0.to_qk.weight"
# The last names a transformer whose first block lacks the other.
_ANCHORS = (ANCHOR, _TRANSFORMER_ANCHOR, _TRANSFORMER_ANCHOR.replace("to_qk", "context_to_qk"))

#: What DataParallel puts in front of every name.
PARALLEL = ("module",)
#: What else a training script puts its weights under; the first is taken before the next.
CONTAINERS = ("state_dict", "model_state_dict", "model", *PARALLEL)

_PROJECTION = r"(?:^|\.)((?:context_)?to_(?:qk|v|out))\."
# What follows a projection whose weight is no plain tensor, what it is then, and how it becomes one.
_UNMERGED = (
    (r"parametrizations\.", "parametrised", 'torch.nn.utils.parametrize.remove_parametrizations(layer.{}, "weight")'),
    (r"weight_g$", "weight-normalised", "torch.nn.utils.remove_weight_norm(layer.{})"),
    (r"weight_u$", "spectrally normalised", "torch.nn.utils.remove_spectral_norm(layer.{})"),
    (r"weight_mask$", "pruned", 'torch.nn.utils.prune.remove(layer.{}, "weight")'),
    (r"(.*\.)?(lora_\w+|base_layer)\b", "adapted (LoRA)", "model.merge_and_unload(), as peft has it"),
    (
        r"(_packed_params|qweight|SCB|weight\.(absmax|quant_map|quant_state)|weight_scale|zero_point$)",
        "quantised",
        "take the weights from before the quantisation, or dequantise them",
    ),
)


@dataclass(frozen=True)
class Words:
    """What an error calls things, and how it tells the user to go on.

    Attributes:
        root: what the names are of.
        point: how a layer further inside is pointed at.
        literal: how a different layer is exported as part of its model.
        live: whether there is a module, of which a part can be passed.
    """

    root: str
    point: str
    literal: str
    live: bool = False

    def elsewhere(self, place: str) -> str:
        """Return what to do where the first of the layers is at ``place``."""
        if not self.live:
            return self.point
        part = re.sub(r"\.(\d+)", r"[\1]", f"model.{place}".removesuffix("."))
        return f"pass {part}, or export the whole model with samples of its inputs: export(model, out, inputs=[a, b])"


FILE = Words("checkpoint", "use --prefix", "--model pkg.module:factory --keep-literal PATH")
MODULE = Words("module", "use prefix=", "export(model, out, inputs=[a, b], keep_literal=[PATH])", live=True)


def plain(name: str) -> str:
    """Return a parameter's name or a prefix without what torch.compile adds to it."""
    return name.replace("_orig_mod.", "")


def dotted(prefix: str) -> str:
    """Return a prefix as names have it, with a dot at its end."""
    return plain(prefix if not prefix or prefix.endswith(".") else f"{prefix}.")


def candidates(names: Iterable[str], prefix: str, containers: Sequence[str] = CONTAINERS) -> list[str]:
    """Return the whole prefixes that one may stand for, the preferred first: with containers in front of it or behind."""
    known = list(names)
    found = [f"{start}{prefix}" for start in _starts(known, containers)]
    below = {place: [name.removeprefix(place) for name in known if name.startswith(place)] for place in found}
    return list(dict.fromkeys(f"{place}{start}" for place in found for start in _starts(below[place], containers)))


def _starts(names: Iterable[str], containers: Sequence[str]) -> list[str]:
    """Return the prefixes of containers alone that names begin with; the root is one of them."""
    wrapped = re.compile(rf"(?:(?:{'|'.join(containers)})\.)*")
    found = {""}
    for whole in {match[0] for name in names if (match := wrapped.match(name))}:
        parts = whole.split(".")[:-1]
        found |= {f"{'.'.join(parts[: count + 1])}." for count in range(len(parts))}
    return sorted(found, key=lambda start: [containers.index(part) for part in start.split(".")[:-1]])


def locate(names: Iterable[str], prefix: str, containers: Sequence[str], words: Words) -> str:
    """Return the whole prefix of the layer that is asked for; says so where others would have fitted.

    Args:
        names: of every tensor.
        prefix: what was asked for, with its dot.
        containers: what may stand in front of it.
        words: for the error.

    Raises:
        CheckpointError: no layer is there; names the places of those there are.
    """
    known = set(names)
    found = [place for place in candidates(known, prefix, containers) if _holds_layer(known, place)]
    if not found:
        raise CheckpointError(_nowhere(known, prefix, words))
    if found[0] != prefix:
        others = [place for place in (*found[1:], *places(known)) if place.endswith(prefix) and not place.startswith(found[0])]
        say_choice(found[0], others)
    return found[0]


def say_choice(taken: str, others: Iterable[str]) -> None:
    """Tell the user which of several was taken, where there were several."""
    if left := ", ".join(repr(place) for place in dict.fromkeys(others)):
        _log.warning("the checkpoint has more than one: %r is taken, and not %s; --prefix takes another", taken, left)


def _holds_layer(names: set[str], place: str) -> bool:
    return any(f"{place}{anchor}" in names for anchor in _ANCHORS)


def _nowhere(names: set[str], prefix: str, words: Words) -> str:
    found = places(names)
    refuse_unmerged(name for name in names if not found or (prefix and f".{prefix}" in f".{name}"))
    if not found:
        return (
            f"no {ANCHOR} anywhere in the {words.root}, so it holds no bidirectional cross-attention; its keys are "
            f"{listing(names)}"
        )
    where = f"under prefix {prefix!r}" if prefix else f"at the root of the {words.root}"
    return (
        f"no layer {where}{nearest(prefix, found)}; layers are at: {', '.join(map(repr, found))}; {words.elsewhere(found[0])}"
    )


def places(names: set[str]) -> list[str]:
    """Return the prefixes under which a layer or a transformer stands."""
    attention = {name.removesuffix(ANCHOR) for name in names if name.endswith("." + ANCHOR) or name == ANCHOR}
    attention = {place for place in attention if not place.endswith("context_")}
    blocks = {place: re.sub(r"layers\.\d+\.0\.$", "", place) for place in attention}
    return sorted({root if f"{root}{_TRANSFORMER_ANCHOR}" in names else place for place, root in blocks.items()})


def refuse_unmerged(names: Iterable[str]) -> None:
    """Refuse a layer whose projections are parametrised, pruned, adapted or quantised: its weight is in several tensors.

    Raises:
        CheckpointError: naming the first, and how it becomes one plain weight.
    """
    for name in sorted(names):
        match = re.search(_PROJECTION, name)
        for follows, kind, merge in _UNMERGED if match else ():
            if match and re.match(follows, name[match.end() :]):
                raise CheckpointError(
                    f"{name}: the layer's {match[1]} is {kind}, and its weight is no plain tensor; merge it and save again: "
                    f"{merge.format(match[1])}"
                )


def listing(names: Iterable[str]) -> str:
    """Return the first names in order, and how many more there are."""
    found = sorted(names)
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
