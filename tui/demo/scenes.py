"""The three scenes of the demo: their spaces, workers, principals and texts."""

import attrs

#: The demo's clock begins here (Unix seconds, 2026-03-03 03:00 UTC), so that it looks the same on every day.
BEGIN_UNIX = 1_772_506_800.0


@attrs.frozen(kw_only=True)
class SpacePart:
    """A space and its traffic."""

    name: str
    engine: str = "voxcpm"
    description: str = ""
    #: Requests a minute.
    arrivals_min: float = 10.0
    #: Shortest and longest run time of a request, in seconds.
    run_s: tuple[float, float] = (3.0, 9.0)
    #: Real-time factor: run seconds for each second of audio.
    rtf: float = 0.3
    #: Percentage of requests that fail.
    fail_percent: float = 0.0
    paused: bool = False
    #: Requests waiting and running at the start of the demo.
    waiting: int = 0


@attrs.frozen(kw_only=True)
class WorkerPart:
    """A worker of a scene."""

    name: str
    spaces: tuple[str, ...]
    slots: int = 1
    engine: str = "voxcpm"
    version: str = "gpuworker/0.2.0"
    peer: str = "203.0.113.7:52114"
    rtt_ms: float = 20.0
    #: How long it has been connected but silent, in seconds; None for a healthy worker.
    silent_s: float | None = None
    away: bool = False
    draining: bool = False


@attrs.frozen(kw_only=True)
class TalkPart:
    """A conversation of a scene: something is said in it every `period_s`."""

    principal: str
    user: str
    session: str
    turns: int
    period_s: float
    #: Seconds since something was said in it.
    said_s: float
    waiting: int = 0
    #: Code and message of its last reply that has ended.
    failed: tuple[str, str] | tuple[None, None] = (None, None)


@attrs.frozen(kw_only=True)
class Scene:
    """Everything that the demo simulates."""

    spaces: tuple[SpacePart, ...] = ()
    workers: tuple[WorkerPart, ...] = ()
    principals: tuple[str, ...] = ()
    talks: tuple[TalkPart, ...] = ()
    #: Recent audit entries: (seconds ago, principal, action, target, outcome, message).
    steered: tuple[tuple[float, str, str, str, str, str], ...] = ()
    #: Index in `principals` of the client that has stopped reading.
    slow_client: int | None = None
    uptime_s: float = 3 * 86400 + 4 * 3600 + 120
    #: Seconds simulated before the demo begins, so that there is some history.
    past_s: float = 90.0


PRINCIPALS = ("alice", "bob", "王小明", "studio-🎧", "ci", "Zoë", "podcast-bot")

SCENES: dict[str, Scene] = {
    "busy": Scene(
        spaces=(
            SpacePart(
                name="tts",
                description="VoxCPM2, 48 kHz, English and Chinese",
                arrivals_min=29,
                run_s=(6, 14),
                waiting=4,
            ),
            SpacePart(
                name="tts-draft",
                engine="espeak",
                arrivals_min=34,
                run_s=(0.3, 1.2),
                rtf=0.02,
                description="quick drafts, espeak-ng",
            ),
            SpacePart(
                name="voices", description="cloned voices, 有声书", arrivals_min=8, run_s=(8, 18), rtf=0.55, waiting=3
            ),
            SpacePart(
                name="captions",
                engine="function",
                description="captions:transcribe",
                arrivals_min=6,
                run_s=(2, 5),
                fail_percent=4,
            ),
        ),
        workers=(
            WorkerPart(name="gpu-box-1", spaces=("tts", "voices"), slots=3, rtt_ms=18.4),
            WorkerPart(name="实验室-4090", spaces=("tts",), slots=2, peer="198.51.100.23:40112", rtt_ms=231.0),
            WorkerPart(
                name="🚀 rented", spaces=("voices", "captions"), slots=3, engine="function", peer="192.0.2.55:36020"
            ),
            WorkerPart(
                name="relay-host", spaces=("tts-draft",), slots=4, engine="espeak", peer="unix (pid 4790)", rtt_ms=0.3
            ),
        ),
        principals=PRINCIPALS,
        talks=(
            TalkPart(principal="alice", user="anna", session="anna-1", turns=12, period_s=19, said_s=3.5),
            TalkPart(principal="studio-🎧", user="", session="desk-4", turns=38, period_s=27, said_s=1.2, waiting=1),
            TalkPart(principal="王小明", user="小红", session="chat-208", turns=6, period_s=45, said_s=31),
            TalkPart(principal="podcast-bot", user="", session="", turns=2, period_s=60, said_s=52),
        ),
        steered=(
            (1260, "dana", "promote", "7f13a9c2", "done", ""),
            (75, "root", "undrain_worker", "gpu-box-1", "done", ""),
        ),
    ),
    "empty": Scene(uptime_s=42, past_s=0),
    "broken": Scene(
        spaces=(
            SpacePart(
                name="tts",
                description="VoxCPM2, 48 kHz, English and Chinese",
                arrivals_min=26,
                fail_percent=35,
                waiting=19,
                run_s=(8, 25),
                rtf=1.4,
            ),
            SpacePart(name="tts-draft", engine="espeak", arrivals_min=12, paused=True, waiting=7),
            SpacePart(name="voices", description="cloned voices, 有声书", arrivals_min=9, waiting=11),
            SpacePart(name="captions", engine="function", arrivals_min=4, run_s=(2, 5)),
        ),
        workers=(
            WorkerPart(name="gpu-box-1", spaces=("tts",), slots=2, rtt_ms=1840.0),
            WorkerPart(name="实验室-4090", spaces=("voices",), slots=2, away=True, silent_s=21),
            WorkerPart(
                name="🚀 rented", spaces=("tts", "captions"), engine="function", peer="192.0.2.55:36020", silent_s=13
            ),
            WorkerPart(
                name="relay-host",
                spaces=("tts-draft", "captions"),
                slots=2,
                engine="espeak",
                peer="unix (pid 4790)",
                rtt_ms=0.3,
                draining=True,
            ),
        ),
        principals=PRINCIPALS,
        talks=(
            TalkPart(principal="alice", user="anna", session="anna-1", turns=12, period_s=1e9, said_s=41, waiting=2),
            TalkPart(
                principal="王小明",
                user="小红",
                session="chat-208",
                turns=6,
                period_s=1e9,
                said_s=95,
                failed=("no_worker", "no worker of space 'voices' is connected; say it again when there is one"),
            ),
        ),
        slow_client=3,
        steered=(
            (310, "dana", "pause_space", "tts-draft", "done", ""),
            (48, "root", "drain_worker", "relay-host", "done", ""),
            (19, "root", "cancel", "0c21f7aa", "request_not_found", "request 0c21f7aa is unknown"),
        ),
    ),
}

#: How requests of the demo fail: (code, message).
FAILURES = (
    ("engine_failed", "CUDA out of memory: tried to allocate 2.4 GiB; lower --slots, or shorten the text"),
    ("worker_lost", "the worker was lost after 3.2 s of audio; submit with retry: always to start again"),
    ("run_timeout", "ran for 120 s; raise run_timeout_s of the space"),
)

TEXTS = (
    "Good evening, and welcome to the late programme.",
    "你好，世界。今天的天气很好。",
    "The relay keeps the queue, the worker keeps the GPU warm.",
    "Chapter seven, in which nothing happens slowly.",
)
