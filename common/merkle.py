"""The Merkle tree of a log (RFC 6962, section 2.1): roots, inclusion and consistency proofs. Pure functions over SHA-256.

    leaf hash   SHA-256(0x00 || leaf)
    node hash   SHA-256(0x01 || left || right)
    root of no leaves: SHA-256 of nothing; of n leaves: node(root of the first k, root of the rest), with k the largest power
    of two below n

Hashes are 32 raw bytes here; files have them as 64 hex digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from .errors import LedgerError

EMPTY = hashlib.sha256(b"").digest()


def leaf_hash(leaf: bytes) -> bytes:
    """The hash of one leaf."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


class Tree:
    """A growing list of leaves; every full subtree's hash is kept (64 bytes a leaf in all), so that roots and proofs cost
    O(log² n) of them.

    Attributes:
        size: number of leaves.
    """

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        self.size = 0
        self._levels: list[list[bytes]] = [[]]  # [k][i]: root of leaves i·2^k to (i+1)·2^k
        for leaf in leaves:
            self.append(leaf)

    def append(self, leaf: bytes) -> None:
        """Add a leaf hash."""
        self.size += 1
        self._levels[0].append(leaf)
        level, full = 0, self.size
        while not full & 1:
            full >>= 1
            level += 1
            if level == len(self._levels):
                self._levels.append([])
            self._levels[level].append(_node(*self._levels[level - 1][-2:]))

    def root(self, size: int | None = None) -> bytes:
        """The root over the first `size` leaves; None: over all."""
        return self._range(0, self.size if size is None else size)

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """The audit path of leaf `index` in the tree of the first `size` leaves (RFC 6962, 2.1.1), from the leaf up.

        Raises:
            LedgerError: there is no such leaf.
        """
        if not 0 <= index < size <= self.size:
            raise LedgerError(f"no entry {index} in a tree of {size}")
        path = []
        low, high = 0, size
        while high - low > 1:
            middle = low + _split(high - low)
            if index < middle:
                path.append(self._range(middle, high))
                high = middle
            else:
                path.append(self._range(low, middle))
                low = middle
        return path[::-1]

    def consistency(self, first: int) -> list[bytes]:
        """That the tree of the first `first` leaves is a beginning of the tree of all (RFC 6962, 2.1.2).

        Raises:
            LedgerError: there are fewer leaves.
        """
        if not 0 <= first <= self.size:
            raise LedgerError(f"no tree of {first} in one of {self.size}")
        path: list[bytes] = []
        low, high = 0, self.size
        while 0 < first < high:
            middle = low + _split(high - low)
            if first <= middle:
                path.append(self._range(middle, high))
                high = middle
            else:
                path.append(self._range(low, middle))
                low = middle
        if path and low:  # what is left is no beginning of the tree: its own root is needed, too
            path.append(self._range(low, high))
        return path[::-1]

    def _range(self, low: int, high: int) -> bytes:
        """The root over the leaves from `low` to below `high`, as a tree of their own."""
        width = high - low
        if not width:
            return EMPTY
        if width & (width - 1) == 0 and low % width == 0:
            return self._levels[width.bit_length() - 1][low // width]
        middle = low + _split(width)
        return _node(self._range(low, middle), self._range(middle, high))


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
