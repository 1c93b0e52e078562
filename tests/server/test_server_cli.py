"""`hansa server` as its user meets it; the nodes are absent or in this process (tests/e2e/test_network.py has real ones)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e_support import call, environment, script
from hansa.common.charter import SignedCharter, draft
from hansa.common.connection_ca import ConnectionCA
from hansa.common.events import EventLog
from hansa.common.home import Home
from hansa.common.ledger import read_ledger
from hansa.common.tasks import code_sha256
from hansa.server.records import Answer
from hansa.server.rounds import Refusing
from hansa.server.status import Status, read_status
from support import HEART, config

PARTNERS = list(HEART)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator's folder, ready to run."""
    root = tmp_path_factory.mktemp("coordinator")
    ca = ConnectionCA.create(root / "ca")
    homes = {}
    for name in [*PARTNERS, "coordinator"]:
        home = root if name == "coordinator" else root / "others" / name
        homes[name] = Home.create(home, name, 365)
        homes[name].install(ca.issue((home / f"{name}.csr").read_bytes(), 90))
    made = draft(
        config(),
        task_sha256=code_sha256("heart-disease"),
        coordinator_key=homes["coordinator"].key(),
        partner_keys={name: homes[name].key() for name in PARTNERS},
        noise_multiplier=None,
        simulated=True,
    )
    signed = SignedCharter.unsigned(made)
    for home in homes.values():
        signed = signed.sign(home.identity())
    signed.save(root / "charter.json")
    return root


@pytest.fixture(autouse=True)
def logs_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon takes over all logging; this process is none."""
    monkeypatch.setattr(EventLog, "capture", lambda _: None)


@pytest.fixture
def coordinator(template: Path, tmp_path: Path) -> Path:
    """A server.yaml in a state folder of its own, over the shared identity."""
    return written(tmp_path, template)


def written(folder: Path, template: Path, **changes: Any) -> Path:
    path = folder / "server.yaml"
    value = {
        "home": str(template),
        "charter": str(template / "charter.json"),
        "listen": "127.0.0.1:0",
        "revoked": str(template / "ca" / "revoked.crl"),
        "wait_for_nodes_s": 0,
    }
    path.write_text(yaml.safe_dump({**value, **changes}), encoding="utf-8")
    return path


def a_status(settings: Path, **facts: Any) -> None:
    """A status that a run would leave, with one partner connected and one that refused."""
    about = {"run": "r1", "charter": "heart", "charter_sha256": "0" * 64, "rounds": 3, "quorum": 3, "address": "h:1"}
    link = {"since": "2026-11-22T01:00:00+00:00", "address": "10.0.0.5:4", "version": "hansa 0.1.0", "tls": "TLSv1.3"}
    kept = Status(settings.parent / "state" / "status.json", about, PARTNERS, lambda: {"cleveland": link})
    with kept:
        kept.notify("round", round=2)
        kept.notify("answer", partner="cleveland", round=2, kind="train", answer=Answer("i", "ok", "0" * 64))
        no = Refusing("hungary", "r1", None, "not approved", "[bold]waits\x1b[31m for approval")
        kept.notify("refused", refusal=no)
        kept.notify("done", round=2, metrics={"auc": 0.9}, seconds=1.0)
        kept.phase("completed")
    path = settings.parent / "state" / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def test_too_few_nodes_is_a_no_that_says_who_is_missing(coordinator):
    result = call("server", "run", coordinator).expect(1)
    result.says("0 of 4 partners connected", "cleveland, hungary, switzerland, va-long-beach", "Nothing was spent")
    assert read_status(coordinator.parent / "state" / "status.json")["phase"] == "failed"
    call("server", "status", coordinator).expect(1).says("failed", "the quorum is 3")
    entries, _ = read_ledger(coordinator.parent / "state" / "coordinator" / "ledger.jsonl")
    assert [entry.type for entry in entries] == ["genesis", "charter"]


def test_json_logs_are_one_object_a_line(template, tmp_path):
    settings = written(tmp_path, template, log="json")
    result = call("server", "run", settings, "--run", "first").expect(1)
    events = [json.loads(line) for line in result.out.splitlines()]
    (seen,) = [event for event in events if event["event"] == "waiting"]
    assert (seen["run"], seen["seconds"]) == ("first", 0.0)


def test_status_in_words(coordinator):
    call("server", "status", coordinator).expect(2).says("no run was started here", "hansa server run")
    a_status(coordinator, phase="training")
    result = call("server", "status", coordinator).expect(0)
    result.says("run r1 of heart", "round 2 of 3", "training", "2026-11-22 01:00 UTC, 10.0.0.5:4", "TLSv1.3", "auc 0.9")
    # What a peer says is shown as it is.
    result.says("hungary refused: not approved: [bold]waits\ufffd[31m for approval")


def test_status_of_a_dead_process(coordinator):
    done = subprocess.Popen(["true"])
    done.wait()
    a_status(coordinator, phase="training", pid=done.pid)
    call("server", "status", coordinator).expect(1).says(f"the process {done.pid} is gone", "--resume")
    told = call("server", "status", coordinator, "--format", "json").expect(1).json()
    assert told["gone"] is True
    assert told["partners"]["hungary"]["refused"]["reason"] == "not approved"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--run", "NO GOOD"), 2, "not a name"),
        (("--resume",), 2, "nothing to resume"),
        (("--resume", "--run", "x", "extra"), 2, "unexpected extra argument"),
    ],
)
def test_bad_usage(coordinator, arguments, code, said):
    call("server", "run", coordinator, *arguments).expect(code).says(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"revoked": "nowhere.crl"}, "no such revocation list"),
        ({"charter": "nowhere.json"}, "No such file"),
        ({"home": "nowhere"}, "no identity here"),
        ({"listen": "nowhere.invalid:1"}, "nowhere.invalid:1"),
        ({"port": 8440}, "port: unknown key"),
    ],
)
def test_bad_settings(template, tmp_path, changes, said):
    call("server", "run", written(tmp_path, template, **changes)).expect(2).says(said)


def test_a_second_server_is_refused(coordinator, template):
    first = start(written(coordinator.parent, template, wait_for_nodes_s=60))
    try:
        waiting(coordinator)
        call("server", "run", coordinator).expect(2).says("another process is writing this ledger")
    finally:
        first.kill()
        first.communicate()
    assert read_status(coordinator.parent / "state" / "status.json")["gone"] is True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly_and_the_run_keeps_its_name(coordinator, template, number):
    server = start(written(coordinator.parent, template, wait_for_nodes_s=60))
    try:
        run = waiting(coordinator)["run"]
        server.send_signal(number)
        _, err = server.communicate(timeout=20)
    finally:
        server.kill()
    assert server.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    found = read_status(coordinator.parent / "state" / "status.json")
    assert (found["phase"], found["gone"]) == ("stopped", False)
    written(coordinator.parent, template)
    call("server", "run", coordinator, "--resume").expect(1)
    assert read_status(coordinator.parent / "state" / "status.json")["run"] == run


def test_export_before_any_run(coordinator):
    call("server", "export", coordinator, "--out", coordinator.parent / "bundle").expect(2)
    assert not (coordinator.parent / "bundle").exists()


def start(settings: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*script(), "server", "run", str(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(PYTHONPATH=os.environ.get("PYTHONPATH", "")),
        cwd=settings.parent,
    )


def waiting(settings: Path) -> dict[str, Any]:
    """The status, once the server waits for its partners."""
    path = settings.parent / "state" / "status.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and (found := read_status(path))["phase"] == "waiting for partners":
            return found
        time.sleep(0.05)
    raise AssertionError("it never waited")
