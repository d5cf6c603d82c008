"""Servers, names and addresses for the tests of fetching.

Loopback is not public, so the servers here are reached through a resolver and an address rule of the test's own.
"""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

import attrs
import pytest

from gpuworker.engines.voxcpm.fetch import Fetcher
from gpuworker.engines.voxcpm.url_policy import FetchRefused

#: Self-signed, for localhost and 127.0.0.1 (tests/protocol/link/test_tls.py tells how it was made).
TLS = Path(__file__).parents[3] / "support" / "tls"
WAV = b"RIFF" + bytes(1_000)
Script = Callable[[str], Iterable[bytes]]


class Server:
    """Answers each connection with what its script yields for the request's head."""

    def __init__(self, script: Script, *, tls: bool = False, greets: bool = False) -> None:
        self._script = script
        self._greets = greets
        self._context: ssl.SSLContext | None = None
        if tls:
            self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.heads: list[str] = []
        self.connections = 0
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while not self.over.is_set():
                wire, _ = self._listener.accept()
                self.connections += 1
                with wire, contextlib.suppress(OSError):
                    wire.settimeout(10)
                    self._answer(wire)

    def _answer(self, wire: socket.socket) -> None:
        if self._context is not None:
            with self._context.wrap_socket(wire, server_side=True) as secured:
                self._answer_plain(secured)
        else:
            self._answer_plain(wire)

    def _answer_plain(self, wire: socket.socket) -> None:
        head = b""
        if self._greets:
            wire.sendall(b"220 ready\r\n")
        while b"\r\n\r\n" not in head:
            if not (piece := wire.recv(4_096)):
                return
            head += piece
        self.heads.append(head.decode())
        for piece in self._script(head.decode()):
            if self.over.is_set():
                return
            wire.sendall(piece)


def answer(body: bytes = WAV, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    told = f"Content-Length: {len(body) if length is None else length}"
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, told, "", ""]).encode() + body


def served(body: bytes = WAV, status: str = "200 OK", *headers: str, length: int | None = None) -> Script:
    return lambda _head: [answer(body, status, *headers, length=length)]


@attrs.define
class Names:
    """A resolver: name -> addresses, asked in turn where there are several answers."""

    known: dict[str, list[list[str]]]
    asked: list[str] = attrs.field(factory=list)

    def __call__(self, host: str, _port: int) -> list[str]:
        self.asked.append(host)
        answers = self.known.get(host)
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return answers.pop(0) if len(answers) > 1 else answers[0]


def names(*hosts: str) -> Names:
    return Names({host: [["127.0.0.1"]] for host in hosts or ("files.example",)})


def only_this_machine(address: str) -> bool:
    return address == "127.0.0.1"


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=TLS / "cert.pem")


def fetcher(port: int, *hosts: str, resolver: Names | None = None) -> Fetcher:
    listed = [f"{host}:{port}" for host in hosts or ("files.example",)]
    return Fetcher(listed, resolver or names(*hosts), only_this_machine, trusting)


def refusal(fetching: Fetcher, url: str, *, max_bytes: int = 10_000, timeout_s: float = 10) -> str:
    with pytest.raises(FetchRefused) as caught:
        fetching.fetch(url, max_bytes=max_bytes, timeout_s=timeout_s)
    return str(caught.value)


def no_fetch_goes_on() -> None:
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join(2)
            assert not thread.is_alive()
