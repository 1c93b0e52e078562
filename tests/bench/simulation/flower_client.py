"""Flower's client, in a module of its own: Ray's workers import it. A process keeps the data and one model between messages."""

from __future__ import annotations

from functools import cache

import torch
from bare import plain
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from opacus_client import train_privately
from torch import nn
from workloads import WORKLOADS, Rows

app = ClientApp()


@cache
def _loaded(name: str) -> tuple[list[Rows], nn.Module]:
    """What a process keeps between messages."""
    torch.set_num_threads(1)
    return WORKLOADS[name].data(), WORKLOADS[name].model()


@app.train()
def train(message: Message, context: Context) -> Message:
    workload = WORKLOADS[message.content["config"]["workload"]]
    clients, model = _loaded(workload.name)
    x, y = clients[message.content["config"]["client"]]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    if workload.private:
        train_privately(model, x, y, workload)
    else:
        plain(model, workload)(x, y)
    metrics = MetricRecord({"client": message.content["config"]["client"], "num-examples": len(y)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
