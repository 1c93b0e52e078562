"""`hansa ledger`: read a ledger, check it, and prove one entry of it to somebody who has no more than its head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .charter import SignedCharter
from .cli import Format, FormatOption, out, plain, public_key, say, show_json
from .errors import ConfigError, HansaError, LedgerError, MessageError
from .heads import Head, read_head
from .identity import canonical, strict_json, write_whole
from .ledger import owner_line, read_entry, read_ledger
from .merkle import Tree, verify_inclusion


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
    kind: Annotated[str | None, typer.Option("--type", help="only entries of this type")] = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Show a ledger's entries, after checking that they chain and are signed.

    Example: hansa ledger show out/demo/partners/cleveland/ledger.jsonl --type debit
    """
    entries, torn = read_ledger(file)
    chosen = [e for e in entries if kind is None or e.type == kind]
    if form is Format.JSON:
        show_json(
            {
                "entries": [{"seq": e.seq, "time": e.time, "type": e.type, "body": e.body} for e in chosen],
                "torn_bytes": len(torn),
            }
        )
        return
    if entries:
        out.print(plain(owner_line(entries[0])))
    table = Table("line", "time", "type", "what", box=None, pad_edge=False)
    for entry in chosen:
        table.add_row(
            str(entry.seq + 1), plain(entry.time), plain(entry.type), plain(_gist(entry.type, dict(entry.body)))
        )
    out.print(table)
    if torn:
        out.print(f"[yellow]torn last line: {len(torn)} bytes that a crash left; never acknowledged[/]")


def verify(
    file: Annotated[Path, typer.Argument(help="a ledger.jsonl")],
    key: Annotated[Path | None, typer.Option(help="whose ledger it must be: a public key (PEM)")] = None,
    form: FormatOption = Format.TEXT,
) -> int:
    """Check a ledger's signatures and chain. Exit 1 when it does not hold.

    Without --key the ledger is checked against the key that it names itself: that shows edits, not whose it is.

    Example: hansa ledger verify out/demo/partners/cleveland/ledger.jsonl --key out/demo/keys/cleveland.pem
    """
    public = public_key(key, "Give a public key in PEM form.") if key is not None else None
    if not file.is_file():
        raise LedgerError(f"{file}: no such file", "Give the path of a ledger.jsonl.")
    problem = None
    length, root, torn = 0, None, b""
    try:
        entries, torn = read_ledger(file, public)
        length, root = len(entries), entries[-1].root if entries else None
        if torn:
            problem = (
                f"{file}:{length + 1}: torn last line ({len(torn)} bytes): a crash while writing; never acknowledged"
            )
        elif not entries:
            problem = f"{file}: empty"
    except LedgerError as err:
        problem = err.message
    if form is Format.JSON:
        show_json({"valid": problem is None, "problem": problem, "length": length, "root": root})
    elif problem is not None:
        say(problem, "", 1)
    else:
        who = "" if public is not None else " (by the key that it names itself; give --key to check whose it is)"
        out.print(plain(f"{file}: {length} entries, signed and in one tree{who}; root {root}"))
    return 0 if problem is None else 1


def prove(
    file: Annotated[Path, typer.Argument(help="your ledger.jsonl")],
    line: Annotated[int, typer.Argument(help="the entry, as `hansa ledger show` numbers it (from 1)")],
    heads: Annotated[
        Path, typer.Option(help="signed heads: heads/NAME.jsonl of a bundle, or a node's state/heads/...jsonl")
    ],
    charter: Annotated[Path, typer.Option(help="the charter whose keys signed them")],
    to: Annotated[Path, typer.Option("--out", help="the file to write")] = Path("proof.json"),
) -> None:
    """Show one entry to somebody, and prove that it stands under a head that others have signed. The rest stays with you.

    It proves against the longest head in the file that most have signed.

    Example: hansa ledger prove ledger.jsonl 17 --heads heads/coordinator.jsonl --charter charter.json --out proof.json
    """
    entries, _ = read_ledger(file)
    if not 1 <= line <= len(entries):
        raise ConfigError(f"{file}: has lines 1 to {len(entries)}, not {line}", "See: hansa ledger show FILE")
    owner = str(entries[0].body.get("owner"))
    head = _best_head(heads, SignedCharter.load(charter).verify().keys(), owner, line)
    if head.length > len(entries) or entries[head.length - 1].root != head.root:
        raise LedgerError(
            f"{file}: is not the ledger that {owner} signed a head of at {head.length} entries",
            "Show both to an auditor: hansa audit BUNDLE --against HEADS",
        )
    whole = json.loads(file.read_bytes().split(b"\n")[line - 1])
    path = [step.hex() for step in Tree(entry.leaf for entry in entries).inclusion(line - 1, head.length)]
    write_whole(to, canonical({"format": PROOF, "entry": whole, "path": path, "head": head.sealed.decode()}) + b"\n")
    out.print(
        plain(
            f"Written to {to}: {entries[line - 1].type}, entry {line} of {owner}'s ledger. {_signed_by(head, charter)}"
        )
    )
    out.print(plain(f"Whoever has the charter checks it: hansa ledger check-proof {to} --charter {charter}"))


def check_proof(
    proof: Annotated[Path, typer.Argument(help="a file that `hansa ledger prove` wrote")],
    charter: Annotated[Path, typer.Option(help="the charter whose keys count")],
    form: FormatOption = Format.TEXT,
) -> int:
    """Check that an entry was signed by its owner and stands in the tree of a head, and say who signed that. Exit 1 when not.

    Example: hansa ledger check-proof proof.json --charter charter.json
    """
    keys = SignedCharter.load(charter).verify().keys()
    try:
        data = proof.read_bytes()
    except OSError as err:
        raise LedgerError(f"{proof}: {err.strerror}", "Give a file that `hansa ledger prove` wrote.") from err
    try:
        said = strict_json(data.removesuffix(b"\n"))
        if not isinstance(said, dict) or set(said) != {"format", "entry", "path", "head"} or said["format"] != PROOF:
            raise MessageError("not a proof")
        head = read_head(str(said["head"]).encode(), keys)
        path = [bytes.fromhex(step) for step in said["path"]]
        entry = read_entry(canonical(said["entry"]), keys[head.owner])
        verify_inclusion(entry.leaf, entry.seq, head.length, path, bytes.fromhex(head.root))
    except (HansaError, TypeError, ValueError) as err:
        problem = err.message if isinstance(err, HansaError) else "malformed"
        if form is Format.JSON:
            show_json({"valid": False, "problem": problem})
            return 1
        return say(f"{proof}: {problem}", "", 1)
    names = [name for name, key in keys.items() if key in head.signers]
    if form is Format.JSON:
        about = {
            "owner": head.owner,
            "entry": entry.seq + 1,
            "time": entry.time,
            "type": entry.type,
            "body": entry.body,
        }
        show_json(
            {**about, "privacy": entry.privacy, "head": {"length": head.length, "root": head.root, "signed_by": names}}
        )
        return 0
    out.print(plain(f"entry {entry.seq + 1} of {head.owner}'s ledger, {entry.time}: {entry.type}"))
    out.print(plain(f"  {_gist(entry.type, dict(entry.body))}"))
    out.print(plain(_signed_by(head, charter)))
    return 0


PROOF = "hansa-inclusion/1"


def _best_head(file: Path, keys: Mapping[str, str], owner: str, length: int) -> Head:
    """The longest of those heads of this owner's ledger that most have signed."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as err:
        raise LedgerError(f"{file}: {err.strerror}", "Give a file of signed heads.") from err
    heads = [
        head for head in (read_head(line, keys) for line in lines) if head.owner == owner and head.length >= length
    ]
    if not heads:
        raise LedgerError(
            f"{file}: has no head of {owner}'s ledger that covers entry {length}",
            "It is not witnessed yet; wait a round.",
        )
    return max(heads, key=lambda head: (len(head.signers), head.length))


def _signed_by(head: Head, charter: Path) -> str:
    names = [name for name, key in SignedCharter.load(charter).charter.keys().items() if key in head.signers]
    return f"It stands under the head of {head.length} entries that {', '.join(names)} signed."


def _gist(kind: str, body: dict[str, Any]) -> str:
    match kind:
        case "genesis":
            return f"{body.get('owner')}, {body.get('role')}" + (", simulated" if body.get("simulated") else "")
        case "dataset":
            declared = body["declared"]
            said = " ".join(str(v) for v in (declared["kind"], declared["of"], declared["cutoff"]) if v)
            return f"{body['dataset']}, task {body['task']}, declared {said}; lineage {body['lineage']}"
        case "budget":
            b = body["budget"]
            return f"cap epsilon {b['epsilon']} at delta {b['delta']}, {body['unit']} level, {body['adjacency']}"
        case "hold":
            return f"run {body['run_id']}: " + "; ".join(
                f"{i['count']} x {i['purpose']} {_cost(i['event'])}" for i in body["plan"]
            )
        case "debit" | "cohort-debit":
            return f"round {body['round']} {body['purpose']}: {_cost(body['event'])}"
        case "commit" | "public" | "cohort-commit" | "round":
            return f"round {body['round']}"
        case "refuse":
            return f"{body['reason']}: {body['detail']}"
        case "release":
            return f"run {body['run_id']} {body['why']}"
        case "ask" | "answers":
            names = body.get("requests") or body.get("replies") or {}
            told = ", ".join(n + ("" if kind == "ask" else f" {names[n]['outcome']}") for n in names)
            return f"round {body['round']} {body['purpose']}: {told}"
        case _:
            return ", ".join(f"{k} {v}" for k, v in body.items() if isinstance(v, str | int))[:100]


def _cost(event: dict[str, Any]) -> str:
    if event.get("mechanism") == "none/1":
        return "UNPROTECTED"
    return f"{event['steps']} steps, q {event['q']}, sigma {event['sigma']}"
