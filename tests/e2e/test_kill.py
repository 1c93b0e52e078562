"""`kill -9` anywhere, then `--resume`: nothing that was acknowledged is lost, nothing is paid twice, the audit verifies."""

from __future__ import annotations

import json
import random
import secrets
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from e2e_support import (
    HOSPITALS,
    Fault,
    Forked,
    Result,
    call,
    environment,
    federation,
    ledgers,
    of_type,
    process,
    script,
    whole_lines,
    write,
)

ROUNDS = 2
CONFIG = federation(rounds=ROUNDS)
PRIVATE = federation(rounds=ROUNDS, evaluation="{kind: private, test_fraction: 0.2, noise_multiplier: 20.0}")
POPULATION = federation(
    rounds=ROUNDS,
    who="task: digits\npopulation: {dataset: digits, clients: 110}",
    privacy="{kind: local, epsilon: 4.0, delta: 1.0e-3, clip_norm: 1.0}",
    steps=1,
).replace("rounds: 2", "rounds: 2\n  participation: 0.05")


def standing(bundle: Path) -> dict[str, list[bytes]]:
    """Every acknowledged ledger line of a bundle."""
    return {owner: whole_lines(path) for owner, path in ledgers(bundle).items()}


def nothing_lost(before: dict[str, list[bytes]], bundle: Path) -> None:
    """Every line that was acknowledged stands where it stood."""
    now = standing(bundle)
    for owner, lines in before.items():
        assert now[owner][: len(lines)] == lines, f"acknowledged lines of {owner} are gone or changed"


def paid_exactly(bundle: Path, rounds: int = ROUNDS, evaluations: int = 0) -> None:
    """Each partner debited each planned round once, within one hold, and released what was left."""
    for name in HOSPITALS:
        book = ledgers(bundle)[name]
        debits = Counter((d["purpose"], d["round"]) for d in of_type(book, "debit"))
        wanted = {("train", r): 1 for r in range(1, rounds + 1)}
        wanted |= {("evaluate", r): 1 for r in range(1, evaluations + 1)}
        assert debits == wanted, f"{name}: {debits}"
        assert len(of_type(book, "hold")) == 1, name
        assert [r["why"] for r in of_type(book, "release")] == ["closed"], name
        committed = {c["request_id"] for c in of_type(book, "commit")}
        assert {d["request_id"] for d in of_type(book, "debit")} == committed, name


def kept_by_all(bundle: Path) -> None:
    """Each partner keeps the model of the bundle, its closing checkpoint, and what is said of it."""
    (closing,) = (bundle / "closing").iterdir()
    for name in HOSPITALS:
        (folder,) = (bundle.with_name(bundle.name + ".private") / name / "models").iterdir()
        assert (folder / "model.safetensors").read_bytes() == (bundle / "model.safetensors").read_bytes(), name
        assert (folder / "closing.json").read_bytes() == closing.read_bytes(), name
        assert json.loads((folder / "model.json").read_bytes())["run_id"] == folder.name == closing.stem, name


def resume(forked: Forked, config: Path, out: Path, folder: Path) -> Result:
    """Go on after a kill, and hold the bundle against everything that must be true of it."""
    before = standing(out)
    done = forked.run("simulate", config, "--out", out, "--resume", folder=folder).expect(0)
    nothing_lost(before, out)
    call("audit", out).expect(0).says("VERIFIED")
    for root in (out, out.with_name(out.name + ".private")):
        assert not list(root.rglob(".*")), "half-written files are left"
    return done


@pytest.fixture(scope="module")
def syncs(forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What an uninterrupted run writes, in order: the moments there are to die at."""
    folder = tmp_path_factory.mktemp("syncs")
    return forked.syncs("simulate", write(folder / "c.yaml", CONFIG), "--out", folder / "out", folder=folder)


def moments(syncs: list[str]) -> dict[str, range]:
    """Stage -> the numbers of its fsyncs."""

    def first(word: str, after: int = 0) -> int:
        return next(i for i, path in enumerate(syncs, start=1) if i > after and word in path)

    book, outbox, closing = map(first, ("ledger.jsonl", "outbox", "/closing"))
    trained = first("checkpoint", outbox)
    evaluated = first("checkpoint", trained)
    kept = max(i for i, path in enumerate(syncs, start=1) if "/models/" in path)
    return {
        "set-up": range(1, book),
        "opening": range(book, outbox - 1),
        "round": range(outbox - 1, trained + 2),
        "evaluation": range(trained + 2, evaluated + 2),
        "closing": range(closing - len(HOSPITALS) - 1, closing + 2),
        "delivering": range(closing + 2, kept + 1),
        "writing": range(kept + 1, len(syncs) + 1),
    }


def test_the_stages_of_a_run_are_where_we_think(syncs: list[str]) -> None:
    at = {stage: [syncs[k - 1] for k in numbers] for stage, numbers in moments(syncs).items()}
    for stage, words in {
        "set-up": ["run.json", "identity.key", "charter.json", "dataset"],
        "opening": ["coordinator/ledger.jsonl", "partners/hungary/ledger.jsonl"],
        "closing": ["coordinator/ledger.jsonl", "partners/hungary/ledger.jsonl", "closing/"],
        "delivering": ["cleveland/models", "va-long-beach/models", "model.safetensors", "closing.json", "model.json"],
        "writing": ["model.safetensors", "result.json", "report.html"],
    }.items():
        assert all(any(word in path for path in at[stage]) for word in words), stage
    assert sum("outbox/" in path for path in at["round"]) == sum("outbox/" in path for path in at["evaluation"]) == 8


@pytest.mark.parametrize(
    ("mode", "stage"),
    [
        ("before", "set-up"),
        ("after", "round"),
        ("torn", "round"),
        ("before", "evaluation"),
        ("after", "closing"),
        ("before", "delivering"),
    ],
)
def test_killed_at_one_point(mode: str, stage: str, forked: Forked, syncs: list[str], tmp_path: Path) -> None:
    """Six of the points of `make soak`; which, chance decides anew each time (and the name of the failure tells)."""
    number = random.choice(list(moments(syncs)[stage]))
    if mode == "torn":  # counts lines, not fsyncs
        number = random.randrange(1, sum("ledger.jsonl" in path for path in syncs) + 1)
    killed_and_resumed(forked, Fault(mode, number), tmp_path)


def killed_and_resumed(forked: Forked, fault: Fault, folder: Path, text: str = CONFIG, evaluations: int = 0) -> None:
    config, out = write(folder / "c.yaml", text), folder / "out"
    ended = forked.run("simulate", config, "--out", out, folder=folder, fault=fault)
    assert ended.code == -signal.SIGKILL, (fault, ended)
    told = ""
    if fault.mode == "torn":
        assert [p for p in ledgers(out).values() if not p.read_bytes().endswith(b"\n")], fault
        told = "cut off a torn last line"
    try:
        resume(forked, config, out, folder).says(told)
        paid_exactly(out, evaluations=evaluations)
        kept_by_all(out)
    except AssertionError as err:
        raise AssertionError(f"{fault}: {err}") from err


@pytest.mark.parametrize("file", ["run.json", "keys/", "dataset", "charter.json", "closing/", "report.html"])
def test_what_a_kill_left_half_written_is_in_nobodys_way(
    file: str, forked: Forked, syncs: list[str], tmp_path: Path
) -> None:
    number = next(i for i, path in enumerate(syncs, start=1) if file in path)
    assert Path(syncs[number - 1]).name.startswith(".")
    killed_and_resumed(forked, Fault("before", number), tmp_path)


def test_a_real_process_is_killed_and_goes_on(tmp_path: Path) -> None:
    """The command itself, killed from outside at whatever it was doing when its first debits stood."""
    config, out = write(tmp_path / "c.yaml", CONFIG), tmp_path / "out"
    command = [*script(), "simulate", str(config), "--out", str(out)]
    running = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    book = out / "partners" / "hungary" / "ledger.jsonl"
    until = time.monotonic() + 60
    while not (book.exists() and of_type(book, "debit")):
        assert running.poll() is None, "it ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.002)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    before = standing(out)
    call("simulate", config, "--out", out).expect(2).says("holds another run", "--resume")
    assert standing(out) == before
    process("simulate", config, "--out", out, "--resume").expect(0).says("VERIFIED")
    nothing_lost(before, out)
    paid_exactly(out)


def test_killed_again_and_again(forked: Forked, tmp_path: Path) -> None:
    """Also while it resumes; each attempt gets a little further."""
    config, out = write(tmp_path / "c.yaml", CONFIG), tmp_path / "out"
    kills = 0
    while True:
        before = standing(out)
        fault = Fault(random.choice(["before", "after"]), random.randrange(35, 50))
        ended = forked.run("simulate", config, "--out", out, "--resume", folder=tmp_path, fault=fault)
        nothing_lost(before, out)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended
        kills += 1
        assert kills < 20
    assert kills >= 3
    paid_exactly(out)
    call("audit", out).expect(0)


@pytest.mark.parametrize("stage", ["evaluation", "closing"])
def test_private_evaluation_is_paid_once(stage: str, forked: Forked, syncs: list[str], tmp_path: Path) -> None:
    fault = Fault("before", random.choice(list(moments(syncs)[stage])))
    killed_and_resumed(forked, fault, tmp_path, PRIVATE, evaluations=ROUNDS)


@pytest.mark.parametrize("number", [9, 12, 14, 17])
def test_a_population_goes_on(number: int, forked: Forked, tmp_path: Path) -> None:
    """One ledger for 110 clients: each round is debited once for the whole cohort."""
    config, out = write(tmp_path / "c.yaml", POPULATION), tmp_path / "out"
    ended = forked.run("simulate", config, "--out", out, folder=tmp_path, fault=Fault("before", number))
    assert ended.code == -signal.SIGKILL, ended
    resume(forked, config, out, tmp_path)
    book = ledgers(out)["coordinator"]
    asked = [(d["round"], sum(last - first + 1 for first, last in d["clients"])) for d in of_type(book, "cohort-debit")]
    assert asked == [(1, 6), (2, 6)]
    assert len(of_type(book, "cohort-hold")) == len(of_type(book, "budget")) == len(of_type(book, "close")) == 1


def test_going_on_when_all_is_done_changes_nothing(forked: Forked, tmp_path: Path) -> None:
    config, out = write(tmp_path / "c.yaml", CONFIG), tmp_path / "out"
    forked.run("simulate", config, "--out", out, folder=tmp_path).expect(0)
    before, model = standing(out), (out / "model.safetensors").read_bytes()
    resume(forked, config, out, tmp_path)
    assert standing(out) == before
    assert (out / "model.safetensors").read_bytes() == model


def test_another_configuration_does_not_go_on(forked: Forked, tmp_path: Path) -> None:
    config, out = write(tmp_path / "c.yaml", CONFIG), tmp_path / "out"
    forked.run("simulate", config, "--out", out, folder=tmp_path, fault=Fault("before", 60)).expect(-signal.SIGKILL)
    before = standing(out)
    other = write(tmp_path / "other.yaml", federation(rounds=3))
    call("simulate", other, "--out", out, "--resume").expect(2).says("holds a run of another configuration")
    assert standing(out) == before


# -- without noise, the same bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("{name: fedavg}", {}),
        ("{name: fedadam, eta: 0.05, beta_1: 0.9, beta_2: 0.99, tau: 0.001}", {"rate": 0.3}),
        ("{name: fedadam, eta: 0.05}", {"rate": 0.1, "who": "task: digits\npopulation: {dataset: digits, clients: 3}"}),
    ],
    ids=["fedavg, full batches", "fedadam, sampled batches", "fedadam, a network of digits"],
)
def test_without_noise_a_resumed_run_is_bit_identical(
    strategy: str, more: dict[str, Any], forked: Forked, tmp_path: Path
) -> None:
    text = federation(rounds=3, privacy=None, strategy=strategy, evaluation="{kind: public, every: 1}", **more)
    config = write(tmp_path / "c.yaml", text)
    syncs = forked.syncs("simulate", config, "--out", tmp_path / "whole", folder=tmp_path)
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    saved = [i for i, path in enumerate(syncs, start=1) if ".checkpoint" in path]
    assert len(saved) == 7, "one checkpoint for the opening, two a round that is measured"
    _, _, first, trained, second, *_ = saved
    points = {"in the second round": first + 6, "between its steps": trained + 2, "after the second round": second + 2}
    for name, number in points.items():
        out = tmp_path / name
        ended = forked.run("simulate", config, "--out", out, folder=tmp_path, fault=Fault("before", number))
        assert ended.code == -signal.SIGKILL, ended
        resume(forked, config, out, tmp_path)
        assert (out / "model.safetensors").read_bytes() == whole, name
    other = write(tmp_path / "other.yaml", text.replace("seed: 3", "seed: 4"))
    forked.run("simulate", other, "--out", tmp_path / "other", folder=tmp_path).expect(0)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != whole, "bits that never differ prove nothing"


# -- the checks can fail ---------------------------------------------------------------------------------------------


def test_these_checks_can_fail(demo_run: tuple[Path, Result], bundle: Path) -> None:
    before = standing(demo_run[0])
    nothing_lost(before, bundle)
    paid_exactly(bundle, rounds=10)
    book = ledgers(bundle)["hungary"]
    good = book.read_bytes()
    lines = good.splitlines(keepends=True)
    debit = next(i for i, line in enumerate(lines) if json.loads(line)["body"]["type"] == "debit")
    for broken in (lines[:debit] + lines[debit + 1 :], lines[:-1], lines[: debit + 1] + lines[debit:]):
        book.write_bytes(b"".join(broken))
        with pytest.raises(AssertionError):  # noqa: PT012  either check may be the one
            nothing_lost(before, bundle)
            paid_exactly(bundle, rounds=10)
        call("audit", bundle).expect(1)
    book.write_bytes(b"".join(lines[:debit] + lines[debit + 1 :]))
    with pytest.raises(AssertionError, match="hungary"):
        paid_exactly(bundle, rounds=10)


# -- soak ------------------------------------------------------------------------------------------------------------


def killed_by_timer(forked: Forked, delay_s: float, folder: Path) -> bool:
    """Kill a run after a while, resume and check it; False when it was over before."""
    shutil.rmtree(folder, ignore_errors=True)
    config, out = write(folder / "c.yaml", CONFIG), folder / "out"
    if forked.run("simulate", config, "--out", out, folder=folder, fault=Fault("delay", delay_s)).code == 0:
        return False
    resume(forked, config, out, folder)
    paid_exactly(out)
    return True


@pytest.mark.soak
def test_fifty_points(forked: Forked, syncs: list[str], tmp_path: Path) -> None:
    """`make soak`: fifty points that chance chooses, of every kind, each resumed and audited."""
    lines = sum("ledger.jsonl" in path for path in syncs)
    stages = moments(syncs)
    began = time.monotonic()
    forked.run("simulate", write(tmp_path / "c.yaml", CONFIG), "--out", tmp_path / "out", folder=tmp_path).expect(0)
    whole_s = time.monotonic() - began
    seen: Counter[str] = Counter()
    for turn in range(50):
        mode = ("before", "after", "torn", "delay")[turn % 4]
        match mode:
            case "torn":
                at: float = random.randrange(1, lines + 1)
            case "delay":
                at = random.uniform(0.02, 0.7) * whole_s
            case _:
                at = random.randrange(1, len(syncs) + 1)
        folder = tmp_path / str(turn)
        if mode == "delay":  # a timer cannot promise to be in time, so the first that is counts
            while not killed_by_timer(forked, at, folder):
                at /= 2
        else:
            killed_and_resumed(forked, Fault(mode, at), folder)
        seen[mode] += 1
        seen.update(stage for stage, numbers in stages.items() if mode in ("before", "after") and at in numbers)
        shutil.rmtree(folder)
    print(f"\n50 kills: {dict(seen)}")


@pytest.mark.soak
def test_many_kills_in_one_run(forked: Forked, tmp_path: Path) -> None:
    for _ in range(5):
        folder = tmp_path / secrets.token_hex(4)
        folder.mkdir()
        test_killed_again_and_again(forked, folder)
