"""Faults for one process: put this folder on its PYTHONPATH and say in HANSA_FAULT what goes wrong, and where.

    HANSA_FAULT      faults, separated by ";"
    HANSA_FAULT_LOG  a file: each fault writes itself down there, on the disk, before it happens

A fault is MODULE:PLACE:WHEN:NUMBER:ACTION, for instance

    hansa.clients.link:NodeLink._whole:before:2:kill
    hansa.clients.app:train_locally:before:1:sleep:20
    hansa.clients.outbox:write_whole:before:1+:enospc
    hansa.server.requests:Request.state=sent[self.node=1,self.message.metadata.message_type=train]:after:1:kill:/tmp/cleveland.pid

PLACE   a function or method by the name that its module has for it; or CLASS.ATTRIBUTE=VALUE, the moment at which an
        object's attribute becomes that value. In brackets: only calls whose arguments are so.
WHEN    before or after
NUMBER  the how manieth of these calls; 2+ is the second and all later ones
ACTION  kill           SIGKILL to this process
        kill:FILE      SIGKILL to the process whose id is in that file; goes on when it is dead
        sleep:SECONDS  take longer
        enospc         OSError, the disk is full

A place that does not exist ends the process at once, and loudly: a fault that never happens proves nothing.
"""

from __future__ import annotations

import atexit
import errno
import functools
import importlib.abc
import importlib.util
import inspect
import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

_FORM = re.compile(
    r"(?P<module>[\w.]+):(?P<place>[\w.]+)(?:=(?P<value>\w+))?(?:\[(?P<only>[^\]]*)\])?"
    r":(?P<when>before|after):(?P<number>\d+)(?P<on>\+?):(?P<action>kill|kill:/.+|sleep:[\d.]+|enospc)"
)
_MISSING = object()


@dataclass
class _Fault:
    text: str
    module: str
    place: str
    value: str | None
    only: dict[str, str]
    when: str
    number: int
    on: bool
    action: str
    seen: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def read(cls, text: str) -> _Fault:
        found = _FORM.fullmatch(text)
        if found is None:
            _die(f"{text!r} is not a fault")
        only = dict(part.split("=", 1) for part in (found["only"] or "").split(",") if part)
        parts = (found["module"], found["place"], found["value"], only, found["when"], int(found["number"]))
        return cls(text, *parts, bool(found["on"]), found["action"])

    def met(self, when: str, arguments: dict[str, Any]) -> None:
        """One call goes by."""
        if when != self.when or not all(str(_look(arguments, path)) == value for path, value in self.only.items()):
            return
        with self.lock:
            self.seen += 1
            if self.seen < self.number or (self.seen > self.number and not self.on):
                return
        if self.seen == self.number and "HANSA_FAULT_LOG" in os.environ:
            with open(os.environ["HANSA_FAULT_LOG"], "a", encoding="utf-8") as log:
                log.write(self.text + "\n")
                log.flush()
        word, _, rest = self.action.partition(":")
        match word:
            case "kill" if not rest:
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill":
                with open(rest, encoding="ascii") as file:
                    pid = int(file.read())
                if _dead(pid):
                    _die(f"{self.text}: is dead already")
                os.kill(pid, signal.SIGKILL)
                while not _dead(pid):
                    time.sleep(0.001)
            case "sleep":
                time.sleep(float(rest))
            case "enospc":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _look(arguments: dict[str, Any], path: str) -> Any:
    first, *names = path.split(".")
    found = arguments.get(first, _MISSING)
    for name in names:
        found = getattr(found, name, _MISSING)
    if found is _MISSING:
        _die(f"a call has no {path}")
    return found


def _dead(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _die(why: str) -> Any:
    """End this process: an exception might be caught by whoever imports."""
    os.write(2, f"HANSA_FAULT: {why}\n".encode())
    os._exit(86)


def _patch(module: Any, faults: list[_Fault]) -> None:
    """Put the faults of one module in their places."""
    for place, value in dict.fromkeys((fault.place, fault.value) for fault in faults):
        here = [fault for fault in faults if (fault.place, fault.value) == (place, value)]
        *holders, name = place.split(".")
        holder = module
        for part in holders:
            holder = getattr(holder, part, _MISSING)
        if value is not None:
            if not isinstance(holder, type) or name not in {
                n for c in holder.__mro__ for n in inspect.get_annotations(c)
            }:
                _die(f"{module.__name__} has no {'.'.join(holders)} with {name}")
            _watch(holder, name, value, here)
            continue
        real = inspect.getattr_static(holder, name, _MISSING)
        if not inspect.isfunction(real):
            _die(f"{module.__name__} has no function {place}")
        setattr(holder, name, _wrapped(real, here))


def _wrapped(real: Any, faults: list[_Fault]) -> Any:
    signature = inspect.signature(real)

    def met(when: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        for fault in faults:
            fault.met(when, bound.arguments)

    if inspect.iscoroutinefunction(real):

        @functools.wraps(real)
        async def later(*arguments: Any, **named: Any) -> Any:
            met("before", arguments, named)
            answer = await real(*arguments, **named)
            met("after", arguments, named)
            return answer

        return later

    @functools.wraps(real)
    def at_once(*arguments: Any, **named: Any) -> Any:
        met("before", arguments, named)
        answer = real(*arguments, **named)
        met("after", arguments, named)
        return answer

    return at_once


def _watch(cls: type, name: str, value: str, faults: list[_Fault]) -> None:
    real = cls.__setattr__

    def __setattr__(self: Any, key: str, new: Any) -> None:
        # What it was; a dataclass's default on the class is not yet a value of the object.
        change = key == name and str(new) == value and str(vars(self).get(name, _MISSING)) != value
        if change:
            for fault in faults:
                fault.met("before", {"self": self})
        real(self, key, new)
        if change:
            for fault in faults:
                fault.met("after", {"self": self})

    cls.__setattr__ = __setattr__  # type: ignore[assignment,method-assign]


class _Finder(importlib.abc.MetaPathFinder):
    """Patches a module right after it was executed."""

    def __init__(self, faults: dict[str, list[_Fault]]) -> None:
        self._faults = faults

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        faults = self._faults.pop(name, None)
        if faults is None:
            return None
        spec = importlib.util.find_spec(name)  # of the others: this one no longer knows the name
        if spec is None or spec.loader is None:
            _die(f"there is no module {name}")
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            _patch(module, faults)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def arm(text: str) -> None:
    """Put faults in their places: now in modules that are there, in others when they are imported."""
    later: dict[str, list[_Fault]] = {}
    for fault in [_Fault.read(part) for part in text.split(";") if part]:
        later.setdefault(fault.module, []).append(fault)
    for name in list(later):
        if name in sys.modules:
            _patch(sys.modules[name], later.pop(name))
    if later:
        sys.meta_path.insert(0, _Finder(later))
        atexit.register(lambda: later and _die(f"nobody imported {', '.join(later)}"))


arm(os.environ.get("HANSA_FAULT", ""))
