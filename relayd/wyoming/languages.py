"""Which languages a space speaks or understands, in BCP 47, as far as it says so. Pure."""

import re
from collections.abc import Iterable

from relayd.core.space import Space
from relayd.http.openai.speech_request import voices_of

#: Language, script and region of a tag; what is behind them is left out.
_TAG = re.compile(r"([a-z]{2,3})(?:[-_]([a-z]{4}))?(?:[-_]([a-z]{2}|[0-9]{3}))?(?:[-_].*)?", re.IGNORECASE)
#: Params that say in which language something is.
_PARAMS = ("language", "lang")
#: As Home Assistant calls them.
_USUAL = {"cmn": "zh-CN", "yue": "zh-HK"}


def tag_of(name: str) -> str | None:
    """Return a language tag in its usual form, such as `en-US` of `en-us`; None if it is none."""
    match = _TAG.fullmatch(name)
    if match is None:
        return None
    language, script, region = match[1].lower(), match[2], match[3]
    if not (script or region) and language in _USUAL:
        return _USUAL[language]
    return "-".join([language, *([script.title()] if script else []), *([region.upper()] if region else [])])


def languages_of(space: Space, otherwise: Iterable[str]) -> list[str]:
    """Return the languages of a space: those of its param `language`; else `otherwise`."""
    properties = space.params.get("properties", {})
    for name in _PARAMS:
        schema = properties.get(name)
        listed = schema.get("enum") if isinstance(schema, dict) else None
        tags = _tags(listed) if isinstance(listed, list) else []
        if tags:
            return tags
    return list(otherwise)


def languages_by_voice(space: Space, otherwise: Iterable[str]) -> dict[str, list[str]]:
    """Return the voices of a space, and the languages of each; "" is the one that it takes by itself.

    Where most voices are called by their languages, as espeak's are, each of them has its own, and "" has all.
    """
    usual = languages_of(space, otherwise)
    voices = voices_of(space) or ()
    named = sum(re.match(r"[a-z]{2}(?![a-z0-9])", name, re.IGNORECASE) is not None for name in voices)
    own = {name: tag_of(name) for name in voices} if 2 * named > len(voices) else {}
    languages = {name: [tag] if (tag := own.get(name)) else usual for name in voices}
    spoken = _tags(tag for tag in own.values() if tag is not None)
    return {"": spoken or usual} | languages


def matches(tag: str, languages: Iterable[str]) -> bool:
    """Whether a language is among some, or one of them is the same but for its region."""
    asked = (tag_of(tag) or tag).partition("-")[0]
    return any(each.partition("-")[0] == asked for each in languages)


def _tags(names: Iterable[object]) -> list[str]:
    tags = (tag_of(name) for name in names if isinstance(name, str))
    return list(dict.fromkeys(tag for tag in tags if tag is not None))
