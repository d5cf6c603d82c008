"""The rules for fields, which describe faults in words; `Struct`, a map with fields; and the base class `Message`."""

import re
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

import attrs

from protocol.wire.errors import ProtocolError

#: The values that msgpack can encode; the codec limits their depth and size.
Value = Any
#: Returns if a value is valid; otherwise raises ValueError with what is wrong.
Rule = Callable[[Value], None]
StructT = TypeVar("StructT", bound="Struct")

_WIRE_NAMES = {"NoneType": "nil", "dict": "map", "list": "array", "str": "string", "bytes": "binary", "bool": "boolean"}


class FieldError(ValueError):
    """A field's value breaks its rule; the message begins with the field's name."""


def kind_of(value: Value) -> str:
    """The wire's name for the type of `value`."""
    name = type(value).__name__
    return _WIRE_NAMES.get(name, name)


def text(at_most: int, pattern: re.Pattern[str] | None = None, what: str = "") -> Rule:
    """A string of up to `at_most` characters; `what` says in words what `pattern` requires of it."""

    def check(value: Value) -> None:
        if not isinstance(value, str):
            raise ValueError(f"must be a string, not {kind_of(value)}")
        if len(value) > at_most:
            raise ValueError(f"is {len(value)} characters long; the limit is {at_most}")
        if pattern is not None and pattern.fullmatch(value) is None:
            raise ValueError(f"{value[:80]!r} is not {what}")

    return check


def choice(*choices: str) -> Rule:
    """One of these strings."""

    def check(value: Value) -> None:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, not {str(value)[:80]!r}")

    return check


def integer(at_least: int, at_most: int = 2**53) -> Rule:
    """An integer in a range; booleans are not integers."""

    def check(value: Value) -> None:
        if type(value) is not int:
            raise ValueError(f"must be an integer, not {kind_of(value)}")
        if not at_least <= value <= at_most:
            raise ValueError(f"is {value}; it must lie in {at_least}..{at_most}")

    return check


def number(at_least: float = 0.0, at_most: float = 1e12) -> Rule:
    """An integer or float in a range, which NaN is not in."""

    def check(value: Value) -> None:
        if type(value) is not float and type(value) is not int:
            raise ValueError(f"must be a number, not {kind_of(value)}")
        if not at_least <= value <= at_most:
            raise ValueError(f"is {value}; it must lie in {at_least}..{at_most}")

    return check


def boolean(value: Value) -> None:
    """True or false."""
    if type(value) is not bool:
        raise ValueError(f"must be true or false, not {kind_of(value)}")


def binary(at_most: int) -> Rule:
    """Up to `at_most` bytes."""

    def check(value: Value) -> None:
        if not isinstance(value, bytes):
            raise ValueError(f"must be binary, not {kind_of(value)}")
        if len(value) > at_most:
            raise ValueError(f"is {len(value)} bytes long; the limit is {at_most}")

    return check


def mapping(value: Value) -> None:
    """A map."""
    if not isinstance(value, dict):
        raise ValueError(f"must be a map, not {kind_of(value)}")


def array_of(rule: Rule, at_least: int = 0) -> Rule:
    """An array of at least `at_least` items, each of which is valid for `rule`."""

    def check(value: Value) -> None:
        if not isinstance(value, list | tuple):
            raise ValueError(f"must be an array, not {kind_of(value)}")
        if len(value) < at_least:
            raise ValueError(f"has {len(value)} items; it needs {at_least}")
        for item in value:
            rule(item)

    return check


def map_of(name_rule: Rule, rule: Rule) -> Rule:
    """A map whose keys are valid for `name_rule`, and its values for `rule`."""

    def check(value: Value) -> None:
        mapping(value)
        for name, item in value.items():
            name_rule(name)
            try:
                rule(item)
            except ValueError as fault:
                raise ValueError(f"{name}: {fault}") from None

    return check


def optional(rule: Rule) -> Rule:
    """None, or a value that is valid for `rule`."""

    def check(value: Value) -> None:
        if value is not None:
            rule(value)

    return check


def any_value(_value: Value) -> None:
    """Any value that the codec accepts."""


def wire_name(attribute: "attrs.Attribute[Any]") -> str:
    """A field's name on the wire: one that is a Python keyword has an underscore after it here, as in `from_`."""
    return attribute.name.rstrip("_")


def _field_validator(rule: Rule) -> Callable[[Any, "attrs.Attribute[Any]", Any], None]:
    def validate(_self: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        try:
            rule(value)
        except ValueError as fault:
            raise FieldError(f"{wire_name(attribute)}: {fault}") from None

    return validate


def field(rule: Rule, default: Any = attrs.NOTHING, *, secret: bool = False) -> Any:
    """An attrs field checked by `rule`; required unless it has a default. A secret one is left out of `repr`."""
    return attrs.field(validator=_field_validator(rule), default=default, repr=not secret)


def map_field(rule: Rule = mapping) -> Any:
    """An attrs field that contains a map, checked by `rule`; empty by default."""
    return attrs.field(validator=_field_validator(rule), factory=dict)


def array_field(rule: Rule) -> Any:
    """An attrs field that contains an array whose items are checked by `rule`; empty by default."""
    return attrs.field(validator=_field_validator(array_of(rule)), factory=list)


class Struct:
    """A map inside a message that has fields of its own; subclasses are frozen attrs classes."""

    @classmethod
    def field_names(cls) -> tuple[tuple[str, str], ...]:
        """The fields in order: the name on the wire, and the name of the attribute."""
        names: tuple[tuple[str, str], ...] | None = cls.__dict__.get("_names")
        if names is None:
            names = tuple((wire_name(a), a.name) for a in attrs.fields(cls))  # type: ignore[arg-type]
            cls._names = names  # type: ignore[attr-defined]
        return names

    @classmethod
    def missing(cls, wire: dict[str, Value]) -> str:
        """Names of the required fields that `wire` lacks."""
        required: tuple[str, ...] | None = cls.__dict__.get("_required")
        if required is None:
            required = tuple(a.name for a in attrs.fields(cls) if a.default is attrs.NOTHING)  # type: ignore[arg-type]
            cls._required = required  # type: ignore[attr-defined]
        return ", ".join([name for name in required if name not in wire])

    def to_map(self) -> dict[str, Value]:
        """The fields as they are sent: `None` left out, structs as maps."""
        wire: dict[str, Value] = {}
        for name, attribute in self.field_names():
            value = getattr(self, attribute)
            if value is not None:
                wire[name] = _to_wire(value) if isinstance(value, Struct | tuple | dict) else value
        return wire


def _to_wire(value: Value) -> Value:
    if isinstance(value, Struct):
        return value.to_map()
    if isinstance(value, tuple | list):
        return [_to_wire(item) for item in value]
    if isinstance(value, dict):
        return {key: _to_wire(item) for key, item in value.items()}
    return value


class Message(Struct):
    """One message of the wire."""

    TYPE: ClassVar[str]

    @classmethod
    def from_map(cls, wire: dict[str, Value]) -> Self:
        """Parse a decoded map; unknown keys are dropped.

        Raises:
            ProtocolError: a field is missing, of the wrong type or out of its range; the message names it.
        """
        if missing := cls.missing(wire):
            raise ProtocolError(f"{cls.TYPE}: lacks {missing}")
        try:
            return cls(**{attribute: wire[name] for name, attribute in cls.field_names() if name in wire})
        except ValueError as fault:
            raise ProtocolError(f"{cls.TYPE}.{fault}") from None

    def to_map(self) -> dict[str, Value]:
        """The fields as they are sent, with `type` first."""
        return {"type": self.TYPE, **super().to_map()}


def parse_struct(cls: type[StructT], value: Value) -> StructT:
    """Parse the map of a struct; unknown keys are dropped.

    Raises:
        ValueError: it is not a map, or a field is missing or wrong.
    """
    if isinstance(value, cls):
        return value
    mapping(value)
    if missing := cls.missing(value):
        raise ValueError(f"lacks {missing}")
    return cls(**{attribute: value[name] for name, attribute in cls.field_names() if name in value})


def struct_field(cls: type[Struct]) -> Any:
    """An attrs field that contains a struct, or None."""

    def convert(value: Value, _self: Any, attribute: "attrs.Attribute[Any]") -> Value:
        try:
            return None if value is None else parse_struct(cls, value)
        except ValueError as fault:
            raise FieldError(f"{wire_name(attribute)}: {fault}") from None

    return attrs.field(converter=attrs.Converter(convert, takes_self=True, takes_field=True), default=None)


def struct_map_field(cls: type[Struct], name_rule: Rule) -> Any:
    """An attrs field that contains a map of name -> struct."""

    def convert(value: Value, _self: Any, attribute: "attrs.Attribute[Any]") -> Value:
        try:
            mapping(value)
            parsed = {}
            for name, item in value.items():
                name_rule(name)
                parsed[name] = parse_struct(cls, item)
        except ValueError as fault:
            raise FieldError(f"{wire_name(attribute)}: {fault}") from None
        return parsed

    return attrs.field(converter=attrs.Converter(convert, takes_self=True, takes_field=True), factory=dict)


def struct_list_field(cls: type[Struct]) -> Any:
    """An attrs field that contains an array of structs."""

    def convert(value: Value, _self: Any, attribute: "attrs.Attribute[Any]") -> Value:
        try:
            array_of(any_value)(value)
            return tuple(parse_struct(cls, item) for item in value)
        except ValueError as fault:
            raise FieldError(f"{wire_name(attribute)}: {fault}") from None

    return attrs.field(converter=attrs.Converter(convert, takes_self=True, takes_field=True), default=())
