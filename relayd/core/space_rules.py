"""Which spaces can be created and deleted: one set of rules for operators' actions and for offline admin commands."""

from collections.abc import Container

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import SPACE_PATTERN, Rejected
from protocol.wire.validators import Value
from relayd.config.schema import ConfigError, SpaceConfig


def check_new_space(name: str, options: dict[str, Value], existing: Container[str]) -> SpaceConfig | Rejected:
    """Return the configuration of a new space, or why it cannot be created.

    Args:
        name: the name of the new space.
        options: settings as in relayd.toml.
        existing: the names of all existing spaces, from relayd.toml or created by a command.
    """
    if not SPACE_PATTERN.fullmatch(name):
        rule = "start with a letter or digit, then use letters, digits and . _ -, 64 characters at most"
        return Rejected.because(ErrorCode.INVALID_PARAMS, f"{name!r} is not a valid space name: {rule}")
    if name in existing:
        message = f"space {name!r} already exists; choose another name, or delete that one first"
        return Rejected.because(ErrorCode.SPACE_EXISTS, message)
    try:
        return SpaceConfig.from_map(options)
    except ConfigError as fault:
        return Rejected.because(ErrorCode.INVALID_PARAMS, f"space {name!r}: {'; '.join(fault.faults)}")


def refuse_configured(name: str) -> Rejected:
    """Return the refusal to delete a space that is defined in relayd.toml."""
    message = f"space {name!r} is defined in relayd.toml; remove it there, then reload or restart the relay"
    return Rejected.because(ErrorCode.INVALID_PARAMS, message)
