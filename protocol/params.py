"""A request's params, held to the JSON Schema its worker registered: before queueing, and again before running."""

from functools import lru_cache
from typing import Any

import msgpack
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from referencing import Registry

from protocol.fields import Value, kind_of

#: Faults told at once; a client that sends more has other trouble.
MAX_FAULTS = 16


def check_schema(schema: dict[str, Value]) -> None:
    """Refuse what is no JSON Schema, or points outside itself.

    Raises:
        ValueError: says what is wrong with it.
    """
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as fault:
        raise ValueError(f"params is not a JSON Schema (2020-12): {fault.message[:300]}") from None
    if outside := _outside_reference(schema):
        raise ValueError(f"params refers to {outside!r}; only references inside the schema ('#/...') are followed")


def _outside_reference(node: Value) -> str | None:
    if isinstance(node, dict):
        target = node.get("$ref")
        if isinstance(target, str) and not target.startswith("#"):
            return target
        node = list(node.values())
    if isinstance(node, list):
        return next((found for found in map(_outside_reference, node) if found), None)
    return None


@lru_cache(maxsize=256)
def _validator(packed: bytes) -> Any:
    # An empty registry: jsonschema would otherwise fetch what a `$ref` names.
    return Draft202012Validator(msgpack.unpackb(packed), registry=Registry())


def check_params(schema: dict[str, Value], params: dict[str, Value]) -> dict[str, str]:
    """What is wrong with `params`, by field.

    Args:
        schema: passed `check_schema` before; empty takes everything.
        params: of a `submit`.

    Returns:
        field -> what is wrong with it, the path joined by dots ("" for the whole); empty when all is well.
    """
    if not schema:
        return {}
    faults: dict[str, str] = {}
    for fault in _validator(msgpack.packb(schema)).iter_errors(params):
        for field, words in _in_words(fault, params):
            faults.setdefault(field, words)
            if len(faults) >= MAX_FAULTS:
                return faults
    return faults


def _in_words(fault: ValidationError, params: dict[str, Value]) -> list[tuple[str, str]]:
    """One jsonschema error as (field, words); some stand for several fields, and the value is never quoted whole."""
    path = ".".join(str(part) for part in fault.absolute_path)
    prefix = f"{path}." if path else ""
    rule = fault.validator_value
    if fault.validator == "required" and isinstance(fault.instance, dict) and isinstance(rule, list):
        return [(f"{prefix}{name}", "is required") for name in rule if name not in fault.instance]
    if fault.validator == "additionalProperties" and isinstance(fault.instance, dict):
        known = fault.schema.get("properties", {}) if isinstance(fault.schema, dict) else {}
        takes = ", ".join(sorted(known)) or "nothing"
        return [(f"{prefix}{name}", f"is unknown; it takes {takes}") for name in fault.instance if name not in known]
    words = {
        "type": f"must be {_types(rule)}, not {kind_of(fault.instance)}",
        "minLength": "must not be empty" if rule == 1 else f"must have at least {rule} characters",
        "maxLength": f"must have at most {rule} characters",
        "minimum": f"must be at least {rule}",
        "maximum": f"must be at most {rule}",
        "enum": f"must be one of {', '.join(map(str, rule))}" if isinstance(rule, list) else "",
    }
    return [(path, words.get(str(fault.validator)) or fault.message[:300])]


def _types(rule: Value) -> str:
    names = rule if isinstance(rule, list) else [rule]
    return " or ".join(f"{'an' if str(name)[0] in 'aeiou' else 'a'} {name}" for name in names)
