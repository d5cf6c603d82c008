"""Users of the page: log in, register, change the password, log out; and what other sites and guessers try."""

import json
import os
import pwd
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.client.address import Address
from protocol.wire.errors import LinkError, LoginRefused
from protocol.wire.messages import Done, Rejected, Steer
from relayd.auth import passwords
from relayd.auth.login_throttle import MAX_FAILURES
from relayd.auth.users import MAX_SESSIONS
from relayd.net.http_head import PrefixedStream
from tests.support.raw_http_client import Answer, Visitor, visitor
from tests.support.relay import Daemon, Peer, daemon, peer, until

PASSWORD, NEW = "correct horse battery", "staple of another kind"
USERS: dict[str, Any] = {"enabled": True, "registration": "invite"}


@pytest.fixture(autouse=True)
def _fast_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least that argon2 allows: what is tested is when it is asked, not how long it takes."""
    from argon2 import PasswordHasher

    hasher = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    monkeypatch.setattr(passwords, "_hasher", lambda: hasher)


@attrs.define
class Browser:
    """A browser on the relay's page: it sends its origin, and keeps the cookie."""

    http: Visitor
    origin: str
    cookie: str = ""

    async def ask(self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] = {}) -> Answer:
        """Send a request as the page does; `headers` override."""
        mine = {"host": self.origin.partition("//")[2], "origin": self.origin, "cookie": self.cookie}
        mine |= {"content-type": "application/json"} if body is not None else {}
        sent = {name: value for name, value in (mine | dict(headers)).items() if value}
        data = b"" if body is None else json.dumps(body).encode()
        answer = await self.http.ask(method, path, body=data, headers=sent)
        if (given := answer.headers.get("set-cookie")) is not None:
            self.cookie = given.partition(";")[0] if "max-age=0" not in given.lower() else ""
        return answer

    async def log_in(self, name: str = "anna", password: str = PASSWORD) -> Answer:
        return await self.ask("POST", "/v1/session", {"name": name, "password": password})

    async def who(self) -> Any:
        return (await self.ask("GET", "/v1/session")).json["name"]


@asynccontextmanager
async def browsing(relay: Daemon) -> AsyncIterator[Browser]:
    async with visitor(relay.urls[0]) as http:
        yield Browser(http, relay.urls[0].replace("ws://", "http://"))


@asynccontextmanager
async def with_users(folder: Path, *names: str, users: Mapping[str, Any] = USERS, **more: Any) -> AsyncIterator[Daemon]:
    """A relay with users whose password is `PASSWORD`; those named `op…` are operators."""
    async with daemon(folder, listen="127.0.0.1:0", users=dict(users), **more) as relay:
        for name in names or ("anna",):
            role = "operator" if name.startswith("op") else "client"
            await steer(relay, "create_user", name, role=role, password=PASSWORD)
        yield relay


async def steer(relay: Daemon, action: str, target: str = "", **options: Any) -> Any:
    async with peer(relay.url, "operator") as operator:
        operator.send(Steer(action=action, target=target, options=options))
        answer = await operator.next(Done, Rejected)
        return answer.data if isinstance(answer, Done) else answer


class WithHeaders(PrefixedStream):
    """A stream to the relay that adds headers to the first head that is sent."""

    headers: Mapping[str, str] = {}

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items()).encode()
        self.headers = {}
        head, end, rest = bytes(data).partition(b"\r\n\r\n")
        await super().send_all(b"%b\r\n%b\r\n%b" % (head, lines, rest) if lines and end else data)


def page_socket(
    relay: Daemon, browser: Browser, role: str = "client", **headers: str
) -> AbstractAsyncContextManager[Peer]:
    """The WebSocket of a page in a browser, which sends the cookie and the page's origin."""
    sent = {"Origin": browser.origin, "Cookie": browser.cookie} | headers

    async def connect(address: Address) -> trio.abc.Stream:
        stream = WithHeaders(await trio.open_tcp_stream(address.host, address.port), b"")
        stream.headers = {name.replace("_", "-"): value for name, value in sent.items() if value}
        return stream

    return peer(relay.urls[0], role, connect_to=connect)


# -- logging in and out ------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_user_logs_in_uses_the_relay_and_logs_out(tmp_path: Path) -> None:
    async with with_users(tmp_path) as relay, browsing(relay) as browser:
        assert await browser.who() is None
        assert (await browser.ask("GET", "/v1/spaces")).status == 401
        answer = await browser.log_in("Anna")
        assert (answer.status, answer.json["name"], answer.json["role"]) == (200, "anna", "client")
        flags = answer.headers["set-cookie"].lower()
        assert flags.startswith("relayd=rly_s_")
        assert {"httponly", "samesite=strict", "path=/"} <= {each.strip() for each in flags.split(";")}
        assert answer.headers["cache-control"] == "no-store"
        assert await browser.who() == "anna"
        assert (await browser.ask("GET", "/v1/spaces")).status == 200
        async with page_socket(relay, browser) as page:
            assert page.welcome.principal == "anna"
            old = browser.cookie
            assert (await browser.ask("DELETE", "/v1/session")).status == 204
            with pytest.raises(LinkError):
                await page.next()
        assert browser.cookie == ""
        assert (await browser.ask("GET", "/v1/spaces", headers={"cookie": old})).status == 401


@pytest.mark.trio
async def test_without_users_there_is_nothing_to_log_in_to(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay, browsing(relay) as browser:
        answer = await browser.ask("GET", "/v1/session")
        assert (answer.json["users"], answer.json["registration"]) == (False, "off")
        assert (await browser.log_in()).status == 404


@pytest.mark.trio
async def test_each_login_has_a_new_session_and_ends_the_one_that_the_browser_brought(tmp_path: Path) -> None:
    async with with_users(tmp_path, "anna", "mallory") as relay, browsing(relay) as browser:
        await browser.log_in("mallory")
        planted = browser.cookie  # an attacker's, or one that the attacker knows
        await browser.log_in("anna")
        assert browser.cookie != planted
        assert await browser.who() == "anna"
        answer = await browser.ask("GET", "/v1/spaces", headers={"cookie": planted})
        assert answer.status == 401
        made_up = "relayd=rly_s_" + "A" * 43
        browser.cookie = made_up
        await browser.log_in("anna")
        assert browser.cookie != made_up, "an id that the browser brings is never taken over"


@pytest.mark.trio
async def test_sessions_outlive_the_relay_and_their_ids_are_stored_only_hashed(tmp_path: Path) -> None:
    async with with_users(tmp_path, store="sqlite") as relay, browsing(relay) as browser:
        await browser.log_in()
        cookie = browser.cookie
    files = b"".join(file.read_bytes() for file in tmp_path.glob("relayd.db*"))  # noqa: ASYNC240
    assert cookie.partition("=")[2].encode() not in files
    assert PASSWORD.encode() not in files
    assert b"$argon2id$" in files
    async with (
        daemon(tmp_path, listen="127.0.0.1:0", users=USERS, store="sqlite") as relay,
        browsing(relay) as browser,
    ):
        browser.cookie = cookie
        assert await browser.who() == "anna"


@pytest.mark.trio
async def test_a_session_ends_unused_and_at_the_latest_after_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1e9
    monkeypatch.setattr("relayd.core.accounts.time.time", lambda: now)
    limits = {**USERS, "session_idle_s": 100, "session_max_s": 250}
    async with with_users(tmp_path, users=limits) as relay, browsing(relay) as browser:
        await browser.log_in()
        for _ in range(2):
            now += 90
            assert await browser.who() == "anna", "it is used"
        now += 90
        assert await browser.who() is None, "it is 270 s old"
        browser.cookie = ""
        await browser.log_in()
        now += 101
        assert await browser.who() is None


@pytest.mark.trio
async def test_a_changed_password_ends_the_other_sessions_and_keeps_this_one(tmp_path: Path) -> None:
    async with with_users(tmp_path) as relay, browsing(relay) as phone, browsing(relay) as desk:
        await phone.log_in()
        await desk.log_in()
        before = desk.cookie
        change = {"password": "not the password", "new_password": NEW}
        assert (await desk.ask("PUT", "/v1/session/password", change)).status == 401
        short = {"password": PASSWORD, "new_password": "short"}
        assert "at least 10" in (await desk.ask("PUT", "/v1/session/password", short)).error["message"]
        assert (await desk.ask("PUT", "/v1/session/password", change | {"password": PASSWORD})).status == 200
        assert await phone.who() is None
        assert await desk.who() == "anna"
        assert desk.cookie != before
        phone.cookie = ""
        assert (await phone.log_in()).status == 401
        assert (await phone.log_in(password=NEW)).status == 200


@pytest.mark.trio
async def test_what_an_operator_changes_ends_the_sessions_of_a_user(tmp_path: Path) -> None:
    changes: list[tuple[str, dict[str, str]]] = [
        ("set_user_role", {"role": "operator"}),
        ("set_user_password", {"password": NEW}),
        ("remove_user", {}),
    ]
    async with with_users(tmp_path) as relay, browsing(relay) as browser:
        for action, options in changes:
            await browser.log_in()
            async with page_socket(relay, browser) as page:
                assert isinstance(await steer(relay, action, "ANNA", **options), dict)
                with pytest.raises(LinkError):
                    await page.next()
            assert await browser.who() is None, action
            browser.cookie = ""
            await steer(relay, "set_user_password", "anna", password=PASSWORD)
        assert (await browser.log_in()).status == 401


@pytest.mark.trio
async def test_a_user_has_only_so_many_sessions(tmp_path: Path) -> None:
    async with with_users(tmp_path) as relay, browsing(relay) as browser:
        cookies = []
        for _ in range(MAX_SESSIONS + 1):
            browser.cookie = ""
            await browser.log_in()
            cookies.append(browser.cookie)
        browser.cookie = cookies[0]
        assert await browser.who() is None
        browser.cookie = cookies[1]
        assert await browser.who() == "anna"


# -- roles -------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_only_operators_log_in_as_operators(tmp_path: Path) -> None:
    async with with_users(tmp_path, "anna", "opal") as relay, browsing(relay) as browser:
        await browser.log_in("opal")
        async with page_socket(relay, browser, "operator") as page:
            page.send(Steer(action="list_users"))
            names = [row["name"] for row in (await page.next(Done)).data["users"]]
            assert names == ["anna", "opal"]
        await browser.log_in("anna")
        for role, why in (("operator", "relayd user role anna operator"), ("worker", "cannot log in")):
            with pytest.raises(LoginRefused, match=why):
                async with page_socket(relay, browser, role):
                    pass


@pytest.mark.trio
async def test_a_user_is_a_principal_with_the_limits_of_principals(tmp_path: Path) -> None:
    limits = {"principal": {"requests_per_s": 0.2}}
    async with with_users(tmp_path, limits=limits) as relay, browsing(relay) as browser:
        await browser.log_in()
        assert (await browser.ask("GET", "/v1/spaces")).status == 200
        assert (await browser.ask("GET", "/v1/spaces")).status == 429


@pytest.mark.trio
async def test_a_token_goes_before_the_cookie_and_a_session_is_no_token(tmp_path: Path) -> None:
    async with with_users(tmp_path) as relay, browsing(relay) as browser:
        await browser.log_in()
        wrong = {"authorization": "Bearer rly_c_no"}
        assert (await browser.ask("GET", "/v1/spaces", headers=wrong)).status == 401
        as_token = {"authorization": f"Bearer {browser.cookie.partition('=')[2]}", "cookie": ""}
        assert (await browser.ask("GET", "/v1/spaces", headers=as_token)).status == 401


@pytest.mark.trio
async def test_a_link_to_a_result_outlives_the_session_and_not_the_user(tmp_path: Path) -> None:
    async with with_users(tmp_path) as relay, browsing(relay) as browser:
        await browser.log_in()
        posted = await browser.ask("POST", "/v1/spaces/tts/requests", {"params": {"text": "hello"}})
        path = f"/v1/requests/{posted.json['request_id']}"
        links = (await browser.ask("GET", f"{path}/link")).json["links"]
        await browser.ask("DELETE", path)
        await browser.ask("DELETE", "/v1/session")
        assert (await browser.ask("GET", links["output"])).status == 410, "it is known, and was cancelled"
        await steer(relay, "remove_user", "anna")
        assert (await browser.ask("GET", links["output"])).status == 401


# -- registering -------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_an_invitation_makes_one_user_who_is_logged_in(tmp_path: Path) -> None:
    async with with_users(tmp_path) as relay, browsing(relay) as browser:
        code = (await steer(relay, "create_invite", role="operator", expires="2d"))["code"]
        order = {"name": "bob", "password": PASSWORD, "invite": code}
        relay.tokens.create(role="client", name="carl", now=0.0)
        for change, status, why in (
            ({"invite": "rly_i_no"}, 403, "ask for a new one"),
            ({"name": "ANNA"}, 422, "is taken"),
            ({"name": "Carl"}, 422, "is taken"),  # whose requests are those of a token
            ({"name": "root"}, 422, "is taken"),
            ({"name": "<img src=x onerror=alert(1)>"}, 422, "is not a valid name"),
            ({"name": "ses_1"}, 422, "is not a valid name"),
            ({"password": "short"}, 422, "at least 10"),
            ({"password": "x" * 300}, 422, "at most 256"),
        ):
            answer = await browser.ask("POST", "/v1/register", order | change)
            assert (answer.status, why in answer.error["message"]) == (status, True), (change, answer.error)
        answer = await browser.ask("POST", "/v1/register", order)
        assert (answer.status, answer.json["role"]) == (201, "operator")
        assert await browser.who() == "bob"
        again = await browser.ask("POST", "/v1/register", order | {"name": "eve"})
        assert again.status == 403


@pytest.mark.trio
async def test_nobody_registers_under_the_name_of_a_user_who_was_removed(tmp_path: Path) -> None:
    async with with_users(tmp_path) as relay, browsing(relay) as browser:
        await steer(relay, "remove_user", "anna")
        code = (await steer(relay, "create_invite"))["code"]
        answer = await browser.ask("POST", "/v1/register", {"name": "anna", "password": PASSWORD, "invite": code})
        assert (answer.status, "taken" in answer.error["message"]) == (422, True)
        assert "id" in await steer(relay, "create_user", "anna", password=PASSWORD), "an operator may"
        assert (await browser.log_in()).status == 200


@pytest.mark.trio
async def test_registration_is_off_unless_it_is_turned_on_and_an_invitation_can_be_taken_back(tmp_path: Path) -> None:
    async with with_users(tmp_path, users={"enabled": True}) as relay, browsing(relay) as browser:
        made = await steer(relay, "create_invite")
        order = {"name": "bob", "password": PASSWORD, "invite": made["code"]}
        assert (await browser.ask("POST", "/v1/register", order)).status == 403
        assert await steer(relay, "remove_user", made["id"]) == {}
        assert [row["name"] for row in (await steer(relay, "list_users"))["users"]] == ["anna"]


# -- other sites -------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_cookie_counts_only_for_the_relays_own_page(tmp_path: Path) -> None:
    async with with_users(tmp_path, allowed_origins=["*"]) as relay, browsing(relay) as browser:
        await browser.log_in()
        evil = "http://evil.example"
        for headers in (
            {"origin": evil},
            {"origin": "null"},
            {"origin": ""},
            {"origin": "", "sec-fetch-site": "cross-site"},
            {"origin": "", "sec-fetch-site": "same-site"},
            {"sec-fetch-site": "cross-site"},
        ):
            for method, path, body in (
                ("POST", "/v1/spaces/tts/requests", {"text": "hello"}),
                ("PUT", "/v1/session/password", {"password": PASSWORD, "new_password": NEW}),
                ("DELETE", "/v1/session", None),
                ("POST", "/v1/session", {"name": "anna", "password": PASSWORD}),
                ("POST", "/websockets/submit/tts", {"prompt": "hello"}),
            ):
                answer = await browser.ask(method, path, body, headers=headers)
                assert answer.status == 403, (headers, method, path)
                assert "set-cookie" not in answer.headers
        assert (await browser.ask("GET", "/v1/spaces", headers={"origin": evil})).status == 403
        assert (await browser.ask("GET", "/v1/spaces", headers={"origin": ""})).status == 200
        assert await browser.who() == "anna", "nothing of that has logged anybody out"
        with pytest.raises(LoginRefused, match="another site"):
            async with page_socket(relay, browser, Origin=evil):
                pass


@pytest.mark.trio
async def test_no_login_redirects_anywhere_and_no_page_can_be_framed(tmp_path: Path) -> None:
    async with with_users(tmp_path) as relay, browsing(relay) as browser:
        for query in ("?next=//evil.example", "?redirect=https://evil.example/", "//evil.example/"):
            order = {"name": "anna", "password": PASSWORD, "next": "//evil.example"}
            answer = await browser.ask("POST", f"/v1/session{query}", order)
            assert answer.status in (200, 404)
            assert "location" not in answer.headers
        for path in ("/", "/v1/session", "//evil.example/", "/v1/session/"):
            answer = await browser.ask("GET", path)
            assert answer.status in (200, 404), path
            assert "location" not in answer.headers
            assert answer.headers["x-frame-options"] == "DENY"
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


# -- guessing ----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_an_unknown_name_is_hashed_and_answered_as_a_wrong_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_users(tmp_path, "anna", "opal") as relay, browsing(relay) as browser:
        await steer(relay, "create_user", "proxied")
        asked: list[str] = []
        verify = passwords.matches

        def matches(hashed: str, text: str) -> bool:
            asked.append(hashed)
            return verify(hashed, text)

        monkeypatch.setattr(passwords, "matches", matches)
        answers = [await browser.log_in(name, "wrong password") for name in ("anna", "nobody", "proxied", "no name!")]
        assert len({(answer.status, answer.body) for answer in answers}) == 1
        assert answers[0].status == 401
        assert [bool(hashed) for hashed in asked] == [True, False, False, False], "each costs one check of a hash"
        assert (await browser.log_in("proxied", "")).status == 401


def test_a_hash_of_nobody_is_checked_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    class Hasher:
        def hash(self, password: bytes) -> str:
            return f"hash of {password.decode()}"

        def verify(self, hashed: str, password: bytes) -> bool:
            checked.append(hashed)
            return True

    monkeypatch.setattr(passwords, "_hasher", Hasher)
    assert not passwords.matches("", "the password of no user")
    assert len(checked) == 1
    assert passwords.matches("some hash", "x")


@pytest.mark.trio
async def test_guesses_are_limited_by_name_and_by_address_also_many_at_once(tmp_path: Path) -> None:
    async with with_users(tmp_path, "anna", "opal", behind_proxy=True, trusted_proxies=["127.0.0.1"]) as relay:
        statuses = []

        async def guess(number: int) -> None:
            async with browsing(relay) as browser:
                elsewhere = {"x-forwarded-for": f"192.0.2.{number}"}
                order = {"name": "anna", "password": "wrong password"}
                statuses.append((await browser.ask("POST", "/v1/session", order, headers=elsewhere)).status)

        async with trio.open_nursery() as nursery:
            for number in range(MAX_FAILURES + 5):
                nursery.start_soon(guess, number)
        assert sorted(statuses) == [401] * MAX_FAILURES + [429] * 5, "from any number of addresses"
        async with browsing(relay) as browser:
            assert (await browser.log_in("anna")).status == 429
            assert (await browser.log_in("opal")).status == 200, "others are not shut out"
            for _ in range(MAX_FAILURES):
                await browser.log_in("nobody", "wrong password")
            assert (await browser.log_in("opal")).status == 429, "nor is the address, until it guesses"


@pytest.mark.trio
async def test_logins_that_succeed_are_not_counted(tmp_path: Path) -> None:
    async with with_users(tmp_path) as relay, browsing(relay) as browser:
        for _ in range(MAX_FAILURES + 2):
            assert (await browser.log_in()).status == 200


# -- TLS and proxies ---------------------------------------------------------------------------------------------------

PROXY: dict[str, Any] = {"behind_proxy": True, "trusted_proxies": ["127.0.0.1"]}


@pytest.mark.trio
async def test_behind_tls_the_cookie_is_for_this_host_over_tls_alone(tmp_path: Path) -> None:
    async with with_users(tmp_path, **PROXY) as relay, browsing(relay) as browser:
        browser.origin = browser.origin.replace("http:", "https:")
        tls = {"x-forwarded-proto": "https"}
        answer = await browser.ask("POST", "/v1/session", {"name": "anna", "password": PASSWORD}, headers=tls)
        flags = answer.headers["set-cookie"]
        assert flags.startswith("__Host-relayd=rly_s_")
        assert re.search(r"; secure\b", flags, re.IGNORECASE)
        assert (await browser.ask("GET", "/v1/session", headers=tls)).json["name"] == "anna"
        plain = browser.cookie.replace("__Host-", "")
        answer = await browser.ask("GET", "/v1/session", headers=tls | {"cookie": plain})
        assert answer.json["name"] is None, "one that somebody may have planted over plain HTTP"
        from_plain = tls | {"origin": browser.origin.replace("https:", "http:")}
        assert (await browser.ask("DELETE", "/v1/session", headers=from_plain)).status == 403


@pytest.mark.trio
async def test_a_trusted_proxy_names_the_user_and_nobody_else_can(tmp_path: Path) -> None:
    users = {**USERS, "proxy_header": "Remote-User"}
    async with with_users(tmp_path, "opal", users=users, **PROXY) as relay, browsing(relay) as browser:
        assert (await browser.ask("GET", "/v1/session", headers={"remote-user": "dora@example.org"})).json == {
            "users": True,
            "registration": "invite",
            "min_password_chars": 10,
            "name": "dora@example.org",
            "role": "client",
            "proxied": True,
        }
        async with page_socket(relay, browser, "operator", Remote_User="opal") as page:
            assert page.welcome.principal == "opal"
        evil = {"remote-user": "opal", "origin": "http://evil.example"}
        assert (await browser.ask("POST", "/v1/spaces/tts/requests", {}, headers=evil)).status == 403
        for name in ("opal, opal", "<b>x</b>", "a b"):
            assert (await browser.ask("GET", "/v1/spaces", headers={"remote-user": name})).status == 403
        relay.tokens.create(role="client", name="carl", now=0.0)
        for name in ("carl", "Carl", pwd.getpwuid(os.getuid()).pw_name):  # whose requests somebody else would have
            refused = await browser.ask("GET", "/v1/spaces", headers={"remote-user": name})
            assert (refused.status, "`relayd user add" in refused.error["message"]) == (403, True)
        await steer(relay, "create_user", "carl", role="client", password="")
        assert (await browser.ask("GET", "/v1/spaces", headers={"remote-user": "carl"})).status == 200
        await steer(relay, "remove_user", "dora@example.org")
        refused = await browser.ask("GET", "/v1/spaces", headers={"remote-user": "dora@example.org"})
        assert (refused.status, "was removed" in refused.error["message"]) == (403, True)
    strange: dict[str, Any] = {**PROXY, "trusted_proxies": ["192.0.2.1"]}
    async with with_users(tmp_path / "b", users=users, **strange) as relay, browsing(relay) as browser:
        assert (await browser.ask("GET", "/v1/session", headers={"remote-user": "opal"})).json["name"] is None


@pytest.mark.trio
async def test_a_removed_user_is_cut_off_at_once_also_behind_a_proxy(tmp_path: Path) -> None:
    users = {**USERS, "proxy_header": "Remote-User"}
    async with with_users(tmp_path, users=users, **PROXY) as relay, browsing(relay) as browser:
        async with page_socket(relay, browser, Remote_User="anna") as page:
            await steer(relay, "remove_user", "anna")
            with pytest.raises(LinkError):
                await page.next()
        await until(lambda: not relay.relay.clients)
