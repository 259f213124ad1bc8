"""How the commands end: by signals at any moment, at a closed pipe, and with which exit code."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bca_deploy
from bca_deploy import ending
from bca_deploy.bundle.read import Bundle
from bca_deploy.cli import app, console

BIN = Path(sys.executable).parent
COMMANDS = {
    "bca": [BIN / "bca", "inspect", "nowhere"],
    "bca-export": [BIN / "bca-export", "--dry-run"],
    "python -m bca_deploy": [sys.executable, "-m", "bca_deploy", "inspect", "nowhere"],
    "python -m bca_deploy.cli": [sys.executable, "-m", "bca_deploy.cli", "inspect", "nowhere"],
}
SIGNALS = [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]


def run(command: list[object], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=os.environ | environment)


def with_module(place: Path, name: str, text: str) -> str:
    """PYTHONPATH under which this module stands in for the real one of its name."""
    place.mkdir(exist_ok=True)
    (place / f"{name}.py").write_text(text)
    return os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])


@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize(("number", "word"), SIGNALS)
def test_a_signal_during_the_first_imports_ends_without_a_traceback(
    tmp_path: Path, command: str, number: signal.Signals, word: str
) -> None:
    text = f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\nexcept BaseException: pass\nfrom os import *"
    done = run(COMMANDS[command], PYTHONPATH=with_module(tmp_path, "typer", text))
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", f"error: {word}; nothing was left behind\n")


@pytest.mark.parametrize(("number", "word"), SIGNALS)
def test_a_signal_during_the_import_of_the_export_packages_is_not_lost(
    tmp_path: Path, number: signal.Signals, word: str
) -> None:
    text = f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\nexcept BaseException: pass\nraise ImportError('torch')"
    done = run(COMMANDS["bca-export"], PYTHONPATH=with_module(tmp_path, "torch", text))
    assert (done.returncode, done.stderr) == (128 + number, f"error: {word}; nothing was left behind\n")


def test_a_signal_that_the_shell_ignores_stays_ignored(tmp_path: Path) -> None:
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ImportError('went on')"
    begin = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    done = run([sys.executable, "-c", begin, *COMMANDS["bca-export"]], PYTHONPATH=with_module(tmp_path, "typer", kill))
    assert "went on" in done.stderr


@pytest.mark.parametrize(("number", "word"), SIGNALS)
def test_inside_a_command_a_signal_is_raised_once_and_the_handlers_are_put_back(number: signal.Signals, word: str) -> None:
    before = [signal.getsignal(one) for one, _ in SIGNALS]
    with pytest.raises(ending.Ended, match=word) as caught, ending.cleanly() as seen:
        signal.raise_signal(number)
    assert caught.value.exit_code == 128 + number
    assert seen == [number]
    assert [signal.getsignal(one) for one, _ in SIGNALS] == before


def test_a_lost_sigterm_ends_the_work_at_the_next_stage() -> None:
    with pytest.raises(ending.Ended) as caught, console.progress() as progress:  # noqa: PT012  (the second stage is the point)
        progress.stage("trace")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        progress.stage("parity")
    assert caught.value.exit_code == 143


def test_outside_the_main_thread_no_handler_is_set() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with ending.cleanly() as seen:
            found.append((seen, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [([], before)]


@pytest.mark.parametrize("arguments", [("inspect", "{}"), ("inspect", "{}", "--json"), ("--help",), ("--version",)])
@pytest.mark.parametrize("command", ["bca", "python -m bca_deploy"])
def test_a_closed_pipe_is_not_failed_parity(exported: Bundle, command: str, arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    start = COMMANDS[command][:-2]
    whole = [*start, *(one.format(exported.directory) for one in arguments)]
    done = subprocess.run(list(map(str, whole)), stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_pipe_that_is_read_to_the_end_gives_the_commands_own_code(exported: Bundle) -> None:
    assert run([*COMMANDS["bca"][:1], "inspect", exported.directory]).returncode == 0
    assert run(COMMANDS["bca"]).returncode == 2


def test_an_output_that_is_not_there_is_no_error(exported: Bundle) -> None:
    assert ending.code_for(None, 2) == 2


@pytest.mark.parametrize("command", [["bca"], ["bca-export"], ["-m", "bca_deploy"], ["-m", "bca_deploy.cli"]])
def test_the_version_is_shown(command: list[str]) -> None:
    start = [BIN / command[0]] if len(command) == 1 else [sys.executable, *command]
    done = run([*start, "--version"])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"bca-deploy {bca_deploy.__version__}\n", "")


@pytest.mark.parametrize("module", ["bca_deploy", "bca_deploy.cli"])
def test_the_package_is_a_program(exported: Bundle, module: str) -> None:
    done = run([sys.executable, "-m", module, "inspect", exported.directory])
    assert done.returncode == 0
    assert "every hash right" in done.stdout
    assert run([sys.executable, "-m", module, "inspect", "nowhere"]).returncode == 2


def test_the_entry_imports_next_to_nothing_before_it_is_ready() -> None:
    script = "import sys, re, signal; before = {*sys.modules}; import bca_deploy.cli; print(sorted({*sys.modules} - before))"
    assert run([sys.executable, "-c", script]).stdout == "['bca_deploy', 'bca_deploy.cli', 'bca_deploy.ending']\n"


def test_an_interrupt_of_the_libraries_own_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bca_deploy.cli.doctor.examine", interrupted)
    result = CliRunner().invoke(app, ["doctor"])
    assert (result.exit_code, result.stderr) == (130, "error: interrupted; nothing was left behind\n")
