"""The one module that touches Flower's private parts; everything else of ours imports Flower from here.

Telemetry and update checks are switched off before Flower is imported: nothing leaves this machine unasked.
"""

from __future__ import annotations

import logging
import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.app import Metadata as _Metadata
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as strategies
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity as _TaskIdentity

# Flower logs every strategy call at INFO; our own display says it once.
logging.getLogger("flwr").setLevel(logging.WARNING)

# Strategies build Message objects, which ask the process who it is. SuperLink sets this; in our processes nobody does.
SERVER_NODE_ID = 1
for _attribute, _value in (("run_id", 1), ("node_id", SERVER_NODE_ID), ("task_id", 0)):
    try:
        getattr(_TaskIdentity, _attribute)
    except RuntimeError:  # unset: we are not under a SuperLink
        setattr(_TaskIdentity, _attribute, _value)


def empty_run() -> Run:
    """The run that a Grid outside of SuperLink operates in."""
    return Run.create_empty(1)


def addressed(
    content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float, message_id: str
) -> Message:
    """A message with its identifier set, as only a Grid may do."""
    metadata = _Metadata(
        run_id=1,
        message_id=message_id,
        src_node_id=SERVER_NODE_ID,
        dst_node_id=dst_node_id,
        reply_to_message_id="",
        group_id=group_id,
        created_at=0.0,
        ttl=ttl,
        message_type=message_type,
    )
    made: Message = Message(content=content, metadata=metadata)  # type: ignore[call-overload]  # a Grid's constructor
    return made


__all__ = [
    "SERVER_NODE_ID",
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Error",
    "Grid",
    "Message",
    "MetricRecord",
    "RecordDict",
    "Run",
    "ServerApp",
    "addressed",
    "empty_run",
    "strategies",
]
