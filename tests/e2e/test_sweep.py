"""`hansa simulate --sweep`: a table, a plot and a CSV that say what the runs' own results say; killed, it goes on and counts nothing twice."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2e_support import Fault, Forked, call, environment, federation, ledgers, of_type, process, script, write

SWEEP = ["--sweep", "privacy.epsilon=0.5,8", "--sweep", "algorithm.rounds=1,2", "--seeds", "2"]
PNG = b"\x89PNG\r\n\x1a\n"


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "sweep.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def result(out: Path, row: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / row["folder"] / "result.json").read_text())
    return found


def files(out: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("*/**/*") if p.is_file()}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A sweep of two keys with two seeds, and what it reported."""
    folder = tmp_path_factory.mktemp("sweep")
    config = write(folder / "c.yaml", federation())
    done = call("simulate", config, *SWEEP, "--out", folder / "out", "--format", "json").expect(0)
    assert done.err == ""
    return folder / "out", done.json()


def test_a_task_that_is_not_there_stops_a_sweep_before_it_begins(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", federation().replace("heart-disease", "heart-desease"))
    call("simulate", config, "--seeds", "2", "--out", "out").expect(2).says("no task 'heart-desease' is installed")
    assert not (tmp_path / "out").exists()


def test_the_csv_is_what_the_results_say(swept: tuple[Path, Any]) -> None:
    out, _ = swept
    found = rows(out)
    told = [(r["privacy.epsilon"], r["algorithm.rounds"], r["seed"]) for r in found]
    assert told == [(e, n, s) for e in ("0.5", "8.0") for n in ("1", "2") for s in ("3", "4")]
    for row in found:
        one = result(out, row)
        assert {m: float(row[m]) for m in one["final"]} == one["final"]
        partners = one["partners"].values()
        assert float(row["epsilon_odometer"]) == max(p["epsilon"] for p in partners)
        assert float(row["epsilon_filter"]) == max(p["epsilon_filter"] for p in partners)
        assert float(row["epsilon_filter"]) <= float(row["epsilon_cap"]) == float(row["privacy.epsilon"])
        assert float(row["noise_multiplier"]) == one["privacy"]["noise_multiplier"]
        assert (row["unit"], row["adjacency"], row["noise_placement"]) == ("record", "add-or-remove-one", "local")
        assert row["adversary"] == one["privacy"]["adversary"]
        assert float(row["delta"]) == 1e-4
        assert float(row["seconds"]) == one["sweep"]["seconds"] > 0
        assert len(one["rounds"]) == int(row["rounds"]) == int(row["algorithm.rounds"])
        assert (row["status"], row["reason"], row["verified"], row["refusals"]) == ("finished", "", "true", "0")
        call("audit", out / row["folder"]).expect(0).says("VERIFIED")
    assert len({row["noise_multiplier"] for row in found}) == 4, "noise is calibrated for each point"


def test_the_report_summarises_the_csv(swept: tuple[Path, Any]) -> None:
    out, report = swept
    assert json.loads((out / "sweep.json").read_text()) == report
    assert (report["swept"], report["finished"], report["verified"]) == (["privacy.epsilon", "algorithm.rounds"], 8, 8)
    assert report["interval"] == "10th to 90th percentile of the runs"
    assert any("record level, add-or-remove-one, delta 0.0001, local noise" in words for words in report["privacy"])
    assert len(report["points"]) == 4
    for point in report["points"]:
        mine = [r for r in rows(out) if all(float(r[k]) == v for k, v in point["values"].items())]
        assert (len(mine), point["n"]) == (2, 2)
        assert point["epsilon_odometer"] == max(float(r["epsilon_odometer"]) for r in mine)
        for metric in ("auc", "accuracy", "brier"):
            values = [float(r[metric]) for r in mine]
            found = point["metrics"][metric]
            wanted = [np.median(values), *np.percentile(values, [10, 90]), np.mean(values), np.std(values, ddof=1)]
            assert np.allclose([found[k] for k in ("median", "low", "high", "mean", "sd")], wanted, rtol=1e-9)


def test_the_plot_is_one(swept: tuple[Path, Any]) -> None:
    drawn = (swept[0] / "sweep.png").read_bytes()
    assert drawn.startswith(PNG)
    assert len(drawn) > 20_000


def test_finished_runs_are_not_run_again(swept: tuple[Path, Any], tmp_path: Path) -> None:
    out = copied(swept[0], tmp_path)
    before, table = files(out), (out / "sweep.csv").read_bytes()
    for name in ("sweep.csv", "sweep.json", "sweep.png"):
        (out / name).unlink()
    config = write(tmp_path / "c.yaml", federation())
    call("simulate", config, *SWEEP, "--out", out).expect(2).says("holds another sweep", "--resume")
    done = call("simulate", config, *SWEEP, "--out", out, "--resume").expect(0)
    done.says("8 of 8 runs were finished before", "8 of 8 audits verified", "median and [10th to 90th percentile")
    assert files(out) == before
    assert (out / "sweep.csv").read_bytes() == table
    assert (out / "sweep.png").read_bytes().startswith(PNG)
    # A run is counted once, under its own name first, also where there is a copy of it.
    shutil.copytree(out / "epsilon-8_rounds-2_seed-4", out / "a-copy")
    call("simulate", config, *SWEEP, "--out", out, "--resume").expect(0).says("8 of 8 runs were finished before")
    assert (out / "sweep.csv").read_bytes() == table
    shutil.rmtree(out / "a-copy")
    # Of another sweep over the same runs only the new ones are run, whatever it calls its folders.
    more = ["--sweep", "algorithm.rounds=1,3", "--sweep", "privacy.epsilon=8", "--seeds", "2"]
    done = call("simulate", config, *more, "--out", out, "--resume").expect(0)
    done.says("2 of 4 runs were finished before", "run 3 of 4", "run 4 of 4")
    assert before.items() <= files(out).items()
    assert [(r["algorithm.rounds"], r["folder"]) for r in rows(out)] == [
        *(("1", f"epsilon-8_rounds-1_seed-{s}") for s in (3, 4)),
        *(("3", f"rounds-3_epsilon-8_seed-{s}") for s in (3, 4)),
    ]


def test_one_table_is_of_one_code_and_data(swept: tuple[Path, Any], tmp_path: Path) -> None:
    """Finished runs say what they were made of; another digest stands for other code, other data."""
    config = write(tmp_path / "c.yaml", federation())
    for which, words in (("task_sha256", "other code of its task, or other data"), ("data_sha256", "or other data")):
        out = copied(swept[0], tmp_path / which)
        path = next(out.glob("*/result.json"))
        result = json.loads(path.read_text())
        result["sweep"][which] = "0" * 64
        path.write_text(json.dumps(result))
        call("simulate", config, *SWEEP, "--out", out, "--resume").expect(2).says(words)


def test_one_table_is_of_one_engine(swept: tuple[Path, Any], tmp_path: Path) -> None:
    out, config = copied(swept[0], tmp_path), write(tmp_path / "c.yaml", federation())
    call("simulate", config, *SWEEP, "--out", out, "--resume", "--engine", "cohort").expect(2).says(
        "by the engine nodes"
    )
    call("simulate", config, *SWEEP, "--out", out, "--resume", "--engine", "nodes").expect(0)


def copied(out: Path, to: Path) -> Path:
    for folder in (out, out.with_name("out.private")):
        shutil.copytree(folder, to / folder.name)
    return to / "out"


def test_another_configuration_in_a_runs_folder_stops_the_sweep(swept: tuple[Path, Any], tmp_path: Path) -> None:
    out = copied(swept[0], tmp_path)
    before = files(out)
    config = write(tmp_path / "c.yaml", federation(steps=3))
    done = call("simulate", config, *SWEEP, "--out", out, "--resume").expect(2)
    assert "run 1 of" not in done.says("holds a run of another configuration").text, "the next would meet the same"
    assert files(out) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sweep", "privacy.eps=1"], "Keys of privacy: kind, unit, epsilon"),
        (["--sweep", "privacy.epsilon=1,0"], "with privacy.epsilon=0, seed=3"),
        (["--sweep", "privacy.epsilon=1", "--sweep", "quorum=2,7"], "with privacy.epsilon=1, quorum=7"),
        (["--sweep", "seed=1,2"], "seeds are not swept"),
    ],
)
def test_bad_keys_and_values_are_refused_before_anything_runs(options: list[str], words: str, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", federation())
    call("simulate", config, *options, "--out", tmp_path / "out").expect(2).says("--sweep", words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.yaml"]


def test_a_refused_point_is_a_row_and_not_the_end(tmp_path: Path) -> None:
    fixed = "{kind: local, epsilon: 1.0, delta: 1.0e-4, clip_norm: 1.0, noise_multiplier: 20.0}"
    config = write(tmp_path / "c.yaml", federation(rounds=1, privacy=fixed))
    options = ["--sweep", "privacy.epsilon=0.01,1", "--sweep", "declared_tolerance=0.0,0.1", "--out", "out"]
    done = call("simulate", config, *options).expect(1)
    done.says("run 4 of 4", "nothing was trained: too few partners", "noise is not calibrated for each epsilon")
    done.says("1 of 4 runs finished, 2 of 2 audits verified")
    found = {(r["privacy.epsilon"], r["declared_tolerance"]): r for r in rows(Path("out"))}
    # The real sizes are not the declared ones to the record: the gate refuses already as the federation is set up.
    strict, gate, fine = found["1.0", "0.0"], found["0.01", "0.1"], found["1.0", "0.1"]
    assert (strict["status"], strict["auc"], strict["verified"]) == ("refused", "", "")
    assert (gate["status"], gate["auc"], gate["verified"], gate["epsilon_filter"]) == ("refused", "", "true", "0.0")
    assert "budget: spent and held so far" in gate["reason"]
    assert (fine["status"], fine["reason"], float(fine["auc"]) > 0.5) == ("finished", "", True)
    report = json.loads(Path("out/sweep.json").read_text())
    assert [p["n"] for p in report["points"]] == [0, 0, 0, 1]
    assert list(report["points"][1]["reasons"].values()) == [1]
    # Refused by the gates is an answer; what was refused before there was a run is asked again.
    again = call("simulate", config, *options, "--resume").expect(1)
    again.says("2 of 4 runs were finished before", "run 1 of 4", "run 3 of 4")
    assert [r["status"] for r in rows(Path("out"))] == ["refused", "refused", "refused", "finished"]


def test_input_that_no_run_can_use_is_exit_code_2(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", federation(rounds=1).replace("package:heart-disease/hungary.csv", "gone.csv"))
    done = call("simulate", config, "--seeds", "2", "--out", "out", "--format", "json").expect(2)
    report = done.json()
    assert [(r["status"], "gone.csv" in r["reason"]) for r in report["runs"]] == [("failed", True)] * 2
    assert report["points"][0]["n"] == 0


def test_without_privacy_epsilon_is_unbounded_and_words_have_an_axis(tmp_path: Path) -> None:
    private = "{kind: local, epsilon: 8.0, delta: 1.0e-4, clip_norm: 1.0}"
    config = write(tmp_path / "c.yaml", federation(rounds=1))
    done = call("simulate", config, "--sweep", f"privacy={{kind: none}},{private}", "--out", "out").expect(0)
    done.says("unbounded", "{kind: none}")
    none, some = rows(Path("out"))
    assert (float(none["epsilon_odometer"]), none["delta"], none["unit"]) == (math.inf, "", "")
    assert float(some["epsilon_odometer"]) < 8
    report = json.loads(Path("out/sweep.json").read_text())
    assert [(p["epsilon_odometer"] is None, p["unbounded"]) for p in report["points"]] == [(True, True), (False, False)]
    assert Path("out/sweep.png").read_bytes().startswith(PNG)


def test_baselines_are_asked_for_later(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", federation(rounds=1))
    options = ["simulate", config, "--sweep", "quorum=2,3", "--out", "out"]
    call(*options).expect(0)
    before = {r["folder"]: r for r in rows(Path("out"))}
    done = call(*options, "--resume", "--baselines", "--format", "json").expect(0)
    table = done.json()["points"][0]["table"]
    assert {"all data pooled, no privacy", "federated, no privacy", "hungary alone, no privacy"} < set(table)
    after = {r["folder"]: r for r in rows(Path("out"))}
    assert {f: (r["auc"], r["epsilon_filter"]) for f, r in before.items()} == {
        f: (r["auc"], r["epsilon_filter"]) for f, r in after.items()
    }


# -- kill -9 -----------------------------------------------------------------------------------------------------------


def whole(out: Path, planned: int) -> None:
    """Every run is there once, and paid for once."""
    found = rows(out)
    assert len(found) == len({(r["privacy.epsilon"], r["seed"]) for r in found}) == planned
    assert {r["status"] for r in found} == {"finished"}
    for row in found:
        call("audit", out / row["folder"]).expect(0)
        for name, book in ledgers(out / row["folder"]).items():
            if name != "coordinator":
                assert [d["round"] for d in of_type(book, "debit") if d["purpose"] == "train"] == [1, 2], name
        assert float(row["auc"]) == result(out, row)["final"]["auc"]
    for root in (out, out.with_name(out.name + ".private")):
        assert not list(root.rglob(".*")), "half-written files are left"


@pytest.mark.soak
def test_a_real_sweep_is_killed_and_goes_on(tmp_path: Path) -> None:
    """In its second run: the first stays as it is, the second goes on from where its ledgers stand."""
    config, out = write(tmp_path / "c.yaml", federation(rounds=2)), tmp_path / "out"
    options = ["simulate", str(config), "--sweep", "privacy.epsilon=1,8", "--seeds", "2", "--out", str(out)]
    running = subprocess.Popen([*script(), *options], env=environment(), stdout=subprocess.DEVNULL)
    book = out / "epsilon-1_seed-4" / "partners" / "hungary" / "ledger.jsonl"
    until = time.monotonic() + 120
    while not (book.exists() and of_type(book, "debit")):
        assert running.poll() is None, "it ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.002)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    before = {k: v for k, v in files(out).items() if "epsilon-1_seed-3" in k}
    assert [r["folder"] for r in rows(out)] == ["epsilon-1_seed-3"]
    lines = book.read_bytes()
    process(*options).expect(2).says("holds another sweep")
    process(*options, "--resume").expect(0).says("1 of 4 runs were finished before", "4 of 4 audits verified")
    assert book.read_bytes().startswith(lines[: lines.rfind(b"\n") + 1])
    assert {k: v for k, v in files(out).items() if "epsilon-1_seed-3" in k} == before
    whole(out, 4)


@pytest.mark.parametrize(
    "moment",
    [
        "result.json",
        *(
            pytest.param(m, marks=pytest.mark.soak)
            for m in ("result.json again", "report.html", "sweep.csv", "sweep.json", "sweep.png")
        ),
    ],
)
@pytest.mark.parametrize("mode", ["before", "after"])
def test_killed_as_a_run_is_finished(mode: str, moment: str, forked: Forked, tmp_path: Path) -> None:
    """Around each file that says what is finished: nothing is lost, nothing is counted twice."""
    config = write(tmp_path / "c.yaml", federation(rounds=2))
    options = ["simulate", config, "--sweep", "privacy.epsilon=8", "--seeds", "2"]
    name, *again = moment.split(" ")
    syncs = forked.syncs(*options, "--out", tmp_path / "all", folder=tmp_path)
    at = [n for n, path in enumerate(syncs, start=1) if os.path.basename(path).startswith(f".hansa-tmp-{name}")]
    out = tmp_path / "out"
    number = at[1 if again else 0] if name != "sweep.csv" else at[1]
    ended = forked.run(*options, "--out", out, folder=tmp_path, fault=Fault(mode, number))
    assert ended.code == -signal.SIGKILL, ended
    forked.run(*options, "--out", out, "--resume", folder=tmp_path).expect(0)
    whole(out, 2)
    assert (out / "sweep.png").read_bytes().startswith(PNG)
