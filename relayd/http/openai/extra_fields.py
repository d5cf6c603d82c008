"""Reads the fields of `POST /v1/audio/speech` that OpenAI's API does not have. Pure.

Params and inputs that the space has declared are sent on. Names that other servers use for a voice, for a recording of
one or for its transcript are translated to those of the space, or refused, so that no speech has another voice
than was asked for. All other fields are ignored.
"""

import binascii
import json
import re
from collections.abc import Mapping

import attrs

from protocol.wire.media_types import BINARY, recognize
from protocol.wire.structs import InputRule
from protocol.wire.validators import Value, kind_of
from relayd.core.space import Space

#: Inputs that are a recording of the voice to speak with, without a transcript; the first that a space accepts is used.
REFERENCE_INPUTS = ("reference_wav", "spk_audio_prompt", "ref_audio", "reference_audio", "speaker_wav", "audio_prompt")
#: A recording that the speech continues, and its transcript.
PROMPT_INPUT, PROMPT_TEXT = "prompt_wav", "prompt_text"
#: Words in a field's name that say who speaks, unless a word beside them says that it is about how.
_WHO = frozenset(["voice", "voices", "speaker", "speakers", "spk", "ref", "refer", "reference", "references"])
_WHO |= {"clone", "cloning", "timbre"}
_HOW = frozenset(["speed", "rate", "volume", "pitch", "settings", "boost", "format", "language", "lang"])
_HOW |= {"system", "negative", "count", "length"}
_RECORDING = frozenset(["audio", "wav", "speech", "sample", "file", "path", "url", "recording"])
_WORDS_IN_IT = frozenset(["text", "transcript", "transcription"])
_NAME = frozenset(["voice", "speaker", "spk", "reference", "predefined", "id", "name"])
_MEDIA_TYPE = re.compile(r"[a-z]+/[A-Za-z0-9.+-]{1,64}")


@attrs.define
class ExtraFields:
    """The extra fields of a body, in terms of a space.

    Attributes:
        params: param of the space -> value.
        inputs: input of the space -> media type and content.
        voice: a voice given in another field than `voice`; empty for none.
        recorded: whether the inputs include a recording of the voice.
        names: param or input -> the field in which it was sent.
        faults: field -> what is wrong with it.
    """

    params: dict[str, Value] = attrs.field(factory=dict)
    inputs: dict[str, tuple[str, bytes]] = attrs.field(factory=dict)
    voice: str = ""
    recorded: bool = False
    names: dict[str, str] = attrs.field(factory=dict)
    faults: dict[str, str] = attrs.field(factory=dict)


def read_extra(fields: Mapping[str, Value], space: Space) -> ExtraFields:
    """Read `fields` for a space. Null counts as absent, and so does an empty or false value of anything but a param."""
    extra = ExtraFields()
    recordings: dict[str, Value] = {}
    texts: dict[str, Value] = {}
    for field, value in fields.items():
        parts = frozenset(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", field).lower().replace("-", "_").split("_"))
        try:
            if value is None:
                continue
            if field in space.params.get("properties", {}):
                check_text(value)
                extra.params[field] = value
            elif value is False or value in ("", [], {}):
                continue
            elif field in space.inputs:
                _add_recording(extra, field, value, field, space)
            elif not parts & (_WHO | {"prompt"}) or parts & _HOW or field == "text_prompt":
                continue
            elif parts & _WORDS_IN_IT:
                texts[field] = value
            elif parts & _RECORDING:
                recordings[field] = value
            elif parts <= _NAME and parts != {"reference"}:
                extra.voice = _text(value)
                extra.names["voice"] = field
            elif parts & _WHO:
                raise ValueError(f"is not accepted by space {space.name!r}; leave it out, or name one of its voices")
        except ValueError as fault:
            extra.faults[field] = str(fault)
    _add_reference(extra, recordings, texts, space)
    return extra


def _add_reference(
    extra: ExtraFields, recordings: Mapping[str, Value], texts: Mapping[str, Value], space: Space
) -> None:
    """Add a recording and its transcript in the way the space accepts them."""
    if len(recordings) > 1 or len(texts) > 1:
        for field in list(recordings)[1:] + list(texts)[1:]:
            extra.faults[field] = "means the same as another field; send one of them"
        return
    text_field, text = next(iter(texts.items()), (PROMPT_TEXT, extra.params.get(PROMPT_TEXT)))
    for field, value in recordings.items():
        try:
            if text is not None and PROMPT_INPUT in space.inputs:
                _add_recording(extra, PROMPT_INPUT, value, field, space)
                extra.params[PROMPT_TEXT] = _text(text)
                extra.names[PROMPT_TEXT] = text_field
                return
            taken = next((name for name in REFERENCE_INPUTS if name in space.inputs), None)
            if taken is not None:
                _add_recording(extra, taken, value, field, space)
            elif PROMPT_INPUT in space.inputs:
                raise ValueError(f"needs its transcript (ref_text) as well in space {space.name!r}")
            else:
                raise ValueError(f"is not accepted: space {space.name!r} accepts no recording of a voice; leave it out")
        except ValueError as fault:
            extra.faults[field] = str(fault)
    if texts and not recordings:
        extra.faults[text_field] = "goes with a recording (ref_audio), and there is none; leave it out"


def _add_recording(extra: ExtraFields, name: str, value: Value, field: str, space: Space) -> None:
    """Add a recording as input `name`, or its URL if the space fetches it."""
    text = _text(value).strip()
    extra.names[name] = field
    extra.recorded = extra.recorded or name in (PROMPT_INPUT, *REFERENCE_INPUTS)
    if re.match(r"https?://", text):
        by_url = f"{name}_url"
        schema = space.params.get("properties", {}).get(by_url)
        if not isinstance(schema, dict) or "const" in schema:
            raise ValueError(f"is a URL, and space {space.name!r} fetches none; send the recording itself in base64")
        extra.params[by_url] = text
        extra.names[by_url] = field
        return
    extra.inputs[name] = _decoded(text, space.inputs[name])


def _decoded(text: str, rule: InputRule) -> tuple[str, bytes]:
    media_type = None
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("must be base64 in a data URL: data:audio/wav;base64,…")
        if match := _MEDIA_TYPE.match(head.removeprefix("data:")):
            media_type = match[0]
    packed = "".join(text.split()).rstrip("=")
    try:
        data = binascii.a2b_base64(packed + "=" * (-len(packed) % 4), strict_mode=True)
    except ValueError:  # binascii.Error, or characters that are not ASCII
        raise ValueError("must be the file itself in base64, or a data URL; the relay opens no paths") from None
    if not data:
        raise ValueError("is an empty file")
    literal = [kind for kind in rule.media_types if "*" not in kind]
    return media_type or (literal[0] if literal else recognize(data) or BINARY), data


def _text(value: Value) -> str:
    if isinstance(value, dict) and value.keys() == {"id"}:
        value = value["id"]
    if not isinstance(value, str):
        raise ValueError(f"must be a string, not {kind_of(value)}")
    check_text(value)
    return value


def check_text(value: Value) -> None:
    """Refuse half of a UTF-16 character, which JSON can express and UTF-8 cannot.

    Raises:
        ValueError: there is one.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("contains a lone surrogate, which is not a character") from None
    except RecursionError:
        raise ValueError("is nested too deep") from None
