"""The admin commands, through `relayd.cli.main`, with the daemon running and not: what they do, say and end with."""

import io
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.wire.errors import LinkBroken, LoginRefused
from protocol.wire.messages import Accepted, Done, Drain, Registered, Steer, Undrain
from relayd.admin import AdminError, NotRunning, open_admin
from relayd.cli import main
from relayd.config.loader import load_config
from tests.support.fake_worker import fake_worker, samples
from tests.support.relay import Daemon, a_submit, an_id, daemon, kept_logs, peer, until

CONFIG = 'listen = ""\n[spaces.tts]\ndescription = "of the file"\n'


@attrs.frozen
class Shell:
    """Where commands are typed."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    relay: Daemon | None

    async def run(self, *args: str, code: int = 0) -> tuple[str, str]:
        """What a command writes to stdout and stderr; it must end with `code`."""
        self.capsys.readouterr()
        argv = [*args, "--config", str(self.folder / "relayd.toml"), "--state-dir", str(self.folder)]
        with trio.fail_after(10):
            ended = await trio.to_thread.run_sync(partial(main, argv))
        out, err = self.capsys.readouterr()
        assert ended == code, f"{args} ended with {ended}: {err}"
        return out, err

    async def rows(self, *args: str) -> list[dict[str, Any]]:
        """What a listing tells as JSON."""
        rows: list[dict[str, Any]] = json.loads((await self.run(*args, "--json"))[0])
        return rows

    async def fails(self, *args: str, code: int = 1) -> str:
        """What a command complains about; it prints nothing else."""
        out, err = await self.run(*args, code=code)
        assert out == ""
        assert err.startswith("relayd: ")
        assert err.count("\n") == 1
        return err


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RELAY")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _the_daemon_logs_elsewhere() -> Iterator[None]:
    with kept_logs():
        yield


@asynccontextmanager
async def a_shell(folder: Path, capsys: pytest.CaptureFixture[str], *, online: bool) -> AsyncIterator[Shell]:
    """A folder with a configuration, and a daemon on it or none."""
    (folder / "relayd.toml").write_text(CONFIG)
    if online:
        async with daemon(folder, store="sqlite") as relay:
            yield Shell(folder, capsys, relay)
    else:
        yield Shell(folder, capsys, None)


both = pytest.mark.parametrize("online", [True, False], ids=["online", "offline"])


@pytest.mark.trio
@both
async def test_spaces_are_made_paused_resumed_and_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], online: bool
) -> None:
    async with a_shell(tmp_path, capsys, online=online) as shell:
        _, said = await shell.run("space", "create", "lab", "--max-workers", "2", "--when-empty", "refuse")
        assert "space lab created" in said
        spaces = {row["name"]: row for row in await shell.rows("space", "list")}
        assert {"tts", "lab"} <= set(spaces)
        assert (spaces["lab"]["max_workers"], spaces["lab"]["state"]) == (2, "no worker")
        _, said = await shell.run("space", "change", "lab", "--max-workers", "3", "--description", "Tries")
        assert "space lab changed" in said
        spaces = {row["name"]: row for row in await shell.rows("space", "list")}
        assert (spaces["lab"]["max_workers"], spaces["lab"]["description"]) == (3, "Tries")
        assert "nothing to change" in await shell.fails("space", "change", "lab")
        assert "max_workers: " in await shell.fails("space", "change", "lab", "--max-workers", "0")
        assert "change it there" in await shell.fails("space", "change", "tts", "--max-workers", "2")
        _, said = await shell.run("space", "pause", "lab")
        assert "paused" in said
        assert {row["name"]: row["state"] for row in await shell.rows("space", "list")}["lab"] == "paused"
        await shell.run("space", "pause", "tts")
        await shell.run("space", "resume", "lab")
        out, _ = await shell.run("space", "list")
        told = {line.split()[0]: line for line in out.splitlines()}
        assert "paused" in told["tts"]
        assert "no worker" in told["lab"]
        _, said = await shell.run("space", "delete", "lab")
        assert "space lab deleted" in said
        assert "lab" not in {row["name"] for row in await shell.rows("space", "list")}
    async with a_shell(tmp_path, capsys, online=True) as shell:  # a daemon started afterwards finds the same
        states = {row["name"]: row["state"] for row in await shell.rows("space", "list")}
        assert states == {"tts": "paused", "check": "no worker"}


@pytest.mark.trio
@both
async def test_what_cannot_be_done_to_a_space_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], online: bool
) -> None:
    async with a_shell(tmp_path, capsys, online=online) as shell:
        await shell.run("space", "create", "lab")
        assert "already exists" in await shell.fails("space", "create", "lab")
        assert "already exists" in await shell.fails("space", "create", "tts")
        assert "not a valid space name" in await shell.fails("space", "create", "../lab")
        assert "max_workers" in await shell.fails("space", "create", "x", "--max-workers", "0")
        assert "is defined in relayd.toml" in await shell.fails("space", "delete", "tts")
        for what in ("pause", "resume", "delete"):
            assert "space 'nowhere' does not exist" in await shell.fails("space", what, "nowhere")


@pytest.mark.trio
@both
async def test_a_space_with_requests_is_not_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], online: bool
) -> None:
    async with a_shell(tmp_path, capsys, online=True) as shell:
        assert shell.relay is not None
        await shell.run("space", "create", "lab")
        async with peer(shell.relay.url, "client") as client:
            client.send(a_submit(space="lab", detach=True))
            await client.next()
            if online:
                assert "still has 1 queued" in await shell.fails("space", "delete", "lab")
    if not online:
        async with a_shell(tmp_path, capsys, online=False) as shell:
            assert {row["name"]: row["queued"] for row in await shell.rows("space", "list")} == {"lab": 1, "tts": 0}
            assert "still has 1 requests" in await shell.fails("space", "delete", "lab")


@pytest.mark.trio
@both
async def test_tokens_are_made_listed_and_revoked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], online: bool
) -> None:
    async with a_shell(tmp_path, capsys, online=online) as shell:
        new = ("token", "create", "--name", "ann", "--role")
        first, said = await shell.run(*new, "client", "--space", "tts", "--space", "lab*", "--expires", "30d")
        assert first.startswith("rly_c_")
        assert first.count("\n") == 1, "the token alone is on stdout"
        token_id = said.split(":")[0]
        second = (await shell.run(*new, "worker", "--max-connections", "3"))[0]
        rows = await shell.rows("token", "list")
        assert [(row["token_id"] == token_id, row["role"], row["spaces"], row["state"]) for row in rows] == [
            (True, "client", ["tts", "lab*"], "live"),
            (False, "worker", [], "live"),
        ]
        assert rows[1]["limits"] == {"max_connections": 3}
        assert rows[0]["expires"] is not None
        out, _ = await shell.run("token", "list")
        assert first.strip() not in out + json.dumps(rows), "its text is kept nowhere"
        _, said = await shell.run("token", "revoke", token_id)
        assert said == f"revoked {token_id}\n"
        states = {row["token_id"]: row["state"] for row in await shell.rows("token", "list")}
        assert states.pop(token_id) == "revoked"
        assert list(states.values()) == ["live"]
    async with a_shell(tmp_path, capsys, online=True) as shell:
        assert shell.relay is not None
        async with peer(shell.relay.url, "worker", second.strip()) as ann:
            assert ann.welcome.principal == "ann"
            await shell.run("token", "revoke", "ann")
            with pytest.raises(LinkBroken):
                await ann.next()
        with pytest.raises(LoginRefused, match="was revoked"):
            async with peer(shell.relay.url, "client", first.strip()):
                pytest.fail("entered")


@pytest.mark.trio
@both
async def test_users_are_added_invited_changed_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, online: bool
) -> None:
    def type_in(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    async with a_shell(tmp_path, capsys, online=online) as shell:
        type_in("correct horse\n")
        assert (await shell.run("user", "add", "anna"))[0] == ""
        await shell.run("user", "add", "dora@example.org", "--no-password")
        await shell.run("user", "role", "ANNA", "operator")
        code, said = await shell.run("user", "invite", "--expires", "2d")
        assert (code[:6], code.count("\n"), said[:4]) == ("rly_i_", 1, "inv_")
        rows = await shell.rows("user", "list")
        assert [(row["name"], row["role"], row["state"], row["sessions"]) for row in rows] == [
            ("anna", "operator", "active", 0),
            ("dora@example.org", "client", "proxy", 0),
            ("", "client", "invited", 0),
        ]
        assert code.strip() not in json.dumps(rows)
        type_in("another horse\n")
        await shell.run("user", "passwd", "anna")
        await shell.run("user", "remove", said.partition(":")[0])
        await shell.run("user", "remove", "dora@example.org")
        assert [row["name"] for row in await shell.rows("user", "list")] == ["anna"]
        (made,) = await shell.rows("user", "invite")
        assert made["code"].startswith("rly_i_")


@pytest.mark.trio
@both
async def test_what_cannot_be_done_to_a_user_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, online: bool
) -> None:
    async with a_shell(tmp_path, capsys, online=online) as shell:
        await shell.run("user", "add", "anna", "--no-password")
        assert "the name 'Anna' is taken" in await shell.fails("user", "add", "Anna", "--no-password")
        assert "'a b' is not a valid name" in await shell.fails("user", "add", "a b", "--no-password")
        assert "no user is named 'bob'" in await shell.fails("user", "role", "bob", "client")
        assert "no user is named 'bob'" in await shell.fails("user", "remove", "bob")
        assert "neither a time span" in await shell.fails("user", "invite", "--expires", "soon")
        for typed, why in (("", "no password"), ("short\n", "at least 10 characters"), ("anna\n", "at least 10")):
            monkeypatch.setattr("sys.stdin", io.StringIO(typed))
            assert why in await shell.fails("user", "passwd", "anna")


@pytest.mark.trio
@both
async def test_what_cannot_be_done_to_a_token_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], online: bool
) -> None:
    async with a_shell(tmp_path, capsys, online=online) as shell:
        new = ("token", "create", "--role", "client", "--name")
        assert "no live token has the id or the principal 'nobody'" in await shell.fails("token", "revoke", "nobody")
        assert "'an n' is not a valid name" in await shell.fails(*new, "an n")
        assert "is in the past" in await shell.fails(*new, "ann", "--expires", "2001-01-01")
        assert "neither a time span" in await shell.fails(*new, "ann", "--expires", "soon")
        assert "space pattern" in await shell.fails(*new, "ann", "--space", "a b")
        assert "max_queued" in await shell.fails(*new, "ann", "--max-queued", "-1")
        await shell.run(*new, "ann")
        await shell.run(*new, "ann")
        assert "already has 2 live client tokens" in await shell.fails(*new, "ann")
        assert await shell.rows("token", "list") != []


@pytest.mark.trio
async def test_the_running_daemon_tells_its_workers_and_requests_and_drains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with a_shell(tmp_path, capsys, online=True) as shell:
        relay = shell.relay
        assert relay is not None
        assert await shell.rows("workers") == await shell.rows("requests") == []
        async with fake_worker(relay.url, slots=2) as worker, peer(relay.url, "client") as client:
            submit = a_submit()
            client.send(submit)
            await worker.assigned()
            (row,) = await shell.rows("workers")
            assert row["worker_id"].startswith("box-")
            assert (row["slots"], row["busy"], row["engine"], row["spaces"]) == (2, 1, "fake", ["tts"])
            (row,) = await shell.rows("requests")
            assert (row["request_id"], row["state"], row["attempt"]) == (submit.request_id, "running", 1)
            out, _ = await shell.run("requests")
            assert out.splitlines()[0].split()[:3] == ["request_id", "state", "space"]
            assert submit.request_id in out
            _, said = await shell.run("drain")
            assert "exits when its running requests have ended (1)" in said
            assert relay.relay.draining.is_set()


@pytest.mark.trio
async def test_many_rows_are_listed_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with a_shell(tmp_path, capsys, online=True) as shell:
        relay = shell.relay
        assert relay is not None
        await shell.run("space", "create", "lab", "--max-queued-per-principal", "400")
        async with peer(relay.url, "client") as client:
            for _ in range(400):
                client.send(a_submit(space="lab"))
            await until(lambda: len(relay.relay.requests) == 400)
            assert len(await shell.rows("requests")) == 400


@pytest.mark.trio
async def test_what_needs_a_running_daemon_says_so_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with a_shell(tmp_path, capsys, online=False) as shell:
        for command in ("workers", "requests", "drain"):
            assert f"no relay runs on {tmp_path}" in await shell.fails(command, code=3)


@pytest.mark.trio
async def test_a_relay_that_keeps_nothing_is_not_looked_after_while_it_is_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with a_shell(tmp_path, capsys, online=False) as shell:
        (tmp_path / "relayd.toml").write_text('store = "memory"\n' + CONFIG)
        for command in (("space", "list"), ("token", "list"), ("space", "create", "lab"), ("drain",)):
            assert "nothing is stored meanwhile" in await shell.fails(*command, code=3)
        assert not (tmp_path / "relayd.db").exists()


@pytest.mark.trio
async def test_a_folder_that_another_holds_and_a_socket_of_a_killed_relay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with a_shell(tmp_path, capsys, online=True) as shell:
        (tmp_path / "relayd.sock").rename(tmp_path / "away.sock")
        assert "is starting or stopping" in await shell.fails("space", "list")
        (tmp_path / "away.sock").rename(tmp_path / "relayd.sock")
        left = tmp_path / "left.sock"
        left.hardlink_to(tmp_path / "relayd.sock")
    left.rename(tmp_path / "relayd.sock")
    async with a_shell(tmp_path, capsys, online=False) as shell:
        assert {row["name"] for row in await shell.rows("space", "list")} == {"tts"}


@pytest.mark.trio
async def test_wrong_settings_and_wrong_usage_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with a_shell(tmp_path, capsys, online=False) as shell:
        out, _ = await shell.run("check-config")
        assert out.startswith("ok: ")
        with pytest.raises(SystemExit) as usage:
            main(["token", "create", "--role", "king", "--name", "ann"])
        assert usage.value.code == 2
        (tmp_path / "relayd.toml").write_text("listen = 5\n")
        for command in (("check-config",), ("space", "list"), ("serve",)):
            _, said = await shell.run(*command, code=2)
            assert "listen: must be a string" in said


@pytest.mark.trio
async def test_a_program_gets_the_same_as_errors(tmp_path: Path) -> None:
    (tmp_path / "relayd.toml").write_text(CONFIG)
    config = load_config(tmp_path / "relayd.toml", environ={}, overrides={"state_dir": tmp_path})
    async with open_admin(config) as admin:
        with pytest.raises(NotRunning):
            await admin.drain()
        with pytest.raises(AdminError, match="no live token"):
            await admin.revoke_token("nobody")
    async with daemon(tmp_path, store="sqlite"):
        with pytest.raises(AdminError, match="no live token"):
            async with open_admin(config) as admin:
                await admin.revoke_token("nobody")
        with pytest.raises(AdminError, match=r"is defined in relayd\.toml"):
            async with open_admin(config) as admin:
                await admin.delete_space("tts")


# -- steering --------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_workers_are_drained_cordoned_and_undrained_by_any_of_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with a_shell(tmp_path, capsys, online=True) as shell:
        relay = shell.relay
        assert relay is not None

        async def states() -> dict[str, str]:
            return {row["name"]: row["state"] for row in await shell.rows("workers")}

        async with (
            fake_worker(relay.url, name="one") as first,
            fake_worker(relay.url, name="two", spaces=("check",)) as second,
        ):
            ids = {}
            for name, worker in (("one", first), ("two", second)):
                ids[name] = (await worker.peer.next(Registered)).worker_id
            _, said = await shell.run("worker", "cordon", "one")
            assert f"worker {ids['one']} finishes what runs, takes no more and stays" in said
            assert await states() == {"one": "cordoned", "two": "idle"}
            answers = await shell.rows("worker", "drain", ids["two"][:6], ids["one"])
            assert answers == [{"action": "drain_worker", "target": ids[name], "done": True} for name in ("two", "one")]
            for worker in (first, second):
                await worker.peer.next(Drain)
            assert await states() == {"one": "draining", "two": "draining"}
            await shell.run("worker", "cordon", "two")
            await second.peer.next(Undrain)
            await shell.run("worker", "undrain", "one", "two")
            assert await states() == {"one": "idle", "two": "idle"}
            assert f"connected: {', '.join(sorted(ids.values()))}" in await shell.fails("worker", "drain", "x", code=2)


@pytest.mark.trio
async def test_the_beginning_of_several_workers_is_refused_with_their_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with a_shell(tmp_path, capsys, online=True) as shell:
        relay = shell.relay
        assert relay is not None
        async with fake_worker(relay.url, name="gpu-a"), fake_worker(relay.url, name="gpu-b", spaces=("check",)):
            await until(lambda: len(relay.relay.workers) == 2)
            _, err = await shell.run("worker", "drain", "gpu", code=2)
            assert err.splitlines()[0] == "relayd: 'gpu' is the beginning of 2 worker ids; give more of one of them"
            assert [line.split(": ")[1].rpartition("-")[0] for line in err.splitlines()[1:]] == ["  gpu-a", "  gpu-b"]
            assert {row["state"] for row in await shell.rows("workers")} == {"idle"}


@pytest.mark.trio
async def test_a_cordoned_worker_finishes_and_gets_nothing_new_also_after_a_restart(tmp_path: Path) -> None:
    instance = an_id()
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url, instance=instance) as worker,
        peer(relay.url, "operator") as operator,
    ):
        worker_id = (await worker.peer.next(Registered)).worker_id
        first, second = a_submit(), a_submit(detach=True)
        operator.send(first)
        assign = await worker.assigned()
        operator.send(Steer(action="cordon_worker", target=worker_id))
        await operator.next(Done)
        operator.send(second)
        await operator.next(Accepted)
        worker.speak(assign, [samples(10)])
        await operator.frames(first)
        assert relay.relay.requests[second.request_id].entry.state == "queued"
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url, instance=instance) as worker,
        peer(relay.url, "operator") as operator,
    ):
        await worker.peer.settled()  # it was sent no drain
        assert relay.relay.scheduler.state.workers[worker_id].draining
        operator.send(Steer(action="undrain_worker", target=worker_id))
        await operator.next(Done)
        assert (await worker.assigned()).request_id == second.request_id


@pytest.mark.trio
async def test_a_drain_can_be_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with a_shell(tmp_path, capsys, online=True) as shell:
        relay = shell.relay
        assert relay is not None
        async with (
            fake_worker(relay.url) as worker,
            peer(relay.url, "client") as client,
            trio.open_nursery() as nursery,
        ):
            client.send(a_submit())
            assign = await worker.assigned()
            ended = trio.Event()

            async def drain() -> None:
                await shell.run("worker", "cordon", "box", "--wait")
                ended.set()

            nursery.start_soon(drain)
            await until(lambda: relay.relay.scheduler.state.workers[next(iter(relay.relay.workers))].draining)
            assert not ended.is_set()
            worker.speak(assign, [samples(10)])
            await ended.wait()


@pytest.mark.trio
async def test_requests_are_promoted_and_cancelled_and_clients_disconnected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with a_shell(tmp_path, capsys, online=True) as shell:
        relay = shell.relay
        assert relay is not None
        async with peer(relay.url, "client") as client:
            submits = [a_submit(request_id=first * 32) for first in "ab"]
            for submit in submits:
                client.send(submit)
                await client.next(Accepted)
            await shell.run("request", "promote", "b")
            assert relay.relay.requests["b" * 32].entry.promoted == 1
            out, err = await shell.run("request", "cancel", "a", "c" * 32, code=1)
            assert f"request {'a' * 32} is cancelled" in err
            assert "is unknown" in err
            assert relay.relay.requests["a" * 32].entry.state == "cancelled"
            (row,) = await shell.rows("clients", "--limit", "1")
            (answer,) = await shell.rows("client", "disconnect", client.welcome.connection_id)
            assert answer["done"] is True
            await until(lambda: client.welcome.connection_id not in relay.relay.clients)
            assert out == ""
            assert row["principal"]


@pytest.mark.trio
async def test_nothing_is_steered_without_a_running_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with a_shell(tmp_path, capsys, online=False) as shell:
        for command in (("worker", "drain", "x"), ("request", "cancel", "ab"), ("client", "disconnect", "x")):
            assert f"no relay runs on {tmp_path}" in await shell.fails(*command, code=3)
