"""Every refusal, before data is touched: hold, debit, commit.

One gate guards everything that a partner registered; each lineage of data sets has one budget, whoever asks. Its state is the
ledger: everything here is replayed from entries when the node starts, so a crash, a restart or another coordinator changes
nothing about what may still be spent.

  hold      accepting a run reserves its whole plan, so that it can finish
  debit     before a round reads data, part of the hold is spent on (request id, hash of request), on disk
  commit    after the reply is in the outbox and before its first byte leaves
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from ..common.accounting import Budget, PrivacyEvent
from ..common.charter import Charter, Member, SignedCharter
from ..common.config import check_delta
from ..common.errors import LedgerError, Refusal, Refused
from ..common.events import EventLog
from ..common.heads import Head
from ..common.identity import real
from ..common.ledger import Ledger
from ..common.messages import Manifest
from ..common.plan import (
    SOFTWARE,
    PlanItem,
    budget_of,
    charged,
    evaluated_rounds,
    event_fields,
    plan_of,
    plan_sha256,
)
from ..common.secagg import Agreement
from .datasets import RegisteredDataset
from .law import SiteLaw
from .standing import Exchange, Hold, Standing, kind_of, refusal_key, times


class Gate:
    """Decides, and records the decision before it takes effect. One thread at a time uses it.

    Args:
        name: the partner.
        key: the public half of the partner's identity key.
        datasets: what is registered, in the order in which it was; what the ledger does not have yet is recorded in it: this
            is the owner's signed declaration of what shares a budget.
        law: what the site refuses beyond the charters; None in simulations.
        log: every entry of the ledger is an event of it too.

    Raises:
        LedgerError: the ledger is of other data sets, or one is simulated and the other is not, or its restore was not
            finished, or it holds something that this version does not know.
    """

    def __init__(
        self,
        name: str,
        key: str,
        datasets: Iterable[RegisteredDataset],
        ledger: Ledger,
        *,
        simulated: bool,
        law: SiteLaw | None = None,
        log: EventLog | None = None,
    ) -> None:
        self.name = name
        self.ledger = ledger
        self._key = key
        self._simulated = simulated
        self._law = law
        self._log = log
        self._charters: dict[str, tuple[Charter, RegisteredDataset]] = {}
        begun = ledger.entries[0].body
        if begun["simulated"] != simulated:
            raise LedgerError(
                f"{name}'s ledger says simulated: {begun['simulated']}", "A simulation and a real node share no ledger."
            )
        self._standing = Standing(ledger.entries)
        self._begin_after_restore()
        self._register(list(datasets))
        self._release_ended()

    def accept(self, signed: SignedCharter, dataset: RegisteredDataset, code_sha256: str) -> None:
        """Install a charter that the partner signed, to be served from one of the registered data sets; nothing is spent by it.

        Args:
            code_sha256: of the installed task's code.

        Raises:
            CharterError: not signed by everyone, edited, expired.
            Refused: it is not for this partner, this code or this data set. What the site's law says is refused run by run,
                so that the coordinator sees why, and runs from before can be closed.
        """
        known = signed.sha256 in self._standing.charters
        # One that was accepted before is read again after it expired, so that its runs can be closed: it spends nothing.
        charter = signed.verify(now=None if known else datetime.now(UTC))
        check_charter(charter, self.name, self._key, dataset, code_sha256, simulated=self._simulated)
        self._charters[signed.sha256] = charter, dataset
        if not known:
            about = {"name": charter.name, "expires": charter.expires.isoformat()}
            self._append("charter", about, signed.sha256)

    def open_run(self, request: Manifest, request_sha256: str) -> None:
        """Hold a whole run's plan, or refuse it.

        Raises:
            Refused: with the reason; whoever answers records it with `refuse`.
        """
        if self._known(request, request_sha256) is not None:
            return
        charter, dataset = self._charter(request)
        if (request.charter_sha256, request.run_id) in self._standing.holds:
            raise Refused(Refusal.REPLAY, "this run is already held")
        self._ask_site(charter, request)
        lineage = dataset.lineage
        account = self._standing.accounts[lineage]
        plan = plan_of(charter)
        if charter.privacy.kind != "none":
            agreed = budget_of(charter)
            # The lineage's own cap over everything, and the charter's over what is spent under it: both must hold.
            self._admit(account.budget or agreed, plan, request.charter_sha256, lineage, every=True)
            self._admit(agreed, plan, request.charter_sha256, lineage, every=False)
            if self._law is not None:
                taken = [*self._standing.spent(lineage), *self._standing.held(lineage), *_asked(plan)]
                self._law.afford(charter, taken)
            if account.budget is None:  # only now: a run that is refused must not fix the budget
                fields = agreed.to_fields()
                about = {"unit": "record", "adjacency": "add-or-remove-one", "lineage": lineage, "budget": fields}
                self._append("budget", about, request.charter_sha256, {"lineage": lineage, "budget": fields})
        elif account.budget is not None and not account.unbounded and _asked(plan):
            # Unprotected training makes the budget unbounded when it happens. Until then what *is* protected (private
            # evaluation) is charged to it like anything else.
            self._admit(account.budget, plan, request.charter_sha256, lineage, every=True)
        self._append(
            "hold",
            {
                "request_id": request.request_id,
                "request_sha256": request_sha256,
                "run_id": request.run_id,
                "dataset": dataset.dataset_id,
                "plan": [item.to_fields() for item in plan],
                "plan_sha256": plan_sha256(plan),
                "software": SOFTWARE,
            },
            request.charter_sha256,
            {"lineage": lineage, "hold": [[event_fields(item.event), item.count] for item in plan]},
        )

    def debit(
        self, request: Manifest, request_sha256: str, purpose: str, masked: Agreement | None = None
    ) -> str | None:
        """Spend one planned event on this request.

        Args:
            masked: the attempt at secure aggregation that the request is for.

        Returns:
            The SHA-256 of the reply that was committed before, to answer with from the outbox; None: spent, so work.

        Raises:
            Refused: with the reason; whoever answers records it with `refuse`.
        """
        known = self._known(request, request_sha256)
        if known is not None and known.reply_sha256 is not None:
            return known.reply_sha256
        charter, dataset = self._charter(request)
        self._ask_site(charter, request)
        hold = self._open_hold(request, dataset)
        if known is not None:
            return None  # debited, then a crash: nothing was released, so the same debit pays for it
        item = next(
            (i for i in plan_of(charter) if i.purpose == purpose),
            None,
        )
        member = charter.member(self.name)
        assert member is not None
        if item is None or hold.left[kind_of(purpose, event_fields(item.event))] < 1:
            raise Refused(Refusal.NOT_HELD, f"nothing more is held for {purpose}")
        self._check_round(request, charter, hold, purpose, 0 if masked is None else masked.attempt)
        protected_training = purpose == "train" and item.event is not None
        about = {} if masked is None else {"masked": {"attempt": masked.attempt, "agreement": masked.digest}}
        self._append(
            "debit",
            {
                "request_id": request.request_id,
                "request_sha256": request_sha256,
                "run_id": request.run_id,
                "round": request.round,
                "purpose": purpose,
                "plan_sha256": hold.plan_sha256,
                "dataset": dataset.dataset_id,
                "event": event_fields(item.event),
                "clip_norm": real(charter.privacy.clip_norm or 0.0) if protected_training else None,
                "declared_records": member.declared_records,
                **about,
            },
            request.charter_sha256,
            {"lineage": hold.lineage, "debit": event_fields(item.event)},
        )
        return None

    def survivors(self, request: Manifest, request_sha256: str, agreement: str) -> list[str] | None:
        """Let an exchange after a masked vector through. Returns the list of survivors that was signed for it; None: none yet.

        Args:
            agreement: its digest.

        Raises:
            Refused: no vector was sent under it, or the run is over, or may not go on now, or a request of this id but other content was
                taken before.
        """
        self._known(request, request_sha256)
        charter, dataset = self._charter(request)
        self._ask_site(charter, request)
        self._open_hold(request, dataset)
        sent = self._standing.masked.get((request.charter_sha256, agreement), "")
        known = self._standing.exchanges.get((request.charter_sha256, sent))
        if known is None or not known.reply_sha256:
            raise Refused(Refusal.SECAGG_SURVIVORS, "this node sent no vector in this attempt")
        return self._standing.survivors.get((request.charter_sha256, agreement))

    def list_survivors(self, request: Manifest, request_sha256: str, agreed: Agreement, survivors: list[str]) -> None:
        """Record the one list of survivors that is signed for an attempt, before its signature leaves."""
        body = {
            "request_id": request.request_id,
            "request_sha256": request_sha256,
            "run_id": request.run_id,
            "round": request.round,
            "attempt": agreed.attempt,
            "agreement": agreed.digest,
            "survivors": survivors,
        }
        self._append("survivors", body, request.charter_sha256)

    def admit_public(self, request: Manifest, request_sha256: str) -> str | None:
        """Let a public evaluation through. Returns the SHA-256 of the reply that was committed before, if there is one.

        Raises:
            Refused: with the reason; whoever answers records it with `refuse`.
        """
        known = self._known(request, request_sha256)
        if known is not None:
            return known.reply_sha256
        charter, dataset = self._charter(request)
        self._ask_site(charter, request)
        hold = self._open_hold(request, dataset)
        if charter.evaluation.kind != "public" or dataset.held_out != "public":
            raise Refused(Refusal.NOT_HELD, "the charter agrees to no public evaluation")
        self._check_round(request, charter, hold, "public")
        return None

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
            request.charter_sha256,
        )

    def close_run(self, run_id: str, charter_sha256: str) -> dict[str, Any]:
        """Free what a run held and never debited, if it is open here; the ledger's length and root after that.

        Raises:
            Refused: this node accepted no such charter.
        """
        if charter_sha256 not in self._charters:
            raise Refused(Refusal.CHARTER_UNKNOWN, "this run is not of a charter that this node accepted")
        hold = self._standing.holds.get((charter_sha256, run_id))
        if hold is not None and hold.open:
            self._release(hold, "closed")
        return self.ledger.head()

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
        if refusal_key(request.charter_sha256, body) not in self._standing.refused:
            self._append("refuse", body, request.charter_sha256)

    def check_head(self, head: Head) -> None:
        """Return when this ledger is, or goes on from, what a head that this node signed states.

        Raises:
            Refused: it was put back to an older copy: from then on every run is refused, as after a restore. Or the head is of
                another ledger of this partner, which says nothing of this one.
        """
        if self.ledger.states(head.length, head.root):
            return
        if head.ledger_id != self.ledger.entries[0].body["ledger_id"]:
            raise Refused(
                Refusal.ROLLED_BACK,
                "the head that is shown is of another ledger of this partner than this node's",
                "The coordinator knows another state folder of yours: which one is right?",
            )
        if self._law is not None and self._law.distrust(self.ledger.length, (head.length, head.root)):
            self._append("restored", {"length": self.ledger.length})
        raise Refused(
            Refusal.ROLLED_BACK,
            f"this node signed a head of its ledger at {head.length} entries that it does not have now",
            "Restore the newest backup: hansa node restore BACKUP",
        )

    def open_runs(self) -> list[tuple[str, str]]:
        """(charter, run) of every run that may still be debited."""
        return [key for key, hold in self._standing.holds.items() if hold.open]

    def charter(self, sha256_hex: str) -> Charter | None:
        """An accepted charter by its hash."""
        known = self._charters.get(sha256_hex)
        return None if known is None else known[0]

    def spent(self, charter_sha256: str | None = None) -> list[PrivacyEvent]:
        """Everything debited here, over all runs and lineages, under one charter or all."""
        return [e for lineage in self._standing.accounts for e in self._standing.spent(lineage, charter_sha256)]

    def unbounded(self) -> bool:
        """Whether an unprotected round was ever debited: no finite ε holds any more for that lineage."""
        return any(account.unbounded for account in self._standing.accounts.values())

    def spent_epsilon(self) -> float | None:
        """What the filter counts as spent, of the lineage that spent most; None when there is no budget yet or it is unbounded."""
        if self.unbounded():
            return None
        accounts = self._standing.accounts.items()
        return max((a.budget.spent(self._standing.spent(n)) for n, a in accounts if a.budget is not None), default=None)

    # -- rules -------------------------------------------------------------------------------------------------------

    def _known(self, request: Manifest, request_sha256: str) -> Exchange | None:
        # What failed to be recorded may be on disk all the same: no work is done, nor put into the outbox over it, until the
        # ledger was read again.
        self.ledger.check_open()
        known = self._standing.exchanges.get((request.charter_sha256, request.request_id))
        if known is not None and known.sha256 != request_sha256:
            raise Refused(Refusal.REPLAY, "a request of this id but other content was taken before")
        return known

    def _charter(self, request: Manifest) -> tuple[Charter, RegisteredDataset]:
        known = self._charters.get(request.charter_sha256)
        if known is None:
            raise Refused(Refusal.CHARTER_UNKNOWN, "this node accepted no such charter")
        # A little before: what is decided now is recorded with a time that is not before it.
        if datetime.now(UTC) + _RECORDING >= known[0].expires:
            raise Refused(Refusal.CHARTER_EXPIRED, f"it expired {known[0].expires:%Y-%m-%d}")
        return known

    def _open_hold(self, request: Manifest, dataset: RegisteredDataset) -> Hold:
        hold = self._standing.holds.get((request.charter_sha256, request.run_id))
        if hold is None or not hold.open:
            raise Refused(Refusal.NOT_HELD, "this run is not open here")
        if hold.lineage != dataset.lineage:  # the charter was given to another data set meanwhile
            raise Refused(Refusal.NOT_HELD, "this run is held on the budget of other data than the charter has now")
        return hold

    def _register(self, datasets: list[RegisteredDataset]) -> None:
        """Record what is registered and not in the ledger yet."""
        given = {dataset.dataset_id for dataset in datasets}
        if strange := set(self._standing.datasets) - given:
            raise LedgerError(
                f"{self.name}'s ledger has the data set {min(strange)}, which is not registered here",
                "Restore its registration: what was spent on it stands in this ledger.",
            )
        for dataset in datasets:
            dataset.bind(self.ledger.entries[0].body["ledger_id"])
            known = self._standing.registered.get(dataset.dataset_id)
            if known is not None:
                if known != dataset.describe():
                    raise LedgerError(
                        f"the data set {dataset.dataset_id} is another in {self.name}'s ledger than registered",
                        "A registration is never edited. Restore it: hansa node restore BACKUP",
                    )
                continue
            declared, accounts = dataset.declared, self._standing.accounts
            fits = {
                "first": not accounts,
                "disjoint": bool(accounts) and dataset.lineage not in accounts,
                "version": self._standing.datasets.get(declared.of or "") == dataset.lineage,
                "overlap": self._standing.datasets.get(declared.of or "") == dataset.lineage,
            }
            if not fits.get(declared.kind, False) or (declared.kind in ("first", "disjoint")) != (declared.of is None):
                raise LedgerError(
                    f"the data set {dataset.dataset_id} is declared {declared.kind}, which does not fit the ledger",
                    "A registration is never edited. Restore it, or register the data again.",
                )
            opens = declared.kind in ("first", "disjoint")
            privacy = {"lineage": dataset.lineage, "open": declared.kind} if opens else None
            self._append("dataset", dataset.describe(), None, privacy)

    def _check_round(self, request: Manifest, charter: Charter, hold: Hold, purpose: str, attempt: int = 0) -> None:
        rounds = charter.algorithm.rounds
        every = 1 if purpose == "train" else charter.evaluation.every
        taken = hold.rounds.get((purpose, request.round, attempt), request.request_id)
        if request.round not in evaluated_rounds(rounds, every) or taken != request.request_id:
            raise Refused(Refusal.ROUND, f"round {request.round} is not one to {purpose}, or was asked for before")

    def _ask_site(self, charter: Charter, request: Manifest) -> None:
        """Raise Refused when the site's law does not allow this run now."""
        self._release_ended()
        if self._law is not None:
            self._law.agree(charter)
            self._law.permit(request.charter_sha256, request.run_id)

    def _begin_after_restore(self) -> None:
        """Record that the ledger up to here came from a backup, before anything else is recorded or signed.

        Auditors see it, and whatever this node states of its ledger from now on is of a greater length: no such statement
        can be passed off as one from before the restore.
        """
        at = None if self._law is None else self._law.restored_at()
        if at is None or self.ledger.length > at:
            return
        if self.ledger.length < at:
            raise LedgerError(
                f"{self.name}'s restore was not finished: the ledger ends before {at} entries",
                "Restore the same backup again: hansa node restore BACKUP",
            )
        self._append("restored", {"length": at})

    def _release_ended(self) -> None:
        """Free what runs under expired or withdrawn charters still hold: nothing can be debited for them any more."""
        now, standing = datetime.now(UTC), self._standing
        for hold in standing.holds.values():
            if not hold.open:
                continue
            if self._law is not None and self._law.withdrawn(hold.charter_sha256):
                self._release(hold, "cancelled")
            elif hold.charter_sha256 in standing.charters and now >= standing.charters[hold.charter_sha256][1]:
                self._release(hold, "expired")

    def _release(self, hold: Hold, why: str) -> None:
        privacy = {"lineage": hold.lineage, "release": hold.rest()}
        self._append("release", {"run_id": hold.run_id, "why": why}, hold.charter_sha256, privacy)

    def _admit(
        self, budget: Budget, plan: Iterable[PlanItem], charter_sha256: str, lineage: str, *, every: bool
    ) -> None:
        """Refuse a plan that `budget` does not admit after what was spent and held, under the asking charter or `every` one.

        The words are for the coordinator: they tell what was spent under its own charter, and of others only that
        something was.

        Args:
            charter_sha256: the charter under which the plan is asked for.
        """
        asked, standing = _asked(plan), self._standing
        own = [*standing.spent(lineage, charter_sha256), *standing.held(lineage, charter_sha256)]
        taken = [*standing.spent(lineage), *standing.held(lineage)] if every else own
        if standing.accounts[lineage].unbounded:
            raise Refused(Refusal.BUDGET, "an unprotected run made this budget unbounded")
        if budget.admits([*taken, *asked]):
            return
        cap = f"cap {budget.epsilon:g} (delta {budget.delta:g}, record level, filter)"
        if len(taken) > len(own):  # any number would tell what is spent under charters that are not the asker's
            raise Refused(Refusal.BUDGET, f"with what other charters took, the rest does not pay for this run; {cap}")
        raise Refused(
            Refusal.BUDGET,
            f"spent and held so far epsilon {budget.spent(taken):.3f}, "
            f"with this run {budget.spent([*taken, *asked]):.3f}, {cap}",
        )

    def _append(
        self,
        kind: str,
        body: Mapping[str, Any],
        charter_sha256: str | None = None,
        privacy: Mapping[str, Any] | None = None,
    ) -> None:
        self._standing.apply(self.ledger.append(kind, body, charter=charter_sha256, privacy=privacy))
        if self._log is not None:
            about = {**body, "charter_sha256": charter_sha256}
            told = {word: about[key] for key, word in _TOLD.items() if about.get(key) is not None}
            self._log.log(kind, partner=self.name, **told)


_RECORDING = timedelta(seconds=5)

_TOLD = {
    "charter_sha256": "charter", "run_id": "run", "round": "round", "request_id": "request", "purpose": "purpose",
    "reason": "reason", "why": "reason",
}  # fmt: skip
"""What a log tells of an entry: key in its body -> field of the event."""


def check_charter(
    charter: Charter, name: str, key: str, dataset: RegisteredDataset, code_sha256: str, *, simulated: bool
) -> Member:
    """What the charter says of the partner `name`, if it is for this partner, this code and this dataset. Reads no data.

    Raises:
        Refused: it is not.
    """
    member = charter.member(name)
    if member is None or member.key != key:
        raise Refused(Refusal.NOT_A_PARTNER, f"{name} with this key does not stand in the charter")
    if charter.simulated != simulated:
        raise Refused(
            Refusal.SIMULATED,
            "a simulated charter never touches a real dataset, nor a real one a simulated",
        )
    if charter.task.code_sha256 != code_sha256:
        raise Refused(
            Refusal.TASK_CODE,
            f"the charter pins task code {charter.task.code_sha256[:16]}, installed is {code_sha256[:16]}",
            "Install the version of the task that was agreed.",
        )
    if not dataset.size_within(member.declared_records, charter.declared_tolerance):
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
    if charter.evaluation.kind == "public" and dataset.held_out == "private":
        raise Refused(
            Refusal.DATA,
            "the charter lets scores of held-out rows leave; this dataset's were not registered as public",
            "Register them as public first, if they are, or agree on private evaluation.",
        )
    return member


def _asked(plan: Iterable[PlanItem]) -> list[PrivacyEvent]:
    return [e for i in plan if i.event is not None for e in times(charged(i.event), i.count)]
