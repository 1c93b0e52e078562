"""`hansa audit`: the verifier's verdict as text, as JSON and as a page to print."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from . import verifier
from .audit_report import (
    budgets,
    by_code,
    histories,
    partly,
    place,
    placements,
    size_of,
    state,
    unbounded,
    write_audit_report,
)
from .charter import ADVERSARY, SignedCharter, in_words
from .cli import Format, FormatOption, out, plain, show_json
from .errors import ConfigError, HansaError, OutputError, counted
from .page import exact, number, up


def commands(app: typer.Typer) -> None:
    """Register `audit`."""
    app.command("audit")(audit)


def audit(
    folder: Annotated[Path, typer.Argument(help="a bundle: the folder that a run wrote")],
    against: Annotated[
        list[Path] | None,
        typer.Option(
            help="a copy to compare with, from whoever kept it: a ledger, heads, a checkpoint, a folder; repeat it"
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="also write the verdict as an HTML page to read and print, e.g. report.html")
    ] = None,
    form: FormatOption = Format.TEXT,
) -> int:
    """Recompute the privacy bill from ledgers, charter and keys alone. Exit 0 verified, 1 a violation, 2 unreadable.

    Example: hansa audit out/demo --report audit.html
    """
    if report is not None and report.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(
            f"{report}: the report is an HTML page, and this is another kind of name",
            "Give --report a name ending in .html. For a PDF open that page in a browser and print it to PDF.",
        )
    if report is not None and report.resolve().is_relative_to(folder.resolve()):
        raise OutputError(f"{report}: inside the bundle", "The bundle is evidence and stays as it is: write elsewhere.")
    try:
        verdict = verifier.verify_bundle(folder, against or ())
    except verifier.Unreadable as err:
        if err.file in map(str, against or ()):
            raise HansaError(str(err), "Give --against a ledger, heads, a checkpoint, or a folder with such.") from err
        where = "" if err.file == str(folder) else f"{folder}: "
        raise HansaError(f"{where}{err}", "Give the folder that a run wrote (with charter.json in it).") from err
    if report is not None:
        write_audit_report(
            report,
            verdict,
            made=datetime.now(UTC),
            against=[str(path) for path in against or ()],
            verifier_sha256=hashlib.sha256(Path(verifier.__file__).read_bytes()).hexdigest(),
            charter_words=_charter_words(folder, verdict),
        )
    if form is Format.JSON:
        show_json(verdict)
    else:
        print_verdict(verdict)
        if report is not None:
            out.print(plain(f"The verdict as a page: {report}"))
    return 0 if verdict["verified"] else 1


def _charter_words(folder: Path, verdict: dict[str, Any]) -> str | None:
    """The charter that was audited, in words; None where this release cannot say it, or it is no longer the same file."""
    try:
        signed = SignedCharter.load(folder / "charter.json")
    except HansaError:
        return None
    return in_words(signed) if signed.sha256 == verdict["charter_sha256"] else None


def print_verdict(verdict: dict[str, Any]) -> None:
    """A verdict for a terminal, with its limits."""
    if verdict["verified"]:
        out.print(
            "[bold green]VERIFIED[/] "
            + ("(simulated: all keys and data on one machine)" if verdict["simulated"] else "")
        )
    else:
        out.print("[bold red]NOT VERIFIED[/]: what follows is what the files say; rely on none of it")
    _print_found(verdict["violations"], "[red]violation[/]")
    _print_found(verdict["warnings"], "[yellow]warning[/]")
    if verdict["verified"]:
        out.print(plain(verdict["claim"]))
    partners = verdict["partners"]
    # An epsilon alone says nothing; whether it holds is the verdict's line above.
    bounded = {name: p for name, p in partners.items() if not unbounded(p)}
    for (noise, adversary), names in placements(bounded).items():
        against = "all but the partner" if adversary == ADVERSARY else plain(adversary)
        unit = plain(str(verdict.get("unit") or "record"))
        whose = "" if len(names) == len(bounded) else f"{_some(names)}: "
        out.print(
            f"{whose}recomputed from the ledgers: {unit} level, add-or-remove-one, {plain(noise)} noise, against {against}; "
            "epsilon rounded up"
        )
    _print_partners(partners)
    c = verdict["checked"]
    out.print(
        f"checked {c['ledgers']} ledgers, {c['entries']} entries, {c['signatures']} signatures"
        + (f"; compared with {c['proofs']} signed heads, checkpoints and copies" if "proofs" in c else "")
    )
    if open_runs := verdict.get("open_runs"):
        out.print(f"runs that are not closed: {_some(open_runs)}")
    out.print("Limits of this verdict:")
    for limit in verdict["limits"]:
        out.print(f"  - {plain(limit)}")


def _print_partners(partners: dict[str, Any]) -> None:
    """One line a partner; many partners by history, the largest epsilon first."""
    total = sum(size_of([name], p) for name, p in partners.items())
    rows = histories(partners) if total > 20 else [([name], p) for name, p in partners.items()]
    listed = [row for group in rows[:20] for row in budgets(*group)]
    other = any(_this_charter(p) for _, p in listed)
    table = Table(box=None, padding=(0, 1, 0, 0))
    titles = [
        "partner",
        "epsilon\nfilter",
        "\ncap",
        "epsilon\nodometer",
        "\ndelta",
        "this\ncharter",
        "\nrounds",
        "\nrefusals",
        "",
    ]
    for title in titles if other else [t for t in titles if t != "this\ncharter"]:
        table.add_column(
            title, justify="left" if title in ("partner", "") else "right", no_wrap=title not in ("partner", "")
        )
    for names, p in listed:
        kind, stands = state(p)
        part = {key: p.get(key) for key in ("whole", "missing", "unbounded")}
        color = {"bad": "red", "good": "green", "plain": "dim"}[kind]
        table.add_row(
            plain(names[0]) + (f" (+{more:,})" if (more := size_of(names, p) - 1) else ""),
            _epsilon(p, "epsilon_filter"),
            _exact(p.get("epsilon_cap")),
            _epsilon(p, "epsilon"),
            _exact(p.get("delta")),
            *([_epsilon({**(p.get("charter_epsilon") or {}), **part}, "epsilon_filter", "-")] if other else []),
            *(
                _exact(p.get(key)) + (" + ?" if partly(p) and p.get(key) is not None else "")
                for key in ("rounds", "refusals")
            ),
            f"[{color}]{stands}[/]",
        )
    out.print(table)
    if len(listed) > len(rows[:20]):
        out.print(
            "a partner with several budgets has a line for each lineage (data sets that share records): epsilon is about those"
        )
    if any(partly(p) and not unbounded(p) for _, p in listed):
        out.print("+ ?: of a ledger that is not here, or was not read, to its end; what was charged may be more")
    if any(size_of(*row) > 1 for row in rows[:20]):
        out.print("(+n): so many more partners with the same history")
    if len(rows) > 20:
        rest = sum(size_of(*row) for row in rows[20:])
        out.print(f"... and {rest:,} partners more, of {len(rows) - 20:,} histories with smaller epsilons")
    _print_witnesses([(names[0], p) for names, p in rows if p.get("witnessed")])


def _this_charter(figures: Mapping[str, Any]) -> bool:
    """Whether what this charter cost is another figure than the whole."""
    alone = number((figures.get("charter_epsilon") or {}).get("epsilon_filter"))
    return alone is not None and alone != number(figures.get("epsilon_filter"))


def _print_witnesses(ledgers: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Who countersigned each ledger, up to where; ledgers of which that is the same on one line."""
    found: dict[str, list[str]] = {}
    for name, p in ledgers:
        length, tail, by = p["witnessed"].get("length"), p.get("tail"), p["witnessed"].get("by") or []
        there = p["entries"] + (p.get("missing") or 0)
        words = f"up to entry {length} of {there}" if tail or partly(p) else "to the end"
        words += f", {p['missing']} of them missing here," if p.get("missing") else ""
        words = f"{words} by {_some(by)}" if by and length else "by nobody"
        if not length and p.get("missing"):
            beyond = p.get("beyond")
            words = f"{f'by {_some(beyond)}' if beyond else 'by nobody'}, but for {there} entries, of which {p['entries'] or 'none'} can be read here"
        found.setdefault(words, []).append(name)
    for words, names in list(found.items())[:20]:
        out.print(f"countersigned {words}: {_some(names)}")


def _epsilon(figures: Mapping[str, Any], key: str, absent: str = "unbounded") -> str:
    value = number(figures.get(key))
    if partly(figures) and not unbounded(figures):
        return f"{up(value)} + ?" if value else "?"
    return absent if value is None else up(value)


def _exact(value: object) -> str:
    given = number(value)
    return "-" if given is None else exact(given)


def _some(names: Sequence[str]) -> str:
    return plain(", ".join(map(str, names[:4]))) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _print_found(found: Sequence[Mapping[str, Any]], label: str) -> None:
    """By code, and of each code some of each file, so that one with many does not hide the others."""
    for code, means, items in by_code(found)[:50]:
        files: dict[str, list[Mapping[str, Any]]] = {}
        for item in items:
            files.setdefault(item["file"], []).append(item)
        if code is not None:
            out.print(
                f"  {label} [bold]{plain(code)}[/], {counted(len(items), 'place')}{': ' if means else ''}{plain(means or '')}"
            )
        most = 8 if len(files) < 4 else 3
        for file, some in list(files.items())[:20]:
            lead = "    " if code is not None else f"  {label} "
            for item in some[:most]:
                out.print(f"{lead}{plain(place(item))}: {plain(item['what'])}")
            if len(some) > most:
                out.print(f"{lead}{plain(file)}: ... and {len(some) - most} more: --format json shows all")
        if len(files) > 20:
            out.print(f"  ... and {len(files) - 20} more files: --format json shows all")
