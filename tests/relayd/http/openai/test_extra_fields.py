"""Fields beyond OpenAI's: what a space has declared is sent on, who speaks is never passed over."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuworker.engines import mock
from gpuworker.engines.indextts2.params import input_rules as index_inputs
from gpuworker.engines.voxcpm.schema import Abilities, input_rules, params_schema
from protocol.wire.params_schema import check_params
from protocol.wire.structs import AudioFormat, InputRule
from relayd.config.schema import OpenAi, SpaceConfig
from relayd.core.space import Space
from relayd.http.errors import HttpError
from relayd.http.openai.speech_request import SpaceParams, params_of, parse_speech

WAV = b"RIFF and so on"
RECORDING = base64.b64encode(WAV).decode()
TEXT = {"type": "string"}


def a_space(properties: dict[str, Any], inputs: dict[str, InputRule] | None = None) -> Space:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    form = AudioFormat(sample_rate=24_000)
    return Space(name="tts", config=SpaceConfig(), engine="fake", params=schema, inputs=inputs or {}, format=form)


MOCK = a_space(mock.PARAMS["properties"])


def voxcpm(**can: Any) -> Space:
    abilities = Abilities(**can)
    return a_space(params_schema(abilities)["properties"], input_rules(abilities))


CLONING, NEEDS_WORDS = voxcpm(clones=True, voices=("ann", "bert")), voxcpm(voices=("ann", "bert"))
FETCHING = voxcpm(clones=True, fetches=True)
INDEX = a_space({"text": TEXT}, index_inputs(()))


def asked(space: Space, **fields: Any) -> SpaceParams:
    body = {"model": "tts", "input": "hello", "voice": "alloy"} | fields
    told = params_of(parse_speech(json.dumps(body).encode()), space, OpenAi(), any_voice=True)
    assert check_params(space.params, told.params) == {}
    return told


def refusal_of(space: Space, **fields: Any) -> HttpError:
    with pytest.raises(HttpError) as caught:
        asked(space, **fields)
    assert caught.value.status == 422
    return caught.value


def test_a_field_that_the_space_declares_as_a_param_is_sent_on_as_it_is() -> None:
    told = asked(MOCK, seed=1, fail={"how": "hang"}, speed=2, lang_code="a", volume_multiplier=1.0, stream=False)
    assert told.params == {"text": "hello", "seed": 1, "fail": {"how": "hang"}}  # speed is the relay's own


def test_what_is_null_is_left_out_and_input_is_the_text() -> None:
    assert asked(MOCK, seed=None, text="other").params == {"text": "hello"}


@pytest.mark.parametrize("value", ["\ud800", ["\ud800"], {"how": "\udfff"}, {"\ud800": 1}])
def test_half_a_character_is_refused_by_the_name_of_its_field(value: Any) -> None:
    assert refusal_of(MOCK, fail=value).details == {"fail": "contains a lone surrogate, which is not a character"}


@pytest.mark.parametrize("field", ["ref_audio", "reference_audio", "speaker_wav", "audio_prompt_path", "refAudio"])
@pytest.mark.parametrize("recording", [RECORDING, f"data:audio/flac;base64,{RECORDING}"])
def test_a_recording_of_a_voice_becomes_what_the_space_calls_it(field: str, recording: str) -> None:
    kind = "audio/flac" if recording.startswith("data:") else "application/octet-stream"
    told = asked(CLONING, **{field: recording})
    assert (told.inputs, told.params) == ({"reference_wav": (kind, WAV)}, {"text": "hello"})
    assert told.field("inputs.reference_wav") == told.field("reference_wav") == field
    assert asked(INDEX, **{field: recording}).inputs == {"spk_audio_prompt": (kind, WAV)}


@pytest.mark.parametrize("space", [CLONING, NEEDS_WORDS])
@pytest.mark.parametrize("words", ["ref_text", "reference_text", "prompt_text"])
def test_with_the_words_in_it_speech_goes_on_from_a_recording(space: Space, words: str) -> None:
    told = asked(space, ref_audio=RECORDING, **{words: "as I said"})
    assert told.params == {"text": "hello", "prompt_text": "as I said"}
    assert [told.field(name) for name in ("inputs.prompt_wav", "prompt_text")] == ["ref_audio", words]
    assert list(told.inputs) == ["prompt_wav"]


def test_a_recording_that_the_space_names_so_itself_is_that_input() -> None:
    space = a_space({"text": TEXT}, {"ref_audio": InputRule(media_types=["audio/wav"]), "noise": InputRule()})
    told = asked(space, ref_audio=RECORDING, noise=RECORDING)
    assert told.inputs == {"ref_audio": ("audio/wav", WAV), "noise": ("application/octet-stream", WAV)}
    assert not told.replaced, "it is the voice, whatever else there is"


@pytest.mark.parametrize("size", range(1, 7))
@pytest.mark.parametrize("padding", ["", "="])
def test_a_recording_of_any_length_comes_with_its_padding_or_without(size: int, padding: str) -> None:
    recording = base64.b64encode(b"RIFF...."[:size]).decode()
    told = asked(CLONING, ref_audio=recording if padding else recording.rstrip("="))
    assert told.inputs["reference_wav"][1] == b"RIFF...."[:size]


def test_a_recording_is_of_the_type_that_its_first_bytes_say() -> None:
    flac = base64.b64encode(b"fLaC and so on").decode()
    assert asked(CLONING, ref_audio=flac).inputs == {"reference_wav": ("audio/flac", b"fLaC and so on")}


def test_the_words_in_a_recording_are_left_out_where_the_space_does_not_take_them() -> None:
    told = asked(INDEX, ref_audio=RECORDING, ref_text="as I said")
    assert (told.params, list(told.inputs)) == ({"text": "hello"}, ["spk_audio_prompt"])


@pytest.mark.parametrize(
    ("fields", "others"),
    [
        (["ref_audio", "speaker_wav", "audio_prompt_path"], ["speaker_wav", "audio_prompt_path"]),
        (["ref_audio", "ref_text", "reference_text"], ["reference_text"]),
    ],
)
def test_of_several_fields_that_mean_the_same_the_first_stays(fields: list[str], others: list[str]) -> None:
    told = refusal_of(CLONING, **dict.fromkeys(fields, RECORDING)).details
    assert told == dict.fromkeys(others, "means the same as another field; send one of them")


def test_a_url_is_sent_on_where_the_space_fetches_it() -> None:
    told = asked(FETCHING, ref_audio="https://host/a.wav")
    assert told.params == {"text": "hello", "reference_wav_url": "https://host/a.wav"}
    assert told.field("reference_wav_url") == "ref_audio"
    for space in (CLONING, INDEX):
        assert "fetches none" in refusal_of(space, ref_audio="https://host/a.wav").details["ref_audio"]


def test_a_recording_is_the_voice_whatever_the_settings_make_of_names() -> None:
    body = json.dumps({"model": "tts", "input": "hello", "voice": "alloy", "ref_audio": RECORDING}).encode()
    told = params_of(parse_speech(body), CLONING, OpenAi(voices={"*": "ann"}), any_voice=True)
    assert told.params == {"text": "hello"}


@pytest.mark.parametrize(
    ("space", "fields", "field", "words"),
    [
        (MOCK, {"ref_audio": RECORDING}, "ref_audio", "accepts no recording of a voice"),
        (MOCK, {"speaker_wav": "/home/ann/voice.wav"}, "speaker_wav", "accepts no recording of a voice"),
        (CLONING, {"speaker_wav": "/home/ann/voice.wav"}, "speaker_wav", "the relay opens no paths"),
        (CLONING, {"ref_audio": f"{RECORDING[:4]}!!!!{RECORDING[4:]}"}, "ref_audio", "in base64, or a data URL"),
        (CLONING, {"ref_audio": "data:audio/wav,RIFF"}, "ref_audio", "must be base64 in a data URL"),
        (CLONING, {"ref_audio": "data:;base64,"}, "ref_audio", "is an empty file"),
        (CLONING, {"ref_audio": 5}, "ref_audio", "must be a string"),
        (CLONING, {"ref_audio": RECORDING, "speaker_wav": RECORDING}, "speaker_wav", "means the same as another"),
        (CLONING, {"ref_text": "hello"}, "ref_text", "goes with a recording"),
        (NEEDS_WORDS, {"ref_audio": RECORDING}, "ref_audio", "needs its transcript"),
        (MOCK, {"speaker": "anna"}, "speaker", "it has default"),
        (CLONING, {"voice_id": "eve"}, "voice_id", "it has default, ann, bert"),
        (CLONING, {"voice": "ann", "voice_id": "bert"}, "voice_id", "names another voice than voice, 'ann'"),
        (CLONING, {"speaker": 3}, "speaker", "must be a string"),
        (CLONING, {"speaker": "\ud800"}, "speaker", "contains a lone surrogate"),
        (MOCK, {"speaker_embedding": [1.0]}, "speaker_embedding", "is not accepted by space 'tts'"),
        (CLONING, {"reference": "bert"}, "reference", "is not accepted by space 'tts'"),
        (MOCK, {"timbre": "warm"}, "timbre", "is not accepted by space 'tts'"),
        (MOCK, {"references": [{"audio": RECORDING}]}, "references", "is not accepted by space 'tts'"),
        (MOCK, {"voice_description": "an old man"}, "voice_description", "is not accepted by space 'tts'"),
    ],
)
def test_who_speaks_is_never_passed_over(space: Space, fields: dict[str, Any], field: str, words: str) -> None:
    assert words in refusal_of(space, **fields).details[field]


@pytest.mark.parametrize("field", ["speaker", "voice_id", "voiceName", "speaker_id"])
def test_a_voice_by_another_name_is_spoken_with(field: str) -> None:
    assert asked(CLONING, **{field: {"id": "ann"}}).voice == "ann"
    told = asked(CLONING, **{field: "bert"})
    assert (told.params, told.voice) == ({"text": "hello", "voice": "bert"}, "bert")


def test_a_voice_that_is_named_twice_is_no_contradiction_nor_is_one_that_the_settings_replace() -> None:
    assert asked(CLONING, voice="ann", voice_id="ann").voice == "ann"
    body = json.dumps({"model": "tts", "input": "hello", "voice": "ann"}).encode()
    assert params_of(parse_speech(body), CLONING, OpenAi(voices={"ann": "bert"})).voice == "bert"


def test_a_voice_counts_as_replaced_only_if_the_one_that_was_asked_for_is_not_spoken() -> None:
    assert asked(CLONING).replaced
    assert not asked(CLONING, voice="ann").replaced
    assert not asked(CLONING, speaker="bert").replaced
    assert not asked(CLONING, ref_audio=RECORDING).replaced


@pytest.mark.parametrize("fields", [{"aA" * 40_000: 1}, {f"f{number}": 1 for number in range(300)}])
def test_a_body_of_names_is_refused_before_they_are_read(fields: dict[str, Any]) -> None:
    with pytest.raises(HttpError) as caught:
        asked(MOCK, **fields)
    assert (caught.value.status, caught.value.code) == (413, "input_too_large")


@pytest.mark.parametrize(
    "fields",
    [
        {"ref_audio": None, "speaker": "", "references": [], "clone_voice": False},
        {"voice_speed": 1.1, "speaker_boost": True, "voice_settings": {"stability": 1}},
        {"prompt": "x", "reference_audio_format": "wav", "language": "en", "id": "7", "name": "x"},
        {"system_prompt_text": "x", "negative_prompt_text": "x", "text_prompt": "x"},
        {"reference_count": 2, "max_ref_length": 30},
        {"ref_audio": None},
        {"speaker": ""},
    ],
)
def test_what_says_nothing_of_who_speaks_is_passed_over(fields: dict[str, Any]) -> None:
    assert asked(MOCK, **fields, seed=1).params == {"text": "hello", "seed": 1}


def test_a_refusal_names_at_most_sixteen_fields_by_their_first_64_characters() -> None:
    told = refusal_of(MOCK, **{f"speaker_{number:02}_{'x' * 99}": [1] for number in range(17)}).details
    assert list(told) == [f"speaker_{number:02}_{'x' * 99}"[:64] for number in range(16)]


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8) | st.just(RECORDING),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
_NAMES = ("ref_audio", "ref_text", "speaker", "prompt_wav", "prompt_text", "seed", "cfg_value", "voice_id", "x")


@given(st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=4))
def test_any_extra_fields_are_params_or_a_refusal(fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "tts", "input": "hello"} | fields).encode()
    for space in (MOCK, CLONING, NEEDS_WORDS):
        refused = None
        try:
            params_of(parse_speech(body), space, OpenAi(), any_voice=True)
        except HttpError as refusal:
            refused = refusal
        assert refused is None or (refused.status == 422 and refused.details.keys() <= fields.keys())
