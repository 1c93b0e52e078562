"""What every runner of this benchmark is measured with: wall clock, processor time of the process tree, a pace from outside.

A runner is a script that its own environment's Python runs:

    python bare.py --workload w1 --rounds 5 [--parameters FILE] [--paced]

It prints one JSON line. With --paced it measures one sample for each line on stdin and answers "sample" on stdout (and "ready"
before the first), so that `table.py` lets many runners take turns. Needs torch and numpy alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes a runner starts

import torch
from torch import Tensor
from workloads import WORKLOADS, Workload, evaluate

torch.set_num_threads(1)
torch.manual_seed(0)


def cpu_seconds_of_others() -> float:
    """User and system time of all descendants, those included that ended and were waited for."""
    waited = resource.getrusage(resource.RUSAGE_CHILDREN)
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid = int(stat.parent.name)
        children.setdefault(int(fields[1]), []).append(pid)
        ticks[pid] = sum(map(int, fields[11:15]))
    total, found = 0, [os.getpid()]
    while found:
        others = children.get(found.pop(), [])
        total += sum(ticks[pid] for pid in others)
        found += others
    return total / os.sysconf("SC_CLK_TCK") + waited.ru_utime + waited.ru_stime


class Stopwatch:
    """Called between rounds; knows which of them are measured together.

    Args:
        samples: measurements; each is the mean of `workload.repeat` rounds, after as many rounds of warm-up.
        out: where "ready" and "sample" go when paced from stdin; None runs on.
    """

    def __init__(self, workload: Workload, samples: int, out: Callable[[str], None] | None = None) -> None:
        self.rounds = workload.repeat * (samples + 1)
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []
        self._repeat = workload.repeat
        self._out = out
        self._passed = -1
        self._began = (0.0, 0.0)

    def tick(self) -> None:
        """Before the first round and after every one."""
        now = time.perf_counter(), time.process_time()
        self._passed += 1
        if self._passed % self._repeat:
            return
        if self._passed > self._repeat:
            self.wall_s.append((now[0] - self._began[0]) / self._repeat)
            self.cpu_s.append((now[1] + cpu_seconds_of_others() - self._began[1]) / self._repeat)
        if self._out is not None and self._passed:
            self._out("ready" if self._passed == self._repeat else "sample")
            if self._passed < self.rounds and not sys.stdin.readline():
                raise SystemExit("nobody paces this runner any more")
        others = cpu_seconds_of_others()
        self._began = time.perf_counter(), time.process_time() + others


Run = Callable[[Workload, Stopwatch, argparse.Namespace], Mapping[str, Tensor]]


def arguments(argv: list[str] | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--rounds", type=int, default=5, help="measurements after the warm-up")
    parser.add_argument("--parameters", type=Path, help="where to write the last global parameters")
    parser.add_argument("--paced", action="store_true")
    return parser


def main(runner: str, version: Callable[[], str], run: Run, parser: argparse.ArgumentParser | None = None) -> None:
    """Run, check that something was learned, print one JSON line. What libraries print goes to stderr."""
    options = (parser or arguments()).parse_args()
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def out(line: str) -> None:
        print(line, file=stdout, flush=True)

    workload = WORKLOADS[options.workload]
    watch = Stopwatch(workload, options.rounds, out if options.paced else None)
    parameters = run(workload, watch, options)
    model = workload.model()
    names = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in parameters.items():
            names[name].copy_(value)
    if options.parameters:
        torch.save({name: p.detach() for name, p in names.items()}, options.parameters)
    told = {
        "runner": runner,
        "workload": workload.name,
        "version": version(),
        "wall_s": watch.wall_s,
        "cpu_s": watch.cpu_s,
        "rounds": watch.rounds,
        **evaluate(model, workload.data()),
    }
    out(json.dumps(told))
