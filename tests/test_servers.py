"""The helpers that start servers: what Triton dies of by itself is tried again, whatever else it says is not."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.servers import TRITONS_OWN, Server, free_ports, settled


@pytest.fixture
def triton_that(tmp_path: Path) -> Iterator[Callable[[str], Callable[[], Server]]]:
    """A program in Triton's place; each start adds a line to `starts`, which the program sees."""
    log, starts, processes = tmp_path / "log", tmp_path / "starts", []

    def program(script: str) -> Callable[[], Server]:
        def start() -> Server:
            with starts.open("a") as file:
                file.write("start\n")
            with log.open("wb") as output:
                processes.append(subprocess.Popen(["sh", "-c", script], cwd=tmp_path, stdout=output, stderr=output))
            return Server(processes[-1], "127.0.0.1:9", "127.0.0.1:9", log)

        return start

    yield program
    for process in processes:
        process.kill()
        process.wait()


DIES = f"echo 'what():  {TRITONS_OWN}'; exit 134"


def starts(place: Path) -> int:
    return (place / "starts").read_text().count("start")


def test_a_triton_that_dies_of_itself_is_started_again(
    triton_that: Callable[..., Callable[[], Server]], tmp_path: Path
) -> None:
    start = triton_that(f"if [ $(wc -l < starts) -lt 3 ]; then {DIES}; fi; echo gave up; exit 1")
    server = settled(start, ready=False)
    assert (server.log.read_text(), starts(tmp_path)) == ("gave up\n", 3)


def test_a_triton_that_always_dies_of_itself_is_a_failure(
    triton_that: Callable[..., Callable[[], Server]], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=TRITONS_OWN):
        settled(triton_that(DIES), ready=False)
    assert starts(tmp_path) == 5


def test_a_triton_that_gives_up_is_a_failure_at_once_where_it_was_to_be_ready(
    triton_that: Callable[..., Callable[[], Server]], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="no such model"):
        settled(triton_that("echo no such model; exit 1"), ready=True)
    assert starts(tmp_path) == 1


def test_a_free_port_stays_free_for_one_server_and_nobody_answers_meanwhile() -> None:
    with free_ports(2) as (one, other):
        assert one != other
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.1", one))
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", one))
        with socket.create_server(("127.0.0.1", one)) as server, socket.create_connection(("127.0.0.1", one)):
            assert server.getsockname()[1] == one
