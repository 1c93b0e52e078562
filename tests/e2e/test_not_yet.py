"""What a partner refuses today and accepts tomorrow: the same run goes on, and its books verify."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attack_support import NAMES, Town, until
from hansa.clients import bundle as client_bundle
from hansa.clients.bill import budget_report
from hansa.clients.law import Control
from hansa.common.charter import SignedCharter
from hansa.common.errors import RunFailed
from hansa.common.model import write_model
from hansa.common.verifier import verify_bundle
from hansa.server import bundle as server_bundle
from hansa.server.service import Service

RUN = "run-1"


class Quorate(Town):
    def draft(self, **changes: Any) -> SignedCharter:
        return super().draft(**{"quorum": 2, **changes})

    def control(self, name: str) -> Control:
        return Control(self.nodes[name].settings.control)

    def finished(self) -> None:
        """The run ends now, and its books verify."""
        outcome = self.service.coordinator(self.service.roster).run(self.grid, RUN)
        assert outcome.why == "completed"
        assert outcome.model is not None
        write_model(self.service.settings.model(RUN), outcome.model)
        self.audited()

    def audited(self) -> None:
        bundle = self.root / "bundle"
        server_bundle.export(self.service.settings, bundle)
        for name in NAMES:
            client_bundle.export(self.nodes[name].settings, bundle)
        verdict = verify_bundle(bundle)
        assert (verdict["verified"], verdict["violations"]) == (True, [])

    def resumed(self) -> None:
        """The coordinator's process ended; `hansa server run --resume`."""
        port = self.grid.port
        self.grid.stop()
        self.service.close()
        self.service = Service(self.service.settings.model_copy(update={"listen": f"127.0.0.1:{port}"}))
        self.grid = self.service.link(self.log("coordinator"))
        self.grid.start()
        until(lambda: set(self.grid.connected()) == set(NAMES))


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Quorate]:
    made = Quorate(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_a_round_that_a_paused_node_refused_is_asked_for_again(town: Quorate) -> None:
    def pause_then(event: str, **facts: Any) -> None:
        if event == "done" and facts["round"] == 1:
            town.control("ada").pause()

    with pytest.raises(RunFailed, match="ada: refused: paused"):
        town.service.coordinator(town.service.roster, pause_then).run(town.grid, RUN)
    for _ in range(2):  # still paused: it is asked, and says no again
        town.resumed()
        with pytest.raises(RunFailed, match="ada: refused: paused"):
            town.service.coordinator(town.service.roster).run(town.grid, RUN)
    town.control("ada").resume()
    town.resumed()
    town.finished()
    for name in NAMES:
        assert town.kinds(name, RUN).count("debit") == 2, name


def test_a_run_waits_for_those_who_approve_each_by_hand(town: Quorate) -> None:
    for name in NAMES:
        town.halt(name)
        town.start(name, approval=True)
    until(lambda: set(town.grid.connected()) == set(NAMES))
    with pytest.raises(RunFailed, match="0 partners accepted the run now"):
        town.service.coordinator(town.service.roster).run(town.grid, RUN)
    for name in NAMES:
        assert budget_report(town.nodes[name].settings)["waiting_for_approval"] == [RUN]
        town.control(name).approve(RUN, town.signed.sha256)
        assert budget_report(town.nodes[name].settings)["waiting_for_approval"] == []
    town.resumed()
    town.finished()


def test_a_run_that_nobody_can_finish_is_given_up_and_holds_nothing(town: Quorate) -> None:
    """Once where it was never accepted, and once after a round."""
    town.control("ada").pause()
    with pytest.raises(RunFailed, match="ada: paused"):
        town.service.coordinator(town.service.roster).run(town.grid, RUN)
    assert town.kinds("ben", RUN) == ["hold"]
    town.resumed()
    assert town.service.coordinator(town.service.roster).run(town.grid, RUN, give_up=True).why == "refused"
    assert town.kinds("ben", RUN) == ["hold", "release"]
    town.control("ada").resume()

    def pause_then(event: str, **facts: Any) -> None:
        if event == "done":
            town.control("ada").pause()

    with pytest.raises(RunFailed, match="ada: refused: paused"):
        town.service.coordinator(town.service.roster, pause_then).run(town.grid, "run-2")
    town.resumed()
    outcome = town.service.coordinator(town.service.roster).run(town.grid, "run-2", give_up=True)
    assert (outcome.why, len(outcome.history), outcome.undelivered) == ("refused", 1, [])
    assert outcome.model is not None
    write_model(town.service.settings.model("run-2"), outcome.model)
    for name, debits in (("ada", 1), ("ben", 2)):  # ben trained in the round that failed, too
        assert town.kinds(name, "run-2").count("debit") == debits, name
        assert town.kinds(name, "run-2")[-1] == "release", name
    town.resumed()  # delivered again, to whoever asks
    assert town.service.coordinator(town.service.roster).run(town.grid, "run-2").why == "refused"
    town.audited()
