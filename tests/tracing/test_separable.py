"""A mask of pairs gives its sides back: the same numbers, and nothing as large as the pairs is reduced."""

import pytest
import torch
from torch import Tensor, nn

from bca_deploy.layers.isolation import exporter_alone
from bca_deploy.signature import DimRange, Dims
from bca_deploy.tracing.program import export_program
from bca_deploy.tracing.separable import separate

AXES = {"one": ("batch", "n"), "other": ("batch", "m")}
DIMS = Dims(batch=DimRange(1, 2, 4), n=DimRange(1, 5, 9), m=DimRange(1, 6, 9))


def outer(one: Tensor, other: Tensor) -> Tensor:
    return one[:, :, None] & other[:, None, :]


FORMS = {
    "pairs": outer,
    "with heads": lambda one, other: outer(one, other)[:, None],
    "columns first": lambda one, other: outer(other, one).transpose(1, 2).transpose(1, 2).transpose(1, 2),
    "logical": lambda one, other: torch.logical_and(one[:, :, None], other[:, None, :]),
    "column masks": lambda one, other: one.unsqueeze(-1) & other.unsqueeze(-1).transpose(-1, -2),
}


class Reduced(nn.Module):
    """Asks a mask of pairs for its sides."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        pairs = FORMS[self.form](one, other)
        pairs = pairs if pairs.ndim == 3 else pairs[:, 0]
        return pairs.any(-1), pairs.any(-2)


def program(form: str):  # type: ignore[no-untyped-def]
    inputs = {"one": torch.ones(3, 5, dtype=torch.bool), "other": torch.ones(3, 6, dtype=torch.bool)}
    with exporter_alone():
        found = export_program(Reduced(form).eval(), inputs, AXES, DIMS).exported
        separate(found)
    return found


def largest_reduced(found) -> int:  # type: ignore[no-untyped-def]
    any_ = torch.ops.aten.any.dim
    return max(node.args[0].meta["val"].numel() for node in found.graph.nodes if node.target == any_)


@pytest.mark.parametrize("form", FORMS)
def test_the_sides_of_a_mask_of_pairs_are_what_they_were(form: str) -> None:
    found = program(form).module()
    generator = torch.Generator().manual_seed(0)
    for batch, n, m in ((1, 1, 1), (2, 5, 6), (4, 9, 3)):
        one = torch.rand(batch, n, generator=generator) > 0.5
        other = torch.rand(batch, m, generator=generator) > 0.5
        one[0] = False
        for got, wanted in zip(found(one=one, other=other), Reduced(form)(one, other), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("form", ["pairs", "with heads", "logical"])
def test_no_reduction_reads_all_pairs(form: str) -> None:
    assert largest_reduced(program(form)) <= 3 * 6


def test_what_is_no_product_of_sides_is_left_alone() -> None:
    class Free(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return (outer(one, other) | outer(one, ~other)).any(-1)

    inputs = {"one": torch.ones(3, 5, dtype=torch.bool), "other": torch.ones(3, 6, dtype=torch.bool)}
    with exporter_alone():
        found = export_program(Free().eval(), inputs, AXES, DIMS).exported
        separate(found)
    one, other = torch.rand(2, 4) > 0.5, torch.rand(2, 3) > 0.5
    assert torch.equal(found.module()(one=one, other=other), Free()(one, other))
