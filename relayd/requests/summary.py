"""Summarizes what a request asks for: params of any length are cut to fit a message and a screen. Pure."""

from collections.abc import Mapping

import msgpack

from protocol.wire.messages import Submit
from protocol.wire.validators import Value

#: Maps and arrays that are nested deeper are replaced by their size.
MAX_DEPTH = 4
#: Items kept of a map or an array.
MAX_ITEMS = 32
#: Characters kept of a key.
MAX_KEY_CHARS = 64
#: Lengths at which strings are cut, tried in order until the summary fits.
STRING_CHARS = (2_000, 500, 200, 60)
MAX_INPUTS = 16


def summarize(submit: Submit, most_bytes: int, fed: Mapping[str, int] | None = None) -> bytes:
    """Summarize a submission as a packed map.

    Args:
        submit: the submission.
        most_bytes: the largest size of the result; at least 200.
        fed: how much there is of each input that is fed.

    Returns:
        A msgpack map of `params`, `params_cut` (whether something is left out) and `inputs`, which are empty if they do
        not fit.
    """
    inputs = [
        {"name": name, "media_type": info.media_type, "size": (fed or {}).get(name, info.size)}
        for name, info in list(submit.inputs.items())[:MAX_INPUTS]
    ]
    for chars in STRING_CHARS:
        params = _truncate(submit.params, chars, MAX_DEPTH)
        if len(packed := _pack(submit, params, inputs)) <= most_bytes:
            return packed
    some: dict[str, Value] = {}
    for key, value in _truncate(submit.params, STRING_CHARS[-1], 1).items():
        some[key] = value
        if len(_pack(submit, some, [])) > most_bytes:
            del some[key]
            break
    return _pack(submit, some, [])


def _pack(submit: Submit, params: dict[str, Value], inputs: list[dict[str, Value]]) -> bytes:
    packed: bytes = msgpack.packb({"params": params, "params_cut": params != submit.params, "inputs": inputs})
    return packed


def _truncate(value: Value, chars: int, depth: int) -> Value:
    if isinstance(value, str):
        return value if len(value) <= chars else f"{value[: chars - 1]}…"
    if isinstance(value, bytes):
        return f"({len(value)} bytes)"
    if isinstance(value, dict):
        if not depth:
            return f"({len(value)} keys)" if value else {}
        some = list(value.items())[:MAX_ITEMS]
        return {key[:MAX_KEY_CHARS]: _truncate(item, chars, depth - 1) for key, item in some}
    if isinstance(value, list):
        if not depth:
            return f"({len(value)} items)" if value else []
        return [_truncate(item, chars, depth - 1) for item in value[:MAX_ITEMS]]
    return value
