"""The agreement: who signed what, and that what people read is what they sign."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.common.charter import CHARTER_TYPE, Charter, SignedCharter, SimulatedClients, draft, in_words
from hansa.common.errors import CharterError
from hansa.common.identity import Envelope, canonical, fingerprint, strict_json, write_envelope
from support import NO_PRIVACY, charter, config, identity, terms

NOW = datetime.now(UTC)


def refused(signed: SignedCharter, words: str, now: datetime | None = NOW) -> CharterError:
    with pytest.raises(CharterError, match=words) as caught:
        signed.verify(now)
    return caught.value


def test_signed_by_everyone_it_verifies(tmp_path: Path) -> None:
    signed = charter()
    assert signed.verify(NOW) == signed.charter
    signed.save(tmp_path / "charter.json")
    again = SignedCharter.load(tmp_path / "charter.json")
    assert again.to_bytes() == signed.to_bytes()
    assert again.verify(NOW) == signed.charter


def test_the_order_of_signing_does_not_show() -> None:
    one = two = SignedCharter.unsigned(charter().charter)
    for name in ("ada", "ben", "cy", "coordinator"):
        one = one.sign(identity(name))
    for name in ("coordinator", "cy", "ada", "cy", "ben"):
        two = two.sign(identity(name))
    assert one.to_bytes() == two.to_bytes()


@pytest.mark.parametrize("absent", ["ada", "ben", "cy", "coordinator"])
def test_a_missing_signature_is_named(absent: str) -> None:
    signed = charter()
    key = identity(absent).key
    short = SignedCharter(signed.payload, tuple(s for s in signed.signatures if s[0] != key))
    assert short.missing() == [absent]
    assert "hansa charter sign" in refused(short, f"not signed by {absent}\n").hint
    assert f"not yet signed by: {absent}" in in_words(short)


def test_expired() -> None:
    signed = charter()
    assert signed.verify(signed.charter.expires - timedelta(seconds=1))
    refused(signed, "expired on", signed.charter.expires)
    assert signed.verify(None), "an audit of the past takes no clock"


def test_edited_after_signing() -> None:
    signed = charter()
    for old, new in (
        (b'"rounds":3', b'"rounds":9'),
        (b'"epsilon":"2.0"', b'"epsilon":"9.0"'),
        (b'"quorum":2', b'"quorum":1'),
    ):
        assert signed.payload.count(old) == 1
        edited = SignedCharter(signed.payload.replace(old, new), signed.signatures)
        refused(edited, "the signature of ada does not fit: the charter was edited")


def test_every_byte_of_the_file_counts(tmp_path: Path) -> None:
    data = charter().to_bytes()
    for place in range(0, len(data) - 1, 5):  # every byte is an envelope's; test_identity does all of them
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(CharterError):
            SignedCharter.parse(changed).verify(NOW)


def test_a_stranger_signed() -> None:
    signed, eve = charter(), identity("eve")
    with pytest.raises(CharterError, match="eve's key"):
        signed.sign(eve)
    more = (*signed.signatures, (eve.key, eve.sign(CHARTER_TYPE, signed.payload)))
    refused(SignedCharter(signed.payload, more), "signed by a key that is not a partner's: ")
    instead = (*signed.signatures[:2], more[-1], signed.signatures[3])
    refused(SignedCharter(signed.payload, instead), "not a partner's")
    odd = Envelope(CHARTER_TYPE, signed.payload, (*signed.signatures, ("zz", b"")))
    with pytest.raises(CharterError, match="not a public key"):
        SignedCharter.parse(write_envelope(odd))


def test_one_signature_twice() -> None:
    signed = charter()
    refused(SignedCharter(signed.payload, (*signed.signatures, signed.signatures[0])), "stands in it twice")


def test_a_signature_in_another_name() -> None:
    signed = charter()
    (ada, sig), (ben, _), *rest = signed.signatures
    refused(SignedCharter(signed.payload, ((ada, sig), (ben, sig), *rest)), "signature of ben does not fit")


def test_a_signature_for_another_purpose() -> None:
    """The same bytes signed as something else are no signature of a charter."""
    signed = charter()
    made = tuple((k, identity(n).sign("application/other", signed.payload)) for n, k in signed.charter.keys().items())
    refused(SignedCharter(signed.payload, made), "does not fit")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"partners": [{"name": n, "key": identity(n).key, "declared_records": 40} for n in ("ada", "ada")]}, "twice"),
    ({"partners": [{"name": n, "key": identity("ada").key, "declared_records": 40} for n in ("ada", "ben")]}, "twice"),
    ({"coordinator": {"name": "ada", "key": identity("coordinator").key}}, "twice"),
    ({"coordinator": {"name": "coordinator", "key": identity("ada").key}}, "twice"),
    ({"partners": []}, "either partners or a simulated population"),
    ({"population": {"clients": 200, "declared_records": 9}}, "either partners or"),
    (
        {"partners": [], "population": {"clients": 200, "declared_records": 9}, "simulated": False},
        "only in a simulation",
    ),
    ({"privacy__noise_multiplier": None}, "noise multiplier is missing"),
    ({"privacy__noise_multiplier": 0.29}, "0.3"),
    ({"privacy__delta": 0.025}, "not below 1/n"),
    ({"expires": datetime(2025, 1, 1, tzinfo=UTC)}, "expires must be after created"),
    ({"expires": datetime(2030, 1, 1)}, "time zone"),
    ({"coordinator__key": "AB" * 32}, "coordinator.key"),
    ({"coordinator__key": "ab" * 32 + "\n"}, "coordinator.key"),
    ({"surprise": 1}, "surprise"),
    ({"format": "hansa-charter/2"}, "format"),
    ({"purpose": "x\n  NOISE: none"}, "purpose"),
    ({"benefit": "a\x1b[1Ab"}, "benefit"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_agreed(changes: dict[str, Any], words: str) -> None:
    from hansa.common import charter as module

    good = strict_json(charter().payload)
    made = terms(**changes)
    payload = canonical(module._decimal({**good, **_json({k.split("__")[0]: made[k.split("__")[0]] for k in changes})}))
    with pytest.raises(CharterError, match=words):
        SignedCharter(payload)


def _json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return {k: _json(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"rounds":3', b'"rounds":"3"'),
        (b'"rounds":3', b'"rounds":"3.0"'),
        (b'"simulated":true', b'"simulated":"yes"'),
        (b'"simulated":true', b'"simulated":1'),
        (b'"epsilon":"2.0"', b'"epsilon":"2.00"'),
        (b'"epsilon":"2.0"', b'"epsilon":2'),
        (b'"created":"2026-01-01T00:00:00Z"', b'"created":1767225600'),
        (b'"population":null,', b""),
        (b'"quorum":2', b'"quorum": 2'),
    ],
)
def test_a_charter_has_one_reading(old: bytes, new: bytes) -> None:
    """Another reader (the auditor's) may not take the same bytes for other terms."""
    payload = charter().payload
    assert payload.count(old) == 1
    with pytest.raises(CharterError):
        SignedCharter(payload.replace(old, new))


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    for read in (SignedCharter, SignedCharter.parse):
        with pytest.raises(CharterError):
            read(data)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CharterError, match=r"(?s)none.json: No such file.*charter file"):
        SignedCharter.load(tmp_path / "none.json")
    (tmp_path / "c.json").write_bytes(b"{}\n")
    with pytest.raises(CharterError, match=r"c.json: not a charter"):
        SignedCharter.load(tmp_path / "c.json")


_positive = st.floats(min_value=1e-300, max_value=1e300, allow_nan=False)


@given(st.floats(1e-300, 1e4), _positive, st.floats(0.3, 1e300), st.floats(5e-324, 1.0), st.floats(1e-300, 0.02))
def test_floats_survive_exactly(lr: float, clip: float, sigma: float, q: float, delta: float) -> None:
    made = terms(privacy={"epsilon": 1.1, "delta": delta, "clip_norm": clip, "noise_multiplier": sigma})
    made["algorithm"]["local"].update(sampling_rate=q, optimizer={"lr": lr})
    before = Charter.model_validate(made)
    assert SignedCharter(SignedCharter.unsigned(before).payload).charter == before


SHARED = {"kind": "shared", "epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 8.0}
SECURE = {"colluding": 1, "retries": 2, "dimension": 8}


def test_a_charter_without_what_came_later_keeps_its_bytes() -> None:
    said = strict_json(charter().payload)
    assert "secure_aggregation" not in said
    assert "average_last" not in said["algorithm"]
    assert charter(secure_aggregation=None, algorithm__average_last=None).payload == charter().payload


def test_secure_aggregation_survives() -> None:
    signed = charter(privacy=SHARED, secure_aggregation=SECURE, quorum=3, algorithm__average_last=0.5)
    said = strict_json(signed.payload)
    assert said["secure_aggregation"] == SECURE
    assert (said["privacy"]["kind"], said["algorithm"]["average_last"]) == ("shared", "0.5")
    assert "noise" not in said["privacy"]
    again = SignedCharter(signed.payload, signed.signatures)
    assert again.verify(NOW) == signed.charter
    assert again.payload == signed.payload


def test_noise_is_another_word_for_kind_and_in_a_charter_there_is_one_word() -> None:
    kind = charter(privacy=SHARED, secure_aggregation=SECURE, quorum=3)
    noise = {"noise" if key == "kind" else key: value for key, value in SHARED.items()}
    assert charter(privacy=noise, secure_aggregation=SECURE, quorum=3).payload == kind.payload
    for old, new in (
        (b'"kind":"shared"', b'"noise":"shared"'),
        (b'"kind":"shared"', b'"kind":"shared","noise":"shared"'),
    ):
        assert kind.payload.count(old) == 1
        with pytest.raises(CharterError):
            SignedCharter(kind.payload.replace(old, new))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"secure_aggregation": None}, "secure_aggregation is missing"),
        ({"secure_aggregation": {**SECURE, "dimension": None}}, "dimension is missing"),
        ({"secure_aggregation": {**SECURE, "colluding": 2}}, "too many of 3 partners"),
        ({"quorum": 2}, "at least 3"),
        ({"algorithm__weighting": "uniform"}, "weighting must be declared"),
        ({"algorithm__local__steps": 2}, "steps must be 1"),
    ],
)
def test_what_secure_aggregation_cannot_keep_is_not_agreed(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        charter(**{"privacy": SHARED, "secure_aggregation": SECURE, "quorum": 3, **changes})


@pytest.mark.parametrize(
    ("colluding", "words"), [(0, "the coordinator alone"), (1, "the coordinator and one partner, together")]
)
def test_words_for_shared_noise(colluding: int, words: str) -> None:
    signed = charter(privacy=SHARED, secure_aggregation={**SECURE, "colluding": colluding}, quorum=3)
    said = in_words(signed)
    assert signed.charter.adversary.startswith(words)
    for one in (
        f"adversary: {words}",
        f"shared, discrete Gaussian, 8 x the clipping norm 1 in every sum; each partner adds 1/sqrt({3 - colluding})",
        "sums over 3 partners or more",
        "ask for 2 rounds again, each of which is paid for",
    ):
        assert one in said, one
    together = "at most one partner works with it" if colluding else "no partner works with it"
    assert f"this holds while {together}; {2 + colluding} partners' shares open a sum" in said
    none = in_words(charter(privacy=SHARED, secure_aggregation={**SECURE, "retries": 0}, quorum=3))
    assert "no round may be asked again" in none
    local = charter(secure_aggregation=SECURE, quorum=3).charter
    assert local.adversary.startswith("everyone but the partner itself")


def test_time_zones_survive() -> None:
    made = charter(expires=datetime(2030, 1, 1, 12, tzinfo=timezone(timedelta(hours=5, minutes=30))))
    assert SignedCharter(made.payload).charter.expires == made.charter.expires


def test_words_say_what_is_agreed() -> None:
    signed = charter(benefit="Everyone gets it.", purpose="To learn.")
    words = in_words(signed)
    for said in (
        signed.sha256,
        "unit: one record of one partner",
        "adjacency: add or remove one record",
        "epsilon = 2 at delta = 0.001",
        "noise: local, Gaussian, 4 x the clipping norm 1",
        "adversary: everyone but the partner itself: the coordinator, the other partners",
        "SIMULATED",
        "3 rounds of fedavg, 1 local step of sgd",
        "at least 2 answer within 60 s",
        "Everyone gets it.",
        "To learn.",
        "signed by everyone",
        *(fingerprint(identity(n).key) for n in ("ada", "ben", "cy", "coordinator")),
    ):
        assert said in words, said


def test_words_for_other_kinds() -> None:
    assert "NONE. Updates leave unprotected" in in_words(charter(privacy=NO_PRIVACY))
    assert "epsilon" not in in_words(charter(privacy=NO_PRIVACY))
    public = in_words(charter(evaluation={"kind": "public", "test_fraction": 0.25}))
    assert "25% of rows that each owner registered as PUBLIC" in public
    private = in_words(charter(evaluation={"kind": "private", "noise_multiplier": 20.0}))
    assert "Gaussian noise 20 x sensitivity 1" in private
    assert "charged to the same budget" in private
    many = charter(partners=[], population={"clients": 200, "declared_records": 9})
    assert "200 simulated clients of about 9 records each" in in_words(many)
    assert "SIMULATED" not in in_words(charter(simulated=False))


def test_draft() -> None:
    asked = config(privacy={"epsilon": 1.0, "delta": 1e-4, "clip_norm": 1.0})
    keys = {name: identity(name).key for name in asked.partners or {}}
    common: dict[str, Any] = {
        "task_sha256": "c" * 64,
        "coordinator_key": identity("coordinator").key,
        "simulated": True,
    }
    made = draft(asked, partner_keys=keys, noise_multiplier=7.0, **common)
    assert made.privacy.noise_multiplier == 7.0
    assert {m.name: m.declared_records for m in made.partners}["switzerland"] == 100
    assert (made.expires - made.created).days == asked.expires_days
    with pytest.raises(CharterError, match="noise multiplier is missing"):
        draft(asked, partner_keys=keys, noise_multiplier=None, **common)
    clients = SimulatedClients(clients=200, declared_records=9)
    with pytest.raises(CharterError, match="either partners or"):
        draft(asked, partner_keys=keys, noise_multiplier=7.0, population=clients, **common)
