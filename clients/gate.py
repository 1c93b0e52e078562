"""Every refusal, before data is touched: hold, debit, commit.

One gate guards one registered dataset. Its state is the ledger: everything here is replayed from entries when the node
starts, so a crash, a restart or another coordinator changes nothing about what may still be spent.

  hold      accepting a run reserves its whole plan, so that it can finish
  debit     before a round reads data, part of the hold is spent on (request id, hash of request), on disk
  commit    after the reply is in the outbox and before its first byte leaves
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..common.accounting import Budget, PrivacyEvent
from ..common.charter import Charter, SignedCharter
from ..common.config import check_delta
from ..common.errors import LedgerError, Refusal, Refused
from ..common.identity import canonical, real, strict_json
from ..common.ledger import Entry, Ledger
from ..common.messages import Manifest
from ..common.plan import (
    SOFTWARE,
    PlanItem,
    budget_of,
    evaluated_rounds,
    event_fields,
    event_from,
    plan_of,
    plan_sha256,
)
from .datasets import RegisteredDataset


@dataclass
class _Hold:
    charter_sha256: str
    plan_sha256: str
    left: Counter[tuple[str, str]] = field(default_factory=Counter)  # (purpose, event) -> how many
    rounds: dict[tuple[str, int], str] = field(default_factory=dict)  # (purpose, round) -> request id
    open: bool = True


@dataclass(frozen=True)
class _Exchange:
    """A request that the ledger knows: its hash, and whether it was answered."""

    sha256: str
    done: bool


class Gate:
    """Decides, and records the decision before it takes effect.

    Args:
        name: the partner.
        key: the public half of the partner's identity key.
        allow_unprotected: the site allows `privacy: none`, by name.

    Raises:
        LedgerError: the ledger is of another dataset, or one is simulated and the other is not.
    """

    def __init__(
        self,
        name: str,
        key: str,
        dataset: RegisteredDataset,
        ledger: Ledger,
        code_sha256: str,
        *,
        simulated: bool,
        allow_unprotected: bool = False,
    ) -> None:
        self.name = name
        self.ledger = ledger
        self._key = key
        self._dataset = dataset
        self._code_sha256 = code_sha256
        self._simulated = simulated
        self._allow_unprotected = allow_unprotected
        self._charters: dict[str, Charter] = {}
        self._budget: Budget | None = None
        self._holds: dict[str, _Hold] = {}
        self._exchanges: dict[str, _Exchange] = {}
        self._refused: set[bytes] = set()
        begun = ledger.entries[0].body
        if (begun["simulated"], (begun["dataset"] or {}).get("id")) != (simulated, dataset.dataset_id):
            raise LedgerError(
                f"{name}'s ledger is of dataset {begun['dataset']}, simulated {begun['simulated']}",
                f"Give the ledger of dataset {dataset.dataset_id}, simulated {simulated}: what was spent stands in it.",
            )
        dataset.bind(begun["ledger_id"])
        for entry in ledger.entries:
            self._apply(entry)
        self._release_expired()

    def accept(self, signed: SignedCharter) -> None:
        """Install a charter that the partner signed; nothing is spent by it.

        Raises:
            CharterError: not signed by everyone, edited, expired.
            Refused: it is not for this partner, this code or this dataset.
        """
        known = any(e.body["charter_sha256"] == signed.sha256 for e in self.ledger.of("charter"))
        # One that was accepted before is read again after it expired, so that its runs can be closed: it spends nothing.
        charter = signed.verify(now=None if known else datetime.now(UTC))
        member = charter.member(self.name)
        if member is None or member.key != self._key:
            raise Refused(Refusal.NOT_A_PARTNER, f"{self.name} with this key does not stand in the charter")
        if charter.simulated != self._simulated:
            raise Refused(
                Refusal.SIMULATED,
                "a simulated charter never touches a real dataset, nor a real one a simulated",
            )
        if charter.task.code_sha256 != self._code_sha256:
            raise Refused(
                Refusal.TASK_CODE,
                f"the charter pins task code {charter.task.code_sha256[:16]}, installed is {self._code_sha256[:16]}",
                "Install the version of the task that was agreed.",
            )
        if charter.privacy.kind == "none" and not self._allow_unprotected:
            raise Refused(Refusal.UNPROTECTED, "this site does not allow training without privacy")
        if not self._dataset.size_within(member.declared_records, charter.declared_tolerance):
            raise Refused(
                Refusal.DATA,
                f"the dataset's size is not within {charter.declared_tolerance:.0%} of the declared "
                f"{member.declared_records} records",
                "Declare the size that the training part really has, rounded, and sign a new charter.",
            )
        try:
            check_delta(charter.privacy.delta, member.declared_records)
        except ValueError as err:
            raise Refused(Refusal.DATA, str(err)) from err
        if charter.evaluation.kind == "public" and self._dataset.held_out == "private":
            raise Refused(
                Refusal.DATA,
                "the charter lets scores of held-out rows leave; this dataset's were not registered as public",
                "Register them as public first, if they are, or agree on private evaluation.",
            )
        self._charters[signed.sha256] = charter
        if not known:
            self._append(
                "charter",
                {
                    "charter_sha256": signed.sha256,
                    "name": charter.name,
                    "expires": charter.expires.isoformat(),
                },
            )

    def open_run(self, request: Manifest, request_sha256: str) -> None:
        """Hold a whole run's plan, or refuse it.

        Raises:
            Refused: with the reason; whoever answers records it with `refuse`.
        """
        if self._known(request, request_sha256) is not None:
            return
        charter = self._charter(request)
        if request.run_id in self._holds:
            raise Refused(Refusal.REPLAY, "this run is already held")
        self._release_expired()
        plan = plan_of(charter.algorithm, charter.privacy, charter.evaluation)
        if charter.privacy.kind == "local":
            agreed = budget_of(charter.privacy)
            # The dataset's own cap over everything, and the charter's over what is spent under it: both must hold.
            self._admit(self._budget or agreed, plan, None)
            self._admit(agreed, plan, request.charter_sha256)
            if self._budget is None:  # only now: a run that is refused must not fix the budget
                self._append(
                    "budget",
                    {
                        "dataset": self._dataset.dataset_id,
                        "charter_sha256": request.charter_sha256,
                        "unit": "record",
                        "adjacency": "add-or-remove-one",
                        "budget": agreed.to_fields(),
                    },
                )
        self._append(
            "hold",
            {
                "request_id": request.request_id,
                "request_sha256": request_sha256,
                "run_id": request.run_id,
                "charter_sha256": request.charter_sha256,
                "dataset": self._dataset.dataset_id,
                "plan": [item.to_fields() for item in plan],
                "plan_sha256": plan_sha256(plan),
                "software": SOFTWARE,
            },
        )

    def debit(self, request: Manifest, request_sha256: str, purpose: str) -> bool:
        """Spend one planned event on this request. Returns True when it was committed before: answer from the outbox.

        Raises:
            Refused: with the reason; whoever answers records it with `refuse`.
        """
        known = self._known(request, request_sha256)
        if known is not None and known.done:
            return True
        charter = self._charter(request)
        hold = self._open_hold(request)
        if known is not None:
            return False  # debited, then a crash: nothing was released, so the same debit pays for it
        item = next(
            (i for i in plan_of(charter.algorithm, charter.privacy, charter.evaluation) if i.purpose == purpose),
            None,
        )
        member = charter.member(self.name)
        assert member is not None
        if item is None or hold.left[_kind(purpose, event_fields(item.event))] < 1:
            raise Refused(Refusal.NOT_HELD, f"nothing more is held for {purpose}")
        self._check_round(request, charter, hold, purpose)
        protected_training = purpose == "train" and item.event is not None
        self._append(
            "debit",
            {
                "request_id": request.request_id,
                "request_sha256": request_sha256,
                "run_id": request.run_id,
                "round": request.round,
                "purpose": purpose,
                "charter_sha256": request.charter_sha256,
                "plan_sha256": hold.plan_sha256,
                "dataset": self._dataset.dataset_id,
                "event": event_fields(item.event),
                "clip_norm": real(charter.privacy.clip_norm or 0.0) if protected_training else None,
                "declared_records": member.declared_records,
            },
        )
        return False

    def admit_public(self, request: Manifest, request_sha256: str) -> bool:
        """Let a public evaluation through. Returns True when it was answered before: answer from the outbox.

        Raises:
            Refused: with the reason; whoever answers records it with `refuse`.
        """
        if self._known(request, request_sha256) is not None:
            return True
        charter = self._charter(request)
        hold = self._open_hold(request)
        if charter.evaluation.kind != "public" or self._dataset.held_out != "public":
            raise Refused(Refusal.NOT_HELD, "the charter agrees to no public evaluation")
        self._check_round(request, charter, hold, "public")
        return False

    def commit(self, request: Manifest, request_sha256: str, reply_sha256: str, *, public: bool) -> None:
        """Record that the reply is in the outbox; after this its bytes may leave."""
        self._append(
            "public" if public else "commit",
            {
                "request_id": request.request_id,
                "request_sha256": request_sha256,
                "run_id": request.run_id,
                "round": request.round,
                "reply_sha256": reply_sha256,
            },
        )

    def close_run(self, run_id: str, charter_sha256: str) -> dict[str, Any]:
        """Free what a run held and never debited, if it is open here; the ledger's length and head after that.

        Raises:
            Refused: this node accepted no such charter, or the run is another charter's.
        """
        hold = self._holds.get(run_id)
        if charter_sha256 not in self._charters or (hold is not None and hold.charter_sha256 != charter_sha256):
            raise Refused(Refusal.CHARTER_UNKNOWN, "this run is not of a charter that this node accepted")
        if hold is not None and hold.open:
            self._append("release", {"run_id": run_id, "why": "closed"})
        return {"length": self.ledger.length, "head": self.ledger.head}

    def refuse(self, request: Manifest, request_sha256: str, refused: Refused) -> None:
        """Record a refusal before it is answered; the same request refused twice is recorded once."""
        body = {
            "request_id": request.request_id,
            "request_sha256": request_sha256,
            "run_id": request.run_id,
            "round": None if request.kind == "open" else request.round,
            "reason": refused.reason.value,
            "detail": refused.detail,
        }
        if canonical(body) not in self._refused:
            self._append("refuse", body)

    def charter(self, sha256_hex: str) -> Charter | None:
        """An accepted charter by its hash."""
        return self._charters.get(sha256_hex)

    def spent(self, charter_sha256: str | None = None) -> list[PrivacyEvent]:
        """Everything debited on this dataset, over all runs, under one charter or all."""
        debits = [d.body for d in self.ledger.of("debit") if charter_sha256 in (None, d.body["charter_sha256"])]
        return [e for e in (event_from(body["event"]) for body in debits) if e is not None]

    def unbounded(self) -> bool:
        """Whether an unprotected round was ever debited: no finite ε holds any more."""
        return any(event_from(d.body["event"]) is None for d in self.ledger.of("debit"))

    def spent_epsilon(self) -> float | None:
        """What the filter counts as spent on this dataset; None when there is no budget yet or it is unbounded."""
        return None if self._budget is None or self.unbounded() else self._budget.spent(self.spent())

    # -- rules -------------------------------------------------------------------------------------------------------

    def _known(self, request: Manifest, request_sha256: str) -> _Exchange | None:
        known = self._exchanges.get(request.request_id)
        if known is not None and known.sha256 != request_sha256:
            raise Refused(Refusal.REPLAY, "a request of this id but other content was taken before")
        return known

    def _charter(self, request: Manifest) -> Charter:
        charter = self._charters.get(request.charter_sha256)
        if charter is None:
            raise Refused(Refusal.CHARTER_UNKNOWN, "this node accepted no such charter")
        if datetime.now(UTC) >= charter.expires:
            raise Refused(Refusal.CHARTER_EXPIRED, f"it expired {charter.expires:%Y-%m-%d}")
        return charter

    def _open_hold(self, request: Manifest) -> _Hold:
        hold = self._holds.get(request.run_id)
        if hold is None or not hold.open or hold.charter_sha256 != request.charter_sha256:
            raise Refused(Refusal.NOT_HELD, "this run is not open here")
        return hold

    def _check_round(self, request: Manifest, charter: Charter, hold: _Hold, purpose: str) -> None:
        rounds = charter.algorithm.rounds
        every = 1 if purpose == "train" else charter.evaluation.every
        taken = hold.rounds.get((purpose, request.round), request.request_id)
        if request.round not in evaluated_rounds(rounds, every) or taken != request.request_id:
            raise Refused(Refusal.ROUND, f"round {request.round} is not one to {purpose}, or was asked for before")

    def _release_expired(self) -> None:
        """Free what runs under expired charters still hold: nothing can be debited for them any more."""
        now = datetime.now(UTC)
        expires = {
            e.body["charter_sha256"]: datetime.fromisoformat(e.body["expires"]) for e in self.ledger.of("charter")
        }
        for run_id, hold in self._holds.items():
            if hold.open and hold.charter_sha256 in expires and now >= expires[hold.charter_sha256]:
                self._append("release", {"run_id": run_id, "why": "expired"})

    def _admit(self, budget: Budget, plan: Iterable[PlanItem], charter_sha256: str | None) -> None:
        """Refuse a plan that `budget` does not admit after what was spent and held (under one charter, or under all).

        The words are for the coordinator: they tell what was spent under its own charter, and of others only that
        something was.
        """
        asked = [e for i in plan for e in _times(i.event, i.count)]
        taken = [*self.spent(charter_sha256), *self._held(charter_sha256)]
        if self.unbounded():
            raise Refused(Refusal.BUDGET, "an unprotected run made this budget unbounded")
        if budget.admits([*taken, *asked]):
            return
        cap = f"cap {budget.epsilon:g} (delta {budget.delta:g}, record level, filter)"
        charters = {h.charter_sha256 for h in self._holds.values()}
        if charter_sha256 is None and len(charters) > 1:
            raise Refused(Refusal.BUDGET, f"with what other charters took, the rest does not pay for this run; {cap}")
        raise Refused(
            Refusal.BUDGET,
            f"spent and held so far epsilon {budget.spent(taken):.3f}, "
            f"with this run {budget.spent([*taken, *asked]):.3f}, {cap}",
        )

    def _held(self, charter_sha256: str | None = None) -> list[PrivacyEvent]:
        """What open holds may still spend, under one charter or all."""
        found = []
        for hold in self._holds.values():
            if hold.open and charter_sha256 in (None, hold.charter_sha256):
                for (_, fields), count in hold.left.items():
                    found += _times(_event(fields), count)
        return found

    # -- state -------------------------------------------------------------------------------------------------------

    def _append(self, kind: str, body: Mapping[str, Any]) -> None:
        self._apply(self.ledger.append(kind, body))

    def _apply(self, entry: Entry) -> None:
        body = entry.body
        match entry.type:
            case "budget":
                self._budget = Budget.from_fields(body["budget"])
            case "hold":
                hold = _Hold(body["charter_sha256"], body["plan_sha256"])
                for item in body["plan"]:
                    hold.left[_kind(item["purpose"], item["event"])] += item["count"]
                self._holds[body["run_id"]] = hold
                self._exchanges[body["request_id"]] = _Exchange(body["request_sha256"], done=True)
            case "debit":
                hold = self._holds[body["run_id"]]
                hold.left[_kind(body["purpose"], body["event"])] -= 1
                hold.rounds[body["purpose"], body["round"]] = body["request_id"]
                self._exchanges[body["request_id"]] = _Exchange(body["request_sha256"], done=False)
            case "commit" | "public":
                if entry.type == "public":
                    self._holds[body["run_id"]].rounds["public", body["round"]] = body["request_id"]
                self._exchanges[body["request_id"]] = _Exchange(body["request_sha256"], done=True)
            case "release":
                self._holds[body["run_id"]].open = False
            case "refuse":
                self._refused.add(canonical(dict(body)))
            case _:
                pass


def _kind(purpose: str, fields: Mapping[str, Any]) -> tuple[str, str]:
    return purpose, canonical(fields).decode()


def _event(fields: str) -> PrivacyEvent | None:
    return event_from(strict_json(fields.encode()))


def _times(event: PrivacyEvent | None, count: int) -> list[PrivacyEvent]:
    if event is None or count < 1:
        return []
    return [PrivacyEvent(event.sampling_rate, event.noise_multiplier, event.steps * count)]
