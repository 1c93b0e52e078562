"""The commands `hansa node dataset`: what this node trains on, and what its owner declares of the records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..common.cli import Format, FormatOption, plain, show_json
from ..common.errors import ConfigError
from .registrations import recorded_datasets, registered_at, superseded
from .settings import load_settings

_HERE = Path("node.yaml")
_console = Console(highlight=False, soft_wrap=True, emoji=False)
SettingsArgument = Annotated[Path, typer.Argument(help="this partner's node.yaml")]
YesOption = Annotated[bool, typer.Option("--yes", help="do not ask")]


def commands(node: typer.Typer) -> None:
    """Register the group `dataset` of `hansa node`."""
    dataset = typer.Typer(help="The data that this node trains on.", no_args_is_help=True)
    dataset.command("add")(dataset_add)
    dataset.command("list")(dataset_list)
    node.add_typer(dataset, name="dataset")


def dataset_add(
    file: Annotated[Path, typer.Argument(help="CSV file of the rows to train on")],
    task: Annotated[str, typer.Option(help="an installed task: hansa task list")],
    settings: SettingsArgument = _HERE,
    public: Annotated[
        Path | None,
        typer.Option(help="CSV file of rows that are PUBLIC and not trained on: scores and labels may leave"),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="instead: rows that are not trained on; only noisy, charged histograms may leave"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="what to call it here; default: the task's name")] = None,
    version_of: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="the rows of data set NAME with rows added or corrected: it shares its budget"
        ),
    ] = None,
    overlaps: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="some records are, or may be, those of data set NAME: it shares its budget; repeatable"
        ),
    ] = None,
    collected_from: Annotated[
        str | None,
        typer.Option(
            metavar="YYYY-MM-DD",
            help="every record was collected on that day or later, and is in no other data set: it gets a budget of its own",
        ),
    ] = None,
    allow_single_class: Annotated[
        bool, typer.Option("--allow-single-class", help="all rows may be of one class")
    ] = False,
    allow_equal_rows: Annotated[
        bool, typer.Option("--allow-equal-rows", help="a held-out row may look like one that is trained on")
    ] = False,
    yes: YesOption = False,
    form: FormatOption = Format.TEXT,
) -> None:
    """Check rows against the task's schema, say here what was found, and register hiding commitments to them.

    The files stay where they are, and are read again when a run trains. Of this report nothing leaves this machine. Before
    there is a node.yaml it registers in ./state, where a node.yaml has it by default. The same rows again are fine, also from
    another place. A second data set must say what it has to do with the first: --version-of, --overlaps or --collected-from. A node
    that runs takes it in when it is next started.

    Example: hansa node dataset add heart.csv --task heart-disease --public public.csv

    Example: hansa node dataset add heart-2027.csv --task heart-disease --public public.csv --version-of heart-disease
    """
    from ..common.tasks import load_task
    from .registrations import DataFiles
    from .registry import Registry, Relation, Rules

    if public is not None and held_out is not None:
        raise ConfigError("--public and --held-out are both given", "Give one of them.")
    relation = Relation(version_of, tuple(overlaps or ()), collected_from)
    state = _state(settings)
    apart = public or held_out
    loaded = load_task(task)
    files = DataFiles(task, file.absolute(), None if apart is None else apart.absolute())
    found = {str(path): _found(path, loaded) for path in (file, apart) if path is not None}
    if form is Format.TEXT:
        for path, one in found.items():
            _print_found(path, one)

    def agree(declaration: str) -> None:
        if not yes:
            _console.print(plain(declaration))
            typer.confirm("Is that so?", abort=True)

    if public is not None:
        agree(
            f"You declare {found[str(public)]['rows']} rows of {public} PUBLIC: wherever a charter agrees to public "
            "evaluation, their scores and labels leave this node, without noise and outside of any budget."
        )
    rules = Rules(public is not None, allow_single_class, allow_equal_rows)
    made = Registry(state).add(files, rules, name, relation, agree)
    dataset = made.dataset
    kept = {
        "name": made.name,
        "dataset": dataset.dataset_id,
        "lineage": dataset.lineage,
        "declared": vars(dataset.declared),
    }
    if form is Format.JSON:
        show_json(
            {"task": task, "files": found, **kept, "commitment": dataset.commitment, "held_out": dataset.held_out}
        )
        return
    _console.print(
        plain(f"Registered as {made.name} in {state} (data set {dataset.dataset_id}); held out: {dataset.held_out}.")
    )
    _console.print(plain(f"Its budget is that of lineage {dataset.lineage}. The node takes it in when it next starts."))
    _console.print("What others see of it is its commitment, which tells them nothing; the numbers above stay here.")


def dataset_list(settings: SettingsArgument = _HERE, form: FormatOption = Format.TEXT) -> None:
    """Which data is registered, what its owner declared of it, and which data sets share a budget.

    Reads no rows, and takes no lock; the node may be running.

    Example: hansa node dataset list
    """
    state = _state(settings)
    known = registered_at(state)
    recorded = recorded_datasets(state / "ledger.jsonl")
    names = {one.dataset.dataset_id: one.name for one in known}
    rows: list[dict[str, Any]] = []
    for one in known:
        dataset, entry = one.dataset, recorded.get(one.dataset.dataset_id)
        declared = {**vars(dataset.declared), "of": names.get(dataset.declared.of or "")}
        rows.append(
            {
                "name": one.name,
                "dataset": dataset.dataset_id,
                "task": dataset.task,
                "lineage": dataset.lineage,
                "declared": declared,
                "held_out": dataset.held_out,
                "registered": dataset.registered,
                "recorded": None if entry is None else entry.time,
                "newest_version": not superseded(known, one),
                "files": [str(path) for path in (one.files.data, one.files.held_out) if path is not None],
            }
        )
    if form is Format.JSON:
        show_json({"datasets": rows})
        return
    if not rows:
        _console.print("No data is registered: hansa node dataset add FILE.csv --task TASK")
    for lineage in dict.fromkeys(one["lineage"] for one in rows):
        _console.print(plain(f"lineage {lineage}: one budget"))
        for item in (each for each in rows if each["lineage"] == lineage):
            said = item["declared"]
            words = {
                "first": "the first",
                "version": f"a version of {said['of']}",
                "overlap": f"overlaps with {said['of']}",
                "disjoint": f"collected from {said['cutoff']} on, in no earlier one",
            }[said["kind"]]
            told = [
                words,
                f"task {item['task']}",
                f"held out: {item['held_out']}",
                f"registered {item['registered'][:10]}",
            ]
            told += [] if item["recorded"] else ["in the ledger when the node next starts"]
            told += [] if item["newest_version"] else ["an old version"]
            _console.print(plain(f"  {item['name']}: {', '.join(told)}"))
            for path in item["files"]:
                _console.print(plain(f"    {path}"))


def _state(settings: Path) -> Path:
    """The state folder; before there is a node.yaml, the one that it has by default."""
    return Path("state").absolute() if settings == _HERE and not settings.exists() else load_settings(settings).state


# -- what was found ------------------------------------------------------------------------------------------------------


def _found(path: Path, task: Any) -> dict[str, Any]:
    from ..common.tasks.schema import TableSchema, parse_table

    if not isinstance(task.schema, TableSchema):
        raise ConfigError(
            f"task {task.name} takes arrays, not a table", "Only tasks with a table schema read CSV files."
        )
    table = parse_table(path, task.schema)
    return {
        "rows": len(table.y),
        "classes": {label: int((table.y == index).sum()) for index, label in enumerate(task.classes)},
        "missing": {column: count for column, count in table.missing.items() if count},
        "ignored_columns": list(table.ignored),
    }


def _print_found(path: str, found: dict[str, Any]) -> None:
    _console.print(plain(f"{path}: {found['rows']} rows fit the schema"))
    for title, counts in (("classes", found["classes"]), ("missing cells", found["missing"])):
        if counts:
            _console.print(plain(f"  {title}: " + ", ".join(f"{name} {count}" for name, count in counts.items())))
    if found["ignored_columns"]:
        names = plain(", ".join(found["ignored_columns"]))
        _console.print(f"  [yellow]columns that the schema does not name, not used:[/] {names}")
