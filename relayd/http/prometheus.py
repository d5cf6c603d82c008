"""The relay's counters in the format of Prometheus. docs/metrics.md lists every name.

Nothing is kept here: a scrape reads plain numbers of the relay. It looks at spaces, workers, connections and what runs,
and never at the requests that wait or have ended, so that it costs the same however many those are.
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
from relayd.stats.counters import SpaceStats, audio_ms
from relayd.stats.histogram import Histogram
from relayd.views.rows import VERSION

#: CPU, memory, file descriptors, start time.
_PROCESS = ProcessCollector(registry=None)
#: A number, or one for each value of a further label.
Reading = float | Mapping[str, float]
OUTCOMES = (State.COMPLETED, State.FAILED, State.CANCELLED)
ROLES = ("client", "operator", "worker")
WORKER_STATES = ("connected", "draining", "away")


@attrs.define
class SpaceReading:
    """A space at the moment of a scrape, with what its workers come to."""

    space: Space
    state: SpaceState
    stats: SpaceStats
    audio_s: float
    workers: dict[str, int] = attrs.field(factory=lambda: dict.fromkeys(WORKER_STATES, 0))
    slots: dict[str, int] = attrs.field(factory=lambda: {"busy": 0, "free": 0})
    readers: dict[str, int] = attrs.field(factory=lambda: {"keeping up": 0, "behind": 0})


@attrs.frozen
class HttpReading:
    """Of the HTTP side: connections that are open, requests that are being answered, responses by their status."""

    connections: int
    answering: int
    responses: Mapping[int, int]


@attrs.frozen(eq=False)
class Scrape(Collector):
    """All metrics, as they were when they were read."""

    families: list[Metric]

    @classmethod
    def of(cls, relay: Relay, tokens: TokenRegistry, http: HttpReading) -> "Scrape":
        """Read everything now."""
        spaces = _spaces(_read_spaces(relay))
        return cls([*_daemon(relay), *_http(http, tokens), *_store(relay), *spaces, *_PROCESS.collect()])

    def collect(self) -> list[Metric]:
        """As `prometheus_client` asks for them."""
        return self.families

    def encode(self, accept: str = "") -> tuple[bytes, str]:
        """Body and content type: plain text, or OpenMetrics where `accept` asks for it. Takes 0.5 ms a space."""
        encode, content_type = choose_encoder(accept)
        registry = CollectorRegistry()
        registry.register(self)
        return encode(registry), content_type


def _read_spaces(relay: Relay) -> list[SpaceReading]:
    """Every space, and each worker looked at once."""
    readings = {}
    for name, space in relay.spaces.items():
        state, stats = relay.scheduler.state.spaces[name], relay.stats.space(name)
        reading = readings[name] = SpaceReading(space, state, stats, stats.audio_ms / 1000)
        running = [relay.requests[request_id] for request_id in state.running]
        reading.audio_s = (stats.audio_ms + sum(map(audio_ms, running))) / 1000
        for reader in chain.from_iterable(request.log.readers for request in running):
            reading.readers["behind" if reader.sink.backlog_bytes >= HIGH_WATER_BYTES else "keeping up"] += 1
    for worker in relay.scheduler.state.workers.values():
        there = "away" if not worker.linked else "draining" if worker.draining else "connected"
        for reading in filter(None, map(readings.get, worker.spaces)):
            reading.workers[there] += 1
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
    yield _one("relayd_draining", "1 while no new request is taken and the relay is about to leave.", _flag(relay))
    yield _one("relayd_connections", "Connections that have logged in, by role.", _connections(relay), "role")
    yield _one(
        "relayd_connections_limit", "How many may log in (limits.max_connections).", settings.limits.max_connections
    )
    yield _one(
        "relayd_slow_readers_total",
        "Connections cut off because they took nothing for limits.stall_timeout_s.",
        relay.slow_consumers,
    )
    yield _one("relayd_frames_total", "Frames taken from workers.", relay.stats.frames)
    yield _one("relayd_frames_dropped_total", "Frames of attempts that were over already.", relay.fenced_frames)
    yield _one("relayd_frame_bytes_total", "Bytes of frames: in from workers, out to readers.", frames, "direction")
    yield _one(
        "relayd_requests_misdirected_total",
        "Requests refused that named no space of this relay, by error code.",
        relay.stats.rejected,
        "code",
    )


def _http(http: HttpReading, tokens: TokenRegistry) -> Iterator[Metric]:
    responses = {str(status): count for status, count in http.responses.items()}
    yield _one("relayd_http_responses_total", "HTTP responses, by status.", responses, "status")
    yield _one("relayd_logins_refused_total", "Logins refused, of all kinds, by error code.", tokens.refused, "code")
    yield _one("relayd_http_connections", "Connections that speak plain HTTP.", http.connections)
    yield _one("relayd_http_answering", "HTTP requests that are being answered, this one too.", http.answering)


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
        "relayd_store_commit_seconds", "Until a commit was on the disk: each `accepted` waits for one."
    )
    _add_histogram(commits, [], store.commit_s)
    yield commits
    yield _one(
        "relayd_store_failed_commits_total",
        "Commits that the disk did not take: what asked for them was refused.",
        store.failed_commits,
    )
    yield _one("relayd_store_transactions_total", "Transactions, each with one fsync.", store.transactions)
    yield _one("relayd_store_queued", "Changes that are not written yet, by the calls that made them.", store.queued)
    yield _one("relayd_store_dropped_total", "Changes that were given up.", store.dropped)
    yield _one("relayd_result_memory_bytes", "Frames in memory.", results.memory.held_bytes)
    yield _one("relayd_result_memory_limit_bytes", "As many may be (results.memory_bytes).", settings.memory_bytes)
    yield _one("relayd_result_disk_bytes", "Frames in files.", results.disk_bytes)
    yield _one("relayd_result_disk_limit_bytes", "As many may be (results.disk_bytes).", settings.disk_bytes)
    yield _one("relayd_results_unsaved", "Results of ended requests that are in memory alone.", results.unsaved_count)


def _spaces(readings: list[SpaceReading]) -> Iterator[Metric]:
    each = partial(_each, readings)
    spread = partial(_spread, readings)
    yield each(
        "relayd_space_paused", "1 while the space hands nothing out and takes nothing new.", lambda s: s.state.paused
    )
    yield each(
        "relayd_requests_accepted_total", "Requests that were made safe and queued.", lambda s: s.stats.accepted.total
    )
    yield each(
        "relayd_requests_ended_total",
        "Requests that have ended, by outcome.",
        lambda s: {outcome: s.space.ended.get(outcome, 0) for outcome in OUTCOMES},
        "outcome",
    )
    yield each("relayd_requests_failed_total", "Those that failed, by error code.", lambda s: s.stats.failed, "code")
    yield each("relayd_requests_rejected_total", "Requests refused, by error code.", lambda s: s.stats.rejected, "code")
    yield each(
        "relayd_requests_retried_total",
        "Attempts lost whose requests went back into the queue.",
        lambda s: s.stats.retried,
    )
    yield each(
        "relayd_requests_resumed_total", "Requests that went on when their worker was back.", lambda s: s.stats.resumed
    )
    yield each("relayd_requests_uploading", "Requests taken in, and not queued yet.", lambda s: len(s.state.admitted))
    yield each("relayd_requests_queued", "Requests that wait for a slot.", lambda s: len(s.state.queue))
    yield each("relayd_requests_queued_limit", "How many may wait (max_queued).", lambda s: s.space.config.max_queued)
    yield each("relayd_requests_running", "Requests that run.", lambda s: len(s.state.running))
    yield spread(
        "relayd_request_wait_seconds", "In the queue, of what was handed to a worker.", lambda s: s.stats.wait_s
    )
    yield spread(
        "relayd_request_first_audio_seconds", "From the submit to the first output.", lambda s: s.stats.first_audio_s
    )
    yield spread(
        "relayd_request_run_seconds", "From the hand-out to the end, of completed ones.", lambda s: s.stats.run_s
    )
    yield spread(
        "relayd_request_real_time_factor",
        "Seconds run per second of audio, of completed ones.",
        lambda s: s.stats.real_time_factor,
    )
    yield each("relayd_audio_seconds_total", "Audio made by workers, also of what ended badly.", lambda s: s.audio_s)
    yield each(
        "relayd_readers",
        "Who listens to running requests; for those behind, which have not taken what was sent yet, frames wait.",
        lambda s: s.readers,
        "state",
    )
    yield each("relayd_workers", "Workers, by state; one of several spaces is in each.", lambda s: s.workers, "state")
    yield each(
        "relayd_worker_slots",
        "Slots of connected workers; those of a draining one are not free.",
        lambda s: s.slots,
        "state",
    )
    yield each(
        "relayd_worker_reconnects_total",
        "Registrations of workers that were here before.",
        lambda s: s.stats.reconnects,
    )


# -- families -----------------------------------------------------------------------------------------------------


def _family(name: str, told: str, labels: Iterable[str]) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return kind(name, told, labels=list(labels))


def _one(name: str, told: str, value: Reading, label: str = "") -> Metric:
    """A metric of the whole relay."""
    family = _family(name, told, [label] if label else ())
    _add(family, [], value)
    return family


def _each(
    readings: list[SpaceReading], name: str, told: str, read: Callable[[SpaceReading], Reading], label: str = ""
) -> Metric:
    """A metric of every space."""
    family = _family(name, told, ["space", label] if label else ["space"])
    for reading in readings:
        _add(family, [reading.space.name], read(reading))
    return family


def _add(family: CounterMetricFamily | GaugeMetricFamily, labels: list[str], value: Reading) -> None:
    if isinstance(value, Mapping):
        for key, number in value.items():
            family.add_metric([*labels, key], number)
    else:
        family.add_metric(labels, value)


def _spread(
    readings: list[SpaceReading], name: str, told: str, read: Callable[[SpaceReading], Histogram]
) -> HistogramMetricFamily:
    """A histogram of every space."""
    family = HistogramMetricFamily(name, told, labels=["space"])
    for reading in readings:
        _add_histogram(family, [reading.space.name], read(reading))
    return family


def _add_histogram(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    buckets, total = [], 0
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    family.add_metric(labels, buckets, histogram.sum)
