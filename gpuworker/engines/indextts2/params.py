"""What a request to IndexTTS2 may contain: the JSON Schema of its params, its inputs, and their combinations."""

from collections.abc import Collection, Mapping
from typing import Any

from gpuworker.engines.base import EngineInput
from protocol.speakable import speakable
from protocol.wire.structs import InputRule
from protocol.wire.validators import Value

MAX_TEXT_CHARS = 5_000
MAX_RECORDING_BYTES = 16 * 1024 * 1024
EMOTIONS = ("happy", "angry", "sad", "afraid", "disgusted", "melancholic", "surprised", "calm")
LANGUAGES = ("ZH", "EN", "JA", "ES", "AR")


def _range(kind: str, low: float, high: float, default: float | None, description: str = "") -> dict[str, Value]:
    rule: dict[str, Value] = {"type": kind, "minimum": low, "maximum": high}
    if default is not None:
        rule["default"] = default
    if description:
        rule["description"] = description
    return rule


#: Passed to upstream's `generate`; names, ranges and defaults are those of its WebUI.
SAMPLING: dict[str, dict[str, Value]] = {
    "temperature": _range("number", 0.1, 2.0, 0.8),
    "top_p": _range("number", 0.0, 1.0, 0.8),
    "top_k": _range("integer", 0, 100, 30, "0: no limit"),
    "num_beams": _range("integer", 1, 10, 3),
    "repetition_penalty": _range("number", 0.1, 20.0, 10.0),
    "length_penalty": _range("number", -2.0, 2.0, 0.0),
}


def params_schema(model: Any, parameters: Collection[str], voices: Collection[str]) -> dict[str, Value]:
    """The JSON Schema of the params.

    Args:
        model: an IndexTTS2; provides the limits, and whether it reads emotion from text.
        parameters: the parameters of its `infer`; `lang` indicates 2.5.
        voices: names of the voices on this machine.
    """
    limits = getattr(getattr(model, "cfg", None), "gpt", None)
    max_mel = int(getattr(limits, "max_mel_tokens", 1_815))  # the default in upstream's config.yaml
    max_text = int(getattr(limits, "max_text_tokens", 600))
    vector: dict[str, Value] = {
        "type": "array",
        "items": _range("number", 0.0, 1.0, None),
        "minItems": len(EMOTIONS),
        "maxItems": len(EMOTIONS),
        "description": ", ".join(EMOTIONS),
    }
    properties: dict[str, Value] = {
        "text": {"type": "string", "minLength": 1, "maxLength": MAX_TEXT_CHARS},
        "emo_alpha": _range("number", 0.0, 1.0, 1.0, "strength of the emotion; with use_emo_text about 0.6"),
        "emo_vector": vector,
        "use_random": {"type": "boolean", "default": False, "description": "choose the emotion's sample at random"},
        "interval_silence": _range("integer", 0, 5_000, 200, "silence between segments, ms"),
        "max_text_tokens_per_segment": _range("integer", 20, max_text, min(120, max_text)),
        **SAMPLING,
        "max_mel_tokens": _range("integer", 50, max_mel, min(1_500, max_mel), "longest segment; the rest is cut off"),
        "seed": _range("integer", 0, 2**63 - 1, 0, "a different seed gives a different rendition"),
    }
    required: list[Value] = ["text"]
    if getattr(model, "qwen_emo", True) is not None:
        description = "used instead of the text, with use_emo_text"
        properties["use_emo_text"] = {"type": "boolean", "default": False, "description": "read emotion from the text"}
        properties["emo_text"] = {"type": "string", "minLength": 1, "maxLength": 1_000, "description": description}
    if "lang" in parameters:
        properties["lang"] = {"enum": list(LANGUAGES), "description": "language of the text"}
        properties["duration_factor"] = _range("number", 0.5, 2.0, 1.0, "above 1 is slower")
        required.append("lang")
    if voices:
        description = "a voice of this machine, instead of spk_audio_prompt"
        properties["voice"] = {"enum": list(voices), "description": description}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def input_rules(voices: Collection[str]) -> dict[str, InputRule]:
    """The recordings that it accepts; the speaker's is required if there is no named voice."""
    return {
        "spk_audio_prompt": InputRule(max_bytes=MAX_RECORDING_BYTES, required=not voices),
        "emo_audio_prompt": InputRule(max_bytes=MAX_RECORDING_BYTES),
    }


def faults(params: Mapping[str, Value], inputs: Mapping[str, EngineInput]) -> dict[str, str]:
    """Faults that the schema cannot express and upstream would ignore: field -> what is wrong."""
    found: dict[str, str] = {}
    if not speakable(str(params["text"]), symbols=False):
        found["text"] = "contains nothing to speak"
    if "voice" in params and "spk_audio_prompt" in inputs:
        found["voice"] = "was given with spk_audio_prompt; leave out one of them"
    by_text = bool(params.get("use_emo_text"))
    if "emo_text" in params and not by_text:
        found["emo_text"] = "is used only if use_emo_text is true"
    if "emo_vector" in params and by_text:
        found["emo_vector"] = "was given with use_emo_text; leave out one of them"
    if "emo_audio_prompt" in inputs and (by_text or "emo_vector" in params):
        found["emo_audio_prompt"] = "was given with emo_vector or use_emo_text; use only one of them"
    return found
