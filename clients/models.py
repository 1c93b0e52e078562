"""Models that closing messages delivered: verified, kept, read back, and used on new rows.

    KEEP/<run id>/   model.safetensors, closing.json (signed by everyone), model.json (what is said of the model)

Two coordinators may choose the same run id: what comes second, under another charter, is in KEEP/<run id>@<charter, 16 digits>.

What the closing checkpoint proves: these are the bytes that everyone's signatures name, at the end of this run, under this
charter. The manifest follows from the charter, but for rounds and metrics, which are the coordinator's word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..common.charter import Charter, SignedCharter
from ..common.closing import CLOSING_TYPE, read_closing
from ..common.errors import ConfigError, DataError, MessageError, OutputError, TaskError
from ..common.identity import canonical, read_envelope, strict_json, write_whole
from ..common.ledger import Ledger
from ..common.messages import Tensors, is_finite
from ..common.model import Arrays, checked_manifest, file_sha256, model_sha256, write_model
from ..common.tasks import Task, code_sha256, initial_model, load_task
from ..common.tasks.metrics import scores_of
from ..common.tasks.schema import TableSchema, parse_table

MODEL, CLOSING, MANIFEST = "model.safetensors", "closing.json", "model.json"
_BATCH_ROWS = 1024


# -- what arrives --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Delivery:
    """A closing message that was verified.

    Attributes:
        charter_sha256: under which the run was.
        sealed: the closing checkpoint's file.
        manifest: what is said of the model; None, with no model, when the run was refused.
    """

    run_id: str
    charter_sha256: str
    sealed: bytes
    manifest: Mapping[str, Any] | None

    def keep(self, folder: Path, model: Tensors) -> None:
        """Write it all, each file whole, the manifest last; returns when it is on disk. Again is fine.

        Raises:
            OutputError: it could not be written, or something else is in its place.
        """
        place = folder / self.run_id  # an identifier as ledgers have it: no path in it, no leading dot
        if charter_of(place / CLOSING) not in (None, self.charter_sha256):
            place = folder / f"{self.run_id}@{self.charter_sha256[:16]}"  # no identifier has an @
            if charter_of(place / CLOSING) not in (None, self.charter_sha256):
                raise OutputError(f"{place}: holds something else", "Move it away; it is not of this run.")
        write_whole(place / CLOSING, self.sealed)  # first: it says whose folder this is
        if self.manifest is not None:
            write_model(place / MODEL, model)
            write_whole(place / MANIFEST, canonical(self.manifest) + b"\n")


def charter_of(closing: Path) -> str | None:
    """Of which charter a kept closing checkpoint says it is: "" for none that can be read, None where there is no file."""
    try:
        said = strict_json(read_envelope(closing.read_bytes().removesuffix(b"\n"), CLOSING_TYPE).payload)
        return str(said["charter_sha256"])
    except FileNotFoundError:
        return None
    except (OSError, MessageError, KeyError, TypeError):
        return ""


def verified(
    sealed: bytes,
    about: object,
    model: Tensors,
    run_id: str,
    charter: Charter,
    charter_sha256: str,
    name: str,
    ledger: Ledger,
) -> Delivery:
    """A closing message of the run `run_id`, if all of it is true as far as the node `name` can tell.

    Everyone in the charter signed the closing checkpoint; it is of this run and charter, names exactly the charter's
    ledgers, and states this node's own as it is or was at that length; it names exactly this model; and the manifest says
    what the charter does.

    Raises:
        MessageError: what is not so.
    """
    closing = read_closing(sealed, charter.keys(), charter_sha256)
    if closing["run_id"] != run_id:
        raise MessageError("a closing checkpoint of another run")
    (mine,) = (item for item in closing["ledgers"] if item["owner"] == name)
    if not ledger.states(mine["length"], mine["root"]):
        raise MessageError("a closing checkpoint that does not state this ledger as it is or was")
    if closing["model_sha256"] is None:
        if model or about is not None:
            raise MessageError("a model of a run that has none")
        return Delivery(run_id, charter_sha256, sealed, None)
    if model_sha256(model) != closing["model_sha256"]:
        raise MessageError("another model than the one that the closing checkpoint names")
    manifest = checked_manifest(about, charter, charter_sha256, run_id, closing["model_sha256"])
    return Delivery(run_id, charter_sha256, sealed, manifest)


# -- what is kept --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """A model on this disk.

    Attributes:
        arrays: float32 by name, as the file has them.
        sha256: of the file.
        manifest: what is said of it; None for a bare file.
        sealed: its closing checkpoint's file; None for a bare file.
    """

    arrays: Arrays
    sha256: str
    task: str
    manifest: Mapping[str, Any] | None = None
    sealed: bytes | None = None

    def verify(self, signed: SignedCharter) -> None:
        """Return when everyone in this charter signed for exactly this model and manifest.

        Raises:
            CharterError: the charter itself is not signed by everyone.
            MessageError: what else is not so.
        """
        charter = signed.verify()
        if self.manifest is None or self.sealed is None:
            raise MessageError("a bare file: no closing checkpoint came with it")
        closing = read_closing(self.sealed, charter.keys(), signed.sha256)
        checked_manifest(dict(self.manifest), charter, signed.sha256, closing["run_id"], closing["model_sha256"])


def load_kept(path: Path, task: str | None = None) -> Kept:
    """A kept folder, or a bare model.safetensors of the named task.

    No code is in it and none is run: the file holds numbers, the task's code is what is installed here.

    Raises:
        ConfigError: a bare file without a task, or a folder of another task.
        DataError: files that are missing, damaged or do not fit each other.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder", "Kept models are in the node's state/models/RUN.")
    if not path.is_dir():
        if task is None:
            raise ConfigError(f"{path}: a bare model says nothing of its task", "Give --task, or a kept folder.")
        return Kept(_arrays(path), _hash(path), task)
    sealed, text = _bytes(path / CLOSING), None
    if (path / MANIFEST).exists() or (path / MODEL).exists():
        text = _bytes(path / MANIFEST)
    try:
        # Whose signatures these are, only the charter tells: `Kept.verify`. That the files fit each other shows here.
        closing = strict_json(read_envelope(sealed.removesuffix(b"\n"), CLOSING_TYPE).payload)
        if closing["model_sha256"] is None:
            raise DataError(f"{path}: no model: run {closing['run_id']} was refused", "Give the folder of another run.")
        manifest = None if text is None else strict_json(text)
        named = ("run_id", "charter_sha256", "model_sha256")
        if not isinstance(manifest, dict) or any(manifest[key] != closing[key] for key in named):
            raise MessageError("its manifest is not of the run that its closing checkpoint is of")
        code, about = manifest["task"], manifest["privacy"]
        if not (isinstance(code, str) and isinstance(about, dict) and isinstance(manifest["metrics"], dict)):
            raise MessageError("its manifest is malformed")
        if _hash(path / MODEL) != closing["model_sha256"]:
            raise MessageError(f"{MODEL} is not the model that its closing checkpoint names")
    except (MessageError, KeyError, TypeError) as err:
        why = err.message if isinstance(err, MessageError) else "its manifest or closing checkpoint is malformed"
        raise DataError(f"{path}: {why}", "Have the coordinator deliver it again: the same run with --resume.") from err
    if task not in (None, code):
        raise ConfigError(f"{path}: a model of task {code}, not of {task}", "Leave --task out.")
    return Kept(_arrays(path / MODEL), closing["model_sha256"], code, manifest, sealed)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise DataError(f"{path}: {err.strerror}", "Give a folder that a closing message filled.") from err


def _hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as err:
        raise DataError(f"{path}: {err.strerror}", "Give a kept folder or a model.safetensors.") from err


def _arrays(path: Path) -> Arrays:
    """Its tensors, read by safetensors alone: whatever a file holds, nothing of it is run."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as err:
        raise DataError(
            f"{path}: not a file of tensors (safetensors)", "Nothing else is read; a pickle never."
        ) from err


# -- what it is used for -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictions:
    """What a model says of some rows.

    Attributes:
        classes: names, in the order of the columns of `scores`.
        scores: probability of each class, float32 [n, k].
        ignored: columns of the file that the task's features do not use, its label among them.
    """

    classes: tuple[str, ...]
    scores: npt.NDArray[np.float32]
    ignored: tuple[str, ...]


def predict(kept: Kept, data: Path) -> Predictions:
    """Class probabilities for every row of a CSV file, read by the task's schema; the label's column may be missing.

    Raises:
        TaskError: the task is not installed, or its code is not the code that the model was trained with.
        ConfigError: the task takes arrays, not a table.
        DataError: the model is not one of the task's, or the rows cannot be read; `SchemaViolation` with every violation.
    """
    task = load_task(kept.task)
    if kept.manifest is not None and code_sha256(kept.task) != kept.manifest["task_code_sha256"]:
        raise TaskError(
            f"task {kept.task}: the installed code is not the code that the model was trained with",
            "Install the version of the task that the charter names.",
        )
    if not isinstance(task.schema, TableSchema):
        raise ConfigError(
            f"task {task.name} takes arrays, not a table", "Only tasks with a table schema read CSV files."
        )
    seed = 0 if kept.manifest is None else int(kept.manifest["model_seed"])
    model = model_of(task, kept.arrays, seed)
    table = parse_table(data, task.schema, labelled=False)
    with torch.no_grad():
        parts = [scores_of(model(x)) for x in torch.split(torch.from_numpy(table.x), _BATCH_ROWS)]
    scores = np.concatenate(parts)
    if not np.isfinite(scores).all():
        raise DataError("the model's scores are not finite", "It diverged in training: ask for another.")
    return Predictions(task.classes, scores, table.ignored)


def model_of(task: Task, arrays: Arrays, seed: int) -> torch.nn.Module:
    """The task's model with these trained parameters, ready to be asked.

    Args:
        seed: the charter's `model_seed`: what is not trained is as it was where the training began.

    Raises:
        DataError: other names, shapes or types than the task's, or values that are not finite.
    """
    model = initial_model(task, seed)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    good = {name: a.shape for name, a in arrays.items()} == shapes and all(
        a.dtype == np.float32 for a in arrays.values()
    )
    if not (good and is_finite(arrays)):
        raise DataError(f"the tensors are not those of task {task.name}, or not finite", "Give a model of this task.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(arrays[name]))
    return model.eval()
