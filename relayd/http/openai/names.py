"""Finds the space that a client's `model` stands for. Pure.

OpenAI's clients have OpenAI's names built in. `[openai]` in relayd.toml says what they stand for; without it, they
stand for the only space of the kind that is asked, one that speaks, one that writes replies or one that writes down
what it hears, if the token may use just one.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import attrs

from relayd.auth.tokens import Principal
from relayd.config.schema import OpenAi
from relayd.core.space import Space
from relayd.http.openai.chat_request import converses
from relayd.http.openai.speech_request import speaks
from relayd.http.openai.transcription_request import transcribes

#: The key for all other names in the tables of the settings.
ANY = "*"


@attrs.frozen
class Kind:
    """What a part of the API asks spaces for.

    Args:
        fits: whether a space does that; true for one that no worker has served yet.
        builtin: names that clients have built in, with a provider's in front or without.
    """

    fits: Callable[[Space], bool]
    builtin: re.Pattern[str]


SPEECH = Kind(speaks, re.compile(r"(openai/)?(tts-1|gpt-)[A-Za-z0-9._-]*"))
LANGUAGE = Kind(converses, re.compile(r"(openai/)?(gpt-|chatgpt-|o[1-9](?![A-Za-z0-9]))[A-Za-z0-9._-]*"))
TRANSCRIPTION = Kind(transcribes, re.compile(r"(openai/)?(whisper-1|gpt-[a-z0-9.-]*-transcribe[a-z0-9-]*)"))
KINDS = (SPEECH, TRANSCRIPTION, LANGUAGE)


def kinds_of(model: str) -> tuple[Kind, ...]:
    """All kinds, the one first that a name sounds like."""
    if TRANSCRIPTION.builtin.fullmatch(model):
        return (TRANSCRIPTION, SPEECH, LANGUAGE)
    return KINDS if "tts" in model or not LANGUAGE.builtin.fullmatch(model) else (LANGUAGE, TRANSCRIPTION, SPEECH)


def spaces_of(kind: Kind, spaces: Iterable[Space], principal: Principal) -> list[Space]:
    """Return the spaces of a kind that a principal may use, sorted by name."""
    return [
        space for space in sorted(spaces, key=lambda s: s.name) if principal.may_use(space.name) and kind.fits(space)
    ]


def only_space(kind: Kind, spaces: Iterable[Space], principal: Principal) -> Space | None:
    """Return the only space of a kind; None if there are several, or none.

    Spaces without a worker so far count only if no worker of another space has declared that it is of this kind.
    """
    found = spaces_of(kind, spaces, principal)
    known = [space for space in found if space.engine] or found
    return known[0] if len(known) == 1 else None


def space_named(model: str, spaces: Mapping[str, Space], principal: Principal, names: OpenAi, kind: Kind) -> str:
    """Return the name of the space that `model` stands for, or `model` itself if it stands for none.

    The result does not reveal which other spaces exist: a name that a token may not use stands for another space only
    if the settings say so, or if it is one of OpenAI's.
    """
    own = principal.may_use(model)
    if model in names.models:
        return names.models[model]
    if own and model in spaces:
        return model
    other = names.models.get(ANY)
    if other is not None and (other not in spaces or kind.fits(spaces[other])):
        return other
    if not names.strict and (own or kind.builtin.fullmatch(model)):
        only = only_space(kind, spaces.values(), principal)
        return only.name if only is not None else model
    return model
