"""Hansa's own simulation: cohorts as one stacked model, or one client after the other, in one process or a worker a core.

python hansa_engine.py --workload w1 [--workers 2]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.metadata import version

import harness
from torch import Tensor
from workloads import Workload


def run(workload: Workload, watch: harness.Stopwatch, workers: int) -> Mapping[str, Tensor]:
    """Simulate `watch.rounds` rounds from `workload.model()` on `workload.data()`.

    Round `number` trains `workload.cohort(number, clients)`: one epoch of consecutive batches, or DP-SGD where
    `workload.private`; the average is weighted by rows. Call `watch.tick()` before the first round and after every one.

    Returns:
        The last global parameters by name.
    """
    raise NotImplementedError("the engine is not connected to this benchmark yet")


def _run(workload: Workload, watch: harness.Stopwatch, options: argparse.Namespace) -> Mapping[str, Tensor]:
    return run(workload, watch, options.workers)


if __name__ == "__main__":
    parser = harness.arguments()
    parser.add_argument("--workers", type=int, default=1)
    harness.main("Hansa", lambda: version("hansa"), _run, parser)
