"""Outputs over HTTP: as the bytes they are, with their media type, whole, in parts and in ranges."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from protocol.wire.frames import Audio, Completed, Failed, Output, Progress, Started
from protocol.wire.messages import Assign
from relayd.auth.result_links import LinkGrant
from relayd.http.authentication import result_name
from tests.relayd.http.requests_api.answers import ALL, PCM, POST, one
from tests.support.fake_worker import FORMAT, FakeWorker, fake_worker, identity
from tests.support.raw_http_client import events_of, visitor
from tests.support.relay import an_id, daemon

PNG = b"\x89PNG\r\n\x1a\n" + hashlib.shake_256(b"png").digest(5000)
MADE: tuple[dict[str, Any], ...] = (
    {"data": PNG, "media_type": "image/png"},
    {"data": "words ✓"},
    {"data": PNG[:700], "media_type": "video/mp4", "more": True},
    {"data": PNG[700:], "media_type": "video/mp4"},
    {"data": {"a": [1, b"\0"]}},
    {"data": b"<script>", "media_type": "text/html"},
    {"data": b"old worker"},
    {"data": "<svg/>", "media_type": "image/svg+xml"},
    {"data": b"", "media_type": "image/png"},
)


def make(worker: FakeWorker, assign: Assign, outputs: Sequence[dict[str, Any]], *, end: bool = True) -> None:
    """Send the frames of a request whose outputs these are."""
    worker.send(Started(**identity(assign, 0)))
    for seq, output in enumerate(outputs, 1):
        worker.send(Output(**identity(assign, seq), **output))
    if end:
        worker.send(Completed(**identity(assign, len(outputs) + 1)))


@pytest.mark.trio
async def test_each_output_is_answered_as_what_it_is(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        make(worker, await worker.assigned(), MADE)
        await relay.at_rest()
        link = posted.json["links"]["output"]
        short = posted.json["request_id"][:8]
        for path, kind, body, disposition in (
            (link, "image/png", PNG, f'inline; filename="{short}-0.png"'),
            (f"{link}/0", "image/png", PNG, f'inline; filename="{short}-0.png"'),
            (f"{link}/1", "text/plain; charset=utf-8", "words ✓".encode(), f'inline; filename="{short}-1.txt"'),
            (f"{link}/2", "video/mp4", PNG, f'inline; filename="{short}-2.mp4"'),
            (f"{link}/3", "application/json", b'{"a":[1,{"base64":"AA=="}]}', f'inline; filename="{short}-3.json"'),
            (f"{link}/4", "text/html", b"<script>", f'attachment; filename="{short}-4.html"'),
            (f"{link}/5", "application/octet-stream", b"old worker", f'attachment; filename="{short}-5.bin"'),
            (f"{link}/6", "image/svg+xml", b"<svg/>", f'attachment; filename="{short}-6.svg"'),
            (f"{link}/7", "image/png", b"", f'inline; filename="{short}-7.png"'),
        ):
            answer = await http.get(path)
            assert (answer.status, answer.headers["content-type"], answer.body) == (200, kind, body), path
            assert answer.headers["content-disposition"] == disposition
            assert answer.headers["content-length"] == str(len(body))
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "sandbox" in answer.headers["content-security-policy"]
        for number in ("8", "x", "-1", "9" * 30, "%D9%A3"):
            answer = await http.get(f"{link}/{number}")
            assert answer.status == 404, number
        assert "it made 8" in (await http.get(f"{link}/8")).error["message"]
        told = events_of((await http.get(one(posted, "/events"))).body)
        assert told[1][2]["media_type"] == "image/png"
        assert "media_type" not in told[2][2]


@pytest.mark.trio
async def test_an_output_of_an_ended_request_is_answered_in_ranges(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        make(worker, await worker.assigned(), MADE)
        await relay.at_rest()
        path = one(posted, "/output/2")
        part = await http.get(path, headers={"range": "bytes=690-709"})
        assert (part.status, part.body) == (206, PNG[690:710])
        assert part.headers["content-range"] == f"bytes 690-709/{len(PNG)}"
        changed = await http.get(path, headers={"range": "bytes=0-1", "if-range": '"other"'})
        assert (changed.status, changed.body) == (200, PNG)
        beyond = await http.get(path, headers={"range": f"bytes={len(PNG)}-"})
        assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{len(PNG)}")
        head = await http.ask("HEAD", path)
        assert (head.status, head.headers["content-length"], head.body) == (200, str(len(PNG)), b"")


@pytest.mark.trio
async def test_an_output_is_sent_while_its_request_runs(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        make(worker, assign, MADE[:3], end=False)
        answer = await http.open("GET", one(posted, "/output/2"))
        await answer.until(PNG[:700])
        assert (answer.status, answer.headers["accept-ranges"]) == (200, "none")
        worker.send(Progress(**identity(assign, 4)))
        worker.send(Output(**identity(assign, 5), **MADE[3]))
        await answer.rest()
        assert answer.body == PNG, "it ends with its last part, and not with its request"
        worker.send(Completed(**identity(assign, 6)))
        await relay.at_rest()


@pytest.mark.trio
async def test_a_request_without_that_output_says_so(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        worker.send(Started(**identity(assign, 0), format=FORMAT))
        worker.send(Audio(**identity(assign, 1), pcm=PCM[0]))
        worker.send(Completed(**identity(assign, 2)))
        answer = await http.get(one(posted, "/output"))
        assert (answer.status, answer.error["code"]) == (404, "no_output")
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        worker.send(Failed(**identity(assign, 0), code="engine_failed", message="no air"))
        await relay.at_rest()
        answer = await http.get(one(posted, "/output"))
        assert (answer.status, answer.error["message"]) == (502, "no air")
        assert (await http.get(f"/v1/requests/{'0' * 32}/output")).status == 404


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_link_opens_one_result_without_a_token_until_it_expires(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, listen="127.0.0.1:0") as relay,
        fake_worker(relay.url) as worker,
        visitor(relay.urls[0]) as stranger,
    ):
        ann = relay.tokens.create(role="client", name="ann", now=0.0)
        async with visitor(relay.urls[0], token=ann.text) as http:
            posted = [await http.ask("POST", POST, told={"params": {"text": "x"}}) for _ in range(2)]
            worker.speak(await worker.assigned(), PCM)
            make(worker, await worker.assigned(), MADE)
            await relay.at_rest()
            audio = (await http.get(one(posted[0], "/link?expires_s=60"))).json
            forwarded = {"x-forwarded-host": "evil.example", "x-forwarded-proto": "evil", "host": "evil.example"}
            output = (await http.get(one(posted[1], "/link"), headers=forwarded)).json
            assert "evil" not in str(output), "a link names no host that a header could change"
            for secret in (ann.text, ann.text.split("_", 2)[-1]):  # the random part may have more of them
                assert secret not in str((audio, output))

            heard = await stranger.get(audio["url"] + "&format=pcm")
            assert (heard.status, heard.body) == (200, ALL)
            part = await stranger.get(audio["url"] + "&format=pcm", headers={"range": "bytes=2-5"})
            assert (part.status, part.body) == (206, ALL[2:6])
            mp3 = await stranger.get(audio["url"] + "&format=mp3")
            assert (mp3.status, mp3.headers["content-type"]) == (200, "audio/mpeg")
            shown = await stranger.get(output["url"])
            assert (shown.headers["content-type"], shown.body) == ("image/png", PNG)
            assert (await stranger.get(output["url"].replace("/output", "/output/1"))).body == "words ✓".encode()

            signed = audio["url"].partition("?")[2]
            for path in ("", "/events", "/link"):
                assert (await stranger.get(one(posted[0], f"{path}?{signed}"))).status == 401, path
            assert (await stranger.ask("DELETE", one(posted[0], f"?{signed}"))).status == 401
            assert (await stranger.get(f"/v1/spaces?{signed}")).status == 401
            other = await stranger.get(one(posted[1], f"/output?{signed}"))
            assert (other.status, other.error["code"]) == (401, "unauthenticated")
            at = signed.index("=") + 1
            for damaged in (signed[:at] + "9" + signed[at:], signed[:-2] + "xx", signed + "x", "link=", "link=1..x"):
                assert (await stranger.get(one(posted[0], f"/audio?{damaged}"))).status == 401, damaged

            for wrong in ("0", "-1", "x", "1e3", "99999999999", "", "%D9%A3"):
                answer = await http.get(one(posted[0], f"/link?expires_s={wrong}"))
                assert (answer.status, list(answer.error["details"])) == (422, ["expires_s"]), wrong
            assert (await stranger.get(one(posted[0], "/link"))).status == 401
            bob = relay.tokens.create(role="client", name="bob", now=0.0)
            async with visitor(relay.urls[0], token=bob.text) as foreign:
                assert (await foreign.get(one(posted[0], "/link"))).status == 404

            ended = LinkGrant(int(time.time()) - 1, ann.record.token_id)
            late = relay.http_context.links.make(result_name(relay.relay.requests[posted[0].json["request_id"]]), ended)
            assert "expired" in (await stranger.get(one(posted[0], f"/audio?link={late}"))).error["message"]
            relay.tokens.revoke(ann.record.token_id, time.time())
            assert (await stranger.get(audio["url"])).status == 401, "the link ends with its token"


@pytest.mark.trio
async def test_a_link_opens_no_later_request_of_the_same_id_and_has_its_principals_limits(tmp_path: Path) -> None:
    limits = {"principal": {"requests_per_s": 0.4}}
    async with (
        daemon(tmp_path, listen="127.0.0.1:0", limits=limits) as relay,
        fake_worker(relay.url) as worker,
        visitor(relay.url) as http,
        visitor(relay.urls[0]) as stranger,
    ):
        path = f"/v1/requests/{an_id()}"

        async def make_again() -> str:
            await http.ask("PUT", f"{path}?space=tts", told={"params": {"text": "x"}})
            worker.speak(await worker.assigned(), PCM)
            await relay.at_rest()
            (request,) = relay.relay.requests.values()
            request.created_unix -= 5  # as time would have it
            link: str = (await http.get(f"{path}/link")).json["links"]["audio"]
            return link

        link = await make_again()
        assert [(await stranger.get(link)).status for _ in range(3)] == [200, 200, 429]
        (request,) = relay.relay.requests.values()
        relay.relay.remove_request(request)
        await make_again()
        (request,) = relay.relay.requests.values()
        request.created_unix += 1
        assert (await stranger.get(link)).status == 401, "it was for the request before"


@pytest.mark.trio
async def test_a_link_lasts_over_a_restart_and_its_guesses_are_counted(tmp_path: Path) -> None:
    async with daemon(tmp_path, store="sqlite") as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}, "detach": True})
        make(worker, await worker.assigned(), MADE)
        await relay.at_rest()
        link = (await http.get(one(posted, "/link"))).json["url"]
        assert "/output?link=" in link
        kept = tmp_path / "link.key"
        assert (kept.stat().st_mode & 0o777, len(kept.read_bytes())) == (0o600, 32)
    async with daemon(tmp_path, store="sqlite", listen="127.0.0.1:0") as relay, visitor(relay.urls[0]) as stranger:
        assert (await stranger.get(link)).body == PNG
        for _ in range(10):
            assert (await stranger.get(link[:-3] + "xxx")).status == 401
        assert (await stranger.get(link[:-3] + "xxx")).status == 429
        assert (await stranger.get(link)).status == 200
    kept.write_bytes(b"half")
    async with daemon(tmp_path, store="sqlite", listen="127.0.0.1:0") as relay, visitor(relay.urls[0]) as stranger:
        assert (await stranger.get(link)).status == 401
        assert len(kept.read_bytes()) == 32
    async with daemon(tmp_path, store="sqlite", http={"link_s": 0}) as relay, visitor(relay.url) as http:
        assert "link_s" in (await http.get(one(posted, "/link"))).error["message"]
    kept.unlink()
    kept.mkdir()
    async with daemon(tmp_path, store="sqlite") as relay, visitor(relay.url) as http:
        fresh = (await http.get(one(posted, "/link"))).json["url"]
        assert (await http.get(fresh)).body == PNG, "a key that cannot be kept does not stop the relay"
