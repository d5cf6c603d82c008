"""A scripted speech server, with a thread a connection; and an engine in front of it."""

import contextlib
import json
import socket
import ssl
import struct
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import attrs

from gpuworker.engines.base import AudioChunk, Chunk, EngineInput, FormatChunk
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.openai.engine import OpenAiEngine
from gpuworker.slots.run_engine import RunResult, run_engine
from protocol.wire.validators import Value

PATIENCE_S = 20.0
#: Self-signed, for localhost and 127.0.0.1.
TLS = Path(__file__).parents[3] / "support" / "tls"
#: A second at 24 kHz, in which no two samples are equal.
PCM = array("h", range(-12_000, 12_000)).tobytes()
LISTS = {"/v1/models": {"object": "list", "data": [{"id": "kokoro"}]}, "/v1/audio/voices": {"voices": ["anna", "bert"]}}


@attrs.define(eq=False)
class Call:
    """One request, as the server's script sees it."""

    wire: socket.socket
    method: str
    path: str
    headers: dict[str, str]
    body: Any

    def head(self, status: str = "200 OK", *headers: str) -> None:
        """Send a head."""
        self.send("\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode())

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.wire.sendall(data)

    def chunk(self, data: bytes) -> None:
        """Send a chunk of a body with `Transfer-Encoding: chunked`; b"" ends it."""
        self.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def answer(self, body: bytes, status: str = "200 OK", *headers: str) -> None:
        """Send a whole answer."""
        self.head(status, f"Content-Length: {len(body)}", *headers)
        self.send(body)

    def stream(self, pieces: Iterator[bytes] | list[bytes], *headers: str) -> None:
        """Send an answer in chunks."""
        self.head("200 OK", "Transfer-Encoding: chunked", *(headers or ("Content-Type: audio/pcm",)))
        for piece in pieces:
            self.chunk(piece)
        self.chunk(b"")

    def reset(self) -> None:
        """Cut the connection with a RST, as the end of a process does while data is unread."""
        self.wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.wire.close()

    def until_given_up(self) -> None:
        """Wait until the other end closes the connection."""
        with contextlib.suppress(OSError):
            while self.wire.recv(4_096):
                pass


Script = Callable[[Call], None]


class SpeechServer:
    """Answers lists by itself, and each request for speech as its script says."""

    def __init__(
        self, script: Script, lists: "Mapping[str, Any] | Script" = LISTS, *, port: int = 0, tls: bool = False
    ) -> None:
        self.script = script
        self.lists = lists
        self.calls: list[Call] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", port))
        self._wires: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if tls else None
        if self._tls is not None:
            self._tls.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
        self.url = f"http{'s' * tls}://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def kill(self) -> None:
        """Stop as a killed process does: every connection ends, and no new one is accepted."""
        self.hide()
        for wire in list(self._wires):
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)

    def hide(self) -> None:
        """Accept no new connection; those that there are go on."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _start(self, call: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=call, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                wire, _ = self._listener.accept()
                self._start(self._serve, wire)

    def _serve(self, wire: socket.socket) -> None:
        self._wires.add(wire)
        with contextlib.suppress(OSError), wire if self._tls is None else self._tls.wrap_socket(wire, True) as plain:
            if (call := _read(plain)) is not None:
                lists = self.lists
                if call.method == "GET" and not isinstance(lists, Mapping):
                    lists(call)
                elif call.method == "GET":
                    assert isinstance(lists, Mapping)
                    listed = lists.get(call.path.partition("?")[0])
                    found = isinstance(listed, dict | list)
                    call.answer(json.dumps(listed if found else {}).encode(), "200 OK" if found else "404 Not Found")
                else:
                    with self._lock:
                        self.calls.append(call)
                    self.script(call)
        self._wires.discard(wire)


def _read(wire: socket.socket) -> Call | None:
    data = b""
    while b"\r\n\r\n" not in data:
        if not (piece := wire.recv(65_536)):
            return None
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += wire.recv(65_536)
    method, path, _ = first.split()
    return Call(wire, method, path, headers, json.loads(body) if body else None)


def plays(call: Call) -> None:
    """A script: a second of audio."""
    call.stream([PCM])


class Places:
    """A server with a number of places, that turns away what comes when they are taken."""

    def __init__(self, count: int) -> None:
        self._free = threading.Semaphore(count)
        self.refused = threading.Event()

    def __call__(self, call: Call) -> None:
        if not self._free.acquire(blocking=False):
            self.refused.set()
            call.answer(b"", "503 Service Unavailable", "Retry-After: 0")
            return
        try:
            self.refused.wait(PATIENCE_S)  # a place is held until another request was turned away
            call.stream([PCM], "Content-Type: audio/pcm;rate=48000")
        finally:
            self._free.release()


@contextlib.contextmanager
def an_engine(url: str, *given: str) -> Iterator[OpenAiEngine]:
    """A loaded engine in front of a server."""
    engine = OpenAiEngine(parse_options(OpenAiEngine.OPTIONS, [f"url={url}", "wait_s=0", *given]))
    try:
        engine.load()
        yield engine
    finally:
        engine.close()


def never() -> bool:
    return False


def run(
    engine: OpenAiEngine,
    params: dict[str, Value] | None = None,
    *,
    inputs: Mapping[str, EngineInput] | None = None,
    cancelled: Callable[[], bool] = never,
    chunks: list[Chunk] | None = None,
) -> tuple[RunResult, list[Chunk]]:
    """What the engine makes of one request, through the loop that every slot uses."""
    chunks = [] if chunks is None else chunks
    return run_engine(engine, {"text": "Hello."} | (params or {}), inputs or {}, cancelled, chunks.append), chunks


def pcm(chunks: list[Chunk]) -> bytes:
    return b"".join(chunk.pcm for chunk in chunks if isinstance(chunk, AudioChunk))


def format_of(chunks: list[Chunk]) -> tuple[int, int] | None:
    """Sample rate and channels of the first chunk."""
    first = chunks[0]
    assert isinstance(first, FormatChunk)
    return None if first.format is None else (first.format.sample_rate, first.format.channels)
