"""The records in the store, and the changes it can apply."""

from collections.abc import Mapping
from typing import Any

import attrs

from protocol.wire.messages import ENDED_STATES, Submit
from protocol.wire.structs import AudioFormat, InputRule
from protocol.wire.validators import Value
from relayd.config.schema import SpaceConfig

#: In the place of the worker of a request whose frames were copied from an equal one's: no worker has such an id.
COPIED = "(copied)"
#: What a user can be.
USER_ROLES = ("client", "operator")
#: The states of a turn of a conversation.
TURN_LIVE = ("waiting", "thinking", "speaking")
TURN_ENDED = ("done", "interrupted", "failed")
#: Characters of one turn.
MAX_TURN_CHARS = 100_000
#: A relay's clock with more than a century is damaged.
MAX_UPTIME_S = 100 * 366 * 86_400.0


@attrs.frozen(kw_only=True)
class SpaceRecord:
    """A space.

    Args:
        made_by: `config` if the space is defined in relayd.toml, else `command`.
        params: JSON Schema of the params, registered by its last worker; empty before its first worker.
        inputs: input name -> rule registered by that worker.
        format: format of that worker's audio; None if it produces none.
        created_at: Unix seconds, as every time in a record.
    """

    name: str
    config: SpaceConfig = attrs.field(factory=SpaceConfig)
    paused: bool = False
    made_by: str = "command"
    engine: str = ""
    params: dict[str, Value] = attrs.field(factory=dict)
    inputs: Mapping[str, InputRule] = attrs.field(factory=dict)
    format: AudioFormat | None = None
    created_at: float = 0.0


@attrs.frozen(kw_only=True)
class TokenLimits:
    """A token's own limits, in place of those of `[limits.principal]`; None where the settings hold."""

    max_queued: int | None = None
    max_running: int | None = None
    max_connections: int | None = None
    requests_per_s: int | None = None
    max_uploads: int | None = None
    max_input_bytes: int | None = None
    max_readers: int | None = None
    max_retained: int | None = None
    max_priority: int | None = None


@attrs.frozen(kw_only=True)
class TokenRecord:
    """A token, identified by its SHA-256.

    Args:
        token_id: its id in listings and for `revoke`; not secret.
        principal: the principal it belongs to.
        role: `client`, `worker` or `operator`.
        spaces: patterns of the spaces it may use; empty for all.
        sha256: SHA-256 of the token's ASCII text.
        readonly: whether it may only watch.
    """

    token_id: str
    principal: str
    role: str
    spaces: tuple[str, ...] = ()
    sha256: bytes = attrs.field(repr=False)
    limits: TokenLimits = attrs.field(factory=TokenLimits)
    readonly: bool = False
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def live(self, now: float) -> bool:
        """Whether it is neither revoked nor expired at `now`, in Unix seconds."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@attrs.frozen(kw_only=True)
class UserRecord:
    """A user, who logs in with a name and a password, or at a proxy.

    Args:
        user_id: its id, never used again.
        name: the principal; unique, whatever the case of its letters.
        role: `client` or `operator`.
        password: the hash of argon2; "" for a user who can log in only at a proxy.
        seen_at: when a session of it was last used; None for never.
        removed_at: when it was removed: nobody can register under its name any more.
    """

    user_id: str
    name: str
    role: str = "client"
    password: str = attrs.field(default="", repr=False)
    created_at: float
    seen_at: float | None = None
    removed_at: float | None = None


@attrs.frozen(kw_only=True)
class SessionRecord:
    """A login of a user in a browser.

    Args:
        session_id: its id in the relay; not secret.
        sha256: SHA-256 of what the cookie holds.
        used_at: when it was last used, to some minutes.
    """

    session_id: str
    user_id: str
    sha256: bytes = attrs.field(repr=False)
    created_at: float
    used_at: float


@attrs.frozen(kw_only=True)
class InviteRecord:
    """An invitation, with which one person can register.

    Args:
        invite_id: its id in listings; not secret.
        sha256: SHA-256 of its code.
        role: what the new user will be.
    """

    invite_id: str
    sha256: bytes = attrs.field(repr=False)
    role: str = "client"
    created_at: float
    expires_at: float


@attrs.frozen(kw_only=True)
class RequestRecord:
    """A request, without the data of its inputs and without its frames.

    Args:
        ticket: position in the order of arrival; higher for each later request.
        state: one of the states of docs/design.md §2.
        highest_attempt: the scheduler's `ScheduledRequest.highest_attempt`.
        has_output: whether a client may have received output of the current attempt.
        reproducible: the scheduler's `Entry.reproducible` of the current attempt.
        stopping: why the running request is being stopped permanently; None if it is not.
        worker_id: the worker of the current attempt; None if none runs; `COPIED`.
        promoted: the scheduler's `ScheduledRequest.promoted`.
        since: when the request entered its state, by the relay's clock (`relayd.core.clock`); None in old records.
        away_since: when its worker went away, by the same clock; None if the worker is connected.
        code: the error code if it failed.
        outcome: what else is known of an ended request, as `relayd.requests.request.Outcome` packs it.
    """

    request_id: str
    principal: str
    ticket: int
    submit: Submit
    state: str = "queued"
    attempt: int = 0
    highest_attempt: int = 0
    losses: int = 0
    has_output: bool = False
    reproducible: str = ""
    stopping: str | None = None
    worker_id: str | None = None
    promoted: int = 0
    since: float | None = None
    away_since: float | None = None
    created_at: float
    ended_at: float | None = None
    code: str | None = None
    message: str | None = None
    outcome: bytes | None = None


@attrs.frozen(kw_only=True)
class TalkRecord:
    """A conversation: what one user of one principal says in one session.

    Args:
        instructions: what the model is told first; "" for those of the settings.
        touched_at: when something was last said.
    """

    talk_id: str
    principal: str
    user: str
    session: str
    instructions: str = ""
    created_at: float
    touched_at: float


@attrs.frozen(kw_only=True)
class TurnRecord:
    """What was said in a conversation, or the reply to it.

    Args:
        number: its place in the conversation; those of what was deleted are not used again.
        role: `user`, `assistant` or `system`.
        state: `waiting`, `thinking`, `speaking`, `done`, `interrupted` or `failed`.
        heard_chars: how much of the content was heard; None for all of it.
        code: why a reply failed, or what its speech failed with.
        text_request: the id of the request that makes the reply.
        speech_request: the id of the one that speaks it; None if it is not spoken.
        options: of a reply that has not ended: what else it was asked for, packed.
    """

    talk_id: str
    number: int
    role: str
    content: str = attrs.field(default="", repr=False)
    state: str = "done"
    heard_chars: int | None = None
    code: str | None = None
    message: str | None = None
    text_request: str | None = None
    speech_request: str | None = None
    options: bytes | None = attrs.field(default=None, repr=False)
    at: float

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.state in TURN_ENDED


@attrs.frozen
class PutSpace:
    """Create or replace a space."""

    record: SpaceRecord


@attrs.frozen
class DeleteSpace:
    """Delete a space; its requests are deleted separately."""

    name: str


@attrs.frozen
class PutToken:
    """Create or replace a token."""

    record: TokenRecord


@attrs.frozen
class DeleteToken:
    """Delete a token."""

    token_id: str


@attrs.frozen
class PutUser:
    """Create or replace a user."""

    record: UserRecord


@attrs.frozen
class PutSession:
    """Create or replace a session."""

    record: SessionRecord


@attrs.frozen
class DeleteSession:
    """Delete a session."""

    session_id: str


@attrs.frozen
class PutInvite:
    """Create or replace an invitation."""

    record: InviteRecord


@attrs.frozen
class DeleteInvite:
    """Delete an invitation."""

    invite_id: str


@attrs.frozen
class PutRequest:
    """Create or replace a request, with the data of its inputs by name, which never changes afterwards."""

    record: RequestRecord
    inputs: Mapping[str, bytes | bytearray] = attrs.field(factory=dict, repr=False)


@attrs.frozen(kw_only=True)
class AppendInput:
    """Add the next piece of a live input to its request; ignored if the request does not exist or has ended.

    Args:
        offset: the bytes before it, which the store has.
        last: whether the input ends with it.
    """

    request_id: str
    name: str
    offset: int
    data: bytes = attrs.field(repr=False)
    last: bool = False


@attrs.frozen
class ClearInput:
    """Delete the pieces of a fed input: its source begins anew."""

    request_id: str
    name: str


@attrs.frozen
class StoredInput:
    """How much of a live input the store has, and whether its end is stored, too."""

    size: int
    ended: bool


@attrs.frozen(kw_only=True)
class UpdateRequest:
    """Update the mutable fields of a request; ignored if the request does not exist.

    A change to an ended state deletes its inputs.
    """

    request_id: str
    state: str
    attempt: int
    losses: int
    highest_attempt: int = 0
    has_output: bool = False
    reproducible: str = ""
    stopping: str | None = None
    worker_id: str | None = None
    promoted: int = 0
    since: float | None = None
    away_since: float | None = None
    ended_at: float | None = None
    code: str | None = None
    message: str | None = None
    outcome: bytes | None = None

    @property
    def ends(self) -> bool:
        """Whether the new state is an ended one, so that the inputs are no longer needed."""
        return self.state in ENDED_STATES

    def fields(self) -> dict[str, Any]:
        """Return the changed fields, by their names in `RequestRecord`."""
        values = attrs.asdict(self, recurse=False)
        del values["request_id"]
        return values


@attrs.frozen
class DeleteRequest:
    """Delete a request and its inputs."""

    request_id: str


@attrs.frozen
class PutDrain:
    """A worker was drained by an operator: it is to be given no requests. With `cordon` it is to stay connected."""

    worker_id: str
    cordon: bool = False


@attrs.frozen
class DeleteDrain:
    """A worker is given requests again."""

    worker_id: str


@attrs.frozen
class PutWorker:
    """A worker of a space is connected: after a restart, it may come back with an attempt that the store missed."""

    worker_id: str
    space: str


@attrs.frozen
class DeleteWorker:
    """A worker is no longer connected, whatever its spaces."""

    worker_id: str


@attrs.frozen
class PutTalk:
    """Create or replace a conversation."""

    record: TalkRecord


@attrs.frozen
class DeleteTalk:
    """Delete a conversation and its turns."""

    talk_id: str


@attrs.frozen
class PutTurn:
    """Create or replace a turn; ignored if its conversation does not exist."""

    record: TurnRecord


@attrs.frozen
class PutHeard:
    """Note how much of a reply was heard; ignored if there is no such turn."""

    talk_id: str
    number: int
    heard_chars: int | None


@attrs.frozen
class DeleteTurns:
    """Delete turns of a conversation: those numbered from `first` up to `last`."""

    talk_id: str
    first: int
    last: int


@attrs.frozen
class PutUptime:
    """What the relay's clock says."""

    uptime_s: float


Change = (
    PutSpace
    | DeleteSpace
    | PutToken
    | DeleteToken
    | PutUser
    | PutSession
    | DeleteSession
    | PutInvite
    | DeleteInvite
    | PutRequest
    | AppendInput
    | ClearInput
    | UpdateRequest
    | DeleteRequest
    | PutDrain
    | DeleteDrain
    | PutWorker
    | DeleteWorker
    | PutTalk
    | DeleteTalk
    | PutTurn
    | PutHeard
    | DeleteTurns
    | PutUptime
)


@attrs.frozen(kw_only=True)
class Loaded:
    """The contents of the store, without the data of inputs.

    Args:
        requests: in the order of their tickets.
        live_inputs: request id -> name -> what is stored of each live input of a live request that has pieces.
        drains: ids of drained workers, in the order in which they were drained; and whether each is cordoned.
        workers: (worker id, space) of the workers that were connected.
        uptime_s: the last stored value of the relay's clock.
        talks: in the order in which they were created.
        unended_turns: the replies that have not ended, conversation by conversation, in order.
        damaged: descriptions of rows that could not be read; the rows were left unchanged.
        damaged_keys: table and key of those rows.
    """

    spaces: tuple[SpaceRecord, ...] = ()
    tokens: tuple[TokenRecord, ...] = ()
    users: tuple[UserRecord, ...] = ()
    sessions: tuple[SessionRecord, ...] = ()
    invites: tuple[InviteRecord, ...] = ()
    requests: tuple[RequestRecord, ...] = ()
    live_inputs: Mapping[str, Mapping[str, StoredInput]] = attrs.field(factory=dict)
    drains: tuple[tuple[str, bool], ...] = ()
    workers: tuple[tuple[str, str], ...] = ()
    uptime_s: float = 0.0
    talks: tuple[TalkRecord, ...] = ()
    unended_turns: tuple[TurnRecord, ...] = ()
    damaged: tuple[str, ...] = ()
    damaged_keys: frozenset[tuple[str, object]] = frozenset()
