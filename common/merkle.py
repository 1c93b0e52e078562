"""The Merkle tree of a log (RFC 6962, section 2.1): roots, inclusion and consistency proofs. Pure functions over SHA-256.

    leaf hash   SHA-256(0x00 || leaf)
    node hash   SHA-256(0x01 || left || right)
    root of no leaves: SHA-256 of nothing; of n leaves: node(root of the first k, root of the rest), with k the largest power
    of two below n

Hashes are 32 raw bytes here; files have them as 64 hex digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from .errors import LedgerError

EMPTY = hashlib.sha256(b"").digest()


def leaf_hash(leaf: bytes) -> bytes:
    """The hash of one leaf."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


class Tree:
    """The root of a growing list of leaves: one leaf more costs about two hashes, a root at most log2(n).

    Attributes:
        size: number of leaves.
    """

    def __init__(self) -> None:
        self.size = 0
        self._peaks: list[bytes] = []  # roots of the full subtrees, the largest first: one for each bit of size

    def append(self, leaf: bytes) -> None:
        """Add a leaf hash."""
        size, root = self.size, leaf
        while size & 1:
            root = _node(self._peaks.pop(), root)
            size >>= 1
        self._peaks.append(root)
        self.size += 1

    def root(self) -> bytes:
        """The root over all leaves."""
        if not self._peaks:
            return EMPTY
        root = self._peaks[-1]
        for peak in reversed(self._peaks[:-1]):
            root = _node(peak, root)
        return root


def root_of(leaves: Sequence[bytes]) -> bytes:
    """The root over these leaf hashes."""
    tree = Tree()
    for leaf in leaves:
        tree.append(leaf)
    return tree.root()


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The audit path of leaf `index` in the tree of all `leaves` (RFC 6962, 2.1.1), from the leaf up.

    Raises:
        LedgerError: there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise LedgerError(f"no entry {index} in a tree of {len(leaves)}")
    if len(leaves) == 1:
        return []
    k = _split(len(leaves))
    if index < k:
        return [*inclusion_proof(leaves[:k], index), root_of(leaves[k:])]
    return [*inclusion_proof(leaves[k:], index - k), root_of(leaves[:k])]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Return when `leaf` is leaf `index` of the tree of `size` leaves with this root (RFC 9162, 2.1.3.2).

    Raises:
        LedgerError: it is not, or the proof is of another form.
    """
    if not 0 <= index < size:
        raise LedgerError(f"no entry {index} in a tree of {size}")
    _of_hashes(proof)
    fn, sn, found = index, size - 1, leaf
    for step in proof:
        if sn == 0:
            raise LedgerError("an inclusion proof that is too long")
        if fn & 1 or fn == sn:
            found = _node(step, found)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            found = _node(found, step)
        fn, sn = fn >> 1, sn >> 1
    if sn or found != root:
        raise LedgerError("the entry is not in the tree of that head")


def consistency_proof(leaves: Sequence[bytes], first: int) -> list[bytes]:
    """That the tree of the first `first` leaves is a beginning of the tree of all (RFC 6962, 2.1.2).

    Raises:
        LedgerError: there are fewer leaves.
    """
    if not 0 <= first <= len(leaves):
        raise LedgerError(f"no tree of {first} in one of {len(leaves)}")
    return [] if first in (0, len(leaves)) else _subproof(leaves, first, True)


def _subproof(leaves: Sequence[bytes], first: int, whole: bool) -> list[bytes]:
    if first == len(leaves):
        return [] if whole else [root_of(leaves)]
    k = _split(len(leaves))
    if first <= k:
        return [*_subproof(leaves[:k], first, whole), root_of(leaves[k:])]
    return [*_subproof(leaves[k:], first - k, False), root_of(leaves[:k])]


def verify_consistency(first: int, first_root: bytes, second: int, second_root: bytes, proof: Sequence[bytes]) -> None:
    """Return when the tree of `first` leaves is a beginning of that of `second` (RFC 9162, 2.1.4.2).

    Raises:
        LedgerError: it is not, or the proof is of another form.
    """
    if not 0 <= first <= second:
        raise LedgerError(f"a head at {second} entries cannot follow one at {first}")
    _of_hashes(proof)
    if first in (0, second):
        if proof or first_root != (second_root if first else EMPTY):
            raise LedgerError("the heads contradict one another")
        return
    path = list(proof)
    if first & (first - 1) == 0:
        path.insert(0, first_root)
    if not path:
        raise LedgerError("a consistency proof that is too short")
    fn, sn = first - 1, second - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    old = new = path[0]
    for step in path[1:]:
        if sn == 0:
            raise LedgerError("a consistency proof that is too long")
        if fn & 1 or fn == sn:
            old, new = _node(step, old), _node(step, new)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            new = _node(new, step)
        fn, sn = fn >> 1, sn >> 1
    if sn or old != first_root or new != second_root:
        raise LedgerError("the later head does not extend the earlier one: entries were dropped, edited or forked")


def _of_hashes(proof: Sequence[bytes]) -> None:
    """Nobody may cut the bytes of two hashes in another place."""
    if any(len(step) != len(EMPTY) for step in proof):
        raise LedgerError("a proof of something else than hashes")


def _split(size: int) -> int:
    """The largest power of two below `size` (at least 2)."""
    return 1 << (size - 1).bit_length() - 1
