"""Engine `eliza`: answers in a conversation by rules, in English and Chinese, without a model.

It makes a language space out of nothing, for a first try, for demonstrations and for tests. A reply is a pure function
of the messages and the seed, put out a word at a time, at the pace of somebody who types. It knows what was said
earlier in the conversation: "What number did I tell you?" It can tell a story and count, which take a while.
"""

import copy
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from gpuworker.engines.base import (
    Capabilities,
    Chunk,
    Engine,
    EngineInput,
    Option,
    OptionError,
    OptionValue,
    OutputChunk,
)
from gpuworker.engines.eliza.reply import pieces, reply
from gpuworker.engines.language import INPUTS, cut_at_stop, last_output, messages_of, params_schema
from protocol.wire.validators import Value

#: Longest pause between two words: a shared engine that is silent for 10 s is taken for a hung one.
MAX_PACE_MS = 5_000
NAP_S = 0.02


class ElizaEngine(Engine):
    """Answers by rules; see the module's docstring."""

    SUMMARY: ClassVar[str] = "a conversation by rules, in English and Chinese; no weights, no GPU"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "pace_ms": Option(kind=int, default=40, help="pause between two words"),
    }
    SHARED = True
    default_slots = 8

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        super().__init__(options)
        self._pace_s = int(self.options["pace_ms"] or 0) / 1000
        if not 0 <= self._pace_s <= MAX_PACE_MS / 1000:
            raise OptionError(f"-o pace_ms={self.options['pace_ms']}: must be 0 to {MAX_PACE_MS}")
        self._capabilities = Capabilities()

    @property
    def capabilities(self) -> Capabilities:
        """The params of a language space; each word is the same wherever the same rules are."""
        return self._capabilities

    def load(self) -> None:
        """Read its own rules, by which other workers know whether theirs are the same."""
        digest = hashlib.sha256()
        for file in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(file.read_bytes())
        self._capabilities = Capabilities(
            streams=True,
            reproducible=True,
            fingerprint=f"rules {digest.hexdigest()[:16]}",
            params=params_schema(),
            inputs=INPUTS,
        )

    def seats(self, count: int) -> Sequence[Engine]:
        """Engines that share the rules."""
        return [copy.copy(self) for _ in range(count)]

    def generate(self, params: dict[str, Value], inputs: Mapping[str, EngineInput]) -> Iterator[Chunk]:
        """Yield the reply, a word at a time, and what it was."""
        messages = messages_of(params, inputs)
        words = pieces(cut_at_stop(reply(messages, params.get("seed") or 0), params.get("stop") or ()))
        most = params.get("max_tokens") or len(words)
        due = time.monotonic()
        for word in words[:most]:
            self._sleep_until(due)
            yield OutputChunk(word)
            due += self._pace_s
        prompt = sum(len(pieces(message.content)) for message in messages)
        yield last_output("length" if len(words) > most else "stop", (prompt, min(most, len(words))))

    def _sleep_until(self, due: float) -> None:
        while (left := due - time.monotonic()) > 0 and not self.cancelled():
            time.sleep(min(left, NAP_S))
