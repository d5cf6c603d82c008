"""Further ports, each with an HTTP application of its own and without the relay's own protocol."""

import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
import trio
from starlette.applications import Starlette

from protocol.wire.messages import PATH
from relayd.daemon import open_daemon
from relayd.http.app import make_door_app
from relayd.http.context import HttpContext
from relayd.http.server import Door
from relayd.net.tls import ListenError
from tests.relayd.http.sample_sockets import Sockets, closing, denial, socket_to
from tests.support.raw_http_client import visitor
from tests.support.relay import a_config, until

TLS = Path(__file__).parents[2] / "support" / "tls"


def a_door(endpoints: Sockets, listen: str = "127.0.0.1:0") -> Door:
    def make(context: HttpContext) -> Starlette:
        return make_door_app(context, endpoints.routes())

    return Door(listen, "listen of [talk]", make)


@pytest.mark.trio
@pytest.mark.parametrize("with_tls", [False, True])
async def test_a_door_serves_its_own_application_alone(with_tls: bool, tmp_path: Path) -> None:
    endpoints = Sockets()
    tls: dict[str, Any] = {"tls": {"cert": TLS / "cert.pem", "key": TLS / "key.pem"}} if with_tls else {}
    trusting = ssl.create_default_context(cafile=str(TLS / "cert.pem")) if with_tls else None
    config = a_config(tmp_path, store="memory", listen="127.0.0.1:0", **tls)
    async with open_daemon(config, doors=[a_door(endpoints)]) as started:
        (url,), main = started.door_urls, started.urls[0]
        assert url.startswith("wss:" if with_tls else "ws:")
        token = started.tokens.create(role="client", name="ann", now=0.0).text
        async with visitor(url, token=token, context=trusting) as http:
            assert (await http.get("/plain")).body == b"fine"
            answer = await http.get("/v1/spaces")
            assert (answer.status, answer.error["message"]) == (404, "there is nothing at /v1/spaces")
            assert answer.headers["x-content-type-options"] == "nosniff"
        async with visitor(main, token=token, context=trusting) as http:
            assert (await http.get("/plain")).status == 404
            assert (await http.get("/v1/spaces")).status == 200
        status, body = await denial(url, PATH, token, context=trusting)
        assert (status, body) == (404, b"there is no WebSocket at this path\n")
        assert (await denial(main, "/echo", token, context=trusting))[0] == 404
        assert (await denial(url, "/echo", context=trusting))[0] == 401
        async with socket_to(url, "/echo", token, context=trusting) as socket_:
            await socket_.send_message("hello")
            assert await socket_.get_message() == "hello"
        await until(lambda: not started.gateway.budget.open)


@pytest.mark.trio
async def test_a_shutdown_closes_what_came_through_a_door(tmp_path: Path) -> None:
    endpoints, codes = Sockets(), []
    config = a_config(tmp_path, store="memory")

    async with trio.open_nursery() as nursery, open_daemon(config, doors=[a_door(endpoints)]) as started:
        token = started.tokens.create(role="client", name="ann", now=0.0).text

        async def stay() -> None:
            async with socket_to(started.door_urls[0], "/echo", token) as socket_:
                codes.append(await closing(socket_))

        nursery.start_soon(stay)
        await endpoints.entered.wait()
    assert codes == [(1001, "the relay is shutting down")]


@pytest.mark.trio
async def test_a_door_that_cannot_be_opened_is_named_with_its_setting(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        words = rf"cannot listen on {listen}: Address already in use; choose another address with listen of \[talk\]"
        with pytest.raises(ListenError, match=words):
            async with open_daemon(a_config(tmp_path, store="memory"), doors=[a_door(Sockets(), listen)]):
                pass
