"""Messages: what arrives is what its sender signed, for this recipient, run, round and request, or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hansa.common import messages
from hansa.common.errors import MessageError
from hansa.common.flower import Array, ArrayRecord, ConfigRecord, RecordDict
from hansa.common.identity import Envelope, canonical, sha256, write_envelope
from hansa.common.messages import DTYPES, MESSAGE_TYPE, Manifest, PlainWire, SignedWire, from_bytes, to_bytes
from support import charter, identity, request, weights

CHARTER = charter()
COORDINATOR, ADA = identity("coordinator"), identity("ada")
OUT = SignedWire(COORDINATOR, {"ada": ADA.key, "ben": identity("ben").key}, CHARTER.sha256)
IN = SignedWire(ADA, {"coordinator": COORDINATOR.key}, CHARTER.sha256)
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(6, 12, dtype=np.float32).reshape(2, 3)}
ASK = request(CHARTER, "train", 1, fields={"x": [1, "é"]})


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "CHUNK_BYTES", 16)


def sent(tensors: Any = TENSORS, ask: Manifest = ASK) -> RecordDict:
    return OUT.encode(ask, OUT.pack(tensors))[0]


def refused(records: RecordDict, words: str = "", sender: str = "coordinator") -> None:
    with pytest.raises(MessageError, match=words or None):
        IN.decode(records, sender)


def forged(body: Any, chunks: dict[str, Array] | None = None) -> RecordDict:
    """Whatever manifest the coordinator signs."""
    sealed = COORDINATOR.seal(MESSAGE_TYPE, body if isinstance(body, bytes) else canonical(body))
    return RecordDict({"manifest": ConfigRecord({"sealed": sealed}), "chunks": ArrayRecord(chunks or {})})


def body(**changes: Any) -> dict[str, Any]:
    return {"v": 1, **dataclasses.asdict(ASK), "tensors": [], **changes}


def spec(shape: Any, dtype: Any = "float32", chunks: Any = (), name: Any = "a") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": shape, "chunks": list(chunks)}


def chunk(data: bytes) -> Array:
    return Array("uint8", (len(data),), "hansa.chunk", data)


def test_round_trip() -> None:
    records, digest = OUT.encode(ASK, OUT.pack(TENSORS))
    manifest, tensors, seen = IN.decode(records, "coordinator")
    assert manifest == ASK
    assert digest == seen
    assert list(tensors) == ["a", "b"]
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], value)
    assert IN.decode(forged(body()), "coordinator")[0] == ASK, "the forge of these tests makes good messages"


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)),
        max_size=3,
    )
)
def test_any_tensors_arrive_bit_by_bit(tensors: dict[str, Any]) -> None:
    for wire_in, wire_out in ((IN, OUT), (PlainWire(), PlainWire())):
        _, got, _ = wire_in.decode(wire_out.encode(ASK, wire_out.pack(tensors))[0], "coordinator")
        assert list(got) == list(tensors)
        for name, value in tensors.items():
            assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape)
            assert got[name].tobytes() == value.tobytes()
            assert not (got[name].size and got[name].flags.writeable), "a receiver could change what others receive"


def test_layout_in_memory_does_not_matter() -> None:
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    for odd in (a.T, a[:, ::2], a[::-1], np.asfortranarray(a)):
        _, got, _ = IN.decode(sent({"a": odd}), "coordinator")
        np.testing.assert_array_equal(got["a"], odd)


@pytest.mark.parametrize("dtype", ["float16", "complex64", "int32", "bool", "U3", "O", ">f4"])
def test_other_types_do_not_travel(dtype: str) -> None:
    with pytest.raises(MessageError, match="do not travel"):
        OUT.pack({"a": np.zeros(2, dtype)})


# -- chunks ----------------------------------------------------------------------------------------------------------


def test_altered_missing_extra_and_swapped_chunks() -> None:
    keys = list(sent()["chunks"])
    assert len(keys) == 4
    for key in keys:
        records = sent()
        data = records["chunks"][key].data
        records["chunks"][key] = chunk(data[:-1] + bytes([data[-1] ^ 1]))
        refused(records, "missing or was altered")
        for other in (data[:-1], data + b"\0", b""):
            records["chunks"][key] = chunk(other)
            refused(records, "missing or was altered")
        del records["chunks"][key]
        refused(records, "missing or was altered")
    for extra in ("00002.000000", "00000.000002", "x"):
        records = sent()
        records["chunks"][extra] = chunk(b"more")
        refused(records, "does not name")
    for one, two in ((keys[0], keys[2]), (keys[0], keys[1]), (keys[1], keys[3])):  # between and within tensors
        records = sent()
        chunks = records["chunks"]
        chunks[one], chunks[two] = chunks[two], chunks[one]
        refused(records, "missing or was altered")


def test_chunks_of_another_message() -> None:
    records = sent()
    records["chunks"] = sent({"a": TENSORS["b"], "b": TENSORS["a"]})["chunks"]
    refused(records, "altered")


@pytest.mark.parametrize(
    "bad",
    [
        spec([2, 3], "float16"),
        spec([2, 3], "O"),
        spec([2, 3], ["float32"]),
        spec([2, 3], None),
        spec([-1, 3]),
        spec([True]),
        spec(["2"]),
        spec("23"),
        spec(None),
        spec([2**40]),
        spec([1] * 17),
        spec([0, 2**39, 2**39]),
        spec([2**39, 0, 2**39]),
        spec([2, 3], chunks=[]),
        spec([2, 3], chunks=["0" * 64] * 3),
        spec([2, 3], chunks=[7, 7]),
        spec([0], chunks=["0" * 64]),
        {**spec([0]), "extra": 1},
        {"name": "a"},
        spec([0], name=7),
        7,
        {**spec([2, 3]), "chunks": "ab"},
        {**spec([2, 3]), "chunks": None},
    ],
)
def test_malformed_tensors(bad: Any) -> None:
    refused(forged(body(tensors=[bad])))


def test_one_name_twice_and_no_list() -> None:
    refused(forged(body(tensors=[spec([0]), spec([0])])), "malformed tensor")
    refused(forged(body(tensors={})), "without tensors")
    refused(forged(body(tensors=None)), "without tensors")


def test_ten_terabytes_are_refused_without_allocation() -> None:
    size = 10 * 1000**4
    for shape, hashes in (([size // 4], []), ([size // 4], ["0" * 64]), ([2**20, 2**20], []), ([2**39] * 16, [])):
        records = forged(body(tensors=[spec(shape, chunks=hashes)]))
        tracemalloc.start()
        try:
            refused(records, "too large|malformed shape")
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


def test_many_large_tensors_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", 40)
    data = b"\0" * 16
    specs = [spec([4], chunks=[sha256(data)], name=f"t{i}") for i in range(3)]
    chunks = {f"{i:05d}.000000": chunk(data) for i in range(3)}
    IN.decode(forged(body(tensors=specs[:2]), dict(list(chunks.items())[:2])), "coordinator")
    refused(forged(body(tensors=specs), chunks), "do not fit")


# -- who, to whom, about what ----------------------------------------------------------------------------------------


def test_sender_and_recipient() -> None:
    for wrong in (dataclasses.replace(ASK, recipient="ben"), dataclasses.replace(ASK, sender="ada")):
        refused(sent(ask=wrong), "delivered as coordinator's")
    refused(sent(), "does not stand in the charter", sender="eve")
    eve = SignedWire(identity("eve"), {}, CHARTER.sha256)
    refused(eve.encode(ASK, eve.pack({}))[0], "not signed by")
    with pytest.raises(MessageError, match=r"not signed by"):
        OUT.decode(sent(), "ada")


def test_a_partner_cannot_answer_in_anothers_name() -> None:
    ben = SignedWire(identity("ben"), {}, CHARTER.sha256)
    reply = dataclasses.replace(ASK.reply("update", "0" * 64), sender="ada")
    with pytest.raises(MessageError, match="not signed by"):
        OUT.decode(ben.encode(reply, ben.pack({}))[0], "ada")
    with pytest.raises(MessageError, match="delivered as ben's"):
        OUT.decode(ben.encode(reply, ben.pack({}))[0], "ben")


def test_what_is_signed_names_run_round_request_and_charter() -> None:
    """Nothing of them can be replaced without the coordinator's key: a replay elsewhere shows."""
    manifest = IN.decode(sent(), "coordinator")[0]
    assert (manifest.run_id, manifest.round, manifest.request_id) == ("run-1", 1, "run-1.1.train.ada")
    assert manifest.charter_sha256 == CHARTER.sha256
    sealed = sent()["manifest"]["sealed"]
    for place in range(0, len(sealed), 3):
        records = sent()
        records["manifest"]["sealed"] = sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]
        refused(records)


def test_a_reply_is_bound_to_its_request() -> None:
    reply = ASK.reply("update", "d" * 64, note="x")
    assert (reply.sender, reply.recipient) == ("ada", "coordinator")
    same = ("charter_sha256", "run_id", "round", "request_id")
    assert all(getattr(reply, name) == getattr(ASK, name) for name in same)
    assert (reply.in_reply_to, reply.fields) == ("d" * 64, {"note": "x"})


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"v": True},
        {"v": "1"},
        {"extra": 1},
        {"kind": 7},
        {"kind": "x" * 201},
        {"round": "1"},
        {"round": True},
        {"round": -1},
        {"round": 10**9 + 1},
        {"run_id": ""},
        {"run_id": "a b"},
        {"run_id": "-a"},
        {"run_id": "a\n"},
        {"run_id": "../../etc"},
        {"request_id": ""},
        {"request_id": "é"},
        {"request_id": "a/b"},
        {"fields": []},
        {"fields": None},
    ],
)
def test_malformed_manifests(changes: dict[str, Any]) -> None:
    refused(forged(body(**changes)))


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"{}", b'{"v":1}', b'{"v":1,"kind":"\\ud800"}', b"[" * 500])
def test_manifests_that_are_none(data: bytes) -> None:
    refused(forged(data))


def test_a_missing_field_and_another_layout() -> None:
    for name in body():
        less = body()
        del less[name]
        refused(forged(less))
    refused(forged(canonical(body()).replace(b",", b", ")), "layout")


def test_signatures_of_a_manifest() -> None:
    payload = canonical(body())
    mine = (COORDINATOR.key, COORDINATOR.sign(MESSAGE_TYPE, payload))
    for signatures in ((), (mine, mine), (mine, (ADA.key, ADA.sign(MESSAGE_TYPE, payload)))):
        sealed = write_envelope(Envelope(MESSAGE_TYPE, payload, signatures))
        refused(RecordDict({"manifest": ConfigRecord({"sealed": sealed}), "chunks": ArrayRecord()}), "exactly one")
    other = COORDINATOR.seal("application/other", payload)
    refused(RecordDict({"manifest": ConfigRecord({"sealed": other}), "chunks": ArrayRecord()}), "type")


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"manifest": ConfigRecord()}),
        RecordDict({"manifest": ConfigRecord({"sealed": "text"})}),
        RecordDict({"manifest": ArrayRecord(), "chunks": ArrayRecord()}),
        RecordDict({"manifest": ConfigRecord({"sealed": b""}), "chunks": ArrayRecord()}),
        RecordDict({"manifest": sent()["manifest"]}),
        RecordDict({"manifest": sent()["manifest"], "chunks": ConfigRecord()}),
    ],
)
def test_records_that_are_no_message(records: RecordDict) -> None:
    refused(records)


# -- stored messages -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)))
def test_stored_and_read_back(tensor: Any) -> None:
    records = sent({"t": tensor, "u": tensor})
    again = from_bytes(to_bytes(records))
    assert to_bytes(again) == to_bytes(records)
    assert IN.decode(again, "coordinator")[1]["t"].tobytes() == tensor.tobytes()


def test_every_truncation_and_every_changed_byte_of_a_stored_message() -> None:
    data = to_bytes(sent(weights()))
    for place in range(len(data)):
        for spoilt in (data[:place], data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]):
            with pytest.raises(MessageError):
                IN.decode(from_bytes(spoilt), "coordinator")


@given(st.binary(max_size=100))
def test_any_stored_bytes(data: bytes) -> None:
    for stored in (data, b"hansa-message/1\n" + data):
        with contextlib.suppress(MessageError):
            from_bytes(stored)


def test_plain_messages_are_for_one_process() -> None:
    wire = PlainWire()
    records, digest = wire.encode(ASK, wire.pack(TENSORS))
    assert digest == ""
    assert wire.decode(records, "coordinator")[0] == ASK
    with pytest.raises(MessageError):
        IN.decode(records, "coordinator")
