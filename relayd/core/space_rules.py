"""Which spaces can be made and deleted: the same rules for an operator's actions and for admin commands offline."""

from collections.abc import Container

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import SPACE_PATTERN, Rejected
from protocol.wire.validators import Value
from relayd.config.schema import ConfigError, SpaceConfig


def check_new_space(name: str, options: dict[str, Value], existing: Container[str]) -> SpaceConfig | Rejected:
    """Return the configuration of a space that can be made.

    Args:
        name: of the new space.
        options: settings as in relayd.toml.
        existing: names of all spaces that exist, in relayd.toml or made by a command.
    """
    if not SPACE_PATTERN.fullmatch(name):
        rule = "start with a letter or digit, then use letters, digits and . _ -, 64 characters at most"
        return Rejected.because(ErrorCode.INVALID_PARAMS, f"{name!r} is not a valid space name: {rule}")
    if name in existing:
        message = f"space {name!r} exists already; choose another name, or delete that one first"
        return Rejected.because(ErrorCode.SPACE_EXISTS, message)
    try:
        return SpaceConfig.from_map(options)
    except ConfigError as fault:
        return Rejected.because(ErrorCode.INVALID_PARAMS, f"space {name!r}: {'; '.join(fault.faults)}")


def refuse_configured(name: str) -> Rejected:
    """Return the refusal to delete a space that relayd.toml names."""
    message = f"space {name!r} stands in relayd.toml; remove it there, then reload or restart the relay"
    return Rejected.because(ErrorCode.INVALID_PARAMS, message)
