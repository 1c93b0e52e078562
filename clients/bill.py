"""`hansa node budget`: what this dataset has spent, as its own ledger has it, beside every cap that holds for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ..common.accounting import Budget
from ..common.charter import ADVERSARY, Charter, SignedCharter
from ..common.cli import plain
from ..common.errors import LedgerError, Refusal
from ..common.home import Home
from ..common.ledger import read_ledger
from .law import Control
from .settings import NodeSettings
from .standing import Standing


def budget_report(settings: NodeSettings) -> dict[str, Any]:
    """Caps, what was spent and is held, by filter and odometer; every run; refusals by reason. Takes no lock.

    Raises:
        LedgerError: there is no ledger yet, or it does not verify.
    """
    home = Home(settings.home)
    if not settings.ledger.exists():
        raise LedgerError(f"{settings.ledger}: no such file", "The node makes it when it first starts.")
    standing = Standing(read_ledger(settings.ledger, home.key())[0])
    charters = {}
    for entry in settings.federations:
        signed = SignedCharter.load(entry.charter)
        charters[signed.sha256] = signed.charter
    control = Control(settings.control)
    refused = [body for _, body in standing.refused.values()]
    waiting = {
        body["run_id"]
        for body in refused
        if body["reason"] == Refusal.NOT_APPROVED.value
        and body["round"] is None
        and not any(control.approved(body["run_id"], sha) for sha in charters)
    }
    return {
        "partner": home.name(),
        "unit": "record",
        "adjacency": "add-or-remove-one",
        "noise": "local",
        "adversary": ADVERSARY,
        "restored_not_proved": control.restored.exists(),
        "paused": control.paused(),
        "lineages": [_lineage(settings, standing, charters, lineage) for lineage in standing.accounts],
        "runs": [
            {
                "run": hold.run_id,
                "charter": standing.charters[hold.charter_sha256][0],
                "lineage": hold.lineage,
                "state": hold.ended or "open",
                "rounds": sum(purpose == "train" for purpose, _ in hold.rounds),
            }
            for hold in standing.holds.values()
        ],
        "refusals": dict(Counter(body["reason"] for body in refused)),
        "waiting_for_approval": sorted(waiting - {run for _, run in standing.holds}) if settings.site.approval else [],
    }


def _lineage(
    settings: NodeSettings, standing: Standing, charters: Mapping[str, Charter], lineage: str
) -> dict[str, Any]:
    """One budget: over everything, and for each charter its own cap and the site's."""
    account, control, cap = standing.accounts[lineage], Control(settings.control), settings.site.epsilon_cap
    agreed = []
    for sha, (name, expires) in standing.charters.items():
        privacy = charters[sha].privacy if sha in charters else None
        one: dict[str, Any] = {"charter": name, "sha256": sha, "expires": f"{expires:%Y-%m-%dT%H:%M:%SZ}"}
        one |= {"withdrawn": control.withdrawn(sha), "own": None, "site": None}
        if privacy is not None and privacy.epsilon is not None and privacy.delta is not None:
            one["own"] = standing.epsilons(lineage, Budget.create(privacy.epsilon, privacy.delta), sha)
            one["site"] = None if cap is None else standing.epsilons(lineage, Budget.create(cap, privacy.delta))
        agreed.append(one)
    return {
        "lineage": lineage,
        "datasets": [dataset for dataset, of in standing.datasets.items() if of == lineage],
        "unbounded": account.unbounded,
        "budget": None if account.budget is None else standing.epsilons(lineage, account.budget),
        "charters": agreed,
    }


def print_budget(console: Console, report: dict[str, Any]) -> None:
    """For a terminal. No epsilon without what it is about."""
    console.print(plain(f"{report['partner']}: epsilon of one record of this partner, add or remove one, local noise,"))
    console.print(plain(f"against {report['adversary']}"))
    if report["restored_not_proved"]:
        console.print("[bold red]EXHAUSTED[/]: restored from a backup, spending not proved; every run is refused.")
    if report["paused"]:
        console.print("[yellow]paused[/]: every run is refused until `hansa node resume`")
    for one in report["lineages"]:
        _print_lineage(console, report, one)
    for one in report["runs"]:
        console.print(plain(f"run {one['run']} ({one['charter']}): {one['state']}, {one['rounds']} round(s) debited"))
    for reason, count in report["refusals"].items():
        console.print(plain(f"refused {count} x: {reason}"))
    for run_id in report["waiting_for_approval"]:
        console.print(plain(f"waits for you: hansa node approve {run_id}"))


def _print_lineage(console: Console, report: dict[str, Any], one: dict[str, Any]) -> None:
    if one["unbounded"]:
        console.print(
            "[bold red]UNBOUNDED[/]: an unprotected round was trained; no finite epsilon holds for this dataset."
        )
    table = Table(box=None, pad_edge=False)
    for title in ("budget", "cap", "delta", "spent (filter)", "spent (odometer)", "with open runs (filter)", "left"):
        table.add_column(title, justify="left" if title == "budget" else "right")
    rows = [("dataset, over everything", one["budget"])]
    for agreed in one["charters"]:
        rows.append((f"charter {agreed['charter']}" + (" (withdrawn)" if agreed["withdrawn"] else ""), agreed["own"]))
        rows.append((f"site's own cap, at the delta of {agreed['charter']}", agreed["site"]))
    for name, numbers in rows:
        if numbers is not None:
            cells = ("spent_filter", "spent_odometer", "with_held_filter", "left_filter")
            known = [f"{numbers[cell]:.4f}" for cell in cells]
            if one["unbounded"]:
                known = ["unbounded"] * 3 + ["0"]
            elif report["restored_not_proved"]:
                known = ["unknown"] * 3 + ["0"]
            table.add_row(plain(name), f"{numbers['epsilon_cap']:g}", f"{numbers['delta']:g}", *known)
    if table.row_count:
        console.print(table)
    else:
        console.print("nothing was asked for yet: the first run that is accepted fixes the dataset's budget")
