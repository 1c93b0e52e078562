"""`hansa plan`: what a run will cost before any of it is spent, and, with --simulate, what it buys."""

from __future__ import annotations

import csv
import io
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.table import Table

from .accounting import MAX_STEPS, Budget, PrivacyEvent, odometer
from .charter import ADVERSARY
from .claims import Finding, lint_file, refused
from .cli import Format, FormatOption, out, plain, print_findings, progress, show_json
from .config import Federation, load_config
from .errors import ConfigError, LedgerError, Refused, RunFailed, counted
from .identity import canonical, check_writable, strict_json, write_whole
from .ledger import UNDISCLOSED, Entry, owner_line, read_ledger
from .page import down, up
from .plan import (
    Caps,
    budget_of,
    calibrated,
    charged_training,
    evaluations_of,
    event_from,
    events_of,
    largest,
    least_noise,
    plan_of,
    stopped_by,
)

EPSILONS = "0.25,0.5,1,2,4,8"
SIMULATORS = "hansa.simulators"
"""Entry points of what can simulate a plan; this floor imports no higher one, so it looks them up by name."""


class Simulator(Protocol):
    """What the entry point's class makes."""

    def run(
        self, config: Federation, base: Path, epsilons: list[float], rounds: list[int], seeds: int, told: Any
    ) -> dict[str, Any]:
        """The points, from real simulated runs; `told(done, total, what)` is called after each."""

    def draw(self, report: dict[str, Any], to: Path) -> None:
        """Plot the points to a file."""


def commands(app: typer.Typer) -> None:
    """Register `plan`."""
    app.command("plan")(plan)


def plan(
    config: Annotated[Path, typer.Argument(help="the federation's YAML file")],
    ledger: Annotated[
        Path | None,
        typer.Option(help="a partner's ledger: would its budget, after what it spent and holds, pay for this run?"),
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="also the frontier: expected AUC by epsilon, from simulated runs")
    ] = False,
    epsilons: Annotated[str, typer.Option(help="caps to simulate, comma-separated")] = EPSILONS,
    rounds: Annotated[
        str | None, typer.Option(help="numbers of rounds to simulate, comma-separated; default: the configuration's")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="simulated runs a point")] = 5,
    to: Annotated[
        Path | None, typer.Option("--out", help="write the frontier: .png, .svg or .pdf (a plot), .csv (the table)")
    ] = None,
    form: FormatOption = Format.TEXT,
) -> int:
    """Before any training: epsilon by rounds and noise, what the charter would allow, what would be left.

    The noise is what a charter made from the file would fix. Exit 1 when the plan does not fit the budget, or when the file claims what is not differential privacy
    (docs/claims.md). With --simulate also what each epsilon buys, from real runs in this process.

    Example: hansa plan federation.yaml --simulate --out frontier.png
    """
    findings = lint_file(config)
    if refused(findings):
        if form is Format.JSON:
            show_json({"fits": False, "findings": [f.to_fields() for f in findings]})
        else:
            print_findings(config, findings)
        return 1
    try:
        federation = load_config(config)
    except ConfigError:
        if form is Format.TEXT:
            print_findings(config, findings)  # a file of another tool has flags, too
        raise
    points = _options(federation, simulate, ledger, epsilons, rounds, to)
    simulator = _simulator() if simulate else None
    with progress("computing what it costs"):
        report = {**planned(federation, ledger), "findings": [f.to_fields() for f in findings]}
    if form is Format.TEXT:
        _print_plan(report, ledger)
        _print_flags(config, findings)
    if simulator is not None:
        report["frontier"] = _simulated(simulator, federation, config.parent, *points, seeds, form)
        if form is Format.TEXT:
            _print_frontier(report["frontier"])
        if to is not None:
            _write(simulator, report["frontier"], to)
            if form is Format.TEXT:
                out.print(plain(f"written to {to}"))
    if form is Format.JSON:
        show_json(report)
    return 0 if report["fits"] else 1


def _print_flags(config: Path, findings: tuple[Finding, ...]) -> None:
    if findings:
        out.print()
        print_findings(config, findings)


# -- cost ----------------------------------------------------------------------------------------------------------------


def planned(federation: Federation, ledger: Path | None = None) -> dict[str, Any]:
    """The numbers of `hansa plan`: everything per partner, record level, add-or-remove-one, local noise.

    The noise is what a charter made from this configuration fixes, whatever a ledger says: a node is asked for that run, and
    either its budget pays for it or it refuses.

    Args:
        ledger: of a partner: its budget and what was taken from it decide too, as in that partner's gate.

    Raises:
        Refused: no noise is enough for the configuration's own ε.
    """
    a, p = federation.algorithm, federation.privacy
    if p.kind == "none":
        return _unprotected(federation, ledger)
    sigma = calibrated(federation)
    assert sigma is not None
    agreed = budget_of(federation)
    fixed, spent, held = _taken_before(ledger)
    budget, before = fixed or agreed, [*spent, *held]  # the first run that a node accepts fixes its budget
    caps: Caps = {OWN: (agreed, [])} if ledger is None else {OWN: (agreed, []), LEDGER: (budget, before)}
    steps, q = a.local.steps, a.local.sampling_rate

    def asked(rounds: int, noise: float) -> list[PrivacyEvent]:
        terms = federation.with_noise(noise).model_copy(update={"algorithm": a.model_copy(update={"rounds": rounds})})
        return events_of(plan_of(terms))

    def after(rounds: int, noise: float) -> dict[str, Any]:
        history = [*before, *asked(rounds, noise)]
        return {
            "rounds": rounds,
            "noise_multiplier": noise,
            "epsilon_filter": budget.spent(history),
            "epsilon": odometer(history, budget.delta),
            "fits": not stopped_by(caps, asked(rounds, noise)),
        }

    run = asked(a.rounds, sigma)
    whole = [*before, *run]
    stops = stopped_by(caps, run)
    listed = sorted({1, max(1, a.rounds // 4), max(1, a.rounds // 2), a.rounds, 2 * a.rounds})
    most = MAX_STEPS // steps
    rounds_left = 0
    if not stops:
        one = charged_training(federation.with_noise(sigma)).noise_multiplier
        rounds_left = min(f.most_steps(q, one, [*taken, *run]) // steps for f, taken in caps.values())
    enough = _noise_that_fits(caps, federation)
    others: list[dict[str, Any]] = []
    for epsilon in OTHER_CAPS if ledger is None else (0.1, 0.25, *OTHER_CAPS):
        terms = federation.model_copy(
            update={"privacy": p.model_copy(update={"epsilon": epsilon, "noise_multiplier": None})}
        )
        try:
            needed = calibrated(terms)
        except Refused:
            needed = None
        fits = needed is not None and (ledger is None or budget.admits([*before, *asked(a.rounds, needed)]))
        others.append({"epsilon": epsilon, "noise_multiplier": needed, "fits": fits})
    return {
        "privacy": "local", "unit": "record", "adjacency": "add-or-remove-one", "noise": "local",
        "epsilon_cap": budget.epsilon, "delta": budget.delta, "noise_multiplier": sigma, "clip_norm": p.clip_norm,
        "sampling_rate": q, "steps_per_round": steps, "rounds": a.rounds,
        "epsilon_spent_before": budget.spent(spent), "epsilon_held_before": budget.spent(held),
        "epsilon_left_before": max(0.0, budget.epsilon - budget.spent(before)),
        "epsilon_filter": budget.spent(whole), "epsilon": odometer(whole, budget.delta),
        "run": {"epsilon_cap": agreed.epsilon, "delta": agreed.delta, "epsilon_filter": agreed.spent(run),
                "epsilon": odometer(run, agreed.delta)},
        "stops": stops, "fits": not stops,
        "rounds_that_fit": largest(lambda rounds: not stopped_by(caps, asked(rounds, sigma)), min(most, 1_000_000)),
        "rounds_left_after": rounds_left,
        "noise_that_fits": enough,
        "epsilon_of_noise_that_fits": None if enough is None else agreed.spent(asked(a.rounds, enough)),
        "by_rounds": [after(rounds, sigma) for rounds in listed if rounds <= most],
        "by_noise": [after(a.rounds, round(sigma * f, 4)) for f in (0.5, 0.75, 1.0, 1.5, 2.0) if sigma * f >= 0.3],
        "noise_for_other_caps": others,
    }  # fmt: skip


OWN, LEDGER = "the charter's own cap", "the ledger's budget"
OTHER_CAPS = (0.5, 1.0, 2.0, 4.0, 8.0)


def _noise_that_fits(caps: Caps, federation: Federation) -> float | None:
    """The least noise at which all rounds are admitted under every cap; None: no noise is enough."""
    other = evaluations_of(federation)
    try:
        return least_noise(federation, {name: (budget, [*taken, *other]) for name, (budget, taken) in caps.items()})
    except Refused:
        return None


def _unprotected(federation: Federation, ledger: Path | None) -> dict[str, Any]:
    """Training without privacy: no ε. What is protected all the same (private evaluation) a budget that is there must pay."""
    report: dict[str, Any] = {"privacy": "none", "stops": [], "fits": True}
    if ledger is None:
        return report
    try:
        budget, spent, held = _taken_before(ledger)
    except RunFailed:  # it is unbounded already
        return report
    asked = evaluations_of(federation)
    stops = [] if budget is None else stopped_by({LEDGER: (budget, [*spent, *held])}, asked)
    return {**report, "stops": stops, "fits": not stops}


def _taken_before(ledger: Path | None) -> tuple[Budget | None, list[PrivacyEvent], list[PrivacyEvent]]:
    """The budget of a ledger's data sets (None: not fixed yet), what they spent, and what their open runs may still spend."""
    if ledger is None:
        return None, [], []
    entries, torn = read_ledger(ledger)
    if torn or not entries:
        what = f"torn last line ({len(torn)} bytes)" if torn else "empty"
        raise LedgerError(f"{ledger}: {what}", "Its node repairs it when it next starts; or give a whole copy.")
    if entries[0].body.get("role") != "partner":
        raise LedgerError(f"{ledger}: not a partner's ledger: {owner_line(entries[0])}", "Give a partner's ledger.")
    try:
        return _taken(ledger, entries)
    except (KeyError, TypeError, AttributeError, ValueError) as err:
        raise LedgerError(
            f"{ledger}: its entries are not what a node of Hansa writes", "Give a node's ledger."
        ) from err


def _taken(ledger: Path, entries: list[Entry]) -> tuple[Budget | None, list[PrivacyEvent], list[PrivacyEvent]]:
    if any(entry.type == UNDISCLOSED for entry in entries):  # what they spent would be missing here
        raise LedgerError(f"{ledger}: some of its entries are not disclosed", "Give the ledger at its own node.")
    if len({entry.body["lineage"] for entry in entries if entry.type == "dataset" and "lineage" in entry.body}) > 1:
        raise LedgerError(
            f"{ledger}: it has several budgets, one for each lineage of datasets",
            "Ask at its node: hansa node budget --plan CONFIG",
        )
    budget: Budget | None = None
    spent: list[PrivacyEvent] = []
    # (charter, run) -> (purpose, event) -> how many, as in the node's gate: two coordinators may use one name.
    left: dict[tuple[str | None, str], Counter[tuple[str, bytes]]] = {}
    expires: dict[str | None, datetime] = {}
    for entry in entries:
        body = entry.body
        match entry.type:
            case "budget":
                budget = Budget.from_fields(body["budget"])
            case "hold":
                left[entry.charter, body["run_id"]] = Counter()
                for item in body["plan"]:
                    left[entry.charter, body["run_id"]][item["purpose"], canonical(item["event"])] += item["count"]
            case "debit":
                event = event_from(body["event"])
                if event is None:
                    raise RunFailed(
                        f"{ledger}: an unprotected run made this budget unbounded", "No finite epsilon holds for it."
                    )
                spent.append(event)
                if (entry.charter, body["run_id"]) in left:
                    left[entry.charter, body["run_id"]][body["purpose"], canonical(body["event"])] -= 1
            case "release":
                left.pop((entry.charter, body["run_id"]), None)
            case "charter":
                expires[entry.charter] = datetime.fromisoformat(body["expires"])
            case known if known in _SPENDS_NOTHING:
                pass
            case unknown:
                raise LedgerError(
                    f"{ledger}: entry {entry.seq} is of the type {unknown!r}, which this version does not know",
                    "Install the version of hansa that wrote it: what it spent must be counted.",
                )
    # As a node's gate, which frees them before it admits anything: nothing can be debited under a charter that has expired.
    now = datetime.now(UTC)
    held_by = [run for (charter, _), run in left.items() if charter not in expires or now < expires[charter]]
    kinds = [(event_from(strict_json(fields)), n) for run in held_by for (_, fields), n in run.items()]
    held = [PrivacyEvent(e.sampling_rate, e.noise_multiplier, e.steps * n) for e, n in kinds if e is not None and n > 0]
    return budget, spent, held


_SPENDS_NOTHING = {"genesis", "dataset", "commit", "public", "refuse", "recovered", "restored"}


def _print_plan(report: dict[str, Any], ledger: Path | None) -> None:
    if report["privacy"] == "none":
        out.print(
            "privacy: none. Updates leave unprotected; epsilon is unbounded, for every partner, from the first round on."
        )
        if ledger is not None:
            out.print(
                plain(
                    f"The budget in {ledger}: its first unprotected round would leave it without any bound, for good."
                )
            )
            out.print(
                "  Whether the site allows that is not in a ledger; at the node, ask: hansa node budget --plan CONFIG"
            )
        if report["stops"]:
            out.print(
                "  [red]does not fit[/]: what is left in the ledger's budget does not pay for the private evaluation"
            )
        return
    run = report["run"]
    out.print(
        f"Each partner, record level, add-or-remove-one, local noise, delta {run['delta']:g}, against {ADVERSARY}:\n"
        f"  {counted(report['rounds'], 'round')} x {counted(report['steps_per_round'], 'step')}, sampling rate {report['sampling_rate']:g}, "
        f"noise multiplier {report['noise_multiplier']:g}, clipping norm {report['clip_norm']:g}\n"
        f"  epsilon {up(run['epsilon_filter'])} by the filter that enforces the cap, {up(run['epsilon'])} by the odometer (tight); "
        f"cap {run['epsilon_cap']:g}"
    )
    if ledger is not None:
        _print_before(report, ledger)
    _print_verdict(report, ledger)
    for title, rows in (("epsilon by rounds", report["by_rounds"]), ("epsilon by noise", report["by_noise"])):
        table = _table(title + _WITH_LEDGER * (ledger is not None), "rounds", "noise multiplier", "epsilon (filter)",
                       "epsilon (odometer)", "")  # fmt: skip
        for row in rows:
            table.add_row(
                str(row["rounds"]),
                f"{row['noise_multiplier']:g}",
                f"{up(row['epsilon_filter'])}",
                f"{up(row['epsilon'])}",
                _fits(row["fits"]),
            )
        out.print(table)
    table = _table("the same rounds under other caps" + _WITH_LEDGER * (ledger is not None), "cap", "noise multiplier needed",
                   *[""] * (ledger is not None))  # fmt: skip
    for row in report["noise_for_other_caps"]:
        needed = row["noise_multiplier"]
        cells = [f"{row['epsilon']:g}", "no noise is enough" if needed is None else f"{needed:g}"]
        table.add_row(*cells, *[_fits(row["fits"])] * (ledger is not None))
    out.print(table)


_WITH_LEDGER = ", with what the ledger has spent and holds"


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, box=None, title_justify="left", pad_edge=False)


def _all(rounds: int) -> str:
    return "The one round fits" if rounds == 1 else f"All {rounds} rounds fit"


def _fits(fits: bool) -> str:
    return "fits" if fits else "[red]refused[/]"


def _print_before(report: dict[str, Any], ledger: Path) -> None:
    out.print(
        plain(f"The budget in {ledger}: cap {report['epsilon_cap']:g}, delta {report['delta']:g}; by its filter:")
    )
    out.print(f"  {up(report['epsilon_spent_before'])} was spent before this run")
    if report["epsilon_held_before"]:
        out.print(f"  {up(report['epsilon_held_before'])} is held by open runs (counted by itself)")
    out.print(
        f"  {down(report['epsilon_left_before'])} is left\n"
        f"  {up(report['epsilon_filter'])} with this run ({up(report['epsilon'])} by the odometer)"
    )


def _print_verdict(report: dict[str, Any], ledger: Path | None) -> None:
    rounds, noise = report["rounds_that_fit"], report["noise_that_fits"]
    if report["fits"]:
        out.print(f"  [green]fits[/]; {counted(report['rounds_left_after'], 'more such round')} would fit afterwards")
    elif LEDGER not in report["stops"]:
        out.print(
            f"  [red]does not fit[/]: {counted(rounds, 'such round')} fit. Fewer rounds, more noise, or a larger cap."
        )
    else:
        out.print(
            "  [red]does not fit[/]: the node with this ledger would refuse it, and no charter changes its budget."
        )
        out.print(f"  What fits: {counted(rounds, 'such round')}.")
        if noise is None:
            out.print(f"  {_all(report['rounds'])} at no noise multiplier.")
        else:
            out.print(
                f"  {_all(report['rounds'])} from noise multiplier {noise:g} on "
                f"(epsilon {up(report['epsilon_of_noise_that_fits'])} by itself)."
            )
    if ledger is not None:
        out.print("  The site's own rules are not in a ledger; at the node, ask: hansa node budget --plan CONFIG")


# -- frontier ------------------------------------------------------------------------------------------------------------


def _options(
    federation: Federation, simulate: bool, ledger: Path | None, epsilons: str, rounds: str | None, to: Path | None
) -> tuple[list[float], list[int]]:
    """The caps and numbers of rounds to simulate, checked before anything is computed."""
    if not simulate:
        if to is not None or rounds is not None or epsilons != EPSILONS:
            raise ConfigError("--out, --epsilons and --rounds are about the frontier", "Add --simulate.")
        return [], []
    if ledger is not None:
        raise ConfigError(
            "--simulate starts from an unspent budget; --ledger counts a spent one", "Run them one after the other."
        )
    if federation.privacy.kind == "none":
        raise ConfigError("privacy: none has no frontier: epsilon is unbounded", "Give privacy kind local.")
    if to is not None and to.suffix.lower() not in (*_PLOTS, ".csv"):
        raise ConfigError(f"{to}: written are {', '.join(_PLOTS)} and .csv", "Give --out such an ending.")
    if to is not None and not to.parent.is_dir():
        raise ConfigError(f"{to.parent}: no such folder", "Make it, or give another --out.")
    if to is not None:
        check_writable(to)  # now, and not when minutes of simulation are done
    caps = sorted({_listed(text, "--epsilons", float) for text in epsilons.split(",")})
    if any(not 0 < cap <= 100 for cap in caps):
        raise ConfigError(f"--epsilons {epsilons}: each is above 0 and at most 100", f"The default is {EPSILONS}.")
    counts = sorted({_listed(text, "--rounds", int) for text in rounds.split(",")}) if rounds else []
    if any(not 1 <= count <= 1_000_000 for count in counts):
        raise ConfigError(f"--rounds {rounds}: each is a whole number from 1", "For example: --rounds 5,10,20")
    return caps, counts or [federation.algorithm.rounds]


_PLOTS = (".png", ".svg", ".pdf")


def _listed(text: str, option: str, kind: Any) -> Any:
    try:
        return kind(text.strip())
    except ValueError:
        raise ConfigError(f"{option}: {text.strip()!r} is no number", "Give numbers with commas: 0.5,1,2") from None


def _simulator() -> Simulator:
    for entry in entry_points(group=SIMULATORS):
        made: Simulator = entry.load()()  # torch is imported here, and only here
        return made
    raise ConfigError("no simulator is installed", "Install Hansa whole: pip install 'hansa[train]'")


def _simulated(
    simulator: Simulator,
    federation: Federation,
    base: Path,
    epsilons: list[float],
    rounds: list[int],
    seeds: int,
    form: Format,
) -> dict[str, Any]:
    console = Console(stderr=True, highlight=False)
    if form is Format.TEXT and not console.is_terminal:
        console.print(f"simulating {len(epsilons) * len(rounds)} points x {seeds} seeds ...")
    with progress("simulating") as told:
        return simulator.run(federation, base, epsilons, rounds, seeds, told)


def _print_frontier(found: dict[str, Any]) -> None:
    out.print(
        f"\nWhat each epsilon buys. Record level, add-or-remove-one, local noise, delta {found['delta']:g}; adversary: {ADVERSARY}.\n"
        f"  {found['metric'].upper()} of simulated runs: mean ± standard deviation over {counted(found['seeds'], 'seed')}, each with a split, an "
        f"initial model and noise of its own;\n  {found['measured_on']}. Cap, filter and odometer are epsilons; noise is the noise multiplier, which the filter calibrates for the cap. A "
        "simulation is on the data of this configuration, and no promise for others."
    )
    if found["seeds"] < 5:
        out.print("[yellow]  fewer than 5 seeds: the standard deviation itself is a rough guess[/]")
    table = Table(box=None, pad_edge=False)
    for title in ("", "cap", "filter", "odometer", "rounds", "noise", found["metric"].upper(), "runs"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for point in found["points"]:
        costs = ["-", "-"]
        if not point["refused"]:
            costs = [f"{up(point['epsilon_filter'])}", f"{up(point['epsilon_odometer'])}"]
        table.add_row(
            "federated",
            f"{point['epsilon_cap']:g}",
            *costs,
            str(point["rounds"]),
            "-" if point["refused"] else f"{point['noise_multiplier']:g}",
            f"[red]{plain(point['refused'])}[/]" if point["refused"] else _pm(point),
            str(point["n"]),
        )
    for name, spread in found["without_privacy"].items():
        told = (
            plain(name.split(",")[0].removeprefix("all data ")),
            "none",
            "-",
            "-",
            str(spread["rounds"]),
            "0",
            _pm(spread),
            str(spread["n"]),
        )
        table.add_row(*told)
    out.print(table)


def _pm(spread: dict[str, Any]) -> str:
    if spread["mean"] is None:
        return "not measured"
    return f"{spread['mean']:.4f}" + (f" ± {spread['sd']:.4f}" if spread["sd"] is not None else "")


_COLUMNS = (
    "setting", "epsilon_cap", "epsilon_filter", "epsilon_odometer", "delta", "unit", "adjacency", "noise_placement", "adversary", "rounds",
    "noise_multiplier", "metric", "mean", "sd", "n", "refused",
)  # fmt: skip


def _write(simulator: Simulator, found: dict[str, Any], to: Path) -> None:
    if to.suffix.lower() != ".csv":
        simulator.draw(found, to)
        return
    stated = {k: found[k] for k in ("delta", "unit", "adjacency", "noise_placement", "adversary", "metric")}
    rows = [{"setting": "federated", **stated, **point} for point in found["points"]]
    for name, spread in found["without_privacy"].items():
        bare = {"epsilon_cap": "inf", "noise_multiplier": 0, "noise_placement": "none", "metric": found["metric"]}
        rows.append({"setting": name, **bare, **spread})
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(to, text.getvalue().encode())
