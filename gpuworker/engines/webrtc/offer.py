"""What a browser offers, and its candidates: read, checked and cleaned before aiortc sees them.

A stranger writes them. Names are dropped: a `.local` one would have this machine ask its network for it by mDNS. A
browser with such names alone is found by what it sends, so nothing is said to be the last candidate: aioice would give
up at once.
"""

import ipaddress
import re
from collections.abc import Iterator

import attrs

MAX_SDP_BYTES = 64 * 1024
#: Audio, video and a data channel. Each m-line would be a socket and a DTLS transport.
MAX_MEDIA = 3
#: Of one peer. A browser has a handful; each is probed from every address of this machine.
MAX_CANDIDATES = 32
TYPES = ("host", "srflx", "prflx", "relay")
KINDS = ("audio", "video", "application")
_NEEDED = {
    "a=ice-ufrag:": "no ICE user",
    "a=ice-pwd:": "no ICE password",
    "a=fingerprint:": "no DTLS fingerprint",
}


class BadOffer(ValueError):
    """An offer cannot be answered; the message says why."""


@attrs.frozen
class Offer:
    """An offer that may be answered.

    Args:
        sdp: without the candidates that are of no use.
        kinds: of its media, in their order.
        candidates: how many it still has.
    """

    sdp: str
    kinds: tuple[str, ...]
    candidates: int


def read_offer(sdp: str, *, loopback: bool = False) -> Offer:
    """Check and clean an offer.

    Args:
        sdp: of the browser's `RTCSessionDescription`.
        loopback: whether addresses of this machine itself may be called.

    Raises:
        BadOffer: it cannot be answered.
    """
    if len(sdp.encode("utf-8", "replace")) > MAX_SDP_BYTES:
        raise BadOffer(f"is longer than {MAX_SDP_BYTES} bytes")
    lines = [line for line in re.split(r"\r\n|\r|\n", sdp) if line]
    if not lines or lines[0] != "v=0":
        raise BadOffer("is no SDP: it does not begin with v=0; send pc.localDescription.sdp")
    kinds = tuple(line[2:].split(" ", 1)[0] for line in lines if line.startswith("m="))
    if len(kinds) > MAX_MEDIA:
        raise BadOffer(f"has {len(kinds)} media; offer one audio, one video and one data channel at most")
    if odd := sorted(set(kinds) - set(KINDS)):
        raise BadOffer(f"has media {odd[0][:32]!r}; offer audio, video and a data channel")
    if len(set(kinds)) != len(kinds):
        raise BadOffer("has two media of one kind; offer one audio, one video and one data channel at most")
    if not _receives_audio(lines):
        raise BadOffer("does not receive audio; add a transceiver for audio, recvonly or sendrecv")
    if not set(_bundled(lines)) <= set(_mids(lines)):
        raise BadOffer("bundles media that it does not have; send the whole SDP of a browser's offer")
    for start, lack in _NEEDED.items():
        if not any(line.startswith(start) for line in lines):
            raise BadOffer(f"has {lack}; send the whole SDP of a browser's offer")
    kept = list(_without_useless_candidates(lines, loopback))
    count = sum(line.startswith("a=candidate:") for line in kept)
    return Offer("\r\n".join(kept) + "\r\n", kinds, count)


def _bundled(lines: list[str]) -> list[str]:
    """The names of the media that share one transport."""
    return [mid for line in lines if line.startswith("a=group:BUNDLE") for mid in line[14:].split()]


def _mids(lines: list[str]) -> list[str]:
    """The names of the media; the last one counts where one has several."""
    mids: list[str] = []
    for line in lines:
        if line.startswith("m="):
            mids.append("")
        elif line.startswith("a=mid:") and mids:
            mids[-1] = line[6:]
    return mids


def _receives_audio(lines: list[str]) -> bool:
    """Whether the audio's direction lets the browser receive; sendrecv if the SDP does not say."""
    kind, direction = "", "sendrecv"
    for line in lines:
        if line.startswith("m="):
            if kind == "audio":
                break
            kind = line[2:].split(" ", 1)[0]
        elif line in ("a=sendonly", "a=inactive", "a=recvonly", "a=sendrecv") and kind in ("", "audio"):
            direction = line[2:]
    return kind == "audio" and direction in ("recvonly", "sendrecv")


def _without_useless_candidates(lines: list[str], loopback: bool) -> Iterator[str]:
    left = MAX_CANDIDATES
    for line in lines:
        if line.startswith("a=candidate:"):
            if left == 0 or not is_useful(line[2:], loopback=loopback):
                continue
            left -= 1
        if line != "a=end-of-candidates":
            yield line


def is_useful(candidate: str, *, loopback: bool = False) -> bool:
    """Whether a candidate (`candidate:…`) is UDP to an address that may be called; names and all else are not."""
    fields = candidate.removeprefix("candidate:").split()
    if len(fields) < 8 or fields[2].lower() != "udp" or fields[6] != "typ" or fields[7] not in TYPES:
        return False
    if not all(field.isascii() and field.isdigit() and len(field) < 12 for field in (fields[1], fields[3], fields[5])):
        return False
    try:
        address = ipaddress.ip_address(fields[4])
    except ValueError:
        return False
    if address.is_multicast or address.is_unspecified or (address.is_loopback and not loopback):
        return False
    return "%" not in fields[4] and 0 < int(fields[5]) < 65_536
