"""Who a worker is, how it stands, and why it gave up."""

import os

import attrs


@attrs.frozen(kw_only=True)
class Identity:
    """Who the worker is.

    Args:
        name: for people.
        spaces: it serves, at least one.
        engine: its name, for people.
        token: of role `worker`; None on the relay's own unix socket.
        instance: one per process start.
    """

    name: str
    spaces: tuple[str, ...]
    engine: str
    token: str | None = None
    instance: str = attrs.field(factory=lambda: os.urandom(16).hex())
