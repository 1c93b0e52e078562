"""What a second data set may be: a version or an overlap on the same budget, later rows on one of their own, and nothing else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hansa.clients import registry as module
from hansa.clients.datasets import Declaration
from hansa.clients.node import assemble
from hansa.clients.registrations import DataFiles, serving
from hansa.clients.registry import Registered, Registry, Relation, Rules
from hansa.clients.standing import Standing
from hansa.common.errors import CharterError, ConfigError, DataError, LedgerError, OutputError, Refusal, Refused
from hansa.common.events import EventLog
from hansa.common.ledger import read_ledger
from node_support import NAMES, TASK, Realm

TODAY = datetime.now(UTC).date()


@pytest.fixture
def realm(tmp_path: Path) -> Iterator[Realm]:
    made = Realm(tmp_path)
    yield made
    made.close()


class Desk:
    """A steward at one partner's state folder."""

    def __init__(self, realm: Realm) -> None:
        self.realm = realm
        self.registry = Registry(realm.settings("ada").state)
        self.said: list[str] = []

    def file(self, *numbers: int, name: str = "", extra: tuple[str, ...] = ()) -> Path:
        """The rows of these partners of the test data, in one file."""
        parts = [self.realm.data("ada", number).read_text().splitlines() for number in numbers]
        lines = [parts[0][0], *[line for part in parts for line in part[1:]], *extra]
        path = self.realm.root / (name or f"{'-'.join(map(str, numbers))}.csv")
        path.write_text("\n".join(lines) + "\n")
        return path

    def add(self, data: Path, held_out: Path | None = None, name: str | None = None, **relation: Any) -> Registered:
        files = DataFiles(TASK, data, held_out)
        rules = Rules(public=held_out is not None)
        return self.registry.add(files, rules, name, Relation(**relation), self.said.append)

    def record(self) -> None:
        """The node starts, and takes in what is registered, also where no charter fits."""
        with contextlib.suppress(CharterError):
            self.realm.start("ada")

    def later(self, monkeypatch: pytest.MonkeyPatch, days: int = 3) -> str:
        """Some days pass; the day before."""

        class Later(datetime):
            @classmethod
            def now(cls, zone: object = None) -> datetime:  # type: ignore[override]
                return datetime.now(UTC) + timedelta(days=days)

        monkeypatch.setattr(module, "datetime", Later)
        return (TODAY + timedelta(days=days - 1)).isoformat()

    def names(self) -> list[str]:
        return [one.name for one in self.registry.all()]


@pytest.fixture
def desk(realm: Realm) -> Desk:
    return Desk(realm)


# -- the first, and the same again -----------------------------------------------------------------------------------


def test_the_first_is_plain_and_moves_with_its_file(desk: Desk) -> None:
    first = desk.add(desk.file(0))
    moved = desk.file(0, name="moved.csv")
    assert desk.add(moved).dataset.dataset_id == first.dataset.dataset_id
    (only,) = desk.registry.all()
    assert (only.name, only.files.data, only.dataset.declared) == (TASK, moved, Declaration())
    folder = desk.realm.settings("ada").state / "datasets" / TASK
    assert sorted(p.name for p in folder.iterdir()) == ["dataset.json", "source.json"]
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in folder.iterdir())


@pytest.mark.parametrize(
    "more",
    [
        {"name": "other"},
        {"collected_from": TODAY.isoformat()},
        {"overlaps": (TASK,)},
        {"name": "other", "collected_from": TODAY.isoformat()},
    ],
)
def test_the_same_rows_under_another_name_open_no_second_budget(desk: Desk, more: dict[str, Any]) -> None:
    first = desk.add(desk.file(0))
    with pytest.raises(DataError, match=f"these rows are registered already, as {TASK}"):
        desk.add(desk.file(0, name="copy.csv"), **more)
    assert [one.dataset.dataset_id for one in desk.registry.all()] == [first.dataset.dataset_id]


def test_the_same_rows_in_another_order_are_rows_of_the_first(desk: Desk) -> None:
    desk.add(desk.file(0, 1))
    desk.record()
    with pytest.raises(DataError, match="What has this one to do with it"):
        desk.add(desk.file(1, 0))
    with pytest.raises(DataError, match=r"was registered on|cannot be told from"):
        desk.add(desk.file(1, 0), collected_from=TODAY.isoformat())
    shared = desk.add(desk.file(1, 0), overlaps=(TASK,))
    assert shared.dataset.lineage == desk.registry.all()[0].dataset.lineage


def test_what_was_declared_of_held_out_rows_stays(desk: Desk) -> None:
    desk.add(desk.file(0), desk.file(3))
    desk.add(desk.file(0), desk.file(3))
    files = DataFiles(TASK, desk.file(0), desk.file(3))
    with pytest.raises(DataError, match="with held-out rows that are public"):
        desk.registry.add(files)


def test_names(desk: Desk) -> None:
    for name in ("", "A", "a b", "../x", ".x", "a/b", "x" * 64):
        with pytest.raises(ConfigError, match="not a name"):
            desk.add(desk.file(0), name=name)
    desk.add(desk.file(0), name="clinic")
    with pytest.raises(DataError, match="other rows are registered under this name"):
        desk.add(desk.file(1), name="clinic", version_of="clinic")
    for relation in ({"version_of": "x"}, {"overlaps": ("x",)}):
        with pytest.raises(ConfigError, match="no data set 'x' is registered"):
            desk.add(desk.file(1), **relation)
    with pytest.raises(ConfigError, match="more than one of"):
        desk.add(desk.file(1), version_of="clinic", overlaps=("clinic",))
    assert desk.names() == ["clinic"]


# -- versions and overlaps: one budget -------------------------------------------------------------------------------


def test_a_version_shares_the_budget_and_serves_from_then_on(desk: Desk) -> None:
    realm = desk.realm
    for name in NAMES:
        realm.start(name)
    first = desk.registry.all()[0]
    realm.run("run-1")
    spent = realm.sites["ada"].gate.spent_epsilon()
    version = desk.add(desk.file(0, name="new.csv", extra=tuple(desk.file(2).read_text().splitlines()[1:4])),
                       desk.file(3), version_of=TASK)  # fmt: skip
    assert (version.name, version.dataset.lineage) == (f"{TASK}-2", first.dataset.lineage)
    assert version.dataset.declared == Declaration("version", first.dataset.dataset_id)
    assert realm.run("run-2").why == "completed", "a node that runs goes on with what it has"
    realm.start("ada")
    assert realm.run("run-3").why == "completed"
    entries = realm.sites["ada"].ledger.entries
    used = {e.body["run_id"]: e.body["dataset"] for e in entries if e.type == "debit"}
    assert [used[f"run-{n}"] for n in (1, 2, 3)] == [first.dataset.dataset_id] * 2 + [version.dataset.dataset_id]
    assert len({e.privacy["lineage"] for e in entries if e.type == "debit" and e.privacy}) == 1
    assert [e.privacy for e in entries if e.type == "dataset"][1] is None, "it opens nothing"
    assert (realm.sites["ada"].gate.spent_epsilon() or 0) > (spent or 0)
    third = desk.add(desk.file(0, 2), desk.file(3), version_of=TASK)
    assert third.dataset.declared.of == version.dataset.dataset_id, "versions stand in a line"
    assert serving(desk.registry.all(), TASK, TASK).name == third.name == f"{TASK}-3"


def test_one_can_go_back_to_an_old_version(desk: Desk) -> None:
    desk.add(desk.file(0))
    desk.add(desk.file(0, 2), version_of=TASK)
    back = desk.add(desk.file(0), version_of=TASK)
    assert serving(desk.registry.all(), TASK, None).name == back.name == f"{TASK}-3"
    assert len({one.dataset.lineage for one in desk.registry.all()}) == 1


def test_an_overlap_shares_the_budget_and_must_be_named(desk: Desk) -> None:
    realm = desk.realm
    desk.add(desk.file(0), desk.file(3))
    shared = desk.add(desk.file(0, 2), desk.file(3), name="both", overlaps=(TASK,))
    assert shared.dataset.declared.kind == "overlap"
    with pytest.raises(CharterError, match="several data sets are registered for its task: heart-disease, both"):
        realm.start("ada")
    charters = [{"charter": "first.json", "server": "127.0.0.1:1", "dataset": TASK}]
    site = assemble(realm.settings("ada", federations=charters), None, EventLog("json", realm.log))
    try:
        assert len(site.joined) == 1
        assert len(Standing(site.ledger.entries).accounts) == 1
    finally:
        site.close()
    charters[0]["dataset"] = "none"
    with pytest.raises(ConfigError, match="no data set 'none'"):
        assemble(realm.settings("ada", federations=charters), None, EventLog("json", realm.log))


def test_two_budgets_are_never_shared(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.add(desk.file(0), name="old")
    desk.realm.start("ada")
    day = desk.later(monkeypatch)
    desk.add(desk.file(1), name="new", collected_from=day)
    with pytest.raises(DataError, match="old, new have budgets of their own") as caught:
        desk.add(desk.file(0, 1), overlaps=("old", "new"))
    assert "Split the file" in caught.value.hint
    for relation in ({"version_of": "new"}, {"overlaps": ("new",)}):
        with pytest.raises(DataError, match=r"60 rows of .* cannot be told from rows of old"):
            desk.add(desk.file(0, 1), **relation)
    desk.said.clear()
    desk.add(desk.file(1, 2), version_of="new")
    assert desk.said == ["You declare that none of its records is in old, which have budgets of their own."]


# -- collected later: a budget of its own ----------------------------------------------------------------------------


def test_later_rows_open_a_lineage(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    realm = desk.realm
    for name in NAMES:
        realm.start(name)
    realm.run("run-1")
    day = desk.later(monkeypatch)
    made = desk.add(desk.file(2), desk.file(3), name="later", collected_from=day)
    assert made.dataset.declared == Declaration("disjoint", None, day)
    assert f"collected on {day} or later, and none is in {TASK}" in desk.said[0]
    assert "spent both budgets" in desk.said[0]
    charters = [{"charter": "first.json", "server": "127.0.0.1:1", "dataset": "later"}]
    realm.stop("ada")
    realm.sites["ada"] = assemble(realm.settings("ada", federations=charters), None, EventLog("json", realm.log))
    realm.run("run-2")
    standing = Standing(realm.sites["ada"].ledger.entries)
    assert [len(standing.spent(lineage)) for lineage in standing.accounts] == [2, 2]
    opened = [e.privacy for e in realm.sites["ada"].ledger.entries if e.type == "dataset"]
    assert opened[1] == {"lineage": made.dataset.lineage, "open": "disjoint"}


def test_the_cut_off(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """No record of an earlier data set may be from that day or a later one, as far as the ledger can tell."""
    with pytest.raises(DataError, match="The first one needs no"):
        desk.add(desk.file(0), collected_from="2020-01-01")
    desk.add(desk.file(0))
    with pytest.raises(DataError, match="not yet in the ledger"):
        desk.add(desk.file(2), collected_from=TODAY.isoformat())
    desk.realm.start("ada")
    for day, words in (
        ("tomorrow", "not a date"),
        ("20270101", "not a date"),
        ((TODAY + timedelta(days=2)).isoformat(), "yet to come"),
        (TODAY.isoformat(), "was registered on"),
        ("2020-01-01", "was registered on"),
    ):
        with pytest.raises((ConfigError, DataError), match=words):
            desk.add(desk.file(2), collected_from=day)
    day = desk.later(monkeypatch)
    desk.add(desk.file(2), collected_from=day)


@pytest.mark.parametrize("change", ["a row", "another label", "held out", "their held out", "spaces"])
def test_a_row_that_looks_like_an_earlier_one_is_refused(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    old, held_out = desk.file(0), desk.file(3)
    lines = old.read_text().splitlines()
    desk.registry.add(DataFiles(TASK, old, held_out))
    desk.record()
    day = desk.later(monkeypatch)
    row, label = lines[5], lines[0].split(",").index("num")
    cells = row.split(",")
    match change:
        case "another label":
            cells[label] = "1" if cells[label] == "0" else "0"
        case "spaces":
            cells = [f" {cell} " for cell in cells]
        case "their held out":
            cells = held_out.read_text().splitlines()[7].split(",")
    new, apart = desk.file(2, name="new.csv"), None
    if change == "held out":
        apart = desk.file(1, name="apart.csv", extra=(row,))
    else:
        new = desk.file(2, name="new.csv", extra=(",".join(cells),))
    with pytest.raises(DataError, match=r"1 row of .* cannot be told from rows of .* \(rows 61\)") as caught:
        desk.registry.add(DataFiles(TASK, new, apart), relation=Relation(collected_from=day))
    assert "--overlaps" in caught.value.hint
    assert desk.names() == [TASK]


def test_rows_that_are_public_on_both_sides_are_in_no_budget(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.add(desk.file(0), desk.file(3))
    desk.realm.start("ada")
    desk.add(desk.file(2), desk.file(3), collected_from=desk.later(monkeypatch))


def test_rows_that_were_private_do_not_become_public_by_a_new_version(desk: Desk) -> None:
    desk.add(desk.file(0), desk.file(3))
    row = desk.file(0).read_text().splitlines()[9]
    public = desk.file(3, name="public.csv", extra=(row,))
    files = DataFiles(TASK, desk.file(1), public)
    relation = Relation(version_of=TASK)
    with pytest.raises(DataError, match=r"1 row of .* cannot be told from private rows of heart-disease \(rows 61\)"):
        desk.registry.add(files, Rules(public=True), relation=relation)
    assert desk.names() == [TASK]
    desk.registry.add(files, Rules(public=True, allow_equal_rows=True), relation=relation)


@pytest.mark.parametrize("change", ["gone", "other rows", "not a table"])
def test_what_cannot_be_compared_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    old = desk.file(0)
    desk.add(old)
    desk.realm.start("ada")
    day = desk.later(monkeypatch)
    match change:
        case "gone":
            old.unlink()
        case "other rows":
            old.write_bytes(desk.file(1).read_bytes())
        case "not a table":
            old.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=f"{TASK} cannot be compared") as caught:
        desk.add(desk.file(2), collected_from=day)
    assert "Put the registered file" in caught.value.hint
    assert desk.names() == [TASK]


def test_who_does_not_declare_it_registers_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.add(desk.file(0))
    desk.realm.start("ada")
    day = desk.later(monkeypatch)

    def no(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        desk.registry.add(DataFiles(TASK, desk.file(2), None), relation=Relation(collected_from=day), agree=no)
    assert desk.names() == [TASK]


# -- files that are not as they were ---------------------------------------------------------------------------------


def edited(desk: Desk, **changes: object) -> None:
    path = desk.realm.settings("ada").state / "datasets" / TASK / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


@pytest.mark.parametrize(
    "change",
    [
        {"lineage": "f" * 32},
        {"commitment": "f" * 64},
        {"held_out": "none", "held_out_commitment": None},
        {"declared": {"kind": "disjoint", "of": None, "cutoff": "2020-01-01"}},
        {"dataset_id": "f" * 32},
        {"ledger_id": "f" * 32},
        {"declared": {"kind": "first", "of": None}, "registered": "yesterday"},
    ],
)
def test_an_edited_registration_stops_the_node(desk: Desk, change: dict[str, object]) -> None:
    desk.realm.start("ada")
    desk.realm.stop("ada")
    edited(desk, **change)
    with pytest.raises((LedgerError, DataError)):
        desk.realm.start("ada")


@pytest.mark.parametrize(
    "declared",
    [
        {"kind": "first", "of": None, "cutoff": None},
        {"kind": "disjoint", "of": None, "cutoff": "2020-01-01"},
        {"kind": "version", "of": "f" * 32, "cutoff": None},
        {"kind": "overlap", "of": None, "cutoff": None},
        {"kind": "no such kind", "of": None, "cutoff": None},
    ],
)
def test_a_declaration_that_does_not_fit_the_ledger_stops_the_node(desk: Desk, declared: dict[str, Any]) -> None:
    desk.add(desk.file(0), desk.file(3))
    desk.realm.start("ada")
    desk.realm.stop("ada")
    version = desk.add(desk.file(0, 2), desk.file(3), version_of=TASK)
    path = desk.realm.settings("ada").state / "datasets" / version.name / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "declared": declared}))
    with pytest.raises(LedgerError, match="does not fit the ledger"):
        desk.realm.start("ada")
    assert len([e for e in read_ledger(desk.realm.settings("ada").ledger)[0] if e.type == "dataset"]) == 1


def test_a_registration_that_the_ledger_has_must_be_there(desk: Desk) -> None:
    desk.realm.start("ada")
    desk.realm.stop("ada")
    settings = desk.realm.settings("ada")
    folder = settings.state / "datasets" / TASK
    folder.rename(desk.realm.root / "away")
    with pytest.raises(LedgerError, match="holds a ledger, but not the registration"):
        desk.add(desk.file(2))
    with pytest.raises(DataError, match="no data is registered"):
        assemble(settings, None, EventLog("json", desk.realm.log))
    (desk.realm.root / "away").rename(folder)
    (folder / "source.json").unlink()
    with pytest.raises(DataError, match="does not say where the data is"):
        desk.realm.start("ada")


def test_without_its_ledger_nothing_is_registered(desk: Desk) -> None:
    desk.realm.start("ada")
    desk.realm.stop("ada")
    settings = desk.realm.settings("ada")
    settings.ledger.unlink()
    with pytest.raises(LedgerError, match="missing, and it holds what was spent"):
        desk.add(desk.file(0, 2), version_of=TASK)
    settings.ledger.write_bytes(b"")
    with pytest.raises(LedgerError, match="older copy"):
        desk.realm.start("ada")


def test_a_copy_of_a_registration_is_not_another_one(desk: Desk) -> None:
    desk.add(desk.file(0))
    folder = desk.realm.settings("ada").state / "datasets" / TASK
    (folder.parent / "twin").mkdir()
    for file in folder.iterdir():
        (folder.parent / "twin" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="under two names"):
        desk.registry.all()


def test_order_survives_a_clock_that_goes_back(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.add(desk.file(0))
    with monkeypatch.context() as patched:
        patched.setattr(module, "timestamp", lambda: "2001-01-01T00:00:00.000000Z")
        desk.add(desk.file(0, 2), version_of=TASK)
    desk.add(desk.file(0, 1), version_of=TASK)
    assert desk.names() == [TASK, f"{TASK}-2", f"{TASK}-3"]


def test_a_full_disk_registers_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.add(desk.file(0))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OutputError, match="the disk is full"):
            desk.add(desk.file(0, 2), version_of=TASK)
    assert desk.names() == [TASK]
    desk.add(desk.file(0, 2), version_of=TASK)


def test_leftovers_of_a_killed_node_are_gone_and_folders_stay(desk: Desk) -> None:
    desk.realm.start("ada")
    desk.realm.stop("ada")
    settings = desk.realm.settings("ada")
    (settings.models / "run-1").mkdir(parents=True)
    kept = settings.state / ".hansa-tmp-folder"
    kept.mkdir()
    (kept / "x").write_bytes(b"x")
    files = [folder / ".hansa-tmp-x" for folder in (settings.state, settings.models / "run-1")]
    for file in files:
        file.write_bytes(b"half")
    desk.realm.start("ada")
    assert not any(file.exists() for file in files)
    assert (kept / "x").exists(), "a restore's, perhaps of another process"


# -- which one serves ------------------------------------------------------------------------------------------------


def test_a_charter_of_a_task_that_nothing_is_registered_for(desk: Desk) -> None:
    desk.add(desk.file(0))
    known = desk.registry.all()
    for name in (None, TASK):
        with pytest.raises(Refused) as caught:
            serving(known, "digits", name)
        assert caught.value.reason is Refusal.TASK
    assert serving(known, TASK, None).name == TASK
