"""What Prometheus is told: that it is true, that it is well-formed, and that asking costs the same whatever waits."""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from protocol.wire.frames import Audio, Failed
from protocol.wire.messages import Cancel, Rejected
from protocol.wire.structs import Running
from relayd.auth.tokens import TokenRegistry
from relayd.core.relay import Relay
from relayd.http.prometheus import HttpReading, Scrape
from relayd.stats.counters import MAX_SEEN_WORKERS, Stats
from relayd.stats.histogram import Histogram
from tests.support.fake_worker import fake_worker, identity, samples
from tests.support.relay import a_submit, an_id, daemon, peer, until

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"
#: A second of audio at 24 kHz.
SECOND = samples(24_000)
NO_HTTP = HttpReading(0, 0, {})


class Told:
    """What was told at one moment."""

    def __init__(self, relay: Relay) -> None:
        body, self.content_type = Scrape.of(relay, TokenRegistry(), NO_HTTP).encode()
        self.text = body.decode()
        self._told = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in parser.text_string_to_metric_families(self.text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        """A sample of `relayd_NAME`; of space `tts` where nothing else is said."""
        for asked in (labels, {"space": "tts"} | labels):
            if (told := self._told.get((f"relayd_{name}", frozenset(asked.items())))) is not None:
                return told
        return None

    def series(self, name: str) -> set[str]:
        """The spaces that `relayd_NAME` is told of."""
        return {dict(labels)["space"] for sample, labels in self._told if sample == f"relayd_{name}"}


@pytest.mark.trio
async def test_what_becomes_of_requests_is_counted_by_space(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"spaces": {"tts": {"max_queued": 1}}}
    async with daemon(tmp_path, **limits) as relay, peer(relay.url, "client") as client:
        async with fake_worker(relay.url) as worker:
            spoken, broken, stopped = a_submit("a"), a_submit("b"), a_submit("c")
            client.send(spoken)
            assign = await worker.assigned()
            worker.speak(assign, [SECOND] * 2, end=False)
            await until(lambda: Told(relay.relay)("audio_seconds_total") == 2)  # while it is being made
            worker.speak(assign, [SECOND] * 2, first=3)
            await client.frames(spoken)
            client.send(broken)
            assign = await worker.assigned()
            worker.send(Failed(**identity(assign, 0), code="a word of the worker's own", message="no", retryable=False))
            await client.frames(broken)
            client.send(stopped)
            await worker.assigned()
            for _ in range(2):  # the first of them waits
                client.send(a_submit())
            assert (await client.next(Rejected)).code == "queue_full"
            await until(lambda: Told(relay.relay)("requests_queued") == 1)
            told = Told(relay.relay)
            assert (told("requests_running"), told("requests_queued"), told("requests_queued_limit")) == (1, 1, 1)
            assert (told("worker_slots", state="busy"), told("worker_slots", state="free")) == (1, 0)
            assert told("workers", state="connected") == 1
            assert (told("connections", role="worker"), told("connections", role="operator")) == (1, 0)
        client.send(Cancel(request_id=stopped.request_id, reason="enough"))
        client.send(a_submit(space="anybodys-word"))
        assert (await client.next(Rejected)).code == "space_not_found"
        told = Told(relay.relay)
    assert told("requests_accepted_total") == 4
    assert told("requests_ended_total", outcome="completed") == 1
    assert told("requests_ended_total", outcome="failed") == 1
    assert told("requests_failed_total", code="other") == 1
    assert told("requests_rejected_total", code="queue_full") == 1
    assert told("requests_misdirected_total", code="space_not_found") == 1
    assert told("audio_seconds_total") == 2
    assert told("request_wait_seconds_count") == 3
    assert told("request_first_audio_seconds_count") == 1
    assert told("request_run_seconds_count") == told("request_real_time_factor_count") == 1
    assert told("workers", state="connected") == 0
    assert told("frames_total") == 3
    assert (told("frame_bytes_total", direction="in") or 0) > 2 * len(SECOND)
    assert told.series("requests_queued") == {"tts", "check"}


@pytest.mark.trio
async def test_cuts_are_counted_as_reconnects_resumed_and_retried(tmp_path: Path) -> None:
    instance = an_id()
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        submit = a_submit()
        client.send(submit)
        async with fake_worker(relay.url, instance=instance) as worker:
            assign = await worker.assigned()
            worker.speak(assign, [SECOND], end=False)
            await until(lambda: Told(relay.relay)("audio_seconds_total") == 1)
            await worker.peer.cut()
        running = (Running(request_id=submit.request_id, attempt=1, next_seq=2),)
        async with fake_worker(relay.url, instance=instance, running=running) as worker:
            await until(lambda: Told(relay.relay)("requests_resumed_total") == 1)
            told = Told(relay.relay)
            assert (told("worker_reconnects_total"), told("requests_retried_total")) == (1, 0)
            crash: dict[str, Any] = {"code": "engine_failed", "message": "it crashed", "retryable": True}
            worker.send(Failed(**identity(assign, 2), **crash))  # heard already, so the request fails
            await until(lambda: Told(relay.relay)("requests_failed_total", code="engine_failed") == 1)
            client.send(again := a_submit("again"))
            assign = await worker.assigned()
            worker.send(Failed(**identity(assign, 0), **crash))
            assign = await worker.assigned()
            assert (assign.request_id, assign.attempt) == (again.request_id, 2)
            told = Told(relay.relay)
            assert (told("requests_retried_total"), told("request_wait_seconds_count")) == (1, 3)
            assert (told("request_wait_seconds_sum") or 0) < 60
            worker.speak(assign, [SECOND])
            await client.frames(again)
            assert Told(relay.relay)("audio_seconds_total") == 2


@pytest.mark.trio
async def test_audio_of_an_attempt_that_is_begun_anew_stays_counted(tmp_path: Path) -> None:
    """A counter that goes down is taken for one that began again at zero, and all of it counted twice."""
    async with daemon(tmp_path, limits={"worker_grace_s": 0.05}) as relay, peer(relay.url, "client") as client:
        submit = a_submit(retry="always")
        client.send(submit)
        async with fake_worker(relay.url, name="first") as worker:
            worker.speak(await worker.assigned(), [SECOND] * 3, end=False)
            await until(lambda: Told(relay.relay)("audio_seconds_total") == 3)
        async with fake_worker(relay.url, name="second") as worker:
            assign = await worker.assigned()
            assert Told(relay.relay)("audio_seconds_total") == 3
            worker.speak(assign, [SECOND])
            await until(lambda: not relay.relay.requests[submit.request_id].live)
            assert Told(relay.relay)("audio_seconds_total") == 4


@pytest.mark.trio
async def test_audio_stays_counted_whatever_becomes_of_its_attempt(tmp_path: Path) -> None:
    """What the relay tells of itself counts as its metrics do: also audio of an attempt that is lost."""
    async with daemon(tmp_path, limits={"worker_grace_s": 0.05}) as relay, peer(relay.url, "client") as client:
        submit, stats = a_submit(retry="always"), relay.relay.stats

        def told_s() -> float:
            relay.relay.sample(trio.current_time())
            assert stats.audio_s == Told(relay.relay)("audio_seconds_total")
            return stats.audio_s

        client.send(submit)
        async with fake_worker(relay.url, name="first") as worker:
            assign = await worker.assigned()
            worker.speak(assign, [SECOND] * 2, end=False)
            await until(lambda: told_s() == 2)
            worker.send(Audio(**identity(assign, 3), pcm=SECOND))
            await until(lambda: told_s() == 3)
        async with fake_worker(relay.url, name="second") as worker:
            assign = await worker.assigned()
            assert told_s() == 3
            worker.speak(assign, [SECOND])
            await until(lambda: not relay.relay.requests[submit.request_id].live)
            assert told_s() == 4
        assert stats.audio.total == 4


@pytest.mark.trio
async def test_readers_that_take_nothing_are_told_from_others(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, listen="127.0.0.1:0", http={"metrics": "public"}) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url) as worker,
    ):
        submit = a_submit()
        client.send(submit)
        assign = await worker.assigned()
        worker.speak(assign, [SECOND], end=False)
        await client.next(Audio)
        asked = f"GET /v1/requests/{submit.request_id}/events HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        async with await trio.open_unix_socket(relay.url.removeprefix("unix:")) as listener:
            await listener.send_all(asked)
            await until(lambda: Told(relay.relay)("readers", state="keeping up") == 2)
            for seq in range(2, 130):  # more than a socket's buffers hold
                worker.send(Audio(**identity(assign, seq), pcm=SECOND))
                await client.next(Audio)
            await until(lambda: Told(relay.relay)("readers", state="behind") == 1)
            assert Told(relay.relay)("readers", state="keeping up") == 1


@pytest.mark.trio
async def test_commits_are_timed(tmp_path: Path) -> None:
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        before = Told(relay.relay)("store_commit_seconds_count") or 0
        client.send(a_submit())
        await until(lambda: Told(relay.relay)("requests_accepted_total") == 1)
        told = Told(relay.relay)
        assert told("store_commit_seconds_count") == before + 1
        assert (told("store_commit_seconds_sum") or 0) > 0
        assert (told("store_transactions_total") or 0) >= 1


@pytest.mark.trio
async def test_a_space_that_is_closed_is_told_of_no_more(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        assert relay.relay.spaces.close("check") is None
        assert Told(relay.relay).series("requests_queued") == {"tts"}


@pytest.mark.trio
async def test_promtool_finds_no_fault_in_what_is_told(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        async with fake_worker(relay.url) as worker:
            client.send(submit := a_submit())
            worker.speak(await worker.assigned(), [SECOND])
            await client.frames(submit)
        client.send(a_submit(space="nothing"))
        await client.next(Rejected)
        text = Told(relay.relay).text
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)  # noqa: ASYNC221
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.trio
async def test_openmetrics_is_told_to_who_asks_for_it(tmp_path: Path) -> None:
    """Prometheus does."""
    async with daemon(tmp_path) as relay:
        body, content_type = Scrape.of(relay.relay, TokenRegistry(), NO_HTTP).encode(
            "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
        )
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    families = openmetrics_parser.text_string_to_metric_families(body.decode())  # type: ignore[no-untyped-call]
    names = {family.name for family in families}
    assert {"relayd_build_info", "relayd_requests_ended", "relayd_store_commit_seconds"} <= names


@pytest.mark.trio
async def test_a_scrape_costs_the_same_however_many_requests_there_are(tmp_path: Path) -> None:
    """Counted in calls of functions, which do not depend on the machine."""
    roomy: dict[str, Any] = {"spaces": {"tts": {"max_queued": 5_000, "max_queued_per_principal": 5_000}}}
    async with (
        daemon(tmp_path, **roomy) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url) as worker,
    ):
        client.send(first := a_submit(detach=True))
        await until(lambda: first.request_id in relay.relay.requests)
        await worker.assigned()
        few = calls_of(lambda: Scrape.of(relay.relay, TokenRegistry(), NO_HTTP).encode())
        for _ in range(300):
            client.send(a_submit(detach=True))
        await client.settled()
        await until(lambda: len(relay.relay.scheduler.state.spaces["tts"].queue) == 300)
        many = calls_of(lambda: Scrape.of(relay.relay, TokenRegistry(), NO_HTTP).encode())
        for request in list(relay.relay.requests.values())[1:]:
            relay.relay.cancel(request, "enough")
        await until(lambda: not relay.relay.finalizer.unfinalized)
        ended = calls_of(lambda: Scrape.of(relay.relay, TokenRegistry(), NO_HTTP).encode())
    assert few > 1_000
    # The digits of a number, and a first number of its kind, may cost a call or two.
    assert abs(many - few) < few / 100
    assert abs(ended - few) < few / 100


def calls_of(do: Callable[[], object]) -> int:
    """Functions called, in Python and in C."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    do()  # what is done once is done
    sys.setprofile(count)
    try:
        do()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.trio
async def test_the_document_names_every_metric_and_no_other(tmp_path: Path) -> None:
    async with daemon(tmp_path, talk={"reply": "check"}, wyoming={"listen": "127.0.0.1:0"}) as relay:
        text = Told(relay.relay).text
    told: Mapping[str, str] = dict(re.findall(r"^# TYPE (relayd_\w+) (\w+)$", text, re.MULTILINE))
    documented = dict(re.findall(r"^\| `(relayd_\w+)[^|]*` \| (\w+) \|", DOCUMENT.read_text(), re.MULTILINE))
    assert documented == told


def test_a_histogram_counts_a_value_with_the_bound_that_it_does_not_exceed() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 3.0):
        histogram.add(value)
    assert (histogram.counts, histogram.sum) == ([2, 2, 1], 7.5)


@pytest.mark.trio
async def test_workers_that_were_here_are_remembered_within_bounds() -> None:
    await trio.lowlevel.checkpoint()
    stats = Stats()
    stats.count_registration("box", ["tts"])
    for number in range(MAX_SEEN_WORKERS - 1):
        stats.count_registration(f"other{number}", ["tts"])
    stats.count_registration("box", ["tts"])
    assert stats.space("tts").reconnects == 1
    for number in range(MAX_SEEN_WORKERS):
        stats.count_registration(f"another{number}", ["tts"])
    stats.count_registration("box", ["tts"])
    assert stats.space("tts").reconnects == 1
