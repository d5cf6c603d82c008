"""Engine `openai`: speech by a server that speaks OpenAI's API, on the worker's own machine or network.

PCM is passed on as it comes; `model_server` has what is not of speech.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import attrs

from gpuworker.engines.audio_body import AudioBody, declared
from gpuworker.engines.base import (
    Capabilities,
    Chunk,
    EngineInput,
    InvalidParams,
    Option,
    OptionError,
    OptionValue,
    RequestContext,
)
from gpuworker.engines.model_server.engine import (
    KEY_FILE,
    NOBODY,
    SILENCE,
    WAIT,
    ModelServerEngine,
    listed,
    read_extra,
)
from gpuworker.engines.model_server.refusals import Words, refusal
from gpuworker.engines.openai.dialects import DIALECTS, Offer, Settings
from protocol.speakable import speakable
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value

if TYPE_CHECKING:
    from gpuworker.engines.model_server.upstream import Exchange


class OpenAiEngine(ModelServerEngine):
    """Asks a speech server; see the module's docstring."""

    SUMMARY: ClassVar[str] = "any OpenAI-compatible speech server on this network: -o url=http://127.0.0.1:8880/v1"
    LIVE_INPUTS: ClassVar[tuple[str, ...]] = ("text",)
    WORDS = Words(
        server="the speech server",
        makes="audio",
        knows="the model, the voice or the path",
        params={"input": "text", "target_text": "text", "ref_audio": "reference_wav"},
    )
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "url": Option(required=True, help="the server's address, up to /v1"),
        "model": Option(help="the server's name of the model; its only one if not given"),
        "voices": Option(
            help="voices to offer: a,b,c (the first is the default), or * for any; the server's if not given"
        ),
        "api_key_file": KEY_FILE,
        "api": Option(default="openai", choices=tuple(DIALECTS), help="openai, or nanovllm for its own /generate"),
        "response_format": Option(default="pcm", choices=("pcm", "wav"), help="what to ask for: pcm, or wav"),
        "sample_rate": Option(
            kind=int, help="sample rate of its PCM, Hz; as its answer says, else 24000, if not given"
        ),
        "channels": Option(kind=int, default=1, help="channels of its PCM, 1 or 2; needs sample_rate"),
        "cloning": Option(kind=bool, default=False, help="accept recordings of a voice"),
        "extra": Option(help='more fields of each request, as JSON: {"language":"English"}; null leaves one out'),
        "wait_s": WAIT,
        "silence_s": SILENCE,
    }

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        super().__init__(options)
        self._dialect = DIALECTS[str(self.options["api"])]
        given = [voice.strip() for voice in str(self.options["voices"] or "").split(",")]
        voices = tuple(dict.fromkeys(filter(None, given)))
        self._settings = Settings(
            model=str(self.options["model"]) if self.options["model"] else None,
            voices=None if voices == ("*",) else voices,
            default_voice=voices[0] if voices and voices != ("*",) else None,
            response_format=str(self.options["response_format"]),
            cloning=bool(self.options["cloning"]),
            extra=read_extra(self.options["extra"]),
        )
        self._fixed: AudioFormat | None = None
        if self.options["sample_rate"] is not None:
            try:
                self._fixed = AudioFormat(
                    sample_rate=int(self.options["sample_rate"]), channels=int(self.options["channels"] or 0)
                )
            except ValueError as fault:
                raise OptionError(f"-o {fault}") from None
        self._capabilities = Capabilities()

    @property
    def paths(self) -> Sequence[str]:
        """Where speech is made."""
        return [dialect.SPEECH for dialect in DIALECTS.values()]

    @classmethod
    def outlook(cls, options: Mapping[str, OptionValue], slots: int) -> str:
        """What the server says it has.

        Raises:
            EngineError: it does not answer, or refuses.
        """
        del slots
        engine = cls(options)
        offer = engine._connect()
        engine.close()
        said = [f"{engine.url} answers"]
        for what, names in (("models", offer.models), ("voices", offer.voices or ())):
            said.append(f"{what}: {listed(names)}" if names else f"it lists no {what}")
        return "; ".join(filter(None, (*said, engine.unlisted(offer.models))))

    @property
    def capabilities(self) -> Capabilities:
        """The params of the server's API, with its voices; the format is the one to expect, unless it was given."""
        return self._capabilities

    # -- loading

    def load(self) -> None:
        """Ask the server what it has.

        Raises:
            EngineError: it does not answer, or refuses; the slot tries again.
        """
        offer = self._connect()
        chosen = self._settings
        if self._dialect.NAMES_MODEL:
            chosen = attrs.evolve(chosen, model=self.choose_model(offer.models))
        if warning := self.unlisted(offer.models):
            print(f"{self.url}: {warning}; it lists {listed(offer.models)}", file=sys.stderr)
        if chosen.voices == ():
            chosen = attrs.evolve(chosen, voices=offer.voices)
        self._settings = chosen
        self._capabilities = Capabilities(
            format=self._fixed or offer.format,
            late_format=self._fixed is None,
            params=self._dialect.params(chosen),
            inputs=self._dialect.inputs(chosen),
        )

    def _connect(self) -> Offer:
        """Start the HTTP client, and ask what the server has."""
        with self.opening():
            offer = self._dialect.offer(self.ask, self._settings)
            if self._dialect.NAMES_MODEL:
                self.choose_model(offer.models)
        return offer

    # -- a run

    def generate(
        self, params: dict[str, Value], inputs: Mapping[str, EngineInput], context: RequestContext = NOBODY
    ) -> Iterator[Chunk]:
        """Yield the audio as the server sends it."""
        faults = {} if speakable(params["text"]) else {"text": "contains nothing to speak"}
        if faults := faults | self._dialect.faults(params, inputs):
            raise InvalidParams(faults)
        body = self._dialect.body(params, inputs, self._settings)
        yield from self.post(self._dialect.SPEECH, body, context, self._speech)

    def _speech(self, answer: "Exchange") -> Iterator[Chunk]:
        """The audio of one answer.

        Raises:
            ServerBusy: the server has not begun, and may later.
            EngineError: it refuses, failed, or sent something else; or the connection was lost.
        """
        head = answer.head()
        if head is None:
            return
        found = declared(head.headers) if 200 <= head.status < 300 else None
        if found is None or found.is_text:
            raise refusal(self.WORDS, head.status, head.headers, answer.read_text())
        expected = self._capabilities.format
        assert expected is not None
        body = AudioBody(found, expected, fixed=self._fixed is not None)
        for data in answer.pieces():
            yield from body.feed(data)
        if not self.cancelled():
            yield from body.end()
