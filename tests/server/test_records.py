"""The coordinator's own words, in the form that docs/ledger-format.md gives them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hansa.common.ledger import Ledger
from hansa.server.records import Answer, LedgerRecords
from support import identity

CHARTER = "c" * 64


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "l", identity("coordinator"), {"owner": "coordinator"})
    made.append("charter", {"name": "c"}, charter=CHARTER)
    yield made
    made.close()


def test_what_is_written(ledger: Ledger) -> None:
    records = LedgerRecords(ledger, CHARTER)
    assert records.run("r") is None
    records.asked("r", 1, "train", {"ada": ("q", "a" * 64)})
    ok, late = Answer("q", "ok", "b" * 64, "not recorded"), Answer("q2", "timeout")
    records.answered("r", 1, "train", {"ada": ok, "ben": late})
    records.round("r", 1, "d" * 64, ["ada"], {"auc": 0.1 + 0.2, "accuracy": 1})
    head = records.close("r", 1, "d" * 64, "completed")
    at = {"run_id": "r", "round": 1, "purpose": "train"}
    assert [(e.type, e.body) for e in ledger.entries[2:]] == [
        ("run", {"run_id": "r"}),
        ("ask", {**at, "requests": {"ada": {"request_id": "q", "request_sha256": "a" * 64}}}),
        (
            "answers",
            {
                **at,
                "replies": {
                    "ada": {"request_id": "q", "outcome": "ok", "reply_sha256": "b" * 64},
                    "ben": {"request_id": "q2", "outcome": "timeout", "reply_sha256": None},
                },
            },
        ),
        (
            "round",
            {
                "run_id": "r",
                "round": 1,
                "model_sha256": "d" * 64,
                "partners": ["ada"],
                "metrics": {"auc": "0.30000000000000004", "accuracy": "1.0"},
            },
        ),
        ("close", {"run_id": "r", "rounds": 1, "model_sha256": "d" * 64, "why": "completed"}),
    ]
    assert {e.charter for e in ledger.entries[1:]} == {CHARTER}
    assert head == {"length": ledger.length, "root": ledger.root}


def test_what_a_resumed_run_says_again_stands_once(ledger: Ledger) -> None:
    records = LedgerRecords(ledger, CHARTER)
    for _ in range(2):
        assert records.run("r") is None
        records.round("r", 1, "d" * 64, [], {})
    heads = [records.close("r", 1, "d" * 64, "completed") for _ in range(2)]
    assert heads[0] == heads[1]
    assert records.run("r") == "completed"
    assert records.run("r2") is None
    assert [e.type for e in ledger.entries[2:]] == ["run", "round", "close", "run"]


def test_a_run_needs_its_charter(ledger: Ledger) -> None:
    with pytest.raises(AssertionError, match="recorded first"):
        LedgerRecords(ledger, "d" * 64).run("r")


def test_runs_of_the_same_name_under_two_charters_are_two(ledger: Ledger) -> None:
    ledger.append("charter", {"name": "d"}, charter="d" * 64)
    one, other = LedgerRecords(ledger, CHARTER), LedgerRecords(ledger, "d" * 64)
    assert one.run("r") is None
    one.close("r", 0, None, "refused")
    assert other.run("r") is None
    assert one.run("r") == "refused"
