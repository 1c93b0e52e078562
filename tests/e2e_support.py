"""What the end-to-end tests share: commands in this process, real processes, and processes that die where they are told to.

Run as a script this file is a *fork server*: it imports Hansa with torch once and then forks one child a command, so that
fifty killed runs do not cost fifty imports. Each child is a real process with its own locks and open files, and a `Fault`
says where it dies.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
HOSPITALS = ("cleveland", "hungary", "switzerland", "va-long-beach")
DATA = REPO / "simulations" / "data" / "heart-disease"
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    def json(self) -> Any:
        return json.loads(self.out)

    def expect(self, code: int) -> Result:
        """This result, if it has that exit code and shows no traceback."""
        assert self.code == code, f"exit code {self.code}, wanted {code}\n{self.text}"
        assert "Traceback (most recent call last)" not in self.text, self.text
        assert "a fault in Hansa" not in self.text, self.text
        return self

    def says(self, *words: str) -> Result:
        """This result, if its text (line breaks aside) holds all of these."""
        flat = " ".join(self.text.split())
        for word in words:
            assert word in flat, f"{word!r} is not in:\n{self.text}"
        return self


def call(*arguments: object, stdin: str = "") -> Result:
    """One command line in this process."""
    from hansa.common.cli import run

    out, err, keyboard = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run([str(a) for a in arguments])
    finally:
        sys.stdin = keyboard
    return Result(code, out.getvalue(), err.getvalue())


def process(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Result:
    """One command line in a process of its own, as a user starts it."""
    done = subprocess.run(
        [*script(), *map(str, arguments)],
        cwd=cwd,
        env=environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def script() -> list[str]:
    """The `hansa` command of this environment, or its equal where the package is only on the path."""
    found = Path(sys.executable).with_name("hansa")
    return [str(found)] if found.exists() else [sys.executable, "-c", "from hansa.common.start import main; main()"]


def environment(**more: str) -> dict[str, str]:
    path = [more.pop("PYTHONPATH", ""), str(REPO / ".dev"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(p for p in path if p), **more}


# -- configurations and data -----------------------------------------------------------------------------------------


def federation(
    *,
    rounds: int = 3,
    privacy: str | None = "{kind: local, epsilon: 1.0, delta: 1.0e-4, clip_norm: 1.0}",
    evaluation: str = "{kind: public, test_fraction: 0.2}",
    strategy: str = "{name: fedavg}",
    rate: float = 1.0,
    steps: int = 2,
    data: dict[str, tuple[str, int]] | None = None,
    more: str = "",
    who: str | None = None,
) -> str:
    """A small heart-disease federation as YAML. `data`: partner -> (file, declared records)."""
    parts = data or {
        n: (f"package:heart-disease/{n}.csv", d) for n, d in zip(HOSPITALS, (240, 235, 100, 160), strict=True)
    }
    if who is None:
        rows = [
            f'  {name}: {{data: "{file}", declared_records: {declared}}}' for name, (file, declared) in parts.items()
        ]
        who = "\n".join(["task: heart-disease", "partners:", *rows])
    return f"""\
name: small
{who}
algorithm:
  strategy: {strategy}
  rounds: {rounds}
  local: {{steps: {steps}, sampling_rate: {rate}, optimizer: {{name: sgd, lr: 0.2}}}}
privacy: {privacy or "{kind: none}"}
evaluation: {evaluation}
quorum: 2
seed: 3
{more}"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


# -- what stands on the disk -----------------------------------------------------------------------------------------


def ledgers(bundle: Path) -> dict[str, Path]:
    """Owner -> ledger file, of those that exist."""
    found = {p.parent.name: p for p in sorted(bundle.glob("partners/*/ledger.jsonl"))}
    own = bundle / "coordinator" / "ledger.jsonl"
    return {**found, **({"coordinator": own} if own.exists() else {})}


def whole_lines(path: Path) -> list[bytes]:
    """Acknowledged lines: what stands after the last line break is torn and was never acknowledged."""
    return path.read_bytes().split(b"\n")[:-1]


def entries(path: Path) -> list[dict[str, Any]]:
    """Bodies of a ledger's whole lines that are disclosed, read without the package's own reader."""
    return [line["body"] for line in map(json.loads, whole_lines(path)) if "body" in line]


def of_type(path: Path, kind: str) -> list[dict[str, Any]]:
    return [e["data"] for e in entries(path) if e["type"] == kind]


def contents(data: bytes, depth: int = 3) -> Iterator[bytes]:
    """These bytes, and whatever stands in them as base64, and so on: envelopes hold payloads that hold base64."""
    yield data
    if depth:
        for match in re.finditer(rb"[A-Za-z0-9+/]{16,}={0,2}", data):
            with contextlib.suppress(ValueError):
                yield from contents(base64.b64decode(match[0], validate=True), depth - 1)


# -- faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Where a child dies.

    before, after: SIGKILL around fsync number `at` (from 1).
    torn: SIGKILL in the middle of ledger line number `at`, half of it written.
    full: from fsync number `at` on, the disk is full.
    delay: SIGKILL after `at` seconds.
    count: nothing happens; the file of every fsync is listed.
    """

    mode: str = "count"
    at: float = 0


@dataclass
class Forked:
    """A fork server: commands at the price of their own work."""

    _process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def run(self, *arguments: object, folder: Path, fault: Fault | None = None) -> Result:
        """Run one command line in a child; a negative code is the signal that ended it."""
        folder.mkdir(parents=True, exist_ok=True)
        order = {"argv": [str(a) for a in arguments], "folder": str(folder), "fault": asdict(fault) if fault else None}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        out, err = ((folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return Result(answer["code"], out, err)

    def syncs(self, *arguments: object, folder: Path) -> list[str]:
        """Run to the end; the file behind every fsync, in order."""
        self.run(*arguments, folder=folder, fault=Fault("count")).expect(0)
        return (folder / "syncs").read_text(encoding="utf-8").splitlines()

    def close(self) -> None:
        self._process.kill()  # it is waiting for an order: a slow, polite goodbye of torch's threads is not needed
        self._process.wait()


def _serve() -> None:
    """The fork server's loop. One thread (OMP_NUM_THREADS=1), so none is lost by a fork."""
    from hansa.common.cli import run

    with tempfile.TemporaryDirectory() as folder:  # imports and first calls that every child would have to make
        config = write(Path(folder) / "c.yaml", federation(rounds=1))
        with contextlib.redirect_stdout(io.StringIO()):
            assert run(["simulate", str(config), "--out", str(Path(folder) / "out")]) == 0
    assert threading.active_count() == 1
    for line in sys.stdin:
        order = json.loads(line)
        folder = Path(order["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.chdir(folder)
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            fault = Fault(**order["fault"]) if order["fault"] else Fault("none")
            _arm(fault, folder)
            code = 70
            try:
                code = run(order["argv"])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        fault = order["fault"] or {}
        if fault.get("mode") == "delay":
            time.sleep(fault["at"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        sys.__stdout__.write(json.dumps({"code": os.waitstatus_to_exitcode(status)}) + "\n")
        sys.__stdout__.flush()


def _arm(fault: Fault, folder: Path) -> None:
    """Make this process meet its fault."""
    from hansa.common import ledger

    fsync, seen = os.fsync, 0

    def counted(handle: int) -> None:
        nonlocal seen
        seen += 1
        if fault.mode == "count":
            with open(folder / "syncs", "a", encoding="utf-8") as log:
                log.write(os.readlink(f"/proc/self/fd/{handle}") + "\n")
        if fault.mode == "full" and seen >= fault.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fault.mode == "before" and seen == fault.at:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)
        if fault.mode == "after" and seen == fault.at:
            os.kill(os.getpid(), signal.SIGKILL)

    class Torn(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal seen
            seen += 1
            if seen < fault.at:
                return super().write(data)
            super().write(bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    if fault.mode in ("count", "before", "after", "full"):
        os.fsync = counted
    if fault.mode == "torn":
        ledger.open = lambda path, mode, buffering: Torn(path, mode.replace("b", ""))  # type: ignore[attr-defined]


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of that size, mounted at `folder`. Raises OSError where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "hansa-test", str(folder)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        raise OSError(made.stderr.decode())
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize_disk(folder: Path, kilobytes: int) -> None:
    """Give a small disk another size."""
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(folder)], check=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its `common` would be found where nothing else is
    _serve()
