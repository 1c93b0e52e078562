"""`hansa audit` on the bundle of a real run: verdict, page, exit codes, and the verifier's file alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from e2e_support import HOSPITALS, REPO, Result, process

pytestmark = pytest.mark.slow


def test_the_page_of_a_real_run(demo_run: tuple[Path, Result], tmp_path: Path) -> None:
    bundle, before = demo_run[0], _files(demo_run[0])
    told = process("audit", bundle, "--report", tmp_path / "report.html", "--format", "json").expect(0)
    verdict = json.loads(told.out)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))
    assert "Verified" in text
    assert verdict["charter_sha256"] in text
    for name in HOSPITALS:
        assert f"{name} ✓ within cap" in text
    for shown in ("its remaining privacy budget cannot pay for it", "unit: one record of one partner", "SIMULATED"):
        assert shown in text
    assert hashlib.sha256((REPO / "common" / "verifier.py").read_bytes()).hexdigest() in text
    assert f"sha-256 {verdict['charter_sha256']}" in text  # the charter, in words
    assert not re.search(r"<script|<img|<link|https?:", html)
    assert _files(bundle) == before  # nothing was written into the evidence


def test_the_page_of_an_edited_bundle(bundle: Path, tmp_path: Path) -> None:
    ledger = bundle / "partners" / "hungary" / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:5] + lines[6:]))
    process("audit", bundle, "--report", tmp_path / "report.html").expect(1).says("NOT VERIFIED", str(tmp_path))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Not verified" in html
    assert "partners/hungary/ledger.jsonl:6" in html


def test_it_is_not_written_into_the_bundle(bundle: Path) -> None:
    before = _files(bundle)
    process("audit", bundle, "--report", bundle / "audit.html").expect(2).says("inside the bundle")
    assert _files(bundle) == before


def test_the_commands_of_the_page_repeat_it(demo_run: tuple[Path, Result], tmp_path: Path) -> None:
    """As the page says it, but for the packages, which are at hand."""
    bundle = demo_run[0]
    process("audit", bundle, "--report", tmp_path / "report.html").expect(0)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "audit/bin/python verifier.py" in html
    (tmp_path / "verifier.py").write_bytes((REPO / "common" / "verifier.py").read_bytes())
    alone = subprocess.run(  # isolated: nothing of ours can be imported
        [sys.executable, "-I", "verifier.py", str(bundle)],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    verdict = json.loads(alone.stdout)
    assert verdict["partners"] == json.loads(process("audit", bundle, "--format", "json").out)["partners"]


LIGHT = """
import sys

class Light:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "flwr", "opacus", "safetensors", "sklearn", "matplotlib", "grpc"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Light())
from hansa.common.cli import run
sys.exit(run(sys.argv[1:]))
"""


def test_an_auditor_needs_no_training_libraries(demo_run: tuple[Path, Result], tmp_path: Path) -> None:
    """Every floor's commands are loaded before one is chosen: none of them may bring torch."""
    command = [sys.executable, "-c", LIGHT, "audit", str(demo_run[0]), "--report", "report.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "VERIFIED" in done.stdout
    assert (tmp_path / "report.html").exists()


def _files(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }
