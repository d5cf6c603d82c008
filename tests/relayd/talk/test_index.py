"""Which conversations there are: no principal ever gets another's, whatever names they choose."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from relayd.store.records import TalkRecord
from relayd.talk.index import TalkIndex

NAMES = st.sampled_from(["ann", "bob", "", "s1", "0", "1", "2", "3"])
WHO = st.sampled_from(["ann", "bob"])


class Indexing(RuleBasedStateMachine):
    """The index is compared with a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.index = TalkIndex()
        self.kept: list[TalkRecord] = []
        self.gone: list[TalkRecord] = []

    @rule(principal=WHO, user=NAMES, session=NAMES, at=st.integers(0, 9), told=st.sampled_from(["", "Be brief."]))
    def put(self, principal: str, user: str, session: str, at: int, told: str) -> None:
        known = self.index.of(principal, user, session)
        number = len(self.kept) + len(self.gone)
        talk_id = known.talk_id if known is not None else str(number)
        record = TalkRecord(
            talk_id=talk_id,
            principal=principal,
            user=user,
            session=session,
            instructions=told,
            created_at=0.0,
            touched_at=float(at),
        )
        self.kept = [each for each in self.kept if each.talk_id != talk_id] + [record]
        self.index.put(record)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if not (known := self.kept + self.gone):
            return
        record = data.draw(st.sampled_from(known))
        self.index.remove(record)
        self.gone += [each for each in self.kept if each.talk_id == record.talk_id]
        self.kept = [each for each in self.kept if each.talk_id != record.talk_id]

    @rule(principal=WHO, name=NAMES, user=NAMES)
    def find(self, principal: str, name: str, user: str) -> None:
        found = self.index.find(principal, name, user)
        if found is None:
            assert not [each for each in self.kept if each.principal == principal and each.talk_id == name]
        else:
            assert found in self.kept
            assert found.principal == principal
            assert (found.user, found.session) == (user, name) or found.talk_id == name

    @invariant()
    def each_principal_has_its_own(self) -> None:
        assert len(self.index) == len(self.kept)
        for principal in ("ann", "bob", "eve"):
            own = [each for each in self.kept if each.principal == principal]
            listed = self.index.all_of(principal)
            assert sorted(each.talk_id for each in listed) == sorted(each.talk_id for each in own)
            assert [each.touched_at for each in listed] == sorted((each.touched_at for each in own), reverse=True)
            assert self.index.count(principal) == len(own)
            assert self.index.instructions_chars(principal) == sum(len(each.instructions) for each in own)
        assert {each.talk_id for each in self.index.older_than(5.0)} == {
            each.talk_id for each in self.kept if each.touched_at < 5.0
        }


TestIndexing: Any = Indexing.TestCase
TestIndexing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
