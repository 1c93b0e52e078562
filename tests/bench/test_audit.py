"""Measured figures of an audit: `make bench`."""

from __future__ import annotations

import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hansa.common.verifier import verify_bundle

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))
from bundles import any_shape, honest, with_many_debits

pytestmark = pytest.mark.bench
ROOT = Path(__file__).parents[2]


def event(q: float, sigma: float, steps: int) -> dict[str, Any]:
    return {"mechanism": "poisson-gaussian/1", "q": repr(q), "sigma": repr(sigma), "steps": steps}


def fifty_kinds(count: int) -> list[dict[str, Any]]:
    rng = random.Random(1)
    kinds = [event(10 ** rng.uniform(-3, -1), 10 ** rng.uniform(0.3, 1.3), rng.randint(1, 9)) for _ in range(50)]
    return [rng.choice(kinds) for _ in range(count)]


def all_different(count: int) -> list[dict[str, Any]]:
    rng = random.Random(2)
    return [event(10 ** rng.uniform(-4, -1), 10 ** rng.uniform(0.5, 2), rng.randint(1, 99)) for _ in range(count)]


def hostile(count: int) -> list[dict[str, Any]]:
    """Every corner of what a header may say, and what lies next to it."""
    rng = random.Random(3)
    rates, sigmas = (5e-324, 1e-300, 1e-30, 1e-9, 1e-4, 0.5, 1 - 1e-16, 1.0), (0.3, 0.5, 1.0, 30.0, 1e9, 1e300)
    counts = (1, 1000, 10**6, 10**9)
    found = []
    for _ in range(count):
        q, sigma = rng.choice(rates), rng.choice(sigmas)
        found.append(
            event(
                min(1.0, q * rng.choice([1.0, rng.uniform(1, 2)])) or 5e-324,
                sigma * rng.uniform(1, 1.5),
                rng.choice(counts),
            )
        )
    return found


def almost_nothing(count: int) -> list[dict[str, Any]]:
    """Tiny rates, huge numbers of steps: together they cost something."""
    return [event(1e-6 * (1 + n / count), 0.3 + n / count / 10, 10**4) for n in range(count)]


@pytest.mark.parametrize(
    ("events", "count", "seconds"),
    [(fifty_kinds, 3330, 10), (all_different, 1000, 30), (hostile, 1000, 30), (almost_nothing, 1000, 30)],
)
def test_seconds(tmp_path: Path, events: Callable[[int], list[dict[str, Any]]], count: int, seconds: float) -> None:
    made = with_many_debits(events(count))
    folder = made.write(tmp_path / "b")
    verify_bundle(ROOT / "tests/vectors/bundle")  # what has to be imported is
    began = time.perf_counter()
    verdict = verify_bundle(folder)
    took = time.perf_counter() - began
    partner = verdict["partners"]["hospital-0"]
    figures = {key: partner[key] for key in ("epsilon", "epsilon_filter", "entries", "debits")}
    coarse = [w["what"] for w in verdict["warnings"] if w["code"] == "coarse"]
    print(f"\n{events.__name__}: {took:.1f} s, {figures}, {coarse}")
    assert {v["code"] for v in verdict["violations"]} <= {"over_budget"}
    assert partner["debits"] == count + 1
    assert math.isfinite(partner["epsilon"])
    assert math.isfinite(partner["epsilon_filter"])
    assert 0 < partner["epsilon"] <= partner["epsilon_filter"]
    assert took < seconds


def test_no_false_alarm_on_200_honest_bundles(tmp_path: Path) -> None:
    warned = violations = 0
    for seed in range(200):
        made = honest(any_shape(seed))
        verdict = verify_bundle(made.write_for_real(tmp_path / "b") if seed % 2 else made.write(tmp_path / "b"))
        violations += bool(verdict["violations"])
        warned += bool(verdict["warnings"])
        assert verdict["violations"] == [], (any_shape(seed), verdict["violations"])
    print(f"\n200 honest bundles: {violations} false alarms, {warned} with warnings")


def test_alone_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """The file copied beside a virtual environment with its two packages, and nothing of torch, flwr, opacus or Hansa."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = str(tmp_path / "venv/bin/python")
    install = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "cryptography>=44",
        "dp-accounting>=0.6,<0.7",
    ]
    subprocess.run(install, check=True, timeout=600)
    took = time.perf_counter() - began
    size = sum(
        path.stat().st_size for path in (tmp_path / "venv").rglob("*") if path.is_file() and not path.is_symlink()
    )
    shutil.copy(ROOT / "common/verifier.py", tmp_path)
    began = time.perf_counter()
    done = subprocess.run(
        [python, "-I", "verifier.py", str(ROOT / "tests/vectors/bundle")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    audit = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    absent = "import importlib.util as u; print([n for n in ('torch', 'flwr', 'opacus', 'hansa', 'pydantic') if u.find_spec(n)])"
    found = subprocess.run([python, "-I", "-c", absent], capture_output=True, text=True, check=True, timeout=60).stdout
    assert found.strip() == "[]"
    print(f"\ninstalled in {took:.0f} s, {size / 2**20:.0f} MiB; audited tests/vectors/bundle in {audit:.1f} s")
