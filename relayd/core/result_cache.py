"""The results that may answer equal requests: which there are, and how long they are kept for it.

The newest result with a key is the entry. A request that was answered with it gets a result of its own, which takes its
place, so that the order of the entries is that of their last use.
"""

from collections import Counter
from collections.abc import Collection, Mapping

import attrs

from relayd.config.schema import SpaceConfig
from relayd.requests.request import Request

#: Most results of one space. One takes about 3 KiB without its frames.
MAX_ENTRIES = 10_000

#: `Request.cache_key`, and the identity of the output of its worker (`ScheduledRequest.reproducible`).
_Key = tuple[bytes, str]


@attrs.define(eq=False)
class ResultCache:
    """Completed requests by space and key, the one used longest ago first."""

    _spaces: dict[str, dict[_Key, Request]] = attrs.field(factory=dict)
    _bytes: Counter[str] = attrs.field(factory=Counter)

    def has(self, request: Request) -> bool:
        """Whether a result is kept to answer equal requests."""
        return self._spaces.get(request.submit.space, {}).get(_key(request)) is request

    def add(self, request: Request, config: SpaceConfig) -> None:
        """Keep the result of a completed request, if its space's settings and its worker's engine allow it."""
        reproducible, kept = request.cache_key and request.entry.reproducible, request.has_result
        if not reproducible or not kept or not config.cache_s or request.log.size_bytes > config.cache_bytes:
            return
        space, key = request.submit.space, _key(request)
        entries = self._spaces.setdefault(space, {})
        if (before := entries.get(key)) is not None:
            self.forget(before)
        entries[key] = request
        self._bytes[space] += request.log.size_bytes
        self._trim_space(space, config)

    def find(self, space: str, wanted: bytes, reproducible: Collection[str] | None) -> Request | None:
        """Return a result that may answer a request.

        Args:
            space: its space.
            wanted: its key.
            reproducible: the identities that the output may have; None for any.
        """
        entries = self._spaces.get(space, {})
        if reproducible is None:
            return next((result for (key, _), result in reversed(entries.items()) if key == wanted), None)
        return next((entries[wanted, each] for each in reproducible if (wanted, each) in entries), None)

    def forget(self, request: Request) -> None:
        """Keep a result no longer; called before its frames are dropped."""
        space = request.submit.space
        if self.has(request):
            del self._spaces[space][_key(request)]
            self._bytes[space] -= request.log.size_bytes

    def trim(self, configs: Mapping[str, SpaceConfig], now: float) -> None:
        """Keep no longer what is beyond the settings of its space."""
        for space, entries in list(self._spaces.items()):
            config = configs.get(space)
            if config is None or not config.cache_s:
                del self._spaces[space], self._bytes[space]
                continue
            for result in list(entries.values()):
                if now - (result.ended_at or 0.0) < config.cache_s:
                    break
                self.forget(result)
            self._trim_space(space, config)

    def _trim_space(self, space: str, config: SpaceConfig) -> None:
        entries = self._spaces[space]
        while entries and (self._bytes[space] > config.cache_bytes or len(entries) > MAX_ENTRIES):
            self.forget(next(iter(entries.values())))


def _key(request: Request) -> _Key:
    return request.cache_key, request.entry.reproducible
