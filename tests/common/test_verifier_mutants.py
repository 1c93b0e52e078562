"""What mutation testing found that no other test of the verifier notices (docs/mutation-testing.md)."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from scipy.special import erfc, erfcx
from scipy.stats import norm

from hansa.common import accounting, verifier
from hansa.common.identity import Envelope, canonical, public_pem, write_envelope
from hansa.common.verifier import (
    SLACK,
    Account,
    Bad,
    Budget,
    Entry,
    Odometer,
    Partner,
    Population,
    Reading,
    Report,
    Run,
    Terms,
    Total,
    Unreadable,
    filter_epsilon,
    verify_bundle,
)

sys.path.insert(0, str(Path(__file__).parent))
from bundles import NONE, OTHER, Draft, Item, Kept, Shape, dataset, digest, honest, identity, result_for
from test_verifier import (
    CLIENTS,
    COORD,
    FULL,
    L0,
    P0,
    P1,
    PLAIN,
    PRIVATE,
    SMALL,
    TWO_RUNS,
    C,
    Lie,
    again,
    change,
    declare,
    found_of,
    fresh,
    header,
    verdict_of,
    without,
)

GAUSSIAN = {"mechanism": "poisson-gaussian/1", "q": "1.0", "sigma": "20.0", "steps": 2}
HELD = Budget(1.0, 1e-5, ((8, 1e-6), (16, 2e-6)), 6e-6)
EARLY = "2026-11-22T01:50:00Z"


def terms_of(shape: Shape, damage: Callable[[dict[str, Any]], Any] = lambda c: None) -> Terms:
    """The terms of a charter, after something in it was changed."""
    charter = json.loads(fresh(shape).signed.payload)
    damage(charter)
    return Terms.parse(canonical(charter))


@contextmanager
def bad(code: str, words: str = "") -> Iterator[None]:
    """What must be refused with this code, for this reason."""
    with pytest.raises(Bad) as caught:
        yield
    assert caught.value.code == code
    assert words in str(caught.value)


def places(verdict: dict[str, Any], which: str = "violations") -> set[tuple[str, str, int | None]]:
    return {(v["code"], v["file"], v["line"]) for v in verdict[which]}


def test_a_budget_at_another_cap_keeps_the_parts_of_its_branches() -> None:
    """What a charter's own debits cost is read at its own ε and δ, with the branches of the lineage's budget."""
    budget = Budget(1.0, 1e-5, ((2, 1e-6), (8, 2e-6), (16, 3e-6)), 4e-6)
    assert budget.at(1.0, 1e-5) is budget
    for epsilon, delta in ((2.0, 1e-5), (1.0, 1e-3), (8.0, 1e-9)):
        made = budget.at(epsilon, delta)
        assert (made.epsilon, made.delta) == (epsilon, delta)
        assert [order for order, _ in made.orders] == [2, 8, 16]
        assert [share / delta for _, share in made.orders] == pytest.approx([0.1, 0.2, 0.3])
        assert made.gaussian_delta / delta == pytest.approx(0.4)
    tiny = budget.at(1.0, 1e-300)
    assert min(tiny.gaussian_delta, *(share for _, share in tiny.orders)) >= 1e-300


def test_each_branch_of_a_budget_at_another_cap_decides() -> None:
    """Both accountants agree on histories where an order and where the Gaussian branch is the better one."""
    budget = Budget(1.0, 1e-5, ((2, 1e-6), (8, 2e-6), (16, 3e-6)), 4e-6).at(3.0, 1e-4)
    other = accounting.Budget(3.0, 1e-4, budget.orders, budget.gaussian_delta)
    for q, sigma, steps in ((1.0, 5.0, 10), (1.0, 1.0, 1), (0.01, 0.8, 1000), (0.1, 1.5, 200), (0.5, 30.0, 5000)):
        spent = other.spent([accounting.PrivacyEvent(q, sigma, steps)])
        assert filter_epsilon(budget, (((q, sigma), steps),)) == pytest.approx(spent, rel=1e-6)  # the filter rounds up
        assert math.isfinite(spent)


@pytest.mark.parametrize("sigma", [1e4, 1e6, 1e9])
def test_what_hardly_differs_costs_hardly_anything(sigma: float) -> None:
    """Where δ covers all of it ε is 0, and noise beyond all measure divides nothing by 0."""
    wide = Budget(1.0, 0.5, ((2, 1e-300), (8, 1e-300)), 0.4)
    assert filter_epsilon(wide, (((1.0, sigma), 1),)) == 0.0
    narrow = Budget(1.0, 1e-5, ((2, 1e-6), (8, 2e-6), (16, 3e-6)), 4e-6)
    other = accounting.Budget(1.0, 1e-5, narrow.orders, narrow.gaussian_delta)
    spent = other.spent([accounting.PrivacyEvent(1.0, sigma, 100)])
    assert filter_epsilon(narrow, (((1.0, sigma), 100),)) == pytest.approx(spent, rel=1e-5, abs=2e-6)


# -- what is shown, and files ---------------------------------------------------------------------------------


def test_what_is_shown_is_cut_at_its_limit_and_marked() -> None:
    for length, file, what in ((300, "f" * 300, "w" * 300), (301, "f" * 300 + "...", "w" * 301)):
        report = Report()
        report.wrong("file", "f" * length, None, "w" * length)
        report.warn("tail", "f" * length, 1, "w" * (length + 200))
        said, warned = report.violations[0], report.warnings[0]
        assert (said["file"], said["what"]) == (file, what)
        assert (warned["file"], warned["what"]) == (file, "w" * 500 + ("..." if length > 300 else ""))
    assert Unreadable("f", 3, "w" * 500).what == "w" * 500
    error = Unreadable("f", 3, "w" * 501)
    assert error.what == "w" * 500 + "..."
    assert str(error) == f"f:3: {error.what}"
    assert str(Unreadable("f", None, "x\x1b")) == "f: x?"
    assert verifier._show("x" * 100) == "'" + "x" * 79


def test_a_link_that_appears_while_it_is_opened_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the opening another program may put a link there."""
    (tmp_path / "there").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.setattr(Path, "is_symlink", lambda _: False)
    with bad("file", "cannot be read"):
        verifier._open(tmp_path, "link")
    with verifier._open(tmp_path, "there") as handle:
        assert handle.read() == b"secret"


def test_files_and_lines_of_exactly_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "MAX_LINE", 8)
    file = tmp_path / "file"
    file.write_bytes(b"12345678")
    assert verifier._read(tmp_path, "file", 8) == b"12345678"
    with bad("file", "is larger than 7 bytes"):
        verifier._read(tmp_path, "file", 7)
    with bad("torn", "its end is missing"):
        list(verifier._lines(tmp_path, "file"))
    file.write_bytes(b"12345678\n\n1\n")
    assert list(verifier._lines(tmp_path, "file")) == [b"12345678", b"", b"1"]
    for line in (b"123456789\n", b"123456789"):
        file.write_bytes(line)
        with bad("torn", "longer than any line"):
            list(verifier._lines(tmp_path, "file"))


def test_a_key_file_is_read_up_to_10_000_bytes(tmp_path: Path) -> None:
    terms, folder = terms_of(SMALL), fresh(SMALL).write(tmp_path / "b")
    pem = public_pem(identity(P0).key)
    for size, code in ((len(pem), None), (10_000, "key"), (10_001, "file")):
        report = Report()
        (folder / f"keys/{P0}.pem").write_bytes(pem.ljust(size, b"\n"))
        verifier._check_keys(folder, report, terms)
        assert [v["code"] for v in report.violations] == ([code] if code else [])


def test_brackets_in_texts_and_sixteen_levels() -> None:
    """What stands within a string nests nothing, whatever it holds."""
    for text in ("[" * 40, "{" * 40, '"[' * 40, "\\" + "[" * 40, "[" * 40 + "\\"):
        assert verifier._json(canonical({"detail": text, text: 1})) == {"detail": text, text: 1}
    for left, right in (("[", "]"), ('{"a":', "}")):
        assert verifier._json((left * 16 + "1" + right * 16).replace("[1]", "[]").encode())
        with bad("layout", "too deeply"):
            verifier._json((left * 17 + "1" + right * 17).encode())
    for data in (b"[1", b"1]", b"[}", b'{"a":[1}'):
        with bad("layout", "do not match"):
            verifier._json(data)


@pytest.mark.parametrize("text", ["YQ", "YQ=", " YQ==", "YQ==\n", "Y\u00e9Q==", "!YQ==", "Y-Q=", "="])
def test_base64_that_is_not_strict_is_no_envelope(text: str) -> None:
    for payload, signature in ((text, "YQ=="), ("YQ==", text)):
        sealed = {"payload": payload, "payloadType": "x", "signatures": [{"keyid": "k", "sig": signature}]}
        with bad("layout", "not a signed envelope"):
            verifier._envelope(sealed, "x")
    for odd in ("YR==", "YWJ="):  # bits that say nothing: another text for the same bytes
        with bad("layout", "unusual layout"):
            verifier._envelope({"payload": odd, "payloadType": "x", "signatures": []}, "x")


# -- kinds of values -----------------------------------------------------------------------------------------


def test_texts_names_and_hashes() -> None:
    """docs/ledger-format.md: names are 1 to 200 of [A-Za-z0-9._:-], SHA-256 is 64 hex digits, others are 32."""
    good: list[tuple[Callable[[Any], bool], list[Any]]] = [
        (verifier._text, ["", "x" * 10_000]),
        (verifier._id, ["x", "aZ09._:-", "x" * 200]),
        (verifier._hex, ["0af9" * 16]),
        (verifier._short_hex, ["0af9" * 8]),
        (verifier._moment, [EARLY]),
    ]
    wrong: dict[Callable[[Any], bool], list[Any]] = {
        verifier._text: ["x" * 10_001],
        verifier._id: ["", "x" * 201, "a b", "a/b", "x\n", "\u00e9", "\u0661"],
        verifier._hex: ["0af9" * 15 + "0af", "0af9" * 16 + "0", "0AF9" * 16, "0afg" * 16, "0af9" * 16 + "\n"],
        verifier._short_hex: ["0af9" * 7 + "0af", "0af9" * 8 + "0", "0AF9" * 8, "0af9" * 16],
        verifier._moment: [EARLY[:-1], EARLY + "\n", EARLY.replace("T", " "), EARLY.replace("2", "\u0662")],
    }
    for check, values in good:
        assert all(check(value) for value in values)
        for value in [*wrong[check], None, 7, True, b"x", ["x"], {}, 1.5]:
            assert not check(value), (check, value)


def test_reals_are_decimal_strings() -> None:
    many = "1" * 40
    for text, number in (("0", 0.0), ("-1.5", -1.5), ("2e-3", 2e-3), ("2e+308", 2e308), (f"{many}.{many}", 1.1111e39)):
        if math.isfinite(number):
            assert verifier._real(text) == pytest.approx(number, rel=1e-4)
    odd = ["", "nan", "inf", "-Infinity", "1e999", " 1", "1 ", "1\n", "+1", ".5", "1.", "1_0", "0x1", "1e1000", "1E5"]
    for value in [*odd, "\u0661", many + "1", "1." + many + "1", "abc", None, 1, 1.5, True, ["1"], {}, b"1"]:
        with bad("layout", "not a finite decimal string"):
            verifier._real(value)
        with bad("layout", "not a finite decimal string"):
            verifier._metrics({"auc": "0.7", "loss": value})
    assert verifier._metrics({"auc": "0.7"})
    assert verifier._metrics({})
    for value in (None, [], ["0.7"], "0.7", 7):
        assert not verifier._metrics(value)


def test_events_at_their_bounds() -> None:
    """0 < q <= 1, sigma from 0.3, at least one step; a sigma above 1e9 is taken for 1e9 (less noise, so no less charge), a q below 1e-30 for that."""
    for q, sigma, steps, taken in (
        ("1", "0.3", 1, (1.0, 0.3, 1)),
        ("1e-30", "1e9", 10**9, (1e-30, 1e9, 10**9)),
        ("1e-31", "1.0", 1, (1e-30, 1.0, 1)),
        ("0.5", "1e300", 2, (0.5, 1e9, 2)),
    ):
        assert verifier._event(GAUSSIAN | {"q": q, "sigma": sigma, "steps": steps}) == taken
    assert verifier._event(NONE) is None
    for fields in (
        {"q": "0"},
        {"q": "-0.1"},
        {"q": "1.0000000000000002"},
        {"sigma": "0.29999999999999993"},
        {"sigma": "-20.0"},
        {"steps": 0},
        {"steps": -1},
        {"steps": 10**9 + 1},
        {"steps": 1.0},
    ):
        with bad("layout"):
            verifier._event(GAUSSIAN | fields)
    for value in (NONE | {"q": "1"}, {}, None, [], "none/1"):
        with bad("unknown", "unknown mechanism"):
            verifier._event(value)


def test_plans_have_one_or_two_items() -> None:
    train = {"purpose": "train", "count": 0, "event": GAUSSIAN}
    both = [train, train | {"purpose": "evaluate", "count": 10**9, "event": NONE}]
    assert verifier._plan(both) == {"train": (0, (1.0, 20.0, 2)), "evaluate": (10**9, None)}
    for plan in ([], [*both, both[0]], {}, None, "x"):
        with bad("layout", "one or two items"):
            verifier._plan(plan)
    for plan in ([train, train], [train | {"count": -1}], [train | {"count": 10**9 + 1}], [train | {"purpose": "x"}]):
        with bad("layout"):
            verifier._plan(plan)
    pair = [GAUSSIAN, 0]
    assert verifier._counted([pair, pair]) == [((1.0, 20.0, 2), 0)] * 2
    assert verifier._counted([]) == []
    for pairs in ([pair] * 3, [[GAUSSIAN]], [[GAUSSIAN, 1, 1]], [[GAUSSIAN, -1]], [[GAUSSIAN, True]], [GAUSSIAN], {}):
        with bad("layout", "header's events"):
            verifier._counted(pairs)


def budget_fields(**other: Any) -> dict[str, Any]:
    return {"epsilon": "1.0", "delta": "0.5", "orders": [[2, "0.25"]], "gaussian_delta": "0.25"} | other


def test_budgets_at_their_bounds() -> None:
    """1 to 5 orders from 2 to 4096; epsilon, delta and shares above 0, delta below 1; the shares sum to at most delta."""
    made = Budget.parse(budget_fields())
    assert (made.epsilon, made.delta, made.orders, made.gaussian_delta) == (1.0, 0.5, ((2, 0.25),), 0.25)
    assert Budget.parse(budget_fields(orders=[[4096, "0.04"]] * 5)).orders == ((4096, 0.04),) * 5
    assert Budget.parse(budget_fields(epsilon="5e-324", delta="0.9999999999999999")).epsilon == 5e-324
    for orders in ([], [[2, "0.01"]] * 6, {}, None):
        with bad("layout", "orders"):
            Budget.parse(budget_fields(orders=orders))
    for order in ([1, "0.1"], [4097, "0.1"], [0, "0.1"], [True, "0.1"], [2.0, "0.1"], ["2", "0.1"], [2], [2, "0.1", 1]):
        with bad("budget", "from 2 to 4096"):
            Budget.parse(budget_fields(orders=[order]))
    for fields in (
        {"epsilon": "0"},
        {"epsilon": "-0.5"},
        {"epsilon": "-1"},
        {"delta": "0"},
        {"delta": "-0.5"},
        {"delta": "1"},
        {"delta": "1.5"},
        {"gaussian_delta": "0"},
        {"gaussian_delta": "-0.5"},
        {"orders": [[2, "0"]]},
        {"orders": [[2, "0.1"], [3, "-0.1"]]},
    ):
        with bad("budget", "must be positive"):
            Budget.parse(budget_fields(**fields))
    for above in ("0.25000000000000006", "0.4"):
        with bad("budget", "sum to more"):
            Budget.parse(budget_fields(gaussian_delta=above))


# -- charters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "damage"),
    [
        (SMALL, lambda c: c.update(expires="2126-10-29T01:50:00")),  # of no time zone; all else is well
        (SMALL, lambda c: c["privacy"].update(delta="1")),
        (SMALL, lambda c: c["privacy"].update(delta="0")),
        (SMALL, lambda c: c["privacy"].update(epsilon="0")),
        (SMALL, lambda c: c["privacy"].update(clip_norm="-0.5")),
        (SMALL, lambda c: c["privacy"].update(noise_multiplier="0")),
        (SMALL, lambda c: c["privacy"].update(clip_norm=None)),
        (PLAIN, lambda c: c["privacy"].update(epsilon="1.0")),
        (SMALL, lambda c: c.update(simulated=1)),
        (SMALL, lambda c: c.update(name=7)),
        (SMALL, lambda c: c.update(name="x" * 10_001)),
        (SMALL, lambda c: c.update(quorum=0)),
        (SMALL, lambda c: c["algorithm"].update(rounds=0)),
        (SMALL, lambda c: c["algorithm"]["local"].update(steps=0)),
        (SMALL, lambda c: c["privacy"].update(unit="client")),
        (SMALL, lambda c: c["evaluation"].update(kind="some")),
        (SMALL, lambda c: c["privacy"].update(kind="central")),
        (CLIENTS, lambda c: c.update(simulated=False)),
        (CLIENTS, lambda c: c["population"].update(clients=0)),
        (CLIENTS, lambda c: c["population"].update(clients=10**6 + 1)),
        (CLIENTS, lambda c: c["population"].update(declared_records=0)),
        (SMALL, lambda c: c["partners"][1].update(declared_records=0)),
        (SMALL, lambda c: c.update(partners=[])),
        (CLIENTS, lambda c: c.update(partners=[{"name": "x", "key": digest("x"), "declared_records": 1}])),
        (SMALL, lambda c: c["partners"][0].update(key=c["partners"][1]["key"])),
        (SMALL, lambda c: c["partners"][0].update(key=c["partners"][0]["key"].upper())),
        (SMALL, lambda c: c["partners"][0].update(name="a" * 64)),
        (SMALL, lambda c: c["partners"][0].update(name="-a")),
        (SMALL, lambda c: c["coordinator"].update(name="Coordinator")),
    ],
)
def test_a_charter_of_which_one_thing_is_wrong(shape: Shape, damage: Callable[[dict[str, Any]], Any]) -> None:
    with bad("layout", "malformed or do not fit together"):
        terms_of(shape, damage)


def test_the_least_and_the_most_of_a_charter() -> None:
    terms = terms_of(SMALL, lambda c: [one.update(declared_records=1) for one in c["partners"]])
    assert (terms.declared, terms.rounds, terms.quorum, terms.clients) == ({P0: 1, P1: 1}, 1, 1, None)
    assert terms_of(SMALL, lambda c: c["privacy"].update(delta="0.9999999999999999")).delta == 0.9999999999999999
    assert terms_of(SMALL, lambda c: c["partners"][0].update(name="a" * 63)).coordinator == C
    assert terms_of(SMALL, lambda c: c["algorithm"]["local"].update(steps=1)).plan == {"train": (1.0, 20.0, 1)}
    assert terms_of(PRIVATE).plan == {"train": (1.0, 20.0, 2), "evaluate": (1.0, 50.0, 1)}
    assert terms_of(PLAIN).plan == {"train": None}
    for clients in (1, 10**6):
        terms = terms_of(CLIENTS, lambda c, n=clients: c["population"].update(clients=n, declared_records=1))
        assert (terms.clients, terms.declared) == (clients, {"": 1})


def test_a_plan_fits_its_charter() -> None:
    """Training in every round, neither more nor fewer; evaluations in at most as many."""
    terms = terms_of(PRIVATE)  # two rounds
    train, evaluate = terms.plan["train"], terms.plan["evaluate"]
    for count in (0, 1, 2):
        terms.check_plan({"train": (2, train), "evaluate": (count, evaluate)})
    for trained, evaluated in ((1, 1), (3, 1), (2, 3)):
        with bad("terms", "counts do not fit"):
            terms.check_plan({"train": (trained, train), "evaluate": (evaluated, evaluate)})
    for plan in ({"train": (2, train)}, {"train": (2, train), "evaluate": (2, train)}):
        with bad("terms", "events are not the charter's"):
            terms.check_plan(plan)


def test_a_charter_that_is_wrong_is_named_by_its_line(tmp_path: Path) -> None:
    made = fresh(SMALL)
    folder, signed = made.write(tmp_path / "b"), made.signed
    sealed = Envelope("application/vnd.hansa.charter+json", signed.payload, signed.signatures[::-1])
    (folder / "charter.json").write_bytes(write_envelope(sealed) + b"\n")
    assert places(verify_bundle(folder)) == {("charter_signatures", "charter.json", 1)}
    (folder / "charter.json").write_bytes(b"[]\n")
    with pytest.raises(Unreadable) as caught:
        verify_bundle(folder)
    assert (caught.value.file, caught.value.line) == ("charter.json", 1)


# -- accounting ----------------------------------------------------------------------------------------------


def curve(mu: float, epsilon: float) -> float:
    """delta(epsilon) of one Gaussian mechanism, by another formula: no series, however far out."""
    a, b = (epsilon / mu - mu / 2) / math.sqrt(2), (epsilon / mu + mu / 2) / math.sqrt(2)
    return float((erfc(a) - math.exp(-a * a) * erfcx(b)) / 2)


@pytest.mark.parametrize(
    ("mu", "delta", "within"),
    [
        (1.0, 1e-5, 1e-11),
        (0.1, 1e-131, 1e-10),  # b = 24.3
        (0.1, 1e-134, 1e-10),  # b = 24.6
        (1.0, 1e-128, 1e-10),  # b = 24.98
        (
            0.1,
            1e-140,
            3e-7,
        ),  # b = 25.1: by a series that leaves out 105/b^8, so that delta is too large rather than too small
        (0.1, 1e-200, 1e-7),  # b = 30
        (22.0, 1e-6, 1e-9),
        (40.0, 1e-6, 1e-9),
    ],
)
def test_far_out_the_gaussian_curve_is_as_exact(mu: float, delta: float, within: float) -> None:
    """Where what is left is the difference of two numbers that hardly differ; and never below the truth."""
    found = curve(mu, verifier._gaussian_epsilon(mu, delta))
    assert found == pytest.approx(delta, rel=within, abs=0)
    assert found <= delta * (1 + 1e-10)


def test_nothing_costs_nothing() -> None:
    """Also where delta is so small that the smallest of losses would count."""
    budget = Budget(1.0, 1e-9, ((2, 1e-10), (8, 1e-10)), 1e-10)
    assert Total(budget).epsilon() == 0.0
    assert filter_epsilon(budget, ()) == 0.0
    assert verifier._converted(0.0, 2, 0.9) == 0.0  # delta covers more than there is
    assert Odometer().read((), 1e-9).epsilon == 0.0
    assert Partner(Report(), replace(terms_of(SMALL), epsilon=0.5), P0)._cost(None, ()) == 0.0


def composed(monkeypatch: pytest.MonkeyPatch, epsilon: Callable[[float], float]) -> list[tuple[float, float]]:
    """Loss distributions give this epsilon at this interval; returns (delta, interval) of each composition to come."""
    asked: list[tuple[float, float]] = []

    def at(events: Any, delta: float, interval: float) -> float:
        asked.append((delta, interval))
        return epsilon(interval)

    monkeypatch.setattr(Odometer, "at", staticmethod(at))
    return asked


SAMPLED = (((0.1, 3.0), 60),)


def test_what_is_left_out_is_taken_off_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    """1/10,000 of delta, in the plain bound as in what is composed."""
    left = 1e-5 * (1 - 1e-4)
    asked = composed(monkeypatch, lambda interval: 0.5)
    for interval in (0.0, 1e-3):
        assert Odometer().read(SAMPLED, 1e-5, interval).epsilon == 0.5
    assert len(asked) > 1
    assert [delta for delta, _ in asked] == [pytest.approx(left, rel=1e-12)] * len(asked)
    assert asked[-1][1] == 1e-3
    used_up = Odometer()
    used_up.left = 0
    reading = used_up.read(SAMPLED, 1e-5)
    assert reading.plain
    assert reading.epsilon == pytest.approx(verifier._plain(SAMPLED, left)[0], rel=1e-9)


def test_only_what_is_hardly_noticed_is_left_out() -> None:
    """A step at which a record is noticed with almost half of delta is no such thing: half of delta is worth some percent."""
    delta, step = 1e-2, ((5e-3, 0.3), 1)
    assert 0.4 < 5e-3 * math.erf(1 / (math.sqrt(8) * 0.3)) / delta < 0.5
    one, both = (Odometer().read(history, delta).epsilon for history in (SAMPLED, (step, *SAMPLED)))
    assert both > one * 1.05


def test_up_to_where_losses_are_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above epsilon 200 or 10^6 steps the answer is a plain bound, and is said to be one, however small."""
    asked = composed(monkeypatch, lambda interval: 1e-9)
    for steps, plain in ((10**6, False), (10**6 + 1, True)):
        asked.clear()
        reading = Odometer().read((((0.1, 1e4), steps),), 1e-5, 1e-3)
        assert (reading.plain, len(asked)) == (plain, 0 if plain else 1)
        assert (reading.epsilon == 1e-9) is not plain
    assert 1e-4 < reading.epsilon < 1
    at = [verifier._plain((((0.5, 1.0), n),), 1e-5 * (1 - 1e-4))[0] for n in range(1, 2000)]
    last = next(n for n, bound in enumerate(at) if bound > 200)  # so many steps cost 200 at most
    assert 199 < at[last - 1] <= 200 < at[last] < 201
    assert not Odometer().read((((0.5, 1.0), last),), 1e-5, 1e-3).plain
    assert Odometer().read((((0.5, 1.0), last + 1),), 1e-5, 1e-3).plain


def test_the_interval_is_halved_until_epsilon_hardly_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """By 5 in 10,000 of it, or of 1 where it is small; or by a tenth of what rounding costs anyway."""
    for epsilon, slope, rounded, within in ((100.0, 100.0, 0.0, 0.05), (0.1, 10.0, 0.0, 5e-4), (100.0, 1e3, 10.0, 1.0)):
        composed(monkeypatch, lambda interval, e=epsilon, s=slope: e + s * interval)
        found, interval, moved = Odometer()._refined(dict(SAMPLED), 1e-5, rounded)
        assert slope * interval <= within * 1.02 < 2 * slope * interval * 1.04  # it moved by slope * interval at last
        assert found == pytest.approx(epsilon + slope * interval)
        assert moved == 0.0


def test_what_a_reading_takes_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, and 2^14 for each kind. A step's losses: the logarithm of what a record changes, as far as noise reaches."""
    composed(monkeypatch, lambda interval: 0.5)
    events, delta = {(0.1, 3.0): 4, (1.0, 5.0): 9, (0.5, 2.0): 1}, 1e-5
    tail = math.log(1e-4 * delta / 14)

    def width(q: float, sigma: float) -> float:
        top = (math.sqrt(-2 * tail) * sigma + 0.5) / sigma**2
        most = math.log(1 - q + q * math.exp(top))
        return 2 * most if q == 1 else most - math.log(1 - q)

    one = Odometer()
    one._at(events, delta, 1e-3)
    cells = sum(width(q, sigma) * math.sqrt(n) for (q, sigma), n in events.items()) / 1e-3
    assert one.work - one.left == pytest.approx(cells + 3 * 2**14, rel=1e-9)


def test_what_costs_next_to_nothing_is_charged_without_sampling() -> None:
    """A millionth of all; the rest stays as it is. What is not sampled is one mechanism, in parts of mu^2 up to 4."""
    made = Odometer()._rounded((((1e-3, 1e6), 1), ((0.5, 1.0), 10)), 8)
    assert made.pop((0.5, 1.0)) == 10
    (((q, sigma), steps),) = made.items()
    assert (q, steps) == (1.0, 1)
    assert sigma == pytest.approx(1e6)
    kept = (((0.5, 1.0), 10), ((0.5, 100.0), 1))  # 1e-4 of about 4
    assert Odometer()._rounded(kept, 8) == dict(kept)
    for steps, parts in ((1, 1), (2, 2), (3, 3)):
        assert Odometer()._rounded((((1.0, 0.5), steps),), 8) == {(1.0, 0.5): parts}
    assert Odometer()._rounded((((1.0, 1.0), 5),), 8) == {(1.0, math.sqrt(2 / 5)): 2}
    hostile = (((5e-324, 1e9), 1), ((0.5, 1.0), 10))
    assert Odometer()._rounded(hostile, 8)[0.5, 1.0] == 10


def test_kinds_that_cost_nothing_are_merged_too() -> None:
    """A cell of one kind is never cut, though all cost the same."""
    kinds = {(n * 1e-300, 1e9): n for n in (1, 2, 3)}
    made = verifier._merged_kinds(kinds, 4, 2)
    assert sum(made.values()) == 6
    assert verifier._merged_kinds(kinds, 4, 3) == kinds


# -- what a filter and a charter admit -----------------------------------------------------------------------


def test_a_cap_is_a_cap_but_for_what_honest_implementations_differ_by() -> None:
    """`SLACK`, relative: at the charter's cap, at each hold, and at the end, of a partner and of a population."""
    report, terms = Report(), terms_of(SMALL)
    partner = Partner(report, terms, P0)
    for cap in (1.0, 0.5, 7.0):
        partner.terms = replace(terms, epsilon=cap)
        for cost, dear in ((cap, False), (cap * (1 + SLACK / 2), False), (cap * (1 + 2 * SLACK), True)):
            assert partner._too_dear(cost) is dear
    partner.terms = replace(terms, epsilon=None)
    assert not partner._too_dear(7.0)
    event, count = terms.plan["train"], terms.rounds
    assert event is not None
    needed = filter_epsilon(HELD, (((1.0, 20.0), 2),))
    clients = replace(terms_of(CLIENTS), plan=terms.plan, rounds=count)
    plan = [{"purpose": "train", "count": count, "event": GAUSSIAN}]
    for cap, fits in ((needed, True), (needed * (1 - SLACK / 2), True), (needed * (1 - 2 * SLACK), False)):
        budget = replace(HELD, epsilon=cap)
        account, book = Account(), Population(Report(), clients)
        account.fix(budget)
        book.budget, book.runs["x"] = budget, Run(1)
        holds: list[Callable[[], Any]] = [
            lambda partner=partner, account=account: partner._holds(account, [(event, count)], True),
            lambda book=book: book._cohort_hold(Entry(3, "cohort-hold", None, EARLY), {"run_id": "x", "plan": plan}),
        ]
        for hold in holds:
            if fits:
                hold()
            else:
                with bad("over_budget", "does not admit"):
                    hold()
        partner = Partner(Report(), replace(terms, epsilon=9.0), P0)
        partner.accounts["x"] = account
        partner._takes(Entry(4, "debit", None, EARLY), account, event, True)
        partner.finish()
        assert [v["code"] for v in partner.report.violations] == ([] if fits else ["over_budget"])
        book.terms = replace(clients, epsilon=9.0)
        book.cohort.clear()
        book._count("debit", {"run_id": "x", "round": 1, "purpose": "train", "clients": [[0, 0]]})
        book.finish()
        assert [v["code"] for v in book.report.violations] == ([] if fits else ["over_budget"])


def test_what_is_released_is_free_once() -> None:
    event, account, partner = (1.0, 20.0, 2), Account(), Partner(Report(), terms_of(SMALL), P0)
    account.fix(HELD)
    assert account.charged is not None
    for own in (True, False):
        partner.others = 1
        partner._holds(account, [(event, 3)], own)
        partner._frees(account, [(event, 2)], own)
        assert account.pools[own][event] == 1
        assert account.charged.epsilon() == filter_epsilon(HELD, (((1.0, 20.0), 2),))
        with bad("not_held", "releases what is not held"):
            partner._frees(account, [(event, 1)], not own)
        with bad("not_held", "releases what is not held"):
            partner._frees(account, [(event, 2)], own)
        assert account.pools[own][event] == 0
        assert account.charged.epsilon() == 0.0


def test_kinds_are_remembered_by_rate_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "MAX_EVENTS", 2)
    partner = Partner(Report(), terms_of(SMALL), P0)
    for event in ((0.1, 1.0, 1), (0.1, 2.0, 1), (0.1, 1.0, 7), (0.1, 2.0, 1), None):
        partner._remember(event)
    for event in ((0.1, 3.0, 1), (0.2, 1.0, 1)):
        with bad("more", "more than 2 different events"):
            partner._remember(event)


# -- lies ----------------------------------------------------------------------------------------------------


def first_answer_lost(d: Draft) -> None:
    """P0's answer came too late; asked again, it gave one that its ledger does not have."""
    again(C, "answers", 1)(d)
    d.entry(C, "answers", 1)["replies"][P0].update(outcome="timeout", reply_sha256=None)
    d.entry(C, "answers", 2)["replies"][P0].update(reply_sha256=digest("x"))


def debit_of_no_data_set(d: Draft) -> None:
    d.entry(P0, "debit")["dataset"] = digest("x")[:32]
    d.item(P0, "debit").privacy = {"lineage": None, "debit": d.entry(P0, "debit")["event"]}


def evaluation_unprotected(d: Draft) -> None:
    fields = {"run_id": "run-1", "round": 1, "purpose": "evaluate", "event": NONE, "clip_norm": None}
    d.add(C, "cohort-debit", None, d.index(C, "round"), **fields, declared_records=100, clients=[[0, 1]])


def held_elsewhere(d: Draft) -> None:
    """The header reserves on a lineage that the data set of the hold is not in."""
    declare("disjoint", cutoff="2026-11-22")(d)
    header(P0, "hold", lambda privacy: privacy | {"lineage": dataset(P0, SMALL, 1)["lineage"]})(d)


UNPROTECTED = Shape(clients=150, rounds=2, kind="none", evaluation="none")
LIES: list[tuple[str, Shape, Lie, str, str, str]] = [  # as in test_verifier.py
    ("debit_unplanned", PLAIN, change(P0, "debit", purpose="evaluate"), L0, "not_held", "not in its hold"),
    ("clients_debit_unplanned", UNPROTECTED, evaluation_unprotected, COORD, "not_held", "not in the plan"),
    ("public_round_0", SMALL, change(P0, "public", round=0), L0, "terms", "no public evaluation"),
    ("lost_then_another_reply", SMALL, first_answer_lost, L0, "not_done", "another reply than the ok answer"),
    ("hold_fewer_rounds", FULL, lambda d: d.entry(P0, "hold")["plan"][0].update(count=1), L0, "terms", "counts"),
    ("round_again_later", FULL, lambda d: d.add(C, "round", None, d.index(C, "close"), **d.entry(C, "round")), COORD, "record", "not the next round"),
    ("clients_commit_before_debit", CLIENTS, without(C, "cohort-debit", 2), COORD, "run_order", "no debit of the same"),
    ("hold_on_another_lineage", SMALL, held_elsewhere, L0, "privacy_differs", "hold: its header says"),
    ("debit_of_no_data_set", SMALL, debit_of_no_data_set, L0, "unknown", "unknown form"),
    ("debit_of_no_data_set_at_all", SMALL, debit_of_no_data_set, L0, "layout", "malformed"),
]  # fmt: skip


@pytest.mark.parametrize("row", LIES, ids=[row[0] for row in LIES])
def test_a_lie_that_no_test_noticed_is_found(tmp_path: Path, row: tuple[str, Shape, Lie, str, str, str]) -> None:
    found_of(tmp_path / "b", *row[1:])


def test_what_a_crash_leaves_twice_is_no_lie(tmp_path: Path) -> None:
    """The last round again, just as it was; a reply that was late and then unreadable, for what the partner did."""
    for shape in (SMALL, FULL):
        made = fresh(shape)
        again(C, "round", shape.rounds - 1)(made)
        assert verdict_of(made.write(tmp_path / "b"))["violations"] == []
    made = fresh(SMALL)
    again(C, "answers", 1)(made)
    for number, outcome in ((1, "timeout"), (2, "invalid")):
        made.entry(C, "answers", number)["replies"][P0].update(outcome=outcome, reply_sha256=None)
    made.entry(C, "round")["partners"].remove(P0)
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert [w["code"] for w in verdict["warnings"]] == ["unanswered"]


# -- populations ---------------------------------------------------------------------------------------------


def test_ranges_of_clients() -> None:
    book = Population(Report(), replace(terms_of(CLIENTS), clients=10))
    for ranges in ([], [[0, 9]], [[0, 0], [1, 1], [9, 9]]):
        assert book._ranges(ranges) == ranges
    for ranges in ([[0, 10]], [[-1, 0]], [[0]], [[0, 1, 2]], [0], [[0, True]], ["01"], [{}]):
        with bad("layout", "are ranges"):
            book._ranges(ranges)
    for ranges in ([[5, 3]], [[0, 1], [1, 2]], [[0, 5], [3, 9]], [[4, 5], [0, 1]], [[1, 1], [1, 1]]):
        with bad("layout", "overlap or are not in order"):
            book._ranges(ranges)


def test_clients_are_counted_once_a_round() -> None:
    """Ten clients: 2 to 5 trained once, 4 to 9 as well; 4 and 5 so twice, 0 and 1 never."""
    book = Population(Report(), replace(terms_of(CLIENTS), clients=10, quorum=2))
    book.plans["x"] = {"train": (2, (0.2, 3.0, 2))}
    at = {"run_id": "x", "purpose": "train"}
    assert book._count("debit", at | {"round": 1, "clients": [[2, 5]]})
    assert book._count("debit", at | {"round": 2, "clients": [[4, 6], [7, 9]]})
    assert not book._count("debit", at | {"round": 2, "clients": [[4, 6], [7, 9]]})
    with bad("repeated", "differs"):
        book._count("debit", at | {"round": 2, "clients": [[4, 6]]})
    assert book.groups() == {(0,): [[0, 1]], (1,): [[2, 3], [6, 6], [7, 9]], (2,): [[4, 5]]}
    assert [book.spent((n,)) for n in range(3)] == [{}, {(0.2, 3.0): 2}, {(0.2, 3.0): 4}]
    book.finish()
    assert book.report.violations == []
    book.plans["x"] = {"train": (1, (0.2, 3.0, 2))}
    book.finish()
    assert [v["what"][:18] for v in book.report.violations] == ["client 4: 2 debits"]


def test_a_round_counts_as_many_clients_as_its_quorum() -> None:
    book = Population(Report(), replace(terms_of(CLIENTS), clients=10, quorum=2))
    run = book.runs.setdefault("x", Run(1))
    for number, clients, counts in ((1, [[3, 3]], False), (2, [[3, 4]], True), (3, [[3, 3], [7, 7]], True)):
        at = {"run_id": "x", "round": number, "purpose": "train"}
        book.cohort["x", "train"] = (number, [[3, 4], [7, 7]])
        book._cohort_commit(Entry(1, "cohort-commit", None), at | {"clients": clients})
        folded = {"run_id": "x", "round": number, "partners": None}
        if counts:
            book._folded(run, folded)
        else:
            with bad("record", "2 committed clients or more"):
                book._folded(run, folded)
        with bad("record", "committed clients"):
            book._folded(run, folded | {"partners": []})


@pytest.mark.parametrize(
    ("clients", "debited"),
    [
        ([[2, 5]], True),
        ([[2, 2], [5, 5], [8, 9]], True),
        ([[3, 4], [9, 9]], True),
        ([[1, 2]], False),
        ([[5, 6]], False),
        ([[6, 7]], False),
        ([[2, 9]], False),
        ([[2, 5], [7, 8]], False),
        ([[0, 0]], False),
    ],
)
def test_only_clients_that_were_debited_commit(clients: list[list[int]], debited: bool) -> None:
    book = Population(Report(), replace(terms_of(CLIENTS), clients=10))
    book.runs["x"] = Run(1)
    book.cohort["x", "train"] = (1, [[2, 5], [8, 9]])
    body = {"run_id": "x", "round": 1, "purpose": "train", "clients": clients}
    if debited:
        book._cohort_commit(Entry(1, "cohort-commit", None), body)
    else:
        with bad("run_order", "were not all debited"):
            book._cohort_commit(Entry(1, "cohort-commit", None), body)


def test_nobody_commits_before_a_debit() -> None:
    book = Population(Report(), replace(terms_of(CLIENTS), clients=10))
    book.runs["x"] = Run(1)
    body = {"run_id": "x", "round": 1, "purpose": "train", "clients": []}
    with bad("run_order", "no debit of the same run"):
        book._cohort_commit(Entry(1, "cohort-commit", None), body)
    book.cohort["x", "train"] = (2, [[0, 9]])
    with bad("run_order", "no debit of the same run"):
        book._cohort_commit(Entry(1, "cohort-commit", None), body)


def test_summary_of_a_client(tmp_path: Path) -> None:
    """Debited in the first of two rounds and folded, or debited alone; without a debit nothing was spent."""
    made = fresh(Shape(clients=200, rounds=2, evaluation="none", sigma=30.0))
    for kind in ("cohort-debit", "cohort-commit"):
        for number in range(2):
            made.entry(C, kind, number)["clients"] = [[0, 4 - number - (kind == "cohort-commit")]]
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    some = [verdict["partners"][f"client-{number:04d}"] for number in (2, 3, 4, 5)]
    assert [(one["debits"], one["rounds"], one["uncommitted_debits"], one["entries"]) for one in some] == [
        (2, 2, 0, 4), (2, 1, 1, 3), (1, 0, 1, 1), (0, 0, 0, 0),
    ]  # fmt: skip
    assert [sum(event["count"] for event in one["events"]) for one in some] == [2, 2, 1, 0]
    for one in some:
        assert (one["refusals"], one["undisclosed"], one["trajectory"], one["unbounded"]) == (0, 0, [], False)
    assert some[0]["epsilon"] == some[1]["epsilon"] > some[2]["epsilon"] > some[3]["epsilon"] == 0


# -- heads, copies, and who vouches --------------------------------------------------------------------------


def test_a_torn_first_head_is_named_by_its_line(tmp_path: Path) -> None:
    made = fresh(SMALL)
    folder, file = made.write(tmp_path / "b"), f"heads/{P1}.jsonl"
    (folder / "heads").mkdir()
    line = made.head(P0, 3, made.lines(P0)[1][3], (P0, C)) + b"\n"
    for data, at in ((line[:-1], 1), (line + line[:-1], 2), (line + line + b"{", 3)):
        (folder / file).write_bytes(data)
        assert places(verify_bundle(folder)) == {("torn", file, at)}


def test_heads_that_are_given_and_agree(tmp_path: Path) -> None:
    """They were compared, so there is nothing to complain of; each is counted once."""
    made = fresh(SMALL)
    folder, given = made.write(tmp_path / "b"), tmp_path / "heads.jsonl"
    roots = made.lines(P0)[1]
    given.write_bytes(b"".join(made.head(P0, n, roots[n], (P0, P1)) + b"\n" for n in (3, 5)))
    before, verdict = verify_bundle(folder), verify_bundle(folder, [given])
    assert verdict["violations"] == []
    assert [head["length"] for head in verdict["heads"]] == [3, 5]
    more = {name: verdict["checked"][name] - before["checked"][name] for name in before["checked"]}
    assert more == {"ledgers": 0, "entries": 0, "signatures": 4, "heads": 2, "proofs": 2}
    # three ledgers in one checkpoint, each signed for once there; charter and checkpoint are signed by three
    entries = sum(map(len, made.books.values()))
    assert before["checked"] == {"ledgers": 3, "entries": entries, "signatures": entries + 6, "heads": 0, "proofs": 3}


def test_a_head_that_differs_below_a_copy_that_agrees(tmp_path: Path) -> None:
    """No shorter statement agrees, so the doubt begins at the first entry."""
    made = fresh(SMALL)
    folder, given = made.write(tmp_path / "b"), tmp_path / "given"
    given.mkdir()
    lines = made.lines(P0, full=True)[0]
    (given / "copy.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    (given / "heads.jsonl").write_bytes(made.head(P0, 4, digest("x"), (P0, P1)) + b"\n")
    verdict = verify_bundle(folder, [given])
    assert places(verdict) == {("entry_differs", L0, 1)}
    assert "one of entries 1 to 4 is not" in verdict["violations"][0]["what"]


def test_who_vouches_for_nothing_and_for_one_entry(tmp_path: Path) -> None:
    made = fresh(SMALL)
    made.heads.clear()
    made.closings[0][2][P0] = 1
    verdict = verdict_of(made.write(tmp_path / "b"))
    entries = len(made.books[P0])
    assert verdict["violations"] == []
    assert verdict["partners"][P0]["witnessed"] == {"length": 1, "by": [P1, C], "closing": "run-1"}
    assert verdict["partners"][P0]["tail"] == entries - 1
    assert places(verdict, "warnings") == {("tail", L0, 2)}
    made = fresh(SMALL)
    made.drop(C, made.index(C, "close"))
    made.drop(P0, made.index(P0, "release"))
    made.drop(P1, made.index(P1, "release"))
    made.closings.clear()
    made.model = None
    made.heads = [Kept(P1, P0, 3, (P0, P1))]
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    nothing = {"length": 0, "by": [], "closing": None}
    assert verdict["partners"][P0]["witnessed"] == nothing  # the coordinator did not sign
    assert (verdict["partners"][P1]["witnessed"], verdict["coordinator"]["witnessed"]) == (nothing, nothing)
    assert verdict["partners"][P0]["tail"] == len(made.books[P0])
    assert ("tail", L0, 1) in places(verdict, "warnings")


@pytest.mark.parametrize(
    "data",
    [
        b'{"body":1,"envelope":1}\n',
        b'{"body":{"data":{"key":"x","owner":[]}},"envelope":1}\n',
        b'{"payload":7,"payloadType":"application/vnd.hansa.closing+json"}\n',
        b'{"payload":"x","payloadType":"application/vnd.hansa.closing+json"}\n',
        b'{"payload":"W10=","payloadType":"application/vnd.hansa.closing+json"}\n',
        b'{"payload":"e30=","payloadType":"application/vnd.hansa.closing+json"}\n',
        b'{"payloadType":[]}\n',
    ],
)
def test_what_is_given_is_other_nonsense(tmp_path: Path, data: bytes) -> None:
    folder, given = fresh(SMALL).write(tmp_path / "b"), tmp_path / "given"
    given.write_bytes(data)
    with pytest.raises(Unreadable, match=r"nothing in it can be compared with this bundle: .+"):
        verify_bundle(folder, [given])
    assert verifier.main([str(folder), "--against", str(given)]) == 2
    assert verifier.main([str(folder), "--against", str(folder / L0), "--against", str(folder / COORD)]) == 0


def test_what_the_command_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verifier.main(["nowhere"]) == 2
    assert capsys.readouterr().err == "nowhere: no such folder\n"
    (tmp_path / "charter.json").write_bytes(b"")
    assert verifier.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == "charter.json:1: does not end in a newline (edited?)\n"


# -- model, result and the verdict ---------------------------------------------------------------------------


def test_the_model_is_of_the_last_round_of_the_newest_completed_run() -> None:
    def run(why: str | None, *models: str) -> Run:
        close = None if why is None else {"why": why}
        return Run(1, rounds=[{"model_sha256": model} for model in models], close=close)

    runs = {"a": run("completed", "1", "2", "3"), "b": run("completed", "4", "5", "6"), "c": run("refused", "7")}
    assert verifier._last(runs | {"d": run(None, "8")}) == {"model_sha256": "6"}
    assert verifier._last({"a": run("refused", "1"), "b": run(None, "2"), "c": run("completed")}) is None
    assert verifier._last({}) is None


def test_numbers_that_agree() -> None:
    """A millionth, relative, and absolute where they are above a thousandth; numbers only, and what a float holds."""
    for a, b in (
        (0.5, 0.5 + 4e-7),
        (2e-3, 2e-3 + 9e-7),
        (1e-4, 1e-4),
        (0, 0.0),
        (1, 1.0),
        (None, None),
        (9e299, 9e299),
    ):
        assert verifier._same(a, b)
        assert verifier._same(b, a)
    inf = math.inf
    for a, b in ((0.5, 0.5 + 2e-6), (1e-3, 1e-3 - 5e-7), (1e-4, 2e-4), (0.0, 1e-4), (2e-3, 2e-3 + 1.1e-6), (None, 0)):
        assert not verifier._same(a, b)
        assert not verifier._same(b, a)
    for odd in (True, inf, math.nan, "1", [], 10**400, 1e300):
        assert not verifier._same(odd, odd)
        assert not verifier._same(1, odd)
    assert verifier._same(10.0, 10.01, verifier.ODOMETERS)
    assert not verifier._same(10.0, 10.03, verifier.ODOMETERS)


def test_how_likely_one_step_notices_a_record() -> None:
    for q, sigma in ((1.0, 0.3), (0.5, 1.0), (0.01, 2.5), (1e-9, 40.0)):
        wanted = q * (2 * norm.cdf(1 / (2 * sigma)) - 1)
        assert math.isclose(verifier._noticed(q, sigma), wanted, rel_tol=1e-12)


def test_the_renyi_divergence_of_a_step_where_it_is_small_and_where_it_is_large() -> None:
    """ln(1 + e^x) both ways, against a plain sum of whole numbers' binomials."""
    for q, sigma, order in ((0.5, 0.3, 8), (0.5, 1.0, 4), (0.1, 2.0, 2), (0.9, 0.5, 3), (1e-6, 1.0, 2)):
        terms = (
            math.comb(order, k)
            * Fraction(1 - Fraction(q)) ** (order - k)
            * Fraction(q) ** k
            * Fraction(math.exp(k * (k - 1) / (2 * sigma**2)))
            for k in range(order + 1)
        )
        assert math.isclose(verifier._renyi(q, sigma, order), math.log1p(sum(terms) - 1) / (order - 1), rel_tol=1e-9)


def test_what_is_noticed_less_than_delta_has_no_epsilon() -> None:
    """Where the total variations of all steps add up to less than delta nothing is composed, and epsilon is 0."""
    one = verifier._noticed(1e-3, 5.0)
    for count in (3, 9):
        odometer = Odometer()
        assert odometer.read((((1e-3, 5.0), count),), 10 * one) == Reading(0.0)
        assert odometer.left == odometer.work
    assert Odometer().read((((1e-3, 5.0), 200),), 10 * one).epsilon > 0.0


def test_no_loss_at_all_has_no_epsilon() -> None:
    assert verifier._gaussian_epsilon(0.0, 1e-5) == 0.0


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.0033, 44.0, 61), (0.0017, 40.0, 22), (1e-7, 5.0, 3)])
def test_a_tiny_epsilon_by_another_odometer_is_no_false_alarm(
    tmp_path: Path, q: float, sigma: float, steps: int
) -> None:
    """The node's and the verifier's odometer differ absolutely by up to some 10⁻⁴, which of a tiny epsilon is a lot."""
    made = honest(Shape(partners=2, rounds=2, q=q, sigma=sigma, steps=steps))
    made.result = result_for(made, verdict_of(made.write(tmp_path / "b")))
    for one in made.result["partners"].values():
        one["epsilon"] = accounting.odometer([accounting.PrivacyEvent(q, sigma, 2 * steps)], one["delta"])
    assert verdict_of(made.write(tmp_path / "b"))["violations"] == []
    for one in made.result["partners"].values():
        one["epsilon"] += 3e-3
    assert places(verdict_of(made.write(tmp_path / "b"))) == {("result", "result.json", None)}


def test_metrics_that_agree() -> None:
    assert verifier._other_metrics({"auc": 0.7}, {"auc": "0.7"}) == ""
    assert verifier._other_metrics({}, {}) == ""
    wrong: list[tuple[Any, str]] = [
        ({"auc": 0.8}, "metric 'auc' is 0.8, in the coordinator's ledger it is '0.7'"),
        ({"auc": 0.7, "loss": 1.0}, "metric 'loss' is 1.0, in the coordinator's ledger it is missing"),
        ({}, "metric 'auc' is missing, in the coordinator's ledger it is '0.7'"),
        ({"loss": 0.7}, "metric 'auc' is missing, in the coordinator's ledger it is '0.7'"),
        (None, "metrics are missing"),
        (["auc"], "metrics are missing"),
        ({"auc": "0.7"}, "metric 'auc' is '0.7', in the coordinator's ledger it is '0.7'"),
    ]
    for said, what in wrong:
        assert verifier._other_metrics(said, {"auc": "0.7"}) == what


def test_a_result_whose_refusals_say_nothing(tmp_path: Path) -> None:
    made = fresh(FULL)
    made.result = result_for(made, verdict_of(made.write(tmp_path / "b"))) | {"refusals": [{}]}
    assert places(verdict_of(made.write(tmp_path / "b"))) == {("result", "result.json", None)}


@pytest.mark.parametrize(
    ("field", "factor", "verified"),
    [
        ("epsilon", 1 + 1e-3, True),
        ("epsilon", 1 - 1e-3, True),
        ("epsilon", 1.05, False),
        ("epsilon_filter", 1 + 1e-3, False),
        ("epsilon_cap", 1 + 1e-3, False),
        ("delta", 1 + 1e-3, False),
        ("epsilon_filter", None, True),  # not every result tells it
        ("epsilon", None, False),
    ],
)
def test_how_far_a_result_may_differ(tmp_path: Path, field: str, factor: float | None, verified: bool) -> None:
    made = fresh(SMALL)
    made.result = result_for(made, verdict_of(made.write(tmp_path / "b")))
    claims = made.result["partners"][P0]
    if factor is None:
        del claims[field]
    else:
        claims[field] *= factor
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["verified"] is verified
    assert {v["file"] for v in verdict["violations"]} == (set() if verified else {"result.json"})


def test_a_result_of_three_rounds(tmp_path: Path) -> None:
    """Its end is the last round's, whichever that is."""
    made = fresh(Shape(partners=2, rounds=3, sigma=40.0))
    made.result = result_for(made, verdict_of(made.write(tmp_path / "b")))
    assert made.result["final"] == made.result["rounds"][2]["metrics"] != made.result["rounds"][1]["metrics"]
    assert verdict_of(made.write(tmp_path / "b"))["verified"]
    made.result["final"] = made.result["rounds"][1]["metrics"]
    assert {v["file"] for v in verdict_of(made.write(tmp_path / "b"))["violations"]} == {"result.json"}
    made.result["final"] = made.result["rounds"][2]["metrics"]
    made.result["rounds"] = made.result["rounds"][:2]
    assert {v["file"] for v in verdict_of(made.write(tmp_path / "b"))["violations"]} == {"result.json"}


def test_when_rounding_is_said() -> None:
    """Above a thousandth of epsilon, or of 1 where it is below; and every plain bound; once for each name."""
    for epsilon, rounded, plain, said in (
        (0.5, 1e-3, False, False),
        (0.5, 1.5e-3, False, True),
        (10.0, 9e-3, False, False),
        (10.0, 1.1e-2, False, True),
        (0.5, 0.0, True, True),
    ):
        bill = verifier._Bill(terms_of(SMALL), Report())
        for _ in range(2):
            bill._say(Reading(epsilon, rounded, plain), epsilon, L0, [P0])
        assert [w["code"] for w in bill.report.warnings] == ["coarse"] * said
        assert bill.coarse == ({P0} if said else set())
        assert all(("a plain bound" in w["what"]) is plain for w in bill.report.warnings)


def test_equal_events_are_told_together_in_order() -> None:
    """Without protection first, then by rate, noise and steps, those under other charters before this one's."""
    events: list[tuple[verifier.Event, bool]] = [
        ((0.5, 2.0, 1), True), ((0.1, 3.0, 2), False), (None, True), ((0.5, 2.0, 1), False), ((0.1, 3.0, 1), True),
        ((0.5, 2.0, 1), True), (None, False), ((0.1, 2.0, 9), True), ((0.5, 2.0, 1), True),
    ]  # fmt: skip
    found = verifier._merged(events)
    assert [(e["q"], e["sigma"], e["steps"], e["charter"], e["count"]) for e in found] == [
        (None, None, None, "other", 1),
        (None, None, None, "this", 1),
        (0.1, 2.0, 9, "this", 1),
        (0.1, 3.0, 1, "this", 1),
        (0.1, 3.0, 2, "other", 1),
        (0.5, 2.0, 1, "other", 1),
        (0.5, 2.0, 1, "this", 3),
    ]
    assert [e["mechanism"] for e in found] == ["none/1"] * 2 + ["poisson-gaussian/1"] * 5


class Told(Odometer):
    """An odometer that tells what it is asked."""

    work = 1

    def __init__(self, left: float = 1.0) -> None:
        super().__init__()
        self.left = left
        self.asked: list[tuple[int, float]] = []

    def read(self, history: verifier.History, delta: float, interval: float = 0.0) -> Reading:
        self.asked.append((sum(steps for _, steps in history), interval))
        return Reading(0.5, interval=0.125)


@pytest.mark.parametrize(
    ("kinds", "rate", "debits", "every"),
    [
        (1, 1.0, 80, 2),
        (1, 1.0, 81, 3),
        (1, 1.0, 40, 1),
        (4, 1.0, 80, 2),  # what is not sampled costs nothing to read
        (1, 0.5, 80, 2),
        (4, 0.5, 80, 8),
        (41, 0.5, 82, 82),
    ],
)
def test_where_on_a_trajectory_the_odometer_is_read(kinds: int, rate: float, debits: int, every: int) -> None:
    """At 40 debits at most, for each different sampled event; always at the last one, and there as exactly as it takes."""
    account = Account(budget=HELD)
    for number in range(debits):
        point: dict[str, Any] = {"entry": number, "epsilon_filter": 0.75, "epsilon": None}
        account.debits.append((point, (rate, 2.0 + number % kinds, 1), True))
    told = Told()
    bill = verifier._Bill(terms_of(SMALL), Report())
    bill.report.odometer = told
    points = verifier._trajectory({"x": account}, bill)
    read = list(range((debits - 1) % every, debits, every))
    assert [point["entry"] for point in points if point["epsilon"] is not None] == read
    assert all(point["epsilon"] in (None, 0.5) for point in points)
    assert len(read) <= 40
    assert told.asked == [(debits, 0.0), *((number + 1, 0.125) for number in read[:-1]), (debits, 0.0)]
    assert not any("lineage" in point for point in points)
    for left, count in ((0.5, 1), (0.51, len(read))):  # half of the work is kept
        bill.report.odometer = Told(left)
        points = verifier._trajectory({"x": account}, bill)
        assert sum(point["epsilon"] is not None for point in points) == count


def test_a_trajectory_without_a_filter(tmp_path: Path) -> None:
    """After an unprotected round, and without a budget, there is nothing to read."""
    point: dict[str, Any] = {"entry": 1, "epsilon_filter": None, "epsilon": None}
    for budget in (None, HELD):
        account = Account(budget=budget, debits=[(dict(point), (1.0, 2.0, 1), True)])
        bill = verifier._Bill(terms_of(SMALL), Report())
        bill.report.odometer = Told()
        assert verifier._trajectory({"x": account, "y": Account()}, bill) == [point | {"lineage": "x"}]


def test_files_of_heads_are_named_after_members(tmp_path: Path) -> None:
    made = fresh(SMALL)
    folder = made.write(tmp_path / "b")
    (folder / "heads").mkdir()
    for name in ("mallory.jsonl", f"{P0}.json", P0):
        (folder / "heads" / name).write_bytes(b"")
    assert places(verify_bundle(folder)) == {
        ("stranger", f"heads/{name}", None) for name in ("mallory.jsonl", f"{P0}.json", P0)
    }


def test_a_verdict_of_hidden_entries_and_of_simulations(tmp_path: Path) -> None:
    made = fresh(TWO_RUNS)
    made.books[C].append(Item("run", {"run_id": "x"}, OTHER))
    verdict = verdict_of(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    assert (verdict["coordinator"]["entries"], verdict["coordinator"]["undisclosed"]) == (len(made.books[C]), 1)
    assert verdict["coordinator"]["tail"] == 1
    assert verdict["limits"][-1].startswith("Simulated: ")
    assert len(verdict["limits"]) == len(verifier.LIMITS) + 2
    assert Counter(w["code"] for w in verdict["warnings"]) == {"tail": 1}
