"""An export in somebody's process: nothing of theirs is changed, and nothing that they set changes the bundle."""

import contextlib
import logging
import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.layers import DIMS, make_checkpoint
from torch import nn

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import CheckpointError, ExportError
from bca_deploy.layers import isolation
from bca_deploy.layers.isolation import exporter_alone, one_thread, plain_torch
from bca_deploy.layers.stored.weight_files import read


def small_module() -> nn.Module:
    return make_checkpoint(prenorm=True).module(torch.float32)


def of_the_thread() -> dict[str, Any]:
    """What torch and numpy keep for each thread."""
    return {
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "device": torch.get_default_device(),
        "numpy errors": np.geterr(),
    }


def of_the_process() -> dict[str, Any]:
    """What everybody in the process shares."""
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    return {
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "environment": dict(os.environ),
        "dtype": torch.get_default_dtype(),
        "streams": (sys.stdout, sys.stderr),
        "directory": Path.cwd(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "later threads": isolation.on_own_thread(torch.get_num_threads),
        "logging": (logging.root.manager.disable, logging.root.level, list(logging.root.handlers)),
    } | {f"logger {one.name}": (one.level, one.propagate, one.disabled, [*one.filters], [*one.handlers]) for one in known}


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is not as it was; loggers that were made meanwhile are nobody's yet."""
    return {name: (old, after.get(name)) for name, old in before.items() if after.get(name) != old}


def break_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def break_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(torch.onnx, "export", fail)


def break_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bca_deploy.parity.yardstick.make_inputs", lambda *args: 1 / 0)


@pytest.mark.slow
@pytest.mark.parametrize("break_it", [break_nothing, break_exporter, break_parity])
def test_two_exports_side_by_side_leave_the_process_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None]
) -> None:
    module, start = small_module(), threading.Barrier(2)
    break_it(monkeypatch)

    def one(index: int) -> tuple[dict[str, Any], bool]:
        torch.set_grad_enabled(index == 0)
        before = of_the_thread()
        start.wait()
        try:
            bca_deploy.export(module, tmp_path / str(index), dims=DIMS)
        except (ExportError, ZeroDivisionError):
            return difference(before, of_the_thread()), False
        return difference(before, of_the_thread()), True

    before = of_the_process()
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(one, range(2)))
    assert found == [({}, break_it is break_nothing)] * 2
    assert difference(before, of_the_process()) == {}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


ALONE = """
import os, sys, warnings
import torch
import bca_deploy
def state(): return dict(os.environ), list(warnings.filters)
before = state()
from support.layers import DIMS, make_checkpoint
after_tests = state()  # their own imports are not ours
module = make_checkpoint(prenorm=True).module(torch.float32)
bca_deploy.export(module, sys.argv[1], dims=DIMS)
assert state() == after_tests == before, (before, after_tests, state())
"""


@pytest.mark.slow
def test_the_first_export_of_a_process_adds_nothing_to_its_environment_or_filters(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "model"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_the_process_prints_logs_and_warns_of_meanwhile_comes_through(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def host() -> None:
        sys.stdout.write("printed\n")
        logging.getLogger("their.own").warning("logged")
        warnings.warn("warned", stacklevel=1)

    with warnings.catch_warnings(record=True) as seen, exporter_alone():
        warnings.simplefilter("always")
        isolation.on_own_thread(host)
    assert capsys.readouterr().out == "printed\n"
    assert [record.message for record in caplog.records] == ["logged"]
    assert [str(one.message) for one in seen] == ["warned"]


@pytest.mark.parametrize("name", ["torch.onnx", "onnxscript.version_converter", "onnx_ir", "onnx.made.later"])
def test_the_libraries_say_nothing_meanwhile(caplog: pytest.LogCaptureFixture, name: str) -> None:
    with exporter_alone():
        logging.getLogger(name).warning("chatter")
        warnings.warn_explicit("chatter", UserWarning, "file", 1, module=f"{name}.x")
    assert not caplog.records
    with pytest.warns(UserWarning, match="after"):
        warnings.warn_explicit("after", UserWarning, "file", 1, module=f"{name}.x")


def test_an_export_prints_logs_and_warns_of_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        bca_deploy.export(small_module(), tmp_path / "model", dims=DIMS)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert [str(one.message) for one in seen] == []


@contextlib.contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def on_device_by_default(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64 by default": lambda: by_default(torch.float64),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "another device": lambda: on_device_by_default("meta"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bca_deploy.export(small_module(), tmp_path_factory.mktemp("plain") / "model", dims=DIMS)


@pytest.mark.slow
@pytest.mark.parametrize("surroundings", list(SURROUNDINGS))
def test_what_the_caller_has_set_does_not_change_a_byte(tmp_path: Path, plain: Bundle, surroundings: str) -> None:
    module = small_module()
    with SURROUNDINGS[surroundings]():
        made = bca_deploy.export(module, tmp_path / "model", dims=DIMS)
    assert made.manifest.files == plain.manifest.files


@pytest.mark.slow
def test_weights_made_in_inference_mode_are_exported_and_judged(tmp_path: Path, plain: Bundle) -> None:
    with torch.inference_mode():
        made = bca_deploy.export(small_module(), tmp_path / "model", dims=DIMS)
        assert all(bca_deploy.verify(made, scope="quick"))
    assert made.manifest.files == plain.manifest.files


def test_the_thread_has_its_own_settings_inside_and_the_callers_afterwards() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = of_the_thread()
        with plain_torch():
            assert of_the_thread() == before | {"grad": True, "autocast": (False, of_the_thread()["autocast"][1])}
        assert of_the_thread() == before


def test_one_thread_here_leaves_all_of_them_to_the_others() -> None:
    def threads() -> int:
        return isolation.on_own_thread(torch.get_num_threads)

    mine, others = torch.get_num_threads(), threads()
    try:
        torch.set_num_threads(3)
        with one_thread():
            assert (torch.get_num_threads(), threads()) == (1, 3)
            with one_thread():
                assert (torch.get_num_threads(), threads()) == (1, 3)
        assert (torch.get_num_threads(), threads()) == (3, 3)
    finally:
        isolation.on_own_thread(lambda: torch.set_num_threads(others))
        torch.set_num_threads(mine)


def test_a_filter_that_another_thread_has_put_back_meanwhile_stays() -> None:
    theirs = warnings.catch_warnings()
    theirs.__enter__()
    with exporter_alone():
        theirs.__exit__(None, None, None)
        before = list(warnings.filters)
    assert list(warnings.filters) == before


def test_a_checkpoint_that_is_none_is_refused_without_touching_the_filters(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"\x80\x05N.")
    before = list(warnings.filters)
    with pytest.raises(CheckpointError):
        read(tmp_path / "x.pt")
    assert list(warnings.filters) == before


def test_the_first_of_two_exporters_is_alone() -> None:
    order = []
    first, second = threading.Event(), threading.Event()

    def late() -> None:
        first.wait()
        second.set()
        with exporter_alone():
            order.append("second")

    thread = threading.Thread(target=late)
    thread.start()
    with exporter_alone():
        first.set()
        second.wait()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_an_error_without_text_is_named_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    break_exporter(monkeypatch)
    with pytest.raises(ExportError, match=r"torch\.onnx\.export failed: RuntimeError\(\)"):
        bca_deploy.export(small_module(), tmp_path / "model", dims=DIMS)
