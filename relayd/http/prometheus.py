"""Exports the relay's counters in the format of Prometheus. docs/metrics.md lists every metric.

A scrape reads plain numbers of the relay; this module keeps no state. It iterates over spaces, workers, connections and
running requests, never over queued or ended ones, so its cost does not depend on their number.
"""

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain

import attrs
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from relayd.auth.tokens import TokenRegistry
from relayd.core.relay import Relay
from relayd.core.space import Space
from relayd.frames.frame_log import HIGH_WATER_BYTES
from relayd.scheduling.model import SpaceState, State
from relayd.stats.counters import SpaceStats, TalkStats, WyomingStats, audio_ms
from relayd.stats.histogram import Histogram
from relayd.store.records import TURN_ENDED
from relayd.views.rows import VERSION

#: Metrics of the process: CPU, memory, file descriptors, start time.
_PROCESS = ProcessCollector(registry=None)
#: A number, or one per value of an additional label.
Reading = float | Mapping[str, float]
OUTCOMES = (State.COMPLETED, State.FAILED, State.CANCELLED)
ROLES = ("client", "operator", "worker")
WORKER_STATES = ("connected", "draining", "resting", "away")


@attrs.define
class SpaceReading:
    """A space at the time of a scrape, with totals over its workers."""

    space: Space
    state: SpaceState
    stats: SpaceStats
    audio_s: float
    workers: dict[str, int] = attrs.field(factory=lambda: dict.fromkeys(WORKER_STATES, 0))
    slots: dict[str, int] = attrs.field(factory=lambda: {"busy": 0, "free": 0})
    readers: dict[str, int] = attrs.field(factory=lambda: {"keeping up": 0, "behind": 0})


@attrs.frozen
class HttpReading:
    """The numbers of the HTTP server: open connections, requests being answered, responses by status."""

    connections: int
    answering: int
    responses: Mapping[int, int]


@attrs.frozen(eq=False)
class Scrape(Collector):
    """All metrics at the time of one scrape."""

    families: list[Metric]

    @classmethod
    def of(cls, relay: Relay, tokens: TokenRegistry, http: HttpReading) -> "Scrape":
        """Read all metrics now."""
        spaces = _spaces(_read_spaces(relay))
        talk = [] if relay.config.talk is None else _talk(relay.stats.talk)
        wyoming = [] if relay.config.wyoming is None else _wyoming(relay.stats.wyoming)
        doors = [*talk, *wyoming]
        return cls([*_daemon(relay), *_http(http, tokens), *_store(relay), *spaces, *doors, *_PROCESS.collect()])

    def collect(self) -> list[Metric]:
        """Return the metrics, for `prometheus_client`."""
        return self.families

    def encode(self, accept: str = "") -> tuple[bytes, str]:
        """Return body and content type: plain text, or OpenMetrics if `accept` asks for it. Takes 0.5 ms per space."""
        encode, content_type = choose_encoder(accept)
        registry = CollectorRegistry()
        registry.register(self)
        return encode(registry), content_type


def _read_spaces(relay: Relay) -> list[SpaceReading]:
    """Read all spaces, visiting each worker once."""
    readings = {}
    for name, space in relay.spaces.items():
        state, stats = relay.scheduler.state.spaces[name], relay.stats.space(name)
        reading = readings[name] = SpaceReading(space, state, stats, stats.audio_ms / 1000)
        running = [relay.requests[request_id] for request_id in state.running]
        reading.audio_s = (stats.audio_ms + sum(map(audio_ms, running))) / 1000
        for reader in chain.from_iterable(request.log.readers for request in running):
            reading.readers["behind" if reader.sink.backlog_bytes >= HIGH_WATER_BYTES else "keeping up"] += 1
    for worker in relay.scheduler.state.workers.values():
        resting = relay.scheduler.state.is_resting(worker)
        worker_state = "draining" if worker.draining else "resting" if resting else "connected"
        worker_state = worker_state if worker.linked else "away"
        for reading in filter(None, map(readings.get, worker.spaces)):
            reading.workers[worker_state] += 1
            if worker.linked:
                reading.slots["busy"] += len(worker.held)
                reading.slots["free"] += worker.free_slots
    return list(readings.values())


def _daemon(relay: Relay) -> Iterator[Metric]:
    settings, frames = relay.config, {"in": relay.stats.frame_bytes, "out": relay.stats.sent_bytes(relay.clients)}
    version = {"version": VERSION, "python": platform.python_version()}
    build = GaugeMetricFamily("relayd_build_info", "1, with the versions of relayd and Python.", labels=list(version))
    build.add_metric(list(version.values()), 1)
    yield build
    yield _one("relayd_draining", "1 while the relay accepts no new requests and is about to exit.", _flag(relay))
    yield _one("relayd_connections", "Connections that are logged in, by role.", _connections(relay), "role")
    yield _one(
        "relayd_connections_limit",
        "Maximum number of connections (limits.max_connections).",
        settings.limits.max_connections,
    )
    yield _one(
        "relayd_slow_readers_total",
        "Connections closed because they read nothing for limits.stall_timeout_s.",
        relay.slow_consumers,
    )
    yield _one("relayd_frames_total", "Frames received from workers.", relay.stats.frames)
    yield _one("relayd_frames_dropped_total", "Frames dropped because their attempt was over.", relay.fenced_frames)
    yield _one("relayd_frame_bytes_total", "Bytes of frames: in from workers, out to readers.", frames, "direction")
    yield _one(
        "relayd_requests_misdirected_total",
        "Rejected requests to spaces that do not exist, by error code.",
        relay.stats.rejected,
        "code",
    )


def _http(http: HttpReading, tokens: TokenRegistry) -> Iterator[Metric]:
    responses = {str(status): count for status, count in http.responses.items()}
    yield _one("relayd_http_responses_total", "HTTP responses, by status.", responses, "status")
    yield _one(
        "relayd_logins_refused_total", "Refused logins over all protocols, by error code.", tokens.refused, "code"
    )
    yield _one("relayd_http_connections", "Open connections that use plain HTTP.", http.connections)
    yield _one("relayd_http_answering", "HTTP requests being answered, including this one.", http.answering)


def _flag(relay: Relay) -> float:
    return float(relay.draining.is_set())


def _connections(relay: Relay) -> dict[str, int]:
    counts = dict.fromkeys(ROLES, 0)
    for connection in relay.connections.values():
        counts[connection.principal.role] += 1
    return counts


def _store(relay: Relay) -> Iterator[Metric]:
    store, results, settings = relay.store, relay.results, relay.config.results
    commits = HistogramMetricFamily(
        "relayd_store_commit_seconds", "Time until a commit was durable; each `accepted` waits for one."
    )
    _add_histogram(commits, [], store.commit_s)
    yield commits
    yield _one(
        "relayd_store_failed_commits_total",
        "Commits that failed; their callers were refused.",
        store.failed_commits,
    )
    yield _one("relayd_store_transactions_total", "Transactions written, each with one fsync.", store.transactions)
    yield _one("relayd_store_queued", "Calls whose changes are not written yet.", store.queued)
    yield _one("relayd_store_dropped_total", "Changes that were lost.", store.dropped)
    yield _one(
        "relayd_store_records_set_aside",
        "Records that could not be read or restored at the start; the log names them.",
        relay.records_set_aside,
    )
    yield _one("relayd_result_memory_bytes", "Bytes of frames in memory.", results.memory.held_bytes)
    yield _one(
        "relayd_result_memory_limit_bytes", "Limit for frames in memory (results.memory_bytes).", settings.memory_bytes
    )
    yield _one("relayd_result_disk_bytes", "Bytes of frames in files.", results.disk_bytes)
    yield _one("relayd_result_disk_limit_bytes", "Limit for frames in files (results.disk_bytes).", settings.disk_bytes)
    yield _one("relayd_results_unsaved", "Results of ended requests that are only in memory.", results.unsaved_count)


def _wyoming(stats: WyomingStats) -> Iterator[Metric]:
    yield _one("relayd_wyoming_connections", "Open connections of the Wyoming protocol.", stats.connections)
    yield _one("relayd_wyoming_asked_total", "What was asked for, by event.", stats.asked, "event")
    yield _one("relayd_wyoming_errors_total", "Connections that were ended with an error.", stats.errors, "code")


def _talk(stats: TalkStats) -> Iterator[Metric]:
    yield _one("relayd_talk_conversations", "Conversations that are kept.", stats.talks)
    yield _one("relayd_talk_replies", "Replies that wait or are being made.", stats.unended)
    yield _one("relayd_talk_websockets", "Open WebSockets, by dialect.", stats.websockets, "dialect")
    ended = dict.fromkeys(TURN_ENDED, 0) | stats.turns
    yield _one("relayd_talk_turns_total", "Replies that have ended, by state.", ended, "state")
    yield _one(
        "relayd_talk_unspoken_total",
        "Replies that were not spoken to their end, by error code.",
        stats.unspoken,
        "code",
    )
    yield _one("relayd_talk_calls", "Calls that live.", stats.calls)
    ended = {"hung_up": stats.calls_hung_up} | stats.calls_failed
    yield _one("relayd_talk_calls_total", "Calls that have ended, by how: hung_up, or an error code.", ended, "end")
    for name, documentation, histogram in (
        ("relayd_talk_first_word_seconds", "From what was said to the first word of the reply.", stats.first_word_s),
        ("relayd_talk_first_audio_seconds", "From what was said to the first sample of it.", stats.first_audio_s),
    ):
        family = HistogramMetricFamily(name, documentation)
        _add_histogram(family, [], histogram)
        yield family


def _spaces(readings: list[SpaceReading]) -> Iterator[Metric]:
    each = partial(_each, readings)
    histogram_each = partial(_histogram_each, readings)
    yield each("relayd_space_paused", "1 while the space starts and accepts no requests.", lambda s: s.state.paused)
    yield each("relayd_requests_accepted_total", "Requests stored and queued.", lambda s: s.stats.accepted.total)
    yield each(
        "relayd_requests_ended_total",
        "Requests that have ended, by outcome.",
        lambda s: {outcome: s.space.ended.get(outcome, 0) for outcome in OUTCOMES},
        "outcome",
    )
    yield each("relayd_requests_failed_total", "Failed requests, by error code.", lambda s: s.stats.failed, "code")
    yield each(
        "relayd_requests_rejected_total", "Rejected requests, by error code.", lambda s: s.stats.rejected, "code"
    )
    yield each(
        "relayd_requests_retried_total",
        "Lost attempts whose requests returned to the queue.",
        lambda s: s.stats.retried,
    )
    yield each(
        "relayd_requests_resumed_total",
        "Requests that continued after their worker reconnected.",
        lambda s: s.stats.resumed,
    )
    yield each(
        "relayd_cache_hits_total",
        "Requests answered with the frames of an equal one, which ran before or at the same time.",
        lambda s: s.stats.cache_hits,
    )
    yield each(
        "relayd_cache_misses_total",
        "Requests of spaces with a cache for which there was no equal one.",
        lambda s: s.stats.cache_misses,
    )
    yield each("relayd_live_input_bytes_total", "Bytes of live inputs that clients fed.", lambda s: s.stats.input_bytes)
    yield each("relayd_live_input_pieces_total", "Pieces in which those bytes came.", lambda s: s.stats.input_pieces)
    yield each(
        "relayd_requests_uploading", "Admitted requests that are not queued yet.", lambda s: len(s.state.admitted)
    )
    yield each("relayd_requests_queued", "Requests waiting for a slot.", lambda s: len(s.state.queue))
    yield each(
        "relayd_requests_queued_limit",
        "Maximum number of queued requests (max_queued).",
        lambda s: s.space.config.max_queued,
    )
    yield each("relayd_requests_running", "Running requests.", lambda s: len(s.state.running))
    yield histogram_each(
        "relayd_request_wait_seconds", "Time in the queue, of requests assigned to a worker.", lambda s: s.stats.wait_s
    )
    yield histogram_each(
        "relayd_request_first_audio_seconds", "Time from submit to first output.", lambda s: s.stats.first_audio_s
    )
    yield histogram_each(
        "relayd_request_run_seconds", "Time from assignment to the end, of completed requests.", lambda s: s.stats.run_s
    )
    yield histogram_each(
        "relayd_request_real_time_factor",
        "Run time per second of audio, of completed requests.",
        lambda s: s.stats.real_time_factor,
    )
    yield each(
        "relayd_audio_seconds_total",
        "Audio produced by workers, including that of requests that did not complete.",
        lambda s: s.audio_s,
    )
    yield each(
        "relayd_readers",
        "Readers of running requests; frames wait for readers that are behind.",
        lambda s: s.readers,
        "state",
    )
    yield each(
        "relayd_workers", "Workers by state; a worker of several spaces counts in each.", lambda s: s.workers, "state"
    )
    yield each(
        "relayd_worker_slots",
        "Slots of connected workers; slots of a draining worker are not free.",
        lambda s: s.slots,
        "state",
    )
    yield each(
        "relayd_worker_reconnects_total",
        "Registrations of workers that had registered before.",
        lambda s: s.stats.reconnects,
    )


# -- metric families ----------------------------------------------------------------------------------------------


def _family(name: str, documentation: str, labels: Iterable[str]) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return kind(name, documentation, labels=list(labels))


def _one(name: str, documentation: str, value: Reading, label: str = "") -> Metric:
    """Build a metric of the whole relay."""
    family = _family(name, documentation, [label] if label else ())
    _add(family, [], value)
    return family


def _each(
    readings: list[SpaceReading],
    name: str,
    documentation: str,
    read: Callable[[SpaceReading], Reading],
    label: str = "",
) -> Metric:
    """Build a metric with a value per space."""
    family = _family(name, documentation, ["space", label] if label else ["space"])
    for reading in readings:
        _add(family, [reading.space.name], read(reading))
    return family


def _add(family: CounterMetricFamily | GaugeMetricFamily, labels: list[str], value: Reading) -> None:
    if isinstance(value, Mapping):
        for key, number in value.items():
            family.add_metric([*labels, key], number)
    else:
        family.add_metric(labels, value)


def _histogram_each(
    readings: list[SpaceReading], name: str, documentation: str, read: Callable[[SpaceReading], Histogram]
) -> HistogramMetricFamily:
    """Build a histogram per space."""
    family = HistogramMetricFamily(name, documentation, labels=["space"])
    for reading in readings:
        _add_histogram(family, [reading.space.name], read(reading))
    return family


def _add_histogram(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    buckets, total = [], 0
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    family.add_metric(labels, buckets, histogram.sum)
