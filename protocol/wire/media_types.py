"""Media types, as HTTP has them (RFC 9110 section 8.3.1): their rule, whether a list accepts one, and first bytes."""

import mimetypes
import re
from collections.abc import Iterable

from protocol.wire.validators import Rule, text

MAX_MEDIA_TYPE_CHARS = 128
#: Of bytes about which nothing is known.
BINARY = "application/octet-stream"
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
MEDIA_TYPE_PATTERN = re.compile(rf'{_TOKEN}/{_TOKEN}(?: ?; ?{_TOKEN}=(?:{_TOKEN}|"[ !#-\[\]-~]*"))*')

media_type_rule: Rule = text(MAX_MEDIA_TYPE_CHARS, MEDIA_TYPE_PATTERN, "a media type such as image/png")

#: The beginnings of files that say what they are.
_STARTS = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
    b"\0\0\0\x0cJXL \r\n\x87\n": "image/jxl",
    b"<svg": "image/svg+xml",
    b"fLaC": "audio/flac",
    b"ID3": "audio/mpeg",
    b"MThd": "audio/midi",
    b"#!AMR": "audio/amr",
    b"caff": "audio/x-caf",
    b"\0\0\x01\xba": "video/mpeg",
    b"%PDF-": "application/pdf",
    b"PK\x03\x04": "application/zip",
    b"\x1f\x8b\x08": "application/gzip",
    b"glTF": "model/gltf-binary",
    b"DKIF": "video/x-ivf",
}
#: Containers: their first bytes, and the kind that bytes 8 to 12 name.
_CHUNKED = {
    (b"RIFF", b"WAVE"): "audio/wav",
    (b"RF64", b"WAVE"): "audio/wav",
    (b"RIFF", b"WEBP"): "image/webp",
    (b"RIFF", b"AVI "): "video/x-msvideo",
    (b"FORM", b"AIFF"): "audio/aiff",
    (b"FORM", b"AIFC"): "audio/aiff",
}
#: Major brands of ISO base media files; all others are video/mp4.
_BRANDS = {
    b"avif": "image/avif",
    b"avis": "image/avif",
    b"heic": "image/heic",
    b"heix": "image/heic",
    b"mif1": "image/heif",
    b"M4A ": "audio/mp4",
    b"M4B ": "audio/mp4",
    b"qt  ": "video/quicktime",
    b"3gp4": "video/3gpp",
    b"3gp5": "video/3gpp",
}
#: Where Python's table has another name for it, or none.
_SUFFIXES = {
    "application/octet-stream": ".bin",
    "audio/aac": ".aac",
    "audio/aiff": ".aiff",
    "audio/flac": ".flac",
    "audio/mp4": ".m4a",
    "audio/mpeg": ".mp3",
    "audio/ogg": ".ogg",
    "audio/wav": ".wav",
    "audio/webm": ".webm",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "text/plain": ".txt",
    "video/x-ivf": ".ivf",
    "video/x-matroska": ".mkv",
}


def essence(media_type: str) -> str:
    """The media type without its parameters, in lower case."""
    return media_type.partition(";")[0].strip().lower()


def accepts(accepted: Iterable[str], media_type: str) -> bool:
    """Whether a list of media types, perhaps with `image/*`, accepts one; an empty list accepts any."""
    kinds = [essence(kind) for kind in accepted]
    given = essence(media_type)
    return not kinds or bool({given, f"{given.partition('/')[0]}/*", "*/*"} & set(kinds))


def recognize(data: bytes) -> str | None:
    """The media type of a file, by its first bytes; None if they say nothing."""
    for start, media_type in _STARTS.items():
        if data.startswith(start):
            return media_type
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "video/mp4")
    if data[:4] == b"\x1a\x45\xdf\xa3":  # EBML; its document type comes within the first bytes
        return "video/webm" if b"webm" in data[:64] else "video/x-matroska"
    if data[:4] == b"OggS":
        return "video/ogg" if b"theora" in data[:64] else "audio/ogg"
    if data[:2] == b"BM" and int.from_bytes(data[2:6], "little") == len(data):
        return "image/bmp"
    if data[:5] == b"<?xml" and b"<svg" in data[:1024]:
        return "image/svg+xml"
    if len(data) > 2 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0:  # ADTS: layer 0, which MPEG audio never has
        return "audio/aac"
    if len(data) > 2 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2 and data[2] & 0xF0 not in (0, 0xF0):  # layer III
        return "audio/mpeg"
    return _CHUNKED.get((data[:4], data[8:12]))


def suffix_of(media_type: str) -> str:
    """The suffix of a file of this type, with its dot; `.bin` if none is known."""
    kind = essence(media_type)
    return _SUFFIXES.get(kind) or mimetypes.guess_extension(kind, strict=False) or ".bin"
