"""The rules of single settings: what a value may be, and what is said of one that may not. Pure."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import attrs

from protocol.wire.messages import SPACE_PATTERN
from protocol.wire.validators import FieldError, Rule, Value, integer, kind_of, number, text

Fields = list["attrs.Attribute[Any]"]


def split_listen(listen: str) -> tuple[str, int]:
    """Split `HOST:PORT` into host and port; an IPv6 host must be in brackets.

    Raises:
        ValueError: `listen` is not valid; the message gives the right form.
    """
    host, colon, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{listen!r}: put an IPv6 address in brackets, as in [::1]:8765")
    if not colon or not host or not re.fullmatch(r"[0-9]{1,5}", port):
        raise ValueError(f"{listen!r} is not HOST:PORT; 0.0.0.0:8765 listens on every IPv4 address of the machine")
    if int(port) > 65_535:
        raise ValueError(f"port {port} is over 65535")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(value: Value) -> None:
    """Check `HOST:PORT`, or ""; raises `ValueError`."""
    text(255)(value)
    if value:
        split_listen(value)


#: As browsers write it in `Origin` (RFC 6454 section 6.2); they write names in ASCII.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s:/?#@\\\[\]]+)(?::([1-9][0-9]{0,4}))?", re.IGNORECASE)


def origin(value: Value) -> None:
    """Check the origin of a page, or `*`; raises `ValueError`."""
    text(255)(value)
    if value == "*":
        return
    if "*" in value:
        raise ValueError(f'{value!r}: an origin may have no wildcard; list each one, or write "*" for all')
    if value == "null":
        raise ValueError("'null' cannot be listed: every page without an origin sends it; only \"*\" lets them in")
    match = _ORIGIN.fullmatch(value)
    if match is None or not value.isascii():
        raise ValueError(
            f"{value!r} is not an origin like https://example.org or http://[::1]:3000 (scheme, host in ASCII, and "
            "port if it is not the default; no path, no trailing slash)"
        )
    host, port = match[1].lower(), match[2]
    if host[0] == "[" and (address := ipaddress.ip_address(host[1:-1])).compressed != host[1:-1]:
        raise ValueError(f"{value!r}: browsers write this address as [{address.compressed}]")
    if port is not None and int(port) > 65_535:
        raise ValueError(f"{value!r}: port {port} is over 65535")


_TURN = re.compile(r"turns?:[^\s/?#@]+(\?transport=(udp|tcp))?")
_STUN = re.compile(r"stuns?:[^\s/?#@]+")
_HEADER = re.compile(r"[A-Za-z0-9-]{0,64}")


def turn_url(value: Value) -> None:
    """Check the URL of a TURN server (RFC 7065); raises `ValueError`."""
    text(255, _TURN, "a URL like turn:turn.example.org:3478 or turns:turn.example.org:443?transport=tcp")(value)


def stun_url(value: Value) -> None:
    """Check the URL of a STUN server (RFC 7064); raises `ValueError`."""
    text(255, _STUN, "a URL like stun:stun.example.org:3478")(value)


def network(value: Value) -> None:
    """Check an address or a network; raises `ValueError`."""
    text(64)(value)
    try:
        ipaddress.ip_network(value)
    except ValueError as fault:
        raise ValueError(f"{fault}; write an address or a network, as in 10.1.2.3 or 10.1.0.0/16") from None


def file_mode(value: Value) -> None:
    """Check the mode of a file; raises `ValueError`."""
    integer(0)(value)
    if value > 0o777:
        raise ValueError(f"is {value}; write a file mode in octal, as in 0o660")


def path(value: Value) -> None:
    """Check a path; raises `ValueError`."""
    if isinstance(value, Path):
        return
    text(4096)(value)
    if not value or "\0" in value:
        raise ValueError("must not be empty")


def space_name(value: Value) -> None:
    """Check a space name; raises `ValueError`."""
    text(64, SPACE_PATTERN, "a space name (a letter or digit, then up to 63 letters, digits and . _ -)")(value)


def models(value: Value) -> None:
    """Check a table of models and their spaces; raises `ValueError`."""
    _each_in_table(value, space_name)


def voices(value: Value) -> None:
    """Check a table of voices, or one for each space; raises `ValueError`."""
    _each_in_table(value, _voice)


def _voice(value: Value) -> None:
    if isinstance(value, dict):  # by the name of a space: its own
        _each_in_table(value, _voice_name)
    else:
        _voice_name(value)


def _each_in_table(value: Value, rule: Rule) -> None:
    if not isinstance(value, dict):
        raise ValueError(f'must be a table of names, as in {{"tts-1" = "tts", "*" = "tts"}}, not {kind_of(value)}')
    for key, inner in value.items():
        try:
            rule(inner)
        except ValueError as fault:
            raise ValueError(f"{key!r}: {fault}") from None


def _voice_name(value: Value) -> None:
    text(256)(value)
    if not value:
        raise ValueError("must not be empty")


def pattern(value: Value) -> None:
    """Check a regular expression; raises `ValueError`."""
    text(256)(value)
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as fault:
        raise ValueError(f"{value!r} is not a regular expression: {fault}") from None


_PRINCIPAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Z][a-z]{3})?(-([A-Z]{2}|[0-9]{3}))?")


def principal(value: Value) -> None:
    """Check the name of a principal; raises `ValueError`."""
    text(64, _PRINCIPAL, "the name of a principal (a letter or digit, then letters, digits and . _ @ -)")(value)


def language(value: Value) -> None:
    """Check a language tag (RFC 5646); raises `ValueError`."""
    text(16, _LANGUAGE, "a language such as en, en-US or zh-Hant-TW")(value)


def optional_space(value: Value) -> None:
    """Check a space name, or ""; raises `ValueError`."""
    if value != "":
        space_name(value)


def header_name(value: Value) -> None:
    """The name of an HTTP header; "" for none."""
    if not isinstance(value, str) or not _HEADER.fullmatch(value):
        raise ValueError(f'must be the name of a header, such as "Remote-User", or "", not {value!r}')


seconds = number(0.001, 1e7)
from_zero_s = number(0.0, 1e7)
count = integer(1, 1_000_000)
size = integer(1, 2**40)


def parse_annotation(annotation: Any) -> tuple[Any, Rule | None]:
    """Return the plain type and the annotated rule; None if there is no rule."""
    if get_origin(annotation) is Annotated:
        kind, rule = get_args(annotation)
        return kind, rule
    return annotation, None


def apply_rule(kind: Any, rule: Rule, value: Value) -> Value:
    """Return a value as its setting has it; raises `ValueError` if it may not be that."""
    rule(value)
    if kind is float:
        return float(value)
    if kind is Path:
        return Path(value)
    return tuple(value) if get_origin(kind) is tuple else value


def with_rules(_cls: type, fields: Fields) -> Fields:
    """Apply every annotated rule on construction, too."""
    return [_with_rule(field) for field in fields]


def _with_rule(field: "attrs.Attribute[Any]") -> "attrs.Attribute[Any]":
    kind, rule = parse_annotation(field.type)
    if rule is None:
        return field

    def convert(value: Value) -> Value:
        try:
            return apply_rule(kind, rule, value)
        except ValueError as fault:
            raise FieldError(f"{field.name}: {fault}") from None

    return field.evolve(converter=convert)
