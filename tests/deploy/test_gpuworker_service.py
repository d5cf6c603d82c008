"""deploy/gpuworker.service and the documents of a GPU machine: what they say is what the commands take."""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from gpuworker.cli import _parser as gpuworker_parser
from gpuworker.engines.catalog import find_engine, parse_options
from gpuworker.engines.voxcpm.engine import VoxcpmEngine
from gpuworker.engines.voxcpm.memory import GIB, RELEASED, slot_bytes
from gpuworker.engines.voxcpm.schema import Abilities, input_rules, params_schema
from gpuworker.worker import DRAIN_TIMEOUT_S
from protocol.cli import _parser as relay_parser
from relayd.cli import _parser as relayd_parser
from tests.support.processes import a_place, a_relay

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "gpuworker.service"
SETTINGS = ROOT / "deploy" / "gpuworker.toml"
ENVIRONMENT = ROOT / "deploy" / "gpuworker.env"
DOCUMENTS = ("gpu-machine.md", "indextts2.md", "language-models.md", "speech-servers.md")


def unit() -> dict[str, list[str]]:
    """Setting -> its values, in turn."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def environment() -> dict[str, str]:
    lines = [line for line in ENVIRONMENT.read_text().splitlines() if line and not line.startswith("#")]
    return {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}


def arguments(given: str) -> list[str]:
    """The arguments of ExecStart, expanded as systemd does it, with GPUWORKER_ARGS `given`."""
    [command] = unit()["ExecStart"]
    program, *words = command.split()
    assert program == "/opt/gpuworker/bin/gpuworker"
    assert words[-1] == "$GPUWORKER_ARGS"  # without braces, so it is split at spaces
    return [*words[:-1], *given.split()]


def test_the_unit_starts_the_worker_with_arguments_that_it_takes() -> None:
    told = environment()
    given = gpuworker_parser().parse_args(arguments(told["GPUWORKER_ARGS"]))
    engine = find_engine(given.engine)
    assert engine is VoxcpmEngine
    assert parse_options(engine.OPTIONS, given.options)["model"] == "openbmb/VoxCPM2"
    assert given.token_file == "${CREDENTIALS_DIRECTORY}/token"
    assert unit()["LoadCredential"] == ["token:/etc/gpuworker/token"]
    assert unit()["EnvironmentFile"] == ["/etc/gpuworker/env"]
    assert told["RELAY_URL"].startswith("wss://")


def test_the_settings_file_has_the_defaults_and_names_every_setting_that_the_unit_leaves_open() -> None:
    args = gpuworker_parser().parse_args(["run", "--config", str(SETTINGS)])
    plain = gpuworker_parser().parse_args(["run"])
    assert args.settings.fill(args, {}) == plain.settings.fill(plain, {}) == []
    assert (args.space, args.options) == (["tts"], ["model=openbmb/VoxCPM2"])
    left_out = {"relay", "token_file", "context", "name", "in_threads", "slots"}
    named = set(tomllib.loads(SETTINGS.read_text()))
    for name in vars(plain).keys() - {"command", "settings", "config", "space", "options", "engine"}:
        assert getattr(args, name) == getattr(plain, name)
        assert (name in named) is (name not in left_out)


@pytest.mark.trio
async def test_the_units_command_registers_with_the_token_that_systemd_hands_it(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    async with a_relay(place) as relay:
        url = (await relay.event("listening"))["urls"][0]
        out, _ = await place.run("relayd", "token", "create", "--role", "worker", "--name", "box", "--space", "tts")
        (credentials / "token").write_bytes(out)
        words = [
            word.replace("${CREDENTIALS_DIRECTORY}", str(credentials))
            for word in arguments("--engine mock -o speed=0 --space tts --slots 2")
        ]
        async with place.start("gpuworker", *words, RELAY_URL=url):
            await relay.event("worker registered")
            told, _ = await place.run("relayd", "workers", "--json")
            assert [(row["principal"], row["slots"]) for row in json.loads(told)] == [("box", 2)]
            with trio.fail_after(60):
                await place.run("relay", "say", "Hello.", "-o", "out.wav")


def test_the_unit_leaves_the_worker_its_gpu_its_compiler_and_its_time_to_drain() -> None:
    said = unit()
    for name in ("MemoryDenyWriteExecute", "ProcSubset"):  # torch.compile writes code; memory.py reads /proc/meminfo
        assert name not in said
    assert said["PrivateDevices"] == ["no"]
    assert [rule.split()[0] for rule in said["DeviceAllow"]] == ["char-nvidia*", "char-drm"]
    assert float(said["TimeoutStopSec"][0]) > DRAIN_TIMEOUT_S
    assert said["Restart"] == ["on-failure"]
    assert said["StartLimitIntervalSec"] == ["0"]
    caches = dict(word.split("=", 1) for line in said["Environment"] for word in line.split())
    for name in ("HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HOME"):  # / is its home otherwise
        assert caches[name].startswith(("%C/gpuworker", "%S/gpuworker"))


PARSERS = {"gpuworker": gpuworker_parser, "relay": relay_parser, "relayd": relayd_parser}


def commands() -> Iterator[Any]:
    """The commands of ours in the documents' examples: document, name, arguments."""
    for document in DOCUMENTS:
        for block in re.findall(r"```console\n(.*?)```", (ROOT / "docs" / document).read_text(), re.DOTALL):
            for line in re.findall(r"^\$ (.*)", block, re.MULTILINE):
                words = [word for word in shlex.split(line) if word != "sudo" and not re.match(r"[A-Z_]+=", word)]
                if words and (name := Path(words[0]).name) in PARSERS:
                    yield pytest.param(document, name, words[1:], id=line[:60])


@pytest.mark.parametrize(("document", "name", "words"), list(commands()))
def test_the_documents_commands_are_ones_that_are_taken(document: str, name: str, words: list[str]) -> None:
    given = PARSERS[name]().parse_args(words)
    if getattr(given, "engine", None):
        parse_options(find_engine(given.engine).OPTIONS, given.options or [])
    if document == "gpu-machine.md":
        assert {key for key, _ in getattr(given, "param", None) or []} <= set(params_schema(EVERYTHING)["properties"])
        assert {key for key, _ in getattr(given, "input", None) or []} <= set(input_rules(EVERYTHING))


EVERYTHING = Abilities(clones=True, normalizes=True, denoises=True, fetches=True, voices=("anna",))


def test_the_documents_tables_are_the_engines_params_and_options() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", (ROOT / "docs" / "gpu-machine.md").read_text(), re.MULTILINE))
    schema = params_schema(EVERYTHING)["properties"]
    assert set(rows) - {"space_full", "space_not_found"} == set(schema) | set(VoxcpmEngine.OPTIONS)
    for name, rule in schema.items():
        words = rows[name].replace(",", "")
        for low, high in (("minimum", "maximum"), ("minLength", "maxLength")):
            if low in rule:
                assert f" {rule[low]:.10g} to {rule[high]:.10g} " in words, name
        default = rule.get("default")
        if default is not None:
            assert f"| {default} |".lower().replace("'", '"') in words.replace('"', "").lower(), name
    for name, option in VoxcpmEngine.OPTIONS.items():
        if option.default is not None:
            default = f"{option.default:g}" if isinstance(option.default, float) else str(option.default)
            assert default.lower() in rows[name].split("|")[0].lower(), name
    document = (ROOT / "docs" / "gpu-machine.md").read_text()
    assert all(f"`{name}`" in document for name in input_rules(EVERYTHING))


def test_the_documents_memory_is_what_the_worker_reckons_with() -> None:
    rows = re.findall(
        r"`(openbmb/\S+)` \| ([\d.]+) GiB \| ([\d.]+) GiB", (ROOT / "docs" / "gpu-machine.md").read_text()
    )
    assert len(rows) == len(RELEASED)
    for model, slot, building in rows:
        need = RELEASED[model.lower()]
        assert slot_bytes(need, gpu=True) / GIB == pytest.approx(float(slot), abs=0.06)
        assert need.building / GIB == pytest.approx(float(building), abs=0.15)
