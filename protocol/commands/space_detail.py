"""What a space makes and takes, in words and tables: `relay show` and `relay voices`."""

from collections.abc import Mapping
from typing import Any

from protocol.commands.progress import table
from protocol.printable import printable
from protocol.wire.validators import Value

#: Choices that a table lists; the others are counted.
MAX_CHOICES = 8
#: The params that name a voice, as engines call them.
VOICE_PARAMS = ("voice", "speaker", "spk")
_BRANCHES = ("anyOf", "oneOf")
#: The keywords of a range, and how one is written; the first of each pair is the least.
_RANGES = (
    ("minimum", "maximum", "{}"),
    ("exclusiveMinimum", "exclusiveMaximum", "{}, exclusive"),
    ("minLength", "maxLength", "{} characters"),
    ("minItems", "maxItems", "{} items"),
)

Row = Mapping[str, Value]


def find_voices(row: Row) -> list[str] | None:
    """The voices that a space names; None if it takes any name, empty if its voice cannot be chosen."""
    rules = (row.get("params") or {}).get("properties") or {}
    rule = next((rules[name] for name in VOICE_PARAMS if isinstance(rules.get(name), dict)), None)
    if rule is None:
        return []
    choices = [rule["const"]] if "const" in rule else rule.get("enum")
    return None if choices is None else [name for name in choices if isinstance(name, str)]


def describe(row: Row) -> str:
    """A space in words: how it is doing, what it makes, its params with their ranges, and its inputs."""
    schema = row.get("params") or {}
    state = f"{row.get('state', '')}: {_count(row, 'workers', 'worker')}, {row.get('busy', 0)} of "
    facts = [
        ("space", f"{row.get('name', '')}  {row.get('description') or ''}".rstrip()),
        ("state", f"{state}{_count(row, 'slots', 'slot')} busy, {row.get('queued', 0)} queued"),
        ("engine", str(row.get("engine") or "not known before its worker has come")),
        ("makes", _format(row.get("format"))),
    ]
    text = "\n".join(f"{name:<8}{printable(value)}" for name, value in facts)
    required = set(schema.get("required") or ())
    params = [
        [name, *_rule(rule), "required" if name in required else ""]
        for name, rule in (schema.get("properties") or {}).items()
    ]
    if params:
        text += "\n\n" + table([["PARAM", "TYPE", "VALUES", "DEFAULT", "MEANING", ""], *_without_empty(params)])
    elif schema.get("description"):
        text += f"\nparams  {printable(str(schema['description']))}"
    inputs = [
        [
            name,
            ", ".join(map(str, rule.get("media_types") or ())) or "any",
            _bytes(rule.get("max_bytes")),
            " ".join(word for word in ("required", "live") if rule.get(word)),
        ]
        for name, rule in (row.get("inputs") or {}).items()
    ]
    if inputs:
        text += "\n\n" + table([["INPUT", "TYPES", "AT MOST", ""], *inputs])
    return text


def _without_empty(rows: list[list[str]]) -> list[list[str]]:
    return [[cell or "-" if at in (2, 3) else cell for at, cell in enumerate(row)] for row in rows]


def _rule(rule: Any) -> tuple[str, str, str, str]:
    """The type, the values, the default and the meaning of a param."""
    if not isinstance(rule, dict):
        return "any", "", "", ""
    branches = [branch for word in _BRANCHES for branch in rule.get(word) or () if isinstance(branch, dict)]
    parts = [part for part in (rule, *branches) if part]
    types = dict.fromkeys(name for part in parts for name in _types(part))
    values = dict.fromkeys(text for part in parts if (text := _values(part)))
    default = "" if rule.get("default") is None else str(rule["default"])
    meaning = rule.get("description") or rule.get("title") or ""
    return " or ".join(types) or "any", "; ".join(values), default, str(meaning)


def _types(rule: Row) -> list[str]:
    kind = rule.get("type")
    if kind is None and (choices := rule.get("enum")):
        return ["string"] if all(isinstance(choice, str) for choice in choices) else []
    return [str(each) for each in kind] if isinstance(kind, list | tuple) else [str(kind)] if kind else []


def _values(rule: Row) -> str:
    if "const" in rule:
        return f"only {rule['const']}"
    if choices := rule.get("enum"):
        more = f" and {len(choices) - MAX_CHOICES} more" if len(choices) > MAX_CHOICES else ""
        return ", ".join(map(str, choices[:MAX_CHOICES])) + more
    found = []
    for least, most, words in _RANGES:
        low, high = rule.get(least), rule.get(most)
        if low is not None or high is not None:
            found.append(words.format(f"{'' if low is None else low}..{'' if high is None else high}"))
    if rule.get("multipleOf") is not None:
        found.append(f"in steps of {rule['multipleOf']}")
    if isinstance(items := rule.get("items"), dict) and (of := _values(items)):
        found.append(f"each {of}")
    return ", ".join(found)


def _format(audio: Any) -> str:
    if not isinstance(audio, dict):
        return "no audio, or audio whose format is not known yet"
    channels = audio.get("channels", 1)
    return f"audio, {audio.get('sample_rate')} Hz, {channels} channel{'' if channels == 1 else 's'}"


def _bytes(most: Any) -> str:
    if not isinstance(most, int):
        return ""
    return f"{most / 2**20:.3g} MiB" if most >= 2**20 else f"{most / 2**10:.3g} KiB"


def _count(row: Row, key: str, word: str) -> str:
    number = row.get(key, 0)
    return f"{number} {word}{'' if number == 1 else 's'}"
