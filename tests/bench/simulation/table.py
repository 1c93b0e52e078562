"""Simulation engines side by side: seconds a round, wall clock and processor, as a ratio to a bare PyTorch loop.

    python tests/bench/simulation/table.py [--quick] [--only w1 w2-dp] [--runners hansa-2 pfl] [--rounds 7] [--out FILE]

All runners of a workload are started, warmed up, and then take turns, one measurement each, so that a noisy machine hits all of
them alike. Flower takes turns with the bare loop alone, afterwards: Ray uses 3 to 9% of a core when it does nothing. The ratio is
of medians. Processor time is that of the whole process tree, Ray's workers included. Of the bare loops
with DP-SGD the fastest is the yardstick. Without DP every runner must end with the bare loop's parameters: the last column is
the largest relative L2 distance of any tensor. Max-pooling and ReLU amplify rounding from round to round (on W2 2e-7 after one
round, 3e-3 after six), so what is allowed is measured: ten times the distance of a bare loop that adds up in the opposite order.
Peers run in environments of their own (`make peers`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from workloads import WORKLOADS, Workload

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[2]
TOLERANCE, TIMES = 1e-5, 10.0
"""Relative L2 distance a tensor may have from the bare loop's, whatever rounding does; and times what it does."""


@dataclass(frozen=True)
class Runner:
    """A script, the environment it runs in (None: Hansa's own) and for which workloads."""

    key: str
    title: str
    script: str
    options: tuple[str, ...] = ()
    environment: str | None = None
    private: bool | None = None
    yardstick: bool = False
    apart: bool = False


RUNNERS = (
    Runner("bare", "bare loop", "bare.py", private=False, yardstick=True),
    Runner("backwards", "bare loop, averaged backwards", "bare.py", ("--backwards",), private=False),
    Runner("bare-each", "bare loop, Opacus' hooks for each client", "bare.py", ("--private", "each"), None, True, True),
    Runner("bare-once", "bare loop, Opacus' hooks once", "bare.py", ("--private", "once"), None, True, True),
    Runner("bare-func", "bare loop, torch.func", "bare.py", ("--private", "functional"), None, True, True),
    Runner("opacus", "bare loop, Opacus' PrivacyEngine", "bare.py", ("--private", "engine"), None, True),
    Runner("hansa", "Hansa", "hansa_engine.py"),
    Runner("hansa-2", "Hansa, 2 workers", "hansa_engine.py", ("--workers", "2")),
    Runner("pfl", "pfl-research", "peer_pfl.py", (), "pfl"),
    Runner("pfl-2", "pfl-research, 2 processes", "peer_pfl.py", ("--processes", "2"), "pfl"),
    Runner("pfl-local", "pfl-research, its local mechanism", "peer_pfl.py", ("--privacy", "local"), "pfl", True),
    Runner("fluke", "fluke", "peer_fluke.py", (), "fluke"),
    Runner("flower", "Flower on Ray, 2 actors", "peer_flower.py", (), "flwr", apart=True),
)
OTHER_PRIVACY = {"pfl-local"}
"""Runners that do less under the name of privacy: listed, not compared."""


@dataclass
class Result:
    runner: Runner
    told: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    bare: Result | None = None
    allowed: float = TOLERANCE
    difference: float | None = None
    skipped: str = ""

    def median(self, what: str) -> float:
        return statistics.median(self.told[what])

    def ratio(self, what: str) -> float | None:
        return self.median(what) / self.bare.median(what) if self.bare else None


class Failed(Exception):
    pass


class Turn:
    """A runner that is being measured, in a process of its own."""

    def __init__(self, runner: Runner, python: Path, workload: Workload, rounds: int, folder: Path) -> None:
        self.runner = runner
        self._parameters = folder / f"{runner.key}.pt"
        self._stderr = folder / f"{runner.key}.log"
        command = [python, HERE / runner.script, "--workload", workload.name, "--rounds", str(rounds), "--paced"]
        with open(self._stderr, "wb") as log:
            self._process = subprocess.Popen(
                [*map(str, command), "--parameters", str(self._parameters), *runner.options],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )  # fmt: skip

    def expect(self, word: str) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if word not in line:
            self._process.wait()
            raise Failed(self._reason())
        return line

    def sample(self, last: bool) -> None:
        assert self._process.stdin is not None
        try:
            print("go", file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(self._reason()) from None
        self.expect("sample")
        if last:
            self._process.stdin.close()

    def finish(self) -> Result:
        told = json.loads(self.expect("{"))
        self._process.wait()
        return Result(self.runner, told, torch.load(self._parameters))

    def stop(self) -> None:
        """It sees the end of its stdin, or ended already."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.terminate()

    def _reason(self) -> str:
        lines = self._stderr.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"it ended with code {self._process.returncode} and said nothing"


def python_of(runner: Runner) -> Path:
    if runner.environment is None:
        return Path(sys.executable)
    folder = Path(os.environ.get("HANSA_PEERS", REPO / ".peers"))
    python = folder / runner.environment / "bin" / "python"
    if not python.exists():
        raise Failed(f"no environment {folder / runner.environment}: `make peers` builds it")
    return python


@contextmanager
def stopped(turns: list[Turn]) -> Iterator[list[Turn]]:
    try:
        yield turns
    finally:
        for turn in turns:
            turn.stop()


def measure(workload: Workload, runners: list[Runner], rounds: int) -> list[Result]:
    """Every runner's measurements; one that cannot run is skipped with its reason."""
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as name, stopped([]) as turns:

        def attempt(runner: Runner, act: Any) -> bool:
            try:
                act()
            except Failed as failure:
                results[runner.key] = Result(runner, skipped=str(failure))
                print(f"  {workload.name}: skipped {runner.key}: {failure}", file=sys.stderr, flush=True)
                return False
            return True

        running = []
        for runner in runners:
            if attempt(runner, lambda: turns.append(Turn(runner, python_of(runner), workload, rounds, Path(name)))):  # noqa: B023
                turn = turns[-1]
                if attempt(runner, lambda: turn.expect("ready")):  # noqa: B023
                    running.append(turn)
        for i in range(rounds):
            running = [t for t in running if attempt(t.runner, lambda: t.sample(i == rounds - 1))]  # noqa: B023
        for turn in running:
            attempt(turn.runner, lambda: results.__setitem__(turn.runner.key, turn.finish()))  # noqa: B023
    return [results[runner.key] for runner in runners]


def yardstick(results: list[Result]) -> Result | None:
    bare = [r for r in results if r.runner.yardstick and not r.skipped]
    return min(bare, key=lambda r: r.median("wall_s"), default=None)


def measure_all(workload: Workload, runners: list[Runner], rounds: int) -> list[Result]:
    """With each its bare loop, and the distance from it where there is no noise."""
    together = [r for r in runners if not r.apart]
    results = measure(workload, together, rounds)
    bare = yardstick(results)
    if bare is None:
        return results
    for result in results:
        result.bare = bare
    if apart := [r for r in runners if r.apart]:
        again, *others = measure(workload, [bare.runner, *apart], rounds)
        for result in others:
            result.bare = None if again.skipped else again
        results += others
    allowed = TOLERANCE
    for result in results:
        if not result.skipped and not workload.private:
            result.difference = max(
                float((value - bare.parameters[name]).norm() / bare.parameters[name].norm())
                for name, value in result.parameters.items()
            )
            if result.runner.key == "backwards":
                allowed = max(allowed, TIMES * result.difference)
    for result in results:
        result.allowed = allowed
    return results


def show(workload: Workload, results: list[Result]) -> None:
    bare = yardstick(results)
    print(f"\n{workload.title} ({workload.name})")
    if bare is not None and workload.private:
        print(f"  yardstick: {bare.runner.title}, the fastest by hand")
    print(f"  {'':<42}{'wall':>10}{'ratio':>8}{'CPU':>10}{'ratio':>8}{'spread':>9}{'loss':>8}  parameters")
    for result in results:
        if result.skipped:
            print(f"  {result.runner.title:<42}skipped: {result.skipped}")
            continue
        wall, cpu = result.median("wall_s"), result.median("cpu_s")
        ratios = [f"{result.ratio(what):.2f}" if result.bare else "-" for what in ("wall_s", "cpu_s")]
        spread = (max(result.told["wall_s"]) - min(result.told["wall_s"])) / wall
        if workload.private:
            note = "another protection" if result.runner.key in OTHER_PRIVACY else "noise"
        elif result.difference is None:
            note = "-"
        else:
            note = f"{result.difference:.1e}" + (
                "" if result.difference <= result.allowed else "  NOT WHAT BARE LEARNED"
            )
        print(f"  {result.runner.title:<42}{wall * 1e3:>7.1f} ms{ratios[0]:>8}{cpu * 1e3:>7.1f} ms{ratios[1]:>8}"
              f"{spread:>9.0%}{result.told['loss']:>8.3f}  {note}", flush=True)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--runners", nargs="+", choices=[r.key for r in RUNNERS], default=[r.key for r in RUNNERS])
    parser.add_argument("--rounds", type=int, help="measurements after the warm-up (default: 5; with --quick 3)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="all figures as JSON")
    options = parser.parse_args(argv)
    rounds = options.rounds or (3 if options.quick else 5)
    told: dict[str, Any] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "workloads": {},
    }
    odd = []
    for name in options.only:
        workload = WORKLOADS[name]
        runners = [r for r in RUNNERS if r.private in (None, workload.private)]
        runners = [r for r in runners if r.yardstick or r.key in {*options.runners, "backwards"}]
        began = time.perf_counter()
        load = os.getloadavg()[0]
        results = measure_all(workload, runners, rounds)
        bare = yardstick(results)
        odd += [f"{name}: {r.runner.key}" for r in results if r.difference is not None and r.difference > r.allowed]
        show(workload, results)
        told["workloads"][name] = {
            "title": workload.title,
            "load_before": load,
            "seconds": time.perf_counter() - began,
            "yardstick": bare.runner.key if bare else None,
            "runners": {
                r.runner.key: {"skipped": r.skipped} if r.skipped else {
                    **r.told,
                    "wall_ratio": r.ratio("wall_s"),
                    "cpu_ratio": r.ratio("cpu_s"),
                    "difference": r.difference,
                }
                for r in results
            },
        }  # fmt: skip
        if options.out:  # after every workload: an hour's figures survive the next one
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(told, indent=1) + "\n")
    for line in odd:
        print(f"NOT WHAT BARE LEARNED: {line}", file=sys.stderr)
    return int(bool(odd))


if __name__ == "__main__":
    sys.exit(main())
