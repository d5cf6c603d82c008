"""Loads the settings: `relayd.toml`, overridden by `RELAYD_...` variables, overridden by the command line."""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_origin

import attrs

from protocol.wire.validators import Value
from relayd.config.rules import is_loopback, parse_annotation, space_name, split_listen
from relayd.config.schema import SECTIONS, Wyoming, structure
from relayd.config.schema import Config as Config
from relayd.config.schema import ConfigError as ConfigError
from relayd.config.schema import Http as Http
from relayd.config.schema import Limits as Limits
from relayd.config.schema import LogConfig as LogConfig
from relayd.config.schema import PrincipalLimits as PrincipalLimits
from relayd.config.schema import Results as Results
from relayd.config.schema import SpaceConfig as SpaceConfig
from relayd.config.schema import Tls as Tls

SYSTEM_FILE = Path("/etc/relayd/relayd.toml")
#: The shortest time after which the space of calls may end one.
MIN_CALL_S = 600
#: Size of `sun_path` on Linux, without the terminating NUL (unix(7)).
MAX_SOCKET_PATH_BYTES = 107
#: Variables that Kubernetes and Docker links set for a service named "relayd": not settings, and not typos either.
_FOREIGN_VARIABLES = re.compile(r"RELAYD_(SERVICE_\w+|PORT(_\w+)?|ENV_\w+|NAME)")


def load_config(
    path: Path | None,
    *,
    environ: Mapping[str, str],
    overrides: Mapping[str, Value] | None = None,
) -> Config:
    """Load the settings from the file, the environment and the command line; later ones take precedence.

    Args:
        path: the file. None means the first of `$RELAYD_CONFIG`, `./relayd.toml` and `/etc/relayd/relayd.toml` that
            exists, and without any of them the defaults with one space, `tts`.
        environ: the environment; `RELAYD_LIMITS__DEAD_AFTER_S` is `limits.dead_after_s`.
        overrides: nested as in the file; values of None are ignored.

    Raises:
        ConfigError: the file cannot be read, or the file or a variable has faults; lists all of them.
    """
    path = path or _find_file(environ)
    source = str(path) if path else "built-in configuration"
    raw = _read_file(path) if path else {"spaces": {"tts": {}}}
    if path:
        _make_absolute(raw, path.absolute().parent)
    faults = _merge_environment(raw, environ)
    _merge(raw, overrides or {})
    raw.setdefault("state_dir", str(default_state_dir(environ)))
    _make_absolute(raw, Path.cwd())
    try:
        config = structure(Config, raw, (), source)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults, *_find_conflicts(raw)], source) from None
    if faults := [*faults, *_find_conflicts(raw)]:
        raise ConfigError(faults, source)
    return config


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Return the default state folder: systemd's `$STATE_DIRECTORY`, else `relayd` in the user's state folder."""
    if configured := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(configured)
    home = environ.get("XDG_STATE_HOME", "")
    # The XDG specification requires that relative paths are ignored.
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


def _make_absolute(raw: dict[str, Value], folder: Path) -> None:
    """Make paths absolute, relative to `folder`: the file's own for paths in the file, else the current one."""
    tls, webrtc = raw.get("tls"), raw.get("webrtc")
    for table, key in ((raw, "state_dir"), (tls, "cert"), (tls, "key"), (webrtc, "turn_secret_file")):
        if isinstance(table, dict) and isinstance(path := table.get(key), str) and path and "\0" not in path:
            table[key] = str(folder / Path(path).expanduser())


def _merge_environment(raw: dict[str, Value], environ: Mapping[str, str]) -> list[str]:
    """Merge the `RELAYD_...` variables into `raw`; returns the faults in their names."""
    faults = []
    for variable in sorted(environ):
        if not variable.startswith("RELAYD_") or variable == "RELAYD_CONFIG" or _FOREIGN_VARIABLES.fullmatch(variable):
            continue
        value = environ[variable]
        if variable == "RELAYD_STATE_DIR" and not value:
            continue  # counts as unset, as in the client programs that look for the socket
        known = _settings_by_variable(raw)
        if (setting := known.get(variable)) is None:
            # All names start alike, so the default cutoff of 0.6 would match everything.
            close = difflib.get_close_matches(variable, known, n=1, cutoff=0.85)
            faults.append(f"{variable}: is not a setting" + (f"; did you mean {close[0]}?" if close else ""))
            continue
        *sections, key = setting[0]
        over: dict[str, Value] = {key: _parse_variable(value, setting[1])}
        for section in reversed(sections):
            over = {section: over}
        _merge(raw, over)
    return faults


def _settings_by_variable(raw: Mapping[str, Value]) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Return variable -> path and type of its setting, for every space in the file and always for `tts`."""
    spaces = raw.get("spaces")
    tables: list[tuple[tuple[str, ...], type]] = [((), Config)]
    tables += [(tuple(section.split(".")), cls) for section, cls in SECTIONS.items()]
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
    """Parse a variable: strings are taken literally, other values as TOML; lists may also be separated by commas."""
    if kind in (str, Path) or get_origin(kind) is Literal:
        return value
    if get_origin(kind) is tuple and not value.lstrip().startswith("["):
        return [item.strip() for item in value.split(",") if item.strip()]
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value  # its rule reports the fault


def _find_conflicts(raw: Mapping[str, Value]) -> Iterator[str]:
    """Yield the faults that involve more than one setting."""
    listen = raw.get("listen", attrs.fields(Config).listen.default)
    tls = raw.get("tls")
    intended = raw.get("behind_proxy", False) or raw.get("plain_text", False)  # or no boolean, which is reported
    talk = raw.get("talk")
    for name, door in (("listen", listen), ("talk.listen", talk.get("listen") if isinstance(talk, dict) else None)):
        if not door or not isinstance(door, str) or tls is not None or intended:
            continue
        try:
            host, _ = split_listen(door)
        except ValueError:
            host = "localhost"  # already reported
        if not is_loopback(host):
            yield (
                f"{name}: {door} can be reached from other machines without encryption: give a certificate in [tls], "
                "set behind_proxy = true if a proxy in front of the relay provides TLS, or set plain_text = true on a "
                "network where everybody may read the tokens and all that is said"
            )
    yield from _find_conflicts_of_wyoming(raw.get("wyoming"))
    if raw.get("trusted_proxies") and raw.get("behind_proxy", False) is False:
        yield "trusted_proxies: has no effect without behind_proxy = true"
    users = raw.get("users")
    if isinstance(users, dict) and users.get("proxy_header"):
        if not raw.get("trusted_proxies"):
            yield (
                "users.proxy_header: needs trusted_proxies, the addresses of the proxies that may name users: "
                "anybody else who reaches the relay could name any"
            )
        if users.get("enabled", False) is False:
            yield "users.proxy_header: has no effect without users.enabled = true"
    if raw.get("unix_socket", True) is False:
        if listen == "":
            yield 'listen: there is nothing to listen on: it is "" and unix_socket is false'
    elif isinstance(state_dir := raw["state_dir"], str):
        length = len(str(Path(state_dir, "relayd.sock")).encode(errors="surrogateescape"))
        if length > MAX_SOCKET_PATH_BYTES:
            yield (
                f"state_dir: the path of the socket in it has {length} bytes, and Linux allows "
                f"{MAX_SOCKET_PATH_BYTES}: use a shorter one, or set unix_socket = false"
            )
    if isinstance(spaces := raw.get("spaces"), dict):
        for name in spaces:
            try:
                space_name(name)
            except ValueError as fault:
                yield f"spaces: {fault}"
    if isinstance(tls, dict):
        for key in ("cert", "key"):
            if isinstance(file := tls.get(key), str) and file and (error := _read_error(Path(file))):
                yield f"tls.{key}: {file}: {error}"
    yield from _find_conflicts_of_calls(talk, raw.get("webrtc"), spaces)
    limits = raw.get("limits")
    if isinstance(limits, dict):
        ping, dead = (
            limits.get(name, getattr(attrs.fields(Limits), name).default)
            for name in ("ping_interval_s", "dead_after_s")
        )
        if isinstance(ping, int | float) and isinstance(dead, int | float) and dead < 2 * ping:
            yield f"limits.dead_after_s: is {dead}; it must be at least twice limits.ping_interval_s ({ping})"


def _find_conflicts_of_wyoming(wyoming: Value) -> Iterator[str]:
    """Yield what would let everybody in: the protocol has no login."""
    if not isinstance(wyoming, dict) or wyoming.get("allow"):
        return
    listen = wyoming.get("listen", attrs.fields(Wyoming).listen.default)
    try:
        host, _ = split_listen(listen) if isinstance(listen, str) and listen else ("localhost", 0)
    except ValueError:
        return  # already reported
    if listen == "":
        yield "wyoming.listen: is empty; leave out the table [wyoming] to turn it off"
    if not is_loopback(host):
        yield (
            f"wyoming.listen: {listen} can be reached from other machines, and the protocol has no login: "
            'say in wyoming.allow who may connect, as in allow = ["192.168.1.0/24"]'
        )


def _find_conflicts_of_calls(talk: Value, webrtc: Value, spaces: Value) -> Iterator[str]:
    """Yield what keeps calls from lasting, or browsers from reaching them."""
    if isinstance(talk, dict):
        calls = talk.get("calls")
        if talk.get("face") and not calls:
            yield "talk.face: has no effect without talk.calls, the space through which calls go"
        space = spaces.get(calls) if isinstance(spaces, dict) and isinstance(calls, str) else None
        most_s = (
            space.get("run_timeout_s", attrs.fields(SpaceConfig).run_timeout_s.default)
            if isinstance(space, dict)
            else None
        )
        if isinstance(most_s, int | float) and most_s < MIN_CALL_S:
            yield (
                f"spaces.{calls}.run_timeout_s: is {most_s}, after which a call would be cut off; "
                f"it must be at least {MIN_CALL_S}, as in run_timeout_s = 14400 for four hours"
            )
    if isinstance(webrtc, dict):
        file = webrtc.get("turn_secret_file")
        if webrtc.get("turn_urls") and not file:
            yield "webrtc.turn_secret_file: is required with webrtc.turn_urls: the file with the secret of the servers"
        if isinstance(file, str) and file and (error := _read_error(Path(file))):
            yield f"webrtc.turn_secret_file: {file}: {error}"


def _read_error(path: Path) -> str:
    try:
        with path.open("rb"):
            return ""
    except (OSError, ValueError) as fault:
        return getattr(fault, "strerror", None) or str(fault)
