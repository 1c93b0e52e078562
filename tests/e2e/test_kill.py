"""`kill -9` anywhere, then `--resume`: nothing that was acknowledged is lost, nothing is paid twice, the audit verifies."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from e2e_support import (
    HOSPITALS,
    Fault,
    Forked,
    Result,
    call,
    federation,
    ledgers,
    of_type,
    process,
    script,
    whole_lines,
    write,
)

ROUNDS = 2
CONFIG = federation(rounds=ROUNDS)
PRIVATE = federation(rounds=ROUNDS, evaluation="{kind: private, test_fraction: 0.2, noise_multiplier: 20.0}")
POPULATION = federation(
    rounds=ROUNDS,
    who="task: digits\npopulation: {dataset: digits, clients: 110}",
    privacy="{kind: local, epsilon: 4.0, delta: 1.0e-3, clip_norm: 1.0}",
    more="",
)


def standing(bundle: Path) -> dict[str, list[bytes]]:
    """Every acknowledged ledger line of a bundle."""
    return {owner: whole_lines(path) for owner, path in ledgers(bundle).items()}


def nothing_lost(before: dict[str, list[bytes]], bundle: Path) -> None:
    """Every line that was acknowledged stands where it stood."""
    now = standing(bundle)
    for owner, lines in before.items():
        assert now[owner][: len(lines)] == lines, f"acknowledged lines of {owner} are gone or changed"


def paid_exactly(bundle: Path, rounds: int = ROUNDS, evaluations: int = 0) -> None:
    """Each partner debited each planned round once, within one hold, and released what was left."""
    for name in HOSPITALS:
        book = ledgers(bundle)[name]
        debits = Counter((d["purpose"], d["round"]) for d in of_type(book, "debit"))
        wanted = {("train", r): 1 for r in range(1, rounds + 1)}
        wanted |= {("evaluate", r): 1 for r in range(1, evaluations + 1)}
        assert debits == wanted, f"{name}: {debits}"
        assert len(of_type(book, "hold")) == 1, name
        assert [r["why"] for r in of_type(book, "release")] == ["closed"], name
        committed = {c["request_id"] for c in of_type(book, "commit")}
        assert {d["request_id"] for d in of_type(book, "debit")} == committed, name


def resume(forked: Forked, config: Path, out: Path, folder: Path) -> Result:
    """Go on after a kill, and hold the bundle against everything that must be true of it."""
    before = standing(out)
    done = forked.run("simulate", config, "--out", out, "--resume", folder=folder).expect(0)
    nothing_lost(before, out)
    call("audit", out).expect(0).says("VERIFIED")
    return done
