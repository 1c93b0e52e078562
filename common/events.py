"""What a process tells its operator: one line an event, in a closed set of words.

Logs are copied, shipped and kept by people who may not see the data. So no record value, real size or data path, ever: an
event has a fixed name and fields out of `FIELDS`, none of which is about records; an exception is its class and the place
in the code, never its message, which may quote a cell. What libraries say goes the same way (`EventLog.capture`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import threading
import unicodedata
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, TextIO

__all__ = ["FIELDS", "EventLog"]

FIELDS = frozenset(
    {
        "address", "attempt", "bytes", "charter", "coordinator", "epsilon", "error", "federation", "kind", "partner",
        "purpose", "reason", "request", "round", "run", "seconds", "state", "version", "where",
    }
)  # fmt: skip
"""Every field that an event may have. `bytes` is of messages, `epsilon` of what filters count."""
_EVENT = re.compile(r"[a-z][a-z0-9]*([ -][a-z0-9]+)*")
_LONGEST = 300  # characters of a value: peers choose some of them
_CODE = ("hansa.", "torch.")


class EventLog:
    """Writes events to a stream; any thread may.

    Args:
        form: "json", one JSON object a line with time (UTC), event and fields; or "text", one readable line.
    """

    def __init__(self, form: Literal["json", "text"], stream: TextIO) -> None:
        self._form = form
        self._stream = stream
        self._lock = threading.Lock()

    def log(self, event: str, **fields: str | int | float) -> None:
        """Write one event. A stream that cannot be written is no reason to stop: the record is the ledger.

        Raises:
            ValueError: an event name or a field that is not allowed: a mistake in the program, for its tests to find.
        """
        if not _EVENT.fullmatch(event):
            raise ValueError(f"an event is named by fixed words, not {event!r}")
        if unknown := sorted(set(fields) - FIELDS):
            raise ValueError(f"no event has a field {', '.join(unknown)}; see FIELDS in common/events.py")
        if odd := [name for name, value in fields.items() if not isinstance(value, str | int | float)]:
            raise ValueError(f"the field {odd[0]} is neither text nor a number")
        plain = {name: _clean(value) if isinstance(value, str) else value for name, value in fields.items()}
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        if self._form == "json":
            line = json.dumps({"time": time, "event": event, **plain})
        else:
            line = " ".join([time, event, *(f"{name}={json.dumps(value)}" for name, value in plain.items())])
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._stream.write(line + "\n")
            self._stream.flush()

    def failed(self, event: str, err: BaseException, **fields: str | int | float) -> None:
        """Write one event about an exception: its class and where in our code or torch's it was raised."""
        self.log(event, error=type(err).__name__, where=_place(err.__traceback__), **fields)

    def capture(self) -> None:
        """Let everything that libraries of this process log, warn of or die of become events, without their words.

        For a daemon, once, after its imports: handlers that libraries installed are taken away.
        """
        handler = _Wordless(self)
        for logger in (logging.getLogger(name) for name in list(logging.root.manager.loggerDict)):
            logger.handlers.clear()
            logger.propagate = True
        logging.root.handlers[:] = [handler]
        logging.root.setLevel(logging.WARNING)
        logging.captureWarnings(True)

        def died(args: threading.ExceptHookArgs) -> None:
            if args.exc_value is not None:
                self.failed("thread died", args.exc_value)

        threading.excepthook = died
        sys.excepthook = lambda _, err, __: self.failed("process died", err)


class _Wordless(logging.Handler):
    """A log record as an event: who logged it and where, and the exception that it is about, if any."""

    def __init__(self, log: EventLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write it."""
        about = [record.exc_info[1]] if record.exc_info else list(record.args) if isinstance(record.args, tuple) else []
        err = next((item for item in about if isinstance(item, BaseException)), None)
        place = {"kind": record.levelname.lower(), "where": f"{record.name}:{record.lineno}"}
        if err is not None:
            place |= {"error": type(err).__name__, "where": _place(err.__traceback__) or place["where"]}
        elif record.name == "hansa.node" and about:
            # Ours: class and places of an exception, without its words (clients/app.py).
            place["where"] = str(about[-1])
        self._log.log("library", **place)


def _place(traceback: TracebackType | None) -> str:
    """`module:line` of the innermost frame in our code or torch's; empty when there is none."""
    found = ""
    while traceback is not None:
        module = str(traceback.tb_frame.f_globals.get("__name__", ""))
        if module.startswith(_CODE):
            found = f"{module}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found


def _clean(text: str) -> str:
    """Without what could break a line, steer a terminal or hide: peers choose some of it."""
    shown = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
