"""Places and bytes: what is over is refused, and the youngest gives way."""

import asyncio

import pytest

from bca_deploy.serving.flight import Arrivals, BusyError, Flight


def test_places_are_counted_and_given_back() -> None:
    flight = Flight(most_requests=2, most_bytes=10)
    said = "2 requests are under way, the most here; try again later, or on another replica"
    with flight.place(), flight.place(), pytest.raises(BusyError, match=said):
        flight.enter()
    assert (flight.requests, flight.entered) == (0, 2)
    flight.enter().leave()


def test_bytes_beyond_the_limit_are_refused_and_those_of_an_answer_keep_others_out() -> None:
    flight = Flight(most_requests=9, most_bytes=10)
    with flight.place() as first, flight.place() as second:
        first.take(6)
        with pytest.raises(BusyError, match="requests and answers of 6 bytes are under way, and this server holds 10"):
            second.take(5)
        second.take(4)
        first.owe(100)
        with pytest.raises(BusyError, match="of 110 bytes"):
            second.check(1)
    assert flight.bytes == 0


def test_what_is_told_after_the_end_is_not_counted() -> None:
    flight = Flight(most_requests=9, most_bytes=10)
    place = flight.enter()
    place.take(3)
    place.leave()
    place.leave()
    place.owe(5)
    assert (flight.requests, flight.bytes) == (0, 0)


def test_where_bytes_run_short_the_youngest_body_on_its_way_is_ended_and_the_older_come_through() -> None:
    flight, ended = Flight(most_requests=9, most_bytes=10), []
    with flight.place() as old, flight.place() as young, old.arriving(lambda: ended.append("old")):
        with young.arriving(lambda: ended.append("young")):
            old.take(5)
            young.take(5)
            old.take(4)
            assert ended == ["young"]
            with pytest.raises(BusyError):
                young.take(1)
            assert flight.bytes == 9
        with pytest.raises(BusyError):  # it is the youngest itself now
            old.take(2)
        old.take(1)
    assert ended == ["young"]
    assert (flight.requests, flight.bytes) == (0, 0)


def test_a_message_that_takes_long_gives_place_to_one_that_waits_and_to_no_other() -> None:
    async def slow() -> str:
        await asyncio.sleep(3600)
        return "late"

    async def quick() -> str:
        return "here"

    async def scene() -> None:
        arrivals = Arrivals(most=2, limit_s=3600, patience_s=0.01)
        held = [asyncio.create_task(arrivals.one(slow)) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert not any(one.done() for one in held), "nobody waits"
        assert await asyncio.gather(*(arrivals.one(quick) for _ in range(20))) == ["here"] * 20
        with pytest.raises(TimeoutError):
            await held[0]
        held[1].cancel()

    asyncio.run(scene())
