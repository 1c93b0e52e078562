"""The commands `hansa server`: run a training, see how it goes, export for an audit."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..common.cli import Format, FormatOption, clean, passphrase_for, plain, show_json
from ..common.errors import ConfigError
from .bundle import export as export_bundle
from .settings import ServerSettings, load_settings
from .status import OVER, read_status

if TYPE_CHECKING:
    from ..common.events import EventLog
    from .rounds import Outcome
    from .service import Service
    from .status import Status

SettingsArgument = Annotated[Path, typer.Argument(help="the coordinator's server.yaml")]
_console = Console(highlight=False, soft_wrap=True, emoji=False)


def commands(app: typer.Typer) -> None:
    """Register the group `server`."""
    server = typer.Typer(help="Coordinate: train with the partners of a charter.", no_args_is_help=True)
    for command in (run, status, export):
        server.command(command.__name__)(command)
    app.add_typer(server, name="server")


def run(
    settings: SettingsArgument = Path("server.yaml"),
    name: Annotated[
        str | None, typer.Option("--run", help="the run's name; default: the date and eight digits")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with that run, or with the newest that is not closed")
    ] = False,
    give_up: Annotated[
        bool, typer.Option("--give-up", help="with --resume: train no more, close that run as it stands")
    ] = False,
) -> int:
    """Wait for the partners' nodes, train under the charter, close with everyone's signature.

    Exit 1 when too few partners accepted or answered. Ctrl-C or SIGTERM stops it; --resume goes on, no round is paid twice.

    Example: hansa server run server.yaml
    """
    from ..common.events import EventLog
    from .service import Service

    if give_up and not resume:
        raise ConfigError(
            "--give-up is about a run that began", "Say so: --resume --give-up, and which one: --run NAME."
        )
    loaded = load_settings(settings)
    form = loaded.log
    log = EventLog(form, sys.stdout if form == "json" else cast(TextIO, _Stderr()))
    with _signals(), Service(loaded, passphrase_for(loaded.home / "identity.key")) as service:
        run_id = service.choose(name, resume)
        grid = service.link(log)
        log.capture()
        with service.status(run_id, grid) as status, _progress(service, run_id, status, log, form) as notify:
            outcome = service.run(grid, run_id, status, notify, give_up=give_up)
    if form == "text":
        _ending(settings, loaded, outcome)
    return 0 if outcome.why == "completed" else 1


def status(settings: SettingsArgument = Path("server.yaml"), form: FormatOption = Format.TEXT) -> int:
    """Who is connected, which round, who refused and why. Exit 1 when the run failed or its process is gone.

    Example: hansa server status server.yaml
    """
    found = read_status(load_settings(settings).status)
    if form is Format.JSON:
        show_json(found)
    else:
        _console.print(_shown(found))
    return 1 if found["gone"] or found["phase"] in ("failed", "refused") else 0


def export(
    settings: SettingsArgument = Path("server.yaml"),
    to: Annotated[Path, typer.Option("--out", help="the bundle's folder; partners add their part to it")] = Path(
        "bundle"
    ),
) -> None:
    """Write the coordinator's part of a bundle for an auditor: charter, keys, own ledger, closings, model.

    Each partner adds its own with `hansa node export`; then `hansa audit BUNDLE` verifies the whole.

    Example: hansa server export server.yaml --out bundle
    """
    written = export_bundle(load_settings(settings), to)
    _console.print(plain(f"{to}: {', '.join(written)}"))
    _console.print(plain(f"Each partner adds its part: hansa node export --out {to}; then: hansa audit {to}"))


# -- stopping --------------------------------------------------------------------------------------------------------


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM stops like Ctrl-C; a second signal ends the process at once, which is as safe as a crash."""

    def stop(*_: object) -> None:
        for number in chosen:
            signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    chosen = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in chosen]
    try:
        yield
    finally:
        for number, handler in zip(chosen, before, strict=True):
            signal.signal(number, handler)


# -- the screen ------------------------------------------------------------------------------------------------------


class _Stderr:
    """Whatever sys.stderr is at the moment: a live table on the screen puts itself in its place."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def _progress(service: Service, run_id: str, status: Status, log: EventLog, form: str) -> Iterator[Callable[..., None]]:
    """Where a run's events go: a live table on a screen, else lines; or one line of JSON each."""
    if form == "json":
        yield lambda event, **facts: _log(log, run_id, event, facts)
        return
    _say(f"run {run_id} of {service.charter.name}; stop with Ctrl-C, go on with --resume")
    live: AbstractContextManager[object] = nullcontext()
    if _console.is_terminal:
        live = Live(get_renderable=lambda: _shown(status.snapshot()), console=_console, refresh_per_second=4)
    with live:
        yield lambda event, **facts: _line(event, facts, quiet=_console.is_terminal)


def _log(log: EventLog, run_id: str, event: str, facts: dict[str, Any]) -> None:
    """One event in the words that logs have; figures of merit are in the status."""
    match event:
        case "waiting":
            log.log("waiting", run=run_id, seconds=facts["wait_s"])
        case "round":
            log.log("round", run=run_id, round=facts["round"])
        case "answer":
            answer = {"partner": facts["partner"], "round": facts["round"], "kind": facts["kind"]}
            outcome, detail = facts["answer"].outcome, facts["answer"].detail
            why = {"reason": detail} if detail and outcome in ("invalid", "failed") else {}
            log.log("answer", run=run_id, **answer, state=outcome, **why)
        case "done":
            log.log("round done", run=run_id, round=facts["round"], seconds=facts["seconds"])
        case "closed":
            log.log("closed", run=run_id, reason=facts["why"])
        case "undelivered":
            log.log("undelivered", run=run_id, partner=facts["partner"], state=facts["answer"].outcome)
        case "contradiction":
            log.log("ledger contradicts an earlier head", run=run_id, partner=facts["partner"])
        case "retry":
            log.log(
                "round asked again", run=run_id, round=facts["round"], attempt=facts["attempt"], reason=facts["why"]
            )
        case "liar":
            log.log("masks do not fit", run=run_id, round=facts["round"], partner=facts["partner"])


CONTRADICTION = (
    "{partner}: its ledger of {length} entries does not extend what it signed before: rolled back or forked; both heads are kept "
    "for an auditor"
)


def _line(event: str, facts: dict[str, Any], quiet: bool) -> None:
    """One event in words. `quiet`: the table shows the ordinary ones."""
    if event == "refused":
        no = facts["refusal"]
        _say(f"{no.partner} refused: {no.reason}: {no.detail}", "yellow")
    elif event == "answer" and facts["answer"].outcome in ("invalid", "timeout", "failed"):
        answer = facts["answer"]
        _say(f"{facts['partner']}: {facts['kind']}: {answer.outcome} {answer.detail}", "yellow")
    elif event == "contradiction":
        _say(CONTRADICTION.format(**facts), "bold red")
    elif event == "retry":
        _say(
            f"round {facts['round']}: {facts['why']}; asked again of {', '.join(facts['partners'])}, who pay once more",
            "yellow",
        )
    elif event == "liar":
        _say(f"{facts['partner']}: what it dealt or revealed in round {facts['round']} does not fit", "bold red")
    elif event == "waiting" and not quiet:
        _say(f"waiting up to {facts['wait_s']:g} s for {', '.join(facts['partners'])} on port {facts['port']}")
    elif event == "done" and not quiet:
        told = "  ".join(f"{name} {value:.4f}" for name, value in facts["metrics"].items())
        _say(f"round {facts['round']:>4}  {told}  {facts['seconds']:.2f} s")


def _say(text: str, style: str = "") -> None:
    _console.print(Text(clean(text), style=style))


def _shown(found: dict[str, Any]) -> Group:
    """A status for people."""
    head = f"run {found['run']} of {found['charter']}  round {found['round']} of {found['rounds']}  {found['phase']}"
    parts: list[Any] = [Text(clean(head), style="bold")]
    if found["why"]:
        parts.append(Text(clean(found["why"]), style="yellow"))
    if found.get("gone"):
        gone = f"the process {found['pid']} is gone since {found['updated']}; go on with: hansa server run --resume"
        parts.append(Text(clean(gone), style="bold red"))
    lives = found["phase"] not in OVER and not found.get("gone")
    table = Table("partner", *(["connected"] if lives else []), "last answer", box=None, pad_edge=False)
    for name, partner in found["partners"].items():
        table.add_row(plain(name), *([plain(_connected(partner))] if lives else []), plain(_answer(partner)))
    parts.append(table)
    parts += [Text(clean(f"{name} {told}"), style="yellow") for name, told in _trouble(found["partners"])]
    if found["metrics"]:
        told = "  ".join(f"{name} {value:.4f}" for name, value in found["metrics"].items())
        parts.append(Text(clean(f"evaluation: {told}")))
    if lives:
        links = [partner["connected"] for partner in found["partners"].values() if partner["connected"]]
        spoken = "; ".join(sorted({f"{link['version']}, {link['tls']}" for link in links})) or "-"
        parts.append(Text(clean(f"at {found['address']}, process {found['pid']}; nodes: {spoken}"), style="dim"))
    return Group(*parts)


def _connected(partner: dict[str, Any]) -> str:
    link = partner["connected"]
    return "no" if link is None else f"{link['since'][:16].replace('T', ' ')} UTC, {link['address']}"


def _answer(partner: dict[str, Any]) -> str:
    answer = partner["answer"]
    if answer is None:
        return "-"
    place = f"round {answer['round']} " if answer["kind"] in ("train", "evaluate") else ""
    return f"{place}{answer['kind']}: {answer['outcome'].partition(':')[0]}"


def _trouble(partners: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Partner and what is wrong there, in words."""
    for name, partner in partners.items():
        if no := partner["refused"]:
            yield name, f"refused: {no['reason']}: {no['detail']}"
        if (answer := partner["answer"]) and answer["outcome"] in ("invalid", "failed"):
            yield name, f"{answer['kind']}: {answer['outcome']}: {answer['detail']}"
        if partner["contradiction"] is not None:
            yield name, f"its ledger of {partner['contradiction']} entries does not extend what it signed before"
        if partner["undelivered"] is not None:
            yield name, f"has not got the model: {partner['undelivered']}"


def _ending(settings: Path, loaded: ServerSettings, outcome: Outcome) -> None:
    """Where the model is, and what everybody does next."""
    from ..common.model import file_sha256

    if outcome.model is None:
        _say(
            "Nothing was trained, and the run is closed. Who refused it is above, or was when it was asked for.",
            "bold red",
        )
        return
    if outcome.why != "completed":
        _say(f"Given up after {len(outcome.history)} rounds.", "bold red")
    model = loaded.model(outcome.run_id)
    _say(f"The run is closed and signed by everyone. The model: {model}", "bold green")
    where = "every other partner has" if outcome.undelivered else "every partner has"
    _say(f"  sha-256 {file_sha256(model)}; {where} the same file in its state/models/{outcome.run_id}")
    for name in outcome.undelivered:
        _say(f"  {name} has not got it yet. Deliver again: hansa server run --run {outcome.run_id} --resume", "yellow")
    _say("Each partner looks at it and uses it: hansa model show MODEL; hansa model predict MODEL data.csv")
    _say(f"For an audit: hansa server export {settings} --out bundle; each partner: hansa node export --out bundle")
