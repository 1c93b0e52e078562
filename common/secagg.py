"""Secure aggregation: a sum of integer vectors, and nothing else, for a coordinator that may be malicious.

Pure functions for both sides; no I/O. One masked sum (an *attempt* at a round) takes three exchanges:

  mask    every partner of the roster sends its vector under a mask shared with each peer, which cancel in the sum, and one of its own;
          the seeds of all of these in shares, each encrypted to one peer; and a signed word on which attempt it took part in
  agree   those whose vector arrived (*survivors*) are told who they are, with everybody's word; each signs that list
  reveal  with the signatures of `threshold` of them under the same list, each reveals its shares of survivors' own masks, and its
          masks with, and shares of others' masks with, who dropped out

Rules that make it safe, and where they are kept:

  * Keys are of one run, each signed by the partner's charter identity key (`signed_key`, `read_keys`): the coordinator cannot make
    one, and a certificate makes none. The private half is never shared.
  * Everything that must be the same for all (charter, run, round, attempt, model, roster with keys, threshold, quorum, ring) is hashed
    into every mask, every encrypted share and every signature (`Agreement.digest`).
  * In one attempt a partner signs one list, of `quorum` survivors or more, itself among them (`agree`). With 2·threshold − n > t no two
    lists get `threshold` signatures, so for one peer the coordinator learns of one mask's kind only: of a survivor its own mask, of
    who dropped out those that it shares with survivors. That needs memory, which is the caller's: record the list before the
    signature leaves. Without the signatures partners who are told different lists open sums of fewer than the quorum, or one vector
    (tests/common/test_secagg.py plays it).

References: Bonawitz et al. 2017 (CCS), sections 4 and 6; Ma et al. 2023 (Flamingo, 2308.09883). What differs: docs/adr/0014.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .config import threshold_of
from .errors import MessageError, Refusal, Refused
from .identity import Identity, canonical, read_envelope, strict_json

KEY_TYPE = "application/vnd.hansa.secagg-key+json"
WORD_TYPE = "application/vnd.hansa.secagg-word+json"
LIST_TYPE = "application/vnd.hansa.secagg-survivors+json"
KEY = 32
"""Bytes of a private key."""
SEED = 16
"""Bytes of a mask's seed."""
PRIME = 2**130 - 5
"""Of the field in which seeds are shared."""
SHARE = 17
"""Bytes of a share."""
RINGS = (32, 64)
"""Bits of the rings that there are: those whose sums numpy wraps by itself."""
WRAP = -40.0
"""log2 of the largest probability that a sum wraps, once in a run."""

Ring = npt.NDArray[np.unsignedinteger[Any]]


# -- keys --------------------------------------------------------------------------------------------------------------


def new_key() -> bytes:
    """The private key of one run: 32 raw bytes, from the operating system."""
    raw = serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    return X25519PrivateKey.generate().private_bytes(*raw)


def public_key(private: bytes) -> str:
    """The public half as 64 hex digits."""
    key = X25519PrivateKey.from_private_bytes(private).public_key()
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def signed_key(identity: Identity, charter_sha256: str, run_id: str, private: bytes) -> bytes:
    """The public half, in an envelope that the partner's identity key signed for this run."""
    about = {"v": 1, "charter_sha256": charter_sha256, "run_id": run_id, "name": identity.name}
    return identity.seal(KEY_TYPE, canonical({**about, "key": public_key(private)}))


def read_keys(
    envelopes: Mapping[str, bytes], charter_sha256: str, run_id: str, identities: Mapping[str, str]
) -> dict[str, str]:
    """Everybody's public key of a run.

    Args:
        envelopes: by partner.
        identities: the charter's identity keys, by partner.

    Raises:
        Refused: one is no partner's, not signed by it, for another charter, run or name, or a key that stands there twice.
    """
    keys: dict[str, str] = {}
    for name, data in envelopes.items():
        if name not in identities:
            raise Refused(Refusal.SECAGG_ROSTER, f"{name!r} is no partner of this charter")
        keys[name] = _read_key(data, charter_sha256, run_id, name, identities[name])
    if len(set(keys.values())) != len(keys):
        raise Refused(Refusal.SECAGG_KEY, "two partners with one key")
    return keys


@lru_cache(maxsize=1024)  # every request of a run brings them again
def _read_key(data: bytes, charter_sha256: str, run_id: str, name: str, identity: str) -> str:
    try:
        envelope = read_envelope(data, KEY_TYPE)
        if len(envelope.signatures) != 1:
            raise MessageError("not exactly one signature")
        envelope.signed_by(identity)
        said = strict_json(envelope.payload)
        key = said["key"] if isinstance(said, dict) else None
        if not isinstance(key, str) or not re.fullmatch(r"[0-9a-f]{64}", key):
            raise MessageError("no key in it")
        if int.from_bytes(raw := bytes.fromhex(key), "little") >= 2**255 - 19:
            raise MessageError("a key in another form than its usual one")
        # Some points make the same secret with everybody; they are refused here, before anybody is charged for a round.
        X25519PrivateKey.from_private_bytes(bytes(32)).exchange(X25519PublicKey.from_public_bytes(raw))
        wanted = {"v": 1, "charter_sha256": charter_sha256, "run_id": run_id, "name": name, "key": key}
        if envelope.payload != canonical(wanted):
            raise MessageError("it is for another run, charter or partner")
    except (MessageError, LookupError, ValueError) as err:
        raise Refused(Refusal.SECAGG_KEY, f"the key given as {name}'s: {_first_line(err)}") from err
    return key


def _first_line(err: Exception) -> str:
    return str(err).splitlines()[0][:200] if str(err) else type(err).__name__


# -- what all agree on -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """One attempt at a masked sum.

    Attributes:
        round: from 1; attempt: from 0, one more for each retry.
        model_sha256: of the model that was sent.
        keys: X25519 public keys of the roster, by partner, in the roster's order.
        threshold: how many shares open an own mask.
        quorum: the least number of vectors in a sum.
        bits: of the ring; length: of the vectors.
    """

    charter_sha256: str
    run_id: str
    round: int
    attempt: int
    model_sha256: str
    keys: Mapping[str, str]
    threshold: int
    quorum: int
    bits: int
    length: int

    @property
    def roster(self) -> list[str]:
        """Who is asked, in order."""
        return list(self.keys)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        said = {one.name: getattr(self, one.name) for one in fields(self)}
        said["keys"] = [[name, key] for name, key in self.keys.items()]  # their order counts
        return hashlib.sha256(canonical({**said, "v": 1})).hexdigest()

    def check(self, me: str, private: bytes, charter_partners: Sequence[str], colluding: int, quorum: int) -> None:
        """Return when this is what `me` may take part in.

        Args:
            charter_partners: everybody who signed the charter.
            colluding: t of the charter.
            quorum: N_min of the charter.

        Raises:
            Refused: with the reason.
        """
        if self.keys.get(me) != public_key(private):
            raise Refused(Refusal.SECAGG_ROSTER, f"{me} is not in the roster with its key of this run")
        if not set(self.keys) <= set(charter_partners):
            raise Refused(Refusal.SECAGG_ROSTER, "somebody in the roster is no partner of this charter")
        if self.quorum != quorum or len(self.keys) < quorum:
            raise Refused(
                Refusal.SECAGG_TERMS, f"a roster of {len(self.keys)} or a quorum of {self.quorum}, agreed is {quorum}"
            )
        if self.threshold != threshold_of(len(charter_partners), colluding):
            raise Refused(Refusal.SECAGG_TERMS, f"a threshold of {self.threshold} is not what the charter comes to")
        if self.bits not in RINGS or self.length < 1:
            raise Refused(Refusal.SECAGG_TERMS, f"no ring of {self.bits} bits")


# -- a partner ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """What goes with a masked vector.

    Attributes:
        word: the signed statement which attempt it is of, for the other partners.
        shares: by peer, encrypted to it: one share of each seed, the own mask's first, then those with each other peer, in the roster's
            order; under the sender's own name what it needs itself.
        commitments: SHA-256 of each seed: of the own mask's under the sender's own name, of the one with a peer under that name. For the
            coordinator, who can tell by them which of the revealed seeds and shares fit.
    """

    word: bytes
    shares: Mapping[str, bytes]
    commitments: Mapping[str, str]


def mask(agreement: Agreement, identity: Identity, private: bytes, values: Ring) -> tuple[Ring, Sent]:
    """The masked vector, and what goes with it. The own mask is fresh at every call.

    Args:
        agreement: checked (`Agreement.check`). Masks with peers depend on nothing but it and the keys: one attempt masks one vector.
        values: in the ring, [length]; see `to_ring`. Not changed.

    Raises:
        MessageError: another length or ring.
    """
    me, roster = identity.name, agreement.roster
    _check_vector(agreement, values, me)
    seeds = {me: os.urandom(SEED)}
    pairs = _pairs(agreement, me, private)
    seeds |= {peer: _pair_seed(agreement, me, peer, pair) for peer, pair in pairs.items()}
    masked = values.copy()
    for peer, seed in seeds.items():
        _add_stream(masked, seed, _sign(agreement, me, peer))
    dealt = [_split(seed, agreement.threshold, len(roster)) for seed in seeds.values()]
    shares = {
        peer: _seal(agreement, me, peer, pairs.get(peer, private), b"".join(shares[at] for shares in dealt))
        for at, peer in enumerate(roster)
    }
    word = identity.seal(WORD_TYPE, canonical({"v": 1, "agreement": agreement.digest, "name": me}))
    return masked, Sent(word, shares, {peer: hashlib.sha256(seed).hexdigest() for peer, seed in seeds.items()})


def agree(
    agreement: Agreement,
    identity: Identity,
    words: Mapping[str, bytes],
    identities: Mapping[str, str],
    before: Sequence[str] | None,
) -> bytes:
    """The signature under a list of survivors. Record the list before it leaves.

    Args:
        agreement: that of the vector that was sent.
        words: of every survivor, `Sent.word`.
        identities: the charter's identity keys, by partner.
        before: the list that was signed for this attempt before, as it was recorded; None: none was.

    Raises:
        Refused: another list was signed; the signer is called dropped; there are fewer survivors than the quorum; one of them is not in the
            roster or did not take part in the same attempt.
    """
    me = identity.name
    survivors = sorted(words)
    if before is not None and sorted(before) != survivors:
        raise Refused(
            Refusal.SECAGG_SURVIVORS, "another list was signed before: one peer would be both alive and dropped"
        )
    if me not in words:
        raise Refused(Refusal.SECAGG_SURVIVORS, f"{me} is called dropped, but it sent its vector")
    if strangers := set(survivors) - set(agreement.keys):
        raise Refused(Refusal.SECAGG_ROSTER, f"{min(strangers)!r} is not in the roster")
    if len(survivors) < max(agreement.quorum, agreement.threshold):
        raise Refused(Refusal.SECAGG_SURVIVORS, f"{len(survivors)} survivors, agreed are {agreement.quorum} or more")
    for name, word in words.items():
        _check_word(agreement, name, word, identities[name])
    return identity.seal(LIST_TYPE, _list(agreement, survivors))


@dataclass(frozen=True)
class Revealed:
    """What one survivor reveals.

    Attributes:
        own: of each survivor, the share of its own mask's seed.
        dropped: of each partner that dropped out, the seed of the mask between the two.
        between: (survivor, who dropped out) -> the share of the seed of the mask between those two.
    """

    own: Mapping[str, bytes]
    dropped: Mapping[str, bytes]
    between: Mapping[tuple[str, str], bytes]


def reveal(
    agreement: Agreement,
    me: str,
    private: bytes,
    survivors: Sequence[str],
    signatures: Mapping[str, bytes],
    shares: Mapping[str, bytes],
    identities: Mapping[str, str],
) -> Revealed:
    """What opens the sum of the survivors' vectors, and no other.

    Args:
        survivors: the list that `me` signed, as it was recorded.
        signatures: of survivors under that list.
        shares: of every survivor, what it encrypted to `me`.
        identities: the charter's identity keys, by partner.

    Raises:
        Refused: fewer than `threshold` survivors signed this list, or fewer of the shares are ones of this attempt. Of one that is
            none nothing is revealed: who dealt it must not make others fall silent.
    """
    roster = agreement.roster
    signed = 0
    for name, data in signatures.items():
        if name in survivors:
            _check_signed(LIST_TYPE, data, _list(agreement, sorted(survivors)), identities[name], name, "list")
            signed += 1
    if me not in survivors or signed < agreement.threshold:
        raise Refused(
            Refusal.SECAGG_SURVIVORS,
            f"{signed} signatures under this list of survivors, needed are {agreement.threshold}",
        )
    if set(shares) != set(survivors):
        raise Refused(Refusal.SECAGG_SHARE, "not one share of every survivor")
    pairs = _pairs(agreement, me, private)
    gone = [peer for peer in roster if peer not in survivors]
    own: dict[str, bytes] = {}
    between: dict[tuple[str, str], bytes] = {}
    bad: list[Refused] = []
    for name in survivors:
        try:
            dealt = _unseal(agreement, name, me, pairs.get(name, private), shares[name])
        except Refused as refused:
            bad.append(refused)
            continue
        own[name] = dealt[name]
        between |= {(name, peer): dealt[peer] for peer in gone}
    if len(own) < agreement.threshold:
        raise bad[0]
    return Revealed(own, {peer: _pair_seed(agreement, me, peer, pairs[peer]) for peer in gone}, between)


def _list(agreement: Agreement, survivors: Sequence[str]) -> bytes:
    return canonical({"v": 1, "agreement": agreement.digest, "survivors": list(survivors)})


def _check_word(agreement: Agreement, name: str, word: bytes, identity: str) -> None:
    wanted = canonical({"v": 1, "agreement": agreement.digest, "name": name})
    _check_signed(WORD_TYPE, word, wanted, identity, name, "word")


def _check_signed(kind: str, data: bytes, payload: bytes, identity: str, name: str, what: str) -> None:
    try:
        envelope = read_envelope(data, kind)
        if len(envelope.signatures) != 1:
            raise MessageError("not exactly one signature")
        envelope.signed_by(identity)
    except MessageError as err:
        raise Refused(Refusal.SECAGG_SURVIVORS, f"the {what} given as {name}'s: {_first_line(err)}") from err
    if envelope.payload != payload:
        told = (
            "took part in another attempt (round, model, roster, threshold or ring)"
            if what == "word"
            else "signed another list"
        )
        raise Refused(Refusal.SECAGG_SURVIVORS, f"{name} {told}")


# -- the coordinator ---------------------------------------------------------------------------------------------------


@dataclass
class Sum:
    """The masked sum of an attempt, as vectors come in.

    Attributes:
        arrived: partner -> what came with its vector.
        total: the sum of vectors, [length] in the ring.
        liars: who dealt or revealed something that does not fit, as far as `open` had to look.
    """

    agreement: Agreement
    arrived: dict[str, Sent] = field(default_factory=dict)
    total: Ring = field(init=False)
    liars: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.total = np.zeros(self.agreement.length, _dtype(self.agreement))

    def add(self, name: str, masked: Ring, sent: Sent, identity: str) -> None:
        """One more vector.

        Args:
            identity: the partner's charter identity key.

        Raises:
            MessageError: not in the roster, here already, another length or ring, shares not for exactly the roster.
            Refused: it took part in another attempt.
        """
        if name not in self.agreement.keys or name in self.arrived:
            raise MessageError(f"a second vector of {name!r}, or one of a stranger")
        _check_vector(self.agreement, masked, name)
        for given in (sent.shares, sent.commitments):
            if set(given) != set(self.agreement.keys):
                raise MessageError(f"{name} did not share its masks with exactly the roster")
        _check_word(self.agreement, name, sent.word, identity)
        self.total += masked
        self.arrived[name] = sent

    def words(self) -> dict[str, bytes]:
        """What every survivor is told in order to agree."""
        return {peer: sent.word for peer, sent in self.arrived.items()}

    def shares(self, name: str) -> dict[str, bytes]:
        """What the survivor `name` is given in order to reveal."""
        return {peer: sent.shares[name] for peer, sent in self.arrived.items()}

    def check_signed(self, name: str, signature: bytes, identity: str) -> None:
        """Return when a survivor signed the list of those who arrived.

        Raises:
            Refused: it did not.
        """
        wanted = _list(self.agreement, sorted(self.arrived))
        _check_signed(LIST_TYPE, signature, wanted, identity, name, "list")

    def open(self, revealed: Mapping[str, Revealed]) -> Ring:
        """The sum of the survivors' vectors.

        Args:
            revealed: of `threshold` survivors or more.

        Raises:
            MessageError: fewer than `threshold` revealed something, or too few shares of a mask fit together. It names the mask, and who
                dealt it is among the `liars`.
        """
        if len(revealed) < self.agreement.threshold:
            raise MessageError(
                f"only {len(revealed)} revealed what opens the sum, needed are {self.agreement.threshold}"
            )
        agreement, total = self.agreement, self.total.copy()
        gone = [peer for peer in agreement.roster if peer not in self.arrived]
        for name, sent in self.arrived.items():
            held = {holder: one.own.get(name, b"") for holder, one in revealed.items()}
            _add_stream(total, self._seed(held, sent.commitments[name], f"{name}'s own mask", name), -1)
            for peer in gone:
                seed = revealed[name].dropped.get(peer, b"") if name in revealed else b""
                if len(seed) != SEED or hashlib.sha256(seed).hexdigest() != sent.commitments[peer]:
                    held = {holder: one.between.get((name, peer), b"") for holder, one in revealed.items()}
                    seed = self._seed(held, sent.commitments[peer], f"the mask between {name} and {peer}", name)
                    self.liars |= {name} & set(revealed)
                _add_stream(total, seed, -_sign(agreement, name, peer))
        return total

    def _seed(self, held: Mapping[str, bytes], commitment: str, what: str, dealer: str) -> bytes:
        """A seed from shares; who holds one that is not on its polynomial is a liar, and who dealt a mask that no shares open."""
        roster, needed = self.agreement.roster, self.agreement.threshold
        points = {roster.index(holder) + 1: share for holder, share in held.items() if len(share) == SHARE}
        names = {roster.index(holder) + 1: holder for holder in held}
        # All fit, unless somebody lies: then without one, without two, ... Those who lied before come last. Bounded: many who lie
        # lose the sum, and no more.
        order = sorted(points, key=lambda at: (names[at] in self.liars, at))
        without = (
            left_out for few in range(len(order) - needed + 1) for left_out in itertools.combinations(order, few)
        )
        for left_out in itertools.islice(without, 2000):
            chosen = [at for at in order if at not in left_out][:needed]
            found = _combine({at: points[at] for at in chosen})
            seed = found(0)
            if seed >> (8 * SEED) == 0 and hashlib.sha256(made := seed.to_bytes(SEED, "big")).hexdigest() == commitment:
                if left_out:
                    self.liars |= {
                        names[at] for at, share in points.items() if found(at) != int.from_bytes(share, "big")
                    }
                return made
        self.liars.add(dealer)
        raise MessageError(f"{what} cannot be opened: no {needed} of {len(points)} shares fit together")


# -- ring --------------------------------------------------------------------------------------------------------------


def to_ring(values: npt.NDArray[np.int64], bits: int) -> Ring:
    """Integers modulo 2^bits. A value that does not fit wraps: to refuse it would tell of it, and a wrap tells nothing."""
    return values.astype(np.uint64).astype(f"uint{bits}", copy=False)


def from_ring(values: Ring) -> npt.NDArray[np.int64]:
    """Integers, those nearest to 0."""
    return values.view(f"int{8 * values.dtype.itemsize}").astype(np.int64)


def ring_for(bound: float, std: float, values: int) -> tuple[int, float]:
    """The smallest ring in which a run's sums wrap with probability at most 2^WRAP.

    Args:
        bound: what no sum without noise exceeds in absolute value, in units of the grid (agreed sizes times the clip).
        std: standard deviation of all partners' noise together, in the same unit.
        values: how many numbers a run sums: rounds and retries times parameters.

    Returns:
        Bits, and log2 of a bound of the probability that any of them wraps (−inf without noise), by the sub-Gaussian tail of the
        discrete Gaussian, P[Z ≥ x] ≤ exp(−x²/2s²) (Canonne, Kamath & Steinke 2004.00010, corollary 9), either side, for every value.

    Raises:
        ValueError: no ring is large enough.
    """
    for bits in RINGS:
        room = 2.0 ** (bits - 1) - 1 - bound
        if room <= 0:
            continue
        chance = -math.inf if std == 0 else 1 + math.log2(values) - (room / std) ** 2 / (2 * math.log(2))
        if chance <= WRAP:
            return bits, chance
    raise ValueError("no ring is large enough for these sums: choose a coarser grid")


# -- parts -------------------------------------------------------------------------------------------------------------

_STEP = 2**16  # bytes of a stream at a time: they stay in the cache


def _dtype(agreement: Agreement) -> np.dtype[Any]:
    return np.dtype(f"uint{agreement.bits}")


def _check_vector(agreement: Agreement, values: Ring, name: str) -> None:
    if values.dtype != _dtype(agreement) or values.shape != (agreement.length,):
        raise MessageError(
            f"{name}'s vector is {values.dtype} {list(values.shape)}, agreed is {_dtype(agreement)} [{agreement.length}]"
        )


def _sign(agreement: Agreement, me: str, peer: str) -> int:
    """Of two partners one adds the mask between them and the other subtracts it; the own mask is added."""
    return 1 if agreement.roster.index(me) <= agreement.roster.index(peer) else -1


def _pairs(agreement: Agreement, me: str, private: bytes) -> dict[str, bytes]:
    """The secret with each peer (X25519)."""
    key = X25519PrivateKey.from_private_bytes(private)
    found = {}
    for peer, public in agreement.keys.items():
        if peer != me:
            try:
                found[peer] = key.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))
            except ValueError as err:  # a point of small order, where every secret is 0
                raise Refused(Refusal.SECAGG_KEY, f"{peer}'s key is no usable one") from err
    return found


def _derived(agreement: Agreement, secret: bytes, size: int, *what: str) -> bytes:
    info = canonical(["hansa secure aggregation 1", *what])
    return HKDF(SHA256(), size, salt=bytes.fromhex(agreement.digest), info=info).derive(secret)


def _pair_seed(agreement: Agreement, me: str, peer: str, pair: bytes) -> bytes:
    return _derived(agreement, pair, SEED, "pair", *sorted((me, peer)))


def _split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shamir's sharing (1979): the values at 1 to `count` of a random polynomial of degree threshold − 1 whose value at 0 is the secret."""
    polynomial = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for at in range(1, count + 1):
        value = 0
        for coefficient in reversed(polynomial):
            value = (value * at + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE, "big"))
    return shares


def _combine(shares: Mapping[int, bytes]) -> Callable[[int], int]:
    """The polynomial through these shares (Lagrange)."""
    values = {at: int.from_bytes(share, "big") for at, share in shares.items()}

    def value(x: int) -> int:
        total = 0
        for at, share in values.items():
            above, below = 1, 1
            for other in values:
                if other != at:
                    above, below = above * (x - other) % PRIME, below * (at - other) % PRIME
            total += share * above * pow(below, -1, PRIME)
        return total % PRIME

    return value


def _seal(agreement: Agreement, sender: str, to: str, secret: bytes, shares: bytes) -> bytes:
    nonce = os.urandom(12)
    return nonce + AESGCM(_derived(agreement, secret, 32, "shares", sender, to)).encrypt(nonce, shares, None)


def _unseal(agreement: Agreement, sender: str, to: str, secret: bytes, sealed: bytes) -> dict[str, bytes]:
    """The shares that `sender` dealt: of its own mask under its own name, of its mask with a peer under that name."""
    try:
        data = AESGCM(_derived(agreement, secret, 32, "shares", sender, to)).decrypt(sealed[:12], sealed[12:], None)
    except (InvalidTag, ValueError) as err:
        raise Refused(Refusal.SECAGG_SHARE, f"the share given as {sender}'s is not one, or of another attempt") from err
    names = [sender, *(peer for peer in agreement.roster if peer != sender)]
    if len(data) != SHARE * len(names):
        raise Refused(Refusal.SECAGG_SHARE, f"the share given as {sender}'s has another length")
    return {name: data[SHARE * i : SHARE * (i + 1)] for i, name in enumerate(names)}


def _add_stream(values: Ring, seed: bytes, sign: int) -> None:
    """values ± the stream of a seed (AES-128-CTR from 0; a seed has one stream), modulo the ring."""
    stream = Cipher(algorithms.AES128(seed), modes.CTR(bytes(16))).encryptor()
    zeros, buffer = bytes(_STEP), bytearray(_STEP + 15)
    data = np.frombuffer(buffer, values.dtype, _STEP // values.dtype.itemsize)
    apply = np.add if sign > 0 else np.subtract
    for at in range(0, len(values), len(data)):
        part = values[at : at + len(data)]
        size = part.nbytes
        stream.update_into(zeros[:size] if size < _STEP else zeros, buffer)
        apply(part, data[: len(part)], out=part)
