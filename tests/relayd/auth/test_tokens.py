import datetime
import os
import re
import socket
import threading
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Hello, Rejected
from relayd.auth.tokens import (
    NewToken,
    PeerCredentials,
    Principal,
    TokenRegistry,
    hash_token,
    iso_time,
    parse_expires,
    parse_limits,
    peer_credentials,
)
from relayd.store import TokenLimits

NOW = 1_800_000_000.0
DAEMON = 1000
STRANGER = PeerCredentials(pid=7, uid=4242, gid=4242)


def make_tokens() -> TokenRegistry:
    return TokenRegistry(local_uids=(DAEMON, 0))


def hello(role: str, token: str | None = None, **fields: Any) -> Hello:
    return Hello(version=1, role=role, token=token, **fields)


def create(tokens: TokenRegistry, role: str = "client", name: str = "ann", **fields: Any) -> NewToken:
    return tokens.create(role=role, name=name, now=NOW, **fields)


def refusal(outcome: Principal | Rejected) -> tuple[str, str]:
    assert isinstance(outcome, Rejected)
    assert not outcome.retryable
    return outcome.code, outcome.message


@pytest.mark.parametrize(("role", "prefix"), [("client", "rly_c_"), ("worker", "rly_w_"), ("operator", "rly_o_")])
def test_a_token_has_its_roles_prefix_and_256_random_bits(role: str, prefix: str) -> None:
    new = create(make_tokens(), role)
    assert re.fullmatch(prefix + "[A-Za-z0-9_-]{43}", new.text)


def test_only_the_hash_of_a_token_is_kept_and_nothing_of_it_is_shown() -> None:
    tokens = make_tokens()
    new = create(tokens)
    (record,) = tokens.list()
    assert record.sha256 == hash_token(new.text)
    assert new.text not in repr(new)
    assert repr(record.sha256) not in repr(record)


@pytest.mark.parametrize(
    ("token_role", "role", "code"),
    [
        ("client", "client", None),
        ("client", "worker", "forbidden"),
        ("client", "operator", "forbidden"),
        ("worker", "client", "forbidden"),
        ("worker", "worker", None),
        ("worker", "operator", "forbidden"),
        ("operator", "client", None),
        ("operator", "worker", "forbidden"),
        ("operator", "operator", None),
    ],
)
def test_a_token_opens_only_the_roles_it_is_for(token_role: str, role: str, code: str | None) -> None:
    tokens = make_tokens()
    spaces = () if token_role == "operator" else ("tts",)
    new = create(tokens, token_role, spaces=spaces, limits=TokenLimits(max_queued=3), expires_at=NOW + 60)
    outcome = tokens.log_in(hello(role, new.text, readonly=True), None, NOW)
    if code is None:
        assert outcome == Principal(
            name="ann",
            role=role,
            spaces=spaces,
            token_id=new.record.token_id,
            readonly=True,
            limits=TokenLimits(max_queued=3),
            expires_at=NOW + 60,
        )
        return
    told, message = refusal(outcome)
    assert told == code
    assert f"'{token_role}'" in message
    assert f"'{role}'" in message
    assert f"relayd token create --role {role}" in message
    assert new.text not in message


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "requires a token: set RELAY_TOKEN or RELAY_TOKEN_FILE"),
        ("", "requires a token"),
        ("letmein", "not a relay token"),
        ("rly_c_" + "x" * 43, "does not know this token"),
        ("rly_c_" + "x" * 43 + "\n", "does not know this token"),
    ],
)
def test_a_token_that_is_missing_or_unknown_is_unauthenticated(token: str | None, words: str) -> None:
    tokens = make_tokens()
    create(tokens)
    code, message = refusal(tokens.log_in(hello("client", token), None, NOW))
    assert code == ErrorCode.UNAUTHENTICATED
    assert words in message
    assert not token or token not in message


def test_a_token_ends_at_its_expiry_and_says_so() -> None:
    tokens = make_tokens()
    new = create(tokens, expires_at=NOW + 10)
    assert isinstance(tokens.log_in(hello("client", new.text), None, NOW + 9.9), Principal)
    code, message = refusal(tokens.log_in(hello("client", new.text), None, NOW + 10))
    assert code == ErrorCode.UNAUTHENTICATED
    assert f"expired at {iso_time(NOW + 10)}" in message


def test_revoking_one_of_two_tokens_leaves_the_other() -> None:
    tokens = make_tokens()
    old, new = create(tokens), create(tokens)
    (revoked,) = tokens.revoke(old.record.token_id, NOW)
    assert revoked.revoked_at == NOW
    code, message = refusal(tokens.log_in(hello("client", old.text), None, NOW))
    assert (code, "was revoked" in message) == (ErrorCode.UNAUTHENTICATED, True)
    assert isinstance(tokens.log_in(hello("client", new.text), None, NOW), Principal)


def test_revoking_by_name_ends_every_token_of_that_principal_alone() -> None:
    tokens = make_tokens()
    mine = [create(tokens), create(tokens, "worker")]
    other = create(tokens, name="bob")
    assert {record.token_id for record in tokens.revoke("ann", NOW)} == {new.record.token_id for new in mine}
    assert tokens.revoke("ann", NOW) == []
    assert tokens.revoke("nobody", NOW) == []
    assert isinstance(tokens.log_in(hello("client", other.text), None, NOW), Principal)


def test_a_principal_has_at_most_two_live_tokens_for_a_role() -> None:
    tokens = make_tokens()
    first = create(tokens, expires_at=NOW + 5)
    create(tokens)
    create(tokens, "worker")
    create(tokens, name="bob")
    with pytest.raises(
        ValueError, match=f"already has 2 live client tokens .*{first.record.token_id}.*relayd token revoke"
    ):
        create(tokens)
    tokens.create(role="client", name="ann", now=NOW + 5)


def test_tokens_are_the_same_after_a_restart() -> None:
    tokens = make_tokens()
    live, gone = create(tokens), create(tokens)
    tokens.revoke(gone.record.token_id, NOW)
    again = TokenRegistry(tokens.list(), local_uids=(DAEMON,))
    assert again.list() == tokens.list()
    assert isinstance(again.log_in(hello("client", live.text), None, NOW), Principal)
    assert isinstance(again.log_in(hello("client", gone.text), None, NOW), Rejected)


def test_a_forgotten_token_opens_nothing() -> None:
    tokens = make_tokens()
    new = create(tokens)
    tokens.forget(new.record.token_id)
    tokens.forget("tok_none")
    assert tokens.list() == []
    assert "does not know" in refusal(tokens.log_in(hello("client", new.text), None, NOW))[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"role": "admin"},
        {"name": ""},
        {"name": "an n"},
        {"name": "x" * 65},
        {"name": "tok_12345678"},
        {"name": "語"},
        {"spaces": [""]},
        {"spaces": ["a b"]},
        {"spaces": ["tts", "ü"]},
        {"expires_at": NOW},
    ],
)
def test_bad_arguments_make_no_token(fields: dict[str, Any]) -> None:
    tokens = make_tokens()
    with pytest.raises(ValueError, match=r"role|name|pattern|expired"):
        create(tokens, **fields)
    assert tokens.list() == []


@pytest.mark.parametrize("role", ["client", "worker", "operator"])
@pytest.mark.parametrize("uid", [DAEMON, 0])
def test_the_daemons_user_and_root_need_no_token_on_the_unix_socket(role: str, uid: int) -> None:
    outcome = make_tokens().log_in(hello(role), PeerCredentials(1, uid, uid), NOW)
    assert isinstance(outcome, Principal)
    assert outcome.local
    assert outcome.token_id is None
    assert outcome.role == role
    assert outcome.may_use("anything")
    if uid == 0:
        assert outcome.name == "root"


def test_nobody_else_needs_no_token_unless_it_is_said() -> None:
    tokens = TokenRegistry()
    own = {os.geteuid(), 0}
    for uid in sorted({*own, *range(12), os.geteuid() + 1, 1000, 1001, 65534}):
        outcome = tokens.log_in(hello("operator"), PeerCredentials(pid=7, uid=uid, gid=0), NOW)
        assert isinstance(outcome, Principal) is (uid in own), uid


def test_other_users_need_a_token_on_the_unix_socket_too() -> None:
    tokens = make_tokens()
    code, message = refusal(tokens.log_in(hello("client"), STRANGER, NOW))
    assert code == ErrorCode.UNAUTHENTICATED
    assert "user id 4242 needs a token" in message
    assert isinstance(tokens.log_in(hello("client", create(tokens).text), STRANGER, NOW), Principal)


def test_on_the_unix_socket_a_token_counts_before_the_user() -> None:
    tokens = make_tokens()
    root = PeerCredentials(1, 0, 0)
    assert isinstance(tokens.log_in(hello("client", "rly_c_wrong"), root, NOW), Rejected)
    outcome = tokens.log_in(hello("client", create(tokens).text), root, NOW)
    assert isinstance(outcome, Principal)
    assert (outcome.name, outcome.local) == ("ann", False)


def test_tokens_that_ended_more_than_30_days_ago_are_purged_and_no_others() -> None:
    tokens = make_tokens()
    revoked, expired, lasting = (
        create(tokens, name=name, expires_at=ends)
        for name, ends in (("ann", None), ("bob", NOW + 60), ("cid", NOW + 90 * 86_400))
    )
    tokens.revoke("ann", NOW + 60)
    ids = {revoked.record.token_id, expired.record.token_id}
    assert tokens.purge(NOW + 60 + 30 * 86_400) == []
    assert set(tokens.purge(NOW + 61 + 30 * 86_400)) == ids
    assert [record.token_id for record in tokens.list()] == [lasting.record.token_id]
    code, message = refusal(tokens.log_in(hello("client", revoked.text), None, NOW))
    assert code == ErrorCode.UNAUTHENTICATED
    assert "does not know this token" in message


@pytest.mark.parametrize(
    ("patterns", "space", "may"),
    [
        ((), "tts", True),
        (("tts",), "tts", True),
        (("tts",), "TTS", False),
        (("tts",), "tts2", False),
        (("tts*",), "tts2", True),
        (("lab-?", "x"), "lab-7", True),
        (("[ab]c",), "bc", True),
        (("[!ab]c",), "bc", False),
    ],
)
def test_space_patterns_are_those_of_fnmatch_with_case(patterns: tuple[str, ...], space: str, may: bool) -> None:
    assert Principal(name="ann", role="client", spaces=patterns).may_use(space) is may


def test_peer_credentials_are_those_of_the_process_that_connected(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        connecting = threading.Thread(target=client.connect, args=(str(tmp_path / "s"),))
        connecting.start()
        server, _ = listener.accept()
        connecting.join()
        with server:
            assert peer_credentials(server) == PeerCredentials(os.getpid(), os.getuid(), os.getgid())


def test_a_tcp_peer_has_no_credentials() -> None:
    with socket.socket(socket.AF_INET) as sock:
        assert peer_credentials(sock) is None


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("90s", NOW + 90),
        ("45m", NOW + 45 * 60),
        ("12h", NOW + 12 * 3600),
        ("30d", NOW + 30 * 86_400),
        ("2w", NOW + 14 * 86_400),
        ("2031-12-31", datetime.datetime(2031, 12, 31, tzinfo=datetime.UTC).timestamp()),
        ("2031-12-31T10:00:00", datetime.datetime(2031, 12, 31, 10, tzinfo=datetime.UTC).timestamp()),
        ("2031-12-31T10:00:00+02:00", datetime.datetime(2031, 12, 31, 8, tzinfo=datetime.UTC).timestamp()),
    ],
)
def test_expires_takes_spans_and_dates(text: str, at: float) -> None:
    assert parse_expires(text, NOW) == at


@pytest.mark.parametrize("text", ["", "30", "0d", "-1d", "1.5h", "30 d", "1y", "soon", "2020-01-01", "999999w"])
def test_expires_refuses_what_it_cannot_read_and_what_has_passed(text: str) -> None:
    with pytest.raises(ValueError, match=r"neither|past"):
        parse_expires(text, NOW)


@pytest.mark.parametrize("text", ["9999-12-31T23:59:59-05:00", "9999-12-31T23:59:59.9", "9999-12-31T23:59:59"])
def test_expires_refuses_a_moment_that_a_list_of_tokens_could_not_tell(text: str) -> None:
    with pytest.raises(ValueError, match="beyond the year 9999"):
        parse_expires(text, NOW)
    assert parse_expires("9999-12-31T18:59:58-05:00", NOW) == 253_402_300_798


@given(st.floats())
def test_every_number_has_a_time_in_words(unix_s: float) -> None:
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", iso_time(unix_s))


@given(st.text(max_size=20))
def test_any_expires_is_a_moment_to_come_or_a_value_error(text: str) -> None:
    try:
        at = parse_expires(text, NOW)
    except ValueError:
        return
    assert at > NOW
    assert iso_time(at).endswith("Z")


@given(token=st.text(max_size=256), role=st.sampled_from(["client", "worker", "operator"]))
def test_no_guess_logs_in(token: str, role: str) -> None:
    tokens = make_tokens()
    create(tokens)
    assert isinstance(tokens.log_in(hello(role, token), STRANGER, NOW), Rejected)


def test_an_operators_token_is_for_all_spaces() -> None:
    with pytest.raises(ValueError, match="an operator controls all spaces"):
        TokenRegistry().create(role="operator", name="ann", now=0.0, spaces=["tts"])


# -- exact bounds, and what else a registry says -----------------------------------------------------------------------


def test_a_token_is_live_until_its_last_moment_for_every_question() -> None:
    tokens = make_tokens()
    new = create(tokens, "operator", expires_at=NOW + 10)
    token_id = new.record.token_id
    for now, live in ((NOW + 9.9, True), (NOW + 10, False)):
        assert tokens.is_live(token_id, now) is live
        assert (tokens.owner_of(new.text, now) == "ann") is live
        assert (tokens.client_of(token_id, now) is not None) is live
        assert isinstance(tokens.log_in(hello("operator", new.text), None, now), Principal) is live
    assert tokens.owner_of("rly_o_" + "x" * 43, NOW) is None
    assert tokens.client_of("tok_none", NOW) is None
    assert not tokens.is_live("tok_none", NOW)


def test_whose_results_a_token_may_read_is_known_by_its_id() -> None:
    tokens = make_tokens()
    client = create(tokens, spaces=["tts"], readonly=True, limits=TokenLimits(max_queued=3), expires_at=NOW + 5)
    assert tokens.client_of(client.record.token_id, NOW) == Principal(
        name="ann",
        role="client",
        spaces=("tts",),
        token_id=client.record.token_id,
        readonly=True,
        limits=TokenLimits(max_queued=3),
        expires_at=NOW + 5,
    )
    assert tokens.client_of(create(tokens, "worker").record.token_id, NOW) is None
    operator = tokens.client_of(create(tokens, "operator").record.token_id, NOW)
    assert operator is not None
    assert (operator.role, operator.readonly) == ("client", False)


@pytest.mark.parametrize(("token", "asked"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_login_is_read_only_if_either_side_says_so(token: bool, asked: bool) -> None:
    tokens = make_tokens()
    new = create(tokens, readonly=token)
    principal = tokens.log_in(hello("client", new.text, readonly=asked), None, NOW)
    assert isinstance(principal, Principal)
    assert principal.readonly is (token or asked)
    assert not principal.local
    local = tokens.log_in(hello("operator", readonly=asked), PeerCredentials(pid=1, uid=0, gid=0), NOW)
    assert isinstance(local, Principal)
    assert (local.readonly, local.local, local.token_id) == (asked, True, None)


def test_refusals_are_counted_by_their_code() -> None:
    tokens = make_tokens()
    for _ in range(2):
        tokens.log_in(hello("client", "nonsense"), None, NOW)
    tokens.log_in(hello("worker", create(tokens).text), None, NOW)
    assert tokens.refused == {"unauthenticated": 2, "forbidden": 1}


def test_a_token_is_not_made_for_a_moment_that_is_now() -> None:
    tokens = make_tokens()
    with pytest.raises(ValueError, match="already have expired"):
        create(tokens, expires_at=NOW)
    assert create(tokens, expires_at=NOW + 0.001).record.expires_at == NOW + 0.001
    with pytest.raises(ValueError, match="in the past"):
        parse_expires(iso_time(NOW), NOW)
    assert parse_expires(iso_time(NOW + 1), NOW) == NOW + 1


def test_expired_and_revoked_tokens_make_room_for_new_ones() -> None:
    tokens = make_tokens()
    create(tokens, expires_at=NOW + 1)
    second = create(tokens)
    with pytest.raises(ValueError, match="already has 2 live client tokens"):
        create(tokens)
    assert tokens.create(role="client", name="ann", now=NOW + 1).record.spaces == ()
    tokens.revoke(second.record.token_id, NOW + 1)
    assert tokens.revoke(second.record.token_id, NOW + 2) == [], "it is revoked once"
    tokens.create(role="client", name="ann", now=NOW + 1)
    create(tokens, "worker")
    create(tokens, name="bob")


@pytest.mark.parametrize(
    ("revoked_s", "expires_s", "purged"),
    [
        (None, None, False),
        (0.0, None, True),
        (1.0, None, False),
        (None, 0.0, True),
        (0.0, 9e9, True),
        (1.0, 2.0, False),
    ],
)
def test_a_record_is_kept_for_thirty_days_after_its_first_end(
    revoked_s: float | None, expires_s: float | None, purged: bool
) -> None:
    tokens = make_tokens()
    new = create(tokens, expires_at=None if expires_s is None else NOW + 1 + expires_s)
    if revoked_s is not None:
        tokens.revoke(new.record.token_id, NOW + 1 + revoked_s)
    month_s = 30 * 86_400.0
    assert tokens.purge(NOW + 1 + month_s) == []
    assert tokens.purge(NOW + 1.5 + month_s) == ([new.record.token_id] if purged else [])
    assert tokens.list() == ([] if purged else tokens.list()[:1])


def test_a_reload_takes_the_stores_records_and_keeps_what_was_revoked_or_made_here() -> None:
    tokens = make_tokens()
    gone, revoked_here, revoked_there, changed = (create(tokens, name=name) for name in ("a", "b", "c", "d"))
    known = [record.token_id for record in tokens.list()]
    new_here = create(tokens, name="e")
    tokens.revoke(revoked_here.record.token_id, NOW)
    other = attrs.evolve(create(make_tokens(), name="f").record, token_id="tok_f")
    ended = tokens.reload(
        [
            revoked_here.record,
            attrs.evolve(revoked_there.record, revoked_at=NOW),
            attrs.evolve(changed.record, sha256=hash_token("another")),
            other,
        ],
        known,
    )
    assert ended == {gone.record.token_id, revoked_there.record.token_id}
    live = {record.principal for record in tokens.list() if record.live(NOW)}
    assert live == {"d", "e", "f"}
    assert tokens.owner_of(new_here.text, NOW) == "e"
    assert (tokens.owner_of(changed.text, NOW), tokens.owner_of("another", NOW)) == (None, "d")


def test_tokens_are_listed_by_age_and_then_by_id() -> None:
    tokens = make_tokens()
    for name, created in (("b", 2.0), ("a", 1.0), ("c", 1.0)):
        tokens.create(role="client", name=name, now=created)
    told = tokens.list()
    assert [record.created_at for record in told] == [1.0, 1.0, 2.0]
    assert told[0].token_id < told[1].token_id


@pytest.mark.parametrize(
    ("wire", "fault"),
    [
        ({"max_queued": 1}, None),
        ({}, None),
        ({"max_queued": 0}, "positive"),
        ({"max_queued": True}, "positive"),
        ({"max_queued": 1.5}, "positive"),
        ({"nonsense": 1}, "must be a map"),
        ([], "must be a map"),
    ],
)
def test_limits_of_a_token_are_positive_integers(wire: Any, fault: str | None) -> None:
    if fault is None:
        assert parse_limits(wire) == TokenLimits(**wire)
        return
    with pytest.raises(ValueError, match=fault):
        parse_limits(wire)


def test_times_are_told_within_the_range_of_dates() -> None:
    assert iso_time(-5.0) == iso_time(float("nan")) == "1970-01-01T00:00:00Z"
    assert iso_time(1.9) == "1970-01-01T00:00:01Z"
    assert iso_time(1e300) == "9999-12-31T23:59:59Z"
    with pytest.raises(ValueError, match="beyond the year 9999"):
        parse_expires("9999-12-31T23:59:59Z", NOW)
    assert parse_expires("9999-12-31T23:59:58Z", NOW) == 253_402_300_798.0


def test_a_user_without_a_name_is_told_by_number() -> None:
    tokens = TokenRegistry(local_uids=(4_000_000_000,))
    principal = tokens.log_in(hello("client"), PeerCredentials(pid=1, uid=4_000_000_000, gid=1), NOW)
    assert isinstance(principal, Principal)
    assert principal.name == "uid4000000000"
