"""The coordinator's side of secure aggregation: one round's sum, in as many attempts as the charter allows.

An attempt is three exchanges (common/secagg.py): masked vectors; signatures under the list of those that arrived; what opens
their sum. Where too few answer one of them the round fails, as any round does, and whoever resumes the run asks them again. Where the
quorum is there and the sum cannot be opened (somebody lied, or a vector was lost with the coordinator's process), it is asked again of
those who are not to blame, with fresh batches, noise and masks, which is a new debit for each.

What a crash may interrupt is in the ledger: each attempt's requests, and with those to agree the list of survivors. Whoever goes on
asks the same again, sums the same vectors, and can get no other sum.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..common.charter import Charter
from ..common.config import threshold_of
from ..common.errors import MessageError, Refused, RunFailed
from ..common.masking import (
    Told,
    asked_fields,
    by_name,
    fixed_point,
    revealed_from,
    sent_from,
)
from ..common.messages import Manifest
from ..common.model import Arrays, model_sha256
from ..common.secagg import Agreement, Revealed, Sum, from_ring, read_keys
from .records import Answer, Records

GIVE_UP = " Or close the run as it stands: --resume --give-up."
"""The end of some hints; `hansa simulate` has no such option."""

Said = dict[str, Mapping[str, Any]]


class Exchange(Protocol):
    """One question to partners; see `Coordinator._exchange`."""

    def __call__(
        self,
        purpose: str,
        cohort: list[str],
        model: Arrays,
        sink: Any,
        fields: Mapping[str, dict[str, Any]],
        attempt: int,
    ) -> dict[str, Answer]:
        """Ask, and give every answer that counts to `sink`."""


@dataclass
class Summed:
    """What a round came to.

    Attributes:
        total: sum of the survivors' vectors, int64 [dimension], in steps of the grid.
        survivors: in the order of the roster.
        said: partner -> fields of the reply with its vector, the newest of all attempts: what it signed of ledgers counts though
            the sum of that attempt could not be opened.
    """

    total: npt.NDArray[np.int64]
    survivors: list[str]
    said: Said


@dataclass
class _Attempt:
    """What one attempt needs, and what came of it so far."""

    agreed: Agreement
    fields: dict[str, Any]
    total: Sum
    signatures: dict[str, bytes] = field(default_factory=dict)
    revealed: dict[str, Revealed] = field(default_factory=dict)


class MaskedRounds:
    """Sums of one run.

    Args:
        keys: partner -> its signed key of this run, as it came.
        notify: told "retry" with round and attempt, and "liar" with partner and round.
    """

    def __init__(
        self,
        charter: Charter,
        charter_sha256: str,
        run_id: str,
        keys: Mapping[str, bytes],
        records: Records,
        notify: Any,
    ) -> None:
        self._charter = charter
        self._sha256 = charter_sha256
        self._run = run_id
        self._envelopes = dict(keys)
        self._identities = {m.name: m.key for m in charter.partners}
        self._keys = read_keys(keys, charter_sha256, run_id, self._identities)
        self._records = records
        self._notify = notify
        self._bits = fixed_point(charter).bits

    def sum(
        self, number: int, cohort: list[str], model: Arrays, witness: Mapping[str, Any], exchange: Exchange
    ) -> Summed:
        """The sum over the partners of a round that stayed to its end: the quorum or more.

        Raises:
            RunFailed: too few did, and no attempt is left.
        """
        secure = self._charter.secure_aggregation
        assert secure is not None
        asked = self._records.attempts(self._run)
        attempt = max((a for (n, _, a) in asked if n == number), default=0)
        roster = self._ordered(asked.get((number, "train", attempt), cohort))
        listed = asked.get((number, "agree", attempt))
        used = sum(max(a for (n, _, a) in asked if n == one) for one in {n for n, _, _ in asked} - {number})
        said: Said = {}
        while True:
            found = self._attempt(number, attempt, roster, listed, model, witness, exchange, said)
            if isinstance(found, Summed):
                return found
            went, why = found
            if len(went) < self._charter.quorum or used + attempt >= secure.retries:
                raise RunFailed(
                    f"round {number}: {why}; {len(went)} went along, the quorum is {self._charter.quorum}, and "
                    f"{used + attempt} of the run's {secure.retries} retries are used",
                    "Nothing was learned but sums over the quorum. Mend the cause and run again with --resume."
                    + GIVE_UP,
                )
            attempt, roster, listed = attempt + 1, self._ordered(went), None
            self._notify("retry", round=number, attempt=attempt, partners=roster, why=why)

    def _ordered(self, names: Iterable[str]) -> list[str]:
        """In the charter's order, whoever answered first: a request that is made again is the same."""
        return [m.name for m in self._charter.partners if m.name in set(names)]

    def _attempt(
        self,
        number: int,
        attempt: int,
        roster: list[str],
        listed: list[str] | None,
        model: Arrays,
        witness: Mapping[str, Any],
        exchange: Exchange,
        said: Said,
    ) -> Summed | tuple[list[str], str]:
        """The sum, or who went along to the exchange that too few answered, and which it was."""
        state = self._begin(number, attempt, roster, model_sha256(model))
        self._collect(state, listed, model, witness, exchange, said)
        here = [name for name in roster if name in state.total.arrived]
        if len(here) < max(self._charter.quorum, len(listed or [])):
            return here, "too few masked vectors came"
        self._agree(state, here, exchange)
        if len(state.signatures) < state.agreed.threshold:
            return list(state.signatures), "too few agreed on who is in the sum"
        self._reveal(state, here, exchange)
        try:
            total = state.total.open(state.revealed)
        except MessageError as err:
            return [name for name in state.revealed if name not in state.total.liars], err.message
        finally:
            for name in sorted(state.total.liars):
                self._notify("liar", partner=name, round=number)
        return Summed(from_ring(total), here, said)

    def _begin(self, number: int, attempt: int, roster: list[str], model: str) -> _Attempt:
        keys = {name: self._keys[name] for name in roster}
        envelopes = {name: self._envelopes[name] for name in roster}
        secure = self._charter.secure_aggregation
        assert secure is not None
        assert secure.dimension is not None
        told = Told(
            attempt,
            envelopes,
            threshold_of(len(self._charter.partners), secure.colluding),
            self._charter.quorum,
            self._bits,
            secure.dimension,
        )
        agreed = told.agreement(self._sha256, self._run, number, model, keys)
        return _Attempt(agreed, {"masked": asked_fields(agreed, envelopes), "model_sha256": model}, Sum(agreed))

    def _collect(
        self,
        state: _Attempt,
        listed: list[str] | None,
        model: Arrays,
        witness: Mapping[str, Any],
        exchange: Exchange,
        said: Said,
    ) -> None:
        agreed = state.agreed

        def add(partner: str, reply: Manifest, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
            if listed is not None and partner not in listed:
                return  # it came too late: the others have signed who is in the sum
            try:
                state.total.add(
                    partner, tensors["masked"], sent_from(reply.fields.get("sent")), self._identities[partner]
                )
            except Refused as refused:
                raise MessageError(refused.detail) from refused
            said[partner] = reply.fields

        fields = {name: {"witness": witness[name]} if name in witness else {} for name in agreed.roster}
        told = {"masked": state.fields["masked"]}
        exchange("train", agreed.roster, model, add, {n: {**f, **told} for n, f in fields.items()}, agreed.attempt)

    def _agree(self, state: _Attempt, here: list[str], exchange: Exchange) -> None:
        def signed(partner: str, reply: Manifest, _: object) -> None:
            try:
                signature = base64.b64decode(str(reply.fields.get("signature", "")), validate=True)
                state.total.check_signed(partner, signature, self._identities[partner])
            except Refused as refused:
                raise MessageError(refused.detail) from refused
            state.signatures[partner] = signature

        told = {**state.fields, "words": by_name(state.total.words())}
        exchange("agree", here, {}, signed, dict.fromkeys(here, told), state.agreed.attempt)

    def _reveal(self, state: _Attempt, here: list[str], exchange: Exchange) -> None:
        def take(partner: str, reply: Manifest, _: object) -> None:
            state.revealed[partner] = revealed_from(reply.fields.get("revealed"))

        told = {**state.fields, "signatures": by_name(state.signatures)}
        fields = {name: {**told, "shares": by_name(state.total.shares(name))} for name in here}
        exchange("reveal", here, {}, take, fields, state.agreed.attempt)
