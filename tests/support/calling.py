"""Stand-ins for the space of calls and for that of faces, whose peers and players do as a test says."""

import json
import math
from array import array
from functools import partial
from typing import Any

import attrs
import trio

from protocol.wire.frames import Audio, Completed, Failed, Output, Started
from protocol.wire.messages import Input, InputAck, Rejected
from protocol.wire.structs import AudioFormat
from relayd.talk.call import Call
from tests.support.talking import ANN, FakeEngine, Sending, Stage

OFFER = "v=0\r\no=- 1 2 IN IP4 127.0.0.1\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\nm=video 9 UDP/TLS/RTP/SAVPF 96\r\n"
PEER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "offer": {"type": "string"},
        "peer": {"type": "string"},
        "start": {"type": "integer"},
        "microphone": {"type": "boolean"},
        "listen": {"type": "boolean"},
    },
    "additionalProperties": False,
}
FACE: dict[str, Any] = {
    "type": "object",
    "properties": {"avatar": {"type": "string"}, "idle": {"type": "boolean"}},
    "additionalProperties": False,
}
#: An offer of somebody who has a microphone.
SPEAKS = OFFER.replace("m=video", "a=sendrecv\r\nm=video")
MICROPHONE_HZ = 16_000
LIVE = {"live": True, "patient": True}
IVF = "video/x-ivf"
CALLS: dict[str, Any] = {"calls": {"run_timeout_s": 14_400.0}, "face": {}}


def tone(seconds: float) -> bytes:
    """What a microphone of a call sends while somebody speaks."""
    step = 2 * math.pi * 440 / MICROPHONE_HZ
    count = round(seconds * MICROPHONE_HZ)
    return array("h", (round(8_000 * math.sin(step * at)) for at in range(count))).tobytes()


def silence(seconds: float) -> bytes:
    """What it sends while nobody does."""
    return bytes(2 * round(seconds * MICROPHONE_HZ))


@attrs.define(eq=False)
class Gateway(FakeEngine):
    """Answers offers, and plays: as fast as it comes, or up to a sample, until it is told to go on."""

    #: Ids of the peers that live, and what they were told.
    peers: dict[str, Sending] = attrs.field(factory=dict)
    commands: list[dict[str, Any]] = attrs.field(factory=list)
    #: Peer -> what was played on it, and the pictures.
    heard: dict[str, bytearray] = attrs.field(factory=dict)
    seen: dict[str, bytearray] = attrs.field(factory=dict)
    #: Those who listen to the only peer, in order, and what it said before.
    ears: list[Sending] = attrs.field(factory=list)
    unheard: bytes = b""
    #: What it shows while nobody speaks.
    idle: bytes = b""
    #: Sample of each speech at which it waits for `goes_on`.
    stops_at: int | None = None
    goes_on: trio.Event = attrs.field(factory=trio.Event)
    #: Fails players with this code once they are at that sample.
    fails_with: str | None = None

    async def run(self, out: Sending, fed: trio.MemoryReceiveChannel[Input]) -> None:
        """See `FakeEngine.run`."""
        out.send(Started, format=AudioFormat(sample_rate=MICROPHONE_HZ) if out.assign.params.get("listen") else None)
        if "offer" in out.assign.params:
            await self._talk(out, fed)
        elif out.assign.params.get("listen"):
            await self._listen(out, fed)
        else:
            await self._play(out, fed)

    async def _talk(self, out: Sending, fed: trio.MemoryReceiveChannel[Input]) -> None:
        offer = out.assign.params["offer"]
        if not offer.startswith("v=0\r\n"):
            out.send(Failed, code="invalid_params", message="the offer is no SDP; send what createOffer has made")
            return
        self.peers[out.assign.request_id] = out
        try:
            out.send(Output, data={"answer": f"answer {len(self.heard)} to {offer}"})
            self.heard[out.assign.request_id], self.seen[out.assign.request_id] = bytearray(), bytearray()
            out.send(Output, data={"state": "connected"})
            told = b""
            async for piece in fed:
                self._take(out, piece)
                if piece.name == "idle":
                    self.idle += piece.data
                    continue
                told += piece.data
                *lines, told = told.split(b"\n")
                self.commands += [json.loads(line) for line in lines if line]
                if {"hang_up": True} in self.commands:
                    out.send(Completed, result={})
                    return
        finally:
            del self.peers[out.assign.request_id]

    def _take(self, out: Sending, piece: Input) -> None:
        offset = piece.offset + len(piece.data)
        self.worker.send(
            InputAck(request_id=piece.request_id, attempt=out.assign.attempt, name=piece.name, offset=offset)
        )

    async def _listen(self, out: Sending, fed: trio.MemoryReceiveChannel[Input]) -> None:
        self.ears.append(out)
        try:
            pcm, self.unheard = self.unheard, b""
            self.speak(pcm)
            async for piece in fed:
                if piece.last:
                    break
            out.send(Completed, result={})
        finally:
            self.ears.remove(out)

    def speak(self, pcm: bytes, step: int = 3_200) -> None:
        """Say something into the microphone: 16 kHz, mono."""
        if not self.ears:
            self.unheard += pcm
            return
        for start in range(0, len(pcm), step):
            self.ears[-1].send(Audio, pcm=pcm[start : start + step])

    async def _play(self, out: Sending, fed: trio.MemoryReceiveChannel[Input]) -> None:
        peer, start, open_inputs = out.assign.params["peer"], out.assign.params.get("start", 0), set(out.assign.inputs)
        played, skip = start, 2 * start
        if peer not in self.peers:
            out.send(Failed, code="invalid_params", message="this call has ended; call again")
            return
        try:
            async for piece in fed:
                self._take(out, piece)
                if piece.name == "video":
                    self.seen[peer] += piece.data
                else:
                    skip, data = max(0, skip - len(piece.data)), piece.data[skip:]
                    most = len(data) if self.stops_at is None else 2 * self.stops_at - 2 * played
                    self.heard[peer] += data[:most]
                    played += len(data[:most]) // 2
                    out.send(Output, data={"played": played})
                    if self.stops_at is not None and len(data) >= most:
                        await self._stop(out)
                if piece.last:
                    open_inputs.remove(piece.name)
                if not open_inputs:
                    break
        except trio.Cancelled:  # the run can say no more, but the call can
            if peer in self.peers:  # hung up in the same moment otherwise
                stopped = {"play": out.assign.request_id, "played": played}
                self.peers[peer].send(Output, data={"stopped": stopped})
            raise
        else:
            out.send(Completed, result={})

    async def _stop(self, out: Sending) -> None:
        await self.goes_on.wait()

    def event(self, text: str) -> None:
        """Say something over the data channel of the only peer."""
        (out,) = self.peers.values()
        out.send(Output, data={"event": text})

    def hang_up(self) -> None:
        """Hang up all peers."""
        for out in self.peers.values():
            out.send(Completed, result={})

    @property
    def sent(self) -> list[str]:
        """What was sent over data channels."""
        return [command["send"] for command in self.commands if "send" in command]


@attrs.define(eq=False)
class Face(FakeEngine):
    """Shows a picture for each piece of speech; for times of silence, one."""

    fails: bool = False
    #: Waits for this before it shows anything.
    waits: trio.Event | None = None

    async def run(self, out: Sending, fed: trio.MemoryReceiveChannel[Input]) -> None:
        """See `FakeEngine.run`."""
        out.send(Started, format=None)
        if self.waits is not None:
            await self.waits.wait()
        if out.assign.params.get("idle"):
            out.send(Output, data=b"idle " + out.assign.params.get("avatar", "").encode(), media_type=IVF)
            out.send(Completed, result={})
            return
        async for piece in fed:
            out.send(Output, data=b"picture;", media_type=IVF)
            if self.fails:
                out.send(Failed, code="engine_failed", message="no more pictures")
                return
            if piece.last:
                break
        out.send(Completed, result={})


async def gateway(on: Stage, **more: Any) -> Gateway:
    """Connect a worker of the space `calls`."""
    inputs = {"commands": LIVE, "idle": LIVE, "audio": LIVE, "video": LIVE}
    told: dict[str, Any] = {"params": PEER, "format": None, "inputs": inputs, "slots": 10} | more
    made: Gateway = await on.engine("calls", Gateway, told)
    return made


async def face(on: Stage, **more: Any) -> Face:
    """Connect a worker of the space `face`."""
    told: dict[str, Any] = {"params": FACE, "format": None, "inputs": {"audio": LIVE}, "slots": 4}
    made: Face = await on.engine("face", partial(Face, **more), told)
    return made


async def called(on: Stage, key: str = "session-1", offer: str = OFFER, **more: Any) -> Call:
    """A call that was answered."""
    call = on.talks.place.calls.open(ANN, key, offer, **more)
    assert isinstance(call, Call), call
    with trio.fail_after(10):
        answer = await call.wait_answer()
    assert not isinstance(answer, Rejected), answer
    return call
