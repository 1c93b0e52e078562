"""The report of `hansa node budget` on a terminal, and as a plot. No ε without what it is about."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from ..common.cli import plain
from ..common.errors import ConfigError, LedgerError, counted
from ..common.identity import output_error
from ..common.page import down, up
from .bill import noise_of

_LEVELS = " ▁▂▃▄▅▆▇█"
_WIDTH = 56
_LAST = 10


def about(report: dict[str, Any]) -> str:
    """What every ε of a report is of."""
    return (
        f"epsilon of one record of {report['partner']}, add or remove one, {report['noise']} noise, "
        f"against {report['adversary']}"
    )


def print_budget(console: Console, report: dict[str, Any]) -> None:
    """For a terminal."""
    said = f"{report['partner']}: epsilon of one record of this partner, add or remove one, {report['noise']} noise, against {report['adversary']}"
    for line in textwrap.wrap(said, 80):
        console.print(plain(line))
    if report["restored_not_proved"]:
        console.print("[bold red]EXHAUSTED[/]: restored from a backup, spending not proved; every run is refused.")
    if report["paused"]:
        console.print("[yellow]paused[/]: every run is refused until `hansa node resume`")
    for one in report["lineages"]:
        _print_lineage(console, report, one)
    if report["plan"] is not None:
        _print_plan(console, report["plan"], report["adversary"])
    console.print()
    for one in report["runs"]:
        console.print(
            plain(f"run {one['run']} ({one['charter']}): {one['state']}, {counted(one['rounds'], 'round')} debited")
        )
    for reason, count in report["refusals"].items():
        console.print(plain(f"refused {count} x: {reason}"))
    for run_id in report["waiting_for_approval"]:
        console.print(plain(f"waits for you: hansa node approve {run_id}"))


def _print_lineage(console: Console, report: dict[str, Any], one: dict[str, Any]) -> None:
    names = ", ".join(each["name"] or each["dataset"] for each in one["datasets"])
    console.print()
    console.print(plain(f"data: {names} (lineage {one['lineage']}: one budget)"))
    if one["unbounded"]:
        console.print(
            "[bold red]UNBOUNDED[/]: an unprotected round was trained; no finite epsilon holds for this dataset."
        )
    rows: list[tuple[str, dict[str, float] | None, bool]] = [("over everything", one["budget"], True)]
    for agreed in one["charters"]:
        name = f"charter {agreed['charter']}" + (" (withdrawn)" if agreed["withdrawn"] else "")
        rows.append((f"  of it under {name}", agreed["share"], False))
        rows.append((f"{name}, its own cap", agreed["own"], True))
        rows.append((f"site's own cap, at the delta of {agreed['charter']}", agreed["site"], True))
    if any(numbers is not None for _, numbers, _ in rows):
        console.print(_cells("", "", "spent", "with open", "left", "spent"))
        console.print(_cells("cap", "delta", "(filter)", "runs (filter)", "(filter)", "(odometer)"))
    for name, numbers, capped in rows:  # a line for the name: it may be long, and the screen narrow
        if numbers is not None:
            cells = ("spent_filter", "with_held_filter", "left_filter", "spent_odometer")
            known = [(down if cell == "left_filter" else up)(numbers[cell]) for cell in cells]
            if one["unbounded"]:
                known = ["unbounded", "unbounded", "0", "unbounded"]
            elif report["restored_not_proved"]:
                known = ["unknown", "unknown", "0", "unknown"]
            cap = f"{numbers['epsilon_cap']:g}" if capped else ""
            spent, with_held, left, tight = known
            console.print(plain(name))
            console.print(_cells(cap, f"{numbers['delta']:g}", spent, with_held, left if capped else "", tight))
    if one["budget"] is not None:
        _print_history(console, one)
    else:
        console.print("nothing was asked for yet: the first run that is accepted fixes the budget")


def _cells(*cells: str) -> str:
    """Figures under one another: cap, delta, and four more; 76 columns."""
    return (
        "  " + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (9, 10, 13, 17, 12, 13), strict=True)).rstrip()
    )


def _print_history(console: Console, one: dict[str, Any]) -> None:
    points, cap = one["history"], one["budget"]["epsilon_cap"]
    if not points or one["unbounded"]:
        return
    line = _fewer(points, _WIDTH)
    console.print(plain(f"over time, {points[0]['time']} to {points[-1]['time']}, of the cap {cap:g} (filter):"))
    for title, key in (("spent", "spent_filter"), ("with holds", "with_held_filter")):
        bars = "".join(_LEVELS[min(8, round(8 * point[key] / cap))] for point in line)
        console.print(plain(f"  {title:<10} |{bars}| {100 * points[-1][key] / cap:.0f} %"))
    ends = [point for point in points if point["what"] == "release" or point is points[-1]][-_LAST:]
    names = {agreed["sha256"]: agreed["charter"] for agreed in one["charters"]}
    for point in ends:
        tight = "" if point["spent_odometer"] is None else f", odometer {up(point['spent_odometer'])}"
        run = f"run {point['run']} ({names.get(point['charter'], point['charter'][:16])})"
        what = {"release": "ended", "hold": "was accepted", "debit": "trained"}[point["what"]]
        console.print(
            plain(
                f"  {point['time']} {run} {what}:\n    spent {up(point['spent_filter'])} (filter){tight}, "
                f"with holds {up(point['with_held_filter'])} (delta {one['budget']['delta']:g})",
                lines=True,
            )
        )


def _fewer(points: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    if len(points) <= most:
        return list(points)
    return [points[round(n * (len(points) - 1) / (most - 1))] for n in range(most)]


def _print_plan(console: Console, plan: dict[str, Any], told: str) -> None:
    """What a run would cost; against whom, where that is not what was told already."""
    console.print()
    console.print(plain(f"one more run of {plan['name']} ({plan['file']}), task {plan['task']}:"))
    for item in plan["plan"]:
        console.print(plain(f"  {noise_of(item)}"))
    for one in plan["lineages"]:
        if one["before"] is None:
            console.print(plain(f"  {one['data']}: no finite epsilon would hold for this data any more"))
        else:
            before, after = one["before"], one["after"]
            console.print(
                plain(
                    f"  {one['data']}, with what open runs hold:\n    filter {up(before['filter'])} -> {up(after['filter'])}, odometer "
                    f"{up(before['odometer'])} -> {up(after['odometer'])}, cap {one['epsilon_cap']:g} (delta {one['delta']:g})",
                    lines=True,
                )
            )
            if one["adversary"] != told:
                said = f"with that run these hold with {one['noise']} noise against {one['adversary']}"
                console.print(plain(textwrap.indent(textwrap.fill(said, 76), "    "), lines=True))
        if one["stops"]:
            console.print("  [bold]refused[/]" + plain(f", by {'; '.join(one['stops'])}"))
        elif one["fits"] is not None:
            console.print(plain(f"  fits: {counted(one['fits'], 'such run')}, one after the other"))


def plot_budget(report: dict[str, Any], to: Path) -> None:
    """Draw spending over time against the cap, with holds, one panel a lineage.

    Raises:
        ConfigError: matplotlib is not there, or the name ends in neither .svg nor .png.
        LedgerError: nothing was spent or held yet.
        OutputError: it cannot be written.
    """
    if to.suffix not in (".svg", ".png"):
        raise ConfigError(f"{to}: a plot is a .svg or a .png", "Give --plot budget.svg")
    try:
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ConfigError("plots need matplotlib, which is not installed", "pip install 'hansa[train]'") from err
    drawn = [one for one in report["lineages"] if one["history"]]
    if not drawn:
        raise LedgerError("nothing was spent or held yet", "Plot it when a run was accepted.")
    figure = Figure(figsize=(8, 1.2 + 2.8 * len(drawn)), layout="constrained")
    figure.suptitle(about(report), fontsize=8, wrap=True)
    for axes, one in zip(figure.subplots(len(drawn), 1, squeeze=False)[:, 0], drawn, strict=True):
        points, budget = one["history"], one["budget"]
        times = [datetime.fromisoformat(point["time"]) for point in points]
        spent = [point["spent_filter"] for point in points]
        held = [point["with_held_filter"] for point in points]
        axes.fill_between(times, spent, held, step="post", alpha=0.25, color="tab:blue", label="held for open runs")
        axes.step(times, spent, where="post", color="tab:blue", label="spent (filter)")
        tight = [
            (t, p["spent_odometer"]) for t, p in zip(times, points, strict=True) if p["spent_odometer"] is not None
        ]
        axes.plot(*zip(*tight, strict=True), "o", markersize=3, color="tab:orange", label="spent (odometer)")
        axes.axhline(budget["epsilon_cap"], color="tab:red", linestyle="--", label="cap")
        names = ", ".join(each["name"] or each["dataset"] for each in one["datasets"])
        unbounded = ": UNBOUNDED, no finite epsilon holds" if one["unbounded"] else ""
        axes.set_title(f"{names} (lineage {one['lineage'][:8]}), delta {budget['delta']:g}{unbounded}", fontsize=9)
        axes.set_ylim(0, 1.08 * max(budget["epsilon_cap"], *held))
        axes.set_ylabel("epsilon")
        ticks = AutoDateLocator(tz=UTC)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(ticks)
        # Of years, months, days, hours, minutes, seconds: each tick by itself says which.
        formats = ["%Y", "%Y-%m", "%Y-%m-%d", "%H:%M", "%H:%M", "%H:%M:%S"]
        zeros = ["", "%Y-%m", "%Y-%m-%d", "%Y-%m-%d", "%H:%M", "%H:%M:%S"]
        words = ConciseDateFormatter(ticks, UTC, formats, zero_formats=zeros, show_offset=False)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_formatter(words)
        days = list(dict.fromkeys(f"{time:%Y-%m-%d}" for time in (times[0], times[-1])))
        axes.set_xlabel(f"time (UTC), {' to '.join(days)}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7, loc="lower right")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)
    except OSError as err:
        raise output_error(to, err) from err
