"""Params and inputs of engine `voxcpm`, as its worker registers them.

The relay checks every request against them before it is queued. So what this worker cannot do (denoise without a
denoiser, for example) is rejected there too: such a param only accepts the value that requests nothing, and its
description, which the relay quotes, says why.
"""

import attrs

from protocol.wire.structs import KIB, InputRule
from protocol.wire.validators import Value

MAX_TEXT_CHARS = 5_000
#: A minute of speech has about 900 characters; the transcript of 50 s of prompt audio fits easily.
MAX_PROMPT_TEXT_CHARS = 2_000
MAX_DESCRIPTION_CHARS = 300
MAX_URL_CHARS = 2_048
#: 50 s of 24-bit stereo at 48 kHz take 14 MB; two inputs reach the relay's own `max_input_bytes`, 32 MiB.
MAX_INPUT_BYTES = 16 * KIB * KIB

DEFAULT_TIMESTEPS, MAX_TIMESTEPS = 10, 50

STREAMING, NON_STREAMING = "streaming", "non_streaming"

#: The defaults of the params: those of `voxcpm` itself, and a fixed seed.
DEFAULTS: dict[str, Value] = {
    "cfg_value": 2.0,
    "inference_timesteps": DEFAULT_TIMESTEPS,
    "normalize": False,
    "denoise": False,
    "retry_badcase": True,
    "retry_badcase_max_times": 3,
    "retry_badcase_ratio_threshold": 6.0,
    "mode": STREAMING,
    "seed": 0,
}


@attrs.frozen(kw_only=True)
class Abilities:
    """What a worker can do in addition to speaking a text.

    Args:
        clones: its model accepts reference audio and descriptions of a voice (VoxCPM2).
        normalizes: the packages that write out numbers and dates are installed.
        denoises: a denoiser is loaded.
        fetches: hosts are listed from which it may fetch prompt audio.
        voices: the names of its own voices.
        max_timesteps: the most diffusion steps that a request may ask for.
    """

    clones: bool = False
    normalizes: bool = False
    denoises: bool = False
    fetches: bool = False
    voices: tuple[str, ...] = ()
    max_timesteps: int = MAX_TIMESTEPS


def params_schema(can: Abilities) -> dict[str, Value]:
    """The JSON Schema of the params."""
    return {
        "type": "object",
        "properties": {
            "text": _text(MAX_TEXT_CHARS, "text to speak; a long one is split at the ends of sentences"),
            **_voice(can),
            **_model(can),
            "normalize": _switch(
                "normalize",
                "write numbers, dates and signs out as words first",
                None if can.normalizes else "this worker lacks the packages for it (pip install wetext inflect regex)",
            ),
            "denoise": _switch(
                "denoise",
                "remove noise from the prompt and reference audio first",
                None if can.denoises else "this worker runs without a denoiser (its owner starts it: -o denoiser=true)",
            ),
        },
        "required": ["text"],
        "additionalProperties": False,
    }


def input_rules(can: Abilities) -> dict[str, InputRule]:
    """The inputs, of any media type: the content shows what the audio is, and clients name it in many ways."""
    rule = InputRule(max_bytes=MAX_INPUT_BYTES)
    return {"prompt_wav": rule, "reference_wav": rule} if can.clones else {"prompt_wav": rule}


def _model(can: Abilities) -> dict[str, Value]:
    return {
        "cfg_value": _number(
            "number", "cfg_value", 0.1, 10, "guidance: higher follows the text and the prompt more closely"
        ),
        "inference_timesteps": _number(
            "integer",
            "inference_timesteps",
            1,
            can.max_timesteps,
            "diffusion steps for each 80 or 160 ms: more is better and slower",
        ),
        "mode": {
            "enum": [STREAMING, NON_STREAMING],
            "default": DEFAULTS["mode"],
            "description": "streaming: audio as it is made; non_streaming: made whole, and again if it is a bad case",
        },
        "retry_badcase": {
            "type": "boolean",
            "default": DEFAULTS["retry_badcase"],
            "description": "mode non_streaming: try again if the speech is far too long for its text (a bad case)",
        },
        "retry_badcase_max_times": _number(
            "integer", "retry_badcase_max_times", 0, 10, "most attempts; 0 uses the first result as it is"
        ),
        "retry_badcase_ratio_threshold": _number(
            "number",
            "retry_badcase_ratio_threshold",
            1,
            20,
            "steps of audio per token of text above which it is a bad case; speech ends there in every mode",
        ),
        "seed": _number(
            "integer", "seed", 0, 2**32 - 1, "equal requests give equal samples; another seed gives another rendition"
        ),
    }


def _voice(can: Abilities) -> dict[str, Value]:
    no_clone = None if can.clones else "this model accepts no reference audio; send prompt_wav with its prompt_text"
    no_hosts = None if can.fetches else "this worker fetches nothing (its owner lists hosts: -o url_hosts=…)"
    named: dict[str, Value] = {"enum": list(can.voices), "description": "a voice of this worker"}
    return {
        "voice": named if can.voices else _refused("this worker has no voices of its own (folder voices/)"),
        "voice_description": (
            _text(MAX_DESCRIPTION_CHARS, 'the desired voice, e.g. "a calm old man"; placed as "(…)" before the text')
            if can.clones
            else _refused("this model accepts no description of a voice")
        ),
        "prompt_text": _text(
            MAX_PROMPT_TEXT_CHARS, "transcript of prompt_wav, word for word; the speech continues from there"
        ),
        "prompt_wav_url": _url("URL of audio to continue from, instead of input prompt_wav", no_hosts),
        "reference_wav_url": _url("URL of the voice to clone, instead of input reference_wav", no_clone or no_hosts),
    }


def _text(max_chars: int, description: str) -> dict[str, Value]:
    return {"type": "string", "minLength": 1, "maxLength": max_chars, "description": description}


def _number(kind: str, name: str, minimum: float, maximum: float, description: str) -> dict[str, Value]:
    return {
        "type": kind,
        "minimum": minimum,
        "maximum": maximum,
        "default": DEFAULTS[name],
        "description": description,
    }


def _switch(name: str, description: str, reason: str | None) -> dict[str, Value]:
    if reason is not None:
        return {"const": False, "default": False, "description": reason}
    return {"type": "boolean", "default": DEFAULTS[name], "description": description}


def _url(description: str, reason: str | None) -> dict[str, Value]:
    return _refused(reason) if reason is not None else _text(MAX_URL_CHARS, description)


def _refused(reason: str) -> dict[str, Value]:
    return {"const": None, "description": reason}
