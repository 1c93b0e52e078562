"""What shared noise buys, through the real path: charter, keys, gates, ledgers and masks, every run in a folder that is thrown away.

    python tests/bench/shared_table.py [--heart] [--fashion] [--seeds 10] [--draws 3] [--pairs 20] [--workers 2] [--keep FILE]

`--heart`: AUC of configs/heart-shared.yaml for (N_min, t) = (4, 0), (3, 0), (3, 1) and ε = 1 and 0.5, over seeds (each its own split) and draws
of noise (which has no seed: a draw is one more run), beside local noise and all data pooled in the clear. Bars at (4, 0): a mean AUC of at least
0.89 and 0.875; everywhere: no ledger above its cap.

`--fashion`: Fashion-MNIST at ten partners with skewed labels against central DP-SGD of the same total noise, written here without our code; the
same data, initial model, rate, steps, clipping and momentum. Bar: a mean difference of accuracies, paired by seed, of at most 0.003.

Both without either. A table in Markdown on stdout, progress on stderr; exit code 1 when a bar is missed. `--keep` remembers finished runs.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch import Tensor

from hansa.common.config import Federation, load_config
from hansa.common.identity import canonical, sha256
from hansa.common.plan import budget_of, training_of
from hansa.common.shared_noise import SharedGaussian
from hansa.common.tasks import initial_model, load_task
from hansa.simulations import sources
from hansa.simulations.baselines import baselines
from hansa.simulations.federation import Simulation

CONFIGS = Path(__file__).parents[2] / "configs"
MEMORY = Path("/dev/shm")  # tens of fsyncs a round say nothing of accuracy
AUC_BARS = {1.0: 0.89, 0.5: 0.875}
DIFFERENCE_BAR = 0.003

Found = dict[str, Any]


def varied(config: Federation, changes: dict[str, Any]) -> Federation:
    """The configuration with changes by path ("privacy.epsilon"), checked again; None takes away."""
    given = config.model_dump(mode="json", exclude_none=True)
    for path, value in changes.items():
        *sections, key = path.split(".")
        place = given
        for section in sections:
            place = place[section]
        if value is None:
            place.pop(key, None)
        else:
            place[key] = value
    return Federation.model_validate(given)


def only_last(config: Federation) -> Federation:
    return varied(config, {"evaluation.every": config.algorithm.rounds})


def federated(config: Federation) -> Found:
    """One run, all of it."""
    with tempfile.TemporaryDirectory(
        prefix="hansa-table-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None
    ) as folder:
        simulation = Simulation(only_last(config), CONFIGS, Path(folder) / "run")
        try:
            outcome = simulation.run()
            charter = simulation.signed.charter
            filters = [budget_of(charter).spent(gate.spent()) for gate in simulation.gates.values()]
        finally:
            simulation.close()
    last = outcome.history[-1]
    if outcome.why != "completed" or last["partners"] != len(charter.partners):
        raise SystemExit(f"a run that is not whole: {outcome.why}, {last}")
    return {
        **last["metrics"],
        "sigma": charter.privacy.noise_multiplier,
        "epsilon": max(filters),
        "cap": charter.privacy.epsilon,
        "adversary": charter.adversary,
    }


def pooled(config: Federation) -> Found:
    """All data in one place, in the clear."""
    return dict(baselines(config, CONFIGS, load_task(config.task), alone=False)["pooled"])


# -- heart disease -------------------------------------------------------------------------------------------------------


def heart_rows() -> list[tuple[str, Federation, float | None, Callable[[Federation], Found]]]:
    """What is compared: words, configuration, predicted noise factor, how it is run."""
    shared, local = load_config(CONFIGS / "heart-shared.yaml"), load_config(CONFIGS / "heart.yaml")
    n = len(shared.partners or {})
    rows: list[tuple[str, Federation, float | None, Callable[[Federation], Found]]] = [
        ("pooled, in the clear", local, None, pooled)
    ]
    for epsilon in AUC_BARS:
        for quorum, t in ((4, 0), (3, 0), (3, 1)):
            changes = {"privacy.epsilon": epsilon, "quorum": quorum, "secure_aggregation.colluding": t}
            rows.append((f"shared, ({quorum}, {t})", varied(shared, changes), math.sqrt(n / (quorum - t)), federated))
        same = {"privacy.kind": "local", "privacy.epsilon": epsilon, "secure_aggregation": None}
        rows.append(("local, the same algorithm", varied(shared, same), math.sqrt(n), federated))
        rows.append(("local, configs/heart.yaml", varied(local, {"privacy.epsilon": epsilon}), None, federated))
    return rows


def heart(seeds: int, draws: int, run: Callable[[list[Job]], list[Found]]) -> list[str]:
    """Print the table; what was missed."""
    rows, jobs, places = heart_rows(), [], []
    for place, (_, config, _, how) in enumerate(rows):
        for draw in range(draws if how is federated else 1):
            for seed in range(seeds):
                jobs.append((how, varied(config, {"seed": seed}), draw))
                places.append(place)
    found: dict[int, list[Found]] = {}
    for place, one in zip(places, run(jobs), strict=True):
        found.setdefault(place, []).append(one)
    missed: list[str] = []
    against: list[str] = []
    print(
        f"Heart disease, δ = 1e-4, {seeds} seeds x {draws} draws of noise; mean ± standard deviation over those runs.\n"
    )
    print(
        "| noise, (N_min, t) | ε | AUC | less than pooled | noise factor | σ | ε in the ledgers, at most | holds against |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    clear = [one["auc"] for one in found[0]]  # by seed
    for place, (words, _, factor, _) in enumerate(rows):
        runs = found[place]
        auc = [one["auc"] for one in runs]
        measured = f"{statistics.mean(auc):.4f} ± {_deviation(auc):.3f}"
        # Of each split the mean over its draws: splits differ by more than noise does.
        lost = [clear[seed] - statistics.mean(auc[seed::seeds]) for seed in range(seeds)]
        cells = [words, "-", measured, _with_interval(lost) if place else "-"]
        cells += ["-" if factor is None else f"{factor:.3f}", "-", "-", "nobody"]
        if "cap" in runs[0]:
            epsilon, spent, adversary = runs[0]["cap"], max(one["epsilon"] for one in runs), runs[0]["adversary"]
            if adversary not in against:
                against.append(adversary)
            letter = "abc"[against.index(adversary)]
            cells[1], cells[5:] = f"{epsilon:g}", [f"{runs[0]['sigma']:g}", f"{spent:.4f}", letter]
            if spent > epsilon:
                missed.append(f"{words}, ε = {epsilon:g}: a ledger has {spent}")
            if words == "shared, (4, 0)" and statistics.mean(auc) < AUC_BARS[epsilon]:
                missed.append(
                    f"{words}, ε = {epsilon:g}: a mean AUC of {statistics.mean(auc):.4f}, not {AUC_BARS[epsilon]}"
                )
        print("| " + " | ".join(cells) + " |")
    print(
        "\nNoise factor: √(n/(N_min − t)), standard deviation of the noise in a sum of all over what is charged; of local noise √n.\n"
    )
    for letter, words in zip("abc", against, strict=False):
        print(f"- ({letter}) {words}")
    print(flush=True)
    return missed


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; 0 for one alone."""
    from scipy.stats import t

    n = len(differences)
    error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else 0.0
    return statistics.mean(differences), float(t.ppf(0.975, n - 1)) * error if n > 1 else 0.0


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _with_interval(differences: list[float]) -> str:
    mean, half = interval(differences)
    return f"{mean:.4f} ± {half:.4f}"


# -- Fashion-MNIST -------------------------------------------------------------------------------------------------------

TASK = "bench-fashion"
PACKAGE = '''
from torch import nn
from hansa.common.tasks import Task
from hansa.common.tasks.schema import ArraySchema

def build():
    """One hidden layer: enough to be no convex problem, and small enough for many runs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 10))

task = Task("bench-fashion", "Fashion-MNIST", ArraySchema(shape=(1, 28, 28), value_range=(0.0, 1.0)), tuple(f"class {i}" for i in range(10)), build)
'''
FASHION = {
    "name": "fashion-shared",
    "task": TASK,
    "population": {"dataset": "fashion-mnist", "clients": 10, "partition": {"kind": "dirichlet", "alpha": 0.5, "min_records": 100}},
    "algorithm": {
        "strategy": {"name": "fedavgm", "server_momentum": 0.8},
        "rounds": 40,
        "average_last": 0.5,
        "local": {"steps": 1, "sampling_rate": 0.01, "optimizer": {"name": "sgd", "lr": 2.0}},
    },
    "privacy": {"noise": "shared", "epsilon": 4.0, "delta": 1e-5, "clip_norm": 1.0},
    "secure_aggregation": {"colluding": 0},
    "quorum": 10,
    "evaluation": {"kind": "public", "test_fraction": 0.2},
}  # fmt: skip


@contextmanager
def fashion_task() -> Iterator[None]:
    """The task as a package that is installed by being on the path; processes that are started get the path."""
    with tempfile.TemporaryDirectory(prefix="hansa-table-") as name:
        package, about = Path(name) / "bench_fashion", Path(name) / "bench_fashion-1.dist-info"
        for folder in (package, about):
            folder.mkdir()
        (package / "__init__.py").write_text(PACKAGE)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {TASK}\nVersion: 1\n")
        (about / "entry_points.txt").write_text(f"[hansa.tasks]\n{TASK} = bench_fashion:task\n")
        sys.path.insert(0, name)
        try:
            yield
        finally:
            sys.path.remove(name)


@cache
def _pictures() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, test = sources.population("fashion-mnist")
    assert test is not None
    return rows.x, rows.y, test.x, test.y


def central(config: Federation, sigma: float, records: int) -> float:
    """Accuracy of DP-SGD with everything in one place: Poisson batches, clipped gradients, continuous Gaussian noise σC on their sum.

    Args:
        records: what the federation's partners declare together, by which a step is divided.
    """
    a, clip = config.algorithm, config.privacy.clip_norm
    assert clip is not None
    q, lr, momentum = a.local.sampling_rate, a.local.optimizer.lr, a.strategy.server_momentum or 0.0
    x, y, test_x, test_y = _pictures()
    model, rng = initial_model(load_task(config.task), config.seed), np.random.default_rng()

    def loss(w: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, w, (one[None],)), label[None])

    by_record = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    w = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in w.items()}
    kept: list[dict[str, Tensor]] = []
    for step in range(a.rounds):
        batch = torch.from_numpy(np.flatnonzero(rng.random(len(y)) < q))
        gradients = by_record(w, x[batch], y[batch])
        norms = sum((g.flatten(1).square().sum(1) for g in gradients.values()), torch.zeros(len(batch))).sqrt()
        shrink = (clip / norms).clamp(max=1.0)
        for name, g in gradients.items():
            total = torch.tensordot(shrink, g, 1).numpy() + rng.normal(0, sigma * clip, size=g.shape[1:])
            velocity[name] = momentum * velocity[name] + torch.from_numpy(total / (q * records)).float()
            w[name] = w[name] - lr * velocity[name]
        if step >= a.rounds - math.ceil((a.average_last or 0.0) * a.rounds):
            kept.append(w.copy())
    if kept:
        w = {name: torch.stack([one[name] for one in kept]).mean(dim=0) for name in w}
    with torch.no_grad():
        right = [torch.func.functional_call(model, w, (part,)).argmax(1) for part in test_x.split(1000)]
    return float((torch.cat(right) == test_y).float().mean())


def pair(config: Federation) -> Found:
    """A federated run, and a central one with the noise that the federated one's charter has."""
    with tempfile.TemporaryDirectory(
        prefix="hansa-table-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None
    ) as folder:
        simulation = Simulation(only_last(config), CONFIGS, Path(folder) / "run")
        try:
            began = time.perf_counter()
            outcome = simulation.run()
            seconds = time.perf_counter() - began
            charter = simulation.signed.charter
            epsilon = max(budget_of(charter).spent(gate.spent()) for gate in simulation.gates.values())
        finally:
            simulation.close()
    event = training_of(charter)
    assert isinstance(event, SharedGaussian)
    assert event.factor(outcome.history[-1]["partners"]) == 1.0
    return {
        "federated": outcome.history[-1]["metrics"]["accuracy"],
        "central": central(config, event.noise_multiplier, sum(m.declared_records for m in charter.partners)),
        "sigma": event.noise_multiplier,
        "epsilon": epsilon,
        "seconds": seconds,
    }


def fashion(seeds: int, run: Callable[[list[Job]], list[Found]]) -> list[str]:
    """Print the comparison; what was missed."""
    config = Federation.model_validate(FASHION)
    found = run([(pair, varied(config, {"seed": seed}), 0) for seed in range(seeds)])
    differences = [one["federated"] - one["central"] for one in found]
    mean, half = interval(differences)
    a, p = config.algorithm, config.privacy
    print(
        f"Fashion-MNIST, 10 partners (label skew, Dirichlet 0.5), one hidden layer, q = {a.local.sampling_rate:g}, {a.rounds} rounds, "
        f"ε = {p.epsilon:g}, δ = {p.delta:g}, (N_min, t) = (10, 0), σ = {found[0]['sigma']:g}; {seeds} seeds, pairs of the same split and initial "
        "model.\n"
    )
    print("| | accuracy |\n| --- | --- |")
    for name, words in (("federated", "federated, shared noise"), ("central", "central DP-SGD, the same total noise")):
        values = [one[name] for one in found]
        print(f"| {words} | {statistics.mean(values):.4f} ± {_deviation(values):.4f} |")
    print(
        f"| difference, mean and 95 % interval | {mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}] |\n", flush=True
    )
    assert p.epsilon is not None
    missed = []
    if abs(mean) > DIFFERENCE_BAR:
        missed.append(f"Fashion-MNIST: a mean difference of {mean:+.4f}, allowed are {DIFFERENCE_BAR}")
    if (spent := max(one["epsilon"] for one in found)) > p.epsilon:
        missed.append(f"Fashion-MNIST: a ledger has {spent}")
    return missed


# -- running -------------------------------------------------------------------------------------------------------------

Job = tuple[Callable[[Federation], Found], Federation, int]
"""How, what, and which draw of noise."""


def _work(job: Job) -> Found:
    torch.set_num_threads(1)
    how, config, _ = job
    return how(config)


def run_all(jobs: list[Job], workers: int, keep: Path | None) -> list[Found]:
    """Every job's result, in order."""
    names = [
        sha256(canonical([how.__name__, draw, json.loads(config.model_dump_json(), parse_float=str)]))
        for how, config, draw in jobs
    ]
    done: dict[str, Found] = {}
    if keep is not None and keep.exists():
        done = {one["job"]: one["found"] for one in map(json.loads, keep.read_text().splitlines())}
    left = [place for place, name in enumerate(names) if name not in done]
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(min(workers, max(1, len(left)))) as pool:
        for number, (place, found) in enumerate(zip(left, pool.imap(_work, [jobs[p] for p in left]), strict=True), 1):
            done[names[place]] = found
            if keep is not None:
                with keep.open("a") as file:
                    file.write(json.dumps({"job": names[place], "found": found}) + "\n")
            each = (time.monotonic() - began) / number
            print(
                f"{number}/{len(left)} runs, {each * (len(left) - number) / 60:.0f} min left   ",
                end="\r",
                file=sys.stderr,
            )
    print(file=sys.stderr)
    return [done[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--heart", action="store_true")
    parser.add_argument("--fashion", action="store_true")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=20, help="seeds of --fashion")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()

    def run(jobs: list[Job]) -> list[Found]:
        return run_all(jobs, given.workers, given.keep)

    missed = []
    if given.heart or not given.fashion:
        missed += heart(given.seeds, given.draws, run)
    if given.fashion or not given.heart:
        with fashion_task():
            missed += fashion(given.pairs, run)
    for words in missed:
        print(f"MISSED: {words}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
