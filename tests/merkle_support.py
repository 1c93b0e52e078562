"""Roots and proofs of a list of leaf hashes, as one call."""

from __future__ import annotations

from collections.abc import Sequence

from hansa.common.merkle import Tree


def root_of(leaves: Sequence[bytes]) -> bytes:
    return Tree(leaves).root()


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    return Tree(leaves).inclusion(index, len(leaves))


def consistency_proof(leaves: Sequence[bytes], first: int) -> list[bytes]:
    return Tree(leaves).consistency(first)
