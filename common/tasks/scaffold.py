"""A new plug-in task from the template: what `hansa task new` writes."""

from __future__ import annotations

import importlib.util
import keyword
import math
import random
import shutil
from pathlib import Path

from ..errors import OutputError, TaskError
from . import NAME, task_names

__all__ = ["scaffold"]

_TEMPLATE = Path(__file__).parent / "template"
_EXAMPLES = {"north.csv": 300, "south.csv": 200}  # a fifth is held out: 240 and 160 are declared


def scaffold(name: str, folder: Path) -> Path:
    """Write an installable package for a task of that name into `folder`/`name`; returns that folder.

    It trains as it is, on two made-up CSV files.

    Raises:
        TaskError: a malformed name, or one that an installed task or importable module has.
        OutputError: the folder exists or cannot be written; then nothing is left behind.
    """
    package = name.replace("-", "_")
    if not NAME.fullmatch(name) or keyword.iskeyword(package):
        raise TaskError(
            f"task name {name!r}", "Allowed are lowercase letters, digits and single hyphens, a letter first."
        )
    if name in task_names():
        raise TaskError(f"a task {name!r} is installed already", "Choose another name, or uninstall that one.")
    if importlib.util.find_spec(package) is not None:
        raise TaskError(f"a Python module {package!r} exists already and would hide the task's", "Choose another name.")
    target = folder / name
    try:
        target.mkdir(parents=True)
    except FileExistsError:
        raise OutputError(f"{target} exists already", "Choose another name or folder, or remove it.") from None
    except OSError as error:
        raise OutputError(f"cannot make {target}: {error.strerror}", "Give a writable folder.") from None
    try:
        for source in sorted(path for path in _TEMPLATE.rglob("*") if path.is_file()):
            parts = [package if part == "package" else part for part in source.relative_to(_TEMPLATE).parts]
            path = target.joinpath(*parts)
            # The suffix keeps the template's files from linters, type checkers and pytest.
            path = path.with_name(path.name.removesuffix(".tmpl"))
            path.parent.mkdir(exist_ok=True)
            text = source.read_text(encoding="utf-8").replace("{{name}}", name).replace("{{package}}", package)
            path.write_text(text, encoding="utf-8")
        for file, rows in _EXAMPLES.items():
            (target / file).write_text(_example(rows, seed=rows), encoding="utf-8")
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise OutputError(f"cannot write {target}: {error.strerror}", "Make room, then try again.") from error
    return target


def _example(rows: int, seed: int) -> str:
    """A made-up CSV file: illness grows with age, the marker and smoking; some cells are missing."""
    rng = random.Random(seed)  # noqa: S311  # made-up data, the same for everybody
    lines = ["age,marker,smoker,outcome"]
    for _ in range(rows):
        age, marker, smoker = rng.randint(20, 90), rng.uniform(0, 40), rng.random() < 0.4
        risk = 1 / (1 + math.exp(-(0.08 * (age - 55) + 0.12 * (marker - 20) + 1.5 * (smoker - 0.4))))
        outcome = rng.random() < risk
        cells = [
            str(age),
            rng.choice(["", "-1"]) if rng.random() < 0.1 else f"{marker:.1f}",
            "" if rng.random() < 0.05 else ("no", "yes")[smoker],
            ("no", "yes")[outcome],
        ]
        lines.append(",".join(cells))
    return "\n".join(lines) + "\n"
