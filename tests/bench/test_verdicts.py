"""Limits: which rows keep theirs, and what is said of those that do not."""

from bench.figures import in_turns, paired, table, verdict
from bench.guard import verdicts

BUDGETS = {"tolerance": 0.05, "machine_tolerance": 0.2, "one": {"calls": 100.0, "kilo_instructions": 10.0}}


def test_the_ratio_of_a_row_is_the_median_of_its_rounds_ratios() -> None:
    row = paired("relay", "cpu", "µs", [1.0, 20.0, 3.0], [1.0, 10.0, 1.0], "nats", limit_ratio=1.9)
    assert row.ratio == 2.0
    assert not row.kept
    assert "**BROKEN**" in table([row])
    assert verdict([row]).startswith("0 of 1 limits kept.")


def test_a_row_within_its_limit_is_kept() -> None:
    row = paired("relay", "cpu", "µs", [1.0], [1.0], "nats", limit_ratio=1.0)
    assert row.kept
    assert verdict([row]) == "1 of 1 limits kept."


def test_turns_go_back_and_forth() -> None:
    order: list[str] = []
    in_turns(3, {name: lambda name=name: order.append(name) for name in "ABC"})  # type: ignore[misc]
    assert "".join(order) == "ABCCBAABC"


def test_a_count_within_the_tolerance_keeps_its_budget() -> None:
    assert verdicts({"one": {"calls": 104.9, "kilo_instructions": 11.9}}, BUDGETS)[1]


def test_a_count_over_the_tolerance_does_not() -> None:
    text, kept = verdicts({"one": {"calls": 105.2}}, BUDGETS)
    assert not kept
    assert "**over** by +5%" in text
    assert not verdicts({"one": {"kilo_instructions": 12.1}}, BUDGETS)[1]
