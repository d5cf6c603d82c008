"""The params of the VoxCPM server, and what its validator says of those that are wrong."""

from collections.abc import Callable, Mapping
from typing import Any

MAX_TEXT_CHARS = 5_000
MODES = ("streaming", "non_streaming")
#: What a client of that server means by a param that a space does not know; sent by many clients with each request.
DEFAULTS: Mapping[str, Any] = {
    "prompt_wav_url": None,
    "prompt_text": None,
    "cfg_value": 2.0,
    "inference_timesteps": 10,
    "normalize": False,
    "denoise": False,
    "retry_badcase": True,
    "retry_badcase_max_times": 3,
    "retry_badcase_ratio_threshold": 6.0,
}

_Check = Callable[[Any], str | None]


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        return "must be a string"
    if not value:
        return "cannot be empty"
    return f"too long (max {MAX_TEXT_CHARS} characters)" if len(value) > MAX_TEXT_CHARS else None


def _mode(value: Any) -> str | None:
    return None if value in MODES else "must be 'streaming' or 'non_streaming'"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be a boolean"


def _between(least: float, most: float, kinds: tuple[type, ...], what: str) -> _Check:
    def check(value: Any) -> str | None:
        if isinstance(value, bool) or type(value) not in kinds:
            return f"must be {what}"
        return None if least <= value <= most else f"must be between {least} and {most}"

    return check


def _number(least: float, most: float) -> _Check:
    return _between(least, most, (int, float), "a number")


def _integer(least: int, most: int) -> _Check:
    return _between(least, most, (int,), "an integer")


CHECKS: Mapping[str, _Check] = {
    "text": _text,
    "mode": _mode,
    "cfg_value": _number(0.1, 10.0),
    "inference_timesteps": _integer(1, 50),
    "normalize": _flag,
    "denoise": _flag,
    "retry_badcase": _flag,
    "retry_badcase_max_times": _integer(0, 10),
    "retry_badcase_ratio_threshold": _number(1.0, 20.0),
}


def faults_of(params: Mapping[str, Any]) -> dict[str, str]:
    """Return what is wrong, by the name of the param."""
    faults = {} if "text" in params else {"text": "is required"}
    found = {name: check(params[name]) for name, check in CHECKS.items() if name in params}
    return faults | {name: fault for name, fault in found.items() if fault is not None}


def fitting(params: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the params for a space that knows `known`: without a mode that it has not, and without defaults."""
    return {
        name: value
        for name, value in params.items()
        if name in known or (name != "mode" and not (name in DEFAULTS and value == DEFAULTS[name]))
    }
