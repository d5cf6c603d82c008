"""What the store keeps, as records, and the changes that it is asked to make."""

from collections.abc import Mapping
from typing import Any

import attrs

from protocol.wire.messages import ENDED_STATES, Submit
from protocol.wire.structs import AudioFormat, InputRule
from protocol.wire.validators import Value
from relayd.config.schema import SpaceConfig


@attrs.frozen(kw_only=True)
class SpaceRecord:
    """A space.

    Args:
        made_by: `config` for one that stands in relayd.toml, else `command`.
        params: JSON Schema that its last worker registered; empty before the first.
        inputs: input name -> what that worker takes under it.
        format: of the audio that worker makes.
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
    """What one token may have at once, over all spaces; None is no limit but the spaces' own."""

    max_queued: int | None = None
    max_running: int | None = None
    max_connections: int | None = None


@attrs.frozen(kw_only=True)
class TokenRecord:
    """A token, known by its SHA-256 alone.

    Args:
        token_id: names it in listings and for `revoke`; no secret.
        principal: who it speaks for.
        role: `client`, `worker` or `operator`.
        spaces: patterns of the spaces it may use; empty for all.
        sha256: of the token's ASCII text.
    """

    token_id: str
    principal: str
    role: str
    spaces: tuple[str, ...] = ()
    sha256: bytes = attrs.field(repr=False)
    limits: TokenLimits = attrs.field(factory=TokenLimits)
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def live(self, now: float) -> bool:
        """Whether it still opens the door at Unix second `now`."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@attrs.frozen(kw_only=True)
class RequestRecord:
    """A request, without its inputs' bytes and its frames.

    Args:
        ticket: the order requests came in; rises by at least one for each.
        state: one of the states of docs/design.md §2.
        has_output: whether a listener may have heard something of the current attempt.
        reproducible: as the scheduler's `Entry.reproducible`, of the current attempt.
        stopping: why it is being stopped for good while it runs; None where it is not.
        worker_id: where the current attempt runs; None where none does.
        code: why it failed.
    """

    request_id: str
    principal: str
    ticket: int
    submit: Submit
    state: str = "queued"
    attempt: int = 0
    losses: int = 0
    has_output: bool = False
    reproducible: str = ""
    stopping: str | None = None
    worker_id: str | None = None
    created_at: float
    ended_at: float | None = None
    code: str | None = None
    message: str | None = None


@attrs.frozen
class PutSpace:
    """The space is as the record says, whatever it was before."""

    record: SpaceRecord


@attrs.frozen
class DeleteSpace:
    """The space is gone; its requests are deleted one by one by who decides that."""

    name: str


@attrs.frozen
class PutToken:
    """The token is as the record says, whatever it was before."""

    record: TokenRecord


@attrs.frozen
class DeleteToken:
    """The token is forgotten."""

    token_id: str


@attrs.frozen
class PutRequest:
    """A request with its inputs' bytes (by name; never changed afterwards); one of the same id is replaced."""

    record: RequestRecord
    inputs: Mapping[str, bytes | bytearray] = attrs.field(factory=dict, repr=False)


@attrs.frozen(kw_only=True)
class UpdateRequest:
    """The part of a request that changes while it lives; passed over when the store knows no such request.

    With one of the ended states its inputs are dropped.
    """

    request_id: str
    state: str
    attempt: int
    losses: int
    has_output: bool = False
    reproducible: str = ""
    stopping: str | None = None
    worker_id: str | None = None
    ended_at: float | None = None
    code: str | None = None
    message: str | None = None

    @property
    def ends(self) -> bool:
        """Whether the request's inputs are needed no more."""
        return self.state in ENDED_STATES

    def fields(self) -> dict[str, Any]:
        """What changes, by the names of `RequestRecord`."""
        values = attrs.asdict(self, recurse=False)
        del values["request_id"]
        return values


@attrs.frozen
class DeleteRequest:
    """The request and its inputs are forgotten."""

    request_id: str


Change = PutSpace | DeleteSpace | PutToken | DeleteToken | PutRequest | UpdateRequest | DeleteRequest


@attrs.frozen(kw_only=True)
class Loaded:
    """All that the store holds, but the inputs' bytes.

    Args:
        requests: by ascending ticket.
        damaged: what could not be read, in words; it was left where it is.
    """

    spaces: tuple[SpaceRecord, ...] = ()
    tokens: tuple[TokenRecord, ...] = ()
    requests: tuple[RequestRecord, ...] = ()
    damaged: tuple[str, ...] = ()
