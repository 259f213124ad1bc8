"""Small layers with seeded weights."""

import torch

from bca_deploy.layers.checkpoint import Checkpoint, from_module
from bca_deploy.layers.reference import build
from bca_deploy.spec import LayerSpec

#: Ranges for a quick export.
DIMS = {"batch": {"min": 1, "opt": 2, "max": 4}} | {n: {"min": 1, "opt": 7, "max": 9} for n in ("x_len", "context_len")}
SMALL = {"dim": 24, "context_dim": 16, "heads": 3, "dim_head": 8}


def make_spec(**changes: object) -> LayerSpec:
    """A small layer whose sizes are all different, so that a mixed-up axis shows."""
    return LayerSpec(**{**SMALL, **changes})  # type: ignore[arg-type]


def make_checkpoint(seed: int = 0, **changes: object) -> Checkpoint:
    """The small layer with seeded weights; norms and biases are random too, or half of the mistakes would not show."""
    torch.manual_seed(seed)
    module = build(make_spec(**changes))
    for parameter in module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return from_module(module)
