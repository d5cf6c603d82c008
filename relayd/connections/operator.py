"""An operator's connection: that of a client, with `watch` and `steer` in addition."""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar

import attrs
import structlog
import trio

from protocol.log_lines import redacted
from protocol.wire.errors import ErrorCode
from protocol.wire.messages import FROM_OPERATOR, ROLES, Done, Rejected, Steer, Table, Watch
from protocol.wire.validators import Value
from relayd.auth.tokens import TokenRegistry, parse_expires, parse_limits, reject_readonly
from relayd.connections.client import ClientHandler
from relayd.core.accounts import Accounts
from relayd.core.space import Space
from relayd.core.space_rules import check_changed_space, check_new_space, refuse_configured
from relayd.requests.request import Request
from relayd.scheduling.scheduler import no_such_space
from relayd.store.base import StoreError
from relayd.store.records import DeleteSpace, PutSpace, PutToken
from relayd.views.request_detail import request_detail
from relayd.views.rows import pages
from relayd.views.token_rows import token_row
from relayd.views.watch import WatchFeed

log = structlog.get_logger("relayd.operator")

#: Timeout of one action and its commit.
ACTION_TIMEOUT_S = 10.0
Answer = dict[str, Value] | Rejected
#: Actions that change nothing: allowed to read-only operators, and not audited.
READ_ONLY_ACTIONS = frozenset({"describe", "list_tokens", "list_users"})
#: Actions that hold at once, and are answered when the store has them: `done` must outlive a relay that is killed.
STORED_ACTIONS = frozenset(
    {
        *("cancel", "promote", "pause_space", "resume_space", "change_space", "revoke_token", "drain_worker"),
        *("cordon_worker", "undrain_worker", "end_talk"),
    }
)
NOT_STORED = (
    "the action holds, but is not stored: a relay that is started again before its disk takes it has forgotten it"
)
MAX_AUDIT_CHARS = 300


@attrs.define(eq=False)
class OperatorHandler(ClientHandler):
    """One connection of an operator, which can do what a client can, and `watch` and `steer`.

    Args:
        tokens: the relay's tokens.
        accounts: its users.
        nursery: the nursery of the connection, for its tasks.
        drain: begins the daemon's drain, with the reason for the log.
    """

    accepted_types: ClassVar[Table] = FROM_OPERATOR

    tokens: TokenRegistry = attrs.field(kw_only=True)
    accounts: Accounts = attrs.field(kw_only=True)
    nursery: trio.Nursery = attrs.field(kw_only=True)
    drain: Callable[[str], None] = attrs.field(kw_only=True)
    _watching: WatchFeed | None = attrs.field(default=None, init=False)

    def close(self) -> None:
        """Stop watching, and release everything that the connection holds, after its link has ended."""
        if self._watching is not None:
            self.relay.watchers.discard(self._watching)
            self._watching = None
        super().close()

    def _watch(self, watch: Watch) -> None:
        if self._watching is None:
            self._watching = WatchFeed(self, self.relay)
            self.relay.watchers.add(self._watching)
            self.nursery.start_soon(self._watching.serve)
        self._watching.begin(watch.topics)

    # -- steering

    def _steer(self, steer: Steer) -> None:
        self.nursery.start_soon(self._carry_out, steer)

    async def _carry_out(self, steer: Steer) -> None:
        """Carry out an action, and answer.

        Cancellation:
            Shielded, for at most `ACTION_TIMEOUT_S`: if a token revokes itself or the operator disconnects, a change in
            memory must still reach the store.
        """
        with trio.CancelScope(shield=True):
            answer = await self._answer(steer)
        if isinstance(answer, Rejected):
            self.send(attrs.evolve(answer, request_id=steer.steer_id or None))
        else:
            self.send(Done(steer_id=steer.steer_id, action=steer.action, target=steer.target, data=answer))

    async def _answer(self, steer: Steer) -> Answer:
        action = ACTIONS.get(steer.action)
        principal = self.principal
        answer: Answer
        if action is None:
            answer = _invalid(f"steer action {steer.action!r} is unknown; known actions: {', '.join(ACTIONS)}")
        elif principal.readonly and steer.action not in READ_ONLY_ACTIONS:
            answer = reject_readonly()
            self._audit(steer, answer)
        else:
            try:
                with trio.fail_after(ACTION_TIMEOUT_S):
                    answer = await action(self, steer)
                    if steer.action in STORED_ACTIONS and not isinstance(answer, Rejected):
                        await self._store(steer.target)
            except StoreError as fault:
                answer = Rejected.because(fault.code, str(fault))
            except trio.TooSlowError:
                message = f"the disk has not answered for {ACTION_TIMEOUT_S:g} s; {NOT_STORED}"
                answer = Rejected.because(ErrorCode.STORAGE_FULL, message)
            if steer.action not in READ_ONLY_ACTIONS:
                self._audit(steer, answer)
        return answer

    async def _store(self, target: str) -> None:
        """Wait until what an action has changed is in the store.

        Raises:
            StoreError: the disk cannot store it now; it will be tried again.
        """
        request = self.relay.requests.get(target)
        try:
            if request is not None and request.uploaded:
                await self.relay.store.commit(self.relay.status_update(request))
            else:
                await self.relay.store.flush()
        except StoreError as fault:
            raise type(fault)(f"{fault}; {NOT_STORED}") from fault

    def _audit(self, steer: Steer, answer: Answer) -> None:
        """Record an action and its outcome in the log and in the `audit` topic."""
        outcome, message = (answer.code, answer.message) if isinstance(answer, Rejected) else ("done", "")
        by = self.principal.name
        log.warning("operator action", action=steer.action, target=steer.target, by=by, answer=str(outcome))
        self.relay.audit.add(
            {
                "principal": by,
                "connection_id": self.connection_id,
                "peer": self.link.peer,
                "action": steer.action,
                "target": redacted(steer.target),
                "outcome": str(outcome),
                "message": redacted(message)[:MAX_AUDIT_CHARS],
            }
        )

    async def _describe(self, steer: Steer) -> Answer:
        request = self._request(steer.target)
        if isinstance(request, Rejected):
            return request
        return await self.relay.finalizer.wait_safe(request) or request_detail(self.relay, request)

    def _request(self, request_id: str) -> Request | Rejected:
        request = self.relay.requests.get(request_id)
        return request or Rejected.because(ErrorCode.REQUEST_NOT_FOUND, f"request {request_id} is unknown")

    async def _cancel_request(self, steer: Steer) -> Answer:
        request = self._request(steer.target)
        if isinstance(request, Rejected):
            return request
        for each in self.relay.cancel_group(request, f"cancelled by operator {self.principal.name}"):
            await self._store(each.request_id)
        return {"state": str(request.entry.state)}

    async def _promote(self, steer: Steer) -> Answer:
        if refusal := self.relay.scheduler.promote(steer.target):
            return refusal
        self.relay.save_status(self.relay.requests[steer.target])
        self.relay.apply([])  # the positions have changed
        return {}

    async def _drain_worker(self, steer: Steer) -> Answer:
        if steer.target not in self.relay.workers:
            return self._no_worker(steer.target)
        self.relay.workers.drain_by_operator(steer.target, f"drained by operator {self.principal.name}")
        return {}

    async def _cordon_worker(self, steer: Steer) -> Answer:
        if steer.target not in self.relay.workers:
            return self._no_worker(steer.target)
        self.relay.workers.cordon(steer.target)
        return {}

    async def _undrain_worker(self, steer: Steer) -> Answer:
        port = self.relay.workers.get(steer.target)
        if port is None:
            return self._no_worker(steer.target)
        port.undrain()
        self.relay.workers.undrain(steer.target)
        return {}

    def _no_worker(self, worker_id: str) -> Rejected:
        known = ", ".join(sorted(self.relay.workers)) or "none"
        return _invalid(f"worker {worker_id!r} is not connected; connected: {known}")

    async def _pause_space(self, steer: Steer) -> Answer:
        return self.relay.spaces.set_paused(steer.target, True) or {}

    async def _resume_space(self, steer: Steer) -> Answer:
        return self.relay.spaces.set_paused(steer.target, False) or {}

    async def _create_space(self, steer: Steer) -> Answer:
        name = steer.target
        config = check_new_space(name, steer.options, self.relay.spaces)
        if isinstance(config, Rejected):
            return config
        space = Space(name=name, config=config)
        await self.relay.spaces.open(space)
        try:
            await self.relay.store.commit(PutSpace(self.relay.spaces.record(space)))
        except StoreError:
            self.relay.spaces.close(name)
            raise
        return {}

    async def _change_space(self, steer: Steer) -> Answer:
        space = self.relay.spaces.get(steer.target)
        if space is None:
            return no_such_space(steer.target, operator=True, known=self.relay.spaces)
        if not steer.options:
            return {"settings": space.config.to_map(), "made_by": space.made_by}
        config = check_changed_space(self.relay.spaces.record(space), steer.options)
        if isinstance(config, Rejected):
            return config
        self.relay.spaces.change(space, config)
        return {"settings": config.to_map(), "made_by": space.made_by}

    async def _delete_space(self, steer: Steer) -> Answer:
        space = self.relay.spaces.get(steer.target)
        if space is not None and space.made_by == "config":
            return refuse_configured(space.name)
        if refusal := self.relay.spaces.close(steer.target):
            return refusal
        try:
            await self.relay.store.commit(DeleteSpace(steer.target))
        except StoreError:
            assert space is not None  # it has just been closed
            await self.relay.spaces.open(Space(name=space.name, config=space.config))
            raise
        return {}

    async def _create_token(self, steer: Steer) -> Answer:
        options, now = steer.options, time.time()
        spaces = options.get("spaces", [])
        role, expires, readonly = options.get("role"), options.get("expires"), options.get("readonly", False)
        texts = isinstance(spaces, list) and all(isinstance(one, str) for one in spaces)
        if role not in ROLES or not texts or not isinstance(readonly, bool):
            return _invalid(
                "create_token needs role (client, worker or operator); optional: spaces (array of patterns), expires, "
                "readonly (boolean)"
            )
        try:
            limits = parse_limits(options.get("limits", {}))
            expires_at = parse_expires(str(expires), now) if expires is not None else None
            token = self.tokens.create(
                role=role,
                name=steer.target,
                now=now,
                spaces=spaces,
                expires_at=expires_at,
                limits=limits,
                readonly=readonly,
            )
        except ValueError as fault:
            return _invalid(str(fault))
        try:
            await self.relay.store.commit(PutToken(token.record))
        except StoreError:
            self.tokens.forget(token.record.token_id)
            raise
        return {"token": token.text, "token_id": token.record.token_id}

    async def _list_tokens(self, steer: Steer) -> Answer:
        rows = [token_row(record, time.time()) for record in self.tokens.list()]
        page, more = _page_behind(rows, "token_id", steer)
        return {"tokens": page, "more": more}

    async def _revoke_token(self, steer: Steer) -> Answer:
        revoked = self.tokens.revoke(steer.target, time.time())
        if not revoked:
            return _invalid(f"no live token has the id or the principal {steer.target!r}; see relayd token list")
        ids = {record.token_id for record in revoked}
        for connection in list(self.relay.connections.values()):
            if connection.principal.token_id in ids:
                connection.disconnect("its token was revoked")
        self.relay.store.post(*map(PutToken, revoked))
        return {"revoked": sorted(ids)}

    async def _create_user(self, steer: Steer) -> Answer:
        role, password = steer.options.get("role", "client"), steer.options.get("password", "")
        if not isinstance(role, str) or not isinstance(password, str):
            return _invalid("create_user: role and password must be strings")
        return await self.accounts.create_user(steer.target, role, password)

    async def _list_users(self, steer: Steer) -> Answer:
        page, more = _page_behind(self.accounts.users.rows(time.time()), "id", steer)
        return {"users": page, "more": more}

    async def _set_user_password(self, steer: Steer) -> Answer:
        return await self.accounts.set_password(steer.target, str(steer.options.get("password", "")))

    async def _set_user_role(self, steer: Steer) -> Answer:
        return await self.accounts.set_role(steer.target, str(steer.options.get("role", "")))

    async def _remove_user(self, steer: Steer) -> Answer:
        return await self.accounts.remove(steer.target)

    async def _create_invite(self, steer: Steer) -> Answer:
        expires = steer.options.get("expires")
        role = str(steer.options.get("role", "client"))
        return await self.accounts.invite(role, None if expires is None else str(expires))

    async def _end_talk(self, steer: Steer) -> Answer:
        talks, reason = self.relay.talks, f"ended by operator {self.principal.name}"
        replies = await talks.end_replies(steer.target, reason) if talks is not None else None
        if replies is None:
            message = f"no conversation {steer.target!r} is in use; watch the topic talks for those that are"
            return Rejected.because(ErrorCode.REQUEST_NOT_FOUND, message)
        return {"replies": replies}

    async def _disconnect(self, steer: Steer) -> Answer:
        connection = self.relay.connections.get(steer.target)
        if connection is None:
            return _invalid(f"connection {steer.target!r} does not exist")
        connection.disconnect(f"disconnected by operator {self.principal.name}")
        return {}

    async def _drain(self, steer: Steer) -> Answer:
        self.drain(f"requested by operator {self.principal.name}")
        return {"running": self.relay.running_count}


OperatorHandler.handlers = {
    **ClientHandler.handlers,
    Watch: OperatorHandler._watch,
    Steer: OperatorHandler._steer,
}

ACTIONS: Mapping[str, Callable[[OperatorHandler, Steer], Awaitable[Answer]]] = {
    "cancel": OperatorHandler._cancel_request,
    "promote": OperatorHandler._promote,
    "drain_worker": OperatorHandler._drain_worker,
    "cordon_worker": OperatorHandler._cordon_worker,
    "undrain_worker": OperatorHandler._undrain_worker,
    "pause_space": OperatorHandler._pause_space,
    "resume_space": OperatorHandler._resume_space,
    "create_space": OperatorHandler._create_space,
    "change_space": OperatorHandler._change_space,
    "delete_space": OperatorHandler._delete_space,
    "create_token": OperatorHandler._create_token,
    "list_tokens": OperatorHandler._list_tokens,
    "revoke_token": OperatorHandler._revoke_token,
    "create_user": OperatorHandler._create_user,
    "list_users": OperatorHandler._list_users,
    "set_user_password": OperatorHandler._set_user_password,
    "set_user_role": OperatorHandler._set_user_role,
    "remove_user": OperatorHandler._remove_user,
    "create_invite": OperatorHandler._create_invite,
    "end_talk": OperatorHandler._end_talk,
    "disconnect": OperatorHandler._disconnect,
    "describe": OperatorHandler._describe,
    "drain": OperatorHandler._drain,
}


def _page_behind(rows: list[dict[str, Any]], key: str, steer: Steer) -> tuple[list[dict[str, Any]], bool]:
    """The rows behind the one that the option `after` names, as many as a message takes; and whether there are more."""
    keys, after = [row[key] for row in rows], steer.options.get("after")
    return next(iter(pages(rows[keys.index(after) + 1 if after in keys else 0 :])))


def _invalid(message: str) -> Rejected:
    return Rejected.because(ErrorCode.INVALID_PARAMS, message)
