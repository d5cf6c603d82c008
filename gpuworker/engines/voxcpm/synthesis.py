"""Runs one request of engine `voxcpm`, from its params and inputs to its audio.

The order is that of a reproducible run: check, encode the voice (it may come from the cache, and does not use the
random generator), seed, speak.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing

import attrs
import numpy as np
from numpy.typing import NDArray

from gpuworker.engines.base import AudioChunk, EngineInput, InvalidParams, ProgressChunk
from gpuworker.engines.voxcpm.crossfade import join, pcm16
from gpuworker.engines.voxcpm.model_output import PromptCache
from gpuworker.engines.voxcpm.prompts import Prompt, Prompts, Stopped
from gpuworker.engines.voxcpm.schema import DEFAULTS, NON_STREAMING
from gpuworker.engines.voxcpm.speech_model import SPARE_STEPS, Settings, SpeechModel
from gpuworker.engines.voxcpm.validation import find_faults
from gpuworker.speaking.text_split import split
from protocol.speakable import speakable
from protocol.wire.validators import Value

#: 64 KiB of PCM: speech made as a whole is passed on in chunks of this size.
CHUNK_SAMPLES = 32_768
#: Steps of the model between two progress reports; counted in steps, so that a repeated run makes the same frames.
PROGRESS_STEPS = 5
#: The limit in `generate` of the voxcpm package: no piece has more steps.
MAX_STEPS = 4_096
#: Tokens for the package's marks, and for what merges at a seam.
SPARE_TOKENS = 8
#: Fewer tokens do not make a sentence: a prompt that leaves less room than this is rejected.
MIN_PIECE_TOKENS = 16
#: A description of the voice before the text, in the form that VoxCPM2 expects.
_LEAD = re.compile(r"\s*[(（][^()（）]{1,400}[)）]")
_BRACKETS = re.compile(r"[()（）]")
_SPACE = re.compile(r"\s+")


@attrs.frozen(kw_only=True)
class Speaker:
    """Speaks requests, one at a time.

    Args:
        model: a loaded model.
        prompts: finds the voice of a request.
    """

    model: SpeechModel
    prompts: Prompts

    def speak(
        self,
        params: Mapping[str, Value],
        inputs: Mapping[str, EngineInput],
        *,
        cancelled: Callable[[], bool],
        report: Callable[[ProgressChunk], None],
    ) -> Iterator[AudioChunk]:
        """Yield the audio of one request, at the model's rate, mono.

        In mode streaming, each chunk of the model is yielded as it is made: 80 or 160 ms. A text that the model
        accepts in one piece has exactly the samples that the voxcpm package makes of it with the same seed.

        Args:
            params: satisfy the schema.
            inputs: `prompt_wav`, `reference_wav`.
            cancelled: returns whether to stop; checked before each step of the model while nothing is yielded.
            report: receives progress, in mode non_streaming.

        Raises:
            InvalidParams: the params break a rule that the schema cannot express; every faulty field is named.
            EngineError: the model failed.
        """
        return self._speak(params, inputs, None, cancelled, report)

    def piecewise(
        self,
        params: Mapping[str, Value],
        inputs: Mapping[str, EngineInput],
        *,
        cancelled: Callable[[], bool],
        report: Callable[[ProgressChunk], None],
    ) -> Callable[[str], Iterator[AudioChunk]]:
        """A function that speaks the next piece of a text, as `speak` does, in the voice of the first.

        They are joined as the pieces of a long text are, but each fades out: nobody knows whether it is the last.
        """
        voice = _Voice()
        return lambda text: self._speak({**params, "text": text}, inputs, voice, cancelled, report)

    def _speak(
        self,
        params: Mapping[str, Value],
        inputs: Mapping[str, EngineInput],
        voice: "_Voice | None",
        cancelled: Callable[[], bool],
        report: Callable[[ProgressChunk], None],
    ) -> Iterator[AudioChunk]:
        values = {**DEFAULTS, **{name: value for name, value in params.items() if value is not None}}
        if faults := find_faults(values, inputs):
            raise InvalidParams(faults)
        settings = Settings(
            cfg_value=float(values["cfg_value"]),
            inference_timesteps=int(values["inference_timesteps"]),
            max_len=MAX_STEPS,
            retry_badcase=values["retry_badcase"],
            retry_badcase_max_times=int(values["retry_badcase_max_times"]),
            ratio_threshold=float(values["retry_badcase_ratio_threshold"]),
        )
        begins = voice is None or not voice.is_known
        try:
            if voice is None or begins:
                lead, text = self._lead_and_text(values)
                prompt = self.prompts.find(values, inputs, described=bool(lead), cancelled=cancelled, report=report)
            else:
                lead, text, prompt = voice.lead, self._normalized(values, values["text"]), voice.prompt
            run = _Run(
                model=self.model,
                settings=settings,
                pieces=self._pieces(lead, text, prompt, settings, goes_on=voice is not None),
                lead=lead,
                prompt=prompt,
                goes_on=voice is not None,
                cancelled=cancelled,
                report=report,
            )
            if begins:
                self.model.seed(int(values["seed"]))
            made = run.whole() if values["mode"] == NON_STREAMING else run.streamed()
            joined = join(made, len(run.pieces), self.model.sample_rate, begins=begins, ends=voice is None)
            with closing(joined) as speech:
                for samples in speech:
                    for start in range(0, len(samples), CHUNK_SAMPLES):
                        yield AudioChunk(pcm16(samples[start : start + CHUNK_SAMPLES]))
            if voice is not None:
                voice.is_known, voice.lead, voice.prompt = True, run.lead, run.prompt
        except Stopped:
            return

    def _lead_and_text(self, values: Mapping[str, Value]) -> tuple[str, str]:
        """The description of the voice, to be placed before each separate piece ("" for none), and the text."""
        text, description = values["text"], values.get("voice_description")
        if self.model.clones and description is None:
            found = _LEAD.match(text)
            if found is not None and speakable(text[found.end() :], symbols=False):
                # As with `voice_description`, so that the same words are the same speech, however they are sent.
                description, text = found[0], text[found.end() :].lstrip()
        text = self._normalized(values, text)
        if not self.model.clones or description is None:
            return "", text
        return f"({_BRACKETS.sub('', _spaced(description)).strip()})", text

    def _normalized(self, values: Mapping[str, Value], text: str) -> str:
        if values["normalize"]:
            text = self.model.normalize(_spaced(text))
            if not speakable(text, symbols=False):
                raise InvalidParams({"text": "contains nothing to speak once it is normalized"})
        return text

    def _pieces(
        self, lead: str, text: str, prompt: Prompt | None, settings: Settings, *, goes_on: bool = False
    ) -> list[str]:
        """`text` as one piece if the model accepts it with its prompt and the steps it may take; else in several.

        A voice that the model chose itself is kept by letting the later pieces continue from the first. The first is
        then their prompt, so each piece gets half the context; also if the text `goes_on` after these.
        """
        room = self.model.context - SPARE_TOKENS - (prompt.cache.patches if prompt else 0)
        tokens = self.model.tokens(lead + _spaced(text))
        share = room if prompt else room // 2
        if tokens + settings.most_steps(tokens) <= (share if goes_on else room):
            return [_spaced(text)]
        limit = int((share - SPARE_STEPS - SPARE_TOKENS) / (1 + settings.ratio_threshold)) - self.model.tokens(lead)
        if limit < MIN_PIECE_TOKENS:
            field = prompt.field if prompt else "voice_description"
            raise InvalidParams(
                {field: f"leaves too little of the {self.model.context} positions in the model's context; shorten it"}
            )

        def measure(piece: str) -> int:
            return self.model.tokens(_spaced(piece))

        # Line ends count as ends of sentences, so split the text with its white space unchanged.
        pieces = [_spaced(piece) for piece in split(text, limit, measure)]
        if max(map(measure, pieces)) > limit:
            raise InvalidParams({"text": "has a character with more combining marks than the model accepts"})
        return pieces


def _spaced(text: str) -> str:
    """Replace every run of white space by a single space, as the voxcpm package does."""
    return _SPACE.sub(" ", text)


@attrs.define
class _Voice:
    """What the pieces of a text that is spoken while it is written have in common, once the first has been spoken."""

    is_known: bool = False
    lead: str = ""
    prompt: Prompt | None = None


@attrs.define(kw_only=True)
class _Run:
    """The pieces of one request, as they are spoken.

    Request a piece only after the one before has ended: a model that speaks two at once corrupts both.
    """

    model: SpeechModel
    settings: Settings
    pieces: list[str]
    lead: str
    prompt: Prompt | None
    goes_on: bool
    cancelled: Callable[[], bool]
    report: Callable[[ProgressChunk], None]

    def streamed(self) -> Iterator[Iterator[NDArray[np.float32]]]:
        """Each piece as an iterator over its chunks, float32 of shape (n,)."""
        for number, piece in enumerate(self.pieces):
            text = self.lead + piece
            with closing(self.model.stream(text, self._cache, self.settings)) as speech:
                yield iter(speech)
                if self._goes_on(number):
                    self._go_on_from(speech.as_prompt(_before_next(text), None))

    def whole(self) -> Iterator[Iterator[NDArray[np.float32]]]:
        """Each piece as an iterator over one array."""
        for number, piece in enumerate(self.pieces):
            text = self.lead + piece
            speech = self.model.whole(text, self._cache, self.settings, self._on_step(number, text))
            yield iter([speech.samples])
            if self._goes_on(number):
                self._go_on_from(speech.as_prompt(_before_next(text), None))

    def _goes_on(self, number: int) -> bool:
        return number == 0 and self.prompt is None and (self.goes_on or len(self.pieces) > 1)

    @property
    def _cache(self) -> PromptCache | None:
        return self.prompt.cache if self.prompt else None

    def _go_on_from(self, prompt: PromptCache) -> None:
        self.prompt, self.lead = Prompt(prompt, "text"), ""

    def _on_step(self, number: int, text: str) -> Callable[[int], None]:
        """Called by the model at each of its steps: stops it once cancelled, and reports progress."""
        most = self.settings.most_steps(self.model.tokens(text))
        made = 0

        def on_step(_step: int) -> None:
            nonlocal made
            if self.cancelled():
                raise Stopped
            made += 1
            if made % PROGRESS_STEPS == 0:  # the count continues when a bad case is made again
                self.report(ProgressChunk("generating", (number + min(made / most, 1.0)) / len(self.pieces)))

        return on_step


def _before_next(text: str) -> str:
    """`text` as it precedes the next piece: the white space between two pieces belongs to neither."""
    wide = unicodedata.east_asian_width(text[-1]) in "WF"
    return text if wide or text[-1].isspace() else text + " "
