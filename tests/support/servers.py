"""Starts the servers that tests talk to, on loopback and free ports, and stops them."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import native

#: Seconds that only a hang takes. Whatever is waited for comes in its own time: another machine, or this one when it is busy,
#: may be many times slower.
PATIENCE_S = 600.0

#: What this old Triton dies of now and then while it loads two python models at once on a busy machine: a lock of its own.
TRITONS_OWN = "boost::interprocess::lock_exception"

BCA = (sys.executable, "-c", "from bca_deploy.cli import main; main()")


@dataclass
class Server:
    """A server that is ready. Its addresses are without a scheme."""

    process: "subprocess.Popen[bytes]"
    http: str
    grpc: str
    log: Path
    scheme: str = "http"

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.scheme}://{self.http}{path}", timeout=PATIENCE_S, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.scheme}://{self.http}{path}", timeout=PATIENCE_S, **options)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def rss_mb(self) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"VmRSS:\s+(\d+) kB", text)
        assert found is not None
        return int(found[1]) / 1e3


@contextlib.contextmanager
def bca_serve(
    bundle: Path, log: Path, *options: str, env: dict[str, str] | None = None, program: tuple[str, ...] = BCA
) -> Iterator[Server]:
    """`bca serve` as its own process, patient unless told otherwise; leaving the context kills what is left of it."""
    patient = ("--deadline-s", f"{PATIENCE_S:g}", "--grace-s", f"{PATIENCE_S:g}")
    command = [*program, "serve", str(bundle), "--http-port", "0", "--grpc-port", "0", *patient, *options]
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=os.environ | (env or {}))
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        found = re.match(r"serving \S+ on (https?)://(\S+) and grpcs?://(\S+): ", line)
        assert found is not None, f"{line}\n{log.read_text(encoding='utf-8')}"
        yield Server(process, found[2], found[3], log, found[1])
    finally:
        process.kill()
        process.wait()
        process.stdout and process.stdout.close()


def held(log: Path) -> tuple[str, ...]:
    """`bca serve` with a model that ends no call while the server is held; for :func:`bca_serve`, with the same log."""
    code = f"""
import os, time
from bca_deploy.serving import grpc_server as serve
from bca_deploy.session.session import Session
serve.READING_S = 5.0  # clients on a busy machine are slow to read
run_prepared = Session.run_prepared
def held(*args, **options):
    while os.path.exists({str(_hold(log))!r}):
        time.sleep(0.002)
    return run_prepared(*args, **options)
Session.run_prepared = held
"""
    return (*BCA[:2], code + BCA[2])


@contextlib.contextmanager
def holding(server: Server) -> Iterator[None]:
    """Hold the server's model: what is to be at work stays there, on the fastest machine and on the slowest."""
    _hold(server.log).touch()
    try:
        yield
    finally:
        _hold(server.log).unlink()


def _hold(log: Path) -> Path:
    return log.with_name(f"{log.name}.hold")


@contextlib.contextmanager
def cpp_serve(bundle: Path, log: Path) -> Iterator[Server]:
    """The example server of runtime/, built for users, with the model `bca`; skips where it cannot be built."""
    if lacking := native.missing("library"):
        pytest.skip(f"runtime/ is not built without {', '.join(lacking)}; make setup as root installs it, or says the command")
    program = native.build("release") / "examples" / "grpc_server"
    command: list[str | Path] = [program, bundle, "--address", "127.0.0.1:0", "--name", "bca"]
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=native.environment())
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        found = re.match(r"listening on port (\d+), model bca", line)
        assert found is not None, f"{line}\n{log.read_text(encoding='utf-8')}"
        yield Server(process, "", f"127.0.0.1:{found[1]}", log)
    finally:
        process.kill()
        process.communicate()


def until(true: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Wait for what another process does; fails when it does not."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.02)


def triton_environment() -> Path:
    """The environment that `make setup` made for Triton; skips on the Python for which there is none."""
    if sys.version_info >= (3, 13):
        pytest.skip("this Triton's python backend needs numpy 1, which has no build for Python 3.13")
    return Path(sys.prefix) / "triton"


def _tritonserver(log: Path) -> tuple[list[str], dict[str, str]]:
    environment = triton_environment()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    home = environment / "lib" / f"python{python}" / "site-packages" / "pytriton" / "tritonserver"
    backends = _backends(home, home / "python_backend_stubs" / python, log.with_name("backends"))
    # The backend embeds the python3 that it finds on the path, and needs its library.
    path = {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))}
    command = [str(home / "bin" / "tritonserver"), "--backend-directory", str(backends), "--allow-metrics", "false"]
    patience = ["--backend-config", f"python,stub-timeout-seconds={PATIENCE_S:.0f}"]
    return command + patience, os.environ | path


def _backends(home: Path, stubs: Path, place: Path) -> Path:
    """The python backend with the stub of this Python beside it, as it looks for it there; the set-up stays as it is."""
    python = place / "python"
    python.mkdir(parents=True)
    files = {file.name: file for file in (*(home / "backends" / "python").iterdir(), *stubs.iterdir())}
    for name, file in files.items():
        (python / name).symlink_to(file.resolve())
    return place


@contextlib.contextmanager
def free_ports(count: int) -> Iterator[list[int]]:
    """Ports that stay free for one server of ours to listen on: bound here, so that the system gives them to nobody else.

    Nothing answers on them meanwhile. Servers set SO_REUSEADDR, with which a port may be bound again that nobody listens on.
    """
    with contextlib.ExitStack() as held:
        found = [held.enter_context(socket.socket()) for _ in range(count)]
        for port in found:
            port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port.bind(("127.0.0.1", 0))
        yield [port.getsockname()[1] for port in found]


@contextlib.contextmanager
def tritonserver(repository: Path, log: Path, env: dict[str, str] | None = None, ready: bool = True) -> Iterator[Server]:
    """The real Triton; without ``ready`` the context begins when it has given up."""
    command, environment = _tritonserver(log)
    with free_ports(2) as (http, grpc), contextlib.ExitStack() as stop:
        command += ["--http-address", "127.0.0.1", "--grpc-address", "127.0.0.1"]
        command += ["--http-port", str(http), "--grpc-port", str(grpc), "--model-repository", str(repository)]

        def start() -> Server:
            with log.open("wb") as output:
                started = subprocess.Popen(command, stdout=output, stderr=output, env=environment | (env or {}), cwd=repository)
            stop.callback(_end, started)
            return Server(started, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)

        yield settled(start, ready)


def settled(start: Callable[[], Server], ready: bool) -> Server:
    """Start Triton until it is ready, or has given up where that is wanted; not where it died of itself before either."""
    for _ in range(5):
        server = start()
        until(lambda server=server: server.process.poll() is not None or (ready and _answers(server)))
        if server.process.poll() is None:
            return server
        said = server.log.read_text(encoding="utf-8")
        if TRITONS_OWN not in said:
            break
    assert not ready, said[-6000:]
    assert TRITONS_OWN not in said, said[-6000:]
    return server


def _answers(server: Server) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return server.get("/v2/health/ready").status_code == 200
    return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    process.kill()
    process.wait()


def put_stand_in(engine: Path) -> None:
    """Replace an engine model, whose backend this Triton has not, by the same file on onnxruntime."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    path = engine / "config.pbtxt"
    config = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    config.backend = "python"
    config.ClearField("platform")
    config.ClearField("default_model_filename")
    path.write_text(text_format.MessageToString(config), encoding="utf-8")
    shutil.copyfile(Path(__file__).parent / "triton_stand_in.py", engine / "1" / "model.py")
