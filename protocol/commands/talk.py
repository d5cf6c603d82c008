"""`relay talk`: a conversation at the terminal, over the relay's HTTP API (docs/talk.md).

It blocks: a person at a terminal and one reply at a time need no tasks, and Ctrl-C interrupts whatever waits.
"""

import argparse
import base64
import json
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs

from protocol.client.address import Address, from_environment
from protocol.client.contexts import choose_login
from protocol.commands.exit_codes import DONE, FAILED
from protocol.commands.progress import Progress
from protocol.commands.wav_writer import AudioWriter
from protocol.link.backoff import Backoff
from protocol.printable import printable_json, printable_lines
from protocol.wire.errors import ConnectError, LoginRefused, RequestFailed
from protocol.wire.messages import PATH
from protocol.wire.structs import AudioFormat

#: The relay sends something at least every 15 s; after this it is taken for lost.
SILENCE_S = 60.0
CONNECT_S = 10.0
POLL_S = 0.2
ENDED = ("done", "interrupted", "failed")

Json = dict[str, Any]


def run_talk(args: argparse.Namespace, progress: Progress) -> int:
    """Hold a conversation until the input ends; returns the exit code."""
    login = choose_login(args.url, args.token_file, args.context)
    folder = None if args.output is None else Path(args.output)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    api = TalkApi(from_environment(login.url), login.token or None, progress.note)
    made = api.ask("POST", "/v1/talks", _without_none(session=args.session, user=args.user))
    repl = Repl(api, progress, quote(made["id"]), args.instructions, folder, as_json=args.json)
    progress.note(f"conversation {made['session']}; Ctrl-C interrupts a reply, Ctrl-D ends")
    return repl.run()


def _without_none(**fields: Any) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


@attrs.define
class TalkApi:
    """The relay's HTTP API, asked again while the relay is away."""

    address: Address
    token: str | None = attrs.field(repr=False)
    note: Callable[[str], None]
    _was_up: bool = False

    def ask(self, method: str, path: str, body: Json | None = None) -> Any:
        """Return an answer; asks again until there is one. Only for what may be asked twice."""
        return self.until_answered(lambda: json.loads(self._answer(method, path, body).read() or b"null"))

    def fetch(self, path: str) -> bytes:
        """Return the bytes of a result."""
        answer: bytes = self.until_answered(lambda: self._answer("GET", path).read())
        return answer

    def until_answered(self, ask: Callable[[], Any]) -> Any:
        """Return what `ask` does, called again while the relay is away.

        Raises:
            ConnectError: there is no relay at this address, or it refuses the login.
            RequestFailed: it refuses the request.
        """
        backoff, tries = Backoff(), 0
        while True:
            try:
                return ask()
            except (OSError, HTTPException, Retry) as fault:
                tries += 1
                self.address = self.address.rotated()
                if tries % (1 + len(self.address.others)):
                    continue  # the next of the list, at once
                if not self._was_up:
                    raise ConnectError(f"cannot connect to {self.address}: {fault}") from fault
                delay_s = backoff.next_s()
                self.note(f"connection lost ({fault}), trying again in {delay_s:.1f} s")
                time.sleep(delay_s)

    def events(self, path: str, body: Json) -> Iterator[tuple[str, Json]]:
        """Yield the server-sent events that answer a request.

        Raises:
            OSError, HTTPException, Retry: the connection was lost; nobody knows how much of the request was done.
        """
        kind = ""
        for raw in self._answer("POST", path, body, accept="text/event-stream"):
            line = raw.decode().rstrip("\r\n")
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield kind, json.loads(line.removeprefix("data: "))

    def _answer(self, method: str, path: str, body: Json | None = None, accept: str = "*/*") -> HTTPResponse:
        connection = _connection(self.address)
        headers = {"Accept": accept, "Content-Type": "application/json", "Connection": "close"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        prefix = self.address.resource.removesuffix(PATH)
        connection.request(method, prefix + path, None if body is None else json.dumps(body), headers)
        if connection.sock is not None:
            connection.sock.settimeout(SILENCE_S)
        response = connection.getresponse()
        self._was_up = True
        if response.status < 400:
            return response
        raise _refusal(response.status, response.read())


class Retry(Exception):
    """The relay is shutting down, or has not started yet."""


def _refusal(status: int, body: bytes) -> Exception:
    try:
        error = json.loads(body)["error"]
        code, message, details = error["code"], error["message"], error.get("details") or {}
    except (ValueError, KeyError, TypeError):
        code, message, details = f"http_{status}", f"the relay answered with status {status}", {}
    if status == 401:
        return LoginRefused(code, message)
    if code in ("shutting_down", "not_owner") or status in (502, 504):
        return Retry(message)
    if status == 404 and code == "not_found":
        message += "; does the relay hold conversations? It does with a table [talk] in relayd.toml"
    return RequestFailed("", code, message, details)


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("relay", timeout=CONNECT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(address: Address) -> HTTPConnection:
    if address.kind == "unix":
        return _UnixConnection(address.path)
    if address.kind == "tls":
        context = ssl.create_default_context()
        return HTTPSConnection(address.host, address.port, timeout=CONNECT_S, context=context)
    return HTTPConnection(address.host, address.port, timeout=CONNECT_S)


@attrs.define
class Repl:
    """Reads lines, and prints the replies as they come."""

    api: TalkApi
    progress: Progress
    talk: str
    instructions: str | None
    folder: Path | None
    as_json: bool
    _printed: int = 0
    _in_line: bool = False

    def run(self) -> int:
        """Say each line of standard input; returns the exit code."""
        failed = False
        for line in _lines():
            if line.strip():
                try:
                    failed = not self._say(line.strip())
                except RequestFailed as fault:
                    failed = True
                    self.progress.error(f"{fault.message} ({fault.code})")
        return FAILED if failed and not sys.stdin.isatty() else DONE

    def _say(self, text: str) -> bool:
        """Say something and print the reply; False if there is none."""
        before = max((turn["number"] for turn in self._turns()), default=-1)
        self._printed = 0
        path = None if self.folder is None else _free_name(self.folder)
        writer = None if path is None else AudioWriter(path)
        try:
            return self._follow(text, before, path, writer)
        except KeyboardInterrupt:
            answer = self.api.ask("POST", f"/v1/talks/{self.talk}/interrupt", {"reason": "Ctrl-C"})
            self._end_line()
            self.progress.note("interrupted" if answer["interrupted"] else "too late to interrupt")
            if not sys.stdin.isatty():
                raise
            return True
        finally:
            if writer is not None:
                writer.close()
            if path is not None and path.exists():
                self.progress.note(f"wrote {path}")

    def _follow(self, text: str, before: int, path: Path | None, writer: AudioWriter | None) -> bool:
        body = _without_none(text=text, speak=writer is not None, instructions=self.instructions)
        while True:
            try:
                for kind, data in self.api.events(f"/v1/talks/{self.talk}/say", body):
                    if (has_ended := self._on_event(kind, data, writer)) is not None:
                        return has_ended
                fault: Exception = HTTPException("the reply was cut off")
            except (OSError, HTTPException, Retry) as lost:
                fault = lost
            self.progress.note(f"connection lost ({fault}); the rest of the reply is awaited")
            turn = self._find_reply(text, before)
            if turn is not None:
                if writer is not None:
                    writer.close()  # the whole speech takes its place
                return self._end_of(turn, path)

    def _on_event(self, kind: str, data: Json, writer: AudioWriter | None) -> bool | None:
        """Print one event; whether the reply is there if it was the last one."""
        if self.as_json and kind != "speech":
            self._line({"type": kind} | data)
        if kind == "text":
            self._print(data["text"])
        elif kind == "speech_started" and writer is not None:
            writer.begin(AudioFormat(sample_rate=data["sample_rate"], channels=data["channels"]))
        elif kind == "speech" and writer is not None:
            writer.write(base64.b64decode(data["pcm"]))
        elif kind == "speech_ended" and data["code"]:
            self._note_after_text(f"it is not spoken to its end: {data['message']} ({data['code']})")
        elif kind == "ended":
            self._end_line()
            return True
        elif kind == "failed":
            self._fail(data)
            return False
        return None

    def _find_reply(self, text: str, before: int) -> Json | None:
        """Follow the reply among the turns to its end; None if the relay does not know the text."""
        while True:
            turns = self._turns()
            said = next(
                (t for t in turns if t["number"] > before and (t["role"], t["content"]) == ("user", text)), None
            )
            if said is None:
                return None
            later = (turn for turn in turns if turn["number"] > said["number"] and turn["role"] == "assistant")
            if (reply := next(later, None)) is not None:
                self._print(reply["content"][self._printed :])
                if reply["state"] in ENDED:
                    assert isinstance(reply, dict)
                    return reply
            elif said["state"] == "failed":
                return dict(said)
            time.sleep(POLL_S)

    def _end_of(self, turn: Json, path: Path | None) -> bool:
        if self.as_json:
            self._line({"type": "ended"} | turn)
        if turn["state"] == "failed":
            self._fail(turn)
            return False
        self._end_line()
        if path is not None and turn["speech_request"]:
            try:
                path.write_bytes(self.api.fetch(f"/v1/requests/{turn['speech_request']}/audio"))
            except RequestFailed as fault:
                self.progress.error(f"its speech cannot be fetched: {fault.message} ({fault.code})")
        return True

    def _turns(self) -> list[Json]:
        turns: list[Json] = self.api.ask("GET", f"/v1/talks/{self.talk}/turns")["turns"]
        return turns

    def _fail(self, fault: Mapping[str, Any]) -> None:
        self._end_line()
        self.progress.error(f"{fault['message'] or 'there is no reply'} ({fault['code']})")

    def _note_after_text(self, words: str) -> None:
        self._end_line()
        self.progress.note(words)

    def _print(self, text: str) -> None:
        self._printed += len(text)
        if text and not self.as_json:
            print(printable_lines(text), end="", flush=True)
            self._in_line = not text.endswith("\n")

    def _end_line(self) -> None:
        if self._in_line:
            print(flush=True)
        self._in_line = False

    def _line(self, row: Json) -> None:
        print(printable_json(row), flush=True)


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401  arrows and history in the line
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _free_name(folder: Path) -> Path:
    number = 1
    while (path := folder / f"reply-{number:03}.wav").exists():
        number += 1
    return path
