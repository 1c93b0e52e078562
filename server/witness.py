"""The coordinator's part in witnessed heads: it countersigns each partner's head and hands it to others with the next round.

Nothing waits for it, and no round fails for it: a head that nobody witnessed is a tail that an auditor sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..common.errors import MessageError
from ..common.heads import Head, KeptHeads, sign_head
from ..common.identity import Identity
from ..common.ledger import Ledger
from ..common.witness import Asked, asking, standing, told, with_signatures

WITNESSES = 2
"""Partners, other than its owner, that are asked to sign a head; fewer where there are fewer."""


class Witnessing:
    """Heads of one charter, over all its runs.

    Args:
        keys: name -> public key of everyone in the charter.
        notify: told of a head that does not extend what its owner signed before.
    """

    def __init__(
        self,
        identity: Identity,
        ledger: Ledger,
        kept: KeptHeads,
        keys: Mapping[str, str],
        notify: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        self._identity = identity
        self._ledger = ledger
        self._kept = kept
        self._keys = dict(keys)
        self._notify = notify
        self._offered: dict[str, Head] = {}  # by what was sent, so that what was read once is not read again
        # (owner, witness) -> length, where a witness is ahead of what is kept here.
        self._stands: dict[tuple[str, str], int] = {}

    def next_round(self, cohort: Sequence[str], replies: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """By partner of the cohort: the field `witness` of its next request.

        A request must have the same bytes when it is asked again after a crash, so whoever calls this keeps what it returns.

        Args:
            replies: partner -> fields of its reply to the round before.
        """
        me = self._identity
        heads = {}
        for owner, fields in replies.items():
            try:
                heads[owner] = told(fields.get("head"), self._keys, owner)
            except MessageError:
                continue  # no head is a tail
        # What a witness says of where it stands is its word: it may be beyond all that there is.
        since = [length for length in self._since(me.name) if length <= self._ledger.length]
        proofs = {length: self._ledger.consistency(length) for length in since}
        heads[me.name] = sign_head(me, self._ledger), proofs
        before = {owner: self._kept.newest(owner) for owner in heads}
        signed = self._kept.witness(
            (head, proofs.get(last.length, []) if (last := before[owner]) else [])
            for owner, (head, proofs) in heads.items()
        )
        for owner, (head, _) in heads.items():
            if owner not in signed:
                self._notify("contradiction", partner=owner, length=head.length)
        self._offered = {head.sealed.decode(): head for head in signed.values()}
        offers: dict[str, list[tuple[Head, list[str]]]] = {name: [] for name in cohort}
        for owner, head in signed.items():
            for witness in _others(owner, cohort):
                offers[witness].append((head, heads[owner][1].get(self._stand(owner, witness), [])))
        return {name: asking(self._kept.newest(name), self._since(name), offers[name]) for name in cohort}

    def collect(self, asked: Mapping[str, Any], replies: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep the signatures that came with the replies.

        Args:
            asked: what `next_round` returned for this round.

        Raises:
            OutputError: they cannot be written.
        """
        gathered: dict[str, Head] = {}
        for witness, fields in replies.items():
            try:
                offered = {head.owner: head for head in self._heads_in(asked.get(witness), witness)}
                for owner, length in standing(fields.get("stands"), offered).items():
                    self._stands[owner, witness] = length
                for owner, head in with_signatures(fields.get("witnessed"), offered, self._keys[witness]).items():
                    gathered[owner] = gathered[owner].joined(head) if owner in gathered else head
            except MessageError:
                continue
        self._kept.keep(gathered.values())

    def _heads_in(self, asked: Any, witness: str) -> list[Head]:
        """The heads that a request offered; after a restart they are read from it again."""
        try:
            return [self._offered[sealed] for sealed, _ in asked["heads"]]
        except (KeyError, TypeError):
            return [head for head, _ in Asked.parse(asked, self._keys, witness).heads]

    def _since(self, owner: str) -> list[int]:
        """Where everybody who may be asked to sign it, and its holder here, stands with this owner's ledger."""
        signers = {name for name in self._keys if name != owner} | {self._identity.name}
        return sorted({self._stand(owner, name) for name in signers} - {0})

    def _stand(self, owner: str, witness: str) -> int:
        """How far this witness has signed that ledger; 0: not at all."""
        head = self._kept.newest(owner, self._keys[witness])
        return max(head.length if head is not None else 0, self._stands.get((owner, witness), 0))


def _others(owner: str, cohort: Sequence[str]) -> list[str]:
    """The next ones in the cohort's circle."""
    names = [name for name in cohort if name != owner]
    at = next((number for number, name in enumerate(cohort) if name == owner), 0) % max(1, len(names))
    return (names[at:] + names[:at])[:WITNESSES]
