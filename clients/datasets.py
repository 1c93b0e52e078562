"""Registered datasets: rows that a node committed to, read only when training or evaluation may read them."""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common.errors import ConfigError, DataError, LedgerError
from ..common.identity import write_whole
from ..common.tasks import Task
from ..common.tasks.schema import TableSchema, parse_table, read_table
from .registrations import Declaration, read_registration

__all__ = [
    "Declaration",
    "RegisteredDataset",
    "Rows",
    "Split",
    "check_rows",
    "csv_files",
    "csv_source",
    "fingerprint",
    "look_alike",
    "raw_records",
    "rows_in_both",
    "split_rows",
    "timestamp",
]


@dataclass(frozen=True, eq=False)
class Rows:
    """Features float32 [n, *shape] and classes int64 [n]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> Rows:
        """The rows at these places (int64 [m])."""
        return Rows(self.x[index], self.y[index])


@dataclass(frozen=True, eq=False)
class Split:
    """Rows to train on and rows held out for evaluation (none of them in both)."""

    train: Rows
    held_out: Rows


def split_rows(rows: Rows, test_fraction: float, seed: int) -> Split:
    """Hold out each row with probability `test_fraction`, by a hash of the row itself.

    Where a row goes depends on the seed, on itself and on how many equal rows stand before it, on no other row: adding or
    removing one record moves no other, so "add or remove one" means the same before the split as after it. (A split by a
    permutation, or so many of each class, moves others.) Disjoint, complete, in the order of `rows`.

    Raises:
        ConfigError: a fraction outside [0, 1).
    """
    away = held_out(rows, test_fraction, seed)
    return Split(
        train=rows.take(torch.from_numpy(np.flatnonzero(~away))),
        held_out=rows.take(torch.from_numpy(np.flatnonzero(away))),
    )


def held_out(rows: Rows, test_fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which rows `split_rows` holds out, bool [n].

    Raises:
        ConfigError: a fraction outside [0, 1).
    """
    if not 0 <= test_fraction < 1:
        raise ConfigError(f"test_fraction is {test_fraction}", "Allowed is 0 (nothing held out) to below 1.")
    seen: Counter[bytes] = Counter()
    found = np.zeros(len(rows), dtype=bool)
    for number, content in enumerate(_row_bytes(rows)):
        row = hashlib.sha256(content).digest()
        coin = hashlib.sha256(f"hansa split {seed} {seen[row]}\0".encode() + row).digest()
        seen[row] += 1
        found[number] = int.from_bytes(coin[:8], "big") < test_fraction * 2**64
    return found


def csv_source(path: Path | str, task: Task, test_fraction: float, seed: int) -> Callable[[], Split]:
    """A source that reads a CSV file by the task's schema each time it is called, and splits it.

    Raises:
        DataError: at once, when the task's records are not rows of a table; in the call, as `read_table`.
    """
    schema = task.schema
    if not isinstance(schema, TableSchema):
        raise DataError(f"task {task.name} takes arrays, not a CSV file: {path}", "Name a data set of arrays instead.")

    def read() -> Split:
        x, y = read_table(path, schema)
        return split_rows(Rows(torch.from_numpy(x), torch.from_numpy(y)), test_fraction, seed)

    return read


def csv_files(data: Path, held_out: Path | None, task: Task) -> Callable[[], Split]:
    """A source that reads two CSV files by the task's schema each time it is called: rows to train on, rows held out.

    Raises:
        DataError: at once, when the task's records are not rows of a table; in the call, as `parse_table`.
    """
    schema = task.schema
    if not isinstance(schema, TableSchema):
        raise DataError(
            f"task {task.name} takes arrays, not a CSV file: {data}", "Only tasks of tables read CSV files."
        )

    def rows(path: Path) -> Rows:
        table = parse_table(path, schema)
        return Rows(torch.from_numpy(table.x), torch.from_numpy(table.y))

    def read() -> Split:
        train = rows(data)
        if held_out is None:
            return Split(train, train.take(torch.zeros(0, dtype=torch.int64)))
        return Split(train, rows(held_out))

    return read


def rows_in_both(split: Split) -> list[int]:
    """Which held-out rows (from 1) equal a row to train on, class and all."""
    known = set(_row_bytes(split.train))
    return [number for number, row in enumerate(_row_bytes(split.held_out), start=1) if row in known]


def look_alike(rows: Rows, others: Rows) -> list[int]:
    """Which of `rows` (from 1) have the features of one of `others`, whatever their class: a corrected label is no other record."""
    if rows.x.shape[1:] != others.x.shape[1:]:
        return []
    known = set(_feature_bytes(others))
    return [number for number, row in enumerate(_feature_bytes(rows), start=1) if row in known]


def raw_records(path: Path) -> list[frozenset[tuple[str, str]]]:
    """The records of a CSV file as (column, cell) pairs, empty cells left out: to compare files of different tasks.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            head, *records = [[cell.strip() for cell in record] for record in csv.reader(file) if record]
    except (OSError, ValueError, csv.Error) as err:
        raise DataError(f"{path}: cannot be read", "Give a CSV file with a header line.") from err
    return [frozenset((c, cell) for c, cell in zip(head, record, strict=False) if cell) for record in records]


def _feature_bytes(rows: Rows) -> Iterator[bytes]:
    features = np.ascontiguousarray(rows.x.numpy(), "<f4") + np.float32(0)  # -0.0 becomes 0.0
    return (features[number].tobytes() for number in range(len(rows)))


def _row_bytes(rows: Rows) -> Iterator[bytes]:
    features, labels = np.ascontiguousarray(rows.x.numpy(), "<f4"), rows.y.numpy().astype("<i8")
    return (features[number].tobytes() + labels[number].tobytes() for number in range(len(rows)))


def fingerprint(rows: Rows) -> bytes:
    """SHA-256 of shape, features (little-endian float32) and classes (little-endian int64), in row order."""
    digest = hashlib.sha256(f"hansa rows 1 {list(rows.x.shape)}\0".encode())
    digest.update(np.ascontiguousarray(rows.x.numpy(), dtype="<f4").data)
    digest.update(np.ascontiguousarray(rows.y.numpy(), dtype="<i8").data)
    return digest.digest()


@dataclass(eq=False)
class RegisteredDataset:
    """What a node registered: where the rows are and what it committed to. Only `open` reads them.

    Attributes:
        task: name of the task.
        dataset_id: 16 random bytes, hex.
        lineage: 16 random bytes, hex: what the budget belongs to. Versions and overlapping data sets share it.
        declared: what its owner says of its records.
        registered: when, UTC: data sets of one node stand in this order.
        commitment: hex HMAC-SHA256 over the fingerprint of the training rows. Its 32-byte key is random and stays at
            the node, so it binds the node and tells nobody else anything (records can be guessed, and a plain hash would
            confirm a guess).
        held_out: "public" when the held-out rows were registered as a public dataset, "private", or "none".
        held_out_commitment: the same over the held-out rows; None when there are none.
    """

    task: str
    dataset_id: str
    lineage: str
    declared: Declaration
    commitment: str
    held_out: str
    held_out_commitment: str | None
    registered: str
    _key: bytes = field(repr=False)
    _train_size: int = field(repr=False)
    _source: Callable[[], Split] = field(repr=False)
    _path: Path | None = field(repr=False)
    _ledger_id: str | None = field(default=None, repr=False)
    _opened: Split | None = field(default=None, repr=False)

    @classmethod
    def register(
        cls,
        task: Task,
        source: Callable[[], Split],
        folder: Path | None,
        allow_single_class: bool = False,
        *,
        public: bool = False,
        lineage: str | None = None,
        declared: Declaration = Declaration(),
        registered: str | None = None,
    ) -> RegisteredDataset:
        """Read once, check, commit; keep id, key, commitments and size in `folder`/dataset.json (mode 0600).

        A dataset.json that is already there keeps its id and key, and must still describe the same rows.

        Args:
            public: the held-out rows are registered as public: their scores and labels may leave.
            lineage: whose budget it shares; None opens one.
            declared: by the owner; one that is registered already keeps what was declared then.
            registered: when; None: now.

        Raises:
            DataError: rows that are empty, not finite, out of range, of the wrong shape or type, or all of one class
                (unless allowed); rows that changed since registration; an unreadable dataset.json.
            OutputError: dataset.json cannot be written.
        """
        split = source()
        check_rows(task, "training rows", split.train)
        check_rows(task, "held-out rows", split.held_out)
        if not len(split.train):
            raise DataError("there are no rows to train on", "Register data with at least one row of each class.")
        if not allow_single_class and len(present := set(split.train.y.tolist())) == 1:
            raise DataError(
                f"all labels are of one class, {task.classes[present.pop()]!r}: nothing to learn from",
                "Check the label's column and its mapping in the schema.",
            )
        path = None if folder is None else folder / "dataset.json"
        kept = read_registration(path) if path is not None and path.exists() else None
        key = secrets.token_bytes(32) if kept is None else bytes.fromhex(kept["key"])
        some = public or len(split.held_out) > 0  # a public dataset may turn out empty
        dataset = cls(
            task=task.name,
            dataset_id=secrets.token_hex(16) if kept is None else kept["dataset_id"],
            lineage=(lineage or secrets.token_hex(16)) if kept is None else kept["lineage"],
            declared=declared if kept is None else Declaration(**kept["declared"]),
            commitment=_commit(key, task.name, split.train),
            held_out=("public" if public else "private") if some else "none",
            held_out_commitment=_commit(key, task.name, split.held_out) if some else None,
            registered=(registered or timestamp()) if kept is None else kept["registered"],
            _key=key,
            _train_size=len(split.train),
            _source=source,
            _path=path,
            _ledger_id=None if kept is None else kept["ledger_id"],
        )
        if kept is not None and dataset._content() != kept:
            raise DataError(
                f"the data differ from what {path} registered (task {kept['task']!r})",
                "Its spent budget belongs to those rows under that task, split and seed. Restore them, or register the new data "
                "under another name.",
            )
        if kept is None:
            dataset._save()
        return dataset

    @classmethod
    def load(cls, task: Task, source: Callable[[], Split], folder: Path) -> RegisteredDataset:
        """The dataset that `folder`/dataset.json registers. Reads no data: `open` checks it against the commitments.

        Raises:
            DataError: nothing is registered there, it cannot be read, or it is registered for another task.
        """
        path = folder / "dataset.json"
        if not path.exists():
            raise DataError(
                f"{folder}: no data is registered", "Register it: hansa node dataset add FILE.csv --task TASK"
            )
        kept = read_registration(path)
        if kept["task"] != task.name:
            raise DataError(f"{path} is registered for task {kept['task']}", f"It cannot serve {task.name}.")
        return cls(
            task=task.name,
            dataset_id=kept["dataset_id"],
            lineage=kept["lineage"],
            declared=Declaration(**kept["declared"]),
            commitment=kept["commitment"],
            held_out=kept["held_out"],
            held_out_commitment=kept["held_out_commitment"],
            registered=kept["registered"],
            _key=bytes.fromhex(kept["key"]),
            _train_size=kept["train_size"],
            _source=source,
            _path=path,
            _ledger_id=kept["ledger_id"],
        )

    @property
    def bound(self) -> bool:
        """Whether a ledger holds its budget already."""
        return self._ledger_id is not None

    def describe(self) -> dict[str, Any]:
        """What its entry in the ledger says about it."""
        held_out = {"kind": self.held_out, "commitment": self.held_out_commitment}
        return {
            "dataset": self.dataset_id,
            "lineage": self.lineage,
            "task": self.task,
            "commitment": self.commitment,
            "held_out": held_out,
            "declared": asdict(self.declared),
        }

    def bind(self, ledger_id: str) -> None:
        """Tie this dataset's budget to the one ledger that holds it, for good.

        Raises:
            LedgerError: it is tied to another ledger, so what was spent would be forgotten.
        """
        if self._ledger_id not in (None, ledger_id):
            raise LedgerError(
                f"the budget of dataset {self.dataset_id} is in another ledger ({self._ledger_id}) than this one",
                "Restore that ledger: without it what was spent would be forgotten.",
            )
        if self._ledger_id is None:
            self._ledger_id = ledger_id
            self._save()

    def _content(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "dataset_id": self.dataset_id,
            "lineage": self.lineage,
            "declared": asdict(self.declared),
            "key": self._key.hex(),
            "commitment": self.commitment,
            "held_out": self.held_out,
            "held_out_commitment": self.held_out_commitment,
            "registered": self.registered,
            "train_size": self._train_size,
            "ledger_id": self._ledger_id,
        }

    def _save(self) -> None:
        if self._path is not None:
            write_whole(self._path, json.dumps(self._content(), indent=1).encode(), mode=0o600)

    def is_of(self, split: Split) -> bool:
        """Whether these are exactly the rows that were registered."""
        if len(split.train) != self._train_size:
            return False
        parts = [(split.train, self.commitment)]
        if self.held_out_commitment is not None:
            parts.append((split.held_out, self.held_out_commitment))
        elif len(split.held_out):
            return False
        return all(hmac.compare_digest(_commit(self._key, self.task, rows), stated) for rows, stated in parts)

    def open(self) -> Split:
        """The rows; read from the source the first time, then kept.

        Raises:
            DataError: they are not the rows that were registered, or the source cannot be read.
        """
        if self._opened is None:
            split = self._source()
            if not self.is_of(split):
                raise DataError(
                    f"the data of dataset {self.dataset_id} changed after registration",
                    "Restore the registered rows, or register the new ones: hansa node dataset add FILE --version-of NAME",
                )
            self._opened = split
        return self._opened

    def size_within(self, declared: int, tolerance: float) -> bool:
        """Whether the training rows number `declared`, give or take the fraction `tolerance` of it.

        Reads no data. The answer is for the gate at this node; the size itself never leaves.
        """
        return abs(self._train_size - declared) <= tolerance * declared + 1e-9


def timestamp() -> str:
    """Now, in UTC, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def check_rows(task: Task, what: str, rows: Rows, first: int = 0) -> None:
    """Refuse rows that are not as the task's schema says.

    Args:
        first: the number of the first of them.

    Raises:
        DataError: which rows, and what is wrong with them.
    """
    shape, (low, high) = task.schema.shape, task.schema.value_range
    hint = f"Task {task.name} takes float32 [n, {', '.join(map(str, shape))}] and int64 classes [n]."
    if rows.x.dtype != torch.float32 or rows.y.dtype != torch.int64:
        raise DataError(f"{what}: types are {rows.x.dtype} and {rows.y.dtype}", hint)
    if tuple(rows.x.shape) != (len(rows), *shape) or rows.y.ndim != 1:
        raise DataError(f"{what}: shapes are {list(rows.x.shape)} and {list(rows.y.shape)}", hint)
    if not len(rows):
        return
    flat = rows.x.flatten(1)
    least, most = flat.aminmax()  # NaN if a value is: a quarter of the time of looking at each
    if low <= float(least) and float(most) <= high and int(rows.y.min()) >= 0 and int(rows.y.max()) < len(task.classes):
        return
    for bad, problem in (
        (~torch.isfinite(flat).all(1), "NaN or Inf"),
        (((flat < low) | (flat > high)).any(1), f"values outside {low:g} to {high:g}"),
        ((rows.y < 0) | (rows.y >= len(task.classes)), f"a class outside 0 to {len(task.classes) - 1}"),
    ):
        if bad.any():
            places = (bad.nonzero().flatten() + first).tolist()
            named = ", ".join(map(str, places[:10])) + (", ..." if len(places) > 10 else "")
            raise DataError(f"{what}: {len(places)} of {len(rows)} rows hold {problem}; rows (from 0) {named}", hint)


def _commit(key: bytes, task: str, rows: Rows) -> str:
    content = b"hansa dataset 1\0" + task.encode() + b"\0" + fingerprint(rows)
    return hmac.new(key, content, hashlib.sha256).hexdigest()
