"""How the faults of a network end under a stock SuperLink: the table in docs/adr/0009-two-engines.md.

    make soak, or: python -m pytest -s -m soak tests/e2e/test_flower_faults.py

Three partners with a quorum of two under `flwr run`; each test prints what happened when, and ends with a verified audit in
which no debit is lost or doubled. Faults inside Flower's app processes are those of faulty/sitecustomize.py.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from e2e_support import HOSPITALS, call, federation, ledgers, of_type, resize_disk, small_disk, write
from hansa.common.verifier import verify_bundle
from hansa.simulations.network import COORDINATOR, LocalNetwork

sys.path.insert(0, str(Path(__file__).parent))
from flower_engine import CONNECTION, HOST, REPO, EngineError, FlowerEngine

pytestmark = pytest.mark.soak

BUNDLE = REPO / "configs" / "flower"
NAMES = HOSPITALS[:3]
CONFIG = federation(
    rounds=3,
    evaluation="{kind: none}",
    data={n: (f"package:heart-disease/{n}.csv", d) for n, d in zip(NAMES, (300, 290, 120), strict=True)},
    more="round_deadline_s: 90\n",
)
PATIENCE_S = 600.0
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    int made = ((int (*)(clockid_t, struct timespec *)) dlsym(RTLD_NEXT, "clock_gettime"))(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += atoi(getenv("OFF_S"));
    return made;
}
"""
"""Only the time of day is wrong: timers run on. (Under libfaketime time.sleep, which SuperNode uses, is an error.)"""
ARM = f"""
import os, pathlib, runpy, sys
app = next((word for word in sys.orig_argv if word.endswith(("flwr-clientapp", "flwr-serverapp"))), "")
faults = pathlib.Path(__file__).with_name("serverapp")
if app.endswith("serverapp") and faults.exists():  # each start of a ServerApp gets the next line
    os.environ["HANSA_FAULT"], _, left = faults.read_text().partition("\\n")
    faults.write_text(left)
if app:  # and not Flower's other processes
    runpy.run_path({str(Path(__file__).with_name("faulty") / "sitecustomize.py")!r})
"""


class Trial:
    """A federation under a stock SuperLink in which things go wrong."""

    def __init__(self, net: LocalNetwork, folder: Path) -> None:
        self.net, self.folder = net, folder
        self.lib = write(folder / "lib" / "sitecustomize.py", ARM).parent
        env = {"HANSA_SERVER": str(net.folder(COORDINATOR) / "server.yaml"), "OMP_NUM_THREADS": "1"}
        env["HANSA_FAULT_LOG"] = str(folder / "faults")
        self.engine = FlowerEngine(folder / "engine", (self.lib, REPO / ".dev"), env, superexec_secret=True)
        self.began, self.given, self.happened = time.monotonic(), set[str](), write(folder / "faults", "")

    def tell(self, what: str) -> None:
        print(f"\n{time.monotonic() - self.began:8.1f} s  {what}", end="", flush=True)

    def until(self, true: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < end, f"it did not happen: {what}"
            time.sleep(0.05)
        self.tell(what)

    def start(self, name: str, fault: str = "", **env: str) -> None:
        """Start a SuperNode, with a fault in its ClientApps: {pid} is the file with the SuperNode's process id."""
        pid = self.folder / f"{name}.pid"
        if fault:
            env["HANSA_FAULT"] = fault.replace("{pid}", str(pid))
            self.given.update(env["HANSA_FAULT"].split(";"))
        self.engine.start_node(name, {"hansa-node": str(self.net.folder(name) / "node.yaml")}, env)
        write(pid, str(self.process(name).pid))

    def start_all(self, faults: Mapping[str, str] | None = None) -> None:
        for name in NAMES:
            self.start(name, (faults or {}).get(name, ""))

    def process(self, name: str) -> subprocess.Popen[bytes]:
        return self.engine._processes[name].popen

    def complete(self) -> None:
        """`flwr run`, and again with hansa-resume, until the run is completed."""
        for number in range(7):
            began = time.monotonic()
            try:
                done = self.engine.run(BUNDLE, {"hansa-run": "faulty", "hansa-resume": number > 0}, PATIENCE_S)
                status, log = done.status, done.log
            except EngineError as err:
                status, log = "flwr run failed", str(err)
            self.tell(f"{'resumed' if number else 'run'}: {status} after {time.monotonic() - began:.1f} s")
            for line in re.findall(r"(?:answer |round done |undelivered |RunFailed: ).*", log):
                print(f"\n{'':12}{line.strip()[:200]}", end="")
            if status == "finished:completed":
                return
            self.until(lambda: not self.server_apps(), "no ServerApp runs")  # it may outlive its SuperLink
        raise AssertionError(log[-3000:])

    def server_apps(self) -> list[int]:
        files = {pid: Path(f"/proc/{pid}/cmdline") for pid in self.engine._ours()}
        return [pid for pid, file in files.items() if file.exists() and b"flwr-serverapp" in file.read_bytes()]

    def has(self, name: str, kind: str, number: int) -> bool:
        book = self.net.folder(name) / "state" / "ledger.jsonl"
        return book.exists() and any(entry["round"] == number for entry in of_type(book, kind))

    def ends_well(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Complete the run while something happens; then the audit, the models and the bills."""
        with ThreadPoolExecutor(1) as pool:
            happens = pool.submit(meanwhile)
            self.complete()
            happens.result()
        self.engine.close()
        assert set(self.happened.read_text().splitlines()) == self.given, "not all faults happened"
        bundle = self.net.bundle()
        call("audit", bundle).expect(0).says("VERIFIED")
        assert verify_bundle(bundle)["violations"] == []
        models = self.net.models().values()
        assert ({m["verified"] for m in models}, len({m["sha256"] for m in models})) == ({True}, 1)
        books = ledgers(bundle)
        train = [a["replies"] for a in of_type(books[COORDINATOR], "answers") if a["purpose"] == "train"]
        # Of a round that was asked for again, the last answer is the one that counts.
        outcomes = {(name, r["request_id"]): r["outcome"] for replies in train for name, r in replies.items()}
        for name in NAMES:
            debits, commits = (Counter(e["request_id"] for e in of_type(books[name], k)) for k in ("debit", "commit"))
            asked = {request: outcome for (n, request), outcome in outcomes.items() if n == name}
            assert set(commits) <= set(debits) <= set(asked), "paid for what was never asked"
            for request, outcome in asked.items():
                print(f"\n{'':12}{request}: {outcome}, {debits[request]} debit, {commits[request]} answer", end="")
                assert commits[request] <= debits[request] <= 1, "paid twice"
                assert outcome != "ok" or commits[request] == 1, "it counted, and is not paid"
        self.tell("VERIFIED\n")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    with LocalNetwork(write(root / "c.yaml", CONFIG), root / "net") as net:
        net.set_up()
    return root / "net"


@pytest.fixture
def trial(template: Path, tmp_path: Path) -> Iterator[Trial]:
    """A copy of it, and a SuperLink that runs and knows the partners' keys."""
    with LocalNetwork(write(tmp_path / "c.yaml", CONFIG), tmp_path / "net", server={"wait_for_nodes_s": 30}) as net:
        for name in (*NAMES, COORDINATOR):
            shutil.copytree(template / name, net.folder(name), dirs_exist_ok=True)
        net._write_settings()
        made = Trial(net, tmp_path)
        with made.engine:
            for name in NAMES:
                made.engine.register(name)
            yield made


BEFORE, AMID, AFTER = "Gate.debit[request.round=1]:before", "Gate.debit[request.round=2]:after", "Gate.commit[request.round=3]:after"  # fmt: skip
"""Before training, in it (the debit is on the disk) and after it (the answer is): each node dies in a round of its own."""
DEATHS = dict(zip(NAMES, (BEFORE, AMID, AFTER), strict=True))


def meets(place: str, *actions: str) -> str:
    return ";".join(f"hansa.clients.gate:{place}:1:{action}" for action in actions)


def test_node_killed_before_during_and_after_training(trial: Trial) -> None:
    """SuperNode and ClientApp at once, as in a power cut; started again at once, until it is let in."""
    trial.start_all({name: meets(place, "kill:{pid}", "kill") for name, place in DEATHS.items()})

    def restart() -> None:
        for name in NAMES:
            process, refused = trial.process(name), 0
            trial.until(lambda p=process: p.poll() is not None, f"{name} is killed")  # type: ignore[misc]
            trial.engine.kill(name)
            while name not in trial.engine._processes:
                try:
                    trial.start(name)
                except EngineError:
                    refused += 1
            trial.tell(f"{name} is let in again, after {refused} refusals")

    trial.ends_well(restart)


def test_clientapp_killed_before_during_and_after_training(trial: Trial) -> None:
    trial.start_all({name: meets(place, "kill") for name, place in DEATHS.items()})
    trial.ends_well()


def test_serverapp_killed_in_each_phase(trial: Trial) -> None:
    """When two of three have answered; resumed as soon as `flwr run` ends."""
    place = "hansa.server.rounds:Coordinator._receive[request.kind={}]:after:2:kill"
    faults = [place.format(kind) for kind in ("open", "train", "close", "sign", "deliver")]
    trial.given.update(faults)
    write(trial.lib / "serverapp", "\n".join(faults))
    trial.start_all()
    trial.ends_well()


def test_superlink_killed_in_a_round_and_started_again(trial: Trial) -> None:
    trial.start_all({"cleveland": meets(AMID, "sleep:12")})

    def kill() -> None:
        trial.until(lambda: trial.has("cleveland", "debit", 2), "cleveland trains in round 2; SuperLink is killed")
        trial.engine.kill("superlink")
        time.sleep(5)
        trial.engine.start_superlink()
        trial.tell(f"it is up again; nodes that run: {[n for n in NAMES if trial.process(n).poll() is None]}")

    trial.ends_well(kill)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_clocks_are_off_by_an_hour(trial: Trial) -> None:
    """Whose clock is wrong stays outside until it is right; the others train, and close with it."""
    clock, source = trial.folder / "clock.so", write(trial.folder / "clock.c", CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", clock, source, "-ldl"], check=True)
    for times, off_s in enumerate(("3600", "-3600"), start=1):
        trial.tell(f"{off_s} s")
        with pytest.raises(EngineError):
            trial.start("cleveland", LD_PRELOAD=str(clock), OFF_S=off_s)
        trial.tell("SuperNode has ended")
        assert trial.engine.log("superlink").count('activate-node HTTP/1.1" 401') == times
    trial.start("hungary")
    trial.start("switzerland")

    def mend() -> None:
        trial.until(lambda: trial.has("hungary", "commit", 3), "the last round is answered")
        trial.start("cleveland")

    trial.ends_well(mend)


def test_disk_full_at_the_node(trial: Trial) -> None:
    """A real one, with three pages left when the run begins; there is room again after the first failure."""
    state = trial.net.folder("cleveland") / "state"
    shutil.copytree(state, trial.folder / "kept")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(small_disk(state, 256))
        except OSError as err:
            pytest.skip(f"this user may not mount a file system: {err}")
        stack.callback(trial.engine.close)  # before the disk goes away
        shutil.copytree(trial.folder / "kept", state, dirs_exist_ok=True)
        trial.start_all()
        with open(state / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(state / "ballast", (state / "ballast").stat().st_size - 3 * 4096)

        def mend() -> None:
            trial.until(lambda: "message failed" in trial.engine.log("cleveland"), "the disk is full")
            resize_disk(state, 1024)
            trial.tell(re.findall(r"message failed.*", trial.engine.log("cleveland"))[0])

        trial.ends_well(mend)


def test_a_slow_node_is_not_waited_for(trial: Trial) -> None:
    trial.start_all({"switzerland": meets(BEFORE, "sleep:110")})
    trial.ends_well()


def test_an_unregistered_key_and_a_wrong_ca(trial: Trial) -> None:
    with FlowerEngine(trial.folder / "other") as other:
        kept, wrong = trial.engine.ca.read_bytes(), other.ca.read_bytes()
    trial.engine.ca.write_bytes(wrong)
    trial.tell("another CA")
    with pytest.raises(EngineError, match="CERTIFICATE_VERIFY_FAILED"):
        trial.start("hungary")
    trial.tell("is refused")
    trial.engine.ca.write_bytes(kept)
    trial.start_all({"cleveland": meets(BEFORE, "sleep:20")})

    def revoke() -> None:
        trial.until(lambda: trial.has("hungary", "commit", 1), "hungary has answered in round 1")
        trial.engine.flwr("supernode", "unregister", trial.engine.node_ids["hungary"], CONNECTION)
        trial.tell("hungary's key is unregistered")
        trial.until(lambda: trial.process("hungary").poll() is not None, "hungary's SuperNode has ended")
        trial.engine.kill("hungary")
        with pytest.raises(EngineError):
            trial.start("hungary")
        trial.until(lambda: trial.has("cleveland", "commit", 3), "the others train to the end")
        trial.engine.register("hungary")  # a new key
        trial.start("hungary")

    trial.ends_well(revoke)


def test_hostile_peers(trial: Trial) -> None:
    """Whoever reaches the port, without any key: the SuperLink's memory, and whether the others go on."""
    trial.start_all()
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits := resource.getrlimit(resource.RLIMIT_NOFILE))
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[1], 8192), limits[1]))

        def told(what: str) -> None:
            status = Path(f"/proc/{trial.process('superlink').pid}/status").read_text()
            trial.tell(f"{what}; SuperLink {re.findall('Vm(?:HWM|RSS).*', status)}")

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection((HOST, trial.engine.port), 5))

        def attack() -> None:
            trial.until(lambda: trial.has("cleveland", "debit", 1), "training has begun")
            told("before")
            for _ in range(5):
                connect().sendall(os.urandom(100_000))
            told(f"garbage: {Counter(post(trial, 1000).getresponse().status for _ in range(5))}")
            for _ in range(1000):
                connect()
            told("1,000 silent connections")
            stalled = [post(trial, 50_000_000, claims=100_000_000) for _ in range(4)]
            told("4 messages that stop after 50 of 100 MB")
            told(f"a message of 512 MB: {post(trial, 512_000_000).getresponse().status}")
            time.sleep(60)
            told(f"a minute later {sum(map(still_open, stalled))} of 4 are still open")

        trial.ends_well(attack)


def post(trial: Trial, length: int, claims: int = 0) -> http.client.HTTPSConnection:
    """A message of no known node, or the first part of one."""
    tls = ssl.create_default_context(cafile=str(trial.engine.ca))
    made = http.client.HTTPSConnection(HOST, trial.engine.port, timeout=120, context=tls)
    made.putrequest("POST", "/v1/fleet/push-messages")
    made.putheader("Content-Type", "application/protobuf")
    made.putheader("Content-Length", str(claims or length))
    made.endheaders(bytes([255]) * length)
    return made


def still_open(made: http.client.HTTPSConnection) -> bool:
    made.sock.settimeout(0.1)
    try:
        return made.sock.recv(1) != b""
    except OSError as err:
        return isinstance(err, TimeoutError)
