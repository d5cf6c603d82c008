"""Engine `chat`: what it asks a server, what it makes of its answers, good and bad, and how it is cancelled."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuworker.cli import main
from gpuworker.engines.base import Chunk, EngineError, EngineInput, FormatChunk, OptionError, ProgressChunk
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.chat.answer import ChatAnswer
from gpuworker.engines.chat.engine import ChatEngine
from gpuworker.engines.chat.hidden import ShownText
from gpuworker.engines.eliza.engine import ElizaEngine
from gpuworker.slots.process_slot import EngineHost, ProcessSlot
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job
from protocol.wire.params_schema import check_params, check_schema
from tests.gpuworker.engines.chat.chat_server import (
    DONE,
    END,
    EVENTS,
    HELLO,
    an_engine,
    answers,
    breaks_off,
    delta,
    event,
    last,
    run,
    says,
    streams,
    texts,
)
from tests.gpuworker.engines.openai.speech_server import PATIENCE_S, Call, Script, SpeechServer

MODELS = {"/v1/models": {"object": "list", "data": [{"id": "qwen3"}]}}
KEY = "my-secret-key"


@contextlib.contextmanager
def a_server(script: Script, lists: Any = MODELS) -> Iterator[SpeechServer]:
    with SpeechServer(script, lists) as server:
        yield server


def ask(script: Script, params: dict[str, Any] | None = None, *options: str) -> tuple[RunResult, list[Chunk]]:
    with a_server(script) as server, an_engine(server.url, *options) as engine:
        return run(engine, params)


# -- what is asked


def test_a_request_is_what_openai_s_api_wants() -> None:
    params: dict[str, Any] = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "你好"},
        ],
        "instructions": "Be brief.",
        "temperature": 0,
        "top_p": 0.5,
        "max_tokens": 100,
        "stop": ["END"],
        "seed": 7,
    }
    with a_server(says("Hi.")) as server, an_engine(server.url) as engine:
        check_schema(engine.capabilities.params)
        assert not check_params(engine.capabilities.params, params)
        assert engine.capabilities.params == loaded_eliza().capabilities.params
        assert not engine.capabilities.reproducible
        run(engine, params)
        (call,) = server.calls
        assert (call.method, call.path) == ("POST", "/v1/chat/completions")
        assert call.body == {
            "model": "qwen3",
            "messages": [{"role": "system", "content": "Be brief.\n\nBe kind."}, *params["messages"][1:]],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "top_p": 0.5,
            "max_tokens": 100,
            "stop": ["END"],
            "seed": 7,
        }
        assert "authorization" not in call.headers
        run(engine)
        assert server.calls[1].body.keys() == {"model", "messages", "stream", "stream_options"}
        run(engine, inputs={"messages": EngineInput(json.dumps(HELLO * 9).encode(), "application/json")})
        assert server.calls[2].body["messages"] == HELLO * 9


def loaded_eliza() -> ElizaEngine:
    engine = ElizaEngine(parse_options(ElizaEngine.OPTIONS, []))
    engine.load()
    return engine


def test_the_worker_s_owner_chooses_model_key_longest_reply_and_further_fields(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    with a_server(says("Hi."), {}) as server:
        options = (f"api_key_file={tmp_path / 'key'}", "model=m", "max_tokens=50")
        with an_engine(server.url, *options, 'extra={"top_k": 40, "stream_options": null}') as engine:
            for most in ({}, {"max_tokens": 80}, {"max_tokens": 20}):
                run(engine, most)
        assert [call.body["max_tokens"] for call in server.calls] == [50, 50, 20]
        body = server.calls[0].body
        assert (body["model"], body["top_k"], "stream_options" in body) == ("m", 40, False)
        assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"
        with pytest.raises(OptionError, match="1 or more"), an_engine(server.url, "max_tokens=0"):
            pass
        with (
            pytest.raises(OptionError, match="leave out /chat/completions"),
            an_engine(f"{server.url}/chat/completions"),
        ):
            pass


# -- a reply


def test_a_reply_is_put_out_as_it_comes_with_reason_and_usage() -> None:
    end, chunks = ask(says("Good", " morning", ". 你好"))
    assert end.outcome == "completed"
    assert chunks[0] == FormatChunk(None)
    assert "".join(texts(chunks)) == "Good morning. 你好"
    assert last(chunks) == {"finish_reason": "stop", "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def test_each_piece_is_put_out_before_the_next_one_comes() -> None:
    heard: list[Chunk] = []
    more = threading.Event()

    def script(call: Call) -> None:
        call.head("200 OK", "Transfer-Encoding: chunked", EVENTS)
        call.chunk(delta("Hel"))
        assert more.wait(PATIENCE_S)
        for piece in (delta("lo."), *END, b""):
            call.chunk(piece)

    class Heard(list[Chunk]):
        def append(self, chunk: Chunk) -> None:
            super().append(chunk)
            if texts([chunk]):
                more.set()

    with a_server(script) as server, an_engine(server.url) as engine:
        end, heard = run(engine, chunks=Heard())
    assert end.outcome == "completed"
    assert texts(heard) == ["Hel", "lo."]


@pytest.mark.parametrize(
    ("script", "text", "reason"),
    [
        (streams(delta("a"), delta(finish_reason="length"), DONE), "a", "length"),
        (streams(delta("a", finish_reason="stop")), "a", "stop"),  # without [DONE]
        (streams(delta("a"), DONE), "a", "stop"),  # without a reason
        (streams(delta("a"), b"data: [DONE]"), "a", "stop"),  # without a line's end
        (streams(delta("a"), *END, delta("b")), "a", "stop"),
        (streams(b": hello\n\n", b"event: x\nid: 1\n", delta("a"), b": ping\n\n", *END), "a", "stop"),
        (streams(*(piece.replace(b"\n", b"\r\n") for piece in (delta("a"), *END))), "a", "stop"),
        (streams(*(bytes([byte]) for byte in delta("你好") + b"".join(END))), "你好", "stop"),
        (streams(delta(), delta(role="assistant"), event({}), event({"choices": []}), delta("a"), *END), "a", "stop"),
        (streams(delta([{"type": "text", "text": "a"}, {"type": "thinking"}, "c"]), *END), "ac", "stop"),
        (streams(delta(refusal="I will not."), *END), "I will not.", "stop"),
        (streams(b'data: {"choices": [{"delta": {"content": "half \\ud83d"}}]}\n\n', *END), "half ?", "stop"),
        (
            answers({"choices": [{"message": {"content": "<think>x</think>a"}, "finish_reason": "length"}]}),
            "a",
            "length",
        ),
        (answers({"choices": [{"message": {"role": "assistant", "content": "b"}}]}), "b", "stop"),
    ],
)  # fmt: skip
def test_replies_of_all_kinds_of_servers_are_understood(script: Script, text: str, reason: str) -> None:
    end, chunks = ask(script)
    assert end.outcome == "completed", end.message
    assert ("".join(texts(chunks)), last(chunks)["finish_reason"]) == (text, reason)


def test_what_follows_a_reply_is_not_awaited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuworker.engines.chat.engine.TAIL_S", 0.2)

    def script(call: Call) -> None:
        call.head("200 OK", "Transfer-Encoding: chunked", EVENTS)
        call.chunk(delta("a", finish_reason="stop"))
        call.until_given_up()

    end, chunks = ask(script)
    assert (end.outcome, texts(chunks)) == ("completed", ["a"])
    assert last(chunks) == {"finish_reason": "stop", "usage": None}
    end, chunks = ask(breaks_off(delta("a", finish_reason="stop")))
    assert (end.outcome, texts(chunks)) == ("completed", ["a"])


def test_a_very_long_piece_is_put_out_in_several() -> None:
    text = "长" * 500_000
    end, chunks = ask(streams(delta(text), *END))
    assert end.outcome == "completed", end.message
    assert "".join(texts(chunks)) == text


# -- thoughts


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["<think>Hm.</think>Yes."], "Yes."),
        (["<th", "ink>H", "m.</", "think", ">\n\n", "Yes."], "Yes."),
        ([*"\n <think>Hm.</think> Yes. <think>Or no?</think>Good."], "Yes. Good."),
        (["<THINK>Hm.</Think>Yes."], "Yes."),
        (["<thinking>a </think> b</thinking>Yes."], "Yes."),
        (["[THINK]Hm.[/THINK]Yes."], "Yes."),
        (["Yes.<think>But then"], "Yes."),
        (["Yes. </think>No."], "Yes. No."),
        (["a < b, <b>x</b> <thin", "g> [TH", "E] <"], "a < b, <b>x</b> <thing> [THE] <"),
    ],
)
def test_thoughts_in_the_text_are_never_put_out(pieces: list[str], shown: str) -> None:
    end, chunks = ask(says(*pieces))
    assert end.outcome == "completed"
    assert "".join(texts(chunks)) == shown


def test_thoughts_that_the_server_tells_apart_are_never_put_out_but_that_there_are_some() -> None:
    thoughts = [delta(None, **{name: "Hm."}) for name in ("reasoning_content", "reasoning", "thinking")]
    end, chunks = ask(streams(*thoughts, delta("Yes.", reasoning_content=""), *END))
    assert end.outcome == "completed"
    assert texts(chunks) == ["Yes."]
    progress = [chunk.message for chunk in chunks if isinstance(chunk, ProgressChunk)]
    assert progress in (["the model thinks"], [])  # none if all came at once
    assert "Hm." not in str(chunks)


def test_replies_may_begin_with_thoughts_without_their_tag() -> None:
    end, chunks = ask(says("Hm. Let", " me see.</thi", "nk>\n\nYes."), None, "thinks_first=true")
    assert (end.outcome, "".join(texts(chunks))) == ("completed", "Yes.")


TAGS = ["<think>", "</think>", "<THINKING>", "</thinking>", "[THINK]", "[/think]"]
THOUGHTS = re.compile(
    r"<think>.*?(?:</think>|\Z)|<thinking>.*?(?:</thinking>|\Z)|\[think\].*?(?:\[/think\]|\Z)"
    r"|</think>|</thinking>|\[/think\]",
    re.IGNORECASE | re.DOTALL,
)


@given(st.lists(st.sampled_from([*TAGS, "<", "</", "a", " ", "[", "é"]), max_size=12), st.lists(st.integers(0, 90)))
def test_the_pieces_in_which_a_reply_comes_do_not_matter(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    places = [0, *sorted({cut for cut in cuts if 0 < cut < len(text)}), len(text)]
    shown = ShownText()
    pieces = "".join(shown.add(text[begin:end]) for begin, end in pairwise(places)) + shown.finish()
    assert pieces == THOUGHTS.sub("", text).lstrip()


# -- what is no reply


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (streams(*END), "the model answered nothing; ask it in other words"),
        (streams(delta(""), delta(None), *END), "the model answered nothing"),
        (says(" ", "\n\n", "\t"), "the model answered nothing"),
        (says("<think>Hm.</think>\n\n"), "thought, and answered nothing"),
        (streams(delta("<think>Hm"), delta(finish_reason="length"), DONE), "raise max_tokens"),
        (streams(delta(reasoning="Hm"), delta(finish_reason="length"), DONE), "raise max_tokens"),
        (answers({"choices": []}), "the model answered nothing"),
        (answers({"choices": [{"message": None}]}), "the model answered nothing"),
        (answers([1]), "sent something that is no reply"),
        (streams(b"data: {\n\n"), "sent something that is no reply"),
        (streams(b"data: 3\n\n"), "sent something that is no reply"),
        (streams(b"data: " + b"[" * 100_000 + b"\n\n"), "sent something that is no reply"),
        (streams(b"\xff" * 100, b"\n"), "ended its reply in the middle"),
        (streams(event({"error": {"message": "CUDA at /home/x/y.py"}})), r"failed in its reply: CUDA at \(a path\)"),
        (streams(event({"error": "out of cake"})), "failed in its reply: out of cake"),
        (answers({"error": {"message": "no cake"}}), "failed in its reply: no cake"),
        (lambda call: call.answer(b"<html>", "200 OK", "Content-Type: text/html"), "answered without a reply"),
        (lambda call: call.answer(b'{"detail": "who?"}', "404 X"), "does not know the model or the path"),
        (lambda call: call.answer(b"secret", "500 X"), "failed .HTTP 500"),
        (lambda call: call.answer(b"", "401 X"), "gives a key with -o api_key_file"),
        (lambda call: call.answer(b"", "307 X", "Location: /"), "is elsewhere"),
    ],
)  # fmt: skip
def test_what_is_no_reply_is_a_failure_in_words(script: Script, words: str) -> None:
    end, chunks = ask(script)
    assert (end.outcome, end.code) == ("failed", "engine_failed")
    with pytest.raises(EngineError, match=words):
        raise EngineError(end.message)
    assert "".join(texts(chunks)).strip() == ""
    assert "secret" not in end.message


def test_what_the_server_refuses_is_told_with_its_reason() -> None:
    body = {"error": {"message": "This model's maximum context length is 4096 tokens.", "param": "messages"}}
    end, _ = ask(lambda call: call.answer(json.dumps(body).encode(), "400 Bad Request"))
    assert (end.code, end.retryable) == ("invalid_params", False)
    assert "maximum context length is 4096" in end.message
    assert list(end.details) == ["messages"]


def test_a_reply_without_text_before_a_stop_is_no_failure() -> None:
    end, chunks = ask(streams(*END), {"stop": ["x"]})
    assert (end.outcome, texts(chunks), last(chunks)["finish_reason"]) == ("completed", [], "stop")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (streams(delta("Half a")), "ended its reply in the middle"),
        (streams(delta("Half a"), delta(" sentence")[:-20]), "ended its reply in the middle"),
        (breaks_off(delta("Half a")), "lost in mid-stream"),
        (streams(delta("Half a"), event({"error": {"code": 503, "message": "overloaded"}})), "busy: overloaded"),
    ],
)
def test_a_model_that_dies_in_the_middle_is_told_and_may_be_asked_again(script: Script, words: str) -> None:
    end, chunks = ask(script)
    assert (end.outcome, end.code, end.retryable, end.restart) == ("failed", "engine_failed", True, False)
    assert words in end.message
    assert "".join(texts(chunks)).startswith("Half a")


@pytest.mark.parametrize("status", ["429 X", "503 X", "502 X", "event"])
def test_a_busy_server_is_asked_again_and_then_told(status: str) -> None:
    replies = iter([status, status, ""])

    def script(call: Call) -> None:
        if not (busy := next(replies, status)):
            says("Yes.")(call)
        elif busy == "event":
            streams(event({"error": {"code": 429, "message": "slow down"}}))(call)
        else:
            call.answer(b"", busy)

    with a_server(script) as server, an_engine(server.url, f"wait_s={PATIENCE_S}") as engine:
        end, chunks = run(engine)
        assert (end.outcome, texts(chunks), len(server.calls)) == ("completed", ["Yes."], 3)
    with a_server(script) as server, an_engine(server.url) as engine:
        end, _ = run(engine)
        assert (end.retryable, end.restart) == (True, False)


def test_a_server_that_is_away_takes_its_slots_with_it_until_it_is_back() -> None:
    with a_server(says("Yes.")) as server, an_engine(server.url) as engine:
        server.kill()
        end, _ = run(engine)
    assert (end.retryable, end.restart, end.details) == (True, True, {"innocent": True})
    assert "the model's server cannot be reached" in end.message


def test_a_model_that_never_stops_ends_at_max_tokens_and_its_connection_is_closed() -> None:
    given_up = threading.Event()

    def script(call: Call) -> None:
        call.head("200 OK", "Transfer-Encoding: chunked", EVENTS)
        with contextlib.suppress(OSError):
            while True:
                call.chunk(delta("la "))
        given_up.set()

    for params, options in (({"max_tokens": 5}, ()), ({}, ("max_tokens=5",))):
        given_up.clear()
        end, chunks = ask(script, params, *options)
        assert end.outcome == "completed"
        assert last(chunks) == {"finish_reason": "length", "usage": None}
        assert set("".join(texts(chunks)).split()) == {"la"}
        assert given_up.wait(PATIENCE_S)


def test_the_key_is_never_told_whatever_the_server_says_of_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text(KEY)
    told = {"error": {"message": f"bad key {KEY}"}}
    scripts: list[Script] = [
        streams(event(told)),
        answers(told),
        *(
            partial(refuses, json.dumps(told).encode(), status)
            for status in ("400 X", "401 X", "404 X", "500 X", "503 X")
        ),
        lambda call: call.answer(f"no {KEY}".encode(), "200 OK", "Content-Type: text/plain"),
        streams(f"data: {KEY}\n\n".encode()),
    ]
    for script in scripts:
        end, chunks = ask(script, None, f"api_key_file={tmp_path / 'key'}")
        assert end.outcome == "failed"
        assert KEY not in f"{end.message}{end.details}{end.report}{chunks}"
    assert KEY not in "".join(capfd.readouterr())


def refuses(body: bytes, status: str, call: Call) -> None:
    call.answer(body, status)


PARTS = [b"data: ", b"\n", b"\r", b"[DONE]", b'{"choices": [{"delta": ', b'{"content": "x"}}]}', b"[3]"]


@settings(max_examples=100)
@given(st.lists(st.binary(max_size=30) | st.sampled_from(PARTS), max_size=12), st.booleans())
def test_nothing_that_a_server_sends_breaks_the_reader(pieces: list[bytes], is_whole: bool) -> None:
    answer = ChatAnswer(ChatEngine.WORDS, bytes, is_whole=is_whole)
    with contextlib.suppress(EngineError):
        for piece in pieces:
            answer.feed(piece)
        if answer.fault is None:
            answer.finish()
            assert answer.finish_reason


# -- a cancel


class Cancel:
    """A script that waits at one point of its answer for the connection to be given up; the run is cancelled there."""

    def __init__(self, *pieces: bytes | None) -> None:
        self._pieces = pieces
        self.asked = threading.Event()
        self.given_up_at = 0.0
        self.given_up = threading.Event()

    def __call__(self, call: Call) -> None:
        if self._pieces:
            call.head("200 OK", "Transfer-Encoding: chunked", EVENTS)
        for piece in filter(None, self._pieces):
            call.chunk(piece)
        self.asked.set()
        call.until_given_up()
        self.given_up_at = time.monotonic()
        self.given_up.set()


@pytest.mark.parametrize("pieces", [(), (None,), (delta("Half a"),), (delta("<think>Hm"),), (delta("a")[:-9],)])
def test_a_cancel_closes_the_connection_whatever_is_awaited(pieces: tuple[bytes | None, ...]) -> None:
    script = Cancel(*pieces)
    with a_server(script) as server, an_engine(server.url) as engine:
        end, _ = run(engine, cancelled=script.asked.is_set)
        assert end.outcome == "cancelled"
        assert script.given_up.wait(PATIENCE_S)
        server.script = says("Yes.")
        assert texts(run(engine)[1]) == ["Yes."]


@pytest.mark.trio
async def test_one_process_serves_all_its_slots_and_a_cancel_of_one_is_seen_by_the_server() -> None:
    script = Cancel(delta("Half a"))
    others = threading.Semaphore(0)

    def by_turns(call: Call) -> None:
        if call.body["messages"][-1]["content"] == "hang":
            script(call)
        else:
            others.acquire(timeout=PATIENCE_S)
            says("Yes.")(call)

    with a_server(by_turns) as server:
        host = EngineHost("chat", parse_options(ChatEngine.OPTIONS, [f"url={server.url}"]), shared=ChatEngine.SHARED)
        slots = [ProcessSlot(number, host) for number in range(3)]
        ends: list[tuple[str, str]] = []

        async def one(slot: ProcessSlot, content: str) -> None:
            chunks: list[Chunk] = []
            end = await slot.run(Job({"messages": [{"role": "user", "content": content}]}), chunks.append)
            ends.append((end.outcome, "".join(texts(chunks))))

        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                for slot in slots:
                    nursery.start_soon(slot.serve)
                for slot in slots:
                    await ready(slot)
                async with trio.open_nursery() as running:
                    for slot, content in zip(slots, ("hang", "go", "go"), strict=True):
                        running.start_soon(one, slot, content)
                    await trio.to_thread.run_sync(script.asked.wait, PATIENCE_S)
                    slots[0].cancel()
                    assert await trio.to_thread.run_sync(script.given_up.wait, PATIENCE_S)
                    assert all(slot.ready for slot in slots)
                    others.release(2)
                nursery.cancel_scope.cancel()
    assert ends[0][0] == "cancelled"
    assert ends[1:] == [("completed", "Yes.")] * 2


async def ready(slot: ProcessSlot) -> None:
    changed = trio.Event()

    def note() -> None:
        if slot.free:
            changed.set()

    slot.on_change = note
    note()
    await changed.wait()


# -- doctor


def doctor(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json", "--engine", "chat", *(word for option in options for word in ("-o", option))])
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out)[1]["words"]


def test_doctor_says_whether_the_server_answers_and_lists_its_models(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuworker.doctor.find_spec", lambda _name: None)  # asking torch about GPUs takes seconds
    with a_server(says("Yes.")) as server:
        code, words = doctor(capsys, f"url={server.url}")
        assert code == 0
        assert words.endswith(f"{server.url} answers; models: qwen3")
        assert doctor(capsys, f"url={server.url}", "model=llama")[1].endswith("it does not list model llama")
        server.lists = {}
        assert doctor(capsys, f"url={server.url}")[1].endswith("answers; it lists no models")
        server.lists = {"/v1/models": {"data": [{"id": "a"}, {"id": "b"}]}}
        assert doctor(capsys, f"url={server.url}") == (
            1,
            f"{server.url} has several models, choose one: -o model=… a, b",
        )
        assert server.calls == []
    code, words = doctor(capsys, f"url={server.url}")
    assert code == 1
    assert words.startswith(f"{server.url}: the model's server cannot be reached")


def test_an_unlisted_model_is_told_to_the_owner_at_the_start(capfd: pytest.CaptureFixture[str]) -> None:
    with a_server(says("Yes.")) as server, an_engine(server.url, "model=llama"):
        pass
    assert "it does not list model llama; it lists qwen3" in capfd.readouterr().err


def test_the_document_s_tables_are_the_engine_s_options_and_params() -> None:
    document = (Path(__file__).parents[4] / "docs" / "language-models.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", document, re.MULTILINE))
    schema = loaded_eliza().capabilities.params["properties"]
    assert set(rows) == set(ChatEngine.OPTIONS) | set(schema)
    for name, option in ChatEngine.OPTIONS.items():
        default = f"{option.default:g}" if isinstance(option.default, float) else str(option.default)
        if name not in ("max_tokens", "model"):
            assert option.required or default.lower() in rows[name].split("|")[0].lower(), name
    assert f"{schema['instructions']['maxLength']:,} characters" in rows["instructions"]
    for name in ("temperature", "top_p"):
        assert f" {schema[name]['minimum']} to {schema[name]['maximum']}" in rows[name]
    assert f"up to {schema['stop']['maxItems']} texts" in rows["stop"]
    assert f"`pace_ms`: the pause between two words, {ElizaEngine.OPTIONS['pace_ms'].default} by" in document
