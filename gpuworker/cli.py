"""`gpuworker run | engines | doctor`."""

import argparse
import faulthandler
import json
import logging
import signal
import sys
from collections.abc import Sequence
from functools import partial

import trio

from gpuworker.config import ConfigError, WorkerConfig, add_run_options, read_config
from gpuworker.doctor import add_doctor_options, run_doctor
from gpuworker.engines.catalog import EngineNotFound, engine_names, find_engine
from gpuworker.health import HealthService
from gpuworker.identity import Identity
from gpuworker.log_format import LineFormatter
from gpuworker.slots.process_slot import ProcessSlot
from gpuworker.slots.slot import Slot
from gpuworker.slots.thread_slot import ThreadSlot
from gpuworker.status import WorkerError
from gpuworker.worker import Worker
from protocol.commands.exit_codes import DONE, FAILED, INTERRUPTED, USAGE, silence_stdout
from protocol.commands.progress import printable
from protocol.sd_notify import ServiceManager
from protocol.wire.validators import Value


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with DESIGN §11's codes."""
    given = _parser().parse_args(arguments)
    try:
        code: int = given.command(given)
    except ConfigError as fault:
        print(f"gpuworker: {fault}", file=sys.stderr)
        code = USAGE
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough; nothing more may be written, at exit neither
        silence_stdout()
        code = DONE
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpuworker", description="Serve an engine of this machine through a relay.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="register with a relay and run its requests", description=run_worker.__doc__)
    add_run_options(run)
    run.set_defaults(command=run_worker)
    engines = commands.add_parser("engines", help="the engines installed, their options, and whether they can run here")
    engines.add_argument("--json", action="store_true", help="as JSON")
    engines.set_defaults(command=list_engines)
    doctor = commands.add_parser("doctor", help="what can run here, and the commands that install what is missing")
    add_doctor_options(doctor)
    doctor.set_defaults(command=run_doctor)
    return parser


# -- run ---------------------------------------------------------------------------------------------------------


def run_worker(given: argparse.Namespace) -> int:
    """Register with a relay and run its requests. SIGTERM or Ctrl-C finishes what runs first, a second one does not."""
    config = read_config(given)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("gpuworker").setLevel(logging.INFO)
    faulthandler.enable()  # systemd's watchdog ends a worker that hangs with SIGABRT: the log then says where it stood
    try:
        return trio.run(_serve, config)
    except WorkerError as fault:
        print(printable(f"gpuworker: {fault.code}: {fault}"), file=sys.stderr)
        return FAILED


async def _serve(config: WorkerConfig) -> int:
    slots = make_slots(config)
    worker = Worker(
        Identity(name=config.name, spaces=config.spaces, engine=config.engine, token=config.token),
        config.address,
        slots,
        drain_timeout_s=config.drain_timeout_s,
    )
    manager = ServiceManager.from_environment()
    service = HealthService(worker, slots, manager, config.cancel_grace_s, config.drain_timeout_s)
    heard: list[int] = []
    failure: WorkerError | None = None
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                async for number in signals:
                    heard.append(number)
                    if len(heard) == 1:
                        worker.drain(f"{signal.Signals(number).name}; once more to stop at once")
                        service.stopping()
                    else:
                        worker.stop()

            nursery.start_soon(listen)
            nursery.start_soon(service.serve)
            try:
                await worker.run()
            except WorkerError as fault:  # kept, as a nursery would wrap it in a group
                failure = fault
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return INTERRUPTED if signal.SIGINT in heard or len(heard) > 1 else DONE


def make_slots(config: WorkerConfig) -> list[Slot]:
    """The slots of a worker, not served yet."""
    if config.in_threads:
        make = partial(config.engine_class, config.options)
        return [ThreadSlot(index, make, cancel_grace_s=config.cancel_grace_s) for index in range(config.slots)]
    loading = trio.Lock()
    return [
        ProcessSlot(
            index,
            config.engine,
            config.options,
            loading=loading,
            load_timeout_s=config.load_timeout_s,
            cancel_grace_s=config.cancel_grace_s,
        )
        for index in range(config.slots)
    ]


# -- engines -----------------------------------------------------------------------------------------------------


def describe_engine(name: str) -> dict[str, Value]:
    """One engine, as `gpuworker engines --json` lists it."""
    try:
        engine = find_engine(name)
    except EngineNotFound as fault:
        return {
            "name": name,
            "summary": "",
            "runs_here": False,
            "missing": [{"what": str(fault), "install": ""}],
            "options": {},
        }
    missing = [{"what": lack.what, "install": lack.install} for lack in engine.missing()]
    options = {
        key: {
            "kind": option.kind.__name__,
            "default": option.default,
            "required": option.required,
            "help": option.help,
            **({"choices": list(option.choices)} if option.choices else {}),
        }
        for key, option in engine.OPTIONS.items()
    }
    return {"name": name, "summary": engine.SUMMARY, "runs_here": not missing, "missing": missing, "options": options}


def list_engines(given: argparse.Namespace) -> int:
    """Print the engines installed."""
    engines = [describe_engine(name) for name in engine_names()]
    if given.json:
        print(json.dumps(engines, ensure_ascii=False, indent=2))
        return DONE
    for engine in engines:
        print(
            f"{engine['name']:<10} {'runs here' if engine['runs_here'] else 'cannot run here':<16} {engine['summary']}"
        )
        for lack in engine["missing"]:
            print(f"{'':<10} needs {lack['what']}" + (f": {lack['install']}" if lack["install"] else ""))
        for key, option in engine["options"].items():
            default = "" if option["default"] is None else f" (default {option['default']})"
            setting = f"-o {key}={option['kind'].upper()}"
            print(f"{'':<12} {setting:<26} {option['help']}{' (required)' if option['required'] else default}")
    return DONE


if __name__ == "__main__":
    main()
