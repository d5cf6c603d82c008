"""Finds the space that a client's `model` stands for. Pure.

OpenAI's clients have OpenAI's names built in. `[openai]` in relayd.toml says what they stand for; without it, they
stand for the only space that speaks, if the token may use just one.
"""

import re
from collections.abc import Iterable, Mapping

from relayd.auth.tokens import Principal
from relayd.config.schema import OpenAi
from relayd.core.space import Space
from relayd.http.openai.speech_request import speaks

#: Names that clients have built in, with a provider's in front or without.
_OPENAI_MODELS = re.compile(r"(openai/)?(tts-1|gpt-)[A-Za-z0-9._-]*")
#: The key for all other names in the tables of the settings.
ANY = "*"


def speaking_spaces(spaces: Iterable[Space], principal: Principal) -> list[Space]:
    """Return the spaces that speak and that a principal may use, sorted by name."""
    return [space for space in sorted(spaces, key=lambda s: s.name) if principal.may_use(space.name) and speaks(space)]


def only_space(spaces: Iterable[Space], principal: Principal) -> Space | None:
    """Return the only space that speaks; None if there are several, or none.

    Spaces without a worker so far count only if no worker of another space has declared that it makes audio.
    """
    speaking = speaking_spaces(spaces, principal)
    known = [space for space in speaking if space.engine] or speaking
    return known[0] if len(known) == 1 else None


def space_named(model: str, spaces: Mapping[str, Space], principal: Principal, names: OpenAi) -> str:
    """Return the name of the space that `model` stands for, or `model` itself if it stands for none.

    The result does not reveal which other spaces exist: a name that a token may not use stands for another space only
    if the settings say so, or if it is one of OpenAI's.
    """
    own = principal.may_use(model)
    if model in names.models:
        return names.models[model]
    if own and model in spaces:
        return model
    if ANY in names.models:
        return names.models[ANY]
    if not names.strict and (own or _OPENAI_MODELS.fullmatch(model)):
        only = only_space(spaces.values(), principal)
        return only.name if only is not None else model
    return model
