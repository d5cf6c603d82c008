"""The implementation of each `relay` command."""

import argparse
import base64
import json
import signal
import sys
from collections.abc import Awaitable, Callable, Container, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NoReturn

import trio

from protocol.client.address import read_token
from protocol.client.client import RelayClient, open_relay
from protocol.client.inputs import TEXT, From, InputSource
from protocol.client.stream import Event, Restarted, Stream
from protocol.commands.exit_codes import DONE, INTERRUPTED
from protocol.commands.progress import Progress, table
from protocol.commands.standard_input import StandardInput, TextDecoder, decoded
from protocol.commands.wav_writer import AudioWriter, check_audio_name
from protocol.link.background import open_background
from protocol.printable import printable, printable_json, printable_lines
from protocol.wire.errors import EncodeError, ErrorCode, LinkError, RequestError, RequestRejected
from protocol.wire.frames import Audio, Completed, Output, Started, Video
from protocol.wire.frames import Progress as ProgressFrame
from protocol.wire.ivf import IVF, ivf_header, ivf_picture
from protocol.wire.media_types import BINARY, suffix_of
from protocol.wire.messages import Queued, Snapshot, Welcome, WorkerAway, WorkerBack
from protocol.wire.params_schema import check_params, takes_text
from protocol.wire.structs import AudioFormat, VideoFormat
from protocol.wire.validators import Struct, Value

#: How long to wait for the list of what a space accepts; without it, the refusal is printed as it came.
SPACES_S = 3.0
#: Where standard input is to be a text.
NOTHING_TO_READ = "there is nothing to read on standard input"

Params = dict[str, Value]


def run_command(args: argparse.Namespace, progress: Progress) -> int:
    """Run the requested command; returns its exit code, or raises the error that ended it."""
    args.token = read_token(args.token_file) if args.token_file else None
    return trio.run(_run, args, progress)


async def _run(args: argparse.Namespace, progress: Progress) -> int:
    """Run the command until it ends or a signal ends it, in which case it still cancels its request in order."""
    caught: list[int] = []
    with trio.CancelScope() as working:
        receiving = trio.CancelScope()
        ready = trio.Event()

        async def receive_signal() -> None:
            # The receiver closes after the first signal, so a second Ctrl-C ends the program at once.
            # Once one has come the receiver is gone, and a second Ctrl-C ends the program at once.
            with receiving, trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                ready.set()
                async for number in signals:
                    caught.append(number)
                    break
            working.cancel()

        async def stop() -> None:
            receiving.cancel()

        async with open_background(receive_signal, stop):
            await ready.wait()
            await COMMANDS[args.command](args, progress)
            return DONE
    progress.note("interrupted")
    return 128 + caught[0] if caught else INTERRUPTED


def _open(args: argparse.Namespace, progress: Progress) -> AbstractAsyncContextManager[RelayClient]:
    lost = False

    def on_reconnect(fault: LinkError, delay_s: float) -> None:
        nonlocal lost
        lost = True
        progress.note(f"connection lost ({fault}), trying again in {delay_s:.1f} s")

    def on_up(_welcome: Welcome) -> None:
        if lost:
            progress.note("connected again")

    role = args.role or ("operator" if args.command == "watch" else "client")
    return open_relay(args.url, token=args.token, role=role, on_reconnect=on_reconnect, on_up=on_up)


async def say(args: argparse.Namespace, progress: Progress) -> None:
    """Speak a text."""
    if any(name == "text" for name, _value in args.param):
        raise ValueError("--param text=... and TEXT are the same param; give one of them")
    if args.text == "-":
        await _submit(args, progress, {}, stdin="text")
    elif not args.text.strip():
        raise ValueError("the text is empty; there is nothing to speak")
    else:
        await _submit(args, progress, {"text": args.text})


async def submit(args: argparse.Namespace, progress: Progress) -> None:
    """Submit any request."""
    await _submit(args, progress, {})


async def _submit(args: argparse.Namespace, progress: Progress, params: Params, stdin: str | None = None) -> None:
    """Submit a request and follow it; `stdin` names what standard input contains, unless an option does."""
    inputs: dict[str, InputSource] = {name: Path(path) for name, path in args.input if path != "-"}
    inputs |= {name: From(request_id) for name, request_id in args.pipe}
    names = [name for name, _source in (*args.input, *args.pipe)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"input {twice} has two sources; name one")
    from_stdin = [*([stdin] if stdin else ()), *(name for name, path in args.input if path == "-")]
    if len(from_stdin) > 1:
        raise ValueError(f"standard input cannot be {' and '.join(from_stdin)}; name a file for one of them")
    params |= {name: _parsed(text) for name, text in args.param}
    read = StandardInput() if from_stdin else None
    if read is not None and args.command == "say" and not await read.read_begun():
        raise ValueError(NOTHING_TO_READ)
    sink = Sink(args, progress, args.space)
    try:
        async with _open(args, progress) as relay:
            is_fed = read is not None and await _add_stdin(relay, args, read, from_stdin[0], params, inputs)
            try:
                await _follow(relay, args, sink, params, inputs)
            except RequestRejected as refusal:
                if is_fed or not _read_as_json(args, refusal.details):
                    raise  # it cannot be sent again when a part of an input is gone
                row = await _space_row(relay, args.space)
                if not (texts := _params_taken_as_text(row, args, refusal.details)):
                    raise
                await _follow(relay, args, sink, params | texts, inputs)
    except EncodeError as fault:
        raise ValueError(f"the request cannot be sent: {fault.describe_in('params')}") from fault
    finally:
        sink.close()


async def _add_stdin(
    relay: RelayClient,
    args: argparse.Namespace,
    stdin: StandardInput,
    name: str,
    params: Params,
    inputs: dict[str, InputSource],
) -> bool:
    """Add standard input to a request; True if it is fed as it comes, which the space must take.

    With --detach it is added whole, since nobody stays to feed it.
    """
    row = await _space_row(relay, args.space)
    schema, rule = row.get("params") or {}, (row.get("inputs") or {}).get(name) or {}
    is_text = args.command == "say" or name in schema.get("properties", {})
    is_fed = bool(rule.get("live")) and not args.detach
    if not await stdin.read_begun() and is_text:
        raise ValueError(NOTHING_TO_READ)
    media_type = TEXT if is_text else stdin.media_type(rule.get("media_types", ()))
    if is_fed:
        params |= _params_taken_as_text(row, args, check_params(schema, params))
        inputs[name] = (decoded(stdin.pieces()) if is_text else stdin.pieces(), media_type)
    elif is_text:
        params[name] = TextDecoder().decode(await stdin.read_all(), final=True).rstrip("\n")
    else:
        inputs[name] = (await stdin.read_all(), media_type)
    return is_fed


async def _follow(
    relay: RelayClient, args: argparse.Namespace, sink: "Sink", params: Params, inputs: dict[str, InputSource]
) -> None:
    async with relay.submit(
        args.space,
        params,
        inputs=inputs,
        priority=args.priority,
        queue_timeout_s=args.queue_timeout,
        run_timeout_s=args.run_timeout,
        detach=args.detach,
        retry=args.retry,
        cache=not args.no_cache,
        group=args.group,
    ) as stream:
        if args.detach:
            sink.line({"type": "accepted", "request_id": stream.request_id} if args.json else stream.request_id)
        else:
            await sink.attach_to(stream)


async def _space_row(relay: RelayClient, space: str) -> dict[str, Value]:
    """What a space takes; empty if it is not known, or the relay does not say within `SPACES_S`."""
    rows: list[dict[str, Value]] = []
    with trio.move_on_after(SPACES_S):
        rows = await relay.spaces()
    return next((row for row in rows if row.get("name") == space), {})


def _read_as_json(args: argparse.Namespace, refused: Container[str]) -> dict[str, str]:
    """Those of the refused params that were read as JSON: 123, true, null."""
    return {name: text for name, text in args.param if name in refused and not isinstance(_parsed(text), str)}


def _params_taken_as_text(row: dict[str, Value], args: argparse.Namespace, refused: Container[str]) -> Params:
    """Those of the params read as JSON that the space takes as text."""
    rules = (row.get("params") or {}).get("properties", {})
    return {name: text for name, text in _read_as_json(args, refused).items() if takes_text(rules.get(name), text)}


def _parsed(text: str) -> Value:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


async def attach(args: argparse.Namespace, progress: Progress) -> None:
    """Follow a request."""
    sink = Sink(args, progress, "relay")
    try:
        async with _open(args, progress) as relay, relay.attach(args.request_id, args.after_seq) as stream:
            await sink.attach_to(stream)
    finally:
        sink.close()


async def status(args: argparse.Namespace, progress: Progress) -> None:
    """Show the state of a request."""
    async with _open(args, progress) as relay:
        _print_status(args, (await relay.status(args.request_id)).to_map())


async def cancel(args: argparse.Namespace, progress: Progress) -> None:
    """Cancel a request."""
    async with _open(args, progress) as relay:
        reply = await relay.cancel(args.request_id, args.reason)
        if reply.state in ("completed", "failed"):
            progress.note(f"too late: the request is already {reply.state}")
        _print_status(args, reply.to_map())


def _print_status(args: argparse.Namespace, row: dict[str, Value]) -> None:
    del row["type"]
    lines = "\n".join(printable(f"{name}: {value}") for name, value in row.items())
    print(_json(row) if args.json else lines, flush=True)


async def spaces(args: argparse.Namespace, progress: Progress) -> None:
    """List the spaces."""
    async with _open(args, progress) as relay:
        rows = await relay.spaces()
    if args.json:
        print(_json(rows), flush=True)
        return
    columns = ("name", "state", "engine", "workers", "slots", "queued", "running", "live", "description")
    rows = [row | {"live": _live_inputs(row)} for row in rows]
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    print(table([[column.upper() for column in columns], *cells]), flush=True)


def _live_inputs(row: dict[str, Value]) -> str:
    """The inputs of a space that may be fed while a request runs."""
    return ",".join(name for name, rule in (row.get("inputs") or {}).items() if rule.get("live"))


async def watch(args: argparse.Namespace, progress: Progress) -> None:
    """Follow everything that happens."""
    async with _open(args, progress) as relay, relay.watch(args.topics) as changes:
        async for change in changes:
            if args.json:
                print(_json(change.to_map()), flush=True)
                continue
            word = "is" if isinstance(change, Snapshot) else "now"
            for topic, rows in change.data.items():
                for row in rows:
                    print(printable(f"{topic} {word} " + " ".join(f"{key}={value}" for key, value in row.items())))
            for topic, gone in getattr(change, "gone", {}).items():
                for name in gone:
                    print(printable(f"{topic} gone {name}"))
            sys.stdout.flush()


COMMANDS: Mapping[str, Callable[[argparse.Namespace, Progress], Awaitable[None]]] = {
    "say": say,
    "submit": submit,
    "attach": attach,
    "status": status,
    "cancel": cancel,
    "spaces": spaces,
    "watch": watch,
}


class Sink:
    """Writes the output of a request: audio, video and binary to files, other values to stdout, the rest to stderr.

    Of a request that makes audio and video, the file gets the one that its name says.

    Raises:
        ValueError: the options contradict each other.
        OSError: the output file cannot be written; raised before anything is submitted.
    """

    def __init__(self, args: argparse.Namespace, progress: Progress, name: str) -> None:
        self._progress = progress
        self._name = name
        self._json: bool = args.json
        self._pipe = args.output == "-"
        self._where = ""
        self._writer: AudioWriter | None = None
        self._format: AudioFormat | None = None
        self._video: VideoFormat | None = None
        #: Whether the file gets the video, and nothing else.
        self._takes_video = False
        self._pictures = 0
        self._binary_bytes = 0
        self._outputs = 0
        self._cached = False
        if args.output is not None and getattr(args, "detach", False):
            raise ValueError("--detach waits for no output; leave out -o, and fetch it with: relay attach ID -o FILE")
        if self._pipe:
            if args.json:
                raise ValueError("--json and -o - both write to standard output; use one of them")
            if sys.stdout.isatty():
                raise ValueError("standard output is a terminal; redirect raw PCM to a pipe or a file")
            self._writer = AudioWriter(sys.stdout.buffer)
        elif args.output is not None:
            if args.command == "say":  # before it is asked for; what another request makes may be a file of any kind
                check_audio_name(args.output)
            self._where = args.output
            self._writer = AudioWriter(Path(args.output))

    async def attach_to(self, stream: Stream) -> None:
        """Process everything that arrives, until the end; raises like the stream."""
        self._name = f"{self._name}-{stream.request_id[:8]}"
        try:
            async for event in stream.events():
                if self._json:
                    self.line(_event_json(event))
                await self._on_event(event)
        except RequestError as fault:
            if self._json:
                error = {"code": fault.code, "message": fault.message, "details": fault.details}
                self.line({"type": "failed", "request_id": fault.request_id, **error, "retryable": fault.retryable})
            raise
        finally:
            if self._audio_s and not stream.ended:
                self._progress.note(
                    f"{self._audio_s:.1f} s of audio were written to {self._where or 'standard output'}"
                )
        made = self._pictures if self._takes_video else self._audio_s or self._outputs
        if (self._takes_video or self._format is not None) and not made:
            what = "video of this" if self._takes_video else "audio of this"
            message = f"the engine made no {what}, so nothing was written; send something else"
            raise RequestError(stream.request_id, ErrorCode.ENGINE_FAILED, message)
        where = self._where if self._audio_s or self._pictures or self._binary_bytes else ""
        self._progress.completed(self._audio_s, where, cached=self._cached, pictures=self._pictures)

    @property
    def _audio_s(self) -> float:
        return self._writer.seconds if self._writer is not None else 0.0

    async def _on_event(self, event: Event) -> None:
        if isinstance(event, Queued):
            self._progress.queued(event)
        elif isinstance(event, WorkerAway):
            self._progress.worker_away(event.wait_s)
        elif isinstance(event, WorkerBack):
            self._progress.started()
        elif isinstance(event, Started):
            self._progress.started()
            self._format, self._video = event.format, event.video
            self._takes_video = event.video is not None and (event.format is None or self._is_ivf)
            if self._format is not None and self._audio_s:  # another attempt
                self._begin(self._format)
            elif self._video is not None and self._pictures:
                self._begin_video(self._video)
        elif isinstance(event, ProgressFrame):
            self._progress.progress(event.state, event.fraction, event.message)
        elif isinstance(event, Audio):
            if not self._takes_video:
                await self._write(event.pcm)
                self._progress.audio(self._audio_s)
        elif isinstance(event, Video):
            if self._takes_video or self._format is None:
                await self._write_picture(event)
                self._progress.pictures(self._pictures)
        elif isinstance(event, Output) and event.mark is None:
            self._outputs += 1
            if isinstance(event.data, bytes):
                await self._binary(event.data, event.media_type or BINARY)
            elif not self._json and not self._pipe:
                self.line(event.data)
        elif isinstance(event, Completed):
            self._cached = bool(event.cached)
        elif isinstance(event, Restarted):
            effect = "the file starts again" if not self._pipe else "the whole audio follows what was written"
            self._progress.note(f"the request starts over; {effect}")

    def _begin(self, audio_format: AudioFormat) -> None:
        if self._writer is None:
            self._where = f"{self._name}.wav"
            self._writer = AudioWriter(Path(self._where))
        self._writer.begin(audio_format)

    async def _write(self, pcm: bytes) -> None:
        if self._writer is None or self._writer.format is None:  # not before there is some: a file keeps what is in it
            if self._format is None:
                raise ValueError("the request sends audio without having sent its format")
            self._begin(self._format)
        assert self._writer is not None
        if self._writer.is_file:
            self._writer.write(pcm)
        else:
            # A player reads a pipe in real time: waiting for it here would hold up the pings.
            await trio.to_thread.run_sync(self._writer.write, pcm, abandon_on_cancel=True)

    @property
    def _is_ivf(self) -> bool:
        return Path(self._where).suffix.lower() == suffix_of(IVF)

    def _begin_video(self, video: VideoFormat) -> None:
        if self._writer is None:
            self._where = f"{self._name}{suffix_of(IVF)}"
            self._writer = AudioWriter(Path(self._where))
        if self._where and not self._is_ivf:
            name = Path(self._where)
            advice = f"give such a name, then make {name.suffix} of it: ffmpeg -i FILE.ivf FILE{name.suffix}"
            raise ValueError(f"{name}: video is written as .ivf; {advice}")
        self._pictures = 0
        self._writer.begin_binary(ivf_header(video))

    async def _write_picture(self, picture: Video) -> None:
        if not self._pictures:
            if self._video is None:
                raise ValueError("the request sends video without having sent its format")
            self._begin_video(self._video)
        assert self._writer is not None
        self._pictures += 1
        data = ivf_picture(picture.data, picture.pts)
        await trio.to_thread.run_sync(self._writer.write_binary, data, abandon_on_cancel=self._pipe)

    async def _binary(self, data: bytes, media_type: str) -> None:
        if self._writer is None:
            self._where = f"{self._name}{suffix_of(media_type)}"
            self._writer = AudioWriter(Path(self._where))
        if self._format is not None or self._video is not None:
            what = "video" if self._takes_video else "audio"
            self._progress.note(f"{len(data)} bytes of binary output dropped: the output file contains the {what}")
            return
        self._binary_bytes += len(data)
        await trio.to_thread.run_sync(self._writer.write_binary, data, abandon_on_cancel=self._pipe)

    def line(self, value: Any) -> None:
        """Print a line: text as it is, made harmless for a terminal; everything else as JSON."""
        if not isinstance(value, str) or self._json:
            value = _json(value)
        elif sys.stdout.isatty():
            value = printable_lines(value)
        print(value, flush=True)

    def close(self) -> None:
        """Leave a complete file behind, or none."""
        if self._writer is not None:
            self._writer.close()


def _event_json(event: Event) -> dict[str, Value]:
    """An event as a JSON line; audio and pictures are given by their size."""
    if isinstance(event, Audio | Video):
        row = event.to_map()
        row["bytes"] = len(row.pop("pcm" if isinstance(event, Audio) else "data"))
        return row
    if isinstance(event, Struct):
        return event.to_map()
    return {"type": "restarted", "request_id": event.request_id, "attempt": event.attempt, "seq": event.seq}


def _json(value: Any) -> str:
    return printable_json(value, _base64)


def _base64(value: Any) -> dict[str, str]:
    if not isinstance(value, bytes):
        raise TypeError(type(value).__name__)
    return {"base64": base64.b64encode(value).decode("ascii")}
