"""A node put together from node.yaml: what it joins, what it says, what its log never says, and how its process ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch

from hansa.clients import app as app_module
from hansa.clients import preflight, registry
from hansa.clients.datasets import RegisteredDataset
from hansa.clients.law import Control
from hansa.clients.node import assemble
from hansa.clients.preflight import check
from hansa.clients.registrations import DataFiles
from hansa.clients.registry import Registry
from hansa.common.charter import SignedCharter
from hansa.common.errors import (
    CharterError,
    ConfigError,
    DataError,
    IdentityError,
    LedgerError,
    Refusal,
    RunFailed,
    SchemaViolation,
    TaskError,
)
from hansa.common.events import EventLog
from hansa.common.tasks import load_task
from node_support import NAMES, ROWS, TASK, Realm


@pytest.fixture
def realm(tmp_path: Path) -> Iterator[Realm]:
    made = Realm(tmp_path)
    yield made
    made.close()


# -- putting it together ---------------------------------------------------------------------------------------------


def test_a_whole_run_under_each_of_two_charters_on_one_budget(realm: Realm) -> None:
    second = realm.charter("second", "other-coordinator")
    for name in NAMES:
        assert len(realm.start(name, realm.signed, second).joined) == 2
    assert realm.run("run-1").why == "completed"
    assert realm.run("run-2", second, "other-coordinator").why == "completed"
    gate = realm.sites["ada"].gate
    assert [len(gate.spent(s.sha256)) for s in (realm.signed, second)] == [2, 2]
    assert len(gate.spent()) == 4
    state = realm.keys.home("ada").path / "state"
    assert sorted(p.name for p in (state / "models").iterdir()) == ["run-1", "run-2"]
    assert not [p for p in (state / "outbox").rglob("*") if p.is_file()], "a closed run's replies are forgotten"


def test_a_charter_that_does_not_fit_is_logged_and_the_others_are_joined(realm: Realm) -> None:
    """Not signed by everyone, not of this partner's size, of other task code."""
    good = realm.signed
    unsigned = realm.charter("unsigned")
    unsigned = SignedCharter(unsigned.payload, unsigned.signatures[:-1])
    sizes = {"ada": {"data": "x", "declared_records": 90}, "ben": {"data": "x", "declared_records": 60}}
    oversized = realm.charter("oversized", partners=sizes)
    site = realm.start("ada", good, unsigned, oversized)
    assert [one.signed.sha256 for one in site.joined] == [good.sha256]
    said = {e["federation"]: e["reason"] for e in realm.events() if e["event"] == "charter refused"}
    assert said == {"unsigned": "not signed by coordinator", "oversized": Refusal.DATA.value}
    realm.stop("ada")
    with pytest.raises(CharterError, match=r"no charter can be joined:\n.*size is not within"):
        realm.start("ada", oversized)
    realm.start("ada", good)  # the failed start let go of the ledger


def test_what_only_the_site_refuses_is_joined_and_the_coordinator_sees_why(realm: Realm) -> None:
    """And the round goes on with the others, and is closed with everyone's signature."""
    realm.rules["ben"] = {"minimum_cohort": 2}
    for name in NAMES:
        realm.start(name)
    outcome = realm.run("run-1")
    assert outcome.why == "completed"
    assert realm.reasons(outcome, "ben") == {Refusal.COHORT.value}
    assert realm.reasons(outcome, "ada") == set()
    assert [e["reason"] for e in realm.events() if e["event"] == "runs will be refused"] == [Refusal.COHORT.value]
    assert (realm.closing / "run-1.json").exists()
    assert realm.sites["ben"].gate.spent() == []


def test_approval_pause_and_withdrawal_while_it_runs(realm: Realm) -> None:
    realm.rules["ben"] = {"approval": True}
    for name in NAMES:
        realm.start(name)
    control = Control(realm.settings("ben").control)
    assert realm.reasons(realm.run("run-1"), "ben") == {Refusal.NOT_APPROVED.value}
    control.approve("run-2", realm.signed.sha256)
    assert realm.reasons(realm.run("run-2"), "ben") == set()
    control.approve("run-3", realm.signed.sha256)
    control.pause()
    assert realm.reasons(realm.run("run-3"), "ben") == {Refusal.PAUSED.value}
    control.resume()
    control.withdraw(realm.signed.sha256)
    control.approve("run-4", realm.signed.sha256)
    outcome = realm.run("run-4")
    assert (outcome.why, realm.reasons(outcome, "ben")) == ("completed", {Refusal.WITHDRAWN.value})
    realm.start("ben")  # also after a restart it can close what is under that charter
    assert realm.run("run-5").why == "completed"


def test_a_model_that_cannot_be_protected_stops_a_node_before_it_is_asked(
    realm: Realm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a round it would be charged, and answered with nothing but "failed"."""
    task = load_task(realm.signed.charter.task.name)

    (inputs,) = task.schema.shape

    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = torch.nn.Bilinear(inputs, inputs, len(task.classes))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x, x)

    broken = replace(task, build_model=Product)
    monkeypatch.setattr(registry, "load_task", lambda _: broken)
    with pytest.raises(TaskError, match=r"\(Bilinear\) has no per-record gradients"):
        realm.start("ada")
    found = check(realm.settings("ada"), None)
    assert any("(Bilinear) has no per-record gradients" in one.what for one in found if one.state == "FAIL")
    monkeypatch.undo()
    realm.start("ada")  # the failed start let go of everything


def test_what_stops_a_node(realm: Realm) -> None:
    settings, log = realm.settings("ada"), EventLog("json", realm.log)
    with pytest.raises(DataError, match="no data is registered") as caught:
        assemble(settings, None, log)
    assert "hansa node dataset add" in caught.value.hint
    realm.start("ada")
    with pytest.raises(LedgerError, match="another process"):
        assemble(settings, None, log)
    realm.stop("ada")
    entries = [{"charter": str(_copy(realm, "first", n)), "server": "127.0.0.1:1"} for n in ("copy", "another")]
    with pytest.raises(ConfigError, match="the same charter"):
        assemble(realm.settings("ada", federations=entries), None, log)
    (settings.home / "identity.key").chmod(0o644)
    with pytest.raises(IdentityError, match="readable by others"):
        realm.start("ada")
    (settings.home / "identity.key").chmod(0o600)
    settings.ledger.rename(settings.state / "elsewhere")
    with pytest.raises(LedgerError, match="holds what the registered data has spent"):
        realm.start("ada")
    assert not settings.ledger.exists(), "no fresh ledger is begun, over which nothing could be restored"


def _copy(realm: Realm, name: str, to: str) -> Path:
    folder = realm.keys.home("ada").path
    (folder / f"{to}.json").write_bytes((folder / f"{name}.json").read_bytes())
    return folder / f"{to}.json"


def test_a_real_node_takes_no_simulated_charter(realm: Realm) -> None:
    realm.register("ada")
    settings = realm.settings("ada", simulated=False)
    with pytest.raises(CharterError, match=r"simulated charter never touches a real dataset"):
        assemble(settings, None, EventLog("json", realm.log))


# -- the registered data ---------------------------------------------------------------------------------------------


def test_loading_a_registration_reads_no_data_and_takes_no_other_task(realm: Realm) -> None:
    def never() -> None:
        raise AssertionError("data was read")

    state, task = realm.settings("ada").state, load_task(TASK)
    with pytest.raises(DataError, match="no data is registered"):
        RegisteredDataset.load(task, never, state)  # type: ignore[arg-type]
    realm.register("ada")
    state = state / "datasets" / TASK
    made = RegisteredDataset.load(task, never, state)  # type: ignore[arg-type]
    assert (made.held_out, made.bound, made.size_within(ROWS, 0)) == ("none", False, True)
    with pytest.raises(AssertionError, match="data was read"):
        made.open()
    with pytest.raises(DataError, match="registered for task heart-disease"):
        RegisteredDataset.load(load_task("digits"), never, state)  # type: ignore[arg-type]
    (state / "dataset.json").write_text('{"key": "00"}')
    with pytest.raises(DataError, match="not a dataset registration"):
        RegisteredDataset.load(task, never, state)  # type: ignore[arg-type]


def test_data_that_changed_is_refused_when_a_run_reads_it(realm: Realm) -> None:
    for name in NAMES:
        realm.start(name)
    file = DataFiles.load(realm.settings("ada").state / "datasets" / TASK).data
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    outcome = realm.run("run-1")
    assert realm.reasons(outcome, "ada") == {Refusal.DATA.value}
    assert outcome.why == "completed"


# -- the log ---------------------------------------------------------------------------------------------------------


def test_no_record_value_size_or_path_is_ever_logged(realm: Realm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole cycle of assembling, refusing, failing, training and closing; then every number and name of the data."""
    canary = "199.625"  # trestbps, in range
    file = realm.data("ada")
    head, first, *rest = file.read_text().splitlines()
    cells = first.split(",")
    cells[head.split(",").index("trestbps")] = canary
    secret = file.with_name("secret-patients.csv")
    odd_size = [head, ",".join(cells), *rest][:58]  # 57 records, 60 declared
    secret.write_text("\n".join(odd_size) + "\n")
    Registry(realm.settings("ada").state).add(DataFiles(TASK, secret, None))
    for name in NAMES:
        realm.start(name)
    realm.run("run-1")
    secret.rename(secret.with_name("gone.csv"))
    realm.start("ada")
    realm.run("run-2")  # cannot be read
    secret.with_name("gone.csv").rename(secret)

    def explode(*_: object, **__: object) -> None:
        raise SchemaViolation(str(secret), [(2, "trestbps", canary, "a number")])

    monkeypatch.setattr(app_module, "train_locally", explode)
    realm.start("ada")
    log = EventLog("json", realm.log)
    with pytest.raises(RunFailed):
        realm.run("run-3")  # the work itself fails, with words that quote a cell
    log.failed("stopped", SchemaViolation(str(secret), [(2, "trestbps", canary, "a number")]))
    logged = realm.log.getvalue()
    assert {e["event"] for e in realm.events()} >= {"hold", "debit", "commit", "refuse", "release", "charter joined"}
    values = [value for e in realm.events() for value in e.values()]
    assert 57 not in values
    for word in (canary, "secret-patients", str(secret.parent), "gone.csv", "trestbps"):
        assert word not in logged


def test_the_daemon_logs_no_words_of_libraries_and_of_exceptions(realm: Realm) -> None:
    """As the test before, in a process of its own: what `run` does to loggers holds for the whole process."""
    code = """
import logging, sys, threading
import hansa.clients.link as link
from pathlib import Path
from hansa.clients.settings import load_settings
from hansa.clients.node import run
from hansa.common.events import EventLog

def run_links(links, stop):
    logging.getLogger("hansa.node").error("%s", ValueError("251.125"))
    logging.getLogger("flwr").error("/data/secret-patients.csv")
    raise SystemExit(0)

link.run_links = run_links
settings = load_settings(Path(sys.argv[1]))
run(settings, None, EventLog("json", sys.stdout))
"""
    realm.start("ada")
    realm.stop("ada")
    path = realm.keys.home("ada").path / "node.yaml"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()][-2:] == ["library", "library"]
    assert "251.125" not in done.stdout
    assert "secret" not in done.stdout


# -- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(realm: Realm, number: signal.Signals) -> None:
    """Nobody answers at its server's address: it waits, and stops when asked to."""
    realm.start("ada")
    realm.stop("ada")
    process = subprocess.Popen(
        [sys.executable, "-c", "from hansa.common.start import main; main()", "node", "run", "node.yaml"],
        cwd=realm.keys.home("ada").path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    events = []
    for line in process.stdout:
        events.append(json.loads(line)["event"])
        if events[-1] == "disconnected":
            break
    assert "started" in events
    time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["event"] == "stopped"
    realm.start("ada")  # it let go of the ledger


def test_memory_is_held_to_the_sites_limit() -> None:
    code = """
from pathlib import Path
import torch
from hansa.clients.node import limit
from hansa.clients.settings import FederationEntry, NodeSettings, SiteSettings
site = SiteSettings(threads=2, memory_mb=1024)
limit(NodeSettings(federations=(FederationEntry(charter=Path("c"), server="h:1"),), site=site))
assert torch.get_num_threads() == 2
bytearray(64 << 20)
try:
    bytearray(2 << 30)
except MemoryError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("refused\n", "")


# -- preflight -------------------------------------------------------------------------------------------------------


def states(realm: Realm, name: str = "ada") -> dict[str, str]:
    return {f.name: f.state for f in check(realm.settings(name), None)}


def test_preflight(realm: Realm) -> None:
    realm.start("ada")  # it works while the node runs
    found = states(realm)
    server = found.pop("server 127.0.0.1:1")
    assert server == "FAIL", "nobody answers there"
    assert set(found.values()) == {"ok"}
    realm.rules["ada"] = {"minimum_cohort": 2}
    assert {n for n, s in states(realm).items() if s == "FAIL"} - {"server 127.0.0.1:1"} == {
        f"charter {realm.settings('ada').federations[0].charter.name}: site"
    }
    realm.rules["ada"] = {}
    file = DataFiles.load(realm.settings("ada").state / "datasets" / TASK).data
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    (realm.settings("ada").home / "tls.key").chmod(0o640)
    (realm.settings("ada").home / "tls.crt").unlink()
    bad = [f for f in check(realm.settings("ada"), None) if f.state == "FAIL"]
    assert {f.name for f in bad} >= {"keys", "certificate", f"data {TASK}"}
    assert all(f.fix for f in bad), "each failure says what to do"


def test_preflight_sees_a_clock_that_is_behind(realm: Realm, monkeypatch: pytest.MonkeyPatch) -> None:
    realm.start("ada")
    real = datetime

    class Behind(datetime):
        @classmethod
        def now(cls, zone: object = None) -> datetime:  # type: ignore[override]
            return real.now(zone) - timedelta(hours=1)  # type: ignore[arg-type]

    monkeypatch.setattr(preflight, "datetime", Behind)
    found = {f.name: f for f in check(realm.settings("ada"), None)}
    assert found["clock"].state == "warn"
    assert "NTP" in found["clock"].fix
