"""How many bytes a message of a real federation has, from the model's shapes: what `SignedWire` would make of it.

Counted is the signed manifest and the raw chunks of tensors. Not counted is what the link puts around them (a frame's head of some
dozen bytes a MiB, TLS, TCP, IP: together 1 to 5 % of a large message), nor keepalives and retransmissions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..common.charter import Charter
from ..common.identity import Envelope, canonical, write_envelope
from ..common.masking import fixed_point
from ..common.messages import CHUNK_BYTES, MESSAGE_TYPE

Shapes = Mapping[str, tuple[tuple[int, ...], int]]
"""Of tensors: name -> (shape, bytes of a value)."""

# What is said of ledgers and masks beside the tensors, in bytes of sealed manifests; measured on configs/heart.yaml and
# configs/heart-shared.yaml. They decide nothing but for models of a few kilobytes, and are taken as they are on average: with what a
# ledger happens to hold a message grows and shrinks by some hundred bytes, which a resumed run could not repeat.
_ASKED, _ASKED_EVALUATE = 4300, 960  # heads of its own ledger and of about three others, with proofs; its own
_LEDGERS = 1930  # its head, and signatures under those of about three others, however many partners there are
_KEYS, _SENT = 1015, 600  # of each partner: its signed key; a share of its masks
_AGREE, _REVEAL = (850, 1727, 1575), (850, 2040, 1000)  # a request, so much more for each partner, and a reply


@dataclass(frozen=True)
class Traffic:
    """Sizes of the messages of one charter.

    Args:
        shapes: of the model's trainable parameters, float32.
        classes: of the task.
    """

    charter: Charter
    shapes: Mapping[str, tuple[int, ...]]
    classes: int
    _asked: int = field(init=False)
    _update: int = field(init=False)

    def __post_init__(self) -> None:
        tensors = {name: (shape, 4) for name, shape in self.shapes.items()}
        asked, update = message_bytes(tensors, reply=False), message_bytes(tensors)
        partners = len(self.charter.partners)
        if (secure := self.charter.secure_aggregation) is not None:
            length = secure.dimension or sum(math.prod(shape) for shape in self.shapes.values())
            masked = {"masked": ((length,), fixed_point(self.charter).bits // 8)}
            asked += _KEYS * partners
            update = message_bytes(masked) + _SENT * (partners - 1)
        witnessed = partners > 0  # a population has one ledger, which nobody witnesses
        object.__setattr__(self, "_asked", asked + _ASKED * witnessed)
        object.__setattr__(self, "_update", update + _LEDGERS * witnessed)

    def request(self, message_type: str) -> int:
        """Bytes of what a client is asked."""
        partners = len(self.charter.partners)
        match message_type:
            case "train":
                return self._asked
            case "query.agree":
                return _AGREE[0] + _AGREE[1] * partners
            case "query.reveal":
                return _REVEAL[0] + _REVEAL[1] * partners
        model = message_bytes({name: (shape, 4) for name, shape in self.shapes.items()}, reply=False)
        return model + _ASKED_EVALUATE * (partners > 0)

    def reply(self, message_type: str, records: float) -> int:
        """Bytes of a client's answer.

        Args:
            records: how many it trains on; held-out rows follow from the charter's fraction.
        """
        evaluation = self.charter.evaluation
        match message_type:
            case "train":
                return self._update
            case "query.agree":
                return _AGREE[2]
            case "query.reveal":
                return _REVEAL[2]
        if evaluation.kind == "private":
            return message_bytes({"histogram": ((2, evaluation.bins), 8)})
        rows = round(records * evaluation.test_fraction / (1 - evaluation.test_fraction))
        return message_bytes({"scores": ((rows, self.classes), 4), "labels": ((rows,), 8)})


def message_bytes(shapes: Shapes, *, reply: bool = True) -> int:
    """Bytes of a signed message with tensors like these and no fields: manifest and chunks, names of common length."""
    specs, total = [], 0
    for name, (shape, width) in shapes.items():
        size = math.prod(shape) * width
        total += size
        hashes = ["0" * 64] * -(-size // CHUNK_BYTES)
        specs.append({"name": name, "dtype": "float32", "shape": list(shape), "chunks": hashes})
    body = {
        "v": 1,
        "kind": "update",
        "sender": "coordinator",
        "recipient": "some-partner",
        "charter_sha256": "0" * 64,
        "run_id": "0" * 16,
        "round": 100,
        "request_id": f"{'0' * 16}.100.train.some-partner",
        "in_reply_to": "0" * 64 * reply,
        "fields": {},
        "tensors": specs,
    }
    return len(write_envelope(Envelope(MESSAGE_TYPE, canonical(body), (("0" * 64, bytes(64)),)))) + total
