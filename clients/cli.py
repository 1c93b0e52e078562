"""The commands `hansa node`: register data, check, run, and what a steward says to a node that runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..common.charter import SignedCharter
from ..common.cli import Format, FormatOption, passphrase_for, plain, show_json
from ..common.errors import ConfigError, HansaError
from ..common.home import Home
from ..common.identity import write_whole
from . import dataset_cli
from .dataset_cli import SettingsArgument, YesOption
from .law import Control
from .settings import TEMPLATE, NodeSettings, load_settings

_HERE = Path("node.yaml")
_console = Console(highlight=False, soft_wrap=True, emoji=False)


def commands(app: typer.Typer) -> None:
    """Register the group `node`."""
    node = typer.Typer(
        help="A partner's node: it trains beside the data and refuses what was not agreed.", no_args_is_help=True
    )
    dataset_cli.commands(node)
    for command in (init, check, run, budget, approve, pause, resume, withdraw, export, backup, restore):
        node.command(command.__name__)(command)
    app.add_typer(node, name="node")


# -- setting up ----------------------------------------------------------------------------------------------------------


def init(
    charter: Annotated[Path, typer.Option(help="the charter that everyone signed")],
    server: Annotated[str, typer.Option(help="HOST:PORT of the coordinator's server")],
    settings: Annotated[Path, typer.Argument(help="the file to write")] = _HERE,
) -> None:
    """Write a node.yaml with every setting in it, explained. Run it in the folder of your identity.

    Example: hansa node init --charter charter.json --server coordinator.example:8440
    """
    if settings.exists():
        raise ConfigError(f"{settings}: exists", "Edit it; it is never overwritten.")
    write_whole(settings, TEMPLATE.format(charter=_quoted(str(charter)), server=_quoted(server)).encode())
    try:
        load_settings(settings)
    except ConfigError:
        settings.unlink()
        raise
    _console.print(plain(f"Written to {settings}. Next: hansa node dataset add FILE.csv --task TASK; hansa node check"))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def check(settings: SettingsArgument = _HERE, form: FormatOption = Format.TEXT) -> int:
    """Keys, certificate, data, charters, clock, disk, and whether the server answers. Exit 1 when something fails.

    Each failure says what to do. Nothing is changed; the node may be running.

    Example: hansa node check
    """
    loaded = load_settings(settings)
    passphrase = _passphrase(loaded)
    from .preflight import check as look

    found = look(loaded, passphrase)
    bad = any(finding.state == "FAIL" for finding in found)
    if form is Format.JSON:
        show_json({"ready": not bad, "findings": [vars(finding) for finding in found]})
        return int(bad)
    styles = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
    for finding in found:
        _console.print(
            f"[{styles[finding.state]}]{finding.state:<5}[/]" + plain(f"{finding.name}: {finding.what}", lines=True)
        )
        if finding.fix:
            _console.print("     " + plain(finding.fix, lines=True))
    return int(bad)


# -- running -------------------------------------------------------------------------------------------------------------


def run(settings: SettingsArgument = _HERE) -> None:
    """Serve the federations of node.yaml until SIGTERM or Ctrl-C; a round that is being trained is finished first.

    The log on standard output holds no record value, real size or data path. An encrypted key's passphrase is taken from
    HANSA_PASSPHRASE, or asked for.

    Example: hansa node run node.yaml
    """
    loaded = load_settings(settings)
    passphrase = _passphrase(loaded)
    from ..common.events import EventLog
    from .node import run as serve

    log = EventLog(loaded.log, sys.stdout)
    try:
        serve(loaded, passphrase, log)
    except HansaError as err:
        log.failed("stopped", err)
        raise


def budget(
    settings: SettingsArgument = _HERE,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="a charter or configuration: what one more run costs, and how many fit"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw spending over time against the cap: .svg or .png")
    ] = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """What each lineage of data sets has spent, holds for open runs, and has left: over time and by charter.

    Read from the ledger; the node may be running. The filter decides; the odometer is the tight figure beside it.
    Exit 1 when the run of --plan would be refused.

    Example: hansa node budget --plan charter.json --plot budget.svg
    """
    from .bill import budget_report  # the accounting takes its time to load
    from .bill_show import plot_budget, print_budget

    report = budget_report(load_settings(settings), plan)
    if plot is not None:
        plot_budget(report, plot)
    if form is Format.JSON:
        show_json(report)
    else:
        print_budget(_console, report)
    if report["plan"] is not None and any(one["stops"] for one in report["plan"]["lineages"]):
        raise typer.Exit(1)


def approve(
    run_id: Annotated[
        str, typer.Argument(metavar="RUN", help="the run's name, as the node's log and `budget` show it")
    ],
    settings: SettingsArgument = _HERE,
    charter: Annotated[Path | None, typer.Option(help="under which charter, when node.yaml lists several")] = None,
) -> None:
    """Allow one run, where the site's law has `approval: true`. The coordinator asks again with `server run --resume`.

    A run that was not asked for yet can be approved before, by a name agreed with the coordinator (`server run --run NAME`).

    Example: hansa node approve 20261125-1f3a9c2e
    """
    loaded = load_settings(settings)
    listed = [entry.charter for entry in loaded.federations]
    if charter is None and len(listed) > 1:
        raise ConfigError("node.yaml lists several charters", "Say under which one: --charter FILE")
    signed = _listed(charter or listed[0], loaded)
    Control(loaded.control).approve(run_id, signed.sha256)
    _console.print(plain(f"Approved: run {run_id} under charter {signed.charter.name} ({signed.sha256[:16]}...)."))


def pause(settings: SettingsArgument = _HERE) -> None:
    """Hold, debit and answer nothing new until `resume`; the coordinator sees "refused: paused". Runs can still be closed.

    Example: hansa node pause
    """
    Control(load_settings(settings).control).pause()
    _console.print("Paused, from the next request on. Go on with: hansa node resume")


def resume(settings: SettingsArgument = _HERE) -> None:
    """Go on after `pause`.

    Example: hansa node resume
    """
    Control(load_settings(settings).control).resume()
    _console.print("Not paused.")


def withdraw(
    settings: SettingsArgument = _HERE,
    charter: Annotated[Path | None, typer.Option(help="only from this charter; default: from all, for good")] = None,
    yes: YesOption = False,
) -> None:
    """Leave a charter for good, or all. Open runs get nothing more, and what they held comes free; they can be closed.

    What left before stays spent, and stays on the ledger.

    Example: hansa node withdraw --charter charter.json
    """
    loaded = load_settings(settings)
    signed = None if charter is None else _listed(charter, loaded)
    what = "every charter, now and later" if signed is None else f"the charter {signed.charter.name}"
    if not yes:
        typer.confirm(f"Withdraw from {what}? There is no way back.", abort=True)
    Control(loaded.control).withdraw(None if signed is None else signed.sha256)
    _console.print(plain(f"Withdrawn from {what}. Open holds are released at the node's next request or start."))


def _listed(charter: Path, settings: NodeSettings) -> SignedCharter:
    signed = SignedCharter.load(charter)
    if signed.sha256 not in {SignedCharter.load(entry.charter).sha256 for entry in settings.federations}:
        raise ConfigError(f"{charter}: not a charter that node.yaml lists", "Give one of its files, or list it there.")
    return signed


def _passphrase(settings: NodeSettings) -> str | None:
    return passphrase_for(Home(settings.home).identity_key)


# -- keeping -------------------------------------------------------------------------------------------------------------


def export(
    to: Annotated[Path, typer.Option("--out", help="the bundle's folder, whoever wrote into it before")],
    settings: SettingsArgument = _HERE,
    charter: Annotated[
        Path | None, typer.Option(help="for an auditor of this charter, when node.yaml lists several")
    ] = None,
) -> None:
    """Add this partner's part to an auditor's bundle: ledger, public key, countersigned heads, closing checkpoints.

    Of what the node did under other charters the auditor sees what it did to the budget, and not whose run it was. Nothing
    else is in it that may not leave.

    Example: hansa node export --out bundle
    """
    from .bundle import export as export_bundle

    _console.print(plain(f"{to}: {', '.join(export_bundle(load_settings(settings), to, charter))}"))


def backup(
    file: Annotated[Path, typer.Argument(help="the file to write, mode 0600; it holds the private keys")],
    settings: SettingsArgument = _HERE,
) -> None:
    """Write identity, registration, ledger, outbox and models into one file. The node may be running.

    Not in it: the data, node.yaml and charter.json, and requests that are being worked on.

    Example: hansa node backup /mnt/safe/node-2026-11-25.tar
    """
    from .custody import backup as write

    write(load_settings(settings), file)
    _console.print(plain(f"Written to {file}. It holds private keys: keep it as you keep them."))
    _console.print("What is spent from now on is not in it: make one after every run.")


def restore(
    places: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[BACKUP] [SETTINGS]", help="the backup (not with --prove); node.yaml"),
    ] = None,
    heads: Annotated[
        list[Path] | None, typer.Option(help="closing/RUN.json, from a peer; repeat for the newest of each charter")
    ] = None,
    prove: Annotated[list[Path] | None, typer.Option(help="the same, for a node that was restored before")] = None,
) -> int:
    """Put a backup back. It is a rollback unless proved otherwise: until then the budget is treated as exhausted.

    The proof are the newest closing checkpoints that your peers hold (ask the coordinator and every partner, also whether any
    run began later): signed by everyone, and naming exactly the ledger that was restored. Exit 1 while it is not proved.

    Example: hansa node restore node.tar --heads closing/20261125-1f3a9c2e.json
    """
    from . import custody

    given = list(places or [])
    if bool(heads) and bool(prove):
        raise ConfigError("--heads and --prove are both given", "--heads goes with a backup, --prove with none.")
    archive = None if prove else (given.pop(0) if given else None)
    if len(given) > 1 or (archive is None and not prove):
        raise ConfigError(
            "what shall be restored?", "hansa node restore BACKUP [SETTINGS], or: restore --prove CLOSING.json"
        )
    settings = load_settings(given[0] if given else _HERE)
    if archive is None:
        doubt = custody.prove(settings, prove or [])
    else:
        doubt = custody.restore(settings, archive, heads or [])
        _console.print(plain(f"Restored from {archive}."))
    if doubt is None:
        _console.print("Proved: your peers hold no later head of this ledger. The node may go on.")
        return 0
    _console.print(plain(f"Not proved: {doubt}."))
    _console.print(
        "The budget is treated as exhausted: the node refuses every run. When you have more from your peers:"
    )
    _console.print("  hansa node restore --prove CLOSING.json --prove ...")
    return 1
