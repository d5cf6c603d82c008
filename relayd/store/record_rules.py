"""What records must be like: what a damaged file says must not get into the relay, to fail at some later time."""

from collections.abc import Mapping
from typing import Any, TypeVar

import attrs

from protocol.wire.frames import MAX_TEXT_CHARS
from protocol.wire.messages import ENDED_STATES, LIVE_STATES, ROLES, SPACE_PATTERN
from protocol.wire.params_schema import check_schema
from protocol.wire.structs import attempt_rule, request_id_rule
from protocol.wire.validators import (
    FieldError,
    Rule,
    array_of,
    binary,
    choice,
    integer,
    number,
    optional,
    text,
)
from relayd.store.records import (
    MAX_TURN_CHARS,
    MAX_UPTIME_S,
    TURN_ENDED,
    TURN_LIVE,
    USER_ROLES,
    InviteRecord,
    RequestRecord,
    SessionRecord,
    SpaceRecord,
    TalkRecord,
    TokenLimits,
    TokenRecord,
    TurnRecord,
    UserRecord,
)

RecordT = TypeVar(
    "RecordT",
    bound=InviteRecord
    | RequestRecord
    | SessionRecord
    | SpaceRecord
    | TalkRecord
    | TokenRecord
    | TurnRecord
    | UserRecord,
)

#: Names, codes and ids; and messages.
_word, _words = text(256), text(MAX_TEXT_CHARS)
_unix_s = number()

#: Class of a record -> its fields and their rules; those without are of classes that have rules of their own.
RULES: Mapping[type[Any], Mapping[str, Rule]] = {
    SpaceRecord: {
        "name": text(64, SPACE_PATTERN, "a space name"),
        "made_by": choice("config", "command"),
        "engine": _word,
        "params": check_schema,
        "created_at": _unix_s,
    },
    TokenLimits: {field.name: optional(integer(0)) for field in attrs.fields(TokenLimits)},
    TokenRecord: {
        "token_id": _word,
        "principal": _word,
        "role": choice(*ROLES),
        "spaces": array_of(_word),
        "sha256": binary(32),
        "created_at": _unix_s,
        "expires_at": optional(_unix_s),
        "revoked_at": optional(_unix_s),
    },
    UserRecord: {
        "user_id": _word,
        "name": text(64),
        "role": choice(*USER_ROLES),
        "password": _word,
        "created_at": _unix_s,
        "seen_at": optional(_unix_s),
        "removed_at": optional(_unix_s),
    },
    SessionRecord: {
        "session_id": _word,
        "user_id": _word,
        "sha256": binary(32),
        "created_at": _unix_s,
        "used_at": _unix_s,
    },
    InviteRecord: {
        "invite_id": _word,
        "sha256": binary(32),
        "role": choice(*USER_ROLES),
        "created_at": _unix_s,
        "expires_at": _unix_s,
    },
    RequestRecord: {
        "request_id": request_id_rule,
        "principal": _word,
        "ticket": integer(0),
        "state": choice(*LIVE_STATES, *ENDED_STATES),
        "attempt": attempt_rule,
        "highest_attempt": attempt_rule,
        "losses": integer(0),
        "reproducible": text(65_536),
        "stopping": optional(_words),
        "worker_id": optional(_word),
        "promoted": integer(0),
        "since": optional(number(at_most=MAX_UPTIME_S)),
        "away_since": optional(number(at_most=MAX_UPTIME_S)),
        "created_at": _unix_s,
        "ended_at": optional(_unix_s),
        "code": optional(_word),
        "message": optional(_words),
    },
    TalkRecord: {
        "talk_id": _word,
        "principal": _word,
        "user": _word,
        "session": _word,
        "instructions": _words,
        "created_at": _unix_s,
        "touched_at": _unix_s,
    },
    TurnRecord: {
        "talk_id": _word,
        "number": integer(0, 2**31),
        "role": choice("user", "assistant", "system"),
        "content": text(MAX_TURN_CHARS),
        "state": choice(*TURN_LIVE, *TURN_ENDED),
        "heard_chars": optional(integer(0)),
        "code": optional(_word),
        "message": optional(_words),
        "text_request": optional(request_id_rule),
        "speech_request": optional(request_id_rule),
        "options": optional(binary(65_536)),
        "at": _unix_s,
    },
}


def checked(record: RecordT) -> RecordT:
    """Return a record, all of whose fields may be used.

    Raises:
        FieldError: says which one may not.
    """
    _check(record)
    if isinstance(record, TokenRecord):
        _check(record.limits)
    if isinstance(record, RequestRecord) and record.submit.request_id != record.request_id:
        raise FieldError(f"submit: is of request {record.submit.request_id}")
    if isinstance(record, TurnRecord) and not record.ended and None in (record.text_request, record.options):
        raise FieldError("state: is that of a reply to come, which has a text_request and options")
    return record


def _check(record: object) -> None:
    for name, rule in RULES[type(record)].items():
        try:
            rule(getattr(record, name))
        except ValueError as fault:
            raise FieldError(f"{name}: {fault}") from None
