"""A relay that waits for another one to end, in the test's own event loop; tests/e2e/test_signals.py has processes."""

from pathlib import Path

import pytest
import trio

from protocol.sd_notify import ServiceManager
from relayd.connections.standby import Standby
from relayd.daemon import open_daemon
from relayd.store import open_store
from tests.support.fake_systemd import fake_systemd
from tests.support.relay import a_config


@pytest.mark.trio
async def test_a_standby_does_not_listen_is_alive_for_systemd_and_takes_over_when_the_folder_is_free(
    tmp_path: Path,
) -> None:
    config = a_config(tmp_path)
    with fake_systemd(tmp_path / "notify") as systemd:
        standby = Standby(lambda: None, ServiceManager(systemd.address, 60.0))
        owned = trio.Event()
        async with trio.open_nursery() as nursery:
            async with open_store(config):

                async def take_over() -> None:
                    async with open_daemon(config, standby=standby):
                        owned.set()
                        await trio.sleep_forever()

                nursery.start_soon(take_over)
                assert "takes over from another relayd (pid" in (await systemd.until("READY"))["STATUS"]
                await systemd.until("WATCHDOG")
                assert not (tmp_path / "relayd.sock").exists()
                assert not owned.is_set()
            with trio.fail_after(40):
                await owned.wait()
            assert (tmp_path / "relayd.sock").exists()
            nursery.cancel_scope.cancel()
