"""Which conversations there are: by principal, user and session. Pure."""

from collections import Counter

import attrs

from relayd.store.records import TalkRecord

#: User and session.
_Key = tuple[str, str]


@attrs.define(eq=False)
class TalkIndex:
    """The conversations, found only by their own principals."""

    _records: dict[str, dict[_Key, TalkRecord]] = attrs.field(factory=dict)
    _by_id: dict[str, TalkRecord] = attrs.field(factory=dict)
    #: Principal -> characters of the instructions of all of them.
    _chars: Counter[str] = attrs.field(factory=Counter)

    def __len__(self) -> int:
        return len(self._by_id)

    def count(self, principal: str) -> int:
        """Return how many a principal has."""
        return len(self._records.get(principal, {}))

    def instructions_chars(self, principal: str) -> int:
        """Return how many characters of instructions a principal has in all of them."""
        return self._chars[principal]

    def of(self, principal: str, user: str, session: str) -> TalkRecord | None:
        """Return the conversation of a session of one of a principal's users."""
        return self._records.get(principal, {}).get((user, session))

    def find(self, principal: str, name: str, user: str) -> TalkRecord | None:
        """Return one of a principal's conversations by its session and user, or by its id."""
        known = self.of(principal, user, name) or self._by_id.get(name)
        return known if known is not None and known.principal == principal else None

    def all_of(self, principal: str, user: str | None = None) -> list[TalkRecord]:
        """Return a principal's conversations, or those of one user; the one in which something was said last first."""
        records = self._records.get(principal, {}).values()
        found = [record for record in records if user is None or record.user == user]
        return sorted(found, key=lambda record: record.touched_at, reverse=True)

    def older_than(self, touched_at: float) -> list[TalkRecord]:
        """Return those in which nothing was said since then."""
        return [record for record in self._by_id.values() if record.touched_at < touched_at]

    def put(self, record: TalkRecord) -> None:
        """Add or replace a conversation."""
        records = self._records.setdefault(record.principal, {})
        known = records.get((record.user, record.session))
        self._chars[record.principal] += len(record.instructions) - len(known.instructions if known is not None else "")
        records[record.user, record.session] = self._by_id[record.talk_id] = record

    def remove(self, record: TalkRecord) -> None:
        """Forget a conversation."""
        records = self._records.get(record.principal, {})
        known = records.get((record.user, record.session))
        if known is not None and known.talk_id == record.talk_id:
            del records[record.user, record.session]
            self._chars[record.principal] -= len(known.instructions)
            if not records:
                del self._records[record.principal], self._chars[record.principal]
        self._by_id.pop(record.talk_id, None)
