"""Reads the answer of a chat server: events as they come, or one JSON document. Pure."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from gpuworker.engines.base import EngineError
from gpuworker.engines.model_server.refusals import BUSY, ServerBusy, Words, client_words, owner_words
from protocol.wire.validators import Value

#: A longer event is none.
MAX_EVENT_BYTES = 4 * 1024 * 1024
_DONE = b"[DONE]"


class _NotAReply(EngineError):
    """The server sent something else than a reply, or than an error."""


class ChatAnswer:
    """The answer to one request.

    Args:
        words: how errors speak of the server.
        hide_key: takes the key out of what the server says of it.
        is_whole: it is one JSON document, and not events.

    Attributes:
        finish_reason: why the reply has ended; "" before.
        usage: tokens of the messages and of the reply; None if the server has not said.
        done: nothing follows.
        has_thought: the server has sent thoughts apart from the reply.
        deltas: how many pieces of reply or thoughts have come: at least as many tokens.
        fault: the server has reported an error, or sent something else; nothing that follows counts.
    """

    def __init__(self, words: Words, hide_key: Callable[[bytes], bytes], *, is_whole: bool) -> None:
        self.finish_reason = ""
        self.usage: tuple[int, int] | None = None
        self.done = False
        self.has_thought = False
        self.deltas = 0
        self.fault: EngineError | None = None
        self._words = words
        self._hide_key = hide_key
        self._is_whole = is_whole
        self._left = bytearray()

    def feed(self, data: bytes) -> str:
        """Append to the answer; returns what it adds to the reply, up to a `fault`."""
        self._left += data
        texts: list[str] = []
        try:
            if not self._is_whole:
                *lines, self._left = self._left.split(b"\n")
                for line in lines:
                    texts.append(self._event(bytes(line)))  # noqa: PERF401 - what comes before a fault counts
            if len(self._left) > MAX_EVENT_BYTES:
                raise EngineError(f"{self._words.server} sent more than {MAX_EVENT_BYTES} bytes at once")
        except EngineError as fault:
            self.fault = fault
        return "".join(texts)

    def finish(self) -> str:
        """What the end of the answer adds to the reply.

        Raises:
            EngineError: it ends in the middle of a reply, or is something else.
        """
        left, text = bytes(self._left), ""
        try:
            text = self._read(left) if self._is_whole else self._event(left)
        except _NotAReply:
            if self._is_whole:
                raise
        if self._is_whole or self.done:
            self.finish_reason = self.finish_reason or "stop"
        if not self.finish_reason:
            message = f"{self._words.server} ended its reply in the middle; send the request again"
            raise EngineError(message, retryable=True)
        self.done = True
        return text

    def _event(self, line: bytes) -> str:
        """One line of events. Every server writes an event's data in one."""
        if self.done or not line.startswith(b"data:"):
            return ""
        data = line[len(b"data:") :].strip()
        if data == _DONE:
            self.done = True
            return ""
        return self._read(data) if data else ""

    def _read(self, data: bytes) -> str:
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            fault = _NotAReply(f"{self._words.server} sent something that is no reply")
            fault.add_note(f"it sent: {owner_words(self._hide_key(data))}")
            raise fault
        if message.get("error"):
            raise self._error(message["error"], self._hide_key(data))
        if isinstance(usage := message.get("usage"), dict):
            prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
            if isinstance(prompt, int) and isinstance(completion, int) and prompt >= 0 and completion >= 0:
                self.usage = prompt, completion
        choices = message.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        return self._choice(choice) if isinstance(choice, dict) else ""

    def _choice(self, choice: dict[str, Any]) -> str:
        if isinstance(reason := choice.get("finish_reason"), str) and reason:
            self.finish_reason = reason[:64]
        said = choice.get("message" if self._is_whole else "delta")
        if not isinstance(said, dict):
            return ""
        thought = any(said.get(name) for name in ("reasoning_content", "reasoning", "thinking"))
        text = "".join(_texts(said.get("content"))) or "".join(_texts(said.get("refusal")))
        self.has_thought = self.has_thought or thought
        self.deltas += bool(thought or text)
        return text

    def _error(self, error: Value, data: bytes) -> EngineError:
        code = error.get("code") if isinstance(error, dict) else None
        said = client_words(data, self._words)
        fault: EngineError
        if code in BUSY:
            fault = ServerBusy(f"{self._words.server} is busy: {said}; try again later")
        else:
            fault = EngineError(f"{self._words.server} failed in its reply: {said or 'it does not say why'}")
        fault.add_note(f"it sent: {owner_words(data)}")
        return fault


def _texts(content: Value) -> Iterator[str]:
    """The text of a message: a string, or parts, of which some may be thoughts."""
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "text":
            part = part.get("text")
        if isinstance(part, str):
            yield part.encode("utf-8", "replace").decode()  # JSON can express half of a character
