"""A task is what is learned: schema, model and loss. The registry finds the built-in ones and plug-ins.

Code never travels: a charter names a task and the SHA-256 of its files (`code_sha256`), and a node runs
only what its own partner installed. A plug-in is a package with an entry point in the group `hansa.tasks`
whose name is the task's and whose object is a `Task`; `hansa task new` writes one.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import Federation
from ..errors import ConfigError, TaskError
from .schema import ArraySchema, TableSchema

__all__ = ["Task", "check_model", "code_sha256", "cross_entropy", "initial_model", "load_task", "sized", "task_names"]

# Also entry points, but they must work where the package is on the path without being installed.
_BUILT_IN = {name: f"{__name__}.{name.replace('-', '_')}" for name in ("digits", "fashion-mnist", "heart-disease")}
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each record: logits float [n, k], targets int64 [n] -> float [n]."""
    return nn.functional.cross_entropy(logits, targets, reduction="none")


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        name: as in charters: lowercase letters, digits, hyphens.
        title: one line for people.
        schema: what a record is; `schema.shape` is the shape of its features.
        classes: names of the classes in the order of their index; with two, the second is the positive one.
        build_model: a fresh model, initialised from torch's global generator; float32 [n, *schema.shape] ->
            logits [n, len(classes)], one a class also for two classes. No layer may mix records (no batch
            normalisation).
        loss: logits [n, k], targets int64 [n] -> loss of each record [n].

    Raises:
        TaskError: a malformed name, fewer than two classes, or classes that differ from the schema's.
    """

    name: str
    title: str
    schema: TableSchema | ArraySchema
    classes: tuple[str, ...]
    build_model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise TaskError(f"task name {self.name!r}: allowed are lowercase letters, digits and hyphens")
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise TaskError(f"task {self.name}: needs at least two classes, each once; it has {self.classes}")
        if isinstance(self.schema, TableSchema) and self.classes != self.schema.label.classes:
            raise TaskError(
                f"task {self.name}: classes {self.classes} are not its schema's {self.schema.label.classes}"
            )


def task_names() -> list[str]:
    """Names of all tasks that are installed here, sorted."""
    return sorted({*_BUILT_IN, *(entry.name for entry in entry_points(group="hansa.tasks"))})


def load_task(name: str) -> Task:
    """The installed task of that name; built-in ones first, then entry points `hansa.tasks`.

    Raises:
        TaskError: not installed (names what is), installed twice, fails to import, or no `Task` of that name.
    """
    return _load(name)[0]


def code_sha256(task_name: str) -> str:
    """SHA-256 (hex) of a task's files: for each, sorted by path, path + NUL + length + NUL + bytes.

    A plug-in counts whole: every file under its topmost package except `__pycache__` and its `tests` (a
    lone module: that file and the `.yaml` beside it). A built-in counts its module, its `.yaml`, and the
    schema code. Paths are relative and use /; the length is decimal. Hashed once a process, when the task
    is first imported, so the value keeps belonging to the code that runs.

    Raises:
        TaskError: as `load_task`, or its files cannot be read.
    """
    return _load(task_name)[1]


def initial_model(task: Task, seed: int) -> nn.Module:
    """The model that everyone starts from; the seed is public and used for nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.build_model()


def sized(config: Federation) -> Federation:
    """The configuration with what its secure aggregation takes from the task: how many numbers are summed.

    Raises:
        ConfigError: it gives another number.
        TaskError: as `load_task`.
    """
    secure = config.secure_aggregation
    if secure is None:
        return config
    model = initial_model(load_task(config.task), config.seed)
    dimension = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if secure.dimension not in (None, dimension):
        raise ConfigError(
            f"secure_aggregation.dimension is {secure.dimension}; the model of task {config.task} has {dimension} parameters",
            "Leave it out: it is taken from the task.",
        )
    return config.model_copy(update={"secure_aggregation": secure.model_copy(update={"dimension": dimension})})


def check_model(task: Task) -> None:
    """Build the model, run it on two records of zeros, check shapes and loss; torch's generator is left
    alone.

    Raises:
        TaskError: the model or the loss does not do what `Task` says.
    """
    logits_shape, loss_shape = (2, len(task.classes)), (2,)
    with torch.random.fork_rng(devices=[]):
        try:
            model = task.build_model()
            logits = model(torch.zeros(2, *task.schema.shape))
            loss = task.loss(logits, torch.zeros(2, dtype=torch.int64))
        except Exception as error:
            raise TaskError(
                f"task {task.name}: the model fails on records of shape {list(task.schema.shape)}: {error}",
                "Its first layer must take schema.shape, its loss logits and int64 classes.",
            ) from error
    if tuple(logits.shape) != logits_shape or tuple(loss.shape) != loss_shape:
        raise TaskError(
            f"task {task.name}: for two records the model gives {list(logits.shape)} (one logit a class: "
            f"{list(logits_shape)}) and the loss {list(loss.shape)} (one loss a record: {list(loss_shape)})"
        )
    if not bool(torch.isfinite(loss).all()):
        raise TaskError(f"task {task.name}: the loss of two records of zeros is not finite")


@cache
def _load(name: str) -> tuple[Task, str]:
    module_name, attribute = _find(name)
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, attribute)
    except TaskError:
        raise
    except Exception as error:  # whatever a plug-in raises on import, the user needs its name and the reason
        raise TaskError(
            f"task {name!r}: {module_name}:{attribute} cannot be imported: {type(error).__name__}: {error}",
            "Correct the package, or reinstall it.",
        ) from error
    if not isinstance(found, Task) or found.name != name:
        what = f"task {found.name!r}" if isinstance(found, Task) else f"of type {type(found).__name__}"
        raise TaskError(f"task {name!r}: {module_name}:{attribute} is {what}", "Entry point and Task must agree.")
    try:
        return found, _digest(_code_files(name, module_name))
    except OSError as error:
        raise TaskError(f"task {name!r}: its code cannot be read: {error}") from error


def _find(name: str) -> tuple[str, str]:
    if name in _BUILT_IN:
        return _BUILT_IN[name], "task"
    places = {(entry.module, entry.attr) for entry in entry_points(group="hansa.tasks", name=name)}
    if not places:
        raise TaskError(
            f"no task {name!r} is installed; installed are {', '.join(task_names())}",
            "Install its package (pip install), or start one: hansa task new NAME.",
        )
    if len(places) > 1:
        where = ", ".join(sorted(module for module, _ in places))
        raise TaskError(f"task {name!r} is installed twice: {where}", "Uninstall one of them.")
    return places.pop()


def _code_files(name: str, module_name: str) -> dict[str, Path]:
    """Relative path -> file of everything that belongs to the task's code."""
    if name in _BUILT_IN:
        here, stem = Path(__file__).parent, module_name.rpartition(".")[2]
        wanted = [here / f"{stem}.py", here / f"{stem}.yaml", here / "schema.py"]
        return {path.name: path for path in wanted if path.exists()}
    parts = module_name.split(".")
    # The topmost ordinary package; above it there may be namespace packages, which are no one owner's folder.
    names = (".".join(parts[: i + 1]) for i in range(len(parts)))
    module = next((m for m in map(sys.modules.get, names) if getattr(m, "__file__", None)), None)
    if module is None:
        raise TaskError(f"task {name!r}: {module_name} has no files to hash", "A task is a package or a module file.")
    origin = Path(str(module.__file__))
    if not hasattr(module, "__path__"):
        return {path.name: path for path in (origin, origin.with_suffix(".yaml")) if path.exists()}
    files = {}
    for path in origin.parent.rglob("*"):
        relative = path.relative_to(origin.parent)
        if "__pycache__" in relative.parts or relative.parts[0] == "tests":
            continue
        if path.is_symlink() and path.is_dir():
            raise TaskError(f"task {name!r}: {path} is a link to a folder, whose code would escape the hash")
        if path.is_file():
            files[relative.as_posix()] = path
    return files


def _digest(files: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for relative in sorted(files):
        content = files[relative].read_bytes()
        digest.update(b"%s\0%d\0" % (relative.encode(), len(content)) + content)
    return digest.hexdigest()
