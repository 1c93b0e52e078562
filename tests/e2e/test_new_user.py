"""What a new user would do, only by docs/your-own-task.md: first as it is written, then with data and a model of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from sklearn.datasets import load_breast_cancer

from e2e_support import REPO, call, environment, write, write_rows

PAGE, ARRAYS = (REPO / "docs" / "your-own-task.md").read_text(encoding="utf-8").split("\n## 8. ")

SCHEMA = """\
columns:
  mean radius: {type: number, min: 0, max: 40, unit: um, required: true}
  mean texture: {type: number, min: 0, max: 60, required: true}
  mean concavity: {type: number, min: 0, max: 1, missing: ["-9"]}
  worst area: {type: number, min: 0, max: 6000, unit: um2}
  worst smoothness: {type: number, min: 0, max: 0.5}
label:
  column: diagnosis
  classes: [benign, malignant]
  values: {B: benign, M: malignant}
"""
MODEL = """\
from torch import nn


def build_model(inputs: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, classes))
"""
SITES = ("lyon", "turin", "basel")
FEDERATION = """\
name: tumours
task: my-task
partners:
  lyon: {data: lyon.csv, declared_records: 150}
  turin: {data: turin.csv, declared_records: 150}
  basel: {data: basel.csv, declared_records: 150}
algorithm:
  strategy: {name: fedavg}
  rounds: 8
  local: {steps: 5, sampling_rate: 1.0, optimizer: {name: sgd, lr: 0.5}}
privacy: {kind: local, epsilon: 2.0, delta: 1e-4, clip_norm: 1.0}
evaluation: {kind: public, test_fraction: 0.2}
quorum: 3
seed: 1
"""


def blocks(language: str) -> list[str]:
    """The page's fenced blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def commands() -> list[str]:
    """Every command of the page, as it is written."""
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment "with Hansa and training", as the page asks for: it borrows the packages of this one."""
    root = tmp_path_factory.mktemp("user")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
    python = root / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    write(Path(site) / "borrowed.pth", f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    for name, start in {"hansa": "from hansa.common.start import main; main()", "pip": None, "pytest": None}.items():
        go = f'exec "{python}" -m {name} "$@"' if start is None else f'exec "{python}" -c "{start}" "$@"'
        write(root / "venv" / "bin" / name, f"#!/bin/sh\n{go}\n").chmod(0o755)
    return root


def shell(machine: Path, folder: Path, *lines: str) -> str:
    """Run these lines as one shell session that stops at the first failure; what it printed."""
    env = environment()
    env.update(PATH=f"{machine / 'venv' / 'bin'}{os.pathsep}{env['PATH']}", PIP_DISABLE_PIP_VERSION_CHECK="1")
    done = subprocess.run(
        ["bash", "-ex", "-c", "\n".join(lines)], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    told = done.stdout + done.stderr
    if done.returncode and "Could not find a version that satisfies the requirement hatchling" in told:
        pytest.skip("no package index can be reached, which the page's `pip install -e .` needs")
    assert done.returncode == 0, told
    assert "Traceback" not in told, told
    return told


def as_it_is_written(machine: Path) -> None:
    """Every command on the page, in its order, and nothing else."""
    assert commands()[0] == "hansa task new my-task"
    assert len(commands()) >= 8
    told = shell(machine, machine, *commands())
    assert "VERIFIED" in told
    assert "200 rows" in told or "300 rows" in told
    project = machine / "my-task"
    assert json.loads((project / "out" / "first" / "result.json").read_text())["final"]["auc"] > 0.6
    assert list(project.glob("my_task-*.whl"))


def what_it_shows_is_what_the_command_writes(machine: Path) -> None:
    """Its files are those of the template, so the page's explanations are of what the user has."""
    project = machine / "my-task"
    code, text = blocks("python")[0], (project / "my_task" / "model.py").read_text()
    assert code.strip() in text
    schema, federation = blocks("yaml")

    def plain(part: str) -> object:
        return yaml.load(re.sub(r", description: [^}]*", "", part), Loader=yaml.BaseLoader)

    assert plain(schema) == plain((project / "my_task" / "schema.yaml").read_text())
    assert plain(federation) == plain((project / "federation.yaml").read_text())
    (tree,) = re.findall(r"\n```\n(my-task/.*?)```", PAGE, flags=re.S)
    named = [
        name for line in tree.splitlines()[1:] for name in re.split(r",? ", line.strip().split("   ")[0].split("  ")[0])
    ]
    assert len(named) >= 8
    for name in named:
        assert (project / name).exists(), name
    assert "3 = 6 features" in PAGE
    assert "6 features" in shell(machine, project, "hansa task check my-task north.csv")


def their_own_data_and_model(machine: Path) -> None:
    project = machine / "my-task"
    data = load_breast_cancer()
    columns = ["mean radius", "mean texture", "mean concavity", "worst area", "worst smoothness"]
    picked = [list(data.feature_names).index(c) for c in columns]
    for number, site in enumerate(SITES):
        rows = [
            {**dict(zip(columns, map(str, x[picked]), strict=True)), "diagnosis": "MB"[y], "clinic": site}
            for x, y in zip(data.data[number::3], data.target[number::3], strict=True)
        ]
        rows[0]["mean concavity"], rows[1]["worst area"] = "-9", ""
        write_rows(project / f"{site}.csv", rows)
    write(project / "my_task" / "schema.yaml", SCHEMA)
    write(project / "my_task" / "model.py", MODEL)
    write(project / "federation.yaml", FEDERATION)
    test = project / "tests" / "test_task.py"
    names = ", ".join(f'"{site}.csv"' for site in SITES)
    write(test, test.read_text().replace('"north.csv", "south.csv"', names).replace('"north.csv"', '"lyon.csv"'))
    for old in ("north.csv", "south.csv"):
        (project / old).unlink()
    told = shell(
        machine,
        project,
        *(f"hansa task check my-task {site}.csv" for site in SITES[:1]),
        "hansa plan federation.yaml",
        "hansa simulate federation.yaml --out out/second",
        "hansa audit out/second",
        "pytest",
    )
    assert "190 rows fit the schema of my-task; 8 features" in told
    assert "missing cells: mean concavity 1, worst area 1" in told
    assert "not used: clinic" in told
    assert told.count("VERIFIED") == 2
    result = json.loads((project / "out" / "second" / "result.json").read_text())
    assert set(result["partners"]) == set(SITES)
    assert result["final"]["auc"] > 0.8
    assert all(0 < p["epsilon"] <= 2 for p in result["partners"].values())


@pytest.fixture(scope="module")
def followed(machine: Path) -> Path:
    """The machine on which the page was followed."""
    as_it_is_written(machine)
    return machine


def test_a_new_user_gets_to_a_verified_audit_by_the_page_alone(followed: Path) -> None:
    what_it_shows_is_what_the_command_writes(followed)


@pytest.mark.soak
def test_a_new_user_goes_on_with_their_own_data_and_model(followed: Path) -> None:
    their_own_data_and_model(followed)


def test_the_pages_task_on_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files as they are written, its commands in this process; what `pip install` would do is on the path."""
    files = dict(re.findall(r"`([\w/.]+)`:\n\n```\w+\n(.*?)```", ARRAYS, flags=re.S))
    assert list(files) == ["my_images/__init__.py", "my_images/model.py", "make_data.py", "federation.yaml"]
    for name, text in files.items():
        write(tmp_path / name, text)
    write(tmp_path / "my_images-1.dist-info" / "METADATA", "Metadata-Version: 2.1\nName: my-images\nVersion: 1\n")
    write(tmp_path / "my_images-1.dist-info" / "entry_points.txt", "[hansa.tasks]\nmy-images = my_images:task\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(files["make_data.py"], {})
    _, commands = re.findall(r"```sh\n(.*?)```", ARRAYS, flags=re.S)
    for line in commands.splitlines()[2:]:
        call(*line.split()[1:]).expect(0).says("VERIFIED")
    assert json.loads((tmp_path / "out" / "first" / "result.json").read_text())["final"]["auc"] > 0.9


@pytest.mark.soak
def test_the_way_without_an_index(machine: Path) -> None:
    before, after = re.findall(r"`(pip install [^`]*(?:editables|no-build-isolation)[^`]*)`", PAGE)
    (machine / "apart").mkdir()
    shell(machine, machine / "apart", "hansa task new other-task", "cd other-task", before, after, "hansa task list")
