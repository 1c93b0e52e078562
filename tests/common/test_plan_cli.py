"""What `hansa plan --ledger` counts: one budget, whole, and runs by charter and name."""

from __future__ import annotations

from pathlib import Path

import pytest

from hansa.common import plan_cli
from hansa.common.accounting import Budget, PrivacyEvent
from hansa.common.errors import LedgerError
from hansa.common.ledger import UNDISCLOSED, Entry

BUDGET = Budget.create(1.0, 1e-4)
EVENT = PrivacyEvent(1.0, 20.0, 2)
ITEM = {"purpose": "train", "count": 3, "event": EVENT.to_fields()}


def entry(seq: int, kind: str, body: dict, charter: str | None = None) -> Entry:
    return Entry(seq, "2026-01-01T00:00:00Z", kind, charter, body, None, b"", "", "")


def taken(*entries: Entry) -> tuple[Budget, list[PrivacyEvent], list[PrivacyEvent]]:
    return plan_cli._taken(Path("l.jsonl"), list(entries), BUDGET)


def test_two_coordinators_may_call_their_runs_the_same() -> None:
    _, spent, held = taken(
        entry(0, "hold", {"run_id": "a", "plan": [ITEM]}, "one"),
        entry(1, "hold", {"run_id": "a", "plan": [ITEM]}, "two"),
        entry(2, "debit", {"run_id": "a", "purpose": "train", "event": EVENT.to_fields()}, "one"),
        entry(3, "release", {"run_id": "a"}, "one"),
    )
    assert spent == [EVENT]
    assert held == [PrivacyEvent(1.0, 20.0, 6)]  # of the other, which is still open


def test_what_would_be_miscounted_is_refused() -> None:
    with pytest.raises(LedgerError, match="not disclosed"):
        taken(entry(0, UNDISCLOSED, {}))
    one, two = (entry(n, "dataset", {"dataset": str(n), "lineage": str(n)}) for n in (0, 1))
    assert taken(one) == (BUDGET, [], [])
    with pytest.raises(LedgerError, match="several budgets"):
        taken(one, two)
