"""`hansa model show` and `hansa model predict` as a partner uses them."""

from __future__ import annotations

import csv
import io
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from e2e_support import call, rows_of, write_rows
from hansa.clients import model_cli, models
from hansa.common import cli
from hansa.common.identity import canonical
from hansa.simulations import sources
from support import NO_PRIVACY, config, run

HUNGARY = sources.packaged("package:heart-disease/hungary.csv")
LOCAL = {"kind": "local", "epsilon": 1.0, "delta": 1e-4, "clip_norm": 1.0}


@dataclass(frozen=True)
class Entry:
    """The commands of this source tree, whatever is installed."""

    name: str = "models"

    def load(self) -> Any:
        return model_cli.commands


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda group: [Entry()])


def made(folder: Path, privacy: dict[str, Any]) -> Path:
    """A bundle whose run had one round."""
    run(config(privacy=privacy, algorithm={"rounds": 1, "local": {"steps": 2, "optimizer": {"lr": 0.2}}}), folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("run") / "out", LOCAL)


def kept_of(bundle: Path) -> Path:
    (folder,) = (bundle.with_name("out.private") / "hungary" / "models").iterdir()
    return folder


@pytest.fixture
def kept(bundle: Path) -> Path:
    return kept_of(bundle)


@pytest.mark.parametrize("command", ["show", "predict"])
def test_help_shows_an_example(command: str) -> None:
    call("model", command, "--help").expect(0).says(f"Example: hansa model {command}")


# -- show ------------------------------------------------------------------------------------------------------------


def test_show_says_what_it_is_and_whose_word_is_whose(kept: Path, bundle: Path) -> None:
    charter = bundle / "charter.json"
    shown = call("model", "show", kept, "--charter", charter).expect(0)
    manifest = json.loads((kept / "model.json").read_bytes())
    shown.says(
        "task heart-disease", manifest["model_sha256"], "weight", "[2, 35]", f"run {kept.name}, 1 round; SIMULATED",
        f"charter heart, sha-256 {manifest['charter_sha256']}",
        "at most epsilon 1.0 at delta 0.0001", "one record of one partner", "add-or-remove-one", "noise: local",
        "adversary: everyone but the partner itself", "auc 0.", "public evaluation", "the coordinator's word", "VERIFIED",
    )  # fmt: skip
    assert "NOT VERIFIED" not in shown.text
    call("model", "show", kept).expect(0).says("signatures: not checked; give --charter")


def test_show_as_json(kept: Path, bundle: Path) -> None:
    found = call("model", "show", kept, "--charter", bundle / "charter.json", "--format", "json").expect(0).json()
    assert found["tensors"] == {"bias": [2], "weight": [2, 35]}
    assert (found["verified"], found["problem"]) == (True, None)
    assert found["manifest"]["privacy"]["adjacency"] == "add-or-remove-one"
    assert call("model", "show", kept, "--format", "json").expect(0).json()["verified"] is None


def test_show_says_no_where_signatures_do_not_fit(kept: Path, bundle: Path, tmp_path: Path) -> None:
    other = made(tmp_path / "other", LOCAL) / "charter.json"
    call("model", "show", kept, "--charter", other).expect(1).says("NOT VERIFIED", "not signed by")
    found = call("model", "show", kept, "--charter", other, "--format", "json").expect(1).json()
    assert (found["verified"], "not signed by" in found["problem"]) == (False, True)
    bare = ["model", "show", kept / "model.safetensors", "--task", "heart-disease"]
    call(*bare, "--charter", bundle / "charter.json").expect(1).says("NOT VERIFIED", "a bare file")
    call(*bare).expect(0).says("a bare file: nothing is known of its run, its privacy or its metrics")


def test_show_of_a_model_without_privacy(tmp_path: Path) -> None:
    folder = kept_of(made(tmp_path / "out", NO_PRIVACY))
    call("model", "show", folder).expect(0).says("privacy: NONE. The updates left unprotected")


def test_a_manifest_cannot_steer_the_screen(kept: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "kept"
    spoilt.mkdir()
    for path in kept.iterdir():
        (spoilt / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((kept / "model.json").read_bytes())
    odd = {**manifest, "charter": "\x1b[2J[red]", "metrics": {"[bold]\x1b": "\u202e"}}
    (spoilt / "model.json").write_bytes(canonical(odd))
    shown = call("model", "show", spoilt).expect(0)
    assert "\x1b" not in shown.text
    assert "\u202e" not in shown.text
    shown.says("[red]", "[bold]")


@pytest.mark.parametrize("command", [["show"], ["predict", HUNGARY]])
def test_what_is_no_model(command: list[Any], tmp_path: Path) -> None:
    rest = command[1:]
    call("model", command[0], tmp_path / "nowhere", *rest, "--task", "digits").expect(2).says("nowhere")
    call("model", command[0], tmp_path / "nowhere", *rest).expect(2).says("no such file or folder")
    (tmp_path / "bare").write_bytes(b"x")
    call("model", command[0], tmp_path / "bare", *rest).expect(2).says("Give --task, or a kept folder")
    call("model", command[0], tmp_path, *rest).expect(2).says("closing.json")


# -- predict ---------------------------------------------------------------------------------------------------------


def test_predict_writes_a_line_a_row(kept: Path, tmp_path: Path) -> None:
    label = "num"
    rows = rows_of(HUNGARY)
    assert label in rows[0]
    file = write_rows(tmp_path / "new.csv", [{k: v for k, v in row.items() if k != label} for row in rows])
    shown = call("model", "predict", kept, file).expect(0)
    assert shown.err == ""
    found = list(csv.DictReader(io.StringIO(shown.out)))
    weights = load_file(kept / "model.safetensors")
    assert weights["weight"].any()
    classes = [name.removeprefix("probability of ") for name in found[0] if name.startswith("probability")]
    assert [row["row"] for row in found] == [str(n) for n in range(1, len(rows) + 1)]
    for row in found:
        scores = [float(row[f"probability of {name}"]) for name in classes]
        assert sum(scores) == pytest.approx(1, abs=3e-6)
        assert row["class"] == classes[int(np.argmax(scores))]
    assert {row["class"] for row in found} <= set(classes)  # which of them win is up to the noise
    told = call("model", "predict", kept, file, "--format", "json").expect(0).json()
    assert told["classes"] == classes
    assert len(told["rows"]) == len(rows)
    assert told["rows"][4] == {
        "row": 5,
        "class": found[4]["class"],
        "probabilities": {name: float(found[4][f"probability of {name}"]) for name in classes},
    }


def test_predict_into_a_file_of_its_owner(kept: Path, tmp_path: Path) -> None:
    target = tmp_path / "predictions.csv"
    done = (
        call("model", "predict", kept, HUNGARY, "--out", target).expect(0).says("not used: num", f"written to {target}")
    )
    assert "probability" not in done.text
    assert target.read_text() == call("model", "predict", kept, HUNGARY).expect(0).out
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    before = target.read_bytes()
    call("model", "predict", kept, HUNGARY, "--out", target).expect(2).says("exists", "nothing is overwritten")
    assert target.read_bytes() == before


def test_predict_refuses(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "p.csv"
    command = ["model", "predict", kept, HUNGARY, "--out", target]
    monkeypatch.setattr(models, "code_sha256", lambda _: "d" * 64)
    call(*command).expect(2).says("not the code that the model was trained with")
    monkeypatch.undo()
    monkeypatch.setattr(cli, "entry_points", lambda group: [Entry()])
    save_file({"weight": np.zeros((3, 3), np.float32)}, tmp_path / "m")
    call("model", "predict", tmp_path / "m", HUNGARY, "--task", "heart-disease", "--out", target).expect(2).says(
        "tensors"
    )
    rows = rows_of(HUNGARY)
    bad = write_rows(tmp_path / "bad.csv", [{**rows[0], "age": "many"}])
    call("model", "predict", kept, bad, "--out", target).expect(2).says("outside the schema", "many")
    call("model", "predict", kept, tmp_path / "none.csv", "--out", target).expect(2).says("no data file")
    assert not target.exists()
