"""SIGHUP: what is read again, what needs a restart, and that a broken file changes nothing."""

import logging
import os
import shutil
import signal
import ssl
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.client.address import parse_address
from protocol.wire.errors import LinkError, LoginRefused
from protocol.wire.frames import Failed
from protocol.wire.structs import InputInfo
from relayd.auth.tokens import TokenRegistry
from relayd.config.loader import load_config
from relayd.config.schema import Config
from relayd.core.relay import Relay
from relayd.store.base import StoreError
from relayd.store.memory import MemoryStore
from relayd.store.records import PutToken, TokenRecord
from tests.support.fake_worker import fake_worker
from tests.support.relay import a_submit, kept_logs, peer, running, until

TLS = Path(__file__).parents[2] / "support" / "tls"


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


@attrs.define(eq=False)
class Reloading:
    """A daemon with a file to edit."""

    file: Path
    relay: Relay
    tokens: TokenRegistry
    urls: list[str]
    logs: list[MutableMapping[str, Any]]

    @property
    def url(self) -> str:
        return self.urls[-1]

    async def reload(self, text: str) -> dict[str, Any]:
        """Write the file, send the signal; what the daemon says of it."""
        self.file.write_text(text)
        before = len(self.logs)
        os.kill(os.getpid(), signal.SIGHUP)
        found: list[dict[str, Any]] = []

        def told() -> bool:
            found.extend(dict(e) for e in self.logs[before:] if str(e["event"]).startswith("configuration"))
            return bool(found)

        await until(told)
        return found[0]


@asynccontextmanager
async def reloading(tmp_path: Path, text: str) -> AsyncIterator[Reloading]:
    """A daemon that reads a file again at SIGHUP."""
    file = tmp_path / "relayd.toml"
    file.write_text(text)

    def reread() -> Config:
        return load_config(file, environ={}, overrides={"state_dir": tmp_path / "state"})

    with kept_logs() as logs:
        async with running(reread(), reread) as started:
            yield Reloading(file, started.relay, started.tokens, started.urls, logs)


@pytest.mark.trio
async def test_a_changed_limit_holds_for_requests_that_run_already(tmp_path: Path) -> None:
    rules: dict[str, Any] = {"inputs": {"text": {"live": True}}}
    first = 'listen = ""\n[spaces.tts]\n[limits]\nfeed_idle_timeout_s = 600\n'
    async with (
        reloading(tmp_path, first) as it,
        fake_worker(it.url, **rules) as worker,
        peer(it.url, "client") as client,
    ):
        await until(lambda: bool(it.relay.workers))
        client.send(a_submit(params={}, inputs={"text": InputInfo(media_type="text/plain", live=True)}))
        await worker.assigned()
        await it.reload(first.replace("600", "0.05"))
        failed = await client.next(Failed)
        assert failed.code == "feed_timeout"
        assert "0.05 s" in failed.message


@pytest.mark.trio
async def test_of_conversations_all_is_read_again_but_what_is_open(tmp_path: Path) -> None:
    first = 'listen = ""\n[spaces.tts]\n[talk]\nreply = "llm"\n'
    async with reloading(tmp_path, first) as it:
        told = await it.reload(first + 'speech = "tts"\nhistory = "none"\ntts_server = true\n')
        assert told["changed"] == ["talk.speech:  -> tts"]
        assert told["needs_restart"] == ["talk.history: disk -> none", "talk.tts_server: False -> True"]
        told = await it.reload(first.partition("[talk]")[0])
        assert "talk.reply: llm -> None" in told["needs_restart"]


@pytest.mark.trio
async def test_who_may_connect_to_the_wyoming_protocol_is_read_again(tmp_path: Path) -> None:
    first = 'listen = ""\n[spaces.tts]\n'
    async with reloading(tmp_path, first + '[wyoming]\nlisten = "127.0.0.1:0"\n') as it:
        more = '[wyoming]\nlisten = "127.0.0.1:1"\nallow = ["10.0.0.0/8"]\nprincipal = "hall"\n'
        told = await it.reload(first + more)
        settings = it.relay.config.wyoming
        assert settings is not None
        assert (settings.listen, settings.principal, settings.allow) == ("127.0.0.1:0", "hall", ("10.0.0.0/8",))
        assert told["needs_restart"] == ["wyoming.listen: 127.0.0.1:0 -> 127.0.0.1:1"]
        told = await it.reload(first)
        assert it.relay.config.wyoming == settings
        assert told["needs_restart"]


@pytest.mark.trio
async def test_limits_level_and_spaces_are_read_again_and_what_needs_a_restart_is_told(tmp_path: Path) -> None:
    first = 'listen = ""\n[log]\nlevel = "info"\n[spaces.tts]\n[spaces.old]\n'
    second = (
        'listen = "127.0.0.1:0"\nstore = "memory"\nallowed_origins = ["https://x.org"]\ndrain_timeout_s = 7\n'
        '[log]\nlevel = "debug"\nformat = "json"\n[limits]\nworker_grace_s = 3\n[results]\nretain_s = 9\n'
        "[spaces.tts]\nmax_workers = 2\nmax_queued = 7\n[spaces.new]\n"
    )
    async with reloading(tmp_path, first) as it:
        told = await it.reload(second)
        assert told["event"] == "configuration reloaded"
        assert told["changed"] == [
            "allowed_origins: () -> ('https://x.org',)",
            "drain_timeout_s: 30.0 -> 7.0",
            "limits.worker_grace_s: 30.0 -> 3.0",
            "log.level: info -> debug",
            "results.retain_s: 600.0 -> 9.0",
        ]
        assert told["needs_restart"] == [
            "listen:  -> 127.0.0.1:0",
            "log.format: auto -> json",
            "store: sqlite -> memory",
        ]
        spaces = {key: value for key, value in told.items() if key.startswith("spaces")}
        assert spaces == {
            "spaces_added": ["new"],
            "spaces_changed": ["tts"],
            "spaces_removed": ["old"],
            "spaces_busy": [],
        }
        assert logging.getLogger().level == logging.DEBUG
        assert it.relay.config.limits.worker_grace_s == 3
        assert it.relay.config.listen == ""
        assert sorted(it.relay.spaces) == sorted(it.relay.scheduler.state.spaces) == ["new", "tts"]
        assert it.relay.scheduler.state.spaces["tts"].rules.max_queued == 7
        async with fake_worker(it.url, name="a"), fake_worker(it.url, name="b", spaces=("tts", "new")):
            await until(lambda: len(it.relay.workers) == 2)  # the second had been refused
        records = {record.name: record for record in (await it.relay.store.load()).spaces}
        assert sorted(records) == ["new", "tts"]
        assert (records["tts"].config.max_queued, records["new"].made_by) == (7, "config")
        again = await it.reload(second)
        assert (again["changed"], again["spaces_changed"]) == ([], [])


@pytest.mark.trio
async def test_a_file_with_faults_changes_nothing_and_tells_all_of_them(tmp_path: Path) -> None:
    async with reloading(tmp_path, 'listen = ""\n[spaces.tts]\n') as it:
        before = it.relay.config
        told = await it.reload(
            'drain_timeout_s = 5\n[log]\nlevel = "loud"\n[spaces.tts]\nmax_worker = 3\n[spaces.new]\n'
        )
        assert told["event"] == "configuration not reloaded: nothing changed"
        assert len(told["faults"]) == 2
        assert told["faults"][0].startswith("log.level:")
        assert told["faults"][1].startswith("spaces.tts.max_worker:")
        assert it.relay.config is before
        assert list(it.relay.spaces) == ["tts"]
        assert (await it.reload("[spaces"))["faults"][0].startswith("is not TOML")
        told = await it.reload('listen = ""\ndrain_timeout_s = 5\n[spaces.tts]\n')
        assert told["changed"] == ["drain_timeout_s: 30.0 -> 5.0"]


@pytest.mark.trio
async def test_a_space_that_is_gone_from_the_file_goes_once_it_is_at_rest(tmp_path: Path) -> None:
    async with reloading(tmp_path, 'listen = ""\n[spaces.tts]\n[spaces.busy]\n') as it:
        async with fake_worker(it.url, spaces=("busy",)) as worker, peer(it.url, "client") as client:
            submit = a_submit(space="busy")
            client.send(submit)
            assign = await worker.assigned()
            told = await it.reload('listen = ""\n[spaces.tts]\n')
            assert (told["spaces_removed"], told["spaces_busy"]) == ([], ["busy"])
            worker.speak(assign, [b"\0\0"])
            assert [frame.TYPE for frame in await client.frames(submit)] == ["started", "audio", "completed"]
        await until(lambda: not it.relay.workers)
        told = await it.reload('listen = ""\n[spaces.tts]\n')
        assert (told["spaces_removed"], told["spaces_busy"]) == (["busy"], [])
        assert list(it.relay.spaces) == ["tts"]


@pytest.mark.trio
async def test_a_raised_limit_hands_out_what_waited_for_it(tmp_path: Path) -> None:
    limited = 'listen = ""\n[spaces.tts]\nmax_running_per_principal = 1\n'
    async with (
        reloading(tmp_path, limited) as it,
        fake_worker(it.url, slots=2) as worker,
        peer(it.url, "client") as client,
    ):
        first, second = a_submit(), a_submit()
        client.send(first)
        client.send(second)
        assert (await worker.assigned()).request_id == first.request_id
        await until(lambda: len(it.relay.scheduler.state.spaces["tts"].queue) == 1)
        await it.reload('listen = ""\n[spaces.tts]\n')
        assert (await worker.assigned()).request_id == second.request_id


@pytest.mark.trio
async def test_a_space_made_by_a_command_becomes_the_files_own(tmp_path: Path) -> None:
    async with reloading(tmp_path, 'listen = ""\n[spaces.tts]\n') as it:
        it.relay.spaces["tts"].made_by = "command"
        await it.reload('listen = ""\n[spaces.tts]\ndescription = "mine"\n')
        assert it.relay.spaces["tts"].made_by == "config"
        it.relay.spaces["tts"].made_by = "command"
        assert (await it.reload('listen = ""\n[spaces.x]\n'))["spaces_removed"] == []
        assert sorted(it.relay.spaces) == ["tts", "x"]


@pytest.mark.trio
async def test_a_renewed_certificate_is_shown_and_one_that_does_not_fit_its_key_is_not(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    shutil.copy(TLS / "cert.pem", cert)
    shutil.copy(TLS / "key.pem", key)
    text = f'listen = "127.0.0.1:0"\n[tls]\ncert = "{cert}"\nkey = "{key}"\n[spaces.tts]\n'
    async with reloading(tmp_path, text) as it:
        shown = await _shown(it.urls[0])
        await _make_certificate(cert, tmp_path / "other.pem")
        told = await it.reload(text)  # new certificate, old key
        assert told["event"] == "configuration not reloaded: nothing changed"
        assert "cannot use the certificate" in told["faults"][0]
        assert await _shown(it.urls[0]) == shown
        (tmp_path / "other.pem").rename(key)
        assert (await it.reload(text))["event"] == "configuration reloaded"
        assert await _shown(it.urls[0]) != shown


async def _shown(url: str) -> bytes:
    """The certificate that a door shows."""
    address = parse_address(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    stream = trio.SSLStream(await trio.open_tcp_stream(address.host, address.port), context, https_compatible=True)
    async with stream:
        await stream.do_handshake()
        shown = stream.getpeercert(binary_form=True)
        assert isinstance(shown, bytes)
        return shown


async def _make_certificate(cert: Path, key: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subject = ["-subj", "/CN=localhost", "-days", "2"]
    await trio.run_process([*command, *subject, "-keyout", str(key), "-out", str(cert)], capture_stderr=True)


@pytest.mark.trio
async def test_tokens_are_read_again_and_one_that_is_gone_drops_its_connections(tmp_path: Path) -> None:
    async with reloading(tmp_path, 'listen = ""\n[spaces.tts]\n') as it:
        kept, gone = (it.tokens.create(role="client", name=name, now=1.0) for name in ("ann", "bob"))
        await it.relay.store.commit(PutToken(kept.record))  # bob's never reached the store
        new = TokenRegistry().create(role="client", name="cyd", now=1.0)
        await it.relay.store.commit(PutToken(new.record))
        async with peer(it.url, "client", kept.text) as ann, peer(it.url, "client", gone.text) as bob:
            await it.reload('listen = ""\n[spaces.tts]\n')
            with pytest.raises(LinkError), trio.fail_after(10):
                await bob.next()
            await ann.settled()
        async with peer(it.url, "client", new.text):
            pass
        with pytest.raises(LoginRefused):
            async with peer(it.url, "client", gone.text):
                pass


@pytest.mark.trio
async def test_a_store_that_cannot_be_read_costs_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with reloading(tmp_path, 'listen = ""\nstore = "memory"\n[spaces.tts]\n') as it:
        token = it.tokens.create(role="client", name="ann", now=1.0)

        async def broken(self: MemoryStore) -> None:
            raise StoreError("unreadable")

        monkeypatch.setattr(MemoryStore, "load", broken)
        await it.reload('listen = ""\nstore = "memory"\n[spaces.tts]\n')
        await until(lambda: any(entry["event"] == "tokens not reloaded" for entry in it.logs))
        async with peer(it.url, "client", token.text):
            pass


def test_reading_tokens_again_opens_no_door_that_was_closed_and_closes_none_that_was_just_opened() -> None:
    tokens = TokenRegistry()
    stored, revoked, younger = (tokens.create(role="client", name=name, now=1.0) for name in ("ann", "bob", "cyd"))
    tokens.revoke("bob", 2.0)
    records: list[TokenRecord] = [stored.record, revoked.record]  # bob's revocation did not reach the disk
    known = {stored.record.token_id, revoked.record.token_id}
    assert tokens.reload(records, known) == set()
    state = {record.principal: record.revoked_at for record in tokens.list()}
    assert state == {"ann": None, "bob": 2.0, "cyd": None}
    elsewhere = attrs.evolve(stored.record, revoked_at=3.0)
    assert tokens.reload([elsewhere], known) == {stored.record.token_id}
    assert {record.principal for record in tokens.list()} == {"ann", "cyd"}
    assert younger.record in tokens.list()


@pytest.mark.trio
async def test_a_reload_in_the_middle_of_one_is_done_after_it(tmp_path: Path) -> None:
    async with reloading(tmp_path, 'listen = ""\n[spaces.tts]\n') as it:
        it.file.write_text('listen = ""\n[spaces.tts]\n[spaces.a]\n')
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: "a" in it.relay.spaces)
        it.file.write_text('listen = ""\n[spaces.tts]\n[spaces.b]\n')
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: sorted(it.relay.spaces) == ["b", "tts"])
