"""Mutation testing of what money and law depend on: `make mutants`, or

    python tests/mutation [--sample N] [--seed 0] [--minutes M] [--longest 2] [accounting] [odometer] [verifier]

Works in a copy of the tree under the system's temporary folder, so nothing here is touched. cosmic-ray makes the mutants, in a virtual
environment of its own (.mutants); results go to out/mutants. docs/mutation-testing.md says what they mean.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COSMIC_RAY = "cosmic-ray==8.7.0"
SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "accounting": (
        ("common/accounting.py", "common/curves.py"),
        (
            "tests/common/test_accounting.py",
            "tests/common/test_accounting_mutants.py",
            "tests/statistical/test_accounting_oracle.py",
        ),
    ),
    "odometer": (
        ("common/privacy_loss.py",),
        (
            "tests/common/test_accounting.py",
            "tests/common/test_accounting_mutants.py",
            "tests/common/test_privacy_loss.py",
            "tests/statistical/test_accounting_oracle.py",
        ),
    ),
    "verifier": (
        ("common/verifier.py",),
        (
            "tests/common/test_verifier.py",
            "tests/common/test_verifier_witnesses.py",
            "tests/common/test_verifier_secure.py",
            "tests/common/test_tampering.py",
            "tests/common/test_verifier_mutants.py",
            "tests/common/test_verifier_mutants_import.py",
            "tests/common/test_verifier_mutants_rest.py",
        ),
    ),
}
"""What is mutated, and the tests that must notice: without those marked slow (QUICK)."""
QUICK = "not slow and not soak and not bench"


def main() -> int:
    """See above."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--sample", type=int, default=0, help="so many of each set, drawn at random; 0: all")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--minutes", type=float, default=1e9, help="stop after so many a set")
    asked.add_argument("--longest", type=float, default=2.0, help="tests that take longer (traced) are left out")
    asked.add_argument("--only", default="", help="ids from results, with commas: try these again")
    asked.add_argument("--again", type=Path, help="earlier results: without those that were noticed there")
    asked.add_argument("--list", action="store_true", help="count the mutants and stop")
    asked.add_argument("sets", nargs="*")
    args = asked.parse_args()
    unknown = set(args.sets) - set(SETS)
    if unknown:
        print(f"no set {', '.join(sorted(unknown))}; there are {', '.join(SETS)}", file=sys.stderr)
        return 2
    tool = ROOT / ".mutants"
    if not (tool / "bin" / "cosmic-ray").exists():
        subprocess.run([sys.executable, "-m", "venv", str(tool)], check=True)
        subprocess.run([str(tool / "bin" / "pip"), "install", "-q", COSMIC_RAY], check=True)
    with tempfile.TemporaryDirectory(prefix="hansa-mutants-") as folder:
        copy = Path(folder) / "tree"
        skip = shutil.ignore_patterns(
            ".git", ".venv", ".mutants", ".proto", "out", "__pycache__", ".*_cache", ".hypothesis"
        )
        shutil.copytree(ROOT, copy, symlinks=True, ignore=skip)
        for name in args.sets or SETS:
            one_set(name, args, copy, tool)
    return 0


def one_set(name: str, args: argparse.Namespace, copy: Path, tool: Path) -> None:
    """Enumerate, draw, try, tell."""
    files, tests = SETS[name]
    files = tuple(file for file in files if (copy / file).exists())
    tests = tuple(test for test in tests if test.startswith("--") or (copy / test).exists())
    listing = subprocess.run(
        [str(tool / "bin" / "python"), str(copy / "tests/mutation/enumerate_mutants.py"), *files],
        cwd=copy, check=True, capture_output=True,
    )  # fmt: skip
    mutants = json.loads(listing.stdout)
    total = len(mutants)
    if args.only:
        mutants = [m for m in mutants if m["id"] in args.only.split(",")]
    if args.again:
        noticed = {_key(m) for m in json.loads(args.again.read_text()) if m["result"] in ("killed", "timeout")}
        mutants = [m for m in mutants if _key(m) not in noticed]
    if 0 < args.sample < len(mutants):
        mutants = random.Random(args.seed).sample(mutants, args.sample)
        mutants.sort(key=lambda m: (m["file"], m["line"]))
    cold = [m for m in mutants if m["cold"]]
    print(
        f"{name}: {total} mutants of {', '.join(files)}; {len(mutants)} are tried, {len(cold)} of them at import",
        flush=True,
    )
    if args.list:
        return
    work = copy / "mutants.json"
    work.write_text(json.dumps([m for m in mutants if not m["cold"]]))
    out = ROOT / "out" / "mutants" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    began = time.monotonic()
    environment = {
        **os.environ,
        "PYTHONPATH": f"{copy / '.dev'}:{copy / 'tests'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        str(copy / "tests/mutation/session.py"),
        json.dumps(files),
        json.dumps(tests),
        str(work),
        str(out),
    ]
    subprocess.run([*command, str(args.longest), str(args.minutes * 60)], cwd=copy, env=environment, check=True)
    results = json.loads(out.read_text())
    if cold and try_cold({**cold[0], "at": 0, "to": 0, "text": ""}, copy, tests, environment)["result"] != "survived":
        raise SystemExit("the tests fail without any mutant: nothing would be learnt from those at import")
    for mutant in cold:
        if time.monotonic() - began > args.minutes * 60:
            break
        results.append(try_cold(mutant, copy, tests, environment))
        out.write_text(json.dumps(results, indent=1))
    table(name, results, total, time.monotonic() - began)


def _key(mutant: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(mutant[part] for part in ("file", "where", "operator", "before", "after"))


def try_cold(mutant: dict[str, Any], copy: Path, tests: tuple[str, ...], environment: dict[str, str]) -> dict[str, Any]:
    """A mutant of what a module does when it is imported: in the file, by a process of its own."""
    path = copy / mutant["file"]
    source, began = path.read_text(), time.monotonic()
    path.write_text(source[: mutant["at"]] + mutant["text"] + source[mutant["to"] :])
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", QUICK, *tests]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=600, check=False)
        result = "survived" if done.returncode == 0 else "killed"
    except subprocess.TimeoutExpired:
        result = "timeout"
    finally:
        path.write_text(source)
    return {**mutant, "result": result, "by": "", "seconds": round(time.monotonic() - began, 2), "tests": -1}


def table(name: str, results: list[dict[str, Any]], total: int, seconds: float) -> None:
    """What came of it."""
    counts = Counter(one["result"] for one in results)
    print(f"\n{name}: {len(results)} of {total} mutants in {seconds:.0f} s: {dict(counts)}")
    for one in results:
        if one["result"] not in ("killed", "timeout"):
            print(f"  {one['id']:16} {one['file']}:{one['line']} {one['where']}  [{one['operator']}] {one['result']}")
            print(f"      - {one['before']}\n      + {one['after']}")


if __name__ == "__main__":
    sys.exit(main())
