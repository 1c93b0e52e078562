"""Golden vectors of secure aggregation: keys, agreement, masks, sealed shares. Imports nothing of Hansa: a second reader of its page.

    python tests/vectors/secagg_vectors.py        writes secagg_vectors.json beside this file

Keys, seeds and nonces are fixed. Change the file only together with the version of the format ("v": 1; "hansa secure aggregation 1").
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HERE = Path(__file__).parent
NAMES = ("ada", "ben", "cy")
CHARTER, MODEL, RUN = "c" * 64, "d" * 64, "run-1"
PRIVATE = {name: hashlib.sha256(f"key of {name}".encode()).digest() for name in NAMES}
OWN = {name: hashlib.sha256(f"own mask of {name}".encode()).digest()[:16] for name in NAMES}
VALUES = {"ada": [0, 1, 2**32 - 1, 7], "ben": [5, 6, 7, 8], "cy": [1, 1, 1, 2**31]}
PRIME = 2**130 - 5
COEFFICIENT = 12345678901234567890
"""Of the line on which a seed's shares lie: the threshold is 2."""


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def hkdf(secret: bytes, size: int, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256."""
    key, made, block = hmac.new(salt, secret, hashlib.sha256).digest(), b"", b""
    number = 1
    while len(made) < size:
        block = hmac.new(key, block + info + bytes([number]), hashlib.sha256).digest()
        made, number = made + block, number + 1
    return made[:size]


def stream(seed: bytes, words: int) -> list[int]:
    """AES-128 in counter mode from 0, as little-endian 32-bit words."""
    data = Cipher(algorithms.AES128(seed), modes.CTR(bytes(16))).encryptor().update(bytes(4 * words))
    return [int.from_bytes(data[4 * i : 4 * i + 4], "little") for i in range(words)]


def make() -> dict[str, Any]:
    """Every vector by name, as text, hex or numbers."""
    own = {n: X25519PrivateKey.from_private_bytes(PRIVATE[n]) for n in NAMES}
    keys = {n: own[n].public_key().public_bytes_raw().hex() for n in NAMES}
    said = {
        "v": 1, "charter_sha256": CHARTER, "run_id": RUN, "round": 3, "attempt": 1, "model_sha256": MODEL,
        "keys": [[n, keys[n]] for n in NAMES], "threshold": 2, "quorum": 2, "bits": 32, "length": 4,
    }  # fmt: skip
    digest = hashlib.sha256(canonical(said)).hexdigest()

    def derived(one: str, other: str, size: int, *what: str) -> bytes:
        secret = PRIVATE[one]
        if one != other:
            secret = own[one].exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(keys[other])))
        return hkdf(secret, size, bytes.fromhex(digest), canonical(["hansa secure aggregation 1", *what]))

    pairs = {f"{a} {b}": derived(a, b, 16, "pair", a, b) for a in NAMES for b in NAMES if a < b}
    masked = {}
    for name in NAMES:
        total = list(VALUES[name])
        for other in NAMES:
            seed = OWN[name] if other == name else pairs[" ".join(sorted((name, other)))]
            sign = 1 if NAMES.index(name) <= NAMES.index(other) else -1
            total = [(value + sign * word) % 2**32 for value, word in zip(total, stream(seed, 4), strict=True)]
        masked[name] = total
    shares = {}
    for at, to in enumerate(NAMES, start=1):
        plain = b""
        for about in ("ada", "ben", "cy"):  # what ada deals: of its own mask first, then of those with each other
            seed = OWN["ada"] if about == "ada" else pairs[f"ada {about}"]
            plain += ((int.from_bytes(seed, "big") + COEFFICIENT * at) % PRIME).to_bytes(17, "big")
        nonce = bytes([at]) * 12
        key = derived("ada", to, 32, "shares", "ada", to)
        shares[to] = (nonce + AESGCM(key).encrypt(nonce, plain, None)).hex()
    return {
        "private": {n: PRIVATE[n].hex() for n in NAMES},
        "public": keys,
        "key_payload": canonical({"v": 1, "charter_sha256": CHARTER, "run_id": RUN, "name": "ada", "key": keys["ada"]}).decode(),
        "agreement": digest,
        "word_payload": canonical({"v": 1, "agreement": digest, "name": "ada"}).decode(),
        "list_payload": canonical({"v": 1, "agreement": digest, "survivors": ["ada", "cy"]}).decode(),
        "pair_seeds": {pair: seed.hex() for pair, seed in pairs.items()},
        "own_seeds": {n: OWN[n].hex() for n in NAMES},
        "values": VALUES,
        "masked": masked,
        "shares_of_ada": shares,
        "sum": [sum(VALUES[n][i] for n in NAMES) % 2**32 for i in range(4)],
    }  # fmt: skip


if __name__ == "__main__":
    (HERE / "secagg_vectors.json").write_text(json.dumps(make(), indent=1) + "\n")
