"""What an operator does to a relay, and sees of it, over a connection for each question."""

from typing import Any

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Done, Rejected, Snapshot, Status, StatusReply, Steer, Watch
from tests.support.relay import Peer, peer


class SteerRefused(Exception):
    """The relay has refused an action."""


async def steered(operator: Peer, action: str, target: str, **options: Any) -> dict[str, Any]:
    """Have an operator's action done; what the answer says."""
    operator.send(Steer(action=action, target=target, options=options))
    done = await operator.next(Done, Rejected)
    if isinstance(done, Rejected):
        raise SteerRefused(f"{action} {target}: {done}")
    return dict(done.data)


@attrs.define(eq=False)
class OperatorView:
    """The relay at `url`, as operators see it."""

    url: str

    async def steer(self, action: str, target: str, **options: Any) -> dict[str, Any]:
        """Have an operator's action done; what the answer says."""
        async with peer(self.url, "operator") as operator:
            return await steered(operator, action, target, **options)

    async def status(self, request_id: str) -> StatusReply | None:
        """How a request stands; None where the relay has none of this id."""
        async with peer(self.url, "operator") as operator:
            operator.send(Status(request_id=request_id))
            answer = await operator.next(StatusReply, Rejected)
            if isinstance(answer, StatusReply):
                return answer
            if answer.code != ErrorCode.REQUEST_NOT_FOUND:
                raise SteerRefused(f"status {request_id}: {answer}")
            return None

    async def state(self, request_id: str) -> str:
        """The state of a request; empty where the relay has none of this id."""
        status = await self.status(request_id)
        return status.state if status else ""

    async def rows(self, topic: str) -> list[dict[str, Any]]:
        """The rows of a topic."""
        async with peer(self.url, "operator") as operator:
            operator.send(Watch(topics=[topic]))
            rows: list[dict[str, Any]] = []
            while True:
                page: Snapshot = await operator.next(Snapshot)
                rows += page.data.get(topic, [])
                if not page.more:
                    return rows

    async def space(self, name: str) -> dict[str, Any] | None:
        """The row of a space, if there is one."""
        return next((row for row in await self.rows("spaces") if row["name"] == name), None)

    async def worker(self, name: str) -> dict[str, Any] | None:
        """The row of the worker with this name, if one is connected."""
        return next((row for row in await self.rows("workers") if row["name"] == name), None)

    async def live_tokens(self, principal: str) -> list[str]:
        """The ids of a principal's tokens."""
        rows: list[Any] = []
        while True:
            page = await self.steer("list_tokens", "", after=rows[-1]["token_id"] if rows else "")
            rows += page["tokens"]
            if not page["more"]:
                return [r["token_id"] for r in rows if r["principal"] == principal and r["state"] == "live"]
