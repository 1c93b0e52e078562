"""`hansa node budget`: over time, by charter, and what one more run would cost; judged by replaying the ledger here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from hansa.clients import bill
from hansa.clients.bill import budget_report, history
from hansa.clients.bill_show import plot_budget, print_budget
from hansa.clients.registrations import DataFiles
from hansa.clients.registry import Registry, Relation, Rules
from hansa.common.accounting import Budget, PrivacyEvent, odometer
from hansa.common.charter import adversary
from hansa.common.cli import run
from hansa.common.config import load_config
from hansa.common.errors import CharterError, ConfigError, LedgerError, Refusal
from hansa.common.ledger import Entry, read_ledger
from hansa.common.plan_cli import planned
from hansa.common.shared_noise import SharedGaussian
from node_support import NAMES, ROWS, TASK, Realm

BUDGET = Budget.create(2.0, 1e-3)
ROUND = PrivacyEvent(1.0, 10.0, 1)


@pytest.fixture
def realm(tmp_path: Path) -> Iterator[Realm]:
    made = Realm(tmp_path)
    for name in NAMES:
        made.start(name)
    yield made
    made.close()


def shown(report: dict[str, Any]) -> str:
    console = Console(width=200, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_budget(console, report)
    return console.export_text()


def test_over_time_and_by_charter(realm: Realm) -> None:
    second = realm.charter("second", "other-coordinator")
    for name in NAMES:
        realm.start(name, realm.signed, second)
    realm.run("run-1")
    realm.run("run-2", second, "other-coordinator")
    report = budget_report(realm.settings("ada", realm.signed, second))
    (lineage,) = report["lineages"]
    points = lineage["history"]
    assert [p["what"] for p in points] == ["hold", "debit", "debit", "release"] * 2
    spent = [0, 1, 2, 2, 2, 3, 4, 4]
    held = [2, 2, 2, 2, 4, 4, 4, 4]
    for point, before, with_held in zip(points, spent, held, strict=True):
        assert point["spent_filter"] == BUDGET.spent([ROUND] * before)
        assert point["with_held_filter"] == BUDGET.spent([ROUND] * with_held)
    assert points[3]["spent_odometer"] == odometer([ROUND] * 2, 1e-3)
    assert points[-1]["spent_filter"] == lineage["budget"]["spent_filter"]
    assert [one["share"]["spent_filter"] for one in lineage["charters"]] == [BUDGET.spent([ROUND] * 2)] * 2
    text = shown(report)
    for words in (f"data: {TASK} (lineage ", "of it under charter second", "over time, 20", "run run-2 (second) ended"):
        assert words in text
    assert "delta 0.001" in text


def test_a_long_history_is_thinned_and_ends_with_the_last_point() -> None:
    plan = [{"purpose": "train", "count": 1000, "event": ROUND.to_fields()}]
    names = {"run_id": "r", "request_id": "q", "request_sha256": "h", "plan_sha256": "p", "dataset": "d"}
    about = {"lineage": "l"}
    entries = [
        Entry(0, "", "dataset", None, {"dataset": "d", "lineage": "l"}, {**about, "open": "first"}, b"", "", ""),
        Entry(1, "", "hold", "c", {**names, "plan": plan}, {**about, "hold": []}, b"", "", ""),
    ]
    for number in range(1000):
        body = {**names, "request_id": str(number), "round": number, "purpose": "train", "event": ROUND.to_fields()}
        entries.append(Entry(number + 2, str(number), "debit", "c", body, {**about, "debit": {}}, b"", "", ""))
    points = history(entries, "l", Budget.create(50.0, 1e-3))
    assert len(points) == bill.POINTS
    assert points[-1]["spent_filter"] == Budget.create(50.0, 1e-3).spent([ROUND] * 1000)
    assert [p["spent_odometer"] is None for p in points] == [True] * (bill.POINTS - 1) + [False]
    assert sorted(p["spent_filter"] for p in points) == [p["spent_filter"] for p in points]


def config(realm: Realm, **changes: Any) -> Path:
    said = {
        "name": "next",
        "task": TASK,
        "partners": {n: {"data": "x", "declared_records": ROWS} for n in NAMES},
        "algorithm": {"rounds": 2, "local": {"steps": 1, "optimizer": {"lr": 0.2}}},
        "privacy": {"kind": "local", "epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 10.0},
        "evaluation": {"kind": "none"},
        "quorum": 1,
    }
    path = realm.root / "next.yaml"
    path.write_text(yaml.safe_dump({**said, **changes}))
    return path


def test_what_one_more_run_costs_and_how_many_fit(realm: Realm) -> None:
    realm.run("run-1")
    settings = realm.settings("ada")
    before = [ROUND] * 2
    for path in (settings.home / "first.json", config(realm)):
        plan = budget_report(settings, path)["plan"]
        (one,) = plan["lineages"]
        assert one["before"] == {"filter": BUDGET.spent(before), "odometer": odometer(before, 1e-3)}
        assert one["after"]["filter"] == BUDGET.spent([ROUND] * 4)
        assert one["after"]["odometer"] == odometer([ROUND] * 4, 1e-3)
        assert one["stops"] == []
        count = one["fits"]
        assert BUDGET.admits([ROUND] * (2 + 2 * count))
        assert not BUDGET.admits([ROUND] * (4 + 2 * count))
    text = shown(budget_report(settings, config(realm)))
    assert f"fits: {count} such runs, one after the other" in text
    assert "2 x train: 1 step, noise multiplier 10.0, sampling rate 1.0" in text


def test_a_plan_of_shared_noise_says_what_is_paid_and_against_whom_it_holds(realm: Realm) -> None:
    realm.run("run-1")
    settings = realm.settings("ada")
    three = {n: {"data": "x", "declared_records": ROWS} for n in (*NAMES, "cy")}
    path = config(
        realm,
        partners=three,
        quorum=3,
        privacy={"noise": "shared", "epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 10.0},
        secure_aggregation={"colluding": 1, "retries": 1},
    )
    report = budget_report(settings, path)
    (item,) = report["plan"]["plan"]
    assert (item["count"], item["event"]["mechanism"], item["event"]["dimension"]) == (3, "shared-gaussian/1", 72)
    (one,) = report["plan"]["lineages"]
    cost = PrivacyEvent(1.0, SharedGaussian.from_fields(item["event"]).charged.noise_multiplier, 3)
    assert one["after"]["filter"] == BUDGET.spent([ROUND] * 2 + [cost])
    assert (report["noise"], report["adversary"]) == ("local", adversary(None)), "what was spent is what it was"
    assert (one["noise"], one["adversary"]) == ("shared", adversary(1))
    text = " ".join(shown(report).split())
    assert "3 x train: 1 step, noise multiplier 10.0 (in the sum over 3 partners or more), sampling rate 1.0" in text
    assert f"with that run these hold with shared noise against {adversary(1)}" in text
    assert "with that run these hold" not in shown(budget_report(settings, config(realm)))


def test_the_runs_that_it_says_fit_are_accepted_and_no_more(realm: Realm) -> None:
    signed = realm.charter("dear", privacy={"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 3.0})
    for name in NAMES:
        realm.start(name, signed)
    settings = realm.settings("ada", signed)
    fits = budget_report(settings, settings.home / "dear.json")["plan"]["lineages"][0]["fits"]
    assert fits > 0
    for number in range(fits):
        realm.run(f"run-{number}", signed)
        left = budget_report(settings, settings.home / "dear.json")["plan"]["lineages"][0]
        assert left["fits"] == fits - number - 1
    assert left["stops"] == ["the lineage's budget", "the charter's own cap"]
    outcome = realm.run("one-more", signed)
    assert realm.reasons(outcome, "ada") == {Refusal.BUDGET.value}


@pytest.mark.parametrize(("epsilon", "served"), [(0.3, True), (1.95, False)])
def test_a_plan_against_the_ledger_says_what_the_node_does(realm: Realm, epsilon: float, served: bool) -> None:
    """`hansa plan --ledger`, `hansa node budget --plan` and the node that is asked for that very run: one answer."""
    loud = realm.charter("loud", privacy={"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 4.0})
    privacy = {"epsilon": epsilon, "delta": 1e-3, "clip_norm": 1.0}
    signed = realm.charter("next", privacy=privacy)
    for name in NAMES:
        realm.start(name, loud, signed)
    realm.run("run-1", loud)
    settings, path = realm.settings("ada", loud, signed), config(realm, privacy=privacy)
    found = planned(load_config(path), settings.ledger)
    (one,) = budget_report(settings, path)["plan"]["lineages"]
    assert found["noise_multiplier"] == signed.charter.privacy.noise_multiplier
    assert (found["fits"], found["stops"]) == (served, [] if served else ["the ledger's budget"])
    assert one["stops"] == ([] if served else ["the lineage's budget"])
    assert found["epsilon_filter"] == one["after"]["filter"]
    assert found["epsilon_cap"] - found["epsilon_left_before"] == pytest.approx(one["before"]["filter"])
    assert run(["plan", str(path), "--ledger", str(settings.ledger)]) == (0 if served else 1)
    assert realm.reasons(realm.run("run-2", signed), "ada") == (set() if served else {Refusal.BUDGET.value})


def test_what_stops_a_run(realm: Realm) -> None:
    settings = realm.settings("ada")
    dear = config(
        realm, privacy={"kind": "local", "epsilon": 9.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 0.5}
    )
    realm.run("run-1")
    (one,) = budget_report(settings, dear)["plan"]["lineages"]
    assert (one["stops"], one["fits"]) == (["the lineage's budget", "the charter's own cap"], 0)
    realm.rules["ada"] = {"epsilon_cap": 0.5}
    (one,) = budget_report(realm.settings("ada"), config(realm))["plan"]["lineages"]
    assert one["stops"] == ["the site's cap"]
    realm.rules["ada"] = {}
    bare = config(realm, privacy={"kind": "none"})
    (one,) = budget_report(realm.settings("ada"), bare)["plan"]["lineages"]
    assert one["stops"] == ["the site: no training without privacy"]
    assert one["after"] is None
    realm.rules["ada"] = {"allow_unprotected": True}
    report = budget_report(realm.settings("ada"), bare)
    assert (report["plan"]["lineages"][0]["stops"], report["plan"]["lineages"][0]["fits"]) == ([], None)
    assert "no finite epsilon would hold" in shown(report)
    for path, words in ((realm.root / "none", "No such file"), (config(realm, task="digits"), "no data is registered")):
        with pytest.raises((ConfigError, CharterError), match=words):
            budget_report(settings, path)


def test_a_lineage_that_has_spent_nothing_is_full(realm: Realm) -> None:
    realm.run("run-1")
    settings = realm.settings("ada")
    files = DataFiles(TASK, realm.data("ada", 2), realm.data("ada", 3))
    Registry(settings.state).add(files, Rules(public=True), None, Relation(overlaps=(TASK,)))
    plan = budget_report(settings, config(realm))["plan"]
    assert [one["data"] for one in plan["lineages"]] == [TASK, f"{TASK}-2"], "either could serve it"
    assert len({json.dumps(one["before"]) for one in plan["lineages"]}) == 1, "of one budget"


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(realm: Realm, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = realm.settings("ada")
    to = realm.root / f"plots/budget.{suffix}"
    with pytest.raises(LedgerError, match="nothing was spent"):
        plot_budget(budget_report(settings), to)
    realm.run("run-1")
    report = budget_report(settings)
    plot_budget(report, to)
    data = to.read_bytes()
    assert data.startswith(b"<?xml" if suffix == "svg" else b"\x89PNG")
    if suffix == "svg":
        plot_budget(report, realm.root / "again.svg")
        assert b"spent (filter)" in data or b"<!-- spent (filter) -->" in data
        assert b"add or remove one" in data or b"<!--" in data
    with pytest.raises(ConfigError, match=r"a plot is a \.svg or a \.png"):
        plot_budget(report, realm.root / "budget.gif")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="plots need matplotlib") as caught:
        plot_budget(report, to)
    assert "hansa[train]" in caught.value.hint


def test_it_tells_what_the_entries_say(realm: Realm) -> None:
    """Whatever the report says, the sum of the debits in the ledger is what was spent."""
    realm.run("run-1")
    entries, _ = read_ledger(realm.settings("ada").ledger)
    events = [PrivacyEvent.from_fields(e.body["event"]) for e in entries if e.type == "debit"]
    (lineage,) = budget_report(realm.settings("ada"))["lineages"]
    assert lineage["budget"]["spent_filter"] == BUDGET.spent(events)
    assert lineage["budget"]["spent_odometer"] == odometer(events, 1e-3)


def test_the_report_fits_80_columns_whatever_the_charter_is_called(realm: Realm) -> None:
    signed = realm.charter("a-charter-with-a-name-of-some-length-" + "x" * 20)
    for name in NAMES:
        realm.start(name, signed)
    for number in range(9):
        realm.run(f"run-{number}", signed)
    settings = realm.settings("ada", signed)
    long = [line for line in shown(budget_report(settings, config(realm))).splitlines() if len(line) > 80]
    assert [line for line in long if signed.charter.name not in line and str(realm.root) not in line] == [], (
        "a name may be as long as it likes"
    )


def test_the_axis_of_time_says_which_day_and_that_it_is_utc(realm: Realm) -> None:
    realm.run("run-1")
    report = budget_report(realm.settings("ada"))
    (lineage,) = report["lineages"]
    to = realm.root / "budget.svg"
    plot_budget(report, to)
    day = lineage["history"][0]["time"][:10]
    assert f"<!-- time (UTC), {day} -->" in to.read_text()
    lineage["history"][0]["time"] = "2026-01-31T23:50:00Z"
    plot_budget(report, to)
    assert f"<!-- time (UTC), 2026-01-31 to {lineage['history'][-1]['time'][:10]} -->" in to.read_text()


def test_reports_need_no_tasks_and_no_torch(realm: Realm) -> None:
    """torch takes seconds to load: whoever asks what is left of a budget, or which data is registered, should not wait for it."""
    realm.run("run-1")
    home = realm.settings("ada").home
    program = (
        "import sys\n"
        "from hansa.common.cli import run\n"
        "code = run(['node', 'budget', '--plan', 'first.json']) or run(['node', 'dataset', 'list'])\n"
        "sys.exit(code or ('torch' in sys.modules and 'torch was loaded'))"
    )
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / ".dev")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=home, env=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{TASK}: the first" in done.stdout
