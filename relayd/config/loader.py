"""Where settings come from: `relayd.toml`, over it `RELAYD_...` variables, over those the command line."""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_origin

import attrs

from protocol.wire.validators import Value
from relayd.config.schema import (
    SECTIONS,
    is_loopback,
    parse_annotation,
    space_name,
    split_listen,
    structure,
)
from relayd.config.schema import Config as Config
from relayd.config.schema import ConfigError as ConfigError
from relayd.config.schema import Http as Http
from relayd.config.schema import Limits as Limits
from relayd.config.schema import LogConfig as LogConfig
from relayd.config.schema import Results as Results
from relayd.config.schema import SpaceConfig as SpaceConfig
from relayd.config.schema import Tls as Tls

SYSTEM_FILE = Path("/etc/relayd/relayd.toml")
#: `sun_path` of Linux, without its closing NUL (unix(7)).
MAX_SOCKET_PATH_BYTES = 107
#: What Kubernetes (and Docker links) set for a service that is called "relayd": none of ours, and no typing error.
_FOREIGN_VARIABLES = re.compile(r"RELAYD_(SERVICE_\w+|PORT(_\w+)?|ENV_\w+|NAME)")


def load_config(
    path: Path | None,
    *,
    environ: Mapping[str, str],
    overrides: Mapping[str, Value] | None = None,
) -> Config:
    """The settings: the file's, over them the environment's, over those the command line's.

    Args:
        path: the file. None takes `$RELAYD_CONFIG`, `./relayd.toml` or `/etc/relayd/relayd.toml`, whichever comes
            first, and with none of them the defaults with one space, `tts`.
        environ: the environment; `RELAYD_LIMITS__DEAD_AFTER_S` is `limits.dead_after_s`.
        overrides: nested as in the file; values of None are passed over.

    Raises:
        ConfigError: the file cannot be read, or something in it, or in a variable, is wrong: all of it is told.
    """
    path = path or _find_file(environ)
    source = str(path) if path else "built-in configuration"
    raw = _read_file(path) if path else {"spaces": {"tts": {}}}
    if path:
        _anchor(raw, path.absolute().parent)
    faults = _merge_environment(raw, environ)
    _merge(raw, overrides or {})
    raw.setdefault("state_dir", str(default_state_dir(environ)))
    _anchor(raw, Path.cwd())
    try:
        config = structure(Config, raw, (), source)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults, *_faults_between(raw)], source) from None
    if faults := [*faults, *_faults_between(raw)]:
        raise ConfigError(faults, source)
    return config


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Where state lies when nobody says: systemd's `$STATE_DIRECTORY`, else `relayd` in the user's state folder."""
    if given := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(given)
    home = environ.get("XDG_STATE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(home) if home.startswith("/") else Path(environ.get("HOME") or Path.home(), ".local/state")) / "relayd"


def _find_file(environ: Mapping[str, str]) -> Path | None:
    if named := environ.get("RELAYD_CONFIG"):
        return Path(named)
    return next((path for path in (Path("relayd.toml"), SYSTEM_FILE) if path.is_file()), None)


def _read_file(path: Path) -> dict[str, Value]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as fault:
        raise ConfigError([f"cannot be read: {fault.strerror}"], str(path)) from None
    except UnicodeDecodeError as fault:
        raise ConfigError([f"is not UTF-8 at byte {fault.start}"], str(path)) from None
    except tomllib.TOMLDecodeError as fault:
        raise ConfigError([f"is not TOML: {fault}"], str(path)) from None


def _merge(raw: dict[str, Value], over: Mapping[str, Value]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping):
            below = raw.setdefault(key, {})
            if isinstance(below, dict):
                _merge(below, value)
        elif value is not None:
            raw[key] = str(value) if isinstance(value, Path) else value


def _anchor(raw: dict[str, Value], folder: Path) -> None:
    """Take relative paths from `folder`: the file's own for what stands in it, else the current one."""
    tls = raw.get("tls")
    for table, key in ((raw, "state_dir"), (tls, "cert"), (tls, "key")):
        if isinstance(table, dict) and isinstance(given := table.get(key), str) and given and "\0" not in given:
            table[key] = str(folder / Path(given).expanduser())


def _merge_environment(raw: dict[str, Value], environ: Mapping[str, str]) -> list[str]:
    """Put the `RELAYD_...` variables into `raw`; what is wrong with their names comes back."""
    faults = []
    for variable in sorted(environ):
        if not variable.startswith("RELAYD_") or variable == "RELAYD_CONFIG" or _FOREIGN_VARIABLES.fullmatch(variable):
            continue
        value = environ[variable]
        if variable == "RELAYD_STATE_DIR" and not value:
            continue  # unset, for all that look for the socket too
        known = _settings_by_variable(raw)
        if (setting := known.get(variable)) is None:
            # All begin alike, so the usual 0.6 would find kinship everywhere.
            close = difflib.get_close_matches(variable, known, n=1, cutoff=0.85)
            faults.append(f"{variable}: names no setting" + (f"; did you mean {close[0]}?" if close else ""))
            continue
        *sections, key = setting[0]
        over: dict[str, Value] = {key: _parse_variable(value, setting[1])}
        for section in reversed(sections):
            over = {section: over}
        _merge(raw, over)
    return faults


def _settings_by_variable(raw: Mapping[str, Value]) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Variable -> path and type of its setting; every space of the file has its own, and `TTS` is there for all."""
    spaces = raw.get("spaces")
    tables: list[tuple[tuple[str, ...], type]] = [((), Config)]
    tables += [((section,), cls) for section, cls in SECTIONS.items()]
    tables += [(("spaces", name), SpaceConfig) for name in ("tts", *(spaces if isinstance(spaces, dict) else ()))]
    found = {}
    for path, cls in tables:
        for field in attrs.fields(cls):
            kind, rule = parse_annotation(field.type)
            if rule is not None:
                found["RELAYD_" + "__".join((*path, field.name)).upper()] = ((*path, field.name), kind)
    for short in ("LOG_LEVEL", "LOG_FORMAT"):
        found["RELAYD_" + short] = found["RELAYD_" + short.replace("_", "__")]
    return found


def _parse_variable(value: str, kind: Any) -> Value:
    """Text stays text; other values are written as in TOML; a list may also be parted by commas."""
    if kind in (str, Path) or get_origin(kind) is Literal:
        return value
    if get_origin(kind) is tuple and not value.lstrip().startswith("["):
        return [item.strip() for item in value.split(",") if item.strip()]
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value  # its rule says what it should have been


def _faults_between(raw: Mapping[str, Value]) -> Iterator[str]:
    """What is wrong only in view of another setting; told besides the faults of single ones."""
    listen = raw.get("listen", attrs.fields(Config).listen.default)
    tls = raw.get("tls")
    if listen and isinstance(listen, str) and tls is None and raw.get("behind_proxy", False) is False:
        try:
            host, _ = split_listen(listen)
        except ValueError:
            host = "localhost"  # told already
        if not is_loopback(host):
            yield (
                f"listen: {listen} can be reached from other machines, in plain text: give a certificate in [tls], "
                "or say behind_proxy = true where a proxy in front speaks TLS"
            )
    if raw.get("unix_socket", True) is False:
        if listen == "":
            yield 'listen: nothing is left to listen on: it is "" and unix_socket is false'
    elif isinstance(state_dir := raw["state_dir"], str):
        length = len(str(Path(state_dir, "relayd.sock")).encode(errors="surrogateescape"))
        if length > MAX_SOCKET_PATH_BYTES:
            yield (
                f"state_dir: the path of the socket in it has {length} bytes, and Linux takes {MAX_SOCKET_PATH_BYTES}: "
                "use a shorter one, or say unix_socket = false"
            )
    if isinstance(spaces := raw.get("spaces"), dict):
        for name in spaces:
            try:
                space_name(name)
            except ValueError as fault:
                yield f"spaces: {fault}"
    if isinstance(tls, dict):
        for key in ("cert", "key"):
            if isinstance(file := tls.get(key), str) and file and (trouble := _unreadable(Path(file))):
                yield f"tls.{key}: {file}: {trouble}"
    limits = raw.get("limits")
    if isinstance(limits, dict):
        ping, dead = (
            limits.get(name, getattr(attrs.fields(Limits), name).default)
            for name in ("ping_interval_s", "dead_after_s")
        )
        if isinstance(ping, int | float) and isinstance(dead, int | float) and dead < 2 * ping:
            yield f"limits.dead_after_s: is {dead}; it must be at least twice limits.ping_interval_s ({ping})"


def _unreadable(path: Path) -> str:
    try:
        with path.open("rb"):
            return ""
    except (OSError, ValueError) as fault:
        return getattr(fault, "strerror", None) or str(fault)
