"""Which spaces can be created, changed and deleted, by operators' actions and by offline admin commands alike."""

from collections.abc import Container

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import SPACE_PATTERN, Rejected
from protocol.wire.validators import Value
from relayd.config.schema import ConfigError, SpaceConfig
from relayd.store.records import SpaceRecord


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
    return _settings(name, options)


def check_changed_space(record: SpaceRecord, options: dict[str, Value]) -> SpaceConfig | Rejected:
    """Return the configuration of a space with some settings changed, or why they cannot be.

    Args:
        record: the space, with its present configuration.
        options: settings as in relayd.toml.
    """
    if record.made_by == "config":
        return refuse_configured(record.name, "change")
    return _settings(record.name, record.config.to_map() | options)


def _settings(name: str, options: dict[str, Value]) -> SpaceConfig | Rejected:
    try:
        return SpaceConfig.from_map(options)
    except ConfigError as fault:
        return Rejected.because(ErrorCode.INVALID_PARAMS, f"space {name!r}: {'; '.join(fault.faults)}")


def refuse_configured(name: str, what: str = "remove") -> Rejected:
    """Return the refusal to delete or change a space that is defined in relayd.toml."""
    message = f"space {name!r} is defined in relayd.toml; {what} it there, then reload or restart the relay"
    return Rejected.because(ErrorCode.INVALID_PARAMS, message)
