"""Who may see a space or a request; a refusal does not reveal what exists."""

from pathlib import Path

import pytest

from protocol.wire.messages import Rejected
from relayd.auth.tokens import Principal
from relayd.core.access import find_request, find_space
from relayd.core.space import Space
from tests.support.fake_worker import fake_worker
from tests.support.relay import a_submit, an_id, daemon, peer

ANN = Principal(name="ann", role="client", spaces=("tts", "no*"))
ROOT = Principal(name="root", role="operator")


@pytest.mark.trio
async def test_a_space_that_is_forbidden_is_refused_like_one_that_does_not_exist(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        space = find_space(relay.relay, ANN, "tts")
        assert isinstance(space, Space)
        assert space.name == "tts"
        there, missing = (find_space(relay.relay, ANN, name) for name in ("check", "elsewhere"))
        assert isinstance(there, Rejected)
        assert isinstance(missing, Rejected)
        assert there.code == missing.code == "forbidden"
        assert there.message.replace("'check'", "'elsewhere'") == missing.message


@pytest.mark.trio
async def test_only_operators_are_told_the_command_that_makes_a_space(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        client, operator = (find_space(relay.relay, who, "nope") for who in (ANN, ROOT))
        assert isinstance(client, Rejected)
        assert isinstance(operator, Rejected)
        assert client.code == operator.code == "space_not_found"
        assert client.message == "space 'nope' does not exist; ask the relay's operator"
        assert operator.message == "space 'nope' does not exist; create it with: relayd space create nope"


@pytest.mark.trio
async def test_a_misspelt_space_gets_a_hint_which_names_no_space_that_is_forbidden(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        anyone = Principal(name="bob", role="client")
        for who, wrong, hint in (
            (anyone, "t t s", "did you mean 'tts'? Otherwise ask the relay's operator"),
            (anyone, "chek", "did you mean 'check'? Otherwise ask the relay's operator"),
            (Principal(name="few", role="client", spaces=("tts", "chek")), "chek", "ask the relay's operator"),
            (ROOT, "ttss", "did you mean 'tts'? Otherwise create it with: relayd space create ttss"),
        ):
            refused = find_space(relay.relay, who, wrong)
            assert isinstance(refused, Rejected)
            assert refused.message.startswith(f"space {wrong!r} does not exist; {hint}")
        paused = relay.relay.scheduler.pause_space("tt")
        assert paused is not None
        assert "did you mean 'tts'?" in paused.message
        async with fake_worker(relay.url, spaces=("tss",)) as worker:
            assert "did you mean 'tts'?" in (await worker.peer.next(Rejected)).message


@pytest.mark.trio
async def test_a_request_is_found_by_its_principal_and_by_operators(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        submit = a_submit()
        client.send(submit)
        await client.settled()
        request = relay.relay.requests[submit.request_id]
        owner = Principal(name=request.principal, role="client")
        assert find_request(relay.relay, owner, submit.request_id) is request
        assert find_request(relay.relay, ROOT, submit.request_id) is request
        elsewhere = Principal(name=request.principal, role="client", spaces=("check",))
        for stranger in (ANN, elsewhere):
            refused = find_request(relay.relay, stranger, submit.request_id)
            unknown = find_request(relay.relay, stranger, other := an_id())
            assert isinstance(refused, Rejected)
            assert isinstance(unknown, Rejected)
            assert refused.code == unknown.code == "request_not_found"
            assert refused.message.replace(submit.request_id, other) == unknown.message
