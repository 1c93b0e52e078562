"""A disk that stops, fails or loses power at a chosen operation, and what is on it after that.

The real files are in one folder (on tmpfs); what writes them is watched: fsync, fdatasync, pwrite, replace, ftruncate, unlink,
and each write to a file that `watched_open` opened. An operation can be stopped before, within or after it. What is on the
disk then is taken at that instant, so that whatever a dying process still does to the folder while exceptions unwind
is never seen.

  kill     all that was written is there: the kernel lives on
  power    what was not flushed may be there, or not, or in part. Of a file: its bytes at its last fsync, those that were there
           last, or a part of the difference, also as zeros. Of a name in a folder (also of a new folder): as it was when the folder was last
           flushed, or as it was last; each name by itself, which is harsher than any journal
  error    the process lives on, with an OSError
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Image = dict[str, bytes | None]
"""Path under the folder -> bytes; None for a folder."""


class Crash(BaseException):
    """The process is gone; nothing in Hansa catches it."""


@dataclass
class Trap:
    """Where the next fault is.

    Attributes:
        at: the how-manieth operation from now on, from 1.
        kind: kill, power or error.
        when: before, within or after the operation.
    """

    at: int
    kind: str
    when: str


@dataclass
class Disk:
    """One folder. `lies`: flushing does nothing (for a control)."""

    root: Path
    rng: random.Random
    lies: bool = False
    trap: Trap | None = None
    image: Image | None = None
    crashes: dict[str, int] = field(default_factory=dict)
    _prefix: str = ""
    _synced: dict[int, bytes] = field(default_factory=dict)
    _names: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._prefix = str(self.root.resolve())
        self.settle()

    # -- what is on it -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """All that is there now is safe."""
        self._synced.clear()
        self._names.clear()
        for place, folders, files in os.walk(self._prefix):
            self._names[place] = _listing(place)
            for name in files:
                path = f"{place}/{name}"
                self._synced[os.stat(path).st_ino] = _read(path)
            del folders

    def live(self) -> Image:
        """Everything as it is."""
        made: Image = {}
        for place, folders, files in os.walk(self._prefix):
            inside = place[len(self._prefix) + 1 :]
            start = inside + "/" if inside else ""
            for name in folders:
                made[start + name] = None
            for name in files:
                made[start + name] = _read(f"{place}/{name}")
        return made

    def put(self, image: Image) -> None:
        """Make the folder exactly this; all of it is safe."""
        for name in os.listdir(self._prefix):
            path = f"{self._prefix}/{name}"
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                _UNLINK(path)
        for name, data in sorted(image.items()):
            path = f"{self._prefix}/{name}"
            if data is None:
                os.makedirs(path, exist_ok=True)
                continue
            os.makedirs(os.path.dirname(path), exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
        self.settle()

    def after_power_loss(self) -> Image:
        """What may be there when power comes back."""
        made: Image = {}
        alive = {}
        for place, _, files in os.walk(self._prefix):
            for name in files:
                alive[os.stat(f"{place}/{name}").st_ino] = f"{place}/{name}"
        newest = self.rng.choice((0.0, 0.0, 0.5, 1.0))  # how likely something that was not flushed is there

        def folder(place: str, inside: str) -> None:
            here = _listing(place) if os.path.isdir(place) else {}
            safe = self._names.get(place, {})
            for name in sorted({*here, *safe}):
                old, new = safe.get(name), here.get(name)
                kept = new if old == new or self.rng.random() < newest else old
                if kept is None:
                    continue
                path = f"{inside}/{name}" if inside else name
                if kept == _FOLDER:
                    made[path] = None
                    folder(f"{place}/{name}", path)
                else:
                    made[path] = self._bytes(kept, alive.get(kept), newest)

        folder(self._prefix, "")
        return made

    def _bytes(self, inode: int, path: str | None, newest: float) -> bytes:
        safe = self._synced.get(inode)
        if path is None:
            return safe or b""
        last = _read(path)
        if safe == last:
            return last
        old = safe or b""
        if self.rng.random() < newest:
            return last
        way = self.rng.choice(("old", "old", "torn", "zeros"))
        if way == "old":
            return old
        cut = self.rng.randrange(len(last) + 1) if last else 0
        if last.startswith(old):  # appended to: a part of it, or its length without its bytes
            tail = last[len(old) : max(cut, len(old))]
            return old + (tail if way == "torn" else tail.rstrip(b"\n").translate(_ZEROS))
        if way == "zeros":
            return old
        return last[:cut] + old[cut:] if len(last) >= len(old) else old[: max(cut, len(last))]

    # -- operations --------------------------------------------------------------------------------------------------

    def arm(self, at: int, kind: str, when: str) -> None:
        """The next fault."""
        self.trap = Trap(at, kind, when)

    def inside(self, path: str) -> bool:
        """Whether this is in the folder."""
        return path.startswith(self._prefix)

    def do(self, name: str, operation: Callable[[], Any], part: Callable[[], Any] | None = None) -> Any:
        """One operation, or the fault that waits for it."""
        trap = self.trap
        if trap is not None:
            trap.at -= 1
            if trap.at <= 0:
                self.trap = None
                self.crashes[f"{trap.kind} {trap.when} {name}"] = (
                    self.crashes.get(f"{trap.kind} {trap.when} {name}", 0) + 1
                )
                if trap.when == "after":
                    operation()
                elif trap.when == "within" and part is not None:
                    part()
                if trap.kind == "error":
                    raise OSError(self.rng.choice((errno.EIO, errno.ENOSPC)), "made to fail")
                self.image = self.live() if trap.kind == "kill" else self.after_power_loss()
                raise Crash
        return operation()

    def flushed(self, handle: int, path: str) -> None:
        """A file or a folder is safe."""
        if self.lies:
            return
        if os.path.isdir(path):
            self._names[path] = _listing(path)
        else:
            self._synced[os.fstat(handle).st_ino] = _read(f"/proc/self/fd/{handle}")


_FOLDER = -1
_ZEROS = bytes(256)
_UNLINK = os.unlink


def _listing(place: str) -> dict[str, int]:
    with os.scandir(place) as found:
        return {one.name: _FOLDER if one.is_dir(follow_symlinks=False) else one.inode() for one in found}


def _read(path: str) -> bytes:
    with io.FileIO(path) as file:
        return file.readall()


# -- watching ------------------------------------------------------------------------------------------------------------

_current: Disk | None = None


class _Watched(io.FileIO):
    """An unbuffered file, each write of which may be the last."""

    def write(self, data: Any) -> int:
        whole = bytes(data)
        disk, real = _current, super().write

        def operation() -> int:
            view = memoryview(whole)
            while view:
                view = view[real(view) :]
            return len(whole)

        if disk is None or not disk.inside(str(self.name)):
            return operation()
        return int(disk.do("write", operation, lambda: real(whole[: disk.rng.randrange(len(whole) + 1)])))


def watched_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    """For modules whose files are opened to be written without a buffer."""
    if kwargs.get("buffering") == 0 and "b" in mode:
        return _Watched(os.fspath(path), mode.replace("b", ""))
    return open(path, mode, *args, **kwargs)


@contextlib.contextmanager
def watching(modules: tuple[Any, ...]) -> Iterator[None]:
    """Watch what these modules, and `os`, do; `use` says for which disk."""
    real = {name: getattr(os, name) for name in ("fsync", "fdatasync", "pwrite", "replace", "ftruncate", "unlink")}

    def where(handle: int) -> str:
        return os.readlink(f"/proc/self/fd/{handle}")

    def flush(name: str) -> Callable[[Any], None]:
        def made(handle: Any) -> None:
            number = handle if isinstance(handle, int) else handle.fileno()
            disk = _current
            if disk is None or not disk.inside(path := where(number)):
                return  # nothing real needs to be flushed here, and this is a tmpfs
            disk.do(name, lambda: disk.flushed(number, path))

        return made

    def pwrite(handle: int, data: Any, at: int) -> int:
        disk = _current
        if disk is None or not disk.inside(where(handle)):
            return int(real["pwrite"](handle, data, at))
        return int(
            disk.do(
                "pwrite",
                lambda: real["pwrite"](handle, data, at),
                lambda: real["pwrite"](handle, data[: disk.rng.randrange(len(data) + 1)], at),
            )
        )

    def replace(source: Any, target: Any) -> None:
        disk = _current
        if disk is None or not disk.inside(os.path.abspath(target)):
            real["replace"](source, target)
            return
        disk.do("replace", lambda: real["replace"](source, target))

    def ftruncate(handle: int, size: int) -> None:
        disk = _current
        if disk is None or not disk.inside(where(handle)):
            real["ftruncate"](handle, size)
            return
        disk.do("ftruncate", lambda: real["ftruncate"](handle, size))

    def unlink(path: Any, *args: Any, **kwargs: Any) -> None:
        disk = _current
        if disk is None or kwargs.get("dir_fd") is not None or not disk.inside(os.path.abspath(path)):
            real["unlink"](path, *args, **kwargs)
            return
        disk.do("unlink", lambda: real["unlink"](path, *args, **kwargs))

    made = {
        "fsync": flush("fsync"),
        "fdatasync": flush("fdatasync"),
        "pwrite": pwrite,
        "replace": replace,
        "ftruncate": ftruncate,
        "unlink": unlink,
    }
    before = [(module, module.__dict__.get("open")) for module in modules]
    try:
        for name, function in made.items():
            setattr(os, name, function)
        for module in modules:
            module.open = watched_open
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        for module, was in before:
            if was is None:
                del module.open
            else:
                module.open = was


@contextlib.contextmanager
def use(disk: Disk) -> Iterator[Disk]:
    """Watch this disk."""
    global _current
    before, _current = _current, disk
    try:
        yield disk
    finally:
        _current = before
