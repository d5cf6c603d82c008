"""The OpenAPI document is true: what it says is answered as it says, and what it does not allow is refused."""

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

from gpuworker.hearing.hearing import capabilities, params_schema
from protocol.wire.codec import decode
from protocol.wire.messages import FROM_RELAY, Assign
from relayd.http import health_routes, sessions, spaces_site
from relayd.http.errors import STATUS
from relayd.http.openai import routes as openai_routes
from relayd.http.requests_api import routes as requests_routes
from relayd.http.requests_api.openapi import DOCUMENT, PATHS
from relayd.http.requests_api.openapi_others import OTHER_PATHS
from tests.support.fake_worker import MESSAGES, FakeWorker, fake_worker, samples
from tests.support.raw_http_client import visitor
from tests.support.relay import daemon

#: Codes that tell of what cannot happen to a request over HTTP: broken frames, workers, spaces being made.
NOT_HERE = {"protocol_error", "unknown_type", "space_exists", "space_full", "slow_consumer", "not_owner"}
GUIDE = (Path(__file__).parents[4] / "docs" / "http.md").read_text()
#: Whether params are taken is for the space's own schema to say, which the document cannot know.
LEFT_OUT = {"positive_data_acceptance"}
EXAMPLES = 40
HEARS: dict[str, Any] = {"params": params_schema(), "inputs": capabilities(decodes=True).inputs, "format": None}
#: Operations that take nothing, not even a token.
NOTHING_TO_REFUSE = {"GET /health", "GET /ready", "GET /v1/session", "DELETE /v1/session"}


def test_every_route_is_described_and_nothing_else() -> None:
    served = {route.path for route in requests_routes.routes() if isinstance(route, Route)}
    assert served - {"/openapi.json", "/v1/relay"} == PATHS.keys()
    parts = (openai_routes, sessions, spaces_site, health_routes)
    others = {route.path for part in parts for route in part.routes() if isinstance(route, Route)}
    assert {path.replace(":path}", "}") for path in others} == OTHER_PATHS.keys()
    assert DOCUMENT["paths"] == PATHS | OTHER_PATHS


def test_the_guide_names_every_path_and_every_code() -> None:
    for path in PATHS:
        assert path.replace("{request_id}", "{id}") in GUIDE, path
    for code, status in STATUS.items():
        if code not in NOT_HERE:
            assert re.search(rf"^\| .*{status}.*`{code}`", GUIDE, re.MULTILINE), (code, status)


@pytest.mark.trio
async def test_the_document_is_served_without_a_token(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay, visitor(relay.urls[0]) as http:
        answer = await http.get("/openapi.json")
        assert (answer.status, answer.json) == (200, DOCUMENT)


@pytest.mark.trio
@pytest.mark.filterwarnings("ignore:Do not use the .random. module:hypothesis.errors.HypothesisDeprecationWarning")
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
async def test_the_relay_does_as_its_document_says(
    tmp_path: Path, mode: GenerationMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.auth.login_throttle.MAX_FAILURES", 1_000_000)  # wrong tokens are part of what is tried
    async with (
        daemon(tmp_path, listen="127.0.0.1:0", spaces={"tts": {}, "llm": {}, "stt": {}}) as relay,
        fake_worker(relay.url, slots=64) as worker,
        fake_worker(relay.url, name="model", slots=64, spaces=("llm",), params=MESSAGES, format=None) as model,
        fake_worker(relay.url, name="ears", slots=64, spaces=("stt",), **HEARS) as ears,
    ):
        token = relay.tokens.create(role="client", name="ann", now=0.0).text
        url = re.sub("^ws", "http", relay.urls[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak_always, worker)
            nursery.start_soon(reply_always, model)
            nursery.start_soon(reply_always, ears)
            async with visitor(relay.urls[0], token=token) as http:
                posted = await http.ask("POST", "/v1/spaces/tts/requests", told={"params": {"text": "x"}})
                assert (await http.get(posted.json["links"]["audio"])).status == 200
            known = {"space": "tts", "request_id": posted.json["request_id"]}
            with trio.fail_after(240):
                await trio.to_thread.run_sync(try_all, url, token, known, mode)
            nursery.cancel_scope.cancel()
        await relay.goes_on()


async def speak_always(worker: FakeWorker) -> None:
    """Complete whatever is assigned."""
    while True:
        message = decode(await worker.peer.link.receive(), FROM_RELAY)
        if isinstance(message, Assign):
            worker.speak(message, [samples(100)])


async def reply_always(model: FakeWorker) -> None:
    """Reply to whatever is assigned."""
    while True:
        message = decode(await model.peer.link.receive(), FROM_RELAY)
        if isinstance(message, Assign):
            model.write(message, ["Yes."])


def try_all(url: str, token: str, known: dict[str, str], mode: GenerationMode) -> None:
    """Every operation, with what schemathesis makes up; each second path leads to what is there."""
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    schema.config.generation.allow_extra_parameters = False  # what is not known in a query is passed over
    rejection = schema.config.checks.negative_data_rejection
    rejection.expected_statuses = [*(rejection.expected_statuses or ()), "413"]  # a text that is too long
    checks: list[Any] = [check for check in CHECKS.get_all() if check.__name__ not in LEFT_OUT]
    count = 0
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and f"{operation.method.upper()} {operation.path}" in NOTHING_TO_REFUSE:
            continue

        @seed(7)
        @settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode), is_known=booleans())
        def try_one(case: Any, is_known: bool) -> None:
            nonlocal count
            count += 1
            if is_known:
                for name in known.keys() & (case.path_parameters or {}).keys():
                    case.path_parameters[name] = known[name]
            case.call_and_validate(base_url=url, headers={"Authorization": f"Bearer {token}"}, checks=checks)

        try_one()
    assert count > 100
