"""Implements the admin commands: on a running daemon, through the socket in its state folder, else on its store."""

import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol

import attrs
import trio

from protocol.client.client import RelayClient, open_relay
from protocol.commands.id_prefix import MAX_TOLD, AmbiguousId, find_request_id
from protocol.wire.errors import ConnectError, LinkError, LoginRefused, RequestRejected
from protocol.wire.messages import Rejected, Snapshot
from protocol.wire.validators import Value
from relayd.auth.passwords import hash_password
from relayd.auth.tokens import TokenRegistry, parse_expires, parse_limits
from relayd.auth.users import UserRegistry, check_name, check_password, no_such_user
from relayd.config.schema import Config
from relayd.core.space_rules import check_changed_space, check_new_space, refuse_configured
from relayd.scheduling.scheduler import no_such_space
from relayd.store.base import StoreError, StoreInUse
from relayd.store.factory import OfflineStore, open_offline
from relayd.store.records import DeleteSpace, PutSpace, PutToken, SpaceRecord
from relayd.views.token_rows import Row, token_row

#: How long a daemon on the same machine may take to answer a command.
ANSWER_S = 10.0


class AdminError(Exception):
    """The command failed; the message says why and what to do."""


class NotRunning(AdminError):
    """The command needs a running daemon, and there is none."""


class Admin(Protocol):
    """The admin commands, on a running daemon or on its store."""

    async def create_space(self, name: str, options: dict[str, Value]) -> None:
        """Create a space."""

    async def change_space(self, name: str, options: dict[str, Value]) -> None:
        """Change some settings of a space."""

    async def spaces(self) -> list[Row]:
        """Return all spaces."""

    async def set_paused(self, name: str, paused: bool) -> None:
        """Pause or resume a space."""

    async def delete_space(self, name: str) -> None:
        """Delete an idle space."""

    async def create_token(
        self,
        name: str,
        role: str,
        spaces: list[str],
        expires: str | None,
        limits: dict[str, int],
        *,
        readonly: bool = False,
    ) -> Row:
        """Create a token; the row's `token` is the secret. `limits` holds the fields of `TokenLimits` that are set."""

    async def tokens(self) -> list[Row]:
        """Return all tokens, without their secrets."""

    async def revoke_token(self, which: str) -> list[str]:
        """Revoke a token by its id, or all tokens of a principal; returns the ids of the revoked tokens."""

    async def create_user(self, name: str, role: str, password: str) -> None:
        """Add a user of the page; without a password, one who logs in at a proxy."""

    async def users(self) -> list[Row]:
        """Return all users, and behind them the open invitations."""

    async def set_user_password(self, name: str, password: str) -> None:
        """Set the password of a user."""

    async def set_user_role(self, name: str, role: str) -> None:
        """Set the role of a user."""

    async def remove_user(self, which: str) -> None:
        """Remove a user by the name, or take back an invitation by its id."""

    async def create_invite(self, role: str, expires: str | None) -> Row:
        """Make an invitation; the row's `code` is the secret."""

    async def rows(self, topic: str) -> list[Row]:
        """Return the current rows of a topic, `workers` or `requests`."""

    async def drain(self) -> int:
        """Tell the daemon to finish the running requests and exit; returns their number."""

    async def steer(self, action: str, target: str) -> Row:
        """Carry out an action that needs no options; returns what the daemon answers."""

    async def find(self, topic: str, given: str) -> str:
        """Return the id of the worker, request or client that `given` is the id, the name or the beginning of.

        Raises:
            ValueError: there is none, or there are several.
        """

    async def wait_idle(self, worker_ids: list[str]) -> None:
        """Return when none of these workers runs anything, for however long that takes."""


@asynccontextmanager
async def open_admin(config: Config) -> AsyncIterator[Admin]:
    """Open the commands for the daemon of this configuration, whether it runs or not.

    Raises:
        AdminError: neither the daemon nor its store is available.
    """
    path = config.socket_path
    try:
        with trio.fail_after(ANSWER_S) as deadline:
            async with AsyncExitStack() as stack:
                if path is not None and (relay := await _connect(stack, path)) is not None:
                    yield Online(relay, deadline)
                    return
    except RequestRejected as fault:
        raise AdminError(fault.message) from None
    except LinkError as fault:
        raise AdminError(f"lost the connection to the relay: {fault}") from None
    except trio.TooSlowError:
        raise AdminError(f"the relay at {path} did not answer within {ANSWER_S:g} s") from None
    if config.store == "memory":
        if path is None:
            raise AdminError(
                'with store = "memory" and unix_socket = false, commands cannot reach the relay or its store'
            )
        raise NotRunning(f'no relay runs on {config.state_dir}, and with store = "memory" nothing is stored meanwhile')
    try:
        with open_offline(config.state_dir) as store:
            yield Offline(config, store)
    except StoreInUse as fault:
        why = "a relay is starting or stopping"
        if path is None:
            why = "a relay is running, and with unix_socket = false commands cannot reach it"
        raise AdminError(f"{why}: {fault}") from None
    except StoreError as fault:
        raise AdminError(str(fault)) from None


async def _connect(stack: AsyncExitStack, path: Path) -> RelayClient | None:
    """Connect to the daemon at the socket `path`, until `stack` closes; None if nothing listens there."""
    if not await trio.Path(path).exists():
        return None
    opening = open_relay(f"unix:{path}", token="", role="operator", agent="relayd-admin")
    try:
        return await stack.enter_async_context(opening)
    except LoginRefused as fault:
        raise AdminError(f"the relay at {path} refused this user: {fault}") from None
    except ConnectError:  # a socket left behind by a killed daemon
        return None


@attrs.define
class Online:
    """The commands on a running daemon."""

    relay: RelayClient
    deadline: trio.CancelScope

    async def create_space(self, name: str, options: dict[str, Value]) -> None:
        """See `Admin`."""
        await self.relay.steer("create_space", name, **options)

    async def change_space(self, name: str, options: dict[str, Value]) -> None:
        """See `Admin`."""
        await self.relay.steer("change_space", name, **options)

    async def spaces(self) -> list[Row]:
        """See `Admin`."""
        return await self.rows("spaces")

    async def set_paused(self, name: str, paused: bool) -> None:
        """See `Admin`."""
        await self.relay.steer("pause_space" if paused else "resume_space", name)

    async def delete_space(self, name: str) -> None:
        """See `Admin`."""
        await self.relay.steer("delete_space", name)

    async def create_token(
        self,
        name: str,
        role: str,
        spaces: list[str],
        expires: str | None,
        limits: dict[str, int],
        *,
        readonly: bool = False,
    ) -> Row:
        """See `Admin`."""
        options: dict[str, Value] = {"role": role, "spaces": spaces, "expires": expires, "limits": limits}
        options["readonly"] = readonly
        return await self.relay.steer("create_token", name, **options)

    async def tokens(self) -> list[Row]:
        """See `Admin`."""
        return await self._listed("list_tokens", "tokens", "token_id")

    async def _listed(self, action: str, name: str, key: str) -> list[Row]:
        """Return all rows of a list that comes in pages."""
        rows: list[Row] = []
        while True:
            page = await self.relay.steer(action, after=rows[-1][key] if rows else "")
            rows += page[name]
            if not page["more"]:
                return rows

    async def revoke_token(self, which: str) -> list[str]:
        """See `Admin`."""
        revoked: list[str] = (await self.relay.steer("revoke_token", which))["revoked"]
        return revoked

    async def create_user(self, name: str, role: str, password: str) -> None:
        """See `Admin`."""
        await self.relay.steer("create_user", name, role=role, password=password)

    async def users(self) -> list[Row]:
        """See `Admin`."""
        return await self._listed("list_users", "users", "id")

    async def set_user_password(self, name: str, password: str) -> None:
        """See `Admin`."""
        await self.relay.steer("set_user_password", name, password=password)

    async def set_user_role(self, name: str, role: str) -> None:
        """See `Admin`."""
        await self.relay.steer("set_user_role", name, role=role)

    async def remove_user(self, which: str) -> None:
        """See `Admin`."""
        await self.relay.steer("remove_user", which)

    async def create_invite(self, role: str, expires: str | None) -> Row:
        """See `Admin`."""
        return await self.relay.steer("create_invite", role=role, expires=expires)

    async def rows(self, topic: str) -> list[Row]:
        """See `Admin`."""
        async with self.relay.watch([topic]) as watch:
            async for change in watch:
                if isinstance(change, Snapshot):
                    return list(change.data.get(topic, []))
        raise AdminError("the relay ended the watch")

    async def drain(self) -> int:
        """See `Admin`."""
        running: int = (await self.relay.steer("drain"))["running"]
        return running

    async def steer(self, action: str, target: str) -> Row:
        """See `Admin`."""
        try:
            return await self.relay.steer(action, target)
        except RequestRejected as fault:
            raise AdminError(fault.message) from None

    async def find(self, topic: str, given: str) -> str:
        """See `Admin`."""
        if topic == "requests":
            return await find_request_id(self.relay, given)
        return pick(await self.rows(topic), topic, given)

    async def wait_idle(self, worker_ids: list[str]) -> None:
        """See `Admin`."""
        self.deadline.deadline = math.inf
        busy = set(worker_ids)
        async with self.relay.watch(["workers"]) as watch:
            async for change in watch:
                rows = {row["worker_id"]: row for row in change.data.get("workers", [])}
                if isinstance(change, Snapshot):
                    busy &= rows.keys()
                busy -= {key for key, row in rows.items() if not row.get("busy")}
                busy -= set(getattr(change, "gone", {}).get("workers", ()))
                if not busy:
                    return


@attrs.define
class Offline:
    """The commands on the store of a stopped daemon."""

    config: Config
    store: OfflineStore

    def _space(self, name: str) -> SpaceRecord:
        stored = {record.name: record for record in self.store.load().spaces}
        if name in self.config.spaces:
            fresh = SpaceRecord(name=name, config=self.config.spaces[name], made_by="config", created_at=time.time())
            return stored.get(name, fresh)
        if name in stored:
            return stored[name]
        raise AdminError(no_such_space(name, operator=True, known={*self.config.spaces, *stored}).message)

    async def create_space(self, name: str, options: dict[str, Value]) -> None:
        """See `Admin`."""
        config = check_new_space(name, options, {*self.config.spaces, *(r.name for r in self.store.load().spaces)})
        if isinstance(config, Rejected):
            raise AdminError(config.message)
        self.store.commit(PutSpace(SpaceRecord(name=name, config=config, created_at=time.time())))

    async def change_space(self, name: str, options: dict[str, Value]) -> None:
        """See `Admin`."""
        record = self._space(name)
        config = check_changed_space(record, options)
        if isinstance(config, Rejected):
            raise AdminError(config.message)
        self.store.commit(PutSpace(attrs.evolve(record, config=config)))

    async def spaces(self) -> list[Row]:
        """See `Admin`."""
        names = {*self.config.spaces, *(r.name for r in self.store.load().spaces if r.made_by == "command")}
        records = [self._space(name) for name in sorted(names)]
        return [
            {
                "name": record.name,
                "state": "paused" if record.paused else "no worker",
                "workers": 0,
                "max_workers": record.config.max_workers,
                "slots": 0,
                "busy": 0,
                "queued": sum(
                    r.submit.space == record.name and r.state == "queued" for r in self.store.load().requests
                ),
                "engine": record.engine,
                "description": record.config.description,
            }
            for record in records
        ]

    async def set_paused(self, name: str, paused: bool) -> None:
        """See `Admin`."""
        self.store.commit(PutSpace(attrs.evolve(self._space(name), paused=paused)))

    async def delete_space(self, name: str) -> None:
        """See `Admin`."""
        if name in self.config.spaces:
            raise AdminError(refuse_configured(name).message)
        self._space(name)
        if waiting := [r for r in self.store.load().requests if r.submit.space == name and r.ended_at is None]:
            raise AdminError(
                f"space {name!r} still has {len(waiting)} requests; start the relay and let them end first"
            )
        self.store.commit(DeleteSpace(name))

    async def create_token(
        self,
        name: str,
        role: str,
        spaces: list[str],
        expires: str | None,
        limits: dict[str, int],
        *,
        readonly: bool = False,
    ) -> Row:
        """See `Admin`."""
        now, tokens = time.time(), TokenRegistry(self.store.load().tokens)
        try:
            expires_at = parse_expires(expires, now) if expires is not None else None
            token = tokens.create(
                role=role,
                name=name,
                now=now,
                spaces=spaces,
                expires_at=expires_at,
                limits=parse_limits(limits),
                readonly=readonly,
            )
        except ValueError as fault:
            raise AdminError(str(fault)) from None
        self.store.commit(PutToken(token.record))
        return {"token": token.text, "token_id": token.record.token_id}

    async def tokens(self) -> list[Row]:
        """See `Admin`."""
        return [token_row(record, time.time()) for record in TokenRegistry(self.store.load().tokens).list()]

    async def revoke_token(self, which: str) -> list[str]:
        """See `Admin`."""
        revoked = TokenRegistry(self.store.load().tokens).revoke(which, time.time())
        if not revoked:
            raise AdminError(f"no live token has the id or the principal {which!r}; see relayd token list")
        self.store.commit(*map(PutToken, revoked))
        return [record.token_id for record in revoked]

    def _registry(self) -> UserRegistry:
        loaded, users = self.store.load(), UserRegistry()
        users.load(loaded.users, loaded.sessions, loaded.invites)
        return users

    async def create_user(self, name: str, role: str, password: str) -> None:
        """See `Admin`."""
        try:
            check_name(name)
            if password:
                check_password(password, name, self.config.users)
            added = self._registry().add(name, role, hash_password(password) if password else "", time.time())
        except ValueError as fault:
            raise AdminError(str(fault)) from None
        self.store.commit(added)

    async def users(self) -> list[Row]:
        """See `Admin`."""
        return self._registry().rows(time.time())

    async def set_user_password(self, name: str, password: str) -> None:
        """See `Admin`."""
        try:
            check_password(password, name, self.config.users)
        except ValueError as fault:
            raise AdminError(str(fault)) from None
        self._change_user(name, password=hash_password(password))

    async def set_user_role(self, name: str, role: str) -> None:
        """See `Admin`."""
        self._change_user(name, role=role)

    async def remove_user(self, which: str) -> None:
        """See `Admin`."""
        if (taken := self._registry().take_invite(which)) is not None:
            self.store.commit(taken)
        else:
            self._change_user(which, password="", removed_at=time.time())

    def _change_user(self, name: str, **fields: Value) -> None:
        users = self._registry()
        if (user := users.find(name)) is None:
            raise AdminError(no_such_user(name))
        ended = users.end_sessions(users.sessions_of(user.user_id))
        self.store.commit(users.change(user, **fields), *ended)

    async def create_invite(self, role: str, expires: str | None) -> Row:
        """See `Admin`."""
        now = time.time()
        try:
            expires_at = parse_expires(expires, now) if expires is not None else None
            new, change = self._registry().invite(role, now, expires_at)
        except ValueError as fault:
            raise AdminError(str(fault)) from None
        self.store.commit(change)
        return {"code": new.text, "id": new.record.invite_id}

    async def rows(self, topic: str) -> list[Row]:
        """See `Admin`."""
        raise NotRunning(
            f"no relay runs on {self.config.state_dir}, so there are no {topic}; start it with relayd serve"
        )

    async def drain(self) -> int:
        """See `Admin`."""
        raise NotRunning(f"no relay runs on {self.config.state_dir}")

    async def steer(self, action: str, target: str) -> Row:
        """See `Admin`."""
        raise NotRunning(f"no relay runs on {self.config.state_dir}; start it with relayd serve")

    async def find(self, topic: str, given: str) -> str:
        """See `Admin`."""
        del topic
        return given

    async def wait_idle(self, worker_ids: list[str]) -> None:
        """See `Admin`."""


#: Topic -> the key of its rows, and further names that people use for them.
_NAMES = {"workers": ("worker_id", "name"), "clients": ("connection_id", "principal")}


def pick(rows: list[Row], topic: str, given: str) -> str:
    """Return the id of the row that `given` is the id, the name or the beginning of.

    Raises:
        ValueError: no row fits, or several do (`AmbiguousId`).
    """
    key, *names = _NAMES[topic]
    exact = [row for row in rows if given in (row.get(key), *(row.get(name) for name in names))]
    found = exact or [row for row in rows if given and str(row.get(key)).startswith(given)]
    if not found:
        there = ", ".join(str(row.get(key)) for row in rows[:MAX_TOLD]) or "none"
        raise ValueError(f"none of the {topic} is called {given!r}; connected: {there}")
    if len(found) > 1:
        told = {str(row[key]): ", ".join(str(row.get(name)) for name in ("state", *names)) for row in found[:MAX_TOLD]}
        raise AmbiguousId(given, topic.removesuffix("s"), len(found), told)
    return str(found[0][key])
