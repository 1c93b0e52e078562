"""The coordinator's side of a charter, over nodes in this process that may be absent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from hansa.common import charter as charter_module
from hansa.common.charter import SignedCharter
from hansa.common.errors import CharterError, ConfigError, IdentityError, LedgerError, OutputError, RunFailed, TaskError
from hansa.common.identity import Identity, canonical
from hansa.common.verifier import verify_bundle
from hansa.server import service as service_module
from hansa.server.bundle import export
from hansa.server.service import Service
from hansa.server.settings import ServerSettings
from hansa.server.status import read_status
from hansa.simulations.federation import Simulation
from hansa.simulations.grid import InProcessGrid
from support import HEART, config, same_arrays


class Link(InProcessGrid):
    """Nodes of this process behind what our link offers. `here`: who is connected; after `die_at` pulls it dies."""

    def __init__(self, grid: InProcessGrid, here: list[str], die_at: int = 0) -> None:
        super().__init__(grid._app, len(HEART), grid._context)
        self.here, self.die_at, self.pulls = here, die_at, 0
        self.started = self.stopped = 0
        self.port = 8440

    def start(self) -> None:
        self.started += 1

    def stop(self) -> None:
        self.stopped += 1

    def connected(self) -> dict[str, dict[str, str]]:
        return {name: {"since": "now", "address": "a", "version": "v", "tls": "t"} for name in self.here}

    def wait(self, timeout_s: float) -> None:
        pass

    def pull_messages(self, message_ids: Any) -> Iterator[Any]:
        self.pulls += 1
        if self.pulls == self.die_at:
            raise KeyboardInterrupt
        return super().pull_messages(message_ids)


class Place:
    """Four hospitals in this process, and a coordinator's folder beside them."""

    def __init__(self, root: Path, **changes: Any) -> None:
        self.root = root
        self.simulation = Simulation(config(**changes), Path(), root / "sim")
        self.home = root / "coordinator"
        self.home.mkdir()
        key = self.home / "identity.key"
        shutil.copy2(self.simulation.private / "coordinator" / "identity.key", key)
        named = {"name": "coordinator", "key": Identity.load("coordinator", key).key}
        (self.home / "identity.json").write_bytes(canonical(named))
        self.settings = ServerSettings(
            home=self.home,
            charter=self.simulation.out / "charter.json",
            state=self.home / "state",
            wait_for_nodes_s=0.0,
        )

    def link(self, here: list[str] | None = None, die_at: int = 0) -> Link:
        return Link(self.simulation.grid, list(HEART) if here is None else here, die_at)

    def run(self, link: Link, name: str | None = None, resume: bool = False) -> Any:
        with Service(self.settings) as service:
            run_id = service.choose(name, resume)
            with service.status(run_id, link) as status:
                return service.run(link, run_id, status)

    def bundle(self, to: Path) -> Path:
        export(self.settings, to)
        for name in HEART:
            made = to / "partners" / name
            made.mkdir(parents=True)
            shutil.copy(self.simulation.out / "partners" / name / "ledger.jsonl", made)
        return to


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.simulation.close()


def test_a_run_ends_with_a_model_a_status_and_a_bundle_that_verifies(place, tmp_path):
    link = place.link()
    outcome = place.run(link, "first")
    assert (outcome.run_id, outcome.why, link.started, link.stopped) == ("first", "completed", 1, 1)
    same_arrays(load_file(place.settings.model("first")), outcome.model)
    found = read_status(place.settings.status)
    assert (found["run"], found["phase"], found["round"], found["address"]) == ("first", "completed", 3, "0.0.0.0:8440")
    assert {p["answer"]["outcome"] for p in found["partners"].values()} == {"ok"}
    verdict = verify_bundle(place.bundle(tmp_path / "bundle"))
    assert verdict["violations"] == []
    assert verdict["checked"]["ledgers"] == 5


def test_it_equals_the_simulation_of_the_same_configuration(place, tmp_path):
    outcome = place.run(place.link(), "first")
    other = Simulation(config(), Path(), tmp_path / "other")
    try:
        model = other.run().model
    finally:
        other.close()
    assert model is not None
    same_arrays(outcome.model, model)


def test_it_goes_on_with_a_quorum_when_the_time_for_the_others_is_over(place):
    outcome = place.run(place.link(here=list(HEART)[:3]))
    assert outcome.why == "completed"


def test_too_few_partners_cost_nothing_and_the_run_keeps_its_name(place):
    with pytest.raises(RunFailed, match=r"2 of 4 partners connected .* missing: switzerland, va-long-beach"):
        place.run(place.link(here=["cleveland", "hungary"]))
    failed = read_status(place.settings.status)
    assert failed["phase"] == "failed"
    assert "the quorum is 3" in failed["why"]
    with Service(place.settings) as service:
        assert service.ledger.of("run") == []
    assert place.run(place.link(), resume=True).run_id == failed["run"]


@pytest.mark.parametrize("die_at", [1, 2, 3, 5, 8, 9])
def test_stopped_anywhere_it_goes_on_and_nothing_is_paid_twice(place, tmp_path, die_at):
    link = place.link(die_at=die_at)
    with pytest.raises(KeyboardInterrupt):
        place.run(link, "first")
    assert link.stopped == 1
    assert read_status(place.settings.status)["phase"] == "stopped"
    with Service(place.settings) as service, pytest.raises(ConfigError, match="first began already"):
        service.choose("first", resume=False)
    outcome = place.run(place.link(), resume=True)
    assert (outcome.run_id, outcome.why) == ("first", "completed")
    assert len(place.simulation.gates["cleveland"].ledger.of("debit")) == 3
    assert verify_bundle(place.bundle(tmp_path / "bundle"))["violations"] == []


def test_which_run_is_meant(place):
    place.run(place.link(), "first")
    with Service(place.settings) as service:
        with pytest.raises(ConfigError, match="run first is closed already"):
            service.choose("first", resume=False)
        with pytest.raises(ConfigError, match="nothing to resume"):
            service.choose(None, resume=True)
        assert service.choose("first", resume=True) == "first"
        assert service.choose("second", resume=True) == "second"
        one, two = service.choose(None, resume=False), service.choose(None, resume=False)
        assert one != two
        assert one.startswith(f"{datetime.now(UTC):%Y%m%d}-")
        for name in ("", "UPPER", "a/b", "../x", "-a", "a" * 64):
            with pytest.raises(ConfigError, match="not a name"):
                service.choose(name, resume=False)


def test_a_closed_run_is_delivered_again(place):
    first = place.run(place.link(), "first")
    place.settings.model("first").unlink()  # killed before it was written
    with Service(place.settings) as service:
        assert service.choose(None, resume=True) == "first"
    again = place.run(place.link(), resume=True)
    same_arrays(again.model, first.model)
    assert place.settings.model("first").exists()
    assert len(place.simulation.gates["cleveland"].ledger.of("debit")) == 3


def test_one_process_works_in_a_state_folder(place):
    with Service(place.settings), pytest.raises(LedgerError, match="another process"):
        Service(place.settings)
    Service(place.settings).close()


def test_a_charter_that_not_everyone_signed(place, tmp_path):
    signed = place.simulation.signed
    file = tmp_path / "charter.json"
    SignedCharter(signed.payload, signed.signatures[:-1]).save(file)
    with pytest.raises(CharterError, match="not signed by"):
        Service(place.settings.model_copy(update={"charter": file}))


def test_the_home_of_somebody_else(place):
    shutil.copy2(place.simulation.private / "hungary" / "identity.key", place.home / "identity.key")
    named = {"name": "coordinator", "key": Identity.load("x", place.home / "identity.key").key}
    (place.home / "identity.json").write_bytes(canonical(named))
    with pytest.raises(IdentityError, match="the charter's coordinator is coordinator"):
        Service(place.settings)
    assert not place.settings.ledger.exists()


def test_task_code_that_was_not_agreed(place, monkeypatch):
    monkeypatch.setattr(service_module, "code_sha256", lambda _: "f" * 64)
    with pytest.raises(TaskError, match="installed is ffffffffffffffff"):
        Service(place.settings)


def test_an_expired_charter_begins_no_run_and_lets_one_be_finished(place, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        place.run(place.link(die_at=3), "first")

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(days=4000)

    monkeypatch.setattr(service_module, "datetime", Later)
    with Service(place.settings) as service:
        with pytest.raises(CharterError, match="expired on"):
            service.choose("second", resume=False)
        assert service.choose(None, resume=True) == "first"
    assert charter_module.datetime is datetime  # only the service's clock was moved


def test_nothing_is_exported_that_nobody_could_verify(place, tmp_path):
    with pytest.raises(LedgerError, match="No such file"):
        export(place.settings, tmp_path / "bundle")
    with pytest.raises(KeyboardInterrupt):
        place.run(place.link(die_at=3), "first")
    # A run that goes on may be audited: it is open, and an auditor sees that.
    assert "closing/first.json" not in export(place.settings, tmp_path / "open")
    place.run(place.link(), resume=True)
    sealed = (place.settings.closing / "first.json").read_bytes()
    (place.settings.closing / "first.json").unlink()
    with pytest.raises(OutputError, match="run first is closed here, but not countersigned"):
        export(place.settings, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    (place.settings.closing / "first.json").write_bytes(sealed)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "charter.json").write_text("another")
    with pytest.raises(OutputError, match="another charter"):
        export(place.settings, tmp_path / "bundle")
    place.settings.model("first").write_bytes(b"edited")
    with pytest.raises(OutputError, match="not the model that run first ended with"):
        export(place.settings, tmp_path / "other")


def test_refused_by_too_many_there_is_no_model_and_the_bundle_still_verifies(tmp_path):
    # A budget that the first run uses up: nobody can accept a second.
    privacy = {"epsilon": 1.0, "delta": 1e-4, "clip_norm": 1.0}
    place = Place(tmp_path, privacy=privacy, algorithm={"rounds": 1, "local": {"steps": 1, "optimizer": {"lr": 0.1}}})
    try:
        assert place.run(place.link(), "first").why == "completed"
        second = place.run(place.link(), "second")
        assert (second.why, second.model) == ("refused", None)
        found = read_status(place.settings.status)
        assert found["phase"] == "refused"
        assert {p["refused"]["reason"] for p in found["partners"].values()} == {"budget"}
        bundle = place.bundle(tmp_path / "bundle")
        assert verify_bundle(bundle)["violations"] == []
        assert (bundle / "model.safetensors").read_bytes() == place.settings.model("first").read_bytes()
    finally:
        place.simulation.close()
