"""A federation on one machine as separate processes: one coordinator and a node a partner, over mutual TLS on loopback.

Every organisation has a folder of its own under OUT and works in it with the commands that it would really use; what one
sends to another is copied between folders. All that is not real is that the keys and the data are on one machine, and the
charter says so.

    OUT/coordinator/    identity, ca/, charter.json, server.yaml, state/
    OUT/NAME/           identity, train.csv, public.csv, charter.json, node.yaml, state/
    OUT/logs/           one file a process; commands.log has what every command said
    OUT/bundle/         what an auditor gets, when everyone has exported
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
import yaml
from torch import Tensor

from ..clients.datasets import Rows, split_rows
from ..common.config import load_config, without_system
from ..common.errors import ConfigError, OutputError, RunFailed
from ..common.identity import output_error, write_whole
from ..common.tasks import Task, load_task
from ..common.tasks.schema import TableSchema, read_table
from . import sources

COORDINATOR = "coordinator"
HANSA = (sys.executable, "-c", "from hansa.common.start import main; main()")
"""The `hansa` command of this environment, wherever its script is."""
QUIET = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", "no_proxy": "127.0.0.1"}
STOP_S = 10.0
"""So long a process may take to stop when it is asked to."""
_MARK = "network.json"


class LocalNetwork:
    """Organisations, their folders and their processes. Use as a context manager: at its end all processes are killed.

    `set_up` takes everybody from keys to a signed charter and registered data; then start a server and nodes, kill and
    restart them as you like, `stop`, and collect the `bundle`.

    Args:
        config: a federation with partners; its `privacy: none` is allowed by name at every site, whose owner wrote it.
        out: a new folder, or that of an earlier network, which is replaced.
        say: called with each line for the screen: every command before it runs.
        sites: partner -> settings of the section `site` of its node.yaml.
        server: settings of server.yaml.
        address: HOST:PORT of the server; left out, a free port of this machine.
        host: organisation -> what to put before its process's command, to run it on another (virtual) host.

    Raises (on creation):
        ConfigError: the configuration has no partners, or one whose folder would be ours.
        OutputError: `out` holds something else, or another network that runs.
    """

    def __init__(
        self,
        config: Path,
        out: Path,
        *,
        say: Callable[[str], None] = lambda _: None,
        sites: Mapping[str, Mapping[str, Any]] | None = None,
        server: Mapping[str, Any] | None = None,
        address: str | None = None,
        host: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.config = load_config(config)
        without_system(self.config, config)
        if self.config.partners is None:
            raise ConfigError(f"{config}: a population has no organisations", "Name partners, or use hansa simulate.")
        if taken := sorted({"logs", "bundle"} & set(self.config.partners)):
            raise ConfigError(f"{config}: a partner cannot be called {taken[0]} here", "Its folder is taken.")
        self.task: Task = load_task(self.config.task)
        self.partners = list(self.config.partners)
        self.out = out.absolute()
        self._source = config.absolute()
        self._say = say
        self._sites = dict(sites or {})
        self._server = dict(server or {})
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._mark = self._claim()
        self.address = address or f"127.0.0.1:{_free_port()}"
        self._host = dict(host or {})

    def __enter__(self) -> LocalNetwork:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for name in list(self._processes):
            self.kill(name)
        self._mark.close()

    def folder(self, name: str) -> Path:
        """Where an organisation works."""
        return self.out / name

    def log(self, name: str) -> str:
        """What a process wrote to its log so far, over all its starts."""
        path = self.out / "logs" / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    # -- from identity to charter ------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Identities, certificates, a charter that everyone signed, registered data, and the settings of every process.

        Raises:
            RunFailed: a command said no; with its words.
        """
        everyone = [COORDINATOR, *self.partners]
        self._say("# Everyone makes keys. The private ones never leave their folder.")
        self.commands((name, "identity", "new", "--name", name, "--home", ".") for name in everyone)
        self._say("# Partners send NAME.csr and NAME.pem to the coordinator, who compares fingerprints by phone.")
        for name in everyone:
            self._send(self.folder(name) / f"{name}.csr", COORDINATOR, f"requests/{name}.csr")
            self._send(self.folder(name) / f"{name}.pem", COORDINATOR, f"keys/{name}.pem")
        (self.folder(COORDINATOR) / "issued").mkdir(exist_ok=True)
        issue = [
            (COORDINATOR, "identity", "issue", f"requests/{n}.csr", "--ca", "ca", "--out", f"issued/{n}.crt", "--yes")
            for n in everyone
        ]
        self.commands(issue[:1])  # the first one makes the CA
        self.commands(issue[1:])
        self._say("# The certificates go back.")
        for name in everyone:
            self._send(self.folder(COORDINATOR) / "issued" / f"{name}.crt", name, f"{name}.crt")
        self.commands((name, "identity", "install", f"{name}.crt", "--home", ".") for name in everyone)
        self._agree(everyone)
        self._register()
        self._write_settings()

    def _agree(self, everyone: list[str]) -> None:
        self._send(self._source, COORDINATOR, "federation.yaml")
        self._say("# The coordinator drafts the charter; it goes round, and everyone reads and signs it.")
        new = ("charter", "new", "federation.yaml", "--keys", "keys", "--out", "charter.json", "--simulated")
        self._say(self.command(COORDINATOR, *new))
        at = COORDINATOR
        for name in [*self.partners, COORDINATOR]:
            if name != at:
                self._send(self.folder(at) / "charter.json", name, "charter.json")
            self.command(name, "charter", "sign", "charter.json", "--home", ".", "--yes")
            at = name
        for name in everyone:
            if name != COORDINATOR:
                self._send(self.folder(COORDINATOR) / "charter.json", name, "charter.json")

    def _register(self) -> None:
        """Every partner's rows as two files, which its own command checks and commits to."""
        assert self.config.partners is not None
        evaluation = self.config.evaluation
        fraction = evaluation.test_fraction if evaluation.kind != "none" else 0.0
        self._say(
            f"# Everyone registers its data: rows to train on, and rows held out ({fraction:.0%}, by their hash)."
        )
        commands = []
        for name, entry in self.config.partners.items():
            packaged = entry.data.startswith("package:")
            source = sources.packaged(entry.data) if packaged else self._source.parent / entry.data
            held_out = write_parts(source, self.folder(name), self.task, fraction, self.config.seed)
            command = [name, "node", "dataset", "add", "train.csv", "--task", self.config.task]
            if held_out:
                command.append("--allow-equal-rows")  # rows are held out by hash and place, whatever they equal
                command += ["--public" if evaluation.kind == "public" else "--held-out", "public.csv"]
            if entry.allow_single_class:
                command.append("--allow-single-class")
            commands.append((*command, "--yes"))
        self.commands(commands)

    def _write_settings(self) -> None:
        for name in self.partners:
            self.configure(name, **self._sites.get(name, {}))
        server = {"home": ".", "charter": "charter.json", "listen": self.address, "revoked": "ca/revoked.crl"}
        self._settings(self.folder(COORDINATOR) / "server.yaml", server | self._server)

    def configure(self, name: str, **site: Any) -> None:
        """Write a partner's node.yaml with these settings in its section `site`; its node heeds them when it starts."""
        # The configuration that asks for no privacy is written by the owner of all this simulated data.
        unprotected = {"allow_unprotected": True} if self.config.privacy.kind == "none" else {}
        node = {
            "home": ".",
            "state": "state",
            "simulated": True,
            "federations": [{"charter": "charter.json", "server": self.address}],
            "site": {"threads": 1, **unprotected, **site},
        }
        self._settings(self.folder(name) / "node.yaml", node)

    def _settings(self, path: Path, value: Mapping[str, Any]) -> None:
        text = yaml.safe_dump(dict(value), sort_keys=False)
        self._say(f"# {path.relative_to(self.out)}\n" + "".join(f"    {line}\n" for line in text.splitlines()).rstrip())
        write_whole(path, text.encode())

    # -- processes ---------------------------------------------------------------------------------------------------

    def start_server(
        self, run: str | None = None, *, resume: bool = False, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start the coordinator's server; it waits for the nodes, trains, and ends."""
        named = ("--run", run) if run is not None else ()
        return self._start(
            COORDINATOR, ("server", "run", "server.yaml", *named, *(("--resume",) if resume else ())), env
        )

    def start_node(self, name: str, *, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a partner's node; it runs until it is stopped."""
        return self._start(name, ("node", "run", "node.yaml"), env)

    def ready(self, timeout_s: float) -> None:
        """Until the server can be reached.

        Raises:
            RunFailed: it ended, or was not in time.
        """
        deadline = time.monotonic() + timeout_s
        pid = self._processes[COORDINATOR].pid
        while (status := self.status()) is None or status["pid"] != pid or status["phase"] == "starting":
            if not self.runs(COORDINATOR) or time.monotonic() >= deadline:
                raise self._no_server(f"the server was not ready within {timeout_s:g} s")
            time.sleep(0.05)

    def wait(self, timeout_s: float) -> int:
        """Until the server has ended; its exit code.

        Raises:
            RunFailed: it has not, in time.
        """
        try:
            return self._processes[COORDINATOR].wait(timeout_s)
        except subprocess.TimeoutExpired as err:
            raise self._no_server(f"the server still runs after {timeout_s:g} s") from err

    def _no_server(self, what: str) -> RunFailed:
        said = self.log(COORDINATOR)[-2000:]
        return RunFailed(f"{what}\n{said}", f"What every process said is in {self.out / 'logs'}.")

    def status(self) -> dict[str, Any] | None:
        """What the server's status.json says now; None when there is none yet."""
        path = self.folder(COORDINATOR) / "state" / "status.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def runs(self, name: str) -> bool:
        """Whether that process lives."""
        return name in self._processes and self._processes[name].poll() is None

    def kill(self, name: str) -> None:
        """SIGKILL, if it runs; returns when it is gone."""
        process = self._processes.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()

    def stop(self, *names: str) -> None:
        """Ask these processes, or all, to stop; who does not in time is killed."""
        asked = [name for name in names or tuple(self._processes) if name in self._processes]
        for name in asked:
            self._processes[name].terminate()
        deadline = time.monotonic() + STOP_S
        for name in asked:
            with suppress(subprocess.TimeoutExpired):
                self._processes[name].wait(max(0.0, deadline - time.monotonic()))
            self.kill(name)

    def models(self) -> dict[str, dict[str, Any]]:
        """The newest run's model at every partner that has it, as `hansa model show` tells it.

        Raises:
            RunFailed: a partner has none.
        """
        run = (self.status() or {}).get("run")
        show = ("model", "show", f"state/models/{run}", "--charter", "charter.json", "--format", "json")
        told = self.commands((name, *show) for name in self.partners)
        return {name: json.loads(text) for name, text in zip(self.partners, told, strict=True)}

    def bundle(self) -> Path:
        """Everyone's part of the auditor's bundle, in one folder. Nodes should be stopped, and the run closed."""
        self.command(COORDINATOR, "server", "export", "server.yaml", "--out", "../bundle")
        self.commands((name, "node", "export", "node.yaml", "--out", "../bundle") for name in self.partners)
        return self.out / "bundle"

    def command(self, name: str, *arguments: str) -> str:
        """One `hansa` command in an organisation's folder; what it printed.

        Raises:
            RunFailed: it did not exit with 0; with its words.
        """
        return self.commands([(name, *arguments)])[0]

    def commands(self, commands: Iterable[tuple[str, ...]]) -> list[str]:
        """Commands (organisation, arguments ...) at the same time; what each printed.

        Raises:
            RunFailed: one did not exit with 0; with its words.
        """
        listed = list(commands)
        for name, *arguments in listed:
            self._say(f"{name}$ hansa {shlex.join(arguments)}")
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            return list(pool.map(lambda command: self._quietly(command[0], command[1:]), listed))

    # -- parts -------------------------------------------------------------------------------------------------------

    def _start(self, name: str, arguments: tuple[str, ...], env: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
        if self.runs(name):
            raise RunFailed(f"{name} runs already", "Stop it first.")
        self._say(f"{name}$ hansa {shlex.join(arguments)} &")
        with (self.out / "logs" / f"{name}.log").open("ab") as log:
            # A session of its own: Ctrl-C is for us, and we stop it.
            process = subprocess.Popen(  # noqa: S603  our own command
                [*self._host.get(name, ()), *HANSA, *arguments],
                cwd=self.folder(name),
                env={**os.environ, **QUIET, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes[name] = process
        return process

    def _quietly(self, name: str, arguments: tuple[str, ...]) -> str:
        done = subprocess.run(  # noqa: S603  our own command
            [*HANSA, *arguments],
            cwd=self.folder(name),
            env={**os.environ, **QUIET},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        with (self.out / "logs" / "commands.log").open("a", encoding="utf-8") as log:
            log.write(f"{name}$ hansa {shlex.join(arguments)}\n{done.stdout}")
        if done.returncode:
            raise RunFailed(f"{name}$ hansa {shlex.join(arguments)}\n{done.stdout.strip()}", "See its words above.")
        return done.stdout.rstrip("\n")

    def _send(self, file: Path, to: str, name: str) -> None:
        target = self.folder(to) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if file != target:
            shutil.copyfile(file, target)

    def _claim(self) -> IO[str]:
        """Make `out` ours and empty, or refuse; the lock on it is held until the file is closed."""
        mine = {*self.partners, COORDINATOR, "logs", "bundle", _MARK}
        try:
            there = {path.name for path in self.out.iterdir()} if self.out.exists() else set()
            known = set(json.loads((self.out / _MARK).read_text())["folders"]) if _MARK in there else set()
            if there - known:
                raise OutputError(
                    f"{self.out}: holds what no earlier network left: {', '.join(sorted(there - known)[:5])}",
                    "Give another --out, or empty this one.",
                )
            self.out.mkdir(parents=True, exist_ok=True)
            mark = (self.out / _MARK).open("a+", encoding="utf-8")
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as err:
                mark.close()
                raise OutputError(f"{self.out}: another network runs here", "Stop it, or give another --out.") from err
            for name in there - {_MARK}:
                shutil.rmtree(self.out / name)
            mark.truncate(0)
            mark.write(json.dumps({"folders": sorted(mine)}))
            mark.flush()
            for name in mine - {_MARK, "bundle"}:
                (self.out / name).mkdir(mode=0o755 if name == "logs" else 0o700)
        except (ValueError, KeyError, TypeError) as err:
            raise OutputError(f"{self.out / _MARK}: not what a network wrote", "Give another --out.") from err
        except OSError as err:
            raise output_error(self.out, err) from err
        return mark


def write_parts(source: Path, folder: Path, task: Task, fraction: float, seed: int) -> int:
    """Split a CSV file into folder/train.csv and folder/public.csv, row by row as `hansa simulate` holds rows out.

    Returns:
        The number of rows in public.csv; with none, it is not written.

    Raises:
        DataError: the file does not fit the task's schema.
    """

    class Places(Rows):
        """Rows that give their places for themselves."""

        def take(self, index: Tensor) -> Rows:
            return Rows(index, index)

    if not isinstance(task.schema, TableSchema):
        raise ConfigError(f"task {task.name} takes arrays, not CSV files", "Its partners cannot be set up from files.")
    x, y = read_table(source, task.schema)
    split = split_rows(Places(torch.from_numpy(x), torch.from_numpy(y)), fraction, seed)
    # The file's own lines: a record may stand on several of them.
    lines = list(io.StringIO(source.read_bytes().decode("utf-8-sig").rstrip("\r\n"), newline=""))
    reader = csv.reader(lines)
    ends = [0, *(reader.line_num for _ in reader)]
    records = ["".join(lines[start:end]).rstrip("\r\n") + "\n" for start, end in pairwise(ends)]
    for name, places in (("train.csv", split.train.y.tolist()), ("public.csv", split.held_out.y.tolist())):
        if places:
            text = records[0] + "".join(records[1 + place] for place in places)
            write_whole(folder / name, text.encode(), mode=0o600)
    return len(split.held_out)


def _free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
