"""The daemon as a service: when it is ready, how it stands, and when it is not alive any more."""

import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.sd_notify import ServiceManager, run_checks
from relayd.connections.listener import describe
from relayd.service.health import HealthService
from relayd.store.base import StorageFull
from relayd.store.database import Database
from relayd.store.memory import MemoryStore
from tests.support.fake_systemd import fake_systemd
from tests.support.fake_worker import fake_worker
from tests.support.relay import a_config, a_submit, daemon, peer, running

TLS = Path(__file__).parents[2] / "support" / "tls"


@pytest.mark.trio
async def test_it_tells_that_it_is_ready_how_it_stands_and_that_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.service.health.STATUS_INTERVAL_S", 0.01)
    with fake_systemd(tmp_path / "notify") as systemd:
        monkeypatch.setenv("NOTIFY_SOCKET", systemd.address)
        async with daemon(tmp_path / "state", drain_timeout_s=5.0) as relay:
            said = await systemd.next()
            assert said["READY"] == "1"
            assert said["STATUS"] == f"0 workers, 0 running, 0 queued; listens on {relay.url}"
            async with fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
                await systemd.until("STATUS", "1 worker, 0 running, 0 queued")
                client.send(a_submit())
                assign = await worker.assigned()
                await systemd.until("STATUS", "1 worker, 1 running, 0 queued")
                relay.relay.draining.set()
                assert (await systemd.until("STOPPING"))["STATUS"] == "draining: 1 running, 0 queued"
                assert float((await systemd.until("EXTEND_TIMEOUT_USEC"))["EXTEND_TIMEOUT_USEC"]) >= 5e6
                worker.speak(assign, [b"\0\0"])
                await client.next()


async def _service(relay: Any, listeners: list[trio.SocketListener]) -> dict[str, str]:
    checked = dict(zip(describe(listeners, tls=False), listeners, strict=True))
    checks = HealthService(relay, checked, ServiceManager()).health_checks()
    return dict(words.split(": ", 1) for words in await run_checks(checks, 1.0))


@pytest.mark.parametrize("with_tls", [False, True])
@pytest.mark.trio
async def test_a_relay_that_is_well_passes_all_checks_at_every_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_tls: bool
) -> None:
    more: dict[str, Any] = {"tls": {"cert": TLS / "cert.pem", "key": TLS / "key.pem"}} if with_tls else {}
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    with fake_systemd(tmp_path / "notify") as systemd:
        monkeypatch.setenv("NOTIFY_SOCKET", systemd.address)
        config = a_config(tmp_path / "state", listen="127.0.0.1:0", **more)
        async with running(config) as started:
            assert len(started.urls) == 2
            for _ in range(5):
                await systemd.until("WATCHDOG")


@pytest.mark.trio
async def test_a_store_whose_writer_hangs_ends_the_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, goes_on = threading.Event(), threading.Event()
    goes_on.set()
    write = Database.write

    def hang(self: Database, *args: Any) -> Any:
        if not goes_on.is_set():
            hangs.set()
            goes_on.wait(60)
        return write(self, *args)

    monkeypatch.setattr(Database, "write", hang)
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    with fake_systemd(tmp_path / "notify") as systemd:
        monkeypatch.setenv("NOTIFY_SOCKET", systemd.address)
        async with running(a_config(tmp_path / "state")):
            await systemd.until("WATCHDOG")
            goes_on.clear()
            try:
                await trio.to_thread.run_sync(hangs.wait, 30)
                systemd.drain()
                await systemd.silent(2.0, "WATCHDOG")
            finally:
                goes_on.set()
            await systemd.until("WATCHDOG")


@pytest.mark.trio
async def test_a_full_disk_is_no_illness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(self: MemoryStore) -> None:
        raise StorageFull("no room left")

    async with daemon(tmp_path / "state") as relay:
        with monkeypatch.context() as patch:
            patch.setattr(MemoryStore, "flush", full)
            assert await _service(relay.relay, []) == {}


@pytest.mark.trio
async def test_a_door_that_nobody_opens_is_told(tmp_path: Path) -> None:
    """The kernel completes a connection that the daemon never takes; only an answer shows that it does."""
    async with daemon(tmp_path / "state") as relay:
        (dead,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with dead:
            port = dead.socket.getsockname()[1]
            assert await _service(relay.relay, [dead]) == {f"listener ws://127.0.0.1:{port}": "no answer within 1 s"}
            relay.relay.draining.set()  # closed on purpose
            assert await _service(relay.relay, [dead]) == {}


@pytest.mark.trio
async def test_a_unix_door_whose_backlog_is_full_is_told(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    async with daemon(tmp_path / "state") as relay:
        sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await sock.bind(str(path))
        sock.listen(0)
        async with trio.SocketListener(sock) as dead:
            assert await _service(relay.relay, [dead]) == {f"listener unix:{path}": "no answer within 1 s"}
            assert await _service(relay.relay, [dead]) == {f"listener unix:{path}": "its backlog is full"}
            path.unlink()  # whoever did that, a restart of the relay is not the answer
            assert await _service(relay.relay, [dead]) == {}
