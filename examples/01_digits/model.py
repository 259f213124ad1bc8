"""A matcher of two halves of an image, with one bidirectional cross-attention layer between them."""

from collections.abc import Callable

import torch
from data import HALF, PIXELS
from torch import Tensor, nn

from bca_deploy.layers.reference import BidirectionalCrossAttention

# (x, context, mask, context_mask) -> (out, context_out)
Fusion = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class ColumnEmbedding(nn.Module):
    """Pixel columns to features: a linear map, the column's learned position, and a residual MLP."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.pixels = nn.Linear(PIXELS, dim)
        self.position = nn.Parameter(torch.randn(HALF, dim) * 0.2)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, columns: Tensor, mask: Tensor) -> Tensor:
        """Embed ``columns [B, N, 8]``; ``mask [B, N]`` is true on the real ones."""
        # Counted over real columns, so that padding in front does not move them. Padding itself gets any position:
        # nothing that reads it is left after the masks.
        index = (mask.cumsum(1) - 1).clamp(0, HALF - 1)
        features = self.pixels(columns) + self.position[index]
        return features + self.mlp(features)


class Matcher(nn.Module):
    """Scores whether two halves are of one image: a positive logit says yes.

    The two sides are scored apart and the scores added, so whatever depends on the pair has come through ``fusion``.

    Args:
        dim: features of a left column.
        context_dim: features of a right column.
        hidden: width of the MLPs.
        dropout: probability in the two heads, in training only.
    """

    def __init__(self, dim: int = 64, context_dim: int = 48, hidden: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.left = ColumnEmbedding(dim, hidden)
        self.right = ColumnEmbedding(context_dim, hidden)
        self.fusion = BidirectionalCrossAttention(dim=dim, context_dim=context_dim, heads=4, dim_head=16, prenorm=True)
        self.left_head = _head(dim, hidden, dropout)
        self.right_head = _head(context_dim, hidden, dropout)

    def embed(self, left: Tensor, right: Tensor, left_mask: Tensor, right_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fusion layer's ``x`` and ``context``."""
        return self.left(left, left_mask), self.right(right, right_mask)

    def forward(
        self, left: Tensor, right: Tensor, left_mask: Tensor, right_mask: Tensor, fusion: Fusion | None = None
    ) -> Tensor:
        """Return the logits ``[B]``.

        Args:
            left: ``[B, N, 8]``, columns of the left halves.
            right: ``[B, M, 8]``.
            left_mask: bool ``[B, N]``, true on real columns.
            right_mask: bool ``[B, M]``.
            fusion: what to run in place of the trained layer, the exported one for instance.
        """
        x, context = self.embed(left, right, left_mask, right_mask)
        out, context_out = (fusion or self.fusion)(x, context, left_mask, right_mask)
        left_score = _masked_mean(self.left_head(x + out), left_mask)
        return left_score + _masked_mean(self.right_head(context + context_out), right_mask)


def _head(dim: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 1))


def _masked_mean(scores: Tensor, mask: Tensor) -> Tensor:
    return (scores.squeeze(-1) * mask).sum(1) / mask.sum(1)
