"""Ledgers, charter and keys -> verdict. One file that imports nothing of ours: read it, copy it, run it.

    python verifier.py BUNDLE [--against PATH ...]    prints the verdict as JSON; exit 0 verified, 1 a violation, 2 unreadable

It needs `cryptography` (Ed25519) and `dp-accounting` (privacy loss distributions). The format is docs/ledger-format.md, version 2.
What is checked, in this order; whatever fails is a violation that names file and line, with a code and what it means:

 1. Envelopes (DSSE). What was parsed is written again and must give the same bytes. Signatures cover the exact payload.
 2. `charter.json` is signed by everyone it names and by nobody else; its SHA-256 is in every entry about it.
 3. `keys/` holds the charter's keys, byte for byte, and nothing else.
 4. A ledger line's header is signed by its owner's key in the charter, has the next sequence number and the root of the
    Merkle tree (RFC 6962) of all headers before it, and the hash of the body that is shown, if it is. The file ends with a whole
    line. Genesis names owner, role, key and simulation as the charter does, and is shown.
 5. Unknown event types, fields, versions and mechanisms are violations, and so is a value of the wrong kind.
 6. Partner, from every header, shown or not, by lineage: one budget, fixed; its filter admits every hold together with all that is
    debited and held; what is debited or released was held. What was debited stays charged for ever.
 7. Partner, what is shown: a header's privacy event is what its body says; data sets are declared as the rules ask, before they
    are used; a hold is the charter's plan; a debit lies within the open hold of its run, on the charter's terms, once for one
    request; a commit or public answer follows its request; nothing is debited after the release. All debits under the charter
    cost at most its epsilon at its delta. What is hidden could be another charter's, as far as headers tell.
 8. Coordinator: asks, answers and rounds that stand twice (a crash) agree; a round counts the quorum's ok answers; a
    run closes with its last round's model. Under secure aggregation a round counts exactly those who were asked, in its last
    attempt, to sign who is summed, and enough of whom then opened the sum.
 9. Both: every ok or failed answer has the partner's commit, public answer, list of survivors or hold, and every refused one its
    refusal, of the same request; every hold, debit, commit, public answer and list was asked for, and answered unless none was seen.
    Secure aggregation: a partner signs one list for an attempt, of the quorum or more; all sign the same, for the same attempt.
10. `closing/`: every run that the coordinator's ledger closes has a checkpoint of every ledger, signed by all.
11. `heads/`: signed heads, by their owners first and then by others of the charter.
12. Every head, every checkpoint and every copy that is given beside the bundle (`against`) states each ledger as it is here: none
    is shorter than its owner once signed for, or another one. What nobody else vouches for is a tail: a warning.
13. `model.safetensors` is the model of the newest completed run; `result.json` says what was recomputed here, and of
    its run, rounds, refusals and terms what the ledgers and the charter say.

Population bundles (above 100 simulated partners) have one ledger, the coordinator's, with every client's accounting. Where the unit is
one client (central noise), every round is one debit of all clients and names nobody.

Input is hostile: any bytes give a violation or `Unreadable`; work is linear in the size of the files, and memory is
bounded by the longest line allowed plus what must be remembered of each entry.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime
from fractions import Fraction
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MAX_LINE = 8 * 2**20
MAX_FILE = 64 * 2**20  # of a file that is read whole
MAX_FOUND = 1000  # violations and warnings that are listed
MAX_EVENTS = 2000  # different (q, sigma) in one ledger: each costs some milliseconds
MAX_COPIES = 1000  # files of a folder that is given to compare with
LISTED_CLIENTS = 1000  # of a population; of a larger one the verdict has an item for each history
MAX_POINTS = 40  # of a trajectory at which the odometer is read
ODOMETERS = 2e-3  # what two odometers may differ by, relative and absolute
SLACK = 1e-9  # relative: what two honest implementations of the same formulas may differ by
LIMITS = [
    "What was declared and agreed was recorded, in this order, by the holders of these keys, and adds up to this bill.",
    "It cannot prove that noise was really drawn, nor that no other copy of the data was used outside these nodes.",
    "That data sets are new, overlap or share no records is their owner's signed word.",
    "What an entry that is not disclosed did to the budget is its owner's signed word: no request or answer confirms it.",
    "The keys are those in this charter: whether they are the partners' own, only the partners can say (fingerprints).",
    "Metrics (AUC and the like) are the coordinator's word.",
    "Not checked: what else result.json says (baselines, timings, descriptions), report.html, and files of other names.",
    "The odometer's epsilon takes the history as fixed in advance; the filter's also holds when it was chosen adaptively.",
]
MEANS = {
    # violations
    "file": "A file that this verdict needs is missing, or is no plain file: what it would show is not checked.",
    "layout": "These bytes are not in the one form that the format allows: edited, damaged, or written by other software.",
    "unknown": "This is of a kind or version that this reader does not know: what it did or cost is not judged.",
    "stranger": "This belongs to nobody in the charter, so it is no part of this bundle.",
    "charter_signatures": "Not exactly those who stand in the charter signed it: somebody may never have agreed to these terms.",
    "key": "A public key in the bundle is not the charter's: it cannot show who signed.",
    "entry_signature": "The ledger's owner did not sign this entry as it stands here.",
    "entry_order": "Entries before this one were dropped, repeated, moved or edited.",
    "entry_body": "What the entry tells is not what its owner signed: the body was exchanged afterwards.",
    "torn": "The file ends in the middle of a line: its end was cut off.",
    "genesis": "The ledger does not begin as this owner's ledger under this charter must: it may be another one.",
    "unrecorded": "Something was done under the charter before the ledger said that the charter was accepted.",
    "privacy_differs": "The charge in the signed header is not what the entry itself says: one of the two is untrue.",
    "lineage": "A data set was not declared as the rules ask: a used-up budget may have been escaped by it.",
    "hidden": "An entry is hidden that an auditor of this charter must be shown: part of what was done is kept back.",
    "named": "Who takes part in a round is what is protected here, by being charged to all: a ledger that names some undoes it.",
    "not_held": "Privacy was spent or given back that no run had reserved: the node did not keep the rules.",
    "budget": "The budget is not the one that was agreed, or was set a second time: it may have been raised.",
    "no_budget": "Work was accepted on a budget that could not pay for it: none was set, or it had become unbounded.",
    "over_budget": "More was reserved or spent than the budget allows: the node's filter was not in force.",
    "over_charter": "More was spent under this charter than its partners agreed to.",
    "terms": "Something was done on other terms than the charter's.",
    "expired": "Something was reserved or spent after the charter had expired.",
    "run_order": "The steps of a run do not follow one another as they must: hold, debit, commit, release.",
    "repeated": "The same request or run stands there twice: it may have been answered or charged twice.",
    "record": "The coordinator's record of a run contradicts itself or the charter.",
    "not_asked": "A partner did or refused what the coordinator's ledger did not ask for: one of the two is untrue or not whole.",
    "two_lists": "A partner signed two lists of whose vectors are summed in one attempt: with both, single vectors can be opened.",
    "lists_differ": "Not all were shown the same attempt, or signed the same list of who is summed: other sums than agreed may be open.",
    "not_done": "An answer that the coordinator recorded is not in the partner's ledger: one of the two is untrue or not whole.",
    "closing": "A closing checkpoint is not good, so it vouches for nothing.",
    "closing_missing": "A run was closed, but nobody's signatures under its end are here: what came last may have been cut off.",
    "head": "A signed head is not good, so it vouches for nothing.",
    "contradiction": "A ledger's owner signed for two different histories of the same length: it shows different people different things.",
    "entries_missing": "The ledger's owner once signed for more entries than are here: its end was cut off (a rollback).",
    "entry_differs": "The ledger's owner signed for another history than is shown here: entries were edited, dropped or replaced.",
    "fork": "The ledger's owner signed two different entries for one place: it shows different people different histories.",
    "model": "The model in the bundle is not the one that the ledgers are about.",
    "result": "result.json does not say what the ledgers say: do not rely on it.",
    "more": "There is more of this than a reader can use.",
    # warnings
    "tail": "Only their owner has signed for these last entries: they could still be taken back unseen.",
    "open_run": "The run was never finished, so nobody's signatures vouch for its end yet.",
    "no_runs": "Nothing was done under this charter yet.",
    "recovered": "The last line was not whole when the node was started, and was cut off: by its owner's word a crash, nothing acted on.",
    "restored": "The ledger came from a backup: what was spent after that backup is lost, unless heads or copies show it.",
    "uncommitted": "Asked and charged, without an answer that counts: a crash, a straggler or a failure; the charge stands.",
    "unreleased": "What this run did not use is still reserved: the budget shows more taken than was spent.",
    "other_charter": "The same records are used under other charters too, which this bundle does not show; their cost is counted here.",
    "disjoint": "These records have a budget of their own, because their owner declared that no earlier data set has them.",
    "unanswered": "The partner did its part and the answer was lost on the way, or came too late.",
    "coarse": "A figure is larger than the exact one would be; it is still a bound.",
    "copy": "What was given to compare with, or a part of it, is not as it was signed: that proves nothing, for this bundle or against it.",
    "unrelated": "This belongs to somebody who does not stand in this charter, and was not compared.",
}
"""What a code of a violation or warning means to a reader."""


def _printable(text: str, limit: int) -> str:
    """Safe on a terminal: a name or a value of a hostile bundle may hold escape sequences or turn the text around."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."


class Unreadable(Exception):
    """Nothing can be judged: a required file is missing or is not what its name says."""

    def __init__(self, file: str, line: int | None, what: str) -> None:
        super().__init__(f"{file}{f':{line}' if line else ''}: {_printable(what, 500)}")
        self.file, self.line, self.what = file, line, _printable(what, 500)


class Bad(Exception):
    """What is wrong at the place that is being read: a code of `MEANS`, and the words."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code


class Report:
    """Violations and warnings as they are found, and what was counted."""

    def __init__(self) -> None:
        self.violations: list[dict[str, Any]] = []
        self.warnings: list[dict[str, Any]] = []
        self.checked = Counter({"ledgers": 0, "entries": 0, "signatures": 0, "heads": 0, "proofs": 0})
        self.known: set[bytes] = set()  # signatures that were checked: a head stands in many files
        self.odometer = Odometer()  # one for all: its work is bounded over the whole bundle

    def wrong(self, code: str, file: str, line: int | None, what: str) -> None:
        """One violation."""
        self._add(self.violations, code, file, line, what)

    def warn(self, code: str, file: str, line: int | None, what: str) -> None:
        """Something that an honest crash, or plain work with others, also leaves behind."""
        self._add(self.warnings, code, file, line, what)

    @staticmethod
    def _add(where: list[dict[str, Any]], code: str, file: str, line: int | None, what: str) -> None:
        if len(where) == MAX_FOUND:
            code, line, what = "more", None, "... and more; the rest is left out"
        if len(where) <= MAX_FOUND:
            said = {"file": _printable(file, 300), "line": line, "what": _printable(what, 500)}
            where.append({"code": code, **said, "means": MEANS[code]})


# -- bytes ---------------------------------------------------------------------------------------------------


def _open(root: Path, file: str) -> BufferedReader:
    """A regular file inside the bundle, reached through no link. Opening never blocks (a FIFO would)."""
    path = root / file
    if any(p.is_symlink() for p in [path, *path.parents[: file.count("/")]]):
        raise Bad("file", "is a link, or in a linked folder: a bundle holds plain files")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as err:
        raise Bad("file", f"cannot be read: {err.strerror}") from err
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Bad("file", "is not a regular file")
    return os.fdopen(handle, "rb")


def _read(root: Path, file: str, limit: int = MAX_FILE) -> bytes:
    with _open(root, file) as handle:
        data = handle.read(limit + 1)
    if len(data) > limit:
        raise Bad("file", f"is larger than {limit} bytes")
    return data


def _lines(root: Path, file: str) -> Iterator[bytes]:
    """Whole lines, without their line breaks."""
    with _open(root, file) as handle:
        while data := handle.readline(MAX_LINE + 1):
            if not data.endswith(b"\n"):
                raise Bad(
                    "torn", "longer than any line" if len(data) > MAX_LINE else "a torn last line: its end is missing"
                )
            yield data[:-1]


def _count(root: Path, file: str) -> int:
    """Lines of a file's first GiB, a torn last one among them; 0 where it cannot be read."""
    count, last = 0, b"\n"
    with suppress(Bad), _open(root, file) as handle:
        for part in itertools.islice(iter(lambda: handle.read(2**20), b""), 2**10):
            count, last = count + part.count(b"\n"), part[-1:]
    return count + (last != b"\n")


def _hash_of(root: Path, file: str) -> str:
    with _open(root, file) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _listing(root: Path, folder: str) -> list[str]:
    try:
        return sorted(os.listdir(root / folder)) if not (root / folder).is_symlink() else []
    except OSError:
        return []


_NO_BRACKETS, _INNERMOST = re.compile(rb"[^\[\]{}]+"), re.compile(rb"\[\]|\{\}")


def _json(data: bytes, floats: bool = False) -> Any:
    """JSON without duplicate keys, NaN or (unless asked for) floats, at most 16 levels deep."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            raise ValueError("a key is given twice")
        return made

    def never(text: str) -> float:
        raise ValueError(f"the number {text[:40]} has no place here")

    outside = b"".join(data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])  # not within strings
    brackets = _NO_BRACKETS.sub(b"", outside)
    levels = 0
    while brackets and levels < 16:
        brackets, levels = _INNERMOST.sub(b"", brackets), levels + 1
    try:
        if brackets:
            raise ValueError("nested too deeply, or brackets that do not match")
        real = (lambda t: float(t)) if floats else never
        return json.loads(data.decode(), object_pairs_hook=pairs, parse_float=real, parse_constant=never)
    except (ValueError, RecursionError) as err:
        raise Bad("layout", f"not valid JSON: {str(err)[:100]}") from err


def _bytes(value: Any) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except ValueError as err:  # a lone surrogate
        raise Bad("layout", "text that is not Unicode") from err


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


Signatures = list[tuple[str, bytes]]  # (keyid, signature)


def _canonical(data: bytes) -> Any:
    """JSON in the one layout: the same bytes when it is written again."""
    parsed = _json(data)
    if _bytes(parsed) != data:
        raise Bad("layout", "in an unusual layout (edited?)")
    return parsed


def _envelope(parsed: Any, kind: str) -> tuple[bytes, Signatures]:
    """Payload and signatures of an envelope of the one layout; no signature is checked here."""
    try:
        payload = base64.b64decode(parsed["payload"], validate=True)
        signatures = [(s["keyid"], base64.b64decode(s["sig"], validate=True)) for s in parsed["signatures"]]
    except (LookupError, TypeError, ValueError) as err:
        raise Bad("layout", "not a signed envelope") from err
    made = [{"keyid": key, "sig": base64.b64encode(sig).decode()} for key, sig in signatures]
    again = {"payload": base64.b64encode(payload).decode(), "payloadType": kind, "signatures": made}
    if again != parsed:
        raise Bad("layout", f"an envelope of another type than {kind}, or in an unusual layout (edited?)")
    return payload, signatures


def _file_of_one(root: Path, file: str, kind: str) -> tuple[bytes, Signatures]:
    """The one envelope, and the newline behind it, that a file consists of."""
    data = _read(root, file)
    if not data.endswith(b"\n"):
        raise Bad("layout", "does not end in a newline (edited?)")
    return _envelope(_canonical(data[:-1]), kind)


@lru_cache(maxsize=10_000)
def _public(key: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))


def _check_signature(report: Report, key: str, kind: str, payload: bytes, signature: bytes) -> None:
    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload)
    name = hashlib.sha256(b"%b %b %b" % (key.encode(), signature, signed)).digest()
    if name not in report.known:
        try:
            _public(key).verify(signature, signed)
        except (InvalidSignature, ValueError) as err:
            raise Bad("entry_signature", f"bad signature by the key {key[:16]}...") from err
        report.known.add(name)
        report.checked["signatures"] += 1


def _show(value: Any) -> str:
    return ascii(value)[:80]


# -- the tree (RFC 6962, 2.1) --------------------------------------------------------------------------------


class Tree:
    """The root over a growing list of leaves."""

    def __init__(self) -> None:
        self.size = 0
        self._peaks: list[bytes] = []  # roots of full subtrees, the largest first: one for each bit of size

    def add(self, leaf: bytes) -> str:
        """One leaf more: the root over all, in hex."""
        node, size = hashlib.sha256(b"\0" + leaf).digest(), self.size
        while size & 1:
            node = hashlib.sha256(b"\1" + self._peaks.pop() + node).digest()
            size >>= 1
        self._peaks.append(node)
        self.size += 1
        for peak in self._peaks[-2::-1]:
            node = hashlib.sha256(b"\1" + peak + node).digest()
        return node.hex()


# -- kinds of values -----------------------------------------------------------------------------------------

Check = Callable[[Any], Any]  # falsy, or raising Bad, for a value of the wrong kind


class Shared(NamedTuple):
    """Steps of noise that partners share: q, sigma and steps that they are charged as, and then what they are."""

    q: float
    sigma: float
    steps: int
    noise: float  # of quorum - colluding shares together, over the clipping norm
    clip: float
    grid: float
    dimension: int
    quorum: int
    colluding: int


Event = tuple[float, float, int] | Shared | None  # (q, sigma, steps); None is no protection


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 10_000


def _id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9._:-]{1,200}", value) is not None


def _hex(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _short_hex(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32}", value) is not None


def _moment(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", value, re.ASCII) is not None


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _whole(value: Any, low: int = 0, high: int = 10**9) -> bool:
    return type(value) is int and low <= value <= high


def _is(*allowed: Any) -> Check:
    return lambda value: any(type(value) is type(one) and value == one for one in allowed)


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _fields(value: Any, what: str, checks: Mapping[str, Check]) -> dict[str, Any]:
    """`value` if it is an object with exactly these fields, each of its kind."""
    if not isinstance(value, dict) or set(value) != set(checks):
        raise Bad("layout", f"{what} does not have exactly the fields {', '.join(checks)}")
    for name, check in checks.items():
        if not check(value[name]):
            raise Bad("layout", f"{what}: {name} is {_show(value[name])}")
    return value


def _real(value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,40}(\.[0-9]{1,40})?(e[+-]?[0-9]{1,3})?", value, re.ASCII):
        number = float(value)
        if math.isfinite(number):
            return number
    raise Bad("layout", f"{_show(value)} is not a finite decimal string")


def _is_real(value: Any) -> bool:
    return math.isfinite(_real(value))


LOCAL, SHARED = "poisson-gaussian/1", "shared-gaussian/1"
OF_SHARED: dict[str, Check] = {
    "clip": _is_real,
    "grid": _is_real,
    "dimension": lambda v: _whole(v, 1),
    "quorum": _whole,
    "colluding": _whole,
}


def _event(value: Any) -> Event:
    if value == {"mechanism": "none/1"}:
        return None
    if not isinstance(value, dict) or value.get("mechanism") not in (LOCAL, SHARED):
        raise Bad("unknown", f"an event of an unknown mechanism: {_show(value)}")
    checks: dict[str, Check] = {"q": _is_real, "sigma": _is_real, "steps": lambda v: _whole(v, 1)}
    shared = value["mechanism"] == SHARED
    _fields(value, "event", {"mechanism": _text} | checks | (OF_SHARED if shared else {}))
    q, sigma = _real(value["q"]), _real(value["sigma"])
    if not (0 < q <= 1 and sigma >= 0.3):
        raise Bad("layout", f"an event with q = {q:g}, sigma = {sigma:g}; allowed are 0 < q <= 1 and sigma from 0.3")
    if shared:
        sizes = value["dimension"], value["quorum"], value["colluding"]
        return _shared(q, sigma, _real(value["clip"]), _real(value["grid"]), *sizes, value["steps"])
    return max(q, 1e-30), min(sigma, 1e9), value["steps"]


def _shared(
    q: float, noise: float, clip: float, grid: float, dimension: int, quorum: int, colluding: int, steps: int
) -> Shared:
    """Each of `quorum` partners or more adds discrete Gaussian noise to its sum of clipped records, rounded to a grid.

    At most `colluding` of them tell the coordinator theirs, so the rest, of variance (noise clip)^2 together, is certain. It costs
    what a Gaussian step of standard deviation sqrt((noise clip)^2 - (4 grid)^2) costs on a sum of sensitivity clip + grid sqrt(dimension):
    rounding moves each coordinate by half a step at most, with a record and without it; a discrete Gaussian of at least 8 steps, and
    a sum of such, is what is made of a continuous one of 4 steps less (in squares), but for probabilities that 1e-12 of sigma outweighs.
    """
    if not (clip > 0 and grid > 0 and quorum - colluding >= 2):
        raise Bad(
            "layout", "shared noise of fewer than two shares that are certain, or without a clipping norm or grid"
        )
    if not noise * clip / (grid * math.sqrt(quorum - colluding)) >= 8:
        raise Bad("layout", f"shared noise on a grid of {grid:g}: a share is less than 8 steps of it")
    step = grid / clip
    sigma = math.sqrt(noise - 4 * step) * math.sqrt(noise + 4 * step) / (1 + step * math.sqrt(dimension)) * (1 - 1e-12)
    if not sigma >= 0.3:
        raise Bad("layout", f"shared noise that is charged as sigma = {sigma:g}; allowed is sigma from 0.3")
    return Shared(max(q, 1e-30), min(sigma, 1e9), steps, noise, clip, grid, dimension, quorum, colluding)


def _grid(clip: float, dimension: int) -> float:
    """The grid of a charter's shared noise: the largest power of two of which sqrt(dimension) are at most clip / 256."""
    return math.ldexp(1.0, math.frexp(clip / (256 * math.sqrt(dimension)))[1] - 1)


def _plan(value: Any) -> dict[str, tuple[int, Event]]:
    """purpose -> (count, event)."""
    if not isinstance(value, list) or not 1 <= len(value) <= 2:
        raise Bad("layout", "a plan is a list of one or two items")
    checks = {"purpose": _is("train", "evaluate"), "count": _whole, "event": lambda v: _event(v) or True}
    items = [_fields(item, "plan", checks) for item in value]
    if len({item["purpose"] for item in items}) != len(items):
        raise Bad("layout", "a plan with one purpose twice")
    return {item["purpose"]: (item["count"], _event(item["event"])) for item in items}


def _counted(value: Any) -> list[tuple[Event, int]]:
    """Events of a header's hold or release: [[event, count], ...], as many as a plan has items at most."""
    if not isinstance(value, list) or len(value) > 2:
        raise Bad("layout", "a header's events are a list of at most two pairs")
    if not all(isinstance(pair, list) and len(pair) == 2 and _whole(pair[1]) for pair in value):
        raise Bad("layout", "a header's events are pairs of an event and a count")
    return [(_event(event), count) for event, count in value]


def _metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_real(v) for v in value.values())


# -- accounting: one record of one lineage, add-or-remove-one ------------------------------------------------

Kind = tuple[float, float]  # (q, sigma)
History = tuple[tuple[Kind, int], ...]  # (kind, steps), sorted


@dataclass(frozen=True)
class Budget:
    """The filter: branches (order, share of delta) and one exact Gaussian branch."""

    epsilon: float
    delta: float
    orders: tuple[tuple[int, float], ...]
    gaussian_delta: float

    @classmethod
    def parse(cls, value: Any) -> Budget:
        """From a ledger's fields; the shares must sum to at most delta."""
        checks: dict[str, Check] = dict.fromkeys(("epsilon", "delta", "gaussian_delta"), _is_real)
        _fields(value, "budget", checks | {"orders": lambda v: isinstance(v, list) and 1 <= len(v) <= 5})
        if not all(isinstance(o, list) and len(o) == 2 and _whole(o[0], 2, 4096) for o in value["orders"]):
            raise Bad("budget", "orders are pairs of a whole number from 2 to 4096 and a share of delta")
        orders = tuple((order, _real(share)) for order, share in value["orders"])
        made = cls(_real(value["epsilon"]), _real(value["delta"]), orders, _real(value["gaussian_delta"]))
        shares = [share for _, share in orders] + [made.gaussian_delta]
        if not (made.epsilon > 0 and 0 < made.delta < 1 and min(shares) > 0):
            raise Bad("budget", "epsilon, delta and its shares must be positive and delta below 1")
        if sum(map(Fraction, shares)) > Fraction(made.delta):
            raise Bad("budget", f"the shares of delta sum to more than {made.delta!r}")
        return made

    def at(self, epsilon: float, delta: float) -> Budget:
        """The same orders and parts of delta for another cap."""
        if (epsilon, delta) == (self.epsilon, self.delta):
            return self
        parts = [
            max(share / self.delta * delta, 1e-300) for share in (*dict(self.orders).values(), self.gaussian_delta)
        ]
        return Budget(epsilon, delta, tuple(zip(dict(self.orders), parts, strict=False)), parts[-1])


@lru_cache(maxsize=64)
def _binomials(order: int) -> list[float]:
    """ln C(order, k), k from 0."""
    whole = math.lgamma(order + 1)
    return [whole - math.lgamma(k + 1) - math.lgamma(order - k + 1) for k in range(order + 1)]


@lru_cache(maxsize=100_000)
def _renyi(q: float, sigma: float, order: int) -> float:
    """Renyi divergence of one step at a whole order (Mironov, Talwar & Zhang 1908.10530, Sec. 3.3).

    (a-1) rho = ln sum_k C(a,k) (1-q)^(a-k) q^k e^x with x = k(k-1)/(2 sigma^2). The weights sum to 1, so it is
    ln(1 + sum_{k>=2} weight (e^x - 1)): only positive terms, nothing cancels however small q is.
    """
    if q == 1:
        return order / (2 * sigma**2)
    rest, taken, half, log = math.log1p(-q), math.log(q), 1 / (2 * sigma**2), math.log
    logs = [
        weight + (order - k) * rest + k * taken + (x if (x := k * (k - 1) * half) > 50 else log(math.expm1(x)))
        for k, weight in enumerate(_binomials(order))
        if k >= 2
    ]
    top = max(logs)
    excess = top + log(math.fsum(math.exp(value - top) for value in logs))  # ln(A - 1)
    return (max(0.0, excess) + math.log1p(math.exp(-abs(excess)))) / (order - 1)


@lru_cache(maxsize=10_000)
def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Least epsilon with Phi(mu/2 - e/mu) - exp(e) Phi(-mu/2 - e/mu) <= delta (Balle & Wang 1805.06530, Thm 8)."""
    mu = max(mu, 1e-6)

    def exceeds(epsilon: float) -> bool:
        a, b = epsilon / mu - mu / 2, epsilon / mu + mu / 2
        # exp(e) Phi(-b) = phi(a) * Phi(-b)/phi(b); far out the ratio is Mills' 1/b (1 - 1/b^2 + 3/b^4 - 15/b^6)
        ratio = math.erfc(b / math.sqrt(2)) / 2 * math.sqrt(2 * math.pi) * math.exp(b * b / 2) if b < 25 else None
        ratio = ratio if ratio is not None else (1 - 1 / b**2 + 3 / b**4 - 15 / b**6) / b
        return math.erfc(a / math.sqrt(2)) / 2 - math.exp(-a * a / 2) / math.sqrt(2 * math.pi) * ratio > delta

    low, high = 0.0, mu * (mu / 2 + math.sqrt(-2 * math.log(delta)))  # the Gaussian tail: never exceeds there
    if not exceeds(low):
        return 0.0
    while low < (middle := (low + high) / 2) < high and high - low > 1e-14 * high:
        low, high = (middle, high) if exceeds(middle) else (low, middle)
    return high


@lru_cache(maxsize=1000)
def filter_epsilon(budget: Budget, history: History) -> float:
    """The least epsilon at which any branch admits it (Feldman & Zrnic 2008.11193; Smith & Thakurta 2210.17520)."""
    total = Total(budget)
    for (q, sigma), steps in history:
        total.add((q, sigma, steps))
    return total.epsilon()


_UNIT = 1 << 1074  # every finite float is a whole number of these parts


def _exact(value: float) -> int:
    numerator, denominator = value.as_integer_ratio()
    return numerator * (_UNIT // denominator)


@lru_cache(maxsize=100_000)
def _prices(q: float, sigma: float, orders: tuple[int, ...]) -> tuple[int, ...]:
    """What one step adds to mu^2 and to the divergence at each order, exactly as the floats have it."""
    return tuple(_exact(price) for price in (sigma**-2, *(_renyi(q, sigma, order) for order in orders)))


class Total:
    """A filter's running sums. They are exact, so what is given back leaves no trace, and no order of events matters."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._orders = tuple(order for order, _ in budget.orders)
        self._sums = [0] * (1 + len(self._orders))

    def add(self, event: Event, times: int = 1) -> None:
        """Events that come, or (times below 0) that are given back."""
        if event is not None and times:
            q, sigma, steps = event[:3]
            prices = _prices(q, sigma, self._orders)
            self._sums = [total + times * steps * price for total, price in zip(self._sums, prices, strict=True)]

    def epsilon(self) -> float:
        """As `filter_epsilon`."""
        mu2, *rho = (total / _UNIT for total in self._sums)
        if mu2 <= 0:
            return 0.0
        best = min(_converted(r, *o) for r, o in zip(rho, self.budget.orders, strict=True))
        return min(best, _gaussian_epsilon(math.sqrt(mu2), self.budget.gaussian_delta))


def _mu(history: History) -> float:
    return math.sqrt(math.fsum(steps / sigma**2 for (_, sigma), steps in history))


ORDERS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)


def _renyi_sum(history: History, order: int) -> float:
    return math.fsum(steps * _renyi(q, sigma, order) for (q, sigma), steps in history)


def _noticed(q: float, sigma: float) -> float:
    """Total variation of one step with and without a record: q times that of two normal distributions 1/sigma apart."""
    return q * math.erf(1 / (math.sqrt(8) * sigma))


def _converted(rho: float, order: int, delta: float) -> float:
    """From Renyi divergence to epsilon at delta (Canonne, Kamath & Steinke 2004.00010, Prop. 12)."""
    return max(0.0, rho + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))


def _plain(history: History, delta: float) -> tuple[float, int]:
    """The least of many plain bounds, each valid for a history fixed in advance; and the best Renyi order."""
    best, at = math.inf, ORDERS[0]
    for order in ORDERS:
        found = _converted(_renyi_sum(history, order), order, delta)
        if found > best:
            break  # it falls, then rises
        best, at = found, order
    return min(best, _gaussian_epsilon(_mu(history), delta)), at


@dataclass(frozen=True)
class Reading:
    """What an odometer says: epsilon, never below the truth, and why it may be well above it."""

    epsilon: float
    rounded: float = 0.0  # about how much of it came in by rounding events or losses
    plain: bool = False  # a plain Renyi or Gaussian bound: no loss distribution was composed
    interval: float = 0.0  # of the loss distributions


Cell = tuple[bool, float, list[tuple[Kind, int]]]  # whether it can be cut, what it costs, what is in it


class Odometer:
    """The tight epsilon of a history taken as fixed: privacy loss distributions, rounded against the history.

    q = 1 throughout is exact. Otherwise Connect the Dots (2207.04380), composed by FFT; the interval is halved until epsilon
    moves by less than 5 in 10,000. However many events a history has, and however hostile they are, few are composed:

    1. Those at which a joining record is noticed at all with 1/10,000 of delta together are left out, and taken off delta.
    2. Those that cost next to nothing even with q = 1 are charged so, and join the unsampled ones: one Gaussian mechanism.
    3. Beyond `kinds`, those that are alike are rounded to one, q up and sigma down: both are undone by post-processing (each
       joining record is made to stay away with some probability; noise is added), so no loss becomes smaller.

    Above epsilon 200 or 10^6 steps, and once its work is used up, the answer is a plain Renyi or Gaussian bound.

    Attributes:
        left: of its work, in cells that are composed.
    """

    kinds = 96
    cells = 2**21  # of all compositions of one history: some seconds of work
    work = (
        2**28
    )  # of all histories, about two minutes: whoever writes a bundle does not choose how long its audit takes

    def __init__(self) -> None:
        self.left: float = self.work
        self._known: dict[tuple[History, float, float], Reading] = {}

    def read(self, history: History, delta: float, interval: float = 0.0) -> Reading:
        """Epsilon at delta.

        Args:
            interval: of the loss distributions; 0: what it takes.
        """
        at = (history, delta, interval)
        if at not in self._known:
            self._known[at] = self._read(*at)
        return self._known[at]

    def _read(self, history: History, delta: float, interval: float) -> Reading:
        if all(q == 1 for (q, _), _ in history):
            return Reading(_gaussian_epsilon(_mu(history), delta) if history else 0.0)
        noticed = sorted((n * _noticed(q, sigma), ((q, sigma), n)) for (q, sigma), n in history)
        if math.fsum(chance for chance, _ in noticed) * (1 + 1e-9) < delta:
            return Reading(0.0)
        few = itertools.accumulate(chance for chance, _ in noticed)
        least = tuple(item for (_, item), chance in zip(noticed, few, strict=True) if chance > 1e-4 * delta)
        bound, order = _plain(least, delta * (1 - 1e-4))
        bound = min(bound, _gaussian_epsilon(_mu(history), delta))
        if self.left <= 0:
            return Reading(bound, plain=True)
        events = self._rounded(least, order)
        rounded = max(0.0, _renyi_sum(tuple(events.items()), order) - _renyi_sum(least, order))
        if bound <= 1e-4 or bound > 200 or sum(events.values()) > 10**6:
            return Reading(bound, 0.0, plain=bound > 1e-4)
        try:
            if interval:
                found = self._at(events, delta * (1 - 1e-4), interval)
            else:
                found, interval, moved = self._refined(events, delta * (1 - 1e-4), rounded)
                rounded += moved
        except (ArithmeticError, ValueError, MemoryError):  # losses beyond what a float holds
            found = math.inf
        return Reading(found, rounded, interval=interval) if found < bound else Reading(bound, plain=True)

    def _rounded(self, history: History, order: int) -> dict[Kind, int]:
        """At most about `kinds` sampled events and one unsampled one, of no smaller loss."""
        unsampled = [(sigma, n) for (q, sigma), n in history if q == 1]
        rest, spread, cheap = {}, _renyi_sum(history, 2), 0.0
        for (q, sigma), n in sorted(history, key=lambda item: item[1] / item[0][1] ** 2):
            cheap += n / sigma**2
            if q < 1 and cheap > 1e-6 * spread:
                rest[q, sigma] = n
            elif q < 1:
                unsampled.append((sigma, n))
        rest = _merged_kinds(rest, order, self.kinds)
        if unsampled:  # together one Gaussian mechanism, in as many parts as keep its losses moderate
            mu2 = math.fsum(n / sigma**2 for sigma, n in unsampled)
            parts = math.ceil(mu2 / 4)
            rest[1.0, math.sqrt(parts / mu2)] = parts
        return rest

    def _refined(self, events: Mapping[Kind, int], delta: float, rounded: float) -> tuple[float, float, float]:
        """Epsilon, the interval at which it moves no more, or by less than rounding costs anyway; else by how much it did."""
        count = sum(events.values())
        least = self._width(events, delta) / self.cells
        interval = max(0.5 * math.sqrt(_renyi_sum(tuple(events.items()), 2) / count), least)
        found = self._at(events, delta, interval)
        moved = found
        while moved > max(5e-4, 5e-4 * found, 0.1 * rounded):
            if interval / 2 < least:
                return found, interval, moved
            interval, coarse = interval / 2, found
            found = self._at(events, delta, interval)
            moved = coarse - found
        return found, interval, 0.0

    def _at(self, events: Mapping[Kind, int], delta: float, interval: float) -> float:
        self.left -= self._width(events, delta) / interval + 2**14 * len(events)  # each kind costs some milliseconds
        return self.at(events, delta, interval)

    def _width(self, events: Mapping[Kind, int], delta: float) -> float:
        """Of all that is composed. An n-fold composition is about sqrt(n) times as wide as one step."""
        tail = math.log(1e-4 * delta / sum(events.values()))
        return sum(self._span(q, sigma, tail) * math.sqrt(n) for (q, sigma), n in events.items())

    @staticmethod
    def at(events: Mapping[Kind, int], delta: float, interval: float) -> float:
        """Epsilon by loss distributions of this interval; sound whatever it is."""
        # Imported where it is needed: it takes a second and 50 MB, and unsampled histories do without.
        from dp_accounting.pld import privacy_loss_distribution as pld

        count = sum(events.values())
        tail = math.log(1e-4 * delta / count)  # noise this improbable is charged as certain loss
        total = pld.identity(interval)
        for (q, sigma), steps in events.items():
            step = pld.from_gaussian_mechanism(
                sigma, sampling_prob=q, value_discretization_interval=interval, log_mass_truncation_bound=tail
            )
            total = total.compose(step.self_compose(steps))
        delta -= 2e-16 * (1000 + count)  # the FFT's rounding
        return float(total.get_epsilon_for_delta(delta)) if delta > 0 else math.inf

    @staticmethod
    def _span(q: float, sigma: float, tail: float) -> float:
        """Width of one step's losses that are put on the grid."""
        reach = math.sqrt(-2 * tail) * sigma
        top = (0.5 + reach) / sigma**2
        if q == 1:
            return 2 * top
        high = top + math.log(q + (1 - q) * math.exp(-top))
        return high - math.log1p(-q)


def _merged_kinds(events: Mapping[Kind, int], order: int, most: int) -> dict[Kind, int]:
    """At most so many kinds, of no smaller loss: each is a cell's largest q and smallest sigma.

    The cell that costs most by this, in Renyi divergence at this order, is cut in two at its median q or sigma.
    """

    def corner(inside: list[tuple[Kind, int]]) -> tuple[Kind, int]:
        kinds = [kind for kind, _ in inside]
        return (max(q for q, _ in kinds), min(sigma for _, sigma in kinds)), sum(n for _, n in inside)

    def cell(inside: list[tuple[Kind, int]]) -> Cell:
        (q, sigma), steps = corner(inside)
        return len(inside) > 1, steps * _renyi(q, sigma, order) - _renyi_sum(tuple(inside), order), inside

    def halves(inside: list[tuple[Kind, int]]) -> list[Cell]:
        return [cell(inside[: len(inside) // 2]), cell(inside[len(inside) // 2 :])]

    cells = [cell(list(events.items()))] if events else []
    while len(cells) < min(most, len(events)):
        worst = max(cells, key=lambda one: one[:2])
        cells.remove(worst)
        cuts = [halves(sorted(worst[2])), halves(sorted(worst[2], key=lambda item: item[0][1]))]
        cheaper = min(cuts, key=lambda two: two[0][1] + two[1][1])
        cells += cheaper
    made: Counter[Kind] = Counter()
    for _, _, inside in cells:
        kind, steps = corner(inside)
        made[kind] += steps
    return dict(made)


# -- the charter ---------------------------------------------------------------------------------------------

CHARTER_TYPE = "application/vnd.hansa.charter+json"
ENTRY_TYPE = "application/vnd.hansa.entry.v2+json"
HEAD_TYPE = "application/vnd.hansa.head+json"
CLOSING_TYPE = "application/vnd.hansa.closing+json"


@dataclass(frozen=True)
class Secure:
    """Secure aggregation, as a charter has it."""

    colluding: int  # how many partners may work with the coordinator
    retries: int  # attempts in a whole run beyond one for each round
    dimension: int
    threshold: (
        int  # of so many partners' shares a sum is opened; the quorum is no less, so no two sums of one attempt can be
    )

    @classmethod
    def parse(cls, value: Any, partners: int, quorum: int) -> Secure:
        """From a charter's fields, if the promise can be kept on these terms."""
        checks: dict[str, Check] = {
            "colluding": lambda v: _whole(v, 0, 98),
            "retries": lambda v: _whole(v, 0, 10**6),
            "dimension": lambda v: _whole(v, 1),
        }
        _fields(value, "secure_aggregation", checks)
        threshold = (partners + value["colluding"]) // 2 + 1
        if not 3 <= partners <= 100 or not max(value["colluding"] + 2, threshold) <= quorum <= partners:
            raise Bad("layout", f"secure aggregation that a quorum of {quorum} of {partners} partners cannot keep")
        return cls(threshold=threshold, **value)


@dataclass
class Terms:
    """What an auditor needs of a charter."""

    sha256: str
    name: str
    coordinator: str
    keys: dict[str, str]  # partners in order, then the coordinator
    declared: dict[str, int]  # of each partner; of a population's clients under ""
    clients: int | None  # of a population
    kind: str
    unit: str  # "record", or "client": of central noise
    epsilon: float | None
    delta: float | None
    clip_norm: float | None
    noise_multiplier: float | None
    rounds: int
    quorum: int
    evaluation: str
    plan: dict[str, Event] = field(default_factory=dict)  # purpose -> event
    expires: str = ""
    simulated: bool = False
    secure: Secure | None = None

    @property
    def attempts(self) -> int:
        """How often a partner trains in one run, at most."""
        return self.rounds + (self.secure.retries if self.secure else 0)

    @property
    def colluding(self) -> int | None:
        """How many partners may work with the coordinator before shared noise protects less; None: noise is not shared."""
        return self.secure.colluding if self.secure and self.kind == "shared" else None

    @property
    def adversary(self) -> str:
        """Against whom an epsilon under this charter holds."""
        return CENTRAL_ADVERSARY if self.kind == "central" else _adversary(self.colluding)

    @property
    def least(self) -> int:
        """How many clients a round of a population commits: the quorum; where clients are the unit all, named or not."""
        return (self.clients or 0) if self.unit == "client" else self.quorum

    def undone_by(self, colluding: int | None) -> bool:
        """Whether noise that is shared so, under any charter, holds against fewer than this charter's."""
        return colluding is not None and (self.colluding is None or colluding < self.colluding)

    @classmethod
    def parse(cls, payload: bytes) -> Terms:
        """From the signed bytes.

        Raises:
            Bad: malformed.
        """
        c = _json(payload)
        try:
            if _bytes(c) != payload or c["format"] != "hansa-charter/1":
                raise Bad("unknown", "a charter of an unknown version or layout")
            privacy, local, evaluation = c["privacy"], c["algorithm"]["local"], c["evaluation"]
            members, population = c["partners"], c["population"]
            named = [*members, c["coordinator"]]
            keys = {m["name"]: m["key"] for m in named}
            sizes = [m["declared_records"] for m in members] + ([population["declared_records"]] if population else [])
            numbers = ("epsilon", "delta", "clip_norm", "noise_multiplier")
            real = {k: None if privacy[k] is None else _real(privacy[k]) for k in numbers}
            good = (
                isinstance(members, list)
                and all(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", n) for n in keys)
                and all(map(_hex, keys.values()))
                and len(set(keys.values())) == len(keys) == len(named)
                and bool(members) == (population is None)
                and all(_whole(size, 1) for size in sizes)
                and (population is None or (_whole(population["clients"], 1, 10**6) and c["simulated"] is True))
                and _is("local", "shared", "central", "none")(privacy["kind"])
                and _is("none", "public", "private")(evaluation["kind"])
                and privacy["unit"] == ("client" if privacy["kind"] == "central" else "record")
                and all(_whole(n, 1) for n in (c["algorithm"]["rounds"], local["steps"]))
                and _whole(c["quorum"], 0 if privacy["kind"] == "central" else 1)
                and all(map(_text, (c["name"], c["expires"])))
                and _flag(c["simulated"])
                and all((n is None) == (privacy["kind"] == "none") for n in real.values())
                and all(n is None or n > 0 for n in real.values())
                and (real["delta"] is None or real["delta"] < 1)
                and datetime.fromisoformat(c["expires"]).tzinfo is not None
            )
            if not good:
                raise Bad("layout", "a charter whose fields are malformed or do not fit together")
            if not 0 < _real(c["algorithm"].get("average_last", "1")) <= 1:
                raise Bad("layout", "average_last is no share of the rounds")
            secure = None
            if "secure_aggregation" in c:
                secure = Secure.parse(c["secure_aggregation"], len(members), c["quorum"])
            plan: dict[str, Event] = {"train": None}
            if privacy["kind"] == "local":
                made = {"mechanism": "poisson-gaussian/1", "q": local["sampling_rate"], "steps": local["steps"]}
                plan["train"] = _event(made | {"sigma": privacy["noise_multiplier"]})
            if privacy["kind"] == "shared":
                plan["train"] = _shared_training(c, secure)
            if privacy["kind"] == "central":
                plan["train"] = _central_training(c, real["delta"] or 1.0)
            if evaluation["kind"] == "private":
                made = {"mechanism": "poisson-gaussian/1", "q": "1", "steps": 1}
                plan["evaluate"] = _event(made | {"sigma": evaluation["noise_multiplier"]})
            return cls(
                sha256=_sha256(payload),
                name=c["name"],
                coordinator=c["coordinator"]["name"],
                keys=keys,
                declared=({"": sizes[0]} if population else {m["name"]: m["declared_records"] for m in members}),
                clients=population["clients"] if population else None,
                kind=privacy["kind"],
                unit=privacy["unit"],
                rounds=c["algorithm"]["rounds"],
                quorum=c["quorum"],
                evaluation=evaluation["kind"],
                plan=plan,
                expires=c["expires"],
                simulated=c["simulated"],
                secure=secure,
                **real,
            )
        except (LookupError, TypeError, ValueError, AttributeError) as err:
            raise Bad("layout", f"a charter that lacks something or has it in another form: {_show(str(err))}") from err

    def check_plan(self, plan: Mapping[str, tuple[int, Event]]) -> None:
        """Return when this is the plan that was agreed."""
        if {purpose: event for purpose, (_, event) in plan.items()} != self.plan:
            raise Bad("terms", "the plan's events are not the charter's")
        if plan["train"][0] != self.attempts or plan.get("evaluate", (0, None))[0] > self.rounds:
            retries = f" and retries, {self.secure.retries}" if self.secure else ""
            raise Bad("terms", f"the plan's counts do not fit the charter's number of rounds, {self.rounds}{retries}")

    def check_clip(self, purpose: str, clip_norm: str | None) -> None:
        """Return when a debit names the charter's clipping norm (evaluation has sensitivity 1, hence none)."""
        wanted = self.clip_norm if purpose == "train" else None
        if (None if clip_norm is None else _real(clip_norm)) != wanted:
            raise Bad("terms", f"clip_norm {_show(clip_norm)}, the charter has {wanted}")


def _shared_training(c: dict[str, Any], secure: Secure | None) -> Event:
    """The one event that training under shared noise is: one gradient step a round, in which every record weighs the same."""
    privacy, algorithm, local = c["privacy"], c["algorithm"], c["algorithm"]["local"]
    good = (
        local["steps"] == 1
        and (local["optimizer"]["name"], _real(local["optimizer"]["momentum"])) == ("sgd", 0)
        and algorithm["strategy"]["name"] != "fedprox"
        and algorithm["weighting"] == "declared"
    )
    if secure is None or not good:
        what = "shared noise without secure aggregation, or in training that is not one plain step a round"
        raise Bad("layout", what)
    grid = repr(_grid(_real(privacy["clip_norm"]), secure.dimension))
    made = {"mechanism": SHARED, "q": local["sampling_rate"], "sigma": privacy["noise_multiplier"], "steps": 1}
    made |= {"clip": privacy["clip_norm"], "grid": grid, "dimension": secure.dimension}
    return _event(made | {"quorum": c["quorum"], "colluding": secure.colluding})


def _central_training(c: dict[str, Any], delta: float) -> Event:
    """The one event that a round of central noise is to every client: it joins with the rate of participation, and noise is drawn once."""
    population, algorithm = c["population"], c["algorithm"]
    good = (
        population is not None
        and c["quorum"] == 0
        and algorithm["weighting"] == "uniform"
        and c["evaluation"]["kind"] != "private"
        and "secure_aggregation" not in c
        and delta * population["clients"] < 1
    )
    if not good:
        what = "central noise between partners, of weighted or masked updates, with a quorum, or at a delta of 1/clients or more"
        raise Bad("layout", what)
    made = {"mechanism": LOCAL, "q": algorithm["participation"], "sigma": c["privacy"]["noise_multiplier"], "steps": 1}
    return _event(made)


def _load_charter(root: Path, report: Report) -> Terms:
    file = "charter.json"
    try:
        payload, signatures = _file_of_one(root, file, CHARTER_TYPE)
        terms = Terms.parse(payload)
    except Bad as bad:
        raise Unreadable(file, 1, str(bad)) from bad
    for what in _everyone_signed(report, CHARTER_TYPE, payload, signatures, terms.keys):
        report.wrong("charter_signatures", file, 1, what)
    if [key for key, _ in signatures] != list(terms.keys.values()):
        report.wrong("charter_signatures", file, 1, "the signatures are not everyone's, in the order of the charter")
    return terms


def _everyone_signed(
    report: Report, kind: str, payload: bytes, made: Signatures, keys: Mapping[str, str]
) -> Iterator[str]:
    """What is wrong with the signatures, if these are to be everyone's, once each."""
    for key, signature in made[: 2 * len(keys)]:
        try:
            if key not in keys.values():
                raise Bad("stranger", f"signed by a key that does not stand in the charter: {_show(key)}")
            _check_signature(report, key, kind, payload, signature)
        except Bad as bad:
            yield str(bad)
    given = [key for key, _ in made]
    if absent := [name for name, key in keys.items() if key not in given]:
        yield f"not signed by {', '.join(absent)}"
    if len(given) > len(keys):
        yield "more signatures than signers"


def _check_keys(root: Path, report: Report, terms: Terms) -> None:
    wanted = {f"{name}.pem": key for name, key in terms.keys.items()}
    for name in sorted({*wanted, *_listing(root, "keys")}):
        file = f"keys/{name}"
        if name not in wanted:
            report.wrong("stranger", file, None, "not a key of this charter")
            continue
        try:
            pem = _public(wanted[name]).public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            if _read(root, file, 10_000) != pem:
                raise Bad("key", "not the key that stands in the charter")
        except Bad as bad:
            report.wrong(bad.code, file, 1, str(bad))


# -- ledgers -------------------------------------------------------------------------------------------------

EMPTY = hashlib.sha256(b"").hexdigest()
HEADER: dict[str, Check] = {
    "v": _whole,
    "seq": _whole,
    "root": _hex,
    "body_sha256": _hex,
    "privacy": _or_null(_object),
}
BODY: dict[str, Check] = {
    "salt": _short_hex,
    "time": _moment,
    "type": _text,
    "charter": _or_null(_hex),
    "data": _object,
}
HIDDEN = "hidden"  # the type of an entry whose body stays with its owner


@dataclass(frozen=True)
class Entry:
    """One verified line."""

    line: int
    type: str
    privacy: dict[str, Any] | None
    time: str | None = None
    charter: str | None = None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> bool:
        """Whether its body is here."""
        return self.time is not None


class Chain:
    """The lines of one ledger, each signed by its owner and in its place; what they mean is for others."""

    def __init__(self, report: Report, key: str) -> None:
        self.report, self.key = report, key
        self.roots = [EMPTY]  # by length
        self._tree = Tree()

    @property
    def length(self) -> int:
        """Number of lines so far."""
        return len(self.roots) - 1

    def take(self, data: bytes) -> Entry:
        """The next line.

        Raises:
            Bad: it is not the owner's next one; nothing changes.
        """
        line = _canonical(data)
        if not isinstance(line, dict) or not {"envelope"} <= set(line) <= {"envelope", "body"}:
            raise Bad("layout", "not an entry")
        payload, signatures = _envelope(line["envelope"], ENTRY_TYPE)
        if [key for key, _ in signatures] != [self.key]:
            raise Bad("entry_signature", "not signed by its owner's key alone")
        _check_signature(self.report, self.key, ENTRY_TYPE, payload, signatures[0][1])
        header = _fields(_canonical(payload), "header", HEADER)
        if header["v"] != 2:
            raise Bad("unknown", f"version {header['v']} of an entry")
        if header["seq"] != self.length:
            raise Bad(
                "entry_order",
                f"sequence number {header['seq']}, wanted {self.length}: entries are missing or out of order",
            )
        if header["root"] != self.roots[-1]:
            raise Bad("entry_order", "does not follow the lines above it: entries were edited, dropped or reordered")
        entry = Entry(self.length + 1, HIDDEN, header["privacy"])
        if "body" in line:
            if _sha256(_bytes(line["body"])) != header["body_sha256"]:
                raise Bad("entry_body", "another body than was signed")
            body = _fields(line["body"], "body", BODY)
            entry = Entry(entry.line, body["type"], entry.privacy, body["time"], body["charter"], body["data"])
        self.roots.append(self._tree.add(payload))
        return entry


class Book:
    """A ledger that is read line by line; a subclass gives meaning to each event."""

    role = ""
    events: ClassVar[dict[str, dict[str, Check]]] = {}
    common: ClassVar[dict[str, dict[str, Check]]] = {
        "genesis": {
            "owner": _text,
            "role": _text,
            "key": _hex,
            "ledger_id": _text,
            "simulated": _flag,
            "software": lambda v: _text(v) or isinstance(v, dict),
        },
        "charter": {"name": _text, "expires": _text},
        "recovered": {"torn_bytes": lambda v: _whole(v, 1, 2**63), "torn_sha256": _hex},
    }
    optional: ClassVar[dict[str, dict[str, Check]]] = {}  # fields that only secure aggregation has
    of_no_charter: ClassVar[set[str]] = {"genesis", "recovered"}

    def __init__(self, report: Report, terms: Terms, owner: str, file: str) -> None:
        self.report, self.terms, self.owner, self.file = report, terms, owner, file
        self.chain = Chain(report, terms.keys[owner])
        self.whole = False  # read to its end, and nobody shows that there was more
        self.unread = 0  # lines from the first bad one on
        self.ledger_id: str | None = None
        self.undisclosed = 0
        self.recorded = False  # this charter

    @property
    def length(self) -> int:
        """Number of good lines."""
        return self.chain.length

    def wrong(self, code: str, line: int | None, what: str) -> None:
        """A violation in this ledger."""
        self.report.wrong(code, self.file, line, what)

    def read(self, root: Path) -> None:
        """Every line; reading stops at the first that is not the owner's next one."""
        try:
            for data in _lines(root, self.file):
                self._apply(self.chain.take(data))
            if not self.length:
                raise Bad("genesis", "is empty: its genesis entry is missing")
            self.whole = True
        except Bad as bad:
            self.wrong(bad.code, None if bad.code == "file" else self.length + 1, str(bad))
            self.unread = _count(root, self.file) - self.length
        self.report.checked["ledgers"] += self.length > 0
        self.report.checked["entries"] += self.length

    def _apply(self, entry: Entry) -> None:
        self.undisclosed += not entry.shown
        for step in (self._header, self._body):
            try:
                step(entry)
            except Bad as bad:
                self.wrong(bad.code, entry.line, f"{entry.type[:40]}: {bad}")
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as err:
                self.wrong("layout", entry.line, f"{entry.type[:40]}: malformed ({_show(str(err))})")

    def _header(self, entry: Entry) -> None:
        """What an entry does to a budget, shown or not."""
        if entry.privacy is not None:
            raise Bad("privacy_differs", f"a {self.role}'s header charges nothing")

    def _body(self, entry: Entry) -> None:
        """What an entry tells, if it is shown."""
        if (entry.line == 1) != (entry.type == "genesis"):
            raise Bad("genesis", "the first entry, and only the first, is genesis, and it is shown")
        if not entry.shown:
            return
        known = self.common | self.events
        if entry.type not in known:
            raise Bad("unknown", "an event of an unknown type")
        also = {name: check for name, check in self.optional.get(entry.type, {}).items() if name in entry.data}
        data = _fields(entry.data, "data", known[entry.type] | also)
        if (entry.charter is None) != (entry.type in self.of_no_charter):
            raise Bad("layout", f"charter is {_show(entry.charter)}")
        if entry.charter not in (None, self.terms.sha256):
            self._foreign(entry, data)
            return
        if not (entry.charter is None or self.recorded or entry.type in ("charter", "refuse")):
            self.wrong("unrecorded", entry.line, f"{entry.type}: before this ledger recorded the charter")
        getattr(self, "_" + entry.type.replace("-", "_"))(entry, data)

    def _foreign(self, entry: Entry, b: dict[str, Any]) -> None:
        """An entry of another charter that is shown all the same."""

    def _genesis(self, _: Entry, b: dict[str, Any]) -> None:
        self.ledger_id = b["ledger_id"]
        wanted = (self.owner, self.role, self.terms.keys[self.owner], self.terms.simulated)
        if (b["owner"], b["role"], b["key"], b["simulated"]) != wanted:
            raise Bad("genesis", f"owner, role, key and simulated are not {self.owner}'s in this charter")

    def _charter(self, _: Entry, b: dict[str, Any]) -> None:
        self.recorded = True
        if b["name"] != self.terms.name:
            raise Bad("terms", "another name than the charter's")

    def _recovered(self, entry: Entry, b: dict[str, Any]) -> None:
        what = f"a torn last line of {b['torn_bytes']} bytes was cut off after a crash"
        self.report.warn("recovered", self.file, entry.line, what)

    def _agreed(self, budget: Budget) -> None:
        if (budget.epsilon, budget.delta) != (self.terms.epsilon, self.terms.delta):
            raise Bad("budget", f"not the charter's epsilon {self.terms.epsilon} and delta {self.terms.delta}")

    def _cost(self, budget: Budget | None, history: History, tight: bool = True) -> float:
        """Least epsilon known for what the charter fixed in advance, at its delta; 0 when it agrees to no bound.

        What a gate's filter admits is never above the charter's: the plain bounds and its own filter are looked at first.
        """
        if self.terms.epsilon is None or self.terms.delta is None or not history:
            return 0.0
        cost = filter_epsilon(budget.at(self.terms.epsilon, self.terms.delta), history) if budget else math.inf
        if cost > self.terms.epsilon:
            plain = _plain(history, self.terms.delta)[0]
            cost = min(cost, self.report.odometer.read(history, self.terms.delta).epsilon if tight else plain, plain)
        return cost

    def _too_dear(self, cost: float) -> bool:
        return self.terms.epsilon is not None and cost > self.terms.epsilon * (1 + SLACK)

    def _not_expired(self, entry: Entry) -> None:
        if datetime.fromisoformat(str(entry.time)) >= datetime.fromisoformat(self.terms.expires):
            raise Bad("expired", "after the charter expired")


REQUEST: dict[str, Check] = {"request_id": _id, "request_sha256": _hex, "run_id": _id}
COHORT: dict[str, Check] = {"run_id": _id, "round": lambda v: _whole(v, 1), "purpose": _is("train", "evaluate")}
BUDGET: dict[str, Check] = {"unit": _is("record"), "adjacency": _is("add-or-remove-one"), "budget": _object}
DEBIT: dict[str, Check] = {
    "event": _object,
    "clip_norm": _or_null(_is_real),
    "declared_records": lambda v: _whole(v, 1),
}


def _masked(value: Any) -> bool:
    return bool(_fields(value, "masked", {"attempt": _whole, "agreement": _hex}))


def _names(value: Any) -> bool:
    """Different names, sorted."""
    return isinstance(value, list) and all(map(_text, value)) and value == sorted(set(value))


def _held_out(value: Any) -> bool:
    _fields(value, "held_out", {"kind": _is("public", "private", "none"), "commitment": _or_null(_hex)})
    return bool((value["kind"] == "none") == (value["commitment"] is None))


def _day(value: Any) -> bool:
    try:
        return isinstance(value, str) and date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


def _declared(value: Any) -> bool:
    checks = {
        "kind": _is("first", "version", "overlap", "disjoint"),
        "of": _or_null(_short_hex),
        "cutoff": _or_null(_day),
    }
    _fields(value, "declared", checks)
    kind, of, cutoff = value["kind"], value["of"], value["cutoff"]
    return (kind in ("version", "overlap")) == (of is not None) and (kind == "disjoint") == (cutoff is not None)


@dataclass
class Account:
    """The budget of one lineage. What is held is kept apart for this charter and for the others."""

    budget: Budget | None = None
    agreed: dict[str, Any] | None = None  # the budget's fields
    budget_line: int = 0
    budget_own: bool = False  # it came with this charter
    debited: Total | None = None  # with the budget: running sums of what was debited,
    charged: Total | None = None  # and of what was debited or is held
    pools: dict[bool, Counter[Event]] = field(default_factory=lambda: {True: Counter(), False: Counter()})
    debits: list[tuple[dict[str, Any], Event, bool]] = field(default_factory=list)  # point, event, of this charter
    unbounded: int | None = None  # line of the first unprotected debit
    used: bool = False  # under this charter

    def spent(self, own: bool | None = None) -> Counter[Kind]:
        """All that was debited, or only under this charter or the others."""
        found: Counter[Kind] = Counter()
        for _, event, of_this in self.debits:
            if own in (None, of_this):
                _charge(found, event)
        return found

    def fix(self, budget: Budget) -> None:
        """The budget, and what was taken before it (held without protection, or wrongly)."""
        self.budget, self.debited, self.charged = budget, Total(budget), Total(budget)
        for (q, sigma), steps in self.spent().items():
            self.debited.add((q, sigma, steps))
            self.charged.add((q, sigma, steps))
        for pool in self.pools.values():
            for event, count in pool.items():
                self.charged.add(event, count)

    def take(self, event: Event, count: int, own: bool) -> None:
        """Hold, or (count below 0) free."""
        self.pools[own][event] += count
        if self.charged:
            self.charged.add(event, count)


@dataclass
class Hold:
    """A run's reservation under this charter."""

    lineage: str
    dataset: str
    plan: list[dict[str, Any]]
    plan_sha256: str
    left: dict[str, tuple[int, Event]]  # purpose -> (count, event)
    open: bool = True


@dataclass
class Act:
    """Something a partner did for a request."""

    line: int
    body: dict[str, Any]


Attempt = tuple[str, int, int]  # run, round, attempt

CHARGING = ("dataset", "budget", "hold", "debit", "release")


def _planned(plan: list[dict[str, Any]]) -> list[list[Any]]:
    """A plan as the header of its hold has it."""
    return [[item["event"], item["count"]] for item in plan]


def _charge(spent: Counter[Kind], event: Event, times: int = 1) -> None:
    if event is not None and times:
        spent[event[0], event[1]] += event[2] * times


def _history(spent: Mapping[Kind, int]) -> History:
    return tuple(sorted(spent.items()))


class Partner(Book):
    """A partner's ledger: hold, debit, commit."""

    role = "partner"
    events: ClassVar[dict[str, dict[str, Check]]] = {
        "dataset": {
            "dataset": _short_hex,
            "lineage": _short_hex,
            "task": _text,
            "commitment": _hex,
            "held_out": _held_out,
            "declared": _declared,
        },
        "budget": BUDGET | {"lineage": _short_hex},
        "hold": REQUEST | {"dataset": _short_hex, "plan": _list, "plan_sha256": _hex, "software": _text},
        "debit": REQUEST | COHORT | DEBIT | {"dataset": _short_hex, "plan_sha256": _hex},
        "commit": REQUEST | {"round": _whole, "reply_sha256": _hex},
        "public": REQUEST | {"round": _whole, "reply_sha256": _hex},
        "survivors": REQUEST
        | {"round": lambda v: _whole(v, 1), "attempt": _whole, "agreement": _hex, "survivors": _names},
        "refuse": REQUEST | {"round": _or_null(lambda v: type(v) is int), "reason": _text, "detail": _text},
        "release": {"run_id": _id, "why": _is("closed", "expired", "cancelled")},
        "restored": {"length": lambda v: _whole(v, 1)},
    }
    optional: ClassVar[dict[str, dict[str, Check]]] = {"debit": {"masked": _masked}}
    of_no_charter: ClassVar[set[str]] = Book.of_no_charter | {"dataset", "restored"}

    def __init__(self, report: Report, terms: Terms, owner: str) -> None:
        super().__init__(report, terms, owner, f"partners/{owner}/ledger.jsonl")
        self.datasets: dict[str, dict[str, Any]] = {}
        self.accounts: dict[str, Account] = {}
        self.others = 0  # entries that may be another charter's acceptance
        self.known: set[Kind] = set()  # different events, held or debited
        self.holds: dict[str, Hold] = {}
        kinds = ("hold", "debit", "commit", "public", "survivors")
        self.acts: dict[str, dict[str, Act]] = {kind: {} for kind in kinds}  # by request
        self.attempts: dict[Attempt, Act] = {}  # debits under secure aggregation
        self.agreements: dict[str, Attempt] = {}  # what attempt each is of
        self.lists: dict[str, list[str]] = {}  # of survivors, by agreement
        self.refusals: list[Act] = []
        self.refused: set[tuple[str, str, str, str]] = set()
        self.rounds: set[tuple[str, int]] = set()

    # what headers say

    def _header(self, entry: Entry) -> None:
        if entry.privacy is None:
            self.others += not entry.shown
            return
        kinds = set(entry.privacy) - {"lineage"}
        lineage, kind = entry.privacy.get("lineage"), next(iter(kinds), None)
        if len(kinds) != 1 or not _short_hex(lineage):
            raise Bad("unknown", f"a privacy event of an unknown form: {_show(entry.privacy)}")
        if kind == "open":
            self._open(str(lineage), entry.privacy["open"])
            return
        if kind not in ("budget", "hold", "debit", "release"):
            raise Bad("unknown", f"a privacy event of an unknown kind: {_show(kind)}")
        account, own = self.accounts.get(str(lineage)), entry.charter == self.terms.sha256
        if account is None:
            raise Bad("lineage", "of a lineage that was never opened")
        if kind == "budget":
            self._fixes(entry, account, entry.privacy["budget"], own)
        elif kind == "debit":
            self._takes(entry, account, _event(entry.privacy["debit"]), own)
        elif kind == "hold":
            self._holds(account, _counted(entry.privacy["hold"]), own)
        else:
            self._frees(account, _counted(entry.privacy["release"]), own)

    def _open(self, lineage: str, how: object) -> None:
        if how not in ("first", "disjoint"):
            raise Bad("unknown", f"a lineage that opens as {_show(how)}")
        if lineage in self.accounts:
            raise Bad("lineage", "this lineage was opened before")
        first = not self.accounts
        self.accounts[lineage] = Account()
        if (how == "first") != first:
            raise Bad(
                "lineage", f"opens as {how}: the first lineage of a ledger is 'first', every later one 'disjoint'"
            )

    def _fixes(self, entry: Entry, account: Account, value: Any, own: bool) -> None:
        budget = Budget.parse(value)
        if account.budget is not None:
            raise Bad("budget", "a second budget: it is fixed when it is created")
        account.fix(budget)
        account.agreed, account.budget_line, account.budget_own = value, entry.line, own

    def _holds(self, account: Account, events: list[tuple[Event, int]], own: bool) -> None:
        for event, count in events:
            self._remember(event)
            account.take(event, count, own)
        if not own and not self.others:
            raise Bad("hidden", "a hold, before any other charter was accepted: it must be shown")
        if any(event is None for event, _ in events):
            return  # no protection, by the charter's word: epsilon is unbounded and no filter admits or refuses it
        if account.budget is None or account.charged is None:
            raise Bad("no_budget", "no budget can pay for it: none set")
        if account.unbounded:
            raise Bad("no_budget", "no budget can pay for it: an unprotected round came before")
        needed = account.charged.epsilon()
        if needed > account.budget.epsilon * (1 + SLACK):
            cap = f"cap {account.budget.epsilon:g}"
            raise Bad("over_budget", f"the filter does not admit it: epsilon {needed:.6g} with all held, {cap}")

    def _takes(self, entry: Entry, account: Account, event: Event, own: bool) -> None:
        self._remember(event)
        if held := account.pools[own][event] > 0:
            account.pools[own][event] -= 1
        elif account.charged:
            account.charged.add(event)  # what was held for it stands in the sums already
        if account.debited:
            account.debited.add(event)
        if event is None:
            account.unbounded = account.unbounded or entry.line
        spent = account.debited.epsilon() if account.debited and not account.unbounded else None
        point: dict[str, Any] = {"entry": entry.line, "time": entry.time, "run": None, "round": None}
        point |= {"charter": "this" if own else "other", "epsilon_filter": spent, "epsilon": None}
        account.debits.append((point, event, own))
        if not held and not own and account.pools[True][event] > 0:
            raise Bad("hidden", "a debit that only a hold of this charter covers: it must be shown")
        if not held:
            raise Bad("not_held", "a debit of what is not held")

    def _frees(self, account: Account, events: list[tuple[Event, int]], own: bool) -> None:
        for event, count in events:
            there = min(count, account.pools[own][event])
            account.take(event, -there, own)
            if there < count:
                raise Bad("not_held", "releases what is not held")

    def _remember(self, event: Event) -> None:
        if event is not None:
            if event[:2] not in self.known and len(self.known) >= MAX_EVENTS:
                raise Bad("more", f"more than {MAX_EVENTS} different events in one ledger")
            self.known.add(event[:2])

    # what bodies say

    def _body(self, entry: Entry) -> None:
        if entry.shown and entry.type not in CHARGING and entry.privacy is not None:
            self.wrong("privacy_differs", entry.line, f"{entry.type[:40]}: charges nothing, but its header does")
        super()._body(entry)

    def _charges(self, entry: Entry, lineage: object, event: dict[str, Any] | None) -> None:
        """Return when the header says just this."""
        said = None if event is None else {"lineage": lineage} | event
        if _bytes(entry.privacy) != _bytes(said):
            raise Bad("privacy_differs", f"its header says {_show(entry.privacy)}, by its body it is {_show(said)}")

    def _foreign(self, entry: Entry, b: dict[str, Any]) -> None:
        self.others += 1
        if entry.type in ("budget", "hold", "debit"):  # of which lineage, and what is left, only its other entries tell
            value = _planned(b["plan"]) if entry.type == "hold" else b["event" if entry.type == "debit" else "budget"]
            self._charges(entry, (entry.privacy or {}).get("lineage"), {entry.type: value})

    def _act(self, entry: Entry) -> None:
        if entry.data["request_id"] in self.acts[entry.type]:
            raise Bad("repeated", "the same request twice")
        self.acts[entry.type][entry.data["request_id"]] = Act(entry.line, entry.data)

    def _dataset(self, entry: Entry, b: dict[str, Any]) -> None:
        declared = b["declared"]
        known, of = b["dataset"] in self.datasets, self.datasets.get(str(declared["of"]))
        before = list(self.datasets.values())
        self.datasets.setdefault(b["dataset"], b | {"day": str(entry.time)[:10], "line": entry.line})
        opens = declared["kind"] in ("first", "disjoint")
        self._charges(entry, b["lineage"], {"open": declared["kind"]} if opens else None)
        if known:
            raise Bad("repeated", "this data set was registered before")
        if not opens and (of is None or of["lineage"] != b["lineage"]):
            raise Bad(
                "lineage", f"declared a {declared['kind']} of a data set that is not in its lineage, or not there"
            )
        if any(one["lineage"] != b["lineage"] and one["commitment"] == b["commitment"] for one in before):
            raise Bad("lineage", "the rows of a data set of another lineage")
        if declared["kind"] == "disjoint":
            latest, cutoff = max((one["day"] for one in before), default=""), str(declared["cutoff"])
            if cutoff < latest:
                raise Bad(
                    "lineage", f"rows collected from {cutoff} on, but an earlier data set was registered on {latest}"
                )
            if cutoff > str(entry.time)[:10]:
                raise Bad("lineage", f"rows collected from {cutoff} on, and that day is yet to come")

    def _budget(self, entry: Entry, b: dict[str, Any]) -> None:
        self._charges(entry, b["lineage"], {"budget": b["budget"]})
        self._agreed(Budget.parse(b["budget"]))

    def _hold(self, entry: Entry, b: dict[str, Any]) -> None:
        plan, dataset = _plan(b["plan"]), self.datasets.get(b["dataset"])
        if b["run_id"] in self.holds:
            raise Bad("repeated", "this run was held before")
        lineage = str((dataset or entry.privacy or {}).get("lineage"))
        self.holds[b["run_id"]] = Hold(lineage, b["dataset"], b["plan"], b["plan_sha256"], plan)
        if lineage in self.accounts:
            self.accounts[lineage].used = True
        self._act(entry)
        if dataset is None:
            raise Bad("hidden", "on a data set that no entry shown here registers")
        self._charges(entry, lineage, {"hold": _planned(b["plan"])})
        self.terms.check_plan(plan)
        self._not_expired(entry)
        if b["plan_sha256"] != _sha256(_bytes(b["plan"])):
            raise Bad("terms", "plan_sha256 is not that of its plan")

    def _debit(self, entry: Entry, b: dict[str, Any]) -> None:
        event, hold = _event(b["event"]), self.holds.get(b["run_id"])
        dataset = self.datasets.get(b["dataset"], {})
        self._charges(entry, dataset.get("lineage"), {"debit": b["event"]})
        self.accounts[dataset["lineage"]].debits[-1][0].update(run=b["run_id"], round=b["round"])
        if hold is None:
            raise Bad("run_order", "no hold for its run")
        count, planned = hold.left.get(b["purpose"], (0, None))
        within = hold.open and count > 0 and planned == event
        if within:
            hold.left[b["purpose"]] = (count - 1, planned)
        self._act(entry)
        self._attempt(entry, b)
        if not hold.open:
            raise Bad("run_order", "after its run was released")
        if (b["plan_sha256"], dataset["lineage"]) != (hold.plan_sha256, hold.lineage):
            raise Bad("terms", "another plan or lineage than its hold's")
        if not within:
            raise Bad("not_held", "not in its hold: another event than planned, or more of them")
        self._not_expired(entry)
        self.terms.check_clip(b["purpose"], b["clip_norm"])
        if b["round"] > self.terms.rounds:
            raise Bad("terms", f"round {b['round']}, the charter has {self.terms.rounds}")
        if b["declared_records"] != self.terms.declared[self.owner]:
            raise Bad("terms", "declared_records is not the charter's")

    def _attempt(self, entry: Entry, b: dict[str, Any]) -> None:
        """Which attempt at secure aggregation a debit is for: each is debited once, and has an agreement of its own."""
        secure, masked = self.terms.secure, b.get("masked")
        if (masked is None) == (secure is not None and b["purpose"] == "train"):
            what = (
                "names an attempt at secure aggregation that is none"
                if masked
                else "of no attempt at secure aggregation"
            )
            self.wrong("terms", entry.line, f"debit: {what}")
        if masked is None or secure is None or b["purpose"] != "train":
            return
        at = (b["run_id"], b["round"], masked["attempt"])
        if masked["attempt"] > secure.retries:
            self.wrong(
                "terms", entry.line, f"debit: attempt {masked['attempt']}, the charter has {secure.retries} retries"
            )
        if at in self.attempts or self.agreements.setdefault(masked["agreement"], at) != at:
            what = f"attempt {masked['attempt']} of round {b['round']} was debited before, or its agreement for another"
            self.wrong("repeated", entry.line, f"debit: {what}")
        self.attempts.setdefault(at, Act(entry.line, b))

    def _survivors(self, entry: Entry, b: dict[str, Any]) -> None:
        names, hold = b["survivors"], self.holds.get(b["run_id"])
        # The second list is what opens single vectors, so it is said whatever else is wrong with it.
        if self.lists.setdefault(b["agreement"], names) != names:
            self.wrong("two_lists", entry.line, "survivors: another list was signed before under the same agreement")
        self._act(entry)
        if self.terms.secure is None:
            raise Bad("terms", "the charter agrees to no secure aggregation")
        debit = self.attempts.get((b["run_id"], b["round"], b["attempt"]))
        sent = debit is not None and debit.body["masked"]["agreement"] == b["agreement"]
        if debit is None or not sent or debit.body["request_id"] not in self.acts["commit"]:
            raise Bad("run_order", "no vector of the same run, round, attempt and agreement was committed")
        if hold is None or not hold.open:
            raise Bad("run_order", "no open hold for its run")
        if self.owner not in names or not set(names) <= set(self.terms.declared):
            raise Bad("terms", f"a list without {self.owner}, or with somebody who is no partner")
        if len(names) < self.terms.quorum:
            raise Bad("terms", f"{len(names)} survivors, agreed are {self.terms.quorum} or more")

    def attempt_of(self, act: Act) -> int | None:
        """The attempt at secure aggregation that an act is of."""
        debit = self.acts["debit"].get(act.body["request_id"], act)
        found: int | None = act.body.get("attempt", debit.body.get("masked", {}).get("attempt"))
        return found

    def _commit(self, entry: Entry, b: dict[str, Any]) -> None:
        debit = self.acts["debit"].get(b["request_id"])
        if debit is None or any(debit.body[k] != b[k] for k in ("request_sha256", "run_id", "round")):
            raise Bad("run_order", "no debit of the same request, run and round")
        self._act(entry)
        if debit.body["purpose"] == "train":
            self.rounds.add((b["run_id"], b["round"]))

    def _public(self, entry: Entry, b: dict[str, Any]) -> None:
        hold = self.holds.get(b["run_id"])
        if hold is None or not hold.open:
            raise Bad("run_order", "no open hold for its run")
        self._act(entry)
        if self.terms.evaluation != "public" or not 1 <= b["round"] <= self.terms.rounds:
            raise Bad("terms", "the charter agrees to no public evaluation of this round")
        if (kind := self.datasets[hold.dataset]["held_out"]["kind"]) != "public":
            raise Bad("terms", f"its data set's held-out rows are not public: {kind}")

    def _refuse(self, entry: Entry, b: dict[str, Any]) -> None:
        self.refusals.append(Act(entry.line, b))
        self.refused.add((b["request_id"], b["request_sha256"], b["run_id"], b["reason"]))

    def _release(self, entry: Entry, b: dict[str, Any]) -> None:
        hold = self.holds.get(b["run_id"])
        if hold is None or not hold.open:
            raise Bad("run_order", "no open hold of that run")
        hold.open = False
        left = [[item["event"], hold.left[item["purpose"]][0]] for item in hold.plan]
        self._charges(entry, hold.lineage, {"release": [pair for pair in left if pair[1]]})

    def _restored(self, entry: Entry, b: dict[str, Any]) -> None:
        if b["length"] >= entry.line:
            raise Bad("run_order", f"names {b['length']} entries, {entry.line - 1} stand before it")
        what = f"the {b['length']} entries before it came from a backup"
        self.report.warn("restored", self.file, entry.line, what)

    # what only the end shows

    def used(self) -> dict[str, Account]:
        """The lineages that were held under this charter."""
        return {lineage: account for lineage, account in self.accounts.items() if account.used}

    def finish(self) -> None:
        """What only the end shows."""
        for request, debit in self.acts["debit"].items():
            if request not in self.acts["commit"] and self.whole:
                what = "a debit without a commit: nothing left, it stays charged"
                self.report.warn("uncommitted", self.file, debit.line, what)
        for run_id, hold in self.holds.items():
            if hold.open and self.whole:
                self.report.warn("unreleased", self.file, None, f"the hold of run {run_id} was never released")
        for account in self.accounts.values():
            if account.budget and account.debited and not account.unbounded:
                spent = account.debited.epsilon()
                if spent > account.budget.epsilon * (1 + SLACK):
                    what = f"spent epsilon {spent:.6g}, more than the cap {account.budget.epsilon:g}"
                    self.wrong("over_budget", None, what)
        for lineage, account in self.used().items():
            for one in self.datasets.values():
                if one["lineage"] == lineage and one["declared"]["kind"] == "disjoint":
                    what = (
                        f"a budget of its own for rows that are declared collected from {one['declared']['cutoff']} on"
                    )
                    self.report.warn("disjoint", self.file, one["line"], what)
            self._finish_lineage(account)

    def _finish_lineage(self, account: Account) -> None:
        if account.budget and not account.budget_own:
            what = f"the budget came with another charter: epsilon {account.budget.epsilon!r} at delta "
            self.report.warn("other_charter", self.file, account.budget_line, what + repr(account.budget.delta))
        if others := [point["entry"] for point, _, own in account.debits if not own]:
            what = f"debits under other charters on the same lineage ({len(others)}): charged, their terms were not checked"
            self.report.warn("other_charter", self.file, others[0], what)
        weaker = [
            (event.colluding, point["entry"])
            for point, event, own in account.debits
            if not own and isinstance(event, Shared) and self.terms.undone_by(event.colluding)
        ]
        if weaker:
            what = f"noise that partners share under another charter: epsilon over all holds against {_adversary(min(weaker)[0])}"
            self.report.warn("other_charter", self.file, min(weaker)[1], what)
        own = [(point["entry"], event) for point, event, own in account.debits if own]
        few = len(account.spent(own=True)) <= 16

        def cost(debits: int) -> float:
            spent: Counter[Kind] = Counter()
            for _, event in own[:debits]:
                _charge(spent, event)
            return self._cost(account.budget, _history(spent), few or debits == len(own))

        total = cost(len(own))
        if not self._too_dear(total):
            return
        fits, exceeds = 0, len(own)  # how many debits fit, and how many do not: cost only grows
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            fits, exceeds = (fits, middle) if self._too_dear(cost(middle)) else (middle, exceeds)
        what = f"with this debit, epsilon under the charter is above its {self.terms.epsilon:g} at delta "
        self.wrong("over_charter", own[exceeds - 1][0], f"{what}{self.terms.delta:g}; all its debits cost {total:.6g}")


At = tuple[int, str, int | None]  # round, purpose, attempt at secure aggregation


@dataclass
class Run:
    """A run as the coordinator recorded it."""

    line: int
    asks: dict[At, dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[At, dict[str, dict[str, str | None]]] = field(default_factory=dict)  # partner -> outcome
    reveals: dict[str, set[str]] = field(default_factory=dict)  # request -> its hashes
    rounds: list[dict[str, Any]] = field(default_factory=list)
    close: dict[str, Any] | None = None
    closed_at: int = 0

    def ok(self, at: At) -> set[str]:
        """Whose answer was good."""
        return {name for name, outcomes in self.outcomes.get(at, {}).items() if "ok" in outcomes}

    def last(self, number: int) -> int | None:
        """The newest attempt at a round."""
        return max((a for n, p, a in self.asks if (n, p) == (number, "train") and a is not None), default=None)


class Runs(Book):
    """What a coordinator's and a population's ledger share: runs, their rounds and their ends."""

    def __init__(self, report: Report, terms: Terms) -> None:
        super().__init__(report, terms, terms.coordinator, "coordinator/ledger.jsonl")
        self.runs: dict[str, Run] = {}

    running: ClassVar[dict[str, dict[str, Check]]] = {
        "run": {"run_id": _id},
        "round": {
            "run_id": _id,
            "round": lambda v: _whole(v, 1),
            "model_sha256": _hex,
            "partners": _or_null(lambda v: isinstance(v, list) and all(map(_text, v))),
            "metrics": _metrics,
        },
        "close": {
            "run_id": _id,
            "rounds": _whole,
            "model_sha256": _or_null(_hex),
            "why": _is("completed", "refused"),
        },
    }

    def _open(self, b: dict[str, Any]) -> Run:
        run = self.runs.get(b["run_id"])
        if run is None or run.close is not None:
            raise Bad("record", "no open run of that name")
        if "round" in b and b["round"] > self.terms.rounds:
            raise Bad("terms", f"round {b['round']}, the charter has {self.terms.rounds}")
        return run

    def _run(self, entry: Entry, b: dict[str, Any]) -> None:
        if b["run_id"] in self.runs:
            raise Bad("repeated", "a run of that name exists")
        self.runs[b["run_id"]] = Run(entry.line)

    def _round(self, _: Entry, b: dict[str, Any]) -> None:
        run = self._open(b)
        if b in run.rounds[-1:]:
            return  # the same again, after a crash
        if b["round"] != len(run.rounds) + 1:
            raise Bad("record", "not the next round, nor the same again")
        run.rounds.append(b)
        self._folded(run, b)

    def _folded(self, run: Run, b: dict[str, Any]) -> None:
        raise NotImplementedError

    def _close(self, entry: Entry, b: dict[str, Any]) -> None:
        run = self._open(b)
        run.close, run.closed_at = b, entry.line
        if (b["rounds"], b["model_sha256"]) != (
            len(run.rounds),
            run.rounds[-1]["model_sha256"] if run.rounds else None,
        ):
            raise Bad("record", "not the number of rounds and the model of the last one")
        if (b["why"] == "completed") != (b["rounds"] == self.terms.rounds):
            raise Bad("record", f"{b['why']} at round {b['rounds']} of {self.terms.rounds}")


DONE = ("ok", "failed")  # outcomes of work that the partner did and committed a reply to
PURPOSES = ("open", "train", "agree", "reveal", "evaluate")
MASKED = ("train", "agree", "reveal")  # the exchanges of an attempt at secure aggregation


class Coordinator(Runs):
    """The coordinator's ledger: what was asked and what came back."""

    role = "coordinator"
    events: ClassVar[dict[str, dict[str, Check]]] = Runs.running | {
        "ask": COHORT | {"round": _whole, "purpose": _is(*PURPOSES), "requests": lambda v: isinstance(v, dict) and v},
        "answers": COHORT | {"round": _whole, "purpose": _is(*PURPOSES), "replies": lambda v: isinstance(v, dict)},
    }
    optional: ClassVar[dict[str, dict[str, Check]]] = {"ask": {"attempt": _whole}, "answers": {"attempt": _whole}}

    def _at(self, b: dict[str, Any]) -> At:
        secure, attempt = self.terms.secure, b.get("attempt")
        if secure is None and b["purpose"] in ("agree", "reveal"):
            raise Bad("terms", "the charter agrees to no secure aggregation")
        if (attempt is None) == (secure is not None and b["purpose"] in MASKED):
            raise Bad("record", f"to {b['purpose']} {'without' if attempt is None else 'with'} an attempt")
        if secure and attempt is not None and attempt > secure.retries:
            raise Bad("terms", f"attempt {attempt}, the charter has {secure.retries} retries")
        return b["round"], b["purpose"], attempt

    def _ask(self, _: Entry, b: dict[str, Any]) -> None:
        run, at = self._open(b), self._at(b)
        if (b["round"] == 0) != (b["purpose"] == "open"):
            raise Bad("record", "round 0, and only round 0, opens the run")
        if b["purpose"] == "evaluate" and self.terms.evaluation == "none":
            raise Bad("terms", "the charter agrees to no evaluation")
        if unknown := set(b["requests"]) - set(self.terms.declared):
            raise Bad("record", f"asked of {_show(min(unknown))}, who is no partner")
        for request in b["requests"].values():
            _fields(request, "request", {"request_id": _id, "request_sha256": _hex})
        before = run.asks.setdefault(at, b["requests"])
        if at[1] == "reveal":  # says who signed the list: asked again after a crash, these may be others
            for request in b["requests"].values():
                run.reveals.setdefault(request["request_id"], set()).add(request["request_sha256"])
            before, again = ({n: r["request_id"] for n, r in one.items()} for one in (before, b["requests"]))
        else:
            again = b["requests"]
        if before != again:
            raise Bad("record", "asked again with other requests")
        if self.terms.secure and at[2] is not None:
            self._attempted(run, at, set(b["requests"]), self.terms.secure)

    def _attempted(self, run: Run, at: At, names: set[str], secure: Secure) -> None:
        """What may be asked in an attempt, and of whom, after what was answered in it before."""
        number, purpose, attempt = at
        if purpose == "train":
            again = sum(run.last(n) or 0 for n in {n for n, p, _ in run.asks if p == "train"})
            if again > secure.retries:
                raise Bad(
                    "terms", f"{again} attempts beyond the first in this run, the charter has {secure.retries} retries"
                )
        elif purpose == "agree":
            if strangers := names - run.ok((number, "train", attempt)):
                raise Bad(
                    "record", f"a list of survivors with {_show(min(strangers))}, who sent no vector in this attempt"
                )
            if len(names) < self.terms.quorum:
                raise Bad("record", f"{len(names)} survivors, agreed are {self.terms.quorum} or more")
        else:
            if names != set(run.asks.get((number, "agree", attempt), {})):
                raise Bad("record", "to open a sum asked of others than were asked to sign who is in it")
            if len(signed := run.ok((number, "agree", attempt))) < secure.threshold:
                raise Bad("record", f"to open a sum whose list {len(signed)} signed, needed are {secure.threshold}")

    def _answers(self, _: Entry, b: dict[str, Any]) -> None:
        run, at = self._open(b), self._at(b)
        asked = run.asks.get(at)
        if asked is None:
            raise Bad("record", "answers to what was not asked")
        for name, reply in b["replies"].items():
            _fields(reply, "reply", {"request_id": _id, "outcome": _text, "reply_sha256": _or_null(_hex)})
            outcome = reply["outcome"]
            if reply["request_id"] != asked.get(name, {}).get("request_id"):
                raise Bad("record", f"an answer of {_show(name)} to another request than was asked")
            if outcome not in ("ok", "failed", "timeout", "invalid") and not outcome.startswith("refused: "):
                raise Bad("layout", f"outcome {_show(outcome)}")
            if outcome == "failed" and b["purpose"] not in ("train", "evaluate"):
                raise Bad("record", f"to {b['purpose']} is done or refused: no work can fail")
            if (reply["reply_sha256"] is None) != (outcome in ("timeout", "invalid")):
                raise Bad("record", f"outcome {_show(outcome)} with reply {_show(reply['reply_sha256'])}")
            seen = run.outcomes.setdefault(at, {}).setdefault(name, {})
            same = seen.setdefault(outcome, reply["reply_sha256"]) == reply["reply_sha256"]
            if not same and outcome in DONE and b["purpose"] != "reveal":  # asked another way, answered another way
                raise Bad("record", f"{name} answered the same request twice, differently")

    def _folded(self, run: Run, b: dict[str, Any]) -> None:
        partners, attempt = b["partners"], run.last(b["round"])
        if partners is None or len(set(partners)) != len(partners) or len(partners) < self.terms.quorum:
            raise Bad("record", f"a round counts with {self.terms.quorum} different partners or more")
        outcomes = run.outcomes.get((b["round"], "train", attempt), {})
        if strangers := [name for name in partners if "ok" not in outcomes.get(name, {})]:
            raise Bad("record", f"folds an update of {_show(strangers[0])}, who gave no ok answer")
        if failed := [name for name in partners if "failed" in outcomes[name]]:
            raise Bad("record", f"folds an update of {_show(failed[0])}, whose answer was that it failed")
        if self.terms.secure:
            if set(partners) != set(run.asks.get((b["round"], "agree", attempt), {})):
                raise Bad("record", "folds a sum over others than its last attempt asked to sign who is in it")
            if len(opened := run.ok((b["round"], "reveal", attempt))) < self.terms.secure.threshold:
                needed = self.terms.secure.threshold
                raise Bad("record", f"folds a sum that {len(opened)} helped to open, needed are {needed}")


def _cross_check(report: Report, coordinator: Coordinator, partners: dict[str, Partner]) -> None:
    """The coordinator's and each partner's ledger name the same requests and replies, both ways."""
    private = coordinator.terms.evaluation == "private"
    # What an answer leaves in the partner's ledger. To open a sum leaves nothing: whose it may be was signed before.
    kinds = {"open": "hold", "train": "commit", "evaluate": "commit" if private else "public", "agree": "survivors"}
    # (partner, request) -> run, round, purpose, attempt, hash
    asked: dict[tuple[str, str], tuple[str, int, str, int | None, str]] = {}
    for run_id, run in coordinator.runs.items():
        for (number, purpose, attempt), requests in run.asks.items():
            kind = kinds.get(purpose)
            where = f"{purpose} of round {number}{f', attempt {attempt}' if attempt else ''}, run {run_id}"
            for name, request in requests.items():
                partner, request_id, digest = partners[name], request["request_id"], request["request_sha256"]
                mine = (run_id, number, purpose, attempt, digest)
                if asked.setdefault((name, request_id), mine) != mine:
                    report.wrong(
                        "record", coordinator.file, run.line, f"one request id of {name} for two requests: {where}"
                    )
                for outcome, reply in run.outcomes.get((number, purpose, attempt), {}).get(name, {}).items():
                    if not partner.whole or outcome in ("timeout", "invalid"):
                        continue
                    if outcome not in DONE:
                        reason = outcome.removeprefix("refused: ")
                        digests = run.reveals[request_id] if purpose == "reveal" else {digest}
                        if not any((request_id, one, run_id, reason) in partner.refused for one in digests):
                            what = f"no refusal for {_show(reason)} to {where}"
                            report.wrong("not_done", partner.file, None, what)
                    elif kind is None:
                        continue
                    elif (act := partner.acts[kind].get(request_id)) is None:
                        what = f"no {CALLED.get(kind, kind)} for the {outcome} answer to {where}"
                        report.wrong("not_done", partner.file, None, what)
                    elif "reply_sha256" in act.body and act.body["reply_sha256"] != reply:
                        report.wrong(
                            "not_done", partner.file, act.line, f"another reply than the {outcome} answer to {where}"
                        )
    if not coordinator.whole:
        return  # what it asked is not known to the end
    for name, partner in partners.items():
        for kind, act in ((kind, act) for kind, acts in partner.acts.items() for act in acts.values()):
            ask, called = asked.get((name, act.body["request_id"])), CALLED.get(kind, kind)
            purposes = [p for p in kinds if kinds[p] == kind or (kind == "debit" and p == act.body["purpose"])]
            of, attempt = (act.body["run_id"], act.body.get("round", 0)), partner.attempt_of(act)
            if ask is None or ask not in [(*of, p, attempt, act.body["request_sha256"]) for p in purposes]:
                report.wrong(
                    "not_asked", partner.file, act.line, f"a {called} that the coordinator's ledger did not ask for"
                )
            elif kind != "debit":
                seen = coordinator.runs[ask[0]].outcomes.get(ask[1:4], {}).get(name, {})
                refusals = [one.removeprefix("refused: ") for one in seen if one.startswith("refused: ")]
                # Who was asked again may have refused before (a site that paused) or after (a run that is over), and said so.
                said = act.body["request_id"], act.body["request_sha256"], act.body["run_id"]
                own = all((*said, reason) in partner.refused for reason in refusals)
                if not set(seen) & set(DONE) and own:
                    report.warn(
                        "unanswered", partner.file, act.line, f"a {called} whose answer the coordinator did not record"
                    )
                elif not set(seen) & set(DONE):
                    report.wrong(
                        "not_asked", partner.file, act.line, f"a {called}, but the coordinator recorded a refusal"
                    )
        for act in partner.refusals:
            if act.body["run_id"] in coordinator.runs and (name, act.body["request_id"]) not in asked:
                report.wrong(
                    "not_asked", partner.file, act.line, "refuses what the coordinator's ledger did not ask for"
                )


CALLED = {"survivors": "list of survivors"}


def _check_attempts(report: Report, coordinator: Coordinator, partners: dict[str, Partner]) -> None:
    """Secure aggregation: whoever took part in an attempt was shown the same one, and signed the same list of whom it sums.

    The agreement is a hash over charter, run, round, attempt, model, and the roster with its keys. Only what is there is compared: a
    ledger that lacks its end contradicts nobody.
    """
    shown: dict[Attempt, tuple[str, str]] = {}  # agreement, and whose ledger has it
    signed: dict[Attempt, tuple[list[str], str]] = {}
    for name, partner in partners.items():
        for at, debit in partner.attempts.items():
            agreement, other = shown.setdefault(at, (debit.body["masked"]["agreement"], name))
            if debit.body["masked"]["agreement"] != agreement:
                what = f"debit: another agreement for attempt {at[2]} of round {at[1]}, run {at[0]}, than {other} was shown"
                report.wrong("lists_differ", partner.file, debit.line, what)
        for act in partner.acts["survivors"].values():
            at = (act.body["run_id"], act.body["round"], act.body["attempt"])
            mine, of = act.body["survivors"], f"for attempt {at[2]} of round {at[1]}, run {at[0]}"
            theirs, other = signed.setdefault(at, (mine, name))
            if mine != theirs:
                report.wrong(
                    "lists_differ", partner.file, act.line, f"survivors: another list {of}, than {other} signed"
                )
            run = coordinator.runs.get(at[0])
            asked = run.asks.get((at[1], "agree", at[2])) if run else None
            if asked is not None and mine != sorted(asked):
                what = f"survivors: another list {of}, than those who were asked to sign it"
                report.wrong("lists_differ", partner.file, act.line, what)


# -- a population: one ledger for every client ---------------------------------------------------------------

Ranges = list[list[int]]
Story = tuple[frozenset[tuple[Event, int]], int, int]  # a client's debits by event, its commits, its rounds


class Population(Runs):
    """The run ledger of a simulation above 100 partners; clients with equal histories are accounted once."""

    role = "population"
    events: ClassVar[dict[str, dict[str, Check]]] = Runs.running | {
        "budget": BUDGET | {"unit": _is("record", "client"), "clients": lambda v: _whole(v, 1)},
        "cohort-hold": {"run_id": _id, "plan": lambda v: isinstance(v, list)},
        "cohort-debit": COHORT | DEBIT | {"clients": lambda v: isinstance(v, list)},
        "cohort-commit": COHORT | {"clients": lambda v: isinstance(v, list)},
    }

    def __init__(self, report: Report, terms: Terms) -> None:
        super().__init__(report, terms)
        self.clients = terms.clients or 0
        self.budget: Budget | None = None
        self.agreed: dict[str, Any] | None = None  # the budget's fields
        self.unbounded: int | None = None
        self.plans: dict[str, dict[str, tuple[int, Event]]] = {}
        # How often each client stands in (kind, run, purpose), as differences between neighbours.
        self.steps: dict[tuple[str, str, str], Counter[int]] = {}
        self.seen: dict[tuple[str, str, int, str], str] = {}  # hash of each debit and commit: a repeat is the same
        self.cohort: dict[tuple[str, str], tuple[int, Ranges]] = {}  # the latest debit of (run, purpose)
        self.committed: Counter[tuple[str, int]] = Counter()  # clients folded in a round
        self.last_debit: int | None = None  # its line

    def _budget(self, _: Entry, b: dict[str, Any]) -> None:
        budget = Budget.parse(b["budget"])
        if self.budget is not None:
            raise Bad("budget", "a second budget: it is fixed when it is created")
        self.budget, self.agreed = budget, b["budget"]
        self._agreed(budget)
        if b["unit"] != self.terms.unit:
            raise Bad("budget", f"of one {b['unit']}, the charter's unit is one {self.terms.unit}")
        if b["clients"] != self.clients:
            raise Bad("budget", f"for {b['clients']} clients, the charter has {self.clients}")

    def _cohort_hold(self, entry: Entry, b: dict[str, Any]) -> None:
        self._open(b)
        plan = _plan(b["plan"])
        if b["run_id"] in self.plans or len(self.plans) >= 100:
            raise Bad("repeated", "this run was held before, or more than 100 runs in one population's ledger")
        earlier = {_history(self.spent(counts)) for counts in self.groups()}
        self.plans[b["run_id"]] = plan
        self.terms.check_plan(plan)
        self._not_expired(entry)
        if any(event is None for _, event in plan.values()):
            return
        if self.budget is None or self.unbounded:
            raise Bad("no_budget", "no budget can pay for it")
        for history in earlier:
            total = Counter(dict(history))
            for count, event in plan.values():
                _charge(total, event, count)
            if filter_epsilon(self.budget, _history(total)) > self.budget.epsilon * (1 + SLACK):
                raise Bad("over_budget", f"the filter does not admit it, cap {self.budget.epsilon:g}")

    def _ranges(self, value: Any) -> Ranges:
        last = -1
        for pair in value:
            if not (isinstance(pair, list) and len(pair) == 2 and all(_whole(n, 0, self.clients - 1) for n in pair)):
                raise Bad("layout", "clients are ranges [first, last] of client numbers")
            if not last < pair[0] <= pair[1]:
                raise Bad("layout", "ranges of clients that overlap or are not in order")
            last = pair[1]
        ranges: Ranges = value
        if self.terms.unit == "client" and ranges != [[0, self.clients - 1]]:
            raise Bad(
                "named",
                "not all clients: a part of them tells who was asked, and each is to be charged for every round",
            )
        return ranges

    def _count(self, kind: str, b: dict[str, Any]) -> bool:
        """Count a cohort once; False when it stands there again after a crash."""
        at, digest = (kind, b["run_id"], b["round"], b["purpose"]), _sha256(_bytes(b))
        if at in self.seen:
            if self.seen[at] != digest:
                raise Bad("repeated", "stands there before for the same run, round and purpose, but differs")
            return False
        self.seen[at] = digest
        steps = self.steps.setdefault((kind, b["run_id"], b["purpose"]), Counter())
        for first, last in b["clients"]:
            steps[first] += 1
            steps[last + 1] -= 1
        return True

    def _cohort_debit(self, entry: Entry, b: dict[str, Any]) -> None:
        event, ranges = _event(b["event"]), self._ranges(b["clients"])
        if event is None:
            self.unbounded = self.unbounded or entry.line
        self._open(b)
        count, planned = self.plans.get(b["run_id"], {}).get(b["purpose"], (0, None))
        if count < 1 or planned != event:
            raise Bad("not_held", "not in the plan that was held")
        self.cohort[b["run_id"], b["purpose"]] = (b["round"], ranges)
        self._count("debit", b)
        self.last_debit = entry.line
        self._not_expired(entry)
        self.terms.check_clip(b["purpose"], b["clip_norm"])
        if b["declared_records"] != self.terms.declared[""]:
            raise Bad("terms", "declared_records is not the charter's")

    def _cohort_commit(self, _: Entry, b: dict[str, Any]) -> None:
        self._open(b)
        ranges = self._ranges(b["clients"])
        number, debited = self.cohort.get((b["run_id"], b["purpose"]), (0, []))
        if number != b["round"]:
            raise Bad("run_order", "no debit of the same run, round and purpose before it")
        at = 0
        for first, last in ranges:
            while at < len(debited) and debited[at][1] < last:
                at += 1
            if at == len(debited) or first < debited[at][0]:
                raise Bad("run_order", f"names clients {first} to {last}, who were not all debited")
        if self._count("commit", b) and b["purpose"] == "train":
            self.committed[b["run_id"], b["round"]] = sum(last - first + 1 for first, last in ranges)

    def _folded(self, run: Run, b: dict[str, Any]) -> None:
        if b["partners"] is not None or self.committed[b["run_id"], b["round"]] < self.terms.least:
            raise Bad("record", f"a round counts with {self.terms.least} committed clients or more")

    def groups(self) -> dict[tuple[int, ...], Ranges]:
        """Clients by how often they stand in each of `steps`, in its order."""
        found: dict[tuple[int, ...], Ranges] = {}
        now = [0] * len(self.steps)
        for first, after in itertools.pairwise(sorted({0, self.clients}.union(*self.steps.values()))):
            now = [n + steps[first] for n, steps in zip(now, self.steps.values(), strict=True)]
            found.setdefault(tuple(now), []).append([first, after - 1])
        return found

    def spent(self, counts: tuple[int, ...]) -> Counter[Kind]:
        """What a client with these counts has spent."""
        spent: Counter[Kind] = Counter()
        for (kind, run_id, purpose), n in zip(self.steps, counts, strict=True):
            if kind == "debit":
                _charge(spent, self.plans[run_id][purpose][1], n)
        return spent

    def finish(self) -> None:
        """What only the end shows."""
        costs = dict[History, float]()
        for counts, ranges in self.groups().items():
            for (kind, run_id, purpose), n in zip(self.steps, counts, strict=True):
                if kind == "debit" and n > self.plans[run_id][purpose][0]:
                    self.wrong(
                        "not_held",
                        None,
                        f"client {ranges[0][0]}: {n} debits for {purpose} in run {run_id}, more than held",
                    )
            if self.budget and not self.unbounded:
                spent = filter_epsilon(self.budget, _history(self.spent(counts)))
                if spent > self.budget.epsilon * (1 + SLACK):
                    self.wrong(
                        "over_budget",
                        None,
                        f"client {ranges[0][0]} spent epsilon {spent:.6g}, cap {self.budget.epsilon:g}",
                    )
            history = _history(self.spent(counts))
            if history not in costs:
                costs[history] = self._cost(self.budget, history)
            if self._too_dear(costs[history]):
                what = f"client {ranges[0][0]}: all debits cost epsilon {costs[history]:.6g}, the charter's is "
                self.wrong(
                    "over_charter", self.last_debit, f"{what}{self.terms.epsilon:g} at delta {self.terms.delta:g}"
                )


# -- who else signed for a ledger ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    """That a ledger had this root at this length: its owner's word, and who else signed it."""

    owner: str
    length: int
    root: str
    signers: tuple[str, ...]  # names, the owner's among them
    file: str
    line: int = 1
    ledger_id: str | None = None  # None: it does not say
    closing: str | None = None  # the run that it closes

    @property
    def source(self) -> str:
        """Where it stands."""
        return f"{self.file}:{self.line}"


class Witnesses:
    """All that was signed of the ledgers beside themselves, compared with the ledgers as they are here."""

    def __init__(self, report: Report, terms: Terms, books: dict[str, Book]) -> None:
        self.report, self.terms, self.books = report, terms, books
        self.names = {key: name for name, key in terms.keys.items()}
        self.statements: dict[str, list[Statement]] = {owner: [] for owner in books}
        self.longer: dict[str, tuple[int, str]] = {}  # owner -> the most entries that it signed for, and where
        self.beyond: dict[str, set[str]] = {owner: set() for owner in books}  # who else signed for more than is here
        self.agreed = dict.fromkeys(books, 0)  # owner -> how much of its ledger is as in a copy
        self.heads: list[dict[str, Any]] = []
        self.closings: list[dict[str, Any]] = []
        self.used = 0  # things that were compared
        self.worthless: list[
            tuple[str, Unreadable]
        ] = []  # what was given and says nothing of this bundle: code of a warning

    # heads

    def read_heads(self, root: Path, file: str, holder: str, label: str, *, given: bool = False) -> None:
        """A file of signed heads.

        Args:
            given: it is not of this bundle, so it may be of another charter, with other people's signatures.
        """
        number = 0
        try:
            for number, line in enumerate(_lines(root, file), start=1):
                try:
                    made = self._head(line, label, number, given)
                except Bad as bad:
                    self._worthless("head", label, number, str(bad), given)
                    continue
                if made is None:
                    self.report.warn("unrelated", label, number, "a head of somebody else's ledger")
                    continue
                self.statements[made.owner].append(made)
                self.report.checked["heads"] += 1
                self.used += 1
                told = {"owner": made.owner, "holder": holder, "length": made.length, "signers": list(made.signers)}
                self.heads.append(told)
        except Bad as bad:
            self._worthless(bad.code, label, None if bad.code == "file" else number + 1, str(bad), given)

    def _worthless(self, code: str, label: str, line: int | None, what: str, given: bool) -> None:
        """Bad evidence in a bundle is a violation; what somebody brought along can do no harm to a bundle by being bad."""
        if given:
            self.report.warn("copy", label, line, what)
        else:
            self.report.wrong(code, label, line, what)

    def _head(self, line: bytes, file: str, number: int, given: bool) -> Statement | None:
        """What a head states; None when it is of nobody's ledger here."""
        payload, made = _envelope(_canonical(line), HEAD_TYPE)
        checks = {"v": _is(1), "owner": _text, "ledger_id": _text, "length": lambda v: _whole(v, 1)}
        p = _fields(_canonical(payload), "head", checks | {"root": _hex})
        keys = [key for key, _ in made]
        # A ledger is its owner's key's; under another charter its name there may be another.
        owner = self.names.get(keys[0]) if keys else None
        if given and (owner is None or owner != p["owner"]):
            return None
        if owner is None or owner != p["owner"] or owner not in self.books or len(set(keys)) != len(keys):
            raise Bad("head", "not signed by its owner first, and by others once each")
        if given:  # who is in another charter vouches for nothing here, and takes nothing away
            made = [one for one in made if one[0] in self.names]
            signers = self._good(HEAD_TYPE, payload, made)
            if owner not in signers:
                raise Bad("head", f"{owner} did not sign it")
            if len(signers) < len(made):
                self.report.warn(
                    "copy", file, number, "somebody else's signature is bad; its owner's is good, and counts"
                )
            return Statement(owner, p["length"], p["root"], signers, file, number, p["ledger_id"])
        for key, signature in made:
            if key not in self.names:
                raise Bad("head", f"signed by a key that does not stand in the charter: {_show(key)}")
            _check_signature(self.report, key, HEAD_TYPE, payload, signature)
        signers = tuple(self.names[key] for key in keys)
        return Statement(owner, p["length"], p["root"], signers, file, number, p["ledger_id"])

    def _good(self, kind: str, payload: bytes, made: Signatures) -> tuple[str, ...]:
        """Who signed it: whose signatures of these are good."""
        found = []
        for key, signature in made[: 2 * len(self.names)]:
            with suppress(Bad):
                if key in self.names:
                    _check_signature(self.report, key, kind, payload, signature)
                    found.append(self.names[key])
        return tuple(dict.fromkeys(found))

    # closing checkpoints

    def read_closing(self, root: Path, file: str, label: str, *, given: bool = False) -> dict[str, Any]:
        """What a good closing checkpoint says.

        Args:
            given: it is not of this bundle: without somebody's signature it closes nothing, but binds whose are good.
        """
        payload, made = _file_of_one(root, file, CLOSING_TYPE)
        wrong = next(_everyone_signed(self.report, CLOSING_TYPE, payload, made, self.terms.keys), None)
        signers = self._good(CLOSING_TYPE, payload, made)
        if wrong and not (given and signers):
            raise Bad("closing", wrong)
        p = _canonical(payload)
        checks = {"v": _is(2), "run_id": _id, "charter_sha256": _is(self.terms.sha256), "model_sha256": _or_null(_hex)}
        _fields(p, "checkpoint", checks | {"ledgers": _list})
        stated = {"owner": _is(*self.books), "length": lambda v: _whole(v, 1), "root": _hex}
        owners = [_fields(item, "ledger", stated)["owner"] for item in p["ledgers"]]
        if sorted(owners) != sorted(self.books):
            raise Bad("closing", "does not name every ledger of this bundle, once")
        if wrong:
            self.report.warn("copy", label, 1, f"{wrong}; it still binds {', '.join(signers)}, who did")
        closing = None if wrong else p["run_id"]
        for item in p["ledgers"]:
            if item["owner"] in signers:
                made_of = Statement(item["owner"], item["length"], item["root"], signers, label, closing=closing)
                self.statements[item["owner"]].append(made_of)
        self.used += 1
        return dict(p)

    def read_closings(self, root: Path) -> None:
        """Those of the bundle."""
        for name in _listing(root, "closing"):
            file = f"closing/{name}"
            try:
                p = self.read_closing(root, file, file)
                if name != f"{p['run_id']}.json":
                    raise Bad("closing", f"named after another run than it closes, {p['run_id']}")
                self.closings.append(p)
            except Bad as bad:
                self.report.wrong("file" if bad.code == "file" else "closing", file, 1, str(bad))

    def check_closings(self, runs: dict[str, Run]) -> None:
        """Every run that was closed has its checkpoint; those that are not good are forgotten."""
        coordinator, good = self.books[self.terms.coordinator], []
        for p in self.closings:
            run, ends = runs.get(p["run_id"]), {item["owner"]: item["length"] for item in p["ledgers"]}
            what = ""
            if run is None or run.close is None or run.closed_at > ends[self.terms.coordinator]:
                if coordinator.whole:
                    what = f"of run {p['run_id']}, which the coordinator's ledger does not close in its first "
                    what += f"{ends[self.terms.coordinator]} entries, those that the checkpoint is about"
            elif run.close["model_sha256"] != p["model_sha256"]:
                what = (
                    f"names another model than the coordinator's ledger: {_model(p)}, there it is {_model(run.close)}"
                )
            if what:
                self.report.wrong("closing", f"closing/{p['run_id']}.json", 1, what)
            else:
                good.append(p)
        self.closings = sorted(good, key=self._reach)
        closed = {p["run_id"] for p in good}
        for run_id, run in runs.items():
            if run.close is None:
                if coordinator.whole:
                    self.report.warn("open_run", coordinator.file, run.line, f"run {run_id} was not closed (resume it)")
            elif run_id not in closed:
                what = "the run was closed, but its checkpoint is missing or not good (resume it)"
                self.report.wrong("closing_missing", f"closing/{run_id}.json", None, what)
        if not runs and coordinator.whole:
            self.report.warn("no_runs", coordinator.file, None, "no run under this charter")

    def _reach(self, checkpoint: Mapping[str, Any]) -> int:
        """How far into the coordinator's ledger it reaches: the order in which runs were closed."""
        ends = {item["owner"]: int(item["length"]) for item in checkpoint["ledgers"]}
        return ends[self.terms.coordinator]

    # what was given to compare with

    def read_given(self, given: Path) -> None:
        """A copy of a ledger, a file of heads, a checkpoint, or a folder with such, whatever they are called.

        Where there is nothing in it that could be compared with this bundle, or too much, that is added to `worthless`.

        Raises:
            Unreadable: it is not there.
        """
        if not os.path.exists(given):  # never raises
            raise Unreadable(str(given), None, "not there, so nothing can be compared with it")
        before, told, path = self.used, len(self.report.warnings), given.resolve()
        if not path.is_dir():
            self._copy(path.parent, path.name, str(given))
        else:
            copies = list(itertools.islice(self._found(path, given), MAX_COPIES + 1))
            if len(copies) > MAX_COPIES:
                what = f"more than {MAX_COPIES} files to compare with: give some at a time"
                self.worthless.append(("copy", Unreadable(str(given), None, what)))
                return
            for file in sorted(copies):
                self._copy(path, file, str(given / file))
        if before == self.used:
            found = self.report.warnings[told:]
            why = "; ".join(sorted({one["what"] for one in found}))
            what = f"nothing in it can be compared with this bundle{f': {why}' if why else ''}"
            code = "unrelated" if {one["code"] for one in found} == {"unrelated"} else "copy"
            self.worthless.append((code, Unreadable(str(given), None, what)))

    def _found(self, path: Path, given: Path) -> Iterator[str]:
        """The files of a folder that are ledgers, heads or checkpoints, or look as if they should be. What cannot be looked at is told."""

        def unread(err: OSError) -> None:
            self.report.warn("copy", str(err.filename), None, f"cannot be read: {err.strerror}")

        for folder, folders, names in os.walk(path, onerror=unread):
            for name in (*folders, *names):
                file = str(Path(folder, name).relative_to(path))
                if (path / file).is_symlink():
                    self.report.warn("copy", str(given / file), None, "is a link: give what it leads to by itself")
                elif name in names and (
                    name.endswith(".jsonl") or Path(folder).name == "closing" or _like_ours(path, file)
                ):
                    yield file

    def _copy(self, root: Path, file: str, label: str) -> None:
        try:
            with _open(root, file) as handle:
                first = _json(handle.readline(MAX_LINE).removesuffix(b"\n"))
            kind = first.get("payloadType", ENTRY_TYPE if "envelope" in first else None)
            if kind == HEAD_TYPE:
                self.read_heads(root, file, label, label, given=True)
            elif kind == CLOSING_TYPE:
                payload, _ = _file_of_one(root, file, CLOSING_TYPE)
                if _canonical(payload)["charter_sha256"] == self.terms.sha256:
                    self.read_closing(root, file, label, given=True)
                else:
                    self.report.warn("unrelated", label, None, "of another charter")
            elif kind == ENTRY_TYPE:
                owner, key = (first["body"]["data"][name] for name in ("owner", "key"))
                if self.terms.keys.get(owner) == key and owner in self.books:
                    self._ledger(root, file, label, self.books[owner])
                else:
                    self.report.warn("unrelated", label, 1, f"the ledger of {_show(owner)} with a key of its own")
            else:
                raise Bad("copy", "neither a ledger, nor heads, nor a closing checkpoint")
        except (Bad, AttributeError, LookupError, TypeError) as err:
            self.report.warn("copy", label, 1, str(err) if isinstance(err, Bad) else f"malformed ({_show(str(err))})")

    def _ledger(self, root: Path, file: str, label: str, book: Book) -> None:
        chain = Chain(self.report, self.terms.keys[book.owner])
        try:
            for line in _lines(root, file):
                chain.take(line)
        except Bad as bad:
            if bad.code != "torn":  # it was written while it was copied; whole lines count
                self.report.warn("copy", label, chain.length + 1, f"not what {book.owner} signed: {bad}")
        self.used += chain.length > 0
        self.report.checked["proofs"] += 1
        pairs = zip(chain.roots, book.chain.roots, strict=False)
        if fork := next((number for number, (copy, here) in enumerate(pairs) if copy != here), None):
            what = f"another entry than in {label}:{fork}: {book.owner} signed both"
            book.wrong("fork", fork, what)
        else:
            self.agreed[book.owner] = max(self.agreed[book.owner], min(chain.length, book.length))
            self.longer[book.owner] = max(self.longer.get(book.owner, (0, "")), (chain.length, label))

    # all together

    def compare(self) -> None:
        """Every statement with its ledger; those that it keeps to are left. A ledger that once was longer is not whole."""
        for owner, book in self.books.items():
            good: list[Statement] = []
            known: dict[int, Statement] = {}
            wrong: Statement | None = None
            for one in sorted(self.statements[owner], key=lambda one: one.length):
                self.report.checked["proofs"] += one.length <= book.length
                other = known.setdefault(one.length, one)
                if one.root != other.root:
                    what = f"another history of {owner}'s ledger of {one.length} entries than {other.source}: both signed by it"
                    self.report.wrong("contradiction", one.file, one.line, what)
                if one.length > book.length:
                    self.beyond[owner] |= {*one.signers} - {owner}
                    self.longer[owner] = max(self.longer.get(owner, (0, "")), (one.length, one.source))
                elif book.chain.roots[one.length] == one.root and one.ledger_id in (None, book.ledger_id):
                    good.append(one)
                else:
                    wrong = wrong or one
            same = [self.agreed[owner], *(one.length for one in good)]
            if wrong:
                first = 1 + max((length for length in same if length < wrong.length), default=0)
                what = f"one of entries {first} to {wrong.length} is not the one that {', '.join(wrong.signers)} signed for"
                book.wrong("entry_differs", first, f"{what} ({wrong.source})")
            length, source = self.longer.get(owner, (0, ""))
            if length > book.length and book.whole:
                first, what = 1 + max(same), f"{_entries(book.length + 1, length)} missing"
                if first <= book.length:
                    what += f" (or as many from {first} on, where nothing else shows what stood there)"
                book.wrong("entries_missing", first, f"{what}: {owner} signed for {length} ({source})")
                book.whole = False
            self.statements[owner] = good

    def witnessed(self, owner: str) -> dict[str, Any]:
        """How much of a ledger others vouch for: the coordinator and two partners (fewer where there are fewer)."""
        reach = dict.fromkeys(self.terms.keys, 0)  # how far each signed
        closed: dict[int, str | None] = {}
        for one in self.statements[owner]:
            reach.update({name: max(reach[name], one.length) for name in one.signers})
            if one.closing:
                closed[one.length] = one.closing
        partners = sorted(reach[name] for name in self.terms.keys if name not in (owner, self.terms.coordinator))
        length = min(reach[owner], reach[self.terms.coordinator], *partners[-2:][:1])
        by = [name for name in self.terms.keys if name != owner and reach[name] >= length > 0]
        book, last = self.books[owner], max(closed, default=0)
        if (tail := book.length - length) and book.whole:
            what = f"{_entries(length + 1, book.length)} covered by no head that others signed, nor by a closing checkpoint"
            self.report.warn("tail", book.file, length + 1, what)
        return {
            "witnessed": {
                "length": length,
                "by": by,
                "closing": closed[last] if 0 < last >= length else None,
            },
            "tail": tail,
            "beyond": [name for name in self.terms.keys if name in self.beyond[owner]],
            "missing": max(0, self.longer.get(owner, (0, ""))[0] - book.length),
        }


def _like_ours(root: Path, file: str) -> bool:
    """Whether a file cannot be looked at, or has in its beginning what every entry, head and checkpoint has."""
    try:
        with _open(root, file) as handle:
            start = handle.read(2**16)
    except (Bad, OSError):
        return True
    return any(word in start for word in (b'"envelope":', HEAD_TYPE.encode(), CLOSING_TYPE.encode()))


def _entries(first: int, last: int) -> str:
    """As the subject of a sentence, with its verb."""
    return f"entry {first} is" if first == last else f"entries {first} to {last} are"


def _model(said: Mapping[str, Any]) -> str:
    return str(said["model_sha256"])[:16]


# -- model and result ---------------------------------------------------------------------------------------


def _last(runs: dict[str, Run]) -> dict[str, Any] | None:
    """The last round of the newest completed run."""
    done = [run for run in runs.values() if run.close and run.close["why"] == "completed" and run.rounds]
    return done[-1].rounds[-1] if done else None


def _check_model(root: Path, report: Report, book: Runs, closings: list[dict[str, Any]]) -> None:
    """The model is the newest completed run's; where the coordinator's ledger lacks its end, one that a checkpoint names."""
    file, last, there = "model.safetensors", _last(book.runs), os.path.lexists(root / "model.safetensors")
    try:
        if not book.whole:  # nor does a checkpoint say whether its run was completed
            named = {p["model_sha256"] for p in closings}
            if there and named and (found := _hash_of(root, file)) not in named:
                raise Bad("model", f"{found[:16]}, which no closing checkpoint names")
        elif last and (found := _hash_of(root, file)) != last["model_sha256"]:
            what = f"not the model that the newest completed run ended with: {found[:16]}, that was {_model(last)}"
            raise Bad("model", what)
        elif there and not last:
            raise Bad("model", "a model, but no run was completed")
    except Bad as bad:
        report.wrong(bad.code, file, None, str(bad))


def _same(a: Any, b: Any, within: float = 1e-6, small: float = 1e-3) -> bool:
    """Two numbers (or two nulls) that agree: relatively, and where one is above `small` also absolutely."""
    if a is None or b is None:
        return a is b
    numbers = all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e300 for n in (a, b))
    return numbers and math.isclose(a, b, rel_tol=within, abs_tol=within if max(a, b) > small else 0)


def _check_result(
    root: Path,
    report: Report,
    terms: Terms,
    book: Runs,
    refusals: Counter[tuple[Any, ...]],
    partners: dict[str, Any],
    coarse: set[str],
) -> None:
    """Compare `result.json` with what was recomputed, where that is of whole ledgers.

    Args:
        refusals: counts (partner, run_id, round, reason).
        partners: the verdict's.
        coarse: whose ε is only bounded.
    """
    file = "result.json"
    if not os.path.lexists(root / file):
        return
    try:
        result = _json(_read(root, file), floats=True)
        if not isinstance(result, dict) or result.get("charter_sha256") != terms.sha256:
            raise Bad("result", "names another charter")
        privacy = result.get("privacy")
        if not isinstance(privacy, dict) or privacy.get("kind") != terms.kind:
            raise Bad("result", f"privacy is not the charter's, {terms.kind}")
        for key, wanted in (("noise", terms.kind), ("unit", terms.unit), ("adversary", terms.adversary)):
            if (key in privacy or terms.kind in ("shared", "central")) and privacy.get(key) != wanted:
                raise Bad("result", f"privacy: {key} is {_show(privacy.get(key))}, by the charter it is {wanted}")
        for key in ("epsilon", "delta", "noise_multiplier", "clip_norm"):
            _compare(report, f"privacy: {key}", privacy.get(key, ""), getattr(terms, key))
        said = result.get("partners")
        if not isinstance(said, dict):
            raise Bad("result", "partners are missing")
        if not book.whole and (terms.clients or 0) > LISTED_CLIENTS:
            said, partners = {}, {}  # histories that are not known to their end
        if set(said) != set(partners):
            raise Bad("result", "does not name the partners of this bundle")
        for name, claims in said.items():
            for key in ("declared_records", "epsilon", "epsilon_filter", "epsilon_cap", "delta", "rounds"):
                if not isinstance(claims, dict) or (key not in claims and key != "epsilon_filter"):
                    raise Bad("result", f"{name}: {key} is missing")
                if claims.get("clients") != partners[name].get("clients"):
                    raise Bad("result", f"{name}: not the number of clients with this history")
                wanted = partners[name].get(key, terms.declared.get("" if terms.clients else name))
                if key in claims and partners[name]["whole"] and not (key == "epsilon" and name in coarse):
                    within = {"within": ODOMETERS, "small": 0.0} if key == "epsilon" else {}
                    _compare(report, f"{name}: {key}", claims[key], wanted, **within)
        if book.whole:
            _check_rounds(result, book.runs)
        listed = result.get("refusals")
        if not isinstance(listed, list):
            raise Bad("result", "refusals are missing")
        said = Counter(tuple(r[key] for key in ("partner", "run_id", "round", "reason")) for r in listed)
        if terms.clients:
            if said and terms.unit == "client":
                raise Bad("result", "refusals name clients who were asked")
            said = Counter()  # clients have no ledgers of their own: what they refused is the coordinator's word
        for one in {**said, **refusals}:
            if said[one] != refusals[one] and partners.get(one[0], {"whole": True})["whole"]:
                name, run_id, number, reason = map(_show, one)
                what = f"refusals: by {name} in run {run_id}, round {number}, for {reason}: {said[one]}, in its ledger {refusals[one]}"
                raise Bad("result", what)
    except Bad as bad:
        report.wrong("result", file, None, str(bad))
    except (ArithmeticError, LookupError, TypeError, ValueError) as err:
        report.wrong("result", file, None, f"malformed ({_show(str(err))})")


def _compare(report: Report, what: str, said: Any, wanted: float | None, **within: float) -> None:
    if not _same(said, wanted, **within):
        report.wrong("result", "result.json", None, f"{what} is {_show(said)}, here it is {wanted}")


def _check_rounds(result: dict[str, Any], runs: dict[str, Run]) -> None:
    """run_id, rounds and final are those of the first completed run, or of the first."""
    done = [run_id for run_id, run in runs.items() if run.close and run.close["why"] == "completed"]
    run_id = next(iter([*done, *runs]), None)
    if result.get("run_id") != run_id:
        raise Bad("result", f"run_id is {_show(result.get('run_id'))}, in the coordinator's ledger it is {run_id}")
    rounds = [(b["round"], b["metrics"]) for b in runs[run_id].rounds] if run_id else []
    said = result.get("rounds")
    if not isinstance(said, list) or len(said) != len(rounds):
        raise Bad("result", f"rounds are not the {len(rounds)} of the coordinator's ledger")
    for one, (number, metrics) in zip(said, rounds, strict=True):
        if not isinstance(one, dict) or type(one.get("round")) is not int or one["round"] != number:
            raise Bad("result", f"round {number} is missing or out of order")
        if other := _other_metrics(one.get("metrics"), metrics):
            raise Bad("result", f"round {number}: {other}")
    if other := _other_metrics(result.get("final"), rounds[-1][1] if rounds else {}):
        raise Bad("result", f"final: {other}")


def _other_metrics(said: Any, metrics: dict[str, str]) -> str:
    """How these differ from the coordinator's ledger; "" where they do not."""
    if not isinstance(said, dict):
        return "metrics are missing"
    for name in sorted({*said, *metrics}, key=str):
        if name not in said or name not in metrics or not _same(said[name], _real(metrics[name])):
            here, there = (_show(one[name]) if name in one else "missing" for one in (said, metrics))
            return f"metric {_show(name)} is {here}, in the coordinator's ledger it is {there}"
    return ""


# -- the verdict ---------------------------------------------------------------------------------------------


CENTRAL_ADVERSARY = (
    "whoever sees the models, of every round, and what is made from them; not the coordinator, who is trusted with each client's update "
    "and knows who was asked"
)


def _adversary(colluding: int | None) -> str:
    """Against whom an epsilon holds; None: no noise was shared."""
    if colluding is None:
        return "everyone but the partner itself: the coordinator, the other partners and whoever receives the model"
    if colluding == 0:
        return (
            "the coordinator alone, and whoever receives the model but is no partner: a partner knows its own share of the noise, "
            "and without that share less is left than what was charged"
        )
    some = "one partner" if colluding == 1 else f"at most {colluding} partners"
    return f"the coordinator and {some}, together, and whoever receives the model"


def _against(terms: Terms, events: Iterable[Event]) -> dict[str, Any]:
    """Where the noise of all that was debited is, and against whom an epsilon over it holds: the weakest of its events says.

    Where nothing was, it is as the charter has it.
    """
    if terms.kind == "central":
        return {"noise": "central", "colluding": None, "adversary": CENTRAL_ADVERSARY}
    found = set(events) - {None} or {event for event in terms.plan.values() if event}
    shared = [event.colluding for event in found if isinstance(event, Shared)]
    local = any(not isinstance(event, Shared) for event in found)
    noise = " and ".join(["local"] * local + ["shared"] * bool(shared)) or "none"
    colluding = min(shared, default=None)
    return {"noise": noise, "colluding": colluding, "adversary": _adversary(colluding)}


def _claim(terms: Terms, partners: Mapping[str, Any]) -> str:
    if terms.kind == "none":
        return (
            "There is no differential privacy guarantee: the charter says privacy none, "
            + ("sums of updates" if terms.secure else "updates")
            + " left the nodes unprotected and epsilon is unbounded."
        )
    guarantee = (
        "(epsilon, delta)-differentially private for one record of that partner under add-or-remove-one adjacency, with the partner's "
        f"epsilon and delta below (the charter's delta is {terms.delta!r}), "
    )
    if terms.kind == "central":
        return (
            f"The models of all rounds, together, are (epsilon, delta)-differentially private for one client, with all it holds, under "
            f"add-or-remove-one adjacency, with a client's epsilon and delta below (the charter's delta is {terms.delta!r}), by Gaussian "
            "noise that the coordinator adds once a round to the sum of clipped updates (central noise) of a sample that it draws in "
            f"secret, against {CENTRAL_ADVERSARY}"
            + ("; scores and labels of rows declared public are outside it." if terms.evaluation == "public" else ".")
        )
    public = "scores and labels of rows declared public are outside it" if terms.evaluation == "public" else ""
    if terms.colluding is None:
        claim = (
            f"Everything that left a partner's node is {guarantee}by Gaussian noise that the partner itself adds before anything leaves "
            f"(local noise), against {_adversary(None)}" + (f"; {public}." if public else ".")
        )
    else:
        claim = (
            f"Every sum that a partner's vectors were declared to be part of, of {terms.quorum} partners or more, is {guarantee}"
            "by discrete Gaussian noise of which each partner adds a share (shared noise), against "
            f"{_adversary(terms.colluding)}. That is about the sum: a partner's single vector has too little noise by itself, and what "
            "protects it is its mask (secure aggregation), against whoever cannot break the cryptography. That masks were used as "
            "declared a ledger cannot show beyond what is compared here: one attempt and one list of who is summed, for all of them"
            + (f". Of all else that left, {public}." if public else ".")
        )
    # Under another charter fewer partners may be enough to undo the noise, or one.
    weaker = {name: one["colluding"] for name, one in partners.items() if terms.undone_by(one["colluding"])}
    if weaker:
        names = ", ".join(list(weaker)[:4]) + (f" and {len(weaker) - 4} more" if len(weaker) > 4 else "")
        claim += (
            f" Of {names} noise was shared under other charters too: epsilon over all charters holds there no further than against "
            f"{_adversary(min(weaker.values()))}; what holds as said above is charter_epsilon."
        )
    return claim


@dataclass
class _Bill:
    """Works out epsilons, once for equal histories, and remembers whose are coarse."""

    terms: Terms
    report: Report
    coarse: set[str] = field(default_factory=set)

    def of(
        self, file: str, names: list[str], budget: Budget | None, unbounded: bool, spent: Mapping[Kind, int]
    ) -> dict[str, Any]:
        """epsilon, epsilon_filter, epsilon_cap and delta; None where there is no bound."""
        cap, delta = (budget.epsilon, budget.delta) if budget else (self.terms.epsilon, self.terms.delta)
        history = _history(spent)
        coarse: float | None = None if unbounded or (budget is None and (history or cap is None)) else 0.0
        tight = coarse
        if coarse is not None and budget:
            coarse = filter_epsilon(budget, history)
            reading = self.report.odometer.read(history, budget.delta)
            tight = min(reading.epsilon, coarse)
            self._say(reading, tight, file, names)
        return {
            "epsilon": tight,
            "epsilon_filter": coarse,
            "epsilon_cap": cap,
            "delta": delta,
            "unbounded": unbounded,
        }

    def _say(self, reading: Reading, epsilon: float, file: str, names: list[str]) -> None:
        if self.coarse.isdisjoint(names) and (reading.plain or reading.rounded > 1e-3 * max(1.0, epsilon)):
            self.coarse.update(names)
            what = f"{names[0]}: too long or too hostile a history, or bundle, for the tight epsilon; {epsilon:.6g} is a plain bound"
            if not reading.plain:
                what = f"{names[0]}: of epsilon {epsilon:.6g} about {reading.rounded:.2g} is by rounding"
            self.report.warn("coarse", file, None, what)

    def of_charter(
        self, file: str, names: list[str], budget: Budget | None, unbounded: bool, spent: Mapping[Kind, int]
    ) -> dict[str, Any]:
        """What the charter's own debits cost, by its filter at its delta."""
        if budget and self.terms.epsilon is not None and self.terms.delta is not None:
            budget = budget.at(self.terms.epsilon, self.terms.delta)
        one = self.of(file, names, budget, unbounded, spent)
        return {"epsilon": one["epsilon"], "epsilon_filter": one["epsilon_filter"], "cap": self.terms.epsilon}


def _most(values: Iterable[float | None], none: float | None = None) -> float | None:
    """The largest; None (no bound) is larger than any number."""
    found = list(values)
    return None if None in found else max((v for v in found if v is not None), default=none)


def _merged(debits: Iterable[tuple[Event, bool]]) -> list[dict[str, Any]]:
    """Equal events together, with how many there were."""
    counts = Counter(debits)
    order = sorted(counts.items(), key=lambda item: ((item[0][0] or (0.0, 0.0, 0))[:3], item[0][0] or (), item[0][1]))
    return [
        {
            "mechanism": "none/1" if event is None else SHARED if isinstance(event, Shared) else LOCAL,
            **dict(zip(("q", "sigma", "steps"), event or (None, None, None), strict=False)),
            **({"shared": _told(event)} if isinstance(event, Shared) else {}),
            "count": count,
            "charter": "this" if own else "other",
        }
        for (event, own), count in order
    ]


def _told(event: Shared) -> dict[str, Any]:
    """What shared noise is, beside what it is charged as."""
    names = ("clip", "grid", "dimension", "quorum", "colluding")
    return {"sigma": event.noise, **{name: getattr(event, name) for name in names}}


def _partner_summary(partner: Partner, bill: _Bill) -> dict[str, Any]:
    names, used = [partner.owner], partner.used()
    lineages, charter = {}, []
    for lineage, account in used.items():
        unbounded = account.unbounded is not None
        unprotected = any(own and event is None for _, event, own in account.debits)
        charter.append(bill.of_charter(partner.file, names, account.budget, unprotected, account.spent(own=True)))
        lineages[lineage] = bill.of(partner.file, names, account.budget, unbounded, account.spent())
        lineages[lineage] |= {"charter_epsilon": charter[-1], "whole": partner.whole}
        lineages[lineage] |= _against(bill.terms, (event for _, event, _ in account.debits))
        lineages[lineage]["datasets"] = [
            {"dataset": dataset, "declared": b["declared"]}
            for dataset, b in partner.datasets.items()
            if b["lineage"] == lineage
        ]
    nothing = bill.of(partner.file, names, None, False, {})
    charter = charter or [bill.of_charter(partner.file, names, None, False, {})]
    figures = list(lineages.values()) or [nothing]
    debits = [debit for account in used.values() for debit in account.debits]
    first = next(iter(used.values()), Account())
    return {
        **{key: _most(one[key] for one in figures) for key in ("epsilon", "epsilon_filter", "epsilon_cap", "delta")},
        "charter_epsilon": {key: _most(one[key] for one in charter) for key in ("epsilon", "epsilon_filter", "cap")},
        "unbounded": any(one["unbounded"] for one in figures),
        "debits": len(debits),
        "uncommitted_debits": len(set(partner.acts["debit"]) - set(partner.acts["commit"])),
        "rounds": len(partner.rounds),
        "refusals": len(partner.refusals),
        "refusals_by_reason": dict(Counter(act.body["reason"] for act in partner.refusals)),
        "entries": partner.length,
        "undisclosed": partner.undisclosed,
        "whole": partner.whole,  # or else all of this is of the entries before the first bad or missing one
        "unread": partner.unread,
        "lineages": lineages,
        **_against(bill.terms, (event for _, event, _ in debits)),
        "events": _merged((event, own) for _, event, own in debits),
        "trajectory": _trajectory(used, bill),
        "budget": first.agreed,
    }


def _trajectory(used: Mapping[str, Account], bill: _Bill) -> list[dict[str, Any]]:
    """Every debit in order; the odometer is read at some: the fewer, the more different events there are."""
    points, odometer = [], bill.report.odometer
    for lineage, account in used.items():
        spent: Counter[Kind] = Counter()
        last = len(account.debits) - 1
        several = sum(q < 1 for q, _ in account.spent()) or 1
        every = math.ceil((last + 1) / max(1, MAX_POINTS // several))
        interval = 0.0
        if account.budget:
            interval = odometer.read(_history(account.spent()), account.budget.delta).interval
        for number, (point, event, _) in enumerate(account.debits):
            _charge(spent, event)
            point = point | ({"lineage": lineage} if len(used) > 1 else {})
            final = number == last
            # Half of the work is kept for what everybody's histories come to.
            tell = (last - number) % every == 0 and (final or odometer.left > odometer.work / 2)
            if account.budget and point["epsilon_filter"] is not None and tell:
                tight = odometer.read(_history(spent), account.budget.delta, 0.0 if final else interval)
                point["epsilon"] = min(tight.epsilon, point["epsilon_filter"])
            points.append(point)
    return sorted(points, key=lambda point: int(point["entry"]))


def _client_name(number: int, clients: int) -> str:
    """Of as many digits as the last client's number has, four or more."""
    return f"client-{number:0{max(4, len(str(clients - 1)))}d}"


def _client_summaries(book: Population, bill: _Bill) -> dict[str, Any]:
    """By client, or of more than LISTED_CLIENTS by history. No trajectories: they would be clients x rounds."""
    events: dict[Story, Counter[Event]] = {}
    members: dict[Story, list[Ranges]] = {}
    about = {}
    for counts, ranges in book.groups().items():
        total, debits = Counter[str](), Counter[Event]()
        for (kind, run_id, purpose), n in zip(book.steps, counts, strict=True):
            total[kind] += n
            total["rounds"] += n if (kind, purpose) == ("commit", "train") else 0
            if kind == "debit":
                debits[book.plans[run_id][purpose][1]] += n
        # What tells one history from another: how often what was debited, and what came of it; not when, nor in which run.
        story = frozenset((+debits).items()), total["commit"], total["rounds"]
        events[story], about[story] = debits, (total, counts)
        members.setdefault(story, []).append(ranges)
    found: dict[int, dict[str, Any]] = {}
    lost = 0
    for story, (total, counts) in about.items():
        first = min(ranges[0][0] for ranges in members[story])
        size = sum(last - begin + 1 for ranges in members[story] for begin, last in ranges)
        figures = (book.file, [_client_name(first, book.clients)], book.budget, book.unbounded is not None)
        summary = bill.of(*figures, book.spent(counts)) | {
            "charter_epsilon": bill.of_charter(*figures, book.spent(counts)),
            "debits": total["debit"],
            "uncommitted_debits": total["debit"] - total["commit"],
            "rounds": total["rounds"],
            "refusals": 0,
            "refusals_by_reason": {},
            "entries": total["debit"] + total["commit"],
            "undisclosed": 0,
            "whole": book.whole,
            "unread": book.unread,
            **_against(bill.terms, events[story]),
            "events": _merged((event, True) for event in events[story].elements()),
            "trajectory": [],
            "budget": book.agreed,
        }
        lost += size if summary["uncommitted_debits"] else 0
        if book.clients > LISTED_CLIENTS:
            found[first] = summary | {"clients": size}
            continue
        for ranges in members[story]:
            for begin, last in ranges:
                found |= dict.fromkeys(range(begin, last + 1), summary)
        if bill.coarse.intersection(figures[1]):
            bill.coarse.update(_client_name(n, book.clients) for n, one in found.items() if one is summary)
    if lost and book.whole:
        what = f"clients with a debit without a commit ({lost}): it stays charged"
        bill.report.warn("uncommitted", book.file, None, what)
    return {_client_name(number, book.clients): found[number] for number in sorted(found)}


def _secure_told(terms: Terms) -> dict[str, Any] | None:
    """The terms of secure aggregation, for a reader of the verdict."""
    secure = terms.secure
    if secure is None:
        return None
    names = ("colluding", "retries", "threshold", "dimension")
    return {"quorum": terms.quorum, **{name: getattr(secure, name) for name in names}}


def _secure_limits(terms: Terms) -> Iterator[str]:
    if terms.secure is None:
        return
    t = terms.secure.colluding
    yield (
        "That vectors were masked as declared, with keys of which nobody else had a copy, no ledger shows. A mask hides a single vector only "
        f"from whoever cannot break the cryptography, and while {f'no more than {t}' if t else 'none'} of the other partners work with "
        "the coordinator."
    )
    if terms.kind == "shared":
        yield (
            f"Shared noise protects a partner's record only with others' shares: {terms.quorum - t} of a sum, of partners that do not work "
            "with the coordinator, must really have been drawn."
        )


def _central_limits(terms: Terms) -> Iterator[str]:
    if terms.kind == "central":
        yield (
            "Central noise is the coordinator's word: that it drew each cohort in secret at this rate, clipped every update, added the noise "
            "and divided by a fixed number, no ledger shows; nor did anything protect an update from the coordinator. How long rounds took, "
            "and what else the coordinator shows of who was asked, is outside the epsilon."
        )


def verify_bundle(folder: Path, against: Iterable[Path] = ()) -> dict[str, Any]:
    """The verdict on a bundle; `violations` is empty exactly when `verified`. JSON throughout.

    Args:
        against: further copies of what is in the bundle, from whoever kept them: a ledger, a file of heads, a closing checkpoint, or
            a folder with such (another bundle; what a partner's node kept). What the bundle lacks or has otherwise is a violation;
            what their owners did not sign is a warning, and counts for nothing.

    Returns:
        `verified`, `bundle`, `charter_sha256`, `simulated`, `claim` (None unless verified), of the charter `noise` ("local",
        "shared", "central" or "none"), `unit` ("record", or "client" with central noise), `colluding` (of shared noise: with how many partners working with the coordinator it still is enough;
        else None), `adversary` (the same in words) and `secure_aggregation` {quorum, colluding, retries, threshold, dimension} or None,
        `checked` {ledgers, entries, signatures, heads, proofs: signed statements and copies that ledgers were compared with},
        `partners` {name: {
            epsilon (odometer), epsilon_filter, epsilon_cap, delta: the most of any lineage used under this charter, over all that
            was debited on it under any charter (None: no bound),
            charter_epsilon {epsilon, epsilon_filter, cap}: of the debits under this charter alone, at its delta,
            unbounded, debits, uncommitted_debits, rounds, refusals, refusals_by_reason {reason: count}, entries, undisclosed,
            lineages {id: {epsilon, epsilon_filter, epsilon_cap, delta, unbounded, charter_epsilon, whole, noise, colluding, adversary,
            datasets [{dataset, declared}]}},
            noise ("local and shared" where both were debited), colluding, adversary: of all that was debited on these lineages under
            any charter: an epsilon over it holds against no more than this,
            events [{mechanism, q, sigma, steps, count, charter "this" or "other"}]: what was debited on these lineages; of shared noise
            sigma is what it is charged as, and `shared` {sigma, clip, grid, dimension, quorum, colluding} what was declared,
            trajectory [{entry, time, run, round, charter, epsilon_filter, epsilon}] after each debit (time, run and round are None
            where they are not shown; epsilon at some; with `lineage` where there is more than one),
            budget {epsilon, delta, orders, gaussian_delta} of the first lineage (None: none was fixed),
            whole: whether the ledger is here to its end (else all figures are of the `entries` that were read), unread: lines that
            were not, from the first bad one on,
            witnessed {length, by [names], closing (run or None)}, tail: entries beyond `length`, missing: entries that its owner signed
            for and that were not read, beyond [names]: who else signed for more than were read}} (of a population's clients: no
            lineages, trajectory, witnessed, tail, missing and beyond; of more than LISTED_CLIENTS one item for each history, by the name
            of the first who has it, and `clients`, how many do),
        `coordinator` {entries, undisclosed, whole, unread, witnessed, tail, missing, beyond},
        `heads` [{owner, holder, length, signers}], `closings` [{run_id, ledgers [{owner, length, root}]}], `open_runs` [run_id],
        `violations` and `warnings` [{code, file, line, what, means}], `limits` (sentences to show wherever a verdict is shown).

    Raises:
        Unreadable: the folder or its charter is missing or is none at all, so that nothing can be judged; or one of `against` is not
            there. Or nothing in one of them can be compared and there is no violation: what was asked for was not done.
    """
    try:
        return _verdict(folder, against)
    except OSError as err:  # of a disk or a network: names of files that are not there are found out before
        raise Unreadable(str(err.filename or folder), None, f"cannot be read: {err.strerror}") from err


def _verdict(folder: Path, against: Iterable[Path]) -> dict[str, Any]:
    report, root = Report(), Path(folder)
    if not root.is_dir():
        raise Unreadable(str(folder), None, "no such folder")
    terms = _load_charter(root, report)
    _check_keys(root, report, terms)
    bill, partners = _Bill(terms, report), dict[str, Partner]()
    book: Coordinator | Population
    if terms.clients:
        book = Population(report, terms)
        book.read(root)
    else:
        book = Coordinator(report, terms)
        book.read(root)
        partners = {name: Partner(report, terms, name) for name in terms.declared}
        for partner in partners.values():
            partner.read(root)
    for name in _listing(root, "partners"):
        if name not in partners:
            report.wrong("stranger", f"partners/{name}", None, "no partner of this charter")
    others = Witnesses(report, terms, {**partners, terms.coordinator: book})
    others.read_closings(root)
    for name in _listing(root, "heads"):
        if name.removesuffix(".jsonl") in terms.keys and name.endswith(".jsonl"):
            others.read_heads(root, f"heads/{name}", name.removesuffix(".jsonl"), f"heads/{name}")
        else:
            report.wrong("stranger", f"heads/{name}", None, "heads kept by nobody in this charter")
    for given in against:
        others.read_given(Path(given))
    others.compare()
    # Only now is it known which ledgers lack their end: what is not there is no contradiction.
    for ledger in (*partners.values(), book):
        if isinstance(ledger, Partner | Population):
            ledger.finish()
    if isinstance(book, Coordinator):
        _cross_check(report, book, partners)
        _check_attempts(report, book, partners)
    others.check_closings(book.runs)
    _check_model(root, report, book, others.closings)
    if isinstance(book, Population):
        bills = _client_summaries(book, bill)
    else:
        bills = {name: _partner_summary(one, bill) | others.witnessed(name) for name, one in partners.items()}
    refusals = Counter(
        (name, act.body["run_id"], act.body["round"], act.body["reason"])
        for name, partner in partners.items()
        for act in partner.refusals
    )
    _check_result(root, report, terms, book, refusals, bills, bill.coarse)
    newest = next((p["run_id"] for p in reversed(others.closings)), None)
    complete = (
        f"The bill is complete as of the newest closing checkpoint in this bundle, run {newest}, and the newest heads: whoever made "
        "the bundle could withhold later runs together with everybody's later entries."
        if newest
        else "No good closing checkpoint is in this bundle: beyond the newest heads nobody vouches that it is complete."
    )
    for code, one in others.worthless:
        if not report.violations:
            raise one
        report.warn(code, one.file, one.line, one.what)
    simulated = ["Simulated: all keys and data were on one machine, so the signatures bind nobody."]
    cut = [name for name, ledger in others.books.items() if not ledger.whole]
    partly = f"Not here to their end are the ledgers of {', '.join(cut)}: figures are of what was read, and the rest of it was "
    partly += "compared with nothing."
    return {
        "verified": not report.violations,
        "bundle": str(folder),
        "charter_sha256": terms.sha256,
        "simulated": terms.simulated,
        "noise": terms.kind,
        "unit": terms.unit,
        "colluding": terms.colluding,
        "adversary": terms.adversary,
        "secure_aggregation": _secure_told(terms),
        "claim": None if report.violations else _claim(terms, bills),
        "checked": dict(report.checked),
        "partners": bills,
        "coordinator": {
            "entries": book.length,
            "undisclosed": book.undisclosed,
            "whole": book.whole,
            "unread": book.unread,
        }
        | others.witnessed(terms.coordinator),
        "heads": others.heads,
        "closings": [{"run_id": p["run_id"], "ledgers": p["ledgers"]} for p in others.closings],
        "open_runs": [run_id for run_id, run in book.runs.items() if run.close is None and book.whole],
        "violations": report.violations,
        "warnings": report.warnings,
        "limits": [
            *LIMITS,
            *_secure_limits(terms),
            *_central_limits(terms),
            complete,
            *([partly] if cut else []),
            *(simulated if terms.simulated else []),
        ],
    }


def main(arguments: list[str]) -> int:
    """`python verifier.py BUNDLE [--against PATH ...]`."""
    folder, *rest = arguments or [""]
    if folder in ("-h", "--help"):
        print(f"{main.__doc__}\n\nPrints the verdict as JSON. Exit 0: verified; 1: a violation; 2: unreadable.")
        return 0
    if not folder or len(rest) % 2 or any(flag != "--against" for flag in rest[::2]):
        print("usage: python verifier.py BUNDLE [--against PATH ...]", file=sys.stderr)
        return 2
    try:
        verdict = verify_bundle(Path(folder), [Path(path) for path in rest[1::2]])
    except Unreadable as err:
        print(ascii(str(err))[1:-1], file=sys.stderr)
        return 2
    print(json.dumps(verdict, indent=2))
    return 0 if verdict["verified"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
