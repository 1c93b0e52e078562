"""What is registered at a node, as its files say: without rows, and without the tasks, which bring torch and its seconds.

Commands that only report read this; `registry` adds the tasks and rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..common.errors import CharterError, ConfigError, DataError, Refusal, Refused
from ..common.identity import TEMPORARY, write_whole
from ..common.ledger import Entry, read_ledger

if TYPE_CHECKING:
    from ..common.tasks import Task
    from .datasets import Split


@dataclass(frozen=True)
class Declaration:
    """What an owner declares of a data set's records, signed by the entry that registers it in the ledger.

    Attributes:
        kind: "first" of its ledger; "version": appended or corrected rows of `of`; "overlap": shares records with `of`; "disjoint":
            collected from `cutoff` on, no record is in any data set that was registered before.
        of: a data set's id; None for "first" and "disjoint".
        cutoff: a date (YYYY-MM-DD); None but for "disjoint".
    """

    kind: str = "first"
    of: str | None = None
    cutoff: str | None = None


@dataclass(frozen=True)
class DataFiles:
    """Where the registered rows are.

    Attributes:
        held_out: a separate file of rows that are not trained on; None: there are none.
    """

    task: str
    data: Path
    held_out: Path | None

    def source(self, task: Task) -> Callable[[], Split]:
        """Reads them each time it is called."""
        from .datasets import csv_files

        return csv_files(self.data, self.held_out, task)

    def save(self, folder: Path) -> None:
        """Keep it beside the registration, mode 0600."""
        held_out = None if self.held_out is None else str(self.held_out)
        said = {"task": self.task, "data": str(self.data), "held_out": held_out}
        write_whole(folder / "source.json", json.dumps(said).encode(), mode=0o600)

    @classmethod
    def load(cls, folder: Path) -> DataFiles:
        """What `save` kept.

        Raises:
            DataError: the file is missing or damaged.
        """
        try:
            said = json.loads((folder / "source.json").read_bytes())
            return cls(said["task"], Path(said["data"]), None if said["held_out"] is None else Path(said["held_out"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(
                f"{folder / 'source.json'}: does not say where the data is", "Restore it from a backup."
            ) from None


@dataclass(frozen=True)
class Facts:
    """What was registered of one data set. The fields are those of `RegisteredDataset`.

    Attributes:
        task: name of the task, which need not be installed here.
    """

    task: str
    dataset_id: str
    lineage: str
    declared: Declaration
    held_out: str
    registered: str


@dataclass(frozen=True)
class Listed:
    """One registered data set, as its files say.

    Attributes:
        name: what its owner calls it; it stays at this node.
    """

    name: str
    files: DataFiles
    dataset: Facts


class _Of(Protocol):
    @property
    def task(self) -> str: ...
    @property
    def dataset_id(self) -> str: ...
    @property
    def declared(self) -> Declaration: ...


class Kept(Protocol):
    """What is asked of a data set here: `Listed` and `registry.Registered` have it."""

    @property
    def name(self) -> str:
        """What its owner calls it."""
        ...

    @property
    def dataset(self) -> _Of:
        """What was registered."""
        ...


_One = TypeVar("_One", bound=Kept)


def registered_at(state: Path) -> list[Listed]:
    """Every data set of a state folder, in the order in which they were registered.

    Raises:
        DataError: a registration is damaged.
    """
    folder = state / "datasets"
    found = []
    for path in sorted(folder.glob("*/dataset.json")):
        if path.parent.name.startswith(TEMPORARY):
            continue
        files, kept = DataFiles.load(path.parent), read_registration(path)
        if kept["task"] != files.task:
            raise DataError(f"{path} is registered for task {kept['task']}", f"It cannot serve {files.task}.")
        facts = Facts(
            task=kept["task"],
            dataset_id=kept["dataset_id"],
            lineage=kept["lineage"],
            declared=Declaration(**kept["declared"]),
            held_out=kept["held_out"],
            registered=kept["registered"],
        )
        found.append(Listed(path.parent.name, files, facts))
    if len({one.dataset.dataset_id for one in found}) < len(found):
        raise DataError(f"{folder}: one data set is registered under two names", "Remove the copy.")
    return sorted(found, key=lambda one: one.dataset.registered)


def recorded_datasets(ledger: Path) -> dict[str, Entry]:
    """Data set -> its entry; nothing where there is no ledger. Takes no lock.

    Raises:
        LedgerError: it does not verify.
    """
    if not ledger.exists() or not ledger.stat().st_size:
        return {}
    return {str(entry.body["dataset"]): entry for entry in read_ledger(ledger)[0] if entry.type == "dataset"}


def newest(known: Sequence[_One], name: str) -> _One:
    """The newest version of the data set with this name.

    Raises:
        ConfigError: there is no such name.
    """
    found = named(known, name)
    while later := [one for one in known if one.dataset.declared == Declaration("version", found.dataset.dataset_id)]:
        found = later[-1]
    return found


def named(known: Sequence[_One], name: str) -> _One:
    """The data set with this name.

    Raises:
        ConfigError: there is none.
    """
    for one in known:
        if one.name == name:
            return one
    names = ", ".join(one.name for one in known) or "none"
    raise ConfigError(f"no data set {name!r} is registered", f"Registered are: {names}. See: hansa node dataset list")


def superseded(known: Sequence[Kept], one: Kept) -> bool:
    """Whether there is a newer version of it."""
    return any(other.dataset.declared == Declaration("version", one.dataset.dataset_id) for other in known)


def fitting(known: Sequence[_One], task: str) -> list[_One]:
    """The data sets of a task, newest versions alone."""
    return [one for one in known if one.dataset.task == task and not superseded(known, one)]


def serving(known: Sequence[_One], task: str, name: str | None) -> _One:
    """The data set that a charter of this task is served from: the newest version of the named one, or the only one that fits.

    Raises:
        ConfigError: there is no such name.
        Refused: none is registered for its task.
        CharterError: several are, and none was named.
    """
    if name is not None:
        found = newest(known, name)
        if found.dataset.task != task:
            raise Refused(
                Refusal.TASK,
                f"the data set {name} is registered for task {found.dataset.task}, the charter's is {task}",
                "Name another one under `dataset` in node.yaml.",
            )
        return found
    found_all = fitting(known, task)
    if not found_all:
        raise Refused(
            Refusal.TASK,
            f"no data is registered for its task, {task}",
            "Register it: hansa node dataset add FILE.csv --task TASK",
        )
    if len(found_all) > 1:
        raise CharterError(
            f"several data sets are registered for its task: {', '.join(one.name for one in found_all)}",
            "Say which one it trains on: `dataset: NAME` beside the charter in node.yaml.",
        )
    return found_all[0]


def read_registration(path: Path) -> dict[str, Any]:
    """The fields of a dataset.json.

    Raises:
        DataError: it cannot be read, or is none.
    """
    try:
        kept = json.loads(path.read_bytes())
        if len(bytes.fromhex(kept["key"])) != 32 or not all(kept[k] for k in ("task", "dataset_id", "commitment")):
            raise ValueError
        if not {"ledger_id", "held_out", "held_out_commitment", "train_size", "lineage"} <= set(kept):
            raise ValueError
        Declaration(**kept["declared"])
        datetime.fromisoformat(kept["registered"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{path} is not a dataset registration that can be read",
            "Restore it from a backup: the budget of its dataset is bound to the id in it.",
        ) from None
    return dict(kept)
