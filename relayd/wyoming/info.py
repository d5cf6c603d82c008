"""What the relay tells about itself: the spaces that speak, transcribe and converse, as programs of the protocol. Pure.

Home Assistant reads this once, takes the first program of each kind, and shows its voices by their languages.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from relayd.auth.tokens import Principal
from relayd.config.schema import Talk, Wyoming
from relayd.core.space import Space
from relayd.http.openai.names import SPEECH, TRANSCRIPTION, Kind, spaces_of
from relayd.wyoming.events import EventFault, shown
from relayd.wyoming.languages import languages_by_voice, languages_of, matches

PROGRAM = "relayd"
_ATTRIBUTION = {"name": PROGRAM, "url": ""}
#: Between a space and a voice of it.
SLASH = "/"
MAX_TOLD = 12


@attrs.frozen
class Offer:
    """What a principal may use of the relay.

    Args:
        spaces: all of the relay.
        talk: the settings of conversations, if there are any.
    """

    spaces: Iterable[Space]
    principal: Principal
    settings: Wyoming
    talk: Talk | None

    @property
    def speech(self) -> list[Space]:
        """The spaces that speak, the one first that does it where none is named."""
        return self._of_kind(SPEECH, self.talk.speech if self.talk else "")

    @property
    def transcription(self) -> list[Space]:
        """The spaces that write down what they hear, the one first that does it where none is named."""
        return self._of_kind(TRANSCRIPTION, self.talk.transcribe if self.talk else "")

    @property
    def converses(self) -> bool:
        """Whether there are conversations for this principal."""
        return self.talk is not None and self.principal.may_use(self.talk.reply)

    def _of_kind(self, kind: Kind, first: str) -> list[Space]:
        """Those of which it is known that they are of a kind, because a worker or the settings have said so."""
        found = [space for space in spaces_of(kind, self.spaces, self.principal) if space.engine or space.name == first]
        return sorted(found, key=lambda space: space.name != first)

    def voice_of(self, voice: dict[str, Any]) -> tuple[Space, str]:
        """Return the space and its voice that are asked for; "" for the voice that it takes by itself.

        Raises:
            EventFault: nothing speaks here, or nothing that is called so.
        """
        spaces = self.speech
        if not spaces:
            raise EventFault("no space speaks here; connect a worker to one, then send describe again", "no_worker")
        name, language, speaker = (voice.get(key) or "" for key in ("name", "language", "speaker"))
        if not all(isinstance(each, str) for each in (name, language, speaker)):
            raise EventFault("name, language and speaker of a voice must be strings")
        if not name:
            return self._speaker_of(language) if language else (spaces[0], "")
        space_name, _, own = name.partition(SLASH)
        for space in spaces:
            if space.name == space_name:
                return space, own or speaker
        for space in spaces:
            if name in languages_by_voice(space, ()):
                return space, name
        raise EventFault(f"there is no voice {shown(name)}; {_list(spaces)}", "invalid_params")

    def _speaker_of(self, language: str) -> tuple[Space, str]:
        """The first voice that speaks a language, or else the usual one."""
        for space in self.speech:
            voices = languages_by_voice(space, self.settings.languages)
            if matches(language, voices[""]):
                return space, ""
            for voice, languages in voices.items():
                if matches(language, languages):
                    return space, voice
        return self.speech[0], ""

    def model_of(self, name: str | None) -> Space:
        """Return the space that transcribes.

        Raises:
            EventFault: nothing does, or nothing that is called so.
        """
        spaces = self.transcription
        if not spaces:
            raise EventFault("no space transcribes here; connect a worker with engine whisper", "no_worker")
        for space in spaces:
            if name in (None, space.name):
                return space
        raise EventFault(f"there is no model {shown(name or '')}; {_list(spaces)}", "invalid_params")

    def info(self) -> dict[str, Any]:
        """Return the data of `info`."""
        told: dict[str, Any] = {kind: [] for kind in ("asr", "tts", "handle", "intent", "wake", "mic", "snd")}
        if voices := [voice for space in self.speech for voice in self._voices(space)]:
            told["tts"] = [_artifact(PROGRAM, "relayd") | {"voices": voices, "supports_synthesize_streaming": True}]
        models = [
            _artifact(space.name, space.config.description) | {"languages": languages_of(space, self.languages)}
            for space in self.transcription
        ]
        if models:
            told["asr"] = [_artifact(PROGRAM, "relayd") | {"models": models, "supports_transcript_streaming": True}]
        if self.converses:
            assert self.talk is not None
            model = _artifact(self.talk.reply, "a conversation") | {"languages": []}  # any
            told["handle"] = [_artifact(PROGRAM, "relayd") | {"models": [model], "supports_handled_streaming": True}]
        return told

    @property
    def languages(self) -> Sequence[str]:
        """Those of spaces that do not say theirs."""
        return self.settings.languages

    def _voices(self, space: Space) -> list[dict[str, Any]]:
        title = space.config.description or space.name
        return [
            _artifact(f"{space.name}{SLASH}{voice}", f"{title}: {voice}") | {"languages": languages, "speakers": None}
            if voice
            else _artifact(space.name, title) | {"languages": languages, "speakers": None}
            for voice, languages in languages_by_voice(space, self.languages).items()
        ]


def _artifact(name: str, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "attribution": _ATTRIBUTION,
        "installed": True,
        "description": description or name,
        "version": None,
    }


def _list(spaces: Sequence[Space]) -> str:
    names = ", ".join(space.name for space in spaces[:MAX_TOLD])
    return f"there are {names}; describe lists all"
