"""Flower's simulation runtime on Ray, as an object that is started and closed: a Grid whose nodes are Ray's processes.

`flwr.simulation.run_simulation` is deprecated. It and `flwr run` put the ServerApp into a thread of its own, where Ctrl-C does not reach
it, and end only when every client has. Here are their parts (LinkState, Grid, message loops, RayBackend and its actors), with the
ServerApp in the caller's thread. With common/flower.py the only module that touches Flower's private parts; it needs Ray to be installed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

from ..common.errors import ConfigError, RunFailed, counted
from ..common.flower import ClientApp, Message, Run, addressed

# isort: split
# After common.flower, which turns off what Flower and Ray would send.
import ray
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.simulation.ray_transport.ray_actor import BasicActorPool, ClientAppActor, pool_size_from_resources
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

ADDRESS = "RAY_ADDRESS"
"""In the environment: the cluster to work on. Without it Ray is started on this machine, and ended."""
STORE_BYTES = 512 * 2**20
"""Ray's memory for what is on its way, on this machine; what does not fit goes to disk."""
POLL_S = 0.002
_START_S = 60.0
_WORKER = {"num_cpus": 1, "num_gpus": 0.0}
_TRIES = 3
# A process that dies is started anew and gets its message again; more options than Flower says, but it hands on whatever it is given.
_OPTIONS = {**_WORKER, "max_restarts": -1, "max_task_retries": _TRIES - 1}


class Runtime:
    """Flower's runtime with one node a worker; `close` it.

    Args:
        app: what the workers run; pickled by Ray, once a message.
        workers: processes; None: one a core, of this machine or of the cluster.
        cores: of this machine.

    Attributes:
        grid: Flower's own Grid to its nodes.
        count: workers, and nodes.

    Raises:
        ConfigError: Ray cannot be started, or there is no such cluster, or it has no room.
    """

    def __init__(self, app: ClientApp, workers: int | None, cores: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="hansa-ray-")  # a short path: Ray makes sockets in it
        self._log_level = logging.getLogger("flwr").level
        logging.getLogger("flwr").setLevel(
            logging.CRITICAL
        )  # it prints every exception of a worker; we say what matters
        self._stop = _Stop()
        self._thread: threading.Thread | None = None
        self._backend: _Backend | None = None
        self._failed: Exception | None = None
        try:
            self._start_ray(workers or cores)
            room = pool_size_from_resources(_WORKER)
            self.count = min(workers or room, room)
            self._backend = _Backend(self.count)
            self.grid = self._start_flower(app, self._backend)
        except ValueError as err:  # Flower's word for no room
            self.close()
            raise ConfigError(
                f"the Ray cluster has no core for a worker: {err}", "ray start --num-cpus says how many."
            ) from err
        except BaseException:
            self.close()
            raise

    def _start_ray(self, cores: int) -> None:
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        # Ray knows that a process without a GPU sees none; the variable only silences its warning that this will change.
        env = {"OMP_NUM_THREADS": "1", "FLWR_HOME": f"{self._folder}/flower", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        env |= {name: os.environ[name] for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK")}
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # A worker's death is four long lines of Ray's, whatever log_to_driver says.
        ray._private.worker._worker_logs_enabled = False
        cluster = os.environ.get(ADDRESS)
        if not cluster:  # what is importable here; another machine has its own
            env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        where: dict[str, Any] = (
            {"address": cluster}
            if cluster
            else {"address": "local", "num_cpus": cores, "object_store_memory": STORE_BYTES, "_temp_dir": self._folder}
        )
        try:
            ray.init(runtime_env={"env_vars": env}, **quiet, **where)
        except (ConnectionError, RuntimeError, ValueError, OSError, AssertionError) as err:
            what = f"no Ray cluster at {ADDRESS}={cluster}" if cluster else "Ray cannot be started"
            raise ConfigError(
                f"{what}: {str(err).strip() or type(err).__name__}",
                f"A cluster: ray start --head, then {ADDRESS}=HOST:6379. This machine alone: unset {ADDRESS}.",
            ) from err

    def _start_flower(self, app: ClientApp, backend: _Backend) -> RuntimeGrid:
        states = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        run = Run.create_empty(1)
        run.primary_task_id, run.federation_id = 1, NOOP_FEDERATION_ID
        state = cast(InMemoryLinkState, states.state())
        state.run_ids[run.run_id] = RunRecord(run=run)
        state.task_store[1] = Task(task_id=1, run_id=run.run_id)
        nodes = vce_api._register_nodes(self.count, states)
        stores = vce_api._register_node_info_stores(nodes, run)
        grid = RuntimeGrid(states, self._stop.sent.release)
        grid.set_run(run)

        def work() -> None:
            try:
                vce_api.run_api(lambda: app, lambda: backend, nodes, states, stores, self._stop, VceMetrics())
            except Exception as err:
                self._failed = err

        self._thread = threading.Thread(target=work, name="flower-simulation", daemon=True)
        self._thread.start()
        end = time.monotonic() + _START_S
        while not backend.ready.wait(0.05):
            self.check()
            if time.monotonic() > end:
                raise ConfigError(f"Flower's simulation runtime did not start within {_START_S:g} s")
        return grid

    def check(self) -> None:
        """Whether work can go on.

        Raises:
            RunFailed: the runtime ended, or machines went away and those that are left have too few cores.
        """
        again = "Go on with --resume when the cluster is whole, or with fewer workers: --workers."
        if self._thread is None or not self._thread.is_alive():
            raise RunFailed(f"Flower's simulation runtime ended: {self._failed}", again)
        try:
            room = pool_size_from_resources(_WORKER)
        except ValueError:
            room = 0
        except Exception as err:  # what Ray raises when it is gone
            raise RunFailed(f"Ray does not answer: {type(err).__name__}", again) from err
        if room < self.count:
            raise RunFailed(f"the Ray cluster has room for {room} of {counted(self.count, 'worker')} left", again)

    def close(self) -> None:
        """End every worker at once, whatever it is doing, and the Ray that was started here."""
        self._stop.set()
        if self._backend is not None:
            self._backend.kill()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        ray.shutdown()
        ray._private.worker._worker_logs_enabled = True
        logging.getLogger("flwr").setLevel(self._log_level)
        shutil.rmtree(self._folder, ignore_errors=True)


class _Stop(threading.Event):
    """What ends Flower's loops. One of them waits for it a tenth of a second before it looks for messages again: here, until one is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = threading.Semaphore(0)

    def set(self) -> None:
        """As an Event."""
        super().set()
        self.sent.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Until it is set, a message was sent, or the time is over."""
        self.sent.acquire(timeout=timeout)
        return self.is_set()


class _Backend(RayBackend):
    """Flower's, on the Ray that is there, with so many actors."""

    def __init__(self, count: int) -> None:
        super().__init__({})
        self._count, self.ready = count, threading.Event()

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        """See RayBackend, which would take every core that there is."""
        self.pool = BasicActorPool(ClientAppActor, dict(_OPTIONS), self.actor_kwargs)
        self.pool.add_actors_to_pool(self._count)
        self.app_fn = app_fn
        self.ready.set()

    def kill(self) -> None:
        """End all actors, also those that are working."""
        if self.pool is not None:
            for actor in [*self.pool.pool, *self.pool._future_to_actor.values()]:
                with contextlib.suppress(Exception):  # it, or Ray, is gone
                    ray.kill(actor)

    def terminate(self) -> None:
        """Nothing: `Runtime.close` does it."""


class RuntimeGrid(InMemoryGrid):
    """Flower's Grid of a simulation; it says when a message was sent, and a message to nobody has its place among the identifiers: "".

    Args:
        sent: called for each message.
    """

    def __init__(self, states: LinkStateFactory, sent: Callable[[], None]) -> None:
        super().__init__(states, POLL_S)
        self._sent = sent

    def create_message(
        self, content: Any, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one node."""
        return addressed(content, message_type, dst_node_id, group_id, ttl or 3600.0, "", created_at=time.time())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send them."""
        pushed = []
        for message in messages:
            pushed.append(next(iter(super().push_messages([message])), ""))
            self._sent()
        return pushed
