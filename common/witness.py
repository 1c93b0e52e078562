"""How heads travel in round messages, as their fields; both sides read them here (docs/ledger-format.md, docs/link.md).

A request to train has `witness`: {"yours": the last head of the recipient's ledger that the coordinator has (or null), "since":
lengths of which the recipient's next head must prove that it extends them, "heads": [[head, proof], ...] of others, to be countersigned}.
A reply has `head`: {"head", "proofs": [[length, proof], ...]} of its sender's ledger as it is, `witnessed`: {owner: signature}, and `stands`:
{owner: length} where its sender stands with those that it did not sign.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import MessageError
from .heads import MAX_PROOF, Head, read_head, sign_head
from .identity import Identity
from .ledger import Ledger

MAX_SINCE = 16


@dataclass(frozen=True)
class Asked:
    """What one request asks of its recipient, as a witness and of its own ledger."""

    yours: Head | None
    since: tuple[int, ...]
    heads: tuple[tuple[Head, list[str]], ...]

    @classmethod
    def parse(cls, fields: object, keys: Mapping[str, str], name: str) -> Asked:
        """From a request's field; None stands for a request that asks nothing.

        Args:
            keys: name -> public key of everyone in the charter.
            name: the recipient's.

        Raises:
            MessageError: malformed, or heads that are not their owners'.
        """
        if fields is None:
            return cls(None, (), ())
        if not isinstance(fields, dict) or set(fields) != {"yours", "since", "heads"}:
            raise MessageError("malformed heads in a request")
        yours, since, heads = fields["yours"], fields["since"], fields["heads"]
        if not isinstance(since, list) or len(since) > MAX_SINCE or not all(type(n) is int and n > 0 for n in since):
            raise MessageError("malformed lengths in a request")
        if not isinstance(heads, list) or len(heads) > len(keys) or not all(_pair(pair) for pair in heads):
            raise MessageError("malformed heads in a request")
        own = None if yours is None else _read(yours, keys)
        offered = tuple((_read(sealed, keys), _proof(proof)) for sealed, proof in heads)
        owners = [head.owner for head, _ in offered]
        if (own is not None and own.owner != name) or name in owners:
            raise MessageError("a head of another ledger than is said")
        if len(set(owners)) < len(owners):
            raise MessageError("two heads of one ledger in a request")
        return cls(own, tuple(since), offered)


def asking(yours: Head | None, since: Iterable[int], heads: Iterable[tuple[Head, Sequence[str]]]) -> dict[str, Any]:
    """The field of a request; see `Asked`."""
    return {
        "yours": None if yours is None else yours.sealed.decode(),
        "since": sorted(set(since))[-MAX_SINCE:],
        "heads": [[head.sealed.decode(), list(proof)] for head, proof in heads],
    }


def telling(identity: Identity, ledger: Ledger, since: Iterable[int]) -> dict[str, Any]:
    """A ledger's head as it is now, with the proofs that were asked for."""
    head = sign_head(identity, ledger)
    proofs = [[length, ledger.consistency(length)] for length in since if length <= ledger.length]
    return {"head": head.sealed.decode(), "proofs": proofs}


def told(fields: object, keys: Mapping[str, str], owner: str) -> tuple[Head, dict[int, list[str]]]:
    """Back from `telling`.

    Raises:
        MessageError: malformed, or another ledger's head.
    """
    if not isinstance(fields, dict) or set(fields) != {"head", "proofs"}:
        raise MessageError("a malformed head in a reply")
    proofs = fields["proofs"]
    if not isinstance(proofs, list) or len(proofs) > MAX_SINCE or not all(_pair(pair) for pair in proofs):
        raise MessageError("malformed proofs in a reply")
    if not all(type(length) is int for length, _ in proofs):
        raise MessageError("malformed proofs in a reply")
    head = _read(fields["head"], keys)
    if head.owner != owner:
        raise MessageError(f"a head of another ledger than {owner}'s")
    return head, {length: _proof(proof) for length, proof in proofs}


def signatures(heads: Mapping[str, Head], key: str) -> dict[str, str]:
    """The field `witnessed` of a reply: what `key` signed, by owner."""
    return {owner: base64.b64encode(head.signature(key)).decode() for owner, head in heads.items()}


def standing(fields: object, heads: Mapping[str, Head]) -> dict[str, int]:
    """The field `stands` of a reply: how far its sender has signed the ledgers whose heads it did not sign now.

    Raises:
        MessageError: malformed.
    """
    if not isinstance(fields, dict) or not all(
        owner in heads and type(n) is int and n > 0 for owner, n in fields.items()
    ):
        raise MessageError("malformed lengths in a reply")
    return dict(fields)


def with_signatures(fields: object, heads: Mapping[str, Head], key: str) -> dict[str, Head]:
    """The heads that the sender of `witnessed` signed, with its signature.

    Args:
        heads: by owner, what it was asked to sign.

    Raises:
        MessageError: malformed, or a bad signature.
    """
    if not isinstance(fields, dict) or not set(fields) <= set(heads):
        raise MessageError("signatures under heads that were not asked for")
    try:
        made = {owner: base64.b64decode(text, validate=True) for owner, text in fields.items()}
    except (TypeError, ValueError, binascii.Error) as err:
        raise MessageError("malformed signatures in a reply") from err
    return {owner: heads[owner].with_signature(key, signature) for owner, signature in made.items()}


_HASH = re.compile(r"[0-9a-f]{64}")


def _pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2


def _read(sealed: object, keys: Mapping[str, str]) -> Head:
    if not isinstance(sealed, str):
        raise MessageError("a malformed head")
    return read_head(sealed.encode(), keys)


def _proof(proof: object) -> list[str]:
    if not isinstance(proof, list) or len(proof) > MAX_PROOF:
        raise MessageError("a malformed consistency proof")
    if not all(isinstance(step, str) and _HASH.fullmatch(step) for step in proof):
        raise MessageError("a malformed consistency proof")
    return proof
