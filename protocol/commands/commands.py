"""The implementation of each `relay` command."""

import argparse
import json
import signal
import sys
from collections.abc import Awaitable, Callable, Container, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NoReturn

import trio

from protocol.client.client import RelayClient, open_relay
from protocol.client.contexts import choose_login
from protocol.client.inputs import TEXT, From, InputSource
from protocol.commands.batch import Batch, open_batch
from protocol.commands.exit_codes import DONE, INTERRUPTED, Told
from protocol.commands.id_prefix import check_request_id, find_request_id
from protocol.commands.listing import chosen
from protocol.commands.progress import Progress, table
from protocol.commands.sink import Sink, json_line
from protocol.commands.space_detail import describe, find_voices
from protocol.commands.standard_input import StandardInput, TextDecoder, decoded
from protocol.link.background import open_background
from protocol.printable import printable
from protocol.wire.errors import EncodeError, ErrorCode, LinkError, RequestRejected
from protocol.wire.messages import MAX_FOUND, Snapshot, Welcome
from protocol.wire.params_schema import check_params, takes_text
from protocol.wire.validators import Value

#: How long to wait for the list of what a space accepts; without it, the refusal is printed as it came.
SPACES_S = 3.0
#: Where standard input is to be a text.
NOTHING_TO_READ = "there is nothing to read on standard input"

Params = dict[str, Value]


def run_command(args: argparse.Namespace, progress: Progress) -> int:
    """Run the requested command; returns its exit code, or raises the error that ended it."""
    args.login = choose_login(args.url, args.token_file, args.context)
    return trio.run(_run, args, progress)


async def _run(args: argparse.Namespace, progress: Progress) -> int:
    """Run the command until it ends or a signal ends it, in which case it still cancels its request in order."""
    caught: list[int] = []
    with trio.CancelScope() as working:
        receiving = trio.CancelScope()
        ready = trio.Event()

        async def receive_signal() -> None:
            # The receiver closes after the first signal, so a second Ctrl-C ends the program at once.
            # Once one has come the receiver is gone, and a second Ctrl-C ends the program at once.
            with receiving, trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                ready.set()
                async for number in signals:
                    caught.append(number)
                    break
            working.cancel()

        async def stop() -> None:
            receiving.cancel()

        async with open_background(receive_signal, stop):
            await ready.wait()
            await COMMANDS[args.command](args, progress)
            return DONE
    progress.note("interrupted")
    return 128 + caught[0] if caught else INTERRUPTED


def _open(args: argparse.Namespace, progress: Progress) -> AbstractAsyncContextManager[RelayClient]:
    lost = False

    def on_reconnect(fault: LinkError, delay_s: float) -> None:
        nonlocal lost
        lost = True
        progress.note(f"connection lost ({fault}), trying again in {delay_s:.1f} s")

    def on_up(_welcome: Welcome) -> None:
        if lost:
            progress.note("connected again")

    role = args.role or ("operator" if args.command == "watch" else "client")
    return open_relay(args.login.url, token=args.login.token, role=role, on_reconnect=on_reconnect, on_up=on_up)


async def say(args: argparse.Namespace, progress: Progress) -> None:
    """Speak a text."""
    if any(name == "text" for name, _value in args.param):
        raise ValueError("--param text=... and TEXT are the same param; give one of them")
    if args.lines is not None:
        lines, log = open_batch(args, {name: _parsed(value) for name, value in args.param})
        async with _open(args, progress) as relay:
            await Batch(args, progress, relay, log, of=len(lines)).run(lines)
        return
    text = " ".join(args.text)
    if text == "-":
        await _submit(args, progress, {}, stdin="text")
    elif not text.strip():
        raise ValueError("the text is empty; there is nothing to speak")
    else:
        await _submit(args, progress, {"text": text})


async def submit(args: argparse.Namespace, progress: Progress) -> None:
    """Submit any request."""
    await _submit(args, progress, {})


async def _submit(args: argparse.Namespace, progress: Progress, params: Params, stdin: str | None = None) -> None:
    """Submit a request and follow it; `stdin` names what standard input contains, unless an option does."""
    inputs: dict[str, InputSource] = {name: Path(path) for name, path in args.input if path != "-"}
    for name, given in args.pipe:
        try:
            check_request_id(given)
        except ValueError as fault:
            raise ValueError(f"input {name!r}: {fault}") from None
    names = [name for name, _source in (*args.input, *args.pipe)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"input {twice} has two sources; name one")
    from_stdin = [*([stdin] if stdin else ()), *(name for name, path in args.input if path == "-")]
    if len(from_stdin) > 1:
        raise ValueError(f"standard input cannot be {' and '.join(from_stdin)}; name a file for one of them")
    params |= {name: _parsed(text) for name, text in args.param}
    read = StandardInput() if from_stdin else None
    if read is not None and args.command == "say" and not await read.read_begun():
        raise ValueError(NOTHING_TO_READ)
    sink = Sink(args, progress, args.space)
    try:
        async with _open(args, progress) as relay:
            inputs |= {name: From(await find_request_id(relay, given)) for name, given in args.pipe}
            is_fed = read is not None and await _add_stdin(relay, args, read, from_stdin[0], params, inputs)
            try:
                await _follow(relay, args, sink, params, inputs)
            except RequestRejected as refusal:
                if is_fed or not _read_as_json(args, refusal.details):
                    raise  # it cannot be sent again when a part of an input is gone
                row = await _space_row(relay, args.space)
                if not (texts := _params_taken_as_text(row, args, refusal.details)):
                    raise
                await _follow(relay, args, sink, params | texts, inputs)
    except EncodeError as fault:
        raise ValueError(f"the request cannot be sent: {fault.describe_in('params')}") from fault
    finally:
        sink.close()


async def _add_stdin(
    relay: RelayClient,
    args: argparse.Namespace,
    stdin: StandardInput,
    name: str,
    params: Params,
    inputs: dict[str, InputSource],
) -> bool:
    """Add standard input to a request; True if it is fed as it comes, which the space must take.

    With --detach it is added whole, since nobody stays to feed it.
    """
    row = await _space_row(relay, args.space)
    schema, rule = row.get("params") or {}, (row.get("inputs") or {}).get(name) or {}
    is_text = args.command == "say" or name in schema.get("properties", {})
    is_fed = bool(rule.get("live")) and not args.detach
    if not await stdin.read_begun() and is_text:
        raise ValueError(NOTHING_TO_READ)
    media_type = TEXT if is_text else stdin.media_type(rule.get("media_types", ()))
    if is_fed:
        params |= _params_taken_as_text(row, args, check_params(schema, params))
        inputs[name] = (decoded(stdin.pieces()) if is_text else stdin.pieces(), media_type)
    elif is_text:
        params[name] = TextDecoder().decode(await stdin.read_all(), final=True).rstrip("\n")
    else:
        inputs[name] = (await stdin.read_all(), media_type)
    return is_fed


async def _follow(
    relay: RelayClient, args: argparse.Namespace, sink: "Sink", params: Params, inputs: dict[str, InputSource]
) -> None:
    async with relay.submit(
        args.space,
        params,
        inputs=inputs,
        priority=args.priority,
        queue_timeout_s=args.queue_timeout,
        run_timeout_s=args.run_timeout,
        detach=args.detach,
        retry=args.retry,
        cache=not args.no_cache,
        group=args.group,
    ) as stream:
        if args.detach:
            sink.line({"type": "accepted", "request_id": stream.request_id} if args.json else stream.request_id)
        else:
            await sink.attach_to(stream)


async def _space_row(relay: RelayClient, space: str) -> dict[str, Value]:
    """What a space takes; empty if it is not known, or the relay does not say within `SPACES_S`."""
    rows: list[dict[str, Value]] = []
    with trio.move_on_after(SPACES_S):
        rows = await relay.spaces()
    return next((row for row in rows if row.get("name") == space), {})


def _read_as_json(args: argparse.Namespace, refused: Container[str]) -> dict[str, str]:
    """Those of the refused params that were read as JSON: 123, true, null."""
    return {name: text for name, text in args.param if name in refused and not isinstance(_parsed(text), str)}


def _params_taken_as_text(row: dict[str, Value], args: argparse.Namespace, refused: Container[str]) -> Params:
    """Those of the params read as JSON that the space takes as text."""
    rules = (row.get("params") or {}).get("properties", {})
    return {name: text for name, text in _read_as_json(args, refused).items() if takes_text(rules.get(name), text)}


def _parsed(text: str) -> Value:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


async def attach(args: argparse.Namespace, progress: Progress) -> None:
    """Follow a request."""
    check_request_id(args.request_id)
    sink = Sink(args, progress, "relay")
    try:
        async with _open(args, progress) as relay:
            request_id = await find_request_id(relay, args.request_id)
            async with relay.attach(request_id, args.after_seq) as stream:
                await sink.attach_to(stream)
    finally:
        sink.close()


async def status(args: argparse.Namespace, progress: Progress) -> None:
    """Show the state of requests."""

    async def show_one(relay: RelayClient, request_id: str) -> None:
        _print_status(args, (await relay.status(request_id)).to_map())

    await _for_each_id(args, progress, show_one)


async def cancel(args: argparse.Namespace, progress: Progress) -> None:
    """Cancel requests."""

    async def cancel_one(relay: RelayClient, request_id: str) -> None:
        reply = await relay.cancel(request_id, args.reason)
        if reply.state in ("completed", "failed"):
            progress.note(f"too late: the request is already {reply.state}")
        _print_status(args, reply.to_map())

    await _for_each_id(args, progress, cancel_one)


async def _for_each_id(
    args: argparse.Namespace, progress: Progress, act: Callable[[RelayClient, str], Awaitable[None]]
) -> None:
    """Act on each of the requests, also when one is refused; not before all of their ids are clear."""
    given_ids = list(map(check_request_id, args.request_ids))
    async with _open(args, progress) as relay:
        ids = [await find_request_id(relay, given) for given in given_ids]
        refused = 0
        for number, request_id in enumerate(dict.fromkeys(ids)):
            if number and not args.json:
                print()
            try:
                await act(relay, request_id)
            except RequestRejected as refusal:
                if len(ids) == 1:
                    raise
                refused += 1
                progress.error(f"{request_id}: {refusal.message}", refusal.code, refusal.details)
        if refused:
            raise Told


async def requests(args: argparse.Namespace, progress: Progress) -> None:
    """List requests, the latest first."""
    async with _open(args, progress) as relay:
        rows, total = await relay.find(
            spaces=args.space or (), states=args.state or (), principals=args.principal or (), limit=args.limit or 100
        )
    if args.json:
        print(json_line(rows), flush=True)
    else:
        columns = ("request_id", "state", "space", "principal", "attempt", "age_s", "audio_s", "code")
        cells = [["-" if row.get(column) is None else str(row[column]) for column in columns] for row in rows]
        print(table([[column.upper() for column in columns], *cells]), flush=True)
    if total > len(rows):
        progress.note(f"{total - len(rows)} more are left out; --limit N shows N, up to {MAX_FOUND}")


def _print_status(args: argparse.Namespace, row: dict[str, Value]) -> None:
    del row["type"]
    lines = "\n".join(printable(f"{name}: {value}") for name, value in row.items())
    print(json_line(row) if args.json else lines, flush=True)


async def spaces(args: argparse.Namespace, progress: Progress) -> None:
    """List the spaces."""
    async with _open(args, progress) as relay:
        rows = chosen(await relay.spaces(), args)
    if args.json:
        print(json_line(rows), flush=True)
        return
    columns = ("name", "state", "engine", "workers", "slots", "queued", "running", "live", "description")
    rows = [row | {"live": _live_inputs(row)} for row in rows]
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    print(table([[column.upper() for column in columns], *cells]), flush=True)


def _live_inputs(row: dict[str, Value]) -> str:
    """The inputs of a space that may be fed while a request runs."""
    return ",".join(name for name, rule in (row.get("inputs") or {}).items() if rule.get("live"))


async def show(args: argparse.Namespace, progress: Progress) -> None:
    """Show what a space makes and takes."""
    async with _open(args, progress) as relay:
        row = _named(await relay.spaces(), args.space)
    print(json_line(row) if args.json else describe(row), flush=True)


async def voices(args: argparse.Namespace, progress: Progress) -> None:
    """List the voices of a space."""
    async with _open(args, progress) as relay:
        names = find_voices(_named(await relay.spaces(), args.space))
    if args.json:
        print(json_line(names), flush=True)
    elif names is None:
        progress.note(f"space {args.space} takes any name of a voice, and does not list them")
    else:
        if not names:
            progress.note(f"space {args.space} has one voice only; leave out the param")
        print("".join(f"{printable(name)}\n" for name in names), end="", flush=True)


def _named(rows: list[dict[str, Value]], name: str) -> dict[str, Value]:
    row = next((row for row in rows if row.get("name") == name), None)
    if row is None:
        there = ", ".join(str(row.get("name")) for row in rows) or "none"
        raise RequestRejected(
            "", ErrorCode.SPACE_NOT_FOUND, f"there is no space {name!r} that you may use; there are: {there}"
        )
    return row


async def watch(args: argparse.Namespace, progress: Progress) -> None:
    """Follow everything that happens."""
    async with _open(args, progress) as relay, relay.watch(args.topics) as changes:
        async for change in changes:
            if args.json:
                print(json_line(change.to_map()), flush=True)
                continue
            word = "is" if isinstance(change, Snapshot) else "now"
            for topic, rows in change.data.items():
                for row in rows:
                    print(printable(f"{topic} {word} " + " ".join(f"{key}={value}" for key, value in row.items())))
            for topic, gone in getattr(change, "gone", {}).items():
                for name in gone:
                    print(printable(f"{topic} gone {name}"))
            sys.stdout.flush()


COMMANDS: Mapping[str, Callable[[argparse.Namespace, Progress], Awaitable[None]]] = {
    "say": say,
    "submit": submit,
    "attach": attach,
    "status": status,
    "cancel": cancel,
    "requests": requests,
    "spaces": spaces,
    "show": show,
    "voices": voices,
    "watch": watch,
}
