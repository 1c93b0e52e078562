"""Whose folder it is, what may be deleted in it, and what untrusted text may do to a screen."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from e2e_support import call, environment, federation, write
from hansa.common import audit_cli, cli, ledger_cli, plan_cli
from hansa.common.accounting import Budget, PrivacyEvent
from hansa.common.charter import SignedCharter, in_words
from hansa.common.config import load_config
from hansa.common.errors import ConfigError, LedgerError, OutputError, RunFailed
from hansa.common.identity import TEMPORARY, Identity, write_whole
from hansa.common.ledger import Ledger
from hansa.common.plan import event_fields
from hansa.simulations.cli import _must_be_refused
from hansa.simulations.federation import LOCK, Simulation, _lock, private_folder

TEXT = federation(rounds=1)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Any]:
    """Set up a federation in tmp_path/out, as one command or the other; closed when the test ends."""
    config = load_config(write(tmp_path / "c.yaml", TEXT))
    kept: list[Simulation] = []

    def make(kind: str = "demo", **more: Any) -> Simulation:
        kept.append(Simulation(config, tmp_path, tmp_path / "out", kind=kind, **more))
        return kept[-1]

    yield make
    for simulation in kept:
        simulation.close()


def content(*roots: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for root in roots for p in root.rglob("*") if p.is_file()}


# -- whose folder ----------------------------------------------------------------------------------------------------


def test_a_demo_that_died_first_thing_does_not_take_a_later_run_with_it(tmp_path: Path, made: Any) -> None:
    out, private = tmp_path / "out", tmp_path / "out.private"
    private.mkdir()
    (private / ".demo").touch()  # what older demos wrote first
    with pytest.raises(OutputError, match="not empty"):
        made("simulate")
    (private / ".demo").unlink()
    (private / (TEMPORARY + "abcdefgh")).touch()  # what a demo leaves that dies while it claims the folder
    made("simulate").close()
    before = content(out, private)
    with pytest.raises(OutputError, match="not an earlier demo"):
        made("demo")
    assert content(out, private) == before
    assert json.loads((private / "run.json").read_text())["kind"] == "simulate"


def test_a_demo_replaces_a_demo(tmp_path: Path, made: Any) -> None:
    out, private = tmp_path / "out", tmp_path / "out.private"
    made().close()
    for name in (
        "result.json",
        f"{TEMPORARY}report.html.77",
        f"keys/{TEMPORARY}x",
        "partners/gone/ledger.jsonl",
        "heads/gone.jsonl",
    ):
        write(out / name, "old")
    (private / "old").mkdir()
    first = json.loads((private / "run.json").read_text())
    key = (private / "cleveland" / "identity.key").read_bytes()
    made().close()
    again = json.loads((private / "run.json").read_text())
    assert again["kind"] == "demo"
    assert again["runs"] != first["runs"]
    assert (private / "cleveland" / "identity.key").read_bytes() != key
    assert not (private / "old").exists()
    assert {p.name for p in out.iterdir()} == {"charter.json", "coordinator", "heads", "keys", "partners"}
    assert not (out / "partners" / "gone").exists()
    assert not (out / "heads" / "gone.jsonl").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "keys/mine.key", "partners/notes/a.txt", ".env", "coordinator/link"])
def test_a_demo_deletes_nothing_of_the_users(name: str, tmp_path: Path, made: Any) -> None:
    out, private = tmp_path / "out", tmp_path / "out.private"
    made().close()
    if name.endswith("link"):
        write(tmp_path / "elsewhere" / "ledger.jsonl", "mine")
        (out / name).symlink_to(tmp_path / "elsewhere")
    else:
        write(out / name, "three years")
    before = content(tmp_path)
    with pytest.raises(OutputError, match=rf"not a demo's: {name}(?s:.)*Nothing was deleted"):
        made()
    assert content(tmp_path) == before
    assert (private / "run.json").exists()


def test_a_demo_that_dies_while_it_deletes_is_still_a_demo(
    tmp_path: Path, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made().close()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made()
    assert json.loads((tmp_path / "out.private" / "run.json").read_text())["kind"] == "demo"
    with pytest.raises(OutputError, match="holds a run of `hansa demo`"):
        made("simulate", resume=True)
    made()


def test_one_process_at_a_time(tmp_path: Path, made: Any) -> None:
    first = made()
    before = content(tmp_path)
    for kind, resume in (("demo", False), ("simulate", False), ("simulate", True)):
        with pytest.raises(OutputError, match=r"another hansa process is working in .*out\.private"):
            made(kind, resume=resume)
    assert content(tmp_path) == before
    first.close()
    made()


def test_a_lock_on_a_deleted_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    work = fcntl.flock

    def flock(file: Any, how: int) -> None:
        (tmp_path / LOCK).unlink()  # its holder deletes it between our open and our lock
        work(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputError, match="another hansa process"):
        _lock(tmp_path)


# -- temporary files and bad input -----------------------------------------------------------------------------------


def test_temporary_files_have_an_unmistakable_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    work = os.replace

    def replace(source: str, target: Path) -> None:
        seen.append(Path(source).name)
        work(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_whole(tmp_path / "a.json", b"1")
    assert [name.startswith(".hansa-tmp-") for name in seen] == [True]


@pytest.mark.parametrize("name", [".env.template", ".vimrc.original", ".a.12.tmp", ".dataset-12345678"])
def test_the_users_hidden_files_are_not_ours(name: str, tmp_path: Path, made: Any) -> None:
    mine = write(tmp_path / "out" / name, "mine")
    with pytest.raises(OutputError, match="not empty"):
        made("simulate")
    assert not (tmp_path / "out.private").exists()
    mine.unlink()
    made("simulate").close()
    mine.write_text("mine")
    half = write(tmp_path / "out" / "keys" / f"{TEMPORARY}1", "half")
    made("simulate", resume=True)
    assert mine.read_text() == "mine"
    assert not half.exists()


@pytest.mark.parametrize("there", [(), ("out",), ("out.private",), ("out", "out.private")])
def test_bad_input_leaves_the_folders_as_they_were(there: tuple[str, ...], tmp_path: Path) -> None:
    for name in there:
        (tmp_path / name).mkdir()
    text = TEXT.replace("235", "400")
    assert text != TEXT
    call("simulate", write(tmp_path / "c.yaml", text), "--out", "out").expect(1)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")} == {"c.yaml", *there}


def test_bad_input_removes_nothing_that_came_from_elsewhere(
    tmp_path: Path, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Simulation, *_: Any) -> None:
        write(tmp_path / "out" / "thesis.txt", "saved just now")
        raise ConfigError("bad")

    monkeypatch.setattr(Simulation, "_partner", fail)
    with pytest.raises(ConfigError):
        made("simulate")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "out.private").exists()


# -- seeds, resume, the demo's refusal -------------------------------------------------------------------------------


def test_seeds_keep_private_folders_apart(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", TEXT)
    done = call("simulate", config, "--out", "out", "--seeds", "2", "--resume").expect(0)
    assert done.text.count("nothing to resume in out: starting a new run") == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"seed-3", "seed-4", "sweep.csv", "sweep.json"}
    assert {p.name for p in (tmp_path / "out.private").iterdir()} == {"seed-3", "seed-4", LOCK}
    assert not list((tmp_path / "out").rglob("identity.key"))
    assert len(list((tmp_path / "out.private").rglob("identity.key"))) == 10
    call("simulate", config, "--out", "out", "--seeds", "2").expect(2).says("holds another sweep")
    call("simulate", config, "--out", "out", "--resume").expect(2).says("out: holds a sweep", "the --sweep and --seeds")


def test_resume_says_when_there_is_nothing_to_resume(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", TEXT)
    words = "nothing to resume in out: starting a new run"
    assert words in call("simulate", config, "--out", "out", "--resume", "--format", "json").expect(0).err
    assert words not in call("simulate", config, "--out", "out", "--resume").says("written to out").text
    call("simulate", config, "--out", "out", "--resume", "--seeds", "2").expect(2).says(
        "holds a single run, not a sweep"
    )


def test_the_demo_wants_a_refusal_for_the_budget() -> None:
    def no(partner: str, reason: str) -> Any:
        return SimpleNamespace(partner=partner, reason=reason)

    _must_be_refused([no("b", "charter expired"), no("a", "budget")], "a")
    for refusals in ([], [no("a", "charter expired")], [no("b", "budget")]):
        with pytest.raises(RunFailed, match="a did not refuse"):
            _must_be_refused(refusals, "a")


# -- what stands on the screen ---------------------------------------------------------------------------------------

NASTY = "\\[conceal] [conceal]x[/] [link=http://a]y[/link] :smile: \x1b[8m \x9b8m \u202etxt \u200b end"


def shown(print_it: Any) -> str:
    file = io.StringIO()
    print_it(Console(file=file, force_terminal=True, highlight=False, soft_wrap=True, emoji=False))
    return file.getvalue()


def test_untrusted_text_is_printed_as_it_is() -> None:
    text = shown(lambda c: c.print(cli.plain(NASTY)))
    wanted = NASTY
    for bad in "\x1b\x9b\u202e\u200b":
        assert bad not in text
        wanted = wanted.replace(bad, "\ufffd")
    assert text == wanted + "\n"
    assert shown(lambda c: c.print(cli.plain("a\\") + "[bold]b[/]")) == "a\\\x1b[1mb\x1b[0m\n"
    assert cli.clean("a\nb\u2028c") == "a\ufffdb\ufffdc"
    assert cli.clean("a\n\tb\rc", lines=True) == "a\n\tb\ufffdc"


def test_a_purpose_cannot_hide_the_terms(tmp_path: Path, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    charter = made("simulate").signed.charter.model_copy(update={"purpose": r"help \[conceal] patients [/] :smile:"})
    signed = SignedCharter.unsigned(charter)
    signed.save(tmp_path / "charter.json")
    file = io.StringIO()
    settings = {"force_terminal": True, "highlight": False, "soft_wrap": True, "emoji": cli.out._emoji}
    monkeypatch.setattr(cli, "out", Console(file=file, **settings))
    call("charter", "show", "charter.json").expect(0)
    assert file.getvalue() == in_words(signed) + "\n"


def test_a_ledger_cannot_hide_its_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = Identity.generate("me")
    body = {"owner": "me", "role": "partner", "dataset": None, "simulated": True}
    ledger = Ledger(tmp_path / "l.jsonl", me, body)
    ledger.append("[conceal]\x1b[8m", {"note": r"\[conceal]\x1b" + "\x1b\nforged"})
    ledger.close()
    file = io.StringIO()
    monkeypatch.setattr(ledger_cli, "out", Console(file=file, force_terminal=True, width=300, color_system=None))
    call("ledger", "show", "l.jsonl").expect(0)
    assert "\ufffd[8m" in file.getvalue()
    assert r"\[conceal]" in file.getvalue()
    assert "\n forged" not in file.getvalue()
    assert "\x1b[8m" not in file.getvalue()


def test_the_claim_stands_under_verified_only(capsys: pytest.CaptureFixture[str]) -> None:
    verdict: dict[str, Any] = {
        "verified": True, "simulated": True, "violations": [], "warnings": [], "claim": "THE CLAIM", "partners": {},
        "checked": {"ledgers": 1, "entries": 1, "signatures": 1}, "limits": ["some"],
    }  # fmt: skip
    for verified in (True, False):
        file = io.StringIO()
        with contextlib.redirect_stdout(file):
            audit_cli.print_verdict({**verdict, "verified": verified})
        assert ("THE CLAIM" in file.getvalue()) is verified


def test_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    config = write(tmp_path / "c.yaml", TEXT)
    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "run", stop)
        call("simulate", config, "--out", "out").expect(130).says("stopped; a run goes on with --resume")
    call("simulate", config, "--out", "out", "--resume").expect(0).says("preparing ...", "auditing ...")


@pytest.mark.parametrize(
    ("number", "when", "code"),
    [(signal.SIGINT, "typer", 130), (signal.SIGTERM, "typer", 143), (signal.SIGTERM, "torch", 143)],
)
def test_stopped_while_it_starts(number: signal.Signals, when: str, code: int, tmp_path: Path) -> None:
    hook = f"lambda event, what: event == 'import' and what[0] == {when!r} and os.kill(os.getpid(), {int(number)})"
    program = f"import os, sys; from hansa.common.start import main; sys.addaudithook({hook}); main()"
    config = write(tmp_path / "c.yaml", TEXT)
    line = [sys.executable, "-c", program, "simulate", str(config), "--out", str(tmp_path / "out")]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (code, "hansa: stopped; a run goes on with --resume\n")


def test_a_fault_is_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "hansa-fault.log"
    log.write_text("older")
    log.chmod(0o644)
    modes: list[int] = []
    work = os.open
    monkeypatch.setattr(
        os, "open", lambda *a, **k: modes.append(a[2]) or work(*a, **k) if "fault" in str(a[0]) else work(*a, **k)
    )
    try:
        raise ZeroDivisionError("secret")
    except ZeroDivisionError:
        assert cli._fault() == 2
    assert "secret" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert modes == [0o600]
    log.unlink()  # every test is checked for one


# -- plan --ledger ---------------------------------------------------------------------------------------------------

EVENT = PrivacyEvent(1.0, 20.0, 2)


def book(path: Path, role: str = "partner") -> Ledger:
    me = Identity.generate("cleveland")
    return Ledger(path, me, {"owner": "cleveland", "role": role, "dataset": None, "simulated": True})


def hold(run: str, count: int, event: PrivacyEvent | None = EVENT) -> dict[str, Any]:
    return {"run_id": run, "plan": [{"purpose": "train", "count": count, "event": event_fields(event)}]}


def debit(run: str) -> dict[str, Any]:
    return {"run_id": run, "purpose": "train", "event": event_fields(EVENT)}


def test_plan_counts_what_open_runs_hold(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    budget = Budget.create(1.0, 1e-4)
    ledger = book(path)
    ledger.append("budget", {"budget": budget.to_fields()})
    ledger.append("hold", hold("a", 3))
    ledger.append("debit", debit("a"))
    ledger.append("hold", hold("b", 9))
    ledger.append("debit", debit("b"))
    ledger.append("release", {"run_id": "b", "why": "closed"})

    def planned() -> dict[str, Any]:
        return call("plan", config, "--ledger", path, "--format", "json").json()

    config = write(tmp_path / "c.yaml", TEXT)
    two, four = [PrivacyEvent(1.0, 20.0, 4)], [PrivacyEvent(1.0, 20.0, 8)]
    with_hold = planned()
    assert with_hold["epsilon_spent_before"] == budget.spent(two)
    assert with_hold["epsilon_held_before"] == budget.spent(two)
    noise = with_hold["noise_multiplier"]
    assert with_hold["epsilon_filter"] == budget.spent([*four, PrivacyEvent(1.0, noise, 2)])
    call("plan", config, "--ledger", path).says("was spent before this run", "is held by open runs")
    ledger.append("release", {"run_id": "a", "why": "closed"})
    ledger.close()
    released = planned()
    assert (released["epsilon_spent_before"], released["epsilon_held_before"]) == (budget.spent(two), 0)
    assert released["noise_multiplier"] == noise  # the charter's, whatever was spent
    assert released["noise_that_fits"] < with_hold["noise_that_fits"]


def test_plan_refuses_a_ledger_that_is_torn_or_foreign(tmp_path: Path) -> None:
    config, path = write(tmp_path / "c.yaml", TEXT), tmp_path / "l.jsonl"

    def refused(*words: str) -> None:
        call("plan", config, "--ledger", path).expect(2).says("l.jsonl", *words)

    book(path, "coordinator").close()
    refused("not a partner's ledger: cleveland (coordinator)")
    path.unlink()
    ledger = book(path)
    ledger.append("hold", {"run_id": "a"})
    ledger.close()
    refused("not what a node of Hansa writes")
    path.write_bytes(path.read_bytes()[:-5])
    refused("torn last line")
    path.write_bytes(b"")
    refused("empty")
    with pytest.raises(LedgerError):
        plan_cli._taken_before(path)
    path.write_text("a,b\n1,2\n")
    refused("l.jsonl:1")


def test_the_private_folder_is_beside_the_bundle(tmp_path: Path) -> None:
    assert private_folder(tmp_path / "x") == tmp_path / "x.private"
