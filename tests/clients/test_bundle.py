"""A partner's part of a bundle: of other charters the auditor sees what they did to the budget, and not whose it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hansa.clients.bundle import export
from hansa.clients.models import MODEL, charter_of
from hansa.common.charter import SignedCharter
from hansa.common.errors import ConfigError, OutputError
from hansa.common.identity import public_pem
from hansa.common.ledger import read_ledger
from node_support import NAMES, Realm
from support import verified

OTHER = "other-coordinator"


@pytest.fixture
def realm(tmp_path: Path) -> Iterator[Realm]:
    """Two coordinators, who both name their run run-1."""
    made = Realm(tmp_path)
    second = made.second = made.charter("second", OTHER)  # type: ignore[attr-defined]
    for name in NAMES:
        made.start(name, made.signed, second)
    made.run("run-1")
    made.run("run-1", second, OTHER)
    yield made
    made.close()


def test_entries_of_another_charter_are_headers(realm: Realm) -> None:
    second: SignedCharter = realm.second  # type: ignore[attr-defined]
    settings = realm.settings("ada", realm.signed, second)
    with pytest.raises(ConfigError, match="--charter FILE"):
        export(settings, realm.root / "none")
    files = {one.charter.name: settings.home / f"{one.charter.name}.json" for one in (realm.signed, second)}
    whole, _ = read_ledger(settings.ledger)
    for one in (realm.signed, second):
        out = realm.root / one.charter.name
        export(settings, out, files[one.charter.name])
        seen, torn = read_ledger(out / "partners" / "ada" / "ledger.jsonl")
        assert torn == b""
        assert [entry.leaf for entry in seen] == [entry.leaf for entry in whole], "one tree, whatever is shown of it"
        assert [e.privacy for e in seen] == [e.privacy for e in whole]
        for shown, entry in zip(seen, whole, strict=True):
            assert (shown.type == "undisclosed") == (entry.charter not in (None, one.sha256))
        text = (out / "partners" / "ada" / "ledger.jsonl").read_bytes()
        strange = second.sha256 if one is realm.signed else realm.signed.sha256
        assert strange.encode() not in text
        assert one.sha256.encode() in text
        one.save(out / "charter.json")
        with pytest.raises(OutputError, match="another charter"):
            export(settings, out, files["second" if one is realm.signed else "first"])
        export(settings, out)  # the folder says which


def test_each_has_its_own_model_and_closing(realm: Realm) -> None:
    """The second coordinator chose the run's name after the first, and overwrites nothing."""
    second: SignedCharter = realm.second  # type: ignore[attr-defined]
    settings = realm.settings("ada", realm.signed, second)
    folders = {path.name: charter_of(path / "closing.json") for path in settings.models.iterdir()}
    assert folders == {"run-1": realm.signed.sha256, f"run-1@{second.sha256[:16]}": second.sha256}
    models = {(settings.models / name / MODEL).read_bytes() for name in folders}
    assert len(models) == 2
    for one in (realm.signed, second):
        out = realm.root / f"out-{one.charter.name}"
        written = export(settings, out, settings.home / f"{one.charter.name}.json")
        assert "closing/run-1.json" in written
        assert charter_of(out / "closing" / "run-1.json") == one.sha256


def test_an_edited_closing_is_not_passed_on(realm: Realm) -> None:
    settings = realm.settings("ada", realm.signed)
    kept = settings.models / "run-1" / "closing.json"
    kept.write_bytes(kept.read_bytes().replace(b'"sig":"', b'"sig":"AAAA', 1))
    with pytest.raises(OutputError, match="closing"):
        export(settings, realm.root / "out")
    assert not (realm.root / "out").exists(), "all or nothing"


def test_a_data_set_of_another_lineage_is_not_disclosed(realm: Realm) -> None:
    realm.stop("ada")
    settings = realm.settings("ada", realm.signed, realm.second)  # type: ignore[attr-defined]
    (lineage,) = {e.privacy["lineage"] for e in read_ledger(settings.ledger)[0] if e.type == "hold" and e.privacy}
    site = realm.start("ada", realm.signed)
    about = {"dataset": "d" * 32, "lineage": "e" * 32, "task": "x", "commitment": "f" * 64, "declared": {}}
    site.ledger.append("dataset", about, privacy={"lineage": "e" * 32, "open": "disjoint"})
    export(realm.settings("ada", realm.signed), realm.root / "out")
    shown = read_ledger(realm.root / "out" / "partners" / "ada" / "ledger.jsonl")[0]
    assert [e.body["lineage"] for e in shown if e.type == "dataset"] == [lineage]
    assert shown[-1].type == "undisclosed"
    assert shown[-1].privacy == {"lineage": "e" * 32, "open": "disjoint"}


def test_an_auditor_of_either_charter_verifies_its_bundle(realm: Realm) -> None:
    """The shared budget adds up for both, from headers alone where the entries are the other's."""
    second: SignedCharter = realm.second  # type: ignore[attr-defined]
    for one, where in ((realm.signed, None), (second, OTHER)):
        out = realm.root / f"bundle-{one.charter.name}"
        one.save(out / "charter.json")
        for name in NAMES:
            export(realm.settings(name, realm.signed, second), out)
        (out / "coordinator").mkdir()
        shutil.copy(realm.root / one.sha256[:8] / "ledger.jsonl", out / "coordinator")
        (out / "keys" / "coordinator.pem").write_bytes(public_pem(one.charter.coordinator.key))
        (model,) = [p for p in realm.settings("ada").models.iterdir() if charter_of(p / "closing.json") == one.sha256]
        shutil.copy(model / MODEL, out)
        partner = verified(out)["partners"]["ada"]
        assert partner["rounds"] == 2, where
