"""What `gpuworker` and docs/speech-servers.md say of engine `openai`."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from gpuworker.cli import main
from gpuworker.engines.base import EngineError
from gpuworker.engines.openai.dialects import DIALECTS, Settings
from gpuworker.engines.openai.engine import OpenAiEngine
from tests.gpuworker.engines.openai.speech_server import LISTS, Call, SpeechServer, an_engine, plays

DOCUMENT = Path(__file__).parents[4] / "docs" / "speech-servers.md"


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """`doctor` asks torch about GPUs, which takes seconds."""
    monkeypatch.setattr("gpuworker.doctor.find_spec", lambda _name: None)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def finding(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What `doctor --json` found of the engine."""
    found: dict[str, str] = json.loads(capsys.readouterr().out)[1]
    return found


def test_doctor_says_whether_the_server_answers_and_what_it_offers(capsys: pytest.CaptureFixture[str]) -> None:
    many = {**LISTS, "/v1/audio/voices": {"voices": [f"v{number}" for number in range(20)]}}
    with SpeechServer(plays, many) as server:
        doctor = ("doctor", "--json", "--engine", "openai", "-o", f"url={server.url}")
        assert call(*doctor) == 0
        told = finding(capsys)
        assert told["outcome"] == "ok"
        assert f"{server.url} answers; models: kokoro; voices: v0, v1," in told["words"]
        assert told["words"].endswith("v11 and 8 more")
        assert call(*doctor, "-o", "model=piper") == 0
        assert finding(capsys)["words"].endswith("it does not list model piper")
        server.lists = {}
        assert call(*doctor) == 0
        assert finding(capsys)["words"].endswith("it lists no models; it lists no voices")
        assert server.calls == []
    assert call(*doctor) == 1
    told = finding(capsys)
    assert (told["outcome"], told["install"]) == ("failed", "")
    assert told["words"].startswith(f"{server.url}: the speech server cannot be reached")


@pytest.mark.parametrize(
    ("status", "words"), [("401 X", "its owner gives a key with -o api_key_file"), ("503 X", "busy")]
)
def test_doctor_says_what_the_server_refuses(status: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def refuses(call: Call) -> None:
        call.answer(b'{"detail": "tell nobody"}', status)

    with SpeechServer(plays, refuses) as server:
        assert call("doctor", "--json", "--engine", "openai", "-o", f"url={server.url}") == 1
    told = finding(capsys)["words"]
    assert words in told
    assert told.endswith(f"it answered HTTP {status[:3]}: tell nobody")  # doctor's reader is the owner


def test_without_httpx2_the_command_that_installs_it_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert call("run", "--engine", "openai", "-o", "url=http://127.0.0.1:1/v1") == 2
    assert "needs the httpx2 package: pip install '.[openai]'" in capsys.readouterr().err
    with pytest.raises(EngineError, match=r"pip install '.\[openai\]'"), an_engine("http://127.0.0.1:1/v1"):
        pass


def test_the_document_s_tables_are_the_engine_s_options_and_params() -> None:
    document = DOCUMENT.read_text()
    rows = {
        name: row
        for cell, row in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|(.*)\|$", document, re.MULTILINE)
        for name in re.findall(r"\w+", cell)
    }
    all_of = Settings(cloning=True)
    schema = DIALECTS["openai"].params(all_of)["properties"]
    assert set(rows) == set(OpenAiEngine.OPTIONS) | set(schema)
    for name, option in OpenAiEngine.OPTIONS.items():
        default = f"{option.default:g}" if isinstance(option.default, float) else str(option.default)
        assert option.default is None or default.lower() in rows[name].split("|")[0].lower(), name
    for name, rule in schema.items():
        for low, high in (("minimum", "maximum"), ("minLength", "maxLength")):
            if low in rule and name != "voice":
                assert f" {rule[low]:g} to {rule[high]:,g}" in rows[name], name
    for dialect in DIALECTS.values():
        for name in (*dialect.params(all_of)["properties"], *dialect.inputs(all_of)):
            assert f"`{name}`" in document
