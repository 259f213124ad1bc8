"""A model run in PyTorch as graphs round it, and its layers' calls watched."""

import numpy as np
import torch
from torch import nn

from bca_deploy.whole_parity.evaluate import BiasApart, Evaluator
from bca_deploy.whole_parity.yardstick import Yardstick


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 32)


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(linear() for _ in range(1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_a_bias_apart_is_added_to_a_rounded_product() -> None:
    layer, x = linear().half(), torch.randn(50, 64).half()
    with BiasApart(), torch.no_grad():
        got = layer(x)
    with torch.no_grad():
        assert torch.equal(got, torch.nn.functional.linear(x, layer.weight) + layer.bias)
        assert not torch.equal(got, layer(x))


def test_in_half_precision_the_measure_is_the_worse_of_both_ways_to_round() -> None:
    model, inputs = (
        Layered().eval(),
        {"x": np.random.default_rng(0).standard_normal((200, 64)).astype(np.float16).astype(np.float32)},
    )
    trial = Yardstick(model, (), "fp16").hearings(inputs, 0)["output"].trial
    evaluator = Evaluator(model.half(), (), torch.float16)
    ways = [evaluator.run(inputs).outputs["output"], evaluator.run_with_bias_apart(inputs).outputs["output"]]
    errors = [float(np.square(way - trial.truth["output"]).sum()) for way in ways]
    assert errors[1] > errors[0]
    np.testing.assert_array_equal(trial.peers[0]["output"], ways[1])
