"""Schema, registry, metrics and the template of a task."""

import csv
import hashlib
import logging
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from hansa.common.config import load_config
from hansa.common.errors import DataError, OutputError, RunFailed, SchemaViolation, TaskError
from hansa.common.tasks import Task, check_model, code_sha256, cross_entropy, load_task, task_names
from hansa.common.tasks import scaffold as scaffold_module
from hansa.common.tasks.metrics import evaluate, histogram_metrics, score_histogram, scores_of
from hansa.common.tasks.scaffold import scaffold
from hansa.common.tasks.schema import ArraySchema, load_schema, parse_table, read_table

ROOT = Path(__file__).parents[2]
HEART = ROOT / "simulations" / "data" / "heart-disease"
HOSPITALS = {"cleveland": 303, "hungary": 294, "switzerland": 123, "va-long-beach": 200}

SCHEMA = """
columns:
  age: {type: number, min: 0, max: 100, unit: years, required: true}
  dose: {type: number, min: -10, max: 10, missing: ["0", NA]}
  sex: {type: category, values: [f, m], required: true}
  ward: {type: category, values: [north, "yes"], missing: ["?"]}
label: {column: ill, classes: [well, ill], values: {"no": well, "yes": ill}}
"""
HEADER = "age,dose,sex,ward,ill\n"


@pytest.fixture
def schema(tmp_path):
    return load_schema(write(tmp_path, "schema.yaml", SCHEMA))


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- reading a table ------------------------------------------------------------------------------------------------


def test_cells_become_the_documented_features(tmp_path, schema):
    text = HEADER + "50,5,f,north,no\n 100 , -1e1,m,yes,yes\n0,0.00,m,?,yes\n25,NA,f,,no\n"
    table = parse_table(write(tmp_path, "a.csv", "\ufeff" + text.replace("\n", "\r\n") + "\r\n\r\n"), schema)
    assert schema.features == (
        *("age", "dose", "dose missing", "sex=f", "sex=m", "ward=north", "ward=yes", "ward missing"),
    )
    assert table.x.tolist() == [
        [0, 0.5, 0, 1, 0, 1, 0, 0],
        [1, -1, 0, 0, 1, 0, 1, 0],
        [-1, 0, 1, 0, 1, 0, 0, 1],
        [-0.5, 0, 1, 1, 0, 0, 0, 1],
    ]
    assert table.y.tolist() == [0, 1, 1, 0]
    assert (table.x.dtype, table.y.dtype) == (np.float32, np.int64)
    assert table.missing == {"dose": 2, "ward": 2}


def test_heart_disease_has_35_features_and_its_schema_covers_all_four_hospitals():
    schema = load_task("heart-disease").schema
    assert len(schema.features) == 35
    assert {f for f in schema.features if f.endswith(" missing")} == {
        f"{c} missing"
        for c in ("trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal")
    }
    for hospital, rows in HOSPITALS.items():
        path = HEART / f"{hospital}.csv"
        table = parse_table(path, schema)
        raw = list(csv.DictReader(path.open(newline="")))
        assert table.x.shape == (rows, 35)
        assert np.abs(table.x).max() <= 1
        assert table.y.tolist() == [int(float(r["num"]) > 0) for r in raw]
        assert table.missing["chol"] == sum(r["chol"] in ("", "0.0") for r in raw)
        assert table.missing["ca"] == sum(r["ca"] == "" for r in raw)
        assert table.ignored == ()
    assert parse_table(HEART / "switzerland.csv", schema).missing["chol"] == 123


NUMBER = "a number from 0 to 100 years; required"
DOSE = "a number from -10 to 10; missing is empty or 0 or NA"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("abc,5,f,north,no", ("age", "abc", NUMBER)),
        (",5,f,north,no", ("age", "", NUMBER)),
        ("nan,5,f,north,no", ("age", "nan", NUMBER)),
        ("5,NaN,f,north,no", ("dose", "NaN", DOSE)),
        ("5,-INF,f,north,no", ("dose", "-INF", DOSE)),
        ("5,Infinity,f,north,no", ("dose", "Infinity", DOSE)),
        ("5,1e999,f,north,no", ("dose", "1e999", DOSE)),
        ("5,10.001,f,north,no", ("dose", "10.001", DOSE)),
        ("5,-10.001,f,north,no", ("dose", "-10.001", DOSE)),
        ("1_0,5,f,north,no", ("age", "1_0", NUMBER)),
        ("٥,5,f,north,no", ("age", "٥", NUMBER)),
        ("5,5,F,north,no", ("sex", "F", "one of f, m; required")),
        ("5,5,,north,no", ("sex", "", "one of f, m; required")),
        ("5,5,?,north,no", ("sex", "?", "one of f, m; required")),
        ("5,5,f,south,no", ("ward", "south", "one of north, yes; missing is empty or ?")),
        ("5,5,f,north,maybe", ("ill", "maybe", "one of no, yes; required")),
        ("5,5,f,north,", ("ill", "", "one of no, yes; required")),
        ("5,5,f,north", ("", "4 cells", "5 cells, as in the header")),
        ("5,5,f,north,no,6", ("", "6 cells", "5 cells, as in the header")),
        ("", ("", "0 cells", "5 cells, as in the header")),
        ('5,5,f,no"rth,no', ("ward", 'no"rth', "one of north, yes; missing is empty or ?")),
        ('5,5,f,"north"x,no', ("", "", "CSV that parses: ',' expected after '\"'")),
        ("5,5,f,\x1b[2J,no", ("ward", r"'\x1b[2J'", "one of north, yes; missing is empty or ?")),
        ("5,5,f," + "x" * 99 + ",no", ("ward", "x" * 39 + "…", "one of north, yes; missing is empty or ?")),
        (b"5,5,f,\xff,no", ("", r"b'5,5,f,\xff,no'", "UTF-8 text")),
        (b"5,5,f,nor\0th,no", ("", r"b'5,5,f,nor\x00th,no'", "UTF-8 text")),
    ],
)
def test_a_row_that_breaks_the_schema_is_named(tmp_path, schema, row, expected):
    good = b"5,5,f,north,no\n"
    row = row if isinstance(row, bytes) else row.encode()
    path = write(tmp_path, "a.csv", HEADER.encode() + good + row + b"\n" + good)
    with pytest.raises(SchemaViolation) as caught:
        read_table(path, schema)
    assert caught.value.rows == [(3, *expected)]
    assert str(path) in str(caught.value)
    assert "nothing was loaded" in str(caught.value)


def test_every_violation_is_listed_at_the_line_an_editor_shows(tmp_path, schema):
    path = write(tmp_path, "a.csv", HEADER + '5,5,f,"no\nrth",no\n5,99,x,north,no\n5,5,f,north,no\n7,8\n')
    with pytest.raises(SchemaViolation) as caught:
        read_table(path, schema)
    assert [row[:2] for row in caught.value.rows] == [(2, "ward"), (4, "dose"), (4, "sex"), (6, "")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a header line with commas, naming age, dose, sex, ward, ill"),
        ("\n\n", "a header line with commas"),
        ("5,5,f,north,no\n", "a header line with commas"),
        ("age;dose;sex;ward;ill\n5;5;f;north;no\n", "a header line with commas"),
        ("age,dose,sex,ill\n5,5,f,no\n", "1  ward           this column in the header"),
        ("age,dose,sex,ward\n5,5,f,north\n", "1  ill            this column in the header"),
        ("age,age,dose,sex,ward,ill\n5,6,5,f,north,no\n", "each column once"),
        (HEADER, "at least one row of data"),
        (HEADER + '5,5,f,"north', "unexpected end of data"),
        ("age,dose\n5,5\n".encode("utf-16"), "UTF-8 text"),
    ],
)
def test_a_file_that_is_no_table_of_the_schema(tmp_path, schema, content, message):
    with pytest.raises(SchemaViolation) as caught:
        read_table(write(tmp_path, "a.csv", content), schema)
    assert message in str(caught.value)


def test_missing_file_and_folder(tmp_path, schema):
    with pytest.raises(DataError, match=r"no data file .*nowhere.csv"):
        read_table(tmp_path / "nowhere.csv", schema)
    with pytest.raises(DataError, match="cannot read"):
        read_table(tmp_path, schema)


def test_columns_outside_the_schema_are_ignored_and_named(tmp_path, schema, caplog):
    path = write(tmp_path, "a.csv", "id,age,dose,,sex,ward,ill\nx1,5,5,z,f,north,no\n")
    assert parse_table(path, schema).ignored == ("id", "(no name)")
    with caplog.at_level(logging.WARNING):
        x, y = read_table(path, schema)
    assert "not in the schema, ignored: id, (no name)" in caplog.text
    assert x.shape == (1, 8)
    assert y.tolist() == [0]


CELLS = st.sampled_from(["", "0", "5", "-3.5", "nan", "f", "m", "north", "yes", "no", "1e400"]) | st.text(max_size=4)


@given(rows=st.lists(st.lists(CELLS, min_size=4, max_size=6), min_size=1, max_size=4))
def test_any_cells_give_bounded_features_of_every_row_or_a_schema_violation(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any")
    schema = load_schema(write(folder, "schema.yaml", SCHEMA))
    path = folder / "a.csv"
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        file.write(HEADER)
        csv.writer(file).writerows([*rows, ["5", "5", "f", "north", "no"]])
    try:
        table = parse_table(path, schema)
    except SchemaViolation as violation:
        assert violation.rows  # noqa: PT017  # either outcome is right
        return
    assert len(table.x) == len(rows) + 1
    assert np.abs(table.x).max() <= 1


def test_positive_above(tmp_path):
    text = SCHEMA[: SCHEMA.index("label")] + "label: {column: ill, classes: [low, high], positive_above: 1.5}"
    schema = load_schema(write(tmp_path, "schema.yaml", text))
    rows = "5,5,f,north,1.5\n5,5,f,north,1.6\n5,5,f,north,-3\n"
    assert read_table(write(tmp_path, "a.csv", HEADER + rows), schema)[1].tolist() == [0, 1, 0]
    with pytest.raises(SchemaViolation, match="a number; required"):
        read_table(write(tmp_path, "a.csv", HEADER + "5,5,f,north,nan\n"), schema)


# --- schema files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("min: 0", "min: zero", r"line 3: columns.age.min: .*valid number.*\(it is 'zero'\)"),
        ("min: 0", "min: .nan", r"line 3: columns.age.min: .*\(it is '.nan'\)"),
        ("min: 0", "min: inf", r"line 3: columns.age.min: .*finite.*\(it is 'inf'\)"),
        ("min: 0", "min: 100", r"line 3: columns.age: min must be below max, they are 100 and 100"),
        ("min: 0, ", "", r"line 3: columns.age.min: Field required"),
        (
            "max: 100",
            "maximum: 100",
            r"line 3: columns.age.maximum: unknown key; allowed are type, min, max, .*'100'",
        ),
        ("type: number, min: -10", "type: real, min: -10", r"line 4: columns.dose: .*'real'.*'number', 'category'"),
        ("type: number, min: -10", "min: -10", r"line 4: columns.dose: .*'type'"),
        ("[f, m]", "[f]", r"line 5: columns.sex.values: .*at least 2"),
        ("[f, m]", "[f, f]", r"line 5: columns.sex.values: each entry once"),
        ('["?"]', "[north]", r"line 6: columns.ward: \['north'\] cannot be both"),
        ("column: ill,", "column: age,", r"label's column 'age' must not be a feature"),
        ("label:", "labels:", r"line 7: labels: unknown key; allowed are columns, label"),
        ("column: ill,", "column: ill, colour: red,", r"line 7: label.colour: unknown key; allowed are column, cl"),
        ("column: ill,", "column: ill, positive_above: 1,", r"line 7: label: give either values .* or positive_above"),
        ('"no": well', '"no": wel', r"line 7: label: values must map to each of the classes \['well', 'ill'\]"),
        ("[well, ill]", "[well, ill, dead]", r"line 7: label: values must map to each of the classes"),
        ("required: true}\n  dose", "required: maybe}\n  dose", r"line 3: columns.age.required: .*'maybe'"),
        ("  dose:", "  age:", r"key 'age' twice"),
        ("columns:", "columns: [", r"cannot be read as YAML"),
        ("columns:", "columns: &a\n  x: *a", r"cannot be read as YAML|columns.x"),
    ],
)
def test_a_malformed_schema_names_file_line_key_value_and_what_is_allowed(tmp_path, old, new, message):
    assert SCHEMA.count(old) == 1 or old in ("columns:", "label:", "min: 0")
    path = write(tmp_path, "schema.yaml", SCHEMA.replace(old, new, 1))
    with pytest.raises(TaskError, match=message) as caught:
        load_schema(path)
    assert str(path) in str(caught.value)
    assert "docs/your-own-task.md" in str(caught.value)


@pytest.mark.parametrize("content", ["", "just text", "- a\n- b", "columns: {}\nlabel: 3", b"\xff\xfe"])
def test_a_schema_that_is_no_mapping(tmp_path, content):
    with pytest.raises(TaskError, match=r"schema.yaml"):
        load_schema(write(tmp_path, "schema.yaml", content))
    with pytest.raises(TaskError, match=r"nowhere.yaml: cannot be read"):
        load_schema(tmp_path / "nowhere.yaml")


def test_all_problems_of_a_schema_are_told_at_once(tmp_path):
    text = SCHEMA.replace("min: 0", "min: a").replace("[f, m]", "[f]")
    with pytest.raises(TaskError, match=r"(?s)columns.age.min.*columns.sex.values"):
        load_schema(write(tmp_path, "schema.yaml", text))


# --- registry -------------------------------------------------------------------------------------------------------


class Plugin:
    """A plug-in that is installed as pip would: a package, and a dist-info with its entry point."""

    def __init__(self, monkeypatch, folder):
        self.name = f"plug-{uuid.uuid4().hex}"  # a process imports a module once
        self.package = self.name.replace("-", "_")
        self.folder = folder / self.package
        write(self.folder, "schema.yaml", SCHEMA)
        write(
            self.folder,
            "__init__.py",
            f"from pathlib import Path\nfrom torch import nn\nfrom hansa.common.tasks import Task\n"
            f"from hansa.common.tasks.schema import load_schema\n"
            f"SCHEMA = load_schema(Path(__file__).with_name('schema.yaml'))\n"
            f"task = Task('{self.name}', 'A test', SCHEMA, ('well', 'ill'), lambda: nn.Linear(8, 2))\n",
        )
        self.install(folder, f"{self.package}:task")
        monkeypatch.syspath_prepend(str(folder))

    def install(self, folder, entry):
        info = folder / f"{entry.partition(':')[0].replace('.', '_')}-0.1.0.dist-info"
        write(info, "METADATA", f"Metadata-Version: 2.1\nName: {info.name.split('-')[0]}\nVersion: 0.1.0\n")
        write(info, "entry_points.txt", f"[hansa.tasks]\n{self.name} = {entry}\n")


@pytest.fixture
def plugin(monkeypatch, tmp_path):
    return Plugin(monkeypatch, tmp_path)


def digest(files):
    """The documented hash, written down a second time."""
    total = hashlib.sha256()
    for name, content in sorted(files.items()):
        total.update(name.encode() + b"\0" + str(len(content)).encode() + b"\0" + content)
    return total.hexdigest()


def fresh_sha256(plugin):
    """As a process that has not imported it yet would compute it."""
    from hansa.common.tasks import _load

    _load.cache_clear()
    return code_sha256(plugin.name)


@pytest.mark.parametrize("name", ["heart-disease", "digits", "fashion-mnist"])
def test_built_in_tasks(name):
    assert name in task_names()
    task = load_task(name)
    assert task.name == name
    check_model(task)
    folder = ROOT / "common" / "tasks"
    stem = name.replace("-", "_")
    files = [folder / f"{stem}.py", folder / "schema.py"]
    files += [folder / f"{stem}.yaml"] if name == "heart-disease" else []
    assert code_sha256(name) == digest({f.name: f.read_bytes() for f in files})


@pytest.mark.parametrize("name", ["heart-disease", "digits", "fashion-mnist"])
def test_opacus_supports_the_built_in_models(name):
    from opacus.validators import ModuleValidator

    assert ModuleValidator.validate(load_task(name).build_model()) == []
    assert ModuleValidator.validate(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))  # negative control


def test_models_come_from_torchs_generator_and_check_model_leaves_it_alone():
    task = load_task("digits")
    torch.manual_seed(3)
    first = task.build_model().state_dict()
    torch.manual_seed(3)
    check_model(task)
    second = task.build_model().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["0.weight"], task.build_model().state_dict()["0.weight"])


def test_an_installed_plug_in_is_found(plugin):
    assert plugin.name in task_names()
    assert load_task(plugin.name).schema.shape == (8,)
    check_model(load_task(plugin.name))


def test_unknown_task_names_what_is_installed(plugin):
    with pytest.raises(TaskError, match=rf"(?s)no task 'nope'.*digits.*heart-disease.*{plugin.name}.*hansa task new"):
        load_task("nope")
    with pytest.raises(TaskError, match="no task 'nope'"):
        code_sha256("nope")


def test_the_hash_covers_every_file_but_bytecode_and_tests(plugin):
    write(plugin.folder, "data/table.bin", b"\0\1")
    write(plugin.folder, "sub/tests/kept.py", "")
    expected = digest(
        {p.relative_to(plugin.folder).as_posix(): p.read_bytes() for p in plugin.folder.rglob("*") if p.is_file()}
    )
    write(plugin.folder, "__pycache__/x.cpython-311.pyc", b"x")
    write(plugin.folder, "sub/__pycache__/x.pyc", b"x")
    write(plugin.folder, "tests/test_x.py", "x")
    assert code_sha256(plugin.name) == expected


def test_any_change_of_a_plug_ins_files_changes_its_hash(plugin):
    seen = {fresh_sha256(plugin)}
    source = plugin.folder / "schema.yaml"
    for change in (
        lambda: source.write_text(source.read_text().replace("100", "101")),
        lambda: write(plugin.folder, "empty.py", ""),
        lambda: (plugin.folder / "empty.py").rename(plugin.folder / "other.py"),
        lambda: write(plugin.folder, "stray.pyc", "sourceless modules can be imported"),
    ):
        change()
        before = len(seen)
        seen.add(fresh_sha256(plugin))
        assert len(seen) == before + 1


def test_the_hash_is_of_the_code_that_runs_not_of_a_later_edit(plugin):
    load_task(plugin.name)
    before = code_sha256(plugin.name)
    write(plugin.folder, "model.py", "later")
    assert code_sha256(plugin.name) == before
    assert fresh_sha256(plugin) != before


def test_a_linked_folder_would_escape_the_hash(plugin, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (plugin.folder / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TaskError, match="would escape the hash"):
        load_task(plugin.name)


def test_a_submodule_counts_with_its_whole_package_and_a_lone_module_with_its_yaml(plugin, tmp_path):
    inner = write(plugin.folder, "deep/inner.py", (plugin.folder / "__init__.py").read_text())
    write(plugin.folder, "deep/schema.yaml", SCHEMA)
    info = next(tmp_path.glob("*.dist-info"))
    write(info, "entry_points.txt", f"[hansa.tasks]\n{plugin.name} = {plugin.package}.deep.inner:task\n")
    before = fresh_sha256(plugin)
    write(plugin.folder, "unrelated.py", "but in the package")
    assert fresh_sha256(plugin) != before

    lone = write(tmp_path, f"lone_{plugin.package}.py", inner.read_text().replace("schema.yaml", f"{plugin.name}.y"))
    write(tmp_path, f"{plugin.name}.y", SCHEMA)
    yaml = write(tmp_path, f"{lone.stem}.yaml", "beside it")
    write(info, "entry_points.txt", f"[hansa.tasks]\n{plugin.name} = {lone.stem}:task\n")
    assert fresh_sha256(plugin) == digest({p.name: p.read_bytes() for p in (lone, yaml)})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ZeroDivisionError('boom')", "cannot be imported: ZeroDivisionError: boom"),
        ("import not_there_at_all", "cannot be imported: ModuleNotFoundError"),
        ("", "cannot be imported: AttributeError"),
        ("task = 3", "is of type int"),
        ("from hansa.common.tasks import load_task\ntask = load_task('digits')", "is task 'digits'"),
    ],
)
def test_a_plug_in_that_gives_no_task(plugin, code, message):
    write(plugin.folder, "__init__.py", code)
    with pytest.raises(TaskError, match=message):
        load_task(plugin.name)


def test_a_task_installed_twice_is_refused(plugin, tmp_path):
    plugin.install(tmp_path, "elsewhere:task")
    with pytest.raises(TaskError, match=r"installed twice: elsewhere, plug_"):
        load_task(plugin.name)


ARRAYS = ArraySchema(shape=(3,), value_range=(0, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Bad Name"}, "'Bad Name'.*lowercase"),
        ({"name": "a--b"}, "'a--b'"),
        ({"classes": ("one",)}, "at least two classes"),
        ({"classes": ("one", "one")}, "each once"),
        ({"schema": load_task("heart-disease").schema}, "are not its schema's"),
    ],
)
def test_a_malformed_task(changes, message):
    fields = {"name": "t", "title": "", "schema": ARRAYS, "classes": ("a", "b"), "build_model": torch.nn.Identity}
    with pytest.raises(TaskError, match=message):
        Task(**(fields | changes))


class Centred(torch.nn.Linear):
    """Mixes, whatever the numbers."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Largest(torch.nn.Linear):
    """Mixes, but not records of 0 and 1."""

    def forward(self, x):
        return super().forward(x / x.abs().max().clamp_min(1))


class Zero(Centred):
    """Mixes, but not as it begins."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        torch.nn.init.zeros_(self.weight)


class Typo(torch.nn.Linear):
    def forward(self, x):
        return x.linear(self.weight)


def balanced(logits, labels):
    return cross_entropy(logits, labels) / torch.bincount(labels, minlength=2)[labels]


@pytest.mark.parametrize(
    ("build", "loss", "message", "hint"),
    [
        (lambda: torch.nn.Linear(4, 2), None, r"fails on records of shape \[3\].*cannot be multiplied", "schema.shape"),
        (lambda: torch.nn.Linear(3, 1), None, r"the model gives \[2, 1\], not \[2, 2\]", "one logit a class"),
        (lambda: torch.nn.Linear(3, 5), None, r"the model gives \[2, 5\]", "one logit a class"),
        (
            lambda: torch.nn.Linear(3, 2),
            torch.nn.functional.cross_entropy,
            r"the loss gives \[\], not \[2\]",
            "reduction",
        ),
        (lambda: torch.nn.Linear(3, 2), lambda z, y: z[:, 0] * torch.nan, "is not finite", ""),
        (lambda: torch.nn.Linear(3, 2), lambda z, y: z.oops, "the loss fails on logits.*'oops'", "int64 classes"),
        (lambda: torch.nn.Linear(3, 2), lambda z, y: None, "the loss gives NoneType", "one loss a record"),
        (lambda: 1 / 0, None, "build_model fails: ZeroDivisionError: division by zero", "Correct the task's code."),
        (lambda: None, None, "gives NoneType, not a torch.nn.Module", "Return"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LSTM(2, 2)), None, "'1'.*LSTM", "DPLSTM"),
        (
            lambda: torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)),
            None,
            "layer '0'.*mixes",
            "Group",
        ),
        (lambda: Typo(3, 2), None, "no attribute 'linear'", "Correct the task's code."),
        (lambda: Centred(3, 2), None, "mixes records", "LayerNorm"),
        (lambda: Largest(3, 2), None, "mixes records", "LayerNorm"),
        (lambda: Zero(3, 2), None, "mixes records", "LayerNorm"),
        (lambda: torch.nn.Linear(3, 2), balanced, "mixes records", "LayerNorm"),
    ],
)
def test_check_model_finds_a_model_that_does_not_fit(build, loss, message, hint):
    """And says of what kind the mistake is: a hint about shapes helps nobody with a typo."""
    task = Task("t", "", ARRAYS, ("a", "b"), build, **({"loss": loss} if loss else {}))
    before = torch.get_rng_state()
    with pytest.raises(TaskError, match=message) as caught:
        check_model(task)
    assert hint in caught.value.hint
    assert ("schema.shape" in caught.value.hint) == ("multiplied" in message)
    assert torch.equal(before, torch.get_rng_state())


def test_check_model_takes_dropout_and_the_recurrent_layers_that_opacus_has():
    from opacus.layers import DPLSTM

    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = DPLSTM(1, 4, batch_first=True), torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.inner(x.unsqueeze(-1))[0][:, -1])

    check_model(Task("t", "", ARRAYS, ("a", "b"), Last))
    check_model(
        Task("t", "", ARRAYS, ("a", "b"), lambda: torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(3, 2)))
    )


# --- metrics --------------------------------------------------------------------------------------------------------

BINARY = Task("t", "", ARRAYS, ("a", "b"), torch.nn.Identity)
THREE = Task("t", "", ARRAYS, ("a", "b", "c"), torch.nn.Identity)


def random_scores(k, n=400, decimals=7):
    rng = np.random.default_rng(k)
    labels = rng.integers(0, k, n)
    logits = torch.from_numpy(rng.normal(size=(n, k)) + 1.5 * np.eye(k)[labels])
    return scores_of(logits).round(decimals), labels


@pytest.mark.parametrize("decimals", [7, 1])  # with one decimal most pairs tie
def test_binary_metrics_agree_with_scikit_learn(decimals):
    scores, labels = random_scores(2, decimals=decimals)
    metrics = evaluate(BINARY, scores, labels)
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, scores[:, 1]), abs=1e-12)
    assert metrics["accuracy"] == np.mean((scores[:, 1] > scores[:, 0]) == labels)
    assert metrics["brier"] == pytest.approx(np.mean((scores[:, 1] - labels) ** 2), abs=1e-6)


def test_multiclass_metrics_agree_with_scikit_learn():
    scores, labels = random_scores(3)
    metrics = evaluate(THREE, scores, labels)
    one_vs_rest = [roc_auc_score(labels == c, scores[:, c]) for c in range(3)]
    assert metrics["auc"] == pytest.approx(np.mean(one_vs_rest), abs=1e-12)
    assert metrics["brier"] == pytest.approx(np.mean(((scores - np.eye(3)[labels]) ** 2).sum(1)), abs=1e-6)
    only_two = labels < 2  # the third class is absent and does not count
    kept = [roc_auc_score(labels[only_two] == c, scores[only_two, c]) for c in range(2)]
    assert evaluate(THREE, scores[only_two], labels[only_two])["auc"] == pytest.approx(np.mean(kept), abs=1e-12)


def test_undefined_auc_is_absent():
    scores, labels = random_scores(2)
    assert set(evaluate(BINARY, scores, np.ones_like(labels))) == {"accuracy", "brier"}
    assert evaluate(BINARY, scores[:0], labels[:0]) == {}


def test_scores_that_do_not_fit_or_are_not_finite():
    scores, labels = random_scores(2)
    with pytest.raises(TaskError, match=r"\[400, 2\] for 399 rows and 2 classes"):
        evaluate(BINARY, scores, labels[1:])
    with pytest.raises(RunFailed, match="not finite"):
        evaluate(BINARY, scores * np.nan, labels)


@pytest.mark.parametrize("bins", [2, 20, 21])
def test_histogram_metrics_approach_the_exact_ones(bins):
    scores, labels = random_scores(2, n=20_000)
    exact, got = evaluate(BINARY, scores, labels), histogram_metrics(score_histogram(scores, labels, bins))
    assert got["auc"] == pytest.approx(exact["auc"], abs=1 / bins**1.5)
    assert got["accuracy"] == pytest.approx(exact["accuracy"], abs=1e-12 if bins % 2 == 0 else 0.02)
    assert got["brier"] == pytest.approx(exact["brier"], abs=0.5 / bins)


def test_histogram_metrics_are_exact_for_scores_at_bin_centres():
    rng = np.random.default_rng(0)
    p = (rng.integers(0, 20, 500) + 0.5) / 20
    labels = (rng.random(500) < p).astype(int)
    scores = np.stack([1 - p, p], axis=1)
    got = histogram_metrics(score_histogram(scores, labels))
    exact = evaluate(BINARY, scores, labels)
    assert {key: got[key] for key in exact} == pytest.approx(exact, abs=1e-12)
    by_hand = sum(abs(np.sum(labels[p == c] - c)) for c in np.unique(p)) / 500
    assert got["calibration_error"] == pytest.approx(by_hand, abs=1e-12)


def test_calibration_error_tells_calibrated_from_overconfident():
    p = np.repeat((np.arange(20) + 0.5) / 20, 200)
    labels = (np.tile(np.arange(200), 20) < np.round(200 * p)).astype(int)
    error = [
        histogram_metrics(score_histogram(np.stack([1 - q, q], 1), labels))["calibration_error"]
        for q in (p, np.clip(2 * p - 0.5, 0.001, 0.999))
    ]
    assert error[0] == pytest.approx(0, abs=1e-9)
    assert error[1] > 0.1


def test_multiclass_histogram():
    scores, labels = random_scores(3)
    hist = score_histogram(scores, labels, binary=False)
    metrics = histogram_metrics(hist, binary=False)
    assert set(metrics) == {"accuracy", "calibration_error"}
    assert metrics["accuracy"] == evaluate(THREE, scores, labels)["accuracy"]
    with pytest.raises(TaskError, match="binary=True"):
        score_histogram(scores, labels)


def test_an_undecided_model_scores_the_same_in_both():
    scores, labels = np.full((10, 2), 0.5, dtype=np.float32), np.array([0] * 7 + [1] * 3)
    got = histogram_metrics(score_histogram(scores, labels))
    assert (got["accuracy"], got["auc"]) == (evaluate(BINARY, scores, labels)["accuracy"], 0.5) == (0.7, 0.5)


def test_noisy_and_empty_histograms():
    hist = score_histogram(*random_scores(2)) + np.random.default_rng(0).normal(scale=5, size=(2, 20))
    assert (hist < 0).any()
    assert all(0 <= value <= 1 for value in histogram_metrics(hist).values())
    assert histogram_metrics(-np.ones((2, 20))) == {}
    one_class = np.zeros((2, 20))
    one_class[1] = 1
    assert "auc" not in histogram_metrics(one_class)
    with pytest.raises(TaskError, match=r"\[2, bins\]"):
        histogram_metrics(np.zeros((3, 20)))
    with pytest.raises(TaskError, match="at least 2 bins"):
        score_histogram(np.zeros((3, 2)), np.zeros(3, dtype=int), bins=1)


@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=3, max_size=3),
    label=st.integers(0, 2),
    bins=st.integers(2, 30),
    binary=st.booleans(),
)
def test_a_record_adds_one_to_exactly_one_cell_whatever_its_scores(values, label, bins, binary):
    k = 2 if binary else 3
    scores = np.array([values[:k]], dtype=np.float32)
    cells = score_histogram(scores, np.array([label]), bins, binary)
    assert sorted(cells.ravel()) == [0] * (2 * bins - 1) + [1]


# --- the template ---------------------------------------------------------------------------------------------------


def test_a_new_task_is_installable_passes_its_own_test_and_loads(tmp_path):
    name = f"own-{uuid.uuid4().hex[:8]}"
    target = scaffold(name, tmp_path / "work")
    package = name.replace("-", "_")
    assert target == tmp_path / "work" / name
    assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()) == sorted(
        [
            *(f"{package}/{file}" for file in ("__init__.py", "model.py", "schema.yaml")),
            *("tests/test_task.py", "pyproject.toml", "federation.yaml", "north.csv", "south.csv"),
        ]
    )
    assert not any("{{" in p.read_text() for p in target.rglob("*") if p.is_file())
    federation = load_config(target / "federation.yaml")
    assert federation.task == name

    write(target / "x-1.dist-info", "METADATA", "Metadata-Version: 2.1\nName: x\nVersion: 1\n")
    write(target / "x-1.dist-info", "entry_points.txt", f"[hansa.tasks]\n{name} = {package}:task\n")
    paths = f"sys.path[:0] = [{str(ROOT / '.dev')!r}, {str(target)!r}]"
    code = f"import sys; {paths}; import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=target, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout

    schema = load_schema(target / package / "schema.yaml")
    for partner, entry in federation.partners.items():
        x, y = read_table(target / f"{partner}.csv", schema)
        assert len(x) * (1 - federation.evaluation.test_fraction) == entry.declared_records
        assert 0.2 < y.mean() < 0.8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My-Task", "Allowed are lowercase"),
        ("1st", "Allowed are lowercase"),
        ("a_b", "Allowed are lowercase"),
        ("a-", "Allowed are lowercase"),
        ("../a", "Allowed are lowercase"),
        ("", "Allowed are lowercase"),
        ("class", "Allowed are lowercase"),
        ("digits", "installed already"),
        ("json", "module 'json' exists already"),
    ],
)
def test_a_new_task_needs_a_free_and_valid_name(tmp_path, name, message):
    with pytest.raises(TaskError, match=message):
        scaffold(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_new_task_overwrites_nothing_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    write(tmp_path, "mine-own/notes.txt", "keep")
    with pytest.raises(OutputError, match="exists already"):
        scaffold("mine-own", tmp_path)
    assert [p.name for p in (tmp_path / "mine-own").iterdir()] == ["notes.txt"]

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scaffold_module, "_example", full)
    with pytest.raises(OutputError, match="No space left"):
        scaffold("half-way", tmp_path)
    assert not (tmp_path / "half-way").exists()
