"""The page and the terminal's words of an audit: what they say, that they load and run nothing, and hostile bundles."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from hansa.common import audit_report, page, verifier
from hansa.common.charter import adversary
from hansa.common.cli import run

sys.path.insert(0, str(Path(__file__).parent))
import bundles
import verdicts

VOID = {"meta", "br", "link", "img", "hr", "input"}
MADE = datetime(2026, 11, 25, 11, 2, 3, tzinfo=UTC)
NASTY = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\u202egnp.exe\u2066\x1b[2J\x00\u200b\ud800{{7*7}}"
    + "a\u0301\u0301\u0301\u0301"
)


class Page(HTMLParser):
    """Checks that tags balance; collects text, tags with their attributes, and sections by their heading's id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.stack, self.words = html, list[str](), list[str]()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.at, self.sections = "", dict[str, str]()
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append((tag, given))
        if tag == "h2":
            self.at = given["id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack
        assert self.stack.pop() == tag
        if tag in ("td", "th", "h3", "p"):
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.words.append(data)
            self.sections[self.at] = self.sections.get(self.at, "") + data

    @property
    def text(self) -> str:
        return _flat("".join(self.words))

    def section(self, name: str) -> str:
        return _flat(self.sections[name])

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.tags if attribute in attrs]


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def show(verdict: dict[str, Any], **more: Any) -> Page:
    return Page(audit_report.render(verdict, made=MADE, **more))


@pytest.fixture(scope="module")
def good() -> Page:
    return show(verdicts.verdict(), verifier_sha256="ab" * 32, charter_words="CHARTER  heart\n  key <b>")


# -- what it says ----------------------------------------------------------------------------------------------------


def test_the_verdict_is_one_sentence_with_its_date_its_charter_and_what_it_covers(good: Page) -> None:
    assert "✓ Verified On 25 November 2026, 11:02 UTC everything in this bundle" in good.text
    assert "within its cap for every one of 4 partners" in good.text
    assert verdicts.CHARTER in good.text
    assert (
        "4 partners; checked were 5 ledgers, 1,123 entries, 1,340 signatures, 205 signed heads, 215 comparisons"
        in good.text
    )
    assert "from 22 November 2026, 01:50 UTC to 22 November 2026, 01:59 UTC" in good.text
    assert "1 closing checkpoint, signed by everyone" in good.text


def test_every_figure_stands_beside_its_unit_adjacency_delta_noise_and_adversary(good: Page) -> None:
    for name in ("overview", "partner-1", "partner-2", "partner-3", "partner-4", "charges"):
        text = good.section(name).lower()
        for words in (
            "unit: one record of one partner",
            "adjacency: add-or-remove-one",
            "δ",
            "noise: local",
            "adversary: everyone but",
        ):
            assert words in text, (name, words)
    assert "δ = 1e-4" in good.section("partner-1")


def shared(names: list[str]) -> dict[str, Any]:
    """A verdict in which these partners shared their noise."""
    made = verdicts.verdict()
    for name in names:
        noise = {"clip": 1.0, "grid": 2.0**-12, "dimension": 72, "quorum": 4, "colluding": 0, "sigma": 30.2}
        event = made["partners"][name]["events"][0] | {"mechanism": "shared-gaussian/1", "shared": noise}
        made["partners"][name] |= {"noise": "shared", "colluding": 0, "adversary": adversary(0), "events": [event]}
    return made


def test_shared_noise_is_never_called_local(audited: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    made = shared(list(verdicts.HOSPITALS))
    page = Page(audit_report.render(made, made=MADE))
    for name in ("overview", "partner-1", "partner-2", "charges"):
        text = page.section(name)
        assert "noise: shared (each partner adds a share" in text, name
        assert adversary(0) in text, name
        assert "everyone but" not in text, name
    # Of shared noise an ε is no bound on what anyone sees: a single vector leaves the node with its share alone.
    assert "Whatever the adversary named above sees of the sums that that node's vectors are in, it is" in page.text
    assert "Whatever anyone sees" not in page.text
    assert "less that adversary can learn" in page.text
    assert "shared Gaussian noise (quorum 4, colluding 0) 1 (all records) 30.125" in page.section("partner-1")
    assert audited(made) == 0
    shown = _flat(capsys.readouterr().out)
    assert f"add-or-remove-one, shared noise, against {adversary(0)}; epsilon rounded up" in shown
    assert "local noise" not in shown


def test_where_partners_differ_it_is_said_of_each(
    audited: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    made = shared(["hungary"])
    page = Page(audit_report.render(made, made=MADE))
    text = page.section("overview")
    assert "of hungary: shared" in text
    assert f"of hungary: {adversary(0)}" in text
    assert "of cleveland, switzerland, va-long-beach: everyone but" in text
    assert "noise: local" in page.section("partner-1")
    assert "noise: shared" in page.section("partner-2")
    assert audited(made) == 0
    shown = _flat(capsys.readouterr().out)
    assert (
        "hungary: recomputed from the ledgers: record level, add-or-remove-one, shared noise, against the coordinator alone"
        in shown
    )
    assert (
        "va-long-beach: recomputed from the ledgers: record level, add-or-remove-one, local noise, against all but"
        in shown
    )


def test_a_partner_is_told_in_full(good: Page) -> None:
    text = good.section("partner-2")
    assert "ε = 0.9813 by the filter, 0.9127 by the odometer, of a cap of 1, at δ = 1e-4" in text
    assert "under this charter costs by itself ε = 0.7851 by the filter" in text
    assert "Gaussian noise 1 (all records) 30.125 6 10 60 this charter" in text
    assert "Gaussian noise 0.1 1.5 4 8 32 another charter" in text
    assert "24 of them undisclosed" in text
    assert "1 of them for work that was not completed" in text
    assert "Others countersigned it as it was at 33 entries (hungary, switzerland, coordinator)" in text
    assert "The last entry nobody else has signed yet" in text
    assert "a new version of 77777777: the same budget" in text
    assert "budget 1 its remaining privacy budget cannot pay for it" in good.section("partner-1")
    assert "not disclosed" in good.section("charges")
    assert "10.0 %" not in good.text


def test_who_countersigned_what(good: Page) -> None:
    text = good.section("witnesses")
    assert "run-7f3a2c cleveland 33, hungary 33, switzerland 33, va-long-beach 33, coordinator 44" in text
    assert "cleveland hungary 10 5, 8, 11, 14, 17, … 32 cleveland, hungary, coordinator" in text


def test_up_to_where_each_ledger_is_countersigned(good: Page) -> None:
    text = good.section("witnesses")
    assert "hungary 58 33 1 hungary, switzerland, coordinator run-7f3a2c" in text
    assert "the coordinator 44 44 0 cleveland, hungary run-7f3a2c" in text


def test_what_it_was_compared_with() -> None:
    shown = show(verdicts.verdict(), against=["their heads/a.jsonl", "b"])
    assert "2 given beside the bundle: their heads/a.jsonl, b" in shown.text
    assert "verifier.py out/demo --against 'their heads/a.jsonl' --against b > verdict.json" in shown.section("repeat")


def test_limits_and_the_way_to_repeat_it_are_part_of_it(good: Page) -> None:
    for limit in verdicts.verdict()["limits"]:
        assert limit in good.section("limits")
    repeat = good.section("repeat")
    assert "audit/bin/python verifier.py out/demo > verdict.json" in repeat
    assert "ab" * 32 in repeat
    assert "key <b>" in good.section("charter")


def test_violations_come_first_and_by_code() -> None:
    shown = show(verdicts.failing())
    assert "✗ Not verified On 25 November 2026, 11:02 UTC the audit found 35 violations" in shown.text
    assert "none of them can be relied on" in shown.text
    assert "within its cap for every" not in shown.text
    text = shown.section("violations")
    assert "Violation entry-signature 33 places" in text
    assert "What it means. The bytes of this entry are not those that its owner signed" in text
    assert "partners/hungary/ledger.jsonl:7 bad signature" in text
    assert "The first 25 of 33" in text
    assert "partners/cleveland/ledger.jsonl:31 spent epsilon 1.2312" in text
    assert "OVER CAP" in shown.section("partner-1")
    assert "no finite ε holds" in shown.section("partner-3")
    assert "Where the lines end or have a gap no finite ε holds" in shown.section("partner-3")
    assert verdicts.failing()["claim"] not in shown.text


def test_a_verdict_that_is_not_true_is_no_verdict() -> None:
    for said in (None, "true", 1):
        assert "✗ Not verified" in show(verdicts.verdict() | {"verified": said}).text
    assert "✗ Not verified" in show(verdicts.failing() | {"verified": True}).text


def test_no_guarantee_is_said_in_the_headline() -> None:
    made = verdicts.verdict()
    for p in made["partners"].values():
        p |= {"epsilon": None, "epsilon_filter": None, "epsilon_cap": None, "unbounded": True}
    shown = show(made)
    assert "Verified, but there is no privacy guarantee" in shown.text
    assert "no bound on privacy loss holds" in shown.text
    assert "noise placement: none for what left unprotected" in shown.text
    assert "within its cap" not in shown.text
    for p in made["partners"].values():
        p["trajectory"] = [point | {"epsilon": None, "epsilon_filter": None} for point in p["trajectory"]]
    assert not any(tag == "svg" for tag, _ in show(made).tags)  # nothing to draw
    one = verdicts.verdict()
    one["partners"]["hungary"] |= {"epsilon": None, "epsilon_filter": None, "unbounded": True}
    assert "Verified, but not private for all" in show(one).text


def test_every_code_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "auditing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`,? ?)+) \|", text, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(verifier.MEANS)


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.99, "0.9900"), (0.99001, "0.9901"), (1.00000001, "1.0001"), (0.1 + 0.2, "0.3000"), (0.0, "0.0000"),
     (1e-9, "0.0001"), (math.inf, "unbounded"), (12345.5, "12,345.5000"), (1e300, "1e+300")],
)  # fmt: skip
def test_epsilon_is_rounded_up(value: float, shown: str) -> None:
    assert page.up(value) == shown


def test_a_cap_is_shown_exactly() -> None:
    assert [page.exact(x) for x in (1.0, 0.123456789, 1e-5, 1e-4, 8.0, 1e300)] == [
        "1", "0.123456789", "1e-5", "1e-4", "8", "1e+300",
    ]  # fmt: skip


def test_the_curve_is_of_steps_against_the_cap() -> None:
    points = [{"epsilon_filter": e, "epsilon": e / 2, "charter": c} for e, c in [(0.5, "other"), (1.0, "this")]]
    curve = audit_report._curve(None, points, 2.0)
    x, y = curve["x"], curve["y"]
    assert curve["lines"][0]["path"] == f"M{x(0)} {y(0)}H{x(1)}V{y(0.5)}H{x(2)}V{y(1.0)}"
    assert curve["cap"] == y(2.0)
    assert curve["others"] == [(x(0), x(1) - x(0))]
    points[0]["epsilon_filter"] = None
    assert audit_report._curve(None, points, None)["lines"][0]["path"] == f"M{x(0)} {y(0)}M{x(2)} " + str(
        audit_report._curve(None, points, None)["y"](1.0)
    )


def test_an_odometer_that_was_read_at_some_charges_is_never_drawn_too_low() -> None:
    points: list[dict[str, Any]] = [{"epsilon_filter": float(i), "epsilon": None} for i in range(1, 7)]
    points[1]["epsilon"], points[4]["epsilon"] = 1.0, 3.0
    curve = audit_report._curve(None, points, None, tight=4.0)
    x, y = curve["x"], curve["y"]
    assert curve["lines"][1]["path"] == (
        f"M{x(0)} {y(0)}H{x(1)}V{y(1.0)}H{x(2)}H{x(3)}V{y(3.0)}H{x(5)}H{x(6)}V{y(4.0)}"
    )
    assert curve["unknown"]
    only_the_end = audit_report._curve(None, [p | {"epsilon": None} for p in points], None, tight=4.0)
    assert only_the_end["lines"][1]["path"] == ""
    assert only_the_end["lines"][1]["end"] == (x(6), y(4.0))


def test_budgets_of_several_lineages_have_a_curve_each() -> None:
    made = verdicts.verdict()
    p = made["partners"]["cleveland"]
    p["lineages"]["ff" * 16] = {"epsilon_filter": 0.2, "epsilon_cap": 0.5, "datasets": [
        {"dataset": "99" * 16, "declared": {"kind": "disjoint", "of": None, "cutoff": "2026-01-01"}}]}  # fmt: skip
    for i, point in enumerate(p["trajectory"]):
        point["lineage"] = ("ff" * 16) if i % 2 else "0a1b2c3d" * 4
    shown = show(made)
    assert sum(tag == "svg" for tag, _ in shown.tags) == 6
    assert "rows collected from 2026-01-01 on, disjoint from all earlier ones" in shown.section("partner-1")


# -- a page that stands alone ----------------------------------------------------------------------------------------

ALL: list[Callable[[], dict[str, Any]]] = [verdicts.verdict, verdicts.failing, verdicts.population]


@pytest.mark.parametrize("make", ALL)
def test_it_loads_and_runs_nothing(make: Callable[[], dict[str, Any]]) -> None:
    shown = show(make(), charter_words="words")
    tags = {tag for tag, _ in shown.tags}
    assert not tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "audio",
        "video",
        "image",
        "use",
        "foreignobject",
    }
    policy = [a["content"] for t, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]
    assert not re.search(r"url\(|@import|https?:|javascript:|\bon\w+=", shown.html)
    ids = shown.values("id")
    assert len(set(ids)) == len(ids)
    assert {link.removeprefix("#") for link in shown.values("href")} <= set(ids)
    assert all(link.startswith("#") for link in shown.values("href"))


@pytest.mark.parametrize("make", ALL)
def test_it_can_be_read_without_seeing_it(make: Callable[[], dict[str, Any]]) -> None:
    shown = show(make())
    ids = set(shown.values("id"))
    svgs = [attrs for tag, attrs in shown.tags if tag == "svg"]
    assert svgs
    for attrs in svgs:
        assert attrs["role"] == "img"
        assert set(attrs["aria-labelledby"].split()) <= ids
    for label in shown.values("aria-labelledby"):
        assert set(label.split()) <= ids
    counts = Counter(tag for tag, _ in shown.tags)
    assert counts["table"] == counts["caption"] == counts["thead"]
    assert all("scope" in attrs for tag, attrs in shown.tags if tag == "th")
    assert [a for t, a in shown.tags if t == "html"] == [{"lang": "en"}]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(good: Page, scheme: str) -> None:
    blocks = re.findall(r":root \{(.*?)\}", good.html, re.DOTALL)
    colors = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{3,6});", blocks[0 if scheme == "light" else 1]))

    def light(color: str) -> float:
        digits = color[1:] if len(color) == 7 else "".join(c * 2 for c in color[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for paper in ("paper", "wash"):
        for ink in ("ink", "soft", "good", "bad", "warn", "filter", "odometer"):
            high, low = sorted((light(colors[paper]), light(colors[ink])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (paper, ink)


def test_it_is_shipped() -> None:
    assert (files("hansa.common") / "templates" / "audit.html.j2").is_file()


# -- hostile and incomplete verdicts ---------------------------------------------------------------------------------


def _strings(value: Any, text: str, keys: bool = True) -> Any:
    """The value with every string, and every name of a partner or reason, made `text` (numbered where it is a key)."""
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return [_strings(item, text) for item in value]
    if isinstance(value, dict):
        fixed = {"partners", "lineages", "refusals_by_reason"}
        return {
            k: ({f"{text}{i}": _strings(v, text) for i, v in enumerate(item.values())} if k in fixed else _strings(item, text))
            for k, item in value.items()
        }  # fmt: skip
    return value


@pytest.mark.parametrize("make", ALL)
def test_no_string_of_a_bundle_becomes_markup(make: Callable[[], dict[str, Any]]) -> None:
    plain, nasty = (show(_strings(make(), text), charter_words=text) for text in ("x" * len(NASTY), NASTY))
    assert Counter(tag for tag, _ in plain.tags) == Counter(tag for tag, _ in nasty.tags)
    assert [sorted(a) for _, a in plain.tags] == [sorted(a) for _, a in nasty.tags]
    assert "<script>alert(1)</script>" in nasty.text  # as text
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]", nasty.html
    )
    assert "\u0301" * 3 not in nasty.html
    assert "49" not in nasty.section("limits")
    nasty.html.encode()


def test_long_strings_are_cut() -> None:
    html = show(_strings(verdicts.failing(), "y" * 100_000)).html
    assert len(html) < 400_000


@pytest.mark.parametrize("make", ALL)
def test_a_verdict_may_lack_anything(make: Callable[[], dict[str, Any]]) -> None:
    whole = make()
    show({})
    show({"partners": {"a": {}}, "violations": [{}], "warnings": [{}], "heads": [{}], "closings": [{}]})
    for key in whole:
        show({k: v for k, v in whole.items() if k != key})
        show(whole | {key: None})
    name, first = next(iter(whole["partners"].items()))
    for key in first:
        for lacking in ({k: v for k, v in first.items() if k != key}, first | {key: None}):
            show(whole | {"partners": {name: lacking}})
    for key in ("trajectory", "events"):
        for item in (first.get(key) or [])[:3]:  # they are alike
            for field in item:
                for lacking in ({k: v for k, v in item.items() if k != field}, item | {field: None}):
                    show(whole | {"partners": {name: first | {key: [lacking]}}})


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e308, 1e-308, "0.5", True, [], {}])
def test_strange_numbers(value: Any) -> None:
    made = verdicts.verdict()
    p = made["partners"]["cleveland"]
    p |= {
        "epsilon": value,
        "epsilon_filter": value,
        "epsilon_cap": value,
        "delta": value,
        "tail": value,
        "rounds": value,
    }
    p["trajectory"] = [point | {"epsilon": value, "epsilon_filter": value, "entry": value} for point in p["trajectory"]]
    p["events"] = [event | {"q": value, "sigma": value, "steps": value} for event in p["events"]]
    text = show(made).text
    assert "nan" not in text.replace("finance", "").lower().split()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_every_honest_bundle_has_a_page(seed: int, tmp_path: Path) -> None:
    bundles.honest(bundles.any_shape(seed)).write(tmp_path)
    verdict = verifier.verify_bundle(tmp_path)
    shown = show(verdict)
    for name in verdict["partners"]:
        assert name in shown.text
    for warning in verdict["warnings"]:
        assert warning["means"] in shown.section("warnings")


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_a_population_is_told_by_history() -> None:
    shown = show(verdicts.population(1000, 40))
    assert sum(tag == "svg" for tag, _ in shown.tags) == 1
    assert len(shown.html) < 100_000
    assert "1,000 partners" in shown.text
    assert "99 more" in shown.section("overview")
    assert "median" in shown.section("overview")
    groups = audit_report.histories(verdicts.population(1000, 40)["partners"])
    assert sum(len(names) for names, _ in groups) == 1000
    spent = [figures["epsilon_filter"] for _, figures in groups]
    assert spent == sorted(spent, reverse=True)
    read = json.loads(json.dumps(verdicts.population(1000, 40)))  # figures are no longer the same objects
    assert [names for names, _ in audit_report.histories(read["partners"])] == [names for names, _ in groups]


def test_a_hundred_thousand_clients_take_seconds() -> None:
    start = time.process_time()
    made = show(verdicts.population(100_000, 40))
    assert time.process_time() - start < 10
    assert len(made.html) < 100_000


def test_a_long_history_makes_no_long_page() -> None:
    made = verdicts.verdict()
    p = made["partners"]["cleveland"]
    p["trajectory"] = verdicts.trajectory(0.99, rounds=10_000)
    p["events"] = p["events"] * 2000
    made["violations"] = verdicts.failing()["violations"] * 500
    start = time.process_time()
    shown = show(made)
    assert time.process_time() - start < 5
    assert len(shown.html) < 250_000
    assert "14 of 10,000 charges" in shown.section("charges")
    assert "And 1,960 more kinds of charge" in shown.section("partner-1")


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs `hansa audit BUNDLE ...` with a given verdict."""
    (tmp_path / "bundle").mkdir()
    monkeypatch.setenv("COLUMNS", "80")

    def go(verdict: dict[str, Any], *arguments: str | Path) -> int:
        monkeypatch.setattr(verifier, "verify_bundle", lambda *_, **__: copy.deepcopy(verdict))
        return run(["audit", str(tmp_path / "bundle"), *map(str, arguments)])

    return go


def test_it_writes_the_page_and_keeps_the_exit_codes(
    audited: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "pages" / "report.html"
    assert audited(verdicts.verdict(), "--report", report) == 0
    assert "✓ Verified" in Page(report.read_text()).text
    assert str(report) in capsys.readouterr().out.replace("\n", "")
    assert audited(verdicts.failing(), "--report", report, "--format", "json") == 1
    assert json.loads(capsys.readouterr().out) == verdicts.failing()
    assert "✗ Not verified" in Page(report.read_text()).text
    assert sorted(p.name for p in report.parent.iterdir()) == ["report.html"]


def test_it_does_not_write_into_the_evidence(
    audited: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for inside in (tmp_path / "bundle" / "report.html", tmp_path / "bundle" / ".." / "bundle" / "x" / "report.html"):
        assert audited(verdicts.verdict(), "--report", inside) == 2
        assert "inside the bundle" in capsys.readouterr().err
    assert list((tmp_path / "bundle").iterdir()) == []


def test_a_report_is_a_page_and_says_how_it_becomes_a_pdf(
    audited: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("report.pdf", "report.PDF", "report.json", "report"):
        assert audited(verdicts.verdict(), "--report", tmp_path / name) == 2
        assert "print it to PDF" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
    assert audited(verdicts.verdict(), "--report", tmp_path / "report.HTM") == 0


def test_an_unreadable_bundle_has_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", str(tmp_path / "none"), "--report", str(tmp_path / "report.html")]) == 2
    assert not (tmp_path / "report.html").exists()
    assert run(["audit", str(tmp_path), "--report", "/proc/none/report.html"]) == 2
    capsys.readouterr()


def test_the_terminal_has_one_line_a_partner(audited: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert audited(verdicts.verdict()) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("VERIFIED")
    lines = [line.split() for line in shown.splitlines()]
    assert ["cleveland", "0.9900", "1", "0.9207", "1e-4", "0.7920", "10", "1", "within", "cap"] in lines
    assert ["va-long-beach", "0.7551", "1", "0.7023", "1e-4", "0.6041", "10", "0", "within", "cap"] in lines
    flat = _flat(shown)
    assert "countersigned up to entry 33 of 58 by hungary, switzerland, coordinator: hungary" in flat
    assert "record level, add-or-remove-one, local noise, against all but the partner" in flat


def test_the_terminal_groups_by_code(audited: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert audited(verdicts.failing()) == 1
    shown = _flat(capsys.readouterr().out)
    assert shown.startswith("NOT VERIFIED")
    assert "violation entry-signature, 33 places: The bytes of this entry" in shown
    assert shown.count("bad signature") == 8
    assert "and 25 more: --format json shows all" in shown
    assert "violation over-cap, 1 place" in shown
    assert "violation head-differs, 1 place heads/switzerland.jsonl:3: another root" in shown
    assert "1.2312 1 1.1450 1e-4 0.7920 10 1 OVER CAP" in shown
    assert "UNBOUNDED" in shown


def text_of(made: dict[str, Any]) -> str:
    return _flat(re.sub("<[^>]+>", " ", audit_report.render(made, made=MADE)))


def _partly(**figures: Any) -> dict[str, Any]:
    made = verdicts.failing()
    made["partners"]["hungary"] |= {"whole": False, "unread": 0, "missing": 0} | figures
    return made


@pytest.mark.parametrize(
    ("figures", "stands", "filter_words", "vouched"),
    [
        ({"unread": 7}, "READ TO LINE 58, 7 MORE UNREAD", "0.9813 + ?", "up to entry 33 of 58 by"),
        (
            {"missing": 7},
            "READ TO LINE 58, 7 MISSING",
            "0.9813 + ?",
            "up to entry 33 of 65, 7 of them missing here, by",
        ),
        (
            {"whole": True, "missing": 1},
            "READ TO LINE 58, 1 MISSING",
            "0.9813 + ?",
            "of 59, 1 of them missing here, by",
        ),
        ({"unread": 2, "entries": 0, "epsilon_filter": 0.0}, "NOT READ", "?", "by nobody"),
        (
            {"missing": 37, "entries": 0, "epsilon_filter": 0.0},
            "NOT THERE",
            "?",
            "by nobody, but for 37 entries, of which none can be read here",
        ),
    ],
)
def test_a_ledger_that_is_not_whole(
    audited: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    figures: dict[str, Any],
    stands: str,
    filter_words: str,
    vouched: str,
) -> None:
    """Neither on the terminal nor on the page does a figure of a part look like the whole."""
    made = _partly(**figures)
    if not made["partners"]["hungary"]["entries"]:
        made["partners"]["hungary"] |= {
            "epsilon": 0.0,
            "witnessed": {"length": 0, "by": [], "closing": None},
            "tail": 0,
        }
    assert audited(made) == 1
    shown = _flat(capsys.readouterr().out)
    assert "of 58 entries; what was" in text_of(made) or not made["partners"]["hungary"]["entries"]
    assert re.search(rf"hungary {re.escape(filter_words)} 1 [0-9. +?]+ 1e-4 .*10 \+ \? 0 \+ \? {stands}", shown)
    assert vouched in shown
    assert "+ ?: of a ledger that is not here, or was not read, to its end" in shown
    shown = audit_report.render(made, made=MADE)
    text = _flat(re.sub("<[^>]+>", " ", shown))
    assert stands in text
    assert filter_words in text
    assert "what was charged may be more" in text
    assert "No entry is without a witness" not in text.split("hungary")[3]
    assert "but not here, or not read, to their end: hungary" in text


def test_what_is_spent_is_rounded_up_and_what_is_left_down() -> None:
    for value, spent, left in (
        (0.279012, "0.2791", "0.2790"),
        (0.5, "0.5000", "0.5000"),
        (1e-9, "0.0001", "0.0000"),
        (0.0, "0.0000", "0.0000"),
    ):
        assert (page.up(value), page.down(value)) == (spent, left)
    assert page.down(3e15) == "3e+15"


def test_several_budgets_are_not_one(audited: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """An epsilon for each lineage; none is shown as if it were for all records of a partner."""
    made = verdicts.verdict()
    one = made["partners"]["hungary"]
    (lineage,) = one["lineages"].values()
    one["lineages"] = {
        "0a1b2c3d" * 4: lineage | {"charter_epsilon": {"epsilon": 0.1, "epsilon_filter": 0.11, "cap": 1.0}},
        "ffee0011" * 4: lineage | {"epsilon": 0.4, "epsilon_filter": 0.5, "delta": 1e-5, "epsilon_cap": 2.0},
    }
    assert audited(made) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["hungary", "0a1b2c3d", "0.9813", "1", "0.9127", "1e-4", "0.1100", "10", "0", "within", "cap"] in lines
    assert ["hungary", "ffee0011", "0.5000", "2", "0.4000", "1e-5", "-", "-", "-", "within", "cap"] in lines
    assert "a partner with several budgets has a line for each lineage" in _flat(shown)
    text = _flat(re.sub("<[^>]+>", " ", audit_report.render(made, made=MADE)))
    assert "hungary ffee0011 0.5000 2 25.0 % 0.4000 1e-5" in text.replace("—", " ")
    assert "has several budgets, each in a row of its own" in text
    assert "It has 2 budgets, told apart below; the largest" in text


def test_the_terminal_tells_a_population_by_history(
    audited: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert audited(verdicts.population(1000, 90)) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 60
    assert "with the same history" in shown


def test_the_terminal_shows_no_control_characters(
    audited: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    made = _strings(verdicts.failing(), NASTY + "[bold]") | {"charter_sha256": "00"}
    assert audited(made) == 1
    shown = capsys.readouterr().out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f]", shown)
    assert "[bold]" in shown
