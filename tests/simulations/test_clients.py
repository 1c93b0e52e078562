"""Whose rows are whose: complete, disjoint where they are dealt, repeatable, and made when asked for."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hansa.clients.datasets import split_rows
from hansa.common.config import Population
from hansa.common.errors import ConfigError, DataError
from hansa.common.tasks import Task, load_task
from hansa.common.tasks.schema import ArraySchema
from hansa.simulations import sources
from hansa.simulations.clients import EVALUATED, Clients, population_clients
from hansa.simulations.sources import population as rows_of

DIGITS = load_task("digits")


def clients(partition: dict[str, Any], count: int = 150, fraction: float = 0.2, seed: int = 0, **more: Any) -> Clients:
    config = Population.model_validate({"dataset": "digits", "clients": count, "partition": partition, **more})
    return population_clients(config, fraction, seed, DIGITS, Path())


def contents(made: Clients) -> list[bytes]:
    parts = [made.open(n) for n in range(len(made))]
    return [row.numpy().tobytes() for part in parts for rows in (part.train, part.held_out) for row in rows.x]


@pytest.mark.parametrize(
    "partition",
    [
        {"kind": "iid"},
        {"kind": "dirichlet", "alpha": 1.0, "min_records": 1},
        {"kind": "quantity", "alpha": 2.0, "min_records": 1},
    ],
)
def test_every_row_is_dealt_to_one_client(partition: dict[str, Any]) -> None:
    whole = rows_of("digits")[0]
    assert sorted(contents(clients(partition))) == sorted(row.numpy().tobytes() for row in whole.x)


def test_held_out_rows_are_those_that_a_partner_would_hold_out() -> None:
    made = clients({"kind": "iid"})
    without = clients({"kind": "iid"}, fraction=0.0)
    for n in range(5):
        expected = split_rows(without.open(n).train, 0.2, 0)
        assert torch.equal(made.open(n).train.x, expected.train.x)
        assert torch.equal(made.open(n).held_out.x, expected.held_out.x)


def test_a_million_clients_are_drawn_alike_every_time_and_cost_nothing() -> None:
    tracemalloc.start()
    made = clients({"kind": "drawn", "records": 30, "alpha": 0.2}, 1_000_000)
    before = tracemalloc.get_traced_memory()[0]
    some = [made.open(n) for n in (0, 7, 999_999)]
    again = clients({"kind": "drawn", "records": 30, "alpha": 0.2}, 1_000_000)
    assert tracemalloc.get_traced_memory()[0] - before < 20e6
    tracemalloc.stop()
    for n, one in zip((0, 7, 999_999), some, strict=True):
        assert torch.equal(one.train.x, again.open(n).train.x)
        assert len(one.train) + len(one.held_out) == 30
    assert not torch.equal(some[0].train.y[:10], some[1].train.y[:10])
    assert made.declared_records == 24
    assert made.evaluated == EVALUATED
    other = clients({"kind": "drawn", "records": 30, "alpha": 0.2}, 1_000_000, seed=1)
    assert not torch.equal(other.open(0).train.y[:10], some[0].train.y[:10])


@pytest.mark.parametrize("alpha", [None, 0.01, 100.0])
@pytest.mark.parametrize("records", [1, 300, 1797])
def test_a_clients_drawn_rows_are_different_ones(alpha: float | None, records: int) -> None:
    """A copy would be a record of its own for the accountant. With few classes wanted the others fill up."""
    made = clients({"kind": "drawn", "records": records, **({"alpha": alpha} if alpha else {})}, 200, fraction=0.0)
    pixels = rows_of("digits")[0].x
    copies = len(pixels) - len(np.unique(pixels.flatten(1).numpy(), axis=0))  # the data set's own
    for number in (0, 1, 2):
        x = made.open(number).train.x.flatten(1).numpy()
        assert len(x) == records
        assert len(x) - len(np.unique(x, axis=0)) <= copies


def test_more_rows_than_there_are_cannot_be_drawn() -> None:
    with pytest.raises(ConfigError, match="1797 rows"):
        clients({"kind": "drawn", "records": 1798}, 4)


def test_a_small_alpha_gives_each_drawn_client_few_classes() -> None:
    few = clients({"kind": "drawn", "records": 60, "alpha": 0.05}, 200)
    many = clients({"kind": "drawn", "records": 60}, 200)
    classes = [np.mean([len(set(c.open(n).train.y.tolist())) for n in range(60)]) for c in (few, many)]
    assert classes[0] < 4 < 9 < classes[1]


# -- one's own data ------------------------------------------------------------------------------------------------------


def folder(at: Path, **arrays: Any) -> Path:
    at.mkdir()
    rng = np.random.default_rng(0)
    made = {
        "x": rng.random((90, 1, 8, 8), np.float32),
        "y": rng.integers(0, 10, 90),
        "client": np.repeat([2, 0, 1], 30),
        "x_test": rng.random((9, 1, 8, 8), np.float32),
        "y_test": rng.integers(0, 10, 9, np.int32),
        **arrays,
    }
    for name, array in made.items():
        if array is not None:
            np.save(at / f"{name}.npy", array)
    return at


def with_nan(n: int) -> Any:
    """In the last row: also what is looked at last is looked at."""
    x = np.zeros((n, 1, 8, 8), np.float32)
    x[-1, 0, 3, 3] = np.nan
    return x


def own(at: Path, partition: dict[str, Any], count: int = 3, task: Task = DIGITS) -> Clients:
    config = Population.model_validate({"dataset": f"./{at.name}", "clients": count, "partition": partition})
    return population_clients(config, 0.2, 0, task, at.parent)


def test_a_folder_of_arrays_is_a_population_with_its_own_partition(tmp_path: Path) -> None:
    at = folder(tmp_path / "mine")
    x, y = np.load(at / "x.npy"), np.load(at / "y.npy")
    made = own(at, {"kind": "natural"})
    for n, begin in ((0, 30), (1, 60), (2, 0)):
        assert np.array_equal(made.open(n).train.x, x[begin : begin + 30])
        assert np.array_equal(made.open(n).train.y, y[begin : begin + 30])
    assert sum(len(made.open(n).held_out) for n in range(3)) == 9
    assert len(own(at, {"kind": "drawn", "records": 5}, 500).open(499).train) == 5


def test_a_large_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    shape, n = (1000,), 50_000
    at = tmp_path / "large"
    at.mkdir()
    x = np.lib.format.open_memmap(at / "x.npy", "w+", np.float32, (n, *shape))  # 200 MB, sparse
    x[-1] = 1
    x.flush()
    del x
    np.save(at / "y.npy", np.arange(n) % 2)
    task = Task(
        "wide", "wide", ArraySchema(shape=shape, value_range=(0, 1)), ("a", "b"), lambda: torch.nn.Linear(1000, 2)
    )

    def own_mb() -> float:
        """Without the pages of files, which the system may take back."""
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1e3

    before = own_mb()
    config = Population.model_validate(
        {"dataset": "./large", "clients": 1000, "partition": {"kind": "drawn", "records": 20}}
    )
    made = population_clients(config, 0.0, 0, task, tmp_path)
    for number in range(50):
        made.open(number)
    assert own_mb() - before < 40


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": None}, "no file"),
        ({"y": None}, "no file"),
        ({"x": np.zeros((90, 1, 8, 8))}, "float64"),
        ({"x": np.zeros(90, np.float32)}, "not float32"),
        ({"x": np.zeros((90, 1, 9, 8), np.float32), "x_test": None}, "shape"),
        ({"x_test": np.zeros((9, 1, 8, 9), np.float32)}, "shape"),
        ({"y": np.zeros(90)}, "not integers"),
        ({"y": np.zeros((90, 1), int)}, "not integers"),
        ({"y": np.zeros(89, int)}, "89 labels for 90 rows"),
        ({"y": np.full(90, 10)}, "class outside 0 to 9"),
        ({"x": np.full((90, 1, 8, 8), 1.5, np.float32)}, r"x.npy, rows 0 to 6: 7 of 7 rows hold values outside 0 to 1"),
        ({"x": with_nan(90)}, r"x.npy, rows 84 to 89: 1 of 6 rows hold NaN or Inf; rows \(from 0\) 89"),
        ({"x_test": with_nan(9)}, r"x_test.npy, rows 7 to 8: 1 of 2 rows hold NaN"),
        ({"y_test": np.full(9, -1)}, "class outside"),
        ({"client": np.zeros(5, int)}, "5 client numbers for 90 rows"),
        ({"client": np.full(90, -1)}, "no client"),
    ],
)
def test_other_arrays_are_refused_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(sources, "_PIECE", 64 * 7)  # seven rows at a time
    with pytest.raises(DataError, match=words):
        own(folder(tmp_path / "mine", **arrays), {"kind": "natural"})


def test_what_is_no_array_is_refused(tmp_path: Path) -> None:
    at = folder(tmp_path / "mine")
    for bad in (b"", b"\x93NUMPY", b"PK\x03\x04", b"\x80\x04K\x01."):
        (at / "x.npy").write_bytes(bad)
        with pytest.raises(DataError, match="cannot be read"):
            own(at, {"kind": "natural"})
    np.save(at / "x.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        own(at, {"kind": "natural"})


def test_a_partition_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whose"):
        own(folder(tmp_path / "a", client=None), {"kind": "natural"})
    with pytest.raises(ConfigError, match="clients: 3"):
        own(folder(tmp_path / "b"), {"kind": "natural"}, 4)
    with pytest.raises(ConfigError, match="without rows"):
        own(folder(tmp_path / "c", client=np.repeat([0, 2, 3], 30)), {"kind": "natural"}, 4)
    with pytest.raises(ConfigError, match="drawn"):
        own(folder(tmp_path / "d"), {"kind": "iid"}, 91)
    with pytest.raises(DataError, match="with a /"):
        rows_of("mnist")
