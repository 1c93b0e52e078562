"""A restore is a rollback unless proved otherwise, and a backup file may be anybody's."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hansa.clients import custody
from hansa.clients.bundle import export
from hansa.clients.custody import backup, doubts, prove, restore
from hansa.clients.law import Control
from hansa.common.closing import CLOSING_TYPE
from hansa.common.errors import DataError, IdentityError, LedgerError, MessageError, OutputError, Refusal
from hansa.common.identity import Envelope, read_envelope, write_envelope
from hansa.common.ledger import Counter, Entry, read_ledger
from node_support import NAMES, Realm
from support import verified


@pytest.fixture
def realm(tmp_path: Path) -> Iterator[Realm]:
    made = Realm(tmp_path)
    for name in NAMES:
        made.start(name)
    yield made
    made.close()


def saved(realm: Realm, name: str = "backup.tar") -> Path:
    backup(realm.settings("ada"), realm.root / name)
    return realm.root / name


def lose(realm: Realm) -> None:
    """Ada's disk is gone, but for her data; node.yaml and the charter she gets again."""
    realm.stop("ada")
    settings = realm.settings("ada")
    shutil.rmtree(settings.state)
    for file in settings.home.iterdir():
        if file.suffix not in (".csv", ".yaml") and file.name != "first.json":
            file.unlink()


def refusals(realm: Realm, run: str) -> set[str]:
    return realm.reasons(realm.run(run), "ada")


RESTORED = {Refusal.RESTORED.value}


# -- the rollback ----------------------------------------------------------------------------------------------------


def test_backup_then_more_debits_then_restore_is_refused(realm: Realm) -> None:
    """Also with the checkpoint of the run before: a later one is known, so entries are lost."""
    realm.run("run-1")
    old = saved(realm)
    realm.run("run-2")
    lose(realm)
    doubt = restore(realm.settings("ada"), old, [])
    assert doubt == "no closing checkpoint from before the restore was given"
    first, second = (realm.closing / f"run-{n}.json" for n in (1, 2))
    assert "entries are lost" in str(prove(realm.settings("ada"), [first, second]))
    assert "entries are lost" in str(prove(realm.settings("ada"), [second]))
    realm.start("ada")
    assert refusals(realm, "run-3") == RESTORED
    assert len(realm.sites["ada"].gate.spent()) == 2


def test_restored_at_exactly_the_countersigned_head_goes_on(realm: Realm) -> None:
    realm.run("run-1")
    old = saved(realm)
    lose(realm)
    assert restore(realm.settings("ada"), old, [realm.closing / "run-1.json"]) is None
    realm.start("ada")
    assert refusals(realm, "run-2") == set()
    assert len(realm.sites["ada"].gate.spent()) == 4, "with all that was spent before"


def test_proved_later_while_the_node_runs(realm: Realm) -> None:
    """Refusals and accepted charters behind the checkpoint spend nothing, so they are no obstacle."""
    realm.run("run-1")
    realm.start("ada", realm.signed, realm.charter("another"))
    old = saved(realm)
    lose(realm)
    assert restore(realm.settings("ada"), old, []) is not None
    realm.start("ada")
    assert refusals(realm, "run-2") == RESTORED
    assert prove(realm.settings("ada"), [realm.closing / "run-1.json"]) is None
    assert refusals(realm, "run-3") == set()


def test_a_checkpoint_from_after_the_restore_proves_nothing(realm: Realm) -> None:
    """The coordinator hides run 2, has the restored node close a run, and passes that checkpoint off as the newest."""
    realm.run("run-1")
    old = saved(realm)
    realm.run("run-2")
    lose(realm)
    restored = realm.settings("ada")
    assert restore(restored, old, []) is not None
    length = len(read_ledger(restored.ledger)[0])
    realm.start("ada")
    assert refusals(realm, "run-3") == RESTORED
    later = realm.closing / "run-3.json"
    payload = json.loads(read_envelope(later.read_bytes().rstrip(b"\n"), CLOSING_TYPE).payload)
    assert next(x["length"] for x in payload["ledgers"] if x["owner"] == "ada") > length, "not at the restored head"
    assert prove(restored, [later]) == "no closing checkpoint from before the restore was given"
    # A backup of this state, restored, is no better than it was.
    again = saved(realm, "again.tar")
    lose(realm)
    assert restore(realm.settings("ada"), again, [later]) == "no closing checkpoint from before the restore was given"


def test_an_honest_restore_verifies_in_an_audit_and_stands_in_the_ledger(realm: Realm) -> None:
    realm.run("run-1")
    old = saved(realm)
    lose(realm)
    assert restore(realm.settings("ada"), old, []) is not None
    realm.start("ada")
    assert refusals(realm, "run-2") == RESTORED
    assert prove(realm.settings("ada"), [realm.closing / "run-1.json"]) is None
    bundle = realm.root / "bundle"
    for name in NAMES:
        export(realm.settings(name), bundle)
    realm.signed.save(bundle / "charter.json")
    assert {p.name: p.read_bytes() for p in (bundle / "closing").iterdir()} == {
        p.name: p.read_bytes() for p in realm.closing.iterdir()
    }, "every partner adds the closing checkpoints that it keeps"
    (bundle / "coordinator").mkdir()
    shutil.copy(realm.root / realm.signed.sha256[:8] / "ledger.jsonl", bundle / "coordinator")
    shutil.copy(realm.keys.home("coordinator").path / "coordinator.pem", bundle / "keys")
    shutil.copy(realm.settings("ben").models / "run-2" / "model.safetensors", bundle)
    assert verified(bundle)["partners"]["ada"]["refusals"] == 1


def test_a_run_that_was_open_in_the_backup(realm: Realm, monkeypatch: pytest.MonkeyPatch) -> None:
    realm.run("run-1")
    gate, taken = realm.sites["ada"].gate, []
    original = gate.debit

    def debit(*arguments: object) -> bool:
        if len(taken) == 0:
            taken.append(saved(realm))
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gate, "debit", debit)
    realm.run("run-2")
    lose(realm)
    doubt = str(restore(realm.settings("ada"), taken[0], [realm.closing / "run-1.json"]))
    assert "something was held or spent behind it" in doubt
    realm.start("ada")
    assert refusals(realm, "run-3") == RESTORED


def test_every_federation_under_which_it_held_runs_must_speak(realm: Realm) -> None:
    second = realm.charter("second", "other-coordinator")
    for name in NAMES:
        realm.start(name, realm.signed, second)
    realm.run("run-1", second, "other-coordinator")
    realm.run("run-2")
    old = realm.root / "two.tar"
    settings = realm.settings("ada", realm.signed, second)
    backup(settings, old)
    realm.stop("ada")
    shutil.rmtree(settings.state)
    doubt = restore(settings, old, [realm.closing / "run-2.json"])
    assert doubt == "no checkpoint of second was given, under which runs were held as well"
    assert prove(settings, [realm.closing / "run-1.json", realm.closing / "run-2.json"]) is None


def test_own_models_speak_against_it_and_never_for_it(realm: Realm) -> None:
    """The disk kept state/models, whose closing checkpoints are newer than the backup's ledger."""
    realm.run("run-1")
    old = saved(realm)
    lose(realm)
    assert restore(realm.settings("ada"), old, []) == "no closing checkpoint from before the restore was given"
    realm.start("ada")
    assert prove(realm.settings("ada"), [realm.closing / "run-1.json"]) is None
    realm.run("run-2")
    realm.stop("ada")
    realm.settings("ada").ledger.unlink()
    realm.settings("ada").counter.unlink()
    assert "entries are lost" in str(restore(realm.settings("ada"), old, [realm.closing / "run-1.json"]))


def test_the_counter_of_this_machine_speaks_against_it_and_never_for_it(realm: Realm) -> None:
    """Also where peers keep silent of a run that came later, and however often it is restored."""
    realm.run("run-1")
    first = saved(realm)
    realm.run("run-2")
    second = saved(realm, "second.tar")
    settings = realm.settings("ada")
    realm.stop("ada")
    settings.ledger.unlink()
    shutil.rmtree(settings.models)
    heads = {path: path.read_bytes() for path in settings.heads.iterdir()}
    for _ in range(2):
        doubt = restore(settings, first, [realm.closing / "run-1.json"])
        assert "this machine had counted" in str(doubt)
    assert {path: path.read_bytes() for path in settings.heads.iterdir()} == heads, "what it countersigned stays"
    realm.start("ada")
    assert refusals(realm, "run-3") == RESTORED
    realm.stop("ada")
    settings.ledger.unlink()
    shutil.rmtree(settings.models)
    assert restore(settings, second, [realm.closing / "run-2.json"]) is not None, "it spoke from the first one since"
    shutil.rmtree(settings.state)
    assert restore(settings, second, [realm.closing / "run-2.json"]) is None, "another folder counted nothing"


def test_the_counter_lets_the_backup_pass_that_has_all_it_counted(realm: Realm) -> None:
    realm.run("run-1")
    saved_all, settings = saved(realm), realm.settings("ada")
    realm.stop("ada")
    settings.ledger.unlink()
    assert settings.counter.exists()
    assert restore(settings, saved_all, [realm.closing / "run-1.json"]) is None
    realm.start("ada")
    assert refusals(realm, "run-2") == set()


@pytest.mark.parametrize("change", ["unsigned", "edited", "other", "garbage", "missing"])
def test_checkpoints_that_are_none(realm: Realm, change: str) -> None:
    realm.run("run-1")
    old, path, unrelated = saved(realm), realm.closing / "run-1.json", realm.charter("unrelated")
    lose(realm)
    envelope = read_envelope(path.read_bytes().rstrip(b"\n"), CLOSING_TYPE)
    match change:
        case "unsigned":
            path.write_bytes(write_envelope(Envelope(CLOSING_TYPE, envelope.payload, envelope.signatures[:-1])))
        case "edited":
            payload = envelope.payload.replace(b'"run-1"', b'"run-9"')
            path.write_bytes(write_envelope(Envelope(CLOSING_TYPE, payload, envelope.signatures)))
        case "other":
            settings = realm.settings("ada", unrelated)
            with pytest.raises(MessageError, match=r"a charter that node\.yaml does not list"):
                restore(settings, old, [path])
            assert Control(settings.control).restored.exists()
            return
        case "garbage":
            path.write_bytes(b"{}")
        case "missing":
            path.unlink()
    with pytest.raises(MessageError, match=str(path)):
        restore(realm.settings("ada"), old, [path])
    assert Control(realm.settings("ada").control).restored.exists(), "restored, and still not proved"


def test_the_rules_one_by_one() -> None:
    def entries(*kinds: str) -> list[Entry]:
        bodies = {
            "dataset": {"dataset": "d", "lineage": "l"},
            "hold": {"run_id": "r", "plan_sha256": "", "plan": [], "dataset": "d"}
            | {"request_id": "q", "request_sha256": ""},
            "release": {"run_id": "r", "why": "closed"},
            "charter": {"name": "C", "expires": "2027-01-01T00:00:00+00:00"},
            "refuse": {"reason": "x"},
        }
        of = {"hold", "release", "charter", "refuse"}
        return [
            Entry(i, "", kind, "c" if kind in of else None, bodies.get(kind, {}), None, b"", f"h{i}", f"h{i + 1}")
            for i, kind in enumerate(kinds)
        ]

    whole = entries("dataset", "charter", "hold", "release")
    assert doubts(whole, 4, [("c", 4, "h4")]) is None
    assert (
        doubts([*whole, *entries("dataset", "charter", "hold", "release", "refuse")[4:]], 5, [("c", 4, "h4")]) is None
    )
    for at, given, kept, words in (
        (5, [("c", 4, "h4")], [], "not finished"),
        (4, [], [], "no closing checkpoint"),
        (4, [], [("c", 4, "h4")], "no closing checkpoint"),
        (4, [("c", 4, "other")], [], "entries are lost"),
        (4, [("c", 5, "h5")], [], "entries are lost"),
        (4, [("c", 0, "h0")], [], "entries are lost"),
        (4, [("c", 4, "h4")], [("c", 5, "h5")], "entries are lost"),
        (3, [("c", 4, "h4")], [], "no closing checkpoint"),
        (4, [("c", 2, "h2")], [], "covers 2 of 4"),
        (3, [("c", 3, "h3")], [], "run r was open"),
        (4, [("d", 4, "h4")], [], "no checkpoint of C"),
    ):
        assert words in str(doubts(whole, at, given, kept)), (at, given, kept)


# -- the folders -----------------------------------------------------------------------------------------------------


def test_a_backup_holds_everything_but_the_inbox_and_nobody_else_can_read_it(realm: Realm) -> None:
    realm.run("run-1")
    settings = realm.settings("ada")
    (settings.state / "inbox").mkdir()
    (settings.state / "inbox" / "x.request").write_bytes(b"x")
    (settings.state / ".hansa-tmp-x").write_bytes(b"x")
    file = saved(realm)
    assert file.stat().st_mode & 0o777 == 0o600
    with tarfile.open(file) as tar:
        names = set(tar.getnames())
    assert names >= {
        "home/identity.key",
        "home/identity.json",
        "home/tls.key",
        "home/tls.crt",
        "home/ca.crt",
        "state/datasets/heart-disease/dataset.json",
        "state/ledger.jsonl",
        "state/datasets/heart-disease/source.json",
        "state/models/run-1/model.safetensors",
    }
    assert not [n for n in names if "inbox" in n or ".hansa-tmp-" in n or n.endswith((".csv", ".yaml"))]
    with pytest.raises(OutputError, match="exists"):
        backup(settings, file)


def test_a_backup_while_it_trains_has_the_reply_of_every_commit(realm: Realm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node commits and closes between the copy of the ledger and that of the outbox, and half a line is on disk."""
    settings, taken = realm.settings("ada"), []
    original = realm.sites["ada"].gate.commit

    def commit(*arguments: object, **more: object) -> None:
        original(*arguments, **more)  # type: ignore[arg-type]
        taken.append(saved(realm, f"{len(taken)}.tar"))

    monkeypatch.setattr(realm.sites["ada"].gate, "commit", commit)
    realm.run("run-1")
    assert len(taken) == 4
    for number, file in enumerate(taken, start=1):
        with tarfile.open(file) as tar:
            replies = [n for n in tar.getnames() if n.startswith("state/outbox/")]
            ledger = tar.extractfile("state/ledger.jsonl")
            assert ledger is not None
            lines = ledger.read()
        assert len(replies) == number
        assert lines.endswith(b"\n")
    with settings.ledger.open("ab") as torn:
        torn.write(b'{"payload":"half')
    with tarfile.open(saved(realm, "torn.tar")) as tar:
        ledger = tar.extractfile("state/ledger.jsonl")
        assert ledger is not None
        assert ledger.read().endswith(b"}\n")


def test_restore_keeps_a_longer_ledger_and_one_that_is_in_use(realm: Realm) -> None:
    realm.run("run-1")
    old = saved(realm)
    settings = realm.settings("ada")
    with pytest.raises(LedgerError, match="a node is running"):
        restore(settings, old, [])
    realm.run("run-2")
    realm.stop("ada")
    before = settings.ledger.read_bytes()
    with pytest.raises(LedgerError, match="is longer"):
        restore(settings, old, [])
    assert settings.ledger.read_bytes() == before
    assert not Control(settings.control).restored.exists()


def test_restore_refuses_a_fork_another_identity_and_another_dataset(realm: Realm) -> None:
    realm.run("run-1")
    old, settings = saved(realm), realm.settings("ada")
    realm.stop("ada")
    lines = settings.ledger.read_bytes().splitlines(keepends=True)
    settings.ledger.write_bytes(b"".join(lines[:3]))
    Counter(settings.counter).renew(read_ledger(settings.ledger)[0])
    fork = realm.start("ada").ledger
    fork.append("recovered", {"torn_bytes": 1, "torn_sha256": "a" * 64})
    realm.stop("ada")
    with pytest.raises(LedgerError, match="another ledger than the backup's"):
        restore(settings, old, [])
    settings.ledger.write_bytes(b"".join(lines[:3]))  # an earlier part of it: fine
    kept = settings.state / "datasets" / "heart-disease" / "dataset.json"
    registration = kept.read_bytes()
    kept.write_bytes(registration.replace(json.loads(registration)["dataset_id"].encode(), b"f" * 32))
    with pytest.raises(LedgerError, match="another data set"):
        restore(settings, old, [])
    kept.write_bytes(registration)
    realm.stop("ben")
    with pytest.raises(IdentityError, match="another identity"):
        restore(realm.settings("ben"), old, [])
    settings.counter.unlink()  # which had counted the fork
    assert restore(settings, old, [realm.closing / "run-1.json"]) is None
    assert settings.ledger.read_bytes() == b"".join(lines)


def test_what_was_withdrawn_after_the_backup_stays_withdrawn(realm: Realm) -> None:
    realm.run("run-1")
    old, settings = saved(realm), realm.settings("ada")
    control = Control(settings.control)
    control.withdraw(realm.signed.sha256)
    realm.stop("ada")
    settings.ledger.unlink()
    assert restore(settings, old, [realm.closing / "run-1.json"]) is None
    assert control.withdrawn(realm.signed.sha256)


def test_a_restore_that_was_interrupted_is_marked_already(realm: Realm, monkeypatch: pytest.MonkeyPatch) -> None:
    realm.run("run-1")
    old = saved(realm)
    lose(realm)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(custody, "_place", crash)
        with pytest.raises(KeyboardInterrupt):
            restore(realm.settings("ada"), old, [])
    assert Control(realm.settings("ada").control).restored.exists()
    assert not list(realm.settings("ada").state.glob(".hansa-tmp-*"))
    assert restore(realm.settings("ada"), old, [realm.closing / "run-1.json"]) is None


# -- hostile files ---------------------------------------------------------------------------------------------------


def member(name: str, **changes: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in changes.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("../evil"),
        member("state/../../evil"),
        member("/etc/evil"),
        member("state//evil"),
        member("state/./evil"),
        member("state"),
        member("home/.bashrc"),
        member("home/sub/identity.key"),
        member("home/node.yaml"),
        member("elsewhere/evil"),
        member("state/inbox/x.request"),
        member("state/counter"),
        member("state/datasets.lock"),
        member("state/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("state/hard", type=tarfile.LNKTYPE, linkname="state/ledger.jsonl"),
        member("state/device", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("state/fifo", type=tarfile.FIFOTYPE),
        member("state/folder", type=tarfile.DIRTYPE),
        member("state/ledger.jsonl"),  # a second time
    ],
    ids=lambda info: f"{info.name}-{info.type.decode()}",
)
def test_a_hostile_archive_changes_nothing(realm: Realm, bad: tarfile.TarInfo) -> None:
    good = saved(realm)
    realm.stop("ada")
    settings = realm.settings("ada")
    with tarfile.open(good, "a") as tar:
        bad.size = 4 if bad.isreg() else 0
        tar.addfile(bad, io.BytesIO(b"evil"))
    before = {p: p.read_bytes() for p in realm.root.rglob("*") if p.is_file()}
    with pytest.raises(DataError, match="which no backup does"):
        restore(settings, good, [])
    assert {p: p.read_bytes() for p in realm.root.rglob("*") if p.is_file()} == before
    assert not list(realm.root.parent.glob("evil"))


def test_archives_that_are_none(realm: Realm) -> None:
    good = saved(realm)
    realm.stop("ada")
    settings = realm.settings("ada")
    whole = good.read_bytes()
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode="w").close()
    for data, words in (
        (b"", "not a backup"),
        (b"garbage", "not a backup"),
        (whole[:700], "not a backup"),
        (empty.getvalue(), "not a whole backup"),
        (whole.replace(b'"payload":"ey', b'"payload":"ez', 1), "not a whole backup"),
    ):
        file = realm.root / "bad.tar"
        file.write_bytes(data)
        with pytest.raises(DataError, match=words):
            restore(settings, file, [])
    with pytest.raises(DataError, match="No such file"):
        restore(settings, realm.root / "none.tar", [])
    assert not Control(settings.control).restored.exists()
