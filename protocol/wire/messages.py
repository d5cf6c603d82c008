"""Every message of `relay.v1.msgpack` as a frozen class; `docs/protocol.md` describes the same in prose.

A class has its wire name in `TYPE` and its fields, in wire order, as attrs fields whose validators enforce the limits.
Unknown keys are dropped when decoding, `None` is left out when encoding. The tables at the end of the module say which
end may send which message.
"""

import re
from collections.abc import Mapping
from typing import ClassVar

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import MAX_MESSAGE_BYTES as MAX_MESSAGE_BYTES
from protocol.wire.frames import MAX_PCM_BYTES as MAX_PCM_BYTES
from protocol.wire.frames import MAX_TEXT_CHARS as MAX_TEXT_CHARS
from protocol.wire.frames import PROGRESS_STATES as PROGRESS_STATES
from protocol.wire.frames import Audio as Audio
from protocol.wire.frames import Cancelled as Cancelled
from protocol.wire.frames import Completed as Completed
from protocol.wire.frames import Failed as Failed
from protocol.wire.frames import Frame as Frame
from protocol.wire.frames import Output as Output
from protocol.wire.frames import Progress as Progress
from protocol.wire.frames import Started as Started
from protocol.wire.frames import Video as Video
from protocol.wire.structs import ID_PATTERN as ID_PATTERN
from protocol.wire.structs import KIB as KIB
from protocol.wire.structs import AudioFormat as AudioFormat
from protocol.wire.structs import InputInfo as InputInfo
from protocol.wire.structs import InputRule as InputRule
from protocol.wire.structs import Running as Running
from protocol.wire.structs import VideoFormat as VideoFormat
from protocol.wire.structs import attempt_rule, input_name_rule, request_id_rule, seq_rule
from protocol.wire.validators import Message as Message
from protocol.wire.validators import (
    Value,
    array_field,
    array_of,
    binary,
    boolean,
    choice,
    field,
    integer,
    map_field,
    mapping,
    number,
    optional,
    struct_field,
    struct_list_field,
    struct_map_field,
    text,
)

PROTOCOL_VERSION = 1
SUBPROTOCOL = "relay.v1.msgpack"
PATH = "/v1/relay"

#: Largest size of every message except those of `BULK` types.
MAX_CONTROL_BYTES = 64 * KIB
#: `data` of one `input` message: small enough that an upload and live audio share a link fairly.
MAX_INPUT_CHUNK_BYTES = 256 * KIB
#: Bytes of a live input that may be sent beyond its latest `input_ack`, client to relay and relay to worker.
MAX_UNACKED_BYTES = 256 * KIB
#: `output` of a `report`: a traceback and the lines before it.
MAX_REPORT_CHARS = 4096

#: Most requests that one `find` is told of.
MAX_FOUND = 1_000
PREFIX_PATTERN = re.compile(r"[0-9a-f]{0,32}")

SPACE_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

ROLES = ("client", "worker", "operator")
RETRY_POLICIES = ("never", "before_output", "always")
LIVE_STATES = ("uploading", "queued", "running")
ENDED_STATES = ("completed", "failed", "cancelled")

_space = text(64, SPACE_PATTERN, "a space name ([A-Za-z0-9][A-Za-z0-9._-]{0,63})")
_code = text(64)
_words = text(MAX_TEXT_CHARS)


# -- both ways -


@attrs.frozen(kw_only=True)
class Hello(Message):
    """The first message of every connection, due within 3 s (the relay's `limits.hello_timeout_s`)."""

    TYPE: ClassVar[str] = "hello"
    version: int = field(integer(1, 1_000))
    role: str = field(choice(*ROLES))
    token: str | None = field(optional(text(256)), None, secret=True)
    agent: str = field(text(128), "")
    #: Asks for an operator's connection that may watch but not steer; the relay enforces it.
    readonly: bool = field(boolean, False)
    #: Knows `video` frames; a client that does not is sent others in their place.
    video: bool | None = field(optional(boolean), None)


@attrs.frozen(kw_only=True)
class Ping(Message):
    """Asks for a `pong`; liveness itself uses WebSocket pings."""

    TYPE: ClassVar[str] = "ping"
    timestamp: float = field(number())


@attrs.frozen(kw_only=True)
class Pong(Message):
    """Answers a `ping` with its own timestamp and the server's clock (Unix seconds)."""

    TYPE: ClassVar[str] = "pong"
    timestamp: float = field(number())
    server_time: float | None = field(optional(number()), None)


@attrs.frozen(kw_only=True)
class Error(Message):
    """Reports that the peer broke a rule. The connection closes after every code except `unknown_type`."""

    TYPE: ClassVar[str] = "error"
    code: str = field(_code)
    message: str = field(_words)
    details: dict[str, Value] = map_field()
    request_id: str | None = field(optional(text(128)), None)


@attrs.frozen(kw_only=True)
class Input(Message):
    """A piece of an input, in order and without gaps; client to relay, and relay to worker after `assign`.

    `last`: the live input ends with this piece, which may be empty.
    """

    TYPE: ClassVar[str] = "input"
    request_id: str = field(request_id_rule)
    name: str = field(input_name_rule)
    offset: int = field(integer(0))
    data: bytes = field(binary(MAX_INPUT_CHUNK_BYTES))
    last: bool | None = field(optional(boolean), None)


@attrs.frozen(kw_only=True)
class InputAck(Message):
    """The bytes of a live input below `offset` need not be sent again; relay to client, and worker to relay.

    From the relay: they are in its store, and with `last` so is the end. With `again` it had no room for what was sent
    beyond: send that again. From a worker: the engine of `attempt` has taken them.
    """

    TYPE: ClassVar[str] = "input_ack"
    request_id: str = field(request_id_rule)
    attempt: int = field(attempt_rule, 0)
    name: str = field(input_name_rule)
    offset: int = field(integer(0))
    last: bool | None = field(optional(boolean), None)
    again: bool | None = field(optional(boolean), None)


@attrs.frozen(kw_only=True)
class Cancel(Message):
    """Asks to stop a request; client to relay, and relay to worker."""

    TYPE: ClassVar[str] = "cancel"
    request_id: str = field(request_id_rule)
    reason: str = field(_words, "")


# -- from the relay ----------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Welcome(Message):
    """Confirms the login."""

    TYPE: ClassVar[str] = "welcome"
    connection_id: str = field(text(64))
    principal: str = field(text(128))
    limits: dict[str, Value] = map_field()
    ping_interval_s: float = field(number(0.01, 3600), 5.0)
    server: str = field(text(128), "")


@attrs.frozen(kw_only=True)
class Accepted(Message):
    """The relay has stored the request safely (fsynced), and this connection holds it.

    `cached`: its frames are those of an equal request; it waits for no worker.
    """

    TYPE: ClassVar[str] = "accepted"
    request_id: str = field(request_id_rule)
    cached: bool | None = field(optional(boolean), None)


@attrs.frozen(kw_only=True)
class Queued(Message):
    """The place of a request: `position` from 1, `of` all queued in the space, `eta_s` until it starts.

    `code` and `message` say why it waits again, if an attempt was lost.
    """

    TYPE: ClassVar[str] = "queued"
    request_id: str = field(request_id_rule)
    position: int = field(integer(1))
    of: int = field(integer(1))
    eta_s: float | None = field(optional(number()), None)
    code: str | None = field(optional(_code), None)
    message: str = field(_words, "")


@attrs.frozen(kw_only=True)
class WorkerAway(Message):
    """The worker of a running request is disconnected; the relay waits for it for `wait_s`."""

    TYPE: ClassVar[str] = "worker_away"
    request_id: str = field(request_id_rule)
    wait_s: float = field(number())


@attrs.frozen(kw_only=True)
class WorkerBack(Message):
    """A worker runs the request again: the one that was away, or another one with a new attempt."""

    TYPE: ClassVar[str] = "worker_back"
    request_id: str = field(request_id_rule)
    attempt: int = field(attempt_rule)


@attrs.frozen(kw_only=True)
class Rejected(Message):
    """Refuses a `submit`, `attach`, `status`, `cancel`, `register` or `steer`. The connection stays open."""

    TYPE: ClassVar[str] = "rejected"
    request_id: str | None = field(optional(text(128)), None)
    code: str = field(_code)
    message: str = field(_words)
    retryable: bool = field(boolean, False)
    retry_after_s: float | None = field(optional(number()), None)
    details: dict[str, Value] = map_field()

    @classmethod
    def because(
        cls,
        code: ErrorCode,
        message: str,
        *,
        request_id: str | None = None,
        details: dict[str, Value] | None = None,
        retry_after_s: float | None = None,
    ) -> "Rejected":
        """A refusal with the `retryable` of its code; `message` is cut, because it may contain names of any length."""
        return cls(
            request_id=request_id,
            code=code.value,
            message=message[:MAX_TEXT_CHARS],
            retryable=code.retryable,
            retry_after_s=retry_after_s,
            details=details or {},
        )


@attrs.frozen(kw_only=True)
class StatusReply(Message):
    """Answers `status` with the request's state.

    `position`, `of`, `eta_s` while queued; `code`, `details`, `retryable` once failed. `inputs`: while it is live, the
    `bytes`, `bytes_s`, `age_s` and `ended` of each live or piped input.
    """

    TYPE: ClassVar[str] = "status"
    request_id: str = field(request_id_rule)
    space: str = field(_space)
    state: str = field(choice(*LIVE_STATES, *ENDED_STATES))
    attempt: int = field(attempt_rule, 0)
    next_seq: int = field(seq_rule, 0)
    age_s: float = field(number(), 0.0)
    position: int | None = field(optional(integer(1)), None)
    of: int | None = field(optional(integer(1)), None)
    eta_s: float | None = field(optional(number()), None)
    code: str | None = field(optional(_code), None)
    message: str | None = field(optional(_words), None)
    details: dict[str, Value] = map_field()
    retryable: bool | None = field(optional(boolean), None)
    inputs: dict[str, Value] = map_field()


@attrs.frozen(kw_only=True)
class SpacesReply(Message):
    """Answers `spaces`: a page of the spaces that this principal may use; `more` announces another page."""

    TYPE: ClassVar[str] = "spaces"
    spaces: list[dict[str, Value]] = field(array_of(mapping))
    more: bool = field(boolean, False)


@attrs.frozen(kw_only=True)
class Found(Message):
    """Answers `find`: a page of requests, the latest first. `more` announces another page; `total` counts all."""

    TYPE: ClassVar[str] = "found"
    requests: list[dict[str, Value]] = field(array_of(mapping))
    total: int = field(integer(0))
    more: bool = field(boolean, False)


@attrs.frozen(kw_only=True)
class Registered(Message):
    """Confirms that the worker serves its spaces, and says what to do with the requests that it named as running."""

    TYPE: ClassVar[str] = "registered"
    worker_id: str = field(text(64))
    resume: tuple[Running, ...] = struct_list_field(Running)
    abandon: list[str] = array_field(request_id_rule)


@attrs.frozen(kw_only=True)
class Assign(Message):
    """Asks a worker to run a request; its inputs follow as `input`. Frames below `from_seq` need not be sent."""

    TYPE: ClassVar[str] = "assign"
    request_id: str = field(request_id_rule)
    attempt: int = field(integer(1, 1_000_000))
    from_seq: int = field(seq_rule, 0)
    space: str = field(_space)
    principal: str = field(text(128))
    params: dict[str, Value] = map_field()
    inputs: dict[str, InputInfo] = struct_map_field(InputInfo, input_name_rule)
    run_timeout_s: float = field(number(0.0, 1e9))


@attrs.frozen(kw_only=True)
class Drain(Message):
    """Asks a worker to finish what runs, accept nothing more, and leave."""

    TYPE: ClassVar[str] = "drain"
    reason: str = field(_words, "")


@attrs.frozen(kw_only=True)
class Undrain(Message):
    """Asks a draining worker to accept requests again."""

    TYPE: ClassVar[str] = "undrain"


@attrs.frozen(kw_only=True)
class Ack(Message):
    """The relay has this attempt's frames up to `seq`; once its last frame is acknowledged, the worker forgets it."""

    TYPE: ClassVar[str] = "ack"
    request_id: str = field(request_id_rule)
    attempt: int = field(attempt_rule)
    seq: int = field(seq_rule)


@attrs.frozen(kw_only=True)
class Snapshot(Message):
    """Answers `watch`: a page of everything, topic -> list of maps; `more` announces another page."""

    TYPE: ClassVar[str] = "snapshot"
    data: dict[str, Value] = field(mapping)
    more: bool = field(boolean, False)


@attrs.frozen(kw_only=True)
class Delta(Message):
    """Reports changes: topic -> list of maps that replace those with the same id; `gone`: topic -> ids.

    `more` announces another page of the same round: the state is consistent only after the last page.
    """

    TYPE: ClassVar[str] = "delta"
    data: dict[str, Value] = map_field()
    gone: dict[str, Value] = map_field()
    more: bool = field(boolean, False)


@attrs.frozen(kw_only=True)
class Done(Message):
    """Answers a `steer` that was carried out; `data` contains what it asked for."""

    TYPE: ClassVar[str] = "done"
    steer_id: str = field(text(64), "")
    action: str = field(text(64))
    target: str = field(text(128), "")
    data: dict[str, Value] = map_field()


# -- from clients ------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Submit(Message):
    """A new request. Sent again with the same id and content, it attaches again; other content is refused."""

    TYPE: ClassVar[str] = "submit"
    request_id: str = field(request_id_rule)
    space: str = field(_space)
    params: dict[str, Value] = map_field()
    inputs: dict[str, InputInfo] = struct_map_field(InputInfo, input_name_rule)
    priority: int = field(integer(0, 9), 5)
    queue_timeout_s: float | None = field(optional(number(0.001, 1e7)), None)
    run_timeout_s: float | None = field(optional(number(0.001, 1e7)), None)
    detach: bool = field(boolean, False)
    retry: str = field(choice(*RETRY_POLICIES), "before_output")
    #: False if the relay may not answer it with the result of an equal request, nor equal requests with its result.
    cache: bool | None = field(optional(boolean), None)
    #: Requests of one principal that belong together: a `cancel` of one cancels all that are live.
    group: str | None = field(optional(text(64)), None)


@attrs.frozen(kw_only=True)
class Attach(Message):
    """Asks for a request's frames after `after_seq` of `attempt` (0: of any attempt)."""

    TYPE: ClassVar[str] = "attach"
    request_id: str = field(request_id_rule)
    attempt: int = field(attempt_rule, 0)
    after_seq: int = field(integer(-1, 2**31), -1)


@attrs.frozen(kw_only=True)
class Leave(Message):
    """Ends reading and holding the request on this connection; not answered. Other holders are not affected."""

    TYPE: ClassVar[str] = "leave"
    request_id: str = field(request_id_rule)


@attrs.frozen(kw_only=True)
class Status(Message):
    """Asks for the state of a request."""

    TYPE: ClassVar[str] = "status"
    request_id: str = field(request_id_rule)


@attrs.frozen(kw_only=True)
class Spaces(Message):
    """Asks for the spaces that this principal may use."""

    TYPE: ClassVar[str] = "spaces"


@attrs.frozen(kw_only=True)
class Find(Message):
    """Asks for requests, the latest first: the principal's own, or for an operator those of all.

    Args:
        prefix: what their ids begin with.
        spaces: only of these spaces; empty: of all.
        states: only in these states.
        principals: only of these principals.
        limit: at most so many.
    """

    TYPE: ClassVar[str] = "find"
    prefix: str = field(text(32, PREFIX_PATTERN, "the beginning of a request id (lower-case hex digits)"), "")
    spaces: list[str] = array_field(_space)
    states: list[str] = array_field(choice(*LIVE_STATES, *ENDED_STATES))
    principals: list[str] = array_field(text(128))
    limit: int = field(integer(1, MAX_FOUND), 100)


# -- from workers ------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Register(Message):
    """Offers to serve spaces. Sent again on the same connection, it changes `slots`, `reproducible`, `fingerprint`.

    Args:
        worker: the worker's name as shown to people.
        instance: unique for each start of the process, so that a worker is recognized when it reconnects.
        params: JSON Schema (2020-12) of `submit.params`.
        inputs: input name -> what is accepted.
        format: of the audio that this engine makes, or None if it makes none.
        shared: one process of the engine serves all slots, so that its end ends all attempts.
        streams: frames come all the time while it runs, so that a silent attempt is a hung one.
        reproducible: equal params (and seed) give equal frames, by any worker of this engine, format and fingerprint.
        fingerprint: everything else that the frames depend on: model files, device, versions.
        running: the attempts whose frames it still has.
    """

    TYPE: ClassVar[str] = "register"
    worker: str = field(text(128))
    instance: str = field(text(32, ID_PATTERN, "an instance id (32 lower-case hex digits)"))
    spaces: list[str] = field(array_of(_space, at_least=1))
    slots: int = field(integer(0, 1_000), 1)
    engine: str = field(text(128), "")
    params: dict[str, Value] = map_field()
    inputs: dict[str, InputRule] = struct_map_field(InputRule, input_name_rule)
    format: AudioFormat | None = struct_field(AudioFormat)
    streams: bool = field(boolean, True)
    shared: bool = field(boolean, False)
    reproducible: bool = field(boolean, False)
    fingerprint: str = field(text(200), "")
    running: tuple[Running, ...] = struct_list_field(Running)


@attrs.frozen(kw_only=True)
class Draining(Message):
    """The worker accepts nothing more, and leaves once its running requests have ended."""

    TYPE: ClassVar[str] = "draining"


@attrs.frozen(kw_only=True)
class Report(Message):
    """For operators only: what an attempt printed before it failed, its traceback included; before its last frame."""

    TYPE: ClassVar[str] = "report"
    request_id: str = field(request_id_rule)
    attempt: int = field(attempt_rule)
    output: str = field(text(MAX_REPORT_CHARS))


# -- from operators ----------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Watch(Message):
    """Asks for `snapshot` and `delta`s; no topics means all of them."""

    TYPE: ClassVar[str] = "watch"
    topics: list[str] = array_field(text(64))


@attrs.frozen(kw_only=True)
class Steer(Message):
    """Asks to carry out `action` on `target`, with the `options` it needs. The answer has the same `steer_id`."""

    TYPE: ClassVar[str] = "steer"
    steer_id: str = field(text(64), "")
    action: str = field(text(64))
    target: str = field(text(128), "")
    options: dict[str, Value] = map_field()


Table = Mapping[str, type[Message]]


def _table(*classes: type[Message]) -> dict[str, type[Message]]:
    return {cls.TYPE: cls for cls in classes}


FRAMES: Table = _table(Started, Progress, Audio, Video, Output, Completed, Failed, Cancelled)
#: Types that may exceed `MAX_CONTROL_BYTES`, up to `MAX_MESSAGE_BYTES`, and must then be flat maps.
BULK = frozenset({"audio", "video", "input", "output"})

FROM_ANYONE: Table = _table(Hello)
FROM_CLIENT: Table = _table(Ping, Pong, Submit, Input, Cancel, Attach, Leave, Status, Spaces, Find)
FROM_WORKER: Table = {**_table(Ping, Pong, Register, Draining, Report, InputAck), **FRAMES}
#: An operator is a client that may also watch and steer.
FROM_OPERATOR: Table = {**FROM_CLIENT, **_table(Watch, Steer)}
FROM_RELAY: Table = {
    **_table(Ping, Pong, Error, Welcome, Accepted, Queued, WorkerAway, WorkerBack, Rejected),
    **_table(StatusReply, SpacesReply, Found, InputAck),
    **_table(Registered, Assign, Input, Cancel, Drain, Undrain, Ack, Snapshot, Delta, Done),
    **FRAMES,
}
