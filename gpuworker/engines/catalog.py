"""Finds the installed engines by entry point, and parses their options to typed values."""

from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points

from gpuworker.engines.base import Engine, Option, OptionError, OptionValue

GROUP = "gpuworker.engines"


class EngineNotFound(LookupError):
    """There is no engine of this name, or its module cannot be imported; the message lists the engines."""


def engine_names() -> list[str]:
    """Names of the installed engines, sorted."""
    return sorted(point.name for point in entry_points(group=GROUP))


def find_engine(name: str) -> type[Engine]:
    """The engine called `name`.

    Raises:
        EngineNotFound: there is none, or it cannot be imported.
    """
    points = tuple(entry_points(group=GROUP, name=name))
    if not points:
        raise EngineNotFound(f"there is no engine {name!r}; installed are: {', '.join(engine_names()) or 'none'}")
    try:
        found = points[0].load()
    except (ImportError, AttributeError) as fault:
        raise EngineNotFound(f"engine {name!r} ({points[0].value}) cannot be imported: {fault}") from fault
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise EngineNotFound(f"engine {name!r}: {points[0].value} is not a subclass of gpuworker.engines.base.Engine")
    return found


def parse_options(declared: Mapping[str, Option], given: Iterable[str]) -> dict[str, OptionValue]:
    """Parse `key=value` strings; options that are not given get their defaults.

    Raises:
        OptionError: an option is unknown, wrong or missing; the message lists what is accepted.
    """
    values: dict[str, OptionValue] = {name: option.default for name, option in declared.items()}
    seen = set()
    for item in given:
        key, equals, text = item.partition("=")
        if not equals:
            raise OptionError(f"-o {item}: write it as key=value")
        option = declared.get(key)
        if option is None:
            raise OptionError(f"-o {key}: no such option; accepted: {', '.join(sorted(declared)) or 'none'}")
        values[key] = _value(key, option, text)
        seen.add(key)
    lacking = [name for name, option in declared.items() if option.required and name not in seen]
    if lacking:
        raise OptionError("; ".join(f"-o {name}=… is required ({declared[name].help})" for name in lacking))
    return values


def _value(key: str, option: Option, text: str) -> OptionValue:
    if option.choices and text not in option.choices:
        raise OptionError(f"-o {key}={text}: must be one of {', '.join(option.choices)}")
    if option.kind is bool:
        if text not in ("true", "false"):
            raise OptionError(f"-o {key}={text}: must be true or false")
        return text == "true"
    try:
        return option.kind(text)
    except ValueError:
        kinds = {int: "a whole number", float: "a number"}
        raise OptionError(f"-o {key}={text}: must be {kinds.get(option.kind, 'text')}") from None
