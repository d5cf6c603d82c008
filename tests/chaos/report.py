"""The record of a run: faults, log lines, each request from its submit to its verdict; and the table of results."""

import hashlib
import itertools
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

import attrs
import trio

from tests.chaos.processes import as_json
from tests.chaos.verdict import LOSSES, Cause, Reception, judge, judge_attempts, lost_and_doubled
from tests.chaos.workload import SAMPLE_BYTES, Plan

#: The line that `gpuworker.executor` logs at the start of an attempt.
_BEGUN = re.compile(r"request ([0-9a-f]{8}) of \S+: attempt (\d+) in space")
#: The line that it logs when an attempt whose inputs had not all arrived is given back: it never ran.
_NEVER_RAN = re.compile(r"request ([0-9a-f]{8}): attempt (\d+) dropped: the link was lost before its inputs")
#: Time in which the relay detects a lost connection: `dead_after_s` and a margin.
SEEN_S = 4.0
#: Pauses up to this are those of a busy machine.
NOISE_S = 0.25
#: Events of the timeline that are kept, to explain what went wrong.
KEPT_EVENTS = 60_000
#: How an outcome ends with which the relay says that it does not know a request.
NOT_FOUND = "request_not_found"
#: Why the relay has ended the former link of a worker that is linked.
REPLACED = "the same worker connected again"
#: Log events of the relay that concern a request.
_ABOUT = frozenset(
    {
        "request accepted",
        "request started",
        "request queued again",
        "request waits for its source again",
        "request completed",
        "request failed",
        "request cancelled",
    }
)


@attrs.define(eq=False)
class Fault:
    """One fault, from its start to its end."""

    kind: str
    target: str
    began_at: float
    healed_at: float = float("inf")
    #: Whether it has no duration, such as a cut connection.
    cuts: bool = False

    @property
    def account(self) -> str:
        """The name under which it is counted."""
        return f"{self.target.split()[0]}: {self.kind}"


@attrs.define(eq=False)
class Pause:
    """The longest pause between two audio frames of a stream beyond their pace, of `frames` frames."""

    longest_s: float = 0.0
    where: str = ""
    frames: int = 0


@attrs.define(eq=False)
class Case:
    """One request and everything recorded about it."""

    plan: Plan
    request_id: str
    began_at: float
    #: Name of the client that submits it.
    listener: str = ""
    #: The request whose output is its input.
    source: "Case | None" = None
    #: Receptions that have ended, while it is not known how the source did.
    unjudged: list[Reception] = attrs.field(factory=list)
    group: str | None = None
    accepted_at: float | None = None
    receptions: list[Reception] = attrs.field(factory=list)
    cancelled_at: float | None = None
    #: When the harness left it without a listener; None if it has one.
    unheld_from: float | None = None
    unheld_to: float = float("inf")
    #: When the last listener had the end; `first_ended_at`: the first.
    ended_at: float | None = None
    first_ended_at: float | None = None
    closed_at: float | None = None
    #: (attempt, worker process), as logged by the workers (`begun`) and by the relay (`started`).
    begun: list[tuple[int, str]] = attrs.field(factory=list)
    started: list[tuple[int, str]] = attrs.field(factory=list)
    requeued: int = 0
    #: Whether the relay logged that it had accepted it, and when it first logged an end.
    stored: bool = False
    known_end_at: float | None = None
    #: Whether it needs no holder.
    detached: bool = False
    complaints: list[str] = attrs.field(factory=list)
    #: Its timeline, if there are complaints.
    story: str = ""

    @property
    def short(self) -> str:
        """The id as shortened in the workers' logs."""
        return self.request_id[:8]


@attrs.define(eq=False)
class Windows:
    """The settings that limit what may happen, in seconds."""

    worker_grace_s: float
    unheard_grace_s: float
    resume_window_s: float
    #: A stream must continue within this time after the last fault.
    promised_s: float
    queue_timeout_s: float = 60.0
    retain_s: float = float("inf")


@attrs.define(eq=False)
class Ledger:
    """The record of a run. The timeline starts at `began_at`."""

    windows: Windows
    began_at: float
    cases: dict[str, Case] = attrs.field(factory=dict)
    faults: list[Fault] = attrs.field(factory=list)
    counts: Counter[str] = attrs.field(factory=Counter)
    pauses: dict[str, Pause] = attrs.field(factory=lambda: defaultdict(Pause))
    #: Set, and made anew, when somebody hears an answer that promises something, such as `accepted` of a new request.
    next_answer: trio.Event = attrs.field(factory=trio.Event)
    #: The longest time from the end of the last fault that concerns a stream to its next frame.
    longest_quiet_s: float = 0.0
    complaints: list[str] = attrs.field(factory=list)
    timeline: deque[tuple[float, str, str]] = attrs.field(factory=lambda: deque(maxlen=KEPT_EVENTS))
    #: Times at which the relay logged that it was listening.
    relay_starts: list[float] = attrs.field(factory=list)
    #: Space that was paused, or worker id that was drained -> Unix seconds of the answer.
    held_back: dict[str, float] = attrs.field(factory=dict)
    #: Name of a worker or client -> [[connected at, disconnected at]]; the last may be open.
    linked: dict[str, list[list[float]]] = attrs.field(factory=lambda: defaultdict(list))
    on_complaint: Callable[[], None] = lambda: None
    _started: set[tuple[str, int]] = attrs.field(factory=set)
    #: Request id -> the worker of its latest attempt, and the number of starts of the relay until then.
    _latest: dict[str, tuple[str, int]] = attrs.field(factory=dict)
    _by_short: dict[str, Case] = attrs.field(factory=dict)

    # -- writing

    def note(self, who: str, what: str) -> None:
        """Add a line to the timeline."""
        self.timeline.append((trio.current_time(), who, what))

    def complain(self, message: str, case: Case | None = None) -> None:
        """Record that a promise was broken."""
        who = f"{case.plan.name} ({case.request_id})" if case else "run"
        if case is not None:
            case.complaints.append(message)
        self.complaints.append(f"{who}: {message}")
        self.note(case.plan.name if case else "run", f"COMPLAINT {message}")
        self.on_complaint()

    def open_case(self, plan: Plan, request_id: str, listener: str) -> Case:
        """Record that a request is about to be submitted."""
        case = Case(plan, request_id, trio.current_time(), listener)
        self.cases[request_id] = self._by_short[case.short] = case
        line = f"submits {request_id}: {plan.kind}, {plan.space}, retry {plan.retry}, {plan.duration_s} s"
        self.note(plan.name, line + (f", {plan.fail}" if plan.fail else ""))
        return case

    def note_accepted(self, case: Case) -> None:
        """A client has heard `accepted`."""
        if case.accepted_at is None:
            case.accepted_at = trio.current_time()
            self.note_answer()

    def note_answer(self) -> None:
        """Somebody has heard an answer that promises something."""
        self.next_answer.set()
        self.next_answer = trio.Event()

    def note_position(self, case: Case, position: int, of: int) -> None:
        """A client has heard its place in the queue."""
        self.counts["positions heard"] += 1
        self.counts["longest queue"] = max(self.counts["longest queue"], of)
        if not 1 <= position <= of:
            self.complain(f"it is told to be at place {position} of {of}", case)

    def begin_fault(self, kind: str, target: str, *, cuts: bool = False) -> Fault:
        """Record the start of a fault."""
        fault = Fault(kind, target, trio.current_time(), cuts=cuts)
        self.faults.append(fault)
        self.note("FAULT", f"{target}: {kind}")
        return fault

    def heal_fault(self, fault: Fault) -> None:
        """Record the end of a fault."""
        fault.healed_at = trio.current_time()
        if not fault.cuts:
            self.note("FAULT", f"{fault.target}: {fault.kind} is over")

    # -- log lines

    def record_line(self, name: str, line: str) -> None:
        """Record a line of a process's log."""
        if name == "relay":
            self._record_relay_line(line)
            return
        self.note(name, line)
        if (found := _BEGUN.search(line)) and (case := self._by_short.get(found[1])):
            case.begun.append((int(found[2]), name))
        elif (found := _NEVER_RAN.search(line)) and (case := self._by_short.get(found[1])):
            with suppress(ValueError):
                case.begun.remove((int(found[2]), name))

    def _record_relay_line(self, line: str) -> None:
        entry = as_json(line)
        event = entry.get("event", "")
        if event in ("connected", "disconnected"):
            return
        self.note("relay", line if not entry else f"{event} {_fields(entry)}")
        now = trio.current_time()
        if event == "listening":
            self.relay_gone()  # again: the last lines of the one before may have come after its end
            self.relay_starts.append(now)
        elif event == "worker registered":
            self._unlink(_worker_name(entry["worker"]), now)
            self.linked[_worker_name(entry["worker"])].append([now, float("inf")])
        elif event == "worker disconnected" and entry["why"] != REPLACED:
            self._unlink(_worker_name(entry["worker"]), now)
        elif event in _ABOUT and (case := self.cases.get(entry.get("request_id", ""))):
            if event == "request started":
                case.started.append((entry["attempt"], _worker_name(entry["worker"])))
            elif event in ("request queued again", "request waits for its source again"):
                case.requeued += 1
            elif event == "request accepted":
                case.stored = True
            else:
                case.known_end_at = case.known_end_at or now
        if event == "request started":
            self._judge_start(entry)
        if entry.get("level") in ("error", "critical") or "Traceback" in line or "exception" in entry:
            self.complain(f"the relay logged an error: {line[:2_000]}")

    def _judge_start(self, entry: dict[str, Any]) -> None:
        attempt = entry["request_id"], entry["attempt"]
        before = self._latest.get(entry["request_id"])
        self._latest[entry["request_id"]] = entry["worker"], len(self.relay_starts)
        # Its worker came back without it, so it was sent again: it has run since before. A new relay numbers it anew.
        if attempt in self._started or (before and before[0] == entry["worker"] and before[1] < len(self.relay_starts)):
            return
        self._started.add(attempt)
        at = datetime.fromisoformat(entry["timestamp"]).timestamp()
        for what in (entry["space"], entry["worker"]):
            if at > self.held_back.get(what, at):
                self.complain(f"request {entry['request_id']} was started, though {what} is paused or drained")

    def link_up(self, who: str) -> None:
        """Record that a client has logged in."""
        self.linked[who].append([trio.current_time(), float("inf")])

    def link_down(self, who: str) -> None:
        """Record that a client has lost its link."""
        self._unlink(who, trio.current_time())

    def _unlink(self, worker: str, now: float) -> None:
        if (spans := self.linked[worker]) and spans[-1][1] == float("inf"):
            spans[-1][1] = now

    def relay_gone(self) -> None:
        """Record that the relay's process has ended, and every link with it."""
        for worker in self.linked:
            self._unlink(worker, trio.current_time())

    # -- judging

    def causes(self, case: Case, until: float) -> frozenset[Cause]:
        """What happened to a request up to `until`."""
        ran_on = {worker for _attempt, worker in case.started} | {worker for _attempt, worker in case.begun}
        found = set()
        for fault in self.faults:
            if not case.began_at - SEEN_S <= fault.began_at <= until:
                continue
            if fault.kind == "kill -9" and fault.target.removeprefix("worker ") in ran_on:
                found.add(Cause.WORKER_KILLED)
            elif fault.kind == "slot kill -9" and fault.target.removeprefix("worker ") in ran_on:
                found.add(Cause.SLOT_KILLED)
        graces = {
            Cause.WORKER_AWAY: self.windows.unheard_grace_s,
            Cause.WORKER_LONG_AWAY: self.windows.worker_grace_s,
        }
        for cause, grace_s in graces.items():
            if any(self._was_away(worker, case.began_at, until, grace_s, over_restarts=True) for worker in ran_on):
                found.add(cause)
        if any(case.began_at <= start <= until for start in self.relay_starts):
            found.add(Cause.RELAY_RESTARTED)
        pauses = [each for each in self.faults if (each.kind, each.target) == ("paused", f"space {case.plan.space}")]
        if any(
            min(each.healed_at, until) - max(each.began_at, case.began_at) >= self.windows.queue_timeout_s * 0.9
            for each in pauses
        ):
            found.add(Cause.PAUSED)
        away = [each for each in self.faults if each.target == "relay"]
        away_s = sum(max(0.0, min(each.healed_at, until) - max(each.began_at, case.began_at)) for each in away)
        if away_s >= self.windows.queue_timeout_s / 3:  # on a busy machine, it takes seconds to start
            found.add(Cause.RELAY_AWAY)
        if case.cancelled_at is not None and case.cancelled_at <= until:
            found.add(Cause.CANCELLED)
        if not case.detached and self._was_unheld(case, until):
            found.add(Cause.UNHELD)
        if case.source is not None:
            found |= self._causes_of_source(case.source, until)
        return frozenset(found)

    def _causes_of_source(self, source: Case, until: float) -> set[Cause]:
        found = set()
        if any(reception.end and reception.end != "completed" for reception in source.receptions):
            found.add(Cause.SOURCE_ENDED)
        if self.causes(source, until) & LOSSES or len(source.begun) > 1:
            found.add(Cause.SOURCE_LOST)
            if not source.plan.reproducible:
                found.add(Cause.SOURCE_ANEW)
        return found

    def _was_away(
        self, worker: str, since: float, until: float, longest_s: float, *, over_restarts: bool = False
    ) -> bool:
        """Whether a peer was away for `longest_s`. A restart of the relay resets that time, unless `over_restarts`."""
        starts = () if over_restarts else (start for start in self.relay_starts if since < start < until)
        edges = sorted({since, until, *starts})
        for begin, end in itertools.pairwise(edges):
            at = begin
            for up, down in [*self.linked[worker], [end, end]]:
                if min(up, end) - at >= longest_s * 0.9:
                    return True
                at = max(at, min(down, end))
        return False

    def _was_unheld(self, case: Case, until: float) -> bool:
        if self._was_away(case.listener, case.began_at, until, self.windows.resume_window_s - SEEN_S):
            return True
        if case.unheld_from is None:
            return False
        since = max([case.unheld_from, *(start for start in self.relay_starts if start <= until)])
        return min(until, case.unheld_to) - since >= self.windows.resume_window_s * 0.9

    def longest_rest(self, case: Case, until: float) -> float:
        """For how long, up to `until`, neither the relay nor the line of the client had a fault."""
        longest, at = 0.0, case.began_at
        for fault in self.faults:
            if (
                fault.target in ("relay", case.listener)
                and case.began_at <= fault.healed_at
                and fault.began_at <= until
            ):
                longest, at = max(longest, fault.began_at - at), max(at, fault.healed_at)
        return max(longest, until - at)

    def may_end_anew(self, case: Case) -> bool:
        """Whether its end may be forgotten: it is passed on at once, and the worker keeps it until the relay has it.

        So it is lost where the relay was killed before it was stored, and the worker was killed before it came back, or
        stayed away for too long.
        """
        since, now = case.first_ended_at or 0.0, trio.current_time()
        killed = {fault.target.removeprefix("worker ") for fault in self.faults if self._killed_since(fault, since)}
        ran_on = {worker for _attempt, worker in (*case.started, *case.begun)}
        grace_s = self.windows.worker_grace_s
        away = {each for each in ran_on if self._was_away(each, since, now, grace_s, over_restarts=True)}
        return "relay" in killed and bool((killed | away) & ran_on)

    def may_be_forgotten(self, case: Case) -> bool:
        """Whether its end is older than `retain_s`, or came before it was accepted, and the relay was killed since."""
        if case.known_end_at is None:
            return False
        old = trio.current_time() - case.known_end_at >= self.windows.retain_s * 0.9
        return old or (not case.stored and any(start > case.known_end_at for start in self.relay_starts))

    @staticmethod
    def _killed_since(fault: Fault, since: float) -> bool:
        return fault.kind.startswith("kill -9") and fault.healed_at >= since

    def close_reception(self, case: Case, reception: Reception) -> None:
        """Judge a reception that has ended; if its source has not been judged, `close_source` does it later."""
        reception.ended_at = reception.ended_at or trio.current_time()
        if case.source is not None and case.source.ended_at is None:
            case.unjudged.append(reception)
            return
        case.ended_at = reception.ended_at
        case.first_ended_at = case.first_ended_at or reception.ended_at
        self.note(case.plan.name, f"{reception.name} has the end: {reception.end} {reception.message}")
        forgotten = reception.end.endswith(NOT_FOUND) and self.may_be_forgotten(case)
        for fault in () if forgotten else judge(case.plan, reception, self.causes(case, reception.ended_at)):
            self.complain(f"{reception.name}: {fault}", case)
        self.counts["listeners"] += 1
        self.counts[f"ended {reception.end}"] += 1
        self.counts["samples compared"] += len(reception.pcm) // SAMPLE_BYTES
        lost, doubled = lost_and_doubled(case.plan, reception) if reception.end == "completed" else (0, 0)
        self.counts["samples lost"] += lost
        self.counts["samples doubled"] += doubled
        self.counts["samples voided by a restart"] += reception.voided
        self.counts["restarts seen"] += reception.restarts
        for other in case.receptions:
            differs = other is not reception and other.end and other.end != reception.end
            if differs and not forgotten and not self.may_end_anew(case):
                self.complain(f"{other.name} received {other.end!r}, and {reception.name} {reception.end!r}", case)
        reception.pieces = [(-1, hashlib.sha256(reception.pcm).digest())]  # to save memory in a long run

    def close_source(self, case: Case, reception: Reception) -> None:
        """Judge how the source of a request ended, and then what was received of the request."""
        assert case.source is not None
        self.close_reception(case.source, reception)
        for each in case.unjudged:
            self.close_reception(case, each)

    def close_case(self, case: Case) -> None:
        """Judge how often a request ran, once everything about it is known, and forget it."""
        case.closed_at = trio.current_time()
        begun = [attempt for attempt, _worker in case.begun]
        # A relay that was killed before it stored an end that a listener has heard may begin the request once more.
        starts = sum(case.began_at <= start <= case.closed_at for start in self.relay_starts)
        self.counts["requests run twice unnoticed"] += 0  # so that the table has this line
        for fault in judge_attempts(case.plan, begun, case.requeued, starts):
            self.counts["requests run twice unnoticed"] += "twice" in fault or "times" in fault
            self.complain(fault, case)
        for unknown in set(case.begun) - set(case.started):
            self.complain(f"attempt {unknown[0]} ran on {unknown[1]}, which the relay has not logged", case)
        kept = any(reception.end and not reception.end.endswith(NOT_FOUND) for reception in case.receptions)
        lost = case.accepted_at is not None and not kept and not self.may_be_forgotten(case)
        self.counts["accepted requests lost"] += lost
        self.counts["requests"] += 1
        self.counts["attempts"] += len(begun)
        self.counts["retried"] += max(0, len(begun) - 1)
        if not case.complaints:
            del self.cases[case.request_id], self._by_short[case.short]
        else:
            case.story = self.story(case)  # in a long run its events are not kept to the end

    def record_gap(self, case: Case, listener: str, since: float, now: float, pace_s: float) -> None:
        """Record the pause between two audio frames of a stream, under the fault that caused it."""
        gap_s = now - since - pace_s
        concerned = {
            "relay",
            listener,
            f"space {case.plan.space}",
            *(f"worker {worker}" for _attempt, worker in case.started[-2:]),
        }
        faults = [
            fault
            for fault in itertools.islice(reversed(self.faults), 200)
            if fault.began_at <= now and fault.healed_at >= since - SEEN_S and fault.target in concerned
        ]
        # A fault that has just ended still causes pauses; but short pauses are ordinary noise.
        kinds = {fault.account for fault in faults if fault.healed_at >= since or gap_s > NOISE_S}
        name = "none" if not kinds else kinds.pop() if len(kinds) == 1 else "several at once"
        worst = self.pauses[name]
        worst.frames += 1
        if gap_s > worst.longest_s:
            worst.longest_s, worst.where = gap_s, f"{case.plan.name} at {now - self.began_at:.1f} s"
        quiet_s = now - max([since, *(min(fault.healed_at, now) for fault in faults)])
        if quiet_s > self.longest_quiet_s:
            self.longest_quiet_s = quiet_s
        if quiet_s > self.windows.promised_s:
            message = (
                f"{listener} received nothing for {gap_s:.1f} s, {quiet_s:.1f} s of them after the last fault ended"
            )
            self.complain(message, case)

    # -- reporting

    def story(self, case: Case | None) -> str:
        """The timeline of one request: what the relay and its workers did, and every fault in that time."""
        if case is None:
            return "\n".join(self._line(*each) for each in list(self.timeline)[-80:])
        until = (case.closed_at or case.ended_at or float("inf")) + 1.0
        lines = []
        for at, who, what in self.timeline:
            if not case.began_at - 3.0 <= at <= until:
                continue
            mine = who == case.plan.name or case.short in what
            if mine or who == "FAULT" or "worker registered" in what or "listening" in what or "abandon" in what:
                lines.append(self._line(at, who, what))
        return "\n".join(lines)

    def _line(self, at: float, who: str, what: str) -> str:
        return f"{at - self.began_at:9.3f}  {who:<14} {what[:400]}"

    def table(self) -> str:
        """The faults and the results, as Markdown tables."""
        faults = Counter(fault.account for fault in self.faults)
        rows = [("fault", "times"), ("---", "---:"), *((kind, f"{times}") for kind, times in sorted(faults.items()))]
        seen = [
            ("result", "count"),
            ("---", "---:"),
            *((what, f"{count:,}") for what, count in sorted(self.counts.items())),
        ]
        pauses = [
            ("longest pause in a stream, beyond its pace", "ms", "frames", "where"),
            ("---", "---:", "---:", "---"),
        ]
        for kind, pause in sorted(self.pauses.items()):
            pauses.append((f"during {kind}", f"{pause.longest_s * 1000:,.0f}", f"{pause.frames:,}", pause.where))
        pauses.append(("after the last fault ended", f"{self.longest_quiet_s * 1000:,.0f}", "", ""))
        return "\n\n".join("\n".join(f"| {' | '.join(row)} |" for row in part) for part in (rows, seen, pauses))


def _fields(entry: dict[str, object]) -> str:
    skipped = ("event", "level", "timestamp", "logger")
    return " ".join(f"{key}={value}" for key, value in entry.items() if key not in skipped)


def _worker_name(worker_id: str) -> str:
    """The name with which a worker was started, without its instance id."""
    return worker_id.rpartition("-")[0]
