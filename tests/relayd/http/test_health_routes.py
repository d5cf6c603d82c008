"""/health, /ready and /metrics: what they say, when, and to whom."""

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import parser

from protocol import open_relay
from tests.support.fake_worker import fake_worker
from tests.support.relay import Daemon, a_submit, daemon, peer
from tests.support.timed_http_client import asking

TCP: dict[str, Any] = {"listen": "127.0.0.1:0"}


async def status_of(url: str, path: str, token: str | None = None) -> int:
    async with asking(url, "GET", path, token=token) as answer:
        await answer.body()
    return answer.status


async def token_of(relay: Daemon, role: str, *spaces: str) -> str:
    """A new token of its own principal."""
    async with open_relay(relay.url, token="", role="operator") as operator:
        done = await operator.steer("create_token", "-".join((role, *spaces)), role=role, spaces=list(spaces))
    return str(done["token"])


@pytest.mark.trio
async def test_health_needs_no_token_and_tells_only_who_has_one_how_many_are_connected(tmp_path: Path) -> None:
    async with daemon(tmp_path, **TCP) as relay:
        async with asking(relay.urls[0], "GET", "/health") as answer:
            told = await answer.json()
        assert answer.status == 200
        assert told == {"status": "healthy", "service": "relayd", "draining": False}
        async with asking(relay.urls[0], "GET", "/health", token="wrong") as answer:
            assert (answer.status, await answer.json()) == (200, told)
        async with peer(relay.url, "client"), peer(relay.url, "client"), asking(relay.url, "GET", "/health") as answer:
            assert (await answer.json())["active_connections"] == 2
        async with asking(relay.urls[0], "HEAD", "/health") as answer:
            assert (answer.status, await answer.body()) == (200, b"")


@pytest.mark.trio
async def test_a_relay_that_drains_is_healthy_and_not_ready(tmp_path: Path) -> None:
    async with daemon(tmp_path, **TCP) as relay, peer(relay.url, "client") as client, fake_worker(relay.url) as worker:
        async with asking(relay.urls[0], "GET", "/ready") as answer:
            assert (answer.status, await answer.json()) == (200, {"ready": True})
        client.send(a_submit())  # what runs keeps it from leaving
        await worker.assigned()
        relay.relay.draining.set()
        async with asking(relay.urls[0], "GET", "/ready") as answer:
            assert (answer.status, (await answer.json())["ready"]) == (503, False)
        assert answer.headers["retry-after"] == "5"
        assert await status_of(relay.urls[0], "/health") == 200


@pytest.mark.trio
async def test_metrics_are_told_in_prometheus_own_format(tmp_path: Path) -> None:
    async with daemon(tmp_path, **TCP, http={"metrics": "public"}) as relay:
        assert await status_of(relay.urls[0], "/v1/spaces", "wrong") == 401
        async with asking(relay.urls[0], "GET", "/metrics") as answer:
            text = (await answer.body()).decode()
        assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        told = {
            sample.name: sample for family in parser.text_string_to_metric_families(text) for sample in family.samples
        }
        assert {"relayd_build_info", "relayd_requests_queued", "process_open_fds"} <= told.keys()
        assert told["relayd_http_answering"].value == 1
        assert told["relayd_logins_refused_total"].labels == {"code": "unauthenticated"}
        assert told["relayd_http_responses_total"].labels == {"status": "401"}
        openmetrics = [("Accept", "application/openmetrics-text;version=1.0.0")]
        async with asking(relay.urls[0], "GET", "/metrics", headers=openmetrics) as answer:
            assert (await answer.body()).endswith(b"# EOF\n")
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")


@pytest.mark.trio
async def test_metrics_can_be_told_to_all_who_may_use_every_space(tmp_path: Path) -> None:
    async with daemon(tmp_path, **TCP, http={"metrics": "token"}) as relay:
        url = relay.urls[0]
        tokens = {role: await token_of(relay, role) for role in ("client", "operator", "worker")}
        assert await status_of(url, "/metrics") == 401
        assert await status_of(url, "/metrics", await token_of(relay, "client", "tts")) == 403
        assert {role: await status_of(url, "/metrics", token) for role, token in tokens.items()} == {
            "client": 200,
            "operator": 200,
            "worker": 403,
        }
        assert await status_of(relay.url, "/metrics") == 200, "on the unix socket the daemon's own user needs no token"


@pytest.mark.trio
async def test_metrics_are_for_operators(tmp_path: Path) -> None:
    async with daemon(tmp_path, **TCP) as relay:
        statuses = [
            await status_of(relay.urls[0], "/metrics", token)
            for token in (None, await token_of(relay, "client"), await token_of(relay, "operator"))
        ]
    assert statuses == [401, 403, 200]


@pytest.mark.trio
async def test_a_scrape_leaves_no_connection_behind(tmp_path: Path) -> None:
    async with daemon(tmp_path, **TCP, http={"metrics": "public"}) as relay:
        for _ in range(3):
            assert await status_of(relay.urls[0], "/metrics") == 200
        async with asking(relay.url, "GET", "/health") as answer:
            assert (await answer.json())["active_connections"] == 0
