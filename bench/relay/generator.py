"""Compiles `load.c`, and runs the plans that it carries out."""

import atexit
import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import attrs

from bench.relay.frames import Variant
from bench.relay.sockets import Connection

SOURCE = Path(__file__).with_name("load.c")
#: A round that takes longer is stuck rather than slow.
ROUND_S = 30.0
SATURATED, PACED, HOLD = 0, 1, 2


class Stuck(RuntimeError):
    """A round did not finish, or frames were lost, doubled, changed or out of order."""


@attrs.frozen
class Stream:
    """One stream of a round: its sender, its readers, and its frames."""

    sender: Connection
    readers: Sequence[Connection]
    variants: Sequence[Variant]
    first_seq: int
    frames: int
    #: Seconds between two frames, and before the first; no pace if the round is saturated.
    interval_s: float = 0.0
    offset_s: float = 0.0
    #: Most frames in flight; 0: any number.
    window: int = 64
    #: Its latencies are not counted.
    quiet: bool = False
    #: Its readers read nothing before the round is over; then all frames must be there.
    stalled: bool = False


@attrs.frozen
class Round:
    """The result of one round."""

    frames: int
    wall_s: float
    load_cpu_s: float
    #: For each watched process: user and system time of all its threads, and its memory at the end.
    cpu_s: Sequence[float]
    rss_kib: Sequence[int]
    #: From sending a frame to receiving it, without the first frame of each stream; then for the first frames only.
    p50_us: float
    p99_us: float
    first_p50_us: float
    #: Pings answered.
    pongs: int
    #: Frames that a stalled reader had not received when the others had received all of theirs.
    stalled_frames: int
    #: CPU of the relay including the set-up and tear-down of the round's requests.
    whole_cpu_s: float = 0.0

    @property
    def frames_a_second(self) -> float:
        """The throughput; a frame with several readers counts for each."""
        return self.frames / self.wall_s

    @property
    def cpu_us_a_frame(self) -> float:
        """CPU of the relay per frame."""
        return 1e6 * sum(self.cpu_s) / self.frames

    @property
    def load_share(self) -> float:
        """Share of a core used by the load generator; near 1, it would be what is measured."""
        return self.load_cpu_s / self.wall_s


@functools.cache
def program() -> Path:
    """Compile `load.c`; the program is deleted when this process ends.

    Raises:
        RuntimeError: there is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("the load generator is written in C and there is no cc: apt-get install gcc libc6-dev")
    folder = tempfile.mkdtemp(prefix="relayd-bench-load-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    subprocess.run([compiler, "-O2", "-o", f"{folder}/load", str(SOURCE)], check=True)
    return Path(folder, "load")


def run_round(
    mode: int, streams: Sequence[Stream], around: Iterable[Connection], pids: Sequence[int], lead_s: float = 0.0
) -> Round:
    """Send and receive all frames of `streams`; other messages received are passed to the connections afterwards.

    Args:
        around: connections to watch in addition to those of the streams.
        pids: processes whose CPU and memory are reported.
        lead_s: CPU, time and frames count from then on; only for a paced round.

    Raises:
        Stuck: the round failed; see `Stuck`.
    """
    ends = dict.fromkeys(around)
    for stream in streams:
        ends |= dict.fromkeys((stream.sender, *stream.readers))
    connections = list(ends)
    for connection in connections:
        connection.settle()
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as folder:
        with Path(folder, "blob").open("wb") as blob:
            lines = [f"mode {mode}", f"timeout_ms {ROUND_S * 1000:.0f}", *_stream_lines(streams, connections, blob)]
            lines.append(f"lead_ns {1e9 * lead_s:.0f}")
        head = [*_connection_lines(connections), f"blob {blob.name}", *(f"pid {pid}" for pid in pids)]
        Path(folder, "plan").write_text("\n".join([*head, *lines, ""]))
        command = [str(program()), f"{folder}/plan"]
        done = subprocess.run(
            command, pass_fds=[end.sock.fileno() for end in connections], stdout=subprocess.PIPE, check=False
        )
    report = _parse(done.stdout, done.returncode)
    _give_back(connections, report.pop("others"))
    return Round(**report)


@attrs.frozen
class Hold:
    """Idle connections, held by a process that answers pings."""

    process: "subprocess.Popen[bytes]"

    def end(self) -> int:
        """Close them; returns how many pings were answered.

        Raises:
            Stuck: the relay had closed a connection before.
        """
        self.process.terminate()
        out, _ = self.process.communicate()
        return int(_parse(out, self.process.returncode)["pongs"])


def hold(connections: Sequence[Connection]) -> Hold:
    """Hand connections over permanently."""
    for connection in connections:
        connection.settle()
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as folder:
        plan = Path(folder, "plan")
        plan.write_text("\n".join([*_connection_lines(connections), f"mode {HOLD}", "ready", ""]))
        process = subprocess.Popen(
            [str(program()), str(plan)],
            pass_fds=[connection.sock.fileno() for connection in connections],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.read(1)  # it has read the plan
    for connection in connections:
        connection.close()
    return Hold(process)


def _connection_lines(connections: Sequence[Connection]) -> list[str]:
    """`conns COUNT`, then `conn DESCRIPTOR KIND` for each; later lines refer to them by index."""
    return [f"conns {len(connections)}", *(f"conn {end.sock.fileno()} {end.KIND}" for end in connections)]


def _stream_lines(streams: Sequence[Stream], connections: Sequence[Connection], blob: IO[bytes]) -> list[str]:
    """`streams COUNT`, `burst BYTES FRAMES`, and for each stream, with its templates in `blob`:

    `stream SENDER FIRST_SEQ FRAMES INTERVAL_NS OFFSET_NS WINDOW QUIET`, then
    `variant FIRST_SEQ SEQ_BYTES MASK`, four numbers about what is sent (offset in `blob`, size, offsets of number and
    stamp in it) and the same for what is received; then `reader CONNECTION STALLED` for each.
    """
    place = {connection: number for number, connection in enumerate(connections)}
    lines = [f"streams {len(streams)}", f"burst {64 * 1024} 8"]
    at = 0
    for stream in streams:
        pace = f"{1e9 * stream.interval_s:.0f} {1e9 * stream.offset_s:.0f}"
        lines.append(
            f"stream {place[stream.sender]} {stream.first_seq} {stream.frames} {pace} {stream.window} {stream.quiet:d}"
        )
        for variant in stream.variants:
            blob.write(variant.wire)
            blob.write(variant.read)
            holes = variant.seq_at + variant.wrapped, variant.stamp_at + variant.wrapped
            lines.append(
                f"variant {variant.first_seq} {variant.seq_bytes} {variant.mask} "
                f"{at} {len(variant.wire)} {holes[0]} {holes[1]} "
                f"{at + len(variant.wire)} {len(variant.read)} {variant.seq_at} {variant.stamp_at}"
            )
            at += len(variant.wire) + len(variant.read)
        lines += [f"reader {place[reader]} {stream.stalled:d}" for reader in stream.readers]
    return lines


def _parse(out: bytes, code: int) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(out)
    except ValueError:
        raise Stuck(f"the load generator ended with {code}: {out[-200:]!r}") from None
    if error := report.get("error"):
        raise Stuck(str(error))
    return report


def _give_back(connections: Sequence[Connection], others: Sequence[dict[str, Any]]) -> None:
    for other in others:
        connection, data = connections[other["conn"]], bytes.fromhex(other["hex"])
        if other["is"] == "rest":
            connection.received += data
        else:
            connection.on_message(data)
