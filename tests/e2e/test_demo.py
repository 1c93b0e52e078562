"""`hansa demo`: what it writes, what it shows, and that its refusal reads nothing."""

from __future__ import annotations

import json
import re
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from e2e_support import HOSPITALS, Fault, Forked, Result, call, contents, of_type
from hansa.clients.datasets import RegisteredDataset
from hansa.clients.gate import Gate
from hansa.simulations.federation import Simulation

DemoRun = tuple[Path, Result]


def test_it_ends_well_and_shows_each_step(demo_run: DemoRun) -> None:
    _, screen = demo_run
    screen.expect(0).says(
        "CHARTER heart-disease",
        "signed by everyone",
        "epsilon = 1 at delta = 0.0001",
        "cleveland refused: budget",
        "read no data",
        "VERIFIED",
        "Limits of this verdict",
        "all data pooled, no privacy",
        "measured on all partners' public test rows; rows without privacy: same lr and momentum, without clipping",
    )
    # Of fast rounds two lines a second are shown, with the first and the last.
    numbers = re.findall(r"^round +(\d+) of 10 +auc", screen.out, flags=re.M)
    assert numbers[0] == "1"
    assert numbers[-1] == "10"


def test_it_writes_every_file_and_no_other(demo_run: DemoRun) -> None:
    folder, _ = demo_run
    result = json.loads((folder / "result.json").read_text())
    second = json.loads((folder.parent / "demo.private" / "run.json").read_text())["runs"][1]
    names = [*HOSPITALS, "coordinator"]
    wanted = {"result.json", "charter.json", "model.safetensors", "report.html", "coordinator/ledger.jsonl"}
    wanted |= {f"partners/{name}/ledger.jsonl" for name in HOSPITALS} | {f"keys/{name}.pem" for name in names}
    wanted |= {f"heads/{name}.jsonl" for name in names}
    wanted |= {f"closing/{result['run_id']}.json", f"closing/{second}.json"}
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == wanted


def test_the_result_has_what_the_page_promises(demo_run: DemoRun) -> None:
    folder, _ = demo_run
    result = json.loads((folder / "result.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{16}", result["run_id"])
    assert (
        result["charter_sha256"]
        == call("charter", "show", folder / "charter.json", "--format", "json").json()["sha256"]
    )
    assert [r["round"] for r in result["rounds"]] == list(range(1, 11))
    assert all(0.5 < r["metrics"]["auc"] <= 1 for r in result["rounds"])
    assert result["final"] == result["rounds"][-1]["metrics"]
    assert set(result["partners"]) == set(HOSPITALS)
    for bill in result["partners"].values():
        assert {"declared_records", "epsilon", "epsilon_cap", "delta", "rounds"} <= set(bill)
        assert 0 < bill["epsilon"] <= bill["epsilon_cap"] == 1
        assert (bill["delta"], bill["rounds"]) == (1e-4, 10)
    assert result["baselines"]["pooled"]["auc"] > 0.85
    assert set(result["baselines"]["local"]) == set(HOSPITALS)
    assert [(r["partner"], r["reason"]) for r in result["refusals"]] == [("cleveland", "budget")]
    assert result["timings"]["total_s"] < 60


def test_the_audit_agrees_with_the_result(demo_run: DemoRun) -> None:
    folder, _ = demo_run
    verdict = call("audit", folder, "--format", "json").expect(0).json()
    result = json.loads((folder / "result.json").read_text())
    assert verdict["verified"]
    assert verdict["violations"] == verdict["warnings"] == []
    for name, bill in result["partners"].items():
        assert verdict["partners"][name]["epsilon"] == pytest.approx(bill["epsilon"], rel=1e-6)


# -- keys ------------------------------------------------------------------------------------------------------------


def secrets_of(private: Path) -> dict[str, bytes]:
    """Every secret of a run: raw private keys, and the keys of the dataset commitments."""
    found = {}
    for path in sorted(private.glob("*/identity.key")):
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        raw = (serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption())
        found[f"identity key of {path.parent.name}"] = key.private_bytes(*raw)
    for path in sorted(private.glob("*/dataset.json")):
        found[f"commitment key of {path.parent.name}"] = bytes.fromhex(json.loads(path.read_text())["key"])
    return found


def leaked(secrets: dict[str, bytes], folder: Path) -> list[str]:
    """Which secrets stand in a folder, raw, as hex or as base64 (which `contents` undoes)."""
    found = []
    for path in (p for p in folder.rglob("*") if p.is_file()):
        for data in contents(path.read_bytes()):
            found += [f"{n} in {path}" for n, s in secrets.items() if s in data or s.hex().encode() in data.lower()]
            found += [f"PEM in {path}"] if b"PRIVATE KEY" in data else []
    return found


def test_private_keys_are_apart_and_closed_to_others(demo_run: DemoRun) -> None:
    folder, _ = demo_run
    private = folder.parent / "demo.private"
    keys = list(private.glob("*/identity.key"))
    assert {p.parent.name for p in keys} == {*HOSPITALS, "coordinator"}
    secret = [*keys, *private.glob("*/dataset.json"), private / "run.json"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in secret} == {0o600}
    assert len(secrets_of(private)) == 9
    assert leaked(secrets_of(private), folder) == []


def test_the_search_for_private_keys_finds_them(demo_run: DemoRun, tmp_path: Path) -> None:
    private = demo_run[0].parent / "demo.private"
    secrets = secrets_of(private)
    (tmp_path / "a").write_bytes((private / "cleveland" / "identity.key").read_bytes())
    (tmp_path / "b").write_text(secrets["commitment key of hungary"].hex().upper())
    (tmp_path / "c").write_bytes(b"\0" + secrets["identity key of coordinator"])
    found = leaked(secrets, tmp_path)
    assert {f.split(" in ")[0] for f in found} == {
        "PEM", "identity key of cleveland", "commitment key of hungary", "identity key of coordinator"
    }  # fmt: skip


# -- the report ------------------------------------------------------------------------------------------------------


class References(HTMLParser):
    """Whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"):
            value = given.get(name)
            if value is not None and not value.startswith(("#", "data:")):
                self.found.append(f"<{tag} {name}={value}>")
        if tag in ("link", "iframe", "object", "embed", "base") or (
            tag == "meta" and given.get("http-equiv") == "refresh"
        ):
            self.found.append(f"<{tag}>")
        self._style = tag == "style"
        self._css(given.get("style") or "")

    def handle_data(self, data: str) -> None:
        if self._style:
            self._css(data)

    def _css(self, text: str) -> None:
        self.found += [
            m for m in re.findall(r"@import[^;]*|url\([^)]*\)", text) if not re.match(r"url\(['\"]?(#|data:)", m)
        ]


def references(html: str) -> list[str]:
    parser = References()
    parser.feed(html)
    return parser.found


def test_the_report_is_one_page_without_network(demo_run: DemoRun) -> None:
    html = (demo_run[0] / "report.html").read_text(encoding="utf-8")
    assert references(html) == []
    text = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    for word in (*HOSPITALS, "AUC", "pooled", "public", "Verified", "noise was really drawn"):
        assert word.lower() in text.lower(), word


def test_the_search_for_references_finds_them() -> None:
    bad = '<link rel=x href="a.css"><img src="//x/y.png"><style>@import "z"; a{background:url(http://x)}</style>'
    assert len(references(bad)) == 5


# -- the refusal -----------------------------------------------------------------------------------------------------


def test_a_second_demo_replaces_the_first_and_refuses_without_reading(
    tmp_path: Path, demo_run: DemoRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folder again, in this process, watching every reading of a dataset and every refusal."""
    import shutil

    out = tmp_path / "again"
    shutil.copytree(demo_run[0], out)
    shutil.copytree(demo_run[0].parent / "demo.private", tmp_path / "again.private")
    seen: list[str] = []

    def watch(owner: type, name: str, tell: Any) -> None:
        work = getattr(owner, name)

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(tell(self))
            return work(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(Simulation, "run", lambda s: f"run {len(s._state['runs'])}")
    watch(Simulation, "another_run", lambda s: "run 1 is over")
    watch(RegisteredDataset, "open", lambda d: "read")
    watch(Gate, "refuse", lambda g: f"{g.name} refuses")
    watch(Gate, "close_run", lambda g: "close")
    done = call("demo", "--out", out, "--format", "json").expect(0)
    report = done.json()
    assert report["verdict"]["verified"]
    assert report["result"]["run_id"] != json.loads((demo_run[0] / "result.json").read_text())["run_id"]

    first = seen[seen.index("run 1") : seen.index("run 1 is over")]
    second = seen[seen.index("run 2") : seen.index("cleveland refuses") + 2]
    assert first.count("read") == 4 * 10 * 2  # the watch sees readings: train and evaluate, ten rounds, four hospitals
    assert second == ["run 2", "cleveland refuses", "close"]
    refused = of_type(out / "partners" / "cleveland" / "ledger.jsonl", "refuse")
    assert [(r["reason"], r["round"], r["run_id"]) for r in refused] == [
        ("budget", None, report["result"]["refusals"][0]["run_id"])
    ]
    assert not of_type(out / "partners" / "hungary" / "ledger.jsonl", "refuse")
    call("audit", out).expect(0)


def test_it_replaces_nothing_but_a_demo(tmp_path: Path, demo_run: DemoRun) -> None:
    precious = tmp_path / "mine" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("three years")
    call("demo", "--out", precious.parent).expect(2).says("not empty, and not an earlier demo", "Give another --out")
    assert precious.read_text() == "three years"
    run = tmp_path / "run.private"
    run.mkdir()
    (run / "run.json").write_text("{}")  # of a run that `hansa simulate` made
    call("demo", "--out", tmp_path / "run").expect(2).says("not an earlier demo", "Give another --out")
    assert (run / "run.json").exists()


def test_a_demo_that_was_killed_anywhere_can_be_started_again(tmp_path: Path, forked: Forked) -> None:
    """Also in the first moments, when little says yet whose folder it is."""
    for number in (1, 3, 12, 60, 2, 40):
        forked.run("demo", "--out", "demo", folder=tmp_path, fault=Fault("before", number)).expect(-9)
