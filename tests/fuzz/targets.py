"""The targets: what takes a stranger's bytes. Each is a function of bytes that raises if a promise is broken."""

import copy
import io
import random
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import attrs
import msgpack

from protocol.link.websocket_frames import BINARY, CLOSE, PING, TEXT, Close, Event, Fault, Parser, make_frame
from protocol.wire.codec import decode, encode
from protocol.wire.errors import EncodeError, ProtocolError
from protocol.wire.messages import FROM_ANYONE, FROM_CLIENT, FROM_OPERATOR, FROM_RELAY, FROM_WORKER
from protocol.wire.validators import Value
from relayd.wyoming.events import Event as WyomingEvent
from relayd.wyoming.events import EventParser
from tests.fuzz.fuzzed_relay import UPGRADE, open_relay


@attrs.frozen
class Target:
    """What is fuzzed.

    Args:
        run: takes bytes; raises where a promise is broken.
        seeds: what the mutations begin with.
    """

    run: Callable[[bytes], None]
    seeds: Sequence[bytes]


ID = "0123456789abcdef0123456789abcdef"
INSTANCE = "fedcba9876543210fedcba9876543210"

# -- messages --------------------------------------------------------------------------------------------------------

Map = dict[str, Value]
_OF_FRAME: Map = {"request_id": ID, "attempt": 1, "seq": 0}
HELLO: Map = {"type": "hello", "version": 1, "role": "client", "token": None, "readonly": False, "video": True}
REGISTER: Map = {
    "type": "register",
    "worker": "box",
    "instance": INSTANCE,
    "spaces": ["tts"],
    "slots": 2,
    "params": {
        "type": "object",
        "properties": {"text": {"type": "string", "minLength": 1}, "rate": {"type": "integer", "maximum": 9}},
        "required": ["text"],
    },
    "inputs": {"voice": {"media_types": ["audio/wav"], "max_bytes": 1024, "required": False}},
    "format": {"encoding": "pcm_s16le", "sample_rate": 24_000, "channels": 1},
    "reproducible": True,
    "running": [{"request_id": ID, "attempt": 1, "next_seq": 1}],
}
SUBMIT: Map = {
    "type": "submit",
    "request_id": ID,
    "space": "tts",
    "params": {"text": "hello", "rate": 3},
    "inputs": {"voice": {"media_type": "audio/wav", "size": 3, "sha256": "0" * 64}},
    "priority": 5,
    "queue_timeout_s": 5.0,
    "detach": True,
    "retry": "always",
}
FROM_CLIENTS: Sequence[Map] = (
    SUBMIT,
    SUBMIT | {"inputs": {}},
    {"type": "input", "request_id": ID, "name": "voice", "offset": 0, "data": b"abc"},
    {"type": "attach", "request_id": ID, "attempt": 2, "after_seq": -1},
    {"type": "cancel", "request_id": ID, "reason": "enough"},
    {"type": "leave", "request_id": ID},
    {"type": "status", "request_id": ID},
    {"type": "spaces"},
    {"type": "ping", "timestamp": 1.0},
    {"type": "pong", "timestamp": 1.0, "server_time": None},
)
FROM_WORKERS: Sequence[Map] = (
    REGISTER,
    {"type": "draining"},
    _OF_FRAME | {"type": "started", "format": REGISTER["format"]},
    _OF_FRAME | {"type": "progress", "state": "generating", "fraction": 0.5, "message": ""},
    _OF_FRAME | {"type": "started", "video": {"codec": "vp8", "width": 64, "height": 48, "fps": 25}},
    _OF_FRAME | {"type": "audio", "pcm": b"\0\0"},
    _OF_FRAME | {"type": "video", "data": b"\0\1", "pts": 3600, "key": True},
    _OF_FRAME | {"type": "output", "data": {"text": "hello", "of": [1, 2.5, None]}},
    _OF_FRAME | {"type": "completed", "result": {"chunks": 1, "run_s": 0.1}},
    _OF_FRAME | {"type": "failed", "code": "engine_failed", "message": "no", "details": {}, "retryable": True},
    _OF_FRAME | {"type": "cancelled", "reason": ""},
)
_TABLES = (FROM_ANYONE, FROM_CLIENT, FROM_OPERATOR, FROM_RELAY, FROM_WORKER)

#: Values that have been trouble somewhere: bounds, other types, text that is none, what a peer may count up.
ODD: Sequence[Value] = (
    *(None, True, False, -1, 0, 1, 2, 999_999, 1_000_000, 1_000_001, 2**31, 2**31 + 1, 2**53, 2**63 - 1, 2**64 - 1),
    *(0.0, -0.0, 2.0, 1e-300, 1e7, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "0" * 32, "A" * 129, "\0", "\x1b[2J", "../../x", "\u202e", "tts\n", "\ud83d", "😀" * 500, "é"),
    *(b"", b"\xff\xfe", b"\0" * 2000, [], {}, [[[[[]]]]], {"": {"": {}}}, ["tts", "tts"], [None], {"type": []}),
)


def pack(message: Map) -> bytes:
    """Bytes of a map that need not be a message; half an emoji stays one."""
    data: bytes = msgpack.packb(message, unicode_errors="surrogatepass")
    return data


def spoil(dice: random.Random, message: Map) -> Map:
    """A copy with up to three values, at any depth, that are odd, gone or new."""
    spoilt: Map = msgpack.unpackb(pack(message), unicode_errors="surrogatepass")
    for _ in range(dice.choice((0, 1, 1, 2, 3))):
        at: Value = spoilt
        while True:
            if isinstance(at, list):
                key: Value = dice.randrange(len(at)) if at else None
            else:
                key = dice.choice(list(at)) if isinstance(at, dict) and at else None
            if key is None:
                break
            below = at[key]
            if isinstance(below, dict | list) and below and dice.random() < 0.6:
                at = below
                continue
            odd = copy.deepcopy(dice.choice(ODD))
            match dice.randrange(8):
                case 0:
                    del at[key]
                case 1 if isinstance(at, dict):
                    at[dice.choice(("minimum", "pattern", "enum", "type", "x", "anyOf", "$ref"))] = odd
                case _:
                    at[key] = odd
            break
    return spoilt


# -- msgpack codec ---------------------------------------------------------------------------------------------------


def _codec(data: bytes) -> None:
    for table in _TABLES:
        try:
            message = decode(data, table)
        except ProtocolError:
            continue
        try:
            once = encode(message)
        except EncodeError:
            assert message.TYPE in ("hello", "submit", "register") or len(data) > 1000, message
            continue
        assert encode(decode(once, table)) == once, message


@contextmanager
def codec() -> Iterator[Target]:
    """`protocol.wire.codec`: any bytes are a message or a ProtocolError, and a message survives a round trip."""
    maps: tuple[Map, ...] = (HELLO, *FROM_CLIENTS, *FROM_WORKERS)
    odd = [pack({"type": "submit", "params": {"odd": value}}) for value in ODD]
    odd += [pack(spoil(random.Random(number), message)) for number in range(12) for message in maps]
    yield Target(_codec, [*map(pack, maps), *odd, b"\xdf\xff\xff\xff\xff", b"\xdd\x00\x00\x04\x00", b"\x81" * 40])


# -- WebSocket frames ------------------------------------------------------------------------------------------------


def _events(data: bytes, pieces: int, *, masked: bool, most: int) -> list[Event]:
    parser = Parser(masked=masked, max_message_bytes=most)
    for start in range(0, len(data), pieces):
        parser.feed(data[start : start + pieces])
    return parser.pop_events()


def _frames(data: bytes) -> None:
    if not data:
        return
    how, data = data[0], data[1:]
    masked, most = bool(how & 1), 100 if how & 2 else 70_000
    whole = _events(data, max(1, len(data)), masked=masked, most=most)
    pieces = 1 + len(data) // 1000 + (how >> 2) ** 2  # at most 1000: a byte at a time is slow
    assert _events(data, pieces, masked=masked, most=most) == whole, "other events in other pieces"
    assert not any(isinstance(event, Fault | Close) for event in whole[:-1]), "something came behind the end"
    assert all(len(event) <= most for event in whole if isinstance(event, bytes)), "a message over the limit"


@contextmanager
def frames() -> Iterator[Target]:
    """`protocol.link.websocket_frames`: the same events however the bytes are cut, and none over a limit."""
    every = [
        *(make_frame(BINARY, bytes(size), masked=True) for size in (0, 1, 125, 126, 300, 70_001)),
        *(make_frame(opcode, b"\x03\xe8ok", masked=True) for opcode in (TEXT, CLOSE, PING, 10, 0, 3)),
        b"\x02\x81key1a" + b"\x80\x81key1b",  # in two fragments
        b"\x01\x82key1\xa8\xa6" + b"\x89\x80key1" + b"\x80\x80key1",
        b"\x82\xff" + b"\x7f" + b"\xff" * 7,
        b"\xc2\x81key1a",
    ]
    seeds = [bytes((how,)) + frame for how in (1, 3, 13) for frame in (*every, b"".join(every[:4]))]
    yield Target(_frames, [*seeds, b"\0" + make_frame(BINARY, b"of a server", masked=False)])


# -- HTTP ------------------------------------------------------------------------------------------------------------

_JSON = b'{"params": {"text": "hi", "rate": 1}}'
_FORM = b"text=hi&rate=1&flag=on&empty="
_PARTS = (
    b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\nhi\r\n--b\r\nContent-Disposition: form-data; '
    b'name="voice"; filename="v.wav"\r\nContent-Type: audio/wav\r\n\r\nabc\r\n--b--\r\n'
)
_SPEECH = b'{"model": "tts", "input": "hi", "voice": "default", "response_format": "pcm", "speed": 1.0}'


def _post(path: str, kind: str, body: bytes, more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


_BODIES = [
    *(_post(f"/v1/spaces/{space}/requests", "application/json", _JSON) for space in ("tts", "tts%00", "none")),
    _post("/v1/spaces/tts/requests", "application/json", b'{"params": {"text": "\\ud83d", "rate": 1e400}}'),
    _post("/v1/spaces/tts/requests", "application/json", b"[" * 3000),
    _post("/v1/spaces/tts/requests", "application/json", b'{"params": {"n": ' + b"1" * 5000 + b"}}"),
    _post("/v1/spaces/tts/requests", "application/x-www-form-urlencoded", _FORM),
    _post("/v1/spaces/tts/requests", "multipart/form-data; boundary=b", _PARTS),
    _post("/v1/audio/speech", "application/json", _SPEECH),
    _post("/v1/audio/transcriptions", "multipart/form-data; boundary=b", _PARTS.replace(b"voice", b"file")),
    _post("/v1/spaces/tts/requests", "application/json", _JSON, "Expect: 100-continue\r\n"),
    (
        b"POST /v1/spaces/tts/requests HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n0\r\nX: y\r\n\r\n"
    ),
]
_HEADS = [
    *(
        f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        for method, path in (
            ("GET", "/health"),
            ("HEAD", "/metrics"),
            ("GET", "/v1/spaces"),
            ("GET", f"/v1/requests/{ID}"),
            ("DELETE", f"/v1/requests/{ID}"),
            ("GET", f"/v1/requests/{ID}/audio?format=wav&after_seq=-1"),
            ("GET", f"/v1/requests/{ID}/events?attempt=99999999999999999999"),
            ("OPTIONS", "*"),
            ("GET", "http://x/v1/models/a/b"),
            ("GET", "/%ff%00?%"),
            ("GET", "//"),
        )
    ),
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\n",
    b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
    UPGRADE + make_frame(BINARY, pack(HELLO), masked=True),
    b'GET /v1/spaces HTTP/1.1\r\nHost: x\r\nRange: bytes=0-,5-2\r\nAuthorization: Bearer \xff\r\nIf-Range: ""\r\n\r\n',
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 3,
]


@contextmanager
def http() -> Iterator[Target]:
    """HTTP heads and bodies, at the socket of a real relay: an answer in HTTP or none, never a 500, and no error."""
    with open_relay() as relay:

        def run(data: bytes) -> None:
            with relay.connect() as connection:
                try:
                    for start in range(0, len(data), 1 + len(data) * 2 // 3):
                        connection.sendall(data[start : start + 1 + len(data) * 2 // 3])
                    connection.shutdown(socket.SHUT_WR)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                heard = relay.hear_all(connection)
            assert not heard or heard.startswith(b"HTTP/1.1 "), heard[:200]
            assert not heard.startswith(b"HTTP/1.1 500"), heard[:500]
            relay.check()

        yield Target(run, [*_BODIES, *_HEADS])


# -- Wyoming ---------------------------------------------------------------------------------------------------------

_PCM: Map = {"rate": 16_000, "width": 2, "channels": 1}
_ASKED = [
    WyomingEvent("describe"),
    WyomingEvent("ping", {"text": "x"}),
    WyomingEvent("synthesize", {"text": " ", "voice": {"name": "tts", "language": "en", "speaker": None}}),
    WyomingEvent("synthesize-start", {"voice": {}}),
    WyomingEvent("synthesize-chunk", {"text": " "}),
    WyomingEvent("synthesize-stop"),
    WyomingEvent("transcribe", {"name": "tts", "language": "en-US"}),
    WyomingEvent("audio-start", _PCM),
    WyomingEvent("audio-chunk", _PCM, bytes(64)),
    WyomingEvent("audio-stop"),
    WyomingEvent("transcript", {"text": "x", "context": {"conversation_id": "a1"}}),
    WyomingEvent("select-program", {"name": "relayd"}),
    WyomingEvent("detect"),
]


@contextmanager
def wyoming() -> Iterator[Target]:
    """Events of the Wyoming protocol, at the socket of a real relay: events are answered, and it logs no error."""
    with open_relay() as relay:

        def run(data: bytes) -> None:
            with relay.connect_wyoming() as connection:
                try:
                    for start in range(0, len(data), 1 + len(data) * 2 // 3):
                        connection.sendall(data[start : start + 1 + len(data) * 2 // 3])
                    connection.shutdown(socket.SHUT_WR)
                except OSError:
                    pass
                heard = EventParser()
                heard.feed(relay.hear_all(connection))
            while (event := heard.next()) is not None:
                assert event.data.get("code") != "internal", event
            assert not heard.is_amid, "half an event"
            relay.check()

        each = [event.encode() for event in _ASKED]
        old = [b'{"type": "ping", "data": {"text": "x"}}\n', b'{"type": "x", "payload_length": 99999999999}\n']
        yield Target(run, [*each, b"".join(each[:2] * 3), b"".join(each[3:6]), b"".join(each[6:10]), *old])


# -- audio -----------------------------------------------------------------------------------------------------------


@contextmanager
def audio() -> Iterator[Target]:
    """Recordings: any bytes are samples that a model can take, or an AudioFault."""
    import numpy as np
    import soundfile

    from gpuworker.engines.voxcpm.audio_decode import AudioFault
    from gpuworker.engines.voxcpm.audio_decode import decode as decode_audio
    from tests.support.recordings import RECORDINGS, make_recording

    def run(data: bytes) -> None:
        try:
            samples = decode_audio(data, rate=16_000, max_seconds=2.0)
        except AudioFault:
            return
        assert samples.dtype == np.float32
        assert samples.ndim == 1
        assert 0.15 * 16_000 < len(samples) <= 2.1 * 16_000, len(samples)
        assert np.isfinite(samples).all()

    tone = (0.3 * np.sin(np.arange(2_000) / 5)).astype(np.float32)
    seeds = []
    for kind, subtype in (
        *(("WAV", each) for each in ("PCM_16", "PCM_U8", "PCM_24", "FLOAT", "ULAW", "MS_ADPCM", "IMA_ADPCM", "GSM610")),
        *(("WAVEX", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
    ):
        file = io.BytesIO()
        soundfile.write(file, tone, 8_000, format=kind, subtype=subtype)
        seeds.append(file.getvalue())
    wav = seeds[0]
    sizes = [wav[:40] + size.to_bytes(4, "little") + wav[44:] for size in (0, 1, 2**31 - 1, 2**32 - 1, 2_000_000_000)]
    for container, codec in (*RECORDINGS, ("caf", "pcm_s16le"), ("asf", "wmav2")):
        seeds.append(make_recording(container, codec, seconds=0.3, rate=16_000))
    yield Target(run, [*seeds, *sizes, b"RIFF\0\0\0\0WAVE", b"ID3\x04\0\0\x7f\x7f\x7f\x7f", b"\xff\xfb\x90\x64"])


@contextmanager
def hearing() -> Iterator[Target]:
    """Live inputs of spaces that transcribe: any bytes are heard to their end, or refused in words."""
    import struct

    from gpuworker.engines.base import Chunk, LiveInput, OutputChunk
    from gpuworker.engines.catalog import parse_options
    from gpuworker.engines.mock import MockEngine
    from gpuworker.slots.run_engine import run_engine

    engine = MockEngine(parse_options(MockEngine.OPTIONS, ["transcripts=Yes.|"]))
    engine.load()

    def run(data: bytes) -> None:
        kind = "audio/wav" if data[:1] == b"R" else "audio/L16;rate=8000;channels=2"
        live, step = LiveInput(kind), 1 + len(data) // 3
        for start in range(0, len(data), step):
            live.feed(data[start : start + step])
        live.feed(b"", last=True)
        chunks: list[Chunk] = []
        result = run_engine(engine, {}, {"audio": live}, lambda: False, chunks.append)
        told = [chunk.data for chunk in chunks if isinstance(chunk, OutputChunk)]
        if result.outcome == "failed":
            assert (result.code, result.report) == ("input_mismatch", ""), result
        else:
            assert told[-1]["finish_reason"] == "stop"
            places = [next(iter(each.values())) for each in told[:-1] if isinstance(each, dict)]
            assert all(place.get("start", 0) <= place.get("end", 2**40) for place in places)

    loud = struct.pack("<2h", 9_000, -9_000) * 2_000
    seeds = [loud, loud + bytes(20_000), bytes(2_000)]
    for channels, bits, coding in ((1, 16, 1), (2, 16, 1), (1, 32, 3), (1, 8, 1), (0, 16, 1)):
        size = channels * bits // 8
        fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, coding, channels, 8_000, 8_000 * size, size, bits)
        sizes = [struct.pack("<4sI", b"data", length) for length in (len(loud), 0, 0xFFFF_FFFF)]
        seeds += [b"RIFF\0\0\0\0WAVE" + fmt + size + loud for size in sizes]
    yield Target(run, [*seeds, b"RIFF\0\0\0\0WAVE"])


# -- semantics -------------------------------------------------------------------------------------------------------


@contextmanager
def semantics() -> Iterator[Target]:
    """`register`, `submit` and what follows them, spoilt, at the socket of a real relay: it goes on without an error.

    The bytes are dice: they draw who says what, and what is wrong with it.
    """
    with open_relay() as relay:

        def run(data: bytes) -> None:
            dice = random.Random(data)
            ids = {ID: f"{dice.getrandbits(128):032x}", INSTANCE: f"{dice.getrandbits(128):032x}"}

            def said(message: Map, *, spoilt: bool) -> bytes:
                raw = pack(spoil(dice, message) if spoilt else message)
                for name, fresh in ids.items():
                    raw = raw.replace(name.encode(), fresh.encode())
                return raw

            with relay.connect() as worker_socket, relay.connect() as client_socket:
                worker, client = relay.upgrade(worker_socket), relay.upgrade(client_socket)
                worker.say(said(HELLO | {"role": "worker"}, spoilt=dice.random() < 0.1))
                client.say(said(HELLO, spoilt=dice.random() < 0.1))
                worker.say(said(REGISTER | {"running": []}, spoilt=dice.random() < 0.4))
                client.say(said(SUBMIT | {"inputs": {}}, spoilt=dice.random() < 0.4))
                for at in range(dice.randrange(12)):
                    if dice.random() < 0.4:
                        client.say(said(dice.choice(FROM_CLIENTS), spoilt=dice.random() < 0.7))
                    else:
                        frame = dict(dice.choice(FROM_WORKERS))
                        if "seq" in frame and dice.random() < 0.7:
                            frame["seq"] = at
                        worker.say(said(frame, spoilt=dice.random() < 0.5))
                for peer in (client, worker):
                    peer.say(pack({"type": "ping", "timestamp": 1.0}))
                    peer.hear_pong()
            relay.check()

        yield Target(run, [bytes((number,)) for number in range(64)])


# -- calls -----------------------------------------------------------------------------------------------------------


@contextmanager
def sdp() -> Iterator[Target]:
    """What browsers offer to engine `webrtc`, and their candidates: each is answered, or refused in words."""
    from tests.fuzz.calls import SEEDS, a_gateway  # aiortc takes a second to import

    with a_gateway() as run:
        yield Target(run, SEEDS)


TARGETS: Mapping[str, Callable[[], AbstractContextManager[Target]]] = {
    each.__name__: each for each in (codec, frames, http, wyoming, audio, hearing, semantics, sdp)
}
