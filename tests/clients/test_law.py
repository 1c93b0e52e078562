"""The site's own law can only tighten: whatever it says, a charter's own rules hold as well."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from hansa.clients import law as module
from hansa.clients.gate import Gate
from hansa.common.accounting import Budget, PrivacyEvent
from hansa.common.charter import SignedCharter
from hansa.common.errors import LedgerError, Refusal, Refused
from hansa.common.identity import fingerprint
from support import NO_PRIVACY, SIGMA, Site, Source, charter, digest, forbidden, identity, request


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site("ada", tmp_path, Source())
    made.source.hook = forbidden  # a law never reads data
    yield made
    if made.ledger is not None:
        made.ledger.close()


@contextlib.contextmanager
def refused(reason: Refusal, words: str = "") -> Iterator[None]:
    with pytest.raises(Refused, match=words or None) as caught:
        yield
    assert caught.value.reason is reason


def opened(gate: Gate, signed: SignedCharter, run: str = "run-1") -> None:
    ask = request(signed, "open", 0, run=run)
    gate.open_run(ask, digest(ask))


def train(gate: Gate, signed: SignedCharter, number: int = 1, run: str = "run-1") -> None:
    ask = request(signed, "train", number, run=run)
    gate.debit(ask, digest(ask), "train")


def at(monkeypatch: pytest.MonkeyPatch, clock: str) -> None:
    hour, minute = map(int, clock.split(":"))

    class Clock:
        @staticmethod
        def now(zone: object) -> datetime:
            assert zone is UTC
            return datetime(2026, 11, 25, hour, minute, tzinfo=UTC)

    monkeypatch.setattr(module, "datetime", Clock)


KEY = identity("coordinator").key


@pytest.mark.parametrize(
    ("rules", "change", "reason"),
    [
        ({"tasks": ["digits"]}, {}, Refusal.TASK),
        ({"tasks": ["tiny", "digits"]}, {"task__name": "digits"}, Refusal.TASK),
        ({}, {"task__name": "digits"}, Refusal.TASK),
        ({"coordinators": [identity("eve").key]}, {}, Refusal.COORDINATOR),
        ({"coordinators": [fingerprint(identity("eve").key)]}, {}, Refusal.COORDINATOR),
        ({"minimum_cohort": 3}, {}, Refusal.COHORT),
        ({}, {"privacy": NO_PRIVACY}, Refusal.UNPROTECTED),
    ],
)
def test_what_the_site_does_not_allow_is_refused_run_by_run(
    site: Site, rules: dict[str, Any], change: dict[str, Any], reason: Refusal
) -> None:
    """Not at the charter: the coordinator sees the reason, and the run can be closed with this node's signature."""
    site.rules = rules
    signed = charter(**change)
    gate = site.gate(signed)
    with refused(reason):
        opened(gate, signed)
    assert site.kinds() == ["genesis", "dataset", "charter"]
    assert gate.close_run("run-1", signed.sha256)["length"] == 3


@pytest.mark.parametrize(
    "rules",
    [
        {"tasks": ["tiny", "digits"]},
        {"coordinators": [KEY]},
        {"coordinators": [fingerprint(identity("eve").key), fingerprint(KEY)]},
        {"minimum_cohort": 2},
        {"epsilon_cap": 2.0},
    ],
)
def test_what_the_site_allows(site: Site, rules: dict[str, Any]) -> None:
    site.rules = rules
    gate = site.gate(charter())
    opened(gate, charter())
    train(gate, charter())


@pytest.mark.parametrize(
    "rules", [{"epsilon_cap": 100.0}, {"minimum_cohort": 1}, {"allow_unprotected": True}, {"tasks": ["tiny"]}, {}]
)
def test_no_rule_loosens_a_charter(site: Site, rules: dict[str, Any]) -> None:
    """The most generous site still holds every charter to its own cap, plan, key and expiry."""
    site.rules = rules
    poor = charter(name="poor", privacy__epsilon=0.01)
    gate = site.gate(poor, charter())
    with refused(Refusal.BUDGET, "cap 0.01"):
        opened(gate, poor)
    opened(gate, charter())
    for number in (1, 2, 3):
        train(gate, charter(), number)
    with refused(Refusal.NOT_HELD):
        train(gate, charter(), 4)


def test_law_that_became_stricter_holds_for_runs_that_are_open(site: Site) -> None:
    signed = charter()
    opened(site.gate(signed), signed)
    site.rules = {"minimum_cohort": 3}
    gate = site.gate(signed)
    with refused(Refusal.COHORT):
        train(gate, signed)
    gate.close_run("run-1", signed.sha256)
    assert site.kinds()[-1] == "release"


# -- the site's cap --------------------------------------------------------------------------------------------------


def test_the_sites_cap_is_over_everything_spent_and_held_under_all_charters(site: Site) -> None:
    one_run, two_runs = ([PrivacyEvent(1.0, SIGMA, n)] for n in (3, 6))
    cap = Budget.create(2.0, 1e-3).spent(one_run) + 0.01
    assert Budget.create(cap, 1e-3).admits(one_run)
    assert not Budget.create(cap, 1e-3).admits(two_runs)
    site.rules = {"epsilon_cap": cap}
    signed, other = charter(), charter(name="other")
    gate = site.gate(signed, other)
    opened(gate, signed)
    with refused(Refusal.BUDGET, "this site's own cap"):
        opened(gate, other, "held")
    train(gate, signed)
    gate.close_run("run-1", signed.sha256)
    for fresh in site.and_after_a_restart(gate, signed, other):
        with refused(Refusal.BUDGET, "this site's own cap"):
            opened(fresh, other, "spent")
    site.rules = {}
    opened(site.gate(signed, other), other, "without a cap of the site")


def test_a_refusal_of_the_cap_fixes_no_budget_and_tells_nothing_of_others(site: Site) -> None:
    site.rules = {"epsilon_cap": 0.01}
    gate = site.gate(charter())
    with pytest.raises(Refused) as caught:
        opened(gate, charter())
    assert site.kinds() == ["genesis", "dataset", "charter"]
    assert caught.value.detail == (
        "what is left of this site's own cap does not pay for this run; cap 0.01 (delta 0.001, record level, filter)"
    )


# -- hours -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("20:00-06:00", ["20:00", "23:59", "00:00", "05:59"], ["19:59", "06:00", "12:00"]),
        ("08:30-17:00", ["08:30", "16:59"], ["08:29", "17:00", "00:00", "23:59"]),
        ("23:59-00:00", ["23:59"], ["23:58", "00:00", "12:00"]),
    ],
)
def test_hours_in_utc(
    site: Site, monkeypatch: pytest.MonkeyPatch, hours: str, inside: list[str], outside: list[str]
) -> None:
    site.rules = {"hours": hours}
    signed = charter(evaluation={"kind": "public"}, privacy__noise_multiplier=40.0)  # the budget pays for many runs
    gate = site.gate(signed)
    ask = request(signed, "evaluate", 1)
    at(monkeypatch, inside[0])
    opened(gate, signed)
    for clock in outside:
        at(monkeypatch, clock)
        for step in (
            lambda: opened(gate, signed, "run-2"),
            lambda: train(gate, signed),
            lambda: gate.admit_public(ask, digest(ask)),
        ):
            with refused(Refusal.HOURS, hours):
                step()
    for number, clock in enumerate(inside):
        at(monkeypatch, clock)
        opened(gate, signed, f"in-{number}")


# -- the steward -----------------------------------------------------------------------------------------------------


def test_an_unapproved_run(site: Site) -> None:
    site.rules = {"approval": True}
    signed, other = charter(), charter(name="other")
    gate = site.gate(signed, other)
    with refused(Refusal.NOT_APPROVED):
        opened(gate, signed)
    site.control.approve("run-2", signed.sha256)
    with refused(Refusal.NOT_APPROVED):
        opened(gate, signed)
    with refused(Refusal.NOT_APPROVED):
        opened(gate, other, "run-2")  # the name is approved under one charter: another coordinator may choose it too
    opened(gate, signed, "run-2")
    train(gate, signed, 1, "run-2")
    site.control.approve("../paused", signed.sha256)
    assert not site.control.paused(), "a run's name is no path"
    opened(gate, signed, "../paused")


def test_a_name_approved_under_another_charter_keeps_the_first_approval(site: Site) -> None:
    site.rules = {"approval": True}
    signed, other = charter(), charter(name="other")
    gate = site.gate(signed, other)
    site.control.approve("run-1", signed.sha256)
    opened(gate, signed)
    site.control.approve("run-1", other.sha256)
    train(gate, signed)  # the run goes on
    assert site.control.approved("run-1", other.sha256)


def test_a_damaged_approval_is_none(site: Site) -> None:
    site.rules = {"approval": True}
    gate = site.gate(charter())
    site.control.approve("run-1", charter().sha256)
    (file,) = (site.folder / "control" / "approved").iterdir()
    for bad in (b"", b"{}", b"true", b'{"run_id": "run-1"}', b"\xff"):
        file.write_bytes(bad)
        with refused(Refusal.NOT_APPROVED):
            opened(gate, charter())


def test_approval_that_was_demanded_later_holds_for_open_runs(site: Site) -> None:
    opened(site.gate(charter()), charter())
    site.rules = {"approval": True}
    gate = site.gate(charter())
    with refused(Refusal.NOT_APPROVED):
        train(gate, charter())
    site.control.approve("run-1", charter().sha256)
    train(gate, charter())


def test_paused_while_running(site: Site) -> None:
    signed = charter(evaluation={"kind": "public"})
    gate = site.gate(signed)
    opened(gate, signed)
    ask = request(signed, "train", 1)
    gate.debit(ask, digest(ask), "train")
    gate.commit(ask, digest(ask), digest("r"), public=False)
    pending = request(signed, "train", 2)
    gate.debit(pending, digest(pending), "train")
    site.control.pause()
    public = request(signed, "evaluate", 1)
    for step in (
        lambda: opened(gate, signed, "run-2"),
        lambda: train(gate, signed, 3),
        lambda: gate.debit(pending, digest(pending), "train"),
        lambda: gate.admit_public(public, digest(public)),
    ):
        with refused(Refusal.PAUSED):
            step()
    assert gate.debit(ask, digest(ask), "train") == digest("r"), (
        "what was committed may have left: it is answered as it was"
    )
    site.control.resume()
    site.control.resume()
    assert gate.debit(pending, digest(pending), "train") is None
    site.control.pause()
    gate.close_run("run-1", signed.sha256)
    assert site.kinds()[-1] == "release"


def test_a_withdrawn_charter_gets_nothing_more_and_its_holds_come_free(site: Site) -> None:
    signed, other = charter(), charter(name="other")
    gate = site.gate(signed, other)
    opened(gate, signed)
    train(gate, signed)
    opened(gate, other, "run-2")
    site.control.withdraw(signed.sha256)
    with refused(Refusal.WITHDRAWN):
        train(gate, signed, 2)
    released = [(e.body["run_id"], e.body["why"]) for e in gate.ledger.of("release")]
    assert released == [("run-1", "cancelled")]
    train(gate, other, 1, "run-2")
    with refused(Refusal.WITHDRAWN):
        opened(gate, signed, "run-3")
    before = gate.ledger.length
    assert gate.close_run("run-1", signed.sha256)["length"] == before, "closed and countersigned all the same"
    assert len(gate.spent()) == 2, "what was spent stays spent"


def test_withdrawn_from_all_for_good_also_from_charters_to_come(site: Site) -> None:
    signed = charter()
    opened(site.gate(signed), signed)
    site.control.withdraw()
    later = charter(name="later")
    gate = site.gate(signed, later)
    assert [e.body["why"] for e in gate.ledger.of("release")] == ["cancelled"], "at the next start"
    site.control.resume()
    for one in (signed, later):
        with refused(Refusal.WITHDRAWN):
            opened(gate, one, "run-2")


def test_a_folder_that_cannot_be_read_is_no_permission(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = site.gate(charter())

    def denied(_: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(PermissionError):
        opened(gate, charter())


def test_a_restored_node_holds_and_debits_nothing_and_states_no_old_head(site: Site) -> None:
    signed = charter()
    gate = site.gate(signed)
    opened(gate, signed)
    marker, length = site.control.restored, gate.ledger.length
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(f'{{"length": {length}}}')
    for _ in range(2):  # starts
        gate = site.gate(signed)
        assert [e.body for e in gate.ledger.of("restored")] == [{"length": length}]
        for step in (lambda g=gate: opened(g, signed, "run-2"), lambda g=gate: train(g, signed)):
            with refused(Refusal.RESTORED, "exhausted"):
                step()
    assert gate.close_run("another", signed.sha256)["length"] == length + 1
    marker.write_text(f'{{"length": {length + 2}}}')
    with pytest.raises(LedgerError, match="was not finished"):
        site.gate(signed)
