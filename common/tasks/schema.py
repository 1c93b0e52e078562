"""What a partner's data must look like, and the only preprocessing there is: cells to features.

Ranges, categories and the spellings of a missing value stand in the schema that all partners agree on;
nothing is ever computed from anybody's data. Every value that breaks the schema is reported; no row or cell
is dropped.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from ..errors import DataError, SchemaViolation, TaskError

__all__ = [
    "ArraySchema",
    "CategoryColumn",
    "Label",
    "NumberColumn",
    "Table",
    "TableSchema",
    "load_schema",
    "parse_table",
    "read_table",
]

_log = logging.getLogger(__name__)
# float() would also take nan, inf, 1_000 and non-ASCII digits.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _distinct(items: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(items)) != len(items) or any(item != item.strip() or not item for item in items):
        raise ValueError("each entry once, not empty, without spaces around it")
    return items


Spellings = Annotated[tuple[str, ...], AfterValidator(_distinct)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NumberColumn(_Frozen):
    """A number in an inclusive range, scaled by it to [-1, 1]; a missing one becomes 0 and an indicator.

    A spelling in `missing` that is a number stands for that number however it is written (0 also for 0.0).
    """

    type: Literal["number"]
    min: FiniteFloat
    max: FiniteFloat
    unit: str = ""
    missing: Spellings = ()
    required: bool = False
    description: str = ""

    @model_validator(mode="after")
    def _range(self) -> Self:
        if not (self.min < self.max and math.isfinite(self.max - self.min)):
            raise ValueError(f"min must be below max, they are {self.min:g} and {self.max:g}")
        return self

    @cached_property
    def _missing_numbers(self) -> frozenset[float]:
        return frozenset(float(spelling) for spelling in self.missing if _NUMBER.fullmatch(spelling))

    def allowed(self) -> str:
        """What a cell may hold, in words."""
        unit = f" {self.unit}" if self.unit else ""
        return f"a number from {self.min:g} to {self.max:g}{unit}{_or_missing(self)}"

    def features(self, name: str) -> list[str]:
        """Names of the features that `encode` gives."""
        return [name] if self.required else [name, f"{name} missing"]

    def encode(self, cell: str) -> list[float]:
        """The cell's features; ValueError (never shown) when the cell is not allowed."""
        number = float(cell) if _NUMBER.fullmatch(cell) else None
        if not cell or cell in self.missing or number in self._missing_numbers:
            if self.required:
                raise ValueError
            return [0.0, 1.0]
        if number is None or not self.min <= number <= self.max:
            raise ValueError
        scaled = 2 * (number - self.min) / (self.max - self.min) - 1
        return [scaled] if self.required else [scaled, 0.0]


class CategoryColumn(_Frozen):
    """One of a fixed list of values, as spelled, one-hot; a missing one is all zeros and an indicator."""

    type: Literal["category"]
    values: Annotated[Spellings, Field(min_length=2)]
    missing: Spellings = ()
    required: bool = False
    description: str = ""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if both := set(self.values) & set(self.missing):
            raise ValueError(f"{sorted(both)} cannot be both a value and missing")
        return self

    def allowed(self) -> str:
        """What a cell may hold, in words."""
        return f"one of {', '.join(self.values)}{_or_missing(self)}"

    def features(self, name: str) -> list[str]:
        """Names of the features that `encode` gives."""
        return [f"{name}={value}" for value in self.values] + ([] if self.required else [f"{name} missing"])

    def encode(self, cell: str) -> list[float]:
        """The cell's features; ValueError (never shown) when the cell is not allowed."""
        missing = not cell or cell in self.missing
        if self.required if missing else cell not in self.values:
            raise ValueError
        one_hot = [float(cell == value) for value in self.values]
        return one_hot if self.required else [*one_hot, float(missing)]


Column = Annotated[NumberColumn | CategoryColumn, Field(discriminator="type")]


def _or_missing(column: NumberColumn | CategoryColumn) -> str:
    if column.required:
        return "; required"
    return f"; missing is empty{''.join(f' or {spelling}' for spelling in column.missing)}"


class Label(_Frozen):
    """What is predicted: a column, the classes in order, and either a class for each cell or a threshold.

    With `positive_above` there are two classes, and the second is "the number is above the threshold".
    """

    column: str
    classes: Annotated[Spellings, Field(min_length=2)]
    values: dict[str, str] | None = None
    positive_above: FiniteFloat | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.values is None) == (self.positive_above is None):
            raise ValueError("give either values (cell: class) or positive_above (a number)")
        if self.positive_above is not None and len(self.classes) != 2:
            raise ValueError("positive_above needs exactly two classes")
        if self.values is not None and set(self.values.values()) != set(self.classes):
            raise ValueError(f"values must map to each of the classes {list(self.classes)} and to no other")
        return self

    def allowed(self) -> str:
        """What a cell may hold, in words."""
        return "a number; required" if self.values is None else f"one of {', '.join(self.values)}; required"

    def encode(self, cell: str) -> int:
        """The cell's class; ValueError (never shown) when the cell is not allowed."""
        if self.values is not None:
            if cell not in self.values:
                raise ValueError
            return self.classes.index(self.values[cell])
        if self.positive_above is None or not _NUMBER.fullmatch(cell) or not math.isfinite(float(cell)):
            raise ValueError
        return int(float(cell) > self.positive_above)


class TableSchema(_Frozen):
    """The columns of a CSV file and its label. Further columns are ignored, and named when that happens."""

    columns: Annotated[dict[str, Column], Field(min_length=1)]
    label: Label

    @model_validator(mode="after")
    def _label_apart(self) -> Self:
        _distinct((*self.columns,))
        if self.label.column in self.columns:
            raise ValueError(f"the label's column {self.label.column!r} must not be a feature as well")
        return self

    @cached_property
    def features(self) -> tuple[str, ...]:
        """Names of the features in order; an indicator is called "<column> missing"."""
        return tuple(feature for name, column in self.columns.items() for feature in column.features(name))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one record's features."""
        return (len(self.features),)

    @property
    def value_range(self) -> tuple[float, float]:
        """Smallest and largest value of any feature."""
        return (-1.0, 1.0)


class ArraySchema(_Frozen):
    """Records that are arrays of one shape (images, say), values in an inclusive range."""

    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    value_range: tuple[FiniteFloat, FiniteFloat]
    dtype: Literal["float32"] = "float32"


@dataclass(frozen=True, eq=False)
class Table:
    """A CSV file as features.

    Attributes:
        x: float32 [n, features], in [-1, 1].
        y: int64 [n], index into the label's classes; all -1 where no labels were read.
        ignored: columns of the file that the schema does not name.
        missing: for each column that may be missing, in how many rows it is.
    """

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    ignored: tuple[str, ...]
    missing: dict[str, int]


def read_table(path: Path | str, schema: TableSchema) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Read a CSV file: features float32 [n, f] and classes int64 [n]; a log warning names ignored columns.

    Raises:
        SchemaViolation: with every violation in the file.
        DataError: the file is missing or cannot be read.
    """
    table = parse_table(path, schema)
    if table.ignored:
        _log.warning("%s: not in the schema, ignored: %s", path, ", ".join(table.ignored))
    return table.x, table.y


def parse_table(path: Path | str, schema: TableSchema, *, labelled: bool = True) -> Table:
    """Read a CSV file (UTF-8, comma, header line; spaces around a cell do not count) and say what was found.

    Args:
        labelled: read the label; without, its column may be missing, and is ignored where it is there.

    Raises:
        SchemaViolation: with every violation in the file.
        DataError: the file is missing or cannot be read.
    """
    wanted = [*schema.columns, *([schema.label.column] if labelled else [])]
    header, rows, wrong = _records(path)
    if not set(wanted) & set(header):
        wrong = [(1, "", _show(",".join(header)), f"a header line with commas, naming {', '.join(wanted)}")]
    else:
        wrong += [(1, name, "", "this column in the header") for name in wanted if name not in header]
        wrong += [(1, name, name, "each column once") for name in wanted if header.count(name) > 1]
        if not rows and not wrong:
            wrong = [(2, "", "", "at least one row of data")]
    if any(line == 1 for line, *_ in wrong):
        raise SchemaViolation(str(path), wrong)

    place = {name: header.index(name) for name in wanted}
    x = np.zeros((len(rows), *schema.shape), dtype=np.float32)
    y = np.full(len(rows), -1, dtype=np.int64)
    for i, (line, cells) in enumerate(rows):
        if len(cells) != len(header):
            wrong.append((line, "", f"{len(cells)} cells", f"{len(header)} cells, as in the header"))
            continue
        features: list[float] = []
        for name, column in schema.columns.items():
            try:
                features += column.encode(cells[place[name]])
            except ValueError:
                wrong.append((line, name, _show(cells[place[name]]), column.allowed()))
        if labelled:
            try:
                y[i] = schema.label.encode(cells[place[schema.label.column]])
            except ValueError:
                cell = _show(cells[place[schema.label.column]])
                wrong.append((line, schema.label.column, cell, schema.label.allowed()))
        if not wrong:
            x[i] = features
    if wrong:
        raise SchemaViolation(str(path), sorted(wrong, key=lambda row: row[0]))
    counts = dict(zip(schema.features, x.sum(axis=0, dtype=np.float64), strict=True))
    return Table(
        x,
        y,
        ignored=tuple(name or "(no name)" for name in header if name not in wanted),
        missing={name: int(counts[f"{name} missing"]) for name, c in schema.columns.items() if not c.required},
    )


_Wrong = list[tuple[int, str, str, str]]


def _records(path: Path | str) -> tuple[list[str], list[tuple[int, list[str]]], _Wrong]:
    """Header, then (line where it starts, cells) a record, and what could not be parsed."""
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"no data file {path}", "Check the path; one in a configuration is relative to that file."
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "Give the path of a readable CSV file.") from None
    if undecodable := [(i, "", _show(repr(text)), "UTF-8 text") for i, text in _undecodable(raw)]:
        raise SchemaViolation(str(path), undecodable)
    # Blank lines at the end are no records; anywhere else they are reported.
    text = raw.decode("utf-8-sig").rstrip("\r\n")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for cells in reader:
            rows.append((line, [cell.strip() for cell in cells]))
            line = reader.line_num + 1
    except csv.Error as error:
        return rows[0][1] if rows else [], rows[1:], [(line, "", "", f"CSV that parses: {error}")]
    return rows[0][1] if rows else [], rows[1:], []


def _undecodable(raw: bytes) -> list[tuple[int, bytes]]:
    def fits(text: bytes) -> bool:
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            return False
        return b"\0" not in text

    return [(i, text) for i, text in enumerate(raw.splitlines(), 1) if not fits(text)]


def _show(cell: str) -> str:
    """A cell for the owner's screen: short, and unable to steer a terminal."""
    cell = cell if cell.isprintable() else repr(cell)
    return cell if len(cell) <= 40 else f"{cell[:39]}…"


def load_schema(path: Path | str) -> TableSchema:
    """Read a schema from YAML, every scalar as it is spelled (`yes` is the text yes, not a truth value).

    Raises:
        TaskError: naming file, line, key, value and what is allowed, for every problem at once.
    """
    lines: dict[tuple[Hashable, ...], int] = {}
    hint = "Correct the schema; docs/your-own-task.md describes every key."
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = _plain(node, (), lines) if node is not None else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise TaskError(f"{path}: cannot be read as YAML: {error}", hint) from None
    try:
        return TableSchema.model_validate(data)
    except ValidationError as error:
        problems = [_problem(e["loc"], e["type"], e["msg"], e["input"], lines) for e in error.errors()]
        raise TaskError("\n  ".join(f"{path}: {problem}" for problem in problems), hint) from None


_MAX_PLACES = 50_000


def _plain(node: yaml.Node, place: tuple[Hashable, ...], lines: dict[tuple[Hashable, ...], int]) -> Any:
    lines.setdefault(place, node.start_mark.line + 1)
    if len(lines) > _MAX_PLACES:  # a few aliases of aliases in YAML stand for gigabytes
        raise yaml.MarkedYAMLError(problem="too large for a schema", problem_mark=node.start_mark)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in result:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} twice or no text", problem_mark=key.start_mark)
            lines[(*place, key.value)] = key.start_mark.line + 1
            result[key.value] = _plain(value, (*place, key.value), lines)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*place, i), lines) for i, item in enumerate(node.value)]
    return node.value


def _problem(
    loc: tuple[int | str, ...], kind: str, message: str, value: object, lines: dict[tuple[Hashable, ...], int]
) -> str:
    known: tuple[Hashable, ...] = ()
    for part in loc:  # pydantic also names the branch of a union there, which the file does not
        if (*known, part) in lines:
            known = (*known, part)
    key = ".".join(map(str, (*known, loc[-1]) if kind == "missing" else known)) or "the file"
    if kind == "extra_forbidden":
        models: dict[Hashable, type[BaseModel]] = {
            "number": NumberColumn,
            "category": CategoryColumn,
            "label": Label,
        }
        model = models.get(loc[-2], TableSchema) if len(loc) > 1 else TableSchema
        message = f"unknown key; allowed are {', '.join(model.model_fields)}"
    shown = "" if isinstance(value, dict | list) or kind == "missing" else f" (it is {value!r})"
    return f"line {lines.get(known, 1)}: {key}: {message.removeprefix('Value error, ')}{shown}"
