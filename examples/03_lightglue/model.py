"""LightGlue as one function of tensors: nine layers and the assignment, everything that a graph can hold."""

from published import matcher
from torch import Tensor, nn


class Matcher(nn.Module):
    """Scores every pair of keypoints of two images.

    Args:
        features: whose descriptors it was trained for: ``disk`` or ``aliked``.
    """

    def __init__(self, features: str = "disk") -> None:
        super().__init__()
        glue = matcher(features)
        self.project, self.position = glue.input_proj, glue.posenc
        self.layers, self.assignment = glue.transformers, glue.log_assignment[-1]

    def forward(self, keypoints0: Tensor, descriptors0: Tensor, keypoints1: Tensor, descriptors1: Tensor) -> Tensor:
        """Return the logarithms of the assignment, ``[B, N + 1, M + 1]``; the last row and column say "unmatched".

        Args:
            keypoints0: ``[B, N, 2]``, x and y, from -1 to 1 along the longer side of the image.
            descriptors0: ``[B, N, 128]``.
            keypoints1: ``[B, M, 2]``, of the other image.
            descriptors1: ``[B, M, 128]``.
        """
        x0, x1 = self.project(descriptors0), self.project(descriptors1)
        at0, at1 = self.position(keypoints0), self.position(keypoints1)
        for layer in self.layers:
            x0, x1 = layer(x0, x1, at0, at1)
        scores: Tensor = self.assignment(x0, x1)[0]
        return scores


def aliked() -> Matcher:
    """Return the matcher that was trained for ALIKED's descriptors."""
    return Matcher("aliked")
