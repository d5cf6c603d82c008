"""Tokens as rows. This module does not import the relay's state, which short commands do not need."""

import attrs

from protocol.wire.validators import Value
from relayd.auth.tokens import iso_time
from relayd.store.records import TokenRecord

Row = dict[str, Value]


def token_row(record: TokenRecord, now: float) -> Row:
    """Return the row of a token; its text is not stored anywhere."""
    state = "live" if record.live(now) else "revoked" if record.revoked_at is not None else "expired"
    return {
        "token_id": record.token_id,
        "principal": record.principal,
        "role": record.role,
        "readonly": record.readonly,
        "spaces": list(record.spaces),
        "state": state,
        "created": iso_time(record.created_at),
        "expires": iso_time(record.expires_at) if record.expires_at is not None else None,
        "limits": {name: most for name, most in attrs.asdict(record.limits).items() if most is not None},
    }
