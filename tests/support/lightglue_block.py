"""LightGlue's block, written here: its names and its call, models that give it masks in every way, and what is not it.

Its weights are sharpened: attention with random ones is nearly uniform, and hides what a layer attends to.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from support.models import SHORT, Dims, Input, Kind, dims, normal, padding
from torch import Tensor, nn

DIM, HEADS = 16, 2
#: Logits grow with its square.
SHARP = 4.0


class CrossBlock(nn.Module):
    """Two sequences that hear of each other. Methods are its parts, so that a copy may have another."""

    def __init__(self, dim: int = DIM, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.to_qk, self.to_v, self.to_out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        with torch.no_grad():
            self.to_qk.weight *= SHARP

    def forward(self, x0: Tensor, x1: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        logits = self.logits(x0, x1)
        messages = [self.heard(logits, x1, mask), self.heard(logits.mT, x0, None if mask is None else mask.mT)]
        return tuple(x + self.ffn(torch.cat([x, message], -1)) for x, message in zip((x0, x1), messages, strict=True))

    def logits(self, x0: Tensor, x1: Tensor) -> Tensor:
        qk0, qk1 = self.apart(self.to_qk(x0)), self.apart(self.to_qk(x1))
        return qk0 @ qk1.mT / qk0.shape[-1] ** 0.5

    def heard(self, logits: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        return self.to_out((self.settled(logits.softmax(-1)) @ self.apart(self.to_v(other))).transpose(1, 2).flatten(-2))

    def settled(self, attention: Tensor) -> Tensor:
        """Rows without a key are NaN after the softmax."""
        return attention.nan_to_num()

    def apart(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)


# ---- models around it


class Matching(nn.Module):
    """Blocks, and a mask of pairs that ``ways["pairs"]`` makes of the masks of both sides; the other ways are arguments."""

    def __init__(self, block: Callable[[], nn.Module], depth: int, **ways: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.ways = ways

    def forward(self, left: Tensor, right: Tensor, left_mask: Tensor | None = None, right_mask: Tensor | None = None) -> Any:
        given: Any = {} if left_mask is None else {"mask": self.ways["pairs"](left_mask, right_mask)}
        given |= {name: value for name, value in self.ways.items() if name != "pairs"}
        shown: list[Tensor] = []
        for block in self.blocks:
            left, right, *maps = block(left, right, **given)
            shown += maps
        return left, right, *shown


#: Masks of pairs of every shape that it takes.
PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "[B,1,N,M]": lambda left, right: (left[:, :, None] & right[:, None, :])[:, None],
    "[B,1,N,M] expanded": lambda left, right: (left[:, :, None] & right[:, None, :])[:, None].expand(-1, HEADS, -1, -1)[:, :1],
    "[1,N,M]": lambda left, right: left[:1, :, None] & right[:1, None, :],
}


def matching(
    name: str = "no mask",
    block: Callable[[], nn.Module] = CrossBlock,
    found: Dims | None = None,
    dim: int = DIM,
    depth: int = 2,
) -> Kind:
    """Make a model; ``name``: of :data:`PAIRS`, or none of them."""
    masks: dict[str, Input] = {f"{side}_mask": padding("batch", f"{side}_len") for side in ("left", "right")}
    sides = {side: normal("batch", f"{side}_len", dim) for side in ("left", "right")}
    found = found or dims(left_len=SHORT, right_len=SHORT)
    if name == "[1,N,M]":  # of one pair: it says the same of every item
        found = {**found, "batch": (1, 1, 1)}
    return Kind(
        name,
        lambda: Matching(block, depth, pairs=PAIRS.get(name)),
        sides | (masks if name in PAIRS else {}),
        found,
        layers=tuple(f"blocks.{index}" for index in range(depth)),
    )


def lightglue(found: Dims, dim: int, heads: int) -> Kind:
    """One block of any size, with a mask of pairs."""
    return replace(matching("[B,1,N,M]", lambda: CrossBlock(dim, heads), found, dim, depth=1), name="lightglue")


# ---- what has its names and is another


class OtherScale(CrossBlock):
    def logits(self, x0: Tensor, x1: Tensor) -> Tensor:
        return super().logits(x0, x1) / 2


class Undefined(CrossBlock):
    def settled(self, attention: Tensor) -> Tensor:
        return attention


class Mean(CrossBlock):
    def settled(self, attention: Tensor) -> Tensor:
        return attention.nan_to_num(1 / attention.shape[-1])


class Rectified(CrossBlock):
    def __init__(self) -> None:
        super().__init__()
        self.ffn[2] = nn.ReLU()


class Unnormalised(CrossBlock):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(2 * DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))


class TalkingHeads(CrossBlock):
    def __init__(self) -> None:
        super().__init__()
        self.talking_heads = nn.Conv2d(HEADS, HEADS, 1, bias=False)


class OwnQueries(CrossBlock):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(DIM, DIM)


class Biased(CrossBlock):
    def forward(self, x0: Tensor, x1: Tensor, bias: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(x0, x1, mask)


class Showing(CrossBlock):
    """It returns its attention as well."""

    def forward(self, x0: Tensor, x1: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        return *super().forward(x0, x1, mask), self.logits(x0, x1).softmax(-1)


class ShowingOnDemand(CrossBlock):
    """The same, where it is asked to."""

    def forward(self, x0: Tensor, x1: Tensor, mask: Tensor | None = None, return_attn: bool = False) -> tuple[Tensor, ...]:
        out = super().forward(x0, x1, mask)
        return (*out, self.logits(x0, x1).softmax(-1)) if return_attn else out
