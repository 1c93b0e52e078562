"""Whole simulated rounds: round loop, ledger, Grid, training, fold, checkpoint, as `hansa simulate` runs them.

    python tests/bench/simulation/whole.py thousands|million|w1|w2|w1-dp|w2-dp [--workers 2] [--clients N] [--rounds 5]

thousands: 10,000 clients of 20 rows, 100k parameters, one local step, all of them each round.
million: 1,000,000 registered, 1,000 a round, a model of 6,090 parameters on digits, client-level sampling by seed.
w1, ...: those of workloads.py with Poisson batches, as many steps as the mean client's epoch has: as much work on average.

Prints one JSON line; runs in a process of its own, so that the peak is this run's. The peak is that of the process tree, shared memory
counted once (proportional set size, sampled every 50 ms).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


class Peak(threading.Thread):
    """The most memory that this process and its descendants have had, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mb = 0.0
        self.start()

    def run(self) -> None:
        while True:
            self.mb = max(self.mb, tree_mb(os.getpid()))
            time.sleep(0.05)


def tree_mb(pid: int) -> float:
    total, found = 0, [pid]
    while found:
        one = found.pop()
        try:
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += int(text.split("\nPss:")[1].split()[0])
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except (OSError, IndexError):
            continue
    return total / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    began = time.perf_counter()
    import torch

    torch_s = time.perf_counter() - began
    began = time.perf_counter()
    from harness import cpu_seconds_of_others
    from workloads import CLIP_NORM, NOISE_MULTIPLIER, WORKLOADS

    from hansa.clients.datasets import Rows, Split
    from hansa.common.config import Federation
    from hansa.common.tasks import Task
    from hansa.common.tasks.schema import ArraySchema
    from hansa.simulations import federation

    made: dict[str, Any] = {
        "name": "bench",
        "task": "bench",
        "evaluation": {"kind": "none"},
        "privacy": {"kind": "none"},
        "quorum": 1,
        "round_deadline_s": 36000,
    }

    def use(task: Task, clients: Any) -> None:
        """In the place of what a configuration would name."""
        setattr(federation, "load_task", lambda _: task)  # noqa: B010  mypy refuses to assign to a module's function
        setattr(federation, "code_sha256", lambda _: "0" * 64)  # noqa: B010
        setattr(federation, "clients_of", lambda *_: clients)  # noqa: B010

    if options.what == "million":
        count = options.clients or 1_000_000
        made |= {
            "task": "digits",
            "population": {"dataset": "digits", "clients": count, "partition": {"kind": "drawn", "records": 20}},
            "algorithm": {
                "rounds": options.rounds,
                "participation": min(1.0, 1000 / count),
                "local": {"steps": 2, "sampling_rate": 0.5, "optimizer": {"lr": 0.1}},
            },
        }
    elif options.what in WORKLOADS:
        workload = WORKLOADS[options.what]
        data = workload.data()
        count, records = len(data), round(sum(len(y) for _, y in data) / len(data))

        class Given:
            """As every runner of table.py has them: in memory."""

            declared_records, evaluated = records, 0
            largest = max(len(y) for _, y in data)

            def __len__(self) -> int:
                return count

            def declared(self, number: int) -> int:
                return len(data[number][1])

            def open(self, number: int) -> Split:
                x, y = data[number]
                return Split(Rows(x, y), Rows(x[:0], y[:0]))

        schema = ArraySchema(shape=tuple(data[0][0].shape[1:]), value_range=(-99, 99))
        outputs = workload.model()(data[0][0][:1]).shape[-1]
        task = Task("bench", "bench", schema, tuple(f"class-{i}" for i in range(outputs)), workload.build)
        use(task, Given())
        if workload.private:
            made["privacy"] = {
                "kind": "local", "epsilon": 100, "delta": 1e-4, "clip_norm": CLIP_NORM, "noise_multiplier": NOISE_MULTIPLIER
            }  # fmt: skip
        made |= {
            "population": {
                "dataset": "synthetic",
                "clients": count,
                "partition": {"kind": "drawn", "records": records},
            },
            "algorithm": {
                "rounds": options.rounds,
                "participation": min(1.0, workload.cohort_size / count),
                "local": {
                    "steps": workload.steps(records),
                    "sampling_rate": min(1.0, workload.batch / records),
                    "optimizer": {"lr": workload.lr},
                },
            },
        }
    else:
        count = options.clients or 10_000
        hidden = round((options.parameters - 2) / 103)

        class Generated:
            """Rows that nobody keeps."""

            declared_records = largest = 20
            evaluated = 0

            def __len__(self) -> int:
                return count

            def declared(self, number: int) -> int:
                return 20

            def open(self, number: int) -> Split:
                generator = torch.Generator().manual_seed(number)
                x = torch.randn(20, 100, generator=generator)
                return Split(Rows(x, (x[:, 0] > 0).long()), Rows(x[:0], torch.zeros(0, dtype=torch.int64)))

        def model() -> torch.nn.Module:
            return torch.nn.Sequential(torch.nn.Linear(100, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 2))

        schema = ArraySchema(shape=(100,), value_range=(-10, 10))
        task = Task("bench", "random rows", schema, ("a", "b"), model)
        use(task, Generated())
        made |= {
            "population": {"dataset": "synthetic", "clients": count, "partition": {"kind": "drawn", "records": 20}},
            "algorithm": {"rounds": options.rounds, "local": {"steps": 1, "optimizer": {"lr": 0.1}}},
        }
    config = Federation.model_validate(made)
    wall, cpu, firsts = [], [], list[float]()
    clock = 0.0

    def spent() -> float:
        return time.process_time() + cpu_seconds_of_others()

    def notify(event: str, **facts: Any) -> None:
        nonlocal clock
        if event == "round":
            firsts.append(time.perf_counter() - began)
            clock = spent()
        if event == "done":
            wall.append(facts["seconds"])
            cpu.append(spent() - clock)

    peak = Peak()
    with tempfile.TemporaryDirectory() as folder:
        simulation = federation.Simulation(
            config, Path(), Path(folder) / "run", notify=notify, engine="cohort", workers=options.workers
        )
        outcome = simulation.run()
        assert outcome.model is not None
        assert simulation.crew is not None
        parameters = sum(v.size for v in outcome.model.values())
        said = {
            "what": options.what,
            "clients": count,
            "parameters": parameters,
            "execution": simulation.crew.plan.words(),
            "import_torch_s": round(torch_s, 2),
            "first_round_after_s": round(firsts[0], 2),
            "round_wall_s": round(statistics.median(wall[1:] or wall), 4),
            "round_cpu_s": round(statistics.median(cpu[1:] or cpu), 4),
            "rounds_wall_s": [round(s, 4) for s in wall],
            "partners_a_round": outcome.history[-1]["partners"],
            "peak_mb": round(peak.mb),
        }
        simulation.close()
    print(json.dumps(said))


if __name__ == "__main__":
    main()
