"""A caller for tests: aiortc's own client, in an event loop of its own thread. It keeps what it hears and sees."""

import asyncio
import contextlib
import threading
import time
from array import array
from collections.abc import Callable, Coroutine, Iterator
from fractions import Fraction
from typing import Any, TypeVar

import aioice.ice
import attrs
import av
import numpy as np
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCDataChannel,
    RTCPeerConnection,
    RTCSessionDescription,
)
from aiortc.mediastreams import AudioStreamTrack, MediaStreamError
from aiortc.rtp import RtcpPsfbPacket

from protocol.wire.ivf import PTS_HZ, ivf_header, ivf_picture
from protocol.wire.structs import VideoFormat

T = TypeVar("T")
PATIENCE_S = 30.0
HEARD_HZ = 48_000


@attrs.frozen
class Seen:
    """A picture as it was decoded: when, its width, its middle's colour (YUV), and how bright its top is (`an_ivf`)."""

    at: float
    width: int
    colour: tuple[int, int, int]
    top: int


class _WatchingLoop(asyncio.SelectorEventLoop):
    """An event loop that notes the size of each datagram."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self._sizes = sizes

    async def create_datagram_endpoint(self, protocol_factory: Any, **more: Any) -> Any:  # type: ignore[override]
        def watched() -> Any:
            protocol = protocol_factory()
            received = protocol.datagram_received

            def note(data: bytes, address: Any) -> None:
                self._sizes.append(len(data))
                received(data, address)

            protocol.datagram_received = note
            return protocol

        return await super().create_datagram_endpoint(watched, **more)


class _Tone(AudioStreamTrack):
    """A microphone that beeps while its caller speaks."""

    def __init__(self, caller: "Caller") -> None:
        super().__init__()
        self._caller = caller

    async def recv(self) -> av.AudioFrame:
        frame = await super().recv()
        assert isinstance(frame, av.AudioFrame)
        count = np.arange(frame.samples)
        level = 12_000 if self._caller.speaks else 0
        self._caller.spoken += self._caller.speaks
        wave = (np.sin(2 * np.pi * count * 20 / frame.samples) * level).astype(np.int16)
        frame.planes[0].update(wave.tobytes())
        return frame


class Caller:
    """One caller; a context manager.

    Args:
        video: whether it offers video.
        channel: label of the data channel that it opens; None for none.
        microphone: whether it sends a tone.
    """

    def __init__(self, *, video: bool = True, channel: str | None = None, microphone: bool = False) -> None:
        self.heard: list[tuple[float, bytes]] = []
        self.seen: list[Seen] = []
        self.said: list[str] = []
        #: Whether its microphone sends the tone, or silence.
        self.speaks = True
        #: Packets of the tone that it has sent, 20 ms each.
        self.spoken = 0
        #: The sizes of the datagrams that came.
        self.datagrams: list[int] = []
        self.connection: RTCPeerConnection = None  # type: ignore[assignment]  # made in its loop
        self.channel: RTCDataChannel | None = None
        self._wants = (video, channel, microphone)
        self._loop = _WatchingLoop(self.datagrams)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: list[asyncio.Task[None]] = []

    def __enter__(self) -> "Caller":
        aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: ["127.0.0.1"]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    async def _close(self) -> None:
        if self.connection is not None:
            await self.connection.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something in its loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def offer(self) -> str:
        """Make its offer."""
        return self.do(self._offer())

    async def _offer(self) -> str:
        video, label, microphone = self._wants
        connection = self.connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        connection.on("track", self._on_track)
        if microphone:
            connection.addTransceiver(_Tone(self), direction="sendrecv")
        else:
            connection.addTransceiver("audio", direction="recvonly")
        if video:
            connection.addTransceiver("video", direction="recvonly")
        if label is not None:
            self.channel = connection.createDataChannel(label)
            self.channel.on("message", lambda message: self.said.append(message))
        await connection.setLocalDescription(await connection.createOffer())
        return connection.localDescription.sdp

    def accept(self, answer: str) -> None:
        """Take the answer."""
        self.do(self.connection.setRemoteDescription(RTCSessionDescription(answer, "answer")))

    def hang_up(self) -> None:
        """End the call."""
        self.do(self.connection.close())

    def say(self, text: str) -> None:
        """Say something over its data channel."""

        async def send() -> None:
            assert self.channel is not None
            opened = asyncio.Event()
            self.channel.on("open", opened.set)
            if self.channel.readyState != "open":
                await opened.wait()
            self.channel.send(text)

        self.do(send())

    def report(self, packet: Callable[[int, int], RtcpPsfbPacket]) -> None:
        """Send a report on its video; `packet` is given its own SSRC, and the video's."""
        (receiver,) = [each.receiver for each in self.connection.getTransceivers() if each.kind == "video"]
        ssrc = int(self.connection.remoteDescription.sdp.split("m=video")[1].split("a=ssrc:")[1].split()[0])
        # aiortc has no public way to say this.
        self.do(receiver._send_rtcp(packet(1, ssrc)))

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """It neither sends nor takes anything during the block."""
        released = threading.Event()
        self._loop.call_soon_threadsafe(released.wait)
        try:
            yield
        finally:
            released.set()

    def _on_track(self, track: MediaStreamTrack) -> None:
        self._tasks.append(asyncio.ensure_future(self._take(track)))

    async def _take(self, track: MediaStreamTrack) -> None:
        with contextlib.suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                now = time.monotonic()
                if isinstance(frame, av.AudioFrame):
                    samples = array("h", bytes(frame.planes[0])[: frame.samples * 4])
                    self.heard.append((now, samples[::2].tobytes()))
                elif isinstance(frame, av.VideoFrame):
                    middle = [_middle(plane) for plane in frame.planes]
                    self.seen.append(
                        Seen(now, frame.width, (middle[0], middle[1], middle[2]), bytes(frame.planes[0])[0])
                    )

    # -- what it heard and saw, for assertions

    def pcm(self) -> "np.ndarray[Any, np.dtype[np.float64]]":
        """All that it heard so far, mono at 48 kHz, -1..1."""
        return np.frombuffer(b"".join(data for _, data in self.heard), "<i2").astype(float) / 32_768

    def hears(self, pcm: bytes, rate: int, least: float = 0.8) -> bool:
        """Whether it has heard these samples: mono, 16 bits."""
        heard = self.pcm()
        wanted = np.frombuffer(pcm, "<i2").astype(float)
        places = np.arange(len(wanted) * HEARD_HZ // rate) * rate / HEARD_HZ
        wanted = np.interp(places, np.arange(len(wanted)), wanted)
        if len(heard) < len(wanted):
            return False
        size = 1 << (len(heard) + len(wanted)).bit_length()
        found = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(wanted, size)), size)[: len(heard)]
        at = int(np.argmax(found))
        part = heard[at : at + len(wanted)]
        likeness = float(found[at] / (np.linalg.norm(part) * np.linalg.norm(wanted) + 1e-9))
        return likeness >= least

    def loudness(self, since: float) -> float:
        """The loudest sample that it heard since then, 0..1."""
        parts = [np.frombuffer(data, "<i2") for at, data in self.heard if at >= since]
        return float(np.abs(np.concatenate(parts).astype(float)).max() / 32_768) if parts else 0.0

    def wait(self, wanted: Callable[[], Any]) -> Any:
        """Wait for a true value; call it in a thread."""
        until = time.monotonic() + PATIENCE_S
        while not (value := wanted()):
            if time.monotonic() > until:
                raise AssertionError(f"in vain: {len(self.heard)} packets heard, {len(self.seen)} pictures seen")
            time.sleep(0.02)
        return value


def _middle(plane: Any) -> int:
    return int(bytes(plane)[plane.height // 2 * plane.line_size + plane.width // 2])


def an_ivf(colour: tuple[int, int, int], pictures: int, *, size: int = 64, fps: int = 25, keys: int = 25) -> bytes:
    """An IVF stream with VP8 of one colour (RGB), whose top grows brighter; a key frame every `keys` pictures."""
    encoder = av.CodecContext.create("libvpx", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width = encoder.height = size
    encoder.pix_fmt, encoder.bit_rate = "yuv420p", 300_000
    encoder.time_base, encoder.framerate = Fraction(1, fps), Fraction(fps)
    encoder.gop_size = keys
    encoder.options = {"cpu-used": "-6", "deadline": "realtime", "lag-in-frames": "0"}
    out = [ivf_header(VideoFormat(width=size, height=size, fps=fps))]
    for number in range(pictures):
        pixels = np.full((size, size, 3), colour, np.uint8)
        pixels[: size // 4] = (number * 2) % 256
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
        frame.pts = number
        out += [ivf_picture(bytes(packet), number * PTS_HZ // fps) for packet in encoder.encode(frame)]
    return b"".join(out)
