"""Contexts: named relays, each a URL and a token, in one file that only its owner can read.

`relay context` manages them. All four programs use the current one where neither their options nor the environment say
which relay is meant.
"""

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from protocol.client.address import parse_address, read_token, token_from_environment

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@attrs.frozen
class Context:
    """A relay by name.

    Args:
        url: as for `parse_address`.
        token: None for none.
    """

    url: str
    token: str | None = attrs.field(default=None, repr=False)


@attrs.define
class Contexts:
    """The contexts of a user.

    Args:
        path: the file.
        by_name: sorted by name when they are saved.
        current: the name of the one that is used; None if there is none.
    """

    path: Path
    by_name: dict[str, Context] = attrs.field(factory=dict)
    current: str | None = None

    def find(self, name: str) -> Context:
        """Return the context with this name.

        Raises:
            ValueError: there is none; the message names those that there are.
        """
        if name not in self.by_name:
            there = ", ".join(self.by_name) or "none"
            raise ValueError(f"there is no context {name!r}; there are: {there} (relay context add NAME --url URL)")
        return self.by_name[name]

    def add(self, name: str, url: str, token: str | None) -> None:
        """Add or replace a context; the first one is used at once.

        Raises:
            ValueError: the name or the URL is not valid.
        """
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(f"{name!r} is not a name of a context ({NAME_PATTERN.pattern})")
        parse_address(url)
        self.by_name[name] = Context(url, token)
        self.current = self.current or name

    def remove(self, name: str) -> None:
        """Remove a context; if it was in use, none is then.

        Raises:
            ValueError: there is none with this name.
        """
        self.find(name)
        del self.by_name[name]
        if self.current == name:
            self.current = None

    def save(self) -> None:
        """Write the file, readable by its owner alone; a program that is killed leaves the old or the new one.

        Raises:
            OSError: it cannot be written.
        """
        contexts = {name: attrs.asdict(self.by_name[name]) for name in sorted(self.by_name)}
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump({"current": self.current, "contexts": contexts}, file, ensure_ascii=False, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)


def contexts_path(environ: Mapping[str, str] | None = None) -> Path:
    """The file of contexts: `relay/contexts.json` in `XDG_CONFIG_HOME`, else in ~/.config."""
    environ = os.environ if environ is None else environ
    home = environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111  Path's raises for a user who has no home
    return Path(environ.get("XDG_CONFIG_HOME") or f"{home}/.config") / "relay" / "contexts.json"


def load_contexts(environ: Mapping[str, str] | None = None) -> Contexts:
    """Read the contexts; none where the file does not exist.

    Raises:
        ValueError: the file cannot be read, others can read it, or it does not hold contexts.
    """
    path = contexts_path(environ)
    try:
        with path.open(encoding="utf-8") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ValueError(f"{path} holds tokens, and others may read it; run: chmod 600 {path}")
            return _parse(path, json.load(file))
    except (FileNotFoundError, NotADirectoryError):
        return Contexts(path)
    except OSError as fault:
        if not os.access(path.parent, os.X_OK):  # a service that may not see anybody's home
            return Contexts(path)
        raise ValueError(f"{path} cannot be read: {fault.strerror}") from None
    except json.JSONDecodeError as fault:
        raise ValueError(f"{path} is not JSON: {fault}; mend it, or delete it and add the contexts again") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text; delete it, and add the contexts again") from None


def _parse(path: Path, raw: Any) -> Contexts:
    contexts = Contexts(path)
    try:
        for name, fields in raw["contexts"].items():
            url, token = fields["url"], fields.get("token")
            if not isinstance(url, str) or not isinstance(token, str | None):
                raise TypeError
            contexts.by_name[name] = Context(url, token)
        contexts.current = raw.get("current")
        if contexts.current is not None:
            contexts.find(contexts.current)
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} does not hold contexts; delete it, and add them again") from None
    return contexts


@attrs.frozen
class Login:
    """Where to connect, and with which token.

    Args:
        url: None for the local relay's socket.
        token: "" for none.
    """

    url: str | None
    token: str = attrs.field(repr=False)


def choose_login(
    url: str | None = None,
    token_file: str | None = None,
    context: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Login:
    """Choose the relay: options take precedence over the environment, and that over the current context.

    The token of a context is sent only to its own URL, and that of the current context only if its URL is used, too.

    Args:
        url: as given by `--url`.
        token_file: as given by `--token-file`.
        context: as given by `--context`; counts as an option.
        environ: instead of the process's.

    Raises:
        ValueError: the token or the contexts cannot be read, or there is no such context.
    """
    environ = os.environ if environ is None else environ
    chosen: Context | None = None
    if context is not None:
        chosen = load_contexts(environ).find(context)
    elif not url and not environ.get("RELAY_URL"):
        contexts = load_contexts(environ)
        chosen = contexts.by_name.get(contexts.current or "")
    address = url or (chosen.url if chosen is not None else environ.get("RELAY_URL")) or None
    own = chosen.token if chosen is not None and not url else None
    if token_file:
        token: str | None = read_token(token_file)
    elif context is not None and own:
        token = own
    else:
        token = token_from_environment(environ) or own
    return Login(address, token or "")
