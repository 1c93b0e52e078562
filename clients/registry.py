"""What this node registered: data sets by name, their versions, and what their owner declares of their records.

    state/datasets/NAME/dataset.json    id, lineage, declaration, commitments and their key (0600)
    state/datasets/NAME/source.json     where its files are (0600; never logged)

A *lineage* is what has one budget, across every charter and coordinator (docs/adr/0011-lineages-in-one-ledger.md). The first data
set opens one. What comes later is a new version of a data set, or overlaps with one (both: its lineage), or was collected
after every earlier one was registered (a lineage of its own). Who says none of these is refused, and so is a data set of which a
row looks like one of another lineage, or for which that cannot be seen.

Commands write here, one at a time. The ledger takes in what is new when the node next starts: that entry is the owner's signed
declaration. Nothing is spent on a data set that is not in the ledger.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from ..common.errors import ConfigError, DataError, LedgerError, counted
from ..common.identity import drop_unfinished, make_folder, output_error
from ..common.tasks import Task, load_task
from .datasets import RegisteredDataset, Rows, Split, look_alike, raw_records, rows_in_both, timestamp
from .registrations import DataFiles, Declaration, named, newest, recorded_datasets, registered_at, superseded

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Registered:
    """One registered data set.

    Attributes:
        name: what its owner calls it; it stays at this node.
    """

    name: str
    task: Task
    files: DataFiles
    dataset: RegisteredDataset


@dataclass(frozen=True)
class Relation:
    """What an owner says of a data set's records; at most one of these.

    Attributes:
        version_of: it is a new version (appended or corrected rows) of the data set with this name.
        overlaps: it shares records with the data sets of these names.
        collected_from: its records were collected from this day on, and are in no earlier data set.
    """

    version_of: str | None = None
    overlaps: tuple[str, ...] = ()
    collected_from: str | None = None

    def __post_init__(self) -> None:
        if (self.version_of is not None) + bool(self.overlaps) + (self.collected_from is not None) > 1:
            raise ConfigError(
                "more than one of --version-of, --overlaps and --collected-from is given",
                "A data set is a new version, or shares records with others, or is collected later: give one.",
            )


@dataclass(frozen=True)
class Rules:
    """What an owner allows of the rows.

    Attributes:
        public: the held-out rows are declared public.
        allow_single_class: all rows may be of one class.
        allow_equal_rows: a held-out row may equal one to train on: two records that look the same.
    """

    public: bool = False
    allow_single_class: bool = False
    allow_equal_rows: bool = False


class Registry:
    """The data sets of one state folder. `add` writes; all else reads registrations only, never rows."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._folder = state / "datasets"

    def all(self) -> list[Registered]:
        """Every data set, in the order in which they were registered.

        Raises:
            DataError: a registration is damaged.
            TaskError: a task is not installed.
        """
        found = []
        for one in registered_at(self._state):
            task = load_task(one.files.task)
            dataset = RegisteredDataset.load(task, one.files.source(task), self._folder / one.name)
            found.append(Registered(one.name, task, one.files, dataset))
        return found

    def some(self) -> list[Registered]:
        """As `all`, where there must be one.

        Raises:
            DataError: nothing is registered.
        """
        found = self.all()
        if not found:
            raise DataError(
                f"{self._state}: no data is registered", "Register it: hansa node dataset add FILE.csv --task TASK"
            )
        return found

    def add(
        self,
        files: DataFiles,
        rules: Rules = Rules(),
        name: str | None = None,
        relation: Relation = Relation(),
        agree: Callable[[str], None] = lambda _: None,
    ) -> Registered:
        """Check rows, commit to them, and remember where they are. The same rows again, also from other places, are fine.

        Args:
            name: None takes the task's name, with a number where that is taken.
            agree: is shown what the owner declares, in words, and raises where they do not.

        Raises:
            ConfigError: a name or date that is none, or a data set that is not there.
            DataError: rows that cannot be used, or whose relation to the earlier ones is not said or not so.
            LedgerError: the ledger has a data set whose registration is lost.
            OutputError: it cannot be written.
        """
        if name is not None and not NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is not a name", "Lowercase letters, digits and hyphens are allowed.")
        task = load_task(files.task)
        with self._alone():
            earlier = self.all()
            recorded = self._recorded(earlier)
            split = _apart(files, task, rules)
            again = next((one for one in earlier if _is_again(one, earlier, task, split, name)), None)
            if again is not None:
                _the_same(again, name, relation, rules, split, earlier)
                files.save(self._folder / again.name)
                return Registered(again.name, task, files, again.dataset)
            lineage, declared = _related(earlier, relation, task, recorded)
            name = name or _free(relation.version_of or task.name, earlier)
            if any(one.name == name for one in earlier):
                raise DataError(
                    f"{name}: other rows are registered under this name",
                    "Its spent budget belongs to those. If these are the same with rows added or corrected: leave --name out "
                    f"and say --version-of {name}",
                )
            strangers = [one for one in earlier if one.dataset.lineage != lineage]
            for one in strangers:
                _refuse_known(files, split, one, rules)
            if rules.public and not rules.allow_equal_rows:
                for one in (known for known in earlier if known not in strangers):
                    _refuse_published(files, split, one)
            if strangers:
                agree(_declaration(relation, strangers))
            folder = self._folder / name
            files.save(folder)
            dataset = RegisteredDataset.register(
                task,
                lambda: split,
                folder,
                rules.allow_single_class,
                public=rules.public,
                lineage=lineage,
                declared=declared,
                registered=max(timestamp(), *(_after(one.dataset.registered) for one in earlier), ""),
            )
            return Registered(name, task, files, dataset)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One command at a time; what a killed one left is gone."""
        try:
            make_folder(self._folder)
            lock = (self._state / "datasets.lock").open("ab")
        except OSError as err:
            raise output_error(self._folder, err) from err
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for folder in (self._folder, *self._folder.glob("*/")):
                drop_unfinished(folder)
            yield

    def _recorded(self, known: list[Registered]) -> dict[str, str]:
        """The data sets that are in the ledger -> when they were recorded.

        Raises:
            LedgerError: one of them is not registered here, or the ledger of those that are is not.
        """
        ledger = self._state / "ledger.jsonl"
        if ledger.exists() and not known:
            raise LedgerError(
                f"{self._state}: holds a ledger, but not the registration that its budget belongs to",
                "Restore datasets/ from a backup, or register the data in another state folder.",
            )
        if not ledger.exists() and any(one.dataset.bound for one in known):
            raise LedgerError(
                f"{ledger}: missing, and it holds what was spent", "Restore it: hansa node restore BACKUP"
            )
        recorded = recorded_datasets(ledger)
        lost = set(recorded) - {one.dataset.dataset_id for one in known}
        if lost:
            raise LedgerError(
                f"{self._state}: the ledger has the data set {min(lost)}, whose registration is not here",
                "Restore it from a backup: what was spent on it must stay known.",
            )
        return {data: entry.time for data, entry in recorded.items()}


# -- what an owner declares ----------------------------------------------------------------------------------------------


def _apart(files: DataFiles, task: Task, rules: Rules) -> Split:
    split = files.source(task)()
    if not rules.allow_equal_rows and (both := rows_in_both(split)):
        raise DataError(
            f"{files.held_out} and {files.data} have {counted(len(both), 'row')} in common (rows {_some(both)} of the first)",
            "A record is either trained on or held out: remove it from one of the files. If they are different "
            "records that look the same: --allow-equal-rows",
        )
    return split


def _is_again(one: Registered, earlier: list[Registered], task: Task, split: Split, name: str | None) -> bool:
    """Whether these are the rows of `one`. Rows of an old version may be registered once more, to go back to them."""
    same = one.task.name == task.name and one.dataset.is_of(split)
    return same and (one.name == name or not superseded(earlier, one))


def _the_same(
    again: Registered, name: str | None, relation: Relation, rules: Rules, split: Split, earlier: list[Registered]
) -> None:
    """Raise when what is said of these rows now is not what was said when they were registered."""
    about = f"these rows are registered already, as {again.name}"
    keep = f"They have one budget, under whatever name. Leave the options out, or say --name {again.name}."
    if name not in (None, again.name):
        raise DataError(about, keep)
    if relation != Relation():
        declared, ids = again.dataset.declared, {one.name: one.dataset for one in earlier}
        if relation.version_of is not None:
            base = named(earlier, relation.version_of).dataset
            same = declared.kind == "version" and base.lineage == again.dataset.lineage
        elif relation.overlaps:
            same = declared == Declaration(
                "overlap", ids[relation.overlaps[0]].dataset_id if relation.overlaps[0] in ids else ""
            )
        else:
            same = declared == Declaration("disjoint", None, relation.collected_from)
        if not same:
            raise DataError(f"{about}, and declared {declared.kind} then", keep)
    held_out = ("public" if rules.public else "private") if rules.public or len(split.held_out) else "none"
    if held_out != again.dataset.held_out:
        raise DataError(
            f"{about}, with held-out rows that are {again.dataset.held_out}",
            f"What was declared stays. As a data set of its own, on the same budget: --version-of {again.name}",
        )


def _related(
    earlier: list[Registered], relation: Relation, task: Task, recorded: dict[str, str]
) -> tuple[str | None, Declaration]:
    """Lineage (None opens one) and declaration of a data set.

    Raises:
        ConfigError, DataError: what was said cannot be so.
    """
    if relation.version_of is not None:
        base = newest(earlier, relation.version_of)
        if base.task.name != task.name:
            raise DataError(
                f"{base.name} is registered for task {base.task.name}, a version of it cannot be for {task.name}",
                f"The same records for another task share its budget: --overlaps {base.name}",
            )
        return base.dataset.lineage, Declaration("version", base.dataset.dataset_id)
    if relation.overlaps:
        shared = [named(earlier, name) for name in relation.overlaps]
        if len({one.dataset.lineage for one in shared}) > 1:
            raise DataError(
                f"{', '.join(one.name for one in shared)} have budgets of their own, and one data set cannot share both",
                "Each of its records would have to be charged to the budget that it has spent from, and nobody may be told "
                "which that is. Split the file: the rows that are in one of them as a data set that --overlaps that one, the rest "
                "as another.",
            )
        return shared[0].dataset.lineage, Declaration("overlap", shared[0].dataset.dataset_id)
    if relation.collected_from is not None:
        _after_all(relation.collected_from, earlier, recorded)
        return None, Declaration("disjoint", None, relation.collected_from)
    if earlier:
        names = ", ".join(one.name for one in earlier)
        raise DataError(
            f"another data set is registered here: {names}. What has this one to do with it?",
            "The same records, with rows added or corrected: --version-of NAME. Some records in common, or you are not sure: "
            "--overlaps NAME. Only records that were collected after the others were registered: --collected-from YYYY-MM-DD.",
        )
    return None, Declaration()


def _after_all(day: str, earlier: list[Registered], recorded: dict[str, str]) -> None:
    """Raise unless no record of an earlier data set can be from this day or a later one."""
    try:
        cutoff = date.fromisoformat(day)
        if cutoff.isoformat() != day:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{day!r} is not a date", "YYYY-MM-DD is allowed.") from None
    if not earlier:
        raise DataError("no other data set is registered here", "The first one needs no --collected-from.")
    if cutoff > datetime.now(UTC).date():
        raise DataError(f"{day} is yet to come", "Give the day from which on the rows were collected.")
    for one in earlier:
        if one.dataset.dataset_id not in recorded:
            raise DataError(
                f"{one.name} is registered and not yet in the ledger",
                "Start the node once, so that this is recorded; register the later data after that.",
            )
        known = max(recorded[one.dataset.dataset_id], one.dataset.registered)[:10]
        if day <= known:
            raise DataError(
                f"{one.name} was registered on {known}, and may hold records that were collected from {day} on",
                f"Give rows that were collected after {known}, and that day; or share its budget: --overlaps {one.name}",
            )


def _refuse_known(files: DataFiles, split: Split, other: Registered, rules: Rules) -> None:
    """Raise when a row looks like one of a data set with another budget, or when that cannot be seen.

    Rows of different tasks are compared as the files have them, cell by cell.
    """
    cannot = (
        f"It must be seen that no record is in {other.name}, which has a budget of its own. Put the registered file of "
        f"{other.name} back (hansa node dataset list), or share its budget: --overlaps {other.name}"
    )
    try:
        theirs = other.dataset.open()
        apart = other.dataset.held_out
        pairs: list[tuple[Path, list[int]]] = []
        # Rows that are public on both sides are in no budget; all other pairs count.
        for path, rows, public in _parts(files, split, rules.public):
            found: set[int] = set()
            for place, known, theirs_public in _parts(other.files, theirs, apart == "public"):
                if not (public and theirs_public):
                    found |= set(_alike(path, rows, place, known, same_task=other.task.name == files.task))
            pairs.append((path, sorted(found)))
    except DataError as err:
        raise DataError(f"{other.name} cannot be compared: {err.message}", cannot) from err
    for path, alike in pairs:
        if alike:
            raise DataError(
                f"{counted(len(alike), 'row')} of {path} cannot be told from rows of {other.name}, which has a budget of its own "
                f"(rows {_some(alike)})",
                "They would have two budgets. Leave them out, also where different records only look the same; or share that "
                f"budget: --overlaps {other.name}",
            )


def _refuse_published(files: DataFiles, split: Split, other: Registered) -> None:
    """Raise when a row that is declared public looks like a private one of a data set with the same budget."""
    hint = (
        "Its score and label would leave without noise: leave it out. If they are different records that look the same: "
        "--allow-equal-rows"
    )
    assert files.held_out is not None
    try:
        theirs, public = other.dataset.open(), other.dataset.held_out == "public"
    except DataError as err:
        raise DataError(
            f"{other.name} cannot be compared: {err.message}", f"Put its registered file back. {hint}"
        ) from err
    found: set[int] = set()
    for place, known, theirs_public in _parts(other.files, theirs, public):
        if not theirs_public:
            found |= set(_alike(files.held_out, split.held_out, place, known, same_task=other.task.name == files.task))
    if found:
        raise DataError(
            f"{counted(len(found), 'row')} of {files.held_out} cannot be told from private rows of {other.name} "
            f"(rows {_some(sorted(found))})",
            hint,
        )


def _parts(files: DataFiles, split: Split, public: bool) -> list[tuple[Path, Rows, bool]]:
    found = [(files.data, split.train, False)]
    return found if files.held_out is None else [*found, (files.held_out, split.held_out, public)]


def _alike(path: Path, rows: Rows, place: Path, known: Rows, *, same_task: bool) -> list[int]:
    if same_task:
        return look_alike(rows, known)
    theirs = set(raw_records(place))
    return [number for number, record in enumerate(raw_records(path), start=1) if record in theirs]


def _declaration(relation: Relation, strangers: list[Registered]) -> str:
    names = ", ".join(one.name for one in strangers)
    if relation.collected_from is None:
        return f"You declare that none of its records is in {names}, which have budgets of their own."
    return (
        f"You declare: every record of it was collected on {relation.collected_from} or later, and none is in {names}. It gets a "
        "budget of its own. Epsilon is of one record: whoever has a record here and one there has spent both budgets."
    )


def _free(base: str, earlier: list[Registered]) -> str:
    names = {one.name for one in earlier}
    base = re.sub(r"-\d+$", "", base) if re.sub(r"-\d+$", "", base) in names else base
    if base not in names:
        return base
    return next(f"{base[:55]}-{n}" for n in range(2, len(names) + 3) if f"{base[:55]}-{n}" not in names)


def _after(time: str) -> str:
    """The next microsecond: a clock that went back does not change the order."""
    later = datetime.fromisoformat(time) + timedelta(microseconds=1)
    return later.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
