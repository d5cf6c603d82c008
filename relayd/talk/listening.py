"""How somebody is listened to. Pure."""

from collections.abc import Mapping
from typing import Any

import attrs

from protocol.wire.validators import Value


@attrs.frozen(kw_only=True)
class TurnDetection:
    """How it is found out when the user has spoken, and what follows from that.

    Args:
        threshold: the likelihood from which sound is speech.
        prefix_ms: what is taken along of the sound before it.
        silence_ms: the silence that ends it.
        create_response: whether it is answered by itself.
        interrupt_response: whether it interrupts the response that is being made.
    """

    threshold: float = 0.5
    prefix_ms: int = 300
    silence_ms: int = 500
    create_response: bool = True
    interrupt_response: bool = True


@attrs.frozen(kw_only=True)
class Listening:
    """How the client is listened to.

    Args:
        turn_detection: None if the client itself says when it has spoken (`input_audio_buffer.commit`).
        transcription: whether it is told what was understood.
        language: that it speaks; "" if that is to be found out.
        prompt: words that may occur.
    """

    turn_detection: TurnDetection | None = attrs.field(factory=TurnDetection)
    transcription: bool = True
    language: str = ""
    prompt: str = ""

    def params(self, known: Mapping[str, Any]) -> dict[str, Value]:
        """Return the params of the space that transcribes, of those that it knows."""
        detection = self.turn_detection
        params: dict[str, Value] = {"turn_detection": "none"}
        if detection is not None:
            params = {
                "turn_detection": "server_vad",
                "threshold": detection.threshold,
                "prefix_ms": detection.prefix_ms,
                "silence_ms": detection.silence_ms,
            }
        hints = {"language": self.language, "prompt": self.prompt}
        params |= {name: value for name, value in hints.items() if value}
        return {name: value for name, value in params.items() if name in known}
