"""A store in memory, for tests, demos, and relays whose requests need not survive a restart."""

import attrs
import trio

from protocol.wire.messages import LIVE_STATES
from relayd.store.base import Store
from relayd.store.records import (
    AppendInput,
    Change,
    ClearInput,
    DeleteDrain,
    DeleteInvite,
    DeleteRequest,
    DeleteSession,
    DeleteSpace,
    DeleteTalk,
    DeleteToken,
    DeleteTurns,
    DeleteWorker,
    InviteRecord,
    Loaded,
    PutDrain,
    PutHeard,
    PutInvite,
    PutRequest,
    PutSession,
    PutSpace,
    PutTalk,
    PutToken,
    PutTurn,
    PutUptime,
    PutUser,
    PutWorker,
    RequestRecord,
    SessionRecord,
    SpaceRecord,
    StoredInput,
    TalkRecord,
    TokenRecord,
    TurnRecord,
    UpdateRequest,
    UserRecord,
)


class MemoryStore(Store):
    """A store without durability: every change is applied during the call."""

    def __init__(self) -> None:
        super().__init__()
        self._spaces: dict[str, SpaceRecord] = {}
        self._tokens: dict[str, TokenRecord] = {}
        self._users: dict[str, UserRecord] = {}
        self._sessions: dict[str, SessionRecord] = {}
        self._invites: dict[str, InviteRecord] = {}
        self._requests: dict[str, RequestRecord] = {}
        self._inputs: dict[str, dict[str, bytes]] = {}
        self._live_inputs: dict[str, dict[str, bytearray]] = {}
        self._ended_inputs: set[tuple[str, str]] = set()
        self._drains: dict[str, bool] = {}
        self._workers: dict[tuple[str, str], None] = {}
        self._talks: dict[str, TalkRecord] = {}
        self._turns: dict[str, dict[int, TurnRecord]] = {}
        self._uptime_s = 0.0

    async def load(self) -> Loaded:
        """See `Store.load`."""
        await trio.lowlevel.checkpoint()
        return Loaded(
            spaces=tuple(sorted(self._spaces.values(), key=lambda record: record.name)),
            tokens=tuple(sorted(self._tokens.values(), key=lambda record: (record.created_at, record.token_id))),
            users=tuple(sorted(self._users.values(), key=lambda record: (record.created_at, record.user_id))),
            sessions=tuple(sorted(self._sessions.values(), key=lambda record: (record.created_at, record.session_id))),
            invites=tuple(sorted(self._invites.values(), key=lambda record: (record.created_at, record.invite_id))),
            requests=tuple(sorted(self._requests.values(), key=lambda record: record.ticket)),
            live_inputs={
                request_id: {
                    name: StoredInput(len(data), (request_id, name) in self._ended_inputs)
                    for name, data in each.items()
                }
                for request_id, each in self._live_inputs.items()
            },
            drains=tuple(self._drains.items()),
            workers=tuple(self._workers),
            uptime_s=self._uptime_s,
            talks=tuple(sorted(self._talks.values(), key=lambda record: (record.created_at, record.talk_id))),
            unended_turns=tuple(
                turn for talk_id in sorted(self._turns) for turn in self._turns_of(talk_id) if not turn.ended
            ),
        )

    async def commit(self, *changes: Change) -> None:
        """See `Store.commit`; the changes are applied before the checkpoint, so also if it is cancelled."""
        self.post(*changes)
        await trio.lowlevel.checkpoint()

    def post(self, *changes: Change) -> None:
        """See `Store.post`."""
        for change in changes:
            self._apply(change)

    def _apply(self, change: Change) -> None:
        match change:
            case PutSpace(record):
                self._spaces[record.name] = record
            case DeleteSpace(name):
                self._spaces.pop(name, None)
            case PutToken(token):
                self._tokens[token.token_id] = token
            case DeleteToken(token_id):
                self._tokens.pop(token_id, None)
            case PutUser(user):
                same = [each.user_id for each in self._users.values() if each.name.lower() == user.name.lower()]
                for user_id in same:
                    del self._users[user_id]
                self._users[user.user_id] = user
            case PutSession(session):
                self._sessions[session.session_id] = session
            case DeleteSession(session_id):
                self._sessions.pop(session_id, None)
            case PutInvite(invite):
                self._invites[invite.invite_id] = invite
            case DeleteInvite(invite_id):
                self._invites.pop(invite_id, None)
            case PutRequest(request, inputs):
                self._drop_inputs(request.request_id)
                self._requests[request.request_id] = request
                self._inputs[request.request_id] = {name: bytes(data) for name, data in inputs.items()}
            case AppendInput(request_id=request_id, name=name):
                known = self._requests.get(request_id)
                if known is not None and known.state in LIVE_STATES:
                    self._live_inputs.setdefault(request_id, {}).setdefault(name, bytearray()).extend(change.data)
                    if change.last:
                        self._ended_inputs.add((request_id, name))
            case ClearInput(request_id, name):
                self._live_inputs.get(request_id, {}).pop(name, None)
                self._ended_inputs.discard((request_id, name))
            case UpdateRequest(request_id=request_id):
                if known := self._requests.get(request_id):
                    self._requests[request_id] = attrs.evolve(known, **change.fields())
                    if change.ends:
                        self._drop_inputs(request_id)
            case DeleteRequest(request_id):
                self._requests.pop(request_id, None)
                self._drop_inputs(request_id)
            case PutDrain(worker_id, cordon):
                self._drains[worker_id] = cordon
            case DeleteDrain(worker_id):
                self._drains.pop(worker_id, None)
            case PutWorker(worker_id, space):
                self._workers[worker_id, space] = None
            case DeleteWorker(worker_id):
                self._workers = {key: None for key in self._workers if key[0] != worker_id}
            case PutTalk(talk):
                self._talks[talk.talk_id] = talk
            case DeleteTalk(talk_id):
                self._talks.pop(talk_id, None)
                self._turns.pop(talk_id, None)
            case PutTurn(turn):
                if turn.talk_id in self._talks:
                    self._turns.setdefault(turn.talk_id, {})[turn.number] = turn
            case PutHeard(talk_id, number, heard_chars):
                turns = self._turns.get(talk_id, {})
                if number in turns:
                    turns[number] = attrs.evolve(turns[number], heard_chars=heard_chars)
            case DeleteTurns(talk_id, first, last):
                turns = self._turns.get(talk_id, {})
                for number in [number for number in turns if first <= number <= last]:
                    del turns[number]
            case PutUptime(uptime_s):
                self._uptime_s = uptime_s

    def _drop_inputs(self, request_id: str) -> None:
        self._inputs.pop(request_id, None)
        for name in self._live_inputs.pop(request_id, ()):
            self._ended_inputs.discard((request_id, name))

    def _turns_of(self, talk_id: str) -> tuple[TurnRecord, ...]:
        return tuple(turn for _, turn in sorted(self._turns.get(talk_id, {}).items()))

    async def read_turns(self, talk_id: str) -> tuple[TurnRecord, ...]:
        """See `Store.read_turns`."""
        await trio.lowlevel.checkpoint()
        return self._turns_of(talk_id)

    async def flush(self) -> None:
        """See `Store.flush`; nothing is ever queued."""
        await trio.lowlevel.checkpoint()

    async def read_input(self, request_id: str, name: str) -> bytes:
        """See `Store.read_input`."""
        await trio.lowlevel.checkpoint()
        return self._inputs[request_id][name]

    async def read_live_input(self, request_id: str, name: str, offset: int, most: int) -> bytes:
        """See `Store.read_live_input`."""
        await trio.lowlevel.checkpoint()
        return bytes(self._live_inputs.get(request_id, {}).get(name, b"")[offset : offset + most])
