"""What the coordinator writes down: every request before it is sent, every answer before it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..common.identity import real
from ..common.ledger import Ledger


@dataclass(frozen=True)
class Answer:
    """What came of one request: "ok", "refused: <reason>", "timeout" or "invalid"."""

    request_id: str
    outcome: str
    reply_sha256: str | None = None
    detail: str = ""


class Records(Protocol):
    """How a run is recorded; each call returns when the entry is on disk."""

    def run(self, run_id: str, charter_sha256: str) -> str | None:
        """A run begins, or goes on. Returns why it was closed; None while it is open."""

    def asked(self, run_id: str, round_number: int, purpose: str, requests: Mapping[str, tuple[str, str]]) -> None:
        """Requests are about to be sent: partner -> (request id, manifest hash)."""

    def answered(self, run_id: str, round_number: int, purpose: str, replies: Mapping[str, Answer]) -> None:
        """All answers that will count are in."""

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
        """The run is over; this ledger's length and head after that."""


class LedgerRecords:
    """Records in the coordinator's own ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def run(self, run_id: str, charter_sha256: str) -> str | None:
        """See `Records`."""
        if not any(e.body["charter_sha256"] == charter_sha256 for e in self._ledger.of("charter")):
            raise AssertionError("the charter is recorded first")
        if not any(e.body["run_id"] == run_id for e in self._ledger.of("run")):
            self._ledger.append("run", {"run_id": run_id, "charter_sha256": charter_sha256})
        return next((e.body["why"] for e in self._ledger.of("close") if e.body["run_id"] == run_id), None)

    def asked(self, run_id: str, round_number: int, purpose: str, requests: Mapping[str, tuple[str, str]]) -> None:
        """See `Records`."""
        named = {name: {"request_id": rid, "request_sha256": digest} for name, (rid, digest) in requests.items()}
        self._ledger.append("ask", {"run_id": run_id, "round": round_number, "purpose": purpose, "requests": named})

    def answered(self, run_id: str, round_number: int, purpose: str, replies: Mapping[str, Answer]) -> None:
        """See `Records`."""
        named = {
            name: {"request_id": a.request_id, "outcome": a.outcome, "reply_sha256": a.reply_sha256}
            for name, a in replies.items()
        }
        body = {"run_id": run_id, "round": round_number, "purpose": purpose, "replies": named}
        if not any(e.body == body for e in self._ledger.of("answers")[-2:]):  # said again after a crash: once is enough
            self._ledger.append("answers", body)

    def round(
        self,
        run_id: str,
        round_number: int,
        model_sha256: str,
        partners: list[str] | None,
        metrics: Mapping[str, float],
    ) -> None:
        """See `Records`."""
        if any((e.body["run_id"], e.body["round"]) == (run_id, round_number) for e in self._ledger.of("round")):
            return
        self._ledger.append(
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
        if not any(e.body["run_id"] == run_id for e in self._ledger.of("close")):
            self._ledger.append("close", {"run_id": run_id, "rounds": rounds, "model_sha256": model_sha256, "why": why})
        return {"length": self._ledger.length, "head": self._ledger.head}
