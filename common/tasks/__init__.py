"""A task is what is learned: schema, model and loss. The registry finds the built-in ones and plug-ins.

Code never travels: a charter names a task and the SHA-256 of its files (`code_sha256`), and a node runs
only what its own partner installed. A plug-in is a package with an entry point in the group `hansa.tasks`
whose name is the task's and whose object is a `Task`; `hansa task new` writes one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import Federation
from ..errors import ConfigError, TaskError, counted
from .schema import ArraySchema, TableSchema

__all__ = [
    "Task",
    "check_layers",
    "check_model",
    "code_sha256",
    "cross_entropy",
    "initial_model",
    "load_task",
    "made_up_records",
    "sized",
    "task_names",
]

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
        TaskError: as `load_task` and `check_model`.
    """
    secure = config.secure_aggregation
    if secure is None:
        return config
    task = load_task(config.task)
    check_model(task)
    dimension = sum(p.numel() for p in initial_model(task, config.seed).parameters() if p.requires_grad)
    if secure.dimension not in (None, dimension):
        raise ConfigError(
            f"secure_aggregation.dimension is {secure.dimension}; the model of task {config.task} has {dimension} parameters",
            "Leave it out: it is taken from the task.",
        )
    return config.model_copy(update={"secure_aggregation": secure.model_copy(update={"dimension": dimension})})


def check_model(task: Task) -> None:
    """Build the model, look at its layers, and try it and the loss on made-up records; torch's generator is left alone.

    Whatever trains or plans a task calls it first: a mistake is told once, before anything is spent.

    Raises:
        TaskError: the model or the loss does not do what `Task` says.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            model = task.build_model()
        except Exception as error:
            raise TaskError(
                f"task {task.name}: build_model fails: {_said(error)}", "Correct the task's code."
            ) from error
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"task {task.name}: build_model gives {type(model).__name__}, not a torch.nn.Module",
                "Return the model from it.",
            )
        try:
            check_layers(model)
        except TaskError as error:
            raise TaskError(f"task {task.name}: {error.message}", error.hint) from error
        _, loss = _tried(task, model, torch.zeros(2, *task.schema.shape), [0, 0])
        if not bool(torch.isfinite(loss).all()):
            raise TaskError(f"task {task.name}: the loss of two records of zeros is not finite")
        _refuse_mixing(task, model)


def check_layers(model: nn.Module) -> None:
    """Refuse a model whose per-record gradients do not exist or whose training leaves something outside them.

    Whether or not training will be protected. It does not import Opacus, and refuses all that Opacus refuses.

    Raises:
        TaskError: naming the layer and what to use instead.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise TaskError("the model has no trainable parameters", "Set requires_grad on those that are to be trained.")
    for name, layer in model.named_modules():
        trainable = any(p.requires_grad for p in layer.parameters(recurse=False))
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            # Also without parameters of its own, or frozen: in train mode it mixes records all the same.
            why, instead = "mixes the records of a batch", "nn.GroupNorm or nn.LayerNorm"
        elif isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
            why, instead = "keeps statistics of the records", "track_running_stats=False"
        elif isinstance(layer, nn.RNNBase) and trainable:
            why, instead = "has no per-record gradients", f"opacus.layers.DP{layer.mode.split('_')[0]}"
        elif isinstance(layer, nn.MultiheadAttention) and trainable:
            why, instead = "has no per-record gradients", "opacus.layers.DPMultiheadAttention"
        elif getattr(layer, "inplace", False) is True:
            why, instead = "overwrites what per-record gradients are computed from", "inplace=False"
        elif trainable and next(layer.buffers(), None) is not None:
            why, instead = (
                "has buffers, which training may change unaccounted",
                "a parameter, or a parent's buffer",
            )
        else:
            continue
        raise TaskError(f"layer '{name}' ({type(layer).__name__}) {why}", f"Use {instead} instead.")


def _tried(task: Task, model: nn.Module, records: Tensor, labels: list[int]) -> tuple[Tensor, Tensor]:
    """Logits and losses of some made-up records.

    Raises:
        TaskError: the model or the loss fails, or gives another shape than `Task` says.
    """
    shape, n = list(records.shape[1:]), len(records)
    with torch.no_grad():
        try:
            logits = model(records)
        except Exception as error:
            shapes = re.search("shape|size|dimension|channel", str(error), re.IGNORECASE)
            raise TaskError(
                f"task {task.name}: the model fails on records of shape {shape}: {_said(error)}",
                "Its first layer must take schema.shape, and each what the one before gives."
                if shapes
                else "Correct the task's code.",
            ) from error
        if not isinstance(logits, Tensor) or logits.shape != (n, len(task.classes)):
            given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TaskError(
                f"task {task.name}: for {counted(n, 'record')} the model gives {given}, not {[n, len(task.classes)]}",
                "It must give one logit a class, also where there are two classes.",
            )
        try:
            loss = task.loss(logits, torch.tensor(labels))
        except Exception as error:
            raise TaskError(
                f"task {task.name}: the loss fails on logits {list(logits.shape)}: {_said(error)}",
                "It takes logits [n, classes] and int64 classes [n].",
            ) from error
    if not isinstance(loss, Tensor) or loss.shape != (n,):
        given = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TaskError(
            f"task {task.name}: for {counted(n, 'record')} the loss gives {given}, not {[n]}",
            "It must give one loss a record: reduction='none', and a mean over everything but the first dimension.",
        )
    return logits, loss


def made_up_records(shape: Sequence[int], dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Records on which it shows whether a model keeps them apart: one, and two that stand beside it in turn.

    First of 0 and 1, which are also valid as tokens. Then, of floats, of different sizes: code that mixes by the largest number of a
    batch, say, shows only there; not every model takes them. Drawn by torch's generator.
    """
    record, other = torch.randint(0, 2, (2, *shape)).to(dtype)
    found = [(record, other, 1 - other)]
    if dtype.is_floating_point:
        one, small, large = (size * torch.randn(tuple(shape), dtype=dtype) for size in (1.0, 0.1, 30.0))
        found.append((one, small, large))
    return found


def _refuse_mixing(task: Task, model: nn.Module) -> None:
    """Raise TaskError when what comes out for a record depends on the one beside it. Overwrites the parameters."""
    shape = task.schema.shape
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:  # an output layer that starts at zero would hide it
            nn.init.normal_(p, std=0.3)
    usual, *others = made_up_records(shape, torch.float32)

    def beside(first: Tensor, second: Tensor, label: int) -> list[Tensor]:
        torch.manual_seed(0)  # the same dropout for both
        logits, loss = _tried(task, model, torch.stack([first, second]), [0, label])
        return [logits[0], loss[:1]]

    def differs(first: Tensor, second: Tensor, third: Tensor) -> bool:
        pairs = zip(beside(first, second, 0), beside(first, third, 1), strict=True)
        return not all(torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs)

    mixes = differs(*usual)
    with contextlib.suppress(TaskError):  # where 0 and 1 alone are valid
        mixes = mixes or any(differs(*records) for records in others)
    if mixes:
        raise TaskError(
            f"task {task.name}: the model or the loss mixes records: what it gives for one depends on the others of its batch",
            "Normalise within a record (nn.LayerNorm, nn.GroupNorm), and take means over everything but the first dimension.",
        )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


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
