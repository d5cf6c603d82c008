"""A scripted relay that stores live inputs by the rules, and asserts that the client keeps those that it must."""

from collections.abc import Callable
from contextlib import suppress

import attrs

from protocol.wire.codec import decode
from protocol.wire.errors import LinkError
from protocol.wire.messages import (
    FROM_OPERATOR,
    MAX_UNACKED_BYTES,
    Accepted,
    Attach,
    Cancel,
    Input,
    InputAck,
    InputInfo,
    Spaces,
    SpacesReply,
    Submit,
)
from protocol.wire.validators import Message, Value
from tests.support.scripted_relay import Connection, Script, frames


def send(connection: Connection, *messages: Message) -> None:
    """Send; a client that has gone may have left messages that are still to be read."""
    with suppress(LinkError):
        connection.send(*messages)


@attrs.define(eq=False)
class LiveRelay:
    """Stores live inputs over several connections, and completes the request once all have ended.

    Attributes:
        stored: name -> the bytes of that input.
        infos: of the submit.
        pieces: as they came, over all connections.
        cancels: likewise.
        submit: the latest.
        spaces: what it answers when it is asked for them.
        on_message: called after each piece and each cancel.
    """

    stored: dict[str, bytearray] = attrs.field(factory=dict)
    infos: dict[str, InputInfo] = attrs.field(factory=dict)
    pieces: list[Input] = attrs.field(factory=list)
    cancels: list[Cancel] = attrs.field(factory=list)
    submit: Submit | None = None
    spaces: list[dict[str, Value]] = attrs.field(factory=list)
    on_message: Callable[[], None] = lambda: None
    _ended: set[str] = attrs.field(factory=set)

    def script(self, cut_after: int | None = None, ack_every: int = 1, *, acks: bool = True) -> Script:
        """A script of a connection.

        Args:
            cut_after: cut it after so many pieces, before they are acknowledged.
            ack_every: acknowledge each so many pieces, and besides what ends an input or fills the window.
            acks: whether any are acknowledged, the first word included.
        """

        async def until_it_leaves(connection: Connection) -> None:
            with suppress(LinkError):  # gone before it has said anything
                await serve(connection)

        async def serve(connection: Connection) -> None:
            opened = decode(await connection.link.receive(), FROM_OPERATOR)
            while isinstance(opened, Spaces):
                send(connection, SpacesReply(spaces=self.spaces))
                opened = decode(await connection.link.receive(), FROM_OPERATOR)
            assert isinstance(opened, Submit | Attach)
            is_new = not self.infos
            if isinstance(opened, Submit):
                self.infos = dict(opened.inputs)
                self.submit = opened
                for name, info in self.infos.items():
                    if info.live:
                        self.stored.setdefault(name, bytearray())
            if cut_after == 0:
                await connection.cut()
                return
            send(connection, Accepted(request_id=opened.request_id))
            known = {name: len(data) for name, data in self.stored.items()}
            if acks:
                send(connection, *(self._ack(opened.request_id, name) for name in self.stored))
            self._complete_if_ended(connection, opened.request_id)
            told = dict(known)
            place = dict.fromkeys(known, 0) if is_new else {}
            count = 0
            async for data in connection.link:
                message = decode(data, FROM_OPERATOR)
                if isinstance(message, Cancel):
                    self.cancels.append(message)
                    self.on_message()
                    continue
                assert isinstance(message, Input), message
                self.pieces.append(message)
                count += 1
                name, end = message.name, message.offset + len(message.data)
                place.setdefault(name, min(message.offset, told[name]))
                begun = (place[name], told[name])
                assert message.offset in begun or not message.data, "a gap, or bytes sent twice over one link"
                assert message.offset <= max(begun), "a gap"
                assert end - told[name] <= MAX_UNACKED_BYTES
                place[name] = end
                mine = self.stored[name]
                assert mine[message.offset : end] == message.data[: len(mine) - message.offset]
                mine += message.data[max(0, len(mine) - message.offset) :]
                if message.last:
                    self._ended.add(name)
                self.on_message()
                if count == cut_after:
                    await connection.cut()
                    return
                if acks and (message.last or count % ack_every == 0 or end - told[name] == MAX_UNACKED_BYTES):
                    told[name] = len(mine)
                    send(connection, self._ack(opened.request_id, name))
                self._complete_if_ended(connection, opened.request_id)

        return until_it_leaves

    def _complete_if_ended(self, connection: Connection, request_id: str) -> None:
        if self._ended == set(self.stored):
            send(connection, *frames(request_id, b"\1\0" * 2_400))

    def _ack(self, request_id: str, name: str) -> InputAck:
        last = True if name in self._ended else None
        return InputAck(request_id=request_id, name=name, offset=len(self.stored[name]), last=last)
