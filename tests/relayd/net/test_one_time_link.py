"""The link that `relayd demo --talk` prints."""

import pytest
import trio

from relayd.net.one_time_link import open_one_time_link
from tests.support.raw_http_client import visitor

TARGET = "http://127.0.0.1:1/#login=secret"


@pytest.mark.trio
async def test_it_leads_on_once_whoever_asks_for_something_else_meanwhile() -> None:
    async with open_one_time_link(TARGET) as link:
        address, _, path = link.removeprefix("http://").partition("/")
        for method, asked, status in (
            ("GET", "/favicon.ico", 404),
            ("POST", f"/{path}", 404),
            ("GET", f"/{path[:-1]}", 404),
            ("GET", f"/{path}", 303),
            ("GET", f"/{path}", 410),
        ):
            async with visitor(f"http://{address}") as http:
                answer = await http.ask(method, asked)
                assert answer.status == status
                assert answer.headers.get("location") == (TARGET if status == 303 else None)
                assert answer.headers["cache-control"] == "no-store"


@pytest.mark.trio
async def test_bytes_that_are_no_request_are_answered_and_it_still_leads_on() -> None:
    async with open_one_time_link(TARGET) as link:
        address, _, path = link.removeprefix("http://").partition("/")
        async with await trio.open_tcp_stream("127.0.0.1", int(address.partition(":")[2])) as stream:
            await stream.send_all(b"\x16\x03\x01")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 404 ")
        async with visitor(f"http://{address}") as http:
            assert (await http.get(f"/{path}")).status == 303
