"""What the names of a Realtime client stand for: the model, a space that writes replies, and voices of the other."""

from protocol.audio.encoder import CODINGS
from protocol.wire.errors import ErrorCode
from protocol.wire.validators import Value
from relayd.auth.tokens import Principal
from relayd.http.context import HttpContext
from relayd.http.errors import HttpError
from relayd.http.openai.models import space_of
from relayd.http.openai.names import LANGUAGE
from relayd.http.openai.speech_request import PARAMS, Speech, params_of
from relayd.talk.dialects.realtime_events import EventError
from relayd.talk.dialects.realtime_settings import AUDIO, Settings
from relayd.talk.talks import Talks


def language_space(context: HttpContext, talks: Talks, principal: Principal, model: str) -> str:
    """Return the name of the space that a model stands for; OpenAI's own names stand for `[talk] reply`.

    Raises:
        HttpError: it stands for none, or for one that the principal may not use or that writes no replies.
    """
    relay, reply = context.relay, talks.place.settings.reply
    names = relay.config.openai
    is_own = model in names.models or (model in relay.spaces and principal.may_use(model))
    if not model or not (is_own or names.strict or LANGUAGE.builtin.fullmatch(model) is None):
        model = reply
    space = space_of(context, principal, model, LANGUAGE)
    if not LANGUAGE.fits(space):
        message = f"space {space.name!r} writes no replies: its params have no `messages`; name another as model"
        raise HttpError(ErrorCode.INVALID_PARAMS, message, details={"model": "writes no replies"})
    return space.name


def speech_params(context: HttpContext, talks: Talks, settings: Settings, path: str) -> dict[str, Value]:
    """Return the params of the space that speaks: a voice, as `POST /v1/audio/speech` finds it.

    Args:
        context: of the relay.
        talks: whose settings name the space.
        settings: with the voice.
        path: of the object that has it, in errors.

    Raises:
        EventError: the space has no such voice.
    """
    relay = context.relay
    space = relay.spaces.get(talks.place.settings.speech)
    if settings.modality != AUDIO or space is None:
        return {}
    speech = Speech(
        model=space.name,
        text="",
        voice=settings.voice,
        instructions="",
        coding=CODINGS["pcm"],
        speed=settings.speed,
        sse=False,
        whole=False,
        cache=True,
        extra={},
    )
    names = relay.config.openai
    try:
        params = params_of(speech, space, names, any_voice=not names.strict).params
    except HttpError as fault:
        param = "audio.output.voice" if "voice" in fault.details else "output_modalities"
        raise EventError("invalid_value", fault.message, path + param) from None
    return {name: value for name, value in params.items() if name not in PARAMS["input"]}
