"""Access over HTTP: tokens, failed logins, origins, and limits on connections."""

import json
from pathlib import Path

import pytest
import trio

from protocol.wire.errors import LoginRefused
from protocol.wire.frames import Cancelled
from protocol.wire.messages import PATH, Cancel
from relayd.auth.login_throttle import MAX_FAILURES, WINDOW_S, LoginThrottle, address_of
from relayd.auth.origins import may_come_from
from relayd.http.app import HEADERS
from relayd.store.records import TokenLimits
from tests.relayd.http.sample_handlers import GONE, PCM, Logs, make_token, staged
from tests.support.fake_worker import fake_worker, identity
from tests.support.raw_http_client import visitor
from tests.support.relay import an_id, daemon, peer

# -- who may come ----------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_without_a_token_nothing_is_told_beyond_the_unix_socket(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay, visitor(relay.urls[0]) as http:
        for method, path in (
            ("GET", "/v1/spaces"),
            ("POST", "/v1/spaces/tts/requests"),
            ("PUT", f"/v1/requests/{an_id()}?space=tts"),
            ("GET", f"/v1/requests/{an_id()}"),
            ("DELETE", f"/v1/requests/{an_id()}"),
            ("GET", f"/v1/requests/{an_id()}/events"),
            ("GET", f"/v1/requests/{an_id()}/audio"),
        ):
            answer = await http.ask(method, path)
            assert (answer.status, answer.error["code"]) == (401, "unauthenticated"), path
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.trio
async def test_tokens_that_open_nothing_are_refused_and_after_some_tries_not_looked_at(
    tmp_path: Path, logs: Logs
) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        worker = relay.tokens.create(role="worker", name="box", now=0.0).text
        good = make_token(relay)
        async with visitor(relay.urls[0]) as http:
            for value, status in (
                (f"Bearer {worker}", 403),
                ("Basic YTpi", 401),
                ("Bearer", 401),
                ("Bearer " + "x" * 300, 401),
                ("Bearer ~", 401),
            ):
                answer = await http.get("/v1/spaces", headers={"authorization": value})
                assert answer.status == status, value
            answers = [await http.get("/v1/spaces", headers={"authorization": "Bearer rly_c_no"}) for _ in range(20)]
            assert [answer.status for answer in answers][-5:] == [429] * 5
            assert answers[-1].error["code"] == "rate_limited"
            assert 1 <= int(answers[-1].headers["retry-after"]) <= WINDOW_S + 1
            right = await http.get("/v1/spaces", headers={"authorization": f"bearer {good}"})
            assert right.status == 200, "who has a token is never shut out with others of its address"
    told = json.dumps([str(line) for line in logs])
    assert sum(line["event"] == "login refused" for line in logs) <= MAX_FAILURES
    assert good not in told
    assert worker not in told


@pytest.mark.trio
async def test_failures_of_both_kinds_count_together_and_a_good_token_is_always_taken(
    tmp_path: Path, logs: Logs
) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        url, good, codes = relay.urls[0], make_token(relay), []
        async with visitor(url, token="rly_c_no") as http:
            for _ in range(MAX_FAILURES // 2):
                assert (await http.get("/v1/spaces")).status == 401
                with pytest.raises(LoginRefused) as refused:
                    async with peer(url, "client", "rly_c_no"):
                        pytest.fail("entered")
                codes.append(refused.value.code)
            assert (await http.get("/v1/spaces")).status == 429
            with pytest.raises(LoginRefused, match="retry later") as refused:
                async with peer(url, "client", "rly_c_no"):
                    pytest.fail("entered")
            codes.append(refused.value.code)
        assert codes == ["unauthenticated"] * (MAX_FAILURES // 2) + ["rate_limited"]
        async with peer(url, "client", good) as client:
            await client.settled()
    assert sum(line["event"] == "login refused" for line in logs) == MAX_FAILURES


@pytest.mark.parametrize(
    ("peer_name", "address"),
    [("1.2.3.4:56", "1.2.3.4"), ("[2001:db8::7]:56", "[2001:db8::7]"), ("2001:db8::7", "2001:db8::7"), ("a", "a")],
)
def test_an_address_is_a_peer_without_its_port(peer_name: str, address: str) -> None:
    assert address_of(peer_name) == address


def test_failures_are_forgotten_in_time_and_counted_by_address() -> None:
    failures = LoginThrottle()
    assert [failures.add("a", float(second)) for second in range(MAX_FAILURES)] == [None] * MAX_FAILURES
    assert failures.add("a", 10.0) == WINDOW_S - 10
    assert failures.add("b", 10.0) is None
    assert failures.add("a", WINDOW_S + 0.5) is None
    for _ in range(MAX_FAILURES):
        failures.add("c", 100.0)
    for number in range(4095):
        failures.add(str(number), 100.0)
    assert failures.add("c", 100.0) == WINDOW_S, "4,096 addresses are remembered"
    for number in range(4096):
        failures.add(str(number), 100.0)
    assert failures.add("c", 100.0) is None, "and no more than those"


@pytest.mark.trio
async def test_behind_a_proxy_failures_are_counted_by_whom_the_proxy_names(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0", behind_proxy=True) as relay, visitor(relay.urls[0]) as http:
        bad = {"authorization": "Bearer rly_c_no", "x-forwarded-for": "10.0.0.9, 203.0.113.7"}
        answers = [await http.get("/v1/spaces", headers=bad) for _ in range(MAX_FAILURES + 1)]
        assert answers[-1].status == 429
        other = await http.get("/v1/spaces", headers=bad | {"x-forwarded-for": "203.0.113.8"})
        assert other.status == 401


@pytest.mark.trio
@pytest.mark.parametrize("name", ["token", "access_token", "api_key", "Key"])
async def test_a_token_in_a_url_is_refused_and_never_logged(tmp_path: Path, logs: Logs, name: str) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        token = make_token(relay)
        async with visitor(relay.urls[0]) as http:
            answer = await http.get(f"/v1/spaces?{name}={token}")
            assert answer.status == 401
            assert "Authorization" in answer.error["message"]
    assert token not in json.dumps([str(line) for line in logs])


@pytest.mark.trio
async def test_a_revoked_token_ends_its_streams_within_two_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path, listen="127.0.0.1:0") as (relay, _), fake_worker(relay.url) as worker:
        token = make_token(relay)
        async with visitor(relay.urls[0], token=token) as http:
            await http.begin("GET", "/speech")
            assign = await worker.assigned()
            worker.speak(assign, PCM[:1], end=False)
            answer = await http.answer()
            relay.tokens.revoke("ann", 1.0)
            with trio.fail_after(2), pytest.raises(GONE):
                await answer.rest()
        await worker.peer.next(Cancel)
        worker.send(Cancelled(**identity(assign, 2)))
        await relay.at_rest()


@pytest.mark.trio
async def test_a_tokens_connections_are_counted_over_both_kinds(tmp_path: Path) -> None:
    async with staged(tmp_path, listen="127.0.0.1:0") as (relay, _):
        token = make_token(relay, limits=TokenLimits(max_connections=1))
        async with visitor(relay.urls[0], token=token) as http:
            assert [(await http.get("/v1/spaces")).status for _ in range(2)] == [200, 200]
            async with peer(relay.urls[0], "client", token):
                answer = await http.get("/v1/spaces")
                assert (answer.status, answer.error["code"]) == (429, "rate_limited")


# -- browsers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "host", "allowed", "may"),
    [
        ("", "relay:1", (), True),
        ("http://relay:1", "relay:1", (), True),
        ("https://Relay", "relay", (), True),
        ("http://evil", "relay:1", (), False),
        ("http://relay:2", "relay:1", (), False),
        ("null", "null", (), False),
        ("file://relay:1", "relay:1", (), False),
        ("http://friend", "relay:1", ("http://friend",), True),
        ("http://friend.evil", "relay:1", ("http://friend",), False),
        ("http://any", "relay:1", ("*",), True),
        ("null", "relay:1", ("*",), True),
        ("https://a.example", "relay:1", ("https://A.example:443",), True),
        ("http://a.example", "relay:1", ("HTTP://a.example:80",), True),
        ("https://a.example:80", "relay:1", ("https://a.example",), False),
        ("https://relay", "relay:443", (), True),
        ("chrome-extension://abc", "relay:1", ("chrome-extension://abc",), True),
    ],
)
def test_pages_of_our_own_and_of_listed_origins_may_come(
    origin: str, host: str, allowed: tuple[str, ...], may: bool
) -> None:
    assert may_come_from(origin, host, allowed) is may


@pytest.mark.trio
async def test_origins_are_checked_and_listed_ones_may_read(tmp_path: Path) -> None:
    friend = "https://friend.example"
    async with daemon(tmp_path, allowed_origins=[friend]) as relay, visitor(relay.url) as http:
        evil = await http.ask("POST", "/v1/spaces/tts/requests", headers={"origin": "https://evil.example"}, told={})
        assert (evil.status, evil.error["code"]) == (403, "forbidden")
        assert "https://evil.example is not in allowed_origins" in evil.error["message"]
        sandbox = await http.get("/v1/spaces", headers={"origin": "null"})
        assert sandbox.status == 403
        assert '"*"' in sandbox.error["message"]
        assert "access-control-allow-origin" not in evil.headers
        own = await http.get("/v1/spaces", headers={"origin": "http://localhost"})
        assert own.status == 200
        listed = await http.get("/v1/spaces", headers={"origin": friend})
        assert listed.headers["access-control-allow-origin"] == friend
        asked = {"origin": friend, "access-control-request-method": "PUT"}
        preflight = await http.ask("OPTIONS", f"/v1/requests/{an_id()}", headers=asked)
        assert preflight.status == 204
        assert "PUT" in preflight.headers["access-control-allow-methods"]
        assert "Authorization" in preflight.headers["access-control-allow-headers"]


@pytest.mark.trio
async def test_a_listed_page_may_send_what_its_library_sends_and_read_what_the_relay_answers(tmp_path: Path) -> None:
    origin = {"origin": "https://friend.example"}
    async with staged(tmp_path, allowed_origins=[origin["origin"]]) as (relay, stage), visitor(relay.url) as http:
        stage.go_on.set()
        sent = "authorization, content-type, idempotency-key, openai-beta, x-stainless-lang, x-title"
        asked = origin | {"access-control-request-method": "POST", "access-control-request-headers": sent}
        preflight = await http.ask("OPTIONS", "/v1/audio/speech", headers=asked)
        assert preflight.headers["access-control-allow-headers"] == sent
        refused = await http.ask("OPTIONS", "/v1/audio/speech", headers=asked | {"origin": "https://evil.example"})
        assert "access-control-allow-headers" not in refused.headers
        for path in ("/v1/spaces", "/nothing", "/broken"):
            answer = await http.get(path, headers=origin)
            assert answer.headers["access-control-allow-origin"] == origin["origin"], path
            exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
            assert {"x-request-id", "retry-after", "content-range", "accept-ranges", "etag", "location"} <= {*exposed}


@pytest.mark.trio
async def test_every_answer_has_the_headers_that_keep_browsers_safe(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, stage), visitor(relay.url) as http:
        stage.go_on.set()
        for path in ("/v1/spaces", "/nothing", "/broken", "/slow", "/openapi.json", PATH):
            answer = await http.get(path)
            for name, value in HEADERS.items():
                assert answer.headers.get(name) == value, (path, name)
            assert "server" not in answer.headers
