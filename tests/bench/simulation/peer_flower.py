"""Flower's simulation runtime on Ray: two actors of one thread, the Message API, no evaluation, telemetry off.

    .peers/flwr/bin/python peer_flower.py --workload w1

Replies are asked for every 2 ms instead of Flower's 100;
requests reach clients every 100 ms, which nobody outside Flower can change. DP-SGD is Opacus as its documentation has it.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from collections.abc import Mapping
from importlib.metadata import version

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

import flower_client
import harness
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from torch import Tensor
from workloads import Workload

POLL_S = 0.002


def _exchange(grid: Grid, messages: list[Message]) -> list[Message]:
    waiting = set(grid.push_messages(messages))
    replies: list[Message] = []
    while True:
        for reply in grid.pull_messages(waiting):
            if reply.has_error():
                raise RuntimeError(reply.error.reason)
            replies.append(reply)
            waiting.discard(reply.metadata.reply_to_message_id)
        if not waiting:
            return replies
        time.sleep(POLL_S)


def run(workload: Workload, watch: harness.Stopwatch, options: argparse.Namespace) -> Mapping[str, Tensor]:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    clients = len(workload.data())
    server = ServerApp()
    last: dict[str, Tensor] = {}

    @server.main()
    def rounds(grid: Grid, context: Context) -> None:
        while len(nodes := sorted(grid.get_node_ids())) < clients:
            time.sleep(0.1)
        state = {name: value.clone() for name, value in workload.model().state_dict().items()}
        watch.tick()
        for number in range(watch.rounds):
            arrays = ArrayRecord(state)
            messages = [
                Message(
                    content=RecordDict(
                        {"arrays": arrays, "config": ConfigRecord({"workload": workload.name, "client": i})}
                    ),
                    message_type="train",
                    dst_node_id=nodes[i],
                )
                for i in workload.cohort(number, clients)
            ]
            replies = _exchange(grid, messages)
            replies.sort(key=lambda reply: reply.content["metrics"]["client"])
            everyone = sum(reply.content["metrics"]["num-examples"] for reply in replies)
            state = {name: torch.zeros_like(value) for name, value in state.items()}
            for reply in replies:
                share = reply.content["metrics"]["num-examples"] / everyone
                for name, value in reply.content["arrays"].to_torch_state_dict().items():
                    state[name].add_(value, alpha=share)
            watch.tick()
        last.update(state)

    run_simulation(
        server_app=server,
        client_app=flower_client.app,
        num_supernodes=clients,
        backend_config={
            "init_args": {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return last


if __name__ == "__main__":
    harness.main("Flower on Ray", lambda: version("flwr"), run)
