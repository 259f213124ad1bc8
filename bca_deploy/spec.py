"""The layer and its interface as plain data, and the signature that they make. Needs no torch: every stage uses it."""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

from bca_deploy.errors import InputError, check_one_of
from bca_deploy.families import FAMILIES, Family, FamilyName
from bca_deploy.signature import Axis, DimRange, Dims, DType, Signature, Tensor

Norm = Literal["layer", "rms"]
Bias = Literal["none", "plane", "shared", "batch"]
Precision = Literal["fp32", "fp16", "bf16"]
# Of a relative whose projections are absorbed; layers/absorbed.py says what they are.
AbsorbedForm = Literal["flat", "loopq", "expand"]
Lowering = Literal["reference", "fused"] | AbsorbedForm
Runtime = Literal["portable", "onnxruntime-cpu"]
EngineLibrary = Literal["rtx", "tensorrt"]

# Read by pydantic where these classes stand in a recipe or a manifest: an unknown key is an error.
_STRICT = {"extra": "forbid"}

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: Every input and every output that a model may have, in order.
INPUT_NAMES = ("x", "context", "mask", "context_mask", "rel_pos_bias")
OUTPUT_NAMES = ("out", "context_out", "attn", "context_attn")
MASK_NAMES = ("mask", "context_mask")

#: The element type of each precision.
DTYPE_OF: dict[Precision, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

#: Above this many bytes weights leave the .onnx file: protobuf cannot hold 2 GiB.
EXTERNAL_DATA_BYTES = 2_000_000_000

# nn.RMSNorm(eps=None) takes its eps from the dtype (2.2e-16 in float64); it is pinned to float32's everywhere, so that the
# float64 truth and the half graphs normalise with the same number. nn.LayerNorm's default is 1e-5.
NORM_EPS: dict[Norm, float] = {"layer": 1e-5, "rms": 1.1920929e-07}

#: Unit roundoff (half the distance from 1 to the next number) of each precision.
UNIT_ROUNDOFF: dict[Precision, float] = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """A bidirectional cross-attention layer, or with ``depth`` a transformer of such layers.

    Attributes:
        dim: features of ``x``.
        context_dim: features of ``context``.
        heads: attention heads. Never inferred: wrong heads give a valid but different function.
        dim_head: features of one head; ``heads * dim_head`` is the inner width.
        prenorm: normalise both inputs before the projections.
        norm: which normalisation, where there is one.
        norm_eps: its epsilon.
        talking_heads: mix the heads by a 1x1 convolution after the softmax.
        depth: layers of the transformer, or None for the bare layer.
        ff_hidden: hidden width of the transformer's feed-forward on ``x``.
        context_ff_hidden: the same on ``context``.
        final_norms: the transformer normalises its outputs.
        family: whose layer it is; a relative has neither norms, talking heads nor depth, and one feed-forward at most.

    Raises:
        InputError: an unknown norm or family, a size below 1, or a combination that does not exist.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    dim: int
    context_dim: int
    heads: int
    dim_head: int = 64
    prenorm: bool = False
    norm: Norm = "layer"
    norm_eps: float = 0.0
    talking_heads: bool = False
    depth: int | None = None
    ff_hidden: int | None = None
    context_ff_hidden: int | None = None
    final_norms: bool = False
    family: FamilyName = "seed"

    def __post_init__(self) -> None:
        sizes = ("dim", "context_dim", "heads", "dim_head", "depth", "ff_hidden", "context_ff_hidden")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"layer.{name} is {value}; it must be at least 1")
        check_one_of("layer.norm", self.norm, get_args(Norm))
        if self.norm_eps == 0.0:
            object.__setattr__(self, "norm_eps", NORM_EPS[self.norm])
        check_one_of("layer.family", self.family, get_args(FamilyName))
        _check_transformer(self) if self.family == "seed" else _check_relative(self)

    @property
    def kin(self) -> Family:
        """The row of its family."""
        return FAMILIES[self.family]

    @property
    def inner_dim(self) -> int:
        """Width of the projections: ``heads * dim_head``."""
        return self.heads * self.dim_head

    @property
    def scale(self) -> float:
        """What the similarity is multiplied by: ``dim_head ** -0.5``."""
        return float(self.dim_head**-0.5)

    @property
    def attention(self) -> "LayerSpec":
        """The attention layer inside one transformer block; a bare layer is its own."""
        return replace(self, depth=None, ff_hidden=None, context_ff_hidden=None, final_norms=False)


def _check_relative(spec: LayerSpec) -> None:
    has = {"talking_heads": spec.talking_heads, "prenorm": spec.prenorm, "depth": spec.depth, "final_norms": spec.final_norms}
    has |= {"context_ff_hidden": spec.context_ff_hidden, "ff_hidden": spec.ff_hidden if not spec.kin.feed_forward else None}
    for name, value in has.items():
        if value:
            raise InputError(f"layer.{name} is set, which {spec.kin.title} has not; leave it out")


def _check_transformer(spec: LayerSpec) -> None:
    if spec.depth is None:
        if spec.final_norms or spec.ff_hidden or spec.context_ff_hidden:
            raise InputError("layer.final_norms and layer.ff_hidden belong to the transformer; set layer.depth as well")
        return
    if spec.ff_hidden is None or spec.context_ff_hidden is None:
        raise InputError("layer.depth is set, so layer.ff_hidden and layer.context_ff_hidden must be too")
    if spec.norm != "rms" or not spec.prenorm:
        raise InputError("the transformer always has RMSNorm before its layers; set layer.prenorm and layer.norm = 'rms'")
    if spec.final_norms and spec.context_dim != spec.dim:
        raise InputError(
            f"layer.final_norms with context_dim {spec.context_dim} and dim {spec.dim}: the published transformer builds both "
            "final norms for dim features, so it cannot run when the two differ; use final_norms = false or equal dims"
        )


@dataclass(frozen=True)
class Interface:
    """Which optional inputs and outputs the exported model has.

    Attributes:
        mask: bool input ``mask [batch, x_len]``, true where a position of ``x`` is real.
        context_mask: bool input ``context_mask [batch, context_len]``.
        rel_pos_bias: added to the similarity before masking: ``none``, ``plane`` ``[x_len, context_len]``, ``shared``
            ``[heads, x_len, context_len]`` or ``batch`` ``[batch, heads, x_len, context_len]``.
        attention_maps: outputs ``attn [batch, heads, x_len, context_len]`` and ``context_attn`` of the same shape.

    Raises:
        InputError: an unknown kind of bias.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    mask: bool = True
    context_mask: bool = True
    rel_pos_bias: Bias = "none"
    attention_maps: bool = False

    def __post_init__(self) -> None:
        check_one_of("rel_pos_bias", self.rel_pos_bias, get_args(Bias))

    @property
    def masked(self) -> bool:
        """Whether it has a mask at all."""
        return self.mask or self.context_mask


#: What a layer is exported for where nothing else is said.
LAYER_DIMS = Dims(batch=DimRange(1, 4, 8), x_len=DimRange(1, 512, 2048), context_len=DimRange(1, 512, 2048))


def left_out(interface: Interface | None) -> dict[str, str]:
    """Return what an export left out, by the names that the layer's forward has for it, each with the option that decides.

    Args:
        interface: of the bare layer; a whole model has none, and nothing that could be left out.
    """
    if interface is None:
        return {}
    flags = {field.name: f"--{field.name.replace('_', '-')}" for field in fields(interface)}
    found = {
        name: flag if getattr(interface, name) == "none" else flag.replace("--", "--[no-]", 1)
        for name, flag in flags.items()
        if getattr(interface, name) in (False, "none")
    }
    maps = found.get("attention_maps")
    return found | ({"return_attn": maps, "attn": maps, "context_attn": maps} if maps else {})


def layer_signature(spec: LayerSpec, interface: Interface, dims: Dims = LAYER_DIMS) -> Signature:
    """Return what a model of this layer takes and gives."""
    pairs: tuple[Axis, ...] = ("x_len", "context_len")
    maps: tuple[Axis, ...] = ("batch", spec.heads, *pairs)
    biases: dict[Bias, tuple[Axis, ...]] = {"plane": pairs, "shared": maps[1:], "batch": maps}
    masks = {str(dim): name for dim, name in zip(pairs, MASK_NAMES, strict=True) if getattr(interface, name)}
    inputs = [
        Tensor("x", "float32", ("batch", "x_len", spec.dim)),
        Tensor("context", "float32", ("batch", "context_len", spec.context_dim)),
        *(Tensor(name, "bool", ("batch", dim), fill=True) for dim, name in masks.items()),
    ]
    if interface.rel_pos_bias != "none":
        inputs.append(Tensor("rel_pos_bias", "float32", biases[interface.rel_pos_bias]))
    outputs = [
        Tensor("out", "float32", ("batch", "x_len", spec.dim)),
        Tensor("context_out", "float32", ("batch", "context_len", spec.context_dim)),
    ]
    if interface.attention_maps:
        outputs += [Tensor(name, "float32", maps) for name in ("attn", "context_attn")]
    return Signature(tuple(inputs), tuple(outputs), dims, "batch", masks)
