"""One contract, every Grid: in process, that behind a virtual clock of an ideal system, and gRPC here; under a stock SuperLink in tests/e2e/test_flower_engine.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from grid_contract import CONTRACT, Check
from hansa.common.config import System
from hansa.common.flower import Context, Grid, RecordDict
from hansa.simulations.grid import InProcessGrid
from hansa.simulations.realism import VirtualGrid
from link_support import net, plain_app

NAMES = ("ada", "ben", "cy")


@pytest.fixture(scope="module", params=["in process", "virtual clock", "grpc"])
def grid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grid]:
    if request.param != "grpc":
        inner = InProcessGrid(
            plain_app(),
            len(NAMES),
            lambda n: Context(
                run_id=1, node_id=n, node_config={"name": NAMES[n - 1]}, state=RecordDict(), run_config={}
            ),
        )
        yield inner if request.param == "in process" else VirtualGrid(inner, System(), seed=0)
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
