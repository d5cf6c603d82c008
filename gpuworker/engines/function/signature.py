"""Reads a callable's signature: the JSON Schema of its params, its inputs, and the arguments for a call."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from gpuworker.engines.base import EngineError, EngineInput, LiveInput, RequestContext
from protocol.wire.media_types import MEDIA_TYPE_PATTERN
from protocol.wire.params_schema import MAX_DEPTH, integers_as_int
from protocol.wire.structs import NAME_PATTERN, InputRule
from protocol.wire.validators import Value

#: The parameter that receives a callable which returns whether to stop.
CANCELLED = "cancelled"
#: The parameter that receives the `RequestContext`, unless it is annotated as something else.
CONTEXT = "context"

_JSON_TYPES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "object",
    list: "array",
    type(None): "null",
}


@attrs.frozen(kw_only=True)
class Signature:
    """What a callable accepts.

    Args:
        params: JSON Schema of its parameters.
        inner: the same of what their lists and dicts hold, to which a request is not held.
        inputs: the parameters that are uploaded.
        as_they_are: inputs that are passed as an `EngineInput` or a `LiveInput`, not as bytes.
        wants_cancelled: whether it has a parameter `cancelled`.
        wants_context: whether it has a parameter `context` for the `RequestContext`.
    """

    params: dict[str, Value]
    inner: dict[str, Value]
    inputs: dict[str, InputRule]
    as_they_are: frozenset[str]
    wants_cancelled: bool
    wants_context: bool

    def arguments(
        self,
        params: dict[str, Value],
        inputs: Mapping[str, Any],
        cancelled: Callable[[], bool],
        context: RequestContext,
    ) -> dict[str, Any]:
        """The keyword arguments for one call."""
        arguments: dict[str, Any] = integers_as_int(self.inner, params)
        for name, given in inputs.items():
            if name in self.inputs:
                arguments[name] = given if name in self.as_they_are else given.data
        if self.wants_cancelled:
            arguments[CANCELLED] = cancelled
        if self.wants_context:
            arguments[CONTEXT] = context
        return arguments


def read_signature(call: Callable[..., Any]) -> Signature:
    """Read the signature of `call`.

    Raises:
        EngineError: it is async, has parameters that cannot be passed by name, or has no readable signature.
    """
    target = call if inspect.isroutine(call) else type(call).__call__
    if inspect.iscoroutinefunction(target) or inspect.isasyncgenfunction(target):
        raise EngineError(f"{_name(call)} is async; serve a plain function or generator")
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError) as fault:
        raise EngineError(f"{_name(call)} has no readable signature ({fault}); wrap it in a function") from fault
    try:
        hints = typing.get_type_hints(target)
        declared = typing.get_type_hints(target, include_extras=True)
    except Exception:  # noqa: BLE001 - an annotation may be any expression; without one the parameter accepts anything
        hints = declared = {}
    properties: dict[str, Value] = {}
    required: list[str] = []
    inputs: dict[str, InputRule] = {}
    as_they_are: set[str] = set()
    inner: dict[str, Value] = {}
    open_ended = wants_context = False
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            raise EngineError(f"{_name(call)}: parameter {name!r} cannot be passed by name; wrap it in a function")
        elif parameter.kind is parameter.VAR_POSITIONAL or name == CANCELLED:
            continue
        else:
            hint = hints.get(name, parameter.annotation)
            if name == CONTEXT and (hint is parameter.empty or RequestContext in _parts(hint)):
                wants_context = True
                continue
            optional = parameter.default is not parameter.empty
            wanted = [part for part in _parts(hint) if part in (bytes, EngineInput, LiveInput)]
            if wanted:
                if not NAME_PATTERN.fullmatch(name):
                    raise EngineError(f"{_name(call)}: {name!r} is not a valid input name ([a-z][a-z0-9_]{{0,31}})")
                kinds, live = _media_types(declared.get(name)), LiveInput in wanted
                inputs[name] = InputRule(required=not optional, media_types=kinds, live=live)
                as_they_are.update({name} if live or EngineInput in wanted else ())
                continue
            properties[name] = _schema(hint, parameter.default)
            inner[name] = _inner_schema(hint)
            if not optional:
                required.append(name)
    schema: dict[str, Value] = {"type": "object", "properties": properties, "additionalProperties": open_ended}
    if required:
        schema["required"] = required
    return Signature(
        params=schema,
        inner={"properties": inner},
        inputs=inputs,
        as_they_are=frozenset(as_they_are),
        wants_cancelled=CANCELLED in parameters,
        wants_context=wants_context,
    )


def _name(call: Callable[..., Any]) -> str:
    return str(getattr(call, "__qualname__", type(call).__qualname__))


def _parts(hint: Any) -> tuple[Any, ...]:
    """The members of a union; for any other hint, the hint alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _media_types(hint: Any) -> list[str]:
    """The media types in the metadata of `Annotated`, also inside a union; other metadata is passed over."""
    metadata = getattr(hint, "__metadata__", ())
    kinds = [kind for kind in metadata if isinstance(kind, str) and MEDIA_TYPE_PATTERN.fullmatch(kind)]
    return kinds + [kind for part in (_parts(hint) if _parts(hint) != (hint,) else ()) for kind in _media_types(part)]


def _schema(hint: Any, default: Any) -> dict[str, Value]:
    schema: dict[str, Value] = {}
    if typing.get_origin(hint) is typing.Literal:
        schema["enum"] = list(typing.get_args(hint))
    else:
        parts = _parts(hint)
        names = [_JSON_TYPES.get(typing.get_origin(part) or part) for part in parts]
        if None not in names:  # a type that JSON lacks: accepts anything
            if default is None and "null" not in names:
                names.append("null")
            schema["type"] = names[0] if len(names) == 1 else names
    if default is not inspect.Parameter.empty and isinstance(default, str | int | float | bool | None):
        schema["default"] = default
    return schema


def _inner_schema(hint: Any, depth: int = 1) -> dict[str, Value]:
    """The types of the items of lists, and of the values of dicts, as far as annotations tell them."""
    branches = []
    for part in _parts(hint):
        keyword = {list: "items", dict: "additionalProperties"}.get(typing.get_origin(part))
        if keyword and depth < MAX_DEPTH:
            inner = typing.get_args(part)[-1]
            branches.append({keyword: _schema(inner, inspect.Parameter.empty) | _inner_schema(inner, depth + 1)})
    return {"allOf": branches} if branches else {}
