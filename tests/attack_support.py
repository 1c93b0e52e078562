"""A federation on loopback as its commands put it together, in which anybody can be made to lie.

Real keys, a real CA, a real `Service` behind its real `GrpcGrid`, two real nodes put together from their node.yaml and linked as
`hansa node run` links them. What an attacker needs more is here: raw requests of a coordinator, answers that are twisted on
their way out of a node, certificates that only somebody who runs the CA can make.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import itertools
import json
import os
import pickle
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from hansa.clients import node as node_module
from hansa.clients.link import NodeLink, run_links
from hansa.clients.node import Site, assemble
from hansa.clients.registrations import DataFiles
from hansa.clients.registry import Registry
from hansa.clients.settings import NodeSettings, load_settings
from hansa.common.certificates import ENDORSEMENT_OID
from hansa.common.charter import SignedCharter, draft
from hansa.common.config import Federation
from hansa.common.events import EventLog
from hansa.common.flower import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from hansa.common.home import Home
from hansa.common.identity import Identity, canonical, read_envelope
from hansa.common.messages import MESSAGE_TYPE, Manifest, as_they_are
from hansa.common.tasks import code_sha256
from hansa.server import cli as server_cli
from hansa.server.link import GrpcGrid
from hansa.server.rounds import Outcome
from hansa.server.service import Service
from hansa.server.settings import ServerSettings
from hansa.simulations.sources import packaged
from link_support import Keys, until
from support import request

TASK = "heart-disease"
NAMES = ("ada", "ben")
ROWS = 60
ROUNDS = 2
TYPES = {"train": "train", "evaluate": "evaluate"} | {k: f"query.{k}" for k in ("open", "close", "sign", "deliver")}
SPENDING = ("budget", "hold", "debit", "commit", "release", "public")

App = Callable[[Message, Context], Message]
Twist = Callable[[Message, Callable[[], Message]], Message]
"""(request, the honest node's answer) -> what a node that lies answers."""


@dataclass
class Running:
    """A node that is up."""

    settings: NodeSettings
    site: Site
    stop: threading.Event
    thread: threading.Thread


@dataclass
class Town:
    """One coordinator, two partners, a log each."""

    root: Path
    nodes: dict[str, Running] = field(default_factory=dict)
    twists: dict[str, Twist] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)
    count: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.keys = Keys(self.root)
        self.logs = {name: io.StringIO() for name in ("coordinator", *NAMES)}
        self.boss = self.keys.home("coordinator").identity()
        self.signed = self.charter()
        folder = self.keys.home("coordinator").path
        self.signed.save(folder / "charter.json")
        self.service = Service(
            ServerSettings(
                home=folder, charter=folder / "charter.json", listen="127.0.0.1:0", state=self.root / "server"
            )
        )
        self.wire = self.service.wire
        self.model = self.service._initial()
        self.grid = self.service.link(self.log("coordinator"))
        self.grid.start()
        for name in NAMES:
            self.start(name)

    # -- who is there ------------------------------------------------------------------------------------------------

    def draft(self, **changes: Any) -> SignedCharter:
        """A charter of everyone that nobody has signed."""
        said: dict[str, Any] = {
            "name": "town",
            "task": TASK,
            "partners": {n: {"data": "x", "declared_records": ROWS} for n in NAMES},
            "algorithm": {"rounds": ROUNDS, "local": {"steps": 1, "optimizer": {"lr": 0.2}}},
            "privacy": {"epsilon": 100.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 10.0},
            "evaluation": {"kind": "none"},
            "quorum": 1,
            "round_deadline_s": 20.0,
        }
        config = Federation.model_validate({**said, **changes})
        return SignedCharter.unsigned(
            draft(
                config,
                task_sha256=code_sha256(TASK),
                coordinator_key=self.keys.home("coordinator").key(),
                partner_keys={n: self.keys.home(n).key() for n in NAMES},
                noise_multiplier=config.privacy.noise_multiplier,
                simulated=True,
            )
        )

    def charter(self, **changes: Any) -> SignedCharter:
        """A charter of everyone, signed by everyone."""
        signed = self.draft(**changes)
        for name in ("coordinator", *NAMES):
            signed = signed.sign(self.keys.home(name).identity())
        return signed

    def settings(self, name: str, signed: SignedCharter, state: str, site: Mapping[str, Any]) -> NodeSettings:
        """node.yaml, written and read."""
        folder = self.keys.home(name).path
        signed.save(folder / f"{state}.json")
        federation = {"charter": f"{state}.json", "server": f"127.0.0.1:{self.grid.port}"}
        said = {"simulated": True, "federations": [federation], "site": dict(site), "state": state, "log": "json"}
        (folder / "node.yaml").write_text(yaml.safe_dump(said))
        made = load_settings(folder / "node.yaml")
        if not Registry(made.state).all():
            lines = packaged(f"package:{TASK}/cleveland.csv").read_text().splitlines()
            first = 1 + NAMES.index(name) * ROWS
            (folder / "rows.csv").write_text("\n".join([lines[0], *lines[first : first + ROWS]]) + "\n")
            Registry(made.state).add(DataFiles(TASK, folder / "rows.csv", None))
        return made

    def start(self, name: str, **site: Any) -> None:
        """(Re)start a node, with this `site` section in its node.yaml."""
        self.halt(name)
        settings = self.settings(name, self.signed, "state", site)
        made = assemble(settings, None, self.log(name))
        links = node_module.links(made, settings, None, self.log(name))
        for link in links:
            link._app = self._twisted(name, link._app)
        stop = threading.Event()
        thread = threading.Thread(target=run_links, args=(links, stop), daemon=True)
        thread.start()
        self.nodes[name] = Running(settings, made, stop, thread)
        until(lambda: name in self.grid.connected(), 15, lambda: self.logs[name].getvalue())

    def halt(self, name: str) -> None:
        if name in self.nodes:
            node = self.nodes.pop(name)
            node.stop.set()
            node.thread.join(10)
            assert not node.thread.is_alive()
            node.site.close()

    def close(self) -> None:
        for name in NAMES:
            self.halt(name)
        self.grid.stop()
        self.service.close()

    def _twisted(self, name: str, app: App) -> App:
        def answer(message: Message, context: Context) -> Message:
            twist = self.twists.get(name)
            return app(message, context) if twist is None else twist(message, lambda: app(message, context))

        return answer

    # -- what is written down ----------------------------------------------------------------------------------------

    def log(self, name: str) -> EventLog:
        return EventLog("json", self.logs[name])

    def begin(self) -> None:
        """From here on everybody is honest, and logs count."""
        self.twists.clear()
        self.mark()

    def mark(self) -> None:
        self.marks = {name: len(log.getvalue()) for name, log in self.logs.items()}

    def said(self, name: str, event: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """What `name` has logged since the mark, of that event with these fields."""
        lines = self.logs[name].getvalue()[self.marks[name] :].splitlines()
        found = [e for e in map(json.loads, lines) if event in (None, e["event"])]
        return [e for e in found if all(e.get(key) == value for key, value in fields.items())]

    def logged(self, name: str, words: str, event: str | None = None, **fields: Any) -> dict[str, Any]:
        """The line of `name`'s log that has these words in its reason; it must come."""

        def there() -> list[dict[str, Any]]:
            return [e for e in self.said(name, event, **fields) if words in e.get("reason", "")]

        until(there, 10, lambda: f"no {event} with {words!r} in\n{self.logs[name].getvalue()[self.marks[name] :]}")
        return there()[0]

    def ledger(self, name: str) -> list[Any]:
        return list(self.nodes[name].site.ledger.entries)

    def kinds(self, name: str, run: str | None = None) -> list[str]:
        """Types of a partner's entries, of one run or of all."""
        return [e.type for e in self.ledger(name) if run is None or e.body.get("run_id") == run]

    @contextlib.contextmanager
    def nothing_spent(self) -> Iterator[None]:
        """No ledger of any partner says, after this, anything else about spending than before."""
        before = {name: [e for e in self.ledger(name) if e.type in SPENDING] for name in NAMES}
        yield
        assert before == {name: [e for e in self.ledger(name) if e.type in SPENDING] for name in NAMES}

    @contextlib.contextmanager
    def nothing_recorded(self) -> Iterator[None]:
        """Every ledger is as it was."""
        before = {name: self.ledger(name) for name in NAMES}
        yield
        assert before == {name: self.ledger(name) for name in NAMES}

    # -- an honest coordinator ---------------------------------------------------------------------------------------

    def run(self, run_id: str) -> Outcome:
        """A whole run, logged as `hansa server run` does."""
        log = self.log("coordinator")
        notify = lambda event, **facts: server_cli._log(log, run_id, event, facts)  # noqa: E731
        return self.service.coordinator(self.service.roster, notify).run(self.grid, run_id)

    def goes_on(self) -> str:
        """An honest run of everybody; its name."""
        run_id = f"honest-{next(self.count)}"
        until(lambda: set(self.grid.connected()) == set(NAMES), 10, lambda: str(self.grid.connected()))
        outcome = self.run(run_id)
        assert (outcome.why, outcome.refusals, outcome.undelivered) == ("completed", [], [])
        assert [done["partners"] for done in outcome.history] == [len(NAMES)] * ROUNDS
        for name in NAMES:
            assert self.kinds(name, run_id) == ["hold", *["debit", "commit"] * ROUNDS, "release"]
        return run_id

    # -- a coordinator that may do anything --------------------------------------------------------------------------

    def fresh(self) -> str:
        return f"attack-{next(self.count)}"

    def ask(self, kind: str, number: int, run: str, to: str = "ada", **changes: Any) -> Manifest:
        """A request as the round loop makes it, changed."""
        return request(self.signed, kind, number, to, run, **changes)

    def records(self, ask: Manifest, tensors: Any = None) -> RecordDict:
        """The request, signed by the coordinator."""
        return self.wire.encode(ask, self.wire.pack(tensors or {}))[0]

    def message(self, records: RecordDict, kind: str = "train", to: str = "ada", ttl: float = 15.0) -> Message:
        return self.grid.create_message(records, TYPES[kind], self.service.roster[to], "1", ttl)

    def push(self, records: RecordDict, kind: str = "train", to: str = "ada", ttl: float = 15.0) -> Message:
        """Put records on the link; what comes back."""
        replies = list(self.grid.send_and_receive([self.message(records, kind, to, ttl)], timeout=ttl + 5))
        assert replies, f"no answer\n{self.logs[to].getvalue()}"
        return replies[0]

    def send(self, ask: Manifest, tensors: Any = None) -> tuple[Manifest, RecordDict]:
        """A signed request over the link; its signed answer."""
        reply = self.push(self.records(ask, tensors), ask.kind, ask.recipient)
        assert reply.has_content(), reply.error.reason
        return self.wire.decode(reply.content, ask.recipient)[0], reply.content

    def refused(self, reply: Message) -> str:
        """The words of the node that refused a message without answering it."""
        assert reply.has_error()
        return str(reply.error.reason)

    def open(self, run: str) -> None:
        for name in NAMES:
            assert self.send(self.ask("open", 0, run, name))[0].kind == "accepted"

    # -- what only a CA can make -------------------------------------------------------------------------------------

    def thief(self, name: str, stolen: bool) -> Home:
        """A home with a valid certificate in that name for another key: endorsed by another identity, or with the real
        endorsement, which stands in every certificate for all to copy."""
        made = self.keys.home(name, f"thief-{next(self.count)}")
        if stolen:
            real = x509.load_pem_x509_certificate(self.keys.home(name).tls_certificate())
            mine = x509.load_pem_x509_certificate(made.tls_certificate())
            copied = real.extensions.get_extension_for_oid(ENDORSEMENT_OID).value
            forged = x509.CertificateBuilder(mine.issuer, mine.subject, mine.public_key(), mine.serial_number)
            forged = forged.not_valid_before(mine.not_valid_before_utc).not_valid_after(mine.not_valid_after_utc)
            for one in mine.extensions:
                forged = forged.add_extension(copied if one.oid == ENDORSEMENT_OID else one.value, one.critical)
            pem = forged.sign(self.keys.ca._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
            (made.path / "tls.crt").write_bytes(pem + self.keys.ca.certificate)
        return made

    def impostor(self, home: Home, log: io.StringIO) -> GrpcGrid:
        """Another server that wants to be the coordinator's."""
        keys = {name: self.keys.home(name).key() for name in NAMES}
        spool = self.root / f"spool-{next(self.count)}"
        return GrpcGrid("127.0.0.1:0", home, None, keys, self.service.roster, spool, EventLog("json", log))

    def link_to(self, port: int, log: io.StringIO, name: str = "ada") -> NodeLink:
        """A partner's link as its node makes it, to another address."""
        node = self.nodes[name]
        (joined,) = node.site.joined
        entry = joined.entry.model_copy(update={"server": f"127.0.0.1:{port}"})
        site = dataclasses.replace(node.site, joined=(dataclasses.replace(joined, entry=entry),))
        settings = node.settings.model_copy(update={"state": self.root / f"link-{next(self.count)}"})
        (made,) = node_module.links(site, settings, None, EventLog("json", log))
        return made


@contextlib.contextmanager
def linked(link: NodeLink) -> Iterator[None]:
    """A link that is tried until the block ends."""
    stop = threading.Event()
    thread = threading.Thread(target=run_links, args=([link], stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()


# -- bytes that were changed -----------------------------------------------------------------------------------------


def payload_of(records: RecordDict) -> bytes:
    """The bytes of the manifest."""
    return read_envelope(records["manifest"]["sealed"], MESSAGE_TYPE).payload


def enveloped(payload: bytes, signatures: Any) -> bytes:
    """An envelope over any bytes with any signatures."""
    listed = [{"keyid": key, "sig": base64.b64encode(signature).decode()} for key, signature in signatures]
    said = {"payload": base64.b64encode(payload).decode(), "payloadType": MESSAGE_TYPE, "signatures": listed}
    return canonical(said)


def with_sealed(records: RecordDict, sealed: bytes) -> RecordDict:
    """The same chunks under another envelope."""
    return RecordDict({"manifest": ConfigRecord({"sealed": sealed}), "chunks": records["chunks"]})


def edited(records: RecordDict, **changes: Any) -> RecordDict:
    """The manifest changed, the signature kept."""
    old = read_envelope(records["manifest"]["sealed"], MESSAGE_TYPE)
    return with_sealed(records, enveloped(canonical({**json.loads(old.payload), **changes}), old.signatures))


def resealed(records: RecordDict, by: Identity, payload: bytes) -> RecordDict:
    """Any bytes as the manifest, signed."""
    return with_sealed(records, by.seal(MESSAGE_TYPE, payload))


def flipped(records: RecordDict, which: int, bit: int) -> RecordDict:
    """One bit of one chunk changed."""
    chunks = dict(records["chunks"].items())
    key = list(chunks)[which]
    data = bytearray(chunks[key].data)
    data[bit // 8] ^= 1 << bit % 8
    chunks[key] = Array(chunks[key].dtype, tuple(chunks[key].shape), chunks[key].stype, bytes(data))
    return RecordDict({"manifest": records["manifest"], "chunks": as_they_are(chunks)})


def with_arrays(records: RecordDict, arrays: Mapping[str, Array]) -> RecordDict:
    """The manifest with other chunks."""
    return RecordDict({"manifest": records["manifest"], "chunks": ArrayRecord(dict(arrays))})


# -- what executes when it is opened carelessly ----------------------------------------------------------------------


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {shlex.quote(str(self.path))}",)


def npy(path: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Touch(path)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def saved(path: Path, new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": Touch(path)}, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda path: pickle.dumps(Touch(path)),
    "npy": npy,
    "torch": lambda path: saved(path, True),
    "old-torch": lambda path: saved(path, False),
}
"""Name -> the bytes, which would make that file."""
OPENERS: dict[str, Callable[[bytes], Any]] = {
    "pickle": pickle.loads,
    "npy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
    "torch": lambda data: torch.load(io.BytesIO(data), weights_only=False),
    "old-torch": lambda data: torch.load(io.BytesIO(data), weights_only=False),
}
"""The careless ways."""
