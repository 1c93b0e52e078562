"""status.json: what happened is in it, a dead process is seen, and nothing that fails here ends a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest

from hansa.common.errors import OutputError, RunFailed
from hansa.server.records import Answer
from hansa.server.rounds import Refusing
from hansa.server.status import GONE_S, Status, read_status

ABOUT = {"run": "r1", "charter": "test", "charter_sha256": "0" * 64, "rounds": 3, "quorum": 2, "address": "127.0.0.1:1"}
LINK = {"since": "2026-11-22T01:00:00+00:00", "address": "127.0.0.1:5", "version": "hansa 0.1.0", "tls": "TLSv1.3"}


def status(path, connected=None) -> Status:
    return Status(path, ABOUT, ["ada", "ben"], lambda: connected if connected is not None else {})


def test_events_are_in_the_file_soon_after(tmp_path):
    path = tmp_path / "state" / "status.json"
    with status(path, {"ada": LINK}) as kept:
        kept.notify("round", round=2)
        kept.notify("answer", partner="ada", round=2, kind="train", answer=Answer("id", "ok", "0" * 64))
        no = Refusing("ben", "r1", None, "not approved", "waits for approval")
        kept.notify("refused", refusal=no)
        kept.notify("contradiction", partner="ben", length=7)
        kept.notify("contradiction", partner="coordinator", length=7)  # its own: on the screen and in the log
        kept.notify("undelivered", partner="ben", answer=Answer("id", "timeout"))
        kept.notify("done", round=2, metrics={"auc": 0.5}, seconds=1.0)
        deadline = time.monotonic() + 1.5  # less than EVERY_S: the events wake it
        while read_status(path)["metrics"] == {} and time.monotonic() < deadline:
            time.sleep(0.01)
        found = read_status(path)
        assert (found["round"], found["phase"], found["metrics"]) == (2, "training", {"auc": 0.5})
        assert found["pid"] == os.getpid()
        assert found["gone"] is False
        assert found["partners"]["ada"]["connected"] == LINK
        assert found["partners"]["ada"]["answer"]["outcome"] == "ok"
        assert found["partners"]["ben"]["connected"] is None
        assert found["partners"]["ben"]["refused"] == {"round": None, "reason": "not approved", "detail": no.detail}
        assert found["partners"]["ben"]["undelivered"] == "timeout"
        assert found["partners"]["ben"]["contradiction"] == 7
        kept.phase("completed")
    assert read_status(path)["phase"] == "completed"


def test_an_evaluation_keeps_its_metrics_when_a_round_has_none(tmp_path):
    kept = status(tmp_path / "s.json")
    kept.notify("done", round=1, metrics={"auc": 0.5}, seconds=1.0)
    kept.notify("done", round=2, metrics={}, seconds=1.0)
    assert kept.snapshot()["metrics"] == {"auc": 0.5}


@pytest.mark.parametrize(
    ("error", "phase", "why"),
    [
        (RunFailed("no quorum", "mend it"), "failed", "no quorum"),
        (KeyboardInterrupt(), "stopped", "stopped by a signal"),
        (ZeroDivisionError("a value"), "failed", "a fault in Hansa"),
    ],
)
def test_how_it_ended(tmp_path, error, phase, why):
    path = tmp_path / "s.json"
    with pytest.raises(type(error)), status(path):
        raise error
    found = read_status(path)
    assert (found["phase"], found["why"], found["gone"]) == (phase, why, False)


def test_a_killed_process_is_gone(tmp_path):
    path = tmp_path / "s.json"
    with status(path):
        pass
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "phase": "training", "pid": done.pid}))
    assert read_status(path)["gone"] is True
    path.write_text(json.dumps({**found, "phase": "training", "pid": os.getpid()}))
    assert read_status(path)["gone"] is False
    old = datetime.now(UTC) - timedelta(seconds=GONE_S + 1)  # another process has this number now
    path.write_text(json.dumps({**found, "phase": "training", "pid": os.getpid(), "updated": old.isoformat()}))
    assert read_status(path)["gone"] is True
    path.write_text(json.dumps({**found, "phase": "completed", "pid": done.pid}))
    assert read_status(path)["gone"] is False


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"updated": 3}', '{"updated": "yesterday"}'])
def test_a_file_that_is_no_status(tmp_path, text):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(OutputError, match="not a status"):
        read_status(path)


def test_no_run_was_started(tmp_path):
    with pytest.raises(OutputError, match="no run was started"):
        read_status(tmp_path / "s.json")


def test_a_status_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "state").write_text("a file where the folder should be")
    with status(tmp_path / "state" / "status.json") as kept:
        kept.notify("round", round=1)
        kept.phase("completed")
