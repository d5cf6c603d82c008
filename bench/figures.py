"""The result of a measurement: a `Row` with its unit, the value it is compared with, and the spread of the rounds."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import attrs

ResultT = TypeVar("ResultT")


@attrs.frozen(kw_only=True)
class Row:
    """One figure.

    Args:
        figure: the group it belongs to, as named on the command line.
        name: what was measured.
        unit: unit of `value` and `against`.
        value: median of the rounds.
        against: median of the value it is compared with, measured in the same rounds; None without a comparison.
        peer: name of what it is compared with.
        ratios: `value` / `against` of each round. Their median is the figure: the machine's variations cancel out.
        limit: upper limit of `value`, if the documents claim one.
        limit_ratio: upper limit of the ratio, likewise.
    """

    figure: str
    name: str
    unit: str
    value: float
    against: float | None = None
    peer: str = ""
    ratios: tuple[float, ...] = ()
    limit: float | None = None
    limit_ratio: float | None = None

    @property
    def ratio(self) -> float | None:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def kept(self) -> bool:
        """Whether it is within the limits claimed in the documents."""
        if self.limit_ratio is not None and (self.ratio is None or self.ratio > self.limit_ratio):
            return False
        return self.limit is None or self.value <= self.limit

    def to_map(self) -> dict[str, Any]:
        """Return it as a map for JSON."""
        return {**attrs.asdict(self), "ratio": self.ratio, "kept": self.kept}


def paired(
    figure: str,
    name: str,
    unit: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    peer: str,
    *,
    limit_ratio: float | None = None,
) -> Row:
    """Make a row from rounds that were measured side by side."""
    return Row(
        figure=figure,
        name=name,
        unit=unit,
        value=statistics.median(ours),
        against=statistics.median(theirs),
        peer=peer,
        ratios=tuple(a / b for a, b in zip(ours, theirs, strict=True)),
        limit_ratio=limit_ratio,
    )


def in_turns(rounds: int, calls: Mapping[str, Callable[[], ResultT]]) -> dict[str, list[ResultT]]:
    """Call each `rounds` times, in the order ABC CBA ABC..., so that a machine that slows down affects all equally."""
    results: dict[str, list[ResultT]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            results[name].append(calls[name]())
    return results


def alternate(
    rounds: int, first: Callable[[], ResultT], second: Callable[[], ResultT]
) -> tuple[list[ResultT], list[ResultT]]:
    """Like `in_turns`, for two functions."""
    ours, theirs = in_turns(rounds, {"ours": first, "theirs": second}).values()
    return ours, theirs


def table(rows: Iterable[Row]) -> str:
    """Format rows as a Markdown table; a value compared with several peers is shown once."""
    lines = [
        "| what | value | beside | ratio (lowest..highest round) |",
        "| --- | ---: | ---: | --- |",
    ]
    before: Row | None = None
    for row in rows:
        again = before is not None and (before.figure, before.name, before.value) == (row.figure, row.name, row.value)
        what = " | " if again else f"{row.figure}: {row.name} | {_number(row.value)} {row.unit}"
        against = "" if row.against is None else f"{_number(row.against)} {row.peer}"
        lines.append(f"| {what} | {against} | {_remark(row)} |")
        before = row
    return "\n".join(lines)


def verdict(rows: Iterable[Row]) -> str:
    """Report which limits were kept and which were broken; empty if there were none."""
    held = [row for row in rows if row.limit is not None or row.limit_ratio is not None]
    broken = [row for row in held if not row.kept]
    if not held:
        return ""
    parts = [f"{len(held) - len(broken)} of {len(held)} limits kept."]
    for row in broken:
        beside = f" beside {row.peer}: {_number(row.ratio)}" if row.ratio is not None and row.limit is None else ""
        parts.append(f"- Broken: {row.figure}: {row.name}{beside}")
    return "\n".join(parts)


def _remark(row: Row) -> str:
    parts = []
    if row.ratio is not None:
        rounds = f" ({_number(min(row.ratios))}..{_number(max(row.ratios))})" if len(row.ratios) > 1 else ""
        parts.append(f"**{_number(row.ratio)}**{rounds}")
    if row.limit_ratio is not None:
        parts.append(f"at most {_number(row.limit_ratio)}: {'kept' if row.kept else '**BROKEN**'}")
    if row.limit is not None:
        parts.append(f"at most {_number(row.limit)} {row.unit}: {'kept' if row.kept else '**BROKEN**'}")
    return "; ".join(parts)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
