"""Checks a request's params against the JSON Schema that its worker registered: before queueing and before running.

The relay does this in its event loop, with schemas that it did not write, so a schema may contain only what can be
checked in time bounded by its size. That excludes parts of JSON Schema: references, regular expressions, and comparing
all items with each other. In addition, every check has a budget of steps.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import attrs

from protocol.wire.validators import Rule, Value, any_value, array_of, boolean, integer, kind_of, number, text

#: Most faults reported at once; a client that sends more has other trouble.
MAX_FAULTS = 16
#: Length of one fault, so that all of them fit in a message with room to spare.
MAX_FIELD_CHARS = 128
MAX_WORDS_CHARS = 300
MAX_CHOICES_LISTED = 32

#: Nesting of schemas, the outermost included.
MAX_DEPTH = 8
#: Most branches of each `anyOf`, `oneOf` and `allOf`.
MAX_BRANCHES = 8
#: Total keywords, subschemas, choices and names in a schema. 1 ms to walk; espeak's, with 140 voices, has 180.
MAX_PARTS = 2_048
#: Budget of one check; a step is one keyword applied to one value. At most 4 ms. An array of 1,024 numbers with a range
#: takes 6,200.
MAX_STEPS = 8_000
#: Steps for each value that is checked against a schema.
VISIT_STEPS = 3

_Path = tuple[str | int, ...]
_Found = Iterator[tuple[_Path, str]]
_NUMBER = number(-sys.float_info.max, sys.float_info.max)
_COUNT = integer(0)
_ANNOTATION = text(65_536)
_TYPES = ("string", "integer", "number", "boolean", "object", "array", "null")
_SCALARS = (str, int, float, bool, bytes, type(None))

_BRANCHES = ("anyOf", "oneOf", "allOf")
#: Further keywords that are often used, and what to do instead.
_INSTEAD = {
    "$ref": "write out what it refers to",
    "$dynamicRef": "write out what it refers to",
    "$defs": "write each out where it is used",
    "pattern": "a regular expression can take for ever; use enum or maxLength, and have the engine check the rest",
    "patternProperties": "a regular expression can take for ever; name the properties",
}


def _a_type(rule: Value) -> None:
    names = rule if isinstance(rule, list | tuple) else [rule]
    if not names or len(names) > len(_TYPES) or not all(isinstance(name, str) and name in _TYPES for name in names):
        raise ValueError(f"must be one of {', '.join(_TYPES)}, or an array of them")


def _a_scalar(rule: Value) -> None:
    if not isinstance(rule, _SCALARS):
        raise ValueError(f"must be a string, a number, a boolean or nil, not {kind_of(rule)}")


#: Keyword -> the check of its value; keywords with subschemas are handled in `_Walk`.
_RULES: dict[str, Rule] = {
    "type": _a_type,
    "enum": array_of(_a_scalar, at_least=1),
    "const": _a_scalar,
    "required": array_of(_ANNOTATION),
    "minimum": _NUMBER,
    "maximum": _NUMBER,
    "exclusiveMinimum": _NUMBER,
    "exclusiveMaximum": _NUMBER,
    "multipleOf": number(1e-9, 1e12),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _COUNT),
    **dict.fromkeys(("title", "description", "format", "$schema", "$comment"), _ANNOTATION),
    "deprecated": boolean,
    "default": any_value,
    "examples": any_value,
}
KEYWORDS = (*_RULES, "properties", "additionalProperties", "items", *_BRANCHES)


def check_schema(schema: dict[str, Value]) -> None:
    """Reject a schema that is not valid, or that could take long to check.

    A schema is a map, or for a subschema also a boolean, of these keywords, with their meaning in JSON Schema 2020-12:

    - `type`: one name or an array of them; `enum`, `const`: of strings, numbers, booleans, nil;
    - `properties`, `required`, `additionalProperties` (a boolean or a schema), `minProperties`, `maxProperties`;
    - `items` (one schema for all), `minItems`, `maxItems`; `minLength`, `maxLength`;
    - `minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum`, `multipleOf`;
    - `anyOf`, `oneOf`, `allOf`: up to `MAX_BRANCHES` each;
    - `title`, `description`, `default`, `examples`, `format`, `deprecated`, `$schema`, `$comment`: accepted, but not
      checked.

    Every other keyword is rejected, including `$ref`, `$defs`, `pattern`, `patternProperties` and `uniqueItems`. A
    whole schema has up to `MAX_PARTS` parts, and is nested up to `MAX_DEPTH` deep.

    Raises:
        ValueError: names the keyword, its place, and what is wrong with it.
    """
    if not isinstance(schema, dict):
        raise ValueError(f"params must be a map, not {kind_of(schema)}")
    _Walk().schema(schema, ("params",))


@attrs.define
class _Walk:
    """Walks through a schema that may be anything."""

    parts: int = 0

    def schema(self, schema: Value, path: tuple[str, ...], depth: int = 1) -> None:
        self._count(1)
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise _fault(path, f"must be a schema (a map or a boolean), not {kind_of(schema)}")
        if depth > MAX_DEPTH:
            raise _fault(path, f"is too deep; schemas may be nested {MAX_DEPTH} deep")
        self._count(len(schema))
        for keyword, rule in schema.items():
            here = (*path, str(keyword))
            if keyword in _RULES:
                if isinstance(rule, list | tuple) and keyword in ("enum", "required"):
                    self._count(len(rule))
                try:
                    _RULES[keyword](rule)
                except ValueError as fault:
                    raise _fault(here, str(fault)) from None
            elif keyword in ("items", "additionalProperties"):
                self.schema(rule, here, depth + 1)
            elif keyword == "properties":
                if not isinstance(rule, dict):
                    raise _fault(here, f"must be a map, not {kind_of(rule)}")
                for name, inner in rule.items():
                    self.schema(inner, (*here, str(name)), depth + 1)
            elif keyword in _BRANCHES:
                if not isinstance(rule, list | tuple) or not 1 <= len(rule) <= MAX_BRANCHES:
                    raise _fault(here, f"must be an array of 1 to {MAX_BRANCHES} schemas")
                for place, inner in enumerate(rule):
                    self.schema(inner, (*here, str(place)), depth + 1)
            else:
                instead = _INSTEAD.get(keyword) if isinstance(keyword, str) else None
                raise _fault(here, "is a keyword that a relay does not accept; " + (instead or "leave it out"))

    def _count(self, parts: int) -> None:
        self.parts += parts
        if self.parts > MAX_PARTS:
            raise ValueError(f"params: the schema is too large: more than {MAX_PARTS:,} keywords, choices and names")


def _fault(path: tuple[str, ...], reason: str) -> ValueError:
    # Search from the end: the keyword is there.
    where = ".".join(part[:MAX_FIELD_CHARS] for part in path)
    return ValueError(f"{where if len(where) <= MAX_WORDS_CHARS else '...' + where[-MAX_WORDS_CHARS:]} {reason}")


def check_params(
    schema: dict[str, Value], params: dict[str, Value], fed: AbstractSet[str] = frozenset()
) -> dict[str, str]:
    """Check `params` and return the faults by field.

    Args:
        schema: has passed `check_schema`; an empty one accepts everything.
        params: those of a `submit`.
        fed: names of its inputs. Each stands for the param of its name, which is then not missing; to give both is a
            fault.

    Returns:
        field -> what is wrong with it, the path joined by dots ("" for the whole); empty if there are no faults. Params
        that take more than `MAX_STEPS` to check are rejected for that. Nothing is raised, whatever the two contain.
    """
    twice = sorted(fed & params.keys()) if fed else ()
    faults = dict.fromkeys(twice, "is given as an input, too; send it only once")
    if not schema:
        return faults
    try:
        for path, reason in _Check(fed).faults(schema, params, ()):
            field = _cut(".".join(str(part)[:MAX_FIELD_CHARS] for part in path), MAX_FIELD_CHARS)
            faults.setdefault(field, _cut(reason, MAX_WORDS_CHARS))
            if len(faults) >= MAX_FAULTS:
                break
    except _TooLong:
        return {"": f"could not be checked: it takes more than {MAX_STEPS:,} steps; send fewer values"}
    except Exception as fault:  # noqa: BLE001 - one peer wrote the schema, another the params: neither stops the relay
        return {"": _cut(f"could not be checked: {type(fault).__name__}: {fault}", MAX_WORDS_CHARS)}
    return faults


def integers_as_int(schema: Value, value: Value) -> Value:
    """`value` with an int for each whole float that fits `schema` as an integer: JSON Schema takes 2.0 for one.

    Args:
        schema: has passed `check_schema`.
        value: has passed `check_params`.
    """
    if not isinstance(schema, dict):
        return value
    if isinstance(value, float):
        names = schema.get("type", ())
        names = (names,) if isinstance(names, str) else names
        choices = (*schema.get("enum", ()), schema.get("const"))
        wanted = ("integer" in names and "number" not in names) or any(type(c) is int and c == value for c in choices)
        if wanted and value.is_integer() and abs(value) < 2**63:
            return int(value)
    elif isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        value = {name: integers_as_int(known.get(name, others), inner) for name, inner in value.items()}
    elif isinstance(value, list):
        value = [integers_as_int(schema.get("items"), inner) for inner in value]
    for keyword in _BRANCHES:
        for branch in schema.get(keyword, ()):
            if not check_params({"allOf": [branch]}, value):
                value = integers_as_int(branch, value)
                if keyword != "allOf":
                    break
    return value


def takes_text(schema: Value, text: str) -> bool:
    """Whether a param with `schema` takes `text` as it is, where it could also be read as JSON: 123, true, null."""
    if not isinstance(schema, dict):
        return False
    if "type" in schema:
        return "string" in ([schema["type"]] if isinstance(schema["type"], str) else schema["type"])
    choices = (*schema.get("enum", ()), schema.get("const"))
    return text in choices or any(
        takes_text(branch, text) for keyword in _BRANCHES for branch in schema.get(keyword, ())
    )


def _cut(text: str, at: int) -> str:
    return text if len(text) <= at else text[: at - 3] + "..."


class _TooLong(Exception):
    """The budget is used up."""


@attrs.define
class _Check:
    """Checks one value against one schema; faults are found one by one, on demand."""

    fed: AbstractSet[str] = frozenset()
    steps: int = 0

    def faults(self, schema: Value, value: Value, path: _Path) -> _Found:
        if isinstance(schema, bool):
            self._spend(VISIT_STEPS)
            if not schema:
                yield path, "must not be there"
            return
        self._spend(VISIT_STEPS + len(schema))
        if "type" in schema and not self._is_any(value, schema["type"]):
            self._spend(4)  # here and below: formatting a message takes longer than a step
            yield path, f"must be {_types(schema['type'])}, not {kind_of(value)}"
            return  # any further fault would follow from this one
        if choices := schema.get("enum"):
            self._spend(len(choices) // 4)  # a comparison is this much faster than a step
            if value not in choices or not self._is_one_of(value, choices):
                self._spend(MAX_CHOICES_LISTED)
                yield path, f"must be one of {', '.join(map(_short, choices[:MAX_CHOICES_LISTED]))}"
        if "const" in schema and not _same(value, schema["const"]):
            why = schema.get("description")
            yield path, f"must be {_short(schema['const'])}" + (f": {why}" if isinstance(why, str) and why else "")
        if isinstance(value, str):
            yield from _length(schema, value, path)
        elif isinstance(value, dict):
            yield from self._map(schema, value, path)
        elif isinstance(value, list | tuple):
            yield from self._array(schema, value, path)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield from _range(schema, value, path)
        for keyword in _BRANCHES:
            if keyword in schema:
                yield from self._branches(keyword, schema[keyword], value, path)

    def _is_any(self, value: Value, names: Value) -> bool:
        if isinstance(names, str):
            return _is(value, names)
        self._spend(len(names))
        return any(_is(value, name) for name in names)

    def _is_one_of(self, value: Value, choices: list[Value]) -> bool:
        """Whether `value` is one of `choices`; plain `in` would take 1 for true."""
        if not isinstance(value, int | float):
            return True
        self._spend(len(choices))
        return any(_same(value, choice) for choice in choices)

    def _map(self, schema: dict[str, Value], value: dict[str, Value], path: _Path) -> _Found:
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        self._spend(2 + 2 * len(value))
        fed = self.fed if not path else ()
        if names := schema.get("required"):
            self._spend(len(names))
            for name in names:
                if name not in value and name not in fed:
                    yield (*path, name), "is required"
        as_params = sum(name in properties and name not in value for name in fed)
        yield from _count(schema, len(value) + as_params, path, "Properties", "entries")
        for name, inner in value.items():
            if name in properties:
                yield from self.faults(properties[name], inner, (*path, name))
            elif others is False:
                self._spend(len(properties))
                yield (*path, name), f"is unknown; accepted: {', '.join(sorted(properties)) or 'none'}"
            elif others is not True:
                yield from self.faults(others, inner, (*path, name))

    def _array(self, schema: dict[str, Value], value: Sequence[Value], path: _Path) -> _Found:
        self._spend(3)
        yield from _count(schema, len(value), path, "Items", "items")
        if schema.get("items", True) not in (True, {}):
            for place, inner in enumerate(value):
                yield from self.faults(schema["items"], inner, (*path, place))

    def _branches(self, keyword: str, branches: list[Value], value: Value, path: _Path) -> _Found:
        if keyword == "allOf":
            for branch in branches:
                yield from self.faults(branch, value, path)
            return
        fits, whys = 0, []
        for branch in branches:
            fault = next(self.faults(branch, value, path), None)
            if fault is None:
                fits += 1
                if keyword == "anyOf":
                    return
            else:
                below = ".".join(str(part)[:MAX_FIELD_CHARS] for part in fault[0][len(path) :])
                whys.append(f"{below} {fault[1]}" if below else fault[1])
        if not fits:
            yield path, _cut(" or ".join(dict.fromkeys(whys)), MAX_WORDS_CHARS)
        elif fits > 1:
            yield path, f"fits {fits} of the alternatives of which it must fit one"

    def _spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise _TooLong


def _is(value: Value, name: str) -> bool:
    if name in ("integer", "number"):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return name == "number" or isinstance(value, int) or value.is_integer()
    return isinstance(value, _CLASSES[name])


_CLASSES: dict[str, Any] = {
    "string": str,
    "boolean": bool,
    "object": dict,
    "array": (list, tuple),
    "null": type(None),
}


def _same(value: Value, other: Value) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _length(schema: dict[str, Value], value: str, path: _Path) -> _Found:
    at_least, at_most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
    if len(value) < at_least:
        yield path, "must not be empty" if at_least == 1 else f"must have at least {at_least} characters"
    if len(value) > at_most:
        yield path, f"must have at most {at_most} characters"


def _count(schema: dict[str, Value], count: int, path: _Path, of: str, what: str) -> _Found:
    if count < schema.get(f"min{of}", 0):
        yield path, f"must have at least {schema[f'min{of}']} {what}"
    if count > schema.get(f"max{of}", math.inf):
        yield path, f"must have at most {schema[f'max{of}']} {what}"


def _range(schema: dict[str, Value], value: float, path: _Path) -> _Found:
    # Written so that NaN lies in no range.
    if "minimum" in schema and not value >= schema["minimum"]:
        yield path, f"must be at least {schema['minimum']}"
    if "maximum" in schema and not value <= schema["maximum"]:
        yield path, f"must be at most {schema['maximum']}"
    if "exclusiveMinimum" in schema and not value > schema["exclusiveMinimum"]:
        yield path, f"must be more than {schema['exclusiveMinimum']}"
    if "exclusiveMaximum" in schema and not value < schema["exclusiveMaximum"]:
        yield path, f"must be less than {schema['exclusiveMaximum']}"
    if "multipleOf" in schema and not _is_multiple(value, schema["multipleOf"]):
        yield path, f"must be a multiple of {schema['multipleOf']}"


def _is_multiple(value: float, of: float) -> bool:
    if isinstance(value, int) and isinstance(of, int):
        return value % of == 0
    times = value / of
    # 0.3 / 0.1 is 2.9999999999999996, so allow for rounding.
    return math.isfinite(times) and math.isclose(times, round(times), rel_tol=1e-9)


def _types(rule: Value) -> str:
    names = [rule] if isinstance(rule, str) else rule
    return " or ".join(f"{'an' if str(name)[0] in 'aeiou' else 'a'} {name}" for name in names)


def _short(choice: Value) -> str:
    if choice is None or isinstance(choice, bool):
        return "null" if choice is None else str(choice).lower()  # as a client writes it
    return _cut(choice if isinstance(choice, str) else str(choice), MAX_FIELD_CHARS)
