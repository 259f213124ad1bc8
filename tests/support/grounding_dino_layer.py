"""GroundingDINO's fusion layer with weights that tell: at its initialisation gamma is 1e-4, and hides the attention."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GroundingDinoConfig, MMGroundingDinoConfig
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoFusionLayer
from transformers.models.mm_grounding_dino.modeling_mm_grounding_dino import MMGroundingDinoFusionLayer

DIM, HEADS = 32, 4
PROJECTIONS = ("vision_proj", "text_proj", "values_vision_proj", "values_text_proj", "out_vision_proj", "out_text_proj")


def fusion_layer(dim: int = DIM, heads: int = HEADS, mm: bool = False, wide: int = 4) -> nn.Module:
    """Return a layer of random weights, biases and gammas among them; all heads together are ``wide / 2`` times ``dim``."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "d_model": dim,
        "encoder_ffn_dim": dim * wide,
        "encoder_attention_heads": 2 * heads,
    }
    layer = (
        MMGroundingDinoFusionLayer(MMGroundingDinoConfig(**options))
        if mm
        else GroundingDinoFusionLayer(GroundingDinoConfig(**options))
    )
    with torch.no_grad():
        for name in PROJECTIONS:
            layer.attn.get_submodule(name).bias.normal_(0, 0.3)
        for gamma in (layer.vision_param, layer.text_param):
            gamma.normal_(0.5, 0.15)
        for norm in (layer.layer_norm_vision, layer.layer_norm_text):
            norm.weight.normal_(1, 0.2)
            norm.bias.normal_(0, 0.2)
    return layer.eval()


def sharpen(layer: nn.Module, factor: float, head: int) -> None:
    """Multiply one head's queries."""
    size = layer.attn.head_dim
    rows = slice(head * size, (head + 1) * size)
    with torch.no_grad():
        layer.attn.vision_proj.weight[rows] *= factor
        layer.attn.vision_proj.bias[rows] *= factor


class Fusion(nn.Module):
    """The layer in a model: masks true where real, and the attention maps dropped."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, vision: Tensor, text: Tensor, vision_mask: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        (vision, _), (text, _) = self.layer(vision, text, ~vision_mask, ~text_mask)
        return vision, text


class Bare(Fusion):
    """The attention alone, without the norms before it."""

    def forward(self, vision: Tensor, text: Tensor, vision_mask: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        (vision, _), (text, _) = self.layer.attn(vision, text, ~vision_mask, ~text_mask)
        return vision, text


class Shown(Fusion):
    """The same with an attention map shown."""

    def forward(self, vision: Tensor, text: Tensor, vision_mask: Tensor, text_mask: Tensor) -> tuple[Tensor, ...]:
        (vision, maps), (text, _) = self.layer(vision, text, ~vision_mask, ~text_mask)
        return vision, text, maps


def sample(batch: int, vision_len: int, text_len: int, seed: int = 0, dim: int = DIM) -> dict[str, Tensor]:
    """Return inputs; the first row of every mask is real."""
    generator = torch.Generator().manual_seed(seed)
    masks = {
        "vision_mask": torch.rand(batch, vision_len, generator=generator) > 0.3,
        "text_mask": torch.rand(batch, text_len, generator=generator) > 0.3,
    }
    for mask in masks.values():
        mask[:, 0] = True
    vision = torch.randn(batch, vision_len, dim, generator=generator)
    return {"vision": vision, "text": torch.randn(batch, text_len, dim, generator=generator), **masks}
