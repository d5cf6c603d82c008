"""`synthesize`, and `synthesize-start`, `-chunk` and `-stop`: a request of a space that speaks."""

import secrets

import attrs
import trio

from protocol.audio.encoder import CODINGS
from protocol.speakable import speakable
from protocol.wire.messages import Submit
from protocol.wire.structs import AudioFormat, InputInfo
from protocol.wire.validators import Value
from relayd.core.space import Space
from relayd.http.live_feed import Feeder, open_feeder
from relayd.http.media_stream import open_audio
from relayd.http.openai.speech_request import MAX_INPUT_CHARS, Speech, params_of
from relayd.http.openai.waiting import begun, wait_for_worker
from relayd.http.request_stream import RequestStream, hold_submission
from relayd.wyoming.connection import Connection
from relayd.wyoming.events import Event, EventFault, shown

MEDIA_TYPE = "text/plain"
#: Of audio in one event.
CHUNK_BYTES = 32 * 1024
#: What is silent at the end: players cut off the last sound that they are sent.
SILENCE_S = 0.3
#: Of speech of which nothing is known.
DEFAULT_FORMAT = AudioFormat(sample_rate=22_050)


@attrs.frozen
class Voice:
    """A space that speaks, and with which params; `text` is the param for the text."""

    space: Space
    params: dict[str, Value]
    text: str

    @property
    def is_live(self) -> bool:
        """Whether it speaks a text that is still being written."""
        rule = self.space.inputs.get(self.text)
        return rule is not None and rule.live

    def submit(self, text: str | None) -> Submit:
        """A request that speaks a text; None for one that is fed."""
        fed = {} if text is not None else {self.text: InputInfo(media_type=MEDIA_TYPE, live=True)}
        given = {} if text is None else {self.text: text}
        return Submit(request_id=secrets.token_hex(16), space=self.space.name, params=self.params | given, inputs=fed)


async def speak(connection: Connection, event: Event) -> None:
    """Speak a text."""
    text = _text_of(event)
    voice = await _voice_of(connection, event)
    if not speakable(text):
        await _stop(connection, Samples(connection, voice.space.format or DEFAULT_FORMAT))
        return
    async with hold_submission(connection.context, connection.principal, voice.submit(text)) as held:
        await _send_audio(connection, held)


async def speak_live(connection: Connection, event: Event) -> None:
    """Speak a text while it is being written; what is said is sent while more of the text comes."""
    if _is_ssml(event):
        raise _no_ssml()
    voice, text = await _voice_of(connection, event), ""
    while not speakable(text) or not voice.is_live:  # the engine refuses what it cannot speak
        more = await _next_text(connection)
        if more is None:
            break
        text += more
        if len(text) > MAX_INPUT_CHARS:
            raise EventFault(f"the text is longer than {MAX_INPUT_CHARS} characters; send it in several parts")
    if not speakable(text):
        await connection.send("synthesize-stopped")
        return
    if not voice.is_live:
        async with hold_submission(connection.context, connection.principal, voice.submit(text)) as held:
            await _send_audio(connection, held)
    else:
        async with (
            hold_submission(connection.context, connection.principal, voice.submit(None)) as held,
            open_feeder(held, voice.text) as feeder,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(connection.guard, _send_audio, connection, held)
            await connection.guard(_feed_text, connection, feeder, text)
    await connection.send("synthesize-stopped")


async def _feed_text(connection: Connection, feeder: Feeder, text: str) -> None:
    more: str | None = text
    while more is not None:
        await feeder.feed(more.encode())
        more = await _next_text(connection)
    await feeder.end()


async def _next_text(connection: Connection) -> str | None:
    """Return the next text of one that is being written; None at its end."""
    while True:
        event = await connection.next()
        if event.type == "synthesize-stop":
            return None
        if event.type == "synthesize-chunk":
            return event.text(most=MAX_INPUT_CHARS)
        if event.type != "synthesize":  # which has the whole text, for servers that do not speak while it is written
            raise EventFault(f"{shown(event.type)} came amid a text; send synthesize-stop first")


def _text_of(event: Event) -> str:
    if _is_ssml(event):
        raise _no_ssml()
    return event.text(most=MAX_INPUT_CHARS)


def _is_ssml(event: Event) -> bool:
    return event.data.get("text_format") not in (None, "text")


def _no_ssml() -> EventFault:
    return EventFault("only plain text is spoken; leave text_format out", "unsupported")


async def _voice_of(connection: Connection, event: Event) -> Voice:
    space, name = connection.offer.voice_of(event.table("voice"))
    await wait_for_worker(connection.context, space)
    asked = Speech(
        model=space.name,
        text="",
        voice=name or "default",
        instructions="",
        coding=CODINGS["pcm"],
        speed=1.0,
        sse=False,
        whole=False,
        cache=True,
        extra={},
    )
    made = params_of(asked, space)
    text = next(param for param, field in made.names.items() if field == "input")
    return Voice(space, {name: value for name, value in made.params.items() if name != text}, text)


# -- audio


@attrs.define
class Samples:
    """Sends samples of a format, and counts them."""

    connection: Connection
    format: AudioFormat
    size: int = 0

    @property
    def data(self) -> dict[str, Value]:
        """The format, as events have it."""
        return {"rate": self.format.sample_rate, "width": 2, "channels": self.format.channels}

    @property
    def bytes_s(self) -> int:
        """Bytes of a second."""
        return 2 * self.format.channels * self.format.sample_rate

    async def send(self, pcm: bytes) -> None:
        """Send samples."""
        step = CHUNK_BYTES // self.format.sample_bytes * self.format.sample_bytes
        for start in range(0, len(pcm), step):
            at_ms = self.size * 1000 // self.bytes_s
            piece = pcm[start : start + step]
            await self.connection.send("audio-chunk", self.data | {"timestamp": at_ms}, piece)
            self.size += len(piece)


async def _send_audio(connection: Connection, held: RequestStream) -> None:
    audio = await begun(held, open_audio, connection.context.relay.config.http.no_worker_wait_s)
    samples, is_begun = Samples(connection, audio.format), False
    while (pcm := await audio.next()) is not None:
        if not is_begun:  # a worker that is lost before that may have had another format
            samples.format, is_begun = audio.format, True
            await connection.send("audio-start", samples.data | {"timestamp": 0})
        await samples.send(pcm)
    silence = int(SILENCE_S * audio.format.sample_rate) * audio.format.sample_bytes
    await samples.send(bytes(silence))
    await connection.send("audio-stop", {"timestamp": samples.size * 1000 // samples.bytes_s})


async def _stop(connection: Connection, samples: Samples) -> None:
    """Say that there is nothing to hear."""
    await connection.send("audio-start", samples.data)
    await connection.send("audio-stop", {"timestamp": 0})
