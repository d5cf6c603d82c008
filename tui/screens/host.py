"""What screens need from the app, so that no screen has to import the app itself."""

from typing import Protocol

from tui.model.actions import Plan
from tui.model.failures import Failures
from tui.model.feed import Ask, Listen
from tui.model.relay_model import RelayModel
from tui.widgets.cell_widget import Piece


class ScreenHost(Protocol):
    """The app, as screens see it."""

    model: RelayModel
    readonly: bool
    frozen_at: float | None
    rate: float
    notice: Piece
    space: str | None
    failures: Failures

    @property
    def shown(self) -> RelayModel:
        """What is drawn: the current state of the relay, or a frozen one."""

    @property
    def now_shown(self) -> float:
        """The time that is drawn, in seconds of the app's clock."""

    def clock(self) -> float:
        """Seconds, monotonic."""

    def show_notice(self, text: str, token: str = "") -> None:
        """Show a notice in the last line for a while."""

    def ask(self, ask: Ask | Listen) -> None:
        """Queue a command for the feed."""

    def carry_out(self, plan: Plan) -> None:
        """Send every step of a plan to the relay."""

    def draw_soon(self) -> None:
        """Draw again within a moment."""

    def show_log(self, name: str) -> None:
        """Switch to the log, filtered by a name."""
