"""The OpenAPI document tells of conversations where there are any, and what it says is true."""

import re
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import trio
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import booleans
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.core.result import Ok
from starlette.routing import Route

from relayd.http.requests_api.openapi import DOCUMENT
from relayd.talk.dialects import own, realtime_calls
from relayd.talk.dialects.openapi import PATHS
from tests.support.raw_http_client import visitor
from tests.support.talking import stage

#: Whether an id of a session is one, and a turn there, the document cannot know.
LEFT_OUT = {"positive_data_acceptance"}
EXAMPLES = 12
GUIDE = "".join((Path(__file__).parents[3] / "docs" / name).read_text() for name in ("talk.md", "realtime.md"))


def test_every_route_is_described_and_in_the_guide() -> None:
    routes = [*own.routes(), *realtime_calls.routes()]
    served = {route.path.replace(":int}", "}") for route in routes if isinstance(route, Route)}
    assert served == PATHS.keys()
    for path, operations in PATHS.items():
        for method in operations.keys() - {"parameters"}:
            assert f"`{method.upper()} {path}" in GUIDE


@pytest.mark.trio
async def test_the_document_has_the_paths_of_what_is_served(tmp_path: Path) -> None:
    async with stage(tmp_path) as on, visitor(on.daemon.url) as http:
        document = (await http.get("/openapi.json")).json
        assert document["paths"].keys() == DOCUMENT["paths"].keys() | PATHS.keys()


@pytest.mark.trio
@pytest.mark.filterwarnings("ignore:Do not use the .random. module:hypothesis.errors.HypothesisDeprecationWarning")
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
async def test_conversations_are_as_the_document_says(
    tmp_path: Path, mode: GenerationMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.auth.login_throttle.MAX_FAILURES", 1_000_000)
    async with stage(tmp_path, listen="127.0.0.1:0", store="memory", spaces={"check": {}}) as on:
        await on.writer(lambda _: ["Yes."])
        await on.speaker()
        token = on.daemon.tokens.create(role="client", name="ann", now=0.0).text
        url = re.sub("^ws", "http", on.daemon.urls[0])
        with trio.fail_after(240):
            await trio.to_thread.run_sync(try_all, url, token, mode)
        await on.daemon.goes_on()


@schemathesis.serializer("application/sdp", "application/trickle-ice-sdpfrag")
def as_text(_context: Any, value: Any) -> bytes:
    return str(value).encode(errors="replace")


def try_all(url: str, token: str, mode: GenerationMode) -> None:
    """Every operation, with what schemathesis makes up; each second path leads to a conversation that is there."""
    schema = schemathesis.openapi.from_dict(DOCUMENT | {"paths": PATHS})
    schema.config.generation.allow_extra_parameters = False
    rejection = schema.config.checks.negative_data_rejection
    rejection.expected_statuses = [*(rejection.expected_statuses or ()), "413"]  # a text that is too long
    checks: list[Any] = [check for check in CHECKS.get_all() if check.__name__ not in LEFT_OUT]
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()

        @seed(7)
        @settings(max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode), is_known=booleans())
        def try_one(case: Any, is_known: bool) -> None:
            if is_known and "talk" in (case.path_parameters or {}):
                case.path_parameters["talk"] = "session-1"
            case.call_and_validate(base_url=url, headers={"Authorization": f"Bearer {token}"}, checks=checks)

        try_one()
