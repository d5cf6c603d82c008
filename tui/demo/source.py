"""The feed of `relay-tui --demo`: snapshots and deltas of a simulated relay, for trying the screen out."""

from collections.abc import AsyncGenerator

import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Delta, Done, Rejected, Snapshot
from protocol.wire.validators import Value
from tui.demo import rows as demo_rows
from tui.demo.scenes import SCENES
from tui.demo.simulation import Play, Request

#: A relay reports real changes after a quarter of a second, and mere progress after one second; this lies between.
DELTA_S = 0.5

Row = dict[str, Value]


class Demo:
    """A simulated relay.

    `step` advances it by hand; `changes` advances it in real time.

    Args:
        scene: `busy`, `empty` or `broken`.
        seed: equal seeds give equal simulations.
        readonly: refuse every steer, as the relay would.
    """

    def __init__(self, scene: str = "busy", seed: int = 1, *, readonly: bool = False) -> None:
        self.play = Play(SCENES[scene], seed)
        self.readonly = readonly
        self._shown = ""

    def snapshot(self) -> Snapshot:
        """The current rows of all topics."""
        self.play.touched.clear()
        self.play.gone.clear()
        self._shown = repr(demo_rows.relay(self.play, still=True))
        return Snapshot(data={topic: list(rows) for topic, rows in demo_rows.everything(self.play).items()})

    def step(self, dt_s: float) -> Delta:
        """Advance the simulation and return the rows that changed; the delta may be empty."""
        play = self.play
        play.step(dt_s)
        data: dict[str, Value] = {}
        for topic in demo_rows.TOPICS:
            keys = sorted(key for touched, key in play.touched if touched == topic)
            rows = [row for key in keys if (row := demo_rows.row(play, topic, key)) is not None]
            if rows:
                data[topic] = list(rows)
        gone: dict[str, Value] = {"requests": list(play.gone)} if play.gone else {}
        play.touched.clear()
        play.gone = []
        shown = repr(demo_rows.relay(play, still=True))
        if data or shown != self._shown:
            data["relay"] = [demo_rows.relay(play)]
        self._shown = shown
        return Delta(data=data, gone=gone)

    async def changes(self) -> AsyncGenerator[Snapshot | Delta, None]:
        """Yield one snapshot, then deltas for ever."""
        yield self.snapshot()
        sent_at = trio.current_time()
        while True:
            await trio.sleep(DELTA_S)
            now = trio.current_time()
            delta = self.step(now - sent_at)
            sent_at = now
            if delta.data or delta.gone:
                yield delta

    async def steer(self, action: str, target: str = "", options: Row | None = None) -> Done | Rejected:
        """Carry out an action and answer as the relay would."""
        await trio.lowlevel.checkpoint()
        return self.steer_nowait(action, target)

    def steer_nowait(self, action: str, target: str = "") -> Done | Rejected:
        """The synchronous form of `steer`."""
        if action == "describe":
            request = self.play.requests.get(target)
            if request is None:
                return Rejected.because(ErrorCode.REQUEST_NOT_FOUND, f"request {target} is unknown")
            return Done(action=action, target=target, data=demo_rows.describe(self.play, request))
        if self.readonly:
            refusal: Rejected | None = Rejected.because(
                ErrorCode.FORBIDDEN, "this connection is read-only; connect without --readonly"
            )
        else:
            refusal = self._carry_out(action, target)
        self.play.audited(action, target, refusal.code if refusal else "done", refusal.message if refusal else "")
        return refusal or Done(action=action, target=target)

    def _carry_out(self, action: str, target: str) -> Rejected | None:
        play = self.play
        request, worker, space = play.requests.get(target), play.workers.get(target), play.spaces.get(target)
        match action:
            case "cancel" if request is not None:
                self._cancel(request)
            case "promote" if request is not None and request.state == "queued":
                queue = play.spaces[request.space].queue
                queue.remove(target)
                queue.insert(0, target)
                for moved in queue:
                    play.touch(play.requests[moved])
            case "drain_worker" | "undrain_worker" if worker is not None:
                worker.draining = action == "drain_worker"
                play.touched.add(("workers", target))
            case "pause_space" | "resume_space" if space is not None:
                space.paused = action == "pause_space"
                play.touched.add(("spaces", target))
            case "end_talk" if target in play.talks:
                play.end_talk(play.talks[target])
            case "disconnect":
                return play.disconnect(target)
            case "end_talk":
                return Rejected.because(ErrorCode.REQUEST_NOT_FOUND, f"no conversation {target!r} is in use")
            case "cancel" | "promote":
                return Rejected.because(ErrorCode.REQUEST_NOT_FOUND, f"request {target} is unknown, or not queued")
            case _:
                return Rejected.because(ErrorCode.INVALID_PARAMS, f"{action} {target!r}: no such target here")
        return None

    def _cancel(self, request: Request) -> None:
        if request.state == "queued":
            self.play.end(request, "cancelled")
        elif request.state == "running":
            request.stopping = True
            self.play.touch(request)
