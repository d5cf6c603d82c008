"""What a scripted server answers to engine `chat`; and the engine in front of it."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gpuworker.engines.base import Chunk, EngineInput, OutputChunk
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.chat.engine import ChatEngine
from gpuworker.slots.run_engine import RunResult, run_engine
from tests.gpuworker.engines.openai.speech_server import Call, Script

EVENTS = "Content-Type: text/event-stream; charset=utf-8"
HELLO = [{"role": "user", "content": "Hello."}]


def event(told: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(told, ensure_ascii=False).encode() + b"\n\n"


def delta(text: Any = None, finish_reason: str | None = None, **more: Any) -> bytes:
    """A piece of a reply."""
    said = more if text is None else more | {"content": text}
    choice = {"index": 0, "delta": said, "finish_reason": finish_reason}
    return event({"id": "c", "object": "chat.completion.chunk", "choices": [choice]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}})
DONE = b"data: [DONE]\n\n"
END = [delta(finish_reason="stop"), USAGE, DONE]


def says(*texts: str) -> Script:
    """A script: a reply in these pieces, one event each."""
    return streams(delta("", role="assistant"), *map(delta, texts), *END)


def streams(*pieces: bytes) -> Script:
    """A script: these bytes, in chunks."""
    return lambda call: call.stream(list(pieces), EVENTS)


def answers(told: Any) -> Script:
    """A script: one document of JSON."""
    return lambda call: call.answer(json.dumps(told).encode(), "200 OK", "Content-Type: application/json")


def breaks_off(*pieces: bytes) -> Script:
    """A script: these bytes, and the connection is cut."""

    def script(call: Call) -> None:
        call.head("200 OK", "Transfer-Encoding: chunked", EVENTS)
        for piece in pieces:
            call.chunk(piece)
        call.reset()

    return script


@contextlib.contextmanager
def an_engine(url: str, *given: str) -> Iterator[ChatEngine]:
    """A loaded engine in front of a server."""
    engine = ChatEngine(parse_options(ChatEngine.OPTIONS, [f"url={url}", "wait_s=0", *given]))
    try:
        engine.load()
        yield engine
    finally:
        engine.close()


def run(
    engine: ChatEngine,
    params: Mapping[str, Any] | None = None,
    *,
    inputs: Mapping[str, EngineInput] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    chunks: list[Chunk] | None = None,
) -> tuple[RunResult, list[Chunk]]:
    """What the engine makes of one request, through the loop that every slot uses."""
    chunks = [] if chunks is None else chunks
    params = {} if inputs else {"messages": HELLO} | dict(params or {})
    return run_engine(engine, params, inputs or {}, cancelled, chunks.append), chunks


def texts(chunks: list[Chunk]) -> list[str]:
    return [chunk.data for chunk in chunks if isinstance(chunk, OutputChunk) and isinstance(chunk.data, str)]


def last(chunks: list[Chunk]) -> Any:
    end = chunks[-1]
    assert isinstance(end, OutputChunk)
    return end.data
