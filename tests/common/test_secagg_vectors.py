"""Golden vectors of secure aggregation: what another make of partner would send is what ours sends, byte for byte."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hansa.common import secagg
from hansa.common.identity import Identity, read_envelope
from hansa.common.secagg import Agreement, Sum

VECTORS = Path(__file__).parents[1] / "vectors"
WANTED: dict[str, Any] = json.loads((VECTORS / "secagg_vectors.json").read_text())
NAMES = ("ada", "ben", "cy")
PRIVATE = {name: bytes.fromhex(key) for name, key in WANTED["private"].items()}
PEOPLE = {name: Identity.generate(name) for name in NAMES}
IDENTITIES = {name: one.key for name, one in PEOPLE.items()}
AGREED = Agreement("c" * 64, "run-1", 3, 1, "d" * 64, WANTED["public"], 2, 2, 32, 4)


def test_the_generator_makes_them() -> None:
    """And imports nothing of Hansa."""
    spec = importlib.util.spec_from_file_location("secagg_vectors", VECTORS / "secagg_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.make() == WANTED
    words = {
        word for line in Path(made.__file__ or "").read_text().splitlines() if "import" in line for word in line.split()
    }
    assert "hansa" not in words


def test_keys_and_what_is_signed() -> None:
    assert {name: secagg.public_key(PRIVATE[name]) for name in NAMES} == WANTED["public"]
    sealed = secagg.signed_key(PEOPLE["ada"], "c" * 64, "run-1", PRIVATE["ada"])
    assert read_envelope(sealed, secagg.KEY_TYPE).payload.decode() == WANTED["key_payload"]
    assert AGREED.digest == WANTED["agreement"]
    _, sent = secagg.mask(AGREED, PEOPLE["ada"], PRIVATE["ada"], np.zeros(4, np.uint32))
    assert read_envelope(sent.word, secagg.WORD_TYPE).payload.decode() == WANTED["word_payload"]
    words = {n: secagg.mask(AGREED, PEOPLE[n], PRIVATE[n], np.zeros(4, np.uint32))[1].word for n in ("ada", "cy")}
    listed = secagg.agree(AGREED, PEOPLE["ada"], words, IDENTITIES, None)
    assert read_envelope(listed, secagg.LIST_TYPE).payload.decode() == WANTED["list_payload"]


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_vector(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(secagg.os, "urandom", lambda size: bytes.fromhex(WANTED["own_seeds"][name])[:size])
    values = np.array(WANTED["values"][name], np.uint32)
    vector, sent = secagg.mask(AGREED, PEOPLE[name], PRIVATE[name], values)
    assert [int(v) for v in vector] == WANTED["masked"][name]
    assert set(sent.shares) == set(sent.commitments) == set(NAMES)


def test_sealed_shares_open_and_give_the_seeds() -> None:
    at = {name: number for number, name in enumerate(NAMES, start=1)}
    dealt = {}
    for name in NAMES:
        pair = secagg._pairs(AGREED, name, PRIVATE[name]).get("ada", PRIVATE["ada"])
        dealt[name] = secagg._unseal(AGREED, "ada", name, pair, bytes.fromhex(WANTED["shares_of_ada"][name]))
    for about, seed in (("ada", WANTED["own_seeds"]["ada"]), ("ben", WANTED["pair_seeds"]["ada ben"])):
        for two in (("ada", "ben"), ("ben", "cy")):
            found = secagg._combine({at[n]: dealt[n][about] for n in two})
            assert found(0).to_bytes(16, "big").hex() == seed


def test_the_sum_of_their_vectors_opens() -> None:
    total = Sum(AGREED)
    revealed = {}
    for name in NAMES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(secagg.os, "urandom", lambda size, name=name: bytes.fromhex(WANTED["own_seeds"][name])[:size])
            _, sent = secagg.mask(AGREED, PEOPLE[name], PRIVATE[name], np.zeros(4, np.uint32))
        total.add(name, np.array(WANTED["masked"][name], np.uint32), sent, IDENTITIES[name])
    signatures = {n: secagg.agree(AGREED, PEOPLE[n], total.words(), IDENTITIES, None) for n in NAMES}
    for name in NAMES:
        shares = total.shares(name)
        revealed[name] = secagg.reveal(AGREED, name, PRIVATE[name], NAMES, signatures, shares, IDENTITIES)
    assert [int(v) for v in total.open(revealed)] == WANTED["sum"]
