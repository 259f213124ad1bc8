"""In the child of a fork: what was opened before says so, nothing waits for ever, and nothing of the parent's is taken away."""

import asyncio
import gc
import os
import select
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.servers import Server

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import BcaError
from bca_deploy.layers.isolation import exporter_alone, one_thread
from bca_deploy.serving.client import RemoteSession
from bca_deploy.session.metrics import Meter
from bca_deploy.session.session import Session
from bca_deploy.threads import ForkLock, PrivateDirectory

#: Longest that a child may take before it counts as one that hangs.
HANGS_S = 60


def in_child(job: Callable[[], object]) -> str:
    """Return what the job gave in a forked child, or the error that it raised."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 and later warn of what is tested here
        child = os.fork()
    if child == 0:
        try:
            said = f"gave {job()}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], HANGS_S)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read().decode() if ready else "hangs"


@pytest.fixture(scope="module")
def session(exported: Bundle) -> Iterator[Session]:
    """A session that has used every kind of thread it has."""
    with bca_deploy.open(exported.directory, "onnxruntime-cpu", threads=2) as opened:
        x, context = pair()
        opened(x, context)
        asyncio.run(opened.run_async(x, context))
        opened.run_many([(x, context)] * 4)
        yield opened


def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 7, 24)).astype(np.float32), rng.normal(size=(2, 5, 16)).astype(np.float32)


CALLS: dict[str, Callable[[Session], object]] = {
    "call": lambda s: s(*pair()),
    "run": lambda s: s.run(dict(zip(("x", "context"), pair(), strict=True))),
    "run_into": lambda s: s.run_into({}, {}),
    "run_many": lambda s: s.run_many([pair()] * 4),
    "run_async": lambda s: asyncio.run(s.run_async(*pair())),
    "warmup": lambda s: s.warmup(),
    "selftest": lambda s: s.selftest(),
}


@pytest.mark.parametrize("call", list(CALLS))
def test_a_session_of_the_parents_says_to_open_after_the_fork(session: Session, call: str) -> None:
    said = in_child(lambda: CALLS[call](session))
    assert said.startswith("BcaError: the session was opened before a fork")
    assert "open it after the fork" in said


def test_what_a_session_says_of_itself_is_said_in_a_child_too(session: Session) -> None:
    assert in_child(lambda: (session.metrics().calls, len(session.inputs), session.explain().chosen)) == (
        f"gave {(session.metrics().calls, len(session.inputs), session.explain().chosen)}"
    )


@pytest.mark.parametrize("times", [1, 2])
def test_closing_a_session_in_a_child_neither_hangs_nor_takes_from_the_parent(session: Session, times: int) -> None:
    assert in_child(lambda: [session.close() for _ in range(times)]) == f"gave {[None] * times}"
    assert len(session(*pair())) == 2


def test_a_session_that_a_child_lets_go_of_is_not_freed_there(exported: Bundle) -> None:
    held = [bca_deploy.open(exported.directory, "onnxruntime-cpu", threads=2)]
    held[0](*pair())
    assert in_child(lambda: (held.clear(), gc.collect() >= 0)) == "gave (None, True)"
    held[0].close()


def test_a_session_opened_in_a_child_runs_there(exported: Bundle, session: Session) -> None:
    def job() -> bool:
        with bca_deploy.open(exported.directory, "onnxruntime-cpu", threads=1) as own:
            return all(np.allclose(a, b, atol=1e-5) for a, b in zip(own(*pair()), wanted, strict=True))

    wanted = session(*pair())
    assert in_child(job) == "gave True"


def test_locks_that_other_threads_held_at_the_fork_stop_nobody_in_the_child(session: Session) -> None:
    meter, lock = Meter(), ForkLock()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock, meter._lock, session._lock, session._meter._lock, exporter_alone():
            held.set()
            done.wait()

    def job() -> int:
        with lock, exporter_alone(), one_thread():
            session.close()
            return meter.snapshot().calls + session.metrics().failures

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert in_child(job) == "gave 0"
    finally:
        done.set()
        thread.join()


def test_a_lock_keeps_others_out_in_its_own_process() -> None:
    lock, inside = ForkLock(), []
    with lock:
        thread = threading.Thread(target=lambda: [lock.__enter__(), inside.append(1), lock.__exit__()])
        thread.start()
        thread.join(0.2)
        assert inside == []
    thread.join()
    assert inside == [1]


def test_an_unpacked_archive_stays_when_a_child_closes_it_and_ends(exported: Bundle, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "model"), "zip", exported.directory)).rename(tmp_path / "model.bca")
    with Bundle.open(archive) as bundle:
        assert in_child(lambda: (bundle.close(), sys.modules["weakref"].finalize._exitfunc())) == "gave (None, None)"
        assert bundle.path("weights.safetensors").is_file()
    assert not bundle.directory.exists()


def test_a_private_directory_goes_when_nobody_refers_to_it() -> None:
    directory = PrivateDirectory("bca-test-")
    path = directory.path
    assert path.is_dir()
    del directory
    assert not path.exists()


def test_a_remote_session_of_the_parents_says_to_open_after_the_fork(served: Server) -> None:
    with RemoteSession(f"grpc://{served.grpc}") as remote:
        wanted = remote(*pair())
        calls: list[Callable[[], object]] = [
            lambda: remote(*pair()),
            lambda: remote.run({}),
            lambda: remote.run_many([pair()]),
            lambda: asyncio.run(remote.run_async(*pair())),
        ]
        for call in calls:
            assert in_child(call).startswith("BcaError: the RemoteSession was opened before a fork")
        assert in_child(remote.close) == "gave None"
        for one, other in zip(remote(*pair()), wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_remote_session_that_was_never_asked_is_refused_in_a_child_too() -> None:
    with RemoteSession("grpc://127.0.0.1:1") as remote:
        assert in_child(lambda: remote.inputs).startswith("BcaError: the RemoteSession was opened before a fork")


def test_an_error_of_the_fork_is_a_bca_error(session: Session) -> None:
    assert issubclass(BcaError, Exception)
    assert in_child(lambda: session(*pair())).split(":")[0] == BcaError.__name__
