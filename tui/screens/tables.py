"""The screens: the overview, and one table each. A new screen is a class here, a mode of the app, and its columns."""

from collections.abc import Iterable

from textual.app import ComposeResult

from tui.model.formatting import plain
from tui.model.relay_model import RelayModel, RowView
from tui.screens.base import RelayScreen
from tui.screens.detail import RequestDetail, RowDetail
from tui.widgets.row_table import RowTable
from tui.widgets.status_lines import Spark


class TableScreen(RelayScreen):
    """A screen that is one table."""

    KIND = ""
    #: The newest line is at the end, and followed.
    TAIL = False

    @property
    def title_text(self) -> str:
        """See `RelayScreen`."""
        return self.KIND

    def panes(self) -> ComposeResult:
        """See `RelayScreen`."""
        yield RowTable(self.KIND, id=self.KIND, tail=self.TAIL)

    def entered(self, view: RowView) -> None:
        """All that is known of the row."""
        self.app.push_screen(RequestDetail(view.key) if view.topic == "requests" else RowDetail(view.topic, view.key))


class Overview(TableScreen):
    """What is waiting, what is running, what is wrong."""

    KIND = "overview"
    DEFAULT_CSS = """
    Overview #spaces { height: 5; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._spaces_height = ""

    def panes(self) -> ComposeResult:
        """See `RelayScreen`."""
        yield RowTable("spaces", id="spaces")
        yield RowTable("requests", id="requests")
        yield Spark(id="spark", classes="pane")

    def redraw_panes(self, model: RelayModel, now: float) -> None:
        """See `RelayScreen`."""
        self.query_one(Spark).show(model, now)
        # As many lines as there are spaces, as long as the requests keep the larger part.
        least = max(4, min(len(model.rows("spaces")) + 2, (self.size.height - 5) // 2))
        wanted = "1fr" if self.has_class("zoomed") else str(least)
        if wanted != self._spaces_height:
            self._spaces_height = wanted
            self.query_one("#spaces").styles.height = wanted
            self.call_after_refresh(self.redraw)

    def entered(self, view: RowView) -> None:
        """A space's queue, or a request."""
        if view.topic == "spaces":
            self.app.push_screen(Queue(view.key))
        else:
            super().entered(view)


class Spaces(TableScreen):
    """The spaces."""

    KIND = "spaces"

    def entered(self, view: RowView) -> None:
        """Its queue."""
        self.app.push_screen(Queue(view.key))


class Workers(TableScreen):
    """The workers."""

    KIND = "workers"


class Requests(TableScreen):
    """The requests: live ones first, then those that ended lately."""

    KIND = "requests"


class Queue(TableScreen):
    """What waits in one space, in order.

    Args:
        space: its name; None takes the one looked at last, else the one with the longest queue.
    """

    KIND = "queue"

    def __init__(self, space: str | None = None) -> None:
        super().__init__()
        self._space = space

    @property
    def space(self) -> str:
        """Which one is shown."""
        app = self.host
        if self._space is not None:
            app.space = self._space
            return self._space
        if app.space is None or app.shown.get("spaces", app.space) is None:
            spaces = sorted(app.shown.rows("spaces"), key=lambda view: (-(view.number("queued") or 0), view.key))
            app.space = spaces[0].key if spaces else None
        return app.space or ""

    @property
    def title_text(self) -> str:
        """See `RelayScreen`."""
        return f"queue of {plain(self.space)}" if self.space else "queue"

    def rows_of(self, kind: str, model: RelayModel) -> Iterable[RowView]:
        """See `RelayScreen`."""
        return model.queue(self.space)


class Clients(TableScreen):
    """The connections of clients and operators."""

    KIND = "clients"


class Log(TableScreen):
    """What the relay has to say, the newest line last."""

    KIND = "log"
    TAIL = True


class Audit(TableScreen):
    """Who steered what."""

    KIND = "audit"
