"""What aiortc needs from us: each point with a caller that is aiortc's own client."""

import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import aioice.ice
import aioice.mdns
import pytest
from aiortc.rtp import RTCP_PSFB_APP, RTCP_PSFB_PLI, RtcpPsfbPacket, pack_remb_fci

from gpuworker.engines.base import EngineInput
from gpuworker.engines.webrtc import peer as peers
from gpuworker.engines.webrtc.gateway import Gateway
from protocol.wire.ivf import ivf_header, ivf_picture
from protocol.wire.structs import VideoFormat
from tests.gpuworker.engines.webrtc.seats import PORTS, live, the_seats, wait
from tests.support.caller import Caller, an_ivf
from tests.support.calls import BLUE, L16, RED, TUNE

IDLE = EngineInput(an_ivf(BLUE, 100, keys=1000), "video/x-ivf")


def candidates(answer: str) -> list[list[str]]:
    return [line.split() for line in answer.splitlines() if line.startswith("a=candidate:")]


def line(command: dict[str, Any]) -> bytes:
    return json.dumps(command).encode() + b"\n"


def test_no_public_stun_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> None:
        raise AssertionError("a STUN server was asked")

    monkeypatch.setattr(aioice.ice, "server_reflexive_candidate", ask)
    with the_seats() as seats, Caller() as caller:
        run = seats.run({"offer": caller.offer()})
        assert {fields[7] for fields in candidates(run.until("answer"))} == {"host"}


def test_the_owners_stun_server_is_asked(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)
        path = tmp_path / "ice.json"
        path.write_text(json.dumps([{"urls": f"stun:127.0.0.1:{server.getsockname()[1]}"}]))
        with the_seats(ice_servers_file=str(path)) as seats, Caller() as caller:
            seats.run({"offer": caller.offer()})
            data, _ = server.recvfrom(2048)
    assert data[:2] == b"\0\1", "a binding request"


def test_calls_take_ports_of_the_range_and_are_refused_when_none_is_left() -> None:
    first, last = map(int, PORTS.split("-"))
    with the_seats() as seats, Caller() as caller:
        run = seats.run({"offer": caller.offer()})
        assert all(first <= int(fields[5]) <= last for fields in candidates(run.until("answer")))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with the_seats(ports=f"{port}-{port}") as seats, Caller() as caller, Caller() as other:
        held = seats.run({"offer": caller.offer()}, "held")
        held.until("answer")
        offer = other.offer()
        end = seats.run({"offer": offer}, "refused").ended()
        assert end.message.startswith(f"no UDP port is left for a call ({port}-{port})")
        assert end.retryable
        held.cancel()
        held.ended()
        seats.run({"offer": offer}, "after").until("answer")


def test_the_public_ip_stands_in_the_answer() -> None:
    with the_seats(public_ip="203.0.113.7") as seats, Caller() as caller:
        answer = seats.run({"offer": caller.offer()}).until("answer")
        assert {fields[4] for fields in candidates(answer)} == {"203.0.113.7"}
        assert "127.0.0.1" not in answer


def test_local_names_are_never_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up() -> None:
        raise AssertionError("a name was looked up")

    monkeypatch.setattr(aioice.mdns, "create_mdns_protocol", look_up)
    local = "candidate:2 1 udp 2122260223 7d1b-4e.local 54322 typ host"
    with the_seats() as seats, Caller() as caller:
        commands = live()
        offer = re.sub("a=candidate:.*", f"a={local}", caller.offer())
        assert "a=end-of-candidates" in offer, "the browser has no other ones, and says so"
        run = seats.run({"offer": offer}, commands=commands)
        caller.accept(run.until("answer"))
        for candidate in ({"candidate": local, "sdpMid": "0", "sdpMLineIndex": 0}, {"candidate": ""}, None):
            commands.feed(line({"candidate": candidate}))
        run.until("state", "connected")
        assert not run.told("error")


def test_a_picture_loss_is_answered_with_the_next_key_frame() -> None:
    with the_seats() as seats, Caller() as caller:
        run = seats.call(caller, idle=IDLE)
        wait(lambda: len(caller.seen) > 30)
        assert caller.seen[0].top < caller.seen[-1].top, "one sequence, that begins once in 4 s"
        caller.report(lambda own, other: RtcpPsfbPacket(fmt=RTCP_PSFB_PLI, ssrc=own, media_ssrc=other))
        wait(lambda: caller.seen[-1].top < caller.seen[-2].top)
        assert max(seen.top for seen in caller.seen) < 150, "long before its end, it began anew"
        run.cancel()


def test_a_path_that_cannot_carry_the_video_gets_key_frames_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "STATS_S", 0.2)
    with the_seats() as seats, Caller() as caller:
        run = seats.call(caller, idle=EngineInput(an_ivf(BLUE, 50, size=320), "video/x-ivf"))
        wait(lambda: any(each["video_bits_s"] > 10_000 for each in run.told("stats")), run)

        def remb(own: int, other: int) -> RtcpPsfbPacket:
            return RtcpPsfbPacket(fmt=RTCP_PSFB_APP, ssrc=own, media_ssrc=0, fci=pack_remb_fci(5_000, [other]))

        caller.report(remb)
        told = wait(lambda: [each for each in run.told("stats") if each["key_frames_only"]], run)[0]
        assert told["remb_bits_s"] == pytest.approx(5_000, rel=0.01)
        assert wait(lambda: run.told("stats")[-1]["left_out"] > 10, run)


def test_the_answer_is_whole_and_a_new_offer_is_a_new_peer() -> None:
    with the_seats() as seats, Caller() as caller, Caller() as again:
        commands = live()
        run = seats.call(caller, "first", commands=commands)
        assert run.until("answer").count("a=end-of-candidates") == 2, "of both media: nothing trickles in later"
        commands.feed(line({"offer": "v=0"}))
        assert "a command is one line of JSON" in run.until("error")
        seats.call(again, "second")
        run.cancel()
        assert run.ended().outcome == "cancelled"


def test_a_caller_that_is_lost_is_told_and_hung_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "LOST_S", 3.0)
    monkeypatch.setattr(peers, "GONE_S", 5.0)
    with the_seats() as seats, Caller() as caller:
        run = seats.call(caller)
        with caller.frozen():
            run.until("state", "lost")
            assert run.ended().outcome == "completed"
        assert run.told("state") == ["connecting", "connected", "lost", "closed"]


def test_a_caller_that_comes_back_is_connected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "LOST_S", 3.0)
    with the_seats() as seats, Caller() as caller:
        run = seats.call(caller)
        with caller.frozen():
            run.until("state", "lost")
        wait(lambda: run.told("state") == ["connecting", "connected", "lost", "connected"], run)


def test_a_caller_that_hangs_up_ends_its_call() -> None:
    with the_seats() as seats, Caller() as caller:
        run = seats.call(caller)
        play = seats.run({"peer": "call"}, audio=live(L16))
        caller.hang_up()
        assert run.ended().outcome == "completed"
        assert run.told("state")[-1] == "closed"
        end = play.ended()
        assert "call again" in end.message
        assert not end.retryable


def test_nobody_who_answers_is_an_end_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "CONNECT_S", 0.5)
    with the_seats() as seats, Caller() as caller:
        end = seats.run({"offer": caller.offer()}).ended()
        assert "no connection within 0.5 s" in end.message


def test_data_channels_fit_into_the_smallest_mtu() -> None:
    with the_seats() as seats, Caller(channel="any") as caller:
        commands = live()
        run = seats.call(caller, commands=commands)
        caller.say("hello")
        assert run.until("event") == "hello"
        commands.feed(line({"send": "x" * 50_000}))
        wait(lambda: caller.said == ["x" * 50_000], run)
        assert 1_100 < max(caller.datagrams) <= 1_280 - 48, "IPv6's least MTU, without its head and UDP's"


def test_what_is_sent_before_the_data_channel_opens_is_kept() -> None:
    with the_seats() as seats, Caller(channel="oai-events") as caller:
        commands = live()
        commands.feed(line({"send": "early"}))
        run = seats.call(caller, commands=commands)
        wait(lambda: caller.said == ["early"], run)


def test_both_tracks_are_of_one_stream() -> None:
    with the_seats() as seats, Caller() as caller:
        answer = seats.run({"offer": caller.offer()}).until("answer")
        streams = re.findall(r"a=msid:(\S+) ", answer)
        assert len(streams) == 2
        assert len(set(streams)) == 1


def test_only_opus_and_vp8_are_agreed_on() -> None:
    with the_seats() as seats, Caller() as caller:
        answer = seats.run({"offer": caller.offer()}).until("answer")
        assert {name.lower() for name in re.findall(r"a=rtpmap:\d+ (\w+)", answer)} <= {"opus", "vp8", "rtx"}


def test_an_offer_without_vp8_is_refused_in_words() -> None:
    with the_seats() as seats, Caller() as caller:
        end = seats.run({"offer": caller.offer().replace("VP8", "AV9")}).ended()
        assert end.code == "invalid_params"
        assert end.message.startswith("offer cannot be answered")
        assert seats.run({"offer": "v=0..."}).ended().message.startswith("offer is no SDP")


def test_no_more_than_half_of_the_seats_are_calls() -> None:
    with the_seats(4) as seats, Caller() as caller, Caller() as second, Caller() as third:
        seats.run({"offer": caller.offer()}, "1").until("answer")
        seats.run({"offer": second.offer()}, "2").until("answer")
        end = seats.run({"offer": third.offer()}, "3").ended()
        assert "all 2 calls of this worker are taken" in end.message
        assert end.retryable


def test_plays_are_heard_one_after_another() -> None:
    with the_seats() as seats, Caller() as caller:
        seats.call(caller, idle=IDLE)
        half = len(TUNE) // 2
        first = seats.run({"peer": "call"}, "a", audio=EngineInput(TUNE[:half], L16))
        wait(lambda: first.told("played"), first)
        second = seats.run({"peer": "call"}, "b", audio=EngineInput(TUNE[half:], L16))
        assert first.ended().outcome == second.ended().outcome == "completed"
        assert first.told("played")[-1] + second.told("played")[-1] == len(TUNE) // 2
        wait(lambda: caller.hears(TUNE, 24_000, 0.6))


def test_a_play_may_begin_in_the_middle_of_its_sound() -> None:
    with the_seats() as seats, Caller() as caller:
        seats.call(caller, idle=IDLE)
        samples = len(TUNE) // 2
        play = seats.run({"peer": "call", "start": samples - 2_400}, "a", audio=EngineInput(TUNE, L16))
        began = time.monotonic()
        assert play.ended().outcome == "completed"
        assert play.told("played")[-1] == samples
        assert min(play.told("played")) >= samples - 2_400
        assert time.monotonic() - began < samples / 24_000


def test_a_cancelled_play_is_silent_within_two_packets() -> None:
    with the_seats() as seats, Caller() as caller:
        call = seats.call(caller, idle=IDLE)
        video = EngineInput(an_ivf(RED, 50), "video/x-ivf")
        play = seats.run({"peer": "call"}, "play", audio=EngineInput(TUNE, L16), video=video)
        wait(lambda: len(play.told("played")) > 1, play)
        play.cancel()
        assert play.ended().outcome == "cancelled"
        stopped = call.until("stopped")
        assert stopped["play"] == "play"
        assert 0 <= stopped["played"] - play.told("played")[-1] < 24_000
        packets = len(caller.heard)
        wait(lambda: len(caller.heard) > packets + 50)
        assert caller.loudness(caller.heard[packets + 25][0]) < 0.01


def test_a_play_of_no_call_is_told_to_call_again() -> None:
    with the_seats() as seats:
        end = seats.run({"peer": "nobody"}, audio=live(L16)).ended()
        assert "call again" in end.message
        assert not end.retryable


def test_a_peer_that_says_more_than_is_taken_is_hung_up() -> None:
    gateway = Gateway(peers.Settings(), range(20_500, 20_501), ["127.0.0.1"])
    gateway.open()
    try:
        peer = gateway.do(gateway.open_peer("call"))
        for _ in range(peers.MAX_EVENTS + 1_000):
            gateway.soon(peer.emit, {"event": "more"})
        gateway.do(gateway.close_peer("call", peer))
        told = [peer.events.get() for _ in range(peer.events.qsize())]
    finally:
        gateway.close()
    assert len(told) == peers.MAX_EVENTS + 3
    assert told[-2] == {"state": "closed"}
    assert "says more than the relay takes" in str(told[-1])


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        ([b"\1late", b"\0key"], "does not begin with a key frame"),
        ([b"\0key"] * 2, "after one at 0"),
        ([b"\0key", b"\0key", b"\0key"], "after one at 0"),
    ],
)
def test_an_idle_loop_that_cannot_go_round_is_refused_in_words(pictures: list[bytes], words: str) -> None:
    video = ivf_header(VideoFormat(width=16, height=16, fps=25))
    step = 3_600 if words.startswith("does") else 0
    video += b"".join(ivf_picture(data, number * step) for number, data in enumerate(pictures))
    with the_seats() as seats, Caller() as caller:
        run = seats.run({"offer": caller.offer()}, idle=EngineInput(video, "video/x-ivf"))
        assert words in run.ended().message


def test_an_idle_loop_of_one_picture_is_a_picture() -> None:
    with the_seats() as seats, Caller() as caller:
        seats.call(caller, idle=EngineInput(an_ivf(BLUE, 1), "video/x-ivf"))
        wait(lambda: len(caller.seen) > 1)


def test_nobody_plays_on_the_call_of_another_principal() -> None:
    with the_seats() as seats, Caller() as caller:
        seats.call(caller)
        assert "there is no such call" in seats.run({"peer": "call"}, "play", "bert", audio=live(L16)).ended().message


@pytest.mark.parametrize(
    ("media_type", "data", "words"),
    [
        ("audio/L16", TUNE, "give its rate"),
        ("audio/L16;rate=1;channels=1", TUNE, "give its rate"),
        ("audio/L16;rate=24000;channels=9", TUNE, "give its rate"),
    ],
)
def test_sound_without_a_rate_is_refused_in_words(media_type: str, data: bytes, words: str) -> None:
    with the_seats() as seats, Caller() as caller:
        seats.call(caller)
        assert words in seats.run({"peer": "call"}, audio=EngineInput(data, media_type)).ended().message


def test_video_that_is_none_ends_its_play_and_not_the_call() -> None:
    with the_seats() as seats, Caller() as caller:
        call = seats.call(caller)
        play = seats.run({"peer": "call"}, audio=live(L16), video=EngineInput(b"x" * 100, "video/x-ivf"))
        assert "send video/x-ivf with VP8" in play.ended().message
        assert call.end is None


def test_inputs_of_the_other_kind_are_refused() -> None:
    with the_seats() as seats, Caller() as caller:
        assert "does not belong here" in seats.run({"offer": caller.offer()}, audio=live(L16)).ended().message
        assert "does not belong here" in seats.run({"peer": "x"}, idle=IDLE).ended().message
        assert "needs the input audio" in seats.run({"peer": "x"}).ended().message


def test_the_microphone_is_passed_on_at_16_khz_if_asked_for() -> None:
    with the_seats() as seats, Caller(microphone=True) as caller:
        run = seats.run({"offer": caller.offer(), "listen": True}, "call")
        caller.accept(run.until("answer"))
        wait(lambda: len(run.pcm) > 32_000 and max(run.pcm[1::2]) > 10, run)


def test_the_microphone_is_not_listened_to_unless_asked_for() -> None:
    with the_seats() as seats, Caller(microphone=True) as caller:
        run = seats.call(caller)
        assert "a=sendonly" in run.until("answer")
        assert run.pcm == b""
        assert "begin it with the param microphone" in seats.run({"peer": "call", "listen": True}).ended().message


def test_who_listens_after_another_misses_nothing_of_the_microphone() -> None:
    with the_seats() as seats, Caller(microphone=True) as caller:
        call = seats.run({"offer": caller.offer(), "microphone": True}, "call")
        caller.accept(call.until("answer"))
        commands = live()
        first = seats.run({"peer": "call", "listen": True}, commands=commands)
        wait(lambda: len(first.pcm) > 16_000, first)
        commands.feed(b"", last=True)
        assert first.ended().outcome == "completed"
        second = seats.run({"peer": "call", "listen": True})
        wait(lambda: len(second.pcm) > 16_000, second)
        assert "takes commands" in seats.run({"peer": "call", "listen": True}, idle=IDLE).ended().message
        assert "no such call" in seats.run({"peer": "call", "listen": True}, who="bob").ended().message
        caller.hang_up()
        assert second.ended().outcome == "completed"
        assert call.pcm == b""


@pytest.mark.parametrize(
    "said", [b"nonsense\n", b"[]\n", b'{"candidate": 5}\n', b'{"candidate": {}}\n', b"{" * 70_000 + b"\n"]
)
def test_a_bad_command_is_answered_in_words_and_the_call_goes_on(said: bytes) -> None:
    with the_seats() as seats, Caller() as caller:
        commands = live()
        call = seats.call(caller, commands=commands)
        commands.feed(said)
        assert call.until("error")
        commands.feed(line({"hang_up": True}))
        assert call.ended().outcome == "completed"
