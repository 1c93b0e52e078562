"""Keys, envelopes, canonical bytes, and files that are written whole or not at all."""

from __future__ import annotations

import base64
import contextlib
import errno
import importlib.util
import json
import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from hypothesis import given
from hypothesis import strategies as st

from hansa.common import identity as module
from hansa.common.errors import HansaError, IdentityError, MessageError, OutputError
from hansa.common.identity import (
    Envelope,
    Identity,
    canonical,
    check_writable,
    fingerprint,
    key_from_pem,
    public_pem,
    read_envelope,
    real,
    strict_json,
    verify,
    write_envelope,
    write_whole,
)
from support import identity

VECTORS = Path(__file__).parents[1] / "vectors"
ADA, BEN = identity("ada"), identity("ben")
KIND = "application/x-test"
SEALED = ADA.seal(KIND, b"{}")


def opened(data: bytes, key: str = ADA.key, kind: str = KIND) -> bytes:
    """What a reader does: parse, then check the signature."""
    envelope = read_envelope(data, kind)
    envelope.signed_by(key)
    return envelope.payload


# -- envelopes -------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200), st.text(st.characters(codec="ascii", min_codepoint=32), min_size=1, max_size=30))
def test_round_trip(payload: bytes, kind: str) -> None:
    assert opened(ADA.seal(kind, payload), kind=kind) == payload


def test_the_signature_is_over_dsse_pre_authentication_encoding() -> None:
    """Checked with cryptography alone, from the DSSE document, not with our own functions."""
    (signature,) = json.loads(SEALED)["signatures"]
    key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature["keyid"]))
    key.verify(base64.b64decode(signature["sig"]), b"DSSEv1 18 application/x-test 2 {}")


def test_every_change_of_one_byte_is_refused() -> None:
    for place in range(len(SEALED)):
        for value in range(256):
            if value != SEALED[place]:
                with pytest.raises(MessageError):
                    opened(SEALED[:place] + bytes([value]) + SEALED[place + 1 :])


def test_every_removal_and_insertion_of_one_byte_is_refused() -> None:
    for place in range(len(SEALED) + 1):
        changed = [SEALED[:place] + bytes([value]) + SEALED[place:] for value in b' \n\t\x00"=A0,']
        changed.append(SEALED[:place] + SEALED[place + 1 :])
        for data in changed:
            if data != SEALED:
                with pytest.raises(MessageError):
                    opened(data)


def test_a_keyid_cannot_be_swapped() -> None:
    swapped = SEALED.replace(ADA.key.encode(), BEN.key.encode())
    with pytest.raises(MessageError, match="bad signature"):
        opened(swapped, BEN.key)
    with pytest.raises(MessageError, match="not signed by"):
        opened(swapped, ADA.key)
    with pytest.raises(MessageError, match="not signed by"):
        opened(SEALED, BEN.key)


@pytest.mark.parametrize(
    "keyid", ["", "zz", "AB" * 32, "ab" * 31, "ab" * 33, None, 7, ["a"], "ab" * 31 + " a", "é" * 64]
)
def test_a_keyid_that_is_no_key_is_a_message_error(keyid: object) -> None:
    data = json.loads(SEALED)
    data["signatures"][0]["keyid"] = keyid
    with pytest.raises(MessageError):
        opened(canonical(data))


def test_base64_has_one_spelling() -> None:
    data = json.loads(ADA.seal(KIND, b"a"))  # "YQ==": four bits of the last digit mean nothing
    for spelling in ("YR==", "YQ", "YQ=", "YQ===", "Y Q==", "YQ==\n", "_-==", "YQ==YQ=="):
        data["payload"] = spelling
        with pytest.raises(MessageError):
            opened(canonical(data))
    sig = data["signatures"][0]["sig"]
    for spelling in (sig[:-3] + "R==" if sig[-3] == "Q" else sig[:-3] + "Q==", sig.rstrip("="), sig + "\n"):
        data = json.loads(ADA.seal(KIND, b"a"))
        data["signatures"][0]["sig"] = spelling
        with pytest.raises(MessageError):
            opened(canonical(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"text"',
        b"7",
        SEALED + b"\n",
        b" " + SEALED,
        b"\xef\xbb\xbf" + SEALED,
        SEALED.decode().encode("utf-16"),
        SEALED.replace(b'"signatures"', b'"Signatures"'),
        SEALED.replace(b'"payload":', b'"extra":1,"payload":'),
        SEALED.replace(b'"payload":"e30="', b'"payload":"e30=","payload":"e30="'),
        SEALED.replace(b'"e30="', b'"e3\\u0030="'),
        SEALED.replace(b'"e30="', b"[" * 10_000 + b"]" * 10_000),
        SEALED.replace(b'"e30="', b'{"a":' * 900 + b"1" + b"}" * 900),
        SEALED.replace(b'"application/x-test"', b"[" * 300 + b"]" * 300),
        b'{"payload":"e30=","payloadType":"application/x-test","signatures":5}',
        b'{"payload":"e30=","payloadType":"application/x-test","signatures":[5]}',
        b'{"payload":7,"payloadType":"application/x-test","signatures":[]}',
    ],
)
def test_malformed_envelopes(data: bytes) -> None:
    with pytest.raises(MessageError):
        opened(data)


def test_another_type_is_refused() -> None:
    with pytest.raises(MessageError, match="wanted 'application/other'"):
        opened(SEALED, kind="application/other")


@given(st.binary(max_size=300))
def test_any_bytes_are_an_envelope_or_a_message_error(data: bytes) -> None:
    with pytest.raises(MessageError):
        read_envelope(data, KIND)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.text(st.characters(categories=["Cs"])) | st.floats(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(_json)
def test_whatever_strict_json_lets_through_has_canonical_bytes(value: Any) -> None:
    data = json.dumps(value, ensure_ascii=True).encode()
    try:
        parsed = strict_json(data)
    except MessageError:
        return
    assert strict_json(canonical(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"a":1,"a":1}', "twice"),
        ('{"x":{"a":1,"a":2}}', "twice"),
        ("1.0", "not an integer"),
        ("1e3", "not an integer"),
        ("-0.0", "not an integer"),
        ("NaN", "not an integer"),
        ("Infinity", "not an integer"),
        ("[-Infinity]", "not an integer"),
        ('"\\ud800"', "not valid JSON"),
        ('{"\\udfff":1}', "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
        ("[" * 40 + "]" * 40, "too deeply"),
        ("[" * 100_000 + "]" * 100_000, "not valid JSON"),
        ("", "not valid JSON"),
        ("{} {}", "not valid JSON"),
    ],
)
def test_strict_json_refuses(text: str, word: str) -> None:
    with pytest.raises(MessageError, match=word):
        strict_json(text.encode())


def test_strict_json_refuses_bytes_that_are_not_utf8() -> None:
    with pytest.raises(MessageError):
        strict_json(b'"\xff"')


@pytest.mark.parametrize("value", [1.0, {"a": 1.0}, [[float("nan")]], {1: "a"}, {"a": {2: 3}}, object(), {"a": b"x"}])
def test_what_has_no_canonical_bytes(value: object) -> None:
    with pytest.raises(TypeError):
        canonical(value)


def test_canonical_bytes() -> None:
    assert canonical({"b": [1, None, True], "a": "é\n"}) == '{"a":"é\\n","b":[1,null,true]}'.encode()


@given(st.floats(allow_nan=False))
def test_a_real_reads_back_as_the_same_float(value: float) -> None:
    assert float(real(value)).hex() == value.hex()


# -- golden vectors --------------------------------------------------------------------------------------------------


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("core_vectors", VECTORS / "core_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_golden_vectors() -> None:
    """The bytes of format version 1 do not change by accident."""
    assert _generator().make() == json.loads((VECTORS / "core_vectors.json").read_text())


# -- keys ------------------------------------------------------------------------------------------------------------


def test_a_saved_key_is_0600_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "identity.key"
    before = os.umask(0o077)
    try:
        os.umask(0)
        ADA.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Identity.load("ada", path)
    assert again.key == ADA.key
    assert again.seal(KIND, b"{}") == SEALED


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620, 0o601])
def test_a_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    ADA.save(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match=r"(?s)readable by others.*chmod 600"):
        Identity.load("ada", path)


def _pem(key: Any, encryption: Any = None) -> bytes:
    made: bytes = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    )
    return made


@pytest.mark.parametrize(
    ("pem", "words"),
    [
        (_pem(ec.generate_private_key(ec.SECP256R1())), "not an Ed25519 key"),
        (_pem(x25519.X25519PrivateKey.generate()), "not an Ed25519 key"),
        (_pem(ADA._private, serialization.BestAvailableEncryption(b"secret")), "not a private key in PEM form"),
        (public_pem(ADA.key), "not a private key in PEM form"),
        (b"", "not a private key in PEM form"),
        (b"\x00\xff" * 50, "not a private key in PEM form"),
        (_pem(ADA._private)[:60], "not a private key in PEM form"),
    ],
)
def test_what_is_no_identity_key(tmp_path: Path, pem: bytes, words: str) -> None:
    path = tmp_path / "identity.key"
    write_whole(path, pem, mode=0o600)
    with pytest.raises(IdentityError, match=words):
        Identity.load("ada", path)


def test_a_missing_key(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="No such file"):
        Identity.load("ada", tmp_path / "identity.key")


def test_a_private_key_shows_nowhere() -> None:
    raw = ADA._private.private_bytes_raw()
    assert raw.hex() not in repr(ADA)
    assert repr(ADA) == "Identity(name='ada')"


def test_a_public_pem_has_one_spelling() -> None:
    pem = public_pem(ADA.key)
    assert key_from_pem(pem) == ADA.key
    for place in range(len(pem)):
        for changed in (
            pem[:place] + pem[place + 1 :],
            pem[:place] + b"\n" + pem[place:],
            pem[:place] + b" " + pem[place:],
        ):
            if changed != pem:
                with pytest.raises(IdentityError):
                    key_from_pem(changed)
        for value in range(256):
            if value != pem[place]:
                with contextlib.suppress(IdentityError):  # one bit further it may be another key, never this one
                    assert key_from_pem(pem[:place] + bytes([value]) + pem[place + 1 :]) != ADA.key
    for other in (b"# ada\n" + pem, pem.replace(b"\n", b"\r\n"), pem + pem):
        with pytest.raises(IdentityError):
            key_from_pem(other)
    wrong = x25519.X25519PrivateKey.generate().public_key()
    with pytest.raises(IdentityError, match="not an Ed25519"):
        key_from_pem(wrong.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))


def test_fingerprints_differ_and_can_be_read_out() -> None:
    assert fingerprint(ADA.key) != fingerprint(BEN.key)
    groups = fingerprint(ADA.key).split(" ")
    assert [len(group) for group in groups] == [4] * 10


def test_verify_with_what_is_no_key() -> None:
    for key in ("", "00", "g" * 64, "A" * 64):
        with pytest.raises(MessageError, match="not a public key"):
            verify(key, KIND, b"", b"\0" * 64)


def test_two_signatures_are_told_apart() -> None:
    both = Envelope(KIND, b"{}", tuple((who.key, who.sign(KIND, b"{}")) for who in (ADA, BEN)))
    read = read_envelope(write_envelope(both), KIND)
    read.signed_by(ADA.key)
    read.signed_by(BEN.key)
    crossed = Envelope(KIND, b"{}", ((ADA.key, both.signatures[1][1]), (BEN.key, both.signatures[0][1])))
    for who in (ADA, BEN):
        with pytest.raises(MessageError, match="bad signature"):
            crossed.signed_by(who.key)


# -- whole files -----------------------------------------------------------------------------------------------------


def _only(folder: Path, name: str) -> bytes:
    assert [path.name for path in folder.iterdir()] == [name], "a temporary file was left behind"
    return (folder / name).read_bytes()


def test_a_file_too_large_leaves_the_old_bytes(tmp_path: Path) -> None:
    """The kernel itself says no half way through the write (RLIMIT_FSIZE)."""
    import signal

    path = tmp_path / "f"
    write_whole(path, b"old")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OutputError, match="f: "):
            write_whole(path, b"n" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert _only(tmp_path, "f") == b"old"


@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
def test_a_full_disk_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "f"
    write_whole(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OutputError, match=r"(?s)disk is full.*--resume"):
            write_whole(path, b"new")
    assert _only(tmp_path, "f") == b"old"
    write_whole(path, b"new")
    assert _only(tmp_path, "f") == b"new"


def test_bytes_are_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (done.append(name), original(*a))[1])
    write_whole(tmp_path / "f", b"x")
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder that holds the name


def test_what_is_no_ordinary_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link"):
        with pytest.raises(OutputError, match="no ordinary file"):
            write_whole(tmp_path / name, b"x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_where_a_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="may write to"):
        write_whole(tmp_path / "file" / "f", b"x")


def test_every_error_here_is_ours() -> None:
    assert all(issubclass(e, HansaError) for e in (IdentityError, MessageError, OutputError))
    assert module.MAX_DEPTH >= 8


def test_whether_a_file_can_be_written_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.csv")
    check_writable(tmp_path / "not" / "yet" / "new.csv")
    (tmp_path / "old.csv").write_bytes(b"old")
    check_writable(tmp_path / "old.csv")
    for bad in (
        tmp_path,
        tmp_path / "old.csv" / "in-a-file.csv",
        tmp_path / ("x" * 300),
        Path("/dev/full"),
        Path("/proc/x.csv"),
    ):
        with pytest.raises(OutputError):
            check_writable(bad)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("old.csv", b"old")]
