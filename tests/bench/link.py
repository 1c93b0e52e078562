"""What the link costs: a coordinator and four nodes as separate processes over mutual TLS on loopback, the whole stack.

    python tests/bench/link.py [small] [private] [large] [flower]        (default: all)

Overhead of a round = the coordinator's time for it (requests, ledger, folding, checkpoint) less the slowest node's training.
It includes every node's debit, outbox and commit with their fsyncs. Bars of issue 3: at 100k parameters a median of at most
50 ms; a 100 MB model at least 150 MB/s to and from four nodes, over all nodes and both directions; coordinator's memory at most
4 models + 64 MB above the idle process. `private` is `small` with every node's budget debited. `flower` is `small` under a
stock SuperLink and four SuperNodes with TLS and supernode authentication, the same ServerApp and ClientApp.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hansa.simulations.network import LocalNetwork

HERE = Path(__file__).resolve().parent
NODES = ("north", "east", "south", "west")
ROWS = 40
SIZES = {"small": (330, 15), "private": (330, 15), "large": (5000, 7), "flower": (330, 6)}
"""Hidden units and rounds: 100k and 25M parameters. The first round, in which everybody warms up, is not counted."""
PRIVACY = {"private": "{kind: local, epsilon: 8.0, delta: 1.0e-3, clip_norm: 1.0}"}
PACKAGE = """
from pathlib import Path
from torch import nn
from hansa.common.tasks import Task
from hansa.common.tasks.schema import load_schema

SCHEMA = load_schema(Path(__file__).with_name("schema.yaml"))

def build():
    return nn.Sequential(nn.Linear(SCHEMA.shape[0], {hidden}), nn.Tanh(), nn.Linear({hidden}, {hidden}), nn.Tanh(), nn.Linear({hidden}, 2))

task = Task("{name}", "benchmark", SCHEMA, SCHEMA.label.classes, build)
"""
SCHEMA = """
columns:
  a: {type: number, min: -1, max: 1, required: true}
  b: {type: number, min: -1, max: 1, required: true}
label: {column: y, classes: [no, "yes"], values: {"0": no, "1": "yes"}}
"""
CONFIG = """
name: {name}
task: {name}
partners:
{partners}
algorithm:
  rounds: {rounds}
  local: {{steps: 1, optimizer: {{name: sgd, lr: 0.01}}}}
privacy: {privacy}
evaluation: {{kind: none}}
quorum: 4
round_deadline_s: 300
"""


def make(folder: Path, name: str, hidden: int, rounds: int, privacy: str) -> Path:
    """A task package, four CSV files and a configuration; the package is installed by being on the path."""
    package = folder / "packages" / name.replace("-", "_")
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE.format(hidden=hidden, name=name))
    (package / "schema.yaml").write_text(SCHEMA)
    about = folder / "packages" / f"{package.name}-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[hansa.tasks]\n{name} = {package.name}:task\n")
    rng = random.Random(1)
    for node in NODES:
        with open(folder / f"{node}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow("aby")
            for i in range(ROWS):
                writer.writerow([round(rng.uniform(-1, 1), 4), round(rng.uniform(-1, 1), 4), i % 2])
    partners = "\n".join(f"  {n}: {{data: {n}.csv, declared_records: {ROWS}}}" for n in NODES)
    config = folder / "federation.yaml"
    config.write_text(CONFIG.format(name=name, partners=partners, rounds=rounds, privacy=privacy))
    return config


def coordinate(folder: Path) -> None:
    """The coordinator, in a process of its own: its memory is nobody else's. Prints JSON."""
    from hansa.common.events import EventLog
    from hansa.server.service import Service
    from hansa.server.settings import load_settings

    os.chdir(folder)
    settings = load_settings(folder / "server.yaml")
    seconds: list[float] = []
    memory: dict[str, int] = {}

    def resident(key: str) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return int(lines[key].split()[0]) * 1024

    def notify(event: str, **facts: float) -> None:
        if event == "done":
            seconds.append(facts["seconds"])

    with open(os.devnull, "w") as nowhere, Service(settings) as service:
        grid = service.link(EventLog("json", nowhere))
        memory["idle"] = resident("VmRSS")
        status = service.status("bench", grid)
        with status:
            service.run(grid, "bench", status, notify)
        memory["peak"] = resident("VmHWM")
    print(json.dumps({"seconds": seconds, **memory}))


def measure(kind: str) -> None:
    hidden, rounds = SIZES[kind]
    privacy = PRIVACY.get(kind, "{kind: none}")
    with tempfile.TemporaryDirectory(dir=os.environ.get("HANSA_BENCH_DIR")) as name:
        folder = Path(name)
        config = make(folder, f"bench-{kind}", hidden, rounds, privacy)
        path = [str(HERE / "timed"), str(folder / "packages"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in path if p)
        os.environ["OMP_NUM_THREADS"] = "1"
        sys.path.insert(0, str(folder / "packages"))
        from hansa.simulations.network import LocalNetwork

        with LocalNetwork(config, folder / "net") as network:
            network.set_up()
            times = {node: folder / f"{node}.times" for node in NODES}
            told = (stock if kind == "flower" else ours)(network, times, [Path(p) for p in path if p])
            training = [[float(line) for line in times[node].read_text().split()] for node in NODES]
        parameters = parameters_of(kind)
        fsync_ms = fsync_latency_ms(folder)
    slowest = [max(column) for column in zip(*training, strict=True)]
    overhead = [round_s - train_s for round_s, train_s in zip(told["seconds"], slowest, strict=True)][1:]
    model_mb = parameters * 4 / 1e6
    print(f"{kind}: {parameters:,} parameters ({model_mb:.1f} MB), 4 nodes, {len(overhead)} rounds, privacy {privacy}")
    print(f"  fsync of this disk: median {fsync_ms:.2f} ms")
    print(f"  round: median {statistics.median(told['seconds'][1:]) * 1e3:.1f} ms; slowest node's training: "
          f"median {statistics.median(slowest[1:]) * 1e3:.1f} ms")  # fmt: skip
    print(
        f"  overhead: median {statistics.median(overhead) * 1e3:.1f} ms, {min(overhead) * 1e3:.1f} to {max(overhead) * 1e3:.1f} ms"
    )
    if kind == "large":
        moved = 2 * len(NODES) * model_mb
        print(
            f"  {moved:.0f} MB a round: {moved / statistics.median(overhead):.0f} MB/s over all nodes and both directions"
        )
        grown = (told["peak"] - told["idle"]) / 1e6
        print(f"  coordinator: {told['idle'] / 1e6:.0f} MB idle, peak {told['peak'] / 1e6:.0f} MB: "
              f"{grown:.0f} MB more = {(grown - 64 * 1.048576) / model_mb:.2f} models + 64 MiB")  # fmt: skip


def ours(network: LocalNetwork, times: dict[str, Path], _: list[Path]) -> dict[str, Any]:
    """Every round's seconds over our link, and the coordinator's memory."""
    for node, file in times.items():
        network.start_node(node, env={"HANSA_BENCH_TIMES": str(file)})
    command = [sys.executable, __file__, "--coordinate", str(network.folder("coordinator"))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    network.stop()
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def stock(network: LocalNetwork, times: dict[str, Path], path: list[Path]) -> dict[str, Any]:
    """Every round's seconds with Flower's own processes."""
    sys.path.insert(0, str(HERE.parent / "e2e"))
    from flower_engine import REPO, FlowerEngine

    env = {"HANSA_SERVER": str(network.folder("coordinator") / "server.yaml"), "OMP_NUM_THREADS": "1"}
    with FlowerEngine(network.out / "engine", path=path, env=env) as engine:
        for node, file in times.items():
            engine.register(node)
            env["HANSA_BENCH_TIMES"] = str(file)  # what the next process is started with
            engine.start_node(node, {"hansa-node": str(network.folder(node) / "node.yaml")})
        run = engine.run(REPO / "configs" / "flower", {"hansa-run": "bench"}, 1800)
    if run.status != "finished:completed":
        raise SystemExit(f"{run.details}\n{run.log}")
    return {"seconds": [float(s) for s in re.findall(r"round done .*seconds=([\d.]+)", run.log)]}


def parameters_of(kind: str) -> int:
    from hansa.common.tasks import initial_model, load_task

    return sum(p.numel() for p in initial_model(load_task(f"bench-{kind}"), 0).parameters())


def fsync_latency_ms(folder: Path) -> float:
    taken = []
    with open(folder / "fsync", "ab", buffering=0) as file:
        for _ in range(50):
            file.write(b"x" * 600)
            began = time.perf_counter()
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e3


if __name__ == "__main__":
    if sys.argv[1:2] == ["--coordinate"]:
        coordinate(Path(sys.argv[2]))
    else:
        for kind in sys.argv[1:] or SIZES:
            measure(kind)
