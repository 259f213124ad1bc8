"""The layer and its relatives in public models, as data: one row says how a family differs, and nothing else names one.

Every family projects two sequences, forms one similarity and takes a softmax over either axis. Weights are kept under the
seed's names, inputs are called as the seed's, whatever a family's own code calls them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FamilyName = Literal["seed", "lightglue", "grounding-dino"]
#: What a row gives that has no live key: the mean over all values, zeros before the last projection, or nothing (NaN).
DeadRows = Literal["mean", "zero", "undefined"]
#: What a mask says: true where real, true where padding, or one mask ``[B, 1, N, M]`` of pairs in place of two.
MaskKind = Literal["live", "padding", "pairs"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row.

    Attributes:
        name: in manifests and messages.
        title: for people.
        source: where its function is written down.
        projections: for each of its own linear layers, the seed's names of what it is; two where both sides share one.
        feed_forward: name of what takes each sequence beside its message and is added to it; None where there is none.
        heads: attribute of its module.
        arguments: what its forward calls ``x``, ``context``, ``mask`` and ``context_mask``; None takes any name.
        masks: what they say.
        paired_outputs: it returns ``(out, map), (context_out, map)`` in place of ``out, context_out``.
        projection_bias: queries, keys and values have biases.
        dead_rows: what a row gives that has no live key.
        own_mask: a row that is itself masked is dead.
        sequence_first: how its attention lies in memory, by what TensorRT-RTX's scratch memory says.
        absorbed: the wide projections of ``x`` move to the short ``context`` side.
        largest_logit: beyond it the family's own code is another function, as it clamps.
    """

    name: FamilyName
    title: str
    source: str
    projections: Mapping[str, tuple[str, ...]]
    feed_forward: str | None = None
    heads: str = "heads"
    arguments: Mapping[str, str] | None = None
    masks: MaskKind = "live"
    paired_outputs: bool = False
    projection_bias: bool = False
    dead_rows: DeadRows = "mean"
    own_mask: bool = True
    sequence_first: bool = True
    absorbed: bool = False
    largest_logit: float = 1e5


_OWN = ("to_qk", "context_to_qk", "to_v", "context_to_v", "to_out", "context_to_out")

_SEED = Family(
    name="seed",
    title="bidirectional cross-attention",
    source="https://pypi.org/project/bidirectional-cross-attention/",
    projections={name: (name,) for name in _OWN},
)
# One qk, v and out for both sides; the scale is spread over both, which is the same in exact arithmetic.
_LIGHTGLUE = Family(
    name="lightglue",
    title="LightGlue's CrossBlock",
    source="https://github.com/cvg/LightGlue/blob/main/lightglue/lightglue.py",
    projections={
        "to_qk": ("to_qk", "context_to_qk"),
        "to_v": ("to_v", "context_to_v"),
        "to_out": ("to_out", "context_to_out"),
    },
    feed_forward="ffn",
    arguments={"x": "x0", "context": "x1", "mask": "mask"},
    masks="pairs",
    projection_bias=True,
    dead_rows="zero",
    sequence_first=False,
)
# It clamps logits at 50,000 below the largest of all: beyond half of that its rows may become uniform.
_GROUNDING_DINO = Family(
    name="grounding-dino",
    title="GroundingDINO's fusion attention",
    source="https://github.com/huggingface/transformers/blob/main/src/transformers/models/grounding_dino/",
    projections={
        "vision_proj": ("to_qk",),
        "text_proj": ("context_to_qk",),
        "values_vision_proj": ("to_v",),
        "values_text_proj": ("context_to_v",),
        "out_vision_proj": ("to_out",),
        "out_text_proj": ("context_to_out",),
    },
    heads="num_heads",
    arguments={
        "x": "vision_features",
        "context": "text_features",
        "mask": "vision_attention_mask",
        "context_mask": "text_attention_mask",
    },
    masks="padding",
    paired_outputs=True,
    projection_bias=True,
    dead_rows="undefined",
    own_mask=False,
    sequence_first=False,
    absorbed=True,
    largest_logit=2e4,
)

#: Every family by name; the seed's first.
FAMILIES: Mapping[FamilyName, Family] = {row.name: row for row in (_SEED, _LIGHTGLUE, _GROUNDING_DINO)}
