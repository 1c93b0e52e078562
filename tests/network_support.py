"""A network of `LocalNetwork` whose processes are forked off a server that has imported everything.

So a killed and restarted process costs what it does and not what it imports; each is a process of its own all the same, with
its own locks, files, threads and connections. Run as a script this file is that server. Where a fault happens is said to a
process in HANSA_FAULT (e2e/faulty/sitecustomize.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e_support import environment, federation, write
from hansa.simulations.network import COORDINATOR, QUIET, LocalNetwork

HERE = Path(__file__).resolve().parent


class Zygote:
    """A process that has imported Hansa and forks commands off itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(PYTHONPATH=str(HERE), **QUIET),
        )

    def start(self, arguments: tuple[str, ...], folder: Path, log: Path, env: Mapping[str, str]) -> Forked:
        return Forked(self, self.ask({"argv": arguments, "folder": str(folder), "log": str(log), "env": dict(env)}))

    def ask(self, order: dict[str, Any]) -> Any:
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@dataclass
class Forked:
    """A child of the zygote, to be used like a Popen."""

    _zygote: Zygote
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (3600 if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() >= until:
                raise subprocess.TimeoutExpired("hansa", timeout or 0)
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Network(LocalNetwork):
    """A LocalNetwork of forked processes; one that needs an environment of its own from its first breath is executed."""

    def __init__(self, zygote: Zygote, config: Path, out: Path, server: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, out, server=server)
        self._zygote = zygote
        self.executed: set[str] = set()

    def process(self, name: str) -> Any:
        return self._processes[name]

    def copy(self, template: Path) -> None:
        """What `set_up` made in another folder, at this one's own address."""
        for name in (*self.partners, COORDINATOR):
            shutil.copytree(template / name, self.folder(name), dirs_exist_ok=True)
        self._write_settings()

    def _start(self, name: str, arguments: tuple[str, ...], env: Mapping[str, str] | None) -> Any:
        if self.runs(name) or name in self.executed or "LD_PRELOAD" in (env or {}):
            made: Any = super()._start(name, arguments, environment(**(env or {})))
        else:
            log = self.out / "logs" / f"{name}.log"
            made = self._zygote.start(arguments, self.folder(name), log, env or {})
            self._processes[name] = made
        write(self.pid_file(name), str(made.pid))
        return made

    def pid_file(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.pid"

    def _quietly(self, name: str, arguments: tuple[str, ...]) -> str:
        handle, log = tempfile.mkstemp(dir=self.out / "logs")
        os.close(handle)
        code = self._zygote.start(arguments, self.folder(name), Path(log), {}).wait(120)
        told = Path(log).read_text(encoding="utf-8")
        os.unlink(log)
        assert code == 0, f"{name}$ hansa {' '.join(arguments)}: {code}\n{told}"
        return told.rstrip("\n")


# -- the fork server -----------------------------------------------------------------------------------------------------


def serve() -> None:
    from hansa.clients import link
    from hansa.common.cli import run
    from hansa.server import link as _  # noqa: F401  imported for its children

    link.LONGEST_PAUSE_S = (
        1.0  # between two attempts to connect: a coordinator that is killed all the time is soon found again
    )

    with tempfile.TemporaryDirectory() as folder:  # first calls that every child would have to make
        config = write(Path(folder) / "c.yaml", federation(rounds=1))
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            assert run(["simulate", str(config), "--out", str(Path(folder) / "out")]) == 0
    assert threading.active_count() == 1
    children: set[int] = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            children.discard(pid)
            tell(os.waitstatus_to_exitcode(status) if pid else None)
            continue
        child = os.fork()
        if child == 0:
            be(order, run)
        children.add(child)
        tell(child)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def tell(answer: int | None) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def be(order: dict[str, Any], run: Callable[[list[str]], int]) -> None:
    """A child: one command, from its working folder to its exit code."""
    code = 70
    try:
        os.setsid()
        os.chdir(order["folder"])
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number, handle in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(handle, number)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.environ.update(order["env"])
        runpy.run_path(str(HERE / "e2e" / "faulty" / "sitecustomize.py"))
        code = run(order["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
