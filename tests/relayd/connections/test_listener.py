"""The ways in and what happens at them: TLS, handshakes, limits, silent peers, slow readers, and results that go."""

import socket
import ssl
import stat
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.client.address import parse_address
from protocol.link.dial import log_in, open_link
from protocol.wire.errors import ConnectError, LoginRefused
from protocol.wire.frames import (
    Audio,
    Cancelled,
)
from protocol.wire.messages import (
    PATH,
    PROTOCOL_VERSION,
    SUBPROTOCOL,
    Ack,
    Attach,
    Cancel,
    Hello,
    Queued,
    Rejected,
    Status,
    StatusReply,
)
from relayd.auth.tokens import TokenRegistry
from relayd.config.schema import ConfigError
from relayd.daemon import PLAIN_TEXT, serve
from relayd.net.tls import ListenError, make_tls_context
from relayd.store.base import StoreInUse
from relayd.store.factory import open_offline
from relayd.store.records import PutToken, TokenLimits
from tests.support.cable import Cable
from tests.support.fake_worker import fake_worker, identity, samples
from tests.support.relay import a_config, a_submit, daemon, kept_logs, new_token, peer, until

TLS = Path(__file__).parents[2] / "support" / "tls"
PCM = [samples(1200, seed) for seed in range(3)]
Logs = list[MutableMapping[str, Any]]


@pytest.fixture
def logs() -> Iterator[Logs]:
    """What the daemon logs."""
    with kept_logs() as kept:
        yield kept


def faults(logs: Logs) -> Logs:
    return [line for line in logs if line["log_level"] == "error"]


@asynccontextmanager
async def dial(url: str) -> AsyncIterator[trio.SocketStream]:
    """A bare stream to a door, TLS not spoken."""
    address = parse_address(url)
    if address.kind == "unix":
        stream = await trio.open_unix_socket(address.path)
    else:
        stream = await trio.open_tcp_stream(address.host, address.port)
    async with stream:
        yield stream


async def rest_of(stream: trio.abc.ReceiveStream) -> bytes:
    """All that comes until the relay hangs up."""
    heard = b""
    with trio.fail_after(5):
        with suppress(trio.BrokenResourceError):  # it hung up over what it had not read
            async for data in stream:
                heard += data
    return heard


def a_head(path: str = PATH, subprotocol: str = SUBPROTOCOL, **more: str) -> bytes:
    """The head of a WebSocket handshake."""
    headers = {
        "Host": "localhost",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Protocol": subprotocol,
    } | more
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items() if value), "", ""]
    return "\r\n".join(lines).encode()


# -- TLS -------------------------------------------------------------------------------------------------------------


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(TLS / "cert.pem"))


def test_tls_offers_authenticated_ciphers_with_forward_secrecy_and_http_1(tmp_path: Path) -> None:
    context = make_tls_context(a_config(tmp_path, tls={"cert": TLS / "cert.pem", "key": TLS / "key.pem"}))
    assert context is not None
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    ciphers = [cipher["name"] for cipher in context.get_ciphers()]
    assert [name for name in ciphers if not name.startswith(("TLS_", "ECDHE-"))] == []
    assert all("GCM" in name or "CHACHA20" in name for name in ciphers)
    client = trusting()
    client.set_alpn_protocols(["h2", "http/1.1"])
    told = [ssl.MemoryBIO() for _ in range(2)]
    server = context.wrap_bio(told[0], told[1], server_side=True)
    caller = client.wrap_bio(told[1], told[0], server_hostname="localhost")
    for side in (caller, server, caller, server):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert caller.selected_alpn_protocol() == server.selected_alpn_protocol() == "http/1.1"


@pytest.mark.trio
@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"listen": "0.0.0.0:0", "plain_text": True}, True),
        ({"listen": "127.0.0.1:0", "plain_text": True}, False),
        ({"listen": "0.0.0.0:0", "behind_proxy": True}, False),
    ],
)
async def test_plain_text_for_other_machines_is_served_where_it_is_meant_and_loud_in_the_log(
    tmp_path: Path, logs: Logs, settings: dict[str, Any], warned: bool
) -> None:
    async with daemon(tmp_path, **settings) as relay:
        async with dial(relay.urls[0].replace("0.0.0.0", "127.0.0.1")) as stream:
            await stream.send_all(b"GET /health HTTP/1.0\r\n\r\n")
            assert b" 200 " in await rest_of(stream)
        told = [line["log_level"] for line in logs if line["event"] == PLAIN_TEXT]
        assert told == (["warning"] if warned else [])
        (listening,) = [line for line in logs if line["event"] == "listening"]
        assert "0.0.0.0" not in listening["page"]
        assert listening["openai_base_url"] == listening["page"] + "v1"


@pytest.mark.trio
async def test_whoever_speaks_tls_to_a_plain_door_or_plain_text_to_a_tls_door_is_told_the_other_url(
    tmp_path: Path,
) -> None:
    tls = {"cert": TLS / "cert.pem", "key": TLS / "key.pem"}
    async with (
        daemon(tmp_path / "plain", listen="127.0.0.1:0") as plain,
        daemon(tmp_path / "tls", listen="127.0.0.1:0", tls=tls) as crypted,
    ):
        for right, wrong in ((crypted.urls[0], "ws"), (plain.urls[0], "wss")):
            with pytest.raises(ConnectError, match=f"use {right}$"):
                async with open_link(parse_address(wrong + right[right.index(":") :])):
                    pass
        with pytest.raises(ConnectError, match=r"certificate verify failed.* SSL_CERT_FILE"):
            async with open_link(parse_address(crypted.urls[0])):
                pass


@pytest.mark.trio
async def test_all_goes_over_tls_and_its_door_takes_nothing_in_plain_text(
    tmp_path: Path, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.connections.listener.TLS_HANDSHAKE_S", 0.5)
    text = a_token(tmp_path)
    tls = {"cert": TLS / "cert.pem", "key": TLS / "key.pem"}
    async with daemon(tmp_path, listen="127.0.0.1:0", tls=tls, store="sqlite") as relay:
        url = relay.urls[0]
        assert url.startswith("wss://127.0.0.1:")
        async with fake_worker(relay.url) as worker, peer(url, "client", text, ssl_context=trusting()) as client:
            submit = a_submit()
            client.send(submit)
            worker.speak(await worker.assigned(), PCM)
            assert b"".join(f.pcm for f in await client.frames(submit) if isinstance(f, Audio)) == b"".join(PCM)
        with pytest.raises(ConnectError, match="TLS failed"):
            async with peer(url, "client", text):
                pytest.fail("entered")
        with pytest.raises(ConnectError):
            async with peer(url.replace("wss:", "ws:"), "client", text):
                pytest.fail("entered")
        async with dial(url) as silent:
            assert await rest_of(silent) == b""
        await until(lambda: not relay.relay.connections)
        await relay.goes_on()
    assert not faults(logs)


@pytest.mark.trio
async def test_a_certificate_that_cannot_be_used_is_told_before_anything_opens(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tls.cert: .*nowhere.pem: No such file"):
        a_config(tmp_path, tls={"cert": tmp_path / "nowhere.pem", "key": TLS / "key.pem"})
    (tmp_path / "junk.pem").write_text("not a certificate\n")
    for cert, key, why in (
        (tmp_path / "junk.pem", TLS / "key.pem", ""),
        (TLS / "cert.pem", tmp_path / "junk.pem", ""),
        (TLS / "cert.pem", TLS / "locked.pem", "the key is protected by a password"),
    ):
        with pytest.raises(ListenError, match=rf"the certificate .*{cert.name} with the key .*{key.name}: .*{why}"):
            await serve(a_config(tmp_path, tls={"cert": cert, "key": key}))
    assert not (tmp_path / "relayd.sock").exists()


# -- handshakes ------------------------------------------------------------------------------------------------------

HERE, ELSEWHERE = "https://here.example", "https://elsewhere.example"


@pytest.mark.trio
@pytest.mark.parametrize(
    ("head", "status", "words"),
    [
        (a_head("/"), 404, b"/v1/relay"),
        (a_head(PATH + "/x"), 404, b"/v1/relay"),
        (a_head(subprotocol=""), 400, b"subprotocol"),
        (a_head(subprotocol="chat"), 400, b"subprotocol"),
        (a_head(Origin=ELSEWHERE), 403, b"allowed_origins"),
        (a_head(Origin="null"), 403, b"allowed_origins"),
        (a_head(**{"Content-Length": "5"}) + b"hello", 400, b"no body"),
        (a_head(**{"Transfer-Encoding": "chunked"}) + b"0\r\n\r\n", 400, b"no body"),
        (a_head("http://relay/x"), 404, b"/v1/relay"),
        (a_head(Origin=HERE + ".evil"), 403, b"allowed_origins"),
    ],
)
async def test_a_handshake_that_is_not_for_the_relay_is_refused_in_words(
    tmp_path: Path, logs: Logs, head: bytes, status: int, words: bytes
) -> None:
    async with daemon(tmp_path, allowed_origins=[HERE]) as relay:
        async with dial(relay.url) as stream:
            await stream.send_all(head)
            answer = await rest_of(stream)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert words in answer.partition(b"\r\n\r\n")[2]
        await relay.goes_on()
    assert not faults(logs)


@pytest.mark.trio
@pytest.mark.parametrize(
    ("allowed", "origin"), [([], ""), ([HERE], HERE), ([ELSEWHERE, HERE], HERE), (["*"], ELSEWHERE), (["*"], "null")]
)
@pytest.mark.parametrize("authority", ["", "http://relay", "ws://relay:1"])
async def test_no_origin_and_those_allowed_are_taken(
    tmp_path: Path, allowed: list[str], origin: str, authority: str
) -> None:
    async with daemon(tmp_path, allowed_origins=allowed) as relay, dial(relay.url) as stream:
        await stream.send_all(a_head(authority + PATH + "?x=1", "chat, " + SUBPROTOCOL, Origin=origin))
        with trio.fail_after(5):
            answer = bytes(await stream.receive_some())
        assert answer.startswith(b"HTTP/1.1 101 ")
        assert f"sec-websocket-protocol: {SUBPROTOCOL}\r\n".encode() in answer.lower()


NO_HANDSHAKES = {
    "nothing": b"",
    "half a head": a_head()[:40],
    "garbage": bytes(range(256)) * 4,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 506,
    "plain HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP 1.0": b"GET /v1/relay HTTP/1.0\r\n\r\n",
    "a POST": b"POST /v1/relay HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nabcd",
    "an old version": a_head(**{"Sec-WebSocket-Version": "8"}),
    "no key": a_head(**{"Sec-WebSocket-Key": ""}),
    "an endless head": a_head()[:-2] + b"X: " + b"x" * 300_000,
    "a head and half a frame": a_head() + b"\x82\xff",
}


@pytest.mark.trio
@pytest.mark.parametrize("hangs_up", [False, True])
@pytest.mark.parametrize("what", NO_HANDSHAKES)
async def test_what_is_no_handshake_is_cut_off_and_is_no_fault_of_the_relays(
    tmp_path: Path, logs: Logs, monkeypatch: pytest.MonkeyPatch, what: str, hangs_up: bool
) -> None:
    monkeypatch.setattr("relayd.net.http_head.HEAD_S", 0.2)
    more = {"limits": {"hello_timeout_s": 0.2}, "http": {"keep_alive_s": 0.2}}
    async with daemon(tmp_path, listen="127.0.0.1:0", **more) as relay:
        async with dial(relay.urls[0]) as stream:
            with suppress(trio.BrokenResourceError):  # it need not take all of an endless one
                await stream.send_all(NO_HANDSHAKES[what])
            if hangs_up:  # without a goodbye: what the relay sends is reset
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            else:
                await rest_of(stream)
        await relay.goes_on()
    assert not faults(logs)


@pytest.mark.trio
async def test_a_head_that_trickles_is_cut_off_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.net.http_head.HEAD_S", 0.1)
    async with daemon(tmp_path) as relay:
        async with dial(relay.url) as stream:
            refused = False
            for byte in a_head()[:40] * 100:
                try:
                    await stream.send_all(bytes([byte]))
                except trio.BrokenResourceError:
                    refused = True
                    break
                await trio.sleep(0.01)
            assert refused
        await relay.goes_on()


@pytest.mark.trio
async def test_one_connection_too_many_is_refused_until_another_leaves(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0", limits={"max_connections": 2}) as relay:
        url, token = relay.urls[0], await new_token(relay)
        async with peer(url, "client", token), peer(url, "worker", await new_token(relay, "worker")):
            with pytest.raises(ConnectError, match="HTTP 503: the relay has reached its limit of connections"):
                async with peer(url, "client", token):
                    pytest.fail("entered")
            async with peer(relay.url, "operator") as operator:  # the unix socket is not counted
                await operator.settled()
        await until(lambda: not relay.relay.connections)
        async with peer(url, "client", token) as client:
            await client.settled()


@pytest.mark.trio
async def test_the_last_place_is_given_once_though_two_shook_hands_for_it(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0", limits={"max_connections": 1}) as relay:
        address, token = parse_address(relay.urls[0]), await new_token(relay)
        async with open_link(address) as one, open_link(address) as two:
            hello = Hello(version=PROTOCOL_VERSION, role="client", token=token)
            await log_in(one, hello)
            with pytest.raises(LoginRefused, match="has reached its limit of connections") as refused:
                await log_in(two, hello)
        assert refused.value.code == "rate_limited", "a code that a client tries again after"


# -- sockets ---------------------------------------------------------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize("mode", [None, 0o660])
async def test_the_unix_socket_is_the_users_alone_unless_said_otherwise(tmp_path: Path, mode: int | None) -> None:
    more = {} if mode is None else {"unix_socket_mode": mode}
    async with daemon(tmp_path, **more):
        found = (tmp_path / "relayd.sock").stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == (mode or 0o600)
    assert not (tmp_path / "relayd.sock").exists()


@pytest.mark.trio
async def test_a_socket_that_a_killed_relay_left_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "relayd.sock"))
    async with daemon(tmp_path) as relay:
        await relay.goes_on()


@pytest.mark.trio
async def test_a_second_relay_on_the_same_folder_leaves_the_first_ones_door_alone(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        with pytest.raises(StoreInUse):
            await serve(a_config(tmp_path))
        await relay.goes_on()


@pytest.mark.trio
async def test_a_door_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ListenError, match=rf"cannot listen on {listen}: Address already in use; choose another"):
            await serve(a_config(tmp_path, store="memory", listen=listen))
    (tmp_path / "relayd.sock").mkdir()
    with pytest.raises(ListenError, match=r"cannot create the socket .*relayd.sock: Is a directory"):
        await serve(a_config(tmp_path, store="memory"))
    assert (tmp_path / "relayd.sock").is_dir(), "nothing of others is taken away"


# -- peers that fall silent ------------------------------------------------------------------------------------------

SOON = {"ping_interval_s": 0.05, "dead_after_s": 0.3}


@pytest.mark.trio
async def test_a_client_gone_without_a_word_is_noticed_and_its_request_ends_after_its_resume_window(
    tmp_path: Path, logs: Logs
) -> None:
    limits = SOON | {"resume_window_s": 0.3}
    async with daemon(tmp_path, limits=limits) as relay, fake_worker(relay.url) as worker:
        cable = Cable()
        async with peer(relay.url, "client", connect_to=cable.connect) as client:
            submit = a_submit()
            client.send(submit)
            assign = await worker.assigned()
            worker.speak(assign, PCM, end=False)
            await client.next(Audio)
            began = trio.current_time()
            cable.pulled = True
            cancel = await worker.peer.next(Cancel)
            assert cancel.request_id == submit.request_id
            assert trio.current_time() - began > 0.5, "its pings and its window both ran out"
            assert not relay.relay.clients
            client.link.abort("done")
        worker.send(Cancelled(**identity(assign, 4)))
        await worker.peer.next(Ack)
        await relay.at_rest()
        await relay.goes_on()
    assert "nothing received from" in why_disconnected(logs)


@pytest.mark.trio
async def test_a_client_that_only_listens_answers_pings_and_stays(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits=SOON) as relay, peer(relay.url, "client") as client:
        await trio.sleep(0.6)  # twice as long as it may be silent
        await client.settled()


@pytest.mark.trio
async def test_a_worker_gone_without_a_word_is_noticed_and_its_request_runs_elsewhere(tmp_path: Path) -> None:
    limits = SOON | {"worker_grace_s": 0.1}
    spaces = {"tts": {"max_workers": 2}}
    async with daemon(tmp_path, limits=limits, spaces=spaces) as relay, peer(relay.url, "client") as client:
        cable = Cable()
        async with fake_worker(relay.url, name="far", cable=cable) as far:
            submit = a_submit()
            client.send(submit)
            await far.assigned()
            async with fake_worker(relay.url, name="near") as near:
                cable.pulled = True
                assign = await near.assigned()
                assert assign.attempt == 2
                near.speak(assign, PCM)
                assert len(await client.frames(submit)) == 5
                far.peer.link.abort("done")
                await relay.at_rest()


def why_disconnected(logs: Logs) -> str:
    return " / ".join(str(line["why"]) for line in logs if line["event"] == "disconnected")


@pytest.mark.trio
async def test_a_stalled_reader_is_cut_off_and_another_of_the_same_request_misses_nothing(
    tmp_path: Path, logs: Logs
) -> None:
    pcm = [samples(24_000, seed) for seed in range(60)]  # 2.9 MB: more than a socket and the reader's queue hold
    limits = {"stall_timeout_s": 0.3, "ping_interval_s": 20, "dead_after_s": 60}
    async with (
        daemon(tmp_path, limits=limits) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        submit = a_submit()
        client.send(submit)
        assign = await worker.assigned()
        cable = Cable()
        async with peer(relay.url, "client", connect_to=cable.connect) as stalled:
            stalled.send(Attach(request_id=submit.request_id))
            await stalled.settled()
            cable.pulled = True
            worker.speak(assign, pcm)
            frames = await client.frames(submit)
            assert b"".join(f.pcm for f in frames if isinstance(f, Audio)) == b"".join(pcm)
            assert len(relay.relay.clients) == 2, "nobody waited for it"
            await until(lambda: len(relay.relay.clients) == 1)
            stalled.link.abort("done")
        await relay.at_rest()
        async with peer(relay.url, "client") as again:  # it comes back, and the rest is there
            again.send(Attach(request_id=submit.request_id, attempt=1, after_seq=3))
            assert [frame.TYPE for frame in await again.frames(submit, first=4)][-1] == "completed"
    assert "accepted no data for 0.3 s" in why_disconnected(logs)


# -- results go ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _reaps_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.core.retention.REAP_INTERVAL_S", 0.02)


@pytest.mark.trio
@pytest.mark.usefixtures("_reaps_often")
async def test_an_ended_request_is_forgotten_after_a_while_in_the_store_as_well(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, store="sqlite", results={"retain_s": 0.3}) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        done, runs = a_submit(), a_submit()
        client.send(done)
        client.send(runs)
        worker.speak(await worker.assigned(), PCM)
        await client.frames(done)
        await worker.assigned()
        client.send(Status(request_id=done.request_id))
        assert (await client.next(StatusReply)).state == "completed"
        await until(lambda: set(relay.relay.requests) == {runs.request_id})
        client.send(Attach(request_id=done.request_id))
        refusal = await client.next(Rejected)
        assert refusal.code == "request_not_found"
        assert "ended long ago" in refusal.message
        await relay.relay.store.flush()
        assert [r.request_id for r in (await relay.relay.store.load()).requests] == [runs.request_id]


@pytest.mark.trio
@pytest.mark.usefixtures("_reaps_often")
async def test_the_oldest_results_make_room_and_whoever_asks_for_them_is_told(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, results={"memory_bytes": 20_000}) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        submits = [a_submit() for _ in range(4)]  # 7.5 KB each: two of them fit
        for submit in submits:
            client.send(submit)
            worker.speak(await worker.assigned(), PCM)
            await client.frames(submit)
        requests = [relay.relay.requests[submit.request_id] for submit in submits]
        await until(lambda: sum(request.log.memory_bytes for request in requests) <= 20_000)
        await trio.sleep(0.1)  # five more looks take nothing more
        assert [request.has_result for request in requests] == [False, False, True, True]
        for message in (Attach(request_id=submits[0].request_id), submits[0]):
            client.send(message)
            refusal = await client.next(Rejected)
            assert (refusal.code, refusal.request_id) == ("request_not_found", submits[0].request_id)
            assert "has completed, and its result is no longer kept; submit it again" in refusal.message
        client.send(Status(request_id=submits[0].request_id))
        assert (await client.next(StatusReply)).state == "completed"
        client.send(Attach(request_id=submits[3].request_id))
        assert len(await client.frames(submits[3])) == 5


@pytest.mark.trio
@pytest.mark.usefixtures("_reaps_often")
async def test_a_result_is_not_dropped_under_its_reader(tmp_path: Path) -> None:
    pcm = [samples(24_000, seed) for seed in range(60)]
    results = {"memory_bytes": 1, "retain_s": 0}
    async with daemon(tmp_path, results=results) as relay, fake_worker(relay.url) as worker:
        cable = Cable()
        async with peer(relay.url, "client", connect_to=cable.connect) as client:
            submit = a_submit()
            client.send(submit)
            assign = await worker.assigned()
            cable.pulled = True
            worker.speak(assign, pcm)
            request = relay.relay.requests[submit.request_id]
            await until(lambda: not request.live)
            await trio.sleep(0.1)  # five looks
            assert request.log.readers
            assert request.log.memory_bytes > 2_800_000
            client.link.abort("done")
        await until(lambda: not relay.relay.requests)


# -- limits of a token -----------------------------------------------------------------------------------------------


def a_token(state_dir: Path, **limits: int) -> str:
    """A client's token, put into the store of a daemon that is not running yet."""
    token = TokenRegistry().create(role="client", name="ann", now=1.0, limits=TokenLimits(**limits))
    with open_offline(state_dir) as store:
        store.commit(PutToken(token.record))
    return token.text


@pytest.mark.trio
async def test_a_token_allows_so_many_connections(tmp_path: Path) -> None:
    text = a_token(tmp_path, max_connections=1)
    async with daemon(tmp_path, store="sqlite") as relay:
        async with peer(relay.url, "client", text) as one, peer(relay.url, "client"):
            with pytest.raises(LoginRefused, match="the token of 'ann' allows 1 connections at once") as refused:
                async with peer(relay.url, "client", text):
                    pytest.fail("entered")
            assert refused.value.code == "rate_limited"
            await one.settled()
        await until(lambda: not relay.relay.connections)
        async with peer(relay.url, "client", text) as one:
            await one.settled()


@pytest.mark.trio
async def test_a_token_allows_so_many_queued_requests(tmp_path: Path) -> None:
    text = a_token(tmp_path, max_queued=1)
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        peer(relay.url, "client", text) as client,
        peer(relay.url, "client") as other,
    ):
        waits, refused = a_submit(), a_submit(space="check")
        client.send(waits)
        client.send(refused)
        refusal = await client.next(Rejected)
        assert (refusal.request_id, refusal.code, refusal.retryable) == (refused.request_id, "queue_full", True)
        assert "may have 1 queued" in refusal.message
        other.send(a_submit())
        await other.next(Queued)
        async with fake_worker(relay.url) as worker:
            assert (await worker.assigned()).request_id == waits.request_id
            client.send(refused)
            assert (await client.next(Queued, Rejected)).TYPE == "queued"


@pytest.mark.trio
async def test_a_token_allows_so_many_running_requests_and_the_rest_waits_its_turn(tmp_path: Path) -> None:
    text = a_token(tmp_path, max_running=1)
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url, slots=3) as worker,
        peer(relay.url, "client", text) as client,
        peer(relay.url, "client") as other,
    ):
        first, second, third = a_submit(), a_submit(), a_submit()
        client.send(first)
        assign = await worker.assigned()
        client.send(second)
        await client.next(Queued)
        other.send(third)
        assert (await worker.assigned()).request_id == third.request_id, "it holds up nobody else"
        worker.speak(assign, PCM)
        await client.frames(first)
        assert (await worker.assigned()).request_id == second.request_id
