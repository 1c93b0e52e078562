"""Above 100 simulated clients: one ledger carries every client's accounting, so a round costs a few fsyncs, not thousands.

There are no identities and no outboxes here, and nothing that this ledger says can debit or vouch for a real dataset: its
role is "population" and its genesis entry says simulated.

What is kept of a client is its number: a million registered clients cost what a thousand cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ..common.charter import Charter, SignedCharter
from ..common.errors import Refusal, Refused
from ..common.heads import Head
from ..common.identity import real
from ..common.ledger import Ledger
from ..common.messages import Manifest
from ..common.plan import budget_of, event_fields, events_of, plan_of
from ..common.secagg import Agreement
from ..server.records import Answer, LedgerRecords
from ..server.roster import Roster


def client_name(number: int, clients: int = 0) -> str:
    """The name of client `number` (from 0) of `clients`: of as many digits as the last one needs, so that names sort as numbers do."""
    return f"client-{number:0{max(4, len(str(clients - 1)))}d}"


def client_number(name: str) -> int:
    """Inverse of `client_name`.

    Raises:
        ValueError: no client's name.
    """
    prefix, _, digits = name.partition("-")
    if prefix != "client" or not (digits.isascii() and digits.isdecimal()):
        raise ValueError(f"{name!r} is no client's name")
    return int(digits)


class PopulationRoster(Roster):
    """All clients of a population, without a list of them. Client n, from 0, is node n + 1 of the Grid.

    Nobody is asked for a run: the run ledger's hold speaks for all.

    Args:
        measuring: how many, the first ones, hold rows to measure a model on.
        numbers: of the clients that it is about; None: all of them.
    """

    asked = False

    def __init__(self, clients: int, measuring: int = 1000, numbers: range | None = None) -> None:
        self._clients, self._measuring = clients, measuring
        self._numbers = range(clients) if numbers is None else numbers

    def node(self, name: str) -> int:
        """See `Roster`."""
        if name not in self:
            raise KeyError(name)
        return client_number(name) + 1

    def name(self, node: int) -> str | None:
        """See `Roster`."""
        return client_name(node - 1, self._clients) if node - 1 in self._numbers else None

    @property
    def measuring(self) -> Sequence[str]:
        """See `Roster`."""
        return self[: self._measuring]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return PopulationRoster(self._clients, self._measuring, self._numbers[index])
        return client_name(self._numbers[index], self._clients)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return (client_name(number, self._clients) for number in self._numbers)

    def __contains__(self, name: object) -> bool:
        try:
            number = client_number(name) if isinstance(name, str) else -1
        except ValueError:
            return False
        return number in self._numbers and name == client_name(number, self._clients)


class PopulationRecords:
    """The coordinator's `Records` and every client's hold, debit and commit, in one ledger."""

    def __init__(self, ledger: Ledger, signed: SignedCharter) -> None:
        self.ledger = ledger
        self._own = LedgerRecords(ledger, signed.sha256)
        self._charter = signed.charter
        self._sha256 = signed.sha256
        assert signed.charter.population is not None
        self._population = signed.charter.population
        self._plan = plan_of(self._charter)
        self._items = {item.purpose: item for item in self._plan}
        self._charges: dict[str, npt.NDArray[np.int32]] = {}
        self._counted = 0
        self.debited = {(e.body["run_id"], e.body["round"], e.body["purpose"]) for e in ledger.of("cohort-debit")}

    def run(self, run_id: str) -> str | None:
        """Begin: the budget of each client, and a hold for the whole plan, which the filter must admit.

        Returns why the run was closed; None while it is open.

        Raises:
            Refused: the plan does not fit.
        """
        why = self._own.run(run_id)
        if self._charter.privacy.kind != "none" and not self.ledger.of("budget"):
            budget = budget_of(self._charter)
            # A population's budget begins with its run, so nothing was spent before.
            if not budget.admits(events_of(self._plan)):
                raise Refused(
                    Refusal.BUDGET,
                    f"the plan costs epsilon {budget.spent(events_of(self._plan)):.3f}, the cap is {budget.epsilon:g}",
                    "Ask for fewer rounds or more noise; `hansa plan CONFIG` shows what fits.",
                )
            self._append(
                "budget",
                {
                    "clients": self._population.clients,
                    "unit": self._charter.privacy.unit,
                    "adjacency": "add-or-remove-one",
                    "budget": budget.to_fields(),
                },
            )
        if not any(e.body["run_id"] == run_id for e in self.ledger.of("cohort-hold")):
            self._append("cohort-hold", {"run_id": run_id, "plan": [item.to_fields() for item in self._plan]})
        return why

    def asked(
        self,
        run_id: str,
        round_number: int,
        purpose: str,
        requests: Mapping[str, tuple[str, str]],
        attempt: int | None = None,
    ) -> None:
        """Debit the whole cohort before any of it reads data; of a secret cohort, everybody who could be in it."""
        item = self._items.get(purpose)
        if item is None or (run_id, round_number, purpose) in self.debited:
            return  # opening and public evaluation cost nothing; after a crash the same debit pays
        protected_training = purpose == "train" and item.event is not None
        self._append(
            "cohort-debit",
            {
                "run_id": run_id,
                "round": round_number,
                "purpose": purpose,
                "event": event_fields(item.event),
                "clip_norm": real(self._charter.privacy.clip_norm or 0.0) if protected_training else None,
                "declared_records": self._population.declared_records,
                "clients": self._named(requests),
            },
        )
        self.debited.add((run_id, round_number, purpose))

    def most_spent(self) -> float | None:
        """ε that the filter counts at most for any client; None without an ε, and where all are charged alike (a client is the unit)."""
        if self._charter.privacy.kind == "none" or self._charter.privacy.unit == "client":
            return None
        entries = self.ledger.of("cohort-debit")
        for entry in entries[self._counted :]:
            # How often each client was charged, as differences between neighbours.
            steps = self._charges.setdefault(entry.body["purpose"], np.zeros(self._population.clients + 1, np.int32))
            for first, last in entry.body["clients"]:
                steps[first] += 1
                steps[last + 1] -= 1
        self._counted = len(entries)
        most = {purpose: int(np.cumsum(steps).max()) for purpose, steps in self._charges.items()}
        charged = [replace(self._items[purpose], count=times) for purpose, times in most.items()]
        return budget_of(self._charter).spent(events_of(charged))

    def attempts(self, run_id: str) -> dict[tuple[int, str, int], list[str]]:
        """A population has no keys to mask with."""
        return {}

    def answered(
        self,
        run_id: str,
        round_number: int,
        purpose: str,
        replies: Mapping[str, Answer],
        attempt: int | None = None,
    ) -> None:
        """Name the clients whose answers count."""
        if purpose in self._items:
            good = self._named(name for name, answer in replies.items() if answer.outcome == "ok")
            body = {"run_id": run_id, "round": round_number, "purpose": purpose, "clients": good}
            if not any(e.body == body for e in self.ledger.of("cohort-commit")[-2:]):  # said again after a crash
                self._append("cohort-commit", body)

    def round(
        self,
        run_id: str,
        round_number: int,
        model_sha256: str,
        partners: list[str] | None,
        metrics: Mapping[str, float],
    ) -> None:
        """A round is complete; who took part stands in its cohort entries."""
        self._own.round(run_id, round_number, model_sha256, None, metrics)

    def close(self, run_id: str, rounds: int, model_sha256: str | None, why: str) -> dict[str, Any]:
        """See `Records`."""
        return self._own.close(run_id, rounds, model_sha256, why)

    def _named(self, names: Iterable[str]) -> list[list[int]]:
        """Who is named in an entry: with clients as the unit of privacy all, because being in a cohort is what is protected."""
        if self._charter.privacy.unit == "client":
            return [[0, self._population.clients - 1]]
        return _ranges(names)

    def _append(self, kind: str, body: Mapping[str, Any]) -> None:
        self.ledger.append(kind, body, charter=self._sha256)


class PopulationGate:
    """A client's gate: the cohort it is in was debited as a whole, on disk, before it was asked."""

    def __init__(self, name: str, charter: Charter, records: PopulationRecords) -> None:
        self.name = name
        self.ledger = records.ledger
        self._charter = charter
        self._records = records

    def charter(self, sha256_hex: str) -> Charter | None:
        """The one charter of this simulation."""
        return self._charter

    def open_run(self, request: Manifest, request_sha256: str) -> None:
        """Held for everybody when the run began."""

    def open_runs(self) -> list[tuple[str, str]]:
        """Never asked: only secure aggregation does."""
        return []

    def survivors(self, request: Manifest, request_sha256: str, agreement: str) -> list[str] | None:
        """No client of a population has keys to mask with.

        Raises:
            Refused: always.
        """
        raise Refused(Refusal.SECAGG_TERMS, "a population has no secure aggregation")

    def list_survivors(self, request: Manifest, request_sha256: str, agreed: Agreement, survivors: list[str]) -> None:
        """Never reached."""

    def debit(
        self, request: Manifest, request_sha256: str, purpose: str, masked: Agreement | None = None
    ) -> str | None:
        """Check that this round was debited.

        Raises:
            Refused: it was not.
        """
        if (request.run_id, request.round, purpose) not in self._records.debited:
            raise Refused(Refusal.NOT_HELD, f"round {request.round} was not debited")
        return None

    def check_head(self, head: Head) -> None:
        """There is one ledger, and nobody shows its head to a client."""

    def admit_public(self, request: Manifest, request_sha256: str) -> str | None:
        """Public rows cost nothing."""
        return None

    def commit(self, request: Manifest, request_sha256: str, reply_sha256: str, *, public: bool) -> None:
        """The cohort commits as a whole when its answers are in."""

    def refuse(self, request: Manifest, request_sha256: str, refused: Refused) -> None:
        """A refusal shows in the cohort's commit: the client is not in it."""

    def close_run(self, run_id: str, charter_sha256: str) -> dict[str, Any]:
        """Clients have no ledgers of their own."""
        raise AssertionError("a population's clients are not asked to close")


def _ranges(names: Iterable[str]) -> list[list[int]]:
    """Client names as inclusive ranges of their numbers."""
    found: list[list[int]] = []
    for number in sorted(map(client_number, names)):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found
