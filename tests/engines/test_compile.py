"""The builder process: a whole engine, or nothing and a reason, whatever happens over there; and no process is left behind."""

import fcntl
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from bca_deploy.bundle.engine_options import EngineTable
from bca_deploy.bundle.read import Bundle
from bca_deploy.engines import build as engines
from bca_deploy.engines import compile as engine
from bca_deploy.engines.builder_process import Request
from bca_deploy.engines.compile import Built, compile_engine
from bca_deploy.errors import EngineError

REAL_POPEN = subprocess.Popen


@dataclass
class Children:
    """Every process that was started, and what it was made to be: any program that is given the builder's command."""

    started: list[subprocess.Popen[bytes]]
    wrap: Callable[[list[str]], list[str]]

    def instead(self, code: str) -> None:
        """Run this Python in place of the builder; ``request`` is what the builder was asked for."""
        head = "import json, os, signal, sys, time; request = json.load(sys.stdin)\n"
        self.wrap = lambda command: [sys.executable, "-c", head + code]

    def linger(self) -> None:
        """Let the real builder go no further than its first word of progress before it is asked to stop."""
        code = """
import time
from bca_deploy.engines import builder_process
step = builder_process.Meter.step
def lingers(self, *what):
    grew = step(self, *what)
    if grew:
        while not builder_process._stopped and told:
            time.sleep(0.01)
        told.append(grew)
    return grew
told = []
builder_process.Meter.step = lingers
builder_process.main()
"""
        self.wrap = lambda command: [sys.executable, "-P", "-c", code]

    def limit(self, kilobytes: int) -> None:
        """Let the builder write no file longer than this, as on a disk that fills up."""
        self.wrap = lambda command: ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "-", *command]


@pytest.fixture(autouse=True)
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Children:
    """Record every child; nothing of a build may outlive the test in the temporary directory either."""
    family = Children([], lambda command: command)

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        family.started.append(REAL_POPEN(family.wrap(command), **options))
        return family.started[-1]

    monkeypatch.setattr(engine.subprocess, "Popen", start)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return family


@pytest.fixture
def request_(exported: Bundle, tmp_path: Path) -> Request:
    """The fp16 model of the small bundle, compiled for one GPU generation."""
    wanted = engines.plan(EngineTable(library="rtx", targets=("sm89",)), (), exported.manifest.signature.dims, ("fp16",))
    model = engines.model_of(exported.manifest, "fp16")
    request = engines._request(exported.directory, exported.manifest, model, wanted, "")
    return replace(request, out=str(tmp_path / "an engine"))


def compile_(request: Request, time_limit_s: float = 600, report: Callable[[float], None] = lambda share: None) -> Built:
    return compile_engine(request, time_limit_s, report)


def nothing_is_left(children: Children, request: Request) -> bool:
    """No process, no engine, no half of one, no log."""
    place = Path(request.out).parent
    return all(child.poll() is not None for child in children.started) and not list(place.iterdir())


def refusal(
    children: Children, request: Request, time_limit_s: float = 600, report: Callable[[float], None] = lambda share: None
) -> str:
    """Return why nothing was built, and hold that nothing is left."""
    with pytest.raises(EngineError) as caught:
        compile_(request, time_limit_s, report)
    assert len(children.started) == 1
    assert nothing_is_left(children, request)
    return str(caught.value)


# ---- a build that succeeds


def test_an_engine_is_built_without_a_gpu(request_: Request, children: Children) -> None:
    built = compile_(request_)
    assert Path(request_.out).stat().st_size == built.facts.bytes > 0
    assert built.facts.matmuls.keys() == {"HALF"}
    assert built.log.weight_bytes
    assert not built.log.errors
    assert [path.name for path in Path(request_.out).parent.iterdir()] == ["an engine"]
    assert [child.poll() for child in children.started] == [0]


def test_progress_rises_from_0_to_1(request_: Request) -> None:
    shares: list[float] = []
    compile_(request_, report=shares.append)
    assert len(shares) > 5
    assert all(0 < one < other <= 1 for one, other in itertools.pairwise(shares))


def test_an_engine_that_was_there_is_replaced(request_: Request) -> None:
    Path(request_.out).write_bytes(b"old")
    assert compile_(request_).facts.bytes == Path(request_.out).stat().st_size


# ---- stopped


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_build_stopped_by_its_caller_leaves_no_process_and_no_file(
    request_: Request, children: Children, error: type[BaseException]
) -> None:
    children.linger()

    def stop(share: float) -> None:
        assert children.started[0].poll() is None  # it is in the middle of the work
        raise error

    with pytest.raises(error):
        compile_(request_, report=stop)
    assert nothing_is_left(children, request_)


def test_a_builder_that_does_not_listen_is_killed(
    request_: Request, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's builder may be deep inside one step when it is asked to stop."""
    monkeypatch.setattr(engine, "GRACE_S", 0.1)
    children.instead(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(request['events'], b'{\"progress\": 0.5}\\n'); time.sleep(600)"
    )

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_(request_, report=stop)
    assert children.started[0].returncode == -signal.SIGKILL
    assert nothing_is_left(children, request_)


def test_a_build_that_takes_too_long_is_stopped_and_names_the_limit(request_: Request, children: Children) -> None:
    message = refusal(children, request_, time_limit_s=0.05)
    assert message.startswith("the build took longer than 0.05 s, at ")
    assert "raise engine.time_limit_s in the recipe; the last lines of its log:\n" in message


def test_a_builder_that_hangs_is_stopped_where_its_log_ends(
    request_: Request, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    children.instead(
        "open(request['log'], 'w').write('VERBOSE\\tParsing node: the_guilty [MatMul]\\n'); "
        "os.write(request['events'], b'{\"progress\": 0.5}\\n'); time.sleep(600)",
    )
    now = [0.0]
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def hours_pass(share: float) -> None:  # when the log is written, however long that took
        now[0] = 1e4

    message = refusal(children, request_, 3600, hours_pass)
    assert message.startswith("the build took longer than 3600 s, at the_guilty [MatMul]; ")
    assert message.endswith("\n  Parsing node: the_guilty [MatMul]")


# ---- crashed


def two_attentions(path: Path, scale: float) -> dict[str, list[list[int]]]:
    """Write a model of two opset-23 Attention nodes, each the other's mirror; return the shapes of its inputs."""
    heads = {"q_num_heads": 2, "kv_num_heads": 2, "scale": scale}
    there = helper.make_node("Attention", ["x", "context", "context"], ["out"], name="there", **heads)
    back = helper.make_node("Attention", ["context", "x", "x"], ["context_out"], name="back", **heads)
    sizes = {"x": [2, 32, 32], "context": [2, 48, 32]}
    tensors = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name, shape in sizes.items()}
    results = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, sizes[like])
        for name, like in (("out", "x"), ("context_out", "context"))
    ]
    graph = helper.make_graph([there, back], "two", list(tensors.values()), results)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return {name: [shape] * 3 for name, shape in sizes.items()}


@pytest.fixture
def crashing(request_: Request, tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A model on which the builder of TensorRT-RTX 1.7.1 dies: its parser follows the second of two mirrored Attentions."""
    path = tmp_path_factory.mktemp("crashing") / "model.onnx"
    return replace(request_, onnx=str(path), profiles=[two_attentions(path, 0.3)])


def test_a_crash_inside_the_library_is_an_error_that_names_the_signal_and_the_node(
    crashing: Request, children: Children
) -> None:
    message = refusal(children, crashing)
    first, *tail = message.splitlines()
    assert first == "the builder crashed (SIGSEGV) at back [Attention]; please report this; the last lines of its log:"
    assert len(tail) == 5


def test_a_builder_killed_from_outside_points_to_memory(request_: Request, children: Children) -> None:
    """What the kernel does when memory runs out."""
    children.instead(
        "open(request['log'], 'w').write('VERBOSE\\tParsing node: big [MatMul]\\n'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    message = refusal(children, request_)
    assert message.startswith("the builder was killed at big [MatMul]; usually memory ran out: ")
    assert "give the machine more, or narrow the profile; " in message


def test_a_builder_that_fails_before_it_can_say_so_shows_what_it_printed(
    request_: Request, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    children.instead("print('first'); sys.exit('libcudart.so is missing')")
    message = refusal(children, request_)
    assert message.startswith("the builder failed (exit code 1): libcudart.so is missing; ")
    assert message.endswith("(the log is empty)")


def test_a_builder_that_ends_well_without_an_engine_has_failed(request_: Request, children: Children) -> None:
    children.instead("pass")
    assert refusal(children, request_).startswith("the builder failed (exit code 0): nothing; ")


def test_a_library_that_is_not_there_is_named(request_: Request, children: Children) -> None:
    assert "No module named 'no_such_library'" in refusal(children, replace(request_, module="no_such_library"))


# ---- refused


def test_a_corrupt_model_is_refused_with_the_parser_s_reason(
    request_: Request, children: Children, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = Path(request_.onnx).read_bytes()
    cut = tmp_path_factory.mktemp("corrupt") / "cut.onnx"
    cut.write_bytes(whole[: len(whole) // 2])
    message = refusal(children, replace(request_, onnx=str(cut)))
    assert message.startswith("the engine was not built: the parser refused the model: ")
    assert "parse" in message.lower().partition("refused the model: ")[2]


def test_a_model_with_an_unknown_operator_is_refused_with_the_node(
    request_: Request, children: Children, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("unknown") / "model.onnx"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Frobnicate", ["x"], ["y"], name="the_node", domain="none")], "g", [x], [y])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("none", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    message = refusal(children, replace(request_, onnx=str(path), profiles=[{"x": [[2], [2], [2]]}]))
    assert "node the_node (Frobnicate): " in message


def test_a_profile_that_the_library_refuses_is_an_error(request_: Request, children: Children) -> None:
    """engines/profiles.py lets none through; the builder does not rely on it."""
    (shapes,) = request_.profiles
    backwards = {name: list(reversed(sizes)) for name, sizes in shapes.items()}
    assert refusal(children, replace(request_, profiles=[backwards])).startswith("the engine was not built: ")


def test_a_full_disk_is_an_error_that_names_the_engine(request_: Request, children: Children) -> None:
    children.limit(kilobytes=1000)  # room for the log, not for the engine
    assert refusal(children, request_).endswith(f"File too large: {request_.out}")


def test_a_full_disk_under_the_log_is_an_error_too(request_: Request, children: Children) -> None:
    children.limit(kilobytes=10)
    message = refusal(children, request_)
    assert message.startswith("the engine was not built: File too large: ")


def test_a_directory_that_is_not_there_is_an_error(request_: Request, children: Children) -> None:
    out = Path(request_.out).with_name("absent") / "engine"
    with pytest.raises(EngineError, match=f"No such file or directory: {out}"):
        compile_(replace(request_, out=str(out)))
    assert nothing_is_left(children, request_)


def test_what_lies_in_the_working_directory_is_not_imported(
    request_: Request, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's json.py beside the bundle must not become part of the builder."""
    place = tmp_path_factory.mktemp("cwd")
    (place / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(place)
    compile_(request_)


def test_the_builder_inherits_no_descriptor_but_its_own(request_: Request, children: Children) -> None:
    """An inherited lock would outlive a killed `bca build` for as long as its builder runs."""
    with Path(os.devnull).open("rb") as file:
        handle = fcntl.fcntl(file, fcntl.F_DUPFD, 200)  # a number that nothing in the child takes by chance
    os.set_inheritable(handle, True)
    children.instead(
        f"told = '{handle}' in os.listdir('/proc/self/fd'); "
        "os.write(request['events'], json.dumps({'refused': f'inherited: {told}'}).encode() + b'\\n')"
    )
    message = refusal(children, request_)
    os.close(handle)
    assert message == "the engine was not built: inherited: False"
