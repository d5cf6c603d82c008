"""The audio of ended requests, encoded as a whole: one thing with a length and ranges, within limits."""

import io
from functools import partial
from pathlib import Path

import pytest
import soundfile
import trio

from protocol.audio.encoder import CODINGS
from protocol.wire.frames import Completed
from relayd.http.audio.encoded_results import EncodedResults
from relayd.http.errors import HttpError
from tests.relayd.http.requests_api.answers import ALL, PCM, POST, one
from tests.support.audio_compare import decoded
from tests.support.fake_worker import fake_worker
from tests.support.raw_http_client import visitor
from tests.support.relay import daemon, until


@pytest.mark.trio
@pytest.mark.parametrize("name", ["mp3", "opus", "aac", "flac"])
async def test_finished_audio_is_one_thing_in_every_coding(tmp_path: Path, name: str) -> None:
    async with daemon(tmp_path, store="sqlite") as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        worker.speak(assign, PCM, end=False)
        path = one(posted, f"/audio?format={name}")
        live = await http.open("GET", path)
        worker.speak(assign, PCM, first=4)
        await live.rest()
        assert (live.headers["accept-ranges"], "content-length" in live.headers) == ("none", False)
        await relay.at_rest()
        whole = await http.get(path)
        total = len(whole.body)
        assert (whole.status, whole.headers["content-length"], whole.headers["accept-ranges"]) == (
            200,
            str(total),
            "bytes",
        )
        etag = whole.headers["etag"]
        assert (await http.get(path)).body == whole.body
        head = await http.ask("HEAD", path)
        assert (head.status, head.headers["content-length"], head.headers["etag"]) == (200, str(total), etag)
        for asked, begin, end in (("bytes=0-1", 0, 2), ("bytes=-9", total - 9, total), ("bytes=5-", 5, total)):
            part = await http.get(path, headers={"range": asked, "if-range": etag})
            assert (part.status, part.body) == (206, whole.body[begin:end]), asked
            assert part.headers["content-range"] == f"bytes {begin}-{end - 1}/{total}"
        assert (await http.get(path, headers={"range": f"bytes={total}-"})).status == 416
        assert (await http.get(path, headers={"if-none-match": f'"other", W/{etag}'})).status == 304
        assert (await http.get(path, headers={"range": "bytes=0-1", "if-range": '"other"'})).status == 200
        if name == "flac":
            assert soundfile.info(io.BytesIO(whole.body)).frames == len(ALL) // 2
        else:  # with some padding of the encoder's own
            assert 0.14 <= decoded(whole.body, name).duration_s <= 0.30
        await until(lambda: relay.http_context.encoded.idle)
    async with daemon(tmp_path, store="sqlite") as relay, visitor(relay.url) as http:
        again = await http.get(path)
        assert (again.body, again.headers["etag"]) == (whole.body, etag), "the same after a restart"


@pytest.mark.trio
async def test_encoded_results_that_are_kept_or_being_sent_have_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.http.audio.encoded_results.MAX_KEPT_BYTES", 5)
    monkeypatch.setattr("relayd.http.audio.encoded_results.MAX_SENDING_BYTES", 5)
    results, encoded = EncodedResults(), []
    async with daemon(tmp_path) as relay, visitor(relay.url) as http:
        await http.ask("POST", POST, told={"params": {"text": "x"}})
        (request,) = relay.relay.requests.values()

    async def encode(name: str) -> bytes:
        encoded.append(name)
        return name.encode() * 3

    for name in "abbab":
        async with results.open("ann", request, name, partial(encode, name)) as audio:
            assert audio.body == name.encode() * 3
    assert "".join(encoded) == "abab", "the last one is kept"
    async with results.open("ann", request, "b", partial(encode, "b")):
        with pytest.raises(HttpError, match="at once"):
            async with results.open("ann", request, "a", partial(encode, "a")):
                pytest.fail("opened")
        async with results.open("ben", request, "b", partial(encode, "b")):
            pass
        async with (
            results.open("ben", request, "b", partial(encode, "b")) as once,
            results.open("ben", request, "b", partial(encode, "b")) as twice,
        ):
            assert once is twice, "what is in memory once counts once"
    assert results.idle


def test_what_is_collected_for_a_principal_is_limited_while_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.http.audio.encoded_results.MAX_SENDING_BYTES", 5)
    results, first, second = EncodedResults(), object(), object()
    results.collect("ann", first, 3)
    results.collect("ann", second, 2)
    results.collect("ben", object(), 9)
    with pytest.raises(HttpError, match="at once"):
        results.collect("ann", second, 3)
    results.collect("ann", second, 0)
    results.collect("ann", first, 9)  # by itself, any size
    results.collect("ann", first, 0)
    assert not results.idle, "ben's"


@pytest.mark.trio
@pytest.mark.parametrize("name", CODINGS)
async def test_a_request_that_completed_without_a_sample_is_no_empty_file(tmp_path: Path, name: str) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        worker.speak(await worker.assigned(), [b""], end=False)
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                async with visitor(relay.url) as listener:
                    live = await listener.get(one(posted, f"/audio?format={name}"))
                    assert (live.status, live.error["code"]) == (502, "engine_failed")

            nursery.start_soon(listen)
            request = relay.relay.requests[posted.json["request_id"]]
            await until(lambda: len(request.log.readers) > 0)
            worker.send(Completed(request_id=request.request_id, attempt=1, seq=2, result={}))
        await relay.at_rest()
        answer = await http.get(one(posted, f"/audio?format={name}"))
        assert (answer.status, answer.error["code"], answer.error["retryable"]) == (502, "engine_failed", False)
