"""`hansa evidence`: published claims, recomputed in one command."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from .cli import Format, FormatOption, out, plain, progress, show_json
from .errors import ConfigError
from .evidence import LIMITS, MISTAKES, Example, as_fields, examples, page
from .identity import check_writable, write_whole
from .page import up
from .plan import SOFTWARE


def commands(app: typer.Typer) -> None:
    """Register the group `evidence`."""
    evidence = typer.Typer(help="Published claims, recomputed.", no_args_is_help=True)
    evidence.callback()(_group)  # one command, and still a group
    evidence.command("accounting")(accounting)
    app.add_typer(evidence, name="evidence")


def _group() -> None:
    """Published claims, recomputed."""


def accounting(
    to: Annotated[
        Path | None, typer.Option("--out", help="also write a page to read and print, e.g. evidence.html")
    ] = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Published examples that under-count epsilon, recomputed: what they claim beside what is true.

    Takes a few seconds and needs no training packages.

    Example: hansa evidence accounting --out evidence.html
    """
    if to is not None and to.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(
            f"{to}: what is written is a page", "Give --out a name ending in .html; for data: --format json."
        )
    if to is not None:
        check_writable(to)
    with progress("recomputing") as told:
        found = examples(told)
    if to is not None:
        made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        write_whole(to, page(found, made, SOFTWARE).encode())
    if form is Format.JSON:
        show_json({"software": SOFTWARE, "examples": as_fields(found), "limits": list(LIMITS)})
        return
    for key, mistake in MISTAKES.items():
        _print([e for e in found if e.mistake == key], mistake.title, mistake.what, mistake.instead)
    out.print("[bold]Limits[/]")
    for limit in LIMITS:
        out.print(f"  {plain(limit)}")
    if to is not None:
        out.print(plain(f"\nAs a page: {to}"))


def _print(rows: list[Example], title: str, what: str, instead: str) -> None:
    out.print(f"[bold]{plain(title)}[/]\n  {plain(what)}")
    first = rows[0]
    out.print(
        f"  [dim]unit: {first.unit}; adjacency: {first.adjacency}; noise: {first.noise}; adversary: {first.adversary}; delta by row[/]"
    )
    # By hand: beside seven figures a terminal of 80 columns has no room for the names.
    out.print(plain(_LINE.format("claimed", "recomputed", "true", "too low", "delta", "steps: true", "counted")))
    for e in rows:
        low = 1 - e.basis / e.true
        own = "" if e.published else " (our setting)"
        out.print(f"  {plain(e.where)}[dim]{own}; q {e.sampling_rate:.4g}, sigma {e.noise_multiplier:.4g}[/]")
        line = _LINE.format(
            f"{e.basis:.3f}" if e.stated is None else f"{e.stated:g}",
            f"{e.claimed:.3f}",
            f">= {e.true:.3f}" if e.bound == "at least" else up(e.true, 3),
            f"{low:.0%}" if low > 0 else "-",
            f"{e.delta:g}",
            f"{e.steps:,}",
            f"{e.claimed_steps:,}",
        )
        out.print(f"[bold]{plain(line)}[/]")
    for source in dict.fromkeys(e.source for e in rows):
        out.print(f"  [dim]source: {plain(source)}[/]")
    out.print(f"  instead: {plain(instead)}\n")


_LINE = "  {:>9}{:>12}{:>12}{:>9}{:>8}{:>13}{:>9}"
