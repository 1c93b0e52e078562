"""What the coordinator writes down: every request before it is sent, every answer before it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..common.identity import real
from ..common.ledger import Entry, Ledger


@dataclass(frozen=True)
class Answer:
    """What came of one request: "ok", "refused: <reason>", "timeout" or "invalid"."""

    request_id: str
    outcome: str
    reply_sha256: str | None = None
    detail: str = ""


class Records(Protocol):
    """How a run is recorded; each call returns when the entry is on disk."""

    def run(self, run_id: str) -> str | None:
        """A run begins, or goes on. Returns why it was closed; None while it is open."""

    def asked(
        self,
        run_id: str,
        round_number: int,
        purpose: str,
        requests: Mapping[str, tuple[str, str]],
        attempt: int | None = None,
    ) -> None:
        """Requests are about to be sent: partner -> (request id, manifest hash)."""

    def answered(
        self,
        run_id: str,
        round_number: int,
        purpose: str,
        replies: Mapping[str, Answer],
        attempt: int | None = None,
    ) -> None:
        """All answers that will count are in."""

    def attempts(self, run_id: str) -> dict[tuple[int, str, int], list[str]]:
        """What was asked under secure aggregation: (round, purpose, attempt) -> of whom."""

    def round(
        self,
        run_id: str,
        round_number: int,
        model_sha256: str,
        partners: list[str] | None,
        metrics: Mapping[str, float],
    ) -> None:
        """A round is complete; said again after a crash, it is recorded once."""

    def close(self, run_id: str, rounds: int, model_sha256: str | None, why: str) -> dict[str, Any]:
        """The run is over; this ledger's length and root after that."""


class LedgerRecords:
    """Records of the runs under one charter, in the coordinator's own ledger; other charters' entries are not looked at."""

    def __init__(self, ledger: Ledger, charter_sha256: str) -> None:
        self._ledger = ledger
        self._charter = charter_sha256

    def run(self, run_id: str) -> str | None:
        """See `Records`."""
        if not self._of("charter"):
            raise AssertionError("the charter is recorded first")
        if not any(e.body["run_id"] == run_id for e in self._of("run")):
            self._append("run", {"run_id": run_id})
        return next((e.body["why"] for e in self._of("close") if e.body["run_id"] == run_id), None)

    def asked(
        self,
        run_id: str,
        round_number: int,
        purpose: str,
        requests: Mapping[str, tuple[str, str]],
        attempt: int | None = None,
    ) -> None:
        """See `Records`."""
        named = {name: {"request_id": rid, "request_sha256": digest} for name, (rid, digest) in requests.items()}
        body = {"run_id": run_id, "round": round_number, "purpose": purpose, "requests": named}
        self._append("ask", body if attempt is None else {**body, "attempt": attempt})

    def answered(
        self,
        run_id: str,
        round_number: int,
        purpose: str,
        replies: Mapping[str, Answer],
        attempt: int | None = None,
    ) -> None:
        """See `Records`."""
        named = {
            name: {"request_id": a.request_id, "outcome": a.outcome, "reply_sha256": a.reply_sha256}
            for name, a in replies.items()
        }
        body = {"run_id": run_id, "round": round_number, "purpose": purpose, "replies": named}
        body |= {} if attempt is None else {"attempt": attempt}
        if not any(e.body == body for e in self._of("answers")[-2:]):  # said again after a crash: once is enough
            # Within an attempt that goes on, the next question takes it to the disk; what was lost with the machine is asked again.
            # What opened the sum is the last of it: a checkpoint follows, which must not know more than the ledger.
            at_once = attempt is None or purpose == "reveal"
            self._ledger.append("answers", body, charter=self._charter, at_once=at_once)

    def attempts(self, run_id: str) -> dict[tuple[int, str, int], list[str]]:
        """See `Records`."""
        found = {}
        for body in (entry.body for entry in self._of("ask")):
            if body["run_id"] == run_id and "attempt" in body:
                found[body["round"], body["purpose"], body["attempt"]] = list(body["requests"])
        return found

    def round(
        self,
        run_id: str,
        round_number: int,
        model_sha256: str,
        partners: list[str] | None,
        metrics: Mapping[str, float],
    ) -> None:
        """See `Records`."""
        if any((e.body["run_id"], e.body["round"]) == (run_id, round_number) for e in self._of("round")):
            return
        self._append(
            "round",
            {
                "run_id": run_id,
                "round": round_number,
                "model_sha256": model_sha256,
                "partners": partners,
                "metrics": {name: real(value) for name, value in metrics.items()},
            },
        )

    def close(self, run_id: str, rounds: int, model_sha256: str | None, why: str) -> dict[str, Any]:
        """See `Records`."""
        if not any(e.body["run_id"] == run_id for e in self._of("close")):
            self._append("close", {"run_id": run_id, "rounds": rounds, "model_sha256": model_sha256, "why": why})
        return self._ledger.head()

    def _append(self, kind: str, body: Mapping[str, Any]) -> None:
        self._ledger.append(kind, body, charter=self._charter)

    def _of(self, kind: str) -> list[Entry]:
        return [entry for entry in self._ledger.of(kind) if entry.charter == self._charter]
