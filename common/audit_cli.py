"""`hansa audit`: the verifier's verdict as text, as JSON and as a page to print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from . import verifier
from .cli import Format, FormatOption, out, plain, show_json
from .errors import HansaError


def commands(app: typer.Typer) -> None:
    """Register `audit`."""
    app.command("audit")(audit)


def audit(
    folder: Annotated[Path, typer.Argument(help="a bundle: the folder that a run wrote")],
    form: FormatOption = Format.TEXT,
) -> int:
    """Recompute the privacy bill from ledgers, charter and keys alone. Exit 0 verified, 1 a violation, 2 unreadable.

    Example: hansa audit out/demo
    """
    try:
        verdict = verifier.verify_bundle(folder)
    except verifier.Unreadable as err:
        place = "" if err.file == str(folder) else f"{folder}: "
        raise HansaError(f"{place}{err}", "Give the folder that a run wrote (with charter.json in it).") from err
    if form is Format.JSON:
        show_json(verdict)
    else:
        print_verdict(verdict)
    return 0 if verdict["verified"] else 1


def print_verdict(verdict: dict[str, Any]) -> None:
    """A verdict for a terminal, with its limits."""
    if verdict["verified"]:
        out.print(
            "[bold green]VERIFIED[/] "
            + ("(simulated: all keys and data on one machine)" if verdict["simulated"] else "")
        )
    else:
        out.print("[bold red]NOT VERIFIED[/]")
    _print_found(verdict["violations"], "[red]violation[/]")
    _print_found(verdict["warnings"], "[yellow]warning[/]")
    if verdict["verified"]:
        out.print(plain(verdict["claim"]))
    partners = verdict["partners"]
    # An epsilon alone says nothing; whether it holds is the verdict's line above.
    if any(p["epsilon_filter"] is not None for p in partners.values()):
        out.print(
            "recomputed from the ledgers: record level, add-or-remove-one, local noise, against all but the partner"
        )
    table = Table(box=None, pad_edge=False)
    for title in ("partner", "epsilon (odometer)", "epsilon (filter)", "cap", "delta", "rounds", "refusals"):
        table.add_column(title, justify="left" if title == "partner" else "right")
    for name, p in list(partners.items())[:20]:
        table.add_row(
            plain(name),
            _number(p["epsilon"]),
            _number(p["epsilon_filter"]),
            _number(p["epsilon_cap"], "-"),
            "-" if p["delta"] is None else f"{p['delta']:g}",
            str(p["rounds"]),
            str(p["refusals"]),
        )
    out.print(table)
    if len(partners) > 20:
        worst = max((p["epsilon"] for p in partners.values() if p["epsilon"] is not None), default=None)
        out.print(f"... and {len(partners) - 20} more; the largest epsilon of all is {_number(worst)}")
    c = verdict["checked"]
    out.print(f"checked {c['ledgers']} ledgers, {c['entries']} entries, {c['signatures']} signatures")
    out.print("Limits of this verdict:")
    for limit in verdict["limits"]:
        out.print(f"  - {plain(limit)}")


def _print_found(found: list[dict[str, Any]], label: str) -> None:
    """Some of each file, so that a file with many does not hide the others."""
    files: dict[str, list[dict[str, Any]]] = {}
    for item in found:
        files.setdefault(item["file"], []).append(item)
    for file, items in list(files.items())[:50]:
        for item in items[:8]:
            out.print(f"  {label} {plain(_place(item))}: {plain(item['what'])}")
        if len(items) > 8:
            out.print(f"  {label} {plain(file)}: ... and {len(items) - 8} more: --format json shows all")
    if len(files) > 50:
        out.print(f"  ... and {len(files) - 50} more files: --format json shows all")


def _place(item: dict[str, Any]) -> str:
    return item["file"] if item["line"] is None else f"{item['file']}:{item['line']}"


def _number(value: float | None, absent: str = "unbounded") -> str:
    return absent if value is None else f"{value:.4f}"
