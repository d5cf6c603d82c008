"""The open spaces; opens, changes, pauses and closes them, and records them in the store."""

from collections.abc import Iterator, Mapping

import attrs
import structlog
import trio

from protocol.wire.messages import Register, Rejected
from relayd.config.schema import SpaceConfig
from relayd.core.interfaces import RelayState
from relayd.core.space import Space, rules_of, serve_space
from relayd.store.records import PutSpace, SpaceRecord

log = structlog.get_logger("relayd")


@attrs.define(eq=False)
class Spaces(Mapping[str, Space]):
    """The open spaces by name; a mapping."""

    relay: RelayState
    _open: dict[str, Space] = attrs.field(factory=dict)

    def __getitem__(self, name: str) -> Space:
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._open)

    def __len__(self) -> int:
        return len(self._open)

    async def open(self, space: Space, *, paused: bool = False) -> None:
        """Open a space that is not open yet."""
        await self.relay.nursery.start(serve_space, space)  # first, as a request in the space needs its nursery
        self._open[space.name] = space
        self.relay.scheduler.add_space(space.name, rules_of(space.config), paused=paused)
        self.relay.mark_changed("spaces", space.name)

    def close(self, name: str) -> Rejected | None:
        """Close a space; one that has requests or workers is refused."""
        if refusal := self.relay.scheduler.remove_space(name):
            return refusal
        self._open.pop(name).closed.set()
        self.relay.mark_changed("spaces", name)
        return None

    def change(self, space: Space, config: SpaceConfig) -> None:
        """Change the settings of an open space. Existing requests keep their timeouts."""
        space.config = config
        self.relay.apply(self.relay.scheduler.set_rules(space.name, rules_of(config), trio.current_time()))
        self.relay.store.post(PutSpace(self.record(space)))
        self.relay.mark_changed("spaces", space.name)

    def set_paused(self, name: str, paused: bool) -> Rejected | None:
        """Pause or resume a space."""
        if not paused:
            decisions = self.relay.scheduler.resume_space(name, trio.current_time())
            if isinstance(decisions, Rejected):
                return decisions
            self.relay.apply(decisions)
        elif refusal := self.relay.scheduler.pause_space(name):
            return refusal
        self.relay.wake_positions()
        self.relay.store.post(PutSpace(self.record(self._open[name])))
        log.info("space paused" if paused else "space resumed", space=name)
        return None

    def record(self, space: Space) -> SpaceRecord:
        """Return a space as a record for the store."""
        return SpaceRecord(
            name=space.name,
            config=space.config,
            paused=self.relay.scheduler.state.spaces[space.name].paused,
            made_by=space.made_by,
            engine=space.engine,
            params=space.params,
            inputs=space.inputs,
            format=space.format,
            created_at=space.created_at,
        )

    def update_engines(self, register: Register) -> None:
        """Update the spaces of a worker that has registered: engine, params, inputs and format."""
        for name in register.spaces:
            space = self._open[name]
            space.engine, space.params, space.inputs = register.engine, register.params, register.inputs
            space.format = register.format
            self.relay.store.post(PutSpace(self.record(space)))
            self.relay.mark_changed("spaces", name)
