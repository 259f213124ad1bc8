"""Weight files: every kind that people have is read, and what is none is called what it is."""

import argparse
import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from bca_deploy.errors import CheckpointError
from bca_deploy.layers.stored.weight_files import read

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor] = WEIGHTS) -> bool:
    return set(found) == set(wanted) and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("suffix", [".pt", ".PT", ".pth", ".ckpt", ".Ckpt", ".bin", ".BIN", ".safetensors", ".SafeTensors"])
def test_every_suffix_is_read_in_any_case(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    save: Callable[[Any, Path], None] = safetensors.torch.save_file if suffix.lower() == ".safetensors" else torch.save
    save(WEIGHTS, path)
    assert same(read(path))


def test_containers_become_prefixes(tmp_path: Path) -> None:
    content = {"generator": WEIGHTS, "net": {"module": {"c": torch.ones(1)}}, "both": [{"d": torch.ones(2)}], "epoch": 3}
    torch.save(content, tmp_path / "a.ckpt")
    found = read(tmp_path / "a.ckpt")
    assert list(found) == ["generator.a.weight", "generator.b", "net.module.c", "both.0.d"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, r"has two tensors called a\.b; save the state dict alone"),
        ({"a": (loop := [torch.ones(1)])}, "nested too deep; save the state dict alone"),
    ],
    ids=["one name twice", "inside itself"],
)
def test_containers_that_give_no_names_are_refused(tmp_path: Path, content: Any, said: str) -> None:
    if isinstance(content["a"], list):
        loop.append(loop)  # type: ignore[arg-type]
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"^checkpoint .*a\.pt.*{said}$"):
        read(tmp_path / "a.pt")


# ---- shared weights


def test_a_shared_weight_has_both_its_names(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.other = nn.Linear(2, 3)

    safetensors.torch.save_model(Tied(), str(tmp_path / "a.safetensors"))
    found = read(tmp_path / "a.safetensors")
    assert set(found) == {"one.weight", "other.weight", "one.bias", "other.bias"}
    assert torch.equal(found["one.weight"], found["other.weight"])


def test_a_header_that_says_something_else_adds_no_tensor(tmp_path: Path) -> None:
    safetensors.torch.save_file(WEIGHTS, tmp_path / "a.safetensors", {"format": "pt", "b": "a.weight", "of": "nothing"})
    assert same(read(tmp_path / "a.safetensors"))


# ---- in several files


def sharded(directory: Path, files: dict[str, str] | None = None) -> Path:
    for name, key in (("one.safetensors", "a.weight"), ("two.safetensors", "b")):
        safetensors.torch.save_file({key: WEIGHTS[key]}, directory / name)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files or {"a.weight": "one.safetensors", "b": "two.safetensors"}}))
    return index


def test_an_index_and_its_directory_give_all_files(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    assert same(read(index))
    assert same(read(tmp_path))


def test_a_directory_with_one_file_of_weights_is_that_file(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    assert same(read(tmp_path))


@pytest.mark.parametrize(
    ("names", "said"),
    [([], "a directory with none to choose from"), (["a.pt", "b.pt"], r"a directory with 2: a\.pt, b\.pt to choose from")],
    ids=["none", "two"],
)
def test_a_directory_without_one_checkpoint_is_refused(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        torch.save(WEIGHTS, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"^checkpoint {tmp_path} is {said}; give one file of weights$"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.weight": "../one.safetensors"}, r"names the file '\.\./one\.safetensors'; its files must stand beside it"),
        ({"a.weight": "/one.safetensors"}, "must stand beside it"),
        ({"a.weight": "model.safetensors.index.json"}, "must stand beside it"),
        ({"a.weight": "gone.safetensors"}, r"gone\.safetensors does not exist"),
        ({"c": "one.safetensors"}, r"c is not in one\.safetensors; copy all of its files again"),
    ],
)
def test_an_index_whose_files_are_not_there_is_refused(tmp_path: Path, files: dict[str, str], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read(sharded(tmp_path, files))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000, "\xff"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"a\.index\.json is no(t a readable)? index"):
        read(tmp_path / "a.index.json")


# ---- what is none


class Net(nn.Linear):
    """A class of the user's own."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "named"),
    [(Net(2, 2), rf"{__name__}\.Net"), ({"hparams": argparse.Namespace(), "state_dict": WEIGHTS}, r"argparse\.Namespace")],
    ids=["module", "settings"],
)
def test_the_class_that_was_refused_is_named_with_the_way_to_save_again(
    tmp_path: Path, content: Any, named: str, zipped: bool
) -> None:
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    said = (
        rf"holds pickled code \({named}\).*torch\.save\(module\.state_dict\(\), path\).*torch\.load\(path, weights_only=False\)"
    )
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path / "a.pt")


def _torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(path))


def _program(path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), file)


def _arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(2))


WRONG: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "TorchScript": (_torchscript, ".pt", r"TorchScript; take its weights out: torch\.save\(torch\.jit\.load\(path\)"),
    "program": (_program, ".pt", "an exported program; take its weights out"),
    "arrays": (_arrays, ".bin", r"numpy arrays and no file of torch\.save"),
    "safetensors": (lambda p: safetensors.torch.save_file(WEIGHTS, p), ".pt", "a safetensors file; give it the suffix .safe"),
    "torch": (lambda p: torch.save(WEIGHTS, p), ".safetensors", r"a file of torch\.save; give it the suffix \.pt"),
    "empty": (lambda p: p.write_bytes(b""), ".ckpt", "empty; copy"),
    "empty too": (lambda p: p.write_bytes(b""), ".safetensors", "empty; copy"),
    "pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n"),
        ".bin",
        "a Git LFS p",
    ),
    "page": (lambda p: p.write_text("\n<!DOCTYPE html><html>"), ".safetensors", "a web page or XML and not the weights"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(bytes(99))), ".pt", "a gzip file; unpack it"),
    "keras": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), ".ckpt", "an HDF5 file"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": [1, 2]})), ".pt", r"a pickle that torch\.save has not written"),
}


@pytest.mark.filterwarnings("ignore:.*TorchScript|.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", list(WRONG))
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path, kind: str) -> None:
    make, suffix, said = WRONG[kind]
    make(path := tmp_path / f"model{suffix}")
    with pytest.raises(CheckpointError, match=rf"^checkpoint {path} is {said}"):
        read(path)
