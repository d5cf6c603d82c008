"""`relayd demo`: starts a relay and workers as processes, speaks a sentence or holds conversations, and cleans up."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import trio

from protocol.client.client import open_relay
from protocol.commands.wav_writer import AudioWriter, check_audio_name
from protocol.install_hint import install_command
from protocol.link.background import open_background
from protocol.wire.errors import LinkError, RequestError
from protocol.wire.frames import Audio, Started
from protocol.wire.messages import Accepted, Queued
from protocol.wire.structs import AudioFormat
from relayd.auth.tokens import TokenRegistry
from relayd.config.loader import load_config
from relayd.net.one_time_link import open_one_time_link
from relayd.store.factory import open_offline
from relayd.store.records import PutToken

DEFAULT_TEXT = (
    "Hello world. This sentence was spoken by a worker, sent through a relay while it was being made, "
    "and written down as it arrived. 你好，世界。"
)
SPACE = "tts"
#: The engines of `--talk`, by their spaces: neither needs weights or a GPU.
TALKERS = {"llm": ("eliza", "-o", "pace_ms=10"), SPACE: ("espeak",)}
TALK = f'[talk]\nreply = "llm"\nspeech = "{SPACE}"\n'
#: How long a process may take to become ready: a cold start of Python on a slow disk takes seconds.
READY_S = 30.0
STOP_S = 5.0
POLL_S = 0.02
CHUNKS_PER_LINE = 25
SPEAK_S = 120.0


class DemoFailed(Exception):
    """The demo failed; the message says at which step."""


@attrs.define
class Demo:
    """What the demo started."""

    folder: Path
    url: str = ""
    client_token: str = ""
    worker_token: str = ""
    #: Name -> process id.
    pids: dict[str, int] = attrs.field(factory=dict)

    @property
    def page(self) -> str:
        """The address of the relay's page."""
        return f"{self.url.replace('ws://', 'http://', 1)}/"


async def run_demo(text: str, output: Path, keep: bool) -> None:
    """Speak `text` through a relay and a worker started for it, and write it to `output`.

    Args:
        text: the text to speak; must not be empty.
        output: the file; its suffix selects WAV, mp3 or PCM.
        keep: leave both running, and print how to use and stop them.

    Raises:
        DemoFailed: something did not start, or the request failed.
    """
    if not text.strip():
        raise DemoFailed("there is nothing to speak; give a text, as in: relayd demo 'Hello.'")
    _check_espeak()
    try:
        check_audio_name(output)
        writer = AudioWriter(output)
    except ValueError as fault:
        raise DemoFailed(str(fault)) from None
    except OSError as fault:
        raise DemoFailed(f"cannot write {output}: {fault.strerror}") from None
    demo = Demo(Path(tempfile.mkdtemp(prefix="relayd-demo-")))
    kept = False
    try:
        async with _process(demo, "relay", _relay_command(demo, [SPACE]), keep) as relay:
            await _wait_until_it_listens(demo, relay)
            command = _worker_command(demo, SPACE, "espeak")
            async with _process(demo, "worker", command, keep, RELAY_TOKEN=demo.worker_token) as worker:
                await _wait_for_event(relay, worker, "worker registered")
                _print_step("worker", f"registered space {SPACE!r}: espeak-ng, 1 slot, in its own process")
                await _speak(demo, text, output, writer)
        kept = keep
    finally:
        writer.close()
        if not kept:
            shutil.rmtree(demo.folder, ignore_errors=True)
    if kept:
        _print_commands(demo, f"relay say 'And now another sentence.' --space {SPACE} -o another.wav")


async def run_talk_demo(keep: bool) -> None:
    """Hold conversations: start a relay, a language model and a voice, and print where a browser finds them.

    Args:
        keep: leave all of them running, and print how to stop them; else they run until SIGINT or SIGTERM.

    Raises:
        DemoFailed: something did not start, or ended.
    """
    _check_espeak()
    demo = Demo(Path(tempfile.mkdtemp(prefix="relayd-demo-")))
    kept = False
    try:
        with trio.CancelScope() as scope:
            async with _until_a_signal(scope), AsyncExitStack() as stack:
                relay = await stack.enter_async_context(
                    _process(demo, "relay", _relay_command(demo, TALKERS, TALK), keep)
                )
                await _wait_until_it_listens(demo, relay)
                workers = {
                    space: await stack.enter_async_context(
                        _process(
                            demo, engine[0], _worker_command(demo, space, *engine), keep, RELAY_TOKEN=demo.worker_token
                        )
                    )
                    for space, engine in TALKERS.items()
                }
                for space, worker in workers.items():
                    await _wait_for_event(relay, worker, "worker registered", spaces=[space])
                    _print_step(worker.name, f"registered space {space!r}")
                kept = keep
                if keep:
                    _print_page(f"Talk in a browser, and log in with the token {demo.client_token}:", demo.page)
                else:
                    link = await stack.enter_async_context(open_one_time_link(f"{demo.page}#login={demo.client_token}"))
                    _print_page("Talk in a browser; this link logs in, once:", link)
                    _print_terminal(demo)
                    print("Ctrl-C ends all of it.", flush=True)
                    await _wait_until_one_ends([relay, *workers.values()])
    finally:
        if not kept:
            shutil.rmtree(demo.folder, ignore_errors=True)
    if kept:
        _print_commands(demo, "relay talk")


@asynccontextmanager
async def _until_a_signal(scope: trio.CancelScope) -> AsyncIterator[None]:
    """Cancel `scope` when a signal asks this process to end, while the block runs."""
    listening = trio.CancelScope()
    ready = trio.Event()

    async def listen() -> None:
        with listening, trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            ready.set()
            async for _number in signals:
                scope.cancel()

    async def stop() -> None:
        listening.cancel()

    async with open_background(listen, stop):
        await ready.wait()
        yield


def _check_espeak() -> None:
    if find_spec("espeakng_loader") is None:
        raise DemoFailed(f"the demo speaks with espeak-ng; install it with: {install_command('espeak')}")


async def _wait_until_it_listens(demo: Demo, relay: "DemoProcess") -> None:
    demo.url = (await _wait_for_event(relay, relay, "listening"))["urls"][0]
    _print_step("relay", f"listens on {demo.url}")


async def _wait_until_one_ends(processes: list["DemoProcess"]) -> None:
    """Wait until one of them ends, which none does by itself.

    Raises:
        DemoFailed: one has.
    """
    while True:
        for started in processes:
            if (code := started.process.poll()) is not None:
                raise DemoFailed(f"the {started.name} ended with code {code}; its log ends with:\n{_tail(started.log)}")
        await trio.sleep(1)


def _relay_command(demo: Demo, spaces: Iterable[str], more: str = "") -> list[str]:
    """Create the state folder, with tokens for the worker and the client, and return the relay's command."""
    state_dir = demo.folder / "state"
    config = demo.folder / "relayd.toml"
    tables = more + "".join(f"[spaces.{space}]\n" for space in spaces)
    config.write_text(f'listen = "127.0.0.1:0"\nstate_dir = "state"\n[log]\nformat = "json"\n{tables}')
    load_config(config, environ={})
    with open_offline(state_dir) as store:
        tokens = TokenRegistry()
        for role in ("worker", "client"):
            token = tokens.create(role=role, name=f"demo-{role}", now=time.time(), spaces=[*spaces])
            store.commit(PutToken(token.record))
            setattr(demo, f"{role}_token", token.text)
    return [sys.executable, "-m", "relayd.cli", "serve", "--config", str(config)]


def _worker_command(demo: Demo, space: str, *engine: str) -> list[str]:
    run = [sys.executable, "-m", "gpuworker.cli", "run", "--relay", demo.url, "--space", space]
    return [*run, "--engine", *engine, "--name", f"demo-{space}"]


@attrs.frozen
class DemoProcess:
    """A process of the demo, and its log file."""

    name: str
    process: trio.Process
    log: Path


@asynccontextmanager
async def _process(demo: Demo, name: str, command: list[str], keep: bool, **environ: str) -> AsyncIterator[DemoProcess]:
    """Run a process in its own session; it is stopped at the end unless `keep` is set and the block succeeded."""
    log = demo.folder / f"{name}.log"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RELAY_", "RELAYD_"))}
    with log.open("wb") as out:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=inherited | environ, start_new_session=True
        )
    demo.pids[name] = process.pid
    succeeded = False
    try:
        yield DemoProcess(name, process, log)
        succeeded = True
    finally:
        if not (keep and succeeded):
            with trio.CancelScope(shield=True):
                await _stop(process)


async def _stop(process: trio.Process) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    with trio.move_on_after(STOP_S):
        await process.wait()
        return
    process.kill()
    await process.wait()


async def _wait_for_event(relay: DemoProcess, target: DemoProcess, event: str, **fields: Any) -> dict[str, Any]:
    """Wait until the relay logs an event with `fields`, which shows that `target` is ready; returns the log entry."""
    with trio.move_on_after(READY_S):
        while target.process.poll() is None:
            for line in (await trio.Path(relay.log).read_text()).splitlines():
                entry = _parse_log_line(line)
                if entry.get("event") == event and fields.items() <= entry.items():
                    return entry
            await trio.sleep(POLL_S)
    code = target.process.returncode
    why = f"was not ready within {READY_S:g} s" if code is None else f"ended with code {code}"
    raise DemoFailed(f"the {target.name} {why}; its log ends with:\n{_tail(target.log)}")


def _tail(log: Path) -> str:
    return log.read_text().strip()[-2000:] or "(nothing)"


def _parse_log_line(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}  # a partial line, or a traceback
    return entry if isinstance(entry, dict) else {}


async def _speak(demo: Demo, text: str, output: Path, writer: AudioWriter) -> None:
    """Act as the client: submit the text, print each step, and write the file."""
    _print_step("client", f"submits {text!r}")
    began, first_s, chunks = time.perf_counter(), 0.0, 0
    try:
        with trio.fail_after(SPEAK_S):
            async with (
                open_relay(demo.url, token=demo.client_token, agent="relayd-demo") as relay,
                relay.submit(SPACE, {"text": text}) as stream,
            ):
                async for event in stream.events():
                    now_s = time.perf_counter() - began
                    if isinstance(event, Accepted):
                        _print_step("relay", f"accepted request {event.request_id[:8]}, {_ms(now_s)} after it was sent")
                    elif isinstance(event, Queued):
                        _print_step("relay", f"queued: position {event.position} of {event.of}")
                    elif isinstance(event, Started):
                        _print_step("worker", f"started, {_ms(now_s)}")
                        writer.begin(event.format or AudioFormat(sample_rate=22_050))
                    elif isinstance(event, Audio):
                        writer.write(event.pcm)
                        chunks += 1
                        if chunks == 1:
                            first_s = now_s
                            _print_step("client", f"first audio, {_ms(now_s)}")
                        elif chunks % CHUNKS_PER_LINE == 0:
                            _print_step("client", f"chunk {chunks}, {writer.seconds:.1f} s of audio, {_ms(now_s)}")
                await stream.result()
    except (LinkError, RequestError, ValueError, OSError) as fault:
        raise DemoFailed(f"the request failed: {fault}") from fault
    except trio.TooSlowError:
        raise DemoFailed(f"the request did not complete within {SPEAK_S:g} s") from None
    if not writer.seconds:
        raise DemoFailed("the request completed without any audio; give a text with words in it")
    took_s = time.perf_counter() - began
    _print_step("client", f"wrote {output}: {writer.seconds:.1f} s of speech in {chunks} chunks")
    _print_step("", f"first audio after {_ms(first_s)}, all audio after {_ms(took_s)}")
    _print_step(
        "", f"real-time factor {took_s / writer.seconds:.3f} ({writer.seconds / took_s:.0f}x faster than real time)"
    )


def _print_step(who: str, what: str) -> None:
    print(f"{who:7} {what}", flush=True)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _print_page(words: str, address: str) -> None:
    print(f"\n{words}\n  {address}", flush=True)


def _print_terminal(demo: Demo) -> None:
    print(
        f"or in a terminal:\n"
        f"  export RELAY_URL={demo.url} RELAY_TOKEN={demo.client_token}\n"
        f"  relay talk\n"
        f"That token logs in at {demo.page}, too.\n",
        flush=True,
    )


def _print_commands(demo: Demo, example: str) -> None:
    pids = " ".join(str(pid) for pid in demo.pids.values())
    print(
        f"\nThe relay and its workers are still running. Try:\n"
        f"  export RELAY_URL={demo.url} RELAY_TOKEN={demo.client_token}\n"
        f"  {example}\n"
        f"Stop them with:\n"
        f"  kill {pids}; rm -rf {shlex.quote(str(demo.folder))}"
    )
