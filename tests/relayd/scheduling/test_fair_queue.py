from itertools import count

import attrs
from hypothesis import given
from hypothesis import strategies as st

from relayd.scheduling.fair_queue import FairQueue


@attrs.define(eq=False)
class Item:
    request_id: str
    principal: str = "ann"
    priority: int = 5
    ticket: int = 0


def queue_of(*items: Item) -> FairQueue[Item]:
    queue = FairQueue[Item]()
    for item in items:
        queue.push(item)
    return queue


def served(queue: FairQueue[Item]) -> str:
    names = ""
    while (item := queue.pop(lambda _: True)) is not None:
        names += item.request_id
    return names


def items(names: str, **fields: object) -> list[Item]:
    return [Item(name, ticket=ticket, **fields) for ticket, name in enumerate(names)]  # type: ignore[arg-type]


def test_one_principal_is_served_first_come_first_served() -> None:
    assert served(queue_of(*items("abcde"))) == "abcde"


def test_a_late_upload_stands_by_its_ticket() -> None:
    a, b, c = items("abc")
    assert served(queue_of(a, c, b)) == "abc"


def test_principals_take_turns() -> None:
    ann = items("abcd")
    bob = [Item("x", "bob", ticket=10), Item("y", "bob", ticket=11)]
    assert served(queue_of(*ann, *bob)) == "axbycd"


def test_a_turn_is_kept_over_pushes() -> None:
    queue = queue_of(Item("a", "ann", ticket=1), Item("b", "ann", ticket=2), Item("x", "bob", ticket=3))
    assert queue.pop(lambda _: True).request_id == "a"  # type: ignore[union-attr]
    queue.push(Item("c", "ann", ticket=4))
    assert served(queue) == "xbc"


def test_a_higher_priority_goes_first() -> None:
    assert served(queue_of(Item("l", priority=0), Item("m"), Item("h", priority=9))) == "hml"


def test_the_last_promoted_is_first_of_all() -> None:
    a, b, c, h = *items("abc"), Item("h", priority=9)
    queue = queue_of(a, b, c, h)
    queue.promote(b)
    queue.promote(c)
    assert served(queue) == "cbha"


def test_what_is_given_back_keeps_its_place_before_the_lanes() -> None:
    queue = queue_of(*items("abcd"))
    first, second = queue.pop(lambda _: True), queue.pop(lambda _: True)
    assert first is not None
    assert second is not None
    queue.requeue(second)
    queue.requeue(first)
    assert served(queue) == "abcd"


def test_who_may_not_run_is_passed_over_and_keeps_its_turn() -> None:
    queue = queue_of(*items("ab"), Item("x", "bob", ticket=9))
    assert queue.pop(lambda item: item.principal == "bob").request_id == "x"  # type: ignore[union-attr]
    assert queue.pop(lambda item: item.principal == "bob") is None
    assert served(queue) == "ab"


def test_only_the_head_of_a_lane_is_considered() -> None:
    queue = queue_of(*items("ab"))
    assert queue.pop(lambda item: item.request_id == "b") is None
    assert served(queue) == "ab"


def test_what_was_promoted_or_given_back_takes_nobodys_turn() -> None:
    queue = queue_of(*(a_to_d := items("abcd")), Item("x", "bob", ticket=9), Item("y", "bob", ticket=10))
    queue.promote(a_to_d[3])
    first, second = queue.pop(lambda _: True), queue.pop(lambda _: True)
    assert first is a_to_d[3]
    assert second is a_to_d[0]
    queue.requeue(second)
    assert queue.pop(lambda _: True) is second
    assert served(queue) == "xbyc"


def test_places_are_counted_over_all_that_is_served_before() -> None:
    back = items("abc")
    queue = queue_of(*back, *(Item(f"p{n}", ticket=10 + n) for n in range(2)), Item("h", priority=9, ticket=20))
    for item in back:
        assert queue.pop(lambda each, item=item: each is item) is item  # type: ignore[misc]
    for item in reversed(back):
        queue.requeue(item)
    for item in list(queue)[-2:]:
        queue.promote(item)
    assert [item.request_id for item in queue] == ["p1", "p0", "h", "a", "b", "c"]
    assert [queue.position(item) for item in queue] == [0, 1, 2, 3, 4, 5]


operations = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "push", "pop", "pop_but_ann", "remove", "promote", "back"]),
        st.sampled_from(["ann", "bob", "cid"]),
        st.sampled_from([0, 5, 9]),
        st.integers(0, 50),
    ),
    max_size=60,
)


@given(operations)
def test_it_counts_right_loses_nothing_and_serves_in_the_order_it_tells(steps: list[tuple[str, str, int, int]]) -> None:
    queue, waiting, tickets = FairQueue[Item](), dict[str, Item](), count()
    taken: list[Item] = []
    for step, principal, priority, choice in steps:
        picked = list(waiting.values())[choice % len(waiting)] if waiting else None
        if step == "push":
            ticket = next(tickets)
            item = Item(f"r{ticket}", principal, priority, ticket)
            waiting[item.request_id] = item
            queue.push(item)
        elif step == "pop":
            expected = next(iter(queue), None)
            item_or_none = queue.pop(lambda _: True)
            assert item_or_none is expected
            if item_or_none is not None:
                taken.append(waiting.pop(item_or_none.request_id))
        elif step == "pop_but_ann":
            item_or_none = queue.pop(lambda item: item.principal != "ann")
            if item_or_none is None:
                assert all(item.principal == "ann" for item in waiting.values())
            else:
                assert item_or_none.principal != "ann"
                taken.append(waiting.pop(item_or_none.request_id))
        elif step == "back" and taken:
            item = taken.pop()
            waiting[item.request_id] = item
            queue.requeue(item)
        elif step == "remove" and picked is not None:
            queue.remove(waiting.pop(picked.request_id))
        elif step == "promote" and picked is not None:
            queue.promote(picked)
            assert next(iter(queue)) is picked
        assert len(queue) == len(waiting)
        assert all(item in queue for item in waiting.values())
        for name in ("ann", "bob", "cid"):
            assert queue.count_for(name) == sum(item.principal == name for item in waiting.values())
        assert [queue.position(item) for item in queue] == list(range(len(queue)))
        candidates = list(queue.oldest_candidates())
        if waiting:
            assert min(waiting.values(), key=lambda item: item.ticket) in candidates
    told = [item.request_id for item in queue]
    assert sorted(told) == sorted(waiting)
    assert served(queue) == "".join(told)
    assert not list(queue)
    assert attrs.asdict(queue, recurse=False) == attrs.asdict(FairQueue[Item](), recurse=False), "it keeps nothing"


@given(st.lists(st.sampled_from("ab"), max_size=30), st.sets(st.integers(0, 29)))
def test_with_one_principal_and_priority_the_order_is_that_of_arrival(names: list[str], late: set[int]) -> None:
    all_items = [Item(f"{ticket},", ticket=ticket) for ticket in range(len(names))]
    on_time = [item for item in all_items if item.ticket not in late]
    queue = queue_of(*on_time, *(item for item in all_items if item.ticket in late))
    assert served(queue) == "".join(item.request_id for item in all_items)
