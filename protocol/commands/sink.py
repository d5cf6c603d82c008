"""Where the output of a request goes: files, standard output and the progress line."""

import argparse
import base64
import sys
from pathlib import Path
from typing import Any

import trio

from protocol.client.stream import Event, Restarted, Stream
from protocol.commands.player import Player, PlayerFailed, find_player, has_sound
from protocol.commands.progress import Progress
from protocol.commands.wav_writer import AudioWriter, check_audio_name
from protocol.printable import printable_json, printable_lines
from protocol.wire.errors import ErrorCode, RequestError
from protocol.wire.frames import Audio, Completed, Output, Started, Video
from protocol.wire.frames import Progress as ProgressFrame
from protocol.wire.ivf import IVF, ivf_header, ivf_picture
from protocol.wire.media_types import BINARY, suffix_of
from protocol.wire.messages import Queued, WorkerAway, WorkerBack
from protocol.wire.structs import AudioFormat, VideoFormat
from protocol.wire.validators import Struct, Value


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
        self._request_id = ""
        self._player = _open_player(args, progress)
        self._player_failed = False
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
        self._name, self._request_id = f"{self._name}-{stream.request_id[:8]}", stream.request_id
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
            if self._audio_s and not stream.ended and self._writer is not None:
                self._progress.note(
                    f"{self._audio_s:.1f} s of audio were written to {self._where or 'standard output'}"
                )
        if self._player is not None:
            # The last seconds are still to be heard.
            await trio.to_thread.run_sync(self._player.finish, abandon_on_cancel=True)
            self._check_player(stream.request_id)
        made = self._pictures if self._takes_video else self._audio_s or self._outputs
        if (self._takes_video or self._format is not None) and not made:
            what = "video of this" if self._takes_video else "audio of this"
            message = f"the engine made no {what}, so nothing was written; send something else"
            raise RequestError(stream.request_id, ErrorCode.ENGINE_FAILED, message)
        where = self._where if self._audio_s or self._pictures or self._binary_bytes else ""
        self._progress.completed(self._audio_s, where, cached=self._cached, pictures=self._pictures)

    @property
    def _audio_s(self) -> float:
        return max((each.seconds for each in (self._writer, self._player) if each is not None), default=0.0)

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
        if self._player is not None:
            self._player.begin(audio_format)
            if self._player.fault:
                self._progress.note(f"it is not played: {self._player.fault}")
                self._player = None
            elif self._writer is None:
                return
        if self._writer is None:
            self._where = f"{self._name}.wav"
            self._writer = AudioWriter(Path(self._where))
        self._writer.begin(audio_format)

    async def _write(self, pcm: bytes) -> None:
        made = self._writer or self._player
        if made is None or made.format is None:  # not before there is some: a file keeps what is in it
            if self._format is None:
                raise ValueError("the request sends audio without having sent its format")
            self._begin(self._format)
        if self._player is not None:
            self._player.write(pcm)
            self._check_player(self._request_id)
            if self._writer is None:
                return
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

    def _check_player(self, request_id: str) -> None:
        if self._player is None or not self._player.fault or self._player_failed:
            return
        self._player_failed = True
        advice = "" if self._writer is not None else f"; fetch the speech with: relay attach {request_id} -o FILE"
        self._progress.note(f"it is not played on: {self._player.fault}{advice}")

    def line(self, value: Any) -> None:
        """Print a line: text as it is, made harmless for a terminal; everything else as JSON."""
        if not isinstance(value, str) or self._json:
            value = json_line(value)
        elif sys.stdout.isatty():
            value = printable_lines(value)
        print(value, flush=True)

    def close(self) -> None:
        """Leave a complete file behind, or none; and fall silent."""
        if self._player is not None:
            self._player.stop()
        if self._writer is not None:
            self._writer.close()


def _open_player(args: argparse.Namespace, progress: Progress) -> Player | None:
    """What the audio is played with, if it is to be: as told, or on a terminal with sound where no file is named."""
    told: bool | None = getattr(args, "play", False)
    on_terminal = sys.stdout.isatty() and sys.stderr.isatty() and not args.json and not getattr(args, "detach", False)
    if told is False or (told is None and (args.output is not None or not on_terminal or not has_sound())):
        return None
    try:
        return Player(find_player())
    except PlayerFailed as fault:
        if told:
            progress.note(f"it is not played: {fault}")
        return None


def _event_json(event: Event) -> dict[str, Value]:
    """An event as a JSON line; audio and pictures are given by their size."""
    if isinstance(event, Audio | Video):
        row = event.to_map()
        row["bytes"] = len(row.pop("pcm" if isinstance(event, Audio) else "data"))
        return row
    if isinstance(event, Struct):
        return event.to_map()
    return {"type": "restarted", "request_id": event.request_id, "attempt": event.attempt, "seq": event.seq}


def json_line(value: Any) -> str:
    """A value as one line of JSON; binary as base64."""
    return printable_json(value, _base64)


def _base64(value: Any) -> dict[str, str]:
    if not isinstance(value, bytes):
        raise TypeError(type(value).__name__)
    return {"base64": base64.b64encode(value).decode("ascii")}
