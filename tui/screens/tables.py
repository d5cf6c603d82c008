"""The screens made of tables. A new screen is a class here, a mode of the app, and an entry in `COLUMNS`."""

from collections.abc import Iterable

from textual.app import ComposeResult

from tui.model.formatting import plain
from tui.model.relay_model import RelayModel, RowView
from tui.screens.base import RelayScreen
from tui.screens.detail import RequestDetail, RowDetail
from tui.widgets.row_table import RowTable
from tui.widgets.status_lines import Spark, WrongLine


class TableScreen(RelayScreen):
    """A screen that consists of one table."""

    KIND = ""
    #: The newest line comes last, and the cursor follows it.
    TAIL = False

    @property
    def title_text(self) -> str:
        """The name of the table."""
        return self.KIND

    def panes(self) -> ComposeResult:
        """The table."""
        yield RowTable(self.KIND, id=self.KIND, tail=self.TAIL)

    def entered(self, view: RowView) -> None:
        """Open the detail screen of the row."""
        self.app.push_screen(RequestDetail(view.key) if view.topic == "requests" else RowDetail(view.topic, view.key))


class Overview(TableScreen):
    """Shows spaces, workers and requests together."""

    KIND = "overview"
    DEFAULT_CSS = """
    Overview #spaces { height: 5; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._spaces_height = ""

    def panes(self) -> ComposeResult:
        """The tables one below the other, with the rates of the last minute."""
        yield RowTable("spaces", id="spaces")
        yield WrongLine(id="wrong", classes="pane")
        yield RowTable("requests", id="requests")
        yield Spark(id="spark", classes="pane")

    def redraw_panes(self, model: RelayModel, now: float) -> None:
        """Size the tables and draw the rates."""
        self.query_one(Spark).show(model, now)
        wrong = self.query_one(WrongLine)
        wrong.show(groups := self.host.failures.groups(model))
        if wrong.has_class("some") is not bool(groups):
            wrong.set_class(bool(groups), "some")
            self.call_after_refresh(self.redraw)
        # Show as many lines as there are spaces, but leave the larger part to the requests.
        least = max(4, min(len(model.rows("spaces")) + 2, (self.size.height - 5) // 2))
        wanted = "1fr" if self.has_class("zoomed") else str(least)
        if wanted != self._spaces_height:
            self._spaces_height = wanted
            self.query_one("#spaces").styles.height = wanted
            self.call_after_refresh(self.redraw)

    def entered(self, view: RowView) -> None:
        """Open the queue of a space, or the details of another row."""
        if view.topic == "spaces":
            self.app.push_screen(Queue(view.key))
        else:
            super().entered(view)


class Spaces(TableScreen):
    """Lists the spaces."""

    KIND = "spaces"

    def entered(self, view: RowView) -> None:
        """Open the queue of the space."""
        self.app.push_screen(Queue(view.key))


class Workers(TableScreen):
    """Lists the workers."""

    KIND = "workers"


class Requests(TableScreen):
    """Lists the requests: live ones first, then those that ended recently."""

    KIND = "requests"


class Queue(TableScreen):
    """Lists the waiting requests of one space, in order.

    Args:
        space: its name; None means the space shown last, else the one with the longest queue.
    """

    KIND = "queue"

    def __init__(self, space: str | None = None) -> None:
        super().__init__()
        self._space = space

    @property
    def space(self) -> str:
        """The name of the space shown."""
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
        """The screen's name with that of the space."""
        return f"queue of {plain(self.space)}" if self.space else "queue"

    def rows_of(self, kind: str, model: RelayModel) -> Iterable[RowView]:
        """The queued requests of the space."""
        return model.queue(self.space)


class Wrong(TableScreen):
    """Lists what fails: failed requests with the same space, code and message are one row."""

    KIND = "wrong"

    def rows_of(self, kind: str, model: RelayModel) -> Iterable[RowView]:
        """The groups of failed requests."""
        return self.host.failures.groups(model)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer nothing that needs a single request."""
        return False if action in ("act", "copy") else super().check_action(action, parameters)

    def action_log(self) -> None:
        """Show the log lines of the latest of these requests."""
        if self.table is not None and self.table.view is not None:
            self.host.show_log(self.table.view.text("request_id"))

    def entered(self, view: RowView) -> None:
        """Open the only request of the group, or list its requests."""
        if view.number("count") == 1:
            self.app.push_screen(RequestDetail(view.text("request_id")))
        else:
            self.app.push_screen(FailedRequests(view))


class FailedRequests(TableScreen):
    """Lists the failed requests of one group."""

    KIND = "requests"

    def __init__(self, group: RowView) -> None:
        super().__init__()
        self._group = group

    @property
    def title_text(self) -> str:
        """What they have in common."""
        return plain(f"{self._group.text('space')} {self._group.text('code')}")

    def rows_of(self, kind: str, model: RelayModel) -> Iterable[RowView]:
        """The failed requests of the group."""
        return self.host.failures.requests_of(model, self._group.key)


class Clients(TableScreen):
    """Lists the connections of clients and operators."""

    KIND = "clients"


class Talks(TableScreen):
    """Lists the conversations in use."""

    KIND = "talks"


class Log(TableScreen):
    """Shows the relay's log, the newest line last."""

    KIND = "log"
    TAIL = True


class Audit(TableScreen):
    """Lists the operators' actions and their outcomes."""

    KIND = "audit"
