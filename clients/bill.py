"""`hansa node budget`: what each lineage of data sets has spent, holds and has left, as this node's own ledger has it.

Every ε is of one record of this partner, add or remove one, at a stated δ, against a stated adversary: everyone else where all noise was
local. The *filter* decides; the *odometer* is the tight figure beside it and decides nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..common.accounting import Budget, PrivacyEvent, odometer
from ..common.charter import Charter, SignedCharter, adversary
from ..common.config import load_config
from ..common.errors import ConfigError, LedgerError, Refusal, counted
from ..common.home import Home
from ..common.identity import real
from ..common.ledger import Entry, read_ledger
from ..common.plan import PlanItem, Terms, budget_of, calibrated, events_of, largest, plan_of, stopped_by
from .law import Control
from .registrations import Listed, fitting, registered_at, serving
from .settings import NodeSettings
from .standing import Account, Standing

POINTS = 120
"""Points of a history, at most: one is a filter's work over all events before it."""
ODOMETERS = 12
"""Of these, how many have the tight figure as well."""
_MANY = 1_000_000
_MOST_STEPS = 10**9


@dataclass(frozen=True)
class Books:
    """All that a report is made from. Takes no lock; the node may be running."""

    settings: NodeSettings
    partner: str
    entries: Sequence[Entry]
    standing: Standing
    charters: Mapping[str, Charter]
    known: list[Listed]
    control: Control

    @classmethod
    def read(cls, settings: NodeSettings) -> Books:
        """Replay the ledger, and read what node.yaml lists.

        Raises:
            LedgerError: there is no ledger yet, or it does not verify.
        """
        home = Home(settings.home)
        if not settings.ledger.exists():
            raise LedgerError(f"{settings.ledger}: no such file", "The node makes it when it first starts.")
        entries, _ = read_ledger(settings.ledger, home.key())
        listed = [SignedCharter.load(entry.charter) for entry in settings.federations]
        return cls(
            settings,
            home.name(),
            entries,
            Standing(entries),
            {signed.sha256: signed.charter for signed in listed},
            registered_at(settings.state),
            Control(settings.control),
        )

    def account(self, lineage: str) -> Account:
        """Of a lineage; an empty one where the ledger has none yet."""
        return self.standing.accounts.get(lineage) or Account()

    def taken(self, lineage: str, charter_sha256: str | None = None) -> list[PrivacyEvent]:
        """Spent and held, as the gate would count it now."""
        if lineage not in self.standing.accounts:
            return []
        held = self.standing.held(lineage, charter_sha256, at=datetime.now(UTC))
        return [*self.standing.spent(lineage, charter_sha256), *held]


def budget_report(settings: NodeSettings, plan: Path | None = None) -> dict[str, Any]:
    """Spent, held and left of every lineage, over time and by charter; every run; refusals by reason.

    Args:
        plan: a charter or configuration: what one more run would cost, and how many fit.

    Raises:
        LedgerError: there is no ledger yet, or it does not verify.
        ConfigError: `plan` is neither.
    """
    books = Books.read(settings)
    standing, control = books.standing, books.control
    refused = [body for _, body in standing.refused.values()]
    waiting = {
        body["run_id"]
        for body in refused
        if body["reason"] == Refusal.NOT_APPROVED.value
        and body["round"] is None
        and not any(control.approved(body["run_id"], sha) for sha in books.charters)
    }
    return {
        "partner": books.partner,
        "unit": "record",
        "adjacency": "add-or-remove-one",
        **_against(account.colluding for account in standing.accounts.values()),
        "restored_not_proved": control.restored.exists(),
        "paused": control.paused(),
        "lineages": [_lineage(books, lineage) for lineage in standing.accounts],
        "plan": None if plan is None else plan_report(books, plan),
        "runs": [
            {
                "run": hold.run_id,
                "charter": standing.charters[hold.charter_sha256][0],
                "charter_sha256": hold.charter_sha256,
                "lineage": hold.lineage,
                "state": hold.ended or "open",
                "rounds": len({number for purpose, number, _ in hold.rounds if purpose == "train"}),
            }
            for hold in standing.holds.values()
        ],
        "refusals": dict(Counter(body["reason"] for body in refused)),
        "waiting_for_approval": sorted(waiting - {run for _, run in standing.holds}) if settings.site.approval else [],
    }


def _against(colluding: Iterable[int | None]) -> dict[str, str]:
    """Where the noise is, and against whom figures over all of it hold: where some was shared, no more than its adversary.

    Args:
        colluding: t of shared noise, None of local noise.
    """
    weakest = min((t for t in colluding if t is not None), default=None)
    return {"noise": "local" if weakest is None else "shared", "adversary": adversary(weakest)}


def _lineage(books: Books, lineage: str) -> dict[str, Any]:
    """One budget: over everything, over time, and for each charter what it took, its own cap and the site's."""
    standing, account, cap = books.standing, books.standing.accounts[lineage], books.settings.site.epsilon_cap
    names = {one.dataset.dataset_id: one.name for one in books.known}
    agreed = []
    for sha in _concerned(books, lineage):
        name, expires = standing.charters[sha]
        charter = books.charters.get(sha)
        privacy = None if charter is None else charter.privacy
        one: dict[str, Any] = {"charter": name, "sha256": sha, "expires": f"{expires:%Y-%m-%dT%H:%M:%SZ}"}
        one |= {"withdrawn": books.control.withdrawn(sha), "share": None, "own": None, "site": None}
        if account.budget is not None:
            one["share"] = standing.epsilons(lineage, account.budget, sha)
        if charter is not None and privacy is not None and privacy.epsilon is not None and privacy.delta is not None:
            one["own"] = standing.epsilons(lineage, budget_of(charter), sha)
            one["site"] = None if cap is None else standing.epsilons(lineage, Budget.create(cap, privacy.delta))
        agreed.append(one)
    return {
        "lineage": lineage,
        "datasets": [
            {
                "dataset": dataset,
                "name": names.get(dataset),
                "task": standing.registered[dataset]["task"],
                "declared": standing.registered[dataset]["declared"],
            }
            for dataset, of in standing.datasets.items()
            if of == lineage
        ],
        "unbounded": account.unbounded,
        "budget": None if account.budget is None else standing.epsilons(lineage, account.budget),
        "charters": agreed,
        "history": [] if account.budget is None else history(books.entries, lineage, account.budget),
    }


def _concerned(books: Books, lineage: str) -> list[str]:
    """The charters that held something of this lineage, or would be served from it."""
    found = []
    entries = {SignedCharter.load(entry.charter).sha256: entry for entry in books.settings.federations}
    for sha in books.standing.charters:
        touched = any(h.charter_sha256 == sha and h.lineage == lineage for h in books.standing.holds.values())
        if not touched and sha in books.charters:
            fits = fitting(books.known, books.charters[sha].task.name)
            named = entries[sha].dataset
            served = fits if named is None else [serving(books.known, books.charters[sha].task.name, named)]
            touched = [one.dataset.lineage for one in served] == [lineage]
        if touched:
            found.append(sha)
    return found


# -- over time -----------------------------------------------------------------------------------------------------------


def history(entries: Sequence[Entry], lineage: str, budget: Budget) -> list[dict[str, Any]]:
    """What was spent and held of one lineage after its holds, debits and releases; of many, some, evenly, and the last.

    The odometer is told at the ends of runs, of many at some, and at the last point; None elsewhere.
    """
    moves = [e for e in entries if e.privacy and e.privacy["lineage"] == lineage and _moves(e)]
    shown = _some(moves, POINTS)
    ends = _some([e for e in shown if e.type == "release"], ODOMETERS - 1) + shown[-1:]
    wanted, tight = {e.seq for e in shown}, {e.seq for e in ends}
    standing, points = Standing(), []
    for entry in entries:
        standing.apply(entry)
        if entry.seq not in wanted:
            continue
        spent = standing.spent(lineage)
        points.append(
            {
                "time": entry.time,
                "what": entry.type,
                "run": entry.body["run_id"],
                "charter": entry.charter,
                "spent_filter": budget.spent(spent),
                "spent_odometer": odometer(spent, budget.delta) if entry.seq in tight else None,
                "with_held_filter": budget.spent([*spent, *standing.held(lineage)]),
            }
        )
    return points


def _moves(entry: Entry) -> bool:
    return entry.type in ("hold", "debit", "release")


def _some(entries: list[Entry], most: int) -> list[Entry]:
    if len(entries) <= most:
        return entries
    return [entries[round(n * (len(entries) - 1) / (most - 1))] for n in range(most)]


# -- what a run would cost -----------------------------------------------------------------------------------------------


def plan_report(books: Books, path: Path) -> dict[str, Any]:
    """What one more run would cost every lineage that could serve it, and how many such runs fit.

    Three caps hold: the lineage's own over everything, the charter's over what is spent under it, and the site's.

    Raises:
        ConfigError, CharterError: not a charter and not a configuration.
    """
    sha, name, task, terms, plan = _planned(path)
    events = events_of(plan)
    protected = terms.privacy.kind != "none"
    named = next((e.dataset for e in books.settings.federations if SignedCharter.load(e.charter).sha256 == sha), None)
    served = fitting(books.known, task) if named is None else [serving(books.known, task, named)]
    if not served:
        raise ConfigError(f"{path}: no data is registered for its task, {task}", "See: hansa node dataset list")
    return {
        "file": str(path),
        "name": name,
        "sha256": sha,
        "task": task,
        "protected": protected,
        "plan": [item.to_fields() for item in plan],
        "lineages": [
            {
                "lineage": one.dataset.lineage,
                "data": one.name,
                **_cost(books, one.dataset.lineage, sha, terms, events),
            }
            for one in served
        ],
    }


def _planned(path: Path) -> tuple[str | None, str, str, Terms, tuple[PlanItem, ...]]:
    try:
        head = path.read_bytes()[:1_000_000]
    except OSError as err:
        raise ConfigError(f"{path}: {err.strerror}", "Give a charter.json or a configuration.") from err
    if b'"payloadType"' in head:
        signed = SignedCharter.load(path)
        agreed = signed.charter
        return signed.sha256, agreed.name, agreed.task.name, agreed, plan_of(agreed)
    config = load_config(path)
    if config.secure_aggregation is not None:
        from ..common.tasks import sized  # imports torch, which other plans do without

        config = sized(config)
    config = config.with_noise(calibrated(config))
    return None, config.name, config.task, config, plan_of(config)


def _cost(books: Books, lineage: str, sha: str | None, terms: Terms, events: list[PrivacyEvent]) -> dict[str, Any]:
    account, site = books.account(lineage), books.settings.site
    if terms.privacy.kind == "none":
        stops = [] if site.allow_unprotected else ["the site: no training without privacy"]
        return {"before": None, "after": None, "stops": stops, "fits": None if not stops else 0}
    agreed, secure = budget_of(terms), terms.secure_aggregation
    shared = secure.colluding if secure is not None and terms.privacy.kind == "shared" else None
    own = agreed if account.budget is None else account.budget
    taken = books.taken(lineage)
    caps: dict[str, tuple[Budget, list[PrivacyEvent]]] = {
        "the lineage's budget": (own, taken),
        "the charter's own cap": (agreed, [] if sha is None else books.taken(lineage, sha)),
    }
    if site.epsilon_cap is not None:
        caps["the site's cap"] = (Budget.create(site.epsilon_cap, agreed.delta), taken)
    stops = stopped_by(caps, events)
    stops += ["an unprotected run made it unbounded"] if account.unbounded else []
    stops += ["restored from a backup, spending not proved"] if books.control.restored.exists() else []

    def admitted(count: int) -> bool:
        more = [PrivacyEvent(e.sampling_rate, e.noise_multiplier, e.steps * count) for e in events]
        return not stopped_by(caps, more)

    most = min([_MANY, *(_MOST_STEPS // e.steps for e in events)])
    return {
        "epsilon_cap": own.epsilon,
        "delta": own.delta,
        "before": _figures(own, taken),
        "after": _figures(own, [*taken, *events]),
        **_against([account.colluding, shared]),
        "stops": stops,
        "fits": 0 if stops else largest(admitted, most),
    }


def _figures(budget: Budget, events: list[PrivacyEvent]) -> dict[str, float]:
    return {"filter": budget.spent(events), "odometer": odometer(events, budget.delta)}


def noise_of(item: Mapping[str, Any]) -> str:
    """An item of a plan in words."""
    event = item["event"]
    if "sigma" not in event:
        return f"{item['count']} x {item['purpose']}, without protection"
    shared = f" (in the sum over {event['quorum']} partners or more)" if "quorum" in event else ""
    return (
        f"{item['count']} x {item['purpose']}: {counted(event['steps'], 'step')}, noise multiplier {real(float(event['sigma']))}{shared}, "
        f"sampling rate {real(float(event['q']))}"
    )
