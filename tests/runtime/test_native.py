"""Programs with sanitizers: LeakSanitizer's own failures are no finding and hide none."""

import os
import shutil
from pathlib import Path

import pytest
from support import native


@pytest.fixture
def program(tmp_path: Path) -> "Program":
    return Program(tmp_path)


class Program:
    """Stands in for a program with AddressSanitizer: it does what it is told, and keeps what it was told about leaks."""

    def __init__(self, place: Path) -> None:
        self.path, self.log = place / "program", place / "log"

    def does(self, script: str) -> None:
        self.path.write_text(f'#!/bin/sh\necho "$ASAN_OPTIONS" >> {self.log}\nruns=$(wc -l < {self.log})\n{script}\n')
        self.path.chmod(0o755)

    @property
    def told(self) -> list[str]:
        return [line.removeprefix("detect_leaks=") for line in self.log.read_text().splitlines()]


FAILS = 'echo "==7==LeakSanitizer has encountered a fatal error." >&2; exit 1'


def test_a_program_is_run_once_where_leaks_can_be_looked_for(program: Program) -> None:
    program.does("echo fine")
    done, looked = native.sanitized([program.path])
    assert (done.returncode, done.stdout, looked, program.told) == (0, "fine\n", True, ["1"])


def test_a_failure_of_the_leak_check_itself_is_tried_again(program: Program) -> None:
    program.does(f"if [ $runs -lt 3 ]; then {FAILS}; fi")
    done, looked = native.sanitized([program.path])
    assert (done.returncode, looked, program.told) == (0, True, ["1", "1", "1"])


def test_where_leaks_cannot_be_looked_for_the_rest_is_and_it_is_told(program: Program) -> None:
    program.does(f'if [ "$ASAN_OPTIONS" = detect_leaks=1 ]; then {FAILS}; fi')
    done, looked = native.sanitized([program.path])
    assert (done.returncode, looked, program.told) == (0, False, ["1", "1", "1", "0"])


@pytest.mark.parametrize("found", ["LeakSanitizer: detected memory leaks", "AddressSanitizer: heap-use-after-free"])
def test_what_a_sanitizer_finds_is_a_failure_at_once(program: Program, found: str) -> None:
    program.does(f'echo "==7==ERROR: {found}" >&2; exit 23')
    done, looked = native.sanitized([program.path])
    assert (done.returncode, looked, program.told) == (23, True, ["1"])


def test_an_error_is_found_where_the_leak_check_fails_too(program: Program) -> None:
    program.does(f'if [ "$ASAN_OPTIONS" = detect_leaks=1 ]; then {FAILS}; fi; exit 1')
    done, looked = native.sanitized([program.path])
    assert (done.returncode, looked) == (1, False)


def test_addresses_stay_where_they_are_on_a_machine_that_allows_it(program: Program) -> None:
    if not native._steady():
        pytest.skip("this machine does not allow it, or has no setarch")
    program.does("cat /proc/self/personality")
    done, _ = native.sanitized([program.path])
    assert int(done.stdout, 16) & 0x0040000  # ADDR_NO_RANDOMIZE


def test_without_setarch_a_program_runs_as_it_is(monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    program.does("echo fine")
    native._steady.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    try:
        assert native._steady() == ()
        assert native.sanitized([program.path])[0].stdout == "fine\n"
    finally:
        native._steady.cache_clear()


def test_a_preset_that_cannot_be_built_here_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "NEEDS", {"library": (), "clang": ("no-such-compiler",)})
    monkeypatch.setattr(native.sys, "argv", ["native.py", "address"])
    native.main()
    assert capsys.readouterr().out == f"runtime/ (address) is not built without no-such-compiler{os.linesep}"
