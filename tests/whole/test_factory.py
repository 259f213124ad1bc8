"""A model from the command line: the user's own code runs, and its weights come from a checkpoint, every key of it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bca_deploy.errors import CheckpointError, InputError
from bca_deploy.whole.factory import load_into, make


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "beside_the_model.py").write_text("WIDTH = 3\n")
    (tmp_path / "the_model.py").write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from beside_the_model import WIDTH\n"
        "from torch import nn\n"
        "\n"
        "@dataclasses.dataclass\n"
        "class Options:\n"
        "    width: int = WIDTH\n"
        "\n"
        "def build(): return nn.Linear(Options().width, 4)\n"
        "def demanding(width): return nn.Linear(width, 4)\n"
        "def failing(): raise KeyError('weights')\n"
        "def wrong(): return {'model': 1}\n"
        "made = nn.Linear(5, 6)\n"
        "number = 7\n"
        "Own = type('Own', (nn.Linear,), {'__init__': lambda self: nn.Linear.__init__(self, 8, 9)})\n"
    )
    return tmp_path


def test_a_factory_of_a_file_may_import_what_stands_beside_it(place: Path) -> None:
    made = make(f"{place / 'the_model.py'}:build")
    assert isinstance(made, nn.Linear)
    assert made.in_features == 3


def test_a_file_may_be_given_relative_to_where_the_command_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert isinstance(make("the_model.py:build"), nn.Linear)
    os.chdir(place.parent)
    assert isinstance(make(f"{place.name}/the_model.py:build"), nn.Linear)


def test_a_factory_of_a_module_is_imported(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(place))
    assert isinstance(make("the_model:build"), nn.Linear)


@pytest.mark.parametrize(("name", "width"), [("made", 5), ("Own", 8)])
def test_a_module_and_a_class_of_one_are_factories_too(place: Path, name: str, width: int) -> None:
    made = make(f"{place / 'the_model.py'}:{name}")
    assert isinstance(made, nn.Linear)
    assert made.in_features == width


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("the_model.py:buld", r"the_model\.py has no buld \(did you mean 'build'\?\)"),
        ("the_model.py:demanding", "calling it without arguments raised TypeError: .*'width'; a factory takes none"),
        ("the_model.py:failing", "calling it without arguments raised KeyError: 'weights'; a factory takes none"),
        ("the_model.py:wrong", "it gives a dict; a torch.nn.Module is needed"),
        ("the_model.py:number", "it is a int; give a function without arguments, or a module"),
        ("nowhere.py:build", r"--model: .*nowhere\.py does not exist or is not a file; check the path"),
        ("broken.py:build", r"--model: .*broken\.py cannot be imported: SyntaxError: "),
        (
            "importing.py:build",
            r"--model: .*importing\.py cannot be imported: ModuleNotFoundError: No module named 'no_such_thing'",
        ),
        ("leaving.py:build", r"--model: .*leaving\.py ends the process when it is imported .exit code 3.; let what it runs"),
    ],
)
def test_a_factory_that_does_not_give_a_model_is_refused(place: Path, given: str, message: str) -> None:
    (place / "broken.py").write_text("def build(:\n")
    (place / "importing.py").write_text("import no_such_thing\n")
    (place / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(InputError, match=message):
        make(str(place / given))


@pytest.mark.parametrize("given", ["build", "the_model.py", ":build", "the_model:", "", ":"])
def test_what_is_written_otherwise_is_refused(given: str) -> None:
    with pytest.raises(InputError, match=r"give pkg\.module:factory, or path/to/file\.py:factory"):
        make(given)


def test_a_module_that_cannot_be_imported_is_refused() -> None:
    with pytest.raises(InputError, match=r"no_such_package\.models cannot be imported: ModuleNotFoundError: No module named"):
        make("no_such_package.models:build")


def test_a_file_that_is_called_like_a_package_is_the_file(place: Path) -> None:
    (place / "json.py").write_text("from torch import nn\ndef build(): return nn.Linear(1, 2)\n")
    assert isinstance(make(f"{place / 'json.py'}:build"), nn.Linear)
    assert hasattr(sys.modules["json"], "loads")


# ---- its weights


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.fixture
def trained() -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 3) for name, tensor in model().state_dict().items()}


def loaded(path: Path, prefix: str = "") -> nn.Module:
    made = model()
    load_into(made, path, prefix)
    return made


@pytest.mark.parametrize("front", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_checkpoint_is_loaded_and_what_wraps_its_names_is_taken_off(
    tmp_path: Path, trained: dict[str, torch.Tensor], front: str
) -> None:
    torch.save({f"{front}{name}": tensor for name, tensor in trained.items()}, tmp_path / "a.pt")
    assert all(bool((tensor == 3).all()) for tensor in loaded(tmp_path / "a.pt").state_dict().values())


def test_a_checkpoint_of_safetensors_and_one_inside_a_training_state(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    save_file(trained, tmp_path / "a.safetensors")
    torch.save({"epoch": 3, "state_dict": trained}, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        assert all(bool((tensor == 3).all()) for tensor in loaded(tmp_path / name).state_dict().values())


@pytest.mark.parametrize("prefix", ["net.model", "net.model."])
def test_a_model_inside_a_bigger_state_dict_has_a_prefix(tmp_path: Path, trained: dict[str, torch.Tensor], prefix: str) -> None:
    state = {f"module.net.model.{name}": tensor for name, tensor in trained.items()}
    torch.save(state | {"module.net.head.weight": torch.ones(2)}, tmp_path / "a.pt")
    assert all(bool((tensor == 3).all()) for tensor in loaded(tmp_path / "a.pt", prefix).state_dict().values())


@pytest.mark.parametrize(
    ("prefix", "value", "said"),
    [
        ("", 3, "the checkpoint has more than one: 'model.' is taken, and not 'ema.module.'; --prefix takes another"),
        ("ema", 4, ""),
        ("ema.module.", 4, ""),
    ],
)
def test_of_two_containers_one_is_taken_and_the_choice_said(
    tmp_path: Path, trained: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture, prefix: str, value: int, said: str
) -> None:
    averaged = {f"module.{name}": torch.full_like(tensor, 4) for name, tensor in trained.items()}
    torch.save({"model": trained, "ema": averaged, "optimizer": {"state": {0: torch.ones(2)}}}, tmp_path / "a.ckpt")
    assert all(bool((tensor == value).all()) for tensor in loaded(tmp_path / "a.ckpt", prefix).state_dict().values())
    assert "".join(record.getMessage() for record in caplog.records) == said


def refused(tmp_path: Path, state: dict[str, torch.Tensor], prefix: str = "") -> str:
    torch.save(state, tmp_path / "a.pt")
    made = model()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    with pytest.raises(CheckpointError) as found:
        load_into(made, tmp_path / "a.pt", prefix)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())
    return str(found.value)


def test_a_key_that_is_missing_or_one_too_many_is_named(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    trained["0.wieght"] = trained.pop("0.weight")
    said = refused(tmp_path, trained)
    assert "a.pt is not of this Sequential: missing key 0.weight (did you mean '0.wieght'?); unknown key 0.wieght; " in said
    assert said.endswith("check --model and --prefix")


def test_another_shape_is_named(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    said = refused(tmp_path, trained | {"0.weight": torch.ones(5, 3)})
    assert "0.weight has shape [5, 3], needs [4, 3]; check --model" in said
    assert "missing" not in said


def test_only_some_of_many_problems_are_named(tmp_path: Path) -> None:
    said = refused(tmp_path, {f"head.{index}": torch.ones(1) for index in range(20)})
    assert (said.count("missing key"), said.count("unknown key")) == (6, 6)
    assert "and 15 more" in said
    said = refused(tmp_path, {name: torch.ones(9) for name in model().state_dict()})
    assert (said.count("has shape"), "and 1 more" in said) == (6, True)


def test_a_wrong_prefix_names_every_key_as_missing(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    said = refused(tmp_path, {f"net.{name}": tensor for name, tensor in trained.items()}, prefix="nat")
    assert "missing key 0.bias" in said
    assert "unknown" not in said


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.h5").touch()
    with pytest.raises(CheckpointError, match=r"a\.h5: suffix '\.h5' is not known"):
        load_into(model(), tmp_path / "a.h5")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_into(model(), tmp_path / "b.pt")
