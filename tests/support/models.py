"""Whole models as their users write them: the layer among encoders, residuals, pooling and heads.

``KINDS`` has every kind of use that was found, small; ``stack``, ``encoders``, ``maps`` and ``policy`` make them of any size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (its name everywhere)
from bidirectional_cross_attention import BidirectionalCrossAttention as Published
from bidirectional_cross_attention import BidirectionalCrossAttentionTransformer as Transformer
from einops import rearrange
from torch import Generator, Tensor, nn

from bca_deploy.layers.reference import BidirectionalCrossAttention

Sizes = Mapping[str, int]
Dims = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Input:
    """An argument of forward: a name for every axis that varies, a size for the others, and how to draw it."""

    shape: tuple[str | int, ...]
    draw: Callable[[Generator, tuple[int, ...]], Tensor]

    @property
    def axes(self) -> tuple[str | None, ...]:
        """The names; None where the axis is fixed."""
        return tuple(axis if isinstance(axis, str) else None for axis in self.shape)


@dataclass(frozen=True)
class Kind:
    """A whole model with its inputs.

    Attributes:
        name: in tests' ids.
        build: makes the module; :meth:`make` seeds it.
        inputs: by forward's argument names.
        dims: smallest, usual and largest size of each named dimension.
        layers: paths of the layers inside, wrappers left out; one that has two names is here once.
        literal: those whose attention maps are used, so that no fused graph can take their place.
        masks: the masks that are integers, with the dimension that they mask.
        newer: what torch writes as opset 18 when it is asked for 17.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Mapping[str, Input]
    dims: Dims
    layers: tuple[str, ...]
    literal: tuple[str, ...] = ()
    masks: Mapping[str, str] = field(default_factory=dict)
    newer: tuple[str, ...] = ()

    @property
    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """The named axes of every input."""
        return {name: given.axes for name, given in self.inputs.items()}

    def make(self, seed: int = 0) -> nn.Module:
        """The model with seeded weights, in evaluation mode."""
        return seeded(self.build, seed)

    def sample(self, seed: int, sizes: Sizes) -> dict[str, Tensor]:
        """Inputs as their users have them: every item of a batch has something real."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {name: tuple(sizes.get(a, a) for a in given.shape) for name, given in self.inputs.items()}
        return {name: given.draw(generator, shapes[name]) for name, given in self.inputs.items()}

    def pair(self) -> list[dict[str, Tensor]]:
        """Two samples that differ in the size of every named axis, no two axes alike."""
        return [self.sample(seed, self.sizes()[which]) for seed, which in enumerate(("odd", "even"))]

    def sizes(self) -> dict[str, dict[str, int]]:
        """The sizes at which code that looks at lengths goes wrong."""
        every = {
            "min": [low for low, _, _ in self.dims.values()],
            "odd": [3, 5, 7],
            "even": [2, 4, 6],
            "equal": [5, 5, 5],
            "unequal": [2, 8, 3],
            "max": [high for _, _, high in self.dims.values()],
        }
        return {which: dict(zip(self.dims, found, strict=False)) for which, found in every.items()}


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build with seeded weights. Norms and biases are random too, or half of the mistakes would not show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.normal_(0.5, 0.3)
    return module.eval()


# ---- what the inputs are


def normal(*shape: str | int) -> Input:
    return Input(shape, lambda generator, size: torch.randn(size, generator=generator))


def _padding(generator: Generator, size: tuple[int, ...]) -> Tensor:
    lengths = torch.randint(1, size[1] + 1, (size[0], 1), generator=generator)
    return torch.arange(size[1]) < lengths


def padding(*shape: str | int) -> Input:
    """A mask as padding to the longest item gives it: true, then false."""
    return Input(shape, _padding)


def tokens(vocabulary: int, *shape: str | int) -> Input:
    """Numbers of words, where 0 pads."""

    def draw(generator: Generator, size: tuple[int, ...]) -> Tensor:
        return torch.randint(1, vocabulary, size, generator=generator) * _padding(generator, size)

    return Input(shape, draw)


def int_padding(*shape: str | int) -> Input:
    return Input(shape, lambda generator, size: _padding(generator, size).long())


def dims(**lengths: tuple[int, int, int]) -> Dims:
    return {"batch": (1, 2, 8), **lengths}


SHORT = (1, 7, 9)


# ---- (a) fusion blocks, one on the other


def feed_forward(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class Block(nn.Module):
    def __init__(self, layer: Callable[..., nn.Module], dim: int, context_dim: int, **options: int) -> None:
        super().__init__()
        self.attend = layer(dim=dim, context_dim=context_dim, prenorm=True, **options)
        self.ff, self.context_ff = feed_forward(dim), feed_forward(context_dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor, context_mask: Tensor) -> tuple[Tensor, Tensor]:
        delta, context_delta = self.attend(x, context, context_mask=context_mask, mask=mask)
        x, context = x + delta, context + context_delta
        return x + self.ff(x), context + self.context_ff(context)


class Stack(nn.Module):
    def __init__(self, layer: Callable[..., nn.Module], dim: int, context_dim: int, **options: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(layer, dim, context_dim, **options) for _ in range(2))

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x, context = block(x, context, mask, context_mask)
        return x, context


def pairs_of(dim: int, context_dim: int) -> dict[str, Input]:
    """What the layer itself takes, with both masks."""
    return {
        "x": normal("batch", "x_len", dim),
        "context": normal("batch", "context_len", context_dim),
        "mask": padding("batch", "x_len"),
        "context_mask": padding("batch", "context_len"),
    }


def stack(layer: Callable[..., nn.Module], found: Dims, dim: int, context_dim: int, **options: int) -> Kind:
    return Kind(
        "stack",
        lambda: Stack(layer, dim, context_dim, **options),
        pairs_of(dim, context_dim),
        found,
        layers=("blocks.0.attend", "blocks.1.attend"),
    )


# ---- (b) one video frame and the sound around it


class Synced(NamedTuple):
    score: Tensor
    heard: Tensor
    sound: Tensor


class Clip(nn.Module):
    def __init__(self, video: int, audio: int) -> None:
        super().__init__()
        self.gated = nn.Linear(audio, 2 * audio)
        self.attend = BidirectionalCrossAttention(dim=video, context_dim=audio, heads=3, dim_head=8)
        self.head = nn.Linear(video + audio, 1)

    def forward(self, video: Tensor, audio: Tensor) -> Synced:
        heard = (audio != 0).any(-1).any(-1)
        audio = F.pad(audio, (0, 0, 0, audio.shape[1] % 2))  # pairs of frames are averaged, so there must be an even number
        value, gate = self.gated(audio.unflatten(1, (-1, 2)).mean(2)).chunk(2, dim=-1)
        audio = value * gate.sigmoid()
        real = torch.ones(1, 1, dtype=torch.bool)
        frame, sound = self.attend(video, audio, real, real)
        pooled = torch.cat([frame.mean(1), sound.mean(1)], dim=-1)
        return Synced(self.head(pooled).squeeze(-1), heard, sound.mean(dim=1))


CLIP = Kind(
    "clip",
    lambda: Clip(24, 16),
    {"video": normal("batch", 1, 24), "audio": normal("batch", "audio_len", 16)},
    dims(audio_len=SHORT),
    layers=("attend",),
    newer=("Pad", "ReduceMax", "ReduceMean", "Split"),
)


# ---- (c) two encoders, the layer, pooling, a head


def masked_mean(features: Tensor, mask: Tensor) -> Tensor:
    real = mask.unsqueeze(-1).to(features.dtype)
    return (features * real).sum(1) / real.sum(1).clamp(min=1)


class Residual(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.wide, self.norm, self.narrow = (
            nn.Conv1d(dim, dim, 5, padding=2),
            nn.BatchNorm1d(dim),
            nn.Conv1d(dim, dim, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.norm(self.wide(x)).relu())


class Encoders(nn.Module):
    """Signals against words; ``depth`` blocks of PyTorch's own encoder on the words."""

    def __init__(self, dim: int, heads: int, depth: int, channels: int, vocabulary: int) -> None:
        super().__init__()
        self.signal = nn.Sequential(nn.Conv1d(channels, dim, 7, padding=3), Residual(dim), Residual(dim))
        self.words = nn.Embedding(vocabulary, dim)
        block = nn.TransformerEncoderLayer(dim, heads, 2 * dim, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False) if depth else None
        self.attend = Published(dim=dim, heads=heads, dim_head=dim // heads)
        self.norm, self.word_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.head = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Dropout(0.1), nn.Linear(dim, 1))

    def forward(self, signal: Tensor, words: Tensor, signal_mask: Tensor, word_mask: Tensor) -> dict[str, Tensor | None]:
        x, context = self.signal(signal).transpose(1, 2), self.words(words)
        if self.encoder is not None:
            context = self.encoder(context, src_key_padding_mask=~word_mask)
        delta, context_delta = self.attend(x, context, signal_mask, word_mask)
        x, context = self.norm(x + delta), self.word_norm(context + context_delta)
        pooled = torch.cat([masked_mean(x, signal_mask), masked_mean(context, word_mask)], dim=-1)
        return {"loss": None, "score": self.head(pooled).squeeze(-1), "features": x}


def encoders(found: Dims, dim: int, heads: int, depth: int, channels: int = 5, vocabulary: int = 26) -> Kind:
    return Kind(
        "encoders",
        lambda: Encoders(dim, heads, depth, channels, vocabulary),
        {
            "signal": normal("batch", channels, "signal_len"),
            "words": tokens(vocabulary, "batch", "word_len"),
            "signal_mask": padding("batch", "signal_len"),
            "word_mask": padding("batch", "word_len"),
        },
        found,
        layers=("attend",),
    )


# ---- (d) image regions and words, every image against every text


@dataclass
class Contrast:  # not frozen and not registered with torch: as people write it
    logits: Tensor
    scale: Tensor
    images: Tensor
    texts: Tensor


class Contrastive(nn.Module):
    def __init__(self, region_dim: int, dim: int, vocabulary: int) -> None:
        super().__init__()
        self.regions, self.words = nn.Linear(region_dim, dim), nn.Embedding(vocabulary, dim, padding_idx=0)
        self.attend = BidirectionalCrossAttention(dim=dim, heads=4, dim_head=8, prenorm=True)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, regions: Tensor, words: Tensor) -> Contrast:
        real = words != 0
        x, context = self.regions(regions), self.words(words)
        delta, context_delta = self.attend(x=x, context=context, context_mask=real)
        images = F.normalize((x + delta).amax(dim=1), dim=-1)
        texts = F.normalize(masked_mean(context + context_delta, real), dim=-1)
        scale = self.logit_scale.exp()
        return Contrast(scale * images @ texts.T, scale, images, texts)


CONTRASTIVE = Kind(
    "contrastive",
    lambda: Contrastive(20, 32, 40),
    {"regions": normal("batch", "regions", 20), "words": tokens(40, "batch", "word_len")},
    dims(regions=SHORT, word_len=SHORT),
    layers=("attend",),
    newer=("ReduceL2", "ReduceMax"),
)


# ---- (e) feature maps of any height and width


class Maps(nn.Module):
    def __init__(self, channels: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.color, self.depth = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(1, channels, 3, padding=1)
        self.attend = Published(dim=channels, heads=heads, dim_head=dim_head, prenorm=True)
        self.head = nn.Sequential(nn.Conv2d(2 * channels, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, 2, 1))

    def forward(self, color: Tensor, depth: Tensor) -> Tensor:
        x, context = self.color(color), self.depth(depth)
        height, width = x.shape[-2:]
        delta, other = self.attend(x.flatten(2).transpose(1, 2), rearrange(context, "b c h w -> b (h w) c"))
        x = x + delta.transpose(1, 2).reshape(x.shape)
        context = context + rearrange(other, "b (h w) c -> b c h w", h=height, w=width)
        return self.head(torch.cat([x, context], dim=1))


def maps(found: Dims, channels: int, heads: int, dim_head: int) -> Kind:
    inputs = {"color": normal("batch", 3, "height", "width"), "depth": normal("batch", 1, "height", "width")}
    build = lambda: Maps(channels, heads, dim_head)  # noqa: E731
    return Kind("maps", build, inputs, found, layers=("attend",), newer=("ReduceMean",))


# ---- (f) the published transformer in a policy


class Policy(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int, vocabulary: int, frame_dim: int, actions: int) -> None:
        super().__init__()
        self.words, self.frames = nn.Embedding(vocabulary, dim), nn.Linear(frame_dim, dim)
        self.fusion = Transformer(dim=dim, depth=2, heads=heads, dim_head=dim_head)
        self.head = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, actions))

    def forward(self, words: Tensor, frames: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, context = self.fusion(self.words(words), self.frames(frames), mask=mask)
        return self.head(x.mean(dim=1)), context.mean(dim=1)


def policy(found: Dims, dim: int, heads: int, dim_head: int, vocabulary: int = 1000, frame_dim: int = 48) -> Kind:
    return Kind(
        "policy",
        lambda: Policy(dim, heads, dim_head, vocabulary, frame_dim, actions=7),
        {
            "words": tokens(vocabulary, "batch", "word_len"),
            "frames": normal("batch", "frame_len", frame_dim),
            "mask": padding("batch", "word_len"),
        },
        found,
        layers=("fusion",),
        newer=("ReduceMean",),
    )


# ---- (g) one layer, called twice, and where it looked


class Twice(nn.Module):
    def __init__(self, dim: int, context_dim: int, longest: int) -> None:
        super().__init__()
        self.attend = Published(dim=dim, context_dim=context_dim, heads=2, dim_head=8, prenorm=True)
        self.bias = nn.Parameter(torch.randn(2, longest, longest))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor, context_mask: Tensor) -> tuple[Tensor, ...]:
        bias = self.bias[:, : x.shape[1], : context.shape[1]]
        looked = []
        for _ in range(2):
            delta, other, attn, _ = self.attend(x, context, mask, context_mask, return_attn=True, rel_pos_bias=bias)
            x, context = x + delta, context + other
            looked.append(attn.mean(dim=1))
        return x, context, *looked


TWICE = Kind(
    "twice",
    lambda: Twice(24, 16, longest=12),
    pairs_of(24, 16),
    dims(x_len=SHORT, context_len=SHORT),
    layers=("attend",),
    literal=("attend",),
    newer=("ReduceMean",),
)


# ---- (h) a text encoder that no one here wrote


class Grounded(nn.Module):
    """Image regions and a BERT, whose mask is of integers."""

    def __init__(self, region_dim: int, dim: int, vocabulary: int) -> None:
        from transformers import BertConfig, BertModel  # seconds to import

        super().__init__()
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 16}
        self.bert = BertModel(BertConfig(vocab_size=vocabulary, hidden_size=dim, **sizes), add_pooling_layer=False)
        self.attend = BidirectionalCrossAttention(dim=region_dim, context_dim=dim, heads=2, dim_head=8)
        self.head = nn.Linear(region_dim + dim, 3)

    def forward(self, regions: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        text = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        seen, said = self.attend(regions, text, context_mask=attention_mask.bool())
        return self.head(torch.cat([(regions + seen).mean(dim=1), masked_mean(text + said, attention_mask)], dim=-1))


BERT = Kind(
    "bert",
    lambda: Grounded(20, 32, 60),
    {
        "regions": normal("batch", "regions", 20),
        "input_ids": tokens(60, "batch", "text_len"),
        "attention_mask": int_padding("batch", "text_len"),
    },
    dims(regions=SHORT, text_len=SHORT),
    layers=("attend",),
    masks={"attention_mask": "text_len"},
    newer=("ReduceMean",),
)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        stack(BidirectionalCrossAttention, dims(x_len=SHORT, context_len=SHORT), 24, 16, heads=3, dim_head=8),
        CLIP,
        encoders(dims(signal_len=SHORT, word_len=SHORT), dim=32, heads=4, depth=0),
        CONTRASTIVE,
        maps(dims(height=SHORT, width=SHORT), channels=16, heads=2, dim_head=8),
        policy(dims(word_len=SHORT, frame_len=SHORT), dim=24, heads=2, dim_head=8, vocabulary=50, frame_dim=18),
        TWICE,
        BERT,
    )
}
