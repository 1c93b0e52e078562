"""Real artefacts to start from: keys, charters, a federation that ran, certificates. Made once a process, when they are asked for."""

from __future__ import annotations

import atexit
import base64
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

from fuzz.mutate import bent
from hansa.common.identity import Envelope, Identity, sha256, strict_json, write_envelope

NAMES = ("ada", "ben", "cy", "coordinator")


@functools.cache
def identity(name: str) -> Identity:
    from support import identity as fixed

    return fixed(name)


@functools.cache
def keys() -> dict[str, str]:
    return {name: identity(name).key for name in NAMES}


@functools.cache
def scratch() -> Path:
    """A folder in memory, gone when the process ends."""
    where = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="hansa-fuzz-", dir=where if where.is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def file(data: bytes, name: str = "input") -> Path:
    """The bytes as a file."""
    path = scratch() / name
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def seal(kind: str, payload: bytes, *who: Identity) -> bytes:
    """One envelope, signed by these."""
    return write_envelope(Envelope(kind, payload, tuple((i.key, i.sign(kind, payload)) for i in who)))


@functools.cache
def charter() -> Any:
    from support import charter as signed

    return signed(expires=datetime(2027, 1, 1, tzinfo=UTC))


# -- a federation that ran -------------------------------------------------------------------------------------------------


@functools.cache
def people() -> dict[str, Identity]:
    return {name: identity(name) for name in ("cleveland", "hungary", "coordinator")}


def everyone() -> dict[str, Identity]:
    """Of any bundle here."""
    return {**people(), "switzerland": identity("switzerland")}


@functools.cache
def bundle(kind: str = "private") -> Path:
    """Two hospitals, two rounds, keys that are known here.

    Args:
        kind: of evaluation; "shared": three hospitals that share their noise under secure aggregation.
    """
    from support import HEART, config, run

    out = scratch() / f"bundle-{kind}"
    shared = kind == "shared"
    privacy = {"epsilon": 100.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 10.0}
    settings = config(
        partners={name: HEART[name] for name in ("cleveland", "hungary", *["switzerland"] * shared)},
        quorum=3 if shared else 1,
        algorithm={
            "rounds": 2,
            "local": {"steps": 1 if shared else 2, "sampling_rate": 0.5, "optimizer": {"lr": 0.2}},
        },
        privacy={**privacy, "kind": "shared" if shared else "local"},
        evaluation={"kind": "private", "noise_multiplier": 40.0}
        if kind == "private"
        else {"kind": "public" if shared else kind},
        secure_aggregation={"colluding": 1, "retries": 1} if shared else None,
    )
    shutil.rmtree(out, ignore_errors=True)
    with mock.patch.object(Identity, "generate", lambda name: identity(name)):
        run(settings, out)
    for path in list(out.iterdir()):  # what a partner or coordinator keeps for itself is no part of a bundle
        if path.name not in BUNDLE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return out


BUNDLE = ("charter.json", "closing", "coordinator", "heads", "keys", "model.safetensors", "partners", "result.json")


def packed(folder: Path) -> bytes:
    """A folder as one byte string: names, lengths, bytes."""
    parts = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        parts.append(b"%s\n%d\n%s" % (str(path.relative_to(folder)).encode(), len(data), data))
    return b"".join(parts)


def unpacked(data: bytes, to: Path) -> None:
    """Back from `packed`, as far as it goes; names stay inside."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for _ in range(100):
        name, _, rest = data.partition(b"\n")
        size, _, rest = rest.partition(b"\n")
        if not size.isdigit() or len(size) > 8:
            return
        length, path = int(size), name.decode("utf-8", "replace")
        data = rest[length:]
        good = all(part not in ("", ".", "..") and "\0" not in part and len(part) < 60 for part in path.split("/"))
        if good and path.count("/") < 6:
            place = to / path
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(rest[:length])
            except OSError:  # a folder of that name, say
                continue


def drafted(folder: Path) -> dict[str, Any]:
    """A bundle as plain JSON that a liar edits: nothing in it is signed; `signed` makes it a bundle again."""
    ledgers: dict[str, list[Any]] = {}
    for path in sorted(folder.glob("**/ledger.jsonl")):
        ledgers[str(path.parent.relative_to(folder))] = [line_of(line) for line in path.read_bytes().splitlines()]
    closing = {p.stem: payload_of(p.read_bytes()) for p in sorted((folder / "closing").iterdir())}
    heads = {
        p.stem: [{"says": payload_of(line), "by": signers(line)} for line in p.read_bytes().splitlines()]
        for p in sorted((folder / "heads").glob("*.jsonl"))
    }
    return {
        "charter": payload_of((folder / "charter.json").read_bytes()),
        "ledgers": ledgers,
        "closing": closing,
        "heads": heads,
        "result": json.loads((folder / "result.json").read_bytes()),
        "who": [*sorted(p.name for p in (folder / "partners").iterdir()), "coordinator"],
        "model": (folder / "model.safetensors").read_bytes().hex(),
        "origin": {  # by what the charter and the ledgers are named above: `signed` puts new names in their place
            "charter": sha256(bent(payload_of((folder / "charter.json").read_bytes()))),
            "roots": {
                root: [str(path.parent.relative_to(folder)), n]
                for path in folder.glob("**/ledger.jsonl")
                for n, root in enumerate(old_roots(path))
            },
        },
    }


def line_of(line: bytes) -> dict[str, Any]:
    whole = strict_json(line)
    return {"body": whole.get("body"), "privacy": payload_of_envelope(whole["envelope"])["privacy"]}


def payload_of_envelope(envelope: Mapping[str, Any]) -> Any:
    return strict_json(base64.b64decode(envelope["payload"]))


def payload_of(sealed: bytes) -> Any:
    return payload_of_envelope(strict_json(sealed.strip()))


def signers(sealed: bytes) -> list[str]:
    names = {i.key: name for name, i in everyone().items()}
    return [names[s["keyid"]] for s in strict_json(sealed)["signatures"]]


def ledger_bytes(entries: Any, who: Identity) -> tuple[bytes, list[str]]:
    """The lines that this signer would write of them, and the roots after each: chained, hashed and signed as they should be.

    An entry is {"body", "privacy"}; {"header": {...}} changes fields of its header; without a body it is undisclosed.
    """
    from hansa.common.ledger import ENTRY_TYPE
    from hansa.common.merkle import Tree, leaf_hash

    tree, lines, roots = Tree(), [], []
    for seq, entry in enumerate(entries):
        body = entry.get("body")
        header = {
            "v": 2,
            "seq": seq,
            "root": tree.root().hex(),
            "body_sha256": sha256(bent(body)),
            "privacy": entry.get("privacy"),
        }
        payload = bent({**header, **entry.get("header", {})})
        envelope = seal(ENTRY_TYPE, payload, who)
        shown = b"" if body is None or entry.get("hidden") else b'"body":' + bent(body) + b","
        lines.append(b"{" + shown + b'"envelope":' + envelope + b"}\n")
        tree.append(leaf_hash(payload))
        roots.append(tree.root().hex())
    return b"".join(lines), roots


def signed(draft: Any, to: Path) -> None:
    """Write a drafted bundle, properly signed by everyone: roots in closings and heads follow the ledgers, where they were true."""
    from hansa.common.charter import CHARTER_TYPE
    from hansa.common.closing import CLOSING_TYPE
    from hansa.common.heads import HEAD_TYPE
    from hansa.common.identity import public_pem

    known = everyone()
    order = [known[name] for name in draft.get("who", ("cleveland", "hungary", "coordinator"))]
    was_named, was = draft["origin"]["charter"], draft["origin"]["roots"]
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    payload = bent(draft["charter"])
    (to / "charter.json").write_bytes(seal(CHARTER_TYPE, payload, *order) + b"\n")
    named = sha256(payload)
    if named != was_named:  # what names the old charter names the new one
        draft = json.loads(json.dumps(draft).replace(str(was_named), named))
    now: dict[str, list[str]] = {}
    for place, entries in draft["ledgers"].items():
        name = str(place).rpartition("/")[2]
        data, now[place] = ledger_bytes(entries, known.get(name, known["coordinator"]))
        target = to / clean(str(place))
        target.mkdir(parents=True, exist_ok=True)
        (target / "ledger.jsonl").write_bytes(data)

    def fixed(said: Any) -> Any:
        if isinstance(said, dict) and isinstance(said.get("root"), str) and said["root"] in was:
            place, n = was[said["root"]]
            if now.get(place):
                n = min(n, len(now[place]) - 1)
                return {**said, "root": now[place][n], "length": n + 1}
        return said

    (to / "closing").mkdir()
    for run_id, said in draft["closing"].items():
        if isinstance(said, dict) and isinstance(said.get("ledgers"), list):
            said = {**said, "ledgers": [fixed(one) for one in said["ledgers"]]}
        (to / "closing" / f"{clean(str(run_id))}.json").write_bytes(seal(CLOSING_TYPE, bent(said), *order) + b"\n")
    (to / "heads").mkdir()
    for holder, heads in draft["heads"].items():
        lines = [seal(HEAD_TYPE, bent(fixed(h["says"])), *(known[name] for name in h["by"])) for h in heads]
        (to / "heads" / f"{clean(str(holder))}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    (to / "keys").mkdir()
    for one in order:
        (to / "keys" / f"{one.name}.pem").write_bytes(public_pem(one.key))
    (to / "result.json").write_bytes(json.dumps(draft["result"]).encode())
    model = draft.get("model")
    found = (bundle() / "model.safetensors").read_bytes() if model is None else bytes.fromhex(model)
    (to / "model.safetensors").write_bytes(found)


@functools.cache
def old_roots(path: Path) -> list[str]:
    from hansa.common.ledger import read_ledger

    return [entry.root for entry in read_ledger(path)[0]]


def clean(name: str) -> str:
    return "/".join(part for part in name.replace("\0", "").split("/")[:4] if part not in ("", ".", ".."))[:80] or "x"
