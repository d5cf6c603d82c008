"""A token that was created as read-only: it watches and reads, and whatever else it asks for is refused."""

import re
from pathlib import Path
from typing import Any

import pytest

from protocol.wire.messages import Accepted, Cancel, Done, Rejected, Snapshot, Status, StatusReply, Steer, Watch
from relayd.connections.operator import ACTIONS, READ_ONLY_ACTIONS
from tests.support.fake_worker import fake_worker
from tests.support.raw_http_client import visitor
from tests.support.relay import Daemon, a_submit, daemon, peer

TCP: dict[str, Any] = {"listen": "127.0.0.1:0", "store": "sqlite"}


async def a_token(relay: Daemon, role: str, *, readonly: bool) -> str:
    async with peer(relay.url, "operator") as root:
        root.send(Steer(action="create_token", target="board", options={"role": role, "readonly": readonly}))
        return str((await root.next(Done)).data["token"])


@pytest.mark.trio
@pytest.mark.parametrize(
    ("token_role", "role"), [("operator", "operator"), ("operator", "client"), ("client", "client")]
)
async def test_it_may_watch_and_read_and_changes_nothing_even_after_a_restart(
    tmp_path: Path, token_role: str, role: str
) -> None:
    async with daemon(tmp_path, **TCP) as relay:
        token = await a_token(relay, token_role, readonly=True)
    async with (
        daemon(tmp_path, **TCP) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.urls[0], "client", await a_token(relay, "client", readonly=False)) as client,  # the same principal
    ):
        submit = a_submit()
        client.send(submit)
        await worker.assigned()
        async with peer(relay.urls[0], role, token) as board:
            if role == "operator":
                board.send(Watch())
                assert "requests" in (await board.next(Snapshot)).data
                board.send(Status(request_id=submit.request_id))
                assert (await board.next(StatusReply)).state == "running"
                for action in ACTIONS.keys() - READ_ONLY_ACTIONS:
                    board.send(Steer(action=action, target="tts", options={"role": "operator"}))
                    assert (await board.next(Rejected)).code == "forbidden", action
            board.send(Cancel(request_id=submit.request_id))
            assert (await board.next(Rejected)).code == "forbidden"
            board.send(a_submit())
            refused = await board.next(Rejected)
            assert refused.code == "forbidden"
            assert "token that was created without it" in refused.message
        bearer = {"authorization": f"Bearer {token}"}
        async with visitor(relay.urls[0]) as http:
            for method, path, told in (
                ("POST", "/v1/spaces/tts/requests", {"params": {"text": "x"}}),
                ("POST", "/v1/audio/speech", {"model": "tts", "input": "x", "response_format": "wav"}),
            ):
                assert (await http.ask(method, path, told=told, headers=bearer)).status == 403, path
            path = f"/v1/requests/{submit.request_id}"
            assert (await http.get(path, headers=bearer)).json["state"] == "running"
            assert (await http.ask("DELETE", path, headers=bearer)).status == 403
        assert relay.relay.requests[submit.request_id].live


@pytest.mark.trio
async def test_a_worker_cannot_be_read_only(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "operator") as root:
        for options in ({"role": "worker", "readonly": True}, {"role": "operator", "readonly": "yes"}):
            root.send(Steer(action="create_token", target="box", options=options))
            assert (await root.next(Rejected)).code == "invalid_params"


#: Path -> what is sent there; a path that takes no JSON is here, too.
BODIES: dict[str, Any] = {
    "/v1/spaces/{space}/requests": {"params": {"text": "x"}},
    "/v1/audio/speech": {"model": "tts", "input": "x", "response_format": "wav"},
}
#: Where people log in with a password; no token is looked at.
LOGINS = ("/v1/session", "/v1/register")
#: Routes that /openapi.json leaves out.
OTHER_ROUTES = [("post", "/websockets/submit/{space}")]


@pytest.mark.trio
async def test_no_route_that_changes_something_is_open_to_it(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, **TCP, talk={"reply": "llm", "speech": "tts"}, spaces={"llm": {}}) as relay,
        peer(relay.urls[0], "client", await a_token(relay, "client", readonly=False)) as client,  # the same principal
    ):
        submit = a_submit()
        client.send(submit)
        await client.next(Accepted)
        names = {
            "space": "tts",
            "request_id": submit.request_id,
            "name": "text",
            "talk": "t",
            "number": "0",
            "call": "c",
        }
        tokens = [await a_token(relay, role, readonly=True) for role in ("operator", "client")]
        async with visitor(relay.urls[0]) as http:
            paths = (await http.get("/openapi.json")).json["paths"]
            routes = [(method, path) for path, methods in paths.items() for method in methods] + OTHER_ROUTES
            changing = [(method, path) for method, path in routes if method in ("post", "put", "patch", "delete")]
            changing = [each for each in changing if not each[1].startswith(LOGINS)]
            assert len(changing) > 15
            for token in tokens:
                for method, path in changing:
                    bearer = {"authorization": f"Bearer {token}"}
                    told = BODIES.get(path, {})
                    where = re.sub(r"{(\w+)}", lambda found: names[found[1]], path)
                    answer = await http.ask(method.upper(), where, told=told, headers=bearer)
                    assert answer.status == 403, (method, path)
                    assert b"this login is read-only" in answer.body, (method, path)
        assert [each.live for each in relay.relay.requests.values()] == [True]
