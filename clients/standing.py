"""What the entries of one partner's ledger come to: data sets, budgets, holds, exchanges, spending. State only; `gate` decides.

Whoever reads a ledger without writing it (`hansa node budget`, a restore) replays it by the same rules as the gate. An entry of a
type that is not known here stops the node: it may have spent something.

A *lineage* is what has one budget: a data set, its later versions, and whatever its owner declared to overlap with it. Runs and
requests are known by charter and name: no coordinator can take the names of another's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..common.accounting import Budget, PrivacyEvent, odometer
from ..common.errors import LedgerError
from ..common.identity import canonical, strict_json
from ..common.ledger import Entry
from ..common.plan import event_from
from ..common.shared_noise import MECHANISM as SHARED

SPENDS_NOTHING = frozenset({"genesis", "charter", "refuse", "recovered", "restored", "dataset"})
"""Types of entries that neither hold, debit nor release anything."""


@dataclass
class Hold:
    """What one run may still spend here.

    Attributes:
        left: (purpose, event) -> how many, in the order of the plan.
        rounds: (purpose, round, attempt) -> the request that it was debited for.
        ended: why it was released; None while it is open.
    """

    charter_sha256: str
    run_id: str
    lineage: str
    plan_sha256: str
    left: Counter[tuple[str, str]] = field(default_factory=Counter)
    rounds: dict[tuple[str, int, int], str] = field(default_factory=dict)
    ended: str | None = None

    @property
    def open(self) -> bool:
        """Whether something may still be debited."""
        return self.ended is None

    def rest(self) -> list[list[Any]]:
        """What was never debited, as a header has it: [event, count] in the order of the plan."""
        return [[strict_json(fields.encode()), count] for (_, fields), count in self.left.items() if count > 0]


@dataclass(frozen=True)
class Exchange:
    """A request that the ledger knows.

    Attributes:
        sha256: of the request's manifest.
        reply_sha256: of its one reply's; None until that was committed, empty where a reply is made anew each time.
    """

    sha256: str
    reply_sha256: str | None = None


@dataclass
class Account:
    """The budget of one lineage.

    Attributes:
        budget: its own, fixed by the first run that was accepted; None before.
        debits: (charter, time, event), in order.
        unbounded: an unprotected round was debited: no finite ε holds any more.
        colluding: the least t of shared noise that was debited: no ε here holds against more partners than so many. None: all noise
            was local.
    """

    budget: Budget | None = None
    debits: list[tuple[str, str, PrivacyEvent]] = field(default_factory=list)
    unbounded: bool = False
    colluding: int | None = None


class Standing:
    """The state after some entries.

    Attributes:
        datasets: data set -> its lineage.
        registered: data set -> what its entry says of it.
        accounts: by lineage, in the order in which they were opened.
        holds: by (charter, run).
        exchanges: by (charter, request).
        charters: SHA-256 of every accepted charter -> (name, expires).
        refused: (charter, body) of recorded refusals, by their canonical bytes.
        masked: (charter, digest of an agreement on secure aggregation) -> the request that was debited for a vector under it.
        survivors: (charter, such a digest) -> the one list of survivors that was signed for it.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.datasets: dict[str, str] = {}
        self.registered: dict[str, Mapping[str, Any]] = {}
        self.accounts: dict[str, Account] = {}
        self.holds: dict[tuple[str, str], Hold] = {}
        self.exchanges: dict[tuple[str, str], Exchange] = {}
        self.charters: dict[str, tuple[str, datetime]] = {}
        self.refused: dict[bytes, tuple[str, Mapping[str, Any]]] = {}
        self.masked: dict[tuple[str, str], str] = {}
        self.survivors: dict[tuple[str, str], list[str]] = {}
        for entry in entries:
            self.apply(entry)

    def apply(self, entry: Entry) -> None:
        """Take in one more entry.

        Raises:
            LedgerError: of a type or privacy event that this version does not know, or malformed.
        """
        try:
            self._apply(entry)
        except (KeyError, TypeError, ValueError) as err:
            raise LedgerError(
                f"entry {entry.seq}, {entry.type}: does not say what such an entry says, or names what is not there",
                "Install the version of hansa that wrote it: what it spent must be counted.",
            ) from err

    def _apply(self, entry: Entry) -> None:
        body, charter = entry.body, entry.charter or ""
        match entry.type:
            case "dataset":
                self.datasets[body["dataset"]] = body["lineage"]
                self.registered[body["dataset"]] = body
                self.accounts.setdefault(body["lineage"], Account())
            case "charter":
                self.charters[charter] = (body["name"], datetime.fromisoformat(body["expires"]))
            case "budget":
                self.accounts[body["lineage"]].budget = Budget.from_fields(body["budget"])
            case "hold":
                hold = Hold(charter, body["run_id"], self.datasets[body["dataset"]], body["plan_sha256"])
                for item in body["plan"]:
                    event_from(item["event"])  # known to this version?
                    hold.left[kind_of(item["purpose"], item["event"])] += item["count"]
                self.holds[charter, body["run_id"]] = hold
                self.exchanges[charter, body["request_id"]] = Exchange(body["request_sha256"], "")
            case "debit":
                hold = self.holds[charter, body["run_id"]]
                hold.left[kind_of(body["purpose"], body["event"])] -= 1
                masked = body.get("masked", {"attempt": 0})
                hold.rounds[body["purpose"], body["round"], masked["attempt"]] = body["request_id"]
                if "agreement" in masked:
                    self.masked[charter, masked["agreement"]] = body["request_id"]
                self.exchanges[charter, body["request_id"]] = Exchange(body["request_sha256"])
                event, account = event_from(body["event"]), self.accounts[hold.lineage]
                account.unbounded |= event is None
                if body["event"]["mechanism"] == SHARED:
                    colluding = body["event"]["colluding"]
                    account.colluding = min(colluding, colluding if account.colluding is None else account.colluding)
                if event is not None:
                    account.debits.append((charter, entry.time, event))
            case "commit" | "public":
                if entry.type == "public":
                    self.holds[charter, body["run_id"]].rounds["public", body["round"], 0] = body["request_id"]
                self.exchanges[charter, body["request_id"]] = Exchange(body["request_sha256"], body["reply_sha256"])
            case "survivors":
                self.survivors[charter, body["agreement"]] = body["survivors"]
                self.exchanges[charter, body["request_id"]] = Exchange(body["request_sha256"], "")
            case "release":
                self.holds[charter, body["run_id"]].ended = body["why"]
            case "refuse":
                self.refused[refusal_key(charter, body)] = (charter, body)
            case "genesis" | "recovered" | "restored":
                pass
            case unknown:
                raise LedgerError(
                    f"entry {entry.seq}: an event of the type {unknown!r}, which this version does not know",
                    "Install the version of hansa that wrote it: what it spent must be counted.",
                )

    def spent(self, lineage: str, charter_sha256: str | None = None) -> list[PrivacyEvent]:
        """Everything debited on a lineage, over all runs, under one charter or all."""
        return [event for charter, _, event in self.accounts[lineage].debits if charter_sha256 in (None, charter)]

    def held(self, lineage: str, charter_sha256: str | None = None, at: datetime | None = None) -> list[PrivacyEvent]:
        """What open holds may still spend of a lineage, under one charter or all.

        Args:
            at: without those of charters that have expired then: the gate frees them before it admits anything, which a reader of
                its ledger cannot.
        """
        found = []
        ended = {charter for charter, (_, expires) in self.charters.items() if at is not None and at >= expires}
        for hold in self.holds.values():
            if (
                hold.charter_sha256 not in ended
                and hold.open
                and hold.lineage == lineage
                and charter_sha256 in (None, hold.charter_sha256)
            ):
                for (_, fields), count in hold.left.items():
                    found += times(event_from(strict_json(fields.encode())), count)
        return found

    def epsilons(self, lineage: str, budget: Budget, charter_sha256: str | None = None) -> dict[str, float]:
        """What was spent and is held under one charter or all, measured by a filter and, at its δ, by the odometer."""
        spent = self.spent(lineage, charter_sha256)
        taken = [*spent, *self.held(lineage, charter_sha256)]
        return {
            "epsilon_cap": budget.epsilon,
            "delta": budget.delta,
            "spent_filter": budget.spent(spent),
            "spent_odometer": odometer(spent, budget.delta),
            "with_held_filter": budget.spent(taken),
            "with_held_odometer": odometer(taken, budget.delta),
            "left_filter": max(0.0, budget.epsilon - budget.spent(taken)),
        }


def refusal_key(charter_sha256: str, body: Mapping[str, Any]) -> bytes:
    """What makes two refusals the same."""
    return charter_sha256.encode() + canonical(dict(body))


def kind_of(purpose: str, fields: Mapping[str, Any]) -> tuple[str, str]:
    """What a hold counts: a purpose and an event as the ledger has it."""
    return purpose, canonical(fields).decode()


def times(event: PrivacyEvent | None, count: int) -> list[PrivacyEvent]:
    """`count` such events as one; nothing where nothing is protected or left."""
    if event is None or count < 1:
        return []
    return [PrivacyEvent(event.sampling_rate, event.noise_multiplier, event.steps * count)]
