"""The federation on five hosts: a partition in the middle of a round, a slow and lossy network, and the run completes."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from e2e_support import HOSPITALS, call, federation, ledgers, of_type, write
from fabric import Fabric
from hansa.simulations.network import COORDINATOR, LocalNetwork

FAULTY = Path(__file__).parent / "faulty"
ROUNDS = 3


def until(true: Callable[[], object], timeout_s: float, told: Callable[[], str]) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, f"it did not happen within {timeout_s} s\n{told()}"
        time.sleep(0.05)


@contextmanager
def hosts(folder: Path) -> Iterator[Fabric]:
    with ExitStack() as stack:
        try:
            made = stack.enter_context(Fabric(folder, [COORDINATOR, *HOSPITALS]))
        except OSError as err:
            pytest.skip(f"network namespaces may not be made here: {err}")
        yield made


@pytest.mark.soak
def test_five_hosts_partition_delay_and_loss(tmp_path: Path) -> None:
    away = "cleveland"
    config = write(tmp_path / "c.yaml", federation(rounds=ROUNDS).replace("quorum: 2", "quorum: 4"))
    with (
        hosts(tmp_path) as fabric,
        LocalNetwork(
            config,
            tmp_path / "net",
            address=f"{fabric.address(COORDINATOR)}:8440",
            host={name: fabric.inside(name) for name in fabric.hosts},
        ) as net,
    ):
        net.set_up()
        # In the second round it takes long enough to be cut off in the middle of its work.
        slow = {"PYTHONPATH": str(FAULTY), "HANSA_FAULT": "hansa.clients.app:train_locally:before:2:sleep:3"}
        net.start_server()
        for name in HOSPITALS:
            net.start_node(name, env=slow if name == away else {})
        book = net.folder(away) / "state" / "ledger.jsonl"

        def told() -> str:
            return f"{json.dumps(net.status(), indent=1)}\n{net.log(COORDINATOR)[-3000:]}\n{net.log(away)[-3000:]}"

        until(lambda: book.exists() and any(d["round"] == 2 for d in of_type(book, "debit")), 120, told)
        fabric.rules(delay_s=0.1, loss=0.01, cut=(away,))
        cut_at = time.monotonic()
        until(lambda: disconnected(net, away), 15, told)
        noticed_s = time.monotonic() - cut_at
        until(
            lambda: any(c["round"] == 2 for c in of_type(book, "commit")), 30, told
        )  # it works on, and keeps its answer
        time.sleep(1)
        fabric.rules(delay_s=0.1, loss=0.01)
        assert net.wait(240) == 0, told()
        print(
            f"\npartition noticed after {noticed_s:.1f} s; run completed {time.monotonic() - cut_at:.1f} s after the cut"
        )
        assert noticed_s < 10
        models = net.models()
        assert len({m["sha256"] for m in models.values()}) == 1
        net.stop()
        bundle = net.bundle()
    call("audit", bundle).expect(0).says("VERIFIED")
    for name in HOSPITALS:
        debits = Counter((d["purpose"], d["round"]) for d in of_type(ledgers(bundle)[name], "debit"))
        assert debits == {("train", r): 1 for r in range(1, ROUNDS + 1)}, name


def disconnected(net: LocalNetwork, name: str) -> bool:
    status = net.status()
    return status is not None and status["partners"][name]["connected"] is None
