"""Params and inputs of engine `voxcpm`: every range, and what a worker that lacks something refuses."""

import json
from typing import Any

import pytest

from gpuworker.engines.voxcpm.schema import DEFAULTS, MAX_INPUT_BYTES, Abilities, input_rules, params_schema
from gpuworker.engines.voxcpm.validation import find_faults
from gpuworker.engines.voxcpm.voices import MAX_VOICES
from protocol.wire.params_schema import check_params, check_schema

ALL = Abilities(clones=True, normalizes=True, denoises=True, fetches=True, voices=("amy", "bob"))
NONE = Abilities()
SAID: dict[str, Any] = {"text": "hi"}


@pytest.mark.parametrize("can", [ALL, NONE, Abilities(fetches=True), Abilities(clones=True)])
def test_the_schema_is_one_that_a_relay_takes_and_its_defaults_keep_it(can: Abilities) -> None:
    schema = params_schema(can)
    check_schema(schema)
    assert check_params(schema, SAID) == {}
    defaults = {name: rule["default"] for name, rule in schema["properties"].items() if "default" in rule}
    assert defaults == DEFAULTS
    assert check_params(schema, SAID | defaults) == {}
    assert all(rule["description"] for rule in schema["properties"].values())


def test_a_relay_can_list_the_schema_of_a_worker_with_as_many_voices_as_it_may_have() -> None:
    voices = tuple(f"{number:064}" for number in range(MAX_VOICES))
    schema = params_schema(Abilities(clones=True, voices=voices))
    check_schema(schema)
    assert len(json.dumps(schema)) < 24 * 1024
    assert check_params(schema, {"text": "hi", "voice": voices[-1]}) == {}


@pytest.mark.parametrize(
    ("name", "least", "most", "below", "above"),
    [
        ("cfg_value", 0.1, 10, 0.09, 10.1),
        ("inference_timesteps", 1, 50, 0, 51),
        ("retry_badcase_max_times", 0, 10, -1, 11),
        ("retry_badcase_ratio_threshold", 1, 20, 0.9, 20.1),
        ("seed", 0, 2**32 - 1, -1, 2**32),
    ],
)
def test_each_number_has_its_range(name: str, least: float, most: float, below: float, above: float) -> None:
    schema = params_schema(ALL)
    for good in (least, most):
        assert check_params(schema, SAID | {name: good}) == {}
    assert check_params(schema, SAID | {name: below}) == {name: f"must be at least {least}"}
    assert check_params(schema, SAID | {name: above}) == {name: f"must be at most {most}"}
    not_numbers: list[Any] = ["2", None, True, [2], {}]
    for no_number in not_numbers:
        assert list(check_params(schema, SAID | {name: no_number})) == [name]
    assert list(check_params(schema, SAID | {name: float("nan")})) == [name]


@pytest.mark.parametrize("name", ["inference_timesteps", "retry_badcase_max_times", "seed"])
def test_counts_are_whole(name: str) -> None:
    assert check_params(params_schema(ALL), SAID | {name: 2.5}) == {name: "must be an integer, not float"}


@pytest.mark.parametrize("name", ["normalize", "denoise", "retry_badcase"])
def test_switches_are_booleans(name: str) -> None:
    schema = params_schema(ALL)
    for good in (True, False):
        assert check_params(schema, SAID | {name: good}) == {}
    for bad in (1, 0, "true", None):
        assert list(check_params(schema, SAID | {name: bad})) == [name]


@pytest.mark.parametrize(
    ("params", "faults"),
    [
        ({}, {"text": "is required"}),
        ({"text": ""}, {"text": "must not be empty"}),
        ({"text": "x" * 5_000}, {}),
        ({"text": "好" * 5_001}, {"text": "must have at most 5000 characters"}),
        ({"text": 1}, {"text": "must be a string, not int"}),
        ({"text": "hi", "mode": "stream"}, {"mode": "must be one of streaming, non_streaming"}),
        ({"text": "hi", "voice": "nobody"}, {"voice": "must be one of amy, bob"}),
        ({"text": "hi", "prompt_text": ""}, {"prompt_text": "must not be empty"}),
        ({"text": "hi", "prompt_wav_url": "x" * 2_049}, {"prompt_wav_url": "must have at most 2048 characters"}),
        ({"text": "hi", "reference_wav_url": 1}, {"reference_wav_url": "must be a string, not int"}),
    ],
)
def test_texts_and_choices(params: dict[str, Any], faults: dict[str, str]) -> None:
    assert check_params(params_schema(ALL), params) == faults


def test_an_unknown_param_is_told_with_those_that_there_are() -> None:
    faults = check_params(params_schema(ALL), SAID | {"prompt_wav": "a path", "speed": 2})
    assert set(faults) == {"prompt_wav", "speed"}
    for name in ("text", "cfg_value", "prompt_wav_url", "voice", "seed"):
        assert name in faults["speed"]


def test_several_faults_are_told_at_once_each_by_its_field() -> None:
    wrong = {"text": "", "cfg_value": 0, "inference_timesteps": "ten", "mode": None, "seed": -1, "denoise": "yes"}
    assert set(check_params(params_schema(ALL), wrong)) == set(wrong)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("normalize", True, "must be false: this worker lacks the packages"),
        ("denoise", True, "must be false: this worker runs without a denoiser"),
        ("voice", "amy", "must be null: this worker has no voices"),
        ("voice_description", "old", "must be null: this model accepts no description"),
        ("prompt_wav_url", "https://a.example/b.wav", "must be null: this worker fetches nothing"),
        ("reference_wav_url", "https://a.example/b.wav", "must be null: this model accepts no reference audio"),
    ],
)
def test_what_a_worker_cannot_do_is_refused_with_the_reason(name: str, value: Any, words: str) -> None:
    schema = params_schema(NONE)
    (fault,) = check_params(schema, SAID | {name: value}).items()
    assert fault[0] == name
    assert fault[1].startswith(words)
    assert check_params(params_schema(ALL), SAID | {name: value}) == {}


def test_reference_audio_is_an_input_of_voxcpm2_alone_and_of_any_media_type() -> None:
    assert set(input_rules(ALL)) == {"prompt_wav", "reference_wav"}
    assert set(input_rules(NONE)) == {"prompt_wav"}
    rule = input_rules(NONE)["prompt_wav"]
    assert (rule.media_types, rule.max_bytes, rule.required) == ([], MAX_INPUT_BYTES, False)


# -- what the schema cannot say ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "inputs", "faulty"),
    [
        ({}, [], {}),
        ({"prompt_text": "Ah."}, ["prompt_wav"], {}),
        ({"prompt_text": "Ah.", "prompt_wav_url": "u"}, ["reference_wav"], {}),
        ({"reference_wav_url": "u", "voice_description": "old"}, [], {}),
        ({"voice": "amy", "voice_description": "old"}, [], {}),
        ({"voice": "amy", "prompt_wav_url": None}, [], {}),
        ({"text": " \n\t"}, [], {"text": "nothing to speak"}),
        ({"text": "…!。 — 🙂"}, [], {"text": "nothing to speak"}),
        ({"prompt_text": "Ah."}, [], {"prompt_wav": "required with prompt_text"}),
        ({}, ["prompt_wav"], {"prompt_text": "required with prompt_wav"}),
        ({"prompt_wav_url": "u"}, [], {"prompt_text": "required with prompt_wav_url"}),
        ({"prompt_text": " . "}, ["prompt_wav"], {"prompt_text": "no words"}),
        ({"voice_description": "()"}, [], {"voice_description": "no words"}),
        ({"prompt_text": "Ah.", "prompt_wav_url": "u"}, ["prompt_wav"], {"prompt_wav_url": "with input prompt_wav"}),
        ({"reference_wav_url": "u"}, ["reference_wav"], {"reference_wav_url": "with input reference_wav"}),
        ({"voice": "amy"}, ["reference_wav"], {"voice": "leave out reference_wav"}),
        ({"voice": "amy", "prompt_text": "Ah."}, ["prompt_wav"], {"voice": "leave out prompt_wav and prompt_text"}),
        ({"prompt_text": "Ah.", "voice_description": "old"}, ["prompt_wav"], {"voice_description": "has no effect"}),
        ({"text": "!", "prompt_text": "Ah."}, [], {"text": "nothing", "prompt_wav": "required"}),
    ],
)
def test_params_and_inputs_that_do_not_go_together_are_told_by_field(
    params: dict[str, Any], inputs: list[str], faulty: dict[str, str]
) -> None:
    faults = find_faults(SAID | params, inputs)
    assert set(faults) == set(faulty)
    for field, words in faulty.items():
        assert words in faults[field]


@pytest.mark.parametrize("text", ["a", "7", "好", "ひ", "한", "ж", "ع", "क", "𝒜", "¿qué?", "100%"])
def test_every_script_can_be_spoken(text: str) -> None:
    assert find_faults({"text": text}, []) == {}
