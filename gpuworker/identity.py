"""The identity that a worker registers with."""

import os

import attrs


@attrs.frozen(kw_only=True)
class Identity:
    """The identity of a worker.

    Args:
        name: as shown to people.
        spaces: the spaces it serves, at least one.
        engine: the engine's name, as shown to people.
        token: a token of role `worker`; None on the relay's own unix socket.
        instance: unique for each start of the process.
    """

    name: str
    spaces: tuple[str, ...]
    engine: str
    token: str | None = None
    instance: str = attrs.field(factory=lambda: os.urandom(16).hex())
