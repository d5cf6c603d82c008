"""What a stranger offers is read before aiortc sees it: bounded, without names, and refused in words."""

import pytest

from gpuworker.engines.webrtc.offer import MAX_CANDIDATES, MAX_MEDIA, MAX_SDP_BYTES, BadOffer, is_useful, read_offer

HEAD = "v=0\r\no=- 1 2 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0\r\n"
TRANSPORT = "a=ice-ufrag:abcd\r\na=ice-pwd:abcdefghijklmnopqrstuv\r\na=fingerprint:sha-256 00:11\r\na=setup:actpass\r\n"
AUDIO = "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\na=recvonly\r\n" + TRANSPORT
HOST = "a=candidate:1 1 udp 2122260223 192.168.1.5 54321 typ host generation 0"
LOCAL = "a=candidate:2 1 udp 2122260223 7d1b-4e.local 54322 typ host"


def test_an_offer_is_passed_on_with_its_kinds_in_order() -> None:
    offer = read_offer(HEAD + AUDIO + HOST + "\r\nm=video 9 UDP/TLS/RTP/SAVPF 96\r\na=mid:1\r\n")
    assert offer.kinds == ("audio", "video")
    assert offer.candidates == 1
    assert HOST in offer.sdp


def test_local_names_are_dropped_so_that_no_stranger_chooses_what_is_looked_up() -> None:
    offer = read_offer(HEAD + AUDIO + LOCAL + "\r\n" + HOST + "\r\n")
    assert ".local" not in offer.sdp
    assert offer.candidates == 1


def test_no_offer_says_that_it_has_no_further_candidates() -> None:
    assert "a=end-of-candidates" not in read_offer(HEAD + AUDIO + LOCAL + "\r\na=end-of-candidates\r\n").sdp


@pytest.mark.parametrize("mids", ["0 1", "1", "0 0 x"])
def test_a_bundle_of_media_that_are_not_there_is_refused(mids: str) -> None:
    with pytest.raises(BadOffer, match="bundles media that it does not have"):
        read_offer(HEAD.replace("BUNDLE 0", f"BUNDLE {mids}") + AUDIO)


def test_media_with_two_names_have_the_last_one() -> None:
    with pytest.raises(BadOffer, match="bundles media that it does not have"):
        read_offer(HEAD + AUDIO + "a=mid:1\r\n")


def test_an_offer_has_at_most_three_media_and_64_kib() -> None:
    with pytest.raises(BadOffer, match="4 media"):
        read_offer(HEAD + AUDIO + "m=video 9 X 96\r\n" * MAX_MEDIA)
    with pytest.raises(BadOffer, match="longer than 65536 bytes"):
        read_offer(HEAD + AUDIO + "a=x:" + "x" * MAX_SDP_BYTES)
    with pytest.raises(BadOffer, match="two media of one kind"):
        read_offer(HEAD + AUDIO + AUDIO)
    with pytest.raises(BadOffer, match="media 'text'"):
        read_offer(HEAD + AUDIO + "m=text 9 X 96\r\n")


@pytest.mark.parametrize(
    ("sdp", "words"),
    [
        ("", "is no SDP"),
        ("x" * 100, "is no SDP"),
        ("v=0", "does not receive audio"),
        (HEAD + AUDIO.replace("recvonly", "sendonly"), "does not receive audio"),
        (HEAD + AUDIO.replace("recvonly", "inactive"), "does not receive audio"),
        (HEAD + AUDIO.replace("m=audio", "m=video"), "does not receive audio"),
        (HEAD + AUDIO.replace("a=ice-pwd", "a=other"), "no ICE password"),
        (HEAD + AUDIO.replace("a=fingerprint", "a=other"), "no DTLS fingerprint"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_words(sdp: str, words: str) -> None:
    with pytest.raises(BadOffer, match=words):
        read_offer(sdp)


def test_a_direction_may_stand_before_the_media_and_sendrecv_is_the_default() -> None:
    assert read_offer(HEAD + AUDIO.replace("a=recvonly\r\n", "")).kinds == ("audio",)
    with pytest.raises(BadOffer, match="does not receive audio"):
        read_offer(HEAD + "a=sendonly\r\n" + AUDIO.replace("a=recvonly\r\n", ""))


def test_more_candidates_than_a_browser_has_are_dropped() -> None:
    many = "".join(f"a=candidate:1 1 udp 1 10.0.0.{n} 9 typ host\r\n" for n in range(200))
    offer = read_offer(HEAD + AUDIO + many)
    assert offer.candidates == offer.sdp.count("a=candidate:") == MAX_CANDIDATES


@pytest.mark.parametrize(
    "candidate",
    [
        "",
        "candidate:...",
        "candidate:1 1 tcp 1 192.168.1.5 9 typ host",
        "candidate:1 1 udp 1 example.com 9 typ host",
        "candidate:1 1 udp 1 224.0.0.251 5353 typ host",
        "candidate:1 1 udp 1 0.0.0.0 9 typ host",
        "candidate:1 1 udp 1 127.0.0.1 9 typ host",
        "candidate:1 1 udp 1 192.168.1.5 0 typ host",
        "candidate:1 1 udp 1 192.168.1.5 65536 typ host",
        "candidate:1 1 udp 1 192.168.1.5 ٣ typ host",
        "candidate:1 1 udp 1 fe80::1%eth0 9 typ host",
    ],
)
def test_a_candidate_that_is_no_udp_address_to_call_is_of_no_use(candidate: str) -> None:
    assert not is_useful(candidate)


def test_this_machine_may_be_called_only_if_it_offers_itself() -> None:
    candidate = "candidate:1 1 udp 1 127.0.0.1 9 typ host"
    assert is_useful(candidate, loopback=True)
    assert not is_useful(candidate)


def test_only_the_audios_own_direction_counts() -> None:
    video = "m=video 9 UDP/TLS/RTP/SAVPF 96\r\na=sendonly\r\n"
    assert read_offer(HEAD + video + AUDIO).kinds == ("video", "audio")
    assert read_offer(HEAD + AUDIO + video).kinds == ("audio", "video")
    with pytest.raises(BadOffer, match="does not receive audio"):
        read_offer(HEAD + AUDIO.replace("recvonly", "sendonly") + video.replace("sendonly", "recvonly"))


def test_three_media_of_three_kinds_are_taken() -> None:
    more = "m=video 9 UDP/TLS/RTP/SAVPF 96\r\nm=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n"
    assert read_offer(HEAD + AUDIO + more).kinds == ("audio", "video", "application")
