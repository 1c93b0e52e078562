"""1,000,000 registered clients, 1,000 in a round: start-up below 5 s and peak below 1 GB, as of 1,000 registered (issue 6).

Local work is one constant update: what is measured is what the number of registered clients costs, in the round loop, run ledger,
result, report and audit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).parents[1] / "population_support.py"


def measured(folder: Path, clients: int) -> dict[str, Any]:
    folder.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SUPPORT), str(folder), str(clients), "5", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print("\n", clients, found)
    return found


@pytest.mark.bench
def test_a_million_registered_cost_what_a_thousand_cost(tmp_path: Path) -> None:
    thousand, million = (measured(tmp_path / str(n), n) for n in (1000, 1_000_000))
    assert million["verified"], million
    assert million["start_up_s"] < 5
    assert million["run_mb"] < 1000
    assert million["run_s"] < 2 * thousand["run_s"] + 2
    assert million["verify_s"] < 10
    assert million["verify_mb"] < 1000
