"""The target `sdp`: what a browser may offer to engine `webrtc`, and its candidates."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from gpuworker.engines.base import InvalidParams
from gpuworker.engines.webrtc.gateway import Gateway
from gpuworker.engines.webrtc.offer import BadOffer, read_offer
from gpuworker.engines.webrtc.peer import Settings

#: What Chromium 156 offers, with audio, video and a data channel.
OFFER = (Path(__file__).parents[1] / "support" / "chromium_offer.sdp").read_bytes()
#: A smaller one, in which a mutation is more likely to hit what matters.
SMALL = b"""v=0
o=- 1 2 IN IP4 127.0.0.1
s=-
t=0 0
a=group:BUNDLE 0 1 2
m=audio 9 UDP/TLS/RTP/SAVPF 111
c=IN IP4 0.0.0.0
a=candidate:1 1 udp 2113937151 127.0.0.1 9 typ host
a=end-of-candidates
a=ice-ufrag:75IR
a=ice-pwd:abcdefghijklmnopqrstuvwx
a=fingerprint:sha-256 24:3A:0C:BB:A9:96:81:00:45:A8:8A:5C:C5:11:04:37:4F:DD:59:0F:9C:E1:BB:8B:21:8C:4C:89:C3:CF:DD:FD
a=setup:actpass
a=mid:0
a=recvonly
a=rtcp-mux
a=rtpmap:111 opus/48000/2
a=fmtp:111 minptime=10;useinbandfec=1
a=ssrc:1 cname:x
a=ssrc-group:FID 1 2
m=video 9 UDP/TLS/RTP/SAVPF 96 97
a=ice-ufrag:75IR
a=ice-pwd:abcdefghijklmnopqrstuvwx
a=fingerprint:sha-256 24:3A:0C:BB:A9:96:81:00:45:A8:8A:5C:C5:11:04:37:4F:DD:59:0F:9C:E1:BB:8B:21:8C:4C:89:C3:CF:DD:FD
a=setup:actpass
a=mid:1
a=recvonly
a=rtcp-mux
a=extmap:2 http://www.webrtc.org/experiments/rtp-hdrext/abs-send-time
a=rtpmap:96 VP8/90000
a=rtcp-fb:96 goog-remb
a=rtcp-fb:96 nack pli
a=rtpmap:97 rtx/90000
a=fmtp:97 apt=96
m=application 9 UDP/DTLS/SCTP webrtc-datachannel
a=ice-ufrag:75IR
a=ice-pwd:abcdefghijklmnopqrstuvwx
a=fingerprint:sha-256 24:3A:0C:BB:A9:96:81:00:45:A8:8A:5C:C5:11:04:37:4F:DD:59:0F:9C:E1:BB:8B:21:8C:4C:89:C3:CF:DD:FD
a=setup:actpass
a=mid:2
a=sctp-port:5000
a=max-message-size:262144
""".replace(b"\n", b"\r\n")
CANDIDATES = (
    b"candidate:1 1 udp 2113937151 127.0.0.1 58730 typ host generation 0 network-cost 999",
    b"candidate:1 1 udp 1 7d1b-4e.local 58730 typ host",
    b"candidate:842163049 1 udp 1677729535 127.0.0.1 9 typ srflx raddr 0.0.0.0 rport 0 generation 0 ufrag x",
    b"candidate:1 1 tcp 1518280447 127.0.0.1 9 typ host tcptype active",
    b"candidate:...",
)
#: What was found.
FOUND = (
    SMALL.replace(b"BUNDLE 0 1 2", b"BUNDLE 7 0 1"),  # aiortc could not close what it had opened for this
    SMALL.replace(b"m=video 9 UDP/TLS/RTP/SAVPF 96 97\r\n", b""),  # nor for a media with two names
    SMALL.replace(b"127.0.0.1 9 typ host", b"7d1b-4e.local 9 typ host"),  # with the end of candidates: none is left
    SMALL.replace(b"typ host", b"typ 1 9 typ host"),
)
SEEDS = (*(OFFER, SMALL) * 4, *FOUND, *CANDIDATES, b"", b"v=0...", b"v=0\r\no=- ...", b"x" * 1000)
PATIENCE_S = 20.0


@contextlib.contextmanager
def a_gateway() -> Iterator[Callable[[bytes], None]]:
    """A gateway; the function offers it bytes, or a peer of its candidates, and raises unless each is answered."""
    gateway = Gateway(Settings(loopback=True, ports="20600-20699"), range(20_600, 20_700), ["127.0.0.1"])
    gateway.max_peers = 2
    gateway.open()
    try:
        peer = gateway.do(gateway.open_peer("first"))
        gateway.do(peer.answer(read_offer(SMALL.decode(), loopback=True)), PATIENCE_S)

        def run(data: bytes) -> None:
            text = data.decode("utf-8", "replace")
            if text.startswith("candidate"):
                with contextlib.suppress(ValueError):
                    gateway.do(peer.add_candidate({"candidate": text, "sdpMid": "0"}), PATIENCE_S)
                return
            try:
                offer = read_offer(text, loopback=True)
            except BadOffer:
                return
            other = gateway.do(gateway.open_peer("other"))
            try:
                answer = gateway.do(other.answer(offer), PATIENCE_S)
                assert answer.startswith("v=0")
                assert "a=candidate:" in answer
            except InvalidParams:
                pass
            finally:
                gateway.do(gateway.close_peer("other", other), PATIENCE_S)

        yield run
    finally:
        gateway.close()
