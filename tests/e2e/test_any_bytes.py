"""Valid signed messages, changed at random on their way: MessageError or the message as it was signed, and no entry in a ledger."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attack_support import (
    Touch,
    enveloped,
    payload_of,
    resealed,
    with_sealed,
)
from hansa.clients.outbox import Outbox
from hansa.common import link_pb2 as pb
from hansa.common.errors import MessageError
from hansa.common.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    RecordDict,
    addressed,
    records_from_bytes,
    records_to_bytes,
)
from hansa.common.frames import Spool, blocks, check_head, length_of, take_apart
from hansa.common.identity import canonical, read_envelope
from hansa.common.messages import MESSAGE_TYPE, SignedWire, to_bytes
from support import Site, Source, charter, identity, request, weights

Crossed = tuple[bytes, list[int], bytes]
"""A message on the link: its head's records and lengths, and the bytes of its arrays."""


def crossing(records: RecordDict) -> Crossed:
    raw, arrays = take_apart(records)
    return raw, [length_of(a) for a in arrays], b"".join(blocks(arrays))


class Ends:
    """Both ends of a link without the link: a node of the tiny task whose round 1 is committed, and its coordinator."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.signed = charter()
        self.site = Site("ada", root / "ada", Source())
        self.node = self.site.node(self.signed)
        self.boss = SignedWire(identity("coordinator"), {"ada": identity("ada").key}, self.signed.sha256)
        self.inbound = SignedWire(identity("ada"), {"coordinator": identity("coordinator").key}, self.signed.sha256)
        self.deliver(self.boss.encode(request(self.signed, "open", 0), self.boss.pack({}))[0], "open")
        self.ask = request(self.signed, "train", 1)
        self.request, self.digest = self.boss.encode(self.ask, self.boss.pack(weights()))
        self.reply = self.deliver(self.request, "train")
        self.before = self.ledger()

    def ledger(self) -> bytes:
        return (self.site.folder / "ledger.jsonl").read_bytes()

    def deliver(self, records: RecordDict, kind: str) -> RecordDict:
        kind_of = kind if kind == "train" else f"query.{kind}"
        return self.node.handle(kind, addressed(records, kind_of, 1, "g", 60.0, "m1")).content

    def arrives(self, crossed: Crossed, wire: SignedWire, sender: str) -> RecordDict | None:
        """As both links take a message in: head, inspection, spool; None while bytes of it are missing."""
        records, lengths, body = crossed
        head = pb.Head(id="a", records=records, lengths=lengths)
        spool = Spool(self.root / "spool", head, wire.inspect(check_head(head), sender))
        try:
            for at in range(0, len(body), 16):
                spool.write(body[at : at + 16])
            return None if spool.missing else spool.finish().content(checked=True)
        finally:
            spool.drop()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    made = Ends(tmp_path_factory.mktemp("ends"))
    yield made
    assert made.site.ledger is not None
    made.site.ledger.close()


@st.composite
def spoilt(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with some changed, cut out, put in, doubled or moved."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.integers(0, 20)))
        match draw(st.integers(0, 5)):
            case 0:
                data = data[:at] + data[to:]
            case 1:
                data = data[:at] + draw(st.binary(max_size=20)) + data[at:]
            case 2:
                data = data[:to] + data[at:]
            case 3:
                data = data[:at]
            case 4:
                data = data[to:] + data[:to]
            case _:
                if data:
                    at %= len(data)
                    data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    return data


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10) | st.sampled_from(["uint8", "ada", 10**30]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def replaced(draw: st.DrawFn, value: Any) -> Any:
    """The JSON with one place of it changed, to anything or to something of its own kind."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        match draw(st.integers(0, 3)):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, draw(st.text(max_size=8)): draw(JSON)}
            case _:
                return {**value, key: draw(replaced(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(value) - 1))
        instead = draw(st.sampled_from(([], [value[at]] * 2, None)))
        return [*value[:at], *([draw(replaced(value[at]))] if instead is None else instead), *value[at + 1 :]]
    match value:
        case str() if draw(st.integers(0, 3)):
            return draw(st.sampled_from([f"{value}x", value[:-1], "ada", "coordinator", "close", "run-2"]))
        case int() if draw(st.integers(0, 3)):
            return value + draw(st.sampled_from([-1, 1, 2]))
        case dict() if draw(st.integers(0, 3)):
            return {**value, "lr": "9"}
    return draw(JSON)


@st.composite
def restated(draw: st.DrawFn, said: dict[str, Any]) -> bytes:
    """A manifest with one of its entries changed, mostly."""
    key = draw(st.sampled_from(sorted(said)))
    changed = {**said, key: draw(replaced(said[key]))} if draw(st.integers(0, 5)) else draw(replaced(said))
    return canonical(changed)


PLACES = ["records", "lengths", "body", "sealed", "payload", "signature", "labels", "mixed", *["json"] * 4]


@st.composite
def mutated(draw: st.DrawFn, records: RecordDict) -> Crossed:
    """A message as it crosses the link, changed somewhere by somebody who has no key."""
    raw, lengths, body = crossing(records)
    sealed = records["manifest"]["sealed"]
    envelope = read_envelope(sealed, MESSAGE_TYPE)
    match draw(st.sampled_from(PLACES)):
        case "records":
            raw = draw(spoilt(raw))
        case "lengths":
            lengths = draw(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from(lengths or [0]), max_size=4))
        case "body":
            body = draw(spoilt(body))
        case "sealed":
            raw = records_to_bytes(bare_of(records, draw(spoilt(sealed))))
        case "payload":
            raw = records_to_bytes(bare_of(records, enveloped(draw(spoilt(envelope.payload)), envelope.signatures)))
        case "json":
            said = draw(restated(json.loads(envelope.payload)))
            raw = records_to_bytes(bare_of(records, enveloped(said, envelope.signatures)))
        case "signature":
            ((key, signature),) = envelope.signatures
            key = draw(st.sampled_from([key, identity("eve").key, identity("ben").key]))
            pairs = [(key, draw(spoilt(signature)))] * draw(st.integers(0, 2))
            raw = records_to_bytes(bare_of(records, enveloped(envelope.payload, pairs)))
        case "labels":
            text = st.text(max_size=12)
            shape = st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple)
            labelled = {
                draw(st.just(key) | text): Array(draw(text), draw(shape), draw(text | st.just("numpy.ndarray")), b"")
                for key in records["chunks"]
            }
            made = RecordDict({"manifest": records["manifest"], "chunks": ArrayRecord(labelled)})
            if draw(st.booleans()):
                made[draw(text)] = ConfigRecord({draw(text): draw(text | st.binary(max_size=9) | st.floats())})
            raw = records_to_bytes(made)
        case _:
            raw, body = draw(spoilt(raw)), draw(spoilt(body))
    return raw, lengths, body


def bare_of(records: RecordDict, sealed: bytes) -> RecordDict:
    """The records with empty arrays under another envelope."""
    return with_sealed(records_from_bytes(take_apart(records)[0]), sealed)


QUICK = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(data=st.data())
def test_any_bytes_at_a_node(ends: Ends, data: st.DataObject) -> None:
    """Whatever is changed, the node takes the message for what the coordinator signed or raises MessageError, and spends
    nothing: what still passes is the committed request, answered from the outbox."""
    raw, lengths, body = data.draw(mutated(ends.request))
    try:
        content = ends.arrives((raw, lengths, body), ends.inbound, "coordinator")
        answer = None if content is None else ends.deliver(content, "train")
    except MessageError:
        answer = None
    assert answer is None or to_bytes(answer) == to_bytes(ends.reply)
    assert ends.ledger() == ends.before


@QUICK
@given(data=st.data())
def test_any_bytes_at_the_coordinator(ends: Ends, data: st.DataObject) -> None:
    """Whatever is changed, an answer is what the node signed, or MessageError; with the link's checks or without them."""
    raw, lengths, body = data.draw(mutated(ends.reply))
    honest = ends.boss.decode(ends.reply, "ada")
    try:
        content = ends.arrives((raw, lengths, body), ends.boss, "ada")
    except MessageError:
        content = None
    if content is not None:
        found = ends.boss.decode(content, "ada")
        assert (found[0], found[2]) == (honest[0], honest[2])
        assert {n: t.tobytes() for n, t in found[1].items()} == {n: t.tobytes() for n, t in honest[1].items()}
    try:  # over another Grid nothing is looked at before
        records = records_from_bytes(raw)
        chunks = records.get("chunks")
        if isinstance(chunks, ArrayRecord):
            size = len(body) // max(1, len(chunks))
            filled = [(key, Array(a.dtype, tuple(a.shape), a.stype, body[i * size : (i + 1) * size]))
                      for i, (key, a) in enumerate(chunks.items())]  # fmt: skip
            records["chunks"] = ArrayRecord(dict(filled))
        ends.boss.decode(records, "ada")
    except MessageError:
        pass
    assert ends.ledger() == ends.before


@QUICK
@given(data=st.data())
def test_any_manifest_of_a_coordinator_that_lies(ends: Ends, data: st.DataObject) -> None:
    """Signed by the coordinator, changed in one place: refused, signed or unheard, and never a second debit."""
    said = data.draw(restated(json.loads(payload_of(ends.request))))
    before = ends.site.kinds()
    try:
        sent = resealed(ends.request, identity("coordinator"), said)
        answer = ends.deliver(sent, "train")
    except MessageError:
        answer = None
    if answer is not None:
        reply = ends.boss.decode(answer, "ada")[0]
        assert reply.kind == "refused" or said == payload_of(ends.request)
    added = ends.site.kinds()[len(before) :]
    assert added in ([], ["refuse"])
    ends.before = ends.ledger()


@QUICK
@given(data=st.data())
def test_any_manifest_of_a_node_that_lies(ends: Ends, data: st.DataObject) -> None:
    """Signed by the node, changed in one place: the coordinator's link and wire raise nothing but MessageError."""
    said = data.draw(restated(json.loads(payload_of(ends.reply))))
    sent = resealed(ends.reply, identity("ada"), said)
    for taken in (
        lambda: ends.arrives(crossing(sent), ends.boss, "ada"),
        lambda: sent,
    ):
        try:
            content = taken()
            if content is not None:
                ends.boss.decode(content, "ada")
        except MessageError:
            pass
    assert ends.ledger() == ends.before


def test_a_config_value_of_no_kind() -> None:
    """Found by the tests above: Flower's reader looks for the kind of what is not there."""
    value = b"\n\x01k\x12\x00"
    records = b'\n\x01a"\x07\n\x05' + value
    with pytest.raises(MessageError, match="cannot be read"):
        check_head(pb.Head(records=b"\n\x0c" + records))


def test_a_damaged_outbox_is_not_sent(ends: Ends, tmp_path: Path) -> None:
    """What stands on the node's disk is parsed as strictly: a pickle there is no reply."""
    box = Outbox(tmp_path / "outbox")
    box.put("run-1", "r", ends.reply)
    (path,) = [p for p in (tmp_path / "outbox").rglob("*") if p.is_file()]
    path.write_bytes(pickle.dumps(Touch(tmp_path / "made")))
    with pytest.raises(MessageError):
        box.get("run-1", "r")
    assert not (tmp_path / "made").exists()
