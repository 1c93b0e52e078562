"""pfl-research: SimulatedBackend and FederatedAveraging, users' tensors in memory, no evaluation.

    .peers/pfl/bin/python peer_pfl.py --workload w1 [--processes 2] [--privacy sgd|local]

It has no DP-SGD. `sgd` is FederatedAveraging with a training step of ours that does what `bare.py --private once` does, `local` its
own local mechanism: one clip and one Gaussian noise a client and round on top of plain training, which is another protection (of
the client against the server) and less work. Two processes are its own distributed mode: torch.distributed over gloo.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version

import harness
from torch import Tensor
from workloads import Workload


def run(workload: Workload, watch: harness.Stopwatch, options: argparse.Namespace) -> Mapping[str, Tensor]:
    other = _second_process() if options.processes == 2 and "RANK" not in os.environ else None
    import pfl_averaging  # joins the other process

    parameters = pfl_averaging.run(workload, watch, options)
    if other is not None:
        other.wait()
    return parameters


def _second_process() -> subprocess.Popen[bytes]:
    """Rank 1 as a child of this process, which becomes rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "bench",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    other = [argument for argument in sys.argv if argument != "--paced"]
    child = subprocess.Popen(
        [sys.executable, *other], env=os.environ | {"RANK": "1", "LOCAL_RANK": "1"}, stdin=subprocess.DEVNULL, stdout=2
    )
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    return child


if __name__ == "__main__":
    parser = harness.arguments()
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--privacy", choices=("sgd", "local"), default="sgd")
    harness.main("pfl-research", lambda: version("pfl"), run, parser)
