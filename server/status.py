"""state/status.json: what a coordinator's process is doing, for `hansa server status` and the screen.

It is rewritten whole at every event and every two seconds, so an old one means that the process is gone. Nothing is decided
by it: what counts stands in the ledger.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from ..common.errors import OutputError

EVERY_S = 2.0
GONE_S = 10.0
"""A process that is alive has written its status since."""
WAITING, CLOSING = "waiting for partners", "closing"
_DOING = {"open": "opening", "train": "training", "agree": "summing", "reveal": "summing", "evaluate": "evaluating"}
OVER = ("completed", "refused", "failed", "stopped")


class Status:
    """A run's state as it changes; use as a context manager, which keeps the file.

    Args:
        about: what does not change: run, charter, rounds, address.
        connected: who is connected now, asked for at every writing.
    """

    def __init__(
        self,
        path: Path,
        about: Mapping[str, Any],
        partners: list[str],
        connected: Callable[[], Mapping[str, Mapping[str, Any]]],
    ) -> None:
        self._path = path
        self._connected = connected
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="hansa-status", daemon=True)
        self._state: dict[str, Any] = {
            **about,
            "pid": os.getpid(),
            "started": _now(),
            "phase": "starting",
            "why": "",
            "round": 0,
            "metrics": {},
            "partners": {
                name: {"answer": None, "refused": None, "undelivered": None, "contradiction": None} for name in partners
            },
        }

    def notify(self, event: str, **facts: Any) -> None:
        """One event of a run, as `rounds.Coordinator` tells it."""
        with self._lock:
            state = self._state
            match event:
                case "round":
                    state.update(round=facts["round"], phase="training")
                case "answer":
                    answer = facts["answer"]
                    state["phase"] = _DOING.get(facts["kind"], CLOSING)
                    state["partners"][facts["partner"]]["answer"] = {
                        "kind": facts["kind"],
                        "round": facts["round"],
                        "outcome": answer.outcome,
                        "detail": answer.detail,
                        "time": _now(),
                    }
                case "refused":
                    no = facts["refusal"]
                    state["partners"][no.partner]["refused"] = {
                        "round": no.round,
                        "reason": no.reason,
                        "detail": no.detail,
                    }
                case "undelivered":
                    answer = facts["answer"]
                    state["partners"][facts["partner"]]["undelivered"] = answer.detail or answer.outcome
                case "contradiction" if facts["partner"] in state["partners"]:
                    state["partners"][facts["partner"]]["contradiction"] = facts["length"]
                case "done":
                    state["metrics"] = dict(facts["metrics"]) or state["metrics"]
        self._changed.set()

    def phase(self, phase: str, why: str = "") -> None:
        """What it does now; when it failed, also why."""
        with self._lock:
            self._state.update(phase=phase, why=why)
        self._changed.set()

    def about(self, **facts: Any) -> None:
        """Something that is known only now, such as the port that was free."""
        with self._lock:
            self._state.update(facts)
        self._changed.set()

    def snapshot(self) -> dict[str, Any]:
        """The state now, as status.json has it."""
        connected = self._connected()
        with self._lock:
            found: dict[str, Any] = json.loads(json.dumps(self._state))  # a copy that nobody changes
        for name, partner in found["partners"].items():
            partner["connected"] = dict(connected[name]) if name in connected else None
        return {**found, "updated": _now()}

    def __enter__(self) -> Status:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and self._state["phase"] not in OVER:
            told = "a fault in Hansa" if isinstance(error, Exception) else "stopped by a signal"
            self.phase("failed" if isinstance(error, Exception) else "stopped", getattr(error, "message", told))
        self._ended.set()
        self._changed.set()
        self._thread.join()
        self._write()

    def _keep(self) -> None:
        while not self._ended.is_set():
            self._changed.wait(EVERY_S)
            self._changed.clear()
            self._write()

    def _write(self) -> None:
        """Replace the file. Not fsynced: after a power cut nobody asks it. A full disk must not end a run either."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._path.with_name(".status.json.new")
            fresh.write_text(json.dumps(self.snapshot(), indent=1), encoding="utf-8")
            os.replace(fresh, self._path)


def read_status(path: Path) -> dict[str, Any]:
    """The status that a process left at `path`, with `gone`: it did not end its run and does not live any more.

    Raises:
        OutputError: there is none, or it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        age_s = (datetime.now(UTC) - datetime.fromisoformat(found["updated"])).total_seconds()
        over = found["phase"] in OVER
        return {**found, "gone": not over and (age_s > GONE_S or not _alive(found["pid"]))}
    except FileNotFoundError as err:
        raise OutputError(f"{path}: no run was started here", "Start one: hansa server run server.yaml") from err
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise OutputError(f"{path}: not a status that can be read: {err}", "The next run writes it again.") from err


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
