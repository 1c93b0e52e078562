"""`hansa node` as a steward types it: exit codes, words, JSON; and --help of every command has an example."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.main import get_command

from hansa.clients import cli as module
from hansa.common.cli import run as hansa
from hansa.common.heads import sign_head
from hansa.common.identity import sha256
from hansa.common.ledger import read_ledger
from node_support import NAMES, TASK, Realm


@pytest.fixture
def realm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Realm]:
    made = Realm(tmp_path)
    made.settings("ada")
    monkeypatch.chdir(made.keys.home("ada").path)
    yield made
    made.close()


class Screen:
    """Runs a command; what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        self._capsys.readouterr()
        found = hansa(["node", *arguments])
        shown = self._capsys.readouterr()
        assert found == code, shown.out + shown.err
        return shown.out + shown.err

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self(*arguments, "--format", "json", code=code))


@pytest.fixture
def node(capsys: pytest.CaptureFixture[str]) -> Screen:
    return Screen(capsys)


def test_every_command_says_how_it_is_called() -> None:
    app = typer.Typer()
    module.commands(app)
    group = get_command(app).commands["node"]  # type: ignore[attr-defined]
    commands = dict(group.commands) | dict(group.commands.pop("dataset").commands)
    assert set(commands) - {"dataset"} == {
        "list",
        "init", "check", "run", "budget", "approve", "pause", "resume", "withdraw", "export", "backup", "restore", "add",
    }  # fmt: skip
    for name, command in commands.items():
        if name != "dataset":
            assert "Example: hansa node " in command.help, name


def test_init_writes_a_file_that_works_and_never_over_another(realm: Realm, node: Screen) -> None:
    assert "never overwritten" in node("init", "--charter", "first.json", "--server", "hub:8440", code=2)
    Path("node.yaml").unlink()
    assert "HOST:PORT" in node("init", "--charter", "first.json", "--server", "hub", code=2)
    assert not Path("node.yaml").exists()
    node("init", "--charter", "first.json", "--server", "hub:8440")
    assert module.load_settings(Path("node.yaml")).federations[0].charter == Path("first.json").absolute()


def test_dataset_add_reports_on_the_owners_screen(realm: Realm, node: Screen) -> None:
    file = realm.data("ada")
    found = node.json("dataset", "add", file.name, "--task", TASK)
    assert found["files"][file.name]["rows"] == sum(found["files"][file.name]["classes"].values()) == 60
    assert found["held_out"] == "none"
    kept = json.loads(Path(f"state/datasets/{TASK}/dataset.json").read_text())
    assert (kept["dataset_id"], kept["held_out"]) == (found["dataset"], "none")
    assert "60 rows fit the schema" in node("dataset", "add", str(file), "--task", TASK), "the same again is fine"
    other = realm.data("ben")
    assert "--version-of NAME" in node("dataset", "add", str(other), "--task", TASK, code=2)
    assert json.loads(Path(f"state/datasets/{TASK}/dataset.json").read_text()) == kept


def test_data_sets_that_share_a_budget_and_those_that_do_not(
    realm: Realm, node: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "No data is registered" in node("dataset", "list")
    add = ("dataset", "add", "--task", TASK)
    node(*add, str(realm.data("ada")))
    assert "What has this one to do with it?" in node(*add, str(realm.data("ada", 2)), code=2)
    shown = node(*add, str(realm.data("ada", 2)), "--overlaps", TASK)
    assert "The node takes it in when it next starts" in shown
    assert "more than one of" in node(*add, str(realm.data("ada", 3)), "--overlaps", TASK, "--version-of", TASK, code=2)
    assert "not yet in the ledger" in node(*add, str(realm.data("ada", 3)), "--collected-from", "2026-01-01", code=2)
    first, second = node.json("dataset", "list")["datasets"]
    assert (first["name"], second["name"]) == (TASK, f"{TASK}-2")
    assert first["lineage"] == second["lineage"]
    assert second["declared"] == {"kind": "overlap", "of": TASK, "cutoff": None}
    assert (first["recorded"], first["newest_version"]) == (None, True)
    shown = node("dataset", "list")
    for words in (
        f"lineage {first['lineage']}: one budget",
        f"{TASK}-2: overlaps with {TASK}",
        "when the node next starts",
    ):
        assert words in shown
    settings = yaml.safe_load(Path("node.yaml").read_text())
    settings["federations"][0]["dataset"] = TASK
    Path("node.yaml").write_text(yaml.safe_dump(settings))
    found = {f["name"]: f for f in node.json("check", code=1)["findings"]}
    assert (found[f"data {TASK}"]["state"], found[f"data {TASK}-2"]["state"]) == ("ok", "ok")


def test_what_a_planned_run_costs_and_a_plot(realm: Realm, node: Screen) -> None:
    for name in NAMES:
        realm.start(name)
    assert "nothing was spent or held yet" in node("budget", "--plot", "budget.svg", code=2)
    assert "nothing was asked for yet" in node("budget")
    assert " such runs, one after the other" in node("budget", "--plan", "first.json")
    realm.run("run-1")
    (one,) = node.json("budget", "--plan", "first.json")["plan"]["lineages"]
    assert one["fits"] > 1
    shown = node("budget", "--plan", "first.json", "--plot", "plots/budget.svg")
    assert f"fits: {one['fits']} such runs" in shown
    assert "odometer" in shown
    assert Path("plots/budget.svg").read_bytes().startswith(b"<?xml")
    assert "No such file" in node("budget", "--plan", "none.yaml", code=2)
    realm.rules["ada"] = {"epsilon_cap": 0.01}
    realm.start("ada")
    assert "refused, by" in node("budget", "--plan", "first.json", code=1)


def test_rows_are_public_only_when_their_owner_says_so(
    realm: Realm, node: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ("dataset", "add", str(realm.data("ada")), "--task", TASK)
    public = str(realm.data("ada", 3))
    monkeypatch.setattr(typer, "confirm", _answer(no=True))
    assert "PUBLIC" in node(*add, "--public", public, code=1)
    assert not Path(f"state/datasets/{TASK}/dataset.json").exists()
    assert "both given" in node(*add, "--public", public, "--held-out", public, code=2)
    assert "Registered" in node(*add, "--held-out", public)
    assert json.loads(Path(f"state/datasets/{TASK}/dataset.json").read_text())["held_out"] == "private"
    Path(f"state/datasets/{TASK}/dataset.json").unlink()
    assert "held out: public" in node(*add, "--public", public, "--yes")


def _answer(*, no: bool) -> Any:
    def confirm(*_: object, **__: object) -> bool:
        if no:
            raise typer.Abort
        return True

    return confirm


def test_before_there_is_a_node_yaml_it_registers_in_state(realm: Realm, node: Screen) -> None:
    Path("node.yaml").unlink()
    node("dataset", "add", str(realm.data("ada")), "--task", TASK)
    assert Path(f"state/datasets/{TASK}/dataset.json").exists()
    assert "no such file" in node("dataset", "add", "x.csv", "--task", TASK, "elsewhere/node.yaml", code=2)


def test_check_exits_1_when_something_fails(realm: Realm, node: Screen) -> None:
    realm.start("ada")
    found = node.json("check", code=1)
    assert [f["name"] for f in found["findings"] if f["state"] == "FAIL"] == ["server 127.0.0.1:1"]
    assert not found["ready"]
    shown = node("check", code=1)
    assert "ok   keys" in shown
    assert "FAIL server 127.0.0.1:1" in shown


def test_budget_beside_every_cap(realm: Realm, node: Screen) -> None:
    assert "when it first starts" in node("budget", code=2)
    for name in NAMES:
        realm.start(name)
    realm.run("run-1")
    realm.rules["ada"] = {"epsilon_cap": 1.0, "approval": True}
    realm.start("ada")
    realm.run("run-2")
    report = node.json("budget")
    assert (report["unit"], report["adjacency"], report["noise"]) == ("record", "add-or-remove-one", "local")
    assert report["adversary"].startswith("everyone but")
    (lineage,) = report["lineages"]
    assert lineage["budget"]["epsilon_cap"] == 2.0
    assert 0 < lineage["budget"]["spent_odometer"] <= lineage["budget"]["spent_filter"] < 2
    (one,) = lineage["charters"]
    assert one["own"]["spent_filter"] == lineage["budget"]["spent_filter"]
    assert one["site"]["epsilon_cap"] == 1.0
    of = {"charter": "first", "charter_sha256": realm.signed.sha256, "lineage": lineage["lineage"]}
    run = {"run": "run-1", **of, "state": "closed", "rounds": 2}
    assert report["runs"] == [run]
    assert report["refusals"] == {"not approved": 1}
    assert report["waiting_for_approval"] == ["run-2"]
    shown = " ".join(node("budget").split())
    for words in (
        "one record of this partner, add or remove one, local noise",
        "over time, 20",
        "against everyone but",
        "waits for you",
    ):
        assert words in shown
    assert "run run-1 (first): closed, 2 rounds debited" in shown


def test_what_a_steward_says_while_it_runs(realm: Realm, node: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    realm.rules["ada"] = {"approval": True}
    for name in NAMES:
        realm.start(name)

    def reasons(run: str) -> set[str]:
        return realm.reasons(realm.run(run), "ada")

    assert reasons("run-1") == {"not approved"}
    assert "Approved: run run-2 under charter first" in node("approve", "run-2")
    assert reasons("run-2") == set()
    node("approve", "run-3")
    node("pause")
    assert "paused" in node("budget")
    assert reasons("run-3") == {"paused"}
    node("resume")
    monkeypatch.setattr(typer, "confirm", _answer(no=True))
    node("withdraw", code=1)
    assert reasons("run-3b") == {"not approved"}
    node("withdraw", "--charter", "first.json", "--yes")
    assert reasons("run-4") == {"withdrawn"}


def test_several_charters_must_be_told_apart(realm: Realm, node: Screen) -> None:
    second = realm.charter("second")
    realm.settings("ada", realm.signed, second)
    assert "--charter FILE" in node("approve", "run-1", code=2)
    node("approve", "run-1", "--charter", "second.json")
    (file,) = Path("state/control/approved").iterdir()
    assert file.name == f"{second.sha256[:16]}-{sha256(b'run-1')}.json"
    assert json.loads(file.read_text())["charter_sha256"] == second.sha256
    realm.charter("third").save(Path("third.json"))
    assert "not a charter that node.yaml lists" in node("withdraw", "--charter", "third.json", "--yes", code=2)


def test_export_adds_to_a_bundle_and_never_replaces_another_ledger(realm: Realm, node: Screen) -> None:
    for name in NAMES:
        realm.start(name)
    node("export", "--out", "../bundle")
    written = Path("../bundle/partners/ada/ledger.jsonl")
    first = [entry.leaf for entry in read_ledger(written)[0]]
    assert [entry.type for entry in read_ledger(written)[0]] == ["genesis", "undisclosed", "charter"]
    realm.run("run-1")
    with Path("state/ledger.jsonl").open("ab") as torn:
        torn.write(b'{"torn')
    node("export", "--out", "../bundle")
    entries, torn_bytes = read_ledger(written)
    assert [entry.leaf for entry in entries][: len(first)] == first
    assert "undisclosed" not in {entry.type for entry in entries}, "the data set was held under this charter"
    assert not Path("../bundle/heads").exists(), "nothing was countersigned"
    (kept,) = realm.sites["ada"].heads
    kept.keep([sign_head(realm.sites["ben"].identity, realm.sites["ben"].ledger)])
    node("export", "--out", "../bundle")
    heads = Path(f"state/heads/{realm.signed.sha256}.jsonl")
    assert Path("../bundle/heads/ada.jsonl").read_bytes() == heads.read_bytes() != b""
    closing = Path("../bundle/closing/run-1.json")
    assert closing.read_bytes() == (realm.closing / "run-1.json").read_bytes()
    closing.write_bytes(b"{}")
    assert "another closing checkpoint" in node("export", "--out", "../bundle", code=2)
    closing.unlink()
    assert (len(entries), torn_bytes) == (len(read_ledger(Path("state/ledger.jsonl"))[0]), b"")
    assert Path("../bundle/keys/ada.pem").read_bytes() == Path("ada.pem").read_bytes()
    written.write_bytes(written.read_bytes() + written.read_bytes().splitlines(keepends=True)[0])
    assert "not an earlier part" in node("export", "--out", "../bundle", code=2)
    realm.charter("other").save(Path("../bundle/charter.json"))
    assert "a charter that this node does not serve" in node("export", "--out", "../bundle", code=2)


def test_backup_and_restore(realm: Realm, node: Screen) -> None:
    for name in NAMES:
        realm.start(name)
    realm.run("run-1")
    assert "private keys" in node("backup", "../a.tar")
    assert "never overwritten" in node("backup", "../a.tar", code=2)
    realm.stop("ada")
    Path("state/ledger.jsonl").unlink()
    assert "treated as exhausted" in node("restore", "../a.tar", code=1)
    assert "EXHAUSTED" in node("budget")
    closing = str(realm.closing / "run-1.json")
    assert "what shall be restored?" in node("restore", code=2)
    assert "both given" in node("restore", "../a.tar", "--heads", closing, "--prove", closing, code=2)
    settings = str(Path("node.yaml").absolute())
    assert "Proved" in node("restore", "--prove", closing, settings)
    assert "EXHAUSTED" not in node("budget")
    Path("state/ledger.jsonl").unlink()
    assert "Proved" in node("restore", "../a.tar", settings, "--heads", closing)
