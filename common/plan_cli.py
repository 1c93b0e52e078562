"""`hansa plan`: what a run will cost before any of it is spent, and, with --simulate, what it buys."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .accounting import MAX_STEPS, Budget, PrivacyEvent, odometer
from .charter import adversary_of
from .claims import Finding, lint_file, refused
from .cli import Format, FormatOption, out, plain, print_findings, progress, show_json
from .config import Federation, load_config
from .errors import ConfigError, LedgerError, Refused, RunFailed, counted
from .frontier_cli import EPSILONS, check_options, find_simulator, print_frontier, simulated, spread_of, write_frontier
from .identity import canonical, strict_json
from .ledger import UNDISCLOSED, Entry, owner_line, read_ledger
from .page import down, up
from .placements import compared, secure_figures
from .plan import (
    Caps,
    attempts,
    budget_of,
    calibrated,
    charged_training,
    evaluations_of,
    event_from,
    events_of,
    largest,
    least_noise,
    plan_of,
    sampled,
    stopped_by,
    training_of,
)


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
    (docs/claims.md). With secure_aggregation also what that comes to, and shared noise beside local noise at the same epsilon.
    With --simulate also what each epsilon buys, from real runs in this process.

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
    points = check_options(federation, simulate, ledger, epsilons, rounds, to)
    _check_model(federation.task)
    if federation.secure_aggregation is not None:
        from .tasks import sized  # imports torch, which other plans do without

        federation = sized(federation)
    made = find_simulator() if simulate else None
    with progress("computing what it costs"):
        report = {**planned(federation, ledger), "findings": [f.to_fields() for f in findings]}
    if form is Format.TEXT:
        _print_plan(report, ledger)
        _print_secure(report)
        if made is None:
            _print_placements(report)
        _print_flags(config, findings)
    if made is not None:
        report["frontier"] = simulated(made, federation, config.parent, *points, seeds, form)
        _add_scores(report)
        if form is Format.TEXT:
            print_frontier(report["frontier"])
            _print_placements(report)
        if to is not None:
            write_frontier(made, report["frontier"], to)
            if form is Format.TEXT:
                out.print(plain(f"written to {to}"))
    if form is Format.JSON:
        show_json(report)
    return 0 if report["fits"] else 1


def _check_model(name: str) -> None:
    """A task of one's own must be one that can be trained. Ours are, and importing torch for that takes seconds.

    Raises:
        TaskError: as `tasks.load_task` and `tasks.check_model`.
    """
    if any(entry.module.startswith(f"{__package__}.tasks.") for entry in entry_points(group="hansa.tasks", name=name)):
        return
    with suppress(ModuleNotFoundError):  # an install that does not train can plan all the same
        from .tasks import check_model, load_task

        check_model(load_task(name))


def _print_flags(config: Path, findings: tuple[Finding, ...]) -> None:
    if findings:
        out.print()
        print_findings(config, findings)


# -- cost ----------------------------------------------------------------------------------------------------------------


def planned(federation: Federation, ledger: Path | None = None) -> dict[str, Any]:
    """The numbers of `hansa plan`: everything per partner (or client), at the configuration's unit, add-or-remove-one.

    The noise is what a charter made from this configuration fixes, whatever a ledger says: a node is asked for that run, and
    either its budget pays for it or it refuses.

    Args:
        federation: with secure_aggregation, sized (`tasks.sized`).
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
    q, steps = sampled(federation)

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
    most = MAX_STEPS // steps - (attempts(federation) - a.rounds)
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
        "privacy": p.kind, "unit": p.unit, "adjacency": "add-or-remove-one", "noise": p.kind,
        "adversary": adversary_of(federation),
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
        "by_noise": [after(a.rounds, n) for f in (0.5, 0.75, 1.0, 1.5, 2.0) if _can_be(federation, n := round(sigma * f, 4))],
        "noise_for_other_caps": others,
        "secure_aggregation": secure_figures(federation.with_noise(sigma)), "placements": compared(federation),
    }  # fmt: skip


OWN, LEDGER = "the charter's own cap", "the ledger's budget"
OTHER_CAPS = (0.5, 1.0, 2.0, 4.0, 8.0)


def _can_be(federation: Federation, noise: float) -> bool:
    """Whether a round can have so little noise."""
    try:
        training_of(federation.with_noise(noise))
    except Refused:
        return False
    return True


def _noise_that_fits(caps: Caps, federation: Federation) -> float | None:
    """The least noise at which all rounds are admitted under every cap; None: no noise is enough."""
    other = evaluations_of(federation)
    try:
        return least_noise(federation, {name: (budget, [*taken, *other]) for name, (budget, taken) in caps.items()})
    except Refused:
        return None


def _unprotected(federation: Federation, ledger: Path | None) -> dict[str, Any]:
    """Training without privacy: no ε. What is protected all the same (private evaluation) a budget that is there must pay."""
    report: dict[str, Any] = {"privacy": "none", "secure_aggregation": secure_figures(federation), "placements": None}
    report |= {"stops": [], "fits": True}
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


_SPENDS_NOTHING = {"genesis", "dataset", "commit", "survivors", "public", "refuse", "recovered", "restored"}


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
        f"Each {_WHO[report['unit']]}, {report['unit']} level, add-or-remove-one, {report['noise']} noise, delta {run['delta']:g},\n"
        f"  against {report['adversary']}:\n"
        f"  {counted(report['rounds'], 'round')} x {counted(report['steps_per_round'], 'step')}, sampling rate {report['sampling_rate']:g}, "
        f"noise multiplier {report['noise_multiplier']:g}, clipping norm {report['clip_norm']:g}\n"
        f"  epsilon {up(run['epsilon_filter'])} by the filter that enforces the cap, {up(run['epsilon'])} by the odometer (tight); "
        f"cap {run['epsilon_cap']:g}"
    )
    if ledger is not None:
        _print_before(report, ledger)
    _print_verdict(report, ledger)
    for title, rows in (
        (f"epsilon by rounds{_retried(report)}", report["by_rounds"]),
        ("epsilon by noise", report["by_noise"]),
    ):
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


def _print_secure(report: dict[str, Any]) -> None:
    s = report["secure_aggregation"]
    if s is None:
        return
    wrap = "no sum can wrap"
    if s["log2_wrap"] is not None:
        wrap = f"the probability that a sum of the run wraps is at most 2^{max(-1000, math.ceil(s['log2_wrap']))}"
    colluding = "no partner works" if s["colluding"] == 0 else f"at most {s['colluding']} work"
    again = "no round may be asked again (retries: 0)"
    if s["retries"]:
        again = f"{counted(s['retries'], 'round')} of the run may be asked again (retries)"
        if report["privacy"] != "none":
            again += f"; each is paid for: the noise is calibrated for {s['rounds_paid_for']}"
    ring = "; the clients' sizes decide on the ring"
    if s["ring_bits"] is not None:
        ring = f" in a ring of {s['ring_bits']} bits: {s['vector_bytes']:,} bytes; {wrap}"
    out.print(
        f"\nSecure aggregation of {s['partners']} partners: of what is trained the coordinator learns sums over {s['quorum']} or more "
        f"(quorum N_min = {s['quorum']}) and nothing else,\n  while {colluding} with it (t = {s['colluding']}); {s['threshold']} partners' "
        f"shares open a sum (threshold T = {s['threshold']}, 2T - n > t)\n"
        f"  a masked vector has {counted(s['dimension'], 'value')} in steps of 2^{math.log2(s['grid']):g}{ring}\n  {again}"
    )


def _print_placements(report: dict[str, Any]) -> None:
    both = report["placements"]
    if both is None:
        return
    scored = "frontier" in report
    title = (
        f"\nboth placements of the noise, calibrated for the cap {report['run']['epsilon_cap']:g} (delta {report['run']['delta']:g}, record level, "
        f"add-or-remove-one), {counted(report['rounds'], 'round')} x {counted(report['steps_per_round'], 'step')}:"
    )
    table = Table(box=None, pad_edge=False)
    score = [report["frontier"]["metric"].upper()] if scored else []
    for column in ("noise", "epsilon (filter)", "multiplier", "sd on the sum", "factor", *score):
        table.add_column(column, justify="left" if column == "noise" else "right", no_wrap=True)
    for row in both["rows"]:
        cells = [row["noise"], "no noise is enough", "-", "-", "-"]
        if row["noise_multiplier"] is not None:
            figures = (f"{row['noise_multiplier']:g}", f"{row['std_of_sum']:.4g}", f"{row['noise_factor']:.3g}")
            cells = [row["noise"], up(row["epsilon_filter"]), *figures]
        shown = [] if not scored else ["not simulated" if row["score"] is None else spread_of(row["score"])]
        table.add_row(*cells, *shown)
    out.print(title)
    out.print(table)
    for kind, why in both["missing"].items():
        out.print(plain(f"no {kind} noise: {why}"))
    secure = report["secure_aggregation"]
    partners, asked = secure["partners"], secure["asked"]
    who, n = (f"all {partners}", "n") if asked == partners else (f"the {asked} of {partners}", str(asked))
    theirs, in_a_round = ("", "") if asked == partners else ("their ", " asked in a round")
    out.print(
        f"sd on the sum: of the noise in one step of {who} partners{in_a_round}, in clipping norms. factor: how "
        f"many times that of all {theirs}data pooled in one place;\n  shared sqrt({n} / (N_min - t)), local sqrt({n})."
    )
    for row in both["rows"]:
        out.print(f"{row['noise']} noise: against {row['adversary']}")


def _add_scores(report: dict[str, Any]) -> None:
    """Beside each placement what it came to in the simulated runs of the configuration's own cap and rounds, if there were any."""
    here = (report["run"]["epsilon_cap"], report["rounds"])
    points = {p["noise_placement"]: p for p in report["frontier"]["points"] if (p["epsilon_cap"], p["rounds"]) == here}
    for row in (report["placements"] or {"rows": []})["rows"]:
        point = points.get(row["noise"])
        row["score"] = None if point is None else {key: point[key] for key in ("mean", "sd", "n")}


def _retried(report: dict[str, Any]) -> str:
    secure = report["secure_aggregation"]
    return (
        f", each with {counted(secure['retries'], 'retry', 'retries')}"
        if secure is not None and secure["retries"]
        else ""
    )


_WHO = {"record": "partner", "client": "client"}
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
