"""Every parser at a trust boundary, as a function of bytes that may raise nothing but what its callers expect.

A target `x` takes the bytes themselves. A target `x-signed` (-built, -tree) takes JSON, and seals, signs, hashes or lays it out as whoever
holds the right key would: the real adversary is a partner or a coordinator that lies, not somebody who flips bits.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import functools
import io
import json
import random
import shutil
import struct
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fuzz import corpus
from fuzz.mutate import bent, splice, tree
from hansa.common.errors import HansaError

ROOT = Path(__file__).parents[2]
Seeds = Callable[[], Sequence[bytes]]


class Skip(Exception):
    """An input from which nothing can be built: it costs time and proves nothing."""


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        run: raises HansaError (or `also`) for what it refuses, Skip for what is no input, and nothing else.
        json: inputs are JSON and mutated as trees.
    """

    name: str
    seeds: Seeds
    run: Callable[[bytes], None]
    json: bool = False
    also: tuple[type[BaseException], ...] = ()
    words: tuple[bytes, ...] = ()

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        """A changed input."""
        if self.json and rng.randrange(10):
            return tree(data, rng)
        return splice(data, rng, self.examples())

    def examples(self) -> Sequence[bytes]:
        return _examples(self.name)

    def feed(self, data: bytes) -> str:
        """Run it: "taken", "refused" or "skipped". What else it raises is a finding."""
        try:
            self.run(data)
        except (HansaError, *self.also):
            return "refused"
        except Skip:
            return "skipped"
        return "taken"


TARGETS: dict[str, Target] = {}


@functools.cache
def _examples(name: str) -> Sequence[bytes]:
    return list(TARGETS[name].seeds())


def target(
    name: str, seeds: Seeds, *, also: tuple[type[BaseException], ...] = (), words: tuple[bytes, ...] = ()
) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Register a target."""

    def register(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        TARGETS[name] = Target(name, seeds, run, False, also, words)
        return run

    return register


def of_json(
    name: str, seeds: Callable[[], Sequence[Any]], *, also: tuple[type[BaseException], ...] = ()
) -> Callable[[Callable[[Any], None]], Callable[[bytes], None]]:
    """Register a target whose input is JSON."""

    def register(run: Callable[[Any], None]) -> Callable[[bytes], None]:
        def fed(data: bytes) -> None:
            with building():
                said = json.loads(data)
            run(said)

        TARGETS[name] = Target(name, lambda: [json.dumps(seed).encode() for seed in seeds()], fed, True, also)
        return fed

    return register


@contextlib.contextmanager
def building() -> Any:
    """What goes wrong while the input is put together is the fuzzer's own affair."""
    try:
        yield
    except Skip:
        raise
    except (
        ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError, OSError, binascii.Error,
        struct.error, HansaError, AssertionError,
    ) as err:  # fmt: skip
        raise Skip from err


# -- configuration ---------------------------------------------------------------------------------------------------------


def yaml_files(*names: str) -> list[bytes]:
    return [(ROOT / name).read_bytes() for name in names]


NODE_YAML = b"""\
home: .
state: state
simulated: true
federations:
  - charter: charter.json
    server: coordinator.example:8440
    proxy: http://user:secret@proxy.example:3128
  - {charter: b.json, server: "[::1]:9"}
site: {threads: 1, approval: false, epsilon_cap: 1.0, hours: "20:00-06:00", memory_mb: 4096, minimum_cohort: 3, tasks: [heart-disease]}
log: json
"""
SERVER_YAML = b"home: .\ncharter: charter.json\nlisten: '0.0.0.0:8440'\nstate: state\nrevoked: revoked.crl\nwait_for_nodes_s: 3.5\nuploads: 4\nlog: json\n"
YAML_WORDS = (b"!!python/object/apply:os.system", b"&a", b"*a", b"<<: *a", b"? ", b"- ", b"!!binary", b"!!timestamp", b"2001-99-99",
              b".inf", b"0x", b"1_0", b"!!set", b"!!omap", b"%YAML 1.1", b"---", b"...", b"|", b">", b"\t", b"{", b"[")  # fmt: skip
ALIASES = b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nname: *c\n"


def as_yaml(said: Any) -> bytes:
    import yaml

    with building():
        return yaml.safe_dump(said, allow_unicode=True).encode("utf-8", "surrogatepass")


@target("config", lambda: [*yaml_files("configs/heart.yaml", "configs/digits.yaml"), ALIASES], words=YAML_WORDS)
def _config(data: bytes) -> None:
    from hansa.common.config import load_config

    load_config(corpus.file(data, "federation.yaml"))


@target("node-yaml", lambda: [NODE_YAML, ALIASES], words=YAML_WORDS)
def _node_yaml(data: bytes) -> None:
    from hansa.clients.settings import load_settings

    load_settings(corpus.file(data, "node.yaml"))


@target("server-yaml", lambda: [SERVER_YAML, ALIASES], words=YAML_WORDS)
def _server_yaml(data: bytes) -> None:
    from hansa.server.settings import load_settings

    load_settings(corpus.file(data, "server.yaml"))


def yaml_trees() -> list[Any]:
    import yaml

    sources = {
        "config": yaml_files("configs/heart.yaml", "configs/digits.yaml"),
        "node": [NODE_YAML],
        "server": [SERVER_YAML],
        "schema": yaml_files("common/tasks/heart_disease.yaml"),
    }
    return [{kind: yaml.safe_load(data)} for kind, found in sources.items() for data in found]


@of_json("yaml-tree", yaml_trees)
def _yaml_tree(said: Any) -> None:
    with building():
        ((kind, value),) = said.items()
        run = {"config": _config, "node": _node_yaml, "server": _server_yaml, "schema": _schema}[kind]
        data = as_yaml(value)
    run(data)


@target("schema", lambda: [*yaml_files("common/tasks/heart_disease.yaml"), ALIASES], words=YAML_WORDS)
def _schema(data: bytes) -> None:
    from hansa.common.tasks.schema import load_schema

    load_schema(corpus.file(data, "schema.yaml"))


# -- charter ---------------------------------------------------------------------------------------------------------------


def _read_charter(data: bytes) -> None:
    from hansa.common.charter import SignedCharter, in_words

    signed = SignedCharter.parse(data)
    signed.missing()
    in_words(signed).encode()
    assert signed.to_bytes().strip() == data.strip()
    signed.verify()
    signed.verify(datetime.now(UTC))


@target("charter", lambda: [corpus.charter().to_bytes()])
def _charter(data: bytes) -> None:
    _read_charter(data)


@of_json("charter-signed", lambda: [json.loads(corpus.charter().payload)])
def _charter_signed(said: Any) -> None:
    from hansa.common.charter import CHARTER_TYPE

    with building():
        data = corpus.seal(CHARTER_TYPE, bent(said), *(corpus.identity(n) for n in corpus.NAMES))
    _read_charter(data + b"\n")


# -- ledgers, heads, closings ----------------------------------------------------------------------------------------------


def ledger_file() -> bytes:
    return (corpus.bundle() / "partners" / "cleveland" / "ledger.jsonl").read_bytes()


def _read_ledger(data: bytes, key: str | None) -> None:
    from hansa.common.ledger import UNDISCLOSED, owner_line, read_ledger, redacted
    from hansa.common.merkle import Tree

    path = corpus.file(data, "ledger.jsonl")
    entries, torn = read_ledger(path, key)
    assert data.endswith(torn)
    if entries:
        owner_line(entries[0])
        Tree(entry.leaf for entry in entries).inclusion(len(entries) - 1, len(entries))
        if key is not None:
            copy = redacted(data, lambda entry: entry.seq % 2 == 0, key)
            found, _ = read_ledger(corpus.file(copy, "copy.jsonl"), key)
            assert [e.root for e in found] == [e.root for e in entries]
            assert all(e.type == UNDISCLOSED for e in found[1::2])


@target("ledger", lambda: [ledger_file(), b"".join(ledger_file().splitlines(True)[:3])])
def _ledger(data: bytes) -> None:
    _read_ledger(data, corpus.identity("cleveland").key)
    _read_ledger(data, None)


@of_json("ledger-signed", lambda: [[corpus.line_of(line) for line in ledger_file().splitlines()]])
def _ledger_signed(said: Any) -> None:
    with building():
        data, _ = corpus.ledger_bytes(said, corpus.identity("cleveland"))
    _read_ledger(data, corpus.identity("cleveland").key)
    _read_ledger(data, None)


def counter_file() -> bytes:
    from hansa.common.ledger import Counter, Ledger

    path, counter = corpus.scratch() / "counted.jsonl", corpus.scratch() / "counted"
    if not counter.exists():
        book = Ledger(path, corpus.identity("ada"), {"owner": "ada", "role": "partner"}, Counter(counter))
        for _ in range(3):
            book.append("refuse", {})
        book.close()
    return counter.read_bytes()


@target("counter", lambda: [counter_file(), b"", counter_file()[:256]])
def _counter(data: bytes) -> None:
    from hansa.common.ledger import Counter, read_ledger

    counter_file()
    counter = Counter(corpus.file(data, "counter"))
    try:
        counter.check(read_ledger(corpus.scratch() / "counted.jsonl")[0])
    finally:
        counter.close()


def head_lines() -> list[bytes]:
    return [line for p in sorted((corpus.bundle() / "heads").glob("*.jsonl")) for line in p.read_bytes().splitlines()]


@target("heads", lambda: [b"".join(line + b"\n" for line in head_lines()[:4]), head_lines()[0]])
def _heads(data: bytes) -> None:
    from hansa.common.heads import KeptHeads

    everyone = {name: one.key for name, one in corpus.people().items()}
    kept = KeptHeads(corpus.file(data, "heads.jsonl"), corpus.identity("coordinator"), everyone)
    try:
        for name in everyone:
            kept.newest(name)
    finally:
        kept.close()


@functools.cache
def grown() -> Any:
    from hansa.common.ledger import Ledger

    book = Ledger(
        corpus.scratch() / "grown.jsonl",
        corpus.identity("ada"),
        {"owner": "ada", "ledger_id": "1" * 32, "role": "partner"},
    )
    for _ in range(8):
        book.append("refuse", {})
    return book


def head_seeds() -> list[Any]:
    book = grown()
    says = {"v": 1, "owner": "ada", "ledger_id": "1" * 32}
    return [
        {
            "early": {**says, "length": n, "root": book.entries[n - 1].root},
            "late": {**says, "length": 9, "root": book.root},
            "by": ["ada", "ben"],
            "proof": book.consistency(n),
        }
        for n in (1, 4, 5, 9)
    ]


@of_json("head-signed", head_seeds)
def _head_signed(said: Any) -> None:
    from hansa.common.heads import HEAD_TYPE, read_head

    with building():
        who = [corpus.identity(name) for name in said["by"][:9] if name in corpus.NAMES]
        early, late = (corpus.seal(HEAD_TYPE, bent(said[key]), *who) for key in ("early", "late"))
        proof = said["proof"]
    first, second = (read_head(sealed, corpus.keys()) for sealed in (early, late))
    second.extends(first, proof)
    again = second.countersigned(corpus.identity("cy"))
    assert read_head(again.sealed, corpus.keys()) == again


def witness_seeds() -> list[Any]:
    from hansa.common.heads import sign_head
    from hansa.common.witness import asking, signatures, telling

    book = grown()
    head = sign_head(corpus.identity("ada"), book)
    signed = head.countersigned(corpus.identity("ben"))
    return [
        {
            "asked": asking(None, [1, 4], [(head, book.consistency(4))]),
            "told": telling(corpus.identity("ada"), book, [1, 4, 9]),
            "witnessed": signatures({"ada": signed}, corpus.identity("ben").key),
            "stands": {"ada": 4},
        }
    ]


@of_json("witness", witness_seeds)
def _witness(said: Any) -> None:
    from hansa.common.heads import sign_head
    from hansa.common.identity import strict_json
    from hansa.common.witness import Asked, standing, told, with_signatures

    with building():  # they are fields of a message, which was read so
        fields = strict_json(bent(said))
        asked, tells, witnessed, stands = (fields[key] for key in ("asked", "told", "witnessed", "stands"))
    heads = {"ada": sign_head(corpus.identity("ada"), grown())}
    refused = None
    for parse in (
        lambda: Asked.parse(asked, corpus.keys(), "ben"),
        lambda: told(tells, corpus.keys(), "ada"),
        lambda: with_signatures(witnessed, heads, corpus.identity("ben").key),
        lambda: standing(stands, heads),
    ):
        try:
            parse()
        except HansaError as err:
            refused = err
    if refused is not None:
        raise refused


def closing_file() -> bytes:
    return next((corpus.bundle() / "closing").iterdir()).read_bytes()


def _read_closing(data: bytes) -> None:
    from hansa.common.charter import SignedCharter
    from hansa.common.closing import read_closing

    signed = SignedCharter.parse((corpus.bundle() / "charter.json").read_bytes())
    everyone = {name: one.key for name, one in corpus.people().items()}
    read_closing(data, everyone, signed.sha256)


@target("closing", lambda: [closing_file()])
def _closing(data: bytes) -> None:
    _read_closing(data)


@of_json("closing-signed", lambda: [corpus.payload_of(closing_file())])
def _closing_signed(said: Any) -> None:
    from hansa.common.closing import CLOSING_TYPE, sign_closing

    with building():
        payload = bent(said)
        data = corpus.seal(CLOSING_TYPE, payload, *corpus.people().values())
    head = {"length": 1, "root": "0" * 64}
    with contextlib.suppress(HansaError):
        sign_closing(
            corpus.identity("cleveland"), payload, "run-1", "c" * 64, ["cleveland", "coordinator", "hungary"], head
        )
    _read_closing(data)


# -- accounting ------------------------------------------------------------------------------------------------------------

EVENT = {"mechanism": "poisson-gaussian/1", "q": "0.1", "sigma": "1.5", "steps": 6}


def accounts() -> list[Any]:
    from hansa.common.accounting import Budget

    budgets = [Budget.create(e, d).to_fields() for e, d in ((0.5, 1e-5), (1.0, 1e-4), (8.0, 1e-6))]
    wide = [{**EVENT, "q": "1.0", "steps": 100}, {**EVENT, "sigma": "0.31"}, {**EVENT, "q": "1e-07", "steps": 10**9}]
    return [
        {"budget": budget, "events": events} for budget in budgets for events in ([EVENT], [EVENT, *wide], [EVENT] * 20)
    ]


@of_json("budget", accounts)
def _budget(said: Any) -> None:
    from hansa.common.accounting import Budget, PrivacyEvent

    with building():
        fields, events = said["budget"], said["events"][:50]
        if not all(isinstance(one, dict) for one in (fields, *events)):  # they are read from objects of a ledger's data
            raise Skip
    history = [PrivacyEvent.from_fields(event) for event in events]
    budget = Budget.from_fields(fields)
    spent = budget.spent(history)
    assert spent >= 0, spent
    assert budget.admits(history) == (spent <= budget.epsilon)
    assert Budget.from_fields(budget.to_fields()) == budget
    assert [PrivacyEvent.from_fields(event.to_fields()) for event in history] == history


SHARED = {
    "mechanism": "shared-gaussian/1", "q": "1.0", "sigma": "9.5", "clip": "1.0", "grid": "0.0001220703125",
    "dimension": 72, "quorum": 4, "colluding": 1, "steps": 1,
}  # fmt: skip


@of_json("shared-event", lambda: [SHARED, {**SHARED, "q": "0.01", "steps": 10**9}, {**SHARED, "dimension": 10**6}])
def _shared_event(said: Any) -> None:
    from hansa.common.plan import event_from
    from hansa.common.shared_noise import SharedGaussian

    with building():
        if not isinstance(said, dict):
            raise Skip
    event = event_from(said)
    again = SharedGaussian.from_fields(said)
    assert again.charged == event
    assert again.to_fields() == said
    assert 0.3 <= again.charged.noise_multiplier < again.noise_multiplier


# -- secure aggregation ----------------------------------------------------------------------------------------------------

MASKERS = ("ada", "ben", "cy")


@functools.cache
def masked() -> Any:
    """(agreement, private keys, envelopes, what each sent, words, signatures): three partners, of whom all survive."""
    import numpy as np

    from hansa.common import secagg

    private = {name: bytes([number + 1]) * 32 for number, name in enumerate(MASKERS)}
    envelopes = {n: secagg.signed_key(corpus.identity(n), "a" * 64, "run", private[n]) for n in MASKERS}
    keys = secagg.read_keys(envelopes, "a" * 64, "run", corpus.keys())
    agreed = secagg.Agreement("a" * 64, "run", 1, 0, "b" * 64, keys, 2, 3, 32, 4)
    vectors = {n: secagg.mask(agreed, corpus.identity(n), private[n], np.arange(4, dtype=np.uint32)) for n in MASKERS}
    words = {n: sent.word for n, (_, sent) in vectors.items()}
    signatures = {n: secagg.agree(agreed, corpus.identity(n), words, corpus.keys(), None) for n in MASKERS}
    return agreed, private, envelopes, vectors, words, signatures


def masked_seeds() -> list[Any]:
    from hansa.common import masking, secagg

    agreed, private, envelopes, vectors, words, signatures = masked()
    shares = {n: sent.shares["ada"] for n, (_, sent) in vectors.items()}
    revealed = secagg.reveal(agreed, "ada", private["ada"], MASKERS, signatures, shares, corpus.keys())
    return [
        {
            "asked": masking.asked_fields(agreed, envelopes),
            "sent": masking.sent_fields(vectors["ben"][1]),
            "words": masking.by_name(words),
            "signatures": masking.by_name(signatures),
            "shares": masking.by_name(shares),
            "revealed": masking.revealed_fields(revealed),
        }
    ]


@of_json("masked", masked_seeds)
def _masked(said: Any) -> None:
    from hansa.common import masking, secagg
    from hansa.common.identity import strict_json

    with building():  # they are fields of a message, which was read so
        fields = strict_json(bent(said))
        parts = [fields[key] for key in ("asked", "sent", "words", "signatures", "shares", "revealed")]
    asked, sent, words, signatures, shares, revealed = parts
    agreed, private, _, vectors, _, _ = masked()
    people = {name: corpus.keys()[name] for name in MASKERS}

    def told() -> None:
        one = masking.Told.parse(asked)
        keys = secagg.read_keys(one.envelopes, "a" * 64, "run", people)
        one.agreement("a" * 64, "run", 1, "b" * 64, keys).check("ada", private["ada"], MASKERS, 0, 3)

    def added() -> None:
        total = secagg.Sum(agreed)
        total.add("ben", vectors["ben"][0], masking.sent_from(sent), people["ben"])

    def agrees() -> None:
        secagg.agree(agreed, corpus.identity("ada"), masking.bytes_by_name(words), people, None)

    def reveals() -> None:
        given = masking.bytes_by_name(signatures), masking.bytes_by_name(shares)
        secagg.reveal(agreed, "ada", private["ada"], MASKERS, *given, people)

    def opens() -> None:
        total = secagg.Sum(agreed)
        for name, (vector, one) in vectors.items():
            total.add(name, vector, one, people[name])
        plain = dict.fromkeys(MASKERS, masking.revealed_from(revealed))
        total.open(plain)

    refused = None
    for parse in (told, added, agrees, reveals, opens):
        try:
            parse()
        except HansaError as err:
            refused = err
    if refused is not None and not str(refused).startswith("ada's own mask cannot be opened"):
        raise refused


# -- messages and the link -------------------------------------------------------------------------------------------------


@functools.cache
def exchange() -> Any:
    from hansa.common.messages import SignedWire
    from support import request, weights

    signed = corpus.charter()
    boss = SignedWire(corpus.identity("coordinator"), {"ada": corpus.identity("ada").key}, signed.sha256)
    ada = SignedWire(corpus.identity("ada"), {"coordinator": corpus.identity("coordinator").key}, signed.sha256)
    fields = {"witness": witness_seeds()[0]["asked"], "lr": "0.5"}
    return boss.encode(request(signed, "train", 1, fields=fields), boss.pack(weights()))[0], ada


def stored() -> bytes:
    from hansa.common.messages import to_bytes

    return to_bytes(exchange()[0])


@target(
    "message", lambda: [stored()], words=(b"hansa-message/1\n", b"00000.000000", b"\xff\xff\xff\xff\xff\xff\xff\xff")
)
def _message(data: bytes) -> None:
    from hansa.common.messages import from_bytes, to_bytes

    records = from_bytes(data)
    to_bytes(records)
    exchange()[1].decode(records, "coordinator")


@target("outbox", lambda: [stored()])
def _outbox(data: bytes) -> None:
    from hansa.clients.outbox import Outbox

    box = Outbox(corpus.scratch() / "outbox")
    path = box._path("run-1", "r")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    exchange()[1].decode(box.get("run-1", "r"), "coordinator")


def manifest() -> Any:
    from hansa.common.identity import read_envelope
    from hansa.common.messages import MESSAGE_TYPE

    return json.loads(read_envelope(exchange()[0]["manifest"]["sealed"], MESSAGE_TYPE).payload)


@of_json("message-signed", lambda: [manifest()])
def _message_signed(said: Any) -> None:
    from attack_support import with_sealed
    from hansa.common.flower import records_from_bytes
    from hansa.common.frames import take_apart
    from hansa.common.messages import MESSAGE_TYPE

    records, wire = exchange()
    with building():
        sealed = corpus.seal(MESSAGE_TYPE, bent(said), corpus.identity("coordinator"))
    bare = with_sealed(records_from_bytes(take_apart(records)[0]), sealed)
    with contextlib.suppress(HansaError):
        wire.inspect(bare, "coordinator")
    wire.decode(with_sealed(records, sealed), "coordinator")


def frames() -> list[bytes]:
    from hansa.common import link_pb2 as pb
    from hansa.common.frames import length_of, take_apart

    raw, arrays = take_apart(exchange()[0])
    head = pb.Head(
        id="a", message_type="train", group_id="1", remaining_s=60.0, records=raw, lengths=map(length_of, arrays)
    )
    made = [
        pb.FromServer(request=head),
        pb.FromServer(welcome=pb.Welcome(protocol=1, software="s")),
        pb.FromServer(want=pb.Want(id="a", remaining_s=1.0)),
        pb.FromNode(offer=head),
        pb.FromNode(hello=pb.Hello(protocol=1, software="s", have=["a", "b"], credit=2)),
        pb.FromNode(block=pb.Block(data=b"x" * 100)),
        pb.FromNode(offer=pb.Head(id="a", failure=pb.Failure(code=3, reason="no"))),
    ]
    return [one.SerializeToString() for one in made]


@target("link", frames)
def _link(data: bytes) -> None:
    """Both ends take a frame apart; a head is looked at as links do before its blocks come."""
    from google.protobuf.message import DecodeError

    from hansa.common import link_pb2 as pb
    from hansa.common.frames import Spool, check_head, request_id

    for kind, field in ((pb.FromServer, "request"), (pb.FromNode, "offer")):
        try:
            frame = kind.FromString(data)
        except DecodeError:  # gRPC closes such a stream by itself
            continue
        if frame.WhichOneof("body") != field:
            continue
        head = getattr(frame, field)
        try:
            records = check_head(head)
            request_id(records)
            expected = exchange()[1].inspect(records, "coordinator")
        except HansaError:
            continue
        spool = Spool(corpus.scratch() / "spool", head, expected)
        try:
            spool.write(b"\0" * 16)
        except HansaError:
            pass
        finally:
            spool.drop()


def spooled() -> bytes:
    from hansa.common import link_pb2 as pb
    from hansa.common.frames import Spool, blocks, length_of, take_apart

    raw, arrays = take_apart(exchange()[0])
    head = pb.Head(id="a", records=raw, lengths=map(length_of, arrays))
    spool = Spool(corpus.scratch() / "spooled", head, exchange()[1].inspect(_bare(), "coordinator"))
    for block in blocks(arrays):
        spool.write(block)
    return spool.finish().path.read_bytes()


def _bare() -> Any:
    from hansa.common.flower import records_from_bytes
    from hansa.common.frames import take_apart

    return records_from_bytes(take_apart(exchange()[0])[0])


@target("spool", lambda: [spooled()])
def _spool(data: bytes) -> None:
    from hansa.common.frames import Spooled

    path, wire = corpus.file(data, "spool"), exchange()[1]
    found = Spooled.load(path, lambda records: wire.inspect(records, "coordinator"))
    wire.decode(found.content(checked=True), "coordinator")
    Spooled.load(path).content(checked=False)


@of_json(
    "records-built", lambda: [{"manifest": {"sealed": "aa"}, "chunks": {"00000.000000": ["uint8", [2], "hansa.chunk"]}}]
)
def _records_built(said: Any) -> None:
    """Flower records of any names and kinds, well formed as protobuf."""
    from hansa.common.flower import Array, ArrayRecord, ConfigRecord, RecordDict, records_from_bytes, records_to_bytes

    with building():
        made = RecordDict()
        for name, record in said.items():
            values = list(record.values())
            if values and isinstance(values[0], list):
                made[name] = ArrayRecord({k: Array(v[0], tuple(v[1]), v[2], b"") for k, v in record.items()})
            else:
                made[name] = ConfigRecord(record)
        data = records_to_bytes(made)
    exchange()[1].inspect(records_from_bytes(data), "coordinator")


# -- certificates ----------------------------------------------------------------------------------------------------------


@functools.cache
def ca() -> Any:
    from hansa.common.connection_ca import ConnectionCA

    return ConnectionCA.create(corpus.scratch() / "ca")


@functools.cache
def tls_key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.derive_private_key(7, ec.SECP256R1())


@functools.cache
def request_pem() -> bytes:
    from hansa.common.certificates import make_request

    return make_request(corpus.identity("ada"), tls_key(), 30)


@functools.cache
def certificate_pem() -> bytes:
    return ca().issue(request_pem(), 30)


@functools.cache
def crl_pem() -> bytes:
    certificate_pem()
    ca().revoke("ada")
    return (ca().folder / "revoked.crl").read_bytes()


def wrapped(label: str, der: bytes) -> bytes:
    return b"-----BEGIN %b-----\n%b-----END %b-----\n" % (label.encode(), base64.encodebytes(der), label.encode())


def der_of(pem: bytes) -> bytes:
    return base64.b64decode(b"".join(pem.split(b"-----")[2].split()))


def _as_pem(label: str, data: bytes) -> bytes:
    """Inputs that are DER are wrapped, so that bytes may be changed below the base64."""
    return data if data.startswith(b"-----") or b"-----BEGIN" in data else wrapped(label, data)


@target("request", lambda: [request_pem(), der_of(request_pem())])
def _request(data: bytes) -> None:
    from hansa.common.certificates import read_request

    read_request(_as_pem("CERTIFICATE REQUEST", data))


def _peer(pem: bytes) -> None:
    from hansa.common.certificates import check_chain, check_peer, read_certificate, read_endorsement, split_chain

    now = datetime.now(UTC)
    found = read_certificate(pem)
    with contextlib.suppress(HansaError):
        check_chain(pem, ca().certificate, now)
    with contextlib.suppress(HansaError):
        split_chain(pem)
    check_peer(found, corpus.keys(), now, None)
    read_endorsement(found.endorsement)


@target("certificate", lambda: [certificate_pem(), der_of(certificate_pem())])
def _certificate(data: bytes) -> None:
    _peer(_as_pem("CERTIFICATE", data))


@target("ca-certificate", lambda: [ca().certificate, der_of(ca().certificate)])
def _ca_certificate(data: bytes) -> None:
    from hansa.common.certificates import RevocationList, check_chain, read_ca

    pem = _as_pem("CERTIFICATE", data)
    for ask in (
        lambda: check_chain(certificate_pem(), pem, datetime.now(UTC)),
        lambda: RevocationList.parse(crl_pem(), pem),
    ):
        with contextlib.suppress(HansaError):
            ask()
    read_ca(pem)


@target("revocation-list", lambda: [crl_pem(), der_of(crl_pem())])
def _revocation_list(data: bytes) -> None:
    from hansa.common.certificates import RevocationList

    RevocationList.parse(_as_pem("X509 CRL", data), ca().certificate)
    RevocationList.load(corpus.file(data, "revoked.crl"), ca().certificate)


def endorsements() -> list[Any]:
    from hansa.common.certificates import spki_sha256

    now = datetime.now(UTC).replace(microsecond=0)
    text = [(now + timedelta(days=n)).strftime("%Y-%m-%dT%H:%M:%SZ") for n in (-1, 30)]
    said = {
        "v": 1,
        "name": "ada",
        "not_before": text[0],
        "not_after": text[1],
        "spki_sha256": spki_sha256(tls_key().public_key()),
    }
    return [{"says": said, "name": "ada", "alternative": "ada", "by": "ada"}]


@of_json("endorsement-signed", endorsements)
def _endorsement_signed(said: Any) -> None:
    """An organisation that endorses whatever it wants to, in a request that is well formed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import NameOID

    from hansa.common.certificates import (
        ENDORSEMENT_TYPE,
        check_peer,
        endorsement_extension,
        read_certificate,
        read_request,
    )

    with building():
        payload = bent(said["says"])
        envelope = corpus.seal(ENDORSEMENT_TYPE, payload, corpus.identity(str(said["by"])[:20].replace("\ud800", "")))
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, said["name"])])
        names = x509.SubjectAlternativeName([x509.DNSName(said["alternative"])])
        extension = endorsement_extension(envelope)
        request = x509.CertificateSigningRequestBuilder().subject_name(subject)
        request = request.add_extension(names, False).add_extension(extension, False)
        pem = request.sign(tls_key(), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        now = datetime.now(UTC)
        leaf = x509.CertificateBuilder(subject, subject, tls_key().public_key(), 7, now, now + timedelta(days=1))
        leaf = leaf.add_extension(names, False).add_extension(extension, False).sign(tls_key(), hashes.SHA256())
        certificate = leaf.public_bytes(serialization.Encoding.PEM)
    with contextlib.suppress(HansaError):
        read_request(pem)
    check_peer(read_certificate(certificate), corpus.keys(), datetime.now(UTC), None)


# -- keys ------------------------------------------------------------------------------------------------------------------


def private_pem(passphrase: str | None = None) -> bytes:
    path = corpus.scratch() / "private.key"
    corpus.identity("ada").save(path, passphrase)
    return path.read_bytes()


@target(
    "private-key",
    lambda: [private_pem(), private_pem("secret")],
    words=(b"-----BEGIN PRIVATE KEY-----", b"-----BEGIN ENCRYPTED PRIVATE KEY-----", b"-----BEGIN OPENSSH PRIVATE KEY-----",
           b"-----BEGIN RSA PRIVATE KEY-----", b"-----BEGIN EC PRIVATE KEY-----", b"Proc-Type: 4,ENCRYPTED"),
)  # fmt: skip
def _private_key(data: bytes) -> None:
    from hansa.common.identity import Identity, is_encrypted

    path = corpus.file(data, "identity.key")
    is_encrypted(path)
    with contextlib.suppress(HansaError):
        Identity.load("ada", path, "secret")
    Identity.load("ada", path)


def public_pem_bytes() -> bytes:
    from hansa.common.identity import public_pem

    return public_pem(corpus.identity("ada").key)


@target("public-key", lambda: [public_pem_bytes(), der_of(public_pem_bytes())])
def _public_key(data: bytes) -> None:
    from hansa.common.identity import key_from_pem, public_pem

    pem = _as_pem("PUBLIC KEY", data)
    assert public_pem(key_from_pem(pem)) == pem


@target("identity-json", lambda: [bent({"name": "ada", "key": corpus.identity("ada").key}) + b"\n"])
def _identity_json(data: bytes) -> None:
    from hansa.common.home import Home

    corpus.file(data, "identity.json")
    home = Home(corpus.scratch())
    home.name(), home.key()


# -- models ----------------------------------------------------------------------------------------------------------------


def model_file() -> bytes:
    return (corpus.bundle() / "model.safetensors").read_bytes()


def _use_model(path: Path) -> None:
    from hansa.clients.models import load_kept, model_of
    from hansa.common.tasks import load_task

    kept = load_kept(path, "heart-disease")
    model_of(load_task("heart-disease"), kept.arrays, 0)


@target("model", lambda: [model_file()])
def _model(data: bytes) -> None:
    _use_model(corpus.file(data, "model.safetensors"))


def _parts_of(data: bytes) -> tuple[Any, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _tensors(header: Any, body: bytes) -> bytes:
    text = bent(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


@of_json("model-built", lambda: [_parts_of(model_file())[0]])
def _model_built(said: Any) -> None:
    with building():
        data = _tensors(said, _parts_of(model_file())[1])
    _use_model(corpus.file(data, "model.safetensors"))


def kept_seed() -> Any:
    from hansa.common.charter import SignedCharter
    from hansa.common.model import model_manifest

    signed = SignedCharter.parse((corpus.bundle() / "charter.json").read_bytes())
    closing = corpus.payload_of(closing_file())
    about = model_manifest(
        signed.charter, signed.sha256, closing["run_id"], closing["model_sha256"], 2, {"auc": "0.75", "brier": "0.2"}
    )
    return {"closing": closing, "manifest": about}


@of_json("kept-signed", lambda: [kept_seed()])
def _kept_signed(said: Any) -> None:
    from hansa.clients.models import MANIFEST, MODEL, load_kept
    from hansa.common.charter import SignedCharter
    from hansa.common.closing import CLOSING_TYPE
    from hansa.common.model import checked_manifest

    signed = SignedCharter.parse((corpus.bundle() / "charter.json").read_bytes())
    folder = corpus.scratch() / "kept"
    with building():
        folder.mkdir(exist_ok=True)
        (folder / "closing.json").write_bytes(
            corpus.seal(CLOSING_TYPE, bent(said["closing"]), *corpus.people().values()) + b"\n"
        )
        (folder / MANIFEST).write_bytes(bent(said["manifest"]) + b"\n")
        (folder / MODEL).write_bytes(model_file())
        about, closing = said["manifest"], kept_seed()["closing"]
    with contextlib.suppress(HansaError):
        checked_manifest(about, signed.charter, signed.sha256, closing["run_id"], closing["model_sha256"])
    load_kept(folder).verify(signed)


@functools.cache
def checkpoint_file() -> bytes:
    import numpy as np

    from hansa.server.checkpoint import Checkpoint
    from hansa.server.records import Answer

    answer = Answer(**dict.fromkeys(Answer.__dataclass_fields__))
    made = Checkpoint(
        "run-1", 1, {"w": np.zeros((2, 3), np.float32)}, {"m": np.zeros(3)}, [{"round": 1}], ["ada"], ["ada"], False,
        {"train": {"ada": answer}}, {"ada": {"yours": None}},
    )  # fmt: skip
    made.save(corpus.scratch() / "checkpoint")
    return (corpus.scratch() / "checkpoint").read_bytes()


@target("checkpoint", lambda: [checkpoint_file(), checkpoint_file()[65:]])
def _checkpoint(data: bytes) -> None:
    """As it is, and with the hash that fits: a disk does not make one, but whoever edits the file does."""
    from hansa.common.identity import sha256
    from hansa.server.checkpoint import Checkpoint

    with contextlib.suppress(HansaError):
        Checkpoint.load(corpus.file(data, "checkpoint.bin"))
    Checkpoint.load(corpus.file(sha256(data).encode() + b"\n" + data, "checkpoint.bin"))


def checkpoint_seed() -> Any:
    header, _ = _parts_of(checkpoint_file()[65:])
    return {"tensors": header, "about": json.loads(header.pop("__metadata__")["hansa"])}


@of_json("checkpoint-built", lambda: [checkpoint_seed()])
def _checkpoint_built(said: Any) -> None:
    with building():
        header, about = said["tensors"], said["about"]
        if isinstance(header, dict):
            header = {"__metadata__": {"hansa": json.dumps(about)}, **header}
        data = _tensors(header, b"\0" * 48)
    _checkpoint(data)


# -- data ------------------------------------------------------------------------------------------------------------------


def csv_seeds() -> list[bytes]:
    rows = (ROOT / "simulations/data/heart-disease/cleveland.csv").read_bytes().splitlines(True)
    return [b"".join(rows[:4]), b"".join(rows[:2]).replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + b"".join(rows[:3])]


@target(
    "csv",
    csv_seeds,
    words=(
        b"\r",
        b"\r\n",
        b"\n",
        b'"',
        b'""',
        b",",
        b"\xef\xbb\xbf",
        b"nan",
        b"inf",
        b"1e999",
        b"-0",
        b"\x00",
        b"\xff",
    ),
)
def _csv(data: bytes) -> None:
    import numpy as np

    from hansa.common.tasks import load_task
    from hansa.common.tasks.schema import parse_table

    schema = load_task("heart-disease").schema
    path = corpus.file(data, "rows.csv")
    for labelled in (False, True):
        table = parse_table(path, schema, labelled=labelled)
        assert np.isfinite(table.x).all()
        assert (np.abs(table.x) <= 1).all()


def registration() -> Any:
    from hansa.clients.datasets import RegisteredDataset
    from support import Source, tiny_task

    folder = corpus.scratch() / "registered"
    RegisteredDataset.register(tiny_task(), Source(8, 2), folder, public=False)
    return json.loads((folder / "dataset.json").read_bytes())


@of_json("dataset-json", lambda: [registration()])
def _dataset_json(said: Any) -> None:
    from hansa.clients.datasets import RegisteredDataset
    from support import Source, tiny_task

    folder = corpus.scratch() / "registration"
    with building():
        folder.mkdir(exist_ok=True)
        (folder / "dataset.json").write_bytes(bent(said))
    RegisteredDataset.load(tiny_task(), Source(8, 2), folder)
    RegisteredDataset.register(tiny_task(), Source(8, 2), folder, public=False)


@target(
    "state-files",
    lambda: [
        b'{"length": 5}',
        json.dumps({"phase": "training", "pid": 1, "updated": "2026-11-22T01:50:00+00:00"}).encode(),
    ],
)
def _state_files(data: bytes) -> None:
    from hansa.clients.law import restored_length
    from hansa.server.status import read_status

    restored_length(corpus.file(data, "marker"))
    read_status(corpus.file(data, "status.json"))


# -- backups ---------------------------------------------------------------------------------------------------------------

MEMBERS = [
    {"name": "home/identity.json", "data": "{}"},
    {"name": "home/identity.key", "data": "key"},
    {"name": "state/dataset.json", "data": "{}"},
    {"name": "state/models/run-1/closing.json", "data": "x" * 600},
    {"name": "state/ledger.jsonl", "data": "x\n"},
]


def archive() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in MEMBERS:
            info = tarfile.TarInfo(member["name"])
            info.size, info.mode = len(member["data"]), 0o600
            tar.addfile(info, io.BytesIO(member["data"].encode()))
    return made.getvalue()


def _unpack(data: bytes) -> None:
    from hansa.clients.custody import _unpack

    to = corpus.scratch() / "unpacked"
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    watched = corpus.scratch() / "outside"
    try:
        _unpack(corpus.file(data, "backup.tar"), to)
    except OSError as err:  # `restore` tells it as an OutputError
        if err.errno == errno.EFBIG:
            raise AssertionError(f"more than is allowed from an archive of {len(data)} bytes") from err
        raise
    assert not watched.exists()
    taken = sum(p.stat().st_size for p in to.rglob("*") if p.is_file())
    assert taken <= len(data), f"{taken} bytes from an archive of {len(data)}"


# `restore` turns an OSError, a name too long for the disk say, into an OutputError.
@target("backup", lambda: [archive()], also=(OSError,), words=(b"ustar\x0000", b"ustar  \x00", b"././@PaxHeader", b"home/", b"state/",
        b"../outside", b"11 size=-1\n", b"GNU.sparse.map", b"GNU.sparse.realsize"))  # fmt: skip
def _backup(data: bytes) -> None:
    _unpack(_checksummed(data))


def _checksummed(data: bytes) -> bytes:
    """With the checksums of all headers put right, as whoever makes an archive does."""
    made = bytearray(data[: 64 * 512])
    for at in range(0, len(made) - 511, 512):
        block = bytes(made[at : at + 512])
        if block[257:262] == b"ustar" or (
            block[156:157] in b"0123456789LKSgx" and any(block[:100]) and block[100:101] in b"0\x80\xff"
        ):
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            made[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(made) + data[64 * 512 :]


@of_json(
    "backup-built",
    lambda: [
        MEMBERS,
        [{**MEMBERS[0], "type": "S", "size": 0, "sparse": 3}],
        [{**MEMBERS[0], "type": "S", "size": "77777777777", "linkname": "x", "pax": {"size": "-1"}}],
    ],
    also=(OSError,),
)
def _backup_built(said: Any) -> None:
    with building():
        blocks = []
        for member in said[:20]:
            data = str(member.get("data", "")).encode("utf-8", "surrogatepass")
            pax = member.get("pax")
            if pax is not None:
                text = b"".join(_pax(str(k), str(v)) for k, v in pax.items())
                blocks += [_tar_header("././@PaxHeader", b"x", f"{len(text):o}", ""), text + b"\0" * (-len(text) % 512)]
            kind = str(member.get("type", "0")).encode("latin-1", "replace")[:1]
            size = member.get("size", f"{len(data):o}")
            blocks += [
                _tar_header(str(member["name"]), kind, size, str(member.get("linkname", "")), member.get("sparse"))
            ]
            blocks.append(data + b"\0" * (-len(data) % 512))
        made = b"".join(blocks) + b"\0" * 1024
    _unpack(made)


def _pax(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode("utf-8", "surrogatepass")
    return str(len(body) + len(str(len(body) + 3))).encode() + body


def _tar_header(name: str, kind: bytes, size: Any, linkname: str, sparse: Any = None) -> bytes:
    def field(text: bytes, length: int) -> bytes:
        return text[:length].ljust(length, b"\0")

    if isinstance(size, int) and not isinstance(size, bool):  # base 256, negative too
        sized = (size % 256**12).to_bytes(12, "big")
        sized = bytes([sized[0] | 0x80]) + sized[1:]
    else:
        sized = field(str(size).encode("utf-8", "replace"), 12)
    block = (
        field(name.encode("utf-8", "surrogatepass"), 100)
        + b"0000600\0"
        + b"0000000\0" * 2
        + sized
        + b"00000000000\0"
        + b" " * 8
    )
    block += kind + field(linkname.encode("utf-8", "surrogatepass"), 100) + b"ustar\x0000" + b"\0" * 247
    block = block[:512].ljust(512, b"\0")
    if isinstance(sparse, int):  # GNU's form of a file with holes: so many bytes, of which none is in the archive
        real = b"\x80" + (sparse % 2**80).to_bytes(11, "big")
        block = block[:257] + b"ustar  \0" + block[265:386] + b"00000000000\0" * 2 + block[410:483] + real + block[495:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


# -- the auditor -----------------------------------------------------------------------------------------------------------


def unreadable() -> type[BaseException]:
    from hansa.common.verifier import Unreadable

    return Unreadable


def _verdict(folder: Path) -> None:
    """The folder as the bundle that is judged, and as somebody's copy that an honest bundle is held against."""
    from hansa.common.verifier import verify_bundle

    verdict = verify_bundle(corpus.bundle(), [folder])
    json.dumps(verdict, allow_nan=False)
    verdict = verify_bundle(folder)
    json.dumps(verdict, allow_nan=False)
    assert verdict["verified"] == (not verdict["violations"])


@target(
    "bundle",
    lambda: [corpus.packed(one) for one in (corpus.bundle(), corpus.bundle("public"), corpus.bundle("shared"))],
    also=(unreadable(),),
)
def _bundle(data: bytes) -> None:
    folder = corpus.scratch() / "judged"
    corpus.unpacked(data, folder)
    _verdict(folder)


@of_json(
    "bundle-signed",
    lambda: [corpus.drafted(corpus.bundle()), corpus.drafted(corpus.bundle("shared"))],
    also=(unreadable(),),
)
def _bundle_signed(said: Any) -> None:
    folder = corpus.scratch() / "judged"
    with building():
        corpus.signed(said, folder)
    _verdict(folder)
