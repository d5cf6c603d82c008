"""`relay say --lines`: speaks each line of a file into a file of its own, and goes on where it stopped.

What is done is noted in the folder, in `batch.jsonl`: a name that is this batch's own, then a row for each line that
has ended. The id of a line's request follows from that name, the line and how often it has failed. So a batch that is
started again asks for nothing twice: it takes up what its killed predecessor had asked for.
"""

import argparse
import hashlib
import json
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs
import trio

from protocol.client.client import RelayClient
from protocol.commands.exit_codes import Told
from protocol.commands.progress import Progress
from protocol.commands.wav_writer import AudioWriter, check_audio_name
from protocol.printable import printable_json
from protocol.wire.errors import ErrorCode, RequestError
from protocol.wire.frames import Audio, Started
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value

LOG_NAME = "batch.jsonl"
#: What a line of JSON may have besides its params.
FILE_KEY = "file"
#: With which the relay refuses a request that it takes later.
_LATER = frozenset({ErrorCode.QUEUE_FULL, ErrorCode.RATE_LIMITED})
#: With which a request of an earlier run has ended that this run has to ask for anew.
_ANEW = frozenset({"cancelled", ErrorCode.REQUEST_NOT_FOUND})
WAIT_S, MAX_WAIT_S = 0.5, 30.0

Params = dict[str, Value]


@attrs.frozen
class Line:
    """One line to speak.

    Args:
        number: in its file, from 1.
        params: of its request.
        file: the name of its output in the folder.
    """

    number: int
    params: Params
    file: str

    @property
    def key(self) -> str:
        """Equal for a line that is the same in the next run."""
        return json.dumps([self.number, self.params, self.file], sort_keys=True, ensure_ascii=False)


def read_lines(texts: Iterable[str], params: Params, suffix: str) -> Iterator[Line]:
    """Yield what there is to speak: of each line that is not empty its text, or its params if it is a JSON object.

    Raises:
        ValueError: a line is not valid; the message has its number.
    """
    files: set[str] = set()
    for number, text in enumerate(texts, 1):
        if not (text := text.strip()):
            continue
        own: Params = {"text": text}
        file: Value = f"{number:05}{suffix}"
        if text.startswith("{"):
            try:
                own = json.loads(text)
            except ValueError as fault:
                raise ValueError(f"line {number} begins with {{ and is not JSON: {fault}") from None
            file = own.pop(FILE_KEY, file)
        if not isinstance(file, str) or Path(file).name != file or file.startswith(".") or file == LOG_NAME:
            raise ValueError(f"line {number}: file {file!r} must be a name without a folder, such as hello.wav")
        try:
            check_audio_name(file)
        except ValueError as fault:
            raise ValueError(f"line {number}: {fault}") from None
        if file in files:
            raise ValueError(f"line {number}: file {file!r} is the output of an earlier line, too")
        files.add(file)
        yield Line(number, params | own, file)


@attrs.define
class Log:
    """What is known of earlier runs in a folder."""

    path: Path
    name: str
    done: set[str] = attrs.field(factory=set)
    failures: dict[str, int] = attrs.field(factory=dict)

    def request_id(self, line: Line) -> str:
        """The id of the line's next request."""
        content = f"{self.name} {self.failures.get(line.key, 0)} {line.key}"
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def is_done(self, line: Line) -> bool:
        """Whether an earlier run has spoken the line."""
        return line.key in self.done and (self.path.parent / line.file).exists()

    def note(self, line: Line, request_id: str, fault: RequestError | None) -> dict[str, Value]:
        """Note the end of a line; returns the row."""
        row: dict[str, Value] = {"line": line.number, "file": line.file, "request_id": request_id}
        if fault is None:
            self.done.add(line.key)
            row["state"] = "completed"
        else:
            self.failures[line.key] = self.failures.get(line.key, 0) + 1
            row |= {"state": "failed", "code": fault.code, "message": fault.message}
        _append(self.path, row | {"key": line.key})
        return row


def open_log(folder: Path) -> Log:
    """Read what earlier runs in a folder have noted, or begin.

    Raises:
        ValueError: the file there is something else.
        OSError: the folder cannot be read or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOG_NAME
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    try:
        name = json.loads(rows[0])["batch"] if rows else secrets.token_hex(16)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not of relay say --lines; choose another folder") from None
    log = Log(path, name)
    if not rows:
        _append(path, {"batch": name})
    for text in rows[1:]:
        try:
            row = json.loads(text)
            key, completed = row["key"], row["state"] == "completed"
        except (ValueError, KeyError, TypeError):  # the last one of a run that was killed
            continue
        if completed:
            log.done.add(key)
        else:
            log.failures[key] = log.failures.get(key, 0) + 1
    return log


def _append(path: Path, row: dict[str, Value]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


@attrs.define
class Batch:
    """Speaks lines, and counts how they end."""

    args: argparse.Namespace
    progress: Progress
    relay: RelayClient
    log: Log
    of: int
    _began_at: float = attrs.field(factory=time.monotonic)
    _ended: int = 0
    _skipped: int = 0
    _failed: list[dict[str, Value]] = attrs.field(factory=list)

    async def run(self, lines: list[Line]) -> None:
        """Speak all that is not done.

        Raises:
            Told: some lines have failed, which were printed.
        """
        waiting = [line for line in lines if not self.log.is_done(line)]
        self._skipped = len(lines) - len(waiting)
        if self._skipped:
            self.progress.note(f"{self._skipped} of {self.of} lines are there from an earlier run")
        todo = iter(waiting)
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(min(self.args.jobs, len(waiting))):
                    nursery.start_soon(self._work, todo)
        except ExceptionGroup as group:  # a full disk, a relay that is gone: one of them says it for all
            raise _first_leaf(group) from None
        spoken = self._ended - len(self._failed)
        self.progress.note(f"{spoken} lines spoken, {len(self._failed)} failed -> {self.args.out_dir}")
        for row in sorted(self._failed, key=lambda row: int(row["line"])):
            self.progress.error(f"line {row['line']}: {row['message'] or 'failed'} ({row['code']})", str(row["code"]))
        if self._failed:
            raise Told

    async def _work(self, todo: Iterator[Line]) -> None:
        for line in todo:
            row = await self._speak(line)
            self._ended += 1
            if row["state"] == "failed":
                self._failed.append(row)
            if self.args.json:
                print(printable_json(row), flush=True)
            done, took_s = self._skipped + self._ended, time.monotonic() - self._began_at
            self.progress.batch(done, self.of, len(self._failed), (self.of - done) * took_s / self._ended)

    async def _speak(self, line: Line) -> dict[str, Value]:
        wait_s = WAIT_S
        while True:
            request_id = self.log.request_id(line)
            try:
                await self._write(line, request_id)
                return self.log.note(line, request_id, None)
            except RequestError as fault:
                if fault.code in _LATER:
                    await trio.sleep(wait_s)
                    wait_s = min(2 * wait_s, MAX_WAIT_S)
                    continue
                row = self.log.note(line, request_id, fault)
                if fault.code not in _ANEW or self.log.failures[line.key] > 1:
                    return row

    async def _write(self, line: Line, request_id: str) -> None:
        """Speak a line into its file, which is there only when it is whole."""
        folder, args = Path(self.args.out_dir), self.args
        part = folder / f".part-{line.file}"
        writer = AudioWriter(part)
        audio_format: AudioFormat | None = None
        try:
            async with self.relay.submit(
                args.space,
                line.params,
                inputs={name: Path(path) for name, path in args.input},
                priority=args.priority,
                queue_timeout_s=args.queue_timeout,
                run_timeout_s=args.run_timeout,
                retry=args.retry,
                cache=not args.no_cache,
                group=args.group,
                request_id=request_id,
            ) as stream:
                async for event in stream.events():
                    if isinstance(event, Started) and event.format is not None:
                        audio_format = event.format
                        if writer.format is not None:  # another attempt
                            writer.begin(audio_format)
                    elif isinstance(event, Audio):
                        if audio_format is None:
                            message = "the request sends audio without having sent its format"
                            raise RequestError(request_id, ErrorCode.ENGINE_FAILED, message)
                        if writer.format is None:
                            writer.begin(audio_format)
                        writer.write(event.pcm)
            if not writer.seconds:
                message = "the engine made no audio of this; send something else"
                raise RequestError(request_id, ErrorCode.ENGINE_FAILED, message)
            writer.close()
            part.replace(folder / line.file)
        finally:
            writer.close()
            part.unlink(missing_ok=True)


def _first_leaf(group: ExceptionGroup[Exception]) -> Exception:
    first = group.exceptions[0]
    return _first_leaf(first) if isinstance(first, ExceptionGroup) else first


def open_batch(args: argparse.Namespace, params: Params) -> tuple[list[Line], Log]:
    """Read what there is to do, and what of it is done.

    Raises:
        ValueError: the options contradict each other, or a line is not valid.
        OSError: the lines cannot be read, or the folder not written.
    """
    if args.out_dir is None:
        raise ValueError("--lines needs a folder for what it makes: --out-dir FOLDER")
    for name, given in (("-o", args.output), ("--pipe", args.pipe), ("--detach", args.detach), ("--play", args.play)):
        if given:
            raise ValueError(f"--lines and {name} do not go together; leave one out")
    if stdin := [name for name, path in args.input if path == "-"]:
        raise ValueError(f"with --lines, input {stdin[0]} must be a file: each line sends it")
    check_audio_name(f"x{args.suffix}")
    try:
        text = sys.stdin.read() if args.lines == "-" else Path(args.lines).read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise ValueError(f"{args.lines} is not UTF-8 at byte {fault.start + 1}; save the file as UTF-8") from None
    lines = list(read_lines(text.splitlines(), params, args.suffix))
    if not lines:
        raise ValueError(f"{args.lines} has no line to speak")
    return lines, open_log(Path(args.out_dir))
