"""A log that cannot say what it must not say."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from hansa.common.errors import DataError
from hansa.common.events import FIELDS, EventLog
from hansa.common.ledger import read_ledger

CANARY = "137.25"


def made(form: Any = "json") -> tuple[EventLog, io.StringIO]:
    stream = io.StringIO()
    return EventLog(form, stream), stream


def test_one_json_line_an_event() -> None:
    log, stream = made()
    log.log("refused", partner="ada", round=3, seconds=0.5, reason="budget")
    log.log("stopped")
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert first.pop("time").endswith("Z")
    assert first == {"event": "refused", "partner": "ada", "round": 3, "seconds": 0.5, "reason": "budget"}
    assert set(second) == {"time", "event"}


def test_one_readable_line_an_event() -> None:
    log, stream = made("text")
    log.log("refused", partner="ada", reason="not approved")
    assert stream.getvalue().rstrip("\n").split(" ", 1)[1] == 'refused partner="ada" reason="not approved"'


@pytest.mark.parametrize("field", ["path", "rows", "n", "loss", "message", "detail"])
def test_other_fields_are_a_mistake_in_the_program(field: str) -> None:
    log, stream = made()
    with pytest.raises(ValueError, match=f"no event has a field {field}"):
        log.log("refused", **{field: 1})
    assert stream.getvalue() == ""
    assert field not in FIELDS


@pytest.mark.parametrize("value", [None, b"x", [1], Path("/data/heart.csv"), DataError("x")])
def test_other_values_are_a_mistake_in_the_program(value: Any) -> None:
    log, _ = made()
    with pytest.raises(ValueError, match="neither text nor a number"):
        log.log("refused", reason=value)


def test_an_event_is_named_by_fixed_words() -> None:
    log, _ = made()
    for name in ("", "Refused", f"age {CANARY}", "a\nb"):
        with pytest.raises(ValueError, match="fixed words"):
            log.log(name)


@pytest.mark.parametrize("form", ["json", "text"])
def test_what_a_peer_chose_cannot_forge_a_line_or_steer_a_terminal(form: Any) -> None:
    log, stream = made(form)
    log.log("refused", run='x\n{"event": "forged"}\u2028\x1b[2J\u202e', reason="y" * 10_000)
    written = stream.getvalue()
    assert written.count("\n") == 1
    assert not {"\u2028", "\x1b", "\u202e"} & set(written)
    assert "u001b" not in written
    assert len(written) < 700


def test_an_exception_is_its_class_and_place_never_its_message(tmp_path: Path) -> None:
    log, stream = made()
    try:
        read_ledger(tmp_path / CANARY)
    except Exception as err:
        log.failed("failed", err, round=1)
    event = json.loads(stream.getvalue())
    assert event["error"] == "LedgerError"
    assert event["where"].startswith("hansa.common.ledger:")
    assert CANARY not in stream.getvalue()


def test_a_stream_that_cannot_be_written_does_not_stop_the_process() -> None:
    log, stream = made()
    stream.close()
    log.log("stopped")

    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

    EventLog("text", Full()).log("stopped")


def test_threads_do_not_mix_lines() -> None:
    log, stream = made()
    threads = [threading.Thread(target=lambda: [log.log("ping", round=i) for i in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in stream.getvalue().splitlines()]) == 400


def test_what_libraries_say_has_no_words() -> None:
    """In a process of its own: it takes away the handlers of the whole process."""
    code = f"""
import logging, sys, threading, warnings
other = logging.getLogger("other")
other.addHandler(logging.StreamHandler(sys.stderr))
other.propagate = False
from hansa.common.events import EventLog
EventLog("json", sys.stdout).capture()
other.error("a row with %s", "{CANARY}")
logging.getLogger("hansa.node").error("%s: %s", "ada", ValueError("{CANARY}"))
logging.getLogger("hansa.node").error("%s: %s", "{CANARY}", "ValueError at training.py:7")
warnings.warn("a column of {CANARY}")
try:
    int("{CANARY}")
except ValueError:
    logging.exception("reading {CANARY}")
thread = threading.Thread(target=lambda: int("{CANARY}"))
thread.start()
thread.join()
raise RuntimeError("{CANARY}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["event"] for e in events] == ["library"] * 5 + ["thread died", "process died"]
    assert [e.get("error") for e in events] == [
        None,
        "ValueError",
        None,
        None,
        "ValueError",
        "ValueError",
        "RuntimeError",
    ]
    assert CANARY not in done.stdout
    assert events[0]["where"].startswith("other:")
    assert events[2]["where"] == "ValueError at training.py:7"  # what our own app says of a failure is kept


def test_the_test_above_would_see_words() -> None:
    assert logging.root.handlers, "pytest's own: nothing here called capture() in this process"
