"""A .pt2 file is a module like any other: the same function, weights and layers, in any precision and at any size."""

import copy
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import KINDS, masked_mean, seeded
from support.programs import AUTO, saved, saved_kind
from torch import Tensor, nn

from bca_deploy.errors import CheckpointError, InputError, ParityError
from bca_deploy.layers.reference import BidirectionalCrossAttention
from bca_deploy.programs.pieces import Piece
from bca_deploy.programs.read import ExportedModel, read
from bca_deploy.whole.factory import load_into, make
from bca_deploy.whole.find import find
from bca_deploy.whole.samples import named_outputs

FAST = ("stack", "maps", "twice")
MADE = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in ("policy", "encoders", "bert"))]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def file(name: str) -> Path:
        if name not in made:
            made[name] = saved_kind(KINDS[name], tmp_path_factory.mktemp("programs") / f"{name}.pt2")
        return made[name]

    return file


def results(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return named_outputs(model(**{name: tensor.clone() for name, tensor in given.items()}))


def held(program: nn.Module, model: nn.Module, given: dict[str, Tensor], share: float) -> None:
    got, wanted = results(program, given), results(model, given)
    assert list(got) == list(wanted)
    for name, true in wanted.items():
        torch.testing.assert_close(got[name], true, rtol=share, atol=share * float(true.abs().max()))


@pytest.mark.parametrize("name", MADE)
def test_a_program_is_the_model_that_was_saved_at_every_size(name: str, files: Callable[[str], Path]) -> None:
    kind = KINDS[name]
    model, program = kind.make(), read(files(name))
    assert type(program).__name__ == type(model).__name__
    assert program.state_dict().keys() == model.state_dict().keys()
    for which, sizes in kind.sizes().items():
        held(program, model, kind.sample(7, sizes), 1e-5)
        assert which


@pytest.mark.parametrize("name", MADE)
def test_its_layers_are_found_and_proven_as_the_live_model_s_are(name: str, files: Callable[[str], Path]) -> None:
    live, program = find(KINDS[name].make()), find(read(files(name)))
    assert [each.path for each in program] == [each.path for each in live]
    assert [each.checkpoint.spec for each in program] == [each.checkpoint.spec for each in live]
    for each, other in zip(program, live, strict=True):
        assert all(torch.equal(each.checkpoint.state[key], tensor) for key, tensor in other.checkpoint.state.items())
        assert each.proof.cases >= 4
        assert each.proof.worst < 1e-9


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-12), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_a_program_with_casts_runs_in_any_precision(dtype: torch.dtype, share: float, files: Callable[[str], Path]) -> None:
    kind = KINDS["encoders"]
    given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in kind.sample(7, kind.sizes()["odd"]).items()}
    program, model = read(files("encoders")).to(dtype), kind.make().to(dtype)
    assert all(tensor.dtype == dtype for tensor in results(program, given).values())
    held(program, model, given, share)


def test_a_copy_is_a_program_of_its_own(files: Callable[[str], Path]) -> None:
    kind, program = KINDS["twice"], read(files("twice"))
    given = kind.sample(7, kind.sizes()["odd"])
    before = results(program, given)
    copied = copy.deepcopy(program).double()
    assert {tensor.dtype for tensor in copied.state_dict().values()} == {torch.float64}
    assert {tensor.dtype for tensor in program.state_dict().values()} == {torch.float32}
    assert all(torch.equal(tensor, before[name]) for name, tensor in results(program, given).items())


@pytest.mark.parametrize("name", ["twice", "stack"])
def test_other_weights_are_loaded_strictly_by_the_model_s_names(
    name: str, files: Callable[[str], Path], tmp_path: Path
) -> None:
    kind = KINDS[name]
    other, program = kind.make(seed=9), read(files(name))
    torch.save(other.state_dict(), tmp_path / "new.pt")
    load_into(program, tmp_path / "new.pt")
    held(program, other, kind.sample(7, kind.sizes()["odd"]), 1e-5)
    assert [each.proof.worst < 1e-9 for each in find(program)] == [True] * len(kind.layers)
    torch.save({key: t for key, t in other.state_dict().items() if "to_qk" not in key}, tmp_path / "few.pt")
    with pytest.raises(CheckpointError, match=r"missing key .*to_qk"):
        load_into(program, tmp_path / "few.pt")


def test_no_code_of_the_model_s_is_needed_or_run(files: Callable[[str], Path], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom bca_deploy.programs.read import read\n"
        "from bca_deploy.whole.find import find\n"
        "print(*[each.path for each in find(read(Path(sys.argv[1])))])\nassert 'support' not in sys.modules\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, files("stack")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["blocks.0.attend", "blocks.1.attend"], done.stderr


# ---- models of this file


class Small(nn.Module):
    """A layer, called as ``how`` says, and a head."""

    def __init__(self, layer: nn.Module | None = None, how: str = "by name") -> None:
        super().__init__()
        self.layer = layer or BidirectionalCrossAttention(dim=8, context_dim=6, heads=2, dim_head=4)
        self.head, self.how = nn.Linear(8, 3), how

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.how == "by place":
            found, _ = self.layer(x, context, mask)
        elif self.how == "one by one":
            once, other = self.layer(x, context, mask=mask)
            found, _ = self.layer(x + once, context + other, mask=mask)
        elif self.how == "broadcast mask":
            found, _ = self.layer(x, context, mask=torch.ones(1, 1, dtype=torch.bool))
        else:
            found, _ = self.layer(context=context, x=x, mask=mask)
        return self.head(found if mask is None else masked_mean(found, mask))


def small(batch: int = 2) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 5, 8), "context": torch.randn(batch, 4, 6), "mask": torch.rand(batch, 5) < 0.7}


EVERY = {"x": {0: AUTO, 1: AUTO}, "context": {0: AUTO, 1: AUTO}, "mask": {0: AUTO, 1: AUTO}}


def program(tmp_path: Path, model: nn.Module, layers: tuple[str, ...] = ("layer",), **options: Any) -> ExportedModel:
    inputs, dynamic = options.get("inputs", small()), options.get("dynamic", EVERY)
    return read(saved(model.eval(), inputs, dynamic, tmp_path / "a.pt2", layers))


@pytest.mark.parametrize("how", ["by name", "by place", "one by one"])
def test_a_layer_is_taken_however_it_was_called(tmp_path: Path, how: str) -> None:
    model = seeded(lambda: Small(how=how))
    made = program(tmp_path, model)
    (found,) = find(made)
    assert (found.path, found.checkpoint.spec.heads) == ("layer", 2)
    held(made, model, small(3), 1e-5)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_the_number_of_heads_is_what_the_layer_does(tmp_path: Path, heads: int) -> None:
    layer = seeded(lambda: BidirectionalCrossAttention(dim=8, context_dim=6, heads=heads, dim_head=8 // heads, prenorm=True))
    (found,) = find(program(tmp_path, Small(layer)))
    assert found.checkpoint.spec.heads == heads
    assert found.checkpoint.spec == find(layer)[0].checkpoint.spec


def test_a_batch_that_is_fixed_at_1_is_taken(tmp_path: Path) -> None:
    dynamic = {name: {1: AUTO} for name in EVERY}
    (found,) = find(program(tmp_path, seeded(Small), inputs=small(1), dynamic=dynamic))
    assert found.proof.worst < 1e-9


class Filled(BidirectionalCrossAttention):
    """Zeros where the layer has a mean."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, context_out = super().forward(*args, **kwargs)
        return out * kwargs["mask"][..., None], context_out


def test_a_layer_that_does_something_else_is_refused_with_the_case(tmp_path: Path) -> None:
    layer = Filled(dim=8, context_dim=6, heads=2, dim_head=4)
    with pytest.raises(ParityError, match=r"layer: .*rows that have no live key.*--keep-literal layer"):
        find(program(tmp_path, Small(layer)))


def test_a_layer_whose_calls_are_not_kept_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = seeded(Small)
    made = program(tmp_path, model, layers=())
    with pytest.raises(
        CheckpointError,
        match=r"layer is not called as it was written: \.pt2 files must be saved with preserve_module_call_signature for the "
        r'layers, .*preserve_module_call_signature=\("layer",\)\); or give the code that made it, --model pkg\.module:factory; '
        r"or keep it as it is: --keep-literal layer",
    ):
        find(made)
    assert find(made, keep_literal=["layer"]) == ()
    held(made, model, small(3), 1e-5)


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ("broadcast mask", {}, "layer was exported with a mask that is not of its sequence's size"),
        ("by name", {"dynamic": None}, "layer was exported for a batch of exactly 2, .*; export it with a dynamic batch"),
    ],
)
def test_a_layer_of_which_a_file_says_too_little_is_refused(
    tmp_path: Path, how: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"{message}.*--keep-literal layer"):
        find(program(tmp_path, seeded(lambda: Small(how=how)), **options))


def test_a_bare_layer_needs_no_program(tmp_path: Path) -> None:
    layer = BidirectionalCrossAttention(dim=8, context_dim=6, heads=2, dim_head=4)
    with pytest.raises(CheckpointError, match=r"the model is all of the exported program, .*--checkpoint without --model"):
        find(program(tmp_path, layer, ()))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt2").write_bytes(b"not a program")
    with pytest.raises(InputError, match=r"a\.pt2: it is no \.pt2 file; a file of torch\.export\.save is needed"):
        make(str(tmp_path / "a.pt2"))
    with pytest.raises(InputError, match=r"b\.pt2 does not exist or is not a file; check the path"):
        make(str(tmp_path / "b.pt2"))
    with zipfile.ZipFile(tmp_path / "c.pt2", "w") as archive:
        archive.writestr("c/data", "nothing")
    with pytest.raises(InputError, match=r"c\.pt2: torch\.export\.load cannot read it \(.*\); a file of torch\.export\.save"):
        make(str(tmp_path / "c.pt2"))


def test_a_program_in_training_mode_is_refused(tmp_path: Path) -> None:
    model = Small(BidirectionalCrossAttention(dim=8, context_dim=6, heads=2, dim_head=4, dropout=0.1)).train()
    path = saved(model, small(), EVERY, tmp_path / "a.pt2", ("layer",))
    with pytest.raises(InputError, match=r"it was exported in training mode; export it after model\.eval\(\)"):
        read(path)


class Nested(nn.Module):
    def forward(self, pair: list[Tensor]) -> Tensor:
        return pair[0] + pair[1]


def test_arguments_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    exported = torch.export.export(Nested(), ([torch.ones(2), torch.ones(2)],))
    torch.export.save(exported, tmp_path / "a.pt2")
    with pytest.raises(InputError, match="its forward takes lists or dicts of tensors; export a wrapper"):
        read(tmp_path / "a.pt2")


def test_nothing_of_the_user_s_files_is_in_a_program(files: Callable[[str], Path]) -> None:
    pieces = [module for module in read(files("stack")).modules() if isinstance(module, Piece)]
    assert len(pieces) > 20
    assert not any(node.meta for piece in pieces for node in piece.graph.nodes)
