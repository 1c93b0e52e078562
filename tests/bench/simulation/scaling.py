"""How the cost of a simulated round grows: with clients, with parameters, with the population; and the streaming average.

    python tests/bench/simulation/scaling.py --out docs/performance

Writes scaling.json and scaling.png there. Each point is a run of whole.py in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).resolve().parent


def whole(*options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "whole.py"), *options], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def average() -> dict[str, float]:
    """100 updates of 10M parameters: the coordinator's fold, and in-place loops of torch, taking turns. CPU seconds an update."""
    import numpy as np
    import torch

    from hansa.common.messages import squares
    from hansa.server.rounds import _add

    torch.set_num_threads(1)
    n, updates = 10_000_000, 100
    update = np.random.default_rng(0).normal(size=n).astype(np.float32)
    as_torch = torch.from_numpy(update)
    single, double, ours = torch.zeros(n), torch.zeros(n, dtype=torch.float64), np.zeros(n)

    def fold() -> None:
        assert squares(update) < 1e24
        _add(ours, update, 1.0)

    ways = {
        "torch_float32": lambda: single.add_(as_torch, alpha=1 / updates),
        "torch_float64": lambda: double.add_(as_torch.double()),
        "torch_float64_mixed": lambda: double.add_(as_torch),
        "hansa_float64_checked": fold,
    }
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(updates):
        for way, work in ways.items():
            began = time.process_time()
            work()
            spent[way].append(time.process_time() - began)
    return {way: round(statistics.median(each) * updates, 3) for way, each in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    options = parser.parse_args()
    found: dict[str, Any] = {
        "average_100_of_10M_cpu_s": average(),
        "clients": [whole("thousands", "--clients", str(n), "--rounds", "5") for n in (100, 300, 1000, 3000, 10_000)],
        "parameters": [
            whole("thousands", "--clients", "200", "--parameters", str(p), "--rounds", "5")
            for p in (1000, 10_000, 100_000, 1_000_000)
        ],
        "population": [
            whole("million", "--clients", str(n), "--rounds", "5") for n in (1000, 10_000, 100_000, 1_000_000)
        ],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, options.out / "scaling.png")
    print(json.dumps(found["average_100_of_10M_cpu_s"]))


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    titles = ("clients a round (100k parameters)", "parameters (200 clients)", "registered clients (1,000 a round)")
    for axis, key, x, title in zip(
        axes, ("clients", "parameters", "population"), ("clients", "parameters", "clients"), titles, strict=True
    ):
        points = found[key]
        axis.plot(
            [p[x] for p in points], [p["round_wall_s"] for p in points], "o-", color="#225ea8", label="seconds a round"
        )
        axis.set(xscale="log", yscale="log", xlabel=title)
        if key == "population":  # it does not grow: from zero, or noise looks like a trend
            axis.set(yscale="linear", ylim=(0, 2 * max(p["round_wall_s"] for p in points)))
        axis.set_ylabel("seconds a round (median)", color="#225ea8")
        memory = axis.twinx()
        memory.plot([p[x] for p in points], [p["peak_mb"] for p in points], "s--", color="#cc4c02")
        memory.set_ylim(0, 1000)
        memory.set_ylabel("peak MB, all processes", color="#cc4c02")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
