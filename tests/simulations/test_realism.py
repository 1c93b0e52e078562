"""The virtual clock around a Grid: who is asked in earnest, what is said of it, and that a killed run loses nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hansa.common import config as config_module
from hansa.common.cli import charter_new
from hansa.common.config import Federation, System, load_config
from hansa.common.errors import ConfigError, OutputError, RunFailed
from hansa.common.flower import Array, ArrayRecord, ClientApp, Context, Message, RecordDict
from hansa.simulations.grid import InProcessGrid
from hansa.simulations.network import LocalNetwork
from hansa.simulations.realism import Clock, VirtualGrid, duration, in_words, over_sampled, summary, volume
from hansa.simulations.timelines import ANSWERED, FATES
from support import Killed, config, run, verified

DOCS = Path(__file__).parents[2] / "docs"


def context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})


def grid_of(nodes: int, ran: list[int], system: System, seed: int = 0, **settings: Any) -> VirtualGrid:
    app = ClientApp()

    def answer(message: Message, c: Context) -> Message:
        ran.append(c.node_id)
        return Message(RecordDict(), reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)
    app.query("open")(answer)
    return VirtualGrid(InProcessGrid(app, nodes, context), system, seed, **settings)


def ask(grid: VirtualGrid, nodes: list[int], number: int = 1, kind: str = "train") -> dict[int, str]:
    """Node -> "answered" or its error's words."""
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(2, np.float32))})})
    ids = list(grid.push_messages(grid.create_message(content, kind, node, str(number)) for node in nodes))
    replies = list(grid.pull_messages(ids))
    assert sorted(r.metadata.src_node_id for r in replies) == sorted(nodes)
    return {r.metadata.src_node_id: r.error.reason if r.has_error() else ANSWERED for r in replies}


def made(**sections: object) -> System:
    return System.model_validate(sections)


ROUGH = made(
    compute={"overhead_s": 1.0, "spread": 0.5},
    stragglers={"share": 0.2, "slowdown": 20},
    availability={"share": 0.8, "daily_swing": 0.2},
    dropout=0.1,
)


def test_only_who_answers_is_asked_in_earnest() -> None:
    ran: list[int] = []
    grid = grid_of(40, ran, ROUGH, deadline_s=30, wanted=20)
    told = ask(grid, list(range(1, 41)))
    assert ran == [node for node, word in told.items() if word == ANSWERED] == sorted(ran)
    assert len(ran) == 20
    line = grid.clock.lines[0]
    assert {fate: line[fate] for fate in FATES[1:]} == {
        fate: sum(word == f"{fate} (virtual clock)" for word in told.values()) for fate in FATES[1:]
    }
    assert min(line[fate] for fate in ("unavailable", "dropped out", "not needed")) > 0
    assert grid.clock.now_s == line["seconds"] > 0


def test_everybody_is_measured_and_the_wait_for_the_absent_is_counted() -> None:
    ran: list[int] = []
    grid = grid_of(40, ran, ROUGH, deadline_s=30)
    assert set(ask(grid, list(range(1, 41)), kind="evaluate").values()) == {ANSWERED}
    assert grid.clock.now_s == 30
    ask(grid, [1, 2, 3], kind="query.open")
    assert len(grid.clock.lines) == 1, "opening a run is not timed"


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(0, 20))
def test_same_seed_same_everything_and_more_are_never_slower(seed: int, wanted: int, more: int) -> None:
    def lasting(asked: int, wanted: int) -> tuple[list[dict[int, str]], list[dict[str, Any]]]:
        grid = grid_of(60, [], ROUGH, seed, deadline_s=25, wanted=wanted)
        return [ask(grid, list(range(1, asked + 1)), number) for number in (1, 2)], grid.clock.lines

    few, again, many = lasting(wanted, wanted), lasting(wanted, wanted), lasting(wanted + more, wanted)
    assert few == again
    assert many[1][0]["seconds"] <= few[1][0]["seconds"]
    other = grid_of(60, [], ROUGH, seed + 1, deadline_s=25, wanted=30)
    same = grid_of(60, [], ROUGH, seed, deadline_s=25, wanted=30)
    assert ask(other, list(range(1, 61))) != ask(same, list(range(1, 61)))


def test_a_client_costs_nothing_until_it_is_asked() -> None:
    """A million registered, twenty asked: nothing grows with the million."""
    ran: list[int] = []
    grid = grid_of(1_000_000, ran, ROUGH, wanted=10)
    ask(grid, list(range(1, 1_000_001, 50_000)))
    assert len(ran) == 10
    assert not grid._errors
    assert all(not hasattr(value, "__len__") or len(value) < 5 for value in vars(grid).values())


def test_a_torn_line_is_forgotten_and_a_damaged_file_refused(tmp_path: Path) -> None:
    path = tmp_path / "clock.jsonl"
    grid = grid_of(10, [], ROUGH, wanted=5, clock=Clock(path))
    told = ask(grid, list(range(1, 11)))
    ask(grid, list(range(1, 11)), 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    clock = Clock(path)
    assert clock.lines == grid.clock.lines[:1]
    assert path.read_bytes() == whole[: whole.index(b"\n") + 1]
    again = grid_of(10, [], ROUGH, wanted=5, clock=clock)
    assert ask(again, list(range(1, 11))) == told, "asked again after a crash: the same fates, and no second line"
    ask(again, list(range(1, 11)), 2)
    assert path.read_bytes() == whole
    path.write_bytes(b"[]\n" + whole)
    with pytest.raises(OutputError, match="not what a run wrote"):
        Clock(path)


def test_a_round_that_failed_is_another_attempt_when_it_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "clock.jsonl"
    system = made(availability={"share": 0.6})
    tried = []
    for _ in range(40):  # each time in a new process
        grid = grid_of(4, [], system, least=4, deadline_s=10, clock=Clock(path))
        tried.append(list(ask(grid, [1, 2, 3, 4]).values()).count(ANSWERED))
        if tried[-1] == 4:
            break
    assert tried[0] < 4 == tried[-1], "seed 0 begins with a failure, and is not stuck in it"
    assert [line["attempt"] for line in grid.clock.lines] == list(range(len(tried)))
    assert grid.clock.now_s >= 10 * (len(tried) - 1)


# -- a whole federation --------------------------------------------------------------------------------------------

REAL = {
    "compute": {"seconds_per_record": 0.01, "overhead_s": 0.1, "spread": 0.6},
    "network": {"down_mbps": 10, "up_mbps": 2, "latency_ms": 30, "spread": 0.5},
    "availability": {"share": 0.9},
    "dropout": 0.1,
    "stragglers": {"share": 0.1, "slowdown": 10},
    "deadline_s": 40,
}


def realistic(**changes: Any) -> Federation:
    return config(system=REAL, quorum=1, **changes)


def system_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "result.json").read_text())["system"]
    return found


def test_a_run_says_what_it_would_last_and_its_bundle_verifies(tmp_path: Path) -> None:
    outcome, _ = run(realistic(), tmp_path / "out")
    verified(tmp_path / "out")
    found = system_of(tmp_path / "out")
    assert [row["round"] for row in found["rounds"]] == [1, 2, 3]
    for row, history in zip(found["rounds"], outcome.history, strict=True):
        assert row["asked"] == 4 == sum(row[fate] for fate in FATES)
        assert row[ANSWERED] == history["partners"]
        assert row["seconds"] > row["evaluate_s"] > 0
    assert found["totals"]["seconds"] == sum(row["seconds"] for row in found["rounds"])
    assert found["totals"]["asked"] > found["totals"][ANSWERED], "seed 0 has somebody missing"
    assert "virtual clock: 3 rounds in" in in_words(found)
    assert b"system" not in (tmp_path / "out" / "charter.json").read_bytes()


def test_a_resumed_run_has_the_same_totals(tmp_path: Path) -> None:
    _, last = run(realistic(), tmp_path / "whole")
    expected = system_of(tmp_path / "whole")
    for die_at in range(3, last, max(1, last // 6)):
        out = tmp_path / f"die-{die_at}"
        with pytest.raises(Killed):
            run(realistic(), out, die_at=die_at)
        run(realistic(), out, resume=True)
        assert system_of(out) == expected, die_at


def test_over_sampling_is_in_the_charter_and_the_first_answers_count(tmp_path: Path) -> None:
    more = config(
        partners=None,
        task="digits",
        population={"dataset": "digits", "clients": 120},
        algorithm={"rounds": 2, "participation": 0.1, "local": {"steps": 1, "optimizer": {"lr": 0.1}}},
        evaluation={"kind": "none"},
        quorum=4,
        system={**REAL, "over_sampling": 0.5},
    )
    assert over_sampled(more).algorithm.participation == pytest.approx(0.15)
    run(more, tmp_path / "out")
    verified(tmp_path / "out")
    found = system_of(tmp_path / "out")
    assert [row["asked"] for row in found["rounds"]] == [18, 18]
    assert all(row[ANSWERED] <= 12 for row in found["rounds"])
    assert found["totals"]["not needed"] > 0
    ledger = (tmp_path / "out" / "coordinator" / "ledger.jsonl").read_text()
    charged = [json.loads(line) for line in ledger.splitlines() if "cohort-debit" in line]
    assert len(charged) == 2
    assert summary(Clock(tmp_path / "out.private" / "virtual-clock.jsonl"), more.system or System()) == found


def test_a_round_below_the_quorum_stops_and_says_why(tmp_path: Path) -> None:
    nobody = {**REAL, "dropout": 0.97}
    with pytest.raises(RunFailed, match=r"dropped out \(virtual clock\)"):
        run(config(system=nobody, quorum=4), tmp_path / "out")


def test_secure_aggregation_goes_on_without_who_is_missing(tmp_path: Path) -> None:
    masked = config(
        system={**REAL, "availability": {"share": 1.0}, "dropout": 0.2},
        secure_aggregation={"colluding": 0},
        quorum=3,
        seed=5,
    )
    run(masked, tmp_path / "out")
    verified(tmp_path / "out")
    found = system_of(tmp_path / "out")
    assert found["totals"]["dropped out"] > 0
    kinds = [line["kind"] for line in Clock(tmp_path / "out.private" / "virtual-clock.jsonl").lines]
    assert kinds == ["train", "query.agree", "query.reveal", "evaluate"] * 3


# -- refusals and words --------------------------------------------------------------------------------------------

YAML = """
name: heart
task: heart-disease
partners:
  a: {data: "package:heart-disease/cleveland.csv", declared_records: 240}
  b: {data: "package:heart-disease/hungary.csv", declared_records: 235}
algorithm: {rounds: 1, participation: 1.0, local: {steps: 1, optimizer: {lr: 0.1}}}
privacy: {kind: none}
quorum: 1
"""


def test_no_real_node_gets_a_simulated_system(tmp_path: Path) -> None:
    path = tmp_path / "federation.yaml"
    path.write_text(YAML + "system: {dropout: 0.1}\n")
    with pytest.raises(ConfigError, match="system is about simulated clients"):
        LocalNetwork(path, tmp_path / "net")
    with pytest.raises(ConfigError, match="system is about simulated clients"):
        charter_new(path, tmp_path, tmp_path / "charter.json")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("system: {over_sampling: 0.3}", "system.over_sampling.*not so many more"),
        ("system: {availability: {share: 0.9, daily_swing: 0.5}}", "at the peak hour"),
        ("system: {dropout: 1.0}", "system.dropout"),
        ("system: {stragglers: {share: 0.1, slowdown: 0.5}}", "slowdown"),
        ("system: {compute: {speed: 3}}", "unknown key"),
        ("system: {compute: {spread: 4}}", "spread"),
    ],
)
def test_what_no_system_can_be_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "federation.yaml"
    path.write_text(YAML + text + "\n")
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_words_for_durations_and_volumes() -> None:
    assert [duration(s) for s in (0.25, 90, 600, 9000, 400_000)] == ["0.25 s", "90 s", "10 min", "2.5 h", "4.63 days"]
    assert [volume(n) for n in (12, 1500, 2_500_000, 4e12)] == ["12 B", "1.5 kB", "2.5 MB", "4 TB"]


def test_the_worked_example_of_the_documentation(tmp_path: Path) -> None:
    page = (DOCS / "simulation-realism.md").read_text(encoding="utf-8")
    path = tmp_path / "digits-realistic.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    example = load_config(path)
    run(example, tmp_path / "out")
    assert in_words(system_of(tmp_path / "out")) in page
    for name in ("Compute", "Network", "Availability", "Stragglers"):
        for key in getattr(config_module, name).model_fields:
            assert f"{key}`" in page, key
    assert all(f"`{key}`" in page or f"`{key}." in page for key in System.model_fields if key != "stragglers")
    assert all(fate in page for fate in FATES)
