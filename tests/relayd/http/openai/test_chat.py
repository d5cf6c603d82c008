"""`POST /v1/chat/completions`, with a worker whose every move the test makes."""

import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import h11
import openai
import pytest
import trio

from protocol.wire.frames import Completed, Failed, Output, Started
from protocol.wire.messages import Assign, Cancel, Input
from protocol.wire.structs import InputRule
from relayd.http.openai import chat as chat_module
from relayd.http.openai.json_body import MAX_BODY_VALUES, read_fields
from tests.support.fake_worker import ENDING, MESSAGES, FakeWorker, fake_worker, identity
from tests.support.relay import Daemon, daemon, until
from tests.support.timed_http_client import Answer, asking

HELLO = [{"role": "user", "content": "Hello."}]
TCP: dict[str, Any] = {"listen": "127.0.0.1:0"}
SPACES: dict[str, Any] = {"tts": {}, "llm": {}}
INPUT = {"messages": InputRule(media_types=["application/json"])}


def asking_for_reply(url: str, token: str | None = None, **fields: Any) -> AbstractAsyncContextManager[Answer]:
    body = json.dumps({"model": "llm", "messages": HELLO} | fields).encode()
    return asking(url, "POST", "/v1/chat/completions", token=token, body=body)


async def error_of(url: str, token: str | None = None, **fields: Any) -> tuple[int, dict[str, Any]]:
    async with asking_for_reply(url, token, **fields) as answer:
        told = await answer.json()
        assert told["error"].keys() == {"message", "type", "param", "code"}
        return answer.status, told["error"]


def events(body: bytes) -> list[Any]:
    """What a stream says, without its comments; its last event is `[DONE]`."""
    told = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if not line.startswith(b":")]
    assert told.pop() == b""
    assert told.pop() == b"[DONE]"
    return [json.loads(line) for line in told]


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])


@asynccontextmanager
async def replying(state_dir: Path, **overrides: Any) -> AsyncIterator[tuple[Daemon, FakeWorker]]:
    """A daemon with a worker of space `llm`, and another of `tts`, which speaks."""
    config = {"spaces": SPACES} | overrides
    async with (
        daemon(state_dir, **config) as relay,
        fake_worker(relay.url),
        fake_worker(relay.url, name="model", spaces=("llm",), params=MESSAGES, format=None, inputs=INPUT) as worker,
    ):
        yield relay, worker


async def write_once(worker: FakeWorker, ending: Any = ENDING, *texts: str) -> Assign:
    assign = await worker.assigned()
    worker.write(assign, list(texts), ending=ending)
    return assign


async def replied(relay: Daemon, worker: FakeWorker, **fields: Any) -> tuple[Assign, Answer, Any]:
    """What the worker is asked for, and the whole answer."""
    told: list[Assign] = []

    async def serve() -> None:
        told.append(await write_once(worker, ENDING, "Good", " morning."))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with asking_for_reply(relay.url, **fields) as answer:
            body = await answer.body()
            assert answer.status == 200, body
            return told[0], answer, events(body) if fields.get("stream") else json.loads(body)


# -- replies ------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_reply_comes_in_one_piece_as_openai_has_it(tmp_path: Path) -> None:
    async with replying(tmp_path) as (relay, worker):
        assign, answer, told = await replied(relay, worker)
        await relay.at_rest()
    assert (assign.space, assign.params) == ("llm", {"messages": HELLO})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] == assign.request_id
    assert answer.headers["x-relay-space"] == "llm"
    assert told.pop("id") == f"chatcmpl-{assign.request_id}"
    assert isinstance(told.pop("created"), int)
    assert told == {
        "object": "chat.completion",
        "model": "llm",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Good morning.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


@pytest.mark.trio
async def test_a_stream_has_the_role_the_pieces_the_reason_and_if_wanted_the_usage(tmp_path: Path) -> None:
    async with replying(tmp_path) as (relay, worker):
        _, answer, chunks = await replied(relay, worker, stream=True)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
        assert chunks[0]["object"] == "chat.completion.chunk"
        assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
            {"role": "assistant", "content": ""},
            {"content": "Good"},
            {"content": " morning."},
            {},
        ]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
        assert "usage" not in chunks[0]
        _, _, chunks = await replied(relay, worker, stream=True, stream_options={"include_usage": True})
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4


@pytest.mark.trio
async def test_a_piece_is_read_before_the_worker_has_written_the_next(tmp_path: Path) -> None:
    async with replying(tmp_path) as (relay, worker), trio.open_nursery() as nursery:
        read = trio.Event()

        async def hear() -> None:
            async with asking_for_reply(relay.url, stream=True) as answer:
                body = b""
                while b"Good" not in body:
                    body += await answer.piece() or b"Good, but the end"
                read.set()
                body += await answer.body()
            assert text_of(events(body)) == "Good morning."

        nursery.start_soon(hear)
        assign = await worker.assigned()
        worker.write(assign, ["Good"], end=False)
        with trio.fail_after(10):
            await read.wait()
        worker.send(Output(**identity(assign, 2), data=" morning."))
        worker.send(Completed(**identity(assign, 3), result={}))


@pytest.mark.trio
async def test_an_engine_that_thinks_for_long_keeps_the_stream_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_module, "COMMENT_S", 0.01)
    async with replying(tmp_path) as (relay, worker), trio.open_nursery() as nursery:
        commented = trio.Event()

        async def hear() -> None:
            async with asking_for_reply(relay.url, stream=True) as answer:
                body = b""
                while b"\n\n:\n\n" not in body:
                    body += await answer.piece() or b"\n\n:\n\n"
                commented.set()
                body += await answer.body()
            assert text_of(events(body)) == "Yes."

        nursery.start_soon(hear)
        assign = await worker.assigned()
        worker.send(Started(**identity(assign, 0), format=None))
        with trio.fail_after(10):
            await commented.wait()
        worker.write(assign, ["Yes."], first=1)


@pytest.mark.trio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_space_that_says_nothing_of_its_end_has_written_all(tmp_path: Path, stream: bool) -> None:
    """A function that yields strings, for example. What it puts out besides is no text."""
    async with replying(tmp_path) as (relay, worker), trio.open_nursery() as nursery:

        async def serve() -> None:
            assign = await worker.assigned()
            worker.send(Started(**identity(assign, 0), format=None))
            for seq, data in enumerate(["Yes", {"x": 1}, b"z", "", "."], 1):
                worker.send(Output(**identity(assign, seq), data=data))
            worker.send(Completed(**identity(assign, 6), result={}))

        nursery.start_soon(serve)
        more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        async with asking_for_reply(relay.url, **more) as answer:
            body = await answer.body()
    if stream:
        chunks = events(body)
        assert text_of(chunks) == "Yes."
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"  # no usage, as nobody has counted
    else:
        told = json.loads(body)
        assert told["choices"][0]["message"]["content"] == "Yes."
        assert (told["choices"][0]["finish_reason"], told["usage"]) == ("stop", None)


# -- what is sent on ------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_fields_are_sent_by_the_names_of_the_space(tmp_path: Path) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Good"}, {"type": "text", "text": "morning"}],
            "name": "a",
        },
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "tool_calls": []},
        {"role": "user", "content": ""},
    ]
    async with replying(tmp_path) as (relay, worker):
        assign, _, _ = await replied(
            relay,
            worker,
            messages=messages,
            temperature=0.5,
            top_p=1,
            max_tokens=9,
            max_completion_tokens=5,
            stop="END",
            seed=-1,
            top_k=3,
            n=1,
            user="ann",
            tools=[],
            tool_choice="auto",
            response_format={"type": "text"},
            logprobs=False,
            modalities=["text"],
            presence_penalty=0.5,
            store=False,
            logit_bias=None,
        )
        assert assign.params == {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Good\nmorning"},
                {"role": "assistant", "content": ""},
                {"role": "assistant", "content": "No."},
                {"role": "user", "content": ""},
            ],
            "temperature": 0.5,
            "top_p": 1,
            "max_tokens": 5,
            "stop": ["END"],
            "seed": 2**63 - 1,
            "top_k": 3,
        }


@pytest.mark.trio
async def test_hints_that_the_space_has_no_param_for_are_ignored_and_told(tmp_path: Path) -> None:
    plain = {"type": "object", "properties": {"messages": {"type": "array"}}, "additionalProperties": False}
    async with (
        daemon(tmp_path, spaces=SPACES) as relay,
        fake_worker(relay.url, spaces=("llm",), params=plain, format=None) as worker,
    ):
        assign, answer, _ = await replied(relay, worker, temperature=1, seed=3, top_k=4)
        assert assign.params == {"messages": HELLO}
        assert answer.headers["x-relay-ignored"] == "temperature, seed"
        many = [{"role": "user", "content": "x" * 60_000}]
        status, told = await error_of(relay.url, messages=many)
        assert (status, told["code"]) == (413, "input_too_large")
        assert "are more than space 'llm' takes" in told["message"]


@pytest.mark.trio
@pytest.mark.parametrize("messages", [[{"role": "user", "content": "长" * 100_000}], HELLO * 900])
async def test_a_long_conversation_is_sent_as_an_input(tmp_path: Path, messages: list[dict[str, str]]) -> None:
    async with replying(tmp_path) as (relay, worker), trio.open_nursery() as nursery:

        async def serve() -> None:
            assign = await worker.assigned()
            assert (assign.params, assign.inputs["messages"].media_type) == ({}, "application/json")
            data = b""
            while len(data) < assign.inputs["messages"].size:
                data += (await worker.peer.next(Input)).data
            assert json.loads(data) == messages
            worker.write(assign, ["Yes."])

        nursery.start_soon(serve)
        async with asking_for_reply(relay.url, messages=messages) as answer:
            assert (await answer.json())["choices"][0]["message"]["content"] == "Yes."


# -- what is refused ------------------------------------------------------------------------------------------------


def a_message(**fields: Any) -> list[Any]:
    return [{"role": "user", "content": "Hi"} | fields]


@pytest.mark.trio
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": None}, "model", "is required"),
        ({"model": 3}, "model", "must be"),
        ({"messages": None}, "messages", "is required"),
        ({"messages": []}, "messages", "must be 1 to"),
        ({"messages": "Hi"}, "messages", "must be an array"),
        ({"messages": ["Hi"]}, "messages.0", "must be an object"),
        ({"messages": HELLO + a_message(role="tool")}, "messages.1.role", "tools are not supported"),
        ({"messages": a_message(role=None)}, "messages.0.role", "must be one of system, developer, user, assistant"),
        ({"messages": a_message(content=None)}, "messages.0.content", "must be text"),
        ({"messages": a_message(content=3)}, "messages.0.content", "must be text"),
        ({"messages": a_message(content={"text": "Hi"})}, "messages.0.content", "must be text"),
        ({"messages": a_message(content="\ud800")}, "messages.0.content", "surrogate"),
        ({"messages": a_message(content=[{"type": "image_url"}])}, "messages.0.content.0", "only text"),
        ({"messages": a_message(content=[{"type": "input_audio"}])}, "messages.0.content.0", "only text"),
        ({"messages": a_message(content=[{"type": "text"}])}, "messages.0.content.0", "must be text"),
        ({"messages": a_message(content=[{"type": ["text"], "text": "a"}])}, "messages.0.content.0", "only text"),
        ({"messages": a_message(role="assistant", tool_calls=[{}])}, "messages.0.tool_calls", "is not supported"),
        ({"n": 2}, "n", "must be 1"),
        ({"n": {}}, "n", "must be 1"),
        ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
        ({"tool_choice": "required"}, "tool_choice", "is not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "is not supported"),
        ({"function_call": {"name": "f"}}, "function_call", "is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "must be text"),
        ({"response_format": "json"}, "response_format", "must be text"),
        ({"modalities": ["text", "audio"]}, "modalities", "must be text"),
        ({"audio": {"voice": "alloy"}}, "audio", "is not supported"),
        ({"logprobs": True}, "logprobs", "is not supported"),
        ({"stream": "yes"}, "stream", "must be"),
        ({"stream_options": []}, "stream_options", "must be an object"),
        ({"temperature": 3}, "temperature", "must lie in 0..2"),
        ({"temperature": 1.7}, "temperature", "1.5"),  # by the space's own schema
        ({"max_tokens": 0}, "max_tokens", "must lie in 1.."),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": [""]}, "stop", "must be"),
        ({"stop": "\ud800"}, "stop", "surrogate"),
        ({"seed": 0.5}, "seed", "must be"),
        ({"top_k": "\ud800"}, "top_k", "surrogate"),
        ({"top_k": "x"}, "top_k", "must be"),
        ({"model": "tts"}, "model", "takes no messages"),
    ],
)  # fmt: skip
async def test_what_cannot_be_asked_is_400_and_names_the_field(
    tmp_path: Path, fields: dict[str, Any], param: str, words: str
) -> None:
    async with replying(tmp_path) as (relay, _):
        status, told = await error_of(relay.url, **fields)
        assert (status, told["type"], told["code"]) == (400, "invalid_request_error", "invalid_params")
        assert told["param"] == param
        assert words in told["message"]
        await relay.at_rest()


@pytest.mark.trio
async def test_a_body_that_is_no_json_object_is_400(tmp_path: Path) -> None:
    async with replying(tmp_path) as (relay, _):
        for body in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
            async with asking(relay.url, "POST", "/v1/chat/completions", body=body) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (400, "invalid_json")


def test_marks_in_texts_are_no_values() -> None:
    text = '["a", {\\"b\\": 3}], ' * MAX_BODY_VALUES
    assert read_fields(json.dumps({"messages": text}).encode()) == {"messages": text}
    for body in ('{"x": [' + "1," * MAX_BODY_VALUES, '{"a": "b", "x": [' + "[]," * MAX_BODY_VALUES):
        with pytest.raises(Exception, match="more than 100000 values"):
            read_fields(body.encode())
    with pytest.raises(Exception, match="must be JSON"):
        read_fields(b'"' + b'\\",' * 2_000_000)  # a text without end costs no time


# -- the queue, failures, and who goes away -----------------------------------------------------------------------


@pytest.mark.trio
async def test_without_a_worker_it_is_503_within_the_wait(tmp_path: Path) -> None:
    http = {"no_worker_wait_s": 0.05}
    async with daemon(tmp_path, spaces=SPACES, http=http) as relay:
        status, told = await error_of(relay.url)
        assert (status, told["type"], told["code"]) == (503, "server_error", "no_worker")
        assert "no worker of space 'llm'" in told["message"]
        await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_word_is_a_status(tmp_path: Path, stream: bool) -> None:
    async with replying(tmp_path) as (relay, worker), trio.open_nursery() as nursery:

        async def serve() -> None:
            assign = await worker.assigned()
            worker.send(Started(**identity(assign, 0), format=None))
            worker.send(Failed(**identity(assign, 1), code="engine_failed", message="it broke"))

        nursery.start_soon(serve)
        async with asking_for_reply(relay.url, stream=stream) as answer:
            told = (await answer.json())["error"]
            assert (answer.status, told["code"]) == (502, "engine_failed")
            assert told["message"] == "it broke"
            assert answer.headers["x-should-retry"] == "false"


@pytest.mark.trio
async def test_no_text_at_all_is_a_failure_and_an_empty_reply_is_none(tmp_path: Path) -> None:
    async with replying(tmp_path) as (relay, worker), trio.open_nursery() as nursery:
        nursery.start_soon(write_once, worker, None)
        status, told = await error_of(relay.url)
        assert (status, told["code"]) == (502, "engine_failed")
        assert "made no text" in told["message"]
        ending = {"finish_reason": "length", "usage": {"prompt_tokens": "x"}}
        nursery.start_soon(partial(write_once, worker, ending))
        async with asking_for_reply(relay.url) as answer:
            told = await answer.json()
            assert (told["choices"][0]["message"]["content"], told["choices"][0]["finish_reason"]) == ("", "length")
            assert told["usage"] is None


@pytest.mark.trio
async def test_a_failure_in_mid_stream_is_an_event_and_cuts_the_answer_short(tmp_path: Path) -> None:
    async with replying(tmp_path) as (relay, worker), trio.open_nursery() as nursery:

        async def serve() -> None:
            assign = await worker.assigned()
            worker.write(assign, ["Half a"], end=False)
            worker.send(Failed(**identity(assign, 2), code="engine_failed", message="it broke"))

        nursery.start_soon(serve)
        async with asking_for_reply(relay.url, stream=True) as answer:
            body = b""
            with suppress(trio.BrokenResourceError, h11.RemoteProtocolError):  # the answer has no end
                while piece := await answer.piece():
                    body += piece
        last = json.loads(body.rstrip().rpartition(b"data: ")[2])
        assert (last["error"]["code"], last["error"]["message"]) == ("engine_failed", "it broke")
        assert b"[DONE]" not in body


@pytest.mark.trio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels_its_request(tmp_path: Path, stream: bool) -> None:
    async with replying(tmp_path) as (relay, worker), trio.open_nursery() as nursery:
        hearing = trio.CancelScope()

        async def hear() -> None:
            with hearing:
                async with asking_for_reply(relay.url, stream=stream) as answer:
                    await answer.body()

        nursery.start_soon(hear)
        assign = await worker.assigned()
        worker.write(assign, ["Half a"], end=False)
        await until(lambda: relay.relay.requests[assign.request_id].log.next_seq == 2)
        hearing.cancel()
        assert (await worker.peer.next(Cancel)).request_id == assign.request_id


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_openais_names_stand_for_the_only_space_of_the_kind_that_is_asked(tmp_path: Path) -> None:
    async with replying(tmp_path) as (relay, worker):
        for model in ("gpt-4o", "openai/gpt-4.1-mini", "o3", "anything"):
            assign, _, told = await replied(relay, worker, model=model)
            assert (assign.space, told["model"]) == ("llm", model)
        async with asking(relay.url, "GET", "/v1/models") as answer:
            assert [row["id"] for row in (await answer.json())["data"]] == ["check", "llm", "tts"]
        async with asking(relay.url, "GET", "/v1/audio/models") as answer:
            assert [row["id"] for row in (await answer.json())["models"]] == ["check", "tts"]
        for model in ("gpt-4o", "tts-1", "llm"):
            async with asking(relay.url, "GET", f"/v1/models/{model}") as answer:
                assert (answer.status, (await answer.json())["id"]) == (200, model)


@pytest.mark.trio
async def test_the_settings_say_what_names_stand_for_and_any_other_only_in_its_kind(tmp_path: Path) -> None:
    names = {"models": {"gpt-4o": "llm", "gpt-4": "tts", "gone": "nobody", "*": "tts"}}
    async with replying(tmp_path, openai=names) as (relay, worker):
        for model in ("gpt-4o", "other"):
            assert (await replied(relay, worker, model=model))[0].space == "llm"
        status, told = await error_of(relay.url, model="gpt-4")
        assert (status, told["param"]) == (400, "model")
        status, told = await error_of(relay.url, model="gone")
        assert (status, told["code"]) == (404, "space_not_found")


@pytest.mark.trio
async def test_with_several_language_spaces_a_name_that_is_none_is_refused_with_those_there_are(tmp_path: Path) -> None:
    spaces = SPACES | {"other": {}}
    async with (
        replying(tmp_path, spaces=spaces, **TCP) as (relay, worker),
        fake_worker(relay.url, name="two", spaces=("other",), params=MESSAGES, format=None),
    ):
        status, told = await error_of(relay.url, model="gpt-4o")
        assert (status, told["code"]) == (404, "space_not_found")
        assert "models are check, llm, other" in told["message"]
        token = relay.tokens.create(role="client", name="bob", now=0.0, spaces=["llm"]).text
        status, told = await error_of(relay.urls[0], token, model="other")
        assert (status, told["type"]) == (403, "permission_error")
        assert (await error_of(relay.urls[0], "rly_c_none"))[0] == 401
        assign, _, _ = await replied(relay, worker, model="llm")
        assert assign.space == "llm"


# -- the official package -------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_openai_package_streams_counts_and_raises_its_own_errors(tmp_path: Path) -> None:
    async with replying(tmp_path, **TCP) as (relay, worker), trio.open_nursery() as nursery:
        token = relay.tokens.create(role="client", name="ann", now=0.0).text
        base_url = relay.urls[0].replace("ws:", "http:") + "/v1"
        with openai.OpenAI(base_url=base_url, api_key=token, max_retries=0, timeout=20) as client:
            create: Any = partial(client.chat.completions.create, model="gpt-4o", messages=HELLO)
            nursery.start_soon(write_once, worker, ENDING, "Good", " morning.")
            whole = await trio.to_thread.run_sync(partial(create, temperature=0.2))
            assert whole.choices[0].message.content == "Good morning."
            assert whole.usage.total_tokens == 10
            nursery.start_soon(write_once, worker, ENDING, "Good", " morning.")
            stream = partial(create, stream=True, stream_options={"include_usage": True})
            chunks = await trio.to_thread.run_sync(lambda: list(stream()))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Good morning."
            assert chunks[-1].usage.completion_tokens == 3
            with pytest.raises(openai.BadRequestError) as fault:
                await trio.to_thread.run_sync(partial(create, n=2))
            assert (fault.value.code, fault.value.param) == ("invalid_params", "n")

            async def break_off() -> None:
                assign = await worker.assigned()
                worker.write(assign, ["Half a"], end=False)
                worker.send(Failed(**identity(assign, 2), code="engine_failed", message="it broke"))

            nursery.start_soon(break_off)
            with pytest.raises(openai.APIError, match="it broke"):
                await trio.to_thread.run_sync(lambda: list(stream()))

            def read_the_beginning() -> None:
                with stream() as chunks:
                    assert any(chunk.choices[0].delta.content == "Half a" for chunk in chunks)

            async def begin() -> None:
                worker.write(await worker.assigned(), ["Half a"], end=False)

            nursery.start_soon(begin)
            await trio.to_thread.run_sync(read_the_beginning)
            assert "disconnected" in (await worker.peer.next(Cancel)).reason
