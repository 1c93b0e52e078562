"""What the verifier fixes when it is imported: limits, tables of fields, defaults (docs/mutation-testing.md)."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from hansa.common import privacy_loss, verifier
from hansa.common.verifier import (
    Account,
    Book,
    Coordinator,
    Entry,
    Odometer,
    Partner,
    Population,
    Reading,
    Report,
    Statement,
    Witnesses,
)

sys.path.insert(0, str(Path(__file__).parent))
from bundles import identity
from test_verifier import COORD, P0, SMALL, C, fresh
from test_verifier_mutants import HELD, bad, terms_of

MIB = 2**20

# -- what a reader takes: docs/ledger-format.md, "Limits of our reader" --------------------------------------


def test_a_line_has_8_mib_and_a_whole_file_64(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * 8 * MIB + b"\n")
    assert [len(line) for line in verifier._lines(tmp_path, "file")] == [8 * MIB]
    (tmp_path / "file").write_bytes(b"x" * (8 * MIB + 1) + b"\n")
    with bad("torn", "longer than any line"):
        list(verifier._lines(tmp_path, "file"))
    with (tmp_path / "file").open("wb") as file:
        file.truncate(64 * MIB)
    assert len(verifier._read(tmp_path, "file")) == 64 * MIB
    with (tmp_path / "file").open("wb") as file:
        file.truncate(64 * MIB + 1)
    with bad("file", "is larger than 67108864 bytes"):
        verifier._read(tmp_path, "file")


def test_1000_violations_and_1000_warnings_are_listed() -> None:
    report = Report()
    for number in range(1100):
        report.wrong("record", "x", number, "y")
        report.warn("tail", "x", number, "y")
    for found in (report.violations, report.warnings):
        assert [one["line"] for one in found] == [*range(1000), None]
        assert found[-1]["code"] == "more"


def test_a_ledger_has_2000_different_events() -> None:
    partner = Partner(Report(), terms_of(SMALL), P0)
    for number in range(2000):
        partner._remember((0.5, 1.0 + number, 1))
    with bad("more", "more than 2000 different events"):
        partner._remember((0.25, 1.0, 1))
    partner._remember((0.5, 2000.0, 7))


def test_1000_files_of_a_folder_are_compared(tmp_path: Path) -> None:
    made = fresh(SMALL)
    folder, given = made.write(tmp_path / "b"), tmp_path / "given"
    given.mkdir()
    first = (folder / COORD).read_bytes().splitlines(keepends=True)[0]
    terms = terms_of(SMALL)
    book = Coordinator(Report(), terms)
    book.read(folder)
    for number in range(1000):
        (given / f"{number:04d}.jsonl").write_bytes(first)
    (given / "something else").write_bytes(b"no ledger")
    others = Witnesses(report := Report(), terms, {C: book})
    others.read_given(given)
    assert (others.used, report.violations) == (1000, [])
    (given / "one more").write_bytes(first)
    assert others.worthless == []
    others.read_given(given)
    assert "more than 1000 files" in str(others.worthless[0][1])
    assert others.used == 1000


def test_beyond_a_cap_is_a_billionth_more() -> None:
    """The figure of docs/ledger-format.md; that it is applied wherever a cap is, is tested elsewhere by its name."""
    partner = Partner(Report(), replace(terms_of(SMALL), epsilon=2.0), P0)
    assert not partner._too_dear(2.0 * (1 + 0.9e-9))
    assert partner._too_dear(2.0 * (1 + 1.1e-9))


def test_numbers_of_a_result_agree_to_a_millionth() -> None:
    """As the same document says: also where nothing else is asked for."""
    for off, found in ((0.9e-6, 0), (1.1e-6, 1)):
        report = Report()
        verifier._compare(report, "x", 5.0 * (1 + off), 5.0)
        assert len(report.violations) == found
        assert verifier._same(5.0 * (1 + off), 5.0) is not bool(found)
    for off, same in ((1.9e-3, True), (2.1e-3, False)):
        assert verifier._same(5.0 * (1 + off), 5.0, verifier.ODOMETERS) is same


# -- how long an audit takes ----------------------------------------------------------------------------------


HARD = {(0.1, 3.0): 60}


def test_one_history_is_composed_up_to_two_million_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where epsilon goes on moving: the last composition is the finest that 2^21 cells allow, by halves."""
    asked: list[float] = []

    def at(events: Any, delta: float, interval: float) -> float:
        asked.append(interval)
        return 100.0 * 0.5 ** len(asked)  # it never settles

    monkeypatch.setattr(Odometer, "at", staticmethod(at))
    odometer = Odometer()
    _, interval, moved = odometer._refined(HARD, 1e-5, 0.0)
    assert moved > 0
    assert interval == asked[-1]
    assert MIB < odometer._width(HARD, 1e-5) / interval <= 2 * MIB
    assert odometer.work - odometer.left < 4 * MIB + len(asked) * 2**14


def test_a_whole_audit_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 2^28 cells in all, about two minutes: here some forty histories, however many a bundle has."""
    monkeypatch.setattr(Odometer, "at", staticmethod(lambda events, delta, interval: 1e-3 + interval))
    odometer, composed = Odometer(), 0
    while not odometer.read((((0.1, 3.0), 60 + composed),), 1e-5, 1e-6).plain:
        composed += 1
        assert composed < 100
    width = odometer._width({(0.1, 3.0): 60 + composed // 2}, 1e-5)
    assert composed * width / 1e-6 == pytest.approx(2**28, rel=0.2)


@pytest.mark.parametrize(
    "get",
    [
        lambda: verifier._public(identity(P0).key),
        lambda: verifier._binomials(31),
        lambda: verifier._renyi(0.123, 4.5, 7),
        lambda: verifier._prices(0.123, 4.5, (2, 7)),
        lambda: verifier.filter_epsilon(HELD, (((0.123, 4.5), 7),)),
    ],
    ids=["key", "binomials", "renyi", "prices", "filter"],
)
def test_what_was_worked_out_is_kept(get: Callable[[], object]) -> None:
    """Each key signs thousands of entries, and thousands of debits cost the same: none of it is worked out anew."""
    assert get() is get()


# -- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [5e-324, 2.2250738585072014e-308, 1e-78, 0.1, 1.0, 1e300, sys.float_info.max])
def test_every_float_is_summed_exactly(value: float) -> None:
    """As a whole number of parts, so that a sum is the same in any order."""
    assert verifier._exact(value) / verifier._UNIT == value
    assert verifier._exact(value) - verifier._exact(-value) == 2 * verifier._exact(value) > 0


def test_an_exact_reading_is_not_coarse() -> None:
    """Nothing was rounded or discretised, and it is no plain bound; a plain one has no interval to read others at."""
    exact = Odometer().read((((1.0, 20.0), 2),), 1e-5)
    assert 0 < exact.epsilon < 1
    assert (exact.rounded, exact.plain, exact.interval) == (0.0, False, 0.0)
    assert Odometer().read((), 1e-5) == Reading(0.0, 0.0, False, 0.0)
    used_up = Odometer()
    used_up.left = 0
    plain = used_up.read((((0.1, 3.0), 60),), 1e-5)
    assert (plain.rounded, plain.plain, plain.interval) == (0.0, True, 0.0)


def test_an_event_counts_once_unless_said() -> None:
    one, told = verifier.Total(HELD), verifier.Total(HELD)
    one.add((1.0, 20.0, 2))
    told.add((1.0, 20.0, 2), 1)
    assert one.epsilon() == told.epsilon() > 0
    spent: Counter[verifier.Kind] = Counter()
    verifier._charge(spent, (1.0, 20.0, 2))
    assert spent == {(1.0, 20.0): 2}


def test_the_orders_of_both_odometers() -> None:
    """Where nothing is composed both say the least of the same plain bounds. With 511 for 512 some small ones differ
    by half, and an honest result.json would be refused."""
    assert verifier.ORDERS == privacy_loss._ORDERS


# -- what nobody may change --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "field"),
    [
        (HELD, "epsilon"),
        (Reading(0.5), "epsilon"),
        (Entry(1, "hidden", None), "privacy"),
        (Statement(P0, 1, "r", (P0,), "f"), "root"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_was_verified_is_not_changed_after(one: Any, field: str) -> None:
    """What is remembered and handed to many: a budget's price, a reading, a line whose signature was checked."""
    with pytest.raises(FrozenInstanceError):
        setattr(one, field, None)
    assert one == replace(one)


# -- tables of fields ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("book", "kind", "field"),
    [
        (Partner, "debit", "round"),
        (Partner, "debit", "declared_records"),
        (Partner, "restored", "length"),
        (Partner, "recovered", "torn_bytes"),
        (Coordinator, "round", "round"),
        (Coordinator, "recovered", "torn_bytes"),
        (Population, "round", "round"),
        (Population, "budget", "clients"),
        (Population, "cohort-debit", "round"),
        (Population, "cohort-debit", "declared_records"),
        (Population, "cohort-commit", "round"),
    ],
)
def test_what_is_counted_from_one(book: type[Partner | Coordinator | Population], kind: str, field: str) -> None:
    check = (book.common | book.events)[kind][field]
    assert [bool(check(value)) for value in (-1, 0, 1, 2, True, "1", None)] == [False, False, True, True] + [False] * 3


@pytest.mark.parametrize("kind", ["ask", "answers"])
def test_round_0_opens_a_run(kind: str) -> None:
    check = Coordinator.events[kind]["round"]
    assert [bool(check(value)) for value in (-1, 0, 1)] == [False, True, True]


def test_a_torn_line_is_as_long_as_a_file_can_be() -> None:
    """Not as long as a line may be: it is what a crash left, or something else that was written there."""
    check = Book.common["recovered"]["torn_bytes"]
    assert check(2**63)
    assert not check(2**63 + 1)


def test_lists_of_names() -> None:
    check = Coordinator.events["round"]["partners"]
    for good in (None, [], ["a"], ["a", "b"]):
        assert check(good)
    for wrong in ("ab", {"a": 1}, 7, [7], ["a", None], True, ""):
        with suppress(TypeError):  # of which the reader of an entry makes a violation, too
            assert not check(wrong)


def test_requests_are_some() -> None:
    check = Coordinator.events["ask"]["requests"]
    assert check({"a": {}})
    for wrong in ({}, [], ["a"], "a", None, 7):
        assert not check(wrong)


def test_software_is_a_text_or_an_object() -> None:
    check = Book.common["genesis"]["software"]
    for good in ("hansa 1", {"hansa": "1"}, {}):
        assert check(good)
    for wrong in (None, 7, ["hansa"], "x" * 10_001):
        assert not check(wrong)


def test_a_refusal_is_of_a_round_or_of_a_run() -> None:
    check = Partner.events["refuse"]["round"]
    for good in (None, 0, 1, -1, 10**30):  # a refused request may have asked for any
        assert check(good)
    for wrong in ("1", True, [], {}):
        assert not check(wrong)


def test_a_ledger_holds_no_floats() -> None:
    """Reals are decimal strings; result.json alone may have JSON's."""
    for data in (b'{"a":0.5}', b"[1e3]", b"-0.0"):
        with bad("layout", "has no place here"):
            verifier._canonical(data)
        assert verifier._json(data, floats=True) is not None


# -- defaults ------------------------------------------------------------------------------------------------------


def test_a_cost_is_the_tight_one_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients' histories, too, are over the charter's cap only where the tight epsilon is."""
    monkeypatch.setattr(Odometer, "at", staticmethod(lambda events, delta, interval: 0.05))
    terms, history = replace(terms_of(SMALL), epsilon=0.01, delta=1e-5), tuple(HARD.items())
    plain = verifier._plain(history, 1e-5)[0]
    assert plain > 0.05
    for book in (Partner(Report(), terms, P0), Population(Report(), terms)):
        assert book._cost(None, history) == 0.05
        assert book._cost(None, history, tight=False) == plain


def test_a_statement_names_its_line() -> None:
    """A checkpoint's file is one line."""
    assert Statement(P0, 1, "r", (P0,), "closing/run-1.json").source == "closing/run-1.json:1"
    assert Statement(P0, 1, "r", (P0,), "heads/x.jsonl", 7).source == "heads/x.jsonl:7"


def test_a_lineage_begins_with_nothing() -> None:
    account = Account()
    for own in (True, False):
        assert account.pools[own] == {}
    assert (account.budget, account.budget_own, account.used) == (None, False, False)
