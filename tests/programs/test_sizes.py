"""The sizes that a program was exported for: what is declared outside of them is refused in plain words."""

from pathlib import Path

import pytest
import torch
from support.programs import AUTO, saved
from torch import Tensor, nn

from bca_deploy.errors import ExportError, InputError
from bca_deploy.programs.read import ExportedModel, read
from bca_deploy.signature import Axis, DimRange, Dims

AXES: dict[str, tuple[Axis, ...]] = {"x": ("batch", "x_len", 4), "y": ("batch", "y_len", 4)}
ALL = {"x": {0: AUTO, 1: AUTO}, "y": {0: AUTO, 1: AUTO}}


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kind == "branch":
            return x.sum(1) if x.shape[1] > 4 else y.sum(1)
        if self.kind == "pairs":
            return x.unflatten(1, (-1, 2)).sum(2).sum(1) + y.sum(1)
        if self.kind == "equal":
            return (x + y).sum(1)
        if self.kind == "batches":
            return x.sum(1).sum(0) + y.sum(1).sum(0)
        return x.sum(1) + y.sum(1)


def program(tmp_path: Path, kind: str, dynamic: object = ALL, x_len: int = 6, y_len: int = 5) -> ExportedModel:
    given = {"x": torch.randn(3, x_len, 4), "y": torch.randn(3, y_len, 4)}
    return read(saved(Model(kind), given, dynamic, tmp_path / "a.pt2", ()))  # type: ignore[arg-type]


def dims(**sizes: tuple[int, int, int]) -> Dims:
    return Dims({name: DimRange(*range_) for name, range_ in {"batch": (1, 2, 8), **sizes}.items()})


WIDE = dims(x_len=(1, 8, 64), y_len=(1, 8, 64))


@pytest.mark.parametrize("kind", ["plain", "batches"])
def test_every_size_of_a_dynamic_program_is_taken(tmp_path: Path, kind: str) -> None:
    program(tmp_path, kind).sizes.check(AXES, WIDE)


def refused(made: ExportedModel, axes: dict[str, tuple[Axis, ...]] = AXES, declared: Dims = WIDE) -> str:
    with pytest.raises(ExportError) as found:
        made.sizes.check(axes, declared)
    return str(found.value)


def test_a_branch_on_a_length_is_told_with_the_range_that_holds(tmp_path: Path) -> None:
    made = program(tmp_path, "branch")
    said = refused(made)
    assert "x_len 1 to 4: the exported program (line unknown) works only where x_len >= 5; declare `--dim x_len=5:8:64`" in said
    made.sizes.check(AXES, dims(x_len=(5, 8, 64), y_len=(1, 8, 64)))


def test_a_length_that_must_be_even_is_told(tmp_path: Path) -> None:
    assert "x_len that is no multiple of 2: the exported program (line unknown)" in refused(program(tmp_path, "pairs"))


def test_lengths_that_must_be_equal_are_told(tmp_path: Path) -> None:
    made = program(tmp_path, "equal", y_len=6)
    assert "x_len and y_len must be equal: the exported program (line unknown)" in refused(made)
    made.sizes.check({"x": ("batch", "n", 4), "y": ("batch", "n", 4)}, dims(n=(1, 8, 64)))


def test_batches_that_may_differ_are_two_dimensions(tmp_path: Path) -> None:
    axes: dict[str, tuple[Axis, ...]] = {"x": ("batch", "x_len", 4), "y": ("other", "y_len", 4)}
    declared = dims(x_len=(1, 8, 64), y_len=(1, 8, 64), other=(1, 2, 8))
    program(tmp_path, "batches").sizes.check(axes, declared)
    assert "batch and other must be equal" in refused(program(tmp_path, "plain"), axes, declared)


def test_a_range_that_the_exporter_was_given_is_told(tmp_path: Path) -> None:
    length = torch.export.Dim("length", min=4, max=32)
    made = program(tmp_path, "plain", {"x": {0: AUTO, 1: length}, "y": {0: AUTO, 1: AUTO}})
    said = refused(made)
    assert "x_len 1 to 3: the exported program (line unknown)" in said
    assert "33 to 64" in said
    made.sizes.check(AXES, dims(x_len=(4, 8, 32), y_len=(1, 8, 64)))
    with pytest.raises(InputError, match="axis 1 of x is 40, and the file holds for 4 to 32"):
        made(x=torch.ones(2, 40, 4), y=torch.ones(2, 3, 4))


def test_an_axis_that_the_file_fixes_is_told_with_the_way_out(tmp_path: Path) -> None:
    made = program(tmp_path, "plain", {"x": {0: AUTO}, "y": {0: AUTO, 1: AUTO}})
    said = refused(made)
    assert "axis 1 of x is x_len here, and the file fixes it at 6; give samples of that size alone" in said
    assert "dynamic_shapes={'x': {1: torch.export.Dim.AUTO}}" in said
    made.sizes.check({"x": ("batch", 6, 4), "y": ("batch", "y_len", 4)}, dims(y_len=(1, 8, 64)))


def test_another_number_of_axes_is_told(tmp_path: Path) -> None:
    said = refused(program(tmp_path, "plain"), {"x": ("batch", 4), "y": AXES["y"]}, dims(y_len=(1, 8, 64)))
    assert said == "x has 2 axes in the samples, and 3 in the file"


def test_a_fixed_axis_outside_of_a_condition_is_told(tmp_path: Path) -> None:
    made = program(tmp_path, "branch")
    said = refused(made, {"x": ("batch", 3, 4), "y": AXES["y"]}, dims(y_len=(1, 8, 64)))
    assert "the exported program (line unknown) works only where x.shape[1] >= 5" in said


def test_a_condition_of_a_file_is_read_and_never_run(tmp_path: Path) -> None:
    made = program(tmp_path, "plain")
    for planted in ("__import__('os').system('true') == 0", "L['z'].size()[0] > 3", "L['x'].size()[1] >", "f(3) > 2"):
        object.__setattr__(made.sizes, "guards", (planted,))
        assert "which is not understood; give the code that made it" in refused(made)
