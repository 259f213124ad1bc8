"""Calls in turn: every round has each of them once, in both directions, and ratios pair rounds."""

from bca_deploy.timing.turns import in_turn, ratios, turn


def test_every_round_has_each_call_forth_and_back() -> None:
    said: list[str] = []
    found = in_turn([lambda: said.append("a"), lambda: said.append("b"), lambda: said.append("c")], 2)
    assert [len(times) for times in found] == [2, 2, 2]
    assert "".join(said) == "aabbcc" + "aabbcc" + "ccbbaa"  # each warmed up by a call that does not count


def test_a_turn_goes_on_for_its_time_and_calls_once_at_least() -> None:
    calls: list[int] = []
    assert len(turn(lambda: calls.append(1), last_ms=1e9)) == len(calls) == 1  # a long one is not warmed up
    assert len(turn(lambda: calls.append(1), at_least_ms=5.0)) > 1


def test_ratios_pair_the_rounds() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
