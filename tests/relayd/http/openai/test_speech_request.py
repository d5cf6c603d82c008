"""OpenAI's words and a space's: which field becomes which param of real engines."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuworker.engines import mock
from gpuworker.engines.voxcpm.schema import Abilities, params_schema
from protocol.wire.params_schema import check_params
from protocol.wire.structs import AudioFormat
from relayd.config.schema import OpenAi, SpaceConfig
from relayd.core.space import Space
from relayd.http.errors import HttpError
from relayd.http.openai.speech_request import Speech, params_of, parse_speech, speaks, usage_of, voices_of

FORMAT = AudioFormat(sample_rate=24_000)
ESPEAK = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "voice": {"enum": ["auto", "en-us"]}, "rate": {"type": "integer"}},
    "required": ["text"],
    "additionalProperties": False,
}


def a_space(schema: dict[str, Any], engine: str = "fake", **fields: Any) -> Space:
    return Space(name="tts", config=SpaceConfig(), engine=engine, params=schema, **({"format": FORMAT} | fields))


def a_speech(**fields: Any) -> Speech:
    return parse_speech(json.dumps({"model": "tts", "input": "hello"} | fields).encode())


def refusal_of(space: Space, names: OpenAi | None = None, **fields: Any) -> HttpError:
    with pytest.raises(HttpError) as caught:
        params_of(a_speech(**fields), space, names or OpenAi(strict=True))
    assert caught.value.status == 422
    return caught.value


@pytest.mark.parametrize(
    ("schema", "fields", "params"),
    [
        (ESPEAK, {}, {"text": "hello"}),
        (ESPEAK, {"voice": "default"}, {"text": "hello"}),
        (ESPEAK, {"voice": ""}, {"text": "hello"}),
        (ESPEAK, {"voice": "en-us"}, {"text": "hello", "voice": "en-us"}),
        (ESPEAK, {"voice": {"id": "en-us"}}, {"text": "hello", "voice": "en-us"}),
        (mock.PARAMS, {"speed": 2}, {"text": "hello"}),
        (params_schema(Abilities()), {}, {"text": "hello"}),
        (params_schema(Abilities(voices=("ann",))), {"voice": "ann"}, {"text": "hello", "voice": "ann"}),
        (
            params_schema(Abilities(clones=True)),
            {"instructions": "a calm old man"},
            {"text": "hello", "voice_description": "a calm old man"},
        ),
        (
            {"properties": {"input": {}, "instructions": {}}},
            {"instructions": "x"},
            {"input": "hello", "instructions": "x"},
        ),
        (
            {"properties": {"text": {}, "voice": {"type": "string"}}},
            {"voice": "any"},
            {"text": "hello", "voice": "any"},
        ),
        ({}, {"voice": "any", "instructions": "x"}, {"text": "hello", "voice": "any", "instructions": "x"}),
    ],
)
def test_fields_become_the_params_that_the_worker_declared(
    schema: dict[str, Any], fields: dict[str, Any], params: dict[str, Any]
) -> None:
    told = params_of(a_speech(**fields), a_space(schema)).params
    assert told == params
    assert check_params(schema, told) == {}


@pytest.mark.parametrize(
    ("schema", "fields", "words"),
    [
        (ESPEAK, {"voice": "alloy"}, "voice: space 'tts' has no voice 'alloy'; it has default, auto, en-us"),
        (mock.PARAMS, {"voice": "alloy"}, "it has default"),
        (params_schema(Abilities()), {"voice": "alloy"}, "it has default"),
        (params_schema(Abilities()), {"instructions": "softly"}, "does not accept instructions"),
        ({"properties": {"prompt": {"type": "string"}}}, {}, "has no param for a text (it has: prompt)"),
    ],
)
def test_what_the_worker_did_not_declare_is_refused(schema: dict[str, Any], fields: dict[str, Any], words: str) -> None:
    assert words in refusal_of(a_space(schema), **fields).message


def test_a_space_without_audio_is_refused_and_one_that_no_worker_has_served_is_not() -> None:
    assert "produces no audio" in refusal_of(a_space(ESPEAK, format=None)).details["model"]
    assert params_of(a_speech(), a_space({}, engine="", format=None)).params == {"text": "hello"}


@pytest.mark.parametrize("voice", ["default", "any"])
def test_a_space_that_accepts_any_voice_gets_the_one_that_is_named(voice: str) -> None:
    space = a_space({"properties": {"text": {}, "voice": {"type": "string"}}})
    named = {} if voice == "default" else {"voice": voice}
    assert params_of(a_speech(voice=voice), space).params == {"text": "hello"} | named
    assert params_of(a_speech(voice=voice, speaker="bert"), space).params == {"text": "hello", "voice": "bert"}


@pytest.mark.parametrize(
    ("voices", "asked", "spoken"),
    [
        ({}, "en-us", "en-us"),
        ({}, "alloy", "default"),
        ({"alloy": "en-us"}, "alloy", "en-us"),
        ({"auto": "en-us"}, "auto", "en-us"),
        ({"alloy": "default"}, "alloy", "default"),
        ({"tts": {"alloy": "auto"}, "alloy": "en-us"}, "alloy", "auto"),
        ({"other": {"alloy": "auto"}, "alloy": "en-us"}, "alloy", "en-us"),
        ({"*": "auto"}, "alloy", "auto"),
        ({"*": "auto"}, "en-us", "en-us"),
        ({"tts": {"*": "auto"}, "alloy": "en-us"}, "alloy", "en-us"),
        ({"tts": {"*": "auto"}, "alloy": "en-us"}, "nova", "auto"),
    ],
)
def test_a_voice_is_what_the_settings_say_or_the_spaces_own(voices: Any, asked: str, spoken: str) -> None:
    told = params_of(a_speech(voice=asked), a_space(ESPEAK), OpenAi(voices=voices), any_voice=True)
    assert (told.voice, told.params.get("voice", "default"), told.replaced) == (spoken, spoken, spoken != asked)


def test_a_setting_that_names_no_voice_of_the_space_is_told() -> None:
    why = "voice 'alloy' stands for 'gone' ([openai] voices of relayd.toml), and space 'tts' has no voice 'gone'"
    assert why in refusal_of(a_space(ESPEAK), OpenAi(voices={"alloy": "gone"}), voice="alloy").details["voice"]


def test_instructions_that_a_space_does_not_accept_are_passed_over_unless_the_settings_refuse_them() -> None:
    told = params_of(a_speech(instructions="softly"), a_space(ESPEAK), OpenAi())
    assert (told.params, told.passed_over) == ({"text": "hello"}, ("instructions",))
    for names in (OpenAi(strict=True), OpenAi(unknown_instructions="refuse")):
        assert "leave them out" in refusal_of(a_space(ESPEAK), names, instructions="softly").details["instructions"]


def test_a_fault_of_a_param_is_told_by_the_field_that_it_was_sent_as() -> None:
    space = a_space({"properties": {"input": {}, "voice_description": {}, "rate": {}}})
    told = params_of(a_speech(instructions="softly", rate={"a": 1}), space)
    assert [told.field(name) for name in ("input", "voice_description.x", "rate.a")] == [
        "input",
        "instructions.x",
        "rate.a",
    ]
    assert params_of(a_speech(), a_space(ESPEAK)).field("text") == "input"


def test_of_many_voices_some_are_told_and_where_the_rest_are() -> None:
    schema = ESPEAK | {"properties": {"text": {}, "voice": {"enum": [f"v{n}" for n in range(140)]}}}
    message = refusal_of(a_space(schema), voice="alloy").message
    assert "v22 and 117 more: GET /v1/audio/voices?model=tts" in message
    assert len(message) < 300


def test_a_voice_named_default_is_sent_where_a_worker_has_one() -> None:
    schema = ESPEAK | {"properties": {"text": {}, "voice": {"enum": ["default", "other"]}}}
    assert params_of(a_speech(), a_space(schema)).params == {"text": "hello", "voice": "default"}


def test_voices_are_those_of_the_schema() -> None:
    assert voices_of(a_space(ESPEAK)) == ("auto", "en-us")
    assert voices_of(a_space(mock.PARAMS)) == ()
    assert voices_of(a_space(params_schema(Abilities()))) == ()
    assert voices_of(a_space({"properties": {"text": {}, "voice": {"type": "string"}}})) is None
    assert voices_of(a_space({"properties": {"text": {}, "voice": {"const": "anna"}}})) == ("anna",)
    assert voices_of(a_space({"properties": {"text": {}, "voice": {"const": 5}}})) == ()


def test_a_space_speaks_that_makes_audio_of_text() -> None:
    assert speaks(a_space(ESPEAK))
    assert speaks(a_space({}, engine="", format=None))  # no worker has said yet what it makes
    assert not speaks(a_space(ESPEAK, format=None))
    assert not speaks(a_space({"properties": {"image": {}}}))


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(HttpError) as caught:
        parse_speech(b'{"input": 5, "speed": "fast"}')
    assert caught.value.details.keys() == {"model", "input", "speed"}
    assert caught.value.details["model"] == "is required"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"model": ', "Expecting value"),
        (b'{"model": "\xff"}', "it is not UTF-8, or nested too deeply"),
        (b"[" * 90_000, "it is not UTF-8, or nested too deeply"),
        (b"[]", "must be a JSON object, not array"),
    ],
)
def test_of_what_is_no_json_object_the_refusal_says_why(body: bytes, why: str) -> None:
    with pytest.raises(HttpError, match=why) as caught:
        parse_speech(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("input", "\ud800", "contains a lone surrogate, which is not a character"),
        ("voice", {"id": "\ud800"}, "contains a lone surrogate, which is not a character"),
        ("voice", {"name": "anna"}, 'must be a string or {"id": string}, not map'),
        ("voice", 5, 'must be a string or {"id": string}, not int'),
    ],
)
def test_a_field_that_is_no_text_is_told(field: str, value: Any, why: str) -> None:
    with pytest.raises(HttpError) as caught:
        a_speech(**{field: value})
    assert caught.value.details == {field: why}


def test_null_is_left_out_and_what_openai_does_not_know_is_passed_over() -> None:
    speech = a_speech(voice=None, speed=None, response_format=None, lang_code="en", volume=3)
    assert (speech.voice, speech.speed, speech.coding.name, speech.sse, speech.whole) == (
        "default",
        1,
        "mp3",
        False,
        False,
    )


def test_usage_counts_characters_and_twentieths_of_a_second() -> None:
    told = usage_of(a_speech(input="hello"), 2.0)
    assert told == {"input_tokens": 5, "output_tokens": 40, "total_tokens": 45}


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
_FIELD_NAMES = ("model", "input", "voice", "instructions", "response_format", "speed", "stream_format", "stream")


@given(st.binary() | st.dictionaries(st.sampled_from(_FIELD_NAMES), _JSON).map(lambda told: json.dumps(told).encode()))
def test_any_body_is_a_speech_or_a_refusal(body: bytes) -> None:
    try:
        speech = parse_speech(body)
    except HttpError:
        return
    assert speech.text.strip()
    assert 0.25 <= speech.speed <= 4
