"""`transcribe`, and `audio-start`, `-chunk` and `-stop`: a request of a space that writes down what it hears."""

import secrets
from typing import Any

import trio

from protocol.wire.messages import Submit
from protocol.wire.structs import InputInfo
from relayd.core.space import Space
from relayd.http.errors import HttpError
from relayd.http.live_feed import Feeder, open_feeder
from relayd.http.openai.transcription_request import AUDIO, Transcription
from relayd.http.openai.waiting import begun, wait_for_worker
from relayd.http.request_stream import RequestStream, hold_submission
from relayd.http.text_stream import open_text
from relayd.wyoming.connection import Connection
from relayd.wyoming.events import Event, EventFault, shown
from relayd.wyoming.languages import tag_of

MIN_HZ, MAX_HZ = 8_000, 192_000


async def note_hints(connection: Connection, event: Event) -> None:
    """Note with which model, and in which language, the audio that comes next is to be transcribed."""
    found = {name: event.optional(name) for name in ("name", "language")}
    connection.hints = {name: value for name, value in found.items() if value is not None}
    await trio.lowlevel.checkpoint()


async def transcribe(connection: Connection, event: Event) -> None:
    """Transcribe audio while it comes; `event` is its beginning."""
    hints, connection.hints = connection.hints, {}
    media_type = _media_type(event)
    sound: bytes | None = event.payload
    while sound == b"":
        sound = await _next_sound(connection, media_type)
    if sound is None:
        await connection.send("transcript", {"text": ""})
        return
    space = connection.offer.model_of(hints.get("name"))
    await wait_for_worker(connection.context, space)
    asked = Transcription(
        model=space.name, response_format="json", stream=False, hints=_language_of(hints.get("language"), space)
    )
    submit = Submit(
        request_id=secrets.token_hex(16),
        space=space.name,
        params=asked.params_of(space),
        inputs={AUDIO: InputInfo(media_type=media_type, live=True)},
    )
    async with (
        hold_submission(connection.context, connection.principal, submit) as held,
        open_feeder(held, AUDIO) as feeder,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(connection.guard, _send_text, connection, held, hints.get("language"))
        await connection.guard(_feed_sound, connection, feeder, sound, media_type)


async def _feed_sound(connection: Connection, feeder: Feeder, first: bytes, media_type: str) -> None:
    sound: bytes | None = first
    while sound is not None:
        await feeder.feed(sound)
        sound = await _next_sound(connection, media_type)
    await feeder.end()


async def _next_sound(connection: Connection, media_type: str) -> bytes | None:
    """Return the next samples; None at the end."""
    event = await connection.next()
    if event.type == "audio-stop":
        return None
    if event.type != "audio-chunk":
        raise EventFault(f"{shown(event.type)} came amid audio; send audio-stop first")
    if event.data and _media_type(event) != media_type:
        raise EventFault("audio-chunk: its rate, width or channels are not those of the audio before; keep to them")
    return event.payload


def _media_type(event: Event) -> str:
    rate, width, channels = (event.data.get(name) for name in ("rate", "width", "channels"))
    is_rate = isinstance(rate, int) and not isinstance(rate, bool) and MIN_HZ <= rate <= MAX_HZ
    if not is_rate or width != 2 or channels not in (1, 2):
        raise EventFault(
            f"{event.type}: send samples of width 2 (16 bits), of 1 or 2 channels, with a rate of {MIN_HZ} to {MAX_HZ}"
        )
    return f"audio/L16;rate={rate};channels={int(channels)}"


def _language_of(language: str | None, space: Space) -> dict[str, Any]:
    """The param for a language, if the space knows it; else it is recognized."""
    tag = tag_of(language) if language is not None else None
    if tag is None:
        return {}
    known = space.params.get("properties", {}).get("language", {}).get("enum")
    names = (tag, tag.partition("-")[0])
    named = next((name for name in names if isinstance(known, list) and name in known), None)
    return {"language": names[1] if known is None else named} if known is None or named else {}


async def _send_text(connection: Connection, held: RequestStream, language: str | None) -> None:
    told = {"language": language} if language is not None else {}
    text = await begun(held, open_text, connection.context.relay.config.http.no_worker_wait_s)
    most, whole = held.relay.config.limits.max_result_bytes, ""
    while (piece := await text.next()) is not None:
        piece = piece if whole else piece.lstrip()
        if piece:
            if not whole:
                await connection.send("transcript-start", dict(told))
            whole += piece
            if len(whole) > most:
                raise HttpError("result_too_large", f"the transcript is larger than {most} characters")
            await connection.send("transcript-chunk", {"text": piece})
    await connection.send("transcript", {"text": whole.strip(), **told})
    if whole:
        await connection.send("transcript-stop")
