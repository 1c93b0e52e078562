"""Every command as a user meets it: help, formats, exit codes, and a charter between people with keys of OpenSSL."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.metadata import entry_points, version
from pathlib import Path

import click
import pytest
import typer

from e2e_support import HOSPITALS, Result, call, federation, process, write

DemoRun = tuple[Path, Result]

COMMANDS = [
    ["demo"], ["simulate"], ["network"], ["plan"], ["audit"], ["evidence", "accounting"],
    ["identity", "new"], ["identity", "issue"], ["identity", "install"], ["identity", "show"],
    ["identity", "verify"], ["identity", "revoke"], ["identity", "renew"],
    ["node", "init"], ["node", "dataset", "add"], ["node", "dataset", "list"], ["node", "check"], ["node", "run"], ["node", "budget"],
    ["node", "approve"], ["node", "pause"], ["node", "resume"], ["node", "withdraw"], ["node", "export"],
    ["node", "backup"], ["node", "restore"],
    ["server", "run"], ["server", "status"], ["server", "export"],
    ["model", "show"], ["model", "predict"],
    ["charter", "new"], ["charter", "show"], ["charter", "sign"], ["charter", "verify"],
    ["ledger", "show"], ["ledger", "verify"], ["ledger", "prove"], ["ledger", "check-proof"],
    ["task", "new"], ["task", "check"], ["task", "list"],
]  # fmt: skip


def all_commands() -> list[list[str]]:
    """What is really registered, at any depth."""
    app = typer.Typer()
    for entry in entry_points(group="hansa.commands"):
        entry.load()(app)

    def walk(command: click.Command, path: list[str]) -> list[list[str]]:
        if not hasattr(command, "commands"):
            return [path]
        return [found for name, child in command.commands.items() for found in walk(child, [*path, name])]

    return walk(typer.main.get_command(app), [])


def test_this_list_of_commands_is_complete() -> None:
    assert sorted(all_commands()) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example(command: list[str]) -> None:
    call(*command, "--help").expect(0).says(f"Example: hansa {' '.join(command)}")


def test_the_version_and_a_misspelt_command() -> None:
    assert call("--version").expect(0).out == f"hansa {version('hansa')}\n"
    assert call("simulat").expect(2).err.count("Did you mean") == 1


def test_help_of_the_whole_and_of_groups_names_every_command() -> None:
    call("--help").expect(0).says(
        *(
            "demo",
            "simulate",
            "network",
            "plan",
            "audit",
            "evidence",
            "charter",
            "ledger",
            "task",
            "identity",
            "node",
            "server",
            "model",
        )
    )
    call("charter", "--help").expect(0).says("new", "show", "sign", "verify")
    call("audit", "--help").expect(0).says("a bundle: the folder that a run wrote")  # click 8.5 with our typer: none


# -- formats ---------------------------------------------------------------------------------------------------------


def test_every_report_is_json_when_asked(demo_run: DemoRun, tmp_path: Path) -> None:
    folder, _ = demo_run
    config = write(tmp_path / "c.yaml", federation())
    book = folder / "partners" / "hungary" / "ledger.jsonl"
    data = Path(__file__).parents[2] / "simulations" / "data" / "heart-disease" / "hungary.csv"
    for command, key in [
        (["plan", config], "fits"),
        (["audit", folder], "verified"),
        (["charter", "show", folder / "charter.json"], "sha256"),
        (["charter", "verify", folder / "charter.json"], "valid"),
        (["ledger", "show", book], "entries"),
        (["ledger", "verify", book], "valid"),
        (["task", "check", "heart-disease", data], "rows"),
    ]:
        assert key in call(*command, "--format", "json").expect(0).json(), command
    assert {"heart-disease", "digits"} <= {t["name"] for t in call("task", "list", "--format", "json").expect(0).json()}


def test_simulate_reports_json_and_nothing_else_on_the_screen(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", federation(rounds=1))
    done = call("simulate", config, "--out", tmp_path / "out", "--format", "json").expect(0)
    assert done.err == ""
    report = done.json()
    assert report["result"]["final"]["auc"] > 0.5
    assert report["verdict"]["verified"]
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == report["result"]


def test_seeds_and_baselines_make_a_table(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", federation(rounds=1))
    done = call(
        "simulate", config, "--out", tmp_path / "out", "--seeds", "2", "--baselines", "--format", "json"
    ).expect(0)
    report = done.json()
    assert (report["seeds"], report["verified"]) == (2, 2)
    table = report["table"]
    assert {
        "all data pooled, no privacy",
        "federated, no privacy",
        *(f"{n} alone, no privacy" for n in HOSPITALS),
    } < set(table)
    assert all(row["auc"]["sd"] >= 0 for row in table.values())
    assert {"seed-3", "seed-4"} <= {p.name for p in (tmp_path / "out").iterdir()}
    # The same seeds again: refused, unless the run is to go on; every seed is a bundle of its own.
    call("simulate", config, "--out", tmp_path / "out", "--seeds", "2").expect(2).says(
        "holds another sweep", "--resume"
    )
    call("audit", tmp_path / "out" / "seed-4").expect(0)


def test_ledger_show_chooses_by_type(demo_run: DemoRun) -> None:
    book = demo_run[0] / "partners" / "cleveland" / "ledger.jsonl"
    shown = call("ledger", "show", book, "--type", "debit", "--format", "json").expect(0).json()["entries"]
    assert [e["body"]["round"] for e in shown] == list(range(1, 11))
    call("ledger", "show", book, "--type", "refuse").expect(0).says("budget: spent and held so far epsilon 1.000")


# -- exit codes ------------------------------------------------------------------------------------------------------


def test_usage(tmp_path: Path) -> None:
    call("frobnicate").expect(2).says("No such command 'frobnicate'")
    call("charter", "frobnicate").expect(2).says("No such command")
    call("audit").expect(2).says("Missing argument")
    call("audit", tmp_path, "--format", "xml").expect(2).says("'xml' is not one of 'text', 'json'")
    call("simulate", "x.yaml", "--seeds", "0").expect(2).says("seeds")
    call().expect(2).says("Usage: hansa")
    call("task").expect(2).says("Usage: hansa task")


@pytest.mark.parametrize(
    "command",
    [
        ["audit", "nowhere"],
        ["plan", "nowhere"],
        ["plan", "CONFIG", "--ledger", "nowhere"],
        ["simulate", "nowhere", "--out", "out"],
        ["charter", "show", "nowhere"],
        ["charter", "verify", "nowhere"],
        ["charter", "sign", "nowhere", "--key", "k"],
        ["charter", "sign", "CHARTER", "--key", "nowhere"],
        ["charter", "new", "nowhere", "--keys", "k"],
        ["charter", "new", "CONFIG", "--keys", "nowhere"],
        ["ledger", "show", "nowhere"],
        ["ledger", "verify", "nowhere"],
        ["ledger", "verify", "LEDGER", "--key", "nowhere"],
        ["task", "check", "heart-disease", "nowhere"],
        ["task", "check", "nowhere", "x.csv"],
    ],
    ids=" ".join,
)
def test_a_missing_file_is_named(command: list[str], demo_run: DemoRun, tmp_path: Path) -> None:
    here = {
        "CONFIG": str(write(tmp_path / "c.yaml", federation())),
        "CHARTER": str(demo_run[0] / "charter.json"),
        "LEDGER": str(demo_run[0] / "coordinator" / "ledger.jsonl"),
    }
    call(*(here.get(word, word) for word in command)).expect(2).says("hansa:", "nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", [["plan"], ["audit"], ["charter", "show"], ["ledger", "show"], ["ledger", "verify"]], ids=" ".join
)
@pytest.mark.parametrize("kind", ["folder", "binary", "empty", "unreadable-json"])
def test_a_file_of_another_kind_is_told_apart(command: list[str], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    match kind:
        case "folder":
            path.mkdir()
        case "binary":
            path.write_bytes(bytes(range(256)))
        case "empty":
            path.touch()
        case _:
            path.write_text('{"payload": "e30=", "payloadType": 1, "signatures": []}\n')
    done = call(*command, path)
    assert done.expect(done.code).code in (1, 2), done.text
    done.says("odd")


def test_a_real_process_ends_with_the_same_codes(demo_run: DemoRun, tmp_path: Path) -> None:
    process("audit", demo_run[0]).expect(0).says("VERIFIED")
    shutil.copytree(demo_run[0], tmp_path / "cut")
    book = tmp_path / "cut" / "partners" / "hungary" / "ledger.jsonl"
    book.write_bytes(b"".join(book.read_bytes().splitlines(keepends=True)[:-1]))
    process("audit", tmp_path / "cut").expect(1).says("NOT VERIFIED", "partners/hungary/ledger.jsonl")
    process("audit", tmp_path / "nowhere").expect(2).says("nowhere")


def test_the_reader_of_the_output_may_go_away(demo_run: DemoRun) -> None:
    """`hansa ledger show ... | head -1`"""
    from e2e_support import environment, script

    book = demo_run[0] / "coordinator" / "ledger.jsonl"
    shown = subprocess.run(
        ["bash", "-c", '"$@" | head -c 10', "-", *script(), "ledger", "show", str(book), "--format", "json"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert len(shown.stdout) == 10
    assert shown.stderr == ""
    for command in (
        ["ledger", "show", str(book)],
        ["ledger", "show", str(book), "--format", "json"],
        ["audit", str(demo_run[0])],
    ):
        shown = subprocess.run(
            ["bash", "-c", '"$@" | true; echo ${PIPESTATUS[0]}', "-", *script(), *command],
            env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (shown.stdout, shown.stderr) == ("141\n", ""), "neither yes nor no"


def test_plan_says_whether_it_fits(demo_run: DemoRun, tmp_path: Path) -> None:
    fits = write(tmp_path / "fits.yaml", federation(rounds=10, steps=6))
    report = call("plan", fits, "--format", "json").expect(0).json()
    assert report["fits"]
    assert 0.9 < report["epsilon"] <= report["epsilon_filter"] <= 1
    bold = federation(
        privacy="{kind: local, epsilon: 1.0, delta: 1.0e-4, clip_norm: 1.0, noise_multiplier: 2.0}", rounds=10
    )
    call("plan", write(tmp_path / "bold.yaml", bold)).expect(1).says(
        "does not fit", "such round", "Fewer rounds, more noise"
    )
    assert not call("plan", tmp_path / "bold.yaml", "--format", "json").expect(1).json()["fits"]
    # On a data set that spent its budget the same run no longer fits: its noise is the charter's, and no ledger changes it.
    spent = demo_run[0] / "partners" / "cleveland" / "ledger.jsonl"
    call("plan", fits, "--ledger", spent).expect(1).says(
        "was spent before this run",
        "is left",
        "does not fit: the node with this ledger would refuse it",
        "0 such rounds",
    )
    refused = call("plan", fits, "--ledger", spent, "--format", "json").expect(1).json()
    assert refused["noise_multiplier"] == report["noise_multiplier"]
    assert refused["stops"] == ["the ledger's budget"]
    call("plan", write(tmp_path / "none.yaml", federation(privacy=None))).expect(0).says("epsilon is unbounded")


def test_charter_verify_and_ledger_verify(demo_run: DemoRun, bundle: Path) -> None:
    folder, _ = demo_run
    book = folder / "partners" / "hungary" / "ledger.jsonl"
    call("charter", "verify", folder / "charter.json").expect(0).says("signed by cleveland, hungary")
    call("ledger", "verify", book).expect(0).says("give --key to check whose it is")
    call("ledger", "verify", book, "--key", folder / "keys" / "hungary.pem").expect(0)
    call("ledger", "verify", book, "--key", folder / "keys" / "cleveland.pem").expect(1).says(
        "ledger.jsonl:1", "not signed by"
    )
    call("ledger", "verify", book, "--key", folder / "charter.json").expect(2).says("charter.json", "PEM")

    book = bundle / "partners" / "hungary" / "ledger.jsonl"
    lines = book.read_bytes().splitlines(keepends=True)
    book.write_bytes(b"".join(lines[:5] + lines[6:]))
    done = call("ledger", "verify", book, "--format", "json").expect(1).json()
    assert not done["valid"]
    assert "ledger.jsonl:6: sequence number 6, wanted 5" in done["problem"]
    book.write_bytes(b"".join(lines)[:-20])
    call("ledger", "verify", book).expect(1).says(f"ledger.jsonl:{len(lines)}: torn last line")
    call("ledger", "show", book).expect(1).says("torn last line", "somebody cut the file")


# -- a charter between people ----------------------------------------------------------------------------------------


def make_key(folder: Path, name: str) -> Path:
    """A key pair as `hansa charter new --help` says to make one."""
    key, public = folder / f"{name}.key", folder / "public" / f"{name}.pem"
    public.parent.mkdir(exist_ok=True)
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)], check=True)
    subprocess.run(["openssl", "pkey", "-in", str(key), "-pubout", "-out", str(public)], check=True)
    return key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_a_charter_is_drafted_signed_and_verified_with_keys_of_openssl(tmp_path: Path) -> None:
    config = write(tmp_path / "federation.yaml", federation())
    keys = {name: make_key(tmp_path, name) for name in (*HOSPITALS, "coordinator")}
    charter = tmp_path / "charter.json"
    new = ["charter", "new", config, "--keys", tmp_path / "public", "--out", charter]
    call(*new).expect(0).says("not yet signed by: cleveland, hungary", "Written to")
    call(*new).expect(2).says("exists", "Give another --out")
    call("charter", "verify", charter).expect(1).says(
        "not signed by cleveland, hungary, switzerland, va-long-beach, coordinator"
    )

    first = keys.pop("cleveland")
    for answer in ("", "n\n"):
        call("charter", "sign", charter, "--key", first, stdin=answer).expect(1).says(
            "Compare every fingerprint", "stopped"
        )
    first.chmod(0o644)
    call("charter", "sign", charter, "--key", first, "--yes").expect(2).says("readable by others", "chmod 600")
    first.chmod(0o600)
    assert len(call("charter", "show", charter, "--format", "json").json()["missing"]) == 5
    call("charter", "sign", charter, "--key", first, stdin="y\n").expect(0).says("Still to sign: hungary")
    stranger = make_key(tmp_path, "stranger")
    call("charter", "sign", charter, "--key", stranger, "--yes").expect(2).says("does not stand in this charter")
    for key in reversed(keys.values()):
        call("charter", "verify", charter).expect(1).says("not signed by")
        call("charter", "sign", charter, "--key", key, "--yes").expect(0)
    call("charter", "verify", charter).expect(0).says(
        "signed by cleveland, hungary, switzerland, va-long-beach, coordinator"
    )
    shown = call("charter", "show", charter, "--format", "json").expect(0).json()
    assert shown["missing"] == []
    assert shown["charter"]["simulated"] is False
    before = charter.read_bytes()
    call("charter", "sign", charter, "--key", first, "--yes").expect(0)  # signing again changes nothing
    assert charter.read_bytes() == before


def test_a_draft_needs_everyones_key(tmp_path: Path) -> None:
    config = write(tmp_path / "federation.yaml", federation())
    (tmp_path / "keys").mkdir()
    call("charter", "new", config, "--keys", tmp_path / "keys").expect(2).says(
        "keys/cleveland.pem", "Put the public key of cleveland there"
    )
    (tmp_path / "keys" / "cleveland.pem").write_text("-----BEGIN PUBLIC KEY-----\nnot one\n")
    call("charter", "new", config, "--keys", tmp_path / "keys").expect(2).says("cleveland.pem: not a public key")
    assert not (tmp_path / "charter.json").exists()
