"""The base of engines in front of a model's server, on the worker's own machine or network.

The relay's queue, with its positions and its way through NAT, stands in front of a server that has none. What the
server makes is its own business, so nothing is declared reproducible, nor to stream: a server may make all of it
before it sends any. While it is busy or away, a request waits in its slot for a while, and then goes back to the
relay's queue.

All slots share one process: each is a thread, and every connection is on a Trio loop of the engine's own (`upstream`),
which any number of threads may use.
"""

import copy
import importlib.util
import json
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

from gpuworker.engines.base import (
    Chunk,
    Engine,
    EngineError,
    Missing,
    Option,
    OptionError,
    OptionValue,
    ProgressChunk,
    RequestContext,
)
from gpuworker.engines.model_server.refusals import ServerBusy, Words, refusal
from protocol.install_hint import install_command
from protocol.link.backoff import Backoff
from protocol.wire.validators import Value

if TYPE_CHECKING:
    from gpuworker.engines.model_server.upstream import Exchange, Upstream

#: The longest pause before a busy server is asked again: at first, and later.
BUSY_FIRST_S = 0.25
BUSY_LONGEST_S = 4.0
NAP_S = 0.05
#: A list of models or voices; the server has nothing to make for it.
LIST_S = 10.0
NOBODY = RequestContext()
#: Names that `doctor` and refusals show.
MAX_TOLD = 12
MAX_NAME_CHARS = 256

WAIT = Option(kind=float, default=30.0, help="how long a request waits in its slot while the server is busy")
SILENCE = Option(kind=float, default=60.0, help="how long the server may be silent before it is given up")
KEY_FILE = Option(help="file with the server's key")


class ModelServerEngine(Engine):
    """Asks a server; its options include `url`, `model`, `api_key_file`, `wait_s` and `silence_s`."""

    SHARED = True
    #: How errors speak of the server.
    WORDS: ClassVar[Words]

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        super().__init__(options)
        self.url = _checked_url(str(self.options["url"] or ""), self.paths)
        for name, least in (("wait_s", 0.0), ("silence_s", 0.1)):
            if not least <= float(self.options[name] or 0) < float("inf"):
                raise OptionError(f"-o {name}={self.options[name]}: must be a number of seconds, {least:g} or more")
        self._server: Upstream | None = None

    @property
    @abstractmethod
    def paths(self) -> Sequence[str]:
        """What the engine appends to the server's URL, and its owner may have given by mistake."""

    @classmethod
    def missing(cls) -> list[Missing]:
        """The HTTP client."""
        if importlib.util.find_spec("httpx2"):
            return []
        return [Missing("the httpx2 package", install_command("openai"))]

    def seats(self, count: int) -> Sequence[Engine]:
        """Engines that share the HTTP client."""
        return [copy.copy(self) for _ in range(count)]

    # -- loading

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Start the HTTP client, and end it again if the block fails.

        Raises:
            EngineError: it is not installed, or the key cannot be read.
        """
        if self.missing():
            raise EngineError(f"the httpx2 package is not installed: {install_command('openai')}")
        from gpuworker.engines.model_server.upstream import Upstream  # here, for `gpuworker engines` needs no Trio

        key = _key(self.options["api_key_file"])
        self._server = Upstream(self.url, key, float(self.options["silence_s"] or 0), self.WORDS.server)
        self._server.open()
        with ExitStack() as stack:
            stack.callback(self.close)
            yield
            stack.pop_all()

    def ask(self, path: str, query: Mapping[str, str]) -> Value:
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
            raise EngineError(f"{self.url}: {_for_owner(fault)}") from None
        if head is None:
            raise EngineError(f"{self.url} does not answer: it was silent for {LIST_S:g} s")
        if head.status in (401, 403, 429) or head.status >= 500 or 300 <= head.status < 400:
            raise EngineError(f"{self.url}: {_for_owner(refusal(self.WORDS, head.status, head.headers, body))}")
        try:
            return json.loads(body) if head.status == 200 else None
        except (ValueError, RecursionError):
            return None

    def choose_model(self, models: Sequence[str]) -> str | None:
        """The server's model: the one that was given, or the only one that it lists; None if it lists none.

        Raises:
            EngineError: it lists several.
        """
        if self.options["model"]:
            return str(self.options["model"])
        if len(models) > 1:
            raise EngineError(f"{self.url} has several models, choose one: -o model=… {listed(models)}")
        return next(iter(models), None)

    def unlisted(self, models: Sequence[str]) -> str:
        """What to tell the worker's owner if the server does not list the model that was given; "" if it does."""
        given = self.options["model"]
        return f"it does not list model {given}" if given and models and given not in models else ""

    def hide_key(self, data: bytes) -> bytes:
        """Take the key out of what the server says of it."""
        assert self._server is not None
        return self._server.hide_key(data)

    def close(self) -> None:
        """End the HTTP client."""
        if self._server is not None:
            self._server.close()
            self._server = None

    # -- a run

    def post(
        self, path: str, body: Value, context: RequestContext, read: Callable[["Exchange"], Iterator[Chunk]]
    ) -> Iterator[Chunk]:
        """Yield what `read` makes of the answer; ask again while the server is busy.

        Raises:
            EngineError: what `read` raises. `ServerBusy` means that it has yielded nothing yet.
        """
        server = self._server
        assert server is not None
        until = time.monotonic() + float(self.options["wait_s"] or 0)
        pauses = Backoff(BUSY_FIRST_S, BUSY_LONGEST_S)
        while not self.cancelled():
            try:
                with server.ask("POST", path, body, cancelled=self.cancelled) as answer:
                    yield from read(answer)
                return
            except EngineError as fault:
                if not isinstance(fault, ServerBusy) or time.monotonic() >= until:
                    print(f"request {context.request_id[:8]}: {_for_owner(fault)}", file=sys.stderr, flush=True)
                    raise
                self.report(ProgressChunk("loading", 0.0, f"{self.WORDS.server} is busy"))
                self._wait(min((fault.retry_after_s or 0.0) + pauses.next_s(), until - time.monotonic()))

    def _wait(self, wait_s: float) -> None:
        due = time.monotonic() + wait_s
        while (left := due - time.monotonic()) > 0 and not self.cancelled():
            time.sleep(min(left, NAP_S))


def _checked_url(url: str, paths: Sequence[str]) -> str:
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
    for path in (path for path in paths if url.endswith(path)):
        raise OptionError(f"-o url={url}: leave out {path}")
    return url


def read_extra(given: OptionValue) -> dict[str, Value]:
    """The fields in option `extra`.

    Raises:
        OptionError: it is no JSON object.
    """
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


def listed(names: Sequence[str]) -> str:
    """Names in a row, not too many."""
    more = f" and {len(names) - MAX_TOLD} more" if len(names) > MAX_TOLD else ""
    return ", ".join(names[:MAX_TOLD]) + more


def names_in(found: Value) -> tuple[str, ...]:
    """The names in a list of models or voices: `{"data": [{"id": …}]}`, `{"voices": ["…"]}`, `[{"name": …}]`, …"""
    return tuple(dict.fromkeys(name for name in _names(found) if 0 < len(name) <= MAX_NAME_CHARS))


def _names(found: Value) -> Iterator[str]:
    if isinstance(found, dict):
        found = next((found[key] for key in ("data", "models", "voices") if key in found), None)
        found = list(found) if isinstance(found, dict) else found
    for item in found if isinstance(found, list) else ():
        if isinstance(item, dict):
            item = next((item[key] for key in ("id", "voice_id", "name", "voice") if key in item), None)
        if isinstance(item, str):
            yield item


def without_nulls(sent: Mapping[str, Value]) -> dict[str, Value]:
    """The fields of a body that have a value."""
    return {name: value for name, value in sent.items() if value is not None}
