"""Fuzz every parser at a trust boundary: `make fuzz`, or

    python tests/fuzz [--seconds 600] [--jobs 2] [--engine atheris|pool] [TARGET ...]

One process a target; the time is shared out. What must not happen is kept under out/fuzz/findings and listed; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / ".dev"), str(ROOT / "tests")]
OUT = ROOT / "out" / "fuzz"
STARTUP_S = 8.0
"""What a process needs before its first input: torch and Flower are slow to import."""
GRACE_S = 120.0
"""A process that is silent for so long after its time hangs where no alarm reaches."""


def main() -> int:
    """See above."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--seconds", type=float, default=600.0, help="for all targets together, by the wall clock")
    asked.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at the same time")
    asked.add_argument("--engine", choices=("atheris", "pool"), default=None)
    asked.add_argument("--seed", type=int, default=0, help="0: another one each time")
    asked.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked.add_argument("targets", nargs="*")
    args = asked.parse_args()
    engine = args.engine or ("atheris" if importlib.util.find_spec("atheris") else "pool")
    seed = args.seed or int.from_bytes(os.urandom(3), "big") + 1
    if args.one:
        return one(args.targets[0], args.seconds, engine, seed)
    from fuzz.targets import TARGETS

    unknown = [name for name in args.targets if name not in TARGETS]
    if unknown:
        print(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    names = args.targets or list(TARGETS)
    parts = sum(WEIGHTS.get(name, 1) for name in names)
    each = max(1.0, (args.seconds * args.jobs - STARTUP_S * len(names)) / parts)
    print(
        f"{len(names)} targets, {args.seconds:g} s, {each:.0f} s or more each, engine {engine}, seed {seed}", flush=True
    )
    shutil.rmtree(OUT / "findings", ignore_errors=True)
    began, waiting, running, found = time.monotonic(), list(names), dict[str, Any](), 0
    totals = {"inputs": 0, "refused": 0, "taken": 0, "skipped": 0}
    print(
        f"{'target':20} {'inputs':>9} {'a second':>9} {'refused':>9} {'taken':>9} {'skipped':>8} {'slowest':>8}  findings"
    )
    while waiting or running:
        while waiting and len(running) < args.jobs:
            name = waiting.pop(0)
            running[name] = start(name, each * WEIGHTS.get(name, 1), engine, seed)
        time.sleep(0.2)
        for name, (process, log, until) in list(running.items()):
            if process.poll() is None and time.monotonic() < until:
                continue
            del running[name]
            found += ended(name, process, log, totals)
    print(
        f"{totals['inputs']} inputs in {time.monotonic() - began:.0f} s: {totals['refused']} refused, {totals['taken']} taken, "
        f"{totals['skipped']} from which nothing could be built; {found} finding(s)"
        + (f", kept in {OUT / 'findings'}" if found else "")
    )
    return 1 if found else 0


def start(name: str, seconds: float, engine: str, seed: int) -> tuple[subprocess.Popen[bytes], Path, float]:
    """A process for one target."""
    folder = OUT / "findings" / name
    folder.mkdir(parents=True, exist_ok=True)
    log = OUT / "findings" / f"{name}.log"
    with log.open("wb") as file:
        command = [
            sys.executable,
            __file__,
            "--one",
            "--seconds",
            str(seconds),
            "--engine",
            engine,
            "--seed",
            str(seed),
            name,
        ]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    return process, log, time.monotonic() + seconds + GRACE_S


def ended(name: str, process: subprocess.Popen[bytes], log: Path, totals: dict[str, int]) -> int:
    """Its line of the table; the number of findings."""
    folder = OUT / "findings" / name
    hung = process.poll() is None
    if hung:
        process.kill()
    code = process.wait()
    path = folder / "stats.json"
    said = (
        json.loads(path.read_text())
        if path.exists()
        else {"outcomes": {}, "seconds": 1, "slowest_s": 0, "findings": []}
    )
    outcomes = said["outcomes"]
    findings = list(said["findings"])
    if hung:
        findings.append("hangs where no alarm reaches it")
    findings += [path.name for path in folder.glob("*-*") if path.suffix == "" and path.name.split("-")[0] in LIBFUZZER]
    if code != 0 and not findings:
        findings.append(f"ended with {code}: {log}")
    count = sum(outcomes.values())
    totals["inputs"] += count
    for key in ("refused", "taken", "skipped"):
        totals[key] += outcomes.get(key, 0)
    print(
        f"{name:20} {count:9} {count / max(said['seconds'], 1e-9):9.0f} {outcomes.get('refused', 0):9} {outcomes.get('taken', 0):9} "
        f"{outcomes.get('skipped', 0):8} {said['slowest_s']:7.2f}s  {'; '.join(findings) or '-'}",
        flush=True,
    )
    return len(findings)


WEIGHTS = {
    "bundle-signed": 8,
    "bundle": 4,
    "ledger-signed": 2,
    "kept-signed": 2,
    "yaml-tree": 2,
    "message-signed": 2,
    "charter-signed": 2,
}
"""More time for what is slow, and for the auditor, who reads what everybody else wrote."""
LIBFUZZER = ("crash", "timeout", "oom", "leak", "slow")


def one(name: str, seconds: float, engine: str, seed: int) -> int:
    """The work of one process."""
    from fuzz import engine as engines

    folder = OUT / "findings" / name
    if engine == "atheris":
        engines.guided(name, seconds, folder, OUT / "corpus" / name, seed)
    else:
        engines.unguided(name, seconds, folder, seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
