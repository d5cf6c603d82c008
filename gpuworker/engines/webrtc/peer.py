"""One peer: its connection, what it sees and hears slot by slot, and what it tells.

Everything here runs in the gateway's event loop, but `events`, which any thread may read.
"""

import asyncio
import contextlib
import queue
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from fractions import Fraction
from typing import Any

import attrs
import av
from aiortc import (
    MediaStreamTrack,
    RTCBundlePolicy,
    RTCConfiguration,
    RTCDataChannel,
    RTCIceServer,
    RTCPeerConnection,
    RTCRtpSender,
    RTCSessionDescription,
)
from aiortc.mediastreams import MediaStreamError
from aiortc.rtp import RTCP_PSFB_APP, RTCP_PSFB_FIR, RTCP_PSFB_PLI, RtcpPsfbPacket, unpack_remb_fci
from aiortc.sdp import candidate_from_sdp

from gpuworker.engines.base import AudioChunk, EngineError, InvalidParams
from gpuworker.engines.webrtc import microphone
from gpuworker.engines.webrtc.bandwidth import Bandwidth
from gpuworker.engines.webrtc.microphone import Microphone
from gpuworker.engines.webrtc.offer import MAX_CANDIDATES, Offer, is_useful
from gpuworker.engines.webrtc.play import OPUS_HZ, SLOT_S, SLOT_SAMPLES, SLOT_TICKS, Play
from gpuworker.engines.webrtc.screen import Screen
from protocol.wire.ivf import PTS_HZ
from protocol.wire.validators import Value

#: A connection has to stand by then.
CONNECT_S = 30.0
#: A browser reports what it receives each second. Without a report for so long it may be gone, …
LOST_S = 5.0
#: … and after this it is.
GONE_S = 15.0
STATS_S = 5.0
#: A loop that was held up for longer does not send all that it missed: its clock stood still.
STALL_S = 0.5
CLOSE_S = 3.0
#: Packets that wait for a sender that does not take them; more are thrown away, the oldest first.
MAX_WAITING = 100
#: Texts for a data channel that is not open yet.
MAX_TEXTS = 100
#: What the peer may say faster than the relay takes it. Then it is hung up.
MAX_EVENTS = 2_000
#: Of one text, so that the output it becomes fits into a message of the relay's protocol.
MAX_TEXT_BYTES = 60 * 1024
#: The label that clients of OpenAI's Realtime API give their data channel.
EVENTS_LABEL = "oai-events"

#: Where the event loop notes the sockets of the peer that is being made.
SOCKETS: ContextVar[list[asyncio.BaseTransport]] = ContextVar("sockets")
Event = dict[str, Value] | AudioChunk | EngineError | None


@attrs.frozen(kw_only=True)
class Settings:
    """What all peers of a gateway share.

    Args:
        ice_servers: STUN and TURN servers, as `RTCIceServer` has them.
        public_ip: the address in place of this machine's own ones, where a router or a cloud translates it.
        loopback: whether this machine itself may call.
        ports: what `doctor` and refusals call the range of ports.
        max_bits_s: of one peer's video.
        silence: an Opus packet.
    """

    ice_servers: Sequence[RTCIceServer] = ()
    public_ip: str = ""
    loopback: bool = False
    ports: str = ""
    max_bits_s: float = 2_000_000.0
    silence: bytes = b""


class PacketTrack(MediaStreamTrack):
    """A track of packets that were encoded elsewhere."""

    def __init__(self, kind: str, hz: int) -> None:
        super().__init__()
        self.kind = kind
        self._time_base = Fraction(1, hz)
        self._packets: deque[av.Packet[Any]] = deque(maxlen=MAX_WAITING)
        self._filled = asyncio.Event()

    def put(self, data: bytes, pts: int) -> None:
        """Send a packet as soon as the sender takes it."""
        packet = av.Packet(data)
        packet.pts, packet.time_base = pts, self._time_base
        self._packets.append(packet)
        self._filled.set()

    async def recv(self) -> "av.Packet[Any]":
        """Return the next packet, for aiortc."""
        while not self._packets:
            self._filled.clear()
            await self._filled.wait()
        return self._packets.popleft()


class Peer:
    """A browser, or whoever offered.

    Args:
        settings: of the gateway.
        principal: who may play on it.
        microphone: whether its microphone is taken.

    Attributes:
        events: what it tells: frames of the request; None when it has hung up, or the error that ended it.
        microphone: who listens to it; None if nobody may.
    """

    def __init__(self, settings: Settings, principal: str, *, microphone: bool) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.principal = principal
        self.microphone = Microphone() if microphone else None
        self._settings = settings
        # `iceServers=None` would ask a public STUN server.
        configuration = RTCConfiguration(list(settings.ice_servers), bundlePolicy=RTCBundlePolicy.MAX_BUNDLE)
        self._connection = RTCPeerConnection(configuration)
        self._audio = PacketTrack("audio", OPUS_HZ)
        self._video: PacketTrack | None = None
        self._senders: list[RTCRtpSender] = []
        self._channels: list[RTCDataChannel] = []
        self._texts: deque[str] = deque(maxlen=MAX_TEXTS)
        self._plays: deque[Play] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._bandwidth = Bandwidth(settings.max_bits_s)
        self._state = ""
        self._ended = False
        self._heard_at = 0.0
        self._candidates = 0
        self._sockets: list[asyncio.BaseTransport] = []
        self._key_requests = 0
        self.screen = Screen()

    # -- the connection

    async def answer(self, offer: Offer) -> str:
        """Answer the offer, and begin to connect.

        Raises:
            EngineError: it cannot be answered, or no port is left.
        """
        connection = self._connection
        connection.on("connectionstatechange", self._on_state)
        connection.on("datachannel", self._on_channel)
        connection.on("track", self._on_track)
        self._candidates = offer.candidates
        SOCKETS.set(self._sockets)
        try:
            self._add_tracks(offer)
            await connection.setRemoteDescription(RTCSessionDescription(offer.sdp, "offer"))
            await connection.setLocalDescription(await connection.createAnswer())
        except Exception as fault:  # noqa: BLE001 - aiortc's parsers raise whatever a stranger's bytes lead to
            raise InvalidParams({"offer": f"cannot be answered: {_in_words(fault)}"}) from None
        sdp = connection.localDescription.sdp
        if "a=candidate:" not in sdp:
            if self._sockets:
                raise InvalidParams({"offer": "cannot be answered: its transport failed at once"})
            raise EngineError(
                f"no UDP port is left for a call ({self._settings.ports}): hang up another one, "
                "or give the worker more -o ports",
                retryable=True,
            )
        self._begin(self._give_up())
        self._set_state("connecting")
        return _with_public_ip(sdp, self._settings.public_ip)

    def _add_tracks(self, offer: Offer) -> None:
        for kind, codec in (("audio", "opus"), ("video", "VP8")):
            if kind not in offer.kinds:
                continue
            track = self._audio
            if kind == "video":
                track = self._video = PacketTrack("video", PTS_HZ)
            direction = "sendrecv" if self.microphone is not None and kind == "audio" else "sendonly"
            transceiver = self._connection.addTransceiver(track, direction=direction)
            known = RTCRtpSender.getCapabilities(kind).codecs
            transceiver.setCodecPreferences([each for each in known if each.name in (codec, "rtx")])
            self._senders.append(transceiver.sender)
            self._watch_reports(transceiver.sender)

    def _watch_reports(self, sender: RTCRtpSender) -> None:
        """See the reports of what is received: aiortc uses few of them for packets that were encoded elsewhere."""
        handle: Callable[[Any], Awaitable[None]] = sender._handle_rtcp_packet

        async def watch(packet: Any) -> None:
            now = asyncio.get_running_loop().time()
            self._heard_at = now
            if isinstance(packet, RtcpPsfbPacket) and packet.fmt in (RTCP_PSFB_PLI, RTCP_PSFB_FIR):
                self._key_requests += 1
                self.screen.want_key()
            elif isinstance(packet, RtcpPsfbPacket) and packet.fmt == RTCP_PSFB_APP and sender.kind == "video":
                with contextlib.suppress(ValueError):
                    self._bandwidth.on_remb(now, float(unpack_remb_fci(packet.fci)[0]))
            await handle(packet)

        sender._handle_rtcp_packet = watch  # type: ignore[method-assign]

    async def add_candidate(self, given: Any) -> None:
        """Add a candidate, an `RTCIceCandidateInit` of the browser.

        Candidates that are of no use are ignored, and so is what says that they are all (`offer`).

        Raises:
            ValueError: it is none.
        """
        if given is None:
            return
        if not isinstance(given, dict) or not isinstance(given.get("candidate"), str):
            raise ValueError("candidate must be what the browser's event has: {candidate, sdpMid, sdpMLineIndex}")
        text, mid, index = (
            given["candidate"].strip().removeprefix("a="),
            given.get("sdpMid"),
            given.get("sdpMLineIndex"),
        )
        if not is_useful(text, loopback=self._settings.loopback) or self._candidates >= MAX_CANDIDATES:
            return
        self._candidates += 1
        try:
            candidate = candidate_from_sdp(text.removeprefix("candidate:"))
            candidate.sdpMid = mid if isinstance(mid, str) else None
            candidate.sdpMLineIndex = index if isinstance(index, int) else (None if candidate.sdpMid else 0)
            await self._connection.addIceCandidate(candidate)
        except Exception as fault:  # noqa: BLE001 - as in `answer`
            raise ValueError(f"candidate cannot be used: {_in_words(fault)}") from None

    async def _give_up(self) -> None:
        await asyncio.sleep(CONNECT_S)
        if self._state == "connecting":
            self.end(
                EngineError(
                    f"no connection within {CONNECT_S:g} s: no UDP came through between the browser and this worker; "
                    "open its ports, or offer through a TURN server"
                )
            )

    async def _on_state(self) -> None:
        state = self._connection.connectionState
        if state == "connected" and self._state == "connecting":
            self._heard_at = asyncio.get_running_loop().time()
            self._set_state("connected")
            self._begin(self._serve())
        elif state in ("failed", "closed") and self._state == "connecting":
            self.end(
                EngineError(
                    "no connection: the browser's candidates cannot be reached; "
                    "open this worker's UDP ports, or offer through a TURN server"
                )
            )
        elif state in ("failed", "closed"):
            self.end(None)

    def _set_state(self, state: str) -> None:
        self._state = state
        self.emit({"state": state})

    def emit(self, event: dict[str, Value]) -> None:
        """Pass on what the peer says or is."""
        if self._ended:
            return
        self.events.put(event)
        if self.events.qsize() > MAX_EVENTS:
            self.end(EngineError("the peer says more than the relay takes; it was hung up"))

    def end(self, fault: EngineError | None) -> None:
        """The peer has hung up, or is lost; what is played on it ends, too."""
        if self._ended:
            return
        self._ended, self._state = True, "closed"
        if self.microphone is not None:
            self.microphone.leave(self.events)
            self.microphone.end()
        self.events.put({"state": "closed"})
        self.events.put(fault)
        while self._plays:
            self._plays.popleft().close(EngineError("the call has ended; call again, and play it there"))

    async def close(self) -> None:
        """Hang up."""
        self.end(None)
        for task in self._tasks:
            task.cancel()
        try:
            await asyncio.wait_for(self._connection.close(), CLOSE_S)
        except Exception as fault:  # noqa: BLE001 - as in `answer`: what it leaves open is closed here
            print(f"a call was not closed cleanly: {fault!r}"[:300], file=sys.stderr, flush=True)
        for each in self._sockets:
            each.close()

    def _begin(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            print(f"a call ended by a fault: {type(fault).__name__}: {fault}", file=sys.stderr, flush=True)
            self.end(EngineError("the call ended by a fault of the worker; its log says more", retryable=True))

    # -- what is played

    def add_play(self, play: Play) -> None:
        """Play it after what was given before."""
        if self._ended:
            play.close(EngineError("the call has ended; call again, and play it there"))
        else:
            self._plays.append(play)

    async def _serve(self) -> None:
        """Send sound and pictures, slot by slot: one clock for both tracks."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        slot = 0
        while not self._ended:
            left = began + slot * SLOT_S - loop.time()
            if left < -STALL_S:
                began -= left
                left = 0.0
            await asyncio.sleep(max(0.0, left))
            self._serve_slot(slot, loop.time())
            slot += 1
            if slot % round(1 / SLOT_S) == 0:
                self._look_whether_lost(loop.time())
            if slot % round(STATS_S / SLOT_S) == 0:
                self.emit({"stats": await self._stats(loop.time())})

    def _serve_slot(self, slot: int, now: float) -> None:
        while self._plays and (self._plays[0].closed or self._plays[0].finished):
            self._plays.popleft().close()
        play = self._plays[0] if self._plays else None
        packet = None if play is None else play.starts_slot(now)
        if self._video is not None:
            keys_only, before = self._bandwidth.keys_only(now), self.screen.due_bytes
            for pts, picture in self.screen.pictures(slot * SLOT_TICKS, play, keys_only=keys_only):
                self._video.put(picture.data, pts)
            self._bandwidth.on_pictures(now, self.screen.due_bytes - before)
        self._audio.put(self._settings.silence if packet is None else packet, slot * SLOT_SAMPLES)
        if play is not None and packet is not None:
            play.ends_slot()

    def _look_whether_lost(self, now: float) -> None:
        silent_s = now - self._heard_at
        if silent_s >= GONE_S:
            self.end(None)
        elif silent_s >= LOST_S and self._state == "connected":
            self._set_state("lost")
        elif silent_s < LOST_S and self._state == "lost":
            self._set_state("connected")

    async def _stats(self, now: float) -> dict[str, Value]:
        stats: dict[str, Value] = {
            "pictures": self.screen.shown,
            "left_out": self.screen.dropped,
            "key_requests": self._key_requests,
            "video_bits_s": round(self._bandwidth.rate_bits_s(now)),
            "key_frames_only": self._bandwidth.keys_only(now),
        }
        if self._bandwidth.remb_bits_s is not None:
            stats["remb_bits_s"] = round(self._bandwidth.remb_bits_s)
        for sender in self._senders:
            for each in (await sender.getStats()).values():
                if each.type == "remote-inbound-rtp":
                    lost = {"lost": each.packetsLost, "lost_share": round(each.fractionLost / 256, 3)}
                    stats[sender.kind] = lost | {"rtt_s": round(each.roundTripTime or 0.0, 3)}
        return stats

    # -- what it says

    def _on_channel(self, channel: RTCDataChannel) -> None:
        self._channels.append(channel)

        def on_message(message: str | bytes) -> None:
            if not isinstance(message, str):
                self.emit({"error": "what came over the data channel is no text; send JSON as text"})
            elif len(message.encode("utf-8", "replace")) > MAX_TEXT_BYTES:
                self.emit({"error": f"what came over the data channel is longer than {MAX_TEXT_BYTES} bytes"})
            else:
                self.emit({"event": message})

        channel.on("message", on_message)
        while self._texts:
            self.send(self._texts.popleft())

    def send(self, text: str) -> None:
        """Say something over the data channel: the one for events, or else the first."""
        open_ones = [each for each in self._channels if each.readyState == "open"]
        if not open_ones:
            self._texts.append(text)
            return
        channel = next((each for each in open_ones if each.label == EVENTS_LABEL), open_ones[0])
        channel.send(text)

    def _on_track(self, track: MediaStreamTrack) -> None:
        if self.microphone is not None and track.kind == "audio":
            self._begin(self._read_microphone(track, self.microphone))

    async def _read_microphone(self, track: MediaStreamTrack, heard: Microphone) -> None:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=microphone.HZ)
        with contextlib.suppress(MediaStreamError):
            while not self._ended:
                frame = await track.recv()
                assert isinstance(frame, av.AudioFrame)
                frame.pts = None
                for each in resampler.resample(frame):
                    heard.add(bytes(each.planes[0])[: each.samples * 2])


def _with_public_ip(sdp: str, public_ip: str) -> str:
    """The answer with the public address in its host candidates of IPv4, and in what an old client reads instead."""
    if not public_ip:
        return sdp
    lines = []
    for line in sdp.split("\r\n"):
        fields = line.split(" ")
        if line.startswith("a=candidate:") and fields[7:8] == ["host"] and ":" not in fields[4]:
            fields[4] = public_ip
        elif line.startswith("c=IN IP4 "):
            fields[2] = public_ip
        lines.append(" ".join(fields))
    return "\r\n".join(lines)


def _in_words(fault: Exception) -> str:
    """What a parser's exception says, in one line that holds nothing of what it parsed but a few characters."""
    return (str(fault) or type(fault).__name__).replace("\n", " ")[:200]
