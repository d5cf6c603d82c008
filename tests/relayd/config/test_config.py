import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.wire.validators import FieldError
from relayd.config.loader import default_state_dir, load_config
from relayd.config.rules import is_loopback, split_listen
from relayd.config.schema import Config, ConfigError, Limits, LogConfig, OpenAi, SpaceConfig, Tls

ROOT = Path(__file__).parents[3]
HOME = {"HOME": "/home/ann"}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "relayd.toml"


def load(file: Path, text: str, environ: dict[str, str] | None = None, **overrides: Any) -> Config:
    file.write_text(text)
    return load_config(file, environ={**HOME, **(environ or {})}, overrides=overrides)


def faults(file: Path, text: str, environ: dict[str, str] | None = None, **overrides: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(file, text, environ, **overrides)
    return caught.value.faults


def test_the_file_of_the_repository_says_what_the_defaults_say() -> None:
    from_file = load_config(ROOT / "relayd.toml", environ=HOME)
    space = SpaceConfig(description="Text to speech")
    assert from_file == Config(state_dir=Path("/home/ann/.local/state/relayd"), spaces={"tts": space})


def test_without_a_file_there_are_the_defaults_and_one_space(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.config.loader.SYSTEM_FILE", file.parent / "none.toml")
    config = load_config(None, environ=HOME)
    assert config.spaces == {"tts": SpaceConfig()}
    assert config.listen_address == ("127.0.0.1", 8765)
    assert config.socket_path == Path("/home/ann/.local/state/relayd/relayd.sock")


def test_a_table_of_names_can_come_from_the_environment(file: Path) -> None:
    config = load(file, "", {"RELAYD_OPENAI__MODELS": '{"tts-1" = "tts"}'})
    assert config.openai.models == {"tts-1": "tts"}


def test_the_file_is_looked_for_in_a_fixed_order(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, named = file.parent / "system.toml", file.parent / "named.toml"
    monkeypatch.setattr("relayd.config.loader.SYSTEM_FILE", system)
    system.write_text("drain_timeout_s = 1")
    assert load_config(None, environ=HOME).drain_timeout_s == 1
    file.write_text("drain_timeout_s = 2")
    assert load_config(None, environ=HOME).drain_timeout_s == 2
    named.write_text("drain_timeout_s = 3")
    assert load_config(None, environ={**HOME, "RELAYD_CONFIG": str(named)}).drain_timeout_s == 3
    assert load_config(file, environ={**HOME, "RELAYD_CONFIG": str(named)}).drain_timeout_s == 2


def test_every_setting_of_every_table_is_read(file: Path) -> None:
    (file.parent / "c.pem").touch()
    (file.parent / "k.pem").touch()
    config = load(
        file,
        """
        listen = "[::]:443"
        state_dir = "state"
        allowed_origins = ["https://a.example", "http://b.example:8080"]
        unix_socket_mode = 0o660
        store = "memory"
        drain_timeout_s = 5
        tls = {cert = "c.pem", key = "k.pem"}
        log = {level = "debug", format = "json"}
        limits = {resume_window_s = 0, max_connections = 7}
        results = {retain_s = 1.5}
        openai = {models = {"tts-1" = "tts"}, voices = {alloy = "anna", tts = {"*" = "default"}}, strict = true}
        [spaces.tts]
        max_running_per_principal = 2
        when_empty = "refuse"
        [spaces."My.space_2"]
        """,
    )
    assert config == Config(
        listen="[::]:443",
        state_dir=file.parent / "state",
        allowed_origins=("https://a.example", "http://b.example:8080"),
        unix_socket_mode=0o660,
        store="memory",
        drain_timeout_s=5.0,
        tls=Tls(cert=file.parent / "c.pem", key=file.parent / "k.pem"),
        log=LogConfig(level="debug", format="json"),
        limits=Limits(resume_window_s=0.0, max_connections=7),
        results=config.results,
        openai=OpenAi(models={"tts-1": "tts"}, voices={"alloy": "anna", "tts": {"*": "default"}}, strict=True),
        spaces={"tts": SpaceConfig(max_running_per_principal=2, when_empty="refuse"), "My.space_2": SpaceConfig()},
    )
    assert type(config.drain_timeout_s) is float
    assert config.results.retain_s == 1.5


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("listen = 8765", "listen: must be a string, not int"),
        ('listen = "8765"', "listen: '8765' is not HOST:PORT"),
        ('listen = ":8765"', "listen: ':8765' is not HOST:PORT; 0.0.0.0:8765 listens on"),
        ('listen = "localhost:http"', "listen: 'localhost:http' is not HOST:PORT"),
        ('listen = "localhost:65536"', "listen: port 65536 is over 65535"),
        ('listen = "::1:80"', "in brackets, as in [::1]:8765"),
        ('listen = "0.0.0.0:8765"', "listen: 0.0.0.0:8765 can be reached from other machines without encryption"),
        ('listen = "relay.example:1"', "or set plain_text = true"),
        ('listen = ""\nunix_socket = false', "listen: there is nothing to listen on"),
        ('openai.models = "tts"', "openai.models: must be a table of names, as in"),
        ('[openai.models]\n"tts-1" = "no space"', "openai.models: 'tts-1': 'no space' is not a space name"),
        ("[openai.voices]\nalloy = 5", "openai.voices: 'alloy': must be a string, not int"),
        ("[openai.voices.tts]\nalloy = ''", "openai.voices: 'tts': 'alloy': must not be empty"),
        ('openai.unknown_instructions = "drop"', "openai.unknown_instructions: must be one of ignore, refuse"),
        ('state_dir = ""', "state_dir: must not be empty"),
        (f'state_dir = "/{"x" * 100}"', "state_dir: the path of the socket in it has 113 bytes"),
        ('unix_socket = "yes"', "unix_socket: must be true or false, not string"),
        ("unix_socket = 1", "unix_socket: must be true or false, not int"),
        ("unix_socket_mode = 660", "unix_socket_mode: is 660; write a file mode in octal, as in 0o660"),
        ('store = "redis"', "store: must be one of sqlite, memory, not 'redis'"),
        ('drain_timeout_s = "30"', "drain_timeout_s: must be a number, not string"),
        ("drain_timeout_s = true", "drain_timeout_s: must be a number, not boolean"),
        ("drain_timeout_s = nan", "drain_timeout_s: is nan; it must lie in"),
        ("drain_timeout_s = -1", "drain_timeout_s: is -1; it must lie in"),
        ('allowed_origins = "https://a"', "allowed_origins: must be an array, not string"),
        ('allowed_origins = ["https://a/"]', "allowed_origins: 'https://a/' is not an origin"),
        ('allowed_origins = ["https://*.a"]', "allowed_origins: 'https://*.a': an origin may have no wildcard"),
        ('allowed_origins = ["http://localhost:*"]', "an origin may have no wildcard"),
        ('behind_proxy = true\ntrusted_proxies = ["10.0.0.1/8"]', "trusted_proxies: 10.0.0.1/8 has host bits set"),
        ('behind_proxy = true\ntrusted_proxies = ["my-proxy"]', "write an address or a network, as in 10.1.2.3"),
        ('trusted_proxies = ["10.0.0.1"]', "trusted_proxies: has no effect without behind_proxy = true"),
        ('allowed_origins = ["null"]', "allowed_origins: 'null' cannot be listed"),
        ('allowed_origins = ["https://a:99999"]', "port 99999 is over 65535"),
        ('allowed_origins = ["https://me@a"]', "is not an origin"),
        ('allowed_origins = ["https://a?b"]', "is not an origin"),
        ('allowed_origins = ["https://a:"]', "is not an origin"),
        ('allowed_origins = ["https://a:0443"]', "is not an origin"),
        ('allowed_origins = ["https://bücher.example"]', "host in ASCII"),
        ('allowed_origins = ["a.example"]', "is not an origin"),
        ('allowed_origins = ["http://[0:0:0:0:0:0:0:1]"]', "browsers write this address as [::1]"),
        ("[limits]\nmax_connections = 2.0", "limits.max_connections: must be an integer, not float"),
        ("[limits]\nmax_connections = true", "limits.max_connections: must be an integer, not boolean"),
        ("[limits]\nping_interval_s = 10", "limits.dead_after_s: is 15.0; it must be at least twice"),
        ("[limits]\nmax_backlog_bytes = 1000", "limits.max_backlog_bytes: is 1000; it must lie in 2097152.."),
        ('[log]\nlevel = "verbose"', "log.level: must be one of debug, info, warning, error, not 'verbose'"),
        ("log = 3", "log: must be a table, not int"),
        ("spaces = []", "spaces: must have a table for each space ([spaces.NAME]), not array"),
        ("[spaces]\ntts = 1", "spaces.tts: must be a table, not int"),
        ("[spaces.tts]\nmax_workers = 0", "spaces.tts.max_workers: is 0; it must lie in 1..1000"),
        ('[spaces.tts]\nwhen_empty = "wait"', "spaces.tts.when_empty: must be one of queue, refuse"),
        ('[spaces."a b"]', "spaces: 'a b' is not a space name"),
        ("[spaces.tts]\nmax_worker = 1", "spaces.tts.max_worker: is not a setting; did you mean max_workers?"),
        ("max_workers = 1", "max_workers: is not a setting; did you mean spaces.NAME.max_workers?"),
        ("dead_after_s = 20", "dead_after_s: is not a setting; did you mean limits.dead_after_s?"),
        ("behind_prox = true", "behind_prox: is not a setting; did you mean behind_proxy?"),
        ("[log]\nxyzzy = 1", "log.xyzzy: is not a setting; the settings here are callsite, format, level"),
        ('[tls]\ncert = "relayd.toml"', "tls.key: is required"),
        ('[tls]\ncert = "relayd.toml"\nkey = "missing.pem"', "missing.pem: No such file or directory"),
        ('[users]\nenabled = true\nproxy_header = "Remote-User"', "users.proxy_header: needs trusted_proxies"),
        (
            'behind_proxy = true\ntrusted_proxies = ["127.0.0.1"]\n[users]\nproxy_header = "Remote-User"',
            "users.proxy_header: has no effect without users.enabled",
        ),
        (
            'behind_proxy = true\ntrusted_proxies = ["127.0.0.1"]\n[users]\nenabled = true\nproxy_header = "X User"',
            "users.proxy_header: must be the name of a header",
        ),
        ("[users]\nmin_password_chars = 4", "users.min_password_chars: "),
        ("talk = 3", "talk: must be a table, not int"),
        ('[talk]\nspeech = "tts"', "talk.reply: is required"),
        ('[talk]\nreply = ""', "talk.reply: "),
        ('[talk]\nreply = "llm"\nsession_id_pattern = "("', "talk.session_id_pattern: '(' is not a regular expression"),
        ('[talk]\nreply = "llm"\nsession_id_pattern = "a{99999999999}"', "is not a regular expression"),
        ('[talk]\nreply = "llm"\nhistory = "disc"', "talk.history: must be one of disk, memory, none"),
        ('[talk]\nreply = "llm"\nlisten = "0.0.0.0:19001"', "talk.listen: 0.0.0.0:19001 can be reached from other"),
        ('[talk]\nreply = "llm"\nface = "face"', "talk.face: has no effect without talk.calls"),
        ('[talk]\nreply = "llm"\ncalls = "a b"', "talk.calls: "),
        ('[talk]\nreply = "llm"\ncalls = "calls"\n[spaces.calls]', "spaces.calls.run_timeout_s: is 120.0, after which"),
        ('[wyoming]\nlisten = "0.0.0.0:10200"', "wyoming.listen: 0.0.0.0:10200 can be reached from other machines"),
        ('[wyoming]\nlisten = ""', "wyoming.listen: is empty; leave out the table"),
        ('[wyoming]\nallow = ["10.0.0.1/8"]', "wyoming.allow"),
        ('[wyoming]\nlanguages = ["en-us"]', "wyoming.languages"),
        ('[wyoming]\nprincipal = "a b"', "wyoming.principal"),
        ('[webrtc]\nturn_secret_file = "relayd.toml"\nturn_urls = ["turn.example.org"]', "webrtc.turn_urls: "),
        ('[webrtc]\nturn_urls = ["turn:turn.example.org:3478"]', "webrtc.turn_secret_file: is required"),
        ('[webrtc]\nturn_secret_file = "no-such-file"', "no-such-file: No such file"),
        ('[webrtc]\nstun_urls = ["turn:stun.example.org"]', "webrtc.stun_urls: "),
        ('[talk]\nreply = "llm"\nlisten = "19001"', "talk.listen: '19001' is not HOST:PORT"),
        ('[talk]\nreply = "llm"\ninstructions = "' + "x" * 4_001 + '"', "talk.instructions: "),
        ("listen = ", "is not TOML: Invalid value (at end of document)"),
        ('a = 1\na = "x"', "is not TOML: Cannot overwrite a value"),
    ],
)
def test_a_fault_is_told_with_its_path(file: Path, text: str, fault: str) -> None:
    (told,) = faults(file, text)
    assert fault in told


def test_every_fault_is_told_at_once(file: Path) -> None:
    told = faults(
        file,
        """
        listen = "0.0.0.0:99"
        colour = "red"
        [limits]
        max_connections = "7"
        ping_interval_s = false
        [spaces.x]
        max_queued = 0
        run_timeout = 3
        [spaces."-"]
        """,
        {"RELAYD_LISTE": "", "RELAYD_LOG_LEVEL": "loud", "RELAYD_SPACES__X__MAX_WORKERS": "many"},
        store="none",
    )
    assert sorted(words.split(":")[0] for words in told) == [
        "RELAYD_LISTE",
        "colour",
        "limits.max_connections",
        "limits.ping_interval_s",
        "listen",
        "log.level",
        "spaces",
        "spaces.x.max_queued",
        "spaces.x.max_workers",
        "spaces.x.run_timeout",
        "store",
    ]


def test_the_error_reads_as_a_list_under_the_files_name(file: Path) -> None:
    file.write_text("a = 1\nstore = 2")
    with pytest.raises(ConfigError) as caught:
        load_config(file, environ=HOME)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{file}: 2 faults"
    assert all(line.startswith("  ") for line in lines)


def test_a_file_that_cannot_be_read_is_one_fault(file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(file, environ=HOME)
    file.write_bytes(b"listen = '\xff'")
    with pytest.raises(ConfigError, match="is not UTF-8 at byte 10"):
        load_config(file, environ=HOME)


@pytest.mark.parametrize(
    "extra", [{"behind_proxy": True}, {"plain_text": True}, {"tls": {"cert": "relayd.toml", "key": "relayd.toml"}}]
)
def test_tls_or_a_proxy_opens_the_relay_to_other_machines(file: Path, extra: dict[str, Any]) -> None:
    assert load(file, 'listen = "0.0.0.0:0"', **extra).listen_address == ("0.0.0.0", 0)


def test_conversations_are_there_if_their_table_is(file: Path) -> None:
    assert load(file, "").talk is None
    talk = load(file, '[talk]\nreply = "llm"\nspeech = ""\nretain_days = 0.5').talk
    assert talk is not None
    assert (talk.reply, talk.speech, talk.retain_days, talk.history) == ("llm", "", 0.5, "disk")
    assert [bool(re.fullmatch(talk.session_id_pattern, name)) for name in ("uuid-1", "invalid-session-id", "a/1")] == [
        True,
        False,
        False,
    ]


def test_the_secret_of_turn_servers_is_a_file_beside_the_settings(file: Path) -> None:
    (file.parent / "turn-secret").write_text("secret\n")
    urls = ["turn:turn.example.org:3478", "turns:turn.example.org:443?transport=tcp"]
    webrtc = load(file, f'[webrtc]\nturn_urls = {urls}\nturn_secret_file = "turn-secret"').webrtc
    assert (webrtc.turn_urls, webrtc.turn_secret_file) == (tuple(urls), str(file.parent / "turn-secret"))
    calls = '[talk]\nreply = "llm"\ncalls = "calls"\nface = "face"\n[spaces.calls]\nrun_timeout_s = 14400'
    talk = load(file, calls).talk
    assert talk is not None
    assert (talk.calls, talk.face) == ("calls", "face")


def test_what_others_can_reach_unencrypted_is_known_for_every_door(file: Path) -> None:
    doors = 'listen = "127.0.0.1:1"\n[talk]\nreply = "chat"\nlisten = "0.0.0.0:2"'
    assert load(file, doors, plain_text=True).exposed == ["0.0.0.0:2"]
    assert load(file, doors.replace("127.0.0.1", "0.0.0.0"), plain_text=True).exposed == ["0.0.0.0:1", "0.0.0.0:2"]
    assert not load(file, doors, behind_proxy=True).exposed
    assert not load(file, "").exposed


def test_the_wyoming_protocol_is_there_if_its_table_is(file: Path) -> None:
    assert load(file, "").wyoming is None
    wyoming = load(file, "[wyoming]").wyoming
    assert wyoming is not None
    assert (wyoming.listen, wyoming.principal, wyoming.allow) == ("127.0.0.1:10200", "home", ())
    wyoming = load(file, '[wyoming]\nlisten = "0.0.0.0:1"\nallow = ["10.0.0.0/8"]\nlanguages = ["zh-Hant-TW"]').wyoming
    assert wyoming is not None
    assert wyoming.languages == ("zh-Hant-TW",)


def test_tcp_can_be_turned_off(file: Path) -> None:
    assert load(file, 'listen = ""').listen_address is None
    assert load(file, "unix_socket = false").socket_path is None


def test_the_environment_goes_over_the_file_and_the_command_line_over_both(file: Path) -> None:
    text = 'listen = "localhost:1"\ndrain_timeout_s = 1\n[spaces.My-tts]\nmax_workers = 1\n[spaces.b]'
    environ = {
        "RELAYD_LISTEN": "localhost:2",
        "RELAYD_DRAIN_TIMEOUT_S": "2",
        "RELAYD_LOG_LEVEL": "error",
        "RELAYD_LOG__FORMAT": "json",
        "RELAYD_LIMITS__MAX_CONNECTIONS": "5",
        "RELAYD_SPACES__MY-TTS__MAX_WORKERS": "4",
        "RELAYD_SPACES__B__DESCRIPTION": "42",
        "RELAYD_ALLOWED_ORIGINS": "https://a, https://b",
        "RELAYD_UNIX_SOCKET_MODE": "0o640",
        "RELAYD_BEHIND_PROXY": "true",
        "RELAY_URL": "not ours",
    }
    config = load(file, text, environ, listen="localhost:3", state_dir=None, log={"level": "debug"})
    assert config.listen == "localhost:3"
    assert config.drain_timeout_s == 2.0
    assert config.log == LogConfig(level="debug", format="json")
    assert config.limits.max_connections == 5
    assert config.spaces == {"My-tts": SpaceConfig(max_workers=4), "b": SpaceConfig(description="42")}
    assert config.allowed_origins == ("https://a", "https://b")
    assert config.unix_socket_mode == 0o640
    assert config.behind_proxy is True


def test_a_list_in_the_environment_may_be_written_as_in_toml(file: Path) -> None:
    assert load(file, "", {"RELAYD_ALLOWED_ORIGINS": '["https://a"]'}).allowed_origins == ("https://a",)
    assert load(file, 'allowed_origins = ["*"]', {"RELAYD_ALLOWED_ORIGINS": ""}).allowed_origins == ()


def test_an_unknown_variable_is_refused_unless_kubernetes_made_it(file: Path) -> None:
    load(file, "", {"RELAYD_PORT": "tcp://10.0.0.1:80", "RELAYD_SERVICE_HOST": "10.0.0.1", "RELAYD_PORT_80_TCP": "x"})
    told = faults(file, "", {"RELAYD_LIMITS__DEAD_AFTER": "9", "RELAYD_TOKEN": "rly_w_secret"})
    assert told == [
        "RELAYD_LIMITS__DEAD_AFTER: is not a setting; did you mean RELAYD_LIMITS__DEAD_AFTER_S?",
        "RELAYD_TOKEN: is not a setting",
    ]


def test_relative_paths_are_taken_from_who_says_them(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = file.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load(file, 'state_dir = "s"').state_dir == file.parent / "s"
    assert load(file, 'state_dir = "s"', {"RELAYD_STATE_DIR": "e"}).state_dir == elsewhere / "e"
    assert load(file, 'state_dir = "s"', {"RELAYD_STATE_DIR": "e"}, state_dir=Path("o")).state_dir == elsewhere / "o"
    assert load(file, 'state_dir = "s"', {"RELAYD_STATE_DIR": ""}).state_dir == file.parent / "s"


@pytest.mark.parametrize(
    ("environ", "state_dir"),
    [
        ({"HOME": "/h"}, "/h/.local/state/relayd"),
        ({"HOME": "/h", "XDG_STATE_HOME": "/x"}, "/x/relayd"),
        ({"HOME": "/h", "XDG_STATE_HOME": "relative"}, "/h/.local/state/relayd"),
        ({"HOME": "/h", "XDG_STATE_HOME": "/x", "STATE_DIRECTORY": "/var/lib/relayd:/var/lib/b"}, "/var/lib/relayd"),
    ],
)
def test_the_state_dir_is_where_services_and_users_have_theirs(environ: dict[str, str], state_dir: str) -> None:
    assert default_state_dir(environ) == Path(state_dir)


def test_a_space_made_by_hand_is_held_to_the_same_rules() -> None:
    with pytest.raises(FieldError, match="max_workers: is 0"):
        SpaceConfig(max_workers=0)
    with pytest.raises(ConfigError) as caught:
        SpaceConfig.from_map({"max_workers": "1", "max_queue": 1}, path="space create")
    assert caught.value.faults == [
        '"space create".max_workers: must be an integer, not string',
        '"space create".max_queue: is not a setting; did you mean max_queued?',
    ]


@given(
    st.builds(
        SpaceConfig,
        max_workers=st.integers(1, 1000),
        max_running_per_principal=st.none() | st.integers(1, 9),
        queue_timeout_s=st.floats(0.001, 1e7),
        when_empty=st.sampled_from(["queue", "refuse"]),
        description=st.text(max_size=30),
    )
)
def test_a_space_is_the_same_after_to_map_and_from_map(space: SpaceConfig) -> None:
    assert SpaceConfig.from_map(space.to_map()) == space


tables = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(
    ["listen", "tls", "log", "limits", "results", "spaces", "talk", "state_dir", "allowed_origins", "x"]
)


@given(overrides=st.dictionaries(keys, tables, max_size=4))
def test_whatever_stands_in_the_tables_there_is_a_config_or_a_config_error(overrides: dict[str, Any]) -> None:
    try:
        config = load_config(ROOT / "relayd.toml", environ=HOME, overrides=overrides)
    except ConfigError:
        return
    assert isinstance(config, Config)


@given(st.text(max_size=30))
def test_any_listen_is_an_address_or_a_value_error(listen: str) -> None:
    try:
        host, port = split_listen(listen)
    except ValueError:
        return
    assert host
    assert 0 <= port <= 65_535


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("::", False), ("10.0.0.1", False)],
)
def test_loopback_is_what_no_other_machine_can_reach(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
