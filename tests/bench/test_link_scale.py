"""200 idle nodes and 50 concurrent uploads against one coordinator: nothing is dropped, and memory is bounded (printed)."""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hansa.clients.link import run_links
from hansa.common.flower import Array, ArrayRecord, ClientApp, Context, Message, RecordDict
from hansa.common.home import Home
from link_support import Keys, Net, net

NODES, UPLOADS = 200, 50
UPLOAD_MB = 16


def _nodes(root: Path, names: tuple[str, ...], port: int) -> None:
    """Every node of the federation, in one process: each its own keys, its own connection, its own stream."""
    keys = Keys.__new__(Keys)
    keys.root = root
    keys.homes = {name: Home(root / name) for name in (*names, "coordinator")}
    made = Net(keys, names, port=port)
    app = ClientApp()
    answer = RecordDict({"arrays": ArrayRecord({"w": Array(np.ones(UPLOAD_MB * 250_000, np.float32))})})

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        return Message(answer, reply_to=message)

    run_links([made.link(name, app) for name in names], threading.Event())


def _memory_mb() -> tuple[float, float]:
    """Resident now, and at most so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


@pytest.mark.bench
def test_200_idle_nodes_and_50_uploads(tmp_path: Path) -> None:
    names = tuple(f"node-{i:03d}" for i in range(NODES))
    with net(tmp_path, *names) as made:
        assert made.grid is not None
        grid = made.grid
        before, _ = _memory_mb()
        process = multiprocessing.get_context("spawn").Process(target=_nodes, args=(tmp_path, names, made.port))
        process.start()
        try:
            began = time.perf_counter()
            made.until_connected(timeout=120)
            connected_s = time.perf_counter() - began
            idle, _ = _memory_mb()
            since = {name: about["since"] for name, about in grid.connected().items()}
            rounds = []
            for _ in range(3):
                began = time.perf_counter()
                ids = set(
                    grid.push_messages(
                        grid.create_message(RecordDict(), "train", node, "1", 120) for node in range(1, UPLOADS + 1)
                    )
                )
                while ids and time.perf_counter() - began < 120:
                    for reply in grid.pull_messages(list(ids)):
                        assert reply.has_content(), reply.error
                        assert float(reply.content["arrays"]["w"].numpy()[-1]) == 1.0
                        ids.discard(reply.metadata.reply_to_message_id)
                    grid.wait(0.1)
                assert not ids, f"{len(ids)} uploads did not arrive"
                rounds.append(time.perf_counter() - began)
            assert {name: about["since"] for name, about in grid.connected().items()} == since, "a stream was dropped"
            _, peak = _memory_mb()
        finally:
            process.kill()
            process.join()
    print(
        f"\n{NODES} nodes connected in {connected_s:.1f} s; coordinator {before:.0f} MB before, {idle:.0f} MB with all idle, "
        f"at most {peak:.0f} MB in {len(rounds)} x {UPLOADS} uploads of {UPLOAD_MB} MB at once; "
        f"median {statistics.median(rounds):.2f} s = {UPLOADS * UPLOAD_MB / statistics.median(rounds):.0f} MB/s; nothing dropped"
    )
    # 200 streams and 4 uploads at a time, not 50 answers of 16 MB.
    assert peak - before < 400
