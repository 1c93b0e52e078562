"""The one module, with simulations/runtime.py, that touches Flower's private parts; everything else of ours imports Flower, and gRPC, from here.

Telemetry and update checks are switched off before Flower is imported: nothing leaves this machine unasked.
"""

from __future__ import annotations

import logging
import os

from google.protobuf.message import DecodeError

from .errors import MessageError

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else a line on stderr for whoever knocks without a certificate

import grpc
from flwr.app import (
    DEFAULT_TTL,
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
from flwr.common.constant import ErrorCode as _ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as _ProtoRecordDict
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


# What an error reply says, as Flower's own Grids do.
CLIENT_APP_FAILED: int = _ErrorCode.CLIENT_APP_RAISED_EXCEPTION
MESSAGE_UNAVAILABLE: int = _ErrorCode.MESSAGE_UNAVAILABLE
NODE_UNAVAILABLE: int = _ErrorCode.NODE_UNAVAILABLE


HELLO_TYPE = "application/vnd.hansa.hello+json"
"""What a node signs under Flower's own engine, to say which partner's it is."""


def flowers_own(records: RecordDict) -> RecordDict:
    """Records as Flower's own Grid sends them: it knows Arrays by their very class, and ours read their bytes later."""
    made = RecordDict()
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            record = ArrayRecord({key: Array(a.dtype, a.shape, a.stype, a.data) for key, a in record.items()})
        made[name] = record
    return made


def empty_run() -> Run:
    """The run that a Grid outside of SuperLink operates in."""
    return Run.create_empty(1)


def records_to_bytes(records: RecordDict) -> bytes:
    """Records in Flower's protobuf form."""
    data: bytes = recorddict_to_proto(records).SerializeToString(deterministic=True)
    return data


def records_from_bytes(data: bytes) -> RecordDict:
    """Back from `records_to_bytes`.

    Raises:
        MessageError: not such bytes.
    """
    try:
        return recorddict_from_proto(_ProtoRecordDict.FromString(data))
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError) as err:  # what Flower meets in odd bytes
        raise MessageError("records that cannot be read") from err


def addressed(
    content: RecordDict,
    message_type: str,
    dst_node_id: int,
    group_id: str,
    ttl: float,
    message_id: str,
    created_at: float = 0.0,
) -> Message:
    """A message with its identifier set, as only a Grid may do."""
    metadata = _Metadata(
        run_id=1,
        message_id=message_id,
        src_node_id=SERVER_NODE_ID,
        dst_node_id=dst_node_id,
        reply_to_message_id="",
        group_id=group_id,
        created_at=created_at,
        ttl=ttl,
        message_type=message_type,
    )
    made: Message = Message(content=content, metadata=metadata)  # type: ignore[call-overload]  # a Grid's constructor
    return made


__all__ = [
    "CLIENT_APP_FAILED",
    "DEFAULT_TTL",
    "MESSAGE_UNAVAILABLE",
    "NODE_UNAVAILABLE",
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
    "grpc",
    "records_from_bytes",
    "records_to_bytes",
    "strategies",
]
