"""Engine `openai`: speech by a server that speaks OpenAI's API, on the worker's own machine or network.

The relay's queue, with its positions and its way through NAT, stands in front of a server that has none. PCM is passed
on as it comes. What the server makes is its own business, so nothing is declared reproducible, nor to stream: a server
may make the whole speech before it sends any. While it is busy or away, a request waits in its slot for a while, and
then goes back to the relay's queue.

All slots share one process: each is a thread, and every connection is on a Trio loop of the engine's own (`upstream`),
which any number of threads may use.
"""

import copy
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

import attrs

from gpuworker.engines.base import (
    Capabilities,
    Chunk,
    Engine,
    EngineError,
    EngineInput,
    InvalidParams,
    Missing,
    Option,
    OptionError,
    OptionValue,
    ProgressChunk,
    RequestContext,
)
from gpuworker.engines.openai.audio_body import AudioBody, declared
from gpuworker.engines.openai.dialects import DIALECTS, Offer, Settings
from gpuworker.engines.openai.refusals import ServerBusy, refusal
from protocol.install_hint import install_command
from protocol.link.backoff import Backoff
from protocol.speakable import speakable
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value

if TYPE_CHECKING:
    from gpuworker.engines.openai.upstream import Exchange, Upstream

#: The longest pause before a busy server is asked again: at first, and later.
BUSY_FIRST_S = 0.25
BUSY_LONGEST_S = 4.0
NAP_S = 0.05
#: A list of models or voices; the server has nothing to make for it.
LIST_S = 10.0
NOBODY = RequestContext()
#: Names that `doctor` and refusals show.
MAX_TOLD = 12


class OpenAiEngine(Engine):
    """Asks a speech server; see the module's docstring."""

    SHARED = True
    SUMMARY: ClassVar[str] = "any OpenAI-compatible speech server on this network: -o url=http://127.0.0.1:8880/v1"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "url": Option(required=True, help="the server's address, up to /v1"),
        "model": Option(help="the server's name of the model; its only one if not given"),
        "voices": Option(
            help="voices to offer: a,b,c (the first is the default), or * for any; the server's if not given"
        ),
        "api_key_file": Option(help="file with the server's key"),
        "api": Option(default="openai", choices=tuple(DIALECTS), help="openai, or nanovllm for its own /generate"),
        "response_format": Option(default="pcm", choices=("pcm", "wav"), help="what to ask for: pcm, or wav"),
        "sample_rate": Option(
            kind=int, help="sample rate of its PCM, Hz; as its answer says, else 24000, if not given"
        ),
        "channels": Option(kind=int, default=1, help="channels of its PCM, 1 or 2; needs sample_rate"),
        "cloning": Option(kind=bool, default=False, help="accept recordings of a voice"),
        "extra": Option(help='more fields of each request, as JSON: {"language":"English"}; null leaves one out'),
        "wait_s": Option(
            kind=float, default=30.0, help="how long a request waits in its slot while the server is busy"
        ),
        "silence_s": Option(kind=float, default=60.0, help="how long the server may be silent before it is given up"),
    }

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        super().__init__(options)
        self._dialect = DIALECTS[str(self.options["api"])]
        self._url = _checked_url(str(self.options["url"] or ""))
        for name, least in (("wait_s", 0.0), ("silence_s", 0.1)):
            if not least <= float(self.options[name] or 0) < float("inf"):
                raise OptionError(f"-o {name}={self.options[name]}: must be a number of seconds, {least:g} or more")
        given = [voice.strip() for voice in str(self.options["voices"] or "").split(",")]
        voices = tuple(dict.fromkeys(filter(None, given)))
        self._settings = Settings(
            model=str(self.options["model"]) if self.options["model"] else None,
            voices=None if voices == ("*",) else voices,
            default_voice=voices[0] if voices and voices != ("*",) else None,
            response_format=str(self.options["response_format"]),
            cloning=bool(self.options["cloning"]),
            extra=_extra(self.options["extra"]),
        )
        self._fixed: AudioFormat | None = None
        if self.options["sample_rate"] is not None:
            try:
                self._fixed = AudioFormat(
                    sample_rate=int(self.options["sample_rate"]), channels=int(self.options["channels"] or 0)
                )
            except ValueError as fault:
                raise OptionError(f"-o {fault}") from None
        self._server: Upstream | None = None
        self._capabilities = Capabilities()

    @classmethod
    def missing(cls) -> list[Missing]:
        """The HTTP client."""
        if importlib.util.find_spec("httpx2"):
            return []
        return [Missing("the httpx2 package", install_command("openai"))]

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
        said = [f"{engine._url} answers"]
        for what, names in (("models", offer.models), ("voices", offer.voices or ())):
            said.append(f"{what}: {_listed(names)}" if names else f"it lists no {what}")
        model = engine._settings.model
        if model and offer.models and model not in offer.models:
            said.append(f"it does not list model {model}")
        return "; ".join(said)

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
        if chosen.model is None:
            chosen = attrs.evolve(chosen, model=next(iter(offer.models), None))
        elif chosen.model and offer.models and chosen.model not in offer.models:
            print(f"{self._url} does not list model {chosen.model}; it lists {_listed(offer.models)}", file=sys.stderr)
        if chosen.voices == ():
            chosen = attrs.evolve(chosen, voices=offer.voices)
        self._settings = chosen
        self._capabilities = Capabilities(
            format=self._fixed or offer.format,
            late_format=self._fixed is None,
            params=self._dialect.params(chosen),
            inputs=self._dialect.inputs(chosen),
        )

    def seats(self, count: int) -> Sequence[Engine]:
        """Engines that share the HTTP client."""
        return [copy.copy(self) for _ in range(count)]

    def _connect(self) -> Offer:
        """Start the HTTP client, and ask what the server has."""
        if self.missing():
            raise EngineError(f"the httpx2 package is not installed: {install_command('openai')}")
        from gpuworker.engines.openai.upstream import Upstream  # here, for `gpuworker engines` needs no Trio

        key = _key(self.options["api_key_file"])
        self._server = Upstream(self._url, key, float(self.options["silence_s"] or 0))
        self._server.open()
        try:
            offer = self._dialect.offer(self._ask, self._settings)
            if self._settings.model is None and self._dialect.NAMES_MODEL and len(offer.models) > 1:
                raise EngineError(f"{self._url} has several models, choose one: -o model=… {_listed(offer.models)}")
            return offer
        except BaseException:
            self.close()
            raise

    def _ask(self, path: str, query: Mapping[str, str]) -> Value:
        """The document at a path; None if the server has none there.

        Raises:
            EngineError: the server does not answer, is not ready, or refuses the key.
        """
        assert self._server is not None
        try:
            with self._server.ask("GET", path, query=query) as answer:
                head = answer.head(time.monotonic() + LIST_S)
                body = b"" if head is None else answer.read_text()
        except EngineError as fault:
            raise EngineError(f"{self._url}: {_for_owner(fault)}") from None
        if head is None:
            raise EngineError(f"{self._url} does not answer: it was silent for {LIST_S:g} s")
        if head.status in (401, 403, 429) or head.status >= 500 or 300 <= head.status < 400:
            raise EngineError(f"{self._url}: {_for_owner(refusal(head.status, head.headers, body))}")
        try:
            return json.loads(body) if head.status == 200 else None
        except (ValueError, RecursionError):
            return None

    def close(self) -> None:
        """End the HTTP client."""
        if self._server is not None:
            self._server.close()
            self._server = None

    # -- a run

    def generate(
        self, params: dict[str, Value], inputs: Mapping[str, EngineInput], context: RequestContext = NOBODY
    ) -> Iterator[Chunk]:
        """Yield the audio as the server sends it."""
        faults = {} if speakable(params["text"]) else {"text": "contains nothing to speak"}
        if faults := faults | self._dialect.faults(params, inputs):
            raise InvalidParams(faults)
        body = self._dialect.body(params, inputs, self._settings)
        server = self._server
        assert server is not None
        until = time.monotonic() + float(self.options["wait_s"] or 0)
        pauses = Backoff(BUSY_FIRST_S, BUSY_LONGEST_S)
        while not self.cancelled():
            try:
                with server.ask("POST", self._dialect.SPEECH, body, cancelled=self.cancelled) as answer:
                    yield from self._speech(answer)
                return
            except EngineError as fault:
                if not isinstance(fault, ServerBusy) or time.monotonic() >= until:
                    print(f"request {context.request_id[:8]}: {_for_owner(fault)}", file=sys.stderr, flush=True)
                    raise
                self.report(ProgressChunk("loading", 0.0, "the speech server is busy"))
                self._wait(min((fault.retry_after_s or 0.0) + pauses.next_s(), until - time.monotonic()))

    def _wait(self, wait_s: float) -> None:
        due = time.monotonic() + wait_s
        while (left := due - time.monotonic()) > 0 and not self.cancelled():
            time.sleep(min(left, NAP_S))

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
            raise refusal(head.status, head.headers, answer.read_text())
        expected = self._capabilities.format
        assert expected is not None
        body = AudioBody(found, expected, fixed=self._fixed is not None)
        for data in answer.pieces():
            yield from body.feed(data)
        if not self.cancelled():
            yield from body.end()


def _checked_url(url: str) -> str:
    """The server's address without a slash at its end.

    Raises:
        OptionError: it is none, or holds what belongs elsewhere: it is shown in logs.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # its port is none
        parts, usable = urlsplit(""), False
    if not usable:
        raise OptionError("-o url=…: write the server's address up to /v1, such as http://127.0.0.1:8880/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise OptionError("-o url=…: leave out user, password and query; a key goes into -o api_key_file")
    url = url.rstrip("/")
    for path in (dialect.SPEECH for dialect in DIALECTS.values() if url.endswith(dialect.SPEECH)):
        raise OptionError(f"-o url={url}: leave out {path}")
    return url


def _extra(given: OptionValue) -> dict[str, Value]:
    try:
        extra = json.loads(str(given)) if given else {}
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise OptionError(f'-o extra={given}: write a JSON object, such as {{"language":"English"}}')
    return extra


def _key(path: OptionValue) -> str | None:
    if not path:
        return None
    try:
        key = Path(str(path)).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as fault:
        why = fault.strerror if isinstance(fault, OSError) else "it is not text"
        raise EngineError(f"-o api_key_file={path} cannot be read: {why}") from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise EngineError(f"-o api_key_file={path}: must contain one key, and nothing else")
    return key


def _for_owner(fault: EngineError) -> str:
    """An error with what only the worker's owner may read."""
    return " | ".join([str(fault), *getattr(fault, "__notes__", ())])


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - MAX_TOLD} more" if len(names) > MAX_TOLD else ""
    return ", ".join(names[:MAX_TOLD]) + more
