"""What is not differential privacy is refused or flagged, with its place and its reason; what is, passes."""

from __future__ import annotations

import json
import re
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest
import yaml

from hansa.common import claims
from hansa.common.charter import CHARTER_TYPE
from hansa.common.claims import CODES, Finding, Severity, lint, lint_file, refused
from hansa.common.cli import run
from hansa.common.config import load_config
from hansa.common.identity import Envelope, canonical, write_envelope
from support import NO_PRIVACY, charter, config, terms

OURS = """\
name: x
task: heart-disease
partners:
  a: {data: a.csv, declared_records: 240}
  b: {data: b.csv, declared_records: 160}
algorithm:
  rounds: 3
  local: {steps: 2, sampling_rate: 0.5, optimizer: {lr: 0.1}}
privacy: {kind: local, epsilon: 1.0, delta: 1.0e-4, clip_norm: 1.0}
evaluation: {kind: public}
quorum: 2
"""

OTHER = """\
# Another tool's file, with everything right.
privacy:
  epsilon: 1.0
  delta: 1.0e-5
  unit: patient
  adjacency: add-or-remove-one
  adversary: the server
  noise_placement: local
  max_grad_norm: 1.0
  noise_multiplier: 1.1
sampling: poisson
sample_rate: 0.01
steps: 100
"""


def found(text: str, tmp_path: Path) -> tuple[Finding, ...]:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return lint_file(path)


def codes(findings: tuple[Finding, ...], severity: Severity = Severity.REFUSE) -> set[str]:
    return {f.code for f in findings if f.severity is severity}


def test_what_is_right_passes(tmp_path: Path) -> None:
    assert found(OURS, tmp_path) == ()
    assert found(OTHER, tmp_path) == ()
    assert lint(charter().charter) == ()
    assert lint(charter(evaluation={"kind": "private", "noise_multiplier": 20.0}).charter) == ()


SECURE = "secure_aggregation: {colluding: 0}\n"
SHARED = OURS.replace("kind: local", "noise: shared") + SECURE


def test_shared_noise_is_right_under_secure_aggregation_only(tmp_path: Path) -> None:
    assert found(SHARED, tmp_path) == ()
    assert found(SHARED.replace("noise: shared", "kind: shared"), tmp_path) == ()
    distributed = OTHER.replace("noise_placement: local", "noise_placement: distributed")
    assert found(distributed + "secagg: true\n", tmp_path) == ()
    for off in ("secagg: false\n", "secure_aggregation: none\n", "secure_aggregation:\n"):
        assert codes(found(distributed + off, tmp_path)) == {"shared-noise-unmasked"}
    privacy = {"kind": "shared", "epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 8.0}
    secure = {"colluding": 1, "dimension": 8}
    assert lint(charter(privacy=privacy, secure_aggregation=secure, quorum=3).charter) == ()
    # Whom shared noise holds against is what `colluding` says: without it an ε has no adversary.
    (bare,) = found(SHARED.replace("colluding: 0", "retries: 1"), tmp_path)
    assert (bare.code, bare.severity) == ("bare-epsilon", Severity.REFUSE)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("colluding", "coluding", "secure_aggregation.colluding is missing"),
        ("{colluding: 0}", "true", "secure_aggregation.colluding is missing"),
        ("noise: shared", "noise: sharde", "privacy.noise must be local, shared, central or none"),
        ("noise: shared", "kind: {is: shared}", "privacy.kind must be local, shared, central or none"),
    ],
)
def test_a_slip_in_our_own_configuration_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert SHARED.count(old) == 1
    (bare,) = found(SHARED.replace(old, new), tmp_path)
    assert bare.code == "bare-epsilon"
    assert words in bare.what
    assert "no unit" not in bare.what


def test_no_protection_is_flagged_by_either_word(tmp_path: Path) -> None:
    for word in ("kind", "noise"):
        bare = OURS.replace("kind: local, epsilon: 1.0, delta: 1.0e-4, clip_norm: 1.0", f"{word}: none")
        (flag,) = found(bare, tmp_path)
        assert (flag.code, flag.severity, flag.path) == ("unprotected", Severity.FLAG, f"privacy.{word}")


@pytest.mark.parametrize("name", ["heart", "heart-shared", "digits", "fashion"])
def test_the_shipped_configurations_pass(name: str) -> None:
    with as_file(files("hansa.configs") / f"{name}.yaml") as path:
        findings = lint_file(path)
        assert lint(load_config(path)) == tuple(
            Finding(f.code, f.severity, f.path, None, f.what) for f in findings
        )  # as parsed and as written
    assert not refused(findings)
    # A population's sizes come from its data, and a simulation says so; nothing else.
    assert [(f.code, f.path) for f in findings] == (
        [] if name.startswith("heart") else [("sizes-from-data", "population")]
    )


def test_the_template_of_a_new_task_passes() -> None:
    text = (files("hansa.common.tasks") / "template" / "federation.yaml").read_text().replace("{{name}}", "x")
    assert lint(yaml.safe_load(text)) == ()


FLOWER = """\
[project]
name = "opacus-fl"

[tool.flwr.app.components]
clientapp = "opacus_fl.client_app:app"

[tool.flwr.app.config]
num-server-rounds = 3
batch-size = 32
target-delta = 1e-5
target-epsilon = 3.0
noise-multiplier = 1.0
"""


def test_a_flower_app_is_read_with_its_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(FLOWER)
    config = "tool.flwr.app.config"
    expected = {
        ("noise-without-clipping", f"{config}.noise-multiplier", 12),
        ("bare-epsilon", f"{config}.target-epsilon", 11),
        ("shuffled-batches", f"{config}.batch-size", 9),
    }
    assert {(f.code, f.path, f.line) for f in lint_file(path)} == expected
    for command in (["plan"], ["charter", "verify"]):
        assert run([*command, str(path)]) == 1
        assert f"refused bare-epsilon  {path}:11: " in capfd.readouterr().err
    # Nothing to refuse, nothing to compute: not fine, and no answer.
    path.write_text('[tool.flwr.app.config]\nnum-server-rounds = 3\nname = "a = b"\n')
    assert run(["plan", str(path)]) == 2
    assert "a TOML file; what Hansa computes from is YAML" in capfd.readouterr().err
    for broken in ("[a", "a = 1\na = 2", "a = " + "[" * 3000, "\x00"):
        path.write_text(broken)
        assert lint_file(path) == ()


def test_toml_that_takes_a_parser_minutes_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text("epsilon = 1.0\n" + "a." * 300_000 + "b = 1\n")
    began = time.monotonic()
    assert lint_file(path) == ()
    assert time.monotonic() - began < 5


def test_lines_of_toml() -> None:
    text = "a = 1\n[b.'c']  # d\n  e-f.g = 2\n[[h]]\ni = 3\n[[h]]\ni = 4\n"
    tables = {("b", "c"): 2, ("b", "c", "e-f", "g"): 3, ("h",): 4, ("h", "0", "i"): 5}
    assert claims._toml_lines(text) == {("a",): 1, **tables}


def test_absolute_noise_is_explained(tmp_path: Path) -> None:
    (ours,) = found(OURS.replace("clip_norm: 1.0", "clip_norm: 2.0, noise_std: 3"), tmp_path)
    assert (ours.code, ours.severity, ours.path) == ("sensitivity-not-the-clip", Severity.REFUSE, "privacy.noise_std")
    assert "as a noise_multiplier it is 1.5" in ours.what
    assert "noise_multiplier, the noise's standard deviation divided by clip_norm" in CODES[ours.code].do
    (other,) = found(OTHER.replace("noise_multiplier: 1.1", "noise_std: 1.1"), tmp_path)
    assert (other.code, other.severity, other.line) == ("sensitivity-not-the-clip", Severity.FLAG, 10)
    # Beside a multiplier that it agrees with nothing is wrong with it.
    assert found(OTHER.replace("steps: 100", "noise_std: 1.1"), tmp_path) == ()


def test_flags_of_a_file_that_is_not_ours_are_shown_before_it_is_not_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(OTHER.replace("  adjacency: add-or-remove-one\n", ""))
    assert run(["plan", str(path)]) == 2
    told = capfd.readouterr()
    assert "flag bare-epsilon" in told.out
    assert "unknown key" in told.err


def test_a_configuration_and_a_charter_are_told_apart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, signed = tmp_path / "c.yaml", tmp_path / "charter.json"
    for text in (OURS, json.dumps(yaml.safe_load(OURS), indent=1)):
        path.write_text(text)
        for command in ("verify", "show", "sign"):
            assert run(["charter", command, str(path)]) == 2
            told = " ".join(capfd.readouterr().err.split())
            assert f"hansa: {path}: a configuration, and no charter yet `hansa plan FILE` reads a configuration" in told
    path.write_text(OURS.replace("1.0e-4", "0.01"))
    assert run(["charter", "verify", str(path)]) == 1
    assert f"hansa: {path}: a configuration" in capfd.readouterr().err, "named once"
    charter().save(signed)
    assert run(["plan", str(signed)]) == 2
    assert "no configuration\n  A charter is read by `hansa charter show` and `verify`" in capfd.readouterr().err


def test_sources_are_at_hand() -> None:
    """Published, or in a clone: what only the project's authors have proves nothing to a reader."""
    assert not [code for code, about in CODES.items() if "DESIGN" in about.source]


# Each row: a code, and how the claim can be written in a file of ours or of another tool; the place it must name.
WRONG = [
    ("noise-without-clipping", OTHER.replace("max_grad_norm: 1.0", "max_grad_norm: null"), "privacy.max_grad_norm", 9),
    ("noise-without-clipping", OTHER.replace("  max_grad_norm: 1.0\n", ""), "privacy.noise_multiplier", 9),
    ("noise-without-clipping", OURS.replace("clip_norm: 1.0", "noise_multiplier: 2.0"), "privacy.noise_multiplier", 9),
    ("noise-without-clipping", OURS.replace(", clip_norm: 1.0", ""), "privacy.epsilon", 9),
    ("noise-without-clipping", OURS.replace("clip_norm: 1.0", "clip_norm: 0, noise_multiplier: 2"), "privacy.clip_norm", 9),
    ("sensitivity-not-the-clip", OURS.replace("clip_norm: 1.0", "clip_norm: 1.0, sensitivity: 2.0"), "privacy.sensitivity", 9),
    ("sensitivity-not-the-clip", OTHER.replace("max_grad_norm: 1.0", "max_grad_norm: median"), "privacy.max_grad_norm", 9),
    ("sensitivity-not-the-clip", OTHER.replace("steps: 100", "noise_std: 0.5"), "noise_std", 13),
    ("sensitivity-not-the-clip", OURS.replace("kind: public", "kind: private, noise_multiplier: 9, sensitivity: 2"),
     "evaluation.sensitivity", 10),
    ("unaccounted-metrics", OTHER + "report: [train_loss, n]\n", "report", 14),
    ("unaccounted-metrics", OURS.replace("kind: public", "kind: public, metrics: [train_loss]"), "evaluation.metrics", 10),
    ("unaccounted-metrics", OURS.replace("kind: public", "kind: private"), "evaluation.kind", 10),
    ("unaccounted-metrics", OURS.replace("kind: public", "kind: train"), "evaluation.kind", 10),
    ("shuffled-batches", OTHER.replace("poisson", "shuffle"), "sampling", 11),
    ("shuffled-batches", OTHER.replace("sampling: poisson", "shuffle: true"), "shuffle", 11),
    ("shuffled-batches", OURS.replace("sampling_rate: 0.5", "batch_size: 32"), "algorithm.local.batch_size", 8),
    ("sizes-from-data", OTHER.replace("steps: 100", "batch_size: 32"), "batch_size", 13),
    ("sizes-from-data", OTHER.replace("sample_rate: 0.01", "sample_rate: auto"), "sample_rate", 12),
    ("sizes-from-data", OTHER + "weights: from_data\n", "weights", 14),
    ("sizes-from-data", OURS.replace("rounds: 3", "rounds: 3\n  weighting: num_examples"), "algorithm.weighting", 8),
    ("sizes-from-data", OURS.replace(", declared_records: 160", ""), "partners.b", 5),
    ("delta-not-below-1/n", OURS.replace("1.0e-4", "0.005"), "privacy.delta", 9),
    ("delta-not-below-1/n", OURS.replace("1.0e-4", "1.5"), "privacy.delta", 9),
    ("delta-not-below-1/n", OURS.replace("delta: 1.0e-4, ", ""), "privacy.epsilon", 9),
    ("delta-not-below-1/n", OTHER.replace("1.0e-5", "0.1") + "dataset_size: 30\n", "privacy.delta", 4),
    ("bare-epsilon", OTHER.replace("  unit: patient\n", ""), "privacy.epsilon", 3),
    ("bare-epsilon", OTHER.replace("  adversary: the server\n", ""), "privacy.epsilon", 3),
    ("bare-epsilon", "epsilon: 3\ndelta: 1e-5\nclip: 1\nsigma: 1\n", "epsilon", 1),
    ("epochs-not-steps", OTHER.replace("steps: 100", "epochs: 15"), "epochs", 13),
    ("no-noise", OTHER.replace("noise_multiplier: 1.1", "noise_multiplier: 0"), "privacy.noise_multiplier", 10),
    ("no-noise", OURS.replace("kind: local", "kind: none"), "privacy.epsilon", 9),
    ("no-noise", OURS.replace("kind: local", "noise: none"), "privacy.epsilon", 9),
    ("shared-noise-unmasked", OURS.replace("kind: local", "noise: shared"), "privacy.noise", 9),
    ("shared-noise-unmasked", OURS.replace("kind: local", "kind: shared"), "privacy.kind", 9),
    ("shared-noise-unmasked", OTHER.replace("noise_placement: local", "noise_placement: distributed"),
     "privacy.noise_placement", 8),
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "text", "path", "line"), WRONG, ids=[f"{w[0]} {w[2]} {n}" for n, w in enumerate(WRONG)]
)
def test_a_wrong_claim_is_refused_at_its_place(code: str, text: str, path: str, line: int, tmp_path: Path) -> None:
    findings = found(text, tmp_path)
    assert (code, path, line) in {(f.code, f.path, f.line) for f in findings if f.severity is Severity.REFUSE}
    assert codes(findings) == {code}  # and nothing else is made of it


@pytest.mark.parametrize("code", sorted({w[0] for w in WRONG}))
def test_each_rule_is_what_finds_its_claims(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its rule each of its rows would pass: no rule is covered by another."""

    def silent(rule: Any) -> Any:
        return lambda file: (f for f in rule(file) if f.code != code)

    monkeypatch.setattr(claims, "_RULES", tuple(silent(r) for r in claims._RULES))
    assert not any(refused(found(text, tmp_path)) for c, text, *_ in WRONG if c == code)


def test_what_may_be_right_is_flagged_only() -> None:
    privacy = {"epsilon": 1.0, "delta": 1e-4, "clip_norm": 1.0}
    exact = {"a": {"data": "x", "declared_records": 243}, "b": {"data": "y", "declared_records": 160}}
    for subject, code, path in [
        (config(privacy=privacy, partners=exact, quorum=2), "sizes-from-data", "partners.a.declared_records"),
        (config(privacy=privacy, declared_tolerance=0.0), "sizes-from-data", "declared_tolerance"),
        (charter(privacy=NO_PRIVACY).charter, "unprotected", "privacy.kind"),
    ]:
        assert [(f.code, f.severity, f.path) for f in lint(subject)] == [(code, Severity.FLAG, path)]


def test_refusals_come_first_and_say_why_and_what_to_do(tmp_path: Path) -> None:
    findings = found(OURS.replace("declared_records: 240", "declared_records: 243").replace("1.0e-4", "0.01"), tmp_path)
    assert [f.severity for f in findings] == [Severity.REFUSE, Severity.FLAG]
    fields = findings[0].to_fields()
    assert fields["what"].startswith("privacy.delta 0.01 is not below 1/n = 0.0041 for 243 records (a and 1 more)")
    assert all(fields[key] for key in ("why", "source", "do", "line"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "- 1",
        "a: &a [*a]",
        "[" * 3000,
        "a: b: c",
        "\x00",
        "x: &x [1,1]\n" + "".join(f"y{i}: [*x,*x]\n" for i in range(5)),
    ],
)
def test_what_cannot_be_read_is_left_to_its_reader(text: str, tmp_path: Path) -> None:
    assert found(text, tmp_path) == ()
    assert lint_file(tmp_path / "missing") == ()


def test_a_bomb_of_aliases_ends(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12)
    )
    assert found(bomb, tmp_path) == ()


def test_every_code_is_explained_to_stewards() -> None:
    page = (Path(__file__).parents[2] / "docs" / "claims.md").read_text()
    explained = set(re.findall(r"^### `([^`]+)`", page, re.M))
    assert explained == set(CODES)


# -- commands ------------------------------------------------------------------------------------------------------------


def edited(**changes: Any) -> bytes:
    """An envelope around terms that Hansa would not write; unsigned."""
    made = json.loads(charter().payload)
    for key, value in changes.items():
        place, _, last = key.rpartition("__")
        target = made[place] if place else made
        if value is None:
            del target[last]
        else:
            target[last] = value
    return write_envelope(Envelope(CHARTER_TYPE, canonical(made), ())) + b"\n"


def test_a_charter_with_a_wrong_claim_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "charter.json"
    for data, code in [
        (edited(privacy__clip_norm=None), "noise-without-clipping"),
        (edited(privacy__unit=None), "bare-epsilon"),
        (edited(privacy__delta="0.025"), "delta-not-below-1/n"),
        (edited(privacy__sensitivity="2"), "sensitivity-not-the-clip"),
        (edited(report=["train_loss"]), "unaccounted-metrics"),
        (edited(sampling="shuffle"), "shuffled-batches"),
        (edited(weighting="from_data"), "sizes-from-data"),
        (edited(privacy__kind="shared"), "shared-noise-unmasked"),
        (OTHER.replace("unit: patient", "").encode(), "bare-epsilon"),
    ]:
        path.write_bytes(data)
        assert run(["charter", "verify", str(path)]) == 1, code
        assert f"refused {code}" in capfd.readouterr().err
        assert run(["charter", "verify", str(path), "--format", "json"]) == 1
        told = json.loads(capfd.readouterr().out)
        assert not told["valid"]
        assert code in {f["code"] for f in told["findings"] if f["severity"] == "refuse"}


def test_a_good_charter_verifies_and_a_flag_does_not_fail(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "charter.json"
    charter().save(path)
    assert run(["charter", "verify", str(path), "--format", "json"]) == 0
    assert json.loads(capfd.readouterr().out)["findings"] == []
    charter(privacy=NO_PRIVACY).save(path)
    assert run(["charter", "verify", str(path)]) == 0
    assert "flag unprotected" in capfd.readouterr().out
    path.write_text("not a charter: 1\n")
    assert run(["charter", "verify", str(path)]) == 2
    assert terms()["format"] == "hansa-charter/1"


def test_plan_refuses_before_it_computes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hansa.common import plan_cli

    monkeypatch.setattr(plan_cli, "planned", lambda *_: pytest.fail("computed"))
    for code, text, path, line in WRONG:
        file = tmp_path / "c.yaml"
        file.write_text(text)
        assert run(["plan", str(file)]) == 1
        assert f"refused {code}  {file}:{line}: {path}: " in capfd.readouterr().err
        assert run(["plan", str(file), "--format", "json"]) == 1
        told = json.loads(capfd.readouterr().out)
        assert not told["fits"]
        assert code in {f["code"] for f in told["findings"]}
