"""The whole on one machine: real commands, real processes, mutual TLS on loopback, from keys to a verified audit."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from e2e_support import DATA, HOSPITALS, REPO, call, federation, of_type, process, rows_of, write
from hansa.clients.datasets import csv_source
from hansa.common.errors import OutputError, RunFailed
from hansa.common.tasks import load_task
from hansa.common.tasks.schema import read_table
from hansa.common.verifier import verify_bundle
from hansa.simulations.network import COORDINATOR, LocalNetwork, write_parts
from network_support import Network, Zygote

BAR_S = 60.0
"""From the moment when all are connected to the closed run, on two cores."""


@pytest.mark.slow
@pytest.mark.parametrize("names", [HOSPITALS[:2], pytest.param(HOSPITALS, marks=pytest.mark.soak)], ids=["two", "four"])
def test_hospitals_end_with_a_verified_audit_and_the_model_at_each(names, tmp_path):
    """Every command in a process of its own, as people type it; the other tests here fork them, four hospitals at a time."""
    declared = dict(zip(HOSPITALS, (240, 235, 100, 160), strict=True))
    data = {name: (f"package:heart-disease/{name}.csv", declared[name]) for name in names}
    config = write(tmp_path / "c.yaml", federation(rounds=3, data=data))
    result = process("network", config, "--out", tmp_path / "net", "--format", "json").expect(0)
    told = json.loads(result.out)
    print({what: round(value, 1) for what, value in told["seconds"].items()})
    assert told["seconds"]["training and closing"] < BAR_S
    assert told["verdict"]["verified"] is True
    assert told["verdict"]["warnings"] == []
    assert told["verdict"]["simulated"] is True
    assert {p["rounds"] for p in told["verdict"]["partners"].values()} == {3}
    assert all(0.5 < p["epsilon"] <= p["epsilon_filter"] <= 1.0 for p in told["verdict"]["partners"].values())
    assert sorted(told["models"]) == sorted(names)
    assert all(model["verified"] is True for model in told["models"].values())
    files = [
        *tmp_path.glob("net/*/state/models/*/model.safetensors"),
        tmp_path / "net" / "bundle" / "model.safetensors",
    ]
    assert len(files) == len(names) + 2
    assert len({path.read_bytes() for path in files}) == 1
    call("audit", tmp_path / "net" / "bundle").expect(0)
    # Private keys are where they were made, and nowhere else.
    keys = [path.relative_to(tmp_path / "net") for path in tmp_path.rglob("*.key")]
    assert sorted({path.parts[0] for path in keys}) == sorted([*names, COORDINATOR])
    assert not any(b"PRIVATE KEY" in p.read_bytes() for p in (tmp_path / "net" / "bundle").rglob("*") if p.is_file())
    # It can be done again in the same folder, and not beside something of the user's.
    (tmp_path / "net" / "notes.txt").write_text("mine")
    call("network", config, "--out", tmp_path / "net").expect(2).says("holds what no earlier network left: notes.txt")


@pytest.fixture(scope="module")
def net(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNetwork]:
    """Four hospitals without noise, set up once: their budgets are unbounded, so each test has runs of its own."""
    root = tmp_path_factory.mktemp("network")
    made = Network(zygote, write(root / "c.yaml", federation(rounds=20, privacy=None, rate=0.5)), root / "net")
    with made:
        made.set_up()
        yield made


@pytest.fixture
def nodes(net: LocalNetwork) -> Iterator[LocalNetwork]:
    """All nodes are started, and stopped after the test."""
    for name in net.partners:
        net.start_node(name)
    yield net
    net.stop()
    for name in net.partners:
        net.configure(name)


@pytest.fixture(scope="module")
def simulated(net: LocalNetwork) -> dict[str, Any]:
    """The weights of `hansa simulate` with the same configuration."""
    out = net.out.parent / "sim"
    call("simulate", net.out.parent / "c.yaml", "--out", out).expect(0)
    return load_file(out / "model.safetensors")


def same_weights(net: LocalNetwork, run: str, wanted: dict[str, Any]) -> None:
    for name in net.partners:
        found = load_file(net.folder(name) / "state" / "models" / run / "model.safetensors")
        assert sorted(found) == sorted(wanted)
        for tensor in wanted:
            assert np.abs(found[tensor] - wanted[tensor]).max() <= 1e-6, (name, tensor)


@pytest.mark.slow
def test_without_noise_its_weights_are_those_of_the_simulation(nodes, simulated):
    nodes.start_server("undisturbed")
    assert nodes.wait(120) == 0, nodes.log(COORDINATOR)
    nodes.stop()
    same_weights(nodes, "undisturbed", simulated)
    verdict = verify_bundle(nodes.bundle())
    assert verdict["violations"] == []
    assert all(p["epsilon"] is None for p in verdict["partners"].values())


@pytest.mark.slow
def test_killed_and_restarted_processes_finish_the_run_with_the_same_weights(nodes, simulated):
    nodes.start_server("killed")
    deadline = time.monotonic() + 120
    while (nodes.status() or {}).get("run") != "killed" or nodes.status()["round"] < 2:
        assert nodes.runs(COORDINATOR), nodes.log(COORDINATOR)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    nodes.kill(COORDINATOR)
    nodes.kill("cleveland")
    assert not nodes.runs(COORDINATOR)
    with pytest.raises(RunFailed, match="runs already"):
        nodes.start_node("hungary")
    nodes.start_node("cleveland")
    nodes.start_server("killed", resume=True)
    assert nodes.wait(120) == 0, nodes.log(COORDINATOR)
    nodes.stop()
    same_weights(nodes, "killed", simulated)
    bundle = nodes.bundle()
    assert verify_bundle(bundle)["violations"] == []
    for name in HOSPITALS:
        debits = of_type(bundle / "partners" / name / "ledger.jsonl", "debit")
        assert len([debit for debit in debits if debit["run_id"] == "killed"]) == 20, name


@pytest.mark.slow
def test_who_did_not_approve_refuses_and_the_others_go_on(net, nodes):
    net.stop("hungary")
    net.configure("hungary", approval=True)
    net.start_node("hungary")
    net.start_server("unapproved")
    assert net.wait(120) == 0, net.log(COORDINATOR)
    assert "hungary refused: not approved" in net.log(COORDINATOR)
    net.stop()
    told = net.command(COORDINATOR, "server", "status", "server.yaml", "--format", "json")
    refused = {name: partner["refused"] for name, partner in json.loads(told)["partners"].items()}
    assert refused["hungary"]["reason"] == "not approved"
    assert [name for name in refused if refused[name]] == ["hungary"]
    bundle = net.bundle()
    assert verify_bundle(bundle)["violations"] == []
    debits = of_type(bundle / "partners" / "hungary" / "ledger.jsonl", "debit")
    assert not [debit for debit in debits if debit["run_id"] == "unapproved"]
    rounds = [r for r in of_type(bundle / COORDINATOR / "ledger.jsonl", "round") if r["run_id"] == "unapproved"]
    assert [sorted(r["partners"]) for r in rounds] == [["cleveland", "switzerland", "va-long-beach"]] * 20
    # It is a partner all the same: it signed the closing and has the model.
    kept = [net.folder(name) / "state" / "models" / "unapproved" / "model.safetensors" for name in net.partners]
    assert len({path.read_bytes() for path in kept}) == 1


@pytest.mark.parametrize("name", HOSPITALS)
def test_the_files_of_a_partner_are_the_rows_of_the_simulation(tmp_path, name):
    task = load_task("heart-disease")
    held_out = write_parts(DATA / f"{name}.csv", tmp_path, task, 0.2, 3)
    split = csv_source(DATA / f"{name}.csv", task, 0.2, 3)()
    for file, rows in (("train.csv", split.train), ("public.csv", split.held_out)):
        x, y = read_table(tmp_path / file, task.schema)
        assert np.array_equal(x, rows.x.numpy())
        assert np.array_equal(y, rows.y.numpy())
    assert held_out == len(split.held_out) > 0


def test_records_on_several_lines_stay_whole(tmp_path):
    task = load_task("heart-disease")
    rows = rows_of(DATA / "cleveland.csv")[:40]
    head = [*rows[0], "note"]
    lines = [",".join(head)] + [",".join([*row.values(), f'"row {i}\r\nof, ""forty"""']) for i, row in enumerate(rows)]
    source = write(tmp_path / "source.csv", "\ufeff" + "\r\n".join(lines) + "\r\n\r\n")
    write_parts(source, tmp_path, task, 0.5, 0)
    notes = [row["note"] for file in ("train.csv", "public.csv") for row in rows_of(tmp_path / file)]
    assert sorted(notes) == sorted(f'row {i}\r\nof, "forty"' for i in range(40))


def test_nothing_held_out_writes_no_public_file(tmp_path):
    assert write_parts(DATA / "cleveland.csv", tmp_path, load_task("heart-disease"), 0.0, 3) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]


def test_what_is_in_the_folder_is_not_deleted(tmp_path):
    config = write(tmp_path / "c.yaml", federation())
    (tmp_path / "net" / COORDINATOR).mkdir(parents=True)
    (tmp_path / "net" / COORDINATOR / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds what no earlier network left: coordinator"):
        LocalNetwork(config, tmp_path / "net")
    assert (tmp_path / "net" / COORDINATOR / "thesis.txt").read_text() == "mine"
    with LocalNetwork(config, tmp_path / "other") as first:
        with pytest.raises(OutputError, match="another network runs here"):
            LocalNetwork(config, tmp_path / "other")
        assert first.folder("cleveland").is_dir()
    LocalNetwork(config, tmp_path / "other").__exit__(None, None, None)


@pytest.mark.parametrize("page", ["README.md", "docs/partner-nodes.md"])
def test_every_command_of_the_pages_exists_with_its_options(page):
    text = (REPO / page).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.S))
    inline = "\n".join(re.findall(r"`(hansa [a-z][^`|]*)`", text))
    found = [line.split("  #")[0] for line in f"{blocks}\n{inline}".splitlines() if line.startswith("hansa ")]
    assert len(found) > 6
    for line in found:
        words = shlex.split(line.replace("[", "").replace("]", ""))[1:]
        path = list(itertools.takewhile(re.compile(r"[a-z]+").fullmatch, words))[:3]
        while path and call(*path, "--help").code:  # what follows the command may be a word, too
            path.pop()
        assert path, line
        told = call(*path, "--help").expect(0).text
        assert " COMMAND " not in told, f"{line}: not a command"
        for option in (word for word in words if word.startswith("--")):
            assert option in told, f"{line}: no option {option}"


def test_the_page_names_every_command_that_a_network_uses():
    page = (REPO / "docs" / "partner-nodes.md").read_text(encoding="utf-8")
    source = (REPO / "simulations" / "network.py").read_text(encoding="utf-8")
    groups = ("identity", "charter", "node", "server", "model")
    used = set(re.findall(rf'"({"|".join(groups)})", "([a-z]+)"', source))
    assert len(used) >= 10
    assert not [f"hansa {a} {b}" for a, b in used if f"hansa {a} {b}" not in page]


def test_a_population_has_no_network(tmp_path):
    population = federation(who="task: digits\npopulation: {dataset: digits, clients: 3}")
    result = call("network", write(tmp_path / "c.yaml", population), "--out", tmp_path / "net").expect(2)
    result.says("a population has no organisations")
    assert not Path(tmp_path / "net").exists()
