"""Real keys, a real CA, a real gRPC server and real nodes on loopback, in one process: what the link's tests share."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hansa.clients.link import NodeLink, run_links
from hansa.common.connection_ca import ConnectionCA
from hansa.common.events import EventLog
from hansa.common.flower import Array, ArrayRecord, ClientApp, ConfigRecord, Context, Message, MetricRecord, RecordDict
from hansa.common.home import Home
from hansa.server.link import GrpcGrid


@dataclass
class Keys:
    """A CA and homes with certificates of it."""

    root: Path
    ca: ConnectionCA = field(init=False)
    homes: dict[str, Home] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ca = ConnectionCA.create(self.root / "ca")

    def home(self, name: str, folder: str | None = None) -> Home:
        """The home of that name (made once); another `folder` is another identity of the same name."""
        key = folder or name
        if key not in self.homes:
            made = Home.create(self.root / key, name, 365)
            made.install(self.ca.issue((made.path / f"{name}.csr").read_bytes(), 90))
            self.homes[key] = made
        return self.homes[key]


@dataclass
class Net:
    """One coordinator and its nodes."""

    keys: Keys
    names: tuple[str, ...]
    log: io.StringIO = field(default_factory=io.StringIO)
    grid: GrpcGrid | None = None
    running: dict[str, tuple[threading.Event, threading.Thread, NodeLink]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    port: int = 0

    def events(self) -> EventLog:
        return EventLog("json", self.log)

    def start(self, **options: Any) -> GrpcGrid:
        """(Re)start the coordinator's server, on the port it had."""
        options = {**self.options, **options}
        self.grid = GrpcGrid(
            f"127.0.0.1:{self.port}",
            self.keys.home("coordinator"),
            None,
            options.pop("identities", {n: self.keys.home(n).key() for n in self.names}),
            {n: i for i, n in enumerate(self.names, start=1)},
            self.keys.root / "spool",
            self.events(),
            **options,
        )
        self.grid.start()
        self.port = self.grid.port
        return self.grid

    def link(self, name: str, app: ClientApp, home: Home | None = None, **changes: Any) -> NodeLink:
        settings: dict[str, Any] = {
            "address": f"127.0.0.1:{self.port}",
            "proxy": None,
            "home": home or self.keys.home(name),
            "passphrase": None,
            "coordinator": "coordinator",
            "coordinator_key": self.keys.home("coordinator").key(),
            "app": app,
            "context": lambda: Context(
                run_id=1, node_id=1, node_config={"name": name}, state=RecordDict(), run_config={}
            ),
            "inbox": self.keys.root / f"inbox-{name}",
            "crl": None,
            "log": self.events(),
        }
        return NodeLink(**{**settings, **changes})

    def node(self, name: str, app: ClientApp, **changes: Any) -> NodeLink:
        """Start a node's link in a thread of its own."""
        made = self.link(name, app, **changes)
        stop = threading.Event()
        thread = threading.Thread(target=run_links, args=([made], stop), daemon=True)
        thread.start()
        self.running[name] = (stop, thread, made)
        return made

    def halt(self, name: str) -> None:
        stop, thread, _ = self.running.pop(name)
        stop.set()
        thread.join(10)
        assert not thread.is_alive()

    def until_connected(self, *names: str, timeout: float = 15) -> None:
        wanted = set(names or self.names)
        assert self.grid is not None
        grid = self.grid
        until(lambda: wanted <= set(grid.connected()), timeout, lambda: f"{grid.connected()}\n{self.log.getvalue()}")

    def close(self) -> None:
        for name in list(self.running):
            self.halt(name)
        if self.grid is not None:
            self.grid.stop()


@contextlib.contextmanager
def net(root: Path, *names: str, **options: Any) -> Iterator[Net]:
    made = Net(Keys(root), names, options=options)
    try:
        made.start()
        yield made
    finally:
        made.close()


def until(true: Callable[[], object], timeout: float = 10, told: Callable[[], str] = lambda: "") -> None:
    """Wait for something that must come."""
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, f"it did not happen within {timeout} s; {told()}"
        time.sleep(0.01)


def plain_app(calls: list[tuple[str, str]] | None = None) -> ClientApp:
    """A ClientApp that is not ours: it adds one to every array."""
    app = ClientApp()

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        if calls is not None:
            calls.append((str(context.node_config["name"]), message.metadata.message_id))
        name = next(k for k, v in message.content.items() if isinstance(v, ArrayRecord))
        record = message.content[name]
        made = ArrayRecord({key: Array(np.asarray(a.numpy() + 1)) for key, a in record.items()})
        return Message(
            RecordDict({name: made, "metrics": MetricRecord({"num-examples": 3, "loss": 0.5})}), reply_to=message
        )

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 3, "accuracy": 0.75})}), reply_to=message)

    @app.query()
    def _query(message: Message, context: Context) -> Message:
        if message.content.get("fail"):
            raise ValueError("a record value: 4711")
        if (slow := message.content.get("slow")) is not None:
            time.sleep(slow["value"])
        return Message(RecordDict({"who": ConfigRecord({"name": context.node_config["name"]})}), reply_to=message)

    return app


def model(value: float = 0.0, size: int = 6) -> RecordDict:
    """One record of arrays."""
    return RecordDict(
        {"arrays": ArrayRecord({"w": Array(np.full(size, value, np.float32)), "b": Array(np.zeros((), np.float32))})}
    )
