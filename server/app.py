"""The Flower ServerApp: a coordinator's run over whatever Grid it is given."""

from __future__ import annotations

from collections.abc import Callable

from ..common.flower import Context, Grid, ServerApp
from .rounds import Coordinator, Outcome


def make_server_app(
    coordinator: Coordinator, run_id: str, done: Callable[[Outcome], None], only: list[str] | None = None
) -> ServerApp:
    """A ServerApp that runs (or goes on with) one run and hands its outcome to `done`."""
    app = ServerApp()

    @app.main()
    def _main(grid: Grid, context: Context) -> None:
        done(coordinator.run(grid, run_id, only))

    return app
