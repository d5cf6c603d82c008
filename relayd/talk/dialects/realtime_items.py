"""The items of a Realtime conversation: messages, each of which is a turn."""

from typing import Any

import attrs

from protocol.wire.messages import Rejected
from protocol.wire.validators import Value, array_of, choice, mapping, text
from relayd.http.errors import STATUS
from relayd.store.records import TurnRecord
from relayd.talk.conversation import TurnState, played_content
from relayd.talk.dialects.realtime_events import (
    INVALID,
    REQUIRED,
    SERVER,
    EventError,
    Json,
    content_json,
    item_json,
    new_id,
    read_field,
)
from relayd.talk.talks import Talk, Talks

MAX_ID_CHARS = 64
MAX_MESSAGE_CHARS = 2**20
#: So many items are known before those are forgotten whose turns are no longer kept.
MIN_ITEMS = 1_000
_STATUS: dict[str, str] = {
    TurnState.DONE: "completed",
    TurnState.INTERRUPTED: "incomplete",
    TurnState.FAILED: "incomplete",
}
#: Where a part of each type has its text.
_TEXTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "output_audio": "transcript",
    "audio": "transcript",
}
_text = text(MAX_MESSAGE_CHARS)


def refusal_of(rejected: Rejected) -> EventError:
    """Return the error that says why something is refused."""
    kind = SERVER if STATUS.get(rejected.code, 400) >= 500 else INVALID
    return EventError(str(rejected.code), rejected.message, kind=kind)


async def settle(talks: Talks) -> None:
    """Wait until what was changed is stored.

    Raises:
        EventError: it cannot be.
    """
    if (refused := await talks.settle()) is not None:
        raise refusal_of(refused)


@attrs.frozen
class Message:
    """A message that a client adds."""

    item_id: str
    role: str
    text: str


def parse_message(fields: Json, path: str = "item.") -> Message:
    """Parse an item of a client.

    Raises:
        EventError: it is no message, or has something besides text.
    """
    kind = read_field(fields, "type", text(MAX_ID_CHARS), "message", path)
    if kind != "message":
        raise EventError("unsupported", f"{path}type must be 'message', not {kind!r}", f"{path}type")
    role = read_field(fields, "role", choice("user", "assistant", "system"), REQUIRED, path)
    parts = read_field(fields, "content", array_of(mapping, 1), REQUIRED, path)
    texts = [_text_of(part, f"{path}content[{index}].") for index, part in enumerate(parts)]
    item_id = read_field(fields, "id", _item_id, None, path)
    return Message(item_id or new_id("item"), role, "\n".join(texts))


def _text_of(part: Json, path: str) -> str:
    kind = read_field(part, "type", text(MAX_ID_CHARS), REQUIRED, path)
    if kind not in _TEXTS:
        message = f"{path}type must be 'input_text', not {kind!r}: only text is read"
        raise EventError("unsupported", message, f"{path}type")
    found: str = read_field(part, _TEXTS[kind], _text, REQUIRED, path)
    return found


def _item_id(value: Value) -> None:
    text(MAX_ID_CHARS)(value)
    if not value.isprintable() or not value:
        raise ValueError("must have printable characters")


@attrs.define(eq=False)
class Item:
    """A message of the conversation.

    Args:
        number: of its turn; below 0 while it is not understood what was said.
        spoken: whether it has audio, or had.
    """

    item_id: str
    role: str
    number: int
    spoken: bool = False
    #: Of its speech as it was made, and of what was sent of it; 0 if nothing is known of it.
    rate: int = 0
    samples: int = 0
    sent_s: float = 0.0
    speed: float = 1.0
    truncated: bool = False

    @property
    def is_pending(self) -> bool:
        """Whether it is not understood yet what was said."""
        return self.number < 0

    def samples_until(self, end_ms: int) -> int:
        """Return how many samples were made of what plays until then."""
        if end_ms >= int(self.sent_s * 1000):
            return self.samples
        return int(end_ms * self.rate * self.speed / 1000)


@attrs.define(eq=False)
class Items:
    """The items that a client knows of, in the order in which it was told."""

    talk: Talk
    _by_id: dict[str, Item] = attrs.field(factory=dict)
    #: With more of them, it is looked for which turns are no longer kept.
    _most: int = MIN_ITEMS

    @property
    def last_id(self) -> str | None:
        """The id of the last one."""
        return next(reversed(self._by_id), None)

    def restore(self) -> list[tuple[str | None, Json]]:
        """Know the turns of a conversation that was there before; returns them, each with the id of the one before."""
        restored = []
        for turn in self.talk.turns:
            if turn.ended and turn.content:
                item_id = f"item_{self.talk.talk_id[:16]}_{turn.number}"
                previous = self.last_id
                item = self.add(Item(item_id, turn.role, turn.number, spoken=turn.speech_request is not None))
                restored.append((previous, self.json(item)))
        return restored

    def add(self, item: Item) -> Item:
        """Know one more."""
        self._by_id[item.item_id] = item
        if len(self._by_id) > self._most:
            kept = {turn.number for turn in self.talk.turns}
            self._by_id = {each: item for each, item in self._by_id.items() if item.number in kept or item.is_pending}
            self._most = MIN_ITEMS + 2 * len(self._by_id)
        return item

    def forget(self, item: Item) -> None:
        """Know one no longer."""
        self._by_id.pop(item.item_id, None)

    async def create(self, message: Message, previous_id: str | None) -> Item:
        """Add a message of the client to the conversation.

        Raises:
            EventError: there is one with its id; it would not be the last one; or it is refused.
        """
        if message.item_id in self._by_id:
            raise EventError("item_already_exists", f"there is an item {message.item_id!r}; give another id", "item.id")
        if previous_id not in (None, self.last_id) and not (previous_id == "root" and not self._by_id):
            text = "items are added at the end; leave out previous_item_id"
            raise EventError("unsupported", text, "previous_item_id")
        turn = await self.talk.add(message.role, message.text)
        if isinstance(turn, Rejected):
            raise refusal_of(turn)
        return self.add(Item(message.item_id, message.role, turn.number))

    def find(self, event: Json) -> Item:
        """Return the item that an event names.

        Raises:
            EventError: it names none.
        """
        kind = str(event["type"]).rpartition(".")[2]
        item_id = read_field(event, "item_id", text(MAX_MESSAGE_CHARS), REQUIRED)
        item = self._by_id.get(item_id)
        if item is None or self._turn(item) is None:
            what = f"there is no item {item_id[:MAX_ID_CHARS]!r} in this conversation"
            raise EventError(f"item_{kind}_invalid_item_id", what, "item_id")
        return item

    def delete(self, item: Item) -> None:
        """Delete one from the conversation.

        Raises:
            EventError: it is being made.
        """
        if not self.talk.delete_turn(item.number):
            raise EventError("item_in_progress", "this item is being made; cancel its response first", "item_id")
        self.forget(item)

    def _turn(self, item: Item) -> TurnRecord | None:
        return self.talk.turn(item.number)

    def message_of(self, item: Item) -> tuple[str, str]:
        """Return its role, and what was said or heard of it."""
        turn = self._turn(item)
        return item.role, "" if turn is None else played_content(turn)

    def json(self, item: Item) -> Json:
        """Return an item as it is now."""
        turn = self._turn(item)
        content: Any = None
        if turn is not None and (turn.ended or turn.content):
            said = turn.content if turn.heard_chars is None else turn.content[: turn.heard_chars]
            content = content_json(item.role, said, spoken=item.spoken)
        status = "completed" if turn is None or turn.role != "assistant" else _STATUS.get(turn.state, "in_progress")
        return item_json(item.item_id, item.role, status, content)
