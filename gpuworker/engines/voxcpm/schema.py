"""Params and inputs of engine `voxcpm`, as its worker registers them.

The relay holds every request to them before it is queued. So what this worker cannot do (denoise without a denoiser,
say) is refused there too: such a param may only have the value that asks for nothing, and its description, which the
relay quotes, says why.
"""

import attrs

from protocol.wire.structs import KIB, InputRule
from protocol.wire.validators import Value

MAX_TEXT_CHARS = 5_000
#: A minute of speech has some 900 characters; what is said in 50 s of prompt audio fits well.
MAX_PROMPT_TEXT_CHARS = 2_000
MAX_DESCRIPTION_CHARS = 300
MAX_URL_CHARS = 2_048
#: 50 s of 24-bit stereo at 48 kHz have 14 MB; two inputs make the relay's own `max_input_bytes`, 32 MiB.
MAX_INPUT_BYTES = 16 * KIB * KIB

STREAMING, NON_STREAMING = "streaming", "non_streaming"

#: The defaults of params: those of `voxcpm` itself, and a fixed seed.
DEFAULTS: dict[str, Value] = {
    "cfg_value": 2.0,
    "inference_timesteps": 10,
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
    """What a worker can do beyond speaking a text.

    Args:
        clones: its model takes reference audio and descriptions of a voice (VoxCPM2).
        normalizes: the packages that write out numbers and dates are there.
        denoises: a denoiser is loaded.
        fetches: hosts are listed from which it fetches prompt audio.
        voices: names of its own voices.
    """

    clones: bool = False
    normalizes: bool = False
    denoises: bool = False
    fetches: bool = False
    voices: tuple[str, ...] = ()


def params_schema(can: Abilities) -> dict[str, Value]:
    """The JSON Schema of the params."""
    return {
        "type": "object",
        "properties": {
            "text": _text(MAX_TEXT_CHARS, "what to speak; a long one is split at its sentence ends"),
            **_voice(can),
            **_model(),
            "normalize": _switch(
                "normalize",
                "write numbers, dates and signs out as words first",
                None if can.normalizes else "this worker lacks the packages for it (pip install wetext inflect regex)",
            ),
            "denoise": _switch(
                "denoise",
                "clean the prompt and reference audio first",
                None if can.denoises else "this worker runs without a denoiser (its owner starts it: -o denoiser=true)",
            ),
        },
        "required": ["text"],
        "additionalProperties": False,
    }


def input_rules(can: Abilities) -> dict[str, InputRule]:
    """The inputs, of any media type: the content shows what audio is, and clients name it in a dozen ways."""
    rule = InputRule(max_bytes=MAX_INPUT_BYTES)
    return {"prompt_wav": rule, "reference_wav": rule} if can.clones else {"prompt_wav": rule}


def _model() -> dict[str, Value]:
    return {
        "cfg_value": _number(
            "number", "cfg_value", 0.1, 10, "guidance: higher keeps closer to the text and the prompt, lower is freer"
        ),
        "inference_timesteps": _number(
            "integer", "inference_timesteps", 1, 50, "diffusion steps of each 80 or 160 ms: more is better and slower"
        ),
        "mode": {
            "enum": [STREAMING, NON_STREAMING],
            "default": DEFAULTS["mode"],
            "description": "streaming: audio as it is made; non_streaming: made whole, and again if it is a bad case",
        },
        "retry_badcase": {
            "type": "boolean",
            "default": DEFAULTS["retry_badcase"],
            "description": "mode non_streaming: make speech again that is far too long for its text",
        },
        "retry_badcase_max_times": _number(
            "integer", "retry_badcase_max_times", 0, 10, "how often at most; 0 takes the first as it is"
        ),
        "retry_badcase_ratio_threshold": _number(
            "number",
            "retry_badcase_ratio_threshold",
            1,
            20,
            "steps of audio a token of text from which on it is a bad case; speech ends there in every mode",
        ),
        "seed": _number(
            "integer", "seed", 0, 2**32 - 1, "the same request makes the same samples; another seed, another take"
        ),
    }


def _voice(can: Abilities) -> dict[str, Value]:
    no_clone = None if can.clones else "this model takes no reference audio; send prompt_wav with its prompt_text"
    no_hosts = None if can.fetches else "this worker fetches nothing (its owner lists hosts: -o url_hosts=…)"
    named: dict[str, Value] = {"enum": list(can.voices), "description": "a voice of this worker"}
    return {
        "voice": named if can.voices else _refused("this worker has no voices of its own (folder voices/)"),
        "voice_description": (
            _text(MAX_DESCRIPTION_CHARS, 'how the voice is to be, e.g. "a calm old man"; as "(…)" before the text')
            if can.clones
            else _refused("this model takes no description of a voice")
        ),
        "prompt_text": _text(
            MAX_PROMPT_TEXT_CHARS, "what is said in prompt_wav, word for word; the speech goes on from there"
        ),
        "prompt_wav_url": _url("audio to go on from, in place of input prompt_wav", no_hosts),
        "reference_wav_url": _url("audio of the voice to clone, in place of input reference_wav", no_clone or no_hosts),
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


def _switch(name: str, description: str, lack: str | None) -> dict[str, Value]:
    if lack is not None:
        return {"const": False, "default": False, "description": lack}
    return {"type": "boolean", "default": DEFAULTS[name], "description": description}


def _url(description: str, lack: str | None) -> dict[str, Value]:
    return _refused(lack) if lack is not None else _text(MAX_URL_CHARS, description)


def _refused(lack: str) -> dict[str, Value]:
    return {"const": None, "description": lack}
