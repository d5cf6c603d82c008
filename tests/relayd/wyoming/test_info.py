"""What is told of voices, models and languages."""

from typing import Any

import pytest

from protocol.wire.structs import AudioFormat, InputRule
from relayd.auth.tokens import Principal
from relayd.config.schema import SpaceConfig, Talk, Wyoming
from relayd.core.space import Space
from relayd.wyoming.events import EventFault
from relayd.wyoming.info import Offer
from relayd.wyoming.languages import tag_of

HOME = Principal(name="home", role="client")


def a_speaker(name: str, *voices: str, **properties: Any) -> Space:
    schema: dict[str, Any] = {"text": {"type": "string"}, **properties}
    if voices:
        schema["voice"] = {"enum": list(voices)}
    made = AudioFormat(sample_rate=24_000)
    return Space(name=name, config=SpaceConfig(), engine="x", params={"properties": schema}, format=made)


def a_hearer(name: str, **properties: Any) -> Space:
    rule = InputRule(media_types=[], max_bytes=1, required=True, live=True)
    schema = {"properties": {"turn_detection": {}, **properties}}
    return Space(name=name, config=SpaceConfig(), engine="x", params=schema, inputs={"audio": rule})


def offer(*spaces: Space, principal: Principal = HOME, talk: Talk | None = None) -> Offer:
    return Offer(spaces, principal, Wyoming(languages=("en", "zh")), talk)


def voices(told: Offer) -> dict[str, list[str]]:
    (program,) = told.info()["tts"]
    assert program["installed"]
    assert program["supports_synthesize_streaming"]
    return {voice["name"]: voice["languages"] for voice in program["voices"]}


def test_every_voice_has_languages() -> None:
    spaces = (
        a_speaker("clone"),
        a_speaker("espeak", "auto", "en-us", "en-gb-x-rp", "cmn", "fr"),
        a_speaker("named", "amy", "bob"),
    )
    lang = a_speaker("lang", lang={"enum": ["auto", "zh", "en", "ja"]})
    assert voices(offer(*spaces, lang)) == {
        "clone": ["en", "zh"],
        "espeak": ["en-US", "en-GB", "zh-CN", "fr"],
        "espeak/auto": ["en", "zh"],
        "espeak/en-us": ["en-US"],
        "espeak/en-gb-x-rp": ["en-GB"],
        "espeak/cmn": ["zh-CN"],
        "espeak/fr": ["fr"],
        "lang": ["zh", "en", "ja"],
        "named": ["en", "zh"],
        "named/amy": ["en", "zh"],
        "named/bob": ["en", "zh"],
    }


def test_models_know_their_languages() -> None:
    (program,) = offer(a_hearer("a"), a_hearer("b", language={"enum": ["en", "yue"]})).info()["asr"]
    assert [(model["name"], model["languages"]) for model in program["models"]] == [
        ("a", ["en", "zh"]),
        ("b", ["en", "zh-HK"]),
    ]


def test_what_a_principal_may_not_use_is_not_told() -> None:
    only = Principal(name="home", role="client", spaces=("a*",))
    told = offer(a_speaker("apple"), a_speaker("pear"), a_hearer("peach"), principal=only, talk=Talk(reply="llm"))
    assert list(voices(told)) == ["apple"]
    assert not told.info()["asr"]
    assert not told.info()["handle"]
    assert offer(talk=Talk(reply="llm")).info()["handle"][0]["supports_handled_streaming"]


def test_spaces_that_nobody_serves_are_not_told_unless_conversations_use_them() -> None:
    unknown = Space(name="new", config=SpaceConfig())
    assert not offer(unknown).info()["tts"]
    assert not offer(unknown).info()["asr"]
    told = offer(a_speaker("a"), unknown, talk=Talk(reply="llm", speech="new"))
    assert list(voices(told)) == ["new", "a"]
    assert told.voice_of({})[0].name == "new"


def test_a_voice_is_found_by_its_name_its_language_or_neither() -> None:
    told = offer(a_speaker("clone"), a_speaker("espeak", "en-us", "de", "fr"))

    def found(**voice: Any) -> tuple[str, str]:
        space, name = told.voice_of(voice)
        return space.name, name

    assert found() == ("clone", "")
    assert found(name="espeak") == ("espeak", "")
    assert found(name="espeak/de") == ("espeak", "de")
    assert found(name="espeak", speaker="de") == ("espeak", "de")
    assert found(name="fr") == ("espeak", "fr")
    assert found(name="clone/any/thing") == ("clone", "any/thing")
    assert found(language="de-AT") == ("espeak", "")
    assert found(language="zh-TW") == ("clone", "")
    assert found(language="sv") == ("clone", "")
    with pytest.raises(EventFault, match="there is no voice 'none'; there are clone, espeak"):
        found(name="none")
    with pytest.raises(EventFault, match="must be strings"):
        found(name=["x"])
    with pytest.raises(EventFault, match="no space speaks here"):
        offer().voice_of({})


def test_a_model_is_found_by_its_name() -> None:
    told = offer(a_hearer("a"), a_hearer("b"))
    assert told.model_of(None).name == "a"
    assert told.model_of("b").name == "b"
    with pytest.raises(EventFault, match="there is no model 'c'; there are a, b"):
        told.model_of("c")
    with pytest.raises(EventFault, match="no space transcribes here"):
        offer().model_of(None)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        *(("en", "en"), ("EN-us", "en-US"), ("zh_hant_tw", "zh-Hant-TW"), ("cmn", "zh-CN"), ("es-419", "es-419")),
        *(("auto", None), ("en-gb-scotland", "en-GB"), ("", None), ("english", None)),
    ],
)
def test_tags_are_in_their_usual_form(name: str, tag: str | None) -> None:
    assert tag_of(name) == tag
