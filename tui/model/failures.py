"""Failed requests in groups: the same space, code and message are one thing that is wrong, however often it happens."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import attrs

from protocol.wire.validators import Value
from tui.model.formatting import plain
from tui.model.relay_model import RelayModel, RowView

#: Numbers and ids, which differ where the failure is the same.
_NUMBER = re.compile(r"\b[0-9a-f]{8,}\b|\d+(?:\.\d+)?")


class Kind(NamedTuple):
    """What failures of one group have in common."""

    space: str
    code: str
    message: str

    @classmethod
    def of(cls, view: RowView) -> "Kind":
        """The group of a failed request."""
        return cls(view.text("space"), view.text("code"), _NUMBER.sub("#", view.text("message")))

    @property
    def key(self) -> str:
        """Its id as a row."""
        return "/".join(self)


@attrs.define(eq=False)
class Failures:
    """Groups the failed requests of a model; only rows that changed are looked at again."""

    _kinds: dict[str, tuple[RowView, Kind | None]] = attrs.field(factory=dict)
    _rows: list[RowView] = attrs.field(factory=list)
    _seen: object = None

    def groups(self, model: RelayModel) -> list[RowView]:
        """One row for each group: `count`, `space`, `code`, the latest `message`, `ended_s` and `request_id`."""
        version = (model, model.versions.get("requests"))
        if version == self._seen:
            return self._rows
        self._seen, before = version, self._kinds
        self._kinds = {}
        groups: dict[Kind, list[RowView]] = {}
        for view in model.rows("requests"):
            known = before.get(view.key)
            kind = known[1] if known is not None and known[0] is view else _kind(view)
            self._kinds[view.key] = (view, kind)
            if kind is not None:
                groups.setdefault(kind, []).append(view)
        self._rows = [_row(model, kind, views) for kind, views in groups.items()]
        return self._rows

    def requests_of(self, model: RelayModel, key: str) -> list[RowView]:
        """The failed requests of a group."""
        self.groups(model)
        return [view for view, kind in self._kinds.values() if kind is not None and kind.key == key]


def _kind(view: RowView) -> Kind | None:
    return Kind.of(view) if view.text("state") == "failed" else None


def _row(model: RelayModel, kind: Kind, views: list[RowView]) -> RowView:
    latest = max(views, key=lambda view: (view.born("ended_s") or 0.0, view.key))
    whose = {view.text("principal") for view in views}
    row: dict[str, Value] = {
        "count": len(views),
        "space": kind.space,
        "code": kind.code,
        "message": latest.text("message"),
        "ended_s": latest.number("ended_s"),
        "request_id": latest.key,
        "principal": next(iter(whose)) if len(whose) == 1 else f"{len(whose)} principals",
    }
    # As a row of requests, its age keeps growing.
    return RowView("requests", kind.key, row, latest.received, model)


def summary(groups: Iterable[RowView]) -> list[tuple[str, str]]:
    """The groups in a line, the largest first: pieces of text with the tokens of their colours."""
    pieces: list[tuple[str, str]] = []
    for view in sorted(groups, key=lambda one: (-(one.number("count") or 0), one.key)):
        pieces += [(f"{view.text('count')}x ", "bad"), (plain(f"{view.text('space')} {view.text('code')}"), "")]
        pieces += [(plain(f" {view.text('message')}"), "dim"), ("   ", "")]
    return pieces[:-1]
