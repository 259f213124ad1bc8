"""Flush-to-zero inside, the caller's floating-point mode outside."""

import platform

import numpy as np
import pytest

import bca_deploy
from bca_deploy.bundle.read import Bundle
from bca_deploy.session.backends.denormals import Flushed
from bca_deploy.threads import on_own_thread

TINY = np.full(4, 1e-40, np.float32)

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="no floating-point control register known for this processor"
)


def flushes() -> bool:
    """Whether the calling thread takes denormals for zero."""
    return not (TINY * np.float32(1)).any()


def test_denormals_are_zero_inside_and_themselves_again_outside() -> None:
    assert not flushes()
    with Flushed():
        assert flushes()
    assert not flushes()


def test_an_error_inside_restores_the_mode_too() -> None:
    with pytest.raises(ValueError, match="inside"), Flushed():
        raise ValueError("inside")
    assert not flushes()


def test_a_caller_that_flushes_already_goes_on_flushing() -> None:
    with Flushed():
        with Flushed():
            pass
        assert flushes()


def test_what_a_function_does_to_its_own_thread_stays_there() -> None:
    def change() -> bool:
        Flushed().__enter__()
        return flushes()

    assert on_own_thread(change)
    assert not flushes()
    with pytest.raises(KeyError, match="lost"):
        on_own_thread(lambda: {}["lost"])


@pytest.mark.parametrize("threads", [1, 2])
def test_opening_and_calling_a_session_leave_the_callers_mode_alone(exported: Bundle, threads: int) -> None:
    with bca_deploy.open(exported.directory, threads=threads) as session:
        assert not flushes()
        session.warmup()
        assert not flushes()
        session.run_many([(np.ones((1, n, 24), np.float32), np.ones((1, 3, 16), np.float32)) for n in (2, 3)])
        assert not flushes()


def test_the_session_itself_flushes_while_it_computes(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with bca_deploy.open(exported.directory) as session:
        inner, seen = session._backend._session, []  # type: ignore[attr-defined]

        class Spy:
            io_binding = inner.io_binding

            def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
                seen.append(flushes())
                return inner.run(names, inputs)  # type: ignore[no-any-return]

            def run_with_iobinding(self, binding: object) -> None:
                seen.append(flushes())
                inner.run_with_iobinding(binding)

        monkeypatch.setattr(session._backend, "_session", Spy())
        monkeypatch.setattr(session._backend, "_alone", Spy())
        inputs = {"x": np.ones((1, 2, 24), np.float32), "context": np.ones((1, 3, 16), np.float32)}
        session.run(inputs)
        session.run_into(inputs, {"out": np.empty((1, 2, 24), np.float32), "context_out": np.empty((1, 3, 16), np.float32)})
        session.run_many([tuple(inputs.values())] * 2)
    assert seen == [True] * 4
