"""The Merkle tree against published vectors, a tree of another make, and everybody who tries a wrong proof."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.common.errors import LedgerError
from hansa.common.merkle import (
    EMPTY,
    Tree,
    leaf_hash,
    verify_consistency,
    verify_inclusion,
)
from merkle_support import consistency_proof, inclusion_proof, root_of

# The vectors of the Certificate Transparency reference implementation (cpp/merkletree/merkle_tree_test.cc of
# google/certificate-transparency; trillian and others carry the same).
CT_LEAVES = [bytes.fromhex(x) for x in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657",
                                        "606162636465666768696a6b6c6d6e6f")]  # fmt: skip
CT_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
A, B, C, D, E, F, G = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
    "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
)
CT_PATHS = [(0, 1, []), (0, 8, [B, C, D]), (5, 8, [E, F, G]), (2, 3, [CT_ROOTS[1]]), (1, 5, [A, C, E])]
CT_CONSISTENCY = [
    (1, 1, []),
    (1, 8, [B, C, D]),
    (6, 8, ["0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a", F, G]),
    (2, 5, [C, E]),
]


def raw(hashes: Sequence[str]) -> list[bytes]:
    return [bytes.fromhex(h) for h in hashes]


@pytest.mark.parametrize("size", range(9))
def test_published_roots(size: int) -> None:
    leaves = [leaf_hash(leaf) for leaf in CT_LEAVES[:size]]
    wanted = ["e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", *CT_ROOTS][size]
    assert root_of(leaves).hex() == wanted
    tree = Tree()
    for leaf in leaves:
        tree.append(leaf)
    assert (tree.size, tree.root().hex()) == (size, wanted)


@pytest.mark.parametrize(("index", "size", "path"), CT_PATHS)
def test_published_inclusion_proofs(index: int, size: int, path: list[str]) -> None:
    leaves = [leaf_hash(leaf) for leaf in CT_LEAVES[:size]]
    assert inclusion_proof(leaves, index) == raw(path)
    verify_inclusion(leaves[index], index, size, raw(path), bytes.fromhex(CT_ROOTS[size - 1]))


@pytest.mark.parametrize(("first", "second", "path"), CT_CONSISTENCY)
def test_published_consistency_proofs(first: int, second: int, path: list[str]) -> None:
    leaves = [leaf_hash(leaf) for leaf in CT_LEAVES[:second]]
    assert consistency_proof(leaves, first) == raw(path)
    roots = [bytes.fromhex(CT_ROOTS[n - 1]) for n in (first, second)]
    verify_consistency(first, roots[0], second, roots[1], raw(path))


# -- a tree of another make ------------------------------------------------------------------------------------------


def mth(data: Sequence[bytes]) -> bytes:
    """MTH of RFC 6962, 2.1, over the leaves themselves, word by word."""
    if len(data) <= 1:
        return hashlib.sha256(b"\x00" + data[0] if data else b"").digest()
    k = max(2**i for i in range(64) if 2**i < len(data))
    return hashlib.sha256(b"\x01" + mth(data[:k]) + mth(data[k:])).digest()


def texts(size: int, salt: str = "") -> list[bytes]:
    return [f"{salt}{i}".encode() for i in range(size)]


@pytest.mark.parametrize("size", [*range(70), 127, 128, 129, 300])
def test_roots_are_those_of_the_definition(size: int) -> None:
    assert root_of([leaf_hash(x) for x in texts(size)]) == mth(texts(size))


@pytest.mark.parametrize("size", [*range(1, 34), 64, 65])
def test_every_proof_of_every_entry_and_beginning(size: int) -> None:
    leaves = [leaf_hash(x) for x in texts(size)]
    roots = [mth(texts(n)) for n in range(size + 1)]
    for index in range(size):
        path = inclusion_proof(leaves, index)
        assert len(path) <= (size - 1).bit_length()
        verify_inclusion(leaves[index], index, size, path, roots[size])
    for first in range(size + 1):
        path = consistency_proof(leaves, first)
        assert len(path) <= (size - 1).bit_length() + 1
        verify_consistency(first, roots[first], size, roots[size], path)


def test_there_is_no_proof_of_what_is_not_there() -> None:
    leaves = [leaf_hash(x) for x in texts(5)]
    for index in (-1, 5, 6):
        with pytest.raises(LedgerError, match=r"no entry -?\d in a tree of 5"):
            inclusion_proof(leaves, index)
    for first in (-1, 6):
        with pytest.raises(LedgerError, match=r"no tree of -?\d in one of 5"):
            consistency_proof(leaves, first)
    with pytest.raises(LedgerError):
        inclusion_proof([], 0)
    assert consistency_proof(leaves, 0) == consistency_proof(leaves, 5) == consistency_proof([], 0) == []


# -- wrong proofs ----------------------------------------------------------------------------------------------------


def lies(path: list[bytes], rng: random.Random, known: list[bytes]) -> list[list[bytes]]:
    """The ways to get a proof wrong."""
    bad = [[], path[:-1], path[1:], [*path, b"\x00" * 32], [b"\x00" * 32, *path], [*path, *path], path[::-1],
           [*path, *path[-1:]], [*path[:1], *path]]  # fmt: skip
    for at in range(len(path)):
        bit = rng.randrange(256)
        flipped = bytes(x ^ (1 << bit % 8 if i == bit // 8 else 0) for i, x in enumerate(path[at]))
        bad += [[*path[:at], other, *path[at + 1 :]]
                for other in (flipped, b"", path[at][:-1], path[at] + b"\x00", rng.choice(known), EMPTY)]  # fmt: skip
        bad.append([*path[:at], *path[at + 1 :]])
        bad.append([*path[:at], path[at], path[at], *path[at + 1 :]])
        if at:
            bad.append([*path[: at - 1], path[at], path[at - 1], *path[at + 1 :]])
            bad.append([*path[: at - 1], path[at - 1] + path[at][:8], path[at][8:], *path[at + 1 :]])
            bad.append([*path[: at - 1], path[at - 1][8:], path[at] + path[at - 1][:8], *path[at + 1 :]])
    return [wrong for wrong in bad if wrong != path]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 11, 13])
def test_a_wrong_inclusion_proof_is_refused(size: int) -> None:
    rng = random.Random(size)
    leaves = [leaf_hash(x) for x in texts(size)]
    root = root_of(leaves)
    known = [*leaves, root, *(root_of(leaves[:n]) for n in range(size))]

    def refused(leaf: bytes, index: int, of: int, path: list[bytes], top: bytes) -> None:
        with pytest.raises(LedgerError):
            verify_inclusion(leaf, index, of, path, top)

    for index, leaf in enumerate(leaves):
        path = inclusion_proof(leaves, index)
        for wrong in lies(path, rng, known):
            refused(leaf, index, size, wrong, root)
        for other in range(-2, size + 3):
            if other != index:
                refused(leaf, other, size, path, root)
        for other in (leaf_hash(b"other"), leaf_hash(leaf), root if size > 1 else EMPTY, b""):
            refused(other, index, size, path, root)
        for other in (EMPTY, root[:-1], leaf_hash(b""), *(root_of(leaves[:n]) for n in range(size))):
            refused(leaf, index, size, path, other)
        refused(leaf, index, 0, path, root)
        refused(leaf, index, index, path, root)
    for index in range(size - 1):  # an inner node is no leaf, though it hashes up to the root
        pair = root_of(leaves[index : index + 2])
        if index % 2 == 0 and size > 2:
            refused(pair, index // 2, (size + 1) // 2, inclusion_proof(leaves, index)[1:], b"\x00" * 32)
            refused(pair, index, size, inclusion_proof(leaves, index)[1:], root)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12])
def test_a_wrong_consistency_proof_is_refused(size: int) -> None:
    rng = random.Random(size)
    leaves = [leaf_hash(x) for x in texts(size)]
    forked = [leaf_hash(x) for x in texts(size, "other ")]
    roots = [root_of(leaves[:n]) for n in range(size + 1)]
    known = [*leaves, *roots]

    def refused(first: int, old: bytes, second: int, new: bytes, path: list[bytes]) -> None:
        with pytest.raises(LedgerError):
            verify_consistency(first, old, second, new, path)

    for first in range(size + 1):
        path = consistency_proof(leaves, first)
        for wrong in lies(path, rng, known):
            refused(first, roots[first], size, roots[size], wrong)
        for other in range(-1, size + 3):
            if other != first and not (other == size == 1):
                refused(other, roots[first], size, roots[size], path)
        for n in range(size + 1):
            if n != first:
                refused(first, roots[n], size, roots[size], path)
            if n != size and first:  # anything extends a tree of none
                refused(first, roots[first], size, roots[n], path)
        if first:
            refused(first, root_of(forked[:first]), size, roots[size], path)
            refused(first, roots[first], size, root_of(forked), path)
            refused(first, roots[first], size, root_of(forked), consistency_proof(forked, first))
            edited = [*leaves[: first - 1], leaf_hash(b"edited"), *leaves[first:]]
            refused(first, roots[first], size, root_of(edited), consistency_proof(edited, first))
        if 0 < first < size:
            refused(size, roots[size], first, roots[first], path)  # a rollback
            shorter = leaves[:first][:-1] + leaves[first:]  # a dropped entry
            if len(shorter) >= first:
                refused(first, roots[first], size - 1, root_of(shorter), consistency_proof(shorter, first))


@given(st.integers(1, 60), st.integers(1, 60), st.lists(st.binary(min_size=32, max_size=32), max_size=8), st.booleans())
def test_proofs_out_of_the_air(first: int, second: int, path: list[bytes], real: bool) -> None:
    """Whatever is made up: LedgerError, or the tree of which it is the proof."""
    leaves = [leaf_hash(x) for x in texts(second)]
    old, new = (root_of(leaves[:first]), root_of(leaves)) if real else (b"\x01" * 32, b"\x02" * 32)
    if first == second or (real and first < second and path == consistency_proof(leaves, first)):
        return
    with pytest.raises(LedgerError):
        verify_consistency(first, old, second, new, path)
    with pytest.raises(LedgerError):
        verify_inclusion(leaf_hash(b"x"), first - 1, second, path, new)


HUGE: list[Callable[[], None]] = [
    lambda: verify_inclusion(EMPTY, 10**30, 10**31, [EMPTY] * 128, EMPTY),
    lambda: verify_consistency(10**30, EMPTY, 10**31, EMPTY, [EMPTY] * 128),
    lambda: verify_consistency(2**4000 - 1, EMPTY, 2**4000, EMPTY, [EMPTY] * 3),
]


@pytest.mark.parametrize("ask", HUGE)
def test_sizes_that_nobody_has_cost_nothing(ask: Callable[[], None]) -> None:
    with pytest.raises(LedgerError):
        ask()
