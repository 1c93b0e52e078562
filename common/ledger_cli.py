"""`hansa ledger`: read a ledger, check it, and prove one entry of it to somebody who has no more than its head."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .charter import SignedCharter
from .cli import Format, FormatOption, clean, out, plain, public_key, say, show_json
from .closing import CLOSING_TYPE, read_closing
from .errors import ConfigError, HansaError, LedgerError, MessageError, counted
from .heads import read_head
from .identity import canonical, strict_json, write_whole
from .ledger import UNDISCLOSED, Entry, Scan, looks_like_ledger, owner_line, read_entry, read_ledger, scan_ledger
from .merkle import Tree, verify_inclusion

TYPES = (
    "genesis", "dataset", "charter", "budget", "hold", "debit", "commit", "survivors", "public", "refuse", "release", "restored", "recovered",
    "run", "ask", "answers", "round", "close", "cohort-hold", "cohort-debit", "cohort-commit", UNDISCLOSED,
)  # fmt: skip
"""Types of entries that a ledger of this version can have (docs/ledger-format.md)."""


def commands(app: typer.Typer) -> None:
    """Register the group `ledger`."""
    ledger = typer.Typer(
        help="Read and check a ledger, and prove one entry. Example: hansa ledger show ledger.jsonl",
        no_args_is_help=True,
    )
    for command in (show, verify, prove, check_proof):
        ledger.command(command.__name__.replace("_", "-"))(command)
    app.add_typer(ledger, name="ledger")


def show(
    file: Annotated[Path, typer.Argument(help="a ledger.jsonl")],
    kind: Annotated[str | None, typer.Option("--type", help="only entries of this type, e.g. debit")] = None,
    form: FormatOption = Format.TEXT,
) -> int:
    """Show a ledger's entries, after checking that they chain and are signed.

    Of a ledger that was edited, the entries before the first bad line are shown. Exit 1 where `hansa ledger verify` exits 1: it is
    not whole and as its owner signed it to the end.

    Example: hansa ledger show out/demo/partners/cleveland/ledger.jsonl --type debit
    """
    scan = _scan(file)
    types = {*TYPES, *(e.type for e in scan.entries)}
    if kind is not None and kind not in types:
        raise ConfigError(f"there are no entries of type {kind!r}", f"Types are: {', '.join(sorted(types))}.")
    chosen = [e for e in scan.entries if kind is None or e.type == kind]
    problem = _problem(file, scan)
    if form is Format.JSON:
        show_json(
            {
                "entries": [{"seq": e.seq, "time": e.time, "type": e.type, "body": e.body} for e in chosen],
                "torn_bytes": len(scan.torn),
                "problem": None if problem is None else problem[0],
            }
        )
        return 0 if problem is None else 1
    if scan.entries:
        out.print(plain(owner_line(scan.entries[0])))
    if chosen:
        _print_entries(chosen)
    elif scan.entries:
        out.print(plain(f"no entry of type {kind} among {counted(len(scan.entries), 'entry', 'entries')}"))
    return 0 if problem is None else say(*problem, 1)


def verify(
    file: Annotated[Path, typer.Argument(help="a ledger.jsonl")],
    key: Annotated[Path | None, typer.Option(help="whose ledger it must be: a public key (PEM)")] = None,
    form: FormatOption = Format.TEXT,
) -> int:
    """Check a ledger's signatures and chain. Exit 1 when it does not hold, 2 when the file is no ledger at all.

    Without --key the ledger is checked against the key that it names itself: that shows edits, not whose it is.

    Example: hansa ledger verify out/demo/partners/cleveland/ledger.jsonl --key out/demo/keys/cleveland.pem
    """
    public = public_key(key, "Give a public key in PEM form.") if key is not None else None
    scan = _scan(file, public)
    entries, problem = scan.entries, _problem(file, scan, public)
    length, root = (0, None) if scan.bad or not entries else (len(entries), entries[-1].root)
    if form is Format.JSON:
        found = None if problem is None else problem[0]
        show_json({"valid": problem is None, "problem": found, "length": length, "root": root})
    elif problem is not None:
        say(*problem, 1)
    else:
        who = "" if public is not None else " (by the key that it names itself; give --key to check whose it is)"
        signed = counted(len(entries), "entry", "entries")
        out.print(plain(f"{file}: {signed}, signed and in one tree{who}; root {root}"))
    return 0 if problem is None else 1


def _scan(file: Path, key: str | None = None) -> Scan:
    """A ledger as far as it verifies.

    Raises:
        LedgerError: the file is not there, or is of another kind.
    """
    if not file.is_file():
        what = "a folder" if file.is_dir() else "not a file" if file.exists() else "no such file"
        raise LedgerError(f"{file}: {what}", "Give the path of a ledger.jsonl.")
    scan = scan_ledger(file, key)
    if not scan.entries and (scan.bad or scan.torn) and not looks_like_ledger(file.read_bytes()):
        raise LedgerError(f"{file}: not a ledger: no line of it is an entry", "Give the path of a ledger.jsonl.")
    return scan


def _problem(file: Path, scan: Scan, key: str | None = None) -> tuple[str, str] | None:
    """What is wrong with a ledger, and what that means; None: nothing.

    Args:
        key: whose ledger it had to be.
    """
    if scan.bad is not None:
        number, what = scan.bad
        if key is not None and number == 1:
            return f"{file}:1: {what}", "It is the ledger of another key than --key has, or its first line was edited."
        return (
            f"{file}:{number}: {what}",
            f"Good, and in one tree: {_lines(1, number - 1)}. Not to be relied on: {_lines(number, number + scan.rest - 1)}. From there "
            "on it is not what its owner signed: edited, cut into or damaged, here or on its way. Compare it with another copy, or with "
            "heads that others hold (hansa audit BUNDLE --against PATH).",
        )
    if scan.torn:
        return (
            f"{file}:{len(scan.entries) + 1}: torn last line ({counted(len(scan.torn), 'byte')} without a line break)",
            "Its writer crashed or was still writing (then nobody acted on that line), or somebody cut the file: from the file alone "
            "that cannot be told, nor whether more lines stood there. A copy or a head that others hold tells "
            "(hansa audit BUNDLE --against PATH).",
        )
    if not scan.entries:
        return (
            f"{file}: has no entries",
            "A ledger begins with an entry that says whose it is: this one was cut, or never begun.",
        )
    return None


def _lines(first: int, last: int) -> str:
    return "no line" if last < first else f"line {first}" if first == last else f"lines {first} to {last}"


def _print_entries(entries: Sequence[Entry]) -> None:
    """One line each; on a screen what does not fit goes on below its own column. Into a pipe or a file lines are not broken."""
    known = [(str(e.seq + 1), _when(e.time), clean(e.type), clean(_gist(e))) for e in entries]
    titles = ("line", "time (UTC)", "type", "what")
    widths = [max(len(row[i]) for row in (titles, *known)) for i in range(3)]
    indent = sum(widths) + 2 * len(widths)
    room = max(20, out.width - indent) if out.is_terminal or "COLUMNS" in os.environ else None
    for line, time, kind, what in (titles, *known):
        parts = [what] if room is None else textwrap.wrap(what, room, break_on_hyphens=False) or [""]
        lead = f"{line:>{widths[0]}}  {time:<{widths[1]}}  {kind:<{widths[2]}}  "
        for number, part in enumerate(parts):
            out.print(plain(((lead if number == 0 else " " * indent) + part).rstrip()))


def _when(time: str) -> str:
    """2026-11-22T01:50:00Z without its letters: the column says that it is UTC."""
    return clean(time.removesuffix("Z").replace("T", " ", 1))


def prove(
    file: Annotated[Path, typer.Argument(help="your ledger.jsonl")],
    line: Annotated[int, typer.Argument(help="the entry, as `hansa ledger show` numbers it (from 1)")],
    heads: Annotated[
        list[Path],
        typer.Option(
            help="what others signed: heads/NAME.jsonl or closing/RUN.json of a bundle, a node's state/heads/...jsonl or "
            "state/models/RUN/closing.json; repeatable"
        ),
    ],
    charter: Annotated[Path, typer.Option(help="the charter whose keys signed them")],
    to: Annotated[Path, typer.Option("--out", help="the file to write")] = Path("proof.json"),
) -> None:
    """Show one entry to somebody, and prove that it stands under what others have signed. The rest stays with you.

    It proves against the head or closing checkpoint that most have signed, of these the longest. Heads are signed one round behind; at the
    end of a run everyone signs its closing checkpoint, which covers the newest entries.

    Example: hansa ledger prove ledger.jsonl 17 --heads heads/coordinator.jsonl --charter charter.json --out proof.json

    Example: hansa ledger prove ledger.jsonl 36 --heads closing/20261125-1f3a9c2e.json --charter charter.json
    """
    entries, _ = read_ledger(file)
    if not entries:
        raise LedgerError(f"{file}: has no entries", "Give the path of a ledger.jsonl.")
    if not 1 <= line <= len(entries):
        raise ConfigError(f"{file}: has {_lines(1, len(entries))}, not {line}", f"See: hansa ledger show {file}")
    agreed = SignedCharter.load(charter)
    owner, keys = str(entries[0].body.get("owner")), agreed.verify().keys()
    if keys.get(owner) != entries[0].body.get("key"):
        raise LedgerError(
            f"{file}: is of {owner_line(entries[0])}, who does not stand in {charter} with this key",
            "Give the charter that this ledger's runs were under.",
        )
    best = _best(heads, keys, agreed.sha256, owner, line)
    if best.length > len(entries):
        raise LedgerError(
            f"{file}: has {counted(len(entries), 'entry', 'entries')}, and {owner} signed that it had {best.length}: it is an "
            "older copy, or was cut",
            f"Give {owner}'s newest ledger. If that is this one, show both to an auditor: hansa audit BUNDLE --against PATH",
        )
    if entries[best.length - 1].root != best.root:
        raise LedgerError(
            f"{file}: is not the ledger that {owner} signed {best.kind} of at {best.length} entries",
            "Show both to an auditor: hansa audit BUNDLE --against PATH",
        )
    whole = json.loads(file.read_bytes().split(b"\n")[line - 1])
    path = [step.hex() for step in Tree(entry.leaf for entry in entries).inclusion(line - 1, best.length)]
    proof = {"format": PROOF, "entry": whole, "path": path, **best.fields()}
    write_whole(to, canonical(proof) + b"\n")
    out.print(plain(f"Written to {to}: {entries[line - 1].type}, entry {line} of {owner}'s ledger. {best.in_words()}"))
    out.print(plain(f"Whoever has the charter checks it: hansa ledger check-proof {to} --charter {charter}"))


def check_proof(
    proof: Annotated[Path, typer.Argument(help="a file that `hansa ledger prove` wrote")],
    charter: Annotated[Path, typer.Option(help="the charter whose keys count")],
    form: FormatOption = Format.TEXT,
) -> int:
    """Check that an entry was signed by its owner and stands in the tree of a head or closing checkpoint, and say who signed that.

    Exit 1 when not, 2 when the file is no such proof at all.

    Example: hansa ledger check-proof proof.json --charter charter.json
    """
    agreed = SignedCharter.load(charter)
    keys = agreed.verify().keys()
    said = _read_proof(proof)
    try:
        fields = set(said)
        if fields == {"format", "entry", "path", "head"}:
            stated = _head(str(said["head"]).encode(), keys)
        elif fields == {"format", "entry", "path", "closing", "owner"}:
            of = _closing(str(said["closing"]).encode(), keys, agreed.sha256)
            named = [one for one in of if one.owner == said["owner"]]
            if not named:
                raise MessageError(f"the closing checkpoint names no ledger of {said['owner']!r}")
            stated = named[0]
        else:
            raise MessageError("a proof with other fields than one has")
        path = [bytes.fromhex(step) for step in said["path"]]
        entry = read_entry(canonical(said["entry"]), keys[stated.owner])
        verify_inclusion(entry.leaf, entry.seq, stated.length, path, bytes.fromhex(stated.root))
    except (HansaError, TypeError, ValueError) as err:
        problem = err.message if isinstance(err, HansaError) else "malformed"
        if form is Format.JSON:
            show_json({"valid": False, "problem": problem})
            return 1
        return say(f"{proof}: {problem}", "It proves nothing. Ask whoever made it for a new one.", 1)
    if form is Format.JSON:
        about = {
            "owner": stated.owner,
            "entry": entry.seq + 1,
            "time": entry.time,
            "type": entry.type,
            "body": entry.body,
        }
        head = {"length": stated.length, "root": stated.root, "signed_by": list(stated.signers), "run": stated.run}
        show_json({**about, "privacy": entry.privacy, "head": head})
        return 0
    out.print(plain(f"entry {entry.seq + 1} of {stated.owner}'s ledger, {entry.time}: {entry.type}"))
    out.print(plain(f"  {_gist(entry)}"))
    out.print(plain(stated.in_words()))
    return 0


PROOF = "hansa-inclusion/1"


@dataclass(frozen=True)
class _Stated:
    """Where somebody's ledger stood, by a signed head or a closing checkpoint.

    Attributes:
        signers: names, as the charter has them.
        run: whose end the closing checkpoint is; None for a head.
        sealed: the signed bytes, without a line break.
    """

    owner: str
    length: int
    root: str
    signers: tuple[str, ...]
    run: str | None
    sealed: bytes

    @property
    def kind(self) -> str:
        return "a head" if self.run is None else f"the closing checkpoint of run {self.run}"

    def fields(self) -> dict[str, str]:
        """What a proof has of it. A head names its owner; a checkpoint names all."""
        if self.run is None:
            return {"head": self.sealed.decode()}
        return {"closing": self.sealed.decode(), "owner": self.owner}

    def in_words(self) -> str:
        names = ", ".join(self.signers)
        under = (
            f"the head of {counted(self.length, 'entry', 'entries')}"
            if self.run is None
            else (f"the closing checkpoint of run {self.run} (at {counted(self.length, 'entry', 'entries')})")
        )
        return f"It stands under {under} that {names} signed."


def _head(sealed: bytes, keys: Mapping[str, str]) -> _Stated:
    head = read_head(sealed, keys)
    return _Stated(head.owner, head.length, head.root, _names(head.signers, keys), None, head.sealed)


def _closing(sealed: bytes, keys: Mapping[str, str], charter_sha256: str) -> list[_Stated]:
    """What a closing checkpoint states of each ledger; everyone in the charter signed it."""
    body = read_closing(sealed, keys, charter_sha256)
    run, everyone = str(body["run_id"]), tuple(keys)
    return [_Stated(one["owner"], one["length"], one["root"], everyone, run, sealed) for one in body["ledgers"]]


def _names(signers: Sequence[str], keys: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for name, key in keys.items() if key in signers)


def _read_proof(file: Path) -> dict[str, Any]:
    """The fields of a proof, none of them checked but its format.

    Raises:
        LedgerError: it cannot be read, or is no proof of this version: nothing can be judged.
    """
    hint = "Give a file that `hansa ledger prove` wrote."
    try:
        said = strict_json(file.read_bytes().removesuffix(b"\n"))
    except OSError as err:
        raise LedgerError(f"{file}: {err.strerror}", hint) from err
    except MessageError:
        said = None
    given = said.get("format") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not (isinstance(given, str) and given.startswith("hansa-inclusion/")):
        raise LedgerError(f"{file}: not a proof of an entry", hint)
    if given != PROOF:
        raise LedgerError(
            f"{file}: a proof of the format {given!r}, which this version does not know", "Take a newer Hansa."
        )
    return said


def _best(files: Sequence[Path], keys: Mapping[str, str], charter_sha256: str, owner: str, length: int) -> _Stated:
    """Of what these files state of this owner's ledger at this length or more: what most have signed, of these the longest.

    Raises:
        LedgerError: they have none, or are not what they should be.
    """
    found = [one for file in files for one in _all_stated(file, keys, charter_sha256) if one.owner == owner]
    covering = [one for one in found if one.length >= length]
    if not covering:
        where = ", ".join(map(str, files))
        most = max((one.length for one in found), default=None)
        what = "none" if most is None else f"the longest is of {counted(most, 'entry', 'entries')}"
        raise LedgerError(
            f"{where}: no head or closing checkpoint of {owner}'s ledger that covers entry {length} ({what})",
            "Has its run ended? Then everyone signed its closing checkpoint: add --heads closing/RUN.json (of a bundle; at a node "
            "state/models/RUN/closing.json). While it goes on, the heads of the next round cover what this round wrote. What was written "
            "after the last run ended, nobody else has signed before the next run.",
        )
    return max(covering, key=lambda one: (len(one.signers), one.length))


def _all_stated(file: Path, keys: Mapping[str, str], charter_sha256: str) -> list[_Stated]:
    """What a file of heads, or a closing checkpoint, states of ledgers.

    Raises:
        LedgerError: it is neither, or a line is not good.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as err:
        raise LedgerError(f"{file}: {err.strerror}", "Give heads/NAME.jsonl or closing/RUN.json of a bundle.") from err
    found: list[_Stated] = []
    for number, line in enumerate(lines, start=1):
        try:
            if _type_of(line) == CLOSING_TYPE:
                found += _closing(line, keys, charter_sha256)
            else:
                found.append(_head(line, keys))
        except MessageError as err:
            raise LedgerError(
                f"{file}:{number}: neither a signed head nor a closing checkpoint that counts under this charter: {err.message}",
                "Give heads/NAME.jsonl or closing/RUN.json of a bundle of this charter.",
            ) from err
    return found


def _type_of(line: bytes) -> object:
    """What an envelope says it holds; nothing is checked."""
    said = strict_json(line)
    return said.get("payloadType") if isinstance(said, dict) else None


def _gist(entry: Entry) -> str:
    """An entry in a few words. What its owner signed need not be what an entry of this type says: then its fields as they are."""
    try:
        return _words(entry.type, dict(entry.body))
    except (KeyError, TypeError, AttributeError, ValueError):
        return _words("", dict(entry.body))


def _words(kind: str, body: dict[str, Any]) -> str:
    match kind:
        case "genesis":
            return f"{body.get('owner')}, {body.get('role')}" + (", simulated" if body.get("simulated") else "")
        case "dataset":
            declared = body["declared"]
            told = {
                "first": "the first",
                "version": f"a version of {str(declared['of'])[:8]}",
                "overlap": f"overlaps with {str(declared['of'])[:8]}",
                "disjoint": f"collected from {declared['cutoff']} on, in no earlier one",
            }[declared["kind"]]
            return f"data set {body['dataset'][:8]} for {body['task']}, {told}; lineage {body['lineage'][:8]}"
        case "charter":
            return f"{body['name']}, until {_when(body['expires'][:16])} UTC"
        case "budget":
            b = body["budget"]
            return f"cap epsilon {b['epsilon']} at delta {b['delta']}, {body['unit']} level, {body['adjacency']}"
        case "hold" | "cohort-hold":
            return f"run {body['run_id']}: " + "; ".join(
                f"{i['count']} x {i['purpose']} {_cost(i['event'])}" for i in body["plan"]
            )
        case "debit" | "cohort-debit":
            return f"round {body['round']} {body['purpose']}{_again(body.get('masked') or {})}: {_cost(body['event'])}"
        case "commit" | "public" | "cohort-commit" | "round":
            return f"round {body['round']}"
        case "survivors":
            listed = ", ".join(body["survivors"])
            return f"round {body['round']}{_again(body)}: signed the list {listed}; agreement {body['agreement'][:8]}"
        case "refuse":
            return f"{body['reason']}: {body['detail']}"
        case "release":
            return f"run {body['run_id']} {body['why']}"
        case "run":
            return f"run {body['run_id']}"
        case "close":
            return f"run {body['run_id']} {body['why']} after {counted(body['rounds'], 'round')}"
        case "ask" | "answers":
            names = body.get("requests") or body.get("replies") or {}
            told = ", ".join(n + ("" if kind == "ask" else f" {names[n]['outcome']}") for n in names)
            return f"round {body['round']} {body['purpose']}{_again(body)}: {told}"
        case _:
            return ", ".join(f"{k} {v}" for k, v in body.items() if isinstance(v, str | int))[:100]


def _again(body: dict[str, Any]) -> str:
    """Which attempt at a round's sum it is, from the second on; the first is number 0."""
    return f", attempt {body['attempt'] + 1}" if body.get("attempt") else ""


def _cost(event: dict[str, Any]) -> str:
    if event.get("mechanism") == "none/1":
        return "UNPROTECTED"
    told = f"{counted(event['steps'], 'step')}, q {event['q']}, sigma {event['sigma']}"
    if event.get("mechanism") == "shared-gaussian/1":
        told += f", shared (quorum {event['quorum']}, colluding {event['colluding']})"
    return told
