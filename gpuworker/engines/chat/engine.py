"""Engine `chat`: replies of a language model whose server speaks OpenAI's chat API, on the worker's machine or network.

vLLM, SGLang, llama.cpp, Ollama and LM Studio are such servers, and so is another relay. The reply is passed on as it is
written. What the model thinks before is never put out, whether its server tells thoughts apart (`reasoning_content`,
`reasoning`) or leaves them in the text (`<think>…</think>`). A cancel closes the connection to the server.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from gpuworker.engines.base import (
    Capabilities,
    Chunk,
    EngineError,
    EngineInput,
    Option,
    OptionError,
    OptionValue,
    OutputChunk,
    ProgressChunk,
    RequestContext,
)
from gpuworker.engines.chat.answer import ChatAnswer
from gpuworker.engines.chat.hidden import ShownText
from gpuworker.engines.language import INPUTS, last_output, messages_of, params_schema
from gpuworker.engines.model_server.engine import (
    KEY_FILE,
    NOBODY,
    SILENCE,
    WAIT,
    ModelServerEngine,
    listed,
    names_in,
    read_extra,
    without_nulls,
)
from gpuworker.engines.model_server.refusals import ServerBusy, Words, refusal
from protocol.wire.validators import Value

if TYPE_CHECKING:
    from gpuworker.engines.model_server.upstream import Exchange

COMPLETIONS = "/chat/completions"
#: For what follows the end of a reply: how many tokens it was.
TAIL_S = 2.0
#: Of one output, whose limit is 1 MiB.
MAX_PIECE_CHARS = 64 * 1024
_SENT = ("temperature", "top_p", "max_tokens", "stop", "seed")


class ChatEngine(ModelServerEngine):
    """Asks a chat server; see the module's docstring."""

    SUMMARY: ClassVar[str] = "any OpenAI-compatible language model on this network: -o url=http://127.0.0.1:11434/v1"
    WORDS = Words(server="the model's server", makes="a reply", knows="the model or the path")
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "url": Option(required=True, help="the server's address, up to /v1"),
        "model": Option(help="the server's name of the model; its only one if not given"),
        "api_key_file": KEY_FILE,
        "max_tokens": Option(kind=int, help="longest reply, whatever a request says; the server's own if not given"),
        "thinks_first": Option(
            kind=bool, default=False, help="true: replies begin with thoughts, and lack the tag that begins them"
        ),
        "extra": Option(help='more fields of each request, as JSON: {"top_k":40}; null leaves one out'),
        "wait_s": WAIT,
        "silence_s": SILENCE,
    }
    default_slots = 4

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        super().__init__(options)
        self._extra = read_extra(self.options["extra"])
        self._most = None if self.options["max_tokens"] is None else int(self.options["max_tokens"])
        if self._most is not None and self._most < 1:
            raise OptionError(f"-o max_tokens={self._most}: must be 1 or more")
        self._model: str | None = None

    @property
    def paths(self) -> Sequence[str]:
        """Where replies are made."""
        return (COMPLETIONS,)

    @classmethod
    def outlook(cls, options: Mapping[str, OptionValue], slots: int) -> str:
        """What the server says it has.

        Raises:
            EngineError: it does not answer, or refuses.
        """
        del slots
        engine = cls(options)
        models = engine._connect()
        engine.close()
        said = f"models: {listed(models)}" if models else "it lists no models"
        return "; ".join(filter(None, (f"{engine.url} answers", said, engine.unlisted(models))))

    @property
    def capabilities(self) -> Capabilities:
        """The params of a language space. A model may think for long before its first word, so it does not stream."""
        return Capabilities(params=params_schema(), inputs=INPUTS)

    # -- loading

    def load(self) -> None:
        """Ask the server what it has.

        Raises:
            EngineError: it does not answer, or refuses; the slots try again.
        """
        models = self._connect()
        self._model = self.choose_model(models)
        if warning := self.unlisted(models):
            print(f"{self.url}: {warning}; it lists {listed(models)}", file=sys.stderr)

    def _connect(self) -> tuple[str, ...]:
        """Start the HTTP client, and ask for the server's models."""
        with self.opening():
            models = names_in(self.ask("/models", {}))
            self.choose_model(models)
        return models

    # -- a run

    def generate(
        self, params: dict[str, Value], inputs: Mapping[str, EngineInput], context: RequestContext = NOBODY
    ) -> Iterator[Chunk]:
        """Yield the reply as the server sends it, and what it was."""
        limits = [most for most in (params.get("max_tokens"), self._most) if most is not None]
        asked = {name: params.get(name) for name in _SENT} | {"max_tokens": min(limits, default=None)}
        asked["stop"] = asked["stop"] or None
        body = {
            "model": self._model,
            "messages": [{"role": message.role, "content": message.content} for message in messages_of(params, inputs)],
            "stream": True,
            "stream_options": {"include_usage": True},
        }

        def read(answer: "Exchange") -> Iterator[Chunk]:
            return self._reply(answer, asked)

        yield from self.post(COMPLETIONS, without_nulls(body | asked | self._extra), context, read)

    def _reply(self, answer: "Exchange", asked: Mapping[str, Value]) -> Iterator[Chunk]:
        """The reply of one answer.

        Raises:
            ServerBusy: the server has not begun, and may later.
            EngineError: it refuses, failed, or sent something else; or the connection was lost.
        """
        head = answer.head()
        if head is None:
            return
        kind = head.headers.get("content-type", "").partition(";")[0].strip().lower()
        if head.status != 200 or kind not in ("text/event-stream", "application/json"):
            raise refusal(self.WORDS, head.status, head.headers, answer.read_text())
        parsed = ChatAnswer(self.WORDS, self.hide_key, is_whole=kind == "application/json")
        shown = ShownText(thinks_first=bool(self.options["thinks_first"]))
        has_begun = has_told_thoughts = False
        try:
            for text in self._texts(answer, parsed, asked["max_tokens"]):
                for piece in _cut(shown.add(text)):
                    has_begun = True
                    yield OutputChunk(piece)
                if (parsed.has_thought or shown.has_thought) and not (has_begun or has_told_thoughts):
                    has_told_thoughts = True
                    self.report(ProgressChunk("generating", 0.0, "the model thinks"))
        except ServerBusy as fault:
            if not has_begun:
                raise
            raise EngineError(fault.message, retryable=True) from None
        if self.cancelled():
            return
        if piece := shown.finish():
            has_begun = True
            yield OutputChunk(piece)
        if not has_begun and not (asked["stop"] and parsed.finish_reason == "stop"):
            raise self._nothing(parsed, shown)
        yield last_output(parsed.finish_reason, parsed.usage)

    def _texts(self, answer: "Exchange", parsed: ChatAnswer, most: int | None) -> Iterator[str]:
        """What the answer adds to the reply, piece by piece, until its end."""
        for data in answer.pieces():
            yield parsed.feed(data)
            if parsed.finish_reason or parsed.done:
                break
            if parsed.fault is not None:
                raise parsed.fault
            if most is not None and parsed.deltas > most:  # the server does not keep to it
                parsed.finish_reason = "length"
                return
        if self.cancelled():
            return
        with contextlib.suppress(EngineError):  # the reply is whole, and may be told so
            for data in answer.pieces(0.0 if parsed.done or not parsed.finish_reason else time.monotonic() + TAIL_S):
                yield parsed.feed(data)
                if parsed.done:
                    break
        yield parsed.finish()

    def _nothing(self, parsed: ChatAnswer, shown: ShownText) -> EngineError:
        if not (parsed.has_thought or shown.has_thought):
            return EngineError("the model answered nothing; ask it in other words")
        if parsed.finish_reason == "length":
            return EngineError("the model thought until its tokens were used up; raise max_tokens")
        return EngineError("the model thought, and answered nothing; ask it in other words")


def _cut(text: str) -> Iterator[str]:
    return (text[at : at + MAX_PIECE_CHARS] for at in range(0, len(text), MAX_PIECE_CHARS))
