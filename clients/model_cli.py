"""The commands about models that a closing message delivered: show and predict. Torch is imported only when one runs."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.charter import SignedCharter
from ..common.cli import Format, FormatOption, out, plain, show_json
from ..common.errors import CharterError, MessageError, OutputError, counted
from ..common.identity import write_whole

if TYPE_CHECKING:
    from .models import Kept, Predictions

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="a kept folder, or a model.safetensors")]
TaskOption = Annotated[str | None, typer.Option("--task", help="the task of a bare model.safetensors")]


def commands(app: typer.Typer) -> None:
    """Register this floor's commands about models."""
    model = typer.Typer(help="What a run's closing message delivered: show it, use it.", no_args_is_help=True)
    model.command("show")(show)
    model.command("predict")(predict)
    app.add_typer(model, name="model")


def show(
    model: ModelArgument,
    charter: Annotated[Path | None, typer.Option(help="the charter whose signatures the model must have")] = None,
    task: TaskOption = None,
    form: FormatOption = Format.TEXT,
) -> int:
    """Show a model: task, tensors, run and charter, what its privacy statement is, and whose word its metrics are.

    With --charter also checks that everyone in it signed for exactly this model. Exit 1 when they did not.

    Example: hansa model show node/models/20261122-1f2e3d4c --charter charter.json
    """
    from .models import load_kept

    kept = load_kept(model, task)
    problem = None
    if charter is not None:
        signed = SignedCharter.load(charter)
        try:
            kept.verify(signed)
        except (CharterError, MessageError) as err:
            problem = f"{charter}: {err.message}"
    checked = charter is not None and problem is None
    if form is Format.JSON:
        show_json(
            {
                "task": kept.task,
                "sha256": kept.sha256,
                "tensors": {name: list(array.shape) for name, array in kept.arrays.items()},
                "manifest": kept.manifest,
                "verified": None if charter is None else checked,
                "problem": problem,
            }
        )
    else:
        _print(kept)
        if charter is None:
            out.print("signatures: not checked; give --charter, the charter that you signed")
        elif checked:
            out.print("signatures: [bold green]VERIFIED[/], everyone in the charter signed for exactly this model")
        else:
            out.print(f"signatures: [bold red]NOT VERIFIED[/]: {plain(problem or '')}")
    return 0 if problem is None else 1


def _print(kept: Kept) -> None:
    values = sum(array.size for array in kept.arrays.values())
    out.print(plain(f"model of task {kept.task}, sha-256 {kept.sha256}"))
    for name, array in kept.arrays.items():
        out.print(plain(f"  {name:<30} {list(array.shape)}"))
    out.print(f"  {values} values of {len(kept.arrays)} tensors")
    if kept.manifest is None:
        out.print("a bare file: nothing is known of its run, its privacy or its metrics")
        return
    m: dict[str, Any] = dict(kept.manifest)
    simulated = "; SIMULATED" if m.get("simulated") else ""
    out.print(plain(f"run {m['run_id']}, {counted(m.get('rounds', 0), 'round')}{simulated}"))
    out.print(plain(f"charter {m.get('charter')}, sha-256 {m['charter_sha256']}"))
    p = m["privacy"]
    if p.get("kind") == "none":
        out.print("privacy: NONE. The updates left unprotected; the model can reveal records.")
    else:
        out.print(
            plain(
                f"privacy: each partner spent at most epsilon {p.get('epsilon')} at delta {p.get('delta')} under this charter; "
                f"unit: one {p.get('unit')} of one partner; adjacency: {p.get('adjacency')}; noise: {p.get('noise')}, "
                f"{p.get('noise_multiplier')} x the clipping norm {p.get('clip_norm')}; adversary: {p.get('adversary')}"
            )
        )
    if m["metrics"]:
        out.print(plain("metrics: " + "  ".join(f"{name} {value}" for name, value in m["metrics"].items())))
        out.print(plain(f"  on {m.get('evaluation')} evaluation; {m.get('metrics_are')}"))
    else:
        out.print("metrics: none were measured")


def predict(
    model: ModelArgument,
    data: Annotated[Path, typer.Argument(metavar="DATA.CSV", help="rows by the task's schema; no label is needed")],
    to: Annotated[Path | None, typer.Option("--out", help="the file to write, mode 0600; default the screen")] = None,
    task: TaskOption = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Class and probability of each class for every row of a CSV file; text is CSV as well.

    Only where the installed code of the task is the code that the model was trained with.

    Example: hansa model predict node/models/20261122-1f2e3d4c new-patients.csv --out predictions.csv
    """
    from .models import load_kept, predict

    if to is not None and to.exists():
        raise OutputError(f"{to}: exists", "Give another --out; nothing is overwritten.")
    found = predict(load_kept(model, task), data)
    if found.ignored and to is not None:
        out.print(plain(f"not used: {', '.join(found.ignored)}"))
    text = _json(found) if form is Format.JSON else _csv(found)
    if to is None:
        sys.stdout.write(text)
        return
    write_whole(to, text.encode(), mode=0o600)
    out.print(plain(f"{counted(len(found.scores), 'row')} written to {to}"))


def _rows(found: Predictions) -> list[tuple[int, str, list[float]]]:
    """Row number (from 1, without the header), class (a tie goes to the first), probabilities to six digits."""
    best = found.scores.argmax(axis=1)
    return [
        (number, found.classes[best[number - 1]], [round(float(p), 6) for p in row])
        for number, row in enumerate(found.scores, start=1)
    ]


def _csv(found: Predictions) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "class", *(f"probability of {name}" for name in found.classes)])
    for number, name, scores in _rows(found):
        writer.writerow([number, name, *(f"{p:.6f}" for p in scores)])
    return text.getvalue()


def _json(found: Predictions) -> str:
    rows = [
        {"row": number, "class": name, "probabilities": dict(zip(found.classes, scores, strict=True))}
        for number, name, scores in _rows(found)
    ]
    return json.dumps({"classes": list(found.classes), "rows": rows}, indent=1) + "\n"
