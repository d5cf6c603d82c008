"""Params against a worker's schema: faults by field, in words; and schemas that are none."""

import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.wire.params_schema import KEYWORDS, MAX_DEPTH, MAX_FAULTS, check_params, check_schema, integers_as_int

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
        ({"text": "a", "spede": 1}, {"spede": "is unknown; accepted: more, rate, text, voice"}),
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


FULL: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "All of it",
    "type": "object",
    "properties": {
        "word": {"type": ["string", "null"], "minLength": 1, "maxLength": 9, "format": "word", "examples": ["a", "b"]},
        "share": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1, "multipleOf": 0.1, "default": 0.5},
        "even": {"type": "integer", "minimum": -4, "maximum": 4, "multipleOf": 2, "description": "even"},
        "on": {"const": True},
        "pick": {"enum": [1, "one", None, 2.5, False]},
        "list": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        "map": {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": {"type": "boolean"}},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 0}]},
        "one": {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 10}]},
        "all": {"allOf": [{"type": "integer"}, {"minimum": 3}, True]},
        "never": False,
        "old": {"deprecated": True, "$comment": "gone soon"},
    },
    "required": ["word"],
    "additionalProperties": False,
}


def test_every_keyword_of_the_list_is_taken() -> None:
    check_schema(FULL)
    used = {word for word in KEYWORDS if f"'{word}'" in str(FULL)}
    assert used == set(KEYWORDS)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ([], "params must be a map, not array"),
        ({"type": "text"}, "params.type must be one of string, "),
        ({"type": []}, "params.type must be one of string, "),
        ({"properties": []}, "params.properties must be a map, not array"),
        ({"properties": {"a": 1}}, "params.properties.a must be a schema"),
        ({"properties": {"a": {"minimum": "1"}}}, "params.properties.a.minimum must be a number"),
        ({"minimum": float("nan")}, "params.minimum "),
        ({"multipleOf": 0}, "params.multipleOf "),
        ({"minLength": -1}, "params.minLength "),
        ({"enum": []}, "params.enum "),
        ({"enum": [{}]}, "params.enum "),
        ({"const": []}, "params.const "),
        ({"required": [1]}, "params.required "),
        ({"anyOf": []}, "params.anyOf must be an array of 1 to 8 schemas"),
        ({"anyOf": [{}] * 9}, "params.anyOf must be an array of 1 to 8 schemas"),
        ({"$ref": "#"}, "params.$ref is a keyword that a relay does not accept; write out"),
        ({"$ref": "#/$defs/nowhere"}, "params.$ref is"),
        ({"$ref": "https://example.org/schema.json"}, "params.$ref is"),
        ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "params.properties.a.$ref is"),
        ({"items": {"allOf": [{"$dynamicRef": "#x"}]}}, "params.items.allOf.0.$dynamicRef is"),
        ({"$defs": {"word": {"type": "string"}}}, "params.$defs is"),
        ({"properties": {"a": {"pattern": "^(a+)+$"}}}, "params.properties.a.pattern is a keyword that a relay does"),
        ({"patternProperties": {".": {}}}, "params.patternProperties is"),
        ({"additionalProperties": {"uniqueItems": True}}, "params.additionalProperties.uniqueItems is"),
        ({"not": {}}, "params.not is"),
        ({"if": {}}, "params.if is"),
        ({1: 2}, "params.1 is"),
    ],
)
def test_a_schema_that_is_none_or_uses_another_keyword_is_refused_by_name(schema: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        check_schema(schema)


def nested(depth: int) -> dict[str, Any]:
    return {"items": nested(depth - 1)} if depth > 1 else {}


def test_the_depth_and_the_size_of_a_schema_are_bounded() -> None:
    check_schema(nested(MAX_DEPTH))
    with pytest.raises(ValueError, match="is too deep"):
        check_schema(nested(MAX_DEPTH + 1))
    with pytest.raises(ValueError, match="is too deep"):
        check_schema(nested(400))
    choices = {"enum": list(range(1_000))}
    check_schema({"properties": {"a": choices, "b": choices}})
    with pytest.raises(ValueError, match="too large"):
        check_schema({"properties": dict.fromkeys("abc", choices)})
    with pytest.raises(ValueError, match="too large"):
        check_schema({"properties": {f"{n}": {"properties": {f"{n}": {} for n in range(60)}} for n in range(60)}})


NUMBERS = {"items": {"type": "number", "minimum": 0, "maximum": 1}}
NAMES = [f"{number:060}" for number in range(1_000)]


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"items": NUMBERS}, [[0.5] * 1_000] * 60),
        ({"items": {"items": {"type": "number"}}}, [[0.5] * 1_000] * 60),
        ({"items": {"enum": NAMES}}, NAMES),
        ({"items": {"enum": list(range(1_000))}}, [999] * 1_000),
        ({"items": {"allOf": [{"allOf": [{"multipleOf": 0.1}] * 8}] * 8}}, [0.3] * 1_000),
        ({"items": {"required": NAMES}}, [dict.fromkeys(NAMES)] * 1_000),
        ({"items": {"items": {"anyOf": [False, {}]}}}, [[0] * 1_000] * 60),
    ],
)
def test_a_check_that_would_hold_the_relay_up_is_given_up(schema: dict[str, Any], value: Any) -> None:
    schema = {"properties": {"a": schema}}
    check_schema(schema)
    assert list(check_params(schema, {"a": value})) == [""]
    assert "could not be checked: it takes more than" in check_params(schema, {"a": value})[""]


def test_an_array_of_1024_numbers_with_a_range_is_well_within_the_budget() -> None:
    schema = {"properties": {"a": NUMBERS}}
    assert check_params(schema, {"a": [0.5] * 1_024}) == {}
    assert check_params(schema, {"a": [0.5] * 1_023 + [2]}) == {"a.1023": "must be at most 1"}


@pytest.mark.parametrize("schema", [{"minimum": "x", "properties": 5}, {"type": 5}, {"properties": {"a": {"enum": 1}}}])
def test_nothing_is_raised_even_by_a_schema_that_was_never_checked(schema: dict[str, Any]) -> None:
    assert check_params(schema, {"a": 1})[""].startswith("could not be checked: ")


def test_values_that_contain_themselves_or_are_of_no_wire_type_raise_nothing() -> None:
    loop: list[Any] = []
    loop.append(loop)
    schema = {"properties": {"a": nested(7), "b": {"type": "integer", "multipleOf": 0.1}}}
    assert check_params(schema, {"a": loop, "b": 10**400})[""].startswith("could not be checked: OverflowError")
    assert check_params(schema, {"a": loop, "b": object()}) == {"b": "must be an integer, not object"}
    assert check_params({"properties": {"b": {"minimum": 0}}}, {"b": float("nan")}) == {"b": "must be at least 0"}


@pytest.mark.parametrize(
    ("params", "faults"),
    [
        ({"share": 0.3, "even": -2.0, "on": True, "pick": False, "either": 5, "one": 3, "all": 3}, {}),
        ({"share": 0.35}, {"share": "must be a multiple of 0.1"}),
        ({"share": 1}, {"share": "must be less than 1"}),
        ({"share": 0}, {"share": "must be more than 0"}),
        ({"on": 1}, {"on": "must be true"}),
        ({"pick": 0}, {"pick": "must be one of 1, one, null, 2.5, false"}),
        ({"pick": True}, {"pick": "must be one of 1, one, null, 2.5, false"}),
        ({"list": []}, {"list": "must have at least 1 items"}),
        ({"list": [1, "2"]}, {"list.1": "must be an integer, not string"}),
        ({"map": {}}, {"map": "must have at least 1 entries"}),
        ({"map": {"x": 1}}, {"map.x": "must be a boolean, not int"}),
        ({"either": -1}, {"either": "must be a string, not int or must be at least 0"}),
        ({"one": 10}, {"one": "fits 2 of the alternatives of which it must fit one"}),
        ({"all": 1}, {"all": "must be at least 3"}),
        ({"never": None}, {"never": "must not be there"}),
    ],
)
def test_the_words_of_every_keyword(params: dict[str, Any], faults: dict[str, str]) -> None:
    assert check_params(FULL, {"word": None, **params}) == faults


def test_a_const_says_why_there_is_no_choice() -> None:
    schema = {"properties": {"loud": {"const": False, "description": "this worker has no speaker"}}}
    assert check_params(schema, {"loud": True}) == {"loud": "must be false: this worker has no speaker"}
    assert check_params(schema, {"loud": False}) == {}


def test_field_names_are_cut_and_choices_not_told_without_end() -> None:
    told = check_params({"additionalProperties": False}, {"k" * 50_000: 1})
    assert [len(field) for field in told] == [128]
    told = check_params({"properties": {"a": {"enum": NAMES}}}, {"a": "x"})
    assert len(told["a"]) <= 300


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
@settings(max_examples=300)
def test_any_params_give_faults_in_words_and_no_exception(given_params: dict[str, Any]) -> None:
    told = check_params(SCHEMA, given_params)
    assert all(told.values())


bounds = st.integers(-3, 3) | st.sampled_from([0.5, -0.5, 2.0])
counts = st.integers(0, 3)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.0, 0.5, 1.0, -2.5]) | st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=1), inner, max_size=3),
    max_leaves=8,
)
scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2)
leaves = st.booleans() | st.fixed_dictionaries(
    {},
    optional={
        "type": st.lists(st.sampled_from(["string", "integer", "number", "boolean", "object", "array", "null"]))
        .filter(bool)
        .map(lambda names: names[0] if len(names) == 1 else list(dict.fromkeys(names))),
        "enum": st.lists(scalars, min_size=1, max_size=4),
        "const": scalars,
        "minimum": bounds,
        "maximum": bounds,
        "exclusiveMinimum": bounds,
        "exclusiveMaximum": bounds,
        "multipleOf": st.sampled_from([1, 2, 0.5]),
        "minLength": counts,
        "maxLength": counts,
        "minItems": counts,
        "maxItems": counts,
        "minProperties": counts,
        "maxProperties": counts,
        "required": st.lists(st.text("ab", max_size=1), unique=True, max_size=2),
    },
)
schemas = st.recursive(
    leaves,
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["object", "array"]),
            "properties": st.dictionaries(st.text("ab", max_size=1), inner, max_size=2),
            "additionalProperties": inner,
            "items": inner,
            **{name: st.lists(inner, min_size=1, max_size=3) for name in ("anyOf", "oneOf", "allOf")},
        },
    ),
    max_leaves=6,
).filter(lambda schema: isinstance(schema, dict))


@given(schemas, st.dictionaries(st.text("ab", max_size=1), values, max_size=3))
@settings(max_examples=400)
def test_it_takes_what_a_validator_of_the_whole_of_json_schema_takes(
    schema: dict[str, Any], given_params: dict[str, Any]
) -> None:
    check_schema(schema)
    told = check_params(schema, given_params)
    assert (not told) == jsonschema.Draft202012Validator(schema).is_valid(given_params), told


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": "integer"}, 2.0, 2),
        ({"type": ["integer", "null"]}, 2.0, 2),
        ({"type": ["integer", "number"]}, 2.0, 2.0),
        ({"type": "number"}, 2.0, 2.0),
        ({}, 2.0, 2.0),
        ({"enum": [1, 2]}, 2.0, 2),
        ({"const": 2}, 2.0, 2),
        ({"properties": {"n": {"type": "integer"}}}, {"n": 2.0, "x": 2.0}, {"n": 2, "x": 2.0}),
        ({"additionalProperties": {"type": "integer"}}, {"n": 2.0}, {"n": 2}),
        ({"items": {"type": "integer"}}, [1.0, 2.0], [1, 2]),
        ({"anyOf": [{"type": "null"}, {"type": "integer"}]}, 2.0, 2),
        ({"oneOf": [{"type": "string"}, {"items": {"type": "integer"}}]}, [2.0], [2]),
        ({"allOf": [{"minimum": 0}, {"type": "integer"}]}, 2.0, 2),
        ({"type": "integer"}, 1e300, 1e300),
        (True, 2.0, 2.0),
    ],
)
def test_a_whole_float_becomes_an_int_where_an_integer_is_wanted(schema: Any, value: Any, expected: Any) -> None:
    assert repr(integers_as_int(schema, value)) == repr(expected)


@pytest.mark.parametrize(
    ("params", "fed", "faults"),
    [
        ({}, {"text"}, {}),
        ({"rate": 80}, {"text", "voice_file"}, {}),
        ({}, {"voice_file"}, {"text": "is required"}),
        ({"text": "hello"}, {"text"}, {"text": "is given as an input, too; send it only once"}),
        ({"rate": 1}, {"text"}, {"rate": "must be at least 80"}),
    ],
)
def test_a_fed_input_stands_for_the_param_of_its_name(
    params: dict[str, Any], fed: set[str], faults: dict[str, str]
) -> None:
    assert check_params(SCHEMA, params, fed) == faults


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"required": ["text"]}, {"required": ["ssml"]}]},
        {"properties": {"text": {}}, "minProperties": 1},
        {"allOf": [{"required": ["text"]}]},
    ],
)
def test_a_fed_input_counts_wherever_the_whole_params_are_checked(schema: dict[str, Any]) -> None:
    assert check_params(schema, {})
    assert not check_params(schema, {}, {"text"})
    assert check_params(schema, {}, {"other"})


def test_a_fed_input_does_not_stand_for_what_lies_deeper() -> None:
    schema = {"properties": {"more": {"required": ["text"]}}}
    assert check_params(schema, {"more": {}}, {"text"}) == {"more.text": "is required"}


def test_both_given_is_a_fault_without_a_schema_too() -> None:
    assert check_params({}, {"text": "x"}, {"text"}).keys() == {"text"}
