"""OpenAI's body to its exact bounds, and what each field is without it."""

import json
from typing import Any

import pytest

from protocol.audio.encoder import CODINGS
from protocol.wire.structs import AudioFormat
from relayd.config.schema import SpaceConfig
from relayd.core.space import Space
from relayd.http.errors import HttpError
from relayd.http.openai.json_body import MAX_BODY_VALUES
from relayd.http.openai.speech_request import (
    DEFAULT_VOICE,
    MAX_BODY_BYTES,
    Speech,
    params_of,
    parse_speech,
)


def speech(**fields: Any) -> Speech:
    return parse_speech(json.dumps({"model": "tts", "input": "hello"} | fields).encode())


def faults(**fields: Any) -> dict[str, Any]:
    with pytest.raises(HttpError) as refused:
        speech(**fields)
    assert refused.value.status == 422
    return refused.value.details or {}


def test_what_is_not_said_is_openais_default() -> None:
    told = speech()
    assert (told.model, told.text, told.voice, told.instructions, told.speed) == ("tts", "hello", "default", "", 1.0)
    assert (told.sse, told.whole, told.cache, told.extra) == (False, False, True, {})
    assert told.coding is CODINGS["mp3"] is next(iter(CODINGS.values()))


@pytest.mark.parametrize(
    ("fields", "sse", "whole"),
    [
        ({"stream": False}, False, True),
        ({"stream": True}, False, False),
        ({"stream_format": "sse"}, True, False),
        ({"stream_format": "sse", "stream": False}, True, False),
    ],
)
def test_audio_comes_whole_only_if_it_is_asked_for_as_audio(fields: dict[str, Any], sse: bool, whole: bool) -> None:
    told = speech(**fields)
    assert (told.sse, told.whole) == (sse, whole)


@pytest.mark.parametrize("voice", [None, "", {"id": ""}])
def test_no_voice_is_the_spaces_own(voice: Any) -> None:
    assert speech(voice=voice).voice == DEFAULT_VOICE


@pytest.mark.parametrize(
    ("field", "fits", "over"),
    [
        ("model", "m" * 256, "m" * 257),
        ("voice", "v" * 256, "v" * 257),
        ("voice", {"id": "v" * 256}, {"id": "v" * 257}),
        ("voice", {"id": "v"}, {"name": "v"}),
        ("input", "x" * 65_536, "x" * 65_537),
        ("instructions", "x" * 65_536, "x" * 65_537),
        ("speed", 0.25, 0.249),
        ("speed", 4.0, 4.001),
        ("input", "a", " \n"),
        ("response_format", "wav", "midi"),
        ("stream", False, "no"),
        ("cache", False, "no"),
    ],
)
def test_each_field_has_its_limit(field: str, fits: Any, over: Any) -> None:
    speech(**{field: fits})
    assert list(faults(**{field: over})) == [field]


def test_a_body_has_at_most_256_fields_with_names_of_256_characters() -> None:
    speech(**{f"f{number}": 1 for number in range(254)})
    speech(**{"f" * 256: 1})
    for fields in ({f"f{number}": 1 for number in range(255)}, {"f" * 257: 1}):
        with pytest.raises(HttpError, match="256 fields, whose names have at most 256 characters"):
            speech(**fields)


def test_a_body_holds_at_most_a_hundred_thousand_values() -> None:
    assert (MAX_BODY_BYTES, MAX_BODY_VALUES) == (8 * 1024 * 1024, 100_000)
    head = b'{"model":"tts","input":"hi","x":['
    used = sum(map(head.count, (b",", b"[", b"{")))

    def body(values: int) -> bytes:
        return head + b",".join([b"1"] * (values - used + 1)) + b"]}"

    parse_speech(body(MAX_BODY_VALUES))
    with pytest.raises(HttpError, match="more than 100000 values"):
        parse_speech(body(MAX_BODY_VALUES + 1))


@pytest.mark.parametrize(("voices", "more"), [(23, ""), (24, " and 1 more: GET /v1/audio/voices?model=tts")])
def test_of_many_voices_24_are_told_with_the_default(voices: int, more: str) -> None:
    names = [f"v{number:02}" for number in range(voices)]
    space = Space(
        name="tts",
        config=SpaceConfig(),
        engine="fake",
        params={"properties": {"text": {}, "voice": {"enum": ["default", *names]}}},
        format=AudioFormat(sample_rate=24_000),
    )
    with pytest.raises(HttpError) as refused:
        params_of(speech(voice="nobody"), space)
    told = ", ".join(["default", *names[:23]]) + more
    assert told in str(refused.value.details)
    assert ("more" in str(refused.value.details)) is bool(more)
