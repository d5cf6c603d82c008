"""Engine `eliza`: its replies, what it knows of a conversation, and how it puts them out."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from gpuworker.engines.base import Chunk, EngineInput, FormatChunk, OptionError, OutputChunk
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.eliza.engine import ElizaEngine
from gpuworker.engines.eliza.reply import pieces, reply
from gpuworker.engines.eliza.rules import CHINESE, ENGLISH
from gpuworker.engines.language import MAX_MESSAGES, ROLES, Message
from gpuworker.slots.process_slot import EngineHost, ProcessSlot
from gpuworker.slots.run_engine import RunResult, run_engine
from gpuworker.slots.slot import Job
from protocol.wire.params_schema import check_params, check_schema
from protocol.wire.validators import Value

PATIENCE_S = 20.0


def conversation(*said: str) -> list[Message]:
    """User and assistant in turns, the user first."""
    return [Message("assistant" if at % 2 else "user", text) for at, text in enumerate(said)]


def wire(messages: list[Message]) -> list[Value]:
    return [{"role": message.role, "content": message.content} for message in messages]


def loaded(*options: str) -> ElizaEngine:
    engine = ElizaEngine(parse_options(ElizaEngine.OPTIONS, options))
    engine.load()
    return engine


@pytest.fixture(scope="module")
def engine() -> ElizaEngine:
    return loaded("pace_ms=0")


def run(
    engine: ElizaEngine,
    *said: str,
    cancelled: Callable[[], bool] = lambda: False,
    data: bytes | None = None,
    **params: Any,
) -> tuple[RunResult, list[Chunk]]:
    if said:
        params["messages"] = wire(conversation(*said))
        assert not check_params(engine.capabilities.params, params)
    inputs = {} if data is None else {"messages": EngineInput(data, "application/json")}
    chunks: list[Chunk] = []
    return run_engine(engine, params, inputs, cancelled, chunks.append), chunks


def words(chunks: list[Chunk]) -> list[str]:
    return [chunk.data for chunk in chunks if isinstance(chunk, OutputChunk) and isinstance(chunk.data, str)]


def last(chunks: list[Chunk]) -> Any:
    end = chunks[-1]
    assert isinstance(end, OutputChunk)
    return end.data


# -- what it says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (("My number is 4711.", "…", "What number did I tell you?"), "You told me the number 4711."),
        (("Keep 17 in mind.", "…", "I have a dog.", "…", "Which number did I tell you?"), "You told me the number 17."),
        (("My number is 5.", "…", "I am 30 years old.", "…", "what is my number?"), "You told me the number 5."),
        (("It is late.", "…", "What number did I tell you?"), "You have not told me a number yet."),
        (("My name is Anna Lee.", "…", "What's my name?"), "You said that your name is Anna Lee."),
        (("Call me Ishmael.", "…", "Who am I?"), "You said that your name is Ishmael."),
        (
            ("My favourite colour is dark blue.", "…", "Do you remember my favourite colour?"),
            "You said that your favourite colour is dark blue.",
        ),
        (("My cat is grey.", "…", "My cat is black.", "…", "What is my cat?"), "You said that your cat is black."),
        (("Hello.", "…", "Where is my key?"), "You have not told me your key yet."),
        (("One.", "…", "Two.", "…", "What did I just say?"), 'You said: "Two".'),
        (("One.", "…", "Two.", "…", "What did I say first?"), 'You said: "One".'),
        (("What did I say?",), "You have not said anything before that."),
        (("Please count to 5.",), "1, 2, 3, 4, 5."),
        (("Tell me a story!",), ENGLISH.story),
        (("我的数字是42。", "…", "我刚才告诉你的数字是多少？"), "你刚才说的数字是42。"),
        (("我的数字是四十二", "…", "你记得我的数字吗"), "你刚才说的数字是四十二。"),
        (("我叫小明。", "…", "我叫什么？"), "你刚才说，你的名字是小明。"),
        (("我的猫叫花花。", "…", "我的猫叫什么？"), "你刚才说，你的猫是花花。"),
        (("你好", "…", "我的钥匙在哪里？"), "你还没有告诉我你的钥匙。"),
        (("我喜欢猫", "…", "我刚才说了什么？"), "你刚才说“我喜欢猫”。"),
        (("数到3",), "1，2，3。"),
        (("讲个故事吧",), CHINESE.story),
    ],
)
def test_it_knows_what_was_said_and_does_what_is_asked(said: tuple[str, ...], answer: str) -> None:
    for seed in (0, 1, 2**40):
        assert reply(conversation(*said), seed) == answer


@pytest.mark.parametrize(
    ("said", "caught"),
    [
        ("I need you to call my mother", "call your mother"),
        ("I think that you are right", "I am right"),
        ("I want to be yours", "be mine"),
        ("I remember you", "me"),
        ("我想和你去北京", "和我去北京"),
        ("我需要我的书", "你的书"),
    ],
)
def test_what_it_takes_up_is_said_from_its_own_side(said: str, caught: str) -> None:
    replies = {reply(conversation(said), seed) for seed in range(40)}
    assert any(caught in text for text in replies)
    assert len(replies) > 1  # the seed chooses


def test_it_answers_in_the_language_of_the_newest_words() -> None:
    assert reply(conversation("Hello", "…", "我很累")).endswith("。") or "累" in reply(
        conversation("Hello", "…", "我很累")
    )
    assert "累" not in reply(conversation("我很累", "…", "I am tired"))
    assert reply(conversation("你好", "…", "12")) in CHINESE.others + tuple(
        text.format("你好") for text in CHINESE.quotes
    )
    assert reply([]) == ENGLISH.greeting
    assert reply([Message("system", "Be kind."), Message("assistant", "Yes?")]) == ENGLISH.greeting


def test_it_goes_back_to_what_was_said_earlier() -> None:
    said = conversation("The lamp is broken", "…", "Blue curtains")
    replies = {reply(said, seed) for seed in range(40)}
    assert ENGLISH.quotes[0].format("The lamp is broken") in replies
    assert set(ENGLISH.others) & replies


def test_it_does_not_say_twice_in_a_row_what_it_could_say_otherwise() -> None:
    first = reply(conversation("Blue curtains"))
    for seed in range(20):
        said = [*conversation("Blue curtains"), Message("assistant", first), Message("user", "Green curtains")]
        assert reply(said, seed) != first


messages = st.lists(
    st.builds(
        Message,
        st.sampled_from(ROLES),
        st.text(st.characters(codec="utf-8"), max_size=60)
        | st.sampled_from(
            [
                "I am",
                "you",
                "what is my",
                "我叫什么",
                "我的是什么",
                "count to 9999",
                "{0}",
                "my {0} is {1}",
                "I want {",
                "’’",
            ]
        ),
    ),
    max_size=6,
)


@given(messages, st.integers(0, 2**63 - 1))
def test_it_has_a_reply_to_anything_and_always_the_same(said: list[Message], seed: int) -> None:
    text = reply(said, seed)
    assert text.strip()
    assert text == reply(said, seed)
    assert "".join(pieces(text)) == text


@given(st.text(max_size=300))
def test_the_pieces_of_a_text_are_the_text(text: str) -> None:
    assert "".join(pieces(text)) == text


def test_a_very_long_text_costs_no_time() -> None:
    began = time.process_time()
    reply(conversation("my " * 300_000, "…", "i am my is " * 100_000, "…", "what is my " * 90_000))
    assert time.process_time() - began < 5


# -- how it says it ----------------------------------------------------------------------------------------------


def test_its_params_are_a_language_space_s_and_pass_the_relay_s_check(engine: ElizaEngine) -> None:
    schema = engine.capabilities.params
    check_schema(schema)
    hello: list[Value] = [{"role": "user", "content": "Hi"}]
    all_params = {
        "messages": hello,
        "instructions": "Be brief.",
        "temperature": 0.5,
        "top_p": 1,
        "max_tokens": 5,
        "stop": ["a", "b", "c", "d"],
        "seed": 3,
    }
    assert not check_params(schema, all_params)
    assert not check_params(schema, {}, {"messages"})
    for wrong, field in (
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": hello, "temperature": 2.1}, "temperature"),
        ({"messages": hello, "top_p": -0.1}, "top_p"),
        ({"messages": hello, "max_tokens": 0}, "max_tokens"),
        ({"messages": hello, "stop": ["x"] * 5}, "stop"),
        ({"messages": hello, "stop": [""]}, "stop.0"),
        ({"messages": hello, "text": "x"}, "text"),
    ):
        assert field in check_params(schema, wrong), wrong
    many: Value = {"messages": [{"role": ROLES[at % 3], "content": "x" * 100} for at in range(200)]}
    assert not check_params(schema, many)


def test_a_reply_is_put_out_word_by_word_and_told_how_much_it_was(engine: ElizaEngine) -> None:
    end, chunks = run(engine, "Please count to 5.", instructions="Be brief.")
    assert end.outcome == "completed"
    assert chunks[0] == FormatChunk(None)
    assert words(chunks) == ["1,", " 2,", " 3,", " 4,", " 5."]
    assert last(chunks) == {"finish_reason": "stop", "usage": {"prompt_tokens": 6, "completion_tokens": 5}}
    assert words(run(engine, "数到2")[1]) == ["1，2。"]
    assert words(run(engine, "讲个故事")[1])[:4] == ["从前，", "长长", "的码", "头尽"]


def test_max_tokens_and_stop_end_it_early(engine: ElizaEngine) -> None:
    _, chunks = run(engine, "Count to 9", max_tokens=3)
    assert words(chunks) == ["1,", " 2,", " 3,"]
    assert last(chunks) == {"finish_reason": "length", "usage": {"prompt_tokens": 3, "completion_tokens": 3}}
    _, chunks = run(engine, "Count to 9", max_tokens=9)
    assert last(chunks)["finish_reason"] == "stop"
    _, chunks = run(engine, "Count to 9", stop=["7", "4", "x"])
    assert "".join(words(chunks)) == "1, 2, 3, "
    assert last(chunks)["finish_reason"] == "stop"
    end, chunks = run(engine, "Count to 9", stop=["1"])
    assert end.outcome == "completed"
    assert words(chunks) == []
    assert last(chunks) == {"finish_reason": "stop", "usage": {"prompt_tokens": 3, "completion_tokens": 0}}


def test_equal_requests_make_equal_chunks_in_any_process(engine: ElizaEngine) -> None:
    other = loaded("pace_ms=1")
    assert other.capabilities == engine.capabilities
    assert engine.capabilities.reproducible
    assert run(engine, "I need rest", seed=7)[1] == run(other, "I need rest", seed=7, temperature=2)[1]


def test_a_long_conversation_may_come_as_an_input(engine: ElizaEngine) -> None:
    said = conversation("My number is 12.", *["…" * 50] * 1_999, "What number did I tell you?")
    end, chunks = run(engine, data=json.dumps(wire(said)).encode())
    assert end.outcome == "completed"
    assert "".join(words(chunks)) == "You told me the number 12."


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"{", "messages"),
        (b"\xff", "messages"),
        (b"{}", "messages"),
        (b"[]", "messages"),
        (b"[" * 100_000, "messages"),
        (b'[{"role": "user", "content": "\\ud800"}]', "messages"),
        (b'[{"role": "user", "content": "Hi"}, 3]', "messages.1"),
        (b'[{"role": "user", "content": 3}]', "messages.0.content"),
        (b'[{"role": "nobody", "content": ""}]', "messages.0.role"),
        (json.dumps([{"role": "user", "content": ""}] * (MAX_MESSAGES + 1)).encode(), "messages"),
    ],
)
def test_an_input_that_is_no_conversation_is_refused_with_its_place(
    engine: ElizaEngine, data: bytes, field: str
) -> None:
    end, chunks = run(engine, data=data)
    assert (end.outcome, end.code, list(end.details)) == ("failed", "invalid_params", [field])
    assert words(chunks) == []


def test_the_pace_is_an_option_and_a_cancel_comes_between_words() -> None:
    slow = loaded("pace_ms=5000")
    heard: list[Chunk] = []
    began = time.monotonic()
    end, _ = run_engine_until(slow, heard)
    assert end.outcome == "cancelled"
    assert words(heard) == ["1,"]
    assert time.monotonic() - began < 4
    for wrong in ("-1", "5001"):
        with pytest.raises(OptionError, match="0 to 5000"):
            loaded(f"pace_ms={wrong}")


def run_engine_until(engine: ElizaEngine, heard: list[Chunk]) -> tuple[RunResult, list[Chunk]]:
    params: dict[str, Value] = {"messages": wire(conversation("Count to 9"))}
    return run_engine(engine, params, {}, lambda: bool(words(heard)), heard.append), heard


@pytest.mark.trio
async def test_one_process_serves_all_its_slots() -> None:
    host = EngineHost("eliza", parse_options(ElizaEngine.OPTIONS, ["pace_ms=20"]), shared=ElizaEngine.SHARED)
    slots = [ProcessSlot(number, host) for number in range(3)]
    heard: list[list[Chunk]] = [[] for _ in slots]
    ends: list[RunResult] = []

    async def ask(number: int) -> None:
        job = Job({"messages": wire(conversation(f"Count to {20 + number}"))})
        ends.append(await slots[number].run(job, heard[number].append))

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for slot in slots:
                nursery.start_soon(slot.serve)
            for slot in slots:
                await ready(slot)
            async with trio.open_nursery() as asking:
                for number in range(3):
                    asking.start_soon(ask, number)
            nursery.cancel_scope.cancel()
    assert [end.outcome for end in ends] == ["completed"] * 3
    assert [len(words(chunks)) for chunks in heard] == [20, 21, 22]


async def ready(slot: ProcessSlot) -> None:
    changed = trio.Event()

    def note() -> None:
        if slot.free:
            changed.set()

    slot.on_change = note
    note()
    await changed.wait()


def test_every_reply_takes_up_what_was_caught_once_or_not_at_all() -> None:
    for rule in ENGLISH.rules + CHINESE.rules:
        for text in rule.replies:
            assert text.format("X").count("X") == text.count("{0}") <= min(1, rule.pattern.groups), text
