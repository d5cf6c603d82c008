"""A space: its configuration, what its worker registered, and the nursery its requests live in."""

import time

import attrs
import trio

from protocol.wire.structs import AudioFormat, InputRule
from protocol.wire.validators import Value
from relayd.config.schema import SpaceConfig
from relayd.scheduling.model import SpaceRules


@attrs.define(eq=False, kw_only=True)
class Space:
    """A space: its configuration, what its worker registered, and the nursery its requests live in."""

    name: str
    config: SpaceConfig
    made_by: str = "command"
    created_at: float = attrs.field(factory=time.time)
    engine: str = ""
    params: dict[str, Value] = attrs.field(factory=dict)
    inputs: dict[str, InputRule] = attrs.field(factory=dict)
    format: AudioFormat | None = None
    ended: dict[str, int] = attrs.field(factory=dict)
    nursery: trio.Nursery | None = None
    closed: trio.Event = attrs.field(factory=trio.Event)


def rules_of(config: SpaceConfig) -> SpaceRules:
    """Return the part of a space's configuration that the scheduler uses."""
    return SpaceRules(
        max_workers=config.max_workers,
        max_queued=config.max_queued,
        max_queued_per_principal=config.max_queued_per_principal,
        max_running_per_principal=config.max_running_per_principal,
        refuse_when_empty=config.when_empty == "refuse",
        max_attempts=config.max_attempts,
    )


async def serve_space(space: Space, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Run the nursery of a space's requests; when the space is closed, the tasks left in it are cancelled."""
    async with trio.open_nursery() as nursery:
        space.nursery = nursery
        task_status.started()
        await space.closed.wait()
        nursery.cancel_scope.cancel()
