"""One contract, every Grid: in process, that behind a virtual clock of an ideal system, and gRPC here; under a stock SuperLink in tests/e2e/test_flower_engine.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from grid_contract import CONTRACT, Check
from hansa.common.config import System
from hansa.common.flower import Context, Grid, RecordDict
from hansa.common.messages import PlainWire
from hansa.simulations.grid import CohortGrid, InProcessGrid
from hansa.simulations.realism import VirtualGrid
from link_support import net, plain_app

NAMES = ("ada", "ben", "cy")


@pytest.fixture(
    scope="module",
    params=[
        "in process",
        pytest.param("cohort", marks=pytest.mark.soak),
        pytest.param("virtual clock", marks=pytest.mark.soak),
        "grpc",
    ],
)
def grid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grid]:

    def context(n: int) -> Context:
        return Context(run_id=1, node_id=n, node_config={"name": NAMES[n - 1]}, state=RecordDict(), run_config={})

    if request.param == "in process":
        yield InProcessGrid(plain_app(), len(NAMES), context)
        return
    if request.param == "virtual clock":
        yield VirtualGrid(InProcessGrid(plain_app(), len(NAMES), context), System(), seed=0)
        return
    if request.param == "cohort":  # messages that are not our round loop's go to the ClientApp
        here: Any = None
        yield CohortGrid(plain_app(), len(NAMES), context, here, 2, [], PlainWire(), here, "coordinator")
        return
    with net(tmp_path_factory.mktemp("net"), *NAMES) as made:
        for name in NAMES:
            made.node(name, plain_app())
        made.until_connected()
        assert made.grid is not None
        yield made.grid


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_contract(grid: Grid, check: Check) -> None:
    check(grid, list(grid.get_node_ids()))
