"""What a model is held against knows the range of its precision."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bca_deploy.errors import InputError
from bca_deploy.layers.reference import BidirectionalCrossAttention
from bca_deploy.whole.find import find
from bca_deploy.whole.swap import plain_copy
from bca_deploy.whole_parity.yardstick import Yardstick


class Model(nn.Module):
    """One layer whose queries are multiplied."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.cross = BidirectionalCrossAttention(dim=8, heads=2, dim_head=4)
        with torch.no_grad():
            self.cross.to_qk.weight *= factor

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return self.cross(x, context)


def yardstick(factor: float) -> Yardstick:
    torch.manual_seed(0)
    model = plain_copy(Model(factor))
    return Yardstick(model, find(model), "fp16")


INPUTS = {name: np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32) for name in ("x", "context")}


def test_logits_beyond_float16_are_refused_by_the_layer_and_the_sample() -> None:
    said = r"precision fp16: the logits of cross reach .* in sample 1, and float16 ends at 65504; take bf16 or fp32"
    with pytest.raises(InputError, match=said):
        yardstick(1e6).check_range(INPUTS, "sample 1")


def test_sharp_logits_within_float16_are_taken() -> None:
    yardstick(1e3).check_range(INPUTS, "sample 1")
