"""The settings as frozen classes, and the strict conversion of tables to them; `loader` reads the files.

Nothing is coerced, unknown keys are refused, and all faults are reported together, each with its path. A setting is one
line in its class, and its annotation holds the rule, so that objects constructed elsewhere (such as a space created at
run time) follow the same rules as the file.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_origin

import attrs

from protocol.log_lines import FORMATS, LEVELS
from protocol.wire.frames import MAX_MESSAGE_BYTES
from protocol.wire.validators import Value, array_of, boolean, choice, integer, kind_of, number, optional, text
from relayd.config import rules
from relayd.config.rules import is_loopback, parse_annotation, split_listen

KIB = 1024
MIB = 1024 * KIB
#: A format of the relay's log beside those of both daemons.
PLAIN = "plain"

SettingsT = TypeVar("SettingsT", bound=attrs.AttrsInstance)


class ConfigError(Exception):
    """The settings cannot be used.

    Attributes:
        faults: all faults, as `path.to.key: what is wrong`.
    """

    def __init__(self, faults: Iterable[str], source: str = "configuration") -> None:
        self.faults = list(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n  ".join([f"{source}: {count}", *self.faults]))


# -- the settings -------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True, field_transformer=rules.with_rules)
class Tls:
    """The files of the certificate chain and its key, in PEM format."""

    cert: Annotated[Path, rules.path]
    key: Annotated[Path, rules.path]


@attrs.frozen(kw_only=True, field_transformer=rules.with_rules)
class LogConfig:
    """Level and format of the log: `auto` is `console` on a terminal and `json` elsewhere; `plain` are the lines of
    other servers, `TIME - LOGGER - LEVEL - event key=value, key=value`.
    """

    level: Annotated[str, choice(*LEVELS)] = "info"
    format: Annotated[Literal["auto", "console", "json", "plain"], choice(*FORMATS, PLAIN)] = "auto"
    #: Whether each line names the module, function and line that wrote it; costs some microseconds a line.
    callsite: Annotated[bool, boolean] = False


@attrs.frozen(kw_only=True, field_transformer=rules.with_rules)
class PrincipalLimits:
    """What one principal may have, over all of its connections and spaces; a token may name other limits.

    They hold for clients, and `max_connections` for workers too; not for operators and local users of the unix socket.

    Args:
        max_connections: connections at once, an HTTP request that is being answered included.
        requests_per_s: submits, HTTP requests and turns over WebSockets a second; five seconds of them may come at
            once.
        max_queued: requests that are uploaded or wait for a worker.
        max_running: requests that run; None for no limit but the spaces' own.
        max_uploads: requests whose inputs are being uploaded.
        max_input_bytes: inputs of all live requests.
        max_readers: requests that are read while they are made, or afterwards.
        max_retained: ended requests that are remembered.
        max_priority: highest priority; a request with a higher one gets this.
    """

    max_connections: Annotated[int, rules.count] = 300
    requests_per_s: Annotated[float, number(0.001, 1e6)] = 200.0
    max_queued: Annotated[int, rules.count] = 1_000
    max_running: Annotated[int | None, optional(rules.count)] = None
    max_uploads: Annotated[int, rules.count] = 32
    max_input_bytes: Annotated[int, rules.size] = 512 * MIB
    max_readers: Annotated[int, rules.count] = 2_000
    max_retained: Annotated[int, rules.count] = 5_000
    max_priority: Annotated[int, integer(0, 9)] = 5


@attrs.frozen(kw_only=True, field_transformer=rules.with_rules)
class Limits:
    """Deadlines and sizes that apply to all connections and requests."""

    hello_timeout_s: Annotated[float, number(0.01, 60)] = 3.0
    ping_interval_s: Annotated[float, number(0.01, 3600)] = 5.0
    dead_after_s: Annotated[float, number(0.02, 36_000)] = 15.0
    #: How long a request continues without a holder; 0 cancels it at once.
    resume_window_s: Annotated[float, rules.from_zero_s] = 30.0
    #: How long a request on a disconnected worker waits for the worker to reconnect.
    worker_grace_s: Annotated[float, rules.from_zero_s] = 30.0
    stall_timeout_s: Annotated[float, rules.seconds] = 60.0
    cancel_grace_s: Annotated[float, rules.from_zero_s] = 5.0
    #: With the daemon's own files, fits into the 1,024 descriptors that Linux allows by default.
    max_connections: Annotated[int, rules.count] = 900
    #: Connections that have not logged in; where there are more, the oldest of them are closed.
    max_pending: Annotated[int, rules.count] = 4_096
    #: The same, of one address; of an IPv6 address, of its /64 network. Not used behind a proxy.
    max_pending_per_address: Annotated[int, rules.count] = 2_048
    #: Per connection; must hold the largest message.
    max_backlog_bytes: Annotated[int, integer(2 * MAX_MESSAGE_BYTES, 2**40)] = 8 * MIB
    max_input_bytes: Annotated[int, rules.size] = 32 * MIB
    max_result_bytes: Annotated[int, rules.size] = 64 * MIB
    #: Bytes of a live input that are stored a second, and so passed on; four seconds of them may come at once.
    live_input_bytes_s: Annotated[int, rules.size] = MIB
    #: How long an engine waits for a live input whose feeder sends nothing.
    feed_idle_timeout_s: Annotated[float, rules.seconds] = 30.0
    principal: PrincipalLimits = attrs.field(factory=PrincipalLimits)


@attrs.frozen(kw_only=True, field_transformer=rules.with_rules)
class Results:
    """How long and where the results of requests are kept.

    Args:
        retain_s: how long an ended request and its result are kept.
        memory_bytes: limit for all frames in memory; more are moved to files in the state folder.
        disk_bytes: limit for all those files; the oldest results are deleted first.
    """

    retain_s: Annotated[float, rules.from_zero_s] = 600.0
    memory_bytes: Annotated[int, rules.size] = 256 * MIB
    disk_bytes: Annotated[int, rules.size] = 2048 * MIB


@attrs.frozen(kw_only=True, field_transformer=rules.with_rules)
class Http:
    """Settings of HTTP.

    Args:
        max_wait_s: `/v1/audio/speech` refuses requests with a longer estimated wait, with `queue_full`.
        no_worker_wait_s: `/v1/audio/speech` answers 503 `no_worker` if no worker connects within this time.
        keep_alive_s: how long an idle connection waits for the next request.
        link_s: the longest that a link to a result may last; 0 for no links.
        lists: who may list models and voices: `token` means tokens that may use them, `public` everybody, who then sees
            all of them.
        metrics: who may read `/metrics`: `operator` means operators, `token` also clients with access to all spaces,
            `public` everybody.
    """

    max_wait_s: Annotated[float, rules.from_zero_s] = 120.0
    no_worker_wait_s: Annotated[float, rules.from_zero_s] = 5.0
    link_s: Annotated[int, integer(0, 31_536_000)] = 604_800
    lists: Annotated[Literal["token", "public"], choice("token", "public")] = "token"
    metrics: Annotated[Literal["token", "operator", "public"], choice("token", "operator", "public")] = "operator"
    keep_alive_s: Annotated[float, number(0.01, 3600)] = 30.0


@attrs.frozen(kw_only=True, field_transformer=rules.with_rules)
class Users:
    """Users, who log in to the page with a name and a password.

    Args:
        enabled: whether there are any; programs use tokens all the same.
        registration: `off`: operators add users; `invite`: whoever has an invitation registers.
        session_idle_s: how long a login lasts without being used.
        session_max_s: how long it lasts at most.
        min_password_chars: of a new password.
        proxy_header: the header in which a proxy of `trusted_proxies` names the user whom it has logged in; or "".
    """

    enabled: Annotated[bool, boolean] = False
    registration: Annotated[Literal["off", "invite"], choice("off", "invite")] = "off"
    session_idle_s: Annotated[float, rules.seconds] = 604_800.0
    session_max_s: Annotated[float, rules.seconds] = 2_592_000.0
    min_password_chars: Annotated[int, integer(8, 128)] = 10
    proxy_header: Annotated[str, rules.header_name] = ""


@attrs.frozen(kw_only=True, field_transformer=rules.with_rules)
class OpenAi:
    """What the names that OpenAI's clients have built in stand for.

    Args:
        models: model -> space; `*` is any name that no space has.
        voices: voice -> voice of the space, `default` for its own choice; `*` is any that the space does not have. A
            table in it, by the name of a space, is for that space alone.
        unknown_instructions: what becomes of `instructions` in a space that takes none.
        strict: refuse every name that no space, no voice and no table here has, and instructions that a space does not
            take. Else any name is good where a token may use one space of the kind that is asked.
    """

    models: Annotated[dict[str, str], rules.models] = attrs.field(factory=dict)
    voices: Annotated[dict[str, str | dict[str, str]], rules.voices] = attrs.field(factory=dict)
    unknown_instructions: Annotated[Literal["ignore", "refuse"], choice("ignore", "refuse")] = "ignore"
    strict: Annotated[bool, boolean] = False


@attrs.frozen(kw_only=True, field_transformer=rules.with_rules)
class Talk:
    """Conversations: what is said is answered in one space and spoken in another.

    Args:
        reply: the space of the language model, which takes `messages`.
        speech: the space that speaks the replies; "" for text alone.
        transcribe: the space that writes down what users say into a microphone; "" for none.
        calls: the space through which calls go, of engine `webrtc`; "" for none.
        face: the space that shows a face on calls; "" for calls without a picture.
        listen: `HOST:PORT` of the door for clients of the GPU server; "" for none.
        tts_server: whether `/tts` is served, for clients of the VoxCPM server.
        sessions: `open`: whoever names a new session begins a conversation; `known`: it must have been created.
        session_id_pattern: what the id of a session must match as a whole.
        history: where conversations are kept; `none`: each text is answered by itself.
        retain_days: how long a conversation is kept after its last turn.
        max_turns: what was said and replied that is kept of one conversation.
        max_context_chars: characters of it that the model is given, the newest.
        barge_in: `always`: a new text interrupts the reply that is being made; `never`: it waits, unless it asks.
        avatar: the avatar of connections that name none.
        proxies: principals whose messages to the GPU server's door may name any user, not only the connection's.
        instructions: what the model is told first, where the conversation has none of its own.
        audio_format: of audio that is sent in one piece; `mp3` needs the extra `audio`.
    """

    reply: Annotated[str, rules.space_name]
    speech: Annotated[str, rules.optional_space] = ""
    transcribe: Annotated[str, rules.optional_space] = ""
    calls: Annotated[str, rules.optional_space] = ""
    face: Annotated[str, rules.optional_space] = ""
    listen: Annotated[str, rules.listen] = ""
    tts_server: Annotated[bool, boolean] = False
    sessions: Annotated[Literal["open", "known"], choice("open", "known")] = "open"
    session_id_pattern: Annotated[str, rules.pattern] = r"(?=.*[0-9])[A-Za-z0-9._-]{1,128}"
    history: Annotated[Literal["disk", "memory", "none"], choice("disk", "memory", "none")] = "disk"
    retain_days: Annotated[float, number(0.001, 36_600)] = 30.0
    max_turns: Annotated[int, integer(2, 10_000)] = 500
    max_context_chars: Annotated[int, integer(200, 50_000)] = 16_000
    barge_in: Annotated[Literal["never", "always"], choice("never", "always")] = "never"
    avatar: Annotated[str, text(128)] = ""
    proxies: Annotated[tuple[str, ...], array_of(text(64))] = ()
    instructions: Annotated[str, text(4_000)] = ""
    audio_format: Annotated[Literal["wav", "mp3"], choice("wav", "mp3")] = "wav"


@attrs.frozen(kw_only=True, field_transformer=rules.with_rules)
class WebRtc:
    """What browsers need to reach the space of calls where they cannot directly.

    Args:
        turn_urls: of TURN servers, such as coturn, with `use-auth-secret`.
        turn_secret_file: a file with their `static-auth-secret`.
        turn_s: how long the credentials that are made from it are valid; a call may last no longer.
        stun_urls: of STUN servers.
    """

    turn_urls: Annotated[tuple[str, ...], array_of(rules.turn_url)] = ()
    turn_secret_file: Annotated[str, text(4096)] = ""
    turn_s: Annotated[int, integer(60, 604_800)] = 14_400
    stun_urls: Annotated[tuple[str, ...], array_of(rules.stun_url)] = ()


@attrs.frozen(kw_only=True, field_transformer=rules.with_rules)
class Wyoming:
    """The Wyoming protocol, for Home Assistant. It has no login: addresses are let in, and all are one principal.

    Args:
        listen: `HOST:PORT`.
        principal: whose the requests are, with the rights and limits of a client token of that name, if there is one.
        allow: addresses and networks that may connect, beside this machine.
        languages: of spaces that do not say theirs, in BCP 47.
    """

    listen: Annotated[str, rules.listen] = "127.0.0.1:10200"
    principal: Annotated[str, rules.principal] = "home"
    allow: Annotated[tuple[str, ...], array_of(rules.network)] = ()
    languages: Annotated[tuple[str, ...], array_of(rules.language)] = ("en", "zh")


@attrs.frozen(kw_only=True, field_transformer=rules.with_rules)
class SpaceConfig:
    """One space. The timeouts are defaults for requests that do not set their own.

    Args:
        max_workers: workers that may serve it at once; further ones are refused with `space_full`.
        when_empty: what happens to requests while no worker is connected: `queue` or `refuse`.
        max_attempts: number of losses of a worker or engine after which a request fails.
        cache_s: how long a reproducible result answers equal requests, from its end on; 0 for never.
        cache_bytes: limit for all results that are kept for this; the oldest go first.
        cache_shared: whether a principal's results also answer the requests of others.
    """

    max_workers: Annotated[int, integer(1, 1_000)] = 1
    max_queued: Annotated[int, rules.count] = 1_000
    max_queued_per_principal: Annotated[int, rules.count] = 100
    max_running_per_principal: Annotated[int | None, optional(rules.count)] = None
    queue_timeout_s: Annotated[float, rules.seconds] = 120.0
    run_timeout_s: Annotated[float, rules.seconds] = 120.0
    idle_timeout_s: Annotated[float, rules.seconds] = 30.0
    when_empty: Annotated[Literal["queue", "refuse"], choice("queue", "refuse")] = "queue"
    max_attempts: Annotated[int, integer(1, 100)] = 3
    cache_s: Annotated[float, rules.from_zero_s] = 0.0
    cache_bytes: Annotated[int, rules.size] = 256 * MIB
    cache_shared: Annotated[bool, boolean] = False
    description: Annotated[str, text(1_000)] = ""

    def to_map(self) -> dict[str, Value]:
        """Return the settings by name, without those that are None."""
        return {name: value for name, value in attrs.asdict(self).items() if value is not None}

    @classmethod
    def from_map(cls, values: Mapping[str, Value], *, path: str = "") -> Self:
        """Make a space from `values`; missing settings have their defaults.

        Args:
            values: settings by name, from `to_map` or from a command.
            path: prefix of the key in every fault.

        Raises:
            ConfigError: `values` have faults; lists all of them.
        """
        return structure(cls, dict(values), (path,) if path else (), "space")

    @classmethod
    def field_names(cls) -> frozenset[str]:
        """Return the names of all settings of a space."""
        return frozenset(field.name for field in attrs.fields(cls))


@attrs.frozen(kw_only=True, field_transformer=rules.with_rules)
class Config:
    """All settings of one daemon.

    Args:
        listen: `HOST:PORT`; port 0 picks a free one, and "" turns TCP off.
        state_dir: the folder of the store, the lock and the unix socket.
        behind_proxy: a proxy in front of the relay provides TLS, so plain TCP on other addresses than loopback is
            intended, and `X-Forwarded-For` of trusted proxies names the client.
        trusted_proxies: addresses and networks of those proxies; without any, all of loopback and private networks.
        plain_text: the same on a trusted network without TLS; tokens and everything else can be read there.
        allowed_origins: origins of browser pages that may connect; `*` allows any. Requests without an origin are
            always allowed.
        store: `sqlite`, or `memory`, which keeps nothing after the end.
    """

    listen: Annotated[str, rules.listen] = "127.0.0.1:8765"
    state_dir: Annotated[Path, rules.path]
    behind_proxy: Annotated[bool, boolean] = False
    trusted_proxies: Annotated[tuple[str, ...], array_of(rules.network)] = ()
    plain_text: Annotated[bool, boolean] = False
    allowed_origins: Annotated[tuple[str, ...], array_of(rules.origin)] = ()
    unix_socket: Annotated[bool, boolean] = True
    unix_socket_mode: Annotated[int, rules.file_mode] = 0o600
    store: Annotated[Literal["sqlite", "memory"], choice("sqlite", "memory")] = "sqlite"
    drain_timeout_s: Annotated[float, rules.from_zero_s] = 30.0
    tls: Tls | None = None
    log: LogConfig = attrs.field(factory=LogConfig)
    limits: Limits = attrs.field(factory=Limits)
    results: Results = attrs.field(factory=Results)
    http: Http = attrs.field(factory=Http)
    users: Users = attrs.field(factory=Users)
    openai: OpenAi = attrs.field(factory=OpenAi)
    talk: Talk | None = None
    webrtc: WebRtc = attrs.field(factory=WebRtc)
    wyoming: Wyoming | None = None
    spaces: dict[str, SpaceConfig] = attrs.field(factory=dict)

    @property
    def listen_address(self) -> tuple[str, int] | None:
        """Host and port to bind; None when TCP is off."""
        return split_listen(self.listen) if self.listen else None

    @property
    def exposed(self) -> list[str]:
        """What other machines can connect to without encryption, as `HOST:PORT`."""
        doors = [self.listen, self.talk.listen if self.talk is not None else ""]
        unencrypted = self.tls is None and not self.behind_proxy
        return [door for door in doors if unencrypted and door and not is_loopback(split_listen(door)[0])]

    @property
    def socket_path(self) -> Path | None:
        """Path of the unix socket; None when it is off."""
        return self.state_dir / "relayd.sock" if self.unix_socket else None


#: Path of a table -> its class.
SECTIONS: Mapping[str, type[attrs.AttrsInstance]] = {
    "tls": Tls,
    "log": LogConfig,
    "limits": Limits,
    "limits.principal": PrincipalLimits,
    "results": Results,
    "http": Http,
    "users": Users,
    "openai": OpenAi,
    "talk": Talk,
    "webrtc": WebRtc,
    "wyoming": Wyoming,
}


# -- from tables to classes ---------------------------------------------------------------------------------------


def structure(cls: type[SettingsT], raw: Value, path: tuple[str, ...], source: str) -> SettingsT:
    """Convert a table to a settings class.

    Args:
        cls: the settings class.
        raw: the table.
        path: path of the table, as a prefix for faults.
        source: the heading of the list of faults.

    Raises:
        ConfigError: the table has faults; lists all of them.
    """
    faults: list[str] = []
    settings = _read_table(cls, raw, path, faults)
    if settings is None:
        raise ConfigError(faults, source)
    return settings


def _read_table(cls: type[SettingsT], raw: Value, path: tuple[str, ...], faults: list[str]) -> SettingsT | None:
    """Convert one table; None if it has faults, which are added to `faults`."""
    if not isinstance(raw, dict):
        faults.append(f"{_join(*path)}: must be a table, not {kind_of(raw)}")
        return None
    before = len(faults)
    values: dict[str, Any] = {}
    for field in attrs.fields(cls):
        if field.name in raw:
            values[field.name] = _read_setting(field, raw[field.name], (*path, field.name), faults)
        elif field.default is attrs.NOTHING:
            faults.append(f"{_join(*path, field.name)}: is required")
    unknown = sorted(raw.keys() - {field.name for field in attrs.fields(cls)})
    faults += [f"{_join(*path, key)}: is not a setting{_suggest(key, cls)}" for key in unknown]
    return cls(**values) if len(faults) == before else None


def _read_setting(field: "attrs.Attribute[Any]", value: Value, path: tuple[str, ...], faults: list[str]) -> Any:
    kind, rule = parse_annotation(field.type)
    if rule is not None:
        try:
            return rules.apply_rule(kind, rule, value)
        except ValueError as fault:
            faults.append(f"{_join(*path)}: {fault}")
            return None
    if get_origin(kind) is not dict:
        return _read_table(SECTIONS[".".join(path)], value, path, faults)
    if isinstance(value, dict):
        return {name: _read_table(SpaceConfig, table, (*path, name), faults) for name, table in value.items()}
    faults.append(f"{_join(*path)}: must have a table for each space ([spaces.NAME]), not {kind_of(value)}")
    return None


def _join(*path: str) -> str:
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"' for part in path)


def _suggest(key: str, cls: type) -> str:
    names = [field.name for field in attrs.fields(cls)]
    for section, other in SECTIONS.items():
        if other is not cls and key in {field.name for field in attrs.fields(other)}:
            return f"; did you mean {section}.{key}?"
    if cls is not SpaceConfig and key in SpaceConfig.field_names():
        return f"; did you mean spaces.NAME.{key}?"
    if close := difflib.get_close_matches(key, names, n=1):
        return f"; did you mean {close[0]}?"
    return f"; the settings here are {', '.join(sorted(names))}"
