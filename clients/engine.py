"""The ClientApp that a stock `flower-supernode` runs: one process a message, which puts the site together and answers.

The bundle that comes over the SuperLink only names this module. Which node this is says the SuperNode's own
`--node-config 'hansa-node="/path/node.yaml"'`, or HANSA_NODE in its environment; nothing that came with a run is asked.

Flower sends the words of an exception to the coordinator, and they may hold record values: here none gets that far.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..common.errors import ConfigError, DataError, HansaError, MessageError
from ..common.events import EventLog
from ..common.flower import (
    CLIENT_APP_FAILED,
    HELLO_TYPE,
    ClientApp,
    ConfigRecord,
    Context,
    Error,
    Message,
    RecordDict,
    flowers_own,
)
from ..common.home import Home
from ..common.identity import PASSPHRASE, canonical, read_envelope, strict_json
from ..common.messages import MESSAGE_TYPE
from .settings import NodeSettings, load_settings

LOCK_S = 30.0
"""So long a message waits for the ledger: the process of the one before may still be going, or a command of the steward's."""


class Wordless(ClientApp):
    """A ClientApp whose exceptions become error replies that tell nothing.

    Args:
        answer: does the work; another ClientApp will do.
        failed: told of each exception, for the node's own log.
    """

    def __init__(
        self, answer: Callable[[Message, Context], Message], failed: Callable[[Exception], None] = lambda _: None
    ) -> None:
        super().__init__()
        self._answer = answer
        self._failed = failed

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer, whatever happens."""
        try:
            return self._answer(message, context)
        except Exception as err:
            self._failed(err)
            # Made after the exception is gone: nothing of it hangs on what is sent.
        return Message(Error(CLIENT_APP_FAILED, "the node failed; see its own log"), reply_to=message)


def _answer(message: Message, context: Context) -> Message:
    path = context.node_config.get("hansa-node") or os.environ.get("HANSA_NODE")
    if not path:
        raise ConfigError(
            "this SuperNode does not say which node it is",
            "Start it with --node-config 'hansa-node=\"/path/to/node.yaml\"', or set HANSA_NODE.",
        )
    settings = load_settings(Path(str(path)))
    passphrase = os.environ.get(PASSPHRASE)  # there is nobody to ask
    if message.metadata.message_type == "query.hello":
        return _hello(settings, passphrase, message, context)
    return _work(settings, passphrase, message, context)


def _hello(settings: NodeSettings, passphrase: str | None, message: Message, context: Context) -> Message:
    """Who this is, signed for this SuperNode and this question: no other partner's node can take its place.

    It only tells the coordinator where to send requests. Whether an answer counts is decided by its own signature.
    """
    nonce = str(message.content["hello"]["nonce"])
    if not (len(nonce) == 64 and set(nonce) <= set("0123456789abcdef")):
        raise MessageError("a hello without a nonce")
    identity = Home(settings.home).identity(passphrase)
    said = canonical({"v": 1, "name": identity.name, "node": str(context.node_id), "nonce": nonce})
    record = ConfigRecord({"sealed": identity.seal(HELLO_TYPE, said)})
    return Message(RecordDict({"hello": record}), reply_to=message)


def _work(settings: NodeSettings, passphrase: str | None, message: Message, context: Context) -> Message:
    from .node import assemble, limit  # torch, which a hello does without

    log = _log(settings)
    log.capture()
    limit(settings)
    _until_free(settings.ledger)
    site = assemble(settings, passphrase, log)
    try:
        named = _charter(message)
        for joined in site.joined:
            if joined.signed.sha256 == named:  # only a claim so far: the app of this charter verifies it
                reply = joined.app(message, context)
                return Message(flowers_own(reply.content), reply_to=message)
        raise MessageError("a message under a charter that this node has not joined")
    finally:
        site.close()  # before the reply leaves: the next message's process needs the ledger


def _charter(message: Message) -> str:
    """The charter under which a message says that it is."""
    sealed = message.content["manifest"]["sealed"]
    if not isinstance(sealed, bytes):
        raise MessageError("a message without a manifest")
    return str(strict_json(read_envelope(sealed, MESSAGE_TYPE).payload)["charter_sha256"])


def _until_free(ledger: Path) -> None:
    """Wait until no other process holds the ledger, LOCK_S at most; who opens it then finds out for itself."""
    deadline = time.monotonic() + LOCK_S
    while ledger.exists() and time.monotonic() < deadline:
        with ledger.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass
        time.sleep(0.1)


def _log(settings: NodeSettings) -> EventLog:
    return EventLog(settings.log, sys.stdout)


def _failed(err: Exception) -> None:
    """Tell the SuperNode's own log. Our errors say what to do, but those about data may quote it, as others' may."""
    log = EventLog("text", sys.stdout)
    if isinstance(err, HansaError) and not isinstance(err, DataError):
        log.log("message failed", error=type(err).__name__, reason=err.message)
    else:
        log.failed("message failed", err)


app = Wordless(_answer, _failed)
"""What the bundle's `clientapp` names."""
