"""What the entries of one partner's ledger come to: budget, holds, exchanges, spending. State only; `gate` decides on it.

Whoever reads a ledger without writing it (`hansa node budget`, a restore) replays it by the same rules as the gate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..common.accounting import Budget, PrivacyEvent, odometer
from ..common.identity import canonical, strict_json
from ..common.ledger import Entry
from ..common.plan import event_from

SPENDS_NOTHING = frozenset({"genesis", "charter", "refuse", "recovered"})
"""Types of entries that neither hold, debit nor release anything."""


@dataclass
class Hold:
    """What one run may still spend here.

    Attributes:
        left: (purpose, event) -> how many.
        rounds: (purpose, round) -> the request that it was debited for.
        ended: why it was released; None while it is open.
    """

    charter_sha256: str
    plan_sha256: str
    left: Counter[tuple[str, str]] = field(default_factory=Counter)
    rounds: dict[tuple[str, int], str] = field(default_factory=dict)
    ended: str | None = None

    @property
    def open(self) -> bool:
        """Whether something may still be debited."""
        return self.ended is None


@dataclass(frozen=True)
class Exchange:
    """A request that the ledger knows: its hash, and whether it was answered."""

    sha256: str
    done: bool


class Standing:
    """The state after some entries.

    Attributes:
        budget: the dataset's own, fixed by the first run that was accepted; None before.
        holds: by run.
        exchanges: by request.
        charters: SHA-256 of every accepted charter -> (name, expires).
        refused: bodies of recorded refusals, in canonical bytes.
        unbounded: an unprotected round was debited: no finite ε holds any more.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.budget: Budget | None = None
        self.holds: dict[str, Hold] = {}
        self.exchanges: dict[str, Exchange] = {}
        self.charters: dict[str, tuple[str, datetime]] = {}
        self.refused: dict[bytes, Mapping[str, Any]] = {}
        self.unbounded = False
        self._debits: list[tuple[str, PrivacyEvent]] = []
        for entry in entries:
            self.apply(entry)

    def apply(self, entry: Entry) -> None:
        """Take in one more entry."""
        body = entry.body
        match entry.type:
            case "charter":
                self.charters[body["charter_sha256"]] = (body["name"], datetime.fromisoformat(body["expires"]))
            case "budget":
                self.budget = Budget.from_fields(body["budget"])
            case "hold":
                hold = Hold(body["charter_sha256"], body["plan_sha256"])
                for item in body["plan"]:
                    hold.left[kind_of(item["purpose"], item["event"])] += item["count"]
                self.holds[body["run_id"]] = hold
                self.exchanges[body["request_id"]] = Exchange(body["request_sha256"], done=True)
            case "debit":
                hold = self.holds[body["run_id"]]
                hold.left[kind_of(body["purpose"], body["event"])] -= 1
                hold.rounds[body["purpose"], body["round"]] = body["request_id"]
                self.exchanges[body["request_id"]] = Exchange(body["request_sha256"], done=False)
                event = event_from(body["event"])
                self.unbounded |= event is None
                if event is not None:
                    self._debits.append((body["charter_sha256"], event))
            case "commit" | "public":
                if entry.type == "public":
                    self.holds[body["run_id"]].rounds["public", body["round"]] = body["request_id"]
                self.exchanges[body["request_id"]] = Exchange(body["request_sha256"], done=True)
            case "release":
                self.holds[body["run_id"]].ended = body["why"]
            case "refuse":
                self.refused[canonical(dict(body))] = body
            case _:
                pass

    def spent(self, charter_sha256: str | None = None) -> list[PrivacyEvent]:
        """Everything debited on this dataset, over all runs, under one charter or all."""
        return [event for charter, event in self._debits if charter_sha256 in (None, charter)]

    def held(self, charter_sha256: str | None = None) -> list[PrivacyEvent]:
        """What open holds may still spend, under one charter or all."""
        found = []
        for hold in self.holds.values():
            if hold.open and charter_sha256 in (None, hold.charter_sha256):
                for (_, fields), count in hold.left.items():
                    found += times(event_from(strict_json(fields.encode())), count)
        return found

    def epsilons(self, budget: Budget, charter_sha256: str | None = None) -> dict[str, float]:
        """What was spent and is held under one charter or all, measured by a filter and, at its δ, by the odometer."""
        spent = self.spent(charter_sha256)
        taken = [*spent, *self.held(charter_sha256)]
        return {
            "epsilon_cap": budget.epsilon,
            "delta": budget.delta,
            "spent_filter": budget.spent(spent),
            "spent_odometer": odometer(spent, budget.delta),
            "with_held_filter": budget.spent(taken),
            "with_held_odometer": odometer(taken, budget.delta),
            "left_filter": max(0.0, budget.epsilon - budget.spent(taken)),
        }


def kind_of(purpose: str, fields: Mapping[str, Any]) -> tuple[str, str]:
    """What a hold counts: a purpose and an event as the ledger has it."""
    return purpose, canonical(fields).decode()


def times(event: PrivacyEvent | None, count: int) -> list[PrivacyEvent]:
    """`count` such events as one; nothing where nothing is protected or left."""
    if event is None or count < 1:
        return []
    return [PrivacyEvent(event.sampling_rate, event.noise_multiplier, event.steps * count)]
