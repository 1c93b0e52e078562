"""Registered datasets: what is checked, committed to, and when data are read."""

import hashlib
import hmac
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hansa.clients.datasets import RegisteredDataset, Rows, Split, csv_source, fingerprint, split_rows
from hansa.common.errors import ConfigError, DataError, OutputError, SchemaViolation
from hansa.common.tasks import Task, load_task
from hansa.common.tasks.schema import ArraySchema

CLEVELAND = Path(__file__).parents[2] / "simulations" / "data" / "heart-disease" / "cleveland.csv"
TASK = Task("t", "", ArraySchema(shape=(3,), value_range=(-1, 1)), ("no", "yes"), lambda: torch.nn.Linear(3, 2))


def rows(n, seed=0, features=3):
    generator = torch.Generator().manual_seed(seed)
    return Rows(torch.rand(n, features, generator=generator) * 2 - 1, torch.arange(n) % 2)


class Source:
    """Counts how often it is read; `split` can be changed behind the node's back."""

    def __init__(self, split=None):
        self.split = split or Split(rows(8), rows(4, seed=1))
        self.reads = 0

    def __call__(self):
        self.reads += 1
        return self.split


def changed(part, place, value):
    """A source one value of which is another."""
    split = Split(rows(8), rows(4, seed=1))
    getattr(getattr(split, part[0]), part[1])[place] = value
    return Source(split)


# --- splitting ------------------------------------------------------------------------------------------------------


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_split_is_disjoint_complete_and_repeatable(labels, fraction, seed):
    n = len(labels)
    population = Rows(torch.arange(n, dtype=torch.float32).reshape(n, 1), torch.tensor(labels))
    split = split_rows(population, fraction, seed)
    train, held_out = split.train.x.flatten().tolist(), split.held_out.x.flatten().tolist()
    assert sorted(train + held_out) == list(range(n))
    assert train == sorted(train)
    for part in (split.train, split.held_out):
        assert part.y.tolist() == [labels[int(i)] for i in part.x.flatten()]
    again = split_rows(population, fraction, seed)
    assert torch.equal(again.held_out.x, split.held_out.x)


@given(labels=st.lists(st.integers(0, 1), min_size=2, max_size=40), drop=st.integers(0, 39), seed=st.integers(0, 1000))
def test_adding_or_removing_a_record_moves_no_other(labels, drop, seed):
    """Add-or-remove-one must mean the same before the split as after it; equal rows are told apart by their order."""
    x = torch.tensor(labels, dtype=torch.float32)[:, None] * 0 + torch.arange(len(labels))[:, None] % 7
    drop %= len(labels)
    keep = torch.tensor([i for i in range(len(labels)) if i != drop])
    whole = split_rows(Rows(x, torch.tensor(labels)), 0.5, seed)
    less = split_rows(Rows(x[keep], torch.tensor(labels)[keep]), 0.5, seed)
    for part in ("train", "held_out"):
        many, few = (
            Counter(zip(r.x.flatten().tolist(), r.y.tolist(), strict=True))
            for r in (getattr(whole, part), getattr(less, part))
        )
        assert sum((few - many).values()) == 0
        assert sum((many - few).values()) <= 1


def test_a_fraction_of_the_rows_is_held_out():
    split = split_rows(rows(5000), 0.2, 3)
    assert abs(len(split.held_out) - 1000) < 6 * (5000 * 0.2 * 0.8) ** 0.5


def test_another_seed_gives_another_split_and_zero_holds_out_nothing():
    assert not torch.equal(split_rows(rows(50), 0.5, 1).train.x, split_rows(rows(50), 0.5, 2).train.x)
    split = split_rows(rows(50), 0.0, 1)
    assert len(split.held_out) == 0
    assert split.held_out.x.shape == (0, 3)
    assert torch.equal(split.train.x, rows(50).x)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_outside_its_range(fraction):
    with pytest.raises(ConfigError, match=f"test_fraction is {fraction}"):
        split_rows(rows(5), fraction, 0)


# --- registering ----------------------------------------------------------------------------------------------------


def test_only_register_and_the_first_open_read(tmp_path):
    source = Source()
    dataset = RegisteredDataset.register(TASK, source, tmp_path / "node")
    assert source.reads == 1
    assert dataset.size_within(8, 0.0)
    assert dataset.size_within(10, 0.2)
    assert not dataset.size_within(10, 0.19)
    assert dataset.size_within(240, 1.0)
    assert not dataset.size_within(4, 0.5)
    assert (dataset.task, len(dataset.dataset_id), len(dataset.commitment)) == ("t", 32, 64)
    assert source.reads == 1
    assert dataset.open() is dataset.open() is source.split
    assert source.reads == 2


def test_the_commitment_is_the_documented_hmac_under_a_key_that_stays_private(tmp_path):
    split = Source().split
    dataset = RegisteredDataset.register(TASK, Source(), tmp_path)
    kept = json.loads((tmp_path / "dataset.json").read_text())
    assert (tmp_path / "dataset.json").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["dataset.json"]

    def by_hand(part):
        n, f = part.x.shape
        data = b"".join(np.float32(v).tobytes() for v in part.x.flatten().tolist())
        return hashlib.sha256(
            f"hansa rows 1 [{n}, {f}]\0".encode() + data + b"".join(v.to_bytes(8, "little") for v in part.y.tolist())
        ).digest()

    assert fingerprint(split.train) == by_hand(split.train)
    key = bytes.fromhex(kept["key"])
    for part, name in ((split.train, "commitment"), (split.held_out, "held_out_commitment")):
        message = b"hansa dataset 1\0t\0" + by_hand(part)
        assert getattr(dataset, name) == hmac.new(key, message, hashlib.sha256).hexdigest() == kept[name]
    assert len(key) == 32
    assert kept["key"] not in repr(dataset)
    assert str(key) not in repr(dataset)


def test_two_registrations_of_the_same_rows_share_nothing(tmp_path):
    first, second = (RegisteredDataset.register(TASK, Source(), f) for f in (tmp_path / "a", None))
    assert first.dataset_id != second.dataset_id
    assert first.commitment != second.commitment


def test_a_registration_survives_a_restart(tmp_path):
    first = RegisteredDataset.register(TASK, Source(), tmp_path)
    before = (tmp_path / "dataset.json").read_bytes()
    second = RegisteredDataset.register(TASK, Source(), tmp_path)
    assert (second.dataset_id, second.commitment) == (first.dataset_id, first.commitment)
    assert (tmp_path / "dataset.json").read_bytes() == before


CHANGES = [
    changed(("train", "x"), (0, 0), 0.123),
    changed(("train", "y"), 0, 1),
    changed(("held_out", "x"), (3, 2), 0.123),
    changed(("held_out", "y"), 3, 0),
    Source(Split(rows(7), rows(4, seed=1))),
    Source(Split(rows(4, seed=1), rows(8))),
]


@pytest.mark.parametrize("other", CHANGES)
def test_changed_data_are_refused_at_open_and_at_the_next_registration(tmp_path, other):
    source = Source()
    dataset = RegisteredDataset.register(TASK, source, tmp_path)
    source.split = other.split
    with pytest.raises(DataError, match=f"dataset {dataset.dataset_id} changed after registration"):
        dataset.open()
    with pytest.raises(DataError, match=r"differ from what .*dataset.json registered"):
        RegisteredDataset.register(TASK, source, tmp_path)
    source.split = Source().split
    dataset.open()


def test_another_task_is_another_registration(tmp_path):
    RegisteredDataset.register(TASK, Source(), tmp_path)
    other = Task("u", "", TASK.schema, TASK.classes, TASK.build_model)
    with pytest.raises(DataError, match=r"registered \(task 't'\)"):
        RegisteredDataset.register(other, Source(), tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(Split(rows(0), rows(4))), "no rows to train on"),
        (changed(("train", "x"), (2, 1), float("nan")), r"training rows: 1 of 8 rows hold NaN or Inf; .* 2\b"),
        (changed(("train", "x"), (2, 1), float("-inf")), "training rows: 1 of 8 rows hold NaN or Inf"),
        (changed(("held_out", "x"), (1, 0), float("nan")), "held-out rows: 1 of 4 rows hold NaN or Inf"),
        (changed(("train", "x"), (0, 0), 1.01), "values outside -1 to 1"),
        (changed(("train", "y"), 5, 2), r"a class outside 0 to 1; rows \(from 0\) 5"),
        (changed(("train", "y"), 5, -1), "a class outside 0 to 1"),
        (changed(("train", "y"), slice(None), 1), "all labels are of one class, 'yes'"),
        (Source(Split(rows(8, features=4), rows(4))), r"training rows: shapes are \[8, 4\] and \[8\]"),
        (Source(Split(Rows(rows(8).x, rows(7).y), rows(4))), r"shapes are \[8, 3\] and \[7\]"),
        (Source(Split(Rows(rows(8).x.double(), rows(8).y), rows(4))), "types are torch.float64"),
        (Source(Split(Rows(rows(8).x, rows(8).y.int()), rows(4))), "torch.int32"),
    ],
)
def test_unusable_rows_are_refused_and_nothing_is_registered(tmp_path, source, message):
    with pytest.raises(DataError, match=message):
        RegisteredDataset.register(TASK, source, tmp_path / "node")
    assert not (tmp_path / "node").exists()


def test_a_single_class_when_the_partner_allows_it():
    source = changed(("train", "y"), slice(None), 1)
    assert RegisteredDataset.register(TASK, source, None, allow_single_class=True).open() is source.split


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"key": "00"}', '{"key": 3}', b"\xff"])
def test_a_damaged_registration_is_not_replaced(tmp_path, content):
    path = tmp_path / "dataset.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"dataset.json is not a dataset registration"):
        RegisteredDataset.register(TASK, Source(), tmp_path)
    assert path.stat().st_size == len(content)


def test_a_full_disk_leaves_no_half_registration(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"dataset.json: the disk is full"):
            RegisteredDataset.register(TASK, Source(), tmp_path)
    assert os.listdir(tmp_path) == []
    RegisteredDataset.register(TASK, Source(), tmp_path)


# --- CSV files ------------------------------------------------------------------------------------------------------


def test_a_csv_file_is_read_only_when_asked(tmp_path):
    task, path = load_task("heart-disease"), tmp_path / "a.csv"
    source = csv_source(path, task, 0.2, seed=3)  # the file does not even exist yet
    with pytest.raises(DataError, match="no data file"):
        source()
    path.write_bytes(CLEVELAND.read_bytes())
    dataset = RegisteredDataset.register(task, source, tmp_path / "node")
    split = dataset.open()
    assert len(split.train) + len(split.held_out) == 303
    assert dataset.size_within(240, 0.1)

    other_split = csv_source(path, task, 0.2, seed=4)
    with pytest.raises(DataError, match="differ from what"):
        RegisteredDataset.register(task, other_split, tmp_path / "node")


def test_a_nan_in_a_csv_file_is_named(tmp_path):
    lines = CLEVELAND.read_text().splitlines()
    lines[5] = lines[5].replace(lines[5].split(",")[3], "NaN", 1)
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(SchemaViolation) as caught:
        RegisteredDataset.register(load_task("heart-disease"), csv_source(path, load_task("heart-disease"), 0, 0), None)
    assert [row[:3] for row in caught.value.rows] == [(6, "trestbps", "NaN")]


def test_a_task_of_arrays_takes_no_csv():
    with pytest.raises(DataError, match=r"task digits takes arrays, not a CSV file: x.csv"):
        csv_source("x.csv", load_task("digits"), 0.2, 0)
