"""Engine `webrtc`: calls with browsers.

A run is one of three kinds:

- *peer*: its param is the browser's `offer`. The first output is the `answer`; then it tells states, what comes over
  the data channel, and figures. It ends when either side hangs up.
- *play*: its param is the id of a `peer`. What its inputs bring is heard and seen there, in real time.
- *listen*: its params are the id of a `peer` and `listen`. What the microphone there sends is its audio.

A call is a browser that a stranger may control, on open UDP ports: let this worker have nothing else.
"""

import contextlib
import copy
import importlib.util
import json
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

from gpuworker.engines.base import (
    AudioChunk,
    Capabilities,
    Chunk,
    Engine,
    EngineError,
    EngineInput,
    InvalidParams,
    LiveInput,
    Missing,
    Option,
    OptionError,
    OptionValue,
    OutputChunk,
    RequestContext,
    RunStopped,
)
from gpuworker.engines.webrtc.microphone import HZ as MICROPHONE_HZ
from gpuworker.engines.webrtc.microphone import Microphone
from gpuworker.engines.webrtc.offer import BadOffer, read_offer
from gpuworker.engines.webrtc.reach import read_reach
from protocol.install_hint import install_command
from protocol.wire.errors import ErrorCode
from protocol.wire.ivf import IVF, PTS_HZ, IvfReader, Picture
from protocol.wire.structs import AudioFormat, InputRule
from protocol.wire.validators import Value

if TYPE_CHECKING:
    from gpuworker.engines.webrtc.gateway import Gateway
    from gpuworker.engines.webrtc.peer import Peer
    from gpuworker.engines.webrtc.play import Play

#: How soon a cancel is noticed where no input tells of it: a play is to be silent at once, and calls are many.
PLAY_NAP_S = 0.02
CALL_NAP_S = 0.25
MICROPHONE = AudioFormat(sample_rate=MICROPHONE_HZ)
#: A loop to look at while nobody speaks, not a film: it is in memory for each call.
MAX_IDLE_BYTES = 16 * 1024 * 1024
#: The least between two pictures: a call sends each as it is, 240 a second at most.
LEAST_PTS = PTS_HZ // 250
#: A command is a line of JSON.
MAX_LINE_CHARS = 64 * 1024
NOBODY = RequestContext()

PARAMS: dict[str, Value] = {
    "type": "object",
    "properties": {
        "offer": {"type": "string", "maxLength": 65_536, "description": "the SDP of a browser's offer: begins a call"},
        "microphone": {"type": "boolean", "default": False, "description": "let requests listen to the caller"},
        "listen": {"type": "boolean", "default": False, "description": "pass on the caller's microphone as audio"},
        "peer": {
            "type": "string",
            "maxLength": 64,
            "description": "the request id of a call: plays the inputs there, or listens",
        },
        "start": {"type": "integer", "minimum": 0, "default": 0, "description": "sample of a play to begin with"},
    },
    "oneOf": [{"required": ["offer"]}, {"required": ["peer"]}],
    "additionalProperties": False,
}
INPUTS = {
    "commands": InputRule(media_types=["application/x-ndjson", "text/plain"], live=True, patient=True),
    "idle": InputRule(media_types=[IVF], max_bytes=MAX_IDLE_BYTES, live=True),
    "audio": InputRule(media_types=["audio/L16"], max_bytes=512 * 1024 * 1024, live=True, patient=True),
    "video": InputRule(media_types=[IVF], max_bytes=512 * 1024 * 1024, live=True, patient=True),
}


class WebRtcEngine(Engine):
    """Answers offers, and plays on those peers; see the module's docstring."""

    SUMMARY: ClassVar[str] = "calls with browsers (WebRTC): their offer is the param, speech and video are inputs"
    LIVE_INPUTS: ClassVar[tuple[str, ...]] = ("audio", "commands", "idle", "video")
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "ports": Option(default="50000-50199", help="UDP ports for calls; one for each call and address"),
        "public_ip": Option(default="", help="the address that callers reach, if a router or a cloud translates it"),
        "host": Option(default="", help="addresses of this machine to offer, with commas; all of them if not given"),
        "ice_servers_file": Option(
            help="file with STUN and TURN servers of the worker's own: a JSON list, as browsers have"
        ),
        "max_kbit_s": Option(kind=int, default=2_000, help="more video than this is thinned out to key frames"),
    }
    SHARED = True
    default_slots = 50

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        super().__init__(options)
        self._reach = read_reach(self.options)
        if int(self.options["max_kbit_s"] or 0) < 1:
            raise OptionError(f"-o max_kbit_s={self.options['max_kbit_s']}: must be 1 or more")
        self._gateway: Gateway | None = None

    @classmethod
    def missing(cls) -> list[Missing]:
        """The WebRTC library."""
        if importlib.util.find_spec("aiortc") and importlib.util.find_spec("av"):
            return []
        return [Missing("the aiortc package", install_command("webrtc"))]

    @classmethod
    def check(cls, options: Mapping[str, OptionValue], slots: int) -> list[Missing]:
        """The library, addresses that are this machine's, and a free port on each."""
        del slots
        return cls.missing() or read_reach(options).lacking()

    @classmethod
    def outlook(cls, options: Mapping[str, OptionValue], slots: int) -> str:
        """What callers will be offered.

        Raises:
            EngineError: the file with STUN and TURN servers cannot be used.
        """
        reach = read_reach(options)
        return f"up to {min(max_peers(slots), len(reach.ports))} calls; {reach.describe()}"

    @property
    def capabilities(self) -> Capabilities:
        """A call may be silent for long, so it does not stream."""
        return Capabilities(params=PARAMS, inputs=INPUTS)

    def format_for(self, params: dict[str, Value]) -> AudioFormat | None:
        """The format of the caller's microphone, if it is listened to."""
        return MICROPHONE if params.get("listen") else None

    # -- loading

    def load(self) -> None:
        """Start the gateway.

        Raises:
            EngineError: what it needs is missing.
        """
        if missing := self.missing():
            raise EngineError(f"{missing[0].what} is not installed: {missing[0].install}")
        from aiortc import RTCIceServer

        from gpuworker.engines.webrtc.gateway import Gateway
        from gpuworker.engines.webrtc.peer import Settings
        from gpuworker.engines.webrtc.play import silent_packet

        settings = Settings(
            ice_servers=[RTCIceServer(**each) for each in self._reach.ice_servers()],
            public_ip=self._reach.public_ip,
            loopback=self._reach.loopback,
            ports=str(self.options["ports"]),
            max_bits_s=int(self.options["max_kbit_s"] or 0) * 1000.0,
            silence=silent_packet(),
        )
        self._gateway = Gateway(settings, self._reach.ports, self._reach.hosts)
        self._gateway.open()

    def seats(self, count: int) -> Sequence[Engine]:
        """Engines that share the gateway."""
        assert self._gateway is not None
        self._gateway.max_peers = max_peers(count)
        return [copy.copy(self) for _ in range(count)]

    def close(self) -> None:
        """Hang up."""
        if self._gateway is not None:
            self._gateway.close()
            self._gateway = None

    # -- a run

    def generate(
        self, params: dict[str, Value], inputs: Mapping[str, EngineInput | LiveInput], context: RequestContext = NOBODY
    ) -> Iterator[Chunk]:
        """Hold a call, play on one, or listen to one."""
        assert self._gateway is not None
        kind, run, known = "a play takes audio and video", self._play, {"audio", "video"}
        if "offer" in params:
            kind, run, known = "a call takes commands and idle", self._call, {"commands", "idle"}
        elif params.get("listen"):
            kind, run, known = "who listens takes commands", self._listen, {"commands"}
        if wrong := [name for name in inputs if name not in known]:
            raise EngineError(f"input {wrong[0]} does not belong here: {kind}", code=ErrorCode.INPUT_MISMATCH)
        return run(self._gateway, params, inputs, context)

    def _call(
        self, gateway: "Gateway", params: dict[str, Value], inputs: Mapping[str, Any], context: RequestContext
    ) -> Iterator[Chunk]:
        try:
            offer = read_offer(params["offer"], loopback=gateway.settings.loopback)
        except BadOffer as fault:
            raise InvalidParams({"offer": str(fault)}) from None
        request_id, listen = context.request_id, bool(params.get("listen"))
        microphone = listen or bool(params.get("microphone"))
        peer = gateway.do(gateway.open_peer(request_id, context.principal, microphone=microphone))
        if listen and peer.microphone is not None:
            gateway.soon(peer.microphone.listen, peer.events)
        try:
            yield OutputChunk({"answer": gateway.do(peer.answer(offer))})
            _begin(peer.events, self._obey, gateway, peer, inputs.get("commands"))
            _begin(peer.events, self._show_idle, gateway, peer, inputs.get("idle"))
            for event in self._events(peer.events, CALL_NAP_S):
                yield event if isinstance(event, AudioChunk) else OutputChunk(event)
        finally:
            gateway.do(gateway.close_peer(request_id, peer))

    def _events(self, events: "queue.SimpleQueue[Any]", nap_s: float) -> Iterator[Any]:
        """What comes, until an end.

        Raises:
            EngineError: the end is an error.
        """
        while not self.cancelled():
            with contextlib.suppress(queue.Empty):
                event = events.get(timeout=nap_s)
                if isinstance(event, EngineError):
                    raise event
                if event is None:
                    return
                yield event

    def _obey(self, gateway: "Gateway", peer: "Peer", commands: EngineInput | LiveInput | None) -> None:
        """Do what the commands say, line by line."""
        held = ""
        for text in () if commands is None else commands.text():
            *lines, held = (held + text).split("\n")
            if len(held) > MAX_LINE_CHARS:
                lines, held = [*lines, held], ""
            for line in filter(str.strip, lines):
                self._obey_one(gateway, peer, line)
        if held.strip():
            self._obey_one(gateway, peer, held)

    def _obey_one(self, gateway: "Gateway", peer: "Peer", line: str) -> None:
        try:
            command = json.loads(line) if len(line) <= MAX_LINE_CHARS else None
        except (ValueError, RecursionError):
            command = None
        if not isinstance(command, dict):
            command = {}
        if "candidate" in command:
            try:
                gateway.do(peer.add_candidate(command["candidate"]))
            except ValueError as fault:
                gateway.soon(peer.emit, {"error": str(fault)})
        elif isinstance(command.get("send"), str):
            gateway.soon(peer.send, command["send"])
        elif command.get("hang_up") is True:
            gateway.soon(peer.end, None)
        else:
            wanted = '{"candidate": {…}}, {"send": "text"} or {"hang_up": true}'
            gateway.soon(peer.emit, {"error": f"a command is one line of JSON: {wanted}"})

    def _show_idle(self, gateway: "Gateway", peer: "Peer", idle: EngineInput | LiveInput | None) -> None:
        """Show the idle loop once all of it is there."""
        pictures = list(_pictures(idle))
        if pictures and not pictures[0].key:
            raise EngineError("the idle video does not begin with a key frame", code=ErrorCode.INPUT_MISMATCH)
        if pictures:
            gateway.soon(peer.screen.set_idle, pictures)

    def _listen(
        self, gateway: "Gateway", params: dict[str, Value], inputs: Mapping[str, Any], context: RequestContext
    ) -> Iterator[Chunk]:
        heard = gateway.peer(params["peer"], context.principal).microphone
        if heard is None:
            raise InvalidParams({"listen": "nobody may listen to this call; begin it with the param microphone"})
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        gateway.soon(heard.listen, events)
        try:
            _begin(events, self._await_end, gateway, heard, events, inputs.get("commands"))
            yield from self._events(events, CALL_NAP_S)
        finally:
            gateway.soon(heard.leave, events)

    @staticmethod
    def _await_end(
        gateway: "Gateway",
        heard: Microphone,
        events: "queue.SimpleQueue[Any]",
        commands: EngineInput | LiveInput | None,
    ) -> None:
        """Listen until the commands end."""
        if commands is not None:
            for _ in commands:
                pass
            gateway.soon(heard.stop, events)

    def _play(
        self, gateway: "Gateway", params: dict[str, Value], inputs: Mapping[str, Any], context: RequestContext
    ) -> Iterator[Chunk]:
        from gpuworker.engines.webrtc.play import Play

        if (audio := inputs.get("audio")) is None:
            raise EngineError("a play needs the input audio", code=ErrorCode.INPUT_MISSING)
        peer, start = gateway.peer(params["peer"], context.principal), int(params.get("start") or 0)
        sound = _format(audio.media_type)
        play = Play(sound, has_video="video" in inputs)
        gateway.soon(peer.add_play, play)
        try:
            _begin(play.events, self._read_audio, play, sound, audio, start)
            _begin(play.events, self._read_video, play, inputs.get("video"))
            for samples in self._events(play.events, PLAY_NAP_S):
                yield OutputChunk({"played": start + samples})
            if not self.cancelled():
                yield OutputChunk({"played": start + play.samples_played})
        finally:
            play.close()
            if not play.finished:  # a cancelled run can say no more, but the call can
                played = start + play.samples_played
                gateway.soon(peer.emit, {"stopped": {"play": context.request_id, "played": played}})

    @staticmethod
    def _read_audio(play: "Play", sound: AudioFormat, audio: EngineInput | LiveInput, start: int) -> None:
        from gpuworker.engines.webrtc.play import SpeechEncoder

        encoder = SpeechEncoder(sound)
        step = sound.sample_rate * sound.sample_bytes // 5
        skip = start * sound.sample_bytes
        for piece in audio:
            skip, data = max(0, skip - len(piece)), piece[skip:]
            for at in range(0, len(data), step):
                play.add_packets(encoder.encode(data[at : at + step]))
        play.add_packets(encoder.finish())
        play.end_audio(encoder.samples)

    @staticmethod
    def _read_video(play: "Play", video: EngineInput | LiveInput | None) -> None:
        for picture in _pictures(video):
            play.add_picture(picture)
        play.end_video()


def _begin(events: "queue.SimpleQueue[Any]", work: Callable[..., None], *arguments: object) -> None:
    """Do something in a thread of its own; an error that it raises is an event, and a cancel ends the run."""

    def run() -> None:
        try:
            work(*arguments)
        except RunStopped:
            events.put(None)
        except EngineError as fault:
            events.put(fault)
        except Exception as fault:  # noqa: BLE001 - the seat waits for events: whatever it is must become one
            events.put(EngineError(f"{type(fault).__name__}: {fault}"))

    threading.Thread(target=run, name="webrtc input", daemon=True).start()


def _pictures(video: EngineInput | LiveInput | None) -> Iterator[Picture]:
    """The pictures of a video as they come.

    Raises:
        EngineError: it is none.
    """
    reader = IvfReader()
    before: int | None = None
    for data in video or ():
        try:
            pictures = reader.feed(data)
        except ValueError as fault:
            message = f"the video cannot be read: {fault}; send {IVF} with VP8"
            raise EngineError(message, code=ErrorCode.INPUT_MISMATCH) from None
        for picture in filter(attrgetter("data"), pictures):
            if before is not None and picture.pts < before + LEAST_PTS:
                message = f"the video has a picture at {picture.pts} after one at {before}, in 1/{PTS_HZ} s"
                message += "; send 240 a second at most"
                raise EngineError(message, code=ErrorCode.INPUT_MISMATCH)
            before = picture.pts
            yield picture


def _format(media_type: str) -> AudioFormat:
    """The format that a media type such as `audio/L16;rate=24000;channels=1` names.

    Raises:
        EngineError: it names none.
    """
    fields = dict(re.findall(r";\s*([a-z]+)=\"?(\d+)\"?", media_type.lower()))
    try:
        return AudioFormat(sample_rate=int(fields["rate"]), channels=int(fields.get("channels", "1")))
    except (KeyError, ValueError):
        message = f"the audio is {media_type[:80]!r}; give its rate: audio/L16;rate=24000;channels=1 (or 2)"
        raise EngineError(message, code=ErrorCode.INPUT_MISMATCH) from None


def max_peers(slots: int) -> int:
    """Half of the slots may be calls: each needs another one to be spoken to."""
    return max(1, slots // 2)
