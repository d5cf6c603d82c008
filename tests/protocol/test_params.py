"""Params against a worker's schema: faults by field, in words; and schemas that are none."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.params import MAX_FAULTS, check_params, check_schema

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "minLength": 1, "maxLength": 10},
        "rate": {"type": "integer", "minimum": 80, "maximum": 450},
        "voice": {"enum": ["en", "zh"]},
        "more": {"type": "object", "properties": {"pitch": {"type": "number"}}},
    },
    "required": ["text"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("params", "faults"),
    [
        ({"text": "hello"}, {}),
        ({"text": "hello", "rate": 80, "voice": "zh", "more": {"pitch": 1.5}}, {}),
        ({}, {"text": "is required"}),
        ({"text": ""}, {"text": "must not be empty"}),
        ({"text": 5}, {"text": "must be a string, not int"}),
        ({"text": None}, {"text": "must be a string, not nil"}),
        ({"text": "x" * 11}, {"text": "must have at most 10 characters"}),
        ({"text": "a", "rate": 1}, {"rate": "must be at least 80"}),
        ({"text": "a", "rate": 1000}, {"rate": "must be at most 450"}),
        ({"text": "a", "rate": True}, {"rate": "must be an integer, not boolean"}),
        ({"text": "a", "voice": "fr"}, {"voice": "must be one of en, zh"}),
        ({"text": "a", "spede": 1}, {"spede": "is unknown; it takes more, rate, text, voice"}),
        ({"text": "a", "more": {"pitch": "high"}}, {"more.pitch": "must be a number, not string"}),
        ({"rate": 1, "x": 2}, {"text": "is required", "rate": "must be at least 80", "x": None}),
    ],
)
def test_faults_are_told_by_field_in_words(params: dict[str, Any], faults: dict[str, str | None]) -> None:
    told = check_params(SCHEMA, params)
    assert told.keys() == faults.keys()
    assert all(words is None or told[field] == words for field, words in faults.items())


def test_an_empty_schema_takes_everything() -> None:
    assert check_params({}, {"anything": [1, 2]}) == {}


def test_the_number_of_faults_and_their_length_are_bounded() -> None:
    told = check_params({"additionalProperties": False}, {f"field{number}": 0 for number in range(60)})
    assert len(told) == MAX_FAULTS
    told = check_params({"properties": {"a": {"const": 1}}}, {"a": "x" * 50_000})
    assert len(told["a"]) <= 300


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "text"},
        {"properties": []},
        {"minimum": "1"},
        {"$ref": "https://example.org/schema.json"},
        {"properties": {"a": {"$ref": "file:///etc/passwd"}}},
        {"allOf": [{"$ref": "other.json#/a"}]},
    ],
)
def test_a_schema_that_is_none_or_points_outside_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="params"):
        check_schema(schema)


def test_a_schema_may_point_into_itself() -> None:
    schema = {"$defs": {"word": {"type": "string"}}, "properties": {"text": {"$ref": "#/$defs/word"}}}
    check_schema(schema)
    assert check_params(schema, {"text": 1}) == {"text": "must be a string, not int"}


params = st.dictionaries(
    st.text(max_size=8) | st.sampled_from(["text", "rate", "voice", "more"]),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-1000, 1000)
        | st.floats(allow_nan=False)
        | st.text(max_size=12)
        | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=5,
)


@given(params)
@settings(max_examples=300, deadline=None)
def test_any_params_give_faults_in_words_and_no_exception(given_params: dict[str, Any]) -> None:
    told = check_params(SCHEMA, given_params)
    assert all(told.values())
