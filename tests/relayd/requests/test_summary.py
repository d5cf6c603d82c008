"""What is kept and shown of a submission: as much as fits, and what is left out is said."""

from typing import Any

import msgpack
import pytest

from relayd.requests.summary import summarize
from tests.support.relay import a_submit, an_input

ROOM = 1_000_000


def summary(most_bytes: int = ROOM, inputs: Any = None, **params: Any) -> dict[str, Any]:
    packed = summarize(a_submit(params=params, inputs=inputs or {}), most_bytes)
    assert len(packed) <= most_bytes
    told: dict[str, Any] = msgpack.unpackb(packed)
    return told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("x" * 2_000, "x" * 2_000),
        ("x" * 2_001, "x" * 1_999 + "…"),
        (b"12345", "(5 bytes)"),
        (True, True),
        (None, None),
        ({"b": {"c": {"d": 1}}}, {"b": {"c": {"d": 1}}}),
        ({"b": {"c": {"d": {"e": 1}}}}, {"b": {"c": {"d": "(1 keys)"}}}),
        ({"b": {"c": {"d": {}}}}, {"b": {"c": {"d": {}}}}),
        ([[[[1, 2]]]], [[["(2 items)"]]]),
        ([[[[]]]], [[[[]]]]),
        (list(range(32)), list(range(32))),
        (list(range(33)), list(range(32))),
        ({f"{n:02}": n for n in range(33)}, {f"{n:02}": n for n in range(32)}),
        ({"k" * 64: 1}, {"k" * 64: 1}),
        ({"k" * 65: 1}, {"k" * 64: 1}),
    ],
)
def test_long_and_deep_values_are_cut_and_that_is_said(value: Any, told: Any) -> None:
    assert summary(a=value) == {"params": {"a": told}, "params_cut": told != value, "inputs": []}


def test_the_first_sixteen_inputs_are_told() -> None:
    inputs = {f"i{number:02}": an_input(b"x" * number) for number in range(17)}
    told = summary(inputs=inputs)["inputs"]
    assert told == [{"name": f"i{n:02}", "media_type": "audio/wav", "size": n} for n in range(16)]


def test_of_an_input_that_is_fed_it_tells_what_there_is() -> None:
    packed = summarize(a_submit(inputs={"fed": an_input(b""), "whole": an_input(b"abc")}), ROOM, {"fed": 5})
    assert {each["name"]: each["size"] for each in msgpack.unpackb(packed)["inputs"]} == {"fed": 5, "whole": 3}


def test_texts_are_cut_no_shorter_than_they_must() -> None:
    text = "x" * 3_000
    for chars in (2_000, 500, 200, 60):
        size = len(summarize(a_submit(params={"a": "x" * (chars - 1) + "…"}), ROOM))
        assert summary(size, a=text)["params"]["a"] == "x" * (chars - 1) + "…"
        if chars > 60:
            assert len(summary(size - 1, a=text)["params"]["a"]) < chars


def test_inputs_go_before_params_and_params_go_from_the_end() -> None:
    inputs = {f"i{number:030}": an_input(b"x") for number in range(16)}
    both = {"a": "x" * 50, "b": "y" * 50}
    alone = len(summarize(a_submit(params=both), ROOM))
    assert summary(alone, inputs=inputs, **both) == {"params": both, "params_cut": False, "inputs": []}
    cut = {"params": {"a": "x" * 50}, "params_cut": True, "inputs": []}
    assert summary(alone - 1, inputs=inputs, **both) == cut
    assert summary(alone - 1, inputs=inputs, **both, c=1) == cut, "and none from behind what was left out"
    deep = summary(300, inputs=inputs, a="x" * 61, b={"c": 1}, c="z" * 500, d=1)
    assert deep["params"] == {"a": "x" * 59 + "…", "b": "(1 keys)", "c": "z" * 59 + "…", "d": 1}
    assert deep["params_cut"]
