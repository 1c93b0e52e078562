"""Canary rows: records with distinctive values, sought in everything that leaves their partner.

Sought as text and as float32 and float64 in both byte orders, raw and as the scaled feature, through every layer of
base64, in every message of the Grid (both ways), on the screen, and in every file outside of the partner's own folder and
its data. What may cross is listed by name in `CROSSINGS`; the search covers it all the same.
"""

from __future__ import annotations

import base64
import json
import random
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2e_support import call, contents, federation, write, write_rows
from hansa.clients.app import Node
from hansa.clients.datasets import Split, csv_source
from hansa.clients.gate import Gate
from hansa.common.errors import Refusal, Refused
from hansa.common.flower import Message
from hansa.common.tasks import load_task
from hansa.simulations.grid import InProcessGrid

# Kind of reply -> names of its tensors. Nothing else may leave a node.
CROSSINGS: dict[str, set[str]] = {
    "update": {"weight", "bias"},  # noised before it leaves
    "scores": {"scores", "labels"},  # of rows that were registered as public
    "histogram": {"histogram"},  # noised before it leaves
    "accepted": set(),
    "refused": set(),
    "head": set(),
    "signature": set(),
    "failed": set(),
    "kept": set(),
}
# Beside a round's answer: where the node's ledger stands, and its signatures under where others' stand.
HEADS = {"head", "witnessed", "stands"}
FIELDS = {
    "refused": {"reason", "detail"}, "head": {"length", "root"}, "signature": {"signature"}, "update": HEADS, "failed": HEADS,
}  # fmt: skip

SEED = 3  # of `federation`
PARTNERS = ("ebony", "ivory", "umber")
ROWS, DECLARED = {"ebony": 2953, "ivory": 2939, "umber": 2971}, 2400
COLUMNS = {"alpha": (0.0, 1000.0), "beta": (-5.0, 5.0), "gamma": (0.0, 1.0e6)}
CANARIES = {
    "ebony": {"alpha": 123.456, "beta": 2.718281, "gamma": 77777.125, "breed": "xoloitzcuintli"},
    "ivory": {"alpha": 654.321, "beta": -3.141592, "gamma": 31337.375, "breed": "affenpinscher"},
    "umber": {"alpha": 919.293, "beta": 1.618033, "gamma": 424242.875, "breed": "bergamasco"},
}
SCHEMA = """\
columns:
  alpha: {type: number, min: 0, max: 1000, required: true}
  beta: {type: number, min: -5, max: 5, required: true}
  gamma: {type: number, min: 0, max: 1000000, required: true}
  breed: {type: category, values: [mongrel, xoloitzcuintli, affenpinscher, bergamasco], required: true}
label:
  column: outcome
  classes: [well, ill]
  values: {"no": well, "yes": ill}
"""
TASK = """\
from pathlib import Path
from torch import nn
from hansa.common.tasks import Task
from hansa.common.tasks.schema import load_schema
SCHEMA = load_schema(Path(__file__).with_name("schema.yaml"))
task = Task("canary", "canaries", SCHEMA, SCHEMA.label.classes, lambda: nn.Linear(SCHEMA.shape[0], 2))
"""


@pytest.fixture(scope="module", autouse=True)
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A plug-in task, installed as far as `importlib.metadata` can tell."""
    site = tmp_path_factory.mktemp("site")
    write(site / "canary_task" / "__init__.py", TASK)
    write(site / "canary_task" / "schema.yaml", SCHEMA)
    write(site / "canary_task-1.dist-info" / "METADATA", "Metadata-Version: 2.1\nName: canary-task\nVersion: 1\n")
    write(site / "canary_task-1.dist-info" / "entry_points.txt", "[hansa.tasks]\ncanary = canary_task:task\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield


@dataclass
class Traffic:
    """Everything that crossed the Grid, by partner."""

    requests: dict[str, list[bytes]] = field(default_factory=dict)
    replies: dict[str, list[bytes]] = field(default_factory=dict)
    manifests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # partner, payload of a reply
    tensors: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)  # partner, kind, arrays of a reply


def parts_of(message: Message) -> Iterator[bytes]:
    """Every byte string and every text of a message, metadata included."""
    yield repr(message.metadata).encode()
    if message.has_error():
        yield repr(message.error).encode()
        return
    for record in message.content.values():
        for value in record.values():
            yield value.data if hasattr(value, "data") else value if isinstance(value, bytes) else repr(value).encode()


def listen(patch: pytest.MonkeyPatch) -> Traffic:
    """Tap the Grid."""
    traffic, deliver = Traffic(), InProcessGrid._deliver

    def tapped(self: InProcessGrid, message: Message) -> Message:
        partner = PARTNERS[message.metadata.dst_node_id - 1]
        traffic.requests.setdefault(partner, []).extend(parts_of(message))
        reply = deliver(self, message)
        traffic.replies.setdefault(partner, []).extend(parts_of(reply))
        assert not reply.has_error(), reply.error
        sealed = json.loads(reply.content["manifest"]["sealed"])
        manifest = json.loads(base64.b64decode(sealed["payload"]))
        traffic.manifests.append((partner, manifest))
        arrays = [a.data for a in reply.content["chunks"].values()]
        made = zip(manifest["tensors"], arrays, strict=True)
        found = {s["name"]: np.frombuffer(a, s["dtype"]).reshape(s["shape"]) for s, a in made}
        traffic.tensors.append((partner, manifest["kind"], found))
        return reply

    patch.setattr(InProcessGrid, "_deliver", tapped)
    return traffic


@dataclass
class Run:
    """What a run left behind."""

    folder: Path
    traffic: Traffic
    screen: str

    def split(self, partner: str) -> Split:
        """A partner's rows as its node has them."""
        return csv_source(self.folder / f"{partner}.csv", load_task("canary"), 0.2, SEED)()

    def outside(self, partner: str) -> Iterator[tuple[str, bytes]]:
        """Everything that a partner does not keep to itself: where it is, and its bytes, base64 undone."""
        own = self.folder / "out.private" / partner
        files = [p for root in ("out", "out.private") for p in sorted((self.folder / root).rglob("*")) if p.is_file()]
        for path in (p for p in files if not p.is_relative_to(own)):
            yield from ((str(path.relative_to(self.folder)), data) for data in contents(path.read_bytes()))
        for way in (self.traffic.requests, self.traffic.replies):
            told = "request" if way is self.traffic.requests else "reply"
            for name, messages in way.items():
                yield from ((f"{told} {name}", data) for message in messages for data in contents(message))
        yield "screen", self.screen.encode()


def make_run(folder: Path, patch: pytest.MonkeyPatch, evaluation: str) -> Run:
    """Three partners with canaries among their rows, trained with privacy, and what crossed."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(5)
    for name in PARTNERS:
        write_rows(folder / f"{name}.csv", data_of(name, rng))
    config = federation(
        rounds=2,
        evaluation=evaluation,
        data={name: (f"{name}.csv", DECLARED) for name in PARTNERS},
    ).replace("task: heart-disease", "task: canary")
    traffic = listen(patch)
    done = call("simulate", write(folder / "c.yaml", config), "--out", folder / "out")
    return Run(folder, traffic, done.text)


def data_of(name: str, rng: random.Random) -> list[dict[str, str]]:
    """A partner's rows, ten of them canaries (about eight are trained on)."""
    rows = []
    for number in range(ROWS[name]):
        row = {c: f"{rng.uniform(low, high):.2f}" for c, (low, high) in COLUMNS.items()}
        rows.append({**row, "breed": "mongrel", "outcome": "yes" if number % 2 else "no"})
    for row in rng.sample(rows, 10):
        row.update({column: str(value) for column, value in CANARIES[name].items()})
    return rows


def patterns(name: str) -> dict[str, bytes]:
    """What a partner's canaries look like."""
    found: dict[str, bytes] = {}
    for column, value in CANARIES[name].items():
        if isinstance(value, str):
            found[f"{column} as text"] = value.encode()
            continue
        low, high = COLUMNS[column]
        scaled = (value - low) / (high - low) * 2 - 1
        found[f"{column} as text"] = str(value).encode()
        for what, number in (("raw", value), ("scaled", scaled)):
            single = np.float32(number)
            found[f"{column} {what} as text of float64"] = repr(float(number)).encode()
            found[f"{column} {what} as text of float32"] = str(single).encode()
            found[f"{column} {what} as text of float32 widened"] = repr(float(single)).encode()
            found[f"{column} {what} as float32 widened"] = struct.pack("<d", float(single))
            for order, mark in (("little", "<"), ("big", ">")):
                found[f"{column} {what} as float32, {order}"] = struct.pack(f"{mark}f", number)
                found[f"{column} {what} as float64, {order}"] = struct.pack(f"{mark}d", number)
    return found


def canaries_in(run: Run) -> list[str]:
    """Where canaries are outside of their partner."""
    return sorted(
        {
            f"{name}: {what} in {where}"
            for name in PARTNERS
            for what, pattern in patterns(name).items()
            for where, data in run.outside(name)
            if pattern in data
        }
    )


def sizes_in(run: Run, sizes: dict[str, list[int]]) -> list[str]:
    """Where a partner's numbers of rows stand outside of it, as words of text or as 64-bit numbers."""
    found = set()
    for name, numbers in sizes.items():
        words = "|".join(f"{n}|{n:,}" for n in numbers)
        text = re.compile(rf"(?<![\w.,+/=-])({words})(?![\w+/=-])".encode())
        binary = [struct.pack(f, n) for n in numbers for f in ("<q", ">q", "<d", ">d")]
        found |= {
            f"{name}: in {where}"
            for where, data in run.outside(name)
            if text.search(data) or any(b in data for b in binary)
        }
    return sorted(found)


EVALUATIONS = {
    "public": "{kind: public, test_fraction: 0.2}",
    "private": "{kind: private, test_fraction: 0.2, noise_multiplier: 20.0}",
}


@pytest.fixture(scope="module", params=EVALUATIONS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Run]]:
    with pytest.MonkeyPatch.context() as patch:
        yield request.param, make_run(tmp_path_factory.mktemp("run"), patch, EVALUATIONS[request.param])


def test_the_canaries_are_trained_on(run: tuple[str, Run]) -> None:
    assert "VERIFIED" in run[1].screen
    for name in PARTNERS:
        split = run[1].split(name)
        told = {DECLARED, 600}  # the declared size, and the deadline in seconds
        assert not told & {len(split.train), len(split.held_out), ROWS[name]}, "sizes that mean something else as well"
        scaled = np.float32((CANARIES[name]["alpha"] - 0.0) / 1000.0 * 2 - 1)
        assert int((split.train.x == scaled).any(1).sum()) >= 5, "the pattern is what the model sees, and it sees it"
        data = (run[1].folder / f"{name}.csv").read_bytes()
        assert all(str(v).encode() in data for v in CANARIES[name].values())


def test_no_canary_leaves(run: tuple[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = canaries_in(run[1])
    if found and all("as float32," in place for place in found):
        # Four bytes can be equal by chance (about 1 in 500 runs); a leak is there every time.
        found = canaries_in(make_run(tmp_path / "again", monkeypatch, EVALUATIONS[run[0]]))
    assert found == []


def test_only_listed_replies_cross(run: tuple[str, Run]) -> None:
    kind, made = run
    wanted = {"accepted", "update", "head", "signature", "kept", "scores" if kind == "public" else "histogram"}
    assert {m["kind"] for _, m in made.traffic.manifests} == wanted
    for _, manifest in made.traffic.manifests:
        assert {t["name"] for t in manifest["tensors"]} == CROSSINGS[manifest["kind"]]
        assert set(manifest["fields"]) == FIELDS.get(manifest["kind"], set())
    features = load_task("canary").schema.shape[0]
    for name, what, tensors in made.traffic.tensors:
        if what == "update":
            assert {n: t.shape for n, t in tensors.items()} == {"weight": (2, features), "bias": (2,)}
        if what == "histogram":
            assert not np.array_equal(tensors["histogram"], tensors["histogram"].round()), "counts without noise"
        if what == "scores":  # of the public rows, and of no other
            split = made.split(name)
            assert np.array_equal(tensors["labels"], split.held_out.y.numpy())
            assert tensors["scores"].shape == (len(split.held_out), 2)


def test_sizes_do_not_leave(run: tuple[str, Run]) -> None:
    """The real number of rows stands nowhere; that of public rows is public, that of private ones is not."""
    kind, made = run
    splits = {name: made.split(name) for name in PARTNERS}
    held_out = {name: len(split.held_out) for name, split in splits.items()}
    sizes = {name: [len(split.train), ROWS[name]] for name, split in splits.items()}
    if kind == "private":
        sizes = {n: [*numbers, held_out[n]] for n, numbers in sizes.items()}
    else:
        assert "ebony: in reply ebony" in sizes_in(made, {"ebony": [held_out["ebony"]]})
    assert sizes_in(made, sizes) == []
    assert sizes_in(made, {"ebony": [DECLARED]}), "the declared size is public, and this search sees it"


# -- the search finds what leaks -------------------------------------------------------------------------------------


def leak_text_in_a_field(patch: pytest.MonkeyPatch) -> str:
    close = Gate.close_run
    patch.setattr(Gate, "close_run", lambda *args: {**close(*args), "note": "123.456"})
    return "ebony: alpha as text in reply"


def leak_text_in_a_ledger(patch: pytest.MonkeyPatch) -> str:
    append = Gate._append

    def leaky(self: Gate, kind: str, body: Any, *more: Any) -> None:
        append(self, kind, {**body, "detail": "first row: xoloitzcuintli"} if kind == "public" else body, *more)

    patch.setattr(Gate, "_append", leaky)
    return "ebony: breed as text in out/partners/ebony/ledger.jsonl"


def leak_float32_in_the_update(patch: pytest.MonkeyPatch) -> str:
    import hansa.clients.app as app

    train = app.train_locally

    def leaky(model: Any, loss: Any, weights: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        update = train(model, loss, weights, rows, *args, **kwargs)
        canary = np.float32(CANARIES["ebony"]["beta"] / 5)
        for row in rows.x[(rows.x == canary).any(1)][:1]:
            update["weight"][0] = row.numpy()
        return update

    patch.setattr(app, "train_locally", leaky)
    return "ebony: beta scaled as float32, little in reply ebony"


def leak_a_refusal(patch: pytest.MonkeyPatch) -> str:
    train = Node.train

    def leaky(self: Node, request: Any, digest: str, tensors: Any) -> Any:
        if self._gate.name == "ebony" and request.round == 2:
            rows = self._dataset.open().train.x
            value = rows[(rows == np.float32(123.456 / 500 - 1)).any(1)][0, 0].item()
            raise Refused(Refusal.DATA, f"cannot use {value!r}")
        return train(self, request, digest, tensors)

    patch.setattr(Node, "train", leaky)
    return "ebony: alpha scaled as text of float32 widened in "


@pytest.mark.parametrize(
    "leak", [leak_text_in_a_field, leak_text_in_a_ledger, leak_float32_in_the_update, leak_a_refusal]
)
def test_a_planted_leak_is_found(leak: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = leak(monkeypatch)
    found = canaries_in(make_run(tmp_path / "run", monkeypatch, EVALUATIONS["public"]))
    assert any(place.startswith(where) for place in found), found


def test_a_planted_size_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Gate._append

    def leaky(self: Gate, kind: str, body: Any, *more: Any) -> None:
        (_, dataset), *_ = self._charters.values() or [(None, None)]
        append(self, kind, {**body, "rows": len(dataset.open().train)} if kind == "commit" else body, *more)

    monkeypatch.setattr(Gate, "_append", leaky)
    made = make_run(tmp_path / "run", monkeypatch, EVALUATIONS["public"])
    found = sizes_in(made, {"ebony": [len(made.split("ebony").train)]})
    assert "ebony: in out/partners/ebony/ledger.jsonl" in found
