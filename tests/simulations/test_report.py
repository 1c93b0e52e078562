"""The report: what it says, that it says it exactly, and that it loads and leaks nothing."""

from __future__ import annotations

import copy
import errno
import math
import os
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hansa.common.audit_report import BECAUSE
from hansa.common.charter import adversary
from hansa.common.errors import OutputError, Refusal
from hansa.simulations import report

VOID = {"meta", "br", "link", "img", "hr", "input"}
WORDS = "Charter “heart”\n  Privacy   ε = 1, δ = 1e-4, <record> level\n"
# name: declared, odometer, filter, rounds, debits, entries
HOSPITALS = {
    "cleveland": (240, 0.93004, 0.99001, 10, 10, 31),
    "hungary": (230, 0.92127, 0.98128, 10, 11, 32),
    "switzerland": (100, 0.94116, 0.97117, 9, 9, 29),
    "va-long-beach": (160, 0.70335, 0.75513, 8, 8, 27),
}


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "run_id": "run-7f3a",
        "name": "heart",
        "task": "heart-disease",
        "charter_sha256": "9f" * 32,
        "created": "2025-11-22T01:55:44Z",
        "rounds": [
            {"round": r, "metrics": {"auc": 0.78 + 0.0111 * r, "accuracy": 0.7 + 0.0071 * r, "brier": 0.2 - 0.003 * r}}
            for r in range(1, 11)
        ],
        "final": {"auc": 0.8912, "accuracy": 0.7713, "brier": 0.1704},
        "evaluation": {"kind": "public", "rows": 184},
        "privacy": {
            "kind": "local",
            "unit": "record",
            "adjacency": "add-or-remove-one",
            "epsilon": 1.0,
            "delta": 1e-4,
            "noise": "local",
            "noise_multiplier": 30.125,
            "clip_norm": 1.5,
            "adversary": "everyone but the partner itself, including the coordinator",
        },
        "partners": {
            name: {
                "declared_records": n,
                "epsilon": odometer,
                "epsilon_filter": spent,
                "epsilon_cap": 1.0,
                "delta": 1e-4,
                "rounds": rounds,
            }
            for name, (n, odometer, spent, rounds, _, _) in HOSPITALS.items()
        },
        "baselines": {
            "pooled": {"auc": 0.9021, "accuracy": 0.8312, "brier": 0.1253},
            "local": {n: {"auc": 0.79 + 0.0213 * i} for i, n in enumerate(HOSPITALS)},
            "federated_without_privacy": {"auc": 0.8997},
        },
        "refusals": [
            {
                "partner": "cleveland",
                "run_id": "run-second",
                "reason": "budget",
                "detail": "the plan needs more than is left",
                "round": None,
            }
        ],
        "timings": {"total_s": 12.34},
        "simulated": True,
    }


@pytest.fixture
def verdict() -> dict[str, Any]:
    return {
        "verified": True,
        "bundle": "out/demo",
        "charter_sha256": "9f" * 32,
        "simulated": True,
        "checked": {"ledgers": 5, "entries": 1123, "signatures": 140},
        "partners": {
            name: {
                "epsilon": odometer,
                "epsilon_filter": spent,
                "epsilon_cap": 1.0,
                "delta": 1e-4,
                "debits": debits,
                "uncommitted_debits": 0,
                "refusals": int(name == "cleveland"),
                "entries": entries,
                "trajectory": [{"round": r, "epsilon_filter": spent * r / 10} for r in range(1, 11)],
            }
            for name, (_, odometer, spent, _, debits, entries) in HOSPITALS.items()
        },
        "violations": [],
        "warnings": [],
        "limits": ["The keys were read from the bundle."],
    }


class Page(HTMLParser):
    """Checks that tags balance; collects text, attributes, tables (caption -> rows of cells) and figures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.stack: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.figures: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag in VOID:
            return
        self.stack.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "data":
            self.figures.append((dict(attrs)["value"] or "", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.stack:
            return
        self.words.append(data)
        if "td" in self.stack or "th" in self.stack:
            self.tables[-1][-1][-1] += data
        if self.stack and self.stack[-1] == "data":
            self.figures[-1] = (self.figures[-1][0], data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def table(self, *columns: str) -> dict[str, list[str]]:
        """The body of the one table that has these column heads, by its first cell."""
        found = [t for t in self.tables if t and set(columns) <= {c.strip() for c in t[0]}]
        assert len(found) == 1, (columns, [t[0] for t in self.tables])
        return {row[0].strip(): [c.strip() for c in row[1:]] for row in found[0][1:]}


Write = Callable[..., Page]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def go(result: dict[str, Any], verdict: dict[str, Any], words: str = WORDS) -> Page:
        path = tmp_path / "report.html"
        report.write_report(path, result, verdict, words)
        assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
        return Page(path.read_text(encoding="utf-8"))

    return go


def crowd(result: dict[str, Any], verdict: dict[str, Any], n: int) -> None:
    one, audited = result["partners"]["cleveland"], verdict["partners"]["cleveland"]
    result["partners"], verdict["partners"], result["baselines"]["local"] = {}, {}, {}
    for i in range(n):
        spent = 0.5 + 0.5 * (i * 379 % n) / (n - 1)
        figures = {"epsilon": 0.9 * spent, "epsilon_filter": spent}
        curve = [{"round": r, "epsilon_filter": spent * r / 10} for r in range(1, 11)]
        result["partners"][f"client-{i:04d}"] = {**one, **figures}
        verdict["partners"][f"client-{i:04d}"] = {**audited, **figures, "refusals": 0, "trajectory": curve}
        result["baselines"]["local"][f"client-{i:04d}"] = {"auc": 0.6 + 0.0001 * i}


SENTENCE = (
    "Each partner's updates are record-level (ε = 1, δ = 1e-4)-differentially private under add-or-remove-one "
    "adjacency, with noise added locally before anything leaves; adversary: everyone but the partner itself, "
    "including the coordinator."
)


def test_shared_noise_is_claimed_of_sums(write: Write, result: Any, verdict: Any) -> None:
    result["privacy"] |= {"kind": "shared", "noise": "shared", "adversary": adversary(1)}
    text = write(result, verdict).text
    assert (
        "The sums of all partners' updates are record-level (ε = 1, δ = 1e-4)-differentially private under add-or-remove-one adjacency, "
        "with noise of which each partner adds a share before its update is masked; adversary: the coordinator and one partner, together"
    ) in text
    assert "the less the adversary who sees every sum can tell" in text
    assert SENTENCE not in text


def test_verified_page_says_what_holds_and_what_does_not(write: Write, result: Any, verdict: Any) -> None:
    page = write(result, verdict)
    assert ("section", "class", "verdict good") in page.attributes
    assert SENTENCE in page.text
    assert "Claimed" not in page.text
    head = page.text[: page.text.index("How good is the model?")]
    assert "SIMULATED: keys, nodes and data live on one machine" in head
    assert "That the noise was really drawn is for meters and empirical audits to test" in head
    assert "The keys were read from the bundle." in head
    assert "What does not agree" not in head
    assert "measured on 184 public rows" in page.text
    assert "cleveland refused run run-second because its remaining privacy budget cannot pay for it." in page.text
    assert "the plan needs more than is left" in page.text
    assert "hansa audit out/demo" in page.text
    assert "9f" * 32 in page.text
    assert "".join(page.words).count(WORDS.strip()) == 1


def test_no_banner_when_not_simulated(write: Write, result: Any, verdict: Any) -> None:
    result["simulated"] = verdict["simulated"] = False
    assert "SIMULATED" not in write(result, verdict).text


def test_page_loads_nothing(write: Write, result: Any, verdict: Any) -> None:
    page = write(result, verdict)
    assert not re.search(r"https?://|url\(|@import|@font-face|<script|<link|<img|<iframe|javascript:", page.html)
    assert not [a for a in page.attributes if a[1] in ("src", "srcset", "action", "data", "poster", "background")]
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert all(value.startswith("#") for _, key, value in page.attributes if key in ("href", "xlink:href"))
    assert "default-src 'none'" in page.html


def test_every_chart_has_a_title_a_description_and_a_table(write: Write, result: Any, verdict: Any) -> None:
    page = write(result, verdict)
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    labelled = [v for tag, key, v in page.attributes if tag == "svg" and key == "aria-labelledby"]
    assert len(labelled) == page.html.count("<svg") == 3
    assert all(part in ids for label in labelled for part in label.split())
    for chart in page.html.split("<svg")[1:]:
        assert "<table" in chart.split("<h2")[0]


def test_every_figure_is_the_input_to_the_shown_precision(write: Write, result: Any, verdict: Any) -> None:
    page = write(result, verdict)
    partners = page.table("Partner", "cap", "δ")
    held = page.table("Partner", "entries", "debits")
    curves = page.table("Partner", "1", "10")
    assert list(partners) == list(held) == list(curves) == list(HOSPITALS)
    for name, (n, odometer, spent, rounds, debits, entries) in HOSPITALS.items():
        expected = [f"{spent:.4f}", "1", f"{100 * spent:.1f} %", f"{odometer:.4f}", "1e-4", str(rounds), str(n)]
        assert partners[name] == expected
        assert held[name] == [str(entries), str(debits), "0", str(int(name == "cleveland"))]
        assert curves[name][0] == f"{spent / 10:.4f}"
        assert curves[name][-1] == f"{spent:.4f}"
        assert f">{spent:.4f} filter<" in page.html
        assert f">{odometer:.4f} odometer<" in page.html
    by_round = page.table("Round", "AUC")
    for r in result["rounds"]:
        m = r["metrics"]
        assert by_round[str(r["round"])] == [f"{m[k]:.3f}" for k in ("auc", "accuracy", "brier")]
    models = page.table("Model", "AUC")
    assert models["This run"] == ["0.891", "0.771", "0.170"]
    assert models["All data pooled"] == ["0.902", "0.831", "0.125"]
    assert models["Federated, no privacy"] == ["0.900", "—", "—"]
    assert models["hungary alone"] == ["0.811", "—", "—"]
    assert page.table("ledgers", "signatures") == {"5": ["1,123", "140", "0", "0"]}
    assert "σ = 30.125; each record's gradient is clipped to norm C = 1.5" in page.text
    # The exact value travels with each shown one.
    assert len(page.figures) > 100
    for exact, shown in page.figures:
        digits = len(shown.split(".")[1]) if "." in shown and "e" not in shown else None
        value = float(shown.replace(",", ""))
        assert math.isclose(
            value, float(exact), rel_tol=1e-3 if digits is None else 0, abs_tol=0.51 * 10 ** -(digits or 9)
        )


def test_chart_places_values_where_the_axis_says(write: Write, result: Any, verdict: Any) -> None:
    verdict["partners"]["hungary"]["epsilon_filter"] = result["partners"]["hungary"]["epsilon_filter"] = 0.5
    html = write(result, verdict).html
    svg = next(chart for chart in html.split("<svg")[1:] if "ε by partner" in chart).split("</svg>")[0]
    ticks = {t: float(x) for x, t in re.findall(r'class="tick" x="([\d.]+)"[^>]*>([\d.]+)<', svg)}
    bars = [float(w) for w in re.findall(r'class="filter"[^>]*width="([\d.]+)"', svg)]
    assert math.isclose(bars[1], ticks["0.5"] - ticks["0"], abs_tol=0.2)
    assert math.isclose(bars[0], 0.99001 * (ticks["1"] - ticks["0"]), abs_tol=0.2)
    caps = {float(x) for x in re.findall(r'class="cap" x1="([\d.]+)"', svg)}
    assert caps == {ticks["1"]}


HOSTILE = "<script>alert(1)</script>\"'>&amp;\u202egro\ud800" + "x" * 300


def test_hostile_names_stay_text(write: Write, result: Any, verdict: Any) -> None:
    for place in (result["partners"], verdict["partners"], result["baselines"]["local"]):
        place[HOSTILE] = place.pop("cleveland")
    for key in ("run_id", "name", "task", "created"):
        result[key] = HOSTILE
    result["refusals"][0] |= {"partner": HOSTILE, "run_id": HOSTILE, "reason": HOSTILE, "detail": HOSTILE}
    verdict["warnings"] = verdict["violations"] = [{"file": HOSTILE, "line": 3, "what": HOSTILE}]
    verdict["limits"] = [HOSTILE]
    verdict["bundle"] = "out/a b; rm -rf $HOME"
    result["privacy"]["adversary"] = HOSTILE
    page = write(result, verdict, HOSTILE)
    assert "<script" not in page.html
    assert "&lt;script&gt;alert(1)" in page.html
    assert "\u202e" not in page.html
    assert "\ud800" not in page.html
    assert not [a for a in page.attributes if a[0] == "script" or a[1].startswith("on")]
    assert "hansa audit 'out/a b; rm -rf $HOME'" in page.text
    # Nothing that sits in a chart or a table cell is as long as the name.
    assert max(len(c.strip()) for t in page.tables for row in t for c in row) < 60
    assert all(len(t) < 60 for t in re.findall(r"<text[^>]*>([^<]*)</text>", page.html))


@pytest.mark.parametrize("baselines", [None, {}, {"pooled": None, "local": {}}, {"local": {"hungary": None}}])
def test_missing_baselines(write: Write, result: Any, verdict: Any, baselines: Any) -> None:
    result["baselines"] = baselines
    page = write(result, verdict)
    assert "pooled" not in page.text
    assert "The baselines are not private" not in page.text


def test_undefined_scores_leave_a_gap(write: Write, result: Any, verdict: Any) -> None:
    for r, value in ((3, None), (5, math.nan), (7, math.inf)):
        result["rounds"][r - 1]["metrics"]["auc"] = value
    del result["rounds"][8]["metrics"]
    page = write(result, verdict)
    rows = page.table("Round", "AUC")
    assert [r for r, cells in rows.items() if cells[0] == "—"] == ["3", "5", "7"]
    assert "9" not in rows  # which was not evaluated
    assert "By round: the 9 of 10 that were evaluated" in page.text
    (path,) = re.findall(r'class="curve" d="([^"]+)"', page.html.split("ε by partner")[0])
    assert path.count("M") == 4
    assert not re.search(r"\bnan\b|\binf\b|\bnone\b", page.text[: page.text.index("Violations")], re.I)


def test_accuracy_when_there_is_no_auc(write: Write, result: Any, verdict: Any) -> None:
    for scores in (result["final"], *(r["metrics"] for r in result["rounds"])):
        del scores["auc"]
    page = write(result, verdict)
    assert "the model reaches an accuracy of 0.771" in page.text
    assert "Accuracy by round" in page.text


def test_private_evaluation_does_not_call_its_rows_public(write: Write, result: Any, verdict: Any) -> None:
    result["evaluation"]["kind"] = "private"
    page = write(result, verdict)
    assert "public row" not in page.text
    assert "noisy score histograms over private rows" in page.text
    assert "184" not in page.text


def test_an_almost_empty_result(write: Write) -> None:
    page = write({}, {"verified": False})
    assert "Not verified" in page.text
    assert "There is NO privacy guarantee." in page.text
    page = write({"evaluation": {"kind": "none"}}, {"verified": True, "partners": {"a": {}}})
    assert "asks for no evaluation" in page.text


def test_what_the_baselines_are_stands_beside_them(write: Write, result: Any, verdict: Any) -> None:
    words = "They have this run's learning rate and momentum, but no clipping"
    assert words in write(result, verdict).text
    result["privacy"]["kind"] = "none"
    assert words not in write(result, verdict).text


def test_no_privacy_is_said_plainly(write: Write, result: Any, verdict: Any) -> None:
    result["privacy"] = {"kind": "none"}
    for side in (result, verdict):
        for figures in side["partners"].values():
            figures |= {"epsilon": math.inf, "epsilon_filter": math.inf, "epsilon_cap": None}
    page = write(result, verdict)
    assert "There is NO privacy guarantee." in page.text
    assert "differentially private" not in page.text
    assert "Verified, but not private" in page.text
    assert ("section", "class", "verdict bad") in page.attributes
    assert page.html.count("<svg") == 1
    assert 'class="filter"' not in page.html


@pytest.mark.parametrize("field", ["unit", "adjacency", "epsilon", "delta", "noise", "adversary"])
def test_no_claim_without_all_it_needs(write: Write, result: Any, verdict: Any, field: str) -> None:
    del result["privacy"][field]
    page = write(result, verdict)
    assert "differentially private" not in page.text
    assert "No privacy guarantee can be stated." in page.text


def test_violations_come_first(write: Write, result: Any, verdict: Any) -> None:
    verdict["verified"] = False
    verdict["violations"] = [
        {"file": "partners/hungary/ledger.jsonl", "line": 3, "what": "signature does not verify"},
        {"file": "charter.json", "line": None, "what": "edited after signing"},
    ]
    verdict["warnings"] = [{"file": "partners/cleveland/ledger.jsonl", "line": 31, "what": "torn last line"}]
    page = write(result, verdict)
    assert ("section", "class", "verdict bad") in page.attributes
    text = page.text[page.text.index("SIMULATED") :]
    assert "The audit found 2 violations." in text
    places = [
        text.index(words)
        for words in (
            "Not verified",
            "partners/hungary/ledger.jsonl, line 3 signature does not verify",
            "charter.json edited after signing",
            "Claimed, not confirmed: Each partner's updates",
            "How good is the model?",
            "This is the charter that came with the run; the audit did not confirm it.",
            "partners/cleveland/ledger.jsonl, line 31 torn last line",
        )
    ]
    assert places == sorted(places)


def test_never_verified_against_the_evidence(write: Write, result: Any, verdict: Any) -> None:
    verdict["violations"] = [{"file": "x", "line": 1, "what": "y"}]  # though "verified" says True
    assert "Not verified" in write(result, verdict).text
    verdict["violations"] = []
    verdict["charter_sha256"] = "00" * 32
    page = write(result, verdict)
    assert "Not verified" in page.text
    assert "the audit checked charter " + "00" * 32 in page.text
    verdict["charter_sha256"] = result["charter_sha256"]
    verdict["verified"] = None
    assert "named no violation" in write(result, verdict).text


def test_the_audit_wins_and_disagreement_is_shown(write: Write, result: Any, verdict: Any) -> None:
    verdict["partners"]["hungary"]["epsilon_filter"] = 0.9995
    verdict["partners"]["cleveland"]["epsilon"] = None
    del verdict["partners"]["switzerland"]
    page = write(result, verdict)
    assert "hungary: ε by the filter is 0.98128 in result.json and 0.9995 by the audit" in page.text
    assert "switzerland is in result.json, but the audit found no ledger of it." in page.text
    rows = page.table("Partner", "cap", "δ")
    assert rows["hungary"][0] == "0.9995"
    assert rows["cleveland"][3] == "0.9300†"
    assert rows["hungary"][3] == "0.9213"
    assert "except those marked †" in page.text
    # "Each partner" cannot be said while one of them has no ledger.
    assert "Claimed, but not confirmed by the ledgers' figures: Each partner" in page.text


@pytest.mark.parametrize(("key", "value"), [("epsilon_filter", 1.01), ("delta", 2e-4)])
def test_a_ledger_above_the_stated_guarantee(write: Write, result: Any, verdict: Any, key: str, value: float) -> None:
    verdict["partners"]["hungary"][key] = result["partners"]["hungary"][key] = value
    page = write(result, verdict)
    assert "stated for this run" in page.text
    assert "Claimed, but not confirmed" in page.text
    assert "Ledgers verified, privacy claim not confirmed" in page.text
    assert ("section", "class", "verdict bad") in page.attributes
    if key == "epsilon_filter":
        assert "1 of 4 partners went over their cap." in page.text
        assert page.html.count('<rect class="over"') == 1


def test_epsilon_in_the_claim_is_not_rounded(write: Write, result: Any, verdict: Any) -> None:
    result["privacy"] |= {"epsilon": 1.0000004, "delta": 1.25e-5}
    assert "(ε = 1.0000004, δ = 1.25e-5)-differentially private" in write(result, verdict).text


@pytest.mark.parametrize("reason", list(Refusal))
def test_every_refusal_has_words(write: Write, result: Any, verdict: Any, reason: Refusal) -> None:
    result["refusals"] = [{"partner": "hungary", "run_id": "r", "reason": reason.value, "detail": "", "round": 4}]
    page = write(result, verdict)
    found = re.search(r"hungary refused run r, round 4, because (.+?)\. The audited", page.text)
    assert found
    assert found[1] == BECAUSE[reason]


def test_a_thousand_partners(tmp_path: Path, result: Any, verdict: Any) -> None:
    crowd(result, verdict, 1000)
    path = tmp_path / "r.html"
    started = time.perf_counter()
    report.write_report(path, result, verdict, WORDS)
    assert time.perf_counter() - started < 3
    assert path.stat().st_size < 500_000
    page = Page(path.read_text())
    assert "The 20 of 1000 partners" in page.text
    rows = page.table("Partner", "cap", "δ")
    highest = sorted((p["epsilon_filter"] for p in verdict["partners"].values()), reverse=True)
    assert [row[0] for row in rows.values()] == [f"{x:.4f}" for x in highest[:20]]
    quantiles = page.table("", "ε (filter)", "ε (odometer)")
    assert quantiles["lowest"] == ["0.5000", "0.4500", "1"]
    assert quantiles["highest"] == ["1.0000", "0.9000", "1"]
    assert quantiles["median"][0] in {f"{x:.4f}" for x in highest[499:501]}
    # The histogram counts every partner once, and a partner at its cap is not drawn beyond it.
    svg = next(c for c in page.html.split("<svg")[1:] if "Distribution of ε" in c).split("</svg>")[0]
    counts = [
        int(n) for n in re.findall(r'</?rect[^>]*class="(?:filter|odometer|over)"[^>]*/>\s*<text[^>]*>(\d+)<', svg)
    ]
    assert sum(counts) == 2000
    assert 'class="over"' not in svg
    assert page.table("After round", "partners")["10"] == ["1000", "0.5000", f"{highest[500]:.4f}", "1.0000"]
    assert "the lowest, the median and the highest" in page.text


def test_crowd_draws_what_passes_its_cap(write: Write, result: Any, verdict: Any) -> None:
    crowd(result, verdict, 200)
    verdict["partners"]["client-0007"]["epsilon_filter"] = 1.001
    page = write(result, verdict)
    assert page.html.count('<rect class="over"') == 1
    assert next(iter(page.table("Partner", "cap", "δ"))) == "client-0007"


def test_long_runs_are_thinned_with_a_note(write: Write, result: Any, verdict: Any) -> None:
    result["rounds"] = [{"round": r, "metrics": {"auc": 0.8}} for r in range(1, 5001)]
    for figures in verdict["partners"].values():
        figures["trajectory"] = [{"round": r, "epsilon_filter": 0.9 * r / 5000} for r in range(1, 5001)]
    page = write(result, verdict)
    assert "100 of 5000 that were evaluated" in page.text
    assert list(page.table("Round", "AUC"))[-1] == "5000"
    assert len(page.html) < 200_000


def test_only_rounds_with_scores_are_listed(write: Write, result: Any, verdict: Any) -> None:
    result["rounds"] = [{"round": r, "metrics": {"auc": 0.8} if r % 20 == 0 else {}} for r in range(1, 2001)]
    page = write(result, verdict)
    assert list(page.table("Round", "AUC")) == [str(r) for r in range(20, 2001, 20)]
    assert "By round: the 100 of 2000 that were evaluated" in page.text


def test_four_partners_take_under_two_seconds(write: Write, result: Any, verdict: Any) -> None:
    started = time.perf_counter()
    write(result, verdict)
    assert time.perf_counter() - started < 2


def test_inputs_are_not_changed(write: Write, result: Any, verdict: Any) -> None:
    before = copy.deepcopy((result, verdict))
    write(result, verdict)
    assert (result, verdict) == before


def test_a_folder_that_cannot_be(tmp_path: Path, result: Any, verdict: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"report\.html"):
        report.write_report(tmp_path / "file" / "report.html", result, verdict, WORDS)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_disk_full_leaves_the_old_page(
    tmp_path: Path, result: Any, verdict: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OutputError, match="the disk is full") as caught:
        report.write_report(path, result, verdict, WORDS)
    assert "Free some space" in caught.value.hint
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_target_is_a_folder(tmp_path: Path, result: Any, verdict: Any) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError):
        report.write_report(tmp_path / "report.html", result, verdict, WORDS)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_virtual_clock_is_drawn_and_called_an_estimate(write: Write, result: Any, verdict: Any) -> None:
    assert "How long would it take?" not in write(result, verdict).html
    fates = {"answered": 20, "unavailable": 3, "dropped out": 4, "too late": 1, "not needed": 2}
    row = {"seconds": 100.0, "evaluate_s": 0.0, "bytes_down": 1_000_000, "bytes_up": 2_500_000, "asked": 30, **fates}
    rounds = [{"round": r, **row, "seconds": 100.0 * r} for r in range(1, 101)]
    result["system"] = {"rounds": [*rounds, {"round": 101}, {**row, "round": 102, "seconds": math.nan}]}
    page = write(result, verdict)
    text = " ".join(page.words)
    assert "100 rounds in 5.84 days (median 84.2 min, longest 2.78 h), 100 MB down, 250 MB up" in text, (
        "what is no round is left out"
    )
    assert "not a measurement" in text
    assert ["1", "100 s", "1 MB", "2.5 MB", "20", "3", "4", "1", "2"] in [row for table in page.tables for row in table]
    bars = re.findall(
        r'<rect class="f-([a-z-]+)" x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', page.html
    )
    stacked = [(kind, float(y), float(h)) for kind, x, y, h in bars if x == bars[0][1]]
    assert [kind for kind, _, _ in stacked] == ["answered", "unavailable", "dropped-out", "too-late", "not-needed"]
    assert stacked[0][2] == pytest.approx(20 / 3 * stacked[1][2], rel=0.05), "heights are counts"
    for (_, below, _), (_, above, tall) in pairwise(stacked):
        assert above + tall == pytest.approx(below, abs=0.15), "one on the other"
